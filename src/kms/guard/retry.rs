//! When a failed call is tried again, and how long after.
//!
//! The pause is exponential with full jitter: uniform between zero and min(cap, base · 2ⁿ) ("Exponential Backoff And
//! Jitter", AWS Architecture Blog, 2015), which spreads clients that failed together best. A budget as in Finagle and
//! gRPC keeps all calls together from multiplying the load of a service that is down: each call earns a tenth of a
//! retry, and a small reserve that comes back with time lets a client that rarely calls retry at all.

use std::time::{Duration, Instant};

/// Ceiling of the first pause.
const BASE: Duration = Duration::from_millis(200);
/// Ceiling of any pause.
const CAP: Duration = Duration::from_secs(2);

/// How often a call is made, and the pauses between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Attempts, the first one included.
    pub attempts: u32,
    pub base: Duration,
    pub cap: Duration,
}

impl Policy {
    /// At most `attempts`, at least one.
    pub fn new(attempts: u32) -> Self {
        Self { attempts: attempts.max(1), base: BASE, cap: CAP }
    }

    /// The pause after `made` attempts have failed, of which the last ended at `now`; `None` if there is to be no other
    /// before `deadline`. `random` is uniform over all of u64.
    pub fn pause(&self, made: u32, random: u64, now: Instant, deadline: Instant) -> Option<Duration> {
        if made >= self.attempts {
            return None;
        }
        let doubled = self.base.saturating_mul(1u32.checked_shl(made.saturating_sub(1)).unwrap_or(u32::MAX));
        let pause = part(doubled.min(self.cap), random);
        // What could not begin before the deadline is not waited for.
        (now + pause < deadline).then_some(pause)
    }
}

/// `random` / 2⁶⁴ of `d`.
pub fn part(d: Duration, random: u64) -> Duration {
    let nanos = (d.as_nanos() * u128::from(random)) >> 64;
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// Thousandths of a retry that one call earns, and that one retry costs.
const EARNED: u64 = 100;
const COST: u64 = 1000;
/// What there is at first, and what time alone brings back, in thousandths.
const RESERVE: u64 = 10 * COST;
/// Most that calls can earn: so many retries at once are no storm to a service that took ten times as many calls.
const MOST: u64 = 100 * COST;
/// Time alone brings back a thousandth of a retry in this time: ten retries in a minute.
const GRAIN: Duration = Duration::from_millis(6);

/// The retries that all calls of one provider share: at most a tenth of the calls, and 10, and 10 a minute.
#[derive(Debug)]
pub struct Budget {
    balance: u64,
    /// Up to when time has been credited.
    credited: Instant,
}

impl Budget {
    /// One with the whole reserve.
    pub fn new(now: Instant) -> Self {
        Self { balance: RESERVE, credited: now }
    }

    /// A call is made.
    pub fn earn(&mut self) {
        self.balance = (self.balance + EARNED).min(MOST);
    }

    /// Whether a call may be retried at `now`; if so, it is paid for.
    pub fn spend(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.credited);
        let brought = u32::try_from(passed.as_nanos() / GRAIN.as_nanos()).unwrap_or(u32::MAX);
        // Not the whole time: what is too short for a thousandth is not lost.
        self.credited += GRAIN.saturating_mul(brought);
        if self.balance < RESERVE {
            self.balance = (self.balance + u64::from(brought)).min(RESERVE);
        }
        match self.balance.checked_sub(COST) {
            Some(rest) => {
                self.balance = rest;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pauses_double_up_to_the_cap_and_end_with_the_attempts() {
        let p = Policy { attempts: 9, base: Duration::from_millis(200), cap: Duration::from_secs(2) };
        let (now, never) = (Instant::now(), Instant::now() + Duration::from_secs(3600));
        // (attempts made, ceiling in milliseconds)
        for (made, ceiling) in [(1, 200), (2, 400), (3, 800), (4, 1600), (5, 2000), (8, 2000)] {
            let ceiling = Duration::from_millis(ceiling);
            assert_eq!(p.pause(made, 0, now, never), Some(Duration::ZERO));
            assert_eq!(p.pause(made, 1 << 63, now, never), Some(ceiling / 2), "{made}");
            let most = p.pause(made, u64::MAX, now, never).unwrap();
            assert!(most < ceiling && ceiling - most <= Duration::from_nanos(1), "{made}");
        }
        assert_eq!(p.pause(9, 0, now, never), None);
        assert_eq!(Policy { attempts: u32::MAX, ..p }.pause(1 << 30, 1 << 63, now, never), Some(p.cap / 2));
        assert_eq!(Policy::new(0).attempts, 1);
    }

    #[test]
    fn no_pause_reaches_the_deadline() {
        let (p, now, half) = (Policy::new(4), Instant::now(), 1 << 63);
        assert_eq!(p.pause(1, half, now, now + BASE / 2), None);
        assert_eq!(p.pause(1, half, now, now + BASE / 2 + Duration::from_nanos(1)), Some(BASE / 2));
        assert_eq!(p.pause(1, 0, now + BASE, now), None, "it is over already");
    }

    #[test]
    fn the_reserve_comes_back_with_time_but_no_more_than_it() {
        let now = Instant::now();
        let mut b = Budget::new(now);
        let spend_all = |b: &mut Budget, now| (0..1000).take_while(|_| b.spend(now)).count();
        assert_eq!(spend_all(&mut b, now), 10);
        assert!(!b.spend(now + GRAIN * 999));
        assert_eq!(spend_all(&mut b, now + GRAIN * 1000), 1);
        assert_eq!(spend_all(&mut b, now + GRAIN * 1_000_000), 10);
        assert!(!b.spend(now), "a clock that was read earlier earns nothing");
        for _ in 0..9 {
            b.earn();
            assert!(!b.spend(now));
        }
        b.earn();
        assert!(b.spend(now));
    }

    proptest! {
        /// Whatever happens: retries ≤ 10 + calls / 10 + minutes · 10.
        #[test]
        fn retries_stay_within_the_budget(steps in proptest::collection::vec((0u8..3, 0u64..2000), 0..400)) {
            let start = Instant::now();
            let (mut b, mut now, mut calls, mut retries) = (Budget::new(start), start, 0u64, 0u64);
            for (what, ms) in steps {
                match what {
                    0 => { calls += 1; b.earn(); }
                    1 => retries += u64::from(b.spend(now)),
                    _ => now += Duration::from_millis(ms),
                }
                let ms = u64::try_from((now - start).as_millis()).unwrap();
                prop_assert!(retries * COST <= RESERVE + calls * EARNED + ms / 6 + 1);
            }
        }

        #[test]
        fn a_pause_is_within_its_ceiling_and_grows_with_the_draw(made in 1u32..40, a: u64, b: u64) {
            let (p, now) = (Policy::new(50), Instant::now());
            let pause = |r| p.pause(made, r, now, now + Duration::from_secs(60)).unwrap();
            prop_assert!(pause(a) < p.cap && pause(a) < p.base * 2u32.pow(made.min(30) - 1));
            prop_assert_eq!(pause(a.min(b)).min(pause(a.max(b))), pause(a.min(b)));
        }
    }
}
