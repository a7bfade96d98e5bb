//! Everything on disk, as bytes ↔ types: pure, no I/O, no panics on any input. `docs/FORMAT.md` is the specification.
//! All integers are little-endian.

pub mod codec;
pub mod damage;
pub mod geometry;
pub mod header;
pub mod ids;
pub mod keyring;
pub mod lifecycle;
pub mod links;
pub mod names;
pub mod state;
pub mod time;
pub mod xattrs;

/// Format version written and read by this program.
pub const FORMAT_VERSION: u16 = 1;
