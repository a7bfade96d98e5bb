//! Changes of the keyring: KEKs staged, made active, retired, destroyed; root keys added and removed.

use super::gate::Phase;
use super::roots::{self, Connected, Object};
use super::{Confirmation, Keys, Proof, ending, new_handle, now, pending, refuse, refuse_recovery_beside_external};
use crate::backing::Backing;
use crate::crypto::secret::Secret32;
use crate::format::damage::Damage;
use crate::format::ids::{KekId, RootKeyId};
use crate::format::keyring::{KekKind, KekState, Keyring, RootKeyRecord};
use crate::kms::KeyProvider;
use crate::kms::event::{Change, KekChange};
use crate::store::{Result, StoreError};
use std::sync::Arc;

use super::handle::KekHandle;

impl Keys {
    /// Makes a new KEK, pending. `root` names every root key the new KEK shall have, those that are not in the keyring
    /// yet are added to it (see [`Keys::add_root_key`]); empty means those of the active KEK. The first one (or the
    /// active KEK's provider) wraps DEKs if `kind` is external. Recovery keys of the store always wrap the new KEK too,
    /// by their public keys, until [`Keys::remove_root_key`].
    ///
    /// On return the new KEK's wraps are durable, and every one of its root keys whose secret is at hand has unwrapped,
    /// from what was read back from disk, the key it was given. Where the store secret was wrapped by an older version of
    /// one of them, it is wrapped by the newest one now.
    ///
    /// # Errors
    /// [`StoreError::KeyState`] if a KEK is pending already, a root key of the active KEK is not at hand, all of `root` are
    /// recovery keys, or `kind` is external and the store has a recovery key; a provider's, also if it does not unwrap
    /// what it wrapped; the backing directory's. The keyring in force is then the one before.
    pub fn stage<B: Backing>(&self, b: &B, kind: KekKind, root: &[Arc<dyn KeyProvider>]) -> Result<KekId> {
        let _update = self.update.lock();
        let mut ring = self.to_change()?;
        if let Some(p) = ring.pending() {
            return refuse(format!("KEK {} is pending already: make it active or discard it first", p.id));
        }
        let live = self.live(&ring)?;
        let (mut targets, added) = if root.is_empty() {
            (self.roots_of_active(&ring)?, Vec::new())
        } else {
            self.join(&mut ring, &live, root)?
        };
        if !added.is_empty() && ring.life.required() > 1 {
            return refuse(
                "this store requires several root keys to confirm a new one: add it first (key add --confirm)",
            );
        }
        if targets.iter().all(|c| roots::is_recovery(&ring, c.id)) {
            return refuse("a KEK needs a root key besides the recovery key: name another one too");
        }
        self.recovery_keys(&ring)?.into_iter().for_each(|c| connect(&mut targets, c));
        let same =
            ring.active().and_then(|k| k.provider).filter(|p| root.is_empty() && targets.iter().any(|c| c.id == *p));
        let first = same.or(targets.iter().map(|c| c.id).find(|id| !roots::is_recovery(&ring, *id)));
        let mut record = pending(kind, first.filter(|_| kind == KekKind::External));
        let handle = Arc::new(new_handle(self.store, &record, Secret32::random(), &targets)?);
        handle.report_to(&self.gate);
        let object = Object::Kek(record.id);
        for c in &targets {
            record.wraps.push(roots::wrap(c, self.store, object, handle.key())?);
        }
        ring.keks.push(record);
        refuse_recovery_beside_external(&ring)?;
        let refreshed = self.refresh_secret(&mut ring, &targets);
        let mut proofs: Vec<Proof<'_>> = targets.iter().map(|c| (c.clone(), object, handle.key())).collect();
        proofs.extend(refreshed.iter().map(|c| (c.clone(), Object::Secret, self.secret().secret())));
        added.iter().for_each(|c| proofs.extend(self.everything(c, &live)));
        self.adopt(b, ring, &proofs)?;
        drop(proofs);
        let mut s = self.state.write();
        s.opened.handles.insert(handle.id(), handle.clone());
        targets.into_iter().filter(|c| !c.wraps_only()).for_each(|c| connect(&mut s.connected, c));
        drop(s);
        added.iter().for_each(|c| self.tell_root(c.id));
        self.tell_kek(handle.id(), KekChange::Created);
        Ok(handle.id())
    }

    /// Makes the pending KEK `id` the active one; the KEK that was active is retired at the same instant. Waits for
    /// every [`Keys::with_active`] that runs: once this returns, no header under the old KEK can still be on its way to disk.
    /// (A key service may still be at a call for the pool or for a new file; what it answers is dropped.) Does nothing if
    /// `id` is active.
    ///
    /// # Errors
    /// [`StoreError::KeyState`] if `id` is not pending; [`Damage::KekUnknown`]; the backing directory's, and the KEK
    /// that was active is still the one that wraps.
    pub fn activate<B: Backing>(&self, b: &B, id: KekId) -> Result<()> {
        let _update = self.update.lock();
        let mut ring = self.to_change()?;
        match state_of(&ring, id)? {
            KekState::Active => return Ok(()),
            KekState::Pending => {}
            KekState::Retired | KekState::Destroyed => {
                return refuse(format!("KEK {id} was retired: a KEK never becomes active again"));
            }
        }
        let handle = self.opened(id)?;
        let time = now();
        for k in &mut ring.keks {
            if k.state == KekState::Active {
                (k.state, k.retired) = (KekState::Retired, time);
            } else if k.id == id {
                (k.state, k.activated) = (KekState::Active, time);
            }
        }
        let mut active = self.active.write();
        self.adopt(b, ring, &[])?;
        active.set_may_wrap(false);
        handle.set_may_wrap(true);
        self.gate.activated(handle.kind());
        let old = std::mem::replace(&mut *active, handle);
        self.pool().clear();
        drop(active);
        self.tell_kek(old.id(), KekChange::Retired);
        self.tell_kek(id, KekChange::Activated);
        Ok(())
    }

    /// Records that a scan of every header proved that none names the retired KEK `id`, but for what the operator waived:
    /// its record's `unused` is set, and [`Keys::destroy`] accepts it. So whoever calls that must know from a scan that
    /// nothing which was waived needs the KEK. Does nothing if it is recorded already.
    ///
    /// # Errors
    /// [`StoreError::KeyState`] if `id` is not retired, that is, no other KEK was made active after it.
    pub fn retire<B: Backing>(&self, b: &B, id: KekId) -> Result<()> {
        let _update = self.update.lock();
        let mut ring = self.to_change()?;
        if state_of(&ring, id)? != KekState::Retired {
            return refuse(format!("KEK {id} is not retired: make another one active first"));
        }
        match ring.kek_mut(id) {
            Some(k) if k.unused == 0 => k.unused = now().max(1),
            _ => return Ok(()),
        }
        self.adopt(b, ring, &[])?;
        self.tell_kek(id, KekChange::Unused);
        Ok(())
    }

    /// Destroys the retired KEK `id`: its wrapped bytes are in neither copy of the keyring any more, and it is
    /// forgotten here. What only it can open is lost. Its record stays, so that such a file can be told. On a KEK that
    /// is destroyed already, makes sure of the copies again.
    ///
    /// If one of the copies cannot be replaced, the KEK is destroyed and forgotten all the same, for that cannot be taken
    /// back, but this is an error until another call has got rid of that copy.
    ///
    /// The file system below may keep the replaced copies' blocks (free space, snapshots, backups, journals).
    ///
    /// # Errors
    /// As [`Keys::check_destroy`], and the backing directory's; [`StoreError::CopyLeft`].
    pub fn destroy<B: Backing>(&self, b: &B, id: KekId, confirmed: &Confirmation) -> Result<()> {
        self.end(b, id, |ring| check_destroy(ring, id, confirmed))
    }

    /// As [`Keys::destroy`], because its schedule says so.
    ///
    /// # Errors
    /// [`StoreError::KeyState`] if it is not scheduled (any more), or the time has not come; the backing directory's;
    /// [`StoreError::CopyLeft`], and [`Keys::destroy`] then goes on.
    pub fn destroy_scheduled<B: Backing>(&self, b: &B, id: KekId) -> Result<()> {
        self.end(b, id, |ring| ending::may_end(ring, id))
    }

    fn end<B: Backing>(&self, b: &B, id: KekId, may: impl FnOnce(&Keyring) -> Result<()>) -> Result<()> {
        let _update = self.update.lock();
        let mut ring = self.to_change()?;
        may_destroy(&ring, id)?;
        may(&ring)?;
        let mut is_news = false;
        if let Some(k) = ring.kek_mut(id).filter(|k| k.state != KekState::Destroyed) {
            (k.state, k.destroyed) = (KekState::Destroyed, now());
            k.wraps.clear();
            is_news = true;
        }
        ring.life.schedules.retain(|s| s.kek != id);
        self.adopt(b, ring, &[])?;
        let mut s = self.state.write();
        s.opened.handles.remove(&id);
        s.opened.unusable.remove(&id);
        drop(s);
        if is_news {
            self.tell_kek(id, KekChange::Destroyed);
        }
        for name in super::kept(b).unwrap_or_default() {
            tracing::warn!(kek = %id, "the replaced keyring .envelopefs/{name} may still hold this KEK: remove it");
        }
        self.settle(b, &format!("KEK {id} is destroyed"))
    }

    /// Whether [`Keys::destroy`] would accept `id` now.
    ///
    /// # Errors
    /// [`StoreError::KeyState`] if `id` is not retired or was not proved unused (see [`Keys::retire`]), if it is scheduled,
    /// or if more root keys must confirm it.
    pub fn check_destroy(&self, id: KekId, confirmed: &Confirmation) -> Result<()> {
        check_destroy(&self.to_change()?, id, confirmed)
    }

    /// Removes the pending KEK `id` from the keyring. Nothing was ever wrapped under it.
    ///
    /// # Errors
    /// [`StoreError::KeyState`] if `id` is not pending.
    pub fn discard_pending<B: Backing>(&self, b: &B, id: KekId) -> Result<()> {
        let _update = self.update.lock();
        let mut ring = self.to_change()?;
        if state_of(&ring, id)? != KekState::Pending {
            return refuse(format!("KEK {id} is not pending"));
        }
        ring.keks.retain(|k| k.id != id);
        self.adopt(b, ring, &[])?;
        let mut s = self.state.write();
        s.opened.handles.remove(&id);
        s.opened.unusable.remove(&id);
        drop(s);
        self.tell_kek(id, KekChange::Discarded);
        Ok(())
    }

    /// Adds a root key that alone opens the store: it wraps the store secret and every KEK that is not destroyed, and
    /// has unwrapped them, from what was read back from disk, before this returns. A recovery key of which only the public
    /// key is given proves nothing here: whoever has its secret must.
    ///
    /// # Errors
    /// [`StoreError::KeyState`] if it is one already, a recovery key for a store with an external KEK, or if more root keys
    /// must confirm it; [`StoreError::Kms`] if a KEK is not open, or the provider's own.
    pub fn add_root_key<B: Backing>(
        &self,
        b: &B,
        provider: &Arc<dyn KeyProvider>,
        confirmed: &Confirmation,
    ) -> Result<RootKeyId> {
        let _update = self.update.lock();
        let mut ring = self.to_change()?;
        // Or one root key would make itself a second one.
        confirmed.suffices(ring.life.required())?;
        let live = self.live(&ring)?;
        let (_, added) = self.join(&mut ring, &live, std::slice::from_ref(provider))?;
        let Some(c) = added.into_iter().next() else {
            return refuse(format!("{} is a root key of this store already", roots::name_of(provider.as_ref())));
        };
        refuse_recovery_beside_external(&ring)?;
        self.adopt(b, ring, &self.everything(&c, &live))?;
        let id = c.id;
        if !c.wraps_only() {
            connect(&mut self.state.write().connected, c);
        }
        self.tell_root(id);
        Ok(id)
    }

    /// Removes the root key `id`: nothing it wrapped is in the keyring any more. Before that, another root key at
    /// hand must unwrap the store secret and every KEK that is not destroyed. Of one that is removed already, makes sure
    /// that no copy on disk has it.
    ///
    /// # Errors
    /// [`StoreError::CopyLeft`]; [`StoreError::KeyState`] if it is not a root key, the last one that is no recovery key, the provider of an external
    /// KEK, needed for the quorum, or no other root key at hand opens everything.
    pub fn remove_root_key<B: Backing>(&self, b: &B, id: RootKeyId) -> Result<()> {
        let _update = self.update.lock();
        let mut ring = self.to_change()?;
        let done = format!("root key {id} is removed");
        let Some(uri) = ring.root(id).map(|r| r.uri.clone()) else {
            return match self.copy_is_left() {
                true => self.settle(b, &done),
                false => refuse(format!("{id} is not a root key of this store")),
            };
        };
        if ring.roots.len() == 1 {
            return refuse("this is the last root key: add another one first");
        }
        if ring.roots.iter().filter(|r| r.id != id).all(|r| roots::is_recovery(&ring, r.id)) {
            return refuse(
                "this is the last root key besides the recovery key, which no mount asks for by itself: add another one first",
            );
        }
        if ring.roots.len() <= usize::from(ring.life.required()) {
            return refuse(format!(
                "this store requires {} different root keys to confirm what cannot be undone, and fewer would be left: add \
                 another one first, or lower that (key policy --quorum)",
                ring.life.required()
            ));
        }
        if let Some(k) = ring.keks.iter().find(|k| k.state != KekState::Destroyed && k.provider == Some(id)) {
            return refuse(format!(
                "the external KEK {} is this root key: rotate to another and destroy it first",
                k.id
            ));
        }
        let live = self.live(&ring)?;
        self.connect_spare(&ring);
        let connected = self.state.read().connected.clone();
        let heir = connected.iter().filter(|c| c.id != id).find(|c| {
            self.everything(c, &live).iter().all(|(c, object, key)| roots::verify(&ring, c, *object, key).is_ok())
        });
        let Some(heir) = heir else {
            return refuse("no other root key at hand opens everything this one opens: give one that does");
        };
        ring.roots.retain(|r| r.id != id);
        ring.secret.retain(|w| w.root != id);
        ring.keks.iter_mut().for_each(|k| k.wraps.retain(|w| w.root != id));
        self.adopt(b, ring, &self.everything(heir, &live))?;
        self.state.write().connected.retain(|c| c.id != id);
        self.tell(&Change::RootKey { id: id.0, uri: &uri, added: false });
        self.settle(b, &done)
    }

    /// Tells of a root key that was added.
    fn tell_root(&self, id: RootKeyId) {
        let uri = self.state.read().ring.root(id).map(|r| r.uri.clone()).unwrap_or_default();
        self.tell(&Change::RootKey { id: id.0, uri: &uri, added: true });
    }

    /// Takes a root key of this store to hand, for changes that need it.
    ///
    /// # Errors
    /// [`StoreError::WrongKey`] if it is none; its own.
    pub fn connect_root(&self, provider: &Arc<dyn KeyProvider>) -> Result<RootKeyId> {
        let _update = self.update.lock();
        if self.gate.phase() != Phase::Open {
            return Err(StoreError::KeysLocked);
        }
        let ring = self.snapshot();
        let Some(c) = roots::recognise(&ring, provider)?.filter(|c| !c.wraps_only()) else {
            return Err(StoreError::WrongKey(format!("{} is none of them", roots::name_of(provider.as_ref()))));
        };
        let id = c.id;
        connect(&mut self.state.write().connected, c);
        Ok(id)
    }

    /// A copy of the keyring in force, if this program may change it.
    pub(super) fn to_change(&self) -> Result<Keyring> {
        if self.gate.phase() != Phase::Open {
            return Err(StoreError::KeysLocked);
        }
        let ring = self.snapshot();
        if ring.read_only() {
            return refuse("the store has features this program does not know: it may only be read; use a newer one");
        }
        Ok(ring)
    }

    /// The KEKs that are not destroyed.
    fn live(&self, ring: &Keyring) -> Result<Vec<Arc<KekHandle>>> {
        ring.keks.iter().filter(|k| k.state != KekState::Destroyed).map(|k| self.opened(k.id)).collect()
    }

    /// That root key `c` opens the store secret and all of `live`.
    fn everything<'a>(&'a self, c: &Connected, live: &'a [Arc<KekHandle>]) -> Vec<Proof<'a>> {
        let secret = (c.clone(), Object::Secret, self.secret.secret());
        std::iter::once(secret).chain(live.iter().map(|h| (c.clone(), Object::Kek(h.id()), h.key()))).collect()
    }

    /// The recovery keys of `ring`, which was verified, to wrap for them.
    fn recovery_keys(&self, ring: &Keyring) -> Result<Vec<Connected>> {
        let found = ring.roots.iter().filter_map(|r| roots::recovery_key(ring, r.id).transpose());
        Ok(found.collect::<roots::Outcome<_>>()?)
    }

    /// The root keys of the active KEK, all of them but recovery keys.
    fn roots_of_active(&self, ring: &Keyring) -> Result<Vec<Connected>> {
        let wraps = ring.active().into_iter().flat_map(|k| &k.wraps);
        let wanted: Vec<RootKeyId> = wraps.map(|w| w.root).filter(|id| !roots::is_recovery(ring, *id)).collect();
        let at_hand = || self.state.read().connected.clone();
        let mut connected = at_hand();
        if wanted.iter().any(|id| connected.iter().all(|c| c.id != *id)) {
            self.connect_spare(ring);
            connected = at_hand();
        }
        let find = |id: RootKeyId| match connected.iter().find(|c| c.id == id) {
            Some(c) => Ok(c.clone()),
            None => refuse(format!(
                "root key {} must wrap the new KEK too and is not at hand: give it, or name with --key every root key \
                 the new KEK shall have",
                ring.root(id).map_or("?", |r| r.uri.as_str())
            )),
        };
        wanted.into_iter().map(find).collect()
    }

    /// Finds out which root keys the providers not needed so far are. Returns those that did not answer, and why.
    pub(super) fn connect_spare(&self, ring: &Keyring) -> Vec<roots::PassedOver> {
        self.connect_some(ring, |_| true)
    }

    /// As [`Keys::connect_spare`], for those whose URI is `wanted`.
    pub(super) fn connect_some(&self, ring: &Keyring, wanted: impl Fn(&str) -> bool) -> Vec<roots::PassedOver> {
        let (spare, others) = std::mem::take(&mut self.state.write().spare)
            .into_iter()
            .partition(|p: &Arc<dyn KeyProvider>| wanted(&roots::name_of(p.as_ref())));
        self.state.write().spare = others;
        let mut silent = Vec::new();
        for p in spare {
            let found = roots::recognise(ring, &p);
            let mut s = self.state.write();
            match found {
                Ok(Some(c)) if !c.wraps_only() => connect(&mut s.connected, c),
                Ok(_) => {}
                Err(why) => {
                    tracing::warn!(root = roots::name_of(p.as_ref()), %why, "root key does not answer");
                    silent.push((roots::name_of(p.as_ref()), why));
                    s.spare.push(p);
                }
            }
        }
        silent
    }

    /// The root keys that `providers` are; those that are none yet are added to `ring` and returned in the second list
    /// as well.
    fn join(
        &self,
        ring: &mut Keyring,
        live: &[Arc<KekHandle>],
        providers: &[Arc<dyn KeyProvider>],
    ) -> Result<(Vec<Connected>, Vec<Connected>)> {
        let (mut all, mut added) = (Vec::new(), Vec::new());
        for p in providers {
            if let Some(c) = roots::recognise(ring, p)? {
                connect(&mut all, c);
                continue;
            }
            let c = Connected { id: RootKeyId::random(), provider: p.clone() };
            ring.roots.push(RootKeyRecord { id: c.id, uri: p.describe()?.uri });
            ring.secret.push(roots::wrap(&c, self.store, Object::Secret, self.secret.secret())?);
            for h in live {
                let w = roots::wrap(&c, self.store, Object::Kek(h.id()), h.key())?;
                ring.kek_mut(h.id()).ok_or(Damage::KekUnknown(h.id()))?.wraps.push(w);
            }
            all.push(c.clone());
            added.push(c);
        }
        Ok((all, added))
    }
}

pub(super) fn connect(connected: &mut Vec<Connected>, c: Connected) {
    if connected.iter().all(|x| x.id != c.id) {
        connected.push(c);
    }
}

fn state_of(ring: &Keyring, id: KekId) -> Result<KekState> {
    Ok(ring.kek(id).ok_or(Damage::KekUnknown(id))?.state)
}

/// Whether `id` may be destroyed at once, or was.
fn check_destroy(ring: &Keyring, id: KekId, confirmed: &Confirmation) -> Result<()> {
    may_destroy(ring, id)?;
    if state_of(ring, id)? == KekState::Destroyed {
        return Ok(());
    }
    ending::may_go_at_once(ring, id, confirmed)
}

/// Whether `id` is retired and proved unused, or destroyed already.
pub fn may_destroy(ring: &Keyring, id: KekId) -> Result<()> {
    let proved = ring.kek(id).is_some_and(|k| k.unused != 0);
    match state_of(ring, id)? {
        KekState::Destroyed => Ok(()),
        KekState::Retired if proved => Ok(()),
        KekState::Retired => refuse(format!("KEK {id} may still be needed: rotate to the end first")),
        KekState::Active | KekState::Pending => refuse(format!("KEK {id} is not retired: rotate to another one first")),
    }
}
