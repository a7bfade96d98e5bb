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
