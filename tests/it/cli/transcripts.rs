//! What the program prints, to the letter, with ids masked.

use super::support::{Bench, can_mount};
use std::fs;

const LIST: &str = "keyring   generation 1\n  root key ID keyfile:DIR/key\n  KEK      ID active, sealed\n";

/// What was printed, with its times as `TIME`.
fn timeless(text: &str) -> String {
    let len = "2026-11-24T18:00:00Z".len();
    let is_time = |w: &str| w.len() == len && w.starts_with("20") && w.ends_with('Z');
    let mut out = String::new();
    for word in text.split_inclusive([' ', ',', '\n']) {
        let end = word.trim_end_matches([' ', ',', '\n']);
        out += &word.replace(end, if is_time(end) { "TIME" } else { end });
    }
    out
}

#[test]
fn init_makes_the_key_file_and_the_store_and_says_so() {
    let b = Bench::new();
    b.says(
        "init back --key keyfile:DIR/key",
        0,
        "made key file DIR/key: keep a copy in a safe place\nmade store ID in back\n",
        "envelopefs: this store has one root key: if that is lost so are the files; add a second one (envelopefs key add \
         back recovery:)\n",
    );
    b.fails("init back --key keyfile:DIR/key", 14, "back holds a store already; use an empty directory");
    fs::write(b.path("mnt/x"), "").unwrap();
    b.fails("init mnt --key keyfile:DIR/key", 14, "mnt is not empty; use an empty directory");
    b.says(
        "init new --key keyfile:DIR/key --key keyfile:DIR/other --plaintext-names --kek external",
        0,
        "made key file DIR/other: keep a copy in a safe place\nmade store ID in new\n",
        "",
    );
    let s = b.json("status new --json");
    assert_eq!((&s["plaintext_names"], &s["keyring"]["keks"][0]["kind"]), (&true.into(), &"external".into()));
}

/// A root key that fails after the directory was begun: the next try was told that there is a store already.
#[test]
fn an_init_that_failed_does_not_stand_in_the_way_of_the_next() {
    let b = Bench::new();
    b.ok("init back --key keyfile:DIR/key");
    for copy in ["keyring.a", "keyring.b"] {
        fs::remove_file(b.path("back/.envelopefs").join(copy)).unwrap();
    }
    fs::remove_file(b.path("back/.envelopefs.dir")).unwrap();
    b.ok("init back --key keyfile:DIR/key");
    b.ok("check back --key keyfile:DIR/key");
}

#[test]
fn init_refuses_bad_root_keys() {
    let b = Bench::new();
    b.fails(
        "init back --key keyfile:relative",
        2,
        "root key URI 'keyfile:relative': a key file's path must be absolute: keyfile:/path; see --help",
    );
    fs::write(b.path("open"), [7u8; 32]).unwrap();
    b.chmod("open", 0o644);
    b.fails(
        "init back --key keyfile:DIR/open",
        13,
        "key file DIR/open: mode 0644 lets others at the key; run: chmod 600 DIR/open; \
         check the root key's URI and what it stands for (a key file's mode, a service's settings: docs/KEYS.md)",
    );
    let o = b.run("init back --key vault://transit/k");
    assert_eq!(o.status.code(), Some(13));
    b.fails(
        "init back --passphrase-file DIR/none",
        13,
        "passphrase: DIR/none: No such file or directory; \
         check the root key's URI and what it stands for (a key file's mode, a service's settings: docs/KEYS.md)",
    );
    assert_eq!(fs::read_dir(b.path("back")).unwrap().count(), 0, "nothing was made");
}

#[test]
fn a_store_is_opened_by_its_passphrase_only() {
    let b = Bench::new();
    for (name, text) in [("right", "correct horse\n"), ("wrong", "incorrect horse\n")] {
        fs::write(b.path(name), text).unwrap();
    }
    b.ok("init back --passphrase-file DIR/right");
    let o = b.run("rotate back --dry-run --passphrase-file DIR/wrong");
    assert_eq!(o.status.code(), Some(4), "{}", b.masked(&o.stderr));
    b.command("rotate back --passphrase-command").arg("cat right").output().unwrap();
    assert_eq!(b.json("status back --json")["keyring"]["keks"][0]["state"], "retired");
    let o = b.run("rotate back --dry-run");
    assert_eq!(o.status.code(), Some(13), "no terminal to ask on: {}", b.masked(&o.stderr));
}

#[test]
fn status_of_a_store_that_is_not_mounted() {
    let b = Bench::with_store();
    b.says(
        "status back",
        0,
        &format!("store     ID\nbacking   DIR/back\nmounted   no\nnames     encrypted\n{LIST}"),
        "",
    );
    let listed = LIST.replace(
        "active, sealed\n",
        "active, sealed, less than a minute old\n           created TIME, activated TIME\n           \
         opened by keyfile:DIR/key\n",
    );
    assert_eq!(timeless(&b.ok("key list back")), listed);
    b.fails(
        "status mnt",
        3,
        "DIR/mnt: not an envelopefs store: it has no .envelopefs folder; check the path, or make a store with: \
         envelopefs init mnt",
    );
    b.fails("status none", 3, "none: no such directory; check the path, or make a store with: envelopefs init none");
}

#[test]
fn mount_refuses_what_cannot_work() {
    let b = Bench::with_store();
    b.fails(
        "mount none mnt",
        3,
        "none is not an envelopefs store: No such file or directory; check the path, or make a store with: \
         envelopefs init none",
    );
    b.fails(
        "mount mnt back",
        3,
        "DIR/mnt is not an envelopefs store; check the path, or make a store with: envelopefs init mnt",
    );
    b.fails(
        "mount back none",
        11,
        "mount point none: No such file or directory; use an existing directory outside the backing directory",
    );
    b.fails(
        "mount back key",
        11,
        "mount point key is not a directory; use an existing directory outside the backing directory",
    );
    b.fails(
        "mount back back",
        11,
        "mount point back and backing directory DIR/back overlap; use an existing directory outside the backing directory",
    );
    b.fails("mount back mnt -o bogus", 2, "mount option \"bogus\" is not known; see --help");
    b.fails("mount back", 2, "a mount point is needed, here or in the configuration; see --help");
    b.fails(
        "mount back mnt --bogus",
        2,
        "unexpected argument '--bogus' found; to pass '--bogus' as a value, use '-- --bogus'; see --help",
    );
    b.fails("frobnicate", 2, "unrecognized subcommand 'frobnicate'; a similar subcommand exists: 'rotate'; see --help");
    b.fails(
        "unmount mnt",
        10,
        "no envelopefs is mounted at mnt; mount it first with: envelopefs mount BACKING MOUNTPOINT",
    );
    assert!(!b.is_mounted() && b.is_unlocked());
}

#[test]
fn mount_with_a_key_that_does_not_open_the_store() {
    let b = Bench::with_store();
    fs::write(b.path("other"), [7u8; 32]).unwrap();
    b.chmod("other", 0o600);
    let o = b.run("mount back mnt --key keyfile:DIR/other");
    let said = b.masked(&o.stderr);
    assert_eq!(o.status.code(), Some(4), "{said}");
    assert!(said.starts_with("envelopefs: DIR/back: none of the root keys opens this store"), "{said}");
    assert_eq!(said.lines().count(), 1);
    b.chmod("key", 0o640);
    let o = b.run("mount back mnt");
    assert_eq!(o.status.code(), Some(13));
    assert!(b.masked(&o.stderr).contains("mode 0640 lets others at the key; run: chmod 600 DIR/key"));
    fs::remove_file(b.path("key")).unwrap();
    assert_eq!(b.run("mount back mnt").status.code(), Some(13));
    assert!(!b.is_mounted() && b.is_unlocked());
}

#[test]
fn a_mounted_store_is_locked() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    fs::create_dir(b.path("mnt2")).unwrap();
    let locked = "store DIR/back is in use by another process (pid PID for mount); see who with: envelopefs status back; \
                  unmount it there first";
    b.fails("mount back mnt", 7, locked);
    b.fails("mount back mnt2", 7, locked);
    assert_eq!(b.json("status back --json")["mountpoint"], b.path("mnt").to_str().unwrap());
    assert_eq!(b.json("status mnt --json")["backing"], b.path("back").to_str().unwrap());
    let file = fs::File::create(b.path("mnt/f")).unwrap();
    b.fails("unmount mnt", 12, "mnt is in use; see who uses it with: fuser -vm mnt, and try again when they are done");
    drop(file);
    b.says("unmount mnt", 0, "", "");
    assert!(!b.is_mounted() && b.is_unlocked());
}

#[test]
fn rotate_a_store_that_is_not_mounted() {
    let b = Bench::with_store();
    b.says(
        "rotate back",
        0,
        "complete: 0 files moved to KEK ID\nverified: 0 headers under it in both slots, 0 empty files\n\
         retired KEK ID\n",
        "envelopefs: the keyring has changed: keep a copy outside of the store (envelopefs key export back FILE)\n",
    );
    let o = b.ok("rotate back --destroy-old");
    assert_eq!(o.matches("destroyed KEK ID\n").count(), 2, "{o}");
    b.says("rotate back --dry-run", 0, "dry run: 0 files, 0 empty, 0 under KEK ID already, 0 to move\n", "");
    let not_mounted = "the store is not mounted; mount it first with: envelopefs mount BACKING MOUNTPOINT";
    b.fails("rotate back --pause", 10, &format!("DIR/back: no rotation is under way: {not_mounted}"));
    b.fails(
        "rotate back --detach",
        10,
        &format!("DIR/back: --detach leaves the rotation to the daemon: {not_mounted}"),
    );
    b.fails("rotate back --pause --cancel", 2, "the argument '--pause' cannot be used with '--cancel'; see --help");
    b.fails(
        "rotate back --rate 0",
        2,
        "invalid value '0' for '--rate <N>': number would be zero for non-zero type; see --help",
    );
}

#[test]
fn root_keys_are_added_and_removed() {
    let b = Bench::with_store();
    b.says(
        "key add back keyfile:DIR/second",
        0,
        "made key file DIR/second: keep a copy in a safe place\nadded root key keyfile:DIR/second\n",
        "",
    );
    b.says(
        "key remove back keyfile:DIR/key --open-key keyfile:DIR/second",
        0,
        "removed root key keyfile:DIR/key\n",
        "",
    );
    let o = b.run("rotate back --dry-run --open-key keyfile:DIR/key");
    assert_eq!(o.status.code(), Some(4), "the removed key opens nothing any more");
    b.ok("rotate back");
    let o = b.run("key remove back keyfile:DIR/second");
    assert_eq!(o.status.code(), Some(1));
    assert!(b.masked(&o.stderr).contains("last root key"), "{}", b.masked(&o.stderr));
    b.ok("key add back --key keyfile:DIR/third");
    assert_eq!(b.run("key add back").status.code(), Some(2));
    let o = b.run("key remove back keyfile:DIR/nobody");
    assert_eq!(o.status.code(), Some(13));
}

#[test]
fn rotate_if_older_than_leaves_a_young_kek_alone() {
    let b = Bench::with_store();
    let not_due = "not due: KEK ID is younger than asked for; nothing was done\n";
    b.says("rotate back --if-older-than 90d", 0, not_due, "");
    assert_eq!(b.json("rotate back --if-older-than 90d --json")["outcome"], "not-due");
    assert_eq!(b.json("status back --json")["keyring"]["generation"], 1);
    b.ok("rotate back --if-older-than 0s");
    let bad = "invalid value '90' for '--if-older-than <AGE>': an age is a number and d, h, m or s, such as 90d";
    b.fails("rotate back --if-older-than 90", 2, &format!("{bad}; see --help"));
}

#[test]
fn rotate_can_move_a_store_to_another_root_key() {
    let b = Bench::with_store();
    fs::write(b.path("next"), [9u8; 32]).unwrap();
    b.chmod("next", 0o600);
    b.ok("rotate back --key keyfile:DIR/next");
    b.ok("rotate back --dry-run --open-key keyfile:DIR/next");
    let o = b.run("rotate back --key keyfile:DIR/absent");
    assert_eq!(o.status.code(), Some(13), "rotate makes no key file");
    assert!(!b.path("absent").exists());
}

#[test]
fn inspect_says_what_a_header_holds() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    b.ok("init back --key keyfile:DIR/key --plaintext-names");
    b.ok("mount back mnt");
    fs::write(b.path("mnt/f"), "hello").unwrap();
    fs::write(b.path("mnt/empty"), "").unwrap();
    b.ok("unmount mnt");
    let slot =
        "format 1, aes-256-gcm-siv, sequence 1\n    store ID\n    file  ID\n    KEK   ID, sealed, 60 bytes wrapped\n";
    b.says(
        "inspect back/f",
        0,
        &format!(
            "back/f\n  plaintext 5 bytes, 1 blocks in 1 segments; backing file 4101 bytes\n  slot A (counts): {slot}  slot B: {slot}"
        ),
        "",
    );
    b.says(
        "inspect back/empty",
        0,
        "back/empty\n  plaintext 0 bytes, 0 blocks in 0 segments; backing file 0 bytes\n  empty: no header, no key\n",
        "",
    );
    b.fails("inspect back", 2, "back is not a regular file; see --help");
    b.fails("inspect none", 1, "cannot read none: No such file or directory");
    fs::write(b.path("short"), "x").unwrap();
    let o = b.run("inspect short");
    assert_eq!(o.status.code(), Some(8));
    fs::write(b.path("junk"), [0x5au8; 5000]).unwrap();
    let o = b.run("inspect junk --json");
    assert_eq!(o.status.code(), Some(8));
    let v: serde_json::Value = serde_json::from_slice(&o.stdout).unwrap();
    assert_eq!((&v["slots"][0]["code"], &v["authoritative"]), (&"header-magic".into(), &serde_json::Value::Null));
}

#[test]
fn check_finds_what_is_wrong_and_says_where() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    b.ok("init back --key keyfile:DIR/key --plaintext-names");
    b.ok("mount back mnt");
    fs::write(b.path("mnt/f"), "hello").unwrap();
    let o = b.run("check back");
    assert_eq!(o.status.code(), Some(0));
    let in_use = "envelopefs: the store is in use: what is being written just now may show as unfinished\n";
    assert_eq!(b.masked(&o.stderr), in_use);
    b.ok("unmount mnt");
    b.says(
        "check back --deep",
        0,
        "checked 1 file in 1 directory, 4.0 KiB: every block authenticated\n0 objects damaged, 0 warnings, 0 notes\n",
        "",
    );
    let mut bytes = fs::read(b.path("back/f")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(b.path("back/f"), &bytes).unwrap();
    b.says(
        "check back --deep",
        8,
        "DAMAGE: f: block 0 does not authenticate (block-auth)\n\
         checked 1 file in 1 directory, 4.0 KiB: every block authenticated\n1 object damaged, 0 warnings, 0 notes\n",
        "envelopefs: back: 1 object damaged; look closer with: envelopefs check --deep back; restore what it names from a backup\n",
    );
    fs::remove_file(b.path("key")).unwrap();
    let o = b.run("check back");
    assert_eq!(o.status.code(), Some(0));
    assert!(b.masked(&o.stderr).starts_with("envelopefs: checking without keys, which sees less: "));
    assert!(b.masked(&o.stdout).contains("structure only, without keys\n"));
    b.says("check back --no-key", 0, &b.masked(&o.stdout), "");
    assert_eq!(b.run("check back --deep").status.code(), Some(13), "deep needs a key");
    b.fails(
        "check mnt",
        3,
        "mnt is not an envelopefs store; check the path, or make a store with: envelopefs init mnt",
    );
}

#[test]
fn configuration_files_are_read_strictly() {
    let b = Bench::with_store();
    fs::write(b.path("bad.toml"), "[store.x]\nbacking = \"/x\"\ncolour = 3\n").unwrap();
    let o = b.run("mount x mnt --config bad.toml");
    assert_eq!(o.status.code(), Some(16));
    let said = b.masked(&o.stderr);
    assert!(said.starts_with("envelopefs: configuration bad.toml: line 3: unknown field `colour`"), "{said}");
    assert_eq!(said.lines().count(), 1);
    b.fails(
        "mount x mnt --config none.toml",
        16,
        "configuration none.toml: No such file or directory; compare with config.example.toml",
    );
}

#[test]
fn a_store_is_mounted_by_its_name() {
    if !can_mount() {
        return;
    }
    let b = Bench::with_store();
    let (back, mnt) = (b.path("back"), b.path("mnt"));
    fs::write(b.path("c.toml"), format!("[store.x]\nbacking = {back:?}\nmountpoint = {mnt:?}\nread_only = true\n"))
        .unwrap();
    b.says("mount x --config c.toml", 0, "", "");
    assert_eq!(fs::write(b.path("mnt/f"), "x").unwrap_err().raw_os_error(), Some(libc::EROFS));
    assert_eq!(b.json("status mnt --json")["daemon"]["read_only"], true);
    b.ok("unmount mnt");
}

#[test]
fn help_manual_and_completions_are_generated() {
    let b = Bench::new();
    let help = b.ok("--help");
    let man = b.ok("man");
    for c in ["init", "mount", "unmount", "status", "rotate", "key", "check", "inspect", "speed", "completions", "man"]
    {
        assert!(help.contains(&format!("\n  {c} ")), "{c} in --help");
        assert!(man.contains(&format!("ENVELOPEFS {}\"", c.to_uppercase())), "{c} in man");
        assert!(b.ok(&format!("{c} --help")).contains("Usage: envelopefs"), "{c} --help");
    }
    assert!(!help.contains("mount-helper") && !man.contains("ready-fd"));
    assert!(man.starts_with(".ie") && man.contains("EXIT STATUS"));
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(b.ok(&format!("completions {shell}")).contains("rotate"), "{shell}");
    }
    assert_eq!(b.ok("--version"), format!("envelopefs {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(b.run("").status.code(), Some(2));
}
