//! Reading and writing blocks.

use super::segment::Loaded;
use super::{FileCore, FileKeys, Inner, OpenFile, log_damage};
use crate::backing::Backing;
use crate::crypto::aead::NONCE_LEN;
use crate::crypto::random;
use crate::format::damage::Damage;
use crate::format::geometry::{self, BLOCK, PAGE, PLAIN_MAX, SEGMENT_BLOCKS, SegmentRange};
use crate::format::header::Slot;
use crate::format::state::{self, CLEAN, Entry, FileState, SegmentState, TRUNCATING};
use crate::store::error::{Result, StoreError};
use crate::store::header;
use std::cell::RefCell;
use std::sync::Arc;

thread_local! {
    /// Ciphertext on its way to or from disk, one segment's at most; kept so that no request allocates.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    /// What a large write seals before it takes a lock.
    static AHEAD: RefCell<SealBuffer> = const { RefCell::new(SealBuffer { data: Vec::new(), entries: Vec::new() }) };
}

/// Writes of at least this many bytes seal their whole blocks before they wait for any lock, so that two writers of one
/// file encrypt at the same time. Below it the edges that cannot be sealed so early are most of the work.
const AHEAD_MIN: usize = 64 << 10;

/// Reads of at least this many blocks are taken for a part of a stream.
const STREAM_BLOCKS: u64 = 16;

struct SealBuffer {
    data: Vec<u8>,
    entries: Vec<Entry>,
}

/// Whole blocks sealed before any lock was taken: a block's ciphertext depends on nothing but the keys, its number and
/// its new content.
#[derive(Clone, Copy)]
pub(super) struct SealedAhead<'a> {
    keys: &'a Arc<FileKeys>,
    first: u64,
    entries: &'a [Entry],
    data: &'a [u8],
}

impl<'a> SealedAhead<'a> {
    fn new(keys: &'a Arc<FileKeys>, patch: Patch<'_>, buf: &'a mut SealBuffer) -> Option<Self> {
        let (first, end) = (patch.at.div_ceil(PAGE), patch.end() / PAGE);
        if first >= end || patch.data.len() < AHEAD_MIN {
            return None;
        }
        let skip = (first * PAGE - patch.at) as usize;
        let whole = patch.data.get(skip..skip + ((end - first) * PAGE) as usize)?;
        buf.data.clear();
        buf.data.extend_from_slice(whole);
        buf.entries.clear();
        for r in geometry::by_segment(first, end) {
            let from = ((r.first - first) * PAGE) as usize;
            let part = buf.data.get_mut(from..from + ((r.end - r.first) * PAGE) as usize)?;
            seal_blocks(keys, r, part, |_, e| buf.entries.push(e));
        }
        Some(Self { keys, first, entries: &buf.entries, data: &buf.data })
    }

    /// The blocks of `r` that are sealed: their range, entries and ciphertext.
    fn part(&self, r: SegmentRange) -> Option<(SegmentRange, &'a [Entry], &'a [u8])> {
        let first = r.first.max(self.first);
        let end = r.end.min(self.first + self.entries.len() as u64);
        let (from, to) = (first.checked_sub(self.first)? as usize, end.checked_sub(self.first)? as usize);
        let entries = self.entries.get(from..to).filter(|e| !e.is_empty())?;
        let data = self.data.get(from * BLOCK..to * BLOCK)?;
        Some((SegmentRange { segment: r.segment, first, end }, entries, data))
    }
}

/// A change to a byte range: the bytes to put there, or zeros.
#[derive(Clone, Copy)]
pub(super) struct Patch<'a> {
    pub at: u64,
    pub data: &'a [u8],
}

impl Patch<'_> {
    fn end(&self) -> u64 {
        self.at + self.data.len() as u64
    }
}

impl<B: Backing> OpenFile<B> {
    /// Reads from `off` into `buf`; returns the bytes read, fewer than asked only at the end of the file.
    ///
    /// # Errors
    /// [`Damage::BlockAuth`] and the other damages of the range read; other blocks stay readable.
    pub fn read(&self, off: u64, buf: &mut [u8]) -> Result<usize> {
        let inner = self.read_lock()?;
        let n = inner.size.saturating_sub(off).min(buf.len() as u64) as usize;
        let (Some(buf), Some(keys)) = (buf.get_mut(..n), inner.keys.as_deref()) else { return Ok(0) };
        if n == 0 {
            return Ok(0);
        }
        let end = off + n as u64;
        for r in geometry::by_segment(off / PAGE, end.div_ceil(PAGE)) {
            let from = off.max(r.first * PAGE);
            let to = end.min(r.end * PAGE);
            let part = &mut buf[(from - off) as usize..(to - off) as usize];
            self.core.hint_before_state(&inner, r)?;
            self.core
                .with_segment(&inner, keys, r.segment, |l| self.core.read_range(&inner, keys, l, r, from, part))?;
        }
        Ok(n)
    }

    /// Writes all of `data` at `off`, extending the file if need be.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`], [`StoreError::NotPermitted`] on a handle for reading, damage of a block that is only
    /// partly overwritten, the key service's for the first byte of a file, the backing directory's. After an error of
    /// the backing directory (a full disk) each block is as it was or as it should have become.
    pub fn write(&self, off: u64, data: &[u8]) -> Result<usize> {
        self.writable()?;
        if data.is_empty() {
            return Ok(0);
        }
        let end = off.checked_add(data.len() as u64).filter(|e| *e <= PLAIN_MAX).ok_or(StoreError::TooLarge)?;
        let patch = Patch { at: off, data };
        let keys = self.read_lock()?.keys.clone();
        AHEAD.with_borrow_mut(|buf| {
            let ahead = keys.as_ref().and_then(|k| SealedAhead::new(k, patch, buf));
            self.write_patch(patch, end, ahead)
        })?;
        Ok(data.len())
    }

    fn write_patch(&self, patch: Patch<'_>, end: u64, ahead: Option<SealedAhead<'_>>) -> Result<()> {
        {
            let inner = self.read_lock()?;
            let settled = !inner.clean && !inner.cut_pending;
            if let (true, true, Some(keys)) = (end <= inner.size, settled, &inner.keys) {
                let _times = self.core.shared.inode_locks.shared(inner.dev, inner.ino);
                return self.core.write_range(&inner, keys, patch, ahead, inner.size);
            }
        }
        self.change(|core, inner| core.write_exclusive(inner, patch, ahead))
    }
}

impl<B: Backing> FileCore<B> {
    /// Before a state is fetched from disk, the data that will be wanted next is asked for, so that one does not wait for
    /// the other: the blocks of the read, or, if that is a part of a stream, the rest of the segment.
    fn hint_before_state(&self, inner: &Inner<B>, r: SegmentRange) -> Result<()> {
        if self.segments.has(r.segment) {
            return Ok(());
        }
        let stream = r.end - r.first >= STREAM_BLOCKS;
        let end = if stream { geometry::first_block(r.segment + 1) } else { r.end };
        let at = geometry::block_offset(r.first);
        self.shared.backing.will_need(inner.backing_file()?, at, (end - r.first) * PAGE);
        Ok(())
    }

    /// Reads the plaintext bytes `from..from + out.len()`, all inside the blocks of `r`.
    pub(super) fn read_range(
        &self,
        inner: &Inner<B>,
        keys: &FileKeys,
        l: &Loaded,
        r: SegmentRange,
        from: u64,
        out: &mut [u8],
    ) -> Result<()> {
        let to = from + out.len() as u64;
        let whole = from == r.first * PAGE && (to == r.end * PAGE || to == inner.size) && inner.tail_on_disk.is_none();
        if whole {
            return self.read_blocks(inner, keys, l, r, out);
        }
        SCRATCH.with_borrow_mut(|scratch| {
            let len = (r.end - 1 - r.first) as usize * BLOCK + self.disk_len(inner, r.end - 1);
            scratch.resize(len, 0);
            self.read_blocks(inner, keys, l, r, scratch)?;
            let skip = (from - r.first * PAGE) as usize;
            let part = scratch.get(skip..skip + out.len()).ok_or(StoreError::Invalid)?;
            out.copy_from_slice(part);
            Ok(())
        })
    }

    /// Reads whole blocks; `out` is as long as their ciphertext, only the last of them possibly short.
    fn read_blocks(
        &self,
        inner: &Inner<B>,
        keys: &FileKeys,
        l: &Loaded,
        r: SegmentRange,
        out: &mut [u8],
    ) -> Result<()> {
        let first = geometry::first_block(r.segment);
        let entry = |block: u64| l.state.entry((block - first) as usize);
        if (r.first..r.end).all(|b| entry(b).is_hole()) {
            out.fill(0);
            return Ok(());
        }
        self.read_raw(inner, r.first, out)?;
        for (block, data) in (r.first..r.end).zip(out.chunks_mut(BLOCK)) {
            let e = entry(block);
            if e.is_hole() {
                data.fill(0);
            } else if keys.content.open(&e.nonce, &state::block_aad(keys.file, block), &e.tag, data).is_err() {
                data.fill(0);
                let d = Damage::BlockAuth { block };
                log_damage(keys, &d);
                return Err(d.into());
            }
        }
        Ok(())
    }

    /// Writes with the file's lock held exclusively: makes the header, clears CLEAN, fills up to the patch.
    fn write_exclusive(&self, inner: &mut Inner<B>, patch: Patch<'_>, ahead: Option<SealedAhead<'_>>) -> Result<()> {
        let keys = self.begin_change(inner, patch.end() > inner.size)?;
        if patch.at > inner.size {
            self.extend(inner, &keys, patch.at)?;
        }
        let _times = self.shared.inode_locks.shared(inner.dev, inner.ino);
        let size = inner.size.max(patch.end());
        self.write_range(inner, &keys, patch, ahead, size)?;
        inner.size = size;
        Ok(())
    }

    /// What must be on disk before a file's content changes: a header, and CLEAN cleared. Before the *size* of a file
    /// changes whose content somebody was promised, the cleared CLEAN must be durable: if the new size survived a power
    /// cut and the cleared flag did not, the whole file would count as tampered with.
    pub(super) fn begin_change(&self, inner: &mut Inner<B>, resize: bool) -> Result<Arc<FileKeys>> {
        let keys = match &inner.keys {
            Some(k) => Arc::clone(k),
            None => self.create_header(inner)?,
        };
        self.finish_pending_cut(inner, &keys)?;
        if inner.clean || inner.truncating {
            self.change_file_state(inner, &keys, |f| f.flags &= !(CLEAN | TRUNCATING))?;
            (inner.clean, inner.truncating) = (false, false);
            inner.unclean_durable = false;
            inner.changes += 1;
        }
        if resize {
            if inner.promised && !inner.unclean_durable {
                self.barrier(inner)?;
                inner.unclean_durable = true;
            }
            inner.resized = true;
            inner.changes += 1;
        }
        Ok(keys)
    }

    /// Writes segment 0's state with a changed length or flags.
    pub(super) fn change_file_state(
        &self,
        inner: &Inner<B>,
        keys: &FileKeys,
        change: impl FnOnce(&mut FileState),
    ) -> Result<()> {
        self.with_segment_mut(inner, keys, 0, |l| {
            change(&mut l.state.file);
            self.store_segment(inner, keys, 0, l)
        })
    }

    /// Gives an empty file its identity and key: page 0 with both slots and the first state, in one write.
    fn create_header(&self, inner: &mut Inner<B>) -> Result<Arc<FileKeys>> {
        let file = Arc::clone(inner.backing_file()?);
        // Before the stripe, which others share: no other file's user is to wait for this one's key service.
        let ready = header::prepare(&self.shared, inner.ready.take())?;
        let _slots = self.shared.inode_locks.exclusive(inner.dev, inner.ino);
        if self.shared.backing.stat_file(&file)?.size != 0 {
            // The remains of a first page that never became whole.
            self.shared.backing.truncate(&file, 0)?;
        }
        let (keys, l) = header::with_new_header(&self.shared, ready, |dek, slot| {
            let keys = FileKeys::new(dek, slot);
            let (page, state) = first_page(&keys, slot);
            self.shared.backing.write_at(&file, &page, 0)?;
            Ok((keys, Loaded { state, newest: geometry::Copy2::A, spare: false, unsaved: false }))
        })?;
        let keys = Arc::new(keys);
        self.segments.clear();
        self.put_segment0(l);
        self.set_recovering(false);
        inner.keys = Some(Arc::clone(&keys));
        (inner.clean, inner.sparse, inner.truncating) = (false, false, false);
        (inner.promised, inner.unclean_durable) = (false, false);
        Ok(keys)
    }

    /// Writes the patch. `size` is the plaintext size that results; the patch does not begin beyond the present one.
    /// What was sealed `ahead` is used if the file still has the same keys.
    pub(super) fn write_range(
        &self,
        inner: &Inner<B>,
        keys: &Arc<FileKeys>,
        patch: Patch<'_>,
        ahead: Option<SealedAhead<'_>>,
        size: u64,
    ) -> Result<()> {
        let ahead = ahead.filter(|a| Arc::ptr_eq(a.keys, keys));
        for r in geometry::by_segment(patch.at / PAGE, patch.end().div_ceil(PAGE)) {
            self.with_segment_mut(inner, keys, r.segment, |l| match ahead.and_then(|a| a.part(r)) {
                Some(part) => self.write_sealed(inner, keys, l, r, part, patch, size),
                None => self.write_segment(inner, keys, l, r, patch, size),
            })?;
        }
        Ok(())
    }

    /// One segment's part of a write: new entries into the state, the state to disk, then the data.
    fn write_segment(
        &self,
        inner: &Inner<B>,
        keys: &FileKeys,
        l: &mut Loaded,
        r: SegmentRange,
        patch: Patch<'_>,
        size: u64,
    ) -> Result<()> {
        SCRATCH.with_borrow_mut(|scratch| {
            self.compose_and_seal(inner, keys, l, r, patch, size, scratch)?;
            self.store_segment(inner, keys, r.segment, l)?;
            let at = geometry::block_offset(r.first);
            Ok(self.shared.backing.write_at(inner.backing_file()?, scratch, at)?)
        })
    }

    /// The same for a segment most of whose blocks are sealed already: only the edges remain.
    #[allow(clippy::too_many_arguments, reason = "one step of write_range, with what it knows")]
    fn write_sealed(
        &self,
        inner: &Inner<B>,
        keys: &FileKeys,
        l: &mut Loaded,
        r: SegmentRange,
        (done, entries, data): (SegmentRange, &[Entry], &[u8]),
        patch: Patch<'_>,
        size: u64,
    ) -> Result<()> {
        let first = geometry::first_block(r.segment);
        SCRATCH.with_borrow_mut(|scratch| {
            let mut edges = [Vec::new(), Vec::new()];
            for (edge, (from, to)) in edges.iter_mut().zip([(r.first, done.first), (done.end, r.end)]) {
                if from < to {
                    let edge_range = SegmentRange { segment: r.segment, first: from, end: to };
                    self.compose_and_seal(inner, keys, l, edge_range, patch, size, scratch)?;
                    edge.extend_from_slice(scratch);
                }
            }
            for (block, e) in (done.first..done.end).zip(entries) {
                l.state.set((block - first) as usize, *e);
            }
            self.store_segment(inner, keys, r.segment, l)?;
            let file = inner.backing_file()?;
            let [head, tail] = &edges;
            for (block, part) in [(r.first, &head[..]), (done.first, data), (done.end, &tail[..])] {
                if !part.is_empty() {
                    self.shared.backing.write_at(file, part, geometry::block_offset(block))?;
                }
            }
            Ok(())
        })
    }

    #[allow(clippy::too_many_arguments, reason = "one step of write_range, with what it knows")]
    fn compose_and_seal(
        &self,
        inner: &Inner<B>,
        keys: &FileKeys,
        l: &mut Loaded,
        r: SegmentRange,
        patch: Patch<'_>,
        size: u64,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let last = geometry::block_len(r.end - 1, size);
        out.resize((r.end - 1 - r.first) as usize * BLOCK + last, 0);
        for (block, out) in (r.first..r.end).zip(out.chunks_mut(BLOCK)) {
            self.compose(inner, keys, l, block, patch, out)?;
        }
        let first = geometry::first_block(r.segment);
        seal_blocks(keys, r, out, |block, e| l.state.set((block - first) as usize, e));
        Ok(())
    }

    /// The block's new plaintext: the patch over what was there, zeros where nothing was.
    fn compose(
        &self,
        inner: &Inner<B>,
        keys: &FileKeys,
        l: &Loaded,
        block: u64,
        patch: Patch<'_>,
        out: &mut [u8],
    ) -> Result<()> {
        let start = block * PAGE;
        let end = start + out.len() as u64;
        let (from, to) = (patch.at.max(start), patch.end().min(end));
        if from > start || to < end {
            let old = geometry::block_len(block, inner.size).min(out.len());
            out[old..].fill(0);
            if old > 0 {
                self.read_blocks_of_old(inner, keys, l, block, &mut out[..old])?;
            }
        }
        if let Some(n) = to.checked_sub(from) {
            let skip = (from - patch.at) as usize;
            out[(from - start) as usize..(to - start) as usize].copy_from_slice(&patch.data[skip..skip + n as usize]);
        }
        Ok(())
    }

    /// A block's present plaintext. `out` may be shorter than the block: a shrink keeps only its beginning.
    pub(super) fn read_blocks_of_old(
        &self,
        inner: &Inner<B>,
        keys: &FileKeys,
        l: &Loaded,
        block: u64,
        out: &mut [u8],
    ) -> Result<()> {
        let segment = geometry::segment_of(block);
        let r = SegmentRange { segment, first: block, end: block + 1 };
        let mut whole = [0u8; BLOCK];
        let whole = &mut whole[..geometry::block_len(block, inner.size)];
        self.read_blocks(inner, keys, l, r, whole)?;
        let n = out.len();
        out.copy_from_slice(whole.get(..n).ok_or(StoreError::Invalid)?);
        Ok(())
    }
}

/// Encrypts the blocks of `r` in place and hands out their new entries.
pub(super) fn seal_blocks(keys: &FileKeys, r: SegmentRange, data: &mut [u8], mut put: impl FnMut(u64, Entry)) {
    // One call to the kernel for all nonces of the request.
    let mut nonces = [0u8; NONCE_LEN * SEGMENT_BLOCKS as usize];
    let nonces = &mut nonces[..NONCE_LEN * (r.end - r.first) as usize];
    random::fill(nonces);
    for ((block, data), n) in (r.first..r.end).zip(data.chunks_mut(BLOCK)).zip(nonces.as_chunks::<NONCE_LEN>().0) {
        let tag = keys.content.seal(n, &state::block_aad(keys.file, block), data);
        put(block, Entry { nonce: *n, tag });
    }
}

/// Page 0 of a new file: the slot twice, the first state in copy A, nothing in copy B.
fn first_page(keys: &FileKeys, slot: &Slot) -> ([u8; PAGE as usize], SegmentState) {
    let mut page = [0u8; PAGE as usize];
    let bytes = slot.encode();
    page[..geometry::SLOT].copy_from_slice(&bytes);
    page[geometry::SLOT..2 * geometry::SLOT].copy_from_slice(&bytes);
    let mut state = SegmentState::EMPTY;
    state.sequence = 1;
    let mut sealed = [0u8; geometry::STATE];
    state::seal(&keys.state, keys.file, 0, &state, random::array(), &mut sealed);
    let at = geometry::state_offset(0, geometry::Copy2::A) as usize;
    page[at..at + geometry::STATE0].copy_from_slice(&sealed[..geometry::STATE0]);
    (page, state)
}
