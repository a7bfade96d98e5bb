//! Exported keyrings, and putting them back: whose they are, what they may replace, and a crash anywhere on the way.

use super::*;
use crate::backing::Access;
use crate::backing::sim::{Journal, SimOptions};
use crate::store::{Store, StoreOptions};

/// A store with a file in it, everything durable.
fn store(options: SimOptions, flags: StoreFlags) -> (SimDisk, Arc<Scripted>) {
    let (disk, s) = (SimDisk::new(options), Scripted::new("a"));
    Store::init(&disk, &dynamic(&[&s]), KekKind::Sealed, flags).unwrap();
    let store = Store::open(disk.clone(), open(&disk, &[&s]).unwrap(), StoreOptions::default()).unwrap();
    let (_, _, file) = store.create(&store.root(), b"f", 0o644, 0, None).unwrap();
    file.write(0, b"content").unwrap();
    drop(file);
    store.close().unwrap();
    disk.sync_all().unwrap();
    (disk, s)
}

fn encrypted() -> (SimDisk, Arc<Scripted>) {
    store(SimOptions::default(), StoreFlags::default())
}

fn is_readable(disk: &SimDisk, s: &Arc<Scripted>) -> bool {
    let Ok(keys) = open(disk, &[s]) else { return false };
    let store = Store::open(disk.clone(), keys, StoreOptions::default()).unwrap();
    let (node, _) = store.lookup(&store.root(), b"f").unwrap();
    let Ok(file) = store.open_file(&node, Access::Read) else { return false };
    let mut data = [0; 7];
    file.read(0, &mut data).unwrap();
    &data == b"content"
}

fn import(disk: &SimDisk, bytes: &[u8], s: &[&Arc<Scripted>], force: bool) -> Result<Imported> {
    Keys::import(disk, bytes, &dynamic(s), force, |_| Ok(()))
}

fn refused(r: Result<Imported>) -> String {
    match r {
        Err(StoreError::KeyState(why)) => why,
        other => panic!("{other:?}"),
    }
}

/// Leaves neither copy usable, in two ways.
fn lose(disk: &SimDisk) {
    disk.truncate_raw(".envelopefs/keyring.a", 0).unwrap();
    disk.flip_bit(".envelopefs/keyring.b", 100, 3).unwrap();
}

fn old(disk: &SimDisk, kept: &str) -> Vec<u8> {
    disk.read_raw(format!(".envelopefs/{kept}")).unwrap()
}

#[test]
fn an_export_is_the_keyring_as_it_lies_on_disk_and_the_newer_of_two() {
    let (disk, _, keys) = fresh();
    let [a, _] = raw(&disk);
    let copy = Keys::export(&disk).unwrap();
    assert_eq!((&copy.bytes, copy.keyring), (&a, keys.snapshot()));
    disk.replace_raw(".envelopefs/keyring.b", b"torn").unwrap();
    let copy = Keys::export(&disk).unwrap();
    assert_eq!((&copy.bytes, copy.damaged), (&a, vec![("keyring.b", Damage::KeyringUnreadable)]));
    disk.replace_raw(".envelopefs/keyring.b", &a).unwrap();
    keys.stage(&disk, KekKind::Sealed, &[]).unwrap();
    let newer = Keys::export(&disk).unwrap();
    assert_eq!(newer.keyring.generation, 2);
    disk.replace_raw(".envelopefs/keyring.a", &a).unwrap();
    assert_eq!(Keys::export(&disk).unwrap().bytes, newer.bytes, "whichever copy it is");
    lose(&disk);
    assert!(matches!(Keys::export(&disk), Err(StoreError::Damage(Damage::KeyringUnreadable))));
}

#[test]
fn a_lost_keyring_is_put_back_and_what_was_there_is_kept() {
    let (disk, s) = encrypted();
    let copy = Keys::export(&disk).unwrap();
    lose(&disk);
    let [_, torn] = raw(&disk);
    assert!(!is_readable(&disk, &s));
    let done = import(&disk, &copy.bytes, &[&s], false).unwrap();
    assert_eq!((done.generation, done.keys.snapshot().generation), (1, 2));
    assert_eq!(content(&done.keys.snapshot()), content(&copy.keyring));
    assert_eq!(done.kept, ["keyring.a.old.1", "keyring.b.old.1"]);
    assert_eq!(kept(&disk).unwrap(), done.kept);
    assert_eq!((old(&disk, &done.kept[0]), old(&disk, &done.kept[1])), (Vec::new(), torn));
    let [a, b] = raw(&disk);
    assert_eq!(a, b);
    assert!(is_readable(&disk, &s));
    // Absent is no reason against it either, and there is nothing to keep.
    let folder = disk::folder(&disk).unwrap();
    COPIES.iter().for_each(|c| disk.unlink(&folder, c.as_bytes()).unwrap());
    assert_eq!(import(&disk, &copy.bytes, &[&s], false).unwrap().kept, Vec::<String>::new());
    assert!(is_readable(&disk, &s));
}

#[test]
fn a_whole_keyring_is_replaced_only_if_it_is_older_or_with_force() {
    let (disk, s) = encrypted();
    let first = Keys::export(&disk).unwrap().bytes;
    let why = refused(import(&disk, &first, &[&s], false));
    assert!(why.contains("of generation 1; this one is of 1"), "{why}");
    let keys = open(&disk, &[&s]).unwrap();
    let (_, new) = rotate(&disk, &keys);
    let newest = Keys::export(&disk).unwrap().bytes;
    let why = refused(import(&disk, &first, &[&s], false));
    assert!(why.contains("of generation 4; this one is of 1"), "{why}");
    // One whole copy is enough.
    disk.replace_raw(".envelopefs/keyring.a", b"torn").unwrap();
    refused(import(&disk, &first, &[&s], false));
    assert_eq!(kept(&disk).unwrap(), Vec::<String>::new(), "a refusal changes nothing");
    assert_eq!(active_id(&open(&disk, &[&s]).unwrap()), new);
    // Both copies put back to an older one, as a restored backup does.
    COPIES.iter().for_each(|c| disk.replace_raw(format!(".envelopefs/{c}"), &first).unwrap());
    assert_eq!(import(&disk, &newest, &[&s], false).unwrap().keys.snapshot().generation, 5);
    assert_eq!(active_id(&open(&disk, &[&s]).unwrap()), new);
    let forced = import(&disk, &first, &[&s], true).unwrap();
    assert_eq!((forced.keys.snapshot().generation, forced.keys.snapshot().keks.len()), (6, 1));
    assert_eq!(Keyring::decode(&old(&disk, &forced.kept[0])).unwrap().keyring.generation, 5);
    assert!(is_readable(&disk, &s));
}

/// What a copy says of a KEK was found out while the copy was in force. It may have been the active one since, by another.
#[test]
fn a_kek_that_a_copy_says_is_unused_is_not_once_that_is_put_back() {
    let (disk, s) = encrypted();
    let first = Keys::export(&disk).unwrap().bytes;
    let keys = open(&disk, &[&s]).unwrap();
    let ((gone, _), (old, _)) = (rotate(&disk, &keys), rotate(&disk, &keys));
    keys.destroy(&disk, gone, &Confirmation::default()).unwrap();
    let later = Keys::export(&disk).unwrap().bytes;
    import(&disk, &first, &[&s], true).unwrap();
    // Here somebody could write under the KEK that `later` knows as destroyed.
    let keys = import(&disk, &later, &[&s], true).unwrap().keys;
    let ring = keys.snapshot();
    let of = |id| ring.kek(id).map(|k| (k.state, k.unused)).unwrap();
    assert_eq!(of(old), (KekState::Retired, 0));
    assert_eq!(of(gone).0, KekState::Destroyed);
    assert!(!keys.is_unused(old) && ring.kek(old).unwrap().is_needed());
    let why = keys.destroy(&disk, old, &Confirmation::default());
    assert!(matches!(&why, Err(StoreError::KeyState(w)) if w.contains("rotate to the end first")), "{why:?}");
    assert_eq!(open(&disk, &[&s]).unwrap().snapshot(), ring);
}

#[test]
fn nothing_is_forgotten_for_an_import_that_is_refused_or_fails_to_forget() {
    let (disk, s) = encrypted();
    let copy = Keys::export(&disk).unwrap().bytes;
    let before = raw(&disk);
    let never = |_: &SimDisk| panic!("it is refused");
    assert!(Keys::import(&disk, &copy, &dynamic(&[&s]), false, never).is_err());
    let fails = |_: &SimDisk| Err(io::Error::from_raw_os_error(libc::EIO));
    assert!(Keys::import(&disk, &copy, &dynamic(&[&s]), true, fails).is_err());
    assert_eq!((raw(&disk), kept(&disk).unwrap()), (before, Vec::new()));
}

/// An error, and the process lives on: one keyring or the other is in force, and it can be done again.
#[test]
fn an_error_at_every_operation_of_an_import_leaves_one_keyring_or_the_other() {
    let (base, s) = encrypted();
    let copy = Keys::export(&base).unwrap().bytes;
    let (_, new) = rotate(&base, &open(&base, &[&s]).unwrap());
    base.sync_all().unwrap();
    for late in [false, true] {
        for n in 0..length(&base, &copy, &s) {
            let disk = base.crash_process();
            match late {
                true => disk.fail_next_late(None, n, libc::EIO),
                false => disk.fail_next(None, n, libc::ENOSPC),
            }
            let done = import(&disk, &copy, &[&s], true);
            disk.clear_faults();
            for after in crashes(&disk) {
                let there = open(&after, &[&s]).unwrap().snapshot();
                match &done {
                    Ok(done) => assert_eq!(there, done.keys.snapshot(), "{n}"),
                    Err(_) => assert!(there.kek(new).is_some(), "{n}: the one before"),
                }
            }
            let again = import(&disk, &copy, &[&s], true).unwrap().keys.snapshot();
            assert!(again.kek(new).is_none());
            assert!(is_readable(&disk, &s));
        }
    }
}

#[test]
fn a_damaged_a_forged_and_another_stores_keyring_are_refused() {
    let (disk, s) = encrypted();
    let copy = Keys::export(&disk).unwrap().bytes;
    let before = raw(&disk);
    lose(&disk);
    let lost = raw(&disk);
    let mut torn = copy.clone();
    torn[200] ^= 1;
    assert!(matches!(import(&disk, &torn, &[&s], true), Err(StoreError::Damage(Damage::KeyringUnreadable))));
    // With a checksum that is right.
    let mut ring = Keyring::decode(&copy).unwrap().keyring;
    ring.generation = 77;
    let forged = ring.encode(|_| [7; 32]).unwrap();
    assert!(matches!(import(&disk, &forged, &[&s], true), Err(StoreError::Damage(Damage::KeyringMac))));
    let stranger = Scripted::new("b");
    assert!(matches!(import(&disk, &copy, &[&stranger], true), Err(StoreError::WrongKey(_))));
    s.outage();
    assert!(matches!(import(&disk, &copy, &[&s], true), Err(StoreError::Kms(KmsError::Unreachable(_)))));
    assert_eq!(raw(&disk), lost, "nothing was changed");
    let (other, theirs) = encrypted();
    let another = Keys::export(&other).unwrap().bytes;
    for force in [false, true] {
        let why = refused(import(&disk, &another, &[&theirs], force));
        assert!(why.contains("another store's") || why.contains("of store"), "{why}");
    }
    // Over a whole keyring of another store in the right place.
    let (third, s) = encrypted();
    let right = Keys::export(&third).unwrap().bytes;
    COPIES.iter().zip(&before).for_each(|(c, b)| third.replace_raw(format!(".envelopefs/{c}"), b).unwrap());
    assert!(refused(import(&third, &right, &[&s], false)).contains("not one that this one's key made"));
    import(&third, &right, &[&s], true).unwrap();
    assert!(is_readable(&third, &s));
}

#[test]
fn with_names_in_clear_headers_tell_whose_keyring_it_is() {
    let clear = || store(SimOptions::default(), StoreFlags { plaintext_names: true });
    let ((disk, s), (other, theirs)) = (clear(), clear());
    let copy = Keys::export(&disk).unwrap().bytes;
    lose(&disk);
    let why = refused(import(&disk, &Keys::export(&other).unwrap().bytes, &[&theirs], true));
    assert!(why.starts_with("this keyring is of store ") && why.contains(", the files here of "), "{why}");
    import(&disk, &copy, &[&s], false).unwrap();
    assert!(is_readable(&disk, &s));
    // A store without files.
    let (disk, s) = (SimDisk::default(), Scripted::new("a"));
    Store::init(&disk, &dynamic(&[&s]), KekKind::Sealed, StoreFlags { plaintext_names: true }).unwrap();
    let copy = Keys::export(&disk).unwrap().bytes;
    lose(&disk);
    import(&disk, &copy, &[&s], false).unwrap();
}

/// Takes the store's folder away with all that is in it.
fn lose_folder(disk: &SimDisk) {
    fn empty(b: &SimDisk, dir: &<SimDisk as Backing>::Node) {
        for e in b.read_dir(dir).unwrap().into_iter().filter(|e| e.name != b"." && e.name != b"..") {
            let node = b.lookup(dir, &e.name).unwrap();
            if b.stat(&node).unwrap().kind == crate::backing::Kind::Dir {
                empty(b, &node);
                b.rmdir(dir, &e.name).unwrap();
            } else {
                b.unlink(dir, &e.name).unwrap();
            }
        }
    }
    let root = disk.root().unwrap();
    empty(disk, &disk.lookup(&root, FOLDER).unwrap());
    disk.rmdir(&root, FOLDER).unwrap();
}

#[test]
fn a_store_whose_folder_is_lost_is_rebuilt_but_for_long_links() {
    let (disk, s) = encrypted();
    let long = "x".repeat(4000);
    {
        let store = Store::open(disk.clone(), open(&disk, &[&s]).unwrap(), StoreOptions::default()).unwrap();
        store.symlink(&store.root(), b"short", b"target", None).unwrap();
        store.symlink(&store.root(), b"long", long.as_bytes(), None).unwrap();
        store.close().unwrap();
    }
    let copy = Keys::export(&disk).unwrap();
    lose_folder(&disk);
    assert!(matches!(open(&disk, &[&s]), Err(StoreError::NotAStore(_))));
    let stranger = Scripted::new("x");
    assert!(import(&disk, &copy.bytes, &[&stranger], true).is_err());
    assert!(disk.lookup(&disk.root().unwrap(), FOLDER).is_err(), "and no folder is made for nothing");
    let done = import(&disk, &copy.bytes, &[&s], false).unwrap();
    assert!(done.kept.is_empty());
    assert!(is_readable(&disk, &s));
    let store = Store::open(disk.clone(), open(&disk, &[&s]).unwrap(), StoreOptions::default()).unwrap();
    let link = |name: &[u8]| store.readlink(&store.lookup(&store.root(), name).unwrap().0);
    assert_eq!(link(b"short").unwrap(), b"target");
    assert!(matches!(link(b"long"), Err(StoreError::Damage(Damage::SymlinkAuth))));
    // It is whole again: new things can be made in it.
    store.symlink(&store.root(), b"new", long.as_bytes(), None).unwrap();
    store.mkdir(&store.root(), b"d", 0o755, 0, None).unwrap();
    assert_eq!(link(b"new").unwrap(), long.as_bytes());
}

#[test]
fn a_directory_that_shows_nothing_of_a_store_gets_no_folder_without_force() {
    for flags in [StoreFlags::default(), StoreFlags { plaintext_names: true }] {
        let (disk, s) = store(SimOptions::default(), flags);
        let copy = Keys::export(&disk).unwrap();
        let elsewhere = SimDisk::default();
        assert!(refused(import(&elsewhere, &copy.bytes, &[&s], false)).contains("--force"));
        assert!(elsewhere.lookup(&elsewhere.root().unwrap(), FOLDER).is_err());
        import(&elsewhere, &copy.bytes, &[&s], true).unwrap();
        // Where headers name the store, they do.
        lose_folder(&disk);
        import(&disk, &copy.bytes, &[&s], false).unwrap();
        assert!(is_readable(&disk, &s));
    }
}

#[test]
fn a_lost_folder_is_rebuilt_wherever_that_was_cut_off() {
    let (base, s) = encrypted();
    let copy = Keys::export(&base).unwrap();
    lose_folder(&base);
    base.sync_all().unwrap();
    for n in 0.. {
        let disk = base.crash_process();
        disk.stop_after(disk.operations() + n);
        let done = import(&disk, &copy.bytes, &[&s], false).is_ok();
        for cut in crashes(&disk) {
            if done {
                assert!(is_readable(&cut, &s), "after {n}");
            } else if !is_readable(&cut, &s) {
                import(&cut, &copy.bytes, &[&s], false).unwrap();
                assert!(is_readable(&cut, &s), "after {n}");
            }
        }
        if done {
            assert!(n > 5, "{n}");
            return;
        }
    }
}

#[test]
fn without_the_roots_directory_id_headers_tell_too() {
    let (disk, s) = encrypted();
    let copy = Keys::export(&disk).unwrap().bytes;
    lose(&disk);
    disk.flip_bit(".envelopefs.dir", 20, 1).unwrap();
    import(&disk, &copy, &[&s], false).unwrap();
    // An empty directory says nothing, so that it takes a word.
    let empty = SimDisk::default();
    let root = empty.root().unwrap();
    empty.mkdir(&root, FOLDER, 0o700, 0).unwrap();
    assert!(refused(import(&empty, &copy, &[&s], false)).contains("nothing here shows"));
    import(&empty, &copy, &[&s], true).unwrap();
    open(&empty, &[&s]).unwrap();
}

/// How many operations `import` takes from `base` on.
fn length(base: &SimDisk, copy: &[u8], s: &Arc<Scripted>) -> u64 {
    let disk = base.crash_process();
    let before = disk.operations();
    import(&disk, copy, &[s], true).unwrap();
    disk.operations() - before
}

/// Every disk that a process killed, or a power cut, after each operation of an import leaves.
fn cut_anywhere(base: &SimDisk, copy: &[u8], s: &Arc<Scripted>, look: impl Fn(&SimDisk, &str)) {
    let length = length(base, copy, s);
    assert!(length > 10, "{length}");
    for n in 0..=length {
        let disk = base.crash_process();
        disk.stop_after(disk.operations() + n);
        let _ = import(&disk, copy, &[s], true);
        look(&disk.crash_process(), &format!("killed after {n} of {length}"));
        for seed in 0..4 {
            let cut = if seed == 0 { PowerCut::Lose } else { PowerCut::Reorder { tear: true } };
            look(&disk.crash_power(seed, cut), &format!("{cut:?} seed {seed} after {n} of {length}"));
        }
    }
}

#[test]
fn an_import_over_a_whole_keyring_can_be_cut_off_anywhere_and_the_store_opens() {
    for journal in [Journal::Ordered, Journal::None] {
        let (base, s) = store(SimOptions { journal, ..SimOptions::default() }, StoreFlags::default());
        let copy = Keys::export(&base).unwrap().bytes;
        let (_, new) = rotate(&base, &open(&base, &[&s]).unwrap());
        base.sync_all().unwrap();
        let [present, _] = raw(&base);
        cut_anywhere(&base, &copy, &s, |disk, what| {
            let keks = open(disk, &[&s]).map(|k| k.snapshot().keks.len()).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert!(keks == 1 || keks == 2, "{what}: the old one or the new one");
            if keks == 1 {
                let is_kept = |k: &String| old(disk, k) == present;
                assert!(kept(disk).unwrap().iter().any(is_kept), "{what}: what was replaced is kept");
            }
            import(disk, &copy, &[&s], true).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert!(is_readable(disk, &s), "{what}");
            // And back again.
            import(disk, &present, &[&s], true).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(active_id(&open(disk, &[&s]).unwrap()), new, "{what}");
        });
    }
}

#[test]
fn an_import_over_a_lost_keyring_can_be_cut_off_anywhere_and_done_again() {
    for journal in [Journal::Ordered, Journal::None] {
        let (base, s) = store(SimOptions { journal, ..SimOptions::default() }, StoreFlags::default());
        let copy = Keys::export(&base).unwrap().bytes;
        lose(&base);
        base.sync_all().unwrap();
        cut_anywhere(&base, &copy, &s, |disk, what| {
            if !is_readable(disk, &s) {
                import(disk, &copy, &[&s], false).unwrap_or_else(|e| panic!("{what}: {e}"));
            }
            assert!(is_readable(disk, &s), "{what}");
        });
    }
}

/// A root key may open both, and the one of the higher generation is in force then.
#[test]
fn an_import_over_another_stores_keyring_is_not_done_while_a_copy_of_that_is_left() {
    let (disk, s) = encrypted();
    let ours = Keys::export(&disk).unwrap().bytes;
    let other = SimDisk::default();
    let keys = make(&other, &[&s]);
    rotate(&other, &keys);
    let foreign = raw(&other)[0].clone();
    COPIES.iter().for_each(|c| disk.replace_raw(format!(".envelopefs/{c}"), &foreign).unwrap());
    // Both are kept, the first copy is replaced, the second is not.
    disk.fail_from(Some(crate::backing::sim::Op::Rename), 3, libc::EIO);
    let left = import(&disk, &ours, &[&s], true).map(|_| ());
    assert!(
        matches!(&left, Err(StoreError::CopyLeft(why)) if why.starts_with("the keyring is put back, but")),
        "{left:?}"
    );
    assert_eq!(open(&disk, &[&s]).unwrap().store_id(), keys.store_id());
    disk.clear_faults();
    import(&disk, &ours, &[&s], true).unwrap();
    assert!(is_readable(&disk, &s));
    let [a, b] = raw(&disk);
    assert_eq!(a, b);
}
