//! What is told of the use of keys: for the audit log and the metrics.
//!
//! Three kinds of thing are told, each once: [`Call`], one call to a root key, by whoever calls the provider; [`DekUse`],
//! one DEK wrapped, unwrapped or moved, by the store, whether its KEK is in this process or in a service; [`Change`],
//! something that happened to the keys themselves.

use super::{KmsError, WrapContext};
use std::cell::{Cell, RefCell};
use std::time::Duration;

/// Whose system call made the call necessary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// Process id, as the kernel gives it to the file system.
    pub pid: u32,
    /// User id.
    pub uid: u32,
}

/// What was asked of a root key, or of a KEK.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    Wrap,
    Unwrap,
    Rewrap,
    /// A file has a new DEK in place of the old one; never asked of a root key.
    Rekey,
    Generate,
    Health,
}

impl Operation {
    /// Its name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Wrap => "wrap",
            Self::Unwrap => "unwrap",
            Self::Rewrap => "rewrap",
            Self::Rekey => "rekey",
            Self::Generate => "generate",
            Self::Health => "health",
        }
    }
}

/// One call that has ended.
#[derive(Debug, Clone)]
pub struct Call<'a> {
    pub operation: Operation,
    /// The root key's URI; for a wrap by a sealed KEK `sealed`.
    pub provider: &'a str,
    /// What was wrapped; `None` for [`Operation::Health`].
    pub context: Option<&'a WrapContext>,
    /// The KEK that wraps a DEK.
    pub kek: Option<[u8; 16]>,
    /// The service's own id of the request, if it gave one.
    pub request_id: Option<String>,
    pub latency: Duration,
    pub result: Result<(), &'a KmsError>,
    /// `None` for the program's own doing (mount, rotation, refresh).
    pub caller: Option<Caller>,
}

/// One file's DEK was wrapped, unwrapped, or moved from one KEK to another, or that was refused.
#[derive(Debug, Clone)]
pub struct DekUse<'a> {
    /// [`Operation::Wrap`], [`Operation::Unwrap`] or [`Operation::Rewrap`].
    pub operation: Operation,
    /// Ahead of need: a wrap for a file that is not there yet, an unwrap that nobody has asked for yet.
    pub ahead: bool,
    /// `sealed`, or for an external KEK its root key's URI.
    pub provider: &'a str,
    pub store: [u8; 16],
    pub file: [u8; 16],
    /// The KEK that wraps the DEK; in a rewrap the new one.
    pub kek: [u8; 16],
    /// In a rewrap, the KEK that wrapped it before.
    pub from: Option<[u8; 16]>,
    /// The key service's own id of the last request this took, if there was one and it gave one.
    pub request_id: Option<String>,
    pub latency: Duration,
    /// The stable code of what went wrong: that of a damage, or `kms-…`.
    pub result: Result<(), &'a str>,
    /// `None` for the program's own doing.
    pub caller: Option<Caller>,
}

/// What became of a KEK.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KekChange {
    /// Made, and in the keyring as pending.
    Created,
    /// The one that wraps from now on.
    Activated,
    /// No longer the one that wraps.
    Retired,
    /// A scan of every header proved that none names it, but for what [`Change::Waived`] told before.
    Unused,
    /// It is to be destroyed after a while.
    Scheduled,
    /// The end of that while is near, or was found not to be.
    Announced,
    /// It is not to be destroyed after all.
    Cancelled,
    /// Its wrapped bytes were removed from the keyring.
    Destroyed,
    /// It was pending, and was removed without having been used.
    Discarded,
}

impl KekChange {
    /// Its name in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Activated => "activated",
            Self::Retired => "retired",
            Self::Unused => "unused",
            Self::Scheduled => "scheduled",
            Self::Announced => "announced",
            Self::Cancelled => "cancelled",
            Self::Destroyed => "destroyed",
            Self::Discarded => "discarded",
        }
    }
}

/// What became of the store as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoreChange {
    Mount,
    Unmount,
    /// Every key was dropped on request.
    Lock,
    /// Keys may be used again.
    Unlock,
    /// A key service refuses: no more unwraps.
    Denied,
    /// A key service does not answer: what is cached goes on.
    Offline,
    /// It answers again.
    Online,
    /// A copy of the keyring was put back into the store.
    KeyringImport,
    /// How many root keys must confirm what cannot be undone was changed.
    Quorum,
    /// Older KEKs were closed to opening files, or opened again.
    Floor,
}

impl StoreChange {
    /// Its name in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mount => "mount",
            Self::Unmount => "unmount",
            Self::Lock => "lock",
            Self::Unlock => "unlock",
            Self::Denied => "denied",
            Self::Offline => "offline",
            Self::Online => "online",
            Self::KeyringImport => "keyring-import",
            Self::Quorum => "quorum",
            Self::Floor => "floor",
        }
    }
}

/// Something that happened to the keys, after it happened.
#[derive(Debug, Clone)]
pub enum Change<'a> {
    /// To a KEK.
    Kek { kek: [u8; 16], change: KekChange },
    /// A root key was added to the keyring, or removed from it.
    RootKey { id: [u8; 16], uri: &'a str, added: bool },
    /// A rotation has come so far.
    Rotation {
        /// The new KEK, once there is one.
        target: Option<[u8; 16]>,
        /// `staged`, `activated`, `resumed`, `sweeping`, `verifying`, `retiring`; at the end `done`, `incomplete`,
        /// `cancelled` or `failed`, of a shard `share-done`.
        step: &'a str,
        /// What was done so far, by name.
        counts: &'a [(&'a str, u64)],
        /// The stable code of what it failed for.
        result: Result<(), &'a str>,
    },
    /// A rotation to the KEK `target` is complete although it could not deal with the file or directory `path`, for that
    /// was waived.
    Waived {
        target: [u8; 16],
        path: &'a str,
        /// The stable code of why it failed.
        code: &'a str,
    },
    /// To the store as a whole. `about`: where, why or by which root key; without secrets.
    Store { change: StoreChange, about: &'a str },
}

/// Hears of every use of a key. Must not use one itself, and must not call back into whoever tells it.
pub trait Observer: Send + Sync {
    /// A call to a root key has ended.
    fn call(&self, c: &Call<'_>);

    /// A DEK was wrapped, unwrapped or moved, or was not.
    fn dek(&self, u: &DekUse<'_>) {
        let _ = u;
    }

    /// Something happened to the keys.
    fn change(&self, c: &Change<'_>) {
        let _ = c;
    }

    /// Whether a DEK may be wrapped or unwrapped now. Asked before each, so it must be quick.
    ///
    /// # Errors
    /// Why not: for instance that nothing could be told of it.
    fn permit(&self) -> Result<(), KmsError> {
        Ok(())
    }
}

impl std::fmt::Debug for dyn Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Observer")
    }
}

thread_local! {
    static CALLER: Cell<Option<Caller>> = const { Cell::new(None) };
    static REQUEST_ID: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `f` on behalf of `caller`.
pub fn on_behalf_of<R>(caller: Caller, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<Caller>);
    impl Drop for Restore {
        fn drop(&mut self) {
            CALLER.set(self.0);
        }
    }
    let _restore = Restore(CALLER.replace(Some(caller)));
    f()
}

/// On whose behalf this thread runs.
pub fn caller() -> Option<Caller> {
    CALLER.get()
}

/// A provider tells, within a call, the id its service gave the request.
pub fn note_request_id(id: impl Into<String>) {
    REQUEST_ID.set(Some(id.into()));
}

/// What was last told since the last look, by the same thread.
pub fn take_request_id() -> Option<String> {
    REQUEST_ID.take()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_holds_for_one_piece_of_work() {
        let (a, b) = (Caller { pid: 1, uid: 2 }, Caller { pid: 3, uid: 4 });
        on_behalf_of(a, || {
            on_behalf_of(b, || assert_eq!(caller(), Some(b)));
            assert_eq!(caller(), Some(a));
        });
        assert_eq!(caller(), None);
    }

    #[test]
    fn a_request_id_is_taken_once() {
        note_request_id("r");
        assert_eq!(take_request_id().as_deref(), Some("r"));
        assert_eq!(take_request_id(), None);
    }
}
