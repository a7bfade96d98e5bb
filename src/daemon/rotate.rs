//! Running a rotation or destroying a KEK, inside the daemon or on a store that is not mounted.

use super::job::Job;
use crate::backing::Backing;
use crate::format::ids::KekId;
use crate::rotation::{
    self, Context, Control, Destruction, Moved, Moves, NoMoves, Options, Progress, Report, SealedReport, Staged, When,
    sealed,
};
use crate::store::keys::Confirmation;
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

/// Begins a rotation of an open store, as far as making the new KEK. No rotation may run.
///
/// # Errors
/// As [`rotation::stage`].
pub fn stage<B: Backing>(store: &Store<B>, o: &Options) -> Result<Staged> {
    rotation::stage(&Context { shared: store.shared(), moves: &NoMoves }, o)
}

/// Seals what a run on `store` said.
pub fn seal<B: Backing>(store: &Store<B>, report: &Report) -> SealedReport {
    SealedReport::new(report, &sealed::seal_key(store.shared().keys.secret()))
}

/// Destroys a KEK of a store that is in use.
///
/// # Errors
/// As [`rotation::destroy`].
pub fn destroy_mounted<B: Backing>(
    s: &Store<B>,
    kek: KekId,
    when: When,
    confirmed: &Confirmation,
    progress: &dyn Progress,
    c: &Control,
) -> Result<Destruction> {
    rotation::destroy(&Context { shared: s.shared(), moves: &Renamed(s) }, kek, when, confirmed, progress, c)
}

/// Destroys a KEK of an open store that nobody else uses; the caller holds the volume lock.
///
/// # Errors
/// As [`rotation::destroy`].
pub fn destroy_offline<B: Backing>(
    s: &Store<B>,
    kek: KekId,
    when: When,
    confirmed: &Confirmation,
    progress: &dyn Progress,
    c: &Control,
) -> Result<Destruction> {
    rotation::destroy(&Context { shared: s.shared(), moves: &NoMoves }, kek, when, confirmed, progress, c)
}

/// Moves headers that old backups brought back to the active KEK, if there are any and no rotation is under way, which
/// does that as well.
pub fn restored<B: Backing>(store: &Store<B>, job: &Job) {
    let shared = store.shared();
    if shared.restored.is_empty() {
        return;
    }
    let moved = job.in_between(|control| Ok(rotation::rewrap_restored(shared, control)));
    match moved {
        Ok(Ok(c)) if c.rewrapped > 0 => {
            tracing::info!(files = c.rewrapped, "moved headers of an old backup from retired KEKs to the active one");
        }
        Ok(Err(e)) => tracing::warn!("headers of an old backup stay under a retired KEK: {e}"),
        Ok(Ok(_)) | Err(_) => {}
    }
}
