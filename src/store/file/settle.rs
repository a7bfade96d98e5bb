//! Closing: a file that was written gets its CLEAN flag and its sealed length.
//!
//! The flag is a promise that the size on disk is exact, so it may become durable only when the size is. A new file
//! that nobody was promised anything about gets it at once. One whose earlier content was promised, and whose size has
//! changed since the last barrier, waits in a short queue: [`super::super::Store`]'s `settle` syncs it, then sets the flag,
//! away from the user's close(2). If the daemon dies first, the file is found unclean, which loses nothing.

use super::{FileCore, FileKeys, Inner};
use crate::backing::Backing;
use crate::format::geometry;
use crate::format::state::{CLEAN, TRUNCATING};
use crate::store::error::{Result, StoreError};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Files that wait; over this many the oldest is settled by whoever adds one.
const QUEUE_MAX: usize = 512;

/// Files closed by their last writer that wait for a barrier before they may be called clean.
pub struct SettleQueue<B: Backing> {
    waiting: Mutex<VecDeque<(Instant, Arc<FileCore<B>>)>>,
    /// Files whose barrier failed while nobody had them open: kept so that the next fsync can say so.
    owing: Mutex<VecDeque<Arc<FileCore<B>>>>,
}

impl<B: Backing> Default for SettleQueue<B> {
    fn default() -> Self {
        Self { waiting: Mutex::default(), owing: Mutex::default() }
    }
}

impl<B: Backing> SettleQueue<B> {
    fn push(&self, core: Arc<FileCore<B>>) -> Option<Arc<FileCore<B>>> {
        let mut q = self.waiting.lock();
        q.push_back((Instant::now(), core));
        if q.len() > QUEUE_MAX { q.pop_front().map(|(_, c)| c) } else { None }
    }

    fn pop_idle(&self, min_idle: Duration) -> Option<Arc<FileCore<B>>> {
        let mut q = self.waiting.lock();
        q.pop_front_if(|(since, _)| since.elapsed() >= min_idle).map(|(_, c)| c)
    }

    fn owe(&self, core: &Arc<FileCore<B>>) {
        let mut owing = self.owing.lock();
        if !owing.iter().any(|c| Arc::ptr_eq(c, core)) {
            owing.push_back(Arc::clone(core));
        }
        let oldest = if owing.len() > QUEUE_MAX { owing.pop_front() } else { None };
        drop(owing);
        drop(oldest);
    }

    /// Somebody was told of the file's failed barriers.
    pub(super) fn told(&self, core: &Arc<FileCore<B>>) {
        self.owing.lock().retain(|c| !Arc::ptr_eq(c, core));
    }

    /// The store is closed: nobody will ask any more.
    pub fn close(&self) {
        self.settle(Duration::ZERO);
        let owing = std::mem::take(&mut *self.owing.lock());
        drop(owing);
    }

    /// How many files wait.
    pub fn len(&self) -> usize {
        self.waiting.lock().len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Settles the files that have waited for at least `min_idle`. A file that cannot be settled stays unclean, which is
    /// logged and loses nothing.
    pub fn settle(&self, min_idle: Duration) {
        while let Some(core) = self.pop_idle(min_idle) {
            core.settle();
        }
    }
}

impl<B: Backing> FileCore<B> {
    /// A handle was closed.
    pub(super) fn released(self: &Arc<Self>, writer: bool) {
        let mut inner = self.inner.write();
        inner.opens -= 1;
        inner.writers -= usize::from(writer);
        let mut overflow = None;
        if writer && inner.writers == 0 && !inner.clean && inner.keys.is_some() {
            if inner.promised && inner.resized {
                if !inner.settling {
                    inner.settling = true;
                    overflow = self.shared.settle.push(Arc::clone(self));
                }
            } else {
                self.mark_clean_or_log(&mut inner);
            }
        }
        self.close_if_unused(&mut inner);
        drop(inner);
        if let Some(oldest) = overflow {
            oldest.settle();
        }
    }

    fn settle(self: &Arc<Self>) {
        // The barrier goes first and under the shared lock, so that readers don't wait for the disk.
        let synced = {
            let inner = self.inner.read();
            let wanted = inner.writers == 0 && inner.file.is_some();
            (wanted && self.barrier(&inner).is_ok()).then_some(inner.changes)
        };
        let mut inner = self.inner.write();
        inner.settling = false;
        if synced == Some(inner.changes) {
            inner.resized = false;
        }
        if inner.writers == 0 && !inner.clean && inner.keys.is_some() {
            self.mark_clean_or_log(&mut inner);
        }
        self.close_if_unused(&mut inner);
        drop(inner);
        if self.owes_an_error() {
            self.shared.settle.owe(self);
        }
    }

    pub(super) fn mark_clean_or_log(&self, inner: &mut Inner<B>) {
        let Some(keys) = inner.keys.clone() else { return };
        if self.lost_a_barrier() {
            // A barrier that succeeds after one that failed proves nothing.
            tracing::warn!(file = %keys.file, "file stays marked as not closed cleanly: it could not be written back");
            return;
        }
        // The flag may be on disk although setting it failed, so that it must be known before the next change.
        let r = self.refresh(inner).and_then(|()| {
            let r = if inner.clean || inner.keys.is_none() { Ok(()) } else { self.mark_clean(inner, &keys) };
            self.after_change(inner, r)
        });
        if let Err(e) = r {
            tracing::warn!(file = %keys.file, "file stays marked as not closed cleanly: {e}");
        }
    }

    pub(super) fn mark_clean(&self, inner: &mut Inner<B>, keys: &FileKeys) -> Result<()> {
        self.finish_pending_cut(inner, keys)?;
        if self.is_recovering() {
            // CLEAN forbids the older state copy: every segment's newest must be true first.
            let end = geometry::block_count(inner.size);
            let mut at = 0;
            while at < end {
                let segment = geometry::segment_of(at);
                self.with_segment_mut(inner, keys, segment, |_| Ok(()))?;
                at = geometry::first_block(segment + 1);
                if inner.sparse && at < end {
                    // Of what is absent nothing is in doubt, and there can be very much of it.
                    at = self.skip_absent(inner, at)?;
                }
            }
        }
        if inner.size == 0 {
            // A header that no content ever followed.
            return self.make_empty(inner);
        }
        let file = inner.backing_file()?;
        let _times = self.shared.inode_locks.exclusive(inner.dev, inner.ino);
        let size = geometry::backing_size(inner.size);
        let length = inner.size;
        let promised = inner.promised && inner.resized;
        let marked = self.keeping_times(inner, |before| {
            if before.size != size {
                // Ends inside state pages that a write never came to use.
                self.shared.backing.truncate(file, size)?;
            }
            if promised {
                self.barrier(inner)?;
            }
            self.change_file_state(inner, keys, |f| {
                f.length = length;
                f.flags = f.flags & !TRUNCATING | CLEAN;
            })
        });
        // Also after an error the flag may stand on disk: the next change clears it before anything else.
        inner.clean = true;
        marked?;
        self.set_recovering(false);
        inner.resized = false;
        inner.changes += 1;
        // From here on a reader may hold this content to be complete.
        inner.promised = true;
        Ok(())
    }

    /// Whether the file is marked as closed cleanly on disk; for tests and `check`.
    pub fn is_clean(&self) -> Result<bool> {
        let inner = self.inner.read();
        if inner.file.is_some() { Ok(inner.clean) } else { Err(StoreError::Invalid) }
    }
}
