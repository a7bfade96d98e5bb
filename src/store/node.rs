//! Inodes as the mount knows them.
//!
//! A [`Node`] stands for one backing inode, (device, inode number), as long as somebody holds its `Arc`. It is known
//! by a descriptor (*pinned*) or only by where it lies: a parent and a backing name. The second costs nothing and is
//! what `readdir` and `lookup` make; the descriptor is opened on first need and checked against the inode number.
//!
//! `rekey` puts another inode in the place of a file's: the node stays, and so does the number users know it by, and
//! [`Table::replace`] gives it the new inode.
//!
//! Invariants:
//! * a node's name is removed or changed by this program only while the node is pinned and somebody holds the pin,
//!   so a node that is known only by its name is never known by a wrong one;
//! * a pinned inode is not freed, so while a node lives its number is not given to another inode;
//! * [`Table`] holds at most one live node, and at most one live file core, for an inode number.
//!
//! Locks: [`DirState::lock`] of directories (in order of node id) before `Node::place`; the table's locks are taken
//! last and never across a call to the backing directory.

use super::error::{Result, StoreError};
use super::file::FileCore;
use super::shared::Shared;
use crate::backing::{Backing, Kind, Stat};
use crate::format::ids::DirId;
use parking_lot::{Mutex, RwLock};
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

/// Device and inode number.
pub type InodeKey = (u64, u64);

/// Id of the root's node.
pub const ROOT_ID: u64 = 1;
const SHARDS: usize = 16;
/// How many pinned nodes are looked at when there are too many.
const SWEEP: usize = 64;

/// Where an inode lies: one of its names.
pub(super) struct Location<B: Backing> {
    pub parent: Arc<Node<B>>,
    /// The backing name.
    pub name: Arc<[u8]>,
    /// When the name was made, on the clock of [`super::unsynced::Unsynced`].
    pub made: u64,
}

impl<B: Backing> Clone for Location<B> {
    fn clone(&self) -> Self {
        Self { parent: self.parent.clone(), name: self.name.clone(), made: self.made }
    }
}

impl<B: Backing> Location<B> {
    /// Whether it is this name.
    pub fn is(&self, parent: &Node<B>, name: &[u8]) -> bool {
        self.parent.id == parent.id && *self.name == *name
    }
}

struct Place<B: Backing> {
    fd: Option<Arc<B::Node>>,
    at: Option<Location<B>>,
    /// Counts changes of `at`.
    moves: u64,
}

/// What only directories have.
pub(super) struct DirState {
    /// Shared: lookup and listing. Exclusive: every change of the entries, and removing the directory itself.
    /// Several are taken in order of node id, see [`lock_dirs`].
    pub lock: RwLock<()>,
    /// The directory's id, once read.
    pub id: OnceLock<DirId>,
    /// Whether invalid names have been reported.
    pub warned: AtomicBool,
    /// Whether there is a default ACL: 0 not known, 1 no, 2 yes.
    pub default_acl: AtomicU8,
}

/// One inode.
pub struct Node<B: Backing> {
    id: u64,
    dev: u64,
    /// Changes only in [`Table::replace`].
    ino: AtomicU64,
    number: Option<u64>,
    kind: Kind,
    place: Mutex<Place<B>>,
    /// Used since the last sweep of pinned nodes.
    used: AtomicBool,
    dir: Option<Box<DirState>>,
    /// A symbolic link's target, kept when the file that holds it goes before the node does.
    pub(super) target: OnceLock<Vec<u8>>,
    table: Arc<Table<B>>,
}

enum Seen<B: Backing> {
    Pinned(Arc<B::Node>),
    At(Location<B>, u64),
    Nowhere,
}

fn stale() -> StoreError {
    StoreError::Backing(io::Error::from_raw_os_error(libc::ESTALE))
}

impl<B: Backing> Node<B> {
    /// The number of this node, never reused while the store is open; the root's is [`ROOT_ID`].
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Device and inode number of the backing inode.
    pub fn key(&self) -> InodeKey {
        (self.dev, self.ino.load(Ordering::Acquire))
    }

    /// The inode number that users know it by for as long as it lives: the backing inode's when the node was made.
    /// `None` if that was still another node's, whose inode has been replaced since.
    pub fn number(&self) -> Option<u64> {
        self.number
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What only a directory has.
    ///
    /// # Errors
    /// [`StoreError::NotADirectory`].
    pub(super) fn dir(&self) -> Result<&DirState> {
        self.dir.as_deref().ok_or(StoreError::NotADirectory)
    }

    /// A name of it, if one is known.
    pub(super) fn location(&self) -> Option<Location<B>> {
        self.place.lock().at.clone()
    }

    fn seen(&self) -> Seen<B> {
        let p = self.place.lock();
        match (&p.fd, &p.at) {
            (Some(fd), _) => {
                self.used.store(true, Ordering::Relaxed);
                Seen::Pinned(fd.clone())
            }
            (None, Some(at)) => Seen::At(at.clone(), p.moves),
            (None, None) => Seen::Nowhere,
        }
    }

    fn moves(&self) -> u64 {
        self.place.lock().moves
    }

    /// The backing inode, opened if it is not yet. While the result is held the node stays pinned.
    ///
    /// # Errors
    /// The backing directory's; `ESTALE` if somebody else changed it under the mount.
    pub fn fd(self: &Arc<Self>, b: &B) -> Result<Arc<B::Node>> {
        'again: loop {
            // Up to the nearest pinned ancestor, then down; not recursive, because trees can be deep.
            let (mut chain, mut at) = (Vec::new(), self.clone());
            let mut fd = loop {
                match at.seen() {
                    Seen::Pinned(fd) => break fd,
                    Seen::Nowhere => return Err(stale()),
                    Seen::At(l, moves) => {
                        let parent = l.parent.clone();
                        chain.push((at, l, moves));
                        at = parent;
                    }
                }
            };
            while let Some((node, l, moves)) = chain.pop() {
                let found = b.lookup(&fd, &l.name).and_then(|n| Ok((b.stat(&n)?, n)));
                match found {
                    Ok((st, n)) if (st.dev, st.ino) == node.key() => fd = node.pin(Arc::new(n)),
                    // Renamed since we looked: it is pinned now, or known by another name.
                    _ if node.moves() != moves => continue 'again,
                    Ok(_) => return Err(stale()),
                    Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Err(stale()),
                    Err(e) => return Err(e.into()),
                }
            }
            return Ok(fd);
        }
    }

    /// stat(2) of the backing inode, without opening it if it is not open.
    ///
    /// # Errors
    /// As [`Node::fd`].
    pub(super) fn stat(self: &Arc<Self>, b: &B) -> Result<Stat> {
        loop {
            let (l, moves) = match self.seen() {
                Seen::Pinned(fd) => {
                    let st = b.stat(&fd)?;
                    // Of an inode that was replaced meanwhile it says nothing any more.
                    if self.place.lock().fd.as_ref().is_none_or(|now| Arc::ptr_eq(now, &fd)) {
                        return Ok(st);
                    }
                    continue;
                }
                Seen::Nowhere => return Err(stale()),
                Seen::At(l, moves) => (l, moves),
            };
            let parent = l.parent.fd(b)?;
            match b.stat_at(&parent, &l.name) {
                Ok(st) if (st.dev, st.ino) == self.key() => return Ok(st),
                _ if self.moves() != moves => {}
                Ok(_) => return Err(stale()),
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Err(stale()),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Keeps the descriptor that came with a new file.
    pub(super) fn pin_new(self: &Arc<Self>, fd: B::Node) -> Arc<B::Node> {
        self.pin(Arc::new(fd))
    }

    /// Keeps `fd`, unless there is one already; returns the one that is kept.
    fn pin(self: &Arc<Self>, fd: Arc<B::Node>) -> Arc<B::Node> {
        {
            let mut p = self.place.lock();
            self.used.store(true, Ordering::Relaxed);
            if let Some(have) = &p.fd {
                return have.clone();
            }
            p.fd = Some(fd.clone());
        }
        self.table.pinned(self);
        fd
    }

    /// Closes the descriptor if the node can be found again by name and nobody is using it. Returns whether it has
    /// none now.
    fn unpin(&self) -> bool {
        let mut p = self.place.lock();
        if p.fd.as_ref().is_none_or(|fd| p.at.is_none() || Arc::strong_count(fd) > 1) {
            return p.fd.is_none();
        }
        let fd = p.fd.take();
        drop(p);
        drop(fd);
        self.table.pinned.fetch_sub(1, Ordering::Relaxed);
        true
    }

    /// Learns a name, if none is known.
    pub(super) fn learn(&self, at: Location<B>) {
        let mut p = self.place.lock();
        if p.at.is_none() && self.id != ROOT_ID {
            p.at = Some(at);
            p.moves += 1;
        }
    }

    /// The name `name` in `parent` has become `to`. The node must be pinned and the pin held.
    pub(super) fn moved(&self, parent: &Node<B>, name: &[u8], to: Location<B>) {
        let mut p = self.place.lock();
        if p.at.as_ref().is_none_or(|l| l.is(parent, name)) {
            let old = p.at.replace(to);
            p.moves += 1;
            drop(p);
            // The old parent may go with it, which takes other locks.
            drop(old);
        }
    }

    /// The name `name` in `parent` is gone. The node must be pinned and the pin held.
    pub(super) fn lost(&self, parent: &Node<B>, name: &[u8]) {
        let mut p = self.place.lock();
        if p.at.as_ref().is_some_and(|l| l.is(parent, name)) {
            let old = p.at.take();
            p.moves += 1;
            drop(p);
            drop(old);
        }
    }
}

impl<B: Backing> Drop for Node<B> {
    fn drop(&mut self) {
        // First from the table, then the descriptor: after that the inode number may be another inode's.
        self.table.forget(self);
        let place = self.place.get_mut();
        if place.fd.take().is_some() {
            self.table.pinned.fetch_sub(1, Ordering::Relaxed);
        }
        // Not recursive up the tree: a deep one would overflow the stack.
        let mut parent = place.at.take().map(|l| l.parent);
        while let Some(p) = parent {
            parent = Arc::into_inner(p).and_then(|mut n| n.place.get_mut().at.take()).map(|l| l.parent);
        }
    }
}

impl<B: Backing> std::fmt::Debug for Node<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("id", &self.id).field("key", &self.key()).field("kind", &self.kind).finish()
    }
}

/// The live nodes and file cores of a store.
pub(super) struct Table<B: Backing> {
    nodes: [Mutex<HashMap<InodeKey, Weak<Node<B>>>>; SHARDS],
    cores: Mutex<Cores<B>>,
    /// Numbers of live nodes whose inodes were replaced: the backing file system may give them to new inodes.
    kept: Mutex<HashSet<InodeKey>>,
    next_id: AtomicU64,
    pinned: AtomicUsize,
    pinned_max: usize,
    /// Pinned nodes, the ones to look at first in front.
    queue: Mutex<VecDeque<Weak<Node<B>>>>,
}

struct Cores<B: Backing> {
    by_key: HashMap<InodeKey, Weak<FileCore<B>>>,
    /// Size at which dead ones are swept out.
    sweep_at: usize,
}

impl<B: Backing> Table<B> {
    /// An empty table that tries to keep at most `pinned_max` descriptors open.
    pub fn new(pinned_max: usize) -> Arc<Self> {
        Arc::new(Self {
            nodes: std::array::from_fn(|_| Mutex::new(HashMap::new())),
            cores: Mutex::new(Cores { by_key: HashMap::new(), sweep_at: 64 }),
            kept: Mutex::default(),
            next_id: AtomicU64::new(ROOT_ID),
            pinned: AtomicUsize::new(0),
            pinned_max,
            queue: Mutex::new(VecDeque::new()),
        })
    }

    fn shard(&self, key: InodeKey) -> &Mutex<HashMap<InodeKey, Weak<Node<B>>>> {
        &self.nodes[key.1 as usize % SHARDS]
    }

    /// The live node of an inode, if there is one.
    pub fn get(&self, key: InodeKey) -> Option<Arc<Node<B>>> {
        self.shard(key).lock().get(&key)?.upgrade()
    }

    /// The live node of an inode, if users may know it, or another one, by a number that is not its inode's.
    pub fn renumbered(&self, key: InodeKey) -> Option<Arc<Node<B>>> {
        if self.kept.lock().is_empty() { None } else { self.get(key) }
    }

    /// The node of an inode that was just seen at `at`, or that `fd` refers to. The caller holds the lock of the
    /// directory in `at`, so that the name is still true.
    pub fn adopt(self: &Arc<Self>, st: &Stat, at: Option<Location<B>>, fd: Option<Arc<B::Node>>) -> Arc<Node<B>> {
        let key = (st.dev, st.ino);
        let mut shard = self.shard(key).lock();
        // Another kind under the same number: somebody changed the backing directory under the mount.
        let have = shard.get(&key).and_then(Weak::upgrade);
        let node = match have {
            Some(n) if n.kind == st.kind => {
                drop(shard);
                if let Some(at) = at {
                    n.learn(at);
                }
                n
            }
            other => {
                let n = Arc::new(self.node(st, at));
                shard.insert(key, Arc::downgrade(&n));
                drop(shard);
                drop(other);
                n
            }
        };
        if let Some(fd) = fd {
            node.pin(fd);
        }
        node
    }

    fn node(self: &Arc<Self>, st: &Stat, at: Option<Location<B>>) -> Node<B> {
        let dir = (st.kind == Kind::Dir).then(|| {
            Box::new(DirState {
                lock: RwLock::new(()),
                id: OnceLock::new(),
                warned: AtomicBool::new(false),
                default_acl: AtomicU8::new(0),
            })
        });
        let taken = self.kept.lock().contains(&(st.dev, st.ino));
        Node {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            dev: st.dev,
            ino: AtomicU64::new(st.ino),
            number: (!taken).then_some(st.ino),
            kind: st.kind,
            place: Mutex::new(Place { fd: None, at, moves: 0 }),
            used: AtomicBool::new(false),
            dir,
            target: OnceLock::new(),
            table: self.clone(),
        }
    }

    fn forget(&self, node: &Node<B>) {
        let key = node.key();
        let mut shard = self.shard(key).lock();
        // It may already be another node's: made when this one could no longer be had.
        if shard.get(&key).is_some_and(|w| w.strong_count() == 0) {
            shard.remove(&key);
        }
        drop(shard);
        if let Some(number) = node.number.filter(|n| *n != key.1) {
            self.kept.lock().remove(&(key.0, number));
        }
    }

    /// From now on `node`, a regular file, stands for the inode `ino` of the same device, which `fd` refers to and no
    /// node has. The caller holds a pin of the node, a handle of its file core with the core's lock exclusively, and the
    /// locks of all directories that its names are in: so nobody is between a name and the node.
    pub fn replace(&self, node: &Arc<Node<B>>, ino: u64, fd: Arc<B::Node>) {
        let (old, new) = (node.key(), (node.dev, ino));
        if let Some(number) = node.number {
            let mut kept = self.kept.lock();
            // Its own number again: nobody has to be kept from it.
            if number == ino {
                kept.remove(&(node.dev, number));
            } else {
                kept.insert((node.dev, number));
            }
        }
        self.shard(new).lock().insert(new, Arc::downgrade(node));
        let before = node.place.lock().fd.replace(fd);
        {
            let mut cores = self.cores.lock();
            node.ino.store(ino, Ordering::Release);
            if let Some(core) = cores.by_key.remove(&old) {
                cores.by_key.insert(new, core);
            }
        }
        self.shard(old).lock().remove(&old);
        drop(before);
    }

    fn pinned(&self, node: &Arc<Node<B>>) {
        let count = self.pinned.fetch_add(1, Ordering::Relaxed) + 1;
        let mut queue = self.queue.lock();
        queue.push_back(Arc::downgrade(node));
        // Dead ones go all the while, so that the queue never grows much beyond the live ones.
        let looks = if count > self.pinned_max { SWEEP } else { 2 };
        let first: Vec<_> = (0..looks.min(queue.len())).filter_map(|_| queue.pop_front()?.upgrade()).collect();
        drop(queue);
        // Used since the last look, or in use now: another round.
        let stay = |n: &Arc<Node<B>>| count <= self.pinned_max || n.used.swap(false, Ordering::Relaxed) || !n.unpin();
        let stay: Vec<_> = first.iter().filter(|n| stay(n)).map(Arc::downgrade).collect();
        self.queue.lock().extend(stay);
    }

    /// How many descriptors are open, for tests and status.
    pub fn pinned_count(&self) -> usize {
        self.pinned.load(Ordering::Relaxed)
    }

    /// The one file core of a regular file.
    pub fn core(&self, shared: &Arc<Shared<B>>, node: &Arc<Node<B>>) -> Result<Arc<FileCore<B>>> {
        loop {
            // Under the lock: else the number may be another file's by the time of the look.
            let (key, there) = {
                let cores = self.cores.lock();
                let key = node.key();
                (key, cores.by_key.get(&key).and_then(Weak::upgrade))
            };
            if let Some(core) = there {
                return Ok(core);
            }
            let fd = node.fd(&shared.backing)?;
            let mut cores = self.cores.lock();
            if let Some(core) = cores.by_key.get(&node.key()).and_then(Weak::upgrade) {
                return Ok(core);
            }
            // Else the inode was replaced meanwhile, and the descriptor may be the old one's.
            if node.key() == key {
                let core = FileCore::new(shared, fd);
                cores.insert(key, &core);
                return Ok(core);
            }
        }
    }

    /// Every file core that lives.
    pub fn cores(&self) -> Vec<Arc<FileCore<B>>> {
        self.cores.lock().by_key.values().filter_map(Weak::upgrade).collect()
    }

    /// Takes in the core of a file that was just made, unless somebody has found the file by its new name and opened it
    /// already: then theirs is the one, and returned.
    pub fn put_core(&self, key: InodeKey, core: &Arc<FileCore<B>>) -> Option<Arc<FileCore<B>>> {
        let mut cores = self.cores.lock();
        let there = cores.by_key.get(&key).and_then(Weak::upgrade);
        if there.is_none() {
            cores.insert(key, core);
        }
        there
    }
}

impl<B: Backing> Cores<B> {
    fn insert(&mut self, key: InodeKey, core: &Arc<FileCore<B>>) {
        self.by_key.insert(key, Arc::downgrade(core));
        if self.by_key.len() >= self.sweep_at {
            self.by_key.retain(|_, w| w.strong_count() > 0);
            self.sweep_at = (self.by_key.len() * 2).max(64);
        }
    }
}
