//! Rotation over whole stores: on a simulated disk that stops and loses power anywhere, and on a real directory with
//! threads at work in it.

mod causes;
mod crash;
mod destroy;
mod external;
mod floor;
mod live;
mod model;
mod no_header;
mod readers;
mod refuse;
mod rekey;
mod restored;
mod shards;
mod staged;
mod steer;
mod waive;

use super::*;
use crate::backing::sim::SimDisk;
use crate::backing::{Access, Backing, Kind};
use crate::format::header::{MAGIC, SlotPair};
use crate::format::ids::KekId;
use crate::format::keyring::KekKind;
use crate::kms::KeyProvider;
use crate::kms::scripted::Scripted;
use crate::store::keys::{Keys, StoreFlags};
use crate::store::{Node, Store, StoreOptions};
use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::sync::Arc;

/// Paths and contents.
type Tree = BTreeMap<String, Vec<u8>>;

fn roots(root: &Arc<Scripted>) -> Vec<Arc<dyn KeyProvider>> {
    vec![root.clone()]
}

fn init<B: Backing>(b: &B, root: &Arc<Scripted>) {
    Store::init(b, &roots(root), KekKind::Sealed, StoreFlags::default()).unwrap();
}

fn open<B: Backing>(b: B, root: &Arc<Scripted>) -> Arc<Store<B>> {
    let keys = Keys::open(&b, &roots(root)).unwrap();
    Store::open(b, keys, StoreOptions::default()).unwrap()
}

fn one_job() -> Options {
    Options { jobs: NonZeroUsize::new(1), ..Options::default() }
}

fn rotate<B: Backing>(store: &Arc<Store<B>>, options: &Options) -> crate::store::Result<Report> {
    let ctx = Context { shared: store.shared(), moves: &**store };
    run(&ctx, options, &(), &Control::new())
}

/// Calls a function at each change of state, before anything is done in it.
struct AtState<F: Fn(&Status) + Sync>(parking_lot::Mutex<Option<State>>, F);

impl<F: Fn(&Status) + Sync> AtState<F> {
    fn new(f: F) -> Self {
        Self(parking_lot::Mutex::new(None), f)
    }
}

impl<F: Fn(&Status) + Sync> Progress for AtState<F> {
    fn update(&self, s: &Status) {
        if self.0.lock().replace(s.state) != Some(s.state) {
            (self.1)(s);
        }
    }
}

fn rotate_with<B: Backing>(
    store: &Arc<Store<B>>,
    options: &Options,
    at_state: impl Fn(&Status) + Sync,
) -> crate::store::Result<Report> {
    let ctx = Context { shared: store.shared(), moves: &**store };
    run(&ctx, options, &AtState::new(at_state), &Control::new())
}

fn dir<B: Backing>(store: &Arc<Store<B>>, path: &str) -> Arc<Node<B>> {
    let mut at = store.root();
    for name in path.split('/').filter(|n| !n.is_empty()) {
        at = store.lookup(&at, name.as_bytes()).unwrap().0;
    }
    at
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

fn write<B: Backing>(store: &Arc<Store<B>>, path: &str, data: &[u8]) {
    let (parent, name) = split(path);
    let (_, _, file) = store.create(&dir(store, parent), name.as_bytes(), 0o644, 0, None).unwrap();
    if !data.is_empty() {
        assert_eq!(file.write(0, data).unwrap(), data.len());
    }
}

fn read<B: Backing>(store: &Arc<Store<B>>, node: &Arc<Node<B>>) -> crate::store::Result<Vec<u8>> {
    let file = store.open_file(node, Access::Read)?;
    let mut data = vec![0; file.len() as usize];
    let n = file.read(0, &mut data)?;
    assert_eq!(n, data.len());
    Ok(data)
}

/// Every regular file by its path.
fn read_all<B: Backing>(store: &Arc<Store<B>>) -> Tree {
    fn below<B: Backing>(store: &Arc<Store<B>>, at: &Arc<Node<B>>, path: &str, out: &mut Tree) {
        for e in store.read_dir(at).unwrap().into_iter().filter(|e| e.name != b"." && e.name != b"..") {
            let name = String::from_utf8(e.name.clone()).unwrap();
            let path = if path.is_empty() { name } else { format!("{path}/{name}") };
            let (node, _) = store.lookup(at, &e.name).unwrap();
            match node.kind() {
                Kind::Dir => below(store, &node, &path, out),
                Kind::File => {
                    let data = read(store, &node).unwrap_or_else(|e| panic!("{path}: {e}"));
                    out.insert(path, data);
                }
                _ => {}
            }
        }
    }
    let mut out = Tree::new();
    below(store, &store.root(), "", &mut out);
    out
}

fn pattern(len: usize, salt: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ salt).collect()
}

/// A small store with one file of each kind that a rotation meets; everything durable.
fn fill<B: Backing>(store: &Arc<Store<B>>) -> Tree {
    store.mkdir(&store.root(), b"d", 0o755, 0, None).unwrap();
    store.mkdir(&dir(store, "d"), b"e", 0o755, 0, None).unwrap();
    write(store, "empty", b"");
    write(store, "byte", b"x");
    write(store, "d/block", &pattern(4096, 1));
    write(store, "d/e/two segments", &pattern(33 * 4096 + 5, 2));
    write(store, &format!("d/{}", "long".repeat(60)), &pattern(10, 3));
    let (byte, _) = store.lookup(&store.root(), b"byte").unwrap();
    store.link(&byte, &dir(store, "d/e"), b"hard link").unwrap();
    store.symlink(&store.root(), b"loop", b".", None).unwrap();
    store.mknod(&store.root(), b"fifo", Kind::Fifo, 0o600, 0, 0, None).unwrap();
    store.sync_all().unwrap();
    store.close().unwrap();
    read_all(store)
}

/// A simulated disk with a filled store on it, all durable.
fn filled() -> (SimDisk, Arc<Scripted>, Tree) {
    let (disk, root) = (SimDisk::default(), Scripted::new("root"));
    init(&disk, &root);
    let tree = fill(&open(disk.clone(), &root));
    disk.sync_all().unwrap();
    (disk, root, tree)
}

/// KEKs named in any slot of any file, decodable or not.
fn keks_named(disk: &SimDisk) -> BTreeSet<KekId> {
    let mut out = BTreeSet::new();
    for path in disk.files() {
        let raw = disk.read_raw(&path).unwrap();
        for slot in raw.chunks(1024).take(2).filter(|s| s.starts_with(MAGIC)) {
            out.insert(KekId(slot[128..144].try_into().unwrap()));
        }
    }
    out
}

fn slots(disk: &SimDisk, path: &[u8]) -> SlotPair {
    SlotPair::decode(&disk.read_raw(path).unwrap()[..2048]).unwrap()
}

/// Backing paths of files with content and one name.
fn content_files(disk: &SimDisk) -> Vec<Vec<u8>> {
    let raw = |p: &Vec<u8>| disk.read_raw(p).unwrap();
    let all: Vec<_> = disk.files().into_iter().filter(|p| raw(p).starts_with(MAGIC)).collect();
    let linked = |p: &Vec<u8>| all.iter().filter(|q| raw(q) == raw(p)).count() > 1;
    let single: Vec<_> = all.iter().filter(|p| !linked(p)).cloned().collect();
    assert_eq!((all.len(), single.len()), (5, 3));
    single
}

fn active(keys: &Keys) -> KekId {
    keys.snapshot().active().unwrap().id
}

#[test]
fn moves_every_header_and_retires_the_old_kek() {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let old = active(&store.shared().keys);
    let report = rotate(&store, &Options::default()).unwrap();
    assert_eq!(report.outcome, Outcome::Complete, "{report:?}");
    assert_ne!(report.target, old);
    assert_eq!(report.retired, [old]);
    assert_eq!((report.destroyed.len(), report.failures_total, report.passes), (0, 0, 2));
    // Six names; the hard link is one header, the empty file none.
    let c = report.sweep;
    assert_eq!((c.scanned, c.rewrapped, c.current, c.empty, c.failed), (6, 4, 1, 1, 0));
    assert_eq!(report.verify.unwrap().current, 5);
    assert_eq!(report.slots_by_kek, BTreeMap::from([(report.target, 10)]));
    assert_eq!(report.headers_by_kek, BTreeMap::from([(report.target, 5)]));
    assert_eq!(keks_named(&disk), BTreeSet::from([report.target]));
    assert_eq!(active(&store.shared().keys), report.target);
    assert_eq!(read_all(&store), tree);
    drop(store);
    let store = open(disk.clone(), &root);
    assert_eq!(read_all(&store), tree);
    // Both slots are whole, the same, and the next in sequence.
    for path in content_files(&disk) {
        let pair = slots(&disk, &path);
        assert_eq!(pair.a, pair.b);
        assert_eq!(pair.a.unwrap().sequence, 2);
    }
    let second = rotate(&store, &one_job()).unwrap();
    assert_eq!((second.outcome, second.resumed), (Outcome::Complete, false));
    assert_ne!(second.target, report.target);
    assert_eq!(keks_named(&disk), BTreeSet::from([second.target]));
    assert_eq!(read_all(&store), tree);
}

#[test]
fn fewer_headers_are_made_durable_at_once_while_there_may_be_users() {
    let (disk, root) = (SimDisk::default(), Scripted::new("root"));
    init(&disk, &root);
    let store = open(disk.clone(), &root);
    (0..100).for_each(|i| write(&store, &format!("{i}"), b"x"));
    let operations = |full_speed| {
        let before = disk.operations();
        let report = rotate(&store, &Options { full_speed, ..one_job() }).unwrap();
        assert_eq!((report.outcome, report.sweep.rewrapped), (Outcome::Complete, 100));
        disk.operations() - before
    };
    // The first one makes the journal.
    operations(true);
    // All in one batch, so what there is more of are barriers.
    assert!(operations(false) > operations(true));
}

#[test]
fn a_report_survives_json() {
    let (disk, root, _) = filled();
    let report = rotate(&open(disk, &root), &one_job()).unwrap();
    let text = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    assert!(report.is_done());
}

#[test]
fn a_dry_run_counts_and_changes_nothing() {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let before = disk.operations();
    let report = rotate(&store, &Options { dry_run: true, ..one_job() }).unwrap();
    assert_eq!(report.outcome, Outcome::DryRun);
    assert_eq!(disk.operations(), before);
    assert_eq!(report.slots_by_kek, BTreeMap::from([(active(&store.shared().keys), 10)]));
    assert_eq!(report.verify.unwrap().scanned, tree.len() as u64);
}

/// A rekey that was cut off leaves a copy which the next open puts in the place of users' files; no pass looked at it.
#[test]
fn a_copy_that_a_rekey_left_behind_is_moved_and_seen_too() {
    let (disk, root, _) = filled();
    let store = open(disk.clone(), &root);
    let header = disk.read_raw(content_files(&disk).remove(0)).unwrap();
    let own = disk.lookup(&disk.root().unwrap(), b".envelopefs").unwrap();
    disk.mkdir(&own, b"rekey", 0o700, 0).unwrap();
    let folder = disk.lookup(&own, b"rekey").unwrap();
    let put = |name: &[u8], bytes: &[u8]| {
        let (_, file) = disk.create(&folder, name, 0o600, 0).unwrap();
        disk.write_at(&file, bytes, 0).unwrap();
    };
    put(b"linked.copy", &header);
    // Half made: nothing that anybody could open.
    put(b"new.copy", &[0; 8192]);
    let report = rotate(&store, &one_job()).unwrap();
    assert_eq!(report.outcome, Outcome::Complete, "{report:?}");
    assert_eq!(report.headers_by_kek, BTreeMap::from([(report.target, 6)]));
    let moved = disk.read_raw(b".envelopefs/rekey/linked.copy").unwrap();
    assert_eq!(moved[128..144], report.target.0);
}

#[test]
fn a_header_counts_for_every_kek_that_it_names() {
    let (disk, root, _) = filled();
    let store = open(disk.clone(), &root);
    let first = active(&store.shared().keys);
    let dry_run = Options { dry_run: true, ..one_job() };
    let path = content_files(&disk).remove(0);
    let before = disk.read_raw(&path).unwrap();
    rotate(&store, &one_job()).unwrap();
    let second = active(&store.shared().keys);
    assert_eq!(rotate(&store, &dry_run).unwrap().headers_by_kek, BTreeMap::from([(second, 5)]));
    // One slot as a run that was killed leaves it, then the other one too.
    disk.write_raw(&path, 1024, &before[1024..2048]).unwrap();
    let half = rotate(&store, &dry_run).unwrap();
    assert_eq!(half.headers_by_kek, BTreeMap::from([(first, 1), (second, 5)]));
    assert_eq!(half.slots_by_kek, BTreeMap::from([(first, 1), (second, 9)]));
    disk.write_raw(&path, 0, &before[..1024]).unwrap();
    assert_eq!(rotate(&store, &dry_run).unwrap().headers_by_kek, BTreeMap::from([(first, 1), (second, 4)]));
}

#[test]
fn destroys_old_keks_only_when_asked_and_what_needs_them_says_so() {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let first = active(&store.shared().keys);
    let path = content_files(&disk).remove(0);
    let saved = disk.read_raw(&path).unwrap();
    let report = rotate(&store, &one_job()).unwrap();
    assert_eq!(report.destroyed, []);
    let report = rotate(&store, &Options { destroy_old: true, ..one_job() }).unwrap();
    assert_eq!(report.destroyed.len(), 2, "both earlier ones");
    let ring = store.shared().keys.snapshot();
    for id in &report.destroyed {
        assert!(ring.kek(*id).unwrap().wraps.is_empty());
    }
    assert_eq!(read_all(&store), tree);
    drop(store);
    // A file from an old backup comes back.
    disk.write_raw(&path, 0, &saved[..2048]).unwrap();
    let store = open(disk.clone(), &root);
    let report = rotate(&store, &one_job()).unwrap();
    assert_eq!((report.outcome, report.failures_total), (Outcome::Incomplete, 1));
    assert_eq!(report.failures[0].code, "kek-destroyed");
    assert!(report.failures[0].message.contains(&first.to_string()));
    assert_eq!(disk.read_raw(&path).unwrap()[..2048], saved[..2048], "left as it was");
}

#[test]
fn a_retired_keks_file_that_comes_back_is_moved_by_the_next_run() {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let path = content_files(&disk).remove(0);
    let saved = disk.read_raw(&path).unwrap();
    rotate(&store, &one_job()).unwrap();
    disk.write_raw(&path, 0, &saved[..2048]).unwrap();
    let report = rotate(&store, &one_job()).unwrap();
    assert_eq!(report.outcome, Outcome::Complete);
    assert_eq!(keks_named(&disk), BTreeSet::from([report.target]));
    assert_eq!(read_all(&open(disk, &root)), tree);
}

#[test]
fn a_damaged_slot_is_healed_from_the_other() {
    let (disk, root, tree) = filled();
    for (i, path) in content_files(&disk).iter().enumerate() {
        disk.flip_bit(path, if i % 2 == 0 { 300 } else { 1024 + 300 }, 2).unwrap();
    }
    let report = rotate(&open(disk.clone(), &root), &one_job()).unwrap();
    assert_eq!(report.outcome, Outcome::Complete, "{report:?}");
    assert_eq!(keks_named(&disk), BTreeSet::from([report.target]));
    for path in content_files(&disk) {
        let pair = slots(&disk, &path);
        assert!(pair.a.is_ok() && pair.a == pair.b);
    }
    assert_eq!(read_all(&open(disk, &root)), tree);
}

#[test]
fn a_newer_slot_that_does_not_open_gives_way_to_the_older_one() {
    let (disk, root, tree) = filled();
    let path = content_files(&disk).remove(1);
    let mut forged = slots(&disk, &path).b.unwrap();
    forged.sequence = u64::MAX;
    forged.wrapped[20] ^= 1;
    disk.write_raw(&path, 1024, &forged.encode()).unwrap();
    let report = rotate(&open(disk.clone(), &root), &one_job()).unwrap();
    assert_eq!(report.outcome, Outcome::Complete, "{report:?}");
    assert_eq!(slots(&disk, &path).b.unwrap().sequence, 2);
    assert_eq!(read_all(&open(disk, &root)), tree);
}

#[test]
fn a_cancelled_run_leaves_a_mixed_store_and_the_next_one_goes_on() {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let control = Control::new();
    control.cancel();
    let ctx = Context { shared: store.shared(), moves: &*store };
    let report = run(&ctx, &one_job(), &(), &control).unwrap();
    assert_eq!((report.outcome, report.sweep.rewrapped), (Outcome::Cancelled, 0));
    assert_eq!(active(&store.shared().keys), report.target);
    write(&store, "new", b"under the new KEK");
    assert_eq!(keks_named(&disk).len(), 2);
    assert_eq!(read_all(&open(disk.clone(), &root)).len(), tree.len() + 1);
    let again = rotate(&store, &one_job()).unwrap();
    assert_eq!((again.outcome, again.resumed, again.target), (Outcome::Complete, true, report.target));
    assert_eq!(keks_named(&disk), BTreeSet::from([report.target]));
    // Unless a new KEK is asked for.
    let control = Control::new();
    control.cancel();
    let left = run(&ctx, &one_job(), &(), &control).unwrap();
    let third = rotate(&store, &Options { restart: true, ..one_job() }).unwrap();
    assert_eq!((third.outcome, third.resumed), (Outcome::Complete, false));
    assert_ne!(third.target, left.target);
    assert_eq!(third.retired.len(), 2);
}

#[test]
fn the_journal_remembers_where_a_cancelled_run_was() {
    use super::journal::Journal;
    let (disk, root, _) = filled();
    let store = open(disk.clone(), &root);
    let keys = &store.shared().keys;
    assert_eq!(Journal::open(&disk, keys, None).last(), None);
    let target = KekId::random();
    for (i, state) in [State::Staged, State::Sweeping, State::Cancelled].into_iter().enumerate() {
        let mut j = Journal::open(&disk, keys, None);
        j.note(state, target, 7, 9, b"a/b");
        let back = Journal::open(&disk, keys, None);
        let last = back.last().unwrap();
        assert_eq!((last.sequence, last.state, last.files), (i as u64 + 1, state, 9));
        assert_eq!((last.target, last.cursor.as_slice()), (target, &b"a/b"[..]));
    }
    // A damaged newer copy: the older one counts.
    disk.flip_bit(".envelopefs/rotation/journal", 4096 + 20, 0).unwrap();
    assert_eq!(Journal::open(&disk, keys, None).last().unwrap().state, State::Sweeping);
    disk.truncate_raw(".envelopefs/rotation/journal", 100).unwrap();
    assert_eq!(Journal::open(&disk, keys, None).last(), None);
}

#[test]
fn a_cursor_that_lies_only_costs_another_sweep() {
    use super::journal::Journal;
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let control = Control::new();
    control.cancel();
    let ctx = Context { shared: store.shared(), moves: &*store };
    let target = run(&ctx, &one_job(), &(), &control).unwrap().target;
    Journal::open(&disk, &store.shared().keys, None).note(State::Sweeping, target, 1, 0, b"zzzz");
    let report = rotate(&store, &one_job()).unwrap();
    assert_eq!((report.outcome, report.passes), (Outcome::Complete, 4));
    assert_eq!(keks_named(&disk), BTreeSet::from([target]));
    assert_eq!(read_all(&store), tree);
}

#[test]
fn a_run_that_is_not_due_changes_nothing() {
    let (disk, root, _) = filled();
    let store = open(disk.clone(), &root);
    let kek = active(&store.shared().keys);
    let yearly = Options { if_older_than: Some(365 * 86_400), ..one_job() };
    let before = disk.operations();
    let report = rotate(&store, &yearly).unwrap();
    assert_eq!((report.outcome, report.target, report.passes), (Outcome::NotDue, kek, 0));
    assert!(report.is_done());
    assert_eq!(disk.operations(), before, "not even the journal");
    assert_eq!(rotate(&store, &Options { if_older_than: Some(0), ..one_job() }).unwrap().outcome, Outcome::Complete);
}
