//! What every part of an open store shares.

use super::ahead::Ahead;
use super::dek_cache::DekCache;
use super::error::Result;
use super::file::SettleQueue;
use super::keys::{KekHandle, Keys, Phase, Ready};
use super::load::Load;
use super::restored::Restored;
use crate::backing::Backing;
use crate::format::ids::KekId;
use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::sync::Arc;

/// The open store's common parts.
pub struct Shared<B: Backing> {
    pub backing: B,
    pub keys: Keys,
    pub deks: DekCache,
    pub read_only: bool,
    pub inode_locks: InodeLocks,
    /// How long users wait, for background work.
    pub load: Load,
    /// Files that wait for a barrier before they are marked clean.
    pub settle: SettleQueue<B>,
    /// Files that old backups have brought back.
    pub restored: Restored<B>,
    /// What is done for users before they wait for it.
    pub ahead: Ahead<B>,
}

impl<B: Backing> Shared<B> {
    /// Puts an opened backing directory and its opened keyring together.
    pub fn new(backing: B, keys: Keys, deks: DekCache, read_only: bool) -> Self {
        Self {
            backing,
            keys,
            deks,
            read_only,
            inode_locks: InodeLocks::new(),
            load: Load::default(),
            settle: SettleQueue::default(),
            restored: Restored::default(),
            ahead: Ahead::default(),
        }
    }
}

impl<B: Backing> Shared<B> {
    /// The KEK `id`, to open files with. A store that is only read may share the disk with a rotation elsewhere: the keyring
    /// is read again for a KEK that is not known.
    ///
    /// # Errors
    /// As [`Keys::kek`]; while the keyring is read again, the backing directory's, and why a KEK that is new does not open.
    pub(super) fn kek(&self, id: KekId) -> Result<Arc<KekHandle>> {
        match self.keys.kek(id) {
            Err(_) if self.read_only && self.keys.phase() == Phase::Open && self.keys.may_be_news(id) => {
                self.keys.renew(&self.backing)?;
                self.keys.kek(id)
            }
            found => found,
        }
    }

    /// Takes over what somebody else has made of the keyring, if that is possible at all. What goes wrong is logged: the
    /// keyring before is in force then.
    pub fn renew_keys(&self) {
        if self.read_only
            && self.keys.phase() == Phase::Open
            && let Err(e) = self.keys.renew(&self.backing)
        {
            tracing::warn!("looking whether the keyring was changed elsewhere: {e}");
        }
    }

    /// For whoever is about to make a file, or to open an empty one for writing: its first write will need a key, and may
    /// reach us when nobody can be told of an error any more. While the key service that has to wrap it does not answer,
    /// one that was made ahead of need is put by in `ready`.
    ///
    /// # Errors
    /// As [`Keys::may_create`].
    pub(super) fn may_create(&self, ready: &mut Option<Ready>) -> Result<()> {
        self.keys.may_open()?;
        match self.keys.may_create() {
            // Not one under a KEK that was active when it was put by.
            Err(_) if ready.as_ref().is_some_and(|r| self.keys.is_ready(r)) => Ok(()),
            Err(e) => {
                *ready = self.keys.with_active(|kek| self.keys.take_ready(kek, None));
                if ready.is_some() { Ok(()) } else { Err(e) }
            }
            Ok(()) => Ok(()),
        }
    }
}

/// A lock for each backing inode, by striping: what changes an inode's times on the way holds it.
///
/// *Shared*: data writes, truncates, and every call whose new mtime users shall see (including an explicit utimens).
/// *Exclusive*: whoever writes the file but keeps its times (rewrap, setting CLEAN): it reads the times, writes, and
/// puts them back, and must not put back a time from before someone else's write. Creating a header and truncating to
/// empty are exclusive too, so that they and a rewrap never meet in the slots.
///
/// Lock order: a file's `inner` first, then this one, then a segment's; never two stripes at once.
pub struct InodeLocks {
    stripes: Box<[RwLock<()>]>,
}

const STRIPES: usize = 1024;

impl InodeLocks {
    fn new() -> Self {
        Self { stripes: (0..STRIPES).map(|_| RwLock::new(())).collect() }
    }

    fn stripe(&self, dev: u64, ino: u64) -> &RwLock<()> {
        // Inode numbers of neighbouring files are neighbours: a multiplicative hash spreads them.
        let h = (ino ^ dev.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        &self.stripes[(h >> 54) as usize % STRIPES]
    }

    /// For a change whose time users shall see.
    pub fn shared(&self, dev: u64, ino: u64) -> RwLockReadGuard<'_, ()> {
        self.stripe(dev, ino).read()
    }

    /// For a change that keeps the times, or that makes or unmakes a header.
    pub fn exclusive(&self, dev: u64, ino: u64) -> RwLockWriteGuard<'_, ()> {
        self.stripe(dev, ino).write()
    }
}
