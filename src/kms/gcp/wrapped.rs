//! The bytes that `gcp-kms:` root keys leave in a keyring or a header, as in docs/FORMAT.md section 4.3:
//! version (1) ‖ reserved (3) ‖ number of the key version (8) ‖ ciphertext as the service returned it.
//!
//! The number is not authenticated, and nothing but "is a re-wrap due" depends on it: the service finds the key version
//! by the ciphertext itself.

use crate::kms::WRAPPED_MAX;

const LAYOUT: u8 = 1;
const HEAD: usize = 12;
/// Longest ciphertext that fits, in bytes.
pub const CIPHERTEXT_MAX: usize = WRAPPED_MAX - HEAD;

/// What was wrapped, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wrapped<'a> {
    /// Number of the cryptoKeyVersion that made it, from 1.
    pub version: u64,
    /// Not empty.
    pub ciphertext: &'a [u8],
}

impl<'a> Wrapped<'a> {
    /// Takes `bytes` apart; `None` if they are not of this layout.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (head, ciphertext) = bytes.split_first_chunk::<HEAD>()?;
        let (&[LAYOUT, 0, 0, 0], number) = head.split_first_chunk::<4>()? else { return None };
        let version = u64::from_le_bytes(number.try_into().ok()?);
        let fits = (1..=CIPHERTEXT_MAX).contains(&ciphertext.len());
        (version != 0 && fits).then_some(Self { version, ciphertext })
    }

    /// The bytes; `None` if [`Wrapped::parse`] would refuse them.
    pub fn to_bytes(self) -> Option<Vec<u8>> {
        let mut v = vec![LAYOUT, 0, 0, 0];
        v.extend_from_slice(&self.version.to_le_bytes());
        v.extend_from_slice(self.ciphertext);
        let readable = Wrapped::parse(&v).is_some_and(|w| w == self);
        readable.then_some(v)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_layout_is_as_documented() {
        let w = Wrapped { version: 0x0102_0304_0506_0708, ciphertext: b"xyz" };
        let bytes = [1, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1, b'x', b'y', b'z'];
        assert_eq!(w.to_bytes().unwrap(), bytes);
        assert_eq!(Wrapped::parse(&bytes), Some(w));
    }

    #[test]
    fn what_is_not_of_this_layout_is_refused() {
        let good = Wrapped { version: 7, ciphertext: &[9; CIPHERTEXT_MAX] }.to_bytes().unwrap();
        assert_eq!(good.len(), WRAPPED_MAX);
        for n in 0..=HEAD {
            assert_eq!(Wrapped::parse(&good[..n]), None, "{n}");
        }
        for (at, value) in [(0, 0), (0, 2), (1, 1), (2, 1), (3, 1), (4, 0)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(Wrapped::parse(&bad), None, "{at}");
        }
        assert_eq!(Wrapped::parse(&[&good[..], &[0]].concat()), None);
        assert_eq!(Wrapped { version: 0, ciphertext: b"x" }.to_bytes(), None);
        assert_eq!(Wrapped { version: 1, ciphertext: b"" }.to_bytes(), None);
        assert_eq!(Wrapped { version: 1, ciphertext: &[1; CIPHERTEXT_MAX + 1] }.to_bytes(), None);
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_writing_reverses_it(bytes in proptest::collection::vec(any::<u8>(), 0..700)) {
            if let Some(w) = Wrapped::parse(&bytes) {
                prop_assert_eq!(w.to_bytes(), Some(bytes.clone()));
            }
            let mut headed = vec![1, 0, 0, 0];
            headed.extend(&bytes);
            if let Some(w) = Wrapped::parse(&headed) {
                prop_assert_eq!(w.to_bytes(), Some(headed.clone()));
            }
        }
    }
}
