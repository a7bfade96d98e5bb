//! Dropping every key and getting them back, and asking the key service whether it still unwraps.
//!
//! A lock takes away the KEKs, and unless it follows from a refusal the root keys too: whoever unlocks must bring them
//! again. What stays is the store secret, for names and attributes, and the keyring, which is public.

use super::authority::{Change, Policy, is_refusal};
use super::gate::{KeyStanding, LockedBy, Phase};
use super::roots::{self, Connected, Object, Opened};
use super::{KekHandle, Keys};
use crate::format::damage::Damage;
use crate::format::ids::KekId;
use crate::format::keyring::{KekKind, Keyring};
use crate::kms::{KeyProvider, KmsError, WrapContext};
use crate::store::{Result, StoreError};
use std::sync::{Arc, Weak};

/// One root key to be asked.
struct Question {
    root: Connected,
    wrapped: Vec<u8>,
}

impl Keys {
    /// Whether files may be opened and made now.
    ///
    /// # Errors
    /// [`StoreError::KeysLocked`]; what the key service says: a refusal, or that it has been silent for too long.
    pub fn may_open(&self) -> Result<()> {
        self.gate.may_open()
    }

    /// Whether files may be made now.
    ///
    /// # Errors
    /// As [`Keys::may_open`]; under an external KEK also that the service does not answer.
    pub fn may_create(&self) -> Result<()> {
        self.gate.may_create()
    }

    /// Whether content may be changed now.
    ///
    /// # Errors
    /// [`StoreError::KeysLocked`].
    pub fn may_change(&self) -> Result<()> {
        if self.gate.phase() == Phase::Locked { Err(StoreError::KeysLocked) } else { Ok(()) }
    }

    /// Whether a KEK is a key in a service, so that unwrapping a DEK is a call to it.
    pub fn calls_a_service(&self) -> bool {
        self.gate.calls_a_service()
    }

    /// How far the door is open.
    pub fn phase(&self) -> Phase {
        self.gate.phase()
    }

    /// Who locked the keys; `None` if they are not locked.
    pub fn locked_by(&self) -> Option<LockedBy> {
        self.gate.locked_by()
    }

    /// How the keys stand, for people.
    pub fn standing(&self) -> KeyStanding {
        self.gate.standing()
    }

    /// Whether the key service has refused and not taken it back.
    pub fn is_refused(&self) -> bool {
        self.gate.authority(|a, _| a.is_refused())
    }

    /// From now on the key service's word counts: see [`super::authority`].
    pub fn supervise(&self, policy: Policy) {
        self.look_at_service();
        self.gate.watch(policy);
    }

    /// Finds out whether there is a service whose word counts.
    pub(super) fn look_at_service(&self) {
        let remote = self.questions().is_some();
        self.gate.authority(|a, _| a.set_remote(remote));
    }

    /// Whether [`Keys::ask_service`] should be called. Costs nothing.
    pub fn refresh_is_due(&self) -> bool {
        self.gate.authority(|a, now| a.is_due(now))
    }

    /// Asks the key service to unwrap the active KEK, and compares. Slow, and called by nobody who serves users.
    ///
    /// The root key that opened the store is asked, or the first of those at hand that wraps the active KEK; if it does
    /// not answer, the next. The first yes and the first refusal count. For a KEK of kind external only its own provider
    /// counts. A root key on this machine is not asked, and nothing is then.
    pub fn ask_service(&self) -> Change {
        let _one = self.refreshing.lock();
        let epoch = self.gate.epoch();
        if self.gate.locked_by() == Some(LockedBy::Operator) {
            // No root key is there to be asked. What the service had said is settled by whoever unlocks.
            self.gate.authority(|a, now| a.put_off(now));
            return Change::None;
        }
        let Some((ring, kek, asked)) = self.questions() else {
            self.gate.authority(|a, _| a.set_remote(false));
            return self.gate.refreshed(epoch, Ok(()));
        };
        self.gate.authority(|a, _| a.set_remote(true));
        let mut answer = self.ask_all(&ring, kek, &asked);
        if matches!(&answer, Err(e) if !is_refusal(e)) && self.connect_remote_spare(&ring) {
            let more = self.questions().map(|(.., q)| q).unwrap_or_default();
            let new: Vec<_> = more.into_iter().filter(|q| asked.iter().all(|a| a.root.id != q.root.id)).collect();
            match self.ask_all(&ring, kek, &new) {
                Err(e) if !is_refusal(&e) => {}
                counts => answer = if new.is_empty() { answer } else { counts },
            }
        }
        let change = self.gate.refreshed(epoch, answer.as_ref().copied());
        self.gate.tell(change, answer.as_ref().copied());
        match (change, &answer) {
            (Change::WentOffline, Err(e)) => {
                tracing::warn!(
                    "refresh: the key service gives no answer that counts; files can be opened until offline_grace is over: {e}"
                );
            }
            (Change::Refused, Err(e)) => {
                tracing::error!("refresh: the key service refuses; no file can be opened any more: {e}");
            }
            (Change::Restored, _) => tracing::info!("refresh: the key service unwraps again"),
            (Change::None, Err(e)) => tracing::debug!("refresh: still {e}"),
            _ => {}
        }
        change
    }

    /// The keyring, its active KEK, and the root keys to be asked for it; `None` if the first of them is on this
    /// machine.
    fn questions(&self) -> Option<(Keyring, KekId, Vec<Question>)> {
        let s = self.state.read();
        let (ring, connected) = (s.ring.clone(), s.connected.clone());
        drop(s);
        let active = ring.active()?;
        let (id, provider) = (active.id, active.provider.filter(|_| active.kind == KekKind::External));
        let wraps = |c: &Connected| active.wrap_by(c.id).map(|w| w.bytes.clone());
        let all = connected.into_iter().filter(|c| !c.wraps_only() && provider.is_none_or(|p| p == c.id));
        let all: Vec<Question> = all.filter_map(|c| Some(Question { wrapped: wraps(&c)?, root: c })).collect();
        let remote = |q: &Question| q.root.provider.describe().is_ok_and(|d| d.capabilities.remote);
        // A service that cannot even say what it is, is one.
        let local = |q: &Question| q.root.provider.describe().is_ok_and(|d| !d.capabilities.remote);
        if all.first().is_none_or(local) {
            return None;
        }
        let (first, rest) = all.into_iter().enumerate().partition::<Vec<_>, _>(|(i, _)| *i == 0);
        let rest = rest.into_iter().map(|(_, q)| q).filter(remote);
        Some((ring, id, first.into_iter().map(|(_, q)| q).chain(rest).collect()))
    }

    fn ask_all(&self, ring: &Keyring, kek: KekId, asked: &[Question]) -> std::result::Result<(), KmsError> {
        let mut silence = None;
        let context = Object::Kek(kek).context(ring.store);
        for q in asked {
            match self.ask(kek, q, &context) {
                Err(e) if !is_refusal(&e) => {
                    if matches!(e, KmsError::NotFound(_) | KmsError::BadCiphertext(_)) {
                        tracing::error!(%kek, "refresh: the active KEK's wrap does not unwrap any more; keep this \
                                         store mounted, look at the root key, and rotate to another: {e}");
                    }
                    silence = silence.or(Some(e));
                }
                answer => return answer,
            }
        }
        Err(silence.unwrap_or_else(|| KmsError::Config("no root key is at hand to be asked".into())))
    }

    /// One independent call: past every cache of this program, compared with the key in memory, if it is still there.
    fn ask(&self, kek: KekId, q: &Question, context: &WrapContext) -> std::result::Result<(), KmsError> {
        let key = q.root.provider.unwrap(&q.wrapped, context)?;
        let active = self.active.read();
        // A lock, or another KEK made active meanwhile, leaves nothing to compare with; that it unwraps is known.
        if active.id() == kek && !active.is_gone() && !active.key().ct_eq(&key) {
            let root = roots::name_of(q.root.provider.as_ref());
            return Err(KmsError::BadCiphertext(format!("{root} unwraps the active KEK to another key")));
        }
        Ok(())
    }

    /// Takes to hand the root keys in services that were given and not needed so far. Says whether there were any.
    pub(super) fn connect_remote_spare(&self, ring: &Keyring) -> bool {
        let local = |p: &Arc<dyn KeyProvider>| {
            // Asking for a passphrase or reading a key file is not ours to do here.
            p.describe().is_ok_and(|d| ["passphrase:", "keyfile:", "recovery:"].iter().any(|s| d.uri.starts_with(s)))
        };
        let spare = self.state.read().spare.clone();
        let mut any = false;
        for p in spare.iter().filter(|p| !local(p)) {
            if let Ok(Some((c, _))) = roots::identify(ring, p) {
                let mut s = self.state.write();
                // Not if a lock has taken them away meanwhile.
                if s.spare.iter().any(|x| Arc::ptr_eq(x, p)) {
                    s.spare.retain(|x| !Arc::ptr_eq(x, p));
                    super::change::connect(&mut s.connected, c);
                    any = true;
                }
            }
        }
        any
    }

    /// Begins a lock: no file is opened or read any more, what was written before is still taken. Says no if a lock
    /// has begun or is there already.
    pub fn drain(&self) -> bool {
        self.gate.drain()
    }

    /// Drops every KEK, and by an operator's lock every root key. Waits for those that are wrapping; files' own keys
    /// are the store's to drop. Returns what tells when the last holder of a KEK has let go.
    pub(in crate::store) fn drop_keks(&self, by: LockedBy) -> Vec<Weak<KekHandle>> {
        // Whoever is opening KEKs that somebody else has made; nobody begins that any more.
        drop(self.renewal.lock());
        let _update = self.update.lock();
        self.gate.close(by);
        let connected = self.state.read().connected.clone();
        // After a refusal only services are kept: they hold nothing that opens anything by itself.
        let remote = |c: &Connected| c.provider.describe().map_or(true, |d| d.capabilities.remote);
        let kept: Vec<Connected> = connected.into_iter().filter(|c| by == LockedBy::Refusal && remote(c)).collect();
        let mut gone = Vec::new();
        {
            let mut active = self.active.write();
            let shell = Arc::new(KekHandle::gone(self.store, active.id()));
            gone.push(Arc::downgrade(&std::mem::replace(&mut *active, shell)));
            self.pool().clear();
        }
        let (opened, providers) = {
            let mut s = self.state.write();
            let providers = (std::mem::replace(&mut s.connected, kept), std::mem::take(&mut s.spare));
            (std::mem::take(&mut s.opened), providers)
        };
        gone.extend(opened.handles.values().map(Arc::downgrade));
        drop((opened, providers));
        gone
    }

    /// Gets the KEKs back with the first of `root` that is one of the root keys, as [`Keys::open`] does, from the
    /// keyring in memory. Where somebody else may have changed the one on disk, [`Keys::renew`] comes after.
    ///
    /// # Errors
    /// As [`Keys::open`]; all is then as it was before.
    pub(in crate::store) fn reopen(&self, root: &[Arc<dyn KeyProvider>]) -> Result<()> {
        let _update = self.update.lock();
        let ring = self.snapshot();
        let (c, secret, _) = roots::first_that_opens(&ring, root)?;
        if !secret.ct_eq(self.secret.secret()) {
            return Err(Damage::KeyringMac.into());
        }
        drop(secret);
        let (connected, opened, spare) = super::connect_all(&ring, c, root);
        self.install(ring, connected, opened, spare)
    }

    /// The same with the root keys still at hand, after a refusal was taken back.
    ///
    /// # Errors
    /// As [`Keys::open`]; the keys stay locked.
    pub(in crate::store) fn reopen_with_connected(&self) -> Result<()> {
        let root: Vec<_> = self.state.read().connected.iter().map(|c| c.provider.clone()).collect();
        self.reopen(&root)
    }

    fn install(
        &self,
        ring: Keyring,
        connected: Vec<Connected>,
        opened: Opened,
        spare: Vec<Arc<dyn KeyProvider>>,
    ) -> Result<()> {
        let id = ring.active().map(|k| k.id).ok_or(Damage::KeyringUnreadable)?;
        let Some(handle) = opened.handles.get(&id).cloned() else {
            let why = opened.unusable.get(&id).cloned();
            return Err(why.map_or(StoreError::Damage(Damage::KekUnknown(id)), StoreError::Kms));
        };
        opened.handles.values().for_each(|h| h.report_to(&self.gate));
        self.gate.activated(handle.kind());
        *self.active.write() = handle;
        {
            let mut s = self.state.write();
            (s.connected, s.opened, s.spare) = (connected, opened, spare);
        }
        self.look_at_service();
        self.gate.open();
        Ok(())
    }
}

#[cfg(test)]
impl Keys {
    /// Every KEK and the key it wraps with, each with every bit turned.
    pub(in crate::store) fn keks_for_tests(&self) -> Vec<[u8; 32]> {
        self.state.read().opened.handles.values().flat_map(|h| h.keys_for_tests()).collect()
    }
}
