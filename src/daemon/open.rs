//! Opening a store from its backing directory: which root keys to try, and in which order.

use super::fault::{Fault, FaultKind, plain};
use super::lazy_key::LazyKey;
use crate::backing::posix::Posix;
use crate::format::keyring::Keyring;
use crate::kms::{ConnectOptions, KeyProvider, RootKeyUri};
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

/// The root keys given, or else those the keyring records, in order; none is connected to yet.
///
/// # Errors
/// [`FaultKind::RootKey`] if a URI is no use.
pub fn root_keys(given: &[String], ring: &Keyring, o: &ConnectOptions) -> Result<Vec<Arc<dyn KeyProvider>>, Fault> {
    let unusable = |e: crate::kms::KmsError| Fault::new(FaultKind::RootKey, e.to_string());
    let uris: Vec<RootKeyUri> = if given.is_empty() {
        ring.roots.iter().map(|r| RootKeyUri::recorded(&r.uri)).collect::<Result<_, _>>().map_err(unusable)?
    } else {
        parse(given)?
    };
    Ok(uris.into_iter().map(|u| Arc::new(LazyKey::new(u, o.clone())) as Arc<dyn KeyProvider>).collect())
}

/// Root key URIs given by the user.
///
/// # Errors
/// [`FaultKind::Usage`] that says what is wrong with one.
pub fn parse(given: &[String]) -> Result<Vec<RootKeyUri>, Fault> {
    let usage = |e: crate::kms::KmsError| Fault::new(FaultKind::Usage, e.to_string());
    given.iter().map(|u| RootKeyUri::parse(u).map_err(usage)).collect()
}

/// Opens the keyring with `given` root keys, or those it records.
///
/// # Errors
/// As [`root_keys`] and [`Keys::open`].
pub fn keys(b: &Posix, given: &[String], o: &ConnectOptions) -> Result<Keys, Fault> {
    let ring = keyring(b)?;
    let roots = root_keys(given, &ring, o)?;
    Keys::open(b, &roots).map_err(|e| Fault::store(b.path(), &e))
}
