//! What was renamed or linked while a walk was under way.
//!
//! A walk misses what is moved from where it has not been to where it has been. While moves are tracked, every file
//! and directory that is given another place is also put on a list, which is taken only when no move is half done, and
//! the walk visits what is on it ([`super::pass`] says why that is enough).

use crate::backing::Backing;
use crate::store::Store;
use std::sync::Arc;

/// What was moved since the last look.
pub struct Moved<B: Backing> {
    /// Files and directories, in any order. One that was on the list since tracking began need not be on it again.
    pub nodes: Vec<Arc<B::Node>>,
    /// Something could not be put on the list: the walk proves nothing and has to be repeated.
    pub lost: bool,
}

/// Who knows what is moved: the open store, or nobody if the store is not mounted.
pub trait Moves<B: Backing>: Sync {
    /// Begins or ends tracking. Beginning empties the list.
    fn track(&self, on: bool);
    /// Takes the list.
    fn take(&self) -> Moved<B>;
}

/// The store is not mounted: nobody moves anything.
pub struct NoMoves;

impl<B: Backing> Moves<B> for NoMoves {
    fn track(&self, _: bool) {}

    fn take(&self) -> Moved<B> {
        Moved { nodes: Vec::new(), lost: false }
    }
}

impl<B: Backing> Moves<B> for Store<B> {
    fn track(&self, on: bool) {
        self.track_moves(on);
    }

    fn take(&self) -> Moved<B> {
        let m = self.take_moved();
        Moved { nodes: m.nodes, lost: m.overflowed }
    }
}
