//! How fast a run may go: a token bucket, over headers or whatever else a run counts. Decides only; the caller waits.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

/// A limit in headers (or other units) a second, shared by all workers of a run.
#[derive(Debug)]
pub struct Pace {
    /// Time one costs.
    each: Duration,
    /// When those granted so far will have been paid for.
    paid_until: Option<Instant>,
}

impl Pace {
    /// At most `rate` a second.
    pub fn new(rate: NonZeroU32) -> Self {
        Self { each: Duration::from_secs(1) / rate.get(), paid_until: None }
    }

    /// Grants `units` more and says how long to wait before beginning them, seen from `now`. Time that went by unused is
    /// not saved up, so a run that was paused does not go on with a burst.
    pub fn grant(&mut self, units: u32, now: Instant) -> Duration {
        let start = self.paid_until.map_or(now, |t| t.max(now));
        self.paid_until = Some(start + self.each * units);
        start - now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grants_no_more_than_the_rate() {
        let mut p = Pace::new(NonZeroU32::new(100).unwrap());
        let t = Instant::now();
        assert_eq!(p.grant(10, t), Duration::ZERO);
        assert_eq!(p.grant(1, t), Duration::from_millis(100));
        assert_eq!(p.grant(5, t + Duration::from_millis(50)), Duration::from_millis(60));
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let mut p = Pace::new(NonZeroU32::new(10).unwrap());
        let t = Instant::now();
        assert_eq!(p.grant(1, t), Duration::ZERO);
        let later = t + Duration::from_secs(60);
        assert_eq!(p.grant(2, later), Duration::ZERO);
        assert_eq!(p.grant(1, later), Duration::from_millis(200));
    }
}
