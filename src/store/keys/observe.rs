//! Telling an observer what becomes of keys. With nobody to tell, it costs one load.

use super::Keys;
use crate::format::ids::{FileId, KekId};
use crate::format::keyring::{KekKind, Keyring};
use crate::kms::event::{self, Change, DekUse, KekChange, Observer, Operation};
use crate::store::{Result, StoreError};
use std::sync::Arc;
use std::time::Instant;

/// What a sealed KEK, which is in this process, is called where others have the URI of their root key.
const SEALED: &str = "sealed";

/// One use of a DEK that is under way: how long it took is counted from its making.
pub struct Watch<'a>(Option<Watched<'a>>);

struct Watched<'a> {
    keys: &'a Keys,
    observer: &'a dyn Observer,
    began: Instant,
    ahead: bool,
}

impl Keys {
    /// Has `o` told of every use of a DEK and every change of keys from now on. Can be said once; later ones are ignored.
    pub fn set_observer(&self, o: Arc<dyn Observer>) {
        self.gate.set_observer(o.clone());
        let _ = self.observer.set(o);
    }

    /// Tells of a change.
    pub fn tell(&self, c: &Change<'_>) {
        if let Some(o) = self.observer.get() {
            o.change(c);
        }
    }

    pub(super) fn tell_kek(&self, kek: KekId, change: KekChange) {
        self.tell(&Change::Kek { kek: kek.0, change });
    }

    /// Whether a DEK may be used now.
    ///
    /// # Errors
    /// Why not; see [`Observer::permit`].
    pub fn permit(&self) -> Result<()> {
        self.observer.get().map_or(Ok(()), |o| o.permit()).map_err(StoreError::Kms)
    }

    /// Begins a use of a DEK.
    pub fn watch(&self) -> Watch<'_> {
        Watch(self.observer.get().map(|o| {
            // What an earlier call left behind is not about this use.
            let _ = event::take_request_id();
            Watched { keys: self, observer: o.as_ref(), began: Instant::now(), ahead: false }
        }))
    }

    /// Who wraps DEKs under `kek`: [`SEALED`], or a root key.
    fn wrapper_of(&self, kek: KekId) -> String {
        wrapper_in(&self.state.read().ring, kek)
    }
}

fn wrapper_in(ring: &Keyring, kek: KekId) -> String {
    let external = ring.kek(kek).filter(|k| k.kind == KekKind::External).and_then(|k| k.provider);
    external.and_then(|id| ring.root(id)).map_or_else(|| SEALED.to_owned(), |r| r.uri.clone())
}

impl Watch<'_> {
    /// Nobody has asked for this use yet.
    pub(in crate::store) fn ahead(self) -> Self {
        Self(self.0.map(|w| Watched { ahead: true, ..w }))
    }

    /// Tells that the use has ended: `operation` on the DEK of `file` by `kek`; in a rewrap, `from` another one.
    pub fn ended<T>(&self, operation: Operation, file: FileId, kek: KekId, from: Option<KekId>, result: &Result<T>) {
        self.ended_by(operation, file, kek, from, result);
    }

    /// The same. Returns the key service's id of its last request.
    pub(in crate::store) fn ended_by<T>(
        &self,
        operation: Operation,
        file: FileId,
        kek: KekId,
        from: Option<KekId>,
        result: &Result<T>,
    ) -> Option<String> {
        let w = self.0.as_ref()?;
        let latency = w.began.elapsed();
        let code = result.as_ref().err().map(StoreError::code);
        let request_id = event::take_request_id();
        w.observer.dek(&DekUse {
            operation,
            ahead: w.ahead,
            provider: &w.keys.wrapper_of(kek),
            store: w.keys.store.0,
            file: file.0,
            kek: kek.0,
            from: from.map(|k| k.0),
            request_id: request_id.clone(),
            latency,
            result: code.as_deref().map_or(Ok(()), Err),
            caller: event::caller(),
        });
        request_id
    }

    /// Tells of a use that a request made possible which was made before.
    pub(in crate::store) fn ended_before(&self, o: Operation, file: FileId, kek: KekId, request_id: Option<String>) {
        if let Some(id) = request_id {
            event::note_request_id(id);
        }
        self.ended(o, file, kek, None, &Ok(()));
    }
}
