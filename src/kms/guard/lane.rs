//! The share of a root key's calls that goes to work no user waits for. Decides only.
//!
//! Users go first: a lane never takes a place in their queue. It asks for leave, has it only while it keeps to a rate of
//! its own and the common limits have more left than is kept for users, and is told to come again otherwise. The calls
//! themselves then go the way of all calls.

use super::limit::Rate;
use std::time::{Duration, Instant};

/// Work that nobody waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Background {
    /// A rotation.
    Rotation,
    /// Keys made or unwrapped ahead of need.
    Ahead,
}

/// How soon who was sent away for want of a free slot may come again.
const SLOT_AGAIN: Duration = Duration::from_millis(5);
/// A rotation that users have kept waiting for so long is let through once, so that it ends some day.
const PATIENCE: Duration = Duration::from_secs(1);

/// What is common to all calls, at the time of asking.
#[derive(Debug, Clone, Copy)]
pub struct Common<'a> {
    pub rate: &'a Rate,
    /// Calls that may be under way at once, and how many more may begin now.
    pub slots: u32,
    pub free: u32,
}

/// One kind of background work.
#[derive(Debug)]
pub struct Lane {
    rate: Rate,
    /// Per cent of the common limits.
    share: u32,
    patience: Option<Duration>,
    /// Since when users have been in the way.
    held_since: Option<Instant>,
}

impl Lane {
    /// `share` per cent, 1 to 100, of `per_second` calls a second (0: no limit) and `burst` at once.
    pub fn new(whose: Background, share: u32, per_second: u32, burst: u32, now: Instant) -> Self {
        let part = |n: u32| u32::try_from(u64::from(n) * u64::from(share) / 100).unwrap_or(u32::MAX);
        let per_second = if per_second == 0 { 0 } else { part(per_second).max(1) };
        let patience = (whose == Background::Rotation).then_some(PATIENCE);
        Self { rate: Rate::new(per_second, part(burst).max(1), now), share, patience, held_since: None }
    }

    /// Leave for `calls` calls at `now`, or how long to wait before asking again.
    ///
    /// # Errors
    /// That time.
    pub fn ask(&mut self, calls: u32, common: Common<'_>, now: Instant) -> Result<(), Duration> {
        // Its own rate holds in any case.
        self.rate.wait_for(calls, 100, now).map_or(Ok(()), Err)?;
        let kept = u64::from(common.slots) * u64::from(100 - self.share) / 100;
        let slots = (common.slots > 0 && u64::from(common.free) <= kept).then_some(SLOT_AGAIN);
        let users = common.rate.wait_for(calls, self.share, now).or(slots);
        if let Some(wait) = users {
            let since = *self.held_since.get_or_insert(now);
            if self.patience.is_none_or(|p| now.saturating_duration_since(since) < p) {
                return Err(self.patience.map_or(wait, |p| wait.min(p)));
            }
        }
        self.held_since = None;
        self.rate.take(calls, now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn common(rate: &Rate) -> Common<'_> {
        Common { rate, slots: 32, free: 32 }
    }

    #[test]
    fn it_keeps_to_its_share_of_the_rate() {
        let t = Instant::now();
        let rate = Rate::new(100, 100, t);
        let mut lane = Lane::new(Background::Rotation, 50, 100, 4, t);
        assert_eq!(lane.ask(1, common(&rate), t), Ok(()));
        assert_eq!(lane.ask(1, common(&rate), t), Ok(()), "half of the burst");
        assert_eq!(lane.ask(1, common(&rate), t), Err(MS(20)), "half of the rate");
        assert_eq!(lane.ask(1, common(&rate), t + MS(20)), Ok(()));
        let given = (0..1000).filter(|ms| lane.ask(1, common(&rate), t + MS(1020 + ms)).is_ok()).count();
        assert!((50..=52).contains(&given), "{given}");
    }

    #[test]
    fn users_go_first_and_their_part_of_the_burst_is_left_to_them() {
        let t = Instant::now();
        let mut rate = Rate::new(100, 10, t);
        let mut lane = Lane::new(Background::Ahead, 50, 100, 10, t);
        (0..4).for_each(|_| assert!(rate.reserve(t, t + MS(1)).is_some()));
        assert_eq!(lane.ask(1, common(&rate), t), Ok(()));
        rate.reserve(t, t + MS(1));
        let wait = lane.ask(1, common(&rate), t).unwrap_err();
        assert!(wait > Duration::ZERO && wait <= MS(10), "{wait:?}");
        assert_eq!(rate.reserve(t, t + MS(1)), Some(Duration::ZERO), "a user has his turn at once");
        assert!(lane.ask(1, common(&rate), t + wait).is_err(), "which puts off the one that waits");
        assert_eq!(lane.ask(1, common(&rate), t + MS(100)), Ok(()));
    }

    #[test]
    fn slots_are_kept_for_users() {
        let t = Instant::now();
        let rate = Rate::new(0, 1, t);
        let mut lane = Lane::new(Background::Ahead, 25, 0, 1, t);
        for (free, leave) in [(32, true), (25, true), (24, false), (0, false)] {
            let c = Common { rate: &rate, slots: 32, free };
            assert_eq!(lane.ask(1, c, t).is_ok(), leave, "{free}");
        }
        assert_eq!(lane.ask(1, Common { rate: &rate, slots: 0, free: 0 }, t), Ok(()), "without a limit none is kept");
    }

    #[test]
    fn a_rotation_gets_on_however_busy_users_are_and_what_is_ahead_of_need_does_not() {
        let t = Instant::now();
        let rate = Rate::new(0, 1, t);
        let busy = Common { rate: &rate, slots: 32, free: 0 };
        let mut given = [0, 0];
        for (whose, n) in [Background::Rotation, Background::Ahead].into_iter().zip(&mut given) {
            let mut lane = Lane::new(whose, 50, 0, 1, t);
            *n = (0..10_000).step_by(5).filter(|ms| lane.ask(3, busy, t + MS(*ms)).is_ok()).count();
        }
        assert_eq!(given, [9, 0]);
    }

    #[test]
    fn more_calls_than_the_burst_are_let_through_by_an_empty_bucket() {
        let t = Instant::now();
        let rate = Rate::new(1, 1, t);
        let mut lane = Lane::new(Background::Rotation, 50, 1, 1, t);
        assert_eq!(lane.ask(3, common(&rate), t), Ok(()));
        assert_eq!(lane.ask(3, common(&rate), t + MS(1)), Err(MS(2999)));
        assert_eq!(lane.ask(3, common(&rate), t + MS(3000)), Ok(()));
    }
}
