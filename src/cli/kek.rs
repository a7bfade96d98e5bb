//! `key destroy`: one retired KEK gone for good, now or after a while, through the daemon if the store is mounted.

use super::args::{ConfirmArgs, OpenKeys};
use super::key::opened;
use super::place::Place;
use super::progress::Meter;
use super::{confirm, output, root_keys, rotate};
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::protocol::{Reply, Request};
use crate::format::ids::KekId;
use crate::format::time::rfc3339_seconds;
use crate::rotation::{self, Control, Destruction, Fate, When};
use crate::store::keys::{kept, may_destroy};
use crate::store::{Store, StoreOptions};
use std::io::{IsTerminal, Write};
use std::sync::Arc;

/// Digits of the id that are typed to confirm.
const TYPED: usize = 8;

/// What `key destroy` is asked for.
pub struct Wish<'a> {
    pub which: &'a str,
    pub when: When,
    /// Do not ask on the terminal.
    pub yes: bool,
    pub json: bool,
    pub confirm: &'a ConfirmArgs,
}

/// Destroys a KEK if a scan proves that no header names it, or schedules that, or takes it back.
///
/// # Errors
/// [`FaultKind::Usage`] if nobody can be asked and it was not confirmed; why the KEK must stay; [`FaultKind::Locked`];
/// root keys; the store's.
pub fn destroy(place: &Place, wish: &Wish<'_>, old: &OpenKeys) -> Result<(), Fault> {
    let fail = |e: &crate::store::StoreError| Fault::store(&place.backing, e);
    let id = place.kek(wish.which)?;
    // Not verified yet: what would be refused anyway should not be asked about first.
    may_destroy(&place.keyring, id).map_err(|e| fail(&e))?;
    let is_mounted = place.connect()?.is_some();
    let when = as_seen(wish.when, place.keyring.life.schedule(id).is_some());
    // What was scheduled was confirmed then.
    if !wish.yes && !matches!(when, When::Never | When::Due) {
        ask(id, when)?;
    }
    let ended = match is_mounted {
        true => {
            let confirm = confirm::for_daemon(wish.confirm, old)?;
            let request = Request::KekDestroy { id: id.to_string(), when, confirm };
            let meter = Meter::new(wish.json);
            let reply = place.daemon()?.ask(&request, |s| rotate::show(&meter, s))?;
            meter.end();
            match reply {
                Reply::Destruction(d) => d,
                _ => return Err(Fault::new(FaultKind::Daemon, "the daemon gave another answer than was asked for")),
            }
        }
        false => {
            let (_lock, observed, keys) = opened(place, old)?;
            let confirmed = confirm::here(wish.confirm, old, place, &observed, &keys)?;
            let b = crate::daemon::open::backing(&place.backing)?;
            let store = Store::open(b, keys, StoreOptions::default()).map_err(|e| fail(&e))?;
            let control = Arc::new(Control::new());
            let at_signal = control.clone();
            rotate::on_signal(move || at_signal.cancel())?;
            let meter = Meter::new(wish.json);
            let shown = rotate::Shown(&meter);
            let ended =
                rotation::destroy(&crate::daemon::rotate::alone(&store), id, when, &confirmed, &shown, &control);
            meter.end();
            if ended.is_ok() {
                root_keys::tell_of_copy(&store.shared().keys);
            }
            let closed = store.close();
            observed.end();
            let ended = ended.map_err(|e| fail(&e))?;
            closed.map_err(|e| fail(&e))?;
            ended
        }
    };
    if matches!(ended.outcome, Fate::Destroyed | Fate::AlreadyDestroyed) {
        for name in kept(&place.posix).unwrap_or_default() {
            eprintln!("envelopefs: the replaced keyring .envelopefs/{name} may still hold KEK {id}: remove it");
        }
    }
    if wish.json { output::print_json(&ended) } else { output::print(&text(&ended)) }
}

/// What is asked of the store by whoever saw the KEK scheduled, or not scheduled: if that is taken back before the store is
/// locked, what was scheduled must not go at once, which nobody asked for.
fn as_seen(when: When, is_scheduled: bool) -> When {
    match when {
        When::Now if is_scheduled => When::Due,
        other => other,
    }
}

fn text(d: &Destruction) -> String {
    let (id, when) = (d.kek, rfc3339_seconds(d.not_before));
    match d.outcome {
        Fate::Destroyed => {
            let headers = d.proof.map_or(0, |c| c.scanned - (c.empty + c.vanished).min(c.scanned));
            format!("destroyed KEK {id}: {headers} headers looked at, none names it\n")
        }
        Fate::AlreadyDestroyed => format!("KEK {id} was destroyed already\n"),
        Fate::Scheduled => format!(
            "KEK {id} is to be destroyed, not before {when}: by the daemon if the store is mounted then, else by key destroy; \
             --cancel takes that back\n"
        ),
        Fate::Waiting => format!("KEK {id} was NOT destroyed: it is to be, but not before {when}\n"),
        Fate::Cancelled => format!("KEK {id} stays: it is not to be destroyed any more\n"),
        Fate::NotScheduled => format!("KEK {id} was not to be destroyed; nothing was done\n"),
    }
}

/// Asks on the terminal.
fn ask(id: KekId, when: When) -> Result<(), Fault> {
    if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
        return Err(Fault::new(FaultKind::Usage, "there is no terminal to confirm on: give --yes to destroy the KEK"));
    }
    let digits: String = id.to_string().chars().take(TYPED).collect();
    let wait = if when == When::Now { "" } else { "When the time has come, it goes without another question. " };
    eprint!(
        "Destroying KEK {id} cannot be undone. {wait}Backups of files from the time when it was in use will not open any\n\
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_saw_a_schedule_asks_for_no_more_than_that() {
        assert_eq!([false, true].map(|s| as_seen(When::Now, s)), [When::Now, When::Due]);
        for when in [When::After(7), When::Never] {
            assert_eq!([false, true].map(|s| as_seen(when, s)), [when, when]);
        }
    }
}
