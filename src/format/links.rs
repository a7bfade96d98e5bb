//! Symbolic links: targets ↔ what stands in the backing link.
//!
//! A target is sealed with a random nonce and stands in the link as base64url. A text longer than the backing file
//! system takes lies in a file of `.envelopefs/links/` instead, and the link holds a reference to it. A reference is
//! 53 bytes long, a length that no base64url text has, so a link's size alone says which it is.

use super::damage::Damage;
use super::ids::DirId;
use crate::crypto::aead::{GcmSiv, NONCE_LEN, TAG_LEN};
use crate::crypto::kdf::{self, label};
use crate::crypto::secret::{Secret32, StoreSecret};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;

/// Longest plaintext target in bytes: PATH_MAX without its NUL.
pub const TARGET_MAX: usize = 4095;
/// Longest text in a backing link.
pub const TEXT_MAX: usize = 4080;
const OVERHEAD: usize = NONCE_LEN + TAG_LEN;
/// Longest sealed target.
pub const SEALED_MAX: usize = TARGET_MAX + OVERHEAD;
const REFERENCE: &[u8] = b"envelopefs-link:";
/// Length of a reference: prefix, 32 hexadecimal digits, a colon, 4 digits of the plaintext's length.
pub const REFERENCE_LEN: usize = REFERENCE.len() + 32 + 1 + 4;

/// A sealed target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SealedTarget {
    /// The link's text.
    Inline(Vec<u8>),
    /// The bytes for a file in `links/`, and the plaintext's length.
    Apart { sealed: Vec<u8>, len: usize },
}

/// Where a target lies that was too long for its link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Name of the file in `links/`.
    pub name: Vec<u8>,
    /// Length of the plaintext target. Not authenticated: only for stat.
    pub len: u64,
}

impl Reference {
    /// A new one with a random name.
    pub fn new(len: usize) -> Self {
        Self { name: DirId::random().to_string().into_bytes(), len: len as u64 }
    }

    /// The link's text.
    pub fn to_text(&self) -> Vec<u8> {
        let mut t = [REFERENCE, &self.name, b":"].concat();
        t.extend_from_slice(format!("{:04x}", self.len).as_bytes());
        t
    }

    /// Reads a link's text.
    ///
    /// # Errors
    /// [`Damage::SymlinkAuth`] for anything else than 32 lower-case hexadecimal digits and a length within bounds.
    pub fn parse(text: &[u8]) -> Result<Self, Damage> {
        let hex = |s: &[u8]| s.iter().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
        let rest = text.strip_prefix(REFERENCE).filter(|_| text.len() == REFERENCE_LEN).ok_or(Damage::SymlinkAuth)?;
        let (name, rest) = rest.split_at_checked(32).ok_or(Damage::SymlinkAuth)?;
        let len = rest.strip_prefix(b":").ok_or(Damage::SymlinkAuth)?;
        if !hex(name) || !hex(len) {
            return Err(Damage::SymlinkAuth);
        }
        let len = len.iter().fold(0u64, |n, c| n * 16 + u64::from((*c as char).to_digit(16).unwrap_or(0)));
        if len == 0 || len > TARGET_MAX as u64 {
            return Err(Damage::SymlinkAuth);
        }
        Ok(Self { name: name.to_vec(), len })
    }
}

/// The plaintext target's length for a backing link of `size` bytes; `None` if the link holds a reference and must
/// be read.
pub fn plain_len(size: u64) -> Option<u64> {
    if size == REFERENCE_LEN as u64 {
        return None;
    }
    Some((size / 4 * 3 + (size % 4).saturating_sub(1)).saturating_sub(OVERHEAD as u64))
}

/// The key of link targets.
pub struct LinkKey(Secret32);

impl LinkKey {
    /// Derives it from the store secret.
    pub fn new(secret: &StoreSecret) -> Self {
        Self(kdf::derive(secret.secret(), label::SYMLINK, b""))
    }

    /// Seals a target of at most [`TARGET_MAX`] bytes.
    pub fn seal(&self, target: &[u8]) -> SealedTarget {
        let sealed = GcmSiv::seal_random(&self.0, b"", target);
        let text = BASE64URL.encode(&sealed).into_bytes();
        if text.len() <= TEXT_MAX {
            SealedTarget::Inline(text)
        } else {
            SealedTarget::Apart { sealed, len: target.len() }
        }
    }

    /// The target from a link's text.
    ///
    /// # Errors
    /// [`Damage::SymlinkAuth`].
    pub fn open_text(&self, text: &[u8]) -> Result<Vec<u8>, Damage> {
        self.open_sealed(&BASE64URL.decode(text).map_err(|_| Damage::SymlinkAuth)?)
    }

    /// The target from the bytes of a file in `links/`.
    ///
    /// # Errors
    /// [`Damage::SymlinkAuth`].
    pub fn open_sealed(&self, sealed: &[u8]) -> Result<Vec<u8>, Damage> {
        let t = GcmSiv::open_random(&self.0, b"", sealed).map_err(|_| Damage::SymlinkAuth)?;
        if t.is_empty() || t.len() > TARGET_MAX || t.contains(&0) {
            return Err(Damage::SymlinkAuth);
        }
        Ok(t)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> LinkKey {
        LinkKey::new(&StoreSecret::from_secret(Secret32::build(|k| k.fill(7))))
    }

    #[test]
    fn the_size_of_a_link_tells_the_length_of_its_target() {
        let k = key();
        for len in 1..=TARGET_MAX {
            let target = vec![b't'; len];
            match k.seal(&target) {
                SealedTarget::Inline(text) => {
                    assert!(len <= 3032 && text.len() <= TEXT_MAX);
                    assert_eq!(plain_len(text.len() as u64), Some(len as u64), "{len}");
                    assert_eq!(k.open_text(&text).unwrap(), target);
                }
                SealedTarget::Apart { sealed, len: said } => {
                    assert!(len > 3032 && said == len && sealed.len() <= SEALED_MAX);
                    assert_eq!(k.open_sealed(&sealed).unwrap(), target);
                }
            }
        }
        assert_eq!(plain_len(REFERENCE_LEN as u64), None);
        assert_eq!(REFERENCE_LEN % 4, 1, "no base64url text has this length");
        assert_eq!(plain_len(0), Some(0));
        let _ = plain_len(u64::MAX);
    }

    #[test]
    fn references_come_back_and_lead_nowhere_else() {
        let r = Reference::new(4095);
        let text = r.to_text();
        assert_eq!(text.len(), REFERENCE_LEN);
        assert_eq!(Reference::parse(&text), Ok(r));
        for (at, with) in [(0, b'x'), (16, b'/'), (20, b'A'), (48, b'.'), (49, b'f'), (52, b'-')] {
            let mut bad = text.clone();
            bad[at] = with;
            assert_eq!(Reference::parse(&bad), Err(Damage::SymlinkAuth), "{at}");
        }
        assert_eq!(Reference::parse(&text[..52]), Err(Damage::SymlinkAuth));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(text in prop::collection::vec(any::<u8>(), 0..200)) {
            let k = key();
            prop_assert!(k.open_text(&text).is_err());
            prop_assert!(k.open_sealed(&text).is_err());
            prop_assert!(Reference::parse(&text).is_err());
        }

        #[test]
        fn targets_are_authenticated(target in prop::collection::vec(1u8.., 1..100), at in any::<prop::sample::Index>(), bit in 0..8) {
            let k = key();
            let SealedTarget::Inline(text) = k.seal(&target) else { panic!("short") };
            let mut bytes = BASE64URL.decode(&text).unwrap();
            let i = at.index(bytes.len());
            bytes[i] ^= 1u8 << bit;
            prop_assert_eq!(k.open_sealed(&bytes), Err(Damage::SymlinkAuth));
            prop_assert_eq!(k.open_text(&text).unwrap(), target);
        }
    }
}
