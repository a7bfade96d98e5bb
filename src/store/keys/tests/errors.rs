//! I/O errors while the keyring is changed, and the process lives on: what it has in memory is what lies on disk.

use super::*;
use crate::backing::sim::{Moment, Op};

/// How an operation of the disk fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// It does nothing; the next one succeeds.
    Once,
    /// It is done, and told as failed.
    Late,
    /// It does nothing, and so do all that follow.
    ForEver,
}

impl Trouble {
    fn after(self, disk: &SimDisk, n: u64) {
        match self {
            Self::Once => disk.fail_next(None, n, libc::ENOSPC),
            Self::Late => disk.fail_next_late(None, n, libc::EIO),
            Self::ForEver => disk.fail_from(None, n, libc::EIO),
        }
    }
}

/// What KEK `id` gives: it, or the code of an error.
fn use_of(keys: &Keys, id: KekId) -> std::result::Result<KekId, String> {
    keys.kek(id).map(|h| h.id()).map_err(|e| e.code())
}

/// Whether `keys` has in memory what `fresh`, which was opened from the disk just now, has.
fn agree(keys: &Keys, fresh: &Keys) -> bool {
    let ring = keys.snapshot();
    ring == fresh.snapshot() && active_id(keys) == active_id(fresh)
}

/// That what `keys` has besides the keyring follows from it.
fn assert_consistent(keys: &Keys, what: &str) {
    let ring = keys.snapshot();
    assert_eq!(Some(active_id(keys)), ring.active().map(|k| k.id), "{what}");
    let s = keys.state.read();
    for k in &ring.keks {
        let is_there = s.opened.handles.contains_key(&k.id);
        assert_eq!(is_there, k.state != KekState::Destroyed, "{what}: the key of a KEK {:?}", k.state);
    }
    assert!(s.opened.handles.keys().all(|id| ring.kek(*id).is_some()), "{what}: a KEK that is in no keyring");
    assert!(s.connected.iter().all(|c| ring.root(c.id).is_some()), "{what}: a root key that is none");
}

/// What the change from `before` to `after` takes out of the keyring for good.
fn taken_out(c: &Change, before: &Keyring, after: &Keyring) -> Vec<Vec<u8>> {
    let all = |r: &Keyring| -> Vec<Vec<u8>> {
        r.secret.iter().chain(r.keks.iter().flat_map(|k| &k.wraps)).map(|w| w.bytes.clone()).collect()
    };
    let left = all(after);
    match c.name {
        "destroy" | "destroy as scheduled" | "remove root key" | "refresh" => {
            all(before).into_iter().filter(|w| !left.contains(w)).collect()
        }
        _ => Vec::new(),
    }
}

/// Goes on with a rotation, and looks whether a file from before and one from after open.
fn go_on(disk: &SimDisk, a: &Arc<Scripted>, keys: &Keys, what: &str) {
    if let Some(id) = pending_id(keys) {
        keys.discard_pending(disk, id).unwrap();
    }
    let dek = Dek::random();
    let (old, wrapped) = keys.with_active(|k| (k.id(), k.wrap(AAD, FILE, &dek).unwrap()));
    rotate(disk, keys);
    let again = open(disk, &[a]).unwrap();
    assert!(agree(keys, &again), "{what}: after a rotation");
    assert!(again.kek(old).unwrap().unwrap(AAD, FILE, &wrapped).unwrap().secret().ct_eq(dek.secret()), "{what}");
    assert_eq!(disk.files().len(), 2, "{what}: no temporary file is left");
}

#[test]
fn whatever_fails_in_a_change_memory_and_disk_stay_one() {
    let (mut left, mut undone, mut unknown) = (0, 0, 0);
    for c in changes() {
        let prepared = || {
            let ((disk, a, keys), b) = (fresh(), Scripted::new("b"));
            (c.prepare)(&disk, &keys, &b);
            (disk, a, b, keys)
        };
        let length = {
            let (disk, _, b, keys) = prepared();
            let before = disk.operations();
            (c.run)(&disk, &keys, &b).unwrap();
            disk.operations() - before
        };
        assert!(length > 8, "{}", c.name);
        for (trouble, n) in
            [Trouble::Once, Trouble::Late, Trouble::ForEver].into_iter().flat_map(|t| (0..length).map(move |n| (t, n)))
        {
            let what = format!("{} with {trouble:?} at {n} of {length}", c.name);
            let (disk, a, b, keys) = prepared();
            let before = keys.snapshot();
            trouble.after(&disk, n);
            let result = (c.run)(&disk, &keys, &b);
            disk.clear_faults();
            let now = keys.snapshot();

            // Memory is what the disk gives.
            assert_consistent(&keys, &what);
            let again = open(&disk, &[&a]).unwrap();
            let one = agree(&keys, &again);
            match &result {
                Ok(()) => assert!(one, "{what}: it is in force"),
                Err(StoreError::CopyLeft(_)) => {
                    assert!(one && keys.copy_is_left() && content(&now) != content(&before), "{what}: it happened");
                    left += 1;
                }
                Err(StoreError::Backing(_)) => {
                    assert_eq!(content(&now), content(&before), "{what}: an error changes nothing");
                    assert!(one || trouble == Trouble::ForEver && keys.copy_is_left(), "{what}: nor on disk");
                    undone += 1;
                    unknown += u64::from(!one);
                }
                Err(e) => panic!("{what}: {e}"),
            }
            for k in now.keks.iter().filter(|_| one) {
                assert_eq!(use_of(&keys, k.id), use_of(&again, k.id), "{what}");
            }
            if result.is_ok() {
                let gone = taken_out(&c, &before, &now);
                assert!(raw(&disk).iter().all(|copy| gone.iter().all(|w| !holds(copy, w))), "{what}: gone for good");
            }

            // The power may fail now: what was said holds, and what is written now opens.
            let dek = Dek::random();
            let (kek, wrapped) = keys.with_active(|k| (k.id(), k.wrap(AAD, FILE, &dek).unwrap()));
            for after in crashes(&disk) {
                let again = open(&after, &[&a]).unwrap();
                if one && trouble != Trouble::ForEver || result.is_ok() {
                    assert_eq!(content(&again.snapshot()), content(&now), "{what}");
                }
                let opened = again.kek(kek).and_then(|k| k.unwrap(AAD, FILE, &wrapped));
                assert!(opened.unwrap().secret().ct_eq(dek.secret()), "{what}");
            }

            // What is left is mended.
            let [x, y] = raw(&disk);
            let is_left = keys.copy_is_left();
            assert!(is_left || x == y, "{what}: a copy is old, and nobody knows");
            assert_eq!((keys.mend_copies(&disk).unwrap(), keys.copy_is_left()), (is_left, false), "{what}");
            let [x, y] = raw(&disk);
            assert_eq!(x, y, "{what}");
            assert!(agree(&keys, &open(&disk, &[&a]).unwrap()), "{what}: mended");
            let gone = taken_out(&c, &before, &now);
            assert!(gone.iter().all(|w| !holds(&x, w)), "{what}: gone for good");

            // And it can be done again, to the end.
            (c.run)(&disk, &keys, &b).unwrap_or_else(|e| panic!("{what}, again: {e}"));
            assert!(agree(&keys, &open(&disk, &[&a]).unwrap()), "{what}: again");
            assert_consistent(&keys, &what);
            go_on(&disk, &a, &keys, &what);
        }
    }
    assert!(left > 0 && undone > 0 && unknown > 0, "{left}, {undone}, {unknown}");
}

/// A disk on which the second copy cannot be replaced.
fn second_copy_fails(disk: &SimDisk) {
    disk.fail_from(Some(Op::Rename), 1, libc::EIO);
}

#[test]
fn a_removed_root_key_opens_nothing_while_an_old_copy_still_has_it_and_is_removed_to_the_end() {
    let (disk, a, keys) = fresh();
    let b = Scripted::new("b");
    let id = keys.add_root_key(&disk, &dynamic(&[&b])[0], &Confirmation::default()).unwrap();
    let before = keys.snapshot();
    let of_b: Vec<Vec<u8>> = before.secret.iter().filter(|w| w.root == id).map(|w| w.bytes.clone()).collect();
    let has_b = |disk: &SimDisk| raw(disk).iter().any(|copy| of_b.iter().any(|w| holds(copy, w)));
    second_copy_fails(&disk);
    let left = |r: Result<()>| match r {
        Err(StoreError::CopyLeft(why)) => assert!(
            why.contains("is removed, but .envelopefs/keyring.") && why.ends_with("mend that and do it again"),
            "{why}"
        ),
        other => panic!("{other:?}"),
    };
    left(keys.remove_root_key(&disk, id));
    assert!(keys.snapshot().root(id).is_none() && has_b(&disk));
    // Asked again, by this process and by another one, it is not claimed either.
    disk.fail_from(Some(Op::Create), 0, libc::ENOSPC);
    left(keys.remove_root_key(&disk, id));
    left(open(&disk, &[&a]).unwrap().remove_root_key(&disk, id));
    disk.clear_faults();
    // The old copy is genuine, and b opens it: but a newer one is genuine too.
    let wrong = open(&disk, &[&b]);
    assert!(matches!(wrong, Err(StoreError::WrongKey(_))), "{wrong:?}");
    open(&disk, &[&a]).unwrap().remove_root_key(&disk, id).unwrap();
    assert!(!has_b(&disk));
    let none = open(&disk, &[&a]).unwrap().remove_root_key(&disk, id);
    assert!(matches!(none, Err(StoreError::KeyState(_))), "{none:?}");
    // A newer copy that is not genuine keeps nobody out.
    let (disk, _, keys) = fresh();
    let c = Scripted::new("c");
    keys.add_root_key(&disk, &dynamic(&[&c])[0], &Confirmation::default()).unwrap();
    let mut forged = keys.snapshot();
    forged.generation = 99;
    forged.secret.retain(|w| w.root != forged.roots[1].id);
    forged.keks[0].wraps.retain(|w| w.root != forged.roots[1].id);
    forged.roots.truncate(1);
    disk.replace_raw(".envelopefs/keyring.b", &forged.encode(|_| [7; 32]).unwrap()).unwrap();
    assert!(open(&disk, &[&c]).is_ok());
}

#[test]
fn a_destroyed_kek_is_gone_from_memory_at_once_and_claimed_to_be_gone_when_no_copy_has_it() {
    let (disk, a, keys) = fresh();
    let (old, _) = rotate(&disk, &keys);
    let wrap = keys.snapshot().kek(old).unwrap().wraps[0].bytes.clone();
    let has_it = |disk: &SimDisk| raw(disk).iter().any(|copy| holds(copy, &wrap));
    second_copy_fails(&disk);
    let destroyed = keys.destroy(&disk, old, &Confirmation::default());
    assert!(matches!(&destroyed, Err(e @ StoreError::CopyLeft(_)) if e.code() == "keyring-copy-old"), "{destroyed:?}");
    assert!(has_it(&disk) && !keys.state.read().opened.handles.contains_key(&old));
    assert_eq!(use_of(&keys, old), Err("kek-destroyed".to_owned()));
    assert!(keys.destroy(&disk, old, &Confirmation::default()).is_err());
    disk.clear_faults();
    // By a process that knows of it, or by one that finds it.
    let after = disk.crash_process();
    let again = open(&after, &[&a]).unwrap();
    assert!(again.copy_is_left());
    again.destroy(&after, old, &Confirmation::default()).unwrap();
    keys.destroy(&disk, old, &Confirmation::default()).unwrap();
    assert!(!has_it(&disk) && !has_it(&after));
}

#[test]
fn a_floor_and_a_quorum_that_an_old_copy_does_not_know_are_set_again_until_it_does() {
    let (disk, _, keys) = fresh();
    let b = Scripted::new("b");
    keys.add_root_key(&disk, &dynamic(&[&b])[0], &Confirmation::default()).unwrap();
    let floor = |disk: &SimDisk| keys.set_floor(disk, Some(active_id(&keys)));
    let quorum = |disk: &SimDisk| keys.set_quorum(disk, 2, &keys.confirm(&dynamic(&[&b])).unwrap());
    for set in [&floor as &dyn Fn(&SimDisk) -> Result<()>, &quorum] {
        second_copy_fails(&disk);
        for _ in 0..2 {
            assert!(matches!(set(&disk), Err(StoreError::CopyLeft(_))));
        }
        disk.clear_faults();
        set(&disk).unwrap();
        let [x, y] = raw(&disk);
        assert_eq!(x, y);
        let generation = keys.snapshot().generation;
        set(&disk).unwrap();
        assert_eq!(keys.snapshot().generation, generation, "nothing is written for nothing");
    }
    assert_eq!((keys.snapshot().life.floor, keys.snapshot().life.quorum), (Some(active_id(&keys)), 2));
}

/// While nothing could be read, what was taken back was the newest copy itself: it was removed, and the next open found an
/// older keyring, without the active KEK.
#[test]
fn a_copy_that_cannot_be_read_for_a_while_is_not_taken_away() {
    let (disk, a, keys) = fresh();
    let old = active_id(&keys);
    let new = keys.stage(&disk, KekKind::Sealed, &[]).unwrap();
    second_copy_fails(&disk);
    keys.activate(&disk, new).unwrap();
    disk.clear_faults();
    let before = raw(&disk);
    disk.fail_from(Some(Op::Read), 0, libc::EIO);
    disk.fail_from(Some(Op::Create), 0, libc::EIO);
    let failed = keys.retire(&disk, old);
    assert!(matches!(failed, Err(StoreError::Backing(_))), "{failed:?}");
    disk.clear_faults();
    assert_eq!(raw(&disk), before);
    assert_eq!(active_id(&open(&disk, &[&a]).unwrap()), new);
    // Nor if the first thing that can be read again is what is to be taken back.
    let reads = std::sync::atomic::AtomicU64::new(0);
    let flaky = disk.clone();
    disk.fail_from(Some(Op::Read), 0, libc::EIO);
    disk.fail_next_late(Some(Op::SyncDir), 0, libc::EIO);
    disk.set_hook(Some(Arc::new(move |m| {
        if m == Moment::Before(Op::Write) && reads.fetch_add(1, Ordering::SeqCst) == 0 {
            flaky.clear_faults();
            flaky.fail_next_late(Some(Op::SyncDir), 0, libc::EIO);
        }
    })));
    let failed = keys.retire(&disk, old);
    disk.set_hook(None);
    disk.clear_faults();
    assert!(matches!(failed, Err(StoreError::Backing(_))), "{failed:?}");
    assert_eq!(active_id(&open(&disk, &[&a]).unwrap()), new);
    assert!(keys.mend_copies(&disk).unwrap());
    assert!(agree(&keys, &open(&disk, &[&a]).unwrap()));
    let [x, y] = raw(&disk);
    assert_eq!(x, y);
}

/// A made-up copy had the service give an error, and that was the end of it.
#[test]
fn a_forged_copy_whose_wraps_a_service_refuses_keeps_nobody_out_and_a_genuine_one_does() {
    let (disk, a, keys) = fresh();
    let denied = || Behaviour::Fail(KmsError::Denied("d".into()));
    let before = raw(&disk)[1].clone();
    let mut forged = keys.snapshot();
    forged.generation = 99;
    disk.replace_raw(".envelopefs/keyring.b", &forged.encode(|_| [7; 32]).unwrap()).unwrap();
    a.then(Call::Unwrap, denied());
    assert!(agree(&open(&disk, &[&a]).unwrap(), &keys));
    // A change that is genuine counts, also while its wraps are refused.
    disk.replace_raw(".envelopefs/keyring.b", &before).unwrap();
    keys.stage(&disk, KekKind::Sealed, &[]).unwrap();
    disk.replace_raw(".envelopefs/keyring.a", &before).unwrap();
    a.then(Call::Unwrap, denied());
    let refused = open(&disk, &[&a]);
    assert!(matches!(refused, Err(StoreError::Kms(KmsError::Denied(_)))), "{refused:?}");
    assert!(agree(&open(&disk, &[&a]).unwrap(), &keys));
}

/// Opened by the older copy while the newer one could not be read for a moment, the store had the older one written over
/// it, and with that the active KEK was one that the next rotation discards.
#[test]
fn a_newer_keyring_that_could_not_be_read_when_the_store_was_opened_is_not_written_over() {
    let (disk, a, keys) = fresh();
    let new = keys.stage(&disk, KekKind::Sealed, &[]).unwrap();
    second_copy_fails(&disk);
    keys.activate(&disk, new).unwrap();
    disk.clear_faults();
    let before = raw(&disk);
    disk.replace_raw(".envelopefs/keyring.b", b"unreadable").unwrap();
    let older = open(&disk, &[&a]).unwrap();
    assert!(older.copy_is_left() && active_id(&older) != new);
    disk.replace_raw(".envelopefs/keyring.b", &before[1]).unwrap();
    let refused = |r: Result<()>| match r {
        Err(StoreError::KeyState(why) | StoreError::CopyLeft(why)) => {
            assert!(why.contains("open the store again"), "{why}")
        }
        other => panic!("{other:?}"),
    };
    refused(older.mend_copies(&disk).map(drop));
    refused(older.discard_pending(&disk, new));
    assert_eq!(raw(&disk), before);
    assert_eq!(active_id(&open(&disk, &[&a]).unwrap()), new);
    assert!(keys.mend_copies(&disk).unwrap());
}
