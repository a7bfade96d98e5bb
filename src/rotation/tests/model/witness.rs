//! Looks at the disk itself, with none of what the rotation looks with: its own walk, and the keyring as it lies there.

use super::super::*;
use crate::backing::sim::SimNode;
use crate::backing::{Access, read_into};
use crate::crypto::kdf;
use crate::format::geometry::{PAGE, SLOT};
use crate::format::header::Slot;
use crate::format::ids::FileId;
use crate::format::keyring::{KekState, Keyring};
use crate::format::names::{self, Listed};
use crate::store::header::unwrap_slot;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use std::collections::HashSet;

/// A file with a header.
pub struct Header {
    pub path: Vec<u8>,
    pub ino: u64,
    /// Both slots.
    pub slots: Vec<u8>,
    /// All that follows, if it was asked for.
    pub tail: Vec<u8>,
}

impl Header {
    /// The valid slots.
    pub fn valid(&self) -> Vec<Slot> {
        self.slots.chunks_exact(SLOT).filter_map(|s| Slot::decode(s.try_into().unwrap()).ok()).collect()
    }
}

/// Every file that has a header, once. Files without content have none, nor have those of the store's own.
pub fn headers(disk: &SimDisk) -> Vec<Header> {
    walk(disk, 2 * SLOT)
}

/// The same, with what follows the slots.
pub fn whole_files(disk: &SimDisk) -> Vec<Header> {
    walk(disk, usize::MAX)
}

/// Whether any file has content, and zeros in place of a header.
pub fn some_have_no_header(disk: &SimDisk) -> bool {
    let is_lost = |raw: Vec<u8>| raw.len() > PAGE as usize && raw[..2 * SLOT].iter().all(|b| *b == 0);
    disk.files().iter().any(|p| !p.starts_with(b".envelopefs/") && is_lost(disk.read_raw(p).unwrap()))
}

fn walk(disk: &SimDisk, most: usize) -> Vec<Header> {
    // A copy: the disk may stop at any time, by another of the run's threads.
    let disk = disk.crash_process();
    let mut out = Vec::new();
    below(&disk, &disk.root().unwrap(), &[], most, &mut out);
    let mut seen = BTreeSet::new();
    out.retain(|h| seen.insert(h.ino));
    out
}

fn below(disk: &SimDisk, dir: &SimNode, path: &[u8], most: usize, out: &mut Vec<Header>) {
    for e in disk.read_dir(dir).unwrap() {
        let path = [path, b"/", &e.name].concat();
        let node = disk.lookup(dir, &e.name).unwrap();
        match e.kind {
            Some(Kind::Dir) => below(disk, &node, &path, most, out),
            Some(Kind::File) => {
                let file = disk.open(&node, Access::Read).unwrap();
                let size = disk.stat_file(&file).unwrap().size as usize;
                let mut slots = vec![0; size.min(most)];
                read_into(disk, &file, &mut slots, 0).unwrap();
                if slots.len() >= 2 * SLOT && slots.chunks_exact(SLOT).take(2).any(|s| s.starts_with(MAGIC)) {
                    let tail = slots.split_off(2 * SLOT);
                    out.push(Header { path, ino: e.ino, slots, tail });
                }
            }
            _ => {}
        }
    }
}

/// Removes what nobody can list, because the file that holds the rest of its long name never reached the disk. No sync has
/// promised it. Of files only those with a torn header: one that has none at all is in no rotation's way.
pub fn remove_unlisted(disk: &SimDisk, dir: &SimNode) {
    let read = |name: &[u8]| -> std::io::Result<Vec<u8>> {
        let file = disk.open(&disk.lookup(dir, name)?, Access::Read)?;
        let mut text = vec![0; 1024];
        let n = read_into(disk, &file, &mut text, 0)?;
        text.truncate(n);
        Ok(text)
    };
    let is_listed = |name: &[u8]| {
        let Some(hash) = name.strip_prefix(names::LONG_PREFIX) else { return true };
        names::classify(name) != Listed::Long
            || read(&names::sidecar_of(name)).is_ok_and(|text| BASE64URL.encode(kdf::sha256(&text)).as_bytes() == hash)
    };
    for e in disk.read_dir(dir).unwrap() {
        let node = disk.lookup(dir, &e.name).unwrap();
        match (is_listed(&e.name), e.kind == Some(Kind::Dir)) {
            (true, true) if e.name != names::STORE_DIR => remove_unlisted(disk, &node),
            (true, _) => {}
            (false, true) => {
                clear(disk, &node);
                disk.rmdir(dir, &e.name).unwrap();
            }
            (false, false) => {
                let file = disk.open(&node, Access::Read).unwrap();
                let mut slots = [0; 2 * SLOT];
                read_into(disk, &file, &mut slots, 0).unwrap();
                if slots.iter().any(|b| *b != 0) {
                    disk.unlink(dir, &e.name).unwrap();
                }
            }
        }
    }
}

fn clear(disk: &SimDisk, dir: &SimNode) {
    for e in disk.read_dir(dir).unwrap() {
        if e.kind == Some(Kind::Dir) {
            clear(disk, &disk.lookup(dir, &e.name).unwrap());
            disk.rmdir(dir, &e.name).unwrap();
        } else {
            disk.unlink(dir, &e.name).unwrap();
        }
    }
}

/// Remembers what must not change.
#[derive(Default)]
pub struct Witness {
    /// Each file's key: it never changes.
    deks: BTreeMap<FileId, [u8; 32]>,
    /// Headers that were proved to open, by the keyring they were proved with.
    proved: HashSet<(u64, Vec<u8>)>,
    /// What follows the slots of each file, when a user last changed anything.
    tails: BTreeMap<u64, Vec<u8>>,
    /// KEKs that a backup brought back into a file.
    brought_back: BTreeSet<(FileId, KekId)>,
    keys: Option<(Vec<u8>, Keys)>,
    /// The highest generation of the keyring that somebody was told of.
    generation: u64,
}

impl Witness {
    pub fn brings_back(&mut self, slots: &[Slot]) {
        self.brought_back.extend(slots.iter().map(|s| (s.file, s.kek)));
    }

    pub fn is_brought_back(&self, slot: &Slot) -> bool {
        self.brought_back.contains(&(slot.file, slot.kek))
    }

    /// A keyring of this generation is in force: none before it may be from now on.
    pub fn heard_of(&mut self, generation: u64) {
        assert!(generation >= self.generation, "the keyring went back from {} to {generation}", self.generation);
        self.generation = generation;
    }

    /// A user has changed something.
    pub fn users_changed(&mut self, disk: &SimDisk) {
        self.tails = whole_files(disk).into_iter().map(|h| (h.ino, h.tail)).collect();
    }

    /// The rotation changed nothing of users': all content is as they left it.
    pub fn content_is_untouched(&self, disk: &SimDisk) {
        for h in whole_files(disk) {
            let shown = String::from_utf8_lossy(&h.path);
            assert!(self.tails.get(&h.ino) == Some(&h.tail), "content of {shown} was touched");
        }
    }

    /// The keyring on the disk, opened.
    fn keyring(&mut self, disk: &SimDisk, root: &[Arc<Scripted>]) -> Keyring {
        let read = |name: &str| disk.read_raw(format!(".envelopefs/{name}")).unwrap_or_default();
        let bytes = [read("keyring.a"), read("keyring.b")].concat();
        if self.keys.as_ref().is_none_or(|(of, _)| *of != bytes) {
            let providers: Vec<Arc<dyn KeyProvider>> = root.iter().map(|r| r.clone() as _).collect();
            let keys = truce(root, || Keys::open(&disk.crash_process(), &providers));
            self.keys = Some((bytes, keys.expect("the keyring opens at every instant")));
        }
        self.keys.as_ref().unwrap().1.snapshot()
    }

    /// Looks at every header. At least one slot of each opens with the keyring as it lies on the disk, and gives the key
    /// that it always gave; none names a KEK that was proved unused, unless a backup has brought it back. Returns the
    /// inodes whose header does not open.
    pub fn look(&mut self, disk: &SimDisk, root: &[Arc<Scripted>]) -> BTreeSet<u64> {
        let ring = self.keyring(disk, root);
        let mut locked = BTreeSet::new();
        for h in headers(disk) {
            let proof = (ring.generation, h.slots.clone());
            if self.proved.contains(&proof) {
                continue;
            }
            let slots = h.valid();
            for slot in &slots {
                let kek = ring.kek(slot.kek).expect("a slot names a KEK of the keyring");
                let gone = kek.unused != 0 || kek.state == KekState::Destroyed;
                let shown = String::from_utf8_lossy(&h.path);
                assert!(!gone || self.is_brought_back(slot), "{shown} names {}, which is {:?}", kek.id, kek.state);
                assert_ne!(kek.state, KekState::Pending, "{shown} names a pending KEK");
            }
            let keys = &self.keys.as_ref().unwrap().1;
            let open = |s: &Slot| keys.kek(s.kek).and_then(|kek| unwrap_slot(&kek, s)).ok();
            let deks: Vec<_> = truce(root, || slots.iter().filter_map(|s| Some((s.file, open(s)?))).collect());
            if deks.is_empty() {
                locked.insert(h.ino);
                continue;
            }
            for (file, dek) in deks {
                let dek = *dek.secret().expose();
                assert_eq!(*self.deks.entry(file).or_insert(dek), dek, "another key");
            }
            self.proved.insert(proof);
        }
        locked
    }
}

/// With every provider doing what it should.
pub fn truce<R>(root: &[Arc<Scripted>], f: impl FnOnce() -> R) -> R {
    match root.split_first() {
        None => f(),
        Some((first, rest)) => first.truce(|| truce(rest, f)),
    }
}
