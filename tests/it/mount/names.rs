//! Names: links, renames, special files, attributes by name, extended attributes.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, RenameFlags, XattrFlags};

use super::support::{Mount, errno, needs_root, noise, sh};

fn names(dir: impl AsRef<Path>) -> Vec<String> {
    let mut v: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    v.sort();
    v
}

#[test]
fn names_of_255_bytes_work_and_longer_ones_do_not() {
    let m = Mount::new();
    let (long, longer) = ("n".repeat(255), "n".repeat(256));
    fs::create_dir(m.path(&long)).unwrap();
    fs::write(m.path(&long).join(&long), "x").unwrap();
    fs::rename(m.path(&long).join(&long), m.path("m".repeat(255))).unwrap();
    fs::write(m.path("é".repeat(127)), "y").unwrap();
    symlink("t", m.path("s".repeat(255))).unwrap();
    let want = names(m.path(""));
    assert_eq!(want.len(), 4);
    assert_eq!(errno(fs::write(m.path(&longer), "x")), libc::ENAMETOOLONG);
    assert_eq!(errno(fs::metadata(m.path(&longer))), libc::ENAMETOOLONG);
    let m = m.remount();
    assert_eq!(names(m.path("")), want);
    assert_eq!(fs::read(m.path("m".repeat(255))).unwrap(), b"x");
    fs::remove_file(m.path("m".repeat(255))).unwrap();
    fs::remove_dir(m.path(&long)).unwrap();
    assert_eq!(names(m.path("")).len(), 2);
}

#[test]
fn any_byte_but_slash_and_nul_may_be_in_a_name() {
    use std::os::unix::ffi::OsStrExt;
    let m = Mount::new();
    let odd: Vec<u8> = (1..=255).filter(|b| *b != b'/').collect();
    for piece in odd.chunks(100) {
        fs::write(m.path(std::ffi::OsStr::from_bytes(piece)), piece).unwrap();
    }
    let m = m.remount();
    for piece in odd.chunks(100) {
        assert_eq!(fs::read(m.path(std::ffi::OsStr::from_bytes(piece))).unwrap(), piece);
    }
}

#[test]
fn hard_links_share_content_and_count() {
    let m = Mount::new();
    fs::write(m.path("a"), "one").unwrap();
    fs::create_dir(m.path("d")).unwrap();
    fs::hard_link(m.path("a"), m.path("d/b")).unwrap();
    // Attributes that the kernel has cached must follow.
    assert_eq!(fs::metadata(m.path("a")).unwrap().nlink(), 2);
    assert_eq!(fs::metadata(m.path("a")).unwrap().ino(), fs::metadata(m.path("d/b")).unwrap().ino());
    fs::write(m.path("d/b"), "two").unwrap();
    assert_eq!(fs::read(m.path("a")).unwrap(), b"two");
    let m = m.remount();
    assert_eq!(fs::metadata(m.path("d/b")).unwrap().nlink(), 2);
    assert_eq!(fs::read(m.path("a")).unwrap(), b"two");
    fs::remove_file(m.path("a")).unwrap();
    assert_eq!(fs::metadata(m.path("d/b")).unwrap().nlink(), 1);
    fs::hard_link(m.path("d/b"), m.path("c")).unwrap();
    fs::rename(m.path("c"), m.path("d/b")).unwrap();
    assert_eq!(names(m.path("")), ["c", "d"], "renaming onto another link of the same file does nothing");
    assert_eq!(errno(fs::hard_link(m.path("d"), m.path("e"))), libc::EPERM);
    assert_eq!(errno(fs::hard_link(m.path("c"), m.path("d/b"))), libc::EEXIST);
}

#[test]
fn symbolic_links_keep_any_target() {
    let m = Mount::new();
    for (i, target) in ["x", "../up/and/away", &"long/".repeat(819)].iter().enumerate() {
        symlink(target, m.path(format!("l{i}"))).unwrap();
    }
    let m = m.remount();
    for (i, target) in ["x", "../up/and/away", &"long/".repeat(819)].iter().enumerate() {
        let path = m.path(format!("l{i}"));
        assert_eq!(fs::read_link(&path).unwrap().to_str().unwrap(), *target);
        assert_eq!(fs::symlink_metadata(&path).unwrap().len(), target.len() as u64);
    }
    fs::write(m.path("file"), "through").unwrap();
    symlink("file", m.path("to-file")).unwrap();
    assert_eq!(fs::read(m.path("to-file")).unwrap(), b"through");
    fs::remove_file(m.path("to-file")).unwrap();
    assert!(m.path("file").exists());
}

#[test]
fn renames_replace_refuse_and_exchange() {
    let m = Mount::new();
    for d in ["d", "e", "full"] {
        fs::create_dir(m.path(d)).unwrap();
    }
    fs::write(m.path("full/x"), "").unwrap();
    fs::write(m.path("a"), "a").unwrap();
    fs::write(m.path("b"), "b").unwrap();
    let rename = |from: &str, to: &str, flags| {
        rustix::fs::renameat_with(CWD, m.path(from), CWD, m.path(to), flags).map_err(std::io::Error::from)
    };
    assert_eq!(errno(rename("a", "b", RenameFlags::NOREPLACE)), libc::EEXIST);
    rename("a", "b", RenameFlags::EXCHANGE).unwrap();
    assert_eq!((fs::read(m.path("a")).unwrap(), fs::read(m.path("b")).unwrap()), (b"b".to_vec(), b"a".to_vec()));
    rename("a", "d", RenameFlags::EXCHANGE).unwrap();
    assert!(m.path("a").is_dir() && m.path("d").is_file());
    rename("a", "d", RenameFlags::EXCHANGE).unwrap();
    assert_eq!(errno(rename("a", "gone", RenameFlags::EXCHANGE)), libc::ENOENT);
    rename("a", "new", RenameFlags::NOREPLACE).unwrap();
    assert_eq!(errno(rename("new", "c", RenameFlags::WHITEOUT)), libc::EINVAL);
    // Plain renames.
    rename("new", "b", RenameFlags::empty()).unwrap();
    assert_eq!(fs::read(m.path("b")).unwrap(), b"b");
    assert_eq!(errno(rename("b", "d", RenameFlags::empty())), libc::EISDIR);
    assert_eq!(errno(rename("d", "b", RenameFlags::empty())), libc::ENOTDIR);
    assert_eq!(errno(rename("d", "full", RenameFlags::empty())), libc::ENOTEMPTY);
    assert_eq!(errno(rename("d", "d/inside", RenameFlags::empty())), libc::EINVAL);
    rename("full", "e", RenameFlags::empty()).unwrap();
    rename("e", "d/moved", RenameFlags::empty()).unwrap();
    let m = m.remount();
    assert_eq!(names(m.path("")), ["b", "d"]);
    assert_eq!(names(m.path("d/moved")), ["x"]);
}

#[test]
fn an_open_file_that_is_replaced_stays_what_it_was() {
    let m = Mount::new();
    fs::write(m.path("old"), "old").unwrap();
    fs::write(m.path("new"), "new").unwrap();
    let mut f = File::open(m.path("old")).unwrap();
    let ino = f.metadata().unwrap().ino();
    fs::rename(m.path("new"), m.path("old")).unwrap();
    let meta = f.metadata().unwrap();
    assert_eq!((meta.nlink(), meta.ino(), meta.len()), (0, ino, 3));
    let mut text = String::new();
    f.read_to_string(&mut text).unwrap();
    assert_eq!(text, "old");
    assert_eq!(fs::read(m.path("old")).unwrap(), b"new");
}

#[test]
fn files_below_a_renamed_directory_stay_usable() {
    let m = Mount::new();
    fs::create_dir_all(m.path("a/b/c")).unwrap();
    fs::write(m.path("a/b/c/f"), noise(1, 10_000)).unwrap();
    let m = m.remount();
    let f = super::support::open_rw(m.path("a/b/c/f"));
    assert_eq!(fs::metadata(m.path("a/b/c")).unwrap().len(), fs::metadata(m.path("a/b/c")).unwrap().len());
    fs::create_dir(m.path("z")).unwrap();
    fs::rename(m.path("a/b"), m.path("z/y")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&f, b"still", 20_000).unwrap();
    assert_eq!(fs::metadata(m.path("z/y/c/f")).unwrap().len(), 20_005);
    fs::write(m.path("z/y/c/g"), "g").unwrap();
    assert!(!m.path("a/b").exists());
    drop(f);
    assert_eq!(names(m.remount().path("z/y/c")), ["f", "g"]);
}

#[test]
fn fifos_sockets_and_devices_are_what_they_were_made() {
    needs_root!();
    let m = Mount::new();
    let mode = Mode::from_raw_mode(0o640);
    let make = |name: &str, kind, dev| rustix::fs::mknodat(CWD, m.path(name), kind, mode, dev).unwrap();
    make("fifo", FileType::Fifo, 0);
    make("socket", FileType::Socket, 0);
    make("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    make("big", FileType::BlockDevice, rustix::fs::makedev(259, 70_000));
    make("plain", FileType::RegularFile, 0);
    let m = m.remount();
    let meta = |n: &str| fs::symlink_metadata(m.path(n)).unwrap();
    assert!(meta("fifo").file_type().is_fifo());
    assert!(meta("socket").file_type().is_socket());
    assert!(meta("null").file_type().is_char_device());
    assert_eq!(meta("null").rdev(), rustix::fs::makedev(1, 3));
    assert!(meta("big").file_type().is_block_device());
    assert_eq!(meta("big").rdev(), rustix::fs::makedev(259, 70_000));
    assert!(meta("plain").is_file());
    assert_eq!(sh(&m.path(""), "echo x > null; cat null; (echo through > fifo &); cat fifo"), "through\n");
    fs::write(m.path("plain"), "usable").unwrap();
    assert_eq!(fs::read(m.path("plain")).unwrap(), b"usable");
}

#[test]
fn extended_attributes_of_every_size() {
    let m = Mount::new();
    fs::write(m.path("f"), "").unwrap();
    fs::create_dir(m.path("d")).unwrap();
    for target in ["f", "d"] {
        let p = m.path(target);
        rustix::fs::setxattr(&p, "user.small", b"value", XattrFlags::CREATE).unwrap();
        rustix::fs::setxattr(&p, "user.empty", b"", XattrFlags::empty()).unwrap();
        rustix::fs::setxattr(&p, "user.big", &noise(1, 2000), XattrFlags::empty()).unwrap();
        rustix::fs::setxattr(&p, format!("user.{}", "n".repeat(200)), b"long name", XattrFlags::empty()).unwrap();
        let again = rustix::fs::setxattr(&p, "user.small", b"x", XattrFlags::CREATE);
        assert_eq!(again.unwrap_err(), rustix::io::Errno::EXIST);
        let missing = rustix::fs::setxattr(&p, "user.none", b"x", XattrFlags::REPLACE);
        assert_eq!(missing.unwrap_err(), rustix::io::Errno::NODATA);
        rustix::fs::setxattr(&p, "user.small", b"other", XattrFlags::REPLACE).unwrap();
    }
    let m = m.remount();
    for target in ["f", "d"] {
        let p = m.path(target);
        let mut buf = vec![0u8; 4096];
        let mut get = |name: &str| rustix::fs::getxattr(&p, name, &mut buf[..]).map(|n| buf[..n].to_vec());
        assert_eq!(get("user.small").unwrap(), b"other");
        assert_eq!(get("user.empty").unwrap(), b"");
        assert_eq!(get("user.big").unwrap(), noise(1, 2000));
        assert_eq!(get(&format!("user.{}", "n".repeat(200))).unwrap(), b"long name");
        assert_eq!(get("user.none").unwrap_err(), rustix::io::Errno::NODATA);
        // Size only, and too little room.
        assert_eq!(rustix::fs::getxattr_query(&p, "user.big").unwrap(), 2000);
        assert_eq!(rustix::fs::getxattr(&p, "user.big", &mut [0u8; 10][..]).unwrap_err(), rustix::io::Errno::RANGE);
        let n = rustix::fs::listxattr(&p, &mut buf[..]).unwrap();
        let mut listed: Vec<_> = buf[..n].split(|b| *b == 0).filter(|n| n.starts_with(b"user.")).collect();
        listed.sort();
        assert_eq!(listed.len(), 4);
        assert_eq!(listed[0], b"user.big");
        rustix::fs::removexattr(&p, "user.big").unwrap();
        assert_eq!(rustix::fs::removexattr(&p, "user.big").unwrap_err(), rustix::io::Errno::NODATA);
    }
}

#[test]
fn trusted_attributes_work_on_symbolic_links() {
    needs_root!();
    let m = Mount::new();
    symlink("nowhere", m.path("l")).unwrap();
    rustix::fs::lsetxattr(m.path("l"), "trusted.t", b"v", XattrFlags::empty()).unwrap();
    let m = m.remount();
    let mut buf = [0u8; 16];
    assert_eq!(rustix::fs::lgetxattr(m.path("l"), "trusted.t", &mut buf[..]).unwrap(), 1);
    assert_eq!(buf[0], b'v');
}

#[test]
fn the_stores_own_folder_is_not_there() {
    let m = Mount::new();
    assert_eq!(errno(fs::metadata(m.path(".envelopefs"))), libc::ENOENT);
    assert_eq!(names(m.path("")), Vec::<String>::new());
    // With encrypted names, this is a name like any other.
    fs::write(m.path(".envelopefs"), "mine").unwrap();
    assert_eq!(names(m.path("")), [".envelopefs"]);
    assert_eq!(fs::read(m.remount().path(".envelopefs")).unwrap(), b"mine");
}

#[test]
fn modes_are_changed_by_name_and_by_descriptor() {
    let m = Mount::new();
    fs::write(m.path("f"), "").unwrap();
    fs::set_permissions(m.path("f"), fs::Permissions::from_mode(0o6711)).unwrap();
    assert_eq!(fs::metadata(m.path("f")).unwrap().mode() & 0o7777, 0o6711);
    File::open(m.path("f")).unwrap().set_permissions(fs::Permissions::from_mode(0o1604)).unwrap();
    let m = m.remount();
    assert_eq!(fs::metadata(m.path("f")).unwrap().mode() & 0o7777, 0o1604);
}

#[test]
fn statfs_tells_of_the_backing_directory() {
    let m = Mount::new();
    let (above, below) = (rustix::fs::statvfs(m.path("")).unwrap(), rustix::fs::statvfs(m.backing()).unwrap());
    assert_eq!((above.f_blocks, above.f_frsize), (below.f_blocks, below.f_frsize));
    assert_eq!(above.f_namemax, 255);
    assert!(above.f_bavail > 0 && above.f_bavail <= above.f_blocks);
}

#[test]
fn the_mount_table_names_store_and_type() {
    let m = Mount::with(|o| o.fs_name = "a name".to_owned());
    let table = fs::read_to_string("/proc/mounts").unwrap();
    let line = table.lines().find(|l| l.contains(m.path("").to_str().unwrap().trim_end_matches('/'))).unwrap();
    assert!(line.starts_with("a\\040name "), "{line}");
    assert!(line.contains(" fuse.envelopefs "), "{line}");
    assert!(line.contains("default_permissions"), "{line}");
}

#[test]
fn a_read_only_mount_changes_nothing() {
    let m = Mount::new();
    fs::write(m.path("f"), "x").unwrap();
    let m = m.unmount().mount(|o| o.read_only = true);
    assert_eq!(fs::read(m.path("f")).unwrap(), b"x");
    assert_eq!(errno(fs::write(m.path("f"), "y")), libc::EROFS);
    assert_eq!(errno(fs::write(m.path("g"), "y")), libc::EROFS);
    assert_eq!(errno(fs::remove_file(m.path("f"))), libc::EROFS);
    assert_eq!(errno(fs::create_dir(m.path("d"))), libc::EROFS);
}

#[test]
fn unlinking_through_at_calls_tells_files_from_directories() {
    let m = Mount::new();
    fs::create_dir(m.path("d")).unwrap();
    fs::write(m.path("f"), "").unwrap();
    let dir = File::open(m.path("")).unwrap();
    let unlink = |name: &str, flags| {
        rustix::fs::unlinkat(&dir, CString::new(name).unwrap(), flags).map_err(std::io::Error::from)
    };
    assert_eq!(errno(unlink("d", AtFlags::empty())), libc::EISDIR);
    assert_eq!(errno(unlink("f", AtFlags::REMOVEDIR)), libc::ENOTDIR);
    unlink("d", AtFlags::REMOVEDIR).unwrap();
    unlink("f", AtFlags::empty()).unwrap();
    assert_eq!(errno(unlink("f", AtFlags::empty())), libc::ENOENT);
}
