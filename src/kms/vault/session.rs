//! The token at work: got when it is first needed, renewed or replaced before it ends, replaced when it was refused.
//!
//! A thread looks after the token of a store that nobody uses; it ends with the provider. A call does the same when it
//! comes first (after a suspend, say).

use super::answer::Place;
use super::auth::{self, Session};
use super::flight::Flight;
use super::lease::{Lease, Next};
use super::settings::Settings;
use crate::kms::KmsError;
use parking_lot::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How long the thread sleeps if there is nothing to look after; a new token wakes it.
const IDLE: Duration = Duration::from_secs(3600);
/// How long it sleeps at least: a caller may be at it already.
const BREATH: Duration = Duration::from_millis(100);

/// The one session in force.
pub struct Sessions {
    settings: Arc<Settings>,
    place: Place,
    current: Mutex<Option<Arc<Session>>>,
    logins: Flight<Arc<Session>>,
    /// Wakes the thread, and ends it when dropped. `None`: no token so far needed any.
    wake: Mutex<Option<Sender<()>>>,
    me: Weak<Self>,
}

impl Sessions {
    /// Logs in to nothing yet.
    pub fn new(settings: Arc<Settings>, place: Place) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            settings,
            place,
            current: Mutex::default(),
            logins: Flight::default(),
            wake: Mutex::default(),
            me: me.clone(),
        })
    }

    /// A session whose token has not ended, as far as is known.
    ///
    /// # Errors
    /// As [`auth::login`].
    pub fn current(&self) -> Result<Arc<Session>, KmsError> {
        let known = self.current.lock().clone();
        let Some(s) = known else { return self.replace(None, false) };
        let s = self.care(s);
        let next = s.lease.lock().next(Instant::now());
        if next == Next::Expired { self.replace(Some(&s), false) } else { Ok(s) }
    }

    /// Logs in again in the place of `old`, unless somebody has done so already. `refused`: the server does not know
    /// its token any more.
    ///
    /// # Errors
    /// As [`auth::login`]; `old` stays in force.
    pub fn replace(&self, old: Option<&Arc<Session>>, refused: bool) -> Result<Arc<Session>, KmsError> {
        self.logins.run(|| {
            let known = self.current.lock().clone();
            if let Some(k) = known.filter(|k| !old.is_some_and(|o| Arc::ptr_eq(o, k))) {
                return Ok(k);
            }
            let refused = old.filter(|_| refused).map(Arc::as_ref);
            let new = Arc::new(auth::login(&self.settings, &self.place, refused)?);
            *self.current.lock() = Some(new.clone());
            self.watch(&new);
            Ok(new)
        })
    }

    /// Renews the token of `s`, or replaces it, if it is time and nobody is at it. What is good is used on if that
    /// fails.
    fn care(&self, s: Arc<Session>) -> Arc<Session> {
        if matches!(s.lease.lock().next(Instant::now()), Next::Use | Next::Expired) {
            return s;
        }
        let Some(_care) = s.care.try_lock() else { return s.clone() };
        let next = s.lease.lock().next(Instant::now());
        let failed = match next {
            Next::Use | Next::Expired => return s.clone(),
            Next::Renew => match auth::renew(&s, &self.place) {
                Ok(lease) => {
                    *s.lease.lock() = lease.unwrap_or_else(|| Lease::ended(Instant::now()));
                    return s.clone();
                }
                Err(e) => e,
            },
            Next::Replace => match self.replace(Some(&s), false) {
                Ok(new) => return new,
                Err(e) => e,
            },
        };
        tracing::warn!(root_key = %self.place.uri, error = %failed, "cannot renew the Vault token; trying again");
        let mut lease = s.lease.lock();
        *lease = lease.postponed(Instant::now());
        drop(lease);
        s.clone()
    }

    /// Sees to it that the thread knows of `new`.
    fn watch(&self, new: &Session) {
        if new.lease.lock().wait(Instant::now()).is_none() {
            return;
        }
        let mut wake = self.wake.lock();
        if wake.as_ref().is_some_and(|w| w.send(()).is_ok()) {
            return;
        }
        let (sender, receiver) = channel();
        let me = self.me.clone();
        let thread = std::thread::Builder::new().name("vault-token".into()).spawn(move || look_after(&me, &receiver));
        match thread {
            Ok(_) => *wake = Some(sender),
            // Calls look after it too.
            Err(error) => tracing::warn!(%error, "no thread to renew the Vault token"),
        }
    }

    /// Does what is due, and says when to look again.
    fn tend(&self) -> Duration {
        let known = self.current.lock().clone();
        let Some(s) = known else { return IDLE };
        let s = self.care(s);
        let (lease, now) = (*s.lease.lock(), Instant::now());
        match lease.next(now) {
            // Whoever calls next logs in.
            Next::Expired => IDLE,
            _ => lease.wait(now).unwrap_or(IDLE).clamp(BREATH, IDLE),
        }
    }
}

fn look_after(sessions: &Weak<Sessions>, wake: &Receiver<()>) {
    loop {
        let Some(s) = sessions.upgrade() else { return };
        let wait = s.tend();
        drop(s);
        match wake.recv_timeout(wait) {
            Ok(()) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
