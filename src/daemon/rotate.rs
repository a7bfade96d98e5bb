//! Running a rotation inside the daemon or on a store that is not mounted, and what destroying a KEK works on.

use super::job::Job;
use crate::backing::Backing;
use crate::rotation::{
    self, Begun, Context, Control, NoMoves, Options, Outcome, Progress, Report, SealedReport, Shard, Staged, sealed,
    shares,
};
use crate::store::dek_cache::{DekCache, DekCacheLimits};
use crate::store::keys::Keys;
use crate::store::shared::Shared;
use crate::store::{Result, Store};

/// A store that is in use: it knows what is renamed meanwhile.
pub fn in_use<B: Backing>(store: &Store<B>) -> Context<'_, B> {
    Context { shared: store.shared(), moves: store }
}

/// An open store that nobody else uses; the caller holds the volume lock.
pub fn alone<B: Backing>(store: &Store<B>) -> Context<'_, B> {
    Context { shared: store.shared(), moves: &NoMoves }
}

/// Rotates a store that is in use.
///
/// # Errors
/// As [`rotation::run`].
pub fn mounted<B: Backing>(store: &Store<B>, o: &Options, progress: &dyn Progress, c: &Control) -> Result<Report> {
    rotation::run(&in_use(store), o, progress, c)
}

/// Rotates an open store that nobody else uses; the caller holds the volume lock.
///
/// # Errors
/// As [`rotation::run`].
pub fn offline<B: Backing>(store: &Store<B>, o: &Options, progress: &dyn Progress, c: &Control) -> Result<Report> {
    rotation::run(&alone(store), o, progress, c)
}

/// Begins a rotation of an open store, as far as making the new KEK. No rotation may run.
///
/// # Errors
/// As [`rotation::stage`].
pub fn stage<B: Backing>(store: &Store<B>, o: &Options) -> Result<Staged> {
    rotation::stage(&alone(store), o)
}

/// Seals what a run on `store` said.
pub fn seal<B: Backing>(store: &Store<B>, report: &Report) -> SealedReport {
    seal_with(&store.shared().keys, report)
}

fn seal_with(keys: &Keys, report: &Report) -> SealedReport {
    SealedReport::new(report, &sealed::seal_key(keys.secret()))
}

/// What somebody can do who wants a store rotated that is mounted read-only.
pub const BESIDE_READERS: &str =
    "beside read-only mounts, rotate --shard 1/1 (or K/N on each of N machines) and then rotate --merge do the same";

/// A store opened for a rotation that several processes share: nothing in it is changed but headers and what the rotation
/// itself writes.
pub struct SharedStore<B: Backing>(Shared<B>);

impl<B: Backing> SharedStore<B> {
    /// Puts an opened backing directory and its opened keyring together.
    pub fn new(b: B, keys: Keys) -> Self {
        Self(Shared::new(b, keys, DekCache::new(DekCacheLimits::default()), false))
    }

    fn context(&self) -> Context<'_, B> {
        Context { shared: &self.0, moves: &NoMoves }
    }

    /// The keyring.
    pub fn keys(&self) -> &Keys {
        &self.0.keys
    }

    /// As [`Keys::try_to_mend_copies`]; the caller holds the lock of keyring changes.
    pub fn mend(&self) {
        self.0.keys.try_to_mend_copies(&self.0.backing);
    }

    /// As [`rotation::stage`]; the caller holds the lock of keyring changes.
    ///
    /// # Errors
    /// As there.
    pub fn stage(&self, o: &Options) -> Result<Staged> {
        rotation::stage(&self.context(), o)
    }

    /// As [`rotation::begin`]; the caller holds the lock of keyring changes.
    ///
    /// # Errors
    /// As there.
    pub fn begin(&self, o: &Options, progress: &dyn Progress, c: &Control) -> Result<Begun> {
        rotation::begin(&self.context(), o, progress, c)
    }

    /// Runs one share, and leaves its sealed report in the store, unless it was cancelled: what an earlier run of the share
    /// proved holds then. The caller holds the share's locks.
    ///
    /// # Errors
    /// As [`rotation::run`]; the backing directory's.
    pub fn run(
        &self,
        shard: Shard,
        o: &Options,
        progress: &dyn Progress,
        c: &Control,
    ) -> Result<(Report, SealedReport)> {
        let options = Options { shard: Some(shard), ..o.clone() };
        let report = rotation::run(&self.context(), &options, progress, c)?;
        let sealed = seal_with(self.keys(), &report);
        if report.outcome != Outcome::Cancelled {
            shares::put_report(&self.0.backing, shard, sealed.to_file().as_bytes())?;
        }
        Ok((report, sealed))
    }

    /// Reports in `files`, each with its name, if all of them are genuine.
    ///
    /// # Errors
    /// The name of the first one that this store's key did not seal.
    pub fn genuine<N>(&self, files: Vec<(N, Vec<u8>)>) -> std::result::Result<Vec<Report>, N> {
        let key = sealed::seal_key(self.keys().secret());
        let read = |(name, file): (N, Vec<u8>)| match SealedReport::from_file(&file) {
            Some((report, seal)) if key.is_genuine(&seal) => Ok(report),
            _ => Err(name),
        };
        files.into_iter().map(read).collect()
    }

    /// Reports of shards that lie in the store.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn reports(&self) -> Result<Vec<(Shard, Vec<u8>)>> {
        Ok(shares::reports(&self.0.backing)?)
    }

    /// As [`rotation::merge::merge`]; the caller holds the lock of keyring changes.
    ///
    /// # Errors
    /// As there.
    pub fn merge(&self, reports: &[Report]) -> Result<(Report, SealedReport)> {
        let report = rotation::merge::merge(&self.context(), reports)?;
        let sealed = seal_with(self.keys(), &report);
        Ok((report, sealed))
    }
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
