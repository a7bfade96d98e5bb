//! `lock` and `unlock`: the keys of a mounted store, through its daemon.

use super::args::{LockArgs, UnlockArgs};
use super::place::Place;
use super::{output, root_keys, status};
use crate::daemon::client::Connection;
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::protocol::{Hidden, KeysReply, KeysState, Reply, Request};
use crate::kms::recovery::RecoveryKey;
use std::path::Path;

/// Runs `lock`.
///
/// # Errors
/// [`FaultKind::NotMounted`]; [`FaultKind::Usage`] if it is mounted several times and no mount point was named; the daemon's.
pub fn lock(a: &LockArgs) -> Result<(), Fault> {
    let (_, c) = mounted(&a.target)?;
    let r = ask(c, &Request::Lock)?;
    let done = if r.changed { "locked" } else { "locked already" };
    output::print(&format!("{done}; files give ENOKEY until: envelopefs unlock {}\n", a.target.display()))
}

/// Runs `unlock`.
///
/// # Errors
/// [`FaultKind::NotMounted`]; root keys, and what the key service says.
pub fn unlock(a: &UnlockArgs) -> Result<(), Fault> {
    let (place, c) = mounted(&a.target)?;
    let recovery = recovery(a)?;
    let passphrase = if recovery.is_none() { passphrase(a, &place)? } else { None };
    let keys = a.key.keys.iter().map(|k| root_keys::for_daemon(k, &a.key.access)).collect::<Result<_, _>>()?;
    let r = ask(c, &Request::Unlock { keys, passphrase, recovery })?;
    let text = match (r.keys.state, r.changed) {
        (KeysState::Ready, true) => "unlocked\n".to_owned(),
        (KeysState::Ready, false) => "not locked\n".to_owned(),
        // Nothing was locked by a hand, and what the service says has not changed for asking.
        (KeysState::Denied, _) => return Err(Fault::new(FaultKind::Denied, r.keys.reason)),
        (KeysState::Offline, _) => return Err(Fault::new(FaultKind::Unreachable, r.keys.reason)),
        (KeysState::Locked, _) => format!("keys      {}\n", status::keys_in_words(&r.keys, 0)),
    };
    let left = match r.failed {
        0 => String::new(),
        n => format!("{n} open files did not get their keys back; see the log\n"),
    };
    output::print(&(text + &left))
}

/// The passphrase the daemon needs and cannot ask for. The terminal is asked only if nothing but a passphrase opens the
/// store.
fn passphrase(a: &UnlockArgs, place: &Place) -> Result<Option<Hidden>, Fault> {
    let access = &a.key.access;
    let uris: Vec<String> = match a.key.keys.is_empty() {
        true => place.keyring.roots.iter().map(|r| r.uri.clone()).collect(),
        false => a.key.keys.clone(),
    };
    let given = access.passphrase_file.is_some() || access.passphrase_command.is_some();
    let only = !uris.is_empty() && uris.iter().all(|u| u.starts_with("passphrase:"));
    if given || only { root_keys::read_passphrase(access, false).map(Some) } else { Ok(None) }
}

/// The recovery key, if it is to be used: read here, so that a slip of the pen is told before it is sent anywhere.
fn recovery(a: &UnlockArgs) -> Result<Option<Hidden>, Fault> {
    let Some(source) = root_keys::recovery_source(&a.recovery) else { return Ok(None) };
    let key = RecoveryKey::enter(&source).map_err(|e| Fault::kms("recovery:", &e))?;
    Ok(key.printed().map(|text| Hidden::new(text.to_string())))
}

fn mounted(target: &Path) -> Result<(Place, Connection), Fault> {
    let place = Place::find(target)?;
    if let (Some(one), Some(other)) = (&place.mount, place.other_mounts.first()) {
        let text = format!(
            "{} is mounted at {} and {}, each with keys of its own: name the mount point",
            place.backing.display(),
            one.mountpoint.display(),
            other.display()
        );
        return Err(Fault::new(FaultKind::Usage, text));
    }
    let none = || Fault::new(FaultKind::NotMounted, format!("{}: the store is not mounted", place.backing.display()));
    let c = place.connect()?.ok_or_else(none)?;
    Ok((place, c))
}

fn ask(c: Connection, request: &Request) -> Result<KeysReply, Fault> {
    match c.ask(request, |_| {})? {
        Reply::Keys(r) => Ok(r),
        _ => Err(Fault::new(FaultKind::Daemon, "the daemon gave another answer than was asked for")),
    }
}
