//! Between fuser's types and ours.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo, RenameFlags, TimeOrNow};

use crate::backing::{Kind, RenameMode, SetTime, Timestamp};
use crate::store::Attr;
use crate::store::file::FileAllocate;

/// Block size that stat(2) reports: the unit of encryption.
const BLOCK_SIZE: u32 = 4096;

pub(super) fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Dir => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
    }
}

/// The kind that `S_IFMT` bits name; none there means a regular file, as for mknod(2).
pub(super) fn kind_of(mode: u32) -> Option<Kind> {
    Some(match mode & libc::S_IFMT {
        0 | libc::S_IFREG => Kind::File,
        libc::S_IFIFO => Kind::Fifo,
        libc::S_IFSOCK => Kind::Socket,
        libc::S_IFCHR => Kind::CharDevice,
        libc::S_IFBLK => Kind::BlockDevice,
        _ => return None,
    })
}

/// `attr` as the attributes of `node`: fuser takes the node id from there.
pub(super) fn file_attr(node: u64, a: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(node),
        size: a.size,
        blocks: a.blocks,
        atime: system_time(a.atime),
        mtime: system_time(a.mtime),
        ctime: system_time(a.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(a.kind),
        // 12 bits.
        perm: (a.mode & 0o7777) as u16,
        nlink: u32::try_from(a.nlink).unwrap_or(u32::MAX),
        uid: a.uid,
        gid: a.gid,
        rdev: device_number(a.rdev),
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

/// A device number as the FUSE protocol has it: the kernel's 32-bit encoding.
fn device_number(rdev: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The reverse.
pub(super) fn rdev(n: u32) -> u64 {
    rustix::fs::makedev((n & 0x000f_ff00) >> 8, (n & 0xff) | ((n >> 12) & 0x000f_ff00))
}

fn system_time(t: Timestamp) -> SystemTime {
    let whole = match u64::try_from(t.sec) {
        Ok(after) => UNIX_EPOCH.checked_add(Duration::from_secs(after)),
        Err(_) => UNIX_EPOCH.checked_sub(Duration::from_secs(t.sec.unsigned_abs())),
    };
    whole.and_then(|w| w.checked_add(Duration::from_nanos(t.nsec.into()))).unwrap_or(UNIX_EPOCH)
}

pub(super) fn set_time(t: Option<TimeOrNow>) -> SetTime {
    match t {
        None => SetTime::Omit,
        Some(TimeOrNow::Now) => SetTime::Now,
        Some(TimeOrNow::SpecificTime(t)) => SetTime::At(timestamp(t)),
    }
}

/// The kernel's seconds and nanoseconds back from what fuser made of them. Before 1970 fuser 0.18 goes back by the
/// nanoseconds too, where the kernel means forward; the two numbers survive that and are read off again here.
fn timestamp(t: SystemTime) -> Timestamp {
    match t.duration_since(UNIX_EPOCH) {
        Ok(d) => Timestamp { sec: i64::try_from(d.as_secs()).unwrap_or(i64::MAX), nsec: d.subsec_nanos() },
        Err(before) => {
            let d = before.duration();
            Timestamp { sec: 0i64.saturating_sub_unsigned(d.as_secs()), nsec: d.subsec_nanos() }
        }
    }
}

/// "There is no such name", in a form that the kernel remembers: an entry with node id 0.
pub(super) fn absent() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

pub(super) fn allocate_mode(mode: i32) -> Option<FileAllocate> {
    const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
    const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
    const ZERO_KEEP: i32 = ZERO | KEEP;
    Some(match mode {
        0 => FileAllocate::Default,
        KEEP => FileAllocate::KeepSize,
        PUNCH => FileAllocate::PunchHole,
        ZERO => FileAllocate::ZeroRange { keep_size: false },
        ZERO_KEEP => FileAllocate::ZeroRange { keep_size: true },
        _ => return None,
    })
}

pub(super) fn rename_mode(flags: RenameFlags) -> Option<RenameMode> {
    match flags {
        f if f.is_empty() => Some(RenameMode::Replace),
        RenameFlags::RENAME_NOREPLACE => Some(RenameMode::NoReplace),
        RenameFlags::RENAME_EXCHANGE => Some(RenameMode::Exchange),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive() {
        for (major, minor) in [(1, 3), (8, 0), (259, 1), (4095, 0xf_ffff), (0, 0), (7, 300)] {
            let dev = rustix::fs::makedev(major, minor);
            assert_eq!(rdev(device_number(dev)), dev, "{major}:{minor}");
        }
    }

    #[test]
    fn times_before_1970_are_what_the_kernel_meant() {
        // What fuser makes of (-2 s, 800 ms), which is 1.2 s before 1970.
        let fusers = UNIX_EPOCH - Duration::new(2, 800_000_000);
        assert_eq!(timestamp(fusers), Timestamp { sec: -2, nsec: 800_000_000 });
        let shown = system_time(Timestamp { sec: -2, nsec: 800_000_000 });
        assert_eq!(shown, UNIX_EPOCH - Duration::new(1, 200_000_000));
    }

    #[test]
    fn no_time_panics() {
        for sec in [i64::MIN, i64::MIN + 1, -1, 0, i64::MAX] {
            for nsec in [0, 999_999_999] {
                let _ = system_time(Timestamp { sec, nsec });
            }
        }
    }

    #[test]
    fn kinds_and_modes_agree() {
        assert_eq!(kind_of(libc::S_IFIFO | 0o644), Some(Kind::Fifo));
        assert_eq!(kind_of(0o644), Some(Kind::File));
        assert_eq!(kind_of(libc::S_IFDIR), None);
    }
}
