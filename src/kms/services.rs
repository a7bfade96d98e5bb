//! What the configuration says of key services: where they are and how to prove who we are. None of it is ever written
//! to a store or read from one, because a store lies where an attacker may write.

use serde::Deserialize;

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

/// How to reach Google Cloud KMS; without any, application default credentials.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GcpOptions {}

/// How to reach Vault or OpenBao; without any, `VAULT_ADDR` or `BAO_ADDR` and `VAULT_TOKEN` or `BAO_TOKEN`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VaultOptions {}

/// How to reach a PKCS#11 token.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pkcs11Options {}
