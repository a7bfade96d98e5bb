//! `gcp-kms://projects/P/locations/L/keyRings/R/cryptoKeys/K`: a symmetric key of Google Cloud KMS, on Google's own
//! client library.
//!
//! A key is wrapped by `encrypt` on the cryptoKey with [`WrapContext::to_aad`] as additional authenticated data; what is
//! kept is described in [`wrapped`]. The service has no re-encrypt, so a re-wrap is a decryption and an encryption here.
//!
//! Guarantees: one request for a call (two if the access token was not accepted, with a new token between them), bounded
//! in time whatever the service does; checksums are checked both ways ([`answer`]); an answer of another key is refused;
//! redirects are not followed. Address and credentials come from the configuration or the environment, never from the
//! store.
//!
//! The raw key is wiped from every buffer this module gets hold of. The library's own copies (the request as JSON, the
//! buffers of TLS) cannot be reached and stay in freed memory until it is used again.

mod answer;
mod classify;
mod credentials;
mod primary;
mod settings;
mod wrapped;

use super::services::GcpOptions;
use super::uri::RootKeyUri;
use super::{Capabilities, Description, KeyProvider, KmsError, WrapContext};
use crate::crypto::secret::Secret32;
use answer::crc;
use classify::Call;
use google_cloud_auth::credentials::Credentials;
use google_cloud_gax::client_builder::internal::with_follow_redirects;
use google_cloud_gax::options::RequestOptionsBuilder;
use google_cloud_gax::retry_policy::NeverRetry;
use google_cloud_kms_v1::Error;
use google_cloud_kms_v1::client::KeyManagementService;
use google_cloud_kms_v1::model::{CryptoKey, DecryptRequest, EncryptRequest};
use parking_lot::Mutex;
use primary::Primary;
use settings::{Settings, Source};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::time::timeout;
use wrapped::Wrapped;
use zeroize::Zeroize;

/// What is encrypted, and thrown away, to see whether the key works where reading its state is not permitted. The
/// context is none that a key is ever wrapped with.
const PROBE: (&[u8], &[u8]) = (&[0; 32], b"envelopefs/v1/probe");

/// A root key in Google Cloud KMS. Calls block and may come from any thread, also from one of a tokio runtime.
pub struct GcpKms {
    link: Arc<Link>,
    /// `None` only while this is being dropped.
    runtime: Option<Runtime>,
}

/// What calls in progress share.
struct Link {
    /// The root key's URI.
    uri: String,
    /// The cryptoKey's resource name.
    name: String,
    settings: Settings,
    /// Made with the first call, and anew when its credentials are found to be of no use.
    session: Mutex<Option<Arc<Session>>>,
    primary: Mutex<Primary>,
    /// An access token was had at least once.
    proven: AtomicBool,
    /// Reading the key was refused while encrypting was not.
    blind: AtomicBool,
}

struct Session {
    client: KeyManagementService,
    credentials: Credentials,
}

impl GcpKms {
    /// Checks the configuration and a credentials file if it names one. Calls nobody.
    ///
    /// # Errors
    /// [`KmsError::Config`], [`KmsError::Credentials`].
    pub fn open(uri: &RootKeyUri, o: &GcpOptions) -> Result<Self, KmsError> {
        let name = uri.gcp_key().ok_or_else(|| KmsError::Config(format!("'{uri}' names no key of Cloud KMS")))?;
        let settings = Settings::new(o)?;
        if let Source::File(path) = &settings.source {
            credentials::read(path)?;
        }
        let link = Link {
            uri: uri.to_string(),
            name: name.to_owned(),
            settings,
            session: Mutex::new(None),
            primary: Mutex::new(Primary::default()),
            proven: AtomicBool::new(false),
            blind: AtomicBool::new(false),
        };
        // One worker does for hundreds of calls at once, which wait for the network and not for the processor.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("gcp-kms")
            .enable_all()
            .build()
            .map_err(|e| KmsError::Config(format!("{uri}: cannot start a thread for the key service: {e}")))?;
        Ok(Self { link: Arc::new(link), runtime: Some(runtime) })
    }

    /// Runs `work` on the runtime and waits for it. Not `block_on`, which panics on a thread of another runtime.
    fn run<T, F>(&self, work: impl FnOnce(Arc<Link>) -> F) -> Result<T, KmsError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, KmsError>> + Send + 'static,
    {
        let gone = || KmsError::Unreachable(format!("{}: the client library gave up in mid-call", self.link.uri));
        let runtime = self.runtime.as_ref().ok_or_else(gone)?;
        let (tell, told) = mpsc::sync_channel(1);
        let work = work(self.link.clone());
        runtime.spawn(async move {
            let _ = tell.send(work.await);
        });
        match told.recv_timeout(self.link.patience()) {
            Ok(r) => r,
            Err(RecvTimeoutError::Timeout) => Err(self.link.late()),
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
        }
    }
}

impl Drop for GcpKms {
    fn drop(&mut self) {
        // Does not wait, say for a name look-up that hangs, and may be done on a thread of another runtime.
        if let Some(r) = self.runtime.take() {
            r.shutdown_background();
        }
    }
}

impl KeyProvider for GcpKms {
    fn describe(&self) -> Result<Description, KmsError> {
        let capabilities = Capabilities { binds_context: true, remote: true, ..Capabilities::default() };
        Ok(Description { uri: self.link.uri.clone(), key_id: self.link.name.clone(), capabilities })
    }

    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
        let request = self.link.encryption(key.expose(), &context.to_aad());
        self.run(|link| async move { link.encrypt(request).await.map(|(bytes, _)| bytes) })
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        let w = self.link.parse(wrapped)?;
        let (version, aad) = (w.version, context.to_aad());
        let request = DecryptRequest::new()
            .set_name(&self.link.name)
            .set_ciphertext_crc32c(crc(w.ciphertext))
            .set_ciphertext(w.ciphertext.to_vec())
            .set_additional_authenticated_data_crc32c(crc(&aad))
            .set_additional_authenticated_data(aad);
        self.run(|link| async move { link.decrypt(request, version).await })
    }

    fn health(&self) -> Result<(), KmsError> {
        self.run(|link| async move { link.look().await.map(|_| ()) })
    }

    fn rewrap_due(&self, wrapped: &[u8]) -> Result<bool, KmsError> {
        let version = self.link.parse(wrapped)?.version;
        let known = self.link.primary.lock().due(version, Instant::now());
        match known {
            Some(due) => Ok(due),
            None => self.run(|link| async move { link.look().await.map(|primary| primary != version) }),
        }
    }
}

impl Link {
    /// Longest time for a call: a token and an attempt, twice, and what the thread needs to say so.
    fn patience(&self) -> Duration {
        (self.settings.login + self.settings.call) * 2 + Duration::from_secs(1)
    }

    fn late(&self) -> KmsError {
        KmsError::Unreachable(format!("{}: no answer in time", self.uri))
    }

    fn parse<'a>(&self, wrapped: &'a [u8]) -> Result<Wrapped<'a>, KmsError> {
        Wrapped::parse(wrapped)
            .ok_or_else(|| KmsError::BadCiphertext(format!("{}: not wrapped by a key of Cloud KMS", self.uri)))
    }

    fn encryption(&self, plaintext: &[u8], aad: &[u8]) -> EncryptRequest {
        EncryptRequest::new()
            .set_name(&self.name)
            .set_plaintext_crc32c(crc(plaintext))
            .set_plaintext(plaintext.to_vec())
            .set_additional_authenticated_data_crc32c(crc(aad))
            .set_additional_authenticated_data(aad.to_vec())
    }

    /// The wrapped form and the version that made it, which is the primary one.
    async fn encrypt(&self, mut request: EncryptRequest) -> Result<(Vec<u8>, u64), KmsError> {
        let sent = self
            .call(Call::Encrypt, |client| self.dressed(client.encrypt().with_request(request.clone())).send())
            .await;
        // The clones that were sent are gone, so this is the last hold on the raw key, and it can be wiped.
        if let Ok(mut bytes) = std::mem::take(&mut request.plaintext).try_into_mut() {
            bytes.as_mut().zeroize();
        }
        let (bytes, version) = answer::encrypted(&sent?, &self.name, &self.uri)?;
        self.primary.lock().is(version, Instant::now());
        Ok((bytes, version))
    }

    async fn decrypt(&self, request: DecryptRequest, version: u64) -> Result<Secret32, KmsError> {
        let mut answer = self
            .call(Call::Decrypt(version), |client| self.dressed(client.decrypt().with_request(request.clone())).send())
            .await?;
        let key = answer::decrypted(&answer, &self.uri);
        if let Ok(mut bytes) = std::mem::take(&mut answer.plaintext).try_into_mut() {
            bytes.as_mut().zeroize();
        }
        let key = key?;
        match answer.used_primary {
            true => self.primary.lock().is(version, Instant::now()),
            false => self.primary.lock().is_not(version, Instant::now()),
        }
        Ok(key)
    }

    /// The number of the primary version, if it can be used now. Unwraps nothing.
    async fn look(&self) -> Result<u64, KmsError> {
        if !self.blind.load(Ordering::Relaxed) {
            match self.get().await {
                Err(denied @ KmsError::Denied(_)) => return self.probe().await.map_err(|_| denied),
                other => return other,
            }
        }
        self.probe().await
    }

    async fn get(&self) -> Result<u64, KmsError> {
        let found: CryptoKey =
            self.call(Call::Get, |client| self.dressed(client.get_crypto_key().set_name(&self.name)).send()).await?;
        let version = classify::usable(&found, &self.name, &self.uri)?;
        self.primary.lock().is(version, Instant::now());
        Ok(version)
    }

    /// Whether the key encrypts, for callers that hold no more than the role that lets them encrypt and decrypt: it does
    /// not include the right to read the key's state.
    async fn probe(&self) -> Result<u64, KmsError> {
        let (_, version) = self.encrypt(self.encryption(PROBE.0, PROBE.1)).await?;
        self.blind.store(true, Ordering::Relaxed);
        Ok(version)
    }

    /// What every request carries.
    fn dressed<B: RequestOptionsBuilder>(&self, request: B) -> B {
        let request = request.with_user_agent(concat!("envelopefs/", env!("CARGO_PKG_VERSION")));
        match &self.settings.quota_project {
            Some(p) => request.with_quota_project(p),
            None => request,
        }
    }

    /// One call; a second time with new credentials if the access token was not accepted. A token's end is reckoned by a
    /// clock that stands still while the machine is suspended, so that one can be past it unnoticed.
    async fn call<T, F>(&self, call: Call, send: impl Fn(KeyManagementService) -> F) -> Result<T, KmsError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let session = self.session().await?;
        let Ok(mut answer) = timeout(self.settings.call, send(session.client.clone())).await else {
            return Err(self.late());
        };
        if self.settings.source != Source::Anonymous && matches!(&answer, Err(e) if classify::is_unauthenticated(e)) {
            self.forget(&session);
            let session = self.session().await?;
            let Ok(again) = timeout(self.settings.call, send(session.client.clone())).await else {
                return Err(self.late());
            };
            answer = again;
        }
        answer.map_err(|e| classify::failure(&e, call, &self.uri))
    }

    /// A client whose credentials have an access token ready.
    async fn session(&self) -> Result<Arc<Session>, KmsError> {
        match timeout(self.settings.login, self.log_in()).await {
            Ok(r) => r,
            Err(_) => Err(classify::no_token("no answer in time", true, self.is_unproven(), &self.uri)),
        }
    }

    async fn log_in(&self) -> Result<Arc<Session>, KmsError> {
        let known = self.session.lock().clone();
        let session = match known {
            Some(s) => s,
            None => {
                let made = Arc::new(self.connect().await?);
                // Several threads may have come here at once: all go on with the same.
                self.session.lock().get_or_insert(made).clone()
            }
        };
        match session.credentials.headers(Default::default()).await {
            Ok(_) => {
                self.proven.store(true, Ordering::Relaxed);
                Ok(session)
            }
            Err(e) => {
                if !e.is_transient() {
                    // The library does not try again with credentials that failed for good: next time, new ones.
                    self.forget(&session);
                }
                Err(classify::no_token(&classify::root_cause(&e), e.is_transient(), self.is_unproven(), &self.uri))
            }
        }
    }

    /// Makes the client. May ask the metadata server, but not the key service.
    async fn connect(&self) -> Result<Session, KmsError> {
        let credentials = credentials::build(&self.settings.source, &self.uri)?;
        let builder = KeyManagementService::builder()
            .with_credentials(credentials.clone())
            .with_retry_policy(NeverRetry)
            .with_attempt_timeout(self.settings.call);
        let builder = match &self.settings.endpoint {
            Some(e) => builder.with_endpoint(e),
            None => builder,
        };
        // A redirect would take the raw key to a host that nobody configured.
        let client = with_follow_redirects(builder, false)
            .build()
            .await
            .map_err(|e| KmsError::Config(format!("{}: {}", self.uri, classify::said_by(&e))))?;
        Ok(Session { client, credentials })
    }

    fn forget(&self, session: &Arc<Session>) {
        let mut known = self.session.lock();
        if known.as_ref().is_some_and(|s| Arc::ptr_eq(s, session)) {
            *known = None;
        }
    }

    /// Whether nothing but the metadata server was left to ask for credentials, and it never gave any.
    fn is_unproven(&self) -> bool {
        self.settings.source == Source::Default
            && !self.proven.load(Ordering::Relaxed)
            && !credentials::are_configured()
    }
}
