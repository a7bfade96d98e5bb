//! Several users: owners, permissions, setuid and setgid bits, ACLs, file capabilities.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::support::{Mount, NOBODY, Place, STRANGER, as_user, as_user_in, missing, needs_root, noise, sh};

fn mode(path: impl AsRef<Path>) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn owner(path: impl AsRef<Path>) -> (u32, u32) {
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.uid(), meta.gid())
}

/// A mount whose root everybody may write to.
fn open_to_all() -> Mount {
    let m = Mount::new();
    fs::set_permissions(m.path(""), fs::Permissions::from_mode(0o1777)).unwrap();
    m
}

#[test]
fn what_a_user_makes_belongs_to_him() {
    needs_root!();
    let m = open_to_all();
    let script = "umask 022; mkdir d; echo x > d/f; ln -s f d/l; mkfifo d/p; ln d/f d/h";
    assert!(as_user_in(NOBODY, STRANGER, &m.path(""), script).status.success());
    let m = m.remount();
    for n in ["d", "d/f", "d/l", "d/p", "d/h"] {
        assert_eq!(owner(m.path(n)), (NOBODY, STRANGER), "{n}");
    }
    assert_eq!((mode(m.path("d")), mode(m.path("d/f")), mode(m.path("d/p"))), (0o755, 0o644, 0o644));
}

#[test]
fn the_callers_umask_counts_and_not_the_daemons() {
    needs_root!();
    let m = open_to_all();
    assert!(as_user(NOBODY, &m.path(""), "umask 077; mkdir d; touch f; umask 0; mkdir e; touch g").status.success());
    assert_eq!(["d", "f", "e", "g"].map(|n| mode(m.path(n))), [0o700, 0o600, 0o777, 0o666]);
}

#[test]
fn permissions_hold_between_users() {
    needs_root!();
    let m = open_to_all();
    assert!(
        as_user(
            NOBODY,
            &m.path(""),
            "umask 077; echo secret > f; mkdir d; echo x > d/g; echo y > open; chmod 644 open"
        )
        .status
        .success()
    );
    let stranger = |script: &str| as_user(STRANGER, &m.path(""), script).status.success();
    assert!(!stranger("cat f"));
    assert!(!stranger("ls d"));
    assert!(!stranger("cat d/g"));
    assert!(!stranger("echo z >> open"));
    assert!(!stranger("rm -f f"), "the sticky bit of the root");
    assert!(!stranger("mv open mine"));
    assert!(!stranger("chmod 777 open"));
    assert!(!stranger("chown 54321 open"));
    assert!(stranger("cat open"));
    assert!(as_user(NOBODY, &m.path(""), "cat f && rm f").status.success());
}

#[test]
fn files_of_any_mode_work_for_whoever_has_them_open() {
    needs_root!();
    let m = open_to_all();
    // Write only, read only, nothing: opened at creation or before the mode changed.
    let script = "umask 0; (umask 0577; printf abc > w) && printf more >> w && ! cat w 2>/dev/null; \
                  printf data > r; chmod 444 r; cat r; ! printf x >> r 2>/dev/null; exec 3<>n; chmod 0 n; printf n >&3";
    let out = as_user(NOBODY, &m.path(""), script);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let m = m.remount();
    assert_eq!(mode(m.path("w")), 0o200);
    assert_eq!(fs::read(m.path("w")).unwrap(), b"abcmore");
    assert_eq!(fs::read(m.path("r")).unwrap(), b"data");
    assert_eq!(fs::read(m.path("n")).unwrap(), b"n");
}

#[test]
fn setgid_directories_hand_down_their_group() {
    needs_root!();
    let m = open_to_all();
    fs::create_dir(m.path("d")).unwrap();
    chown(m.path("d"), None, Some(STRANGER)).unwrap();
    fs::set_permissions(m.path("d"), fs::Permissions::from_mode(0o2777)).unwrap();
    assert!(as_user(NOBODY, &m.path("d"), "umask 022; touch f; mkdir e; mkfifo p; ln -s f l").status.success());
    for n in ["f", "e", "p", "l"] {
        assert_eq!(owner(m.path("d").join(n)), (NOBODY, STRANGER), "{n}");
    }
    assert_eq!(mode(m.path("d/e")), 0o2755, "a directory hands the bit down too");
    assert_eq!(mode(m.path("d/f")), 0o644);
    // Whoever is not in the group gets no setgid file of it.
    let script = "python3 -c \"import os; os.close(os.open('s', os.O_CREAT|os.O_WRONLY, 0o2755))\"";
    assert!(as_user(NOBODY, &m.path("d"), script).status.success());
    assert_eq!(mode(m.path("d/s")), 0o755);
}

#[test]
fn setuid_bits_fall_when_another_user_writes_and_stay_when_root_does() {
    needs_root!();
    let m = open_to_all();
    let fresh = || {
        fs::write(m.path("f"), noise(1, 10_000)).unwrap();
        chown(m.path("f"), Some(NOBODY), Some(NOBODY)).unwrap();
        fs::set_permissions(m.path("f"), fs::Permissions::from_mode(0o6777)).unwrap();
    };
    let writers = [
        ("write", "printf x >> f"),
        ("middle", "printf x | dd of=f conv=notrunc status=none"),
        ("truncate", "truncate -s 5 f"),
        ("O_TRUNC", ": > f"),
        ("fallocate", "fallocate -l 20000 f"),
        ("punch", "fallocate -p -o 0 -l 4096 f"),
        ("direct", "head -c 4096 /dev/zero | dd of=f bs=4096 oflag=direct conv=notrunc status=none"),
    ];
    for (what, script) in writers {
        fresh();
        let out = as_user(NOBODY, &m.path(""), script);
        assert!(out.status.success(), "{what}: {}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(mode(m.path("f")), 0o777, "{what} by its owner");
        fresh();
        sh(&m.path(""), script);
        assert_eq!(mode(m.path("f")), 0o6777, "{what} by root");
    }
    // A change of owner drops them, whoever makes it.
    fresh();
    chown(m.path("f"), Some(STRANGER), None).unwrap();
    assert_eq!(mode(m.path("f")), 0o777);
    // Set-group-id without execution is a locking mode and stays.
    fs::set_permissions(m.path("f"), fs::Permissions::from_mode(0o2666)).unwrap();
    assert!(as_user(STRANGER, &m.path(""), "printf x >> f").status.success());
    assert_eq!(mode(m.remount().path("f")) & 0o777, 0o666);
}

#[test]
fn file_capabilities_fall_with_every_write() {
    needs_root!();
    let m = Mount::new();
    if Command::new("setcap").arg("-h").output().is_err() {
        return missing("setcap is not installed");
    }
    let has = || sh(&m.path(""), "getcap f").contains("cap_net_bind_service");
    for change in ["printf x >> f", "truncate -s 3 f", "chown 54321 f", "fallocate -l 9999 f"] {
        fs::write(m.path("f"), "program").unwrap();
        sh(&m.path(""), "setcap cap_net_bind_service=ep f");
        assert!(has());
        sh(&m.path(""), change);
        assert!(!has(), "{change}");
    }
}

/// An ACL that gives user `uid` all rights, as the kernel has it in the extended attribute.
fn acl(uid: u32, group_class: u16) -> Vec<u8> {
    let mut v = 2u32.to_le_bytes().to_vec();
    let entries: [(u16, u16, u32); 5] =
        [(1, 7, u32::MAX), (2, 7, uid), (4, group_class, u32::MAX), (0x10, 7, u32::MAX), (0x20, 0, u32::MAX)];
    for (tag, permissions, id) in entries {
        v.extend_from_slice(&tag.to_le_bytes());
        v.extend_from_slice(&permissions.to_le_bytes());
        v.extend_from_slice(&id.to_le_bytes());
    }
    v
}

fn set_acl(path: &Path, kind: &str, value: &[u8]) -> bool {
    let name = format!("system.posix_acl_{kind}");
    match rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty()) {
        Ok(()) => true,
        Err(rustix::io::Errno::OPNOTSUPP) => false,
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn acls_grant_and_are_inherited() {
    needs_root!();
    let m = Mount::new();
    fs::create_dir(m.path("d")).unwrap();
    if !set_acl(&m.path("d"), "access", &acl(STRANGER, 0)) {
        return missing("the backing directory has no ACLs");
    }
    assert!(set_acl(&m.path("d"), "default", &acl(STRANGER, 5)));
    fs::write(m.path("private"), "p").unwrap();
    fs::set_permissions(m.path("private"), fs::Permissions::from_mode(0o600)).unwrap();
    let (stranger, nobody) = (|s: &str| as_user(STRANGER, &m.path(""), s), |s: &str| as_user(NOBODY, &m.path(""), s));
    assert!(stranger("ls d").status.success());
    assert!(!nobody("ls d").status.success());
    assert!(!stranger("cat private").status.success());
    assert!(set_acl(&m.path("private"), "access", &acl(STRANGER, 0)));
    assert!(stranger("cat private").status.success(), "a grant counts at once");
    // With a default ACL the umask does not apply; the ACL is handed down.
    sh(&m.path("d"), "umask 077; echo inherited > f; mkdir e; mkfifo p");
    let m = m.remount();
    let stranger = |s: &str| as_user(STRANGER, &m.path(""), s);
    let out = stranger("cat d/f && echo more >> d/f && ls d/e && touch d/e/mine");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!((mode(m.path("d/f")) & 0o070, mode(m.path("d/e")) & 0o070), (0o060, 0o070));
    // chmod changes the mask, and so what the ACL grants.
    sh(&m.path(""), "chmod g= d/f");
    assert!(!stranger("cat d/f").status.success());
}

#[test]
fn programs_run_and_setuid_counts_only_where_it_was_asked_for() {
    needs_root!();
    let m = Mount::new();
    fs::copy("/usr/bin/id", m.path("id")).unwrap();
    fs::set_permissions(m.path("id"), fs::Permissions::from_mode(0o4755)).unwrap();
    let euid = |m: &Mount| String::from_utf8(as_user(NOBODY, &m.path(""), "./id -u").stdout).unwrap();
    assert_eq!(euid(&m).trim(), "0");
    let m = m.unmount().mount(|o| o.options = Vec::new());
    assert_eq!(euid(&m).trim(), NOBODY.to_string());
}

#[test]
fn without_allow_other_only_the_one_who_mounted_gets_in() {
    needs_root!();
    let m = Mount::with(|o| o.allow_other = false);
    fs::set_permissions(m.path(""), fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(m.path("f"), "x").unwrap();
    let out = as_user(NOBODY, Path::new("/"), &format!("cat {}", m.path("f").display()));
    assert!(!out.status.success());
    assert_eq!(fs::read(m.path("f")).unwrap(), b"x");
}

/// Runs a test of this binary, which is ignored otherwise, as `NOBODY`, who may open the FUSE device as he may on any
/// Debian machine: in a mount namespace, so that this machine's own device stays as it is.
fn as_nobody(place: &Path, test: &str) -> std::process::Output {
    fs::copy(std::env::current_exe().unwrap(), place.join("it")).unwrap();
    let script = format!(
        "mknod -m 666 fuse c 10 229 && mount --bind fuse /dev/fuse && \
         exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups ./it --exact {test} --ignored --nocapture"
    );
    Command::new("unshare")
        .args(["--mount", "--propagation", "private", "/bin/sh", "-ec", &script])
        .env("TMPDIR", place)
        .current_dir(place)
        .output()
        .unwrap()
}

#[test]
fn an_unprivileged_user_mounts_and_opens_files_of_any_mode() {
    needs_root!();
    if !Path::new("/usr/bin/fusermount3").exists() {
        return missing("fusermount3 is not installed");
    }
    let place = Place::new();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    let out = as_nobody(place.path(), "mount::users::unprivileged_daemon");
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
#[ignore = "run by an_unprivileged_user_mounts_and_opens_files_of_any_mode"]
fn unprivileged_daemon() {
    let m = Mount::new();
    let file = |n: &str| -> PathBuf { m.path(n) };
    for (name, bits) in [("w", 0o200), ("r", 0o444), ("n", 0o000)] {
        fs::write(file(name), noise(1, 10_000)).unwrap();
        fs::set_permissions(file(name), fs::Permissions::from_mode(bits)).unwrap();
    }
    fs::create_dir(file("d")).unwrap();
    fs::write(file("d/f"), "x").unwrap();
    fs::set_permissions(file("d"), fs::Permissions::from_mode(0o555)).unwrap();
    let m = m.remount();
    use std::os::unix::fs::FileExt;
    // A byte in the middle of a block, of a file that its owner may not read.
    File::options().write(true).open(m.path("w")).unwrap().write_all_at(b"!", 5000).unwrap();
    assert!(fs::read(m.path("w")).is_err());
    assert!(fs::read(m.path("n")).is_err());
    assert!(fs::read(m.path("r")).unwrap() == noise(1, 10_000));
    assert_eq!(fs::read(m.path("d/f")).unwrap(), b"x");
    assert!(fs::write(m.path("d/g"), "").is_err());
    let t = fs::metadata(m.path("w")).unwrap().modified().unwrap();
    let m = m.remount();
    assert_eq!(fs::metadata(m.path("w")).unwrap().modified().unwrap(), t, "times are written back by the kernel");
    for (name, bits) in [("w", 0o200), ("r", 0o444), ("n", 0o000), ("d", 0o555)] {
        assert_eq!(mode(m.path(name)), bits);
        fs::set_permissions(m.path(name), fs::Permissions::from_mode(0o700)).unwrap();
    }
    assert_eq!(fs::read(m.path("w")).unwrap()[5000], b'!');
    assert!(fs::read(m.path("n")).unwrap() == noise(1, 10_000));
}

/// The kernel keeps the mode for long, and the answer to a write does not hold it. Who asks for more than the mode, as
/// stat(2) does, has the kernel ask for everything, as the size may have changed; execve(2) does not.
#[test]
fn setuid_bits_that_a_write_dropped_are_seen_to_be_gone_by_who_asks_for_the_mode_alone() {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    let mode = |f: &PathBuf| u32::from(statx(CWD, f, AtFlags::empty(), StatxFlags::MODE).unwrap().stx_mode) & 0o7777;
    needs_root!();
    let m = open_to_all();
    let f = m.path("f");
    fs::write(&f, "content").unwrap();
    chown(&f, Some(NOBODY), Some(NOBODY)).unwrap();
    for write in [
        "dd if=/dev/zero of=f bs=4096 count=1 oflag=direct conv=notrunc status=none",
        "printf x >> f",
        "fallocate -l 20000 f",
        "fallocate -p -l 4096 f",
    ] {
        fs::set_permissions(&f, fs::Permissions::from_mode(0o6775)).unwrap();
        assert_eq!(mode(&f), 0o6775);
        assert!(as_user(NOBODY, &m.path(""), write).status.success(), "{write}");
        assert_eq!(mode(&f), 0o775, "{write}");
    }
}

/// As everywhere since Linux 6.2: without group execute it stays for the file's group only.
#[test]
fn the_setgid_bit_without_group_execute_falls_when_somebody_outside_the_group_changes_the_file() {
    needs_root!();
    let m = open_to_all();
    let f = m.path("f");
    fs::write(&f, noise(1, 10_000)).unwrap();
    for (group, left) in [(STRANGER, 0o666), (NOBODY, 0o2666)] {
        chown(&f, Some(NOBODY), Some(group)).unwrap();
        for change in ["printf x >> f", "fallocate -l 20000 f", "fallocate -p -l 4096 f", "truncate -s 9999 f"] {
            fs::set_permissions(&f, fs::Permissions::from_mode(0o6666)).unwrap();
            assert!(as_user(NOBODY, &m.path(""), change).status.success(), "{change}");
            assert_eq!(mode(&f), left, "{change} by a member of the group: {}", group == NOBODY);
        }
    }
}
