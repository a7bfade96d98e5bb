//! Cursors over byte slices, for fixed layouts and for lists with counts. Integers are little-endian.
//!
//! [`Reader`] never reads past its slice and [`Reader::finish`] refuses leftovers; [`Writer`] never writes past its
//! slice and [`Writer::finish`] refuses to leave any byte unwritten. Neither panics on any input.

use super::damage::Damage;

/// The bytes do not follow the layout: too short, too long, a length or count out of bounds, or reserved bytes that
/// are not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("bytes do not follow the layout")]
pub struct Malformed;

impl From<Malformed> for Damage {
    fn from(_: Malformed) -> Self {
        Damage::Malformed
    }
}

/// Result of one step of a cursor.
pub type Result<T> = std::result::Result<T, Malformed>;

/// Reads a slice from its beginning to its end.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// A cursor at the beginning of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Bytes not read yet.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// The next `n` bytes.
    ///
    /// # Errors
    /// [`Malformed`] if fewer are left.
    pub fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(n).ok_or(Malformed)?;
        self.rest = rest;
        Ok(head)
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// [`Malformed`] if fewer are left.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(Malformed)?;
        self.rest = rest;
        Ok(*head)
    }

    /// The next byte.
    ///
    /// # Errors
    /// [`Malformed`] at the end.
    pub fn u8(&mut self) -> Result<u8> {
        self.array().map(|[b]: [u8; 1]| b)
    }

    /// The next two bytes as an integer.
    ///
    /// # Errors
    /// [`Malformed`] if fewer are left.
    pub fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }

    /// The next four bytes as an integer.
    ///
    /// # Errors
    /// [`Malformed`] if fewer are left.
    pub fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next eight bytes as an integer.
    ///
    /// # Errors
    /// [`Malformed`] if fewer are left.
    pub fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Passes over `n` reserved bytes.
    ///
    /// # Errors
    /// [`Malformed`] if fewer are left or one of them is not zero.
    pub fn zeros(&mut self, n: usize) -> Result<()> {
        if self.take(n)?.iter().all(|b| *b == 0) { Ok(()) } else { Err(Malformed) }
    }

    /// Bytes with their length in front as a u16, at least `min` and at most `max` of them.
    ///
    /// # Errors
    /// [`Malformed`] if the length is out of bounds or more than is left.
    pub fn counted(&mut self, min: usize, max: usize) -> Result<&'a [u8]> {
        let n = usize::from(self.u16()?);
        if (min..=max).contains(&n) { self.take(n) } else { Err(Malformed) }
    }

    /// Ends reading.
    ///
    /// # Errors
    /// [`Malformed`] if anything is left.
    pub fn finish(self) -> Result<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed) }
    }
}

/// Writes a slice from its beginning to its end.
#[derive(Debug)]
pub struct Writer<'a> {
    rest: &'a mut [u8],
}

impl<'a> Writer<'a> {
    /// A cursor at the beginning of `bytes`.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Bytes not written yet.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    fn advance(&mut self, n: usize) -> Result<&'a mut [u8]> {
        let rest = std::mem::take(&mut self.rest);
        if n > rest.len() {
            self.rest = rest;
            return Err(Malformed);
        }
        let (head, tail) = rest.split_at_mut(n);
        self.rest = tail;
        Ok(head)
    }

    /// Writes `bytes`.
    ///
    /// # Errors
    /// [`Malformed`] if they do not fit; nothing is written then.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.advance(bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }

    /// Writes a byte.
    ///
    /// # Errors
    /// As [`Writer::put`].
    pub fn u8(&mut self, v: u8) -> Result<()> {
        self.put(&[v])
    }

    /// Writes an integer in two bytes.
    ///
    /// # Errors
    /// As [`Writer::put`].
    pub fn u16(&mut self, v: u16) -> Result<()> {
        self.put(&v.to_le_bytes())
    }

    /// Writes an integer in four bytes.
    ///
    /// # Errors
    /// As [`Writer::put`].
    pub fn u32(&mut self, v: u32) -> Result<()> {
        self.put(&v.to_le_bytes())
    }

    /// Writes an integer in eight bytes.
    ///
    /// # Errors
    /// As [`Writer::put`].
    pub fn u64(&mut self, v: u64) -> Result<()> {
        self.put(&v.to_le_bytes())
    }

    /// Writes `n` zero bytes.
    ///
    /// # Errors
    /// As [`Writer::put`].
    pub fn zeros(&mut self, n: usize) -> Result<()> {
        self.advance(n)?.fill(0);
        Ok(())
    }

    /// Writes `bytes` with their length in front as a u16; the counterpart of [`Reader::counted`].
    ///
    /// # Errors
    /// [`Malformed`] if the length is not in `min..=max`, or the bytes do not fit.
    pub fn counted(&mut self, bytes: &[u8], min: usize, max: usize) -> Result<()> {
        if !(min..=max).contains(&bytes.len()) {
            return Err(Malformed);
        }
        self.u16(u16::try_from(bytes.len()).map_err(|_| Malformed)?)?;
        self.put(bytes)
    }

    /// Ends writing.
    ///
    /// # Errors
    /// [`Malformed`] if some bytes were not written.
    pub fn finish(self) -> Result<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read() {
        let mut b = [0xffu8; 1 + 2 + 4 + 8 + 3 + 2 + 5 + 4];
        let mut w = Writer::new(&mut b);
        w.u8(7).unwrap();
        w.u16(0x0201).unwrap();
        w.u32(0x0605_0403).unwrap();
        w.u64(u64::MAX - 1).unwrap();
        w.zeros(3).unwrap();
        w.counted(b"hello", 1, 5).unwrap();
        w.put(b"tail").unwrap();
        w.finish().unwrap();
        assert_eq!(b[1..7], [1, 2, 3, 4, 5, 6]);
        let mut r = Reader::new(&b);
        assert_eq!(r.u8(), Ok(7));
        assert_eq!(r.u16(), Ok(0x0201));
        assert_eq!(r.u32(), Ok(0x0605_0403));
        assert_eq!(r.u64(), Ok(u64::MAX - 1));
        assert_eq!(r.zeros(3), Ok(()));
        assert_eq!(r.counted(1, 5), Ok(&b"hello"[..]));
        assert_eq!(r.array(), Ok(*b"tail"));
        assert_eq!(r.finish(), Ok(()));
    }

    #[test]
    fn bounds_hold_on_both_sides() {
        let mut r = Reader::new(&[1, 2, 3]);
        assert_eq!(r.u32(), Err(Malformed));
        assert_eq!(r.remaining(), 3, "a refused read moves nothing");
        assert_eq!(r.clone().finish(), Err(Malformed));
        assert_eq!(r.zeros(1), Err(Malformed));
        assert_eq!(Reader::new(&[2, 0, 1]).counted(0, 9), Err(Malformed));
        assert_eq!(Reader::new(&[1, 0, 1]).counted(2, 9), Err(Malformed));
        assert_eq!(Reader::new(&[3, 0, 1, 1, 1]).counted(0, 2), Err(Malformed));
        let mut b = [0u8; 2];
        let mut w = Writer::new(&mut b);
        assert_eq!(w.put(&[1, 2, 3]), Err(Malformed));
        assert_eq!(w.remaining(), 2, "a refused write moves nothing");
        w.u8(1).unwrap();
        assert_eq!(w.finish(), Err(Malformed));
        assert_eq!(b, [1, 0]);
        assert_eq!(Writer::new(&mut [0; 9]).counted(b"abc", 0, 2), Err(Malformed));
    }

    proptest! {
        #[test]
        fn any_sequence_of_reads_of_any_bytes_is_safe(
            bytes in proptest::collection::vec(any::<u8>(), 0..64),
            steps in proptest::collection::vec((0u8..7, 0usize..80), 0..32),
        ) {
            let mut r = Reader::new(&bytes);
            for (what, n) in steps {
                let before = r.remaining();
                let ok = match what {
                    0 => r.take(n).map(|t| assert_eq!(t.len(), n)).is_ok(),
                    1 => r.u8().is_ok(),
                    2 => r.u16().is_ok(),
                    3 => r.u32().is_ok(),
                    4 => r.u64().is_ok(),
                    5 => r.zeros(n).is_ok(),
                    _ => r.counted(0, n).map(|t| assert!(t.len() <= n)).is_ok(),
                };
                prop_assert!(r.remaining() <= before);
                prop_assert!(ok || r.remaining() <= before);
            }
        }
    }
}
