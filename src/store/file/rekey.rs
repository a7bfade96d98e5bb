//! A file's content on its way into a new backing file, under a new DEK, while the file is in use.
//!
//! The copy is made segment by segment with the file's lock held shared for one at a time, so nobody waits for more than
//! that. What is written meanwhile is noted by segment number, and copied again; the last of it under the file's lock,
//! held exclusively. The note is made by [`FileCore::store_segment`](super::segment), which every change of content
//! passes, under the segment's lock and before the data is written: so whoever copies a segment after taking the note
//! waits for that write to end.

use super::{FileCore, FileKeys, Inner, OpenFile};
use crate::backing::Backing;
use crate::format::geometry::{self, BLOCK, PAGE, SEGMENT_BLOCKS, SegmentRange};
use crate::format::ids::FileId;
use crate::store::error::{Result, StoreError};
use crate::store::header;
use crate::store::shared::Shared;
use parking_lot::{Mutex, RwLockWriteGuard};
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of a whole segment's plaintext.
const PART: usize = SEGMENT_BLOCKS as usize * BLOCK;

/// What has changed of a file since it was last asked, while somebody wants to know.
#[derive(Default)]
pub(super) struct Changes {
    on: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    segments: BTreeSet<u64>,
    /// The shortest length the file was cut to.
    cut: Option<u64>,
}

impl Changes {
    /// The segment is about to change. The caller holds its lock.
    pub fn wrote(&self, segment: u64) {
        if self.on.load(Ordering::Relaxed) {
            self.seen.lock().segments.insert(segment);
        }
    }

    /// The file was cut. The caller holds the file's lock exclusively.
    pub fn cut_to(&self, len: u64) {
        if self.on.load(Ordering::Relaxed) {
            let mut seen = self.seen.lock();
            seen.cut = Some(seen.cut.map_or(len, |c| c.min(len)));
        }
    }

    /// Whether the file was empty since the last look.
    fn was_emptied(&self) -> bool {
        self.seen.lock().cut == Some(0)
    }

    fn take(&self) -> Seen {
        std::mem::take(&mut *self.seen.lock())
    }
}

/// A stretch of a segment.
struct Run {
    at: u64,
    len: usize,
    hole: bool,
}

fn bytes_of(runs: &[Run]) -> u64 {
    runs.iter().map(|r| r.len as u64).sum()
}

/// The copy of an open file, in a new backing file that nobody else knows. Dropping it ends the copying; the backing
/// file is the caller's to remove.
pub(in crate::store) struct Fresh<B: Backing> {
    source: OpenFile<B>,
    copy: OpenFile<B>,
}

/// The source's lock, held exclusively: nobody reads or writes it.
pub(in crate::store) struct Held<'a, B: Backing>(RwLockWriteGuard<'a, Inner<B>>);

impl<B: Backing> Held<'_, B> {
    /// Device and inode number of the backing inode.
    pub fn key(&self) -> (u64, u64) {
        (self.0.dev, self.0.ino)
    }
}

impl<B: Backing> Fresh<B> {
    /// Begins a copy of `source` into the empty `file`.
    ///
    /// # Errors
    /// `EBUSY` if it is being copied already; the key service's; the backing directory's.
    pub fn begin(shared: &Arc<Shared<B>>, source: OpenFile<B>, node: Arc<B::Node>, file: B::File) -> Result<Self> {
        let (_, copy) = FileCore::with_new_file(shared, node, file, header::prepare_own(shared)?)?;
        {
            // Nobody is in the middle of a write that is not noted.
            let _alone = source.core.inner.write();
            if source.core.changes.on.swap(true, Ordering::AcqRel) {
                return Err(io::Error::from_raw_os_error(libc::EBUSY).into());
            }
            source.core.changes.take();
        }
        Ok(Self { source, copy })
    }

    /// Copies everything once. `step` is told the bytes of each stretch, and may end it.
    ///
    /// # Errors
    /// Damage of the content, the backing directory's, the key service's, those of `step`.
    pub fn copy_all(&self, step: &dyn Fn(u64) -> Result<()>) -> Result<()> {
        let (core, mut buf) = (&self.source.core, Vec::new());
        let mut at = 0;
        loop {
            let runs = {
                let inner = self.source.read_lock()?;
                let end = geometry::block_count(inner.size);
                if at > 0 && at < end && inner.sparse {
                    // Of what is absent there is nothing to copy, and there can be very much of it.
                    at = core.skip_absent(&inner, at)?;
                }
                if at >= end {
                    return Ok(());
                }
                core.read_runs(&inner, geometry::segment_of(at), &mut buf)?
            };
            self.put(&runs, &buf)?;
            step(bytes_of(&runs))?;
            at = geometry::first_block(geometry::segment_of(at) + 1);
        }
    }

    /// Copies again what has changed since the last look; returns how many segments those were. `step` as there.
    ///
    /// # Errors
    /// As [`Fresh::copy_all`]; the copy is of no use then.
    pub fn catch_up(&self, step: &dyn Fn(u64) -> Result<()>) -> Result<usize> {
        let mut buf = Vec::new();
        self.copy_changed(|segment| {
            let runs = self.source.core.read_runs(&*self.source.read_lock()?, segment, &mut buf)?;
            self.put(&runs, &buf)?;
            step(bytes_of(&runs))
        })
    }

    fn copy_changed(&self, mut one: impl FnMut(u64) -> Result<()>) -> Result<usize> {
        let seen = self.source.core.changes.take();
        if let Some(len) = seen.cut.filter(|len| *len < self.copy.len()) {
            self.copy.set_len(len)?;
        }
        for segment in &seen.segments {
            one(*segment)?;
        }
        Ok(seen.segments.len() + usize::from(seen.cut.is_some()))
    }

    fn put(&self, runs: &[Run], data: &[u8]) -> Result<()> {
        let mut data = data;
        for r in runs {
            if r.hole {
                // What lies beyond the end becomes a hole by itself.
                let there = self.copy.len().saturating_sub(r.at).min(r.len as u64);
                if there > 0 {
                    self.copy.allocate(super::FileAllocate::PunchHole, r.at, there)?;
                }
            } else {
                let (part, rest) = data.split_at_checked(r.len).ok_or(StoreError::Invalid)?;
                self.copy.write(r.at, part)?;
                data = rest;
            }
        }
        Ok(())
    }

    /// Takes the source's lock, with what is known of it up to date.
    ///
    /// # Errors
    /// If its keys are gone, or it cannot be read.
    pub fn hold(&self) -> Result<Held<'_, B>> {
        let core = &self.source.core;
        let mut inner = core.inner.write();
        core.shared.keys.may_change()?;
        core.refresh(&mut inner)?;
        Ok(Held(inner))
    }

    /// Makes the copy as long as the source is now, if that ends in a hole.
    ///
    /// # Errors
    /// The backing directory's; the key service's, for all that is a hole.
    pub fn stretch(&self) -> Result<()> {
        let len = self.source.len();
        if self.copy.len() < len { self.copy.set_len(len) } else { Ok(()) }
    }

    /// Makes the copy equal to the source, whose lock is held, and marks it as closed cleanly. Says whether there is any
    /// content, and whether the copy changed on disk. Makes no header, so calls no key service for one.
    ///
    /// # Errors
    /// As [`Fresh::copy_all`].
    pub fn finish(&self, held: &Held<'_, B>) -> Result<Finished> {
        let (inner, mut buf) = (&*held.0, Vec::new());
        if inner.size == 0 {
            return Ok(Finished::Empty);
        }
        if self.copy.is_empty() || self.source.core.changes.was_emptied() {
            return Ok(Finished::Anew);
        }
        let mut changed = self.copy_changed(|segment| {
            let runs = self.source.core.read_runs(inner, segment, &mut buf)?;
            self.put(&runs, &buf)
        })? > 0;
        if self.copy.len() != inner.size {
            self.copy.set_len(inner.size)?;
            changed = true;
        }
        Ok(if self.settle()? || changed { Finished::Changed } else { Finished::AsBefore })
    }

    /// Marks the copy as closed cleanly; says whether it was not.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn settle(&self) -> Result<bool> {
        let core = &self.copy.core;
        let mut inner = core.inner.write();
        core.refresh(&mut inner)?;
        let Some(keys) = inner.keys.clone().filter(|_| !inner.clean) else { return Ok(false) };
        let r = core.mark_clean(&mut inner, &keys);
        core.after_change(&mut inner, r).map(|()| true)
    }

    /// Bytes of content in the copy.
    pub fn len(&self) -> u64 {
        self.copy.len()
    }

    /// The copy's backing file.
    ///
    /// # Errors
    /// None that could come up: the copy is open.
    pub fn file(&self) -> Result<Arc<B::File>> {
        Ok(Arc::clone(self.copy.core.inner.read().backing_file()?))
    }

    /// Ids of the source and of the copy, if they have content.
    pub fn ids(&self, held: &Held<'_, B>) -> Option<(FileId, FileId)> {
        let of = |k: &Option<Arc<FileKeys>>| k.as_ref().map(|k| k.file);
        Some((of(&held.0.keys)?, of(&self.copy.core.inner.read().keys)?))
    }

    /// The copy has taken the source's place in the backing directory: whoever has the source open has the copy open now.
    pub fn take_over(&self, mut held: Held<'_, B>) {
        let core = &self.source.core;
        let inner = &mut *held.0;
        let copy = self.copy.core.inner.read();
        if let Some(old) = &inner.keys {
            core.shared.deks.remove(&old.file);
        }
        inner.node = Arc::clone(&copy.node);
        inner.file = copy.file.clone();
        inner.access = copy.access;
        (inner.dev, inner.ino) = (copy.dev, copy.ino);
        inner.keys = copy.keys.clone();
        inner.promised = true;
        inner.changes += 1;
        // States are read from the new file before anything else is done with it.
        inner.stale = true;
        core.segments.clear();
        drop(copy);
        if let Err(e) = core.refresh(inner) {
            tracing::debug!("a file cannot be read again after its rekey: {e}");
        }
    }
}

impl<B: Backing> Drop for Fresh<B> {
    fn drop(&mut self) {
        // What is noted is dropped first: as soon as this is off, the notes may be another copy's.
        self.source.core.changes.take();
        self.source.core.changes.on.store(false, Ordering::Release);
    }
}

/// How a copy stands when it is equal to its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Finished {
    /// The source has been emptied: it has no key, and the copy is of no use.
    Empty,
    /// The source was emptied and written to again, so the copy needs another header: to be begun anew.
    Anew,
    /// Something was written for it.
    Changed,
    /// Nothing had to be.
    AsBefore,
}

impl<B: Backing> FileCore<B> {
    /// Reads a segment as far as the file goes: the content that is no hole into `out`, end to end.
    fn read_runs(&self, inner: &Inner<B>, segment: u64, out: &mut Vec<u8>) -> Result<Vec<Run>> {
        let first = geometry::first_block(segment);
        let end = geometry::first_block(segment + 1).min(geometry::block_count(inner.size));
        let (Some(keys), true) = (inner.keys.as_deref(), first < end) else { return Ok(Vec::new()) };
        out.resize(PART, 0);
        let mut filled = 0;
        let runs = self.with_segment(inner, keys, segment, |l| {
            let hole = |b: u64| l.state.entry((b - first) as usize).is_hole();
            let mut runs = Vec::new();
            let mut at = first;
            while at < end {
                let to = (at..end).find(|b| hole(*b) != hole(at)).unwrap_or(end);
                let run = Run {
                    at: at * PAGE,
                    len: (to - 1 - at) as usize * BLOCK + geometry::block_len(to - 1, inner.size),
                    hole: hole(at),
                };
                if !run.hole {
                    let part = out.get_mut(filled..filled + run.len).ok_or(StoreError::Invalid)?;
                    self.read_range(inner, keys, l, SegmentRange { segment, first: at, end: to }, run.at, part)?;
                    filled += run.len;
                }
                runs.push(run);
                at = to;
            }
            Ok(runs)
        })?;
        out.truncate(filled);
        Ok(runs)
    }
}
