//! A provider for tests: wraps for real under a key in memory, and misbehaves call by call as a script says.
//!
//! Nothing sleeps: slowness is a [`Gate`] that holds a call until the test opens it.

use super::{Capabilities, Description, KeyProvider, KeyPurpose, KmsError, WrapContext};
use crate::crypto::aead::GcmSiv;
use crate::crypto::random;
use crate::crypto::secret::Secret32;
use parking_lot::{Condvar, Mutex};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// What one call does.
#[derive(Debug, Clone)]
pub enum Behaviour {
    /// What it should.
    Obey,
    /// Waits until the gate is opened, then does what it should.
    Hold(Arc<Gate>),
    /// Fails: denial, outage, throttling, …
    Fail(KmsError),
    /// `unwrap` returns a random other key; `wrap` wraps a random other key. Says that all went well.
    AnotherKey,
    /// `wrap` and `rewrap` return random bytes of the right length; `unwrap` does as `AnotherKey`. Says that all went well.
    Garbage,
    /// Returns this many bytes from `wrap`: 0, or more than fit.
    WrapLength(usize),
    /// Loses its key before the call: nothing wrapped so far opens any more.
    Forget,
}

/// Which call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    Wrap,
    Unwrap,
    Rewrap,
    /// [`KeyProvider::rewrap_due`], which has no context: an empty one is noted.
    Due,
    /// As `Due`.
    Health,
}

/// Holds calls until it is opened.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    waiting: usize,
    open: bool,
}

impl Gate {
    /// A closed gate.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Lets everybody through from now on.
    pub fn open(&self) {
        self.state.lock().open = true;
        self.changed.notify_all();
    }

    /// Returns when `n` calls are being held.
    pub fn wait_for(&self, n: usize) {
        let mut s = self.state.lock();
        while s.waiting < n {
            self.changed.wait(&mut s);
        }
    }

    fn pass(&self) {
        let mut s = self.state.lock();
        s.waiting += 1;
        self.changed.notify_all();
        while !s.open {
            self.changed.wait(&mut s);
        }
        s.waiting -= 1;
    }
}

struct State {
    /// Versions of the key, the oldest first; the last one wraps.
    keys: Vec<Secret32>,
    /// The oldest version that still unwraps.
    oldest: usize,
    script: HashMap<Call, VecDeque<Behaviour>>,
    otherwise: Behaviour,
    about: HashMap<[u8; 16], Behaviour>,
    calls: Vec<(Call, WrapContext)>,
    batches: usize,
    misdeeds: usize,
}

/// The provider. Its URI is `scripted:NAME`. Wrapped form: version u8 ‖ [`GcmSiv::wrap`] (60).
pub struct Scripted {
    uri: String,
    state: Mutex<State>,
    hook: Mutex<Option<Hook>>,
}

/// What [`Scripted::set_hook`] is given.
pub type Hook = Arc<dyn Fn() + Send + Sync>;

impl std::fmt::Debug for Scripted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Scripted({})", self.uri)
    }
}

impl Scripted {
    /// One with a random key that does what it should.
    pub fn new(name: &str) -> Arc<Self> {
        let state = State {
            keys: vec![Secret32::random()],
            oldest: 0,
            script: HashMap::new(),
            otherwise: Behaviour::Obey,
            about: HashMap::new(),
            calls: Vec::new(),
            batches: 0,
            misdeeds: 0,
        };
        Arc::new(Self { uri: format!("scripted:{name}"), state: Mutex::new(state), hook: Mutex::default() })
    }

    /// The next call of this kind that has no behaviour yet gets this one.
    pub fn then(&self, call: Call, behaviour: Behaviour) -> &Self {
        self.state.lock().script.entry(call).or_default().push_back(behaviour);
        self
    }

    /// Every call without a behaviour of its own gets this one from now on; [`Behaviour::Obey`] ends it.
    pub fn always(&self, behaviour: Behaviour) -> &Self {
        self.state.lock().otherwise = behaviour;
        self
    }

    /// Every call about this object (the file of a DEK, a KEK) gets this one from now on, unless the script has one for
    /// it; [`Behaviour::Obey`] ends it.
    pub fn about(&self, object: [u8; 16], behaviour: Behaviour) -> &Self {
        self.state.lock().about.insert(object, behaviour);
        self
    }

    /// Forgets the script and all that it was told, and does what it should.
    pub fn forgive(&self) -> &Self {
        let mut s = self.state.lock();
        s.script.clear();
        s.otherwise = Behaviour::Obey;
        s.about.clear();
        drop(s);
        self
    }

    /// Does what it should while `f` runs, and notes no calls; then goes on with its script. For a test that looks at
    /// what it is testing.
    pub fn truce<R>(&self, f: impl FnOnce() -> R) -> R {
        let mut s = self.state.lock();
        let script = std::mem::take(&mut s.script);
        let otherwise = std::mem::replace(&mut s.otherwise, Behaviour::Obey);
        let about = std::mem::take(&mut s.about);
        let calls = s.calls.len();
        drop(s);
        let r = f();
        let mut s = self.state.lock();
        (s.script, s.otherwise, s.about) = (script, otherwise, about);
        s.calls.truncate(calls);
        drop(s);
        r
    }

    /// From now on `hook` is called before every call is answered, and may make calls of its own.
    pub fn set_hook(&self, hook: Option<Hook>) {
        *self.hook.lock() = hook;
    }

    /// Calls so far that it did not obey.
    pub fn misdeeds(&self) -> usize {
        self.state.lock().misdeeds
    }

    /// No answer from now on, until [`Scripted::always`] says otherwise.
    pub fn outage(&self) -> &Self {
        self.always(Behaviour::Fail(KmsError::Unreachable(self.uri.clone())))
    }

    /// A new version of the root key: what the ones before wrapped still opens, and is due to be wrapped again.
    pub fn advance(&self) -> &Self {
        self.state.lock().keys.push(Secret32::random());
        self
    }

    /// Only the newest version opens anything from now on.
    pub fn retire_old_versions(&self) -> &Self {
        let mut s = self.state.lock();
        s.oldest = s.keys.len() - 1;
        drop(s);
        self
    }

    /// Calls so far, oldest first, those that failed included.
    pub fn calls(&self) -> Vec<(Call, WrapContext)> {
        self.state.lock().calls.clone()
    }

    /// Number of calls of one kind so far.
    pub fn count(&self, call: Call) -> usize {
        self.state.lock().calls.iter().filter(|(c, _)| *c == call).count()
    }

    /// How often it was asked to unwrap many; each of them counts as a call too.
    pub fn batches(&self) -> usize {
        self.state.lock().batches
    }

    /// Takes the call's behaviour from the script, and does the part of it that is the same for all calls.
    fn begin(&self, call: Call, context: &WrapContext) -> Result<Behaviour, KmsError> {
        let hook = self.hook.lock().clone();
        if let Some(hook) = hook {
            hook();
        }
        let behaviour = {
            let mut s = self.state.lock();
            s.calls.push((call, context.clone()));
            let next = s.script.get_mut(&call).and_then(VecDeque::pop_front);
            let next = next.unwrap_or_else(|| s.about.get(&context.object).unwrap_or(&s.otherwise).clone());
            s.misdeeds += usize::from(!matches!(next, Behaviour::Obey | Behaviour::Hold(_)));
            next
        };
        match &behaviour {
            Behaviour::Fail(e) => return Err(e.clone()),
            Behaviour::Hold(gate) => gate.pass(),
            Behaviour::Forget => self.state.lock().keys = vec![Secret32::random()],
            Behaviour::Obey | Behaviour::AnotherKey | Behaviour::Garbage | Behaviour::WrapLength(_) => {}
        }
        Ok(behaviour)
    }
}

impl KeyProvider for Scripted {
    fn describe(&self) -> Result<Description, KmsError> {
        let capabilities = Capabilities { binds_context: true, remote: true, ..Capabilities::default() };
        Ok(Description { uri: self.uri.clone(), key_id: self.uri.clone(), capabilities })
    }

    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
        let behaviour = self.begin(Call::Wrap, context)?;
        Ok(self.state.lock().wrap(&behaviour, key, context))
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        match self.begin(Call::Unwrap, context)? {
            Behaviour::AnotherKey | Behaviour::Garbage => Ok(Secret32::random()),
            _ => self.state.lock().unwrap(wrapped, context).ok_or_else(|| KmsError::BadCiphertext(self.uri.clone())),
        }
    }

    fn unwrap_many(&self, items: &[(&[u8], &WrapContext)]) -> Vec<Result<Secret32, KmsError>> {
        self.state.lock().batches += 1;
        items.iter().map(|(wrapped, context)| self.unwrap(wrapped, context)).collect()
    }

    fn rewrap(&self, wrapped: &[u8], from: &WrapContext, to: &WrapContext) -> Result<Vec<u8>, KmsError> {
        let behaviour = self.begin(Call::Rewrap, to)?;
        let s = self.state.lock();
        let key = s.unwrap(wrapped, from).ok_or_else(|| KmsError::BadCiphertext(self.uri.clone()))?;
        Ok(s.wrap(&behaviour, &key, to))
    }

    fn rewrap_due(&self, wrapped: &[u8]) -> Result<bool, KmsError> {
        self.begin(Call::Due, &no_context())?;
        Ok(wrapped.first().is_some_and(|v| usize::from(*v) + 1 < self.state.lock().keys.len()))
    }

    fn health(&self) -> Result<(), KmsError> {
        self.begin(Call::Health, &no_context()).map(|_| ())
    }
}

fn no_context() -> WrapContext {
    WrapContext { store: [0; 16], purpose: KeyPurpose::Kek, object: [0; 16], extra: Vec::new() }
}

impl State {
    fn wrap(&self, behaviour: &Behaviour, key: &Secret32, context: &WrapContext) -> Vec<u8> {
        let honest = |k: &Secret32| {
            let version = self.keys.len() - 1;
            let sealed = GcmSiv::wrap(&self.keys[version], &context.to_aad(), k);
            [&[version as u8][..], &sealed].concat()
        };
        match behaviour {
            Behaviour::AnotherKey => honest(&Secret32::random()),
            Behaviour::Garbage => random::array::<61>().to_vec(),
            Behaviour::WrapLength(n) => vec![1; *n],
            _ => honest(key),
        }
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Option<Secret32> {
        let (version, sealed) = wrapped.split_first()?;
        let key = self.keys.get(usize::from(*version)).filter(|_| usize::from(*version) >= self.oldest)?;
        GcmSiv::unwrap(key, &context.to_aad(), sealed).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> WrapContext {
        WrapContext { store: [1; 16], purpose: KeyPurpose::Kek, object: [2; 16], extra: vec![3] }
    }

    #[test]
    fn it_obeys_when_nothing_else_is_said() {
        let (s, c) = (Scripted::new("a"), context());
        let key = Secret32::random();
        let w = s.wrap(&key, &c).unwrap();
        assert!(s.unwrap(&w, &c).unwrap().ct_eq(&key));
        for other in [
            WrapContext { store: [9; 16], ..c.clone() },
            WrapContext { purpose: KeyPurpose::Dek, ..c.clone() },
            WrapContext { object: [9; 16], ..c.clone() },
            WrapContext { extra: vec![], ..c.clone() },
        ] {
            assert!(matches!(s.unwrap(&w, &other), Err(KmsError::BadCiphertext(_))));
        }
        assert!(matches!(Scripted::new("a").unwrap(&w, &c), Err(KmsError::BadCiphertext(_))));
        assert_eq!((s.count(Call::Wrap), s.count(Call::Unwrap)), (1, 5));
    }

    #[test]
    fn it_misbehaves_as_it_is_told_and_then_obeys_again() {
        let (s, c) = (Scripted::new("a"), context());
        let key = Secret32::random();
        let w = s.wrap(&key, &c).unwrap();
        let denied = KmsError::Denied("no".into());
        s.then(Call::Unwrap, Behaviour::Fail(denied.clone())).then(Call::Unwrap, Behaviour::AnotherKey);
        assert_eq!(s.unwrap(&w, &c).unwrap_err(), denied);
        assert!(!s.unwrap(&w, &c).unwrap().ct_eq(&key));
        assert!(s.unwrap(&w, &c).unwrap().ct_eq(&key));
        s.then(Call::Wrap, Behaviour::Garbage).then(Call::Wrap, Behaviour::AnotherKey);
        s.then(Call::Wrap, Behaviour::WrapLength(0));
        assert!(s.unwrap(&s.wrap(&key, &c).unwrap(), &c).is_err());
        assert!(!s.unwrap(&s.wrap(&key, &c).unwrap(), &c).unwrap().ct_eq(&key));
        assert!(s.wrap(&key, &c).unwrap().is_empty());
        s.outage();
        assert!(s.unwrap(&w, &c).unwrap_err().is_retryable());
        s.always(Behaviour::Obey).about(c.object, Behaviour::Fail(denied.clone()));
        assert_eq!(s.unwrap(&w, &c).unwrap_err(), denied);
        assert!(s.wrap(&key, &WrapContext { object: [9; 16], ..c.clone() }).is_ok(), "another object");
        s.about(c.object, Behaviour::Obey).then(Call::Unwrap, Behaviour::Forget);
        assert!(s.unwrap(&w, &c).is_err());
        assert!(s.unwrap(&w, &c).is_err(), "what is forgotten stays forgotten");
    }

    #[test]
    fn a_truce_ends_and_forgiveness_does_not() {
        let (s, c) = (Scripted::new("a"), context());
        let key = Secret32::random();
        s.then(Call::Wrap, Behaviour::Garbage).outage();
        let w = s.truce(|| s.wrap(&key, &c)).unwrap();
        assert!(s.truce(|| s.unwrap(&w, &c)).unwrap().ct_eq(&key));
        assert_eq!((s.misdeeds(), s.calls().len()), (0, 0));
        assert!(s.unwrap(&s.wrap(&key, &c).unwrap(), &c).is_err());
        assert_eq!((s.misdeeds(), s.calls().len()), (2, 2));
        s.then(Call::Wrap, Behaviour::Garbage).forgive();
        assert!(s.unwrap(&s.wrap(&key, &c).unwrap(), &c).unwrap().ct_eq(&key));
    }

    #[test]
    fn a_new_version_makes_older_wraps_due() {
        let (s, c) = (Scripted::new("a"), context());
        let key = Secret32::random();
        let old = s.wrap(&key, &c).unwrap();
        assert!(!s.rewrap_due(&old).unwrap());
        assert!(s.advance().rewrap_due(&old).unwrap());
        let new = s.rewrap(&old, &c, &c).unwrap();
        assert!(!s.rewrap_due(&new).unwrap());
        assert!(s.unwrap(&old, &c).unwrap().ct_eq(&key));
        s.retire_old_versions();
        assert!(s.unwrap(&old, &c).is_err());
        assert!(s.unwrap(&new, &c).unwrap().ct_eq(&key));
        s.then(Call::Rewrap, Behaviour::AnotherKey);
        assert!(!s.unwrap(&s.rewrap(&new, &c, &c).unwrap(), &c).unwrap().ct_eq(&key));
        assert_eq!((s.count(Call::Wrap), s.count(Call::Rewrap)), (1, 2));
    }

    #[test]
    fn a_gate_holds_a_call() {
        let (s, c, gate) = (Scripted::new("a"), context(), Gate::new());
        let key = Secret32::random();
        s.then(Call::Wrap, Behaviour::Hold(gate.clone()));
        std::thread::scope(|t| {
            let held = t.spawn(|| s.wrap(&key, &c).unwrap());
            gate.wait_for(1);
            assert!(!held.is_finished());
            gate.open();
            assert!(s.unwrap(&held.join().unwrap(), &c).unwrap().ct_eq(&key));
        });
    }
}
