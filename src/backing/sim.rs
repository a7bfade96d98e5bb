//! A disk in memory that stops, tears, loses and reorders.
//!
//! [`SimDisk`] behaves as ext4 does for root, except that it checks no permissions and leaves access times alone. It is
//! deterministic: the same operations on the same options and seeds give the same disk, times included (a counter).
//!
//! # Crashes
//!
//! Operations that change something, and syncs, are counted ([`SimDisk::operations`]). [`SimDisk::stop_after`] makes
//! everything after the n-th fail, as if the program had been killed there. Then
//!
//! * [`SimDisk::crash_process`] is the disk as the next process finds it: all that was written, nothing unlinked-but-open;
//! * [`SimDisk::crash_power`] is the disk as the next boot finds it: what was synced, and of the rest what the seed says.
//!   A page of 4096 bytes has its durable content or any written since; the size is as the journal has it; bytes that
//!   the size covers and that never got to the platter are zeros. [`Journal`] says what becomes of names and attributes.
//!
//! Both leave the disk they are called on as it is, so one run can be continued or crashed many times.

mod content;
mod crash;
mod fault;
mod hook;
mod journal;
mod prng;
mod state;
mod tamper;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io::{self, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard};

pub use crash::PowerCut;
pub use fault::{Op, STOPPED, is_stopped};
pub use hook::{Hook, Moment};
pub use journal::Journal;

use self::content::PAGE_LEN;
use self::journal::ROOT;
use self::state::{DEFAULT_ACL, DEVICE, Inode, MOST_BYTES, New, State};
use super::{Access, Allocate, Backing, DirEntry, Kind, RenameMode, SetTime, Stat, StatFs, Timestamp, XattrMode};

/// Longest target of a symbolic link, in bytes, as on ext4.
const MOST_TARGET: usize = 4095;
/// Longest name and value of an extended attribute, in bytes.
const MOST_XATTR_NAME: usize = 255;
const MOST_XATTR_VALUE: usize = 64 * 1024;
/// Inodes that [`SimDisk::stat_fs`] speaks of.
const FILES: u64 = 1 << 32;

/// What kind of disk it is.
#[derive(Debug, Clone, Default)]
pub struct SimOptions {
    /// Decides how much of the write under way is done when the disk stops.
    pub seed: u64,
    /// Bytes for file content, counted in pages of 4096; unlimited if `None`. A full disk takes no new inodes either.
    pub capacity: Option<u64>,
    pub journal: Journal,
    /// The write that the disk stops at is done up to some page boundary, as by a process killed in it. Otherwise it is
    /// not done at all.
    pub split_last_write: bool,
    /// Owner of new inodes.
    pub uid: u32,
    pub gid: u32,
}

/// A handle on the disk; clones are the same disk.
#[derive(Debug, Clone)]
pub struct SimDisk {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Handles of one disk are no good on another.
    id: u64,
    state: Mutex<State>,
    hooked: hook::Hooked,
}

/// An inode of a [`SimDisk`].
#[derive(Debug)]
pub struct SimNode {
    disk: u64,
    ino: u64,
    /// Its count tells how many handles there are.
    _held: Arc<()>,
}

/// An open regular file of a [`SimDisk`].
#[derive(Debug)]
pub struct SimFile {
    node: SimNode,
    access: Access,
}

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl Default for SimDisk {
    fn default() -> Self {
        Self::new(SimOptions::default())
    }
}

impl SimDisk {
    /// An empty disk, its root directory durable.
    pub fn new(options: SimOptions) -> Self {
        Self::of(State::new(options))
    }

    fn of(state: State) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { shared: Arc::new(Shared { id, state: Mutex::new(state), hooked: hook::Hooked::default() }) }
    }

    /// Counted operations so far, failed ones included.
    pub fn operations(&self) -> u64 {
        self.state().faults.operations()
    }

    /// The first `operations` counted operations since the disk was made succeed, the next one and everything after it,
    /// reads too, do nothing and fail with [`STOPPED`].
    pub fn stop_after(&self, operations: u64) {
        self.state().faults.stop_after(operations);
    }

    pub fn is_stopped(&self) -> bool {
        self.state().faults.is_stopped()
    }

    /// The disk after the process died: everything written so far. What was not durable still is not.
    pub fn crash_process(&self) -> SimDisk {
        Self::of(self.state().for_another_process())
    }

    /// The disk after a power cut: everything synced, and of the rest what `seed` and `cut` say.
    pub fn crash_power(&self, seed: u64, cut: PowerCut) -> SimDisk {
        Self::of(crash::after_power_cut(&self.state(), seed, cut))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock()
    }

    /// Starts an operation on `nodes`.
    fn begin(&self, op: Op, nodes: &[&SimNode]) -> io::Result<MutexGuard<'_, State>> {
        self.check(nodes)?;
        self.shared.hooked.call(Moment::Before(op));
        let mut state = self.state();
        state.faults.admit(op).map_err(|refused| refused.error)?;
        state.clock += 1;
        Ok(state)
    }

    fn check(&self, nodes: &[&SimNode]) -> io::Result<()> {
        if nodes.iter().all(|n| n.disk == self.shared.id) { Ok(()) } else { Err(errno(libc::EBADF)) }
    }

    fn node(&self, state: &State, ino: u64) -> io::Result<SimNode> {
        Ok(SimNode { disk: self.shared.id, ino, _held: Arc::clone(&state.inode(ino)?.handles) })
    }

    fn make(&self, op: Op, dir: &SimNode, name: &[u8], new: &New<'_>) -> io::Result<u64> {
        self.begin(op, &[dir])?.make(dir.ino, name, new)
    }
}

fn stat_of(ino: u64, inode: &Inode) -> Stat {
    let meta = &inode.meta;
    let pages = if meta.kind == Kind::Dir { 1 } else { inode.content.allocated() };
    Stat {
        dev: DEVICE,
        ino,
        kind: meta.kind,
        mode: meta.mode,
        nlink: inode.nlink,
        uid: meta.uid,
        gid: meta.gid,
        rdev: meta.rdev,
        size: meta.size,
        blocks: pages * (PAGE_LEN as u64 / 512),
        atime: meta.atime,
        mtime: meta.mtime,
        ctime: meta.ctime,
    }
}

fn set_times(state: &mut State, ino: u64, atime: SetTime, mtime: SetTime) -> io::Result<()> {
    let now = state.now();
    let to = |time: SetTime, old: Timestamp| match time {
        SetTime::Omit => Ok(old),
        SetTime::Now => Ok(now),
        SetTime::At(t) if t.nsec < 1_000_000_000 => Ok(t),
        SetTime::At(_) => Err(errno(libc::EINVAL)),
    };
    let meta = &mut state.inode_mut(ino)?.meta;
    (meta.atime, meta.mtime) = (to(atime, meta.atime)?, to(mtime, meta.mtime)?);
    meta.ctime = now;
    state.put(ino)?;
    Ok(())
}

/// What Linux allows for an attribute of that name; `no_user` is what it says where there
/// can be no `user.` attribute.
fn check_xattr(kind: Kind, name: &[u8], no_user: i32) -> io::Result<()> {
    if name.is_empty() || name.len() > MOST_XATTR_NAME {
        return Err(errno(libc::ERANGE));
    }
    let is = |prefix: &[u8]| name.len() > prefix.len() && name.starts_with(prefix);
    if is(b"user.") {
        return if matches!(kind, Kind::File | Kind::Dir) { Ok(()) } else { Err(errno(no_user)) };
    }
    let acl = is(b"system.posix_acl_") && kind != Kind::Symlink && (name != DEFAULT_ACL || kind == Kind::Dir);
    if is(b"trusted.") || is(b"security.") || acl { Ok(()) } else { Err(errno(libc::EOPNOTSUPP)) }
}

/// Changes the extended attributes of a node.
fn change_xattrs(
    state: &mut State,
    ino: u64,
    change: impl FnOnce(&mut BTreeMap<Vec<u8>, Vec<u8>>) -> io::Result<()>,
) -> io::Result<()> {
    let now = state.now();
    let meta = &mut state.inode_mut(ino)?.meta;
    change(Arc::make_mut(&mut meta.xattrs))?;
    meta.ctime = now;
    state.put(ino)?;
    Ok(())
}

/// Writes `data` as far as there is space; returns how much that was.
fn write_pages(state: &mut State, ino: u64, data: &[u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < data.len() {
        let at = offset + done as u64;
        let len = (PAGE_LEN - (at % PAGE_LEN as u64) as usize).min(data.len() - done);
        if !state.inode(ino)?.content.has_space_at(at) && state.free_pages() == 0 {
            break;
        }
        state.with_content(ino, |content| content.write_in_page(at, &data[done..done + len]))?;
        done += len;
    }
    if done > 0 {
        let now = state.now();
        let meta = &mut state.inode_mut(ino)?.meta;
        (meta.mtime, meta.ctime) = (now, now);
        let end = offset + done as u64;
        if end > meta.size {
            meta.size = end;
            state.put(ino)?;
        }
    }
    Ok(done)
}

/// How many bytes of a write the killed process had done: up to some page boundary.
fn split(seed: u64, offset: u64, len: usize) -> usize {
    let before = (offset % PAGE_LEN as u64) as usize;
    let boundaries = (before + len).div_ceil(PAGE_LEN);
    let pages = prng::Prng::new(seed).below(boundaries + 1);
    (pages * PAGE_LEN).saturating_sub(before).min(len)
}

impl SimFile {
    fn check_write(&self, otherwise: i32) -> io::Result<()> {
        if self.access == Access::ReadWrite { Ok(()) } else { Err(errno(otherwise)) }
    }
}

impl Backing for SimDisk {
    type Node = SimNode;
    type File = SimFile;

    fn root(&self) -> io::Result<SimNode> {
        self.node(&self.state(), ROOT)
    }

    fn lookup(&self, dir: &SimNode, name: &[u8]) -> io::Result<SimNode> {
        let state = self.begin(Op::Lookup, &[dir])?;
        self.node(&state, state.child(dir.ino, name)?)
    }

    fn stat(&self, node: &SimNode) -> io::Result<Stat> {
        let state = self.begin(Op::Stat, &[node])?;
        Ok(stat_of(node.ino, state.inode(node.ino)?))
    }

    fn stat_at(&self, dir: &SimNode, name: &[u8]) -> io::Result<Stat> {
        let state = self.begin(Op::Stat, &[dir])?;
        let ino = state.child(dir.ino, name)?;
        Ok(stat_of(ino, state.inode(ino)?))
    }

    fn read_dir_up_to(&self, dir: &SimNode, most: usize) -> io::Result<Option<Vec<DirEntry>>> {
        let state = self.begin(Op::ReadDir, &[dir])?;
        let entries = &state.dir(dir.ino)?.entries;
        if entries.len() > most {
            return Ok(None);
        }
        let kind = |ino| Some(state.inodes.get(ino)?.meta.kind);
        let all = entries.iter().map(|(name, ino)| DirEntry { name: name.clone(), ino: *ino, kind: kind(ino) });
        Ok(Some(all.collect()))
    }

    fn open(&self, node: &SimNode, access: Access) -> io::Result<SimFile> {
        let state = self.begin(Op::Open, &[node])?;
        match state.inode(node.ino)?.meta.kind {
            Kind::File => Ok(SimFile { node: self.node(&state, node.ino)?, access }),
            Kind::Dir => Err(errno(libc::EISDIR)),
            Kind::Symlink => Err(errno(libc::ELOOP)),
            _ => Err(errno(libc::EINVAL)),
        }
    }

    fn create(&self, dir: &SimNode, name: &[u8], mode: u32, umask: u32) -> io::Result<(SimNode, SimFile)> {
        let mut state = self.begin(Op::Create, &[dir])?;
        let made = state.make(dir.ino, name, &New { kind: Kind::File, mode, umask, rdev: 0, target: b"" });
        let ino = state.faults.ended(made)?;
        let file = SimFile { node: self.node(&state, ino)?, access: Access::ReadWrite };
        Ok((self.node(&state, ino)?, file))
    }

    fn mkdir(&self, dir: &SimNode, name: &[u8], mode: u32, umask: u32) -> io::Result<()> {
        // mkdir(2) takes no setuid and setgid bits.
        let new = New { kind: Kind::Dir, mode: mode & 0o1777, umask, rdev: 0, target: b"" };
        self.make(Op::Mkdir, dir, name, &new).map(|_| ())
    }

    fn mknod(&self, dir: &SimNode, name: &[u8], kind: Kind, mode: u32, umask: u32, rdev: u64) -> io::Result<()> {
        let rdev = match kind {
            Kind::CharDevice | Kind::BlockDevice => rdev,
            Kind::File | Kind::Fifo | Kind::Socket => 0,
            Kind::Dir | Kind::Symlink => return Err(errno(libc::EINVAL)),
        };
        self.make(Op::Mknod, dir, name, &New { kind, mode, umask, rdev, target: b"" }).map(|_| ())
    }

    fn symlink(&self, dir: &SimNode, name: &[u8], target: &[u8]) -> io::Result<()> {
        match target.len() {
            0 => return Err(errno(libc::ENOENT)),
            1..=MOST_TARGET => {}
            _ => return Err(errno(libc::ENAMETOOLONG)),
        }
        let new = New { kind: Kind::Symlink, mode: 0o777, umask: 0, rdev: 0, target };
        self.make(Op::Symlink, dir, name, &new).map(|_| ())
    }

    fn readlink(&self, node: &SimNode) -> io::Result<Vec<u8>> {
        let state = self.begin(Op::ReadLink, &[node])?;
        let meta = &state.inode(node.ino)?.meta;
        if meta.kind == Kind::Symlink { Ok(meta.target.to_vec()) } else { Err(errno(libc::EINVAL)) }
    }

    fn link(&self, node: &SimNode, dir: &SimNode, name: &[u8]) -> io::Result<()> {
        self.begin(Op::Link, &[node, dir])?.link(node.ino, dir.ino, name)
    }

    fn unlink(&self, dir: &SimNode, name: &[u8]) -> io::Result<()> {
        let mut state = self.begin(Op::Unlink, &[dir])?;
        let removed = state.remove(dir.ino, name, false);
        state.faults.ended(removed)
    }

    fn rmdir(&self, dir: &SimNode, name: &[u8]) -> io::Result<()> {
        self.begin(Op::Rmdir, &[dir])?.remove(dir.ino, name, true)
    }

    fn rename(
        &self,
        from: &SimNode,
        from_name: &[u8],
        to: &SimNode,
        to_name: &[u8],
        mode: RenameMode,
    ) -> io::Result<()> {
        let mut state = self.begin(Op::Rename, &[from, to])?;
        let renamed = state.rename((from.ino, from_name), (to.ino, to_name), mode);
        state.faults.ended(renamed)
    }

    fn set_mode(&self, node: &SimNode, mode: u32) -> io::Result<()> {
        let mut state = self.begin(Op::SetMode, &[node])?;
        let now = state.now();
        let meta = &mut state.inode_mut(node.ino)?.meta;
        if meta.kind == Kind::Symlink {
            return Err(errno(libc::EOPNOTSUPP));
        }
        (meta.mode, meta.ctime) = (mode & 0o7777, now);
        state.put(node.ino).map(|_| ())
    }

    fn set_owner(&self, node: &SimNode, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        let mut state = self.begin(Op::SetOwner, &[node])?;
        let now = state.now();
        let meta = &mut state.inode_mut(node.ino)?.meta;
        meta.uid = uid.unwrap_or(meta.uid);
        meta.gid = gid.unwrap_or(meta.gid);
        meta.ctime = now;
        if meta.kind != Kind::Dir {
            meta.mode &= !libc::S_ISUID;
            if meta.mode & libc::S_IXGRP != 0 {
                meta.mode &= !libc::S_ISGID;
            }
        }
        state.put(node.ino).map(|_| ())
    }

    fn set_times(&self, node: &SimNode, atime: SetTime, mtime: SetTime) -> io::Result<()> {
        set_times(&mut *self.begin(Op::SetTimes, &[node])?, node.ino, atime, mtime)
    }

    fn get_xattr(&self, node: &SimNode, name: &[u8]) -> io::Result<Vec<u8>> {
        let state = self.begin(Op::GetXattr, &[node])?;
        let meta = &state.inode(node.ino)?.meta;
        check_xattr(meta.kind, name, libc::ENODATA)?;
        meta.xattrs.get(name).cloned().ok_or_else(|| errno(libc::ENODATA))
    }

    fn set_xattr(&self, node: &SimNode, name: &[u8], value: &[u8], mode: XattrMode) -> io::Result<()> {
        let mut state = self.begin(Op::SetXattr, &[node])?;
        check_xattr(state.inode(node.ino)?.meta.kind, name, libc::EPERM)?;
        if value.len() > MOST_XATTR_VALUE {
            return Err(errno(libc::E2BIG));
        }
        change_xattrs(&mut state, node.ino, |all| match (mode, all.contains_key(name)) {
            (XattrMode::Create, true) => Err(errno(libc::EEXIST)),
            (XattrMode::Replace, false) => Err(errno(libc::ENODATA)),
            _ => {
                all.insert(name.to_vec(), value.to_vec());
                Ok(())
            }
        })
    }

    fn list_xattr(&self, node: &SimNode) -> io::Result<Vec<Vec<u8>>> {
        let state = self.begin(Op::ListXattr, &[node])?;
        Ok(state.inode(node.ino)?.meta.xattrs.keys().cloned().collect())
    }

    fn remove_xattr(&self, node: &SimNode, name: &[u8]) -> io::Result<()> {
        let mut state = self.begin(Op::RemoveXattr, &[node])?;
        check_xattr(state.inode(node.ino)?.meta.kind, name, libc::EPERM)?;
        change_xattrs(&mut state, node.ino, |all| match all.remove(name) {
            Some(_) => Ok(()),
            None => Err(errno(libc::ENODATA)),
        })
    }

    fn stat_fs(&self) -> io::Result<StatFs> {
        let mut state = self.begin(Op::StatFs, &[])?;
        // Space that was held by closed, unlinked files counts as free.
        state.reap();
        let blocks = state.options.capacity.unwrap_or(1 << 50) / PAGE_LEN as u64;
        let bfree = blocks.saturating_sub(state.used);
        Ok(StatFs {
            blocks,
            bfree,
            bavail: bfree,
            files: FILES,
            ffree: FILES - state.inodes.len() as u64,
            bsize: PAGE_LEN as u32,
            frsize: PAGE_LEN as u32,
            namelen: super::name::NAME_MAX as u32,
        })
    }

    fn sync_dir(&self, dir: &SimNode) -> io::Result<()> {
        let mut state = self.begin(Op::SyncDir, &[dir])?;
        let synced = state.sync_dir(dir.ino);
        state.faults.ended(synced)
    }

    fn sync_all(&self) -> io::Result<()> {
        self.begin(Op::SyncAll, &[])?.sync_all();
        self.shared.hooked.call(Moment::Synced(Op::SyncAll));
        Ok(())
    }

    fn read_at(&self, file: &SimFile, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
        let state = self.begin(Op::Read, &[&file.node])?;
        let inode = state.inode(file.node.ino)?;
        let mut done = 0;
        for buf in bufs {
            let at = offset.checked_add(done as u64).ok_or_else(|| errno(libc::EINVAL))?;
            let left = inode.meta.size.saturating_sub(at);
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
            inode.content.read(at, &mut buf[..len]);
            done += len;
            if len < buf.len() {
                break;
            }
        }
        Ok(done)
    }

    fn read_past_cache(&self, file: &SimFile, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let n = super::read_into(self, file, buf, offset)?;
        Ok(self.state().inode(file.node.ino)?.content.as_on_platter(offset, &mut buf[..n]))
    }

    fn write_at(&self, file: &SimFile, data: &[u8], offset: u64) -> io::Result<()> {
        self.check(&[&file.node])?;
        file.check_write(libc::EBADF)?;
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > MOST_BYTES) {
            return Err(errno(libc::EFBIG));
        }
        self.shared.hooked.call(Moment::Before(Op::Write));
        let mut state = self.state();
        let ino = file.node.ino;
        if let Err(refused) = state.faults.admit(Op::Write) {
            if refused.just_stopped && state.options.split_last_write {
                let seed = state.options.seed.wrapping_add(state.faults.operations());
                let done = split(seed, offset, data.len());
                write_pages(&mut state, ino, &data[..done], offset)?;
            }
            return Err(refused.error);
        }
        state.clock += 1;
        let done = write_pages(&mut state, ino, data, offset)?;
        let written = if done < data.len() { Err(errno(libc::ENOSPC)) } else { Ok(()) };
        state.faults.ended(written)
    }

    fn truncate(&self, file: &SimFile, size: u64) -> io::Result<()> {
        file.check_write(libc::EINVAL)?;
        let mut state = self.begin(Op::Truncate, &[&file.node])?;
        if size > MOST_BYTES {
            return Err(errno(if size > i64::MAX as u64 { libc::EINVAL } else { libc::EFBIG }));
        }
        let ino = file.node.ino;
        let now = state.now();
        let meta = &mut state.inode_mut(ino)?.meta;
        let shrinks = size < meta.size;
        (meta.size, meta.mtime, meta.ctime) = (size, now, now);
        let seq = state.put(ino)?;
        if shrinks {
            state.with_content(ino, |content| content.cut(size, u64::MAX, seq))?;
        }
        Ok(())
    }

    fn allocate(&self, file: &SimFile, mode: Allocate, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.begin(Op::Allocate, &[&file.node])?;
        if len == 0 {
            return Err(errno(libc::EINVAL));
        }
        file.check_write(libc::EBADF)?;
        let end = offset.checked_add(len).filter(|end| *end <= MOST_BYTES).ok_or_else(|| errno(libc::EFBIG))?;
        let ino = file.node.ino;
        let now = state.now();
        let meta = &mut state.inode_mut(ino)?.meta;
        if mode == Allocate::PunchHole {
            (meta.mtime, meta.ctime) = (now, now);
            // The page that the file ends in goes as a whole.
            let end = if end > meta.size { meta.size.next_multiple_of(PAGE_LEN as u64) } else { end };
            let seq = state.put(ino)?;
            return state.with_content(ino, |content| content.cut(offset, end, seq));
        }
        let room = state.free_pages();
        if !state.with_content(ino, |content| content.reserve(offset, end, room))? {
            return Err(errno(libc::ENOSPC));
        }
        let meta = &mut state.inode_mut(ino)?.meta;
        meta.ctime = now;
        if mode == Allocate::Extend && end > meta.size {
            (meta.size, meta.mtime) = (end, now);
        }
        state.put(ino).map(|_| ())
    }

    fn sync_file(&self, file: &SimFile) -> io::Result<()> {
        {
            let mut state = self.begin(Op::SyncFile, &[&file.node])?;
            let synced = state.sync_file(file.node.ino);
            state.faults.ended(synced)?;
        }
        self.shared.hooked.call(Moment::Synced(Op::SyncFile));
        Ok(())
    }

    fn stat_file(&self, file: &SimFile) -> io::Result<Stat> {
        self.stat(&file.node)
    }

    fn set_file_times(&self, file: &SimFile, atime: SetTime, mtime: SetTime) -> io::Result<()> {
        self.set_times(&file.node, atime, mtime)
    }

    fn next_data(&self, file: &SimFile, offset: u64) -> io::Result<Option<u64>> {
        let state = self.begin(Op::NextData, &[&file.node])?;
        let inode = state.inode(file.node.ino)?;
        Ok(inode.content.next_data(offset).filter(|at| *at < inode.meta.size))
    }
}
