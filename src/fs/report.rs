//! Failures in the log: everyday ones at debug level, damage loudly but not endlessly.

use super::errno::{self, Gravity};
use crate::format::damage::Damage;
use crate::store::{StoreError, flood};

/// What a failed operation was about.
#[derive(Debug, Clone, Copy, Default)]
pub struct Report<'a> {
    /// `read`, `open`, …
    pub operation: &'static str,
    pub node: u64,
    /// The file's id, if its header was read.
    pub file: Option<&'a str>,
}

/// Logs that an operation failed and returns the errno for it.
pub fn failed(what: Report<'_>, e: &StoreError) -> i32 {
    let errno = errno::of(e);
    match errno::gravity(e) {
        Gravity::Expected => tracing::debug!(op = what.operation, node = what.node, errno, "{e}"),
        // The store has said so, with the file's id, which not everybody here knows.
        Gravity::Damage if is_of_content(e) => tracing::debug!(op = what.operation, node = what.node, errno, "{e}"),
        Gravity::Damage => {
            if let Some(skipped) = flood::admit() {
                let code = e.code();
                tracing::error!(op = what.operation, node = what.node, file = what.file, code, skipped, "{e}");
            }
        }
    }
    errno
}

/// Logs that an operation panicked. The daemon lives on and the caller gets `EIO`.
pub fn panicked(operation: &'static str, node: u64) -> i32 {
    tracing::error!(op = operation, node, "internal error: the operation panicked; please report this");
    libc::EIO
}

/// Whether it is one of the damages that [`crate::store::file`] logs where it finds them.
fn is_of_content(e: &StoreError) -> bool {
    matches!(
        e,
        StoreError::Damage(
            Damage::StateAbsent { .. }
                | Damage::StateAuth { .. }
                | Damage::BlockAuth { .. }
                | Damage::SizeShort { .. }
                | Damage::SizeGrown { .. }
        )
    )
}
