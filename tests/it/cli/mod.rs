//! The program from outside: what it prints, how it exits, and how it lives as a daemon.

mod control;
mod json;
mod lifecycle;
mod memory;
mod recovery;
pub mod support;
mod terminal;
mod transcripts;
mod unprivileged;
