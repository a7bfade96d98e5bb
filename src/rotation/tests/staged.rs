//! A run in two steps: the new KEK staged, a copy of the keyring put away, the run with it.

use super::*;
use crate::store::StoreError;

fn begin(store: &Arc<Store<SimDisk>>, options: &Options) -> crate::store::Result<Staged> {
    stage(&Context { shared: store.shared(), moves: &**store }, options)
}

/// Takes the keyring away, as if the disk below had lost it.
fn lose(disk: &SimDisk) {
    ["a", "b"].iter().for_each(|c| disk.truncate_raw(format!(".envelopefs/keyring.{c}"), 0).unwrap());
}

#[test]
fn a_copy_from_before_the_activation_opens_everything_wherever_the_run_was_cut_off() {
    let (base, root, tree) = filled();
    for n in 0.. {
        let disk = base.crash_process();
        let store = open(disk.clone(), &root);
        let Staged::New(new) = begin(&store, &one_job()).unwrap() else { panic!() };
        assert_ne!(active(&store.shared().keys), new);
        let copy = Keys::export(&disk).unwrap();
        disk.stop_after(disk.operations() + 3 * n);
        let done = rotate(&store, &Options { staged: Some(Staged::New(new)), ..one_job() });
        let after = disk.crash_process();
        lose(&after);
        let done = done.is_ok_and(|report| report.target == new && report.outcome == Outcome::Complete);
        let put_back = Keys::import(&after, &copy.bytes, &roots(&root), false, |_| Ok(())).unwrap().keys;
        assert_eq!(active(&put_back), new, "headers may name it");
        drop(put_back);
        let store = open(after.clone(), &root);
        assert_eq!(read_all(&store), tree, "after {n}");
        assert_eq!(rotate(&store, &one_job()).unwrap().target, new, "and the rotation goes on");
        assert_eq!(read_all(&open(after, &root)), tree);
        if done {
            assert!(n > 5);
            return;
        }
    }
}

#[test]
fn a_staged_kek_that_another_run_has_discarded_is_not_used() {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let Staged::New(staged) = begin(&store, &one_job()).unwrap() else { panic!() };
    rotate(&store, &one_job()).unwrap();
    let before = active(&store.shared().keys);
    let r = rotate(&store, &Options { staged: Some(Staged::New(staged)), ..one_job() });
    assert!(matches!(&r, Err(StoreError::KeyState(why)) if why.contains("not pending any more")), "{r:?}");
    assert_eq!(active(&store.shared().keys), before);
    assert_eq!(read_all(&store), tree);
}

/// The KEK that headers are being moved to was in one copy of the keyring only until the run ended.
#[test]
fn a_run_that_goes_on_replaces_an_old_copy_of_the_keyring_first() {
    let (disk, root, _) = filled();
    let copy = |c: &str| disk.read_raw(format!(".envelopefs/keyring.{c}")).unwrap();
    let old = copy("b");
    let Staged::New(new) = begin(&open(disk.clone(), &root), &one_job()).unwrap() else { panic!() };
    Keys::open(&disk, &roots(&root)).unwrap().activate(&disk, new).unwrap();
    disk.replace_raw(".envelopefs/keyring.b", &old).unwrap();
    assert_eq!(begin(&open(disk.clone(), &root), &one_job()).unwrap(), Staged::Resume(new));
    assert!(copy("a") == copy("b") && copy("b") != old);
}

#[test]
fn nothing_is_staged_where_a_run_would_make_no_new_kek() {
    let (disk, root, _) = filled();
    let store = open(disk.clone(), &root);
    let first = active(&store.shared().keys);
    let young = Options { if_older_than: Some(86_400), ..one_job() };
    assert_eq!(begin(&store, &young).unwrap(), Staged::NotDue(first));
    let control = Control::new();
    control.cancel();
    let ctx = Context { shared: store.shared(), moves: &*store };
    run(&ctx, &one_job(), &(), &control).unwrap();
    let second = active(&store.shared().keys);
    assert_eq!(begin(&store, &young).unwrap(), Staged::Resume(second));
    assert!(store.shared().keys.snapshot().pending().is_none());
}

/// Between the two steps anybody may rotate: the second must not then make a KEK of which there is no copy.
#[test]
fn the_second_step_begins_with_what_the_first_said_or_not_at_all() {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let control = Control::new();
    control.cancel();
    run(&Context { shared: store.shared(), moves: &*store }, &one_job(), &(), &control).unwrap();
    let going_on = begin(&store, &one_job()).unwrap();
    let target = active(&store.shared().keys);
    assert_eq!(going_on, Staged::Resume(target));
    let pinned = |staged| Options { staged: Some(staged), ..one_job() };
    assert_eq!(rotate(&store, &pinned(going_on)).unwrap().target, target);
    // It has ended, and a new run would make a new KEK.
    let r = rotate(&store, &pinned(going_on));
    assert!(matches!(&r, Err(StoreError::KeyState(why)) if why.contains("which was to go on, has ended")), "{r:?}");
    // It was not due a moment ago, and would be now.
    let report = rotate(&store, &pinned(Staged::NotDue(target))).unwrap();
    assert_eq!((report.outcome, report.target), (Outcome::NotDue, target));
    assert_eq!(active(&store.shared().keys), target);
    assert!(store.shared().keys.snapshot().pending().is_none());
    assert_eq!(read_all(&store), tree);
}
