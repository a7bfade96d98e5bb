//! How long a run waits for a key service that does not answer. Decides only; the caller waits.

use std::time::{Duration, Instant};

/// First and longest wait between two tries.
const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(15);

/// What a run does about errors that pass by themselves, shared by all workers: each answer starts the patience anew.
#[derive(Debug)]
pub struct Patience {
    limit: Duration,
    silence: Option<Silence>,
}

#[derive(Debug, Clone, Copy)]
struct Silence {
    since: Instant,
    next: Duration,
    /// When the next try is. Many may wait for it.
    until: Instant,
}

impl Patience {
    /// Gives up once the service has not answered for `limit`; zero: with the first failure.
    pub fn new(limit: Duration) -> Self {
        Self { limit, silence: None }
    }

    /// The service answered.
    pub fn answered(&mut self) {
        self.silence = None;
    }

    /// It did not, at `now`: how long to wait before the next try; `None` if patience is at its end.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        let s = self.silence.get_or_insert(Silence { since: now, next: FIRST, until: now });
        let left = self.limit.checked_sub(now.saturating_duration_since(s.since)).filter(|l| !l.is_zero())?;
        if now < s.until {
            return Some((s.until - now).min(left));
        }
        let wait = s.next.min(left);
        s.until = now + wait;
        s.next = (s.next * 2).min(LONGEST);
        Some(wait)
    }

    /// Whether the service is being waited for.
    pub fn is_waiting(&self) -> bool {
        self.silence.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_end_with_the_limit() {
        let (t, ms) = (Instant::now(), Duration::from_millis);
        let mut p = Patience::new(ms(1000));
        assert!(!p.is_waiting());
        assert_eq!(p.wait(t), Some(ms(250)));
        assert_eq!(p.wait(t + ms(250)), Some(ms(500)));
        assert_eq!(p.wait(t + ms(750)), Some(ms(250)), "no longer than what is left");
        assert_eq!(p.wait(t + ms(1000)), None);
        assert!(p.is_waiting());
    }

    #[test]
    fn those_who_wait_at_the_same_time_try_again_at_the_same_time() {
        let (t, ms) = (Instant::now(), Duration::from_millis);
        let mut p = Patience::new(ms(10_000));
        assert_eq!([0, 10, 240].map(|at| p.wait(t + ms(at))), [250, 240, 10].map(|w| Some(ms(w))));
        assert_eq!([250, 260].map(|at| p.wait(t + ms(at))), [500, 490].map(|w| Some(ms(w))));
    }

    #[test]
    fn an_answer_starts_it_anew() {
        let (t, s) = (Instant::now(), Duration::from_secs);
        let mut p = Patience::new(s(3600));
        let mut at = t;
        for _ in 0..20 {
            at += p.wait(at).unwrap();
        }
        assert_eq!(p.wait(at), Some(LONGEST));
        p.answered();
        assert!(!p.is_waiting());
        assert_eq!(p.wait(at + s(7200)), Some(FIRST));
    }

    #[test]
    fn without_patience_the_first_failure_counts() {
        assert_eq!(Patience::new(Duration::ZERO).wait(Instant::now()), None);
    }
}
