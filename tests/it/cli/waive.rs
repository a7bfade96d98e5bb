//! `rotate --waive` and `rotate --status`, mounted and unmounted.

use super::support::{Bench, can_mount, wait_for};
use serde_json::Value;
use std::fs;
use std::process::Command;

/// A store with names in clear and files `0` to `n`-1, mounted.
fn with_files(n: usize) -> Bench {
    let b = Bench::new();
    b.ok("init back --key keyfile:DIR/key --plaintext-names");
    b.ok("mount back mnt --audit-log DIR/audit");
    fs::create_dir(b.path("mnt/d")).unwrap();
    for name in (0..n).map(|i| i.to_string()).chain(["d/f".into()]) {
        let path = b.path("mnt").join(&name);
        fs::write(&path, name.rsplit('/').next().unwrap()).unwrap();
        // In the backing directory, too, where these tests have their hands.
        fs::File::open(path).unwrap().sync_all().unwrap();
    }
    b
}

/// Makes both slots of a file in the backing directory unreadable.
fn spoil(b: &Bench, name: &str) {
    let path = b.path("back").join(name);
    let mut bytes = fs::read(&path).unwrap();
    bytes[..2048].fill(0xff);
    fs::write(path, bytes).unwrap();
}

fn keks(b: &Bench, state: &str) -> Vec<Value> {
    let list = b.json("key list back --json");
    list["keks"].as_array().unwrap().iter().filter(|k| k["state"] == state).cloned().collect()
}

/// What ran, whatever its exit code.
fn said(b: &Bench, line: &str) -> (Option<i32>, Value, String) {
    let o = b.run(line);
    (o.status.code(), serde_json::from_slice(&o.stdout).unwrap_or_default(), b.masked(&o.stderr))
}

#[test]
fn a_run_is_complete_with_what_fails_waived_and_everything_tells_so() {
    if !can_mount() {
        return;
    }
    for mounted in [true, false] {
        let b = with_files(3);
        spoil(&b, "1");
        if !mounted {
            b.ok("unmount mnt");
            fs::write(b.path("config"), format!("[defaults]\naudit_log = \"{}\"\n", b.path("audit").display()))
                .unwrap();
        }
        let (at, config) = if mounted { ("mnt", "") } else { ("back", " --config DIR/config") };
        let (code, v, _) = said(&b, &format!("rotate {at} --json{config}"));
        assert_eq!((code, &v["outcome"], &v["failures"][0]["path"]), (Some(9), &"incomplete".into(), &"1".into()));
        assert_eq!(
            (&v["failures"][0]["code"], &v["failures"][0]["directory"]),
            (&"header-magic".into(), &false.into())
        );
        // What the report names is what the list takes.
        let path = v["failures"][0]["path"].as_str().unwrap();
        fs::write(b.path("list"), format!("# lost in May\n{path}\n2\n")).unwrap();
        let o = b.run(&format!("rotate {at} --waive list --report r{config}"));
        let (out, err) = (b.masked(&o.stdout), b.masked(&o.stderr));
        assert_eq!(o.status.code(), Some(0), "{err}");
        assert!(out.starts_with("complete: ") && out.contains(" files moved to KEK ID, 1 waived\n"), "{out}");
        let line = "waived: 1: not an envelopefs file: no magic number in either header slot (header-magic)\n";
        assert!(out.contains(line), "{out}");
        assert!(err.contains("envelopefs: waiver not needed: nothing failed at 2; take it off the list\n"), "{err}");
        // The report.
        let r: Value = serde_json::from_slice(&fs::read(b.path("r")).unwrap()).unwrap();
        let r = &r["report"];
        assert_eq!((&r["outcome"], &r["failures_total"]), (&"complete".into(), &0.into()));
        assert_eq!((&r["waived"][0]["path"], &r["waivers_unused"][0]), (&"1".into(), &"2".into()));
        let kept = "back/.envelopefs/rotation/waived.json";
        for file in ["r", kept] {
            let words = b.ok(&format!("key verify-report {file} back"));
            assert!(words.contains("\nwaived     1\n  1: not an envelopefs file"), "{words}");
            assert!(words.ends_with("in both slots, and no other, but for what is waived\n"), "{words}");
        }
        // The store.
        let retired = keks(&b, "retired");
        assert_eq!((retired.len(), &retired[0]["waived"]), (1, &1.into()));
        assert!(b.ok("key list back").contains("           unused but for what was waived: 1; see rotate --status\n"));
        assert!(b.ok("status back").contains(&format!("left out: DIR/{kept}\n  1: not an envelopefs file")));
        let (code, v, _) = said(&b, &format!("rotate {at} --status --json"));
        assert_eq!((code, &v["exceptions"]["waived"][0]["path"]), (Some(0), &"1".into()));
        assert_eq!(v["rotation_unfinished"], false);
        // The audit log.
        let log = fs::read_to_string(b.path("audit")).unwrap();
        let waived: Vec<Value> =
            log.lines().map(|l| serde_json::from_str(l).unwrap()).filter(|v: &Value| v["event"] == "waived").collect();
        assert_eq!((waived.len(), &waived[0]["about"], &waived[0]["result"]), (1, &"1".into(), &"header-magic".into()));
        assert_eq!(waived[0]["kek"], r["target"]);
        let done = log.lines().rfind(|l| l.contains("\"step\":\"done\"")).unwrap();
        assert!(done.contains("\"waived\":1"), "{done}");
        // Taken away, there is nothing left to be waived.
        fs::remove_file(b.path("back/1")).unwrap();
        b.ok(&format!("rotate {at}{config}"));
        assert!(keks(&b, "retired").iter().all(|k| k.get("waived").is_none()));
        assert!(!b.path(kept).exists());
    }
}

#[test]
fn a_kek_that_a_waived_file_needs_survives_destroy_old() {
    if !can_mount() {
        return;
    }
    let b = with_files(3);
    b.ok("unmount mnt");
    let old = keks(&b, "active")[0]["id"].as_str().unwrap().to_owned();
    // Both wraps spoiled, and their checksums right: a header that names its KEK and does not open.
    let mut bytes = fs::read(b.path("back/1")).unwrap();
    for at in [0, 1024] {
        bytes[at + 200] ^= 1;
        let crc = crc32c::crc32c(&bytes[at..at + 1020]).to_le_bytes();
        bytes[at + 1020..at + 1024].copy_from_slice(&crc);
    }
    fs::write(b.path("back/1"), bytes).unwrap();
    fs::write(b.path("list"), "1\n").unwrap();
    let (code, v, err) = said(&b, "rotate back --waive list --destroy-old --json");
    assert_eq!((code, &v["outcome"]), (Some(0), &"complete".into()), "{err}");
    assert_eq!((&v["waived"][0]["code"], &v["kept"][0]), (&"wrap-auth".into(), &old.as_str().into()));
    assert_eq!(v["destroyed"], Value::Array(vec![]));
    assert!(err.contains("envelopefs: KEK ID was not destroyed: what is waived needs it, or may"), "{err}");
    let o = b.run(&format!("key destroy back {old} --yes"));
    assert!(!o.status.success() && b.masked(&o.stderr).contains("1 header needs it: 1"), "{}", b.masked(&o.stderr));
    assert_eq!(keks(&b, "retired")[0]["id"], old);
}

#[test]
fn a_list_that_cannot_be_used_is_told_before_the_rotation() {
    let b = Bench::with_store();
    let path = "not a path as reports name it: below the backing directory, without / at its beginning or end";
    for (list, why) in [
        ("a\n/b\n", path),
        ("a\nb/\n", path),
        ("a\n\\n\n", "a backslash is written \\\\, and a byte may be written \\xHH"),
    ] {
        fs::write(b.path("list"), list).unwrap();
        b.fails("rotate back --waive list", 2, &format!("waivers list: line 2: {why}; see --help"));
    }
    b.fails("rotate back --waive none", 1, "cannot read none: No such file or directory");
    assert_eq!(b.run("rotate back --waive list --cancel").status.code(), Some(2));
    assert_eq!(keks(&b, "retired").len(), 0, "nothing was rotated");
}

/// As an ordinary user, to whom a directory of the store is closed.
#[test]
fn a_directory_that_may_not_be_read_is_told_and_waived() {
    if !rustix::process::geteuid().is_root() || !can_mount() {
        return;
    }
    let b = with_files(2);
    b.ok("unmount mnt");
    b.chmod("", 0o755);
    fs::copy(env!("CARGO_BIN_EXE_envelopefs"), b.path("envelopefs")).unwrap();
    b.chmod("envelopefs", 0o755);
    fs::write(b.path("list"), "d\n").unwrap();
    let given = Command::new("chown").args(["-R", "65534:65534"]).args([b.path("back"), b.path("key")]).status();
    assert!(given.unwrap().success());
    std::os::unix::fs::chown(b.path("back/d"), Some(0), Some(0)).unwrap();
    b.chmod("back/d", 0o700);
    let as_user = |line: &str| {
        let mut c = Command::new("setpriv");
        b.prepare(&mut c);
        c.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(b.path("envelopefs"));
        let o = c.args(line.split(' ')).output().unwrap();
        (o.status.code(), serde_json::from_slice::<Value>(&o.stdout).unwrap_or_default(), b.masked(&o.stderr))
    };
    let (code, v, err) = as_user("rotate back --json");
    assert_eq!((code, &v["outcome"], &v["failures_total"]), (Some(9), &"incomplete".into(), &1.into()), "{err}");
    let f = &v["failures"][0];
    assert_eq!((&f["path"], &f["code"], &f["directory"]), (&"d".into(), &"EACCES".into(), &true.into()));
    let (code, v, err) = as_user("rotate back --json --waive list --destroy-old");
    assert_eq!((code, &v["outcome"], &v["waived"][0]), (Some(0), &"complete".into(), f), "{err}");
    assert_eq!((v["kept"].as_array().unwrap().len(), v["destroyed"].as_array().unwrap().len()), (1, 0));
    // Opened again, what is in it is moved.
    std::os::unix::fs::chown(b.path("back/d"), Some(65534), Some(65534)).unwrap();
    let (code, v, err) = as_user("rotate back --json --destroy-old");
    assert_eq!((code, v["destroyed"].as_array().map(Vec::len)), (Some(0), Some(2)), "{err}");
    b.ok("mount back mnt");
    assert_eq!(fs::read_to_string(b.path("mnt/d/f")).unwrap(), "f");
}

#[test]
fn the_status_of_a_rotation_is_told_while_it_runs_and_after() {
    if !can_mount() {
        return;
    }
    let b = with_files(30);
    let status = || said(&b, "rotate mnt --status --json");
    let (code, v, _) = status();
    assert_eq!(
        (code, &v["rotation"], &v["last_rotation"], &v["exceptions"]),
        (Some(0), &Value::Null, &Value::Null, &Value::Null)
    );
    assert_eq!(b.ok("rotate mnt --status"), "state     there was no rotation\n");
    spoil(&b, "1");
    b.ok("rotate mnt --detach --rate 1 --jobs 1");
    wait_for("the failure", || status().1["rotation"]["status"]["sweep_failures"]["total"] == 1);
    let (code, v, _) = status();
    let s = &v["rotation"]["status"];
    assert_eq!(
        (code, &v["rotation"]["running"], &s["state"], &s["pass"]),
        (Some(0), &true.into(), &"sweeping".into(), &1.into())
    );
    assert_eq!(
        (&s["sweep_failures"]["by_code"]["header-magic"], &s["sweep_failures"]["first"][0]["path"]),
        (&1.into(), &"1".into())
    );
    assert!(s["started"].as_u64().unwrap() > 1_700_000_000 && s["since"].as_u64() >= s["started"].as_u64());
    b.ok("rotate mnt --pause");
    wait_for("the pause", || status().1["rotation"]["status"]["paused"] == true);
    let text = b.ok("rotate back --status");
    assert!(text.starts_with("state     rewrapping, paused\nsince     20"), "{text}");
    assert!(text.contains("\nfailed    1 in the sweep: 1 header-magic\n  1: not an envelopefs file"), "{text}");
    b.ok("rotate mnt --resume");
    b.ok("rotate mnt --cancel");
    wait_for("the end", || status().1["rotation"]["running"] == false);
    let (code, v, err) = status();
    assert_eq!(
        (code, &v["rotation_unfinished"], &v["last_rotation"]["state"]),
        (Some(9), &true.into(), &"cancelled".into())
    );
    assert!(
        err.contains("a rotation is unfinished, and none is under way; what is done stays done; finish it with"),
        "{err}"
    );
    let target = v["rotation"]["report"]["target"].clone();
    // Not mounted, the journal still knows.
    b.ok("unmount mnt");
    let (code, v, _) = said(&b, "rotate back --status --json");
    assert_eq!((code, &v["rotation"], &v["mounted"]), (Some(9), &Value::Null, &false.into()));
    assert_eq!((&v["last_rotation"]["state"], &v["last_rotation"]["target"]), (&"cancelled".into(), &target));
    assert_eq!(b.json("status back --json")["last_rotation"], v["last_rotation"], "the same as everywhere else");
    let o = b.run("rotate back --status");
    let text = b.masked(&o.stdout);
    assert!(text.starts_with("state     cancelled, when it was last written down\ntime      begun 20"), "{text}");
    assert!(text.ends_with("unfinished: headers may be under old KEKs; the next rotate goes on with it\n"), "{text}");
    fs::remove_file(b.path("back/1")).unwrap();
    b.ok("rotate back");
    let (code, v, _) = said(&b, "rotate back --status --json");
    assert_eq!(
        (code, &v["last_rotation"]["state"], &v["rotation_unfinished"]),
        (Some(0), &"done".into(), &false.into())
    );
}

/// Each with its own words and exit code, and none of them does anything.
#[test]
fn steering_where_nothing_is_under_way_is_told() {
    if !can_mount() {
        return;
    }
    let b = with_files(1);
    for how in ["pause", "resume", "cancel"] {
        b.fails(&format!("rotate mnt --{how}"), 2, "no rotation of this store is under way; see --help");
    }
    b.ok("unmount mnt");
    let text = "DIR/back: no rotation is under way: the store is not mounted; mount it first with: envelopefs mount BACKING MOUNTPOINT";
    for how in ["pause", "resume", "cancel"] {
        b.fails(&format!("rotate back --{how}"), 10, text);
    }
    assert_eq!(keks(&b, "retired").len(), 0);
}

/// Through the control socket, in the scan that proves.
#[test]
fn a_mounted_rotation_is_steered_while_it_verifies() {
    if !can_mount() {
        return;
    }
    let b = with_files(6);
    let status = || b.json("status mnt --json")["daemon"]["rotation"].clone();
    // On a slow machine the scan may be over before the pause comes: then it is tried in the next one.
    wait_for("a pause in the scan", || {
        let s = status();
        if s["running"] != true {
            b.ok("rotate mnt --detach --rate 3 --jobs 1");
        }
        let at = |s: &Value, state: &str| s["running"] == true && s["status"]["state"] == state;
        if !at(&s, "verifying") || !b.run("rotate mnt --pause").status.success() {
            return false;
        }
        let mut s = Value::Null;
        wait_for("the pause, or the end", || {
            s = status();
            s["running"] == false || s["status"]["paused"] == true
        });
        at(&s, "verifying")
    });
    assert_eq!(status()["running"], true);
    b.ok("rotate mnt --resume");
    b.ok("rotate mnt --cancel");
    wait_for("the end", || status()["running"] == false);
    assert_eq!(status()["report"]["outcome"], "cancelled");
    let v = b.json("rotate mnt --json");
    assert_eq!((&v["outcome"], &v["resumed"]), (&"complete".into(), &true.into()));
}

#[test]
fn a_dry_run_counts_files() {
    if !can_mount() {
        return;
    }
    let b = with_files(2);
    fs::write(b.path("mnt/empty"), "").unwrap();
    b.says("rotate mnt --dry-run", 0, "dry run: 4 files, 1 empty, 3 under KEK ID already, 0 to move\n", "");
}

/// No daemon can be asked: the journal says how it stands, and the lock that it is under way.
#[test]
fn a_rotation_in_another_process_is_told_by_its_journal() {
    if !can_mount() {
        return;
    }
    let b = with_files(40);
    b.ok("unmount mnt");
    let mut other = b.spawn("rotate back --rate 1 --jobs 1");
    wait_for("the sweep", || said(&b, "rotate back --status --json").1["last_rotation"]["state"] == "sweeping");
    let (code, v, _) = said(&b, "rotate back --status --json");
    assert_eq!((code, &v["mounted"], &v["locked"]), (Some(0), &false.into(), &true.into()));
    assert_eq!(v["rotation_unfinished"], true);
    assert!(b.ok("rotate back --status").starts_with("state     rewrapping, in another process\n"));
    assert_eq!(b.run("rotate back --cancel").status.code(), Some(7), "locked by it");
    other.kill().unwrap();
    other.wait().unwrap();
    let (code, v, _) = said(&b, "rotate back --status --json");
    assert_eq!((code, &v["locked"], &v["last_rotation"]["state"]), (Some(9), &false.into(), &"sweeping".into()));
    let v = b.json("rotate back --json");
    assert_eq!((&v["outcome"], &v["resumed"]), (&"complete".into(), &true.into()));
}

#[test]
fn a_list_that_is_too_long_is_refused_and_not_cut_in_the_middle_of_a_line() {
    let b = Bench::new();
    b.ok("init back --key keyfile:DIR/key --plaintext-names");
    let most = 16 << 20;
    fs::write(b.path("list"), vec![b'#'; most + 1]).unwrap();
    b.fails("rotate back --waive DIR/list", 2, "waivers DIR/list: longer than 16777216 bytes; see --help");
    fs::write(b.path("list"), vec![b'#'; most]).unwrap();
    b.ok("rotate back --waive DIR/list");
}

#[test]
fn a_file_without_a_header_is_told_everywhere_and_in_nobodys_way() {
    if !can_mount() {
        return;
    }
    let b = with_files(3);
    b.ok("unmount mnt");
    let old = keks(&b, "active")[0]["id"].as_str().unwrap().to_owned();
    let mut bytes = fs::read(b.path("back/1")).unwrap();
    bytes[..4096].fill(0);
    fs::write(b.path("back/1"), bytes).unwrap();
    let o = b.run("check back");
    let said_by_check = b.masked(&o.stdout);
    assert_eq!(o.status.code(), Some(8));
    assert!(
        said_by_check.contains("zeros in place of the header") && said_by_check.contains("or remove it"),
        "{said_by_check}"
    );
    let o = b.run("rotate back --destroy-old --report r");
    let (out, err) = (b.masked(&o.stdout), b.masked(&o.stderr));
    assert_eq!(o.status.code(), Some(0), "{err}");
    assert!(out.starts_with("complete: 3 files moved") && out.contains("\nno header: 1\n"), "{out}");
    assert!(
        err.contains("envelopefs: 1 file with content and no header") && err.contains("KEK ID was not destroyed"),
        "{err}"
    );
    let words = b.ok("key verify-report r back");
    assert!(words.contains("\nno header  1 files with content\n  1\n"), "{words}");
    assert!(words.ends_with("and no other; nothing of files that have content and no header\n"), "{words}");
    let o = b.run(&format!("key destroy back {old} --yes"));
    assert!(b.masked(&o.stderr).contains("1 file has content and no header: 1; "), "{}", b.masked(&o.stderr));
    assert_eq!(keks(&b, "retired")[0]["id"], old);
    fs::remove_file(b.path("back/1")).unwrap();
    b.ok(&format!("key destroy back {old} --yes"));
    assert!(keks(&b, "retired").is_empty());
}
