//! KEKs that are to be destroyed after a while: deciding it, taking it back, and finding out when the time has come.
//!
//! The time is that of the machine's clock, which somebody may set. So the end of a KEK takes two looks: one finds it
//! near and announces it, in the keyring, and only one that is a day later (or as much later as the whole wait was, if
//! that is shorter) finds it come. A clock that is set forward once shortens the wait to that day, not to nothing; one
//! that is set back lengthens it.
//!
//! Nothing here destroys a KEK: that takes a fresh scan besides.

use super::quorum::Confirmation;
use super::{Keys, may_destroy, now, refuse};
use crate::backing::Backing;
use crate::format::damage::Damage;
use crate::format::ids::KekId;
use crate::format::keyring::{KekState, Keyring};
use crate::format::lifecycle::Schedule;
use crate::format::time::rfc3339_seconds;
use crate::kms::event::KekChange;
use crate::store::Result;

/// Longest time between the announcement of an end and the end, in seconds.
const NOTICE_MAX: u64 = 86_400;
/// Longest wait, in seconds: a hundred years.
pub const WAIT_MAX: u64 = 100 * 365 * 86_400;

/// What is to be done about a schedule now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Nothing before this time.
    Wait(u64),
    /// Write this time into `announced`; 0 takes an announcement back.
    Announce(u64),
    /// The time has come.
    End,
}

/// Decides what to do at the time `now`.
fn next(s: &Schedule, now: u64) -> Next {
    let notice = s.due.saturating_sub(s.scheduled).min(NOTICE_MAX);
    let opens = s.due.saturating_sub(notice);
    match s.announced {
        // Announced by a clock that was put back since.
        at if at > now => Next::Announce(if now >= opens { now.max(1) } else { 0 }),
        0 if now >= opens => Next::Announce(now.max(1)),
        0 => Next::Wait(opens),
        at => match s.due.max(at.saturating_add(notice)) {
            end if now >= end => Next::End,
            end => Next::Wait(end),
        },
    }
}

/// How the end of a KEK stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It is not scheduled.
    Unscheduled,
    /// Not before this time.
    NotBefore(u64),
    /// The time has come.
    Come,
}

/// How the end of `kek` stands at the time `now`.
fn ending(ring: &Keyring, kek: KekId, now: u64) -> Ending {
    let Some(s) = ring.life.schedule(kek) else { return Ending::Unscheduled };
    match next(s, now) {
        Next::End => Ending::Come,
        Next::Wait(_) | Next::Announce(_) => Ending::NotBefore(earliest(s, now)),
    }
}

/// When the end can come, if somebody looks often enough.
fn earliest(s: &Schedule, now: u64) -> u64 {
    let notice = s.due.saturating_sub(s.scheduled).min(NOTICE_MAX);
    match s.announced {
        at if at != 0 && at <= now => s.due.max(at.saturating_add(notice)),
        _ => s.due.max(now.saturating_add(notice)),
    }
}

/// Whether the schedule of KEK `id` of `ring` lets it be destroyed now.
///
/// # Errors
/// Why not.
pub(super) fn may_end(ring: &Keyring, id: KekId) -> Result<()> {
    match (ring.life.schedule(id), ending(ring, id, now())) {
        (Some(s), Ending::Come) if s.confirmed >= ring.life.required() => Ok(()),
        (Some(s), Ending::Come) => refuse(format!(
            "KEK {id} was scheduled on the word of {} root keys, and this store requires {} now: cancel that and schedule \
             it again",
            s.confirmed,
            ring.life.required()
        )),
        (_, Ending::NotBefore(t)) => {
            refuse(format!("KEK {id} is scheduled to be destroyed, but not before {}", rfc3339_seconds(t)))
        }
        (_, Ending::Unscheduled) | (None, _) => refuse(format!("KEK {id} is not scheduled to be destroyed any more")),
    }
}

/// Whether KEK `id` of `ring` may be destroyed at once, without a schedule.
///
/// # Errors
/// Why not.
pub(super) fn may_go_at_once(ring: &Keyring, id: KekId, confirmed: &Confirmation) -> Result<()> {
    match ring.life.schedule(id) {
        None => confirmed.suffices(ring.life.required()),
        Some(s) => {
            refuse(format!("KEK {id} is scheduled to be destroyed on {}: cancel that first", rfc3339_seconds(s.due)))
        }
    }
}

impl Keys {
    /// Schedules the retired KEK `id` to be destroyed in `after` seconds. Until then it unwraps as before, and
    /// [`Keys::cancel_destroy`] takes it back.
    ///
    /// # Errors
    /// As [`Keys::check_destroy`] for one that is not scheduled yet; [`crate::store::StoreError::KeyState`] also if it is
    /// scheduled or destroyed already; the backing directory's.
    pub fn schedule_destroy<B: Backing>(
        &self,
        b: &B,
        id: KekId,
        after: u64,
        confirmed: &Confirmation,
    ) -> Result<Schedule> {
        let _update = self.update.lock();
        let mut ring = self.to_change()?;
        may_destroy(&ring, id)?;
        if ring.kek(id).is_some_and(|k| k.state == KekState::Destroyed) {
            return refuse(format!("KEK {id} was destroyed already"));
        }
        if let Some(s) = ring.life.schedule(id) {
            return refuse(format!(
                "KEK {id} is scheduled to be destroyed already, on {}: cancel that first",
                rfc3339_seconds(s.due)
            ));
        }
        if after > WAIT_MAX {
            return refuse("a wait of more than a hundred years is none");
        }
        confirmed.suffices(ring.life.required())?;
        let scheduled = now();
        let s = Schedule {
            kek: id,
            confirmed: confirmed.count(),
            scheduled,
            due: scheduled.saturating_add(after),
            announced: 0,
            used: 0,
        };
        ring.life.schedules.push(s);
        self.adopt(b, ring, &[])?;
        self.uses.lock().remove(&id);
        self.tell_kek(id, KekChange::Scheduled);
        Ok(s)
    }

    /// Takes back that KEK `id` is to be destroyed. Says whether it was.
    ///
    /// # Errors
    /// [`Damage::KekUnknown`]; the backing directory's.
    pub fn cancel_destroy<B: Backing>(&self, b: &B, id: KekId) -> Result<bool> {
        let _update = self.update.lock();
        let mut ring = self.to_change()?;
        ring.kek(id).ok_or(Damage::KekUnknown(id))?;
        if ring.life.schedule(id).is_none() {
            return Ok(false);
        }
        ring.life.schedules.retain(|s| s.kek != id);
        self.adopt(b, ring, &[])?;
        self.tell_kek(id, KekChange::Cancelled);
        Ok(true)
    }

    /// Looks at the clock for KEK `id`, and announces its end in the keyring if it is near.
    ///
    /// # Errors
    /// The backing directory's, and those of changing the keyring; [`crate::store::StoreError::KeyState`] if the time has
    /// come and more root keys must confirm it than did.
    pub fn look_at_ending<B: Backing>(&self, b: &B, id: KekId) -> Result<Ending> {
        let _update = self.update.lock();
        let (mut ring, now) = (self.snapshot(), now());
        let Some(s) = ring.life.schedule_mut(id) else { return Ok(Ending::Unscheduled) };
        if let Next::Announce(at) = next(s, now) {
            self.to_change()?;
            s.announced = at;
            let end = earliest(s, now);
            self.adopt(b, ring, &[])?;
            let when = rfc3339_seconds(end);
            match at {
                0 => {
                    tracing::warn!(kek = %id, "the clock was put back: this KEK will be destroyed later than announced")
                }
                _ => {
                    tracing::warn!(kek = %id, "this KEK will be destroyed at {when}; key destroy --cancel takes that back")
                }
            }
            self.tell_kek(id, KekChange::Announced);
        }
        let s = self.state.read();
        let ending = ending(&s.ring, id, now);
        if ending == Ending::Come {
            may_end(&s.ring, id)?;
        }
        Ok(ending)
    }

    /// The scheduled KEKs for which there is something to do now: to announce their end, to note that they were used, or
    /// to destroy them. Costs next to nothing.
    pub fn endings_due(&self) -> Vec<KekId> {
        let s = self.state.read();
        if s.ring.life.schedules.is_empty() {
            return Vec::new();
        }
        let (now, uses) = (now(), self.uses.lock());
        let due = |s: &&Schedule| !matches!(next(s, now), Next::Wait(_)) || (s.used == 0 && uses.contains(&s.kek));
        s.ring.life.schedules.iter().filter(due).map(|s| s.kek).collect()
    }

    /// A file was opened under KEK `id`. If that is to be destroyed, somebody should know.
    pub fn note_use(&self, id: KekId) {
        let s = self.state.read();
        let Some(schedule) = s.ring.life.schedule(id) else { return };
        if self.uses.lock().insert(id) {
            let when = rfc3339_seconds(schedule.due);
            tracing::warn!(kek = %id, "a file was opened under a KEK that is to be destroyed on {when}: if this goes on, \
                cancel that (key destroy --cancel), or rotate");
        }
    }

    /// Writes down that KEK `id` was used since it was scheduled, if it was.
    ///
    /// # Errors
    /// The backing directory's, and those of changing the keyring.
    pub fn record_use<B: Backing>(&self, b: &B, id: KekId) -> Result<()> {
        let _update = self.update.lock();
        let mut ring = self.to_change()?;
        match ring.life.schedule_mut(id).filter(|s| s.used == 0 && self.uses.lock().contains(&id)) {
            Some(s) => s.used = now().max(1),
            None => return Ok(()),
        }
        self.adopt(b, ring, &[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = NOTICE_MAX;

    fn schedule(wait: u64, announced: u64) -> Schedule {
        let scheduled = 1000 * DAY;
        Schedule { kek: KekId([1; 16]), confirmed: 1, scheduled, due: scheduled + wait, announced, used: 0 }
    }

    #[test]
    fn an_end_is_announced_a_day_before_and_comes_a_day_after_that() {
        let (from, due) = (1000 * DAY, 1007 * DAY);
        for (announced, now, wanted) in [
            (0, from, Next::Wait(due - DAY)),
            (0, due - DAY - 1, Next::Wait(due - DAY)),
            (0, due - DAY, Next::Announce(due - DAY)),
            (due - DAY, due - 1, Next::Wait(due)),
            (due - DAY, due, Next::End),
            // Nobody looked before it was due, or the clock was set forward.
            (0, due, Next::Announce(due)),
            (due, due + DAY - 1, Next::Wait(due + DAY)),
            (due, due + DAY, Next::End),
            (0, due + 900 * DAY, Next::Announce(due + 900 * DAY)),
            (due + 900 * DAY, due + 900 * DAY + 5, Next::Wait(due + 901 * DAY)),
            // It was put back.
            (due + 900 * DAY, from + DAY, Next::Announce(0)),
            (due + 900 * DAY, due - 5, Next::Announce(due - 5)),
            (due, 0, Next::Announce(0)),
        ] {
            assert_eq!(next(&schedule(7 * DAY, announced), now), wanted, "announced {announced}, now {now}");
        }
    }

    #[test]
    fn a_short_wait_has_a_notice_as_long_as_itself() {
        let from = 1000 * DAY;
        for (announced, now, wanted) in [
            (0, from, Next::Announce(from)),
            (from, from + 59, Next::Wait(from + 60)),
            (from, from + 60, Next::End),
            (from + 30, from + 60, Next::Wait(from + 90)),
            (0, from - 1, Next::Wait(from)),
        ] {
            assert_eq!(next(&schedule(60, announced), now), wanted, "announced {announced}, now {now}");
        }
        assert_eq!(next(&schedule(0, 0), from), Next::Announce(from));
        assert_eq!(next(&schedule(0, from), from), Next::End);
    }

    proptest::proptest! {
        /// Whatever the clock shows at each look, and whatever a restored keyring says.
        #[test]
        fn an_end_comes_only_a_notice_after_its_announcement_and_never_before_it_is_due(
            wait in 0..20 * DAY, announced: u64, now: u64,
        ) {
            let s = schedule(wait, announced);
            match next(&s, now) {
                Next::End => proptest::prop_assert!(
                    now >= s.due && announced != 0 && now - announced >= wait.min(DAY)
                ),
                Next::Announce(at) => {
                    let told = Schedule { announced: at, ..s };
                    let settled = matches!(next(&told, now), Next::Wait(_)) || wait == 0 || at == 0 && now < s.due;
                    proptest::prop_assert!(settled, "{:?}", next(&told, now));
                }
                Next::Wait(t) => proptest::prop_assert!(t > now && t <= earliest(&s, now)),
            }
        }
    }
}
