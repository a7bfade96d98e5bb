//! Refreshing wraps: everything moves, or nothing, and a root key that fails keeps nobody else from it.

use super::*;
use crate::format::ids::RootKeyId;

/// A store of two root keys with two retired KEKs and an active one, opened with both.
fn store() -> (SimDisk, Arc<Scripted>, Arc<Scripted>, Keys) {
    let (disk, a, b) = (SimDisk::default(), Scripted::new("a"), Scripted::new("b"));
    make(&disk, &[&a, &b]);
    let keys = open(&disk, &[&a, &b]).unwrap();
    rotate(&disk, &keys);
    rotate(&disk, &keys);
    (disk, a, b, keys)
}

/// (due, moved, current, whether there was a problem) of each root key.
fn figures(all: &[RefreshedRoot]) -> Vec<(u32, u32, u32, bool)> {
    all.iter().map(|r| (r.due, r.moved, r.current, r.problem.is_some())).collect()
}

fn wraps_of(ring: &Keyring, root: RootKeyId) -> Vec<Vec<u8>> {
    let all = ring.secret.iter().chain(ring.keks.iter().flat_map(|k| &k.wraps));
    all.filter(|w| w.root == root).map(|w| w.bytes.clone()).collect()
}

#[test]
fn everything_moves_to_the_newest_version_and_the_old_one_can_be_retired() {
    let (disk, a, b, keys) = store();
    let before = keys.snapshot();
    assert_eq!(figures(&keys.refresh(&disk, false).unwrap()), [(0, 0, 4, false), (0, 0, 4, false)]);
    assert_eq!(keys.snapshot(), before, "nothing is written for nothing");
    a.advance();
    let wraps = a.count(Call::Wrap);
    assert_eq!(figures(&keys.refresh(&disk, true).unwrap()), [(4, 0, 0, false), (0, 0, 4, false)]);
    assert_eq!(keys.snapshot(), before, "a dry run only looks");
    assert_eq!(figures(&keys.refresh(&disk, false).unwrap()), [(4, 4, 0, false), (0, 0, 4, false)]);
    assert_eq!((a.count(Call::Wrap), a.count(Call::Rewrap)), (wraps, 4), "by the service's own re-wrap");
    assert_eq!(figures(&keys.refresh(&disk, false).unwrap()), [(0, 0, 4, false), (0, 0, 4, false)]);
    a.retire_old_versions();
    let again = open(&disk, &[&a]).unwrap();
    assert_eq!(again.snapshot(), keys.snapshot());
    assert!(before.keks.iter().all(|k| again.kek(k.id).is_ok()));
    let id = before.roots[0].id;
    assert!(raw(&disk).iter().all(|c| wraps_of(&before, id).iter().all(|w| !holds(c, w))), "the old wraps are gone");
    // And the other one, on its own.
    b.advance();
    assert_eq!(figures(&again.refresh(&disk, false).unwrap())[0], (0, 0, 4, false));
    assert_eq!(figures(&open(&disk, &[&b]).unwrap().refresh(&disk, false).unwrap())[1], (4, 4, 0, false));
    b.retire_old_versions();
    assert!(open(&disk, &[&b]).is_ok());
}

#[test]
fn a_root_key_that_does_not_answer_is_told_and_the_other_one_is_refreshed() {
    let (disk, a, b, keys) = store();
    drop(keys);
    a.advance();
    b.advance();
    b.outage();
    let keys = open(&disk, &[&a, &b]).unwrap();
    let all = keys.refresh(&disk, false).unwrap();
    assert_eq!(figures(&all), [(4, 4, 0, false), (0, 0, 0, true)]);
    assert!(matches!(all[1].problem, Some(KmsError::Unreachable(_))), "{all:?}");
    // Without a provider for it.
    let all = open(&disk, &[&a]).unwrap().refresh(&disk, false).unwrap();
    assert!(matches!(all[1].problem, Some(KmsError::Config(_))), "{all:?}");
    b.always(Behaviour::Obey);
    assert_eq!(figures(&keys.refresh(&disk, false).unwrap()), [(0, 0, 4, false), (4, 4, 0, false)]);
}

#[test]
fn a_root_key_that_fails_or_lies_keeps_its_old_wraps() {
    let denied = || Behaviour::Fail(KmsError::Denied("no".into()));
    for (what, call, after, behaviour) in [
        ("denies to say what is due", Call::Due, 2, denied()),
        ("denies the first", Call::Rewrap, 0, denied()),
        ("denies half-way", Call::Rewrap, 2, denied()),
        ("re-wraps another key", Call::Rewrap, 3, Behaviour::AnotherKey),
        ("re-wraps to garbage", Call::Rewrap, 1, Behaviour::Garbage),
        ("re-wraps to nothing", Call::Rewrap, 1, Behaviour::WrapLength(0)),
        ("re-wraps to too much", Call::Rewrap, 1, Behaviour::WrapLength(641)),
        ("goes away before the proof", Call::Unwrap, 1, Behaviour::Fail(KmsError::Unreachable("gone".into()))),
        ("unwraps to another key", Call::Unwrap, 3, Behaviour::AnotherKey),
    ] {
        let (disk, a, b, keys) = store();
        a.advance();
        b.advance();
        let id = keys.snapshot().roots[0].id;
        let before = wraps_of(&keys.snapshot(), id);
        for _ in 0..after {
            a.then(call, Behaviour::Obey);
        }
        a.then(call, behaviour);
        let all = keys.refresh(&disk, false).unwrap();
        assert_eq!((all[0].moved, all[0].problem.is_some()), (0, true), "{what}: {all:?}");
        assert_eq!(figures(&all)[1], (4, 4, 0, false), "{what}");
        assert_eq!(wraps_of(&keys.snapshot(), id), before, "{what}");
        for s in [&a, &b] {
            assert_eq!(open(&disk, &[s]).unwrap().snapshot(), keys.snapshot(), "{what}");
        }
        assert_eq!(disk.files().len(), 2, "{what}: no temporary file is left");
        assert_eq!(figures(&keys.refresh(&disk, false).unwrap())[0], (4, 4, 0, false), "{what}: and then it goes");
    }
}

#[test]
fn a_stop_at_every_operation_of_a_refresh_leaves_a_keyring_that_both_root_keys_open() {
    for n in 0.. {
        let (disk, a, b, keys) = store();
        a.advance();
        b.advance();
        let before = keys.snapshot();
        disk.stop_after(disk.operations() + n);
        let result = keys.refresh(&disk, false);
        assert_eq!(result.is_err(), disk.is_stopped(), "stopped after {n}: {result:?}");
        for (i, after) in crashes(&disk).into_iter().enumerate() {
            for s in [&a, &b] {
                let again = open(&after, &[s]).unwrap_or_else(|e| panic!("stopped after {n}, cut {i}: {e}"));
                assert!(before.keks.iter().all(|k| again.kek(k.id).is_ok()));
                assert!(again.damaged_copies().is_empty());
            }
            let again = open(&after, &[&a, &b]).unwrap();
            let all = again.refresh(&after, false).unwrap();
            assert!(all.iter().all(|r| r.problem.is_none() && r.moved + r.current == 4), "{all:?}");
            if result.is_ok() {
                assert!(all.iter().all(|r| r.current == 4), "what was acknowledged is durable");
            }
            again.repair_copies(&after).unwrap();
            let [x, y] = raw(&after);
            assert_eq!(x, y);
        }
        if result.is_ok() {
            assert!(n > 10);
            return;
        }
    }
}

#[test]
fn an_error_at_every_operation_of_a_refresh_is_passed_on_and_it_can_be_done_again() {
    for n in 0.. {
        let (disk, a, b, keys) = store();
        a.advance();
        b.advance();
        disk.fail_next(None, n, libc::ENOSPC);
        let result = keys.refresh(&disk, false);
        disk.clear_faults();
        for s in [&a, &b] {
            assert!(open(&disk, &[s]).is_ok(), "after {n}");
        }
        let Err(e) = result else { break };
        assert!(matches!(&e, StoreError::Backing(e) if e.raw_os_error() == Some(libc::ENOSPC)), "{e}");
        let all = keys.refresh(&disk, false).unwrap();
        assert!(all.iter().all(|r| r.moved + r.current == 4), "{all:?}");
        assert_eq!(open(&disk, &[&a]).unwrap().snapshot(), keys.snapshot());
    }
}

#[test]
fn a_rotation_moves_the_store_secret_to_the_newest_version_too() {
    let (disk, a, keys) = fresh();
    a.advance();
    let (old, _) = rotate(&disk, &keys);
    keys.destroy(&disk, old, &Confirmation::default()).unwrap();
    a.retire_old_versions();
    assert_eq!(open(&disk, &[&a]).unwrap().snapshot(), keys.snapshot());
    assert_eq!(a.count(Call::Rewrap), 1);
}

#[test]
fn a_store_secret_that_cannot_be_moved_keeps_nobody_from_rotating_and_a_lie_does() {
    let unreachable = || Behaviour::Fail(KmsError::Unreachable("gone".into()));
    for call in [Call::Due, Call::Rewrap] {
        let (disk, a, keys) = fresh();
        a.advance().then(call, unreachable());
        let before = keys.snapshot().secret;
        rotate(&disk, &keys);
        assert_eq!(keys.snapshot().secret, before);
        assert!(open(&disk, &[&a]).is_ok());
    }
    for lie in [Behaviour::AnotherKey, Behaviour::Garbage] {
        let (disk, a, keys) = fresh();
        a.advance().then(Call::Rewrap, lie);
        let before = raw(&disk);
        assert!(matches!(keys.stage(&disk, KekKind::Sealed, &[]), Err(StoreError::Kms(_))));
        assert_eq!(raw(&disk), before);
        rotate(&disk, &keys);
    }
}

#[test]
fn a_root_key_without_versions_is_not_asked() {
    /// Fails the test when it is asked.
    struct Untouched;
    impl KeyProvider for Untouched {
        fn describe(&self) -> std::result::Result<crate::kms::Description, KmsError> {
            let capabilities = crate::kms::Capabilities::default();
            Ok(crate::kms::Description { uri: "passphrase:".into(), key_id: "p".into(), capabilities })
        }
        fn wrap(&self, _: &Secret32, _: &crate::kms::WrapContext) -> std::result::Result<Vec<u8>, KmsError> {
            panic!("asked to wrap")
        }
        fn unwrap(&self, _: &[u8], _: &crate::kms::WrapContext) -> std::result::Result<Secret32, KmsError> {
            panic!("asked to unwrap")
        }
    }
    use crate::kms::{Argon2Cost, ConnectOptions, PassphraseSource, RootKeyUri, connect};
    let o = ConnectOptions {
        passphrase: Some(PassphraseSource::Fixed(b"open sesame".to_vec().into())),
        argon2: Some(Argon2Cost::LEAST),
        ..Default::default()
    };
    let phrase = connect(&RootKeyUri::parse("passphrase:").unwrap(), &o, true).unwrap();
    let (disk, a, keys) = fresh();
    keys.add_root_key(&disk, &phrase, &Confirmation::default()).unwrap();
    let untouched: Arc<dyn KeyProvider> = Arc::new(Untouched);
    let keys = Keys::open(&disk, &[dynamic(&[&a])[0].clone(), untouched]).unwrap();
    a.advance();
    assert_eq!(figures(&keys.refresh(&disk, false).unwrap()), [(2, 2, 0, false), (0, 0, 2, false)]);
}
