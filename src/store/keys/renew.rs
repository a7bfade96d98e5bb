//! Reading the keyring again where somebody else may change it: a store that is mounted read-only is shared with the shards
//! of a rotation, the first of which makes another KEK the active one, and with the merge.
//!
//! It is looked for when a header names a KEK that is not known here, and now and then. A KEK is in the keyring on disk
//! before any header names it, so one that is not there after that look is nobody's.
//!
//! Looking costs little: what tells two states of the copies apart without reading them (inode, size, times). Only if that
//! has changed are they read, at most once a second, and once for all who wait, so that a backing directory whose headers
//! name made-up KEKs does not keep this program reading. What was read is adopted if it is this store's, authentic, and
//! newer; nothing but that has root keys unwrap anything.

use super::roots::{self, Opened};
use super::{Keys, Phase, disk};
use crate::backing::Backing;
use crate::format::damage::Damage;
use crate::format::ids::KekId;
use crate::format::keyring::{Decoded, KekRecord, KekState, Keyring};
use crate::kms::KmsError;
use crate::store::{Result, StoreError};
use std::time::{Duration, Instant};

/// Least time between two readings.
const READ_EVERY: Duration = Duration::from_secs(1);

/// The last reading.
#[derive(Default)]
pub struct Renewal {
    last: Option<Reading>,
}

struct Reading {
    /// The copies as they were before it.
    stamps: disk::Stamps,
    began: Instant,
    ended: Instant,
    outcome: Outcome,
}

/// What came of a reading.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    /// What was to be had of it is in force.
    Known,
    /// A KEK of what was read did not open, and may another time.
    Closed(KmsError),
    /// It came to nothing.
    Unreadable,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// There is nothing new.
    Nothing,
    /// As the last time, which is too short a while ago.
    Fail(KmsError),
    /// As the last time, which began after this one was asked for.
    Unreadable,
    Read,
    Wait(Duration),
}

/// Decides for somebody who `came` then, by the last reading, and the copies as they are at `now`. What was looked for was on
/// disk when he came, so that a reading which began later has found it, if it is there: many who wait for one after the other
/// are not each to read, nor each to wait for a service that is away.
fn step(last: Option<&Reading>, stamps: &disk::Stamps, came: Instant, now: Instant) -> Step {
    let Some(last) = last else { return Step::Read };
    let left = READ_EVERY.saturating_sub(now.saturating_duration_since(last.ended));
    let (is_same, is_later) = (last.stamps == *stamps, last.began >= came);
    match &last.outcome {
        Outcome::Known if is_same || is_later => Step::Nothing,
        Outcome::Closed(e) if is_later || is_same && !left.is_zero() => Step::Fail(e.clone()),
        Outcome::Unreadable if is_later => Step::Unreadable,
        _ if left.is_zero() => Step::Read,
        _ => Step::Wait(left),
    }
}

/// The keyring that is to take the place of `in_force`, of copies that were read, the newest first: this store's,
/// authentic, of a later generation, and with the same immutable properties. What is older is never adopted, whoever wrote it.
fn newer(in_force: &Keyring, found: Vec<Decoded>, is_authentic: impl Fn(&Decoded) -> bool) -> Option<Keyring> {
    let fits = |r: &Keyring| {
        r.store == in_force.store
            && r.generation > in_force.generation
            && r.plaintext_names() == in_force.plaintext_names()
            && r.active().is_some()
    };
    found.into_iter().find(|d| fits(&d.keyring) && is_authentic(d)).map(|d| d.keyring)
}

/// Why KEKs of `ring` that were just opened keep it from being adopted: the active one did not open, or another one's
/// provider gave no answer, and may the next time.
fn fault(ring: &Keyring, unusable: &std::collections::HashMap<KekId, KmsError>) -> Option<KmsError> {
    let of_active = ring.active().and_then(|k| unusable.get(&k.id));
    of_active.or_else(|| unusable.values().find(|e| e.is_retryable())).cloned()
}

impl Keys {
    /// Has the last reading have ended at this time.
    #[cfg(test)]
    pub(super) fn ended_at(&self, at: Instant) {
        self.renewal.lock().last.iter_mut().for_each(|r| r.ended = at);
    }

    /// Whether the keyring on disk may know more of the KEK `id` than the one in force.
    pub(in crate::store) fn may_be_news(&self, id: KekId) -> bool {
        self.state.read().ring.kek(id).is_none_or(|k| k.state == KekState::Pending)
    }

    /// Takes over a newer keyring from disk, if there is one. KEKs that came are opened with the root keys at hand, and those
    /// that were destroyed are forgotten. On an error the keyring before is in force. For a store that is only read: one that
    /// is written is nobody else's to change.
    ///
    /// # Errors
    /// [`StoreError::KeysLocked`]; as [`Keys::open`] for copies that cannot be read; [`StoreError::Kms`] if a KEK does not
    /// open: the provider's own error.
    pub(in crate::store) fn renew<B: Backing>(&self, b: &B) -> Result<bool> {
        let came = Instant::now();
        let mut renewal = self.renewal.lock();
        let folder = disk::folder(b)?;
        let stamps = loop {
            // A lock waits for whoever is here, and no other one begins.
            if self.gate.phase() != Phase::Open {
                return Err(StoreError::KeysLocked);
            }
            let stamps = disk::stamps(b, &folder);
            match step(renewal.last.as_ref(), &stamps, came, Instant::now()) {
                Step::Nothing => return Ok(false),
                Step::Fail(e) => return Err(e.into()),
                Step::Unreadable => return Err(Damage::KeyringUnreadable.into()),
                Step::Wait(left) => std::thread::sleep(left),
                Step::Read => break stamps,
            }
        };
        let began = Instant::now();
        let done = self.read_again(b, &folder);
        let outcome = match &done {
            Ok(_) => Some(Outcome::Known),
            Err(StoreError::Kms(e)) => Some(Outcome::Closed(e.clone())),
            Err(StoreError::KeysLocked) => None,
            Err(_) => Some(Outcome::Unreadable),
        };
        renewal.last = outcome.map(|outcome| Reading { stamps, began, ended: Instant::now(), outcome });
        done
    }

    /// Reads both copies, and takes over what is newer. Says whether anything was.
    fn read_again<B: Backing>(&self, b: &B, folder: &B::Node) -> Result<bool> {
        let (found, _damaged) = disk::candidates(disk::load(b, folder))?;
        let Some(ring) = newer(&self.snapshot(), found, |d| roots::is_authentic(&self.secret, d)) else {
            return Ok(false);
        };
        let opened = self.open_new(&ring);
        if let Some(e) = fault(&ring, &opened.unusable) {
            tracing::warn!(
                generation = ring.generation,
                "the keyring was changed elsewhere, and a KEK does not open: {e}"
            );
            return Err(e.into());
        }
        self.take_over(ring, opened)?;
        Ok(true)
    }

    /// Opens those KEKs of `ring` that are not open here.
    fn open_new(&self, ring: &Keyring) -> Opened {
        let is_open = |k: &KekRecord| self.state.read().opened.handles.contains_key(&k.id);
        let try_all = || {
            let connected = self.state.read().connected.clone();
            roots::open_keks(ring, &connected, |k| !is_open(k))
        };
        let opened = try_all();
        if opened.unusable.is_empty() || !self.connect_remote_spare(ring) {
            return opened;
        }
        try_all()
    }

    fn take_over(&self, ring: Keyring, new: Opened) -> Result<()> {
        let _update = self.update.lock();
        if self.gate.phase() != Phase::Open {
            return Err(StoreError::KeysLocked);
        }
        let id = ring.active().map(|k| k.id).ok_or(Damage::KeyringUnreadable)?;
        let known = self.state.read().opened.handles.get(&id).cloned();
        let handle = new.handles.get(&id).cloned().or(known).ok_or(Damage::KekUnknown(id))?;
        new.handles.values().for_each(|h| h.report_to(&self.gate));
        let generation = ring.generation;
        {
            let mut active = self.active.write();
            if active.id() != id {
                active.set_may_wrap(false);
                handle.set_may_wrap(true);
                self.gate.activated(handle.kind());
                *active = handle;
            }
            let mut s = self.state.write();
            s.opened.handles.extend(new.handles);
            s.opened.unusable.extend(new.unusable);
            let lives = |id: &KekId| ring.kek(*id).is_some_and(|k| k.state != KekState::Destroyed);
            s.opened.handles.retain(|id, _| lives(id));
            s.opened.unusable.retain(|id, _| lives(id));
            s.connected.retain(|c| ring.root(c.id).is_some());
            s.ring = ring;
        }
        self.look_at_service();
        tracing::info!(generation, active = %id, "took over the keyring, which was changed elsewhere");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ids::StoreId;

    fn stamps(n: u64) -> disk::Stamps {
        [Some(disk::Stamp::of_tests(n)), None]
    }

    #[test]
    fn the_copies_are_read_when_they_have_changed_and_once_a_second_at_most() {
        let t = Instant::now();
        let ms = |n| t + Duration::from_millis(n);
        let closed = || Outcome::Closed(KmsError::Unreachable("gone".into()));
        let fail = || Step::Fail(KmsError::Unreachable("gone".into()));
        let wait = |n| Step::Wait(Duration::from_millis(n));
        // From 100 to 5000: the service took its time.
        let read = |outcome| Reading { stamps: stamps(1), began: ms(100), ended: ms(5000), outcome };
        assert_eq!(step(None, &stamps(1), t, t), Step::Read);
        for (outcome, now, came, at, want) in [
            (Outcome::Known, 1, 200, 5000, Step::Nothing),
            (Outcome::Known, 1, 9000, 9000, Step::Nothing),
            (Outcome::Known, 2, 200, 5400, wait(600)),
            (Outcome::Known, 2, 200, 6000, Step::Read),
            (Outcome::Known, 2, 100, 5400, Step::Nothing),
            (Outcome::Known, 2, 0, 6000, Step::Nothing),
            (closed(), 1, 200, 5400, fail()),
            (closed(), 1, 200, 6000, Step::Read),
            (closed(), 2, 200, 5400, wait(600)),
            (closed(), 2, 200, 6001, Step::Read),
            (closed(), 2, 100, 5000, fail()),
            (closed(), 1, 0, 6000, fail()),
            // It may be readable now.
            (Outcome::Unreadable, 1, 200, 5400, wait(600)),
            (Outcome::Unreadable, 1, 200, 6000, Step::Read),
            (Outcome::Unreadable, 1, 100, 5400, Step::Unreadable),
        ] {
            assert_eq!(
                step(Some(&read(outcome.clone())), &stamps(now), ms(came), ms(at)),
                want,
                "{outcome:?} {now} {at}"
            );
        }
    }

    fn keyring(generation: u64) -> Keyring {
        let kek = KekRecord { state: KekState::Active, ..super::super::pending(super::super::KekKind::Sealed, None) };
        Keyring {
            store: StoreId([1; 16]),
            generation,
            incompat: 0,
            ro_compat: 0,
            roots: Vec::new(),
            secret: Vec::new(),
            keks: vec![kek],
            life: Default::default(),
        }
    }

    fn decoded(keyring: Keyring) -> Decoded {
        Decoded { keyring, signed: Vec::new(), mac: [0; 32] }
    }

    #[test]
    fn only_a_newer_authentic_keyring_of_this_store_is_adopted() {
        let now = keyring(5);
        let adopted = |found: &[Keyring], authentic: &dyn Fn(u64) -> bool| {
            let found = found.iter().cloned().map(decoded).collect();
            newer(&now, found, |d| authentic(d.keyring.generation)).map(|r| r.generation)
        };
        let all = |_| true;
        assert_eq!(adopted(&[keyring(7), keyring(6)], &all), Some(7));
        assert_eq!(adopted(&[keyring(7), keyring(6)], &|g| g != 7), Some(6), "the newest is a forgery");
        assert_eq!(adopted(&[keyring(6)], &|_| false), None);
        assert_eq!(adopted(&[keyring(5), keyring(4)], &all), None, "as old, or older");
        let other = Keyring { store: StoreId([2; 16]), ..keyring(9) };
        let names = Keyring { incompat: crate::format::keyring::INCOMPAT_PLAINTEXT_NAMES, ..keyring(9) };
        let idle = Keyring { keks: Vec::new(), ..keyring(9) };
        for bad in [other, names, idle] {
            assert_eq!(adopted(&[bad], &all), None);
        }
        assert_eq!(adopted(&[], &all), None);
    }

    #[test]
    fn a_kek_that_may_open_the_next_time_and_the_active_one_keep_a_keyring_out() {
        let ring = keyring(1);
        let (active, other) = (ring.keks[0].id, KekId([9; 16]));
        let (gone, lost) = (KmsError::Unreachable("u".into()), KmsError::NotFound("n".into()));
        let of = |bad: &[(KekId, &KmsError)]| fault(&ring, &bad.iter().map(|(id, e)| (*id, (*e).clone())).collect());
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[(other, &lost)]), None, "it opens no more files than before");
        assert_eq!(of(&[(other, &gone)]), Some(gone.clone()));
        assert_eq!(of(&[(active, &lost), (other, &gone)]), Some(lost.clone()));
    }
}
