//! What key providers tell of their calls: for the audit log and the metrics.

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

/// Hears of every call to a root key. Must not call a provider itself.
pub trait Observer: Send + Sync {
    /// A call has ended.
    fn call(&self, c: &Call<'_>);
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
