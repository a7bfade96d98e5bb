//! Which version of the key is the primary one, as far as answers have shown. Decides only; time is given.

use std::time::{Duration, Instant};

/// How long what was learned is believed. Reading a key has a small quota of its own (hundreds of requests a minute for
/// a project), and a change of the primary version takes the service a while to spread in any case.
const BELIEVED: Duration = Duration::from_secs(60);

/// What is known of the primary version.
#[derive(Debug, Default)]
pub struct Primary {
    is: Option<(u64, Instant)>,
    is_not: Option<(u64, Instant)>,
}

impl Primary {
    /// An answer showed that `version` is the primary one.
    pub fn is(&mut self, version: u64, now: Instant) {
        self.is = Some((version, now));
        self.is_not = self.is_not.filter(|(v, _)| *v != version);
    }

    /// An answer showed that `version` is not the primary one.
    pub fn is_not(&mut self, version: u64, now: Instant) {
        self.is_not = Some((version, now));
        self.is = self.is.filter(|(v, _)| *v != version);
    }

    /// Whether something wrapped by `version` is due for a re-wrap; `None`: not known, ask the service.
    pub fn due(&self, version: u64, now: Instant) -> Option<bool> {
        let fresh = |known: Option<(u64, Instant)>| {
            known.filter(|(_, at)| now.saturating_duration_since(*at) < BELIEVED).map(|(v, _)| v)
        };
        match (fresh(self.is), fresh(self.is_not)) {
            (Some(p), _) => Some(p != version),
            (None, Some(old)) if old == version => Some(true),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_answer_counts_for_a_while() {
        let t = Instant::now();
        let later = |s| t + Duration::from_secs(s);
        let mut p = Primary::default();
        assert_eq!(p.due(1, t), None);
        p.is(1, t);
        assert_eq!((p.due(1, t), p.due(2, t)), (Some(false), Some(true)));
        assert_eq!((p.due(1, later(59)), p.due(1, later(60))), (Some(false), None));
        // Another version was made the primary one: a decryption tells.
        p.is_not(1, later(10));
        assert_eq!((p.due(1, later(11)), p.due(2, later(11)), p.due(3, later(11))), (Some(true), None, None));
        p.is(2, later(12));
        assert_eq!((p.due(1, later(12)), p.due(2, later(12))), (Some(true), Some(false)));
        // And back to the first.
        p.is(1, later(20));
        assert_eq!((p.due(1, later(20)), p.due(2, later(20))), (Some(false), Some(true)));
        assert_eq!(p.due(1, later(90)), None, "that it once was not the primary one is forgotten");
    }

    #[test]
    fn what_is_said_of_one_version_leaves_the_other_as_it_was() {
        let t = Instant::now();
        let mut p = Primary::default();
        p.is(2, t);
        p.is_not(1, t);
        assert_eq!((p.due(1, t), p.due(2, t)), (Some(true), Some(false)));
        assert_eq!(p.due(1, t - Duration::from_secs(5)), Some(true), "a clock that seems to go back");
    }
}
