//! Backups of the backing directory that are made while the store is rotated.

use super::control::rotation;
use super::support::{Bench, can_mount, wait_for};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

const DIRS: usize = 30;
const FILES: usize = 70;

/// Everything below a directory by its path: what is in it if it is a file.
fn tree(at: &Path) -> BTreeMap<String, Option<Vec<u8>>> {
    let mut out = BTreeMap::new();
    let mut todo = vec![at.to_owned()];
    while let Some(dir) = todo.pop() {
        for e in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let is_dir = e.file_type().unwrap().is_dir();
            if is_dir {
                todo.push(e.path());
            }
            let path = e.path().strip_prefix(at).unwrap().to_str().unwrap().to_owned();
            out.insert(path, (!is_dir).then(|| fs::read(e.path()).unwrap()));
        }
    }
    out
}

/// A few thousand files: small and larger ones, empty ones, some under long names, some under two.
fn fill(at: &Path) {
    for d in 0..DIRS {
        let dir = at.join(format!("{d}"));
        fs::create_dir(&dir).unwrap();
        for f in 0..FILES {
            let name = if f % 10 == 0 { format!("{f}{}", "long".repeat(60)) } else { f.to_string() };
            let len = if f % 35 == 0 { 100_000 } else { (d * f) % 5000 };
            fs::write(dir.join(&name), vec![(d ^ f) as u8; len]).unwrap();
            if f % 10 == 1 {
                fs::hard_link(dir.join(&name), at.join(format!("{d}-{f}"))).unwrap();
            }
        }
    }
}

/// The sweep has moved some headers and is far from its end.
fn is_in_mid_sweep(b: &Bench) -> bool {
    let r = rotation(b);
    let moved = r["status"]["counts"]["rewrapped"].as_u64().unwrap_or(0);
    r["running"] == true && r["status"]["state"] == "sweeping" && (50..DIRS as u64 * 50).contains(&moved)
}

fn copy(b: &Bench, to: &str) {
    let copied = Command::new("cp").arg("-a").arg(b.path("back")).arg(b.path(to)).status().unwrap();
    assert!(copied.success());
}

#[test]
fn a_backup_of_the_backing_directory_in_mid_rotation_restores_and_opens() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    fill(&b.path("mnt"));
    let want = tree(&b.path("mnt"));
    b.ok("rotate mnt --detach --rate 100 --jobs 1");
    // While it goes on, and while it is paused.
    wait_for("the sweep", || is_in_mid_sweep(&b));
    copy(&b, "going");
    b.ok("rotate mnt --pause");
    wait_for("the pause", || rotation(&b)["status"]["paused"] == true);
    assert!(is_in_mid_sweep(&b), "nothing was copied in mid-sweep: {}", rotation(&b));
    copy(&b, "paused");
    b.ok("rotate mnt --cancel");
    wait_for("the end", || rotation(&b)["running"] == false);
    assert!(tree(&b.path("mnt")) == want);
    b.ok("unmount mnt");
    for backup in ["going", "paused"] {
        let keks = b.json(&format!("rotate {backup} --dry-run --full-speed --json"))["headers_by_kek"]
            .as_object()
            .unwrap()
            .len();
        assert_eq!(keks, 2, "{backup}: headers under both KEKs");
        b.ok(&format!("check {backup} --deep"));
        b.ok(&format!("mount {backup} mnt"));
        assert!(tree(&b.path("mnt")) == want, "{backup}");
        let v = b.json("rotate mnt --destroy-old --full-speed --json");
        assert_eq!((&v["outcome"], &v["resumed"]), (&"complete".into(), &true.into()), "{backup}");
        assert!(tree(&b.path("mnt")) == want, "{backup}, after it was rotated");
        b.ok("unmount mnt");
        b.ok(&format!("check {backup} --deep"));
    }
}
