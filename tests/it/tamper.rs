//! An attacker who can write to the backing directory: each attack is noticed, with its code, and never gives wrong
//! bytes. `docs/THREAT_MODEL.md` names these tests.

use envelopefs::backing::Access;
use envelopefs::backing::sim::{SimDisk, SimOptions};
use envelopefs::kms::KeyProvider;
use envelopefs::kms::scripted::Scripted;
use envelopefs::store::StoreError;
use envelopefs::store::keys::{KekKind, Keys, StoreFlags};
use envelopefs::store::open::{Store, StoreOptions};
use std::sync::Arc;

const PAGE: usize = 4096;
/// Long enough for blocks in two segments, the last one partly filled.
const LEN: usize = 200_000;
/// Where the second segment's states begin.
const SEGMENT1: usize = 33 * PAGE;

/// A closed store with plaintext names and the files `a` and `b` of [`LEN`] bytes.
struct Lab {
    disk: SimDisk,
    root: Arc<dyn KeyProvider>,
}

fn content(seed: u8) -> Vec<u8> {
    (0..LEN).map(|i| (i as u8).wrapping_mul(37).wrapping_add((i >> 9) as u8) ^ seed).collect()
}

impl Lab {
    fn new() -> Self {
        let root: Arc<dyn KeyProvider> = Scripted::new("tamper");
        let disk = SimDisk::new(SimOptions::default());
        Store::init(&disk, &[Arc::clone(&root)], KekKind::Sealed, StoreFlags { plaintext_names: true }).unwrap();
        let lab = Self { disk, root };
        let store = lab.open(&lab.disk);
        for (name, seed) in [(b"a", 1), (b"b", 2)] {
            let (_, _, file) = store.create(&store.root(), name, 0o600, 0, None).unwrap();
            file.write(0, &content(seed)).unwrap();
        }
        store.close().unwrap();
        lab
    }

    fn open(&self, disk: &SimDisk) -> Arc<Store<SimDisk>> {
        let keys = Keys::open(disk, &[Arc::clone(&self.root)]).unwrap();
        Store::open(disk.clone(), keys, StoreOptions::default()).unwrap()
    }

    fn raw(&self, name: &str) -> Vec<u8> {
        self.disk.read_raw(name).unwrap()
    }

    /// What reading each block of `a` gives once its backing file holds `bytes`: the codes found, in order of the
    /// blocks, or one code if it does not open.
    fn read(&self, bytes: &[u8]) -> Vec<Option<&'static str>> {
        let disk = self.disk.crash_process();
        disk.replace_raw("a", bytes).unwrap();
        let store = self.open(&disk);
        let node = store.lookup(&store.root(), b"a").unwrap().0;
        let file = match store.open_file(&node, Access::Read) {
            Ok(f) => f,
            Err(e) => return vec![Some(code(&e))],
        };
        let want = content(1);
        (0..file.len().div_ceil(PAGE as u64))
            .map(|block| {
                let mut buf = [0u8; PAGE];
                match file.read(block * PAGE as u64, &mut buf) {
                    Ok(n) => {
                        let at = block as usize * PAGE;
                        assert_eq!(Some(&buf[..n]), want.get(at..at + n), "block {block} reads as something else");
                        None
                    }
                    Err(e) => Some(code(&e)),
                }
            })
            .collect()
    }

    /// The one code that `bytes` lead to, at whatever blocks.
    fn code(&self, bytes: &[u8]) -> &'static str {
        let mut codes: Vec<_> = self.read(bytes).into_iter().flatten().collect();
        codes.dedup();
        assert_eq!(codes.len(), 1, "{codes:?}");
        codes[0]
    }
}

fn code(e: &StoreError) -> &'static str {
    match e {
        StoreError::Damage(d) => d.code(),
        other => panic!("not a damage: {other}"),
    }
}

fn flipped(bytes: &[u8], at: &[usize]) -> Vec<u8> {
    let mut b = bytes.to_vec();
    at.iter().for_each(|i| b[*i] ^= 0x10);
    b
}

/// `into` with `from`'s bytes at `range`.
fn grafted(into: &[u8], from: &[u8], range: std::ops::Range<usize>) -> Vec<u8> {
    let mut b = into.to_vec();
    b[range.clone()].copy_from_slice(&from[range]);
    b
}

fn page(n: usize) -> std::ops::Range<usize> {
    n * PAGE..(n + 1) * PAGE
}

#[test]
fn an_untouched_file_reads_as_it_was() {
    let lab = Lab::new();
    assert!(lab.read(&lab.raw("a")).iter().all(Option::is_none));
}

#[test]
fn a_bit_flipped_in_one_header_slot_is_survived_and_in_both_it_is_found() {
    let lab = Lab::new();
    let a = lab.raw("a");
    for at in (0..1024).step_by(13) {
        assert!(lab.read(&flipped(&a, &[at])).iter().all(Option::is_none), "slot A, byte {at}");
        assert!(lab.read(&flipped(&a, &[1024 + at])).iter().all(Option::is_none), "slot B, byte {at}");
        let expected = if at < 8 { "header-magic" } else { "header-unreadable" };
        assert_eq!(lab.code(&flipped(&a, &[at, 1024 + at])), expected, "both, byte {at}");
    }
}

#[test]
fn a_bit_flipped_in_both_copies_of_a_state_is_found() {
    let lab = Lab::new();
    let a = lab.raw("a");
    for at in (0..1024).step_by(29) {
        assert_eq!(lab.code(&flipped(&a, &[2048 + at, 3072 + at])), "state-auth", "segment 0, byte {at}");
    }
    for at in (0..PAGE).step_by(97) {
        let both = flipped(&a, &[SEGMENT1 + at, SEGMENT1 + PAGE + at]);
        let read = lab.read(&both);
        // A copy that was never written stays so: then the other one alone counts, and fails.
        assert!(read[..32].iter().all(Option::is_none) && read[32..].iter().all(|c| *c == Some("state-auth")), "{at}");
    }
}

#[test]
fn a_state_lost_in_one_copy_never_gives_wrong_bytes() {
    let lab = Lab::new();
    let a = lab.raw("a");
    for (from, len) in [(2048, 1024), (3072, 1024), (SEGMENT1, PAGE), (SEGMENT1 + PAGE, PAGE)] {
        let mut b = a.clone();
        b[from..from + len].fill(0);
        // `read` itself compares every byte that comes.
        lab.read(&b);
    }
}

#[test]
fn a_bit_flipped_in_a_block_is_found_and_the_other_blocks_stay_readable() {
    let lab = Lab::new();
    let a = lab.raw("a");
    for (block, at) in [(0, PAGE), (5, 6 * PAGE + 77), (31, 33 * PAGE - 1), (32, 35 * PAGE), (48, a.len() - 1)] {
        let read = lab.read(&flipped(&a, &[at]));
        let bad: Vec<usize> = (0..read.len()).filter(|i| read[*i].is_some()).collect();
        assert_eq!((bad, read[block]), (vec![block], Some("block-auth")));
    }
}

#[test]
fn blocks_moved_within_a_file_are_found() {
    let lab = Lab::new();
    let a = lab.raw("a");
    let mut swapped = a.clone();
    swapped[page(2)].copy_from_slice(&a[page(3)]);
    swapped[page(3)].copy_from_slice(&a[page(2)]);
    let read = lab.read(&swapped);
    assert_eq!(&read[..4], &[None, Some("block-auth"), Some("block-auth"), None]);
}

#[test]
fn a_block_from_another_file_is_found() {
    let lab = Lab::new();
    assert_eq!(lab.code(&grafted(&lab.raw("a"), &lab.raw("b"), page(4))), "block-auth");
}

#[test]
fn a_hole_punched_into_a_file_is_found() {
    let lab = Lab::new();
    let mut a = lab.raw("a");
    a[page(7)].fill(0);
    assert_eq!(lab.code(&a), "block-auth");
}

#[test]
fn a_segment_punched_out_is_found() {
    let lab = Lab::new();
    let mut a = lab.raw("a");
    a[SEGMENT1..].fill(0);
    assert_eq!(lab.code(&a), "state-absent");
}

#[test]
fn segments_of_another_file_are_found() {
    let lab = Lab::new();
    let (a, b) = (lab.raw("a"), lab.raw("b"));
    assert_eq!(lab.code(&grafted(&a, &b, SEGMENT1..a.len())), "state-auth");
    assert_eq!(lab.code(&grafted(&a, &b, 2048..SEGMENT1)), "state-auth");
}

#[test]
fn a_header_of_another_file_is_found() {
    let lab = Lab::new();
    let (a, b) = (lab.raw("a"), lab.raw("b"));
    assert_eq!(lab.code(&grafted(&a, &b, 0..2048)), "state-auth");
}

#[test]
fn a_file_of_another_store_is_found() {
    let (lab, other) = (Lab::new(), Lab::new());
    assert_eq!(lab.code(&other.raw("a")), "foreign-store");
}

#[test]
fn a_file_cut_short_at_any_boundary_is_found() {
    let lab = Lab::new();
    let a = lab.raw("a");
    let boundaries = (1..a.len() / PAGE).map(|p| p * PAGE);
    for len in boundaries.flat_map(|b| [b - 1, b, b + 1]).chain([a.len() - 1]) {
        if len < 2048 {
            continue;
        }
        let expected = if len < 3072 { "state-absent" } else { "size-short" };
        let found = lab.code(&a[..len]);
        // Page 0 cut inside the states leaves one copy, or none.
        let inside = len < PAGE && ["state-auth", "state-absent", "size-short"].contains(&found);
        assert!(found == expected || inside, "cut to {len}: {found}");
    }
}

#[test]
fn a_file_that_has_grown_is_found() {
    let lab = Lab::new();
    let a = lab.raw("a");
    for more in [1, 100, PAGE, 10 * PAGE, 200 * PAGE] {
        assert_eq!(lab.code(&[&a[..], &vec![0; more]].concat()), "size-grown", "{more} bytes more");
    }
    let b = lab.raw("b");
    assert_eq!(lab.code(&[&a[..], &b[page(3)]].concat()), "size-grown");
}
