//! The bytes of a wrap: `docs/FORMAT.md`, section 4.3.
//!
//! ```text
//! offset  length  field
//!      0       1  version: 1
//!      1       1  a: length of the key's ARN, 1…255
//!      2       1  m: length of the key material's id, 0…255; 0 if it is not known
//!      3       1  reserved: 0
//!      4       a  ARN of the key, as the service named it in its answer; never an alias
//!    4+a       m  id of the key material: ASCII letters and digits
//!  4+a+m    rest  what the service returned as CiphertextBlob, at least 1 byte
//! ```
//!
//! None of it but the blob is authenticated: an ARN is believed only if the operator's URI allows it
//! ([`super::arn::Allowed`]), and the id of the key material decides only whether a rewrap is worth its while.

use super::arn::KeyArn;
use crate::kms::WRAPPED_MAX;

/// Version of the layout, and with it of the encryption context ([`super::context`]).
const VERSION: u8 = 1;
const HEAD: usize = 4;

/// A wrap in its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrapped<'a> {
    /// The key that made it, as it says.
    pub key: KeyArn,
    /// The key material that made it, as far as is known.
    pub material: Option<&'a str>,
    /// The service's own bytes.
    pub blob: &'a [u8],
}

/// Whether `text` can stand in a wrap as the id of key material.
fn is_material(text: &str) -> bool {
    (1..=usize::from(u8::MAX)).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

impl<'a> Wrapped<'a> {
    /// Its bytes, at most [`WRAPPED_MAX`]. An id of key material that does not fit is left out: it is a hint. `None` if
    /// the rest does not fit either.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let arn = self.key.to_string();
        let room = WRAPPED_MAX.checked_sub(HEAD + arn.len() + self.blob.len())?;
        let material = self.material.filter(|m| is_material(m) && m.len() <= room).unwrap_or_default();
        let (a, m) = (u8::try_from(arn.len()).ok()?, u8::try_from(material.len()).ok()?);
        let head = [VERSION, a, m, 0];
        (!self.blob.is_empty()).then(|| [&head, arn.as_bytes(), material.as_bytes(), self.blob].concat())
    }

    /// Reads a wrap. `None` if it is not one, or of a newer version.
    pub fn decode(bytes: &'a [u8]) -> Option<Self> {
        let &[VERSION, a, m, 0] = bytes.first_chunk::<HEAD>()? else { return None };
        let (arn, rest) = bytes.get(HEAD..)?.split_at_checked(usize::from(a))?;
        let (material, blob) = rest.split_at_checked(usize::from(m))?;
        let material = std::str::from_utf8(material).ok()?;
        if bytes.len() > WRAPPED_MAX || blob.is_empty() || !(material.is_empty() || is_material(material)) {
            return None;
        }
        let key = KeyArn::parse(std::str::from_utf8(arn).ok()?)?;
        Some(Self { key, material: Some(material).filter(|m| !m.is_empty()), blob })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ARN: &str = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab";

    fn key() -> KeyArn {
        KeyArn::parse(ARN).unwrap()
    }

    #[test]
    fn the_layout_is_as_documented() {
        let w = Wrapped { key: key(), material: Some("ab12"), blob: &[9, 8, 7] }.encode().unwrap();
        assert_eq!(w, [&[1, 52, 4, 0], ARN.as_bytes(), b"ab12", &[9, 8, 7]].concat());
        let w = Wrapped { key: key(), material: None, blob: &[0] }.encode().unwrap();
        assert_eq!(w, [&[1, 52, 0, 0], ARN.as_bytes(), &[0]].concat());
    }

    #[test]
    fn what_does_not_fit_is_left_out_or_refused() {
        let material = "a".repeat(64);
        let room = WRAPPED_MAX - HEAD - ARN.len();
        let encode = |n: usize| {
            let blob = vec![7; n];
            let bytes = Wrapped { key: key(), material: Some(&material), blob: &blob }.encode()?;
            let known = Wrapped::decode(&bytes).unwrap().material.is_some();
            Some((bytes.len(), known))
        };
        assert_eq!(encode(room - 64), Some((WRAPPED_MAX, true)));
        assert_eq!(encode(room - 63), Some((WRAPPED_MAX - 63, false)));
        assert_eq!(encode(room), Some((WRAPPED_MAX, false)));
        assert_eq!(encode(room + 1), None);
        assert_eq!(encode(0), None);
        // What the service might say one day and the layout cannot hold.
        let odd = Wrapped { key: key(), material: Some("a-b"), blob: &[1] }.encode().unwrap();
        assert_eq!(Wrapped::decode(&odd).unwrap().material, None);
    }

    #[test]
    fn what_is_no_wrap_is_refused() {
        let good = Wrapped { key: key(), material: Some("ab12"), blob: &[9] }.encode().unwrap();
        assert!(Wrapped::decode(&good).is_some());
        for (at, byte) in [(0, 0), (0, 2), (1, 0), (1, 255), (2, 5), (2, 255), (3, 1), (4, b'b'), (57, b'-')] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert_eq!(Wrapped::decode(&bad), None, "byte {at} = {byte}");
        }
        for n in 0..good.len() {
            assert_eq!(Wrapped::decode(&good[..n]), None, "cut to {n}");
        }
        assert_eq!(Wrapped::decode(&[&good[..], &[0; 640]].concat()), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_safe_and_have_one_meaning(
            head in proptest::array::uniform4(any::<u8>()),
            version in prop_oneof![Just(1u8), any::<u8>()],
            rest in proptest::collection::vec(any::<u8>(), 0..700),
        ) {
            let bytes = [&[version, head[1], head[2], 0], &rest[..]].concat();
            if let Some(w) = Wrapped::decode(&bytes) {
                prop_assert_eq!(w.encode().unwrap(), bytes);
            }
        }

        #[test]
        fn what_is_encoded_decodes(
            id in "[a-z0-9-]{1,40}",
            material in proptest::option::of("[a-f0-9]{1,64}"),
            blob in proptest::collection::vec(any::<u8>(), 1..400),
            cut in any::<proptest::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let key = KeyArn::parse(&format!("arn:aws:kms:r-1:1:key/{id}")).unwrap();
            let w = Wrapped { key, material: material.as_deref(), blob: &blob };
            let mut bytes = w.encode().unwrap();
            prop_assert_eq!(Wrapped::decode(&bytes), Some(w));
            let at = cut.index(bytes.len());
            let _ = Wrapped::decode(&bytes[..at]);
            bytes[at] = byte;
            if let Some(changed) = Wrapped::decode(&bytes) {
                prop_assert_eq!(changed.encode().unwrap(), bytes);
            }
        }
    }
}
