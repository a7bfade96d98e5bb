//! envelopefs: transparent encryption of a directory, one wrapped key per file, key rotation in place.
//!
//! Modules are layers. A module imports only from those above it in this list (`rotation` and `fs` not from
//! each other); `tests/tidy.rs` enforces it.
//!
//! | layer | what it holds | may touch |
//! |---|---|---|
//! | [`crypto`] | secrets, AEAD, key derivation, randomness | memory only |
//! | [`format`] | header, slots, segment state, geometry, names, keyring: bytes ↔ types | nothing |
//! | [`kms`] | trait [`kms::KeyProvider`], one file per provider, decorators | what its provider needs |
//! | [`backing`] | the only doorway to the ciphertext directory: POSIX, and a simulated disk | the backing directory |
//! | [`store`] | the encrypted store without FUSE | `backing` |
//! | [`rotation`] | plan, sweep, journal, pace, verify | `store`, `backing` |
//! | [`fs`] | file operations in plain arguments and results; the one table from error to errno | `store` |
//! | [`fuse`] | adapter from fuser's trait to `fs`; decides nothing | `fs` |
//! | [`daemon`] | life cycle, control socket, readiness, signals | all above |
//! | [`cli`] | one file per subcommand | all above |

pub mod crypto;
pub mod format;
pub mod kms;
pub mod backing;
pub mod store;
pub mod rotation;
pub mod fs;
pub mod fuse;
pub mod daemon;
pub mod cli;
