//! `aws-kms://`: a root key in AWS KMS, through Amazon's own client.
//!
//! A call here is one attempt; retries, limits and the breaker stand above every provider. Nothing in a store chooses
//! where a call goes: the endpoint comes from the configuration or the environment, the region and the profile from
//! the operator's URI, and a key that a wrap names is used only if the URI allows it ([`arn::Allowed`]).
//!
//! A key that goes to the service and back stands in the SDK's buffers and in those of TLS meanwhile, base64 and all,
//! and they are not wiped; what is ours of it is.

pub mod arn;
mod client;
pub mod context;
mod error;
pub mod layout;
mod runtime;

use super::services::AwsOptions;
use super::uri::RootKeyUri;
use super::{Capabilities, Description, KeyProvider, KmsError, WRAPPED_MAX, WrapContext, event};
use crate::crypto::secret::{KEY_LEN, Secret32};
use arn::{Allowed, KeyArn, Target};
use aws_sdk_kms::Client;
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::operation::RequestId;
use aws_sdk_kms::operation::describe_key::{DescribeKeyError, DescribeKeyOutput};
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::{DataKeySpec, KeySpec, KeyUsageType};
use client::Settings;
use error::{Action, Failure};
use layout::Wrapped;
use parking_lot::Mutex;
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// How long a wrap goes by what DescribeKey said of the current key material. Old news make a rewrap due that is not.
const WRAPS_GO_BY: Duration = Duration::from_secs(60);
/// How long the question whether a rewrap is due does: many wraps are asked about in a row, and rarely.
const REWRAPS_GO_BY: Duration = Duration::from_secs(5);

/// A root key in AWS KMS. Made without a call; the client is made with the first.
pub struct AwsKms {
    uri: String,
    target: Target,
    settings: Settings,
    client: Mutex<Option<Client>>,
    /// What was last learnt of the key.
    known: Mutex<Known>,
    /// Held while asking, so that many threads ask once: how that failed last, and when it ended.
    asking: Mutex<Option<(Instant, KmsError)>>,
}

impl std::fmt::Debug for AwsKms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AwsKms({})", self.uri)
    }
}

/// What the URI's key stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Current {
    key: KeyArn,
    /// `None` where the service has no such thing, as for imported key material and external key stores.
    material: Option<String>,
}

/// What DescribeKey has said.
#[derive(Debug, Clone, Default)]
struct Known {
    /// However long ago.
    current: Option<Current>,
    /// When it was last asked, and whether it may be.
    asked: Option<(Instant, Result<(), KmsError>)>,
}

impl Known {
    /// What there is no need to ask again at `now`, if that goes for as long as `age`.
    fn fresh(&self, now: Instant, age: Duration) -> Option<Result<Current, KmsError>> {
        let (at, outcome) = self.asked.as_ref()?;
        if now.saturating_duration_since(*at) >= age {
            return None;
        }
        match outcome {
            Ok(()) => self.current.clone().map(Ok),
            Err(e) => Some(Err(e.clone())),
        }
    }

    /// The key, however long ago it was described: an alias keeps its account and region, an id its key.
    fn key(&self) -> Option<&KeyArn> {
        self.current.as_ref().map(|c| &c.key)
    }
}

/// Whether a wrap by `key` and `material` would become another one by a rewrap.
fn is_due(key: &KeyArn, material: Option<&str>, now: &Current) -> bool {
    *key != now.key || (now.material.is_some() && material != now.material.as_deref())
}

impl AwsKms {
    /// The key that `uri` names.
    ///
    /// # Errors
    /// [`KmsError::Config`] if the URI or the configuration is no use.
    pub fn new(uri: &RootKeyUri, o: &AwsOptions) -> Result<Self, KmsError> {
        let key = uri.aws_key().ok_or_else(|| KmsError::Config(format!("'{uri}' does not name an AWS KMS key")))?;
        let (settings, target) = Settings::new(key, o)?;
        Ok(Self {
            uri: uri.to_string(),
            target,
            settings,
            client: Mutex::default(),
            known: Mutex::default(),
            asking: Mutex::default(),
        })
    }

    fn client(&self) -> Result<Client, KmsError> {
        let mut made = self.client.lock();
        if let Some(c) = made.as_ref() {
            return Ok(c.clone());
        }
        // A failure is not kept: the region may come to be known.
        Ok(made.insert(client::connect(&self.settings)?).clone())
    }

    /// Makes one call and tells its request id. `key` is what the request calls the key.
    fn call<T, E>(
        &self,
        action: Action,
        key: &str,
        request: impl Future<Output = Result<T, SdkError<E>>> + Send + 'static,
    ) -> Result<T, KmsError>
    where
        T: RequestId + Send + 'static,
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
        SdkError<E>: RequestId,
    {
        let answer = runtime::wait(request)?;
        let id = match &answer {
            Ok(a) => a.request_id(),
            Err(e) => e.request_id(),
        }
        .map(str::to_owned);
        if let Some(id) = &id {
            event::note_request_id(id);
        }
        answer.map_err(|e| {
            let mut f = error::failure(&e);
            if let (Failure::Credentials { text, .. }, Some(p)) = (&mut f, self.settings.profile()) {
                text.push_str(&format!(" (profile {p})"));
            }
            let class = error::classify(&f, action, key);
            match &f {
                Failure::Answer { code: Some(c), .. } if c == error::INVALID_STATE => {
                    self.explain(class, key, id.as_deref())
                }
                _ => class,
            }
        })
    }

    /// Asks for the key's state, which an error about it does not tell: a key that will be deleted and one whose store
    /// is out of reach for a minute ask for different things.
    fn explain(&self, e: KmsError, key: &str, request_id: Option<&str>) -> KmsError {
        let state = self.ask(key).and_then(|d| self.check(&d)).err();
        if let Some(id) = request_id {
            event::note_request_id(id);
        }
        match state {
            Some(why @ (KmsError::Disabled(_) | KmsError::Unreachable(_))) => why,
            _ => e,
        }
    }

    fn ask(&self, key: &str) -> Result<DescribeKeyOutput, KmsError> {
        let request = self.client()?.describe_key().key_id(key).send();
        self.call::<_, DescribeKeyError>(Action::DescribeKey, key, request)
    }

    /// Whether the key can be used.
    fn check(&self, d: &DescribeKeyOutput) -> Result<(), KmsError> {
        let name = self.target.request_name();
        let m = d.key_metadata().ok_or_else(|| self.nonsense(Action::DescribeKey, "no key"))?;
        let key = m.arn().unwrap_or(&name);
        let deletion = m.deletion_date().map(ToString::to_string);
        let state = m.key_state().ok_or_else(|| self.nonsense(Action::DescribeKey, "no key state"))?;
        error::check_state(state.as_str(), key, deletion.as_deref())?;
        let usable = m.key_usage().is_none_or(|u| *u == KeyUsageType::EncryptDecrypt)
            && m.key_spec().is_none_or(|s| *s == KeySpec::SymmetricDefault);
        if usable {
            return Ok(());
        }
        Err(KmsError::Config(format!(
            "AWS KMS key {key} is not for this; use one of type SYMMETRIC_DEFAULT and usage ENCRYPT_DECRYPT"
        )))
    }

    /// What the key stands for, by DescribeKey or what it said within `age`.
    fn current(&self, age: Duration) -> Result<Current, KmsError> {
        self.ask_once(Instant::now(), age, || self.ask(&self.target.request_name()).and_then(|d| self.learn(&d)))
    }

    /// What is known for no longer than `age`, or what `ask` says to one who came at `began`. Of those who come while somebody is asking, none asks
    /// again, whatever came of it: after a failure each would wait for its own, one behind the other.
    fn ask_once(
        &self,
        began: Instant,
        age: Duration,
        ask: impl FnOnce() -> Result<Current, KmsError>,
    ) -> Result<Current, KmsError> {
        if let Some(r) = self.known.lock().fresh(Instant::now(), age) {
            return r;
        }
        let mut failed = self.asking.lock();
        if let Some(r) = self.known.lock().fresh(Instant::now(), age) {
            return r;
        }
        if let Some((_, e)) = failed.as_ref().filter(|(ended, _)| *ended > began) {
            return Err(e.clone());
        }
        let answer = ask();
        if let Err(e) = &answer {
            let ended = Instant::now();
            *failed = Some((ended, e.clone()));
            if matches!(e, KmsError::Denied(_)) {
                self.known.lock().asked = Some((ended, Err(e.clone())));
            }
        }
        answer
    }

    /// Remembers what DescribeKey said.
    fn learn(&self, d: &DescribeKeyOutput) -> Result<Current, KmsError> {
        let m = d.key_metadata().ok_or_else(|| self.nonsense(Action::DescribeKey, "no key"))?;
        let key = self.answered(Action::DescribeKey, m.arn())?;
        let current = Current { key, material: m.current_key_material_id().map(str::to_owned) };
        *self.known.lock() = Known { current: Some(current.clone()), asked: Some((Instant::now(), Ok(()))) };
        Ok(current)
    }

    /// An answer that makes no sense, as from something that is not AWS KMS.
    fn nonsense(&self, action: Action, what: &str) -> KmsError {
        let (action, name) = (action.as_str(), self.target.request_name());
        KmsError::Config(format!("AWS KMS {action} with {name}: the answer has {what}; check the endpoint"))
    }

    /// The key that the service says it used, which must be one that the URI allows.
    fn answered(&self, action: Action, arn: Option<&str>) -> Result<KeyArn, KmsError> {
        let key = arn.and_then(KeyArn::parse).ok_or_else(|| self.nonsense(action, "no key ARN"))?;
        match self.target.allows(self.known.lock().key()) {
            Some(allowed) if allowed.permit(&key).as_ref() != Some(&key) => {
                Err(self.nonsense(action, &format!("another key, {key}")))
            }
            _ => Ok(key),
        }
    }

    /// Reads a wrap and decides which key to name in a call about it: `None` if the URI does not allow its key.
    fn permitted<'a>(&self, wrapped: &'a [u8]) -> Result<Option<(KeyArn, Wrapped<'a>)>, KmsError> {
        let Some(w) = Wrapped::decode(wrapped) else { return Ok(None) };
        let known = self.known.lock().key().cloned();
        let allowed: Allowed = match self.target.allows(known.as_ref()) {
            Some(a) => a,
            // By alias or id, which account and region it is in has to be asked once.
            None => match self.target.allows(Some(&self.current(WRAPS_GO_BY)?.key)) {
                Some(a) => a,
                None => return Ok(None),
            },
        };
        Ok(allowed.permit(&w.key).map(|key| (key, w)))
    }

    fn foreign(&self, wrapped: &[u8]) -> KmsError {
        let by = match Wrapped::decode(wrapped) {
            Some(w) => format!("it is by {}, which this root key's URI does not allow", w.key),
            None => "it is not by AWS KMS".into(),
        };
        KmsError::BadCiphertext(format!("{}: {by}", self.uri))
    }

    /// The key material that will wrap, for the wrap to name: Encrypt does not tell, so it is asked for *before*, and a
    /// rotation in between makes a rewrap due that is not, never the other way round.
    fn before_wrap(&self) -> Result<Option<Current>, KmsError> {
        match self.current(WRAPS_GO_BY) {
            Ok(c) => Ok(Some(c)),
            // Wrapping needs no more than kms:Encrypt, if the account and region are known.
            Err(KmsError::Denied(_)) if self.target.allows(self.known.lock().key()).is_some() => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn encode(&self, key: KeyArn, material: Option<&str>, blob: Option<&Blob>) -> Result<Vec<u8>, KmsError> {
        let blob = blob.map(AsRef::as_ref).unwrap_or_default();
        Wrapped { key, material, blob }.encode().ok_or_else(|| {
            let n = blob.len();
            KmsError::Config(format!(
                "{}: the service returned a ciphertext of {n} bytes; 1 to {WRAPPED_MAX} with the key's ARN are possible",
                self.uri
            ))
        })
    }

    /// Takes 32 bytes of plaintext out of an answer.
    fn secret(&self, action: Action, plaintext: Option<Blob>) -> Result<Secret32, KmsError> {
        let plaintext = Zeroizing::new(plaintext.map(Blob::into_inner).unwrap_or_default());
        match <&[u8; KEY_LEN]>::try_from(plaintext.as_slice()) {
            Ok(key) => Ok(Secret32::build(|b| b.copy_from_slice(key))),
            Err(_) => Err(self.nonsense(action, &format!("{} bytes of plaintext, not {KEY_LEN}", plaintext.len()))),
        }
    }
}

/// The key material that `current` has, if it is the key that answered.
fn material_of<'a>(current: Option<&'a Current>, key: &KeyArn) -> Option<&'a str> {
    current.filter(|c| c.key == *key).and_then(|c| c.material.as_deref())
}

impl KeyProvider for AwsKms {
    fn describe(&self) -> Result<Description, KmsError> {
        let key_id = self.known.lock().key().map_or_else(|| self.target.request_name(), ToString::to_string);
        let capabilities = Capabilities {
            binds_context: true,
            native_rewrap: true,
            rewraps_contexts: true,
            native_generate: true,
            remote: true,
            ..Capabilities::default()
        };
        Ok(Description { uri: self.uri.clone(), key_id, capabilities })
    }

    /// By Encrypt, not by GenerateDataKey: a DEK exists before it is wrapped, because the context holds the slot's
    /// prefix and that a commitment to the DEK. For keys without such a context there is `generate`.
    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
        let current = self.before_wrap()?;
        let name = self.target.request_name();
        let request = self
            .client()?
            .encrypt()
            .key_id(&name)
            .plaintext(Blob::new(key.expose().to_vec()))
            .set_encryption_context(Some(context::map(context)))
            .send();
        let answer = self.call(Action::Encrypt, &name, request)?;
        let by = self.answered(Action::Encrypt, answer.key_id())?;
        let material = material_of(current.as_ref(), &by).map(str::to_owned);
        self.encode(by, material.as_deref(), answer.ciphertext_blob())
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        let Some((key, w)) = self.permitted(wrapped)? else { return Err(self.foreign(wrapped)) };
        let name = key.to_string();
        // Without a key id, any key that the caller may use and the ciphertext names would do.
        let request = self
            .client()?
            .decrypt()
            .key_id(&name)
            .ciphertext_blob(Blob::new(w.blob))
            .set_encryption_context(Some(context::map(context)))
            .send();
        let answer = self.call(Action::Decrypt, &name, request)?;
        if answer.key_id() != Some(&name) {
            return Err(self.nonsense(Action::Decrypt, "another key"));
        }
        self.secret(Action::Decrypt, answer.plaintext)
    }

    /// Inside the service: the key does not come here.
    fn rewrap(&self, wrapped: &[u8], from: &WrapContext, to: &WrapContext) -> Result<Vec<u8>, KmsError> {
        let Some((key, w)) = self.permitted(wrapped)? else { return Err(self.foreign(wrapped)) };
        let current = self.before_wrap()?;
        let name = key.to_string();
        let request = self
            .client()?
            .re_encrypt()
            .source_key_id(&name)
            .ciphertext_blob(Blob::new(w.blob))
            .set_source_encryption_context(Some(context::map(from)))
            .destination_key_id(self.target.request_name())
            .set_destination_encryption_context(Some(context::map(to)))
            .send();
        let answer = self.call(Action::ReEncrypt, &name, request)?;
        let by = self.answered(Action::ReEncrypt, answer.key_id())?;
        let material = answer.destination_key_material_id().or_else(|| material_of(current.as_ref(), &by));
        self.encode(by, material, answer.ciphertext_blob())
    }

    fn generate(&self, context: &WrapContext) -> Result<(Secret32, Vec<u8>), KmsError> {
        let current = self.before_wrap()?;
        let name = self.target.request_name();
        let request = self
            .client()?
            .generate_data_key()
            .key_id(&name)
            .key_spec(DataKeySpec::Aes256)
            .set_encryption_context(Some(context::map(context)))
            .send();
        let answer = self.call(Action::GenerateDataKey, &name, request)?;
        let by = self.answered(Action::GenerateDataKey, answer.key_id())?;
        let material = answer.key_material_id().or_else(|| material_of(current.as_ref(), &by));
        let wrapped = self.encode(by, material, answer.ciphertext_blob())?;
        Ok((self.secret(Action::GenerateDataKey, answer.plaintext)?, wrapped))
    }

    fn health(&self) -> Result<(), KmsError> {
        let described = self.ask(&self.target.request_name())?;
        self.learn(&described)?;
        self.check(&described)
    }

    fn rewrap_due(&self, wrapped: &[u8]) -> Result<bool, KmsError> {
        // A wrap that this key does not open is not moved on by it either.
        let Some((key, w)) = self.permitted(wrapped)? else { return Ok(false) };
        Ok(is_due(&key, w.material, &self.current(REWRAPS_GO_BY)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u32) -> KeyArn {
        KeyArn::parse(&format!("arn:aws:kms:eu-west-1:111122223333:key/{n}")).unwrap()
    }

    #[test]
    fn a_rewrap_is_due_for_another_key_or_other_material() {
        let now = |material: Option<&str>| Current { key: key(1), material: material.map(str::to_owned) };
        for (wrap_key, wrap_material, current, due) in [
            (1, Some("a"), Some("a"), false),
            (1, Some("a"), Some("b"), true),
            (1, None, Some("b"), true),
            // Keys without material ids are not versioned.
            (1, None, None, false),
            (1, Some("a"), None, false),
            (2, Some("a"), Some("a"), true),
            (2, None, None, true),
        ] {
            assert_eq!(is_due(&key(wrap_key), wrap_material, &now(current)), due, "{wrap_key} {wrap_material:?}");
        }
    }

    #[test]
    fn what_was_described_is_believed_for_a_while() {
        let (start, current) = (Instant::now(), Current { key: key(1), material: None });
        let (age, later) = (WRAPS_GO_BY, start + WRAPS_GO_BY);
        let described = Known { current: Some(current.clone()), asked: Some((start, Ok(()))) };
        assert_eq!(described.fresh(start, age), Some(Ok(current)));
        assert_eq!(described.fresh(later, age), None);
        assert_eq!(described.key(), Some(&key(1)), "the account and region are");
        let denied = Known { asked: Some((start, Err(KmsError::Denied("no".into())))), ..described };
        assert!(matches!(denied.fresh(start, age), Some(Err(KmsError::Denied(_)))));
        assert_eq!((denied.fresh(later, age), denied.key()), (None, Some(&key(1))));
        assert_eq!(Known::default().fresh(start, age), None);
    }

    #[test]
    fn those_who_wait_for_a_question_that_fails_do_not_ask_it_again() {
        let before = Instant::now();
        let p = provider("aws-kms://alias/a?region=eu-west-1");
        let unreachable = || Err(KmsError::Unreachable("no answer".into()));
        assert_eq!(p.ask_once(before, WRAPS_GO_BY, unreachable), unreachable());
        assert_eq!(
            p.ask_once(before, WRAPS_GO_BY, || panic!("asked again")),
            unreachable(),
            "it came before the answer"
        );
        let current = Current { key: key(1), material: None };
        let d = || {
            *p.known.lock() = Known { current: Some(current.clone()), asked: Some((Instant::now(), Ok(()))) };
            Ok(current.clone())
        };
        assert_eq!(p.ask_once(Instant::now(), WRAPS_GO_BY, d), Ok(current.clone()), "a later one asks");
        assert_eq!(p.ask_once(before, WRAPS_GO_BY, || panic!("asked again")), Ok(current.clone()));
    }

    fn provider(uri: &str) -> AwsKms {
        AwsKms::new(&RootKeyUri::parse(uri).unwrap(), &AwsOptions::default()).unwrap()
    }

    #[test]
    fn it_says_what_it_is_without_a_call() {
        let d = provider("aws-kms://alias/a?region=eu-west-1").describe().unwrap();
        assert_eq!((d.uri.as_str(), d.key_id.as_str()), ("aws-kms://alias/a?region=eu-west-1", "alias/a"));
        assert!(d.capabilities.remote && d.capabilities.binds_context && d.capabilities.native_generate);
        assert!(AwsKms::new(&RootKeyUri::parse("passphrase:").unwrap(), &AwsOptions::default()).is_err());
    }

    /// There is no service here: these are refused before any call.
    #[test]
    fn a_wrap_that_the_uri_does_not_allow_is_refused_without_a_call() {
        let p = provider("aws-kms://arn:aws:kms:eu-west-1:111122223333:key/1");
        let c = WrapContext { store: [1; 16], purpose: super::super::KeyPurpose::Kek, object: [2; 16], extra: vec![] };
        let foreign = Wrapped { key: key(2), material: None, blob: &[1] }.encode().unwrap();
        for wrap in [&foreign[..], b"", b"\x01", &[0; 640], &foreign[..9]] {
            assert!(matches!(p.unwrap(wrap, &c), Err(KmsError::BadCiphertext(_))));
            assert!(matches!(p.rewrap(wrap, &c, &c), Err(KmsError::BadCiphertext(_))));
            assert_eq!(p.rewrap_due(wrap), Ok(false));
        }
        assert!(p.unwrap(&foreign, &c).unwrap_err().to_string().contains("key/2, which this root key's URI does not"));
    }
}
