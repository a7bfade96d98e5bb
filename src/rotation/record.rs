//! The journal's record: what a run remembers across a kill, in 4096 bytes.
//!
//! Nothing is believed on its word alone. The KEKs that are old come from the keyring, whether a header is done from
//! the header, and the cursor is a hint where to begin; the record says only that a run is unfinished and which KEK
//! it was moving to.
//!
//! Little-endian: 0 magic 8 · 8 version u16 = 1 · 10 state u8 · 11 zero · 12 cursor length u16 ≤ [`CURSOR_MAX`] ·
//! 14 zero u16 · 16 sequence u64 (≥ 1) · 24 target KekId 16 · 40 started u64 (seconds since the epoch) ·
//! 48 files in the store u64 (as last counted, 0 = unknown) · 56 cursor, zero padded · 4060 MAC 32
//! (HMAC-SHA-256 over 0..4060) · 4092 CRC-32C over 0..4092.

use super::report::State;
use crate::crypto::kdf;
use crate::crypto::secret::Secret32;
use crate::format::ids::KekId;

/// Length of a record in bytes.
pub const RECORD_LEN: usize = 4096;
/// Longest cursor in bytes.
pub const CURSOR_MAX: usize = MAC_AT - CURSOR_AT;

const MAGIC: &[u8; 8] = b"ENVLPJR1";
const VERSION: u16 = 1;
const CURSOR_AT: usize = 56;
const MAC_AT: usize = 4060;
const CRC_AT: usize = 4092;

/// What the journal keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Counts up with every write; of two valid copies the higher one counts.
    pub sequence: u64,
    /// Where the run was.
    pub state: State,
    /// The KEK it moves headers to.
    pub target: KekId,
    /// When it began, in seconds since the epoch.
    pub started: u64,
    /// Regular files in the store as last counted; 0 if unknown.
    pub files: u64,
    /// Path in the backing directory: every file that comes before it in the order of the walk was dealt with.
    /// Empty: begin at the beginning. A hint, no more.
    pub cursor: Vec<u8>,
}

const STATES: [(u8, State); 7] = [
    (1, State::Staged),
    (2, State::Sweeping),
    (3, State::Verifying),
    (4, State::Retiring),
    (5, State::Done),
    (6, State::Cancelled),
    (7, State::Incomplete),
];

impl Record {
    /// The record's bytes, authenticated under `key`. A cursor that is too long is left out.
    pub fn encode(&self, key: &Secret32) -> [u8; RECORD_LEN] {
        let mut r = [0u8; RECORD_LEN];
        let cursor: &[u8] = if self.cursor.len() <= CURSOR_MAX { &self.cursor } else { &[] };
        let state = STATES.iter().find(|(_, s)| *s == self.state).map_or(0, |(n, _)| *n);
        r[..8].copy_from_slice(MAGIC);
        r[8..10].copy_from_slice(&VERSION.to_le_bytes());
        r[10] = state;
        r[12..14].copy_from_slice(&(cursor.len() as u16).to_le_bytes());
        r[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        r[24..40].copy_from_slice(self.target.as_bytes());
        r[40..48].copy_from_slice(&self.started.to_le_bytes());
        r[48..56].copy_from_slice(&self.files.to_le_bytes());
        r[CURSOR_AT..CURSOR_AT + cursor.len()].copy_from_slice(cursor);
        let mac = kdf::mac(key, &[&r[..MAC_AT]]);
        r[MAC_AT..CRC_AT].copy_from_slice(&mac);
        let crc = crc32c::crc32c(&r[..CRC_AT]);
        r[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        r
    }

    /// The record in `bytes`, or `None` if they are none, torn, or not written under `key`.
    pub fn decode(bytes: &[u8; RECORD_LEN], key: &Secret32) -> Option<Self> {
        let genuine = kdf::ct_eq(&bytes[MAC_AT..CRC_AT], &kdf::mac(key, &[&bytes[..MAC_AT]]));
        Self::decode_unverified(bytes).filter(|_| genuine)
    }

    /// As [`Record::decode`], without a key: whoever can write the file may have made the record up. For showing it only.
    pub fn decode_unverified(bytes: &[u8; RECORD_LEN]) -> Option<Self> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u64_at = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let crc: [u8; 4] = bytes[CRC_AT..].try_into().ok()?;
        let sound =
            bytes[..8] == *MAGIC && u32::from_le_bytes(crc) == crc32c::crc32c(&bytes[..CRC_AT]) && u16_at(8) == VERSION;
        if !sound || bytes[11] != 0 || u16_at(14) != 0 {
            return None;
        }
        let cursor_len = usize::from(u16_at(12));
        let (cursor, rest) = bytes[CURSOR_AT..MAC_AT].split_at_checked(cursor_len)?;
        let (_, state) = STATES.iter().find(|(n, _)| *n == bytes[10])?;
        let sequence = u64_at(16)?;
        if sequence == 0 || rest.iter().any(|b| *b != 0) {
            return None;
        }
        Some(Self {
            sequence,
            state: *state,
            target: KekId(bytes[24..40].try_into().ok()?),
            started: u64_at(40)?,
            files: u64_at(48)?,
            cursor: cursor.to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(state: State) -> Record {
        Record {
            sequence: 7,
            state,
            target: KekId::random(),
            started: 1_700_000_000,
            files: 12,
            cursor: b"a/b\xff/c".to_vec(),
        }
    }

    #[test]
    fn round_trips_every_state() {
        let key = Secret32::random();
        for (_, state) in STATES {
            let r = sample(state);
            assert_eq!(Record::decode(&r.encode(&key), &key), Some(r));
        }
    }

    #[test]
    fn a_cursor_that_does_not_fit_is_left_out() {
        let key = Secret32::random();
        let mut r = sample(State::Sweeping);
        r.cursor = vec![b'x'; CURSOR_MAX];
        assert_eq!(Record::decode(&r.encode(&key), &key), Some(r.clone()));
        r.cursor.push(b'x');
        assert_eq!(Record::decode(&r.encode(&key), &key).unwrap().cursor, b"");
    }

    #[test]
    fn every_bit_is_authenticated() {
        let key = Secret32::random();
        let good = sample(State::Verifying).encode(&key);
        for at in 0..RECORD_LEN {
            let mut bad = good;
            bad[at] ^= 0x10;
            assert_eq!(Record::decode(&bad, &key), None, "byte {at}");
            let crc = crc32c::crc32c(&bad[..CRC_AT]);
            if at < CRC_AT {
                bad[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
                assert_eq!(Record::decode(&bad, &key), None, "byte {at} with a right checksum");
            }
        }
        assert_eq!(Record::decode(&good, &Secret32::random()), None);
        assert_eq!(Record::decode_unverified(&good), Record::decode(&good, &key));
        assert_eq!(Record::decode(&[0; RECORD_LEN], &key), None);
    }
}
