//! The door that every use of a KEK or DEK goes through: open, being closed, or closed, and what the key service says.

use super::authority::{Authority, Change, Policy, View, is_refusal};
use super::ready::DekPool;
use crate::crypto::random;
use crate::format::keyring::KekKind;
use crate::kms::KmsError;
use crate::kms::event::{self, Observer, StoreChange};
use crate::store::{Result, StoreError};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Who closed the door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockedBy {
    /// Somebody who has to bring root keys to open it again.
    Operator,
    /// The key service's refusal; it opens when the service says yes again.
    Refusal,
}

/// How far the door is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// All goes its way.
    Open,
    /// About to be closed: what was written before is still taken, nothing is read or opened any more.
    Draining,
    /// No key is there.
    Locked,
}

impl Phase {
    fn to_byte(self) -> u8 {
        match self {
            Self::Open => 0,
            Self::Draining => 1,
            Self::Locked => 2,
        }
    }

    fn from_byte(b: u8) -> Self {
        match b {
            0 => Self::Open,
            1 => Self::Draining,
            _ => Self::Locked,
        }
    }
}

/// How the keys of a store stand. Times are Unix seconds, 0 if there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyStanding {
    pub state: KeyState,
    /// Since when.
    pub since: u64,
    /// While offline: until when files can be opened.
    pub grace_until: u64,
    /// When the key service last unwrapped the active KEK; 0 if no service is asked.
    pub last_ok: u64,
    /// What the service said; empty while all is well.
    pub reason: String,
}

/// One word for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyState {
    Ready,
    Offline,
    /// Refused by the key service; open files go on.
    Denied,
    /// Refused by the key service, and the keys were dropped for it.
    DeniedLocked,
    /// Locked by an operator.
    Locked,
}

struct Inner {
    authority: Authority,
    by: LockedBy,
    since: Instant,
    /// Counts closings and openings: what a service was asked before one of them is no news after it.
    epoch: u64,
}

/// The door. Shared by the keyring and those of its KEKs that call a service.
pub struct Gate {
    phase: AtomicU8,
    /// The active KEK is a key in a provider: every wrap is a call to it.
    wraps_outside: AtomicBool,
    /// Some KEK, now or since the mount, is a key in a service.
    calls: AtomicBool,
    /// The last call for a file that said yes or no said no.
    refused: AtomicBool,
    inner: Mutex<Inner>,
    /// Keys made ahead of need, which a refusal ends.
    pool: Arc<DekPool>,
    /// Who is told of a service that goes away, refuses, or comes back.
    observer: OnceLock<Arc<dyn Observer>>,
}

impl Gate {
    /// Open: the keyring was opened just now.
    pub(super) fn new() -> Self {
        let now = Instant::now();
        let inner = Inner { authority: Authority::new(now), by: LockedBy::Operator, since: now, epoch: 0 };
        Self {
            phase: AtomicU8::new(Phase::Open.to_byte()),
            wraps_outside: AtomicBool::new(false),
            calls: AtomicBool::new(false),
            refused: AtomicBool::new(false),
            inner: Mutex::new(inner),
            pool: Arc::default(),
            observer: OnceLock::new(),
        }
    }

    /// Another KEK is the active one.
    pub(super) fn activated(&self, kind: KekKind) {
        self.wraps_outside.store(kind == KekKind::External, Ordering::Relaxed);
        // That was about another one.
        self.refused.store(false, Ordering::SeqCst);
    }

    pub(super) fn pool(&self) -> &Arc<DekPool> {
        &self.pool
    }

    pub(super) fn wraps_outside(&self) -> bool {
        self.wraps_outside.load(Ordering::Relaxed)
    }

    /// Whether the active KEK's service has refused a call for a file since one went well.
    pub(super) fn was_refused(&self) -> bool {
        self.refused.load(Ordering::SeqCst)
    }

    /// Whether files may be made. Where a new file's key has to be wrapped by a call, not while no answer is to be had: its
    /// first write may reach us when nobody can be told of an error any more.
    ///
    /// # Errors
    /// As [`Gate::may_open`]; what the service said last.
    pub(super) fn may_create(&self) -> Result<()> {
        self.may_open()?;
        match self.wraps_outside() {
            true => self.authority(Authority::check_answering).map_err(Into::into),
            false => Ok(()),
        }
    }

    /// Whether the service answers, and files may be opened.
    pub(super) fn may_call(&self) -> bool {
        self.may_open().is_ok() && self.authority(|a, now| matches!(a.view(now), View::Ready))
    }

    /// A KEK is a key in a service.
    pub(super) fn has_a_service(&self) {
        self.calls.store(true, Ordering::Relaxed);
    }

    pub(super) fn calls_a_service(&self) -> bool {
        self.calls.load(Ordering::Relaxed)
    }

    pub(super) fn phase(&self) -> Phase {
        Phase::from_byte(self.phase.load(Ordering::SeqCst))
    }

    /// Begins to close. Says no if it is closed, or being closed, already.
    pub(super) fn drain(&self) -> bool {
        let (open, draining) = (Phase::Open.to_byte(), Phase::Draining.to_byte());
        self.phase.compare_exchange(open, draining, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    pub(super) fn close(&self, by: LockedBy) {
        let mut i = self.inner.lock();
        i.by = by;
        i.epoch += 1;
        i.since = Instant::now();
        self.phase.store(Phase::Locked.to_byte(), Ordering::SeqCst);
    }

    /// Opens; the KEKs were unwrapped just now.
    pub(super) fn open(&self) {
        let mut i = self.inner.lock();
        i.epoch += 1;
        i.since = Instant::now();
        i.authority.reopened(Instant::now(), turn());
        self.phase.store(Phase::Open.to_byte(), Ordering::SeqCst);
    }

    pub(super) fn locked_by(&self) -> Option<LockedBy> {
        let i = self.inner.lock();
        (self.phase() == Phase::Locked).then_some(i.by)
    }

    pub(super) fn authority<R>(&self, f: impl FnOnce(&mut Authority, Instant) -> R) -> R {
        f(&mut self.inner.lock().authority, Instant::now())
    }

    pub(super) fn watch(&self, policy: Policy) {
        self.authority(|a, now| a.watch(policy, now, turn()));
    }

    /// Counts closings and openings.
    pub(super) fn epoch(&self) -> u64 {
        self.inner.lock().epoch
    }

    /// A refresh ended that had begun in `epoch`.
    pub(super) fn refreshed(&self, epoch: u64, r: std::result::Result<(), &KmsError>) -> Change {
        let mut i = self.inner.lock();
        if i.epoch != epoch {
            return Change::None;
        }
        let change = i.authority.refreshed(r, Instant::now(), turn());
        if change == Change::Refused {
            self.pool.clear();
        }
        change
    }

    /// An ordinary call to the active KEK's service ended. Logs what that changes.
    pub(super) fn called(&self, r: std::result::Result<(), &KmsError>) {
        match r {
            Ok(()) => self.refused.store(false, Ordering::SeqCst),
            Err(e) if is_refusal(e) => {
                self.refused.store(true, Ordering::SeqCst);
                self.pool.clear();
            }
            Err(_) => {}
        }
        let change = self.authority(|a, now| a.called(r, now));
        match (change, r) {
            (Change::WentOffline, Err(e)) => tracing::warn!("the key service does not answer: {e}"),
            (Change::Restored, _) => tracing::info!("the key service answers again"),
            _ => {}
        }
        self.tell(change, r);
    }

    pub(super) fn set_observer(&self, o: Arc<dyn Observer>) {
        let _ = self.observer.set(o);
    }

    /// Tells the observer of a change of standing that `r` made.
    pub(super) fn tell(&self, change: Change, r: std::result::Result<(), &KmsError>) {
        let change = match change {
            Change::None => return,
            Change::WentOffline => StoreChange::Offline,
            Change::Refused => StoreChange::Denied,
            Change::Restored => StoreChange::Online,
        };
        if let Some(o) = self.observer.get() {
            let about = r.err().map(KmsError::to_string).unwrap_or_default();
            o.change(&event::Change::Store { change, about: &about });
        }
    }

    /// Whether files may be opened and made.
    ///
    /// # Errors
    /// [`StoreError::KeysLocked`]; what the key service says, see [`Authority::check`].
    pub(super) fn may_open(&self) -> Result<()> {
        if self.phase() != Phase::Open {
            return Err(StoreError::KeysLocked);
        }
        self.authority(|a, now| a.check(now)).map_err(Into::into)
    }

    /// How the keys stand.
    pub(super) fn standing(&self) -> KeyStanding {
        let now = Instant::now();
        let i = self.inner.lock();
        let view = i.authority.view(now);
        let last_ok = i.authority.last_ok().map_or(0, |t| unix(t, now));
        let mut s = match view {
            View::Ready => {
                let since = unix(i.since, now);
                KeyStanding { state: KeyState::Ready, since, grace_until: 0, last_ok, reason: String::new() }
            }
            View::Offline { since, until, why } => KeyStanding {
                state: KeyState::Offline,
                since: unix(since, now),
                grace_until: unix(until, now),
                last_ok,
                reason: why.to_string(),
            },
            View::Refused { since, why } => KeyStanding {
                state: KeyState::Denied,
                since: unix(since, now),
                grace_until: 0,
                last_ok,
                reason: why.to_string(),
            },
        };
        if self.phase() != Phase::Open {
            s.state = match i.by {
                LockedBy::Refusal if s.state == KeyState::Denied => KeyState::DeniedLocked,
                _ => KeyState::Locked,
            };
            (s.since, s.grace_until) = (unix(i.since, now), 0);
        }
        s
    }
}

/// Where in its interval the next refresh falls.
fn turn() -> f64 {
    f64::from(u32::from_le_bytes(random::array())) / f64::from(u32::MAX)
}

/// `t` on the wall clock, as far as that agrees with the one that cannot be set.
fn unix(t: Instant, now: Instant) -> u64 {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let ago = now.saturating_duration_since(t);
    let ahead = t.saturating_duration_since(now);
    (wall.saturating_sub(ago) + ahead).as_secs()
}
