//! Reading secrets into room that is there already: what grows while it is read leaves copies of itself behind.

use std::io::{self, Read};

/// Reads until `buf` is full or nothing is left. Returns the bytes read.
///
/// # Errors
/// The kernel's, but for interruptions.
pub(super) fn fill(from: &mut impl Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut n = 0;
    while let Some(rest) = buf.get_mut(n..).filter(|r| !r.is_empty()) {
        match from.read(rest) {
            Ok(0) => break,
            Ok(k) => n += k,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives a byte at a time, and is interrupted before each.
    struct Slow<'a>(&'a [u8], bool);

    impl Read for Slow<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            self.0.read(&mut buf[..1])
        }
    }

    #[test]
    fn all_there_is_is_read_and_no_more_than_there_is_room_for() {
        for room in [0, 1, 4, 5, 9] {
            let mut buf = vec![0; room];
            let n = fill(&mut Slow(b"bytes", false), &mut buf).unwrap();
            assert_eq!((n, &buf[..n]), (room.min(5), &b"bytes"[..n]));
        }
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::ConnectionReset.into())
            }
        }
        assert_eq!(fill(&mut Broken, &mut [0; 3]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
