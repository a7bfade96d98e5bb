//! One attempt at a time at what many need at once; those who waited for it share what came of it.

use crate::kms::KmsError;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Without this, many threads that need a login from a server that is down would time out one after the other.
pub struct Flight<T> {
    attempts: AtomicU64,
    last: Mutex<Option<Result<T, KmsError>>>,
}

impl<T> Default for Flight<T> {
    fn default() -> Self {
        Self { attempts: AtomicU64::new(0), last: Mutex::new(None) }
    }
}

impl<T: Clone> Flight<T> {
    /// Runs `f`, or returns what somebody else's run has come to, if that ended while this waited for it.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn run(&self, f: impl FnOnce() -> Result<T, KmsError>) -> Result<T, KmsError> {
        self.run_since(self.attempts.load(Ordering::SeqCst), f)
    }

    /// As [`Flight::run`], for one that came when `before` attempts had ended.
    fn run_since(&self, before: u64, f: impl FnOnce() -> Result<T, KmsError>) -> Result<T, KmsError> {
        let mut last = self.last.lock();
        if self.attempts.load(Ordering::SeqCst) != before
            && let Some(shared) = &*last
        {
            return shared.clone();
        }
        let result = f();
        *last = Some(result.clone());
        self.attempts.fetch_add(1, Ordering::SeqCst);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waited_shares_the_outcome_and_who_comes_later_does_not() {
        let flight = Flight::<u32>::default();
        let down = || Err(KmsError::Unreachable("down".into()));
        assert_eq!(flight.run(down), down());
        assert_eq!(flight.run_since(0, || Ok(1)), down(), "came before the first had ended");
        assert_eq!(flight.run_since(1, || Ok(2)), Ok(2), "came after it");
        assert_eq!(flight.run_since(1, || Ok(3)), Ok(2));
        assert_eq!(flight.run(|| Ok(4)), Ok(4));
    }
}
