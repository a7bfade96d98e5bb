//! A root key that is looked for only when it is needed: the passphrase of the second root key is not asked for while
//! the first one opens the store.

use crate::crypto::secret::Secret32;
use crate::kms::{self, Capabilities, ConnectOptions, Description, KeyProvider, KmsError, RootKeyUri, WrapContext};
use parking_lot::Mutex;
use std::sync::Arc;

/// Connects to its provider with the first wrap or unwrap. A failure that would not go away by itself is remembered, so
/// that a passphrase is not asked for again and again.
pub struct LazyKey {
    uri: RootKeyUri,
    options: ConnectOptions,
    provider: Mutex<Option<Result<Arc<dyn KeyProvider>, KmsError>>>,
}

impl LazyKey {
    /// The root key `uri`, not connected to yet.
    pub fn new(uri: RootKeyUri, options: ConnectOptions) -> Self {
        Self { uri, options, provider: Mutex::new(None) }
    }

    fn provider(&self) -> Result<Arc<dyn KeyProvider>, KmsError> {
        let mut known = self.provider.lock();
        if let Some(r) = known.as_ref() {
            return r.clone();
        }
        let r = kms::connect(&self.uri, &self.options, false);
        if !matches!(&r, Err(e) if e.is_retryable()) {
            *known = Some(r.clone());
        }
        r
    }
}

impl KeyProvider for LazyKey {
    fn describe(&self) -> Result<Description, KmsError> {
        if let Some(Ok(p)) = self.provider.lock().as_ref() {
            return p.describe();
        }
        let uri = self.uri.to_string();
        Ok(Description { key_id: uri.clone(), uri, capabilities: Capabilities::default() })
    }

    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
        self.provider()?.wrap(key, context)
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        self.provider()?.unwrap(wrapped, context)
    }

    fn rewrap(&self, wrapped: &[u8], from: &WrapContext, to: &WrapContext) -> Result<Vec<u8>, KmsError> {
        self.provider()?.rewrap(wrapped, from, to)
    }

    fn generate(&self, context: &WrapContext) -> Result<(Secret32, Vec<u8>), KmsError> {
        self.provider()?.generate(context)
    }

    fn health(&self) -> Result<(), KmsError> {
        self.provider()?.health()
    }

    fn rewrap_due(&self, wrapped: &[u8]) -> Result<bool, KmsError> {
        self.provider()?.rewrap_due(wrapped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kms::{KeyPurpose, PassphraseSource};
    use std::sync::atomic::{AtomicU32, Ordering};

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
        assert_eq!(asked.load(Ordering::Relaxed), 0);
        let context = WrapContext { store: [0; 16], purpose: KeyPurpose::Kek, object: [0; 16], extra: vec![] };
        assert!(k.unwrap(b"x", &context).is_err());
        assert!(k.unwrap(b"x", &context).is_err());
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }
}
