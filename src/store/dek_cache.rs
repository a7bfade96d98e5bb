//! DEKs unwrapped lately: a cache bounded by entries, age and idle time, wiped on eviction.
//!
//! Values are `Arc<Dek>`: an open file keeps its own for as long as it is open, whatever the cache forgets; the key's
//! memory is wiped when the last holder lets go.

use crate::crypto::secret::Dek;
use crate::format::ids::FileId;
use lru::LruCache;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bounds of a [`DekCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DekCacheLimits {
    /// Most entries; 0 = keep nothing.
    pub entries: usize,
    /// An entry is dropped this long after it was put in, used or not.
    pub age: Duration,
    /// An entry is dropped after this long without use.
    pub idle: Duration,
}

impl Default for DekCacheLimits {
    /// 65,536 entries (4 MiB of locked memory with their bookkeeping), one hour, ten minutes.
    fn default() -> Self {
        Self { entries: 65_536, age: Duration::from_secs(3600), idle: Duration::from_secs(600) }
    }
}

/// What a [`DekCache`] did so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DekCacheStats {
    /// Entries now.
    pub entries: usize,
    pub hits: u64,
    pub misses: u64,
    /// Dropped to make room.
    pub evicted: u64,
    /// Dropped for their age or idle time.
    pub expired: u64,
}

struct Entry {
    dek: Arc<Dek>,
    put: Instant,
    used: Instant,
}

struct Inner {
    map: LruCache<FileId, Entry>,
    stats: DekCacheStats,
}

/// A zeroizing LRU cache of DEKs by file.
pub struct DekCache {
    limits: DekCacheLimits,
    inner: Mutex<Inner>,
}

impl DekCache {
    /// An empty cache.
    pub fn new(limits: DekCacheLimits) -> Self {
        let inner = Inner { map: LruCache::unbounded(), stats: DekCacheStats::default() };
        Self { limits, inner: Mutex::new(inner) }
    }

    /// The DEK of `file`, if it is here and not too old.
    pub fn get(&self, file: &FileId) -> Option<Arc<Dek>> {
        self.get_at(file, Instant::now())
    }

    fn get_at(&self, file: &FileId, now: Instant) -> Option<Arc<Dek>> {
        let mut i = self.inner.lock();
        let fresh = match i.map.get_mut(file) {
            Some(e) if self.is_fresh(e, now) => {
                e.used = now;
                Some(e.dek.clone())
            }
            Some(_) => {
                i.map.pop(file);
                i.stats.expired += 1;
                None
            }
            None => None,
        };
        if fresh.is_some() {
            i.stats.hits += 1;
        } else {
            i.stats.misses += 1;
        }
        fresh
    }

    /// Whether the DEK of `file` is here. No use of it.
    pub fn has(&self, file: &FileId) -> bool {
        let now = Instant::now();
        self.inner.lock().map.peek(file).is_some_and(|e| self.is_fresh(e, now))
    }

    /// Most entries.
    pub fn room(&self) -> usize {
        self.limits.entries
    }

    /// Keeps `dek` for `file`, in place of any other.
    pub fn put(&self, file: FileId, dek: Arc<Dek>) {
        self.put_at(file, dek, Instant::now());
    }

    fn put_at(&self, file: FileId, dek: Arc<Dek>, now: Instant) {
        if self.limits.entries == 0 {
            return;
        }
        let mut i = self.inner.lock();
        i.map.put(file, Entry { dek, put: now, used: now });
        while i.map.len() > self.limits.entries {
            i.map.pop_lru();
            i.stats.evicted += 1;
        }
    }

    /// Forgets the DEK of `file`.
    pub fn remove(&self, file: &FileId) {
        self.inner.lock().map.pop(file);
    }

    /// Forgets everything: after this no DEK is here but those of open files, which they hold themselves.
    pub fn clear(&self) {
        self.inner.lock().map.clear();
    }

    /// Drops what is too old or was idle too long. To be called every now and then; [`DekCache::get`] never returns
    /// such an entry anyway.
    pub fn expire(&self) {
        self.expire_at(Instant::now());
    }

    fn expire_at(&self, now: Instant) {
        let mut i = self.inner.lock();
        let old: Vec<FileId> = i.map.iter().filter(|(_, e)| !self.is_fresh(e, now)).map(|(f, _)| *f).collect();
        i.stats.expired += old.len() as u64;
        for f in old {
            i.map.pop(&f);
        }
    }

    fn is_fresh(&self, e: &Entry, now: Instant) -> bool {
        now.saturating_duration_since(e.put) < self.limits.age
            && now.saturating_duration_since(e.used) < self.limits.idle
    }

    /// Counters, and entries now.
    pub fn stats(&self) -> DekCacheStats {
        let i = self.inner.lock();
        DekCacheStats { entries: i.map.len(), ..i.stats }
    }
}

impl std::fmt::Debug for DekCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DekCache").field("limits", &self.limits).field("stats", &self.stats()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::secret::Secret32;

    fn cache(entries: usize) -> DekCache {
        DekCache::new(DekCacheLimits { entries, age: Duration::from_secs(100), idle: Duration::from_secs(10) })
    }

    fn file(n: u8) -> FileId {
        FileId([n; 16])
    }

    fn dek(n: u8) -> Arc<Dek> {
        Arc::new(Dek::from_secret(Secret32::build(|b| b.fill(n))))
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let c = cache(2);
        c.put(file(1), dek(1));
        c.put(file(2), dek(2));
        assert!(c.get(&file(1)).is_some());
        c.put(file(3), dek(3));
        assert!(c.get(&file(2)).is_none());
        assert_eq!(c.get(&file(1)).unwrap().secret().expose(), &[1; 32]);
        assert_eq!(c.get(&file(3)).unwrap().secret().expose(), &[3; 32]);
        assert_eq!(c.stats(), DekCacheStats { entries: 2, hits: 3, misses: 1, evicted: 1, expired: 0 });
    }

    #[test]
    fn idle_and_old_entries_are_not_given_out_and_are_dropped() {
        let t = Instant::now();
        let s = Duration::from_secs;
        let c = cache(9);
        c.put_at(file(1), dek(1), t);
        assert!(c.get_at(&file(1), t + s(9)).is_some());
        assert!(c.get_at(&file(1), t + s(18)).is_some(), "use renews the idle time");
        assert!(c.get_at(&file(1), t + s(28)).is_none(), "idle");
        c.put_at(file(2), dek(2), t);
        for i in 1..20 {
            c.get_at(&file(2), t + s(5 * i));
        }
        assert!(c.get_at(&file(2), t + s(99)).is_some());
        assert!(c.get_at(&file(2), t + s(100)).is_none(), "too old, though in use");
        c.put_at(file(3), dek(3), t);
        c.put_at(file(4), dek(4), t + s(5));
        c.expire_at(t + s(12));
        assert_eq!(c.stats().entries, 1);
        assert!(c.get_at(&file(4), t + s(12)).is_some());
    }

    #[test]
    fn an_open_file_keeps_its_dek_and_the_cache_forgets_it() {
        let c = cache(2);
        let d = dek(7);
        c.put(file(1), d.clone());
        c.clear();
        assert!(c.get(&file(1)).is_none());
        assert_eq!(Arc::strong_count(&d), 1, "the cache let go");
        assert_eq!(d.secret().expose(), &[7; 32]);
        c.put(file(1), d.clone());
        c.remove(&file(1));
        assert_eq!(Arc::strong_count(&d), 1);
    }

    #[test]
    fn with_no_room_nothing_is_kept() {
        let c = cache(0);
        c.put(file(1), dek(1));
        assert!(c.get(&file(1)).is_none());
        assert!(!format!("{c:?}").contains("Dek("));
    }
}
