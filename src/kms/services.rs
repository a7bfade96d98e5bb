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
        }
    }
}

impl Limits {
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
            ..*self
        }
    }
}

/// How to reach AWS KMS; without any, as the AWS SDK finds it (environment, profile, instance).
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AwsOptions {}

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

/// How to reach Vault or OpenBao; without any, `VAULT_ADDR` or `BAO_ADDR` and `VAULT_TOKEN` or `BAO_TOKEN`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VaultOptions {}

/// How to reach a PKCS#11 token.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pkcs11Options {}

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
        };
        let least = Limits { burst: 1, deadline: 1, attempts: 1, breaker_failures: 1, ..all(0) };
        assert_eq!(all(0).bounded(), least);
        let m = u32::MAX;
        let most =
            Limits { deadline: 3600, breaker_pause: 3600, breaker_pause_max: 3600, negative_cache: 3600, ..all(m) };
        assert_eq!(all(m).bounded(), most);
        assert_eq!(Limits { breaker_pause: 60, ..sane }.bounded().breaker_pause, 30, "the longest is the longest");
    }
}
