//! What must keep the old KEK from being retired, and what must keep a new one from being used.

use super::*;
use crate::backing::sim::Op;
use crate::format::keyring::KekState;
use crate::kms::KmsError;
use crate::kms::scripted::{Behaviour, Call};

fn state_of(store: &Arc<Store<SimDisk>>, id: KekId) -> (KekState, bool) {
    let ring = store.shared().keys.snapshot();
    let k = ring.kek(id).unwrap();
    (k.state, k.unused != 0)
}

#[test]
fn a_barrier_that_fails_keeps_the_old_slot_and_the_old_kek() {
    let (disk, root, mut tree) = filled();
    let store = open(disk.clone(), &root);
    // With two names a file gets two tries, and the second one may succeed.
    store.unlink(&dir(&store, "d/e"), b"hard link").unwrap();
    tree.remove("d/e/hard link").unwrap();
    let old = active(&store.shared().keys);
    // The journal and the keyring sync too: only the sweep's own barriers are to fail.
    struct FailInSweep(SimDisk);
    impl Progress for FailInSweep {
        fn update(&self, s: &Status) {
            match s.state {
                State::Sweeping if s.counts.scanned == 0 => self.0.fail_next(Some(Op::SyncFile), 1, libc::EIO),
                _ => {}
            }
        }
    }
    let ctx = Context { shared: store.shared(), moves: &*store };
    let report = run(&ctx, &one_job(), &FailInSweep(disk.clone()), &Control::new()).unwrap();
    assert_eq!(report.outcome, Outcome::Incomplete, "{report:?}");
    assert_eq!((report.failures_total, report.failures[0].code.as_str()), (1, "EIO"));
    assert!(!report.is_done());
    assert_eq!(state_of(&store, old), (KekState::Retired, false));
    assert!(keks_named(&disk).contains(&old));
    assert_eq!(read_all(&open(disk.clone(), &root)), tree);
    let again = rotate(&store, &Options { destroy_old: true, ..one_job() }).unwrap();
    assert_eq!((again.outcome, again.resumed, again.target), (Outcome::Complete, true, report.target));
    assert_eq!(state_of(&store, old), (KekState::Destroyed, true));
    assert_eq!(read_all(&open(disk, &root)), tree);
}

/// The barrier behind the last second halves failed; the scan then saw what was in memory, and the old KEK went.
#[test]
fn a_last_barrier_that_fails_keeps_the_old_kek() {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let old = active(&store.shared().keys);
    // Whatever syncs everything during the run: first halves are then made durable one by one.
    disk.fail_from(Some(Op::SyncAll), 0, libc::EIO);
    let report = rotate(&store, &Options { destroy_old: true, ..one_job() }).unwrap();
    assert_eq!(report.outcome, Outcome::Incomplete, "{report:?}");
    assert_eq!((report.failures_total, report.failures[0].code.as_str()), (1, "EIO"), "{report:?}");
    assert_eq!(state_of(&store, old), (KekState::Retired, false));
    disk.clear_faults();
    assert_eq!(rotate(&store, &Options { destroy_old: true, ..one_job() }).unwrap().outcome, Outcome::Complete);
    assert_eq!(read_all(&open(disk, &root)), tree);
}

#[test]
fn a_file_that_cannot_be_read_keeps_the_old_kek() {
    let (disk, root, _) = filled();
    let store = open(disk.clone(), &root);
    let old = active(&store.shared().keys);
    disk.fail_from(Some(Op::ReadDir), 2, libc::EIO);
    let report = rotate(&store, &Options { destroy_old: true, ..one_job() }).unwrap();
    assert_eq!(report.outcome, Outcome::Incomplete);
    assert!(report.failures.iter().all(|f| f.code == "EIO"), "{report:?}");
    assert_eq!((report.retired.len(), report.destroyed.len()), (0, 0));
    assert_eq!(state_of(&store, old), (KekState::Retired, false));
    disk.clear_faults();
    assert_eq!(rotate(&store, &one_job()).unwrap().outcome, Outcome::Complete);
}

#[test]
fn damage_is_a_failure_with_its_code_and_is_left_alone() {
    let (disk, root, _) = filled();
    let other = SimDisk::default();
    init(&other, &root);
    fill(&open(other.clone(), &root));
    let foreign = other.read_raw(content_files(&other).remove(0)).unwrap();
    let paths = content_files(&disk);
    type Spoil<'a> = Box<dyn Fn(&Vec<u8>) + 'a>;
    let spoil: [(&str, Spoil<'_>); 5] = [
        ("foreign-store", Box::new(|p| disk.replace_raw(p, &foreign).unwrap())),
        ("header-magic", Box::new(|p| disk.replace_raw(p, &[0x55; 8192]).unwrap())),
        ("header-unreadable", Box::new(|p| [200, 1224].iter().for_each(|at| disk.flip_bit(p, *at, 0).unwrap()))),
        ("wrap-auth", Box::new(|p| forge(&disk, p, |s| s.wrapped[30] ^= 1))),
        ("kek-unknown", Box::new(|p| forge(&disk, p, |s| s.kek = KekId::random()))),
    ];
    for (code, spoil) in spoil {
        let before = disk.read_raw(&paths[0]).unwrap();
        spoil(&paths[0]);
        let spoiled = disk.read_raw(&paths[0]).unwrap();
        let report = rotate(&open(disk.clone(), &root), &one_job()).unwrap();
        assert_eq!(report.outcome, Outcome::Incomplete, "{code}");
        let codes: BTreeSet<&str> = report.failures.iter().map(|f| f.code.as_str()).collect();
        assert_eq!(codes, BTreeSet::from([code]), "{report:?}");
        assert!(report.failures.iter().all(|f| paths[0] == f.path.as_bytes()));
        assert_eq!(disk.read_raw(&paths[0]).unwrap(), spoiled);
        disk.replace_raw(&paths[0], &before).unwrap();
    }
    assert_eq!(rotate(&open(disk.clone(), &root), &one_job()).unwrap().outcome, Outcome::Complete);
}

fn forge(disk: &SimDisk, path: &[u8], change: impl Fn(&mut crate::format::header::Slot)) {
    let pair = slots(disk, path);
    for (slot, at) in [(pair.a, 0), (pair.b, 1024)] {
        let mut slot = slot.unwrap();
        change(&mut slot);
        disk.write_raw(path, at, &slot.encode()).unwrap();
    }
}

#[test]
fn a_key_service_that_lies_or_fails_leads_to_no_new_kek() {
    let outage = || KmsError::Unreachable("test".to_owned());
    let lies: [(Call, Behaviour); 7] = [
        (Call::Wrap, Behaviour::AnotherKey),
        (Call::Wrap, Behaviour::Garbage),
        (Call::Wrap, Behaviour::WrapLength(0)),
        (Call::Wrap, Behaviour::WrapLength(641)),
        (Call::Wrap, Behaviour::Fail(outage())),
        (Call::Unwrap, Behaviour::AnotherKey),
        (Call::Unwrap, Behaviour::Fail(outage())),
    ];
    for (call, lie) in lies {
        let (disk, root, tree) = filled();
        let store = open(disk.clone(), &root);
        let old = active(&store.shared().keys);
        root.then(call, lie.clone());
        rotate(&store, &one_job()).expect_err(&format!("{call:?} {lie:?}"));
        assert_eq!(active(&store.shared().keys), old);
        assert_eq!(keks_named(&disk), BTreeSet::from([old]));
        drop(store);
        let store = open(disk.clone(), &root);
        assert_eq!(active(&store.shared().keys), old);
        assert_eq!(read_all(&store), tree);
        assert_eq!(rotate(&store, &one_job()).unwrap().outcome, Outcome::Complete);
        assert_eq!(read_all(&store), tree);
    }
}

#[test]
fn external_keks_rotate_both_ways_and_an_outage_only_stops_the_run() {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let external = Options { kek: Some(KekKind::External), ..one_job() };
    let first = rotate(&store, &external).unwrap();
    assert_eq!(first.outcome, Outcome::Complete, "{first:?}");
    assert_eq!(read_all(&open(disk.clone(), &root)), tree);
    // To another external KEK, with the service failing in the middle of the sweep.
    struct OutageInSweep(Arc<Scripted>);
    impl Progress for OutageInSweep {
        fn update(&self, s: &Status) {
            if s.state == State::Sweeping {
                self.0.outage();
            }
        }
    }
    let ctx = Context { shared: store.shared(), moves: &*store };
    let stopped = run(&ctx, &external, &OutageInSweep(root.clone()), &Control::new()).unwrap();
    assert_eq!(stopped.outcome, Outcome::Incomplete);
    assert!(stopped.failures.iter().all(|f| f.code == "kms-unreachable"), "{stopped:?}");
    root.always(Behaviour::Obey);
    assert_eq!(read_all(&open(disk.clone(), &root)), tree);
    // The unfinished run is the external one; sealed is asked for, so a new KEK is made.
    let sealed = Options { kek: Some(KekKind::Sealed), ..one_job() };
    let last = rotate(&store, &sealed).unwrap();
    assert_eq!((last.outcome, last.resumed), (Outcome::Complete, false));
    assert_eq!(keks_named(&disk), BTreeSet::from([last.target]));
    assert_eq!(read_all(&open(disk, &root)), tree);
}

/// The service goes away in the middle of a sweep and comes back when somebody has seen that the run waits for it.
#[test]
fn an_outage_in_mid_sweep_is_waited_for() {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    struct Outage(Arc<Scripted>, std::sync::atomic::AtomicU32);
    impl Progress for Outage {
        fn update(&self, s: &Status) {
            match s.state {
                State::Sweeping if s.waiting => {
                    self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    self.0.always(Behaviour::Obey);
                }
                State::Sweeping if s.counts.scanned == 0 && self.1.load(std::sync::atomic::Ordering::Relaxed) == 0 => {
                    self.0.outage();
                }
                _ => {}
            }
        }
    }
    let outage = Outage(root.clone(), 0.into());
    let patience = std::time::Duration::from_secs(600);
    let external = Options { kek: Some(KekKind::External), patience, ..one_job() };
    let ctx = Context { shared: store.shared(), moves: &*store };
    let report = run(&ctx, &external, &outage, &Control::new()).unwrap();
    assert_eq!((report.outcome, report.failures_total), (Outcome::Complete, 0), "{report:?}");
    assert!(outage.1.into_inner() > 0, "nobody waited");
    assert_eq!(read_all(&open(disk, &root)), tree);
}

#[test]
fn a_read_only_store_is_not_rotated() {
    let (disk, root, _) = filled();
    let keys = Keys::open(&disk, &roots(&root)).unwrap();
    let options = StoreOptions { read_only: true, ..StoreOptions::default() };
    let store = Store::open(disk.clone(), keys, options).unwrap();
    let before = disk.operations();
    assert!(matches!(rotate(&store, &one_job()), Err(crate::store::StoreError::ReadOnly)));
    assert_eq!(disk.operations(), before);
}
