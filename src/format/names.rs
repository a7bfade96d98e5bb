//! File names and directory ids: plaintext ↔ what stands in the backing directory.
//!
//! A name is sealed with AES-256-GCM-SIV under the store's names key, the directory's id as associated data and its
//! first 12 bytes as nonce: deterministic, so a lookup needs no listing. The text is base64url without padding. A text
//! longer than 255 bytes (a plaintext longer than 175) goes by its hash, and a sidecar file holds the text.

use super::damage::Damage;
use super::ids::DirId;
use crate::crypto::aead::{GcmSiv, NONCE_LEN, Nonce, TAG_LEN};
use crate::crypto::kdf::{self, label};
use crate::crypto::secret::{Secret32, StoreSecret};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;

/// Longest name, plaintext and backing, in bytes.
pub const NAME_MAX: usize = 255;
/// Every name of the store's own in the backing directory starts with this.
pub const RESERVED: &[u8] = b".envelopefs";
/// The store's own folder in the backing root.
pub const STORE_DIR: &[u8] = b".envelopefs";
/// The file in each directory that holds its sealed id.
pub const DIR_ID_FILE: &[u8] = b".envelopefs.dir";
/// A directory that is being made next to where it will appear.
pub const NEW_DIR_PREFIX: &[u8] = b".envelopefs.new.";
/// What a name too long for the backing file system goes by, before the hash.
pub const LONG_PREFIX: &[u8] = b".envelopefs.long.";
/// A long name's sidecar has this after the long name.
pub const SIDECAR_SUFFIX: &[u8] = b".name";
/// Length of the base64url text of a SHA-256 hash.
const HASH_LEN: usize = 43;
/// Length of a sealed directory id: nonce 12, ciphertext 16, tag 16.
pub const SEALED_DIR_ID_LEN: usize = 44;
/// Longest text of an encrypted name: base64url of 255 + 16 bytes.
pub const TEXT_MAX: usize = (NAME_MAX + TAG_LEN) * 4 / 3 + 1;

/// Why a plaintext name cannot be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameFault {
    /// Longer than 255 bytes.
    TooLong,
    /// Empty, `.`, `..`, or with a NUL or a slash.
    Invalid,
}

/// Checks a plaintext name.
///
/// # Errors
/// [`NameFault`]; a name that is too long and has other faults is too long.
pub fn check(name: &[u8]) -> Result<(), NameFault> {
    if name.len() > NAME_MAX {
        Err(NameFault::TooLong)
    } else if name.is_empty() || name == b"." || name == b".." || name.iter().any(|c| matches!(c, 0 | b'/')) {
        Err(NameFault::Invalid)
    } else {
        Ok(())
    }
}

/// A name as it stands in the backing directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Encoded {
    /// The text is the name.
    Short(Vec<u8>),
    /// The content lies under `content`, and `sidecar` holds `text`.
    Long { content: Vec<u8>, sidecar: Vec<u8>, text: Vec<u8> },
}

impl Encoded {
    /// The name for an encrypted text.
    pub fn from_text(text: Vec<u8>) -> Self {
        if text.len() <= NAME_MAX {
            return Self::Short(text);
        }
        let content = long_name(&text);
        let sidecar = sidecar_of(&content);
        Self::Long { content, sidecar, text }
    }

    /// The name that the content goes by.
    pub fn content(&self) -> &[u8] {
        match self {
            Self::Short(n) | Self::Long { content: n, .. } => n,
        }
    }

    /// The sidecar's name and what it holds, if there is one.
    pub fn sidecar(&self) -> Option<(&[u8], &[u8])> {
        match self {
            Self::Short(_) => None,
            Self::Long { sidecar, text, .. } => Some((sidecar, text)),
        }
    }
}

/// The name that the content of a too long text goes by.
fn long_name(text: &[u8]) -> Vec<u8> {
    let mut n = LONG_PREFIX.to_vec();
    n.extend_from_slice(BASE64URL.encode(kdf::sha256(text)).as_bytes());
    n
}

/// The sidecar's name for a long name.
pub fn sidecar_of(long: &[u8]) -> Vec<u8> {
    [long, SIDECAR_SUFFIX].concat()
}

/// What a name found in a backing directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listed {
    /// An encrypted text, or what claims to be one.
    Short,
    /// The content of a long name: its text is in the sidecar.
    Long,
    /// A long name's sidecar.
    Sidecar,
    /// The directory's id.
    DirId,
    /// A directory that was being made when the program stopped.
    Unfinished,
    /// Anything else of the store's own.
    Reserved,
}

/// Sorts a name found in a backing directory.
pub fn classify(name: &[u8]) -> Listed {
    let Some(rest) = name.strip_prefix(RESERVED) else { return Listed::Short };
    if name == DIR_ID_FILE {
        return Listed::DirId;
    }
    if name.starts_with(NEW_DIR_PREFIX) {
        return Listed::Unfinished;
    }
    match rest.strip_prefix(&LONG_PREFIX[RESERVED.len()..]) {
        Some(h) if h.len() == HASH_LEN => Listed::Long,
        Some(h) if h.len() == HASH_LEN + SIDECAR_SUFFIX.len() && h.ends_with(SIDECAR_SUFFIX) => Listed::Sidecar,
        _ => Listed::Reserved,
    }
}

/// The keys of names and directory ids.
pub struct NameKeys {
    names: Secret32,
    dir_ids: Secret32,
}

impl NameKeys {
    /// Derives them from the store secret.
    pub fn new(secret: &StoreSecret) -> Self {
        Self {
            names: kdf::derive(secret.secret(), label::NAMES, b""),
            dir_ids: kdf::derive(secret.secret(), label::DIR_ID, b""),
        }
    }

    /// The name of `name` in the directory with this id. The same name always gives the same; two names never do.
    pub fn encode(&self, dir: &DirId, name: &[u8]) -> Encoded {
        let mut sealed = name.to_vec();
        let tag = GcmSiv::seal(&self.names, &nonce(dir), dir.as_bytes(), &mut sealed);
        sealed.extend_from_slice(&tag);
        Encoded::from_text(BASE64URL.encode(&sealed).into_bytes())
    }

    /// The plaintext of an encrypted text, which is at most 255 bytes and passes [`check`].
    ///
    /// # Errors
    /// [`Damage::NameAuth`] for everything that [`NameKeys::encode`] cannot have given for this directory.
    pub fn decode(&self, dir: &DirId, text: &[u8]) -> Result<Vec<u8>, Damage> {
        if text.len() > TEXT_MAX {
            return Err(Damage::NameAuth);
        }
        let mut sealed = BASE64URL.decode(text).map_err(|_| Damage::NameAuth)?;
        let (_, tag) = sealed.split_last_chunk::<TAG_LEN>().ok_or(Damage::NameAuth)?;
        let tag = *tag;
        sealed.truncate(sealed.len() - TAG_LEN);
        GcmSiv::open(&self.names, &nonce(dir), dir.as_bytes(), &tag, &mut sealed).map_err(|_| Damage::NameAuth)?;
        check(&sealed).map_err(|_| Damage::NameAuth)?;
        Ok(sealed)
    }

    /// The plaintext of a long name, given what its sidecar holds.
    ///
    /// # Errors
    /// [`Damage::NameSidecar`] if the text is not this long name's; [`Damage::NameAuth`] if it does not authenticate.
    pub fn decode_long(&self, dir: &DirId, long: &[u8], text: &[u8]) -> Result<Vec<u8>, Damage> {
        if text.len() <= NAME_MAX || text.len() > TEXT_MAX || long_name(text) != long {
            return Err(Damage::NameSidecar);
        }
        self.decode(dir, text)
    }

    /// The sealed form of a directory id: nonce, ciphertext, tag.
    pub fn seal_dir_id(&self, id: &DirId) -> Vec<u8> {
        GcmSiv::seal_random(&self.dir_ids, b"", id.as_bytes())
    }

    /// Reverses [`NameKeys::seal_dir_id`].
    ///
    /// # Errors
    /// [`Damage::DirIdAuth`].
    pub fn open_dir_id(&self, sealed: &[u8]) -> Result<DirId, Damage> {
        let plain = GcmSiv::open_random(&self.dir_ids, b"", sealed).map_err(|_| Damage::DirIdAuth)?;
        Ok(DirId(plain.as_slice().try_into().map_err(|_| Damage::DirIdAuth)?))
    }
}

/// The nonce of a directory's names. A nonce used again under GCM-SIV tells only which messages are equal, and equal
/// names do not exist in one directory.
fn nonce(dir: &DirId) -> Nonce {
    let mut n = [0u8; NONCE_LEN];
    n.copy_from_slice(&dir.as_bytes()[..NONCE_LEN]);
    n
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys() -> NameKeys {
        NameKeys::new(&StoreSecret::from_secret(Secret32::build(|k| k.fill(7))))
    }

    const D: DirId = DirId([9; 16]);

    fn decode(k: &NameKeys, dir: &DirId, e: &Encoded) -> Result<Vec<u8>, Damage> {
        match e {
            Encoded::Short(t) => k.decode(dir, t),
            Encoded::Long { content, text, .. } => k.decode_long(dir, content, text),
        }
    }

    #[test]
    fn names_of_up_to_175_bytes_are_short() {
        let k = keys();
        for len in 1..=NAME_MAX {
            let name = vec![b'x'; len];
            let e = k.encode(&D, &name);
            assert_eq!(matches!(e, Encoded::Short(_)), len <= 175, "{len}");
            assert!(
                e.content().len() <= NAME_MAX && e.sidecar().is_none_or(|(s, t)| s.len() < 255 && t.len() <= TEXT_MAX)
            );
            assert_eq!(decode(&k, &D, &e).unwrap(), name);
            assert_eq!(classify(e.content()), if len <= 175 { Listed::Short } else { Listed::Long });
            if let Some((s, _)) = e.sidecar() {
                assert_eq!(classify(s), Listed::Sidecar);
            }
        }
    }

    #[test]
    fn what_cannot_be_a_name() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0", &[0]] {
            assert_eq!(check(bad), Err(NameFault::Invalid), "{bad:?}");
        }
        assert_eq!(check(&[b'a'; 256]), Err(NameFault::TooLong));
        for good in [&b"..."[..], b"a", b".a", &[0xff; 255], b".envelopefs"] {
            assert_eq!(check(good), Ok(()), "{good:?}");
        }
    }

    #[test]
    fn a_sealed_name_that_is_none_is_refused() {
        let k = keys();
        for bad in [&b""[..], b"..", b"a/b", &[b'a'; 256]] {
            let mut sealed = bad.to_vec();
            let tag = GcmSiv::seal(&k.names, &nonce(&D), D.as_bytes(), &mut sealed);
            sealed.extend_from_slice(&tag);
            assert_eq!(k.decode(&D, BASE64URL.encode(&sealed).as_bytes()), Err(Damage::NameAuth));
        }
    }

    #[test]
    fn a_text_has_one_spelling() {
        let k = keys();
        let Encoded::Short(text) = k.encode(&D, b"abc") else { panic!() };
        // 19 bytes leave two bits of the last character unused.
        let mut other = text.clone();
        let last = other.last_mut().unwrap();
        *last = *b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
            .iter()
            .find(|c| **c != *last && BASE64URL.decode([&text[..text.len() - 1], &[**c]].concat()).is_err())
            .unwrap();
        assert_eq!(k.decode(&D, &other), Err(Damage::NameAuth));
        assert_eq!(k.decode(&D, &[&text[..], b"="].concat()), Err(Damage::NameAuth));
    }

    #[test]
    fn reserved_names_are_sorted() {
        assert_eq!(classify(b".envelopefs.dir"), Listed::DirId);
        assert_eq!(classify(b".envelopefs"), Listed::Reserved);
        assert_eq!(classify(b".envelopefs.long.short"), Listed::Reserved);
        assert_eq!(classify(b".envelopefs.new.00"), Listed::Unfinished);
        assert_eq!(classify(b".envelope"), Listed::Short);
    }

    #[test]
    fn directory_ids_are_authenticated() {
        let k = keys();
        let sealed = k.seal_dir_id(&D);
        assert_eq!(sealed.len(), SEALED_DIR_ID_LEN);
        assert_eq!(k.open_dir_id(&sealed), Ok(D));
        for i in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[i] ^= 1;
            assert_eq!(k.open_dir_id(&bad), Err(Damage::DirIdAuth), "byte {i}");
            assert_eq!(k.open_dir_id(&sealed[..i]), Err(Damage::DirIdAuth), "length {i}");
        }
    }

    proptest! {
        #[test]
        fn every_name_comes_back_and_only_where_it_was(
            a in prop::collection::vec(any::<u8>().prop_filter("legal", |c| *c != 0 && *c != b'/'), 1..=255),
            b in prop::collection::vec(any::<u8>().prop_filter("legal", |c| *c != 0 && *c != b'/'), 1..=255),
        ) {
            prop_assume!(check(&a).is_ok() && check(&b).is_ok());
            let k = keys();
            let (ea, eb) = (k.encode(&D, &a), k.encode(&D, &b));
            prop_assert_eq!(&ea, &k.encode(&D, &a));
            prop_assert_eq!(ea.content() == eb.content(), a == b);
            prop_assert_eq!(decode(&k, &D, &ea), Ok(a.clone()));
            let other = DirId([8; 16]);
            prop_assert!(decode(&k, &other, &ea).is_err());
            prop_assert!(k.encode(&other, &a) != ea);
        }

        #[test]
        fn no_bytes_make_it_panic(text in prop::collection::vec(any::<u8>(), 0..600)) {
            let k = keys();
            prop_assert!(k.decode(&D, &text).is_err());
            prop_assert!(k.decode_long(&D, &text, &text).is_err());
            prop_assert!(k.open_dir_id(&text).is_err());
            let _ = classify(&text);
            let b64 = BASE64URL.encode(&text).into_bytes();
            prop_assert!(k.decode(&D, &b64).is_err());
        }
    }
}
