//! Segment states: any bytes are refused; any sealed body opens to what seals to the same, or is refused.
#![no_main]

use envelopefs::crypto::aead::BlockCipher;
use envelopefs::crypto::secret::Secret32;
use envelopefs::format::geometry::{STATE, state_len};
use envelopefs::format::ids::FileId;
use envelopefs::format::state;
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static KEY: LazyLock<BlockCipher> = LazyLock::new(|| BlockCipher::new(&Secret32::build(|k| k.fill(7))));
const FILE: FileId = FileId([3; 16]);

/// A copy whose body is `data`, sealed rightly, so that the fuzzer gets past the tag.
fn seal(segment: u64, sequence: u64, data: &[u8]) -> [u8; STATE] {
    let mut copy = [0u8; STATE];
    let body = &mut copy[40..state_len(segment)];
    for (b, d) in body.iter_mut().zip(data) {
        *b = *d;
    }
    let aad = [&FILE.0[..], &segment.to_le_bytes(), &sequence.to_le_bytes(), &1u16.to_le_bytes()].concat();
    let tag = KEY.seal(&[9; 12], &aad, body);
    copy[..8].copy_from_slice(&sequence.to_le_bytes());
    copy[8..20].fill(9);
    copy[20..36].copy_from_slice(&tag);
    copy
}

fuzz_target!(|data: &[u8]| {
    for segment in [0, 1] {
        let _ = state::open(&KEY, FILE, segment, &mut data.to_vec());
        let sealed = seal(segment, 5, data);
        if let Ok(s) = state::open(&KEY, FILE, segment, &mut sealed.clone()) {
            let mut again = [0u8; STATE];
            state::seal(&KEY, FILE, segment, &s, [9; 12], &mut again);
            assert_eq!(again, sealed);
        }
    }
});
