//! Single flight: those who want the same key at the same time share one call.

use super::clock::{Bell, Clock};
use super::negative::Digest;
use crate::crypto::secret::Secret32;
use crate::kms::KmsError;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

/// Calls under way, by what they unwrap.
#[derive(Default)]
pub struct Flights {
    under_way: Mutex<HashMap<Digest, Arc<Flight>>>,
}

#[derive(Default)]
struct Flight {
    /// `None` until it has landed; the key stays here only until the last follower has taken its copy.
    landed: Mutex<Option<Result<Secret32, Lost>>>,
    bell: Arc<Bell>,
}

/// Why a follower has no key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lost {
    /// The call failed.
    Failed(KmsError),
    /// Whoever made the call died in it.
    Abandoned,
    /// It took longer than this follower had time.
    TooLong,
}

/// How a key was come by.
#[derive(Debug)]
pub enum Landing {
    /// By a call of one's own.
    Led(Result<Secret32, KmsError>),
    /// By a call of somebody else's.
    Joined(Result<Secret32, Lost>),
}

impl Flights {
    /// Makes `call`, or waits until `deadline` for the same call that is under way already.
    pub fn join(
        &self,
        what: Digest,
        clock: &dyn Clock,
        deadline: Instant,
        call: impl FnOnce() -> Result<Secret32, KmsError>,
    ) -> Landing {
        let flight = {
            let mut under_way = self.under_way.lock();
            if let Some(f) = under_way.get(&what).cloned() {
                drop(under_way);
                return Landing::Joined(f.wait(clock, deadline));
            }
            let f = Arc::new(Flight::default());
            under_way.insert(what, f.clone());
            f
        };
        let leader = Leader { flights: self, what, flight };
        let r = call();
        leader.land(&r);
        Landing::Led(r)
    }

    /// Whether anybody has joined the call for `what`.
    #[cfg(test)]
    fn followers(&self, what: &Digest) -> usize {
        // The map's own and the leader's are no followers.
        self.under_way.lock().get(what).map_or(0, |f| Arc::strong_count(f) - 2)
    }
}

impl Flight {
    fn wait(&self, clock: &dyn Clock, deadline: Instant) -> Result<Secret32, Lost> {
        loop {
            let seen = self.bell.count();
            match self.landed.lock().as_ref() {
                Some(Ok(key)) => return Ok(key.duplicate()),
                Some(Err(e)) => return Err(e.clone()),
                None => {}
            }
            if clock.now() >= deadline {
                return Err(Lost::TooLong);
            }
            clock.wait(&self.bell, seen, deadline);
        }
    }
}

/// Who makes the call. Dropped without having landed (a panic), it tells the followers so.
struct Leader<'a> {
    flights: &'a Flights,
    what: Digest,
    flight: Arc<Flight>,
}

impl Leader<'_> {
    fn land(self, r: &Result<Secret32, KmsError>) {
        self.end();
        // Whoever follows has its hold on the flight by now, because nobody finds it any more.
        if Arc::strong_count(&self.flight) > 1 {
            *self.flight.landed.lock() = Some(r.as_ref().map(Secret32::duplicate).map_err(|e| Lost::Failed(e.clone())));
        }
    }

    fn end(&self) {
        let mut under_way = self.flights.under_way.lock();
        if under_way.get(&self.what).is_some_and(|f| Arc::ptr_eq(f, &self.flight)) {
            under_way.remove(&self.what);
        }
    }
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        self.end();
        self.flight.landed.lock().get_or_insert(Err(Lost::Abandoned));
        self.flight.bell.ring();
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeClock;
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    const WHAT: Digest = [7; 32];

    fn later(clock: &FakeClock) -> Instant {
        clock.now() + Duration::from_secs(1)
    }

    /// Eight followers of one leader whose call ends as `call` says once they have all joined.
    fn eight(call: impl Fn() -> Result<Secret32, KmsError> + Sync) -> (Option<Landing>, Vec<Landing>) {
        let (flights, clock, begun) = (Flights::default(), FakeClock::new(), AtomicU32::new(0));
        let until = later(&clock);
        std::thread::scope(|s| {
            let leader = s.spawn(|| {
                flights.join(WHAT, clock.as_ref(), until, || {
                    begun.fetch_add(1, Ordering::SeqCst);
                    clock.wait_for_waiters(8);
                    call()
                })
            });
            while begun.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            let follow = || flights.join(WHAT, clock.as_ref(), until, || unreachable!("a follower makes no call"));
            let followers: Vec<_> = (0..8).map(|_| s.spawn(follow)).collect();
            (leader.join().ok(), followers.into_iter().map(|f| f.join().unwrap()).collect())
        })
    }

    #[test]
    fn everybody_gets_the_key_of_one_call() {
        let key = Secret32::random();
        let (led, joined) = eight(|| Ok(key.duplicate()));
        assert!(matches!(led, Some(Landing::Led(Ok(k))) if k.ct_eq(&key)));
        assert_eq!(joined.len(), 8);
        assert!(joined.iter().all(|l| matches!(l, Landing::Joined(Ok(k)) if k.ct_eq(&key))), "{joined:?}");
    }

    #[test]
    fn everybody_gets_the_error_of_one_call() {
        let e = KmsError::Denied("no".into());
        let (_, joined) = eight(|| Err(e.clone()));
        assert!(joined.iter().all(|l| matches!(l, Landing::Joined(Err(Lost::Failed(x))) if *x == e)), "{joined:?}");
    }

    #[test]
    fn a_leader_that_dies_leaves_nobody_waiting() {
        let (led, joined) = eight(|| std::panic::resume_unwind(Box::new("dies")));
        assert!(led.is_none());
        assert!(joined.iter().all(|l| matches!(l, Landing::Joined(Err(Lost::Abandoned)))), "{joined:?}");
    }

    #[test]
    fn a_follower_waits_no_longer_than_it_has_time() {
        let (flights, clock, begun) = (Flights::default(), FakeClock::new(), AtomicU32::new(0));
        let (short, long) = (clock.now() + Duration::from_millis(10), clock.now() + Duration::from_secs(9));
        let ended = Bell::default();
        std::thread::scope(|s| {
            let leader = s.spawn(|| {
                flights.join(WHAT, clock.as_ref(), long, || {
                    begun.store(1, Ordering::SeqCst);
                    ended.wait_until(0, None);
                    Ok(Secret32::random())
                })
            });
            while begun.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            let follower = s.spawn(|| flights.join(WHAT, clock.as_ref(), short, || unreachable!("it follows")));
            clock.wait_for_waiters(1);
            assert_eq!(flights.followers(&WHAT), 1);
            clock.advance(Duration::from_millis(10));
            assert!(matches!(follower.join().unwrap(), Landing::Joined(Err(Lost::TooLong))));
            ended.ring();
            assert!(matches!(leader.join().unwrap(), Landing::Led(Ok(_))));
        });
    }

    #[test]
    fn what_has_landed_is_not_joined_any_more() {
        let (flights, clock) = (Flights::default(), FakeClock::new());
        for _ in 0..2 {
            let l = flights.join(WHAT, clock.as_ref(), later(&clock), || Ok(Secret32::random()));
            assert!(matches!(l, Landing::Led(Ok(_))));
        }
        assert!(flights.under_way.lock().is_empty());
        // Different things are different calls, even one within the other.
        let l = flights.join(WHAT, clock.as_ref(), later(&clock), || {
            match flights.join([8; 32], clock.as_ref(), later(&clock), || Ok(Secret32::random())) {
                Landing::Led(r) => r,
                Landing::Joined(_) => unreachable!("nobody else is there"),
            }
        });
        assert!(matches!(l, Landing::Led(Ok(_))));
    }
}
