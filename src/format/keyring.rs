//! The keyring: the store's list of KEKs and root keys, as bytes ↔ types.
//!
//! Layout, little-endian, no padding, at most [`KEYRING_MAX`] bytes:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | magic `ENVLPKR1` |
//! | 2 | version, 1 |
//! | 2 | reserved, 0 |
//! | 4 | incompatible feature flags: bit 0 = names in clear, bit 1 = there is a life-cycle section |
//! | 4 | read-only-compatible feature flags |
//! | 4 | reserved, 0 |
//! | 16 | store id |
//! | 8 | generation, ≥ 1 |
//! | 2 | number of root keys, 1…[`ROOTS_MAX`] |
//! | … | each: root key id 16 · URI length u16, 1…[`URI_MAX`] · URI, UTF-8 without control characters |
//! | … | wraps of the store secret (a list of wraps, see below; at least one) |
//! | 4 | number of KEKs, 1…[`KEKS_MAX`] |
//! | … | each: KEK id 16 · kind u8 · state u8 · reserved u16 0 · six times u64: created, activated, retired, unused, destroyed, reserved 0 · provider 16 · list of wraps |
//! | … | with incompatible flag bit 1: the life-cycle section, see [`super::lifecycle`] |
//! | 32 | MAC: HMAC-SHA-256 over everything before it, key = derive(store secret, KEYRING_MAC, "") |
//! | 4 | CRC-32C over everything before it |
//!
//! A list of wraps: number u16, then each: root key id 16 · length u16, 1…640 · wrapped key. Ids in a list are
//! distinct and in the list of root keys. Times are Unix seconds; 0 = has not happened. `provider` is the root key
//! that wraps DEKs for a KEK of kind external, and zeros for a sealed one. Exactly one KEK is active.
//!
//! In every format version the first 10 bytes are magic and version and the last 4 the CRC, so that a keyring from
//! the future is told from a damaged one.

use super::codec::{Malformed, Reader, Writer};
use super::damage::Damage;
use super::ids::{KekId, RootKeyId, StoreId};
use super::lifecycle::LifeCycle;

/// First bytes of a keyring.
pub const MAGIC: &[u8; 8] = b"ENVLPKR1";
/// Incompatible feature: file names are stored in clear.
pub const INCOMPAT_PLAINTEXT_NAMES: u32 = 1;
/// Incompatible feature: there is a life-cycle section ([`super::lifecycle`]), with rules that a program must know to open
/// files and to destroy KEKs.
pub const INCOMPAT_LIFE_CYCLE: u32 = 2;
/// Incompatible features this program knows.
pub const INCOMPAT_KNOWN: u32 = INCOMPAT_PLAINTEXT_NAMES | INCOMPAT_LIFE_CYCLE;
/// Read-only-compatible features this program knows: with any other flag set, the store may only be read.
pub const RO_COMPAT_KNOWN: u32 = 0;
/// Most root keys of a keyring.
pub const ROOTS_MAX: usize = 16;
/// Most KEK records of a keyring, destroyed ones included.
pub const KEKS_MAX: usize = 4096;
/// Longest root key URI, in bytes.
pub const URI_MAX: usize = 1024;
/// Longest wrapped key, in bytes.
pub const WRAP_MAX: usize = 640;
/// Longest keyring file, in bytes.
pub const KEYRING_MAX: usize = 64 << 20;

const MAC_LEN: usize = 32;
const CRC_LEN: usize = 4;
const PREFIX_LEN: usize = 48;
const KEK_LEN: usize = 16 + 4 + 48 + 16;

/// How DEKs are wrapped under a KEK.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KekKind {
    /// The KEK is a random key in this process's memory; the root keys wrap it.
    Sealed,
    /// The KEK is the root key itself: each DEK is wrapped by a call to its provider.
    External,
}

/// Where a KEK is in its life (NIST SP 800-57). It only moves forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KekState {
    /// Made and verified, nothing was ever wrapped under it.
    Pending,
    /// Wraps and unwraps. Exactly one KEK is.
    Active,
    /// Unwraps only. Becomes so the moment another one is made active; see [`KekRecord::unused`].
    Retired,
    /// Its wrapped bytes are gone.
    Destroyed,
}

/// A key wrapped by a root key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrap {
    /// The root key.
    pub root: RootKeyId,
    /// What its provider returned; 1 to [`WRAP_MAX`] bytes.
    pub bytes: Vec<u8>,
}

/// A root key as the keyring records it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct RootKeyRecord {
    /// Its id in this keyring.
    pub id: RootKeyId,
    /// Its canonical URI: where to look for it. Never an address, a path of a library or a secret.
    pub uri: String,
}

/// A KEK as the keyring records it. Times are Unix seconds; 0 = has not happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KekRecord {
    pub id: KekId,
    pub kind: KekKind,
    pub state: KekState,
    pub created: u64,
    pub activated: u64,
    /// When another KEK took over.
    pub retired: u64,
    /// When a scan of every header proved that none names this KEK any more, but for what the operator waived.
    pub unused: u64,
    pub destroyed: u64,
    /// Kind external: the root key that wraps DEKs.
    pub provider: Option<RootKeyId>,
    /// Kind sealed: the KEK, wrapped by root keys. Kind external: one wrapped random key that serves no purpose but to
    /// prove that what the provider wraps, it unwraps. Empty once destroyed.
    pub wraps: Vec<Wrap>,
}

/// A keyring, decoded. What it says is not authentic until its MAC was verified with the store secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keyring {
    pub store: StoreId,
    /// Counts the updates; the copy with the higher one counts.
    pub generation: u64,
    /// Without [`INCOMPAT_LIFE_CYCLE`], which stands on disk if and only if `life` says anything.
    pub incompat: u32,
    pub ro_compat: u32,
    pub roots: Vec<RootKeyRecord>,
    /// The store secret, wrapped by each root key.
    pub secret: Vec<Wrap>,
    /// In the order in which they were made.
    pub keks: Vec<KekRecord>,
    pub life: LifeCycle,
}

/// A keyring and what is needed to verify its MAC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    pub keyring: Keyring,
    /// The bytes under the MAC.
    pub signed: Vec<u8>,
    /// The MAC found.
    pub mac: [u8; MAC_LEN],
}

impl KekKind {
    fn to_byte(self) -> u8 {
        match self {
            Self::Sealed => 1,
            Self::External => 2,
        }
    }

    fn from_byte(b: u8) -> Result<Self, Malformed> {
        match b {
            1 => Ok(Self::Sealed),
            2 => Ok(Self::External),
            _ => Err(Malformed),
        }
    }
}

impl KekState {
    fn to_byte(self) -> u8 {
        match self {
            Self::Pending => 1,
            Self::Active => 2,
            Self::Retired => 3,
            Self::Destroyed => 4,
        }
    }

    fn from_byte(b: u8) -> Result<Self, Malformed> {
        match b {
            1 => Ok(Self::Pending),
            2 => Ok(Self::Active),
            3 => Ok(Self::Retired),
            4 => Ok(Self::Destroyed),
            _ => Err(Malformed),
        }
    }
}

impl KekRecord {
    /// Its wrap by `root`, if it has one.
    pub fn wrap_by(&self, root: RootKeyId) -> Option<&Wrap> {
        self.wraps.iter().find(|w| w.root == root)
    }

    /// Whether this KEK is still needed to read something: active, or retired and not proved unused.
    pub fn is_needed(&self) -> bool {
        match self.state {
            KekState::Active => true,
            KekState::Retired => self.unused == 0,
            KekState::Pending | KekState::Destroyed => false,
        }
    }

    fn len(&self) -> usize {
        KEK_LEN + wraps_len(&self.wraps)
    }

    fn is_sound(&self) -> bool {
        let external = self.kind == KekKind::External;
        (external == self.provider.is_some()) && ((self.state == KekState::Destroyed) == self.wraps.is_empty())
    }
}

impl Keyring {
    /// The record of `id`.
    pub fn kek(&self, id: KekId) -> Option<&KekRecord> {
        self.keks.iter().find(|k| k.id == id)
    }

    /// The record of `id`, to be changed.
    pub fn kek_mut(&mut self, id: KekId) -> Option<&mut KekRecord> {
        self.keks.iter_mut().find(|k| k.id == id)
    }

    /// The active KEK. Every decoded keyring has exactly one.
    pub fn active(&self) -> Option<&KekRecord> {
        self.keks.iter().find(|k| k.state == KekState::Active)
    }

    /// The pending KEK, if one is staged.
    pub fn pending(&self) -> Option<&KekRecord> {
        self.keks.iter().find(|k| k.state == KekState::Pending)
    }

    /// The record of root key `id`.
    pub fn root(&self, id: RootKeyId) -> Option<&RootKeyRecord> {
        self.roots.iter().find(|r| r.id == id)
    }

    /// Whether the floor keeps files from being opened under `id`: it stands before the floor's KEK.
    pub fn is_below_floor(&self, id: KekId) -> bool {
        let at = |id| self.keks.iter().position(|k| k.id == id);
        self.life.floor.and_then(at).is_some_and(|floor| at(id).is_some_and(|n| n < floor))
    }

    /// Whether file names are stored in clear.
    pub fn plaintext_names(&self) -> bool {
        self.incompat & INCOMPAT_PLAINTEXT_NAMES != 0
    }

    /// Whether a feature this program does not know forbids it to write to the store.
    pub fn read_only(&self) -> bool {
        self.ro_compat & !RO_COMPAT_KNOWN != 0
    }

    /// Its bytes; `mac` computes the MAC over those before it.
    ///
    /// # Errors
    /// [`Malformed`] if a count, a length or a rule of the layout is broken; what this returns always decodes.
    pub fn encode(&self, mac: impl FnOnce(&[u8]) -> [u8; MAC_LEN]) -> Result<Vec<u8>, Malformed> {
        self.check()?;
        let signed = PREFIX_LEN
            + 2
            + self.roots.iter().map(|r| 18 + r.uri.len()).sum::<usize>()
            + wraps_len(&self.secret)
            + 4
            + self.keks.iter().map(KekRecord::len).sum::<usize>()
            + self.life.len();
        let total = signed + MAC_LEN + CRC_LEN;
        if total > KEYRING_MAX {
            return Err(Malformed);
        }
        let mut out = vec![0u8; total];
        let (body, tail) = out.split_at_mut_checked(signed).ok_or(Malformed)?;
        self.write(body)?;
        let mac = mac(body);
        let crc = crc32c::crc32c_append(crc32c::crc32c(body), &mac);
        let mut w = Writer::new(tail);
        w.put(&mac)?;
        w.u32(crc)?;
        w.finish()?;
        Ok(out)
    }

    fn write(&self, out: &mut [u8]) -> Result<(), Malformed> {
        let mut w = Writer::new(out);
        w.put(MAGIC)?;
        w.u16(super::FORMAT_VERSION)?;
        w.zeros(2)?;
        w.u32(self.incompat | if self.life.is_empty() { 0 } else { INCOMPAT_LIFE_CYCLE })?;
        w.u32(self.ro_compat)?;
        w.zeros(4)?;
        w.put(self.store.as_bytes())?;
        w.u64(self.generation)?;
        w.u16(u16::try_from(self.roots.len()).map_err(|_| Malformed)?)?;
        for r in &self.roots {
            w.put(r.id.as_bytes())?;
            w.counted(r.uri.as_bytes(), 1, URI_MAX)?;
        }
        write_wraps(&mut w, &self.secret)?;
        w.u32(u32::try_from(self.keks.len()).map_err(|_| Malformed)?)?;
        for k in &self.keks {
            write_kek(&mut w, k)?;
        }
        self.life.write(&mut w)?;
        w.finish()
    }

    /// Reads a keyring. The MAC is not verified here: it takes the store secret.
    ///
    /// # Errors
    /// [`Damage::KeyringUnreadable`] if magic, checksum or layout are wrong; [`Damage::UnsupportedVersion`] or
    /// [`Damage::UnsupportedFeature`] if the checksum is right and a newer program wrote it.
    pub fn decode(bytes: &[u8]) -> Result<Decoded, Damage> {
        if bytes.len() > KEYRING_MAX || !bytes.starts_with(MAGIC) {
            return Err(Damage::KeyringUnreadable);
        }
        let (checked, crc) = bytes.split_last_chunk::<CRC_LEN>().ok_or(Damage::KeyringUnreadable)?;
        if crc32c::crc32c(checked) != u32::from_le_bytes(*crc) {
            return Err(Damage::KeyringUnreadable);
        }
        let mut r = Reader::new(checked.get(MAGIC.len()..).ok_or(Damage::KeyringUnreadable)?);
        match r.u16() {
            Ok(super::FORMAT_VERSION) => {}
            Ok(v) => return Err(Damage::UnsupportedVersion(v)),
            Err(Malformed) => return Err(Damage::KeyringUnreadable),
        }
        let (signed, mac) = checked.split_last_chunk::<MAC_LEN>().ok_or(Damage::KeyringUnreadable)?;
        let keyring = Self::read(signed).map_err(|Malformed| Damage::KeyringUnreadable)??;
        Ok(Decoded { keyring, signed: signed.to_vec(), mac: *mac })
    }

    fn read(signed: &[u8]) -> Result<Result<Self, Damage>, Malformed> {
        let mut r = Reader::new(signed);
        r.take(MAGIC.len() + 2)?;
        r.zeros(2)?;
        let (incompat, ro_compat) = (r.u32()?, r.u32()?);
        if incompat & !INCOMPAT_KNOWN != 0 {
            return Ok(Err(Damage::UnsupportedFeature(incompat & !INCOMPAT_KNOWN)));
        }
        r.zeros(4)?;
        let store = StoreId(r.array()?);
        let generation = r.u64()?;
        let roots = (0..bounded(r.u16()?.into(), ROOTS_MAX)?).map(|_| read_root(&mut r)).collect::<Result<_, _>>()?;
        let secret = read_wraps(&mut r)?;
        let n = bounded(usize::try_from(r.u32()?).map_err(|_| Malformed)?, KEKS_MAX)?;
        let keks: Vec<KekRecord> = (0..n).map(|_| read_kek(&mut r)).collect::<Result<_, _>>()?;
        let has_life = incompat & INCOMPAT_LIFE_CYCLE != 0;
        let life = if has_life { LifeCycle::read(&mut r, n)? } else { LifeCycle::default() };
        r.finish()?;
        let incompat = incompat & !INCOMPAT_LIFE_CYCLE;
        let k = Self { store, generation, incompat, ro_compat, roots, secret, keks, life };
        k.check()?;
        Ok(Ok(k))
    }

    /// The rules of the layout that span fields.
    fn check(&self) -> Result<(), Malformed> {
        let roots: Vec<RootKeyId> = self.roots.iter().map(|r| r.id).collect();
        let known = |wraps: &[Wrap]| {
            let ids: Vec<RootKeyId> = wraps.iter().map(|w| w.root).collect();
            wraps.len() <= ROOTS_MAX && distinct(&ids) && ids.iter().all(|i| roots.contains(i))
        };
        let ids: Vec<KekId> = self.keks.iter().map(|k| k.id).collect();
        let sound = self.generation > 0
            && self.incompat & INCOMPAT_LIFE_CYCLE == 0
            && self.life.is_sound(&self.keks)
            && (1..=ROOTS_MAX).contains(&roots.len())
            && distinct(&roots)
            && self.roots.iter().all(|r| !r.uri.chars().any(char::is_control))
            && !self.secret.is_empty()
            && known(&self.secret)
            && (1..=KEKS_MAX).contains(&ids.len())
            && distinct(&ids)
            && self.keks.iter().all(|k| k.is_sound() && known(&k.wraps))
            && self.keks.iter().all(|k| {
                // A destroyed KEK may outlive the record of the root key it was.
                k.state == KekState::Destroyed || k.provider.is_none_or(|p| roots.contains(&p))
            })
            && self.keks.iter().filter(|k| k.state == KekState::Active).count() == 1;
        if sound { Ok(()) } else { Err(Malformed) }
    }
}

fn bounded(n: usize, max: usize) -> Result<usize, Malformed> {
    if n <= max { Ok(n) } else { Err(Malformed) }
}

fn distinct<T: Ord + Copy>(ids: &[T]) -> bool {
    let mut v = ids.to_vec();
    v.sort_unstable();
    v.windows(2).all(|w| w.first() != w.last())
}

fn wraps_len(wraps: &[Wrap]) -> usize {
    2 + wraps.iter().map(|w| 18 + w.bytes.len()).sum::<usize>()
}

fn write_wraps(w: &mut Writer<'_>, wraps: &[Wrap]) -> Result<(), Malformed> {
    w.u16(u16::try_from(wraps.len()).map_err(|_| Malformed)?)?;
    for x in wraps {
        w.put(x.root.as_bytes())?;
        w.counted(&x.bytes, 1, WRAP_MAX)?;
    }
    Ok(())
}

fn read_wraps(r: &mut Reader<'_>) -> Result<Vec<Wrap>, Malformed> {
    let n = bounded(r.u16()?.into(), ROOTS_MAX)?;
    (0..n).map(|_| Ok(Wrap { root: RootKeyId(r.array()?), bytes: r.counted(1, WRAP_MAX)?.to_vec() })).collect()
}

fn read_root(r: &mut Reader<'_>) -> Result<RootKeyRecord, Malformed> {
    let id = RootKeyId(r.array()?);
    let uri = std::str::from_utf8(r.counted(1, URI_MAX)?).map_err(|_| Malformed)?.to_owned();
    Ok(RootKeyRecord { id, uri })
}

fn write_kek(w: &mut Writer<'_>, k: &KekRecord) -> Result<(), Malformed> {
    w.put(k.id.as_bytes())?;
    w.u8(k.kind.to_byte())?;
    w.u8(k.state.to_byte())?;
    w.zeros(2)?;
    for t in [k.created, k.activated, k.retired, k.unused, k.destroyed, 0] {
        w.u64(t)?;
    }
    match k.provider {
        Some(RootKeyId(id)) if id != [0; 16] => w.put(&id)?,
        Some(_) => return Err(Malformed),
        None => w.zeros(16)?,
    }
    write_wraps(w, &k.wraps)
}

fn read_kek(r: &mut Reader<'_>) -> Result<KekRecord, Malformed> {
    let id = KekId(r.array()?);
    let kind = KekKind::from_byte(r.u8()?)?;
    let state = KekState::from_byte(r.u8()?)?;
    r.zeros(2)?;
    let (created, activated, retired) = (r.u64()?, r.u64()?, r.u64()?);
    let (unused, destroyed) = (r.u64()?, r.u64()?);
    r.zeros(8)?;
    let provider = Some(RootKeyId(r.array()?)).filter(|p| p.0 != [0; 16]);
    let wraps = read_wraps(r)?;
    Ok(KekRecord { id, kind, state, created, activated, retired, unused, destroyed, provider, wraps })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::lifecycle::Schedule;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn root(n: u8) -> RootKeyId {
        RootKeyId([n; 16])
    }

    fn wrap(n: u8) -> Wrap {
        Wrap { root: root(n), bytes: vec![n; 60] }
    }

    fn kek(n: u8, state: KekState) -> KekRecord {
        let wraps = if state == KekState::Destroyed { vec![] } else { vec![wrap(1), wrap(2)] };
        KekRecord {
            id: KekId([n; 16]),
            kind: KekKind::Sealed,
            state,
            created: 1,
            activated: 2,
            retired: 3,
            unused: 4,
            destroyed: 5,
            provider: None,
            wraps,
        }
    }

    fn sample() -> Keyring {
        Keyring {
            store: StoreId([9; 16]),
            generation: 7,
            incompat: INCOMPAT_PLAINTEXT_NAMES,
            ro_compat: 0,
            roots: vec![
                RootKeyRecord { id: root(1), uri: "keyfile:/k".into() },
                RootKeyRecord { id: root(2), uri: "passphrase:".into() },
            ],
            secret: vec![wrap(1), wrap(2)],
            keks: vec![
                kek(1, KekState::Destroyed),
                kek(2, KekState::Retired),
                kek(3, KekState::Active),
                KekRecord { kind: KekKind::External, provider: Some(root(2)), ..kek(4, KekState::Pending) },
            ],
            life: LifeCycle::default(),
        }
    }

    fn schedule(n: u8) -> Schedule {
        Schedule { kek: KekId([n; 16]), confirmed: 2, scheduled: 10, due: 20, announced: 0, used: 15 }
    }

    /// The sample with something to say of the end of its KEKs.
    fn ending() -> Keyring {
        let life = LifeCycle { quorum: 2, floor: Some(KekId([3; 16])), schedules: vec![schedule(2)] };
        Keyring { life, ..sample() }
    }

    fn mac(signed: &[u8]) -> [u8; 32] {
        crate::crypto::kdf::sha256(signed)
    }

    /// Puts the right checksum on changed bytes.
    fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
        let n = bytes.len() - CRC_LEN;
        let crc = crc32c::crc32c(&bytes[..n]);
        bytes[n..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn round_trip() {
        let k = sample();
        let bytes = k.encode(mac).unwrap();
        let d = Keyring::decode(&bytes).unwrap();
        assert_eq!(d.keyring, k);
        assert_eq!(d.mac, mac(&d.signed));
        assert_eq!(d.signed, bytes[..bytes.len() - 36]);
        assert_eq!(d.keyring.active().unwrap().id, KekId([3; 16]));
        assert_eq!(d.keyring.pending().unwrap().id, KekId([4; 16]));
    }

    #[test]
    fn a_life_cycle_section_is_there_if_it_says_anything() {
        let (plain, k) = (sample().encode(mac).unwrap(), ending());
        let b = k.encode(mac).unwrap();
        assert_eq!(Keyring::decode(&b).unwrap().keyring, k);
        assert_eq!((plain[12], b[12]), (1, 3));
        let section = b[plain.len() - 36..b.len() - 36].to_vec();
        let (head, one) = section.split_at(24);
        assert_eq!(head, [&[2, 0, 0, 0][..], &[3; 16], &[1, 0, 0, 0]].concat());
        let times: Vec<u8> = [10u64, 20, 0, 15].iter().flat_map(|t| t.to_le_bytes()).collect();
        assert_eq!(one, [&[2; 16][..], &[2, 0, 0, 0, 0, 0, 0, 0], &times].concat());
        for (below, n) in [(true, 1), (true, 2), (false, 3), (false, 4), (false, 9)] {
            assert_eq!(k.is_below_floor(KekId([n; 16])), below, "{n}");
        }
        // Nothing to say, said all the same.
        let mut b = plain.clone();
        b[12] |= 2;
        let n = b.len() - 36;
        b.splice(n..n, [0; 24]);
        assert_eq!(Keyring::decode(&seal(b)), Err(Damage::KeyringUnreadable));
    }

    /// The fixed part, byte by byte: what docs/FORMAT.md says, in numbers of its own.
    #[test]
    fn layout() {
        let b = sample().encode(mac).unwrap();
        assert_eq!(&b[..8], b"ENVLPKR1");
        assert_eq!(b[8..20], [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(b[20..24], [0; 4]);
        assert_eq!(b[24..40], [9; 16]);
        assert_eq!(b[40..50], [7, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
        assert_eq!(&b[50..78], [&[1u8; 16][..], &[10, 0], b"keyfile:/k"].concat());
        let secret = 78 + 16 + 2 + 11;
        assert_eq!(b[secret..secret + 4], [2, 0, 1, 1]);
        let keks = secret + 2 + 2 * (16 + 2 + 60);
        assert_eq!(b[keks..keks + 4], [4, 0, 0, 0]);
        assert_eq!(b[keks + 4 + 16..keks + 4 + 20], [1, 4, 0, 0], "sealed, destroyed");
        assert_eq!(b.len(), keks + 4 + 4 * 84 + 4 * 2 + 3 * 2 * 78 + 36);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let good = sample().encode(mac).unwrap();
        for i in 0..good.len() * 8 {
            let mut b = good.clone();
            b[i / 8] ^= 1 << (i % 8);
            assert_eq!(Keyring::decode(&b), Err(Damage::KeyringUnreadable), "bit {i}");
        }
        for n in 0..good.len() {
            assert_eq!(Keyring::decode(&good[..n]), Err(Damage::KeyringUnreadable), "cut to {n}");
        }
        assert!(Keyring::decode(&[&good[..], &[0]].concat()).is_err());
    }

    #[test]
    fn leftovers_are_refused_even_with_a_right_checksum() {
        let mut b = sample().encode(mac).unwrap();
        let n = b.len();
        b.splice(n - 36..n - 36, [0]);
        assert_eq!(Keyring::decode(&seal(b)), Err(Damage::KeyringUnreadable));
    }

    #[test]
    fn a_newer_program_is_told_from_damage() {
        let good = sample().encode(mac).unwrap();
        let with = |at: usize, v: u8| {
            let mut b = good.clone();
            b[at] = v;
            Keyring::decode(&seal(b)).map(|d| d.keyring)
        };
        assert_eq!(with(8, 2), Err(Damage::UnsupportedVersion(2)));
        assert_eq!(with(9, 1), Err(Damage::UnsupportedVersion(257)));
        assert_eq!(with(12, 5), Err(Damage::UnsupportedFeature(4)));
        assert_eq!(with(12, 3), Err(Damage::KeyringUnreadable), "a life-cycle section that is not there");
        assert_eq!(with(10, 1), Err(Damage::KeyringUnreadable), "reserved");
        assert_eq!(with(20, 1), Err(Damage::KeyringUnreadable), "reserved");
        assert!(with(16, 1).unwrap().read_only(), "read-only-compatible");
        assert!(!with(16, 0).unwrap().read_only());
    }

    #[test]
    fn rules_between_fields_hold_on_both_sides() {
        type Breakage = (&'static str, fn(&mut Keyring));
        let broken: [Breakage; 25] = [
            ("no active", |k| k.keks[2].state = KekState::Retired),
            ("two active", |k| k.keks[1].state = KekState::Active),
            ("same KEK twice", |k| k.keks[1].id = k.keks[2].id),
            ("same root twice", |k| k.roots[1].id = k.roots[0].id),
            ("no root", |k| k.roots.clear()),
            ("no secret", |k| k.secret.clear()),
            ("secret by an unknown root", |k| k.secret[0].root = root(3)),
            ("wrapped twice by one root", |k| k.keks[1].wraps[0].root = root(2)),
            ("destroyed with wraps", |k| k.keks[0].wraps.push(wrap(1))),
            ("not destroyed without wraps", |k| k.keks[1].wraps.clear()),
            ("sealed with a provider", |k| k.keks[1].provider = Some(root(1))),
            ("external without a provider", |k| k.keks[3].provider = None),
            ("provider unknown", |k| k.keks[3].provider = Some(root(7))),
            ("generation 0", |k| k.generation = 0),
            ("control character in a URI", |k| k.roots[0].uri.push('\n')),
            ("quorum of one, spelled out", |k| k.life.quorum = 1),
            ("quorum of more than there can be", |k| k.life.quorum = 17),
            ("floor unknown", |k| k.life.floor = Some(KekId([8; 16]))),
            ("floor above the active KEK", |k| k.life.floor = Some(KekId([4; 16]))),
            ("a schedule of an unknown KEK", |k| k.life.schedules[0].kek = KekId([8; 16])),
            ("a schedule of the active KEK", |k| k.life.schedules[0].kek = KekId([3; 16])),
            ("a schedule of a destroyed KEK", |k| k.life.schedules[0].kek = KekId([1; 16])),
            ("scheduled twice", |k| k.life.schedules.push(schedule(2))),
            ("confirmed by nobody", |k| k.life.schedules[0].confirmed = 0),
            ("due before it was scheduled", |k| k.life.schedules[0].due = 9),
        ];
        for (what, f) in broken {
            let mut k = ending();
            f(&mut k);
            assert_eq!(k.encode(mac), Err(Malformed), "{what}");
            // The same bytes from somebody who does not check.
            let len = PREFIX_LEN
                + 2
                + k.roots.iter().map(|r| 18 + r.uri.len()).sum::<usize>()
                + wraps_len(&k.secret)
                + 4
                + k.keks.iter().map(KekRecord::len).sum::<usize>()
                + k.life.len();
            let mut b = vec![0; len];
            k.write(&mut b).unwrap();
            b.extend_from_slice(&[0; 36]);
            assert_eq!(Keyring::decode(&seal(b)), Err(Damage::KeyringUnreadable), "{what}");
        }
        for f in [
            (|k| k.keks[1].wraps[0].bytes = vec![]) as fn(&mut Keyring),
            |k| k.keks[1].wraps[0].bytes = vec![0; 641],
            |k| k.roots[0].uri = String::new(),
            |k| k.roots[0].uri = "u".repeat(1025),
            |k| k.keks[3].provider = Some(root(0)),
        ] {
            let mut k = sample();
            f(&mut k);
            assert_eq!(k.encode(mac), Err(Malformed));
        }
    }

    #[test]
    fn counts_are_bounded_before_anything_is_allocated_for_them() {
        let good = sample().encode(mac).unwrap();
        for (at, v) in [(48, [0xff, 0xff]), (107, [0xff, 0xff]), (107 + 158, [0xff, 0xff])] {
            let mut b = good.clone();
            b[at..at + 2].copy_from_slice(&v);
            assert_eq!(Keyring::decode(&seal(b)), Err(Damage::KeyringUnreadable), "count at {at}");
        }
    }

    fn state() -> impl Strategy<Value = KekState> {
        prop_oneof![Just(KekState::Pending), Just(KekState::Retired), Just(KekState::Destroyed)]
    }

    prop_compose! {
        fn wraps(n: usize)(on in vec(any::<bool>(), n), bytes in vec(vec(any::<u8>(), 1..=640), n)) -> Vec<Wrap> {
            let all = bytes.into_iter().enumerate().map(|(i, bytes)| Wrap { root: root(i as u8 + 1), bytes });
            let first = on.iter().position(|b| *b).unwrap_or(0);
            all.enumerate().filter(|(i, _)| on[*i] || *i == first).map(|(_, w)| w).collect()
        }
    }

    prop_compose! {
        fn record(roots: usize)(
            id in any::<[u8; 16]>(),
            external in any::<bool>(),
            state in state(),
            t in any::<[u64; 5]>(),
            provider in 1..=roots as u8,
            wraps in wraps(roots),
        ) -> KekRecord {
            KekRecord {
                id: KekId(id),
                kind: if external { KekKind::External } else { KekKind::Sealed },
                state,
                created: t[0], activated: t[1], retired: t[2], unused: t[3], destroyed: t[4],
                provider: external.then_some(root(provider)),
                wraps: if state == KekState::Destroyed { vec![] } else { wraps },
            }
        }
    }

    prop_compose! {
        fn keyring()(n in 1usize..4)(
            store in any::<[u8; 16]>(),
            generation in 1u64..,
            plain in any::<bool>(),
            ro_compat in any::<u32>(),
            uris in vec("[^\\p{Cc}]{1,40}", n),
            secret in wraps(n),
            keks in vec(record(n), 0..5),
            active in wraps(n),
            quorum in prop_oneof![Just(0), 2u8..=16],
            floor in 0usize..8,
            times in vec(any::<[u64; 4]>(), 0..5),
        ) -> Keyring {
            let mut keks: Vec<KekRecord> = keks;
            let retired = keks.iter().filter(|k| k.state == KekState::Retired);
            let schedules = retired.zip(times).map(|(k, t)| Schedule {
                kek: k.id, confirmed: 1 + (t[2] % 16) as u8, scheduled: t[0].min(t[1]), due: t[0].max(t[1]), announced: t[2], used: t[3],
            }).collect();
            let floor = keks.get(floor).filter(|k| k.id.0 != [0; 16]).map(|k| k.id);
            keks.push(KekRecord { wraps: active, ..kek(0xaa, KekState::Active) });
            Keyring {
                life: LifeCycle { quorum, floor, schedules },
                store: StoreId(store),
                generation,
                incompat: plain.into(),
                ro_compat,
                roots: uris.into_iter().enumerate().map(|(i, uri)| RootKeyRecord { id: root(i as u8 + 1), uri }).collect(),
                secret,
                keks,
            }
        }
    }

    proptest! {
        #[test]
        fn any_keyring_comes_back(k in keyring()) {
            let bytes = k.encode(mac).unwrap();
            prop_assert_eq!(Keyring::decode(&bytes).unwrap().keyring, k);
        }

        #[test]
        fn any_bytes_are_safe(bytes in vec(any::<u8>(), 0..400)) {
            prop_assert!(Keyring::decode(&bytes).is_err());
            let framed = seal([MAGIC, &[1, 0, 0, 0][..], &bytes, &[0; 36]].concat());
            let _ = Keyring::decode(&framed);
        }

        /// What decodes is exactly what its own encoding is: there is one spelling of each keyring.
        #[test]
        fn changed_bytes_with_a_right_checksum_never_panic_and_have_one_spelling(
            k in keyring(), at in any::<proptest::sample::Index>(), v in any::<u8>(),
        ) {
            let mut b = k.encode(mac).unwrap();
            let i = at.index(b.len() - CRC_LEN);
            b[i] = v;
            let b = seal(b);
            if let Ok(d) = Keyring::decode(&b) {
                prop_assert_eq!(d.keyring.encode(|_| d.mac).unwrap(), b);
            }
        }
    }
}
