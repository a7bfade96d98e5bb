//! One small scenario, and everything that can happen in it, one at a time.
//!
//! Each thing is tried at each step. Of the ways in which it can be tried there, all of them are only if cases were asked
//! for; otherwise one after the other has its turn.

use super::super::*;
use super::reference::{Change, UserOp};
use super::world::{Crash, Ended, Event, Fault, Goal, MISDEEDS, Misdeed, Plan, Stage, World};
use crate::backing::sim::Journal as SimJournal;
use crate::kms::scripted::Call;

/// Of `ways`, those that are tried at step `n`: so many, or all of them.
fn turns<T: Copy>(ways: &[T], n: usize, so_many: usize) -> Vec<T> {
    let so_many = if super::asked().is_some() { ways.len() } else { so_many.min(ways.len()) };
    ways.iter().copied().cycle().skip(n * so_many % ways.len()).take(so_many).collect()
}

fn base(external: bool) -> World {
    World::new(SimJournal::None, false, external)
}

/// One run in a fork of `base`; how it ended, and the world after it.
fn one_run(base: &World, plan: &Plan) -> (Ended, World) {
    let stage = Stage::new(base.fork());
    let ended = stage.rotate(plan);
    let mut world = Arc::into_inner(stage).expect("nobody else is on the stage").world.into_inner();
    world.compare();
    (ended, world)
}

fn is_complete(ended: &Ended) -> bool {
    matches!(ended, Ended::Report(r) if r.outcome == Outcome::Complete)
}

#[test]
fn every_change_at_every_point_of_a_run() {
    let changes = [
        // Across the walk, in both directions: files, directories, and both at once.
        UserOp::Rename { what: 0, dir: 1, name: 2 },
        UserOp::Rename { what: 2, dir: 0, name: 3 },
        UserOp::Rename { what: 1, dir: 0, name: 3 },
        UserOp::Rename { what: 3, dir: 0, name: 3 },
        UserOp::Rename { what: 2, dir: 0, name: 2 },
        UserOp::Exchange { one: 0, other: 1 },
        UserOp::Exchange { one: 3, other: 7 },
        UserOp::Link { file: 1, dir: 0, name: 3 },
        UserOp::Unlink { file: 1 },
        UserOp::Create { dir: 0, name: 4, len: 10, fill: 0 },
        UserOp::Create { dir: 1, name: 0, len: 5000, fill: 1 },
        UserOp::Write { file: 5, at: 50, len: 60, fill: 2 },
        UserOp::Truncate { file: 1, len: 0 },
        UserOp::Truncate { file: 4, len: 5000 },
        UserOp::Settle,
    ];
    for (external, goal) in [(false, Goal::AsNow), (true, Goal::ExternalIn(1))] {
        changes_at_every_point(&changes, &base(external), &Plan { destroy_old: true, ..Plan::to(goal) });
    }
}

fn changes_at_every_point(changes: &[UserOp], base: &World, plan: &Plan) {
    let (ended, world) = one_run(base, plan);
    assert!(is_complete(&ended), "{ended:?}");
    assert!(world.length.0 > 60, "{:?}", world.length);
    for change in changes {
        assert_ne!(base.model.decide(change), vec![], "{change:?} does something");
    }
    let all: Vec<&UserOp> = changes.iter().collect();
    for point in 0..world.length.0 {
        for change in turns(&all, usize::from(point), 1) {
            let plan = Plan { events: vec![(point, Event::User(change.clone()))], ..plan.clone() };
            let (ended, _) = one_run(base, &plan);
            assert!(is_complete(&ended), "{change:?} at {point}: {ended:?}");
        }
    }
}

#[test]
fn a_run_that_dies_before_every_write_to_and_from_a_key_service() {
    let moved = |point| (point, Event::User(UserOp::Rename { what: 1, dir: 0, name: 3 }));
    let made = |point| (point, Event::User(UserOp::Create { dir: 0, name: 4, len: 10, fill: 0 }));
    let goals = [(false, Goal::External), (true, Goal::ExternalIn(1)), (true, Goal::Sealed)];
    for (i, (external, goal)) in goals.into_iter().enumerate() {
        let mut base = base(external);
        // Of two headers, only one slot is there to rely on.
        base.scratch(0, false);
        base.scratch(2, true);
        let plan = Plan { destroy_old: true, events: vec![moved(20), made(30)], ..Plan::to(goal) };
        let (ended, world) = one_run(&base, &plan);
        assert!(is_complete(&ended), "{ended:?}");
        let writes = world.length.1;
        assert!(writes > 50, "{writes}");
        let mut died = 0;
        for n in 0..writes {
            let cut = |seed: u64| Crash::Power { seed: seed * 1000 + u64::from(n), tear: seed == 1 };
            let crashes = [Crash::Kill, Crash::Power { seed: 0, tear: false }, cut(1), cut(2)];
            for crash in turns(&crashes, usize::from(n) + i, 1) {
                let (ended, world) = one_run(&base, &Plan { crash: Some((n, crash)), ..plan.clone() });
                // Calls to a service are under way several at once, so that two runs need not write equally often.
                died += u16::from(matches!(ended, Ended::Crashed));
                assert!(
                    matches!(ended, Ended::Crashed) || is_complete(&ended),
                    "{goal:?} {crash:?} before {n}: {ended:?}"
                );
                world.settles();
            }
        }
        assert!(died > writes / 4 * 3, "{died} of {writes} died");
    }
}

/// Two things change places all the time: whoever looks for them by name finds them at neither.
#[test]
fn every_storm_of_renames_is_seen_through() {
    let base = base(false);
    let names: Vec<String> = base.model.names.keys().cloned().collect();
    let aside = |p: &String| (p.clone(), "L".repeat(255));
    let pairs = [(0, 6), (2, 7), (0, 2)].map(|(a, b)| (names[a].clone(), names[b].clone()));
    let storms = pairs.into_iter().map(|(a, b)| (Change::Exchange(a.clone(), b.clone()), Change::Exchange(a, b)));
    let moves = names.iter().map(aside).map(|(a, b)| (Change::Rename(a.clone(), b.clone()), Change::Rename(b, a)));
    for (there, back) in storms.chain(moves) {
        for (period, offset) in [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (7, 3)] {
            let at = (offset..150).step_by(period).map(|n| n as u16);
            let both = [&there, &back].into_iter().cloned().cycle();
            let events = at.zip(both.map(Event::Change)).collect();
            let (ended, _) = one_run(&base, &Plan { destroy_old: true, events, ..Plan::to(Goal::AsNow) });
            assert!(is_complete(&ended), "{there:?} at every {period} from {offset}: {ended:?}");
        }
    }
}

#[test]
fn a_disk_that_fails_at_every_operation_of_a_run() {
    for (i, goal) in [Goal::AsNow, Goal::External].into_iter().enumerate() {
        let base = base(false);
        let plan = Plan { destroy_old: true, ..Plan::to(goal) };
        let (ended, world) = one_run(&base, &plan);
        assert!(is_complete(&ended), "{ended:?}");
        let numbers: Vec<u16> = (0..world.length.2).collect();
        assert!(numbers.len() > 200, "{}", numbers.len());
        for n in numbers.into_iter().filter(|n| super::asked().is_some() || usize::from(*n) % 4 == i) {
            let (_, world) = one_run(&base, &Plan { bad_sector: Some(n), ..plan.clone() });
            world.settles();
        }
    }
}

/// Calls that a run makes of each kind, to each provider.
fn calls(world: &World) -> Vec<(u8, usize)> {
    let most = |r: &Arc<Scripted>| [Call::Wrap, Call::Unwrap, Call::Rewrap].map(|c| r.count(c)).into_iter().max();
    (0..).zip(&world.root).map(|(who, r)| (who, most(r).unwrap_or(0))).collect()
}

#[test]
fn every_misdeed_at_every_call_of_a_run() {
    let goals = [
        (false, Goal::AsNow),
        (false, Goal::External),
        (true, Goal::External),
        (true, Goal::ExternalIn(1)),
        (true, Goal::Sealed),
    ];
    for (external, goal) in goals {
        let base = base(external);
        let before = calls(&base);
        let plan = Plan { destroy_old: true, ..Plan::to(goal) };
        let (ended, world) = one_run(&base, &plan);
        assert!(is_complete(&ended), "{ended:?}");
        let numbers = calls(&world).into_iter().zip(before).map(|((who, after), (_, before))| (who, after - before));
        for (who, number) in numbers {
            for (after, what) in
                (0..number as u8).flat_map(|n| turns(&MISDEEDS, n.into(), 3).into_iter().map(move |m| (n, m)))
            {
                for calls in turns(&[Some(1), None], usize::from(after), 1) {
                    misbehaves(&base, &plan, Fault { who, what, after, calls });
                }
            }
        }
    }
}

fn misbehaves(base: &World, plan: &Plan, fault: Fault) {
    let stage = Stage::new(base.fork());
    stage.world.lock().fault(fault);
    let ended = stage.rotate(plan);
    let mut world = Arc::into_inner(stage).expect("nobody else is on the stage").world.into_inner();
    if let (Ended::Report(r), Misdeed::Garbage | Misdeed::WrongKey) = (&ended, fault.what) {
        assert!(r.failures.iter().all(|f| !f.code.starts_with("kms-")), "{fault:?}: it did not say so: {r:?}");
    }
    world.compare();
    world.settles();
}
