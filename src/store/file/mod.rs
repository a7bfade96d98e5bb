//! Files: one [`FileCore`] for each regular inode that anybody has open, one [`OpenFile`] for each handle.
//!
//! # Locks, in the order they are taken
//! 1. [`FileCore`]'s `inner`: shared for reads and for writes inside the present size; exclusive for whatever changes
//!    the size, the header, or what is open.
//! 2. The inode's stripe in [`super::shared::InodeLocks`]. Reads take none.
//! 3. One segment's lock: shared for reads, exclusive for writes. Never two segments' at once.
//!
//! # What a killed daemon leaves
//! States are written before the data they speak for, each over its older copy. So each block of a file that was being
//! written matches its entry in the newer or in the older state copy, and opening the file again finds out which.

mod io;
mod load;
mod lock;
mod rekey;
mod resize;
mod segment;
mod settle;
#[cfg(test)]
mod tests;

pub(in crate::store) use lock::Leaving;
pub(in crate::store) use rekey::{Finished, Fresh};
pub use resize::FileAllocate;
pub use settle::SettleQueue;

use super::error::{Result, StoreError};
use super::flood;
use super::keys::Ready;
use super::shared::Shared;
use crate::backing::{Access, Backing, Stat};
use crate::crypto::aead::BlockCipher;
use crate::crypto::kdf::{self, label};
use crate::crypto::secret::Dek;
use crate::format::damage::Damage;
use crate::format::header::Slot;
use crate::format::ids::FileId;
use parking_lot::{RwLock, RwLockReadGuard};
use rekey::Changes;
use segment::Segments;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The keys of one file, derived from its DEK.
pub(super) struct FileKeys {
    /// Pins the DEK in the cache's accounting while the file is open.
    _dek: Arc<Dek>,
    pub(super) file: FileId,
    commitment: [u8; 32],
    content: BlockCipher,
    state: BlockCipher,
    /// The header has no flag that forbids this program to write.
    writable: bool,
}

impl FileKeys {
    fn new(dek: Arc<Dek>, slot: &Slot) -> Self {
        let derive = |l| BlockCipher::new(&kdf::derive(dek.secret(), l, &slot.file.0));
        Self {
            content: derive(label::CONTENT),
            state: derive(label::STATE),
            file: slot.file,
            commitment: slot.commitment,
            writable: slot.writable(),
            _dek: dek,
        }
    }
}

/// What is open of a file. Guarded by `FileCore::inner`.
struct Inner<B: Backing> {
    /// The backing inode; another one after a rekey.
    node: Arc<B::Node>,
    /// The backing file, open while any handle is or while the file waits to be settled.
    file: Option<Arc<B::File>>,
    access: Access,
    dev: u64,
    ino: u64,
    opens: usize,
    writers: usize,
    /// Plaintext size in bytes.
    size: u64,
    /// `None`: the file is empty and has no header.
    keys: Option<Arc<FileKeys>>,
    /// The newest state of segment 0 on disk says CLEAN.
    clean: bool,
    /// Whole segments may be absent.
    sparse: bool,
    /// The newest state of segment 0 on disk says TRUNCATING: it must not before the file grows, or the next open would
    /// cut off what was added.
    truncating: bool,
    /// A cleared CLEAN is known to be durable, so the size may change without the old promise outliving the change.
    unclean_durable: bool,
    /// The file holds content that an fsync or an earlier session may have promised to somebody.
    promised: bool,
    /// The size changed since the last barrier.
    resized: bool,
    /// Counts changes of size, header and CLEAN: a barrier covers only what it saw begin.
    changes: u64,
    /// A shrink that a read-only mount found unfinished: the last block still has this many bytes on disk.
    tail_on_disk: Option<(u64, usize)>,
    /// A shrink stands in the state (TRUNCATING) whose cut has failed so far; `size` is the shrunken length already. The
    /// next change, or else the next open, finishes it.
    cut_pending: bool,
    /// Waits in the settle queue.
    settling: bool,
    /// Of an empty file that was opened for writing while the key service did not answer: the key it will have.
    ready: Option<Ready>,
    /// The open that is under way took a call for the key.
    called: bool,
    /// A lock took the keys away: they must come back from this header. Always `stale` too.
    dropped: Option<lock::Dropped>,
    /// A change failed half-way and what is here may not be what the disk has: to be read again before any use.
    stale: bool,
}

/// One regular inode's content.
pub struct FileCore<B: Backing> {
    shared: Arc<Shared<B>>,
    inner: RwLock<Inner<B>>,
    segments: Segments,
    /// What changes while somebody copies the file.
    changes: Changes,
    /// Blocks may match the older state copy: the file was not closed cleanly, or a write failed half-way.
    recovering: AtomicBool,
    /// Barriers that failed. The kernel tells each only once, and then takes what was lost for written.
    failed_barriers: AtomicU64,
    /// Those of them that an fsync has told somebody of.
    told_barriers: AtomicU64,
}

impl<B: Backing> FileCore<B> {
    /// The core of an inode that is not open. No I/O. There must be at most one for an inode: the node table sees to it.
    pub fn new(shared: &Arc<Shared<B>>, node: Arc<B::Node>) -> Arc<Self> {
        Arc::new(Self {
            shared: Arc::clone(shared),
            inner: RwLock::new(Inner {
                node,
                file: None,
                access: Access::Read,
                dev: 0,
                ino: 0,
                opens: 0,
                writers: 0,
                size: 0,
                keys: None,
                clean: false,
                sparse: false,
                truncating: false,
                unclean_durable: false,
                promised: false,
                resized: false,
                changes: 0,
                tail_on_disk: None,
                cut_pending: false,
                settling: false,
                ready: None,
                called: false,
                dropped: None,
                stale: false,
            }),
            segments: Segments::new(),
            changes: Changes::default(),
            recovering: AtomicBool::new(false),
            failed_barriers: AtomicU64::new(0),
            told_barriers: AtomicU64::new(0),
        })
    }

    /// The core of a file made just now, empty, and the handle that came with it; `ready`: the key put by for it.
    ///
    /// # Errors
    /// If the new file cannot be examined.
    pub fn with_new_file(
        shared: &Arc<Shared<B>>,
        node: Arc<B::Node>,
        file: B::File,
        ready: Option<Ready>,
    ) -> Result<(Arc<Self>, OpenFile<B>)> {
        let core = Self::new(shared, node);
        let st = shared.backing.stat_file(&file)?;
        {
            let mut inner = core.inner.write();
            inner.file = Some(Arc::new(file));
            inner.access = Access::ReadWrite;
            (inner.dev, inner.ino) = (st.dev, st.ino);
            (inner.opens, inner.writers) = (1, 1);
            inner.ready = ready;
        }
        let told_barriers = AtomicU64::new(0);
        let open = OpenFile { core: Arc::clone(&core), writer: true, called: false, told_barriers };
        Ok((core, open))
    }

    /// Opens a handle. Reads the header and segment 0's state and unwraps the DEK unless another handle has done so.
    ///
    /// # Errors
    /// As [`super::keys::Keys::may_open`]: however little this file may need a key; [`Damage`] if the header or the length
    /// is not what was sealed, the key service's errors, the backing directory's, [`StoreError::ReadOnly`].
    pub fn open(self: &Arc<Self>, access: Access) -> Result<OpenFile<B>> {
        let writer = access == Access::ReadWrite;
        if writer && self.shared.read_only {
            return Err(StoreError::ReadOnly);
        }
        let mut inner = self.inner.write();
        self.shared.keys.may_open()?;
        if inner.file.is_none() {
            self.load(&mut inner, access)?;
        } else if writer && inner.access == Access::Read {
            let file = self.shared.backing.open(&inner.node, access)?;
            inner.file = Some(Arc::new(file));
            inner.access = access;
            // What a crash left was settled in memory only while nobody could write.
            inner.stale |= self.is_recovering();
        }
        if let Err(e) = self.refresh(&mut inner) {
            self.close_if_unused(&mut inner);
            return Err(e);
        }
        // The first write to an empty file makes its key.
        if writer
            && inner.keys.is_none()
            && let Err(e) = self.shared.may_create(&mut inner.ready)
        {
            self.close_if_unused(&mut inner);
            return Err(e);
        }
        if writer && inner.keys.as_ref().is_some_and(|k| !k.writable) {
            self.close_if_unused(&mut inner);
            return Err(StoreError::ReadOnly);
        }
        inner.opens += 1;
        inner.writers += usize::from(writer);
        // Of a failure that nobody was told of, the next fsync tells, as with the kernel's own files.
        let told_barriers = AtomicU64::new(self.told_barriers.load(Ordering::Acquire));
        let called = std::mem::take(&mut inner.called);
        Ok(OpenFile { core: Arc::clone(self), writer, called, told_barriers })
    }

    /// Lets go of everything if no handle is open and nothing waits to be settled.
    fn close_if_unused(&self, inner: &mut Inner<B>) {
        if inner.opens == 0 && !inner.settling {
            inner.file = None;
            inner.keys = None;
            inner.dropped = None;
            inner.tail_on_disk = None;
            if let Some(unused) = inner.ready.take() {
                self.shared.keys.put_back_ready(unused);
            }
            self.segments.clear();
        }
    }

    /// truncate(2) without a handle.
    ///
    /// # Errors
    /// As [`FileCore::open`] and [`OpenFile::set_len`].
    pub fn set_len(self: &Arc<Self>, len: u64) -> Result<()> {
        self.shared.keys.may_change()?;
        // An empty result needs neither header nor key: a file whose KEK is gone can still be emptied.
        if len == 0 && self.empty_closed()? {
            return Ok(());
        }
        self.open(Access::ReadWrite)?.set_len(len)
    }

    /// What was written so far is durable. A failure counts against every handle that is open.
    fn barrier(&self, inner: &Inner<B>) -> Result<()> {
        self.shared.backing.sync_file(inner.backing_file()?).map_err(|e| {
            self.failed_barriers.fetch_add(1, Ordering::AcqRel);
            e.into()
        })
    }

    /// Whether a barrier failed, so that what is on disk is not known.
    fn lost_a_barrier(&self) -> bool {
        self.failed_barriers.load(Ordering::Acquire) > 0
    }

    /// Whether a barrier failed and nobody knows.
    fn owes_an_error(&self) -> bool {
        self.failed_barriers.load(Ordering::Acquire) > self.told_barriers.load(Ordering::Acquire)
    }

    /// Whether blocks may match the older state copy.
    fn is_recovering(&self) -> bool {
        self.recovering.load(Ordering::Relaxed)
    }

    fn set_recovering(&self, yes: bool) {
        self.recovering.store(yes, Ordering::Relaxed);
    }

    /// The file's id, if it is open and not empty. For log lines.
    pub fn file_id(&self) -> Option<FileId> {
        self.inner.read().keys.as_ref().map(|k| k.file)
    }
}

impl<B: Backing> Inner<B> {
    fn backing_file(&self) -> Result<&Arc<B::File>> {
        // Handles keep the file open; only a handle leads here.
        self.file.as_ref().ok_or(StoreError::Invalid)
    }
}

/// One open handle. Dropping it closes it.
pub struct OpenFile<B: Backing> {
    core: Arc<FileCore<B>>,
    writer: bool,
    called: bool,
    /// Failed barriers that an fsync through this handle has told of, or that were told before it was opened.
    told_barriers: AtomicU64,
}

impl<B: Backing> OpenFile<B> {
    /// The inode's core.
    pub fn core(&self) -> &Arc<FileCore<B>> {
        &self.core
    }

    /// Whether opening it took a call to a key service.
    pub fn took_a_call(&self) -> bool {
        self.called
    }

    /// Whether this handle may write.
    pub fn is_writer(&self) -> bool {
        self.writer
    }

    /// For whoever is about to empty the file and write it anew: what is emptied must not be lost for want of a key.
    ///
    /// # Errors
    /// As [`super::keys::Keys::may_create`].
    pub fn may_begin_anew(&self) -> Result<()> {
        self.core.shared.may_create(&mut self.core.inner.write().ready)
    }

    /// Plaintext size in bytes.
    pub fn len(&self) -> u64 {
        match self.read_lock() {
            Ok(inner) => inner.size,
            // As it was before the change that failed.
            Err(_) => self.core.inner.read().size,
        }
    }

    /// Whether the file is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// stat(2) of the backing file, with its ciphertext size.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn stat(&self) -> Result<Stat> {
        let inner = self.read_lock()?;
        Ok(self.core.shared.backing.stat_file(inner.backing_file()?)?)
    }

    fn writable(&self) -> Result<()> {
        if self.writer { Ok(()) } else { Err(StoreError::NotPermitted) }
    }

    /// The result of this handle's fsync, whose own barrier gave `r`: an error also if an earlier one failed that this
    /// handle was not told of.
    fn tell(&self, r: Result<()>) -> Result<()> {
        let failed = self.core.failed_barriers.load(Ordering::Acquire);
        let news = self.told_barriers.swap(failed, Ordering::AcqRel) != failed;
        if !news && r.is_ok() {
            return Ok(());
        }
        self.core.told_barriers.fetch_max(failed, Ordering::AcqRel);
        self.core.shared.settle.told(&self.core);
        r.and(Err(StoreError::Backing(std::io::Error::from_raw_os_error(libc::EIO))))
    }

    /// The file's lock, shared, with what is known of the file up to date.
    fn read_lock(&self) -> Result<RwLockReadGuard<'_, Inner<B>>> {
        loop {
            let inner = self.core.inner.read();
            if !inner.stale {
                return Ok(inner);
            }
            drop(inner);
            self.core.refresh(&mut self.core.inner.write())?;
        }
    }

    /// Runs a change with the file's lock held exclusively.
    fn change(&self, f: impl FnOnce(&FileCore<B>, &mut Inner<B>) -> Result<()>) -> Result<()> {
        let mut inner = self.core.inner.write();
        self.core.shared.keys.may_change()?;
        self.core.refresh(&mut inner)?;
        let r = f(&self.core, &mut inner);
        self.core.after_change(&mut inner, r)
    }
}

impl<B: Backing> Drop for OpenFile<B> {
    fn drop(&mut self) {
        self.core.released(self.writer);
    }
}

/// Damage to a file's content is logged here, where its id is known, and nowhere else: file id, block, code.
fn log_damage(keys: &FileKeys, d: &Damage) {
    let block = match d {
        Damage::BlockAuth { block } => Some(*block),
        _ => None,
    };
    if let Some(skipped) = flood::admit() {
        tracing::error!(file = %keys.file, block, code = d.code(), skipped, "{d}");
    }
}
