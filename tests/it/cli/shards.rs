//! A rotation that several processes share, as several machines would.

use super::support::{Bench, can_mount, wait_for};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Output};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

/// An unmounted store with names in clear and `n` files, named by numbers, some of them in a directory.
fn with_files(n: usize) -> Bench {
    with_files_under("sealed", n)
}

/// The same with its KEK of this kind.
fn with_files_under(kek: &str, n: usize) -> Bench {
    let b = Bench::new();
    b.ok(&format!("init back --key keyfile:DIR/key --plaintext-names --kek {kek}"));
    fill(&b, n, "");
    b
}

/// Makes the files, through a mount with these options.
fn fill(b: &Bench, n: usize, options: &str) {
    b.ok(&format!("mount back mnt {options}"));
    fs::create_dir(b.path("mnt/d")).unwrap();
    (0..n).for_each(|i| fs::write(file(&b.path("mnt"), i), i.to_string()).unwrap());
    fs::hard_link(b.path("mnt/d/0"), b.path("mnt/another name")).unwrap();
    b.ok("unmount mnt");
}

/// The path of file `i` below `at`.
fn file(at: &Path, i: usize) -> PathBuf {
    let dir = if i.is_multiple_of(3) { at.join("d") } else { at.to_path_buf() };
    dir.join(i.to_string())
}

/// That file `i` is there below `at`.
#[track_caller]
fn is_whole(at: &Path, i: usize) {
    assert_eq!(fs::read_to_string(file(at, i)).unwrap(), i.to_string(), "{i} at {}", at.display());
}

fn ended(c: Child) -> Output {
    c.wait_with_output().unwrap()
}

fn report(b: &Bench, name: &str) -> Value {
    let v: Value = serde_json::from_slice(&fs::read(b.path(name)).unwrap()).unwrap();
    v["report"].clone()
}

/// Runs what must fail with `code`, saying all of `says`.
#[track_caller]
fn refused(b: &Bench, line: &str, code: i32, says: &[&str]) {
    let o = b.run(line);
    let said = b.masked(&o.stdout) + &b.masked(&o.stderr);
    assert_eq!(o.status.code(), Some(code), "{line}: {said}");
    for s in says {
        assert!(said.contains(s), "{line}: {s:?} is not in {said}");
    }
}

fn unfinished(b: &Bench) -> bool {
    b.json("status back --json")["rotation_unfinished"] == true
}

#[test]
fn three_shards_at_once_and_a_merge_are_one_rotation() {
    if !can_mount() {
        return;
    }
    let b = with_files(300);
    let before = b.json("key list back --json")["generation"].clone();
    let running: Vec<Child> =
        (1..=3).map(|k| b.spawn(&format!("rotate back --shard {k}/3 --json --report DIR/r{k}"))).collect();
    let outs: Vec<Output> = running.into_iter().map(ended).collect();
    for o in &outs {
        assert_eq!(o.status.code(), Some(0), "{}", b.masked(&o.stderr));
    }
    let shares: Vec<Value> = outs.iter().map(|o| serde_json::from_slice(&o.stdout).unwrap()).collect();
    let sum = |of: &dyn Fn(&Value) -> u64| shares.iter().map(of).sum::<u64>();
    assert_eq!(sum(&|r| r["sweep"]["rewrapped"].as_u64().unwrap()), 300, "each header once");
    assert_eq!(sum(&|r| r["shares"][0]["own"].as_u64().unwrap()), 301, "each name once");
    for (i, r) in shares.iter().enumerate() {
        assert_eq!((&r["outcome"], &r["retired"]), (&"share-complete".into(), &Value::Array(vec![])));
        assert_eq!((&r["target"], &r["shares"][0]["listed"]), (&shares[0]["target"], &301.into()));
        assert_eq!(report(&b, &format!("r{}", i + 1)), *r);
    }
    assert!(unfinished(&b), "not before the merge");
    refused(
        &b,
        "rotate back --status",
        9,
        &["shards    3 of 3 done, 0 begun, 0 never heard of\n", "rotate --merge ends it"],
    );
    let said = b.ok("key verify-report r2 back");
    assert!(said.contains("share      2/3, ") && said.contains("nothing about the other shares"), "{said}");
    // What an earlier rotation had to leave out is proved now.
    let left_out = b.path("back/.envelopefs/rotation/waived.json");
    fs::copy(b.path("r2"), &left_out).unwrap();
    // The merge takes them from the store, or by name.
    let all = b.json("rotate back --merge --json --report DIR/all");
    assert_eq!((&all["outcome"], &all["sweep"]["rewrapped"]), (&"complete".into(), &300.into()));
    assert_eq!((&all["verify"]["current"], &all["target"]), (&301.into(), &shares[0]["target"]));
    assert_eq!((all["shares"].as_array().unwrap().len(), all["retired"].as_array().unwrap().len()), (3, 1));
    assert!(!unfinished(&b) && !left_out.exists());
    let status = b.json("rotate back --status --json");
    assert_eq!((&status["last_rotation"]["state"], &status["shards"]), (&"done".into(), &Value::Array(vec![])));
    // Staged, activated, one KEK retired: no shard wrote the keyring but the first.
    let after = b.json("key list back --json")["generation"].clone();
    assert_eq!(after.as_u64().unwrap(), before.as_u64().unwrap() + 3);
    assert!(b.ok("key verify-report all back").contains("rotation   complete"));
    refused(&b, "rotate back --merge", 1, &["no rotation is unfinished"]);
    b.ok("mount back mnt");
    for (path, content) in [("mnt/d/0", "0"), ("mnt/another name", "0"), ("mnt/299", "299")] {
        assert_eq!(fs::read_to_string(b.path(path)).unwrap(), content);
    }
    refused(&b, "rotate back --shard 1/3", 7, &["is in use by another process (pid PID for mount)"]);
    refused(&b, "rotate back --merge", 7, &["is in use"]);
}

#[test]
fn a_shard_that_was_killed_is_started_again_and_keeps_others_out_while_it_runs() {
    if !can_mount() {
        return;
    }
    let b = with_files(400);
    let mut slow = b.spawn("rotate back --shard 1/2 --rate 3");
    wait_for("the shard's sweep", || b.path("back/.envelopefs/rotation/shard-1-of-2.journal").exists());
    refused(&b, "mount back mnt", 7, &["for rotate shard 1 of 2)"]);
    refused(&b, "rotate back", 7, &["is in use"]);
    refused(&b, "rotate back --shard 1/2", 7, &["share 1/2 of store", "is being worked on"]);
    refused(&b, "rotate back --shard 2/3", 7, &["shards of another division run (2 of them"]);
    refused(&b, "rotate back --shard 2/2 --kek external", 2, &["which is sealed"]);
    refused(&b, "rotate back --merge", 7, &["shards 1/2 are at work"]);
    assert_eq!(b.json("status back --json")["locked"], true);
    // The other one does not mind.
    b.ok("rotate back --shard 2/2");
    let at_work = b.ok("rotate back --status");
    let says = [
        "state     shared out among machines\n",
        "shards    1 of 2 done, 1 begun, 0 never heard of\n  1/2: rewrapping, ",
    ];
    assert!(says.iter().all(|s| at_work.contains(s)) && !at_work.contains("unfinished"), "{at_work}");
    slow.kill().unwrap();
    assert!(!ended(slow).status.success());
    refused(&b, "rotate back --status", 9, &["  1/2: rewrapping, ", "unfinished: when all shards are done"]);
    let short = ["failed: share 1/2: no report of it; last heard ", "(share-missing)", "1 shares are not done"];
    refused(&b, "rotate back --merge", 9, &short);
    assert!(unfinished(&b));
    // Cancelled in order, it leaves no report that says it was done.
    let slow = b.spawn("rotate back --shard 1/2 --rate 3");
    wait_for("the shard's locks", || b.run("rotate back --merge").status.code() == Some(7));
    rustix::process::kill_process(rustix::process::Pid::from_child(&slow), rustix::process::Signal::TERM).unwrap();
    assert_eq!(ended(slow).status.code(), Some(9));
    refused(&b, "rotate back --merge", 9, &short[..2]);
    b.ok("rotate back --shard 1/2");
    assert!(b.ok("rotate back --merge").contains("complete: "));
    assert!(!unfinished(&b));
}

#[test]
fn a_rotation_alone_finishes_what_shards_left() {
    if !can_mount() {
        return;
    }
    let b = with_files(60);
    let said = b.ok("rotate back --shard 1/2 --export DIR/copy");
    assert!(said.contains("share 1/2 is done; the rotation is not complete before all 2 are merged\n"), "{said}");
    // From before the new KEK was active, and with it; one that goes on writes what there is.
    let keyring = || fs::read(b.path("back/.envelopefs/keyring.a")).unwrap();
    assert_ne!(fs::read(b.path("copy")).unwrap(), keyring());
    b.ok("rotate back --shard 1/2 --export DIR/copy");
    assert_eq!(fs::read(b.path("copy")).unwrap(), keyring());
    assert!(unfinished(&b));
    let rest = b.json("rotate back --json");
    assert_eq!((&rest["outcome"], &rest["resumed"]), (&"complete".into(), &true.into()));
    assert!(rest["sweep"]["rewrapped"].as_u64().unwrap() < 60);
    assert!(!unfinished(&b));
    // One that comes late does not begin anew, if it is told when that would be due.
    let late = b.ok("rotate back --shard 2/2 --if-older-than 90d");
    assert!(late.starts_with("not due: "), "{late}");
    assert!(!unfinished(&b));
}

#[test]
fn only_genuine_reports_of_this_rotation_are_merged() {
    if !can_mount() {
        return;
    }
    let (b, other) = (with_files(20), with_files(20));
    for bench in [&b, &other] {
        for k in 1..=2 {
            bench.ok(&format!("rotate back --shard {k}/2 --report DIR/r{k}"));
        }
    }
    let in_store = b.path("back/.envelopefs/rotation/shard-2-of-2.report");
    let good = fs::read_to_string(&in_store).unwrap();
    assert_eq!(good, fs::read_to_string(b.path("r2")).unwrap());
    let generation = b.json("key list back --json")["generation"].clone();
    // Edited, empty, another store's.
    let edited = good.replacen("\"failures_total\": 0", "\"failures_total\": 1", 1);
    assert_ne!(edited, good);
    for bad in [edited, String::new(), fs::read_to_string(other.path("r2")).unwrap()] {
        fs::write(&in_store, &bad).unwrap();
        refused(
            &b,
            "rotate back --merge",
            8,
            &["the report of shard 2/2 in the store: not sealed", "nothing was merged"],
        );
        fs::write(b.path("bad"), &bad).unwrap();
        refused(&b, "rotate back --merge DIR/r1 DIR/bad", 8, &["DIR/bad: not sealed with the key of this store"]);
    }
    fs::write(&in_store, &good).unwrap();
    // The same share twice is not two shares.
    refused(&b, "rotate back --merge DIR/r1 DIR/r1", 9, &["failed: share 2/2: no report of it"]);
    assert_eq!(b.json("key list back --json")["generation"], generation, "nothing was changed");
    b.ok("rotate back --merge DIR/r2 DIR/r1");
    // The next rotation: the reports that lie there are of another one.
    b.ok("rotate back --shard 1/2");
    refused(&b, "rotate back --merge", 9, &["failed: share 2/2: its report is of another rotation, to KEK ID"]);
    refused(
        &b,
        "rotate back --merge DIR/r1 DIR/r2",
        9,
        &["share 1/2: its report is of another", "share 2/2: its report"],
    );
    for (line, says) in [
        ("rotate back --shard 3/2", "1 <= K <= N"),
        ("rotate back --shard 1/2 --restart", "cannot be used with"),
        ("rotate back --shard 1/2 --destroy-old", "cannot be used with"),
        ("rotate back --shard 1/2 --waive DIR/r1", "cannot be used with"),
        ("rotate back --merge --export DIR/r1", "cannot be used with"),
        ("rotate back --merge --waive DIR/r1", "cannot be used with"),
        ("rotate back --merge --dry-run", "cannot be used with"),
    ] {
        refused(&b, line, 2, &[says]);
    }
}

/// A store mounted read-only twice; the first of the two remembers no key of a file.
fn read_twice(b: &Bench) {
    fs::create_dir(b.path("mnt2")).unwrap();
    fs::write(b.path("c.toml"), "[defaults.dek_cache]\nentries = 0\n").unwrap();
    b.ok("mount back mnt --read-only --config DIR/c.toml");
    b.ok("mount back mnt2 --read-only");
}

fn readers_go_on(kek: &str) {
    if !can_mount() {
        return;
    }
    let b = with_files_under(kek, 300);
    read_twice(&b);
    // The second half is opened for the first time when all is over.
    let (over, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|s| {
        for at in ["mnt", "mnt2"] {
            let (at, over, rounds) = (b.path(at), &over, &rounds);
            s.spawn(move || {
                while !over.load(SeqCst) {
                    (0..150).for_each(|i| is_whole(&at, i));
                    rounds.fetch_add(1, SeqCst);
                }
            });
        }
        // Whatever fails here, the readers end.
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, SeqCst);
            }
        }
        let _over = Over(&over);
        let running: Vec<Child> = (1..=3).map(|k| b.spawn(&format!("rotate back --shard {k}/3 --rate 40"))).collect();
        wait_for("the shards", || {
            !b.json("rotate mnt2 --status --json")["shards_at_work"].as_array().unwrap().is_empty()
        });
        for c in running {
            let o = ended(c);
            assert_eq!(o.status.code(), Some(0), "{}", b.masked(&o.stderr));
        }
        // Somebody has the store, and yet nobody rotates it.
        refused(&b, "rotate back --status", 9, &["shards    3 of 3 done", "rotate --merge ends it"]);
        let all = b.json("rotate back --merge --json");
        assert_eq!((&all["outcome"], &all["sweep"]["rewrapped"]), (&"complete".into(), &300.into()));
        let before = rounds.load(SeqCst);
        wait_for("another round of each", || rounds.load(SeqCst) >= before + 4);
    });
    assert!(!unfinished(&b));
    for at in ["mnt", "mnt2"] {
        (0..300).for_each(|i| is_whole(&b.path(at), i));
    }
    // What the old KEK is needed for can be said only when nobody else has the store.
    let ring = b.json("key list back --json");
    let old = ring["keks"].as_array().unwrap().iter().find(|k| k["state"] == "retired").unwrap()["id"].clone();
    let destroy = format!("key destroy back {} --yes", old.as_str().unwrap());
    refused(&b, &destroy, 1, &["store is mounted read-only"]);
    b.ok("unmount mnt");
    refused(&b, &destroy, 1, &["store is mounted read-only"]);
    b.ok("unmount mnt2");
    assert_eq!(fs::read_dir(b.path("run")).unwrap().count(), 0, "sockets");
    b.ok(&destroy);
    b.ok("mount back mnt --read-only");
    (0..300).for_each(|i| is_whole(&b.path("mnt"), i));
}

#[test]
fn read_only_mounts_go_on_while_shards_and_the_merge_run() {
    readers_go_on("sealed");
}

#[test]
fn read_only_mounts_go_on_under_external_keks() {
    readers_go_on("external");
}

#[test]
fn read_only_mounts_share_a_store_with_each_other_and_with_shards_and_with_nobody_else() {
    if !can_mount() {
        return;
    }
    let b = with_files(20);
    read_twice(&b);
    let shared = "is in use by read-only mounts or shards of a rotation (the last to come: pid ";
    fs::create_dir(b.path("mnt3")).unwrap();
    refused(&b, "mount back mnt3", 7, &[shared, "for read only mount)"]);
    refused(&b, "mount back mnt2 --read-only", 11, &["is mounted at DIR/mnt2 already"]);
    let instead = "rotate --shard 1/1 (or K/N on each of N machines) and then rotate --merge do the same";
    for line in ["rotate back", "rotate mnt", "rotate back --detach", "rotate back --export DIR/copy"] {
        refused(&b, line, 7, &["store is mounted read-only at DIR/mnt", instead]);
    }
    assert!(!b.path("copy").exists());
    b.ok("rotate mnt --dry-run");
    refused(&b, "key refresh back", 1, &["store is mounted read-only"]);
    // Each mount has a daemon of its own.
    for at in ["mnt", "mnt2"] {
        let s = b.json(&format!("status {at} --json"));
        assert_eq!(s["mountpoint"], b.path(at).display().to_string());
        assert_eq!((&s["daemon"]["read_only"], &s["other_mountpoints"]), (&true.into(), &Value::Array(vec![])));
    }
    let s = b.json("status back --json");
    assert_eq!(s["mountpoint"], b.path("mnt2").display().to_string());
    assert_eq!(s["other_mountpoints"], serde_json::json!([b.path("mnt").display().to_string()]));
    refused(
        &b,
        "lock back",
        2,
        &["is mounted at DIR/mnt2 and DIR/mnt, each with keys of its own: name the mount point"],
    );
    b.ok("lock mnt2");
    assert_eq!(fs::read(b.path("mnt2/1")).unwrap_err().raw_os_error(), Some(libc::ENOKEY));
    is_whole(&b.path("mnt"), 1);
    // What was changed while the keys were locked is known afterwards.
    b.ok("rotate back --shard 1/1");
    b.ok("rotate mnt --merge");
    assert!(!unfinished(&b));
    b.ok("unlock mnt2 --key keyfile:DIR/key");
    is_whole(&b.path("mnt2"), 1);
    is_whole(&b.path("mnt2"), 2);
    b.ok("rotate mnt2 --dry-run");
    // One that dies does not take the other with it, nor does it keep it from being found.
    let pid = b.json("status mnt2 --json")["daemon"]["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    wait_for("its end", || b.run("status mnt2").status.code() == Some(15));
    is_whole(&b.path("mnt"), 3);
    b.ok("status mnt");
    b.ok("mount back mnt2 --read-only");
    is_whole(&b.path("mnt2"), 3);
    b.ok("unmount mnt");
    refused(&b, "mount back mnt", 7, &[shared]);
    b.ok("unmount mnt2");
    b.ok("mount back mnt");
    refused(&b, "mount back mnt2 --read-only", 7, &["is in use by another process (pid PID for mount)"]);
    refused(&b, "rotate back --shard 1/1", 7, &["is in use by another process (pid PID for mount)"]);
    b.ok("unmount mnt");
    b.ok("mount back mnt2 --read-only");
}

/// It locked the keys of the only daemon that it found, and said that it was done.
#[test]
fn a_read_only_mount_whose_socket_is_gone_is_not_mistaken_for_another_one() {
    if !can_mount() {
        return;
    }
    let b = with_files(3);
    b.ok("mount back mnt --read-only");
    let socket = fs::read_dir(b.path("run")).unwrap().next().unwrap().unwrap().path();
    fs::create_dir(b.path("mnt2")).unwrap();
    b.ok("mount back mnt2 --read-only");
    fs::remove_file(socket).unwrap();
    for line in ["lock mnt", "unlock mnt", "status mnt2 --json", "rotate mnt --dry-run"] {
        match line.contains("mnt2") {
            true => assert_eq!(b.json(line)["mountpoint"], b.path("mnt2").display().to_string()),
            false => refused(&b, line, 7, &["is in use by read-only mounts"]),
        }
    }
    for at in ["mnt", "mnt2"] {
        is_whole(&b.path(at), 1);
    }
    b.ok("unmount mnt");
    b.ok("unmount mnt2");
}

/// A shard that was killed between the two copies left the one that the moved files depend on alone, until the merge.
#[test]
fn a_shard_that_begins_alone_replaces_an_old_copy_of_the_keyring() {
    if !can_mount() {
        return;
    }
    let b = with_files(10);
    let copies = || ["a", "b"].map(|c| fs::read(b.path("back/.envelopefs/keyring.").with_extension(c)).unwrap());
    let [_, old] = copies();
    b.ok("rotate back --shard 1/2");
    fs::write(b.path("back/.envelopefs/keyring.b"), &old).unwrap();
    let o = b.run("rotate back --shard 2/2");
    assert!(o.status.success() && b.masked(&o.stderr).contains("keyring.b is not the keyring in force"), "{o:?}");
    let [x, y] = copies();
    assert!(x == y && x != old);
    b.ok("rotate back --merge");
}

#[test]
fn a_read_only_mount_takes_note_of_a_rotation_also_if_nobody_opens_a_file() {
    if !can_mount() {
        return;
    }
    let b = with_files(3);
    fs::write(b.path("c.toml"), "[defaults]\nrefresh = 1\n").unwrap();
    b.ok("mount back mnt --read-only --log-file DIR/log --config DIR/c.toml");
    b.ok("rotate back --shard 1/1");
    b.ok("rotate back --merge");
    let generation = format!("generation={} ", b.json("key list back --json")["generation"]);
    wait_for("the last keyring", || {
        let log = fs::read_to_string(b.path("log")).unwrap();
        log.lines().any(|l| l.contains("took over the keyring") && l.contains(&generation))
    });
    is_whole(&b.path("mnt"), 1);
}

#[test]
fn a_shard_beside_a_read_only_mount_writes_an_audit_log_of_its_own() {
    if !can_mount() {
        return;
    }
    let b = with_files(5);
    for n in ["mount", "shard"] {
        let log = b.path(&format!("{n}.audit"));
        fs::write(b.path(&format!("{n}.toml")), format!("[defaults]\naudit_log = {log:?}\n")).unwrap();
    }
    b.ok("mount back mnt --read-only --config DIR/mount.toml");
    let says = ["audit log DIR/mount.audit is being written by another process: name another one for this"];
    refused(&b, "rotate back --shard 1/1 --config DIR/mount.toml", 7, &says);
    assert!(!unfinished(&b), "before anything was begun");
    b.ok("rotate back --shard 1/1 --config DIR/shard.toml");
    b.ok("rotate back --merge --config DIR/shard.toml");
    let active = b.json("key list back --json")["keks"].as_array().unwrap()[1]["id"].as_str().unwrap().to_owned();
    is_whole(&b.path("mnt"), 1);
    b.ok("unmount mnt");
    b.ok("audit verify DIR/mount.audit");
    b.ok("audit verify DIR/shard.audit");
    assert!(fs::read_to_string(b.path("mount.audit")).unwrap().contains(&active), "who opened a file under it");
}

/// A daemon cannot ask for a passphrase: what it was opened with opens the KEKs that come, too.
#[test]
fn a_read_only_mount_opens_a_new_kek_with_the_passphrase_or_recovery_key_it_was_opened_with() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    fs::write(b.path("phrase"), "correct horse battery staple\n").unwrap();
    b.chmod("phrase", 0o600);
    let out = b.ok("init back --key passphrase: --passphrase-file DIR/phrase --plaintext-names --recovery-key");
    fs::write(b.path("paper"), super::recovery::printed(&out)).unwrap();
    fill(&b, 4, "--passphrase-file DIR/phrase");
    b.ok("mount back mnt --read-only --passphrase-file DIR/phrase");
    fs::create_dir(b.path("mnt2")).unwrap();
    b.ok("mount back mnt2 --read-only --recovery-file DIR/paper");
    fs::remove_file(b.path("paper")).unwrap();
    fs::rename(b.path("phrase"), b.path("again")).unwrap();
    b.ok("rotate back --shard 1/1 --passphrase-file DIR/again");
    b.ok("rotate back --merge --passphrase-file DIR/again");
    for at in ["mnt", "mnt2"] {
        (0..4).for_each(|i| is_whole(&b.path(at), i));
    }
}
