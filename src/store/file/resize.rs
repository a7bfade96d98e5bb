//! Changing the size, punching holes, reserving space, finding data.
//!
//! A shrink to a length above zero goes: TRUNCATING and the new length into segment 0's state; the last block sealed
//! anew at its new length; the backing file cut; TRUNCATING cleared. Found unfinished, it is finished by the next open.

use super::io::{Patch, seal_blocks};
use super::segment::Loaded;
use super::{FileCore, FileKeys, Inner, OpenFile};
use crate::backing::{Access, Allocate, Backing, Stat};
use crate::format::geometry::{self, BLOCK, PAGE, PLAIN_MAX, SegmentRange};
use crate::format::state::{CLEAN, Entry, SPARSE, SegmentState, TRUNCATING};
use crate::store::error::{Result, StoreError};
use std::sync::Arc;

/// Modes of fallocate(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileAllocate {
    /// Reserve space; the file grows to cover the range.
    Default,
    /// Reserve space; the size stays.
    KeepSize,
    /// The range reads as zeros and its space is given back; the size stays.
    PunchHole,
    /// The range reads as zeros; the file grows to cover it unless `keep_size`.
    ZeroRange { keep_size: bool },
}

impl<B: Backing> OpenFile<B> {
    /// ftruncate(2).
    ///
    /// # Errors
    /// [`StoreError::TooLarge`], [`StoreError::NotPermitted`]; damage of the block that becomes the last one; the
    /// backing directory's.
    pub fn set_len(&self, len: u64) -> Result<()> {
        self.writable()?;
        if len > PLAIN_MAX {
            return Err(StoreError::TooLarge);
        }
        self.change(|core, inner| core.resize(inner, len))
    }

    /// fallocate(2).
    ///
    /// # Errors
    /// As [`OpenFile::write`]; `EOPNOTSUPP` of a backing directory that cannot reserve space.
    pub fn allocate(&self, mode: FileAllocate, off: u64, len: u64) -> Result<()> {
        self.writable()?;
        let end = off.checked_add(len).filter(|e| *e <= PLAIN_MAX).ok_or(StoreError::TooLarge)?;
        if len == 0 {
            return Err(StoreError::Invalid);
        }
        self.change(|core, inner| match mode {
            FileAllocate::PunchHole => core.punch(inner, off, end),
            FileAllocate::KeepSize => core.reserve(inner, off, end),
            FileAllocate::Default => {
                core.reserve(inner, off, end)?;
                if end > inner.size { core.resize(inner, end) } else { Ok(()) }
            }
            FileAllocate::ZeroRange { keep_size } => {
                core.punch(inner, off, end)?;
                core.reserve(inner, off, end)?;
                if end > inner.size && !keep_size { core.resize(inner, end) } else { Ok(()) }
            }
        })
    }

    /// lseek(2) with `SEEK_DATA` (`data`) or `SEEK_HOLE`.
    ///
    /// # Errors
    /// [`StoreError::NoSuchOffset`] at or beyond the end, or if there is no data after `off`.
    pub fn seek(&self, off: u64, data: bool) -> Result<u64> {
        let inner = self.read_lock()?;
        if off >= inner.size {
            return Err(StoreError::NoSuchOffset);
        }
        let Some(keys) = inner.keys.as_deref() else { return Err(StoreError::NoSuchOffset) };
        let end = geometry::block_count(inner.size);
        let mut block = off / PAGE;
        while block < end {
            let segment = geometry::segment_of(block);
            let stop = geometry::first_block(segment + 1).min(end);
            let found = self.core.with_segment(&inner, keys, segment, |l| {
                let first = geometry::first_block(segment);
                Ok((block..stop).find(|b| l.state.entry((b - first) as usize).is_hole() != data))
            })?;
            if let Some(b) = found {
                return Ok(off.max(b * PAGE));
            }
            block = stop;
            if data && inner.sparse && block < end {
                block = self.core.skip_absent(&inner, block)?.min(end);
            }
        }
        if data { Err(StoreError::NoSuchOffset) } else { Ok(inner.size) }
    }

    /// fdatasync(2) and fsync(2) of this file: data, states, header and size are durable when it returns. The
    /// directory entry is the namespace's.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn sync(&self) -> Result<()> {
        let core = &self.core;
        {
            let inner = core.inner.read();
            if inner.dropped.is_some() {
                // Nothing is left to be said of it in its states: a lock has done that.
                return self.tell(core.barrier(&inner));
            }
        }
        let synced = {
            let inner = self.read_lock()?;
            let sequence = core.first_sequence(&inner);
            let r = core.barrier(&inner);
            self.tell(r)?;
            (inner.size, inner.changes, sequence)
        };
        let mut inner = core.inner.write();
        let Some(keys) = inner.keys.clone() else { return Ok(()) };
        inner.promised = true;
        let (size, changes, sequence) = synced;
        // What changed between the two locks is not covered and keeps its marks.
        if inner.changes == changes {
            inner.resized = false;
            inner.unclean_durable = !inner.clean;
            let r = core.raise_sealed_length(&inner, &keys, size, sequence);
            core.after_change(&mut inner, r)?;
        }
        Ok(())
    }
}

impl<B: Backing> FileCore<B> {
    /// Sequence of segment 0's state: a barrier that begins now makes it durable, and the data it speaks for.
    fn first_sequence(&self, inner: &Inner<B>) -> Option<u64> {
        let keys = inner.keys.as_deref()?;
        self.with_segment(inner, keys, 0, |l| Ok(l.state.sequence)).ok()
    }

    /// After a barrier: seals the length that is `durable` now, so that losing acknowledged bytes shows. Not before it, nor
    /// after one that proves nothing: a sealed length that survives a power cut which the size does not would disown the
    /// whole file. Nor if segment 0 was written since the barrier began, when its state was `sequence`: this would go over
    /// the copy that is durable. The next fsync does it then.
    fn raise_sealed_length(
        &self,
        inner: &Inner<B>,
        keys: &FileKeys,
        durable: u64,
        sequence: Option<u64>,
    ) -> Result<()> {
        if inner.clean || inner.cut_pending || inner.access != Access::ReadWrite || self.lost_a_barrier() {
            return Ok(());
        }
        let is_due = |l: &Loaded| l.state.file.length < durable && Some(l.state.sequence) == sequence;
        if !self.with_segment(inner, keys, 0, |l| Ok(is_due(l)))? {
            return Ok(());
        }
        let _times = self.shared.inode_locks.exclusive(inner.dev, inner.ino);
        self.keeping_times(inner, |_| {
            self.with_segment_mut(inner, keys, 0, |l| {
                if !is_due(l) {
                    // What a crash left had to be settled first.
                    return Ok(());
                }
                // This copy is durable, whichever was before.
                l.spare = false;
                l.state.file.length = durable;
                self.store_segment(inner, keys, 0, l)?;
                l.spare = true;
                Ok(())
            })
        })
    }

    /// Runs `f`, which writes the backing file, on what the file was before, and puts the mtime back. The caller holds
    /// the inode's stripe exclusively.
    pub(super) fn keeping_times(&self, inner: &Inner<B>, f: impl FnOnce(&Stat) -> Result<()>) -> Result<()> {
        use crate::backing::SetTime;
        let file = inner.backing_file()?;
        let before = self.shared.backing.stat_file(file)?;
        f(&before)?;
        Ok(self.shared.backing.set_file_times(file, SetTime::Omit, SetTime::At(before.mtime))?)
    }

    fn resize(&self, inner: &mut Inner<B>, len: u64) -> Result<()> {
        if len == 0 {
            return self.make_empty(inner);
        }
        if len == inner.size {
            // Changes the times, as truncate(2) to the same length does.
            let _times = self.shared.inode_locks.shared(inner.dev, inner.ino);
            let file = inner.backing_file()?;
            let now = self.shared.backing.stat_file(file)?.size;
            return Ok(self.shared.backing.truncate(file, now)?);
        }
        if len > inner.size {
            let keys = self.begin_change(inner, true)?;
            return self.extend(inner, &keys, len);
        }
        self.shrink(inner, len)
    }

    /// An empty file has neither header nor key: the next write makes new ones.
    pub(super) fn make_empty(&self, inner: &mut Inner<B>) -> Result<()> {
        let _slots = self.shared.inode_locks.exclusive(inner.dev, inner.ino);
        self.shared.backing.truncate(inner.backing_file()?, 0)?;
        self.changes.cut_to(0);
        if let Some(k) = inner.keys.take() {
            self.shared.deks.remove(&k.file);
        }
        self.segments.clear();
        self.set_recovering(false);
        inner.size = 0;
        inner.changes += 1;
        inner.tail_on_disk = None;
        inner.cut_pending = false;
        (inner.clean, inner.sparse, inner.promised, inner.resized) = (false, false, false, false);
        Ok(())
    }

    /// Empties a file that is not open, without its header: true if that was possible here.
    pub(super) fn empty_closed(&self) -> Result<bool> {
        if self.shared.read_only {
            return Err(StoreError::ReadOnly);
        }
        let mut inner = self.inner.write();
        if inner.file.is_some() {
            return Ok(false);
        }
        let file = Arc::new(self.shared.backing.open(&inner.node, Access::ReadWrite)?);
        let st = self.shared.backing.stat_file(&file)?;
        (inner.dev, inner.ino) = (st.dev, st.ino);
        inner.file = Some(file);
        let r = self.make_empty(&mut inner);
        inner.file = None;
        r.map(|()| true)
    }

    /// Grows the file to `to` with a hole. The last block is filled up with zeros first, while it still ends the file:
    /// at no instant does a block have a length on disk that neither of its entries was sealed for.
    pub(super) fn extend(&self, inner: &mut Inner<B>, keys: &Arc<FileKeys>, to: u64) -> Result<()> {
        let _times = self.shared.inode_locks.shared(inner.dev, inner.ino);
        self.fill_last_block(inner, keys, to)?;
        self.extend_with_hole(inner, keys, to)?;
        inner.size = to;
        Ok(())
    }

    fn fill_last_block(&self, inner: &mut Inner<B>, keys: &Arc<FileKeys>, to: u64) -> Result<()> {
        if inner.size.is_multiple_of(PAGE) {
            return Ok(());
        }
        let block = inner.size / PAGE;
        let segment = geometry::segment_of(block);
        let index = (block - geometry::first_block(segment)) as usize;
        if self.with_segment(inner, keys, segment, |l| Ok(l.state.entry(index).is_hole()))? {
            return Ok(());
        }
        let filled = to.min((block + 1) * PAGE);
        self.write_range(inner, keys, Patch { at: inner.size, data: &[] }, None, filled)?;
        inner.size = filled;
        Ok(())
    }

    fn extend_with_hole(&self, inner: &mut Inner<B>, keys: &FileKeys, to: u64) -> Result<()> {
        let last = |size: u64| geometry::segment_of(size.saturating_sub(1) / PAGE);
        if last(to) > last(inner.size) && !inner.sparse {
            self.change_file_state(inner, keys, |f| f.flags |= SPARSE)?;
            inner.sparse = true;
            if inner.promised {
                self.barrier(inner)?;
            }
        }
        Ok(self.shared.backing.truncate(inner.backing_file()?, geometry::backing_size(to))?)
    }

    fn shrink(&self, inner: &mut Inner<B>, len: u64) -> Result<()> {
        let Some(keys) = inner.keys.clone() else { return Err(StoreError::Invalid) };
        self.finish_pending_cut(inner, &keys)?;
        let _times = self.shared.inode_locks.shared(inner.dev, inner.ino);
        // Whatever becomes of this write, CLEAN may be gone and the next change must not rely on it.
        inner.changes += 1;
        self.change_file_state(inner, &keys, |f| {
            f.length = len;
            f.flags = f.flags & !CLEAN | TRUNCATING;
        })?;
        (inner.clean, inner.truncating) = (false, true);
        self.barrier_if_promised(inner)?;
        inner.unclean_durable = inner.promised;
        self.reseal_last(inner, &keys, len, false)?;
        self.cut(inner, &keys, len)
    }

    /// Reads from now on as if the shrink to `len` were finished.
    fn look_as_if_cut(&self, inner: &mut Inner<B>, keys: &FileKeys, len: u64) -> Result<()> {
        let block = (len - 1) / PAGE;
        let resealed = self.already_resealed(inner, keys, block, len);
        if !matches!(resealed, Ok(true)) {
            inner.tail_on_disk = Some((block, geometry::block_len(block, inner.size)));
        }
        inner.size = len;
        resealed.map(|_| ())
    }

    /// Before anything else changes, what a failed shrink left is finished.
    pub(super) fn finish_pending_cut(&self, inner: &mut Inner<B>, keys: &FileKeys) -> Result<()> {
        if !inner.cut_pending {
            return Ok(());
        }
        let len = inner.size;
        inner.size = geometry::plain_size(self.shared.backing.stat_file(inner.backing_file()?)?.size);
        inner.tail_on_disk = None;
        self.segments.clear();
        self.set_recovering(true);
        let _times = self.shared.inode_locks.shared(inner.dev, inner.ino);
        self.finish_cut(inner, keys, len)?;
        inner.cut_pending = false;
        Ok(())
    }

    /// The rest of a shrink whose TRUNCATING stands in the state.
    fn finish_cut(&self, inner: &mut Inner<B>, keys: &FileKeys, len: u64) -> Result<()> {
        let resealed = self.already_resealed(inner, keys, (len - 1) / PAGE, len)?;
        self.reseal_last(inner, keys, len, resealed)?;
        self.barrier_if_promised(inner)?;
        self.cut(inner, keys, len)
    }

    /// A barrier where the file's content was promised to somebody: without it a power cut could keep the later step
    /// and lose the earlier.
    fn barrier_if_promised(&self, inner: &Inner<B>) -> Result<()> {
        if inner.promised {
            self.barrier(inner)?;
        }
        Ok(())
    }

    /// Seals the block that will be last at its new length, unless that was `done` before a crash, and makes holes of
    /// those behind it.
    fn reseal_last(&self, inner: &Inner<B>, keys: &FileKeys, len: u64, done: bool) -> Result<()> {
        let block = (len - 1) / PAGE;
        let segment = geometry::segment_of(block);
        self.with_segment_mut(inner, keys, segment, |l| {
            if l.state.sequence == 0 {
                return Ok(());
            }
            let first = geometry::first_block(segment);
            let index = (block - first) as usize;
            let mut data = [0u8; BLOCK];
            let data = &mut data[..geometry::block_len(block, len)];
            let shorter = data.len() < geometry::block_len(block, inner.size);
            // One that is lost is so at any length.
            let is_there = !l.state.entry(index).is_hole() && l.state.entry(index) != Entry::LOST;
            let reseal = !done && shorter && is_there;
            if reseal {
                self.read_blocks_of_old(inner, keys, l, block, data)?;
                let r = SegmentRange { segment, first: block, end: block + 1 };
                seal_blocks(keys, r, data, |_, e| l.state.set(index, e));
            }
            drop_entries_behind(l, index);
            self.store_segment(inner, keys, segment, l)?;
            if reseal {
                self.shared.backing.write_at(inner.backing_file()?, data, geometry::block_offset(block))?;
            }
            Ok(())
        })
    }

    fn cut(&self, inner: &mut Inner<B>, keys: &FileKeys, len: u64) -> Result<()> {
        self.shared.backing.truncate(inner.backing_file()?, geometry::backing_size(len))?;
        self.changes.cut_to(len);
        inner.size = len;
        inner.resized = true;
        self.segments.forget_from(geometry::segment_count(len));
        self.barrier_if_promised(inner)?;
        self.change_file_state(inner, keys, |f| f.flags &= !TRUNCATING)?;
        inner.truncating = false;
        Ok(())
    }

    /// An open that finds a begun shrink to `len`: finishes it, or, where nothing may be written, reads as if it were.
    pub(super) fn finish_shrink(
        &self,
        inner: &mut Inner<B>,
        keys: &FileKeys,
        len: u64,
        access: Access,
        loaded: Loaded,
        older: Option<SegmentState>,
    ) -> Result<()> {
        let mut writable = access == Access::ReadWrite && keys.writable;
        if !writable
            && keys.writable
            && !self.shared.read_only
            && let Ok(file) = self.shared.backing.open(&inner.node, Access::ReadWrite)
        {
            inner.file = Some(Arc::new(file));
            inner.access = Access::ReadWrite;
            writable = true;
        }
        let loaded = self.reconcile(inner, keys, 0, loaded, older)?;
        self.put_segment0(loaded);
        if len == 0 {
            return if writable { self.make_empty(inner) } else { Err(StoreError::ReadOnly) };
        }
        // If cutting failed just now, reading goes on and the next change tries again.
        inner.cut_pending = writable && inner.stale;
        if !writable || inner.cut_pending {
            return self.look_as_if_cut(inner, keys, len);
        }
        tracing::info!(file = %keys.file, "finishing a truncation to {len} bytes that was interrupted");
        let _times = self.shared.inode_locks.shared(inner.dev, inner.ino);
        self.finish_cut(inner, keys, len)
    }

    /// Whether the block that will be last needs nothing more: a hole, a whole block, or sealed at its new length.
    fn already_resealed(&self, inner: &Inner<B>, keys: &FileKeys, block: u64, len: u64) -> Result<bool> {
        let segment = geometry::segment_of(block);
        let index = (block - geometry::first_block(segment)) as usize;
        let e = self.with_segment(inner, keys, segment, |l| Ok(l.state.entry(index)))?;
        let n = geometry::block_len(block, len);
        if e.is_hole() || n == geometry::block_len(block, inner.size) {
            return Ok(true);
        }
        let mut data = [0u8; BLOCK];
        self.try_block(inner, keys, block, &e, &mut data[..n])
    }

    /// Makes the bytes `off..end` read as zeros, as far as the file goes; whole blocks become holes.
    fn punch(&self, inner: &mut Inner<B>, off: u64, end: u64) -> Result<()> {
        let end = end.min(inner.size);
        if off >= end {
            return Ok(());
        }
        let keys = self.begin_change(inner, false)?;
        let _times = self.shared.inode_locks.shared(inner.dev, inner.ino);
        let first = off.div_ceil(PAGE);
        let last = if end == inner.size { end.div_ceil(PAGE) } else { end / PAGE };
        let zeros = [0u8; BLOCK];
        let zero = |from: u64, to: u64| {
            let n = to.saturating_sub(from) as usize;
            let patch = Patch { at: from, data: zeros.get(..n).unwrap_or(&zeros) };
            if n == 0 { Ok(()) } else { self.write_range(inner, &keys, patch, None, inner.size) }
        };
        zero(off, end.min(first * PAGE))?;
        if last >= first {
            zero((last * PAGE).max(off), end)?;
        }
        let mut at = first;
        while at < last {
            if inner.sparse {
                // What is absent is a hole already, and there can be very much of it.
                at = self.skip_absent(inner, at)?;
            }
            let Some(r) = geometry::by_segment(at, last).next() else { break };
            self.punch_blocks(inner, &keys, r)?;
            at = r.end;
        }
        Ok(())
    }

    fn punch_blocks(&self, inner: &Inner<B>, keys: &FileKeys, r: SegmentRange) -> Result<()> {
        self.with_segment_mut(inner, keys, r.segment, |l| {
            let first = geometry::first_block(r.segment);
            if l.state.sequence == 0 {
                return Ok(());
            }
            for b in r.first..r.end {
                l.state.set((b - first) as usize, Entry::HOLE);
            }
            self.store_segment(inner, keys, r.segment, l)?;
            let len = (r.end - 1 - r.first) * PAGE + geometry::block_len(r.end - 1, inner.size) as u64;
            self.erase(inner, geometry::block_offset(r.first), len)
        })
    }

    /// Punches backing bytes out, or overwrites them with zeros where the file system cannot.
    pub(super) fn erase(&self, inner: &Inner<B>, at: u64, len: u64) -> Result<()> {
        let file = inner.backing_file()?;
        match self.shared.backing.allocate(file, Allocate::PunchHole, at, len) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                let zeros = [0u8; BLOCK];
                for (i, done) in (0..len).step_by(BLOCK).enumerate() {
                    let n = (len - done).min(PAGE) as usize;
                    self.shared.backing.write_at(file, &zeros[..n], at + i as u64 * PAGE)?;
                }
                Ok(())
            }
            r => Ok(r?),
        }
    }

    /// Reserves backing space for the bytes `off..end`; the size stays.
    fn reserve(&self, inner: &mut Inner<B>, off: u64, end: u64) -> Result<()> {
        let at = geometry::block_offset(off / PAGE);
        let to = geometry::backing_size(end);
        Ok(self.shared.backing.allocate(inner.backing_file()?, Allocate::KeepSize, at, to.saturating_sub(at))?)
    }

    /// First block of the segment that holds the next data the backing file knows of, at or after segment-first block
    /// `block`: so that looking for data in a large sparse file need not read every absent state.
    pub(super) fn skip_absent(&self, inner: &Inner<B>, block: u64) -> Result<u64> {
        let at = geometry::state_offset(geometry::segment_of(block), geometry::Copy2::A);
        match self.shared.backing.next_data(inner.backing_file()?, at)? {
            None => Ok(u64::MAX),
            Some(found) => Ok((geometry::plain_size(found) / PAGE).max(block)),
        }
    }
}

fn drop_entries_behind(l: &mut Loaded, index: usize) {
    for i in index + 1..geometry::SEGMENT_BLOCKS as usize {
        l.state.set(i, Entry::HOLE);
    }
}
