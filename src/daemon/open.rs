//! Opening a store from its backing directory: which root keys to try, and in which order.

use super::fault::{Fault, FaultKind, plain};
use super::lazy_key::LazyKey;
use crate::backing::posix::Posix;
use crate::format::keyring::Keyring;
use crate::kms::recovery::{RecoveryKey, is_recovery};
use crate::kms::{ConnectOptions, KeyProvider, RootKeyUri, Scheme, guard};
use crate::store::keys::Keys;
use std::path::Path;
use std::sync::Arc;

/// Opens the backing directory.
///
/// # Errors
/// [`FaultKind::NotAStore`] if there is no such directory; the kernel's.
pub fn backing(path: &Path) -> Result<Posix, Fault> {
    Posix::open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
            Fault::new(FaultKind::NotAStore, format!("{} is not an envelopefs store: {}", path.display(), plain(&e)))
        }
        _ => Fault::io("open", path, &e),
    })
}

/// The public part of the keyring.
///
/// # Errors
/// As [`Keys::read_keyring`].
pub fn keyring(b: &Posix) -> Result<Keyring, Fault> {
    Keys::read_keyring(b).map_err(|e| Fault::store(b.path(), &e))
}

/// The recovery key if one is to be used, and then the root keys given, or else those the keyring records, in order.
/// None is connected to yet but the recovery key, which is asked for here. Without being asked for it is never used to
/// open a store.
///
/// # Errors
/// [`FaultKind::RootKey`] if a URI is no use, or there is no recovery key to be had; [`FaultKind::WrongKey`] if it is not
/// one of the store's.
pub fn root_keys(given: &[String], ring: &Keyring, o: &ConnectOptions) -> Result<Vec<Arc<dyn KeyProvider>>, Fault> {
    let unusable = |e: crate::kms::KmsError| Fault::new(FaultKind::RootKey, e.to_string());
    let uris: Vec<RootKeyUri> = if given.is_empty() {
        ring.roots.iter().map(|r| RootKeyUri::recorded(&r.uri)).collect::<Result<_, _>>().map_err(unusable)?
    } else {
        parse(given)?
    };
    let others = uris.into_iter().filter(|u| u.scheme() != Scheme::Recovery);
    let mut roots: Vec<Arc<dyn KeyProvider>> = recovery_key(ring, o)?.into_iter().collect();
    roots.extend(others.map(|u| Arc::new(LazyKey::new(u, o.clone())) as Arc<dyn KeyProvider>));
    Ok(roots)
}

/// The recovery key, if `o` says where it comes from.
fn recovery_key(ring: &Keyring, o: &ConnectOptions) -> Result<Option<Arc<dyn KeyProvider>>, Fault> {
    let Some(source) = &o.recovery else { return Ok(None) };
    if !ring.roots.iter().any(|r| is_recovery(&r.uri)) {
        return Err(Fault::new(FaultKind::RootKey, "this store has no recovery key"));
    }
    let key = RecoveryKey::enter(source).map_err(|e| Fault::kms("recovery:", &e))?;
    // Only a hint at this point: what the keyring says is believed once the key has opened it.
    if !ring.roots.iter().any(|r| r.uri == key.uri().to_string()) {
        return Err(Fault::new(FaultKind::WrongKey, "the recovery key is well-formed, but not this store's"));
    }
    let uri = key.uri().clone();
    // Its use is told and counted like any other root key's.
    Ok(Some(guard::around(Arc::new(key), &uri, o)))
}

/// Root key URIs given by the user. A recovery key is never named: it is made by `key add` or `init`, and entered.
///
/// # Errors
/// [`FaultKind::Usage`] that says what is wrong with one.
pub fn parse(given: &[String]) -> Result<Vec<RootKeyUri>, Fault> {
    let usage = |e: crate::kms::KmsError| Fault::new(FaultKind::Usage, e.to_string());
    let uris: Vec<RootKeyUri> = given.iter().map(|u| RootKeyUri::parse(u).map_err(usage)).collect::<Result<_, _>>()?;
    if uris.iter().any(|u| u.scheme() == Scheme::Recovery) {
        let text = "a recovery key cannot be named here: init --recovery-key or key add STORE recovery: makes one, and \
                    --recovery opens the store with it";
        return Err(Fault::new(FaultKind::Usage, text));
    }
    Ok(uris)
}

/// Opens the keyring with `given` root keys, or those it records.
///
/// # Errors
/// As [`root_keys`] and [`Keys::open`].
pub fn keys(b: &Posix, given: &[String], o: &ConnectOptions) -> Result<Keys, Fault> {
    let ring = keyring(b)?;
    let roots = root_keys(given, &ring, o)?;
    Keys::open(b, &roots).map_err(|e| {
        let f = Fault::store(b.path(), &e);
        let about_keys = [FaultKind::WrongKey, FaultKind::Unreachable, FaultKind::Denied, FaultKind::RootKey];
        let way_in = o.recovery.is_none() && ring.roots.iter().any(|r| is_recovery(&r.uri));
        match way_in && about_keys.contains(&f.kind) {
            true => Fault::new(f.kind, format!("{}; the recovery key opens it too, with --recovery", f.message)),
            false => f,
        }
    })
}

/// What whoever opened a store should know about how it was opened.
pub fn warnings(keys: &Keys, o: &ConnectOptions) -> Vec<String> {
    let passed_over = keys
        .passed_over()
        .iter()
        .map(|(uri, why)| format!("the store was opened without its root key {uri}: {}", Fault::kms(uri, why).message));
    let used = o.recovery.as_ref().map(|_| {
        "the store was opened with its recovery key: replace that when other root keys work again (key remove, then key \
         add recovery:)"
            .to_owned()
    });
    used.into_iter().chain(passed_over).chain(keys.copy_left()).collect()
}
