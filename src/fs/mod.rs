//! File operations in plain arguments and results: what a FUSE adapter, or any other front end, calls.
//!
//! [`EnvelopeFs`] adds to the [`Store`] what the kernel's side needs: node ids with exact lookup counts, handles of open
//! files, directory reading in pieces, and the rule about when setuid bits and file capabilities fall. [`errno::of`] is the
//! one table from errors to errno.

pub mod errno;
mod attr;
mod caller;
mod directory;
mod file;
mod inode;
mod names;
mod report;
mod slab;
mod snapshot;
mod xattr;

use std::sync::{Arc, OnceLock};

use crate::backing::Backing;
use crate::store::{Attr, Result, Store, StoreError};

pub use caller::Caller;
pub use directory::{DirItem, PlusItem};
pub use inode::ROOT;
pub use names::NewNode;
pub use report::{Report, failed, panicked};
pub use xattr::Answer;

use directory::Snapshots;
use file::Handle;
use inode::{Inode, Inodes};
use slab::Slab;

/// The store as a file system: numbered nodes and handles. All methods may be called from many threads at once.
pub struct EnvelopeFs<B: Backing> {
    store: Arc<Store<B>>,
    inodes: Inodes<B>,
    handles: Slab<Handle<B>>,
    snapshots: Snapshots,
    settings: Settings,
    mode_changed: OnceLock<ModeChanged>,
}

/// Told of a node whose mode a write has changed.
type ModeChanged = Box<dyn Fn(u64) + Send + Sync>;

/// What the front end and the process allow.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// New inodes are given to the caller; only root can do that.
    pub gives_away: bool,
    /// The kernel keeps the mtime of regular files and says when it changes (writeback cache).
    pub kernel_keeps_mtime: bool,
}

/// An inode that a name led to. The kernel has one more lookup of [`Found::node`] to forget.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    pub node: u64,
    /// Tells an inode from an earlier one with the same number.
    pub generation: u64,
    pub attr: Attr,
}

impl<B: Backing> EnvelopeFs<B> {
    /// The file system over an open store.
    pub fn new(store: Arc<Store<B>>, settings: Settings) -> Self {
        let inodes = Inodes::new(store.root());
        Self {
            store,
            inodes,
            handles: Slab::new(),
            snapshots: Snapshots::new(),
            settings,
            mode_changed: OnceLock::new(),
        }
    }

    /// Has `tell` told of every node that lost its setuid or setgid bit by a write, an allocation or a copy: their
    /// answers hold no attributes from which the kernel could see it. Can be said once; `tell` must not block.
    pub fn on_mode_changed(&self, tell: impl Fn(u64) + Send + Sync + 'static) {
        let _ = self.mode_changed.set(Box::new(tell));
    }

    /// The store below.
    pub fn store(&self) -> &Arc<Store<B>> {
        &self.store
    }

    /// Nodes that the kernel knows, and files that are open.
    pub fn counts(&self) -> (usize, usize) {
        (self.inodes.len(), self.handles.len())
    }

    /// Whether the keys are locked, or about to be.
    pub fn is_locked(&self) -> bool {
        self.store.keys_are_closed()
    }

    /// Ids of the regular files that the kernel knows.
    pub fn files(&self) -> Vec<u64> {
        self.inodes.files()
    }

    /// statvfs(3).
    ///
    /// # Errors
    /// Those of the backing directory.
    pub fn stat_fs(&self) -> Result<crate::backing::StatFs> {
        self.store.stat_fs()
    }

    /// The kernel has forgotten `lookups` of `node`.
    pub fn forget(&self, node: u64, lookups: u64) {
        if self.inodes.forget(node, lookups) {
            self.snapshots.drop_of(node);
        }
    }

    fn inode(&self, node: u64) -> Result<Arc<Inode<B>>> {
        self.inodes.get(node).ok_or_else(|| os(libc::ESTALE))
    }

    fn handle(&self, number: u64) -> Result<Arc<Handle<B>>> {
        self.handles.get(number).ok_or_else(|| os(libc::EBADF))
    }
}

/// An error that has only an errno.
fn os(errno: i32) -> StoreError {
    StoreError::Backing(std::io::Error::from_raw_os_error(errno))
}

#[cfg(test)]
mod tests;
