//! Where a name stands when a directory is listed: at a number that its name alone decides, see `fs::snapshot`.

use crate::crypto::kdf::sha256;

/// Offsets of `.` and `..`; every other entry's is larger.
pub const DOT: u64 = 1;
pub const DOT_DOT: u64 = 2;
/// Largest offset: what fits the kernel's signed 64 bits, less room for a few equal hashes.
const OFFSET_MAX: u64 = (1 << 63) - 4096;

/// Where the name stands, in every listing. Not secret, and the names are not an attacker's to choose by the million
/// without his own directory suffering for it; SHA-256 keeps collisions out of thought.
pub fn offset_of(name: &[u8]) -> u64 {
    let digest = sha256(name);
    let hash = digest.first_chunk::<8>().map_or(0, |h| u64::from_le_bytes(*h));
    DOT_DOT + 1 + hash % (OFFSET_MAX - DOT_DOT - 1)
}
