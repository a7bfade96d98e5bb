//! One usable KEK.

use super::gate::Gate;
use crate::crypto::aead::GcmSiv;
use crate::crypto::kdf::{derive, label};
use crate::crypto::secret::{Dek, Secret32};
use crate::format::damage::Damage;
use crate::format::ids::{FileId, KekId, StoreId};
use crate::format::keyring::KekKind;
use crate::kms::guard::lane::Background;
use crate::kms::{KeyProvider, KeyPurpose, KmsError, WRAPPED_MAX, WrapContext};
use crate::store::{Result, StoreError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Wrap suite 1: 60 bytes, AES-256-GCM-SIV under derive(KEK, KEK_WRAP, kek id).
pub const WRAP_SEALED: u16 = 1;
/// Wrap suite 2: the provider's own bytes.
pub const WRAP_EXTERNAL: u16 = 2;

enum Wrapper {
    /// derive(KEK, KEK_WRAP, kek id).
    Sealed(Secret32),
    External(Arc<dyn KeyProvider>),
    /// Dropped by a lock.
    Gone,
}

/// One usable KEK. Unwraps in any state; wraps only while it is the active one.
pub struct KekHandle {
    id: KekId,
    store: StoreId,
    /// Kind sealed: the KEK. Kind external: the random key that its provider was proved with.
    key: Secret32,
    wrapper: Wrapper,
    may_wrap: AtomicBool,
    /// The provider has refused to re-wrap.
    no_rewrap: AtomicBool,
    /// Kind external: who wants to know how its calls end.
    gate: OnceLock<Arc<Gate>>,
}

impl std::fmt::Debug for KekHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KekHandle({}, {:?}, redacted)", self.id, self.kind())
    }
}

impl KekHandle {
    /// A sealed KEK, not allowed to wrap yet.
    pub(super) fn sealed(store: StoreId, id: KekId, key: Secret32) -> Self {
        let wrapper = Wrapper::Sealed(derive(&key, label::KEK_WRAP, id.as_bytes()));
        Self {
            id,
            store,
            key,
            wrapper,
            may_wrap: AtomicBool::new(false),
            no_rewrap: AtomicBool::new(false),
            gate: OnceLock::new(),
        }
    }

    /// An external KEK, not allowed to wrap yet.
    pub(super) fn external(store: StoreId, id: KekId, probe: Secret32, provider: Arc<dyn KeyProvider>) -> Self {
        let wrapper = Wrapper::External(provider);
        Self {
            id,
            store,
            key: probe,
            wrapper,
            may_wrap: AtomicBool::new(false),
            no_rewrap: AtomicBool::new(false),
            gate: OnceLock::new(),
        }
    }

    /// What stands in the place of a KEK that a lock has dropped: its name, and no key.
    pub(super) fn gone(store: StoreId, id: KekId) -> Self {
        let key = Secret32::build(|_| {});
        Self {
            id,
            store,
            key,
            wrapper: Wrapper::Gone,
            may_wrap: AtomicBool::new(false),
            no_rewrap: AtomicBool::new(false),
            gate: OnceLock::new(),
        }
    }

    /// Whether a lock has dropped the key.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self.wrapper, Wrapper::Gone)
    }

    /// From now on `gate` hears how calls to the provider end while this is the active KEK.
    pub(super) fn report_to(&self, gate: &Arc<Gate>) {
        if let Wrapper::External(p) = &self.wrapper {
            let _ = self.gate.set(gate.clone());
            if p.describe().map_or(true, |d| d.capabilities.remote) {
                gate.has_a_service();
            }
        }
    }

    fn report<T>(&self, r: &std::result::Result<T, KmsError>) {
        // Only the active KEK's provider speaks for the store.
        if let Some(gate) = self.gate.get().filter(|_| self.may_wrap.load(Ordering::SeqCst)) {
            gate.called(r.as_ref().map(|_| ()));
        }
    }

    pub(super) fn set_may_wrap(&self, may: bool) {
        self.may_wrap.store(may, Ordering::SeqCst);
    }

    /// What the keyring holds wrapped for this KEK.
    pub(super) fn key(&self) -> &Secret32 {
        &self.key
    }

    /// Its name.
    pub fn id(&self) -> KekId {
        self.id
    }

    /// How it wraps.
    pub fn kind(&self) -> KekKind {
        match self.wrapper {
            Wrapper::Sealed(_) | Wrapper::Gone => KekKind::Sealed,
            Wrapper::External(_) => KekKind::External,
        }
    }

    /// The number of its wraps' layout, for the slot: [`WRAP_SEALED`] or [`WRAP_EXTERNAL`].
    pub fn wrap_suite(&self) -> u16 {
        match self.wrapper {
            Wrapper::Sealed(_) | Wrapper::Gone => WRAP_SEALED,
            Wrapper::External(_) => WRAP_EXTERNAL,
        }
    }

    /// As [`KeyProvider::leave`]; a KEK in this process always has it.
    ///
    /// # Errors
    /// How long to wait before asking again.
    pub fn leave(&self, whose: Background, calls: u32) -> std::result::Result<(), Duration> {
        match &self.wrapper {
            Wrapper::External(p) => p.leave(whose, calls),
            Wrapper::Sealed(_) | Wrapper::Gone => Ok(()),
        }
    }

    fn context(&self, aad: &[u8], file: FileId) -> WrapContext {
        WrapContext { store: self.store.0, purpose: KeyPurpose::Dek, object: file.0, extra: aad.to_vec() }
    }

    fn check_active(&self) -> Result<()> {
        if self.is_gone() {
            return Err(StoreError::KeysLocked);
        }
        if !self.may_wrap.load(Ordering::SeqCst) {
            return Err(StoreError::KeyState(format!(
                "KEK {} is not active: nothing may be wrapped under it",
                self.id
            )));
        }
        Ok(())
    }

    /// Wraps `dek`, bound to `aad` (and for kind external to store and file too): 1 to 640 bytes.
    ///
    /// # Errors
    /// [`StoreError::KeyState`] if this KEK is not the active one (any more); the provider's for kind external.
    pub fn wrap(&self, aad: &[u8], file: FileId, dek: &Dek) -> Result<Vec<u8>> {
        self.check_active()?;
        match &self.wrapper {
            Wrapper::Sealed(k) => Ok(GcmSiv::wrap(k, aad, dek.secret()).to_vec()),
            Wrapper::External(p) => {
                let wrapped = p.wrap(dek.secret(), &self.context(aad, file));
                self.report(&wrapped);
                bounded(wrapped?).map_err(Into::into)
            }
            Wrapper::Gone => Err(StoreError::KeysLocked),
        }
    }

    /// Whether [`KekHandle::rewrap`] can move a wrap of `old` here: both are one key of a service that does so itself,
    /// from one context to another.
    pub fn rewraps(&self, old: &Self) -> bool {
        let (Wrapper::External(to), Wrapper::External(from)) = (&self.wrapper, &old.wrapper) else { return false };
        match (to.describe(), from.describe()) {
            (Ok(t), Ok(f)) => {
                t.uri == f.uri && t.capabilities.rewraps_contexts && !self.no_rewrap.load(Ordering::Relaxed)
            }
            _ => false,
        }
    }

    /// Has the service move a wrap by another KEK of the same key, which was bound to `from`, here, bound to `to`. The DEK
    /// does not come here. What comes back is not proved.
    ///
    /// # Errors
    /// As [`KekHandle::wrap`]; the provider's, also that it lets us wrap and unwrap but not re-wrap. That is logged, once,
    /// and [`KekHandle::rewraps`] says no from then on.
    pub fn rewrap(&self, from: &[u8], to: &[u8], file: FileId, wrapped: &[u8]) -> Result<Vec<u8>> {
        self.check_active()?;
        let Wrapper::External(p) = &self.wrapper else { return Err(KmsError::Config("no service".into()).into()) };
        let moved = p.rewrap(wrapped, &self.context(from, file), &self.context(to, file));
        match &moved {
            // A permission of its own, which says nothing of the others. Many calls may be under way: one of them tells.
            Err(e @ KmsError::Denied(_)) if !self.no_rewrap.swap(true, Ordering::Relaxed) => tracing::warn!(
                kek = %self.id,
                "the key service does not let us re-wrap; each header takes an unwrap and a wrap instead: {e}"
            ),
            Err(KmsError::Denied(_)) => {}
            r => self.report(r),
        }
        bounded(moved?).map_err(Into::into)
    }

    /// Reverses [`KekHandle::wrap`].
    ///
    /// # Errors
    /// [`Damage::WrapAuth`] if `wrapped` was not wrapped under this KEK with the same `aad` (and file); any other
    /// error of the provider for kind external.
    pub fn unwrap(&self, aad: &[u8], file: FileId, wrapped: &[u8]) -> Result<Dek> {
        let auth = Damage::WrapAuth(self.id);
        match &self.wrapper {
            Wrapper::Sealed(k) => GcmSiv::unwrap(k, aad, wrapped).map(Dek::from_secret).map_err(|_| auth.into()),
            Wrapper::External(p) => {
                let dek = p.unwrap(wrapped, &self.context(aad, file));
                self.report(&dek);
                match dek {
                    Ok(k) => Ok(Dek::from_secret(k)),
                    Err(KmsError::BadCiphertext(_)) => Err(auth.into()),
                    Err(e) => Err(e.into()),
                }
            }
            Wrapper::Gone => Err(StoreError::KeysLocked),
        }
    }
}

/// Holds a provider to its contract: 1 to [`WRAPPED_MAX`] bytes.
pub(super) fn bounded(wrapped: Vec<u8>) -> std::result::Result<Vec<u8>, KmsError> {
    match wrapped.len() {
        1..=WRAPPED_MAX => Ok(wrapped),
        n => Err(KmsError::Config(format!("the provider returned {n} wrapped bytes; 1 to {WRAPPED_MAX} are possible"))),
    }
}

#[cfg(test)]
impl KekHandle {
    /// The keys in here, each with every bit turned.
    pub(super) fn keys_for_tests(&self) -> Vec<[u8; 32]> {
        let turned = |k: &Secret32| k.expose().map(|b| !b);
        match &self.wrapper {
            Wrapper::Sealed(k) => vec![turned(&self.key), turned(k)],
            Wrapper::External(_) | Wrapper::Gone => vec![turned(&self.key)],
        }
    }
}
