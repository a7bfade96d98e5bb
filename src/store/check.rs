//! Checks a store: is every file what envelopefs wrote? Reads only, and no content of the backing directory makes it
//! panic or follow a symbolic link.
//!
//! Without keys it sees structure: keyring copies, checksums, KEK ids, sizes, sidecars, directory ids, leftovers. With
//! keys it unwraps every DEK and authenticates states, names, links and attributes; with
//! [`CheckOptions::deep`] every block too.

pub mod report;

pub use report::{CheckCounts, CheckOptions, CheckProgress, CheckReport, Finding, Severity};
