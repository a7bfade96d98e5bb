//! Segment states: the nonces and tags of a segment's blocks, in two copies, each sealed as a whole.
//!
//! One copy (1024 bytes for segment 0, 4096 for the others):
//!
//! | offset | length | field |
//! |---|---|---|
//! | 0 | 8 | sequence; 0 means never written |
//! | 8 | 12 | nonce |
//! | 20 | 16 | tag |
//! | 36 | 4 | zero |
//! | 40 | 984 or 4056 | sealed body |
//!
//! The body is one entry of 28 bytes (nonce 12, tag 16) for each of the segment's 32 or 128 blocks, an all-zero entry
//! being a hole. Segment 0's body goes on at 896 with the sealed length (8) and the flags (4). The rest is zero.
//! Associated data: file id (16), segment (8), sequence (8), format version (2).

use super::FORMAT_VERSION;
use super::damage::Damage;
use super::geometry::{self, SEGMENT_BLOCKS, STATE};
use super::ids::FileId;
use crate::crypto::aead::{BlockCipher, NONCE_LEN, Nonce, TAG_LEN, Tag};

/// Bytes of an entry.
pub const ENTRY: usize = NONCE_LEN + TAG_LEN;
const NONCE_AT: usize = 8;
const TAG_AT: usize = 20;
const BODY_AT: usize = 40;
const LENGTH_AT: usize = 896;
const FLAGS_AT: usize = 904;

/// The last writer closed the file: the backing size must give exactly the sealed length.
pub const CLEAN: u32 = 1;
/// Whole segments may be absent.
pub const SPARSE: u32 = 2;
/// A shrink to the sealed length was begun.
pub const TRUNCATING: u32 = 4;
const KNOWN_FLAGS: u32 = CLEAN | SPARSE | TRUNCATING;

/// Nonce and tag of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub nonce: Nonce,
    pub tag: Tag,
}

impl Entry {
    /// The entry of a hole: all zero.
    pub const HOLE: Self = Self { nonce: [0; NONCE_LEN], tag: [0; TAG_LEN] };

    /// Stands for an entry that was lost and not a hole: no block authenticates under it, but with the chance of any
    /// forgery.
    pub const LOST: Self = Self { nonce: [0xff; NONCE_LEN], tag: [0xff; TAG_LEN] };

    /// Whether the block is a hole: it reads as zeros, whatever the backing file holds there.
    pub fn is_hole(&self) -> bool {
        *self == Self::HOLE
    }
}

/// Sealed length and flags, which only segment 0's state carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileState {
    /// Plaintext length in bytes.
    pub length: u64,
    /// [`CLEAN`], [`SPARSE`], [`TRUNCATING`].
    pub flags: u32,
}

impl FileState {
    /// Whether `flag` is set.
    pub fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

/// What a state copy says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentState {
    pub sequence: u64,
    entries: [Entry; SEGMENT_BLOCKS as usize],
    /// Meaningful in segment 0 only.
    pub file: FileState,
}

impl SegmentState {
    /// All holes, never written.
    pub const EMPTY: Self =
        Self { sequence: 0, entries: [Entry::HOLE; SEGMENT_BLOCKS as usize], file: FileState { length: 0, flags: 0 } };

    /// Entry of the segment's block number `index` (0 to 31 or 127).
    pub fn entry(&self, index: usize) -> Entry {
        self.entries.get(index).copied().unwrap_or(Entry::HOLE)
    }

    /// Sets an entry. An index beyond the segment changes nothing.
    pub fn set(&mut self, index: usize, e: Entry) {
        if let Some(x) = self.entries.get_mut(index) {
            *x = e;
        }
    }
}

fn aad(file: FileId, segment: u64, sequence: u64) -> [u8; 34] {
    let mut a = [0u8; 34];
    a[..16].copy_from_slice(&file.0);
    a[16..24].copy_from_slice(&segment.to_le_bytes());
    a[24..32].copy_from_slice(&sequence.to_le_bytes());
    a[32..].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    a
}

/// Associated data of a block: file id (16), block (8), format version (2).
pub fn block_aad(file: FileId, block: u64) -> [u8; 26] {
    let mut a = [0u8; 26];
    a[..16].copy_from_slice(&file.0);
    a[16..24].copy_from_slice(&block.to_le_bytes());
    a[24..].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    a
}

/// Seals a state copy into `out`, which must have the segment's state length; `nonce` is random.
pub fn seal(key: &BlockCipher, file: FileId, segment: u64, s: &SegmentState, nonce: Nonce, out: &mut [u8; STATE]) {
    let len = geometry::state_len(segment);
    out.fill(0);
    let body = &mut out[BODY_AT..len];
    for (e, b) in s.entries.iter().take(geometry::segment_capacity(segment)).zip(body.chunks_exact_mut(ENTRY)) {
        b[..NONCE_LEN].copy_from_slice(&e.nonce);
        b[NONCE_LEN..].copy_from_slice(&e.tag);
    }
    if segment == 0 {
        body[LENGTH_AT..LENGTH_AT + 8].copy_from_slice(&s.file.length.to_le_bytes());
        body[FLAGS_AT..FLAGS_AT + 4].copy_from_slice(&s.file.flags.to_le_bytes());
    }
    let tag = key.seal(&nonce, &aad(file, segment, s.sequence), body);
    out[..8].copy_from_slice(&s.sequence.to_le_bytes());
    out[NONCE_AT..TAG_AT].copy_from_slice(&nonce);
    out[TAG_AT..TAG_AT + TAG_LEN].copy_from_slice(&tag);
}

/// Whether a copy was never written: its sequence and everything else is zero.
pub fn is_absent(copy: &[u8]) -> bool {
    copy.iter().all(|b| *b == 0)
}

/// Opens a state copy. `copy` is decrypted in place and must have the segment's state length.
///
/// # Errors
/// [`Damage::StateAbsent`] for all zeros, [`Damage::StateAuth`] if it does not authenticate, [`Damage::Malformed`] if
/// it does but says something this version does not allow.
pub fn open(key: &BlockCipher, file: FileId, segment: u64, copy: &mut [u8]) -> Result<SegmentState, Damage> {
    let len = geometry::state_len(segment);
    let bad = Damage::StateAuth { segment };
    let Some(copy) = copy.get_mut(..len) else { return Err(bad) };
    if is_absent(copy) {
        return Err(Damage::StateAbsent { segment });
    }
    let sequence = u64::from_le_bytes(copy.first_chunk().copied().ok_or(bad.clone())?);
    let (front, body) = copy.split_at_mut(BODY_AT);
    let nonce: Nonce = front.get(NONCE_AT..TAG_AT).and_then(|b| b.try_into().ok()).ok_or(bad.clone())?;
    let tag: Tag = front.get(TAG_AT..TAG_AT + TAG_LEN).and_then(|b| b.try_into().ok()).ok_or(bad.clone())?;
    if sequence == 0 || front[TAG_AT + TAG_LEN..].iter().any(|b| *b != 0) {
        return Err(bad);
    }
    key.open(&nonce, &aad(file, segment, sequence), &tag, body).map_err(|_| bad)?;
    decode_body(segment, sequence, body)
}

/// Whether, of a segment's two copies, one that must have been written is not there: it is damaged, zeroed, or a
/// repetition of the other. In a file that was closed cleanly that is tampering or a bad disk, and the copy that is left
/// may be out of date.
pub fn one_is_lost(a: &Result<SegmentState, Damage>, b: &Result<SegmentState, Damage>) -> bool {
    match (a, b) {
        (Ok(a), Ok(b)) => a.sequence == b.sequence,
        (Ok(s), Err(Damage::StateAbsent { .. })) | (Err(Damage::StateAbsent { .. }), Ok(s)) => s.sequence > 1,
        (Ok(_), Err(_)) | (Err(_), Ok(_)) => true,
        (Err(_), Err(_)) => false,
    }
}

fn decode_body(segment: u64, sequence: u64, body: &[u8]) -> Result<SegmentState, Damage> {
    let mut s = SegmentState { sequence, ..SegmentState::EMPTY };
    let capacity = geometry::segment_capacity(segment);
    for (e, b) in s.entries.iter_mut().take(capacity).zip(body.chunks_exact(ENTRY)) {
        e.nonce.copy_from_slice(&b[..NONCE_LEN]);
        e.tag.copy_from_slice(&b[NONCE_LEN..]);
    }
    let mut tail = body.get(capacity * ENTRY..).ok_or(Damage::Malformed)?;
    if segment == 0 {
        let (length, rest) = tail.split_first_chunk::<8>().ok_or(Damage::Malformed)?;
        let (flags, rest) = rest.split_first_chunk::<4>().ok_or(Damage::Malformed)?;
        s.file = FileState { length: u64::from_le_bytes(*length), flags: u32::from_le_bytes(*flags) };
        tail = rest;
        if s.file.flags & !KNOWN_FLAGS != 0 || s.file.length > geometry::PLAIN_MAX {
            return Err(Damage::Malformed);
        }
    }
    if tail.iter().any(|b| *b != 0) {
        return Err(Damage::Malformed);
    }
    Ok(s)
}

const _: () = assert!(BODY_AT + LENGTH_AT + 12 <= geometry::STATE0);
const _: () = assert!(BODY_AT + SEGMENT_BLOCKS as usize * ENTRY <= STATE);
const _: () = assert!(LENGTH_AT == geometry::SEGMENT0_BLOCKS as usize * ENTRY && FLAGS_AT == LENGTH_AT + 8);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::random;
    use crate::crypto::secret::Secret32;
    use proptest::prelude::*;

    fn sealed(key: &BlockCipher, file: FileId, segment: u64) -> (SegmentState, Vec<u8>) {
        let mut s = SegmentState { sequence: 7, ..SegmentState::EMPTY };
        for i in 0..geometry::segment_capacity(segment) {
            if i % 3 != 0 {
                s.set(i, Entry { nonce: random::array(), tag: random::array() });
            }
        }
        if segment == 0 {
            s.file = FileState { length: 12345, flags: CLEAN | SPARSE };
        }
        let mut out = [0u8; STATE];
        seal(key, file, segment, &s, random::array(), &mut out);
        (s, out[..geometry::state_len(segment)].to_vec())
    }

    #[test]
    fn round_trip() {
        let key = BlockCipher::new(&Secret32::random());
        let file = FileId::random();
        for segment in [0, 1, 77] {
            let (s, mut b) = sealed(&key, file, segment);
            assert_eq!(open(&key, file, segment, &mut b).unwrap(), s);
        }
    }

    #[test]
    fn every_flipped_byte_and_every_other_place_is_refused() {
        let key = BlockCipher::new(&Secret32::random());
        let file = FileId::random();
        for segment in [0, 1] {
            let (_, good) = sealed(&key, file, segment);
            for i in 0..good.len() {
                let mut b = good.clone();
                b[i] ^= 0x40;
                assert_eq!(open(&key, file, segment, &mut b), Err(Damage::StateAuth { segment }), "byte {i}");
            }
            assert!(open(&key, FileId::random(), segment, &mut good.clone()).is_err());
        }
        let (_, good) = sealed(&key, file, 1);
        assert_eq!(open(&key, file, 2, &mut good.clone()), Err(Damage::StateAuth { segment: 2 }));
        assert_eq!(open(&key, file, 2, &mut [0; 4096]), Err(Damage::StateAbsent { segment: 2 }));
        assert_eq!(open(&key, file, 2, &mut [0; 100]), Err(Damage::StateAuth { segment: 2 }));
    }

    proptest! {
        #[test]
        fn no_input_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..5000), segment in 0u64..3) {
            let key = BlockCipher::new(&Secret32::build(|b| b.fill(1)));
            prop_assert!(open(&key, FileId([1; 16]), segment, &mut bytes).is_err());
        }
    }
}
