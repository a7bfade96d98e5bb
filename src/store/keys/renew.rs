//! Reading the keyring again where somebody else may change it: a store that is mounted read-only is shared with the shards
//! of a rotation, the first of which makes another KEK the active one, and with the merge.
//!
//! It is looked for when a header names a KEK that is not known here, and now and then. A KEK is in the keyring on disk
//! before any header names it, so one that is not there after that look is nobody's.
//!
//! Looking costs little: what tells two states of the copies apart without reading them (inode, size, times). Only if that
//! has changed are they read, and at most once a second, so that a backing directory whose headers name made-up KEKs does
//! not keep this program reading. What was read is adopted if it is this store's, authentic, and newer; nothing but that
//! has root keys unwrap anything.

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
    /// The copies as they were before it; `None`: it came to nothing.
    stamps: Option<disk::Stamps>,
    at: Instant,
    /// Why what was read is not in force, if that may be another time.
    failed: Option<KmsError>,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// There is nothing new.
    Nothing,
    /// As the last time, which is too short a while ago.
    Fail(KmsError),
    Read,
    Wait(Duration),
}

/// Decides by the last reading, and the copies as they are at `now`.
fn step(last: Option<&Reading>, stamps: &disk::Stamps, now: Instant) -> Step {
    let Some(last) = last else { return Step::Read };
    let left = READ_EVERY.saturating_sub(now.saturating_duration_since(last.at));
    match (&last.failed, last.stamps.as_ref() == Some(stamps)) {
        (None, true) => Step::Nothing,
        (Some(e), true) if !left.is_zero() => Step::Fail(e.clone()),
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
        let mut renewal = self.renewal.lock();
        let folder = disk::folder(b)?;
        let stamps = loop {
            // A lock waits for whoever is here, and no other one begins.
            if self.gate.phase() != Phase::Open {
                return Err(StoreError::KeysLocked);
            }
            let stamps = disk::stamps(b, &folder);
            match step(renewal.last.as_ref(), &stamps, Instant::now()) {
                Step::Nothing => return Ok(false),
                Step::Fail(e) => return Err(e.into()),
                Step::Wait(left) => std::thread::sleep(left),
                Step::Read => break stamps,
            }
        };
        let found = disk::candidates(disk::load(b, &folder));
        let last = renewal.last.insert(Reading { stamps: None, at: Instant::now(), failed: None });
        let (found, _damaged) = found?;
        let Some(ring) = newer(&self.snapshot(), found, |d| roots::is_authentic(&self.secret, d)) else {
            last.stamps = Some(stamps);
            return Ok(false);
        };
        let opened = self.open_new(&ring);
        if let Some(e) = fault(&ring, &opened.unusable) {
            tracing::warn!(
                generation = ring.generation,
                "the keyring was changed elsewhere, and a KEK does not open: {e}"
            );
            (last.stamps, last.failed) = (Some(stamps), Some(e.clone()));
            return Err(e.into());
        }
        self.take_over(ring, opened)?;
        last.stamps = Some(stamps);
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
        let away = || KmsError::Unreachable("gone".into());
        let read = |failed| Reading { stamps: Some(stamps(1)), at: t, failed };
        assert_eq!(step(None, &stamps(1), t), Step::Read);
        for (failed, now, at, want) in [
            (None, 1, 0, Step::Nothing),
            (None, 1, 5000, Step::Nothing),
            (None, 2, 400, Step::Wait(Duration::from_millis(600))),
            (None, 2, 1000, Step::Read),
            (Some(away()), 1, 400, Step::Fail(away())),
            (Some(away()), 1, 1000, Step::Read),
            (Some(away()), 2, 400, Step::Wait(Duration::from_millis(600))),
            (Some(away()), 2, 1001, Step::Read),
        ] {
            assert_eq!(step(Some(&read(failed.clone())), &stamps(now), ms(at)), want, "{failed:?} {now} {at}");
        }
        let unreadable = Reading { stamps: None, at: t, failed: None };
        assert_eq!(step(Some(&unreadable), &stamps(1), ms(1000)), Step::Read, "it may be readable now");
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
