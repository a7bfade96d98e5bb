//! Tampering with the backing directory: each attack with the exact code it gives, or with the plain statement that it is
//! not noticed (`docs/THREAT_MODEL.md`). Whatever is done, nothing panics, no read returns bytes that were not written
//! there, what was not touched stays readable, and looking changes nothing below.

mod blocks;
mod header;
mod holes;
mod keyring;
mod names;
mod random;
mod size;
mod states;

use envelopefs::backing::sim::{SimDisk, SimOptions};
use envelopefs::backing::{Access, Backing};
use envelopefs::crypto::secret::Dek;
use envelopefs::format::geometry::{self, Copy2};
use envelopefs::format::header::{Slot, SlotPair};
use envelopefs::format::ids::KekId;
use envelopefs::kms::KeyProvider;
use envelopefs::kms::scripted::Scripted;
use envelopefs::rotation;
use envelopefs::store::check::{self, CheckOptions, CheckReport};
use envelopefs::store::file::OpenFile;
use envelopefs::store::keys::{KekKind, Keys, StoreFlags};
use envelopefs::store::node::Node;
use envelopefs::store::open::{Store, StoreOptions};
use envelopefs::store::{Result, StoreError, header as store_header};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

const PAGE: u64 = geometry::PAGE;
/// Bytes of both header slots.
const SLOTS: usize = 2048;
/// A file within segment 0, its last block cut.
const SMALL: usize = 9 * 4096 + 100;
/// A file over segments 0, 1 and 2, its last block cut.
const LARGE: usize = (32 + 128 + 20) * 4096 + 17;
/// A file of which only the first block, one of segment 2 and the last, of segment 3, were written.
const SPARSE: usize = (32 + 3 * 128) * 4096;

fn pattern(len: usize, salt: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ (i >> 16) as u8 ^ salt | 1).collect()
}

/// What the files of the store hold, by name.
fn contents() -> &'static BTreeMap<&'static str, Vec<u8>> {
    static CONTENTS: OnceLock<BTreeMap<&str, Vec<u8>>> = OnceLock::new();
    CONTENTS.get_or_init(|| {
        let mut sparse = vec![0; SPARSE];
        for block in SPARSE_BLOCKS {
            let at = block * 4096;
            sparse[at..at + 4096].copy_from_slice(&pattern(4096, block as u8));
        }
        BTreeMap::from([
            ("empty", Vec::new()),
            ("large", pattern(LARGE, 1)),
            ("large too", pattern(LARGE, 2)),
            ("small", pattern(SMALL, 3)),
            ("small too", pattern(SMALL, 4)),
            ("sparse", sparse),
        ])
    })
}

/// Blocks of the sparse file that were written: in segments 0, 2 and 3.
const SPARSE_BLOCKS: [usize; 3] = [0, 32 + 128 + 5, 32 + 3 * 128 - 1];

fn root() -> Vec<Arc<dyn KeyProvider>> {
    static KEY: OnceLock<Arc<Scripted>> = OnceLock::new();
    vec![KEY.get_or_init(|| Scripted::new("tamper")).clone()]
}

/// A store on a simulated disk.
struct World {
    disk: SimDisk,
}

/// What became of a file: the error that opening it gave, or of each block that cannot be read its code.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Closed(String),
    Open(BTreeMap<u64, String>),
}

fn closed(code: &str) -> Seen {
    Seen::Closed(code.to_owned())
}

fn fine() -> Seen {
    Seen::Open(BTreeMap::new())
}

/// These blocks cannot be read, with this code; all others can.
fn bad(code: &str, blocks: impl IntoIterator<Item = u64>) -> Seen {
    Seen::Open(blocks.into_iter().map(|b| (b, code.to_owned())).collect())
}

impl World {
    /// A new store with the files of [`contents`], closed.
    fn build() -> Self {
        let disk = SimDisk::new(SimOptions::default());
        Store::init(&disk, &root(), KekKind::Sealed, StoreFlags::default()).unwrap();
        let w = Self { disk };
        let s = w.mount(false);
        for (name, content) in contents() {
            let (_, _, f) = s.create(&s.root(), name.as_bytes(), 0o600, 0, None).unwrap();
            if *name == "sparse" {
                f.set_len(SPARSE as u64).unwrap();
                for b in SPARSE_BLOCKS {
                    f.write(b as u64 * PAGE, &content[b * 4096..][..4096]).unwrap();
                }
                continue;
            }
            // In pieces, so that both copies of the states have been written.
            for (i, piece) in content.chunks(5 * 4096).enumerate() {
                f.write((i * 5 * 4096) as u64, piece).unwrap();
            }
        }
        s.close().unwrap();
        w.disk.sync_all().unwrap();
        w
    }

    /// A copy of one store that is the same for every test.
    fn new() -> Self {
        static WORLD: OnceLock<World> = OnceLock::new();
        WORLD.get_or_init(Self::build).copy()
    }

    fn copy(&self) -> Self {
        Self { disk: self.disk.crash_process() }
    }

    fn keys(&self) -> Keys {
        Keys::open(&self.disk, &root()).unwrap()
    }

    fn mount(&self, read_only: bool) -> Arc<Store<SimDisk>> {
        let o = StoreOptions { read_only, ..StoreOptions::default() };
        Store::open(self.disk.clone(), self.keys(), o).unwrap()
    }

    /// Where a file of the root directory lies in the backing directory.
    fn path(&self, name: &str) -> Vec<u8> {
        let s = self.mount(true);
        let found = s.read_dir(&s.root()).unwrap().into_iter().find(|e| e.name == name.as_bytes());
        found.unwrap_or_else(|| panic!("no {name} in the listing")).backing
    }

    fn raw(&self, name: &str) -> Vec<u8> {
        self.disk.read_raw(self.path(name)).unwrap()
    }

    fn put(&self, name: &str, at: u64, data: &[u8]) {
        self.disk.write_raw(self.path(name), at, data).unwrap();
    }

    /// Opens a file read-only and reads it block by block. A block that can be read must be what was written.
    fn look(&self, name: &str) -> Seen {
        self.look_for(name, &contents()[name])
    }

    fn look_for(&self, name: &str, want: &[u8]) -> Seen {
        let before = self.disk.operations();
        let s = self.mount(true);
        let (node, _) = s.lookup(&s.root(), name.as_bytes()).unwrap();
        let seen = look_at(&s, &node, want);
        drop((node, s));
        assert_eq!(self.disk.operations(), before, "looking changed the backing directory");
        seen
    }

    /// Every file but those named can be read as it was written.
    fn others_are_fine(&self, but: &[&str]) {
        for name in contents().keys().filter(|n| !but.contains(n)) {
            assert_eq!(self.look(name), fine(), "{name}");
        }
    }

    /// Codes of everything a check finds to be damaged, by backing path.
    fn check(&self) -> Vec<(String, String)> {
        let before = self.disk.operations();
        let keys = self.keys();
        let r = check::run(&self.disk, Some(&keys), &CheckOptions { deep: true }, &()).unwrap();
        // And without keys, which must not do worse than to find less.
        check::run(&self.disk, None, &CheckOptions { deep: false }, &()).unwrap();
        assert_eq!(self.disk.operations(), before, "checking changed the backing directory");
        damage(&r)
    }

    /// Both slots as they are.
    fn slots(&self, name: &str) -> SlotPair {
        SlotPair::decode(&self.raw(name)).unwrap()
    }

    /// A file's DEK.
    fn dek(&self, name: &str) -> Dek {
        let slot = self.slots(name).a.unwrap();
        store_header::unwrap_slot(&self.keys().kek(slot.kek).unwrap(), &slot).unwrap()
    }

    fn put_slots(&self, name: &str, a: &Slot, b: &Slot) {
        self.put(name, 0, &[a.encode(), b.encode()].concat());
    }

    /// Moves every header to a new KEK; returns the old one.
    fn rotate(&self, destroy_old: bool) -> KekId {
        let s = self.mount(false);
        let old = s.shared().keys.snapshot().active().unwrap().id;
        let options = rotation::Options { destroy_old, ..rotation::Options::default() };
        let ctx = rotation::Context { shared: s.shared(), moves: &*s };
        let r = rotation::run(&ctx, &options, &(), &rotation::Control::new()).unwrap();
        assert_eq!(r.outcome, rotation::Outcome::Complete);
        s.close().unwrap();
        old
    }

    /// Opens a file for writing, changes it, and lets the daemon be killed.
    fn kill_after(&mut self, name: &str, change: impl FnOnce(&OpenFile<SimDisk>)) {
        let s = self.mount(false);
        let (node, _) = s.lookup(&s.root(), name.as_bytes()).unwrap();
        let f = s.open_file(&node, Access::ReadWrite).unwrap();
        change(&f);
        let after = self.disk.crash_process();
        drop((f, node, s));
        self.disk = after;
    }

    /// Opens a file for writing, changes it, and closes everything.
    fn change(&self, name: &str, change: impl FnOnce(&OpenFile<SimDisk>)) {
        let s = self.mount(false);
        let (node, _) = s.lookup(&s.root(), name.as_bytes()).unwrap();
        let f = s.open_file(&node, Access::ReadWrite).unwrap();
        change(&f);
        drop((f, node));
        s.close().unwrap();
    }
}

fn write(f: &OpenFile<SimDisk>, at: u64, data: &[u8]) {
    assert_eq!(f.write(at, data).unwrap(), data.len());
}

fn damage(r: &CheckReport) -> Vec<(String, String)> {
    let bad = r.findings.iter().filter(|f| f.severity == check::Severity::Damage);
    bad.map(|f| (f.path.clone(), f.code.clone())).collect()
}

fn code<T>(r: Result<T>) -> String {
    match r {
        Ok(_) => "fine".to_owned(),
        Err(e) => e.code(),
    }
}

fn look_at(s: &Arc<Store<SimDisk>>, node: &Arc<Node<SimDisk>>, want: &[u8]) -> Seen {
    let f = match s.open_file(node, Access::Read) {
        Ok(f) => f,
        Err(e) => return Seen::Closed(e.code()),
    };
    assert_eq!(f.len(), want.len() as u64, "length");
    let mut out = BTreeMap::new();
    for (i, want) in want.chunks(4096).enumerate() {
        let mut got = vec![0xa5; want.len()];
        match f.read(i as u64 * PAGE, &mut got) {
            Ok(n) => assert!(n == want.len() && got == want, "block {i} reads as what was never written there"),
            Err(e) => drop(out.insert(i as u64, e.code())),
        }
    }
    Seen::Open(out)
}

/// The slot with its checksum made right, as an attacker would.
fn with_crc(mut slot: Vec<u8>) -> Vec<u8> {
    let crc = crc32c::crc32c(&slot[..1020]);
    slot[1020..1024].copy_from_slice(&crc.to_le_bytes());
    slot
}

/// Blocks of a file of `len` bytes from `from` on.
fn blocks_from(from: u64, len: usize) -> std::ops::Range<u64> {
    from..geometry::block_count(len as u64)
}

fn at_block(block: u64) -> u64 {
    geometry::block_offset(block)
}

fn at_state(segment: u64, copy: Copy2) -> u64 {
    geometry::state_offset(segment, copy)
}
