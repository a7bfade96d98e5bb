//! The life of a mounted store: process settings, volume lock, control socket, readiness, signals, logging.
//!
//! Nothing here parses a command line or decides an exit code; what went wrong leaves as a [`fault::Fault`].

pub mod fault;
pub mod lock;
pub mod log;
pub mod mounts;
pub mod process;
pub mod protocol;
pub mod ready;
pub mod runtime_dir;
pub mod client;
pub mod server;
