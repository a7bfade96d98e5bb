//! One line of the audit log: from an event and its place in the chain to bytes, and back as far as checking needs it.
//! `docs/AUDIT.md` has the fields.

use crate::crypto::kdf::{label, sha256};
pub use crate::crypto::seal::{Hash, Seal, SealKey, hash_from, hex};
use crate::crypto::secret::StoreSecret;
use crate::format::ids::{FileId, KekId, RootKeyId, StoreId};
use crate::format::time::rfc3339;
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use std::borrow::Cow;
use std::time::SystemTime;

/// Longest line that is written or read, in bytes.
pub const LINE_MAX: usize = 64 << 10;
/// Longest text in a field that others choose (a program's path, a service's id), in bytes; the rest is cut off.
const TEXT_MAX: usize = 1024;
/// What stands before the MAC of a seal, and after it.
const MAC_OPENS: &str = ",\"mac\":\"";
const MAC_CLOSES: &str = "\"}";

/// Text that others chose, cut to [`TEXT_MAX`].
pub fn text(s: &str) -> String {
    let end = (0..=s.len().min(TEXT_MAX)).rfind(|i| s.is_char_boundary(*i)).unwrap_or_default();
    s.get(..end).unwrap_or_default().to_owned()
}

/// Numbers by name, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts(pub Vec<(Cow<'static, str>, u64)>);

impl Serialize for Counts {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut m = s.serialize_map(Some(self.0.len()))?;
        self.0.iter().try_for_each(|(k, v)| m.serialize_entry(k, v))?;
        m.end()
    }
}

/// The key of the seals in a store's logs.
pub fn seal_key(secret: &StoreSecret) -> SealKey {
    SealKey::new(secret, label::AUDIT_SEAL)
}

/// What an event is about. A field that does not apply is left out of the line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Fields {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operation: Option<&'static str>,
    /// Why it was done, if not for somebody who waits for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub purpose: Option<&'static str>,
    /// What kind of key was wrapped or unwrapped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<FileId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kek: Option<KekId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_kek: Option<KekId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root_key: Option<RootKeyId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counts: Option<Counts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub about: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exe: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_us: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<String>,
    /// `gap`: how many events could not be written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost: Option<u64>,
    /// `recovered`: hash of the last whole line, and the length of the torn one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub torn_bytes: Option<u64>,
}

/// An event, before it has its place in the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub at: SystemTime,
    pub event: &'static str,
    pub fields: Fields,
}

impl Event {
    /// An event that happens now.
    pub fn now(event: &'static str, fields: Fields) -> Self {
        Self { at: SystemTime::now(), event, fields }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    time: &'a str,
    seq: u64,
    event: &'a str,
    store: StoreId,
    #[serde(flatten)]
    fields: &'a Fields,
    prev: &'a str,
}

/// The line of `e`, without a newline. With `seal`, its MAC is appended.
pub fn encode(e: &Event, store: StoreId, seq: u64, prev: &Hash, seal: Option<&SealKey>) -> Vec<u8> {
    let (time, prev) = (rfc3339(e.at), hex(prev));
    let line = Line { time: &time, seq, event: e.event, store, fields: &e.fields, prev: &prev };
    // Fails only for maps with keys that are not strings, which there are none of.
    let mut bytes = serde_json::to_vec(&line).unwrap_or_default();
    if let Some(key) = seal {
        bytes.pop();
        let mac = hex(&key.seal(&bytes).mac);
        bytes.extend_from_slice([MAC_OPENS, mac.as_str(), MAC_CLOSES].concat().as_bytes());
    }
    bytes
}

/// What checking needs of a line. Unknown fields are skipped: later versions may add some.
#[derive(Debug, Deserialize)]
pub struct Parsed<'a> {
    pub time: Cow<'a, str>,
    pub seq: u64,
    pub event: Cow<'a, str>,
    pub store: StoreId,
    pub prev: Cow<'a, str>,
    #[serde(default)]
    pub after: Option<Cow<'a, str>>,
    #[serde(default)]
    pub torn_bytes: Option<u64>,
    #[serde(default)]
    pub lost: Option<u64>,
}

/// Reads a line; `None` if it is no record.
pub fn parse(line: &[u8]) -> Option<Parsed<'_>> {
    serde_json::from_slice(line).ok()
}

/// Takes a seal's line apart; `None` if it does not end as one.
pub fn seal_of(line: &[u8]) -> Option<Seal> {
    let mac_starts = line.len().checked_sub(64 + MAC_CLOSES.len())?;
    let signed_ends = mac_starts.checked_sub(MAC_OPENS.len())?;
    let whole = line.get(signed_ends..mac_starts)? == MAC_OPENS.as_bytes() && line.ends_with(MAC_CLOSES.as_bytes());
    let digits = std::str::from_utf8(line.get(mac_starts..mac_starts + 64)?).ok()?;
    let mac = hash_from(digits).filter(|_| whole)?;
    Some(Seal { digest: sha256(line.get(..signed_ends)?), mac })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn a_line_has_its_fields_in_order_and_only_those_that_apply() {
        let fields = Fields {
            operation: Some("unwrap"),
            key: Some("dek"),
            file: Some(FileId([1; 16])),
            kek: Some(KekId([2; 16])),
            provider: Some("sealed".into()),
            pid: Some(7),
            uid: Some(1000),
            exe: Some("/usr/bin/\"q\"".into()),
            latency_us: Some(12),
            result: Some("ok".into()),
            ..Fields::default()
        };
        let e = Event { at: UNIX_EPOCH + Duration::from_millis(1_790_000_000_123), event: "unwrap", fields };
        let line = String::from_utf8(encode(&e, StoreId([0xab; 16]), 5, &[0; 32], None)).unwrap();
        let (store, file, kek) = ("ab".repeat(16), "01".repeat(16), "02".repeat(16));
        assert_eq!(
            line,
            format!(
                "{{\"time\":\"2026-09-21T14:13:20.123Z\",\"seq\":5,\"event\":\"unwrap\",\"store\":\"{store}\",\
                 \"operation\":\"unwrap\",\"key\":\"dek\",\"file\":\"{file}\",\"kek\":\"{kek}\",\"provider\":\"sealed\",\
                 \"pid\":7,\"uid\":1000,\"exe\":\"/usr/bin/\\\"q\\\"\",\"latency_us\":12,\"result\":\"ok\",\
                 \"prev\":\"{}\"}}",
                "0".repeat(64)
            )
        );
        let p = parse(line.as_bytes()).unwrap();
        assert_eq!((p.seq, &*p.event, p.store), (5, "unwrap", StoreId([0xab; 16])));
        assert!(seal_of(line.as_bytes()).is_none());
    }

    #[test]
    fn a_seal_is_known_by_its_key_and_no_other() {
        let (key, other) = (seal_key(&StoreSecret::random()), seal_key(&StoreSecret::random()));
        let e = Event::now("seal", Fields::default());
        let line = encode(&e, StoreId([1; 16]), 9, &[7; 32], Some(&key));
        let seal = seal_of(&line).unwrap();
        assert!(key.is_genuine(&seal) && !other.is_genuine(&seal));
        for i in 0..line.len() {
            let mut bad = line.clone();
            bad[i] ^= 1;
            assert!(!seal_of(&bad).is_some_and(|s| key.is_genuine(&s)), "byte {i}");
        }
    }

    #[test]
    fn long_text_is_cut_between_characters() {
        assert_eq!(text("a"), "a");
        let long = "ä".repeat(TEXT_MAX);
        assert_eq!(text(&long).len(), TEXT_MAX);
        assert_eq!(text(&format!("x{long}")).len(), TEXT_MAX - 1);
    }
}
