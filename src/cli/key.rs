//! `key add` and `key remove`: root keys of the keyring, through the daemon if the store is mounted.

use super::args::{AccessArgs, KeyCommand, OpenKeys};
use super::place::Place;
use super::{output, root_keys, status};
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::lock::VolumeLock;
use crate::daemon::open;
use crate::daemon::protocol::Request;
use crate::format::ids::RootKeyId;
use crate::kms;
use crate::store::keys::Keys;
use std::path::Path;

/// Runs the subcommand.
///
/// # Errors
/// Root keys; [`FaultKind::Locked`]; the store's.
pub fn run(c: &KeyCommand) -> Result<(), Fault> {
    match c {
        KeyCommand::List { target, json } => status::key_list(target, *json),
        KeyCommand::Add { target, uri, key, new_passphrase_file, open } => {
            // clap sees to it that there is exactly one of them.
            let uri = uri.as_deref().or(key.as_deref()).unwrap_or_default();
            add(&Place::find(target)?, uri, new_passphrase_file.as_deref(), open)
        }
        KeyCommand::Remove { target, which, open } => remove(&Place::find(target)?, which, open),
    }
}

fn add(place: &Place, uri: &str, passphrase_file: Option<&Path>, old: &OpenKeys) -> Result<(), Fault> {
    let uris = open::parse(&[uri.to_string()])?;
    let new = root_keys::new_passphrase(
        passphrase_file,
        &AccessArgs { config: old.access.config.clone(), ..Default::default() },
    );
    let made: String = uris.iter().map(root_keys::made).collect();
    if let Some(c) = place.connect()? {
        let passphrase = root_keys::passphrase_for(&uris, &new)?;
        c.ask(&Request::KeyAdd { uri: uri.to_string(), passphrase }, |_| {})?;
    } else {
        let (keys, _lock) = opened(place, old)?;
        for u in &uris {
            let provider = kms::connect(u, &root_keys::connect_options(&new)?, true)
                .map_err(|e| Fault::kms(&u.to_string(), &e))?;
            keys.add_root_key(&place.posix, &provider).map_err(|e| Fault::store(&place.backing, &e))?;
        }
    }
    output::print(&format!("{made}added root key {uri}\n"))
}

fn remove(place: &Place, which: &str, old: &OpenKeys) -> Result<(), Fault> {
    let id = find(place, which)?;
    match place.connect()? {
        Some(c) => drop(c.ask(&Request::KeyRemove { id: id.to_string() }, |_| {})?),
        None => {
            let (keys, _lock) = opened(place, old)?;
            keys.remove_root_key(&place.posix, id).map_err(|e| Fault::store(&place.backing, &e))?;
        }
    }
    output::print(&format!("removed root key {which}\n"))
}

/// The keyring, with the lock under which it may be changed.
fn opened(place: &Place, old: &OpenKeys) -> Result<(Keys, VolumeLock), Fault> {
    let lock = VolumeLock::take(&place.backing, "key")?;
    let keys = open::keys(&place.posix, &old.open_keys, &root_keys::connect_options(&old.access)?)?;
    Ok((keys, lock))
}

/// The root key named by its id or its URI.
fn find(place: &Place, which: &str) -> Result<RootKeyId, Fault> {
    let same: Vec<RootKeyId> =
        place.keyring.roots.iter().filter(|r| r.id.to_string() == which || r.uri == which).map(|r| r.id).collect();
    match same.as_slice() {
        [one] => Ok(*one),
        [] => Err(Fault::new(FaultKind::RootKey, format!("{which} is not a root key of {}", place.backing.display()))),
        _ => Err(Fault::new(FaultKind::Usage, format!("{which} names several root keys; use the id from key list"))),
    }
}
