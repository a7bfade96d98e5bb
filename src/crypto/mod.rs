//! The cryptographic parts, pure: no files, no clock, no network.
//!
//! * [`secret`]: raw keys in locked, undumpable memory, and a type for each kind of key.
//! * [`aead`]: AES-256-GCM-SIV (RFC 8452) in two implementations of the same standard: `aws-lc-rs` where speed
//!   matters (blocks, segment states) and `aes-gcm-siv` for the short messages (wraps, names, keyring).
//! * [`kdf`]: HKDF-SHA-256 (RFC 5869), HMAC-SHA-256 (RFC 2104), and the one table of labels.
//! * [`random`]: the only doorway to randomness.
//! * [`seal`]: MACs over what lies outside the store.
//! * [`stack`]: wipes what computations with keys leave behind.

pub mod aead;
pub mod kdf;
pub mod random;
pub mod seal;
pub mod secret;
pub mod stack;

/// An authenticated decryption or a commitment check failed. Carries no detail: none would help an honest caller,
/// and any could help an attacker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("authentication failed")]
pub struct AuthError;
