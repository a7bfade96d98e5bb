//! `/proc/self/fd/N`: the inode behind an `O_PATH` descriptor, for calls that want a path.
//!
//! Following this link ends at the inode itself, whatever it is: a symbolic link there is not followed further.
//! (`setxattrat(2)` and its like take `AT_EMPTY_PATH`, but answer `EBADF` to an `O_PATH` descriptor.)

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd};

const PREFIX: &[u8] = b"/proc/self/fd/";

pub(super) struct ProcPath {
    /// The path, then zeros, of which there is at least one: the number has at most 10 digits.
    bytes: [u8; 32],
}

impl ProcPath {
    pub(super) fn of(fd: BorrowedFd<'_>) -> Self {
        let mut number = fd.as_raw_fd().unsigned_abs();
        let mut digits = 1;
        let mut rest = number / 10;
        while rest > 0 {
            digits += 1;
            rest /= 10;
        }
        let mut bytes = [0; 32];
        bytes[..PREFIX.len()].copy_from_slice(PREFIX);
        for digit in bytes[PREFIX.len()..PREFIX.len() + digits].iter_mut().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
        }
        Self { bytes }
    }

    pub(super) fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).expect("the path is shorter than the zeroed buffer")
    }
}
