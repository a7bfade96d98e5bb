//! The encrypted store without FUSE.

pub mod ahead;
pub mod attr;
pub mod check;
pub mod dek_cache;
pub mod dir;
pub mod error;
pub mod file;
pub mod flood;
pub mod header;
pub mod keys;
pub mod load;
pub mod lock;
pub mod moves;
pub mod namespace;
pub mod node;
pub mod open;
pub mod place;
mod pool;
pub mod rekey;
mod rename;
pub mod restored;
pub mod shared;
pub mod symlink;
#[cfg(test)]
mod tests;
mod unsynced;
pub mod walk;
pub mod xattr;

pub use attr::{Attr, SetAttr};
pub use dir::Entry;
pub use error::{Result, StoreError};
pub use moves::Moved;
pub use namespace::Owner;
pub use node::Node;
pub use open::{Store, StoreOptions};
