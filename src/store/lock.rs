//! Locking a store in use: every KEK and every DEK is dropped, names and attributes go on; and unlocking it.
//!
//! # Why nothing escapes
//! A request that uses a file's keys holds that file's lock from where it looks at the phase to where it is done (or,
//! while it seals ahead of a write, an `Arc` that is waited for). The phase is set first, then each file's lock is taken
//! in turn: a request was there before and has ended, or it comes later and sees the phase. A file that is not in the
//! table yet when the table is read has not looked at the phase yet. The cache is emptied last, because a request that
//! was there before may have put a DEK into it.
//!
//! No two of these locks are held at once, and none across a wait for the kernel, so there is no order to break.

use super::error::{Result, StoreError};
use super::file::{FileCore, Leaving};
use super::keys::{LockedBy, Phase};
use super::open::Store;
use crate::backing::Backing;
use crate::kms::KeyProvider;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long requests that still hold a key are waited for. They only encrypt what they have been handed, so this is
/// never reached but by a mistake, which must show.
const LEAVING_MAX: Duration = Duration::from_secs(30);
const LEAVING_LOOK: Duration = Duration::from_millis(1);

/// What became of the files that were open when the keys were locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Unlocked {
    /// Files that have their keys again.
    pub regained: u64,
    /// Files that do not; each is logged, and tried again when it is used.
    pub failed: u64,
}

impl<B: Backing> Store<B> {
    /// Begins a lock: from now on no file is opened, made or read; what was written before is still taken. Says no if
    /// a lock has begun or is there already.
    pub fn drain_keys(&self) -> bool {
        self.shared().keys.drain()
    }

    /// Drops every KEK and every DEK. Files that were closed or can be written are marked as closed cleanly first. On
    /// return no key but the store secret is in memory. Locking again is harmless, and an operator's lock over one that
    /// a refusal made takes the root keys too.
    ///
    /// # Errors
    /// `ETIMEDOUT` if some request did not let go of a key in time; the keys are locked all the same.
    pub fn lock_keys(&self, by: LockedBy) -> Result<()> {
        let shared = self.shared();
        shared.keys.drain();
        shared.ahead.clear();
        // Those that nobody has open any more let go of their keys by being settled.
        shared.settle.settle(Duration::ZERO);
        let keks = shared.keys.drop_keks(by);
        let files: Vec<Leaving> = self.table.cores().iter().filter_map(|c| c.drop_keys()).collect();
        shared.deks.clear();
        let end = Instant::now() + LEAVING_MAX;
        while !(keks.iter().all(|k| k.strong_count() == 0) && files.iter().all(Leaving::is_gone)) {
            if Instant::now() >= end {
                return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT).into());
            }
            std::thread::sleep(LEAVING_LOOK);
        }
        Ok(())
    }

    /// Gets the KEKs back with the first of `root` that is a root key of this store, and the keys of files that are
    /// open from their headers on disk.
    ///
    /// # Errors
    /// As [`super::keys::Keys::open`]; the keys are then as locked as they were.
    pub fn unlock_keys(&self, root: &[Arc<dyn KeyProvider>]) -> Result<Unlocked> {
        self.shared().keys.reopen(root)?;
        self.shared().renew_keys();
        Ok(self.regain_keys())
    }

    /// The same after a refusal was taken back, with the root keys that are still at hand. Does nothing if it was not a
    /// refusal that locked the keys.
    ///
    /// # Errors
    /// As [`Store::unlock_keys`].
    pub fn unlock_after_refusal(&self) -> Result<Unlocked> {
        let keys = &self.shared().keys;
        if keys.locked_by() != Some(LockedBy::Refusal) {
            return Ok(Unlocked::default());
        }
        keys.reopen_with_connected()?;
        self.shared().renew_keys();
        Ok(self.regain_keys())
    }

    /// After a refusal that leaves open files their keys: nothing else keeps a DEK.
    pub fn forget_idle_keys(&self) {
        self.shared().settle.settle(Duration::ZERO);
        self.shared().deks.clear();
        self.shared().keys.pool().clear();
    }

    /// Whether opening a file, or giving one its first byte, may wait: for a key service, or in a store that is only read for
    /// the keyring to be read again.
    pub fn open_may_wait(&self) -> bool {
        self.shared().read_only || self.shared().keys.calls_a_service()
    }

    /// Whether reads, opens and new writes are turned away.
    pub fn keys_are_closed(&self) -> bool {
        self.shared().keys.phase() != Phase::Open
    }

    /// For whoever is about to read content.
    ///
    /// # Errors
    /// [`StoreError::KeysLocked`].
    pub fn may_read(&self) -> Result<()> {
        if self.keys_are_closed() { Err(StoreError::KeysLocked) } else { Ok(()) }
    }

    /// Files that are open get their keys back now, and not when they are next used: that may be when the key service is
    /// away again, and a file that is open is to work then.
    fn regain_keys(&self) -> Unlocked {
        let mut done = Unlocked::default();
        for core in self.table.cores() {
            match FileCore::regain_keys(&core) {
                Ok(true) => done.regained += 1,
                Ok(false) => {}
                Err(e) => {
                    done.failed += 1;
                    tracing::warn!("an open file did not get its keys back: {e}");
                }
            }
        }
        done
    }
}
