//! `key`: root keys of the keyring, through the daemon if the store is mounted.

use super::args::{AccessArgs, ConfirmArgs, KeyCommand, OpenKeys};
use super::config::Config;
use super::place::Place;
use super::{audit, confirm, kek, key_list, keyring, output, policy, recovery, report, root_keys};
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::lock::VolumeLock;
use crate::daemon::observed::Observed;
use crate::daemon::open;
use crate::daemon::protocol::{RefreshReport, Reply, Request, RootRefresh};
use crate::format::ids::RootKeyId;
use crate::format::keyring::Keyring;
use crate::kms::{self, ConnectOptions, KeyProvider, guard};
use crate::rotation::When;
use crate::store::StoreError;
use crate::store::keys::Keys;
use std::path::Path;
use std::sync::Arc;

/// Runs the subcommand.
///
/// # Errors
/// Root keys; [`FaultKind::Locked`]; the store's.
pub fn run(c: &KeyCommand) -> Result<(), Fault> {
    match c {
        KeyCommand::List { target, count, json, open } => key_list::run(target, *count, *json, open),
        KeyCommand::VerifyReport { file, target, json, open } => report::verify(file, target.as_deref(), *json, open),
        KeyCommand::Add { target, uri, key, new_passphrase_file, confirm, open } => {
            // clap sees to it that there is exactly one of them.
            let uri = uri.as_deref().or(key.as_deref()).unwrap_or_default();
            add(&Place::find(target)?, uri, new_passphrase_file.as_deref(), confirm, open)
        }
        KeyCommand::Remove { target, which, open } => remove(&Place::find(target)?, which, open),
        KeyCommand::Refresh { target, dry_run, json, open } => refresh(&Place::find(target)?, *dry_run, *json, open),
        KeyCommand::Destroy { target, kek: which, after, cancel, yes, json, confirm, open } => {
            let when = match (after, cancel) {
                (_, true) => When::Never,
                (Some(seconds), _) => When::After(*seconds),
                (None, false) => When::Now,
            };
            let wish = kek::Wish { which, when, yes: *yes, json: *json, confirm };
            kek::destroy(&Place::find(target)?, &wish, open)
        }
        KeyCommand::Policy { target, quorum, json, confirm, open } => {
            policy::policy(&Place::find(target)?, *quorum, *json, confirm, open)
        }
        KeyCommand::Floor { target, kek, json, open } => {
            policy::floor(&Place::find(target)?, kek.as_deref(), *json, open)
        }
        KeyCommand::Export { target, file, force, json } => keyring::export(&Place::find(target)?, file, *force, *json),
        KeyCommand::Import { backing, file, force, json, open } => keyring::import(backing, file, *force, *json, open),
    }
}

fn add(place: &Place, uri: &str, passphrase_file: Option<&Path>, c: &ConfirmArgs, old: &OpenKeys) -> Result<(), Fault> {
    if uri == "recovery:" {
        return add_recovery(place, c, old);
    }
    let uris = open::parse(&[uri.to_string()])?;
    let new = root_keys::new_passphrase(
        passphrase_file,
        &AccessArgs {
            config: old.access.config.clone(),
            pkcs11_module: old.access.pkcs11_module.clone(),
            ..Default::default()
        },
    );
    let made: String = uris.iter().map(root_keys::made).collect();
    if place.connect()?.is_some() {
        let passphrase = root_keys::passphrase_for(&uris, &new)?;
        let confirm = confirm::for_daemon(c, old)?;
        place
            .daemon()?
            .ask(&Request::KeyAdd { uri: root_keys::for_daemon(uri, &new)?, passphrase, confirm }, |_| {})?;
    } else {
        let (_lock, observed, keys) = opened(place, old)?;
        let confirmed = confirm::here(c, old, place, &observed, &keys)?;
        for u in &uris {
            let connect = observed.connect(&root_keys::connect_options(&new)?);
            let provider = kms::connect(u, &connect, true).map_err(|e| Fault::kms(&u.to_string(), &e))?;
            let added = keys.add_root_key(&place.posix, &provider, &confirmed);
            added.map_err(|e| Fault::store(&place.backing, &e))?;
        }
        root_keys::tell_of_copy(&keys);
    }
    output::print(&format!("{made}added root key {uri}\n"))
}

/// A new recovery key. Its secret stays in this process: a daemon gets the public key. It is shown when it is proved to
/// open the store, and taken out again if it cannot be shown.
fn add_recovery(place: &Place, c: &ConfirmArgs, old: &OpenKeys) -> Result<(), Fault> {
    let (key, text) = recovery::new()?;
    let parsed = key.uri().clone();
    let uri = parsed.to_string();
    let key: Arc<dyn KeyProvider> = key;
    if place.connect()?.is_some() {
        let confirm = confirm::for_daemon(c, old)?;
        place.daemon()?.ask(&Request::KeyAdd { uri: uri.clone(), passphrase: None, confirm }, |_| {})?;
        let shown = recovery::prove(&place.posix, &key)
            .and_then(|()| output::print(&format!("added root key {uri}\n")))
            .and_then(|()| recovery::show(&text));
        return shown.map_err(|f| {
            let taken_out = Place::find(&place.backing).and_then(|now| remove_by_id(&now, find(&now, &uri)?));
            recovery::not_shown(&f, taken_out)
        });
    }
    let (_lock, observed, keys) = opened(place, old)?;
    let confirmed = confirm::here(c, old, place, &observed, &keys)?;
    let fail = |e: StoreError| Fault::store(&place.backing, &e);
    let key = guard::around(key, &parsed, &observed.connect(&ConnectOptions::default()));
    let id = keys.add_root_key(&place.posix, &key, &confirmed).map_err(fail)?;
    root_keys::tell_of_copy(&keys);
    output::print(&format!("added root key {uri}\n"))
        .and_then(|()| recovery::show(&text))
        .map_err(|f| recovery::not_shown(&f, keys.remove_root_key(&place.posix, id).map_err(fail)))
}

/// Takes a root key out through the daemon.
fn remove_by_id(place: &Place, id: RootKeyId) -> Result<(), Fault> {
    place.daemon()?.ask(&Request::KeyRemove { id: id.to_string() }, |_| {}).map(drop)
}

fn refresh(place: &Place, dry_run: bool, json: bool, old: &OpenKeys) -> Result<(), Fault> {
    let report = match place.connect()? {
        Some(c) => match c.ask(&Request::KeyRefresh { dry_run }, |_| {})? {
            Reply::Refreshed(r) => r,
            _ => return Err(Fault::new(FaultKind::Daemon, "the daemon gave another answer than was asked for")),
        },
        None => {
            let (_lock, _observed, keys) = opened(place, old)?;
            let roots = keys.refresh(&place.posix, dry_run).map_err(|e| Fault::store(&place.backing, &e))?;
            RefreshReport::new(dry_run, keys.snapshot().generation, roots)
        }
    };
    if json {
        output::print_json(&report)?
    } else {
        output::print(&refreshed(&report))?
    }
    let failed: Vec<&Fault> = report.root_keys.iter().filter_map(|r| r.fault.as_ref()).collect();
    match failed.first() {
        None => Ok(()),
        Some(f) => {
            let n = failed.len();
            let what = if n == 1 { "root key" } else { "root keys" };
            Err(Fault::new(f.kind, format!("{n} {what} not refreshed; what it wraps is as it was")))
        }
    }
}

fn refreshed(report: &RefreshReport) -> String {
    let line = |r: &RootRefresh| {
        let now =
            if report.dry_run { format!("{} due", r.due) } else { format!("{} moved to its newest version", r.moved) };
        match &r.fault {
            Some(f) => format!("root key {} {}: NOT refreshed: {}\n", r.id, r.uri, f.message),
            None => format!("root key {} {}: {now}, {} current\n", r.id, r.uri, r.current),
        }
    };
    report.root_keys.iter().map(line).collect()
}

fn remove(place: &Place, which: &str, old: &OpenKeys) -> Result<(), Fault> {
    let id = find(place, which)?;
    match place.connect()? {
        Some(c) => drop(c.ask(&Request::KeyRemove { id: id.to_string() }, |_| {})?),
        None => {
            let (_lock, _observed, keys) = opened(place, old)?;
            keys.remove_root_key(&place.posix, id).map_err(|e| Fault::store(&place.backing, &e))?;
        }
    }
    output::print(&format!("removed root key {which}\n"))
}

/// The lock under which the keyring may be changed, who hears of that, and the keyring: to be dropped in reverse order.
///
/// # Errors
/// [`FaultKind::Locked`]; root keys.
pub fn opened(place: &Place, old: &OpenKeys) -> Result<(VolumeLock, Observed, Keys), Fault> {
    let lock = VolumeLock::take(&place.backing, "key")?;
    let config = Config::load(old.access.config.as_deref())?;
    let observed = Observed::start(audit::options_of(&config, &place.backing)?.as_ref(), place.keyring.store)?;
    let recovery = root_keys::recovery_source(&old.recovery);
    let connect = ConnectOptions { recovery, ..root_keys::connect_with(&old.access, &config) };
    let keys = root_keys::open(&place.posix, &old.open_keys, &observed.connect(&connect))
        .inspect_err(|f| observed.refused("root-key", &place.backing, f))?;
    observed.opened(&keys);
    Ok((lock, observed, keys))
}

/// The root key named by its id or its URI: one of the keyring in force, or else of the older copy, in which a removal
/// that did not get to its end has left it.
fn find(place: &Place, which: &str) -> Result<RootKeyId, Fault> {
    let named = |ring: &Keyring| -> Vec<RootKeyId> {
        ring.roots.iter().filter(|r| r.id.to_string() == which || r.uri == which).map(|r| r.id).collect()
    };
    let mut same = named(&place.keyring);
    if same.is_empty() {
        same = Keys::read_older_copy(&place.posix).iter().flat_map(named).collect();
    }
    match same.as_slice() {
        [one] => Ok(*one),
        [] => Err(Fault::new(FaultKind::RootKey, format!("{which} is not a root key of {}", place.backing.display()))),
        _ => Err(Fault::new(FaultKind::Usage, format!("{which} names several root keys; use the id from key list"))),
    }
}
