//! How a key on a token wraps, and whether it is fit to. Decides only.

use super::matching::{Kind, escaped};
use crate::kms::services::Pkcs11Options;

/// A way to wrap. The number is what a wrapped key records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// CKM_AES_GCM with a 96-bit IV and a 128-bit tag; the context is its associated data.
    AesGcm = 1,
    /// CKM_AES_KEY_WRAP_PAD (RFC 5649).
    AesKeyWrapPad = 2,
    /// CKM_AES_KEY_WRAP (RFC 3394).
    AesKeyWrap = 3,
    /// CKM_RSA_PKCS_OAEP with SHA-256.
    RsaOaepSha256 = 4,
    /// CKM_RSA_PKCS_OAEP with SHA-1, which is all that some tokens can do. OAEP needs no collision resistance.
    RsaOaepSha1 = 5,
}

/// All of them, the best first.
pub const METHODS: [Method; 5] =
    [Method::AesGcm, Method::AesKeyWrapPad, Method::AesKeyWrap, Method::RsaOaepSha256, Method::RsaOaepSha1];

impl Method {
    /// The number in a wrapped key.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The one with this number.
    pub fn from_code(code: u8) -> Option<Self> {
        METHODS.into_iter().find(|m| m.code() == code)
    }

    /// What kind of key it needs.
    pub fn kind(self) -> Kind {
        match self {
            Self::AesGcm | Self::AesKeyWrapPad | Self::AesKeyWrap => Kind::Aes,
            Self::RsaOaepSha256 | Self::RsaOaepSha1 => Kind::Rsa,
        }
    }

    /// Whether the context is authenticated by the mechanism. If not, its hash is wrapped along with the key.
    pub fn has_associated_data(self) -> bool {
        self == Self::AesGcm
    }

    /// Bytes of the initialisation vector.
    pub fn iv_len(self) -> usize {
        if self == Self::AesGcm { 12 } else { 0 }
    }

    /// Fewest and most bytes of the ciphertext.
    pub fn ciphertext_len(self) -> (usize, usize) {
        match self {
            // The key and a tag.
            Self::AesGcm => (48, 48),
            // The key, the hash of the context, and one block of 8 bytes.
            Self::AesKeyWrapPad | Self::AesKeyWrap => (72, 72),
            // As long as the modulus.
            Self::RsaOaepSha256 | Self::RsaOaepSha1 => (RSA_BITS_MIN / 8, RSA_BITS_MAX / 8),
        }
    }

    /// Whether it encrypts and decrypts data; if not, it wraps and unwraps key objects.
    pub fn is_cipher(self) -> bool {
        !matches!(self, Self::AesKeyWrapPad | Self::AesKeyWrap)
    }
}

/// Smallest and largest RSA modulus in bits: what is strong enough, and what fits into a header slot.
pub const RSA_BITS_MIN: usize = 2048;
/// See [`RSA_BITS_MIN`].
pub const RSA_BITS_MAX: usize = 4096;
/// Longest CKA_ID in bytes: the wrapped key records it, and with it must fit into a header slot.
pub const ID_MAX: usize = 64;

/// What a token says of a key. `None`: it does not say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyFacts {
    pub id: Vec<u8>,
    pub label: Vec<u8>,
    /// Length of the AES key or RSA modulus.
    pub bits: usize,
    pub extractable: Option<bool>,
    pub never_extractable: Option<bool>,
    pub sensitive: Option<bool>,
    pub always_sensitive: Option<bool>,
    pub always_authenticate: Option<bool>,
    pub encrypt: Option<bool>,
    pub decrypt: Option<bool>,
    pub wrap: Option<bool>,
    pub unwrap: Option<bool>,
}

/// Why a key must not be a root key, and what to do about it; `None` if it may.
pub fn refusal(kind: Kind, k: &KeyFacts, o: &Pkcs11Options) -> Option<String> {
    let yes = Some(true);
    if kind == Kind::Rsa && !o.allow_rsa {
        let why = "it is an RSA key, under which whoever has the public half can make wraps";
        return Some(format!("{why}; use an AES key, or set allow_rsa = true in [services.pkcs11]"));
    }
    if k.extractable != Some(false) {
        return Some("it is extractable (CKA_EXTRACTABLE); make a key that cannot leave the token".into());
    }
    if k.sensitive != yes {
        return Some("its value can be read (CKA_SENSITIVE is not set); make a sensitive key".into());
    }
    if !o.allow_extractable && (k.never_extractable != yes || k.always_sensitive != yes) {
        let why =
            "it could be read or extracted once (CKA_NEVER_EXTRACTABLE, CKA_ALWAYS_SENSITIVE), so copies may exist";
        let what = "generate it on the token; for one imported on purpose set allow_extractable = true";
        return Some(format!("{why}; {what} in [services.pkcs11]"));
    }
    if k.always_authenticate == yes {
        return Some("it wants the PIN with every use (CKA_ALWAYS_AUTHENTICATE); make a key without that".into());
    }
    match kind {
        Kind::Aes if k.bits != 256 => return Some(format!("it has {} bits; make an AES key of 256", k.bits)),
        Kind::Rsa if !(RSA_BITS_MIN..=RSA_BITS_MAX).contains(&k.bits) => {
            return Some(format!("it has {} bits; make an RSA key of {RSA_BITS_MIN} to {RSA_BITS_MAX}", k.bits));
        }
        _ => {}
    }
    match k.id.len() {
        0 => Some("it has no CKA_ID; give it one, by which wraps find it again after a rotation".into()),
        1..=ID_MAX => None,
        n => Some(format!("its CKA_ID has {n} bytes; give it one of at most {ID_MAX}")),
    }
}

/// What a key of this kind could wrap with, the best first: what the token `offers` and the key allows. For RSA the key is
/// the private half, which cannot say whether the public one encrypts.
pub fn candidates(kind: Kind, k: &KeyFacts, offers: impl Fn(Method) -> bool) -> Vec<Method> {
    let yes = Some(true);
    let allowed = |m: Method| match (m.kind(), m.is_cipher()) {
        (Kind::Aes, true) => k.encrypt == yes && k.decrypt == yes,
        (Kind::Aes, false) => k.wrap == yes && k.unwrap == yes,
        (Kind::Rsa, _) => k.decrypt == yes,
    };
    METHODS.into_iter().filter(|m| m.kind() == kind && allowed(*m) && offers(*m)).collect()
}

/// A key in a message.
pub fn named(id: &[u8], kind: Kind) -> String {
    format!("key id={};type={}", escaped(id), kind.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> KeyFacts {
        KeyFacts {
            id: vec![1],
            label: b"k".to_vec(),
            bits: 256,
            extractable: Some(false),
            never_extractable: Some(true),
            sensitive: Some(true),
            always_sensitive: Some(true),
            always_authenticate: Some(false),
            encrypt: Some(true),
            decrypt: Some(true),
            wrap: Some(true),
            unwrap: Some(true),
        }
    }

    #[test]
    fn only_a_key_that_cannot_leave_the_token_is_a_root_key() {
        let strict = Pkcs11Options::default();
        let imports = Pkcs11Options { allow_extractable: true, ..Default::default() };
        let with = |f: &dyn Fn(&mut KeyFacts)| {
            let mut k = good();
            f(&mut k);
            k
        };
        // What is changed, whether it is refused, whether it is refused where imported keys are taken.
        type Row<'a> = (&'a dyn Fn(&mut KeyFacts), Option<&'a str>, Option<&'a str>);
        let rows: [Row; 13] = [
            (&|_| {}, None, None),
            (&|k| k.extractable = Some(true), Some("CKA_EXTRACTABLE"), Some("CKA_EXTRACTABLE")),
            (&|k| k.extractable = None, Some("CKA_EXTRACTABLE"), Some("CKA_EXTRACTABLE")),
            (&|k| k.sensitive = Some(false), Some("CKA_SENSITIVE"), Some("CKA_SENSITIVE")),
            (&|k| k.sensitive = None, Some("CKA_SENSITIVE"), Some("CKA_SENSITIVE")),
            (&|k| k.never_extractable = Some(false), Some("CKA_NEVER_EXTRACTABLE"), None),
            (&|k| k.always_sensitive = None, Some("CKA_ALWAYS_SENSITIVE"), None),
            (&|k| k.always_authenticate = Some(true), Some("PIN with every use"), Some("PIN with every use")),
            (&|k| k.always_authenticate = None, None, None),
            (&|k| k.bits = 128, Some("AES key of 256"), Some("AES key of 256")),
            (&|k| k.id = vec![], Some("no CKA_ID"), Some("no CKA_ID")),
            (&|k| k.id = vec![1; ID_MAX], None, None),
            (&|k| k.id = vec![1; ID_MAX + 1], Some("at most 64"), Some("at most 64")),
        ];
        for (n, (change, refused, import)) in rows.into_iter().enumerate() {
            for (o, says) in [(&strict, refused), (&imports, import)] {
                let r = refusal(Kind::Aes, &with(change), o);
                assert_eq!(r.is_some(), says.is_some(), "{n}: {r:?}");
                assert!(r.unwrap_or_default().contains(says.unwrap_or_default()), "{n}");
            }
        }
    }

    #[test]
    fn rsa_has_to_be_allowed_and_long_enough() {
        let o = Pkcs11Options { allow_rsa: true, ..Default::default() };
        let rsa = |bits| KeyFacts { bits, ..good() };
        assert!(refusal(Kind::Rsa, &rsa(2048), &Pkcs11Options::default()).unwrap().contains("allow_rsa"));
        for (bits, refused) in [(1024, true), (2048, false), (3072, false), (4096, false), (8192, true)] {
            assert_eq!(refusal(Kind::Rsa, &rsa(bits), &o).is_some(), refused, "{bits}");
        }
    }

    #[test]
    fn the_best_mechanism_that_token_and_key_allow_is_tried_first() {
        use Method::{AesGcm, AesKeyWrap, AesKeyWrapPad, RsaOaepSha1, RsaOaepSha256};
        let all = |_: Method| true;
        assert_eq!(candidates(Kind::Aes, &good(), all), [AesGcm, AesKeyWrapPad, AesKeyWrap]);
        assert_eq!(candidates(Kind::Rsa, &good(), all), [RsaOaepSha256, RsaOaepSha1]);
        assert_eq!(candidates(Kind::Aes, &good(), |m| m == AesKeyWrap), [AesKeyWrap]);
        let only_wrap = KeyFacts { encrypt: Some(false), ..good() };
        assert_eq!(candidates(Kind::Aes, &only_wrap, all), [AesKeyWrapPad, AesKeyWrap]);
        let only_cipher = KeyFacts { unwrap: None, ..good() };
        assert_eq!(candidates(Kind::Aes, &only_cipher, all), [AesGcm]);
        assert_eq!(candidates(Kind::Aes, &KeyFacts { decrypt: None, ..only_wrap.clone() }, |m| m == AesGcm), []);
        assert_eq!(candidates(Kind::Rsa, &KeyFacts { decrypt: None, ..good() }, all), []);
    }

    #[test]
    fn numbers_are_for_ever() {
        assert_eq!(METHODS.map(Method::code), [1, 2, 3, 4, 5]);
        assert!((0..=255).filter_map(Method::from_code).eq(METHODS));
    }
}
