//! Where the server is and how to log in, from the configuration and the environment. The configuration wins over the
//! environment, and of that `BAO_…` wins over `VAULT_…`, as OpenBao's own command line has it.

use crate::kms::KmsError;
use crate::kms::services::{VaultAuth, VaultOptions};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;
use zeroize::Zeroizing;

/// Limit for a connection, if nothing else is configured.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Limit for one request and its answer, if nothing else is configured.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Where a pod finds its service account's token.
const POD_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// Where a token that somebody else keeps comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenSource {
    File(PathBuf),
    /// The variable's name. Its value is looked up when it is needed, and is the same for the life of the process.
    Environment(&'static str),
}

/// How to log in, with nothing left to be looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Login {
    Token(TokenSource),
    Approle { mount: String, role_id: String, secret_id_file: PathBuf },
    Kubernetes { mount: String, role: String, jwt_file: PathBuf },
    Certificate { mount: String, role: Option<String>, cert_file: PathBuf, key_file: PathBuf },
}

/// Everything that is needed to reach the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Scheme, host, port and perhaps a path, without a slash at the end.
    pub address: String,
    /// Whether requests go out unencrypted: to this machine, or because the configuration says so.
    pub plain: bool,
    pub namespace: Option<String>,
    pub ca_file: Option<PathBuf>,
    pub connect_timeout: Duration,
    pub timeout: Duration,
    pub login: Login,
}

fn refuse<T>(why: impl Into<String>) -> Result<T, KmsError> {
    Err(KmsError::Config(why.into()))
}

impl Settings {
    /// Puts together `o` and what `env` says of a variable.
    ///
    /// # Errors
    /// [`KmsError::Config`] if there is no address, or something cannot be used; [`KmsError::Credentials`] if no token
    /// was named at all.
    pub fn new(o: &VaultOptions, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, KmsError> {
        let env = |name: &str| env(name).filter(|v| !v.is_empty());
        let either = |a: &str, b: &str| env(a).or_else(|| env(b));
        let Some(address) = o.address.clone().or_else(|| either("BAO_ADDR", "VAULT_ADDR")) else {
            return refuse("no Vault or OpenBao server: set address in [services.vault], VAULT_ADDR or BAO_ADDR");
        };
        let (address, plain) = check_address(&address, o.allow_http)?;
        let namespace = o.namespace.clone().or_else(|| either("BAO_NAMESPACE", "VAULT_NAMESPACE"));
        let namespace = namespace.map(|n| n.trim_matches('/').to_owned()).filter(|n| !n.is_empty());
        if let Some(n) = namespace.as_ref().filter(|n| !is_path(n)) {
            return refuse(format!("Vault namespace '{}': characters that it cannot have", n.escape_debug()));
        }
        let ca_file = o.ca_file.clone().or_else(|| either("BAO_CACERT", "VAULT_CACERT").map(PathBuf::from));
        let limit = |given: Option<u64>, usual: Duration, name: &str| match given {
            None => Ok(usual),
            Some(ms @ 1..=600_000) => Ok(Duration::from_millis(ms)),
            Some(ms) => refuse(format!("[services.vault] {name} = {ms}: 1 to 600000 milliseconds are possible")),
        };
        Ok(Self {
            address,
            plain,
            namespace,
            ca_file: ca_file.map(|p| absolute(p, "ca_file or VAULT_CACERT")).transpose()?,
            connect_timeout: limit(o.connect_timeout_ms, CONNECT_TIMEOUT, "connect_timeout_ms")?,
            timeout: limit(o.attempt_timeout_ms, TIMEOUT, "attempt_timeout_ms")?,
            login: login(&o.auth, &env)?,
        })
    }
}

fn login(auth: &VaultAuth, env: &dyn Fn(&str) -> Option<String>) -> Result<Login, KmsError> {
    let at = |mount: &Option<String>, usual: &str| {
        let m = mount.as_deref().unwrap_or(usual).trim_matches('/').to_owned();
        if is_path(&m) { Ok(m) } else { refuse(format!("[services.vault.auth] mount '{}'", m.escape_debug())) }
    };
    Ok(match auth {
        VaultAuth::Token { token_file: Some(f) } => Login::Token(TokenSource::File(absolute(f.clone(), "token_file")?)),
        VaultAuth::Token { token_file: None } => Login::Token(usual_token(env)?),
        VaultAuth::Approle { role_id, secret_id_file, mount } => Login::Approle {
            mount: at(mount, "approle")?,
            role_id: role_id.clone(),
            secret_id_file: absolute(secret_id_file.clone(), "secret_id_file")?,
        },
        VaultAuth::Kubernetes { role, jwt_file, mount } => Login::Kubernetes {
            mount: at(mount, "kubernetes")?,
            role: role.clone(),
            jwt_file: absolute(jwt_file.clone().unwrap_or_else(|| POD_TOKEN.into()), "jwt_file")?,
        },
        VaultAuth::TlsCert { cert_file, key_file, role, mount } => Login::Certificate {
            mount: at(mount, "cert")?,
            role: role.clone(),
            cert_file: absolute(cert_file.clone(), "cert_file")?,
            key_file: absolute(key_file.clone(), "key_file")?,
        },
    })
}

fn usual_token(env: &dyn Fn(&str) -> Option<String>) -> Result<TokenSource, KmsError> {
    for name in ["BAO_TOKEN", "VAULT_TOKEN"] {
        if env(name).map(Zeroizing::new).is_some() {
            return Ok(TokenSource::Environment(name));
        }
    }
    match env("HOME").map(PathBuf::from).filter(|h| h.is_absolute()) {
        Some(home) => Ok(TokenSource::File(home.join(".vault-token"))),
        None => Err(KmsError::Credentials(
            "no Vault token: set [services.vault.auth], VAULT_TOKEN or BAO_TOKEN, or run 'vault login'".into(),
        )),
    }
}

/// A daemon's working directory is not its caller's.
fn absolute(path: PathBuf, name: &str) -> Result<PathBuf, KmsError> {
    if path.is_absolute() { Ok(path) } else { refuse(format!("{name} '{}': must be absolute", shown(&path))) }
}

fn shown(path: &Path) -> String {
    path.to_string_lossy().escape_debug().collect()
}

/// Names that can stand in a request path or a header as they are.
fn is_path(s: &str) -> bool {
    let word = |p: &str| !p.is_empty() && p.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    s.split('/').all(|p| word(p) && p != "." && p != "..")
}

/// The address without a slash at the end, and whether it is unencrypted.
fn check_address(text: &str, allow_http: bool) -> Result<(String, bool), KmsError> {
    let bad = |why: &str| KmsError::Config(format!("Vault address '{}': {why}", text.escape_debug()));
    const FORM: &str = "write https://host:port";
    let uri: ureq::http::Uri = text.parse().map_err(|_| bad(FORM))?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err(bad(FORM)) };
    if authority.as_str().contains('@') || uri.query().is_some() || text.contains('#') {
        return Err(bad("only host, port and a path can follow the scheme"));
    }
    let path = uri.path().trim_end_matches('/');
    if !path.is_empty() && !is_path(path.trim_start_matches('/')) {
        return Err(bad("characters in the path that it cannot have"));
    }
    let plain = match scheme {
        "https" => false,
        "http" if is_loopback(authority.host()) || allow_http => true,
        "http" => {
            return Err(bad(
                "http lets anyone on the network read token and keys; use https, or set allow_http = true \
                            in [services.vault] if something else encrypts the way there",
            ));
        }
        _ => return Err(bad(FORM)),
    };
    Ok((format!("{scheme}://{authority}{path}"), plain))
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare.eq_ignore_ascii_case("localhost")
        || bare.parse::<Ipv4Addr>().is_ok_and(|a| a.is_loopback())
        || bare.parse::<Ipv6Addr>().is_ok_and(|a| a.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(o: &VaultOptions, vars: &[(&str, &str)]) -> Result<Settings, KmsError> {
        let find = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        Settings::new(o, &find)
    }

    fn at(address: &str) -> VaultOptions {
        VaultOptions { address: Some(address.into()), ..Default::default() }
    }

    #[test]
    fn addresses_that_are_taken_and_that_are_not() {
        for (text, allow, expected) in [
            ("https://vault.example:8200", false, Some(("https://vault.example:8200", false))),
            ("https://vault.example/", false, Some(("https://vault.example", false))),
            ("https://proxy.example/vault/eu/", false, Some(("https://proxy.example/vault/eu", false))),
            ("http://127.0.0.1:8200", false, Some(("http://127.0.0.1:8200", true))),
            ("http://127.3.2.1", false, Some(("http://127.3.2.1", true))),
            ("http://[::1]:8200", false, Some(("http://[::1]:8200", true))),
            ("http://LOCALHOST:8200", false, Some(("http://LOCALHOST:8200", true))),
            ("http://vault.example:8200", true, Some(("http://vault.example:8200", true))),
            ("http://vault.example:8200", false, None),
            ("http://localhost.example:8200", false, None),
            ("http://127.0.0.1.example:8200", false, None),
            ("http://10.0.0.1:8200", false, None),
            ("vault.example:8200", false, None),
            ("vault.example", false, None),
            ("", false, None),
            ("ftp://vault.example", true, None),
            ("https://user:password@vault.example", false, None),
            ("https://vault.example/?namespace=x", false, None),
            ("https://vault.example/#x", false, None),
            ("https://vault.example/../x", false, None),
            ("https://vault.example\r\nX-Evil: 1", false, None),
        ] {
            let got = with(&VaultOptions { allow_http: allow, ..at(text) }, &[("VAULT_TOKEN", "t")]);
            match (got, expected) {
                (Ok(s), Some((a, plain))) => assert_eq!((s.address.as_str(), s.plain), (a, plain)),
                (Err(KmsError::Config(e)), None) => assert!(!e.chars().any(char::is_control), "{e}"),
                (got, _) => panic!("{text:?}: {got:?}"),
            }
        }
        let e = with(&at("http://vault.example"), &[("VAULT_TOKEN", "t")]).unwrap_err().to_string();
        assert!(e.contains("allow_http = true") && e.contains("https"), "{e}");
    }

    #[test]
    fn the_configuration_wins_over_the_environment_and_bao_over_vault() {
        let vars = [
            ("VAULT_ADDR", "https://v"),
            ("VAULT_NAMESPACE", "v"),
            ("VAULT_CACERT", "/v"),
            ("VAULT_TOKEN", "v"),
            ("HOME", "/home/v"),
        ];
        let s = with(&VaultOptions::default(), &vars).unwrap();
        let token = |name| Login::Token(TokenSource::Environment(name));
        assert_eq!((s.address.as_str(), s.namespace.as_deref()), ("https://v", Some("v")));
        assert_eq!((s.ca_file, s.login), (Some("/v".into()), token("VAULT_TOKEN")));
        assert_eq!((s.connect_timeout, s.timeout), (CONNECT_TIMEOUT, TIMEOUT));
        let both: Vec<_> =
            [("BAO_ADDR", "https://b"), ("BAO_NAMESPACE", "/b/c/"), ("BAO_CACERT", "/b"), ("BAO_TOKEN", "b")]
                .into_iter()
                .chain(vars)
                .collect();
        let s = with(&VaultOptions::default(), &both).unwrap();
        assert_eq!((s.address.as_str(), s.namespace.as_deref()), ("https://b", Some("b/c")));
        assert_eq!((s.ca_file, s.login), (Some("/b".into()), token("BAO_TOKEN")));
        let o = VaultOptions {
            namespace: Some("c".into()),
            ca_file: Some("/c".into()),
            connect_timeout_ms: Some(1),
            attempt_timeout_ms: Some(3),
            auth: VaultAuth::Token { token_file: Some("/c/token".into()) },
            ..at("https://c")
        };
        let s = with(&o, &both).unwrap();
        assert_eq!((s.address.as_str(), s.namespace.as_deref()), ("https://c", Some("c")));
        assert_eq!((s.ca_file, s.login), (Some("/c".into()), Login::Token(TokenSource::File("/c/token".into()))));
        assert_eq!((s.connect_timeout, s.timeout), (Duration::from_millis(1), Duration::from_millis(3)));
        // A variable that is set to nothing is not set.
        let s = with(&at("https://c"), &[("VAULT_TOKEN", ""), ("HOME", "/home/v")]).unwrap();
        assert_eq!(s.login, Login::Token(TokenSource::File("/home/v/.vault-token".into())));
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_what_to_do() {
        let token = [("VAULT_TOKEN", "t")];
        let refused = |o: VaultOptions, word: &str| {
            let e = with(&o, &token).unwrap_err();
            assert!(matches!(&e, KmsError::Config(m) if m.contains(word)), "{e:?}");
        };
        refused(VaultOptions::default(), "VAULT_ADDR");
        refused(VaultOptions { namespace: Some("a b".into()), ..at("https://v") }, "namespace");
        refused(VaultOptions { ca_file: Some("ca.pem".into()), ..at("https://v") }, "absolute");
        refused(VaultOptions { attempt_timeout_ms: Some(0), ..at("https://v") }, "attempt_timeout_ms");
        let approle = |mount: Option<&str>, file: &str| VaultOptions {
            auth: VaultAuth::Approle { role_id: "r".into(), secret_id_file: file.into(), mount: mount.map(Into::into) },
            ..at("https://v")
        };
        refused(approle(None, "secret"), "secret_id_file");
        refused(approle(Some("../sys"), "/secret"), "mount");
        assert!(with(&approle(Some("team/approle/"), "/secret"), &token).is_ok());
        assert!(matches!(with(&at("https://v"), &[]), Err(KmsError::Credentials(e)) if e.contains("VAULT_TOKEN")));
    }
}
