//! What a run has to do, decided from the keyring alone.
//!
//! The keyring says which KEK is active and which retired ones were not yet proved unused. So a run that was killed
//! anywhere is found again even if the journal is lost: as long as such a KEK is there, headers may name it.

use crate::format::ids::KekId;
use crate::format::keyring::{KekKind, KekState, Keyring};

/// What a run is asked for, as far as it decides which KEK headers go to.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wish {
    /// Kind of the new KEK; `None`: as the present one's.
    pub(super) kind: Option<KekKind>,
    /// Root keys were given that are to wrap the new KEK.
    pub(super) new_roots: bool,
    /// Not to go on with an unfinished run.
    pub(super) restart: bool,
}

/// Where headers go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begin {
    /// To a KEK that is to be made.
    New(KekKind),
    /// To the active KEK: an earlier run made it and did not finish.
    Resume(KekId),
}

/// What a run does first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    /// KEKs that a killed run staged and nothing was wrapped under.
    pub(super) discard: Vec<KekId>,
    pub(super) begin: Begin,
}

/// Decides. `None` if the keyring has no active KEK, which no valid one lacks.
pub(super) fn plan(ring: &Keyring, wish: Wish) -> Option<Plan> {
    let active = ring.keks.iter().find(|k| k.state == KekState::Active)?;
    let kind = wish.kind.unwrap_or(active.kind);
    let resume = is_unfinished(ring) && !wish.restart && !wish.new_roots && kind == active.kind;
    Some(Plan {
        discard: in_state(ring, KekState::Pending),
        begin: if resume { Begin::Resume(active.id) } else { Begin::New(kind) },
    })
}

/// Whether a rotation of the store was begun and not finished: some retired KEK may still be named by headers.
pub fn is_unfinished(ring: &Keyring) -> bool {
    !unproved(ring).is_empty()
}

/// Whether the active KEK has been in use for `age` seconds or more at `now` (seconds since the epoch), or an earlier
/// run is unfinished. A clock that was put back makes no KEK young: an activation in the future counts as due.
pub(super) fn is_due(ring: &Keyring, age: u64, now: u64) -> bool {
    let active = ring.keks.iter().find(|k| k.state == KekState::Active);
    is_unfinished(ring) || active.is_none_or(|k| now.checked_sub(k.activated).is_none_or(|used| used >= age))
}

/// KEKs in a state.
pub(super) fn in_state(ring: &Keyring, state: KekState) -> Vec<KekId> {
    ring.keks.iter().filter(|k| k.state == state).map(|k| k.id).collect()
}

/// Retired KEKs that were not yet proved unused.
pub(super) fn unproved(ring: &Keyring) -> Vec<KekId> {
    ring.keks.iter().filter(|k| k.state == KekState::Retired && k.unused == 0).map(|k| k.id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ids::StoreId;
    use crate::format::keyring::KekRecord;
    use crate::format::lifecycle::LifeCycle;

    fn kek(state: KekState, unused: u64) -> KekRecord {
        KekRecord {
            id: KekId::random(),
            kind: KekKind::Sealed,
            state,
            created: 1,
            activated: 1,
            retired: 1,
            unused,
            destroyed: 0,
            provider: None,
            wraps: Vec::new(),
        }
    }

    fn ring(keks: Vec<KekRecord>) -> Keyring {
        Keyring {
            store: StoreId::random(),
            generation: 1,
            incompat: 0,
            ro_compat: 0,
            roots: Vec::new(),
            secret: Vec::new(),
            keks,
            life: LifeCycle::default(),
        }
    }

    #[test]
    fn a_rotation_is_due_when_the_active_kek_is_old_enough() {
        let day = 86_400;
        let mut ring = ring(vec![kek(KekState::Retired, 5), kek(KekState::Active, 0)]);
        ring.keks[1].activated = 100 * day;
        for (now, due) in [(100, false), (189, false), (190, true), (400, true), (99, true)] {
            assert_eq!(is_due(&ring, 90 * day, now * day), due, "day {now}");
        }
        ring.keks[0].unused = 0;
        assert!(is_due(&ring, 90 * day, 100 * day), "an unfinished run is to be finished");
    }

    #[test]
    fn a_finished_store_gets_a_new_kek() {
        let r = ring(vec![kek(KekState::Retired, 9), kek(KekState::Active, 0), kek(KekState::Destroyed, 0)]);
        let p = plan(&r, Wish::default()).unwrap();
        assert_eq!(p, Plan { discard: vec![], begin: Begin::New(KekKind::Sealed) });
    }

    #[test]
    fn an_unfinished_run_goes_on_unless_something_else_is_asked_for() {
        let r = ring(vec![kek(KekState::Retired, 0), kek(KekState::Active, 0), kek(KekState::Pending, 0)]);
        let p = plan(&r, Wish::default()).unwrap();
        assert_eq!(p, Plan { discard: vec![r.keks[2].id], begin: Begin::Resume(r.keks[1].id) });
        for (wish, kind) in [
            (Wish { restart: true, ..Wish::default() }, KekKind::Sealed),
            (Wish { new_roots: true, ..Wish::default() }, KekKind::Sealed),
            (Wish { kind: Some(KekKind::External), ..Wish::default() }, KekKind::External),
        ] {
            assert_eq!(plan(&r, wish).unwrap().begin, Begin::New(kind));
        }
        let same = Wish { kind: Some(KekKind::Sealed), ..Wish::default() };
        assert_eq!(plan(&r, same).unwrap().begin, Begin::Resume(r.keks[1].id));
        assert_eq!(plan(&ring(vec![]), Wish::default()), None);
    }
}
