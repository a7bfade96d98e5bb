//! fuser's [`Filesystem`] in terms of [`EnvelopeFs`].
//!
//! Not implemented, so that the kernel does it itself or never asks again: `flush` (writes have reached us by then, and
//! nothing waits to be flushed), `opendir` and `releasedir` (directories are read without handles), `access` (the
//! kernel checks permissions), locks (local), `bmap`, `ioctl`, `poll`.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::aside::Aside;
use super::convert::{absent, allocate_mode, file_attr, file_type, kind_of, rdev, rename_mode, set_time};
use super::options::MountOptions;
use super::process;
use super::seeks::{LateNotifier, Seeks};
use crate::backing::{Backing, XattrMode};
use crate::fs::{Answer, Caller, EnvelopeFs, Found, NewNode, PlusItem, Report, failed, panicked};
use crate::store::{SetAttr, StoreError};

/// Largest read and write request.
const REQUEST_MAX: u32 = 1 << 20;

thread_local! {
    /// Content on its way to the kernel. One for each thread, so that no request allocates.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The file system as fuser calls it.
pub(super) struct Adapter<B: Backing> {
    fs: Arc<EnvelopeFs<B>>,
    ttl: Duration,
    /// With the writeback cache: who waits for dirty pages.
    seeks: Option<Seeks>,
    /// What may wait for a key service.
    aside: Aside,
    max_background: u16,
}

impl<B: Backing> Adapter<B> {
    /// # Errors
    /// If a thread cannot be started.
    pub(super) fn new(fs: Arc<EnvelopeFs<B>>, o: &MountOptions, notifier: LateNotifier) -> io::Result<Self> {
        let late = notifier.clone();
        fs.on_mode_changed(move |node| forget_attributes(&late, INodeNo(node)));
        let seeks = if o.writeback { Some(Seeks::start(notifier)?) } else { None };
        let ttl = Duration::from_secs(o.cache_seconds.into());
        Ok(Self { fs, ttl, seeks, aside: Aside::default(), max_background: o.max_background })
    }

    /// Runs an operation. Whatever happens in it, the daemon lives on.
    fn run<R>(
        &self,
        operation: &'static str,
        node: INodeNo,
        f: impl FnOnce() -> Result<R, StoreError>,
    ) -> Result<R, Errno> {
        run_on(&self.fs, operation, node, None, f)
    }

    /// Runs a request to its reply: here, or aside if it may wait for keys.
    fn serve(&self, may_wait: bool, request: impl FnOnce() + Send + 'static) {
        if may_wait { self.aside.run(request) } else { request() }
    }

    /// How long the kernel may trust what it is told. Not at all while the keys are locked: what it must ask for before
    /// each write is where it is told so.
    fn ttl(&self) -> Duration {
        ttl(&self.fs, self.ttl)
    }

    fn reply_entry(&self, reply: ReplyEntry, found: Result<Found, Errno>) {
        match found {
            Ok(f) => reply.entry(&self.ttl(), &file_attr(f.node, &f.attr), Generation(f.generation)),
            Err(e) => reply.error(e),
        }
    }
}

fn run_on<B: Backing, R>(
    fs: &EnvelopeFs<B>,
    operation: &'static str,
    node: INodeNo,
    handle: Option<FileHandle>,
    f: impl FnOnce() -> Result<R, StoreError>,
) -> Result<R, Errno> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(r)) => Ok(r),
        Ok(Err(e)) => {
            let file = handle.and_then(|h| fs.file_id(h.0));
            Err(Errno::from_i32(failed(Report { operation, node: node.0, file: file.as_deref() }, &e)))
        }
        Err(_) => Err(Errno::from_i32(panicked(operation, node.0))),
    }
}

fn ttl<B: Backing>(fs: &EnvelopeFs<B>, usual: Duration) -> Duration {
    if fs.is_locked() { Duration::ZERO } else { usual }
}

/// Has the kernel ask for the attributes of `node` anew; its pages stay. The kernel takes this at any time, also while
/// it waits for the answer to a write.
fn forget_attributes(notifier: &LateNotifier, node: INodeNo) {
    if let Some(Err(e)) = notifier.get().map(|n| n.inval_inode(node, -1, 0)) {
        tracing::warn!("the kernel was not told of a changed mode: {e}");
    }
}

/// `SEEK_DATA` and `SEEK_HOLE`.
fn seek<B: Backing>(fs: &EnvelopeFs<B>, handle: FileHandle, offset: i64, whence: i32) -> Result<i64, StoreError> {
    let from = u64::try_from(offset).map_err(|_| StoreError::NoSuchOffset)?;
    let data = match whence {
        libc::SEEK_DATA => true,
        libc::SEEK_HOLE => false,
        _ => return Err(StoreError::Invalid),
    };
    i64::try_from(fs.seek(handle.0, from, data)?).map_err(|_| StoreError::TooLarge)
}

/// Capabilities that are wanted wherever the kernel has them.
const WANTED: [InitFlags; 10] = [
    InitFlags::FUSE_ASYNC_READ,
    InitFlags::FUSE_BIG_WRITES,
    InitFlags::FUSE_MAX_PAGES,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_ATOMIC_O_TRUNC,
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    InitFlags::FUSE_CACHE_SYMLINKS,
    // So that a connection that was aborted is told from one that was unmounted.
    InitFlags::FUSE_ABORT_ERROR,
];

fn caller(r: &Request) -> Caller {
    Caller { uid: r.uid(), gid: r.gid(), pid: r.pid(), has_group: process::has_group }
}

fn empty(reply: ReplyEmpty, r: Result<(), Errno>) {
    match r {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e),
    }
}

fn xattr(reply: ReplyXattr, r: Result<Answer, Errno>) {
    match r {
        Ok(Answer::Size(n)) => reply.size(n),
        Ok(Answer::Data(d)) => reply.data(&d),
        Err(e) => reply.error(e),
    }
}

/// Lends this thread's buffer, `len` bytes of it.
fn with_buffer<R>(len: usize, f: impl FnOnce(&mut [u8]) -> R) -> R {
    BUFFER.with_borrow_mut(|b| {
        if b.len() < len {
            b.resize(len.max(REQUEST_MAX as usize), 0);
        }
        f(b.get_mut(..len).unwrap_or_default())
    })
}

impl<B: Backing> Filesystem for Adapter<B> {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for wanted in WANTED {
            // Refused means that this kernel does not have it: then we do without.
            let _ = config.add_capabilities(wanted);
        }
        if self.fs.has_acls() && config.add_capabilities(InitFlags::FUSE_POSIX_ACL).is_ok() {
            // Only the backing directory knows whether a default ACL takes the umask's place.
            let _ = config.add_capabilities(InitFlags::FUSE_DONT_MASK);
        }
        if self.seeks.is_some() {
            let _ = config.add_capabilities(InitFlags::FUSE_WRITEBACK_CACHE);
        }
        // What is out of range is set to the nearest that is not.
        if let Err(nearest) = config.set_max_write(REQUEST_MAX) {
            let _ = config.set_max_write(nearest);
        }
        if let Err(nearest) = config.set_max_readahead(REQUEST_MAX) {
            let _ = config.set_max_readahead(nearest);
        }
        let _ = config.set_max_background(self.max_background);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.run("lookup", parent, || self.fs.lookup(parent.0, name.as_bytes())) {
            Err(e) if e.code() == libc::ENOENT => reply.entry(&self.ttl(), &absent(), Generation(0)),
            found => self.reply_entry(reply, found),
        }
    }

    fn forget(&self, _: &Request, node: INodeNo, lookups: u64) {
        let _ = self.run("forget", node, || {
            self.fs.forget(node.0, lookups);
            Ok(())
        });
    }

    fn getattr(&self, _: &Request, node: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        // With a handle it is not for a user that the kernel asks (stat(2) and fstat(2) come without one), but because it
        // is about to read, write or seek in its own cache.
        let asked = || if handle.is_some() { self.fs.get_attr_for_io(node.0) } else { self.fs.get_attr(node.0) };
        match self.run("getattr", node, asked) {
            Ok(a) => reply.attr(&self.ttl(), &file_attr(node.0, &a)),
            Err(e) => reply.error(e),
        }
    }

    fn setattr(
        &self,
        r: &Request,
        node: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttr {
            mode: mode.map(|m| m & 0o7777),
            uid,
            gid,
            size,
            atime: set_time(atime),
            mtime: set_time(mtime),
            ..SetAttr::default()
        };
        let (fs, caller, usual) = (Arc::clone(&self.fs), caller(r), self.ttl);
        self.serve(size.is_some() && fs.open_may_wait(), move || {
            match run_on(&fs, "setattr", node, handle, || fs.set_attr(&caller, node.0, set, handle.map(|h| h.0))) {
                Ok(a) => reply.attr(&ttl(&fs, usual), &file_attr(node.0, &a)),
                Err(e) => reply.error(e),
            }
        });
    }

    fn readlink(&self, _: &Request, node: INodeNo, reply: ReplyData) {
        match self.run("readlink", node, || self.fs.read_link(node.0)) {
            Ok(target) => reply.data(&target),
            Err(e) => reply.error(e),
        }
    }

    fn mknod(&self, r: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, dev: u32, reply: ReplyEntry) {
        let found = self.run("mknod", parent, || {
            let kind = kind_of(mode).ok_or(StoreError::Invalid)?;
            let new = NewNode { kind, mode: mode & 0o7777, umask, rdev: rdev(dev) };
            self.fs.mknod(&caller(r), parent.0, name.as_bytes(), &new)
        });
        self.reply_entry(reply, found);
    }

    fn mkdir(&self, r: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let make = || self.fs.mkdir(&caller(r), parent.0, name.as_bytes(), mode & 0o7777, umask);
        self.reply_entry(reply, self.run("mkdir", parent, make));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.run("unlink", parent, || self.fs.unlink(parent.0, name.as_bytes())));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.run("rmdir", parent, || self.fs.rmdir(parent.0, name.as_bytes())));
    }

    fn symlink(&self, r: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let target = target.as_os_str().as_bytes();
        let make = || self.fs.symlink(&caller(r), parent.0, name.as_bytes(), target);
        self.reply_entry(reply, self.run("symlink", parent, make));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        to: INodeNo,
        to_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let done = self.run("rename", parent, || {
            let mode = rename_mode(flags).ok_or(StoreError::Invalid)?;
            self.fs.rename((parent.0, name.as_bytes()), (to.0, to_name.as_bytes()), mode)
        });
        empty(reply, done);
    }

    fn link(&self, _: &Request, node: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.reply_entry(reply, self.run("link", node, || self.fs.link(node.0, parent.0, name.as_bytes())));
    }

    fn open(&self, r: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (fs, caller) = (Arc::clone(&self.fs), caller(r));
        self.serve(fs.open_may_wait(), move || {
            match run_on(&fs, "open", node, None, || fs.open(&caller, node.0, flags.0)) {
                // Nobody changes the file but through this kernel, so what it has cached stays right.
                Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::FOPEN_KEEP_CACHE),
                Err(e) => reply.error(e),
            }
        });
    }

    fn create(
        &self,
        r: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        match self.run("create", parent, || self.fs.create(&caller(r), parent.0, name.as_bytes(), mode, umask)) {
            Ok((f, handle)) => {
                let attr = file_attr(f.node, &f.attr);
                let generation = Generation(f.generation);
                reply.created(&self.ttl(), &attr, generation, FileHandle(handle), FopenFlags::FOPEN_KEEP_CACHE);
            }
            Err(e) => reply.error(e),
        }
    }

    fn read(
        &self,
        _: &Request,
        node: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let fs = Arc::clone(&self.fs);
        self.serve(fs.read_may_wait(handle.0), move || {
            with_buffer(size as usize, |buf| {
                match run_on(&fs, "read", node, Some(handle), || fs.read(handle.0, offset, buf)) {
                    Ok(n) => reply.data(buf.get(..n).unwrap_or_default()),
                    Err(e) => reply.error(e),
                }
            });
        });
    }

    fn write(
        &self,
        r: &Request,
        node: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let writer = caller(r);
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID).then_some(&writer);
        let answer = |reply: ReplyWrite, r: Result<usize, Errno>| match r {
            // At most what was asked for, which had a 32-bit length.
            Ok(n) => reply.written(n as u32),
            Err(e) => reply.error(e),
        };
        let write = move |fs: &EnvelopeFs<B>, data: &[u8], kill: Option<&Caller>| {
            run_on(fs, "write", node, Some(handle), || fs.write(handle.0, offset, data, kill))
        };
        if self.fs.write_may_wait(handle.0) {
            let (fs, data, kill) = (Arc::clone(&self.fs), data.to_vec(), kill.copied());
            self.aside.run(move || answer(reply, write(&fs, &data, kill.as_ref())));
        } else {
            answer(reply, write(&self.fs, data, kill));
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _: &Request,
        node: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let done = self.run("release", node, || {
            self.fs.release(handle.0);
            Ok(())
        });
        empty(reply, done);
    }

    fn fsync(&self, _: &Request, node: INodeNo, handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let fs = Arc::clone(&self.fs);
        self.serve(fs.read_may_wait(handle.0), move || {
            empty(reply, run_on(&fs, "fsync", node, Some(handle), || fs.sync_file(handle.0)));
        });
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn readdir(&self, _: &Request, node: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let done = self.run("readdir", node, || {
            self.fs.read_dir(node.0, offset, |d| {
                !reply.add(INodeNo(d.ino), d.next, file_type(d.kind), OsStr::from_bytes(d.name))
            })
        });
        match done {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(e),
        }
    }

    fn readdirplus(&self, _: &Request, node: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let done = self.run("readdirplus", node, || {
            self.fs.read_dir_plus(node.0, offset, |item| {
                let full = match item {
                    PlusItem::Dots(d) => {
                        let attr = FileAttr { ino: INodeNo(d.ino), kind: FileType::Directory, ..absent() };
                        let name = OsStr::from_bytes(d.name);
                        reply.add(attr.ino, d.next, name, &Duration::ZERO, &attr, Generation(0))
                    }
                    PlusItem::Entry { name, next, found } => {
                        let attr = file_attr(found.node, &found.attr);
                        let generation = Generation(found.generation);
                        reply.add(attr.ino, next, OsStr::from_bytes(name), &self.ttl(), &attr, generation)
                    }
                };
                !full
            })
        });
        match done {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(e),
        }
    }

    fn releasedir(&self, _: &Request, _: INodeNo, _: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, node: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        empty(reply, self.run("fsyncdir", node, || self.fs.sync_dir(node.0)));
    }

    fn statfs(&self, _: &Request, node: INodeNo, reply: ReplyStatfs) {
        match self.run("statfs", node, || self.fs.stat_fs()) {
            Ok(s) => reply.statfs(s.blocks, s.bfree, s.bavail, s.files, s.ffree, s.bsize, s.namelen, s.frsize),
            Err(e) => reply.error(e),
        }
    }

    fn setxattr(
        &self,
        r: &Request,
        node: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let done = self.run("setxattr", node, || {
            let mode = match flags {
                0 => XattrMode::Any,
                libc::XATTR_CREATE => XattrMode::Create,
                libc::XATTR_REPLACE => XattrMode::Replace,
                _ => return Err(StoreError::Invalid),
            };
            self.fs.set_xattr(&caller(r), node.0, name.as_bytes(), value, mode)
        });
        empty(reply, done);
    }

    fn getxattr(&self, _: &Request, node: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        xattr(reply, self.run("getxattr", node, || self.fs.get_xattr(node.0, name.as_bytes(), size)));
    }

    fn listxattr(&self, _: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        xattr(reply, self.run("listxattr", node, || self.fs.list_xattr(node.0, size)));
    }

    fn removexattr(&self, _: &Request, node: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.run("removexattr", node, || self.fs.remove_xattr(node.0, name.as_bytes())));
    }

    fn fallocate(
        &self,
        r: &Request,
        node: INodeNo,
        handle: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let (fs, caller) = (Arc::clone(&self.fs), caller(r));
        self.serve(fs.write_may_wait(handle.0), move || {
            let done = run_on(&fs, "fallocate", node, Some(handle), || {
                let mode = allocate_mode(mode).ok_or(StoreError::NotSupported)?;
                fs.allocate(&caller, handle.0, mode, offset, len)
            });
            empty(reply, done);
        });
    }

    fn lseek(&self, _: &Request, node: INodeNo, handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let fs = self.fs.clone();
        let answer = move || run_on(&fs, "lseek", node, Some(handle), || seek(&fs, handle, offset, whence));
        match (&self.seeks, u64::try_from(offset)) {
            (Some(seeks), Ok(from)) if self.fs.is_being_written(handle.0) => seeks.ask(node, from, reply, answer),
            _ => match answer() {
                Ok(at) => reply.offset(at),
                Err(e) => reply.error(e),
            },
        }
    }

    fn copy_file_range(
        &self,
        r: &Request,
        node: INodeNo,
        from: FileHandle,
        from_offset: u64,
        _to_node: INodeNo,
        to: FileHandle,
        to_offset: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let (fs, caller) = (Arc::clone(&self.fs), caller(r));
        self.serve(fs.read_may_wait(from.0) || fs.write_may_wait(to.0), move || {
            let copied = with_buffer(REQUEST_MAX as usize, |buf| {
                run_on(&fs, "copy_file_range", node, Some(from), || {
                    fs.copy_range(&caller, (from.0, from_offset), (to.0, to_offset), len, buf)
                })
            });
            match copied {
                // Bounded well below.
                Ok(n) => reply.written(n as u32),
                Err(e) => reply.error(e),
            }
        });
    }
}
