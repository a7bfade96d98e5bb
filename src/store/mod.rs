//! The encrypted store without FUSE.

pub mod attr;
pub mod check;
pub mod dek_cache;
pub mod dir;
pub mod error;
pub mod file;
pub mod header;
pub mod keys;
pub mod namespace;
pub mod node;
pub mod shared;
pub mod symlink;
pub mod walk;
pub mod xattr;

pub use error::{Result, StoreError};
