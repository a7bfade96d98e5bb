//! Attributes of inodes as users of the mount see them.

use super::error::{Result, StoreError};
use super::file::OpenFile;
use super::node::Node;
use super::open::Store;
use crate::backing::{Backing, Kind, SetTime, Stat, StatFs, Timestamp};
use crate::format::{geometry, links};
use parking_lot::RwLockReadGuard;
use std::sync::Arc;

const S_ISUID: u32 = 0o4000;
pub(super) const S_ISGID: u32 = 0o2000;
const S_IXGRP: u32 = 0o0010;
/// The bits that give whoever runs a file another's rights.
pub const S_PRIVILEGED: u32 = S_ISUID | S_ISGID;
/// The attribute that holds file capabilities, which writing takes away.
pub const CAPABILITY: &[u8] = b"security.capability";

/// stat(2) as users see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// The backing inode's number.
    pub ino: u64,
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    pub nlink: u64,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u64,
    /// Size of the plaintext in bytes: of a file's content, of a symbolic link's target.
    pub size: u64,
    /// Allocated space of the backing inode in 512-byte units.
    pub blocks: u64,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
}

/// What to change of an inode; the default changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits with setuid, setgid and sticky.
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: SetTime,
    pub mtime: SetTime,
    /// Take setuid, setgid of group-executable files, and file capabilities away, as a write by somebody without
    /// privileges must.
    pub kill_suidgid: bool,
}

impl Default for SetAttr {
    fn default() -> Self {
        Self {
            mode: None,
            uid: None,
            gid: None,
            size: None,
            atime: SetTime::Omit,
            mtime: SetTime::Omit,
            kill_suidgid: false,
        }
    }
}

/// The mode left when privileges are killed.
fn without_privileges(mode: u32) -> u32 {
    let sgid = if mode & S_IXGRP != 0 { S_ISGID } else { 0 };
    mode & !(S_ISUID | sgid)
}

impl<B: Backing> Store<B> {
    /// Attributes of a node.
    ///
    /// # Errors
    /// The backing directory's; [`crate::format::damage::Damage::SymlinkAuth`] for a link whose reference is damaged.
    pub fn getattr(&self, n: &Arc<Node<B>>) -> Result<Attr> {
        let st = n.stat(self.backing())?;
        self.attr(n, &st)
    }

    /// What users see for a backing inode's stat.
    pub(super) fn attr(&self, n: &Arc<Node<B>>, st: &Stat) -> Result<Attr> {
        let size = match st.kind {
            Kind::File => geometry::plain_size(st.size),
            Kind::Symlink => match links::plain_len(st.size) {
                Some(len) => len,
                None => self.referred_len(n)?,
            },
            _ => st.size,
        };
        Ok(Attr {
            ino: st.ino,
            kind: st.kind,
            mode: st.mode,
            nlink: st.nlink,
            uid: st.uid,
            gid: st.gid,
            rdev: st.rdev,
            size,
            blocks: st.blocks,
            atime: st.atime,
            mtime: st.mtime,
            ctime: st.ctime,
        })
    }

    /// Changes attributes; `open` is the handle to truncate through, if there is one. Returns the new ones.
    ///
    /// # Errors
    /// [`StoreError::ReadOnly`], [`StoreError::IsADirectory`] and [`StoreError::Invalid`] for truncating what is not
    /// a file, the file's and the backing directory's errors. What comes before the error is done: size, owner, mode,
    /// times, in this order.
    pub fn setattr(&self, n: &Arc<Node<B>>, s: &SetAttr, open: Option<&OpenFile<B>>) -> Result<Attr> {
        self.writable()?;
        let b = self.backing();
        if let Some(size) = s.size {
            self.set_len(n, size, open)?;
        }
        if s.kill_suidgid {
            self.kill_privileges(n)?;
        }
        // Whoever writes behind users' backs puts back the times and mode it found: not over these.
        let (fd, _kept) = self.kept(n)?;
        if s.uid.is_some() || s.gid.is_some() {
            b.set_owner(&fd, s.uid, s.gid)?;
            // The kernel below takes its own attribute away, but does not know this one.
            self.drop_capabilities(n, &fd)?;
        }
        if let Some(mode) = s.mode {
            b.set_mode(&fd, mode & 0o7777)?;
        }
        if s.atime != SetTime::Omit || s.mtime != SetTime::Omit {
            b.set_times(&fd, s.atime, s.mtime)?;
        }
        let st = b.stat(&fd)?;
        self.attr(n, &st)
    }

    fn set_len(&self, n: &Arc<Node<B>>, size: u64, open: Option<&OpenFile<B>>) -> Result<()> {
        match (n.kind(), open) {
            (Kind::File, Some(f)) if f.is_writer() => f.set_len(size),
            (Kind::File, _) => self.core(n)?.set_len(size),
            (Kind::Dir, _) => Err(StoreError::IsADirectory),
            _ => Err(StoreError::Invalid),
        }
    }

    /// Takes setuid, setgid of a group-executable file, and file capabilities away: what a write by somebody without
    /// privileges does.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn kill_privileges(&self, n: &Arc<Node<B>>) -> Result<()> {
        self.writable()?;
        if n.kind() != Kind::File {
            return Ok(());
        }
        let (fd, _kept) = self.kept(n)?;
        let st = self.backing().stat(&fd)?;
        let mode = without_privileges(st.mode);
        if mode != st.mode {
            self.backing().set_mode(&fd, mode)?;
        }
        self.drop_capabilities(n, &fd)
    }

    /// The backing inode, and its lock held shared: nobody puts back what is about to be changed of it, and no other
    /// inode takes its place.
    ///
    /// # Errors
    /// As [`Node::fd`].
    pub(super) fn kept(&self, n: &Arc<Node<B>>) -> Result<(Arc<B::Node>, RwLockReadGuard<'_, ()>)> {
        loop {
            let (dev, ino) = n.key();
            let kept = self.shared().inode_locks.shared(dev, ino);
            let fd = n.fd(self.backing())?;
            if n.key() == (dev, ino) {
                return Ok((fd, kept));
            }
        }
    }

    fn drop_capabilities(&self, n: &Arc<Node<B>>, fd: &B::Node) -> Result<()> {
        if n.kind() != Kind::File {
            return Ok(());
        }
        match self.remove_xattr_of(n, fd, CAPABILITY) {
            // None there, none possible, or none that this daemon may have set.
            Err(StoreError::NoAttribute | StoreError::NotSupported | StoreError::NotPermitted) => Ok(()),
            other => other,
        }
    }

    /// statvfs(3) of the backing file system, as it is for users.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn stat_fs(&self) -> Result<StatFs> {
        let mut s = self.backing().stat_fs()?;
        s.namelen = crate::format::names::NAME_MAX as u32;
        Ok(s)
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn killing_keeps_mandatory_locking_mode() {
        assert_eq!(without_privileges(0o6755), 0o755);
        assert_eq!(without_privileges(0o2644), 0o2644);
        assert_eq!(without_privileges(0o4644), 0o644);
        assert_eq!(without_privileges(0o1777), 0o1777);
    }
}
