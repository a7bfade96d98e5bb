//! Key services: each provider against a real server where one runs here (OpenBao, SoftHSM), else against a fake that
//! says so. Servers listen on loopback at a port found free and die with the test.

#[cfg(feature = "vault")]
mod bao;
#[cfg(feature = "aws-kms")]
mod aws;
#[cfg(all(feature = "aws-kms", feature = "gcp-kms", feature = "pkcs11", feature = "vault"))]
mod chain;
#[cfg(feature = "gcp-kms")]
mod gcp;
#[cfg(feature = "aws-kms")]
mod kms_server;
#[cfg(feature = "pkcs11")]
mod pkcs11;
mod server;
#[cfg(feature = "pkcs11")]
mod softhsm;
#[cfg(feature = "vault")]
mod vault;
#[cfg(feature = "vault")]
mod vault_cli;
