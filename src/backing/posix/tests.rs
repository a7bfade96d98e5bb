//! Every method, on a temporary directory.

use super::*;

#[test]
fn what_is_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let b = Posix::open(dir.path()).unwrap();
    let root = b.root().unwrap();
    let (node, file) = b.create(&root, b"f", 0o640, 0o022).unwrap();
    b.write_at(&file, b"hello", 3).unwrap();
    let (mut one, mut two, mut three) = ([0; 4], [0; 0], [1; 9]);
    let mut bufs = [IoSliceMut::new(&mut two), IoSliceMut::new(&mut one), IoSliceMut::new(&mut three)];
    assert_eq!(b.read_at(&file, &mut bufs, 0).unwrap(), 8);
    assert_eq!((&one, &three), (b"\0\0\0h", b"ello\x01\x01\x01\x01\x01"));
    assert_eq!(b.stat(&node).unwrap(), b.stat_file(&file).unwrap());
    assert_eq!(b.stat_at(&root, b"f").unwrap().mode, 0o640);
}

const UNPRIVILEGED: u32 = 65534;

struct Fixture {
    b: Posix,
    root: Node,
    // Last, so that it is removed after everything that is open in it.
    dir: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let b = Posix::open(dir.path()).unwrap();
    let root = b.root().unwrap();
    Fixture { b, root, dir }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[track_caller]
fn fails<T: std::fmt::Debug>(result: io::Result<T>, errno: i32) {
    assert_eq!(result.unwrap_err().raw_os_error(), Some(errno));
}

fn content(b: &Posix, file: &File) -> Vec<u8> {
    let mut buf = vec![0; 64 * 1024];
    let n = super::super::read_into(b, file, &mut buf, 0).unwrap();
    buf.truncate(n);
    buf
}

#[test]
fn a_node_outlives_its_names() {
    let Fixture { b, root, dir } = fixture();
    assert_eq!(b.path(), dir.path());
    let (node, file) = b.create(&root, b"f", 0o600, 0).unwrap();
    fails(b.create(&root, b"f", 0o600, 0), libc::EEXIST);
    b.rename(&root, b"f", &root, b"g", RenameMode::Replace).unwrap();
    b.write_at(&file, b"x", 0).unwrap();
    b.unlink(&root, b"g").unwrap();
    assert_eq!((b.stat(&node).unwrap().nlink, b.stat(&node).unwrap().size), (0, 1));
    b.sync_file(&file).unwrap();
    b.sync_dir(&root).unwrap();
    b.sync_all().unwrap();
}

#[test]
fn names_stay_in_their_directory() {
    let Fixture { b, root, dir: _dir } = fixture();
    b.mkdir(&root, b"d", 0o700, 0).unwrap();
    for name in [&b".."[..], b".", b"d/e", b"/", b"a\0b"] {
        fails(b.lookup(&root, name), libc::EINVAL);
        fails(b.create(&root, name, 0o600, 0), libc::EINVAL);
        fails(b.rename(&root, b"d", &root, name, RenameMode::Replace), libc::EINVAL);
    }
    fails(b.lookup(&root, b""), libc::ENOENT);
    fails(b.mkdir(&root, &[b'x'; 256], 0o700, 0), libc::ENAMETOOLONG);
    b.mkdir(&root, &[b'x'; 255], 0o700, 0).unwrap();
}

#[test]
fn symbolic_links_are_never_followed() {
    let Fixture { b, root, dir } = fixture();
    std::fs::write(dir.path().join("target"), "secret").unwrap();
    let long = vec![b'l'; 4095];
    b.symlink(&root, b"s", b"target").unwrap();
    b.symlink(&root, b"long", &long).unwrap();
    let link = b.lookup(&root, b"s").unwrap();
    assert_eq!(b.stat(&link).unwrap().kind, Kind::Symlink);
    assert_eq!(b.readlink(&link).unwrap(), b"target");
    assert_eq!(b.readlink(&b.lookup(&root, b"long").unwrap()).unwrap(), long);
    fails(b.open(&link, Access::Read), libc::ELOOP);
    fails(b.readlink(&root), libc::EINVAL);
    fails(b.read_dir(&link), libc::ENOTDIR);
    fails(b.set_mode(&link, 0o600), libc::EOPNOTSUPP);
    // Attributes go to the link itself.
    let target = b.stat_at(&root, b"target").unwrap();
    b.set_times(&link, SetTime::Omit, SetTime::At(Timestamp { sec: -5, nsec: 999_999_999 })).unwrap();
    b.set_owner(&link, None, Some(rustix::process::getegid().as_raw())).unwrap();
    assert_eq!(b.stat(&link).unwrap().mtime, Timestamp { sec: -5, nsec: 999_999_999 });
    fails(b.set_xattr(&link, b"user.x", b"v", XattrMode::Any), libc::EPERM);
    if is_root() {
        b.set_xattr(&link, b"trusted.x", b"v", XattrMode::Create).unwrap();
        fails(b.set_xattr(&link, b"trusted.x", b"v", XattrMode::Create), libc::EEXIST);
        assert_eq!(b.get_xattr(&link, b"trusted.x").unwrap(), b"v");
        assert_eq!(b.list_xattr(&link).unwrap(), [b"trusted.x"]);
        assert_eq!(b.list_xattr(&b.lookup(&root, b"target").unwrap()).unwrap(), [b""; 0]);
        b.remove_xattr(&link, b"trusted.x").unwrap();
        fails(b.remove_xattr(&link, b"trusted.x"), libc::ENODATA);
    }
    assert_eq!(b.stat_at(&root, b"target").unwrap(), target);
}

#[test]
fn hard_links_are_to_the_inode_itself() {
    let Fixture { b, root, dir: _dir } = fixture();
    b.symlink(&root, b"s", b"nowhere").unwrap();
    b.mknod(&root, b"fifo", Kind::Fifo, 0o600, 0, 0).unwrap();
    drop(b.create(&root, b"f", 0, 0).unwrap());
    for name in [&b"s"[..], b"fifo", b"f"] {
        let node = b.lookup(&root, name).unwrap();
        let other = [name, b"2"].concat();
        b.link(&node, &root, &other).unwrap();
        assert_eq!(b.stat_at(&root, &other).unwrap(), b.stat(&node).unwrap());
        assert_eq!(b.stat(&node).unwrap().nlink, 2);
        fails(b.link(&node, &root, &other), libc::EEXIST);
        b.unlink(&root, name).unwrap();
        b.unlink(&root, &other).unwrap();
        fails(b.link(&node, &root, name), libc::ENOENT);
    }
    fails(b.link(&root, &root, b"d"), libc::EPERM);
}

#[test]
fn special_files_are_made_and_never_opened() {
    let Fixture { b, root, dir: _dir } = fixture();
    b.mknod(&root, b"fifo", Kind::Fifo, 0o640, 0o007, 0).unwrap();
    b.mknod(&root, b"socket", Kind::Socket, 0o666, 0o022, 0).unwrap();
    b.mknod(&root, b"file", Kind::File, 0o666, 0o077, 0).unwrap();
    for (name, kind, mode) in
        [(&b"fifo"[..], Kind::Fifo, 0o640), (b"socket", Kind::Socket, 0o644), (b"file", Kind::File, 0o600)]
    {
        let stat = b.stat_at(&root, name).unwrap();
        assert_eq!((stat.kind, stat.mode), (kind, mode));
    }
    fails(b.open(&b.lookup(&root, b"fifo").unwrap(), Access::Read), libc::EINVAL);
    fails(b.open(&root, Access::Read), libc::EISDIR);
    fails(b.mknod(&root, b"d", Kind::Dir, 0o700, 0, 0), libc::EINVAL);
    if is_root() {
        let device = rustix::fs::makedev(1, 3);
        b.mknod(&root, b"null", Kind::CharDevice, 0o600, 0, device).unwrap();
        assert_eq!(b.stat_at(&root, b"null").unwrap().rdev, device);
    }
}

#[test]
fn rename_has_its_modes() {
    let Fixture { b, root, dir: _dir } = fixture();
    drop(b.create(&root, b"f", 0o600, 0).unwrap());
    b.mkdir(&root, b"d", 0o700, 0).unwrap();
    fails(b.rename(&root, b"f", &root, b"d", RenameMode::Replace), libc::EISDIR);
    fails(b.rename(&root, b"f", &root, b"d", RenameMode::NoReplace), libc::EEXIST);
    fails(b.rename(&root, b"f", &root, b"none", RenameMode::Exchange), libc::ENOENT);
    b.rename(&root, b"f", &root, b"d", RenameMode::Exchange).unwrap();
    assert_eq!(b.stat_at(&root, b"f").unwrap().kind, Kind::Dir);
    let dir = b.lookup(&root, b"f").unwrap();
    b.rename(&root, b"d", &dir, b"inside", RenameMode::NoReplace).unwrap();
    fails(b.rmdir(&root, b"f"), libc::ENOTEMPTY);
    fails(b.unlink(&root, b"f"), libc::EISDIR);
    fails(b.rmdir(&dir, b"inside"), libc::ENOTDIR);
    let entries = b.read_dir(&dir).unwrap();
    let inside = b.stat_at(&dir, b"inside").unwrap();
    assert_eq!(entries, [DirEntry { name: b"inside".to_vec(), ino: inside.ino, kind: Some(Kind::File) }]);
    b.unlink(&dir, b"inside").unwrap();
    b.rmdir(&root, b"f").unwrap();
    assert_eq!(b.read_dir(&root).unwrap(), []);
}

#[test]
fn a_large_directory_is_read_whole() {
    let Fixture { b, root, dir: _dir } = fixture();
    let mut expected: Vec<Vec<u8>> = (0..1500).map(|i| format!("{i:0200}").into_bytes()).collect();
    for name in &expected {
        b.mknod(&root, name, Kind::File, 0o600, 0, 0).unwrap();
    }
    let mut found: Vec<Vec<u8>> = b.read_dir(&root).unwrap().into_iter().map(|e| e.name).collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    assert_eq!(b.read_dir_up_to(&root, 1500).unwrap().unwrap().len(), 1500);
    assert_eq!(b.read_dir_up_to(&root, 1499).unwrap(), None);
}

#[test]
fn attributes_of_a_file_are_set_through_its_node() {
    let Fixture { b, root, dir: _dir } = fixture();
    let (node, file) = b.create(&root, b"f", 0o600, 0).unwrap();
    b.set_mode(&node, 0o4751).unwrap();
    assert_eq!(b.stat(&node).unwrap().mode, 0o4751);
    let at = |sec| SetTime::At(Timestamp { sec, nsec: 123_456_789 });
    b.set_times(&node, at(1), at(2)).unwrap();
    b.set_file_times(&file, SetTime::Omit, at(3_000_000_000)).unwrap();
    let stat = b.stat(&node).unwrap();
    let expected = |sec| Timestamp { sec, nsec: 123_456_789 };
    assert_eq!((stat.atime, stat.mtime), (expected(1), expected(3_000_000_000)));
    b.set_times(&node, SetTime::Now, SetTime::Omit).unwrap();
    assert!(b.stat(&node).unwrap().atime.sec > 1_000_000_000);
    if is_root() {
        b.set_owner(&node, Some(5), None).unwrap();
        b.set_owner(&node, None, Some(6)).unwrap();
        assert_eq!((b.stat(&node).unwrap().uid, b.stat(&node).unwrap().gid), (5, 6));
        fails(b.set_owner(&node, Some(u32::MAX), None), libc::EINVAL);
    }
}

#[test]
fn extended_attributes_of_any_length() {
    let Fixture { b, root, dir: _dir } = fixture();
    let (node, _file) = b.create(&root, b"f", 0o600, 0).unwrap();
    for len in [0, 1, 1024, 1025, 3000] {
        let value = vec![7; len];
        b.set_xattr(&node, b"user.x", &value, XattrMode::Any).unwrap();
        assert_eq!(b.get_xattr(&node, b"user.x").unwrap(), value);
    }
    b.remove_xattr(&node, b"user.x").unwrap();
    fails(b.get_xattr(&node, b"user.x"), libc::ENODATA);
    fails(b.set_xattr(&node, b"user.x", b"", XattrMode::Replace), libc::ENODATA);
    let mut names: Vec<Vec<u8>> = (0..10).map(|i| format!("user.{i:0200}").into_bytes()).collect();
    for name in &names {
        b.set_xattr(&node, name, b"", XattrMode::Create).unwrap();
    }
    let mut found = b.list_xattr(&node).unwrap();
    found.sort();
    names.sort();
    assert_eq!(found, names);
}

#[test]
fn space_is_reserved_given_back_and_found() {
    let Fixture { b, root, dir: _dir } = fixture();
    let (_, file) = b.create(&root, b"f", 0o600, 0).unwrap();
    b.truncate(&file, 1 << 33).unwrap();
    assert_eq!(b.next_data(&file, 0).unwrap(), None);
    let far = (1 << 32) + 3 * 4096;
    b.write_at(&file, &[1; 3 * 4096], far).unwrap();
    assert_eq!(b.next_data(&file, 0).unwrap(), Some(far));
    assert_eq!(b.next_data(&file, far + 5).unwrap(), Some(far + 5));
    b.sync_file(&file).unwrap();
    let before = b.stat_file(&file).unwrap();
    b.allocate(&file, Allocate::PunchHole, far, 2 * 4096).unwrap();
    let after = b.stat_file(&file).unwrap();
    assert_eq!((before.size, before.blocks - after.blocks), (after.size, 16));
    let mut buf = [9; 2];
    assert_eq!(super::super::read_into(&b, &file, &mut buf, far + 2 * 4096 - 1).unwrap(), 2);
    assert_eq!(buf, [0, 1]);
    // A hole across the end takes the last page whole; the simulated disk does the same.
    b.truncate(&file, 4 * 4096).unwrap();
    b.write_at(&file, &[1; 16], 4 * 4096).unwrap();
    b.allocate(&file, Allocate::PunchHole, 3 * 4096, 4096 + 20).unwrap();
    assert_eq!(b.next_data(&file, 0).unwrap(), None);
    b.truncate(&file, 10).unwrap();
    b.allocate(&file, Allocate::KeepSize, 0, 8192).unwrap();
    assert_eq!(b.stat_file(&file).unwrap().size, 10);
    b.allocate(&file, Allocate::Extend, 0, 8192).unwrap();
    assert_eq!(b.stat_file(&file).unwrap().size, 8192);
    assert_eq!(b.next_data(&file, 8192).unwrap(), None);
}

#[test]
fn many_buffers_and_the_end_of_the_file() {
    let Fixture { b, root, dir: _dir } = fixture();
    let (_, file) = b.create(&root, b"f", 0o600, 0).unwrap();
    let data: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
    b.write_at(&file, &data, 0).unwrap();
    let mut out = vec![0xee; 6000];
    // More than the kernel takes at once, some of them empty.
    let mut bufs: Vec<IoSliceMut<'_>> = Vec::new();
    for chunk in out.chunks_mut(3) {
        bufs.push(IoSliceMut::new(chunk));
        bufs.push(IoSliceMut::new(&mut []));
    }
    assert_eq!(b.read_at(&file, &mut bufs, 0).unwrap(), 5000);
    assert_eq!((&out[..5000], &out[5000..]), (&data[..], &[0xee; 1000][..]));
    assert_eq!(b.read_at(&file, &mut [], 0).unwrap(), 0);
    fails(b.write_at(&file, b"x", u64::MAX), libc::EINVAL);
    assert!(b.stat_fs().unwrap().namelen >= 255 && b.stat_fs().unwrap().blocks > 0);
}

#[test]
fn each_thread_has_its_own_umask() {
    let Fixture { b, root, dir: _dir } = fixture();
    std::thread::scope(|scope| {
        for (thread, umask) in [0o022, 0o077, 0, 0o027].into_iter().enumerate() {
            let (b, root) = (&b, &root);
            scope.spawn(move || {
                for i in 0..50 {
                    let (node, _) = b.create(root, format!("{thread}.{i}").as_bytes(), 0o666, umask).unwrap();
                    assert_eq!(b.stat(&node).unwrap().mode, 0o666 & !umask);
                    let name = format!("{thread}.{i}.d");
                    b.mkdir(root, name.as_bytes(), 0o777, umask ^ 0o777).unwrap();
                    assert_eq!(b.stat_at(root, name.as_bytes()).unwrap().mode, umask);
                }
            });
        }
    });
}

/// The kernel's form of an ACL: version 2, then (tag, permissions, id).
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

#[test]
fn a_default_acl_takes_the_place_of_the_umask() {
    const NOBODY: u32 = u32::MAX;
    let Fixture { b, root, dir: _dir } = fixture();
    let default = acl(&[(0x01, 7, NOBODY), (0x02, 6, 4242), (0x04, 5, NOBODY), (0x10, 7, NOBODY), (0x20, 0, NOBODY)]);
    match b.set_xattr(&root, b"system.posix_acl_default", &default, XattrMode::Any) {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return,
        other => other.unwrap(),
    }
    let (node, _) = b.create(&root, b"f", 0o666, 0o077).unwrap();
    assert_eq!(b.stat(&node).unwrap().mode, 0o660);
    assert!(b.list_xattr(&node).unwrap().contains(&b"system.posix_acl_access".to_vec()));
    b.mkdir(&root, b"d", 0o777, 0o777).unwrap();
    assert_eq!(b.stat_at(&root, b"d").unwrap().mode, 0o770);
}

/// Set in the child process that is to run [`as_an_unprivileged_owner`]: the directory to run it in.
const CHILD: &str = "ENVELOPEFS_TEST_OWNER_DIR";

/// Runs the test below in a process that has given up all privileges.
#[test]
fn modes_do_not_keep_the_owner_out() {
    use std::os::unix::process::CommandExt;

    let dir = tempfile::tempdir().unwrap();
    let mut child = std::process::Command::new("/proc/self/exe");
    child.args(["--exact", "backing::posix::tests::as_an_unprivileged_owner", "--nocapture"]);
    child.env(CHILD, dir.path());
    if is_root() {
        std::os::unix::fs::chown(dir.path(), Some(UNPRIVILEGED), Some(UNPRIVILEGED)).unwrap();
        let others = dir.path().join("others");
        std::fs::write(&others, "not yours").unwrap();
        std::fs::set_permissions(&others, std::os::unix::fs::PermissionsExt::from_mode(0o200)).unwrap();
        child.uid(UNPRIVILEGED).gid(UNPRIVILEGED);
    }
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains(RAN), "{text}");
}

/// What the child prints in the end.
const RAN: &str = "the unprivileged owner got through";

/// Does something only in the child process of the test above.
#[test]
fn as_an_unprivileged_owner() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let b = Posix::open(&dir).unwrap();
    let root = b.root().unwrap();
    assert!(!is_root());
    for mode in [0o200, 0o400, 0o444, 0, 0o4070, 0o2111] {
        let name = format!("{mode:o}");
        let (node, file) = b.create(&root, name.as_bytes(), mode, 0).unwrap();
        b.write_at(&file, b"by the creator", 0).unwrap();
        let file = b.open(&node, Access::ReadWrite).unwrap();
        assert_eq!(content(&b, &file), b"by the creator");
        b.write_at(&file, b"BY", 0).unwrap();
        assert_eq!(content(&b, &b.open(&node, Access::Read).unwrap())[..2], *b"BY");
        b.set_xattr(&node, b"user.x", b"v", XattrMode::Any).unwrap();
        assert_eq!(b.get_xattr(&node, b"user.x").unwrap(), b"v");
        b.link(&node, &root, format!("{name}.link").as_bytes()).unwrap();
        // Writing drops setuid and setgid as it always does; nothing is added or lost beyond that.
        assert_eq!(b.stat(&node).unwrap().mode & 0o777, mode & 0o777, "{mode:o}");
    }
    for mode in [0o555, 0o200, 0, 0o300] {
        let name = format!("d{mode:o}");
        b.mkdir(&root, name.as_bytes(), mode, 0).unwrap();
        let dir = b.lookup(&root, name.as_bytes()).unwrap();
        drop(b.create(&dir, b"a", 0o600, 0).unwrap());
        b.rename(&dir, b"a", &dir, b"b", RenameMode::NoReplace).unwrap();
        assert_eq!(b.read_dir(&dir).unwrap().len(), 1);
        assert_eq!(b.stat_at(&dir, b"b").unwrap().kind, Kind::File);
        b.lookup(&dir, b"b").unwrap();
        b.sync_dir(&dir).unwrap();
        b.unlink(&dir, b"b").unwrap();
        assert_eq!(b.stat(&dir).unwrap().mode, mode);
        b.rmdir(&root, name.as_bytes()).unwrap();
    }
    b.symlink(&root, b"s", b"nowhere").unwrap();
    b.link(&b.lookup(&root, b"s").unwrap(), &root, b"s2").unwrap();
    passing_modes_are_not_seen(&b, &root);
    if let Ok(others) = b.lookup(&root, b"others") {
        fails(b.open(&others, Access::Read), libc::EACCES);
        assert_eq!(b.stat(&others).unwrap().mode, 0o200);
    }
    println!("{RAN}");
}

/// While one thread opens a file of mode 0000, others see that mode and set others.
fn passing_modes_are_not_seen(b: &Posix, root: &Node) {
    let (node, _) = b.create(root, b"passing", 0, 0).unwrap();
    let node = &node;
    std::thread::scope(|scope| {
        // Long enough for the threads to meet also on a busy machine.
        let opener = scope.spawn(move || (0..10_000).for_each(|_| drop(b.open(node, Access::ReadWrite).unwrap())));
        while !opener.is_finished() {
            assert_eq!(b.stat(node).unwrap().mode, 0);
            assert_eq!(b.stat_at(root, b"passing").unwrap().mode, 0);
        }
        let opener = scope.spawn(move || (0..300).for_each(|_| drop(b.open(node, Access::ReadWrite).unwrap())));
        for i in 0..300 {
            b.set_mode(node, i % 2).unwrap();
            assert_eq!(b.stat(node).unwrap().mode, i % 2);
        }
        opener.join().unwrap();
    });
    assert_eq!(b.stat(node).unwrap().mode, 1);
}

#[test]
fn a_read_past_the_cache_sees_what_was_written_and_leaves_the_descriptor_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let p = Posix::open(dir.path()).unwrap();
    let root = p.root().unwrap();
    let (_, f) = p.create(&root, b"f", 0o600, 0).unwrap();
    let data: Vec<u8> = (0..6000u32).map(|i| i as u8 ^ (i >> 8) as u8).collect();
    p.write_at(&f, &data, 0).unwrap();
    let mut buf = [0u8; 2048];
    assert_eq!(p.read_past_cache(&f, &mut buf, 0).unwrap(), 2048);
    assert_eq!(buf[..], data[..2048]);
    // The last page is short.
    assert_eq!(p.read_past_cache(&f, &mut buf, 4096).unwrap(), 6000 - 4096);
    assert_eq!(buf[..6000 - 4096], data[4096..]);
    // Odd offsets and lengths work again, so O_DIRECT is gone.
    let mut odd = [0u8; 33];
    assert_eq!(crate::backing::read_into(&p, &f, &mut odd, 5).unwrap(), 33);
    assert_eq!(odd[..], data[5..38]);
}
