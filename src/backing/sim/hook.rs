//! Somebody who looks on, or does something of their own, between any two operations of a program.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{Op, SimDisk};

/// When a hook is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// An operation is about to be done, on the thread that asked for it.
    Before(Op),
    /// [`Op::SyncFile`] or [`Op::SyncAll`] was done: what it made durable is, and whoever waited for it does not know yet.
    Synced(Op),
}

/// What [`SimDisk::set_hook`] is given.
pub type Hook = Arc<dyn Fn(Moment) + Send + Sync>;

#[derive(Default)]
pub(super) struct Hooked(Mutex<Option<Hook>>);

impl std::fmt::Debug for Hooked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hooked({})", self.0.lock().is_some())
    }
}

impl Hooked {
    pub(super) fn call(&self, moment: Moment) {
        let hook = self.0.lock().clone();
        if let Some(hook) = hook {
            hook(moment);
        }
    }
}

impl SimDisk {
    /// From now on `hook` is called around operations, with no lock of the disk held: it may use the disk, and is then
    /// called for its own operations too. It belongs to this disk, not to what is left of it after a crash.
    pub fn set_hook(&self, hook: Option<Hook>) {
        *self.shared.hooked.0.lock() = hook;
    }
}
