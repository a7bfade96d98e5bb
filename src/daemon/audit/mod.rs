//! The audit log: a line for each use of a key and each change of keys, each bound to the line before it by a hash, sealed
//! now and then under a key from the store secret. `docs/AUDIT.md` is its specification.
//!
//! | module | what it does | I/O |
//! |---|---|---|
//! | [`time`] | times as they are written | none |
//! | [`line`] | an event ↔ a line | none |
//! | [`chain`] | how lines are bound, how a log that was found goes on, whether one is whole | none |
//! | [`outbox`] | lines on their way, and what becomes of them when the disk refuses | none |
//! | [`queue`] | between those who tell and the one who writes | none |
//! | [`file`] | the file: its lock, its rotation | yes |
//! | [`writer`] | the thread that writes | yes |
//! | [`observer`] | from what is told of keys to events | looks up programs |
//! | [`verify`] | reads files for the check | reads |

pub mod chain;
pub mod file;
pub mod line;
pub mod observer;
pub mod outbox;
pub mod queue;
pub mod verify;
pub mod writer;

use super::fault::Fault;
use crate::crypto::secret::StoreSecret;
use crate::format::ids::StoreId;
use line::{Event, Fields, seal_key};
use parking_lot::Mutex;
use queue::{Item, Queue};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

/// What to do when the log cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// Go on, and tell in the log how many events are missing.
    #[default]
    Continue,
    /// Use no key that nothing could be written of.
    Stop,
}

/// Where a log is, and how it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Absolute. `{store}` in it stands for the store's id.
    pub path: PathBuf,
    pub on_error: OnError,
    /// What was written is made durable after at most this long; 0: at once.
    pub fsync: Duration,
}

impl Options {
    /// How long a power cut may reach back if nobody says otherwise.
    pub const FSYNC: Duration = Duration::from_secs(1);

    /// The path for `store`.
    pub fn path_for(&self, store: StoreId) -> PathBuf {
        match self.path.to_str() {
            Some(p) if p.contains("{store}") => PathBuf::from(p.replace("{store}", &store.to_string())),
            _ => self.path.clone(),
        }
    }
}

/// Where a log has got to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// What is in the file.
    pub chain: chain::Chain,
    /// Why nothing more gets there.
    pub trouble: Option<String>,
}

/// An audit log that is being written. Dropping it closes it.
pub struct Log {
    path: PathBuf,
    store: StoreId,
    queue: Arc<Queue>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Log({})", self.path.display())
    }
}

impl Log {
    /// Opens the log of `store`, or makes it, and goes on where it ends; a line torn by a crash is accounted for.
    ///
    /// # Errors
    /// [`FaultKind::Locked`](super::fault::FaultKind::Locked) if another process writes it; the kernel's; that the file is
    /// something else, or another store's.
    pub fn open(o: &Options, store: StoreId) -> Result<Arc<Self>, Fault> {
        let path = o.path_for(store);
        let queue = Arc::new(Queue::new());
        let writer = writer::Writer::open(&path, store, o, queue.clone())?;
        let thread = std::thread::Builder::new()
            .name("audit".into())
            .spawn(move || writer.run())
            .map_err(|e| Fault::io("start the thread that writes", &path, &e))?;
        Ok(Arc::new(Self { path, store, queue, thread: Mutex::new(Some(thread)) }))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whose log it is.
    pub fn store(&self) -> StoreId {
        self.store
    }

    /// From now on the log is sealed under a key from `secret`, for the first time at once.
    pub fn unlock(&self, secret: &StoreSecret) {
        self.queue.push(Item::Key(seal_key(secret)));
    }

    /// Puts an event down. Waits while too many are on their way.
    pub fn event(&self, event: &'static str, fields: Fields) {
        self.queue.push(Item::Event(Box::new(Event::now(event, fields))));
    }

    /// Why no key may be used; [`OnError::Stop`] only.
    pub fn refusal(&self) -> Option<String> {
        self.queue.refusal()
    }

    /// Records written, and events lost, since it was opened.
    pub fn counts(&self) -> (u64, u64) {
        self.queue.counts()
    }

    /// Seals what there is and makes it durable. `None` if the log was closed.
    pub fn checkpoint(&self) -> Option<Head> {
        let (tell, told) = mpsc::channel();
        self.queue.push(Item::Checkpoint(tell));
        told.recv().ok()
    }

    /// Writes what is on its way, seals it, and makes it durable. Nothing can be put down after.
    pub fn close(&self) {
        self.queue.close();
        if let Some(t) = self.thread.lock().take() {
            let _ = t.join();
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests;
