//! Key providers: the code that talks to one kind of root key.
//!
//! Contract of every [`KeyProvider`]: what [`KeyProvider::wrap`] returns can be unwrapped only with the same
//! [`WrapContext`], by the same root key, by a later process. Calls block; a provider over an asynchronous SDK keeps
//! its runtime inside. No error of a provider may ever lead the caller to anything irreversible.

#[cfg(feature = "aws-kms")]
pub mod aws;
pub mod event;
mod fill;
#[cfg(feature = "gcp-kms")]
pub mod gcp;
pub mod guard;
pub mod keyfile;
pub mod metrics;
pub mod passphrase;
#[cfg(feature = "pkcs11")]
pub mod pkcs11;
pub mod recovery;
pub mod scripted;
pub mod services;
pub mod uri;
#[cfg(feature = "vault")]
pub mod vault;

pub use passphrase::{Argon2Cost, PassphraseSource};
pub use uri::{RootKeyUri, Scheme};

use crate::crypto::secret::Secret32;
use guard::lane::Background;
use std::sync::Arc;
use std::time::Duration;

/// What a wrapped key is for. Part of the context, so that one kind of wrapped key is never taken for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyPurpose {
    /// A KEK; the object id is its `KekId`.
    Kek,
    /// The store secret; the object id is the store id.
    StoreSecret,
    /// A DEK wrapped directly by the provider (KEK kind external); the object id is the file id.
    Dek,
}

impl KeyPurpose {
    /// The name that goes into the context's bytes and into a service's encryption context.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kek => "kek",
            Self::StoreSecret => "store-secret",
            Self::Dek => "dek",
        }
    }
}

/// Authenticated, public context of a wrap: what is wrapped, and for which store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrapContext {
    /// The store.
    pub store: [u8; 16],
    /// What the key is for.
    pub purpose: KeyPurpose,
    /// Which key: see [`KeyPurpose`].
    pub object: [u8; 16],
    /// More bytes to bind, such as a slot's prefix. Empty for KEKs and the store secret.
    pub extra: Vec<u8>,
}

impl WrapContext {
    /// The canonical bytes for providers that take associated data as one string:
    /// `"envelopefs/v1/" ‖ purpose ‖ 0x00 ‖ store(16) ‖ object(16) ‖ extra`.
    pub fn to_aad(&self) -> Vec<u8> {
        let mut v = b"envelopefs/v1/".to_vec();
        v.extend_from_slice(self.purpose.as_str().as_bytes());
        v.push(0);
        v.extend_from_slice(&self.store);
        v.extend_from_slice(&self.object);
        v.extend_from_slice(&self.extra);
        v
    }
}

/// Longest wrapped key any provider may return, in bytes: what fits into a header slot.
pub const WRAPPED_MAX: usize = crate::format::header::WRAPPED_MAX;

/// What a provider can do beyond wrap and unwrap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// The context is cryptographically bound by the service itself.
    pub binds_context: bool,
    /// `rewrap` happens inside the service: the key never reaches this process.
    pub native_rewrap: bool,
    /// The same from one context to another.
    pub rewraps_contexts: bool,
    /// `generate` makes the key inside the service.
    pub native_generate: bool,
    /// `unwrap_many` takes few calls for many keys.
    pub native_batch: bool,
    /// Calls leave this machine and can be slow, throttled or unreachable.
    pub remote: bool,
    /// It wraps for a key whose secret is not at hand: `unwrap` always fails with [`KmsError::Credentials`].
    pub wrap_only: bool,
}

/// What a provider says about its root key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The URI as it is recorded in the keyring (never with secrets in it).
    pub uri: String,
    /// The service's own stable name of the key (an ARN, a key fingerprint), for people and logs.
    pub key_id: String,
    /// What it can do.
    pub capabilities: Capabilities,
}

/// Why a provider failed, by what the caller must do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KmsError {
    /// No answer: network, service down, time-out. Go on with what is cached; try again.
    #[error("key service unreachable: {0}")]
    Unreachable(String),
    /// The service says to slow down. Try again later.
    #[error("key service throttles: {0}")]
    Throttled(String),
    /// The service refuses this caller. Stop unwrapping.
    #[error("access to the root key denied: {0}")]
    Denied(String),
    /// The root key is disabled or scheduled for deletion. Stop unwrapping.
    #[error("root key disabled: {0}")]
    Disabled(String),
    /// No such root key. Fail this object only, change nothing.
    #[error("root key not found: {0}")]
    NotFound(String),
    /// The wrapped bytes are not this root key's, were changed, or belong to another context: a wrong key or
    /// passphrase shows as this too. Fail this object only, change nothing.
    #[error("wrapped key does not open: {0}")]
    BadCiphertext(String),
    /// No usable credentials were found or they have expired.
    #[error("credentials for the root key: {0}")]
    Credentials(String),
    /// The URI, the configuration or the key file itself is unusable; says what to change.
    #[error("{0}")]
    Config(String),
}

impl KmsError {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Throttled(_))
    }

    /// Stable code of the class, for reports, logs and the audit log.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "kms-unreachable",
            Self::Throttled(_) => "kms-throttled",
            Self::Denied(_) => "kms-denied",
            Self::Disabled(_) => "kms-disabled",
            Self::NotFound(_) => "kms-not-found",
            Self::BadCiphertext(_) => "kms-bad-ciphertext",
            Self::Credentials(_) => "kms-credentials",
            Self::Config(_) => "kms-config",
        }
    }
}

/// One root key.
pub trait KeyProvider: Send + Sync {
    /// What this is. Must not need the key itself; may call the service for health.
    ///
    /// # Errors
    /// Any [`KmsError`] of the service.
    fn describe(&self) -> Result<Description, KmsError>;

    /// Wraps `key` under the root key, bound to `context`. At most [`WRAPPED_MAX`] bytes.
    ///
    /// # Errors
    /// Any [`KmsError`] but `BadCiphertext`.
    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError>;

    /// Reverses [`KeyProvider::wrap`].
    ///
    /// # Errors
    /// [`KmsError::BadCiphertext`] if `wrapped` is not this root key's or the context differs; any other.
    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError>;

    /// Unwraps many: one result for each item, in their order. A service that can take them in few calls does.
    ///
    /// # Errors
    /// For each item as `unwrap`; what keeps the service from answering at all is the result of every item.
    fn unwrap_many(&self, items: &[(&[u8], &WrapContext)]) -> Vec<Result<Secret32, KmsError>> {
        items.iter().map(|(wrapped, context)| self.unwrap(wrapped, context)).collect()
    }

    /// Moves a wrapped key to the root key's newest version or to another context. By default unwraps and wraps here;
    /// a provider that can do it inside the service does (see [`Capabilities::native_rewrap`]).
    ///
    /// # Errors
    /// As `unwrap` and `wrap`.
    fn rewrap(&self, wrapped: &[u8], from: &WrapContext, to: &WrapContext) -> Result<Vec<u8>, KmsError> {
        let key = self.unwrap(wrapped, from)?;
        self.wrap(&key, to)
    }

    /// A new random key and its wrapped form.
    ///
    /// # Errors
    /// As `wrap`.
    fn generate(&self, context: &WrapContext) -> Result<(Secret32, Vec<u8>), KmsError> {
        let key = Secret32::random();
        let wrapped = self.wrap(&key, context)?;
        Ok((key, wrapped))
    }

    /// Asks, with a cheap call that unwraps nothing, whether the root key can be used now.
    ///
    /// # Errors
    /// What is wrong: any [`KmsError`] but `BadCiphertext`.
    fn health(&self) -> Result<(), KmsError> {
        Ok(())
    }

    /// Leave for `calls` calls that no user waits for; to be asked for before them. Calls nobody and does not wait.
    ///
    /// # Errors
    /// How long to wait before asking again.
    fn leave(&self, whose: Background, calls: u32) -> Result<(), Duration> {
        let _ = (whose, calls);
        Ok(())
    }

    /// Whether `wrapped` was made with an older version of the root key than the one that wraps now, so that
    /// [`KeyProvider::rewrap`] with the same context would move it on. `false` where keys have no versions.
    ///
    /// # Errors
    /// As `health`.
    fn rewrap_due(&self, wrapped: &[u8]) -> Result<bool, KmsError> {
        let _ = wrapped;
        Ok(false)
    }
}

/// How to reach root keys: everything that must not stand in the keyring.
#[derive(Debug, Clone, Default)]
pub struct ConnectOptions {
    /// Where passphrases come from. `None`: the systemd credential [`passphrase::CREDENTIAL`] if there is one, else
    /// the terminal.
    pub passphrase: Option<PassphraseSource>,
    /// Where the recovery key comes from. `None`: it is asked for nowhere, and wraps only.
    pub recovery: Option<PassphraseSource>,
    /// Cost of Argon2id for a newly set passphrase. `None`: the default.
    pub argon2: Option<Argon2Cost>,
    /// Where key services are, from the configuration.
    pub services: services::Services,
    /// Hears of every call to a root key.
    pub observer: Option<Arc<dyn event::Observer>>,
    /// Where calls, and what the guard does about them, are counted.
    pub metrics: Option<Arc<metrics::Registry>>,
}

/// Makes the provider for `uri`. With `create`, a key file that is not there is made, and a passphrase is asked twice.
/// One whose calls leave this machine is [guarded](guard).
///
/// # Errors
/// [`KmsError::Config`] for a kind of root key that is not built in; else as the provider's own.
pub fn connect(uri: &RootKeyUri, o: &ConnectOptions, create: bool) -> Result<Arc<dyn KeyProvider>, KmsError> {
    Ok(guard::around(bare(uri, o, create)?, uri, o))
}

/// The provider itself.
fn bare(uri: &RootKeyUri, o: &ConnectOptions, create: bool) -> Result<Arc<dyn KeyProvider>, KmsError> {
    match uri.scheme() {
        Scheme::KeyFile => match keyfile::KeyFile::open(uri) {
            Err(KmsError::NotFound(_)) if create => Ok(Arc::new(keyfile::KeyFile::create(uri)?)),
            opened => Ok(Arc::new(opened?)),
        },
        Scheme::Passphrase => {
            let source = o.passphrase.clone().unwrap_or_else(default_source);
            Ok(Arc::new(passphrase::PassphraseKey::open(&source, o.argon2.unwrap_or_default(), create)?))
        }
        #[cfg(feature = "aws-kms")]
        Scheme::AwsKms => Ok(Arc::new(aws::AwsKms::new(uri, &o.services.aws)?)),
        #[cfg(not(feature = "aws-kms"))]
        Scheme::AwsKms => Err(not_built_in(uri)),
        #[cfg(feature = "gcp-kms")]
        Scheme::GcpKms => Ok(Arc::new(gcp::GcpKms::open(uri, &o.services.gcp)?)),
        #[cfg(not(feature = "gcp-kms"))]
        Scheme::GcpKms => Err(not_built_in(uri)),
        #[cfg(feature = "vault")]
        Scheme::Vault => Ok(Arc::new(vault::VaultKey::connect(uri, &o.services.vault)?)),
        #[cfg(not(feature = "vault"))]
        Scheme::Vault => Err(not_built_in(uri)),
        #[cfg(feature = "pkcs11")]
        Scheme::Pkcs11 => Ok(Arc::new(pkcs11::Pkcs11Key::connect(uri, &o.services.pkcs11)?)),
        #[cfg(not(feature = "pkcs11"))]
        Scheme::Pkcs11 => Err(not_built_in(uri)),
        Scheme::Recovery => match &o.recovery {
            Some(source) => Ok(Arc::new(recovery::RecoveryKey::enter_that_of(uri, source)?)),
            None => Ok(Arc::new(recovery::RecoveryKey::public(uri)?)),
        },
    }
}

#[cfg(not(all(feature = "aws-kms", feature = "gcp-kms", feature = "vault", feature = "pkcs11")))]
fn not_built_in(uri: &RootKeyUri) -> KmsError {
    let scheme = uri.scheme().as_str();
    KmsError::Config(format!("{uri}: {scheme} root keys were left out of this build; build with --features {scheme}"))
}

fn default_source() -> PassphraseSource {
    match passphrase::credential(passphrase::CREDENTIAL) {
        Some(path) if path.exists() => PassphraseSource::SystemdCredential(passphrase::CREDENTIAL.into()),
        _ => PassphraseSource::Terminal,
    }
}
