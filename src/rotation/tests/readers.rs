//! Stores opened read-only on the disk that shards work on, and a merge.

use super::shards::{begin_run, merged, run_shard, shards};
use super::*;
use crate::backing::sim::{Moment, Op};
use crate::format::damage::Damage;
use crate::store::StoreError;
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

thread_local! {
    /// This thread is reading, from within a hook.
    static LOOKING: Cell<bool> = const { Cell::new(false) };
}

fn reader(disk: &SimDisk, root: &Arc<Scripted>) -> Arc<Store<SimDisk>> {
    let keys = Keys::open(disk, &roots(root)).unwrap();
    Store::open(disk.clone(), keys, StoreOptions { read_only: true, ..StoreOptions::default() }).unwrap()
}

/// Every file, with no key that was unwrapped before.
fn read_afresh(store: &Arc<Store<SimDisk>>) -> Tree {
    store.forget_idle_keys();
    read_all(store)
}

fn sealed() -> (SimDisk, Arc<Scripted>, Tree) {
    filled()
}

fn external() -> (SimDisk, Arc<Scripted>, Tree) {
    let (disk, root) = (SimDisk::default(), Scripted::new("root"));
    Store::init(&disk, &roots(&root), KekKind::External, StoreFlags::default()).unwrap();
    let tree = fill(&open(disk.clone(), &root));
    disk.sync_all().unwrap();
    (disk, root, tree)
}

#[test]
fn everything_is_readable_before_every_operation_of_shards_and_the_merge() {
    for new in [sealed, external] {
        let (disk, root, tree) = new();
        let readers = Arc::new([reader(&disk, &root), reader(&disk, &root)]);
        let looks = Arc::new(AtomicUsize::new(0));
        let (seen, tree_there, counted) = (readers.clone(), tree.clone(), looks.clone());
        disk.set_hook(Some(Arc::new(move |m| {
            if matches!(m, Moment::Before(op) if op.is_counted()) {
                assert!(!LOOKING.replace(true), "a reader changes something: {m:?}");
                // They take turns, so that one knows of what the other has met first.
                let n = counted.fetch_add(1, Ordering::SeqCst);
                assert_eq!(read_afresh(&seen[n % 2]), tree_there, "look {n}");
                LOOKING.set(false);
            }
        })));
        let target = begin_run(&disk, &root);
        let reports: Vec<Report> = shards(3).into_iter().map(|s| run_shard(&disk, &root, s).unwrap()).collect();
        assert_eq!(merged(&disk, &root, &reports).outcome, Outcome::Complete);
        disk.set_hook(None);
        assert!(looks.load(Ordering::SeqCst) > 50, "{looks:?}");
        for r in readers.iter() {
            assert_eq!(read_afresh(r), tree);
            assert_eq!(active(&r.shared().keys), target);
            // What the merge said comes with the next look.
            r.shared().renew_keys();
            assert!(!is_unfinished(&r.shared().keys.snapshot()));
        }
    }
}

/// Headers of another store's history: genuine slots under a KEK that this keyring never had.
#[test]
fn headers_that_name_keks_nobody_knows_are_damage_and_read_the_keyring_once() {
    let (disk, root, _) = filled();
    let elsewhere = disk.crash_process();
    rotate(&open(elsewhere.clone(), &root), &one_job()).unwrap();
    let store = reader(&disk, &root);
    for path in content_files(&disk) {
        disk.write_raw(&path, 0, &elsewhere.read_raw(&path).unwrap()[..2048]).unwrap();
    }
    let node = store.lookup(&dir(&store, "d"), b"block").unwrap().0;
    let reads = Arc::new(AtomicUsize::new(0));
    let counted = reads.clone();
    disk.set_hook(Some(Arc::new(move |m| {
        counted.fetch_add(usize::from(m == Moment::Before(Op::Read)), Ordering::SeqCst);
    })));
    let unknown = || match store.open_file(&node, Access::Read) {
        Err(StoreError::Damage(Damage::KekUnknown(_))) => reads.swap(0, Ordering::SeqCst),
        other => panic!("{:?}", other.map(drop)),
    };
    let first = unknown();
    let later: Vec<usize> = (0..50).map(|_| unknown()).collect();
    assert!(later.iter().all(|n| *n + 2 == first), "the keyring has two copies: {first}, then {later:?}");
}

/// As another process's write in the middle of ours shows, or an old page over a network.
#[test]
fn a_header_that_is_half_written_is_read_again_and_no_more_than_that() {
    let (disk, root) = (SimDisk::default(), Scripted::new("root"));
    Store::init(&disk, &roots(&root), KekKind::Sealed, StoreFlags { plaintext_names: true }).unwrap();
    write(&open(disk.clone(), &root), "f", b"content");
    let whole = disk.read_raw("f").unwrap();
    let torn = |healed_after: usize, store: &Arc<Store<SimDisk>>| {
        let reads = Arc::new(AtomicUsize::new(0));
        let (counted, there, whole) = (reads.clone(), disk.clone(), whole.clone());
        // A part of each slot.
        disk.write_raw("f", 512, &[0x5a; 1024]).unwrap();
        disk.set_hook(Some(Arc::new(move |m| {
            if m == Moment::Before(Op::Read) && counted.fetch_add(1, Ordering::SeqCst) == healed_after {
                there.write_raw("f", 0, &whole).unwrap();
            }
        })));
        let got = read(store, &store.lookup(&store.root(), b"f").unwrap().0);
        disk.set_hook(None);
        (got, reads.load(Ordering::SeqCst))
    };
    let store = reader(&disk, &root);
    assert_eq!(torn(1, &store).0.unwrap(), b"content");
    let (got, reads) = torn(usize::MAX, &store);
    assert!(matches!(got, Err(StoreError::Damage(_))) && reads == 2, "{got:?}, {reads} reads");
    disk.write_raw("f", 0, &whole).unwrap();
    // Nobody else writes what may be written here.
    let (got, reads) = torn(1, &open(disk.clone(), &root));
    assert!(matches!(got, Err(StoreError::Damage(_))) && reads == 1, "{got:?}, {reads} reads");
}
