//! The opened keyring: KEKs and the store secret in memory, and every change of it on disk.
//!
//! A change is made to a copy of the keyring, written over both copies on disk (see [`disk`]), and taken over in memory
//! as soon as it is in force there (see [`commit`]): an error leaves the previous keyring in force. What a root key has just wrapped is trusted only after it
//! was read back from disk and unwrapped by an independent call to the same value. No error of a provider changes
//! anything.
//!
//! The caller holds the store's lock: one process at a time changes a keyring. Others may share a store that they only
//! read, and take over what it has changed (see [`renew`]).

pub mod authority;
mod change;
mod commit;
mod disk;
mod ending;
mod floor;
mod gate;
mod handle;
mod lock;
mod observe;
mod quorum;
mod ready;
mod refresh;
mod renew;
mod roots;
#[cfg(test)]
mod tests;
mod transfer;

pub use crate::format::keyring::{KekKind, KekState};
pub use change::may_destroy;
pub use disk::{BadCopy, COPIES, FOLDER};
pub use ending::{Ending, WAIT_MAX};
pub use gate::{KeyStanding, KeyState, LockedBy, Phase};
pub use handle::{KekHandle, WRAP_EXTERNAL, WRAP_SEALED};
pub use observe::Watch;
pub use quorum::Confirmation;
pub(in crate::store) use ready::Making;
pub use ready::{DekPool, PoolStats, Ready};
pub use refresh::RefreshedRoot;
pub use roots::PassedOver;
pub use transfer::{Exported, Imported, kept};

use crate::backing::Backing;
use crate::crypto::secret::{Secret32, StoreSecret};
use crate::format::codec::Malformed;
use crate::format::damage::Damage;
use crate::format::ids::{KekId, RootKeyId, StoreId};
use crate::format::keyring::{INCOMPAT_PLAINTEXT_NAMES, KekRecord, Keyring, RootKeyRecord};
use crate::format::lifecycle::LifeCycle;
use crate::kms::event::Observer;
use crate::kms::{KeyProvider, recovery};
use crate::store::{Result, StoreError};
use commit::Left;
use gate::Gate;
use parking_lot::{Mutex, RwLock};
use roots::{Connected, Object, Opened};
use std::collections::HashSet;
use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

/// What a store is made with and keeps for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreFlags {
    /// File names are stored in clear.
    pub plaintext_names: bool,
}

struct State {
    ring: Keyring,
    opened: Opened,
    connected: Vec<Connected>,
    /// Providers that were given and have not been needed yet.
    spare: Vec<Arc<dyn KeyProvider>>,
}

/// The opened keyring. Every method can be called from any thread.
pub struct Keys {
    store: StoreId,
    flags: StoreFlags,
    secret: StoreSecret,
    /// Held shared while something is being wrapped, exclusively while another KEK is made the active one.
    active: RwLock<Arc<KekHandle>>,
    state: RwLock<State>,
    /// Held through every change of the keyring on disk.
    update: Mutex<()>,
    /// Held through a refresh.
    refreshing: Mutex<()>,
    /// Held while it is looked whether somebody else has changed the keyring. Taken before `update`, never after.
    renewal: Mutex<renew::Renewal>,
    /// KEKs that are to be destroyed and under which a file was opened since. Taken after `state`, never before.
    uses: Mutex<HashSet<KekId>>,
    gate: Arc<Gate>,
    /// A copy on disk that is not the keyring in force, as far as is known.
    left: Mutex<Option<Left>>,
    /// The highest generation that may lie on disk although it is not in force here; 0: none.
    not_taken_back: AtomicU64,
    damaged: Vec<BadCopy>,
    passed_over: Vec<PassedOver>,
    /// Who is told what becomes of keys.
    observer: OnceLock<Arc<dyn Observer>>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys(store {}, redacted)", self.store)
    }
}

/// One thing that must unwrap from what was read back before it is trusted.
type Proof<'a> = (Connected, Object, &'a Secret32);

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn refuse<T>(why: impl Into<String>) -> Result<T> {
    Err(StoreError::KeyState(why.into()))
}

fn encode(ring: &Keyring, secret: &StoreSecret) -> Result<Vec<u8>> {
    ring.encode(|signed| roots::keyring_mac(secret, signed)).map_err(|Malformed| {
        StoreError::KeyState("the keyring is full: too many root keys or KEKs, or too long a URI".into())
    })
}

/// What was read back must be a whole keyring, and every proof must hold.
fn prove(back: &[u8], proofs: &[Proof<'_>]) -> Result<()> {
    let ring = Keyring::decode(back)?.keyring;
    proofs.iter().try_for_each(|(c, object, key)| roots::verify(&ring, c, *object, key))
}

fn pending(kind: KekKind, provider: Option<RootKeyId>) -> KekRecord {
    KekRecord {
        id: KekId::random(),
        kind,
        state: KekState::Pending,
        created: now(),
        activated: 0,
        retired: 0,
        unused: 0,
        destroyed: 0,
        provider,
        wraps: Vec::new(),
    }
}

fn new_handle(store: StoreId, record: &KekRecord, key: Secret32, targets: &[Connected]) -> Result<KekHandle> {
    match (record.kind, record.provider) {
        (KekKind::Sealed, _) => Ok(KekHandle::sealed(store, record.id, key)),
        (KekKind::External, id) => match targets.iter().find(|c| Some(c.id) == id) {
            Some(c) => Ok(KekHandle::external(store, record.id, key, c.provider.clone())),
            None => refuse("an external KEK needs its root key"),
        },
    }
}

const RECOVERY_OR_EXTERNAL: &str = "a recovery key does not open files under an external KEK: have one or the other (rotate \
                                    to a sealed KEK, or remove the recovery key)";

/// A recovery key promises that it opens the store, and an external KEK is the one root key that wraps its DEKs.
fn refuse_recovery_beside_external(ring: &Keyring) -> Result<()> {
    let external = |k: &KekRecord| k.kind == KekKind::External && (k.is_needed() || k.state == KekState::Pending);
    match ring.keks.iter().any(external) && ring.roots.iter().any(|r| recovery::is_recovery(&r.uri)) {
        true => refuse(RECOVERY_OR_EXTERNAL),
        false => Ok(()),
    }
}

impl Keys {
    /// Makes a new keyring with one active KEK, in `.envelopefs/`, which is made if it is not there. Returns after
    /// both copies are durable and every root key has unwrapped from them what it wrapped. The first of `root` is
    /// the one that wraps DEKs if `kind` is external.
    ///
    /// # Errors
    /// [`StoreError::KeyState`] if there is no root key, none but recovery keys, or a recovery key and an external KEK;
    /// [`StoreError::NotEmptyForInit`] if there is a keyring, whole or not; a provider's or the backing directory's.
    pub fn create<B: Backing>(b: &B, root: &[Arc<dyn KeyProvider>], kind: KekKind, flags: StoreFlags) -> Result<Self> {
        let is_recovery = |p: &Arc<dyn KeyProvider>| recovery::is_recovery(&roots::name_of(p.as_ref()));
        if root.iter().all(is_recovery) {
            return refuse("a store needs a root key; a recovery key besides it is asked for only when that one fails");
        }
        if kind == KekKind::External && root.iter().any(is_recovery) {
            return refuse(RECOVERY_OR_EXTERNAL);
        }
        let folder = make_folder(b)?;
        if disk::load(b, &folder).iter().any(|f| !matches!(f, disk::Found::Absent)) {
            return Err(StoreError::NotEmptyForInit("there is a keyring already: this is a store".into()));
        }
        let (store, secret) = (StoreId::random(), StoreSecret::random());
        let targets: Vec<Connected> =
            root.iter().map(|p| Connected { id: RootKeyId::random(), provider: p.clone() }).collect();
        let first = targets.first().map(|c| c.id).filter(|_| kind == KekKind::External);
        let mut kek = pending(kind, first);
        (kek.state, kek.activated) = (KekState::Active, kek.created);
        let id = kek.id;
        let handle = new_handle(store, &kek, Secret32::random(), &targets)?;
        let mut ring = Keyring {
            store,
            generation: 1,
            incompat: if flags.plaintext_names { INCOMPAT_PLAINTEXT_NAMES } else { 0 },
            ro_compat: 0,
            roots: Vec::new(),
            secret: Vec::new(),
            keks: Vec::new(),
            life: LifeCycle::default(),
        };
        for c in &targets {
            ring.roots.push(RootKeyRecord { id: c.id, uri: c.provider.describe()?.uri });
            ring.secret.push(roots::wrap(c, store, Object::Secret, secret.secret())?);
            kek.wraps.push(roots::wrap(c, store, Object::Kek(id), handle.key())?);
        }
        ring.keks.push(kek);
        let bytes = encode(&ring, &secret)?;
        let proofs: Vec<Proof<'_>> = targets
            .iter()
            .flat_map(|c| [(c.clone(), Object::Secret, secret.secret()), (c.clone(), Object::Kek(id), handle.key())])
            .collect();
        for name in COPIES {
            disk::replace(b, &folder, name, &bytes, |back| prove(back, &proofs))?;
        }
        drop(proofs);
        handle.set_may_wrap(true);
        let mut opened = Opened::default();
        opened.handles.insert(id, Arc::new(handle));
        // One that only wraps can be made again from the keyring when it is needed.
        let targets = targets.into_iter().filter(|c| !c.wraps_only()).collect();
        Self::build(ring, secret, opened, targets, Vec::new())
    }

    /// Opens the keyring with the first of `root` that is one of its root keys; others are used where that one cannot
    /// help (a KEK it does not wrap, [`Keys::stage`]). The copy with the higher generation that is whole and
    /// authentic counts; [`Keys::damaged_copies`] tells of the other.
    ///
    /// # Errors
    /// [`StoreError::NotAStore`]; [`StoreError::WrongKey`] if every root key given answered and none is right, or is right
    /// for the older copy only: it was removed since; [`StoreError::Kms`] if one did not answer, or the active KEK does not open; [`Damage::KeyringUnreadable`],
    /// [`Damage::KeyringMac`], [`Damage::UnsupportedVersion`], [`Damage::UnsupportedFeature`].
    pub fn open<B: Backing>(b: &B, root: &[Arc<dyn KeyProvider>]) -> Result<Self> {
        let found = disk::load(b, &disk::folder(b)?);
        let generations = found.each_ref().map(disk::Found::generation);
        let (candidates, mut damaged) = disk::candidates(found)?;
        let (mut first_error, mut newer) = (None, Vec::new());
        for d in candidates {
            match roots::unlock(&d, root) {
                // The newer copy is genuine, and these root keys are none of its any more, or do not open it now.
                Ok((secret, ..)) if newer.iter().any(|n| roots::is_authentic(&secret, n)) => break,
                Ok((secret, c, passed_over)) => {
                    report(&damaged);
                    // One with a higher generation is not genuine. Whoever put it there may want to know why first.
                    let is_old = |g: Option<u64>| g.is_none_or(|g| g < d.keyring.generation);
                    let old = COPIES.into_iter().zip(generations).find(|(_, g)| is_old(*g));
                    let left = Mutex::new(old.map(|(copy, _)| Left::new(copy, commit::OLD)));
                    let keys = Self::open_with(d.keyring, secret, c, root)?;
                    return Ok(Self { damaged, passed_over, left, ..keys });
                }
                Err(StoreError::Damage(e)) => {
                    damaged.push(("a keyring copy", e.clone()));
                    first_error = first_error.or(Some(StoreError::Damage(e)));
                }
                // Whether that copy is genuine, the other one's store secret tells: if that is opened at all.
                Err(e @ (StoreError::WrongKey(_) | StoreError::Kms(_))) => {
                    first_error = first_error.or(Some(e));
                    newer.push(d);
                }
                Err(e) => return Err(e),
            }
        }
        Err(first_error.unwrap_or(StoreError::Damage(Damage::KeyringUnreadable)))
    }

    fn open_with(ring: Keyring, secret: StoreSecret, first: Connected, root: &[Arc<dyn KeyProvider>]) -> Result<Self> {
        let (connected, opened, spare) = connect_all(&ring, first, root);
        Self::build(ring, secret, opened, connected, spare)
    }

    fn build(
        ring: Keyring,
        secret: StoreSecret,
        opened: Opened,
        connected: Vec<Connected>,
        spare: Vec<Arc<dyn KeyProvider>>,
    ) -> Result<Self> {
        let active = ring.active().map(|k| k.id).ok_or(Damage::KeyringUnreadable)?;
        let Some(handle) = opened.handles.get(&active).cloned() else {
            let why = opened.unusable.get(&active).cloned();
            return Err(why.map_or(StoreError::Damage(Damage::KekUnknown(active)), StoreError::Kms));
        };
        let gate = Arc::new(Gate::new());
        gate.activated(handle.kind());
        opened.handles.values().for_each(|h| h.report_to(&gate));
        Ok(Self {
            store: ring.store,
            flags: StoreFlags { plaintext_names: ring.plaintext_names() },
            secret,
            active: RwLock::new(handle),
            state: RwLock::new(State { ring, opened, connected, spare }),
            update: Mutex::new(()),
            refreshing: Mutex::new(()),
            renewal: Mutex::default(),
            uses: Mutex::default(),
            gate,
            left: Mutex::default(),
            not_taken_back: AtomicU64::default(),
            damaged: Vec::new(),
            passed_over: Vec::new(),
            observer: OnceLock::new(),
        })
    }

    /// The keyring as it lies on disk: root key URIs, KEKs, states and times. Needs no key, and so is not verified:
    /// good for finding out which root key to ask for, and for reports.
    ///
    /// # Errors
    /// [`StoreError::NotAStore`] if there is none; as [`Keys::open`] for damage.
    pub fn read_keyring<B: Backing>(b: &B) -> Result<Keyring> {
        let (candidates, damaged) = disk::candidates(disk::load(b, &disk::folder(b)?))?;
        report(&damaged);
        let first = candidates.into_iter().next().ok_or(Damage::KeyringUnreadable)?;
        Ok(first.keyring)
    }

    /// What an update that was cut short left in the other copy, if it did. Like [`Keys::read_keyring`] not verified.
    pub fn read_older_copy<B: Backing>(b: &B) -> Option<Keyring> {
        let (candidates, _) = disk::candidates(disk::load(b, &disk::folder(b).ok()?)).ok()?;
        candidates.into_iter().nth(1).map(|d| d.keyring)
    }

    /// The store's id.
    pub fn store_id(&self) -> StoreId {
        self.store
    }

    /// What the store was made with.
    pub fn flags(&self) -> StoreFlags {
        self.flags
    }

    /// The parent of the keys for names, directory ids, symlinks and extended attributes.
    pub fn secret(&self) -> &StoreSecret {
        &self.secret
    }

    /// The keyring as it is in force now.
    pub fn snapshot(&self) -> Keyring {
        self.state.read().ring.clone()
    }

    /// Copies of the keyring that were missing, damaged or not authentic when this was opened.
    /// [`Keys::repair_copies`] or the next change of the keyring replaces them; [`Keys::mend_copies`] all but those that
    /// are not authentic.
    pub fn damaged_copies(&self) -> &[BadCopy] {
        &self.damaged
    }

    /// The root keys that were tried before the one that opened the keyring, in order, and why each did not.
    pub fn passed_over(&self) -> &[PassedOver] {
        &self.passed_over
    }

    /// Runs `f` with the active KEK. [`Keys::activate`] waits for `f`, so once it has returned no header under the old KEK
    /// is on its way to disk any more. `f` must not call this or `activate` again: that can wait for ever.
    pub fn with_active<R>(&self, f: impl FnOnce(&KekHandle) -> R) -> R {
        f(&self.active.read())
    }

    /// The active KEK, for a call to its service that keeps neither an activation nor a lock waiting. It may be retired or
    /// dropped meanwhile: what came of the call counts only under [`Keys::with_active`], if [`Keys::is_active`] still.
    /// A lock ends when nobody holds it any more, so whoever does drops what the call gave before he lets go of it.
    pub(in crate::store) fn active_kek(&self) -> Arc<KekHandle> {
        Arc::clone(&self.active.read())
    }

    /// Whether `kek` is the active one, and there.
    pub(in crate::store) fn is_active(&self, kek: &KekHandle) -> bool {
        self.with_active(|active| active.id() == kek.id() && !active.is_gone())
    }

    /// Keys for files to come.
    pub fn pool(&self) -> &Arc<DekPool> {
        self.gate.pool()
    }

    /// Whether keys for files to come may be made now: while a service wraps them that answers and refuses nothing.
    pub(in crate::store) fn may_make_ready(&self) -> bool {
        let a_service_wraps = self.gate.wraps_outside() && self.gate.calls_a_service();
        a_service_wraps && self.gate.may_create().is_ok() && self.permit().is_ok() && !self.service_refuses()
    }

    /// Whether keys may be unwrapped ahead of need now: while the service answers and refuses nothing.
    pub(in crate::store) fn may_fetch(&self) -> bool {
        self.gate.may_call() && self.permit().is_ok() && !self.service_refuses()
    }

    /// Takes an entry of the pool under `kek`, which the caller holds as the active one: `had`, which was taken before,
    /// or another one. None while the service refuses, even if only one file so far; but for an entry that it made for
    /// this very file just now.
    pub(in crate::store) fn take_ready(&self, kek: &KekHandle, had: Option<Ready>) -> Option<Ready> {
        if kek.kind() != KekKind::External {
            return None;
        }
        let had = had.filter(|r| r.slot.kek == kek.id());
        if had.as_ref().is_some_and(|r| r.own) {
            return had;
        }
        if self.service_refuses() {
            return None;
        }
        had.or_else(|| self.pool().take(kek.id()))
    }

    /// Whether a file that had `r` put by would get it as its key now.
    pub(in crate::store) fn is_ready(&self, r: &Ready) -> bool {
        self.with_active(|kek| self.may_keep(kek, r))
    }

    /// Whether `r` is under `kek`, which the caller holds as the active one, and the service refuses nothing.
    fn may_keep(&self, kek: &KekHandle, r: &Ready) -> bool {
        r.slot.kek == kek.id() && !kek.is_gone() && !self.service_refuses()
    }

    /// Puts in an entry under `kek`, which the caller holds as the active one. It is dropped if it is under another one.
    pub(in crate::store) fn put_ready(&self, kek: &KekHandle, r: Ready) {
        if self.may_keep(kek, &r) {
            self.pool().put(r);
        }
    }

    /// Puts back an entry that was taken and not used. A refusal has emptied the pool, and is not got around so. What was
    /// made for one file is dropped: it was told of as that file's.
    pub(in crate::store) fn put_back_ready(&self, r: Ready) {
        self.with_active(|kek| {
            if !r.own && self.may_keep(kek, &r) {
                self.pool().put_back(r);
            }
        });
    }

    /// Whether the service has said no since it last said yes, to a refresh or to a call for one file.
    fn service_refuses(&self) -> bool {
        self.is_refused() || self.gate.was_refused()
    }

    /// The KEK `id`, active or retired, to open files with.
    ///
    /// # Errors
    /// As [`Keys::kek_to_move`]; [`Damage::KekBelowFloor`].
    pub fn kek(&self, id: KekId) -> Result<Arc<KekHandle>> {
        let kek = self.kek_to_move(id)?;
        self.above_floor(id)?;
        Ok(kek)
    }

    /// The KEK `id`, active or retired, to unwrap with, wherever the floor is: for moving headers and for looking at them.
    ///
    /// # Errors
    /// As [`Keys::may_open`]; [`Damage::KekUnknown`], [`Damage::KekDestroyed`]; [`StoreError::KeyState`] if it is pending: nothing was
    /// wrapped under it; [`StoreError::Kms`] if no root key at hand opened it.
    pub fn kek_to_move(&self, id: KekId) -> Result<Arc<KekHandle>> {
        self.gate.may_open()?;
        let found = self.state.read().ring.kek(id).map(|k| (k.state, k.destroyed));
        match found {
            None => Err(Damage::KekUnknown(id).into()),
            Some((KekState::Destroyed, at)) => Err(Damage::KekDestroyed(id, at).into()),
            Some((KekState::Pending, _)) => refuse(format!("KEK {id} is pending: nothing was wrapped under it")),
            Some((KekState::Active | KekState::Retired, _)) => self.opened(id),
        }
    }

    /// Whether `id` is a retired KEK that a scan proved unused: a header that names it is older than the scan.
    pub fn is_unused(&self, id: KekId) -> bool {
        // Not by the active KEK: an activation holds that while it writes to disk, and every open asks this.
        self.state.read().ring.kek(id).is_some_and(|k| k.state == KekState::Retired && k.unused != 0)
    }

    /// The KEK `id` if it was opened, whatever its state.
    fn opened(&self, id: KekId) -> Result<Arc<KekHandle>> {
        let s = self.state.read();
        match (s.opened.handles.get(&id), s.opened.unusable.get(&id)) {
            (Some(h), _) => Ok(h.clone()),
            (None, Some(why)) => Err(why.clone().into()),
            (None, None) => Err(Damage::KekUnknown(id).into()),
        }
    }
}

/// Opens the KEKs of `ring` with the root key `first`, and with the others of `root` what that one does not open. Returns
/// the root keys that were needed, the KEKs, and the providers that were not needed.
fn connect_all(
    ring: &Keyring,
    first: Connected,
    root: &[Arc<dyn KeyProvider>],
) -> (Vec<Connected>, Opened, Vec<Arc<dyn KeyProvider>>) {
    let mut spare: Vec<_> = root.iter().filter(|p| !Arc::ptr_eq(p, &first.provider)).cloned().collect();
    let mut connected = vec![first];
    let mut opened = roots::open_keks(ring, &connected, |_| true);
    if !opened.unusable.is_empty() && !spare.is_empty() {
        for p in std::mem::take(&mut spare) {
            match roots::recognise(ring, &p) {
                Ok(Some(c)) if !c.wraps_only() => connected.push(c),
                Ok(_) => {}
                Err(_) => spare.push(p),
            }
        }
        opened = roots::open_keks(ring, &connected, |_| true);
    }
    for (id, why) in &opened.unusable {
        tracing::warn!(kek = %id, %why, "KEK cannot be used");
    }
    (connected, opened, spare)
}

fn report(damaged: &[BadCopy]) {
    for (copy, damage) in damaged {
        tracing::warn!(copy, code = damage.code(), "keyring copy cannot be used; the other one is");
    }
}

fn make_folder<B: Backing>(b: &B) -> Result<B::Node> {
    let root = b.root()?;
    match b.mkdir(&root, FOLDER, 0o700, 0) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e.into()),
        _ => {}
    }
    let folder = b.lookup(&root, FOLDER)?;
    b.sync_dir(&root)?;
    Ok(folder)
}
