//! What was renamed or linked while somebody scans the store.
//!
//! A scan by names can miss an inode that is moved from a directory not yet visited to one already visited. While
//! [`Store::track_moves`] is on, every such inode is kept for the scan to visit.

use super::open::Store;
use crate::backing::Backing;
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Most inodes kept, since each holds a descriptor.
const MAX: usize = 1024;

/// What was moved since the last call of [`Store::take_moved`].
pub struct Moved<B: Backing> {
    /// Files and directories, each maybe more than once.
    pub nodes: Vec<Arc<B::Node>>,
    /// There were more than could be kept: the scan must begin anew.
    pub overflowed: bool,
}

impl<B: Backing> Default for Moved<B> {
    fn default() -> Self {
        Self { nodes: Vec::new(), overflowed: false }
    }
}

pub(super) struct Moves<B: Backing> {
    on: AtomicBool,
    moved: Mutex<Moved<B>>,
    /// Held shared from before a move until it is on the list, so that a scan that has ended finds there every move
    /// that took place while it ran.
    under_way: RwLock<()>,
}

impl<B: Backing> Default for Moves<B> {
    fn default() -> Self {
        Self { on: AtomicBool::new(false), moved: Mutex::default(), under_way: RwLock::new(()) }
    }
}

impl<B: Backing> Moves<B> {
    pub fn on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    /// To be held through a rename or link and its [`Moves::record`].
    pub fn begin(&self) -> RwLockReadGuard<'_, ()> {
        self.under_way.read()
    }

    pub fn record(&self, node: Arc<B::Node>) {
        let mut m = self.moved.lock();
        if !self.on() {
            return;
        }
        if m.nodes.len() < MAX {
            m.nodes.push(node);
        } else {
            m.overflowed = true;
        }
    }

    /// One could not be kept.
    pub fn lose(&self) {
        self.moved.lock().overflowed = true;
    }
}

impl<B: Backing> Store<B> {
    /// Begins or ends keeping what is renamed or linked. Ending forgets what was kept. A rename that returns after
    /// this call is kept.
    pub fn track_moves(&self, on: bool) {
        let mut m = self.moves.moved.lock();
        self.moves.on.store(on, Ordering::Release);
        if !on {
            *m = Moved::default();
        }
    }

    /// What was renamed or linked since the last call; waits for moves that are under way. Asked for after a scan, and
    /// again until it is empty, it holds everything that the scan may have missed.
    pub fn take_moved(&self) -> Moved<B> {
        drop(self.moves.under_way.write());
        std::mem::take(&mut *self.moves.moved.lock())
    }
}
