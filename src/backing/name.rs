//! Names of directory entries.

use std::io;

/// Longest name, in bytes, on every file system that matters here (`NAME_MAX`).
pub const NAME_MAX: usize = 255;

/// A name of one component; anything else could lead out of its directory. `ENOENT` if it is empty, `EINVAL` if it
/// holds a slash or a zero byte, is `.` or `..`.
pub(super) fn one_name(name: &[u8]) -> io::Result<&[u8]> {
    match name {
        b"" => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ if name.iter().any(|b| matches!(b, b'/' | 0)) => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(name),
    }
}
