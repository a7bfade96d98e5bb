//! Paths of the backing directory as reports name them: bytes ↔ text, without loss.
//!
//! A name is any bytes but NUL and `/`. A backslash, control characters and bytes that are not UTF-8 are written
//! `\\` and `\xHH`, so that a path is one line that may be shown on a terminal, and stands for one path only.

use std::fmt::Write;

/// The text of a path.
pub(super) fn shown(path: &[u8]) -> String {
    let mut text = String::with_capacity(path.len());
    for chunk in path.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => text.push_str("\\\\"),
                c if c.is_control() => escape(&mut text, c.encode_utf8(&mut [0; 4]).as_bytes()),
                c => text.push(c),
            }
        }
        escape(&mut text, chunk.invalid());
    }
    text
}

fn escape(text: &mut String, bytes: &[u8]) {
    for b in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "\\x{b:02x}");
    }
}

/// The bytes that `text` stands for, which may hold as they are what [`shown`] escapes, but for the backslash. `None` if
/// a backslash begins something else.
pub(super) fn bytes(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    loop {
        rest = match rest {
            [] => return Some(out),
            [b'\\', b'\\', rest @ ..] => {
                out.push(b'\\');
                rest
            }
            [b'\\', b'x', h, l, rest @ ..] => {
                out.push(digit(*h)? << 4 | digit(*l)?);
                rest
            }
            [b'\\', ..] => return None,
            [b, rest @ ..] => {
                out.push(*b);
                rest
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_cannot_stand_in_a_line_is_escaped() {
        for (path, text) in [
            (&b"d/plain name"[..], "d/plain name"),
            ("d/ü…".as_bytes(), "d/ü…"),
            (b"a\nb\x1b[2J\x7f", "a\\x0ab\\x1b[2J\\x7f"),
            (b"a\\xff", "a\\\\xff"),
            (b"a\xff\xc3", "a\\xff\\xc3"),
            ("\u{9b}".as_bytes(), "\\xc2\\x9b"),
        ] {
            assert_eq!(shown(path), text);
        }
        assert_eq!(bytes(b"a\xff\\xFF"), Some(b"a\xff\xff".to_vec()), "as they are, too");
        for bad in [&b"a\\"[..], b"\\n", b"\\x", b"\\x1", b"\\xg0"] {
            assert_eq!(bytes(bad), None);
        }
    }

    proptest! {
        #[test]
        fn every_path_comes_back(path in proptest::collection::vec(any::<u8>(), 0..40)) {
            let text = shown(&path);
            prop_assert!(!text.chars().any(char::is_control));
            prop_assert_eq!(bytes(text.as_bytes()), Some(path));
        }
    }
}
