//! The only doorway to the ciphertext directory.
//!
//! [`Backing`] is the file system below, reduced to what the store needs: every call is relative to an open inode
//! ([`Backing::Node`]), so that nothing an attacker renames under us can redirect it, and symbolic links are never
//! followed. [`posix::Posix`] is the real one; [`sim::SimDisk`] is a disk in memory that stops after any operation and
//! tears, loses and reorders what was not synced. Names are the backing directory's own, encrypted or not: this layer
//! knows no keys. Errors are the kernel's, as [`std::io::Error`] with `raw_os_error` set.

#[cfg(test)]
mod differential;
mod name;
pub mod posix;
pub mod sim;

use std::io::{self, IoSliceMut};

/// Kind of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    File,
    Dir,
    Symlink,
    Fifo,
    Socket,
    CharDevice,
    BlockDevice,
}

/// A point in time: seconds and nanoseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Timestamp {
    pub sec: i64,
    pub nsec: u32,
}

/// What to set a time to, as utimensat(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    Omit,
    Now,
    At(Timestamp),
}

/// stat(2) of a backing inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    pub dev: u64,
    pub ino: u64,
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky: `st_mode & 0o7777`.
    pub mode: u32,
    pub nlink: u64,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u64,
    /// Size in bytes, of the ciphertext.
    pub size: u64,
    /// Allocated space in 512-byte units.
    pub blocks: u64,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
}

/// One entry of a directory. `.` and `..` are not reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    pub name: Vec<u8>,
    pub ino: u64,
    /// `None` if the file system does not say (`DT_UNKNOWN`).
    pub kind: Option<Kind>,
}

/// How a regular file is opened. Never `O_APPEND`, never `O_DIRECT`: offsets and alignment below are ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Read,
    ReadWrite,
}

/// Flags of renameat2(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RenameMode {
    Replace,
    NoReplace,
    Exchange,
}

/// Modes of fallocate(2), on ciphertext offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocate {
    /// Reserve space and extend the size.
    Extend,
    /// Reserve space, keep the size.
    KeepSize,
    /// Give the space back; the range reads as zeros.
    PunchHole,
}

/// setxattr(2) flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XattrMode {
    Any,
    Create,
    Replace,
}

/// statvfs(3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StatFs {
    pub blocks: u64,
    pub bfree: u64,
    pub bavail: u64,
    pub files: u64,
    pub ffree: u64,
    pub bsize: u32,
    pub frsize: u32,
    pub namelen: u32,
}

/// The file system that holds the ciphertext.
pub trait Backing: Send + Sync + Sized + 'static {
    /// A reference to an inode of any kind that stays valid when it is renamed or unlinked (`O_PATH`).
    /// A directory's is where its children's names start.
    type Node: Send + Sync + 'static;
    /// A regular file open for input and output.
    type File: Send + Sync + 'static;

    /// The backing directory itself.
    fn root(&self) -> io::Result<Self::Node>;
    /// The child `name` of `dir`, symbolic links not followed.
    fn lookup(&self, dir: &Self::Node, name: &[u8]) -> io::Result<Self::Node>;
    fn stat(&self, node: &Self::Node) -> io::Result<Stat>;
    /// stat(2) of a child without making a node of it.
    fn stat_at(&self, dir: &Self::Node, name: &[u8]) -> io::Result<Stat>;
    /// Entries of a directory, all of them, in the directory's order.
    fn read_dir(&self, dir: &Self::Node) -> io::Result<Vec<DirEntry>> {
        Ok(self.read_dir_up_to(dir, usize::MAX)?.unwrap_or_default())
    }
    /// The same; `None` if there are more than `most`, of which no more are read.
    fn read_dir_up_to(&self, dir: &Self::Node, most: usize) -> io::Result<Option<Vec<DirEntry>>>;
    /// Opens the regular file `node`. If the permission bits keep its own owner out (mode 0200, 0444, 0000) and the
    /// daemon is the owner, it is opened all the same: those bits are for users of the mount, and the kernel has
    /// checked them there.
    fn open(&self, node: &Self::Node, access: Access) -> io::Result<Self::File>;
    /// Makes a new regular file (`O_EXCL`), open for reading and writing whatever `mode` says. `umask` is applied
    /// as the kernel does: not where the directory has a default ACL.
    fn create(&self, dir: &Self::Node, name: &[u8], mode: u32, umask: u32) -> io::Result<(Self::Node, Self::File)>;
    fn mkdir(&self, dir: &Self::Node, name: &[u8], mode: u32, umask: u32) -> io::Result<()>;
    /// mknod(2): a FIFO, socket, device or (unopened) regular file.
    fn mknod(&self, dir: &Self::Node, name: &[u8], kind: Kind, mode: u32, umask: u32, rdev: u64) -> io::Result<()>;
    fn symlink(&self, dir: &Self::Node, name: &[u8], target: &[u8]) -> io::Result<()>;
    fn readlink(&self, node: &Self::Node) -> io::Result<Vec<u8>>;
    /// Another name for `node`.
    fn link(&self, node: &Self::Node, dir: &Self::Node, name: &[u8]) -> io::Result<()>;
    fn unlink(&self, dir: &Self::Node, name: &[u8]) -> io::Result<()>;
    fn rmdir(&self, dir: &Self::Node, name: &[u8]) -> io::Result<()>;
    fn rename(
        &self,
        from: &Self::Node,
        from_name: &[u8],
        to: &Self::Node,
        to_name: &[u8],
        mode: RenameMode,
    ) -> io::Result<()>;

    fn set_mode(&self, node: &Self::Node, mode: u32) -> io::Result<()>;
    fn set_owner(&self, node: &Self::Node, uid: Option<u32>, gid: Option<u32>) -> io::Result<()>;
    fn set_times(&self, node: &Self::Node, atime: SetTime, mtime: SetTime) -> io::Result<()>;

    fn get_xattr(&self, node: &Self::Node, name: &[u8]) -> io::Result<Vec<u8>>;
    fn set_xattr(&self, node: &Self::Node, name: &[u8], value: &[u8], mode: XattrMode) -> io::Result<()>;
    fn list_xattr(&self, node: &Self::Node) -> io::Result<Vec<Vec<u8>>>;
    fn remove_xattr(&self, node: &Self::Node, name: &[u8]) -> io::Result<()>;

    fn stat_fs(&self) -> io::Result<StatFs>;
    /// Makes a directory's entries durable (fsync(2) on it).
    fn sync_dir(&self, dir: &Self::Node) -> io::Result<()>;
    /// Makes everything written so far durable (syncfs(2)).
    fn sync_all(&self) -> io::Result<()>;
    /// Lets the calling thread, one of background work, stand back behind others at the disk and the processors.
    fn give_way(&self) {}

    /// Fills `bufs` in order from `offset`; returns the bytes read, less than asked only at the end of the file.
    fn read_at(&self, file: &Self::File, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize>;
    /// Reads at most one page at a page boundary as the disk has it, past the page cache where the file system can
    /// (`O_DIRECT`), which may hold a page whose writeback failed as if it were clean. Returns the bytes read.
    fn read_past_cache(&self, file: &Self::File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        read_into(self, file, buf, offset)
    }
    /// Writes all of `data` at `offset`.
    fn write_at(&self, file: &Self::File, data: &[u8], offset: u64) -> io::Result<()>;
    /// Tells the file system that the range will be read soon (`POSIX_FADV_WILLNEED`). A hint: nothing depends on it.
    fn will_need(&self, _file: &Self::File, _offset: u64, _len: u64) {}
    fn truncate(&self, file: &Self::File, size: u64) -> io::Result<()>;
    fn allocate(&self, file: &Self::File, mode: Allocate, offset: u64, len: u64) -> io::Result<()>;
    /// fdatasync(2): data, and the size.
    fn sync_file(&self, file: &Self::File) -> io::Result<()>;
    /// fsync(2): as [`Backing::sync_file`], and everything else there is of the inode.
    fn sync_inode(&self, file: &Self::File) -> io::Result<()> {
        self.sync_file(file)
    }
    fn stat_file(&self, file: &Self::File) -> io::Result<Stat>;
    /// futimens(3).
    fn set_file_times(&self, file: &Self::File, atime: SetTime, mtime: SetTime) -> io::Result<()>;
    /// Offset of the first data at or after `offset` (`SEEK_DATA`), or `None` if there is none.
    fn next_data(&self, file: &Self::File, offset: u64) -> io::Result<Option<u64>>;
}

/// Reads into one buffer; see [`Backing::read_at`].
pub fn read_into<B: Backing>(b: &B, file: &B::File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    b.read_at(file, &mut [IoSliceMut::new(buf)], offset)
}

/// A new file with this content, durable but for its name; in the place of what had this name, which must not be relied
/// on. To be renamed to where it is wanted.
///
/// # Errors
/// The backing directory's; there may be part of a file then.
pub fn write_new<B: Backing>(b: &B, folder: &B::Node, name: &[u8], bytes: &[u8]) -> io::Result<()> {
    match b.unlink(folder, name) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let (_node, file) = b.create(folder, name, 0o600, 0)?;
    b.write_at(&file, bytes, 0)?;
    b.sync_file(&file)
}

/// Puts `bytes` in the place of the file `name`, durably, by way of the file `temp`, on which nobody else must work.
///
/// # Errors
/// The backing directory's; `name` is as it was, unless the error came after the rename.
pub fn replace_whole<B: Backing>(b: &B, folder: &B::Node, temp: &[u8], name: &[u8], bytes: &[u8]) -> io::Result<()> {
    replace_checked(b, folder, temp, name, bytes, || Ok(()))
}

/// As [`replace_whole`], if `check` finds nothing wrong with `temp`, which is durable by then but for its name.
///
/// # Errors
/// As [`replace_whole`], and `check`'s.
pub fn replace_checked<B: Backing, E: From<io::Error>>(
    b: &B,
    folder: &B::Node,
    temp: &[u8],
    name: &[u8],
    bytes: &[u8],
    check: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    let ready = write_new(b, folder, temp, bytes).map_err(E::from).and_then(|()| check());
    if let Err(e) = ready.and_then(|()| Ok(b.rename(folder, temp, folder, name, RenameMode::Replace)?)) {
        // Best effort: one that is left behind goes with the next write.
        let _ = b.unlink(folder, temp);
        return Err(e);
    }
    Ok(b.sync_dir(folder)?)
}

/// The content of a file; `None` if it is longer than `longest` bytes.
///
/// # Errors
/// The backing directory's.
pub fn read_whole<B: Backing>(b: &B, folder: &B::Node, name: &[u8], longest: usize) -> io::Result<Option<Vec<u8>>> {
    let file = b.open(&b.lookup(folder, name)?, Access::Read)?;
    let size = usize::try_from(b.stat_file(&file)?.size).unwrap_or(usize::MAX);
    if size > longest {
        return Ok(None);
    }
    let mut bytes = vec![0u8; size];
    let n = read_into(b, &file, &mut bytes, 0)?;
    bytes.truncate(n);
    Ok(Some(bytes))
}
