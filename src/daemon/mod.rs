//! The life of a mounted store: process settings, volume lock, control socket, readiness, signals, logging.
//!
//! Nothing here parses a command line or decides an exit code; what went wrong leaves as a [`fault::Fault`].

mod accept;
pub mod audit;
pub mod client;
pub mod control;
mod endings;
pub mod fault;
pub mod job;
pub mod keys;
pub mod lazy_key;
pub mod lock;
pub mod log;
pub mod metrics;
pub mod mounts;
pub mod observed;
pub mod open;
pub mod process;
pub mod protocol;
pub mod ready;
pub mod rotate;
pub mod run;
pub mod runtime_dir;
pub mod server;
pub mod shard_lock;
pub mod spawn;
