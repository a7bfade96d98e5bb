//! Root keys that confirm what cannot be undone, as the command line names them.

use super::args::{ConfirmArgs, OpenKeys};
use super::config::Config;
use super::place::Place;
use super::root_keys;
use crate::daemon::fault::Fault;
use crate::daemon::observed::Observed;
use crate::daemon::open;
use crate::daemon::protocol::Confirming;
use crate::kms;
use crate::store::keys::{Confirmation, Keys};

/// For a daemon, which connects to them itself.
///
/// # Errors
/// Usage; there is no passphrase to be had.
pub fn for_daemon(c: &ConfirmArgs, old: &OpenKeys) -> Result<Confirming, Fault> {
    let access = root_keys::new_passphrase(c.confirm_passphrase_file.as_deref(), &old.access);
    let uris = open::parse(&c.confirm)?;
    let asked = uris.iter().any(|u| u.scheme() == kms::Scheme::Passphrase);
    Ok(Confirming {
        keys: c.confirm.iter().map(|k| root_keys::for_daemon(k, &old.access)).collect::<Result<_, _>>()?,
        passphrase: asked.then(|| root_keys::read_passphrase(&access, false)).transpose()?,
    })
}

/// Has them prove themselves here, on a store that is open.
///
/// # Errors
/// Root keys.
pub fn here(c: &ConfirmArgs, old: &OpenKeys, place: &Place, o: &Observed, keys: &Keys) -> Result<Confirmation, Fault> {
    let access = root_keys::new_passphrase(c.confirm_passphrase_file.as_deref(), &old.access);
    let connect = o.connect(&root_keys::connect_with(&access, &Config::load(old.access.config.as_deref())?));
    let one = |u: &kms::RootKeyUri| kms::connect(u, &connect, false).map_err(|e| Fault::kms(&u.to_string(), &e));
    let given = open::parse(&c.confirm)?.iter().map(one).collect::<Result<Vec<_>, _>>()?;
    keys.confirm(&given).map_err(|e| Fault::store(&place.backing, &e))
}
