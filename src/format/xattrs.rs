//! Extended attributes: names and values ↔ what stands on the backing inode.
//!
//! `user.NAME` becomes `user.envelopefs.` and the base64url text of the full name sealed deterministically; the same
//! for `trusted.` and `security.`. A backing name that would pass 255 bytes is `user.envelopefs.L.` and a hash of the
//! text instead (`.` is not in base64url's alphabet), and the value then carries the real name. POSIX ACLs stay in
//! clear: the backing file system must see them.

use super::damage::Damage;
use super::names::NAME_MAX;
use crate::crypto::aead::{GcmSiv, NONCE_LEN, TAG_LEN};
use crate::crypto::kdf::{self, label};
use crate::crypto::secret::{Secret32, StoreSecret};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;

/// Longest attribute name, in bytes, plaintext and backing.
pub const XATTR_NAME_MAX: usize = 255;
/// Longest value the kernel passes on, in bytes.
pub const XATTR_VALUE_MAX: usize = 65536;
/// Namespaces whose attributes are encrypted.
const NAMESPACES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
const MARK: &[u8] = b"envelopefs.";
const LONG_MARK: &[u8] = b"L.";
/// Attributes that stay in clear.
const CLEAR: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

/// How an attribute is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum XattrName {
    /// Under its own name and in clear.
    Clear,
    /// Encrypted, under this name; the value carries the real name if `long`.
    Sealed { backing: Vec<u8>, long: bool },
    /// Not stored: another namespace.
    Unsupported,
}

/// What a name found on a backing inode is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FoundXattr {
    /// An attribute with this name.
    Plain(Vec<u8>),
    /// An attribute whose name stands in its value.
    InValue,
    /// Not of this store's making.
    Foreign,
}

/// The keys of extended attributes.
pub struct XattrKeys {
    names: Secret32,
    values: Secret32,
}

impl XattrKeys {
    /// Derives them from the store secret.
    pub fn new(secret: &StoreSecret) -> Self {
        Self {
            names: kdf::derive(secret.secret(), label::XATTR_NAME, b""),
            values: kdf::derive(secret.secret(), label::XATTR_VALUE, b""),
        }
    }

    /// How the attribute `name` (at most 255 bytes) is stored.
    pub fn encode_name(&self, name: &[u8]) -> XattrName {
        if CLEAR.contains(&name) {
            return XattrName::Clear;
        }
        let Some(ns) = NAMESPACES.iter().find(|ns| name.starts_with(ns) && name.len() > ns.len()) else {
            return XattrName::Unsupported;
        };
        let mut sealed = name.to_vec();
        let tag = GcmSiv::seal(&self.names, &[0; NONCE_LEN], b"", &mut sealed);
        sealed.extend_from_slice(&tag);
        let text = BASE64URL.encode(&sealed).into_bytes();
        if ns.len() + MARK.len() + text.len() <= NAME_MAX {
            return XattrName::Sealed { backing: [ns, MARK, &text].concat(), long: false };
        }
        let hash = BASE64URL.encode(kdf::sha256(&text)).into_bytes();
        XattrName::Sealed { backing: [ns, MARK, LONG_MARK, &hash].concat(), long: true }
    }

    /// Sorts a name found on a backing inode.
    pub fn decode_name(&self, backing: &[u8]) -> FoundXattr {
        if CLEAR.contains(&backing) {
            return FoundXattr::Plain(backing.to_vec());
        }
        let text = NAMESPACES.iter().find_map(|ns| backing.strip_prefix(*ns)).and_then(|r| r.strip_prefix(MARK));
        match text {
            None => FoundXattr::Foreign,
            Some(t) if t.starts_with(LONG_MARK) => FoundXattr::InValue,
            Some(t) => self
                .open_name(t)
                .filter(|n| self.is_stored_as(n, backing))
                .map_or(FoundXattr::Foreign, FoundXattr::Plain),
        }
    }

    fn open_name(&self, text: &[u8]) -> Option<Vec<u8>> {
        let mut sealed = BASE64URL.decode(text).ok()?;
        let (_, tag) = sealed.split_last_chunk::<TAG_LEN>()?;
        let tag = *tag;
        sealed.truncate(sealed.len() - TAG_LEN);
        GcmSiv::open(&self.names, &[0; NONCE_LEN], b"", &tag, &mut sealed).ok()?;
        Some(sealed)
    }

    /// Whether `name` stored by this program goes by `backing`: an attribute moved to another namespace does not.
    fn is_stored_as(&self, name: &[u8], backing: &[u8]) -> bool {
        name.len() <= XATTR_NAME_MAX
            && matches!(self.encode_name(name), XattrName::Sealed { backing: b, .. } if b == backing)
    }

    /// Seals a value. `backing` and `long` as [`XattrKeys::encode_name`] gave them for `name`.
    pub fn seal_value(&self, backing: &[u8], long: bool, name: &[u8], value: &[u8]) -> Vec<u8> {
        if !long {
            return GcmSiv::seal_random(&self.values, backing, value);
        }
        let mut plain = Vec::with_capacity(2 + name.len() + value.len());
        plain.extend_from_slice(&(name.len() as u16).to_le_bytes());
        plain.extend_from_slice(name);
        plain.extend_from_slice(value);
        GcmSiv::seal_random(&self.values, backing, &plain)
    }

    /// The value, and the real name if it stands in there.
    ///
    /// # Errors
    /// [`Damage::XattrAuth`] if the value does not authenticate or carries another attribute's name.
    pub fn open_value(&self, backing: &[u8], long: bool, sealed: &[u8]) -> Result<(Option<Vec<u8>>, Vec<u8>), Damage> {
        let plain = GcmSiv::open_random(&self.values, backing, sealed).map_err(|_| Damage::XattrAuth)?;
        if !long {
            return Ok((None, plain));
        }
        let (len, rest) = plain.split_first_chunk::<2>().ok_or(Damage::XattrAuth)?;
        let (name, value) = rest.split_at_checked(u16::from_le_bytes(*len) as usize).ok_or(Damage::XattrAuth)?;
        if !self.is_stored_as(name, backing) {
            return Err(Damage::XattrAuth);
        }
        Ok((Some(name.to_vec()), value.to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys() -> XattrKeys {
        XattrKeys::new(&StoreSecret::from_secret(Secret32::build(|k| k.fill(7))))
    }

    fn sealed(k: &XattrKeys, name: &[u8]) -> (Vec<u8>, bool) {
        match k.encode_name(name) {
            XattrName::Sealed { backing, long } => (backing, long),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn namespaces() {
        let k = keys();
        for name in CLEAR {
            assert_eq!(k.encode_name(name), XattrName::Clear);
            assert_eq!(k.decode_name(name), FoundXattr::Plain(name.to_vec()));
        }
        for name in [&b"user."[..], b"", b"system.nfs4_acl", b"com.apple.x", b"user"] {
            assert_eq!(k.encode_name(name), XattrName::Unsupported);
        }
        for name in [&b"user.foo"[..], b"security.selinux", b"user.envelopefs.AAAA", b"user.envelopefs."] {
            assert_eq!(k.decode_name(name), FoundXattr::Foreign);
        }
    }

    #[test]
    fn an_attribute_stays_in_its_namespace_and_under_its_name() {
        let k = keys();
        let (user, _) = sealed(&k, b"user.a");
        let moved = [b"trusted.", user.strip_prefix(b"user.").unwrap()].concat();
        assert_eq!(k.decode_name(&moved), FoundXattr::Foreign);
        let value = k.seal_value(&user, false, b"user.a", b"v");
        assert_eq!(k.open_value(&user, false, &value), Ok((None, b"v".to_vec())));
        let (other, _) = sealed(&k, b"user.b");
        assert_eq!(k.open_value(&other, false, &value), Err(Damage::XattrAuth));
        assert_eq!(k.open_value(&user, false, &value[..27]), Err(Damage::XattrAuth));
    }

    proptest! {
        #[test]
        fn every_name_and_value_comes_back(
            ns in prop::sample::select(NAMESPACES.to_vec()),
            rest in prop::collection::vec(1u8.., 1..=244),
            value in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let k = keys();
            let name = [ns, &rest[..]].concat();
            let (backing, long) = sealed(&k, &name);
            prop_assert!(backing.len() <= XATTR_NAME_MAX && backing.starts_with(ns));
            let v = k.seal_value(&backing, long, &name, &value);
            let (inside, plain) = k.open_value(&backing, long, &v).unwrap();
            prop_assert_eq!(plain, value);
            match k.decode_name(&backing) {
                FoundXattr::Plain(n) => prop_assert!(!long && n == name && inside.is_none()),
                FoundXattr::InValue => prop_assert!(long && inside == Some(name)),
                FoundXattr::Foreign => prop_assert!(false),
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let k = keys();
            for long in [false, true] {
                prop_assert!(k.open_value(b"user.envelopefs.x", long, &bytes).is_err());
            }
            let text = BASE64URL.encode(&bytes);
            prop_assert_eq!(k.decode_name(&[b"user.envelopefs.", text.as_bytes()].concat()), FoundXattr::Foreign);
            // A value that carries nonsense under a good seal.
            let v = GcmSiv::seal_random(&k.values, b"n", &bytes);
            prop_assert_eq!(k.open_value(b"n", true, &v), Err(Damage::XattrAuth));
        }
    }
}
