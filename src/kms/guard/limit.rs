//! How fast and how many at once: a token bucket, and a number of slots.

use super::clock::{Bell, Clock};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Token bucket, kept as the time at which it would be full again (the generic cell rate algorithm, ITU-T I.371): a
/// call takes its place in the queue at once, so that who waits is served in the order of arrival.
#[derive(Debug)]
pub struct Rate {
    /// Time that one call takes up; zero: no limit.
    interval: Duration,
    /// How far ahead of the rate calls may be.
    tolerance: Duration,
    origin: Instant,
    /// When, after the origin, all that has been let through is paid for.
    full_at: Duration,
}

impl Rate {
    /// `per_second` calls a second, zero for no limit, and `burst` at once, at least one.
    pub fn new(per_second: u32, burst: u32, now: Instant) -> Self {
        let interval = Duration::from_secs(1).checked_div(per_second).unwrap_or_default();
        let tolerance = interval.saturating_mul(burst.max(1) - 1);
        Self { interval, tolerance, origin: now, full_at: Duration::ZERO }
    }

    /// How long a call that comes at `now` waits for its turn; `None`, and no turn, if that is later than `deadline`.
    pub fn reserve(&mut self, now: Instant, deadline: Instant) -> Option<Duration> {
        let at = now.saturating_duration_since(self.origin);
        let full_at = self.full_at.max(at);
        let wait = full_at.saturating_sub(self.tolerance).saturating_sub(at);
        if !wait.is_zero() && now + wait >= deadline {
            return None;
        }
        self.full_at = full_at + self.interval;
        Some(wait)
    }

    /// How long until `n` calls could be made at once and the rest of the burst, of which they may use `part` per cent,
    /// would be left; `None`: now. Takes no turn. More calls than that have to find it whole.
    pub fn wait_for(&self, n: u32, part: u32, now: Instant) -> Option<Duration> {
        let at = now.saturating_duration_since(self.origin);
        let may_use = self.tolerance * part / 100;
        let more = self.interval.saturating_mul(n.saturating_sub(1)).min(may_use);
        let wait = (self.full_at.max(at) + more).saturating_sub(at + may_use);
        (!wait.is_zero()).then_some(wait)
    }

    /// Takes `n` turns at once, whether it is their time or not.
    pub fn take(&mut self, n: u32, now: Instant) {
        let at = now.saturating_duration_since(self.origin);
        self.full_at = self.full_at.max(at) + self.interval.saturating_mul(n);
    }
}

/// Slots for calls under way.
#[derive(Debug)]
pub struct Slots {
    free: Mutex<u32>,
    bell: Arc<Bell>,
}

/// One slot; free again when dropped.
#[derive(Debug)]
pub struct Slot<'a>(&'a Slots);

impl Slots {
    /// `n` slots; zero: as many as anybody wants.
    pub fn new(n: u32) -> Self {
        Self { free: Mutex::new(if n == 0 { u32::MAX } else { n }), bell: Arc::default() }
    }

    /// How many are free.
    pub fn free(&self) -> u32 {
        *self.free.lock()
    }

    /// Takes a slot, waiting for one until `deadline`.
    pub fn take(&self, clock: &dyn Clock, deadline: Instant) -> Option<Slot<'_>> {
        loop {
            let seen = self.bell.count();
            {
                let mut free = self.free.lock();
                if let Some(rest) = free.checked_sub(1) {
                    *free = rest;
                    return Some(Slot(self));
                }
            }
            if clock.now() >= deadline {
                return None;
            }
            clock.wait(&self.bell, seen, deadline);
        }
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        *self.0.free.lock() += 1;
        self.0.bell.ring();
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeClock;
    use super::*;
    use proptest::prelude::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn a_burst_goes_through_and_then_calls_are_spaced() {
        let now = Instant::now();
        let far = now + MS(60_000);
        let mut r = Rate::new(10, 3, now);
        let waits: Vec<_> = (0..5).map(|_| r.reserve(now, far)).collect();
        assert_eq!(waits, [0, 0, 0, 100, 200].map(|ms| Some(MS(ms))));
        assert_eq!(r.reserve(now, now + MS(300)), None, "its turn would come too late");
        assert_eq!(r.reserve(now, now + MS(301)), Some(MS(300)), "who was turned away has taken no turn");
        // A second brings ten turns, of which four had been taken ahead; three may be saved up.
        let later = now + MS(10_000);
        let waits: Vec<_> = (0..4).map(|_| r.reserve(later, far).unwrap()).collect();
        assert_eq!(waits, [0, 0, 0, 100].map(MS));
    }

    #[test]
    fn zero_is_no_limit_and_a_burst_is_at_least_one() {
        let now = Instant::now();
        let mut r = Rate::new(0, 0, now);
        assert!((0..10_000).all(|_| r.reserve(now, now) == Some(Duration::ZERO)));
        let mut r = Rate::new(1, 0, now);
        assert_eq!(r.reserve(now, now), Some(Duration::ZERO));
        assert_eq!(r.reserve(now, now + MS(1001)), Some(MS(1000)));
    }

    proptest! {
        /// In any stretch of time: calls begun ≤ burst + rate · length.
        #[test]
        fn the_rate_is_kept(
            per_second in 1u32..200,
            burst in 1u32..20,
            gaps in proptest::collection::vec(0u64..300, 1..200),
        ) {
            let start = Instant::now();
            let (mut r, mut now) = (Rate::new(per_second, burst, start), start);
            let mut begun = Vec::new();
            for gap in gaps {
                now += MS(gap);
                if let Some(wait) = r.reserve(now, now + MS(500)) {
                    begun.push(now + wait);
                }
            }
            for (i, from) in begun.iter().enumerate() {
                for (j, to) in begun.iter().enumerate().skip(i) {
                    let most = f64::from(burst) + (*to - *from).as_secs_f64() * f64::from(per_second);
                    prop_assert!((j - i + 1) as f64 <= most + 1e-3);
                }
            }
        }
    }

    #[test]
    fn slots_run_out_and_come_back() {
        let clock = FakeClock::new();
        let slots = Slots::new(2);
        let until = clock.now() + MS(100);
        let a = slots.take(clock.as_ref(), until).unwrap();
        let _b = slots.take(clock.as_ref(), until).unwrap();
        std::thread::scope(|s| {
            let c = s.spawn(|| slots.take(clock.as_ref(), until).is_some());
            clock.wait_for_waiters(1);
            drop(a);
            assert!(c.join().unwrap());
        });
        let _c = slots.take(clock.as_ref(), until).unwrap();
        std::thread::scope(|s| {
            let d = s.spawn(|| slots.take(clock.as_ref(), until).is_some());
            clock.wait_for_waiters(1);
            clock.advance(MS(99));
            clock.advance(MS(1));
            assert!(!d.join().unwrap(), "at the deadline it gives up");
        });
        let no_limit = Slots::new(0);
        let many: Vec<_> = (0..100).filter_map(|_| no_limit.take(clock.as_ref(), clock.now())).collect();
        assert_eq!(many.len(), 100);
    }
}
