//! Pause, resume and cancel a running rotation from another thread.

use parking_lot::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// The run was asked to stop. What it had done so far stands: the store is valid, with headers under both KEKs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("rotation was cancelled")]
pub struct Cancelled;

#[derive(Debug, Default)]
struct Wishes {
    paused: bool,
    cancelled: bool,
}

/// Switches of one run. Legal in every state, in any order and any number of times; a cancel cannot be taken back.
#[derive(Debug, Default)]
pub struct Control {
    wishes: Mutex<Wishes>,
    changed: Condvar,
}

impl Control {
    /// Switches of a run that is neither paused nor cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets every worker stop before its next header, until [`Control::resume`] or [`Control::cancel`].
    pub fn pause(&self) {
        self.wishes.lock().paused = true;
        self.changed.notify_all();
    }

    /// Ends a pause.
    pub fn resume(&self) {
        self.wishes.lock().paused = false;
        self.changed.notify_all();
    }

    /// Ends the run at the next header, also when it is paused.
    pub fn cancel(&self) {
        self.wishes.lock().cancelled = true;
        self.changed.notify_all();
    }

    /// Whether the run is asked to pause.
    pub fn is_paused(&self) -> bool {
        self.wishes.lock().paused
    }

    /// Returns at once, also in a pause.
    ///
    /// # Errors
    /// [`Cancelled`] once the run is cancelled.
    pub fn check(&self) -> Result<(), Cancelled> {
        if self.wishes.lock().cancelled { Err(Cancelled) } else { Ok(()) }
    }

    /// Returns at once, or when a pause is over.
    ///
    /// # Errors
    /// [`Cancelled`] once the run is cancelled.
    pub fn checkpoint(&self) -> Result<(), Cancelled> {
        let mut w = self.wishes.lock();
        while w.paused && !w.cancelled {
            self.changed.wait(&mut w);
        }
        if w.cancelled { Err(Cancelled) } else { Ok(()) }
    }

    /// Waits `time`, and then for the end of a pause.
    ///
    /// # Errors
    /// [`Cancelled`] as soon as the run is cancelled.
    pub fn wait(&self, time: Duration) -> Result<(), Cancelled> {
        let until = Instant::now() + time;
        let mut w = self.wishes.lock();
        while !w.cancelled && !self.changed.wait_until(&mut w, until).timed_out() {}
        drop(w);
        self.checkpoint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancel_ends_a_pause_and_stays() {
        let c = Control::new();
        assert_eq!(c.checkpoint(), Ok(()));
        c.pause();
        assert!(c.is_paused());
        std::thread::scope(|s| {
            let waiting = s.spawn(|| c.checkpoint());
            c.cancel();
            assert_eq!(waiting.join().unwrap(), Err(Cancelled));
        });
        c.resume();
        assert_eq!((c.check(), c.checkpoint()), (Err(Cancelled), Err(Cancelled)));
        assert_eq!(c.wait(Duration::from_secs(3600)), Err(Cancelled));
    }

    #[test]
    fn a_resume_lets_the_worker_go_on() {
        let c = Control::new();
        c.pause();
        assert_eq!(c.check(), Ok(()));
        std::thread::scope(|s| {
            let waiting = s.spawn(|| c.checkpoint());
            c.resume();
            assert_eq!(waiting.join().unwrap(), Ok(()));
        });
        assert_eq!(c.wait(Duration::ZERO), Ok(()));
    }
}
