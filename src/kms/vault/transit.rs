//! What goes to and comes from the Transit engine. Decides only.
//!
//! The context of a wrap is bound by key derivation: the key must have `derived=true`, and every request carries
//! `context` = base64(SHA-256([`WrapContext::to_aad`])). The hash makes it 32 bytes whatever it is of. Transit's other
//! way to bind, `associated_data`, does not do for `rewrap`, which cannot be given any; and on a key that is not derived
//! `context` is silently ignored, which is why [`KeyInfo::check`] refuses such a key.
//!
//! A wrapped key is the server's text as it is: `vault:vN:` and base64.

use super::answer::Place;
use crate::crypto::kdf::sha256;
use crate::crypto::secret::{KEY_LEN, Secret32};
use crate::kms::{KmsError, WRAPPED_MAX, WrapContext};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use zeroize::Zeroizing;

/// Most items in one batch. OpenBao refuses a request of more than 1000 JSON strings; an item has four.
pub const BATCH_MAX: usize = 100;

/// Nonce and tag around 32 bytes, at least.
const SEALED_MIN: usize = KEY_LEN + 12 + 16;
/// Longest nonce (XChaCha20) and tag around 32 bytes.
const SEALED_MAX: usize = KEY_LEN + 24 + 16;

/// Whether `key_type` seals with authentication and can be derived.
fn is_aead(key_type: &str) -> bool {
    matches!(key_type, "aes128-gcm96" | "aes256-gcm96" | "chacha20-poly1305" | "xchacha20-poly1305")
}

/// What `GET keys/K` says.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct KeyInfo {
    #[serde(rename = "type")]
    pub key_type: String,
    #[serde(default)]
    pub derived: bool,
    #[serde(default)]
    pub convergent_encryption: bool,
    #[serde(default)]
    pub exportable: bool,
    #[serde(default)]
    pub allow_plaintext_backup: bool,
    #[serde(default)]
    pub deletion_allowed: bool,
    /// OpenBao only.
    #[serde(default)]
    pub soft_deleted: bool,
    pub latest_version: u32,
}

impl KeyInfo {
    /// Whether the key can be a root key at all.
    ///
    /// # Errors
    /// [`KmsError::Config`] if it does not bind contexts or does not authenticate; [`KmsError::Disabled`].
    pub fn check(&self, place: &Place) -> Result<(), KmsError> {
        let (at, mount, key) = (place.name(), &place.mount, &place.key);
        let refuse = |why: &str| {
            Err(KmsError::Config(format!(
                "{at}: {why}; make another: bao write {mount}/keys/{key}-2 type=aes256-gcm96 derived=true"
            )))
        };
        if !is_aead(&self.key_type) {
            let shown: String = self.key_type.chars().take(40).flat_map(char::escape_debug).collect();
            return refuse(&format!("a key of type {shown} cannot be a root key"));
        }
        if !self.derived {
            return refuse("made without derived=true, it would unwrap under any context");
        }
        if self.convergent_encryption {
            return refuse("made with convergent_encryption=true, it would wrap the same key to the same bytes");
        }
        if self.soft_deleted {
            return Err(KmsError::Disabled(format!(
                "{at}: soft-deleted; undo with: bao write -f {mount}/keys/{key}/soft-delete-restore"
            )));
        }
        Ok(())
    }

    /// What an administrator should know.
    pub fn warnings(&self) -> Vec<&'static str> {
        [
            (self.exportable, "it is exportable: who may export it can read everything for ever"),
            (self.allow_plaintext_backup, "it has allow_plaintext_backup: a backup of it lets others read everything"),
            (self.deletion_allowed, "it has deletion_allowed: without it, everything is lost"),
        ]
        .into_iter()
        .filter_map(|(is, text)| is.then_some(text))
        .collect()
    }
}

/// The `context` of requests, base64.
pub fn context(c: &WrapContext) -> String {
    BASE64.encode(sha256(&c.to_aad()))
}

/// A wrapped key whose form is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wrapped<'a> {
    pub text: &'a str,
    /// The root key's version, from 1.
    pub version: u32,
}

/// Checks the form before anything is sent: `None` if these are not bytes that a server has made.
pub fn wrapped(bytes: &[u8]) -> Option<Wrapped<'_>> {
    let text = std::str::from_utf8(bytes).ok().filter(|t| t.len() <= WRAPPED_MAX)?;
    let (number, sealed) = text.strip_prefix("vault:v")?.split_once(':')?;
    let digits = !number.starts_with('0') && number.bytes().all(|b| b.is_ascii_digit());
    let version = number.parse().ok().filter(|_| digits)?;
    let len = BASE64.decode(sealed).ok()?.len();
    (SEALED_MIN..=SEALED_MAX).contains(&len).then_some(Wrapped { text, version })
}

/// Body of an `encrypt`.
pub fn encrypt_body(key: &Secret32, c: &WrapContext) -> Zeroizing<String> {
    // Room for all of it, so that no copy is left behind when it grows.
    let mut body = Zeroizing::new(String::with_capacity(256));
    body.push_str(r#"{"plaintext":""#);
    BASE64.encode_string(key.expose(), &mut body);
    body.push_str(r#"","context":""#);
    body.push_str(&context(c));
    body.push_str(r#""}"#);
    body
}

/// Body of a `decrypt` or `rewrap`.
pub fn ciphertext_body(w: Wrapped<'_>, c: &WrapContext) -> String {
    format!(r#"{{"ciphertext":"{}","context":"{}"}}"#, w.text, context(c))
}

/// Body of a `decrypt` of many. Older servers do not know `partial_failure_response_code`, and answer 400 with the same
/// body if an item failed.
pub fn batch_body(items: &[(Wrapped<'_>, &WrapContext)]) -> String {
    let each: Vec<String> = items.iter().map(|(w, c)| ciphertext_body(*w, c)).collect();
    format!(r#"{{"batch_input":[{}],"partial_failure_response_code":200}}"#, each.join(","))
}

/// Body of a `datakey/plaintext`.
pub fn datakey_body(c: &WrapContext) -> String {
    format!(r#"{{"bits":256,"context":"{}"}}"#, context(c))
}

/// What all answers have around what was asked for.
#[derive(Debug, Deserialize)]
pub struct Envelope<T> {
    pub request_id: Option<String>,
    pub data: T,
}

/// Answer to `decrypt`. Borrowed, so that the only copy is the body, which is wiped.
#[derive(Deserialize)]
pub struct Plaintext<'a> {
    pub plaintext: &'a str,
}

/// Answer to `encrypt` and `rewrap`.
#[derive(Deserialize)]
pub struct Ciphertext {
    pub ciphertext: String,
}

/// Answer to `datakey/plaintext`.
#[derive(Deserialize)]
pub struct Datakey<'a> {
    pub plaintext: &'a str,
    pub ciphertext: String,
}

/// Answer to a `decrypt` of many.
#[derive(Deserialize)]
pub struct Batch<'a> {
    #[serde(borrow)]
    pub batch_results: Vec<BatchItem<'a>>,
}

/// One of many. With an error, the plaintext is empty.
#[derive(Deserialize)]
pub struct BatchItem<'a> {
    #[serde(default)]
    pub plaintext: &'a str,
    pub error: Option<String>,
}

/// The 32 bytes in base64; `None` if it is anything else.
pub fn key_of(text: &str) -> Option<Secret32> {
    let mut room = Zeroizing::new([0u8; 64]);
    if text.len() != 44 {
        return None;
    }
    let n = BASE64.decode_slice(text, &mut *room).ok()?;
    let bytes: &[u8; KEY_LEN] = room.get(..n)?.try_into().ok()?;
    Some(Secret32::build(|b| b.copy_from_slice(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kms::KeyPurpose;

    fn place() -> Place {
        Place { uri: "vault://t/k".into(), address: "https://v".into(), mount: "t".into(), key: "k".into() }
    }

    fn good() -> KeyInfo {
        serde_json::from_str(r#"{"type":"aes256-gcm96","derived":true,"latest_version":3,"more":[1]}"#).unwrap()
    }

    #[test]
    fn keys_that_can_be_root_keys_and_that_cannot() {
        assert_eq!(good().check(&place()), Ok(()));
        for t in ["aes128-gcm96", "chacha20-poly1305", "xchacha20-poly1305"] {
            assert_eq!(KeyInfo { key_type: t.into(), ..good() }.check(&place()), Ok(()), "{t}");
        }
        for (k, word) in [
            (KeyInfo { derived: false, ..good() }, "derived=true"),
            (KeyInfo { convergent_encryption: true, ..good() }, "convergent"),
            (KeyInfo { key_type: "ed25519".into(), ..good() }, "ed25519"),
            (KeyInfo { key_type: "rsa-4096".into(), ..good() }, "rsa-4096"),
            (KeyInfo { key_type: "aes256-cbc".into(), ..good() }, "aes256-cbc"),
            (KeyInfo { key_type: "\u{1b}[2J".into(), ..good() }, "type"),
        ] {
            let e = k.check(&place()).unwrap_err();
            assert!(matches!(&e, KmsError::Config(m) if m.contains(word) && !m.chars().any(char::is_control)), "{e}");
        }
        assert!(matches!(KeyInfo { soft_deleted: true, ..good() }.check(&place()), Err(KmsError::Disabled(_))));
        assert!(good().warnings().is_empty());
        let k = KeyInfo { exportable: true, allow_plaintext_backup: true, deletion_allowed: true, ..good() };
        assert_eq!(k.warnings().len(), 3);
        assert_eq!(k.check(&place()), Ok(()), "warned of, not refused");
    }

    /// What OpenBao 2.7.2 made.
    const MADE: &str = "vault:v1:bWb994YKroFrkh2f28fAT8Ng0sa/ungWgNlqC+KJcxULD0o5in698yEiLd3n5UiCxwxQwwcNW/DCCuPZ";

    #[test]
    fn wrapped_bytes_are_checked_before_they_are_sent() {
        assert_eq!(MADE.len(), 89);
        assert_eq!(wrapped(MADE.as_bytes()), Some(Wrapped { text: MADE, version: 1 }));
        let sealed = MADE.strip_prefix("vault:v1:").unwrap();
        for (number, version) in [
            ("2", Some(2)),
            ("4294967295", Some(u32::MAX)),
            ("4294967296", None),
            ("0", None),
            ("01", None),
            ("+1", None),
            ("-1", None),
            ("", None),
            ("x", None),
            ("1 ", None),
        ] {
            let text = format!("vault:v{number}:{sealed}");
            assert_eq!(wrapped(text.as_bytes()).map(|w| w.version), version, "{number:?}");
        }
        for text in [
            String::new(),
            "vault:v1".into(),
            "vault:v1:".into(),
            format!("vault:{sealed}"),
            format!("Vault:v1:{sealed}"),
            format!("vault:v1:{}", &sealed[4..]),
            format!("vault:v1:{sealed}AAAA{}", "A".repeat(16)),
            format!("vault:v1:{}\"", &sealed[1..]),
            format!("vault:v1:{}\\", &sealed[1..]),
            format!("vault:v1:{sealed}\n"),
            format!("vault:v1:{}", "A".repeat(700)),
        ] {
            assert_eq!(wrapped(text.as_bytes()), None, "{text}");
        }
        assert_eq!(wrapped(b"vault:v1:\xff"), None);
        let xchacha = format!("vault:v1:{}", BASE64.encode([7; SEALED_MAX]));
        assert!(wrapped(xchacha.as_bytes()).is_some());
    }

    #[test]
    fn bodies_are_json_and_say_what_they_should() {
        let c = WrapContext { store: [1; 16], purpose: KeyPurpose::Kek, object: [2; 16], extra: vec![3; 146] };
        // Fixed, for wraps that exist must open for ever: SHA-256 of "envelopefs/v1/kek", 0, 16 × 1, 16 × 2, 146 × 3.
        let bound = "O7B4VzPMJJIgH2sE/Gd85JneQilFuo2tVQ6gHopMJ+M=";
        assert_eq!(context(&c), bound);
        let key = Secret32::build(|b| b.fill(9));
        let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        let body = encrypt_body(&key, &c);
        assert!(body.capacity() == 256 && body.len() < 256);
        assert_eq!(json(&body), serde_json::json!({"plaintext": BASE64.encode([9; 32]), "context": bound}));
        let w = wrapped(MADE.as_bytes()).unwrap();
        assert_eq!(json(&ciphertext_body(w, &c)), serde_json::json!({"ciphertext": MADE, "context": bound}));
        assert_eq!(json(&datakey_body(&c)), serde_json::json!({"bits": 256, "context": bound}));
        let batch = json(&batch_body(&[(w, &c), (w, &c)]));
        let one = serde_json::json!({"ciphertext": MADE, "context": bound});
        assert_eq!(batch, serde_json::json!({"batch_input": [one, one], "partial_failure_response_code": 200}));
    }

    #[test]
    fn a_key_is_32_bytes_in_base64() {
        let key = Secret32::random();
        assert!(key_of(&BASE64.encode(key.expose())).unwrap().ct_eq(&key));
        for bad in
            [String::new(), BASE64.encode([1; 31]), BASE64.encode([1; 33]), BASE64.encode([1; 64]), "!".repeat(44)]
        {
            assert!(key_of(&bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn answers_are_read_without_copies_of_the_key() {
        let body = br#"{"request_id":"r","data":{"batch_results":[{"plaintext":"QQ==","reference":""},
            {"plaintext":"","error":"cipher: message authentication failed"},{"error":"x"}]},"auth":null}"#;
        let e: Envelope<Batch<'_>> = serde_json::from_slice(body).unwrap();
        assert_eq!(e.request_id.as_deref(), Some("r"));
        let got: Vec<_> = e.data.batch_results.iter().map(|i| (i.plaintext, i.error.as_deref())).collect();
        let failed = "cipher: message authentication failed";
        assert_eq!(got, [("QQ==", None), ("", Some(failed)), ("", Some("x"))]);
        let inside = body.as_ptr_range();
        assert!(inside.contains(&got[0].0.as_ptr()));
    }
}
