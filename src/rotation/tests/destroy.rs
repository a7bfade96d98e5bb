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

pub(super) fn destroy<B: Backing>(store: &Arc<Store<B>>, kek: KekId) -> crate::store::Result<Destruction> {
    ending(store, kek, When::Now, &Control::new())
}

fn refused(r: crate::store::Result<Destruction>) -> String {
    match r {
        Err(StoreError::KeyState(why)) => why,
        other => panic!("{other:?}"),
    }
}

pub(super) fn has_wraps(disk: &SimDisk, kek: KekId) -> bool {
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

/// Schedules a KEK so that its time has come at the second look.
fn overdue(store: &Arc<Store<SimDisk>>, kek: KekId) {
    assert_eq!(ending(store, kek, When::After(0), &Control::new()).unwrap().outcome, Fate::Scheduled);
}

#[test]
fn a_scheduled_kek_waits_then_goes_after_the_same_scan_and_can_be_taken_back() {
    let (disk, root, tree, old, (path, saved)) = rotated();
    let store = open(disk.clone(), &root);
    let end = |when| ending(&store, old, when, &Control::new()).unwrap();
    assert_eq!(end(When::Never).outcome, Fate::NotScheduled);
    let d = end(When::After(7 * 86_400));
    assert_eq!((d.outcome, d.not_before), (Fate::Scheduled, d.schedule.unwrap().due));
    let d = end(When::Now);
    assert_eq!((d.outcome, d.proof, d.not_before >= d.schedule.unwrap().due), (Fate::Waiting, None, true));
    assert_eq!((end(When::Never).outcome, end(When::Never).outcome), (Fate::Cancelled, Fate::NotScheduled));
    overdue(&store, old);
    // The time has come, and a file needs it.
    disk.write_raw(&path, 0, &saved).unwrap();
    assert!(refused(destroy(&store, old)).contains("1 header needs it"));
    assert!(has_wraps(&disk, old));
    rotate(&store, &Options { destroy_old: false, ..one_job() }).unwrap();
    assert!(has_wraps(&disk, old));
    let d = destroy(&store, old).unwrap();
    assert_eq!((d.outcome, d.schedule), (Fate::Destroyed, None));
    assert!(!has_wraps(&disk, old));
    assert_eq!(read_all(&open(disk, &root)), tree);
}

#[test]
fn rotate_destroys_old_keks_but_those_that_have_a_time_of_their_own() {
    let (disk, root, tree, old, _) = rotated();
    let store = open(disk.clone(), &root);
    ending(&store, old, When::After(60), &Control::new()).unwrap();
    let second = active(&store.shared().keys);
    let report = rotate(&store, &Options { destroy_old: true, ..one_job() }).unwrap();
    assert_eq!(report.destroyed, [second]);
    assert!(has_wraps(&disk, old) && !has_wraps(&disk, second));
    assert_eq!(read_all(&open(disk, &root)), tree);
}

#[test]
fn rotate_destroys_nothing_in_a_store_that_wants_two_root_keys_to_agree() {
    let (disk, a, b) = (SimDisk::default(), Scripted::new("a"), Scripted::new("b"));
    let both: Vec<Arc<dyn KeyProvider>> = vec![a.clone(), b.clone()];
    Store::init(&disk, &both, KekKind::Sealed, StoreFlags::default()).unwrap();
    let store = Store::open(disk.clone(), Keys::open(&disk, &both).unwrap(), StoreOptions::default()).unwrap();
    write(&store, "f", b"content");
    let keys = &store.shared().keys;
    let confirmed = keys.confirm(&both).unwrap();
    keys.set_quorum(&disk, 2, &confirmed).unwrap();
    let old = active(keys);
    let r = rotate(&store, &Options { destroy_old: true, ..one_job() });
    assert!(matches!(&r, Err(StoreError::KeyState(why)) if why.contains("requires 2")), "{r:?}");
    assert_eq!(active(keys), old, "and it was said before anything was done");
    rotate(&store, &one_job()).unwrap();
    assert!(refused(destroy(&store, old)).contains("requires 2 different root keys"));
    let ctx = Context { shared: store.shared(), moves: &*store };
    let d = super::super::destroy(&ctx, old, When::Now, &confirmed, &(), &Control::new()).unwrap();
    assert_eq!(d.outcome, Fate::Destroyed);
}

#[test]
fn a_file_that_needs_a_scheduled_kek_is_told() {
    let (disk, root, tree, old, (path, saved)) = rotated();
    let store = open(disk.clone(), &root);
    ending(&store, old, When::After(7 * 86_400), &Control::new()).unwrap();
    let keys = &store.shared().keys;
    assert!(keys.endings_due().is_empty());
    disk.write_raw(&path, 0, &saved).unwrap();
    assert_eq!(read_all(&store), tree, "it opens");
    assert_eq!(keys.endings_due(), [old]);
    keys.record_use(&disk, old).unwrap();
    assert!(Keys::read_keyring(&disk).unwrap().life.schedule(old).unwrap().used > 0);
}

#[test]
fn what_was_scheduled_and_taken_back_does_not_go_at_once() {
    let (disk, root, tree, old, _) = rotated();
    let store = open(disk.clone(), &root);
    overdue(&store, old);
    // Whoever asks has seen the schedule, and so was not asked whether it may go now.
    assert_eq!(ending(&store, old, When::Never, &Control::new()).unwrap().outcome, Fate::Cancelled);
    assert!(
        refused(ending(&store, old, When::Due, &Control::new())).contains("not scheduled to be destroyed any more")
    );
    assert!(has_wraps(&disk, old));
    assert_eq!(read_all(&store), tree);
    overdue(&store, old);
    assert_eq!(ending(&store, old, When::Due, &Control::new()).unwrap().outcome, Fate::Destroyed);
    assert_eq!(ending(&store, old, When::Due, &Control::new()).unwrap().outcome, Fate::AlreadyDestroyed);
}
