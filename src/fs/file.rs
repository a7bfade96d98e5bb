//! Open files.
//!
//! A key that a request on an open file needs is used on behalf of who opened the file: what the kernel writes back and
//! reads ahead has no caller of its own.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::caller::Caller;
use super::inode::Inode;
use super::{EnvelopeFs, Found, Report, StoreError, failed, os};
use crate::backing::{Access, Backing, SetTime};
use crate::kms::event;
use crate::store::file::{FileAllocate, OpenFile};
use crate::store::load::Kind;
use crate::store::{Result, SetAttr};

/// Most that one copy request moves: a request that takes long holds up a thread that others wait for.
const COPY_MAX: u64 = 16 << 20;

/// An open file.
pub(super) struct Handle<B: Backing> {
    pub inode: Arc<Inode<B>>,
    pub file: OpenFile<B>,
    access: Access,
    /// Who opened it.
    opener: event::Caller,
}

impl<B: Backing> Handle<B> {
    fn new(inode: Arc<Inode<B>>, file: OpenFile<B>, access: Access, caller: &Caller) -> Self {
        if access == Access::ReadWrite {
            inode.writers.fetch_add(1, Ordering::AcqRel);
        }
        Self { inode, file, access, opener: caller.of_keys() }
    }

    pub(super) fn is_writable(&self) -> bool {
        self.access == Access::ReadWrite
    }

    /// Does something that may need a key.
    pub(super) fn with_key<R>(&self, f: impl FnOnce(&OpenFile<B>) -> R) -> R {
        event::on_behalf_of(self.opener, || f(&self.file))
    }
}

/// What open(2)'s flags mean here: writers read too, because a write of part of a block reads the rest, and so does the
/// kernel's page cache.
fn access_of(flags: i32) -> Access {
    let reads_only = flags & libc::O_ACCMODE == libc::O_RDONLY && flags & libc::O_TRUNC == 0;
    if reads_only { Access::Read } else { Access::ReadWrite }
}

impl<B: Backing> EnvelopeFs<B> {
    /// Makes a file and opens it.
    ///
    /// # Errors
    /// Those of the store.
    pub fn create(&self, caller: &Caller, parent: u64, name: &[u8], mode: u32, umask: u32) -> Result<(Found, u64)> {
        let dir = self.inode(parent)?;
        let make = || self.store.create(&dir.node, name, mode & 0o7777, umask, self.owner(caller));
        let (node, attr, file) = self.measure(Kind::Create, || event::on_behalf_of(caller.of_keys(), make))?;
        let found = self.enter(node, attr);
        let inode = self.inode(found.node)?;
        let handle = self.handles.insert(Handle::new(inode, file, Access::ReadWrite, caller));
        Ok((found, handle))
    }

    /// Opens a file; with `O_TRUNC`, empties it too.
    ///
    /// # Errors
    /// Those of the store; no key shows here.
    pub fn open(&self, caller: &Caller, node: u64, flags: i32) -> Result<u64> {
        let inode = self.inode(node)?;
        let access = access_of(flags);
        let open = || event::on_behalf_of(caller.of_keys(), || self.store.open_file(&inode.node, access));
        let file = self.measure(Kind::Open, open)?;
        if flags & libc::O_TRUNC != 0 {
            file.may_begin_anew()?;
        }
        let handle = self.handles.insert(Handle::new(inode, file, access, caller));
        if flags & libc::O_TRUNC != 0 {
            let empty = SetAttr { size: Some(0), ..SetAttr::default() };
            if let Err(e) = self.set_attr(caller, node, empty, Some(handle)) {
                self.release(handle);
                return Err(e);
            }
        }
        Ok(handle)
    }

    /// Closes an open file.
    pub fn release(&self, handle: u64) {
        let Some(handle) = self.handles.remove(handle) else { return };
        let was_last_writer = handle.is_writable() && handle.inode.writers.fetch_sub(1, Ordering::AcqRel) == 1;
        if was_last_writer && self.settings.kernel_keeps_mtime {
            self.catch_up_mtime(&handle);
        }
    }

    /// Gives the backing file the mtime that the kernel shows.
    fn catch_up_mtime(&self, handle: &Handle<B>) {
        let Some(mtime) = handle.inode.kernels_mtime.left_behind() else { return };
        let set = SetAttr { mtime: SetTime::At(mtime), ..SetAttr::default() };
        if let Err(e) = self.store.setattr(&handle.inode.node, &set, Some(&handle.file)) {
            failed(Report { operation: "release", node: handle.inode.id, file: None }, &e);
        }
    }

    /// Reads into `buf`; less than its length only at the end of the file.
    ///
    /// # Errors
    /// [`StoreError::KeysLocked`]; `Damage` for a block that does not authenticate; those of the backing directory.
    pub fn read(&self, handle: u64, offset: u64, buf: &mut [u8]) -> Result<usize> {
        // Sooner than the store itself would: what is being written back now must not come back into the cache.
        self.store.may_read()?;
        let handle = self.handle(handle)?;
        self.measure(Kind::Read, || handle.with_key(|f| f.read(offset, buf)))
    }

    /// Writes all of `data`. `kill`: who writes, if he has no right to leave setuid and setgid bits.
    ///
    /// # Errors
    /// Those of the store.
    pub fn write(&self, handle: u64, offset: u64, data: &[u8], kill: Option<&Caller>) -> Result<usize> {
        let handle = self.writable(handle)?;
        self.before_change(&handle.inode, kill)?;
        handle.inode.kernels_mtime.content_written();
        self.measure(Kind::Write, || handle.with_key(|f| f.write(offset, data)))
    }

    /// Makes the file durable, and the names that lead to it.
    ///
    /// # Errors
    /// Those of the backing directory.
    pub fn sync_file(&self, handle: u64) -> Result<()> {
        let handle = self.handle(handle)?;
        self.measure(Kind::Sync, || self.store.sync_file(&handle.inode.node, &handle.file))
    }

    /// fallocate(2).
    ///
    /// # Errors
    /// Those of the store.
    pub fn allocate(&self, caller: &Caller, handle: u64, mode: FileAllocate, offset: u64, len: u64) -> Result<()> {
        let handle = self.writable(handle)?;
        self.before_change(&handle.inode, caller.if_he_drops_set_bits())?;
        handle.with_key(|f| f.allocate(mode, offset, len))
    }

    /// `SEEK_DATA`, or else `SEEK_HOLE`.
    ///
    /// # Errors
    /// `NoSuchOffset`; those of the store.
    pub fn seek(&self, handle: u64, offset: u64, data: bool) -> Result<u64> {
        self.handle(handle)?.file.seek(offset, data)
    }

    /// Whether somebody has the file of this handle open for writing, so that its newest content may still be on its way.
    pub fn is_being_written(&self, handle: u64) -> bool {
        self.handles.get(handle).is_some_and(|h| h.inode.writers.load(Ordering::Acquire) > 0)
    }

    /// copy_file_range(2) through `buf`: copies some of the range and says how much.
    ///
    /// # Errors
    /// Those of the store, if nothing was copied before.
    pub fn copy_range(
        &self,
        caller: &Caller,
        from: (u64, u64),
        to: (u64, u64),
        len: u64,
        buf: &mut [u8],
    ) -> Result<u64> {
        let (source, target) = (self.handle(from.0)?, self.writable(to.0)?);
        self.before_change(&target.inode, caller.if_he_drops_set_bits())?;
        let len = len.min(COPY_MAX);
        let mut done = 0;
        while done < len {
            let piece = usize::try_from(len - done).map_or(buf.len(), |left| left.min(buf.len()));
            let piece = buf.get_mut(..piece).unwrap_or_default();
            match copy_piece(&source, from.1 + done, &target, to.1 + done, piece) {
                Ok(0) => break,
                Ok(n) => done += n as u64,
                Err(_) if done > 0 => break,
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    /// The id of an open file, for the log; `None` if it has no header yet.
    pub fn file_id(&self, handle: u64) -> Option<String> {
        Some(self.handles.get(handle)?.file.core().file_id()?.to_string())
    }

    /// Whether opening a file, or giving one its first byte, may wait for keys.
    pub fn open_may_wait(&self) -> bool {
        self.store.open_may_wait()
    }

    /// Whether reading may wait for keys, if only for another request that does.
    pub fn read_may_wait(&self, handle: u64) -> bool {
        self.open_may_wait() && self.handles.get(handle).is_some_and(|h| h.file.core().read_may_wait())
    }

    /// Whether writing may wait for keys, if only for another request that does.
    pub fn write_may_wait(&self, handle: u64) -> bool {
        self.open_may_wait() && self.handles.get(handle).is_some_and(|h| h.file.core().write_may_wait())
    }

    /// Runs a user's call, and lets background work know how long it took.
    fn measure<R>(&self, kind: Kind, f: impl FnOnce() -> R) -> R {
        self.store.shared().load.measure(kind, f)
    }

    fn writable(&self, handle: u64) -> Result<Arc<Handle<B>>> {
        let handle = self.handle(handle)?;
        if handle.is_writable() { Ok(handle) } else { Err(os(libc::EBADF)) }
    }
}

fn copy_piece<B: Backing>(
    from: &Handle<B>,
    at: u64,
    to: &Handle<B>,
    target: u64,
    buf: &mut [u8],
) -> std::result::Result<usize, StoreError> {
    let read = from.with_key(|f| f.read(at, buf))?;
    to.with_key(|f| f.write(target, buf.get(..read).unwrap_or_default()))
}
