//! The program from outside: what it prints, how it exits, and how it lives as a daemon.

mod audit;
mod backup;
mod control;
mod json;
mod ending;
mod keyring;
mod lifecycle;
mod lock;
mod memory;
mod recovery;
mod rekey;
mod report;
mod shards;
pub mod support;
pub mod terminal;
mod transcripts;
mod unprivileged;
mod waive;
