//! Files that were opened under a KEK which was proved unused: an old backup has brought them back.
//!
//! They open as ever, for a retired KEK still unwraps. But only as long as it is not destroyed, so they are put on a
//! short list, and whoever can (`rotation::rewrap_restored`) moves their headers to the active KEK. Nothing depends on
//! the list: a file that is not on it is found again by its next open, by `rotate`, and by the scan before a KEK is
//! destroyed.

use crate::backing::Backing;
use parking_lot::Mutex;
use std::sync::Arc;

/// Most files kept, since each holds a descriptor.
const MAX: usize = 256;

/// The list.
pub struct Restored<B: Backing> {
    found: Mutex<Vec<Arc<B::Node>>>,
}

impl<B: Backing> Default for Restored<B> {
    fn default() -> Self {
        Self { found: Mutex::default() }
    }
}

impl<B: Backing> Restored<B> {
    /// Puts a file on the list, if there is room.
    pub(super) fn note(&self, node: &Arc<B::Node>) {
        let mut found = self.found.lock();
        if found.len() < MAX {
            found.push(Arc::clone(node));
        }
    }

    /// Whether there is anything on the list.
    pub fn is_empty(&self) -> bool {
        self.found.lock().is_empty()
    }

    /// Takes up to `most` files from the list, each maybe more than once.
    pub fn take(&self, most: usize) -> Vec<Arc<B::Node>> {
        let mut found = self.found.lock();
        let n = most.min(found.len());
        found.drain(..n).collect()
    }
}
