//! The rotation as a whole against a model of it: users, operators, key services and backups at work between any two
//! steps of a run, with crashes anywhere.
//!
//! Reproducible from what proptest prints, but for runs that have several calls to a key service under way at once: one
//! worker, and everybody else takes turns with it ([`world`]). What must
//! hold is looked at on the disk itself, before every single write of a run ([`witness`]):
//!
//! * what was acknowledged is there (synced, for a power cut) and reads as the reference says, or says that its key is
//!   not to be had while a service misbehaves;
//! * at least one slot of every header opens, and gives the key it always gave;
//! * no KEK is marked unused or destroyed that a header names, unless a backup brought that back;
//! * what follows the slots is as users left it, and the keyring never goes back;
//! * complete means that both slots of every header name the new KEK; a run with failures is not complete;
//! * once services are well again, one run ends complete.
//!
//! `PROPTEST_CASES=2000 cargo test --lib rotation::tests::model` runs more of it, and every combination of what [`every`] takes a sample of.

mod every;
mod reference;
mod witness;
mod world;

use self::reference::UserOp;
use self::world::{Crash, Event, Fault, Goal, MISDEEDS, Plan, Step, World, live};
use crate::backing::sim::Journal as SimJournal;
use proptest::collection::vec;
use proptest::prelude::*;

/// How many cases were asked for, if any number was.
fn asked() -> Option<u32> {
    std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok())
}

/// A case lives through several runs: fewer than proptest's own 256, unless asked for more.
fn cases() -> ProptestConfig {
    ProptestConfig::with_cases(asked().unwrap_or(48))
}

fn user() -> impl Strategy<Value = UserOp> {
    let (any, len) = (any::<u8>, || prop_oneof![Just(0u16), 1u16..300, Just(4096), 1u16..9000]);
    prop_oneof![
        4 => (any(), any(), len(), any()).prop_map(|(dir, name, len, fill)| UserOp::Create { dir, name, len, fill }),
        3 => (any(), len(), len(), any()).prop_map(|(file, at, len, fill)| UserOp::Write { file, at, len, fill }),
        2 => (any(), len()).prop_map(|(file, len)| UserOp::Truncate { file, len }),
        1 => (any(), any()).prop_map(|(dir, name)| UserOp::Mkdir { dir, name }),
        2 => any().prop_map(|file| UserOp::Unlink { file }),
        1 => any().prop_map(|dir| UserOp::Rmdir { dir }),
        6 => (any(), any(), any()).prop_map(|(what, dir, name)| UserOp::Rename { what, dir, name }),
        3 => (any(), any()).prop_map(|(one, other)| UserOp::Exchange { one, other }),
        3 => (any(), any(), any()).prop_map(|(file, dir, name)| UserOp::Link { file, dir, name }),
        1 => any().prop_map(|file| UserOp::Read { file }),
        2 => Just(UserOp::Sync),
        1 => Just(UserOp::Settle),
    ]
}

fn fault() -> impl Strategy<Value = Fault> {
    let calls = prop_oneof![3 => (1u8..4).prop_map(Some), 1 => Just(None)];
    (0u8..2, 0usize..MISDEEDS.len(), 0u8..12, calls).prop_map(|(who, what, after, calls)| Fault {
        who,
        what: MISDEEDS[what],
        after,
        calls,
    })
}

fn crash() -> impl Strategy<Value = Crash> {
    prop_oneof![Just(Crash::Kill), (0u64..1000, any::<bool>()).prop_map(|(seed, tear)| Crash::Power { seed, tear }),]
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        16 => user().prop_map(Event::User),
        1 => Just(Event::Pause),
        1 => Just(Event::Cancel),
        2 => fault().prop_map(Event::Fault),
        1 => Just(Event::Heal),
        2 => any::<u8>().prop_map(Event::Restore),
    ]
}

fn plan() -> impl Strategy<Value = Plan> {
    let goal = prop_oneof![
        3 => Just(Goal::AsNow),
        1 => Just(Goal::Sealed),
        1 => Just(Goal::External),
        1 => (0u8..2).prop_map(Goal::SealedUnder),
        2 => (0u8..2).prop_map(Goal::ExternalIn),
    ];
    let flag = |one_in: u32| proptest::bool::weighted(1.0 / f64::from(one_in));
    let crash = proptest::option::weighted(0.4, (0u16..120, crash()));
    (goal, flag(3), flag(4), flag(10), vec((0u16..120, event()), 0..10), crash).prop_map(
        |(goal, destroy_old, restart, dry_run, events, crash)| Plan {
            goal,
            destroy_old,
            restart,
            dry_run,
            events,
            crash,
            bad_sector: None,
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => plan().prop_map(Step::Rotate),
        4 => user().prop_map(Step::User),
        1 => any::<u8>().prop_map(Step::Destroy),
        1 => Just(Step::Remount),
        1 => crash().prop_map(Step::Crash),
        1 => fault().prop_map(Step::Fault),
        1 => Just(Step::Heal),
        2 => any::<u8>().prop_map(Step::Save),
        1 => any::<u8>().prop_map(Step::Restore),
        1 => Just(Step::RewrapRestored),
        1 => (any::<u8>(), any::<bool>()).prop_map(|(file, second)| Step::Scratch(file, second)),
    ]
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn any_life_keeps_every_promise(
        steps in vec(step(), 1..8), ordered: bool, clear_names: bool, external: bool,
    ) {
        let journal = if ordered { SimJournal::Ordered } else { SimJournal::None };
        live(World::new(journal, clear_names, external), &steps);
    }
}
