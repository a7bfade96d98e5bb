//! Runs of `rekey` over a store: what they choose, what they say, and how they go on.

use super::*;
use crate::backing::sim::{Moment, Op, SimDisk};
use crate::crypto::secret::Secret32;
use crate::format::geometry;
use crate::format::ids::FileId;
use crate::kms::guard::lane::Background;
use crate::kms::scripted::Behaviour;
use crate::kms::{Description, KmsError, WrapContext};
use crate::rotation::rekey::{
    Asked, RekeyOutcome, RekeyPhase, RekeyReport, RekeyStatus, Request, asked, rekey, unfinished,
};
use crate::store::header::Header;
use crate::store::load::{Histogram, Kind as Call};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A tree of seven files with content, one of them with three names, and an empty one.
fn tree() -> (SimDisk, Arc<Scripted>, Arc<Store<SimDisk>>) {
    let (disk, root) = (SimDisk::default(), Scripted::new("rekey"));
    init(&disk, &root);
    let s = open(disk.clone(), &root);
    for d in ["a", "b"] {
        s.mkdir(&s.root(), d.as_bytes(), 0o755, 0, None).unwrap();
    }
    for f in ["a/1", "a/2", "b/3", "b/4", "5", "6", "linked"] {
        write(&s, f, f.as_bytes());
    }
    write(&s, "empty", b"");
    let (n, _) = s.lookup(&s.root(), b"linked").unwrap();
    s.link(&n, &dir(&s, "a"), b"linked too").unwrap();
    s.link(&n, &dir(&s, "b"), b"and here").unwrap();
    (disk, root, s)
}

fn ids(s: &Arc<Store<SimDisk>>) -> BTreeMap<String, FileId> {
    let mut out = BTreeMap::new();
    for d in ["", "a", "b"] {
        for e in s.read_dir(&dir(s, d)).unwrap().into_iter().filter(|e| e.kind == Kind::File) {
            let (n, _) = s.lookup(&dir(s, d), &e.name).unwrap();
            if let Header::Slots(read) = s.header_of(&n).unwrap() {
                let file = read.0.authoritative().unwrap().1.file;
                out.insert(format!("{d}/{}", String::from_utf8_lossy(&e.name)), file);
            }
        }
    }
    out
}

fn changed(before: &BTreeMap<String, FileId>, s: &Arc<Store<SimDisk>>) -> Vec<String> {
    let now = ids(s);
    assert_eq!(now.len(), before.len());
    before.iter().filter(|(k, v)| now[*k] != **v).map(|(k, _)| k.clone()).collect()
}

fn all() -> Request {
    Request { paths: vec![Vec::new()], ..Request::default() }
}

/// Calls something whenever progress is told.
struct Told<F>(F);

impl<F: Fn(&RekeyStatus) + Sync> Progress<RekeyStatus> for Told<F> {
    fn update(&self, s: &RekeyStatus) {
        (self.0)(s);
    }
}

fn go(s: &Arc<Store<SimDisk>>, r: &Request) -> RekeyReport {
    rekey(s, r, &(), &Control::new()).unwrap()
}

#[test]
fn a_whole_store_a_tree_a_file() {
    let (_, _, s) = tree();
    let before = ids(&s);
    let r = go(&s, &Request { dry_run: true, ..all() });
    assert_eq!((r.outcome, r.counts.rekeyed, r.counts.bytes), (RekeyOutcome::DryRun, 7, 4 * 3 + 2 + 6));
    assert_eq!(changed(&before, &s), [""; 0]);
    let r = go(&s, &all());
    assert_eq!((r.outcome, r.counts.rekeyed, r.counts.bytes), (RekeyOutcome::Complete, 7, 4 * 3 + 2 + 6));
    assert_eq!((r.counts.empty, r.counts.failed, r.resumed), (1, 0, false));
    assert_eq!(changed(&before, &s).len(), before.len(), "all of them, by every name");
    let (n, attr) = s.lookup(&dir(&s, "b"), b"and here").unwrap();
    assert_eq!((attr.nlink, read(&s, &n).unwrap()), (3, b"linked".to_vec()));
    let before = ids(&s);
    let paths = ["a/1", "a", "6", "a/2", "6", "a//1"].map(|p| p.as_bytes().to_vec()).to_vec();
    let r = go(&s, &Request { paths, ..Request::default() });
    assert_eq!((r.outcome, r.counts.rekeyed), (RekeyOutcome::Complete, 4), "each once, whoever names it");
    // The one with names elsewhere, too: it is one file.
    assert_eq!(changed(&before, &s), ["/6", "/linked", "a/1", "a/2", "a/linked too", "b/and here"]);
    for bad in [&b"none"[..], b"6/x", b"a/none/x"] {
        let r = rekey(&s, &Request { paths: vec![bad.to_vec()], ..Request::default() }, &(), &Control::new());
        assert!(r.is_err());
    }
}

#[test]
fn only_what_meets_the_criteria() {
    let (_, _, s) = tree();
    let old = s.shared().keys.with_active(|k| k.id());
    let (n, _) = s.lookup(&s.root(), b"5").unwrap();
    let t = s.getattr(&n).unwrap().mtime;
    let before = ids(&s);
    // The clock of the simulated disk goes on with each operation: 5 was made after the ones in the folders.
    let r = go(&s, &Request { written_before: Some((t.sec, t.nsec)), ..all() });
    assert_eq!(changed(&before, &s), ["a/1", "a/2", "b/3", "b/4"]);
    assert_eq!((r.counts.rekeyed, r.counts.skipped), (4, 5), "the linked file counts for each of its names");
    rotate(&s, &one_job()).unwrap();
    write(&s, "a/new", b"new");
    let before = ids(&s);
    let r = go(&s, &Request { kek: Some(old), ..all() });
    assert_eq!((r.counts.rekeyed, changed(&before, &s)), (0, vec![]), "no header names it any more");
    let active = s.shared().keys.with_active(|k| k.id());
    let both = Request { kek: Some(active), written_before: Some((t.sec, t.nsec)), ..all() };
    assert_eq!(go(&s, &both).counts.rekeyed, 4);
}

/// It listens to what users wait, and says that it may be its doing; unless nobody is to be heeded.
#[test]
fn users_are_listened_to_while_it_works_and_not_after() {
    let busy = |full_speed| {
        let (disk, _, s) = tree();
        let user = Arc::clone(&s);
        disk.set_hook(Some(Arc::new(move |m| {
            if m == Moment::Before(Op::Rename) {
                user.shared().load.measure(Call::Read, || ());
            }
        })));
        let heard = Arc::new(parking_lot::Mutex::new(0));
        let (sum, load) = (Arc::clone(&heard), Arc::clone(&s));
        let told = move |_: &RekeyStatus| {
            let (quiet, busy) = load.shared().load.take();
            assert_eq!(quiet.iter().map(Histogram::total).sum::<u64>(), 0);
            *sum.lock() += busy.iter().map(Histogram::total).sum::<u64>();
        };
        rekey(&s, &Request { full_speed, jobs: NonZeroUsize::new(1), ..all() }, &Told(told), &Control::new()).unwrap();
        disk.set_hook(None);
        s.shared().load.measure(Call::Read, || ());
        assert!(s.shared().load.take().0.iter().all(|h| h.total() == 0), "nobody listens any more");
        *heard.lock()
    };
    assert!(busy(false) > 0);
    assert_eq!(busy(true), 0);
}

/// Paused between two stretches of a large file, it stands still, says so, and can be used; then it goes on.
#[test]
fn it_says_how_far_it_is_and_pauses_within_a_file() {
    const LEN: u64 = 3_000_000;
    let (disk, _, s) = tree();
    write(&s, "a/large", &vec![7; LEN as usize]);
    rotate(&s, &one_job()).unwrap();
    let control = Arc::new(Control::new());
    let (pausing, writes) = (Arc::clone(&control), AtomicU64::new(0));
    disk.set_hook(Some(Arc::new(move |m| {
        if m == Moment::Before(Op::Write) && writes.fetch_add(1, Ordering::Relaxed) == 4 {
            pausing.pause();
        }
    })));
    let waited = parking_lot::Mutex::new(Vec::new());
    let seen = parking_lot::Mutex::new(Vec::<RekeyStatus>::new());
    let told = |st: &RekeyStatus| {
        let mut seen = seen.lock();
        if st.paused && seen.last().is_some_and(|last| last.paused && last.copied == st.copied) {
            let (n, _) = s.lookup(&dir(&s, "a"), b"large").unwrap();
            s.open_file(&n, Access::ReadWrite).unwrap().write(LEN - 4, b"used").unwrap();
            s.shared().load.take();
            s.shared().load.measure(Call::Read, || ());
            let (quiet, busy) = s.shared().load.take();
            let calls = [quiet, busy].map(|h| h.iter().map(Histogram::total).sum::<u64>());
            waited.lock().push(calls);
            assert_eq!(unfinished(&disk).unwrap().unwrap().files, 0);
            control.resume();
        }
        seen.push(st.clone());
    };
    let asked = Request { paths: vec![b"/".to_vec()], jobs: NonZeroUsize::new(1), ..Request::default() };
    assert_eq!(unfinished(&disk).unwrap(), None);
    let large = Request { paths: vec![b"a/large".to_vec()], ..asked.clone() };
    let r = rekey(&s, &large, &Told(told), &control).unwrap();
    disk.set_hook(None);
    assert_eq!((r.outcome, r.counts.rekeyed, r.counts.bytes), (RekeyOutcome::Complete, 1, LEN));
    assert_eq!(waited.into_inner(), [[1, 0]], "what users wait in a pause is not its doing");
    let seen = seen.into_inner();
    let paused: Vec<_> = seen.iter().filter(|st| st.paused).collect();
    let still = paused.last().unwrap().copied;
    assert!(paused.len() > 1 && still > 0 && still < LEN, "{still}");
    assert_eq!((paused[0].state, paused[0].counts.scanned, paused[0].counts.rekeyed), (RekeyPhase::Rekeying, 1, 0));
    assert_eq!((paused[0].expected, paused[0].eta), (None, None), "it is not known how many files lie in a part of it");
    let last = seen.last().unwrap();
    assert_eq!((last.state, last.paused, last.counts), (RekeyPhase::Ended, false, r.counts));
    assert!(last.copied > LEN, "what was written meanwhile is copied again");
    let (n, _) = s.lookup(&dir(&s, "a"), b"large").unwrap();
    assert!(read(&s, &n).unwrap().ends_with(b"used"));
    // Of the whole store a rotation has counted the files.
    let last = parking_lot::Mutex::new(RekeyStatus::default());
    let told = |st: &RekeyStatus| *last.lock() = st.clone();
    rekey(&s, &asked, &Told(told), &Control::new()).unwrap();
    let last = last.into_inner();
    assert_eq!((last.expected, last.counts.scanned), (Some(11), 11));
    assert_eq!(unfinished(&disk).unwrap(), None, "it has ended");
}

/// What a power cut leaves of a new file that was not synced was a failure of every run, and kept each from its end.
#[test]
fn a_file_without_a_header_is_told_and_is_no_failure() {
    let (disk, root, s) = tree();
    let path = s.read_dir(&s.root()).unwrap().into_iter().find(|e| e.name == b"6").unwrap().backing;
    s.close().unwrap();
    drop(s);
    disk.write_raw(&path, 0, &[0; 2048]).unwrap();
    let s = open(disk.clone(), &root);
    for (dry_run, outcome) in [(true, RekeyOutcome::DryRun), (false, RekeyOutcome::Complete)] {
        let r = go(&s, &Request { dry_run, ..all() });
        assert_eq!((r.outcome, r.failures_total, r.no_header), (outcome, 0, vec!["6".to_owned()]));
        assert_eq!((r.counts.rekeyed, r.counts.empty, r.counts.no_header), (6, 1, 1));
    }
    assert_eq!(unfinished(&disk).unwrap(), None);
    // Anything but zeros is a header that was damaged.
    s.close().unwrap();
    drop(s);
    disk.flip_bit(&path, 1023, 0).unwrap();
    let r = go(&open(disk, &root), &all());
    assert_eq!(
        (r.outcome, r.counts.no_header, r.failures[0].code.as_str()),
        (RekeyOutcome::Incomplete, 0, "header-magic")
    );
}

/// The run that nobody had cancelled said that it was complete.
#[test]
fn a_file_of_which_the_disk_says_cancelled_has_failed() {
    let (disk, _, s) = tree();
    // The first two files that are made are the journal, and what it is of.
    disk.fail_next(Some(Op::Create), 2, libc::ECANCELED);
    let r = go(&s, &Request { jobs: NonZeroUsize::new(1), ..all() });
    assert_eq!((r.outcome, r.counts.rekeyed, r.failures_total), (RekeyOutcome::Incomplete, 6, 1));
}

/// Where names of a file with several may be, a directory that could not be listed ended the whole run.
#[test]
fn a_directory_that_cannot_be_listed_keeps_no_other_file_from_its_new_key() {
    let mut listed = 0;
    for at in 0.. {
        let (disk, _, s) = tree();
        let asked = Request { paths: vec![b"a".to_vec(), b"linked".to_vec()], ..all() };
        let seen = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&seen);
        disk.set_hook(Some(Arc::new(move |m| {
            if m == Moment::Before(Op::ReadDir) {
                count.fetch_add(1, Ordering::Relaxed);
            }
        })));
        disk.fail_next(Some(Op::ReadDir), at, libc::EACCES);
        let r = rekey(&s, &asked, &(), &Control::new()).unwrap();
        if at == 0 {
            assert_eq!((r.counts.rekeyed, r.failures_total, r.failures[0].directory), (3, 1, true), "{r:?}");
        } else {
            assert_eq!((r.outcome, r.counts.rekeyed), (RekeyOutcome::Complete, 3), "{at}: {r:?}");
        }
        listed = seen.load(Ordering::Relaxed);
        if listed <= at {
            break;
        }
    }
    assert_eq!(listed, 1 + 3 + 1, "the folder, all of them for names, and the folder again");
}

/// A file whose content is damaged makes it incomplete; the same request goes on, another one and `restart` do not.
#[test]
fn it_goes_on_where_it_was() {
    let (disk, root, s) = tree();
    let path = s.read_dir(&s.root()).unwrap().into_iter().find(|e| e.name == b"6").unwrap().backing;
    s.close().unwrap();
    drop(s);
    let good = disk.read_raw(&path).unwrap();
    disk.flip_bit(&path, geometry::block_offset(0), 1).unwrap();
    let s = open(disk.clone(), &root);
    let before = ids(&s);
    let r = go(&s, &all());
    assert_eq!((r.outcome, r.counts.rekeyed, r.failures_total), (RekeyOutcome::Incomplete, 6, 1));
    assert_eq!((r.failures[0].path.as_str(), r.failures[0].code.as_str()), ("6", "block-auth"));
    let noted = unfinished(&disk).unwrap().unwrap();
    assert_eq!(noted.files, 6, "what is on the disk says it without a key");
    assert!(r.failures[0].message.contains("block 0"), "{}", r.failures[0].message);
    assert_eq!(ids(&s)["/6"], before["/6"]);
    let between = ids(&s);
    // Renamed and written to meanwhile: still known to be done.
    s.rename(&dir(&s, "a"), b"1", &dir(&s, "b"), b"one", crate::backing::RenameMode::Replace).unwrap();
    let cancelled = Control::new();
    cancelled.cancel();
    let r = rekey(&s, &all(), &(), &cancelled).unwrap();
    assert_eq!((r.outcome, r.resumed, r.counts.rekeyed), (RekeyOutcome::Cancelled, true, 0));
    drop(s);
    disk.replace_raw(&path, &good).unwrap();
    let s = open(disk.crash_process(), &root);
    let r = go(&s, &all());
    assert_eq!((r.outcome, r.resumed, r.counts.rekeyed), (RekeyOutcome::Complete, true, 1));
    assert_eq!(r.counts.done_before, 5 + 3);
    let now = ids(&s);
    assert_ne!(now["/6"], before["/6"]);
    assert_eq!((now["b/one"], now["/linked"]), (between["a/1"], between["/linked"]));
    let r = go(&s, &all());
    assert_eq!((r.resumed, r.counts.rekeyed), (false, 7), "a run that ended is over");
}

/// Who has the key can tell what an unfinished run was of. Nobody else can, and no other run's word counts.
#[test]
fn what_an_unfinished_run_goes_over_is_known_to_the_store_only() {
    let (disk, _, s) = tree();
    let kek = s.shared().keys.with_active(|k| k.id());
    let cancelled = Control::new();
    cancelled.cancel();
    let of = |paths: &[&str]| paths.iter().map(|p| p.as_bytes().to_vec()).collect::<Vec<_>>();
    let request = Request { paths: of(&["linked", "a/1"]), kek: Some(kek), ..Request::default() };
    assert_eq!(asked(&disk, s.shared().keys.secret()).unwrap(), None);
    let begin = |r: &Request| assert_eq!(rekey(&s, r, &(), &cancelled).unwrap().outcome, RekeyOutcome::Cancelled);
    begin(&request);
    let paths = vec!["a/1".to_owned(), "linked".to_owned()];
    let want = Asked { paths, paths_total: 2, written_before: None, kek: Some(kek) };
    assert_eq!(asked(&disk, s.shared().keys.secret()).unwrap().as_ref(), Some(&want));
    assert_eq!(asked(&disk, &crate::crypto::secret::StoreSecret::random()).unwrap(), None);
    let sealed = disk.read_raw(".envelopefs/rekey/asked").unwrap();
    assert!(!sealed.windows(7).any(|w| w == b"108,105"), "nor its bytes in decimal");
    // Another takes its place; what the one before was asked is put back.
    let more: Vec<String> = (10..30).map(|n| n.to_string()).collect();
    more.iter().for_each(|n| write(&s, n, b"more"));
    begin(&Request {
        paths: of(&more.iter().map(String::as_str).collect::<Vec<_>>()),
        written_before: Some((9, 5)),
        ..Request::default()
    });
    let now = asked(&disk, s.shared().keys.secret()).unwrap().unwrap();
    assert_eq!((&now.paths[..], now.paths_total, now.written_before, now.kek), (&more[..10], 20, Some(9), None));
    disk.replace_raw(".envelopefs/rekey/asked", &sealed).unwrap();
    assert_eq!(asked(&disk, s.shared().keys.secret()).unwrap(), None);
    // One that is over leaves nothing.
    go(&s, &all());
    assert_eq!(asked(&disk, s.shared().keys.secret()).unwrap(), None);
    assert!(disk.read_raw(".envelopefs/rekey/asked").is_err());
}

/// The KEK is in a key service, which goes away in the middle of a run, and comes back: what it was needed for is as it was,
/// and the next run does it.
#[test]
fn an_outage_in_the_middle_leaves_files_as_they_were_for_the_next_run() {
    const FILES: usize = 9;
    for at in [0, 1, 2, 3, 7, 11, 16, 30] {
        let (disk, service) = (SimDisk::default(), Scripted::new("s"));
        Store::init(&disk, &roots(&service), KekKind::External, StoreFlags::default()).unwrap();
        let s = open(disk.clone(), &service);
        s.mkdir(&s.root(), b"a", 0o755, 0, None).unwrap();
        s.mkdir(&s.root(), b"b", 0o755, 0, None).unwrap();
        (0..FILES).for_each(|n| write(&s, &format!("{n}"), b"content"));
        let (n, _) = s.lookup(&s.root(), b"4").unwrap();
        s.link(&n, &dir(&s, "a"), b"linked").unwrap();
        drop(n);
        // Every file needs the service to be opened, too.
        s.forget_idle_keys();
        let before = ids(&s);
        let (service_down, calls) = (Arc::clone(&service), AtomicU64::new(0));
        service.set_hook(Some(Arc::new(move || {
            if calls.fetch_add(1, Ordering::Relaxed) == at {
                service_down.outage();
            }
        })));
        let one = Request { jobs: NonZeroUsize::new(1), ..all() };
        let r = go(&s, &one);
        service.set_hook(None);
        // Three calls a file.
        let done = FILES.min(at as usize / 3);
        let all_done = done == FILES;
        let outcome = if all_done { RekeyOutcome::Complete } else { RekeyOutcome::Incomplete };
        assert_eq!(
            (r.outcome, r.counts.rekeyed, r.failures_total),
            (outcome, done as u64, (FILES - done) as u64),
            "{r:?}"
        );
        assert!(r.failures.iter().all(|f| f.code == "kms-unreachable"), "{r:?}");
        let failed: BTreeSet<_> = r.failures.iter().map(|f| f.path.as_str()).collect();
        assert_eq!(failed.len(), FILES - done, "each by its name");
        let between = ids(&s);
        assert_eq!(before.iter().filter(|(k, v)| between[*k] == **v && k.starts_with('/')).count(), FILES - done);
        assert_eq!(unfinished(&disk).unwrap().map(|u| u.files), (!all_done).then_some(done as u64));
        service.always(Behaviour::Obey);
        if !all_done {
            let r = go(&s, &one);
            assert_eq!(
                (r.outcome, r.resumed, r.counts.rekeyed),
                (RekeyOutcome::Complete, done > 0, (FILES - done) as u64)
            );
        }
        assert_eq!(changed(&before, &s).len(), FILES + 1);
        s.close().unwrap();
        drop(s);
        let s = open(disk, &service);
        let tree = read_all(&s);
        assert!(tree.len() == FILES + 1 && tree.values().all(|c| c == b"content"), "{tree:?}");
    }
}

/// The service's limits are asked before a file's calls, as a rotation's, and waited for.
#[test]
fn a_key_service_is_asked_for_leave() {
    struct Strict(Arc<Scripted>, AtomicU64, AtomicU64);
    impl KeyProvider for Strict {
        fn describe(&self) -> Result<Description, KmsError> {
            self.0.describe()
        }

        fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
            self.0.wrap(key, context)
        }

        fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
            self.0.unwrap(wrapped, context)
        }

        fn leave(&self, whose: Background, calls: u32) -> Result<(), Duration> {
            assert_eq!(whose, Background::Rotation);
            if self.1.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
                return Err(Duration::ZERO);
            }
            self.2.fetch_add(calls.into(), Ordering::Relaxed);
            Ok(())
        }
    }
    let service = Scripted::new("s");
    let strict = Arc::new(Strict(Arc::clone(&service), AtomicU64::new(0), AtomicU64::new(0)));
    let root: [Arc<dyn KeyProvider>; 1] = [strict.clone()];
    let disk = SimDisk::default();
    Store::init(&disk, &root, KekKind::External, StoreFlags::default()).unwrap();
    let s = Store::open(disk.clone(), Keys::open(&disk, &root).unwrap(), StoreOptions::default()).unwrap();
    (0..5).for_each(|n| write(&s, &format!("{n}"), b"content"));
    s.forget_idle_keys();
    let before = service.calls().len();
    assert_eq!(rekey(&s, &all(), &(), &Control::new()).unwrap().counts.rekeyed, 5);
    let given = strict.2.load(Ordering::Relaxed);
    assert_eq!((given, service.calls().len() - before), (15, 15));
}

/// What is not listed is not rekeyed, and the run says so.
#[test]
fn a_name_that_does_not_decode_is_a_failure() {
    let (disk, _, s) = tree();
    let entries = s.read_dir(&s.root()).unwrap();
    let backing = |name: &[u8]| entries.iter().find(|e| e.name == name).unwrap().backing.clone();
    let (root, five) = (disk.root().unwrap(), backing(b"5"));
    let bad: Vec<u8> = five.iter().rev().copied().collect();
    disk.rename(&root, &five, &root, &bad, crate::backing::RenameMode::Replace).unwrap();
    let (a, linked) = (disk.lookup(&root, &backing(b"a")).unwrap(), backing(b"linked"));
    disk.rename(&root, &linked, &a, &linked, crate::backing::RenameMode::Replace).unwrap();
    let r = go(&s, &all());
    assert_eq!((r.outcome, r.counts.rekeyed), (RekeyOutcome::Incomplete, 5));
    let failed: BTreeSet<_> = r.failures.iter().map(|f| f.path.as_str()).collect();
    let linked = format!("a/{}", String::from_utf8_lossy(&linked));
    assert!(failed.contains(&*String::from_utf8_lossy(&bad)) && failed.contains(&*linked), "{failed:?}");
    // The linked file is there under a name that cannot be read: it has not vanished.
    assert_eq!((r.counts.vanished, r.counts.failed), (0, 3), "{failed:?}");
}

/// Somebody gives it a name that is no name, just when it is its turn.
#[test]
fn what_is_there_and_cannot_be_found_has_not_vanished() {
    let mut failed = 0;
    for k in 0..8 {
        let (disk, _, s) = tree();
        let name = s.read_dir(&s.root()).unwrap().into_iter().find(|e| e.name == b"6").unwrap().backing;
        let bad: Vec<u8> = name.iter().rev().copied().collect();
        let (me, left) = (disk.clone(), parking_lot::Mutex::new(Some(k)));
        disk.set_hook(Some(Arc::new(move |m| {
            if m != Moment::Before(Op::Open) {
                return;
            }
            let mut left = left.lock();
            match *left {
                Some(0) => {
                    let root = me.root().unwrap();
                    me.rename(&root, &name, &root, &bad, crate::backing::RenameMode::Replace).unwrap();
                    *left = None;
                }
                Some(n) => *left = Some(n - 1),
                None => {}
            }
        })));
        let r = rekey(&s, &Request { paths: vec![b"6".to_vec()], ..Request::default() }, &(), &Control::new());
        disk.set_hook(None);
        if let Ok(r) = r
            && r.failures_total > 0
        {
            failed += 1;
            assert_eq!((r.outcome, r.counts.vanished), (RekeyOutcome::Incomplete, 0));
            assert_eq!(r.failures[0].path, "6");
        }
    }
    assert!(failed > 0, "it was renamed between two looks at it");
}
