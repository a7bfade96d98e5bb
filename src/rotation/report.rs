//! What a run says: while it works ([`Status`] through [`Progress`]) and when it ends ([`Report`]).

use super::shard::ShareSeen;
use crate::format::ids::{KekId, StoreId};
use crate::store::StoreError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where a run is. Also what the journal keeps on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// The new KEK is in the keyring, read back from disk and unwrapped independently, and not used yet.
    #[default]
    Staged,
    /// The new KEK is active; headers are being rewrapped.
    Sweeping,
    /// A fresh scan of both slots of every header is under way.
    Verifying,
    /// No header names an old KEK; the old ones are being retired, and destroyed if asked.
    Retiring,
    /// Nothing left to do.
    Done,
    /// Stopped on request; the store holds headers under both KEKs.
    Cancelled,
    /// Ended with failures; the old KEKs stay.
    Incomplete,
}

impl State {
    /// Its name in logs and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Staged => "staged",
            Self::Sweeping => "sweeping",
            Self::Verifying => "verifying",
            Self::Retiring => "retiring",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
            Self::Incomplete => "incomplete",
        }
    }

    /// Whether a later run should go on with this one's KEK.
    pub fn is_unfinished(self) -> bool {
        self != Self::Done
    }
}

/// What was done with the files of one pass or of all passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Regular files looked at.
    pub scanned: u64,
    /// Headers moved to the new KEK.
    pub rewrapped: u64,
    /// Headers that were under the new KEK already, in both slots.
    pub current: u64,
    /// Empty files: they have no header.
    pub empty: u64,
    /// Files with content of which both header slots are zeros: no KEK is named there, and the content opens for nobody. A
    /// power cut leaves such a one of a new file that was not synced; a disk that lost what was synced does, too.
    #[serde(default)]
    pub no_header: u64,
    /// Files that were deleted while the run was about to look at them.
    pub vanished: u64,
    /// Files and directories that could not be dealt with.
    pub failed: u64,
}

impl Counts {
    /// Each count with its name, as in `rotate --json`.
    pub fn named(&self) -> [(&'static str, u64); 7] {
        [
            ("scanned", self.scanned),
            ("rewrapped", self.rewrapped),
            ("current", self.current),
            ("empty", self.empty),
            ("no_header", self.no_header),
            ("vanished", self.vanished),
            ("failed", self.failed),
        ]
    }
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, o: Self) {
        self.scanned += o.scanned;
        self.rewrapped += o.rewrapped;
        self.current += o.current;
        self.empty += o.empty;
        self.no_header += o.no_header;
        self.vanished += o.vanished;
        self.failed += o.failed;
    }
}

/// A snapshot of a running rotation.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Status {
    /// Where it is.
    pub state: State,
    /// Asked to pause.
    pub paused: bool,
    /// The key service does not answer and is waited for.
    #[serde(default)]
    pub waiting: bool,
    /// When the run began (that it takes up, if it does), in seconds since the epoch.
    #[serde(default)]
    pub started: u64,
    /// Since when it is in this state, in seconds since the epoch.
    #[serde(default)]
    pub since: u64,
    /// The new KEK.
    pub target: Option<KekId>,
    /// Walks over the store so far, counting this one: sweep and verify alternate.
    pub pass: u32,
    /// Of this pass.
    pub counts: Counts,
    /// Files this pass will look at, if an earlier one has counted them.
    pub expected: Option<u64>,
    /// Files a second, this pass.
    pub rate: f64,
    /// Seconds since the run began.
    pub elapsed: f64,
    /// Seconds to the end of this pass.
    pub eta: Option<f64>,
    /// Seconds to the end of the run, if the scan finds nothing left.
    #[serde(default)]
    pub run_eta: Option<f64>,
    /// Headers seen in this pass, by the KEK that they were found under.
    #[serde(default)]
    pub headers_by_kek: BTreeMap<KekId, u64>,
    /// What failed in the last sweep.
    #[serde(default)]
    pub sweep_failures: Failing,
    /// What failed in the scan, while it is under way.
    #[serde(default)]
    pub verify_failures: Failing,
}

/// What has failed so far in a pass.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Failing {
    /// Failures that nobody waived.
    pub total: u64,
    /// Failures that are waived.
    pub waived: u64,
    /// Those that nobody waived, by their codes.
    pub by_code: BTreeMap<String, u64>,
    /// The first few of them.
    pub first: Vec<Failure>,
}

/// Who wants to know how a run gets on: a rotation, or what has another status.
pub trait Progress<S = Status>: Sync {
    /// Called a few times a second, and at every change of state; never from two threads at once.
    fn update(&self, status: &S);
}

/// Nobody.
impl<S> Progress<S> for () {
    fn update(&self, _: &S) {}
}

/// A file or directory that could not be dealt with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Path in the backing directory. A backslash, control characters and bytes that are not UTF-8 are escaped as `\\`
    /// and `\xHH`.
    pub path: String,
    /// Stable code: a damage code (`wrap-auth`), `kms-…`, or an errno (`EIO`).
    pub code: String,
    /// In words.
    pub message: String,
    /// It is a directory that could not be entered or listed: nothing below it was looked at.
    #[serde(default)]
    pub directory: bool,
}

impl Failure {
    /// The failure that `error` is at `path`.
    pub fn new(path: String, error: &StoreError, directory: bool) -> Self {
        Self { path, code: error.code(), message: error.to_string(), directory }
    }

    /// In one line, for people.
    pub fn in_words(&self) -> String {
        let below = if self.directory { "; nothing below it was looked at" } else { "" };
        format!("{}: {} ({}){below}", self.path, self.message, self.code)
    }
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// A fresh scan found both slots of every header under the new KEK, but for what was waived; the old KEKs are
    /// retired.
    Complete,
    /// Some header could not be moved or read; the old KEKs stay usable. Exit code 9.
    Incomplete,
    /// Stopped on request.
    Cancelled,
    /// Only counted.
    DryRun,
    /// Nothing was done: the active KEK is younger than asked for.
    NotDue,
    /// A fresh scan found both slots of every header of one shard's share under the new KEK. The run as a whole is not
    /// complete before the reports of all shards are merged.
    ShareComplete,
}

/// Most failures a report names; it counts all of them.
pub const FAILURES_MAX: usize = 10_000;
/// Most bytes of paths and messages of these, so that a report can be sent and read again whatever names files have.
pub const NAMED_BYTES_MAX: usize = 8 << 20;

/// What a report names of something that there may be any number of: the first, as many as there is room for.
#[derive(Debug, Clone)]
pub(super) struct Named<T> {
    list: Vec<T>,
    bytes: usize,
}

impl<T> Default for Named<T> {
    fn default() -> Self {
        Self { list: Vec::new(), bytes: 0 }
    }
}

impl<T: Text> Named<T> {
    /// Names `item`, too, if there is room.
    pub(super) fn add(&mut self, item: T) {
        let bytes = self.bytes.saturating_add(item.len());
        if self.list.len() < FAILURES_MAX && bytes <= NAMED_BYTES_MAX {
            self.bytes = bytes;
            self.list.push(item);
        }
    }

    /// Names all of `items` that there is room for.
    pub(super) fn extend(&mut self, items: impl IntoIterator<Item = T>) {
        items.into_iter().for_each(|item| self.add(item));
    }
}

impl<T> std::ops::Deref for Named<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.list
    }
}

impl<T> IntoIterator for Named<T> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.list.into_iter()
    }
}

/// What takes room in a report.
pub(super) trait Text {
    /// Bytes of its paths and messages.
    fn len(&self) -> usize;
}

impl Text for Failure {
    fn len(&self) -> usize {
        self.path.len() + self.message.len()
    }
}

impl Text for String {
    fn len(&self) -> usize {
        self.as_str().len()
    }
}

/// The account of a run that ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// The store.
    pub store: StoreId,
    /// Version of the program.
    pub version: String,
    /// The KEK the headers were moved to; in a dry run the present one.
    pub target: KekId,
    /// An earlier, unfinished run was taken up.
    pub resumed: bool,
    /// Seconds since the epoch.
    pub started: u64,
    /// Seconds since the epoch.
    pub finished: u64,
    /// Walks over the store, sweep and verify.
    pub passes: u32,
    /// Sum of the sweeps.
    pub sweep: Counts,
    /// The last fresh scan, if it came to one. `current` counts headers under the target, `rewrapped` is 0.
    pub verify: Option<Counts>,
    /// Slots found by the last scan, by the KEK they name. Two for each sound header.
    pub slots_by_kek: BTreeMap<KekId, u64>,
    /// Headers found by the last scan, by each KEK that one of their slots names. A file with several names counts for
    /// each of them.
    pub headers_by_kek: BTreeMap<KekId, u64>,
    /// KEKs retired by this run.
    pub retired: Vec<KekId>,
    /// KEKs destroyed by this run.
    pub destroyed: Vec<KekId>,
    /// KEKs that were to be destroyed and are still there: what is waived names them, or may, or a backup of a file that has
    /// no header may need them.
    #[serde(default)]
    pub kept: Vec<KekId>,
    /// Failures that were waived. If the run is complete: what the proof leaves out.
    #[serde(default)]
    pub waived: Vec<Failure>,
    /// Waivers that were not needed: nothing failed at these paths.
    #[serde(default)]
    pub waivers_unused: Vec<String>,
    /// Files that the last scan found to have content and no header ([`Counts::no_header`]), as many as there is room for
    /// ([`FAILURES_MAX`], [`NAMED_BYTES_MAX`]). They are no failures: what is proved of headers is proved, and says nothing of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub no_header: Vec<String>,
    /// Failures that were not waived, as many as there is room for ([`FAILURES_MAX`], [`NAMED_BYTES_MAX`]).
    pub failures: Vec<Failure>,
    /// All of these, also those not named.
    pub failures_total: u64,
    /// Generation of the keyring at the end.
    pub generation: u64,
    /// The share this is about, if it is a shard's report; all of them, if it was merged from such.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<ShareSeen>,
}

impl Report {
    /// Whether the store is as the run was meant to leave it.
    pub fn is_done(&self) -> bool {
        matches!(self.outcome, Outcome::Complete | Outcome::DryRun | Outcome::NotDue | Outcome::ShareComplete)
    }
}
