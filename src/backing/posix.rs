//! The real backing directory.
//!
//! A [`Node`] is an `O_PATH | O_NOFOLLOW` descriptor; nothing is ever reached by a longer path than one name below
//! such a descriptor, or `/proc/self/fd/N` of it, so `/proc` must be mounted. Interrupted calls are repeated, short
//! reads and writes continued. Files are opened without atime updates where that is allowed.

mod direct;
mod owner;
mod priority;
mod proc_path;
#[cfg(test)]
mod tests;
mod umask;
mod xattr;

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, SeekFrom, Timestamps, Uid};
use rustix::io::{Errno, retry_on_intr};

use super::name::one_name;
use super::{Access, Allocate, Backing, DirEntry, Kind, RenameMode, SetTime, Stat, StatFs, Timestamp, XattrMode};
use proc_path::ProcPath;

const NODE: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// The kernel's `IOV_MAX`.
const MOST_BUFFERS: usize = 1024;

/// A directory of the running system, held open.
#[derive(Debug)]
pub struct Posix {
    path: PathBuf,
    root: OwnedFd,
    /// The root again, readable. Kept open so that an error of writeback since the start is reported by some syncfs(2).
    readable: OwnedFd,
}

/// An inode of any kind, by an `O_PATH` descriptor.
#[derive(Debug)]
pub struct Node(OwnedFd);

/// An open regular file.
#[derive(Debug)]
pub struct File(OwnedFd);

impl Posix {
    /// Opens the directory at `path`, following symbolic links.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty()))?;
        let readable = reopen_dir(root.as_fd())?;
        Ok(Self { path: path.to_owned(), root, readable })
    }

    /// Where the directory was when it was opened, for messages only.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Runs `call` on a name in `dir`, repeating it when interrupted, as the owner who is not to be kept out.
fn in_dir<T>(dir: &Node, call: impl Fn() -> rustix::io::Result<T>) -> io::Result<T> {
    owner::of_dirs(&[dir.as_fd()], || Ok(retry_on_intr(&call)?))
}

/// Opens what `node` refers to with `flags`.
fn reopen(node: BorrowedFd<'_>, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = ProcPath::of(node);
    let open = |flags| retry_on_intr(|| rustix::fs::open(path.as_c_str(), flags | OFlags::CLOEXEC, Mode::empty()));
    match open(flags | OFlags::NOATIME) {
        // Only the owner and root may leave the access time alone.
        Err(Errno::PERM) => open(flags),
        other => other,
    }
}

fn reopen_dir(dir: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    owner::of_dirs(&[dir], || Ok(reopen(dir, DIRECTORY)?))
}

fn kind_of(kind: FileType) -> Option<Kind> {
    Some(match kind {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Dir,
        FileType::Symlink => Kind::Symlink,
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
        FileType::CharacterDevice => Kind::CharDevice,
        FileType::BlockDevice => Kind::BlockDevice,
        FileType::Unknown => return None,
    })
}

fn stat_of(s: &rustix::fs::Stat) -> io::Result<Stat> {
    let time = |sec, nsec: u64| Timestamp { sec, nsec: nsec as u32 };
    Ok(Stat {
        dev: s.st_dev,
        ino: s.st_ino,
        kind: kind_of(FileType::from_raw_mode(s.st_mode)).ok_or(Errno::IO)?,
        mode: s.st_mode & 0o7777,
        nlink: s.st_nlink,
        uid: s.st_uid,
        gid: s.st_gid,
        rdev: s.st_rdev,
        size: s.st_size.unsigned_abs(),
        blocks: s.st_blocks.unsigned_abs(),
        atime: time(s.st_atime, s.st_atime_nsec),
        mtime: time(s.st_mtime, s.st_mtime_nsec),
        ctime: time(s.st_ctime, s.st_ctime_nsec),
    })
}

fn stat_fd(fd: BorrowedFd<'_>) -> io::Result<Stat> {
    stat_of(&owner::settled(|| Ok(rustix::fs::fstat(fd)?))?)
}

fn times_of(atime: SetTime, mtime: SetTime) -> Timestamps {
    let one = |t| match t {
        SetTime::Omit => rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
        SetTime::Now => rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
        SetTime::At(t) => rustix::fs::Timespec { tv_sec: t.sec, tv_nsec: t.nsec.into() },
    };
    Timestamps { last_access: one(atime), last_modification: one(mtime) }
}

impl Backing for Posix {
    type Node = Node;
    type File = File;

    fn root(&self) -> io::Result<Node> {
        Ok(Node(self.root.try_clone()?))
    }

    fn lookup(&self, dir: &Node, name: &[u8]) -> io::Result<Node> {
        let name = one_name(name)?;
        in_dir(dir, || rustix::fs::openat(dir, name, NODE, Mode::empty())).map(Node)
    }

    fn stat(&self, node: &Node) -> io::Result<Stat> {
        stat_fd(node.as_fd())
    }

    fn stat_at(&self, dir: &Node, name: &[u8]) -> io::Result<Stat> {
        let name = one_name(name)?;
        let look = || rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT);
        let stat = match owner::settled(|| Ok(look()?)) {
            Err(e) if e.raw_os_error() == Some(libc::EACCES) => in_dir(dir, look)?,
            other => other?,
        };
        stat_of(&stat)
    }

    fn read_dir_up_to(&self, dir: &Node, most: usize) -> io::Result<Option<Vec<DirEntry>>> {
        let mut entries = Vec::new();
        for entry in rustix::fs::Dir::new(reopen_dir(dir.as_fd())?)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if !matches!(name, b"." | b"..") {
                if entries.len() == most {
                    return Ok(None);
                }
                entries.push(DirEntry { name: name.to_vec(), ino: entry.ino(), kind: kind_of(entry.file_type()) });
            }
        }
        Ok(Some(entries))
    }

    fn open(&self, node: &Node, access: Access) -> io::Result<File> {
        // A FIFO would wait for its other end, a device would act.
        match FileType::from_raw_mode(rustix::fs::fstat(node)?.st_mode) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR.into()),
            FileType::Symlink => return Err(Errno::LOOP.into()),
            _ => return Err(Errno::INVAL.into()),
        }
        let flags = match access {
            Access::Read => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        owner::of_file(node.as_fd(), || Ok(reopen(node.as_fd(), flags)?)).map(File)
    }

    fn create(&self, dir: &Node, name: &[u8], mode: u32, umask: u32) -> io::Result<(Node, File)> {
        let name = one_name(name)?;
        let mode = umask::apply(mode, umask);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = in_dir(dir, || rustix::fs::openat(dir, name, flags, mode))?;
        // From here on the name may already be another's; the descriptor is not.
        let path = ProcPath::of(file.as_fd());
        let node = retry_on_intr(|| rustix::fs::open(path.as_c_str(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()))?;
        // A nicety, and not everyone may ask for it.
        let _ = rustix::fs::fcntl_setfl(&file, OFlags::NOATIME);
        Ok((Node(node), File(file)))
    }

    fn mkdir(&self, dir: &Node, name: &[u8], mode: u32, umask: u32) -> io::Result<()> {
        let name = one_name(name)?;
        let mode = umask::apply(mode, umask);
        in_dir(dir, || rustix::fs::mkdirat(dir, name, mode))
    }

    fn mknod(&self, dir: &Node, name: &[u8], kind: Kind, mode: u32, umask: u32, rdev: u64) -> io::Result<()> {
        let name = one_name(name)?;
        let kind = match kind {
            Kind::File => FileType::RegularFile,
            Kind::Fifo => FileType::Fifo,
            Kind::Socket => FileType::Socket,
            Kind::CharDevice => FileType::CharacterDevice,
            Kind::BlockDevice => FileType::BlockDevice,
            Kind::Dir | Kind::Symlink => return Err(Errno::INVAL.into()),
        };
        let mode = umask::apply(mode, umask);
        in_dir(dir, || rustix::fs::mknodat(dir, name, kind, mode, rdev))
    }

    fn symlink(&self, dir: &Node, name: &[u8], target: &[u8]) -> io::Result<()> {
        let name = one_name(name)?;
        in_dir(dir, || rustix::fs::symlinkat(target, dir, name))
    }

    fn readlink(&self, node: &Node) -> io::Result<Vec<u8>> {
        let target = match rustix::fs::readlinkat(node, c"", Vec::new()) {
            // What the kernel says of an empty path that is no symbolic link.
            Err(Errno::NOENT) => return Err(Errno::INVAL.into()),
            other => other?,
        };
        Ok(target.into_bytes())
    }

    fn link(&self, node: &Node, dir: &Node, name: &[u8]) -> io::Result<()> {
        let name = one_name(name)?;
        let by_fd = in_dir(dir, || rustix::fs::linkat(node, c"", dir, name, AtFlags::EMPTY_PATH));
        match by_fd {
            // Before Linux 6.10, whoever lacks CAP_DAC_READ_SEARCH is told that nothing is there.
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                let path = ProcPath::of(node.as_fd());
                let cwd = rustix::fs::CWD;
                in_dir(dir, || rustix::fs::linkat(cwd, path.as_c_str(), dir, name, AtFlags::SYMLINK_FOLLOW))
            }
            other => other,
        }
    }

    fn unlink(&self, dir: &Node, name: &[u8]) -> io::Result<()> {
        let name = one_name(name)?;
        in_dir(dir, || rustix::fs::unlinkat(dir, name, AtFlags::empty()))
    }

    fn rmdir(&self, dir: &Node, name: &[u8]) -> io::Result<()> {
        let name = one_name(name)?;
        in_dir(dir, || rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR))
    }

    fn rename(&self, from: &Node, from_name: &[u8], to: &Node, to_name: &[u8], mode: RenameMode) -> io::Result<()> {
        let (from_name, to_name) = (one_name(from_name)?, one_name(to_name)?);
        let flags = match mode {
            RenameMode::Replace => RenameFlags::empty(),
            RenameMode::NoReplace => RenameFlags::NOREPLACE,
            RenameMode::Exchange => RenameFlags::EXCHANGE,
        };
        let call = || match mode {
            RenameMode::Replace => rustix::fs::renameat(from, from_name, to, to_name),
            _ => rustix::fs::renameat_with(from, from_name, to, to_name, flags),
        };
        owner::of_dirs(&[from.as_fd(), to.as_fd()], || Ok(retry_on_intr(call)?))
    }

    fn set_mode(&self, node: &Node, mode: u32) -> io::Result<()> {
        let _mode = owner::setting_mode();
        let path = ProcPath::of(node.as_fd());
        Ok(retry_on_intr(|| rustix::fs::chmod(path.as_c_str(), Mode::from_raw_mode(mode & 0o7777)))?)
    }

    fn set_owner(&self, node: &Node, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        let uid = uid.map(user).transpose()?;
        let gid = gid.map(group).transpose()?;
        // Changing the owner drops setuid and setgid bits.
        let _mode = owner::setting_mode();
        Ok(retry_on_intr(|| rustix::fs::chownat(node, c"", uid, gid, AtFlags::EMPTY_PATH))?)
    }

    fn set_times(&self, node: &Node, atime: SetTime, mtime: SetTime) -> io::Result<()> {
        let times = times_of(atime, mtime);
        match retry_on_intr(|| rustix::fs::utimensat(node, c"", &times, AtFlags::EMPTY_PATH)) {
            // Linux before 5.8 does not know the flag.
            Err(Errno::INVAL) => {
                let path = ProcPath::of(node.as_fd());
                Ok(rustix::fs::utimensat(rustix::fs::CWD, path.as_c_str(), &times, AtFlags::empty())?)
            }
            other => Ok(other?),
        }
    }

    fn get_xattr(&self, node: &Node, name: &[u8]) -> io::Result<Vec<u8>> {
        xattr::get(node.as_fd(), name)
    }

    fn set_xattr(&self, node: &Node, name: &[u8], value: &[u8], mode: XattrMode) -> io::Result<()> {
        xattr::set(node.as_fd(), name, value, mode)
    }

    fn list_xattr(&self, node: &Node) -> io::Result<Vec<Vec<u8>>> {
        xattr::list(node.as_fd())
    }

    fn remove_xattr(&self, node: &Node, name: &[u8]) -> io::Result<()> {
        xattr::remove(node.as_fd(), name)
    }

    fn stat_fs(&self) -> io::Result<StatFs> {
        let s = retry_on_intr(|| rustix::fs::fstatvfs(&self.root))?;
        Ok(StatFs {
            blocks: s.f_blocks,
            bfree: s.f_bfree,
            bavail: s.f_bavail,
            files: s.f_files,
            ffree: s.f_ffree,
            bsize: u32::try_from(s.f_bsize).unwrap_or(u32::MAX),
            frsize: u32::try_from(s.f_frsize).unwrap_or(u32::MAX),
            namelen: u32::try_from(s.f_namemax).unwrap_or(u32::MAX),
        })
    }

    fn sync_dir(&self, dir: &Node) -> io::Result<()> {
        let dir = reopen_dir(dir.as_fd())?;
        Ok(retry_on_intr(|| rustix::fs::fsync(&dir))?)
    }

    fn sync_all(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::syncfs(&self.readable))?)
    }

    fn give_way(&self) {
        priority::give_way();
    }

    fn read_at(&self, file: &File, mut bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
        let mut done = 0usize;
        // Skips empty buffers, so that a read of nothing can't look like the end of the file.
        IoSliceMut::advance_slices(&mut bufs, 0);
        while !bufs.is_empty() {
            let batch = bufs.len().min(MOST_BUFFERS);
            let at = offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
            let n = retry_on_intr(|| rustix::io::preadv(file, &mut bufs[..batch], at))?;
            if n == 0 && bufs[..batch].iter().any(|b| !b.is_empty()) {
                break;
            }
            done += n;
            IoSliceMut::advance_slices(&mut bufs, n);
        }
        Ok(done)
    }

    fn read_past_cache(&self, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        match direct::read(file.as_fd(), buf, offset) {
            Some(n) => Ok(n),
            // tmpfs, some network file systems: what there is instead of a disk.
            None => super::read_into(self, file, buf, offset),
        }
    }

    fn write_at(&self, file: &File, data: &[u8], offset: u64) -> io::Result<()> {
        let mut done = 0usize;
        while done < data.len() {
            let at = offset.checked_add(done as u64).ok_or(Errno::FBIG)?;
            match retry_on_intr(|| rustix::io::pwrite(file, &data[done..], at))? {
                0 => return Err(Errno::IO.into()),
                n => done += n,
            }
        }
        Ok(())
    }

    fn will_need(&self, file: &File, offset: u64, len: u64) {
        let _ = rustix::fs::fadvise(file, offset, std::num::NonZeroU64::new(len), rustix::fs::Advice::WillNeed);
    }

    fn truncate(&self, file: &File, size: u64) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::ftruncate(file, size))?)
    }

    fn allocate(&self, file: &File, mode: Allocate, offset: u64, len: u64) -> io::Result<()> {
        let flags = match mode {
            Allocate::Extend => FallocateFlags::empty(),
            Allocate::KeepSize => FallocateFlags::KEEP_SIZE,
            Allocate::PunchHole => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        };
        Ok(retry_on_intr(|| rustix::fs::fallocate(file, flags, offset, len))?)
    }

    fn sync_file(&self, file: &File) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::fdatasync(file))?)
    }

    fn sync_inode(&self, file: &File) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::fsync(file))?)
    }

    fn stat_file(&self, file: &File) -> io::Result<Stat> {
        stat_fd(file.as_fd())
    }

    fn set_file_times(&self, file: &File, atime: SetTime, mtime: SetTime) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::futimens(file, &times_of(atime, mtime)))?)
    }

    fn next_data(&self, file: &File, offset: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(file, SeekFrom::Data(offset)) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

/// `u32::MAX` means "leave it" to the kernel, so it is no user.
fn user(id: u32) -> io::Result<Uid> {
    if id == u32::MAX { Err(Errno::INVAL.into()) } else { Ok(Uid::from_raw(id)) }
}

fn group(id: u32) -> io::Result<Gid> {
    if id == u32::MAX { Err(Errno::INVAL.into()) } else { Ok(Gid::from_raw(id)) }
}
