//! Access for the owner whom the permission bits keep out.
//!
//! The daemon owns the backing files, but users choose their modes: a file of mode 0200 must still be read to change a
//! byte in the middle of a block, one of mode 0444 rewrapped, a directory of mode 0555 emptied of its id. When the kernel
//! says `EACCES`, the owner's own bits are added for as long as the one call takes, and taken away again on every
//! path. That happens for one caller at a time in this process, and [`settled`] keeps [`super::Posix::stat`] from
//! reporting a mode that is only passing.
//!
//! Never for an inode of another user, and never where chmod(2) would drop the setgid bit for good (a group the daemon
//! is not in). Dying in between leaves the owner's bits added and nothing else changed.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{RwLock, RwLockReadGuard};
use rustix::fs::Mode;

use super::proc_path::ProcPath;

/// Held exclusively while bits are added, shared by whoever sets a mode or owner.
static MODES: RwLock<()> = RwLock::new(());
/// Odd while bits are added.
static PASSING: AtomicU64 = AtomicU64::new(0);

const READ_WRITE: u32 = 0o600;
const READ_WRITE_SEARCH: u32 = 0o700;
/// How often the bits are added for one call, if other processes that add and take them away come in between.
const TRIES: u32 = 4;

/// Held while a mode or an owner is set, so that it can't fall between adding bits and taking them away.
pub(super) fn setting_mode() -> RwLockReadGuard<'static, ()> {
    MODES.read()
}

/// Runs `look` such that no passing mode is seen.
pub(super) fn settled<T>(mut look: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let before = PASSING.load(Ordering::SeqCst);
    let seen = look();
    if before.is_multiple_of(2) && PASSING.load(Ordering::SeqCst) == before {
        return seen;
    }
    let _still = MODES.read();
    look()
}

/// Runs `call`; if it fails with `EACCES`, runs it again with the owner's read and write bits of the file `fd` set.
pub(super) fn of_file<T>(fd: BorrowedFd<'_>, call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    with_bits(&[fd], READ_WRITE, call)
}

/// Runs `call`; if it fails with `EACCES`, runs it again with all the owner's bits of the directories `dirs` set.
pub(super) fn of_dirs<T>(dirs: &[BorrowedFd<'_>], call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    with_bits(dirs, READ_WRITE_SEARCH, call)
}

fn with_bits<T>(nodes: &[BorrowedFd<'_>], bits: u32, mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let is_refusal = |e: &io::Error| e.raw_os_error() == Some(libc::EACCES);
    let mut refused = match call() {
        Err(e) if is_refusal(&e) => e,
        other => return other,
    };
    let _alone = MODES.write();
    for _ in 0..TRIES {
        PASSING.fetch_add(1, Ordering::SeqCst);
        // Declared after the lock, hence dropped before it: the modes are back before anyone may look.
        let mut added = Added::default();
        let mut open = Vec::new();
        for node in nodes {
            if added.add(*node, bits)? {
                open.push(*node);
            }
        }
        if open.is_empty() {
            break;
        }
        match call() {
            // Another process had added them, too, and has taken them away again.
            Err(e) if is_refusal(&e) && open.iter().any(|n| missing(*n, bits) != Ok(0)) => refused = e,
            other => return other,
        }
    }
    Err(refused)
}

/// What the owner has not of `bits`.
fn missing(node: BorrowedFd<'_>, bits: u32) -> rustix::io::Result<u32> {
    Ok(bits & !rustix::fs::fstat(node)?.st_mode)
}

/// Bits that are to be taken away again.
#[derive(Default)]
struct Added<'a> {
    to: Vec<(BorrowedFd<'a>, u32)>,
}

impl<'a> Added<'a> {
    /// Adds what is missing of `bits`. Says whether the owner has them now: also if they are there by now because another
    /// process, a shard of a rotation or a read-only mount, has added them for a call of its own.
    fn add(&mut self, node: BorrowedFd<'a>, bits: u32) -> io::Result<bool> {
        let stat = rustix::fs::fstat(node)?;
        let mode = stat.st_mode & 0o7777;
        let missing = bits & !mode;
        let ours = stat.st_uid == rustix::process::geteuid().as_raw();
        if missing == 0 || !ours || !keeps_setgid(mode, stat.st_gid)? {
            return Ok(missing == 0 && ours);
        }
        chmod(node, mode | missing)?;
        self.to.push((node, missing));
        Ok(true)
    }
}

impl Drop for Added<'_> {
    fn drop(&mut self) {
        for (node, missing) in self.to.drain(..).rev() {
            // The mode is read anew: the kernel may have dropped setuid or setgid bits meanwhile.
            let back = rustix::fs::fstat(node)
                .map_err(io::Error::from)
                .and_then(|stat| chmod(node, stat.st_mode & 0o7777 & !missing));
            if let Err(error) = back {
                tracing::error!(%error, added = format_args!("{missing:#o}"), "could not restore the mode of a backing inode");
            }
        }
        PASSING.fetch_add(1, Ordering::SeqCst);
    }
}

/// Whether chmod(2) by us leaves the setgid bit of `mode` alone.
fn keeps_setgid(mode: u32, gid: u32) -> io::Result<bool> {
    if mode & libc::S_ISGID == 0 || rustix::process::getegid().as_raw() == gid {
        return Ok(true);
    }
    Ok(rustix::process::getgroups()?.iter().any(|g| g.as_raw() == gid))
}

fn chmod(node: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    Ok(rustix::fs::chmod(ProcPath::of(node).as_c_str(), Mode::from_raw_mode(mode))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn bits_that_another_process_has_added_meanwhile_are_used() {
        let file = tempfile::tempfile().unwrap();
        chmod(file.as_fd(), 0o200).unwrap();
        let mut n = 0;
        let r = of_file(file.as_fd(), || {
            n += 1;
            // Refused, and open by the time that it is looked why.
            chmod(file.as_fd(), 0o600).unwrap();
            if n == 1 { Err(io::Error::from_raw_os_error(libc::EACCES)) } else { Ok(()) }
        });
        assert!(r.is_ok() && n == 2);
        let mode = rustix::fs::fstat(&file).unwrap().st_mode;
        assert_eq!(mode & 0o777, 0o600, "they are not ours to take away");
        let mut n = 0;
        let r: io::Result<()> = of_file(file.as_fd(), || {
            n += 1;
            Err(io::Error::from_raw_os_error(libc::EACCES))
        });
        assert_eq!((n, r.unwrap_err().raw_os_error()), (2, Some(libc::EACCES)), "once more, and no more");
    }

    /// Both had added them, or one had found the other's; and the other one was ready first.
    #[test]
    fn bits_that_another_process_has_taken_away_meanwhile_are_added_again() {
        let file = tempfile::tempfile().unwrap();
        let mode = || rustix::fs::fstat(&file).unwrap().st_mode & 0o777;
        let refused = || Err(io::Error::from_raw_os_error(libc::EACCES));
        for found in [0o200, 0o600] {
            chmod(file.as_fd(), 0o200).unwrap();
            let mut n = 0;
            let r = of_file(file.as_fd(), || {
                n += 1;
                match n {
                    1 => chmod(file.as_fd(), found).and_then(|()| refused()),
                    2 => chmod(file.as_fd(), 0o200).and_then(|()| refused()),
                    _ => Ok(mode()),
                }
            });
            assert_eq!((r.unwrap(), n, mode()), (0o600, 3, 0o200));
        }
        let mut n = 0;
        let r = of_file(file.as_fd(), || {
            n += 1;
            chmod(file.as_fd(), 0o200).and_then(|()| refused())
        });
        assert_eq!((r.unwrap_err().raw_os_error(), n, mode()), (Some(libc::EACCES), 1 + TRIES, 0o200));
    }
}
