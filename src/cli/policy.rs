//! `key policy` and `key floor`: what a store asks for before keys are destroyed, and which KEKs files are opened under.

use super::args::{ConfirmArgs, OpenKeys};
use super::key::opened;
use super::place::Place;
use super::{confirm, output};
use crate::daemon::fault::Fault;
use crate::daemon::open;
use crate::daemon::protocol::Request;
use crate::format::ids::{KekId, StoreId};
use serde::Serialize;

/// `key policy --json`. Stable.
#[derive(Debug, Serialize)]
struct Policy {
    store: StoreId,
    generation: u64,
    quorum: u8,
}

/// `key floor --json`. Stable.
#[derive(Debug, Serialize)]
struct Floor {
    store: StoreId,
    generation: u64,
    floor: Option<KekId>,
    /// Retired KEKs under which no file is opened.
    below: Vec<KekId>,
}

/// Shows the quorum, after it was set to `quorum` if that is given.
///
/// # Errors
/// Too few root keys confirm it; that another process has the store; root keys; the store's.
pub fn policy(place: &Place, quorum: Option<u8>, json: bool, c: &ConfirmArgs, old: &OpenKeys) -> Result<(), Fault> {
    if let Some(quorum) = quorum {
        match place.connect()? {
            Some(_) => {
                let confirm = confirm::for_daemon(c, old)?;
                drop(place.daemon()?.ask(&Request::KeyPolicy { quorum, confirm }, |_| {})?);
            }
            None => {
                let (_lock, observed, keys) = opened(place, old)?;
                let confirmed = confirm::here(c, old, place, &observed, &keys)?;
                keys.set_quorum(&place.posix, quorum, &confirmed).map_err(|e| Fault::store(&place.backing, &e))?;
            }
        }
    }
    let ring = open::keyring(&place.posix)?;
    let quorum = ring.life.required();
    if json {
        return output::print_json(&Policy { store: ring.store, generation: ring.generation, quorum });
    }
    output::print(&match quorum {
        1 => "any one root key may destroy KEKs and add root keys\n".to_owned(),
        n => format!("{n} different root keys must confirm that KEKs are destroyed or root keys added\n"),
    })
}

/// Shows the floor, after it was moved to `which` if that is given.
///
/// # Errors
/// That `which` is no KEK of the store, or cannot be the floor; that another process has the store; root keys; the
/// store's.
pub fn floor(place: &Place, which: Option<&str>, json: bool, old: &OpenKeys) -> Result<(), Fault> {
    if let Some(which) = which {
        let floor = match which {
            "none" => None,
            id => Some(place.kek(id)?),
        };
        match place.connect()? {
            Some(daemon) => {
                let floor = floor.map(|id| id.to_string());
                drop(daemon.ask(&Request::KeyFloor { floor }, |_| {})?);
            }
            None => {
                let (_lock, _observed, keys) = opened(place, old)?;
                keys.set_floor(&place.posix, floor).map_err(|e| Fault::store(&place.backing, &e))?;
            }
        }
    }
    let ring = open::keyring(&place.posix)?;
    let closed = |k: &&crate::format::keyring::KekRecord| !k.wraps.is_empty() && ring.is_below_floor(k.id);
    let below: Vec<KekId> = ring.keks.iter().filter(closed).map(|k| k.id).collect();
    if json {
        let floor = ring.life.floor;
        return output::print_json(&Floor { store: ring.store, generation: ring.generation, floor, below });
    }
    let mut text = match ring.life.floor {
        Some(id) => format!("files are opened under KEK {id} and newer ones only\n"),
        None => "files are opened under any KEK of the keyring\n".to_owned(),
    };
    for id in below {
        text += &format!("closed: KEK {id}\n");
    }
    output::print(&text)
}
