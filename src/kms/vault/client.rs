//! HTTP to the server: one request, one answer, no retry.
//!
//! Redirects are not followed, not even to the same host. A standby sends elsewhere by its own idea of where the active
//! node is (`api_addr`), and a token must go to no host but the one configured; a redirect to the same host would come
//! from what is no Vault. Servers forward requests to the active node by themselves unless that is turned off.

use super::answer::{self, Place};
use super::files::{self, Mode};
use super::settings::{Login, Settings};
use crate::kms::KmsError;
use crate::kms::fill::fill;
use std::io::Read;
use std::sync::Arc;
use ureq::http::{HeaderValue, Request, Uri};
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, TlsProvider, parse_pem};
use zeroize::{Zeroize, Zeroizing};

/// Longest answer that is read, in bytes. A batch of 100 has some 12 KiB, a key with 1000 versions 25.
const ANSWER_MAX: usize = 1024 * 1024;

/// A token, as it goes into the header.
pub struct Token(Zeroizing<String>);

impl Token {
    /// A token of printable characters, as [`files::one_line`] makes sure.
    pub fn new(text: Zeroizing<String>) -> Self {
        Self(text)
    }

    /// Whether both are the same token.
    pub fn same(&self, other: &Self) -> bool {
        crate::crypto::kdf::ct_eq(self.0.as_bytes(), other.0.as_bytes())
    }
}

/// An answer, whatever its status.
pub struct Answer {
    pub status: u16,
    /// At most [`ANSWER_MAX`] bytes. May hold a key, so it is wiped when dropped.
    pub body: Zeroizing<Vec<u8>>,
}

impl Answer {
    /// The server's words, if this is no success. What succeeded may hold a key, and is not copied.
    pub fn text(&self) -> String {
        if (200..300).contains(&self.status) { String::new() } else { answer::text(&self.body) }
    }
}

/// Connections to the server, kept open between requests.
pub struct Client {
    agent: ureq::Agent,
    settings: Arc<Settings>,
}

impl Client {
    /// Reads the CA file and, to log in with a client certificate, that and its key. Connects to nothing yet.
    ///
    /// # Errors
    /// [`KmsError::Config`] or [`KmsError::Credentials`] if a file cannot be used.
    pub fn new(settings: &Arc<Settings>) -> Result<Self, KmsError> {
        let s = settings;
        let crypto = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let roots = match &s.ca_file {
            Some(path) => {
                let pem = files::read(path, "CA file", Mode::Public)?;
                let certificates = certificates(&pem)
                    .ok_or_else(|| KmsError::Config(format!("CA file {}: no PEM certificate in it", path.display())))?;
                RootCerts::new_with_certs(&certificates)
            }
            None => RootCerts::PlatformVerifier,
        };
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(roots)
            .client_cert(client_certificate(&s.login, &crypto)?)
            .unversioned_rustls_crypto_provider(crypto)
            .build();
        let mut config = ureq::Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(s.connect_timeout))
            .timeout_global(Some(s.timeout))
            .max_idle_connections_per_host(16)
            .max_idle_connections(16)
            .user_agent(concat!("envelopefs/", env!("CARGO_PKG_VERSION")));
        if s.plain {
            // A proxy from the environment would see the token.
            config = config.proxy(None);
        }
        Ok(Self { agent: config.build().new_agent(), settings: settings.clone() })
    }

    /// `GET` without a body, `POST` with one.
    ///
    /// # Errors
    /// As [`answer::transport`].
    pub fn send(&self, path: &str, token: Option<&Token>, body: Option<&[u8]>) -> Result<Answer, KmsError> {
        let failed = |e: ureq::Error| answer::transport(&e, &self.settings);
        let uri = Uri::try_from(format!("{}/v1/{path}", self.settings.address))
            .map_err(|e| failed(ureq::Error::Http(e.into())))?;
        let mut request = Request::builder().uri(uri).header("X-Vault-Request", "true");
        if let Some(n) = &self.settings.namespace {
            request = request.header("X-Vault-Namespace", n);
        }
        if let Some(t) = token {
            let mut value = HeaderValue::from_str(&t.0).map_err(|e| failed(ureq::Error::Http(e.into())))?;
            value.set_sensitive(true);
            request = request.header("X-Vault-Token", value);
        }
        let sent = match body {
            None => request.method("GET").body(()).map_err(ureq::Error::Http).and_then(|r| self.agent.run(r)),
            Some(b) => request
                .method("POST")
                .header("Content-Type", "application/json")
                .body(b)
                .map_err(ureq::Error::Http)
                .and_then(|r| self.agent.run(r)),
        };
        let mut response = sent.map_err(failed)?;
        let status = response.status().as_u16();
        let body = response.body_mut();
        let expected = body.content_length();
        let mut reader = body.with_config().limit(2 * ANSWER_MAX as u64).reader();
        let body = read_bounded(&mut reader, expected).map_err(|e| failed(ureq::Error::from(e)))?;
        match body {
            Some(body) => Ok(Answer { status, body }),
            None => Err(KmsError::Unreachable(format!(
                "{}: an answer of more than {ANSWER_MAX} bytes; check the address",
                self.settings.address
            ))),
        }
    }
}

/// Everything that comes, without leaving copies behind; `None` if it is too much.
fn read_bounded(from: &mut impl Read, expected: Option<u64>) -> std::io::Result<Option<Zeroizing<Vec<u8>>>> {
    let room = expected.and_then(|n| usize::try_from(n).ok()).unwrap_or(16 * 1024).min(ANSWER_MAX) + 1;
    let mut body = Zeroizing::new(vec![0; room]);
    let mut n = 0;
    loop {
        if n == body.len() {
            if n > ANSWER_MAX {
                return Ok(None);
            }
            let mut more = Zeroizing::new(vec![0; (n * 2).min(ANSWER_MAX + 1)]);
            more.iter_mut().zip(body.iter()).for_each(|(to, from)| *to = *from);
            body.zeroize();
            body = more;
        }
        n += fill(from, body.get_mut(n..).unwrap_or_default())?;
        if n < body.len() {
            break;
        }
    }
    body.truncate(n);
    Ok(Some(body))
}

/// The certificates in a PEM file; `None` if there are none.
fn certificates(pem: &[u8]) -> Option<Vec<Certificate<'static>>> {
    let found: Vec<_> = parse_pem(pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(c)) => Some(c),
            _ => None,
        })
        .collect();
    (!found.is_empty()).then_some(found)
}

/// The client certificate, if the login is with one.
fn client_certificate(login: &Login, crypto: &rustls::crypto::CryptoProvider) -> Result<Option<ClientCert>, KmsError> {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let Login::Certificate { cert_file, key_file, .. } = login else { return Ok(None) };
    let unusable = |path: &std::path::Path, why: &str| {
        KmsError::Credentials(format!("client certificate {}: {why}", path.display()))
    };
    let chain = certificates(&files::read(cert_file, "client certificate", Mode::Public)?)
        .ok_or_else(|| unusable(cert_file, "no PEM certificate in it"))?;
    let pem = files::read(key_file, "client key", Mode::Secret)?;
    let no_key = || unusable(key_file, "no PEM private key in it");
    let key = PrivateKey::from_pem(&pem).map_err(|_| no_key())?;
    // ureq takes it for granted that certificate and key belong together.
    let der = PrivateKeyDer::try_from(key.der().to_vec()).map_err(|_| no_key())?;
    let certs = chain.iter().map(|c| CertificateDer::from(c.der().to_vec())).collect();
    rustls::sign::CertifiedKey::from_der(certs, der, crypto).map_err(|e| unusable(cert_file, &e.to_string()))?;
    Ok(Some(ClientCert::new_with_certs(&chain, key)))
}

/// The part of an answer's body that is asked for.
///
/// # Errors
/// [`KmsError::Unreachable`] if it is not what Vault says.
pub fn parse<'a, T: serde::Deserialize<'a>>(a: &'a Answer, place: &Place) -> Result<T, KmsError> {
    serde_json::from_slice(&a.body).map_err(|_| answer::nonsense(place))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_whole_or_not_at_all() {
        for (len, expected) in [
            (0, None),
            (10, None),
            (10, Some(10)),
            (10, Some(3)),
            (10, Some(0)),
            (10, Some(u64::MAX)),
            (16 * 1024, None),
            (100_000, None),
            (ANSWER_MAX, None),
            (ANSWER_MAX, Some(ANSWER_MAX as u64)),
        ] {
            let text: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            let got = read_bounded(&mut text.as_slice(), expected).unwrap().unwrap();
            assert!(*got == text, "{len} {expected:?}");
        }
        for expected in [None, Some(1), Some(u64::MAX)] {
            assert!(read_bounded(&mut std::io::repeat(1), expected).unwrap().is_none());
        }
    }

    #[test]
    fn tokens_are_compared() {
        let t = |s: &str| Token::new(Zeroizing::new(s.to_owned()));
        assert!(t("a").same(&t("a")));
        assert!(!t("a").same(&t("b")) && !t("a").same(&t("ab")));
    }
}
