//! A key service that goes away, refuses, and comes back; keys that are locked and unlocked. On the simulated disk, with
//! a service that does as it is told.

use super::ENCRYPTED;
use crate::backing::sim::{PowerCut, SimDisk, SimOptions};
use crate::backing::{Access, RenameMode};
use crate::crypto::secret::arena_ranges;
use crate::format::damage::Damage;
use crate::kms::scripted::{Behaviour, Call, Gate, Scripted};
use crate::kms::{KeyProvider, KmsError};
use crate::store::file::{FileAllocate, OpenFile};
use crate::store::keys::authority::{Change, Policy};
use crate::store::keys::{KekKind, KeyState, Keys, LockedBy, Phase};
use crate::store::{Node, Store, StoreError, StoreOptions};
use std::sync::Arc;
use std::time::Duration;

type Open = OpenFile<SimDisk>;

/// A refresh is due only when the test makes one.
pub(super) const DAY: Duration = Duration::from_secs(86_400);

pub(super) struct Rig {
    pub(super) disk: SimDisk,
    pub(super) service: Arc<Scripted>,
    pub(super) store: Arc<Store<SimDisk>>,
}

impl Rig {
    pub(super) fn new(kind: KekKind, grace: Duration) -> Self {
        let (disk, service) = (SimDisk::new(SimOptions::default()), Scripted::new("s"));
        Store::init(&disk, &roots(&[&service]), kind, ENCRYPTED).unwrap();
        let store = open(&disk, &[&service]);
        store.shared().keys.supervise(Policy { refresh: DAY, offline_grace: grace });
        Self { disk, service, store }
    }

    pub(super) fn keys(&self) -> &Keys {
        &self.store.shared().keys
    }

    pub(super) fn make(&self, name: &str, content: &[u8]) -> (Arc<Node<SimDisk>>, Open) {
        let (node, _, f) = self.store.create(&self.store.root(), name.as_bytes(), 0o600, 0, None).unwrap();
        f.write(0, content).unwrap();
        (node, f)
    }

    /// A file that nobody has open, and whose DEK is not cached.
    pub(super) fn make_cold(&self, name: &str, content: &[u8]) -> Arc<Node<SimDisk>> {
        let (node, f) = self.make(name, content);
        drop(f);
        self.store.forget_idle_keys();
        node
    }

    pub(super) fn read(&self, n: &Arc<Node<SimDisk>>) -> Result<Vec<u8>, StoreError> {
        all(&self.store.open_file(n, Access::Read)?)
    }

    pub(super) fn lock(&self) {
        self.store.lock_keys(LockedBy::Operator).unwrap();
    }

    pub(super) fn unlock(&self) {
        let done = self.store.unlock_keys(&roots(&[&self.service])).unwrap();
        assert_eq!(done.failed, 0);
    }

    pub(super) fn calls(&self) -> (usize, usize) {
        (self.service.count(Call::Wrap), self.service.count(Call::Unwrap))
    }
}

pub(super) fn roots(s: &[&Arc<Scripted>]) -> Vec<Arc<dyn KeyProvider>> {
    s.iter().map(|p| Arc::clone(p) as Arc<dyn KeyProvider>).collect()
}

fn open(disk: &SimDisk, s: &[&Arc<Scripted>]) -> Arc<Store<SimDisk>> {
    let keys = Keys::open(disk, &roots(s)).unwrap();
    Store::open(disk.clone(), keys, StoreOptions::default()).unwrap()
}

fn all(f: &Open) -> Result<Vec<u8>, StoreError> {
    let mut v = vec![0xee; f.len() as usize];
    let n = f.read(0, &mut v)?;
    assert_eq!(n, v.len());
    Ok(v)
}

#[track_caller]
fn locked<T>(r: Result<T, StoreError>) {
    match r {
        Err(StoreError::KeysLocked) => {}
        Err(e) => panic!("another error: {e}"),
        Ok(_) => panic!("no error"),
    }
}

#[track_caller]
pub(super) fn kms<T>(r: Result<T, StoreError>) -> KmsError {
    match r {
        Err(StoreError::Kms(e)) => e,
        Err(e) => panic!("another error: {e}"),
        Ok(_) => panic!("no error"),
    }
}

pub(super) fn denied() -> Behaviour {
    Behaviour::Fail(KmsError::Denied("no".into()))
}

/// Names and attributes, all of them, without one call to the service.
fn names_go_on(rig: &Rig, n: &Arc<Node<SimDisk>>) {
    let before = rig.calls();
    let root = rig.store.root();
    rig.store.getattr(n).unwrap();
    assert!(!rig.store.read_dir(&root).unwrap().is_empty());
    let d = rig.store.mkdir(&root, b"made", 0o700, 0, None).unwrap().0;
    rig.store.link(n, &d, b"linked").unwrap();
    rig.store.rename(&d, b"linked", &root, b"moved", RenameMode::Replace).unwrap();
    rig.store.unlink(&root, b"moved").unwrap();
    rig.store.symlink(&root, b"link", b"target", None).unwrap();
    rig.store.unlink(&root, b"link").unwrap();
    rig.store.rmdir(&root, b"made").unwrap();
    rig.store.stat_fs().unwrap();
    rig.store.sync_dir(&root).unwrap();
    assert_eq!(rig.calls(), before);
}

#[test]
fn an_outage_changes_nothing_within_the_grace() {
    let rig = Rig::new(KekKind::Sealed, DAY);
    let cold = rig.make_cold("cold", b"cold");
    let (_, held) = rig.make("held", b"held");
    rig.service.outage();
    assert_eq!(rig.keys().ask_service(), Change::WentOffline);
    assert_eq!(rig.keys().standing().state, KeyState::Offline);
    let before = rig.calls();
    assert_eq!(rig.read(&cold).unwrap(), b"cold");
    assert_eq!(rig.read(&cold).unwrap(), b"cold", "its DEK is cached now");
    held.write(4, b" on").unwrap();
    assert_eq!(all(&held).unwrap(), b"held on");
    let (n, f) = rig.make("new", b"new");
    drop(f);
    assert_eq!(rig.read(&n).unwrap(), b"new");
    names_go_on(&rig, &n);
    assert_eq!(rig.calls(), before, "of a sealed KEK the service hears nothing but refreshes");
    assert_eq!(rig.keys().ask_service(), Change::None);
    rig.service.always(Behaviour::Obey);
    assert_eq!(rig.keys().ask_service(), Change::Restored);
    assert_eq!(rig.keys().standing().state, KeyState::Ready);
}

#[test]
fn after_the_grace_open_files_go_on_and_others_stay_closed_until_the_first_success() {
    for e in [KmsError::Unreachable("u".into()), KmsError::Throttled("t".into()), KmsError::Credentials("c".into())] {
        let rig = Rig::new(KekKind::Sealed, Duration::ZERO);
        let cold = rig.make_cold("cold", b"cold");
        let (node, held) = rig.make("held", b"held");
        let (_, _, empty) = rig.store.create(&rig.store.root(), b"empty", 0o600, 0, None).unwrap();
        let cached = rig.make("cached", b"cached").0;
        rig.service.always(Behaviour::Fail(e));
        rig.keys().ask_service();
        for n in [&cold, &cached] {
            assert!(matches!(kms(rig.read(n)), KmsError::Unreachable(_)));
        }
        assert!(matches!(kms(rig.store.create(&rig.store.root(), b"new", 0o600, 0, None)), KmsError::Unreachable(_)));
        assert!(rig.store.lookup(&rig.store.root(), b"new").is_err(), "and none was made");
        // What is open goes on, to its first byte and beyond.
        held.write(4, b" on").unwrap();
        held.set_len(6).unwrap();
        held.allocate(FileAllocate::PunchHole, 0, 1).unwrap();
        empty.write(0, b"first").unwrap();
        held.sync().unwrap();
        assert_eq!((all(&held).unwrap(), all(&empty).unwrap()), (b"\0eld o".to_vec(), b"first".to_vec()));
        names_go_on(&rig, &node);
        rig.service.always(Behaviour::Obey);
        assert_eq!(rig.keys().ask_service(), Change::Restored);
        assert_eq!(rig.read(&cold).unwrap(), b"cold");
        assert_eq!(rig.read(&cached).unwrap(), b"cached");
    }
}

#[test]
fn a_refusal_closes_at_the_next_refresh_and_is_lifted_at_the_one_after_access_is_back() {
    for e in [KmsError::Denied("d".into()), KmsError::Disabled("d".into())] {
        let rig = Rig::new(KekKind::Sealed, DAY);
        let cached = rig.make("cached", b"cached").0;
        let (node, held) = rig.make("held", b"held");
        rig.service.always(Behaviour::Fail(e.clone()));
        assert_eq!(rig.read(&cached).unwrap(), b"cached", "until the refresh nobody knows");
        assert_eq!(rig.keys().ask_service(), Change::Refused);
        rig.store.forget_idle_keys();
        assert_eq!(rig.store.shared().deks.stats().entries, 0);
        assert_eq!(kms(rig.read(&cached)), e);
        assert_eq!(kms(rig.store.open_file(&node, Access::Read)), e, "also of a file that somebody has open");
        assert_eq!(kms(rig.store.create(&rig.store.root(), b"new", 0o600, 0, None)), e);
        held.write(4, b" on").unwrap();
        assert_eq!(all(&held).unwrap(), b"held on");
        names_go_on(&rig, &node);
        // No answer is no taking back.
        rig.service.outage();
        assert_eq!(rig.keys().ask_service(), Change::None);
        assert_eq!(kms(rig.read(&cached)), e);
        assert_eq!(rig.store.shared().deks.stats().entries, 0);
        rig.service.always(Behaviour::Obey);
        assert_eq!(rig.keys().ask_service(), Change::Restored);
        assert_eq!(rig.read(&cached).unwrap(), b"cached");
    }
}

#[test]
fn a_key_that_is_not_found_or_a_wrap_that_does_not_open_is_an_outage_and_changes_nothing() {
    let wrong = [
        Behaviour::Fail(KmsError::NotFound("n".into())),
        Behaviour::Fail(KmsError::BadCiphertext("b".into())),
        Behaviour::AnotherKey,
    ];
    for b in wrong {
        let rig = Rig::new(KekKind::Sealed, DAY);
        let n = rig.make_cold("f", b"content");
        let before = rig.disk.files().iter().map(|p| rig.disk.read_raw(p).unwrap()).collect::<Vec<_>>();
        rig.service.then(Call::Unwrap, b);
        assert_eq!(rig.keys().ask_service(), Change::WentOffline);
        assert_eq!(rig.read(&n).unwrap(), b"content");
        let after = rig.disk.files().iter().map(|p| rig.disk.read_raw(p).unwrap()).collect::<Vec<_>>();
        assert!(before == after, "the disk was changed");
    }
}

#[test]
fn a_second_root_key_speaks_for_the_first_only_while_that_is_silent() {
    let (disk, a, b) = (SimDisk::new(SimOptions::default()), Scripted::new("a"), Scripted::new("b"));
    Store::init(&disk, &roots(&[&a, &b]), KekKind::Sealed, ENCRYPTED).unwrap();
    let store = open(&disk, &[&a, &b]);
    let keys = &store.shared().keys;
    keys.supervise(Policy { refresh: DAY, offline_grace: DAY });
    assert_eq!(b.count(Call::Unwrap), 4, "so far it was only proved, for both copies of the keyring");
    a.outage();
    assert_eq!(keys.ask_service(), Change::None, "the second one says yes");
    assert_eq!(keys.standing().state, KeyState::Ready);
    b.always(denied());
    assert_eq!(keys.ask_service(), Change::Refused, "a refusal outweighs a silence");
    b.always(Behaviour::Obey);
    assert_eq!(keys.ask_service(), Change::Restored);
    b.outage();
    assert_eq!(keys.ask_service(), Change::WentOffline);
    a.always(Behaviour::Obey);
    assert_eq!(keys.ask_service(), Change::Restored);
    a.always(denied());
    b.always(Behaviour::Obey);
    assert_eq!(keys.ask_service(), Change::Refused, "the first one's refusal is not asked about elsewhere");
}

#[test]
fn a_refresh_asks_the_service_itself_and_holds_nobody_up() {
    let rig = Rig::new(KekKind::Sealed, DAY);
    let n = rig.make_cold("f", b"content");
    let (gate, before) = (Gate::new(), rig.calls());
    rig.service.then(Call::Unwrap, Behaviour::Hold(gate.clone()));
    std::thread::scope(|s| {
        let refresh = s.spawn(|| rig.keys().ask_service());
        gate.wait_for(1);
        // It hangs: everything else goes on, also a lock and an unlock.
        assert_eq!(rig.read(&n).unwrap(), b"content");
        rig.make("new", b"new");
        rig.lock();
        locked(rig.read(&n));
        rig.unlock();
        gate.open();
        assert_eq!(refresh.join().unwrap(), Change::None);
    });
    assert_eq!(rig.read(&n).unwrap(), b"content");
    // One for the refresh; the unlock's two are the store secret and the KEK.
    assert_eq!(rig.calls(), (before.0, before.1 + 3));
}

/// What the service said before a lock is no news after the unlock.
#[test]
fn an_answer_from_before_a_lock_does_not_count() {
    let rig = Rig::new(KekKind::Sealed, Duration::ZERO);
    let n = rig.make_cold("f", b"content");
    let gate = Gate::new();
    let other = Scripted::new("other");
    rig.keys().add_root_key(&rig.disk, &roots(&[&other])[0], &crate::store::keys::Confirmation::default()).unwrap();
    std::thread::scope(|s| {
        rig.service.always(Behaviour::Hold(gate.clone()));
        let refresh = s.spawn(|| rig.keys().ask_service());
        gate.wait_for(1);
        rig.lock();
        assert_eq!(rig.store.unlock_keys(&roots(&[&other])).unwrap().failed, 0);
        // The call that hangs ends with a key that nobody wants any more.
        gate.open();
        assert_eq!(refresh.join().unwrap(), Change::None);
    });
    rig.service.always(denied());
    assert_eq!(rig.keys().ask_service(), Change::None, "the one that unlocked is asked");
    assert_eq!(rig.read(&n).unwrap(), b"content");
}

/// Looks for `key`, given with every bit turned, in the whole arena: what is not given out is zeros.
pub(super) fn arena_holds(turned: &[u8; 32]) -> bool {
    arena_ranges().into_iter().any(|(start, len)| {
        (0..len / 32).any(|i| {
            // SAFETY: inside the arena, which is never unmapped; other threads' slots may change meanwhile, and whatever
            // is read of them is only compared.
            let slot = unsafe { std::ptr::read_volatile((start + 32 * i) as *const [u8; 32]) };
            slot.iter().zip(turned).all(|(a, b)| *a == !*b)
        })
    })
}

pub(super) fn turned(key: &[u8; 32]) -> [u8; 32] {
    key.map(|b| !b)
}

#[test]
fn after_a_lock_no_kek_and_no_dek_is_in_memory() {
    let rig = Rig::new(KekKind::Sealed, DAY);
    let (a, held) = rig.make("held", b"held");
    let (_, reader) = (a.clone(), rig.store.open_file(&a, Access::Read).unwrap());
    let cached = rig.make("cached", b"cached").0;
    rig.keys().stage(&rig.disk, KekKind::Sealed, &[]).unwrap();
    let mut deks = Vec::new();
    for path in rig.disk.files() {
        let bytes = rig.disk.read_raw(&path).unwrap();
        let Ok(pair) = crate::format::header::SlotPair::decode(&bytes) else { continue };
        let Ok((_, slot)) = pair.authoritative() else { continue };
        let kek = rig.keys().kek(slot.kek).unwrap();
        deks.push(turned(crate::store::header::unwrap_slot(&kek, slot).unwrap().secret().expose()));
    }
    assert_eq!(deks.len(), 2);
    let keks = rig.keys().keks_for_tests();
    assert_eq!(keks.len(), 4, "two KEKs, each with the key that it wraps with");
    assert!(deks.iter().chain(&keks).all(arena_holds), "the search finds what is there");
    rig.lock();
    assert!(!deks.iter().chain(&keks).any(arena_holds));
    assert_eq!(rig.store.shared().deks.stats().entries, 0);
    locked(all(&held));
    locked(all(&reader));
    rig.unlock();
    assert!(keks.iter().all(arena_holds));
    let back = deks.iter().filter(|d| arena_holds(d)).count();
    assert_eq!(back, 1, "not that of the file that nobody has open");
    assert_eq!(all(&reader).unwrap(), b"held");
    assert_eq!(rig.read(&cached).unwrap(), b"cached");
}

#[test]
fn a_lock_takes_everything_but_names_and_an_unlock_brings_it_back() {
    let rig = Rig::new(KekKind::Sealed, DAY);
    let (node, held) = rig.make("held", &[7; 10_000]);
    let cold = rig.make_cold("cold", b"cold");
    let (empty_node, _, empty) = rig.store.create(&rig.store.root(), b"empty", 0o600, 0, None).unwrap();
    assert_eq!(rig.keys().phase(), Phase::Open);
    rig.lock();
    assert_eq!((rig.keys().phase(), rig.keys().locked_by()), (Phase::Locked, Some(LockedBy::Operator)));
    assert_eq!(rig.keys().standing().state, KeyState::Locked);
    for n in [&node, &cold, &empty_node] {
        locked(rig.read(n));
        locked(rig.store.open_file(n, Access::ReadWrite));
        let cut = crate::store::SetAttr { size: Some(0), ..Default::default() };
        locked(rig.store.setattr(n, &cut, None));
    }
    locked(rig.store.create(&rig.store.root(), b"new", 0o600, 0, None));
    locked(all(&held));
    locked(held.write(0, b"x"));
    locked(held.write(9_999, b"longer"));
    locked(held.set_len(5));
    locked(held.set_len(0));
    locked(held.set_len(10_000));
    locked(held.allocate(FileAllocate::KeepSize, 0, 100_000));
    locked(held.seek(0, true));
    locked(empty.write(0, b"x"));
    locked(empty.allocate(FileAllocate::KeepSize, 0, 100_000));
    held.sync().expect("nothing is dirty");
    rig.store.sync_file(&empty_node, &empty).expect("nothing is dirty");
    assert_eq!(held.len(), 10_000);
    locked(rig.keys().stage(&rig.disk, KekKind::Sealed, &[]));
    locked(rig.keys().add_root_key(
        &rig.disk,
        &roots(&[&Scripted::new("x")])[0],
        &crate::store::keys::Confirmation::default(),
    ));
    names_go_on(&rig, &node);
    // A wrong key, and a service that says nothing, leave it locked.
    let stranger = Scripted::new("s");
    assert!(matches!(rig.store.unlock_keys(&roots(&[&stranger])), Err(StoreError::WrongKey(_))));
    rig.service.outage();
    assert!(rig.store.unlock_keys(&roots(&[&rig.service])).is_err());
    locked(all(&held));
    rig.service.always(Behaviour::Obey);
    rig.unlock();
    assert_eq!(all(&held).unwrap(), [7; 10_000]);
    empty.write(0, b"now").unwrap();
    held.write(0, b"x").unwrap();
    drop((held, empty));
    assert_eq!((rig.read(&cold).unwrap(), rig.read(&empty_node).unwrap()), (b"cold".to_vec(), b"now".to_vec()));
    rig.keys().stage(&rig.disk, KekKind::Sealed, &[]).unwrap();
}

/// Killed, or with the power gone, at any time while locked: everything is as if it had been closed.
#[test]
fn a_crash_while_locked_leaves_every_file_closed() {
    for cut in [false, true] {
        let rig = Rig::new(KekKind::Sealed, DAY);
        let (node, held) = rig.make("held", &[7; 200_000]);
        held.sync().unwrap();
        rig.store.sync_file(&node, &held).unwrap();
        held.write(100_000, &[8; 200_000]).unwrap();
        let (_, other) = rig.make("other", b"unsynced");
        rig.lock();
        rig.store.sync_file(&node, &held).unwrap();
        let disk = if cut { rig.disk.crash_power(1, PowerCut::Lose) } else { rig.disk.crash_process() };
        let store = open(&disk, &[&rig.service]);
        let n = store.lookup(&store.root(), b"held").unwrap().0;
        let f = store.open_file(&n, Access::Read).unwrap();
        assert!(f.core().is_clean().unwrap(), "marked as closed cleanly when the keys went");
        let got = all(&f).unwrap();
        assert!(got[..100_000] == [7; 100_000] && got[100_000..] == [8; 200_000]);
        drop((held, other));
    }
}

#[test]
fn a_file_closed_while_locked_is_clean_and_one_settled_while_locked_loses_nothing() {
    let rig = Rig::new(KekKind::Sealed, DAY);
    let (node, held) = rig.make("f", &[1; 5000]);
    held.sync().unwrap();
    held.write(5000, &[2; 5000]).unwrap();
    rig.lock();
    drop(held);
    rig.store.settle(Duration::ZERO).unwrap();
    rig.unlock();
    let f = rig.store.open_file(&node, Access::ReadWrite).unwrap();
    assert!(f.core().is_clean().unwrap());
    assert_eq!(all(&f).unwrap(), [[1; 5000], [2; 5000]].concat());
    f.write(0, b"on").unwrap();
    assert!(!f.core().is_clean().unwrap(), "the next change says so first");
    // And a store that is locked closes.
    rig.lock();
    rig.store.close().unwrap();
}

/// The disk is not trusted while the keys are away either.
#[test]
fn an_open_file_whose_header_was_exchanged_under_a_lock_does_not_come_back() {
    let rig = Rig::new(KekKind::Sealed, DAY);
    let (_, a) = rig.make("a", &[1; 5000]);
    let (_, b) = rig.make("b", &[2; 5000]);
    rig.store.sync_all().unwrap();
    let files: Vec<_> = rig.disk.files().into_iter().filter(|p| rig.disk.read_raw(p).unwrap().len() > 9000).collect();
    assert_eq!(files.len(), 2);
    rig.lock();
    let images: Vec<_> = files.iter().map(|p| rig.disk.read_raw(p).unwrap()).collect();
    for (p, image) in files.iter().zip(images.iter().rev()) {
        rig.disk.write_raw(p, 0, image).unwrap();
    }
    let done = rig.store.unlock_keys(&roots(&[&rig.service])).unwrap();
    assert_eq!((done.regained, done.failed), (0, 2));
    for f in [&a, &b] {
        assert!(matches!(all(f), Err(StoreError::Damage(Damage::Commitment))));
        assert!(f.write(0, b"x").is_err());
    }
    for (p, image) in files.iter().zip(&images) {
        assert!(rig.disk.read_raw(p).unwrap() != *image, "nothing was put right behind our back");
        rig.disk.write_raw(p, 0, image).unwrap();
    }
    assert_eq!((all(&a).unwrap(), all(&b).unwrap()), (vec![1; 5000], vec![2; 5000]));
}

#[test]
fn a_refusal_that_drops_keys_brings_them_back_by_itself() {
    let rig = Rig::new(KekKind::Sealed, DAY);
    let (node, held) = rig.make("held", b"held");
    rig.service.always(denied());
    rig.keys().ask_service();
    rig.store.lock_keys(LockedBy::Refusal).unwrap();
    assert_eq!(rig.keys().standing().state, KeyState::DeniedLocked);
    locked(all(&held));
    assert!(rig.store.unlock_after_refusal().is_err(), "still refused");
    assert_eq!(rig.keys().ask_service(), Change::None);
    rig.service.always(Behaviour::Obey);
    assert_eq!(rig.keys().ask_service(), Change::Restored);
    assert_eq!(rig.store.unlock_after_refusal().unwrap().regained, 1);
    assert_eq!(all(&held).unwrap(), b"held");
    assert_eq!(rig.read(&node).unwrap(), b"held");
    // One that an operator locks over it waits for the operator.
    rig.service.always(denied());
    rig.keys().ask_service();
    rig.store.lock_keys(LockedBy::Refusal).unwrap();
    rig.lock();
    rig.service.always(Behaviour::Obey);
    let before = rig.calls();
    assert_eq!(rig.keys().ask_service(), Change::None);
    assert_eq!(rig.store.unlock_after_refusal().unwrap().regained, 0);
    assert_eq!(rig.calls(), before, "no root key is there to be asked");
    locked(all(&held));
    rig.unlock();
    assert_eq!(all(&held).unwrap(), b"held");
}

#[test]
fn an_external_kek_costs_one_call_to_make_a_file_and_one_to_open_it_cold() {
    let rig = Rig::new(KekKind::External, DAY);
    let before = rig.calls();
    let (node, f) = rig.make("f", &[1; 300_000]);
    assert_eq!(rig.calls(), (before.0 + 1, before.1), "a create wraps, and is not proved by a second call");
    f.write(5, b"more").unwrap();
    f.sync().unwrap();
    drop(f);
    rig.store.settle(Duration::ZERO).unwrap();
    assert_eq!(rig.calls(), (before.0 + 1, before.1));
    rig.read(&node).unwrap();
    assert_eq!(rig.calls(), (before.0 + 1, before.1), "its DEK is cached");
    rig.store.forget_idle_keys();
    rig.read(&node).unwrap();
    rig.read(&node).unwrap();
    assert_eq!(rig.calls(), (before.0 + 1, before.1 + 1));
    // A rewrap is proved, always: what it overwrites is the wrap that is known to open.
    let bytes =
        rig.disk.files().into_iter().map(|p| rig.disk.read_raw(&p).unwrap()).find(|b| b.len() > 300_000).unwrap();
    let slot = crate::format::header::SlotPair::decode(&bytes).unwrap().authoritative().unwrap().1.clone();
    let kek = rig.keys().kek(slot.kek).unwrap();
    let dek = crate::store::header::unwrap_slot(&kek, &slot).unwrap();
    rig.service.then(Call::Wrap, Behaviour::AnotherKey);
    assert!(crate::store::header::wrap_slot(&kek, &slot, &dek, 2).is_err());
}

#[test]
fn ordinary_calls_of_an_external_kek_tell_of_an_outage_and_of_its_end() {
    let rig = Rig::new(KekKind::External, DAY);
    let (a, b) = (rig.make_cold("a", b"a"), rig.make_cold("b", b"b"));
    rig.service.then(Call::Unwrap, Behaviour::Fail(KmsError::NotFound("this file's".into())));
    assert!(matches!(kms(rig.read(&a)), KmsError::NotFound(_)));
    assert_eq!(rig.keys().standing().state, KeyState::Ready, "that file only");
    rig.service.then(Call::Unwrap, Behaviour::Fail(KmsError::BadCiphertext("this file's".into())));
    assert!(matches!(rig.read(&a), Err(StoreError::Damage(Damage::WrapAuth(_)))));
    assert_eq!(rig.keys().standing().state, KeyState::Ready, "that file only");
    rig.service.then(Call::Unwrap, Behaviour::Fail(KmsError::Unreachable("gone".into())));
    assert!(matches!(kms(rig.read(&a)), KmsError::Unreachable(_)));
    assert_eq!(rig.keys().standing().state, KeyState::Offline);
    assert!(rig.keys().refresh_is_due(), "it is asked about at once");
    assert_eq!(rig.read(&b).unwrap(), b"b", "within the grace it is tried");
    assert_eq!(rig.keys().standing().state, KeyState::Ready);
    // Without an answer no file can be made: nobody would hear that its first write failed.
    rig.service.then(Call::Unwrap, Behaviour::Fail(KmsError::Unreachable("gone".into())));
    rig.store.forget_idle_keys();
    assert!(rig.read(&a).is_err());
    let root = rig.store.root();
    assert!(matches!(kms(rig.store.create(&root, b"new", 0o600, 0, None)), KmsError::Unreachable(_)));
    let (empty, _) = rig.store.mknod(&root, b"empty", crate::backing::Kind::File, 0o600, 0, 0, None).unwrap();
    assert!(matches!(kms(rig.store.open_file(&empty, Access::ReadWrite)), KmsError::Unreachable(_)));
    rig.store.open_file(&empty, Access::Read).unwrap();
    assert!(rig.keys().refresh_is_due());
    assert_eq!(rig.keys().ask_service(), Change::Restored);
    drop(rig.make("new", b"new"));
    rig.service.then(Call::Unwrap, denied());
    assert!(matches!(kms(rig.read(&a)), KmsError::Denied(_)));
    assert_eq!(rig.keys().standing().state, KeyState::Ready);
    assert!(rig.keys().refresh_is_due());
    rig.service.always(denied());
    assert_eq!(rig.keys().ask_service(), Change::Refused);
    let before = rig.calls();
    assert!(matches!(kms(rig.read(&a)), KmsError::Denied(_)));
    assert_eq!(rig.calls(), before, "nobody is asked any more but by refreshes");
}

/// Locks and unlocks among readers, writers, creators, closers and settlers: every error is the lock's, no content is
/// wrong, and it ends.
#[test]
fn locking_among_threads_is_orderly() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let rig = Rig::new(KekKind::Sealed, DAY);
    let files: Vec<_> = (0..4u8).map(|i| rig.make(&i.to_string(), &[i; 20_000]).0).collect();
    let stop = AtomicBool::new(false);
    let fine = |r: Result<(), StoreError>| match r {
        Ok(()) | Err(StoreError::KeysLocked) => {}
        Err(e) => panic!("{e}"),
    };
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|s| {
        let _stop = Stop(&stop);
        for (i, n) in files.iter().enumerate() {
            let (rig, stop, fine) = (&rig, &stop, &fine);
            s.spawn(move || {
                let write = |f: &Open, at: u64| f.write(at, &[i as u8; 3000]).map(drop);
                let mut f = None;
                let mut round = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    round += 1;
                    if f.is_none() || round.is_multiple_of(5) {
                        f = match rig.store.open_file(n, Access::ReadWrite) {
                            Ok(f) => Some(f),
                            Err(e) => {
                                fine(Err(e));
                                None
                            }
                        };
                    }
                    let Some(f) = &f else { continue };
                    fine(write(f, round % 17 * 1000));
                    fine(all(f).map(|v| assert!(v.iter().all(|b| *b == i as u8))));
                    fine(f.sync());
                    let name = format!("new {i}");
                    match rig.store.create(&rig.store.root(), name.as_bytes(), 0o600, 0, None) {
                        Ok((_, _, new)) => {
                            fine(write(&new, 0));
                            drop(new);
                            rig.store.unlink(&rig.store.root(), name.as_bytes()).unwrap();
                        }
                        Err(e) => fine(Err(e)),
                    }
                    if round.is_multiple_of(3) {
                        rig.store.settle(Duration::ZERO).unwrap();
                    }
                }
            });
        }
        for _ in 0..100 {
            rig.lock();
            locked(rig.read(&files[0]));
            assert_eq!(rig.store.shared().deks.stats().entries, 0);
            rig.unlock();
        }
    });
    for (i, n) in files.iter().enumerate() {
        assert!(rig.read(n).unwrap().iter().all(|b| *b == i as u8));
    }
}

#[test]
fn a_store_opened_read_only_is_locked_and_unlocked_without_a_write() {
    let rig = Rig::new(KekKind::Sealed, DAY);
    let (_, f) = rig.make("f", &[5; 10_000]);
    rig.store.sync_all().unwrap();
    // As a killed daemon left it: not closed cleanly.
    let disk = rig.disk.crash_process();
    drop(f);
    let keys = Keys::open(&disk, &roots(&[&rig.service])).unwrap();
    let store = Store::open(disk.clone(), keys, StoreOptions { read_only: true, ..Default::default() }).unwrap();
    let n = store.lookup(&store.root(), b"f").unwrap().0;
    let f = store.open_file(&n, Access::Read).unwrap();
    assert_eq!(all(&f).unwrap(), [5; 10_000]);
    assert!(store.open_may_wait() && !rig.store.open_may_wait(), "for a KEK that somebody else has made");
    store.lock_keys(LockedBy::Operator).unwrap();
    locked(all(&f));
    assert_eq!(store.unlock_keys(&roots(&[&rig.service])).unwrap().regained, 1);
    assert_eq!(all(&f).unwrap(), [5; 10_000]);
}

/// A lock does not wait for a disk that fails: the keys go, and the file is found as after a crash.
#[test]
fn a_lock_on_a_failing_disk_drops_the_keys_and_loses_nothing() {
    use crate::backing::sim::Op;
    for op in [Op::Truncate, Op::Write, Op::SyncFile] {
        let rig = Rig::new(KekKind::Sealed, DAY);
        let (node, f) = rig.make("f", &[5; 200_000]);
        rig.store.sync_file(&node, &f).unwrap();
        f.write(150_000, &[6; 100_000]).unwrap();
        rig.disk.fail_from(Some(op), 0, libc::EIO);
        let cut = f.set_len(100_100);
        rig.lock();
        locked(all(&f));
        rig.disk.clear_faults();
        rig.unlock();
        let got = all(&f).unwrap();
        let mut whole = vec![5; 150_000];
        whole.resize(250_000, 6);
        let shrunk = got.len() == 100_100;
        assert!(shrunk || got.len() == 250_000, "{op:?}: {}", got.len());
        assert!(cut.is_err() || shrunk, "{op:?}");
        assert!(got == whole[..got.len()], "{op:?}");
        f.write(0, b"on").unwrap();
        assert_eq!(&all(&f).unwrap()[..2], b"on");
        drop(f);
        rig.store.settle(Duration::ZERO).unwrap();
        assert_eq!(&rig.read(&node).unwrap()[..2], b"on");
    }
}

#[test]
fn the_observer_hears_of_a_service_that_goes_and_comes_back() {
    use crate::kms::event::{self, Observer, StoreChange};
    #[derive(Default)]
    struct Heard(parking_lot::Mutex<Vec<StoreChange>>);
    impl Observer for Heard {
        fn call(&self, _: &event::Call<'_>) {}
        fn change(&self, c: &event::Change<'_>) {
            if let event::Change::Store { change, .. } = c {
                self.0.lock().push(*change);
            }
        }
    }
    let rig = Rig::new(KekKind::External, DAY);
    let heard = Arc::new(Heard::default());
    rig.keys().set_observer(heard.clone());
    let n = rig.make_cold("f", b"f");
    rig.service.then(Call::Unwrap, Behaviour::Fail(KmsError::Unreachable("gone".into())));
    assert!(rig.read(&n).is_err());
    rig.read(&n).unwrap();
    rig.service.always(denied());
    rig.keys().ask_service();
    rig.keys().ask_service();
    rig.service.always(Behaviour::Obey);
    rig.keys().ask_service();
    let want = [StoreChange::Offline, StoreChange::Online, StoreChange::Denied, StoreChange::Online];
    assert_eq!(*heard.0.lock(), want);
}
