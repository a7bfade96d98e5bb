//! Root keys as the command line names them.

use super::args::{AccessArgs, RecoveryArgs};
use super::config::Config;
use crate::backing::posix::Posix;
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::open;
use crate::daemon::protocol::Hidden;
use crate::kms::{self, ConnectOptions, KeyProvider, PassphraseSource, RootKeyUri, Scheme};
use crate::store::keys::Keys;
use std::path::Path;
use std::sync::Arc;

/// Tells of a copy of the keyring that a change could not replace.
pub fn tell_of_copy(keys: &Keys) {
    keys.copy_left().iter().for_each(|w| eprintln!("envelopefs: {w}"));
}

/// How to reach root keys.
///
/// # Errors
/// [`FaultKind::Config`] if the configuration cannot be used.
pub fn connect_options(a: &AccessArgs) -> Result<ConnectOptions, Fault> {
    Ok(connect_with(a, &Config::load(a.config.as_deref())?))
}

/// How to reach root keys, with paths made absolute so that they outlive a change of directory.
pub fn connect_with(a: &AccessArgs, config: &Config) -> ConnectOptions {
    let absolute = |p: &Path| std::path::absolute(p).unwrap_or_else(|_| p.to_path_buf());
    let passphrase = match (&a.passphrase_file, &a.passphrase_command) {
        (Some(f), _) => Some(PassphraseSource::File(absolute(f))),
        (None, Some(c)) => Some(PassphraseSource::Command(c.clone())),
        (None, None) => None,
    };
    let mut services = config.services.clone();
    services.pkcs11.module = a.pkcs11_module.as_deref().map(absolute).or(services.pkcs11.module);
    ConnectOptions { passphrase, services, ..Default::default() }
}

/// How to reach the root keys that open a store: as [`connect_options`], with the recovery key if it is asked for.
///
/// # Errors
/// As [`connect_options`].
pub fn opening(a: &AccessArgs, r: &RecoveryArgs) -> Result<ConnectOptions, Fault> {
    Ok(ConnectOptions { recovery: recovery_source(r), ..connect_options(a)? })
}

/// Where the recovery key comes from; `None`: it is not used.
pub fn recovery_source(r: &RecoveryArgs) -> Option<PassphraseSource> {
    match &r.recovery_file {
        Some(f) => Some(PassphraseSource::File(std::path::absolute(f).unwrap_or_else(|_| f.clone()))),
        None => r.recovery.then_some(PassphraseSource::Terminal),
    }
}

/// Opens the keyring, and says on standard error what should be known about how.
///
/// # Errors
/// As [`open::keys`].
pub fn open(b: &Posix, given: &[String], o: &ConnectOptions) -> Result<Keys, Fault> {
    let keys = open::keys(b, given, o)?;
    open::warnings(&keys, o).iter().for_each(|w| eprintln!("envelopefs: {w}"));
    Ok(keys)
}

/// A new passphrase for the daemon, which has no terminal to ask on; `None` if none of `uris` needs one.
///
/// # Errors
/// [`FaultKind::RootKey`] if there is none to be had.
pub fn passphrase_for(uris: &[RootKeyUri], a: &AccessArgs) -> Result<Option<Hidden>, Fault> {
    if !uris.iter().any(|u| u.scheme() == Scheme::Passphrase) {
        return Ok(None);
    }
    read_passphrase(a, true).map(Some)
}

/// A passphrase for the daemon; `new`: one from the terminal is asked for twice.
///
/// # Errors
/// [`FaultKind::RootKey`] if there is none to be had.
pub fn read_passphrase(a: &AccessArgs, new: bool) -> Result<Hidden, Fault> {
    let source = connect_options(a)?.passphrase.unwrap_or(PassphraseSource::Terminal);
    let text = crate::kms::passphrase::text(&source, new).map_err(|e| Fault::new(FaultKind::RootKey, e.to_string()))?;
    String::from_utf8(text.to_vec())
        .map(Hidden::new)
        .map_err(|_| Fault::new(FaultKind::RootKey, "passphrase: not UTF-8"))
}

/// A root key as the daemon is told of it: with the module of the command line, which it cannot know otherwise.
///
/// # Errors
/// [`FaultKind::Usage`] that says what is wrong with `text`.
pub fn for_daemon(text: &str, a: &AccessArgs) -> Result<String, Fault> {
    let uri = RootKeyUri::parse(text).map_err(|e| Fault::new(FaultKind::Usage, e.to_string()))?;
    Ok(match a.pkcs11_module.as_deref() {
        Some(m) if uri.scheme() == Scheme::Pkcs11 => {
            uri.with_module_path(&std::path::absolute(m).unwrap_or_else(|_| m.to_path_buf()))
        }
        _ => text.to_owned(),
    })
}

/// Where a new passphrase comes from: `file`, or else as `otherwise` says.
pub fn new_passphrase(file: Option<&Path>, otherwise: &AccessArgs) -> AccessArgs {
    match file {
        Some(f) => AccessArgs { passphrase_file: Some(f.to_path_buf()), passphrase_command: None, ..otherwise.clone() },
        None => otherwise.clone(),
    }
}

/// Providers for the new KEK: key files must be there, a passphrase from the terminal is asked for twice.
///
/// # Errors
/// A provider's.
pub fn for_new_kek(uris: &[RootKeyUri], o: &ConnectOptions) -> Result<Vec<Arc<dyn KeyProvider>>, Fault> {
    let connect = |u: &RootKeyUri| kms::connect(u, o, u.scheme() == Scheme::Passphrase);
    uris.iter().map(|u| connect(u).map_err(|e| Fault::kms(&u.to_string(), &e))).collect()
}

/// A word about a key file that will be made for `uri`; empty if there is none to be made.
pub fn made(uri: &RootKeyUri) -> String {
    let absent = |p: &Path| matches!(p.symlink_metadata(), Err(e) if e.kind() == std::io::ErrorKind::NotFound);
    match uri.key_file().filter(|p| absent(p)) {
        Some(p) => format!("made key file {}: keep a copy in a safe place\n", p.display()),
        None => String::new(),
    }
}
