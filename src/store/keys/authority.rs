//! Whether files may be opened, as far as the key service has its say. Pure: no I/O, and time is an argument.
//!
//! A sealed KEK lies in memory once it was unwrapped, so nothing but a rule keeps a store from going on for ever after
//! its key was disabled or the network was cut. This is the rule. The service is asked again and again (*refresh*)
//! whether it still unwraps the active KEK, and what it says moves this from one standing to another:
//!
//! | heard | ready | offline | refused |
//! |---|---|---|---|
//! | yes, to a refresh | ready | ready | ready |
//! | yes, to an ordinary call | ready | ready | refused |
//! | no answer, slow down, no credentials, anything else | offline (refreshes only) | offline, since the same time | refused |
//! | denied, disabled (refreshes only) | refused | refused | refused |
//!
//! *Ready* opens files. *Offline* does so for the grace, then no more. *Refused* does not. Files that are open are not
//! asked about here. An ordinary call that was denied does not condemn the store, as it may be about one file; it has
//! the next refresh run at once. Nothing here ever leads to a change on disk.

use crate::kms::KmsError;
use std::time::{Duration, Instant};

/// How often the service is asked, and how long a store goes on without an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Time between refreshes, give or take a tenth; zero: the service is never asked again, and a refusal is noticed
    /// with the next mount.
    pub refresh: Duration,
    /// How long after the service stopped answering files can still be opened; zero: not at all.
    pub offline_grace: Duration,
}

impl Default for Policy {
    /// Five minutes; one day (why, see `docs/adr/0012-lock-and-outages.md`).
    fn default() -> Self {
        Self { refresh: Duration::from_secs(300), offline_grace: Duration::from_secs(86_400) }
    }
}

/// While there is no answer the service is asked at least so often, so that its return is noticed soon.
const OFFLINE_REFRESH_MAX: Duration = Duration::from_secs(30);

/// Longest time between refreshes, so that arithmetic with it cannot overflow.
const REFRESH_MAX: Duration = Duration::from_secs(10 * 365 * 86_400);

/// What a change of standing was, for whoever logs it and acts on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// As before.
    None,
    /// The service does not answer any more.
    WentOffline,
    /// The service refuses the key now.
    Refused,
    /// All is well again.
    Restored,
}

/// What an error says about the whole store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Somebody decided that this store must not be opened.
    Refused,
    /// No answer that counts as one. Missing or expired credentials are among it: they are ours to fix and say nothing
    /// of what the key's owner wants. A key that is not found, and a wrap that does not open or opens to something else,
    /// are too: nothing irreversible, and nothing that locks users out at once, may follow from a service's confusion.
    NoAnswer,
}

fn verdict(e: &KmsError) -> Verdict {
    match e {
        KmsError::Denied(_) | KmsError::Disabled(_) => Verdict::Refused,
        KmsError::Unreachable(_)
        | KmsError::Throttled(_)
        | KmsError::NotFound(_)
        | KmsError::BadCiphertext(_)
        | KmsError::Credentials(_)
        | KmsError::Config(_) => Verdict::NoAnswer,
    }
}

/// Whether `e` is somebody's decision that the key must not be used.
pub(super) fn is_refusal(e: &KmsError) -> bool {
    verdict(e) == Verdict::Refused
}

#[derive(Debug, Clone)]
enum Standing {
    Ready,
    Offline { since: Instant, why: KmsError },
    Refused { since: Instant, why: KmsError },
}

/// The standing as others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum View {
    Ready,
    Offline {
        since: Instant,
        /// Files can be opened until then.
        until: Instant,
        why: KmsError,
    },
    Refused {
        since: Instant,
        why: KmsError,
    },
}

/// The state machine.
#[derive(Debug, Clone)]
pub struct Authority {
    /// `None`: nobody watches, as in a program that ends soon; then everything is allowed.
    policy: Option<Policy>,
    /// The root key in use is in a service. One in a file or in somebody's head is not asked again.
    remote: bool,
    standing: Standing,
    /// When the service last said yes.
    last_ok: Instant,
    next: Instant,
}

impl Authority {
    /// Of a keyring that was opened at `now`: that took an unwrap of the active KEK.
    pub fn new(now: Instant) -> Self {
        Self { policy: None, remote: false, standing: Standing::Ready, last_ok: now, next: now }
    }

    /// Watches from `now` on. `turn` is where in its interval the first refresh falls, 0 to 1.
    pub fn watch(&mut self, policy: Policy, now: Instant, turn: f64) {
        self.policy = Some(Policy { refresh: policy.refresh.min(REFRESH_MAX), ..policy });
        self.schedule(now, turn);
    }

    /// The root key in use was looked at.
    pub fn set_remote(&mut self, remote: bool) {
        self.remote = remote;
        if !remote {
            self.standing = Standing::Ready;
        }
    }

    /// The keys were unwrapped anew, from root keys that somebody gave: as if just opened.
    pub fn reopened(&mut self, now: Instant, turn: f64) {
        self.standing = Standing::Ready;
        self.last_ok = now;
        self.schedule(now, turn);
    }

    /// A refresh ended. `turn` is where in its interval the next one falls, 0 to 1.
    pub fn refreshed(&mut self, result: Result<(), &KmsError>, now: Instant, turn: f64) -> Change {
        let change = match (result, verdict_of(result), &self.standing) {
            (Ok(()), _, Standing::Ready) => Change::None,
            (Ok(()), ..) => Change::Restored,
            (Err(e), Some(Verdict::Refused), Standing::Refused { since, .. }) => {
                self.standing = Standing::Refused { since: *since, why: e.clone() };
                Change::None
            }
            (Err(e), Some(Verdict::Refused), _) => {
                self.standing = Standing::Refused { since: now, why: e.clone() };
                Change::Refused
            }
            (Err(_), _, Standing::Refused { .. }) => Change::None,
            (Err(e), _, Standing::Offline { since, .. }) => {
                self.standing = Standing::Offline { since: *since, why: e.clone() };
                Change::None
            }
            (Err(e), _, Standing::Ready) => {
                self.standing = Standing::Offline { since: self.lapsed(now).unwrap_or(now), why: e.clone() };
                Change::WentOffline
            }
        };
        if result.is_ok() {
            self.standing = Standing::Ready;
            self.last_ok = now;
        }
        self.schedule(now, turn);
        change
    }

    /// An ordinary call to the active KEK's service ended (kind external).
    pub fn called(&mut self, result: Result<(), &KmsError>, now: Instant) -> Change {
        if self.policy.is_none() {
            return Change::None;
        }
        match (result, &self.standing) {
            (Ok(()), Standing::Ready) => {
                self.last_ok = now;
                Change::None
            }
            (Ok(()), Standing::Offline { .. }) => {
                self.standing = Standing::Ready;
                self.last_ok = now;
                Change::Restored
            }
            (Err(e), Standing::Ready) if e.is_retryable() => {
                self.standing = Standing::Offline { since: self.lapsed(now).unwrap_or(now), why: e.clone() };
                self.next = now;
                Change::WentOffline
            }
            (Err(e), Standing::Ready | Standing::Offline { .. }) if is_refusal(e) => {
                self.next = now;
                Change::None
            }
            // Of one file only, or known already. One yes does not outweigh a refusal.
            _ => Change::None,
        }
    }

    /// A refresh that was due cannot be made now.
    pub fn put_off(&mut self, now: Instant) {
        self.schedule(now, 0.5);
    }

    /// Whether a refresh should begin.
    pub fn is_due(&self, now: Instant) -> bool {
        self.policy.is_some_and(|p| !p.refresh.is_zero()) && now >= self.next
    }

    /// Whether the service refuses.
    pub fn is_refused(&self) -> bool {
        matches!(self.standing, Standing::Refused { .. })
    }

    /// Whether a file may be opened or made at `now`.
    ///
    /// # Errors
    /// The service's refusal; [`KmsError::Unreachable`] once the grace is over.
    pub fn check(&self, now: Instant) -> Result<(), KmsError> {
        if self.policy.is_none() {
            return Ok(());
        }
        match self.view(now) {
            View::Ready => Ok(()),
            View::Refused { why, .. } => Err(why),
            View::Offline { until, .. } if now < until => Ok(()),
            View::Offline { since, why, .. } => Err(KmsError::Unreachable(format!(
                "no answer for {} s, which is longer than offline_grace; the last was: {why}",
                now.saturating_duration_since(since).as_secs()
            ))),
        }
    }

    /// Whether something that needs an answer now may be begun: not while there is none. Has the service asked soon, so
    /// that its return is noticed.
    ///
    /// # Errors
    /// As [`Authority::check`]; what the service said last while it gives no answer.
    pub fn check_answering(&mut self, now: Instant) -> Result<(), KmsError> {
        self.check(now)?;
        match (&self.standing, self.policy) {
            (Standing::Offline { why, .. }, Some(_)) => {
                let why = why.clone();
                self.next = self.next.min(now);
                Err(KmsError::Unreachable(why.to_string()))
            }
            _ => Ok(()),
        }
    }

    /// The standing at `now`.
    pub fn view(&self, now: Instant) -> View {
        match &self.standing {
            Standing::Refused { since, why } => View::Refused { since: *since, why: why.clone() },
            Standing::Offline { since, why } => {
                View::Offline { since: *since, until: self.until(*since), why: why.clone() }
            }
            Standing::Ready => match self.lapsed(now) {
                None => View::Ready,
                Some(since) => {
                    let why = KmsError::Unreachable("a refresh is taking too long".into());
                    View::Offline { since, until: self.until(since), why }
                }
            },
        }
    }

    /// When the service last said yes; `None` if it is none that is asked.
    pub fn last_ok(&self) -> Option<Instant> {
        self.is_supervised().then_some(self.last_ok)
    }

    fn is_supervised(&self) -> bool {
        self.remote && self.policy.is_some_and(|p| !p.refresh.is_zero())
    }

    fn until(&self, since: Instant) -> Instant {
        let grace = self.policy.map_or(Duration::ZERO, |p| p.offline_grace);
        // A grace that no clock can hold is as good as 100 years.
        since.checked_add(grace).unwrap_or(since + Duration::from_secs(100 * 365 * 86_400))
    }

    /// A yes holds until the next refresh and half as long again. Where none came by then (a call that hangs), the
    /// service has been away since that refresh was due.
    fn lapsed(&self, now: Instant) -> Option<Instant> {
        let p = self.policy.filter(|_| self.is_supervised())?;
        let age = now.saturating_duration_since(self.last_ok);
        (age > p.refresh + p.refresh / 2).then(|| self.last_ok + p.refresh)
    }

    /// The next refresh: its interval from `now`, give or take a tenth, so that many mounts do not ask as one.
    fn schedule(&mut self, now: Instant, turn: f64) {
        let Some(p) = self.policy else { return };
        let interval = match self.standing {
            Standing::Offline { .. } => p.refresh.min(OFFLINE_REFRESH_MAX),
            Standing::Ready | Standing::Refused { .. } => p.refresh,
        };
        let factor = 0.9 + 0.2 * turn.clamp(0.0, 1.0);
        self.next = now.checked_add(interval.mul_f64(factor)).unwrap_or(now);
    }
}

fn verdict_of(r: Result<(), &KmsError>) -> Option<Verdict> {
    r.err().map(verdict)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const REFRESH: Duration = Duration::from_secs(300);
    const GRACE: Duration = Duration::from_secs(3600);

    fn s(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn watched(t: Instant, offline_grace: Duration) -> Authority {
        let mut a = Authority::new(t);
        a.set_remote(true);
        a.watch(Policy { refresh: REFRESH, offline_grace }, t, 0.5);
        a
    }

    fn error(n: usize) -> KmsError {
        let text = || "t".to_owned();
        match n {
            0 => KmsError::Unreachable(text()),
            1 => KmsError::Throttled(text()),
            2 => KmsError::Credentials(text()),
            3 => KmsError::NotFound(text()),
            4 => KmsError::BadCiphertext(text()),
            5 => KmsError::Config(text()),
            6 => KmsError::Denied(text()),
            _ => KmsError::Disabled(text()),
        }
    }

    #[test]
    fn every_answer_to_a_refresh_leads_where_the_table_says() {
        let t = Instant::now();
        for n in 0..8 {
            let e = error(n);
            let mut a = watched(t, GRACE);
            let refused = n >= 6;
            let change = a.refreshed(Err(&e), t + s(300), 0.5);
            assert_eq!(change, if refused { Change::Refused } else { Change::WentOffline }, "{e:?}");
            assert_eq!(a.check(t + s(301)).is_ok(), !refused, "{e:?}");
            assert_eq!(a.refreshed(Err(&e), t + s(310), 0.5), Change::None, "the second time it is no news");
            // After the grace everything but a yes is a no.
            let late = t + s(300) + GRACE;
            assert!(a.check(late - s(1)).is_ok() != refused);
            match a.check(late).unwrap_err() {
                KmsError::Unreachable(text) => assert!(!refused && text.contains("3600 s"), "{text}"),
                other => assert_eq!(other, e),
            }
            assert_eq!(a.refreshed(Ok(()), late, 0.5), Change::Restored);
            assert!(a.check(late).is_ok());
        }
    }

    #[test]
    fn a_refusal_outlasts_everything_but_a_yes() {
        let t = Instant::now();
        let mut a = watched(t, GRACE);
        a.refreshed(Err(&error(6)), t, 0.5);
        assert_eq!(a.refreshed(Err(&error(0)), t + s(300), 0.5), Change::None);
        assert_eq!(a.called(Ok(()), t + s(301)), Change::None, "a call that began before");
        assert_eq!(a.check(t + s(302)).unwrap_err(), error(6));
        // Disabled by now: the errno follows.
        a.refreshed(Err(&error(7)), t + s(600), 0.5);
        assert_eq!(a.check(t + s(602)).unwrap_err(), error(7));
        assert!(matches!(a.view(t + s(602)), View::Refused { since, .. } if since == t));
    }

    #[test]
    fn no_answer_and_then_a_refusal_is_a_refusal() {
        let t = Instant::now();
        let mut a = watched(t, GRACE);
        a.refreshed(Err(&error(1)), t, 0.5);
        assert_eq!(a.refreshed(Err(&error(6)), t + s(30), 0.5), Change::Refused);
        assert!(a.check(t + s(31)).is_err());
    }

    #[test]
    fn without_a_grace_the_first_silence_closes() {
        let t = Instant::now();
        let mut a = watched(t, Duration::ZERO);
        assert!(a.check(t + s(299)).is_ok());
        a.refreshed(Err(&error(0)), t + s(300), 0.5);
        assert!(a.check(t + s(300)).is_err());
    }

    #[test]
    fn a_refresh_that_hangs_is_no_answer() {
        let t = Instant::now();
        let a = watched(t, GRACE);
        assert_eq!(a.view(t + s(450)), View::Ready);
        assert!(matches!(a.view(t + s(451)), View::Offline { since, .. } if since == t + REFRESH));
        assert!(a.check(t + REFRESH + GRACE - s(1)).is_ok());
        assert!(a.check(t + REFRESH + GRACE).is_err());
    }

    #[test]
    fn refreshes_come_before_a_yes_lapses_and_not_all_at_once() {
        let t = Instant::now();
        for (turn, after) in [(0.0, 270), (0.5, 300), (1.0, 330)] {
            let mut a = watched(t, GRACE);
            a.refreshed(Ok(()), t, turn);
            assert!(!a.is_due(t + s(after - 1)) && a.is_due(t + s(after + 1)), "{turn}");
            assert_eq!(a.view(t + s(after + 1)), View::Ready);
            a.refreshed(Err(&error(0)), t, 0.5);
            assert!(a.is_due(t + s(31)), "asked more often while it is away");
        }
        let mut rarely = Authority::new(t);
        rarely.set_remote(true);
        rarely.watch(Policy { refresh: Duration::MAX, offline_grace: Duration::MAX }, t, 1.0);
        rarely.refreshed(Err(&error(0)), t, 1.0);
        assert!(rarely.check(t + s(1 << 30)).is_ok(), "no number is too large");
        let mut never = Authority::new(t);
        never.set_remote(true);
        never.watch(Policy { refresh: Duration::ZERO, offline_grace: GRACE }, t, 0.5);
        assert!(!never.is_due(t + s(1 << 30)) && never.check(t + s(1 << 30)).is_ok());
    }

    #[test]
    fn a_root_key_that_is_not_remote_never_lapses() {
        let t = Instant::now();
        let mut a = watched(t, Duration::ZERO);
        a.refreshed(Err(&error(6)), t, 0.5);
        a.set_remote(false);
        assert!(a.check(t + s(1 << 30)).is_ok());
        assert_eq!((a.view(t + s(1 << 30)), a.last_ok()), (View::Ready, None));
    }

    #[test]
    fn ordinary_calls_tell_of_silence_at_once_and_of_a_refusal_to_the_next_refresh() {
        let t = Instant::now();
        let mut a = watched(t, GRACE);
        assert_eq!(a.called(Err(&error(6)), t + s(5)), Change::None);
        assert!(a.check(t + s(5)).is_ok() && a.is_due(t + s(5)), "one file's refusal has the service asked");
        for n in 2..6 {
            assert_eq!(a.called(Err(&error(n)), t + s(6)), Change::None, "that file only");
        }
        assert_eq!(a.called(Err(&error(0)), t + s(7)), Change::WentOffline);
        assert!(matches!(a.view(t + s(9)), View::Offline { since, .. } if since == t + s(7)));
        assert_eq!(a.called(Ok(()), t + s(10)), Change::Restored);
        assert_eq!(a.view(t + s(10)), View::Ready);
    }

    #[test]
    fn what_needs_an_answer_waits_for_one_and_has_it_asked_for() {
        let t = Instant::now();
        let mut a = watched(t, GRACE);
        assert!(a.check_answering(t).is_ok());
        a.refreshed(Err(&error(0)), t, 0.5);
        assert!(a.check(t + s(1)).is_ok() && !a.is_due(t + s(1)));
        assert!(matches!(a.check_answering(t + s(1)), Err(KmsError::Unreachable(_))));
        assert!(a.is_due(t + s(1)));
        a.refreshed(Ok(()), t + s(2), 0.5);
        assert!(a.check_answering(t + s(2)).is_ok());
        a.refreshed(Err(&error(6)), t + s(3), 0.5);
        assert_eq!(a.check_answering(t + s(3)), Err(error(6)));
    }

    /// A rotation of a store that is not mounted waits for the service itself: nobody would ever lift a refusal.
    #[test]
    fn where_nobody_watches_everything_is_allowed() {
        let t = Instant::now();
        let mut a = Authority::new(t);
        a.set_remote(true);
        for n in 0..8 {
            assert_eq!(a.called(Err(&error(n)), t), Change::None);
            assert!(a.check(t + s(1 << 30)).is_ok() && !a.is_due(t + s(1 << 30)));
        }
    }

    #[derive(Debug, Clone)]
    enum Event {
        Refresh(Option<usize>),
        Call(Option<usize>),
        Wait(u64),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            proptest::option::of(0usize..8).prop_map(Event::Refresh),
            proptest::option::of(0usize..8).prop_map(Event::Call),
            (0u64..2000).prop_map(Event::Wait),
        ]
    }

    proptest! {
        /// Against the rules said anew: refused until a refresh says yes; no silence closes before the grace; closed
        /// after it until somebody says yes.
        #[test]
        fn any_events_keep_the_rules(events in proptest::collection::vec(event(), 1..60)) {
            let start = Instant::now();
            let mut a = watched(start, GRACE);
            let (mut now, mut refused, mut silent): (_, bool, Option<Instant>) = (start, false, None);
            let mut last_ok = start;
            for e in events {
                // What nobody asked about for too long counts as silence from when it should have been asked.
                if silent.is_none() && now.duration_since(last_ok) > REFRESH * 3 / 2 {
                    silent = Some(last_ok + REFRESH);
                }
                match e {
                    Event::Wait(n) => now += s(n),
                    Event::Refresh(None) => {
                        a.refreshed(Ok(()), now, 0.3);
                        (refused, silent, last_ok) = (false, None, now);
                    }
                    Event::Refresh(Some(n)) => {
                        a.refreshed(Err(&error(n)), now, 0.3);
                        if n >= 6 { refused = true } else { silent = silent.or(Some(now)) }
                    }
                    Event::Call(None) => {
                        a.called(Ok(()), now);
                        if !refused { (silent, last_ok) = (None, now) }
                    }
                    Event::Call(Some(n)) => {
                        a.called(Err(&error(n)), now);
                        if n < 2 && !refused { silent = silent.or(Some(now)) }
                    }
                }
                if silent.is_none() && now.duration_since(last_ok) > REFRESH * 3 / 2 {
                    silent = Some(last_ok + REFRESH);
                }
                let open = a.check(now).is_ok();
                let want = !refused && silent.is_none_or(|t| now < t + GRACE);
                // A silence before a refusal may have been forgotten with it, never the refusal.
                if refused { prop_assert!(!open) } else { prop_assert_eq!(open, want) }
            }
        }
    }
}
