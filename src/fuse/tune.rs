//! The kernel's limit on dirty pages of the mount.

use std::fs;
use std::io;
use std::path::Path;

/// Lets the mount with device number `dev` fill the whole of the memory that may hold dirty pages. FUSE mounts begin
/// with 1 %, which throttles buffered writes to a half or a third of what the writeback cache could take. Root only.
///
/// # Errors
/// Those of writing the file in `/sys`.
pub(super) fn raise_dirty_limit(dev: u64) -> io::Result<()> {
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    fs::write(Path::new("/sys/class/bdi").join(format!("{major}:{minor}")).join("max_ratio"), "100")
}
