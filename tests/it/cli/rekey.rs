//! `rekey` of files in use, through the program and a real mount.

use super::support::{Bench, can_mount};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

const WHY: &str = "\
rotate alone does not help after a leak: it wraps the same file keys anew, so whoever had a file's key, or the KEK and
a copy of the header, could read on. The files rekeyed now have keys that nobody had. What was copied before (backups,
snapshots, blocks that the disk has not overwritten yet) stays readable with the old keys. If the KEK itself leaked, let
rotate come first and then rekey: new file keys are wrapped under the KEK that is active.
";

/// A mounted store with names in clear, so that backing files are found.
fn mounted() -> Bench {
    let b = Bench::new();
    b.ok("init back --key keyfile:DIR/key --plaintext-names");
    b.ok("mount back mnt --log-file DIR/log --audit-log DIR/audit");
    b
}

fn file_id(b: &Bench, name: &str) -> String {
    b.json(&format!("inspect back/{name} --json"))["slots"][0]["file_id"].as_str().unwrap().to_owned()
}

/// Everything that a rekey must leave as it is, as the mount shows it.
fn seen(p: &Path) -> (u64, u32, u64, u64, i64, i64, i64, i64) {
    let m = fs::metadata(p).unwrap();
    (m.ino(), m.mode(), m.nlink(), m.size(), m.atime(), m.mtime(), m.mtime_nsec(), i64::from(m.uid()))
}

fn content(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 5 + i / 4096 * 31) as u8 ^ seed).collect()
}

#[test]
fn files_in_use_get_new_keys_and_keep_everything_else() {
    if !can_mount() {
        return;
    }
    let b = mounted();
    let (f, d) = (b.path("mnt/f"), b.path("mnt/d"));
    fs::create_dir(&d).unwrap();
    fs::write(d.join("small"), "small").unwrap();
    fs::write(d.join("empty"), "").unwrap();
    fs::write(d.join("one"), content(300_000, 1)).unwrap();
    fs::hard_link(d.join("one"), b.path("mnt/two")).unwrap();
    fs::write(&f, content(2_000_000, 2)).unwrap();
    b.chmod("mnt/f", 0o4750);
    let mut open = File::options().read(true).write(true).open(&f).unwrap();
    let reader = File::open(&f).unwrap();
    // Dirty in the kernel's cache: nobody has asked for it to be written.
    open.write_all_at(b"dirty", 1_000_000).unwrap();
    let names = ["f", "two", "d/one", "d/small"];
    open.sync_all().unwrap();
    let (before, ids): (Vec<_>, Vec<_>) =
        names.iter().map(|n| (seen(&b.path(&format!("mnt/{n}"))), file_id(&b, n))).unzip();
    let handle_ino = open.metadata().unwrap().ino();
    open.write_all_at(b"dirty too", 1_500_000).unwrap();
    let (ino, mode, ..) = before[0];
    b.says("rekey mnt", 0, &format!("rekeyed: 3 files, 2300005 bytes; 1 are empty\n{WHY}"), "");
    for (i, n) in names.iter().enumerate() {
        assert_ne!(file_id(&b, n), ids[i], "{n}");
        if i > 0 {
            assert_eq!(seen(&b.path(&format!("mnt/{n}"))), before[i], "{n}");
        }
    }
    let m = fs::metadata(&f).unwrap();
    assert_eq!((m.ino(), m.mode(), open.metadata().unwrap().ino()), (ino, mode, handle_ino));
    // The handles go on.
    let mut want = content(2_000_000, 2);
    want[1_000_000..1_000_005].copy_from_slice(b"dirty");
    want[1_500_000..1_500_009].copy_from_slice(b"dirty too");
    open.seek(SeekFrom::Start(2_000_000)).unwrap();
    open.write_all(b"and more").unwrap();
    want.extend_from_slice(b"and more");
    let mut got = Vec::new();
    (&reader).read_to_end(&mut got).unwrap();
    assert!(got == want);
    File::options().append(true).open(b.path("mnt/two")).unwrap().write_all(b"linked").unwrap();
    drop((open, reader));
    b.ok("unmount mnt");
    b.ok("check back --deep");
    b.ok("mount back mnt");
    assert!(fs::read(&f).unwrap() == want);
    let linked = [&content(300_000, 1)[..], b"linked"].concat();
    assert!(fs::read(d.join("one")).unwrap() == linked && fs::read(b.path("mnt/two")).unwrap() == linked);
    assert_eq!(fs::metadata(d.join("one")).unwrap().ino(), fs::metadata(b.path("mnt/two")).unwrap().ino());
    b.ok("unmount mnt");
    let log = fs::read_to_string(b.path("audit")).unwrap();
    let events = log.lines().filter(|l| l.contains("\"event\":\"rekey\"")).count();
    assert_eq!(events, 3, "one for each file");
    b.ok("audit verify audit --store back");
}

#[test]
fn paths_and_criteria_choose() {
    if !can_mount() {
        return;
    }
    let b = mounted();
    fs::create_dir(b.path("mnt/d")).unwrap();
    for n in ["f", "d/g", "d/h"] {
        fs::write(b.path(&format!("mnt/{n}")), n).unwrap();
    }
    let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    File::options().write(true).open(b.path("mnt/d/h")).unwrap().set_modified(old).unwrap();
    let ids = || ["f", "d/g", "d/h"].map(|n| file_id(&b, n));
    let rekeyed = |line: &str| {
        let before = ids();
        let v = b.json(line);
        let changed = before.iter().zip(ids()).map(|(a, b)| *a != b).collect::<Vec<_>>();
        (v["counts"]["rekeyed"].as_u64().unwrap(), changed)
    };
    assert_eq!(rekeyed("rekey mnt/f --json"), (1, vec![true, false, false]));
    assert_eq!(rekeyed("rekey mnt/../mnt/d --json"), (2, vec![false, true, true]));
    assert_eq!(rekeyed("rekey DIR/mnt --written-before 2001-09-10 --json"), (1, vec![false, false, true]));
    assert_eq!(rekeyed("rekey mnt --written-before 2001-09-09T01:46:40Z --json"), (0, vec![false; 3]));
    assert_eq!(rekeyed("rekey mnt --dry-run --json"), (3, vec![false; 3]));
    let kek = b.json("key list mnt --json")["keks"][0]["id"].as_str().unwrap().to_owned();
    assert_eq!(rekeyed(&format!("rekey mnt/d --kek {kek} --json")), (2, vec![false, true, true]));
    b.ok("rotate mnt");
    assert_eq!(rekeyed(&format!("rekey mnt --kek {kek} --json")), (0, vec![false; 3]));
    b.fails(
        "rekey back",
        10,
        "back: not in a mounted store of ours; mount it first with: envelopefs mount BACKING MOUNTPOINT",
    );
    b.fails("rekey mnt/none", 1, "cannot find mnt/none: No such file or directory");
    b.fails(
        "rekey mnt --written-before tomorrow",
        2,
        "invalid value 'tomorrow' for '--written-before <DATE>': not a date such as 2026-11-24, or a date and time such as 2026-11-24T18:00:00Z; see --help",
    );
}

/// Left to the daemon, looked at, paused, resumed and cancelled, by any path in the store.
#[test]
fn a_detached_rekey_is_watched_and_steered() {
    if !can_mount() {
        return;
    }
    let b = mounted();
    fs::create_dir(b.path("mnt/d")).unwrap();
    for i in 0..40 {
        fs::write(b.path(&format!("mnt/d/{i}")), content(300_000, i)).unwrap();
    }
    let says = |line: &str, what: &str| {
        let out = b.ok(line);
        assert!(out.contains(what), "{line}: {out}");
    };
    says("rekey --status mnt", "state     there was no rekey since the mount\n");
    b.fails("rekey --cancel mnt", 2, "no rekey of this store is under way; see --help");
    b.says(
        "rekey mnt/d --rate 1 --detach",
        0,
        "rekey started; follow it with: envelopefs rekey --status DIR/mnt\n",
        "",
    );
    // At a megabyte a second it takes twelve seconds: there is time to pause it, and then there is all the time.
    let status = || b.json("rekey --status mnt --json")["rekey"]["status"].clone();
    super::support::wait_for("a file to be done", || status()["counts"]["rekeyed"].as_u64() > Some(0));
    b.ok("rekey --pause mnt/d/7");
    super::support::wait_for("the pause to be told", || {
        b.json("rekey --status mnt --json")["rekey"]["status"]["paused"] == true
    });
    let v = b.json("rekey --status mnt --json");
    assert_eq!((&v["rekey"]["running"], &v["rekey"]["status"]["state"]), (&true.into(), &"rekeying".into()));
    says("status mnt", "rekey     rekeying, paused, ");
    says("rekey --status mnt", "\npaths     d\n");
    assert_eq!(v["asked"], serde_json::json!({"paths": ["d"], "paths_total": 1, "written_before": null, "kek": null}));
    says("rekey --status back", "state     rekeying, paused\n");
    b.fails("rotate mnt", 12, "files of this store are being rekeyed; see how it stands with: envelopefs status mnt");
    b.fails(
        "rekey mnt/d/1",
        12,
        "files of this store are being rekeyed; see how it stands with: envelopefs status DIR/mnt",
    );
    // Paused, the store is used as ever.
    fs::write(b.path("mnt/d/3"), "new").unwrap();
    b.ok("rekey --resume back");
    b.ok("rekey --cancel back");
    super::support::wait_for("the end", || b.json("status mnt --json")["daemon"]["rekey"]["running"] == false);
    let o = b.run("rekey --status mnt");
    let out = b.masked(&o.stdout);
    assert_eq!(o.status.code(), Some(9), "{out}");
    assert!(out.starts_with("state     cancelled\n") && out.contains("\nrekey     unfinished of d, "), "{out}");
    assert!(b.masked(&o.stderr).starts_with("envelopefs: a rekey is unfinished, and none is under way; "));
    b.ok("unmount mnt");
    let o = b.run("rekey --status back");
    assert_eq!(o.status.code(), Some(9));
    let out = b.masked(&o.stdout);
    assert!(out.starts_with("state     not mounted: no rekey is under way\nrekey     unfinished, "), "{out}");
    b.fails(
        "rekey --pause back",
        10,
        "DIR/back: no rekey is under way: the store is not mounted; mount it first with: envelopefs mount BACKING MOUNTPOINT",
    );
    b.ok("mount back mnt");
    assert_eq!(b.json("rekey mnt/d --full-speed --detach --json"), serde_json::json!({"running": true}));
    super::support::wait_for("the end", || b.json("status mnt --json")["daemon"]["rekey"]["running"] == false);
    let report = &b.json("rekey --status mnt --json")["rekey"]["report"];
    assert_eq!(
        (&report["outcome"], &report["resumed"], &report["failures_total"]),
        (&"complete".into(), &true.into(), &0.into())
    );
    says("rekey --status mnt", "state     complete\n");
    assert!((0..40).all(|i| i == 3 || fs::read(b.path(&format!("mnt/d/{i}"))).unwrap() == content(300_000, i)));
    b.ok("unmount mnt");
    b.ok("check back --deep");
}

/// Whoever waits for it ends it by going away.
#[test]
fn a_rekey_ends_with_the_client_that_waits_for_it() {
    if !can_mount() {
        return;
    }
    let b = mounted();
    for i in 0..10 {
        fs::write(b.path(&format!("mnt/{i}")), content(1_000_000, i)).unwrap();
    }
    let mut child = b.spawn("rekey mnt --rate 1");
    super::support::wait_for("it to run", || b.json("status mnt --json")["daemon"]["rekey"]["running"] == true);
    child.kill().unwrap();
    child.wait().unwrap();
    super::support::wait_for("the end", || b.json("status mnt --json")["daemon"]["rekey"]["running"] == false);
    assert_eq!(b.json("status mnt --json")["daemon"]["rekey"]["report"]["outcome"], "cancelled");
    b.ok("unmount mnt");
}

/// A bind mount shows a part of the store at another place, also as an envelopefs mount: the path below it was taken for
/// one from the store's root.
#[test]
fn a_path_below_a_bind_mount_is_the_file_that_is_seen_there() {
    if !can_mount() || !rustix::process::geteuid().is_root() {
        return;
    }
    let b = mounted();
    fs::create_dir_all(b.path("mnt/home/d")).unwrap();
    fs::create_dir(b.path("bound")).unwrap();
    let names = ["f", "d/f", "home/f", "home/d/f"];
    fs::create_dir(b.path("mnt/d")).unwrap();
    for n in names {
        fs::write(b.path(&format!("mnt/{n}")), n).unwrap();
    }
    let ids = || names.map(|n| file_id(&b, n));
    for (path, want) in [("bound/f", [false, false, true, false]), ("bound/d", [false, false, false, true])] {
        let before = ids();
        let mut c = Command::new("unshare");
        b.prepare(&mut c);
        let script = format!("mount --bind mnt/home bound && exec {} rekey {path}", env!("CARGO_BIN_EXE_envelopefs"));
        let o = c.args(["-m", "--propagation", "private", "sh", "-c", &script]).output().unwrap();
        assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
        let after = ids();
        assert_eq!(std::array::from_fn(|i| before[i] != after[i]), want, "{path}");
    }
    b.ok("unmount mnt");
}

#[test]
fn a_damaged_file_is_named_and_left_and_the_rest_is_done() {
    if !can_mount() {
        return;
    }
    let b = mounted();
    for n in ["good", "bad", "lost"] {
        fs::write(b.path(&format!("mnt/{n}")), content(20_000, 3)).unwrap();
    }
    b.ok("unmount mnt");
    // As a power cut leaves a file that was not synced: that is told, and no failure.
    File::options().write(true).open(b.path("back/lost")).unwrap().write_all_at(&[0; 4096], 0).unwrap();
    let raw = File::options().read(true).write(true).open(b.path("back/bad")).unwrap();
    let mut byte = [0];
    raw.read_exact_at(&mut byte, 4096 * 3 + 5).unwrap();
    raw.write_all_at(&[byte[0] ^ 1], 4096 * 3 + 5).unwrap();
    b.ok("mount back mnt");
    let ids = ["good", "bad"].map(|n| file_id(&b, n));
    let o = b.run("rekey mnt");
    let (out, err) = (b.masked(&o.stdout), b.masked(&o.stderr));
    assert_eq!(o.status.code(), Some(9), "{err}");
    assert!(
        out.contains("rekeyed: 1 files, 20000 bytes\nno header: lost; see check\nfailed: bad: block 2 ")
            && out.contains("(block-auth)"),
        "{out}"
    );
    assert_eq!(
        err,
        "envelopefs: 1 files could not be rekeyed and are as they were; what is done stays done; a rekey of the same \
         paths and options goes on with the rest\n"
    );
    assert_ne!(file_id(&b, "good"), ids[0]);
    assert_eq!(file_id(&b, "bad"), ids[1]);
    // Who comes later hears it too.
    let o = b.run("rekey --status mnt");
    let out = b.masked(&o.stdout);
    assert_eq!(o.status.code(), Some(9));
    assert!(out.starts_with("state     incomplete\n") && out.contains("  bad: block 2 "), "{out}");
    assert!(out.contains("\nno header 1 files with content\n  lost; see check\n"), "{out}");
    assert!(out.contains("rekey     unfinished of /, 1 files done by "), "{out}");
    assert!(
        b.ok("status back")
            .contains("rekey     last one incomplete: 1 files rekeyed\nrekey     unfinished of /, 1 files")
    );
    fs::remove_file(b.path("mnt/bad")).unwrap();
    let out = b.ok("rekey mnt");
    assert!(out.starts_with("went on with an unfinished rekey: 1 files were done before\nrekeyed: 0 files"), "{out}");
}

/// Programs at work in a file, through the kernel's cache and with fdatasync, while it is rekeyed over and over.
#[test]
fn programs_at_work_notice_nothing() {
    if !can_mount() {
        return;
    }
    const BLOCKS: usize = 200;
    let b = mounted();
    let path = b.path("mnt/f");
    fs::write(&path, vec![0u8; BLOCKS * 4096]).unwrap();
    let ino = fs::metadata(&path).unwrap().ino();
    let stop = AtomicBool::new(false);
    let work = |who: usize, path: PathBuf| {
        let f = File::options().read(true).write(true).open(&path).unwrap();
        let mut last = vec![0u8; BLOCKS];
        let mut round = 0usize;
        while !stop.load(Ordering::Relaxed) || round < 500 {
            round += 1;
            let block = (round * 37 % (BLOCKS / 2)) * 2 + who;
            let value = 1 + (round % 200) as u8;
            f.write_all_at(&[value; 4096], block as u64 * 4096).unwrap();
            if round.is_multiple_of(50) {
                f.sync_data().unwrap();
            }
            last[block] = value;
            let mut got = [0; 4096];
            f.read_exact_at(&mut got, block as u64 * 4096).unwrap();
            assert!(got.iter().all(|g| *g == value));
            assert_eq!(fs::metadata(&path).unwrap().ino(), ino);
        }
        last
    };
    let last = std::thread::scope(|s| {
        let workers: Vec<_> = (0..2)
            .map(|who| {
                s.spawn({
                    let path = path.clone();
                    move || work(who, path)
                })
            })
            .collect();
        for _ in 0..8 {
            assert_eq!(b.json("rekey mnt/f --json")["counts"]["rekeyed"], 1);
        }
        stop.store(true, Ordering::Relaxed);
        workers.into_iter().map(|w| w.join().unwrap()).collect::<Vec<_>>()
    });
    for round in ["cached", "remounted"] {
        let got = fs::read(&path).unwrap();
        for (i, block) in got.chunks(4096).enumerate() {
            assert!(block.iter().all(|v| *v == last[i % 2][i]), "{round}: block {i}");
        }
        b.ok("unmount mnt");
        b.ok("mount back mnt");
    }
    b.ok("unmount mnt");
    b.ok("check back --deep");
}

/// A file that somebody has mapped and writes through the mapping, while it is rekeyed over and over. The kernel writes the
/// pages when it likes.
#[test]
fn what_is_written_through_a_mapping_stays() {
    use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};
    if !can_mount() {
        return;
    }
    const BLOCKS: usize = 300;
    const LEN: usize = BLOCKS * 4096;
    let b = mounted();
    let path = b.path("mnt/f");
    fs::write(&path, vec![0u8; LEN]).unwrap();
    let f = File::options().read(true).write(true).open(&path).unwrap();
    let stop = AtomicBool::new(false);
    let last = std::thread::scope(|s| {
        let writer = s.spawn(|| {
            let mut last = vec![0u8; BLOCKS];
            // SAFETY: a fresh mapping of an open file, used only within its length, by this thread, and unmapped below.
            let at =
                unsafe { mmap(std::ptr::null_mut(), LEN, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &f, 0) }
                    .unwrap();
            // SAFETY: as above.
            let bytes = unsafe { std::slice::from_raw_parts_mut(at.cast::<u8>(), LEN) };
            let mut round = 0usize;
            while !stop.load(Ordering::Relaxed) || round < 1000 {
                round += 1;
                let (block, value) = (round * 37 % BLOCKS, 1 + (round % 200) as u8);
                bytes[block * 4096..][..4096].fill(value);
                last[block] = value;
                if round.is_multiple_of(100) {
                    // SAFETY: the mapping is there, and as long.
                    unsafe {
                        msync(at, LEN, if round.is_multiple_of(200) { MsyncFlags::SYNC } else { MsyncFlags::ASYNC })
                    }
                    .unwrap();
                }
                let seen = round * 101 % BLOCKS;
                assert!(bytes[seen * 4096..][..4096].iter().all(|v| *v == last[seen]), "block {seen}");
            }
            // SAFETY: nothing uses it any more. What is dirty in it is the kernel's to write.
            unsafe { munmap(at, LEN) }.unwrap();
            last
        });
        for _ in 0..6 {
            assert_eq!(b.json("rekey mnt/f --json")["counts"]["rekeyed"], 1);
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap()
    });
    drop(f);
    for round in ["cached", "remounted"] {
        let got = fs::read(&path).unwrap();
        assert_eq!(got.len(), LEN);
        for (i, block) in got.chunks(4096).enumerate() {
            assert!(block.iter().all(|v| *v == last[i]), "{round}: block {i}");
        }
        b.ok("unmount mnt");
        b.ok("mount back mnt");
    }
    b.ok("unmount mnt");
    b.ok("check back --deep");
}

/// Killed at some instant, the daemon leaves every file whole; the same command goes on.
#[test]
fn after_kill_9_every_file_is_whole_and_the_rest_is_done() {
    if !can_mount() {
        return;
    }
    let b = mounted();
    for i in 0..300 {
        fs::write(b.path(&format!("mnt/{i}")), content(30_000, i as u8)).unwrap();
    }
    fs::hard_link(b.path("mnt/0"), b.path("mnt/linked")).unwrap();
    b.ok("unmount mnt");
    b.ok("mount back mnt");
    let ids: Vec<_> = (0..300).map(|i| file_id(&b, &i.to_string())).collect();
    let child = b.spawn("rekey mnt");
    super::support::wait_for("some files to be done", || file_id(&b, "7") != ids[7] || file_id(&b, "200") != ids[200]);
    b.kill();
    child.wait_with_output().unwrap();
    b.ok("mount back mnt");
    let whole = || (0..300).all(|i| fs::read(b.path(&format!("mnt/{i}"))).unwrap() == content(30_000, i as u8));
    assert!(whole());
    b.ok("rekey mnt");
    assert!(whole());
    for (i, id) in ids.iter().enumerate() {
        assert_ne!(file_id(&b, &i.to_string()), *id, "{i}");
    }
    assert_eq!(fs::read_dir(b.path("back/.envelopefs/rekey")).unwrap().count(), 0);
    b.ok("unmount mnt");
    b.ok("check back --deep");
}
