//! The breaker, by tables and by random histories.

use super::*;
use proptest::prelude::*;

const S: fn(u64) -> Duration = Duration::from_secs;
/// The draw that makes a cool-down whole but for a nanosecond.
const WHOLE: u64 = u64::MAX;

fn settings() -> Settings {
    Settings { failures: 5, percent: 50, pause: S(1), pause_max: S(30) }
}

fn go(b: &mut Breaker, now: Instant) -> Permit {
    match b.admit(now) {
        Admission::Go(p) => p,
        other => panic!("{other:?}"),
    }
}

fn probe(b: &mut Breaker, now: Instant) -> Permit {
    match b.admit(now) {
        Admission::Probe(p) => p,
        other => panic!("{other:?}"),
    }
}

fn no(b: &mut Breaker, now: Instant) -> Refusal {
    match b.admit(now) {
        Admission::No(r) => r,
        other => panic!("{other:?}"),
    }
}

fn call(b: &mut Breaker, outcome: Outcome, now: Instant) {
    let p = go(b, now);
    b.record(p, outcome, now, WHOLE);
}

/// One that opened at `now`.
fn opened(now: Instant) -> Breaker {
    let mut b = Breaker::new(settings(), now);
    (0..5).for_each(|_| call(&mut b, Outcome::Silent, now));
    assert_eq!(b.position(), Position::Open);
    b
}

#[test]
fn failures_in_a_row_open_it() {
    use Outcome::*;
    let now = Instant::now();
    // (outcomes, whether it opens with the last)
    let table: [(&[Outcome], bool); 8] = [
        (&[Silent; 5], true),
        (&[Silent; 4], false),
        (&[Silent, Silent, Silent, Silent, Answered, Silent, Silent, Silent, Silent], false),
        (&[Silent, Silent, Silent, Silent, Unknown, Silent], true),
        (&[Silent, Silent, Silent, Silent, Throttled, Silent], true),
        (&[Answered; 100], false),
        (&[Unknown; 100], false),
        (&[Throttled; 100], false),
    ];
    for (outcomes, opens) in table {
        let mut b = Breaker::new(settings(), now);
        for o in outcomes {
            call(&mut b, *o, now);
        }
        assert_eq!(b.position() == Position::Open, opens, "{outcomes:?}");
    }
}

#[test]
fn too_many_in_the_window_open_it() {
    let start = Instant::now();
    let alternate = |b: &mut Breaker, n: u64, every: Duration| {
        for i in 0..n {
            if b.position() == Position::Open {
                return i;
            }
            let o = if i % 2 == 0 { Outcome::Answered } else { Outcome::Silent };
            call(b, o, start + every * u32::try_from(i).unwrap());
        }
        n
    };
    let mut b = Breaker::new(settings(), start);
    assert_eq!(alternate(&mut b, 100, Duration::from_millis(100)), 20, "half of the 20 calls it takes to judge");
    let mut b = Breaker::new(settings(), start);
    assert_eq!(alternate(&mut b, 100, S(1)), 100, "ten calls in the window are too few");
    let mut b = Breaker::new(Settings { percent: 51, ..settings() }, start);
    assert_eq!(alternate(&mut b, 100, Duration::from_millis(1)), 100, "half is less than 51 %");
}

#[test]
fn throttling_opens_it_only_when_there_has_been_nothing_else_for_long() {
    let start = Instant::now();
    let throttled = |answered_at: Option<u32>, calls: u32, every: Duration| {
        let mut b = Breaker::new(settings(), start);
        for i in 0..calls {
            let o = if Some(i) == answered_at { Outcome::Answered } else { Outcome::Throttled };
            call(&mut b, o, start + every * i);
        }
        b.position()
    };
    let ms = Duration::from_millis;
    assert_eq!(throttled(None, 21, ms(500)), Position::Open);
    assert_eq!(throttled(None, 20, ms(500)), Position::Closed, "9.5 s");
    assert_eq!(throttled(Some(10), 21, ms(500)), Position::Closed, "one got through");
    assert_eq!(throttled(None, 19, S(2)), Position::Closed, "few");
    let mut b = Breaker::new(settings(), start);
    (0..21).for_each(|i| call(&mut b, Outcome::Throttled, start + ms(500) * i));
    let r = no(&mut b, start + S(10));
    assert_eq!((r.cause, r.lasting), (Cause::Throttling, S(10)));
    // A probe does not stand for the calls: on trial, one more throttled answer opens it again.
    let at = start + S(12);
    let p = probe(&mut b, at);
    b.record(p, Outcome::Answered, at, WHOLE);
    call(&mut b, Outcome::Throttled, at);
    assert_eq!(b.position(), Position::Open);
}

#[test]
fn it_says_since_when_and_when_it_is_tried_again() {
    let now = Instant::now();
    let mut b = Breaker::new(settings(), now);
    (0..5).for_each(|i| call(&mut b, Outcome::Silent, now + S(i)));
    let r = no(&mut b, now + S(4));
    assert_eq!((r.cause, r.lasting), (Cause::Silence, S(4)), "since the first failure in a row");
    assert!(r.again_in.unwrap() <= S(1) && r.again_in.unwrap() >= Duration::from_millis(999));
    probe(&mut b, now + S(5));
    assert_eq!(no(&mut b, now + S(6)), Refusal { cause: Cause::Silence, lasting: S(6), again_in: None });
}

#[test]
fn cool_downs_double_up_to_the_cap_and_are_jittered() {
    let mut now = Instant::now();
    let mut b = opened(now);
    for expected in [1, 2, 4, 8, 16, 30, 30] {
        let left = no(&mut b, now).again_in.unwrap();
        assert!(left <= S(expected) && left >= S(expected) - Duration::from_micros(1), "{expected}: {left:?}");
        now += S(expected);
        let p = probe(&mut b, now);
        assert!(matches!(b.admit(now), Admission::No(_)), "one probe");
        b.record(p, Outcome::Silent, now, WHOLE);
    }
    let p = probe(&mut b, now + S(30));
    b.record(p, Outcome::Throttled, now + S(30), 0);
    assert_eq!(no(&mut b, now + S(30)).again_in, Some(S(15)), "at least half of it");
}

#[test]
fn an_answer_to_the_probe_closes_it_on_trial() {
    let start = Instant::now();
    let later = start + S(1);
    for answer in [Outcome::Answered, Outcome::Unknown] {
        let mut b = opened(start);
        let p = probe(&mut b, later);
        b.record(p, answer, later, WHOLE);
        assert_eq!(b.position(), Position::Closed);
        // The trial fails: no second chance, and twice the cool-down.
        call(&mut b, Outcome::Silent, later);
        let left = no(&mut b, later).again_in.unwrap();
        assert!(left > S(1) && left <= S(2), "{left:?}");
        // The trial is passed: all is as at first.
        let at = later + S(2);
        let p = probe(&mut b, at);
        b.record(p, answer, at, WHOLE);
        call(&mut b, Outcome::Answered, at);
        (0..4).for_each(|_| call(&mut b, Outcome::Silent, at));
        assert_eq!(b.position(), Position::Closed);
        call(&mut b, Outcome::Silent, at);
        assert!(no(&mut b, at).again_in.unwrap() <= S(1));
    }
}

#[test]
fn what_began_before_a_change_of_state_is_passed_over() {
    let start = Instant::now();
    let mut b = Breaker::new(settings(), start);
    let (late_yes, late_no) = (go(&mut b, start), go(&mut b, start));
    (0..5).for_each(|_| call(&mut b, Outcome::Silent, start));
    b.record(late_yes, Outcome::Answered, start, WHOLE);
    assert_eq!(b.position(), Position::Open);
    let p = probe(&mut b, start + S(1));
    b.record(late_no, Outcome::Silent, start + S(1), WHOLE);
    assert_eq!(b.position(), Position::HalfOpen);
    b.record(p, Outcome::Answered, start + S(1), WHOLE);
    b.record(late_no, Outcome::Silent, start + S(1), WHOLE);
    b.record(p, Outcome::Silent, start + S(1), WHOLE);
    assert_eq!(b.position(), Position::Closed);
}

proptest! {
    /// Random histories with several calls under way: never two probes at once; while open nothing is let through
    /// before half the cool-down is over; refused calls can always be made later; without a silent or throttled
    /// answer it never opens.
    #[test]
    fn any_history(steps in proptest::collection::vec((0u8..8, 0usize..4, 0u64..3000, any::<u64>()), 0..300)) {
        let mut now = Instant::now();
        let mut b = Breaker::new(settings(), now);
        let mut under_way: Vec<(Permit, bool)> = Vec::new();
        let (mut bad, mut opened_at) = (false, None);
        for (what, which, ms, random) in steps {
            let before = b.position();
            match what {
                0..=2 => match b.admit(now) {
                    Admission::Go(p) => {
                        prop_assert_eq!(before, Position::Closed);
                        under_way.push((p, false));
                    }
                    Admission::Probe(p) => {
                        prop_assert_eq!(before, Position::Open);
                        prop_assert!(under_way.iter().all(|(_, probe)| !probe));
                        let open_for: Duration = now - opened_at.unwrap();
                        prop_assert!(open_for >= settings().pause / 2);
                        under_way.push((p, true));
                    }
                    Admission::No(r) => {
                        prop_assert_ne!(before, Position::Closed);
                        prop_assert!(r.again_in.is_none_or(|d| d <= settings().pause_max));
                        prop_assert_eq!(r.again_in.is_none(), before == Position::HalfOpen);
                    }
                },
                3 => now += Duration::from_millis(ms),
                _ if !under_way.is_empty() => {
                    let (p, _) = under_way.remove(which % under_way.len());
                    let o = [Outcome::Answered, Outcome::Silent, Outcome::Throttled, Outcome::Unknown][which];
                    bad |= matches!(o, Outcome::Silent | Outcome::Throttled);
                    b.record(p, o, now, random);
                    if b.position() == Position::Open && before != Position::Open {
                        opened_at = Some(now);
                    }
                }
                _ => {}
            }
            prop_assert!(bad || b.position() == Position::Closed);
            prop_assert!(b.refusal(now).is_none() == matches!(b.position(), Position::Closed)
                || b.position() == Position::Open);
        }
        // Nothing stays shut for ever.
        for (p, _) in under_way {
            b.record(p, Outcome::Answered, now, 0);
        }
        now += settings().pause_max;
        prop_assert!(!matches!(b.admit(now), Admission::No(_)));
    }
}
