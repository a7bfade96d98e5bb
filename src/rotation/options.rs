//! What a run is asked to do.

use super::shard::Shard;
use super::stage::Staged;
use super::waive::Waivers;
use crate::format::keyring::KekKind;
use crate::kms::KeyProvider;
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

/// Options of one run. `Default` is what `envelopefs rotate` does without any.
#[derive(Clone, Default)]
pub struct Options {
    /// Kind of the new KEK. `None`: as the present one's.
    pub kek: Option<KekKind>,
    /// Root keys to wrap the new KEK under. Empty: the store's present ones.
    pub root: Vec<Arc<dyn KeyProvider>>,
    /// At most so many headers a second. `None`: as fast as users of the store do not feel it.
    pub rate: Option<NonZeroU32>,
    /// Take no heed of what users of the store wait: neither rest between slices of work nor idle I/O priority.
    pub full_speed: bool,
    /// Workers. `None`: for a sweep as many as there are processors, at most 8; for a scan [`READERS`].
    pub jobs: Option<NonZeroUsize>,
    /// How long a key service that does not answer is waited for in the middle of a sweep, before files count as
    /// failed. Zero: not at all.
    pub patience: Duration,
    /// Do nothing unless the active KEK has been in use for so many seconds, or an earlier run is unfinished.
    pub if_older_than: Option<u64>,
    /// Count what there is to do and change nothing.
    pub dry_run: bool,
    /// Once no header names them any more, destroy every KEK but the new one: their wrapped bytes leave the keyring.
    /// Cannot be undone; backups of files from before become unreadable. A KEK that something waived names, or may
    /// name, is kept.
    pub destroy_old: bool,
    /// What may fail without the run being incomplete for it.
    pub waive: Arc<Waivers>,
    /// Make a new KEK even though an earlier run is unfinished. Without it, a run goes on where that one stopped.
    pub restart: bool,
    /// What [`super::stage`] said that the run begins with; it begins with nothing else. `kek`, `root`, `restart` and
    /// `if_older_than` were for that.
    pub staged: Option<Staged>,
    /// Deal only with this share of the files, of a run that [`super::begin`] began. The caller holds the locks that go
    /// with it: nobody changes the keyring meanwhile, and nobody else has the same share.
    pub shard: Option<Shard>,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("kek", &self.kek)
            .field("root", &self.root.len())
            .field("rate", &self.rate)
            .field("full_speed", &self.full_speed)
            .field("jobs", &self.jobs)
            .field("patience", &self.patience)
            .field("if_older_than", &self.if_older_than)
            .field("dry_run", &self.dry_run)
            .field("destroy_old", &self.destroy_old)
            .field("waive", &self.waive)
            .field("restart", &self.restart)
            .field("staged", &self.staged)
            .field("shard", &self.shard)
            .finish()
    }
}

impl Options {
    /// How many workers a scan starts. They wait for the disk nearly all of the time, so the number of processors says
    /// nothing.
    pub fn reader_count(&self) -> usize {
        self.jobs.map_or(READERS, |n| n.get().min(WORKERS_MAX))
    }

    /// How many workers a sweep starts: half as many again as processors, so that some work while others wait for a barrier.
    pub fn worker_count(&self) -> usize {
        self.jobs.map_or_else(
            || {
                let processors = std::thread::available_parallelism().map_or(2, NonZeroUsize::get).min(8);
                processors + processors.div_ceil(2)
            },
            |n| n.get().min(WORKERS_MAX),
        )
    }
}

/// Workers of a scan, if nothing else is asked for: as many reads as keep a disk that can do several at once busy
/// (`docs/adr/0022-speed-of-rotation.md` has the measurement).
pub const READERS: usize = 16;

/// Most workers a run starts, whatever it is told: each keeps a batch of files open.
pub const WORKERS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_has_more_workers_than_there_are_processors_unless_told() {
        let jobs = |n| Options { jobs: NonZeroUsize::new(n), ..Options::default() };
        assert_eq!(Options::default().reader_count(), READERS);
        assert!((2..=12).contains(&Options::default().worker_count()));
        for (asked, started) in [(1, 1), (3, 3), (64, 64), (1000, WORKERS_MAX)] {
            assert_eq!((jobs(asked).worker_count(), jobs(asked).reader_count()), (started, started));
        }
    }
}
