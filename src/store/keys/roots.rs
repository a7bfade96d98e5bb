//! Root keys at work: which provider is which root key of a keyring, and opening what they wrapped.

use super::handle::{KekHandle, bounded};
use crate::crypto::kdf::{ct_eq, derive, label, mac};
use crate::crypto::secret::{Secret32, StoreSecret};
use crate::format::damage::Damage;
use crate::format::ids::{KekId, RootKeyId, StoreId};
use crate::format::keyring::{Decoded, KekKind, KekRecord, KekState, Keyring, Wrap};
use crate::kms::recovery::{self, RecoveryKey};
use crate::kms::{KeyProvider, KeyPurpose, KmsError, RootKeyUri, WrapContext};
use crate::store::{Result, StoreError};
use std::collections::HashMap;
use std::sync::Arc;

/// Result of a provider.
pub type Outcome<T> = std::result::Result<T, KmsError>;

/// A root key of the keyring and the provider that has been seen to open with it, or one that wraps for it only.
#[derive(Clone)]
pub struct Connected {
    pub id: RootKeyId,
    pub provider: Arc<dyn KeyProvider>,
}

impl Connected {
    /// Whether its secret is not at hand, so that it cannot prove anything.
    pub fn wraps_only(&self) -> bool {
        wraps_only(self.provider.as_ref())
    }
}

fn wraps_only(p: &dyn KeyProvider) -> bool {
    p.describe().is_ok_and(|d| d.capabilities.wrap_only)
}

/// Whether root key `id` of `ring` is a recovery key.
pub fn is_recovery(ring: &Keyring, id: RootKeyId) -> bool {
    ring.root(id).is_some_and(|r| recovery::is_recovery(&r.uri))
}

/// The recovery key `id` of `ring`, to wrap for it; `None` if that root key is none. The URI must be known to be genuine:
/// `ring` is one that was verified.
///
/// # Errors
/// [`KmsError::Config`] if the URI is not one this program writes.
pub fn recovery_key(ring: &Keyring, id: RootKeyId) -> Outcome<Option<Connected>> {
    let Some(r) = ring.root(id).filter(|r| recovery::is_recovery(&r.uri)) else { return Ok(None) };
    let key = RecoveryKey::public(&RootKeyUri::recorded(&r.uri)?)?;
    Ok(Some(Connected { id, provider: Arc::new(key) }))
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

/// Holds the provider of `c` to it that it unwraps `object` of `ring` to `expected`. Of one that only wraps, no more can be
/// asked than that its wrap is there and has the right length.
///
/// # Errors
/// The provider's; [`KmsError::BadCiphertext`] if it returns another key or the keyring has no such wrap.
pub fn verify(ring: &Keyring, c: &Connected, object: Object, expected: &Secret32) -> Result<()> {
    let lies = |what: &str| {
        let root = name_of(c.provider.as_ref());
        StoreError::from(KmsError::BadCiphertext(format!("{root} {what}; the keyring was left as it was")))
    };
    let w = object.wrap_in(ring, c.id).ok_or_else(|| lies("has no wrap in what was read back"))?;
    if c.wraps_only() {
        let whole = w.bytes.len() == recovery::WRAPPED_LEN;
        return if whole { Ok(()) } else { Err(lies("has a wrap of the wrong length in what was read back")) };
    }
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
/// Any of the provider's but `BadCiphertext`, which means "not this one", as does `NotFound` for what another URI's
/// root key has wrapped.
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
            Err(KmsError::NotFound(_)) if recorded(w) != uri => {}
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

/// As [`identify`]; a provider that only wraps is known by its URI.
///
/// # Errors
/// As [`identify`].
pub fn recognise(ring: &Keyring, provider: &Arc<dyn KeyProvider>) -> Outcome<Option<Connected>> {
    if !wraps_only(provider.as_ref()) {
        return Ok(identify(ring, provider)?.map(|(c, _)| c));
    }
    let uri = provider.describe()?.uri;
    let known = ring.roots.iter().find(|r| r.uri == uri);
    Ok(known.map(|r| Connected { id: r.id, provider: provider.clone() }))
}

/// MAC of a keyring's bytes under the store secret.
pub fn keyring_mac(secret: &StoreSecret, signed: &[u8]) -> [u8; 32] {
    mac(&derive(secret.secret(), label::KEYRING_MAC, b""), &[signed])
}

/// Whether `d` was written with `secret`.
pub fn is_authentic(secret: &StoreSecret, d: &Decoded) -> bool {
    ct_eq(&keyring_mac(secret, &d.signed), &d.mac)
}

/// A root key that was tried before the one that opened the store, and why it did not: for a warning.
pub type PassedOver = (String, KmsError);

/// Opens the store secret of `d` with the first provider that can, and verifies the keyring's MAC with it. Whatever one
/// provider answers, denial included, the next one is tried.
///
/// # Errors
/// [`Damage::KeyringMac`]; those of [`first_that_opens`].
pub fn unlock(d: &Decoded, providers: &[Arc<dyn KeyProvider>]) -> Result<(StoreSecret, Connected, Vec<PassedOver>)> {
    let (c, key, passed_over) = first_that_opens(&d.keyring, providers)?;
    let secret = StoreSecret::from_secret(key);
    if is_authentic(&secret, d) { Ok((secret, c, passed_over)) } else { Err(Damage::KeyringMac.into()) }
}

/// The first provider that opens the store secret of `ring`, what it opened to, and those that did not.
///
/// # Errors
/// [`StoreError::WrongKey`] if every provider answered and none is a root key; else the first error of a provider that
/// could not answer.
pub fn first_that_opens(
    ring: &Keyring,
    providers: &[Arc<dyn KeyProvider>],
) -> Result<(Connected, Secret32, Vec<PassedOver>)> {
    let (mut passed_over, mut no_answer) = (Vec::new(), None);
    for p in providers.iter().filter(|p| !wraps_only(p.as_ref())) {
        match identify(ring, p) {
            Ok(Some((c, key))) => return Ok((c, key, passed_over)),
            Ok(None) => {
                let why = KmsError::BadCiphertext("it is none of this store's".into());
                passed_over.push((name_of(p.as_ref()), why));
            }
            Err(e) => {
                passed_over.push((name_of(p.as_ref()), e.clone()));
                no_answer = no_answer.or(Some(e));
            }
        }
    }
    match no_answer {
        Some(e) => Err(e.into()),
        None => {
            let tried: Vec<String> = passed_over.into_iter().map(|(uri, _)| uri).collect();
            let known: Vec<&str> = ring.roots.iter().map(|r| r.uri.as_str()).collect();
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

/// Opens what can be opened of `ring`'s KEKs that are `wanted` with `connected`, the first before the next. A provider is asked once for
/// all that it may know: a store with a hundred retired KEKs must not cost a hundred calls.
pub fn open_keks(ring: &Keyring, connected: &[Connected], wanted: impl Fn(&KekRecord) -> bool) -> Opened {
    let mut opened = Opened::default();
    let mut left: Vec<&KekRecord> = ring.keks.iter().filter(|k| k.state != KekState::Destroyed && wanted(k)).collect();
    for c in connected {
        let (ask, others): (Vec<_>, Vec<_>) = left.into_iter().partition(|k| wrap_for(k, c).is_some());
        left = others;
        let contexts: Vec<WrapContext> = ask.iter().map(|k| Object::Kek(k.id).context(ring.store)).collect();
        let items: Vec<(&[u8], &WrapContext)> =
            ask.iter().filter_map(|k| wrap_for(k, c)).map(|w| w.bytes.as_slice()).zip(&contexts).collect();
        let mut answers = if items.is_empty() { Vec::new() } else { c.provider.unwrap_many(&items) }.into_iter();
        for k in ask {
            match answers.next().unwrap_or_else(|| Err(KmsError::Config("the provider left out a key".into()))) {
                Ok(key) => {
                    let h = match k.kind {
                        KekKind::Sealed => KekHandle::sealed(ring.store, k.id, key),
                        KekKind::External => KekHandle::external(ring.store, k.id, key, c.provider.clone()),
                    };
                    h.set_may_wrap(k.state == KekState::Active);
                    opened.unusable.remove(&k.id);
                    opened.handles.insert(k.id, Arc::new(h));
                }
                Err(e) => {
                    opened.unusable.insert(k.id, e);
                    left.push(k);
                }
            }
        }
    }
    for k in left {
        opened.unusable.entry(k.id).or_insert_with(|| nobody_asked(ring, k));
    }
    opened
}

/// The wrap that `c` can open `k` with. Kind external needs the one provider that wraps its DEKs, sealed any that
/// wraps the KEK.
fn wrap_for<'a>(k: &'a KekRecord, c: &Connected) -> Option<&'a Wrap> {
    k.wrap_by(c.id).filter(|_| k.provider.is_none_or(|p| p == c.id))
}

fn nobody_asked(ring: &Keyring, k: &KekRecord) -> KmsError {
    let uri = |id: RootKeyId| ring.root(id).map_or("an unknown root key", |r| r.uri.as_str());
    let by: Vec<&str> = k.wraps.iter().map(|w| uri(w.root)).collect();
    KmsError::Config(format!("KEK {} is wrapped by {}; give that root key", k.id, by.join(", ")))
}
