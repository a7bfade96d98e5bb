//! All offset arithmetic: where a block, a segment's states and the end of a file lie in the backing file.
//!
//! ```text
//! page 0           [slot A 1024][slot B 1024][state of segment 0, copy A 1024][copy B 1024]
//! pages 1…32       blocks 0…31
//! pages 33, 34     [state of segment 1, copy A 4096][copy B 4096]     pages 35…162: its 128 blocks
//! pages 163, 164   states of segment 2                                pages 165…: its 128 blocks, and so on
//! ```
//!
//! The plaintext size is a pure function of the backing size and the reverse; see [`plain_size`]. Arithmetic saturates
//! rather than wraps: [`PLAIN_MAX`] keeps every offset below 2^63.

/// Bytes of a page and of a block.
pub const PAGE: u64 = 4096;
/// Bytes of a block, as a length.
pub const BLOCK: usize = 4096;
/// Bytes of a header slot.
pub const SLOT: usize = 1024;
/// Bytes of one state copy of segment 0.
pub const STATE0: usize = 1024;
/// Bytes of one state copy of any other segment.
pub const STATE: usize = 4096;
/// Blocks of segment 0.
pub const SEGMENT0_BLOCKS: u64 = 32;
/// Blocks of any other segment.
pub const SEGMENT_BLOCKS: u64 = 128;
/// Pages of a segment after the first: two states and its blocks.
const SEGMENT_PAGES: u64 = 2 + SEGMENT_BLOCKS;
/// First page of segment 1.
const SEGMENT1_PAGE: u64 = 1 + SEGMENT0_BLOCKS;
/// Largest plaintext size in bytes: 2^62. Its backing size is still far below `off_t`'s 2^63-1.
pub const PLAIN_MAX: u64 = 1 << 62;

/// Which of two copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Copy2 {
    A,
    B,
}

impl Copy2 {
    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    fn index(self) -> u64 {
        match self {
            Self::A => 0,
            Self::B => 1,
        }
    }
}

/// Backing offset of a header slot.
pub fn slot_offset(copy: Copy2) -> u64 {
    copy.index() * SLOT as u64
}

/// The segment that block `block` belongs to.
pub fn segment_of(block: u64) -> u64 {
    match block.checked_sub(SEGMENT0_BLOCKS) {
        None => 0,
        Some(b) => 1 + b / SEGMENT_BLOCKS,
    }
}

/// First block of a segment.
pub fn first_block(segment: u64) -> u64 {
    match segment.checked_sub(1) {
        None => 0,
        Some(s) => SEGMENT0_BLOCKS.saturating_add(s.saturating_mul(SEGMENT_BLOCKS)),
    }
}

/// How many blocks a segment can hold.
pub fn segment_capacity(segment: u64) -> usize {
    if segment == 0 { SEGMENT0_BLOCKS as usize } else { SEGMENT_BLOCKS as usize }
}

/// Bytes of one state copy of a segment.
pub fn state_len(segment: u64) -> usize {
    if segment == 0 { STATE0 } else { STATE }
}

/// First page of a segment after segment 0: where its state copy A lies.
fn segment_page(segment: u64) -> u64 {
    SEGMENT1_PAGE.saturating_add(segment.saturating_sub(1).saturating_mul(SEGMENT_PAGES))
}

/// Backing offset of a state copy.
pub fn state_offset(segment: u64, copy: Copy2) -> u64 {
    if segment == 0 {
        2 * SLOT as u64 + copy.index() * STATE0 as u64
    } else {
        (segment_page(segment).saturating_add(copy.index())).saturating_mul(PAGE)
    }
}

/// Backing offset of a block's ciphertext.
pub fn block_offset(block: u64) -> u64 {
    let page = if block < SEGMENT0_BLOCKS {
        1 + block
    } else {
        let segment = segment_of(block);
        segment_page(segment).saturating_add(2).saturating_add(block - first_block(segment))
    };
    page.saturating_mul(PAGE)
}

/// Backing size of a file of `plain` bytes. 0 for an empty file: it has no header and no key.
pub fn backing_size(plain: u64) -> u64 {
    match plain.checked_sub(1) {
        None => 0,
        Some(last) => {
            let block = last / PAGE;
            block_offset(block).saturating_add(plain - block * PAGE)
        }
    }
}

/// Plaintext size of a backing file of `backing` bytes. Total and monotonic: a backing file that ends inside page 0 or
/// inside a segment's states has the size of the blocks before it.
pub fn plain_size(backing: u64) -> u64 {
    if backing <= PAGE {
        return 0;
    }
    if backing <= SEGMENT1_PAGE * PAGE {
        return backing - PAGE;
    }
    let rest = backing - SEGMENT1_PAGE * PAGE;
    let segment = 1 + (rest - 1) / (SEGMENT_PAGES * PAGE);
    let into = rest - (segment - 1) * SEGMENT_PAGES * PAGE;
    first_block(segment) * PAGE + into.saturating_sub(2 * PAGE)
}

/// Bytes of block `block` in a file of `plain` bytes: 4096, less for the last one, 0 beyond the end.
pub fn block_len(block: u64, plain: u64) -> usize {
    plain.saturating_sub(block.saturating_mul(PAGE)).min(PAGE) as usize
}

/// The number of blocks of a file of `plain` bytes.
pub fn block_count(plain: u64) -> u64 {
    plain.div_ceil(PAGE)
}

/// The number of segments of a file of `plain` bytes; 0 for an empty file.
pub fn segment_count(plain: u64) -> u64 {
    match plain.checked_sub(1) {
        None => 0,
        Some(last) => segment_of(last / PAGE) + 1,
    }
}

/// The part of one segment that a byte range touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentRange {
    pub segment: u64,
    /// First block touched.
    pub first: u64,
    /// One past the last block touched.
    pub end: u64,
}

/// Splits the non-empty block range `first..end` by segments, in order.
pub fn by_segment(first: u64, end: u64) -> impl Iterator<Item = SegmentRange> {
    let mut at = first;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let segment = segment_of(at);
            let stop = first_block(segment + 1).min(end);
            let r = SegmentRange { segment, first: at, end: stop };
            at = stop;
            r
        })
    })
}

const _: () = assert!(2 * SLOT + 2 * STATE0 == PAGE as usize);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn worked_sizes() {
        for (plain, backing) in [
            (0, 0),
            (1, 4097),
            (4096, 8192),
            (4097, 8193),
            (131_072, 33 * 4096),
            (131_073, 35 * 4096 + 1),
            (131_072 + 524_288, 163 * 4096),
            (131_072 + 524_288 + 1, 165 * 4096 + 1),
        ] {
            assert_eq!(backing_size(plain), backing, "plain {plain}");
            assert_eq!(plain_size(backing), plain, "backing {backing}");
        }
        assert_eq!(block_offset(31), 32 * 4096);
        assert_eq!(block_offset(32), 35 * 4096);
        assert_eq!(block_offset(160), 165 * 4096);
        assert_eq!(state_offset(1, Copy2::A), 33 * 4096);
        assert_eq!(state_offset(2, Copy2::B), 164 * 4096);
        assert_eq!(state_offset(0, Copy2::B), 3072);
        // The limit stays inside off_t.
        assert!(backing_size(PLAIN_MAX) < i64::MAX as u64);
    }

    #[test]
    fn ends_inside_metadata_round_down() {
        for b in 1..=4096 {
            assert_eq!(plain_size(b), 0);
        }
        for b in 33 * 4096 + 1..=35 * 4096 {
            assert_eq!(plain_size(b), 131_072);
        }
    }

    proptest! {
        #[test]
        fn sizes_round_trip(plain in 0..=PLAIN_MAX) {
            prop_assert_eq!(plain_size(backing_size(plain)), plain);
        }

        #[test]
        fn small_sizes_round_trip(plain in 0u64..5_000_000) {
            prop_assert_eq!(plain_size(backing_size(plain)), plain);
        }

        #[test]
        fn plain_size_is_monotonic(b in any::<u64>()) {
            prop_assert!(plain_size(b) <= plain_size(b.saturating_add(1)));
            prop_assert!(plain_size(b) <= b);
        }

        #[test]
        fn segments_tile_the_blocks(first in 0u64..100_000, len in 1u64..2000) {
            let parts: Vec<_> = by_segment(first, first + len).collect();
            prop_assert_eq!(parts[0].first, first);
            prop_assert_eq!(parts[parts.len() - 1].end, first + len);
            for w in parts.windows(2) {
                prop_assert_eq!(w[0].end, w[1].first);
                prop_assert_eq!(w[0].segment + 1, w[1].segment);
            }
            for p in parts {
                prop_assert_eq!(segment_of(p.first), p.segment);
                prop_assert_eq!(segment_of(p.end - 1), p.segment);
                prop_assert_eq!(
                    block_offset(p.end - 1) - block_offset(p.first), (p.end - 1 - p.first) * PAGE);
            }
        }
    }
}
