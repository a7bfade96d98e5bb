//! One pass: a walk over the whole store that hands batches of files to workers.
//!
//! # Why a pass sees every file although names change under it
//!
//! A header under the target KEK never goes back, and nothing new is wrapped under an old one, so it is enough that
//! each inode that existed when the pass began is looked at once. Take such a file `x` and the directories above it
//! at that time. If none of them and no name of `x` moved before the walk came to `x`, the walk saw it. Otherwise let
//! `m` be the lowest that moved. `m` was put on the list of moves; nothing between `m` and `x` ever moved; so a walk
//! below `m`, by its descriptor and not by its name, finds `x` whenever it takes place, however often `m` itself is
//! moved. So each directory on the list needs to be walked once in a pass, and a file on it to be looked at. Walks
//! below listed directories can miss what moves during them, but that is on the list too: the pass ends with a round
//! that walked no directory, or after which nothing new is on the list. It is finite, because directories are.
//!
//! The list is short, since it holds descriptors. A thread of its own takes it all the while and looks at the files on
//! it without the rests that the walk's workers take, so that users who rename much do not outrun a run that gives
//! way to them.

use super::control::{Cancelled, Control};
use super::failures::Failures;
use super::moves::{Moved, Moves};
use super::path;
use super::shard::Share;
use crate::backing::{Backing, Kind};
use crate::format::names::{self, Listed};
use crate::store::walk::{Dir, Visit, Walk, WalkError, is_gone};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

/// Files handed to a worker at once.
pub(super) const BATCH: usize = 256;
/// How often the calling thread looks up.
const TICK: Duration = Duration::from_millis(200);
/// How often the list of moves is taken.
const COLLECT_EVERY: Duration = Duration::from_millis(10);
/// Folders in the store's own that may hold files: directories on their way in and out, of which a crash may leave one,
/// and the copies of a rekey, one of which the next open puts in the place of files that it did not come to the end with.
const OWN_FOLDERS: [&[u8]; 2] = [b"pool", b"rekey"];
/// The second one's path.
const COPIES: &[u8] = b".envelopefs/rekey";
/// What a fresh ext file system holds.
const LOST_AND_FOUND: &[u8] = b"lost+found";
/// Stands for the path of what was renamed while the walk was under way.
pub(super) const MOVED: &[u8] = b"(moved during the run)";
/// The same for what was found by opening it.
pub(super) const OPENED: &[u8] = b"(opened under a retired KEK)";
/// Rounds of a pass after which a store in which directories never stop moving is given up on.
const ROUNDS_MAX: usize = 1000;

/// A file to look at.
pub(super) struct Item<B: Backing> {
    place: Place<B>,
    /// Found by the walk over the whole store, so that its path says what lies before it.
    in_order: bool,
    /// The name is one of the store's own that says nothing about what the file holds.
    pub(super) reserved: bool,
}

enum Place<B: Backing> {
    Named(Arc<Dir<B>>, Vec<u8>),
    Moved(Arc<B::Node>),
    Opened(Arc<B::Node>),
}

impl<B: Backing> Item<B> {
    /// A file that somebody has opened.
    pub(super) fn opened(node: Arc<B::Node>) -> Self {
        Self { place: Place::Opened(node), in_order: false, reserved: false }
    }

    fn moved(node: Arc<B::Node>) -> Self {
        Self { place: Place::Moved(node), in_order: false, reserved: false }
    }

    /// The inode, found anew if it goes by a name.
    pub(super) fn node(&self, backing: &B) -> io::Result<Arc<B::Node>> {
        match &self.place {
            Place::Named(dir, name) => backing.lookup(&dir.node, name).map(Arc::new),
            Place::Moved(node) | Place::Opened(node) => Ok(Arc::clone(node)),
        }
    }

    /// Whether it was found because it moved: to be looked at soon, since its descriptor is held open.
    pub(super) fn has_moved(&self) -> bool {
        matches!(self.place, Place::Moved(_))
    }

    /// Path in the backing directory.
    fn path(&self) -> Vec<u8> {
        match &self.place {
            Place::Named(dir, name) => dir.path_of(name),
            Place::Moved(_) => MOVED.to_vec(),
            Place::Opened(_) => OPENED.to_vec(),
        }
    }

    /// Path in the backing directory, as reports name it.
    pub(super) fn shown(&self) -> String {
        path::shown(&self.path())
    }
}

/// What a pass does with files.
pub(super) trait Visitor<B: Backing>: Sync {
    /// Deals with a batch. Called from several threads at once.
    fn batch(&self, items: Vec<Item<B>>) -> Result<(), Cancelled>;
}

/// What a pass needs.
pub(super) struct Pass<'a, B: Backing> {
    pub(super) backing: &'a B,
    pub(super) moves: &'a dyn Moves<B>,
    pub(super) control: &'a Control,
    pub(super) failures: &'a Failures,
    pub(super) workers: usize,
    /// Let users go first at the disk and the processors.
    pub(super) gentle: bool,
    /// The files to look at, if not all of them. What moves meanwhile is not asked: no shard runs on a store in use.
    pub(super) share: Option<&'a Share>,
}

/// How a pass ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PassEnd {
    /// Every file was visited that existed all through the pass.
    pub(super) whole: bool,
}

/// A batch on its way to a worker, and where the walk stood behind it.
struct Batch<B: Backing> {
    number: u64,
    items: Vec<Item<B>>,
    cursor: Option<Vec<u8>>,
}

/// Where a round begins.
enum Start<B: Backing> {
    After(Vec<u8>),
    At(Vec<Arc<B::Node>>),
}

/// What was on the list of moves and is left for the walker.
struct Pending<B: Backing> {
    dirs: VecDeque<Arc<B::Node>>,
    lost: bool,
}

/// What the walker of a pass remembers between rounds.
struct Walker<B: Backing> {
    /// Moved directories that this pass has walked or is walking, by device and inode.
    walked: HashSet<(u64, u64)>,
    /// A directory was walked in this round.
    walked_any: bool,
    number: u64,
    batch: Vec<Item<B>>,
}

impl<B: Backing> Pass<'_, B> {
    /// Walks the store from behind `cursor`. `tick` is called a few times a second on the calling thread, with the
    /// path up to which everything is dealt with, once it is known.
    ///
    /// # Errors
    /// [`Cancelled`]; what was handed out before is dealt with.
    pub(super) fn run(
        &self,
        cursor: &[u8],
        visitor: &dyn Visitor<B>,
        tick: &mut dyn FnMut(Option<&[u8]>),
    ) -> Result<PassEnd, Cancelled> {
        self.moves.track(true);
        let mut walker = Walker { walked: HashSet::new(), walked_any: false, number: 0, batch: Vec::new() };
        let pending = Mutex::new(Pending { dirs: VecDeque::new(), lost: false });
        let mut start = Start::After(cursor.to_vec());
        let mut rounds = 0;
        let end = loop {
            if let Err(c) = self.round(start, &mut walker, &pending, visitor, tick) {
                break Err(c);
            }
            rounds += 1;
            let mut pending = pending.lock();
            let moved = self.take(&mut pending);
            let unseen: Vec<_> = pending.dirs.drain(..).chain(moved).filter(|n| self.needs_visit(&walker, n)).collect();
            // A round that looked at files only, by descriptor, cannot have missed anything: what moved during it
            // does not matter.
            let settled = unseen.is_empty() || !walker.walked_any;
            if settled || rounds == ROUNDS_MAX {
                break Ok(PassEnd { whole: settled && !pending.lost });
            }
            walker.walked_any = false;
            start = Start::At(unseen);
        };
        self.moves.track(false);
        end
    }

    fn take(&self, pending: &mut Pending<B>) -> Vec<Arc<B::Node>> {
        let Moved { nodes, lost } = self.moves.take();
        pending.lost |= lost;
        nodes
    }

    /// Whether a moved inode is a file or a directory that this pass has not walked. Of an inode that cannot even be
    /// looked at, the visit will say so.
    fn needs_visit(&self, walker: &Walker<B>, node: &B::Node) -> bool {
        match self.backing.stat(node) {
            Ok(s) => match s.kind {
                Kind::Dir => !walker.walked.contains(&(s.dev, s.ino)),
                Kind::File => s.nlink > 0,
                _ => false,
            },
            Err(_) => true,
        }
    }

    /// One walk and all it leads to, with workers that end with it.
    fn round(
        &self,
        start: Start<B>,
        walker: &mut Walker<B>,
        pending: &Mutex<Pending<B>>,
        visitor: &dyn Visitor<B>,
        tick: &mut dyn FnMut(Option<&[u8]>),
    ) -> Result<(), Cancelled> {
        let (send, receive) = sync_channel::<Batch<B>>(self.workers);
        // Owned by the workers alone: when all of them have ended, the walker's sends fail instead of waiting.
        let receive = Arc::new(Mutex::new(receive));
        let (done, finished) = channel::<(u64, Option<Vec<u8>>)>();
        let mut mark = LowWater::new(walker.number);
        std::thread::scope(|scope| {
            let (round, round_over) = channel::<()>();
            let collecting = scope.spawn(move || self.collect(&round_over, pending, visitor));
            let walking = scope.spawn(move || self.walk(start, walker, pending, &send));
            let workers: Vec<_> = (0..self.workers)
                .map(|_| {
                    let (done, receive) = (done.clone(), Arc::clone(&receive));
                    scope.spawn(move || {
                        if self.gentle {
                            self.backing.give_way();
                        }
                        work(&receive, &done, visitor)
                    })
                })
                .collect();
            drop((done, receive));
            let mut ticked = Instant::now();
            loop {
                match finished.recv_timeout(TICK) {
                    Ok((number, cursor)) => mark.finish(number, cursor),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                }
                if ticked.elapsed() >= TICK {
                    tick(mark.cursor.as_deref());
                    ticked = Instant::now();
                }
            }
            tick(mark.cursor.as_deref());
            let mut end = join(walking);
            for w in workers {
                end = end.and(join(w));
            }
            drop(round);
            end.and(join(collecting))
        })
    }

    /// The collector's thread: looks at moved files as they come, and leaves directories to the walker.
    fn collect(
        &self,
        round_over: &Receiver<()>,
        pending: &Mutex<Pending<B>>,
        visitor: &dyn Visitor<B>,
    ) -> Result<(), Cancelled> {
        while round_over.recv_timeout(COLLECT_EVERY) == Err(RecvTimeoutError::Timeout) {
            self.control.checkpoint()?;
            let mut p = pending.lock();
            let mut items = Vec::new();
            for node in self.take(&mut p) {
                match self.backing.stat(&node).map(|s| s.kind) {
                    Ok(Kind::File) => items.push(Item::moved(node)),
                    // The walker says what is wrong with one that cannot be looked at.
                    Ok(Kind::Dir) | Err(_) => p.dirs.push_back(node),
                    Ok(_) => {}
                }
            }
            drop(p);
            if !items.is_empty() {
                visitor.batch(items)?;
            }
        }
        Ok(())
    }

    /// The walker's thread: fills batches and sends them.
    fn walk(
        &self,
        start: Start<B>,
        walker: &mut Walker<B>,
        pending: &Mutex<Pending<B>>,
        send: &SyncSender<Batch<B>>,
    ) -> Result<(), Cancelled> {
        let mut stack: Vec<Walk<'_, B>> = Vec::new();
        let mut todo: VecDeque<Arc<B::Node>> = VecDeque::new();
        let whole = matches!(start, Start::After(_));
        walker.walked_any |= whole;
        match start {
            Start::After(cursor) => match Walk::after(self.backing, &cursor) {
                Ok(w) => {
                    stack.push(w);
                    stack.extend(self.own_walks());
                }
                Err(e) => self.failures.add("/".to_owned(), &e.into()),
            },
            Start::At(nodes) => todo.extend(nodes),
        }
        loop {
            self.control.checkpoint()?;
            // What moved meanwhile comes first: its descriptors are held open until it was looked at.
            while let Some(node) = todo.pop_front() {
                if let Some(w) = self.visit_moved(walker, node) {
                    stack.push(w);
                }
                self.flush(walker, send, BATCH)?;
            }
            let in_order = whole && stack.len() == 1;
            match stack.last_mut().map(Iterator::next) {
                None => break,
                Some(None) => {
                    stack.pop();
                }
                Some(Some(visit)) => self.visit(walker, visit, in_order),
            }
            if self.flush(walker, send, BATCH)? {
                todo.append(&mut pending.lock().dirs);
            }
        }
        self.flush(walker, send, 1)?;
        Ok(())
    }

    /// What there is of [`OWN_FOLDERS`].
    fn own_walks(&self) -> impl Iterator<Item = Walk<'_, B>> {
        let b = self.backing;
        OWN_FOLDERS.into_iter().filter_map(move |folder| {
            let path = [names::STORE_DIR, b"/", folder].concat();
            match b.root().and_then(|r| b.lookup(&r, names::STORE_DIR)).and_then(|own| b.lookup(&own, folder)) {
                Ok(node) => Some(Walk::below(b, Arc::new(node), path)),
                Err(e) if is_gone(&e) => None,
                Err(e) => {
                    self.failures.add_directory(path::shown(&path), &e.into());
                    None
                }
            }
        })
    }

    /// Sends the batch if it has at least `full` files; says whether it did.
    fn flush(&self, walker: &mut Walker<B>, send: &SyncSender<Batch<B>>, full: usize) -> Result<bool, Cancelled> {
        if walker.batch.len() < full {
            return Ok(false);
        }
        let items = std::mem::take(&mut walker.batch);
        let cursor = items.last().filter(|i| i.in_order).map(Item::path);
        let number = walker.number;
        walker.number += 1;
        // All workers gone means that they were cancelled.
        send.send(Batch { number, items, cursor }).map_err(|_| Cancelled)?;
        Ok(true)
    }

    fn visit(&self, walker: &mut Walker<B>, visit: Result<Visit<B>, WalkError>, in_order: bool) {
        match visit {
            Ok(Visit::Dir { .. }) => {}
            Ok(Visit::Entry { dir, entry }) => {
                let reserved = match names::classify(&entry.name) {
                    // What a file system check saved is looked at, but need not be one of ours; a copy may be half made.
                    Listed::Short | Listed::Long => [LOST_AND_FOUND, COPIES].contains(&dir.path()),
                    Listed::Unfinished | Listed::Reserved => true,
                    Listed::Sidecar | Listed::DirId => return,
                };
                if matches!(entry.kind, Some(Kind::File) | Some(Kind::Dir) | None)
                    && self.share.is_none_or(|s| s.takes(self.backing, &dir, &entry))
                {
                    walker.batch.push(Item { place: Place::Named(dir, entry.name), in_order, reserved });
                }
            }
            // Belongs to root, whoever the store belongs to.
            Err(e) if e.path == LOST_AND_FOUND && e.error.kind() == io::ErrorKind::PermissionDenied => {}
            Err(e) => self.failures.add_directory(path::shown(&e.path), &e.error.into()),
        }
    }

    /// A moved file goes into the batch; of a moved directory, the walk below it is returned, once.
    fn visit_moved(&self, walker: &mut Walker<B>, node: Arc<B::Node>) -> Option<Walk<'_, B>> {
        let stat = match self.backing.stat(&node) {
            Ok(s) => s,
            Err(e) if is_gone(&e) => return None,
            Err(e) => {
                self.failures.add(path::shown(MOVED), &e.into());
                return None;
            }
        };
        match stat.kind {
            Kind::File => walker.batch.push(Item::moved(node)),
            Kind::Dir if walker.walked.insert((stat.dev, stat.ino)) => {
                walker.walked_any = true;
                return Some(Walk::below(self.backing, node, MOVED.to_vec()));
            }
            _ => {}
        }
        None
    }
}

/// A worker's thread.
fn work<B: Backing>(
    receive: &Mutex<Receiver<Batch<B>>>,
    done: &std::sync::mpsc::Sender<(u64, Option<Vec<u8>>)>,
    visitor: &dyn Visitor<B>,
) -> Result<(), Cancelled> {
    loop {
        let next = receive.lock().recv();
        let Ok(batch) = next else { return Ok(()) };
        visitor.batch(batch.items)?;
        // Nobody listening any more is no reason to stop.
        let _ = done.send((batch.number, batch.cursor));
    }
}

/// The result of a scope's thread; its panic goes on here.
fn join<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The last place before which every batch is dealt with.
struct LowWater {
    next: u64,
    ahead: BTreeMap<u64, Option<Vec<u8>>>,
    cursor: Option<Vec<u8>>,
}

impl LowWater {
    fn new(next: u64) -> Self {
        Self { next, ahead: BTreeMap::new(), cursor: None }
    }

    fn finish(&mut self, number: u64, cursor: Option<Vec<u8>>) {
        self.ahead.insert(number, cursor);
        while let Some(c) = self.ahead.remove(&self.next) {
            self.next += 1;
            if c.is_some() {
                self.cursor = c;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cursor_waits_for_the_slowest_batch() {
        let mut m = LowWater::new(3);
        let c = |s: &str| Some(s.as_bytes().to_vec());
        m.finish(4, c("d"));
        m.finish(5, None);
        assert_eq!(m.cursor, None);
        m.finish(3, c("c"));
        assert_eq!(m.cursor, c("d"));
        m.finish(7, c("f"));
        assert_eq!(m.cursor, c("d"));
        m.finish(6, c("e"));
        assert_eq!(m.cursor, c("f"));
    }
}
