//! Everything on the disk, under one lock: inodes, the tree of names, what is journalled.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use super::content::{Content, PAGE_LEN};
use super::fault::Faults;
use super::journal::{Change, ImageInode, Journal, Log, Meta, ROOT};
use super::{SimOptions, errno};
use crate::backing::name::{NAME_MAX, one_name};
use crate::backing::{Kind, RenameMode, Timestamp};

/// `st_dev` of every inode.
pub(super) const DEVICE: u64 = 0x51;
/// The largest file, as on ext4 with blocks of 4096 bytes.
pub(super) const MOST_BYTES: u64 = (1 << 44) - PAGE_LEN as u64;

#[derive(Debug, Clone)]
pub(super) struct Inode {
    pub(super) meta: Meta,
    pub(super) nlink: u64,
    /// Of a directory: the one that names it.
    pub(super) parent: u64,
    pub(super) entries: BTreeMap<Vec<u8>, u64>,
    pub(super) content: Content,
    /// One reference here and one in each handle.
    pub(super) handles: Arc<()>,
}

impl Inode {
    pub(super) fn new(meta: Meta) -> Self {
        let nlink = if meta.kind == Kind::Dir { 2 } else { 1 };
        let (entries, content) = Default::default();
        Self { meta, nlink, parent: ROOT, entries, content, handles: Arc::new(()) }
    }

    fn is_held(&self) -> bool {
        Arc::strong_count(&self.handles) > 1
    }
}

/// What to make an inode as.
#[derive(Debug, Clone, Copy)]
pub(super) struct New<'a> {
    pub(super) kind: Kind,
    pub(super) mode: u32,
    pub(super) umask: u32,
    pub(super) rdev: u64,
    pub(super) target: &'a [u8],
}

#[derive(Debug, Clone)]
pub(super) struct State {
    pub(super) options: SimOptions,
    pub(super) faults: Faults,
    pub(super) log: Log,
    pub(super) inodes: BTreeMap<u64, Inode>,
    pub(super) next_ino: u64,
    /// Pages in use by files.
    pub(super) used: u64,
    /// Moves on by a microsecond with every operation.
    pub(super) clock: u64,
    /// Inodes with content or attributes that are not durable.
    unsettled: BTreeSet<u64>,
    /// Inodes without a name, kept by a handle or by the platter.
    orphans: BTreeSet<u64>,
}

impl State {
    pub(super) fn new(options: SimOptions) -> Self {
        let meta = Meta {
            kind: Kind::Dir,
            mode: 0o755,
            uid: options.uid,
            gid: options.gid,
            rdev: 0,
            size: PAGE_LEN as u64,
            atime: time(0),
            mtime: time(0),
            ctime: time(0),
            xattrs: Arc::default(),
            target: Arc::default(),
        };
        let image = BTreeMap::from([(ROOT, ImageInode::new(Arc::new(meta.clone())))]);
        let log = Log::new(options.journal, image);
        Self::with_inodes(options, log, BTreeMap::from([(ROOT, Inode::new(meta))]), ROOT + 1, 0)
    }

    pub(super) fn with_inodes(
        options: SimOptions,
        log: Log,
        inodes: BTreeMap<u64, Inode>,
        next_ino: u64,
        clock: u64,
    ) -> Self {
        let used = inodes.values().map(|i| i.content.allocated()).sum();
        let (faults, unsettled, orphans) = Default::default();
        Self { options, faults, log, inodes, next_ino, used, clock, unsettled, orphans }
    }

    /// The same disk for another process: no handles, so nothing without a name.
    pub(super) fn for_another_process(&self) -> Self {
        let mut other = self.clone();
        other.faults = Faults::default();
        for inode in other.inodes.values_mut() {
            inode.handles = Arc::new(());
        }
        other.reap();
        other
    }

    pub(super) fn now(&self) -> Timestamp {
        time(self.clock)
    }

    pub(super) fn inode(&self, ino: u64) -> io::Result<&Inode> {
        self.inodes.get(&ino).ok_or_else(|| errno(libc::ESTALE))
    }

    pub(super) fn inode_mut(&mut self, ino: u64) -> io::Result<&mut Inode> {
        self.inodes.get_mut(&ino).ok_or_else(|| errno(libc::ESTALE))
    }

    pub(super) fn dir(&self, ino: u64) -> io::Result<&Inode> {
        let inode = self.inode(ino)?;
        if inode.meta.kind == Kind::Dir { Ok(inode) } else { Err(errno(libc::ENOTDIR)) }
    }

    /// The inode `name` in `dir`.
    pub(super) fn child(&self, dir: u64, name: &[u8]) -> io::Result<u64> {
        let dir = self.dir(dir)?;
        let name = short_name(name)?;
        dir.entries.get(name).copied().ok_or_else(|| errno(libc::ENOENT))
    }

    /// Fails unless `name` can be made in `dir`.
    fn vacant(&self, dir: u64, name: &[u8]) -> io::Result<()> {
        match self.child(dir, name) {
            Ok(_) => Err(errno(libc::EEXIST)),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) && !name.is_empty() => self.alive(dir),
            Err(e) => Err(e),
        }
    }

    /// Nothing can be put into a removed directory.
    fn alive(&self, dir: u64) -> io::Result<()> {
        if self.dir(dir)?.nlink == 0 { Err(errno(libc::ENOENT)) } else { Ok(()) }
    }

    /// Journals what an inode's attributes are now.
    pub(super) fn put(&mut self, ino: u64) -> io::Result<u64> {
        let put = Change::Put(ino, Arc::new(self.inode(ino)?.meta.clone()));
        self.unsettled.insert(ino);
        Ok(self.log.push(vec![put]))
    }

    fn touch_dir(&mut self, dir: u64) -> io::Result<()> {
        let now = self.now();
        let dir = self.inode_mut(dir)?;
        dir.meta.mtime = now;
        dir.meta.ctime = now;
        Ok(())
    }

    fn adjust_links(&mut self, ino: u64, by: i64) -> io::Result<()> {
        let now = self.now();
        let inode = self.inode_mut(ino)?;
        inode.nlink = inode.nlink.saturating_add_signed(by);
        inode.meta.ctime = now;
        self.unsettled.insert(ino);
        Ok(())
    }

    /// Makes an inode named `name` in `dir`.
    pub(super) fn make(&mut self, dir: u64, name: &[u8], new: &New<'_>) -> io::Result<u64> {
        let New { kind, mode, umask, rdev, target } = *new;
        self.vacant(dir, name)?;
        if self.free_pages() == 0 {
            return Err(errno(libc::ENOSPC));
        }
        let now = self.now();
        let parent = &self.dir(dir)?.meta;
        let mut meta = Meta {
            kind,
            mode: mode & 0o7777,
            uid: self.options.uid,
            gid: self.options.gid,
            rdev,
            size: if kind == Kind::Dir { PAGE_LEN as u64 } else { target.len() as u64 },
            atime: now,
            mtime: now,
            ctime: now,
            xattrs: Arc::default(),
            target: target.into(),
        };
        match parent.xattrs.get(DEFAULT_ACL) {
            Some(acl) if kind == Kind::Dir => {
                meta.xattrs = Arc::new(BTreeMap::from([(DEFAULT_ACL.to_vec(), acl.clone())]));
            }
            Some(_) => {}
            None => meta.mode &= !umask,
        }
        if parent.mode & libc::S_ISGID != 0 {
            meta.gid = parent.gid;
            meta.mode |= if kind == Kind::Dir { libc::S_ISGID } else { 0 };
        }
        self.insert(dir, name, meta)
    }

    fn insert(&mut self, dir: u64, name: &[u8], meta: Meta) -> io::Result<u64> {
        let ino = self.next_ino;
        self.next_ino += 1;
        let is_dir = meta.kind == Kind::Dir;
        let put = Change::Put(ino, Arc::new(meta.clone()));
        let mut inode = Inode::new(meta);
        inode.parent = dir;
        self.inodes.insert(ino, inode);
        self.inode_mut(dir)?.entries.insert(name.to_vec(), ino);
        if is_dir {
            self.adjust_links(dir, 1)?;
        }
        self.touch_dir(dir)?;
        self.log.push(vec![put, Change::Entry(dir, name.to_vec(), Some(ino))]);
        Ok(ino)
    }

    pub(super) fn link(&mut self, ino: u64, dir: u64, name: &[u8]) -> io::Result<()> {
        self.vacant(dir, name)?;
        let inode = self.inode(ino)?;
        if inode.meta.kind == Kind::Dir {
            return Err(errno(libc::EPERM));
        }
        if inode.nlink == 0 {
            return Err(errno(libc::ENOENT));
        }
        self.adjust_links(ino, 1)?;
        self.inode_mut(dir)?.entries.insert(name.to_vec(), ino);
        self.touch_dir(dir)?;
        self.log.push(vec![Change::Entry(dir, name.to_vec(), Some(ino))]);
        Ok(())
    }

    pub(super) fn remove(&mut self, dir: u64, name: &[u8], directory: bool) -> io::Result<()> {
        let ino = self.child(dir, name)?;
        let inode = self.inode(ino)?;
        match (inode.meta.kind == Kind::Dir, directory) {
            (true, false) => return Err(errno(libc::EISDIR)),
            (false, true) => return Err(errno(libc::ENOTDIR)),
            (true, true) if !inode.entries.is_empty() => return Err(errno(libc::ENOTEMPTY)),
            _ => {}
        }
        self.inode_mut(dir)?.entries.remove(name);
        self.touch_dir(dir)?;
        self.log.push(vec![Change::Entry(dir, name.to_vec(), None)]);
        if directory {
            self.adjust_links(dir, -1)?;
        }
        self.unnamed(ino)
    }

    /// `ino` lost a name.
    fn unnamed(&mut self, ino: u64) -> io::Result<()> {
        let is_dir = self.inode(ino)?.meta.kind == Kind::Dir;
        self.adjust_links(ino, if is_dir { -2 } else { -1 })?;
        if self.inode(ino)?.nlink == 0 {
            self.orphans.insert(ino);
            self.reap_one(ino);
        }
        Ok(())
    }

    pub(super) fn rename(
        &mut self,
        (from, from_name): (u64, &[u8]),
        (to, to_name): (u64, &[u8]),
        mode: RenameMode,
    ) -> io::Result<()> {
        self.dir(from)?;
        self.dir(to)?;
        let moved = self.child(from, from_name)?;
        let target = match self.child(to, to_name) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) && !to_name.is_empty() => None,
            other => Some(other?),
        };
        self.alive(to)?;
        self.check_rename((from, moved), (to, target), mode)?;
        if target == Some(moved) {
            return Ok(());
        }
        let exchanged = target.filter(|_| mode == RenameMode::Exchange);
        match exchanged {
            Some(other) => self.inode_mut(from)?.entries.insert(from_name.to_vec(), other),
            None => self.inode_mut(from)?.entries.remove(from_name),
        };
        self.inode_mut(to)?.entries.insert(to_name.to_vec(), moved);
        self.move_parent(moved, from, to)?;
        if let Some(other) = exchanged {
            self.move_parent(other, to, from)?;
        }
        self.touch_dir(from)?;
        self.touch_dir(to)?;
        self.log.push(vec![
            Change::Entry(from, from_name.to_vec(), exchanged),
            Change::Entry(to, to_name.to_vec(), Some(moved)),
        ]);
        match target {
            Some(replaced) if exchanged.is_none() => {
                if self.inode(replaced)?.meta.kind == Kind::Dir {
                    self.adjust_links(to, -1)?;
                }
                self.unnamed(replaced)
            }
            _ => Ok(()),
        }
    }

    /// renameat2(2)'s rules, in the order Linux has them.
    fn check_rename(
        &self,
        (from, moved): (u64, u64),
        (to, target): (u64, Option<u64>),
        mode: RenameMode,
    ) -> io::Result<()> {
        match (mode, target) {
            (RenameMode::NoReplace, Some(_)) => return Err(errno(libc::EEXIST)),
            (RenameMode::Exchange, None) => return Err(errno(libc::ENOENT)),
            _ => {}
        }
        if self.is_within(to, moved) {
            return Err(errno(libc::EINVAL));
        }
        let Some(target) = target else { return Ok(()) };
        let exchange = mode == RenameMode::Exchange;
        if self.is_within(from, target) {
            return Err(errno(if exchange { libc::EINVAL } else { libc::ENOTEMPTY }));
        }
        if target == moved || exchange {
            return Ok(());
        }
        let replaced = self.inode(target)?;
        match (self.inode(moved)?.meta.kind == Kind::Dir, replaced.meta.kind == Kind::Dir) {
            (true, false) => Err(errno(libc::ENOTDIR)),
            (false, true) => Err(errno(libc::EISDIR)),
            (true, true) if !replaced.entries.is_empty() => Err(errno(libc::ENOTEMPTY)),
            _ => Ok(()),
        }
    }

    fn move_parent(&mut self, ino: u64, from: u64, to: u64) -> io::Result<()> {
        let now = self.now();
        let inode = self.inode_mut(ino)?;
        inode.meta.ctime = now;
        if inode.meta.kind == Kind::Dir && from != to {
            inode.parent = to;
            self.adjust_links(from, -1)?;
            self.adjust_links(to, 1)?;
        }
        Ok(())
    }

    /// Whether directory `inner` is `outer` or below it.
    fn is_within(&self, inner: u64, outer: u64) -> bool {
        let mut at = inner;
        loop {
            if at == outer {
                return true;
            }
            match self.inodes.get(&at) {
                Some(inode) if at != ROOT => at = inode.parent,
                _ => return false,
            }
        }
    }

    pub(super) fn free_pages(&mut self) -> u64 {
        let Some(capacity) = self.options.capacity else { return u64::MAX };
        let capacity = capacity / PAGE_LEN as u64;
        if self.used >= capacity {
            self.reap();
        }
        capacity.saturating_sub(self.used)
    }

    /// Runs `change` on the content of `ino` and keeps account of the space.
    pub(super) fn with_content<R>(&mut self, ino: u64, change: impl FnOnce(&mut Content) -> R) -> io::Result<R> {
        let content = &mut self.inode_mut(ino)?.content;
        let before = content.allocated();
        let result = change(content);
        let after = content.allocated();
        self.used = self.used + after - before;
        self.unsettled.insert(ino);
        Ok(result)
    }

    /// Frees what has neither a name nor a handle.
    pub(super) fn reap(&mut self) {
        for ino in self.orphans.clone() {
            self.reap_one(ino);
        }
    }

    fn reap_one(&mut self, ino: u64) {
        let Some(inode) = self.inodes.get_mut(&ino) else { return };
        if inode.is_held() {
            return;
        }
        self.used -= inode.content.allocated();
        inode.content.release();
        if self.log.is_forgotten(ino) {
            self.inodes.remove(&ino);
            self.orphans.remove(&ino);
            self.unsettled.remove(&ino);
        }
    }

    /// fdatasync(2).
    pub(super) fn sync_file(&mut self, ino: u64) -> io::Result<()> {
        let meta = Arc::new(self.inode(ino)?.meta.clone());
        match self.log.kind() {
            Journal::Ordered => {
                self.log.push(vec![Change::Put(ino, meta)]);
                self.log.commit_all();
            }
            Journal::None => self.log.force_meta(ino, meta),
        }
        self.inode_mut(ino)?.content.settle();
        self.unsettled.remove(&ino);
        self.reap();
        Ok(())
    }

    /// fsync(2) of a directory.
    pub(super) fn sync_dir(&mut self, ino: u64) -> io::Result<()> {
        let meta = Arc::new(self.dir(ino)?.meta.clone());
        match self.log.kind() {
            Journal::Ordered => {
                self.log.push(vec![Change::Put(ino, meta)]);
                self.log.commit_all();
            }
            Journal::None => {
                self.log.force_meta(ino, meta);
                self.log.force_entries(ino);
            }
        }
        self.reap();
        Ok(())
    }

    /// syncfs(2).
    pub(super) fn sync_all(&mut self) {
        for ino in std::mem::take(&mut self.unsettled) {
            if let Some(inode) = self.inodes.get_mut(&ino) {
                inode.content.settle();
                self.log.push(vec![Change::Put(ino, Arc::new(inode.meta.clone()))]);
            }
        }
        self.log.commit_all();
        self.reap();
    }
}

/// The extended attribute that holds a directory's default ACL.
pub(super) const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

fn short_name(name: &[u8]) -> io::Result<&[u8]> {
    if name.len() > NAME_MAX { Err(errno(libc::ENAMETOOLONG)) } else { one_name(name) }
}

fn time(micros: u64) -> Timestamp {
    Timestamp { sec: 1_700_000_000 + (micros / 1_000_000) as i64, nsec: (micros % 1_000_000) as u32 * 1000 }
}
