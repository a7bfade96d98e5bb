//! `metrics`: a mounted store's figures.

use super::args::MetricsArgs;
use super::output;
use super::place::Place;
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::protocol::{Reply, Request};

/// Runs the subcommand.
///
/// # Errors
/// [`FaultKind::NotMounted`]; [`FaultKind::NotAStore`]; the daemon's.
pub fn run(a: &MetricsArgs) -> Result<(), Fault> {
    let place = Place::find(&a.target)?;
    let Some(c) = place.connect()? else {
        let text = format!("{} is not mounted: only a daemon has figures", place.backing.display());
        return Err(Fault::new(FaultKind::NotMounted, text));
    };
    match c.ask(&Request::Metrics, |_| {})? {
        Reply::Metrics(text) => output::print(&text),
        _ => Err(Fault::new(FaultKind::Daemon, "the daemon answered something else than metrics")),
    }
}
