//! The audit log and the metrics, on real mounts.

use super::support::{Bench, can_mount, wait_for};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const NOBODY: u32 = 65534;
const STRANGER: u32 = 54321;

/// A store with names in clear, mounted with an audit log at `DIR/audit`, that other users get to.
fn mounted() -> Bench {
    let b = Bench::new();
    b.chmod("", 0o755);
    b.ok("init back --key keyfile:DIR/key --plaintext-names");
    mount(&b, "");
    b.chmod("mnt", 0o777);
    b
}

fn mount(b: &Bench, more: &str) {
    let other = if rustix::process::geteuid().is_root() { "--allow-other" } else { "" };
    b.ok(&format!("mount back mnt --audit-log DIR/audit --log-file DIR/log {other} {more}"));
}

/// The records of a file.
fn records(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
}

/// The records so far of a mounted store's log, after a check of its chain and its seals.
fn told(b: &Bench) -> Vec<Value> {
    b.ok("audit verify DIR/audit --store mnt");
    records(&b.path("audit"))
}

fn of<'a>(records: &'a [Value], event: &str) -> Vec<&'a Value> {
    records.iter().filter(|r| r["event"] == event).collect()
}

/// Those of `of` that are about files' keys.
fn deks<'a>(records: &'a [Value], event: &str) -> Vec<&'a Value> {
    of(records, event).into_iter().filter(|r| r["key"] == "dek").collect()
}

fn text(v: &Value) -> &str {
    v.as_str().unwrap_or_else(|| panic!("no text: {v}"))
}

fn file_id(b: &Bench, name: &str) -> String {
    text(&b.json(&format!("inspect back/{name} --json"))["slots"][0]["file_id"]).to_owned()
}

fn kek(b: &Bench, state: &str) -> String {
    let keks = b.json("key list back --json")["keks"].clone();
    text(&keks.as_array().unwrap().iter().find(|k| k["state"] == state).unwrap()["id"]).to_owned()
}

/// Runs a script as a user; returns the shell's process id.
fn as_user(uid: u32, at: &Path, script: &str) -> u32 {
    let mut c = Command::new("/bin/sh");
    c.args(["-ec", script]).current_dir(at).uid(uid).gid(uid).stdout(Stdio::null());
    let mut child = c.spawn().unwrap();
    assert!(child.wait().unwrap().success(), "{script}");
    child.id()
}

fn program(name: &str) -> String {
    fs::canonicalize(name).unwrap().display().to_string()
}

#[test]
fn lines_name_the_caller_his_program_and_the_file() {
    if !can_mount() || !rustix::process::geteuid().is_root() {
        return;
    }
    let b = mounted();
    let writer = as_user(NOBODY, &b.path("mnt"), "printf x > f");
    let lines = told(&b);
    let (file, active) = (file_id(&b, "f"), kek(&b, "active"));
    let wraps = deks(&lines, "wrap");
    assert_eq!(wraps.len(), 1, "{lines:?}");
    let w = wraps[0];
    assert_eq!((text(&w["file"]), text(&w["kek"]), text(&w["provider"])), (&*file, &*active, "sealed"));
    assert_eq!((&w["pid"], &w["uid"], &w["result"]), (&writer.into(), &NOBODY.into(), &"ok".into()));
    assert_eq!(text(&w["exe"]), program("/bin/sh"));
    assert!(w["latency_us"].is_u64() && text(&w["time"]).ends_with('Z') && text(&w["time"]).len() == 24);
    assert_eq!(text(&w["store"]), text(&b.json("status back --json")["store"]));

    // Nobody has the key in memory after this.
    b.ok("unmount mnt");
    mount(&b, "");
    let before = deks(&told(&b), "unwrap").len();
    as_user(NOBODY, &b.path("mnt"), "ls -l; stat f; mv f g; chmod 644 g; mv g f");
    assert_eq!(deks(&told(&b), "unwrap").len(), before, "none of that takes a key");
    let reader = as_user(STRANGER, &b.path("mnt"), "exec cat f");
    let cutter = as_user(NOBODY, &b.path("mnt"), "exec truncate -s 5 f");
    let lines = told(&b);
    let unwraps = deks(&lines, "unwrap");
    assert_eq!(unwraps.len(), before + 1, "the key is unwrapped once and then cached: {unwraps:?}");
    let u = unwraps[before];
    assert_eq!((text(&u["file"]), text(&u["kek"])), (&*file, &*active));
    assert_eq!((&u["pid"], &u["uid"]), (&reader.into(), &STRANGER.into()));
    assert_eq!(text(&u["exe"]), program("/bin/cat"));
    assert_ne!(reader, cutter);
    // The daemon's own uses have no caller; those of root keys name them.
    let opened: Vec<_> = of(&lines, "unwrap").into_iter().filter(|r| r["key"] == "kek").collect();
    assert!(opened.iter().all(|r| r["pid"].is_null() && text(&r["provider"]).starts_with("keyfile:/")));
    assert_eq!(opened.len(), 2);
    assert_eq!(of(&lines, "mount").len(), 2);
    b.ok("unmount mnt");
    let lines = records(&b.path("audit"));
    assert_eq!(of(&lines, "unmount").len(), 2);
    assert_eq!(lines.last().unwrap()["event"], "seal");
}

#[test]
fn a_truncation_by_name_is_told_of_who_made_it() {
    if !can_mount() || !rustix::process::geteuid().is_root() {
        return;
    }
    let b = mounted();
    as_user(NOBODY, &b.path("mnt"), "printf 0123456789 > f");
    b.ok("unmount mnt");
    mount(&b, "");
    let before = deks(&told(&b), "unwrap").len();
    let script = "import os; os.truncate('f', 3)";
    let who = as_user(NOBODY, &b.path("mnt"), &format!("exec python3 -c \"{script}\""));
    let lines = told(&b);
    let unwraps = deks(&lines, "unwrap");
    assert_eq!(unwraps.len(), before + 1);
    assert_eq!((&unwraps[before]["pid"], &unwraps[before]["uid"]), (&who.into(), &NOBODY.into()));
}

#[test]
fn a_rotation_is_told_step_by_step_and_counted_as_in_its_report() {
    if !can_mount() {
        return;
    }
    let b = mounted();
    for i in 0..7 {
        fs::write(b.path("mnt").join(i.to_string()), i.to_string()).unwrap();
    }
    let old = kek(&b, "active");
    let report = b.json("rotate mnt --destroy-old --json");
    let target = text(&report["target"]);
    let lines = told(&b);
    let rewraps = deks(&lines, "rewrap");
    assert_eq!(report["sweep"]["rewrapped"], rewraps.len());
    assert_eq!(rewraps.len(), 7);
    assert!(rewraps.iter().all(|r| text(&r["kek"]) == target && text(&r["from_kek"]) == old && r["pid"].is_null()));
    let files: BTreeSet<_> = rewraps.iter().map(|r| text(&r["file"]).to_owned()).collect();
    assert_eq!(files, (0..7).map(|i| file_id(&b, &i.to_string())).collect());
    let rotate = of(&lines, "rotate");
    let steps: Vec<_> = rotate.iter().map(|r| text(&r["step"])).collect();
    assert_eq!(steps, ["staged", "activated", "sweeping", "verifying", "retiring", "done"]);
    assert!(rotate.iter().all(|r| text(&r["kek"]) == target && r["result"] == "ok"));
    for (name, n) in rotate.last().unwrap()["counts"].as_object().unwrap() {
        let reported = match name.as_str() {
            "failures_total" => report["failures_total"].clone(),
            "waived" => report["waived"].as_array().unwrap().len().into(),
            swept => report["sweep"][swept].clone(),
        };
        assert_eq!(*n, reported, "{name}");
    }
    let states: Vec<_> = of(&lines, "kek").iter().map(|r| (text(&r["kek"]), text(&r["state"]))).collect();
    let o = old.as_str();
    assert_eq!(states, [(target, "created"), (o, "retired"), (target, "activated"), (o, "unused"), (o, "destroyed")]);
    // A dry run does nothing that is to be told.
    let before = told(&b).iter().filter(|r| r["event"] != "seal").count();
    b.ok("rotate mnt --dry-run");
    assert_eq!(told(&b).iter().filter(|r| r["event"] != "seal").count(), before);
    b.ok("key add mnt keyfile:DIR/second");
    b.ok("key remove mnt keyfile:DIR/second");
    let lines = told(&b);
    let changes: Vec<_> = of(&lines, "root-key").iter().map(|r| text(&r["state"])).collect();
    assert_eq!(changes, ["added", "removed"]);
}

#[test]
fn a_cancelled_rotation_and_the_one_that_finishes_it_are_told() {
    if !can_mount() {
        return;
    }
    let b = mounted();
    for i in 0..5 {
        fs::write(b.path("mnt").join(i.to_string()), "x").unwrap();
    }
    b.ok("rotate mnt --detach --rate 1 --jobs 1");
    b.ok("rotate mnt --cancel");
    wait_for("the end", || b.json("status mnt --json")["daemon"]["rotation"]["running"] == false);
    b.ok("rotate mnt");
    let lines = told(&b);
    let steps: Vec<_> = of(&lines, "rotate").iter().map(|r| text(&r["step"]).to_owned()).collect();
    assert!(steps.contains(&"cancelled".into()) && steps.contains(&"resumed".into()), "{steps:?}");
    assert_eq!(steps.last().unwrap(), "done");
}

#[test]
fn a_file_under_a_destroyed_kek_is_denied_and_told() {
    if !can_mount() || !rustix::process::geteuid().is_root() {
        return;
    }
    let b = mounted();
    fs::write(b.path("mnt/f"), "old").unwrap();
    b.ok("unmount mnt");
    fs::copy(b.path("back/f"), b.path("kept")).unwrap();
    let (file, old) = (file_id(&b, "f"), kek(&b, "active"));
    b.ok("rotate back --destroy-old");
    fs::copy(b.path("kept"), b.path("back/f")).unwrap();
    mount(&b, "");
    assert_eq!(fs::read(b.path("mnt/f")).unwrap_err().raw_os_error(), Some(libc::EKEYREVOKED));
    as_user(NOBODY, &b.path("mnt"), "! cat f 2> /dev/null");
    let lines = told(&b);
    let denied = deks(&lines, "deny");
    assert!(denied.len() >= 2, "{lines:?}");
    for d in &denied {
        assert_eq!((text(&d["file"]), text(&d["kek"]), text(&d["operation"])), (&*file, &*old, "unwrap"));
        assert_eq!(text(&d["result"]), "kek-destroyed");
    }
    assert!(denied.iter().any(|d| d["uid"] == NOBODY && text(&d["exe"]) == program("/bin/cat")));
}

#[test]
fn keys_of_an_external_kek_are_told_once_each_by_their_root_key() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    b.ok("init back --key keyfile:DIR/key --kek external --plaintext-names");
    mount(&b, "");
    fs::write(b.path("mnt/f"), "x").unwrap();
    b.ok("unmount mnt");
    mount(&b, "");
    assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"x");
    b.ok("rotate mnt");
    let lines = told(&b);
    let provider = format!("keyfile:{}", b.path("key").display());
    for event in ["wrap", "unwrap", "rewrap"] {
        let told = deks(&lines, event);
        assert_eq!(told.len(), 1, "{event}: {told:?}");
        assert_eq!((text(&told[0]["provider"]), text(&told[0]["file"])), (&*provider, &*file_id(&b, "f")));
    }
}

#[test]
fn a_mount_that_is_refused_is_told_and_wrong_keys_are_denied() {
    if !can_mount() {
        return;
    }
    let b = Bench::with_store();
    fs::write(b.path("wrong"), [7; 32]).unwrap();
    b.chmod("wrong", 0o600);
    let o = b.run("mount back mnt --audit-log DIR/audit --key keyfile:DIR/wrong");
    assert_eq!(o.status.code(), Some(4));
    let lines = records(&b.path("audit"));
    let denied = of(&lines, "deny");
    assert!(!denied.is_empty() && denied.iter().all(|d| d["result"] == "kms-bad-ciphertext"));
    assert!(denied.iter().all(|d| text(&d["provider"]) == format!("keyfile:{}", b.path("wrong").display())));
    assert_eq!(of(&lines, "mount")[0]["result"], "wrong-key");
    // Whole, but sealed by nobody.
    b.ok("audit verify DIR/audit");
    let o = b.run("audit verify DIR/audit --store back");
    assert_eq!(o.status.code(), Some(8));
    assert!(b.masked(&o.stderr).contains("there is no seal"), "{}", b.masked(&o.stderr));
}

#[test]
fn a_log_that_a_killed_daemon_left_goes_on_and_verifies() {
    if !can_mount() {
        return;
    }
    let b = mounted();
    for round in 0..3 {
        for i in 0..20 {
            fs::write(b.path("mnt").join(format!("{round}-{i}")), "x").unwrap();
        }
        b.kill();
        b.ok("unmount mnt");
        if round == 1 {
            // What a power cut can do: half a line.
            let line = fs::read_to_string(b.path("audit")).unwrap().lines().last().unwrap().to_owned();
            let half = &line.as_bytes()[..line.len() / 2];
            fs::File::options().append(true).open(b.path("audit")).unwrap().write_all(half).unwrap();
            let o = b.run("audit verify DIR/audit");
            assert_eq!(o.status.code(), Some(8));
            assert!(b.masked(&o.stderr).contains("is not whole"), "{}", b.masked(&o.stderr));
        }
        mount(&b, "");
    }
    b.ok("unmount mnt");
    let whole = b.ok("audit verify DIR/audit");
    assert!(whole.starts_with("whole: ") && whole.contains("recovered 1 torn by crashes\n"), "{whole}");
    assert!(whole.contains(", not checked: give --store\n"));
    let sealed = b.ok("audit verify DIR/audit --store back");
    assert!(sealed.contains(", all made with the key of this store\n"), "{sealed}");
    let v = b.json("audit verify DIR/audit --store back --json");
    assert_eq!((&v["whole"], &v["recovered"], &v["lost"]), (&true.into(), &1.into(), &0.into()));
}

#[test]
fn tampering_with_the_log_is_found_and_said() {
    if !can_mount() {
        return;
    }
    let b = mounted();
    fs::write(b.path("mnt/f"), "x").unwrap();
    b.ok("unmount mnt");
    let head = text(&b.json("audit verify DIR/audit --json")["head"]).to_owned();
    let whole = fs::read(b.path("audit")).unwrap();
    let lines: Vec<&[u8]> = whole.split_inclusive(|c| *c == b'\n').collect();
    let verify = |bytes: &[u8], more: &str| {
        fs::write(b.path("bad"), bytes).unwrap();
        let o = b.run(&format!("audit verify DIR/bad {more}"));
        (o.status.code(), b.masked(&o.stderr))
    };
    let mut flipped = whole.clone();
    let uid = String::from_utf8_lossy(&whole).find("\"uid\":").unwrap() + 6;
    flipped[uid] ^= 1;
    let advice = "; keep the log as it is, and compare it with a copy or a head that was noted before\n";
    let broken =
        "does not follow from the line before it: that one or this one was changed, or others removed or put in";
    assert_eq!(verify(&flipped, ""), (Some(8), format!("envelopefs: DIR/bad: line 2 {broken}{advice}")));
    let mut less = lines.clone();
    less.remove(3);
    assert_eq!(verify(&less.concat(), ""), (Some(8), format!("envelopefs: DIR/bad: line 4 {broken}{advice}")));
    // The end cut off: whole by itself, and not what it was.
    let cut = lines[..lines.len() - 2].concat();
    assert_eq!(verify(&cut, "").0, Some(0));
    assert_eq!(verify(&cut, &format!("--expect-head {head}")).0, Some(8));
    assert_eq!(verify(&whole, &format!("--expect-head {head}")).0, Some(0));
    assert_eq!(verify(&whole, "--expect-head 0").0, Some(2));
    // A seal with another MAC: only the key tells.
    let mut forged = whole.clone();
    let mac = forged.len() - 10;
    forged[mac] = if forged[mac] == b'0' { b'1' } else { b'0' };
    assert_eq!(verify(&forged, "").0, Some(0));
    let (code, said) = verify(&forged, "--store back");
    assert!(code == Some(8) && said.contains("was not made with this store's key"), "{said}");
    let o = b.run("audit verify DIR/bad --store back --json");
    let v: Value = serde_json::from_slice(&o.stdout).unwrap();
    assert_eq!((&v["whole"], text(&v["bad"]["code"])), (&false.into(), "seal-forged"));
    assert_eq!(v["bad"]["line"], lines.len());
    // Through the daemon it is the same.
    mount(&b, "");
    assert_eq!(verify(&forged, "--store mnt").0, Some(8));
    assert_eq!(verify(&whole, "--store mnt").0, Some(0));
    // The live log cut: the daemon knows better.
    fs::write(b.path("mnt/g"), "x").unwrap();
    told(&b);
    let keep = fs::read(b.path("audit")).unwrap();
    let shorter = keep[..keep.len() - 1].iter().rposition(|c| *c == b'\n').unwrap() + 1;
    fs::File::options().write(true).open(b.path("audit")).unwrap().set_len(shorter as u64).unwrap();
    let o = b.run("audit verify DIR/audit --store mnt");
    assert_eq!(o.status.code(), Some(8), "{}", b.masked(&o.stderr));
    b.ok("unmount mnt");
    // A log of another store.
    let other = Bench::mounted();
    let line = format!("audit verify {} --store DIR/back", b.path("bad").display());
    assert_eq!(other.run(&line).status.code(), Some(8));
}

#[test]
fn a_log_is_rotated_by_renaming_it() {
    if !can_mount() {
        return;
    }
    let b = mounted();
    for n in [2, 1] {
        fs::write(b.path("mnt").join(n.to_string()), "x").unwrap();
        told(&b);
        fs::rename(b.path("audit"), b.path(&format!("audit.{n}"))).unwrap();
    }
    fs::write(b.path("mnt/last"), "x").unwrap();
    b.ok("unmount mnt");
    mount(&b, "");
    b.ok("unmount mnt");
    b.ok("audit verify DIR/audit.2 DIR/audit.1 DIR/audit --store back");
    let v = b.json("audit verify DIR/audit.1 DIR/audit --store back --json");
    let before = b.json("audit verify DIR/audit.2 --json");
    assert_eq!((&v["continues"]["head"], &v["continues"]["seq"]), (&before["head"], &before["last"]));
    assert_eq!(b.run("audit verify DIR/audit.2 DIR/audit").status.code(), Some(8));
    assert_eq!(deks(&records(&b.path("audit.2")), "wrap").len(), 1);
}

#[test]
fn a_log_has_one_writer_and_its_own_place() {
    if !can_mount() {
        return;
    }
    let b = mounted();
    fs::create_dir(b.path("back2")).unwrap();
    fs::create_dir(b.path("mnt2")).unwrap();
    b.ok("init back2 --key keyfile:DIR/key");
    let o = b.run("mount back2 mnt2 --audit-log DIR/audit");
    assert_eq!(o.status.code(), Some(7), "{}", b.masked(&o.stderr));
    for bad in ["DIR/back2/x", "DIR/mnt2/x"] {
        let o = b.run(&format!("mount back2 mnt2 -o audit_log={bad}"));
        assert_eq!(o.status.code(), Some(2), "{}", b.masked(&o.stderr));
    }
    b.ok("unmount mnt");
    let o = b.run("mount back2 mnt2 --audit-log DIR/audit");
    assert!(
        b.masked(&o.stderr).contains("it is that of store ID; move it away or name another"),
        "{}",
        b.masked(&o.stderr)
    );
    assert_eq!(o.status.code(), Some(1));
}

#[test]
fn changes_of_a_store_that_is_not_mounted_are_told_too() {
    if !can_mount() {
        return;
    }
    let b = mounted();
    fs::write(b.path("mnt/f"), "x").unwrap();
    b.ok("unmount mnt");
    let config = format!(
        "[defaults]\naudit_log = {:?}\n[store.s]\nbacking = {:?}\naudit_log = {:?}\n",
        b.path("{store}.audit"),
        b.path("back"),
        b.path("audit")
    );
    fs::write(b.path("c.toml"), config).unwrap();
    b.ok("rotate back --config DIR/c.toml");
    b.ok("key add back keyfile:DIR/second --config DIR/c.toml");
    let lines = records(&b.path("audit"));
    assert_eq!((deks(&lines, "rewrap").len(), of(&lines, "root-key").len()), (1, 1));
    b.ok("audit verify DIR/audit --store back --key keyfile:DIR/second");
    // By the default, a log named after the store.
    fs::create_dir(b.path("back2")).unwrap();
    b.ok("init back2 --key keyfile:DIR/key");
    b.ok("rotate back2 --config DIR/c.toml");
    let store = text(&b.json("status back2 --json")["store"]).to_owned();
    b.ok(&format!("audit verify DIR/{store}.audit --store back2"));
}

/// A small disk of its own for the log.
struct Disk(PathBuf);

impl Disk {
    fn new(at: PathBuf) -> Self {
        fs::create_dir(&at).unwrap();
        let made = Command::new("mount").args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"]).arg(&at).status().unwrap();
        assert!(made.success());
        Self(at)
    }

    /// Leaves less room than an event takes.
    fn fill(&self) {
        let mut f = fs::File::options().create(true).append(true).open(self.0.join("filler")).unwrap();
        while f.write(&[0; 512]).is_ok_and(|n| n > 0) {}
    }

    fn empty(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn on_disk(policy: &str) -> (Bench, Disk) {
    let b = Bench::new();
    let disk = Disk::new(b.path("disk"));
    b.ok("init back --key keyfile:DIR/key --plaintext-names");
    fs::write(b.path("c.toml"), format!("[defaults]\naudit_on_error = \"{policy}\"\naudit_fsync_ms = 0\n")).unwrap();
    b.ok("mount back mnt --audit-log DIR/disk/audit --config DIR/c.toml --log-file DIR/log");
    (b, disk)
}

fn log_metric(b: &Bench, name: &str) -> f64 {
    samples(&b.ok("metrics mnt"))[name]
}

#[test]
fn events_that_a_full_disk_does_not_take_are_counted() {
    if !can_mount() || !rustix::process::geteuid().is_root() {
        return;
    }
    let (b, disk) = on_disk("continue");
    fs::write(b.path("mnt/before"), "x").unwrap();
    disk.fill();
    let n = 40;
    for i in 0..n {
        fs::write(b.path("mnt").join(i.to_string()), "x").unwrap();
    }
    wait_for("the loss", || log_metric(&b, "envelopefs_audit_events_lost_total") > 0.0);
    assert_eq!(log_metric(&b, "envelopefs_audit_refusing"), 0.0);
    disk.empty();
    fs::write(b.path("mnt/after"), "x").unwrap();
    wait_for("the gap", || fs::read_to_string(disk.0.join("audit")).unwrap().contains("\"event\":\"gap\""));
    let v = b.json("audit verify DIR/disk/audit --store mnt --json");
    let lost = v["lost"].as_u64().unwrap();
    let wraps = deks(&records(&disk.0.join("audit")), "wrap").len() as u64;
    assert_eq!(wraps + lost, n + 2, "every event is in the log or counted in it");
    assert!(lost > 0);
    let said = fs::read_to_string(b.path("log")).unwrap();
    assert_eq!(said.matches("events are lost").count(), 1, "once a minute: {said}");
    b.ok("unmount mnt");
    b.ok("audit verify DIR/disk/audit --store back");
}

#[test]
fn with_the_policy_stop_no_key_is_used_that_cannot_be_told() {
    if !can_mount() || !rustix::process::geteuid().is_root() {
        return;
    }
    let (b, disk) = on_disk("stop");
    for name in ["open", "closed"] {
        fs::write(b.path("mnt").join(name), "x").unwrap();
    }
    b.ok("unmount mnt");
    b.ok("mount back mnt --audit-log DIR/disk/audit --config DIR/c.toml --log-file DIR/log");
    let mut open = fs::File::open(b.path("mnt/open")).unwrap();
    disk.fill();
    // What the last page of the log still has room for, and one more.
    let mut n = 0;
    while log_metric(&b, "envelopefs_audit_refusing") == 0.0 {
        assert!(n < 60, "never refused");
        // Fails at its close, or at the writeback, where nobody hears of it.
        let _ = fs::write(b.path("mnt").join(n.to_string()), "x");
        n += 1;
    }
    let refused = fs::File::create(b.path("mnt/refused")).unwrap();
    let error = (&refused).write_all(b"x").and_then(|()| refused.sync_all()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOKEY), "a new file has no key either");
    drop(refused);
    assert_eq!(fs::read(b.path("mnt/closed")).unwrap_err().raw_os_error(), Some(libc::ENOKEY));
    let mut content = String::new();
    open.read_to_string(&mut content).unwrap();
    assert_eq!(content, "x", "open files go on");
    fs::rename(b.path("mnt/closed"), b.path("mnt/renamed")).unwrap();
    assert_eq!(fs::metadata(b.path("mnt/renamed")).unwrap().len(), 1);
    disk.empty();
    wait_for("the end of it", || log_metric(&b, "envelopefs_audit_refusing") == 0.0);
    assert_eq!(fs::read(b.path("mnt/renamed")).unwrap(), b"x");
    let v = b.json("audit verify DIR/disk/audit --store mnt --json");
    assert_eq!(v["lost"], 0);
    let lines = records(&disk.0.join("audit"));
    let told: BTreeSet<_> = deks(&lines, "wrap").iter().map(|r| text(&r["file"]).to_owned()).collect();
    let with_keys = fs::read_dir(b.path("back")).unwrap().map(|e| e.unwrap());
    let with_keys = with_keys.filter(|e| !e.file_name().to_string_lossy().starts_with('.'));
    let with_keys = with_keys.filter(|e| e.metadata().unwrap().len() > 0);
    let files: BTreeSet<_> = with_keys.map(|e| file_id(&b, e.file_name().to_str().unwrap())).collect();
    assert_eq!(files.len(), 2 + n);
    assert_eq!(fs::metadata(b.path("back/refused")).unwrap().len(), 0);
    assert_eq!(files, told, "there is no key that was not told of");
}

/// Samples by name and labels. A strict reader of the text format: every family has its help and its type, in this order
/// and once, its samples follow at once, and a histogram's buckets add up.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let (mut out, mut seen) = (BTreeMap::new(), BTreeSet::new());
    let (mut family, mut kind, mut helped) = (String::new(), String::new(), String::new());
    assert!(text.ends_with('\n'));
    let is_name = |s: &str| {
        !s.is_empty()
            && !s.starts_with(|c: char| c.is_ascii_digit())
            && s.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
    };
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(is_name(name) && !help.is_empty() && seen.insert(name.to_owned()), "{line}");
            helped = name.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, k) = rest.split_once(' ').unwrap();
            assert_eq!(name, helped);
            assert!(["counter", "gauge", "histogram"].contains(&k), "{line}");
            assert!(k != "counter" || name.ends_with("_total"), "{line}");
            (family, kind) = (name.to_owned(), k.to_owned());
        } else {
            let (id, value) = line.rsplit_once(' ').unwrap();
            let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
            let (name, labels) = id.split_once('{').unwrap_or((id, "}"));
            assert!(is_name(name), "{line}");
            let base = match kind.as_str() {
                "histogram" => ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s)).unwrap(),
                _ => name,
            };
            assert_eq!(base, family, "{line}");
            let mut rest = labels.strip_suffix('}').unwrap_or_else(|| panic!("{line}"));
            while !rest.is_empty() {
                let (label, after) = rest.split_once("=\"").unwrap();
                assert!(is_name(label), "{line}");
                let end = after.char_indices().find(|(i, c)| *c == '"' && !after[..*i].ends_with('\\')).unwrap().0;
                rest = after[end + 1..].trim_start_matches(',');
            }
            assert!(kind == "gauge" || value >= 0.0);
            assert!(out.insert(id.to_owned(), value).is_none(), "twice: {line}");
        }
    }
    for (id, count) in out.iter().filter(|(id, _)| id.contains("_count")) {
        let bucket = id.replace("_count", "_bucket").replace('}', ",le=\"+Inf\"}");
        if kind_is_histogram(text, id) {
            assert_eq!(out.get(&bucket), Some(count), "{id}");
        }
    }
    out
}

fn kind_is_histogram(text: &str, id: &str) -> bool {
    let name = id.split('{').next().unwrap().trim_end_matches("_count");
    text.contains(&format!("# TYPE {name} histogram\n"))
}

fn http(port: u16, request: &str) -> String {
    let mut s = TcpStream::connect(("127.0.0.1", port)).unwrap();
    s.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    s.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn metrics_count_what_was_done_and_are_served_on_loopback_if_asked() {
    if !can_mount() {
        return;
    }
    let b = Bench::with_store();
    let o = b.run("mount back mnt --metrics-listen 0.0.0.0:9464");
    assert_eq!(o.status.code(), Some(2));
    assert!(b.masked(&o.stderr).contains("loopback addresses only"), "{}", b.masked(&o.stderr));
    b.fails(
        "metrics back",
        10,
        "DIR/back is not mounted: only a daemon has figures; mount it first with: envelopefs mount BACKING MOUNTPOINT",
    );
    mount(&b, "--metrics-listen 127.0.0.1:0");
    for i in 0..9 {
        fs::write(b.path("mnt").join(i.to_string()), "x").unwrap();
    }
    let report = b.json("rotate mnt --json");
    let got = samples(&b.ok("metrics mnt"));
    let ops =
        |o: &str| got[&format!("envelopefs_dek_operations_total{{operation=\"{o}\",kek=\"sealed\",result=\"ok\"}}")];
    assert_eq!((ops("wrap"), ops("unwrap")), (9.0, 0.0));
    assert_eq!(ops("rewrap"), report["sweep"]["rewrapped"].as_f64().unwrap());
    assert_eq!(got["envelopefs_keks{state=\"retired\"}"], 1.0);
    assert_eq!(got["envelopefs_rotation_state{state=\"done\"}"], 1.0);
    assert_eq!(got["envelopefs_keyring_generation"], report["generation"].as_f64().unwrap());
    let lines = told(&b).len() as f64;
    let got = samples(&b.ok("metrics back"));
    assert_eq!(got["envelopefs_audit_records_written_total"], lines);
    assert_eq!(got["envelopefs_audit_events_lost_total"], 0.0);
    let calls =
        |o: &str| got[&format!("envelopefs_key_calls_total{{provider=\"keyfile\",operation=\"{o}\",result=\"ok\"}}")];
    let lines = records(&b.path("audit"));
    for o in ["wrap", "unwrap"] {
        let of_root_keys = of(&lines, o).into_iter().filter(|r| r["key"] != "dek").count();
        assert!(of_root_keys > 0 && calls(o) == of_root_keys as f64, "{o}: {of_root_keys}");
    }
    // As a scraper gets it.
    let log = fs::read_to_string(b.path("log")).unwrap();
    let port = log.split("metrics at http://127.0.0.1:").nth(1).unwrap().split('/').next().unwrap().parse().unwrap();
    let answer = http(port, "GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(
        head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains(&format!("Content-Length: {}", body.len())),
        "{head}"
    );
    let names = |m: &BTreeMap<String, f64>| m.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&samples(&b.masked(body.as_bytes()))), names(&got));
    assert!(http(port, "GET /key HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
    b.ok("unmount mnt");
}
