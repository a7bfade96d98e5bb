//! How long users of the store wait, while somebody wants to know: background work listens here, so that it can make
//! room for them.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What is waited for. Each kind is compared with itself only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Open,
    Create,
    Read,
    Write,
    Sync,
}

/// Number of kinds.
pub const KINDS: usize = 5;
/// Buckets of a histogram: four for each doubling, from a microsecond to about a minute.
const BUCKETS: usize = 4 * 26;

/// How many calls took how long, in buckets a fifth wide.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram([u64; BUCKETS]);

impl Default for Histogram {
    fn default() -> Self {
        Self([0; BUCKETS])
    }
}

/// The bucket of a duration: its binary exponent and the two bits below, of its length in quarter microseconds.
fn bucket(d: Duration) -> usize {
    let n = u64::try_from(d.as_nanos() / 250).unwrap_or(u64::MAX).max(4);
    let exponent = n.ilog2() as usize;
    let below = (n >> (exponent - 2)) as usize & 3;
    ((exponent - 2) * 4 + below).min(BUCKETS - 1)
}

impl Histogram {
    /// Calls counted.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The bucket below whose end lie `part` of the calls; `None` if there were fewer than `least`.
    pub fn quantile(&self, part: f64, least: u64) -> Option<Level> {
        let total = self.total();
        if total < least.max(1) {
            return None;
        }
        let mut below = 0;
        let wanted = (total as f64 * part).ceil() as u64;
        self.0
            .iter()
            .position(|n| {
                below += n;
                below >= wanted
            })
            .map(Level)
    }

    /// Calls that took longer than `level` by at least `buckets` whole buckets, of which four are a doubling.
    pub fn above(&self, level: Level, buckets: usize) -> u64 {
        self.0.iter().skip(level.0 + buckets + 1).sum()
    }

    /// Takes in what another one counted.
    pub fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| *a += b);
    }

    /// Forgets half.
    pub fn fade(&mut self) {
        self.0.iter_mut().for_each(|n| *n /= 2);
    }

    /// Counts one call.
    pub fn record(&mut self, took: Duration) {
        if let Some(n) = self.0.get_mut(bucket(took)) {
            *n += 1;
        }
    }
}

/// A length of time, as exact as a [`Histogram`] tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(usize);

type Counts = [[AtomicU64; BUCKETS]; KINDS];

/// The measuring point of one open store.
#[derive(Debug)]
pub struct Load {
    listening: AtomicBool,
    /// Background workers that are at work just now.
    working: AtomicUsize,
    quiet: Box<Counts>,
    busy: Box<Counts>,
}

/// Histograms by [`Kind`].
pub type Histograms = [Histogram; KINDS];

impl Default for Load {
    fn default() -> Self {
        let counts = || Box::new(std::array::from_fn(|_| std::array::from_fn(|_| AtomicU64::new(0))));
        Self { listening: AtomicBool::new(false), working: AtomicUsize::new(0), quiet: counts(), busy: counts() }
    }
}

impl Load {
    /// Runs `f`, a user's call, and measures it if anybody listens.
    pub fn measure<R>(&self, kind: Kind, f: impl FnOnce() -> R) -> R {
        if !self.listening.load(Ordering::Relaxed) {
            return f();
        }
        let began = Instant::now();
        let busy_before = self.working.load(Ordering::Relaxed) > 0;
        let r = f();
        let busy = busy_before || self.working.load(Ordering::Relaxed) > 0;
        let counts = if busy { &self.busy } else { &self.quiet };
        if let Some(n) = counts.get(kind as usize).and_then(|k| k.get(bucket(began.elapsed()))) {
            n.fetch_add(1, Ordering::Relaxed);
        }
        r
    }

    /// Begins or ends listening. What was counted before is forgotten.
    pub fn listen(&self, on: bool) {
        self.listening.store(on, Ordering::Relaxed);
        self.take();
    }

    /// A background worker begins (`true`) or stops being at work.
    pub fn work(&self, on: bool) {
        if on {
            self.working.fetch_add(1, Ordering::Relaxed);
        } else {
            self.working.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// What was counted since the last look: while no worker was at work, and while one was.
    pub fn take(&self) -> (Histograms, Histograms) {
        let drain = |c: &Counts| -> Histograms {
            std::array::from_fn(|k| Histogram(std::array::from_fn(|i| c[k][i].swap(0, Ordering::Relaxed))))
        };
        (drain(&self.quiet), drain(&self.busy))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn buckets_go_up_with_time_and_are_a_fifth_wide() {
        let us = Duration::from_micros;
        assert_eq!(bucket(Duration::ZERO), 0);
        assert_eq!(bucket(us(1)), 0);
        assert_eq!(bucket(us(2)), 4);
        assert_eq!(bucket(us(1024)), 40);
        assert_eq!(bucket(us(1024 + 256)), 41);
        assert_eq!(bucket(Duration::from_secs(1 << 20)), BUCKETS - 1);
    }

    proptest! {
        #[test]
        fn a_longer_time_is_never_in_a_lower_bucket(a in 0u64..100_000_000, b in 0u64..100_000_000) {
            let (short, long) = (a.min(b), a.max(b));
            prop_assert!(bucket(Duration::from_micros(short)) <= bucket(Duration::from_micros(long)));
        }
    }

    #[test]
    fn quantiles_and_what_lies_above() {
        let mut h = Histogram::default();
        assert_eq!(h.quantile(0.99, 1), None);
        (0..99).for_each(|_| h.record(Duration::from_micros(100)));
        h.record(Duration::from_micros(1000));
        let level = h.quantile(0.99, 100).unwrap();
        assert_eq!(level, Level(bucket(Duration::from_micros(100))));
        assert_eq!(h.quantile(0.99, 101), None);
        assert_eq!((h.above(level, 0), h.above(level, 4), h.above(level, 16)), (1, 1, 0));
        h.fade();
        assert_eq!(h.total(), 49);
    }

    #[test]
    fn calls_are_told_apart_by_whether_somebody_worked_meanwhile() {
        let load = Load::default();
        load.measure(Kind::Read, || ());
        load.listen(true);
        load.measure(Kind::Read, || ());
        load.work(true);
        load.measure(Kind::Sync, || ());
        load.work(false);
        load.measure(Kind::Open, || load.work(true));
        let (quiet, busy) = load.take();
        let totals = |h: &Histograms| h.iter().map(Histogram::total).collect::<Vec<_>>();
        assert_eq!((totals(&quiet), totals(&busy)), (vec![0, 0, 1, 0, 0], vec![1, 0, 0, 0, 1]));
        assert_eq!(load.take().0[2].total(), 0);
    }
}
