//! The configuration file: TOML, unknown keys refused. `config.example.toml` shows every key; a test parses it.

use crate::daemon::audit::OnError;
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::keys::OnDenied;
use crate::daemon::process;
use crate::kms::services::Services;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// The whole file.
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// For every store that does not say otherwise.
    pub defaults: Defaults,
    /// Where key services are.
    pub services: Services,
    /// Stores by name.
    pub store: BTreeMap<String, StoreConfig>,
}

/// `[defaults]`.
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Defaults {
    pub log_file: Option<PathBuf>,
    pub log_level: Option<String>,
    /// FUSE threads.
    pub threads: Option<u16>,
    pub dek_cache: DekCacheConfig,
    /// Most keys kept ready for files to come, where a key service wraps them; 0: none.
    pub dek_pool: Option<usize>,
    /// Most files of a directory whose keys are unwrapped ahead, where a key service does that; 0: none.
    pub prefetch: Option<usize>,
    /// `{store}` in it stands for the store's id.
    pub audit_log: Option<PathBuf>,
    pub audit_on_error: Option<OnError>,
    /// Milliseconds until what was written to the audit log is durable; 0: at once.
    pub audit_fsync_ms: Option<u64>,
    /// Where a mounted store's metrics are served.
    pub metrics_listen: Option<String>,
    /// Seconds between two questions to the key service whether it still unwraps.
    pub refresh: Option<u64>,
    /// Seconds for which files can be opened while the key service does not answer.
    pub offline_grace: Option<u64>,
    /// What becomes of open files when the key service refuses.
    pub on_denied: Option<OnDenied>,
}

/// `dek_cache`: how long file keys stay in memory after their last use.
#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DekCacheConfig {
    /// At most this many keys of files that are not open.
    pub entries: Option<usize>,
    /// Seconds after which a key is dropped and unwrapped again.
    pub max_age: Option<u64>,
    /// Seconds without use after which a key is dropped.
    pub max_idle: Option<u64>,
}

/// `[store.NAME]`.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    pub backing: PathBuf,
    #[serde(default)]
    pub mountpoint: Option<PathBuf>,
    /// Root key URIs; replace those of the keyring.
    #[serde(default)]
    pub keys: Vec<String>,
    #[serde(default)]
    pub passphrase_file: Option<PathBuf>,
    #[serde(default)]
    pub passphrase_command: Option<String>,
    #[serde(default)]
    pub read_only: bool,
    #[serde(default)]
    pub allow_other: bool,
    /// Mount options, as after `-o`.
    #[serde(default)]
    pub options: Vec<String>,
    #[serde(default)]
    pub log_file: Option<PathBuf>,
    #[serde(default)]
    pub threads: Option<u16>,
    #[serde(default)]
    pub audit_log: Option<PathBuf>,
    #[serde(default)]
    pub audit_on_error: Option<OnError>,
    #[serde(default)]
    pub metrics_listen: Option<String>,
    /// As in `[defaults]`.
    #[serde(default)]
    pub refresh: Option<u64>,
    #[serde(default)]
    pub offline_grace: Option<u64>,
    #[serde(default)]
    pub on_denied: Option<OnDenied>,
}

impl Config {
    /// Reads `given`, or else the first of the usual places that exists, or else nothing.
    ///
    /// # Errors
    /// [`FaultKind::Config`] if `given` cannot be read, or a file is not what it should be.
    pub fn load(given: Option<&Path>) -> Result<Self, Fault> {
        if let Some(p) = given {
            let text = std::fs::read_to_string(p).map_err(|e| unusable(p, &crate::daemon::fault::plain(&e)))?;
            return parse(&text).map_err(|e| unusable(p, &e));
        }
        for p in places() {
            match std::fs::read_to_string(&p) {
                Ok(text) => return parse(&text).map_err(|e| unusable(&p, &e)),
                Err(e) if e.kind() == io::ErrorKind::NotFound || e.kind() == io::ErrorKind::NotADirectory => {}
                Err(e) => return Err(unusable(&p, &crate::daemon::fault::plain(&e))),
            }
        }
        Ok(Self::default())
    }
}

/// Parses the text of a configuration file.
///
/// # Errors
/// One line that says where and why.
pub fn parse(text: &str) -> Result<Config, String> {
    toml::from_str(text).map_err(|e| {
        let line = e.span().map(|s| text.get(..s.start).unwrap_or_default().matches('\n').count() + 1);
        let message = e.message().to_string();
        line.map_or(message.clone(), |l| format!("line {l}: {message}"))
    })
}

fn unusable(path: &Path, why: &str) -> Fault {
    Fault::new(FaultKind::Config, format!("configuration {}: {why}", path.display()))
}

/// Where a configuration is looked for without `--config`.
fn places() -> Vec<PathBuf> {
    let system = PathBuf::from("/etc/envelopefs/config.toml");
    if process::uid() == 0 {
        return vec![system];
    }
    let user = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".config")));
    user.map(|d| d.join("envelopefs/config.toml")).into_iter().chain([system]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_valid_and_shows_every_key() {
        let text = include_str!("../../config.example.toml");
        let c = parse(text).unwrap();
        let s = &c.store["home"];
        assert!(s.mountpoint.is_some() && !s.keys.is_empty() && !s.options.is_empty());
        assert!(c.defaults.dek_cache.entries.is_some() && c.defaults.threads.is_some());
        let p = &c.services.pkcs11;
        assert!(p.module.is_some() && p.token.is_some() && p.pin_file.is_some() && text.contains("pin_command"));
        let d = &c.defaults;
        assert!(d.refresh.is_some() && d.offline_grace.is_some() && d.on_denied == Some(OnDenied::Keep));
        assert_eq!((d.dek_pool, d.prefetch), (Some(crate::cli::mount::DEK_POOL), Some(crate::cli::mount::PREFETCH)));
        assert_eq!(c.store["mail"].on_denied, Some(OnDenied::Drop));
        for key in ["passphrase_file", "passphrase_command", "read_only", "allow_other", "log_file", "log_level"]
            .iter()
            .chain(&["audit_log", "audit_on_error", "audit_fsync_ms", "metrics_listen"])
        {
            assert!(text.contains(key), "{key}");
        }
        let aws = &c.services.aws;
        assert!(aws.region.is_some() && aws.connect_timeout_ms == Some(500) && aws.attempt_timeout_ms == Some(2000));
        assert!(text.contains("\n# endpoint = ") && text.contains("\n# profile = "));
        let gcp = ["endpoint", "allow_http", "credentials_file", "anonymous", "quota_project"];
        assert!(gcp.iter().all(|key| text.contains(&format!("{key} = "))), "{gcp:?}");
        assert!(c.services.gcp.timeout_ms.is_some() && c.services.gcp.credentials_timeout_ms.is_some());
        let v = &c.services.vault;
        assert!(v.address.is_some() && v.ca_file.is_some() && v.connect_timeout_ms.is_some());
        for key in ["namespace", "allow_http", "token_file", "secret_id_file", "jwt_file", "cert_file", "key_file"] {
            assert!(text.contains(key), "{key}");
        }
    }

    #[test]
    fn the_example_shows_the_defaults_of_the_limits() {
        let text = include_str!("../../config.example.toml");
        let limits = parse(text).unwrap().services.limits;
        assert_eq!(limits, crate::kms::services::Limits::default());
        let table = text.split("[services.limits]").nth(1).unwrap().split("\n[").next().unwrap();
        // Each key is there: without its line, another value would not be noticed.
        let other = format!("{table}\n").replace(" = ", " = 9");
        let changed = parse(&format!("[services.limits]{other}")).unwrap().services.limits;
        let differs = format!("{changed:?}");
        assert_eq!(differs.matches(": 9").count(), differs.matches(": ").count(), "{differs}");
        assert!(parse("[services.limits]\nburts = 1\n").unwrap_err().contains("burts"));
    }

    #[test]
    fn unknown_keys_are_refused_with_their_line() {
        let e = parse("[store.a]\nbacking = \"/x\"\nkeyz = []\n").unwrap_err();
        assert!(e.starts_with("line 3:") && e.contains("keyz"), "{e}");
        assert!(parse("[stores.a]\n").is_err());
        assert!(parse("[store.a]\n").unwrap_err().contains("backing"));
        assert_eq!(parse("").unwrap(), Config::default());
    }
}
