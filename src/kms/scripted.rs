//! A provider for tests: wraps for real under a key in memory, and misbehaves call by call as a script says.
//!
//! Nothing sleeps: slowness is a [`Gate`] that holds a call until the test opens it.

use super::{Capabilities, Description, KeyProvider, KmsError, WrapContext};
use crate::crypto::aead::GcmSiv;
use crate::crypto::random;
use crate::crypto::secret::Secret32;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
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
    /// `wrap` returns random bytes of the right length; `unwrap` does as `AnotherKey`. Says that all went well.
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
    key: Secret32,
    wraps: VecDeque<Behaviour>,
    unwraps: VecDeque<Behaviour>,
    otherwise: Behaviour,
    calls: Vec<(Call, WrapContext)>,
}

/// The provider. Its URI is `scripted:NAME`.
pub struct Scripted {
    uri: String,
    state: Mutex<State>,
}

impl std::fmt::Debug for Scripted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Scripted({})", self.uri)
    }
}

impl Scripted {
    /// One with a random key that does what it should.
    pub fn new(name: &str) -> Arc<Self> {
        let state = State {
            key: Secret32::random(),
            wraps: VecDeque::new(),
            unwraps: VecDeque::new(),
            otherwise: Behaviour::Obey,
            calls: Vec::new(),
        };
        Arc::new(Self { uri: format!("scripted:{name}"), state: Mutex::new(state) })
    }

    /// The next call of this kind that has no behaviour yet gets this one.
    pub fn then(&self, call: Call, behaviour: Behaviour) -> &Self {
        let mut s = self.state.lock();
        match call {
            Call::Wrap => s.wraps.push_back(behaviour),
            Call::Unwrap => s.unwraps.push_back(behaviour),
        }
        self
    }

    /// Every call without a behaviour of its own gets this one from now on; [`Behaviour::Obey`] ends it.
    pub fn always(&self, behaviour: Behaviour) -> &Self {
        self.state.lock().otherwise = behaviour;
        self
    }

    /// No answer from now on, until [`Scripted::always`] says otherwise.
    pub fn outage(&self) -> &Self {
        self.always(Behaviour::Fail(KmsError::Unreachable(self.uri.clone())))
    }

    /// Calls so far, oldest first, those that failed included.
    pub fn calls(&self) -> Vec<(Call, WrapContext)> {
        self.state.lock().calls.clone()
    }

    /// Number of calls of one kind so far.
    pub fn count(&self, call: Call) -> usize {
        self.state.lock().calls.iter().filter(|(c, _)| *c == call).count()
    }

    /// Takes the call's behaviour from the script, and does the part of it that is the same for all calls.
    fn begin(&self, call: Call, context: &WrapContext) -> Result<Behaviour, KmsError> {
        let behaviour = {
            let mut s = self.state.lock();
            s.calls.push((call, context.clone()));
            let next = match call {
                Call::Wrap => s.wraps.pop_front(),
                Call::Unwrap => s.unwraps.pop_front(),
            };
            next.unwrap_or_else(|| s.otherwise.clone())
        };
        match &behaviour {
            Behaviour::Fail(e) => return Err(e.clone()),
            Behaviour::Hold(gate) => gate.pass(),
            Behaviour::Forget => self.state.lock().key = Secret32::random(),
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
        let s = self.state.lock();
        let honest = |k: &Secret32| GcmSiv::wrap(&s.key, &context.to_aad(), k).to_vec();
        Ok(match behaviour {
            Behaviour::AnotherKey => honest(&Secret32::random()),
            Behaviour::Garbage => random::array::<60>().to_vec(),
            Behaviour::WrapLength(n) => vec![1; n],
            _ => honest(key),
        })
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        match self.begin(Call::Unwrap, context)? {
            Behaviour::AnotherKey | Behaviour::Garbage => Ok(Secret32::random()),
            _ => GcmSiv::unwrap(&self.state.lock().key, &context.to_aad(), wrapped)
                .map_err(|_| KmsError::BadCiphertext(self.uri.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kms::KeyPurpose;

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
        s.always(Behaviour::Obey).then(Call::Unwrap, Behaviour::Forget);
        assert!(s.unwrap(&w, &c).is_err());
        assert!(s.unwrap(&w, &c).is_err(), "what is forgotten stays forgotten");
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
