//! With others at work in the store.

use super::super::failures::Failures;
use super::super::moves::{Moved, Moves};
use super::super::pass::{Item, Pass, Visitor};
use super::*;
use crate::backing::posix::Posix;
use crate::backing::{RenameMode, SetTime, Timestamp};
use crate::store::SetAttr;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

fn on_disk() -> (tempfile::TempDir, Arc<Scripted>, Arc<Store<Posix>>) {
    let t = tempfile::tempdir().unwrap();
    let root = Scripted::new("root");
    let posix = Posix::open(t.path()).unwrap();
    init(&posix, &root);
    let store = open(posix, &root);
    (t, root, store)
}

/// KEKs named in any slot of any file below a real directory.
fn keks_below(path: &std::path::Path) -> BTreeSet<KekId> {
    let mut out = BTreeSet::new();
    for e in std::fs::read_dir(path).unwrap() {
        let e = e.unwrap();
        if e.file_type().unwrap().is_dir() {
            out.extend(keks_below(&e.path()));
        } else if e.file_type().unwrap().is_file() {
            let raw = std::fs::read(e.path()).unwrap();
            for slot in raw.chunks(1024).take(2).filter(|s| s.starts_with(MAGIC)) {
                out.insert(KekId(slot[128..144].try_into().unwrap()));
            }
        }
    }
    out
}

#[test]
fn users_times_and_modes_stay() {
    let (_t, _root, store) = on_disk();
    let tree = fill(&store);
    let at = |sec, nsec| SetTime::At(Timestamp { sec, nsec });
    let (node, _) = store.lookup(&store.root(), b"byte").unwrap();
    let set = SetAttr { mode: Some(0o6755), atime: at(1_000, 7), mtime: at(2_000, 9), ..SetAttr::default() };
    store.setattr(&node, &set, None).unwrap();
    let all = |store: &Arc<Store<Posix>>| -> Vec<_> {
        tree.keys()
            .map(|p| {
                let (parent, name) = split(p);
                let (_, a) = store.lookup(&dir(store, parent), name.as_bytes()).unwrap();
                (p.clone(), a.mode, a.atime, a.mtime, a.size)
            })
            .collect()
    };
    let before = all(&store);
    assert_eq!(before[0].1, 0o6755);
    for _ in 0..2 {
        assert_eq!(rotate(&store, &Options::default()).unwrap().outcome, Outcome::Complete);
        assert_eq!(all(&store), before);
    }
}

/// Writers, creators, truncaters and deleters during two rotations; every file ends as its last writer left it.
#[test]
fn others_go_on_working() {
    let (t, root, store) = on_disk();
    let stop = AtomicBool::new(false);
    for i in 0..4 {
        store.mkdir(&store.root(), format!("w{i}").as_bytes(), 0o755, 0, None).unwrap();
        for j in 0..40 {
            write(&store, &format!("w{i}/{j}"), &pattern(100 * j + 1, i));
        }
    }
    let reports = std::thread::scope(|s| {
        let (store, stop) = (&store, &stop);
        let workers: Vec<_> = (0..4u8)
            .map(|i| {
                s.spawn(move || {
                    let home = dir(store, &format!("w{i}"));
                    let mut want = Tree::new();
                    let mut round = 0usize;
                    while !stop.load(Ordering::Relaxed) || round < 200 {
                        round += 1;
                        let name = (round % 40).to_string();
                        let (node, _) = store.lookup(&home, name.as_bytes()).unwrap();
                        let data = pattern(1 + round % 9000, i);
                        match round % 4 {
                            0 => {
                                store.unlink(&home, name.as_bytes()).unwrap();
                                write(store, &format!("w{i}/{name}"), &data);
                            }
                            1 => {
                                let f = store.open_file(&node, Access::ReadWrite).unwrap();
                                f.set_len(0).unwrap();
                                f.write(0, &data).unwrap();
                            }
                            _ => {
                                let f = store.open_file(&node, Access::ReadWrite).unwrap();
                                f.write(0, &data).unwrap();
                                f.set_len(data.len() as u64).unwrap();
                            }
                        }
                        want.insert(format!("w{i}/{name}"), data);
                    }
                    want
                })
            })
            .collect();
        let reports: Vec<Report> = (0..2).map(|_| rotate(store, &Options::default()).unwrap()).collect();
        stop.store(true, Ordering::Relaxed);
        let mut want = Tree::new();
        workers.into_iter().for_each(|w| want.extend(w.join().unwrap()));
        (reports, want)
    });
    let (reports, want) = reports;
    assert!(reports.iter().all(|r| r.outcome == Outcome::Complete), "{reports:?}");
    let no_header = |r: &Report| r.sweep.no_header + r.verify.unwrap().no_header;
    assert!(reports.iter().all(|r| no_header(r) == 0), "a file that is being made has its header first: {reports:?}");
    store.close().unwrap();
    assert_eq!(keks_below(t.path()), BTreeSet::from([reports[1].target]));
    assert_eq!(read_all(&store), want);
    drop(store);
    assert_eq!(read_all(&open(Posix::open(t.path()).unwrap(), &root)), want);
}

/// Files and directories are renamed and linked all the time; the scan still comes to an end, and rightly.
#[test]
fn a_rename_storm_hides_nothing() {
    let (t, _root, store) = on_disk();
    for d in ["a", "m", "z"] {
        store.mkdir(&store.root(), d.as_bytes(), 0o755, 0, None).unwrap();
        for s in 0..4 {
            store.mkdir(&dir(&store, d), format!("{d}{s}").as_bytes(), 0o755, 0, None).unwrap();
            for f in 0..10 {
                write(&store, &format!("{d}/{d}{s}/{f}"), &pattern(10, f));
            }
        }
        for f in 0..60 {
            write(&store, &format!("{d}/{d}-{f}"), &pattern(f + 1, 3));
        }
    }
    let stop = AtomicBool::new(false);
    let reports: Vec<Report> = std::thread::scope(|s| {
        let (store, stop) = (&store, &stop);
        for (from, to) in [("a", "z"), ("z", "m"), ("m", "a")] {
            s.spawn(move || {
                let (from_dir, to_dir) = (dir(store, from), dir(store, to));
                let names: Vec<String> =
                    (0..60).map(|f| format!("{from}-{f}")).chain((0..4).map(|d| format!("{from}{d}"))).collect();
                while !stop.load(Ordering::Relaxed) {
                    for n in &names {
                        store.rename(&from_dir, n.as_bytes(), &to_dir, n.as_bytes(), RenameMode::NoReplace).unwrap();
                    }
                    for n in &names {
                        store.rename(&to_dir, n.as_bytes(), &from_dir, n.as_bytes(), RenameMode::NoReplace).unwrap();
                    }
                }
            });
        }
        let reports = (0..3).map(|_| rotate(store, &Options::default()).unwrap()).collect();
        stop.store(true, Ordering::Relaxed);
        reports
    });
    for r in &reports {
        assert_eq!(r.outcome, Outcome::Complete, "{r:?}");
    }
    assert_eq!(keks_below(t.path()), BTreeSet::from([reports[2].target]));
    assert_eq!(read_all(&store).len(), 3 * 100);
}

/// Sees what it is given, and lets something happen under the worker's nose, once.
struct Meanwhile<'a, F: Fn() + Sync> {
    disk: &'a SimDisk,
    act: F,
    acted: AtomicBool,
    seen: Mutex<BTreeSet<u64>>,
}

impl<F: Fn() + Sync> Visitor<SimDisk> for Meanwhile<'_, F> {
    fn batch(&self, items: Vec<Item<SimDisk>>) -> Result<(), Cancelled> {
        if !self.acted.swap(true, Ordering::Relaxed) {
            (self.act)();
        }
        for item in items {
            if let Ok(node) = item.node(self.disk) {
                self.seen.lock().insert(self.disk.stat(&node).unwrap().ino);
            }
        }
        Ok(())
    }
}

/// Inodes that a whole pass with one worker sees although `act` happens while it is at its first batch.
fn seen_while(disk: &SimDisk, moves: &dyn Moves<SimDisk>, act: impl Fn() + Sync) -> BTreeSet<u64> {
    let visitor = Meanwhile { disk, act, acted: AtomicBool::new(false), seen: Mutex::default() };
    let (control, failures) = (Control::new(), Failures::default());
    let pass =
        Pass { backing: disk, moves, control: &control, failures: &failures, workers: 1, gentle: true, share: None };
    assert!(pass.run(b"", &visitor, &mut |_| {}).unwrap().whole);
    assert_eq!(failures.take().total, 0);
    visitor.seen.into_inner()
}

#[test]
fn what_moves_across_the_walk_is_visited() {
    for listed in [true, false] {
        let (disk, root, tree) = filled();
        let store = open(disk.clone(), &root);
        let inode = |p: &String| {
            let (parent, name) = split(p);
            store.lookup(&dir(&store, parent), name.as_bytes()).unwrap().1.ino
        };
        let inodes: BTreeSet<u64> = tree.keys().map(inode).collect();
        assert_eq!(inodes.len(), 5);
        let moves: &dyn Moves<SimDisk> = if listed { &*store } else { &NoMoves };
        let seen = seen_while(&disk, moves, || {
            let (root, d, e) = (store.root(), dir(&store, "d"), dir(&store, "d/e"));
            let rename = |from, name: &[u8], to, new: &[u8]| {
                store.rename(from, name, to, new, RenameMode::NoReplace).unwrap();
            };
            rename(&d, b"block", &root, b"a");
            rename(&d, b"e", &root, b"0");
            let (byte, _) = store.lookup(&root, b"byte").unwrap();
            store.link(&byte, &e, b"third").unwrap();
            store.unlink(&root, b"byte").unwrap();
            store.unlink(&e, b"hard link").unwrap();
        });
        // Without the list, the file that was renamed is missed: the test can fail.
        assert_eq!(seen == inodes, listed);
    }
}

/// A run that gave way to users rested while they renamed; the list overflowed in every scan, and it never ended.
#[test]
fn renames_do_not_outrun_a_scan_whose_worker_rests() {
    const FILES: usize = 3000;
    let (disk, root, _) = filled();
    let store = open(disk.clone(), &root);
    for d in ["a", "z"] {
        store.mkdir(&store.root(), d.as_bytes(), 0o755, 0, None).unwrap();
    }
    let z = dir(&store, "z");
    for f in 0..FILES {
        store.create(&z, f.to_string().as_bytes(), 0o644, 0, None).unwrap();
    }
    // More than the list holds, all of them often.
    let seen = seen_while(&disk, &*store, || {
        let ends = [dir(&store, "z"), dir(&store, "a")];
        for round in 0..3 {
            for f in 0..FILES {
                let name = f.to_string();
                let (from, to) = (&ends[round % 2], &ends[(round + 1) % 2]);
                store.rename(from, name.as_bytes(), to, name.as_bytes(), RenameMode::NoReplace).unwrap();
            }
        }
    });
    assert!(seen.len() >= FILES + 5);
}

/// A list of moves that overflowed proves nothing.
struct Lossy;

impl<B: Backing> Moves<B> for Lossy {
    fn track(&self, _: bool) {}

    fn take(&self) -> Moved<B> {
        Moved { nodes: Vec::new(), lost: true }
    }
}

#[test]
fn a_scan_that_may_have_missed_something_is_no_proof() {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let old = active(&store.shared().keys);
    let ctx = Context { shared: store.shared(), moves: &Lossy };
    let report = run(&ctx, &one_job(), &(), &Control::new()).unwrap();
    assert_eq!((report.outcome, report.failures[0].code.as_str()), (Outcome::Incomplete, "not-settled"));
    assert_eq!(store.shared().keys.snapshot().kek(old).unwrap().unused, 0);
    assert_eq!(rotate(&store, &one_job()).unwrap().outcome, Outcome::Complete);
    assert_eq!(read_all(&store), tree);
}

#[test]
fn a_paused_run_waits_and_goes_on() {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let control = Control::new();
    struct Seen(Mutex<Vec<State>>, std::sync::mpsc::SyncSender<()>);
    impl Progress for Seen {
        fn update(&self, s: &Status) {
            let mut seen = self.0.lock();
            if seen.last() != Some(&s.state) {
                seen.push(s.state);
            }
            if s.paused && s.state == State::Sweeping {
                let _ = self.1.try_send(());
            }
        }
    }
    let (send, paused) = std::sync::mpsc::sync_channel(1);
    let seen = Seen(Mutex::default(), send);
    control.pause();
    let report = std::thread::scope(|s| {
        let running = s.spawn(|| run(&Context { shared: store.shared(), moves: &*store }, &one_job(), &seen, &control));
        paused.recv().unwrap();
        assert_eq!(keks_named(&disk).len(), 1, "nothing is moved while it waits");
        control.resume();
        running.join().unwrap().unwrap()
    });
    assert_eq!(report.outcome, Outcome::Complete);
    let states = [State::Staged, State::Sweeping, State::Verifying, State::Retiring, State::Done];
    assert_eq!(*seen.0.lock(), states);
    assert_eq!(read_all(&store), tree);
}
