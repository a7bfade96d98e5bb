//! The guard as a whole, around a scripted provider, by a clock that the tests move.

use super::fake::FakeClock;
use super::*;
use crate::kms::event::{self, Caller};
use crate::kms::scripted::{Behaviour, Call, Gate, Scripted};
use proptest::prelude::*;

const S: fn(u64) -> Duration = Duration::from_secs;

struct Bench {
    guard: Guarded,
    inner: Arc<Scripted>,
    clock: Arc<FakeClock>,
    metrics: Arc<Registry>,
    log: Arc<Log>,
}

/// Operation, whether it went well, request id, caller's pid.
type Line = (Operation, bool, Option<String>, Option<u32>);

/// Each call.
#[derive(Default)]
struct Log(Mutex<Vec<Line>>);

impl Observer for Log {
    fn call(&self, c: &event::Call<'_>) {
        assert_eq!(c.context.is_none(), c.operation == Operation::Health);
        assert_eq!(c.provider, "scripted:s");
        let pid = c.caller.map(|c| c.pid);
        self.0.lock().push((c.operation, c.result.is_ok(), c.request_id.clone(), pid));
    }
}

/// Random numbers are always the middle of their range.
fn bench(limits: &Limits) -> Bench {
    let (inner, clock, metrics) = (Scripted::new("s"), FakeClock::new(), Registry::new());
    let log = Arc::new(Log::default());
    let observers: Vec<Arc<dyn Observer>> = vec![log.clone(), metrics.clone()];
    let capabilities = inner.describe().unwrap().capabilities;
    let observed = Observed::new(inner.clone(), "scripted:s".into(), capabilities, observers, clock.clone());
    let parts = Parts {
        uri: "scripted:s".into(),
        capabilities,
        metrics: metrics.clone(),
        clock: clock.clone(),
        random: Box::new(|| 1 << 63),
    };
    Bench { guard: Guarded::new(Arc::new(observed), limits, parts), inner, clock, metrics, log }
}

impl Bench {
    fn counters(&self) -> Arc<Counters> {
        self.metrics.counters("scripted:s")
    }

    fn unwraps(&self) -> usize {
        self.inner.count(Call::Unwrap)
    }

    fn breaker_is(&self, p: Position) -> bool {
        let mut text = String::new();
        self.metrics.render(&mut text);
        let shown = text.contains(&format!("breaker_state{{root_key=\"scripted:s\"}} {}\n", p as u8));
        assert_eq!(shown, self.guard.breaker.lock().position() == p, "the gauge follows: {text}");
        shown
    }
}

fn context(n: u8) -> WrapContext {
    WrapContext { store: [1; 16], purpose: KeyPurpose::Dek, object: [n; 16], extra: vec![] }
}

/// One more wrapped key, for a context of its own.
fn wrapped(b: &Bench, n: u8) -> Vec<u8> {
    b.guard.wrap(&Secret32::random(), &context(n)).unwrap()
}

fn fail(e: KmsError) -> Behaviour {
    Behaviour::Fail(e)
}

fn throttled() -> KmsError {
    KmsError::Throttled("slow down".into())
}

fn unreachable() -> KmsError {
    KmsError::Unreachable("no answer".into())
}

#[test]
fn nothing_is_in_the_way_when_all_is_well() {
    let b = bench(&Limits::default());
    let key = Secret32::random();
    let w = b.guard.wrap(&key, &context(1)).unwrap();
    assert!(b.guard.unwrap(&w, &context(1)).unwrap().ct_eq(&key));
    let (key, w) = b.guard.generate(&context(2)).unwrap();
    let moved = b.guard.rewrap(&w, &context(2), &context(3)).unwrap();
    assert!(b.guard.unwrap(&moved, &context(3)).unwrap().ct_eq(&key));
    b.guard.health().unwrap();
    assert!(!b.guard.rewrap_due(&w).unwrap());
    assert_eq!(b.guard.describe().unwrap(), b.inner.describe().unwrap());
    assert!(b.clock.slept().is_empty());
    let counts = [Call::Wrap, Call::Unwrap, Call::Health].map(|c| b.inner.count(c));
    assert_eq!(counts, [3, 3, 1]);
    let seen: Vec<Operation> = b.log.0.lock().iter().map(|c| c.0).collect();
    use Operation::{Health, Unwrap, Wrap};
    assert_eq!(seen, [Wrap, Unwrap, Wrap, Unwrap, Wrap, Unwrap, Health]);
    assert!(b.breaker_is(Position::Closed));
}

#[test]
fn throttling_is_waited_out_with_growing_pauses() {
    let b = bench(&Limits::default());
    let w = wrapped(&b, 1);
    for _ in 0..3 {
        b.inner.then(Call::Unwrap, fail(throttled()));
    }
    b.guard.unwrap(&w, &context(1)).unwrap();
    let ms = Duration::from_millis;
    assert_eq!(b.clock.slept(), [ms(100), ms(200), ms(400)], "half of each ceiling");
    assert_eq!((b.unwraps(), b.counters().retries.get()), (4, 3));
    assert_eq!(b.counters().calls(Operation::Unwrap, Err(&throttled())), 3);
    // A fourth time is once too often, and the message says what was tried.
    for _ in 0..4 {
        b.inner.then(Call::Unwrap, fail(throttled()));
    }
    let e = b.guard.unwrap(&w, &context(1)).unwrap_err();
    assert_eq!(e, KmsError::Throttled("slow down (4 attempts in 0.7 s)".into()));
}

#[test]
fn only_what_may_pass_by_itself_is_retried() {
    let t = || "x".to_owned();
    let final_ones = [
        KmsError::Denied(t()),
        KmsError::Disabled(t()),
        KmsError::NotFound(t()),
        KmsError::BadCiphertext(t()),
        KmsError::Credentials(t()),
        KmsError::Config(t()),
    ];
    for e in final_ones {
        let b = bench(&Limits::default());
        let w = wrapped(&b, 1);
        b.inner.then(Call::Unwrap, fail(e.clone()));
        assert_eq!(b.guard.unwrap(&w, &context(1)).unwrap_err(), e);
        assert_eq!((b.unwraps(), b.clock.slept().len()), (1, 0), "{e:?}");
        // And it is no failure of the service, however often.
        b.inner.always(fail(e.clone()));
        for _ in 0..50 {
            b.clock.advance(S(11));
            assert_eq!(b.guard.unwrap(&w, &context(1)).unwrap_err(), e);
        }
        assert_eq!(b.unwraps(), 51);
        assert!(b.breaker_is(Position::Closed), "{e:?}");
    }
}

#[test]
fn an_outage_opens_the_breaker_and_one_probe_ends_it() {
    let b = bench(&Limits::default());
    let w = wrapped(&b, 1);
    b.inner.outage();
    // Four attempts, then the fifth failure in a row.
    assert!(b.guard.unwrap(&w, &context(1)).is_err());
    assert!(b.guard.unwrap(&w, &context(1)).is_err());
    assert!(b.breaker_is(Position::Open));
    assert_eq!((b.unwraps(), b.clock.slept().len()), (5, 3), "no pause before what would be refused");
    let e = b.guard.unwrap(&w, &context(1)).unwrap_err();
    let text = e.to_string();
    assert!(matches!(e, KmsError::Unreachable(_)), "{text}");
    assert!(text.contains("scripted:s: not asked, no answer for 0 s; it is tried again in 1 s"), "{text}");
    assert!(b.guard.wrap(&Secret32::random(), &context(2)).is_err());
    assert!(b.guard.health().is_err());
    assert!(b.guard.rewrap_due(&w).is_err());
    assert!(b.guard.describe().is_ok());
    assert_eq!((b.unwraps(), b.inner.count(Call::Wrap), b.inner.count(Call::Health)), (5, 1, 0), "left alone");
    // Still down: one health check each time, and no unwrap.
    for n in 1..=3 {
        b.clock.advance(S(30));
        assert!(b.guard.unwrap(&w, &context(1)).is_err());
        assert!(b.guard.unwrap(&w, &context(1)).is_err());
        assert_eq!((b.unwraps(), b.inner.count(Call::Health)), (5, n));
    }
    b.inner.always(Behaviour::Obey);
    b.clock.advance(S(30));
    b.guard.unwrap(&w, &context(1)).unwrap();
    assert!(b.breaker_is(Position::Closed));
    b.guard.unwrap(&w, &context(1)).unwrap();
    assert_eq!((b.unwraps(), b.inner.count(Call::Health)), (7, 4), "one probe, then as before");
    assert_eq!(b.counters().breaker_opened.get(), 4, "at first and after each vain probe");
    assert!(b.counters().fast_failures.get() >= 7);
}

#[test]
fn a_health_check_is_its_own_probe_and_rewrap_due_is_not() {
    let b = bench(&Limits { breaker_failures: 1, ..Limits::default() });
    let w = wrapped(&b, 1);
    b.inner.then(Call::Unwrap, fail(unreachable()));
    assert!(b.guard.unwrap(&w, &context(1)).is_err());
    b.clock.advance(S(1));
    b.guard.health().unwrap();
    assert_eq!(b.inner.count(Call::Health), 1);
    assert!(b.breaker_is(Position::Closed));
    b.inner.then(Call::Unwrap, fail(unreachable()));
    assert!(b.guard.unwrap(&w, &context(1)).is_err());
    b.clock.advance(S(2));
    assert!(!b.guard.rewrap_due(&w).unwrap());
    assert_eq!(b.inner.count(Call::Health), 2);
}

#[test]
fn while_one_probes_the_others_fail_at_once() {
    let b = bench(&Limits { breaker_failures: 1, ..Limits::default() });
    let keys: Vec<_> = (0..8).map(|n| wrapped(&b, n)).collect();
    b.inner.then(Call::Unwrap, fail(unreachable()));
    assert!(b.guard.unwrap(&keys[0], &context(0)).is_err());
    b.clock.advance(S(1));
    let gate = Gate::new();
    b.inner.then(Call::Health, Behaviour::Hold(gate.clone()));
    std::thread::scope(|s| {
        let prober = s.spawn(|| b.guard.unwrap(&keys[0], &context(0)));
        gate.wait_for(1);
        assert!(b.breaker_is(Position::HalfOpen));
        for n in 1..8u8 {
            let e = b.guard.unwrap(&keys[usize::from(n)], &context(n)).unwrap_err();
            assert!(e.is_retryable() && e.to_string().ends_with("it is being tried now"), "{e}");
        }
        gate.open();
        assert!(prober.join().unwrap().is_ok());
    });
    assert_eq!((b.unwraps(), b.inner.count(Call::Health)), (2, 1));
}

#[test]
fn a_probe_that_is_refused_lets_the_call_through() {
    // A policy may allow Decrypt and not DescribeKey.
    let b = bench(&Limits { breaker_failures: 1, ..Limits::default() });
    let w = wrapped(&b, 1);
    b.inner.then(Call::Unwrap, fail(unreachable())).then(Call::Health, fail(KmsError::Denied("no".into())));
    assert!(b.guard.unwrap(&w, &context(1)).is_err());
    b.clock.advance(S(1));
    b.guard.unwrap(&w, &context(1)).unwrap();
    assert!(b.breaker_is(Position::Closed));
}

#[test]
fn a_probe_that_goes_well_voids_refusals() {
    let b = bench(&Limits { breaker_failures: 1, ..Limits::default() });
    let (w, kek) = (wrapped(&b, 1), WrapContext { purpose: KeyPurpose::Kek, ..context(1) });
    let v = b.guard.wrap(&Secret32::random(), &kek).unwrap();
    b.inner.then(Call::Unwrap, fail(KmsError::Denied("x".into()))).then(Call::Unwrap, fail(unreachable()));
    assert!(matches!(b.guard.unwrap(&w, &context(1)), Err(KmsError::Denied(_))));
    assert!(matches!(b.guard.unwrap(&v, &kek), Err(KmsError::Unreachable(_))));
    // Within the second for which a refusal is remembered.
    b.clock.advance(Duration::from_millis(800));
    assert!(matches!(b.guard.unwrap(&w, &context(1)), Err(KmsError::Denied(_))));
    b.guard.unwrap(&v, &kek).unwrap();
    b.guard.unwrap(&w, &context(1)).unwrap();
    assert_eq!((b.unwraps(), b.inner.count(Call::Health)), (4, 1));
}

#[test]
fn a_provider_that_panics_leaves_the_guard_working() {
    struct Panics(Arc<Scripted>);
    impl KeyProvider for Panics {
        fn describe(&self) -> Result<Description, KmsError> {
            self.0.describe()
        }
        fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
            self.0.wrap(key, context)
        }
        fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
            if wrapped == b"panic" { std::panic::resume_unwind(Box::new("x")) } else { self.0.unwrap(wrapped, context) }
        }
        fn health(&self) -> Result<(), KmsError> {
            if self.0.health().is_err() { std::panic::resume_unwind(Box::new("x")) } else { Ok(()) }
        }
    }
    let clock = FakeClock::new();
    let inner = Scripted::new("s");
    let parts = Parts {
        uri: "scripted:s".into(),
        capabilities: Capabilities::default(),
        metrics: Registry::new(),
        clock: clock.clone(),
        random: Box::new(|| 0),
    };
    let limits = Limits { concurrent: 1, breaker_failures: 1, ..Limits::default() };
    let guard = Guarded::new(Arc::new(Panics(inner.clone())), &limits, parts);
    let w = guard.wrap(&Secret32::random(), &context(1)).unwrap();
    let caught = |f: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).is_err();
    assert!(caught(&|| drop(guard.unwrap(b"panic", &context(1)))));
    assert!(guard.unwrap(&w, &context(1)).unwrap_err().is_retryable(), "the breaker is open, the only slot is free");
    clock.advance(S(1));
    inner.then(Call::Health, fail(unreachable()));
    assert!(caught(&|| drop(guard.unwrap(&w, &context(1)))), "the probe dies");
    clock.advance(S(2));
    guard.unwrap(&w, &context(1)).unwrap();
}

#[test]
fn unwraps_of_one_key_at_one_time_are_one_call() {
    let b = bench(&Limits::default());
    let w = wrapped(&b, 1);
    let (gate, others) = (Gate::new(), 12);
    b.inner.then(Call::Unwrap, Behaviour::Hold(gate.clone()));
    std::thread::scope(|s| {
        let open = || b.guard.unwrap(&w, &context(1)).unwrap();
        let mut all = vec![s.spawn(open)];
        gate.wait_for(1);
        all.extend((0..others).map(|_| s.spawn(open)));
        b.clock.wait_for_waiters(others);
        // The same bytes for something else are something else.
        assert!(matches!(b.guard.unwrap(&w, &context(2)), Err(KmsError::BadCiphertext(_))));
        gate.open();
        let keys: Vec<Secret32> = all.into_iter().map(|t| t.join().unwrap()).collect();
        assert!(keys.windows(2).all(|k| k[0].ct_eq(&k[1])));
    });
    assert_eq!(b.unwraps(), 2);
    assert_eq!(b.counters().joined.get(), others as u64);
}

#[test]
fn a_key_that_does_not_open_is_not_tried_again_for_a_while() {
    let b = bench(&Limits::default());
    wrapped(&b, 1);
    for _ in 0..20 {
        assert!(matches!(b.guard.unwrap(b"junk", &context(1)), Err(KmsError::BadCiphertext(_))));
    }
    assert_eq!((b.unwraps(), b.counters().negative_hits.get()), (1, 19));
    b.clock.advance(S(10));
    assert!(b.guard.unwrap(b"junk", &context(1)).is_err());
    assert_eq!(b.unwraps(), 2);
    assert!(b.breaker_is(Position::Closed));
}

/// What `key add` and `rotate` do: find out that a provider is not a root key, have it wrap, and open what it wrapped.
#[test]
fn a_wrap_makes_the_negative_cache_forget_its_context() {
    let b = bench(&Limits::default());
    let key = Secret32::random();
    let other = Scripted::new("other").wrap(&key, &context(1)).unwrap();
    assert!(matches!(b.guard.unwrap(&other, &context(1)), Err(KmsError::BadCiphertext(_))));
    let w = b.guard.wrap(&key, &context(1)).unwrap();
    assert!(b.guard.unwrap(&w, &context(1)).unwrap().ct_eq(&key));
    // It was lost for a moment, or so the service said; once it wraps for that context again, it is asked again.
    b.inner.then(Call::Unwrap, fail(KmsError::BadCiphertext("a lie".into())));
    assert!(b.guard.unwrap(&w, &context(1)).is_err());
    assert!(b.guard.unwrap(&w, &context(1)).is_err(), "remembered");
    let again: [&dyn Fn() -> bool; 3] =
        [&|| b.guard.wrap(&key, &context(1)).is_ok(), &|| b.guard.generate(&context(1)).is_ok(), &|| {
            b.guard.rewrap(&b.guard.wrap(&key, &context(2)).unwrap(), &context(2), &context(1)).is_ok()
        }];
    for wraps in again {
        assert!(wraps());
        assert!(b.guard.unwrap(&w, &context(1)).unwrap().ct_eq(&key));
        b.inner.then(Call::Unwrap, fail(KmsError::BadCiphertext("a lie".into())));
        assert!(b.guard.unwrap(&w, &context(1)).is_err());
        assert!(b.guard.wrap(&key, &context(9)).is_ok());
        assert!(b.guard.unwrap(&w, &context(1)).is_err(), "another context's wrap says nothing of it");
    }
    // A wrap that overtakes the unwrap counts, too.
    let gate = Gate::new();
    let junk = vec![0; 60];
    b.inner.then(Call::Unwrap, Behaviour::Hold(gate.clone()));
    let before = std::thread::scope(|s| {
        let slow = s.spawn(|| b.guard.unwrap(&junk, &context(1)));
        gate.wait_for(1);
        b.guard.wrap(&key, &context(1)).unwrap();
        gate.open();
        assert!(slow.join().unwrap().is_err());
        b.unwraps()
    });
    assert!(b.guard.unwrap(&junk, &context(1)).is_err());
    assert_eq!(b.unwraps(), before + 1, "nothing was kept");
}

#[test]
fn a_storm_of_opens_is_one_refusal() {
    let refusals = [KmsError::Denied("x".into()), KmsError::Disabled("x".into()), KmsError::Credentials("x".into())];
    for e in refusals {
        let b = bench(&Limits::default());
        let keys: Vec<_> = (0..20).map(|n| wrapped(&b, n)).collect();
        b.inner.always(fail(e.clone()));
        for (n, w) in (0..).zip(&keys) {
            assert_eq!(b.guard.unwrap(w, &context(n)).unwrap_err(), e);
        }
        assert_eq!(b.unwraps(), 1);
        let kek = WrapContext { purpose: KeyPurpose::Kek, ..context(1) };
        assert_eq!(b.guard.unwrap(&keys[0], &kek).unwrap_err(), e);
        assert_eq!(b.unwraps(), 2, "what is refused for files may be allowed for KEKs");
        b.inner.always(Behaviour::Obey);
        b.guard.wrap(&Secret32::random(), &context(1)).unwrap();
        // A wrap voids only refusals that are on their way; a second, or good health, those that are there.
        assert_eq!(b.guard.unwrap(&keys[0], &context(0)).unwrap_err(), e);
        if e == KmsError::Denied("x".into()) {
            b.clock.advance(S(1));
        } else {
            b.guard.health().unwrap();
        }
        b.guard.unwrap(&keys[0], &context(0)).unwrap();
    }
}

#[test]
fn the_deadline_holds_while_a_call_hangs() {
    let b = bench(&Limits { concurrent: 1, ..Limits::default() });
    let (w, v) = (wrapped(&b, 1), wrapped(&b, 2));
    let gate = Gate::new();
    b.inner.then(Call::Unwrap, Behaviour::Hold(gate.clone()));
    std::thread::scope(|s| {
        let held = s.spawn(|| b.guard.unwrap(&w, &context(1)));
        gate.wait_for(1);
        let follower = s.spawn(|| b.guard.unwrap(&w, &context(1)));
        let queued = s.spawn(|| b.guard.unwrap(&v, &context(2)));
        b.clock.wait_for_waiters(2);
        b.clock.advance(Duration::from_millis(5999));
        b.clock.wait_for_waiters(2);
        b.clock.advance(Duration::from_millis(1));
        let e = follower.join().unwrap().unwrap_err();
        assert_eq!(e, KmsError::Unreachable("scripted:s: no answer within 6 s; try again".into()));
        let e = queued.join().unwrap().unwrap_err();
        assert!(matches!(&e, KmsError::Throttled(t) if t.contains("concurrent = 1")), "{e}");
        gate.open();
        held.join().unwrap().unwrap();
    });
    assert_eq!(b.unwraps(), 1);
}

#[test]
fn no_attempt_begins_after_the_deadline() {
    struct Slow(Arc<Scripted>, Arc<FakeClock>);
    impl KeyProvider for Slow {
        fn describe(&self) -> Result<Description, KmsError> {
            self.0.describe()
        }
        fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
            self.1.advance(S(2));
            self.0.wrap(key, context)
        }
        fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
            self.0.unwrap(wrapped, context)
        }
    }
    // 2 s for each attempt to time out: 0–2, 2.1–4.1, 4.3–6.3, and then none.
    let (inner, clock) = (Scripted::new("s"), FakeClock::new());
    let parts = Parts {
        uri: "scripted:s".into(),
        capabilities: Capabilities::default(),
        metrics: Registry::new(),
        clock: clock.clone(),
        random: Box::new(|| 1 << 63),
    };
    let guard = Guarded::new(Arc::new(Slow(inner.clone(), clock.clone())), &Limits::default(), parts);
    inner.outage();
    let begun = clock.now();
    let e = guard.wrap(&Secret32::random(), &context(1)).unwrap_err();
    assert!(e.to_string().ends_with("(3 attempts in 6.3 s)"), "{e}");
    assert_eq!(clock.now() - begun, Duration::from_millis(6300));
    assert_eq!(inner.count(Call::Wrap), 3);
}

#[test]
fn calls_are_spaced_and_turned_away_when_their_turn_is_too_far_off() {
    let b = bench(&Limits { calls_per_second: 2, burst: 2, deadline: 1, ..Limits::default() });
    (0..4).for_each(|n| drop(wrapped(&b, n)));
    let half = Duration::from_millis(500);
    assert_eq!(b.clock.slept(), [half, half]);
    // Others have taken the turns of the next second.
    let now = b.clock.now();
    assert!(b.guard.rate.lock().reserve(now, now + S(60)).is_some());
    assert!(b.guard.rate.lock().reserve(now, now + S(60)).is_some());
    let e = b.guard.wrap(&Secret32::random(), &context(1)).unwrap_err();
    assert!(matches!(&e, KmsError::Throttled(t) if t.contains("calls_per_second = 2")), "{e}");
    assert_eq!(b.inner.count(Call::Wrap), 4);
    assert!(b.breaker_is(Position::Closed));
    let mut text = String::new();
    b.metrics.render(&mut text);
    assert!(text.contains("limiter_waits_total{provider=\"scripted\"} 2\n"), "{text}");
    assert!(text.contains("limiter_wait_seconds_total{provider=\"scripted\"} 1\n"), "{text}");
}

#[test]
fn every_attempt_is_reported_with_its_request_and_its_caller() {
    struct Tells(Arc<Scripted>);
    impl KeyProvider for Tells {
        fn describe(&self) -> Result<Description, KmsError> {
            self.0.describe()
        }
        fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
            event::note_request_id(format!("r{}", self.0.count(Call::Wrap)));
            self.0.wrap(key, context)
        }
        fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
            self.0.unwrap(wrapped, context)
        }
        fn rewrap_due(&self, wrapped: &[u8]) -> Result<bool, KmsError> {
            match wrapped {
                b"asks" => event::note_request_id("due"),
                b"fails" => return Err(KmsError::Denied("x".into())),
                b"junk" => return Err(KmsError::BadCiphertext("x".into())),
                _ => {}
            }
            Ok(true)
        }
    }
    let (inner, clock, log) = (Scripted::new("s"), FakeClock::new(), Arc::new(Log::default()));
    let capabilities = inner.describe().unwrap().capabilities;
    let observers: Vec<Arc<dyn Observer>> = vec![log.clone()];
    let tells = Arc::new(Tells(inner.clone()));
    let observed = Observed::new(tells, "scripted:s".into(), capabilities, observers, clock.clone());
    let parts =
        Parts { uri: "scripted:s".into(), capabilities, metrics: Registry::new(), clock, random: Box::new(|| 0) };
    let guard = Guarded::new(Arc::new(observed), &Limits::default(), parts);
    event::note_request_id("left over");
    inner.then(Call::Wrap, fail(throttled()));
    let w = event::on_behalf_of(Caller { pid: 7, uid: 8 }, || guard.wrap(&Secret32::random(), &context(1))).unwrap();
    event::note_request_id("left over");
    guard.unwrap(&w, &context(1)).unwrap();
    for wrapped in [b"local".as_slice(), b"asks", b"fails", b"junk"] {
        assert_eq!(guard.rewrap_due(wrapped).is_ok(), !matches!(wrapped, b"fails" | b"junk"));
    }
    let id = |s: &str| Some(s.to_owned());
    let expected = [
        (Operation::Wrap, false, id("r0"), Some(7)),
        (Operation::Wrap, true, id("r1"), Some(7)),
        (Operation::Unwrap, true, None, None),
        (Operation::Health, true, id("due"), None),
        (Operation::Health, false, None, None),
    ];
    assert_eq!(*log.0.lock(), expected);
}

#[test]
fn what_is_done_inside_the_service_is_one_call() {
    struct Native(Arc<Scripted>);
    impl KeyProvider for Native {
        fn describe(&self) -> Result<Description, KmsError> {
            self.0.describe()
        }
        fn wrap(&self, _: &Secret32, _: &WrapContext) -> Result<Vec<u8>, KmsError> {
            Err(KmsError::Config("not by parts".into()))
        }
        fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
            self.0.unwrap(wrapped, context)
        }
        fn rewrap(&self, wrapped: &[u8], from: &WrapContext, to: &WrapContext) -> Result<Vec<u8>, KmsError> {
            self.0.rewrap(wrapped, from, to)
        }
        fn generate(&self, context: &WrapContext) -> Result<(Secret32, Vec<u8>), KmsError> {
            self.0.generate(context)
        }
    }
    let (inner, clock, log) = (Scripted::new("s"), FakeClock::new(), Arc::new(Log::default()));
    let capabilities = Capabilities { native_rewrap: true, native_generate: true, ..Capabilities::default() };
    let native = Arc::new(Native(inner));
    let observed = Observed::new(native, "scripted:s".into(), capabilities, vec![log.clone()], clock.clone());
    let uri = "scripted:s".into();
    let parts = Parts { uri, capabilities, metrics: Registry::new(), clock, random: Box::new(|| 0) };
    let guard = Guarded::new(Arc::new(observed), &Limits::default(), parts);
    let (key, w) = guard.generate(&context(1)).unwrap();
    let moved = guard.rewrap(&w, &context(1), &context(2)).unwrap();
    assert!(guard.unwrap(&moved, &context(2)).unwrap().ct_eq(&key));
    let seen: Vec<Operation> = log.0.lock().iter().map(|c| c.0).collect();
    assert_eq!(seen, [Operation::Generate, Operation::Rewrap, Operation::Unwrap]);
}

/// A guard around a service that takes many keys at once, or not.
fn batching(native_batch: bool) -> (Guarded, Arc<Scripted>, Arc<FakeClock>, Arc<Log>) {
    let (inner, clock, log) = (Scripted::new("s"), FakeClock::new(), Arc::new(Log::default()));
    let capabilities = Capabilities { native_batch, remote: true, ..Capabilities::default() };
    let observers: Vec<Arc<dyn Observer>> = vec![log.clone()];
    let observed = Observed::new(inner.clone(), "scripted:s".into(), capabilities, observers, clock.clone());
    let (uri, metrics) = ("scripted:s".into(), Registry::new());
    let parts = Parts { uri, capabilities, metrics, clock: clock.clone(), random: Box::new(|| 1 << 63) };
    (Guarded::new(Arc::new(observed), &Limits::default(), parts), inner, clock, log)
}

#[test]
fn many_keys_are_one_call_where_the_service_takes_them_so() {
    for native in [false, true] {
        let (guard, inner, clock, log) = batching(native);
        let keys: Vec<Secret32> = (0..3).map(|_| Secret32::random()).collect();
        let contexts: Vec<WrapContext> = (0..3).map(context).collect();
        let wraps: Vec<Vec<u8>> = keys.iter().zip(&contexts).map(|(k, c)| guard.wrap(k, c).unwrap()).collect();
        let other = context(9);
        let items: Vec<(&[u8], &WrapContext)> =
            vec![(&wraps[0], &contexts[0]), (&wraps[1], &other), (&wraps[1], &contexts[1]), (&wraps[2], &contexts[2])];
        log.0.lock().clear();
        let opens = |results: &[Result<Secret32, KmsError>]| {
            let good = |i: usize, k: usize| results[i].as_ref().unwrap().ct_eq(&keys[k]);
            assert!(results.len() == 4 && good(0, 0) && good(2, 1) && good(3, 2));
            assert!(matches!(results[1], Err(KmsError::BadCiphertext(_))));
        };
        opens(&guard.unwrap_many(&items));
        assert_eq!((inner.batches(), inner.count(Call::Unwrap)), (usize::from(native), 4));
        assert_eq!(
            log.0.lock().iter().map(|l| (l.0, l.1)).collect::<Vec<_>>(),
            [true, false, true, true].map(|ok| (Operation::Unwrap, ok))
        );
        // What does not open is remembered, and only the rest is asked for.
        opens(&guard.unwrap_many(&items));
        assert_eq!((inner.batches(), inner.count(Call::Unwrap)), (2 * usize::from(native), 7));
        assert!(matches!(guard.unwrap_many(&items[1..2])[0], Err(KmsError::BadCiphertext(_))));
        assert!(guard.unwrap_many(&[]).is_empty());
        assert_eq!(inner.count(Call::Unwrap), 7);
        assert!(clock.slept().is_empty());
    }
}

#[test]
fn many_keys_are_asked_for_again_if_all_of_them_failed_alike() {
    let (guard, inner, clock, _) = batching(true);
    let contexts: Vec<WrapContext> = (0..3).map(context).collect();
    let wraps: Vec<Vec<u8>> = contexts.iter().map(|c| guard.wrap(&Secret32::random(), c).unwrap()).collect();
    let items: Vec<(&[u8], &WrapContext)> = wraps.iter().map(Vec::as_slice).zip(&contexts).collect();
    for _ in 0..6 {
        inner.then(Call::Unwrap, fail(throttled()));
    }
    assert!(guard.unwrap_many(&items).iter().all(Result::is_ok));
    assert_eq!((inner.batches(), clock.slept().len()), (3, 2));
    // A refusal is the answer for all, and is remembered as that of one call is.
    inner.always(fail(KmsError::Denied("no".into())));
    for _ in 0..2 {
        assert!(guard.unwrap_many(&items).iter().all(|r| matches!(r, Err(KmsError::Denied(_)))));
    }
    assert_eq!(inner.batches(), 4);
}

#[test]
fn only_what_leaves_the_machine_is_guarded_and_everything_is_observed() {
    let dir = tempfile::tempdir().unwrap();
    let uri = RootKeyUri::parse(&format!("keyfile:{}", dir.path().join("k").display())).unwrap();
    let (metrics, log) = (Registry::new(), Arc::new(Seen::default()));
    #[derive(Default)]
    struct Seen(Mutex<Vec<(Operation, String)>>);
    impl Observer for Seen {
        fn call(&self, c: &event::Call<'_>) {
            self.0.lock().push((c.operation, c.provider.to_owned()));
        }
    }
    let o = ConnectOptions { observer: Some(log.clone()), metrics: Some(metrics.clone()), ..Default::default() };
    let key = Secret32::random();
    let p = crate::kms::connect(&uri, &o, true).unwrap();
    let w = p.wrap(&key, &context(1)).unwrap();
    assert!(p.unwrap(&w, &context(1)).unwrap().ct_eq(&key));
    let uri = uri.to_string();
    assert_eq!(*log.0.lock(), [(Operation::Wrap, uri.clone()), (Operation::Unwrap, uri)]);
    assert_eq!(metrics.counters("keyfile:").calls(Operation::Wrap, Ok(())), 1);
    let mut text = String::new();
    metrics.render(&mut text);
    assert!(!text.contains("breaker_state"), "{text}");
    // A provider says by itself that it is remote; one that cannot say is taken for what its scheme is.
    struct Mute;
    impl KeyProvider for Mute {
        fn describe(&self) -> Result<Description, KmsError> {
            Err(unreachable())
        }
        fn wrap(&self, _: &Secret32, _: &WrapContext) -> Result<Vec<u8>, KmsError> {
            Err(KmsError::Config("mute".into()))
        }
        fn unwrap(&self, _: &[u8], _: &WrapContext) -> Result<Secret32, KmsError> {
            Err(KmsError::Config("mute".into()))
        }
    }
    let vault = RootKeyUri::parse("vault://transit/k").unwrap();
    let guarded = around(Arc::new(Mute), &vault, &o);
    let mut text = String::new();
    metrics.render(&mut text);
    assert!(text.contains("breaker_state{root_key=\"vault://transit/k\"} 0"), "{text}");
    assert_eq!(guarded.describe().unwrap_err(), unreachable());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// However an outage goes on and whoever calls: attempts ≤ calls + retries within the budget, and while the breaker
    /// is open one probe for each cool-down.
    #[test]
    fn an_outage_does_not_multiply_calls(
        gaps in proptest::collection::vec(0u64..400, 1..300),
        throttles: bool,
    ) {
        let b = bench(&Limits::default());
        let begun = b.clock.now();
        b.inner.always(fail(if throttles { throttled() } else { unreachable() }));
        let mut calls = 0u64;
        for (n, gap) in (0u8..=255).cycle().zip(gaps) {
            b.clock.advance(Duration::from_millis(gap));
            prop_assert!(b.guard.unwrap(&[n], &context(1)).is_err());
            calls += 1;
        }
        let ms = u64::try_from((b.clock.now() - begun).as_millis()).unwrap();
        let (reached, retries) = (b.unwraps() as u64, b.counters().retries.get());
        prop_assert!(retries * 1000 <= 10_000 + calls * 100 + ms / 6 + 1);
        prop_assert!(reached <= calls + retries);
        if !throttles {
            // Opened once at the fifth failure; what reaches the service then is the probes.
            prop_assert!(reached <= 5);
            prop_assert!(b.inner.count(Call::Health) as u64 <= 6 + ms / 15_000);
        }
    }
}

#[test]
fn work_that_nobody_waits_for_asks_leave_and_is_told_when_to_come_again() {
    let b = bench(&Limits { calls_per_second: 100, burst: 8, ..Limits::default() });
    let ask = |whose| b.guard.leave(whose, 1);
    assert_eq!((0..9).map_while(|_| ask(Background::Rotation).ok()).count(), 4, "half of the burst");
    assert_eq!((0..9).map_while(|_| ask(Background::Ahead).ok()).count(), 2, "a quarter");
    let wait = ask(Background::Rotation).unwrap_err();
    assert!(b.clock.slept().is_empty(), "who asks does not wait");
    b.clock.advance(wait);
    ask(Background::Rotation).unwrap();
    b.clock.advance(S(1));
    (0..8).for_each(|n| drop(wrapped(&b, n)));
    assert!(b.clock.slept().is_empty(), "users have all of the burst");
    assert!(ask(Background::Rotation).is_err() && ask(Background::Ahead).is_err());
    // While the service is left alone, nothing is done ahead of need.
    b.clock.advance(S(1));
    b.inner.outage();
    (0..3).for_each(|n| drop(b.guard.wrap(&Secret32::random(), &context(n))));
    assert!(b.breaker_is(Position::Open));
    b.clock.advance(S(20));
    assert_eq!(ask(Background::Ahead), Err(S(1)));
    assert_eq!(ask(Background::Rotation), Ok(()), "it hears from its call what is wrong");
}
