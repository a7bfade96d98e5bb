//! Reports of rotations as evidence, and what `key list` counts: mounted, unmounted, tampered with, of another store.

use super::support::{Bench, can_mount, wait_for};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// A mounted store with names in clear and `n` files, named by numbers.
fn with_files(n: usize) -> Bench {
    let b = Bench::new();
    b.ok("init back --key keyfile:DIR/key --plaintext-names");
    b.ok("mount back mnt");
    for i in 0..n {
        fs::write(b.path("mnt").join(i.to_string()), i.to_string()).unwrap();
    }
    b
}

/// The report in a file, as any reader of JSON sees it.
fn report(b: &Bench, name: &str) -> Value {
    let v: Value = serde_json::from_slice(&fs::read(b.path(name)).unwrap()).unwrap();
    assert_eq!((&v["algorithm"], v["mac"].as_str().unwrap().len()), (&"HMAC-SHA-256".into(), 64));
    v["report"].clone()
}

fn kek(b: &Bench, state: &str) -> Value {
    let list = b.json("key list back --json");
    list["keks"].as_array().unwrap().iter().find(|k| k["state"] == state).unwrap().clone()
}

/// Lines of what was printed, without their times.
fn timeless(text: &str) -> String {
    text.lines().filter(|l| !l.starts_with("time ")).fold(String::new(), |t, l| t + l + "\n")
}

const COMPLETE: &str = "genuine: sealed with the key of store ID by envelopefs 0.1.0\n\
                        rotation   complete\n\
                        keyring    generation 4 at the end\n\
                        moved      3 headers to KEK ID\n\
                        scanned    3 files, 0 of them empty\n\
                        headers    3 under KEK ID\n\
                        retired    KEK ID\n\
                        failures   0\n\
                        proves     when it ended, every header of the store named KEK ID in both slots, and no other\n";
const CHANGED: &str = "envelopefs: r: not sealed with the key of this store, or changed since; it proves nothing: keep it as \
                       it is, and take another copy, or make a new one with: rotate --report\n";

#[test]
fn a_report_of_a_mounted_store_is_written_and_verified_through_the_daemon() {
    if !can_mount() {
        return;
    }
    let b = with_files(3);
    fs::write(b.path("r"), "an older one").unwrap();
    b.chmod("r", 0o644);
    let said = "complete: 3 files moved to KEK ID\nverified: 3 headers under it in both slots, 0 empty files\n\
                retired KEK ID\nreport written to DIR/r\n";
    let advice =
        "envelopefs: the keyring has changed: keep a copy outside of the store (envelopefs key export mnt FILE)\n";
    b.says("rotate mnt --report r", 0, said, advice);
    assert_eq!(fs::metadata(b.path("r")).unwrap().permissions().mode() & 0o777, 0o600);
    let r = report(&b, "r");
    assert_eq!(r, b.json("status mnt --json")["daemon"]["rotation"]["report"], "the same as everywhere else");
    assert_eq!((&r["outcome"], &r["headers_by_kek"]), (&"complete".into(), &by_kek(&kek(&b, "active"), 3)));
    assert_eq!(r["retired"][0], kek(&b, "retired")["id"]);
    // No key is needed: the daemon has it. The store need not be named.
    fs::rename(b.path("key"), b.path("away")).unwrap();
    for line in ["key verify-report r mnt", "key verify-report r back", "key verify-report DIR/r"] {
        assert_eq!(timeless(&b.ok(line)), COMPLETE, "{line}");
    }
    assert!(b.ok("key verify-report r").contains("\ntime       20"));
    let v = b.json("key verify-report r --json");
    assert_eq!((&v["genuine"], &v["file"], &v["report"]), (&true.into(), &"r".into(), &r));
    // Nothing else was left behind.
    let left: Vec<_> = fs::read_dir(b.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|n| n.to_str().unwrap().starts_with(".r")), "{left:?}");
}

fn by_kek(kek: &Value, n: u64) -> Value {
    serde_json::json!({ kek["id"].as_str().unwrap(): n })
}

#[test]
fn a_report_of_an_unmounted_store_is_written_and_verified_with_its_root_keys() {
    if !can_mount() {
        return;
    }
    let b = with_files(3);
    b.ok("unmount mnt");
    let v = b.json("rotate back --json --report DIR/r");
    assert_eq!(report(&b, "r"), v, "the report that --json prints");
    assert_eq!(timeless(&b.ok("key verify-report r back")), COMPLETE);
    fs::rename(b.path("key"), b.path("away")).unwrap();
    assert_eq!(timeless(&b.ok("key verify-report r back --open-key keyfile:DIR/away")), COMPLETE);
    let o = b.run("key verify-report r back");
    assert_eq!((o.status.code(), b.masked(&o.stdout).as_str()), (Some(13), ""), "nothing is said without a key");
    b.fails(
        "key verify-report r",
        2,
        "store ID of this report is not mounted here: name its backing directory, too; see --help",
    );
}

#[test]
fn a_report_that_was_changed_is_refused() {
    if !can_mount() {
        return;
    }
    let b = with_files(1);
    b.ok("rotate mnt --report r");
    let good = fs::read_to_string(b.path("r")).unwrap();
    b.ok("unmount mnt");
    let number = good.replacen("\"failures_total\": 0", "\"failures_total\": 1", 1);
    let spaced = good.replacen("\"failures_total\": 0", "\"failures_total\":  0", 1);
    let sealed = good.replacen("\"mac\": \"", "\"mac\": \"0", 1);
    for mount in [false, true] {
        if mount {
            b.ok("mount back mnt");
        }
        for bad in [&number, &spaced] {
            assert_ne!(*bad, good);
            fs::write(b.path("r"), bad).unwrap();
            b.says("key verify-report r back", 8, "", CHANGED);
        }
        fs::write(b.path("r"), &sealed).unwrap();
        let none = CHANGED.replace("sealed with the key of this store", "a report as rotate --report writes it");
        b.says("key verify-report r back", 8, "", &none);
        let o = b.run("key verify-report r back --json");
        let v: Value = serde_json::from_slice(&o.stdout).unwrap();
        assert_eq!((o.status.code(), &v["genuine"], &v["report"]), (Some(8), &false.into(), &Value::Null));
        fs::write(b.path("r"), &good).unwrap();
        b.ok("key verify-report r back");
    }
}

#[test]
fn a_report_of_another_store_is_told() {
    let b = Bench::with_store();
    b.ok("init other --key keyfile:DIR/key");
    b.ok("rotate other --report r");
    b.fails(
        "key verify-report r back",
        2,
        "r is about store ID, and DIR/back is store ID: name the store that the report is about; see --help",
    );
    // Passed off as one of this store.
    let ids = ["back", "other"].map(|s| b.json(&format!("status {s} --json"))["store"].as_str().unwrap().to_owned());
    let text = fs::read_to_string(b.path("r")).unwrap();
    fs::write(b.path("r"), text.replace(&ids[1], &ids[0])).unwrap();
    b.says("key verify-report r back", 8, "", CHANGED);
}

#[test]
fn a_report_names_what_could_not_be_moved() {
    if !can_mount() {
        return;
    }
    let b = with_files(3);
    b.ok("unmount mnt");
    let mut bytes = fs::read(b.path("back/1")).unwrap();
    bytes[..4096].fill(0xff);
    fs::write(b.path("back/1"), bytes).unwrap();
    let o = b.run("rotate back --report r");
    assert_eq!(o.status.code(), Some(9), "{}", b.masked(&o.stderr));
    assert!(b.masked(&o.stdout).ends_with("report written to DIR/r\n"));
    let r = report(&b, "r");
    assert_eq!((&r["outcome"], &r["failures"][0]["path"]), (&"incomplete".into(), &"1".into()));
    let words = b.ok("key verify-report r back");
    assert!(words.contains("\nheaders    2 under KEK ID\nfailures   1\n  1: "), "{words}");
    assert!(
        words
            .ends_with("\nproves     what was moved until then; what failed is under an older KEK or cannot be read\n")
    );
    // What key list cannot count is told too.
    let v = b.json("key list back --count --json");
    assert_eq!(v["uncounted"], 1);
    assert!(b.ok("key list back --count").ends_with("  not counted, for they cannot be read: 1; see check\n"));
}

fn interrupt(child: &std::process::Child) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
}

/// Asked for by another client, and by a signal at the one that waits.
#[test]
fn a_cancelled_rotation_leaves_a_report() {
    if !can_mount() {
        return;
    }
    let b = with_files(40);
    let running = || b.json("status mnt --json")["daemon"]["rotation"]["running"] == true;
    for signal in [false, true] {
        let client = b.spawn("rotate mnt --rate 1 --jobs 1 --report r");
        wait_for("the start", running);
        if signal {
            interrupt(&client);
        } else {
            b.ok("rotate mnt --cancel");
        }
        let o = client.wait_with_output().unwrap();
        assert_eq!(o.status.code(), Some(9), "{}", b.masked(&o.stderr));
        assert_eq!(report(&b, "r")["outcome"], "cancelled");
        let words = b.ok("key verify-report r mnt");
        assert!(words.contains("\nscanned    nothing: it ended before the scan that counts headers\n"), "{words}");
        fs::remove_file(b.path("r")).unwrap();
    }
    b.ok("unmount mnt");
    let client = b.spawn("rotate back --rate 1 --jobs 1 --report r");
    wait_for("the sweep", || {
        kek(&b, "active")["activated"] != 0 && b.path("back/.envelopefs/rotation/journal").exists()
    });
    wait_for("the signals' thread", || {
        let tasks = fs::read_to_string(format!("/proc/{}/status", client.id())).unwrap();
        tasks
            .lines()
            .find_map(|l| l.strip_prefix("SigCgt:"))
            .is_some_and(|m| u64::from_str_radix(m.trim(), 16).unwrap() & 2 != 0)
    });
    interrupt(&client);
    let o = client.wait_with_output().unwrap();
    assert_eq!(o.status.code(), Some(9), "{}", b.masked(&o.stderr));
    assert_eq!(report(&b, "r")["outcome"], "cancelled");
    b.ok("key verify-report r back");
}

#[test]
fn where_a_report_cannot_be_written_is_told_before_the_rotation() {
    let b = Bench::with_store();
    b.fails(
        "rotate back --report r --detach",
        2,
        "--report needs somebody who waits for the end: leave out --detach, or count later what names which KEK with \
         rotate --dry-run --report; see --help",
    );
    b.fails("rotate back --report back/r", 2, "report DIR/back/r lies in DIR/back: put it elsewhere; see --help");
    b.fails("rotate back --report DIR/none/r", 1, "cannot write DIR/none/r: No such file or directory");
    b.fails("rotate back --report mnt", 2, "report mnt: not the name of a file; see --help");
    assert_eq!(kek(&b, "active")["activated"], kek(&b, "active")["created"], "the first KEK");
    assert_eq!(b.json("key list back --json")["keks"].as_array().unwrap().len(), 1, "nothing was rotated");
}

#[test]
fn key_list_counts_headers_mounted_and_unmounted() {
    if !can_mount() {
        return;
    }
    let b = with_files(3);
    fs::write(b.path("mnt/empty"), "").unwrap();
    let counts = |line: &str| -> Vec<(Value, Value)> {
        let v = b.json(line);
        assert_eq!(v["uncounted"], 0);
        v["keks"].as_array().unwrap().iter().map(|k| (k["state"].clone(), k["headers"].clone())).collect()
    };
    assert_eq!(counts("key list mnt --count --json"), [("active".into(), 3.into())]);
    b.ok("rotate mnt");
    let both = [("retired".into(), 0.into()), ("active".into(), 3.into())];
    assert_eq!(counts("key list mnt --count --json"), both);
    assert!(b.json("key list mnt --json")["keks"][0].get("headers").is_none(), "nothing is counted unasked");
    b.ok("unmount mnt");
    assert_eq!(counts("key list back --count --json"), both);
    let said = b.ok("key list back --count");
    assert!(said.contains("           opened by keyfile:DIR/key\n           named by 3 headers\n"), "{said}");
    fs::rename(b.path("key"), b.path("away")).unwrap();
    assert_eq!(b.run("key list back --count").status.code(), Some(13), "a count takes a key");
    assert_eq!(counts("key list back --count --json --open-key keyfile:DIR/away"), both);
    b.ok("key list back");
}
