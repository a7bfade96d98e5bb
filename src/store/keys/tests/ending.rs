//! KEKs that end after a while, root keys that confirm it, and the floor.

use super::*;

const WEEK: u64 = 7 * 86_400;

fn none() -> Confirmation {
    Confirmation::default()
}

/// A keyring with one retired KEK proved unused, and that.
fn rotated() -> (SimDisk, Arc<Scripted>, Keys, KekId) {
    let (disk, s, keys) = fresh();
    let (old, _) = rotate(&disk, &keys);
    (disk, s, keys, old)
}

/// A keyring with two root keys, of which two must confirm; the first opened it.
fn guarded() -> (SimDisk, Arc<Scripted>, Arc<Scripted>, Keys, KekId) {
    let (disk, a, b) = (SimDisk::default(), Scripted::new("a"), Scripted::new("b"));
    make(&disk, &[&a, &b]);
    let keys = open(&disk, &[&a]).unwrap();
    let both = keys.confirm(&dynamic(&[&b])).unwrap();
    keys.set_quorum(&disk, 2, &both).unwrap();
    keys.connect_root(&dynamic(&[&b])[0]).unwrap();
    let (old, _) = rotate(&disk, &keys);
    (disk, a, b, keys, old)
}

fn refused<T: std::fmt::Debug>(r: Result<T>) -> String {
    match r {
        Err(StoreError::KeyState(why)) => why,
        other => panic!("{other:?}"),
    }
}

/// As if time had passed, or another program had written it.
fn edit(disk: &SimDisk, keys: &Keys, change: impl FnOnce(&mut Keyring)) {
    let mut ring = keys.snapshot();
    change(&mut ring);
    keys.adopt(disk, ring, &[]).unwrap();
}

/// Moves the times of a schedule into the past.
fn pass(disk: &SimDisk, keys: &Keys, kek: KekId, seconds: u64) {
    edit(disk, keys, |r| {
        let s = r.life.schedule_mut(kek).unwrap();
        (s.scheduled, s.due) = (s.scheduled - seconds, s.due - seconds);
        s.announced = s.announced.saturating_sub(seconds);
    });
}

fn is_there(disk: &SimDisk, kek: KekId) -> bool {
    !Keys::read_keyring(disk).unwrap().kek(kek).unwrap().wraps.is_empty()
}

#[test]
fn a_scheduled_kek_unwraps_until_it_has_waited_and_was_announced() {
    let (disk, s, keys, old) = rotated();
    let made = keys.schedule_destroy(&disk, old, WEEK, &none()).unwrap();
    assert_eq!((made.due - made.scheduled, made.announced, made.confirmed), (WEEK, 0, 1));
    assert!(refused(keys.schedule_destroy(&disk, old, 1, &none())).contains("already"));
    // A restart changes nothing.
    let keys = open(&disk, &[&s]).unwrap();
    assert_eq!(keys.snapshot().life.schedules, [made]);
    assert!(keys.kek(old).is_ok() && keys.endings_due().is_empty());
    assert!(matches!(keys.look_at_ending(&disk, old).unwrap(), Ending::NotBefore(t) if t >= made.due));
    for r in [keys.destroy(&disk, old, &none()), keys.destroy_scheduled(&disk, old)] {
        assert!(refused(r).contains("is scheduled to be destroyed"));
    }
    // Overdue at the first look: announced, and no more.
    pass(&disk, &keys, old, 3 * WEEK);
    assert_eq!(keys.endings_due(), [old]);
    let Ending::NotBefore(end) = keys.look_at_ending(&disk, old).unwrap() else { panic!() };
    assert!(end >= super::super::now() + 86_000, "a day for somebody to notice");
    assert!(refused(keys.destroy_scheduled(&disk, old)).contains("not before"));
    let keys = open(&disk, &[&s]).unwrap();
    assert!(keys.snapshot().life.schedule(old).unwrap().announced > 0);
    assert!(keys.endings_due().is_empty(), "announced once");
    pass(&disk, &keys, old, 86_400);
    assert_eq!(keys.look_at_ending(&disk, old).unwrap(), Ending::Come);
    keys.destroy_scheduled(&disk, old).unwrap();
    assert!(!is_there(&disk, old) && keys.snapshot().life.is_empty());
    assert_eq!(keys.look_at_ending(&disk, old).unwrap(), Ending::Unscheduled);
    assert!(refused(keys.schedule_destroy(&disk, old, 1, &none())).contains("destroyed already"));
}

#[test]
fn what_is_not_retired_and_proved_unused_is_not_scheduled() {
    let (disk, _, keys) = fresh();
    let first = active_id(&keys);
    assert!(refused(keys.schedule_destroy(&disk, first, WEEK, &none())).contains("is not retired"));
    let new = keys.stage(&disk, KekKind::Sealed, &[]).unwrap();
    assert!(refused(keys.schedule_destroy(&disk, new, WEEK, &none())).contains("is not retired"));
    keys.activate(&disk, new).unwrap();
    assert!(refused(keys.schedule_destroy(&disk, first, WEEK, &none())).contains("may still be needed"));
    keys.retire(&disk, first).unwrap();
    assert!(refused(keys.schedule_destroy(&disk, first, WAIT_MAX + 1, &none())).contains("hundred years"));
    keys.schedule_destroy(&disk, first, WAIT_MAX, &none()).unwrap();
}

#[test]
fn what_was_cancelled_stays_even_if_a_scan_for_it_was_under_way() {
    let (disk, s, keys, old) = rotated();
    keys.schedule_destroy(&disk, old, 0, &none()).unwrap();
    assert_eq!(keys.look_at_ending(&disk, old).unwrap(), Ending::Come);
    // Somebody scans, and somebody else cancels.
    assert!(keys.cancel_destroy(&disk, old).unwrap());
    assert!(!keys.cancel_destroy(&disk, old).unwrap());
    assert!(refused(keys.destroy_scheduled(&disk, old)).ends_with("any more"));
    // Scheduled anew meanwhile, it is another decision.
    keys.schedule_destroy(&disk, old, WEEK, &none()).unwrap();
    assert!(refused(keys.destroy_scheduled(&disk, old)).contains("not before"));
    assert!(is_there(&disk, old));
    keys.cancel_destroy(&disk, old).unwrap();
    assert!(open(&disk, &[&s]).unwrap().snapshot().life.is_empty(), "an older program opens it again");
    assert!(matches!(keys.cancel_destroy(&disk, KekId([9; 16])), Err(StoreError::Damage(Damage::KekUnknown(_)))));
}

#[test]
fn a_clock_that_was_put_back_takes_the_announcement_back() {
    let (disk, _, keys, old) = rotated();
    keys.schedule_destroy(&disk, old, WEEK, &none()).unwrap();
    edit(&disk, &keys, |r| r.life.schedule_mut(old).unwrap().announced = super::super::now() + 900 * WEEK);
    assert_eq!(keys.endings_due(), [old]);
    assert!(matches!(keys.look_at_ending(&disk, old).unwrap(), Ending::NotBefore(_)));
    assert_eq!(keys.snapshot().life.schedule(old).unwrap().announced, 0);
}

#[test]
fn a_use_is_written_down_once() {
    let (disk, s, keys, old) = rotated();
    keys.note_use(old);
    assert!(keys.endings_due().is_empty(), "not scheduled");
    keys.schedule_destroy(&disk, old, WEEK, &none()).unwrap();
    keys.record_use(&disk, old).unwrap();
    assert_eq!(keys.snapshot().life.schedule(old).unwrap().used, 0);
    keys.note_use(old);
    assert_eq!(keys.endings_due(), [old]);
    keys.record_use(&disk, old).unwrap();
    let (used, generation) = (keys.snapshot().life.schedule(old).unwrap().used, keys.snapshot().generation);
    assert!(used > 0);
    keys.note_use(old);
    keys.record_use(&disk, old).unwrap();
    assert_eq!(open(&disk, &[&s]).unwrap().snapshot().generation, generation);
    assert!(keys.endings_due().is_empty());
}

#[test]
fn a_keyring_that_is_put_back_destroys_nothing() {
    let (disk, s, keys, old) = rotated();
    edit(&disk, &keys, |r| {
        r.life.floor = Some(old);
        r.life.schedules.push(crate::format::lifecycle::Schedule {
            kek: old,
            confirmed: 1,
            scheduled: 1,
            due: 2,
            announced: 2,
            used: 0,
        });
    });
    let copy = Keys::export(&disk).unwrap();
    let put_back = Keys::import(&disk, &copy.bytes, &dynamic(&[&s]), true, |_| Ok(())).unwrap().keys.snapshot();
    assert_eq!((put_back.life.schedules, put_back.life.floor), (vec![], Some(old)));
}

#[test]
fn one_root_key_is_refused_and_two_that_differ_are_heard() {
    let (disk, a, b, keys, old) = guarded();
    let stranger = Scripted::new("x");
    let says = "this store requires 2 different root keys to confirm this, and there is 1: name another with --confirm";
    let too_few = [none(), keys.confirm(&[]).unwrap(), keys.confirm(&dynamic(&[&a, &a])).unwrap()];
    for c in &too_few {
        assert_eq!(c.count(), 1);
        assert_eq!(refused(keys.destroy(&disk, old, c)), says);
        assert_eq!(refused(keys.schedule_destroy(&disk, old, 1, c)), says);
        assert_eq!(refused(keys.set_quorum(&disk, 1, c)), says);
        assert_eq!(refused(keys.add_root_key(&disk, &dynamic(&[&stranger])[0], c)), says);
    }
    assert!(refused(keys.stage(&disk, KekKind::Sealed, &dynamic(&[&stranger]))).contains("key add --confirm"));
    assert!(refused(keys.remove_root_key(&disk, keys.snapshot().roots[1].id)).contains("fewer would be left"));
    assert!(matches!(keys.confirm(&dynamic(&[&stranger])), Err(StoreError::WrongKey(_))));
    let both = keys.confirm(&dynamic(&[&a, &b, &b])).unwrap();
    assert_eq!(both.count(), 2);
    assert!(refused(keys.set_quorum(&disk, 3, &both)).contains("requires 3"), "it could not be met");
    assert!(refused(keys.set_quorum(&disk, 17, &both)).contains("1 to 16"));
    keys.destroy(&disk, old, &both).unwrap();
    keys.set_quorum(&disk, 1, &both).unwrap();
    assert!(keys.snapshot().life.is_empty());
}

#[test]
fn a_root_key_confirms_by_a_call_of_its_own_now() {
    let (_, a, b, keys, _) = guarded();
    let (asked_a, asked_b) = (a.count(Call::Unwrap), b.count(Call::Unwrap));
    keys.confirm(&dynamic(&[&b])).unwrap();
    assert!(a.count(Call::Unwrap) > asked_a && b.count(Call::Unwrap) > asked_b);
    b.outage();
    assert!(matches!(keys.confirm(&dynamic(&[&b])), Err(StoreError::Kms(KmsError::Unreachable(_)))));
    b.always(Behaviour::AnotherKey);
    assert!(matches!(keys.confirm(&dynamic(&[&b])), Err(StoreError::WrongKey(_))));
}

#[test]
fn one_key_under_two_names_counts_once() {
    let dir = tempfile::tempdir().unwrap();
    let uri =
        |name: &str| crate::kms::RootKeyUri::parse(&format!("keyfile:{}", dir.path().join(name).display())).unwrap();
    let connect = |name, create| crate::kms::connect(&uri(name), &Default::default(), create).unwrap();
    let first = connect("a", true);
    std::fs::copy(dir.path().join("a"), dir.path().join("copy")).unwrap();
    let (copy, other) = (connect("copy", false), connect("b", true));
    let disk = SimDisk::default();
    let given = [first, copy.clone(), other.clone()];
    let keys = Keys::create(&disk, &given, KekKind::Sealed, StoreFlags::default()).unwrap();
    assert_eq!(keys.snapshot().roots.len(), 3);
    assert_eq!(keys.confirm(&[copy]).unwrap().count(), 1);
    assert_eq!(keys.confirm(&[other]).unwrap().count(), 2);
}

#[test]
fn what_was_scheduled_on_the_word_of_one_does_not_end_in_a_store_that_wants_two_by_then() {
    let (disk, _, b, keys, old) = guarded();
    let both = keys.confirm(&dynamic(&[&b])).unwrap();
    assert_eq!(keys.schedule_destroy(&disk, old, 0, &both).unwrap().confirmed, 2);
    edit(&disk, &keys, |r| r.life.schedule_mut(old).unwrap().confirmed = 1);
    assert!(refused(keys.look_at_ending(&disk, old)).contains("cancel that and schedule it again"));
    assert!(refused(keys.destroy_scheduled(&disk, old)).contains("cancel that"));
    assert!(is_there(&disk, old));
    edit(&disk, &keys, |r| r.life.schedule_mut(old).unwrap().confirmed = 2);
    keys.destroy_scheduled(&disk, old).unwrap();
}

#[test]
fn below_the_floor_nothing_opens_and_everything_can_be_moved() {
    let (disk, s, keys, old) = rotated();
    let active = active_id(&keys);
    let below = |keys: &Keys| matches!(keys.kek(old), Err(StoreError::Damage(Damage::KekBelowFloor(id))) if id == old);
    keys.set_floor(&disk, Some(active)).unwrap();
    assert!(below(&keys) && keys.kek(active).is_ok() && keys.kek_to_move(old).is_ok());
    let again = open(&disk, &[&s]).unwrap();
    assert!(below(&again));
    again.set_floor(&disk, Some(old)).unwrap();
    assert!(again.kek(old).is_ok());
    again.set_floor(&disk, None).unwrap();
    assert!(again.snapshot().life.is_empty());
    let new = again.stage(&disk, KekKind::Sealed, &[]).unwrap();
    assert!(refused(again.set_floor(&disk, Some(new))).contains("is pending"));
    again.destroy(&disk, old, &none()).unwrap();
    assert!(refused(again.set_floor(&disk, Some(old))).contains("was destroyed"));
    assert!(matches!(again.set_floor(&disk, Some(KekId([9; 16]))), Err(StoreError::Damage(Damage::KekUnknown(_)))));
}

#[test]
fn a_copy_that_is_put_back_lifts_neither_quorum_nor_floor() {
    let (disk, s, keys, old) = rotated();
    let life = |quorum, floor| crate::format::lifecycle::LifeCycle { quorum, floor, schedules: vec![] };
    let put_back = |copy: &[u8]| {
        let keys = Keys::import(&disk, copy, &dynamic(&[&s]), true, |_| Ok(())).unwrap().keys;
        assert_eq!(open(&disk, &[&s]).unwrap().snapshot(), keys.snapshot());
        keys
    };
    let (copy, active) = (Keys::export(&disk).unwrap().bytes, active_id(&keys));
    edit(&disk, &keys, |r| r.life = life(2, Some(active)));
    let keys = put_back(&copy);
    assert_eq!(keys.snapshot().life, life(2, Some(active)));
    // Nor does it lower what it asks for itself.
    edit(&disk, &keys, |r| r.life = life(3, Some(active)));
    let strict = Keys::export(&disk).unwrap().bytes;
    edit(&disk, &keys, |r| r.life = life(2, Some(old)));
    let keys = put_back(&strict);
    assert_eq!(keys.snapshot().life, life(3, Some(active)));
    // A floor at a KEK that the copy does not have cannot stand.
    let new = keys.stage(&disk, KekKind::Sealed, &[]).unwrap();
    keys.activate(&disk, new).unwrap();
    keys.set_floor(&disk, Some(new)).unwrap();
    assert_eq!(put_back(&copy).snapshot().life, life(3, None));
    // What is lost asks for nothing.
    ["a", "b"].iter().for_each(|c| disk.truncate_raw(format!(".envelopefs/keyring.{c}"), 0).unwrap());
    assert_eq!(put_back(&copy).snapshot().life, life(0, None));
}
