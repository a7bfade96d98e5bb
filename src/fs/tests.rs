//! The file system without FUSE, on the simulated disk.

use std::sync::Arc;

use super::*;
use crate::backing::sim::{Op, SimDisk, SimOptions};
use crate::backing::{Kind, RenameMode, XattrMode};
use crate::kms::KeyProvider;
use crate::kms::scripted::Scripted;
use crate::store::attr::CAPABILITY;
use crate::store::file::FileAllocate;
use crate::store::keys::{KekKind, Keys, StoreFlags};
use crate::store::{SetAttr, StoreOptions};

const ROOT_USER: Caller = Caller { uid: 0, gid: 0, pid: 0, has_group: |_, _| false };
const USER: Caller = Caller { uid: 1000, gid: 1000, pid: 1, has_group: |_, gid| gid == 2000 };

fn new_fs() -> (SimDisk, EnvelopeFs<SimDisk>) {
    let root: Vec<Arc<dyn KeyProvider>> = vec![Scripted::new("fs")];
    let disk = SimDisk::new(SimOptions::default());
    Store::init(&disk, &root, KekKind::Sealed, StoreFlags::default()).unwrap();
    let keys = Keys::open(&disk, &root).unwrap();
    let store = Store::open(disk.clone(), keys, StoreOptions::default()).unwrap();
    (disk, EnvelopeFs::new(store, Settings { gives_away: true, kernel_keeps_mtime: true }))
}

fn make(fs: &EnvelopeFs<SimDisk>, name: &str, content: &[u8]) -> Found {
    let (found, handle) = fs.create(&ROOT_USER, ROOT, name.as_bytes(), 0o644, 0).unwrap();
    fs.write(handle, 0, content, None).unwrap();
    fs.release(handle);
    found
}

fn errno_of<T>(r: Result<T>) -> i32 {
    errno::of(&r.err().expect("an error"))
}

fn plus(fs: &EnvelopeFs<SimDisk>, dir: u64, offset: u64, max: usize) -> Vec<(Vec<u8>, u64, u64)> {
    let mut out = Vec::new();
    let take = |i: PlusItem<'_>| {
        if out.len() == max {
            return false;
        }
        match i {
            PlusItem::Dots(d) => out.push((d.name.to_vec(), d.ino, d.next)),
            PlusItem::Entry { name, next, found } => out.push((name.to_vec(), found.node, next)),
        }
        true
    };
    fs.read_dir_plus(dir, offset, take).unwrap();
    out
}

#[test]
fn every_reply_that_names_a_node_counts_once() {
    let (_, fs) = new_fs();
    let f = make(&fs, "f", b"x");
    assert_eq!(fs.inodes.lookups(f.node), 1);
    assert_eq!(fs.lookup(ROOT, b"f").unwrap().node, f.node);
    let linked = fs.link(f.node, ROOT, b"g").unwrap();
    assert_eq!((linked.node, linked.attr.nlink), (f.node, 2));
    assert_eq!(fs.inodes.lookups(f.node), 3);
    // Two names of it, taken; an entry that did not fit is not counted.
    assert_eq!(plus(&fs, ROOT, 0, 100).len(), 4);
    assert_eq!(fs.inodes.lookups(f.node), 5);
    assert_eq!(plus(&fs, ROOT, 0, 3).len(), 3);
    assert_eq!(fs.inodes.lookups(f.node), 6);
    // Plain listing counts nothing, a failed lookup neither.
    fs.read_dir(ROOT, 0, |_| true).unwrap();
    assert_eq!(errno_of(fs.lookup(ROOT, b"none")), libc::ENOENT);
    assert_eq!(fs.inodes.lookups(f.node), 6);
    fs.forget(f.node, 5);
    assert_eq!(fs.get_attr(f.node).unwrap().size, 1);
    fs.forget(f.node, 1);
    assert_eq!(errno_of(fs.get_attr(f.node)), libc::ESTALE);
    assert_eq!(fs.counts(), (1, 0));
    // Found again under the same number.
    assert_eq!(fs.lookup(ROOT, b"g").unwrap().node, f.node);
}

#[test]
fn the_root_is_never_forgotten_and_forgetting_too_much_does_no_harm() {
    let (_, fs) = new_fs();
    let f = make(&fs, "f", b"");
    fs.forget(ROOT, 1000);
    fs.forget(f.node, 1000);
    fs.forget(f.node, 1000);
    fs.forget(77_777, 1);
    assert_eq!(fs.get_attr(ROOT).unwrap().kind, Kind::Dir);
    assert_eq!(fs.counts(), (1, 0));
}

#[test]
fn an_unlinked_open_file_lives_until_it_is_released() {
    let (_, fs) = new_fs();
    let f = make(&fs, "f", b"content");
    let handle = fs.open(&ROOT_USER, f.node, libc::O_RDWR).unwrap();
    fs.unlink(ROOT, b"f").unwrap();
    // The kernel may forget before the release reaches us.
    fs.forget(f.node, 1);
    let mut buf = [0; 7];
    assert_eq!(fs.read(handle, 0, &mut buf).unwrap(), 7);
    assert_eq!(&buf, b"content");
    fs.write(handle, 7, b" more", None).unwrap();
    fs.sync_file(handle).unwrap();
    fs.release(handle);
    assert_eq!(fs.counts(), (1, 0));
    assert_eq!(errno_of(fs.read(handle, 0, &mut buf)), libc::EBADF);
}

#[test]
fn a_number_is_not_another_files_while_the_kernel_holds_it() {
    let (_, fs) = new_fs();
    let f = make(&fs, "f", b"old");
    fs.unlink(ROOT, b"f").unwrap();
    let others: Vec<_> = (0..50).map(|i| make(&fs, &format!("n{i}"), b"new").node).collect();
    assert!(!others.contains(&f.node));
    assert_eq!(fs.get_attr(f.node).unwrap().nlink, 0);
}

#[test]
fn handles_read_or_write_as_they_were_opened() {
    let (_, fs) = new_fs();
    let f = make(&fs, "f", b"content");
    let reader = fs.open(&ROOT_USER, f.node, libc::O_RDONLY).unwrap();
    assert_eq!(errno_of(fs.write(reader, 0, b"x", None)), libc::EBADF);
    assert_eq!(errno_of(fs.allocate(&ROOT_USER, reader, FileAllocate::Default, 0, 9)), libc::EBADF);
    assert!(!fs.is_being_written(reader));
    // A writer reads too, because the kernel's page cache does.
    let writer = fs.open(&ROOT_USER, f.node, libc::O_WRONLY).unwrap();
    assert!(fs.is_being_written(reader));
    assert_eq!(fs.read(writer, 0, &mut [0; 7]).unwrap(), 7);
    fs.release(writer);
    assert!(!fs.is_being_written(reader));
    let emptied = fs.open(&ROOT_USER, f.node, libc::O_RDONLY | libc::O_TRUNC).unwrap();
    assert_eq!(fs.get_attr(f.node).unwrap().size, 0);
    fs.release(emptied);
    fs.release(reader);
    fs.release(reader);
    assert_eq!(fs.counts(), (2, 0));
}

#[test]
fn a_failed_truncation_at_open_leaves_no_handle() {
    let (disk, fs) = new_fs();
    let f = make(&fs, "f", b"content");
    disk.fail_from(Some(Op::Truncate), 0, libc::EIO);
    assert_eq!(errno_of(fs.open(&ROOT_USER, f.node, libc::O_WRONLY | libc::O_TRUNC)), libc::EIO);
    disk.clear_faults();
    assert_eq!(fs.counts(), (2, 0));
}

#[test]
fn set_bits_fall_for_users_and_capabilities_for_everybody() {
    let (_, fs) = new_fs();
    let f = make(&fs, "f", b"content");
    let setuid = SetAttr { mode: Some(0o6755), ..SetAttr::default() };
    let handle = fs.open(&ROOT_USER, f.node, libc::O_RDWR).unwrap();
    let mode = || fs.get_attr(f.node).unwrap().mode;
    let capability = || fs.get_xattr(f.node, CAPABILITY, 0).is_ok();
    let give = || {
        fs.set_attr(&ROOT_USER, f.node, setuid, None).unwrap();
        fs.set_xattr(&ROOT_USER, f.node, CAPABILITY, b"cap", XattrMode::Any).unwrap();
    };
    for kill in [false, true] {
        give();
        fs.write(handle, 0, b"x", kill.then_some(&USER)).unwrap();
        assert_eq!((mode(), capability()), (if kill { 0o755 } else { 0o6755 }, false));
        // What was seen once must not be believed after the next change.
        give();
        assert!(capability());
    }
    for (caller, left) in [(&ROOT_USER, 0o6755), (&USER, 0o755)] {
        give();
        fs.set_attr(caller, f.node, SetAttr { size: Some(3), ..SetAttr::default() }, None).unwrap();
        assert_eq!((mode(), capability()), (left, false));
        give();
        fs.allocate(caller, handle, FileAllocate::Default, 0, 100).unwrap();
        assert_eq!((mode(), capability()), (left, false));
    }
}

#[test]
fn whoever_writes_in_one_tick_of_the_kernels_clock_keeps_the_mtime_shown() {
    let (_, fs) = new_fs();
    let (f, handle) = fs.create(&ROOT_USER, ROOT, b"f", 0o644, 0).unwrap();
    let shown = crate::backing::Timestamp { sec: 5, nsec: 7 };
    let set = SetAttr { mtime: crate::backing::SetTime::At(shown), ..SetAttr::default() };
    fs.set_attr(&ROOT_USER, f.node, set, None).unwrap();
    fs.write(handle, 0, b"written back late", None).unwrap();
    assert_ne!(fs.get_attr(f.node).unwrap().mtime, shown);
    fs.release(handle);
    assert_eq!(fs.get_attr(f.node).unwrap().mtime, shown);
}

#[test]
fn a_listing_goes_on_where_it_was_after_changes() {
    let (_, fs) = new_fs();
    for i in 0..40 {
        make(&fs, &format!("stay{i}"), b"");
    }
    let mut offset = 0;
    let mut seen = Vec::new();
    for round in 0.. {
        let piece = plus(&fs, ROOT, offset, 5);
        let Some((_, _, next)) = piece.last() else { break };
        offset = *next;
        seen.extend(piece.iter().map(|(n, _, _)| String::from_utf8(n.clone()).unwrap()));
        // Another reader begins anew, and names come and go.
        make(&fs, &format!("new{round}"), b"");
        fs.read_dir(ROOT, 0, |_| true).unwrap();
        if round > 0 {
            fs.unlink(ROOT, format!("new{}", round - 1).as_bytes()).unwrap();
        }
    }
    assert_eq!(&seen[..2], [".", ".."]);
    seen.retain(|n| n.starts_with("stay"));
    seen.sort();
    let mut want: Vec<_> = (0..40).map(|i| format!("stay{i}")).collect();
    want.sort();
    assert_eq!(seen, want);
}

#[test]
fn entries_removed_since_a_listing_began_are_left_out() {
    let (_, fs) = new_fs();
    for i in 0..10 {
        make(&fs, &format!("{i}"), b"");
    }
    let first = plus(&fs, ROOT, 0, 4);
    let (_, _, next) = first.last().unwrap();
    for i in 0..10 {
        fs.unlink(ROOT, format!("{i}").as_bytes()).unwrap();
    }
    assert!(plus(&fs, ROOT, *next, 100).is_empty());
    assert_eq!(plus(&fs, ROOT, 0, 100).len(), 2);
}

#[test]
fn new_inodes_belong_to_the_caller() {
    let (_, fs) = new_fs();
    let (f, handle) = fs.create(&USER, ROOT, b"f", 0o666, 0o022).unwrap();
    fs.release(handle);
    let d = fs.mkdir(&USER, ROOT, b"d", 0o777, 0o077).unwrap();
    let new = NewNode { kind: Kind::Fifo, mode: 0o666, umask: 0, rdev: 0 };
    let p = fs.mknod(&USER, d.node, b"p", &new).unwrap();
    let l = fs.symlink(&USER, d.node, b"l", b"target").unwrap();
    for found in [f, d, p, l] {
        assert_eq!((found.attr.uid, found.attr.gid), (1000, 1000));
    }
    assert_eq!((f.attr.mode, d.attr.mode, p.attr.mode), (0o644, 0o700, 0o666));
    assert_eq!(fs.read_link(l.node).unwrap(), b"target");
    assert_eq!(errno_of(fs.read_link(f.node)), libc::EINVAL);
}

#[test]
fn copying_stops_at_the_end_and_says_how_far_it_got() {
    let (_, fs) = new_fs();
    let (a, b) = (make(&fs, "a", &[7; 10_000]), make(&fs, "b", b""));
    let from = fs.open(&ROOT_USER, a.node, libc::O_RDONLY).unwrap();
    let to = fs.open(&ROOT_USER, b.node, libc::O_WRONLY).unwrap();
    let mut buf = [0; 4000];
    assert_eq!(fs.copy_range(&ROOT_USER, (from, 1000), (to, 5), 1 << 40, &mut buf).unwrap(), 9000);
    assert_eq!(fs.copy_range(&ROOT_USER, (from, 20_000), (to, 5), 10, &mut buf).unwrap(), 0);
    assert_eq!(errno_of(fs.copy_range(&ROOT_USER, (to, 0), (from, 5), 10, &mut buf)), libc::EBADF);
    assert_eq!(fs.get_attr(b.node).unwrap().size, 9005);
}

#[test]
fn renames_and_removals_pass_the_stores_errors_on() {
    let (_, fs) = new_fs();
    make(&fs, "a", b"a");
    make(&fs, "b", b"b");
    fs.mkdir(&ROOT_USER, ROOT, b"d", 0o755, 0).unwrap();
    assert_eq!(errno_of(fs.rename((ROOT, b"a"), (ROOT, b"b"), RenameMode::NoReplace)), libc::EEXIST);
    fs.rename((ROOT, b"a"), (ROOT, b"b"), RenameMode::Exchange).unwrap();
    assert_eq!(errno_of(fs.unlink(ROOT, b"d")), libc::EISDIR);
    assert_eq!(errno_of(fs.rmdir(ROOT, b"a")), libc::ENOTDIR);
    assert_eq!(errno_of(fs.mkdir(&ROOT_USER, ROOT, &[b'n'; 256], 0o755, 0)), libc::ENAMETOOLONG);
    assert_eq!(errno_of(fs.lookup(4242, b"x")), libc::ESTALE);
}

#[test]
fn a_full_disk_comes_through() {
    let (disk, fs) = new_fs();
    let (_, handle) = fs.create(&ROOT_USER, ROOT, b"f", 0o644, 0).unwrap();
    disk.fail_from(Some(Op::Write), 0, libc::ENOSPC);
    assert_eq!(errno_of(fs.write(handle, 0, b"x", None)), libc::ENOSPC);
    disk.clear_faults();
    fs.write(handle, 0, b"x", None).unwrap();
    fs.release(handle);
}

/// Damage to a block was logged twice, once without limit.
#[test]
fn damage_is_logged_once_with_file_block_and_code() {
    #[derive(Clone, Default)]
    struct Lines(Arc<parking_lot::Mutex<Vec<u8>>>);
    impl std::io::Write for Lines {
        fn write(&mut self, b: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(b);
            Ok(b.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let lines = Lines::default();
    let to = lines.clone();
    let log = tracing_subscriber::fmt().with_ansi(false).with_writer(move || to.clone()).finish();
    let (disk, fs) = new_fs();
    let found = make(&fs, "f", &[7; 9000]);
    let path = disk.files().into_iter().find(|p| disk.read_raw(p).unwrap().len() > 9000).unwrap();
    disk.flip_bit(&path, crate::format::geometry::block_offset(1), 0).unwrap();
    tracing::subscriber::with_default(log, || {
        let h = fs.open(&ROOT_USER, found.node, libc::O_RDONLY).unwrap();
        let e = fs.read(h, 4096, &mut [0; 10]).unwrap_err();
        let id = fs.file_id(h);
        failed(Report { operation: "read", node: found.node, file: id.as_deref() }, &e);
    });
    let text = String::from_utf8(lines.0.lock().clone()).unwrap();
    assert_eq!(text.matches("block-auth").count(), 1, "{text}");
    assert!(text.contains("file=") && text.contains("block=1 "), "{text}");
}
