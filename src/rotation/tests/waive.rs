//! What may fail: the run is complete without it, says so, and loses nothing that somebody may still need.

use super::super::{exceptions, sealed};
use super::destroy::{destroy, has_wraps};
use super::*;
use crate::backing::sim::{Op, PowerCut};
use crate::format::keyring::KekState;
use crate::kms::KmsError;
use crate::kms::scripted::Behaviour;

fn waiving<'a>(paths: impl IntoIterator<Item = &'a str>) -> Options {
    Options { waive: Arc::new(Waivers::new(paths).unwrap()), ..one_job() }
}

fn text(path: &[u8]) -> &str {
    std::str::from_utf8(path).unwrap()
}

fn is_unused<B: Backing>(store: &Arc<Store<B>>, id: KekId) -> bool {
    store.shared().keys.snapshot().kek(id).unwrap().unused != 0
}

/// Neither slot of it can be read any more; nobody will ever know which KEK they named.
fn spoil(disk: &SimDisk, path: &[u8]) {
    disk.write_raw(path, 0, &[0x55; 2048]).unwrap();
}

/// Both slots are whole, and the wrapped DEK in them does not open.
fn forge(disk: &SimDisk, path: &[u8]) {
    let mut slot = slots(disk, path).a.unwrap();
    slot.wrapped[30] ^= 1;
    [0, 1024].iter().for_each(|at| disk.write_raw(path, *at, &slot.encode()).unwrap());
}

#[test]
fn with_what_fails_waived_the_run_is_complete_and_says_what_it_left_out() {
    let (disk, root, tree) = filled();
    let path = content_files(&disk).remove(0);
    let saved = disk.read_raw(&path).unwrap();
    spoil(&disk, &path);
    let store = open(disk.clone(), &root);
    let old = active(&store.shared().keys);
    assert_eq!(rotate(&store, &one_job()).unwrap().outcome, Outcome::Incomplete);
    assert_eq!(exceptions::read(&disk).unwrap(), None);
    let report = rotate(&store, &waiving([text(&path)])).unwrap();
    assert!(report.is_done());
    assert_eq!((report.outcome, report.failures_total, report.failures.len()), (Outcome::Complete, 0, 0));
    let waived = &report.waived[0];
    assert_eq!((report.waived.len(), waived.path.as_bytes(), waived.code.as_str()), (1, &path[..], "header-magic"));
    assert!(waived.message.contains("not an envelopefs file") && !waived.directory);
    assert_eq!((report.waivers_unused.len(), report.verify.unwrap().failed), (0, 1));
    assert_eq!(report.retired, [old]);
    assert!(is_unused(&store, old) && !is_unfinished(&store.shared().keys.snapshot()));
    // In the store, too, sealed.
    let kept = exceptions::read(&disk).unwrap().unwrap();
    assert_eq!((&kept.waived, &kept.retired, kept.target), (&report.waived, &report.retired, report.target));
    let file = disk.read_raw(exceptions::PATH).unwrap();
    let (_, seal) = SealedReport::from_file(&file).unwrap();
    assert!(sealed::seal_key(store.shared().keys.secret()).is_genuine(&seal));
    // A later one that needs no waiver proves everything.
    disk.write_raw(&path, 0, &saved[..2048]).unwrap();
    let after = rotate(&store, &one_job()).unwrap();
    assert_eq!((after.outcome, after.waived.len()), (Outcome::Complete, 0));
    assert_eq!(exceptions::read(&disk).unwrap(), None);
    assert_eq!(keks_named(&disk), BTreeSet::from([after.target]));
    assert_eq!(read_all(&open(disk, &root)), tree);
}

#[test]
fn a_waiver_is_no_skip_and_one_that_was_not_needed_is_told() {
    let (disk, root, tree) = filled();
    let paths = content_files(&disk);
    let store = open(disk.clone(), &root);
    let waivers = waiving(paths.iter().map(|p| text(p)).chain(["no/such/file", "*"]));
    let report = rotate(&store, &waivers).unwrap();
    assert_eq!((report.outcome, report.waived.len()), (Outcome::Complete, 0));
    assert_eq!(keks_named(&disk), BTreeSet::from([report.target]), "all of them were moved");
    assert_eq!(report.waivers_unused, waivers.waive.paths().collect::<Vec<_>>());
    assert_eq!(exceptions::read(&disk).unwrap(), None);
    assert_eq!(read_all(&store), tree);
    // A run that did not look at everything does not know.
    let control = Control::new();
    control.cancel();
    let ctx = Context { shared: store.shared(), moves: &*store };
    let report = run(&ctx, &waivers, &(), &control).unwrap();
    assert_eq!((report.outcome, report.waivers_unused.len()), (Outcome::Cancelled, 0));
}

#[test]
fn a_waiver_is_for_one_path_only() {
    let (disk, root, _) = filled();
    let paths = content_files(&disk);
    paths.iter().take(2).for_each(|p| spoil(&disk, p));
    let store = open(disk.clone(), &root);
    let old = active(&store.shared().keys);
    // A pattern, and the directory that one of them lies in.
    let below = disk.paths().into_iter().find(|(p, kind)| *kind == Kind::Dir && !p.starts_with(b".")).unwrap().0;
    let report = rotate(&store, &waiving(["*", text(&below), text(&paths[0])])).unwrap();
    assert_eq!((report.outcome, report.failures_total, report.waived.len()), (Outcome::Incomplete, 1, 1));
    assert_eq!((report.failures[0].path.as_bytes(), report.waived[0].path.as_bytes()), (&paths[1][..], &paths[0][..]));
    assert!(!is_unused(&store, old) && report.retired.is_empty());
    assert_eq!(exceptions::read(&disk).unwrap(), None, "it is not complete");
    let report = rotate(&store, &waiving(paths.iter().take(2).map(|p| text(p)))).unwrap();
    assert_eq!((report.outcome, report.waived.len()), (Outcome::Complete, 2));
}

#[test]
fn a_dry_run_tells_which_waivers_would_be_needed() {
    let (disk, root, _) = filled();
    let path = content_files(&disk).remove(0);
    spoil(&disk, &path);
    let store = open(disk.clone(), &root);
    let before = disk.operations();
    let report = rotate(&store, &Options { dry_run: true, ..waiving([text(&path), "other"]) }).unwrap();
    assert_eq!(
        (report.failures_total, report.waived.len(), &report.waivers_unused[..]),
        (0, 1, &["other".to_owned()][..])
    );
    assert_eq!(disk.operations(), before);
}

#[test]
fn a_kek_that_a_waived_header_names_is_not_destroyed() {
    let (disk, root, _) = filled();
    let path = content_files(&disk).remove(0);
    let whole = disk.read_raw(&path).unwrap()[..2048].to_vec();
    let store = open(disk.clone(), &root);
    let older = active(&store.shared().keys);
    rotate(&store, &one_job()).unwrap();
    let old = active(&store.shared().keys);
    let moved = disk.read_raw(&path).unwrap()[..2048].to_vec();
    forge(&disk, &path);
    let report = rotate(&store, &Options { destroy_old: true, ..waiving([text(&path)]) }).unwrap();
    assert_eq!((report.outcome, report.waived[0].code.as_str()), (Outcome::Complete, "wrap-auth"), "{report:?}");
    assert_eq!((report.headers_by_kek[&old], report.headers_by_kek[&report.target]), (1, 4));
    assert_eq!((&report.destroyed[..], &report.kept[..]), (&[older][..], &[old][..]), "only the one it does not name");
    assert!(has_wraps(&disk, old) && is_unused(&store, old));
    // Nor does anything else destroy it.
    let why = destroy(&store, old).unwrap_err().to_string();
    assert!(why.contains("1 header needs it"), "{why}");
    // It is put right from a copy: moved, and then the KEK may go.
    disk.write_raw(&path, 0, &moved).unwrap();
    let report = rotate(&store, &Options { destroy_old: true, ..one_job() }).unwrap();
    assert_eq!((report.outcome, report.kept.len()), (Outcome::Complete, 0));
    assert!(report.destroyed.contains(&old) && !has_wraps(&disk, old));
    assert_ne!(whole, moved);
}

#[test]
fn a_header_that_is_gone_for_good_keeps_no_kek() {
    let (disk, root, _) = filled();
    let path = content_files(&disk).remove(0);
    spoil(&disk, &path);
    let store = open(disk.clone(), &root);
    let old = active(&store.shared().keys);
    let report = rotate(&store, &Options { destroy_old: true, ..waiving([text(&path)]) }).unwrap();
    assert_eq!((&report.destroyed[..], report.kept.len(), report.waived.len()), (&[old][..], 0, 1));
    assert!(!has_wraps(&disk, old));
}

/// A newer program's header may name any KEK, and so may what could not be read just now.
#[test]
fn what_cannot_say_which_kek_it_needs_keeps_all_of_them() {
    let newer = |disk: &SimDisk, path: &[u8]| {
        let mut slot = disk.read_raw(path).unwrap()[..1024].to_vec();
        slot[8] = 2;
        let crc = crc32c::crc32c(&slot[..1020]);
        slot[1020..].copy_from_slice(&crc.to_le_bytes());
        [0, 1024].iter().for_each(|at| disk.write_raw(path, *at, &slot).unwrap());
    };
    let faults = [None, Some((Op::Open, libc::EIO)), Some((Op::Read, libc::EIO))];
    for fault in faults {
        let (disk, root, _) = filled();
        let path = content_files(&disk).remove(0);
        let store = open(disk.clone(), &root);
        let old = active(&store.shared().keys);
        let failing = |s: &Status| match (s.state, fault) {
            (State::Sweeping | State::Verifying, Some((op, errno))) => disk.fail_next(Some(op), 0, errno),
            _ => disk.clear_faults(),
        };
        if fault.is_none() {
            newer(&disk, &path);
        }
        let first = rotate_with(&store, &one_job(), failing).unwrap();
        let failed: BTreeSet<&str> = first.failures.iter().map(|f| f.path.as_str()).collect();
        assert_eq!((first.outcome, failed.len()), (Outcome::Incomplete, 1), "{fault:?}: {first:?}");
        // The file at which it will happen again: none is moved twice.
        let again = Options { destroy_old: true, restart: true, ..waiving(failed) };
        let report = rotate_with(&store, &again, failing).unwrap();
        assert_eq!((report.outcome, report.waived.len()), (Outcome::Complete, 1), "{fault:?}: {report:?}");
        assert_eq!((report.destroyed.len(), report.kept.len()), (0, 2), "{fault:?}");
        assert!(report.kept.contains(&old) && has_wraps(&disk, old));
    }
}

#[test]
fn a_directory_that_cannot_be_listed_can_be_waived_and_keeps_all_keks() {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let old = active(&store.shared().keys);
    // The third listing of a pass is that of d, after the pool and the root.
    let deny = |s: &Status| match s.state {
        State::Sweeping | State::Verifying => disk.fail_next(Some(Op::ReadDir), 2, libc::EACCES),
        _ => disk.clear_faults(),
    };
    let first = rotate_with(&store, &one_job(), deny).unwrap();
    let path = first.failures[0].path.clone();
    assert_eq!((first.outcome, first.failures_total), (Outcome::Incomplete, 1));
    let report = rotate_with(&store, &Options { destroy_old: true, ..waiving([path.as_str()]) }, deny).unwrap();
    assert_eq!(report.outcome, Outcome::Complete, "{report:?}");
    let said = report.waived[0].in_words();
    assert!(said.starts_with(&path) && said.ends_with("(EACCES); nothing below it was looked at"), "{said}");
    assert_eq!((report.destroyed.len(), &report.kept[..]), (0, &[old][..]), "what is below may need it");
    assert!(keks_named(&disk).contains(&old));
    assert_eq!(read_all(&open(disk.clone(), &root)), tree, "and opens with it");
    let why = destroy(&store, old).unwrap_err().to_string();
    assert!(why.contains("needs it") || why.contains("need it"), "{why}");
    // Listed again: everything is moved, and the KEK goes.
    let report = rotate(&store, &Options { destroy_old: true, ..one_job() }).unwrap();
    assert!(report.destroyed.contains(&old));
    assert_eq!(read_all(&open(disk, &root)), tree);
}

#[test]
fn a_file_that_its_key_service_denies_can_be_waived_and_stays_under_its_kek() {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let external = |waive: Options| Options { kek: Some(KekKind::External), restart: true, ..waive };
    rotate(&store, &external(one_job())).unwrap();
    let old = active(&store.shared().keys);
    let path = content_files(&disk).remove(0);
    let id = slots(&disk, &path).a.unwrap().file.0;
    root.about(id, Behaviour::Fail(KmsError::Denied("not this one".into())));
    let report = rotate(&store, &Options { destroy_old: true, ..external(waiving([text(&path)])) }).unwrap();
    assert_eq!((report.outcome, report.waived[0].code.as_str()), (Outcome::Complete, "kms-denied"), "{report:?}");
    assert!(report.waived[0].message.contains("not this one"));
    assert!(report.kept.contains(&old) && !report.destroyed.contains(&old));
    assert_eq!(keks_named(&disk), BTreeSet::from([old, report.target]));
    root.about(id, Behaviour::Obey);
    assert_eq!(read_all(&open(disk, &root)), tree);
}

/// What is wrong with the whole run is nobody's to waive.
#[test]
fn a_barrier_that_fails_is_not_waived() {
    let (disk, root, _) = filled();
    let store = open(disk.clone(), &root);
    let old = active(&store.shared().keys);
    disk.fail_from(Some(Op::SyncAll), 0, libc::EIO);
    let report =
        rotate(&store, &waiving(disk.files().iter().map(|p| text(p)).filter(|p| !p.starts_with('.')))).unwrap();
    assert_eq!((report.outcome, report.failures[0].path.as_str()), (Outcome::Incomplete, "/"), "{report:?}");
    assert!(!is_unused(&store, old));
}

/// What it left out is durable before anything says that the old KEK is not needed any more; cut off anywhere, the next
/// run with the same list is complete.
#[test]
fn a_run_with_a_waiver_can_be_cut_off_after_every_operation() {
    let (base, root, mut tree) = filled();
    let path = content_files(&base).remove(0);
    let store = open(base.clone(), &root);
    let old = active(&store.shared().keys);
    let lost = tree.keys().find(|p| backing_path(&store, p) == path).unwrap().clone();
    drop(store);
    tree.remove(&lost).unwrap();
    forge(&base, &path);
    base.sync_all().unwrap();
    let options = Options { destroy_old: true, ..waiving([text(&path)]) };
    for n in 0.. {
        let disk = base.crash_process();
        let store = open(disk.clone(), &root);
        disk.stop_after(disk.operations() + n);
        let done = rotate(&store, &options).is_ok_and(|r| r.outcome == Outcome::Complete) && !disk.is_stopped();
        for cut in [disk.crash_process(), disk.crash_power(n, PowerCut::Reorder { tear: true })] {
            let marked = Keys::read_keyring(&cut).unwrap().kek(old).is_some_and(|k| k.unused != 0);
            let kept = exceptions::read(&cut).unwrap();
            assert!(!marked || kept.is_some_and(|r| r.waived[0].path.as_bytes() == path), "after {n}");
            let store = open(cut.clone(), &root);
            let report = rotate(&store, &options).unwrap();
            assert_eq!((report.outcome, report.waived.len()), (Outcome::Complete, 1), "after {n}: {report:?}");
            assert!(report.kept.contains(&old), "after {n}");
            let ring = store.shared().keys.snapshot();
            assert!(ring.kek(old).is_some_and(|k| k.state == KekState::Retired && !k.wraps.is_empty()), "after {n}");
            all_but_the_lost_file_opens(&cut, &root, &tree, &lost, n);
        }
        if done {
            assert!(n > 50, "{n}");
            return;
        }
    }
}

/// The backing path of a file of [`fill`].
fn backing_path(store: &Arc<Store<SimDisk>>, path: &str) -> Vec<u8> {
    let disk = &store.shared().backing;
    let (parent, name) = split(path);
    let (node, _) = store.lookup(&dir(store, parent), name.as_bytes()).unwrap();
    let ino = store.getattr(&node).unwrap().ino;
    disk.files().into_iter().find(|p| inode_of(disk, p) == ino).unwrap_or_default()
}

fn inode_of(disk: &SimDisk, path: &[u8]) -> u64 {
    let root = disk.root().unwrap();
    let node = path.split(|b| *b == b'/').fold(root, |at, name| disk.lookup(&at, name).unwrap());
    disk.stat(&node).unwrap().ino
}

/// Everything but the file whose DEK is lost can be read.
fn all_but_the_lost_file_opens(disk: &SimDisk, root: &Arc<Scripted>, tree: &Tree, lost: &str, n: u64) {
    let store = open(disk.clone(), root);
    for (path, data) in tree {
        let (parent, name) = split(path);
        let (node, _) = store.lookup(&dir(&store, parent), name.as_bytes()).unwrap();
        assert_eq!(read(&store, &node).unwrap(), *data, "after {n}: {path}");
    }
    let (parent, name) = split(lost);
    let (node, _) = store.lookup(&dir(&store, parent), name.as_bytes()).unwrap();
    assert!(read(&store, &node).is_err());
}
