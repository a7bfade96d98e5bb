//! A token in use: its login and its sessions, shared by all root keys on it.
//!
//! A login holds for the whole process and ends with the last session, so one session is kept open and never used for
//! anything else. The others are lent out, each to one thread at a time: a session is no place for two. A session that has
//! seen an error is closed, for the operation may still be active in it.
//!
//! Each time the token is opened the *generation* grows. Object handles and sessions of an earlier one are dead.

use super::fault::{Login, Meaning, into_kms, login, meaning, name};
use super::matching::Identity;
use super::module::{Module, Present};
use super::pin::Pin;
use crate::kms::KmsError;
use cryptoki::context::Function;
use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, SessionState, UserType};
use cryptoki::slot::Slot;
use cryptoki::types::RawAuthPin;
use parking_lot::{Condvar, Mutex};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Most sessions lent out at a time.
const SESSIONS_MAX: usize = 16;

/// Tokens that have refused a PIN, and with what words. For the life of the process: a token locks itself after a few
/// wrong PINs. Held while logging in, so that what one login learns the next one knows.
static REFUSED: Mutex<BTreeMap<Identity, String>> = Mutex::new(BTreeMap::new());

/// What went wrong in a session.
#[derive(Debug)]
pub enum Fail {
    /// The module said so.
    Token(Error),
    /// We say so.
    Kms(KmsError),
}

impl From<Error> for Fail {
    fn from(e: Error) -> Self {
        Self::Token(e)
    }
}

impl From<KmsError> for Fail {
    fn from(e: KmsError) -> Self {
        Self::Kms(e)
    }
}

impl Fail {
    /// For the caller of the provider; `what` was tried.
    pub fn into_kms(self, what: &str) -> KmsError {
        match self {
            Self::Token(e) => into_kms(&e, what),
            Self::Kms(e) => e,
        }
    }

    /// What to do about it.
    pub fn meaning(&self) -> Option<Meaning> {
        match self {
            Self::Token(e) => Some(meaning(e)),
            Self::Kms(_) => None,
        }
    }
}

struct Open {
    /// Keeps the login; never used.
    keeper: Session,
    /// Of the module, when this was opened.
    epoch: u64,
    slot: Slot,
    needs_login: bool,
}

#[derive(Default)]
struct State {
    generation: u64,
    open: Option<Open>,
    idle: Vec<Session>,
    lent: usize,
    most: usize,
}

/// A token, open or not.
pub struct Token {
    module: Arc<Module>,
    identity: Identity,
    /// The slot it was last seen in, for tokens that share their whole identity.
    slot: u64,
    pin: Mutex<Pin>,
    state: Mutex<State>,
    returned: Condvar,
    /// One at a time opens.
    opening: Mutex<()>,
}

/// A session in the hands of one thread.
pub struct Lease<'a> {
    token: &'a Token,
    session: Option<Session>,
    generation: u64,
    /// Of the module, when the session was opened.
    epoch: u64,
    after: After,
}

#[derive(Clone, Copy)]
enum After {
    Keep,
    Close,
    /// Its handle is invalid; the module may have given the number to another session by now.
    Forget,
}

impl Token {
    /// The token of this identity; nothing is opened yet.
    pub fn new(module: Arc<Module>, identity: Identity, slot: u64, pin: Pin) -> Self {
        Self {
            module,
            identity,
            slot,
            pin: Mutex::new(pin),
            state: Mutex::default(),
            returned: Condvar::new(),
            opening: Mutex::new(()),
        }
    }

    /// What it is known by.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its module.
    pub fn module(&self) -> &Module {
        &self.module
    }

    /// Another source of the PIN, taken if the token is not open.
    pub fn offer(&self, pin: Pin) {
        let _one = self.opening.lock();
        if self.state.lock().open.is_none() {
            *self.pin.lock() = pin;
        }
    }

    /// How often it has been opened.
    pub fn generation(&self) -> u64 {
        self.state.lock().generation
    }

    /// Whether it is open.
    pub fn is_open(&self) -> bool {
        self.state.lock().open.is_some()
    }

    /// The slot it is in.
    pub fn slot(&self) -> Option<Slot> {
        self.state.lock().open.as_ref().map(|o| o.slot)
    }

    /// Runs `f` in a session, of which it is told the generation. If that fails because session, login or token are gone,
    /// opens the token anew and runs it once more.
    ///
    /// # Errors
    /// Of the last run, or of opening.
    pub fn run<R>(&self, f: impl Fn(&Session, u64) -> Result<R, Fail>) -> Result<R, Fail> {
        match self.once(&f) {
            Err((e, seen)) if e.meaning() == Some(Meaning::Dead) => {
                self.reopen(seen)?;
                self.once(&f).map_err(|(e, _)| e)
            }
            r => r.map_err(|(e, _)| e),
        }
    }

    /// Runs `f` in a session, once; an error comes with the generation it is about, for [`Token::reopen`].
    ///
    /// # Errors
    /// Of `f`, or of getting the session.
    pub fn once<R>(&self, f: impl Fn(&Session, u64) -> Result<R, Fail>) -> Result<R, (Fail, u64)> {
        let mut lease = self.lease()?;
        let calls = self.module.calls();
        let r = match lease.session.as_ref() {
            Some(session) if lease.epoch == *calls => f(session, lease.generation),
            _ => Err(gone().into()),
        };
        lease.after = match &r {
            Ok(_) => After::Keep,
            Err(Fail::Token(Error::Pkcs11(RvError::SessionHandleInvalid | RvError::SessionClosed, _))) => After::Forget,
            Err(_) => After::Close,
        };
        r.map_err(|e| (e, lease.generation))
    }

    fn lease(&self) -> Result<Lease<'_>, (Fail, u64)> {
        let mut state = self.state.lock();
        loop {
            let Some((slot, epoch)) = state.open.as_ref().map(|o| (o.slot, o.epoch)) else {
                let seen = state.generation;
                drop(state);
                self.reopen(seen).map_err(|e| (Fail::Kms(e), seen))?;
                state = self.state.lock();
                continue;
            };
            // Most recently used first, so that what is not needed grows old.
            let session = state.idle.pop();
            if session.is_none() && state.lent >= state.most {
                self.returned.wait(&mut state);
                continue;
            }
            state.lent += 1;
            let mut lease = Lease { token: self, session, generation: state.generation, epoch, after: After::Close };
            drop(state);
            if lease.session.is_none() {
                let calls = self.module.calls();
                let opened = match epoch == *calls {
                    true => self.module.context().open_ro_session(slot),
                    false => Err(gone()),
                };
                lease.session = Some(opened.map_err(|e| (Fail::Token(e), lease.generation))?);
            }
            return Ok(lease);
        }
    }

    /// Opens the token anew, unless somebody has done so since the generation `seen`.
    ///
    /// # Errors
    /// [`KmsError::Unreachable`] if it is not there, [`KmsError::Credentials`] if it does not let us in; as the module says.
    pub fn reopen(&self, seen: u64) -> Result<(), KmsError> {
        let _one = self.opening.lock();
        {
            let state = self.state.lock();
            if state.generation != seen && state.open.is_some() {
                return Ok(());
            }
        }
        // Before a new session is opened, which might get the number of a dead one.
        self.close();
        let there = self.find()?;
        let calls = self.module.calls();
        let failed = |e: Error| into_kms(&e, &format!("open a session of {}", self.identity));
        let keeper = self.module.context().open_ro_session(there.slot).map_err(failed)?;
        self.login(&keeper, &there)?;
        let mut state = self.state.lock();
        state.generation += 1;
        // One is for the keeper.
        let most = there.sessions_max.map_or(SESSIONS_MAX, |n| usize::try_from(n).unwrap_or(SESSIONS_MAX));
        state.most = most.saturating_sub(1).clamp(1, SESSIONS_MAX);
        state.open = Some(Open { keeper, epoch: *calls, slot: there.slot, needs_login: there.pin.login_required });
        self.returned.notify_all();
        Ok(())
    }

    /// Closes all sessions that nobody has in hand, and so ends the login.
    fn close(&self) {
        let calls = self.module.calls();
        let (open, mut sessions) = {
            let mut state = self.state.lock();
            (state.open.take(), std::mem::take(&mut state.idle))
        };
        let Some(open) = open else { return };
        sessions.push(open.keeper);
        if open.epoch != *calls {
            // They went when the module was initialised anew.
            sessions.into_iter().for_each(std::mem::forget);
        }
    }

    fn find(&self) -> Result<Present, KmsError> {
        let look = || -> Result<Vec<Present>, KmsError> {
            Ok(self.module.tokens()?.into_iter().filter(|p| p.facts.identity == self.identity).collect())
        };
        let mut same = look()?;
        if same.is_empty() {
            self.module.restart()?;
            same = look()?;
        }
        let at = same.iter().position(|p| p.facts.slot == self.slot).unwrap_or(0);
        if same.is_empty() {
            let why = "it is not there any more; is the device attached and its service running?";
            return Err(KmsError::Unreachable(format!("{}: {why}", self.identity)));
        }
        Ok(same.swap_remove(at))
    }

    /// Logs in, unless the process is logged in already. A PIN that was refused is never sent again.
    fn login(&self, session: &Session, there: &Present) -> Result<(), KmsError> {
        let mut refused = REFUSED.lock();
        if let Some(why) = refused.get(&self.identity) {
            return Err(KmsError::Credentials(why.clone()));
        }
        let tried = match login(there.pin) {
            Login::No => return Ok(()),
            Login::Refuse(why) => return Err(KmsError::Credentials(format!("{}: {why}", self.identity))),
            _ if is_logged_in(session) => return Ok(()),
            Login::AtDevice => session.login(UserType::User, None),
            Login::Pin => {
                let mut pin = self.pin.lock().get(&self.identity)?;
                session.login_with_raw(UserType::User, &RawAuthPin::new(Box::new(std::mem::take(&mut *pin))))
            }
        };
        match tried {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => Ok(()),
            Err(e) if meaning(&e) == Meaning::Pin => {
                self.pin.lock().forget();
                let why = format!(
                    "{} refused the PIN ({}); it is not tried again, for tokens lock after a few wrong ones: \
                     correct it, then start this program anew",
                    self.identity,
                    name(&e)
                );
                refused.insert(self.identity.clone(), why.clone());
                Err(KmsError::Credentials(why))
            }
            Err(e) => Err(into_kms(&e, &format!("log in to {}", self.identity))),
        }
    }

    /// Who is not logged in sees no private objects, and no error either; nor does who asks for objects of a token that
    /// went away. Finding nothing means something only if this succeeds.
    ///
    /// # Errors
    /// CKR_USER_NOT_LOGGED_IN, CKR_TOKEN_NOT_PRESENT; as the module says.
    pub fn check_sight(&self, session: &Session) -> Result<(), Error> {
        let says = |rv| Err(Error::Pkcs11(rv, Function::FindObjects));
        let open = self.state.lock().open.as_ref().map(|o| (o.slot, o.needs_login));
        let Some((slot, needs_login)) = open else { return says(RvError::SessionClosed) };
        if needs_login && !is_user(session.get_session_info()?.session_state()) {
            return says(RvError::UserNotLoggedIn);
        }
        match self.module.present(slot) {
            Some(p) if p.facts.identity == self.identity => Ok(()),
            _ => says(RvError::TokenNotPresent),
        }
    }
}

/// The session is one of a module that was initialised anew since, or whose token was closed.
fn gone() -> Error {
    Error::Pkcs11(RvError::SessionHandleInvalid, Function::GetSessionInfo)
}

fn is_user(state: SessionState) -> bool {
    matches!(state, SessionState::RoUser | SessionState::RwUser)
}

fn is_logged_in(session: &Session) -> bool {
    session.get_session_info().is_ok_and(|i| is_user(i.session_state()))
}

impl Drop for Token {
    fn drop(&mut self) {
        self.close();
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let calls = self.token.module.calls();
        let mut left = self.session.take();
        let mut state = self.token.state.lock();
        state.lent -= 1;
        if let After::Keep = self.after
            && self.generation == state.generation
            && state.open.is_some()
        {
            state.idle.extend(left.take());
        }
        self.token.returned.notify_one();
        // Closing is a call to the module: not under the lock.
        drop(state);
        match (left, self.after) {
            (Some(s), After::Forget) => std::mem::forget(s),
            (Some(s), _) if self.epoch != *calls => std::mem::forget(s),
            (left, _) => drop(left),
        }
    }
}
