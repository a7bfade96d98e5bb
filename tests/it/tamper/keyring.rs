//! The keyring: each copy damaged, both, edited, rolled back, of another store.

use super::*;
use envelopefs::format::keyring::Keyring;

const A: &str = ".envelopefs/keyring.a";
const B: &str = ".envelopefs/keyring.b";

impl World {
    fn open_keys(&self) -> Result<Keys> {
        let before = self.disk.operations();
        let r = Keys::open(&self.disk, &root());
        assert_eq!(self.disk.operations(), before, "opening the keyring changed it");
        r
    }

    fn ring(&self, copy: &str) -> Vec<u8> {
        self.disk.read_raw(copy).unwrap()
    }

    fn put_ring(&self, copies: &[&str], bytes: &[u8]) {
        copies.iter().for_each(|c| self.disk.replace_raw(c, bytes).unwrap());
    }
}

/// With the checksum made right.
fn sealed(mut ring: Vec<u8>) -> Vec<u8> {
    let at = ring.len() - 4;
    let crc = crc32c::crc32c(&ring[..at]);
    ring[at..].copy_from_slice(&crc.to_le_bytes());
    ring
}

#[test]
fn every_byte_of_one_copy_and_of_both() {
    let w = World::new();
    let len = w.ring(A).len() as u64;
    for at in 0..len {
        for (copy, name) in [(A, "keyring.a"), (B, "keyring.b")] {
            w.disk.flip_bit(copy, at, (at % 8) as u32).unwrap();
            let keys = w.open_keys().unwrap();
            let damaged: Vec<_> = keys.damaged_copies().iter().map(|(n, d)| (*n, d.code())).collect();
            assert_eq!(damaged, [(name, "keyring-unreadable")], "byte {at}");
            w.disk.flip_bit(copy, at, (at % 8) as u32).unwrap();
        }
        for copy in [A, B] {
            w.disk.flip_bit(copy, at, (at % 8) as u32).unwrap();
        }
        assert_eq!(code(w.open_keys()), "keyring-unreadable", "byte {at} of both");
        for copy in [A, B] {
            w.disk.flip_bit(copy, at, (at % 8) as u32).unwrap();
        }
    }
    w.others_are_fine(&[]);
}

#[test]
fn cut_grown_and_missing_copies() {
    let w = World::new();
    let whole = w.ring(A);
    let folder = w.disk.lookup(&w.disk.root().unwrap(), b".envelopefs").unwrap();
    for bad in [vec![], whole[..whole.len() - 1].to_vec(), [&whole[..], b"x"].concat(), vec![0; whole.len()]] {
        w.put_ring(&[A], &bad);
        assert_eq!(w.look("small"), fine());
        w.put_ring(&[B], &bad);
        assert_eq!(code(w.open_keys()), "keyring-unreadable");
        w.put_ring(&[A, B], &whole);
    }
    w.disk.unlink(&folder, b"keyring.a").unwrap();
    assert_eq!(w.look("small"), fine());
    w.put_ring(&[B], b"");
    assert_eq!(code(w.open_keys()), "keyring-unreadable");
    w.disk.unlink(&folder, b"keyring.b").unwrap();
    assert_eq!(code(w.open_keys()), "not-a-store");
}

/// A damaged copy is made whole by the next change, and until then the other one is all there is.
#[test]
fn a_damaged_copy_is_repaired() {
    let w = World::new();
    w.put_ring(&[B], b"damage");
    let keys = w.open_keys().unwrap();
    assert!(keys.repair_copies(&w.disk).unwrap());
    assert_eq!(w.ring(A), w.ring(B));
    assert_eq!(w.open_keys().unwrap().damaged_copies().len(), 0);
}

#[test]
fn every_byte_edited_with_the_checksum_made_right() {
    let w = World::new();
    let whole = w.ring(A);
    let mac_at = whole.len() - 36;
    let mut codes = BTreeMap::new();
    for at in 0..whole.len() - 4 {
        let mut edited = whole.clone();
        edited[at] ^= 1 << (at % 8);
        let edited = sealed(edited);
        w.put_ring(&[A, B], &edited);
        let code = code(w.open_keys());
        assert_ne!(code, "fine", "byte {at}");
        let want: &[&str] = match at {
            0..8 => &["keyring-unreadable"],
            8..10 => &["unsupported-version"],
            10..12 | 20..24 => &["keyring-unreadable"],
            12..16 => &["unsupported-feature", "keyring-mac"],
            16..20 => &["keyring-mac"],
            // The context of every wrap.
            24..40 => &["wrong-key"],
            // Generation, but for 0.
            40..48 => &["keyring-mac", "keyring-unreadable"],
            _ if at >= mac_at => &["keyring-mac"],
            // Root keys and KEKs, of which some edits break the layout, or the store secret's wraps.
            _ => &["keyring-mac", "keyring-unreadable", "wrong-key", "kms-bad-ciphertext"],
        };
        assert!(want.contains(&code.as_str()), "byte {at}: {code}");
        *codes.entry(code.clone()).or_insert(0) += 1;
        // In one copy only, the other is used; unless it speaks of a newer program, which must not be passed over.
        w.put_ring(&[B], &whole);
        let one = self::code(w.open_keys());
        let want = if code.starts_with("unsupported") { code.as_str() } else { "fine" };
        assert_eq!(one, want, "byte {at} of one copy");
    }
    assert!(codes["keyring-mac"] > 100, "{codes:?}");
    w.put_ring(&[A, B], &whole);
    w.others_are_fine(&[]);
}

/// Reading without keys believes what it reads; nothing is opened by it.
#[test]
fn reading_the_public_part_of_an_edited_keyring() {
    let w = World::new();
    let mut edited = w.ring(A);
    edited[40] += 1;
    w.put_ring(&[A], &sealed(edited));
    assert_eq!(Keys::read_keyring(&w.disk).unwrap().generation, w.open_keys().unwrap().snapshot().generation + 1);
    let keys = w.open_keys().unwrap();
    assert_eq!(keys.damaged_copies().iter().map(|(_, d)| d.code()).collect::<Vec<_>>(), ["keyring-mac"]);
}

/// With names in clear an attacker could have users write names that they can read.
#[test]
fn names_cannot_be_switched_to_clear() {
    let w = World::new();
    let mut edited = w.ring(A);
    edited[12] ^= 1;
    w.put_ring(&[A, B], &sealed(edited));
    assert_eq!(code(w.open_keys()), "keyring-mac");
}

/// Not noticed in version 1, and `docs/THREAT_MODEL.md` says so: an authentic older keyring.
#[test]
fn rolled_back_to_an_older_copy() {
    let w = World::new();
    let old = w.ring(A);
    let destroyed = w.rotate(true);
    let new = w.ring(A);
    // One copy: the newer one counts.
    w.put_ring(&[A], &old);
    let keys = w.open_keys().unwrap();
    assert_eq!(keys.snapshot().generation, Keyring::decode(&new).unwrap().keyring.generation);
    assert_eq!(code(keys.kek(destroyed)), "kek-destroyed");
    assert_eq!(w.look("small"), fine());
    // Both: the destroyed KEK is back, and files under the new one cannot be opened. Nothing is damaged by it.
    w.put_ring(&[A, B], &old);
    assert_eq!(code(w.open_keys().unwrap().kek(destroyed)), "fine");
    for name in contents().keys().filter(|n| **n != "empty") {
        assert_eq!(w.look(name), closed("kek-unknown"), "{name}");
    }
    w.put_ring(&[A, B], &new);
    w.others_are_fine(&[]);
}

#[test]
fn the_keyring_of_another_store_with_the_same_root_key() {
    let (w, other) = (World::new(), World::build());
    let (ours, theirs) = (w.ring(A), other.ring(A));
    w.put_ring(&[A, B], &theirs);
    // It is a keyring, and opens. Nothing else does.
    let keys = w.open_keys().unwrap();
    assert_eq!(keys.store_id(), other.keys().store_id());
    let s = Store::open(w.disk.clone(), keys, StoreOptions { read_only: true, ..StoreOptions::default() }).unwrap();
    assert_eq!(code(s.read_dir(&s.root())), "dir-id-auth");
    assert_eq!(code(s.lookup(&s.root(), b"small")), "dir-id-auth");
    let keys = w.keys();
    let r = check::run(&w.disk, Some(&keys), &CheckOptions::default(), &()).unwrap();
    let codes: std::collections::BTreeSet<_> = damage(&r).into_iter().map(|(_, c)| c).collect();
    assert_eq!(codes.into_iter().collect::<Vec<_>>(), ["dir-id-auth", "foreign-store"]);
    drop(s);
    w.put_ring(&[A, B], &ours);
    w.others_are_fine(&[]);
}

#[test]
fn the_keyring_of_another_store_with_another_root_key() {
    let w = World::new();
    let ours = w.ring(A);
    let disk = SimDisk::new(SimOptions::default());
    let key: Vec<Arc<dyn KeyProvider>> = vec![Scripted::new("somebody else")];
    Store::init(&disk, &key, KekKind::Sealed, StoreFlags::default()).unwrap();
    let theirs = disk.read_raw(A).unwrap();
    w.put_ring(&[A, B], &theirs);
    assert_eq!(code(w.open_keys()), "wrong-key");
    // In one copy, and with a higher generation.
    let mut higher = theirs;
    higher[40..48].copy_from_slice(&1000u64.to_le_bytes());
    w.put_ring(&[A], &sealed(higher));
    w.put_ring(&[B], &ours);
    w.others_are_fine(&[]);
}

#[test]
fn the_folder_gone() {
    let w = World::new();
    let root_dir = w.disk.root().unwrap();
    w.disk
        .rename(&root_dir, b".envelopefs", &root_dir, b"elsewhere", envelopefs::backing::RenameMode::Replace)
        .unwrap();
    assert_eq!(code(w.open_keys()), "not-a-store");
    assert!(matches!(check::run(&w.disk, None, &CheckOptions::default(), &()), Err(StoreError::NotAStore(_))));
}
