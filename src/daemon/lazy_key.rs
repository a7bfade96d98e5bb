//! A root key that is looked for only when it is needed: the passphrase of the second root key is not asked for while
//! the first one opens the store.

use crate::crypto::secret::Secret32;
use crate::kms::guard::lane::Background;
use crate::kms::{self, Capabilities, ConnectOptions, Description, KeyProvider, KmsError, RootKeyUri, WrapContext};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

type Connected = Result<Arc<dyn KeyProvider>, KmsError>;

/// Connects to its provider with the first wrap or unwrap. A failure that would not go away by itself is remembered, so
/// that a passphrase is not asked for again and again. One that would is not: the next call connects anew, but those
/// that waited meanwhile share what came of it, so that a service that is down is asked once for all of them. Once
/// connected, the provider's own guard takes care of that.
pub struct LazyKey {
    uri: RootKeyUri,
    options: ConnectOptions,
    connect: fn(&RootKeyUri, &ConnectOptions) -> Connected,
    /// What is known for good.
    known: Mutex<Option<Connected>>,
    /// Held while connecting: what came of the last try, and how many calls had come when it ended.
    tried: Mutex<Option<(Connected, u64)>>,
    /// Calls that needed a connection.
    arrived: AtomicU64,
}

impl LazyKey {
    /// The root key `uri`, not connected to yet.
    pub fn new(uri: RootKeyUri, options: ConnectOptions) -> Self {
        Self {
            uri,
            options,
            connect: |uri, o| kms::connect(uri, o, false),
            known: Mutex::new(None),
            tried: Mutex::new(None),
            arrived: AtomicU64::new(0),
        }
    }

    fn known(&self) -> Option<Connected> {
        self.known.lock().clone()
    }

    fn provider(&self) -> Connected {
        if let Some(r) = self.known() {
            return r;
        }
        let ticket = self.arrived.fetch_add(1, Ordering::SeqCst);
        let mut tried = self.tried.lock();
        // A try that ended after this call had come answers it.
        if let Some((r, _)) = tried.as_ref().filter(|(_, covered)| ticket < *covered) {
            return r.clone();
        }
        if let Some(r) = self.known() {
            return r;
        }
        let r = (self.connect)(&self.uri, &self.options);
        *tried = Some((r.clone(), self.arrived.load(Ordering::SeqCst)));
        if !matches!(&r, Err(e) if e.is_retryable()) {
            *self.known.lock() = Some(r.clone());
        }
        r
    }
}

impl KeyProvider for LazyKey {
    /// Never connects, and never waits for somebody who does.
    fn describe(&self) -> Result<Description, KmsError> {
        if let Some(Ok(p)) = self.known() {
            return p.describe();
        }
        let uri = self.uri.to_string();
        let capabilities = Capabilities { remote: self.uri.scheme().is_remote(), ..Capabilities::default() };
        Ok(Description { key_id: uri.clone(), uri, capabilities })
    }

    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
        self.provider()?.wrap(key, context)
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        self.provider()?.unwrap(wrapped, context)
    }

    fn unwrap_many(&self, items: &[(&[u8], &WrapContext)]) -> Vec<Result<Secret32, KmsError>> {
        match self.provider() {
            Ok(p) => p.unwrap_many(items),
            Err(e) => items.iter().map(|_| Err(e.clone())).collect(),
        }
    }

    fn rewrap(&self, wrapped: &[u8], from: &WrapContext, to: &WrapContext) -> Result<Vec<u8>, KmsError> {
        self.provider()?.rewrap(wrapped, from, to)
    }

    fn generate(&self, context: &WrapContext) -> Result<(Secret32, Vec<u8>), KmsError> {
        self.provider()?.generate(context)
    }

    /// A root key on this machine that has not been needed is well: nobody is asked for a passphrase to find out.
    fn health(&self) -> Result<(), KmsError> {
        match self.known() {
            None if !self.uri.scheme().is_remote() => Ok(()),
            Some(r) => r?.health(),
            None => self.provider()?.health(),
        }
    }

    fn leave(&self, whose: Background, calls: u32) -> Result<(), Duration> {
        match self.known() {
            Some(Ok(p)) => p.leave(whose, calls),
            _ => Ok(()),
        }
    }

    /// As for [`LazyKey::health`].
    fn rewrap_due(&self, wrapped: &[u8]) -> Result<bool, KmsError> {
        match self.known() {
            None if !self.uri.scheme().is_remote() => Ok(false),
            Some(r) => r?.rewrap_due(wrapped),
            None => self.provider()?.rewrap_due(wrapped),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kms::scripted::{Call, Gate, Scripted};
    use crate::kms::{KeyPurpose, PassphraseSource};
    use std::cell::{Cell, RefCell};
    use std::sync::atomic::AtomicU32;

    fn context() -> WrapContext {
        WrapContext { store: [0; 16], purpose: KeyPurpose::Kek, object: [0; 16], extra: vec![] }
    }

    #[test]
    fn nothing_is_asked_before_it_is_needed_and_only_once() {
        let asked = Arc::new(AtomicU32::new(0));
        let count = asked.clone();
        let prompt = move |_: &str| {
            count.fetch_add(1, Ordering::Relaxed);
            Err(std::io::Error::other("no"))
        };
        let options =
            ConnectOptions { passphrase: Some(PassphraseSource::Prompt(Arc::new(prompt))), ..Default::default() };
        let k = LazyKey::new(RootKeyUri::parse("passphrase:").unwrap(), options);
        assert_eq!(k.describe().unwrap().uri, "passphrase:");
        assert!(k.health().is_ok() && !k.rewrap_due(b"x").unwrap());
        assert_eq!(asked.load(Ordering::Relaxed), 0);
        assert!(k.unwrap(b"x", &context()).is_err());
        assert!(k.unwrap(b"x", &context()).is_err());
        assert!(k.health().is_err(), "what is known is told");
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }

    thread_local! {
        static TRIES: Cell<u32> = const { Cell::new(0) };
        static SERVICE: RefCell<Option<Arc<Scripted>>> = const { RefCell::new(None) };
    }

    /// Fails twice, then connects to `SERVICE`.
    fn third_time(_: &RootKeyUri, _: &ConnectOptions) -> Connected {
        TRIES.set(TRIES.get() + 1);
        match (TRIES.get(), SERVICE.with_borrow(Clone::clone)) {
            (3.., Some(s)) => Ok(s),
            _ => Err(KmsError::Unreachable("not yet".into())),
        }
    }

    #[test]
    fn an_outage_is_not_remembered_and_every_call_goes_through() {
        let service = Scripted::new("s");
        SERVICE.set(Some(service.clone()));
        let uri = RootKeyUri::parse("vault://transit/k").unwrap();
        let k = LazyKey { connect: third_time, ..LazyKey::new(uri, ConnectOptions::default()) };
        assert!(k.describe().unwrap().capabilities.remote, "before anything is known");
        assert!(k.health().is_err());
        assert!(k.wrap(&Secret32::random(), &context()).is_err());
        let (key, w) = k.generate(&context()).unwrap();
        assert!(k.unwrap(&k.rewrap(&w, &context(), &context()).unwrap(), &context()).unwrap().ct_eq(&key));
        k.health().unwrap();
        assert!(!k.rewrap_due(&w).unwrap());
        assert_eq!(k.describe().unwrap().uri, "scripted:s");
        assert_eq!((TRIES.get(), service.count(Call::Health)), (3, 1));
        // An outage later on is the provider's to tell, and not remembered either.
        service.outage();
        assert!(k.unwrap(&w, &context()).unwrap_err().is_retryable());
        service.always(crate::kms::scripted::Behaviour::Obey);
        k.unwrap(&w, &context()).unwrap();
        assert_eq!(TRIES.get(), 3);
    }

    static HOLD: Mutex<Option<Arc<Gate>>> = Mutex::new(None);
    static HELD_TRIES: AtomicU32 = AtomicU32::new(0);

    fn held_and_down(_: &RootKeyUri, _: &ConnectOptions) -> Connected {
        HELD_TRIES.fetch_add(1, Ordering::SeqCst);
        let service = Scripted::new("s");
        if let Some(gate) = HOLD.lock().clone() {
            service.then(Call::Health, crate::kms::scripted::Behaviour::Hold(gate));
        }
        service.health()?;
        Err(KmsError::Unreachable("down".into()))
    }

    #[test]
    fn those_who_wait_for_one_try_share_it() {
        let gate = Gate::new();
        *HOLD.lock() = Some(gate.clone());
        let uri = RootKeyUri::parse("vault://transit/k").unwrap();
        let k = LazyKey { connect: held_and_down, ..LazyKey::new(uri, ConnectOptions::default()) };
        std::thread::scope(|s| {
            let first = s.spawn(|| k.unwrap(b"x", &context()).unwrap_err());
            gate.wait_for(1);
            assert!(k.describe().is_ok(), "waits for nobody");
            let others: Vec<_> = (0..6).map(|_| s.spawn(|| k.unwrap(b"x", &context()).unwrap_err())).collect();
            while k.arrived.load(Ordering::SeqCst) < 7 {
                std::thread::yield_now();
            }
            gate.open();
            assert!(first.join().unwrap().is_retryable());
            assert!(others.into_iter().all(|o| o.join().unwrap().is_retryable()));
        });
        assert_eq!(HELD_TRIES.load(Ordering::SeqCst), 1);
        assert!(k.unwrap(b"x", &context()).unwrap_err().is_retryable());
        assert_eq!(HELD_TRIES.load(Ordering::SeqCst), 2, "the next one tries again");
    }
}
