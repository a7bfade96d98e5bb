//! The wrapped form that `pkcs11:` root keys make, at most 640 bytes:
//!
//! | offset | length | field |
//! |---|---|---|
//! | 0 | 1 | version: 1 |
//! | 1 | 1 | mechanism: 1 CKM_AES_GCM, 2 CKM_AES_KEY_WRAP_PAD, 3 CKM_AES_KEY_WRAP, 4 CKM_RSA_PKCS_OAEP with SHA-256, 5 with SHA-1 |
//! | 2 | 1 | n, length of the key's CKA_ID: 1…64 |
//! | 3 | 1 | reserved |
//! | 4 | n | CKA_ID of the key on the token |
//! | 4 + n | 12 | IV, mechanism 1 only |
//! | … | 48, 72, or 256…512 | ciphertext: of mechanism 1, of 2 and 3, of 4 and 5 |
//!
//! Mechanism 1 encrypts the key (32) with the context as associated data and a tag of 128 bits, which follows the
//! encrypted key. The others wrap key (32) ‖ SHA-256(context) (32), and the second half is compared after unwrapping.

use super::mechanism::{ID_MAX, Method};
use crate::format::codec::{Malformed, Reader, Writer};

const VERSION: u8 = 1;
const HEAD: usize = 4;

/// A wrapped key, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrapped<'a> {
    pub method: Method,
    /// CKA_ID of the key that wrapped it.
    pub id: &'a [u8],
    /// Empty where the mechanism has none.
    pub iv: &'a [u8],
    pub ciphertext: &'a [u8],
}

impl<'a> Wrapped<'a> {
    /// Takes it apart. Safe with any bytes.
    ///
    /// # Errors
    /// [`Malformed`] if they are not of this layout.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        if r.u8()? != VERSION {
            return Err(Malformed);
        }
        let method = Method::from_code(r.u8()?).ok_or(Malformed)?;
        let n = usize::from(r.u8()?);
        r.zeros(1)?;
        if !(1..=ID_MAX).contains(&n) {
            return Err(Malformed);
        }
        let (id, iv) = (r.take(n)?, r.take(method.iv_len())?);
        let (min, max) = method.ciphertext_len();
        let ciphertext = r.take(r.remaining())?;
        if !(min..=max).contains(&ciphertext.len()) {
            return Err(Malformed);
        }
        Ok(Self { method, id, iv, ciphertext })
    }

    /// Puts it together.
    ///
    /// # Errors
    /// [`Malformed`] if a part is too short or too long.
    pub fn encode(&self) -> Result<Vec<u8>, Malformed> {
        let mut out = vec![0u8; HEAD + self.id.len() + self.iv.len() + self.ciphertext.len()];
        let mut w = Writer::new(&mut out);
        w.u8(VERSION)?;
        w.u8(self.method.code())?;
        w.u8(u8::try_from(self.id.len()).map_err(|_| Malformed)?)?;
        w.zeros(1)?;
        w.put(self.id)?;
        w.put(self.iv)?;
        w.put(self.ciphertext)?;
        w.finish()?;
        // Never write what could not be read.
        Wrapped::decode(&out)?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::super::mechanism::METHODS;
    use super::*;
    use crate::kms::WRAPPED_MAX;
    use proptest::prelude::*;

    #[test]
    fn the_layout_is_as_documented() {
        let w = Wrapped { method: Method::AesGcm, id: &[0xa1, 0xa2], iv: &[3; 12], ciphertext: &[4; 48] };
        let bytes = w.encode().unwrap();
        assert_eq!(bytes, [&[1, 1, 2, 0, 0xa1, 0xa2][..], &[3; 12], &[4; 48]].concat());
        assert_eq!(Wrapped::decode(&bytes), Ok(w));
        let w = Wrapped { method: Method::AesKeyWrapPad, id: &[7], iv: &[], ciphertext: &[4; 72] };
        assert_eq!(w.encode().unwrap(), [&[1, 2, 1, 0, 7][..], &[4; 72]].concat());
    }

    #[test]
    fn the_longest_fits_into_a_header_slot() {
        for method in METHODS {
            let (_, max) = method.ciphertext_len();
            let (iv, ciphertext) = (vec![1; method.iv_len()], vec![1; max]);
            let w = Wrapped { method, id: &[1; ID_MAX], iv: &iv, ciphertext: &ciphertext };
            assert!(w.encode().unwrap().len() <= WRAPPED_MAX);
        }
    }

    #[test]
    fn what_is_out_of_bounds_is_not_written_and_not_read() {
        let good = Wrapped { method: Method::AesGcm, id: &[1], iv: &[2; 12], ciphertext: &[3; 48] };
        for bad in [
            Wrapped { id: &[], ..good.clone() },
            Wrapped { id: &[1; ID_MAX + 1], ..good.clone() },
            Wrapped { id: &[1; 300], ..good.clone() },
            Wrapped { ciphertext: &[3; 49], ..good.clone() },
            Wrapped { iv: &[2; 11], ..good.clone() },
            Wrapped { method: Method::AesKeyWrap, ..good.clone() },
            Wrapped { method: Method::RsaOaepSha1, iv: &[], ciphertext: &[3; 513], ..good.clone() },
        ] {
            assert_eq!(bad.encode(), Err(Malformed), "{bad:?}");
        }
        let bytes = good.encode().unwrap();
        for (at, value) in [(0, 0), (0, 2), (1, 0), (1, 6), (2, 0), (2, 2), (3, 1)] {
            let mut bad = bytes.clone();
            bad[at] = value;
            assert_eq!(Wrapped::decode(&bad), Err(Malformed), "byte {at} = {value}");
        }
        assert_eq!(Wrapped::decode(&bytes[..bytes.len() - 1]), Err(Malformed));
        assert_eq!(Wrapped::decode(&[&bytes[..], &[0]].concat()), Err(Malformed));
    }

    proptest! {
        #[test]
        fn any_bytes_are_safe_and_have_one_spelling(
            head in prop_oneof![Just(vec![]), (0u8..3, 0u8..8, 0u8..70, 0u8..2).prop_map(|(a, b, c, d)| vec![a, b, c, d])],
            rest in proptest::collection::vec(any::<u8>(), 0..620),
        ) {
            let bytes = [head, rest].concat();
            if let Ok(w) = Wrapped::decode(&bytes) {
                prop_assert_eq!(w.encode().unwrap(), bytes);
            }
        }

        #[test]
        fn what_is_written_is_read(code in 1u8..6, id in proptest::collection::vec(any::<u8>(), 1..=ID_MAX), fill: u8, extra in 0usize..257) {
            let method = Method::from_code(code).unwrap();
            let (min, max) = method.ciphertext_len();
            let (iv, ciphertext) = (vec![fill; method.iv_len()], vec![fill; (min + extra).min(max)]);
            let w = Wrapped { method, id: &id, iv: &iv, ciphertext: &ciphertext };
            let bytes = w.encode().unwrap();
            prop_assert_eq!(Wrapped::decode(&bytes), Ok(w));
        }
    }
}
