//! How much of the time a run works, so that the store's users hardly feel it. Decides only.
//!
//! Work comes in slices, and between them all workers rest. What users wait while everybody rests tells what is usual
//! for the store, its disk and its load; the share of time spent working is halved when of any kind of call more than
//! one in a hundred takes about twice what ninety-nine in a hundred take without us, and grows slowly while it is fewer:
//! the rule by which TCP shares a line (additive increase, multiplicative decrease). Nobody there, nobody to wait for.

use crate::store::load::{Histogram, Histograms, KINDS};
use std::time::{Duration, Instant};

/// Shortest slice of work.
const SLICE: Duration = Duration::from_millis(40);
/// How often the share is thought over.
const STEP: Duration = Duration::from_millis(250);
/// After so many steps half of what is known of the usual is forgotten.
const FADE_STEPS: u32 = 32;
/// Least and greatest share while there are users: some rest is needed to know what is usual.
const LEAST: f64 = 0.02;
const GREATEST: f64 = 0.9;
/// What a run begins with.
const FIRST: f64 = 0.2;
/// By how much the share grows in a step.
const GROWTH: f64 = 0.02;
/// Calls of a kind that must have been seen at rest before it is judged.
const LEAST_SEEN: u64 = 100;
/// Of so many calls one may be slow. Stricter than the one in a hundred that is promised: slow ones come in bursts.
const SLOW_ONE_IN: u64 = 200;
/// A call is slow from so many buckets above the usual one on. A bucket is a quarter of a doubling wide and says no more
/// about what is in it, so this is between 1.7 and twice the usual: with four, the promised twice could be missed.
const SLOW_FROM: usize = 3;
/// Headers to a barrier while there are users, whose fsync waits for it.
const BURST: usize = 32;

/// The share of time for work, and when the next slice is.
#[derive(Debug)]
pub(super) struct Courtesy {
    share: f64,
    slice_began: Option<Instant>,
    rest_until: Option<Instant>,
    stepped: Option<Instant>,
    steps: u32,
    usual: Histograms,
    /// Calls of each kind judged since the last change of the share, and how many of them were slow.
    judged: [u64; KINDS],
    slow: [u64; KINDS],
}

impl Courtesy {
    pub(super) fn new() -> Self {
        Self {
            share: FIRST,
            slice_began: None,
            rest_until: None,
            stepped: None,
            steps: 0,
            usual: std::array::from_fn(|_| Histogram::default()),
            judged: [0; KINDS],
            slow: [0; KINDS],
        }
    }

    /// The share of time for work at present, 0 to 1.
    pub(super) fn share(&self) -> f64 {
        self.share
    }

    /// How many headers may be written before they are made durable together.
    pub(super) fn burst(&self) -> usize {
        if self.share < 1.0 { BURST } else { usize::MAX }
    }

    /// How long a worker that is about to begin something must rest first, at `now`.
    pub(super) fn rest(&mut self, now: Instant) -> Duration {
        if let Some(until) = self.rest_until {
            if now < until {
                return until - now;
            }
            self.rest_until = None;
            self.slice_began = None;
        }
        let worked = now.saturating_duration_since(*self.slice_began.get_or_insert(now));
        if worked < SLICE || self.share >= 1.0 {
            return Duration::ZERO;
        }
        let rest = worked.mul_f64(1.0 / self.share - 1.0).min(Duration::from_secs(5));
        self.rest_until = Some(now + rest);
        rest
    }

    /// Whether it is time to look at what users waited.
    pub(super) fn is_step_due(&mut self, now: Instant) -> bool {
        let due = now.saturating_duration_since(*self.stepped.get_or_insert(now)) >= STEP;
        if due {
            self.stepped = Some(now);
        }
        due
    }

    /// Thinks the share over with what users waited since the last step, at rest and during work.
    pub(super) fn step(&mut self, quiet: &Histograms, busy: &Histograms) {
        let calls: u64 = quiet.iter().chain(busy).map(Histogram::total).sum();
        if calls == 0 {
            self.share = (self.share * 2.0).min(1.0);
            return;
        }
        self.share = self.share.min(GREATEST);
        self.steps += 1;
        if self.steps.is_multiple_of(FADE_STEPS) {
            self.usual.iter_mut().for_each(Histogram::fade);
        }
        for (k, usual) in self.usual.iter_mut().enumerate() {
            let (Some(q), Some(b)) = (quiet.get(k), busy.get(k)) else { continue };
            usual.add(q);
            let Some(level) = usual.quantile(0.99, LEAST_SEEN) else { continue };
            if let (Some(judged), Some(slow)) = (self.judged.get_mut(k), self.slow.get_mut(k)) {
                *judged += q.total() + b.total();
                *slow += b.above(level, SLOW_FROM);
            }
        }
        // Each kind by itself: many quick reads are no comfort to somebody who waits for fsync.
        let mut each = self.judged.iter().zip(&self.slow);
        if each.any(|(judged, slow)| slow * SLOW_ONE_IN > *judged.max(&SLOW_ONE_IN)) {
            self.share = (self.share / 2.0).max(LEAST);
            (self.judged, self.slow) = ([0; KINDS], [0; KINDS]);
        } else if self.judged.iter().sum::<u64>() >= SLOW_ONE_IN {
            self.share = (self.share + GROWTH).min(GREATEST);
            self.judged.iter_mut().chain(&mut self.slow).for_each(|n| *n /= 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls(n: u64, micros: u64) -> Histograms {
        std::array::from_fn(|k| {
            let mut h = Histogram::default();
            if k == 2 {
                (0..n).for_each(|_| h.record(Duration::from_micros(micros)));
            }
            h
        })
    }

    fn none() -> Histograms {
        calls(0, 0)
    }

    #[test]
    fn alone_it_soon_works_all_the_time() {
        let mut c = Courtesy::new();
        (0..3).for_each(|_| c.step(&none(), &none()));
        assert_eq!(c.share(), 1.0);
        let t = Instant::now();
        assert_eq!(c.rest(t), Duration::ZERO);
        assert_eq!(c.rest(t + Duration::from_secs(9)), Duration::ZERO);
    }

    #[test]
    fn with_users_who_feel_nothing_the_share_grows() {
        let mut c = Courtesy::new();
        (0..100).for_each(|_| c.step(&calls(100, 50), &calls(100, 60)));
        assert_eq!(c.share(), GREATEST);
    }

    #[test]
    fn users_who_wait_make_it_give_way_down_to_the_least() {
        let mut c = Courtesy::new();
        (0..4).for_each(|_| c.step(&calls(100, 50), &none()));
        let before = c.share();
        c.step(&calls(100, 50), &calls(20, 5000));
        assert_eq!(c.share(), before / 2.0);
        (0..20).for_each(|_| c.step(&calls(100, 50), &calls(20, 5000)));
        assert_eq!(c.share(), LEAST);
    }

    #[test]
    fn slow_calls_of_one_kind_are_not_made_up_for_by_quick_ones_of_another() {
        let mut c = Courtesy::new();
        (0..4).for_each(|_| c.step(&calls(100, 50), &none()));
        let mut busy = calls(100, 50);
        busy[2].record(Duration::from_millis(5));
        busy[2].record(Duration::from_millis(5));
        busy[0] = Histogram::default();
        (0..1000).for_each(|_| busy[0].record(Duration::from_micros(50)));
        let mut quiet = calls(100, 50);
        (0..1000).for_each(|_| quiet[0].record(Duration::from_micros(50)));
        let before = c.share();
        c.step(&quiet, &busy);
        assert_eq!(c.share(), before / 2.0);
    }

    #[test]
    fn twice_the_usual_is_slow_wherever_in_its_bucket_the_usual_lies() {
        for usual in [512, 600, 620, 700, 767, 768, 900, 1000] {
            let mut c = Courtesy::new();
            (0..4).for_each(|_| c.step(&calls(100, usual), &none()));
            let before = c.share();
            c.step(&calls(100, usual), &calls(100, 2 * usual));
            assert_eq!(c.share(), before / 2.0, "{usual}");
        }
    }

    #[test]
    fn bursts_are_short_while_there_are_users() {
        let mut c = Courtesy::new();
        c.step(&calls(100, 50), &none());
        assert_eq!(c.burst(), BURST);
        (0..3).for_each(|_| c.step(&none(), &none()));
        assert_eq!(c.burst(), usize::MAX);
        c.step(&calls(100, 50), &none());
        assert_eq!(c.burst(), BURST);
    }

    #[test]
    fn a_load_that_is_slow_by_itself_is_not_our_doing() {
        let mut c = Courtesy::new();
        (0..50).for_each(|_| c.step(&calls(100, 5000), &calls(100, 6000)));
        assert!(c.share() > FIRST);
    }

    #[test]
    fn work_and_rest_take_turns_for_all_workers() {
        let mut c = Courtesy::new();
        let (t, ms) = (Instant::now(), Duration::from_millis);
        assert_eq!(c.rest(t), Duration::ZERO);
        assert_eq!(c.rest(t + ms(30)), Duration::ZERO);
        // One fifth work: four times as long at rest.
        assert_eq!(c.rest(t + ms(50)), ms(200));
        assert_eq!(c.rest(t + ms(60)), ms(190), "another worker rests until the same time");
        assert_eq!(c.rest(t + ms(250)), Duration::ZERO);
        assert_eq!(c.rest(t + ms(280)), Duration::ZERO);
    }

    #[test]
    fn steps_have_their_time() {
        let (mut c, t) = (Courtesy::new(), Instant::now());
        assert!(!c.is_step_due(t));
        assert!(!c.is_step_due(t + STEP / 2));
        assert!(c.is_step_due(t + STEP));
        assert!(!c.is_step_due(t + STEP));
    }
}
