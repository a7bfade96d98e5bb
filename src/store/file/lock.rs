//! A file whose keys are dropped while it is open, and how it gets them back.
//!
//! Dropping leaves the file as settled as it can be: closed cleanly on disk, so that a daemon killed while its keys are
//! locked leaves nothing in doubt. What is in memory of its states is forgotten and marked stale, which every use of a
//! file looks at before anything else; so there is one way back for a file after an error and after a lock.

use super::{FileCore, FileKeys, Inner};
use crate::backing::{Access, Backing};
use crate::format::damage::Damage;
use crate::format::ids::FileId;
use crate::store::error::Result;
use crate::store::header::{self, SLOTS_LEN};
use crate::store::keys::Phase;
use std::sync::{Arc, Weak};

/// What a file that lost its keys to a lock must be when it gets them back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dropped {
    file: FileId,
    commitment: [u8; 32],
}

/// Tells when the last request that was using a file's keys has let go of them.
pub(in crate::store) struct Leaving(Weak<FileKeys>);

impl Leaving {
    /// Whether nobody has the keys any more.
    pub(in crate::store) fn is_gone(&self) -> bool {
        self.0.strong_count() == 0
    }
}

impl<B: Backing> FileCore<B> {
    /// Drops the keys, after marking the file as closed cleanly if it can be written. Waits for requests under way;
    /// the caller has seen to it that none that comes later gets keys. `None` if there were none.
    pub(in crate::store) fn drop_keys(&self) -> Option<Leaving> {
        let mut inner = self.inner.write();
        inner.ready = None;
        let writable = inner.keys.as_ref()?.writable && inner.access == Access::ReadWrite;
        if writable && !self.shared.read_only && !inner.clean {
            self.mark_clean_or_log(&mut inner);
        }
        // A header that no content ever followed is gone by now, and its keys with it.
        let keys = inner.keys.take()?;
        inner.dropped = Some(Dropped { file: keys.file, commitment: keys.commitment });
        inner.stale = true;
        inner.changes += 1;
        // Somebody may be told by an fsync meanwhile, which finds no state to write it into.
        inner.promised = true;
        self.segments.clear();
        Some(Leaving(Arc::downgrade(&keys)))
    }

    /// A key that was put by goes too, if this file came into the table too late to be asked for it.
    pub(in crate::store) fn forget_ready_if_locked(&self) {
        let mut inner = self.inner.write();
        if self.shared.keys.phase() != Phase::Open {
            inner.ready = None;
        }
    }

    /// Whether a read waits for whoever has the file to himself, who may be calling a key service, or for its keys.
    pub fn read_may_wait(&self) -> bool {
        self.inner.try_read().is_none_or(|inner| inner.dropped.is_some())
    }

    /// The same for a write, which besides makes the header of an empty file.
    pub fn write_may_wait(&self) -> bool {
        self.inner.try_read().is_none_or(|inner| inner.keys.is_none())
    }

    /// Gets the keys back that a lock has dropped, if the file is open. Says whether there was anything to do.
    ///
    /// # Errors
    /// As [`FileCore::open`]; the next use of the file tries again.
    pub(in crate::store) fn regain_keys(&self) -> Result<bool> {
        let mut inner = self.inner.write();
        if inner.dropped.is_none() || inner.file.is_none() {
            return Ok(false);
        }
        self.refresh(&mut inner).map(|()| true)
    }

    /// The keys of a file that lost them, from its header on disk: it must be the same file under the same key.
    pub(super) fn keys_again(&self, inner: &Inner<B>, was: Dropped) -> Result<Arc<FileKeys>> {
        let mut bytes = [0u8; SLOTS_LEN];
        let header::Opened { dek, slot, .. } = self.open_header(inner.backing_file()?, &mut bytes)?;
        if (Dropped { file: slot.file, commitment: slot.commitment }) != was {
            return Err(Damage::Commitment.into());
        }
        Ok(Arc::new(FileKeys::new(dek, &slot)))
    }
}
