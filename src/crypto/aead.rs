//! AES-256-GCM-SIV (RFC 8452): 32-byte key, 12-byte nonce, 16-byte tag, ciphertext as long as the plaintext.
//!
//! [`BlockCipher`] is the fast implementation (`aws-lc-rs`) for blocks and segment states. [`GcmSiv`] is the portable
//! one (`aes-gcm-siv`) for short messages. They are the same function, and a test holds them to it
//! (`docs/adr/0001-two-implementations-of-gcm-siv.md`).

use super::AuthError;
use super::secret::Secret32;
use super::stack::wiped;
use aes_gcm_siv::aead::{AeadInOut, KeyInit};
use aes_gcm_siv::{Aes256GcmSiv, Nonce as SivNonce, Tag as SivTag};
use aws_lc_rs::aead as lc;

/// Nonce length in bytes.
pub const NONCE_LEN: usize = 12;
/// Tag length in bytes.
pub const TAG_LEN: usize = 16;
/// Longest message sealed in one call here, in bytes: far below RFC 8452's 2^36.
pub const MESSAGE_MAX: usize = 1 << 20;

/// A 12-byte nonce.
pub type Nonce = [u8; NONCE_LEN];
/// A 16-byte tag.
pub type Tag = [u8; TAG_LEN];

/// AES-256-GCM-SIV for blocks and segment states, with its key set up once.
pub struct BlockCipher(lc::LessSafeKey);

impl BlockCipher {
    /// Sets up the cipher. The library wipes its copy of the key when dropped.
    pub fn new(key: &Secret32) -> Self {
        wiped(|| {
            let k = lc::UnboundKey::new(&lc::AES_256_GCM_SIV, key.expose()).expect("the key has the cipher's length");
            Self(lc::LessSafeKey::new(k))
        })
    }

    /// Encrypts `data` in place and returns the tag.
    pub fn seal(&self, nonce: &Nonce, aad: &[u8], data: &mut [u8]) -> Tag {
        let tag = self
            .0
            .seal_in_place_separate_tag(lc::Nonce::assume_unique_for_key(*nonce), lc::Aad::from(aad), data)
            .expect("messages here are far below the cipher's limit");
        tag.as_ref().try_into().expect("the tag has 16 bytes")
    }

    /// Decrypts `data` in place.
    ///
    /// # Errors
    /// [`AuthError`] if key, nonce, aad, tag and data do not belong together; `data` is then undefined.
    pub fn open(&self, nonce: &Nonce, aad: &[u8], tag: &Tag, data: &mut [u8]) -> Result<(), AuthError> {
        self.0
            .open_in_place_separate_tag(lc::Nonce::assume_unique_for_key(*nonce), lc::Aad::from(aad), tag, data)
            .map(|_| ())
            .map_err(|_| AuthError)
    }
}

impl std::fmt::Debug for BlockCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlockCipher(redacted)")
    }
}

/// AES-256-GCM-SIV for short messages; the key schedule exists only during a call.
pub struct GcmSiv;

impl GcmSiv {
    /// Encrypts `data` in place and returns the tag.
    pub fn seal(key: &Secret32, nonce: &Nonce, aad: &[u8], data: &mut [u8]) -> Tag {
        wiped(|| {
            let c = Aes256GcmSiv::new(key.expose().into());
            let tag = c
                .encrypt_inout_detached(&SivNonce::from(*nonce), aad, data.into())
                .expect("messages here are far below the cipher's limit");
            tag.into()
        })
    }

    /// Decrypts `data` in place.
    ///
    /// # Errors
    /// [`AuthError`] if key, nonce, aad, tag and data do not belong together; `data` is then undefined.
    pub fn open(key: &Secret32, nonce: &Nonce, aad: &[u8], tag: &Tag, data: &mut [u8]) -> Result<(), AuthError> {
        wiped(|| {
            let c = Aes256GcmSiv::new(key.expose().into());
            c.decrypt_inout_detached(&SivNonce::from(*nonce), aad, data.into(), &SivTag::from(*tag))
                .map_err(|_| AuthError)
        })
    }

    /// `nonce(12) ‖ ciphertext ‖ tag(16)` of `plain` under a random nonce.
    pub fn seal_random(key: &Secret32, aad: &[u8], plain: &[u8]) -> Vec<u8> {
        let nonce: Nonce = super::random::array();
        let mut out = Vec::with_capacity(NONCE_LEN + plain.len() + TAG_LEN);
        out.extend_from_slice(&nonce);
        out.extend_from_slice(plain);
        let tag = Self::seal(key, &nonce, aad, &mut out[NONCE_LEN..]);
        out.extend_from_slice(&tag);
        out
    }

    /// Reverses [`GcmSiv::seal_random`].
    ///
    /// # Errors
    /// [`AuthError`] if the message is shorter than 28 bytes or not authentic.
    pub fn open_random(key: &Secret32, aad: &[u8], sealed: &[u8]) -> Result<Vec<u8>, AuthError> {
        let (nonce, rest) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(AuthError)?;
        let (ct, tag) = rest.split_last_chunk::<TAG_LEN>().ok_or(AuthError)?;
        let mut plain = ct.to_vec();
        Self::open(key, nonce, aad, tag, &mut plain)?;
        Ok(plain)
    }

    /// Wraps 32 secret bytes: `nonce(12) ‖ ciphertext(32) ‖ tag(16)`, 60 bytes. The secret never leaves secret memory.
    pub fn wrap(key: &Secret32, aad: &[u8], secret: &Secret32) -> [u8; WRAPPED_LEN] {
        let nonce: Nonce = super::random::array();
        let mut out = [0u8; WRAPPED_LEN];
        // Encrypted inside the arena, so that no plaintext copy of the key is ever on the stack or heap.
        let sealed = Secret32::build(|b| {
            b.copy_from_slice(secret.expose());
            out[WRAPPED_LEN - TAG_LEN..].copy_from_slice(&Self::seal(key, &nonce, aad, b));
        });
        out[..NONCE_LEN].copy_from_slice(&nonce);
        out[NONCE_LEN..NONCE_LEN + 32].copy_from_slice(sealed.expose());
        out
    }

    /// Reverses [`GcmSiv::wrap`].
    ///
    /// # Errors
    /// [`AuthError`] if `wrapped` is not 60 bytes or not authentic under `key` and `aad`.
    pub fn unwrap(key: &Secret32, aad: &[u8], wrapped: &[u8]) -> Result<Secret32, AuthError> {
        let w: &[u8; WRAPPED_LEN] = wrapped.try_into().map_err(|_| AuthError)?;
        let (nonce, rest) = w.split_first_chunk::<NONCE_LEN>().ok_or(AuthError)?;
        let (ct, tag) = rest.split_last_chunk::<TAG_LEN>().ok_or(AuthError)?;
        Secret32::try_build(|b| {
            b.copy_from_slice(ct);
            Self::open(key, nonce, aad, tag, b)
        })
    }
}

/// Length of a 32-byte key wrapped by [`GcmSiv::wrap`].
pub const WRAPPED_LEN: usize = NONCE_LEN + 32 + TAG_LEN;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::random;

    /// RFC 8452 appendix C.2, AEAD_AES_256_GCM_SIV, 8-byte plaintext, empty AAD.
    #[test]
    fn both_match_rfc_8452() {
        let key = Secret32::build(|k| k[0] = 1);
        let mut nonce = [0u8; 12];
        nonce[0] = 3;
        let plain = [1u8, 0, 0, 0, 0, 0, 0, 0];
        let ct = [0xc2, 0xef, 0x32, 0x8e, 0x5c, 0x71, 0xc8, 0x3b];
        let tag = [0x84, 0x31, 0x22, 0x13, 0x0f, 0x73, 0x64, 0xb7, 0x61, 0xe0, 0xb9, 0x74, 0x27, 0xe3, 0xdf, 0x28];
        let mut a = plain;
        assert_eq!(GcmSiv::seal(&key, &nonce, b"", &mut a), tag);
        assert_eq!(a, ct);
        let mut b = plain;
        assert_eq!(BlockCipher::new(&key).seal(&nonce, b"", &mut b), tag);
        assert_eq!(b, ct);
    }

    #[test]
    fn the_two_implementations_are_one_function() {
        for len in [0usize, 1, 15, 16, 17, 28, 984, 1000, 4056, 4095, 4096, 65536] {
            let key = Secret32::random();
            let nonce: Nonce = random::array();
            let aad: [u8; 26] = random::array();
            let mut plain = vec![0u8; len];
            random::fill(&mut plain);
            let fast = BlockCipher::new(&key);
            let (mut a, mut b) = (plain.clone(), plain.clone());
            let ta = fast.seal(&nonce, &aad, &mut a);
            let tb = GcmSiv::seal(&key, &nonce, &aad, &mut b);
            assert_eq!((&a, ta), (&b, tb));
            fast.open(&nonce, &aad, &tb, &mut b).unwrap();
            GcmSiv::open(&key, &nonce, &aad, &ta, &mut a).unwrap();
            assert_eq!((&a, &b), (&plain, &plain));
        }
    }

    #[test]
    fn every_input_is_authenticated() {
        let key = Secret32::random();
        let w = GcmSiv::wrap(&key, b"context", &Secret32::random());
        assert!(GcmSiv::unwrap(&key, b"context", &w).is_ok());
        assert!(GcmSiv::unwrap(&key, b"contexT", &w).is_err());
        assert!(GcmSiv::unwrap(&Secret32::random(), b"context", &w).is_err());
        for i in 0..w.len() {
            let mut bad = w;
            bad[i] ^= 1;
            assert!(GcmSiv::unwrap(&key, b"context", &bad).is_err(), "byte {i}");
        }
        assert!(GcmSiv::unwrap(&key, b"context", &w[..59]).is_err());
    }
}
