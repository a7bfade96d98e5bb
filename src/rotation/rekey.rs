//! A run of `rekey`: files, trees, or what meets some criteria gets new DEKs, file by file ([`crate::store::rekey`]).
//!
//! It walks the store by its own names, as users do, so it needs nothing to be held still. What is renamed while it walks
//! may be missed or met twice, so a file is known by its id: what was done is not done again, and a second walk, which
//! looks at headers only, finds what the first has missed. What is moved during the second one too can escape both. Files
//! with several names are collected, and their names found by one walk over the whole store for many of them.

mod journal;
mod report;

pub use journal::{Unfinished, asked, unfinished};
pub use report::{Asked, RekeyCounts, RekeyOutcome, RekeyPhase, RekeyReport, RekeyStatus, Request};

use super::control::{Cancelled, Control};
use super::estimate::Estimate;
use super::failures::Failures;
use super::path::shown;
use super::report::{Named, Progress, State};
use super::sweep::LEAVE_AGAIN;
use super::turns::Turns;
use crate::backing::{Backing, Kind, Timestamp};
use crate::format::ids::FileId;
use crate::kms::guard::lane::Background;
use crate::store::header::Header;
use crate::store::node::InodeKey;
use crate::store::rekey::{Name, Rekeyed};
use crate::store::{Node, Result, Store, StoreError};
use journal::Journal;
use parking_lot::Mutex;
use report::UNIT;
use std::collections::{HashMap, HashSet};
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Workers if nobody says how many: enough for one to copy while others wait for the disk.
const JOBS: usize = 4;
/// Files with several names whose names are found by one walk.
const LINKED_MAX: usize = 4096;
/// How often names are looked for that change all the time.
const LOOKS: usize = 3;
/// Calls to a key service that a file takes: the old DEK unwrapped, the new one wrapped, and that proved.
const CALLS: u32 = 3;
/// How often progress is told.
const TICK: Duration = Duration::from_millis(250);

/// A file to look at.
struct Item<B: Backing> {
    name: Name<B>,
    node: Arc<Node<B>>,
    path: String,
}

/// Files with several names, each by one of them.
type Linked<B> = HashMap<InodeKey, Item<B>>;

struct Run<'a, B: Backing> {
    store: &'a Store<B>,
    request: &'a Request,
    control: &'a Control,
    turns: Turns<'a>,
    journal: Option<Journal<'a, B>>,
    counts: Mutex<RekeyCounts>,
    failures: Failures,
    /// Paths of files that have content and no header, as many as a report names.
    no_header: Mutex<Named<String>>,
    linked: Mutex<Linked<B>>,
    /// Ids of files with several names that are done: another of their names will be met.
    linked_done: Mutex<HashSet<FileId>>,
    /// Files that failed: the second walk passes them over.
    gave_up: Mutex<HashSet<InodeKey>>,
    /// Ids of the nodes that are being rekeyed: what is renamed while it is walked may be met twice at once.
    under_way: Mutex<HashSet<u64>>,
    /// The second walk is under way.
    second: bool,
    copied: AtomicU64,
    resumed: bool,
    /// Files there are, if known.
    expected: Option<u64>,
    began: Instant,
    started: u64,
}

fn cancelled() -> StoreError {
    io::Error::from_raw_os_error(libc::ECANCELED).into()
}

/// Of a file whose names could not be found, or were others each time.
fn evasive() -> StoreError {
    io::Error::from_raw_os_error(libc::EBUSY).into()
}

/// A node's place among those that are being rekeyed, until this is dropped.
struct Alone<'a>(&'a Mutex<HashSet<u64>>, u64);

impl<'a> Alone<'a> {
    /// `None` if it is being rekeyed already.
    fn take<B: Backing>(under_way: &'a Mutex<HashSet<u64>>, node: &Node<B>) -> Option<Self> {
        let id = node.id();
        // Made only then: its drop would end the turn of whoever has it.
        under_way.lock().insert(id).then(|| Self(under_way, id))
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Rekeys what `request` asks for in a store that is in use. No rotation may run meanwhile. What is done stays done
/// whatever happens; a run that was cancelled, killed, or has failures is gone on with by the next one of the same request.
///
/// # Errors
/// [`StoreError::ReadOnly`]; that a path leads nowhere; the backing directory's for the journal. What goes wrong with one
/// file is in the report.
pub fn rekey<B: Backing>(
    store: &Store<B>,
    request: &Request,
    progress: &dyn Progress<RekeyStatus>,
    control: &Control,
) -> Result<RekeyReport> {
    let shared = store.shared();
    if shared.read_only && !request.dry_run {
        return Err(StoreError::ReadOnly);
    }
    let roots = outermost(&request.paths).into_iter().map(|p| find(store, p)).collect::<Result<Vec<_>>>()?;
    let journal = match request.dry_run {
        true => None,
        false => Some(Journal::open(
            &shared.backing,
            store.rekey_folder()?,
            shared.keys.secret(),
            &request.identity(),
            request.restart,
        )?),
    };
    let resumed = journal.as_ref().is_some_and(Journal::is_resumed);
    let mut run = Run {
        store,
        request,
        control,
        turns: Turns::new(&request.pace(), control, &shared.load),
        journal,
        counts: Mutex::default(),
        failures: Failures::default(),
        no_header: Mutex::default(),
        linked: Mutex::default(),
        linked_done: Mutex::default(),
        gave_up: Mutex::default(),
        under_way: Mutex::default(),
        second: false,
        copied: AtomicU64::new(0),
        resumed,
        expected: expected(store, request),
        began: Instant::now(),
        started: now(),
    };
    let mut ended = run.all(roots.clone(), progress);
    if let (Ok(()), Some(j)) = (&ended, &mut run.journal) {
        j.look_again()?;
        run.second = true;
        ended = run.all(roots, progress);
    }
    progress.update(&RekeyStatus { state: RekeyPhase::Ended, ..run.status() });
    let (counts, started) = (*run.counts.lock(), run.started);
    let outcome = match (ended, counts.failed) {
        (Err(e), _) if run.is_cancelled(&e) => RekeyOutcome::Cancelled,
        (Err(e), _) => return Err(e),
        (Ok(()), _) if request.dry_run => RekeyOutcome::DryRun,
        (Ok(()), 0) => RekeyOutcome::Complete,
        (Ok(()), _) => RekeyOutcome::Incomplete,
    };
    if let (RekeyOutcome::Complete, Some(j)) = (outcome, run.journal) {
        j.remove();
    }
    Ok(RekeyReport {
        outcome,
        store: shared.keys.store_id(),
        version: env!("CARGO_PKG_VERSION").into(),
        resumed,
        started,
        finished: now(),
        counts,
        no_header: run.no_header.into_inner().to_vec(),
        failures: run.failures.take().named.to_vec(),
        failures_total: counts.failed,
    })
}

/// The paths without those that lie in others: nothing is to be met twice.
fn outermost(paths: &[Vec<u8>]) -> Vec<&[u8]> {
    let parts = |p: &[u8]| p.split(|c| *c == b'/').filter(|c| !c.is_empty()).map(<[u8]>::to_vec).collect::<Vec<_>>();
    let mut sorted: Vec<_> = paths.iter().map(|p| (parts(p), p.as_slice())).collect();
    sorted.sort();
    let mut kept: Vec<(Vec<Vec<u8>>, &[u8])> = Vec::new();
    for (p, path) in sorted {
        // What a path lies in comes before it, and nothing between the two lies elsewhere.
        if kept.last().is_none_or(|(last, _)| !p.starts_with(last)) {
            kept.push((p, path));
        }
    }
    kept.into_iter().map(|(_, path)| path).collect()
}

/// How many files a run over the whole store will meet, as a rotation has last counted them.
fn expected<B: Backing>(store: &Store<B>, request: &Request) -> Option<u64> {
    let shared = store.shared();
    let whole = request.paths.iter().any(|p| p.iter().all(|c| *c == b'/'));
    let rotations = whole.then(|| super::journal::Journal::open(&shared.backing, &shared.keys, None))?;
    rotations.last().map(|l| l.files).filter(|n| *n > 0)
}

/// The path of an entry of the directory at `path`.
fn below(path: &str, name: &[u8]) -> String {
    if path.is_empty() { shown(name) } else { format!("{path}/{}", shown(name)) }
}

/// What lies at a path from the root: its node, and its name unless it is the root itself.
type Found<B> = (Arc<Node<B>>, Option<Name<B>>, String);

fn find<B: Backing>(store: &Store<B>, path: &[u8]) -> Result<Found<B>> {
    let (mut at, mut name) = (store.root(), None);
    for part in path.split(|c| *c == b'/').filter(|p| !p.is_empty()) {
        let (node, _) = store.lookup(&at, part)?;
        name = Some(store.name_of(&at, part)?);
        at = node;
    }
    Ok((at, name, shown(path)))
}

impl<B: Backing> Run<'_, B> {
    fn all(&self, roots: Vec<Found<B>>, progress: &dyn Progress<RekeyStatus>) -> Result<()> {
        let jobs = self.request.jobs.map_or(JOBS, NonZeroUsize::get);
        let ended = AtomicBool::new(false);
        let waiting = std::thread::current();
        std::thread::scope(|scope| {
            let work = scope.spawn(|| {
                let r = self.walk_and_work(roots, jobs);
                ended.store(true, Ordering::Release);
                waiting.unpark();
                r
            });
            while !ended.load(Ordering::Acquire) && !work.is_finished() {
                std::thread::park_timeout(TICK);
                progress.update(&self.status());
            }
            work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn walk_and_work(&self, roots: Vec<Found<B>>, jobs: usize) -> Result<()> {
        let (send, receive) = sync_channel::<Item<B>>(2 * jobs);
        let receive = Arc::new(Mutex::new(receive));
        self.give_way();
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs)
                .map(|_| {
                    let receive = Arc::clone(&receive);
                    scope.spawn(move || {
                        self.give_way();
                        loop {
                            let next = receive.lock().recv();
                            let Ok(item) = next else { return };
                            self.one(item);
                        }
                    })
                })
                .collect();
            // The workers alone own it: when all have ended, sending fails instead of waiting.
            drop(receive);
            let walked = self.walk(roots, &mut |item| send.send(item).map_err(|_| cancelled()));
            drop(send);
            for w in workers {
                w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            }
            walked?;
            self.move_linked()?;
            self.checkpoint()
        })
    }

    /// Whether this is what ends a cancelled run. A backing directory may say the same of a file, which has failed then.
    fn is_cancelled(&self, e: &StoreError) -> bool {
        let says = matches!(e, StoreError::Backing(e) if e.raw_os_error() == Some(libc::ECANCELED));
        says && self.control.check().is_err()
    }

    fn give_way(&self) {
        if !self.request.full_speed {
            self.store.shared().backing.give_way();
        }
    }

    fn checkpoint(&self) -> Result<()> {
        self.control.checkpoint().map_err(|Cancelled| cancelled())
    }

    /// Returns when there is time for something small. The caller is at work, and holds no lock that a user may want.
    fn turn(&self) -> Result<()> {
        self.turns.next_of(0, true).map_err(|Cancelled| cancelled())
    }

    /// Comes to every file, and hands it on. Files with several names are dealt with in between.
    fn walk(&self, roots: Vec<Found<B>>, give: &mut dyn FnMut(Item<B>) -> Result<()>) -> Result<()> {
        let mut todo: Vec<(Arc<Node<B>>, String)> = Vec::new();
        for (node, name, path) in roots {
            match (node.kind(), name) {
                (Kind::Dir, _) => todo.push((node, path)),
                (Kind::File, Some(name)) => give(Item { name, node, path })?,
                _ => return Err(StoreError::Invalid),
            }
        }
        while let Some((dir, path)) = todo.pop() {
            self.checkpoint()?;
            let (entries, left_out) = match self.store.list(&dir) {
                Ok(found) => found,
                Err(StoreError::NotFound) => continue,
                Err(e) => {
                    self.failed_dir(path, &e);
                    continue;
                }
            };
            for (name, damage) in left_out.into_iter().filter(|_| !self.second) {
                self.failed(below(&path, &name), &damage.into());
            }
            for e in entries {
                if !matches!(e.kind, Kind::Dir | Kind::File) {
                    continue;
                }
                let below = below(&path, &e.name);
                let node = match self.store.read_dir_node(&dir, &e) {
                    Ok((node, _)) => node,
                    Err(StoreError::NotFound) => continue,
                    Err(e) => {
                        self.failed_dir(below, &e);
                        continue;
                    }
                };
                match node.kind() {
                    Kind::Dir => todo.push((node, below)),
                    Kind::File => {
                        self.checkpoint()?;
                        let name = Name { dir: Arc::clone(&dir), name: e.backing.into() };
                        give(Item { name, node, path: below })?;
                    }
                    _ => {}
                }
            }
            if self.linked.lock().len() >= LINKED_MAX {
                self.move_linked()?;
            }
        }
        Ok(())
    }

    /// A directory that could not be listed, or an entry that could not be looked at.
    fn failed_dir(&self, path: String, error: &StoreError) {
        if !self.second {
            self.counts.lock().failed += 1;
            self.failures.add_directory(path, error);
        }
    }

    /// No DEK is there that could have leaked, and nothing that a new one could be given to: it is told, as by a rotation.
    fn no_header(&self, path: String) {
        self.count(|c| {
            c.no_header += 1;
            tracing::warn!(path, "rekey: content without a header");
            self.no_header.lock().add(path);
        });
    }

    fn failed(&self, path: String, error: &StoreError) {
        self.counts.lock().failed += 1;
        self.failures.add(path, error);
    }

    /// Returns when the key service has leave for the calls that a file takes, behind users' and with a rotation's share.
    fn leave(&self) -> Result<()> {
        let ask = || self.store.shared().keys.with_active(|kek| kek.leave(Background::Rotation, CALLS));
        while let Err(wait) = ask() {
            self.turns.idle(wait.max(LEAVE_AGAIN)).map_err(|Cancelled| cancelled())?;
        }
        Ok(())
    }

    /// Deals with one file.
    fn one(&self, item: Item<B>) {
        let _at_work = self.turns.at_work();
        if self.turn().is_err() {
            return;
        }
        self.count(|c| c.scanned += 1);
        let (path, key) = (item.path.clone(), item.node.key());
        if self.second && self.gave_up.lock().contains(&key) {
            return;
        }
        if let Err(e) = self.try_one(item)
            && !self.is_cancelled(&e)
        {
            self.gave_up.lock().insert(key);
            self.failed(path, &e);
        }
    }

    fn try_one(&self, item: Item<B>) -> Result<()> {
        let (attr, header) =
            match self.store.getattr(&item.node).and_then(|a| Ok((a, self.store.header_of(&item.node)?))) {
                Err(StoreError::NotFound) => {
                    self.count(|c| c.vanished += 1);
                    return Ok(());
                }
                other => other?,
            };
        let read = match header {
            Header::Slots(read) => read,
            Header::None => {
                self.count(|c| c.empty += 1);
                return Ok(());
            }
            Header::Zeros => {
                self.no_header(item.path);
                return Ok(());
            }
        };
        let (_, slot) = read.0.authoritative()?;
        let old = |t: Timestamp| self.request.written_before.is_none_or(|b| (t.sec, t.nsec) < b);
        if !old(attr.mtime) || self.request.kek.is_some_and(|k| k != slot.kek) {
            self.count(|c| c.skipped += 1);
            return Ok(());
        }
        if self.journal.as_ref().is_some_and(|j| j.has(slot.file)) {
            self.count(|c| c.done_before += 1);
            return Ok(());
        }
        if attr.nlink > 1 && self.linked_done.lock().contains(&slot.file) {
            return Ok(());
        }
        if self.request.dry_run {
            if attr.nlink > 1 {
                self.linked_done.lock().insert(slot.file);
            }
            self.count(|c| (c.rekeyed, c.bytes) = (c.rekeyed + 1, c.bytes + attr.size));
            return Ok(());
        }
        let Some(alone) = Alone::take(&self.under_way, &item.node) else {
            // Met twice at once: it is being done, and counts there.
            return Ok(());
        };
        self.leave()?;
        let mut done = self.store.rekey(&item.name, &|n| self.step(n))?;
        if let (Rekeyed::Gone, Some(name)) = (done, self.store.whereabouts(&item.node)) {
            // Renamed on the way.
            done = self.store.rekey(&name, &|n| self.step(n))?;
        }
        // First, so that whoever moves it then can have it.
        drop(alone);
        match done {
            Rekeyed::Linked => drop(self.linked.lock().insert(item.node.key(), item)),
            Rekeyed::Gone if self.is_there(&item) => return Err(evasive()),
            other => self.ended(other),
        }
        Ok(())
    }

    /// Whether a file that no name was found of has one.
    fn is_there(&self, item: &Item<B>) -> bool {
        self.store.getattr(&item.node).is_ok_and(|a| a.nlink > 0)
    }

    /// Counts something that the second walk meets again.
    fn count(&self, f: impl FnOnce(&mut RekeyCounts)) {
        if !self.second {
            f(&mut self.counts.lock());
        }
    }

    fn step(&self, bytes: u64) -> Result<()> {
        self.copied.fetch_add(bytes, Ordering::Relaxed);
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX);
        // Told 0, it must not wait, neither for users nor for the end of a pause.
        let go_on = if bytes == 0 { self.control.check() } else { self.turns.next_of(units, true) };
        go_on.map_err(|Cancelled| cancelled())
    }

    fn ended(&self, r: Rekeyed) {
        if let (Rekeyed::Done { file, .. }, Some(j)) = (r, &self.journal) {
            j.done(file);
        }
        let mut c = self.counts.lock();
        match r {
            Rekeyed::Done { bytes, .. } => (c.rekeyed, c.bytes) = (c.rekeyed + 1, c.bytes + bytes),
            Rekeyed::Empty => c.empty += 1,
            Rekeyed::Gone | Rekeyed::Linked => c.vanished += 1,
        }
    }

    /// Deals with the files with several names that were met so far.
    fn move_linked(&self) -> Result<()> {
        let _at_work = self.turns.at_work();
        let mut left = std::mem::take(&mut *self.linked.lock());
        for look in 1..=LOOKS {
            if left.is_empty() {
                return Ok(());
            }
            let wanted: Vec<_> = left.values().map(|i| i.node.key()).collect();
            let mut names = self.store.names_of(&wanted, &|_| self.turn())?;
            let mut again = HashMap::new();
            for (_, item) in left {
                self.turn()?;
                let all = names.remove(&item.node.key()).unwrap_or_default();
                self.leave()?;
                let Some(_alone) = Alone::take(&self.under_way, &item.node) else { continue };
                match self.store.rekey_all(&all, &|n| self.step(n)) {
                    // Linked, renamed or removed since.
                    Ok(Rekeyed::Linked | Rekeyed::Gone) if look < LOOKS => drop(again.insert(item.node.key(), item)),
                    Ok(r @ (Rekeyed::Linked | Rekeyed::Gone)) if r == Rekeyed::Linked || self.is_there(&item) => {
                        self.gave_up.lock().insert(item.node.key());
                        self.failed(item.path, &evasive());
                    }
                    Ok(r) => {
                        if let Rekeyed::Done { file, .. } = r {
                            self.linked_done.lock().insert(file);
                        }
                        self.ended(r);
                    }
                    Err(e) if self.is_cancelled(&e) => return Err(e),
                    Err(e) => {
                        self.gave_up.lock().insert(item.node.key());
                        self.failed(item.path, &e);
                    }
                }
            }
            left = again;
        }
        Ok(())
    }

    fn status(&self) -> RekeyStatus {
        let counts = *self.counts.lock();
        let elapsed = self.began.elapsed().as_secs_f64();
        let (copied, second) = (self.copied.load(Ordering::Relaxed), elapsed.max(0.001));
        let left = Estimate {
            state: State::Sweeping,
            expected: self.expected.filter(|_| !self.second),
            scanned: counts.scanned,
            rate: counts.scanned as f64 / second,
            verify: 0.0,
        };
        RekeyStatus {
            state: if self.second { RekeyPhase::LookingAgain } else { RekeyPhase::Rekeying },
            paused: self.control.is_paused(),
            resumed: self.resumed,
            started: self.started,
            counts,
            copied,
            expected: self.expected,
            rate: copied as f64 / second,
            elapsed,
            eta: left.of_pass(),
            failures: self.failures.so_far(),
        }
    }
}
