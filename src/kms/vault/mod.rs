//! `vault://MOUNT/KEY`: a key of the Transit engine of HashiCorp Vault or OpenBao.
//!
//! Nothing is sent before the first use. Then the token is got ([`session`]) and the key looked at: one that does not
//! bind contexts is refused ([`transit::KeyInfo::check`]). Each call is one request; a request that is refused because
//! the token has ended is made once more with a new token. Everything else that fails is classified ([`answer`]) and
//! left to the caller.
//!
//! Keys pass through this process and the HTTP client's buffers on `wrap`, `unwrap` and `generate`. Bodies are wiped;
//! the client's own buffers and TLS's are not. A `rewrap` within one context happens in the server, and the key never
//! comes here.

mod answer;
mod auth;
mod client;
mod files;
mod flight;
mod lease;
mod session;
mod settings;
mod transit;

use super::services::VaultOptions;
use super::{Capabilities, Description, KeyProvider, KmsError, RootKeyUri, WrapContext, event};
use crate::crypto::secret::Secret32;
use answer::{Place, Verdict};
use auth::Session;
use client::{Answer, parse};
use flight::Flight;
use parking_lot::Mutex;
use serde::Deserialize;
use session::Sessions;
use settings::Settings;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use transit::{BATCH_MAX, Batch, Ciphertext, Datakey, Envelope, KeyInfo, Plaintext, Wrapped};

/// How old what is known of the key may be to wrap. `encrypt` makes a key that is not there if the token may create one, so that it is there
/// is looked at first.
const RECENT: Duration = Duration::from_secs(300);

/// A key of the Transit engine.
pub struct VaultKey {
    place: Place,
    sessions: Arc<Sessions>,
    known: Mutex<Option<(Arc<KeyInfo>, Instant)>>,
    looks: Flight<Arc<KeyInfo>>,
    warned: AtomicBool,
}

impl std::fmt::Debug for VaultKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VaultKey({}, redacted)", self.place.name())
    }
}

/// Whether what was learnt `age` ago will do; `None`: nothing is known.
fn is_recent(age: Option<Duration>, at_most: Duration) -> bool {
    age.is_some_and(|a| a <= at_most)
}

impl VaultKey {
    /// Gets ready to use the key that `uri` names; talks to nobody yet.
    ///
    /// # Errors
    /// [`KmsError::Config`] or [`KmsError::Credentials`] that says what is missing in the configuration.
    pub fn connect(uri: &RootKeyUri, o: &VaultOptions) -> Result<Self, KmsError> {
        let settings = Arc::new(Settings::new(o, &|name| std::env::var(name).ok())?);
        let (mount, key) = uri.vault().ok_or_else(|| KmsError::Config(format!("'{uri}' does not name a Vault key")))?;
        let place = Place {
            uri: uri.to_string(),
            address: settings.address.clone(),
            mount: mount.to_owned(),
            key: key.to_owned(),
        };
        let sessions = Sessions::new(settings, place.clone());
        let (known, looks, warned) = (Mutex::default(), Flight::default(), AtomicBool::new(false));
        Ok(Self { place, sessions, known, looks, warned })
    }

    /// `MOUNT/ACTION/KEY`.
    fn path(&self, action: &str) -> String {
        format!("{}/{action}/{}", self.place.mount, self.place.key)
    }

    /// One request with a token that is good, as far as is known; once more with a new token if it turns out that it
    /// is not.
    fn request(&self, path: &str, body: Option<&[u8]>) -> Result<Answer, KmsError> {
        let denied = || answer::denied(if body.is_some() { "POST" } else { "GET" }, path, &self.place);
        let session = self.sessions.current()?;
        let a = self.once(&session, path, body)?;
        if a.status != 403 {
            return Ok(a);
        }
        if self.is_known(&session)? {
            return Err(denied());
        }
        let session = self.sessions.replace(Some(&session), true)?;
        let a = self.once(&session, path, body)?;
        if a.status != 403 {
            return Ok(a);
        }
        if session.by_login || self.is_known(&session)? {
            return Err(denied());
        }
        // What was put into the file is no good either.
        Err(self.sessions.replace(Some(&session), true).err().unwrap_or_else(denied))
    }

    /// Whether the server knows the token: a good one that may not do something is told by that from one that ended.
    fn is_known(&self, s: &Session) -> Result<bool, KmsError> {
        Ok(auth::lookup(&s.client, &self.place, &s.token)?.is_some())
    }

    fn once(&self, s: &Session, path: &str, body: Option<&[u8]>) -> Result<Answer, KmsError> {
        s.client.send(path, Some(&s.token), body)
    }

    /// A request to the engine that has succeeded.
    fn ask(&self, path: &str, body: Option<&[u8]>) -> Result<Answer, KmsError> {
        let a = self.request(path, body)?;
        match answer::judge(a.status, &a.text(), &self.place) {
            Verdict::Done => Ok(a),
            Verdict::Forbidden => Err(answer::denied("POST", path, &self.place)),
            Verdict::Failed(e) => Err(e),
        }
    }

    /// What is in an answer; its request id is told to whoever listens.
    fn data<'a, T: Deserialize<'a>>(&self, a: &'a Answer) -> Result<T, KmsError> {
        let envelope: Envelope<T> = parse(a, &self.place)?;
        if let Some(id) = envelope.request_id {
            event::note_request_id(id);
        }
        Ok(envelope.data)
    }

    /// What is known of the key, asked for anew if that is older than `at_most`.
    fn info(&self, at_most: Duration) -> Result<Arc<KeyInfo>, KmsError> {
        if let Some((info, learnt)) = &*self.known.lock()
            && is_recent(Some(learnt.elapsed()), at_most)
        {
            return Ok(info.clone());
        }
        self.looks.run(|| self.look())
    }

    /// Looks at the key and whether it can be a root key.
    fn look(&self) -> Result<Arc<KeyInfo>, KmsError> {
        let a = self.ask(&self.path("keys"), None)?;
        let info: Arc<KeyInfo> = Arc::new(self.data(&a)?);
        info.check(&self.place)?;
        let warnings = info.warnings();
        if !warnings.is_empty() && !self.warned.swap(true, Ordering::Relaxed) {
            for why in warnings {
                tracing::warn!(root_key = %self.place.uri, "{why}");
            }
        }
        *self.known.lock() = Some((info.clone(), Instant::now()));
        Ok(info)
    }

    fn parse_wrapped<'a>(&self, bytes: &'a [u8]) -> Result<Wrapped<'a>, KmsError> {
        transit::wrapped(bytes)
            .ok_or_else(|| KmsError::BadCiphertext(format!("{}: not what a Vault key wraps to", self.place.uri)))
    }

    /// The wrapped key in an answer, which must have the form that will be asked for.
    fn made(&self, ciphertext: String) -> Result<Vec<u8>, KmsError> {
        match transit::wrapped(ciphertext.as_bytes()) {
            Some(_) => Ok(ciphertext.into_bytes()),
            None => Err(answer::nonsense(&self.place)),
        }
    }

    fn key_of(&self, plaintext: &str) -> Result<Secret32, KmsError> {
        transit::key_of(plaintext)
            .ok_or_else(|| KmsError::BadCiphertext(format!("{}: unwraps to no key of 32 bytes", self.place.name())))
    }

    /// Unwraps at most [`BATCH_MAX`] in one request.
    fn unwrap_batch(&self, items: &[(Wrapped<'_>, &WrapContext)]) -> Result<Vec<Result<Secret32, KmsError>>, KmsError> {
        let path = self.path("decrypt");
        let a = self.request(&path, Some(transit::batch_body(items).as_bytes()))?;
        // If all have failed the status is 400 in spite of what was asked for, so the results count and not the status.
        let Ok(batch) = self.data::<Batch<'_>>(&a) else {
            return Err(match answer::judge(a.status, &a.text(), &self.place) {
                Verdict::Failed(e) => e,
                Verdict::Forbidden => answer::denied("POST", &path, &self.place),
                Verdict::Done => answer::nonsense(&self.place),
            });
        };
        if batch.batch_results.len() != items.len() {
            return Err(answer::nonsense(&self.place));
        }
        let each = batch.batch_results.iter().map(|r| match r.error.as_deref().filter(|e| !e.is_empty()) {
            Some(e) => Err(answer::item(400, e, &self.place)),
            None => self.key_of(r.plaintext),
        });
        Ok(each.collect())
    }
}

impl KeyProvider for VaultKey {
    fn describe(&self) -> Result<Description, KmsError> {
        let capabilities = Capabilities {
            binds_context: true,
            native_rewrap: true,
            native_generate: true,
            native_batch: true,
            remote: true,
            ..Capabilities::default()
        };
        let key_id = format!("{}/v1/{}", self.place.address, self.path("keys"));
        Ok(Description { uri: self.place.uri.clone(), key_id, capabilities })
    }

    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
        self.info(RECENT)?;
        let body = transit::encrypt_body(key, context);
        let a = self.ask(&self.path("encrypt"), Some(body.as_bytes()))?;
        self.made(self.data::<Ciphertext>(&a)?.ciphertext)
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        let w = self.parse_wrapped(wrapped)?;
        // A key is derived or not for life.
        self.info(Duration::MAX)?;
        let a = self.ask(&self.path("decrypt"), Some(transit::ciphertext_body(w, context).as_bytes()))?;
        self.key_of(self.data::<Plaintext<'_>>(&a)?.plaintext)
    }

    fn unwrap_many(&self, items: &[(&[u8], &WrapContext)]) -> Vec<Result<Secret32, KmsError>> {
        if let [(wrapped, context)] = items {
            return vec![self.unwrap(wrapped, context)];
        }
        let mut results: Vec<Option<Result<Secret32, KmsError>>> = Vec::new();
        let mut sent: Vec<(usize, (Wrapped<'_>, &WrapContext))> = Vec::new();
        for (i, (wrapped, context)) in items.iter().enumerate() {
            match self.parse_wrapped(wrapped) {
                Ok(w) => {
                    sent.push((i, (w, context)));
                    results.push(None);
                }
                Err(e) => results.push(Some(Err(e))),
            }
        }
        let checked = if sent.is_empty() { Ok(()) } else { self.info(Duration::MAX).map(drop) };
        for chunk in sent.chunks(BATCH_MAX) {
            let batch: Vec<_> = chunk.iter().map(|(_, item)| *item).collect();
            let answers = match checked.clone().and_then(|()| self.unwrap_batch(&batch)) {
                Ok(answers) => answers,
                Err(e) => chunk.iter().map(|_| Err(e.clone())).collect(),
            };
            for ((i, _), answer) in chunk.iter().zip(answers) {
                if let Some(r) = results.get_mut(*i) {
                    *r = Some(answer);
                }
            }
        }
        results.into_iter().map(|r| r.unwrap_or_else(|| Err(answer::nonsense(&self.place)))).collect()
    }

    fn rewrap(&self, wrapped: &[u8], from: &WrapContext, to: &WrapContext) -> Result<Vec<u8>, KmsError> {
        if from != to {
            let key = self.unwrap(wrapped, from)?;
            return self.wrap(&key, to);
        }
        let w = self.parse_wrapped(wrapped)?;
        self.info(Duration::MAX)?;
        let a = self.ask(&self.path("rewrap"), Some(transit::ciphertext_body(w, to).as_bytes()))?;
        self.made(self.data::<Ciphertext>(&a)?.ciphertext)
    }

    fn generate(&self, context: &WrapContext) -> Result<(Secret32, Vec<u8>), KmsError> {
        self.info(RECENT)?;
        let a = self.ask(&self.path("datakey/plaintext"), Some(transit::datakey_body(context).as_bytes()))?;
        let d: Datakey<'_> = self.data(&a)?;
        Ok((self.key_of(d.plaintext)?, self.made(d.ciphertext)?))
    }

    /// Looks at the key: that it is there, not soft-deleted, and that the token is good. Whether the token may unwrap
    /// it does not show.
    fn health(&self) -> Result<(), KmsError> {
        self.looks.run(|| self.look()).map(drop)
    }

    /// Looks at the key each time: who has just rotated it must not hear that nothing is due.
    fn rewrap_due(&self, wrapped: &[u8]) -> Result<bool, KmsError> {
        let w = self.parse_wrapped(wrapped)?;
        Ok(w.version < self.look()?.latest_version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_of_a_key_grows_old() {
        let s = Duration::from_secs;
        for (age, at_most, expected) in [
            (None, Duration::MAX, false),
            (Some(s(0)), RECENT, true),
            (Some(RECENT), RECENT, true),
            (Some(RECENT + s(1)), RECENT, false),
            (Some(s(1_000_000)), Duration::MAX, true),
        ] {
            assert_eq!(is_recent(age, at_most), expected, "{age:?} {at_most:?}");
        }
    }
}
