//! A new DEK under a file that is in use, stopped anywhere, on a full disk, and with other things going on.

use super::*;
use crate::backing::sim::{Journal, Moment, Op, PowerCut};
use crate::backing::{Access, RenameMode, SetTime, Timestamp, XattrMode};
use crate::crypto::kdf;
use crate::format::damage::Damage;
use crate::format::geometry;
use crate::format::header::Slot;
use crate::format::ids::FileId;
use crate::format::names::STORE_DIR;
use crate::store::file::{FileAllocate, OpenFile};
use crate::store::header::{Source, open_dek, read_slots, wrap_slot};
use crate::store::rekey::{Name, REKEY_DIR, Rekeyed, is_interrupted};
use crate::store::{Result, SetAttr, StoreError};
use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

const NOTHING: &dyn Fn(u64) -> Result<()> = &|_| Ok(());

fn name_of<B: Backing>(s: &Store<B>, name: &[u8]) -> Name<B> {
    s.name_of(&s.root(), name).unwrap()
}

fn make<B: Backing>(s: &Store<B>, name: &[u8], content: &[u8]) -> (Arc<Node<B>>, OpenFile<B>) {
    let (n, _, f) = s.create(&s.root(), name, 0o640, 0, None).unwrap();
    if !content.is_empty() {
        f.write(0, content).unwrap();
    }
    (n, f)
}

fn make_in<B: Backing>(s: &Store<B>, dir: &Arc<Node<B>>, name: &[u8]) {
    s.create(dir, name, 0o640, 0, None).unwrap().2.write(0, b"new").unwrap();
}

fn read<B: Backing>(s: &Store<B>, dir: &Arc<Node<B>>, name: &[u8]) -> Vec<u8> {
    let (n, attr) = s.lookup(dir, name).unwrap();
    let mut buf = vec![0xee; attr.size as usize + 1];
    let len = s.open_file(&n, Access::Read).unwrap().read(0, &mut buf).unwrap();
    buf.truncate(len);
    buf
}

fn id_of<B: Backing>(s: &Store<B>, n: &Arc<Node<B>>) -> FileId {
    s.open_file(n, Access::Read).unwrap().core().file_id().unwrap()
}

/// How many files lie in the folder.
fn left_over<B: Backing>(b: &B) -> usize {
    let own = b.lookup(&b.root().unwrap(), STORE_DIR).unwrap();
    b.lookup(&own, REKEY_DIR).map_or(0, |f| b.read_dir(&f).unwrap().len())
}

/// Bytes that differ from block to block.
fn content(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 7 + i / 4096 * 13) as u8 ^ seed).collect()
}

on_each_backing!(everything_but_the_key_stays, open_handles_go_on, changes_while_it_is_copied, all_names_move);

mod bodies {
    use super::*;
    use crate::store::tests::Open;

    pub fn everything_but_the_key_stays<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let want = content(700_000, 1);
        let (n, f) = make(&s, &long(b'n'), &want);
        f.allocate(FileAllocate::PunchHole, 200_704, 40_960).unwrap();
        let mut want = want;
        want[200_704..241_664].fill(0);
        drop(f);
        s.set_xattr(&n, b"user.colour", b"green", XattrMode::Any).unwrap();
        let t = |sec| SetTime::At(Timestamp { sec, nsec: 123_456_789 });
        let set = SetAttr { mode: Some(0o2604), atime: t(1000), mtime: t(2000), ..SetAttr::default() };
        let before = s.setattr(&n, &set, None).unwrap();
        let dir_before = s.getattr(&s.root()).unwrap();
        let (old, number) = (id_of(&s, &n), n.number());
        let copied = Cell::new(0);
        let step = |bytes| {
            copied.set(copied.get() + bytes);
            Ok(())
        };
        let done = s.rekey(&name_of(&s, &long(b'n')), &step).unwrap();
        let Rekeyed::Done { from, file, bytes, .. } = done else { panic!("{done:?}") };
        assert_eq!((from, bytes, copied.get()), (old, 700_000, 700_000));
        assert_ne!(file, old);
        let after = s.getattr(&n).unwrap();
        let seen = |a: &crate::store::Attr| (a.mode, a.nlink, a.uid, a.gid, a.size, a.atime, a.mtime);
        assert_eq!(seen(&after), seen(&before));
        assert_ne!(after.ino, before.ino);
        assert_eq!(n.number(), number, "who knows the node knows it by its number");
        assert_eq!(s.getattr(&s.root()).unwrap().mtime, dir_before.mtime);
        assert_eq!(read(&s, &s.root(), &long(b'n')), want);
        assert_eq!(left_over(s.backing()), 0);
        drop(n);
        s.close().unwrap();
        drop(s);
        let s = open(None);
        assert_eq!(read(&s, &s.root(), &long(b'n')), want);
        let (n, _) = s.lookup(&s.root(), &long(b'n')).unwrap();
        assert_eq!(id_of(&s, &n), file);
        assert_eq!(s.get_xattr(&n, b"user.colour").unwrap(), b"green");
        let f = s.open_file(&n, Access::Read).unwrap();
        assert!(f.core().is_clean().unwrap());
        assert_eq!((f.seek(200_704, true).unwrap(), f.seek(0, false).unwrap()), (241_664, 200_704), "a hole is a hole");
    }

    pub fn open_handles_go_on<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let (n, writer) = make(&s, b"f", &content(300_000, 2));
        let reader = s.open_file(&n, Access::Read).unwrap();
        let mut want = content(300_000, 2);
        for round in 0..3 {
            let old = id_of(&s, &n);
            assert!(matches!(s.rekey(&name_of(&s, b"f"), NOTHING).unwrap(), Rekeyed::Done { from, .. } if from == old));
            let (at, data) = (round * 90_000, content(70_000, 77 + round as u8));
            writer.write(at as u64, &data).unwrap();
            want[at..at + 70_000].copy_from_slice(&data);
            let mut buf = vec![0; 300_000];
            assert_eq!(reader.read(0, &mut buf).unwrap(), 300_000);
            assert!(buf == want, "round {round}");
        }
        writer.set_len(123_456).unwrap();
        want.truncate(123_456);
        s.set_xattr(&n, b"user.x", b"y", XattrMode::Any).unwrap();
        s.link(&n, &s.root(), b"g").unwrap();
        s.sync_file(&n, &writer).unwrap();
        drop((writer, reader, n));
        s.close().unwrap();
        drop(s);
        let s = open(None);
        assert!(read(&s, &s.root(), b"f") == want && read(&s, &s.root(), b"g") == want);
        let (n, attr) = s.lookup(&s.root(), b"f").unwrap();
        assert_eq!((attr.nlink, s.get_xattr(&n, b"user.x").unwrap()), (2, b"y".to_vec()));
    }

    /// Between any two stretches of the copy somebody writes, cuts, grows, punches, and empties the file.
    pub fn changes_while_it_is_copied<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        for seed in 0..12u64 {
            let name = [b'a' + seed as u8];
            let mut want = content(1_500_000, seed as u8);
            let (n, f) = make(&s, &name, &want);
            let model = parking_lot::Mutex::new(&mut want);
            let rng = Cell::new(seed * 7919 + 1);
            let below = |n: u64| {
                rng.set(rng.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407));
                (rng.get() >> 33) % n
            };
            let left = Cell::new(40);
            let change = |_| {
                if left.replace(left.get() - 1) <= 0 {
                    return Ok(());
                }
                let mut want = model.lock();
                let at = below(1_600_000) as usize;
                match below(8) {
                    0 => {
                        f.set_len(at as u64)?;
                        want.resize(at, 0);
                    }
                    // Emptied over and over, it would be begun anew too often.
                    1 if seed % 3 == 0 && left.get() > 25 => {
                        f.set_len(0)?;
                        want.clear();
                    }
                    2 if !want.is_empty() => {
                        let len = 1 + below(300_000);
                        f.allocate(FileAllocate::PunchHole, at as u64, len)?;
                        let end = want.len().min(at + len as usize);
                        if at < end {
                            want[at..end].fill(0);
                        }
                    }
                    _ => {
                        let data = content(1 + below(200_000) as usize, at as u8);
                        f.write(at as u64, &data)?;
                        let end = at + data.len();
                        if want.len() < end {
                            want.resize(end, 0);
                        }
                        want[at..end].copy_from_slice(&data);
                    }
                }
                Ok(())
            };
            let done = s.rekey(&name_of(&s, &name), &change).unwrap();
            assert!(matches!(done, Rekeyed::Done { .. } | Rekeyed::Empty), "{done:?}");
            assert!(left.get() < 40, "something changed meanwhile");
            drop((f, n));
            assert!(read(&s, &s.root(), &name) == want, "seed {seed}");
        }
        s.close().unwrap();
        assert_eq!(left_over(s.backing()), 0);
    }

    pub fn all_names_move<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let (d, _) = s.mkdir(&s.root(), b"d", 0o755, 0, None).unwrap();
        let (n, f) = make(&s, b"one", b"content");
        s.link(&n, &d, &long(b'2')).unwrap();
        s.link(&n, &s.root(), b"three").unwrap();
        assert_eq!(s.rekey(&name_of(&s, b"one"), NOTHING).unwrap(), Rekeyed::Linked);
        let names = |n: &Arc<Node<B>>| s.names_of(&[n.key()], NOTHING).unwrap().remove(&n.key()).unwrap();
        let all = names(&n);
        assert_eq!(all.len(), 3);
        assert_eq!(s.rekey_all(&all[..2], NOTHING).unwrap(), Rekeyed::Linked);
        // One more while it is copied.
        let late = Cell::new(false);
        let link = |_| if late.replace(true) { Ok(()) } else { s.link(&n, &d, b"late").map(drop) };
        assert_eq!(s.rekey_all(&all, &link).unwrap(), Rekeyed::Linked);
        let all = names(&n);
        assert!(matches!(s.rekey_all(&all, NOTHING).unwrap(), Rekeyed::Done { .. }));
        assert_eq!(left_over(s.backing()), 0);
        f.write(0, b"CON").unwrap();
        for (dir, name) in [(s.root(), b"one".to_vec()), (d, long(b'2')), (s.root(), b"three".to_vec())] {
            assert_eq!(read(&s, &dir, &name), b"CONtent");
            let (again, attr) = s.lookup(&dir, &name).unwrap();
            assert!(Arc::ptr_eq(&again, &n));
            assert_eq!(attr.nlink, 4);
        }
    }
}

/// A file of which nothing is known to be left: what its number was may be another's, and the two are told apart.
#[test]
fn a_number_that_is_still_shown_is_given_to_no_other_node() {
    let (disk, s) = new_sim();
    let (n, f) = make(&s, b"f", b"content");
    drop(f);
    let number = n.number().unwrap();
    assert!(matches!(s.rekey(&name_of(&s, b"f"), NOTHING).unwrap(), Rekeyed::Done { .. }));
    let taken = crate::backing::Stat { ino: number, ..disk.stat(&*n.fd(&disk).unwrap()).unwrap() };
    let other = s.table.adopt(&taken, None, None);
    assert_eq!((other.number(), n.number()), (None, Some(number)));
    assert_ne!(other.id(), n.id());
    drop((n, other));
    assert_eq!(s.table.adopt(&taken, None, None).number(), Some(number), "free again with the node");
    // A node whose new inode has the number that users know is kept from nobody.
    let n = s.lookup(&s.root(), b"f").unwrap().0;
    let (number, fd) = (n.number().unwrap(), n.fd(&disk).unwrap());
    s.table.replace(&n, number + 1000, Arc::clone(&fd));
    assert!(s.renumbered(taken.dev, number + 1000).is_some());
    s.table.replace(&n, number, fd);
    assert!(s.renumbered(taken.dev, number).is_none());
}

/// The folder may inherit an ACL, and what is made in it, too.
#[test]
fn no_acl_comes_to_a_file_that_had_none() {
    const ACL: [u8; 28] =
        [2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 4, 0, 5, 0, 255, 255, 255, 255, 32, 0, 5, 0, 255, 255, 255, 255];
    let disk = SimDisk::default();
    disk.set_xattr(&disk.root().unwrap(), b"system.posix_acl_default", &ACL, XattrMode::Any).unwrap();
    Store::init(&disk, &root_keys(), KekKind::Sealed, ENCRYPTED).unwrap();
    let s = open(disk.clone());
    let (n, f) = make(&s, b"f", b"content");
    drop(f);
    let _ = s.remove_xattr(&n, b"system.posix_acl_access");
    s.setattr(&n, &SetAttr { mode: Some(0o601), ..SetAttr::default() }, None).unwrap();
    let before = (disk.list_xattr(&n.fd(&disk).unwrap()).unwrap(), s.getattr(&n).unwrap().mode);
    assert!(matches!(s.rekey(&name_of(&s, b"f"), NOTHING).unwrap(), Rekeyed::Done { .. }));
    assert_eq!((disk.list_xattr(&n.fd(&disk).unwrap()).unwrap(), s.getattr(&n).unwrap().mode), before);
    s.set_xattr(&n, b"system.posix_acl_access", &ACL, XattrMode::Any).unwrap();
    let mode = s.getattr(&n).unwrap().mode;
    assert!(matches!(s.rekey(&name_of(&s, b"f"), NOTHING).unwrap(), Rekeyed::Done { .. }));
    assert_eq!(s.get_xattr(&n, b"system.posix_acl_access").unwrap(), ACL);
    assert_eq!(s.getattr(&n).unwrap().mode, mode);
}

#[test]
fn what_has_no_key_is_left_alone() {
    let (_, s) = new_sim();
    make(&s, b"empty", b"");
    s.mkdir(&s.root(), b"d", 0o755, 0, None).unwrap();
    assert_eq!(s.rekey(&name_of(&s, b"empty"), NOTHING).unwrap(), Rekeyed::Empty);
    assert_eq!(s.rekey(&name_of(&s, b"d"), NOTHING).unwrap(), Rekeyed::Gone);
    assert_eq!(s.rekey(&name_of(&s, b"none"), NOTHING).unwrap(), Rekeyed::Gone);
}

/// A store with one file under a long name and under two more names, which were closed and made durable.
fn base(linked: bool, journal: Journal) -> SimDisk {
    let disk = SimDisk::new(SimOptions { journal, ..SimOptions::default() });
    Store::init(&disk, &root_keys(), KekKind::Sealed, ENCRYPTED).unwrap();
    let s = open(disk.clone());
    let (n, f) = make(&s, &long(b'f'), &content(140_000, 3));
    drop(f);
    if linked {
        let (d, _) = s.mkdir(&s.root(), b"d", 0o755, 0, None).unwrap();
        s.link(&n, &d, b"g").unwrap();
        s.link(&n, &s.root(), b"h").unwrap();
    }
    s.close().unwrap();
    disk
}

fn rekey_everything(s: &Store<SimDisk>) -> Result<Rekeyed> {
    let (n, _) = s.lookup(&s.root(), &long(b'f'))?;
    let names = s.names_of(&[n.key()], NOTHING)?.remove(&n.key()).unwrap_or_default();
    s.rekey_all(&names, NOTHING)
}

/// The file is whole under each of its names, which are one file's; nothing is left over once it was opened for writing.
fn all_is_well(disk: &SimDisk, linked: bool, what: &str) -> FileId {
    let want = content(140_000, 3);
    // Any reader, also one that may finish nothing.
    let ro = open_with(disk.crash_process(), StoreOptions { read_only: true, ..Default::default() });
    assert!(read(&ro, &ro.root(), &long(b'f')) == want, "{what}");
    let s = open(disk.crash_process());
    assert_eq!(left_over(s.backing()), 0, "{what}");
    let (n, attr) = s.lookup(&s.root(), &long(b'f')).unwrap();
    assert!(read(&s, &s.root(), &long(b'f')) == want, "{what}");
    if linked {
        assert!(read(&ro, &ro.root(), b"h") == want, "{what}");
        assert!(read(&ro, &ro.lookup(&ro.root(), b"d").unwrap().0, b"g") == want, "{what}");
        assert_eq!(attr.nlink, 3, "{what}");
        let d = s.lookup(&s.root(), b"d").unwrap().0;
        for (dir, name) in [(&d, b"g"), (&s.root(), b"h")] {
            assert!(Arc::ptr_eq(&s.lookup(dir, name).unwrap().0, &n), "{what}");
        }
    }
    id_of(&s, &n)
}

#[test]
fn stopped_anywhere_the_file_is_whole() {
    for linked in [false, true] {
        for journal in [Journal::Ordered, Journal::None] {
            let base = base(linked, journal);
            let old = all_is_well(&base, linked, "before");
            let mut n = 0;
            loop {
                let disk = base.crash_process();
                let s = open(disk.clone());
                disk.stop_after(disk.operations() + n);
                let done = rekey_everything(&s);
                let stopped = disk.is_stopped();
                drop(s);
                let what = format!("linked {linked}, {journal:?}, after {n}: {done:?}");
                let left = all_is_well(&disk, linked, &what);
                if let Ok(Rekeyed::Done { file, .. }) = done {
                    assert_eq!(left, file, "{what}");
                }
                for seed in 0..4 {
                    for cut in [PowerCut::Lose, PowerCut::Reorder { tear: true }] {
                        let what = format!("{what}, power cut {seed} {cut:?}");
                        let left = all_is_well(&disk.crash_power(seed, cut), linked, &what);
                        match &done {
                            Ok(Rekeyed::Done { file, .. }) => assert_eq!(left, *file, "acknowledged: {what}"),
                            _ if n == 0 => assert_eq!(left, old, "{what}"),
                            _ => {}
                        }
                    }
                }
                if !stopped {
                    assert!(matches!(done, Ok(Rekeyed::Done { .. })), "{what}");
                    break;
                }
                n += 1;
            }
            assert!(n > 10, "{n} operations");
        }
    }
}

/// Stopped between two names, and then written to by a program that does not know what the folder is for: two files.
#[test]
fn a_name_that_was_written_to_since_is_not_replaced() {
    let base = base(true, Journal::Ordered);
    let mut split = 0;
    for n in 0.. {
        let disk = base.crash_process();
        let s = open(disk.clone());
        disk.stop_after(disk.operations() + n);
        let _ = rekey_everything(&s);
        let stopped = disk.is_stopped();
        drop(s);
        let left = disk.crash_process();
        let o = StoreOptions { read_only: true, ..StoreOptions::default() };
        let ro = open_with(left.crash_process(), o);
        let ino = |s: &Store<SimDisk>, name: &[u8]| s.lookup(&s.root(), name).unwrap().1.ino;
        let (f, h) = (ino(&ro, &long(b'f')), ino(&ro, b"h"));
        if f != h {
            split += 1;
            assert!(is_interrupted(&left).unwrap());
            // Another mode alone is a change, too.
            let other = left.crash_process();
            let old = name_of(&ro, &if f < h { long(b'f') } else { b"h".to_vec() }).name;
            other.set_mode(&other.lookup(&other.root().unwrap(), &old).unwrap(), 0o604).unwrap();
            let s = open(other.clone());
            assert_ne!(ino(&s, &long(b'f')), ino(&s, b"h"));
            assert!(!is_interrupted(&other).unwrap());
            // Whichever is the old one: the higher number is that of the new inode.
            let old = if f < h { long(b'f') } else { b"h".to_vec() };
            let name = name_of(&ro, &old).name;
            let node = left.lookup(&left.root().unwrap(), &name).unwrap();
            left.set_times(&node, SetTime::Omit, SetTime::At(Timestamp { sec: 77, nsec: 0 })).unwrap();
            let s = open(left.clone());
            assert_ne!(ino(&s, &long(b'f')), ino(&s, b"h"));
            assert_eq!(s.getattr(&s.lookup(&s.root(), &old).unwrap().0).unwrap().mtime.sec, 77);
            assert_eq!(left_over(&left), 0);
            // One that cannot be looked at keeps the store from being opened.
            let bad = disk.crash_process();
            let keys = Keys::open(&bad, &root_keys()).unwrap();
            bad.fail_from(Some(Op::Link), 0, libc::EIO);
            assert!(Store::open(bad.clone(), keys, StoreOptions::default()).is_err());
        }
        if !stopped {
            break;
        }
    }
    assert!(split > 0, "it was stopped between two names");
}

/// Stopped before the first name was moved, and the copy's header has suffered: the old file stays.
#[test]
fn a_copy_that_does_not_open_takes_nobodys_place() {
    let base = base(true, Journal::Ordered);
    let mut spoilt = 0;
    for n in 0.. {
        let disk = base.crash_process();
        let s = open(disk.clone());
        let old = id_of(&s, &s.lookup(&s.root(), &long(b'f')).unwrap().0);
        disk.stop_after(disk.operations() + n);
        let _ = rekey_everything(&s);
        let stopped = disk.is_stopped();
        drop(s);
        let left = disk.crash_process();
        let own = left.lookup(&left.root().unwrap(), STORE_DIR).unwrap();
        let marker = left.lookup(&own, REKEY_DIR).and_then(|f| {
            let name = left.read_dir(&f)?.into_iter().map(|e| e.name).find(|n| n.starts_with(b"linked."));
            name.map(|n| left.lookup(&f, &n)).transpose()
        });
        let untouched = {
            let ro = open_with(left.crash_process(), StoreOptions { read_only: true, ..StoreOptions::default() });
            let (root, d) = (ro.root(), ro.lookup(&ro.root(), b"d").unwrap().0);
            let names = [(&root, long(b'f')), (&root, b"h".to_vec()), (&d, b"g".to_vec())];
            names.iter().all(|(dir, name)| id_of(&ro, &ro.lookup(dir, name).unwrap().0) == old)
        };
        if let (Ok(Some(copy)), true) = (marker, untouched) {
            spoilt += 1;
            let mtime = left.stat(&copy).unwrap().mtime;
            left.write_at(&left.open(&copy, Access::ReadWrite).unwrap(), &[0x55; 8192], 0).unwrap();
            left.set_times(&copy, SetTime::Omit, SetTime::At(mtime)).unwrap();
            assert_eq!(all_is_well(&left, true, "the copy is spoilt"), old);
        }
        if !stopped {
            break;
        }
    }
    assert!(spoilt > 0, "it was stopped before the first name was moved");
}

/// The exchange of a name fails, and so does the removal of the note of it: what users write then is not undone.
#[test]
fn what_is_written_after_a_failure_is_not_undone_by_the_next_open() {
    let disk = base(true, Journal::Ordered);
    let s = open(disk.clone());
    let renames = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let (me, seen) = (disk.clone(), Arc::clone(&renames));
    disk.set_hook(Some(Arc::new(move |m| {
        // The first names the copy, the others are exchanges.
        if m == Moment::Before(Op::Rename) && seen.fetch_add(1, Ordering::Relaxed) == 1 {
            me.fail_from(Some(Op::Rename), 0, libc::EIO);
            me.fail_from(Some(Op::Unlink), 0, libc::EIO);
        }
    })));
    assert_eq!(errno(&rekey_everything(&s).unwrap_err()), Some(libc::EIO));
    disk.set_hook(None);
    disk.clear_faults();
    assert!(is_interrupted(&disk).unwrap());
    let (n, attr) = s.lookup(&s.root(), b"h").unwrap();
    s.open_file(&n, Access::ReadWrite).unwrap().write(0, b"written since").unwrap();
    // As whoever restores a file with its times does.
    s.setattr(&n, &SetAttr { mtime: SetTime::At(attr.mtime), ..SetAttr::default() }, None).unwrap();
    drop(n);
    s.close().unwrap();
    drop(s);
    let s = open(disk.clone());
    for name in [&long(b'f')[..], b"h"] {
        assert!(read(&s, &s.root(), name).starts_with(b"written since"));
    }
    assert_eq!(left_over(&disk), 0);
}

/// The second name cannot be exchanged, nor the first one put back: for a while, or for good.
#[test]
fn names_that_can_go_neither_forth_nor_back() {
    for for_good in [false, true] {
        let disk = base(true, Journal::Ordered);
        let s = open(disk.clone());
        let (me, seen) = (disk.clone(), std::sync::atomic::AtomicU64::new(0));
        disk.set_hook(Some(Arc::new(move |m| {
            if m != Moment::Before(Op::Rename) {
                return;
            }
            // The first names the copy, the second is the first exchange.
            match seen.fetch_add(1, Ordering::Relaxed) {
                2 => me.fail_from(Some(Op::Rename), 0, libc::EIO),
                5 if !for_good => me.clear_faults(),
                _ => {}
            }
        })));
        let done = rekey_everything(&s);
        disk.set_hook(None);
        disk.clear_faults();
        if !for_good {
            assert!(matches!(done, Ok(Rekeyed::Done { .. })), "{done:?}");
            s.close().unwrap();
            drop(s);
            all_is_well(&disk, true, "forth in the end");
            continue;
        }
        let e = done.unwrap_err();
        assert_eq!(e.code(), "names-parted", "{e}");
        let names =
            [(s.root(), long(b'f')), (s.root(), b"h".to_vec()), (s.lookup(&s.root(), b"d").unwrap().0, b"g".to_vec())];
        let inos: std::collections::BTreeSet<_> = names.iter().map(|(d, n)| s.lookup(d, n).unwrap().1.ino).collect();
        assert_eq!(inos.len(), 2, "it says what is so");
        assert!(names.iter().all(|(d, n)| read(&s, d, n) == content(140_000, 3)));
        let (h, _) = s.lookup(&s.root(), b"h").unwrap();
        s.open_file(&h, Access::ReadWrite).unwrap().write(0, b"since").unwrap();
        drop((h, names));
        s.close().unwrap();
        drop(s);
        let s = open(disk.clone());
        assert!(read(&s, &s.root(), b"h").starts_with(b"since"), "not undone by the next open");
        assert_eq!(left_over(&disk), 0);
    }
}

/// While the last of it is copied, the file gets a name in a directory that nobody has locked.
#[test]
fn a_link_made_during_the_exchange_is_no_other_file() {
    let (disk, s) = new_sim();
    let (d, _) = s.mkdir(&s.root(), b"d", 0o755, 0, None).unwrap();
    let (n, f) = make(&s, b"f", &content(300_000, 7));
    let armed = Arc::new(AtomicBool::new(false));
    let (store, node, on) = (Arc::clone(&s), Arc::clone(&n), Arc::clone(&armed));
    disk.set_hook(Some(Arc::new(move |m| {
        if m == Moment::Before(Op::Write) && on.swap(false, Ordering::Relaxed) {
            store.link(&node, &d, b"g").unwrap();
        }
    })));
    let step = |bytes| {
        // The last step: what is written now is copied with the locks held.
        if bytes == 0 {
            f.write(0, b"now")?;
            armed.store(true, Ordering::Relaxed);
        }
        Ok(())
    };
    assert_eq!(s.rekey(&name_of(&s, b"f"), &step).unwrap(), Rekeyed::Linked);
    disk.set_hook(None);
    assert!(!armed.load(Ordering::Relaxed), "it was linked");
    let d = s.lookup(&s.root(), b"d").unwrap().0;
    assert!(Arc::ptr_eq(&s.lookup(&d, b"g").unwrap().0, &s.lookup(&s.root(), b"f").unwrap().0));
    assert_eq!(s.getattr(&n).unwrap().nlink, 2);
}

#[test]
fn a_name_given_twice_is_one_name() {
    let (_, s) = new_sim();
    let (n, _f) = make(&s, b"one", b"content");
    s.link(&n, &s.root(), b"two").unwrap();
    let (one, two) = (name_of(&s, b"one"), name_of(&s, b"two"));
    assert_eq!(s.rekey_all(&[one.clone(), one.clone()], NOTHING).unwrap(), Rekeyed::Linked);
    assert!(matches!(s.rekey_all(&[one.clone(), two, one], NOTHING).unwrap(), Rekeyed::Done { .. }));
    assert!(Arc::ptr_eq(&s.lookup(&s.root(), b"one").unwrap().0, &s.lookup(&s.root(), b"two").unwrap().0));
}

/// Where it may rest for the sake of users, it holds no lock that any of them wants: each of these would wait for ever.
#[test]
fn where_it_may_wait_it_holds_no_lock() {
    let (_, s) = new_sim();
    let (n, f) = make(&s, b"f", &content(1_200_000, 8));
    let (d, _) = s.mkdir(&s.root(), b"d", 0o755, 0, None).unwrap();
    s.link(&n, &d, b"g").unwrap();
    let all = s.names_of(&[n.key()], NOTHING).unwrap().remove(&n.key()).unwrap();
    let told = Cell::new(0);
    let step = |bytes: u64| {
        told.set(told.get() + 1);
        f.write(told.get() * 1000, b"at work")?;
        s.setattr(&n, &SetAttr { mode: Some(0o600), ..SetAttr::default() }, None)?;
        s.set_xattr(&n, b"user.x", &bytes.to_le_bytes(), XattrMode::Any)?;
        for dir in [&s.root(), &d] {
            make_in(&s, dir, format!("new {}", told.get()).as_bytes());
            s.rename(dir, if dir.id() == d.id() { b"g" } else { b"f" }, dir, b"other", RenameMode::Replace)?;
            s.rename(dir, b"other", dir, if dir.id() == d.id() { b"g" } else { b"f" }, RenameMode::Replace)?;
        }
        s.sync_file(&n, &f)
    };
    assert!(matches!(s.rekey_all(&all, &step).unwrap(), Rekeyed::Done { .. }));
    assert!(told.get() > 3, "{}", told.get());
    assert_eq!(read(&s, &s.root(), b"f")[1000..1007], *b"at work");
}

/// Whoever writes all the time is caught up with: after a while it does not rest any more, though it may still be ended.
#[test]
fn a_writer_is_not_given_way_to_for_ever() {
    // Six segments.
    const ALL: usize = 3_000_000;
    let (_, s) = new_sim();
    let (_, f) = make(&s, b"f", &content(ALL, 9));
    let (waits, quick) = (Cell::new(0), Cell::new(0));
    let step = |bytes| {
        if bytes > 0 {
            waits.set(waits.get() + bytes)
        } else {
            quick.set(quick.get() + 1)
        }
        // Everything, before the next stretch: as fast as no copy is.
        f.write(0, &content(ALL, quick.get() as u8)).map(drop)
    };
    assert!(matches!(s.rekey(&name_of(&s, b"f"), &step).unwrap(), Rekeyed::Done { .. }));
    let all = ALL as u64;
    assert!((3 * all..4 * all).contains(&waits.get()), "the copy and two rounds: {}", waits.get());
    assert!(quick.get() > 6 * 6, "the other rounds: {}", quick.get());
    assert!(read(&s, &s.root(), b"f") == content(ALL, quick.get() as u8));
    let end = |bytes| if bytes > 0 { f.write(0, &content(ALL, 1)).map(drop) } else { Err(StoreError::Invalid) };
    assert!(matches!(s.rekey(&name_of(&s, b"f"), &end), Err(StoreError::Invalid)));
}

/// It takes long to make a large copy durable. What was written meanwhile was copied while everybody waited.
#[test]
fn what_is_written_during_the_fsync_of_a_large_copy_is_copied_before_users_wait() {
    const ALL: usize = 3_000_000;
    let (disk, s) = new_sim();
    let (_, f) = make(&s, b"f", &content(ALL, 9));
    let (f, written) = (Arc::new(f), Arc::new(AtomicBool::new(false)));
    let (user, once) = (Arc::clone(&f), Arc::clone(&written));
    let copied = Cell::new(0);
    let step = |bytes| {
        copied.set(copied.get() + bytes);
        Ok(())
    };
    disk.set_hook(Some(Arc::new(move |m| {
        if m == Moment::Before(Op::SyncFile) && !once.swap(true, Ordering::Relaxed) {
            user.write(0, &content(ALL, 10)).unwrap();
        }
    })));
    assert!(matches!(s.rekey(&name_of(&s, b"f"), &step).unwrap(), Rekeyed::Done { .. }));
    disk.set_hook(None);
    assert!(written.load(Ordering::Relaxed));
    assert_eq!(copied.get(), 2 * ALL as u64, "all of it was told of, so no lock was held");
    assert!(read(&s, &s.root(), b"f") == content(ALL, 10));
}

/// A second copy of the same file is refused, and takes nothing from the first.
#[test]
fn a_second_rekey_does_not_end_the_notes_of_the_first() {
    let (disk, s) = new_sim();
    let mut want = content(300_000, 8);
    let (_, f) = make(&s, b"f", &want);
    let step = |bytes| {
        if bytes > 0 {
            let e = s.rekey(&name_of(&s, b"f"), NOTHING).unwrap_err();
            assert_eq!(errno(&e), Some(libc::EBUSY));
        }
        f.write(5, b"noted").map(drop)
    };
    assert!(matches!(s.rekey(&name_of(&s, b"f"), &step).unwrap(), Rekeyed::Done { .. }));
    want[5..10].copy_from_slice(b"noted");
    assert!(read(&s, &s.root(), b"f") == want);
    assert_eq!(left_over(&disk), 0);
}

/// All of it, or its end: no header is made under the locks, and it is as long as it was.
#[test]
fn a_file_that_ends_in_a_hole() {
    let (_, s) = new_sim();
    for (name, head) in [(b"a", 0), (b"b", 5000)] {
        let (_, f) = make(&s, name, &content(head, 9));
        f.set_len(3_000_000).unwrap();
        assert!(matches!(s.rekey(&name_of(&s, name), NOTHING).unwrap(), Rekeyed::Done { bytes: 3_000_000, .. }));
        let mut want = content(head, 9);
        want.resize(3_000_000, 0);
        assert!(read(&s, &s.root(), name) == want);
    }
}

/// What it says in bits that only a newer program knows would be lost.
#[test]
fn a_header_with_unknown_features_is_left_alone() {
    let (disk, s) = new_sim();
    make(&s, b"f", b"content");
    s.close().unwrap();
    let path = name_of(&s, b"f").name;
    let file = disk.open(&disk.lookup(&disk.root().unwrap(), &path).unwrap(), Access::Read).unwrap();
    let (pair, _) = read_slots(&disk, &file, Source::Cache).unwrap().unwrap();
    let opened = open_dek(s.shared(), &pair).unwrap();
    let mut slot = Slot { ro_compat: 4, ..opened.slot };
    let key = kdf::derive(opened.dek.secret(), kdf::label::HEADER_MAC, &slot.file.0);
    slot.mac = kdf::mac(&key, &[&slot.wrap_aad()[..88]]);
    let kek = s.shared().keys.kek(slot.kek).unwrap();
    let bytes = wrap_slot(&kek, &slot, &opened.dek, slot.sequence + 1).unwrap().encode();
    drop(s);
    disk.write_raw(&path, 0, &[bytes, bytes].concat()).unwrap();
    let raw = disk.read_raw(&path).unwrap();
    let s = open(disk.clone());
    assert_eq!(read(&s, &s.root(), b"f"), b"content");
    let e = s.rekey(&name_of(&s, b"f"), NOTHING).unwrap_err();
    assert!(matches!(e, StoreError::Damage(Damage::UnsupportedFeature(4))), "{e}");
    assert_eq!((disk.read_raw(&path).unwrap(), left_over(&disk)), (raw, 0));
}

/// Each operation fails once, and the program goes on: the file is whole, and can be rekeyed afterwards.
#[test]
fn any_operation_may_fail() {
    for linked in [false, true] {
        for n in 0.. {
            let disk = base(linked, Journal::Ordered);
            let s = open(disk.clone());
            let before = disk.operations();
            disk.fail_next(None, n, libc::EIO);
            let done = rekey_everything(&s);
            let reached = disk.operations() > before + n;
            disk.clear_faults();
            assert!(read(&s, &s.root(), &long(b'f')) == content(140_000, 3), "after {n}: {done:?}");
            let again = rekey_everything(&s).unwrap();
            // What could not be removed from the folder is one more name.
            let may = matches!(again, Rekeyed::Done { .. }) || (linked && again == Rekeyed::Linked && done.is_ok());
            assert!(may, "after {n}: {done:?}, {again:?}");
            s.close().unwrap();
            all_is_well(&disk, linked, &format!("after {n}: {done:?}"));
            if !reached || n > 1000 {
                assert!(done.is_ok() && n > 10);
                break;
            }
        }
    }
}

/// Whoever writes as soon as the new inode is there, and has it made durable, has its name made durable: that was renamed
/// a moment ago, and its directory is not synced yet.
#[test]
fn an_fsync_right_after_the_exchange_promises_the_new_name() {
    for journal in [Journal::Ordered, Journal::None] {
        let disk = base(false, journal);
        let s = open(disk.clone());
        let (n, _) = s.lookup(&s.root(), &long(b'f')).unwrap();
        let f = Arc::new(s.open_file(&n, Access::ReadWrite).unwrap());
        // Not closed by the end of the hook.
        let _open = Arc::clone(&f);
        let cuts = Arc::new(parking_lot::Mutex::new(Vec::new()));
        let (user, me, left, renamed) = (Arc::clone(&s), disk.clone(), Arc::clone(&cuts), AtomicBool::new(false));
        disk.set_hook(Some(Arc::new(move |m| match m {
            Moment::Before(Op::Rename) => renamed.store(true, Ordering::Relaxed),
            Moment::Before(Op::SyncDir) if renamed.swap(false, Ordering::Relaxed) => {
                f.write(0, b"acknowledged").unwrap();
                user.sync_file(&n, &f).unwrap();
                let kinds = [PowerCut::Lose, PowerCut::Reorder { tear: true }];
                left.lock().extend(
                    kinds
                        .into_iter()
                        .flat_map(|k| (0..8).map(move |seed| (seed, k)))
                        .map(|(seed, k)| me.crash_power(seed, k)),
                );
            }
            _ => {}
        })));
        assert!(matches!(rekey_everything(&s).unwrap(), Rekeyed::Done { .. }));
        disk.set_hook(None);
        let cuts = std::mem::take(&mut *cuts.lock());
        assert_eq!(cuts.len(), 16);
        for cut in cuts {
            let s = open(cut);
            assert!(read(&s, &s.root(), &long(b'f')).starts_with(b"acknowledged"), "{journal:?}");
        }
    }
}

#[test]
fn on_a_full_disk_nothing_is_lost_and_nothing_stays() {
    for linked in [false, true] {
        for extra in [1u64, 4, 20, 34, 36] {
            let base = base(linked, Journal::Ordered);
            let s = open(base.clone());
            let old = id_of(&s, &s.lookup(&s.root(), &long(b'f')).unwrap().0);
            base.fail_from(Some(Op::Write), extra, libc::ENOSPC);
            let e = rekey_everything(&s);
            base.clear_faults();
            if let Err(e) = &e {
                assert_eq!(errno(e), Some(libc::ENOSPC), "{e}");
                assert_eq!(left_over(&base), 0);
                assert_eq!(all_is_well(&base, linked, "full"), old);
            }
            assert!(e.is_err() || extra > 4, "{extra}: {e:?}");
        }
    }
}

#[test]
fn damage_stops_it_and_is_named() {
    let (disk, s) = new_sim();
    make(&s, b"f", &content(300_000, 4));
    s.close().unwrap();
    let path = s.read_dir(&s.root()).unwrap()[0].backing.clone();
    let raw = disk.read_raw(&path).unwrap();
    disk.flip_bit(&path, geometry::block_offset(50) + 9, 3).unwrap();
    let damaged = disk.read_raw(&path).unwrap();
    assert_ne!(raw, damaged);
    let e = s.rekey(&name_of(&s, b"f"), NOTHING).unwrap_err();
    assert!(matches!(e, StoreError::Damage(Damage::BlockAuth { block: 50 })), "{e}");
    assert_eq!(disk.read_raw(&path).unwrap(), damaged, "left as it is");
    assert_eq!(left_over(&disk), 0);
}

/// A rotation makes another KEK active while the copy is made.
#[test]
fn nothing_appears_under_a_kek_that_is_no_longer_active() {
    let (disk, s) = new_sim();
    make(&s, b"f", &content(300_000, 5));
    let keys = &s.shared().keys;
    let old = keys.with_active(|k| k.id());
    let once = Cell::new(false);
    let rotate = |_| {
        if !once.replace(true) {
            let new = keys.stage(&disk, KekKind::Sealed, &[])?;
            keys.activate(&disk, new)?;
        }
        Ok(())
    };
    let Rekeyed::Done { kek, .. } = s.rekey(&name_of(&s, b"f"), &rotate).unwrap() else { panic!("not done") };
    assert_eq!(kek, keys.with_active(|k| k.id()));
    assert_ne!(kek, old);
    assert_eq!(read(&s, &s.root(), b"f"), content(300_000, 5));
    assert_eq!(left_over(&disk), 0);
}

#[test]
fn who_ends_it_early_leaves_the_file_as_it_was() {
    let (disk, s) = new_sim();
    let (n, _f) = make(&s, b"f", &content(2_000_000, 6));
    let old = id_of(&s, &n);
    let calls = Cell::new(0);
    let stop = |_| {
        calls.set(calls.get() + 1);
        if calls.get() == 3 { Err(StoreError::Backing(io::Error::from_raw_os_error(libc::ECANCELED))) } else { Ok(()) }
    };
    assert_eq!(errno(&s.rekey(&name_of(&s, b"f"), &stop).unwrap_err()), Some(libc::ECANCELED));
    assert_eq!((id_of(&s, &n), left_over(&disk)), (old, 0));
    // And it can be begun anew.
    assert!(matches!(s.rekey(&name_of(&s, b"f"), NOTHING).unwrap(), Rekeyed::Done { .. }));
}

/// Threads that read, write, look, and change attributes while the file is rekeyed again and again.
#[test]
fn readers_and_writers_at_work() {
    let disk = new_disk(ENCRYPTED);
    let s = open(disk);
    let (n, f) = make(&s, b"f", &vec![0u8; 64 * 4096]);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let going = || !stop.load(std::sync::atomic::Ordering::Relaxed);
    let written = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2u64)
            .map(|w| {
                let (f, s) = (&f, &s);
                scope.spawn(move || {
                    // Each has the blocks of its parity, and remembers what it last put there.
                    let mut last = [0u8; 64];
                    let mut round = 0u64;
                    while going() || round < 200 {
                        let block = (round * 17 % 32) * 2 + w;
                        let value = 1 + (round % 250) as u8;
                        f.write(block * 4096, &[value; 4096]).unwrap();
                        last[block as usize] = value;
                        let (again, attr) = s.lookup(&s.root(), b"f").unwrap();
                        assert_eq!((again.number(), attr.size, attr.nlink), (again.number(), 64 * 4096, 1));
                        round += 1;
                    }
                    last
                })
            })
            .collect();
        let attributes = scope.spawn(|| {
            let mut i = 0u32;
            while going() || i == 0 {
                i += 1;
                s.set_xattr(&n, b"user.count", &i.to_le_bytes(), XattrMode::Any).unwrap();
                s.setattr(&n, &SetAttr { mode: Some(0o600 | (i & 0o77)), ..SetAttr::default() }, None).unwrap();
                assert_eq!(s.get_xattr(&n, b"user.count").unwrap(), i.to_le_bytes());
            }
            i
        });
        for _ in 0..25 {
            let done = s.rekey(&name_of(&s, b"f"), NOTHING).unwrap();
            assert!(matches!(done, Rekeyed::Done { .. }), "{done:?}");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let i = attributes.join().unwrap();
        assert_eq!(s.getattr(&n).unwrap().mode, 0o600 | (i & 0o77));
        assert_eq!(s.get_xattr(&n, b"user.count").unwrap(), i.to_le_bytes());
        writers.into_iter().map(|w| w.join().unwrap()).collect::<Vec<_>>()
    });
    let got = read(&s, &s.root(), b"f");
    for (block, data) in got.chunks(4096).enumerate() {
        let want = written[block % 2][block];
        assert!(data.iter().all(|b| *b == want), "block {block}");
    }
}
