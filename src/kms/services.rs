//! What the configuration says of key services: where they are and how to prove who we are. None of it is ever written
//! to a store or read from one, because a store lies where an attacker may write.

use serde::Deserialize;
use std::path::PathBuf;

/// `[services]` of the configuration. Tables of providers that were left out of the build are read all the same.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Services {
    /// `[services.aws-kms]`.
    #[serde(rename = "aws-kms")]
    pub aws: AwsOptions,
    /// `[services.gcp-kms]`.
    #[serde(rename = "gcp-kms")]
    pub gcp: GcpOptions,
    /// `[services.vault]`.
    pub vault: VaultOptions,
    /// `[services.pkcs11]`.
    pub pkcs11: Pkcs11Options,
    /// `[services.limits]`.
    pub limits: Limits,
}

/// How each root key in a service is called, whichever service it is: see [`super::guard`]. Why these defaults, tells
/// `docs/adr/0011-guarding-key-services.md`. No time is taken for longer than an hour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Calls a second in the long run; 0: no limit.
    pub calls_per_second: u32,
    /// Calls that may be made at once after a time without any; at least 1.
    pub burst: u32,
    /// Calls under way at the same time; 0: no limit.
    pub concurrent: u32,
    /// Seconds after which no attempt of a call is begun any more; at least 1.
    pub deadline: u64,
    /// Attempts of a call, the first included; at least 1.
    pub attempts: u32,
    /// After so many calls in a row without an answer the service is left alone; at least 1.
    pub breaker_failures: u32,
    /// The same after so many per cent of at least 20 calls in 10 seconds.
    pub breaker_percent: u32,
    /// Seconds for which it is left alone at first; doubles with each vain probe.
    pub breaker_pause: u64,
    /// And at most.
    pub breaker_pause_max: u64,
    /// Seconds for which a wrapped key that does not open is not tried again; 0: not at all.
    pub negative_cache: u64,
    /// Per cent of `calls_per_second`, `burst` and `concurrent` that a rotation of a mounted store may use; 1 to 100.
    pub rotation_share: u32,
    /// The same for keys made and unwrapped ahead of need.
    pub ahead_share: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            calls_per_second: 500,
            burst: 1000,
            concurrent: 32,
            deadline: 6,
            attempts: 4,
            breaker_failures: 5,
            breaker_percent: 50,
            breaker_pause: 1,
            breaker_pause_max: 30,
            negative_cache: 10,
            rotation_share: 50,
            ahead_share: 25,
        }
    }
}

impl Limits {
    /// The same for a process that serves no users: there is nobody for a rotation to leave anything to.
    pub fn without_users(&self) -> Self {
        Self { rotation_share: 100, ..*self }
    }

    /// The same, brought to what makes sense: something is always tried, and no time is longer than an hour.
    pub fn bounded(&self) -> Self {
        const HOUR: u64 = 3600;
        Self {
            burst: self.burst.max(1),
            deadline: self.deadline.clamp(1, HOUR),
            attempts: self.attempts.max(1),
            breaker_failures: self.breaker_failures.max(1),
            breaker_pause: self.breaker_pause.min(self.breaker_pause_max).min(HOUR),
            breaker_pause_max: self.breaker_pause_max.min(HOUR),
            negative_cache: self.negative_cache.min(HOUR),
            rotation_share: self.rotation_share.clamp(1, 100),
            ahead_share: self.ahead_share.clamp(1, 100),
            ..*self
        }
    }
}

/// How to reach AWS KMS; without any, as the AWS SDK finds it (environment, profile, instance).
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AwsOptions {
    /// Where the service is, for a VPC endpoint or a test server: `https://HOST[:PORT]`, or `http://` to this machine.
    /// Without: what `AWS_ENDPOINT_URL_KMS` or `AWS_ENDPOINT_URL` says, else the region's public endpoint.
    pub endpoint: Option<String>,
    /// Region of root keys whose URI names none. Without: as the SDK finds it.
    pub region: Option<String>,
    /// Profile of root keys whose URI names none. Without: as the SDK finds it.
    pub profile: Option<String>,
    /// How long a connection may take, in milliseconds. Without: 500.
    pub connect_timeout_ms: Option<u64>,
    /// How long the service may take to answer a call, in milliseconds. Without: 2000.
    pub attempt_timeout_ms: Option<u64>,
}

/// How to reach Google Cloud KMS; without any, at its public address with application default credentials.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GcpOptions {
    /// Address of the service: `https://HOST[:PORT]`. `http://` only for a loopback address, or with `allow_http`.
    pub endpoint: Option<String>,
    /// Lets `endpoint` be `http://` on another host: access tokens and file keys then cross the network in clear.
    pub allow_http: bool,
    /// Credentials to use instead of application default credentials: the JSON of a service account, an external
    /// account (workload identity), an impersonated service account or a user. An absolute path.
    pub credentials_file: Option<PathBuf>,
    /// Send no credentials; for an emulator at a loopback `endpoint`.
    pub anonymous: bool,
    /// Project that quota and cost are counted on, if not that of the credentials.
    pub quota_project: Option<String>,
    /// Longest time for one call, connecting included, in milliseconds; 2000 if not given.
    pub timeout_ms: Option<u64>,
    /// Longest time for getting an access token, in milliseconds; 5000 if not given.
    pub credentials_timeout_ms: Option<u64>,
}

/// How to reach Vault or OpenBao. What is not set here comes from the environment: `BAO_ADDR` or `VAULT_ADDR`,
/// `BAO_NAMESPACE` or `VAULT_NAMESPACE`, `BAO_CACERT` or `VAULT_CACERT`. Paths must be absolute.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VaultOptions {
    /// `https://host:port`.
    pub address: Option<String>,
    /// Namespace of the Transit engine and of the login.
    pub namespace: Option<String>,
    /// PEM certificates to trust instead of the machine's.
    pub ca_file: Option<PathBuf>,
    /// Lets token and keys cross a network in clear: only where something else encrypts it. Loopback needs no leave.
    pub allow_http: bool,
    /// Limit for a connection including TLS, in milliseconds. Default 500.
    pub connect_timeout_ms: Option<u64>,
    /// Limit for one request and its answer, in milliseconds. Default 2000.
    pub attempt_timeout_ms: Option<u64>,
    /// How to prove who we are.
    pub auth: VaultAuth,
}

/// `[services.vault.auth]`: how to get a token. No secret stands here, only where it is; a file with a secret must not
/// be readable by others.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "method", rename_all = "kebab-case", deny_unknown_fields)]
pub enum VaultAuth {
    /// A token that somebody else made and keeps: from `token_file`, else `BAO_TOKEN` or `VAULT_TOKEN`, else
    /// `~/.vault-token`.
    Token {
        /// Read again when the token in it has expired.
        token_file: Option<PathBuf>,
    },
    /// AppRole.
    Approle {
        role_id: String,
        secret_id_file: PathBuf,
        /// Where the method is mounted. Default `approle`.
        mount: Option<String>,
    },
    /// A Kubernetes service account.
    Kubernetes {
        role: String,
        /// Default: the pod's own, `/var/run/secrets/kubernetes.io/serviceaccount/token`.
        jwt_file: Option<PathBuf>,
        /// Where the method is mounted. Default `kubernetes`.
        mount: Option<String>,
    },
    /// A TLS client certificate.
    TlsCert {
        /// PEM, the certificate first and then what leads to its CA.
        cert_file: PathBuf,
        /// PEM.
        key_file: PathBuf,
        /// Role to log in as; without, any that fits.
        role: Option<String>,
        /// Where the method is mounted. Default `cert`.
        mount: Option<String>,
    },
}

impl Default for VaultAuth {
    fn default() -> Self {
        Self::Token { token_file: None }
    }
}

/// How to reach a PKCS#11 token. Where the PIN comes from: what `pin-source=` of a URI on the command line says, else
/// one of these, else the systemd credential `envelopefs.pkcs11-pin`, else the terminal.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pkcs11Options {
    /// The module: absolute path of the token's PKCS#11 library.
    pub module: Option<PathBuf>,
    /// Label of the only token that may be used. Without it a URI from a keyring can name any token of the module.
    pub token: Option<String>,
    /// File that holds the PIN; one newline at the end is left out.
    pub pin_file: Option<PathBuf>,
    /// Command, run by sh, that prints the PIN.
    pub pin_command: Option<String>,
    /// Take keys that were imported: those that once were extractable or not sensitive. They must not be now.
    pub allow_extractable: bool,
    /// Take RSA keys. Whoever knows the public key can make wraps that open, and so a keyring of his own.
    pub allow_rsa: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_brought_to_what_makes_sense() {
        let sane = Limits::default();
        assert_eq!(sane.bounded(), sane);
        let all = |n: u32| Limits {
            calls_per_second: n,
            burst: n,
            concurrent: n,
            deadline: n.into(),
            attempts: n,
            breaker_failures: n,
            breaker_percent: n,
            breaker_pause: n.into(),
            breaker_pause_max: n.into(),
            negative_cache: n.into(),
            rotation_share: n,
            ahead_share: n,
        };
        let shares = |n| Limits { rotation_share: n, ahead_share: n, ..all(0) };
        let least = Limits { burst: 1, deadline: 1, attempts: 1, breaker_failures: 1, ..shares(1) };
        assert_eq!(all(0).bounded(), least);
        let m = u32::MAX;
        let most = Limits {
            deadline: 3600,
            breaker_pause: 3600,
            breaker_pause_max: 3600,
            negative_cache: 3600,
            rotation_share: 100,
            ahead_share: 100,
            ..all(m)
        };
        assert_eq!(all(m).bounded(), most);
        assert_eq!(Limits { breaker_pause: 60, ..sane }.bounded().breaker_pause, 30, "the longest is the longest");
    }

    fn vault(auth: &str) -> Result<VaultAuth, String> {
        let read: Result<Services, _> = toml::from_str(&format!("[vault.auth]\n{auth}"));
        read.map(|s| s.vault.auth).map_err(|e| e.message().to_owned())
    }

    #[test]
    fn a_vault_login_is_named_by_its_method() {
        assert_eq!(toml::from_str::<Services>("[vault]").unwrap().vault.auth, VaultAuth::Token { token_file: None });
        assert_eq!(vault("method = 'token'"), Ok(VaultAuth::Token { token_file: None }));
        let file = || Some("/t".into());
        assert_eq!(vault("method = 'token'\ntoken_file = '/t'"), Ok(VaultAuth::Token { token_file: file() }));
        let approle = VaultAuth::Approle { role_id: "r".into(), secret_id_file: "/s".into(), mount: None };
        assert_eq!(vault("method = 'approle'\nrole_id = 'r'\nsecret_id_file = '/s'"), Ok(approle));
        let pod = VaultAuth::Kubernetes { role: "r".into(), jwt_file: None, mount: Some("k8s".into()) };
        assert_eq!(vault("method = 'kubernetes'\nrole = 'r'\nmount = 'k8s'"), Ok(pod));
        let host = VaultAuth::TlsCert { cert_file: "/c".into(), key_file: "/k".into(), role: None, mount: None };
        assert_eq!(vault("method = 'tls-cert'\ncert_file = '/c'\nkey_file = '/k'"), Ok(host));
    }

    #[test]
    fn secrets_do_not_stand_in_the_configuration() {
        for auth in [
            "method = 'token'\ntoken = 's.secret'",
            "method = 'approle'\nrole_id = 'r'\nsecret_id_file = '/s'\nsecret_id = 's.secret'",
            "method = 'approle'\nrole_id = 'r'\nsecret_id = 's.secret'",
            "token = 's.secret'",
            "method = 'userpass'\npassword = 's.secret'",
        ] {
            let e = vault(auth).unwrap_err();
            assert!(!e.contains("s.secret"), "{e}");
        }
    }
}
