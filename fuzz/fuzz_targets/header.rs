//! Header slots: any bytes parse or are refused, and what parses is what would be written.
#![no_main]

use envelopefs::format::geometry::SLOT;
use envelopefs::format::header::{Slot, SlotPair};
use libfuzzer_sys::fuzz_target;

/// The same bytes with a right checksum, so that the fuzzer gets past it.
fn with_checksum(data: &[u8]) -> [u8; SLOT] {
    let mut slot = [0u8; SLOT];
    for (s, d) in slot.iter_mut().zip(data) {
        *s = *d;
    }
    let crc = crc(&slot[..SLOT - 4]);
    slot[SLOT - 4..].copy_from_slice(&crc.to_le_bytes());
    slot
}

fn crc(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |c, b| {
        (0..8).fold(c ^ u32::from(*b), |c, _| (c >> 1) ^ (0x82f6_3b78 & (c & 1).wrapping_neg()))
    })
}

fuzz_target!(|data: &[u8]| {
    if let Ok(pair) = SlotPair::decode(data) {
        let _ = pair.authoritative();
    }
    let bytes = with_checksum(data);
    if let Ok(slot) = Slot::decode(&bytes) {
        assert_eq!(slot.encode(), bytes);
        assert_eq!(slot.wrap_aad()[..], bytes[..146]);
    }
});
