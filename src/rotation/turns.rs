//! When a worker may begin the next header: not while paused, no faster than `--rate`, and giving way to users.

use super::control::{Cancelled, Control};
use super::courtesy::Courtesy;
use super::options::Options;
use super::pace::Pace;
use crate::store::load::Load;
use parking_lot::Mutex;
use std::time::{Duration, Instant};

/// Shared by all workers of a run.
pub(super) struct Turns<'a> {
    control: &'a Control,
    load: &'a Load,
    pace: Option<Mutex<Pace>>,
    courtesy: Option<Mutex<Courtesy>>,
}

/// A worker at work; what users wait meanwhile may be its doing.
pub(super) struct AtWork<'a>(&'a Load);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.work(false);
    }
}

impl<'a> Turns<'a> {
    pub(super) fn new(options: &Options, control: &'a Control, load: &'a Load) -> Self {
        load.listen(!options.full_speed);
        Self {
            control,
            load,
            pace: options.rate.map(|r| Mutex::new(Pace::new(r))),
            courtesy: (!options.full_speed).then(|| Mutex::new(Courtesy::new())),
        }
    }

    /// A worker takes up a batch.
    pub(super) fn at_work(&self) -> AtWork<'a> {
        self.load.work(true);
        AtWork(self.load)
    }

    /// Returns when the next header's turn has come. The caller is at work, and holds no lock that a user may want.
    /// One that cannot wait begins at once; those after it make up for that.
    pub(super) fn next(&self, can_wait: bool) -> Result<(), Cancelled> {
        self.next_of(1, can_wait)
    }

    /// The same for something that counts for `units` of what the rate is a limit of.
    pub(super) fn next_of(&self, units: u32, can_wait: bool) -> Result<(), Cancelled> {
        self.control.check()?;
        if self.control.is_paused() {
            self.idle(Duration::ZERO)?;
        }
        let now = Instant::now();
        let paced = self.pace.as_ref().map_or(Duration::ZERO, |p| p.lock().grant(units, now));
        if !can_wait {
            return Ok(());
        }
        let rest = self.courtesy.as_ref().map_or(Duration::ZERO, |c| self.rest(&mut c.lock(), now));
        let wait = paced.max(rest);
        if wait.is_zero() { Ok(()) } else { self.idle(wait) }
    }

    /// Waits, and then for the end of a pause. The caller is at work: what users wait meanwhile is not its doing.
    pub(super) fn idle(&self, time: Duration) -> Result<(), Cancelled> {
        self.load.work(false);
        let waited = self.control.wait(time);
        self.load.work(true);
        waited
    }

    /// How many headers may be begun before they are made durable together: a long burst is quicker, and a short one is
    /// less to wait behind for users.
    pub(super) fn burst(&self) -> usize {
        self.courtesy.as_ref().map_or(usize::MAX, |c| c.lock().burst())
    }

    fn rest(&self, c: &mut Courtesy, now: Instant) -> Duration {
        if c.is_step_due(now) {
            let (quiet, busy) = self.load.take();
            c.step(&quiet, &busy);
            tracing::debug!(share = c.share(), "rotation's share of the time");
        }
        c.rest(now)
    }
}

impl Drop for Turns<'_> {
    fn drop(&mut self) {
        self.load.listen(false);
    }
}
