//! The store under test beside its reference, and a run of the rotation that others get in between.
//!
//! All that happens during a run happens at a *point* of it: before an operation on the disk that the run does with no
//! lock in its hand, behind a barrier, or while a key service is asked. Points are counted, and with one worker they are the same every time.

use super::super::*;
use super::reference::{Change, Content, Entry, Reference, UserOp, is_at_or_below, join};
use super::witness::{Header, Witness, headers, whole_files};
use crate::backing::RenameMode;
use crate::backing::sim::{Journal as SimJournal, Moment, Op, PowerCut, SimOptions};
use crate::format::damage::Damage;
use crate::format::geometry::SLOT;
use crate::format::keyring::KekState;
use crate::kms::KmsError;
use crate::kms::scripted::{Behaviour, Call};
use crate::store::StoreError;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ThreadId;
use std::time::Duration;

/// What a key service does instead of what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misdeed {
    Throttle,
    Deny,
    Disable,
    Outage,
    /// Says that it wrapped, and did not.
    Garbage,
    /// Gives another key back, and wraps another.
    WrongKey,
}

pub const MISDEEDS: [Misdeed; 6] =
    [Misdeed::Throttle, Misdeed::Deny, Misdeed::Disable, Misdeed::Outage, Misdeed::Garbage, Misdeed::WrongKey];

/// Which provider misbehaves how: from the `after`-th next wrap and unwrap on, for so many calls or until it is forgiven.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    pub who: u8,
    pub what: Misdeed,
    pub after: u8,
    pub calls: Option<u8>,
}

impl Misdeed {
    pub fn behaviour(self) -> Behaviour {
        let text = || "test".to_owned();
        match self {
            Self::Throttle => Behaviour::Fail(KmsError::Throttled(text())),
            Self::Deny => Behaviour::Fail(KmsError::Denied(text())),
            Self::Disable => Behaviour::Fail(KmsError::Disabled(text())),
            Self::Outage => Behaviour::Fail(KmsError::Unreachable(text())),
            Self::Garbage => Behaviour::Garbage,
            Self::WrongKey => Behaviour::AnotherKey,
        }
    }
}

/// How the program ends.
#[derive(Debug, Clone, Copy)]
pub enum Crash {
    Kill,
    Power { seed: u64, tear: bool },
}

/// What happens at a point of a run.
#[derive(Debug, Clone)]
pub enum Event {
    User(UserOp),
    Change(Change),
    Pause,
    Cancel,
    Fault(Fault),
    Heal,
    /// A backup tool puts back a header that it saved.
    Restore(u8),
}

/// Where the new KEK is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    AsNow,
    Sealed,
    External,
    SealedUnder(u8),
    ExternalIn(u8),
}

/// One run: what is asked for, what happens at which of its points, and before which of its writes it dies.
#[derive(Debug, Clone)]
pub struct Plan {
    pub goal: Goal,
    pub destroy_old: bool,
    pub restart: bool,
    pub dry_run: bool,
    pub events: Vec<(u16, Event)>,
    pub crash: Option<(u16, Crash)>,
    /// Which of its operations on the disk, reads among them, fails with EIO.
    pub bad_sector: Option<u16>,
}

impl Plan {
    pub fn to(goal: Goal) -> Self {
        Self {
            goal,
            destroy_old: false,
            restart: false,
            dry_run: false,
            events: Vec::new(),
            crash: None,
            bad_sector: None,
        }
    }
}

/// How a run ended.
#[derive(Debug)]
pub enum Ended {
    Report(Box<Report>),
    /// With an error that a key service's misbehaviour explains.
    Failed,
    Crashed,
}

/// The run that is under way.
struct Run {
    points: u16,
    writes: u16,
    operations: u16,
    /// Whether the last write may have changed what is in a file, or which file is where.
    has_changed: bool,
    is_dying: bool,
    events: VecDeque<(u16, Event)>,
    dies_before: Option<u16>,
    fails_at: Option<u16>,
    control: Arc<Control>,
    cancelled: bool,
    restored: bool,
    resumers: Vec<std::thread::JoinHandle<()>>,
}

/// A file as a backup tool saved it.
struct Saved {
    ino: u64,
    raw: Vec<u8>,
    content: Content,
}

pub struct World {
    pub disk: SimDisk,
    pub root: Vec<Arc<Scripted>>,
    store: Option<Arc<Store<SimDisk>>>,
    pub model: Reference,
    /// As of the last sync, and what was changed since: nothing is promised about that after a power cut.
    durable: Reference,
    dirty_names: BTreeSet<String>,
    dirty_files: BTreeSet<u64>,
    /// Files that had no content at some time since: they have another header.
    reborn: BTreeSet<u64>,
    pub witness: Witness,
    saved: Vec<Saved>,
    run: Option<Run>,
    /// Points, writes and operations of the last run.
    pub length: (u16, u16, u16),
}

/// An error that a key service which misbehaves may lead to.
fn is_of_keys(e: &StoreError) -> bool {
    let damage = |d: &Damage| matches!(d, Damage::WrapAuth(_) | Damage::Commitment | Damage::KekDestroyed(..));
    matches!(e, StoreError::Kms(_) | StoreError::WrongKey(_)) || matches!(e, StoreError::Damage(d) if damage(d))
}

impl World {
    /// A store on a new disk with a few files of each kind, everything durable.
    pub fn new(journal: SimJournal, clear_names: bool, external: bool) -> Self {
        let disk = SimDisk::new(SimOptions { journal, split_last_write: true, ..SimOptions::default() });
        let root = vec![Scripted::new("one"), Scripted::new("two")];
        let kind = if external { KekKind::External } else { KekKind::Sealed };
        Store::init(&disk, &roots(&root[0]), kind, StoreFlags { plaintext_names: clear_names }).unwrap();
        let mut w = Self {
            disk,
            root,
            store: None,
            model: Reference::default(),
            durable: Reference::default(),
            dirty_names: BTreeSet::new(),
            dirty_files: BTreeSet::new(),
            reborn: BTreeSet::new(),
            witness: Witness::default(),
            saved: Vec::new(),
            run: None,
            length: (0, 0, 0),
        };
        w.open();
        let content = |len| pattern(len, len as u8);
        for (dir, files) in [("", vec![("a", 100), ("z", 0)]), ("m", vec![("a", 4096), ("z", 9000)]), ("m/m", vec![])] {
            if !dir.is_empty() {
                w.change(&Change::Mkdir(dir.to_owned()));
            }
            for (name, len) in files {
                w.change(&Change::Create(join(dir, name)));
                w.change(&Change::Write(join(dir, name), 0, content(len)));
            }
        }
        w.change(&Change::Link("a".to_owned(), "m/m/a".to_owned()));
        w.change(&Change::Link("m/a".to_owned(), format!("m/m/{}", "l".repeat(176))));
        w.remount();
        w
    }

    /// The same world once more, as it was made: what is done to one is not done to the other.
    pub fn fork(&self) -> Self {
        let mut w = Self {
            disk: self.disk.crash_process(),
            root: self.root.clone(),
            store: None,
            model: self.model.clone(),
            durable: self.model.clone(),
            dirty_names: BTreeSet::new(),
            dirty_files: BTreeSet::new(),
            reborn: BTreeSet::new(),
            witness: Witness::default(),
            saved: Vec::new(),
            run: None,
            length: (0, 0, 0),
        };
        w.open();
        w.witness.users_changed(&w.disk);
        w
    }

    fn open(&mut self) {
        let providers: Vec<Arc<dyn KeyProvider>> = self.root.iter().map(|r| r.clone() as _).collect();
        self.store = None;
        let keys = Keys::open(&self.disk, &providers).unwrap();
        self.witness.heard_of(keys.snapshot().generation);
        self.store = Some(Store::open(self.disk.clone(), keys, StoreOptions::default()).unwrap());
    }

    pub fn store(&self) -> Arc<Store<SimDisk>> {
        self.store.clone().unwrap()
    }

    fn misdeeds(&self) -> usize {
        self.root.iter().map(|r| r.misdeeds()).sum()
    }

    pub fn heal(&self) {
        for r in &self.root {
            r.forgive();
        }
    }

    pub fn fault(&self, f: Fault) {
        let provider = &self.root[usize::from(f.who) % self.root.len()];
        for call in [Call::Wrap, Call::Unwrap, Call::Rewrap] {
            for _ in 0..f.after {
                provider.then(call, Behaviour::Obey);
            }
            // More often than any test asks is for ever.
            for _ in 0..f.calls.unwrap_or(u8::MAX) {
                provider.then(call, f.what.behaviour());
            }
        }
    }

    pub fn user(&mut self, op: &UserOp) {
        for change in self.model.decide(op) {
            if !self.change(&change) {
                return;
            }
        }
    }

    /// Has a user make the change, in the store and in the reference. `false`: a key service was in the way.
    fn change(&mut self, change: &Change) -> bool {
        let before = self.misdeeds();
        let was_lost = |p: &String| self.model.content(p).lost;
        let lost = matches!(change, Change::Write(p, ..) | Change::SetLen(p, _) | Change::Read(p) if was_lost(p));
        let done = self.in_store(change);
        let excused = lost || self.misdeeds() > before;
        self.note_dirty(change);
        let ok = match done {
            Ok(ino) => {
                self.model.apply(change, ino);
                true
            }
            Err(e) => {
                assert!(excused && is_of_keys(&e), "{change:?}: {e:?}");
                false
            }
        };
        if *change == Change::Sync {
            self.note_durable();
        }
        self.witness.users_changed(&self.disk);
        self.look(self.misdeeds() > before);
        ok
    }

    fn in_store(&self, change: &Change) -> crate::store::Result<u64> {
        let s = self.store();
        let at = |p: &str| {
            let (parent, name) = split(p);
            (dir(&s, parent), name.as_bytes().to_vec())
        };
        let node = |p: &str| {
            let (d, n) = at(p);
            s.lookup(&d, &n).unwrap().0
        };
        let rename = |a: &str, b: &str, mode| {
            let ((d1, n1), (d2, n2)) = (at(a), at(b));
            s.rename(&d1, &n1, &d2, &n2, mode)
        };
        match change {
            Change::Create(p) => {
                let (d, n) = at(p);
                return s.create(&d, &n, 0o644, 0, None).map(|(_, attr, _)| attr.ino);
            }
            Change::Write(p, offset, data) => {
                let n = s.open_file(&node(p), Access::ReadWrite)?.write(*offset, data)?;
                assert_eq!(n, data.len());
            }
            Change::SetLen(p, len) => s.open_file(&node(p), Access::ReadWrite)?.set_len(*len)?,
            Change::Mkdir(p) => {
                let (d, n) = at(p);
                s.mkdir(&d, &n, 0o755, 0, None)?;
            }
            Change::Unlink(p) => {
                let (d, n) = at(p);
                s.unlink(&d, &n)?;
            }
            Change::Rmdir(p) => {
                let (d, n) = at(p);
                s.rmdir(&d, &n)?;
            }
            Change::Rename(a, b) => rename(a, b, RenameMode::Replace)?,
            Change::Exchange(a, b) => rename(a, b, RenameMode::Exchange)?,
            Change::Link(a, b) => {
                let (d, n) = at(b);
                s.link(&node(a), &d, &n)?;
            }
            Change::Read(p) => {
                let data = read(&s, &node(p))?;
                assert!(data == self.model.content(p).data, "{p} reads otherwise");
            }
            Change::Sync => s.sync_all()?,
            Change::Settle => s.settle(Duration::ZERO)?,
        }
        Ok(0)
    }

    fn note_dirty(&mut self, change: &Change) {
        let names: &[&String] = match change {
            Change::Create(p) | Change::Mkdir(p) | Change::Unlink(p) | Change::Rmdir(p) => &[p],
            Change::Rename(a, b) | Change::Exchange(a, b) => &[a, b],
            Change::Link(_, p) => &[p],
            _ => &[],
        };
        self.dirty_names.extend(names.iter().copied().cloned());
        if let Change::Write(p, ..) | Change::SetLen(p, _) = change {
            let ino = self.model.ino(p).unwrap();
            self.dirty_files.insert(ino);
            if matches!(change, Change::SetLen(_, 0)) {
                self.reborn.insert(ino);
            }
        }
    }

    fn note_durable(&mut self) {
        self.durable = self.model.clone();
        self.dirty_names.clear();
        self.dirty_files.clear();
        self.reborn.clear();
    }

    /// Looks at the disk. A header that does not open is only to be found where a backup has been at work, or where a
    /// service `lied` just now when a header was made.
    fn look(&mut self, lied: bool) {
        let locked = self.witness.look(&self.disk, &self.root);
        if locked.is_empty() {
            return;
        }
        for h in headers(&self.disk).into_iter().filter(|h| locked.contains(&h.ino)) {
            let by_backup = h.valid().iter().all(|s| self.witness.is_brought_back(s));
            let Some(c) = self.model.files.get_mut(&h.ino) else {
                // Unlinked, and on the disk for as long as a power cut may bring it back.
                continue;
            };
            let shown = String::from_utf8_lossy(&h.path);
            assert!(c.lost || by_backup || lied, "no slot of {shown} opens");
            c.lost = true;
        }
    }

    /// The whole tree, by the store. With a key service that misbehaves some files may not be readable now.
    pub fn compare(&mut self) {
        let s = self.store();
        let before = self.misdeeds();
        for d in self.model.dirs() {
            let node = dir(&s, &d);
            let names = s.read_dir(&node).unwrap().into_iter().map(|e| e.name).filter(|n| n != b"." && n != b"..");
            let got: BTreeSet<String> = names.map(|n| join(&d, &String::from_utf8(n).unwrap())).collect();
            let want = self.model.names.keys().filter(|p| split(p).0 == d).cloned().collect();
            assert_eq!(got, want, "names in {d:?}");
        }
        for (path, entry) in &self.model.names {
            let (parent, name) = split(path);
            let (node, attr) = s.lookup(&dir(&s, parent), name.as_bytes()).unwrap();
            let Entry::File(ino) = entry else {
                assert_eq!(node.kind(), Kind::Dir, "{path}");
                continue;
            };
            assert_eq!(attr.ino, *ino, "{path} is another file");
            let c = self.model.content(path);
            match read(&s, &node) {
                Ok(data) => assert!(data == c.data, "{path} reads otherwise"),
                Err(e) => assert!((c.lost || self.misdeeds() > before) && is_of_keys(&e), "{path}: {e:?}"),
            }
        }
    }

    /// The disk after the program ended, opened again.
    pub fn crash(&mut self, crash: Crash) {
        // Whoever opens a store while its key service misbehaves is told so, or finds what there is.
        self.store = None;
        let providers: Vec<Arc<dyn KeyProvider>> = self.root.iter().map(|r| r.clone() as _).collect();
        let early = Keys::open(&self.disk.crash_process(), &providers);
        assert!(early.is_ok() || self.misdeeds() > 0, "{early:?}");
        drop(early);
        self.heal();
        match crash {
            Crash::Kill => {
                self.disk = self.disk.crash_process();
                self.open();
                self.look(false);
                self.witness.content_is_untouched(&self.disk);
                self.compare();
            }
            Crash::Power { seed, tear } => {
                let cut = if seed == 0 { PowerCut::Lose } else { PowerCut::Reorder { tear } };
                // What else might have been left of the headers.
                for n in 1..=4 {
                    let other = self.disk.crash_power(seed + n * 7919, PowerCut::Reorder { tear: true });
                    self.headers_survive(&other);
                }
                self.disk = self.disk.crash_power(seed, cut);
                self.open();
                self.find_out();
                self.change(&Change::Sync);
                self.look(false);
                self.compare();
            }
        }
    }

    /// After a power cut that left `disk`: every header that was durable opens.
    fn headers_survive(&mut self, disk: &SimDisk) {
        let locked = self.witness.look(disk, &self.root);
        for (ino, c) in &self.durable.files {
            let promised = !c.lost && !c.data.is_empty() && !self.reborn.contains(ino);
            let lost_since = self.model.files.get(ino).is_some_and(|c| c.lost);
            assert!(!promised || lost_since || !locked.contains(ino), "the header of inode {ino} was lost");
        }
    }

    /// One slot of a file's header goes bad, if both are good.
    pub fn scratch(&mut self, file: u8, second: bool) {
        let Some(ino) = self.pick_file(file) else { return };
        let Some(h) = headers(&self.disk).into_iter().find(|h| h.ino == ino) else { return };
        if h.valid().len() == 2 && !self.model.files[&ino].lost {
            self.disk.flip_bit(&h.path, if second { SLOT as u64 + 300 } else { 300 }, 2).unwrap();
            self.look(false);
        }
    }

    /// What there is after a power cut: all that was synced and not touched since, and of the rest what there happens to
    /// be. What of that is damaged is removed, as a check of the store would have it.
    fn find_out(&mut self) {
        let s = self.store();
        self.headers_survive(&self.disk.clone());
        let is_dirty = |p: &str| self.dirty_names.iter().any(|d| is_at_or_below(p, d));
        let mut found = Reference::default();
        let mut todo = vec![String::new()];
        while let Some(d) = todo.pop() {
            let parent = dir(&s, &d);
            for e in s.read_dir(&parent).unwrap().into_iter().filter(|e| e.name != b"." && e.name != b"..") {
                let path = join(&d, std::str::from_utf8(&e.name).unwrap());
                let (node, attr) = s.lookup(&parent, &e.name).unwrap();
                if node.kind() == Kind::Dir {
                    todo.push(path.clone());
                    found.names.insert(path, Entry::Dir);
                    continue;
                }
                let known = self.model.files.get(&attr.ino).or(self.durable.files.get(&attr.ino));
                let lost = known.is_some_and(|c| c.lost);
                match read(&s, &node) {
                    Ok(data) => {
                        found.names.insert(path, Entry::File(attr.ino));
                        found.files.insert(attr.ino, Content { data, lost });
                    }
                    Err(why) => {
                        let touched = self.dirty_files.contains(&attr.ino) || is_dirty(&path);
                        assert!(lost || touched, "{path}: {why:?}");
                        s.unlink(&parent, &e.name).unwrap();
                    }
                }
            }
        }
        for (path, entry) in self.durable.names.iter().filter(|(p, _)| !is_dirty(p)) {
            let Entry::File(ino) = entry else {
                assert_eq!(found.names.get(path), Some(entry), "{path} was synced and is gone");
                continue;
            };
            if self.durable.files[ino].lost || self.model.files.get(ino).is_some_and(|c| c.lost) {
                continue;
            }
            if !self.dirty_files.contains(ino) {
                assert_eq!(found.names.get(path), Some(entry), "{path} was synced and is gone");
                assert!(found.files[ino].data == self.durable.files[ino].data, "{path} was synced and reads otherwise");
            }
        }
        self.model = found;
        super::witness::remove_unlisted(&self.disk, &self.disk.root().unwrap());
    }

    pub fn remount(&mut self) {
        self.store().close().unwrap();
        self.heal();
        self.note_durable();
        self.witness.users_changed(&self.disk);
        self.open();
        self.compare();
    }

    /// A backup tool saves a file, open or not.
    pub fn save(&mut self, file: u8) {
        let Some(ino) = self.pick_file(file) else { return };
        let Some(h) = whole_files(&self.disk).into_iter().find(|h| h.ino == ino) else { return };
        let content = self.model.files[&ino].clone();
        if !content.lost {
            self.saved.push(Saved { ino, raw: [h.slots, h.tail].concat(), content });
        }
    }

    fn pick_file(&self, i: u8) -> Option<u64> {
        let all: Vec<u64> = self.model.files.keys().copied().collect();
        (!all.is_empty()).then(|| all[usize::from(i) % all.len()])
    }

    /// The path of a file that there is a backup of, that, and its header now if it has one.
    fn pick_saved(&self, i: u8) -> Option<(usize, Vec<u8>, Vec<u8>)> {
        let all = headers(&self.disk);
        let found = |s: &Saved| {
            self.model.files.get(&s.ino)?;
            all.iter().find(|h| h.ino == s.ino).map(|h| (h.path.clone(), h.slots.clone()))
        };
        let there: Vec<_> =
            self.saved.iter().enumerate().filter_map(|(n, s)| found(s).map(|(p, h)| (n, p, h))).collect();
        (!there.is_empty()).then(|| there[usize::from(i) % there.len()].clone())
    }

    /// A backup tool puts a whole file back while the store is not mounted.
    pub fn restore(&mut self, i: u8) {
        self.remount();
        let Some((n, path, _)) = self.pick_saved(i) else { return };
        self.store = None;
        let saved = &self.saved[n];
        self.disk.replace_raw(&path, &saved.raw).unwrap();
        self.model.files.insert(saved.ino, saved.content.clone());
        let slots = Header { path, ino: saved.ino, slots: saved.raw[..2 * SLOT].to_vec(), tail: vec![] };
        self.witness.brings_back(&slots.valid());
        self.open();
        self.note_durable();
        self.witness.users_changed(&self.disk);
        self.look(false);
        self.compare();
    }

    /// The same with the header only, of a file that still has the same key, at any time.
    fn restore_header(&mut self, i: u8) {
        let Some((n, path, now)) = self.pick_saved(i) else { return };
        let header = |slots: &[u8]| Header { path: vec![], ino: 0, slots: slots.to_vec(), tail: vec![] };
        let old = header(&self.saved[n].raw[..2 * SLOT]).valid();
        if old.iter().chain(&header(&now).valid()).any(|s| s.file != old[0].file) {
            return;
        }
        self.disk.write_raw(&path, 0, &self.saved[n].raw[..2 * SLOT]).unwrap();
        self.witness.brings_back(&old);
        self.look(false);
        if let Some(run) = &mut self.run {
            run.restored = true;
        }
    }

    /// Moves what backups brought back and somebody opened.
    pub fn rewrap_restored(&mut self) {
        rewrap_restored(self.store().shared(), &Control::new()).unwrap();
        self.look(false);
        self.witness.content_is_untouched(&self.disk);
    }

    /// Destroys one of the retired KEKs, if the store lets us.
    pub fn destroy(&mut self, i: u8) {
        let store = self.store();
        let retired: Vec<KekId> =
            super::super::super::plan::in_state(&store.shared().keys.snapshot(), KekState::Retired);
        if retired.is_empty() {
            return;
        }
        let kek = retired[usize::from(i) % retired.len()];
        let named = headers(&self.disk).iter().any(|h| h.valid().iter().any(|s| s.kek == kek));
        match super::super::destroy::destroy(&store, kek) {
            Ok(_) => assert!(!named, "destroyed a KEK that a header names"),
            Err(StoreError::KeyState(_)) => {}
            Err(e) => panic!("{e:?}"),
        }
        self.heard_of_keyring();
        self.look(false);
    }

    fn heard_of_keyring(&mut self) {
        self.witness.heard_of(self.store().shared().keys.snapshot().generation);
    }

    /// Before any operation of the run.
    fn before(&mut self, op: Op) {
        let Some(run) = &mut self.run else { return };
        if run.fails_at == Some(run.operations) {
            self.disk.fail_next(Some(op), 0, libc::EIO);
        }
        run.operations += 1;
        if op.is_counted() {
            self.before_write(op);
        }
    }

    /// Before a write of the run.
    fn before_write(&mut self, op: Op) {
        let Some(run) = &mut self.run else { return };
        if run.dies_before == Some(run.writes) {
            self.disk.stop_after(self.disk.operations());
            run.is_dying = true;
        }
        run.writes += 1;
        let keeps = matches!(op, Op::SetTimes | Op::SetMode | Op::SyncFile | Op::SyncDir | Op::SyncAll);
        if std::mem::replace(&mut run.has_changed, !keeps) {
            self.look(false);
        }
    }

    /// At a point of the run.
    fn at_point(&mut self) {
        if self.run.as_ref().is_none_or(|r| r.is_dying) {
            return;
        }
        let due = |run: &mut Run| run.events.pop_front_if(|(at, _)| *at <= run.points);
        while let Some((_, event)) = self.run.as_mut().and_then(due) {
            self.event(&event);
        }
        if let Some(run) = &mut self.run {
            run.points += 1;
        }
    }

    fn event(&mut self, event: &Event) {
        let run = self.run.as_mut().unwrap();
        match event {
            Event::User(op) => self.user(op),
            Event::Change(change) => assert!(self.change(change)),
            Event::Pause => {
                run.control.pause();
                let control = run.control.clone();
                run.resumers.push(std::thread::spawn(move || control.resume()));
            }
            Event::Cancel => {
                run.control.cancel();
                run.cancelled = true;
            }
            Event::Fault(f) => self.fault(*f),
            Event::Heal => self.heal(),
            Event::Restore(i) => self.restore_header(*i),
        }
    }

    fn options(&self, plan: &Plan) -> Options {
        let provider = |who: u8| roots(&self.root[usize::from(who) % self.root.len()]);
        let (kek, root) = match plan.goal {
            Goal::AsNow => (None, vec![]),
            Goal::Sealed => (Some(KekKind::Sealed), vec![]),
            Goal::External => (Some(KekKind::External), vec![]),
            Goal::SealedUnder(who) => (Some(KekKind::Sealed), provider(who)),
            Goal::ExternalIn(who) => (Some(KekKind::External), provider(who)),
        };
        let (dry_run, destroy_old, restart) = (plan.dry_run, plan.destroy_old, plan.restart);
        Options { kek, root, dry_run, destroy_old, restart, full_speed: true, ..one_job() }
    }
}

/// The list of moves, taken when a round of a pass is over. The thread that takes it all the while does so when it comes
/// to it, and no two runs would be the same.
struct Punctual<'a> {
    store: &'a Store<SimDisk>,
    runner: ThreadId,
}

impl Moves<SimDisk> for Punctual<'_> {
    fn track(&self, on: bool) {
        self.store.track_moves(on);
    }

    fn take(&self) -> Moved<SimDisk> {
        match std::thread::current().id() == self.runner {
            true => Moves::take(self.store),
            false => Moved { nodes: Vec::new(), lost: false },
        }
    }
}

/// The world while a run is under way in it.
pub struct Stage {
    pub world: Mutex<World>,
    /// The run holds no lock that a user may want, but for those under which it reads and writes a header.
    is_quiet: AtomicBool,
}

impl Progress for Stage {
    fn update(&self, s: &Status) {
        // Until the new KEK is active, everybody who makes a header waits.
        self.is_quiet.store(s.state != State::Staged, Ordering::Relaxed);
    }
}

impl Stage {
    pub fn new(world: World) -> Arc<Self> {
        Arc::new(Self { world: Mutex::new(world), is_quiet: AtomicBool::new(true) })
    }

    fn moment(&self, moment: Moment) {
        // Whatever is done by those who are let in here comes by here as well.
        let Some(mut w) = self.world.try_lock() else { return };
        let free = |op| matches!(op, Op::Lookup | Op::ReadDir | Op::Open | Op::SyncFile | Op::SyncAll);
        let is_point = match moment {
            Moment::Before(op) => free(op),
            Moment::Synced(_) => true,
        };
        if is_point && self.is_quiet.load(Ordering::Relaxed) {
            w.at_point();
        }
        // Last, so that it is this operation that fails.
        if let Moment::Before(op) = moment {
            w.before(op);
        }
    }

    fn call(&self) {
        if let Some(mut w) = self.world.try_lock()
            && self.is_quiet.load(Ordering::Relaxed)
        {
            w.at_point();
        }
    }

    /// One run, and what must hold after it.
    pub fn rotate(self: &Arc<Self>, plan: &Plan) -> Ended {
        let (store, options, control, misdeeds, operations) = {
            let mut w = self.world.lock();
            let control = Arc::new(Control::new());
            let mut events = plan.events.clone();
            events.sort_by_key(|(at, _)| *at);
            w.run = Some(Run {
                points: 0,
                writes: 0,
                operations: 0,
                has_changed: true,
                is_dying: false,
                events: events.into(),
                dies_before: plan.crash.map(|(n, _)| n),
                fails_at: plan.bad_sector,
                control: control.clone(),
                cancelled: false,
                restored: false,
                resumers: Vec::new(),
            });
            let me = Arc::clone(self);
            w.disk.set_hook(Some(Arc::new(move |m| me.moment(m))));
            for r in &w.root {
                let me = Arc::clone(self);
                r.set_hook(Some(Arc::new(move || me.call())));
            }
            (w.store(), w.options(plan), control, w.misdeeds(), w.disk.operations())
        };
        self.is_quiet.store(true, Ordering::Relaxed);
        let moves = Punctual { store: &store, runner: std::thread::current().id() };
        let ctx = Context { shared: store.shared(), moves: &moves };
        let ended = run(&ctx, &options, &**self, &control);
        drop(store);
        let mut w = self.world.lock();
        w.disk.set_hook(None);
        w.root.iter().for_each(|r| r.set_hook(None));
        w.disk.clear_faults();
        let run = w.run.take().unwrap();
        w.length = (run.points, run.writes, run.operations);
        run.resumers.into_iter().for_each(|r| r.join().unwrap());
        if w.disk.is_stopped() {
            w.crash(plan.crash.unwrap().1);
            return Ended::Crashed;
        }
        w.look(false);
        w.witness.content_is_untouched(&w.disk);
        w.heard_of_keyring();
        let misbehaved = w.misdeeds() > misdeeds || plan.bad_sector.is_some();
        match ended {
            Err(e) => {
                assert!(misbehaved, "{e:?}");
                Ended::Failed
            }
            Ok(report) => {
                w.judge(plan, &report, misbehaved, run.cancelled, run.restored);
                if plan.dry_run && plan.events.is_empty() {
                    assert_eq!(w.disk.operations(), operations, "a dry run wrote");
                }
                Ended::Report(Box::new(report))
            }
        }
    }
}

impl World {
    /// What a report says must be so.
    fn judge(&mut self, plan: &Plan, report: &Report, misbehaved: bool, cancelled: bool, restored: bool) {
        let failed = report.failures_total > 0 || !report.failures.is_empty();
        match report.outcome {
            Outcome::Complete => {
                assert!(!failed, "complete with failures: {report:?}");
                for h in headers(&self.disk) {
                    let slots = h.valid();
                    let shown = String::from_utf8_lossy(&h.path);
                    let moved = slots.len() == 2 && h.slots[..SLOT] == h.slots[SLOT..] && slots[0].kek == report.target;
                    let back = restored && slots.iter().any(|s| self.witness.is_brought_back(s));
                    assert!(moved || back, "complete, and {shown} is not at the target");
                }
                let ring = self.store().shared().keys.snapshot();
                assert!(super::super::super::plan::unproved(&ring).is_empty());
                // What a power cut left without a header is told, and a backup of it may need any KEK.
                let some_have_none = super::witness::some_have_no_header(&self.disk);
                assert_eq!(!report.no_header.is_empty(), some_have_none, "{report:?}");
                for k in ring.keks.iter().filter(|_| plan.destroy_old) {
                    let kept = report.kept.contains(&k.id);
                    assert_eq!(k.id != report.target && !k.wraps.is_empty(), kept, "{}: {report:?}", k.id);
                    assert!(!kept || some_have_none, "{} is still there", k.id);
                }
            }
            Outcome::Incomplete => {
                let lost = self.model.files.values().any(|c| c.lost);
                assert!(failed, "{report:?}");
                assert!(misbehaved || lost || restored, "{report:?}");
            }
            Outcome::Cancelled => assert!(cancelled),
            Outcome::DryRun => assert!(plan.dry_run),
            Outcome::NotDue | Outcome::ShareComplete => panic!("{report:?}"),
        }
        if report.outcome != Outcome::Complete {
            assert_eq!((report.retired.len(), report.destroyed.len()), (0, 0), "{report:?}");
        }
    }

    /// The services are well again, the files that are lost are removed, and a run ends as it should.
    pub fn settles(self: World) -> World {
        let mut w = self;
        w.heal();
        w.compare();
        for path in w.model.lost() {
            w.change(&Change::Unlink(path));
        }
        let stage = Stage::new(w);
        let ended = stage.rotate(&Plan { destroy_old: true, ..Plan::to(Goal::AsNow) });
        assert!(matches!(&ended, Ended::Report(r) if r.outcome == Outcome::Complete), "{ended:?}");
        let stage = Arc::into_inner(stage).expect("nobody else is on the stage");
        let mut w = stage.world.into_inner();
        w.remount();
        let named: BTreeSet<KekId> = headers(&w.disk).iter().flat_map(|h| h.valid()).map(|s| s.kek).collect();
        let Ended::Report(r) = ended else { unreachable!() };
        assert!(named.is_subset(&BTreeSet::from([r.target])));
        w
    }
}

/// Steps between runs.
#[derive(Debug, Clone)]
pub enum Step {
    User(UserOp),
    Rotate(Plan),
    Destroy(u8),
    Remount,
    Crash(Crash),
    Fault(Fault),
    Heal,
    Save(u8),
    Restore(u8),
    RewrapRestored,
    Scratch(u8, bool),
}

/// Lives through `steps`, and settles.
pub fn live(world: World, steps: &[Step]) -> World {
    let stage = Stage::new(world);
    for step in steps {
        if let Step::Rotate(plan) = step {
            stage.rotate(plan);
            stage.world.lock().compare();
            continue;
        }
        let mut w = stage.world.lock();
        match step {
            Step::User(op) => w.user(op),
            Step::Rotate(_) => {}
            Step::Destroy(i) => w.destroy(*i),
            Step::Remount => w.remount(),
            Step::Crash(c) => w.crash(*c),
            Step::Fault(f) => w.fault(*f),
            Step::Heal => w.heal(),
            Step::Save(i) => w.save(*i),
            Step::Restore(i) => w.restore(*i),
            Step::Scratch(file, second) => w.scratch(*file, *second),
            Step::RewrapRestored => {
                w.heal();
                w.rewrap_restored();
            }
        }
    }
    let world = Arc::into_inner(stage).expect("nobody else is on the stage").world.into_inner();
    world.settles()
}
