//! `lock` and `unlock`: what they print, how they exit, and what the daemon does meanwhile.

use super::support::{Bench, can_mount, wait_for};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

const LOCKED: &str = "locked; files give ENOKEY until: envelopefs unlock mnt\n";
const HINT: &str = "the keys of this store are locked; bring them back with: envelopefs unlock mnt";

fn errno(path: std::path::PathBuf) -> Option<i32> {
    File::open(path).err().and_then(|e| e.raw_os_error())
}

#[test]
fn locking_and_unlocking_are_said_and_shown() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    fs::write(b.path("mnt/f"), "content").unwrap();
    assert!(b.ok("status mnt").contains("\nkeys      ready\n"));
    b.says("unlock mnt", 0, "not locked\n", "");
    b.says("lock mnt", 0, LOCKED, "");
    b.says("lock back", 0, "locked already; files give ENOKEY until: envelopefs unlock back\n", "");
    assert_eq!(errno(b.path("mnt/f")), Some(libc::ENOKEY));
    assert_eq!(fs::metadata(b.path("mnt/f")).unwrap().len(), 7);
    let status = b.ok("status mnt");
    assert!(status.contains("\nkeys      locked for ") && status.contains("with: envelopefs unlock\n"), "{status}");
    assert!(status.contains("\nDEK cache 0 keys"), "{status}");
    let keys = &b.json("status mnt --json")["daemon"]["keys"];
    assert_eq!((&keys["state"], &keys["dropped"]), (&"locked".into(), &true.into()));
    assert!(keys["since"].as_u64().unwrap() > 1_700_000_000);
    b.fails("rotate mnt", 18, HINT);
    b.fails("key add mnt keyfile:DIR/second", 18, &format!("DIR/back: {HINT}"));
    assert_eq!(b.json("key list back --json")["root_keys"].as_array().unwrap().len(), 1);
    b.says("unlock mnt", 0, "unlocked\n", "");
    assert_eq!(fs::read_to_string(b.path("mnt/f")).unwrap(), "content");
    b.ok("rotate mnt");
    b.ok("unmount mnt");
    b.fails(
        "lock back",
        10,
        "DIR/back: the store is not mounted; mount it first with: envelopefs mount BACKING MOUNTPOINT",
    );
    b.fails(
        "unlock back",
        10,
        "DIR/back: the store is not mounted; mount it first with: envelopefs mount BACKING MOUNTPOINT",
    );
    b.fails(
        "lock nowhere",
        3,
        "nowhere: no such directory; check the path, or make a store with: envelopefs init nowhere",
    );
}

#[test]
fn a_locked_store_is_opened_by_its_root_keys_only() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    fs::write(b.path("mnt/f"), "content").unwrap();
    b.ok("lock mnt");
    fs::write(b.path("other"), [7; 32]).unwrap();
    b.chmod("other", 0o600);
    let o = b.run("unlock mnt --key keyfile:DIR/other");
    assert_eq!(o.status.code(), Some(4), "{}", b.masked(&o.stderr));
    fs::rename(b.path("key"), b.path("away")).unwrap();
    let o = b.run("unlock mnt");
    assert_eq!(o.status.code(), Some(13), "{}", b.masked(&o.stderr));
    assert_eq!(errno(b.path("mnt/f")), Some(libc::ENOKEY), "still locked");
    b.ok("unlock mnt --key keyfile:DIR/away");
    assert_eq!(fs::read_to_string(b.path("mnt/f")).unwrap(), "content");
    b.ok("unmount mnt");
}

#[test]
fn a_passphrase_unlocks_and_comes_with_the_request() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    for (name, text) in [("right", "correct horse\n"), ("wrong", "incorrect horse\n")] {
        fs::write(b.path(name), text).unwrap();
    }
    b.ok("init back --passphrase-file DIR/right");
    b.ok("mount back mnt --passphrase-file DIR/right");
    fs::write(b.path("mnt/f"), "content").unwrap();
    b.ok("lock mnt");
    // No terminal: nobody can be asked, here or in the daemon.
    let o = b.run("unlock mnt");
    assert_eq!(o.status.code(), Some(13), "{}", b.masked(&o.stderr));
    let o = b.run("unlock mnt --passphrase-file DIR/wrong");
    assert_eq!(o.status.code(), Some(4), "{}", b.masked(&o.stderr));
    assert_eq!(errno(b.path("mnt/f")), Some(libc::ENOKEY));
    b.says("unlock mnt --passphrase-file DIR/right", 0, "unlocked\n", "");
    assert_eq!(fs::read_to_string(b.path("mnt/f")).unwrap(), "content");
    // One of two root keys, and the passphrase is not it.
    b.ok("key add mnt keyfile:DIR/key");
    b.ok("lock mnt");
    let o = b.run("unlock mnt");
    assert!(o.status.success(), "the key file opens it: {}", b.masked(&o.stderr));
    b.ok("unmount mnt");
}

#[test]
fn a_lock_cancels_a_rotation_and_it_is_finished_later() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    for i in 0..40 {
        fs::write(b.path("mnt").join(i.to_string()), i.to_string()).unwrap();
    }
    b.ok("rotate mnt --detach --rate 1 --jobs 1");
    b.says("lock mnt", 0, LOCKED, "");
    let rotation = b.json("status mnt --json")["daemon"]["rotation"].clone();
    assert_eq!((&rotation["running"], &rotation["report"]["outcome"]), (&false.into(), &"cancelled".into()));
    b.ok("unlock mnt");
    let v = b.json("rotate mnt --json");
    assert_eq!((&v["outcome"], &v["resumed"]), (&"complete".into(), &true.into()));
    for i in 0..40 {
        assert_eq!(fs::read_to_string(b.path("mnt").join(i.to_string())).unwrap(), i.to_string());
    }
}

#[test]
fn a_locked_daemon_unmounts_and_a_killed_one_leaves_the_store_whole() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    let data = vec![0x5a; 1 << 20];
    fs::write(b.path("mnt/closed"), &data).unwrap();
    let open = File::options().read(true).write(true).create(true).truncate(true).open(b.path("mnt/open")).unwrap();
    // Only in the kernel's cache when the lock comes.
    open.write_all_at(&data, 0).unwrap();
    b.ok("lock mnt");
    b.kill();
    drop(open);
    let report = b.json("check back --deep --key keyfile:DIR/key --json");
    assert_eq!(
        (&report["damage"], &report["warnings"], &report["notes"]),
        (&0.into(), &0.into(), &0.into()),
        "{report}"
    );
    b.ok("mount back mnt");
    for name in ["mnt/closed", "mnt/open"] {
        assert!(fs::read(b.path(name)).unwrap() == data, "{name}");
    }
    b.ok("lock mnt");
    b.ok("unmount mnt");
    assert!(b.is_unlocked());
    b.ok("mount back mnt");
    assert!(fs::read(b.path("mnt/open")).unwrap() == data);
    // A signal while locked.
    b.ok("lock mnt");
    let pid = rustix::process::Pid::from_raw(b.daemon()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    wait_for("the end", || b.is_unlocked());
}

#[test]
fn a_recovery_key_unlocks_when_the_others_are_lost() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    let out = b.ok("init back --key keyfile:DIR/key --recovery-key");
    let paper = out.lines().map(str::trim).find(|l| l.len() == 69).expect("a recovery key is printed").to_owned();
    fs::write(b.path("paper"), &paper).unwrap();
    fs::write(b.path("torn"), &paper[..60]).unwrap();
    b.ok("mount back mnt");
    fs::write(b.path("mnt/f"), "content").unwrap();
    b.ok("lock mnt");
    fs::remove_file(b.path("key")).unwrap();
    assert_eq!(b.run("unlock mnt").status.code(), Some(13));
    assert_eq!(b.run("unlock mnt --recovery-file DIR/torn").status.code(), Some(13));
    b.says("unlock mnt --recovery-file DIR/paper", 0, "unlocked\n", "");
    assert_eq!(fs::read_to_string(b.path("mnt/f")).unwrap(), "content");
    // What was locked and unlocked still changes its root keys.
    b.ok("key add mnt keyfile:DIR/new");
    b.ok("unmount mnt");
    b.ok("mount back mnt --key keyfile:DIR/new");
}
