//! Which directory entries are not durable yet.
//!
//! fsync of a file promises its name too, and the names of the directories above it. What was made since the
//! directory was last synced is remembered here by directory, with the sidecars of long names, so that the second
//! fsync costs nothing. The clock counts changes; an entry made at `t` is durable once its directory was synced at or
//! after `t`. Pure bookkeeping: no I/O.

use super::node::InodeKey;
use parking_lot::Mutex;
use std::collections::HashMap;

/// Directories remembered before giving up and asking for a sync of everything.
const DIRS_MAX: usize = 1 << 16;
/// Sidecars remembered, likewise.
const SIDECARS_MAX: usize = 1 << 16;

#[derive(Default)]
struct Dir {
    /// When its newest entry was made.
    last: u64,
    synced: u64,
    /// Sidecars, each with the time of its entry.
    sidecars: Vec<(u64, Vec<u8>)>,
}

#[derive(Default)]
struct Inner {
    clock: u64,
    dirs: HashMap<InodeKey, Dir>,
    sidecars: usize,
    /// What was made up to here is no longer remembered one by one.
    dropped: u64,
    /// What was made up to here is durable.
    all_synced: u64,
}

/// The entries that are not durable.
#[derive(Default)]
pub(super) struct Unsynced(Mutex<Inner>);

/// What it takes to make an entry durable.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// It is durable.
    Nothing,
    /// A sync of its directory, after that of these sidecars; then [`Unsynced::dir_synced`] with this time.
    Dir { upto: u64, sidecars: Vec<Vec<u8>> },
    /// A sync of everything; then [`Unsynced::all_synced`] with this time.
    All { upto: u64 },
}

impl Unsynced {
    /// An entry was made in `dir`, with this sidecar. Returns the time.
    pub fn note(&self, dir: InodeKey, sidecar: Option<&[u8]>) -> u64 {
        let mut i = self.0.lock();
        i.clock += 1;
        let now = i.clock;
        let d = i.dirs.entry(dir).or_default();
        d.last = now;
        if let Some(s) = sidecar {
            d.sidecars.push((now, s.to_vec()));
            i.sidecars += 1;
        }
        if i.dirs.len() > DIRS_MAX || i.sidecars > SIDECARS_MAX {
            i.dirs.clear();
            i.sidecars = 0;
            i.dropped = now;
        }
        now
    }

    /// A time that is not before that of any entry of `dir` which may not be durable.
    pub fn latest(&self, dir: InodeKey) -> u64 {
        let i = self.0.lock();
        let dropped = if i.dropped > i.all_synced { i.dropped } else { 0 };
        i.dirs.get(&dir).map_or(0, |d| d.last).max(dropped)
    }

    /// What makes the entry of `dir` made at `made` durable.
    pub fn need(&self, dir: InodeKey, made: u64) -> Need {
        let i = self.0.lock();
        if made <= i.all_synced {
            return Need::Nothing;
        }
        if made <= i.dropped {
            return Need::All { upto: i.clock };
        }
        match i.dirs.get(&dir) {
            Some(d) if d.synced < made => i.sync_of(Some(d)),
            _ => Need::Nothing,
        }
    }

    /// What makes all entries of `dir` durable, removals too: never nothing.
    pub fn need_all_of(&self, dir: InodeKey) -> Need {
        let i = self.0.lock();
        if i.dropped > i.all_synced {
            return Need::All { upto: i.clock };
        }
        i.sync_of(i.dirs.get(&dir))
    }

    /// The time now, for [`Unsynced::all_synced`].
    pub fn now(&self) -> u64 {
        self.0.lock().clock
    }

    /// `dir` was synced after [`Need::Dir`] had been asked for.
    pub fn dir_synced(&self, dir: InodeKey, upto: u64) {
        let mut i = self.0.lock();
        let Some(d) = i.dirs.get_mut(&dir) else { return };
        let before = d.sidecars.len();
        d.sidecars.retain(|(t, _)| *t > upto);
        let gone = before - d.sidecars.len();
        d.synced = d.synced.max(upto);
        if d.last <= upto {
            i.dirs.remove(&dir);
        }
        i.sidecars = i.sidecars.saturating_sub(gone);
    }

    /// Everything was synced after the time `upto` had been read.
    pub fn all_synced(&self, upto: u64) {
        let mut i = self.0.lock();
        i.all_synced = i.all_synced.max(upto);
        i.dirs.retain(|_, d| {
            d.sidecars.retain(|(t, _)| *t > upto);
            d.last > upto
        });
        i.sidecars = i.dirs.values().map(|d| d.sidecars.len()).sum();
    }

    /// `dir` was removed.
    pub fn forget(&self, dir: InodeKey) {
        let mut i = self.0.lock();
        if let Some(d) = i.dirs.remove(&dir) {
            i.sidecars = i.sidecars.saturating_sub(d.sidecars.len());
        }
    }
}

impl Inner {
    fn sync_of(&self, dir: Option<&Dir>) -> Need {
        let sidecars = dir.map_or_else(Vec::new, |d| d.sidecars.iter().map(|(_, s)| s.clone()).collect());
        Need::Dir { upto: self.clock, sidecars }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: InodeKey = (1, 7);
    const E: InodeKey = (1, 8);

    #[test]
    fn an_entry_needs_one_sync_of_its_directory() {
        let u = Unsynced::default();
        assert_eq!(u.need(D, 0), Need::Nothing);
        let a = u.note(D, Some(b"side"));
        let Need::Dir { upto, sidecars } = u.need(D, a) else { panic!("not durable yet") };
        assert_eq!(sidecars, [b"side".to_vec()]);
        let b = u.note(D, None);
        u.dir_synced(D, upto);
        assert_eq!(u.need(D, a), Need::Nothing);
        assert!(matches!(u.need(D, b), Need::Dir { sidecars, .. } if sidecars.is_empty()));
        assert_eq!(u.latest(D), b);
        assert_eq!(u.latest(E), 0);
    }

    #[test]
    fn too_many_directories_ask_for_a_sync_of_everything() {
        let u = Unsynced::default();
        let first = u.note(D, None);
        for i in 0..=DIRS_MAX as u64 {
            u.note((2, i), None);
        }
        let Need::All { upto } = u.need(D, first) else { panic!("forgotten") };
        assert!(matches!(u.need_all_of(E), Need::All { .. }));
        assert!(u.latest(E) >= first);
        let later = u.note(E, None);
        u.all_synced(upto);
        assert_eq!(u.need(D, first), Need::Nothing);
        assert!(matches!(u.need(E, later), Need::Dir { .. }));
        assert!(matches!(u.need_all_of(D), Need::Dir { .. }));
    }
}
