//! Key derivation: HKDF-Expand with SHA-256 (RFC 5869 section 2.3) and HMAC-SHA-256 (RFC 2104).
//!
//! Every input key here is 32 uniformly random bytes, so the Extract step is skipped, as RFC 5869 section 3.3 allows:
//! the input key is the PRK. `info` is the label, one zero byte, then the context.

use super::secret::Secret32;
use super::stack::wiped;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Labels, one for each use of a derived key. A label is never reused for another purpose.
pub mod label {
    /// DEK → key of the file's blocks.
    pub const CONTENT: &str = "envelopefs/v1/content";
    /// DEK → key of the file's segment states.
    pub const STATE: &str = "envelopefs/v1/state";
    /// DEK → key of the MAC over the slot prefix.
    pub const HEADER_MAC: &str = "envelopefs/v1/header-mac";
    /// DEK → key commitment, public, in the slot prefix.
    pub const COMMITMENT: &str = "envelopefs/v1/commitment";
    /// KEK → key that wraps DEKs.
    pub const KEK_WRAP: &str = "envelopefs/v1/kek-wrap";
    /// Root key held in this process (key file, passphrase) → key that wraps KEKs and the store secret.
    pub const ROOT_WRAP: &str = "envelopefs/v1/root-wrap";
    /// Store secret → key of file names.
    pub const NAMES: &str = "envelopefs/v1/names";
    /// Store secret → key of directory ids.
    pub const DIR_ID: &str = "envelopefs/v1/dir-id";
    /// Store secret → key of symlink targets.
    pub const SYMLINK: &str = "envelopefs/v1/symlink";
    /// Store secret → key of extended attributes' names.
    pub const XATTR_NAME: &str = "envelopefs/v1/xattr-name";
    /// Store secret → key of extended attributes' values.
    pub const XATTR_VALUE: &str = "envelopefs/v1/xattr-value";
    /// Store secret → key of the MAC over the keyring.
    pub const KEYRING_MAC: &str = "envelopefs/v1/keyring-mac";
    /// Store secret → key of the MAC over rotation journals.
    pub const REPORT_MAC: &str = "envelopefs/v1/report-mac";
    /// Store secret → key of the seals in audit logs.
    pub const AUDIT_SEAL: &str = "envelopefs/v1/audit-seal";
    /// Store secret → key of the seals of rotations' reports.
    pub const ROTATION_REPORT: &str = "envelopefs/v1/rotation-report";
    /// Store secret → key of the seals in journals of rekeys.
    pub const REKEY_JOURNAL: &str = "envelopefs/v1/rekey-journal";
    /// Store secret → key of what rekeys were asked.
    pub const REKEY_ASKED: &str = "envelopefs/v1/rekey-asked";
}

/// HKDF-Expand of 32 bytes with `label ‖ 0x00 ‖ context`, into fresh secret memory.
pub fn derive(key: &Secret32, label: &str, context: &[u8]) -> Secret32 {
    Secret32::build(|out| {
        // The copies of the result on its way are among what is wiped.
        wiped(|| out.copy_from_slice(&expand(key, label, context)));
    })
}

/// The same derivation for a value that is public, such as a key commitment.
pub fn derive_public(key: &Secret32, label: &str, context: &[u8]) -> [u8; 32] {
    wiped(|| expand(key, label, context))
}

/// HKDF-Expand's first and only block: T(1) = HMAC(PRK, info ‖ 0x01).
fn expand(key: &Secret32, label: &str, context: &[u8]) -> [u8; 32] {
    let mut mac = hmac(key);
    mac.update(label.as_bytes());
    mac.update(&[0]);
    mac.update(context);
    mac.update(&[1]);
    mac.finalize().into_bytes().into()
}

fn hmac(key: &Secret32) -> Hmac<Sha256> {
    Hmac::<Sha256>::new_from_slice(key.expose()).expect("HMAC takes a key of any length")
}

/// HMAC-SHA-256 of the concatenation of `parts`, 32 bytes.
pub fn mac(key: &Secret32, parts: &[&[u8]]) -> [u8; 32] {
    wiped(|| {
        let mut mac = hmac(key);
        for p in parts {
            mac.update(p);
        }
        mac.finalize().into_bytes().into()
    })
}

/// SHA-256 (FIPS 180-4) of `data`.
pub fn sha256(data: &[u8]) -> [u8; 32] {
    use sha2::Digest;
    Sha256::digest(data).into()
}

/// Compares two byte strings in time that depends only on their lengths.
pub fn ct_eq(a: &[u8], b: &[u8]) -> bool {
    use subtle::ConstantTimeEq;
    a.ct_eq(b).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 5869 test case 1, second half: Expand from the given PRK. Its OKM is 42 bytes; the first 32 are T(1).
    #[test]
    fn expand_is_rfc_5869() {
        let prk = Secret32::build(|k| {
            k.copy_from_slice(&[
                0x07, 0x77, 0x09, 0x36, 0x2c, 0x2e, 0x32, 0xdf, 0x0d, 0xdc, 0x3f, 0x0d, 0xc4, 0x7b, 0xba, 0x63, 0x90,
                0xb6, 0xc7, 0x3b, 0xb5, 0x0f, 0x9c, 0x31, 0x22, 0xec, 0x84, 0x4a, 0xd7, 0xc2, 0xb3, 0xe5,
            ]);
        });
        let info = [0xf0u8, 0xf1, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7, 0xf8, 0xf9];
        let mut m = hmac(&prk);
        m.update(&info);
        m.update(&[1]);
        let t1: [u8; 32] = m.finalize().into_bytes().into();
        assert_eq!(
            t1,
            [
                0x3c, 0xb2, 0x5f, 0x25, 0xfa, 0xac, 0xd5, 0x7a, 0x90, 0x43, 0x4f, 0x64, 0xd0, 0x36, 0x2f, 0x2a, 0x2d,
                0x2d, 0x0a, 0x90, 0xcf, 0x1a, 0x5a, 0x4c, 0x5d, 0xb0, 0x2d, 0x56, 0xec, 0xc4, 0xc5, 0xbf
            ]
        );
    }

    #[test]
    fn labels_and_contexts_separate_keys() {
        let k = Secret32::random();
        let a = derive_public(&k, label::CONTENT, b"x");
        assert_ne!(a, derive_public(&k, label::STATE, b"x"));
        assert_ne!(a, derive_public(&k, label::CONTENT, b"y"));
        assert_eq!(a, *derive(&k, label::CONTENT, b"x").expose());
    }
}
