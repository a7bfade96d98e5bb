//! The printed form of a recovery key: 56 characters in 14 groups of four, `ABCD-EFGH-…`.
//!
//! Base32 (RFC 4648 section 6, capital letters and 2 to 7, no padding) of secret 32 ‖ CRC-24 3, big-endian: 280 bits are
//! 56 characters with no bit left over. The CRC is that of OpenPGP (RFC 9580 section 6.1): polynomial 0x864CFB, initial
//! value 0xB704CE, nothing reflected, no final exclusive-or.
//!
//! A CRC and not a truncated hash, because what has to be found are slips of a hand, not forgeries, and here a CRC gives
//! certainty: one of 24 bits finds every error that lies within 24 neighbouring bits. One wrong character is within 5
//! bits, two exchanged neighbours within 10, a wrong group within 20. A hash of 24 bits would let one such slip in
//! 16 million pass. Of other errors one in 16 million passes here too, and then the key is none of the store's. The
//! checksum tells nothing that the key it is printed with does not.

use crate::crypto::secret::{KEY_LEN, Secret32};
use zeroize::Zeroizing;

/// Characters of a recovery key, dashes not counted.
pub const CHARACTERS: usize = 56;
/// Characters of a group.
const GROUP: usize = 4;
const CRC_LEN: usize = 3;
const BYTES: usize = KEY_LEN + CRC_LEN;
const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
/// Digits one, each of which may stand for I or for L, that are tried in all combinations.
const ONES_MAX: usize = 10;

/// What is wrong with what was typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mistake {
    /// A character that no recovery key holds.
    Character(char),
    /// This many characters.
    Length(usize),
    /// The checksum is wrong. If one slip within one group explains it: that group, counted from 1.
    Mistyped(Option<usize>),
}

impl std::fmt::Display for Mistake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Character(c) => write!(f, "mistyped: {c:?} stands in no recovery key"),
            Self::Length(n) => write!(f, "mistyped: {n} characters, and it has {CHARACTERS} in groups of {GROUP}"),
            Self::Mistyped(Some(g)) => write!(f, "mistyped: look at group {g}"),
            Self::Mistyped(None) => f.write_str("mistyped: its checksum is wrong"),
        }
    }
}

/// The values of the characters, 5 bits each.
type Symbols = Zeroizing<[u8; CHARACTERS]>;
type Bytes = Zeroizing<[u8; BYTES]>;

/// What each value of the first byte adds to the checksum.
const CRC24: [u32; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let mut crc = (n as u32) << 16;
        let mut bit = 0;
        while bit < 8 {
            crc <<= 1;
            if crc & 0x0100_0000 != 0 {
                crc ^= 0x0186_4cfb;
            }
            bit += 1;
        }
        table[n] = crc;
        n += 1;
    }
    table
};

fn crc24(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x00b7_04ce, |crc, b| (crc << 8 & 0x00ff_ffff) ^ CRC24[usize::from((crc >> 16) as u8 ^ b)])
}

/// The key as it is printed.
pub fn print(secret: &Secret32) -> Zeroizing<String> {
    let mut bytes: Bytes = Zeroizing::new([0; BYTES]);
    let [_, crc @ ..] = crc24(secret.expose()).to_be_bytes();
    let (key, check) = bytes.split_at_mut(KEY_LEN);
    key.copy_from_slice(secret.expose());
    check.copy_from_slice(&crc);
    // Long enough from the beginning: a string that grows leaves its content behind.
    let mut text = Zeroizing::new(String::with_capacity(CHARACTERS + CHARACTERS / GROUP));
    for (i, s) in unpack(&bytes).iter().enumerate() {
        if i > 0 && i % GROUP == 0 {
            text.push('-');
        }
        text.push(char::from(ALPHABET[usize::from(*s & 31)]));
    }
    text
}

/// Reads a key as somebody typed it. Case, spaces, dashes and line ends do not matter. 0 is read as O and 8 as B, which
/// alone can be meant; 1 is read as I or L, whichever the checksum confirms.
///
/// # Errors
/// [`Mistake`]. One wrong character or two exchanged neighbours are always found.
pub fn read(text: &[u8]) -> Result<Secret32, Mistake> {
    let mut symbols: Symbols = Zeroizing::new([0; CHARACTERS]);
    let (mut n, mut ones) = (0, Vec::new());
    for c in text.iter().copied().filter(|c| !c.is_ascii_whitespace() && *c != b'-') {
        let value = match c.to_ascii_uppercase() {
            c @ b'A'..=b'Z' => c - b'A',
            c @ b'2'..=b'7' => c - b'2' + 26,
            b'0' => b'O' - b'A',
            b'8' => b'B' - b'A',
            b'1' => {
                ones.push(n);
                b'I' - b'A'
            }
            c => return Err(Mistake::Character(char::from(c))),
        };
        if let Some(s) = symbols.get_mut(n) {
            *s = value;
        }
        n += 1;
    }
    if n != CHARACTERS {
        return Err(Mistake::Length(n));
    }
    if !settle_ones(&mut symbols, &ones) {
        return Err(Mistake::Mistyped(suspect(&mut symbols)));
    }
    let bytes = pack(&symbols);
    Ok(Secret32::build(|b| b.iter_mut().zip(bytes.iter()).for_each(|(to, from)| *to = *from)))
}

/// Makes each digit one I or L so that the checksum is right. Says whether exactly one way does that.
fn settle_ones(symbols: &mut Symbols, ones: &[usize]) -> bool {
    const LETTERS: [u8; 2] = [b'I' - b'A', b'L' - b'A'];
    if ones.len() > ONES_MAX {
        return false;
    }
    let mut set = |choice: usize| {
        for (bit, at) in ones.iter().enumerate() {
            if let Some(s) = symbols.get_mut(*at) {
                *s = LETTERS[choice >> bit & 1];
            }
        }
        is_right(symbols)
    };
    let right: Vec<usize> = (0..1 << ones.len()).filter(|choice| set(*choice)).collect();
    match right.as_slice() {
        [one] => set(*one),
        _ => false,
    }
}

fn is_right(symbols: &Symbols) -> bool {
    let bytes = pack(symbols);
    let (key, check) = bytes.split_at(KEY_LEN);
    let [_, crc @ ..] = crc24(key).to_be_bytes();
    check == crc
}

/// The group, from 1, in which a single wrong character or two exchanged neighbours would explain a wrong checksum, if
/// it is the only such group.
fn suspect(symbols: &mut Symbols) -> Option<usize> {
    let mut groups: Vec<usize> = Vec::new();
    let mut note = |at: usize| groups.push(at / GROUP + 1);
    for at in 0..CHARACTERS {
        let typed = symbols[at];
        for other in (0..32).filter(|v| *v != typed) {
            symbols[at] = other;
            if is_right(symbols) {
                note(at);
            }
        }
        symbols[at] = typed;
    }
    for at in 1..CHARACTERS {
        symbols.swap(at - 1, at);
        if is_right(symbols) {
            note(at - 1);
        }
        symbols.swap(at - 1, at);
    }
    groups.dedup();
    match groups.as_slice() {
        [one] => Some(*one),
        _ => None,
    }
}

fn unpack(bytes: &Bytes) -> Symbols {
    let mut symbols: Symbols = Zeroizing::new([0; CHARACTERS]);
    for (five, eight) in bytes.chunks_exact(5).zip(symbols.chunks_exact_mut(8)) {
        let word = five.iter().fold(0u64, |w, b| w << 8 | u64::from(*b));
        eight.iter_mut().rev().enumerate().for_each(|(i, s)| *s = (word >> (5 * i) & 31) as u8);
    }
    symbols
}

fn pack(symbols: &Symbols) -> Bytes {
    let mut bytes: Bytes = Zeroizing::new([0; BYTES]);
    for (eight, five) in symbols.chunks_exact(8).zip(bytes.chunks_exact_mut(5)) {
        let word = eight.iter().fold(0u64, |w, s| w << 5 | u64::from(*s & 31));
        five.iter_mut().rev().enumerate().for_each(|(i, b)| *b = (word >> (8 * i)) as u8);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(seed: u8) -> Secret32 {
        Secret32::build(|b| b.iter_mut().zip(0u8..).for_each(|(b, i)| *b = i.wrapping_mul(57).wrapping_add(seed)))
    }

    fn plain(text: &str) -> Vec<u8> {
        text.bytes().filter(|c| *c != b'-').collect()
    }

    #[test]
    fn the_checksum_is_openpgps() {
        assert_eq!(crc24(b"123456789"), 0x0021_cf02);
        assert_eq!(crc24(b""), 0x00b7_04ce);
    }

    #[test]
    fn the_form_is_as_documented() {
        let text = print(&Secret32::build(|b| b.fill(0)));
        assert_eq!(text.len(), 69);
        assert!(text.starts_with("AAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAA"), "{}", *text);
        let counted = print(&Secret32::build(|b| b.iter_mut().zip(0..).for_each(|(b, i)| *b = i)));
        // RFC 4648's base32 of 0 to 31 and the checksum.
        assert!(counted.starts_with("AAAQ-EAYE-AUDA-OCAJ-BIFQ-YDIO-B4IB-CEQT-CQKR-MFYY-DENB-WHA5-DYP"), "{}", *counted);
    }

    #[test]
    fn every_single_wrong_character_is_found_and_its_group_named() {
        // One key stands for all: a CRC is linear, so whether it finds an error does not depend on the key.
        let good = plain(&print(&key(7)));
        for at in 0..CHARACTERS {
            for c in ALPHABET.iter().filter(|c| **c != good[at]) {
                let mut bad = good.clone();
                bad[at] = *c;
                assert_eq!(read(&bad).unwrap_err(), Mistake::Mistyped(Some(at / GROUP + 1)), "{at} {c}");
            }
        }
    }

    #[test]
    fn every_exchange_of_neighbours_is_found_and_its_group_named() {
        let mut found = 0;
        for seed in 0..10 {
            let good = plain(&print(&key(seed)));
            for at in (1..CHARACTERS).filter(|at| good[*at] != good[*at - 1]) {
                let mut bad = good.clone();
                bad.swap(at - 1, at);
                match read(&bad).unwrap_err() {
                    Mistake::Mistyped(Some(g)) => assert_eq!(g, (at - 1) / GROUP + 1),
                    // Some other slip explains it too.
                    Mistake::Mistyped(None) => {}
                    e => panic!("{e:?}"),
                }
                found += 1;
            }
        }
        assert!(found > 400);
    }

    #[test]
    fn a_group_that_is_wrong_altogether_is_found() {
        let good = plain(&print(&key(1)));
        for group in 0..CHARACTERS / GROUP {
            for other in [*b"AAAA", *b"7777", *b"QZ2M"] {
                let mut bad = good.clone();
                bad[group * GROUP..][..GROUP].copy_from_slice(&other);
                assert!(bad == good || read(&bad).is_err());
            }
        }
    }

    #[test]
    fn what_is_typed_may_look_different() {
        let secret = Secret32::build(|b| b.iter_mut().zip(0u8..).for_each(|(b, i)| *b = i.wrapping_mul(41)));
        let text = print(&secret);
        assert!(["O", "B", "I", "L"].iter().all(|c| text.contains(c)), "{}", *text);
        for typed in [
            text.to_lowercase(),
            text.replace('-', ""),
            text.replace('-', " "),
            format!("  {}\r\n", text.replace('-', "\n")),
            text.replace('O', "0"),
            text.replace('B', "8"),
            text.replace('I', "1"),
            text.replace('L', "1"),
            text.replace(['I', 'L'], "1").replace('O', "0").to_lowercase(),
        ] {
            assert!(read(typed.as_bytes()).unwrap().ct_eq(&secret), "{typed}");
        }
    }

    #[test]
    fn what_is_no_key_is_told_by_what_is_wrong() {
        let text = print(&key(3));
        assert_eq!(read(b"").unwrap_err(), Mistake::Length(0));
        assert_eq!(read(&text.as_bytes()[..68]).unwrap_err(), Mistake::Length(55));
        assert_eq!(read(format!("{}A", *text).as_bytes()).unwrap_err(), Mistake::Length(57));
        assert_eq!(read(format!("{}9", *text).as_bytes()).unwrap_err(), Mistake::Character('9'));
        assert_eq!(read("ü".as_bytes()).unwrap_err(), Mistake::Character('\u{c3}'));
        assert_eq!(read(&[b'1'; CHARACTERS]).unwrap_err(), Mistake::Mistyped(None));
        assert_eq!(Mistake::Mistyped(Some(7)).to_string(), "mistyped: look at group 7");
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(bytes in any::<[u8; 32]>()) {
            let secret = Secret32::build(|b| b.copy_from_slice(&bytes));
            prop_assert!(read(print(&secret).as_bytes()).unwrap().ct_eq(&secret));
        }

        #[test]
        fn any_text_is_safe(text in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = read(&text);
        }
    }
}
