//! The mounted store's keys: asking the key service again and again, locking, unlocking.
//!
//! A lock goes: no rotation any more; the phase set to draining, so that nothing is opened or read; the kernel told to
//! ask before each write; what it holds written back, and its pages dropped; keys dropped; pages dropped once more, for
//! what came in between. Writes that a process has begun before and that reach us after the keys are gone fail with
//! ENOKEY, which the next fsync tells.

use super::fault::{Fault, FaultKind};
use super::job::Job;
use super::mounts;
use super::protocol::{KeysState, KeysStatus};
use super::server::open_dir;
use crate::backing::posix::Posix;
use crate::fuse::Caches;
use crate::kms::KeyProvider;
use crate::kms::event::{Change, StoreChange};
use crate::store::Store;
use crate::store::keys::authority::Policy;
use crate::store::keys::{KeyState, LockedBy};
use crate::store::lock::Unlocked;
use parking_lot::Mutex;
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How often it is looked whether a refresh is due. A refusal of one file has the service asked that much later at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What becomes of open files when the key service refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDenied {
    /// They go on.
    #[default]
    Keep,
    /// Their keys are dropped, as by `lock`.
    Drop,
}

/// How the key service's word counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KeyRules {
    pub policy: Policy,
    pub on_denied: OnDenied,
}

/// Locks and unlocks, one at a time.
pub struct KeyKeeper {
    store: Arc<Store<Posix>>,
    job: Arc<Job>,
    rules: KeyRules,
    mountpoint: PathBuf,
    backing: PathBuf,
    /// Known once the store is mounted.
    caches: OnceLock<Arc<Caches>>,
    /// Held through a lock and an unlock. True: the store is being closed, and its keys are left alone.
    ended: Mutex<bool>,
}

impl KeyKeeper {
    /// Of a store about to be mounted at `mountpoint`. The key service's word counts from here on.
    pub fn new(
        store: Arc<Store<Posix>>,
        job: Arc<Job>,
        rules: KeyRules,
        mountpoint: PathBuf,
        backing: PathBuf,
    ) -> Arc<Self> {
        store.shared().keys.supervise(rules.policy);
        Arc::new(Self { store, job, rules, mountpoint, backing, caches: OnceLock::new(), ended: Mutex::new(false) })
    }

    /// The store is mounted.
    pub fn mounted(&self, caches: Arc<Caches>) {
        let _ = self.caches.set(caches);
    }

    /// Drops every key but the store secret. Returns whether they were there.
    ///
    /// # Errors
    /// That the store is being mounted or unmounted; that a request did not let go of a key.
    pub fn lock(&self) -> Result<bool, Fault> {
        self.close(LockedBy::Operator)
    }

    fn close(&self, by: LockedBy) -> Result<bool, Fault> {
        let ended = self.ended.lock();
        let caches = self.caches.get().filter(|_| !*ended).ok_or_else(not_now)?;
        let before = self.store.shared().keys.locked_by();
        if before == Some(by) || before == Some(LockedBy::Operator) {
            return Ok(false);
        }
        self.job.hold();
        self.store.drain_keys();
        caches.forget_attributes();
        self.write_back();
        caches.drop_pages();
        // A write(2) that was under way at the first round.
        caches.drop_pages();
        let locked = self.store.lock_keys(by);
        caches.drop_pages();
        let about = match by {
            LockedBy::Operator => "on request",
            LockedBy::Refusal => "the key service refuses",
        };
        self.tell(StoreChange::Lock, about);
        match by {
            LockedBy::Operator => tracing::warn!("keys locked: files give ENOKEY until they are unlocked"),
            LockedBy::Refusal => tracing::warn!("keys dropped because the key service refuses (on_denied = \"drop\")"),
        }
        locked.map(|()| before.is_none()).map_err(|e| {
            let text = format!("{}: locked, but a request still holds a key: {e}", self.backing.display());
            Fault::new(FaultKind::Other, text)
        })
    }

    /// Unlocks with the first of `root` that opens the store. `None` if the keys were not locked and nothing was to do.
    ///
    /// # Errors
    /// As opening the store; the keys stay locked.
    pub fn unlock(&self, root: &[Arc<dyn KeyProvider>]) -> Result<Unlocked, Fault> {
        let ended = self.ended.lock();
        if *ended {
            return Err(not_now());
        }
        let done = self.store.unlock_keys(root).map_err(|e| Fault::store(&self.backing, &e))?;
        self.job.release();
        self.tell(StoreChange::Unlock, "on request");
        tracing::info!("keys unlocked; {} open files have theirs again, {} do not", done.regained, done.failed);
        Ok(done)
    }

    /// Asks the key service now, and acts on what it says. If the store is only read, looks before whether somebody else has
    /// changed the keyring: a KEK that was destroyed elsewhere is not to stay in memory.
    pub fn refresh(&self) {
        self.store.shared().renew_keys();
        let keys = &self.store.shared().keys;
        keys.ask_service();
        self.follow();
        if !keys.is_refused() && keys.locked_by() == Some(LockedBy::Refusal) {
            self.reopen();
        }
    }

    /// Does what a refusal asks for.
    fn follow(&self) {
        let keys = &self.store.shared().keys;
        if !keys.is_refused() || keys.locked_by().is_some() {
            return;
        }
        match self.rules.on_denied {
            OnDenied::Keep => self.store.forget_idle_keys(),
            OnDenied::Drop => {
                if let Err(f) = self.close(LockedBy::Refusal) {
                    tracing::error!("dropping the keys after a refusal: {f}");
                }
            }
        }
    }

    /// Gets the keys back that were dropped for a refusal which was taken back.
    fn reopen(&self) {
        let ended = self.ended.lock();
        if *ended {
            return;
        }
        match self.store.unlock_after_refusal() {
            Ok(done) => {
                self.job.release();
                self.tell(StoreChange::Unlock, "the key service unwraps again");
                tracing::info!("keys are back; {} open files have theirs again, {} do not", done.regained, done.failed);
            }
            Err(e) => tracing::warn!("the key service unwraps again, and yet the keys did not come back: {e}"),
        }
    }

    fn tell(&self, change: StoreChange, about: &str) {
        self.store.shared().keys.tell(&Change::Store { change, about });
    }

    fn look(&self) {
        if self.store.shared().keys.refresh_is_due() {
            self.refresh();
        } else {
            self.follow();
        }
    }

    /// Has the kernel write back what it holds. What cannot be written is told by fsync and close, as always.
    fn write_back(&self) {
        // After a lazy unmount something else may be at the mount point; then dropping pages writes them back, slowly.
        let ours =
            mounts::at(&self.mountpoint).is_ok_and(|m| m.is_some_and(|m| m.is_ours() && m.source == self.backing));
        if let (true, Ok(d)) = (ours, open_dir(&self.mountpoint))
            && let Err(e) = rustix::fs::syncfs(&d)
        {
            tracing::warn!("what was written did not all reach the disk: {e}");
        }
    }

    /// How the keys stand.
    pub fn status(&self) -> KeysStatus {
        let s = self.store.shared().keys.standing();
        let (state, dropped) = match s.state {
            KeyState::Ready => (KeysState::Ready, false),
            KeyState::Offline => (KeysState::Offline, false),
            KeyState::Denied => (KeysState::Denied, false),
            KeyState::DeniedLocked => (KeysState::Denied, true),
            KeyState::Locked => (KeysState::Locked, true),
        };
        let KeyRules { policy, .. } = self.rules;
        KeysStatus {
            state,
            dropped,
            since: s.since,
            grace_until: s.grace_until,
            last_ok: s.last_ok,
            refresh: policy.refresh.as_secs(),
            reason: s.reason,
        }
    }

    /// The store is about to be closed: waits for a lock or unlock under way, and none begins any more.
    pub fn end(&self) {
        *self.ended.lock() = true;
    }
}

fn not_now() -> Fault {
    Fault::new(FaultKind::Other, "the store is being mounted or unmounted; try again")
}

/// The thread that asks. It is not waited for: a call to a service that hangs would hold up the unmount.
pub struct Refresher {
    _stop: Sender<()>,
}

impl Refresher {
    /// Begins to ask.
    pub fn start(keeper: Arc<KeyKeeper>) -> Self {
        let (stop, stopped) = channel();
        let work = move || {
            while stopped.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
                keeper.look();
            }
        };
        if let Err(e) = std::thread::Builder::new().name("refresh".into()).spawn(work) {
            tracing::error!("no thread to ask the key service again: {e}");
        }
        Self { _stop: stop }
    }
}
