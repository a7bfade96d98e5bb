//! Circuit breaker: while a service gives no answer it is left alone, and asked now and then by one cheap call.
//!
//! ```text
//! closed ── failures in a row, or too many in the window, or nothing but throttling ──► open
//! open   ── the cool-down is over, and somebody wants to call ──► half-open: one probe, everybody else is refused
//! half-open ── the probe is answered ──► closed, on trial      ── it is not ──► open, for twice as long
//! on trial: a call is answered ──► no longer                   ── one is not ──► open, for twice as long
//! ```
//!
//! The trial is there because a probe proves little: a service can describe its keys and not use them. Only a silent
//! service counts: one that refuses has answered. What began before the last change of state says nothing about now and
//! is passed over.

use super::retry::part;
use std::time::{Duration, Instant};

/// When to open and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Opens after so many calls in a row without an answer; at least 1.
    pub failures: u32,
    /// Opens when so many per cent of at least [`WINDOW_CALLS`] calls in the last [`WINDOW_SECONDS`] got no answer.
    pub percent: u32,
    /// First cool-down, no longer than `pause_max`; doubles with each vain probe.
    pub pause: Duration,
    /// Longest cool-down.
    pub pause_max: Duration,
}

/// Length of the window, in seconds.
pub const WINDOW_SECONDS: u64 = 10;
/// Calls that a window must have to be judged by.
pub const WINDOW_CALLS: u32 = 20;
/// Throttled answers in a row, without any other, over at least [`THROTTLED_FOR`], that open the breaker. Throttling is
/// usually over in a second, and retries with jitter get through it.
pub const THROTTLED_CALLS: u32 = 20;
/// See [`THROTTLED_CALLS`].
pub const THROTTLED_FOR: Duration = Duration::from_secs(10);

/// What a call says about the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It answered: yes, or no.
    Answered,
    /// It did not.
    Silent,
    /// It answered: not so fast.
    Throttled,
    /// Nothing: decided on this machine.
    Unknown,
}

/// Why it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    Silence,
    Throttling,
}

/// Belongs to one call that was let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permit(u64);

/// Whether a call may be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    Go(Permit),
    /// The service is to be probed first; nobody else does.
    Probe(Permit),
    No(Refusal),
}

/// Why not, and when again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    pub cause: Cause,
    /// For how long it has been so.
    pub lasting: Duration,
    /// When the service is tried next; `None`: somebody is trying it now.
    pub again_in: Option<Duration>,
}

/// Where it stands, for the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    Closed,
    HalfOpen,
    Open,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Closed,
    Open { until: Instant },
    Probing,
}

/// The breaker of one provider.
#[derive(Debug)]
pub struct Breaker {
    settings: Settings,
    state: State,
    /// Counts changes of state.
    epoch: u64,
    /// Why it opened last, since when, and for how long; `None` once a call has been answered.
    trouble: Option<Trouble>,
    silent: Run,
    throttled: Run,
    window: Window,
}

#[derive(Debug, Clone, Copy)]
struct Trouble {
    cause: Cause,
    since: Instant,
    cool_down: Duration,
}

/// The same outcome again and again.
#[derive(Debug, Clone, Copy, Default)]
struct Run {
    length: u32,
    since: Option<Instant>,
}

impl Run {
    fn add(&mut self, now: Instant) {
        self.length = self.length.saturating_add(1);
        self.since.get_or_insert(now);
    }
}

impl Breaker {
    /// A closed one.
    pub fn new(settings: Settings, now: Instant) -> Self {
        Self {
            settings,
            state: State::Closed,
            epoch: 0,
            trouble: None,
            silent: Run::default(),
            throttled: Run::default(),
            window: Window::new(now),
        }
    }

    /// Where it stands.
    pub fn position(&self) -> Position {
        match self.state {
            State::Closed => Position::Closed,
            State::Open { .. } => Position::Open,
            State::Probing => Position::HalfOpen,
        }
    }

    /// Why a call would be refused at `now`; changes nothing.
    pub fn refusal(&self, now: Instant) -> Option<Refusal> {
        let again_in = match self.state {
            State::Closed => return None,
            State::Open { until } => Some(until.checked_duration_since(now).filter(|d| !d.is_zero())?),
            State::Probing => None,
        };
        let t = self.trouble?;
        Some(Refusal { cause: t.cause, lasting: now.saturating_duration_since(t.since), again_in })
    }

    /// Whether a call may be made at `now`. What comes of it must be [recorded](Breaker::record).
    pub fn admit(&mut self, now: Instant) -> Admission {
        if let Some(r) = self.refusal(now) {
            return Admission::No(r);
        }
        if let State::Open { .. } = self.state {
            self.turn(State::Probing);
            return Admission::Probe(Permit(self.epoch));
        }
        Admission::Go(Permit(self.epoch))
    }

    /// What came of a call, at `now`. `random`, uniform over all of u64, keeps many clients of one service from
    /// probing it in step.
    pub fn record(&mut self, permit: Permit, outcome: Outcome, now: Instant, random: u64) {
        if permit.0 != self.epoch {
            return;
        }
        match (self.state, outcome) {
            (State::Probing, Outcome::Silent | Outcome::Throttled) => self.open_again(outcome, now, random),
            (State::Probing, Outcome::Answered | Outcome::Unknown) => {
                (self.silent, self.throttled) = (Run::default(), Run::default());
                self.window = Window::new(now);
                self.turn(State::Closed);
            }
            (State::Closed, _) => self.count(outcome, now, random),
            // Nobody holds a permit of this epoch.
            (State::Open { .. }, _) => {}
        }
    }

    fn count(&mut self, outcome: Outcome, now: Instant, random: u64) {
        match outcome {
            Outcome::Answered => {
                (self.silent, self.throttled) = (Run::default(), Run::default());
                self.trouble = None;
            }
            Outcome::Silent => self.silent.add(now),
            Outcome::Throttled => self.throttled.add(now),
            Outcome::Unknown => return,
        }
        self.window.add(outcome == Outcome::Silent, now);
        if let Some(t) = self.trouble {
            // On trial. Throttling is what a service does that comes back, unless it was the trouble.
            if outcome == Outcome::Silent || (outcome, t.cause) == (Outcome::Throttled, Cause::Throttling) {
                self.open_again(outcome, now, random);
                return;
            }
        }
        let (silent, throttled) = (self.silent, self.throttled);
        let choked = throttled.length >= THROTTLED_CALLS
            && throttled.since.is_some_and(|t| now.saturating_duration_since(t) >= THROTTLED_FOR);
        let (cause, since) =
            if silent.length >= self.settings.failures || self.window.is_bad(self.settings.percent, now) {
                (Cause::Silence, silent.since)
            } else if choked {
                (Cause::Throttling, throttled.since)
            } else {
                return;
            };
        let cool_down = self.settings.pause;
        self.open(Trouble { cause, since: since.unwrap_or(now), cool_down }, now, random);
    }

    fn open_again(&mut self, outcome: Outcome, now: Instant, random: u64) {
        let Some(t) = self.trouble else { return };
        let cause = if outcome == Outcome::Throttled { Cause::Throttling } else { Cause::Silence };
        let cool_down = t.cool_down.saturating_mul(2).min(self.settings.pause_max);
        self.open(Trouble { cause, cool_down, ..t }, now, random);
    }

    /// Opens for between half the cool-down and all of it.
    fn open(&mut self, trouble: Trouble, now: Instant, random: u64) {
        let half = trouble.cool_down / 2;
        self.trouble = Some(trouble);
        self.turn(State::Open { until: now + half + part(half, random) });
    }

    fn turn(&mut self, state: State) {
        self.epoch += 1;
        self.state = state;
    }
}

/// Calls of the last seconds, counted second by second.
#[derive(Debug)]
struct Window {
    origin: Instant,
    /// (second since the origin, calls, silent ones), at the second modulo the length.
    seconds: [(u64, u32, u32); WINDOW_SECONDS as usize],
}

impl Window {
    fn new(origin: Instant) -> Self {
        Self { origin, seconds: [(0, 0, 0); WINDOW_SECONDS as usize] }
    }

    fn add(&mut self, silent: bool, now: Instant) {
        let second = now.saturating_duration_since(self.origin).as_secs();
        let at = usize::try_from(second % WINDOW_SECONDS).unwrap_or_default();
        let Some(s) = self.seconds.get_mut(at) else { return };
        if s.0 != second {
            *s = (second, 0, 0);
        }
        s.1 = s.1.saturating_add(1);
        s.2 = s.2.saturating_add(u32::from(silent));
    }

    fn is_bad(&self, percent: u32, now: Instant) -> bool {
        let second = now.saturating_duration_since(self.origin).as_secs();
        let recent = self.seconds.iter().filter(|s| s.0 + WINDOW_SECONDS > second && s.0 <= second);
        let (calls, silent) = recent.fold((0u64, 0u64), |(c, f), s| (c + u64::from(s.1), f + u64::from(s.2)));
        silent > 0 && calls >= u64::from(WINDOW_CALLS) && silent * 100 >= u64::from(percent) * calls
    }
}

#[cfg(test)]
mod tests;
