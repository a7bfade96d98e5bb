//! Reading directories in pieces; see [`super::snapshot`].

use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use super::snapshot::{DOT, DOT_DOT, Snapshot};
use super::{EnvelopeFs, Found, Report, failed};
use crate::backing::{Backing, Kind};
use crate::store::{Result, StoreError};

/// Directories that may be in the middle of being read. One that is pushed out is read anew, which costs time only.
const DIRECTORIES_MAX: NonZeroUsize = NonZeroUsize::new(64).expect("64 is not 0");
/// Entries in all of them together; the latest one is kept whatever its size.
const ENTRIES_MAX: usize = 1 << 20;

/// An entry, and the offset to go on from after it.
#[derive(Debug, Clone, Copy)]
pub struct DirItem<'a> {
    pub name: &'a [u8],
    pub ino: u64,
    pub kind: Kind,
    pub next: u64,
}

/// An entry with what a lookup of it would have said. The entry is counted as looked up if it was taken.
#[derive(Debug, Clone, Copy)]
pub enum PlusItem<'a> {
    /// `.` and `..`, which are never looked up.
    Dots(DirItem<'a>),
    Entry {
        name: &'a [u8],
        next: u64,
        found: Found,
    },
}

/// Snapshots of directories that are being read.
pub(super) struct Snapshots(Mutex<Cached>);

struct Cached {
    map: LruCache<u64, Arc<Snapshot>>,
    entries: usize,
}

impl Snapshots {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Cached { map: LruCache::new(DIRECTORIES_MAX), entries: 0 }))
    }

    fn get(&self, node: u64) -> Option<Arc<Snapshot>> {
        self.0.lock().map.get(&node).cloned()
    }

    fn put(&self, node: u64, s: Arc<Snapshot>) {
        let mut cached = self.0.lock();
        cached.entries += s.len();
        if let Some((_, old)) = cached.map.push(node, s) {
            cached.entries -= old.len();
        }
        while cached.entries > ENTRIES_MAX && cached.map.len() > 1 {
            match cached.map.pop_lru() {
                Some((_, old)) => cached.entries -= old.len(),
                None => break,
            }
        }
    }

    pub(super) fn drop_of(&self, node: u64) {
        let mut cached = self.0.lock();
        if let Some(old) = cached.map.pop(&node) {
            cached.entries -= old.len();
        }
    }
}

impl<B: Backing> EnvelopeFs<B> {
    /// Entries of a directory from `offset` (0: the beginning, and what is in it now) until `take` says no.
    ///
    /// # Errors
    /// Those of the store.
    pub fn read_dir(&self, node: u64, offset: u64, mut take: impl FnMut(DirItem<'_>) -> bool) -> Result<()> {
        for dots in dots(node, offset) {
            if !take(dots) {
                return Ok(());
            }
        }
        let snapshot = self.snapshot(node, offset)?;
        let rest = snapshot.after(offset.max(DOT_DOT));
        for (next, e) in rest {
            let ino = self.number_in_listing(e.ino);
            if !take(DirItem { name: &e.name, ino, kind: e.kind, next: *next }) {
                break;
            }
        }
        self.done_if_at_end(node, rest.len());
        Ok(())
    }

    /// The number that stat shows for an inode of the backing directory.
    fn number_in_listing(&self, ino: u64) -> u64 {
        self.store.renumbered(self.inodes.device(), ino).map_or(ino, |n| self.inodes.id_of(&n))
    }

    /// As [`EnvelopeFs::read_dir`], with attributes. Each entry that `take` takes counts as one lookup.
    ///
    /// # Errors
    /// Those of the store.
    pub fn read_dir_plus(&self, node: u64, offset: u64, mut take: impl FnMut(PlusItem<'_>) -> bool) -> Result<()> {
        for dots in dots(node, offset) {
            if !take(PlusItem::Dots(dots)) {
                return Ok(());
            }
        }
        let dir = self.inode(node)?;
        let snapshot = self.snapshot(node, offset)?;
        let rest = snapshot.after(offset.max(DOT_DOT));
        for (next, e) in rest {
            let (child, attr) = match self.store.read_dir_node(&dir.node, e) {
                Ok(found) => found,
                // Removed since the snapshot was taken.
                Err(StoreError::NotFound) => continue,
                Err(error) => {
                    failed(Report { operation: "readdirplus", node, file: None }, &error);
                    continue;
                }
            };
            let found = self.enter(child, attr);
            if !take(PlusItem::Entry { name: &e.name, next: *next, found }) {
                self.forget(found.node, 1);
                break;
            }
        }
        self.done_if_at_end(node, rest.len());
        Ok(())
    }

    /// Makes the directory's entries durable.
    ///
    /// # Errors
    /// Those of the backing directory.
    pub fn sync_dir(&self, node: u64) -> Result<()> {
        self.store.sync_dir(&self.inode(node)?.node)
    }

    /// What to read from: a new snapshot at the beginning, the one from then later on.
    fn snapshot(&self, node: u64, offset: u64) -> Result<Arc<Snapshot>> {
        if offset != 0
            && let Some(s) = self.snapshots.get(node)
        {
            return Ok(s);
        }
        let dir = self.inode(node)?;
        let s = Arc::new(Snapshot::new(self.store.read_dir(&dir.node)?));
        self.snapshots.put(node, s.clone());
        Ok(s)
    }

    /// Whoever finds nothing left is the last reader, mostly.
    fn done_if_at_end(&self, node: u64, left: usize) {
        if left == 0 {
            self.snapshots.drop_of(node);
        }
    }
}

/// `.` and `..` as far as they come after `offset`. What `..` is, the kernel knows better; nobody looks at the number.
fn dots(node: u64, offset: u64) -> impl Iterator<Item = DirItem<'static>> {
    let dot = DirItem { name: b".", ino: node, kind: Kind::Dir, next: DOT };
    let dot_dot = DirItem { name: b"..", next: DOT_DOT, ..dot };
    [dot, dot_dot].into_iter().filter(move |d| d.next > offset)
}
