//! How long a pass and a run will go on, from how they went so far.

use super::report::State;

/// What is known.
#[derive(Debug, Clone, Copy)]
pub(super) struct Estimate {
    pub(super) state: State,
    /// Files in the store, if an earlier pass has counted them.
    pub(super) expected: Option<u64>,
    /// Of them, looked at in this pass.
    pub(super) scanned: u64,
    /// Files a second, this pass.
    pub(super) rate: f64,
    /// Files a second in the last scan; 0 if this run has not scanned yet.
    pub(super) verify: f64,
}

impl Estimate {
    /// Seconds to the end of this pass.
    pub(super) fn of_pass(&self) -> Option<f64> {
        let files = self.expected.filter(|_| self.rate > 0.0)?;
        Some(files.saturating_sub(self.scanned) as f64 / self.rate)
    }

    /// Seconds to the end of the run, if the next scan finds nothing left. A scan that has not begun is taken to go as
    /// the last one, or without any as the sweep: it writes nothing, so it will hardly be slower.
    pub(super) fn of_run(&self) -> Option<f64> {
        let pass = self.of_pass()?;
        match self.state {
            State::Sweeping => {
                let rate = if self.verify > 0.0 { self.verify } else { self.rate };
                Some(pass + self.expected? as f64 / rate)
            }
            State::Verifying => Some(pass),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_is_followed_by_a_scan() {
        let e = |state, expected, scanned, rate, verify| {
            let e = Estimate { state, expected, scanned, rate, verify };
            (e.of_pass(), e.of_run())
        };
        for (said, pass, run) in [
            (e(State::Sweeping, Some(100), 50, 10.0, 0.0), Some(5.0), Some(15.0)),
            (e(State::Sweeping, Some(100), 50, 10.0, 50.0), Some(5.0), Some(7.0)),
            (e(State::Verifying, Some(100), 50, 10.0, 0.0), Some(5.0), Some(5.0)),
            (e(State::Verifying, Some(100), 200, 10.0, 0.0), Some(0.0), Some(0.0)),
            (e(State::Sweeping, None, 50, 10.0, 0.0), None, None),
            (e(State::Sweeping, Some(100), 0, 0.0, 5.0), None, None),
            (e(State::Retiring, Some(100), 50, 10.0, 0.0), Some(5.0), None),
        ] {
            assert_eq!(said, (pass, run));
        }
    }
}
