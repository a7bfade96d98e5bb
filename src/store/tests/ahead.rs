//! What is done ahead of need, with a service that does as it is told, and counts.

use super::outage::{DAY, Rig, arena_holds, denied, kms};
use crate::backing::sim::{Moment, Op};
use crate::format::header::SlotPair;
use crate::format::ids::{FileId, KekId};
use crate::kms::KmsError;
use crate::kms::event::{self, Caller, DekUse, Observer, Operation, on_behalf_of};
use crate::kms::scripted::{Behaviour, Call, Gate};
use crate::store::StoreError;
use crate::store::keys::authority::Change;
use crate::store::keys::{KekKind, PoolStats};
use crate::store::rekey::Rekeyed;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Long enough for anything that does not hang.
const END: Duration = Duration::from_secs(60);

/// A store whose thread works ahead of need, until this is dropped.
struct Working {
    rig: Rig,
    thread: Option<JoinHandle<()>>,
}

impl std::ops::Deref for Working {
    type Target = Rig;

    fn deref(&self) -> &Rig {
        &self.rig
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.rig.service.always(Behaviour::Obey);
        self.rig.store.stop_working_ahead(END);
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

impl Working {
    fn new(grace: Duration, pool: usize) -> Self {
        let rig = Rig::new(KekKind::External, grace);
        rig.keys().pool().set_max(pool);
        let store = rig.store.clone();
        let thread = Some(std::thread::spawn(move || store.work_ahead()));
        while !rig.store.shared().ahead.is_served() {
            std::thread::yield_now();
        }
        Self { rig, thread }
    }

    fn settled(&self) -> PoolStats {
        assert!(self.store.shared().ahead.wait_until_idle(END));
        self.keys().pool().stats()
    }

    /// One with keys ready for four files.
    fn with_four(grace: Duration) -> Self {
        let w = Self::new(grace, 64);
        drop(w.make("first", b"first"));
        assert_eq!(w.settled(), PoolStats { ready: 4, hits: 0, misses: 1 });
        w
    }

    /// Which KEK wraps which file, from the disk.
    fn headers(&self) -> BTreeMap<FileId, KekId> {
        let files = self.disk.files();
        let slots = files.iter().filter_map(|p| {
            let bytes = self.disk.read_raw(p).ok()?;
            let pair = SlotPair::decode(&bytes).ok()?;
            pair.authoritative().ok().map(|(_, s)| (s.file, s.kek))
        });
        let all: Vec<_> = slots.collect();
        let by_file: BTreeMap<_, _> = all.iter().copied().collect();
        assert_eq!(all.len(), by_file.len(), "two files have one identity");
        by_file
    }
}

#[test]
fn a_file_is_made_without_waiting_for_the_service_while_a_key_is_ready() {
    let w = Working::with_four(DAY);
    assert_eq!(w.calls(), (2 + 1 + 4, 4 + 2), "one for the first file, four for the pool, none to prove them");
    // Nothing is answered from here on: what waits for an answer, hangs.
    let gate = Gate::new();
    w.service.always(Behaviour::Hold(gate.clone()));
    let made: Vec<_> = (0..4).map(|n| w.make(&format!("f{n}"), &[n; 5000])).collect();
    assert_eq!(w.keys().pool().stats().hits, 4);
    gate.open();
    w.service.always(Behaviour::Obey);
    w.settled();
    let nodes: Vec<_> = made.into_iter().map(|(node, _)| node).collect();
    w.store.forget_idle_keys();
    for (n, node) in nodes.iter().enumerate() {
        assert_eq!(w.read(node).unwrap(), [n as u8; 5000], "it opens from its header");
    }
    assert_eq!(w.headers().len(), 5);
}

/// A rekey of a whole store would have emptied it for whoever makes a file meanwhile.
#[test]
fn a_rekey_leaves_the_pool_to_users() {
    let w = Working::with_four(DAY);
    let name = w.store.name_of(&w.store.root(), b"first").unwrap();
    let (before, stats) = (w.calls(), w.settled());
    assert!(matches!(w.store.rekey(&name, &|_| Ok(())).unwrap(), Rekeyed::Done { .. }));
    assert_eq!(w.settled(), stats);
    assert_eq!(w.calls().0 - before.0, 1, "it has its own key wrapped");
    // Emptied in the moment before the copy began: that key is nobody's.
    let f = Arc::new(w.make("second", b"content").1);
    // Not closed by the end of the hook.
    let _open = Arc::clone(&f);
    let stats = w.settled();
    w.disk.set_hook(Some(Arc::new(move |m| {
        if m == Moment::Before(Op::Create) {
            f.set_len(0).unwrap();
        }
    })));
    let name = w.store.name_of(&w.store.root(), b"second").unwrap();
    assert_eq!(w.store.rekey(&name, &|_| Ok(())).unwrap(), Rekeyed::Empty);
    w.disk.set_hook(None);
    assert_eq!(w.settled(), stats);
}

#[test]
fn the_pool_of_a_sealed_store_and_one_that_nobody_fills_stay_empty() {
    for (kind, max) in [(KekKind::Sealed, 64), (KekKind::External, 0)] {
        let w = Working::new(DAY, max);
        if kind == KekKind::Sealed {
            let kek = w.keys().stage(&w.disk, kind, &[]).unwrap();
            w.keys().activate(&w.disk, kek).unwrap();
        }
        let before = w.calls();
        (0..9).for_each(|n| drop(w.make(&format!("f{n}"), b"x")));
        assert_eq!(w.settled(), PoolStats::default());
        assert_eq!(w.calls().0 - before.0, if kind == KekKind::Sealed { 0 } else { 9 });
    }
    // Without the thread each file makes its own call, as ever.
    let rig = Rig::new(KekKind::External, DAY);
    rig.keys().pool().set_max(64);
    let before = rig.calls();
    (0..9).for_each(|n| drop(rig.make(&format!("f{n}"), b"x")));
    assert_eq!(rig.calls().0 - before.0, 9);
}

#[test]
fn no_key_is_given_to_two_files() {
    let w = Working::new(DAY, 16);
    let before = w.calls().0;
    std::thread::scope(|s| {
        for t in 0..4 {
            let w = &w;
            s.spawn(move || (0..50).for_each(|n| drop(w.make(&format!("{t}-{n}"), b"x"))));
        }
    });
    let stats = w.settled();
    assert_eq!(w.headers().len(), 200);
    assert_eq!((stats.hits + stats.misses, stats.misses >= 1), (200, true));
    assert_eq!(w.calls().0 - before, stats.misses as usize + stats.hits as usize + stats.ready, "none is lost either");
}

#[test]
fn an_activation_while_files_are_made_leaves_no_header_under_the_old_kek_on_its_way() {
    let w = Working::new(DAY, 16);
    let (stop, made) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut before = Vec::new();
    std::thread::scope(|s| {
        for t in 0..3 {
            let (w, stop, made) = (&w, &stop, &made);
            s.spawn(move || {
                for n in 0.. {
                    drop(w.make(&format!("{t}-{n}"), b"x"));
                    made.fetch_add(1, Ordering::SeqCst);
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                }
            });
        }
        for kind in [KekKind::External, KekKind::Sealed, KekKind::External, KekKind::External] {
            let enough = made.load(Ordering::SeqCst) + 30;
            while made.load(Ordering::SeqCst) < enough {
                std::thread::yield_now();
            }
            let old = w.keys().with_active(|k| k.id());
            let kek = w.keys().stage(&w.disk, kind, &[]).unwrap();
            w.keys().activate(&w.disk, kek).unwrap();
            let under_old = w.headers().into_iter().filter(|(_, k)| *k == old).count();
            before.push((old, under_old));
        }
        stop.store(true, Ordering::SeqCst);
    });
    w.settled();
    let end = w.headers();
    for (kek, n) in before {
        assert_eq!(end.values().filter(|k| **k == kek).count(), n, "none came after the activation");
    }
    let active = w.keys().with_active(|k| k.id());
    drop(w.make("last", b"x"));
    let new: Vec<_> = w.headers().into_iter().filter(|(f, _)| !end.contains_key(f)).collect();
    assert_eq!(new.iter().map(|(_, k)| *k).collect::<Vec<_>>(), [active]);
}

#[test]
fn another_active_kek_a_lock_and_the_end_empty_the_pool() {
    let w = Working::with_four(DAY);
    let kek = w.keys().stage(&w.disk, KekKind::External, &[]).unwrap();
    assert_eq!(w.keys().pool().stats().ready, 4);
    w.keys().activate(&w.disk, kek).unwrap();
    assert_eq!(w.keys().pool().stats().ready, 0);

    let w = Working::with_four(DAY);
    let deks = w.keys().pool().keys_for_tests();
    assert!(deks.len() == 4 && deks.iter().all(arena_holds));
    w.lock();
    assert!(!deks.iter().any(arena_holds));
    w.unlock();
    assert_eq!(w.keys().pool().stats().ready, 0);
    drop(w.make("second", b"x"));
    assert!(w.settled().ready > 0, "and it is filled again when files are made again");

    w.store.stop_working_ahead(END);
    assert_eq!(w.keys().pool().stats().ready, 0);
    drop(w.make("third", b"x"));
    assert_eq!(w.settled().ready, 0);
}

/// A lock that comes while a key is being made waits for it, and it does not come into the pool.
#[test]
fn a_key_that_is_being_made_while_the_store_is_locked_does_not_outlive_the_lock() {
    let w = Working::new(DAY, 64);
    let gate = Gate::new();
    w.service.then(Call::Wrap, Behaviour::Obey);
    for _ in 0..4 {
        w.service.then(Call::Wrap, Behaviour::Hold(gate.clone()));
    }
    drop(w.make("first", b"first"));
    gate.wait_for(4);
    std::thread::scope(|s| {
        let lock = s.spawn(|| w.lock());
        gate.open();
        lock.join().unwrap();
    });
    assert_eq!(w.settled().ready, 0);
}

#[test]
fn after_a_refusal_no_file_is_made_from_the_pool() {
    // Of the active KEK, by a refresh.
    let w = Working::with_four(DAY);
    w.service.always(denied());
    assert_eq!(w.keys().ask_service(), Change::Refused);
    assert_eq!(w.keys().pool().stats().ready, 0);

    // Of one file, before any refresh.
    let w = Working::with_four(DAY);
    let cold = w.make_cold("cold", b"cold");
    drop(w.make("second", b"x"));
    assert!(w.settled().ready > 0);
    w.store.shared().deks.clear();
    w.service.then(Call::Unwrap, denied());
    assert!(matches!(kms(w.read(&cold)), KmsError::Denied(_)));
    assert_eq!(w.keys().pool().stats().ready, 0);

    // Of a key for the pool.
    let w = Working::with_four(DAY);
    w.service.always(denied());
    (0..2).for_each(|n| drop(w.make(&format!("f{n}"), b"x")));
    assert_eq!(w.settled().ready, 0);
    w.service.always(Behaviour::Obey);
    let before = w.calls().0;
    drop(w.make("third", b"x"));
    assert!(w.calls().0 > before, "that one asked the service itself, which says yes again");
    assert!(w.settled().ready > 0);
}

#[test]
fn in_an_outage_files_are_made_while_keys_are_ready_and_get_them_with_their_first_write() {
    let w = Working::with_four(DAY);
    let cold = w.make_cold("cold", b"cold");
    assert_eq!(w.settled().ready, 0, "forgetting idle keys empties the pool too");
    drop(w.make("more", b"more"));
    let ready = w.settled().ready;
    assert!(ready >= 3);
    w.service.outage();
    assert!(w.read(&cold).is_err());
    let root = w.store.root();
    let create = |n: usize| w.store.create(&root, format!("f{n}").as_bytes(), 0o600, 0, None);
    let made: Vec<_> = (0..ready).map(|n| create(n).unwrap().2).collect();
    assert!(matches!(kms(create(99)), KmsError::Unreachable(_)), "none is left, and nobody would hear of a lost write");
    assert!(made[1..].iter().all(|f| f.write(0, b"written later").is_ok()));
    // The one that is closed without a first byte gives its key back.
    drop(made);
    let (node, _, f) = create(100).unwrap();
    f.write(0, b"another").unwrap();
    drop(f);
    w.service.always(Behaviour::Obey);
    w.keys().ask_service();
    w.store.forget_idle_keys();
    assert_eq!(w.read(&node).unwrap(), b"another");
    for n in 1..ready {
        let (node, _) = w.store.lookup(&root, format!("f{n}").as_bytes()).unwrap();
        assert_eq!(w.read(&node).unwrap(), b"written later");
    }
    w.headers();
}

#[test]
fn a_create_that_fails_in_an_outage_uses_no_key_up() {
    let w = Working::with_four(DAY);
    w.service.outage();
    w.keys().ask_service();
    let again = w.store.create(&w.store.root(), b"first", 0o600, 0, None);
    assert!(matches!(again, Err(StoreError::Exists)));
    assert_eq!(w.keys().pool().stats(), PoolStats { ready: 4, hits: 0, misses: 1 });
}

#[test]
fn after_the_grace_no_file_is_made_whatever_is_ready() {
    let w = Working::with_four(Duration::ZERO);
    w.service.outage();
    w.keys().ask_service();
    assert_eq!(w.keys().pool().stats().ready, 4);
    let root = w.store.root();
    assert!(matches!(kms(w.store.create(&root, b"new", 0o600, 0, None)), KmsError::Unreachable(_)));
}

/// A file made in an outage whose KEK is not the active one any more when its first byte comes.
#[test]
fn a_key_that_was_put_by_is_not_used_under_a_kek_that_is_not_active_any_more() {
    let w = Working::with_four(DAY);
    w.service.outage();
    w.keys().ask_service();
    let (node, _, f) = w.store.create(&w.store.root(), b"new", 0o600, 0, None).unwrap();
    w.service.always(Behaviour::Obey);
    w.keys().ask_service();
    let kek = w.keys().stage(&w.disk, KekKind::External, &[]).unwrap();
    let before = w.headers();
    w.keys().activate(&w.disk, kek).unwrap();
    f.write(0, b"x").unwrap();
    let new: Vec<KekId> = w.headers().into_iter().filter(|(f, _)| !before.contains_key(f)).map(|(_, k)| k).collect();
    assert_eq!(new, [kek]);
    drop(f);
    assert_eq!(w.read(&node).unwrap(), b"x");
}

#[test]
fn a_key_that_was_put_by_goes_with_a_lock() {
    let w = Working::with_four(DAY);
    w.service.outage();
    w.keys().ask_service();
    let deks = w.keys().pool().keys_for_tests();
    let (node, _, f) = w.store.create(&w.store.root(), b"new", 0o600, 0, None).unwrap();
    w.lock();
    assert!(!deks.iter().any(arena_holds));
    assert!(matches!(f.write(0, b"x"), Err(StoreError::KeysLocked)));
    w.service.always(Behaviour::Obey);
    w.unlock();
    f.write(0, b"x").unwrap();
    drop(f);
    assert_eq!(w.read(&node).unwrap(), b"x");
}

/// A file without content, and the thread that gives it its first byte, with the call for its key under way.
fn first_write<'s>(
    w: &'s Working,
    s: &'s std::thread::Scope<'s, '_>,
) -> (Arc<crate::store::Node<crate::backing::sim::SimDisk>>, Arc<Gate>, std::thread::ScopedJoinHandle<'s, ()>) {
    let gate = Gate::new();
    let (node, _, f) = w.store.create(&w.store.root(), b"new", 0o600, 0, None).unwrap();
    w.service.then(Call::Wrap, Behaviour::Hold(gate.clone()));
    let writes = s.spawn(move || assert_eq!(f.write(0, b"first").unwrap(), 5));
    gate.wait_for(1);
    (node, gate, writes)
}

#[test]
fn the_call_for_a_new_file_holds_up_neither_an_activation_nor_a_file_that_shares_its_lock() {
    let w = Working::new(DAY, 0);
    let kek = w.keys().stage(&w.disk, KekKind::External, &[]).unwrap();
    let before = w.calls().0;
    std::thread::scope(|s| {
        let (node, gate, writes) = first_write(&w, s);
        let (dev, ino) = node.key();
        drop(w.store.shared().inode_locks.exclusive(dev, ino));
        w.keys().activate(&w.disk, kek).unwrap();
        gate.open();
        writes.join().unwrap();
        assert_eq!(w.headers().into_values().collect::<Vec<_>>(), [kek], "nothing is under the old KEK");
        assert_eq!(w.calls().0 - before, 2, "so it is wrapped once more");
        w.store.forget_idle_keys();
        assert_eq!(w.read(&node).unwrap(), b"first");
    });
}

#[test]
fn an_activation_does_not_wait_for_the_pool_whose_keys_then_are_of_no_use() {
    let w = Working::new(DAY, 64);
    let kek = w.keys().stage(&w.disk, KekKind::External, &[]).unwrap();
    let gate = Gate::new();
    w.service.then(Call::Wrap, Behaviour::Obey);
    (0..4).for_each(|_| drop(w.service.then(Call::Wrap, Behaviour::Hold(gate.clone())).calls()));
    drop(w.make("first", b"first"));
    gate.wait_for(4);
    w.keys().activate(&w.disk, kek).unwrap();
    gate.open();
    assert_eq!(w.settled().ready, 0);
}

#[test]
fn a_key_that_was_put_by_does_not_get_around_a_refusal() {
    let w = Working::with_four(DAY);
    w.service.outage();
    w.keys().ask_service();
    let (_, _, f) = w.store.create(&w.store.root(), b"new", 0o600, 0, None).unwrap();
    w.service.always(denied());
    assert_eq!(w.keys().ask_service(), Change::Refused);
    drop(f);
    assert_eq!(w.keys().pool().stats().ready, 0, "nor back into the pool");
}

/// A file that is kept open from one outage, through an activation, to the next: its key is no use any more.
#[test]
fn a_key_under_a_retired_kek_does_not_let_a_file_be_begun_in_an_outage() {
    let w = Working::with_four(DAY);
    w.service.outage();
    w.keys().ask_service();
    let (_, _, f) = w.store.create(&w.store.root(), b"new", 0o600, 0, None).unwrap();
    f.may_begin_anew().unwrap();
    w.service.always(Behaviour::Obey);
    w.keys().ask_service();
    let kek = w.keys().stage(&w.disk, KekKind::External, &[]).unwrap();
    w.keys().activate(&w.disk, kek).unwrap();
    w.service.outage();
    w.keys().ask_service();
    assert!(matches!(kms(f.may_begin_anew()), KmsError::Unreachable(_)));
}

type Told = (Operation, bool, FileId, Option<Caller>);

#[derive(Default)]
struct Heard(Mutex<Vec<Told>>);

impl Observer for Heard {
    fn call(&self, _: &event::Call<'_>) {}

    fn dek(&self, u: &DekUse<'_>) {
        self.0.lock().push((u.operation, u.ahead, FileId(u.file), u.caller));
    }

    fn change(&self, _: &event::Change<'_>) {}
}

#[test]
fn a_key_made_ahead_is_told_when_it_is_made_and_when_a_file_gets_it() {
    let w = Working::new(DAY, 64);
    let heard = Arc::new(Heard::default());
    w.keys().set_observer(heard.clone());
    let who = Caller { pid: 5, uid: 6 };
    on_behalf_of(who, || drop(w.make("a", b"x")));
    w.settled();
    on_behalf_of(who, || drop(w.make("b", b"x")));
    w.settled();
    let told = std::mem::take(&mut *heard.0.lock());
    let ahead: Vec<FileId> = told.iter().filter(|t| t.1).map(|t| t.2).collect();
    let wraps: Vec<&Told> = told.iter().filter(|t| !t.1).collect();
    assert_eq!((ahead.len(), wraps.len()), (4, 2));
    assert!(told.iter().all(|t| t.0 == Operation::Wrap && t.3.is_some() != t.1), "{told:?}");
    assert!(!ahead.contains(&wraps[0].2) && ahead.contains(&wraps[1].2));
}

/// Cold files, and the keys' cache as empty as after a mount.
fn cold(
    files: usize,
    window: usize,
) -> (Working, Vec<std::sync::Arc<crate::store::Node<crate::backing::sim::SimDisk>>>) {
    let w = Working::new(DAY, 0);
    let nodes = (0..files).map(|n| w.make(&format!("f{n:03}"), b"content").0).collect();
    w.store.forget_idle_keys();
    w.store.shared().ahead.set_window(window);
    (w, nodes)
}

#[test]
fn files_opened_one_after_another_find_their_keys_unwrapped() {
    let (w, nodes) = cold(60, 32);
    let before = w.calls().1;
    let mut waited = 0;
    for n in &nodes {
        let open = w.store.open_file(n, crate::backing::Access::Read).unwrap();
        waited += usize::from(open.took_a_call());
        // As slow as a user is who does something with the file.
        w.settled();
    }
    assert_eq!((waited, w.calls().1 - before), (2, 60), "each key is unwrapped once, and two opens waited for it");
    let (w, nodes) = cold(60, 0);
    let took = |n| w.store.open_file(n, crate::backing::Access::Read).unwrap().took_a_call();
    assert_eq!(nodes.iter().filter(|n| took(n)).count(), 60, "switched off, each waits");
}

#[test]
fn the_calls_for_files_that_come_next_are_under_way_at_once() {
    let (w, nodes) = cold(60, 32);
    w.read(&nodes[0]).unwrap();
    w.settled();
    let gate = Gate::new();
    w.service.then(Call::Unwrap, Behaviour::Obey);
    (0..4).for_each(|_| {
        w.service.then(Call::Unwrap, Behaviour::Hold(gate.clone()));
    });
    w.read(&nodes[1]).unwrap();
    gate.wait_for(4);
    gate.open();
    w.settled();
    let before = w.calls();
    (2..4).for_each(|n| drop(w.read(&nodes[n]).unwrap()));
    w.settled();
    assert!(w.calls().1 > before.1, "and the window grows");
}

#[test]
fn opens_here_and_there_have_nothing_unwrapped_ahead() {
    let (w, nodes) = cold(60, 32);
    let before = w.calls().1;
    for n in [7, 40, 3, 59, 21, 50, 12] {
        w.read(&nodes[n]).unwrap();
        w.settled();
    }
    assert_eq!(w.calls().1 - before, 7);
}

#[test]
fn nothing_is_unwrapped_ahead_after_a_refusal_in_an_outage_or_behind_a_lock() {
    let (w, nodes) = cold(60, 32);
    let run = || {
        for n in &nodes[..2] {
            let _ = w.read(n);
            w.settled();
        }
    };
    w.service.then(Call::Unwrap, denied()).then(Call::Unwrap, denied());
    let before = w.calls().1;
    run();
    assert_eq!(w.calls().1 - before, 2, "the two opens themselves");
    w.service.outage();
    let before = w.calls().1;
    run();
    assert!(w.calls().1 - before <= 2);
    w.service.always(Behaviour::Obey);
    w.keys().ask_service();
    // A key that is on its way when the store is locked does not stay.
    let gate = Gate::new();
    w.service.then(Call::Unwrap, Behaviour::Obey).then(Call::Unwrap, Behaviour::Obey);
    (0..4).for_each(|_| {
        w.service.then(Call::Unwrap, Behaviour::Hold(gate.clone()));
    });
    w.store.forget_idle_keys();
    // The second one's place is judged by the first one's, which is to be known by then.
    w.read(&nodes[30]).unwrap();
    w.settled();
    w.read(&nodes[31]).unwrap();
    gate.wait_for(4);
    std::thread::scope(|s| {
        let lock = s.spawn(|| w.lock());
        while w.keys().locked_by().is_none() {
            std::thread::yield_now();
        }
        gate.open();
        lock.join().unwrap();
    });
    w.settled();
    assert_eq!(w.store.shared().deks.stats().entries, 0);
}
