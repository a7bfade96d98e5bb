//! What the configuration says of Google Cloud KMS, checked. Decides only; reads nothing.

use crate::kms::KmsError;
use crate::kms::services::GcpOptions;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Time for one call if the configuration does not say.
const CALL: Duration = Duration::from_millis(2000);
/// Time for an access token if the configuration does not say: two round trips to another service, and its retries.
const LOGIN: Duration = Duration::from_millis(5000);
/// Times that can be configured, in milliseconds.
const TIMES: std::ops::RangeInclusive<u64> = 50..=120_000;

/// How to prove who we are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Application default credentials, as the library finds them: `GOOGLE_APPLICATION_CREDENTIALS`, what
    /// `gcloud auth application-default login` left, the metadata server.
    Default,
    /// The JSON in this file.
    File(PathBuf),
    /// Not at all.
    Anonymous,
}

/// How to reach the service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `None`: the service's public address.
    pub endpoint: Option<String>,
    pub source: Source,
    pub quota_project: Option<String>,
    /// Longest time for one call, connecting included.
    pub call: Duration,
    /// Longest time for an access token.
    pub login: Duration,
}

impl Settings {
    /// Checks `o`.
    ///
    /// # Errors
    /// [`KmsError::Config`] that names the key of the configuration.
    pub fn new(o: &GcpOptions) -> Result<Self, KmsError> {
        let place = o.endpoint.as_deref().map(|e| endpoint(e, o.allow_http)).transpose()?;
        let source = match (&o.credentials_file, o.anonymous) {
            (Some(_), true) => return Err(refuse("credentials_file and anonymous exclude each other")),
            (None, true) if place == Some(Place::Loopback) => Source::Anonymous,
            (None, true) => return Err(refuse("anonymous is for an emulator: it needs an endpoint on loopback")),
            (Some(f), false) if f.is_absolute() => Source::File(f.clone()),
            (Some(_), false) => return Err(refuse("credentials_file must be an absolute path")),
            (None, false) => Source::Default,
        };
        if let Some(p) = &o.quota_project
            && (p.is_empty() || p.chars().any(|c| !(c.is_ascii_alphanumeric() || "-.:".contains(c))))
        {
            return Err(refuse("quota_project holds characters that no project id has"));
        }
        Ok(Self {
            endpoint: o.endpoint.clone(),
            source,
            quota_project: o.quota_project.clone(),
            call: time("timeout_ms", o.timeout_ms, CALL)?,
            login: time("credentials_timeout_ms", o.credentials_timeout_ms, LOGIN)?,
        })
    }
}

fn refuse(why: &str) -> KmsError {
    KmsError::Config(format!("[services.gcp-kms] {why}"))
}

fn time(name: &str, given: Option<u64>, otherwise: Duration) -> Result<Duration, KmsError> {
    match given {
        None => Ok(otherwise),
        Some(ms) if TIMES.contains(&ms) => Ok(Duration::from_millis(ms)),
        Some(ms) => Err(refuse(&format!("{name} = {ms} is not between {} and {}", TIMES.start(), TIMES.end()))),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Loopback,
    Elsewhere,
}

/// Whether `text` is an endpoint that may get credentials and keys. Only plain `scheme://host[:port][/]` is accepted:
/// the less there is to parse, the less two parsers can read it differently.
fn endpoint(text: &str, allow_http: bool) -> Result<Place, KmsError> {
    let bad = |why: &str| {
        let shown: String = text.chars().take(80).flat_map(char::escape_debug).collect();
        refuse(&format!("endpoint '{shown}': {why}"))
    };
    let (scheme, rest) = text.split_once("://").ok_or_else(|| bad("write https://HOST[:PORT]"))?;
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = split_port(authority).ok_or_else(|| bad("write https://HOST[:PORT], and nothing else"))?;
    if port.is_some_and(|p| p.parse::<u16>().is_err() || !p.bytes().all(|b| b.is_ascii_digit())) {
        return Err(bad("the port is not a number below 65536"));
    }
    let place = if is_loopback(host) { Place::Loopback } else { Place::Elsewhere };
    match (scheme, place) {
        ("https", _) | ("http", Place::Loopback) => Ok(place),
        ("http", Place::Elsewhere) if allow_http => Ok(place),
        ("http", Place::Elsewhere) => Err(bad("http:// would send access tokens and keys in clear; use https://")),
        _ => Err(bad("write https://HOST[:PORT]")),
    }
}

/// Host and port; `None` if there is anything else, such as a user name or a path.
fn split_port(authority: &str) -> Option<(&str, Option<&str>)> {
    let (host, port) = match authority.strip_prefix('[').and_then(|a| a.split_once(']')) {
        Some((v6, rest)) => {
            v6.parse::<std::net::Ipv6Addr>().ok()?;
            (v6, if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) })
        }
        None => match authority.split_once(':') {
            Some((h, p)) => (h, Some(p)),
            None => (authority, None),
        },
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-.:".contains(c);
    (!host.is_empty() && host.chars().all(plain)).then_some((host, port))
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|a| a.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(endpoint: &str) -> GcpOptions {
        GcpOptions { endpoint: Some(endpoint.into()), ..GcpOptions::default() }
    }

    #[test]
    fn without_options_it_is_the_public_service_with_default_credentials() {
        let s = Settings::new(&GcpOptions::default()).unwrap();
        let want = Settings { endpoint: None, source: Source::Default, quota_project: None, call: CALL, login: LOGIN };
        assert_eq!(s, want);
    }

    #[test]
    fn an_endpoint_is_https_or_on_loopback() {
        for good in [
            "https://cloudkms.googleapis.com",
            "https://europe-west3-cloudkms.googleapis.com/",
            "https://kms.example:8443",
            "http://127.0.0.1:1234",
            "http://127.1.2.3",
            "http://localhost:80",
            "http://[::1]:1234",
            "https://[2001:db8::1]",
        ] {
            assert!(Settings::new(&with(good)).is_ok(), "{good}");
        }
        for bad in [
            "",
            "cloudkms.googleapis.com",
            "ftp://127.0.0.1",
            "http://kms.example",
            "http://127.0.0.1.kms.example",
            "http://localhost.kms.example",
            "http://127.0.0.1@kms.example",
            "http://127.0.0.1\\@kms.example",
            "https://user:secret@kms.example",
            "https://kms.example/v1",
            "https://kms.example?x=y",
            "https://kms.example#x",
            "https://kms.example:",
            "https://kms.example:65536",
            "https://kms.example:+1",
            "https://:443",
            "https://[::1",
            "https://[::1]x",
            "https://[x]:1",
            "https://kms example",
            "http://2130706433",
            "HTTPS://kms.example",
        ] {
            let e = Settings::new(&with(bad)).unwrap_err();
            assert!(matches!(&e, KmsError::Config(m) if m.starts_with("[services.gcp-kms] endpoint ")), "{bad}: {e}");
        }
        let clear = GcpOptions { allow_http: true, ..with("http://kms.example") };
        assert!(Settings::new(&clear).is_ok());
        assert!(Settings::new(&GcpOptions { allow_http: true, ..with("ftp://kms.example") }).is_err());
    }

    #[test]
    fn only_an_emulator_is_asked_without_credentials() {
        let anonymous = |o: GcpOptions| Settings::new(&GcpOptions { anonymous: true, ..o });
        assert_eq!(anonymous(with("http://127.0.0.1:1")).unwrap().source, Source::Anonymous);
        assert_eq!(anonymous(with("https://[::1]")).unwrap().source, Source::Anonymous);
        assert!(anonymous(GcpOptions::default()).is_err());
        assert!(anonymous(with("https://kms.example")).is_err());
        assert!(anonymous(GcpOptions { allow_http: true, ..with("http://kms.example") }).is_err());
        let file = GcpOptions { credentials_file: Some("/x".into()), ..with("http://127.0.0.1:1") };
        assert_eq!(Settings::new(&file).unwrap().source, Source::File("/x".into()));
        assert!(anonymous(file).is_err());
        let relative = GcpOptions { credentials_file: Some("x".into()), ..GcpOptions::default() };
        assert!(Settings::new(&relative).is_err());
    }

    #[test]
    fn times_and_projects_have_bounds() {
        let times = |call, login| {
            let o = GcpOptions { timeout_ms: call, credentials_timeout_ms: login, ..GcpOptions::default() };
            Settings::new(&o).map(|s| (s.call.as_millis(), s.login.as_millis()))
        };
        assert_eq!(times(Some(50), Some(120_000)), Ok((50, 120_000)));
        assert!(times(Some(49), None).is_err() && times(None, Some(120_001)).is_err() && times(Some(0), None).is_err());
        for (project, ok) in
            [("my-project", true), ("example.com:p", true), ("", false), ("a b", false), ("a\n", false)]
        {
            let o = GcpOptions { quota_project: Some(project.into()), ..GcpOptions::default() };
            assert_eq!(Settings::new(&o).is_ok(), ok, "{project:?}");
        }
    }
}
