//! Opening: from a backing file's header, first state and size to what is true of its content.

use super::segment::{Copies, Loaded};
use super::{FileCore, FileKeys, Inner, log_damage};
use crate::backing::{self, Access, Backing};
use crate::format::damage::Damage;
use crate::format::geometry::{self, Copy2, PAGE};
use crate::format::header::SlotPair;
use crate::format::state::{CLEAN, FileState, SPARSE, TRUNCATING};
use crate::store::error::{Result, StoreError};
use crate::store::header;
use std::sync::Arc;

/// How often a header that does not open is read again while somebody else may be writing it. He makes each of its slots
/// durable before he touches the other one, so that once is enough, but for a reader that is held up in the middle.
const LOOKS_AGAIN: u32 = 3;

/// What the sealed length and flags say about a backing size. Pure.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Closed cleanly, size as sealed.
    Clean,
    /// Not closed cleanly: blocks may match the older state copy.
    Unclean,
    /// A shrink to the sealed length was begun and the backing file is still longer.
    Truncating,
}

/// Judges a backing file's size against what was sealed.
///
/// # Errors
/// [`Damage::SizeShort`], [`Damage::SizeGrown`].
pub(super) fn judge(sealed: FileState, backing_size: u64) -> std::result::Result<Verdict, Damage> {
    let actual = geometry::plain_size(backing_size);
    if actual < sealed.length {
        return Err(Damage::SizeShort { sealed: sealed.length, actual });
    }
    if sealed.has(CLEAN) {
        let exact = actual == sealed.length && backing_size == geometry::backing_size(sealed.length).max(PAGE);
        return if exact { Ok(Verdict::Clean) } else { Err(Damage::SizeGrown { sealed: sealed.length, actual }) };
    }
    if sealed.has(TRUNCATING) && actual > sealed.length { Ok(Verdict::Truncating) } else { Ok(Verdict::Unclean) }
}

impl<B: Backing> FileCore<B> {
    /// Opens the backing file and reads what a handle needs. On error nothing stays open.
    pub(super) fn load(&self, inner: &mut Inner<B>, access: Access) -> Result<()> {
        let r = self.try_load(inner, access);
        if r.is_err() {
            inner.file = None;
            inner.keys = None;
            self.segments.clear();
        }
        r
    }

    fn try_load(&self, inner: &mut Inner<B>, access: Access) -> Result<()> {
        let file = Arc::new(self.shared.backing.open(&inner.node, access)?);
        let st = self.shared.backing.stat_file(&file)?;
        (inner.dev, inner.ino) = (st.dev, st.ino);
        inner.size = geometry::plain_size(st.size);
        inner.access = access;
        (inner.clean, inner.sparse, inner.truncating, inner.unclean_durable) = (false, false, false, false);
        (inner.promised, inner.resized, inner.tail_on_disk, inner.keys) = (false, false, None, None);
        inner.stale = false;
        inner.dropped = None;
        inner.cut_pending = false;
        self.segments.clear();
        self.set_recovering(false);
        if st.size == 0 {
            inner.file = Some(file);
            return Ok(());
        }
        let mut page = [0u8; PAGE as usize];
        let header::Opened { dek, slot, called } = match self.open_header(&file, &mut page) {
            Ok(found) => found,
            Err(StoreError::Damage(d)) if header::is_unborn(st.size, &d) => {
                // A new file whose first page never reached the disk: no content, so nothing is lost. The first write
                // starts it afresh.
                inner.file = Some(file);
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        let unused = self.shared.keys.is_unused(slot.kek);
        if unused {
            self.shared.keys.note_use(slot.kek);
        }
        if !self.shared.read_only && unused {
            tracing::info!(file = %slot.file, kek = %slot.kek, "an old backup's header, under a KEK thought to be unused");
            self.shared.restored.note(&inner.node);
        }
        let keys = Arc::new(FileKeys::new(dek, &slot));
        inner.called = called;
        inner.file = Some(file);
        inner.keys = Some(Arc::clone(&keys));
        inner.promised = true;
        let r = self.load_state(inner, &keys, &mut page, st.size, access);
        if let Err(StoreError::Damage(d)) = &r {
            log_damage(&keys, d);
        }
        r
    }

    /// Reads the backing file's slots, and what follows them, into `start`, and gets the DEK. A store that is only read may
    /// share the disk with a rotation that is moving this very header: what was read half-written, or from an old page, is
    /// read again past the cache, as long as it changes.
    pub(super) fn open_header(&self, file: &B::File, start: &mut [u8]) -> Result<header::Opened> {
        let b = &self.shared.backing;
        let open = |bytes: &[u8]| header::open_dek(&self.shared, &SlotPair::decode(bytes)?);
        let mut n = backing::read_into(b, file, start, 0)?;
        let mut opened = open(start.get(..n).unwrap_or_default());
        for _ in 0..LOOKS_AGAIN {
            if !self.shared.read_only || !matches!(opened, Err(StoreError::Damage(_))) {
                break;
            }
            let mut again = vec![0u8; start.len()];
            let now = b.read_past_cache(file, &mut again, 0)?;
            if now == n && again.get(..now) == start.get(..n) {
                break;
            }
            n = now;
            start.copy_from_slice(&again);
            opened = open(start.get(..n).unwrap_or_default());
        }
        opened
    }

    /// After a change that failed half-way: what the disk has now is found out as after a crash, at once or before the
    /// next use. The caller holds no other lock of the file.
    pub(super) fn after_change(&self, inner: &mut Inner<B>, r: Result<()>) -> Result<()> {
        if r.is_err() {
            inner.stale = true;
            inner.changes += 1;
            if let Err(e) = self.refresh(inner) {
                tracing::debug!("a file cannot be read again after an error: {e}");
            }
        }
        r
    }

    /// Reads size and first state again if they may have changed on disk without our knowledge. On error nothing is
    /// taken over but the need to try again.
    pub(super) fn refresh(&self, inner: &mut Inner<B>) -> Result<()> {
        if !inner.stale {
            return Ok(());
        }
        if let Some(was) = inner.dropped {
            inner.keys = Some(self.keys_again(inner, was)?);
            inner.dropped = None;
        }
        let file = Arc::clone(inner.backing_file()?);
        let backing_size = self.shared.backing.stat_file(&file)?.size;
        let mut page = [0u8; PAGE as usize];
        let n = backing::read_into(&self.shared.backing, &file, &mut page, 0)?;
        self.segments.clear();
        self.set_recovering(false);
        inner.size = geometry::plain_size(backing_size);
        inner.changes += 1;
        (inner.clean, inner.sparse, inner.truncating, inner.unclean_durable) = (false, false, false, false);
        (inner.resized, inner.tail_on_disk, inner.cut_pending) = (true, None, false);
        match inner.keys.clone() {
            Some(keys) if n > 0 => self.load_state(inner, &keys, &mut page, backing_size, inner.access)?,
            // Emptied, or the first page was not made: the next write makes another.
            _ => inner.keys = None,
        }
        inner.stale = false;
        Ok(())
    }

    fn load_state(
        &self,
        inner: &mut Inner<B>,
        keys: &FileKeys,
        page: &mut [u8; PAGE as usize],
        backing_size: u64,
        access: Access,
    ) -> Result<()> {
        let at = geometry::state_offset(0, Copy2::A) as usize;
        let copies = Copies::open(keys, 0, &mut page[at..]);
        let one_is_lost = copies.one_is_lost();
        let (mut loaded, older) = copies.choose()?;
        let sealed = loaded.state.file;
        inner.sparse = sealed.has(SPARSE);
        inner.truncating = sealed.has(TRUNCATING);
        match judge(sealed, backing_size)? {
            Verdict::Clean => inner.clean = true,
            Verdict::Unclean => self.set_recovering(true),
            Verdict::Truncating => {
                self.set_recovering(true);
                if one_is_lost {
                    self.distrust_holes(inner, 0, &mut loaded)?;
                }
                return self.finish_shrink(inner, keys, sealed.length, access, loaded, older);
            }
        }
        if one_is_lost {
            self.doubt(inner, keys, 0, &mut loaded)?;
        }
        let loaded = self.reconcile(inner, keys, 0, loaded, older)?;
        self.put_segment0(loaded);
        Ok(())
    }

    pub(super) fn put_segment0(&self, loaded: Loaded) {
        *self.segments.get(0).write() = Some(loaded);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_judged_by_the_flags() {
        let sealed = |length, flags| FileState { length, flags };
        let size = geometry::backing_size;
        assert_eq!(judge(sealed(100, CLEAN), size(100)), Ok(Verdict::Clean));
        assert_eq!(judge(sealed(100, CLEAN), size(99)), Err(Damage::SizeShort { sealed: 100, actual: 99 }));
        assert_eq!(judge(sealed(100, CLEAN), size(101)), Err(Damage::SizeGrown { sealed: 100, actual: 101 }));
        // Grown inside the state pages: same plaintext size, other backing size.
        let full = 131_072;
        assert_eq!(judge(sealed(full, CLEAN), size(full)), Ok(Verdict::Clean));
        assert!(judge(sealed(full, CLEAN), size(full) + 1).is_err());
        assert_eq!(judge(sealed(100, 0), size(5000)), Ok(Verdict::Unclean));
        assert!(judge(sealed(100, 0), size(50)).is_err());
        assert_eq!(judge(sealed(100, TRUNCATING), size(5000)), Ok(Verdict::Truncating));
        assert_eq!(judge(sealed(100, TRUNCATING), size(100)), Ok(Verdict::Unclean));
        assert_eq!(judge(sealed(0, CLEAN), 4096), Ok(Verdict::Clean));
    }
}
