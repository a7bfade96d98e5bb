//! Seals: MACs under a key from the store secret, over what lies outside the store (audit logs, reports of rotations).
//!
//! What is signed is the SHA-256 of the sealed bytes, so that a daemon can judge a seal without being sent those.

use super::kdf::{ct_eq, derive, mac, sha256};
use super::secret::{Secret32, StoreSecret};

/// A SHA-256 value.
pub type Hash = [u8; 32];

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut s, b| {
        // Writing to a string cannot fail.
        let _ = write!(s, "{b:02x}");
        s
    })
}

/// Reads 64 lower-case hexadecimal digits, and nothing else.
pub fn hash_from(text: &str) -> Option<Hash> {
    let mut out = [0; 32];
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    if text.len() != 64 {
        return None;
    }
    for (o, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *o = match pair {
            [a, b] => digit(*a)? * 16 + digit(*b)?,
            _ => return None,
        };
    }
    Some(out)
}

/// What is signed, and the signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal {
    /// SHA-256 of the sealed bytes.
    pub digest: Hash,
    /// HMAC-SHA-256 of `digest`.
    pub mac: Hash,
}

/// The key of one kind of seals.
pub struct SealKey(Secret32);

impl std::fmt::Debug for SealKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SealKey(redacted)")
    }
}

impl SealKey {
    /// The store's key for what `label` ([`super::kdf::label`]) says.
    pub fn new(secret: &StoreSecret, label: &str) -> Self {
        Self(derive(secret.secret(), label, b""))
    }

    /// Seals `bytes`.
    pub fn seal(&self, bytes: &[u8]) -> Seal {
        let digest = sha256(bytes);
        Seal { digest, mac: mac(&self.0, &[&digest]) }
    }

    /// Whether somebody with this key made `seal`.
    pub fn is_genuine(&self, seal: &Seal) -> bool {
        ct_eq(&mac(&self.0, &[&seal.digest]), &seal.mac)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::kdf::label;

    #[test]
    fn a_seal_is_bound_to_the_store_the_label_and_every_byte() {
        let (ours, theirs) = (StoreSecret::random(), StoreSecret::random());
        let key = SealKey::new(&ours, label::ROTATION_REPORT);
        let seal = key.seal(b"text");
        assert!(key.is_genuine(&seal));
        assert!(!SealKey::new(&ours, label::AUDIT_SEAL).is_genuine(&seal));
        assert!(!SealKey::new(&theirs, label::ROTATION_REPORT).is_genuine(&seal));
        for i in 0..32 {
            let (mut digest, mut mac) = (seal.digest, seal.mac);
            digest[i] ^= 1;
            mac[i] ^= 1;
            assert!(!key.is_genuine(&Seal { digest, ..seal }) && !key.is_genuine(&Seal { mac, ..seal }));
        }
    }

    #[test]
    fn hashes_are_lower_case_and_of_one_length() {
        let h = [0xa7; 32];
        assert_eq!(hash_from(&hex(&h)), Some(h));
        assert_eq!(hash_from(&hex(&h).to_uppercase()), None);
        assert_eq!(hash_from(&hex(&h)[1..]), None);
    }
}
