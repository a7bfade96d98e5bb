//! `key destroy`: one retired KEK gone for good, through the daemon if the store is mounted.

use super::args::OpenKeys;
use super::key::opened;
use super::place::Place;
use super::progress::Meter;
use super::{output, rotate};
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::protocol::{Reply, Request};
use crate::format::ids::KekId;
use crate::rotation::{Control, Destroyed};
use crate::store::keys::{kept, may_destroy};
use crate::store::{Store, StoreOptions};
use std::io::{IsTerminal, Write};
use std::sync::Arc;

/// Digits of the id that are typed to confirm.
const TYPED: usize = 8;

/// Destroys the KEK `which` if a scan proves that no header names it.
///
/// # Errors
/// [`FaultKind::Usage`] if nobody can be asked and it was not confirmed; why the KEK must stay; [`FaultKind::Locked`];
/// root keys; the store's.
pub fn destroy(place: &Place, which: &str, yes: bool, old: &OpenKeys) -> Result<(), Fault> {
    let fail = |e: &crate::store::StoreError| Fault::store(&place.backing, e);
    let known = which.parse::<KekId>().ok().filter(|id| place.keyring.kek(*id).is_some());
    let Some(id) = known else {
        let text = format!("{which} is not a KEK of {}; key list shows their ids", place.backing.display());
        return Err(Fault::new(FaultKind::Other, text));
    };
    // Not verified yet: what would be refused anyway should not be asked about first.
    may_destroy(&place.keyring, id).map_err(|e| fail(&e))?;
    let connection = place.connect()?;
    if !yes {
        confirm(id)?;
    }
    let meter = Meter::new(false);
    let destroyed = match connection {
        Some(c) => match c.ask(&Request::KekDestroy { id: id.to_string() }, |s| rotate::show(&meter, s))? {
            Reply::Destroyed(d) => d,
            _ => return Err(Fault::new(FaultKind::Daemon, "the daemon gave another answer than was asked for")),
        },
        None => {
            let (_lock, observed, keys) = opened(place, old)?;
            let b = crate::daemon::open::backing(&place.backing)?;
            let store = Store::open(b, keys, StoreOptions::default()).map_err(|e| fail(&e))?;
            let control = Arc::new(Control::new());
            let at_signal = control.clone();
            rotate::on_signal(move || at_signal.cancel())?;
            let ended = crate::daemon::rotate::destroy_offline(&store, id, &rotate::Shown(&meter), &control);
            let closed = store.close();
            observed.end();
            let destroyed = ended.map_err(|e| fail(&e))?;
            closed.map_err(|e| fail(&e))?;
            destroyed
        }
    };
    meter.end();
    for name in kept(&place.posix).unwrap_or_default() {
        eprintln!("envelopefs: the replaced keyring .envelopefs/{name} may still hold KEK {id}: remove it");
    }
    output::print(&text(&destroyed))
}

fn text(d: &Destroyed) -> String {
    match d.proof {
        Some(c) => {
            let headers = c.scanned - (c.empty + c.vanished).min(c.scanned);
            format!("destroyed KEK {}: {headers} headers looked at, none names it\n", d.kek)
        }
        None => format!("KEK {} was destroyed already\n", d.kek),
    }
}

/// Asks on the terminal.
fn confirm(id: KekId) -> Result<(), Fault> {
    if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
        return Err(Fault::new(FaultKind::Usage, "there is no terminal to confirm on: give --yes to destroy the KEK"));
    }
    let digits: String = id.to_string().chars().take(TYPED).collect();
    eprint!(
        "Destroying KEK {id} cannot be undone. Backups of files from the time when it was in use will not open any\n\
         more, unless with a copy of the keyring from before.\n\
         To destroy it, type the first {TYPED} digits of its id: "
    );
    let mut typed = String::new();
    std::io::stderr()
        .flush()
        .and_then(|()| std::io::stdin().read_line(&mut typed))
        .map_err(|e| Fault::new(FaultKind::Other, format!("cannot read from the terminal: {e}")))?;
    match typed.trim() == digits {
        true => Ok(()),
        false => Err(Fault::new(FaultKind::Other, "that is not it; nothing was destroyed")),
    }
}
