//! Files that an old backup brings back under a retired KEK.

use super::*;
use crate::backing::sim::PowerCut;

/// A rotated store into which a file came back as it was before: the disk, its root key, what is in it, and the file.
fn restored() -> (SimDisk, Arc<Scripted>, Tree, Vec<u8>) {
    let (disk, root, tree) = filled();
    let path = content_files(&disk).remove(0);
    let saved = disk.read_raw(&path).unwrap();
    rotate(&open(disk.clone(), &root), &one_job()).unwrap();
    disk.write_raw(&path, 0, &saved[..2048]).unwrap();
    disk.sync_all().unwrap();
    (disk, root, tree, path)
}

fn rewrap<B: Backing>(store: &Arc<Store<B>>) -> Counts {
    rewrap_restored(store.shared(), &Control::new()).unwrap()
}

#[test]
fn an_open_finds_it_and_it_is_moved_to_the_active_kek_for_good() {
    let (disk, root, tree, path) = restored();
    let store = open(disk.clone(), &root);
    assert!(store.shared().restored.is_empty());
    assert_eq!(read_all(&store), tree, "it opens");
    assert_eq!(rewrap(&store).rewrapped, 1);
    assert!(store.shared().restored.is_empty());
    let active = active(&store.shared().keys);
    assert_eq!(keks_named(&disk), BTreeSet::from([active]));
    let pair = slots(&disk, &path);
    assert!(pair.a.is_ok() && pair.a == pair.b);
    let store = open(disk.clone(), &root);
    assert_eq!(read_all(&store), tree);
    assert!(store.shared().restored.is_empty(), "found once");
    assert_eq!(rewrap(&store), Counts::default());
}

#[test]
fn neither_a_read_only_store_nor_an_unfinished_rotation_takes_note() {
    let (disk, root, tree, _) = restored();
    let keys = Keys::open(&disk, &roots(&root)).unwrap();
    let store = Store::open(disk.clone(), keys, StoreOptions { read_only: true, ..StoreOptions::default() }).unwrap();
    assert_eq!(read_all(&store), tree);
    assert!(store.shared().restored.is_empty());
    // Every header is under a retired KEK there, and the next run moves them.
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let control = Control::new();
    control.cancel();
    run(&Context { shared: store.shared(), moves: &*store }, &one_job(), &(), &control).unwrap();
    let store = open(disk, &root);
    assert_eq!(read_all(&store), tree);
    assert!(store.shared().restored.is_empty());
}

#[test]
fn one_that_cannot_be_moved_stays_as_it_was_and_readable() {
    let (disk, root, tree, path) = restored();
    let before = disk.read_raw(&path).unwrap();
    let store = open(disk.clone(), &root);
    assert_eq!(read_all(&store), tree);
    disk.stop_after(disk.operations());
    assert_eq!(rewrap(&store).failed, 1);
    let disk = disk.crash_process();
    assert_eq!(disk.read_raw(&path).unwrap(), before);
    assert_eq!(read_all(&open(disk, &root)), tree);
}

#[test]
fn the_power_can_go_anywhere_on_the_way() {
    let (base, root, tree, _) = restored();
    for n in 0.. {
        let disk = base.crash_process();
        let store = open(disk.clone(), &root);
        assert_eq!(read_all(&store), tree);
        disk.stop_after(disk.operations() + n);
        let done = rewrap(&store).rewrapped == 1;
        for seed in 0..8 {
            let cut = disk.crash_power(seed, PowerCut::Reorder { tear: true });
            assert_eq!(read_all(&open(cut, &root)), tree, "seed {seed} after {n}");
        }
        if done {
            assert!(n > 4, "{n}");
            return;
        }
    }
}
