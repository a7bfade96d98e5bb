//! The end of KEKs: destroyed after a while, on the word of two root keys, closed for trial; and copies of the keyring that
//! are there in time.

use super::support::{Bench, can_mount, wait_for};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// A store with names in clear and the files `f` and `g`, which `DIR/key` and a passphrase open.
fn filled() -> Bench {
    let b = Bench::new();
    fs::write(b.path("phrase"), "correct horse battery staple\n").unwrap();
    b.chmod("phrase", 0o600);
    b.ok("init back --key keyfile:DIR/key --key passphrase: --passphrase-file DIR/phrase --plaintext-names");
    b.ok("mount back mnt --log-file DIR/log");
    for name in ["f", "g"] {
        fs::write(b.path("mnt").join(name), "content").unwrap();
    }
    b.ok("unmount mnt");
    b
}

/// The same after a rotation; the old KEK's id, and `f` from before.
fn rotated() -> (Bench, String, Vec<u8>) {
    let b = filled();
    let saved = fs::read(b.path("back/f")).unwrap();
    b.ok("rotate back --passphrase-file DIR/phrase");
    let old = ids(&b, "retired").remove(0);
    (b, old, saved)
}

fn keks(b: &Bench) -> Vec<Value> {
    b.json("key list back --json")["keks"].as_array().unwrap().clone()
}

/// The KEKs in a state.
fn ids(b: &Bench, state: &str) -> Vec<String> {
    keks(b).iter().filter(|k| k["state"] == state).map(|k| k["id"].as_str().unwrap().to_owned()).collect()
}

fn errno(b: &Bench, path: &str) -> Option<i32> {
    fs::read(b.path(path)).err().and_then(|e| e.raw_os_error())
}

#[test]
fn a_kek_is_scheduled_waits_is_shown_and_stays_when_that_is_cancelled() {
    let (b, old, _) = rotated();
    b.fails(
        &format!("key destroy back {old} --after 7d"),
        2,
        "there is no terminal to confirm on: give --yes to destroy the KEK; see --help",
    );
    let d = b.json(&format!("key destroy back {old} --after 7d --yes --json"));
    assert_eq!((&d["outcome"], &d["kek"], &d["proof"]), (&"scheduled".into(), &old.clone().into(), &Value::Null));
    let (due, scheduled) = (d["schedule"]["due"].as_u64().unwrap(), d["schedule"]["scheduled"].as_u64().unwrap());
    assert_eq!((due - scheduled, d["not_before"].as_u64().unwrap()), (7 * 86_400, due));
    // It waits, and is not asked about again.
    let o = b.ok(&format!("key destroy back {old}"));
    assert!(o.starts_with("KEK ID was NOT destroyed: it is to be, but not before 20"), "{o}");
    let shown = keks(&b).into_iter().find(|k| k["id"] == *old).unwrap();
    assert_eq!((&shown["state"], shown["ending"]["due"].as_u64()), (&"retired".into(), Some(due)));
    for command in ["key list back", "status back"] {
        assert!(b.ok(command).contains("to be destroyed, not before 20"));
    }
    b.fails(
        &format!("key destroy back {old} --cancel --after 1d"),
        2,
        "the argument '--cancel' cannot be used with '--after <AGE>'; see --help",
    );
    b.says(&format!("key destroy back {old} --cancel"), 0, "KEK ID stays: it is not to be destroyed any more\n", "");
    b.says(&format!("key destroy back {old} --cancel"), 0, "KEK ID was not to be destroyed; nothing was done\n", "");
    assert!(!b.ok("key list back").contains("to be destroyed"));
    b.says(&format!("key destroy back {old} --yes"), 0, "destroyed KEK ID: 2 headers looked at, none names it\n", "");
}

#[test]
fn a_kek_whose_time_has_come_goes_by_the_next_key_destroy_after_it_was_announced() {
    let (b, old, _) = rotated();
    b.ok(&format!("key destroy back {old} --after 1s --yes"));
    let end = || b.json(&format!("key destroy back {old} --json"));
    assert_eq!(end()["outcome"], "waiting", "announced first");
    assert_eq!(ids(&b, "retired"), [old.as_str()]);
    let mut last = Value::Null;
    wait_for("the end", || {
        last = end();
        last["outcome"] != "waiting"
    });
    assert_eq!((&last["outcome"], &last["proof"]["scanned"]), (&"destroyed".into(), &2.into()));
    assert_eq!(ids(&b, "destroyed"), [old]);
}

#[test]
fn the_daemon_destroys_a_kek_whose_time_has_come_and_tells_of_files_that_need_it() {
    if !can_mount() {
        return;
    }
    let (b, old, saved) = rotated();
    b.ok("mount back mnt --log-file DIR/log --audit-log DIR/audit");
    // A file from an old backup while it waits: told, moved to the active KEK, and so no obstacle.
    b.ok(&format!("key destroy mnt {old} --after 7d --yes"));
    fs::write(b.path("back/f"), &saved).unwrap();
    assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"content");
    wait_for("the use to be written down", || {
        keks(&b).iter().any(|k| k["id"] == *old && k["ending"]["used"].as_u64() > Some(0))
    });
    assert!(b.ok("key list mnt").contains("; a file NEEDED it on 20"));
    let log = || fs::read_to_string(b.path("log")).unwrap();
    assert!(log().contains("a file was opened under a KEK that is to be destroyed on 20"), "{}", log());
    b.ok(&format!("key destroy mnt {old} --cancel"));
    b.ok("rotate mnt --passphrase-file DIR/phrase");
    b.ok(&format!("key destroy mnt {old} --after 1s --yes"));
    wait_for("the daemon to destroy it", || ids(&b, "destroyed") == [old.clone()]);
    assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"content");
    b.ok("unmount mnt");
    assert!(log().contains("this KEK will be destroyed at 20"), "{}", log());
    assert!(log().contains("destroyed a KEK whose time had come"), "{}", log());
    let audit = fs::read_to_string(b.path("audit")).unwrap();
    for state in ["scheduled", "cancelled", "announced", "destroyed"] {
        assert!(audit.contains(&format!("\"kek\":\"{old}\",\"state\":\"{state}\"")), "{state}");
    }
}

#[test]
fn neither_a_look_nor_a_read_only_mount_destroys_what_is_overdue() {
    if !can_mount() {
        return;
    }
    let (b, old, _) = rotated();
    b.ok(&format!("key destroy back {old} --after 1s --yes"));
    assert_eq!(b.json(&format!("key destroy back {old} --json"))["outcome"], "waiting");
    let ending = || keks(&b).iter().find(|k| k["id"] == *old).unwrap()["ending"].clone();
    let comes = ending()["announced"].as_u64().unwrap() + 1;
    wait_for("its time", || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_secs() > comes
    });
    b.ok("check back");
    b.ok("key list back --count");
    b.ok("rotate back --if-older-than 1d --passphrase-file DIR/phrase");
    b.ok("mount back mnt --read-only");
    b.fails(&format!("key destroy mnt {old}"), 1, "DIR/back: store is mounted read-only");
    b.ok("unmount mnt");
    assert_eq!(ids(&b, "retired"), [old.as_str()]);
    assert_eq!(b.json(&format!("key destroy back {old} --json"))["outcome"], "destroyed");
}

const TOO_FEW: &str =
    "DIR/back: this store requires 2 different root keys to confirm this, and there is 1: name another with --confirm";

#[test]
fn two_root_keys_must_agree_where_the_store_says_so() {
    let (b, old, _) = rotated();
    b.says("key policy back", 0, "any one root key may destroy KEKs and add root keys\n", "");
    b.fails("key policy back --quorum 2", 1, TOO_FEW);
    let phrase = "--confirm passphrase: --confirm-passphrase-file DIR/phrase";
    let p = b.json(&format!("key policy back --quorum 2 {phrase} --json"));
    assert_eq!(p["quorum"], 2);
    fs::copy(b.path("key"), b.path("copy")).unwrap();
    for once in ["", "--confirm keyfile:DIR/key", "--confirm keyfile:DIR/copy"] {
        b.fails(&format!("key destroy back {old} --yes {once}"), 1, TOO_FEW);
        b.fails(&format!("key destroy back {old} --after 7d --yes {once}"), 1, TOO_FEW);
        b.fails(&format!("key policy back --quorum 1 {once}"), 1, TOO_FEW);
        b.fails(&format!("key add back keyfile:DIR/third {once}"), 1, TOO_FEW);
    }
    b.fails("rotate back --destroy-old --passphrase-file DIR/phrase", 1, TOO_FEW);
    fs::write(b.path("other"), "another phrase\n").unwrap();
    b.chmod("other", 0o600);
    let o = b.run(&format!("key destroy back {old} --yes --confirm passphrase: --confirm-passphrase-file DIR/other"));
    assert_eq!(o.status.code(), Some(4), "{}", b.masked(&o.stderr));
    assert_eq!(ids(&b, "retired"), [old.as_str()]);
    let done = b.ok(&format!("key destroy back {old} --yes {phrase}"));
    assert_eq!(done, "destroyed KEK ID: 2 headers looked at, none names it\n");
    b.ok(&format!("key policy back --quorum 1 {phrase}"));
}

#[test]
fn two_root_keys_must_agree_on_a_mount_too() {
    if !can_mount() {
        return;
    }
    let (b, old, _) = rotated();
    b.ok("mount back mnt --log-file DIR/log");
    let phrase = "--confirm passphrase: --confirm-passphrase-file DIR/phrase";
    b.ok(&format!("key policy mnt --quorum 2 {phrase}"));
    b.fails(&format!("key destroy mnt {old} --yes --confirm keyfile:DIR/key"), 1, TOO_FEW);
    b.fails("key add mnt keyfile:DIR/third", 1, TOO_FEW);
    b.ok(&format!("key destroy mnt {old} --after 1s --yes {phrase}"));
    // What two have scheduled goes without being asked about again.
    wait_for("the daemon to destroy it", || ids(&b, "destroyed") == [old.clone()]);
    b.ok(&format!("key add mnt keyfile:DIR/third {phrase}"));
    b.ok(&format!("key policy mnt --quorum 1 {phrase}"));
}

#[test]
fn a_floor_closes_old_keks_for_trial_and_is_moved_back() {
    if !can_mount() {
        return;
    }
    let (b, old, saved) = rotated();
    let active = ids(&b, "active").remove(0);
    fs::write(b.path("back/f"), &saved).unwrap();
    b.ok("mount back mnt --log-file DIR/log");
    assert_eq!(fs::read(b.path("mnt/g")).unwrap(), b"content");
    b.says("key floor mnt", 0, "files are opened under any KEK of the keyring\n", "");
    b.says(
        &format!("key floor mnt {active}"),
        0,
        "files are opened under KEK ID and newer ones only\nclosed: KEK ID\n",
        "",
    );
    assert_eq!(errno(&b, "mnt/f"), Some(libc::EKEYREVOKED));
    assert_eq!(fs::read(b.path("mnt/g")).unwrap(), b"content");
    assert!(b.ok("key list mnt").contains("closed by the floor: no file is opened under it"));
    let f = b.json("key floor mnt --json");
    assert_eq!((&f["floor"], &f["below"][0]), (&active.clone().into(), &old.clone().into()));
    b.fails("key floor mnt 00", 1, "00 is not a KEK of DIR/back; key list shows their ids");
    b.ok("key floor mnt none");
    assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"content", "at once");
    b.ok("unmount mnt");
    // It holds across mounts; check tells, and a rotation moves what is below.
    fs::write(b.path("back/f"), &saved).unwrap();
    b.ok(&format!("key floor back {active}"));
    let checked = b.ok("check back");
    assert!(checked.contains("kek-below-floor"), "{checked}");
    b.ok("mount back mnt --log-file DIR/log");
    assert_eq!(errno(&b, "mnt/f"), Some(libc::EKEYREVOKED));
    let log = fs::read_to_string(b.path("log")).unwrap();
    assert!(log.contains(&format!("KEK {old} is below the floor")), "{log}");
    b.ok("rotate mnt --passphrase-file DIR/phrase");
    assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"content");
}

/// Whether the copy of the keyring at `file` opens everything in a store that has lost its own.
fn opens_all(b: &Bench, file: &str) {
    b.ok("unmount mnt");
    fs::remove_dir_all(b.path("back/.envelopefs")).unwrap();
    let done = b.json(&format!("key import back {file} --json"));
    assert!(done["generation"].as_u64() > done["imported"].as_u64());
    b.ok("mount back mnt --log-file DIR/log");
    for name in ["f", "g"] {
        assert_eq!(fs::read(b.path("mnt").join(name)).unwrap(), b"content");
    }
    b.ok("unmount mnt");
    b.ok("check back");
}

#[test]
fn rotate_puts_a_copy_of_the_keyring_away_before_the_new_kek_is_used() {
    if !can_mount() {
        return;
    }
    let b = filled();
    let before = ids(&b, "active");
    fs::create_dir(b.path("dir")).unwrap();
    let failures = [
        ("DIR/none/copy", 1, "cannot open DIR/none: No such file or directory"),
        (
            "DIR/dir",
            1,
            "DIR/dir is there, and is no copy of this store's keyring; nothing was written; name another file",
        ),
        (
            "DIR/phrase",
            1,
            "DIR/phrase is there, and is no copy of this store's keyring; nothing was written; name another file",
        ),
    ];
    for (file, code, says) in failures {
        b.fails(&format!("rotate back --passphrase-file DIR/phrase --export {file}"), code, says);
    }
    assert_eq!(ids(&b, "active"), before);
    b.ok("rotate back --passphrase-file DIR/phrase --export DIR/copy");
    assert_eq!(fs::metadata(b.path("copy")).unwrap().permissions().mode() & 0o777, 0o600);
    assert_ne!(ids(&b, "active"), before);
    // Mounted, over the older copy.
    b.ok("mount back mnt --log-file DIR/log");
    b.ok("rotate mnt --passphrase-file DIR/phrase --export DIR/copy --destroy-old");
    b.says(
        "rotate mnt --passphrase-file DIR/phrase --export DIR/copy --if-older-than 1d",
        0,
        "not due: KEK ID is younger than asked for; nothing was done\n",
        "",
    );
    opens_all(&b, "DIR/copy");
}

#[test]
fn a_copy_that_cannot_be_written_keeps_the_new_kek_from_being_used() {
    if !can_mount() || !rustix::process::geteuid().is_root() {
        return;
    }
    let b = filled();
    b.ok("mount back mnt --log-file DIR/log");
    let before = ids(&b, "active");
    // Full only when it comes to writing.
    fs::create_dir(b.path("full")).unwrap();
    rustix::mount::mount(
        "none",
        b.path("full"),
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        Some(c"size=4k,nr_inodes=1"),
    )
    .unwrap();
    for target in ["mnt", "back"] {
        let o = b.run(&format!("rotate {target} --passphrase-file DIR/phrase --export DIR/full/copy"));
        let says = b.masked(&o.stderr);
        assert_eq!(o.status.code(), Some(1), "{says}");
        assert!(says.contains("the new KEK was not made active, and no file was touched"), "{says}");
        assert_eq!(ids(&b, "active"), before);
        if target == "mnt" {
            b.ok("unmount mnt");
        }
    }
    b.ok("rotate back --passphrase-file DIR/phrase --export DIR/copy");
    assert_ne!(ids(&b, "active"), before);
    assert!(ids(&b, "pending").is_empty());
}

#[test]
fn a_store_whose_folder_is_lost_is_not_rebuilt_under_a_daemon() {
    if !can_mount() {
        return;
    }
    let b = filled();
    b.ok("key export back DIR/copy --json");
    b.ok("mount back mnt --log-file DIR/log");
    fs::rename(b.path("back/.envelopefs"), b.path("away")).unwrap();
    let o = b.run("key import back DIR/copy");
    assert_eq!(o.status.code(), Some(7), "{}", b.masked(&o.stderr));
    fs::rename(b.path("away"), b.path("back/.envelopefs")).unwrap();
    opens_all(&b, "DIR/copy");
}

#[test]
fn a_copy_that_holds_more_than_the_store_is_never_replaced() {
    let b = filled();
    let names = ["back/.envelopefs/keyring.a", "back/.envelopefs/keyring.b"];
    let saved = || names.map(|n| fs::read(b.path(n)).unwrap());
    let put_back = |s: &[Vec<u8>; 2]| names.iter().zip(s).for_each(|(n, bytes)| fs::write(b.path(n), bytes).unwrap());
    let refused = |says: &str| {
        let (copy, before) = (fs::read(b.path("copy")).unwrap(), ids(&b, "active"));
        for line in ["rotate back --passphrase-file DIR/phrase --export DIR/copy", "key export back DIR/copy --force"] {
            let o = b.run(line);
            let err = b.masked(&o.stderr);
            assert_eq!(o.status.code(), Some(1), "{line}: {err}");
            assert!(err.contains(says) && err.contains("move it away, or put it back with key import"), "{err}");
        }
        assert_eq!((fs::read(b.path("copy")).unwrap(), ids(&b, "active")), (copy, before));
        assert!(ids(&b, "pending").is_empty());
    };
    // A disk below is put back to a snapshot: the copy alone has the KEK that files are under.
    let before = saved();
    b.ok("rotate back --passphrase-file DIR/phrase --export DIR/copy");
    put_back(&before);
    refused("holds KEK ID, which the present one does not know");
    b.ok("key import back DIR/copy");
    b.ok("check back");
    // It knows no more KEKs, and is newer.
    let before = saved();
    b.ok(&format!("key floor back {}", ids(&b, "active")[0]));
    b.ok("key export back DIR/copy --force");
    put_back(&before);
    refused("is of generation ");
    fs::rename(b.path("copy"), b.path("away")).unwrap();
    b.ok("rotate back --passphrase-file DIR/phrase --export DIR/copy");
    // What is no copy of this keyring is replaced by key export alone.
    fs::write(b.path("copy"), "something else").unwrap();
    b.ok("key export back DIR/copy --force");
}

#[test]
fn a_mount_that_may_not_write_changes_no_root_keys() {
    if !can_mount() {
        return;
    }
    let b = filled();
    let before = fs::read(b.path("back/.envelopefs/keyring.a")).unwrap();
    b.ok("mount back mnt --read-only");
    b.fails("key add mnt keyfile:DIR/other", 1, "DIR/back: store is mounted read-only");
    assert!(!b.path("other").exists());
    let root = b.json("key list back --json")["root_keys"][0]["id"].as_str().unwrap().to_owned();
    b.fails(&format!("key remove mnt {root}"), 1, "DIR/back: store is mounted read-only");
    b.ok("unmount mnt");
    assert_eq!(fs::read(b.path("back/.envelopefs/keyring.a")).unwrap(), before);
}
