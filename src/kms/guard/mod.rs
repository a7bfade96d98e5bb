//! What stands between a store and a key service that can be slow, throttle, refuse or go away.
//!
//! A call passes, from the outside in:
//!
//! 1. [`negative`]: a no heard a moment ago is the answer;
//! 2. [`flight`]: an unwrap that is under way already is waited for instead of made again;
//! 3. [`retry`]: errors that pass by themselves are tried again, with full jitter, within the call's deadline and
//!    everybody's budget; for each attempt
//! 4. [`breaker`]: a service that gives no answer is left alone, and probed by one `health()`;
//! 5. [`limit`]: no faster than the rate, and no more at once than there are slots;
//! 6. [`observed`]: observers hear of every attempt that reaches the provider.
//!
//! Work that no user waits for asks leave first, see [`lane`].
//!
//! The parts decide, given the time and a random number; [`Guarded`] does the calling and the waiting. A call that is
//! under way cannot be broken off: the deadline holds for beginning attempts and for waiting, and a provider bounds the
//! time of one attempt. No error is made up that a caller could take for a refusal: whatever the guard decides by
//! itself is [`KmsError::Unreachable`] or [`KmsError::Throttled`].

pub mod breaker;
pub mod clock;
pub mod flight;
pub mod lane;
pub mod limit;
pub mod negative;
pub mod observed;
pub mod retry;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use super::event::{Observer, Operation};
use super::metrics::{Counters, Gauge, Registry};
use super::services::Limits;
use super::{Capabilities, ConnectOptions, Description, KeyProvider, KeyPurpose, KmsError, RootKeyUri, WrapContext};
use crate::crypto::random;
use crate::crypto::secret::Secret32;
use breaker::{Admission, Breaker, Cause, Outcome, Permit, Position, Refusal};
use clock::{Clock, SystemClock};
use flight::{Flights, Landing, Lost};
use lane::{Background, Common, Lane};
use limit::{Rate, Slot, Slots};
use negative::Negative;
use observed::Observed;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Puts around `provider`, just connected to `uri`, what it needs: observers if there are any, and the guard if its
/// calls leave this machine.
pub fn around(provider: Arc<dyn KeyProvider>, uri: &RootKeyUri, o: &ConnectOptions) -> Arc<dyn KeyProvider> {
    // A service that cannot even say what it is, is one.
    let unknown = Capabilities { remote: uri.scheme().is_remote(), ..Capabilities::default() };
    let capabilities = provider.describe().map_or(unknown, |d| d.capabilities);
    let counted = o.metrics.clone().map(|r| r as Arc<dyn Observer>);
    let observers: Vec<Arc<dyn Observer>> = o.observer.iter().cloned().chain(counted).collect();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let uri = uri.to_string();
    let observed: Arc<dyn KeyProvider> = if observers.is_empty() {
        provider
    } else {
        Arc::new(Observed::new(provider, uri.clone(), capabilities, observers, clock.clone()))
    };
    if !capabilities.remote {
        return observed;
    }
    let parts = Parts {
        uri,
        capabilities,
        metrics: o.metrics.clone().unwrap_or_default(),
        clock,
        random: Box::new(|| u64::from_ne_bytes(random::array())),
    };
    Arc::new(Guarded::new(observed, &o.services.limits, parts))
}

/// What a guard is made from, besides the provider and the limits.
pub struct Parts {
    /// The root key's URI, for messages and metrics.
    pub uri: String,
    pub capabilities: Capabilities,
    pub metrics: Arc<Registry>,
    pub clock: Arc<dyn Clock>,
    /// Uniform over all of u64.
    pub random: Box<dyn Fn() -> u64 + Send + Sync>,
}

/// A guarded provider.
pub struct Guarded {
    inner: Arc<dyn KeyProvider>,
    uri: String,
    capabilities: Capabilities,
    described: Mutex<Option<Description>>,
    limits: Limits,
    policy: retry::Policy,
    clock: Arc<dyn Clock>,
    random: Box<dyn Fn() -> u64 + Send + Sync>,
    counters: Arc<Counters>,
    gauge: Arc<Gauge>,
    budget: Mutex<retry::Budget>,
    breaker: Mutex<Breaker>,
    rate: Mutex<Rate>,
    slots: Slots,
    /// For [`Background`] work.
    rotation: Mutex<Lane>,
    ahead: Mutex<Lane>,
    flights: Flights,
    negative: Mutex<Negative>,
}

/// Leave for one attempt. Dropped without a result (a panic), the service counts as silent.
struct Pass<'a> {
    guard: &'a Guarded,
    permit: Permit,
    reported: bool,
    _slot: Slot<'a>,
}

impl Pass<'_> {
    fn end(mut self, outcome: Outcome) {
        self.report(outcome);
    }

    fn report(&mut self, outcome: Outcome) {
        if !std::mem::replace(&mut self.reported, true) {
            self.guard.record(self.permit, outcome);
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.report(Outcome::Silent);
    }
}

/// What the end of a call tells of the service.
fn outcome<T>(r: &Result<T, KmsError>) -> Outcome {
    match r {
        Ok(_) => Outcome::Answered,
        Err(e) => match e {
            KmsError::Unreachable(_) => Outcome::Silent,
            KmsError::Throttled(_) => Outcome::Throttled,
            KmsError::Denied(_) | KmsError::Disabled(_) | KmsError::NotFound(_) => Outcome::Answered,
            // Often found out without asking: bytes that cannot be a wrap, credentials that are not there.
            KmsError::BadCiphertext(_) | KmsError::Credentials(_) | KmsError::Config(_) => Outcome::Unknown,
        },
    }
}

/// Many results as that of one call: an error, if it is the same for all of them and is not about one wrapped key.
fn whole(results: Vec<Result<Secret32, KmsError>>) -> Result<Vec<Result<Secret32, KmsError>>, KmsError> {
    match results.first() {
        Some(Err(e)) if !matches!(e, KmsError::BadCiphertext(_) | KmsError::NotFound(_)) => {
            let e = e.clone();
            if results.iter().all(|r| r.as_ref().err() == Some(&e)) { Err(e) } else { Ok(results) }
        }
        _ => Ok(results),
    }
}

/// What is called, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Key,
    /// Is its own probe.
    Health,
}

impl Guarded {
    /// Guards `inner` with `limits`.
    pub fn new(inner: Arc<dyn KeyProvider>, limits: &Limits, parts: Parts) -> Self {
        let (now, limits) = (parts.clock.now(), limits.bounded());
        let settings = breaker::Settings {
            failures: limits.breaker_failures,
            percent: limits.breaker_percent,
            pause: Duration::from_secs(limits.breaker_pause),
            pause_max: Duration::from_secs(limits.breaker_pause_max),
        };
        let lane = |whose, share| Mutex::new(Lane::new(whose, share, limits.calls_per_second, limits.burst, now));
        Self {
            rotation: lane(Background::Rotation, limits.rotation_share),
            ahead: lane(Background::Ahead, limits.ahead_share),
            policy: retry::Policy::new(limits.attempts),
            counters: parts.metrics.counters(&parts.uri),
            gauge: parts.metrics.breaker(&parts.uri),
            budget: Mutex::new(retry::Budget::new(now)),
            breaker: Mutex::new(Breaker::new(settings, now)),
            rate: Mutex::new(Rate::new(limits.calls_per_second, limits.burst, now)),
            slots: Slots::new(limits.concurrent),
            flights: Flights::default(),
            negative: Mutex::new(Negative::new(Duration::from_secs(limits.negative_cache))),
            described: Mutex::new(None),
            limits,
            uri: parts.uri,
            capabilities: parts.capabilities,
            clock: parts.clock,
            random: parts.random,
            inner,
        }
    }

    fn deadline(&self) -> Instant {
        self.clock.now() + Duration::from_secs(self.limits.deadline)
    }

    /// One call for one key, past the negative cache's refusals, with retries until `deadline`.
    fn call<T>(
        &self,
        operation: Operation,
        purpose: KeyPurpose,
        deadline: Instant,
        attempt: impl Fn() -> Result<T, KmsError>,
    ) -> Result<T, KmsError> {
        let epoch = {
            let n = self.negative.lock();
            if let Some(e) = n.refused(operation, purpose, self.clock.now()) {
                self.counters.negative_hits.add_one();
                return Err(e);
            }
            n.epoch()
        };
        let r = self.attempts(Kind::Key, deadline, attempt);
        if let Err(e) = &r {
            self.negative.lock().failed(operation, purpose, e, epoch, self.clock.now());
        }
        r
    }

    fn attempts<T>(
        &self,
        kind: Kind,
        deadline: Instant,
        attempt: impl Fn() -> Result<T, KmsError>,
    ) -> Result<T, KmsError> {
        self.budget.lock().earn();
        let (begun, mut made, mut last) = (self.clock.now(), 0u32, None);
        loop {
            let pass = match self.enter(kind, deadline) {
                Ok(p) => p,
                // What the service said says more than that it is not asked again.
                Err(refused) => return Err(last.map_or(refused, |e| self.after(e, made, begun))),
            };
            let r = attempt();
            made += 1;
            pass.end(outcome(&r));
            let e = match r {
                Err(e) if e.is_retryable() => e,
                answer => return answer,
            };
            let Some(pause) = self.pause(made, deadline) else { return Err(self.after(e, made, begun)) };
            self.counters.retries.add_one();
            self.clock.sleep(pause);
            last = Some(e);
        }
    }

    /// How long to wait before the next attempt, paid from the budget; `None` if there is to be none.
    fn pause(&self, made: u32, deadline: Instant) -> Option<Duration> {
        let now = self.clock.now();
        // No pause, and nothing paid, if the breaker would refuse.
        if self.breaker.lock().position() != Position::Closed {
            return None;
        }
        let pause = self.policy.pause(made, (self.random)(), now, deadline)?;
        self.budget.lock().spend(now).then_some(pause)
    }

    /// Waits for leave to make one attempt.
    fn enter(&self, kind: Kind, deadline: Instant) -> Result<Pass<'_>, KmsError> {
        // Looked at first, so that nobody queues for a service that is not called anyway.
        let now = self.clock.now();
        if let Some(r) = self.breaker.lock().refusal(now) {
            return Err(self.refused(&r));
        }
        let turn = self.rate.lock().reserve(now, deadline);
        match turn {
            Some(wait) if wait.is_zero() => {}
            Some(wait) => {
                self.counters.waited(wait);
                self.clock.sleep(wait);
            }
            None => return Err(self.own_limit("calls_per_second", self.limits.calls_per_second)),
        }
        let Some(slot) = self.slots.take(self.clock.as_ref(), deadline) else {
            return Err(self.own_limit("concurrent", self.limits.concurrent));
        };
        match self.admit() {
            Admission::Go(permit) => Ok(Pass { guard: self, permit, reported: false, _slot: slot }),
            Admission::No(r) => Err(self.refused(&r)),
            Admission::Probe(permit) => {
                let pass = Pass { guard: self, permit, reported: false, _slot: slot };
                if kind == Kind::Health { Ok(pass) } else { self.probe(pass, deadline) }
            }
        }
    }

    /// Asks the service how it is. An answer, whichever, gives leave for the call that is waiting.
    fn probe<'a>(&'a self, mut pass: Pass<'a>, deadline: Instant) -> Result<Pass<'a>, KmsError> {
        let r = self.inner.health();
        pass.report(outcome(&r));
        match r {
            Ok(()) => self.negative.lock().healthy(),
            Err(e) if e.is_retryable() => return Err(e),
            Err(_) => {}
        }
        if self.clock.now() >= deadline {
            let text = format!("{}: it answers again, but the time for this call is over; try again", self.uri);
            return Err(KmsError::Unreachable(text));
        }
        match self.admit() {
            Admission::Go(permit) | Admission::Probe(permit) => {
                (pass.permit, pass.reported) = (permit, false);
                Ok(pass)
            }
            Admission::No(r) => Err(self.refused(&r)),
        }
    }

    fn admit(&self) -> Admission {
        let mut b = self.breaker.lock();
        let a = b.admit(self.clock.now());
        self.gauge.set(b.position());
        a
    }

    fn record(&self, permit: Permit, outcome: Outcome) {
        let random = (self.random)();
        let mut b = self.breaker.lock();
        let before = b.position();
        b.record(permit, outcome, self.clock.now(), random);
        let after = b.position();
        self.gauge.set(after);
        drop(b);
        match (before, after) {
            (Position::Open, Position::Open) => {}
            (_, Position::Open) => {
                self.counters.breaker_opened.add_one();
                tracing::warn!("{}: no answer that helps; the key service is left alone for a while", self.uri);
            }
            (Position::HalfOpen, Position::Closed) => tracing::info!("{}: the key service answers again", self.uri),
            _ => {}
        }
    }

    fn refused(&self, r: &Refusal) -> KmsError {
        self.counters.fast_failures.add_one();
        let (uri, lasting) = (&self.uri, r.lasting.as_secs());
        let again = match r.again_in {
            Some(d) => format!("it is tried again in {} s", d.as_millis().div_ceil(1000)),
            None => "it is being tried now".to_owned(),
        };
        match r.cause {
            Cause::Silence => KmsError::Unreachable(format!("{uri}: not asked, no answer for {lasting} s; {again}")),
            Cause::Throttling => {
                KmsError::Throttled(format!("{uri}: not asked, nothing but throttling for {lasting} s; {again}"))
            }
        }
    }

    fn own_limit(&self, name: &str, value: u32) -> KmsError {
        let (uri, s) = (&self.uri, self.limits.deadline);
        KmsError::Throttled(format!(
            "{uri}: no turn within {s} s under our own limit, {name} = {value}; try again or raise it in [services.limits]"
        ))
    }

    /// An error that is given up on, with what was tried.
    fn after(&self, e: KmsError, made: u32, begun: Instant) -> KmsError {
        if made < 2 {
            return e;
        }
        let took = self.clock.now().saturating_duration_since(begun).as_secs_f64();
        let with = |text: String| format!("{text} ({made} attempts in {took:.1} s)");
        match e {
            KmsError::Unreachable(t) => KmsError::Unreachable(with(t)),
            KmsError::Throttled(t) => KmsError::Throttled(with(t)),
            other => other,
        }
    }

    /// The call of a leader of a flight.
    fn unwrap_once(
        &self,
        what: negative::Digest,
        wrapped: &[u8],
        context: &WrapContext,
        epoch: u64,
        deadline: Instant,
    ) -> Result<Secret32, KmsError> {
        let attempt = || self.inner.unwrap(wrapped, context);
        let r = self.call(Operation::Unwrap, context.purpose, deadline, attempt);
        if let Err(e) = &r {
            self.negative.lock().unwrap_failed(what, context, e, epoch, self.clock.now());
        }
        r
    }
}

impl KeyProvider for Guarded {
    /// While the service is left alone, what it said last.
    fn describe(&self) -> Result<Description, KmsError> {
        let known = self.described.lock().clone();
        match known {
            Some(d) if self.breaker.lock().position() != Position::Closed => Ok(d),
            known => match self.inner.describe() {
                Ok(d) => Ok(self.described.lock().insert(d).clone()),
                Err(e) => known.ok_or(e),
            },
        }
    }

    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
        let attempt = || self.inner.wrap(key, context);
        let wrapped = self.call(Operation::Wrap, context.purpose, self.deadline(), attempt)?;
        self.negative.lock().wrapped(context);
        Ok(wrapped)
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        let what = negative::digest(wrapped, context);
        let (known, epoch) = {
            let n = self.negative.lock();
            (n.unopenable(&what, self.clock.now()), n.epoch())
        };
        if let Some(e) = known {
            self.counters.negative_hits.add_one();
            return Err(e);
        }
        let deadline = self.deadline();
        let call = || self.unwrap_once(what, wrapped, context, epoch, deadline);
        match self.flights.join(what, self.clock.as_ref(), deadline, call) {
            Landing::Led(r) => r,
            Landing::Joined(r) => {
                self.counters.joined.add_one();
                r.map_err(|lost| match lost {
                    Lost::Failed(e) => e,
                    Lost::Abandoned => {
                        KmsError::Unreachable(format!("{}: the call for this key broke off; try again", self.uri))
                    }
                    Lost::TooLong => {
                        let s = self.limits.deadline;
                        KmsError::Unreachable(format!("{}: no answer within {s} s; try again", self.uri))
                    }
                })
            }
        }
    }

    /// Many keys that the service takes at once are one call here, tried again as a whole if all of it failed; else each
    /// is a call of its own. Not joined with unwraps of single keys that are under way: this is for opening a keyring.
    fn unwrap_many(&self, items: &[(&[u8], &WrapContext)]) -> Vec<Result<Secret32, KmsError>> {
        let purpose = items.first().map(|(_, c)| c.purpose);
        let alike = items.iter().all(|(_, c)| Some(c.purpose) == purpose);
        let Some(purpose) = purpose.filter(|_| self.capabilities.native_batch && alike && items.len() > 1) else {
            return items.iter().map(|(wrapped, context)| self.unwrap(wrapped, context)).collect();
        };
        let digests: Vec<negative::Digest> = items.iter().map(|(w, c)| negative::digest(w, c)).collect();
        let (known, epoch) = {
            let (n, now) = (self.negative.lock(), self.clock.now());
            (digests.iter().map(|d| n.unopenable(d, now)).collect::<Vec<_>>(), n.epoch())
        };
        let asked: Vec<(&[u8], &WrapContext)> =
            items.iter().zip(&known).filter(|(_, k)| k.is_none()).map(|(i, _)| *i).collect();
        let attempt = || whole(self.inner.unwrap_many(&asked));
        let answer = if asked.is_empty() {
            Ok(Vec::new())
        } else {
            self.call(Operation::Unwrap, purpose, self.deadline(), attempt)
        };
        let failed = answer.as_ref().err().cloned();
        let mut answers = answer.unwrap_or_default().into_iter();
        let each = items.iter().zip(digests).zip(known).map(|(((_, context), what), known)| {
            if let Some(e) = known {
                self.counters.negative_hits.add_one();
                return Err(e);
            }
            if let Some(e) = &failed {
                return Err(e.clone());
            }
            let missing = || Err(KmsError::Unreachable(format!("{}: an answer without this key", self.uri)));
            let r = answers.next().unwrap_or_else(missing);
            if let Err(e) = &r {
                self.negative.lock().unwrap_failed(what, context, e, epoch, self.clock.now());
            }
            r
        });
        each.collect()
    }

    fn rewrap(&self, wrapped: &[u8], from: &WrapContext, to: &WrapContext) -> Result<Vec<u8>, KmsError> {
        if !self.capabilities.native_rewrap {
            // Each half by itself: a wrap that fails is no reason to unwrap again.
            let key = self.unwrap(wrapped, from)?;
            return self.wrap(&key, to);
        }
        let attempt = || self.inner.rewrap(wrapped, from, to);
        let moved = self.call(Operation::Rewrap, to.purpose, self.deadline(), attempt)?;
        self.negative.lock().wrapped(to);
        Ok(moved)
    }

    fn generate(&self, context: &WrapContext) -> Result<(Secret32, Vec<u8>), KmsError> {
        if !self.capabilities.native_generate {
            let key = Secret32::random();
            let wrapped = self.wrap(&key, context)?;
            return Ok((key, wrapped));
        }
        let attempt = || self.inner.generate(context);
        let made = self.call(Operation::Generate, context.purpose, self.deadline(), attempt)?;
        self.negative.lock().wrapped(context);
        Ok(made)
    }

    fn health(&self) -> Result<(), KmsError> {
        self.attempts(Kind::Health, self.deadline(), || self.inner.health())?;
        self.negative.lock().healthy();
        Ok(())
    }

    /// Answered without a call as a rule: it takes no turn, is not tried again, and a success says nothing of the
    /// service. While the service is left alone, its health comes first.
    fn rewrap_due(&self, wrapped: &[u8]) -> Result<bool, KmsError> {
        let closed = |b: &mut Breaker, now| (b.position() == Position::Closed).then(|| b.admit(now));
        let admitted = closed(&mut self.breaker.lock(), self.clock.now());
        let Some(Admission::Go(permit)) = admitted else {
            self.health()?;
            return self.inner.rewrap_due(wrapped);
        };
        let r = self.inner.rewrap_due(wrapped);
        if r.is_err() {
            self.record(permit, outcome(&r));
        }
        r
    }

    /// While the service is left alone, nothing is done ahead of need; a rotation hears why from its calls.
    fn leave(&self, whose: Background, calls: u32) -> Result<(), Duration> {
        let now = self.clock.now();
        if whose == Background::Ahead && self.breaker.lock().position() != Position::Closed {
            return Err(Duration::from_secs(1));
        }
        let mut lane = match whose {
            Background::Rotation => self.rotation.lock(),
            Background::Ahead => self.ahead.lock(),
        };
        let (slots, free) = (self.limits.concurrent, self.slots.free());
        let rate = self.rate.lock();
        lane.ask(calls, Common { rate: &rate, slots, free }, now)
    }
}
