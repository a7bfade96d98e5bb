//! What an answer must hold before it is believed: the right key, and checksums both ways. Decides only.
//!
//! The service computes CRC32C (Castagnoli) of what it sends, and checks those of what it gets: not against an
//! attacker, but against bits that flip in memory or behind the end of TLS. An encryption damaged before its tag was
//! made would be found out only when nothing else opens the file any more.

use super::classify::one_line;
use super::wrapped::{CIPHERTEXT_MAX, Wrapped};
use crate::crypto::secret::{KEY_LEN, Secret32};
use crate::kms::KmsError;
use google_cloud_kms_v1::model::{DecryptResponse, EncryptResponse};

/// The checksum in the type that the service's messages have for it.
pub fn crc(bytes: &[u8]) -> i64 {
    i64::from(crc32c::crc32c(bytes))
}

/// The number in `name`, if it names a version of exactly `key`.
pub fn version_of(name: &str, key: &str) -> Option<u64> {
    let number = name.strip_prefix(key)?.strip_prefix("/cryptoKeyVersions/")?;
    let plain = number.bytes().all(|b| b.is_ascii_digit()) && !number.starts_with('0');
    number.parse().ok().filter(|_| plain)
}

fn damaged(key: &str, what: &str) -> KmsError {
    KmsError::Unreachable(format!("{key}: {what}; damaged on the way, nothing of it was used"))
}

/// The wrapped form that an encryption's answer makes, and the number of the version that made it. `name` is the key
/// asked, `key` its URI.
///
/// # Errors
/// [`KmsError::Unreachable`] if a checksum does not fit or was not checked, [`KmsError::Config`] if another key
/// answered.
pub fn encrypted(a: &EncryptResponse, name: &str, key: &str) -> Result<(Vec<u8>, u64), KmsError> {
    if !a.verified_plaintext_crc32c || !a.verified_additional_authenticated_data_crc32c {
        return Err(damaged(key, "the service did not check the checksums of what it encrypted"));
    }
    if a.ciphertext_crc32c != Some(crc(&a.ciphertext)) {
        return Err(damaged(key, "the ciphertext does not fit its checksum"));
    }
    let version = version_of(&a.name, name).ok_or_else(|| {
        let other = one_line(&a.name);
        KmsError::Config(format!(
            "{key}: encrypted by '{other}', not by a version of this key; write the key's name as the service does"
        ))
    })?;
    let bytes = Wrapped { version, ciphertext: &a.ciphertext }.to_bytes().ok_or_else(|| {
        let n = a.ciphertext.len();
        KmsError::Config(format!("{key}: the ciphertext has {n} bytes; between 1 and {CIPHERTEXT_MAX} can be kept"))
    })?;
    Ok((bytes, version))
}

/// The key that a decryption's answer holds.
///
/// # Errors
/// [`KmsError::Unreachable`] if the checksum does not fit, [`KmsError::BadCiphertext`] if it is no key of ours.
pub fn decrypted(a: &DecryptResponse, key: &str) -> Result<Secret32, KmsError> {
    if a.plaintext_crc32c != Some(crc(&a.plaintext)) {
        return Err(damaged(key, "the plaintext does not fit its checksum"));
    }
    Secret32::try_build(|out| {
        let bytes: &[u8; KEY_LEN] = a.plaintext.as_ref().try_into().map_err(|_| {
            KmsError::BadCiphertext(format!("{key}: what was decrypted has {} bytes, not 32", a.plaintext.len()))
        })?;
        out.copy_from_slice(bytes);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "projects/p/locations/l/keyRings/r/cryptoKeys/k";

    fn good() -> EncryptResponse {
        EncryptResponse::new()
            .set_name(format!("{NAME}/cryptoKeyVersions/12"))
            .set_ciphertext(vec![7; 100])
            .set_ciphertext_crc32c(crc(&[7; 100]))
            .set_verified_plaintext_crc32c(true)
            .set_verified_additional_authenticated_data_crc32c(true)
    }

    #[test]
    fn the_checksum_is_crc32c() {
        // RFC 3720, appendix B.4: 32 bytes of zeros, and of ones.
        assert_eq!((crc(&[0; 32]), crc(&[0xff; 32])), (0x8a91_36aa, 0x62a8_ab43));
    }

    #[test]
    fn an_encryption_is_believed_only_if_everything_fits() {
        let (bytes, version) = encrypted(&good(), NAME, "k").unwrap();
        assert_eq!(version, 12);
        assert_eq!(Wrapped::parse(&bytes), Some(Wrapped { version: 12, ciphertext: &[7; 100] }));
        for bad in [
            good().set_verified_plaintext_crc32c(false),
            good().set_verified_additional_authenticated_data_crc32c(false),
            good().set_ciphertext_crc32c(crc(&[7; 100]) ^ 1),
            good().set_ciphertext_crc32c(crc(&[7; 100]) - (1 << 32)),
            good().set_or_clear_ciphertext_crc32c(None::<i64>),
            good().set_ciphertext(vec![8; 100]),
        ] {
            let e = encrypted(&bad, NAME, "k").unwrap_err();
            assert!(matches!(e, KmsError::Unreachable(_)), "{e}");
        }
        let long = good().set_ciphertext(vec![7; 629]).set_ciphertext_crc32c(crc(&[7; 629]));
        let empty = good().set_ciphertext(vec![]).set_ciphertext_crc32c(0);
        for bad in [good().set_name(""), long, empty] {
            let e = encrypted(&bad, NAME, "k").unwrap_err();
            assert!(matches!(e, KmsError::Config(_)), "{e}");
        }
    }

    #[test]
    fn only_a_version_of_exactly_this_key_is_one() {
        let v = |suffix: &str| version_of(&format!("{NAME}{suffix}"), NAME);
        assert_eq!(v("/cryptoKeyVersions/1"), Some(1));
        assert_eq!(v("/cryptoKeyVersions/18446744073709551615"), Some(u64::MAX));
        for bad in [
            "",
            "/cryptoKeyVersions/",
            "/cryptoKeyVersions/0",
            "/cryptoKeyVersions/01",
            "/cryptoKeyVersions/+1",
            "/cryptoKeyVersions/-1",
            "/cryptoKeyVersions/1/",
            "/cryptoKeyVersions/18446744073709551616",
            "/cryptokeyversions/1",
            "2/cryptoKeyVersions/1",
        ] {
            assert_eq!(v(bad), None, "{bad}");
        }
        assert_eq!(version_of("projects/q/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1", NAME), None);
    }

    #[test]
    fn a_decryption_is_believed_only_if_everything_fits() {
        let good = || DecryptResponse::new().set_plaintext(vec![5; 32]).set_plaintext_crc32c(crc(&[5; 32]));
        assert_eq!(decrypted(&good(), "k").unwrap().expose(), &[5; 32]);
        for bad in [good().set_plaintext_crc32c(1), good().set_or_clear_plaintext_crc32c(None::<i64>)] {
            assert!(matches!(decrypted(&bad, "k"), Err(KmsError::Unreachable(_))));
        }
        for n in [0, 31, 33] {
            let other = good().set_plaintext(vec![5; n]).set_plaintext_crc32c(crc(&vec![5; n]));
            assert!(matches!(decrypted(&other, "k"), Err(KmsError::BadCiphertext(_))), "{n}");
        }
    }
}
