//! A KEK destroyed by itself, and the keyring exported and put back, on real mounts.

use super::support::{Bench, can_mount, wait_for};
use super::terminal::on_terminal_after;
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// A store with names in clear and a file `f` in it, rotated once; the old KEK's id, and the file from before.
fn rotated() -> (Bench, String, Vec<u8>) {
    let b = Bench::new();
    b.ok("init back --key keyfile:DIR/key --plaintext-names");
    b.ok("mount back mnt --log-file DIR/log");
    for name in ["f", "g"] {
        fs::write(b.path("mnt").join(name), "content").unwrap();
    }
    b.ok("unmount mnt");
    let saved = fs::read(b.path("back/f")).unwrap();
    b.ok("rotate back");
    let ring = b.json("key list back --json");
    let old = ring["keks"].as_array().unwrap().iter().find(|k| k["state"] == "retired").unwrap();
    (b, old["id"].as_str().unwrap().to_owned(), saved)
}

fn wraps(b: &Bench, kek: &str) -> String {
    let ring = b.json("key list back --json");
    let found = ring["keks"].as_array().unwrap().iter().find(|k| k["id"] == kek).unwrap();
    found["state"].as_str().unwrap().to_owned()
}

fn errno(b: &Bench, path: &str) -> Option<i32> {
    fs::read(b.path(path)).err().and_then(|e| e.raw_os_error())
}

#[test]
fn a_retired_kek_is_destroyed_on_a_mount_after_a_scan_and_a_word() {
    if !can_mount() {
        return;
    }
    let (b, old, saved) = rotated();
    b.ok("mount back mnt --log-file DIR/log");
    b.fails(
        &format!("key destroy mnt {old}"),
        2,
        "there is no terminal to confirm on: give --yes to destroy the KEK; see --help",
    );
    b.fails("key destroy mnt none --yes", 1, "none is not a KEK of DIR/back; key list shows their ids");
    let active = b.json("key list mnt --json")["keks"].as_array().unwrap().last().unwrap()["id"].clone();
    b.fails(
        &format!("key destroy mnt {} --yes", active.as_str().unwrap()),
        1,
        "DIR/back: KEK ID is not retired: rotate to another one first",
    );
    // A file from an old backup.
    fs::write(b.path("back/f"), &saved).unwrap();
    b.fails(
        &format!("key destroy mnt {old} --yes"),
        1,
        "DIR/back: KEK ID was not destroyed: 1 header needs it: f; rotate to move them to the active KEK",
    );
    assert_eq!(wraps(&b, &old), "retired");
    assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"content", "a retired KEK opens it");
    b.ok("rotate mnt");
    b.says(&format!("key destroy mnt {old} --yes"), 0, "destroyed KEK ID: 2 headers looked at, none names it\n", "");
    b.says(&format!("key destroy back {old} --yes"), 0, "KEK ID was destroyed already\n", "");
    assert_eq!(wraps(&b, &old), "destroyed");
    assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"content");
}

#[test]
fn a_file_whose_kek_is_destroyed_says_so_everywhere() {
    if !can_mount() {
        return;
    }
    let (b, old, saved) = rotated();
    b.says(&format!("key destroy back {old} --yes"), 0, "destroyed KEK ID: 2 headers looked at, none names it\n", "");
    fs::write(b.path("back/f"), &saved).unwrap();
    let inspected = b.json("inspect back/f --json");
    let slot = &inspected["slots"][0];
    assert_eq!((&slot["kek_state"], &slot["kek"]), (&"destroyed".into(), &old.as_str().into()));
    assert!(slot["kek_destroyed"].as_u64().unwrap() > 0);
    let when = b.ok("inspect back/f").split("destroyed at ").nth(1).unwrap()[..20].to_owned();
    assert!(when.starts_with("20") && when.ends_with('Z'), "{when}");
    b.ok("mount back mnt --log-file DIR/log");
    assert_eq!(errno(&b, "mnt/f"), Some(libc::EKEYREVOKED));
    assert_eq!(fs::read(b.path("mnt/g")).unwrap(), b"content");
    b.ok("unmount mnt");
    let says =
        format!("KEK {old} was destroyed at {when}; only a backup of the keyring from before can open this file");
    let log = fs::read_to_string(b.path("log")).unwrap();
    assert!(log.contains(&says), "{log}");
    let o = b.run("check back");
    assert_eq!(o.status.code(), Some(8));
    let text = String::from_utf8(o.stdout).unwrap();
    assert!(text.contains(&format!("DAMAGE: f: {says} (kek-destroyed)\n")), "{text}");
}

#[test]
fn a_file_from_an_old_backup_opens_and_is_moved_to_the_active_kek_on_the_way() {
    if !can_mount() {
        return;
    }
    let (b, old, saved) = rotated();
    fs::write(b.path("back/f"), &saved).unwrap();
    let states = || {
        let inspected = b.json("inspect back/f --json");
        let slots = inspected["slots"].as_array().unwrap().clone();
        slots.iter().map(|s| s["kek_state"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(states(), ["retired", "retired"]);
    assert!(b.ok("inspect back/f").contains(", retired\n"));
    // A mount that may not write leaves it.
    b.ok("mount back mnt --read-only");
    assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"content");
    b.ok("unmount mnt");
    assert_eq!(states(), ["retired", "retired"]);
    b.ok("mount back mnt --log-file DIR/log");
    assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"content");
    wait_for("the header to be moved", || states() == ["active", "active"]);
    b.ok("unmount mnt");
    let log = fs::read_to_string(b.path("log")).unwrap();
    assert!(log.contains("moved headers of an old backup from retired KEKs to the active one"), "{log}");
    assert!(log.contains("under a KEK thought to be unused") && log.contains(&old), "{log}");
    b.says(&format!("key destroy back {old} --yes"), 0, "destroyed KEK ID: 2 headers looked at, none names it\n", "");
    b.ok("mount back mnt");
    assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"content");
    b.ok("unmount mnt");
}

#[test]
fn the_first_digits_of_the_id_are_the_word_on_a_terminal() {
    let (b, old, _) = rotated();
    let line = format!("key destroy back {old}");
    let (status, shown) = on_terminal_after("of its id: ", b.command(&line), &["yes"]);
    assert_eq!(status.code(), Some(1), "{shown}");
    assert!(shown.contains("that is not it; nothing was destroyed"), "{shown}");
    assert_eq!(wraps(&b, &old), "retired");
    let (status, shown) = on_terminal_after("of its id: ", b.command(&line), &[&old[..8]]);
    assert_eq!(status.code(), Some(0), "{shown}");
    assert_eq!(wraps(&b, &old), "destroyed");
}

#[test]
fn a_keyring_is_exported_and_put_back_when_it_is_lost() {
    let (b, _, _) = rotated();
    let copies = ["back/.envelopefs/keyring.a", "back/.envelopefs/keyring.b"];
    b.says("key export back DIR/copy", 0, "wrote the keyring of store ID, generation 4, to DIR/copy\n", "");
    assert_eq!(fs::read(b.path("copy")).unwrap(), fs::read(b.path(copies[0])).unwrap());
    assert_eq!(fs::metadata(b.path("copy")).unwrap().permissions().mode() & 0o777, 0o600);
    b.fails("key export back DIR/copy", 1, "DIR/copy is there already; nothing was written; --force replaces it");
    b.ok("key export back DIR/copy --force");
    for inside in ["back/copy", "back/.envelopefs/copy"] {
        b.fails(
            &format!("key export back {inside}"),
            2,
            &format!("{inside} would lie in the store, and be lost with it: name a place outside; see --help"),
        );
    }
    assert_eq!(fs::read_dir(b.path("")).unwrap().filter(is_temp).count(), 0);
    copies.iter().for_each(|c| fs::write(b.path(c), "torn").unwrap());
    assert_eq!(b.run("status back").status.code(), Some(8));
    b.says(
        "key import back DIR/copy",
        0,
        "imported the keyring of store ID, generation 4, as generation 5\n\
         kept what was there as .envelopefs/keyring.a.old.1\nkept what was there as .envelopefs/keyring.b.old.1\n",
        "envelopefs: look whether every file opens with it: envelopefs check back\n",
    );
    b.ok("check back");
    b.fails(
        "key import back DIR/copy",
        1,
        "DIR/back: the present keyring is whole, and of generation 5; this one is of 4, and KEKs made since are not in it; \
         --force replaces it all the same, and keeps a copy",
    );
    b.fails("key import back DIR/key", 1, "DIR/key cannot be imported: it is no keyring, or a damaged one");
    b.fails("key import back DIR/none", 1, "cannot read DIR/none: No such file or directory");
}

fn is_temp(e: &std::io::Result<fs::DirEntry>) -> bool {
    e.as_ref().unwrap().file_name().to_string_lossy().starts_with(".copy")
}

#[test]
fn a_mounted_stores_keyring_is_exported_but_not_replaced_and_a_kept_one_is_told_of() {
    if !can_mount() {
        return;
    }
    let (b, old, _) = rotated();
    b.ok("mount back mnt --log-file DIR/log");
    b.ok("key export mnt DIR/copy");
    b.fails(
        "key export mnt mnt/copy",
        2,
        "mnt/copy would lie in the store, and be lost with it: name a place outside; see --help",
    );
    let o = b.run("key import back DIR/copy --force");
    assert_eq!(o.status.code(), Some(7), "{}", b.masked(&o.stderr));
    b.ok("unmount mnt");
    b.ok("key import back DIR/copy --force");
    b.ok("mount back mnt --log-file DIR/log");
    assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"content");
    // That it was unused was found out by another keyring.
    b.fails(
        &format!("key destroy mnt {old} --yes"),
        1,
        "DIR/back: KEK ID may still be needed: rotate to the end first",
    );
    b.ok("rotate mnt");
    assert_eq!(
        b.json("key list back --json")["keks"].as_array().unwrap().len(),
        2,
        "it goes on, with the KEK there is"
    );
    // What import kept holds the KEK still.
    let warning = |c| {
        format!("envelopefs: the replaced keyring .envelopefs/keyring.{c}.old.1 may still hold KEK ID: remove it\n")
    };
    b.says(
        &format!("key destroy mnt {old} --yes"),
        0,
        "destroyed KEK ID: 2 headers looked at, none names it\n",
        &(warning("a") + &warning("b")),
    );
    b.ok("unmount mnt");
    let log = fs::read_to_string(b.path("log")).unwrap();
    assert!(
        log.contains("the replaced keyring .envelopefs/keyring.a.old.1 may still hold this KEK: remove it"),
        "{log}"
    );
    b.ok("check back");
}

#[test]
fn the_audit_log_tells_of_what_destroys_and_imports() {
    if !can_mount() {
        return;
    }
    let (b, old, saved) = rotated();
    let back = b.path("back").display().to_string();
    let audit = b.path("audit").display().to_string();
    fs::write(b.path("c.toml"), format!("[store.s]\nbacking = \"{back}\"\naudit_log = \"{audit}\"\n")).unwrap();
    b.ok("key export back DIR/copy");
    b.ok("mount back mnt --audit-log DIR/audit");
    // Moved by the daemon, and told as any rewrap.
    fs::write(b.path("back/f"), &saved).unwrap();
    assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"content");
    let told = |event: &str, what: &str| {
        let text = fs::read_to_string(b.path("audit")).unwrap();
        text.lines().any(|l| l.contains(&format!("\"event\":\"{event}\"")) && l.contains(what))
    };
    wait_for("the rewrap", || {
        b.ok("audit verify DIR/audit --store mnt");
        told("rewrap", &old)
    });
    b.ok("rotate mnt");
    b.ok(&format!("key destroy mnt {old} --yes"));
    b.ok("unmount mnt");
    assert!(told("kek", &format!("\"kek\":\"{old}\",\"state\":\"destroyed\"")));
    b.ok("key import back DIR/copy --force --config DIR/c.toml");
    assert!(told("keyring-import", "\"result\":\"ok\""));
    assert_ne!(b.run("key import back DIR/copy --config DIR/c.toml").status.code(), Some(0));
    assert!(told("keyring-import", "\"result\":\"other\""));
    b.ok("audit verify DIR/audit --store back");
}

/// An update cut short between the copies leaves the older one in one place.
#[test]
fn a_copy_of_the_keyring_that_an_update_left_as_it_was_is_replaced_by_a_mount() {
    if !can_mount() {
        return;
    }
    let (b, old, _) = rotated();
    let copies = || ["a", "b"].map(|c| fs::read(b.path(&format!("back/.envelopefs/keyring.{c}"))).unwrap());
    let [before, _] = copies();
    b.ok(&format!("key destroy back {old} --yes"));
    fs::write(b.path("back/.envelopefs/keyring.b"), &before).unwrap();
    b.ok("mount back mnt --read-only");
    b.ok("unmount mnt");
    assert_eq!(copies()[1], before, "not by one that may not write");
    b.ok("mount back mnt --log-file DIR/log");
    wait_for("the copy", || copies()[0] == copies()[1]);
    assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"content");
    b.ok("unmount mnt");
    assert_eq!(wraps(&b, &old), "destroyed");
    assert!(
        fs::read_to_string(b.path("log")).unwrap().contains("both copies of the keyring are whole and equal again")
    );
}

#[test]
fn a_root_key_that_only_an_older_copy_of_the_keyring_has_can_be_removed_to_the_end() {
    let b = Bench::new();
    b.ok("init back --key keyfile:DIR/key");
    b.ok("key add back keyfile:DIR/other");
    let copies = || ["a", "b"].map(|c| fs::read(b.path(&format!("back/.envelopefs/keyring.{c}"))).unwrap());
    let [before, _] = copies();
    b.ok("key remove back keyfile:DIR/other");
    fs::write(b.path("back/.envelopefs/keyring.b"), &before).unwrap();
    let o = b.run("key floor back none --open-key keyfile:DIR/other");
    assert_eq!(o.status.code(), Some(4), "{}", b.masked(&o.stderr));
    b.ok("key remove back keyfile:DIR/other");
    let [x, y] = copies();
    assert!(x == y && x != before);
    let o = b.run("key remove back keyfile:DIR/other");
    assert_eq!((o.status.code(), copies()), (Some(13), [x, y]), "{}", b.masked(&o.stderr));
}
