//! Extended attributes of any inode, symbolic links included.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::owner;
use super::proc_path::ProcPath;
use crate::backing::XattrMode;

/// Room tried first: holds any value this program writes by itself.
const FIRST_TRY: usize = 1024;
/// The kernel's own limit for a value and for a list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MOST: usize = 64 * 1024;

pub(super) fn get(node: BorrowedFd<'_>, name: &[u8]) -> io::Result<Vec<u8>> {
    let path = ProcPath::of(node);
    owner::of_file(node, || grown(|buf| rustix::fs::getxattr(path.as_c_str(), name, buf)))
}

pub(super) fn set(node: BorrowedFd<'_>, name: &[u8], value: &[u8], mode: XattrMode) -> io::Result<()> {
    let flags = match mode {
        XattrMode::Any => XattrFlags::empty(),
        XattrMode::Create => XattrFlags::CREATE,
        XattrMode::Replace => XattrFlags::REPLACE,
    };
    let path = ProcPath::of(node);
    changes(node, name, || rustix::fs::setxattr(path.as_c_str(), name, value, flags))
}

pub(super) fn remove(node: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    let path = ProcPath::of(node);
    changes(node, name, || rustix::fs::removexattr(path.as_c_str(), name))
}

pub(super) fn list(node: BorrowedFd<'_>) -> io::Result<Vec<Vec<u8>>> {
    let path = ProcPath::of(node);
    let names = grown(|buf| rustix::fs::listxattr(path.as_c_str(), buf))?;
    Ok(names.split(|b| *b == 0).filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect())
}

/// An ACL changes the permission bits too; other attributes ask for write permission.
fn changes(node: BorrowedFd<'_>, name: &[u8], call: impl Fn() -> rustix::io::Result<()>) -> io::Result<()> {
    if name.starts_with(b"system.") {
        let _mode = owner::setting_mode();
        return Ok(call()?);
    }
    owner::of_file(node, || Ok(call()?))
}

/// Calls `read` with more and more room.
fn grown(mut read: impl FnMut(&mut [u8]) -> rustix::io::Result<usize>) -> io::Result<Vec<u8>> {
    let mut room = FIRST_TRY;
    loop {
        let mut buf = vec![0; room];
        match read(&mut buf) {
            Ok(len) => {
                buf.truncate(len);
                return Ok(buf);
            }
            Err(Errno::RANGE) if room < MOST => room = MOST,
            Err(e) => return Err(e.into()),
        }
    }
}
