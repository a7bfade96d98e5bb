//! Stopped, and cut off from power, after every single operation.

use super::super::barrier::Barrier;
use super::super::failures::Failures;
use super::super::pass::{Item, Visitor};
use super::super::patience::Patience;
use super::super::sweep::Sweep;
use super::super::turns::Turns;
use super::*;
use crate::backing::sim::{Journal as SimJournal, Moment, Op, PowerCut, SimOptions};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;

fn options() -> Options {
    Options { destroy_old: true, ..one_job() }
}

/// How many operations a whole run takes.
fn run_length(base: &SimDisk, root: &Arc<Scripted>) -> u64 {
    let disk = base.crash_process();
    let store = open(disk.clone(), root);
    let before = disk.operations();
    assert_eq!(rotate(&store, &options()).unwrap().outcome, Outcome::Complete);
    disk.operations() - before
}

/// Runs until `n` operations are done; the disk as the program left it.
fn stopped_after(base: &SimDisk, root: &Arc<Scripted>, n: u64) -> SimDisk {
    let disk = base.crash_process();
    let store = open(disk.clone(), root);
    disk.stop_after(disk.operations() + n);
    // Whatever it says; it may even be done.
    let _ = rotate(&store, &options());
    disk
}

/// Everything is readable, another run finishes, and then everything is readable and under one KEK.
fn recovers(disk: &SimDisk, root: &Arc<Scripted>, tree: &Tree, what: &str) {
    assert_eq!(read_all(&open(disk.clone(), root)), *tree, "{what}, before");
    let store = open(disk.clone(), root);
    let report = rotate(&store, &options()).unwrap();
    assert_eq!(report.outcome, Outcome::Complete, "{what}: {report:?}");
    drop(store);
    assert_eq!(keks_named(disk), BTreeSet::from([report.target]), "{what}");
    let store = open(disk.clone(), root);
    assert_eq!(read_all(&store), *tree, "{what}, after");
    let usable = store.shared().keys.snapshot().keks.iter().filter(|k| !k.wraps.is_empty()).count();
    assert_eq!(usable, 1, "{what}: old KEKs are destroyed");
}

#[test]
fn a_run_can_be_killed_after_every_operation() {
    let (base, root, tree) = filled();
    let length = run_length(&base, &root);
    assert!(length > 50, "{length}");
    for n in 0..=length {
        let disk = stopped_after(&base, &root, n).crash_process();
        recovers(&disk, &root, &tree, &format!("killed after {n} of {length}"));
    }
}

/// Told of an error, whether it was done or not, the process lives on: what it has in memory is what others find on disk.
#[test]
fn a_run_can_meet_an_error_at_every_operation_and_the_same_process_goes_on() {
    let (base, root, tree) = filled();
    let length = run_length(&base, &root);
    for (late, n) in (0..length).flat_map(|n| [(false, n), (true, n)]) {
        let what = format!("an error at {n} of {length}, {}", if late { "done" } else { "not done" });
        let disk = base.crash_process();
        let store = open(disk.clone(), &root);
        match late {
            true => disk.fail_next_late(None, n, libc::EIO),
            false => disk.fail_next(None, n, libc::EIO),
        }
        let _ = rotate(&store, &options());
        disk.clear_faults();
        let (_, _, file) = store.create(&store.root(), b"since", 0o644, 0, None).unwrap();
        file.write(0, b"written after the error").unwrap();
        file.sync().unwrap();
        drop(file);
        let tree: Tree =
            tree.clone().into_iter().chain([("since".to_owned(), b"written after the error".to_vec())]).collect();
        let keys = &store.shared().keys;
        assert_eq!(Keys::open(&disk, &roots(&root)).unwrap().snapshot(), keys.snapshot(), "{what}");
        recovers(&disk.crash_power(n, PowerCut::Reorder { tear: false }), &root, &tree, &what);
        let report = rotate(&store, &options()).unwrap();
        assert_eq!((report.outcome, active(keys)), (Outcome::Complete, report.target), "{what}: {report:?}");
        assert_eq!(Keys::open(&disk, &roots(&root)).unwrap().snapshot(), keys.snapshot(), "{what}");
        drop(store);
        recovers(&disk, &root, &tree, &what);
    }
}

#[test]
fn the_power_can_go_after_every_operation() {
    for journal in [SimJournal::Ordered, SimJournal::None] {
        let (base, root) = (SimDisk::new(SimOptions { journal, ..SimOptions::default() }), Scripted::new("root"));
        init(&base, &root);
        let tree = fill(&open(base.clone(), &root));
        base.sync_all().unwrap();
        let length = run_length(&base, &root);
        for n in 0..=length {
            let stopped = stopped_after(&base, &root, n);
            for (seed, cut) in [(0, PowerCut::Lose), (n, PowerCut::Reorder { tear: true })] {
                let disk = stopped.crash_power(seed, cut);
                let what = format!("{journal:?} {cut:?} seed {seed} after {n} of {length}");
                recovers(&disk, &root, &tree, &what);
            }
        }
    }
}

/// Between two barriers the two slots of a header must not both be in flight: many seeds at the points that matter.
#[test]
fn torn_sectors_never_take_both_slots() {
    let (base, root, tree) = filled();
    let length = run_length(&base, &root);
    for n in (0..=length).step_by(3) {
        let stopped = stopped_after(&base, &root, n);
        for seed in 100..112 {
            let disk = stopped.crash_power(seed, PowerCut::Reorder { tear: true });
            assert_eq!(read_all(&open(disk, &root)), tree, "seed {seed} after {n} of {length}");
        }
    }
}

/// As above with enough headers in a batch that the barrier is one for the whole file system.
#[test]
fn the_power_can_go_around_a_barrier_for_everything() {
    for journal in [SimJournal::Ordered, SimJournal::None] {
        let (base, root) = (SimDisk::new(SimOptions { journal, ..SimOptions::default() }), Scripted::new("root"));
        init(&base, &root);
        let store = open(base.clone(), &root);
        (0..10).for_each(|i| write(&store, &format!("{i}"), &pattern(50, i)));
        store.close().unwrap();
        let tree = read_all(&store);
        base.sync_all().unwrap();
        let length = run_length(&base, &root);
        for n in 0..=length {
            let stopped = stopped_after(&base, &root, n);
            for seed in 0..3 {
                let cut = if seed == 0 { PowerCut::Lose } else { PowerCut::Reorder { tear: true } };
                let what = format!("{journal:?} {cut:?} seed {seed} after {n} of {length}");
                recovers(&stopped.crash_power(seed * 1000 + n, cut), &root, &tree, &what);
            }
        }
    }
}

/// Slots of all files with content that name `kek`, as the platter has them if the power goes now, and as memory has them.
fn moved(disk: &SimDisk, kek: KekId) -> Vec<(usize, usize)> {
    let platter = disk.crash_power(0, PowerCut::Lose);
    let of = |raw: Vec<u8>| raw.chunks(1024).take(2).filter(|s| s.starts_with(MAGIC) && s[128..144] == kek.0).count();
    disk.files().iter().map(|p| (of(platter.read_raw(p).unwrap()), of(disk.read_raw(p).unwrap()))).collect()
}

/// A second half is only written after the first is on disk, also of a batch that wrote its first halves while the barrier
/// of another was under way. (Which barrier counts for whom: `barrier::tests`.)
#[test]
fn batches_that_share_barriers_write_no_second_half_before_the_first_is_durable() {
    const EACH: usize = 10;
    let (disk, root) = (SimDisk::default(), Scripted::new("root"));
    init(&disk, &root);
    let store = open(disk.clone(), &root);
    let names: Vec<_> = (0..2 * EACH).map(|i| format!("{i}")).collect();
    names.iter().for_each(|n| write(&store, n, b"content"));
    store.close().unwrap();
    let control = Control::new();
    control.cancel();
    let ctx = Context { shared: store.shared(), moves: &*store };
    let target = run(&ctx, &one_job(), &(), &control).unwrap().target;

    let (control, failures) = (Control::new(), Failures::default());
    let full_speed = Options { full_speed: true, ..Options::default() };
    let turns = Turns::new(&full_speed, &control, &store.shared().load);
    let sweep = Sweep {
        shared: store.shared(),
        target: store.shared().keys.kek(target).unwrap(),
        control: &control,
        failures: &failures,
        again: false,
        turns: &turns,
        calls: 1,
        barrier: Barrier::default(),
        patience: Mutex::new(Patience::new(std::time::Duration::ZERO)),
        swept: Mutex::default(),
    };
    let root = disk.root().unwrap();
    let raw: Vec<_> = disk.files().into_iter().filter(|p| disk.read_raw(p).unwrap().starts_with(MAGIC)).collect();
    let mut items: Vec<_> = raw.iter().map(|p| Item::opened(Arc::new(disk.lookup(&root, p).unwrap()))).collect();
    assert_eq!(items.len(), 2 * EACH);
    let others = items.split_off(EACH);

    let (synced, first_synced) = channel();
    let batch_over = synced.clone();
    let (written, others_written) = channel();
    let others_written = Mutex::new(others_written);
    let (barriers, writes) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let second_too_early = Arc::new(AtomicUsize::new(0));
    let (looked, too_early) = (disk.clone(), second_too_early.clone());
    disk.set_hook(Some(Arc::new(move |moment| match moment {
        // The first halves of one batch are on disk; until it is told so, the other writes its own.
        Moment::Synced(Op::SyncAll) if barriers.fetch_add(1, Ordering::SeqCst) == 0 => {
            synced.send(()).unwrap();
            others_written.lock().recv().unwrap();
        }
        // Put back after each write.
        Moment::Before(Op::SetTimes) => {
            for (platter, memory) in moved(&looked, target) {
                too_early.fetch_add(usize::from(memory == 2 && platter == 0), Ordering::SeqCst);
            }
            if writes.fetch_add(1, Ordering::SeqCst) + 1 == 2 * EACH {
                written.send(()).unwrap();
            }
        }
        _ => {}
    })));
    std::thread::scope(|s| {
        let first = s.spawn(|| {
            let end = sweep.batch(items);
            // If there was no barrier at all, nobody has been told yet.
            let _ = batch_over.send(());
            end
        });
        first_synced.recv().unwrap();
        sweep.batch(others).unwrap();
        first.join().unwrap().unwrap();
    });
    disk.set_hook(None);
    assert_eq!(second_too_early.load(Ordering::SeqCst), 0);
    assert_eq!(sweep.swept.lock().counts.rewrapped, 2 * EACH as u64);
    assert!(moved(&disk, target).iter().filter(|(_, memory)| *memory == 2).count() == 2 * EACH);
}
