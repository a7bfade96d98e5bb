//! Time as the guard sees it, so that tests decide what time it is and nothing has to sleep.

use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Tells the time and waits.
pub trait Clock: Send + Sync {
    /// Now.
    fn now(&self) -> Instant;

    /// Returns when `d` has passed.
    fn sleep(&self, d: Duration);

    /// Returns when `bell` has been rung more often than `seen` times, or at `until`; perhaps sooner.
    fn wait(&self, bell: &Arc<Bell>, seen: u64, until: Instant);
}

/// The machine's own clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn sleep(&self, d: Duration) {
        std::thread::sleep(d);
    }

    fn wait(&self, bell: &Arc<Bell>, seen: u64, until: Instant) {
        bell.wait_until(seen, Some(until));
    }
}

/// Wakes those who wait for something to change. Who waits looks at the count first, then at what it waits for: a
/// change between the look and the wait is then a ring that the count has not seen, and nobody sleeps through it.
#[derive(Debug, Default)]
pub struct Bell {
    rung: Mutex<u64>,
    changed: Condvar,
}

impl Bell {
    /// How often it has been rung.
    pub fn count(&self) -> u64 {
        *self.rung.lock()
    }

    /// Wakes everybody.
    pub fn ring(&self) {
        *self.rung.lock() += 1;
        self.changed.notify_all();
    }

    /// Returns when it has been rung more often than `seen` times, or at `until` by the machine's clock.
    pub fn wait_until(&self, seen: u64, until: Option<Instant>) {
        let mut rung = self.rung.lock();
        while *rung == seen {
            match until {
                None => self.changed.wait(&mut rung),
                Some(t) if self.changed.wait_until(&mut rung, t).timed_out() => return,
                Some(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_before_the_wait_is_not_slept_through() {
        let bell = Arc::new(Bell::default());
        let seen = bell.count();
        bell.ring();
        bell.wait_until(seen, None);
        // Time that is over already ends a wait, too.
        SystemClock.wait(&bell, bell.count(), SystemClock.now());
    }

    #[test]
    fn a_ring_wakes_everybody() {
        let bell = Arc::new(Bell::default());
        let seen = bell.count();
        std::thread::scope(|s| {
            let waiting: Vec<_> = (0..4).map(|_| s.spawn(|| bell.wait_until(seen, None))).collect();
            bell.ring();
            waiting.into_iter().for_each(|w| w.join().unwrap());
        });
    }
}
