//! Segments: the cached, newest state of each, its lock, and how it gets from and to disk.

use super::{FileCore, FileKeys, Inner, log_damage};
use crate::backing::{self, Access, Backing};
use crate::crypto::random;
use crate::format::damage::Damage;
use crate::format::geometry::{self, BLOCK, Copy2, STATE};
use crate::format::state::{self, Entry, SegmentState};
use crate::store::error::{Result, StoreError};
use lru::LruCache;
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;

/// Segment states kept for one file: 4096 speak for 2 GiB of content and take about 15 MB.
const CACHED_MAX: usize = 4096;

/// A segment's state as the disk has it.
pub(super) struct Loaded {
    pub state: SegmentState,
    /// The copy that holds `state`; the next version goes over the other one, but if `spare` says so.
    pub newest: Copy2,
    /// The other copy has the same entries, and a barrier has made it durable: the next version goes over this one, for a
    /// power cut that tears both would else take what was acknowledged.
    pub spare: bool,
    /// `state` differs from the disk: what a crash left was settled in memory only.
    pub unsaved: bool,
}

/// One segment. `None`: not loaded.
pub(super) type Segment = RwLock<Option<Loaded>>;

/// The segments of one file that are in memory. Writes go through to disk at once, so any that is not in use can go.
pub(super) struct Segments(Mutex<LruCache<u64, Arc<Segment>>>);

impl Segments {
    pub fn new() -> Self {
        Self(Mutex::new(LruCache::unbounded()))
    }

    /// The segment's one object in memory.
    pub fn get(&self, segment: u64) -> Arc<Segment> {
        let mut map = self.0.lock();
        let s = Arc::clone(map.get_or_insert(segment, || Arc::new(RwLock::new(None))));
        // Somebody holding a segment would keep using its old lock: only those that the map alone holds may go.
        while map.len() > CACHED_MAX {
            match map.pop_lru() {
                Some((n, old)) if Arc::strong_count(&old) > 1 => {
                    map.put(n, old);
                    break;
                }
                _ => {}
            }
        }
        s
    }

    /// Whether the segment's state is in memory, or about to be.
    pub fn has(&self, segment: u64) -> bool {
        self.0.lock().contains(&segment)
    }

    /// Forgets everything. The caller holds the file's lock exclusively, so nobody is in a segment.
    pub fn clear(&self) {
        self.0.lock().clear();
    }

    /// Forgets the segments from `first` on. The caller holds the file's lock exclusively.
    pub fn forget_from(&self, first: u64) {
        let mut map = self.0.lock();
        let gone: Vec<u64> = map.iter().map(|(n, _)| *n).filter(|n| *n >= first).collect();
        for n in gone {
            map.pop(&n);
        }
    }
}

/// Both copies of a state as read from disk.
pub(super) struct Copies {
    pub a: std::result::Result<SegmentState, Damage>,
    pub b: std::result::Result<SegmentState, Damage>,
}

impl Copies {
    /// Opens both copies from their bytes, one after the other in `bytes`.
    pub fn open(keys: &FileKeys, segment: u64, bytes: &mut [u8]) -> Self {
        let len = geometry::state_len(segment).min(bytes.len());
        let (a, b) = bytes.split_at_mut(len);
        Self { a: state::open(&keys.state, keys.file, segment, a), b: state::open(&keys.state, keys.file, segment, b) }
    }

    /// See [`state::one_is_lost`].
    pub fn one_is_lost(&self) -> bool {
        state::one_is_lost(&self.a, &self.b)
    }

    /// The copy that counts, and the older one if it is valid too.
    ///
    /// # Errors
    /// [`Damage::StateAbsent`] if both are all zeros; else what is wrong with a copy.
    pub fn choose(self) -> std::result::Result<(Loaded, Option<SegmentState>), Damage> {
        let (newest, state, older) = match (self.a, self.b) {
            (Ok(a), Ok(b)) if b.sequence > a.sequence => (Copy2::B, b, Some(a)),
            (Ok(a), b) => (Copy2::A, a, b.ok()),
            (Err(_), Ok(b)) => (Copy2::B, b, None),
            (Err(Damage::StateAbsent { .. }), Err(e)) | (Err(e), Err(_)) => return Err(e),
        };
        Ok((Loaded { state, newest, spare: false, unsaved: false }, older))
    }
}

impl<B: Backing> FileCore<B> {
    /// Runs `f` on the segment's state, loading it first if need be; the segment's lock is held shared.
    pub(super) fn with_segment<R>(
        &self,
        inner: &Inner<B>,
        keys: &FileKeys,
        segment: u64,
        f: impl FnOnce(&Loaded) -> Result<R>,
    ) -> Result<R> {
        let s = self.segments.get(segment);
        loop {
            {
                let guard = s.read();
                if let Some(l) = guard.as_ref() {
                    return f(l);
                }
            }
            let mut guard = s.write();
            if guard.is_none() {
                *guard = Some(self.load_segment(inner, keys, segment)?);
            }
        }
    }

    /// Runs `f`, which may change the segment on disk, with the segment's lock held exclusively.
    pub(super) fn with_segment_mut<R>(
        &self,
        inner: &Inner<B>,
        keys: &FileKeys,
        segment: u64,
        f: impl FnOnce(&mut Loaded) -> Result<R>,
    ) -> Result<R> {
        let s = self.segments.get(segment);
        let mut guard = s.write();
        let mut l = match guard.take() {
            Some(l) => l,
            None => self.load_segment(inner, keys, segment)?,
        };
        if l.unsaved {
            // What a crash left is settled on disk before the next version goes over the copy that proves it.
            self.store_segment(inner, keys, segment, &mut l)?;
        }
        let r = f(&mut l);
        match &r {
            Ok(_) => *guard = Some(l),
            // States and data may be apart now. The next use reads both copies and finds out which entry is true.
            Err(StoreError::Backing(_)) => self.set_recovering(true),
            Err(_) => {}
        }
        r
    }

    fn load_segment(&self, inner: &Inner<B>, keys: &FileKeys, segment: u64) -> Result<Loaded> {
        let mut bytes = [0u8; 2 * STATE];
        let bytes = &mut bytes[..2 * geometry::state_len(segment)];
        let at = geometry::state_offset(segment, Copy2::A);
        backing::read_into(&self.shared.backing, inner.backing_file()?, bytes, at)?;
        let copies = Copies::open(keys, segment, bytes);
        let one_is_lost = copies.one_is_lost();
        match copies.choose() {
            Ok((mut loaded, older)) => {
                if one_is_lost {
                    self.doubt(inner, keys, segment, &mut loaded)?;
                }
                self.reconcile(inner, keys, segment, loaded, older)
            }
            Err(Damage::StateAbsent { .. }) if inner.sparse || segment >= geometry::segment_count(inner.size) => {
                Ok(Loaded { state: SegmentState::EMPTY, newest: Copy2::B, spare: false, unsaved: false })
            }
            Err(d) => {
                log_damage(keys, &d);
                Err(d.into())
            }
        }
    }

    /// Deals with a state whose other copy is lost, and may have been the newer one: in a settled file by tampering or a bad
    /// disk, else by a write that was cut short, or by a power cut that tore it and kept the other copy from an earlier
    /// barrier. A hole must then have nothing on disk, or the block counts as damaged, so that its loss is never taken for
    /// zeros. The next writer makes the pair whole.
    ///
    /// A killed process leaves no hole with anything on disk beside a torn copy: that a block is one is on disk before its
    /// bytes go, and its bytes go before the next state is written.
    pub(super) fn doubt(&self, inner: &Inner<B>, keys: &FileKeys, segment: u64, loaded: &mut Loaded) -> Result<()> {
        if self.is_recovering() {
            loaded.unsaved = true;
        } else {
            tracing::warn!(file = %keys.file, segment, "one copy of the segment's state is lost; using the other");
        }
        self.distrust_holes(inner, segment, loaded)
    }

    /// Counts those holes as damaged that have something on disk.
    pub(super) fn distrust_holes(&self, inner: &Inner<B>, segment: u64, loaded: &mut Loaded) -> Result<()> {
        let first = geometry::first_block(segment);
        for i in 0..geometry::segment_capacity(segment) {
            if !loaded.state.entry(i).is_hole() {
                continue;
            }
            let mut data = [0u8; BLOCK];
            let Some(data) = data.get_mut(..self.disk_len(inner, first + i as u64)) else { continue };
            self.read_raw(inner, first + i as u64, data)?;
            if data.iter().any(|b| *b != 0) {
                loaded.state.set(i, Entry::LOST);
            }
        }
        Ok(())
    }

    /// In a file that was not closed cleanly, decides for each block whose entries differ in the two copies which of
    /// them is true of the data. A block that matches neither keeps its newer entry, and fails when it is read.
    pub(super) fn reconcile(
        &self,
        inner: &Inner<B>,
        keys: &FileKeys,
        segment: u64,
        mut loaded: Loaded,
        older: Option<SegmentState>,
    ) -> Result<Loaded> {
        if !self.is_recovering() {
            return Ok(loaded);
        }
        let older = older.unwrap_or(SegmentState::EMPTY);
        let first = geometry::first_block(segment);
        for i in 0..geometry::segment_capacity(segment) {
            let (new, old) = (loaded.state.entry(i), older.entry(i));
            let len = self.disk_len(inner, first + i as u64);
            if new.is_hole() && !old.is_hole() && len > 0 && inner.access == Access::ReadWrite {
                // The punch may not have come to the data. A later write that is cut short must find zeros there.
                self.erase(inner, geometry::block_offset(first + i as u64), len as u64)?;
            }
            let keep = new == old && len > 0 || new.is_hole() || {
                // A hole as the newer entry was meant: punching changes the entry before the data. An entry beyond the
                // end is of a write that never came to its data.
                len > 0 && !self.only_old_matches(inner, keys, first + i as u64, len, new, old)?
            };
            if !keep {
                loaded.state.set(i, if len == 0 { Entry::HOLE } else { old });
                loaded.unsaved = true;
            }
        }
        Ok(loaded)
    }

    fn only_old_matches(
        &self,
        inner: &Inner<B>,
        keys: &FileKeys,
        block: u64,
        len: usize,
        new: Entry,
        old: Entry,
    ) -> Result<bool> {
        let mut data = [0u8; BLOCK];
        let data = &mut data[..len];
        if self.try_block(inner, keys, block, &new, data)? {
            return Ok(false);
        }
        if old.is_hole() {
            self.read_raw(inner, block, data)?;
            return Ok(data.iter().all(|b| *b == 0));
        }
        self.try_block(inner, keys, block, &old, data)
    }

    /// Bytes of the block's ciphertext on disk: its plaintext length, but for the last block of a file whose begun
    /// shrink a read-only mount may not finish.
    pub(super) fn disk_len(&self, inner: &Inner<B>, block: u64) -> usize {
        match inner.tail_on_disk {
            Some((b, len)) if b == block => len,
            _ => geometry::block_len(block, inner.size),
        }
    }

    /// Whether the block's data on disk, `data.len()` bytes of it, open under `entry`; if so they are in `data`.
    pub(super) fn try_block(
        &self,
        inner: &Inner<B>,
        keys: &FileKeys,
        block: u64,
        entry: &Entry,
        data: &mut [u8],
    ) -> Result<bool> {
        self.read_raw(inner, block, data)?;
        let aad = state::block_aad(keys.file, block);
        Ok(keys.content.open(&entry.nonce, &aad, &entry.tag, data).is_ok())
    }

    /// The block's ciphertext; what lies beyond the end of the backing file comes as zeros.
    pub(super) fn read_raw(&self, inner: &Inner<B>, block: u64, data: &mut [u8]) -> Result<()> {
        let at = geometry::block_offset(block);
        let n = backing::read_into(&self.shared.backing, inner.backing_file()?, data, at)?;
        data[n..].fill(0);
        Ok(())
    }

    /// Writes the state as the next version, over the older copy, or over a newer one that can be spared.
    pub(super) fn store_segment(
        &self,
        inner: &Inner<B>,
        keys: &FileKeys,
        segment: u64,
        loaded: &mut Loaded,
    ) -> Result<()> {
        self.changes.wrote(segment);
        let mut next = loaded.state.clone();
        next.sequence += 1;
        let copy = match loaded.spare {
            _ if loaded.state.sequence == 0 => Copy2::A,
            true => loaded.newest,
            false => loaded.newest.other(),
        };
        let mut out = [0u8; STATE];
        state::seal(&keys.state, keys.file, segment, &next, random::array(), &mut out);
        let len = geometry::state_len(segment);
        let at = geometry::state_offset(segment, copy);
        self.shared.backing.write_at(inner.backing_file()?, &out[..len], at)?;
        *loaded = Loaded { state: next, newest: copy, spare: false, unsaved: false };
        Ok(())
    }
}
