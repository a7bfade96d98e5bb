//! One usable KEK.

use crate::crypto::aead::GcmSiv;
use crate::crypto::kdf::{derive, label};
use crate::crypto::secret::{Dek, Secret32};
use crate::format::damage::Damage;
use crate::format::ids::{FileId, KekId, StoreId};
use crate::format::keyring::KekKind;
use crate::kms::{KeyProvider, KeyPurpose, KmsError, WRAPPED_MAX, WrapContext};
use crate::store::{Result, StoreError};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Wrap suite 1: 60 bytes, AES-256-GCM-SIV under derive(KEK, KEK_WRAP, kek id).
pub const WRAP_SEALED: u16 = 1;
/// Wrap suite 2: the provider's own bytes.
pub const WRAP_EXTERNAL: u16 = 2;

enum Wrapper {
    /// derive(KEK, KEK_WRAP, kek id).
    Sealed(Secret32),
    External(Arc<dyn KeyProvider>),
}

/// One usable KEK. Unwraps in any state; wraps only while it is the active one.
pub struct KekHandle {
    id: KekId,
    store: StoreId,
    /// Kind sealed: the KEK. Kind external: the random key that its provider was proved with.
    key: Secret32,
    wrapper: Wrapper,
    may_wrap: AtomicBool,
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
        Self { id, store, key, wrapper, may_wrap: AtomicBool::new(false) }
    }

    /// An external KEK, not allowed to wrap yet.
    pub(super) fn external(store: StoreId, id: KekId, probe: Secret32, provider: Arc<dyn KeyProvider>) -> Self {
        Self { id, store, key: probe, wrapper: Wrapper::External(provider), may_wrap: AtomicBool::new(false) }
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
            Wrapper::Sealed(_) => KekKind::Sealed,
            Wrapper::External(_) => KekKind::External,
        }
    }

    /// The number of its wraps' layout, for the slot: [`WRAP_SEALED`] or [`WRAP_EXTERNAL`].
    pub fn wrap_suite(&self) -> u16 {
        match self.wrapper {
            Wrapper::Sealed(_) => WRAP_SEALED,
            Wrapper::External(_) => WRAP_EXTERNAL,
        }
    }

    fn context(&self, aad: &[u8], file: FileId) -> WrapContext {
        WrapContext { store: self.store.0, purpose: KeyPurpose::Dek, object: file.0, extra: aad.to_vec() }
    }

    /// Wraps `dek`, bound to `aad` (and for kind external to store and file too): 1 to 640 bytes.
    ///
    /// # Errors
    /// [`StoreError::KeyState`] if this KEK is not the active one (any more); the provider's for kind external.
    pub fn wrap(&self, aad: &[u8], file: FileId, dek: &Dek) -> Result<Vec<u8>> {
        if !self.may_wrap.load(Ordering::SeqCst) {
            return Err(StoreError::KeyState(format!(
                "KEK {} is not active: nothing may be wrapped under it",
                self.id
            )));
        }
        match &self.wrapper {
            Wrapper::Sealed(k) => Ok(GcmSiv::wrap(k, aad, dek.secret()).to_vec()),
            Wrapper::External(p) => bounded(p.wrap(dek.secret(), &self.context(aad, file))?).map_err(Into::into),
        }
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
            Wrapper::External(p) => match p.unwrap(wrapped, &self.context(aad, file)) {
                Ok(k) => Ok(Dek::from_secret(k)),
                Err(KmsError::BadCiphertext(_)) => Err(auth.into()),
                Err(e) => Err(e.into()),
            },
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
