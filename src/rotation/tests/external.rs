//! Rotations whose headers are calls to a key service.

use super::super::rewrap::Leave;
use super::*;
use crate::backing::sim::SimOptions;
use crate::crypto::secret::Secret32;
use crate::format::header::SlotPair;
use crate::kms::guard::lane::Background;
use crate::kms::scripted::{Behaviour, Call, Gate};
use crate::kms::{Description, KmsError, WrapContext};
use parking_lot::Mutex;
use std::time::Duration;

const FILES: usize = 40;

fn external(root: &[Arc<dyn KeyProvider>]) -> Arc<Store<SimDisk>> {
    let disk = SimDisk::new(SimOptions::default());
    Store::init(&disk, root, KekKind::External, StoreFlags::default()).unwrap();
    let keys = Keys::open(&disk, root).unwrap();
    let store = Store::open(disk, keys, StoreOptions::default()).unwrap();
    (0..FILES).for_each(|n| write(&store, &format!("f{n}"), b"content"));
    store
}

fn all_open(store: &Arc<Store<SimDisk>>) {
    store.forget_idle_keys();
    let tree = read_all(store);
    assert!(tree.len() == FILES && tree.values().all(|c| c == b"content"));
}

/// Does something when a sweep begins.
struct AtSweep<F: Fn()>(F, std::sync::atomic::AtomicBool);

impl<F: Fn() + Sync> Progress for AtSweep<F> {
    fn update(&self, s: &Status) {
        if s.state == State::Sweeping && !self.1.swap(true, std::sync::atomic::Ordering::SeqCst) {
            self.0();
        }
    }
}

#[test]
fn one_worker_has_many_calls_under_way() {
    let service = Scripted::new("s");
    let store = external(&roots(&service));
    let before = service.count(Call::Unwrap);
    let gate = Gate::new();
    let hold = AtSweep(|| drop(service.always(Behaviour::Hold(gate.clone())).calls()), false.into());
    let ctx = Context { shared: store.shared(), moves: &*store };
    let report = std::thread::scope(|s| {
        let rotation = s.spawn(|| run(&ctx, &one_job(), &hold, &Control::new()).unwrap());
        gate.wait_for(16);
        service.always(Behaviour::Obey);
        gate.open();
        rotation.join().unwrap()
    });
    assert_eq!((report.outcome, report.sweep.rewrapped), (Outcome::Complete, FILES as u64), "{report:?}");
    // And the staged KEK's proof.
    assert_eq!(service.count(Call::Unwrap) - before, 2 * FILES + 1);
    all_open(&store);
}

/// A service that counts calls against the leave it gave.
struct Rationed(Arc<Scripted>, Mutex<Ration>);

#[derive(Default)]
struct Ration {
    asked: u32,
    left: u32,
    /// From now on calls need leave.
    strict: bool,
}

impl Rationed {
    fn call(&self) {
        let mut r = self.1.lock();
        if r.strict {
            r.left = r.left.checked_sub(1).expect("a call without leave");
        }
    }
}

impl KeyProvider for Rationed {
    fn describe(&self) -> Result<Description, KmsError> {
        self.0.describe()
    }

    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
        self.call();
        self.0.wrap(key, context)
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        self.call();
        self.0.unwrap(wrapped, context)
    }

    /// Every third time.
    fn leave(&self, whose: Background, calls: u32) -> Result<(), Duration> {
        assert_eq!(whose, Background::Rotation);
        let mut r = self.1.lock();
        r.asked += 1;
        if !r.asked.is_multiple_of(3) {
            return Err(Duration::from_micros(10));
        }
        r.left += calls;
        Ok(())
    }
}

#[test]
fn a_rotation_asks_leave_before_its_calls_and_waits_for_it() {
    let service = Arc::new(Rationed(Scripted::new("s"), Mutex::default()));
    let root: [Arc<dyn KeyProvider>; 1] = [service.clone()];
    let store = external(&root);
    let strict = AtSweep(|| service.1.lock().strict = true, false.into());
    let ctx = Context { shared: store.shared(), moves: &*store };
    let report = run(&ctx, &one_job(), &strict, &Control::new()).unwrap();
    assert_eq!((report.outcome, report.failures_total), (Outcome::Complete, 0), "{report:?}");
    let asked = service.1.lock().asked as usize;
    assert!(asked >= 3 * 2 * FILES, "{asked}");
    service.1.lock().strict = false;
    all_open(&store);
}

#[test]
fn a_cancel_ends_the_wait_for_leave() {
    struct Never(Arc<Scripted>);
    impl KeyProvider for Never {
        fn describe(&self) -> Result<Description, KmsError> {
            self.0.describe()
        }
        fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
            self.0.wrap(key, context)
        }
        fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
            self.0.unwrap(wrapped, context)
        }
        fn leave(&self, _: Background, _: u32) -> Result<(), Duration> {
            Err(Duration::from_secs(3600))
        }
    }
    let root: [Arc<dyn KeyProvider>; 1] = [Arc::new(Never(Scripted::new("s")))];
    let store = external(&root);
    let control = Control::new();
    let cancel = AtSweep(|| control.cancel(), false.into());
    let ctx = Context { shared: store.shared(), moves: &*store };
    assert_eq!(run(&ctx, &one_job(), &cancel, &control).unwrap().outcome, Outcome::Cancelled);
    all_open(&store);
}

/// A service that re-wraps from one context to another, and the calls that it gave leave for.
struct Rewraps(Arc<Scripted>, std::sync::atomic::AtomicU32);

impl KeyProvider for Rewraps {
    fn describe(&self) -> Result<Description, KmsError> {
        let mut d = self.0.describe()?;
        (d.capabilities.native_rewrap, d.capabilities.rewraps_contexts) = (true, true);
        Ok(d)
    }
    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
        self.0.wrap(key, context)
    }
    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        self.0.unwrap(wrapped, context)
    }
    fn rewrap(&self, wrapped: &[u8], from: &WrapContext, to: &WrapContext) -> Result<Vec<u8>, KmsError> {
        self.0.rewrap(wrapped, from, to)
    }
    fn leave(&self, _: Background, calls: u32) -> Result<(), Duration> {
        self.1.fetch_add(calls, std::sync::atomic::Ordering::SeqCst);
        Ok(())
    }
}

/// As a crash between the halves leaves one, or a scan that finds a page which never reached the disk.
#[test]
fn leave_is_asked_for_the_unwrap_of_a_header_under_the_target_also_where_the_service_rewraps() {
    let service = Arc::new(Rewraps(Scripted::new("s"), 0.into()));
    let root: [Arc<dyn KeyProvider>; 1] = [service.clone()];
    let store = external(&root);
    let (shared, disk) = (store.shared(), &store.shared().backing);
    let pair = |p: &Vec<u8>| SlotPair::decode(&disk.read_raw(p).ok()?).ok().filter(|pair| pair.authoritative().is_ok());
    let pair = disk.files().iter().find_map(pair).unwrap();
    let asked = |target: KekId| {
        let before = service.1.load(std::sync::atomic::Ordering::SeqCst);
        Leave::default().ask(shared, &shared.keys.kek(target).unwrap(), &pair).unwrap();
        service.1.load(std::sync::atomic::Ordering::SeqCst) - before
    };
    let old = pair.authoritative().unwrap().1.kek;
    assert_eq!(asked(old), 1, "under the target: it is unwrapped");
    let new = shared.keys.stage(disk, KekKind::External, &[]).unwrap();
    shared.keys.activate(disk, new).unwrap();
    assert_eq!(asked(new), 2, "moved by the service: its own call, and the proof");
}

/// Calls of a rotation: wraps, unwraps, re-wraps.
fn rotation_of(service: &Arc<Scripted>, prepare: impl Fn(&Arc<Scripted>)) -> [usize; 3] {
    let root: [Arc<dyn KeyProvider>; 1] = [Arc::new(Rewraps(service.clone(), 0.into()))];
    let store = external(&root);
    prepare(service);
    let calls = || [Call::Wrap, Call::Unwrap, Call::Rewrap].map(|c| service.count(c));
    let before = calls();
    let report = rotate(&store, &one_job()).unwrap();
    assert_eq!((report.outcome, report.sweep.rewrapped), (Outcome::Complete, FILES as u64), "{report:?}");
    let after = calls();
    all_open(&store);
    [0, 1, 2].map(|i| after[i] - before[i])
}

#[test]
fn a_service_that_rewraps_is_called_twice_for_a_header() {
    assert_eq!(rotation_of(&Scripted::new("s"), |_| ()), [1, FILES + 1, FILES]);
}

#[test]
fn a_rewrap_that_lies_or_is_refused_is_made_the_usual_way() {
    let [wraps, unwraps, rewraps] = rotation_of(&Scripted::new("s"), |s| {
        s.then(Call::Rewrap, Behaviour::AnotherKey).then(Call::Rewrap, Behaviour::Garbage);
    });
    assert_eq!((wraps, unwraps, rewraps), (1 + 2, FILES + 1 + 2 * 2, FILES), "each lie is found by its proof");
    let [wraps, unwraps, rewraps] = rotation_of(&Scripted::new("s"), |s| {
        (0..FILES).for_each(|_| {
            s.then(Call::Rewrap, Behaviour::Fail(KmsError::Denied("no permission to re-wrap".into())));
        });
    });
    assert_eq!((wraps, unwraps), (1 + FILES, 1 + 2 * FILES));
    assert!(rewraps <= 16, "not asked for again: {rewraps}");
}
