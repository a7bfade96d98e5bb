//! A keyring that somebody else changes, on the same disk.

use super::*;
use crate::backing::sim::{Moment, Op};
use crate::store::dek_cache::{DekCache, DekCacheLimits};
use crate::store::shared::Shared;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

/// A keyring, who changes it, and somebody who only reads the store.
fn pair() -> (SimDisk, Arc<Scripted>, Keys, Keys) {
    let (disk, s, writer) = fresh();
    let reader = open(&disk, &[&s]).unwrap();
    (disk, s, writer, reader)
}

fn put(disk: &SimDisk, copies: &[Vec<u8>; 2]) {
    for (name, bytes) in COPIES.iter().zip(copies) {
        disk.replace_raw(format!(".envelopefs/{name}"), bytes).unwrap();
    }
}

/// Counts what is read from the disk from now on.
fn reads(disk: &SimDisk) -> Arc<AtomicUsize> {
    let n = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&n);
    disk.set_hook(Some(Arc::new(move |m| {
        if m == Moment::Before(Op::Read) {
            counted.fetch_add(1, Ordering::Relaxed);
        }
    })));
    n
}

#[test]
fn a_new_kek_comes_in_and_only_that_is_unwrapped() {
    let (disk, s, writer, reader) = pair();
    assert!(!reader.renew(&disk).unwrap(), "nothing has changed");
    let reader = open(&disk, &[&s]).unwrap();
    let (old, new) = rotate(&disk, &writer);
    let dek = Dek::random();
    let wrapped = writer.with_active(|k| k.wrap(AAD, FILE, &dek)).unwrap();
    assert!(reader.may_be_news(new) && !reader.may_be_news(old));
    let before = s.count(Call::Unwrap);
    assert!(reader.renew(&disk).unwrap());
    assert_eq!(s.count(Call::Unwrap) - before, 1);
    assert_eq!((reader.snapshot(), active_id(&reader)), (writer.snapshot(), new));
    assert!(reader.kek(new).unwrap().unwrap(AAD, FILE, &wrapped).unwrap().secret().ct_eq(dek.secret()));
    assert!(reader.kek(old).unwrap().wrap(AAD, FILE, &dek).is_err(), "it is retired");
    assert!(reader.is_unused(old) && !reader.may_be_news(new));
}

#[test]
fn a_kek_that_was_destroyed_elsewhere_is_forgotten() {
    let (disk, s, writer, _) = pair();
    let (old, _) = rotate(&disk, &writer);
    let reader = open(&disk, &[&s]).unwrap();
    assert_eq!(reader.keks_for_tests().len(), 4);
    writer.destroy(&disk, old, &Confirmation::default()).unwrap();
    assert!(reader.renew(&disk).unwrap());
    assert!(matches!(reader.kek(old), Err(StoreError::Damage(Damage::KekDestroyed(..)))));
    assert_eq!(reader.keks_for_tests().len(), 2);
}

#[test]
fn a_kek_that_was_pending_is_looked_for_again() {
    let (disk, s, writer) = fresh();
    let new = writer.stage(&disk, KekKind::Sealed, &[]).unwrap();
    let reader = open(&disk, &[&s]).unwrap();
    let shared = Shared::new(disk.clone(), reader, DekCache::new(DekCacheLimits::default()), true);
    assert!(matches!(shared.kek(new), Err(StoreError::KeyState(_))));
    writer.activate(&disk, new).unwrap();
    let before = s.count(Call::Unwrap);
    assert_eq!(shared.kek(new).unwrap().id(), new);
    assert_eq!((active_id(&shared.keys), s.count(Call::Unwrap)), (new, before), "it was open");
}

#[test]
fn an_older_keyring_another_stores_and_a_forged_one_are_not_taken_over() {
    let (disk, s, writer, reader) = pair();
    let old = raw(&disk);
    rotate(&disk, &writer);
    let newer = raw(&disk);
    let other = {
        let (disk, _, keys) = fresh();
        (0..3).for_each(|_| assert_ne!(rotate(&disk, &keys).0, active_id(&keys)));
        raw(&disk)
    };
    // Authentic once; the generation is under the MAC.
    let mut forged = newer.clone();
    forged.iter_mut().for_each(|b| *b.last_mut().unwrap() ^= 1);
    for (copies, of) in [(&old, &reader), (&other, &reader), (&forged, &reader), (&old, &writer)] {
        put(&disk, copies);
        let (before, asked) = (of.snapshot(), s.count(Call::Unwrap));
        // Damaged through and through, it may say so.
        assert!(!of.renew(&disk).unwrap_or(false));
        assert_eq!((of.snapshot(), s.count(Call::Unwrap)), (before, asked), "no root key is asked");
    }
    put(&disk, &newer);
    assert!(reader.renew(&disk).unwrap());
    assert_eq!(reader.snapshot(), writer.snapshot());
}

#[test]
fn one_whole_copy_is_enough_and_two_damaged_ones_change_nothing() {
    let (disk, _, writer, reader) = pair();
    rotate(&disk, &writer);
    let whole = raw(&disk);
    put(&disk, &[vec![0; 100], vec![1; 100]]);
    let before = reader.snapshot();
    assert!(matches!(reader.renew(&disk), Err(StoreError::Damage(_))));
    assert_eq!(reader.snapshot(), before);
    put(&disk, &[vec![0; 100], whole[1].clone()]);
    assert!(reader.renew(&disk).unwrap());
    assert_eq!(reader.snapshot(), writer.snapshot());
}

#[test]
fn keks_that_nobody_made_do_not_keep_it_reading() {
    let (disk, s, writer, reader) = pair();
    rotate(&disk, &writer);
    let (reads, asked) = (reads(&disk), s.count(Call::Unwrap));
    let shared = Shared::new(disk.clone(), reader, DekCache::new(DekCacheLimits::default()), true);
    for _ in 0..200 {
        assert!(matches!(shared.kek(KekId::random()), Err(StoreError::Damage(Damage::KekUnknown(_)))));
    }
    assert_eq!((reads.load(Ordering::Relaxed), s.count(Call::Unwrap)), (COPIES.len(), asked + 1));
    // One that may be written is nobody else's to change.
    let shared =
        Shared::new(disk.clone(), open(&disk, &[&s]).unwrap(), DekCache::new(DekCacheLimits::default()), false);
    let before = reads.load(Ordering::Relaxed);
    assert!(shared.kek(KekId::random()).is_err());
    shared.renew_keys();
    assert_eq!(reads.load(Ordering::Relaxed), before);
}

#[test]
fn a_service_that_is_away_is_told_as_such_and_asked_again_later() {
    let (disk, s, writer, reader) = pair();
    let (old, new) = rotate(&disk, &writer);
    s.then(Call::Unwrap, Behaviour::Fail(KmsError::Unreachable("gone".into())));
    let shared = Shared::new(disk.clone(), reader, DekCache::new(DekCacheLimits::default()), true);
    let asked = s.count(Call::Unwrap);
    let now = Instant::now();
    for _ in 0..3 {
        assert!(matches!(shared.kek(new), Err(StoreError::Kms(KmsError::Unreachable(_)))));
        // Not a second ago, however slow the machine is.
        shared.keys.ended_at(now + Duration::from_secs(3600));
    }
    assert_eq!(s.count(Call::Unwrap), asked + 1);
    assert_eq!((active_id(&shared.keys), shared.kek(old).unwrap().id()), (old, old), "what was, goes on");
    shared.keys.ended_at(now.checked_sub(Duration::from_secs(1)).unwrap());
    assert_eq!(shared.kek(new).unwrap().id(), new);
}

#[test]
fn many_at_once_read_it_once() {
    let (disk, s, writer, reader) = pair();
    let (_, new) = rotate(&disk, &writer);
    let shared = Shared::new(disk.clone(), reader, DekCache::new(DekCacheLimits::default()), true);
    let (reads, asked) = (reads(&disk), s.count(Call::Unwrap));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(shared.kek(new).unwrap().id(), new));
        }
    });
    assert_eq!((reads.load(Ordering::Relaxed), s.count(Call::Unwrap)), (COPIES.len(), asked + 1));
}

/// Each waited for the service by himself, one after the other, if it took longer to be found away than a reading is good for.
#[test]
fn many_at_once_wait_once_for_a_service_that_is_slow_to_be_found_away() {
    let (disk, s, writer, reader) = pair();
    let (_, new) = rotate(&disk, &writer);
    let shared = Shared::new(disk.clone(), reader, DekCache::new(DekCacheLimits::default()), true);
    let asked = s.count(Call::Unwrap);
    s.outage();
    s.set_hook(Some(Arc::new(|| std::thread::sleep(Duration::from_millis(1200)))));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert!(matches!(shared.kek(new), Err(StoreError::Kms(KmsError::Unreachable(_))))));
        }
    });
    assert_eq!(s.count(Call::Unwrap), asked + 1);
}

#[test]
fn a_lock_waits_for_a_kek_that_is_being_opened_and_nothing_of_it_stays() {
    let (disk, s, writer, reader) = pair();
    rotate(&disk, &writer);
    let gate = Gate::new();
    s.then(Call::Unwrap, Behaviour::Hold(gate.clone()));
    std::thread::scope(|scope| {
        let renewing = scope.spawn(|| reader.renew(&disk));
        gate.wait_for(1);
        assert!(reader.drain());
        let locking = scope.spawn(|| reader.drop_keks(LockedBy::Operator));
        gate.open();
        assert!(matches!(renewing.join().unwrap(), Err(StoreError::KeysLocked)));
        assert!(locking.join().unwrap().iter().all(|k| k.strong_count() == 0));
    });
    assert_eq!(reader.keks_for_tests(), Vec::<[u8; 32]>::new());
    assert!(matches!(reader.renew(&disk), Err(StoreError::KeysLocked)));
    // From the keyring in memory, and then what has changed.
    reader.reopen(&dynamic(&[&s])).unwrap();
    assert!(reader.renew(&disk).unwrap());
    assert_eq!(reader.snapshot(), writer.snapshot());
}
