//! Recovery keys and second root keys: what an operator does when the usual root key is lost, from one end to the other.

use super::support::{Bench, can_mount};
use super::terminal::on_terminal;
use std::fs::{self, File};
use std::path::Path;

const BEFORE: &str = "\nThe recovery key, shown this once. Write it down and keep it away from this machine:\n\n    ";
const AFTER: &str =
    "\n\nWhoever has it can read the store, also when every other root key is lost (mount --recovery).\n\n";
const USED: &str = "envelopefs: the store was opened with its recovery key: replace that when other root keys work again \
                    (key remove, then key add recovery:)\n";

/// The recovery key in what was printed, which must stand in its frame.
#[track_caller]
pub fn printed(out: &str) -> String {
    let (_, rest) = out.split_once(BEFORE).unwrap_or_else(|| panic!("{out}"));
    let (key, end) = rest.split_at(69);
    assert_eq!(end, AFTER);
    key.to_owned()
}

/// A store with a key file and a recovery key, which lies in `paper`.
fn with_recovery() -> Bench {
    let b = Bench::new();
    let out = b.ok("init back --key keyfile:DIR/key --recovery-key");
    fs::write(b.path("paper"), printed(&out)).unwrap();
    b
}

/// The recorded URI of the recovery key.
fn uri(b: &Bench) -> String {
    let list = b.json("key list back --json");
    let mut uris = list["root_keys"].as_array().unwrap().iter().map(|r| r["uri"].as_str().unwrap().to_owned());
    uris.rfind(|u| u.starts_with("recovery:")).expect("a recovery key")
}

fn roots(b: &Bench) -> usize {
    b.json("key list back --json")["root_keys"].as_array().unwrap().len()
}

fn contains(dir: &Path, needle: &[u8]) -> bool {
    fs::read_dir(dir).unwrap().map(Result::unwrap).any(|e| {
        if e.file_type().unwrap().is_dir() {
            return contains(&e.path(), needle);
        }
        fs::read(e.path()).unwrap().windows(needle.len()).any(|w| w == needle)
    })
}

#[test]
fn init_prints_a_recovery_key_once_and_keeps_it_nowhere() {
    let b = Bench::new();
    let o = b.run("init back --key keyfile:DIR/key --recovery-key");
    assert_eq!((o.status.code(), b.masked(&o.stderr).as_str()), (Some(0), ""));
    let out = String::from_utf8(o.stdout).unwrap();
    let key = printed(&out);
    assert!(out.starts_with("made key file "), "{out}");
    assert_eq!(b.json("key list back --json")["root_keys"][1]["uri"], uri(&b));
    for form in [key.clone(), key.replace('-', ""), key.to_lowercase()] {
        assert!(!contains(&b.path(""), form.as_bytes()));
    }
    b.fails(
        "init new --key keyfile:DIR/key --recovery-key --kek external",
        2,
        "--recovery-key: a recovery key does not open files under an external KEK; use --kek sealed; see --help",
    );
    assert!(!b.path("new").exists());
}

#[test]
fn the_recovery_key_opens_a_store_that_lost_its_key_file_and_only_when_asked_for() {
    let b = with_recovery();
    b.ok("rotate back");
    fs::remove_file(b.path("key")).unwrap();
    b.fails(
        "rotate back --dry-run",
        13,
        "DIR/back: root key not found: key file DIR/key: No such file or directory; the recovery key opens it too, with \
         --recovery; check the root key's URI and what it stands for (a key file's mode, a service's settings: docs/KEYS.md)",
    );
    let o = b.run("rotate back --dry-run --recovery-file DIR/paper");
    assert_eq!((o.status.code(), b.masked(&o.stderr).as_str()), (Some(0), USED));
    let o = b.run("check back --recovery-file DIR/paper");
    assert_eq!((o.status.code(), b.masked(&o.stderr).as_str()), (Some(0), USED));
    let o = b.run("rotate back --recovery");
    assert_eq!(o.status.code(), Some(13));
    assert!(b.masked(&o.stderr).starts_with("envelopefs: recovery key: no terminal to ask on"), "{o:?}");
    // Back to normal, without a mount: a new key file in, the lost one out.
    b.ok("key add back keyfile:DIR/new --recovery-file DIR/paper");
    b.ok("key remove back keyfile:DIR/key --open-key keyfile:DIR/new");
    b.ok("rotate back --open-key keyfile:DIR/new");
    b.ok("rotate back --dry-run --recovery-file DIR/paper");
}

#[test]
fn a_mistyped_key_is_told_from_a_wrong_one() {
    let b = with_recovery();
    let key = fs::read_to_string(b.path("paper")).unwrap();
    let mut slip: Vec<char> = key.chars().collect();
    slip[12] = if slip[12] == 'Q' { 'R' } else { 'Q' };
    fs::write(b.path("slip"), slip.iter().collect::<String>()).unwrap();
    b.fails(
        "mount back mnt --recovery-file DIR/slip",
        13,
        "recovery key: mistyped: look at group 3; check the root key's URI and what it stands for (a key file's mode, a service's settings: docs/KEYS.md)",
    );
    fs::write(b.path("short"), &key[..40]).unwrap();
    let o = b.run("mount back mnt --recovery-file DIR/short");
    assert!(b.masked(&o.stderr).contains("mistyped: 32 characters, and it has 56 in groups of 4"));
    fs::write(b.path("spoken"), format!("{}\n", key.to_lowercase().replace('-', " ").replace('o', "0"))).unwrap();
    b.ok("rotate back --dry-run --recovery-file DIR/spoken");
    let out = b.ok("init other --key keyfile:DIR/key --recovery-key");
    fs::write(b.path("others"), printed(&out)).unwrap();
    let o = b.run("mount back mnt --recovery-file DIR/others");
    assert_eq!(o.status.code(), Some(4), "{}", b.masked(&o.stderr));
    assert!(b.masked(&o.stderr).contains("well-formed, but not this store's"));
    b.ok("init third --key keyfile:DIR/key");
    let o = b.run("mount third mnt --recovery-file DIR/others");
    assert_eq!(o.status.code(), Some(13));
    assert!(b.masked(&o.stderr).contains("this store has no recovery key"));
    assert!(!b.is_mounted());
}

#[test]
fn break_glass_and_back_on_a_mounted_store() {
    if !can_mount() {
        return;
    }
    let b = with_recovery();
    b.ok("mount back mnt");
    fs::write(b.path("mnt/f"), "precious").unwrap();
    b.ok("rotate mnt --destroy-old");
    b.ok("unmount mnt");
    fs::remove_file(b.path("key")).unwrap();

    let o = b.run("mount back mnt --recovery-file DIR/paper --log-file DIR/log --audit-log DIR/audit");
    assert_eq!((o.status.code(), b.masked(&o.stderr).as_str()), (Some(0), USED));
    let log = fs::read_to_string(b.path("log")).unwrap();
    assert!(log.contains("WARN") && log.contains("opened with its recovery key"), "{log}");
    assert_eq!(fs::read_to_string(b.path("mnt/f")).unwrap(), "precious");
    let old = uri(&b);
    b.ok("audit verify DIR/audit --store mnt");
    let told = fs::read_to_string(b.path("audit")).unwrap();
    let used = format!("\"operation\":\"unwrap\",\"key\":\"store-secret\",\"provider\":\"{old}\"");
    assert!(told.lines().any(|l| l.contains(&used) && l.contains("\"result\":\"ok\"")), "{told}");
    let o = b.run("key remove mnt keyfile:DIR/key");
    assert!(b.masked(&o.stderr).contains("the last root key besides the recovery key"), "{}", b.masked(&o.stderr));
    b.ok("key add mnt keyfile:DIR/new");
    b.ok("key remove mnt keyfile:DIR/key");
    b.ok(&format!("key remove mnt {old}"));
    let out = b.ok("key add mnt recovery:");
    assert!(out.starts_with(&format!("added root key {}\n", uri(&b))), "{out}");
    fs::write(b.path("paper2"), printed(&out)).unwrap();
    assert_ne!(uri(&b), old);
    b.ok("rotate mnt --destroy-old");
    b.ok("unmount mnt");

    let o = b.run("mount back mnt --recovery-file DIR/paper");
    assert_eq!(o.status.code(), Some(4), "the key that was used opens nothing any more");
    for way_in in ["", "--recovery-file DIR/paper2"] {
        b.ok(&format!("mount back mnt {way_in}"));
        assert_eq!(fs::read_to_string(b.path("mnt/f")).unwrap(), "precious");
        b.ok("unmount mnt");
    }
}

#[test]
fn the_recovery_key_is_typed_on_a_terminal_and_a_slip_is_asked_about_again() {
    if !can_mount() {
        return;
    }
    let b = with_recovery();
    let key = fs::read_to_string(b.path("paper")).unwrap();
    let slip = format!("{}{}", if key.starts_with('Q') { 'R' } else { 'Q' }, &key[1..]);
    let (status, shown) = on_terminal(b.command("mount back mnt --recovery"), &[&slip, &key.to_lowercase()]);
    assert_eq!(status.code(), Some(0), "{shown}");
    assert_eq!(shown.matches("Recovery key: ").count(), 2, "{shown}");
    assert!(shown.contains("mistyped: look at group 1"), "{shown}");
    assert!(shown.contains("the store was opened with its recovery key"), "{shown}");
    assert!(!shown.contains(&key[5..20]) && !shown.contains(&key[5..20].to_lowercase()), "it is not echoed");
    b.ok("unmount mnt");
    let (status, shown) = on_terminal(b.command("mount back mnt --recovery"), &[&slip, &slip, &slip, &slip]);
    assert_eq!(status.code(), Some(13), "{shown}");
    assert_eq!(shown.matches("Recovery key: ").count(), 3, "{shown}");
    assert!(!b.is_mounted() && b.is_unlocked());
}

#[test]
fn a_recovery_key_that_nobody_could_see_is_taken_out_again() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let b = Bench::with_store();
    let check = |target: &str| {
        let o = b.command(&format!("key add {target} recovery:")).stdout(full()).output().unwrap();
        let said = b.masked(&o.stderr);
        assert_eq!(o.status.code(), Some(1), "{said}");
        assert!(said.contains("the recovery key was not shown") && said.contains("taken out of the keyring"), "{said}");
        assert_eq!(roots(&b), 1);
    };
    check("back");
    if can_mount() {
        b.ok("mount back mnt");
        check("mnt");
        b.ok("unmount mnt");
    }
    let o = b.command("init new --key keyfile:DIR/key --recovery-key").stdout(full()).output().unwrap();
    assert_eq!(o.status.code(), Some(1), "{}", b.masked(&o.stderr));
}

#[test]
fn a_recovery_key_is_made_and_entered_and_never_named() {
    let b = with_recovery();
    let uri = uri(&b);
    for line in [
        "init new --key recovery:".to_owned(),
        format!("init new --key {uri}"),
        "rotate back --key recovery:".to_owned(),
        format!("rotate back --key {uri}"),
        format!("mount back mnt --key {uri}"),
        format!("key add back {uri}"),
    ] {
        let o = b.run(&line);
        assert_eq!(o.status.code(), Some(2), "{line}: {}", b.masked(&o.stderr));
        assert!(b.masked(&o.stderr).contains("a recovery key cannot be named here"), "{line}");
    }
    // A second one beside the first is in order.
    let out = b.ok("key add back recovery:");
    fs::write(b.path("paper2"), printed(&out)).unwrap();
    for paper in ["paper", "paper2"] {
        b.ok(&format!("rotate back --recovery-file DIR/{paper}"));
    }
    b.fails(
        "check back --no-key --recovery",
        2,
        "the argument '--no-key' cannot be used with '--recovery'; see --help",
    );
}

#[test]
fn the_second_root_key_mounts_the_store_and_the_first_is_named_with_why() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    b.ok("init back --key keyfile:DIR/first --key keyfile:DIR/second");
    fs::rename(b.path("first"), b.path("away")).unwrap();
    let said = "the store was opened without its root key keyfile:DIR/first: root key not found: key file DIR/first: No \
                such file or directory";
    let o = b.run("mount back mnt --log-file DIR/log");
    assert_eq!((o.status.code(), b.masked(&o.stderr)), (Some(0), format!("envelopefs: {said}\n")));
    assert!(b.masked(&fs::read(b.path("log")).unwrap()).contains(said));
    fs::write(b.path("mnt/f"), "x").unwrap();
    let o = b.run("rotate mnt");
    assert!(b.masked(&o.stderr).contains("root key keyfile:DIR/first must wrap the new KEK too"), "{o:?}");
    fs::rename(b.path("away"), b.path("first")).unwrap();
    b.ok("unmount mnt");
    b.says("mount back mnt", 0, "", "");
    b.ok("rotate mnt");
    b.ok("unmount mnt");
    // Whichever of the two is there opens what the rotation made.
    for (lost, place) in [("first", "away1"), ("second", "away2")] {
        fs::rename(b.path(lost), b.path(place)).unwrap();
        b.ok("mount back mnt");
        assert_eq!(fs::read_to_string(b.path("mnt/f")).unwrap(), "x");
        b.ok("unmount mnt");
        fs::rename(b.path(place), b.path(lost)).unwrap();
    }
    // Others may read it: refused, and the second one opens.
    b.chmod("first", 0o644);
    let o = b.run("mount back mnt");
    assert!(b.masked(&o.stderr).contains("without its root key keyfile:DIR/first: key file DIR/first: mode 0644"));
    b.ok("unmount mnt");
}

#[test]
fn refresh_says_how_each_root_key_stands() {
    let b = with_recovery();
    fs::write(b.path("pass"), "correct horse\n").unwrap();
    b.ok("key add back passphrase: --new-passphrase-file DIR/pass");
    b.ok("rotate back --passphrase-file DIR/pass");
    let uri = uri(&b);
    let says = |now: &str| {
        let line = |u: &str| format!("root key ID {u}: {now}, 3 current\n");
        [line("keyfile:DIR/key"), line(&uri), line("passphrase:")].concat()
    };
    b.says("key refresh back", 0, &says("0 moved to its newest version"), "");
    b.says("key refresh back --dry-run", 0, &says("0 due"), "");
    if can_mount() {
        b.ok("mount back mnt");
        b.says("key refresh mnt", 0, &says("0 moved to its newest version"), "");
        b.ok("unmount mnt");
        b.ok("mount back mnt --read-only");
        b.says("key refresh mnt --dry-run", 0, &says("0 due"), "");
        b.fails("key refresh mnt", 1, "DIR/back: store is mounted read-only");
        b.ok("unmount mnt");
    }
}
