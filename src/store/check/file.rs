//! One regular file: header, states, size, and with `deep` every block.

use super::{Checker, Severity};
use crate::backing::{self, Access, Backing, Stat};
use crate::crypto::aead::BlockCipher;
use crate::crypto::kdf::{self, label};
use crate::crypto::secret::Dek;
use crate::format::damage::Damage;
use crate::format::geometry::{self, BLOCK, Copy2, PAGE, STATE};
use crate::format::header::{Slot, SlotPair};
use crate::format::ids::{FileId, KekId};
use crate::format::keyring::KekState;
use crate::format::state::{self, CLEAN, Entry, FileState, SPARSE, SegmentState, TRUNCATING};
use crate::store::error::Result;
use crate::store::header::{is_unborn, is_zeros, unwrap_slot};

/// What a file's blocks are judged by.
struct Content {
    file: FileId,
    state_key: BlockCipher,
    block_key: BlockCipher,
    sealed: FileState,
    /// Plaintext size on disk.
    size: u64,
}

/// Both copies of a segment's state.
struct Copies {
    newer: SegmentState,
    older: Option<SegmentState>,
    /// See [`state::one_is_lost`].
    one_is_lost: bool,
}

fn open_copies(c: &BlockCipher, file: FileId, segment: u64, bytes: &mut [u8]) -> std::result::Result<Copies, Damage> {
    let len = geometry::state_len(segment).min(bytes.len());
    let (a, b) = bytes.split_at_mut(len);
    let a = state::open(c, file, segment, a);
    let b = state::open(c, file, segment, b);
    let absent = |d: &Damage| matches!(d, Damage::StateAbsent { .. });
    let one_is_lost = state::one_is_lost(&a, &b);
    match (a, b) {
        (Ok(a), Ok(b)) if b.sequence > a.sequence => Ok(Copies { newer: b, older: Some(a), one_is_lost }),
        (Ok(a), Ok(b)) => Ok(Copies { newer: a, older: Some(b), one_is_lost }),
        (Ok(s), Err(_)) | (Err(_), Ok(s)) => Ok(Copies { newer: s, older: None, one_is_lost }),
        (Err(a), Err(b)) => Err(if absent(&a) { b } else { a }),
    }
}

impl<B: Backing> Checker<'_, B> {
    pub(super) fn check_file(&mut self, path: &[u8], node: &B::Node, stat: &Stat) {
        if stat.nlink > 1 && !self.linked.insert((stat.dev, stat.ino)) {
            return;
        }
        self.report.counts.files += 1;
        self.report.counts.bytes += stat.size;
        if stat.size == 0 {
            self.report.counts.empty_files += 1;
            return;
        }
        if let Err(e) = self.try_file(path, node) {
            self.io_error(path, &e);
        }
    }

    fn try_file(&mut self, path: &[u8], node: &B::Node) -> Result<()> {
        let file = self.b.open(node, Access::Read)?;
        let stat = self.b.stat_file(&file)?;
        let mut page = [0u8; PAGE as usize];
        let n = backing::read_into(self.b, &file, &mut page, 0)?;
        let pair = match SlotPair::decode(page.get(..n).unwrap_or_default()) {
            Ok(p) if p.authoritative().is_ok() => p,
            other => {
                let d = other.and_then(|p| p.authoritative().map(|_| ())).err().unwrap_or(Damage::HeaderUnreadable);
                if is_unborn(stat.size, &d) {
                    self.add(path, "unborn", "a new file that a crash kept from getting content", Severity::Note);
                    return Ok(());
                }
                if page.first_chunk().is_some_and(is_zeros) {
                    let what = "zeros in place of the header, so that the content opens for nobody: a new file that was not \
                                synced before a power cut, or the disk lost it; put it back from a backup, or remove it";
                    self.add(path, "no-header", what, Severity::Damage);
                    return Ok(());
                }
                return Err(d.into());
            }
        };
        let slot = self.check_slots(path, &pair, &stat)?;
        if geometry::backing_size(geometry::plain_size(stat.size)).max(PAGE) != stat.size {
            self.add(path, "size-between", "the size ends inside the store's own pages", Severity::Note);
        }
        match self.unwrap(path, &pair)? {
            None => self.check_absent(path, &file, stat.size, None),
            Some(dek) => self.check_content(path, &file, &slot, &dek, &mut page, stat.size),
        }
    }

    /// Both slots, without keys. Returns the one that counts.
    fn check_slots(&mut self, path: &[u8], pair: &SlotPair, stat: &Stat) -> Result<Slot> {
        let (copy, slot) = pair.authoritative()?;
        let store = self.ring.as_ref().map(|r| r.store);
        if store.is_some_and(|s| s != slot.store) {
            return Err(Damage::ForeignStore(slot.store).into());
        }
        if let Some(d) = self.kek_damage(slot.kek) {
            return Err(d.into());
        }
        match pair.get(copy.other()) {
            Err(d) => {
                let what = format!("the other header slot: {d}; rotate makes it whole");
                self.add(path, "slot-damaged", what, Severity::Warning);
            }
            Ok(o) if (o.file, o.store, o.commitment, o.mac) != (slot.file, slot.store, slot.commitment, slot.mac) => {
                self.add(path, "slots-disagree", "the two header slots are not of one file", Severity::Warning);
            }
            Ok(o) if o != slot => {
                self.add(path, "rewrap-unfinished", "a rewrap was cut short; rotate finishes it", Severity::Note);
            }
            Ok(_) => {}
        }
        let unused = self.ring.as_ref().and_then(|r| r.kek(slot.kek)).is_some_and(|k| k.unused != 0);
        if unused {
            let what = format!("KEK {} is thought to be unused: was this file restored? Run rotate", slot.kek);
            self.add(path, "kek-retired", what, Severity::Warning);
        }
        if self.ring.as_ref().is_some_and(|r| r.is_below_floor(slot.kek)) {
            let d = Damage::KekBelowFloor(slot.kek);
            self.add(path, d.code(), d.to_string(), Severity::Warning);
        }
        let me = (stat.dev, stat.ino);
        if *self.ids.entry(slot.file).or_insert(me) != me {
            let what = "another file has the same id and key: one of them is a copy made below the store; \
                        copy it inside the store instead";
            self.add(path, "duplicate-file-id", what, Severity::Warning);
        }
        Ok(slot.clone())
    }

    fn kek_damage(&self, id: KekId) -> Option<Damage> {
        let ring = self.ring.as_ref()?;
        match ring.kek(id).map(|k| (k.state, k.destroyed)) {
            None | Some((KekState::Pending, _)) => Some(Damage::KekUnknown(id)),
            Some((KekState::Destroyed, at)) => Some(Damage::KekDestroyed(id, at)),
            Some((KekState::Active | KekState::Retired, _)) => None,
        }
    }

    /// The DEK, proved; `None` without keys. A slot that does not open is worth a warning while the other one does.
    fn unwrap(&mut self, path: &[u8], pair: &SlotPair) -> Result<Option<Dek>> {
        let Some(keys) = self.keys else { return Ok(None) };
        let (copy, slot) = pair.authoritative()?;
        let open = |s: &Slot| keys.kek_to_move(s.kek).and_then(|k| unwrap_slot(&k, s));
        let first = open(slot);
        let second = match pair.get(copy.other()) {
            Ok(o) if o != slot && o.file == slot.file => Some(open(o)),
            _ => None,
        };
        match (first, second) {
            (Ok(dek), Some(Err(e))) | (Err(e), Some(Ok(dek))) => {
                let what = format!("one of the header slots: {e}; rotate makes it whole");
                self.add(path, "slot-damaged", what, Severity::Warning);
                Ok(Some(dek))
            }
            (Ok(dek), _) => Ok(Some(dek)),
            (Err(e), _) => Err(e),
        }
    }

    fn check_content(
        &mut self,
        path: &[u8],
        file: &B::File,
        slot: &Slot,
        dek: &Dek,
        page: &mut [u8; PAGE as usize],
        backing_size: u64,
    ) -> Result<()> {
        let derive = |l| BlockCipher::new(&kdf::derive(dek.secret(), l, &slot.file.0));
        let state_key = derive(label::STATE);
        let at = geometry::state_offset(0, Copy2::A) as usize;
        let copies = open_copies(&state_key, slot.file, 0, page.get_mut(at..).unwrap_or_default())?;
        let size = geometry::plain_size(backing_size);
        let sealed = copies.newer.file;
        self.check_size(path, sealed, size, backing_size)?;
        let content = Content { file: slot.file, state_key, block_key: derive(label::CONTENT), sealed, size };
        self.check_segment(path, file, &content, 0, &copies)?;
        self.check_absent(path, file, backing_size, Some(&content))
    }

    fn check_size(&mut self, path: &[u8], sealed: FileState, size: u64, backing_size: u64) -> Result<()> {
        if size < sealed.length {
            return Err(Damage::SizeShort { sealed: sealed.length, actual: size }.into());
        }
        let exact = size == sealed.length && backing_size == geometry::backing_size(sealed.length).max(PAGE);
        if sealed.has(CLEAN) && !exact {
            return Err(Damage::SizeGrown { sealed: sealed.length, actual: size }.into());
        }
        if !sealed.has(CLEAN) {
            self.add(path, "not-clean", "in use, or not closed when the program stopped", Severity::Note);
        }
        Ok(())
    }

    /// Segments after the first: present ones are checked, absent ones are allowed in a sparse file only. Goes from
    /// data to data, so that a huge hole costs nothing.
    fn check_absent(&mut self, path: &[u8], file: &B::File, size: u64, content: Option<&Content>) -> Result<()> {
        let count = geometry::segment_count(geometry::plain_size(size));
        let mut first_absent = None;
        let mut segment = 1;
        while segment < count {
            let at = geometry::state_offset(segment, Copy2::A);
            let data = self.b.next_data(file, at)?;
            let Some(data) = data.filter(|d| *d < size) else {
                first_absent = first_absent.or(Some(segment));
                break;
            };
            let there = segment_at(segment, data);
            if there > segment {
                first_absent = first_absent.or(Some(segment));
                segment = there;
                continue;
            }
            let mut bytes = [0u8; 2 * STATE];
            backing::read_into(self.b, file, &mut bytes, at)?;
            if state::is_absent(&bytes) {
                first_absent = first_absent.or(Some(segment));
            } else if let Some(c) = content {
                let copies = open_copies(&c.state_key, c.file, segment, &mut bytes)?;
                self.check_segment(path, file, c, segment, &copies)?;
            }
            segment += 1;
        }
        match (first_absent, content) {
            (Some(segment), Some(c)) if !c.sealed.has(SPARSE) => Err(Damage::StateAbsent { segment }.into()),
            (Some(segment), None) => {
                let what = format!("segment {segment} is absent, which only a sparse file may have; keys can tell");
                self.add(path, "segment-absent", what, Severity::Note);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn check_segment(&mut self, path: &[u8], file: &B::File, c: &Content, segment: u64, copies: &Copies) -> Result<()> {
        if copies.one_is_lost {
            let what = format!("one copy of the state of segment {segment} is damaged; the other is whole");
            self.add(path, "state-copy", what, Severity::Warning);
        }
        if !self.report.deep {
            return Ok(());
        }
        let first = geometry::first_block(segment);
        for i in 0..geometry::segment_capacity(segment) {
            let block = first + i as u64;
            let len = geometry::block_len(block, c.size);
            // What lies behind a shrink that was cut short is about to go.
            let going = c.sealed.has(TRUNCATING) && block >= c.sealed.length / PAGE;
            if len == 0 || going {
                break;
            }
            let old = copies.older.as_ref().map_or(Entry::HOLE, |o| o.entry(i));
            // As when it is read: a hole is believed only if the copy that is left cannot be out of date.
            let doubtful = copies.one_is_lost && copies.newer.entry(i).is_hole();
            let newer = if doubtful && !self.is_zero(file, block, len)? { Entry::LOST } else { copies.newer.entry(i) };
            if !self.block_opens(file, c, block, len, newer, old)? {
                let d = Damage::BlockAuth { block };
                self.damaged(path, &d.into());
            }
        }
        self.progress.update(&self.report.counts);
        Ok(())
    }

    fn is_zero(&self, file: &B::File, block: u64, len: usize) -> Result<bool> {
        let mut raw = [0u8; BLOCK];
        let raw = raw.get_mut(..len).unwrap_or_default();
        backing::read_into(self.b, file, raw, geometry::block_offset(block))?;
        Ok(raw.iter().all(|b| *b == 0))
    }

    /// Whether a block reads as what was written; in a file that was not closed cleanly, now or just before.
    fn block_opens(
        &mut self,
        file: &B::File,
        c: &Content,
        block: u64,
        len: usize,
        new: Entry,
        old: Entry,
    ) -> Result<bool> {
        if new.is_hole() {
            return Ok(true);
        }
        self.report.counts.blocks += 1;
        let mut raw = [0u8; BLOCK];
        let raw = raw.get_mut(..len).unwrap_or_default();
        backing::read_into(self.b, file, raw, geometry::block_offset(block))?;
        let aad = state::block_aad(c.file, block);
        let opens = |e: &Entry| {
            let mut data = raw.to_vec();
            c.block_key.open(&e.nonce, &aad, &e.tag, &mut data).is_ok()
        };
        if opens(&new) {
            return Ok(true);
        }
        let before = if old.is_hole() { raw.iter().all(|b| *b == 0) } else { opens(&old) };
        Ok(before && !c.sealed.has(CLEAN))
    }
}

/// The segment from `segment` on in which backing offset `offset` lies.
fn segment_at(segment: u64, offset: u64) -> u64 {
    let start = geometry::state_offset(segment, Copy2::A);
    let each = geometry::state_offset(2, Copy2::A) - geometry::state_offset(1, Copy2::A);
    segment + offset.saturating_sub(start) / each
}
