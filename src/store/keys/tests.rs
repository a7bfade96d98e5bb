//! The keyring at work: over a simulated disk that stops at every operation, and under providers that fail and lie.

mod ending;
mod errors;
mod recovery;
mod refresh;
mod renew;
mod transfer;

use super::*;
use crate::backing::sim::{PowerCut, SimDisk};
use crate::crypto::secret::Dek;
use crate::format::ids::FileId;
use crate::kms::KmsError;
use crate::kms::scripted::{Behaviour, Call, Gate, Scripted};
use std::sync::atomic::{AtomicBool, Ordering};

const AAD: &[u8] = b"slot prefix";
const FILE: FileId = FileId([7; 16]);

fn dynamic(s: &[&Arc<Scripted>]) -> Vec<Arc<dyn KeyProvider>> {
    s.iter().map(|p| Arc::clone(p) as Arc<dyn KeyProvider>).collect()
}

fn make(disk: &SimDisk, s: &[&Arc<Scripted>]) -> Keys {
    Keys::create(disk, &dynamic(s), KekKind::Sealed, StoreFlags::default()).unwrap()
}

fn fresh() -> (SimDisk, Arc<Scripted>, Keys) {
    let (disk, s) = (SimDisk::default(), Scripted::new("a"));
    let keys = make(&disk, &[&s]);
    (disk, s, keys)
}

fn open(disk: &SimDisk, s: &[&Arc<Scripted>]) -> Result<Keys> {
    Keys::open(disk, &dynamic(s))
}

fn raw(disk: &SimDisk) -> [Vec<u8>; 2] {
    COPIES.map(|c| disk.read_raw(format!(".envelopefs/{c}")).unwrap())
}

/// The keyring without what counts updates.
fn content(k: &Keyring) -> Keyring {
    Keyring { generation: 0, ..k.clone() }
}

fn active_id(k: &Keys) -> KekId {
    k.with_active(KekHandle::id)
}

fn holds(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}

/// Stages a KEK, makes it active and says that the one before is unused.
fn rotate(disk: &SimDisk, keys: &Keys) -> (KekId, KekId) {
    let old = active_id(keys);
    let new = keys.stage(disk, KekKind::Sealed, &[]).unwrap();
    keys.activate(disk, new).unwrap();
    keys.retire(disk, old).unwrap();
    (old, new)
}

#[test]
fn a_store_opens_again_with_all_it_had() {
    let (disk, s) = (SimDisk::default(), Scripted::new("a"));
    let flags = StoreFlags { plaintext_names: true };
    let keys = Keys::create(&disk, &dynamic(&[&s]), KekKind::Sealed, flags).unwrap();
    let dek = Dek::random();
    let wrapped = keys.with_active(|k| k.wrap(AAD, FILE, &dek)).unwrap();
    assert_eq!(wrapped.len(), 60);
    let again = open(&disk, &[&s]).unwrap();
    assert_eq!(again.snapshot(), keys.snapshot());
    assert_eq!((again.store_id(), again.flags()), (keys.store_id(), flags));
    assert!(again.secret().secret().ct_eq(keys.secret().secret()));
    assert!(again.damaged_copies().is_empty());
    let kek = again.kek(active_id(&keys)).unwrap();
    assert_eq!((kek.kind(), kek.wrap_suite()), (KekKind::Sealed, WRAP_SEALED));
    assert!(kek.unwrap(AAD, FILE, &wrapped).unwrap().secret().ct_eq(dek.secret()));
    let auth = Damage::WrapAuth(kek.id());
    assert!(matches!(kek.unwrap(b"other", FILE, &wrapped), Err(StoreError::Damage(d)) if d == auth));
    assert!(matches!(kek.unwrap(AAD, FILE, &wrapped[1..]), Err(StoreError::Damage(d)) if d == auth));
    assert!(matches!(again.kek(KekId([1; 16])), Err(StoreError::Damage(Damage::KekUnknown(_)))));
    let [a, b] = raw(&disk);
    assert_eq!(a, b, "both copies hold the same");
    for secret in [keys.secret().secret(), kek.key(), dek.secret()] {
        assert!(!holds(&a, secret.expose()));
    }
    assert_eq!(Keys::read_keyring(&disk).unwrap(), keys.snapshot());
    assert_eq!(disk.files().len(), 2, "no temporary file is left");
}

#[test]
fn all_keks_of_a_store_are_asked_for_at_once() {
    let (disk, s, keys) = fresh();
    let old: Vec<KekId> = (0..12).map(|_| rotate(&disk, &keys).0).collect();
    drop(keys);
    let before = s.count(Call::Unwrap);
    let again = open(&disk, &[&s]).unwrap();
    assert_eq!(s.batches(), 1);
    assert_eq!(s.count(Call::Unwrap) - before, 14, "13 KEKs and the store secret");
    for id in old {
        assert_eq!(again.kek(id).unwrap().id(), id);
    }
}

#[test]
fn a_kek_that_one_root_key_does_not_open_the_next_one_does() {
    let (disk, a, b) = (SimDisk::default(), Scripted::new("a"), Scripted::new("b"));
    let keys = make(&disk, &[&a, &b]);
    let (old, new) = rotate(&disk, &keys);
    // The store secret opens with a. The first of the KEKs does not, neither before b is connected to nor after.
    let denied = || Behaviour::Fail(KmsError::Denied("d".into()));
    let order: Vec<KekId> = keys.snapshot().keks.iter().map(|k| k.id).collect();
    assert_eq!(order, [old, new]);
    for behaviour in [Behaviour::Obey, denied(), Behaviour::Obey, denied(), Behaviour::Obey] {
        a.then(Call::Unwrap, behaviour);
    }
    let (asked_a, asked_b) = (a.batches(), b.batches());
    let again = open(&disk, &[&a, &b]).unwrap();
    assert!(again.kek(old).is_ok() && again.kek(new).is_ok());
    assert_eq!((a.batches() - asked_a, b.batches() - asked_b), (2, 1));
    // b was asked for the store secret and for the one KEK that was left.
    assert_eq!(b.calls().last().unwrap(), &(Call::Unwrap, roots::Object::Kek(old).context(again.store_id())));
    // If neither opens it, the last one's reason is told, and the rest of the store is there.
    for behaviour in [Behaviour::Obey, denied(), Behaviour::Obey] {
        a.then(Call::Unwrap, behaviour);
    }
    let again = open(&disk, &[&a]).unwrap();
    assert!(matches!(again.kek(old), Err(StoreError::Kms(KmsError::Denied(_)))));
    assert!(again.kek(new).is_ok());
}

#[test]
fn what_is_no_store_is_told_from_what_is_one() {
    let disk = SimDisk::default();
    let s = Scripted::new("a");
    assert!(matches!(open(&disk, &[&s]), Err(StoreError::NotAStore(_))));
    assert!(matches!(Keys::read_keyring(&disk), Err(StoreError::NotAStore(_))));
    let none = Keys::create(&disk, &[], KekKind::Sealed, StoreFlags::default());
    assert!(matches!(none, Err(StoreError::KeyState(_))));
    let keys = make(&disk, &[&s]);
    let again = Keys::create(&disk, &dynamic(&[&s]), KekKind::Sealed, StoreFlags::default());
    assert!(matches!(again, Err(StoreError::NotEmptyForInit(_))));
    assert_eq!(open(&disk, &[&s]).unwrap().store_id(), keys.store_id(), "and it was left as it was");
}

#[test]
fn a_wrong_key_is_told_from_one_that_does_not_answer() {
    let (disk, a, b) = (SimDisk::default(), Scripted::new("a"), Scripted::new("b"));
    make(&disk, &[&a, &b]);
    let stranger = Scripted::new("a");
    assert!(matches!(open(&disk, &[&stranger]), Err(StoreError::WrongKey(_))));
    assert!(matches!(open(&disk, &[]), Err(StoreError::WrongKey(_))));
    a.outage();
    assert!(matches!(open(&disk, &[&a]), Err(StoreError::Kms(KmsError::Unreachable(_)))));
    assert!(matches!(open(&disk, &[&stranger, &a]), Err(StoreError::Kms(KmsError::Unreachable(_)))));
    for e in [KmsError::Denied("d".into()), KmsError::Disabled("d".into()), KmsError::Throttled("t".into())] {
        a.always(Behaviour::Fail(e.clone()));
        assert!(matches!(open(&disk, &[&a]), Err(StoreError::Kms(x)) if x == e));
    }
    // Any one root key opens the store, whatever the others do.
    assert!(open(&disk, &[&a, &stranger, &b]).is_ok());
}

#[test]
fn one_damaged_copy_is_replaced_by_the_other_and_reported() {
    for (which, name) in COPIES.into_iter().enumerate() {
        let (disk, s, keys) = fresh();
        let path = format!(".envelopefs/{name}");
        let good = raw(&disk);
        let damage: [&dyn Fn(); 4] = [
            &|| disk.flip_bit(&path, 60, 3).unwrap(),
            &|| disk.truncate_raw(&path, 100).unwrap(),
            &|| disk.truncate_raw(&path, 0).unwrap(),
            &|| disk.write_raw(&path, good[which].len() as u64, b"more").unwrap(),
        ];
        for f in damage {
            f();
            let again = open(&disk, &[&s]).unwrap();
            assert_eq!(again.snapshot(), keys.snapshot());
            assert_eq!(again.damaged_copies(), [(name, Damage::KeyringUnreadable)]);
            assert!(again.repair_copies(&disk).unwrap());
            assert!(!again.repair_copies(&disk).unwrap());
            assert!(open(&disk, &[&s]).unwrap().damaged_copies().is_empty());
            COPIES.iter().zip(&good).for_each(|(c, g)| disk.replace_raw(format!(".envelopefs/{c}"), g).unwrap());
        }
    }
}

#[test]
fn both_copies_damaged_is_damage_and_never_an_empty_store() {
    let (disk, s, _) = fresh();
    COPIES.iter().for_each(|c| disk.flip_bit(format!(".envelopefs/{c}"), 60, 3).unwrap());
    assert!(matches!(open(&disk, &[&s]), Err(StoreError::Damage(Damage::KeyringUnreadable))));
    assert!(matches!(Keys::read_keyring(&disk), Err(StoreError::Damage(Damage::KeyringUnreadable))));
    let over = Keys::create(&disk, &dynamic(&[&s]), KekKind::Sealed, StoreFlags::default());
    assert!(matches!(over, Err(StoreError::NotEmptyForInit(_))));
}

#[test]
fn an_io_error_with_one_copy_is_survived_with_both_it_is_passed_on() {
    use crate::backing::sim::Op;
    let (disk, s, keys) = fresh();
    disk.fail_next(Some(Op::Read), 0, libc::EIO);
    assert_eq!(open(&disk, &[&s]).unwrap().snapshot(), keys.snapshot());
    disk.clear_faults();
    disk.fail_from(Some(Op::Read), 0, libc::EIO);
    assert!(matches!(open(&disk, &[&s]), Err(StoreError::Backing(e)) if e.raw_os_error() == Some(libc::EIO)));
}

#[test]
fn a_forged_copy_does_not_count_however_high_its_generation() {
    let (disk, s, keys) = fresh();
    let forged = Keyring { generation: u64::MAX, ..keys.snapshot() }.encode(|_| [0; 32]).unwrap();
    disk.replace_raw(".envelopefs/keyring.b", &forged).unwrap();
    let again = open(&disk, &[&s]).unwrap();
    assert_eq!(again.snapshot(), keys.snapshot());
    assert_eq!(again.damaged_copies().len(), 1);
    rotate(&disk, &again);
    assert!(open(&disk, &[&s]).unwrap().damaged_copies().is_empty());
    disk.replace_raw(".envelopefs/keyring.a", &forged).unwrap();
    disk.replace_raw(".envelopefs/keyring.b", &forged).unwrap();
    assert!(matches!(open(&disk, &[&s]), Err(StoreError::Damage(Damage::KeyringMac))));
}

#[test]
fn a_newer_programs_keyring_is_refused_even_next_to_an_old_copy() {
    let (disk, s, _) = fresh();
    let [mut b, _] = raw(&disk);
    let n = b.len() - 4;
    b[8] = 2;
    let crc = crc32c::crc32c(&b[..n]).to_le_bytes();
    b[n..].copy_from_slice(&crc);
    disk.replace_raw(".envelopefs/keyring.b", &b).unwrap();
    assert!(matches!(open(&disk, &[&s]), Err(StoreError::Damage(Damage::UnsupportedVersion(2)))));
}

#[test]
fn an_unknown_read_only_feature_lets_read_and_forbids_change() {
    let (disk, s, keys) = fresh();
    let newer = Keyring { ro_compat: 4, ..keys.snapshot() }.encode(|b| roots::keyring_mac(keys.secret(), b)).unwrap();
    COPIES.iter().for_each(|c| disk.replace_raw(format!(".envelopefs/{c}"), &newer).unwrap());
    let again = open(&disk, &[&s]).unwrap();
    assert!(matches!(again.stage(&disk, KekKind::Sealed, &[]), Err(StoreError::KeyState(_))));
    assert_eq!(raw(&disk), [newer.clone(), newer]);
}

#[test]
fn the_life_of_a_kek() {
    let (disk, s, keys) = fresh();
    let (old, dek) = (active_id(&keys), Dek::random());
    let under_old = keys.with_active(|k| k.wrap(AAD, FILE, &dek)).unwrap();
    let state = |id| keys.snapshot().kek(id).unwrap().state;
    let refused = |r: Result<()>| assert!(matches!(r, Err(StoreError::KeyState(_))), "{r:?}");

    let new = keys.stage(&disk, KekKind::Sealed, &[]).unwrap();
    assert_eq!((state(old), state(new)), (KekState::Active, KekState::Pending));
    assert!(matches!(keys.kek(new), Err(StoreError::KeyState(_))), "nothing is wrapped under a pending KEK");
    assert!(matches!(keys.stage(&disk, KekKind::Sealed, &[]), Err(StoreError::KeyState(_))));
    refused(keys.destroy(&disk, old, &Confirmation::default()));
    refused(keys.retire(&disk, old));
    refused(keys.destroy(&disk, new, &Confirmation::default()));
    refused(keys.retire(&disk, new));

    let held = keys.kek(old).unwrap();
    keys.activate(&disk, new).unwrap();
    keys.activate(&disk, new).unwrap();
    assert_eq!((state(old), state(new), active_id(&keys)), (KekState::Retired, KekState::Active, new));
    assert!(held.unwrap(AAD, FILE, &under_old).unwrap().secret().ct_eq(dek.secret()), "a retired KEK unwraps");
    assert!(matches!(held.wrap(AAD, FILE, &dek), Err(StoreError::KeyState(_))), "and does not wrap");
    assert!(keys.with_active(|k| k.wrap(AAD, FILE, &dek)).is_ok());
    assert!(keys.snapshot().kek(old).unwrap().is_needed());
    refused(keys.activate(&disk, old));
    refused(keys.discard_pending(&disk, new));
    refused(keys.destroy(&disk, old, &Confirmation::default()));

    keys.retire(&disk, old).unwrap();
    keys.retire(&disk, old).unwrap();
    assert!(!keys.snapshot().kek(old).unwrap().is_needed());
    let wraps = keys.snapshot().kek(old).unwrap().wraps.clone();
    assert!(raw(&disk).iter().all(|c| holds(c, &wraps[0].bytes)));
    keys.destroy(&disk, old, &Confirmation::default()).unwrap();
    keys.destroy(&disk, old, &Confirmation::default()).unwrap();
    assert!(raw(&disk).iter().all(|c| !holds(c, &wraps[0].bytes)), "gone from both copies");
    assert!(matches!(keys.kek(old), Err(StoreError::Damage(Damage::KekDestroyed(id, at))) if id == old && at > 0));
    refused(keys.activate(&disk, old));

    let again = open(&disk, &[&s]).unwrap();
    assert_eq!(again.snapshot(), keys.snapshot());
    assert!(matches!(again.kek(old), Err(StoreError::Damage(Damage::KekDestroyed(..)))));
    assert!(matches!(keys.activate(&disk, KekId([3; 16])), Err(StoreError::Damage(Damage::KekUnknown(_)))));
}

#[test]
fn a_staged_kek_survives_a_restart_and_can_be_discarded() {
    let (disk, s, keys) = fresh();
    let new = keys.stage(&disk, KekKind::Sealed, &[]).unwrap();
    let again = open(&disk, &[&s]).unwrap();
    again.discard_pending(&disk, new).unwrap();
    assert_eq!(content(&again.snapshot()).keks, content(&keys.snapshot()).keks[..1]);
    let other = again.stage(&disk, KekKind::Sealed, &[]).unwrap();
    let third = open(&disk, &[&s]).unwrap();
    third.activate(&disk, other).unwrap();
    assert_eq!(active_id(&third), other);
}

fn misbehaviours() -> Vec<(&'static str, Call, Behaviour)> {
    vec![
        ("wraps another key", Call::Wrap, Behaviour::AnotherKey),
        ("wraps garbage", Call::Wrap, Behaviour::Garbage),
        ("wraps to nothing", Call::Wrap, Behaviour::WrapLength(0)),
        ("wraps to too much", Call::Wrap, Behaviour::WrapLength(641)),
        ("unwraps to another key", Call::Unwrap, Behaviour::AnotherKey),
        ("forgets its key after wrapping", Call::Unwrap, Behaviour::Forget),
        ("denies", Call::Wrap, Behaviour::Fail(KmsError::Denied("no".into()))),
        ("denies the proof", Call::Unwrap, Behaviour::Fail(KmsError::Denied("no".into()))),
        ("throttles", Call::Wrap, Behaviour::Fail(KmsError::Throttled("slow".into()))),
        ("goes away before the proof", Call::Unwrap, Behaviour::Fail(KmsError::Unreachable("gone".into()))),
    ]
}

#[test]
fn a_provider_that_fails_or_lies_makes_stage_fail_and_changes_nothing() {
    for (what, call, behaviour) in misbehaviours() {
        let (disk, a, b) = (SimDisk::default(), Scripted::new("a"), Scripted::new("b"));
        make(&disk, &[&a, &b]);
        let keys = open(&disk, &[&a, &b]).unwrap();
        keys.connect_root(&dynamic(&[&b])[0]).unwrap();
        let (before, ring, active) = (raw(&disk), keys.snapshot(), active_id(&keys));
        // The second of two root keys misbehaves: the first one's honest wrap must not be enough.
        b.then(call, behaviour.clone());
        let e = keys.stage(&disk, KekKind::Sealed, &[]).unwrap_err();
        assert!(matches!(e, StoreError::Kms(_)), "{what}: {e:?}");
        assert_eq!((raw(&disk), keys.snapshot(), active_id(&keys)), (before, ring, active), "{what}");
        assert_eq!(disk.files().len(), 2, "{what}: no temporary file is left");
        if !matches!(behaviour, Behaviour::Forget) {
            rotate(&disk, &keys);
            assert!(open(&disk, &[&b]).is_ok());
        }
        assert!(open(&disk, &[&a]).is_ok());
    }
}

#[test]
fn a_provider_that_fails_or_lies_makes_no_store_and_becomes_no_root_key() {
    for (what, call, behaviour) in misbehaviours() {
        let (disk, s) = (SimDisk::default(), Scripted::new("a"));
        s.then(call, behaviour.clone());
        let made = Keys::create(&disk, &dynamic(&[&s]), KekKind::Sealed, StoreFlags::default());
        assert!(matches!(made, Err(StoreError::Kms(_))), "{what}");
        assert!(matches!(open(&disk, &[&s]), Err(StoreError::NotAStore(_))), "{what}");
        let keys = make(&disk, &[&s]);

        // For a new root key the first unwrap only finds out that it is new; the next test has its lies there.
        if call == Call::Wrap {
            let (before, other) = (raw(&disk), Scripted::new("b"));
            other.then(call, behaviour);
            assert!(
                matches!(
                    keys.add_root_key(&disk, &dynamic(&[&other])[0], &Confirmation::default()),
                    Err(StoreError::Kms(_))
                ),
                "{what}"
            );
            assert_eq!(raw(&disk), before, "{what}");
        }
    }
}

#[test]
fn a_new_root_key_that_lies_in_the_proof_is_not_added() {
    let (disk, _, keys) = fresh();
    let other = Scripted::new("other:x");
    // With a scheme of its own its first unwrap call is the proof.
    struct Renamed(Arc<Scripted>);
    impl KeyProvider for Renamed {
        fn describe(&self) -> std::result::Result<crate::kms::Description, KmsError> {
            Ok(crate::kms::Description { uri: "renamed:b".into(), ..self.0.describe()? })
        }
        fn wrap(&self, k: &Secret32, c: &crate::kms::WrapContext) -> std::result::Result<Vec<u8>, KmsError> {
            self.0.wrap(k, c)
        }
        fn unwrap(&self, w: &[u8], c: &crate::kms::WrapContext) -> std::result::Result<Secret32, KmsError> {
            self.0.unwrap(w, c)
        }
    }
    let p: Arc<dyn KeyProvider> = Arc::new(Renamed(other.clone()));
    let before = raw(&disk);
    for lie in [Behaviour::AnotherKey, Behaviour::Fail(KmsError::Unreachable("gone".into()))] {
        other.then(Call::Unwrap, Behaviour::Obey).then(Call::Unwrap, lie);
        assert!(matches!(keys.add_root_key(&disk, &p, &Confirmation::default()), Err(StoreError::Kms(_))));
        assert_eq!(raw(&disk), before);
    }
    keys.add_root_key(&disk, &p, &Confirmation::default()).unwrap();
    assert_eq!(keys.snapshot().roots.len(), 2);
}

#[test]
fn a_new_kek_is_wrapped_by_every_root_key_of_the_one_before() {
    let (disk, a, b) = (SimDisk::default(), Scripted::new("a"), Scripted::new("b"));
    make(&disk, &[&a, &b]);
    let alone = open(&disk, &[&a]).unwrap();
    let before = raw(&disk);
    let missing = alone.stage(&disk, KekKind::Sealed, &[]).unwrap_err();
    assert!(missing.to_string().contains("scripted:b"), "{missing}");
    assert_eq!(raw(&disk), before);
    alone.connect_root(&dynamic(&[&b])[0]).unwrap();
    rotate(&disk, &alone);
    // A provider given at open and not needed so far is found by itself.
    let both = open(&disk, &[&a, &b]).unwrap();
    let (old, new) = rotate(&disk, &both);
    let of_b = open(&disk, &[&b]).unwrap();
    assert_eq!(active_id(&of_b), new);
    assert!(of_b.kek(old).is_ok());
    assert!(matches!(of_b.connect_root(&dynamic(&[&Scripted::new("a")])[0]), Err(StoreError::WrongKey(_))));
}

#[test]
fn a_store_moves_from_one_root_key_to_another() {
    let (disk, a, keys) = fresh();
    let b = Scripted::new("b");
    let old = active_id(&keys);
    let new = keys.stage(&disk, KekKind::Sealed, &dynamic(&[&b])).unwrap();
    keys.activate(&disk, new).unwrap();
    let of_b = open(&disk, &[&b]).unwrap();
    assert!(of_b.kek(old).is_ok(), "the new root key alone opens what the old KEK wraps");
    assert!(matches!(open(&disk, &[&a]), Err(StoreError::Kms(_))), "the old one does not open the new KEK");
    let root = |uri: &str| keys.snapshot().roots.iter().find(|r| r.uri == uri).unwrap().id;
    keys.remove_root_key(&disk, root("scripted:a")).unwrap();
    assert!(matches!(open(&disk, &[&a]), Err(StoreError::WrongKey(_))));
    assert!(matches!(keys.remove_root_key(&disk, root("scripted:b")), Err(StoreError::KeyState(_))), "the last one");
    rotate(&disk, &open(&disk, &[&b]).unwrap());
}

#[test]
fn a_root_key_goes_only_when_another_opens_everything() {
    let (disk, a, keys) = fresh();
    rotate(&disk, &keys);
    let b = Scripted::new("b");
    let added = keys.add_root_key(&disk, &dynamic(&[&b])[0], &Confirmation::default()).unwrap();
    assert!(matches!(
        keys.add_root_key(&disk, &dynamic(&[&b])[0], &Confirmation::default()),
        Err(StoreError::KeyState(_))
    ));
    let of_b = open(&disk, &[&b]).unwrap();
    assert!(of_b.snapshot().keks.iter().all(|k| of_b.kek(k.id).is_ok()), "retired ones too");
    let first = keys.snapshot().roots[0].id;
    b.outage();
    let before = raw(&disk);
    assert!(matches!(keys.remove_root_key(&disk, first), Err(StoreError::KeyState(_))));
    b.always(Behaviour::AnotherKey);
    assert!(matches!(keys.remove_root_key(&disk, first), Err(StoreError::KeyState(_))));
    assert_eq!(raw(&disk), before);
    b.always(Behaviour::Obey);
    let wraps: Vec<Vec<u8>> = keys.snapshot().secret.iter().map(|w| w.bytes.clone()).collect();
    keys.remove_root_key(&disk, first).unwrap();
    assert!(raw(&disk).iter().all(|c| !holds(c, &wraps[0]) && holds(c, &wraps[1])));
    assert_eq!(keys.snapshot().roots.iter().map(|r| r.id).collect::<Vec<_>>(), [added]);
    assert!(matches!(open(&disk, &[&a]), Err(StoreError::WrongKey(_))));
    assert!(matches!(keys.remove_root_key(&disk, first), Err(StoreError::KeyState(_))));
}

#[test]
fn an_external_kek_is_the_providers_key() {
    let (disk, a, b) = (SimDisk::default(), Scripted::new("a"), Scripted::new("b"));
    let keys = Keys::create(&disk, &dynamic(&[&a, &b]), KekKind::External, StoreFlags::default()).unwrap();
    let dek = Dek::random();
    let calls = (a.count(Call::Wrap), b.count(Call::Wrap));
    let wrapped = keys.with_active(|k| k.wrap(AAD, FILE, &dek)).unwrap();
    assert_eq!((a.count(Call::Wrap), b.count(Call::Wrap)), (calls.0 + 1, calls.1), "by the first root key only");
    let (_, context) = a.calls().pop().unwrap();
    assert_eq!((context.store, context.object, context.extra), (keys.store_id().0, FILE.0, AAD.to_vec()));

    let again = open(&disk, &[&b, &a]).unwrap();
    let kek = again.kek(active_id(&keys)).unwrap();
    assert_eq!((kek.kind(), kek.wrap_suite()), (KekKind::External, WRAP_EXTERNAL));
    assert!(kek.unwrap(AAD, FILE, &wrapped).unwrap().secret().ct_eq(dek.secret()));
    for (aad, file) in [(&b"other"[..], FILE), (AAD, FileId([8; 16]))] {
        assert!(matches!(kek.unwrap(aad, file, &wrapped), Err(StoreError::Damage(Damage::WrapAuth(_)))));
    }
    a.outage();
    assert!(matches!(kek.unwrap(AAD, FILE, &wrapped), Err(StoreError::Kms(KmsError::Unreachable(_)))));
    a.always(Behaviour::WrapLength(641));
    assert!(matches!(again.with_active(|k| k.wrap(AAD, FILE, &dek)), Err(StoreError::Kms(KmsError::Config(_)))));
    a.always(Behaviour::Obey);
    assert!(matches!(open(&disk, &[&b]), Err(StoreError::Kms(_))), "DEKs need the provider itself");
    let root = again.snapshot().active().unwrap().provider.unwrap();
    assert!(matches!(again.remove_root_key(&disk, root), Err(StoreError::KeyState(_))));

    let sealed = again.stage(&disk, KekKind::Sealed, &[]).unwrap();
    again.activate(&disk, sealed).unwrap();
    assert!(kek.unwrap(AAD, FILE, &wrapped).is_ok(), "both kinds live in one store");
    let of_b = open(&disk, &[&b]).unwrap();
    assert!(matches!(of_b.kek(kek.id()), Err(StoreError::Kms(_))));
    let back = again.stage(&disk, KekKind::External, &dynamic(&[&b])).unwrap();
    let record = again.snapshot().kek(back).unwrap().clone();
    assert_eq!(record.wraps.len(), 1);
    assert_ne!(record.provider, Some(root));
}

/// One change of the keyring, with what has to be there before it.
struct Change {
    name: &'static str,
    prepare: fn(&SimDisk, &Keys, &Arc<Scripted>),
    run: fn(&SimDisk, &Keys, &Arc<Scripted>) -> Result<()>,
}

fn stage(disk: &SimDisk, keys: &Keys, _: &Arc<Scripted>) -> Result<()> {
    // A killed run may have left one.
    if let Some(p) = keys.snapshot().pending() {
        keys.discard_pending(disk, p.id)?;
    }
    keys.stage(disk, KekKind::Sealed, &[]).map(|_| ())
}

fn pending_id(keys: &Keys) -> Option<KekId> {
    keys.snapshot().pending().map(|k| k.id)
}

fn retired_id(keys: &Keys) -> KekId {
    keys.snapshot().keks[0].id
}

fn changes() -> Vec<Change> {
    let staged = |d: &SimDisk, k: &Keys, s: &Arc<Scripted>| stage(d, k, s).unwrap();
    vec![
        Change { name: "stage", prepare: |_, _, _| (), run: stage },
        Change {
            name: "stage under another root key",
            prepare: |_, _, _| (),
            run: |d, k, s| {
                if let Some(id) = pending_id(k) {
                    k.discard_pending(d, id)?;
                }
                k.stage(d, KekKind::Sealed, &dynamic(&[s])).map(drop)
            },
        },
        Change {
            name: "activate",
            prepare: staged,
            run: |d, k, _| pending_id(k).map_or(Ok(()), |id| k.activate(d, id)),
        },
        Change {
            name: "discard",
            prepare: staged,
            run: |d, k, _| pending_id(k).map_or(Ok(()), |id| k.discard_pending(d, id)),
        },
        Change {
            name: "retire",
            prepare: |d, k, s| {
                stage(d, k, s).unwrap();
                k.activate(d, pending_id(k).unwrap()).unwrap();
            },
            run: |d, k, _| k.retire(d, retired_id(k)),
        },
        Change {
            name: "destroy",
            prepare: |d, k, _| {
                rotate(d, k);
            },
            run: |d, k, _| k.destroy(d, retired_id(k), &Confirmation::default()),
        },
        Change {
            name: "schedule",
            prepare: |d, k, _| {
                rotate(d, k);
            },
            run: |d, k, _| match k.snapshot().life.schedules.is_empty() {
                true => k.schedule_destroy(d, retired_id(k), 60, &Confirmation::default()).map(drop),
                false => Ok(()),
            },
        },
        Change {
            name: "announce",
            prepare: |d, k, _| {
                rotate(d, k);
                k.schedule_destroy(d, retired_id(k), 86_400, &Confirmation::default()).unwrap();
            },
            run: |d, k, _| k.look_at_ending(d, retired_id(k)).map(drop),
        },
        Change {
            name: "cancel",
            prepare: |d, k, _| {
                rotate(d, k);
                k.schedule_destroy(d, retired_id(k), 60, &Confirmation::default()).unwrap();
            },
            run: |d, k, _| k.cancel_destroy(d, retired_id(k)).map(drop),
        },
        Change {
            name: "record use",
            prepare: |d, k, _| {
                rotate(d, k);
                k.schedule_destroy(d, retired_id(k), 86_400, &Confirmation::default()).unwrap();
                k.note_use(retired_id(k));
            },
            run: |d, k, _| k.record_use(d, retired_id(k)),
        },
        Change {
            name: "destroy as scheduled",
            prepare: |d, k, _| {
                rotate(d, k);
                k.schedule_destroy(d, retired_id(k), 0, &Confirmation::default()).unwrap();
                assert_eq!(k.look_at_ending(d, retired_id(k)).unwrap(), Ending::Come);
            },
            run: |d, k, _| match k.snapshot().keks[0].state {
                KekState::Destroyed => Ok(()),
                _ => k.destroy_scheduled(d, retired_id(k)),
            },
        },
        Change { name: "floor", prepare: |_, _, _| (), run: |d, k, _| k.set_floor(d, Some(active_id(k))) },
        Change {
            name: "quorum",
            prepare: |d, k, s| {
                k.add_root_key(d, &dynamic(&[s])[0], &Confirmation::default()).unwrap();
            },
            run: |d, k, s| k.set_quorum(d, 2, &k.confirm(&dynamic(&[s]))?),
        },
        Change {
            name: "add root key",
            prepare: |_, _, _| (),
            run: |d, k, s| match k.add_root_key(d, &dynamic(&[s])[0], &Confirmation::default()) {
                Err(StoreError::KeyState(_)) if k.snapshot().roots.len() == 2 => Ok(()),
                other => other.map(|_| ()),
            },
        },
        Change {
            name: "remove root key",
            prepare: |d, k, s| {
                k.add_root_key(d, &dynamic(&[s])[0], &Confirmation::default()).unwrap();
            },
            run: |d, k, _| {
                let id = k.snapshot().roots.iter().find(|r| r.uri == "scripted:b").map(|r| r.id);
                id.map_or(Ok(()), |id| k.remove_root_key(d, id))
            },
        },
        Change {
            name: "refresh",
            prepare: |d, k, s| {
                k.add_root_key(d, &dynamic(&[s])[0], &Confirmation::default()).unwrap();
                s.advance();
            },
            run: |d, k, _| k.refresh(d, false).map(drop),
        },
    ]
}

fn crashes(disk: &SimDisk) -> Vec<SimDisk> {
    let cuts = [PowerCut::Reorder { tear: false }, PowerCut::Reorder { tear: true }];
    let cut = (0..6).flat_map(|seed| cuts.map(|c| disk.crash_power(seed, c)));
    [disk.crash_process(), disk.crash_power(0, PowerCut::Lose)].into_iter().chain(cut).collect()
}

#[test]
fn a_stop_at_every_operation_of_every_change_leaves_the_old_keyring_or_the_new_one() {
    for c in changes() {
        let mut finished = false;
        for n in 0.. {
            let (disk, a, keys) = fresh();
            let b = Scripted::new("b");
            (c.prepare)(&disk, &keys, &b);
            let before = content(&keys.snapshot());
            disk.stop_after(disk.operations() + n);
            let result = (c.run)(&disk, &keys, &b);
            for (i, after) in crashes(&disk).into_iter().enumerate() {
                let again =
                    open(&after, &[&a]).unwrap_or_else(|e| panic!("{} stopped after {n}, cut {i}: {e}", c.name));
                let found = content(&again.snapshot());
                if result.is_ok() {
                    assert_eq!(found, content(&keys.snapshot()), "{}: an acknowledged change is durable", c.name);
                } else if found != before && found != content(&keys.snapshot()) {
                    assert_eq!(again.snapshot().generation, keys.snapshot().generation + 1, "{} after {n}", c.name);
                }
                assert!(again.damaged_copies().is_empty(), "{} after {n}: {:?}", c.name, again.damaged_copies());
                // And it can be done again, to the end.
                (c.run)(&after, &again, &b).unwrap_or_else(|e| panic!("{} again after {n}, cut {i}: {e}", c.name));
                let done = open(&after, &[&a]).unwrap();
                assert_eq!(done.snapshot(), again.snapshot());
                again.repair_copies(&after).unwrap();
                let [x, y] = raw(&after);
                assert_eq!(x, y);
                let gone: Vec<_> =
                    before.keks.iter().filter(|k| c.name == "destroy" && k.id == before.keks[0].id).collect();
                assert!(gone.iter().flat_map(|k| &k.wraps).all(|w| !holds(&x, &w.bytes)));
            }
            if !disk.is_stopped() {
                result.unwrap_or_else(|e| panic!("{}: {e}", c.name));
                finished = n > 5;
                break;
            }
        }
        assert!(finished, "{} takes more than five operations", c.name);
    }
}

#[test]
fn a_stop_at_every_operation_of_create_leaves_no_store_or_a_whole_one() {
    for n in 0.. {
        let (disk, s) = (SimDisk::default(), Scripted::new("a"));
        disk.stop_after(n);
        let made = Keys::create(&disk, &dynamic(&[&s]), KekKind::Sealed, StoreFlags::default());
        for after in crashes(&disk) {
            match open(&after, &[&s]) {
                Ok(k) => assert!(k.with_active(|k| k.wrap(AAD, FILE, &Dek::random())).is_ok()),
                Err(StoreError::NotAStore(_)) if made.is_err() => {
                    assert_eq!(make(&after, &[&s]).snapshot(), open(&after, &[&s]).unwrap().snapshot(), "made anew");
                }
                Err(e) => panic!("stopped after {n}: {e}"),
            }
        }
        if made.is_ok() {
            assert!(n > 8);
            return;
        }
    }
}

#[test]
fn activate_waits_for_what_is_being_wrapped() {
    let (disk, _, keys) = fresh();
    let new = keys.stage(&disk, KekKind::Sealed, &[]).unwrap();
    let (activated, started) = (AtomicBool::new(false), Gate::new());
    std::thread::scope(|t| {
        keys.with_active(|k| {
            t.spawn(|| {
                started.open();
                keys.activate(&disk, new).unwrap();
                activated.store(true, Ordering::SeqCst);
            });
            // However far the other thread gets, it cannot have returned while this runs.
            for _ in 0..1000 {
                std::thread::yield_now();
                assert!(!activated.load(Ordering::SeqCst));
            }
            assert!(k.wrap(AAD, FILE, &Dek::random()).is_ok(), "and the old KEK still wraps");
        });
    });
    assert!(activated.load(Ordering::SeqCst));
    assert_eq!(active_id(&keys), new);
}

#[test]
fn nothing_is_wrapped_under_the_old_kek_once_activate_returned() {
    let (disk, _, keys) = fresh();
    let returned = Mutex::new(active_id(&keys));
    let stop = AtomicBool::new(false);
    std::thread::scope(|t| {
        for _ in 0..4 {
            t.spawn(|| {
                let dek = Dek::random();
                while !stop.load(Ordering::SeqCst) {
                    let known = *returned.lock();
                    let (id, wrapped) = keys.with_active(|k| (k.id(), k.wrap(AAD, FILE, &dek).unwrap()));
                    let order = keys.snapshot().keks;
                    let at = |id| order.iter().position(|k| k.id == id).unwrap();
                    assert!(at(id) >= at(known), "wrapped under a KEK older than one whose activation had returned");
                    assert!(keys.kek(id).unwrap().unwrap(AAD, FILE, &wrapped).unwrap().secret().ct_eq(dek.secret()));
                }
            });
        }
        for _ in 0..30 {
            let new = keys.stage(&disk, KekKind::Sealed, &[]).unwrap();
            keys.activate(&disk, new).unwrap();
            *returned.lock() = new;
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert_eq!(keys.snapshot().keks.len(), 31);
}

#[test]
fn a_slow_provider_keeps_nobody_from_wrapping() {
    let (disk, s, keys) = fresh();
    let gate = Gate::new();
    s.then(Call::Wrap, Behaviour::Hold(gate.clone()));
    std::thread::scope(|t| {
        let staging = t.spawn(|| keys.stage(&disk, KekKind::Sealed, &[]));
        gate.wait_for(1);
        assert!(keys.with_active(|k| k.wrap(AAD, FILE, &Dek::random())).is_ok());
        assert!(keys.kek(active_id(&keys)).is_ok());
        gate.open();
        assert!(staging.join().unwrap().is_ok());
    });
}

#[test]
fn the_whole_copy_is_not_touched_before_the_damaged_one_is_whole_again() {
    for (bad, good) in [(0, 1), (1, 0)] {
        let path = |i: usize| format!(".envelopefs/{}", COPIES[i]);
        for n in 0.. {
            let (disk, s, _) = fresh();
            disk.flip_bit(path(bad), 60, 1).unwrap();
            let keys = open(&disk, &[&s]).unwrap();
            let before = raw(&disk);
            disk.stop_after(disk.operations() + n);
            let staged = keys.stage(&disk, KekKind::Sealed, &[]);
            let after = raw(&disk.crash_process());
            assert!(after[good] == before[good] || after[bad] != before[bad], "stopped after {n}");
            if staged.is_ok() {
                break;
            }
        }
    }
}

#[test]
fn on_a_real_directory_with_a_key_file_and_a_passphrase() {
    use crate::backing::posix::Posix;
    use crate::kms::{Argon2Cost, ConnectOptions, PassphraseSource, RootKeyUri, connect};
    let (dir, keydir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let b = Posix::open(dir.path()).unwrap();
    let with = |text: &str| ConnectOptions {
        passphrase: Some(PassphraseSource::Fixed(text.as_bytes().to_vec().into())),
        argon2: Some(Argon2Cost::LEAST),
        ..Default::default()
    };
    let file = RootKeyUri::parse(&format!("keyfile:{}/key", keydir.path().display())).unwrap();
    let phrase = RootKeyUri::parse("passphrase:").unwrap();
    let both = [connect(&file, &with(""), true).unwrap(), connect(&phrase, &with("open sesame"), true).unwrap()];
    let keys = Keys::create(&b, &both, KekKind::Sealed, StoreFlags::default()).unwrap();
    let uris: Vec<String> = Keys::read_keyring(&b).unwrap().roots.into_iter().map(|r| r.uri).collect();
    assert_eq!(uris, [file.to_string(), "passphrase:".to_owned()]);
    assert!(uris.iter().all(|u| RootKeyUri::recorded(u).is_ok()));
    for p in [connect(&file, &with(""), false).unwrap(), connect(&phrase, &with("open sesame"), false).unwrap()] {
        assert_eq!(Keys::open(&b, &[p]).unwrap().snapshot(), keys.snapshot());
    }
    let wrong = connect(&phrase, &with("open barley"), false).unwrap();
    assert!(matches!(Keys::open(&b, &[wrong]), Err(StoreError::WrongKey(_))));
    let id = keys.stage(&b, KekKind::Sealed, &[]).unwrap();
    keys.activate(&b, id).unwrap();
    let folder = b.lookup(&b.root().unwrap(), FOLDER).unwrap();
    assert_eq!(b.stat(&folder).unwrap().mode, 0o700);
    for c in COPIES {
        assert_eq!(b.stat_at(&folder, c.as_bytes()).unwrap().mode, 0o600);
    }
    assert_eq!(b.read_dir(&folder).unwrap().len(), 2);
}
