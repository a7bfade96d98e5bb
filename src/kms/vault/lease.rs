//! How long a token lives, and what to do about it when. Decides only; the clock is given.

use std::time::{Duration, Instant};

/// What a token needs now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Nothing.
    Use,
    /// It is good, and can be made to live on.
    Renew,
    /// It is good, and must be replaced before long.
    Replace,
    /// It has died.
    Expired,
}

/// The life of one token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// `None`: it does not expire, or nobody knows when.
    life: Option<Life>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Life {
    expires: Instant,
    /// When to do something about it.
    act: Instant,
    renewable: bool,
}

/// Servers tell times to live in whole seconds.
const GRAIN: Duration = Duration::from_secs(1);
/// How often, at most, something that failed is tried again.
const RETRY_MIN: Duration = Duration::from_secs(1);
/// How often, at least, something that failed is tried again.
const RETRY_MAX: Duration = Duration::from_secs(30);

impl Lease {
    /// A token that does not expire, or of which nobody knows when it does.
    pub const UNKNOWN: Self = Self { life: None };

    /// A token that the server does not know any more.
    pub fn ended(now: Instant) -> Self {
        Self { life: Some(Life { expires: now, act: now, renewable: false }) }
    }

    /// A token that was granted for `ttl` at `now`; 0: for ever. Something is done about it after two thirds.
    pub fn granted(now: Instant, ttl: Duration, renewable: bool) -> Self {
        let life = now.checked_add(ttl).filter(|_| !ttl.is_zero());
        let act = now + ttl.min(Duration::from_secs(365 * 86400)) * 2 / 3;
        Self { life: life.map(|expires| Life { expires, act, renewable }) }
    }

    /// What has become of it after a renewal that was answered with `ttl`. If that is not later than before, its
    /// maximum is reached: it is not renewed again but replaced.
    pub fn renewed(self, now: Instant, ttl: Duration, renewable: bool) -> Self {
        let mut new = Self::granted(now, ttl, renewable);
        if let (Some(old), Some(life)) = (self.life, &mut new.life)
            && life.expires <= old.expires + GRAIN
        {
            life.renewable = false;
        }
        new
    }

    /// It was tried and failed for now: again in a quarter of the time that is left, within bounds.
    pub fn postponed(mut self, now: Instant) -> Self {
        if let Some(life) = &mut self.life {
            let left = life.expires.saturating_duration_since(now);
            life.act = now + (left / 4).clamp(RETRY_MIN, RETRY_MAX);
        }
        self
    }

    /// What it needs at `now`.
    pub fn next(&self, now: Instant) -> Next {
        match self.life {
            Some(l) if now >= l.expires => Next::Expired,
            Some(l) if now >= l.act && l.renewable => Next::Renew,
            Some(l) if now >= l.act => Next::Replace,
            _ => Next::Use,
        }
    }

    /// How long until it needs anything; `None`: never.
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        self.life.map(|l| l.act.saturating_duration_since(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_token_is_renewed_after_two_thirds_of_its_life() {
        let t = Instant::now();
        for (renewable, after, expected) in [
            (true, 0, Next::Use),
            (true, 59, Next::Use),
            (true, 60, Next::Renew),
            (true, 89, Next::Renew),
            (true, 90, Next::Expired),
            (false, 59, Next::Use),
            (false, 60, Next::Replace),
            (false, 90, Next::Expired),
        ] {
            let l = Lease::granted(t, s(90), renewable);
            assert_eq!(l.next(t + s(after)), expected, "{renewable} {after}");
        }
        let l = Lease::granted(t, s(90), true);
        assert_eq!((l.wait(t), l.wait(t + s(50)), l.wait(t + s(70))), (Some(s(60)), Some(s(10)), Some(s(0))));
    }

    #[test]
    fn a_token_without_an_end_needs_nothing() {
        let t = Instant::now();
        for l in [Lease::UNKNOWN, Lease::granted(t, s(0), true), Lease::granted(t, Duration::MAX, true)] {
            assert_eq!(l.next(t + s(1_000_000)), Next::Use);
            assert_eq!(l.wait(t), None);
            assert_eq!(l.postponed(t).next(t + s(1_000_000)), Next::Use);
        }
    }

    #[test]
    fn an_ended_token_is_expired_at_once_and_for_good() {
        let t = Instant::now();
        assert_eq!(Lease::ended(t).next(t), Next::Expired);
        assert_eq!(Lease::ended(t).postponed(t).next(t + s(5)), Next::Expired);
    }

    #[test]
    fn a_renewal_counts_from_its_answer_until_the_maximum_is_reached() {
        let t = Instant::now();
        let l = Lease::granted(t, s(90), true).renewed(t + s(60), s(90), true);
        for (after, expected) in
            [(60, Next::Use), (119, Next::Use), (120, Next::Renew), (149, Next::Renew), (150, Next::Expired)]
        {
            assert_eq!(l.next(t + s(after)), expected, "{after}");
        }
        // At 120 s the server has only 30 s more to give: no later than what was known.
        for ttl in [29, 30, 31] {
            let last = l.renewed(t + s(120), s(ttl), true);
            assert_eq!(last.next(t + s(120)), Next::Use);
            assert_eq!(last.next(t + s(120 + ttl - 1)), Next::Replace, "{ttl}");
            assert_eq!(last.next(t + s(120 + ttl)), Next::Expired);
        }
        assert_eq!(l.renewed(t + s(120), s(40), true).next(t + s(155)), Next::Renew);
    }

    #[test]
    fn what_failed_is_tried_again_within_bounds() {
        let t = Instant::now();
        let l = Lease::granted(t, s(900), true);
        for (at, expected) in [(600, 30), (860, 10), (899, 1), (950, 1)] {
            let now = t + s(at);
            assert_eq!(l.postponed(now).wait(now), Some(s(expected)), "{at}");
        }
        assert_eq!(l.postponed(t + s(600)).next(t + s(601)), Next::Use);
        assert_eq!(l.postponed(t + s(600)).next(t + s(631)), Next::Renew);
        assert_eq!(l.postponed(t + s(899)).next(t + s(900)), Next::Expired, "postponing does not lengthen its life");
    }
}
