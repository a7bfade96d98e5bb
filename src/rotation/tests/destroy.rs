//! Destroying one KEK: only after a scan that saw everything and found it nowhere.

use super::*;
use crate::store::StoreError;
use crate::store::keys::Confirmation;

fn ending<B: Backing>(
    store: &Arc<Store<B>>,
    kek: KekId,
    when: When,
    control: &Control,
) -> crate::store::Result<Destruction> {
    let ctx = Context { shared: store.shared(), moves: &**store };
    super::super::destroy(&ctx, kek, when, &Confirmation::default(), &(), control)
}

fn destroy<B: Backing>(store: &Arc<Store<B>>, kek: KekId) -> crate::store::Result<Destruction> {
    ending(store, kek, When::Now, &Control::new())
}

fn refused(r: crate::store::Result<Destruction>) -> String {
    match r {
        Err(StoreError::KeyState(why)) => why,
        other => panic!("{other:?}"),
    }
}

fn has_wraps(disk: &SimDisk, kek: KekId) -> bool {
    !Keys::read_keyring(disk).unwrap().kek(kek).unwrap().wraps.is_empty()
}

/// A file's path, and its header.
type Saved = (Vec<u8>, Vec<u8>);

/// A rotated store: the disk, its root key, what is in it, the old KEK, and a file's header from before.
fn rotated() -> (SimDisk, Arc<Scripted>, Tree, KekId, Saved) {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let old = active(&store.shared().keys);
    let path = content_files(&disk).remove(0);
    let saved = disk.read_raw(&path).unwrap()[..2048].to_vec();
    rotate(&store, &one_job()).unwrap();
    (disk, root, tree, old, (path, saved))
}

#[test]
fn a_kek_that_no_header_names_is_destroyed_and_the_store_goes_on() {
    let (disk, root, tree, old, _) = rotated();
    let store = open(disk.clone(), &root);
    let done = destroy(&store, old).unwrap();
    assert_eq!((done.kek, done.proof.unwrap().scanned), (old, tree.len() as u64));
    assert!(!has_wraps(&disk, old));
    assert_eq!(destroy(&store, old).unwrap().proof, None, "again: nothing to do");
    assert_eq!(read_all(&open(disk, &root)), tree);
}

#[test]
fn a_kek_that_may_be_needed_is_not_even_looked_for() {
    let (disk, root, _) = filled();
    let store = open(disk.clone(), &root);
    let old = active(&store.shared().keys);
    assert!(refused(destroy(&store, old)).contains("is not retired"));
    let control = Control::new();
    control.cancel();
    let ctx = Context { shared: store.shared(), moves: &*store };
    run(&ctx, &one_job(), &(), &control).unwrap();
    assert!(refused(destroy(&store, old)).ends_with("may still be needed: rotate to the end first"));
    assert!(has_wraps(&disk, old));
}

#[test]
fn one_slot_of_one_file_from_an_old_backup_is_enough_to_keep_it() {
    for slots in [0..1024, 1024..2048, 0..2048] {
        let (disk, root, tree, old, (path, saved)) = rotated();
        disk.write_raw(&path, slots.start as u64, &saved[slots.clone()]).unwrap();
        let store = open(disk.clone(), &root);
        let why = refused(destroy(&store, old));
        let shown = String::from_utf8_lossy(&path);
        assert!(why.contains(&format!("1 header needs it: {shown}; rotate")), "{why}");
        assert!(has_wraps(&disk, old));
        // As it says.
        rotate(&store, &one_job()).unwrap();
        destroy(&store, old).unwrap();
        assert_eq!(read_all(&open(disk, &root)), tree);
    }
}

#[test]
fn the_first_few_files_are_named_and_the_others_counted() {
    let (disk, root) = (SimDisk::default(), Scripted::new("root"));
    init(&disk, &root);
    let store = open(disk.clone(), &root);
    (0..5).for_each(|i| write(&store, &format!("{i}"), &pattern(50, i)));
    let old = active(&store.shared().keys);
    let files: Vec<_> = disk.files().into_iter().filter(|p| disk.read_raw(p).unwrap().starts_with(MAGIC)).collect();
    let saved: Vec<_> = files.iter().map(|p| disk.read_raw(p).unwrap()).collect();
    assert_eq!(saved.len(), 5);
    rotate(&store, &one_job()).unwrap();
    saved.iter().zip(&files).for_each(|(bytes, path)| disk.write_raw(path, 0, &bytes[..2048]).unwrap());
    let why = refused(destroy(&store, old));
    assert!(why.contains("5 headers need it: ") && why.contains(" and 2 more; rotate"), "{why}");
    assert_eq!(files.iter().filter(|p| why.contains(&*String::from_utf8_lossy(p))).count(), 3, "{why}");
}

#[test]
fn a_file_that_cannot_be_looked_at_proves_nothing() {
    let (disk, root, _, old, (path, _)) = rotated();
    disk.write_raw(&path, 0, &[0xff; 2048]).unwrap();
    let store = open(disk.clone(), &root);
    let why = refused(destroy(&store, old));
    let shown = String::from_utf8_lossy(&path);
    assert!(why.contains(&format!("1 file could not be looked at: {shown} (header-magic)")), "{why}");
    assert!(has_wraps(&disk, old));
}

#[test]
fn a_cancelled_scan_and_a_store_opened_read_only_destroy_nothing() {
    let (disk, root, _, old, _) = rotated();
    let store = open(disk.clone(), &root);
    let control = Control::new();
    control.cancel();
    assert!(refused(ending(&store, old, When::Now, &control)).ends_with("the scan was cancelled"));
    let keys = Keys::open(&disk, &roots(&root)).unwrap();
    let store = Store::open(disk.clone(), keys, StoreOptions { read_only: true, ..StoreOptions::default() }).unwrap();
    assert!(matches!(destroy(&store, old), Err(StoreError::ReadOnly)));
    assert!(has_wraps(&disk, old));
}

#[test]
fn a_destroyed_kek_stays_away_or_is_still_there_wherever_it_was_cut_off() {
    let (base, root, tree, old, _) = rotated();
    base.sync_all().unwrap();
    for n in 0.. {
        let disk = base.crash_process();
        let store = open(disk.clone(), &root);
        disk.stop_after(disk.operations() + n);
        let done = destroy(&store, old).is_ok();
        for cut in [disk.crash_process(), disk.crash_power(n, crate::backing::sim::PowerCut::Reorder { tear: true })] {
            assert!(!done || !has_wraps(&cut, old), "after {n}");
            let store = open(cut.clone(), &root);
            destroy(&store, old).unwrap();
            assert!(!has_wraps(&cut, old), "after {n}");
            assert_eq!(read_all(&open(cut, &root)), tree, "after {n}");
        }
        if done {
            assert!(n > 5, "{n}");
            return;
        }
    }
}
