//! Key rotation in place: every file's wrapped DEK is moved to a new KEK while the store is in use.
//!
//! | module | what it does | I/O |
//! |---|---|---|
//! | [`options`] | what a run is asked to do | none |
//! | [`control`] | pause, resume, cancel from another thread | none |
//! | [`report`] | what a run says while it works and when it ends | none |
//! | [`record`] | the journal's record: bytes ↔ type | none |
//! | [`pace`] | how long to wait before the next header | none |

pub mod control;
pub mod options;
pub mod pace;
pub mod record;
pub mod report;

pub use control::{Cancelled, Control};
pub use options::Options;
pub use report::{Counts, Failure, Outcome, Progress, Report, State, Status};
