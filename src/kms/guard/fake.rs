//! A clock that tests move by hand. A sleep moves it by itself, so that nothing sleeps for real.

use super::clock::{Bell, Clock};
use parking_lot::{Condvar, Mutex};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

pub(super) struct FakeClock {
    state: Mutex<State>,
    waits: Condvar,
}

struct State {
    now: Instant,
    slept: Vec<Duration>,
    bells: Vec<Weak<Bell>>,
    waiting: usize,
}

impl FakeClock {
    pub(super) fn new() -> Arc<Self> {
        let state = State { now: Instant::now(), slept: Vec::new(), bells: Vec::new(), waiting: 0 };
        Arc::new(Self { state: Mutex::new(state), waits: Condvar::new() })
    }

    /// Moves time on, and wakes those who wait so that they look at it.
    pub(super) fn advance(&self, d: Duration) {
        let bells = {
            let mut s = self.state.lock();
            s.now += d;
            s.bells.retain(|b| b.strong_count() > 0);
            s.bells.clone()
        };
        bells.iter().filter_map(Weak::upgrade).for_each(|b| b.ring());
    }

    /// Every sleep so far.
    pub(super) fn slept(&self) -> Vec<Duration> {
        self.state.lock().slept.clone()
    }

    /// Returns when `n` threads wait for a bell.
    pub(super) fn wait_for_waiters(&self, n: usize) {
        let mut s = self.state.lock();
        while s.waiting < n {
            self.waits.wait(&mut s);
        }
    }
}

impl Clock for FakeClock {
    fn now(&self) -> Instant {
        self.state.lock().now
    }

    fn sleep(&self, d: Duration) {
        self.state.lock().slept.push(d);
        self.advance(d);
    }

    fn wait(&self, bell: &Arc<Bell>, seen: u64, until: Instant) {
        {
            let mut s = self.state.lock();
            if s.now >= until {
                return;
            }
            s.bells.push(Arc::downgrade(bell));
            s.waiting += 1;
            self.waits.notify_all();
        }
        bell.wait_until(seen, None);
        self.state.lock().waiting -= 1;
    }
}
