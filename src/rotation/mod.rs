//! Key rotation in place: every file's wrapped DEK is moved to a new KEK while the store is in use.
//!
//! A run stages a new KEK (durable, read back from disk, unwrapped independently), makes it active, sweeps every header
//! to it, proves by a fresh scan of both slots of every header that none names an old one, and only then retires those.
//! It can be killed at any instant; the next one goes on.
//!
//! | module | what it does | I/O |
//! |---|---|---|
//! | [`options`] | what a run is asked to do | none |
//! | [`control`] | pause, resume, cancel from another thread | none |
//! | [`report`] | what a run says while it works and when it ends | none |
//! | [`sealed`] | a report as evidence: file ↔ report and seal | none |
//! | [`waive`] | files that may fail | none |
//! | `path` | paths as reports name them: bytes ↔ text | none |
//! | `failures` | what a pass could not deal with | none |
//! | `estimate` | how long it will take yet | none |
//! | [`moves`] | what is renamed while a walk is under way | none |
//! | [`shard`] | which of several machines moves which file | none |
//! | [`record`] | the journal's record: bytes ↔ type | none |
//! | [`pace`] | how long to wait before the next header | none |
//! | [`patience`] | how long to wait for a key service that does not answer | none |
//! | `courtesy` | which share of the time to work, from what users wait | none |
//! | `turns` | when a worker may begin the next header | waits |
//! | `plan` | which KEK headers go to, from the keyring | none |
//! | `stage` | the new KEK made, before anything is wrapped under it | yes |
//! | `journal` | the record on disk | yes |
//! | [`exceptions`] | what the last complete run left out, on disk | yes |
//! | `pass` | one walk over the store, in batches, by workers | walks |
//! | `rewrap` | one header to the new KEK, in two halves | yes |
//! | `barrier` | one barrier for all workers that wait for one | syncs |
//! | `sweep` | a batch of headers, with barriers | yes |
//! | `verify` | the fresh scan | reads |
//! | `run` | all of it in order | yes |
//! | [`shares`] | reports of shards in the store | yes |
//! | [`merge`] | the end of a run of several machines, from their reports | yes |
//! | `restored` | headers that an old backup brought back, moved as they are found | yes |
//! | `destroy` | one KEK gone, after a fresh scan of its own | yes |
//! | [`rekey`] | new DEKs and content encrypted anew, for files and trees | yes |

mod barrier;
pub mod control;
mod courtesy;
mod destroy;
mod estimate;
pub mod exceptions;
mod failures;
mod journal;
pub mod merge;
pub mod moves;
pub mod options;
pub mod pace;
mod pass;
mod path;
pub mod patience;
mod plan;
pub mod record;
pub mod rekey;
pub mod report;
mod restored;
mod rewrap;
mod run;
pub mod sealed;
pub mod shard;
pub mod shares;
mod stage;
mod sweep;
#[cfg(test)]
mod tests;
mod turns;
mod verify;
pub mod waive;

pub use control::{Cancelled, Control};
pub use destroy::{Destruction, Fate, When, destroy};
pub use journal::last_noted;
pub use moves::{Moved, Moves, NoMoves};
pub use options::Options;
pub use plan::is_unfinished;
pub use report::{Counts, Failing, Failure, Outcome, Progress, Report, State, Status};
pub use restored::rewrap_restored;
pub use run::{Begun, Context, begin, run};
pub use sealed::SealedReport;
pub use shard::{Shard, ShareSeen};
pub use stage::{Staged, stage};
pub use waive::Waivers;
