//! Tells observers of every call that really reaches a provider.

use super::clock::Clock;
use crate::crypto::secret::Secret32;
use crate::kms::event::{self, Call, Observer, Operation};
use crate::kms::{Capabilities, Description, KeyProvider, KmsError, WrapContext};
use std::sync::Arc;

/// A provider whose calls are observed, one report for each call that it gets.
///
/// What a provider does not do inside its service is done here by parts and reported by parts: a re-wrap that is an
/// unwrap and a wrap is two calls to the service and two reports.
pub struct Observed {
    inner: Arc<dyn KeyProvider>,
    uri: String,
    capabilities: Capabilities,
    observers: Vec<Arc<dyn Observer>>,
    clock: Arc<dyn Clock>,
}

impl Observed {
    /// `inner`, whose URI is `uri`.
    pub fn new(
        inner: Arc<dyn KeyProvider>,
        uri: String,
        capabilities: Capabilities,
        observers: Vec<Arc<dyn Observer>>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { inner, uri, capabilities, observers, clock }
    }

    fn observe<T>(
        &self,
        operation: Operation,
        context: Option<&WrapContext>,
        call: impl FnOnce(&dyn KeyProvider) -> Result<T, KmsError>,
    ) -> Result<T, KmsError> {
        // What an earlier call on this thread may have left is not this one's.
        let _ = event::take_request_id();
        let begun = self.clock.now();
        let r = call(self.inner.as_ref());
        self.report(operation, context, begun, r.as_ref().map(|_| ()), event::take_request_id());
        r
    }

    fn report(
        &self,
        operation: Operation,
        context: Option<&WrapContext>,
        begun: std::time::Instant,
        result: Result<(), &KmsError>,
        request_id: Option<String>,
    ) {
        let latency = self.clock.now().saturating_duration_since(begun);
        let caller = event::caller();
        let c = Call { operation, provider: &self.uri, context, kek: None, request_id, latency, result, caller };
        self.observers.iter().for_each(|o| o.call(&c));
    }
}

impl KeyProvider for Observed {
    fn describe(&self) -> Result<Description, KmsError> {
        self.inner.describe()
    }

    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
        self.observe(Operation::Wrap, Some(context), |p| p.wrap(key, context))
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        self.observe(Operation::Unwrap, Some(context), |p| p.unwrap(wrapped, context))
    }

    /// One report for each key: what was unwrapped is what an audit is about.
    fn unwrap_many(&self, items: &[(&[u8], &WrapContext)]) -> Vec<Result<Secret32, KmsError>> {
        if !self.capabilities.native_batch {
            return items.iter().map(|(wrapped, context)| self.unwrap(wrapped, context)).collect();
        }
        let _ = event::take_request_id();
        let begun = self.clock.now();
        let results = self.inner.unwrap_many(items);
        let id = event::take_request_id();
        for ((_, context), r) in items.iter().zip(&results) {
            self.report(Operation::Unwrap, Some(context), begun, r.as_ref().map(|_| ()), id.clone());
        }
        results
    }

    fn rewrap(&self, wrapped: &[u8], from: &WrapContext, to: &WrapContext) -> Result<Vec<u8>, KmsError> {
        if self.capabilities.native_rewrap {
            return self.observe(Operation::Rewrap, Some(to), |p| p.rewrap(wrapped, from, to));
        }
        let key = self.unwrap(wrapped, from)?;
        self.wrap(&key, to)
    }

    fn generate(&self, context: &WrapContext) -> Result<(Secret32, Vec<u8>), KmsError> {
        if self.capabilities.native_generate {
            return self.observe(Operation::Generate, Some(context), |p| p.generate(context));
        }
        let key = Secret32::random();
        let wrapped = self.wrap(&key, context)?;
        Ok((key, wrapped))
    }

    fn health(&self) -> Result<(), KmsError> {
        self.observe(Operation::Health, None, |p| p.health())
    }

    /// Often answered without a call. Reported, as a health check, if the service was surely asked: it gave the request
    /// an id, or failed in a way that is not found out without it.
    fn rewrap_due(&self, wrapped: &[u8]) -> Result<bool, KmsError> {
        let _ = event::take_request_id();
        let begun = self.clock.now();
        let r = self.inner.rewrap_due(wrapped);
        let id = event::take_request_id();
        let local = matches!(&r, Ok(_) | Err(KmsError::BadCiphertext(_) | KmsError::Config(_)));
        if !local || id.is_some() {
            self.report(Operation::Health, None, begun, r.as_ref().map(|_| ()), id);
        }
        r
    }
}
