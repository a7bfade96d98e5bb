//! Loud lines in the log, but not endlessly: damage can be met a thousand times a second.

use parking_lot::Mutex;
use std::time::{Duration, Instant};

/// Loud lines that may be written in [`WINDOW`]; more are counted.
const LINES: u32 = 50;
const WINDOW: Duration = Duration::from_secs(10);

/// Whether a loud line may be written now; if so, how many were left out before it.
pub fn admit() -> Option<u64> {
    LIMIT.lock().admit(Instant::now())
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
