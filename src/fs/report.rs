//! Failures in the log: everyday ones at debug level, damage loudly but not endlessly.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::errno::{self, Gravity};
use crate::format::damage::Damage;
use crate::store::StoreError;

/// Loud lines that may be written in [`WINDOW`]; more are counted.
const LINES: u32 = 50;
const WINDOW: Duration = Duration::from_secs(10);

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
        Gravity::Damage => {
            if let Some(skipped) = LIMIT.lock().admit(Instant::now()) {
                let block = block_of(e);
                let code = e.code();
                tracing::error!(op = what.operation, node = what.node, file = what.file, block, code, skipped, "{e}");
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

fn block_of(e: &StoreError) -> Option<u64> {
    match e {
        StoreError::Damage(Damage::BlockAuth { block }) => Some(*block),
        _ => None,
    }
}

static LIMIT: Mutex<Limit> = Mutex::new(Limit { since: None, lines: 0, skipped: 0 });

/// Lets [`LINES`] through in each [`WINDOW`].
struct Limit {
    since: Option<Instant>,
    lines: u32,
    skipped: u64,
}

impl Limit {
    /// Whether a line may be written now; if so, how many were not since the last one.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.since.is_none_or(|t| now.duration_since(t) >= WINDOW) {
            self.since = Some(now);
            self.lines = 0;
        }
        if self.lines >= LINES {
            self.skipped += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.skipped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_counted_instead_of_written() {
        let mut l = Limit { since: None, lines: 0, skipped: 0 };
        let start = Instant::now();
        for _ in 0..LINES {
            assert_eq!(l.admit(start), Some(0));
        }
        assert_eq!(l.admit(start), None);
        assert_eq!(l.admit(start + WINDOW / 2), None);
        assert_eq!(l.admit(start + WINDOW), Some(2), "the next window says what was left out");
        assert_eq!(l.admit(start + WINDOW), Some(0));
    }
}
