//! `pkcs11:` (RFC 7512): a root key on a PKCS#11 token, such as an HSM or a smart card, that it never leaves.
//!
//! The mechanism is chosen when the key is found, from what token and key allow, and proved with a trial: AES-GCM with
//! the context as associated data, else AES key wrap, else RSA-OAEP, which wrap the context's hash along with the key. Each
//! wrapped key records its mechanism and the CKA_ID of the key that made it ([`wrapped`]), so that it opens also after
//! a newer key has come under the label that the URI names.
//!
//! Which library is loaded and where the PIN comes from is said by the command line and the configuration, never by a
//! store. A PIN that a token has refused is not sent again in this process.
//!
//! Sessions that a token has dropped are opened anew once, with a new login; nothing else is retried here.

mod cipher;
mod fault;
mod keys;
mod matching;
mod mechanism;
mod module;
mod pin;
mod token;
mod wrapped;

pub use pin::CREDENTIAL;

use super::services::Pkcs11Options;
use super::{Capabilities, Description, KeyProvider, KmsError, RootKeyUri, WrapContext};
use crate::crypto::secret::Secret32;
use crate::crypto::stack::wiped;
use crate::format::codec::Malformed;
use cryptoki::mechanism::MechanismInfo;
use cryptoki::session::Session;
use fault::{Meaning, name};
use keys::Key;
use matching::{Kind, TokenFacts, Wanted};
use mechanism::{Method, candidates, named, refusal};
use module::Module;
use parking_lot::Mutex;
use pin::Pin;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use token::{Fail, Token};
use wrapped::Wrapped;

/// What is wrapped and unwrapped to see whether the device works at all. No secret.
const CANARY: [u8; 32] = *b"envelopefs/v1/pkcs11 canary     ";
/// Most keys kept by their CKA_ID.
const OLDER_MAX: usize = 64;

/// The key that wraps now, and how.
struct Current {
    generation: u64,
    key: Key,
    method: Method,
    /// [`CANARY`] wrapped: IV and ciphertext.
    canary: cipher::Sealed,
}

/// A root key on a token.
pub struct Pkcs11Key {
    wanted: Wanted,
    options: Pkcs11Options,
    token: Arc<Token>,
    current: Mutex<Option<Arc<Current>>>,
    /// Keys found by the CKA_ID in a wrap, with the generation their handles are of.
    older: Mutex<BTreeMap<Vec<u8>, (u64, Key)>>,
}

/// The absolute path of the module for `uri`.
fn module_path(uri: &RootKeyUri, o: &Pkcs11Options) -> Result<PathBuf, KmsError> {
    match uri.module_path().or(o.module.as_deref()) {
        Some(p) if p.is_absolute() => Ok(p.to_owned()),
        Some(p) => Err(KmsError::Config(format!("PKCS#11 module {}: give its absolute path", p.display()))),
        None => Err(KmsError::Config(format!(
            "{uri}: which PKCS#11 library to load is not said; use --pkcs11-module or module in [services.pkcs11]"
        ))),
    }
}

/// The token that is meant, of those that the module sees.
fn wanted_of(module: &Module, wanted: &Wanted, o: &Pkcs11Options) -> Result<TokenFacts, KmsError> {
    let there: Vec<_> = module.tokens()?.into_iter().map(|p| p.facts).collect();
    wanted.token(&there, o.token.as_deref()).cloned()
}

impl Pkcs11Key {
    /// Finds the token and the key, logs in, and tries the key out.
    ///
    /// # Errors
    /// [`KmsError::Config`] for a module, token or key that must not or cannot be used; [`KmsError::NotFound`] if the key
    /// is not there, [`KmsError::Unreachable`] if the token is not, [`KmsError::Credentials`] if it does not let us in.
    pub fn connect(uri: &RootKeyUri, o: &Pkcs11Options) -> Result<Self, KmsError> {
        let wanted = Wanted::of(uri)?;
        let path = module_path(uri, o)?;
        let pin = Pin::new(uri, o)?;
        let module = module::load(&path)?;
        let library = module.library()?;
        if !wanted.is_library(&library) {
            let (what, (major, minor)) = (library.description, library.version);
            let text = format!("{uri}: the module {} is '{what}' {major}.{minor}, which is not meant", path.display());
            return Err(KmsError::Config(text));
        }
        let facts = match wanted_of(&module, &wanted, o) {
            // It may have come since the module was initialised, as after a lock of a store whose token was away.
            Err(KmsError::Unreachable(_)) => {
                module.restart()?;
                wanted_of(&module, &wanted, o)?
            }
            found => found?,
        };
        let token = module.token(&facts.identity, facts.slot, pin);
        let key = Self { wanted, options: o.clone(), token, current: Mutex::default(), older: Mutex::default() };
        key.current(false)?;
        Ok(key)
    }

    fn failed(&self, e: Fail, what: &str) -> KmsError {
        e.into_kms(&format!("{}: {what}", self.token.identity()))
    }

    /// The key that wraps now; looked for again if the token was opened since, or with `anew`.
    fn current(&self, anew: bool) -> Result<Arc<Current>, KmsError> {
        let mut known = self.current.lock();
        if let Some(c) = known.as_ref()
            && !anew
            && c.generation == self.token.generation()
        {
            return Ok(c.clone());
        }
        let c = Arc::new(self.establish()?);
        *known = Some(c.clone());
        Ok(c)
    }

    fn establish(&self) -> Result<Current, KmsError> {
        let find = |s: &Session, generation| Ok((generation, keys::named_by(s, &self.token, &self.wanted)?));
        let (generation, key) = self.token.run(find).map_err(|e| self.failed(e, "look for the key"))?;
        let refuse = |why: &str| KmsError::Config(format!("{}: {why}", self.wanted.uri()));
        if let Some(why) = refusal(key.kind, &key.facts, &self.options) {
            return Err(refuse(&why));
        }
        if key.kind == Kind::Rsa && key.public.is_none() {
            return Err(refuse("the public half is not on the token; put it there under the same CKA_ID"));
        }
        let usable = candidates(key.kind, &key.facts, |m| self.offers(m));
        let mut first = None;
        for method in usable {
            match self.trial(&key, method) {
                Ok(canary) => return Ok(Current { generation, key, method, canary }),
                // No fault of the mechanism.
                Err(e) if matches!(e.meaning(), Some(Meaning::Dead | Meaning::Stale | Meaning::Busy)) => {
                    return Err(self.failed(e, "try the key"));
                }
                Err(e) => drop(first.get_or_insert(e)),
            }
        }
        Err(match first {
            Some(e) => self.failed(e, "try the key"),
            None => refuse(
                "token and key allow neither AES-GCM (CKA_ENCRYPT, CKA_DECRYPT) nor AES key wrap (CKA_WRAP, CKA_UNWRAP) \
                 nor RSA-OAEP (CKA_DECRYPT)",
            ),
        })
    }

    fn offers(&self, m: Method) -> bool {
        let info = self.token.slot().and_then(|s| self.token.module().mechanism(s, cipher::mechanism_type(m)));
        info.is_some_and(
            |i| if m.is_cipher() { i.encrypt() && i.decrypt() } else { i.wrap() && MechanismInfo::unwrap(&i) },
        )
    }

    /// Wraps the canary and unwraps it.
    fn trial(&self, key: &Key, m: Method) -> Result<cipher::Sealed, Fail> {
        let canary = Secret32::build(|b| *b = CANARY);
        let sealed = self.token.once(|s, _| cipher::seal(s, key, m, &canary, &CANARY)).map_err(|(e, _)| e)?;
        let opened =
            self.token.once(|s, _| cipher::open(s, key, m, &sealed.0, &sealed.1, &CANARY)).map_err(|(e, _)| e)?;
        match opened.ct_eq(&canary) {
            true => Ok(sealed),
            false => Err(KmsError::Config("the token unwraps something else than it wrapped".into()).into()),
        }
    }

    /// Whether what was wrapped a while ago opens now.
    fn device_works(&self) -> bool {
        self.with(
            |anew| self.current(anew),
            |s, c| cipher::open(s, &c.key, c.method, &c.canary.0, &c.canary.1, &CANARY),
        )
        .is_ok()
    }

    /// Runs `f` with what `get` finds: once more if the sessions have died meanwhile or the handles have.
    fn with<K, R>(
        &self,
        get: impl Fn(bool) -> Result<K, KmsError>,
        f: impl Fn(&Session, &K) -> Result<R, Fail>,
    ) -> Result<R, Fail> {
        let k = get(false)?;
        match self.token.once(|s, _| f(s, &k)) {
            Err((e, seen)) if e.meaning() == Some(Meaning::Dead) => self.token.reopen(seen)?,
            Err((e, _)) if e.meaning() == Some(Meaning::Stale) => {}
            r => return r.map_err(|(e, _)| e),
        }
        let k = get(true)?;
        self.token.once(|s, _| f(s, &k)).map_err(|(e, _)| e)
    }

    /// The key that made a wrap: the current one or an older one.
    fn maker(&self, kind: Kind, id: &[u8], anew: bool) -> Result<Key, KmsError> {
        let generation = self.token.generation();
        let current = self.current.lock().clone();
        let fresh = |c: &&Arc<Current>| !anew && c.generation == generation;
        if let Some(c) = current.as_ref().filter(fresh).filter(|c| c.key.kind == kind && c.key.facts.id == id) {
            return Ok(c.key.clone());
        }
        if !anew
            && let Some((g, k)) = self.older.lock().get(id)
            && *g == generation
            && k.kind == kind
        {
            return Ok(k.clone());
        }
        let (generation, key) = self.found(kind, id)?;
        let mut older = self.older.lock();
        if older.len() >= OLDER_MAX {
            older.clear();
        }
        older.insert(id.to_vec(), (generation, key.clone()));
        Ok(key)
    }

    fn found(&self, kind: Kind, id: &[u8]) -> Result<(u64, Key), KmsError> {
        let find = |s: &Session, generation| Ok((generation, keys::with_id(s, &self.token, kind, id)?));
        let (generation, key) = self.token.run(find).map_err(|e| self.failed(e, "look for the key of a wrap"))?;
        if self.wanted.label().is_some_and(|l| l != key.facts.label) {
            return Err(self.foreign(id, kind));
        }
        match refusal(kind, &key.facts, &self.options) {
            // What the wrap names is no root key, so it was not made by one.
            Some(why) => Err(KmsError::BadCiphertext(format!("wrapped by {}: {why}", named(id, kind)))),
            None => Ok((generation, key)),
        }
    }

    fn foreign(&self, id: &[u8], kind: Kind) -> KmsError {
        KmsError::BadCiphertext(format!("wrapped by {}, which is not {}", named(id, kind), self.wanted.uri()))
    }
}

impl KeyProvider for Pkcs11Key {
    fn describe(&self) -> Result<Description, KmsError> {
        let c = self.current.lock().clone();
        let key = c.map(|c| format!(";id={};type={}", matching::escaped(&c.key.facts.id), c.key.kind.as_str()));
        let capabilities = Capabilities { binds_context: true, remote: true, ..Capabilities::default() };
        Ok(Description {
            uri: self.wanted.uri().to_owned(),
            key_id: format!("pkcs11:{}{}", self.token.identity(), key.unwrap_or_default()),
            capabilities,
        })
    }

    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
        let aad = context.to_aad();
        let made = self.with(
            |anew| self.current(anew),
            |s, c| {
                let (iv, ciphertext) = wiped(|| cipher::seal(s, &c.key, c.method, key, &aad))?;
                let w = Wrapped { method: c.method, id: &c.key.facts.id, iv: &iv, ciphertext: &ciphertext };
                let bad = |Malformed| KmsError::Config("the token wraps to an unexpected length".into());
                Ok(w.encode().map_err(bad)?)
            },
        );
        made.map_err(|e| self.failed(e, "wrap"))
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        let w = Wrapped::decode(wrapped)
            .map_err(|Malformed| KmsError::BadCiphertext("not wrapped by a PKCS#11 token, or damaged".into()))?;
        let kind = w.method.kind();
        if self.wanted.id().is_some_and(|id| id != w.id) || !self.wanted.kinds().contains(&kind) {
            return Err(self.foreign(w.id, kind));
        }
        let aad = context.to_aad();
        let opened = self.with(
            |anew| self.maker(kind, w.id, anew),
            |s, key| wiped(|| cipher::open(s, key, w.method, w.iv, w.ciphertext, &aad)),
        );
        match opened {
            Ok(key) => Ok(key),
            Err(Fail::Kms(e)) => Err(e),
            Err(e) if matches!(e.meaning(), Some(Meaning::Dead | Meaning::Stale | Meaning::Busy | Meaning::Pin)) => {
                Err(self.failed(e, "unwrap"))
            }
            // The codes say little, and the bytes come from where an attacker may write. If the device does its work
            // otherwise, they are to blame.
            Err(Fail::Token(e)) if self.device_works() => {
                Err(KmsError::BadCiphertext(format!("{}: {}", named(w.id, kind), name(&e))))
            }
            Err(e) => Err(self.failed(e, "unwrap")),
        }
    }

    /// Looks for the key that the URI names, which takes notice of a newer one.
    fn health(&self) -> Result<(), KmsError> {
        let find = |s: &Session, _| {
            s.get_session_info()?;
            keys::named_by(s, &self.token, &self.wanted)
        };
        let key = self.token.run(find).map_err(|e| self.failed(e, "look for the key"))?;
        let known = self.current(false)?;
        if known.key.facts.id != key.facts.id || known.key.kind != key.kind {
            self.current(true)?;
        }
        Ok(())
    }

    /// Whether another key than the one that wraps now made it; what the URI names is looked at by
    /// [`Pkcs11Key::health`], not by each of these.
    fn rewrap_due(&self, wrapped: &[u8]) -> Result<bool, KmsError> {
        let Ok(w) = Wrapped::decode(wrapped) else { return Ok(false) };
        let current = self.current(false)?;
        Ok(current.key.facts.id != w.id || current.key.kind != w.method.kind())
    }
}
