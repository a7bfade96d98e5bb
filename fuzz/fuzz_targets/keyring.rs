//! Keyrings: any bytes decode or are refused, and what decodes encodes to the same bytes.
#![no_main]

use envelopefs::format::keyring::Keyring;
use libfuzzer_sys::fuzz_target;

fn crc(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |c, b| {
        (0..8).fold(c ^ u32::from(*b), |c, _| (c >> 1) ^ (0x82f6_3b78 & (c & 1).wrapping_neg()))
    })
}

fuzz_target!(|data: &[u8]| {
    let _ = Keyring::decode(data);
    // With a right checksum, so that the fuzzer gets past it.
    let Some((body, _)) = data.split_last_chunk::<4>() else { return };
    let bytes = [body, &crc(body).to_le_bytes()].concat();
    if let Ok(decoded) = Keyring::decode(&bytes) {
        assert_eq!(decoded.keyring.encode(|_| decoded.mac).as_deref(), Ok(&bytes[..]));
    }
});
