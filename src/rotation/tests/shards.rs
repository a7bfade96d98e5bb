//! Runs that several shards share, on a simulated disk.

use super::*;
use crate::backing::sim::{Journal as SimJournal, PowerCut, SimOptions};
use crate::rotation::merge::merge;
use crate::store::dek_cache::{DekCache, DekCacheLimits};
use crate::store::shared::Shared;

fn shared(disk: &SimDisk, root: &Arc<Scripted>) -> Shared<SimDisk> {
    let keys = Keys::open(disk, &roots(root)).unwrap();
    Shared::new(disk.clone(), keys, DekCache::new(DekCacheLimits::default()), false)
}

fn ctx(shared: &Shared<SimDisk>) -> Context<'_, SimDisk> {
    Context { shared, moves: &NoMoves }
}

pub(super) fn begin_run(disk: &SimDisk, root: &Arc<Scripted>) -> KekId {
    match begin(&ctx(&shared(disk, root)), &one_job(), &(), &Control::new()).unwrap() {
        Begun::To(target) => target,
        other => panic!("{other:?}"),
    }
}

pub(super) fn run_shard(disk: &SimDisk, root: &Arc<Scripted>, shard: Shard) -> crate::store::Result<Report> {
    let keys = Keys::open(disk, &roots(root))?;
    let shared = Shared::new(disk.clone(), keys, DekCache::new(DekCacheLimits::default()), false);
    run(&ctx(&shared), &Options { shard: Some(shard), ..one_job() }, &(), &Control::new())
}

pub(super) fn merged(disk: &SimDisk, root: &Arc<Scripted>, reports: &[Report]) -> Report {
    merge(&ctx(&shared(disk, root)), reports).unwrap()
}

pub(super) fn shards(of: u32) -> Vec<Shard> {
    Shard::new(1, of).unwrap().all().collect()
}

#[test]
fn shards_move_each_file_once_and_the_merge_retires_the_old_kek() {
    for of in [1, 2, 3, 7] {
        let (disk, root, tree) = filled();
        let old = active(&shared(&disk, &root).keys);
        let target = begin_run(&disk, &root);
        assert_ne!(target, old);
        let reports: Vec<Report> = shards(of).into_iter().map(|s| run_shard(&disk, &root, s).unwrap()).collect();
        for r in &reports {
            assert_eq!((r.outcome, r.target, r.retired.len(), r.shares.len()), (Outcome::ShareComplete, target, 0, 1));
            assert_eq!((r.shares[0].listed, r.shares[0].own), (6, r.verify.unwrap().scanned), "{of}");
            assert!(shared(&disk, &root).keys.kek(old).is_ok());
        }
        assert_eq!(reports.iter().map(|r| r.sweep.rewrapped).sum::<u64>(), 4, "each header once");
        assert_eq!(keks_named(&disk), BTreeSet::from([target]));
        let all = merged(&disk, &root, &reports);
        assert_eq!((all.outcome, all.retired.as_slice()), (Outcome::Complete, &[old][..]));
        assert_eq!((all.verify.unwrap().current, all.shares.len()), (5, of as usize));
        assert!(!is_unfinished(&shared(&disk, &root).keys.snapshot()));
        assert_eq!(read_all(&open(disk.clone(), &root)), tree);
        // There is nothing to join or merge any more.
        assert!(run_shard(&disk, &root, shards(of)[0]).is_err());
        assert!(merge(&ctx(&shared(&disk, &root)), &reports).is_err());
    }
}

#[test]
fn a_missing_share_keeps_the_old_kek_and_a_rotation_alone_finishes() {
    let (disk, root, tree) = filled();
    let target = begin_run(&disk, &root);
    let report = run_shard(&disk, &root, shards(2)[0]).unwrap();
    let before = shared(&disk, &root).keys.snapshot();
    let short = merged(&disk, &root, &[report]);
    assert_eq!((short.outcome, short.failures_total), (Outcome::Incomplete, 1));
    assert_eq!((short.failures[0].path.as_str(), short.failures[0].code.as_str()), ("share 2/2", "share-missing"));
    assert_eq!(shared(&disk, &root).keys.snapshot(), before, "nothing was changed");
    let alone = rotate(&open(disk.clone(), &root), &one_job()).unwrap();
    assert_eq!((alone.outcome, alone.target, alone.resumed), (Outcome::Complete, target, true));
    assert_eq!(keks_named(&disk), BTreeSet::from([target]));
    assert_eq!(read_all(&open(disk, &root)), tree);
}

/// The scan is what a share proves by, not what it remembers of its sweep.
#[test]
fn an_old_backup_that_comes_back_between_shards_is_noticed() {
    let (disk, root, _) = filled();
    begin_run(&disk, &root);
    let first = run_shard(&disk, &root, shards(2)[0]).unwrap();
    // As cp makes it: a new inode.
    let node = disk.root().unwrap();
    disk.create(&node, b"restored", 0o600, 0).unwrap();
    let second = run_shard(&disk, &root, shards(2)[1]).unwrap();
    let all = merged(&disk, &root, &[first, second]);
    assert_eq!((all.outcome, all.failures[0].code.as_str()), (Outcome::Incomplete, "share-differs"));
    let reports: Vec<Report> = shards(2).into_iter().map(|s| run_shard(&disk, &root, s).unwrap()).collect();
    assert_eq!(merged(&disk, &root, &reports).outcome, Outcome::Complete);
}

#[test]
fn a_shard_does_not_touch_the_keyring_or_another_shards_files() {
    let (disk, root, _) = filled();
    begin_run(&disk, &root);
    let ring = |d: &SimDisk| ["keyring.a", "keyring.b"].map(|n| d.read_raw(format!(".envelopefs/{n}")).unwrap());
    let (rings, before) = (ring(&disk), keks_named(&disk));
    let none = shards(2).into_iter().map(|s| run_shard(&disk.crash_process(), &root, s).unwrap().sweep.rewrapped);
    assert_eq!(none.sum::<u64>(), 4);
    assert_eq!((ring(&disk), keks_named(&disk)), (rings, before));
}

#[test]
fn a_shard_can_be_killed_or_lose_power_after_every_operation() {
    let (base, root) = (SimDisk::new(SimOptions::default()), Scripted::new("root"));
    init(&base, &root);
    let tree = fill(&open(base.clone(), &root));
    let target = begin_run(&base, &root);
    base.sync_all().unwrap();
    let moved = |s: &Shard| run_shard(&base.crash_process(), &root, *s).unwrap().sweep.rewrapped;
    // The one with more to do.
    let one = shards(2).into_iter().max_by_key(moved).unwrap();
    let length = {
        let d = base.crash_process();
        let before = d.operations();
        assert!(run_shard(&d, &root, one).unwrap().sweep.rewrapped >= 2);
        d.operations() - before
    };
    assert!(length > 10, "{length}");
    for n in 0..=length {
        for cut in [None, Some(PowerCut::Lose), Some(PowerCut::Reorder { tear: true })] {
            let d = base.crash_process();
            d.stop_after(d.operations() + n);
            // Whatever it says; it may even be done.
            let _ = run_shard(&d, &root, one);
            let d = cut.map_or_else(|| d.crash_process(), |cut| d.crash_power(n, cut));
            let what = format!("{cut:?} after {n} of {length}");
            assert_eq!(read_all(&open(d.clone(), &root)), tree, "{what}");
            let reports: Vec<Report> = shards(2).into_iter().map(|s| run_shard(&d, &root, s).unwrap()).collect();
            assert_eq!(merged(&d, &root, &reports).outcome, Outcome::Complete, "{what}: {reports:?}");
            assert_eq!(keks_named(&d), BTreeSet::from([target]), "{what}");
            assert_eq!(read_all(&open(d, &root)), tree, "{what}, after");
        }
    }
}

/// After any stop, either the old KEK is not given up yet, and the merge can be run again to its end, or all is done.
#[test]
fn a_merge_can_be_killed_or_lose_power_after_every_operation() {
    for journal in [SimJournal::Ordered, SimJournal::None] {
        let (base, root) = (SimDisk::new(SimOptions { journal, ..SimOptions::default() }), Scripted::new("root"));
        init(&base, &root);
        let tree = fill(&open(base.clone(), &root));
        let old = active(&shared(&base, &root).keys);
        let target = begin_run(&base, &root);
        let reports: Vec<Report> = shards(2).into_iter().map(|s| run_shard(&base, &root, s).unwrap()).collect();
        // What an earlier rotation left out, which the merge takes away.
        let sealed = SealedReport::new(&reports[0], &sealed::seal_key(shared(&base, &root).keys.secret()));
        exceptions::keep(&base, &sealed).unwrap();
        base.sync_all().unwrap();
        let length = {
            let d = base.crash_process();
            let before = d.operations();
            assert_eq!(merged(&d, &root, &reports).outcome, Outcome::Complete);
            d.operations() - before
        };
        assert!(length > 5, "{length}");
        let (mut not_yet, mut done) = (0, 0);
        for n in 0..=length {
            for cut in [None, Some(PowerCut::Lose), Some(PowerCut::Reorder { tear: true })] {
                let d = base.crash_process();
                d.stop_after(d.operations() + n);
                let said = Keys::open(&d, &roots(&root)).and_then(|keys| {
                    let shared = Shared::new(d.clone(), keys, DekCache::new(DekCacheLimits::default()), false);
                    merge(&ctx(&shared), &reports)
                });
                let d = cut.map_or_else(|| d.crash_process(), |cut| d.crash_power(n, cut));
                let what = format!("{journal:?} {cut:?} after {n} of {length}");
                assert_eq!(read_all(&open(d.clone(), &root)), tree, "{what}");
                let ring = shared(&d, &root).keys.snapshot();
                assert_eq!(ring.active().unwrap().id, target, "{what}");
                if is_unfinished(&ring) {
                    assert!(said.is_err(), "{what}: what was said to be done is done");
                    not_yet += 1;
                    assert_eq!(merged(&d, &root, &reports).retired, [old], "{what}");
                } else {
                    done += 1;
                    assert!(merge(&ctx(&shared(&d, &root)), &reports).is_err(), "{what}: there is nothing to merge");
                }
                let ring = shared(&d, &root).keys.snapshot();
                assert!(!is_unfinished(&ring) && ring.kek(old).unwrap().unused != 0, "{what}");
                assert!(exceptions::read(&d).unwrap().is_none(), "{what}");
                assert_eq!(read_all(&open(d, &root)), tree, "{what}, after");
            }
        }
        assert!(not_yet > 0 && done > 0, "{not_yet} {done}");
    }
}

#[test]
fn a_cursor_of_a_shard_that_lies_only_costs_another_sweep() {
    use super::super::journal::Journal;
    let (disk, root, _) = filled();
    let target = begin_run(&disk, &root);
    for s in shards(2) {
        let shared = shared(&disk, &root);
        Journal::open(&disk, &shared.keys, Some(s)).note(State::Sweeping, target, 1, 0, b"zzzz");
    }
    let reports: Vec<Report> = shards(2).into_iter().map(|s| run_shard(&disk, &root, s).unwrap()).collect();
    assert!(reports.iter().any(|r| r.passes == 4), "{reports:?}");
    assert_eq!(merged(&disk, &root, &reports).outcome, Outcome::Complete);
    assert_eq!(keks_named(&disk), BTreeSet::from([target]));
}

/// A share in which anything vanishes proves nothing; this is there, and nobody's.
#[test]
fn a_file_of_another_program_under_a_reserved_name_keeps_no_share_from_being_done() {
    let (disk, root, tree) = filled();
    let node = disk.root().unwrap();
    disk.create(&node, b".envelopefs.other", 0o600, 0).unwrap();
    disk.write_raw(".envelopefs.other", 0, &[b'x'; 8192]).unwrap();
    begin_run(&disk, &root);
    let reports: Vec<Report> = shards(2).into_iter().map(|s| run_shard(&disk, &root, s).unwrap()).collect();
    assert_eq!(reports.iter().map(|r| r.shares[0].own).sum::<u64>(), 7);
    let all = merged(&disk, &root, &reports);
    let seen = all.verify.unwrap();
    assert_eq!((all.outcome, seen.scanned, seen.vanished), (Outcome::Complete, 6, 0));
    assert_eq!(read_all(&open(disk, &root)), tree);
}

/// What shards found out under one keyring says nothing once another one was in force: files may have come to be under the
/// old KEK since.
#[test]
fn reports_of_shards_do_not_outlive_the_keyring_they_were_made_under() {
    let (disk, root, mut tree) = filled();
    let put_back = |copy: &[u8]| Keys::import(&disk, copy, &roots(&root), true, shares::forget).unwrap().keys;
    let before = Keys::export(&disk).unwrap().bytes;
    let target = begin_run(&disk, &root);
    for s in shards(2) {
        let report = run_shard(&disk, &root, s).unwrap();
        let key = crate::rotation::sealed::seal_key(shared(&disk, &root).keys.secret());
        shares::put_report(&disk, s, SealedReport::new(&report, &key).to_file().as_bytes()).unwrap();
    }
    let during = Keys::export(&disk).unwrap().bytes;
    assert_eq!((shares::reports(&disk).unwrap().len(), shares::noted(&disk).unwrap().len()), (2, 2));
    drop(put_back(&before));
    let store = open(disk.clone(), &root);
    let (_, _, file) = store.create(&store.root(), b"since", 0o644, 0, None).unwrap();
    file.write(0, b"under the old KEK").unwrap();
    drop(file);
    store.close().unwrap();
    drop(store);
    let keys = put_back(&during);
    assert!(is_unfinished(&keys.snapshot()) && active(&keys) == target);
    drop(keys);
    assert_eq!((shares::reports(&disk).unwrap(), shares::noted(&disk).unwrap()), (Vec::new(), Vec::new()));
    assert_eq!(last_noted(&disk, None).unwrap(), None, "nor does a rotation alone go on where it had got to");
    let alone = rotate(&open(disk.clone(), &root), &one_job()).unwrap();
    assert_eq!((alone.outcome, alone.target, alone.resumed), (Outcome::Complete, target, true));
    assert_eq!(keks_named(&disk), BTreeSet::from([target]));
    tree.insert("since".into(), b"under the old KEK".to_vec());
    assert_eq!(read_all(&open(disk, &root)), tree);
}
