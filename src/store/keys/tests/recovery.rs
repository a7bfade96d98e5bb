//! Recovery keys: wrapped for without being at hand, trusted only under the keyring's MAC.

use super::*;
use crate::kms::RootKeyUri;
use crate::kms::recovery::RecoveryKey;

/// A recovery key with its secret, and the same one to wrap only.
fn pair() -> (Arc<dyn KeyProvider>, Arc<dyn KeyProvider>) {
    let full = RecoveryKey::generate().unwrap();
    let public = RecoveryKey::public(full.uri()).unwrap();
    (Arc::new(full), Arc::new(public))
}

fn uri(p: &Arc<dyn KeyProvider>) -> String {
    p.describe().unwrap().uri
}

fn with(s: &[&Arc<Scripted>], r: &Arc<dyn KeyProvider>) -> Vec<Arc<dyn KeyProvider>> {
    dynamic(s).into_iter().chain([r.clone()]).collect()
}

fn state(r: Result<impl std::fmt::Debug>) -> String {
    match r {
        Err(StoreError::KeyState(why)) => why,
        other => panic!("{other:?}"),
    }
}

/// A store of `a` and a recovery key, which is not at hand any more.
fn store() -> (SimDisk, Arc<Scripted>, Keys, Arc<dyn KeyProvider>) {
    let (disk, a, (full, _)) = (SimDisk::default(), Scripted::new("a"), pair());
    Keys::create(&disk, &with(&[&a], &full), KekKind::Sealed, StoreFlags::default()).unwrap();
    let keys = open(&disk, &[&a]).unwrap();
    (disk, a, keys, full)
}

#[test]
fn the_recovery_key_opens_what_rotations_made_while_it_lay_in_a_safe() {
    let (disk, a, keys, full) = store();
    rotate(&disk, &keys);
    let (old, new) = rotate(&disk, &keys);
    let dek = Dek::random();
    let wrapped = keys.with_active(|k| k.wrap(AAD, FILE, &dek)).unwrap();
    a.outage();
    let broken = Keys::open(&disk, std::slice::from_ref(&full)).unwrap();
    assert_eq!((broken.snapshot(), active_id(&broken)), (keys.snapshot(), new));
    assert!(broken.kek(old).is_ok());
    assert!(broken.kek(new).unwrap().unwrap(AAD, FILE, &wrapped).unwrap().secret().ct_eq(dek.secret()));
    let stranger = pair().0;
    assert!(matches!(Keys::open(&disk, &[stranger]), Err(StoreError::WrongKey(_))));
}

#[test]
fn a_move_to_other_root_keys_takes_the_recovery_key_along() {
    let (disk, a, keys, full) = store();
    let b = Scripted::new("b");
    let new = keys.stage(&disk, KekKind::Sealed, &dynamic(&[&b])).unwrap();
    keys.activate(&disk, new).unwrap();
    assert!(matches!(open(&disk, &[&a]), Err(StoreError::Kms(_))));
    let broken = Keys::open(&disk, &[full]).unwrap();
    assert_eq!(active_id(&broken), new);
    // From there the way back: a new root key in, the lost ones out.
    let c = Scripted::new("c");
    broken.add_root_key(&disk, &dynamic(&[&c])[0], &Confirmation::default()).unwrap();
    for lost in ["scripted:a", "scripted:b"] {
        let id = broken.snapshot().roots.iter().find(|r| r.uri == lost).unwrap().id;
        broken.remove_root_key(&disk, id).unwrap();
    }
    rotate(&disk, &open(&disk, &[&c]).unwrap());
    assert!(open(&disk, &[&c]).is_ok());
}

#[test]
fn a_recovery_key_of_an_attacker_put_into_the_keyring_is_not_wrapped_for() {
    let (disk, a, keys, _) = store();
    let (evil, evil_public) = pair();
    let good = raw(&disk);
    let forge = |bytes: &[u8]| {
        let d = Keyring::decode(bytes).unwrap();
        let mut ring = d.keyring;
        ring.roots.iter_mut().find(|r| r.uri.starts_with("recovery:")).unwrap().uri = uri(&evil_public);
        ring.encode(|_| d.mac).unwrap()
    };
    COPIES.iter().zip(&good).for_each(|(c, g)| disk.replace_raw(format!(".envelopefs/{c}"), &forge(g)).unwrap());
    assert!(matches!(open(&disk, &[&a]), Err(StoreError::Damage(Damage::KeyringMac))));
    // A store that is open already goes by the keyring it verified, and writes that one back.
    rotate(&disk, &keys);
    assert!(matches!(Keys::open(&disk, std::slice::from_ref(&evil)), Err(StoreError::WrongKey(_))));
    assert!(raw(&disk).iter().all(|c| !holds(c, uri(&evil).as_bytes())));
    // One forged copy does not count beside a genuine one.
    let genuine = raw(&disk);
    disk.replace_raw(format!(".envelopefs/{}", COPIES[0]), &forge(&genuine[0])).unwrap();
    rotate(&disk, &open(&disk, &[&a]).unwrap());
    assert!(raw(&disk).iter().all(|c| !holds(c, uri(&evil).as_bytes())));
}

#[test]
fn one_that_only_wraps_is_added_and_never_unlocks() {
    let (disk, a, keys) = fresh();
    let (full, public) = pair();
    let id = keys.add_root_key(&disk, &public, &Confirmation::default()).unwrap();
    assert!(state(keys.add_root_key(&disk, &public, &Confirmation::default())).contains("already"));
    assert!(state(keys.add_root_key(&disk, &full, &Confirmation::default())).contains("already"));
    assert_eq!(Keys::open(&disk, std::slice::from_ref(&full)).unwrap().snapshot(), keys.snapshot());
    assert!(matches!(Keys::open(&disk, std::slice::from_ref(&public)), Err(StoreError::WrongKey(_))));
    assert!(matches!(keys.connect_root(&public), Err(StoreError::WrongKey(_))));
    // It stands at the beginning of the list, and the other one opens.
    let again = Keys::open(&disk, &[public, dynamic(&[&a])[0].clone()]).unwrap();
    assert!(again.passed_over().is_empty());
    rotate(&disk, &again);
    again.remove_root_key(&disk, id).unwrap();
    assert!(matches!(Keys::open(&disk, &[full]), Err(StoreError::WrongKey(_))));
}

#[test]
fn with_its_secret_at_hand_a_recovery_key_proves_what_it_wrapped() {
    let (disk, _, keys) = fresh();
    let (full, _) = pair();
    /// Says it can unwrap, and cannot.
    struct Liar(Arc<dyn KeyProvider>);
    impl KeyProvider for Liar {
        fn describe(&self) -> std::result::Result<crate::kms::Description, KmsError> {
            self.0.describe()
        }
        fn wrap(&self, k: &Secret32, c: &crate::kms::WrapContext) -> std::result::Result<Vec<u8>, KmsError> {
            self.0.wrap(k, c)
        }
        fn unwrap(&self, _: &[u8], _: &crate::kms::WrapContext) -> std::result::Result<Secret32, KmsError> {
            Ok(Secret32::random())
        }
    }
    let before = raw(&disk);
    let liar: Arc<dyn KeyProvider> = Arc::new(Liar(full.clone()));
    assert!(matches!(
        keys.add_root_key(&disk, &liar, &Confirmation::default()),
        Err(StoreError::Kms(KmsError::BadCiphertext(_)))
    ));
    assert_eq!(raw(&disk), before);
    keys.add_root_key(&disk, &full, &Confirmation::default()).unwrap();
}

#[test]
fn a_store_keeps_a_root_key_besides_its_recovery_key() {
    let (full, public) = pair();
    let disk = SimDisk::default();
    let only = Keys::create(&disk, std::slice::from_ref(&full), KekKind::Sealed, StoreFlags::default());
    assert!(state(only).contains("a store needs a root key"));
    assert!(matches!(Keys::read_keyring(&disk), Err(StoreError::NotAStore(_))));
    let (disk, _, keys, full) = store();
    let root = keys.snapshot().roots[0].id;
    let broken = Keys::open(&disk, &[full]).unwrap();
    assert!(state(broken.remove_root_key(&disk, root)).contains("besides the recovery key"));
    let before = raw(&disk);
    assert!(state(keys.stage(&disk, KekKind::Sealed, &[public])).contains("besides the recovery key"));
    assert_eq!(raw(&disk), before);
}

#[test]
fn no_external_kek_beside_a_recovery_key() {
    let (disk, a, (full, public)) = (SimDisk::default(), Scripted::new("a"), pair());
    let both = Keys::create(&disk, &with(&[&a], &full), KekKind::External, StoreFlags::default());
    assert!(state(both).contains("external"));
    let keys = Keys::create(&disk, &dynamic(&[&a]), KekKind::External, StoreFlags::default()).unwrap();
    assert!(state(keys.add_root_key(&disk, &public, &Confirmation::default())).contains("external"));
    // A retired one that headers may still name counts too.
    let old = active_id(&keys);
    let sealed = keys.stage(&disk, KekKind::Sealed, &[]).unwrap();
    keys.activate(&disk, sealed).unwrap();
    assert!(state(keys.add_root_key(&disk, &public, &Confirmation::default())).contains("external"));
    keys.retire(&disk, old).unwrap();
    keys.add_root_key(&disk, &public, &Confirmation::default()).unwrap();
    assert!(state(keys.stage(&disk, KekKind::External, &[])).contains("external"));
    rotate(&disk, &keys);
}

#[test]
fn a_recorded_recovery_key_that_is_none_stops_a_rotation_before_it_begins() {
    let (disk, _, keys, _) = store();
    let bad = RootKeyUri::of_recovery_key([0; 32]).to_string();
    let mut ring = keys.snapshot();
    ring.roots.iter_mut().find(|r| r.uri.starts_with("recovery:")).unwrap().uri = bad;
    let bytes = ring.encode(|b| roots::keyring_mac(keys.secret(), b)).unwrap();
    COPIES.iter().for_each(|c| disk.replace_raw(format!(".envelopefs/{c}"), &bytes).unwrap());
    keys.state.write().ring = ring;
    let before = raw(&disk);
    assert!(matches!(keys.stage(&disk, KekKind::Sealed, &[]), Err(StoreError::Kms(KmsError::Config(_)))));
    assert_eq!(raw(&disk), before);
}

#[test]
fn the_second_root_key_opens_whatever_the_first_one_says_and_the_first_is_named() {
    let (disk, a, b) = (SimDisk::default(), Scripted::new("a"), Scripted::new("b"));
    make(&disk, &[&a, &b]);
    for why in [
        KmsError::Unreachable("no answer".into()),
        KmsError::Throttled("slow".into()),
        KmsError::Denied("no".into()),
        KmsError::Disabled("off".into()),
        KmsError::NotFound("gone".into()),
        KmsError::Credentials("none".into()),
    ] {
        a.always(Behaviour::Fail(why.clone()));
        let asked = a.count(Call::Unwrap);
        let keys = open(&disk, &[&a, &b]).unwrap();
        assert_eq!(keys.passed_over(), [("scripted:a".to_owned(), why)]);
        assert_eq!(a.count(Call::Unwrap), asked + 1, "it is asked once, so it costs one time-out at most");
        assert!(keys.kek(active_id(&keys)).is_ok());
    }
    a.always(Behaviour::Obey);
    assert!(open(&disk, &[&a, &b]).unwrap().passed_over().is_empty());
    let stranger = Scripted::new("x");
    let keys = open(&disk, &[&stranger, &b]).unwrap();
    assert!(matches!(keys.passed_over(), [(uri, KmsError::BadCiphertext(_))] if uri == "scripted:x"));
}
