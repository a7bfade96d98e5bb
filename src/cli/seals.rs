//! Whether seals were made with a store's key, as whoever has it says: the daemon, or we with the root keys.

use crate::crypto::seal::{Seal, hex};
use crate::daemon::client::Connection;
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::protocol::{Reply, Request, SEALS_MAX, SealToCheck, Sealed};
use crate::store::keys::Keys;

/// For each of `seals` whether it is genuine. `connect` reaches the daemon if the store is mounted; if it is not, `open`
/// opens its keyring.
///
/// # Errors
/// Those of `connect` and `open`; the daemon's.
pub fn genuine(
    of: Sealed,
    seals: &[Seal],
    connect: impl Fn() -> Result<Option<Connection>, Fault>,
    open: impl FnOnce() -> Result<Keys, Fault>,
) -> Result<Vec<bool>, Fault> {
    let mut connection = connect()?;
    if connection.is_none() {
        let key = of.key(open()?.secret());
        return Ok(seals.iter().map(|s| key.is_genuine(s)).collect());
    }
    let mut genuine = Vec::with_capacity(seals.len());
    for some in seals.chunks(SEALS_MAX) {
        let seals = some.iter().map(|s| SealToCheck { digest: hex(&s.digest), mac: hex(&s.mac) }).collect();
        let gone = || Fault::new(FaultKind::Daemon, "the store was unmounted meanwhile; try again");
        // A connection takes one request.
        let c = connection.take().map_or_else(|| connect()?.ok_or_else(gone), Ok)?;
        match c.ask(&Request::Seals { of, seals }, |_| {})? {
            Reply::Seals(g) if g.len() == some.len() => genuine.extend(g),
            _ => return Err(Fault::new(FaultKind::Daemon, "the daemon answered something else than was asked")),
        }
    }
    Ok(genuine)
}
