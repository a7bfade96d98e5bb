use super::chain::{Bad, Beginning, Summary, Verifier};
use super::*;
use crate::format::ids::FileId;
use crate::kms::event::{Change, KekChange, Observer};
use std::fs;
use std::io::Write;

const STORE: StoreId = StoreId([9; 16]);

fn options(path: &Path) -> Options {
    Options { path: path.to_owned(), on_error: OnError::Continue, fsync: Duration::ZERO }
}

fn checked(files: &[&Path]) -> Result<Summary, Bad> {
    let mut v = Verifier::new(Some(STORE));
    for f in files {
        match verify::file(&mut v, f, false) {
            Ok(()) => {}
            Err(verify::Refused::Bad(b)) => return Err(b),
            Err(verify::Refused::Unreadable(f)) => panic!("{f}"),
        }
    }
    v.end()
}

fn events(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    let event = |l: &str| serde_json::from_str::<serde_json::Value>(l).unwrap()["event"].as_str().unwrap().to_owned();
    text.lines().map(event).collect()
}

fn one(log: &Log) {
    log.event("unwrap", Fields { file: Some(FileId([1; 16])), ..Fields::default() });
}

#[test]
fn a_log_goes_on_over_mounts_and_its_seals_hold() {
    let d = tempfile::tempdir().unwrap();
    let path = d.path().join("a/{store}.audit");
    fs::create_dir(d.path().join("a")).unwrap();
    let secret = StoreSecret::random();
    let key = seal_key(&secret);
    for _ in 0..2 {
        let log = Log::open(&options(&path), STORE).unwrap();
        assert_eq!(Log::open(&options(&path), STORE).unwrap_err().kind, super::super::fault::FaultKind::Locked);
        log.unlock(&secret);
        one(&log);
        one(&log);
        log.close();
        one(&log);
        assert_eq!(log.checkpoint(), None, "closed");
        assert_eq!(log.counts().1, 0);
    }
    let path = d.path().join(format!("a/{STORE}.audit"));
    let expected = ["started", "unwrap", "unwrap", "seal", "opened", "unwrap", "unwrap", "seal"];
    // The key comes before or after what is told right after it, by chance of the writer's batches.
    let mut got = events(&path);
    got.retain(|e| e != "seal");
    assert_eq!(got, expected.iter().filter(|e| **e != "seal").map(|e| (*e).to_owned()).collect::<Vec<_>>());
    assert_eq!(events(&path).last().map(String::as_str), Some("seal"));
    let s = checked(&[&path]).unwrap();
    assert_eq!((s.beginning, s.chains, s.unsealed), (Beginning::Start, 1, 0));
    s.judge_seals(|i| !key.is_genuine(&s.seals[i].seal)).unwrap();
    let other = seal_key(&StoreSecret::random());
    assert_eq!(s.judge_seals(|i| !other.is_genuine(&s.seals[i].seal)).unwrap_err().1.why, chain::Why::SealForged);
}

#[test]
fn a_seal_comes_at_least_every_256_records() {
    let d = tempfile::tempdir().unwrap();
    let path = d.path().join("log");
    let log = Log::open(&options(&path), STORE).unwrap();
    log.unlock(&StoreSecret::random());
    for _ in 0..3000 {
        one(&log);
    }
    let head = log.checkpoint().unwrap();
    assert_eq!(head.trouble, None);
    let s = checked(&[&path]).unwrap();
    assert_eq!((s.end, s.unsealed), (head.chain, 0));
    let mut before = 0;
    for seal in &s.seals {
        assert!(seal.seq - before <= chain::SEAL_EVERY, "{} after {before}", seal.seq);
        before = seal.seq;
    }
    assert!(s.records > 3000 + 11);
    assert_eq!(log.counts(), (s.records, 0));
}

#[test]
fn a_log_without_a_key_has_no_seals_and_is_told_from_one_that_has() {
    let d = tempfile::tempdir().unwrap();
    let path = d.path().join("log");
    let log = Log::open(&options(&path), STORE).unwrap();
    one(&log);
    log.close();
    let s = checked(&[&path]).unwrap();
    assert!(s.seals.is_empty());
    assert_eq!(s.judge_seals(|_| false).unwrap_err().1, Bad { line: 2, why: chain::Why::NoSeal });
}

#[test]
fn a_torn_tail_is_kept_and_accounted_for() {
    let d = tempfile::tempdir().unwrap();
    let path = d.path().join("log");
    let log = Log::open(&options(&path), STORE).unwrap();
    one(&log);
    log.close();
    for torn in ["{\"time\":\"2026", "\0\0\0\0", "{\"time\":\"x\n{\"tim"] {
        fs::File::options().append(true).open(&path).unwrap().write_all(torn.as_bytes()).unwrap();
        assert!(checked(&[&path]).is_err(), "before a mount has accounted for it");
        let log = Log::open(&options(&path), STORE).unwrap();
        one(&log);
        log.close();
        assert!(String::from_utf8_lossy(&fs::read(&path).unwrap()).contains(torn), "it is kept");
    }
    let s = checked(&[&path]).unwrap();
    assert_eq!(s.recovered, 3);
    // A last line that lacks only its newline was whole.
    let mut bytes = fs::read(&path).unwrap();
    bytes.pop();
    fs::write(&path, &bytes).unwrap();
    Log::open(&options(&path), STORE).unwrap().close();
    let again = checked(&[&path]).unwrap();
    assert_eq!((again.recovered, again.records), (3, s.records + 1));
}

#[test]
fn files_that_are_no_log_of_this_store_are_left_alone() {
    let d = tempfile::tempdir().unwrap();
    let path = d.path().join("log");
    for other in ["hello\n", "hello"] {
        fs::write(&path, other).unwrap();
        let e = Log::open(&options(&path), STORE).unwrap_err();
        assert!(e.message.contains("no audit record"), "{e}");
        assert_eq!(fs::read_to_string(&path).unwrap(), other);
    }
    fs::remove_file(&path).unwrap();
    Log::open(&options(&path), StoreId([1; 16])).unwrap().close();
    let before = fs::read(&path).unwrap();
    let e = Log::open(&options(&path), STORE).unwrap_err();
    assert!(e.message.contains(&StoreId([1; 16]).to_string()), "{e}");
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn a_file_that_is_moved_away_is_continued_in_a_new_one() {
    let d = tempfile::tempdir().unwrap();
    let path = d.path().join("log");
    let old = |n: u32| d.path().join(format!("log.{n}"));
    let log = Log::open(&options(&path), STORE).unwrap();
    log.unlock(&StoreSecret::random());
    for n in 1..4 {
        one(&log);
        log.checkpoint().unwrap();
        fs::rename(&path, old(n)).unwrap();
    }
    // As logrotate's `create` does.
    fs::write(&path, "").unwrap();
    one(&log);
    log.checkpoint().unwrap();
    // Another file in its place is not ours to write to: the log goes on in the one that was moved.
    fs::rename(&path, old(4)).unwrap();
    fs::write(&path, "strange").unwrap();
    one(&log);
    log.checkpoint().unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "strange");
    log.close();
    let files: Vec<PathBuf> = (1..5).map(old).collect();
    let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let s = checked(&files).unwrap();
    assert_eq!((s.chains, s.lost), (1, 0));
    assert_eq!(files.iter().map(|f| events(f).iter().filter(|e| *e == "unwrap").count()).sum::<usize>(), 5);
    for f in files.get(1..).unwrap() {
        assert_eq!(events(f).first().map(String::as_str), Some("continued"));
    }
    assert_eq!(checked(&[files[0], files[2]]).unwrap_err().why, chain::Why::NotContinued);
    assert!(matches!(checked(&files[1..]).unwrap().beginning, Beginning::After(c) if c.seq > 1));
}

#[test]
fn a_file_that_is_emptied_is_begun_again_where_the_chain_was() {
    let d = tempfile::tempdir().unwrap();
    let path = d.path().join("log");
    let log = Log::open(&options(&path), STORE).unwrap();
    one(&log);
    log.checkpoint().unwrap();
    // As logrotate's `copytruncate` does.
    let copy = d.path().join("log.1");
    fs::copy(&path, &copy).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    one(&log);
    log.close();
    assert_eq!(events(&path), ["continued", "unwrap"]);
    assert_eq!(checked(&[&copy, &path]).unwrap().chains, 1);
}

#[test]
fn changes_are_told_as_they_are() {
    let d = tempfile::tempdir().unwrap();
    let path = d.path().join("log");
    let log = Log::open(&options(&path), STORE).unwrap();
    log.change(&Change::Kek { kek: [3; 16], change: KekChange::Destroyed });
    let counts = [("rewrapped", 7)];
    log.change(&Change::Rotation { target: None, step: "failed", counts: &counts, result: Err("kms-denied") });
    log.close();
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let kek = "03".repeat(16);
    assert!(
        lines[1]
            .contains(&format!("\"event\":\"kek\",\"store\":\"{STORE}\",\"kek\":\"{kek}\",\"state\":\"destroyed\""))
    );
    let rotate = "\"step\":\"failed\",\"counts\":{\"rewrapped\":7},\"result\":\"kms-denied\"";
    assert!(lines[2].contains(rotate), "{}", lines[2]);
}
