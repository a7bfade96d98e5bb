//! Root keys at work: which provider is which root key of a keyring, and opening what they wrapped.

use super::handle::{KekHandle, bounded};
use crate::crypto::kdf::{ct_eq, derive, label, mac};
use crate::crypto::secret::{Secret32, StoreSecret};
use crate::format::damage::Damage;
use crate::format::ids::{KekId, RootKeyId, StoreId};
use crate::format::keyring::{Decoded, KekKind, KekRecord, KekState, Keyring, Wrap};
use crate::kms::{KeyProvider, KeyPurpose, KmsError, WrapContext};
use crate::store::{Result, StoreError};
use std::collections::HashMap;
use std::sync::Arc;

/// Result of a provider.
pub type Outcome<T> = std::result::Result<T, KmsError>;

/// A root key of the keyring and the provider that has been seen to open with it.
#[derive(Clone)]
pub struct Connected {
    pub id: RootKeyId,
    pub provider: Arc<dyn KeyProvider>,
}

/// What a wrapped key in the keyring is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Object {
    Secret,
    Kek(KekId),
}

impl Object {
    /// The context its wraps are bound to.
    pub fn context(self, store: StoreId) -> WrapContext {
        let (purpose, object) = match self {
            Self::Secret => (KeyPurpose::StoreSecret, store.0),
            Self::Kek(id) => (KeyPurpose::Kek, id.0),
        };
        WrapContext { store: store.0, purpose, object, extra: Vec::new() }
    }

    /// Its wrap by `root` in `ring`.
    pub fn wrap_in(self, ring: &Keyring, root: RootKeyId) -> Option<&Wrap> {
        match self {
            Self::Secret => ring.secret.iter().find(|w| w.root == root),
            Self::Kek(id) => ring.kek(id).and_then(|k| k.wrap_by(root)),
        }
    }
}

/// What a provider is called, for people.
pub fn name_of(p: &dyn KeyProvider) -> String {
    p.describe().map_or_else(|e| format!("a root key ({e})"), |d| d.uri)
}

/// Wraps `key` as `object` of `store`.
pub fn wrap(c: &Connected, store: StoreId, object: Object, key: &Secret32) -> Result<Wrap> {
    let bytes = bounded(c.provider.wrap(key, &object.context(store))?)?;
    Ok(Wrap { root: c.id, bytes })
}

/// Holds the provider of `c` to it that it unwraps `object` of `ring` to `expected`.
///
/// # Errors
/// The provider's; [`KmsError::BadCiphertext`] if it returns another key or the keyring has no such wrap.
pub fn verify(ring: &Keyring, c: &Connected, object: Object, expected: &Secret32) -> Result<()> {
    let lies = |what: &str| {
        let root = name_of(c.provider.as_ref());
        StoreError::from(KmsError::BadCiphertext(format!("{root} {what}; the keyring was left as it was")))
    };
    let w = object.wrap_in(ring, c.id).ok_or_else(|| lies("has no wrap in what was read back"))?;
    let key = c.provider.unwrap(&w.bytes, &object.context(ring.store)).map_err(|e| match e {
        KmsError::BadCiphertext(e) => lies(&format!("does not unwrap what it has just wrapped ({e})")),
        other => other.into(),
    })?;
    if key.ct_eq(expected) { Ok(()) } else { Err(lies("unwraps to another key than it was given")) }
}

/// Finds out which root key of `ring` `provider` is by opening the store secret with it. Only wraps by root keys of
/// the same scheme are tried, those with the same URI first.
///
/// # Errors
/// Any of the provider's but `BadCiphertext`, which means "not this one".
pub fn identify(ring: &Keyring, provider: &Arc<dyn KeyProvider>) -> Outcome<Option<(Connected, Secret32)>> {
    let uri = provider.describe()?.uri;
    let scheme = |u: &str| u.split_once(':').map(|(s, _)| s.to_owned());
    let recorded = |w: &Wrap| ring.root(w.root).map(|r| r.uri.clone()).unwrap_or_default();
    let mut wraps: Vec<&Wrap> = ring.secret.iter().filter(|w| scheme(&recorded(w)) == scheme(&uri)).collect();
    wraps.sort_by_key(|w| recorded(w) != uri);
    for w in wraps {
        match provider.unwrap(&w.bytes, &Object::Secret.context(ring.store)) {
            Ok(key) => return Ok(Some((Connected { id: w.root, provider: provider.clone() }, key))),
            Err(KmsError::BadCiphertext(_)) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

/// MAC of a keyring's bytes under the store secret.
pub fn keyring_mac(secret: &StoreSecret, signed: &[u8]) -> [u8; 32] {
    mac(&derive(secret.secret(), label::KEYRING_MAC, b""), &[signed])
}

/// Whether `d` was written with `secret`.
pub fn is_authentic(secret: &StoreSecret, d: &Decoded) -> bool {
    ct_eq(&keyring_mac(secret, &d.signed), &d.mac)
}

/// Opens the store secret of `d` with the first provider that can, and verifies the keyring's MAC with it.
///
/// # Errors
/// [`Damage::KeyringMac`]; [`StoreError::WrongKey`] if every provider answered and none is a root key; else the first
/// error of a provider that could not answer.
pub fn unlock(d: &Decoded, providers: &[Arc<dyn KeyProvider>]) -> Result<(StoreSecret, Connected)> {
    let mut no_answer = None;
    for p in providers {
        match identify(&d.keyring, p) {
            Ok(Some((c, key))) => {
                let secret = StoreSecret::from_secret(key);
                return if is_authentic(&secret, d) { Ok((secret, c)) } else { Err(Damage::KeyringMac.into()) };
            }
            Ok(None) => {}
            Err(e) => no_answer = no_answer.or(Some(e)),
        }
    }
    match no_answer {
        Some(e) => Err(e.into()),
        None => {
            let tried: Vec<String> = providers.iter().map(|p| name_of(p.as_ref())).collect();
            let known: Vec<&str> = d.keyring.roots.iter().map(|r| r.uri.as_str()).collect();
            Err(StoreError::WrongKey(format!("tried {}; it was locked with {}", tried.join(", "), known.join(", "))))
        }
    }
}

/// KEKs by name, and why those that could not be opened could not.
#[derive(Default)]
pub struct Opened {
    pub handles: HashMap<KekId, Arc<KekHandle>>,
    pub unusable: HashMap<KekId, KmsError>,
}

/// Opens what can be opened of `ring`'s KEKs with `connected`.
pub fn open_keks(ring: &Keyring, connected: &[Connected]) -> Opened {
    let mut opened = Opened::default();
    for k in ring.keks.iter().filter(|k| k.state != KekState::Destroyed) {
        match open_kek(ring, k, connected) {
            Ok(h) => {
                h.set_may_wrap(k.state == KekState::Active);
                opened.handles.insert(k.id, Arc::new(h));
            }
            Err(e) => {
                opened.unusable.insert(k.id, e);
            }
        }
    }
    opened
}

fn open_kek(ring: &Keyring, k: &KekRecord, connected: &[Connected]) -> Outcome<KekHandle> {
    let uri = |id: RootKeyId| ring.root(id).map_or("an unknown root key", |r| r.uri.as_str());
    let mut why = KmsError::Config(format!(
        "KEK {} is wrapped by {}; give that root key",
        k.id,
        k.wraps.iter().map(|w| uri(w.root)).collect::<Vec<_>>().join(", ")
    ));
    // Kind external needs the one provider that wraps its DEKs, sealed any that wraps the KEK.
    for c in connected.iter().filter(|c| k.provider.is_none_or(|p| p == c.id)) {
        let Some(w) = k.wrap_by(c.id) else { continue };
        match c.provider.unwrap(&w.bytes, &Object::Kek(k.id).context(ring.store)) {
            Ok(key) if k.kind == KekKind::Sealed => return Ok(KekHandle::sealed(ring.store, k.id, key)),
            Ok(probe) => return Ok(KekHandle::external(ring.store, k.id, probe, c.provider.clone())),
            Err(e) => why = e,
        }
    }
    Err(why)
}
