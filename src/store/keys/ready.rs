//! The DEK pool: keys for files that are not there yet, so that making a file waits for no key service.
//!
//! An entry is a whole identity: a file id, its DEK, and the slot with the wrap, which binds both to the KEK. It is given
//! out once, and only under the KEK that it was wrapped under while that is the active one. The pool grows with what is
//! made: it doubles whenever somebody finds it empty, so a mount that makes three files does not pay for sixty-four.

use crate::crypto::secret::Dek;
use crate::format::header::Slot;
use crate::format::ids::KekId;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What the pool holds after the first time it was found empty.
const FIRST: usize = 4;

/// A new file's identity and key, and the key's wrap.
pub struct Ready {
    pub(in crate::store) dek: Arc<Dek>,
    pub(in crate::store) slot: Slot,
    /// The key service's id of the request that wrapped it.
    pub(in crate::store) request_id: Option<String>,
    /// Made just now by a call for the one file that gets it, which was told of as that file's.
    pub(in crate::store) own: bool,
}

/// What a pool did so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolStats {
    /// Entries now.
    pub ready: usize,
    /// Files that were made from it, and files that would have been.
    pub hits: u64,
    pub misses: u64,
}

#[derive(Default)]
struct Inner {
    ready: VecDeque<Ready>,
    /// Entries that are to be there.
    want: usize,
    /// Entries being made.
    making: usize,
    /// It has grown since the last entry came: whoever finds it empty again meanwhile is no news.
    grown: bool,
    hits: u64,
    misses: u64,
}

/// The pool of a store whose active KEK is a key in a service.
#[derive(Default)]
pub struct DekPool {
    max: AtomicUsize,
    inner: Mutex<Inner>,
}

/// Leave to make one entry; given back when dropped.
pub(in crate::store) struct Making(Arc<DekPool>);

impl Drop for Making {
    fn drop(&mut self) {
        self.0.inner.lock().making -= 1;
    }
}

impl DekPool {
    /// Holds at most `n` entries; 0: none, ever.
    pub fn set_max(&self, n: usize) {
        self.max.store(n, Ordering::Relaxed);
    }

    /// Takes an entry that was wrapped under `kek`. Any others are dropped: their KEK will not be active again.
    pub(super) fn take(&self, kek: KekId) -> Option<Ready> {
        let max = self.max.load(Ordering::Relaxed);
        if max == 0 {
            return None;
        }
        let mut i = self.inner.lock();
        i.ready.retain(|r| r.slot.kek == kek);
        let taken = i.ready.pop_front();
        if taken.is_some() {
            i.hits += 1;
        } else {
            i.misses += 1;
            if !std::mem::replace(&mut i.grown, true) {
                i.want = (i.want * 2).max(FIRST).min(max);
            }
        }
        taken
    }

    /// Puts in an entry that was made just now. The caller holds the active KEK, under which it is wrapped.
    pub(super) fn put(&self, r: Ready) {
        let max = self.max.load(Ordering::Relaxed);
        let mut i = self.inner.lock();
        if i.ready.len() < max {
            i.grown = false;
            i.ready.push_back(r);
        }
    }

    /// Puts back an entry that was taken for a file and did not come to be its key. It is dropped where others have taken
    /// its place meanwhile.
    pub(super) fn put_back(&self, r: Ready) {
        let max = self.max.load(Ordering::Relaxed);
        let mut i = self.inner.lock();
        i.hits = i.hits.saturating_sub(1);
        if i.ready.len() < max {
            i.ready.push_front(r);
        }
    }

    /// Leave to make what is missing, once half of it is.
    pub(in crate::store) fn missing(self: &Arc<Self>) -> Vec<Making> {
        let mut i = self.inner.lock();
        let there = i.ready.len() + i.making;
        if there > i.want / 2 || i.want == 0 {
            return Vec::new();
        }
        let n = i.want - there;
        i.making += n;
        (0..n).map(|_| Making(Arc::clone(self))).collect()
    }

    /// Drops every entry. Their keys' memory is wiped.
    pub(in crate::store) fn clear(&self) {
        let dropped = std::mem::take(&mut self.inner.lock().ready);
        drop(dropped);
    }

    /// Counters, and entries now.
    pub fn stats(&self) -> PoolStats {
        let i = self.inner.lock();
        PoolStats { ready: i.ready.len(), hits: i.hits, misses: i.misses }
    }
}

#[cfg(test)]
impl DekPool {
    pub(in crate::store) fn keys_for_tests(&self) -> Vec<[u8; 32]> {
        self.inner.lock().ready.iter().map(|r| r.dek.secret().expose().map(|b| !b)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ids::{FileId, StoreId};

    fn ready(kek: KekId) -> Ready {
        let dek = Dek::random();
        let mut slot = Slot::new(StoreId::random(), FileId::random(), &dek);
        slot.kek = kek;
        Ready { dek: Arc::new(dek), slot, request_id: None, own: false }
    }

    fn pool(max: usize) -> Arc<DekPool> {
        let p = Arc::new(DekPool::default());
        p.set_max(max);
        p
    }

    fn fill(p: &Arc<DekPool>, kek: KekId) -> usize {
        let leave = p.missing();
        leave.iter().for_each(|_| p.put(ready(kek)));
        leave.len()
    }

    #[test]
    fn it_doubles_with_what_is_made_and_is_filled_up_at_half() {
        let (p, kek) = (pool(10), KekId::random());
        assert_eq!(fill(&p, kek), 0, "nobody has made a file yet");
        assert!(p.take(kek).is_none());
        assert_eq!(fill(&p, kek), 4);
        assert!(p.take(kek).is_some());
        assert_eq!(fill(&p, kek), 0, "three of four are there");
        assert!(p.take(kek).is_some());
        assert_eq!(fill(&p, kek), 2);
        (0..4).for_each(|_| assert!(p.take(kek).is_some()));
        assert!(p.take(kek).is_none());
        assert_eq!(fill(&p, kek), 8);
        (0..8).for_each(|_| assert!(p.take(kek).is_some()));
        assert!(p.take(kek).is_none());
        assert_eq!(fill(&p, kek), 10, "and no more");
        assert_eq!(p.stats(), PoolStats { ready: 10, hits: 14, misses: 3 });
    }

    #[test]
    fn an_entry_is_given_out_once_and_under_its_own_kek_only() {
        let (p, old, new) = (pool(8), KekId::random(), KekId::random());
        p.take(old);
        fill(&p, old);
        let (a, b) = (p.take(old).unwrap(), p.take(old).unwrap());
        assert!(a.slot.file != b.slot.file);
        assert!(p.take(new).is_none());
        assert_eq!(p.stats().ready, 0, "what is under another KEK is gone");
        assert!(p.take(old).is_none());
    }

    #[test]
    fn what_is_being_made_is_not_made_twice_and_does_not_make_it_grow() {
        let (p, kek) = (pool(64), KekId::random());
        p.take(kek);
        let leave = p.missing();
        assert_eq!((leave.len(), p.missing().len()), (4, 0));
        (0..50).for_each(|_| assert!(p.take(kek).is_none()));
        drop(leave);
        assert_eq!(p.missing().len(), 4);
    }

    #[test]
    fn without_room_nothing_is_kept_or_counted() {
        let (p, kek) = (pool(0), KekId::random());
        assert!(p.take(kek).is_none() && p.missing().is_empty());
        p.put(ready(kek));
        assert_eq!(p.stats(), PoolStats::default());
    }

    #[test]
    fn what_is_put_back_into_a_full_pool_or_one_that_was_closed_is_dropped() {
        let (p, kek) = (pool(4), KekId::random());
        p.take(kek);
        fill(&p, kek);
        let (a, b) = (p.take(kek).unwrap(), p.take(kek).unwrap());
        p.put(ready(kek));
        p.put_back(a);
        p.put_back(ready(kek));
        assert_eq!(p.stats().ready, 4);
        p.set_max(0);
        p.clear();
        p.put_back(b);
        assert_eq!(p.stats().ready, 0);
    }
}
