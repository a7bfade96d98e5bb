//! Who hears of a store's keys: the audit log, if there is one, and the counters for monitoring.

use super::audit::observer::Fan;
use super::audit::{self, Log, line};
use super::fault::Fault;
use super::metrics::deks::DekCounts;
use crate::format::ids::StoreId;
use crate::kms::ConnectOptions;
use crate::kms::event::{Change, Observer, StoreChange};
use crate::kms::metrics::Registry;
use crate::store::keys::Keys;
use std::path::Path;
use std::sync::Arc;

/// Those who hear, from before the keyring is opened to after it is closed.
pub struct Observed {
    pub audit: Option<Arc<Log>>,
    pub deks: Arc<DekCounts>,
    /// Calls to root keys.
    pub calls: Arc<Registry>,
    fan: Arc<dyn Observer>,
}

impl Observed {
    /// Opens the audit log of `store`, if there is to be one.
    ///
    /// # Errors
    /// As [`Log::open`].
    pub fn start(audit: Option<&audit::Options>, store: StoreId) -> Result<Self, Fault> {
        let audit = audit.map(|o| Log::open(o, store)).transpose()?;
        let deks = Arc::new(DekCounts::default());
        let mut all: Vec<Arc<dyn Observer>> = vec![deks.clone()];
        all.extend(audit.clone().map(|a| a as Arc<dyn Observer>));
        Ok(Self { audit, deks, calls: Registry::new(), fan: Arc::new(Fan(all)) })
    }

    /// The same options, with calls to root keys told and counted.
    pub fn connect(&self, o: &ConnectOptions) -> ConnectOptions {
        ConnectOptions { observer: Some(self.fan.clone()), metrics: Some(self.calls.clone()), ..o.clone() }
    }

    /// The keyring is open: uses and changes of its keys are told, and the log is sealed with its key.
    pub fn opened(&self, keys: &Keys) {
        keys.set_observer(self.fan.clone());
        if let Some(a) = &self.audit {
            a.unlock(keys.secret());
        }
    }

    /// The keyring could not be opened for `event` (`mount`, `rotate`, …).
    pub fn refused(&self, event: &'static str, backing: &Path, f: &Fault) {
        let Some(a) = &self.audit else { return };
        let kind = serde_json::to_value(f.kind).ok().and_then(|v| v.as_str().map(str::to_owned));
        let about = Some(line::text(&backing.to_string_lossy()));
        a.event(event, line::Fields { about, result: kind, ..line::Fields::default() });
    }

    /// Something happened to the store as a whole.
    pub fn tell(&self, change: StoreChange, about: &str) {
        self.fan.change(&Change::Store { change, about });
    }

    /// The audit log is written out and closed.
    pub fn end(&self) {
        if let Some(a) = &self.audit {
            a.close();
        }
    }
}
