//! What an observer is told of files' keys.

use super::super::keys::{Confirmation, KekKind, Keys, StoreFlags};
use super::super::{Node, Store, StoreError, StoreOptions};
use crate::backing::Access;
use crate::backing::sim::{SimDisk, SimOptions};
use crate::crypto::secret::Secret32;
use crate::kms::event::{Call, Caller, Change, DekUse, KekChange, Observer, Operation, note_request_id, on_behalf_of};
use crate::kms::scripted::{self, Behaviour, Scripted};
use crate::kms::{Description, KeyProvider, KmsError, WrapContext};
use crate::store::dek_cache::DekCacheLimits;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A service that numbers its requests.
struct Numbered(Arc<Scripted>, AtomicU32);

impl Numbered {
    fn note(&self) {
        note_request_id(format!("r{}", self.1.fetch_add(1, Ordering::SeqCst)));
    }
}

impl KeyProvider for Numbered {
    fn describe(&self) -> Result<Description, KmsError> {
        self.0.describe()
    }

    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
        self.note();
        self.0.wrap(key, context)
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        self.note();
        self.0.unwrap(wrapped, context)
    }
}

type Told = (Operation, String, bool, Result<(), String>, Option<Caller>);

#[derive(Default)]
struct Heard {
    deks: Mutex<Vec<Told>>,
    changes: Mutex<Vec<String>>,
    refuse: Mutex<Option<KmsError>>,
}

impl Observer for Heard {
    fn call(&self, _: &Call<'_>) {}

    fn dek(&self, u: &DekUse<'_>) {
        let result = u.result.map_err(str::to_owned);
        let told = (u.operation, u.provider.to_owned(), u.request_id.is_some(), result, u.caller);
        self.deks.lock().push(told);
    }

    fn change(&self, c: &Change<'_>) {
        self.changes.lock().push(match c {
            Change::Kek { change, .. } => change.as_str().to_owned(),
            Change::RootKey { uri, added, .. } => format!("{uri} {added}"),
            other => format!("{other:?}"),
        });
    }

    fn permit(&self) -> Result<(), KmsError> {
        self.refuse.lock().clone().map_or(Ok(()), Err)
    }
}

struct Bench {
    service: Arc<Scripted>,
    store: Arc<Store<SimDisk>>,
    heard: Arc<Heard>,
}

/// Keeps no DEK in memory beyond an open file.
fn bench(kind: KekKind) -> Bench {
    let (disk, service) = (SimDisk::new(SimOptions::default()), Scripted::new("s"));
    let root: [Arc<dyn KeyProvider>; 1] = [Arc::new(Numbered(service.clone(), AtomicU32::new(0)))];
    Store::init(&disk, &root, kind, StoreFlags::default()).unwrap();
    let keys = Keys::open(&disk, &root).unwrap();
    let heard = Arc::new(Heard::default());
    keys.set_observer(heard.clone());
    let deks = DekCacheLimits { entries: 0, ..DekCacheLimits::default() };
    let store = Store::open(disk, keys, StoreOptions { deks, ..StoreOptions::default() }).unwrap();
    Bench { service, store, heard }
}

impl Bench {
    fn make(&self, name: &[u8]) -> Arc<Node<SimDisk>> {
        let (node, _, f) = self.store.create(&self.store.root(), name, 0o600, 0, None).unwrap();
        f.write(0, b"x").unwrap();
        node
    }

    fn open(&self, node: &Arc<Node<SimDisk>>) -> Result<(), StoreError> {
        self.store.open_file(node, Access::Read).map(drop)
    }

    fn told(&self) -> Vec<Told> {
        std::mem::take(&mut self.heard.deks.lock())
    }
}

#[test]
fn each_use_of_a_key_is_told_once_with_its_caller() {
    let who = Caller { pid: 5, uid: 6 };
    for (kind, provider, asks) in [(KekKind::Sealed, "sealed", false), (KekKind::External, "scripted:s", true)] {
        let b = bench(kind);
        let node = on_behalf_of(who, || b.make(b"f"));
        assert_eq!(b.told(), [(Operation::Wrap, provider.to_owned(), asks, Ok(()), Some(who))]);
        b.open(&node).unwrap();
        assert_eq!(b.told(), [(Operation::Unwrap, provider.to_owned(), asks, Ok(()), None)]);
        // While a handle is open, its key is not unwrapped again.
        let held = b.store.open_file(&node, Access::Read).unwrap();
        b.open(&node).unwrap();
        assert_eq!(b.told().len(), 1);
        drop(held);
        b.store.rename(&b.store.root(), b"f", &b.store.root(), b"g", crate::backing::RenameMode::Replace).unwrap();
        b.store.getattr(&node).unwrap();
        assert_eq!(b.told(), []);
    }
}

#[test]
fn what_a_service_refuses_is_told_with_its_code() {
    let b = bench(KekKind::External);
    let node = b.make(b"f");
    b.told();
    b.service.then(scripted::Call::Unwrap, Behaviour::Fail(KmsError::Denied("no".into())));
    assert!(b.open(&node).is_err());
    assert!(matches!(b.told().as_slice(), [(Operation::Unwrap, _, true, Err(code), None)] if code == "kms-denied"));
}

#[test]
fn without_a_permit_no_key_is_used_and_nothing_is_lost() {
    for kind in [KekKind::Sealed, KekKind::External] {
        let b = bench(kind);
        let node = b.make(b"f");
        let (_, _, new) = b.store.create(&b.store.root(), b"new", 0o600, 0, None).unwrap();
        let calls = b.service.calls().len();
        b.told();
        *b.heard.refuse.lock() = Some(KmsError::Unreachable("the log is full".into()));
        assert!(matches!(b.open(&node), Err(StoreError::Kms(KmsError::Unreachable(_)))));
        assert!(matches!(new.write(0, b"x"), Err(StoreError::Kms(KmsError::Unreachable(_)))));
        assert_eq!((b.told(), b.service.calls().len()), (vec![], calls));
        *b.heard.refuse.lock() = None;
        b.open(&node).unwrap();
        new.write(0, b"x").unwrap();
    }
}

#[test]
fn changes_of_keys_are_told_after_they_were_made() {
    let b = bench(KekKind::Sealed);
    let (keys, disk) = (&b.store.shared().keys, &b.store.shared().backing);
    let old = keys.with_active(|k| k.id());
    let second: Arc<dyn KeyProvider> = Scripted::new("t");
    let new = keys.stage(disk, KekKind::Sealed, std::slice::from_ref(&second)).unwrap();
    keys.discard_pending(disk, new).unwrap();
    let new = keys.stage(disk, KekKind::Sealed, &[]).unwrap();
    keys.activate(disk, new).unwrap();
    keys.activate(disk, new).unwrap();
    for _ in 0..2 {
        keys.retire(disk, old).unwrap();
    }
    for _ in 0..2 {
        keys.destroy(disk, old, &Confirmation::default()).unwrap();
    }
    assert!(keys.discard_pending(disk, new).is_err());
    let root = keys.snapshot().roots.iter().find(|r| r.uri == "scripted:t").unwrap().id;
    keys.remove_root_key(disk, root).unwrap();
    keys.add_root_key(disk, &second, &Confirmation::default()).unwrap();
    let expected = [
        "scripted:t true",
        KekChange::Created.as_str(),
        "discarded",
        "created",
        "retired",
        "activated",
        "unused",
        "destroyed",
        "scripted:t false",
        "scripted:t true",
    ];
    assert_eq!(*b.heard.changes.lock(), expected);
}
