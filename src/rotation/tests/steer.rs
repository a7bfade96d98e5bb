//! Pause, resume and cancel in each state, and what the status says meanwhile.

use super::*;
use crate::kms::KmsError;
use crate::kms::scripted::Behaviour;

const STATES: [State; 4] = [State::Staged, State::Sweeping, State::Verifying, State::Retiring];

/// Runs, and calls `then` with the run's switches when it comes into `state`.
fn steered(store: &Arc<Store<SimDisk>>, state: State, then: impl Fn(&Control) + Sync) -> Report {
    let control = Control::new();
    let at = AtState::new(|s: &Status| {
        if s.state == state {
            then(&control);
        }
    });
    let ctx = Context { shared: store.shared(), moves: &**store };
    run(&ctx, &one_job(), &at, &control).unwrap()
}

#[test]
fn a_cancel_in_each_state_leaves_a_valid_store_that_the_next_run_finishes() {
    for state in STATES {
        let (disk, root, tree) = filled();
        let store = open(disk.clone(), &root);
        let old = active(&store.shared().keys);
        let report = steered(&store, state, Control::cancel);
        // With the proof made, the rest is a word in the keyring: that is finished.
        let outcome = if state == State::Retiring { Outcome::Complete } else { Outcome::Cancelled };
        assert_eq!(report.outcome, outcome, "{state:?}");
        assert_eq!(active(&store.shared().keys), report.target, "{state:?}");
        assert_eq!(is_unfinished(&store.shared().keys.snapshot()), state != State::Retiring, "{state:?}");
        assert!(store.shared().keys.kek(old).is_ok(), "{state:?}");
        let moved = matches!(state, State::Verifying | State::Retiring);
        let named = if moved { BTreeSet::from([report.target]) } else { BTreeSet::from([old]) };
        assert_eq!(keks_named(&disk), named, "{state:?}");
        write(&store, "new", b"under the new KEK");
        assert_eq!(read_all(&open(disk.clone(), &root)).len(), tree.len() + 1, "{state:?}");
        let again = rotate(&store, &one_job()).unwrap();
        assert_eq!((again.outcome, again.resumed), (Outcome::Complete, state != State::Retiring), "{state:?}");
        assert_eq!(again.target == report.target, state != State::Retiring, "{state:?}");
        assert_eq!(keks_named(&disk), BTreeSet::from([again.target]), "{state:?}");
        assert_eq!(read_all(&open(disk, &root)).len(), tree.len() + 1, "{state:?}");
    }
}

#[test]
fn a_pause_in_each_state_is_ended_by_a_resume() {
    for state in STATES {
        let (disk, root, tree) = filled();
        let store = open(disk.clone(), &root);
        let control = Control::new();
        let (send, paused) = std::sync::mpsc::channel();
        struct PauseAt<'a>(State, &'a Control, std::sync::mpsc::Sender<State>);
        impl Progress for PauseAt<'_> {
            fn update(&self, s: &Status) {
                match (s.state == self.0, s.paused) {
                    (true, false) => self.1.pause(),
                    (_, true) => {
                        let _ = self.2.send(s.state);
                    }
                    _ => {}
                }
            }
        }
        // Resumed at once, so that it is paused once only: what comes after in the same state pauses it again.
        let at = PauseAt(state, &control, send);
        let ctx = Context { shared: store.shared(), moves: &*store };
        let report = std::thread::scope(|s| {
            let running = s.spawn(|| run(&ctx, &one_job(), &at, &control));
            let seen = paused.recv().unwrap();
            // A pause holds the next header back; where there is none any more, nothing.
            let held = if state == State::Staged { State::Sweeping } else { state };
            let held = if state == State::Retiring { State::Done } else { held };
            assert_eq!(seen, held, "{state:?}");
            while !running.is_finished() {
                control.resume();
                std::thread::yield_now();
            }
            running.join().unwrap().unwrap()
        });
        assert_eq!(report.outcome, Outcome::Complete, "{state:?}");
        assert_eq!(read_all(&open(disk, &root)), tree, "{state:?}");
    }
}

/// What a run says while it works, at the end of its sweep and of its scan.
#[test]
fn the_status_says_what_was_found_and_what_failed_so_far() {
    let (disk, root, _) = filled();
    let store = open(disk.clone(), &root);
    rotate(&store, &Options { kek: Some(KekKind::External), ..one_job() }).unwrap();
    let old = active(&store.shared().keys);
    let paths = content_files(&disk);
    let id = slots(&disk, &paths[0]).a.unwrap().file.0;
    root.about(id, Behaviour::Fail(KmsError::Denied("no".into())));
    disk.write_raw(&paths[1], 0, &[0x55; 2048]).unwrap();
    struct Last(parking_lot::Mutex<BTreeMap<&'static str, Status>>);
    impl Progress for Last {
        fn update(&self, s: &Status) {
            if s.counts.scanned > 0 {
                self.0.lock().insert(s.state.as_str(), s.clone());
            }
        }
    }
    let last = Last(Default::default());
    let waive = Arc::new(Waivers::new([std::str::from_utf8(&paths[1]).unwrap()]).unwrap());
    let options = Options { kek: Some(KekKind::External), waive, ..one_job() };
    let ctx = Context { shared: store.shared(), moves: &*store };
    let report = run(&ctx, &options, &last, &Control::new()).unwrap();
    assert_eq!(report.outcome, Outcome::Incomplete);
    let mut last = last.0.into_inner();
    let (sweep, scan) = (last.remove("sweeping").unwrap(), last.remove("verifying").unwrap());
    assert_eq!((sweep.counts.scanned, sweep.counts.rewrapped, sweep.counts.failed), (6, 2, 2));
    // The hard link is looked at twice and moved once.
    assert_eq!(sweep.headers_by_kek, BTreeMap::from([(old, 2), (report.target, 1)]));
    assert_eq!(scan.headers_by_kek, BTreeMap::from([(old, 1), (report.target, 3)]));
    let failing = |f: &Failing| (f.total, f.waived, f.by_code.clone(), f.first.len());
    let denied = (1, 1, BTreeMap::from([("kms-denied".to_owned(), 1)]), 1);
    assert_eq!(failing(&sweep.sweep_failures), denied);
    assert_eq!(failing(&sweep.verify_failures), (0, 0, BTreeMap::new(), 0));
    assert_eq!(failing(&scan.sweep_failures), denied, "not forgotten while it scans");
    assert_eq!(failing(&scan.verify_failures), (0, 1, BTreeMap::new(), 0));
    assert_eq!(sweep.sweep_failures.first[0].path.as_bytes(), paths[0]);
    assert!(sweep.started > 0 && sweep.since >= sweep.started && scan.since >= sweep.since);
    assert_eq!((sweep.pass, scan.pass), (1, 2));
    assert!(sweep.run_eta.unwrap() >= sweep.eta.unwrap() && scan.run_eta == scan.eta);
}
