//! Reading past the page cache.

use std::os::fd::BorrowedFd;

use rustix::fs::OFlags;
use rustix::io::retry_on_intr;

const PAGE: usize = 4096;

/// A buffer as `O_DIRECT` wants it: aligned to, and as long as, the largest sector there is.
#[repr(align(4096))]
struct Aligned([u8; PAGE]);

/// Reads up to a page at `offset`, a multiple of 4096, from the disk; `None` if the file system cannot. What is dirty in
/// the cache is written back first, by the kernel. The descriptor must be the caller's alone.
pub(super) fn read(file: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Option<usize> {
    let flags = rustix::fs::fcntl_getfl(file).ok()?;
    rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT).ok()?;
    let mut page = Aligned([0; PAGE]);
    let read = retry_on_intr(|| rustix::io::pread(file, &mut page.0[..], offset));
    rustix::fs::fcntl_setfl(file, flags).ok()?;
    let n = read.ok()?.min(buf.len());
    buf.get_mut(..n)?.copy_from_slice(&page.0[..n]);
    Some(n)
}
