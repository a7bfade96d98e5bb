//! What a rekey is asked, and what it says.

use crate::format::ids::{KekId, StoreId};
use crate::rotation::options::Options;
use crate::rotation::path::shown;
use crate::rotation::report::{Failing, Failure};
use serde::{Deserialize, Serialize};
use std::num::{NonZeroU32, NonZeroUsize};

/// What the limit of the rate counts: pieces of content of so many bytes, and how many make a megabyte.
pub(super) const UNIT: u64 = 1000;
const UNITS: u32 = 1000;

/// Paths that [`Asked`] names.
const PATHS_MAX: usize = 10;

/// Sorted paths, and criteria.
type Identity = (Vec<Vec<u8>>, Option<(i64, u32)>, Option<KekId>);

/// What a run goes over, for people. Part of `rekey --status --json` and `status --json`; stable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// The first ten, from the root of the store, which is `/`.
    pub paths: Vec<String>,
    /// How many there are.
    pub paths_total: u64,
    /// Whole seconds since the epoch.
    pub written_before: Option<i64>,
    pub kek: Option<KekId>,
}

/// What a run is asked.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Paths from the root of the store: files, or directories with all below them. An empty path is the root.
    pub paths: Vec<Vec<u8>>,
    /// Only files whose content was last changed before: seconds and nanoseconds since the epoch.
    pub written_before: Option<(i64, u32)>,
    /// Only files whose DEK is wrapped under this KEK now.
    pub kek: Option<KekId>,
    /// At most so many megabytes (10^6 bytes) of content a second. `None`: as fast as users of the store do not feel it.
    pub rate: Option<NonZeroU32>,
    /// Take no heed of what users of the store wait: neither rest nor idle I/O priority.
    pub full_speed: bool,
    /// Worker threads.
    pub jobs: Option<NonZeroUsize>,
    /// Count only, change nothing.
    pub dry_run: bool,
    /// Do again what an unfinished run of the same request has done.
    pub restart: bool,
}

impl Request {
    /// What makes two runs the same.
    pub(super) fn identity(&self) -> Vec<u8> {
        let mut paths = self.paths.clone();
        paths.sort();
        let identity: Identity = (paths, self.written_before, self.kek);
        serde_json::to_vec(&identity).unwrap_or_default()
    }

    /// What [`Request::identity`] says, in words.
    pub(super) fn asked(identity: &[u8]) -> Option<Asked> {
        let (paths, written_before, kek): Identity = serde_json::from_slice(identity).ok()?;
        let shown = |p: &Vec<u8>| if p.is_empty() { "/".into() } else { shown(p) };
        Some(Asked {
            paths: paths.iter().take(PATHS_MAX).map(shown).collect(),
            paths_total: paths.len() as u64,
            written_before: written_before.map(|(sec, _)| sec),
            kek,
        })
    }

    /// How fast it may go, for [`Turns`](crate::rotation::turns::Turns).
    pub(super) fn pace(&self) -> Options {
        let rate = self.rate.and_then(|r| NonZeroU32::new(r.get().saturating_mul(UNITS)));
        Options { rate, full_speed: self.full_speed, ..Options::default() }
    }
}

/// What became of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RekeyCounts {
    /// Regular files met; one with several names counts for each that was met.
    pub scanned: u64,
    /// Files with a new DEK; in a dry run those that would get one.
    pub rekeyed: u64,
    /// Bytes of their content.
    pub bytes: u64,
    /// Files that do not meet the criteria.
    pub skipped: u64,
    /// Files that an earlier part of this run has done.
    pub done_before: u64,
    /// Empty files: they have no DEK.
    pub empty: u64,
    /// Files with content and zeros in place of a header: nobody can read them, and they have no DEK either.
    pub no_header: u64,
    /// Files that went away meanwhile.
    pub vanished: u64,
    /// Files and directories that could not be dealt with; they are as they were.
    pub failed: u64,
}

/// Where a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RekeyPhase {
    /// On its walk.
    #[default]
    Rekeying,
    /// On the second walk, which looks for what the first has missed.
    LookingAgain,
    /// It has ended.
    Ended,
}

/// A snapshot of a rekey. Part of `rekey --status --json` and `status --json`; stable.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RekeyStatus {
    pub state: RekeyPhase,
    /// Asked to pause. It stops between files, and between segments of a large one.
    pub paused: bool,
    /// An unfinished run of the same request was taken up.
    pub resumed: bool,
    /// When it began, in seconds since the epoch.
    pub started: u64,
    pub counts: RekeyCounts,
    /// Bytes copied, also of files that are not done, and what was copied again.
    pub copied: u64,
    /// Files it will meet, if it goes over the whole store and a rotation has counted them.
    pub expected: Option<u64>,
    /// Bytes copied a second.
    pub rate: f64,
    /// Seconds since it began.
    pub elapsed: f64,
    /// Seconds to the end of the first walk, if it is known how many files it will meet.
    pub eta: Option<f64>,
    pub failures: Failing,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RekeyOutcome {
    Complete,
    /// Some file could not be dealt with. Exit code 9.
    Incomplete,
    /// Stopped on request. Exit code 9.
    Cancelled,
    DryRun,
}

/// The account of a run. `rekey --json`; stable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RekeyReport {
    pub outcome: RekeyOutcome,
    pub store: StoreId,
    /// Version of the program.
    pub version: String,
    /// An unfinished run of the same request was taken up.
    pub resumed: bool,
    /// Seconds since the epoch.
    pub started: u64,
    pub finished: u64,
    pub counts: RekeyCounts,
    /// Files with content and no header ([`RekeyCounts::no_header`]), at most as many as failures.
    pub no_header: Vec<String>,
    /// Failures, as many as any report names ([`FAILURES_MAX`](crate::rotation::report::FAILURES_MAX)); paths are from the root of the store.
    pub failures: Vec<Failure>,
    /// All failures, also those not named.
    pub failures_total: u64,
}
