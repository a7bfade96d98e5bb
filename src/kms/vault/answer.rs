//! What an answer of the server, or none, means for the caller. Decides only.
//!
//! Seen on OpenBao 2.7; the texts are the same in HashiCorp Vault, which the sources are shared with. A refusal with
//! 403 does not say whether the token is bad or may not do this: [`Verdict::Forbidden`] leaves that to be asked.

use super::settings::Settings;
use crate::kms::KmsError;
use serde::Deserialize;
use std::io;

/// Longest text of the server that is repeated in a message.
const TEXT_MAX: usize = 200;

/// What is talked to, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// `vault://MOUNT/KEY`.
    pub uri: String,
    /// The server.
    pub address: String,
    /// Transit mount.
    pub mount: String,
    /// Key name.
    pub key: String,
}

impl Place {
    /// `vault://MOUNT/KEY at ADDRESS`.
    pub fn name(&self) -> String {
        format!("{} at {}", self.uri, self.address)
    }
}

/// What a status and its text mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Done,
    /// The token is bad, or may not do this.
    Forbidden,
    Failed(KmsError),
}

#[derive(Deserialize)]
struct Errors {
    errors: Option<Vec<String>>,
}

/// The server's own words in the body of an answer that is no success, fit for a message.
pub fn text(body: &[u8]) -> String {
    let raw = match serde_json::from_slice::<Errors>(body) {
        Ok(e) => e.errors.unwrap_or_default().join("; "),
        Err(_) => String::from_utf8_lossy(body.get(..TEXT_MAX).unwrap_or(body)).into_owned(),
    };
    plain(&raw)
}

/// One line without control characters, cut.
fn plain(raw: &str) -> String {
    let words: Vec<&str> = raw.split(|c: char| c.is_whitespace() || c.is_control()).filter(|w| !w.is_empty()).collect();
    words.join(" ").chars().take(TEXT_MAX).collect()
}

/// Judges the answer to a request to the Transit engine; `text` as [`text`] has it.
pub fn judge(status: u16, text: &str, place: &Place) -> Verdict {
    let at = place.name();
    Verdict::Failed(match status {
        200..=299 => return Verdict::Done,
        403 => return Verdict::Forbidden,
        404 if text.is_empty() => no_key(place),
        404 => KmsError::NotFound(format!("{at}: {text}; enable the transit engine, or correct mount or namespace")),
        429 => KmsError::Throttled(format!("{at}: {}; raise the quota or slow down", or(text, "too many requests"))),
        _ => item(status, text, place),
    })
}

/// What the text of a failed request, or of one item in a batch (whose `status` is 400), means.
pub fn item(status: u16, text: &str, place: &Place) -> KmsError {
    let at = place.name();
    let path = format!("{}/keys/{}", place.mount, place.key);
    let has = |words: &str| text.contains(words);
    if has("encryption key not found") {
        no_key(place)
    } else if has("soft-deleted") {
        KmsError::Disabled(format!("{at}: soft-deleted; undo with: bao write -f {path}/soft-delete-restore"))
    } else if has("too old") {
        KmsError::NotFound(format!(
            "{at}: wrapped with a version below min_decryption_version; let it in with: bao write {path}/config \
             min_decryption_version=N, and run 'envelopefs key refresh' before raising it"
        ))
    } else if has("message authentication failed") || has("invalid ciphertext") {
        KmsError::BadCiphertext(format!("{at}: {text}"))
    } else {
        let unknown = || KmsError::Config(format!("{at}: answer {status}: {}", or(text, "no reason given")));
        service(status, text, &at).unwrap_or_else(unknown)
    }
}

/// What is wrong, if anything, with the answer to a login, a renewal or a look at a token, at `path`.
pub fn login_failure(status: u16, text: &str, path: &str, place: &Place) -> Option<KmsError> {
    let at = format!("{}/v1/{path}", place.address);
    Some(match status {
        200..=299 => return None,
        400 | 401 | 403 => {
            let why = or(text, "refused");
            KmsError::Credentials(format!("{at}: {why}; check [services.vault.auth] and what it names"))
        }
        404 => KmsError::Config(format!("{at}: {}; correct namespace or auth mount", or(text, "not found"))),
        429 => KmsError::Throttled(format!("{at}: {}", or(text, "too many requests"))),
        _ => service(status, text, &at)
            .unwrap_or_else(|| KmsError::Config(format!("{at}: answer {status}: {}", or(text, "no reason given")))),
    })
}

/// Trouble of the server itself, which has nothing to do with what was asked.
fn service(status: u16, text: &str, at: &str) -> Option<KmsError> {
    let why = match status {
        300..=399 => "a standby that sends elsewhere; give the address of the active node or of a load balancer".into(),
        503 if text.contains("sealed") => "sealed; unseal it with: bao operator unseal".to_owned(),
        472 | 473 => "a standby of another cluster; give the address of the active node".into(),
        412 | 500..=599 => format!("answer {status}: {}; see the server's log", or(text, "no reason given")),
        _ => return None,
    };
    Some(KmsError::Unreachable(format!("{at}: {why}")))
}

fn or<'a>(text: &'a str, otherwise: &'a str) -> &'a str {
    if text.is_empty() { otherwise } else { text }
}

fn no_key(place: &Place) -> KmsError {
    let (at, mount, key) = (place.name(), &place.mount, &place.key);
    KmsError::NotFound(format!(
        "{at}: no such key; make it with: bao write {mount}/keys/{key} type=aes256-gcm96 derived=true"
    ))
}

/// A good token may not do what it was to do.
pub fn denied(method: &str, path: &str, place: &Place) -> KmsError {
    let can = if method == "GET" { "read" } else { "update" };
    KmsError::Denied(format!("{}: its policy lacks: path \"{path}\" {{ capabilities = [\"{can}\"] }}", place.name()))
}

/// What answers is no Vault.
pub fn nonsense(place: &Place) -> KmsError {
    KmsError::Unreachable(format!("{}: what answers there is not Vault or OpenBao; check the address", place.address))
}

/// What it means that there was no answer.
pub fn transport(e: &ureq::Error, s: &Settings) -> KmsError {
    let at = &s.address;
    match e {
        ureq::Error::Timeout(_) => KmsError::Unreachable(format!("{at}: no answer in time ({e}); is it up?")),
        ureq::Error::HostNotFound => KmsError::Unreachable(format!("{at}: host name does not resolve")),
        // The machine's own verifier found no certificates to trust.
        ureq::Error::Rustls(e) => KmsError::Config(format!("{at}: TLS: {e}; {CA_ADVICE}")),
        ureq::Error::Tls(_) | ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => {
            KmsError::Config(format!("{at}: {e}"))
        }
        ureq::Error::Io(io) => match inner_tls(io) {
            Some(tls) => tls_failure(tls, at),
            None => KmsError::Unreachable(format!("{at}: {}; is it up, and is this the right port?", no_code(io))),
        },
        e => KmsError::Unreachable(format!("{at}: {e}")),
    }
}

const CA_ADVICE: &str = "set ca_file in [services.vault] or VAULT_CACERT to the PEM file of the CA";

fn inner_tls(e: &io::Error) -> Option<&rustls::Error> {
    e.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>())
}

/// Trust and names are settled here; all else about TLS is the server's, and may pass.
fn tls_failure(e: &rustls::Error, at: &str) -> KmsError {
    use rustls::{AlertDescription as Alert, CertificateError as Bad, Error};
    match e {
        Error::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. }) => KmsError::Unreachable(format!(
            "{at}: its TLS certificate has expired; renew it there, or set this machine's clock"
        )),
        Error::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => KmsError::Config(
            format!("{at}: its TLS certificate is for another name; use the name that is in it as the address"),
        ),
        Error::InvalidCertificate(why) => KmsError::Config(format!(
            "{at}: its TLS certificate is not trusted ({}); {CA_ADVICE}",
            plain(&why.to_string())
        )),
        Error::AlertReceived(
            Alert::CertificateRequired
            | Alert::BadCertificate
            | Alert::UnknownCA
            | Alert::UnsupportedCertificate
            | Alert::CertificateExpired
            | Alert::CertificateRevoked
            | Alert::CertificateUnknown,
        ) => KmsError::Credentials(format!(
            "{at}: it refuses our client certificate, or wants one ({e}); see method = \"tls-cert\" in [services.vault.auth]"
        )),
        e => KmsError::Unreachable(format!("{at}: TLS: {}", plain(&e.to_string()))),
    }
}

/// The kernel's words, without Rust's "(os error N)".
fn no_code(e: &io::Error) -> String {
    let text = e.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kms::services::VaultOptions;

    fn place() -> Place {
        Place { uri: "vault://t/k".into(), address: "https://v".into(), mount: "t".into(), key: "k".into() }
    }

    /// The class of an error, and that its message is one line which names place or address.
    fn class(e: &KmsError) -> &'static str {
        let text = e.to_string();
        assert!(text.contains("https://v") && !text.chars().any(char::is_control), "{text:?}");
        e.code()
    }

    fn verdict(v: &Verdict) -> &'static str {
        match v {
            Verdict::Done => "done",
            Verdict::Forbidden => "forbidden",
            Verdict::Failed(e) => class(e),
        }
    }

    #[test]
    fn answers_of_the_transit_engine() {
        for (status, text, expected, advice) in [
            (200, "", "done", ""),
            (204, "", "done", ""),
            (403, "permission denied", "forbidden", ""),
            (403, "2 errors occurred: * permission denied * invalid token", "forbidden", ""),
            (429, "request path \"t/keys/k\": rate limit quota exceeded", "kms-throttled", "quota"),
            (503, "Vault is sealed", "kms-unreachable", "sealed; unseal"),
            (503, "", "kms-unreachable", "503"),
            (500, "internal error", "kms-unreachable", "internal error"),
            (500, "cipher: message authentication failed", "kms-bad-ciphertext", ""),
            (502, "", "kms-unreachable", "502"),
            (472, "", "kms-unreachable", "standby"),
            (473, "", "kms-unreachable", "standby"),
            (412, "required index state not present", "kms-unreachable", ""),
            (307, "", "kms-unreachable", "active node"),
            (302, "", "kms-unreachable", "active node"),
            (404, "", "kms-not-found", "derived=true"),
            (404, "no handler for route \"t/keys/k\". route entry not found.", "kms-not-found", "mount"),
            (404, "namespace not found", "kms-not-found", "namespace"),
            (400, "encryption key not found", "kms-not-found", "derived=true"),
            (400, "refusing to use soft-deleted key", "kms-disabled", "soft-delete-restore"),
            (
                400,
                "ciphertext or signature version is disallowed by policy (too old)",
                "kms-not-found",
                "min_decryption",
            ),
            (400, "cipher: message authentication failed", "kms-bad-ciphertext", ""),
            (400, "chacha20poly1305: message authentication failed", "kms-bad-ciphertext", ""),
            (400, "invalid ciphertext length", "kms-bad-ciphertext", ""),
            (400, "invalid ciphertext: version is too new", "kms-bad-ciphertext", ""),
            (400, "invalid ciphertext: no prefix", "kms-bad-ciphertext", ""),
            (400, "Client sent an HTTP request to an HTTPS server.", "kms-config", "HTTPS"),
            (400, "", "kms-config", "no reason"),
            (405, "unsupported operation", "kms-config", "unsupported"),
            (418, "", "kms-config", "418"),
        ] {
            let v = judge(status, text, &place());
            assert_eq!(verdict(&v), expected, "{status} {text}");
            if let Verdict::Failed(e) = v {
                assert!(e.to_string().contains(advice), "{status} {text}: {e}");
            }
        }
    }

    #[test]
    fn answers_to_a_login() {
        for (status, text, expected) in [
            (200, "", "done"),
            (400, "invalid role or secret ID", "kms-credentials"),
            (403, "permission denied", "kms-credentials"),
            (401, "", "kms-credentials"),
            (404, "no handler for route", "kms-config"),
            (429, "", "kms-throttled"),
            (503, "Vault is sealed", "kms-unreachable"),
            (500, "", "kms-unreachable"),
            (307, "", "kms-unreachable"),
            (418, "", "kms-config"),
        ] {
            let e = login_failure(status, text, "auth/approle/login", &place());
            assert_eq!(e.as_ref().map_or("done", class), expected, "{status} {text}");
        }
    }

    #[test]
    fn the_servers_text_is_one_short_line() {
        assert_eq!(text(br#"{"errors":["a","b"]}"#), "a; b");
        assert_eq!(text(br#"{"errors":[]}"#), "");
        assert_eq!(text(br#"{"errors":null}"#), "");
        assert_eq!(
            text(b"2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n"),
            "2 errors occurred: * permission denied * invalid token"
        );
        assert_eq!(text(b"a\x1b[2J\x00b"), "a [2J b");
        assert_eq!(text(&[b'x'; 10_000]).len(), TEXT_MAX);
        assert_eq!(text(b""), "");
    }

    #[test]
    fn a_denial_shows_the_policy_that_is_missing() {
        let e = denied("GET", "t/keys/k", &place());
        assert_eq!(class(&e), "kms-denied");
        assert!(e.to_string().ends_with("path \"t/keys/k\" { capabilities = [\"read\"] }"), "{e}");
        assert!(denied("POST", "t/decrypt/k", &place()).to_string().contains("[\"update\"]"));
    }

    #[test]
    fn what_comes_instead_of_an_answer() {
        use rustls::{AlertDescription as Alert, CertificateError as Bad, Error};
        let o = VaultOptions { address: Some("https://v".into()), ..Default::default() };
        let s = Settings::new(&o, &|n| (n == "VAULT_TOKEN").then(|| "t".into())).unwrap();
        let io = |kind: io::ErrorKind| ureq::Error::Io(kind.into());
        let tls = |e: Error| ureq::Error::Io(io::Error::new(io::ErrorKind::InvalidData, e));
        for (e, expected, advice) in [
            (ureq::Error::Timeout(ureq::Timeout::Global), "kms-unreachable", "in time"),
            (io(io::ErrorKind::ConnectionRefused), "kms-unreachable", "up"),
            (io(io::ErrorKind::ConnectionReset), "kms-unreachable", ""),
            (io(io::ErrorKind::UnexpectedEof), "kms-unreachable", ""),
            (ureq::Error::HostNotFound, "kms-unreachable", "resolve"),
            (ureq::Error::ConnectionFailed, "kms-unreachable", ""),
            (ureq::Error::TooManyRedirects, "kms-unreachable", ""),
            (ureq::Error::Tls("invalid name"), "kms-config", ""),
            (ureq::Error::Rustls(Error::General("no roots".into())), "kms-config", "ca_file"),
            (tls(Error::InvalidCertificate(Bad::UnknownIssuer)), "kms-config", "ca_file"),
            (tls(Error::InvalidCertificate(Bad::BadSignature)), "kms-config", "ca_file"),
            (tls(Error::InvalidCertificate(Bad::NotValidForName)), "kms-config", "name"),
            (tls(Error::InvalidCertificate(Bad::Expired)), "kms-unreachable", "clock"),
            (tls(Error::AlertReceived(Alert::CertificateRequired)), "kms-credentials", "tls-cert"),
            (tls(Error::AlertReceived(Alert::UnknownCA)), "kms-credentials", "tls-cert"),
            (tls(Error::AlertReceived(Alert::InternalError)), "kms-unreachable", ""),
            (tls(Error::DecryptError), "kms-unreachable", ""),
        ] {
            let got = transport(&e, &s);
            assert_eq!(class(&got), expected, "{e}");
            assert!(got.to_string().contains(advice), "{e}: {got}");
        }
    }
}
