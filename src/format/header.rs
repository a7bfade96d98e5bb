//! The header: two slots of 1024 bytes, each an immutable prefix, a wrap of the DEK, and a checksum.
//!
//! | offset | length | field |
//! |---|---|---|
//! | 0 | 8 | magic `ENVLPFS1` |
//! | 8 | 2 | format version, 1 |
//! | 10 | 2 | suite: 1 AES-256-GCM-SIV; 2 reserved for AES-256-GCM |
//! | 12 | 4 | incompatible feature flags |
//! | 16 | 4 | read-only-compatible feature flags |
//! | 20 | 4 | zero |
//! | 24 | 16 | store id |
//! | 40 | 16 | file id |
//! | 56 | 32 | key commitment |
//! | 88 | 32 | MAC over bytes 0…87 |
//! | 120 | 8 | sequence, from 1 |
//! | 128 | 16 | KekId |
//! | 144 | 2 | wrap suite: 1 sealed, 2 external |
//! | 146 | 2 | length of the wrapped DEK, 1…640 |
//! | 148 | 4 | zero |
//! | 152 | 640 | wrapped DEK, then zeros |
//! | 792 | 228 | zero |
//! | 1020 | 4 | CRC-32C (Castagnoli, RFC 3720 appendix B.4) over bytes 0…1019 |
//!
//! The wrap's associated data are bytes 0…145: prefix, sequence, KekId, wrap suite.

use super::FORMAT_VERSION;
use super::damage::Damage;
use super::geometry::{Copy2, SLOT};
use super::ids::{FileId, KekId, StoreId};
use crate::crypto::kdf::{self, label};
use crate::crypto::secret::Dek;

/// First eight bytes of every slot.
pub const MAGIC: &[u8; 8] = b"ENVLPFS1";
/// Suite id of AES-256-GCM-SIV.
pub const SUITE_GCM_SIV: u16 = 1;
/// Suite id kept for AES-256-GCM (FIPS profile).
pub const SUITE_GCM_RESERVED: u16 = 2;
/// Wrap suite: the DEK is wrapped under a sealed KEK.
pub const WRAP_SEALED: u16 = 1;
/// Wrap suite: the DEK is wrapped by a key provider.
pub const WRAP_EXTERNAL: u16 = 2;
/// Incompatible feature flags this program knows: none yet.
pub const INCOMPAT_KNOWN: u32 = 0;
/// Read-only-compatible feature flags this program knows: none yet.
pub const RO_COMPAT_KNOWN: u32 = 0;
/// Longest wrapped DEK, in bytes.
pub const WRAPPED_MAX: usize = 640;
/// Bytes of the part that the MAC covers.
const MACED: usize = 88;
/// Bytes of the wrap's associated data.
pub const WRAP_AAD: usize = 146;
const WRAPPED_AT: usize = 152;
const CRC_AT: usize = SLOT - 4;

const _: () = assert!(WRAPPED_AT + WRAPPED_MAX <= CRC_AT);

/// A header slot, parsed. Parsing proves nothing about authenticity: the MAC, the commitment and the wrap do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    pub suite: u16,
    pub incompat: u32,
    pub ro_compat: u32,
    pub store: StoreId,
    pub file: FileId,
    pub commitment: [u8; 32],
    pub mac: [u8; 32],
    pub sequence: u64,
    pub kek: KekId,
    pub wrap_suite: u16,
    /// 1 to 640 bytes.
    pub wrapped: Vec<u8>,
}

impl Slot {
    /// The slot of a new file, not wrapped yet: prefix complete, sequence 1, no wrap.
    pub fn new(store: StoreId, file: FileId, dek: &Dek) -> Self {
        let mut s = Self {
            suite: SUITE_GCM_SIV,
            incompat: 0,
            ro_compat: 0,
            store,
            file,
            commitment: commitment(dek, file),
            mac: [0; 32],
            sequence: 1,
            kek: KekId([0; 16]),
            wrap_suite: WRAP_SEALED,
            wrapped: Vec::new(),
        };
        s.mac = s.compute_mac(dek);
        s
    }

    /// Bytes 0…145, which the wrap binds.
    pub fn wrap_aad(&self) -> [u8; WRAP_AAD] {
        let mut b = [0u8; WRAP_AAD];
        self.put_front(&mut b);
        b
    }

    fn put_front(&self, b: &mut [u8; WRAP_AAD]) {
        b[0..8].copy_from_slice(MAGIC);
        b[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        b[10..12].copy_from_slice(&self.suite.to_le_bytes());
        b[12..16].copy_from_slice(&self.incompat.to_le_bytes());
        b[16..20].copy_from_slice(&self.ro_compat.to_le_bytes());
        b[24..40].copy_from_slice(&self.store.0);
        b[40..56].copy_from_slice(&self.file.0);
        b[56..88].copy_from_slice(&self.commitment);
        b[88..120].copy_from_slice(&self.mac);
        b[120..128].copy_from_slice(&self.sequence.to_le_bytes());
        b[128..144].copy_from_slice(&self.kek.0);
        b[144..146].copy_from_slice(&self.wrap_suite.to_le_bytes());
    }

    fn compute_mac(&self, dek: &Dek) -> [u8; 32] {
        let key = kdf::derive(dek.secret(), label::HEADER_MAC, &self.file.0);
        kdf::mac(&key, &[&self.wrap_aad()[..MACED]])
    }

    /// Proves that `dek` is this header's key: first the commitment, then the MAC over the prefix.
    ///
    /// # Errors
    /// [`Damage::Commitment`] or [`Damage::HeaderMac`].
    pub fn verify(&self, dek: &Dek) -> Result<(), Damage> {
        if !kdf::ct_eq(&self.commitment, &commitment(dek, self.file)) {
            return Err(Damage::Commitment);
        }
        if !kdf::ct_eq(&self.mac, &self.compute_mac(dek)) {
            return Err(Damage::HeaderMac);
        }
        Ok(())
    }

    /// The 1024 bytes on disk.
    ///
    /// # Panics
    /// Never with a wrap of at most [`WRAPPED_MAX`] bytes, which every writer checks when it wraps; a longer one is
    /// cut, which the CRC and the wrap's tag then disown.
    pub fn encode(&self) -> [u8; SLOT] {
        let mut b = [0u8; SLOT];
        let mut front = [0u8; WRAP_AAD];
        self.put_front(&mut front);
        b[..WRAP_AAD].copy_from_slice(&front);
        let n = self.wrapped.len().min(WRAPPED_MAX);
        b[146..148].copy_from_slice(&(n as u16).to_le_bytes());
        b[WRAPPED_AT..WRAPPED_AT + n].copy_from_slice(&self.wrapped[..n]);
        let crc = crc32c::crc32c(&b[..CRC_AT]);
        b[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        b
    }

    /// Parses one slot.
    ///
    /// # Errors
    /// [`Damage::HeaderUnreadable`] for a wrong checksum, [`Damage::HeaderMagic`], then one for each unknown version,
    /// flag or suite, [`Damage::Malformed`] for a length out of bounds or reserved bytes that are not zero.
    pub fn decode(b: &[u8; SLOT]) -> Result<Self, Damage> {
        if &b[0..8] != MAGIC {
            return Err(Damage::HeaderMagic);
        }
        if crc32c::crc32c(&b[..CRC_AT]) != u32::from_le_bytes(at(b, CRC_AT)) {
            return Err(Damage::HeaderUnreadable);
        }
        let version = u16::from_le_bytes(at(b, 8));
        if version != FORMAT_VERSION {
            return Err(Damage::UnsupportedVersion(version));
        }
        let suite = u16::from_le_bytes(at(b, 10));
        let incompat = u32::from_le_bytes(at(b, 12));
        if incompat & !INCOMPAT_KNOWN != 0 {
            return Err(Damage::UnsupportedFeature(incompat));
        }
        if suite != SUITE_GCM_SIV {
            return Err(Damage::UnsupportedSuite(suite));
        }
        let wrap_suite = u16::from_le_bytes(at(b, 144));
        if wrap_suite != WRAP_SEALED && wrap_suite != WRAP_EXTERNAL {
            return Err(Damage::UnsupportedSuite(wrap_suite));
        }
        let len = usize::from(u16::from_le_bytes(at(b, 146)));
        let sequence = u64::from_le_bytes(at(b, 120));
        // Without an early end, so that it is done many bytes at a time.
        let zero = |from: usize, to: usize| b[from..to].iter().fold(0, |any, x| any | x) == 0;
        if len == 0
            || len > WRAPPED_MAX
            || sequence == 0
            || !(zero(20, 24) && zero(148, WRAPPED_AT) && zero(WRAPPED_AT + len, CRC_AT))
        {
            return Err(Damage::Malformed);
        }
        Ok(Self {
            suite,
            incompat,
            ro_compat: u32::from_le_bytes(at(b, 16)),
            store: StoreId(at(b, 24)),
            file: FileId(at(b, 40)),
            commitment: at(b, 56),
            mac: at(b, 88),
            sequence,
            kek: KekId(at(b, 128)),
            wrap_suite,
            wrapped: b[WRAPPED_AT..WRAPPED_AT + len].to_vec(),
        })
    }

    /// Whether this program may write to the file: no read-only-compatible flag it does not know.
    pub fn writable(&self) -> bool {
        self.ro_compat & !RO_COMPAT_KNOWN == 0
    }
}

/// `N` bytes at a constant offset of a slot.
fn at<const N: usize>(b: &[u8; SLOT], from: usize) -> [u8; N] {
    let mut out = [0u8; N];
    out.copy_from_slice(&b[from..from + N]);
    out
}

fn commitment(dek: &Dek, file: FileId) -> [u8; 32] {
    kdf::derive_public(dek.secret(), label::COMMITMENT, &file.0)
}

/// Both slots of a header, each parsed or with what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotPair {
    pub a: Result<Slot, Damage>,
    pub b: Result<Slot, Damage>,
}

impl SlotPair {
    /// Parses the first 2048 bytes of a backing file.
    ///
    /// # Errors
    /// [`Damage::HeaderShort`] if there are fewer.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        let (a, rest) = bytes.split_first_chunk::<SLOT>().ok_or(Damage::HeaderShort)?;
        let (b, _) = rest.split_first_chunk::<SLOT>().ok_or(Damage::HeaderShort)?;
        Ok(Self { a: Slot::decode(a), b: Slot::decode(b) })
    }

    /// The slot that counts: the valid one with the higher sequence; A if both have the same.
    ///
    /// # Errors
    /// What is wrong with the slot that says most: an unknown version or feature before damage.
    pub fn authoritative(&self) -> Result<(Copy2, &Slot), Damage> {
        match (&self.a, &self.b) {
            (Ok(a), Ok(b)) if b.sequence > a.sequence => Ok((Copy2::B, b)),
            (Ok(a), _) => Ok((Copy2::A, a)),
            (Err(_), Ok(b)) => Ok((Copy2::B, b)),
            (Err(a), Err(b)) => Err(if rank(b) > rank(a) { b.clone() } else { a.clone() }),
        }
    }

    /// One of the slots.
    pub fn get(&self, copy: Copy2) -> &Result<Slot, Damage> {
        match copy {
            Copy2::A => &self.a,
            Copy2::B => &self.b,
        }
    }
}

/// How much a slot's failure says: an intact slot of a newer format tells the user more than a damaged one.
fn rank(d: &Damage) -> u8 {
    match d {
        Damage::UnsupportedVersion(_) | Damage::UnsupportedFeature(_) | Damage::UnsupportedSuite(_) => 3,
        Damage::Malformed => 2,
        Damage::HeaderUnreadable => 1,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> (Slot, Dek) {
        let dek = Dek::random();
        let mut s = Slot::new(StoreId::random(), FileId::random(), &dek);
        s.kek = KekId::random();
        s.wrapped = vec![7; 60];
        (s, dek)
    }

    #[test]
    fn round_trip() {
        let (s, dek) = sample();
        let t = Slot::decode(&s.encode()).unwrap();
        assert_eq!(s, t);
        t.verify(&dek).unwrap();
        assert_eq!(t.verify(&Dek::random()), Err(Damage::Commitment));
    }

    #[test]
    fn every_flipped_bit_of_a_slot_is_noticed_by_the_checksum() {
        let good = sample().0.encode();
        for bit in 0..SLOT * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Slot::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn the_mac_covers_the_prefix_even_with_a_fresh_checksum() {
        let (s, dek) = sample();
        let mut t = s.clone();
        t.ro_compat = 1;
        assert_eq!(Slot::decode(&t.encode()).unwrap().verify(&dek), Err(Damage::HeaderMac));
        let mut t = s.clone();
        t.store = StoreId::random();
        assert_eq!(t.verify(&dek), Err(Damage::HeaderMac));
        let mut t = s;
        t.file = FileId::random();
        assert_eq!(t.verify(&dek), Err(Damage::Commitment));
    }

    #[test]
    fn unknown_things_are_refused_by_name() {
        let (s, _) = sample();
        let fix = |mut b: [u8; SLOT]| {
            let crc = crc32c::crc32c(&b[..CRC_AT]);
            b[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
            b
        };
        let with = |at: usize, v: u8| {
            let mut b = s.encode();
            b[at] = v;
            Slot::decode(&fix(b)).unwrap_err()
        };
        assert_eq!(with(8, 2), Damage::UnsupportedVersion(2));
        assert_eq!(with(10, 2), Damage::UnsupportedSuite(2));
        assert_eq!(with(12, 4), Damage::UnsupportedFeature(4));
        assert_eq!(with(144, 9), Damage::UnsupportedSuite(9));
        assert_eq!(with(147, 255), Damage::Malformed);
        assert_eq!(with(146, 0), Damage::Malformed);
        assert_eq!(with(148, 1), Damage::Malformed);
        assert_eq!(with(21, 1), Damage::Malformed);
        assert_eq!(with(900, 1), Damage::Malformed);
        assert_eq!(with(0, 0), Damage::HeaderMagic);
    }

    #[test]
    fn the_valid_slot_with_the_higher_sequence_counts() {
        let (s, _) = sample();
        let mut newer = s.clone();
        newer.sequence = 2;
        let pair = |a: &[u8; SLOT], b: &[u8; SLOT]| SlotPair::decode(&[&a[..], &b[..]].concat()).unwrap();
        let (old, new, zero) = (s.encode(), newer.encode(), [0u8; SLOT]);
        assert_eq!(pair(&old, &new).authoritative().unwrap().0, Copy2::B);
        assert_eq!(pair(&new, &old).authoritative().unwrap().0, Copy2::A);
        assert_eq!(pair(&old, &old).authoritative().unwrap().0, Copy2::A);
        assert_eq!(pair(&zero, &old).authoritative().unwrap().0, Copy2::B);
        assert_eq!(pair(&zero, &zero).authoritative().unwrap_err(), Damage::HeaderMagic);
        assert_eq!(SlotPair::decode(&[0; 2047]).unwrap_err(), Damage::HeaderShort);
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            if let Ok(p) = SlotPair::decode(&bytes) {
                let _ = p.authoritative();
            }
        }
    }
}
