//! Running a rotation, inside the daemon or on a store that is not mounted.

use crate::backing::Backing;
use crate::rotation::{self, Context, Control, Moved, Moves, NoMoves, Options, Progress, Report, SealedReport, sealed};
use crate::store::{Result, Store};

/// The mounted store knows what is renamed meanwhile.
struct Renamed<'a, B: Backing>(&'a Store<B>);

impl<B: Backing> Moves<B> for Renamed<'_, B> {
    fn track(&self, on: bool) {
        self.0.track_moves(on);
    }

    fn take(&self) -> Moved<B> {
        let m = self.0.take_moved();
        Moved { nodes: m.nodes, lost: m.overflowed }
    }
}

/// Rotates a store that is in use.
///
/// # Errors
/// As [`rotation::run`].
pub fn mounted<B: Backing>(store: &Store<B>, o: &Options, progress: &dyn Progress, c: &Control) -> Result<Report> {
    rotation::run(&Context { shared: store.shared(), moves: &Renamed(store) }, o, progress, c)
}

/// Rotates an open store that nobody else uses; the caller holds the volume lock.
///
/// # Errors
/// As [`rotation::run`].
pub fn offline<B: Backing>(store: &Store<B>, o: &Options, progress: &dyn Progress, c: &Control) -> Result<Report> {
    rotation::run(&Context { shared: store.shared(), moves: &NoMoves }, o, progress, c)
}

/// Seals what a run on `store` said.
pub fn seal<B: Backing>(store: &Store<B>, report: &Report) -> SealedReport {
    SealedReport::new(report, &sealed::seal_key(store.shared().keys.secret()))
}
