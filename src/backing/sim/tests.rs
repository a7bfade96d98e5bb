//! Each promise of the simulated disk.

use super::*;

#[test]
fn a_stopped_disk_leaves_what_was_written() {
    let disk = SimDisk::default();
    let root = disk.root().unwrap();
    let (_, file) = disk.create(&root, b"f", 0o600, 0).unwrap();
    disk.write_at(&file, b"one", 0).unwrap();
    assert_eq!(disk.operations(), 2);
    disk.stop_after(3);
    disk.write_at(&file, b"two", 3).unwrap();
    assert!(is_stopped(&disk.write_at(&file, b"three", 6).unwrap_err()));
    assert!(is_stopped(&disk.stat(&root).unwrap_err()));
    let after = disk.crash_process();
    assert_eq!(after.read_raw("f").unwrap(), b"onetwo");
    assert_eq!((after.operations(), after.is_stopped()), (0, false));
    // The handles died with the process.
    assert_eq!(after.stat(&root).unwrap_err().raw_os_error(), Some(libc::EBADF));
}

const CUTS: [PowerCut; 3] = [PowerCut::Lose, PowerCut::Reorder { tear: false }, PowerCut::Reorder { tear: true }];
const SEEDS: std::ops::Range<u64> = 0..200;

fn disk(journal: Journal) -> (SimDisk, SimNode) {
    let disk = SimDisk::new(SimOptions { journal, ..SimOptions::default() });
    let root = disk.root().unwrap();
    (disk, root)
}

fn make(disk: &SimDisk, name: &[u8], content: &[u8]) -> SimFile {
    let (_, file) = disk.create(&disk.root().unwrap(), name, 0o600, 0).unwrap();
    disk.write_at(&file, content, 0).unwrap();
    file
}

fn names(disk: &SimDisk) -> Vec<String> {
    disk.paths().into_iter().map(|(path, _)| String::from_utf8(path).unwrap()).collect()
}

fn page(byte: u8) -> Vec<u8> {
    vec![byte; PAGE_LEN]
}

#[test]
fn what_is_synced_survives_every_power_cut() {
    for journal in [Journal::Ordered, Journal::None] {
        let (disk, root) = disk(journal);
        let file = make(&disk, b"f", &[7; 10_000]);
        disk.sync_file(&file).unwrap();
        disk.sync_dir(&root).unwrap();
        for cut in CUTS {
            for seed in SEEDS {
                assert_eq!(disk.crash_power(seed, cut).read_raw("f").unwrap(), [7; 10_000]);
            }
        }
    }
}

#[test]
fn a_file_sync_forces_its_name_only_with_an_ordered_journal() {
    for (journal, named) in [(Journal::Ordered, true), (Journal::None, false)] {
        let (disk, _) = disk(journal);
        let file = make(&disk, b"f", b"x");
        disk.sync_file(&file).unwrap();
        assert_eq!(disk.crash_power(0, PowerCut::Lose).read_raw("f").is_ok(), named);
        if !named {
            // Where the name happens to get there, so is the content.
            let kept = SEEDS.filter_map(|s| disk.crash_power(s, CUTS[1]).read_raw("f").ok()).collect::<Vec<_>>();
            assert!(!kept.is_empty() && kept.len() < SEEDS.count() && kept.iter().all(|content| content == b"x"));
        }
    }
}

#[test]
fn each_unsynced_page_is_old_or_new() {
    let (disk, _) = disk(Journal::Ordered);
    let file = make(&disk, b"f", &[page(1), page(1)].concat());
    disk.sync_file(&file).unwrap();
    disk.write_at(&file, &[page(2), page(2)].concat(), 0).unwrap();
    assert_eq!(disk.crash_power(0, PowerCut::Lose).read_raw("f").unwrap(), [page(1), page(1)].concat());
    let mut seen = std::collections::BTreeSet::new();
    for seed in SEEDS {
        let content = disk.crash_power(seed, PowerCut::Reorder { tear: false }).read_raw("f").unwrap();
        let (one, two) = content.split_at(PAGE_LEN);
        assert!([page(1), page(2)].contains(&one.to_vec()) && [page(1), page(2)].contains(&two.to_vec()));
        seen.insert((one[0], two[0]));
    }
    assert_eq!(seen.len(), 4);
    disk.sync_file(&file).unwrap();
    assert_eq!(disk.crash_power(0, PowerCut::Lose).read_raw("f").unwrap(), [page(2), page(2)].concat());
}

#[test]
fn a_torn_page_is_made_of_whole_sectors() {
    let (disk, _) = disk(Journal::Ordered);
    let file = make(&disk, b"f", &page(1));
    disk.sync_file(&file).unwrap();
    disk.write_at(&file, &page(2), 0).unwrap();
    let mut torn = 0;
    for seed in SEEDS {
        let content = disk.crash_power(seed, PowerCut::Reorder { tear: true }).read_raw("f").unwrap();
        let sectors: Vec<&[u8]> = content.chunks(512).collect();
        assert!(sectors.iter().all(|s| s.iter().all(|b| *b == s[0]) && [1, 2].contains(&s[0])));
        torn += u64::from(sectors.iter().any(|s| s[0] != content[0]));
    }
    assert!(torn > 10);
}

#[test]
fn a_grown_file_may_have_zeros_where_nothing_got_there() {
    let (disk, _) = disk(Journal::Ordered);
    make(&disk, b"f", &page(9));
    let mut seen = std::collections::BTreeSet::new();
    for seed in SEEDS {
        let after = disk.crash_power(seed, PowerCut::Reorder { tear: false });
        seen.insert(after.read_raw("f").ok().map(|content| (content.len(), content.first().copied())));
    }
    let all = [None, Some((0, None)), Some((PAGE_LEN, Some(0))), Some((PAGE_LEN, Some(9)))];
    assert_eq!(seen, all.into());
}

#[test]
fn what_a_truncation_gave_up_never_comes_back_beside_what_followed() {
    let (disk, _) = disk(Journal::Ordered);
    let file = make(&disk, b"f", &[page(1), page(1)].concat());
    disk.sync_file(&file).unwrap();
    disk.truncate(&file, 0).unwrap();
    disk.write_at(&file, &[page(2), page(2)].concat(), 0).unwrap();
    for cut in CUTS {
        for seed in SEEDS {
            let content = disk.crash_power(seed, cut).read_raw("f").unwrap();
            assert!(!(content.contains(&1) && content.contains(&2)), "{seed} {cut:?}");
        }
    }
}

#[test]
fn a_cut_end_reads_as_zeros_when_the_file_grows_again() {
    let (disk, _) = disk(Journal::Ordered);
    let file = make(&disk, b"f", &page(1));
    disk.sync_file(&file).unwrap();
    disk.truncate(&file, 100).unwrap();
    disk.truncate(&file, 200).unwrap();
    for seed in SEEDS {
        let content = disk.crash_power(seed, PowerCut::Reorder { tear: true }).read_raw("f").unwrap();
        match content.len() {
            PAGE_LEN => assert_eq!(content, page(1)),
            100 => assert_eq!(content, [1; 100]),
            200 => assert_eq!(content, [[1; 100], [0; 100]].concat()),
            other => panic!("length {other}"),
        }
    }
}

#[test]
fn an_ordered_journal_keeps_a_prefix() {
    let (disk, root) = disk(Journal::Ordered);
    let mut lengths = std::collections::BTreeSet::new();
    for name in b'a'..=b'h' {
        disk.mkdir(&root, &[name], 0o700, 0).unwrap();
        if name == b'c' {
            disk.sync_dir(&root).unwrap();
        }
    }
    assert_eq!(names(&disk.crash_power(0, PowerCut::Lose)), ["a", "b", "c"]);
    for seed in SEEDS {
        let names = names(&disk.crash_power(seed, PowerCut::Reorder { tear: false }));
        assert_eq!(names.concat(), "abcdefgh"[..names.len()]);
        lengths.insert(names.len());
    }
    assert_eq!(lengths, (3..=8).collect());
}

#[test]
fn without_a_journal_any_operation_may_be_missing() {
    let (disk, root) = disk(Journal::None);
    for name in [b"d", b"e"] {
        disk.mkdir(&root, name, 0o700, 0).unwrap();
    }
    disk.sync_dir(&root).unwrap();
    let dirs = [disk.lookup(&root, b"d").unwrap(), disk.lookup(&root, b"e").unwrap()];
    for dir in &dirs {
        disk.mkdir(dir, b"1", 0o700, 0).unwrap();
        disk.mkdir(dir, b"2", 0o700, 0).unwrap();
    }
    disk.sync_dir(&dirs[1]).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for seed in SEEDS {
        let names = names(&disk.crash_power(seed, PowerCut::Reorder { tear: false }));
        assert!(names.contains(&"e/1".to_owned()) && names.contains(&"e/2".to_owned()));
        seen.insert((names.contains(&"d/1".to_owned()), names.contains(&"d/2".to_owned())));
    }
    assert_eq!(seen.len(), 4);
}

#[test]
fn a_rename_is_there_or_not() {
    for journal in [Journal::Ordered, Journal::None] {
        let (disk, root) = disk(journal);
        for (name, content) in [(b"f", b"old"), (b"t", b"new")] {
            let file = make(&disk, name, content);
            disk.sync_file(&file).unwrap();
        }
        disk.sync_dir(&root).unwrap();
        disk.rename(&root, b"t", &root, b"f", RenameMode::Replace).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for seed in SEEDS {
            let after = disk.crash_power(seed, PowerCut::Reorder { tear: true });
            seen.insert((after.read_raw("f").unwrap(), after.read_raw("t").is_ok()));
        }
        assert_eq!(seen, [(b"new".to_vec(), false), (b"old".to_vec(), true)].into());
    }
}

#[test]
fn everything_synced_is_everything_kept() {
    for journal in [Journal::Ordered, Journal::None] {
        let (disk, root) = disk(journal);
        make(&disk, b"f", b"content");
        disk.symlink(&root, b"s", b"target").unwrap();
        disk.set_xattr(&root, b"user.x", b"y", XattrMode::Any).unwrap();
        disk.set_mode(&disk.lookup(&root, b"f").unwrap(), 0o4711).unwrap();
        disk.sync_all().unwrap();
        let after = disk.crash_power(3, PowerCut::Lose);
        let root = after.root().unwrap();
        assert_eq!(after.read_raw("f").unwrap(), b"content");
        assert_eq!(after.stat_at(&root, b"f").unwrap().mode, 0o4711);
        assert_eq!(after.readlink(&after.lookup(&root, b"s").unwrap()).unwrap(), b"target");
        assert_eq!(after.get_xattr(&root, b"user.x").unwrap(), b"y");
    }
}

#[test]
fn the_write_under_way_is_done_up_to_a_page() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in SEEDS {
        let disk = SimDisk::new(SimOptions { seed, split_last_write: true, ..SimOptions::default() });
        let file = make(&disk, b"f", &[1; 3 * PAGE_LEN]);
        disk.stop_after(disk.operations());
        assert!(is_stopped(&disk.write_at(&file, &[2; 2 * PAGE_LEN + 50], 100).unwrap_err()));
        let content = disk.crash_process().read_raw("f").unwrap();
        let done = content.iter().filter(|b| **b == 2).count();
        assert_eq!(content[..100], [1; 100]);
        assert_eq!(content[100..100 + done], vec![2; done]);
        seen.insert(done);
    }
    let whole = 2 * PAGE_LEN + 50;
    assert_eq!(seen, [0, PAGE_LEN - 100, 2 * PAGE_LEN - 100, whole].into());
}

#[test]
fn a_full_disk_takes_what_fits_and_gives_it_back() {
    let disk = SimDisk::new(SimOptions { capacity: Some(3 * 4096), ..SimOptions::default() });
    let root = disk.root().unwrap();
    let file = make(&disk, b"f", b"");
    let full = disk.write_at(&file, &[1; 4 * PAGE_LEN], 0).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!((disk.stat_file(&file).unwrap().size, disk.stat_fs().unwrap().bfree), (3 * 4096, 0));
    disk.write_at(&file, &[2; PAGE_LEN], 4096).unwrap();
    assert_eq!(disk.mkdir(&root, b"d", 0o700, 0).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    disk.unlink(&root, b"f").unwrap();
    assert_eq!(disk.stat_fs().unwrap().bfree, 0);
    drop(file);
    assert_eq!(disk.stat_fs().unwrap().bfree, 3);
    // Not committed yet: a power cut may still bring the file back.
    assert!((0..200).any(|seed| disk.crash_power(seed, CUTS[1]).read_raw("f").is_ok()));
    disk.sync_all().unwrap();
    assert!((0..200).all(|seed| disk.crash_power(seed, CUTS[1]).read_raw("f").is_err()));
}

#[test]
fn an_unlinked_file_lives_as_long_as_its_handles() {
    let (disk, root) = disk(Journal::Ordered);
    let file = make(&disk, b"f", b"still here");
    disk.unlink(&root, b"f").unwrap();
    disk.sync_all().unwrap();
    let mut buf = [0; 10];
    assert_eq!(super::super::read_into(&disk, &file, &mut buf, 0).unwrap(), 10);
    assert_eq!((&buf, disk.stat_file(&file).unwrap().nlink), (b"still here", 0));
    assert_eq!(disk.crash_process().paths(), []);
}

#[test]
fn chosen_operations_fail() {
    let (disk, root) = disk(Journal::Ordered);
    let file = make(&disk, b"f", b"x");
    disk.fail_next(Some(Op::SyncFile), 1, libc::EIO);
    disk.sync_file(&file).unwrap();
    disk.write_at(&file, b"y", 0).unwrap();
    assert_eq!(disk.sync_file(&file).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(disk.crash_power(0, PowerCut::Lose).read_raw("f").unwrap(), b"x");
    disk.sync_file(&file).unwrap();
    disk.fail_from(None, 1, libc::EROFS);
    disk.write_at(&file, b"z", 0).unwrap();
    assert_eq!(disk.truncate(&file, 0).unwrap_err().raw_os_error(), Some(libc::EROFS));
    assert_eq!(disk.unlink(&root, b"f").unwrap_err().raw_os_error(), Some(libc::EROFS));
    assert_eq!(disk.stat_file(&file).unwrap().size, 1);
    disk.clear_faults();
    disk.unlink(&root, b"f").unwrap();
}

#[test]
fn an_operation_can_be_done_and_told_as_failed() {
    let (disk, root) = disk(Journal::Ordered);
    let file = make(&disk, b"f", b"x");
    let fails = |r: io::Result<()>| assert_eq!(r.unwrap_err().raw_os_error(), Some(libc::EIO));
    let late = |op| disk.fail_next_late(Some(op), 0, libc::EIO);
    late(Op::Write);
    fails(disk.write_at(&file, b"y", 0));
    late(Op::SyncFile);
    fails(disk.sync_file(&file));
    late(Op::Rename);
    fails(disk.rename(&root, b"f", &root, b"g", RenameMode::Replace));
    late(Op::SyncDir);
    fails(disk.sync_dir(&root));
    assert_eq!(disk.crash_power(0, PowerCut::Lose).read_raw("g").unwrap(), b"y");
    late(Op::Unlink);
    fails(disk.unlink(&root, b"g"));
    late(Op::Create);
    fails(disk.create(&root, b"h", 0o600, 0).map(drop));
    assert_eq!(disk.paths().into_iter().map(|(p, _)| p).collect::<Vec<_>>(), [b"h"]);
    // Others fail before.
    late(Op::Truncate);
    fails(disk.truncate(&file, 0));
    assert_eq!(disk.stat_file(&file).unwrap().size, 1);
}

#[test]
fn the_same_seed_gives_the_same_disk() {
    let (disk, _) = disk(Journal::Ordered);
    let files: Vec<_> = (b'a'..b'k').map(|name| make(&disk, &[name], &page(name))).collect();
    disk.sync_file(&files[3]).unwrap();
    let all = |d: &SimDisk| d.files().iter().map(|f| (f.clone(), d.read_raw(f).unwrap())).collect::<Vec<_>>();
    for seed in SEEDS {
        let cut = PowerCut::Reorder { tear: true };
        let once = disk.crash_power(seed, cut);
        assert_eq!(all(&once), all(&disk.crash_power(seed, cut)));
        // What is left after a power cut is on the platter.
        assert_eq!(all(&once), all(&once.crash_power(seed + 1, cut)));
    }
}

#[test]
fn tampering_is_exact_and_durable() {
    let (disk, _) = disk(Journal::Ordered);
    let file = make(&disk, b"f", &[0; 5000]);
    drop(make(&disk, b"g", b"0123456789"));
    disk.sync_all().unwrap();
    disk.flip_bit("f", 4500, 3).unwrap();
    disk.copy_raw("g", 2, "f", 4998, 4).unwrap();
    assert!(disk.flip_bit("f", 5002, 0).is_err() && disk.flip_bit("f", 0, 8).is_err());
    let mut expected = vec![0; 4998];
    expected[4500] = 8;
    expected.extend(b"2345");
    assert_eq!(disk.crash_power(0, PowerCut::Lose).read_raw("f").unwrap(), expected);
    let mut buf = vec![1; 6000];
    assert_eq!(super::super::read_into(&disk, &file, &mut buf, 0).unwrap(), 5002);
    assert_eq!(buf[..5002], expected);
    disk.truncate_raw("f", 1).unwrap();
    disk.replace_raw("g", b"new").unwrap();
    let after = disk.crash_power(0, PowerCut::Lose);
    assert_eq!((after.read_raw("f").unwrap(), after.read_raw("g").unwrap()), (vec![0], b"new".to_vec()));
}

#[test]
fn a_default_acl_takes_the_place_of_the_umask() {
    let (disk, root) = disk(Journal::Ordered);
    disk.set_xattr(&root, b"system.posix_acl_default", b"acl", XattrMode::Any).unwrap();
    disk.mkdir(&root, b"d", 0o777, 0o077).unwrap();
    let dir = disk.lookup(&root, b"d").unwrap();
    assert_eq!(disk.stat(&dir).unwrap().mode, 0o777);
    assert_eq!(disk.get_xattr(&dir, b"system.posix_acl_default").unwrap(), b"acl");
}

#[test]
fn a_hole_across_the_end_takes_the_last_page_whole() {
    let (disk, _) = disk(Journal::Ordered);
    let file = make(&disk, b"f", &[]);
    disk.write_at(&file, &[1; 16], 4 * 4096).unwrap();
    disk.allocate(&file, Allocate::PunchHole, 3 * 4096, 4096 + 10).unwrap();
    assert_eq!(disk.next_data(&file, 0).unwrap(), Some(4 * 4096));
    disk.allocate(&file, Allocate::PunchHole, 3 * 4096, 4096 + 20).unwrap();
    assert_eq!((disk.next_data(&file, 0).unwrap(), disk.stat_file(&file).unwrap().blocks), (None, 0));
    assert_eq!(disk.read_raw("f").unwrap(), vec![0; 4 * 4096 + 16]);
}

#[test]
fn a_hook_sees_every_operation_and_may_work_on_the_disk_itself() {
    let (disk, root) = disk(Journal::Ordered);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (log, own) = (Arc::clone(&seen), disk.clone());
    disk.set_hook(Some(Arc::new(move |moment| {
        let Some(mut seen) = log.try_lock() else { return };
        seen.push(moment);
        if moment == Moment::Before(Op::Write) {
            make(&own, b"g", b"in between");
        }
    })));
    let file = make(&disk, b"f", b"x");
    disk.sync_file(&file).unwrap();
    disk.set_hook(None);
    disk.stat(&root).unwrap();
    let want = [Moment::Before(Op::Create), Moment::Before(Op::Write), Moment::Before(Op::SyncFile)];
    let synced = Moment::Synced(Op::SyncFile);
    assert_eq!(*seen.lock(), [&want[..], &[synced]].concat());
    assert_eq!(names(&disk), ["f", "g"]);
    assert!(!disk.crash_process().is_stopped());
}
