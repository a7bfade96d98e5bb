//! What was renamed or linked while somebody scans the store.
//!
//! A scan by names can miss an inode that is moved from a directory not yet visited to one already visited. While
//! [`Store::track_moves`] is on, every such inode is kept for the scan to visit.

use super::open::Store;
use crate::backing::Backing;
use parking_lot::{Condvar, Mutex, RwLock, RwLockReadGuard};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Most inodes kept, since each holds a descriptor.
pub(super) const MAX: usize = 1024;
/// After so many inodes those kept before are forgotten, and may be kept once more: bounds memory, at 16 bytes each.
const SEEN_MAX: usize = 1 << 20;
/// How long a rename waits at most for the scan to make room on a full list. Tests are about that there will be room, on
/// whatever machine.
const ROOM_WAIT: Duration = Duration::from_secs(if cfg!(test) { 60 } else { 1 });

/// What was moved since the last call of [`Store::take_moved`].
pub struct Moved<B: Backing> {
    /// Files and directories.
    pub nodes: Vec<Arc<B::Node>>,
    /// There were more than could be kept: the scan must begin anew.
    pub overflowed: bool,
}

impl<B: Backing> Default for Moved<B> {
    fn default() -> Self {
        Self { nodes: Vec::new(), overflowed: false }
    }
}

struct List<B: Backing> {
    moved: Moved<B>,
    /// Device and inode of what was kept since tracking began. A scan looks at each once, so that programs that rename
    /// the same files all the time add nothing.
    seen: HashSet<(u64, u64)>,
}

impl<B: Backing> Default for List<B> {
    fn default() -> Self {
        Self { moved: Moved::default(), seen: HashSet::new() }
    }
}

pub(super) struct Moves<B: Backing> {
    on: AtomicBool,
    list: Mutex<List<B>>,
    /// The list was taken, or tracking ended.
    room: Condvar,
    /// Held shared from before a move until it is on the list, so that a scan that has ended finds there every move
    /// that took place while it ran.
    under_way: RwLock<()>,
}

impl<B: Backing> Default for Moves<B> {
    fn default() -> Self {
        Self { on: AtomicBool::new(false), list: Mutex::default(), room: Condvar::new(), under_way: RwLock::new(()) }
    }
}

impl<B: Backing> Moves<B> {
    pub fn on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    /// Waits a while if the list is full, so that the scan can keep up with whoever renames a great many files. To be
    /// called before a move takes any lock.
    pub fn make_room(&self) {
        if !self.on() {
            return;
        }
        let mut l = self.list.lock();
        // Once something was lost this scan proves nothing any more, and nobody is to wait for it.
        let full = |l: &mut List<B>| self.on() && l.moved.nodes.len() >= MAX && !l.moved.overflowed;
        self.room.wait_while_for(&mut l, full, ROOM_WAIT);
    }

    /// To be held through a rename or link and its [`Moves::record`].
    pub fn begin(&self) -> RwLockReadGuard<'_, ()> {
        self.under_way.read()
    }

    /// Keeps an inode, known by device and number, unless that was done before.
    pub fn record(&self, inode: (u64, u64), node: Arc<B::Node>) {
        let mut l = self.list.lock();
        if !self.on() || l.seen.contains(&inode) {
            return;
        }
        if l.moved.nodes.len() >= MAX {
            l.moved.overflowed = true;
            return;
        }
        if l.seen.len() >= SEEN_MAX {
            l.seen.clear();
        }
        l.seen.insert(inode);
        l.moved.nodes.push(node);
    }

    /// One could not be kept.
    pub fn lose(&self) {
        self.list.lock().moved.overflowed = true;
    }
}

impl<B: Backing> Store<B> {
    /// Begins or ends keeping what is renamed or linked; both forget what was kept. A rename that returns after this
    /// call is kept.
    pub fn track_moves(&self, on: bool) {
        let mut l = self.moves.list.lock();
        self.moves.on.store(on, Ordering::Release);
        *l = List::default();
        self.moves.room.notify_all();
    }

    /// What was renamed or linked since the last call, but for what was among it before; waits for moves that are under
    /// way. Asked for after a scan, and again until it is empty, it holds everything that the scan may have missed.
    pub fn take_moved(&self) -> Moved<B> {
        drop(self.moves.under_way.write());
        let moved = std::mem::take(&mut self.moves.list.lock().moved);
        self.moves.room.notify_all();
        moved
    }
}
