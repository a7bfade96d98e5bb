//! One header's way to the new KEK, in two halves with a barrier between them.
//!
//! Both slots hold the same DEK. The first half writes the new wrap over the slot that is *not* relied on; when that
//! is durable, the second half writes the same bytes over the other slot, so that no copy under the old KEK stays. At
//! every instant one slot unwraps to the DEK, whatever of the other is torn. Cryptography and calls to a key service
//! happen outside the inode's lock; under it the slots are read again and compared before they are overwritten.

use super::pass::Item;
use crate::backing::{Access, Backing, Kind, SetTime, Stat};
use crate::crypto::secret::Dek;
use crate::format::damage::Damage;
use crate::format::geometry::{Copy2, SLOT, slot_offset};
use crate::format::header::{Slot, SlotPair};
use crate::format::ids::{KekId, StoreId};
use crate::kms::KmsError;
use crate::kms::event::Operation;
use crate::kms::guard::lane::Background;
use crate::store::Result;
use crate::store::StoreError;
use crate::store::attr::S_PRIVILEGED;
use crate::store::header::{Header, SLOTS_LEN, Source, read_header, rewrap_slot, slots_are, unwrap_slot, wrap_slot};
use crate::store::keys::{KekHandle, Watch};
use crate::store::shared::Shared;
use crate::store::walk::is_gone;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of both slots.
pub(super) type Slots = [u8; SLOTS_LEN];

/// How often a header is tried again that somebody else changed between reading and writing.
const TRIES: usize = 8;

/// What both slots of a header say about the work to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    /// Both slots are valid, the same, and under the target.
    Current,
    /// Something is left to do.
    Behind,
}

/// Judges a header that was read, without any key.
///
/// # Errors
/// [`Damage`] if no slot is valid, it belongs to another store, or it may not be written by this program.
pub(super) fn judge(
    pair: &SlotPair,
    bytes: &Slots,
    store: StoreId,
    target: KekId,
) -> std::result::Result<Standing, Damage> {
    let (_, slot) = pair.authoritative()?;
    if slot.store != store {
        return Err(Damage::ForeignStore(slot.store));
    }
    if !slot.writable() {
        return Err(Damage::UnsupportedFeature(slot.ro_compat));
    }
    let same = bytes.get(..SLOT) == bytes.get(SLOT..);
    Ok(if slot.kek == target && same { Standing::Current } else { Standing::Behind })
}

/// What came of looking at a file.
pub(super) enum Look<B: Backing> {
    /// A regular file with content, open.
    Open { node: Arc<B::Node>, file: B::File, stat: Stat },
    /// A regular file without content, which has no header.
    Empty,
    /// It is not there any more, or what is there now is no regular file.
    Gone,
}

/// Opens the file of `item`, if it is one. FIFOs, devices, links and directories are not touched.
pub(super) fn look<B: Backing>(backing: &B, item: &Item<B>, access: Access) -> Result<Look<B>> {
    let found = (|| {
        let node = item.node(backing)?;
        let stat = backing.stat(&node)?;
        if stat.kind != Kind::File {
            return Ok(Look::Gone);
        }
        if stat.size == 0 {
            return Ok(Look::Empty);
        }
        let file = backing.open(&node, access)?;
        Ok(Look::Open { node, file, stat })
    })();
    match found {
        Err(e) if is_gone(&e) => Ok(Look::Gone),
        other => Ok(other?),
    }
}

/// What came of the first half.
pub(super) enum First<B: Backing> {
    /// Nothing to do: under the target already.
    Current,
    /// Nothing to do: no content, so no header.
    Empty,
    /// Nothing to do: [`Header::Zeros`].
    NoHeader,
    /// Nothing to do: not there any more, or not one of ours.
    Gone,
    /// Go on with [`second_half`] after a barrier.
    Half(Box<Half<B>>),
}

/// A header between the halves.
pub(super) struct Half<B: Backing> {
    node: Arc<B::Node>,
    pub(super) file: B::File,
    /// The KEK that the header counted as being under.
    pub(super) from: KekId,
    stat: Stat,
    /// The slot that holds `bytes` now; the other one gets them next.
    written: Copy2,
    bytes: [u8; SLOT],
    /// What both slots are to hold before the second half.
    expect: Slots,
}

/// What a header's new slot is made of.
struct Plan {
    /// Where the slot to write goes; `None` if it is there already.
    write: bool,
    slot: Copy2,
    bytes: [u8; SLOT],
}

/// What came of trying.
pub(super) enum Tried<T> {
    Done(T),
    /// A key service has no leave for the calls yet: come again after so long.
    NotYet(Duration),
}

/// Unwraps, wraps anew if need be, and writes the new wrap over the slot that is not relied on. Does not wait for leave to
/// call a key service.
///
/// # Errors
/// Damage of the header, the key service's errors, the backing directory's. Nothing was written then, or a slot that
/// nothing relied on.
pub(super) fn first_half<B: Backing>(
    shared: &Shared<B>,
    target: &KekHandle,
    item: &Item<B>,
    again: bool,
    leave: &mut Leave,
) -> Result<Tried<First<B>>> {
    let done = |first| Ok(Tried::Done(first));
    let (node, file, stat) = match look(&shared.backing, item, Access::ReadWrite)? {
        Look::Open { node, file, stat } => (node, file, stat),
        Look::Empty => return done(First::Empty),
        Look::Gone => return done(First::Gone),
    };
    for _ in 0..TRIES {
        let (pair, old) = match read_header(&shared.backing, &file, Source::Cache)? {
            Header::Slots(read) => *read,
            Header::None => return done(First::Empty),
            Header::Zeros if item.reserved => return done(First::Gone),
            Header::Zeros => return done(First::NoHeader),
        };
        if item.reserved && !is_header(&pair) {
            return done(First::Gone);
        }
        if judge(&pair, &old, shared.keys.store_id(), target.id())? == Standing::Current && !again {
            return done(First::Current);
        }
        if let Err(wait) = leave.ask(shared, target, &pair) {
            return Ok(Tried::NotYet(wait));
        }
        let from = pair.authoritative()?.1.kek;
        let plan = plan(shared, target, &pair)?;
        let lock = shared.inode_locks.exclusive(stat.dev, stat.ino);
        if !slots_are(&shared.backing, &file, &old)? {
            continue;
        }
        if plan.write || again {
            write_slot(&shared.backing, &node, &file, plan.slot, &plan.bytes)?;
        }
        drop(lock);
        let mut expect = old;
        put(&mut expect, plan.slot, &plan.bytes);
        let half = Half { node, file, from, stat, written: plan.slot, bytes: plan.bytes, expect };
        return done(First::Half(Box::new(half)));
    }
    Err(busy())
}

/// Whether either slot is at least one of this program's, of whatever version.
fn is_header(pair: &SlotPair) -> bool {
    !matches!((&pair.a, &pair.b), (Err(Damage::HeaderMagic), Err(Damage::HeaderMagic)))
}

fn busy() -> StoreError {
    io::Error::from_raw_os_error(libc::EBUSY).into()
}

/// Leave for the calls of one header. What was given stays given while the rest is waited for.
#[derive(Default)]
pub(super) struct Leave {
    unwrap: bool,
    wrap: bool,
}

impl Leave {
    /// Asks for an unwrap by the KEK that wraps the header, unless the service re-wraps it, which is not done for one under
    /// the target already; and a wrap and its proof by the target, unless it is. Of what is wrong with the header tells whoever tries it.
    pub(super) fn ask<B: Backing>(
        &mut self,
        shared: &Shared<B>,
        target: &KekHandle,
        pair: &SlotPair,
    ) -> std::result::Result<(), Duration> {
        let Ok((_, slot)) = pair.authoritative() else { return Ok(()) };
        if let (false, Ok(old)) = (self.unwrap, shared.keys.kek_to_move(slot.kek))
            && (slot.kek == target.id() || !target.rewraps(&old))
        {
            old.leave(Background::Rotation, 1)?;
            self.unwrap = true;
        }
        if !self.wrap && slot.kek != target.id() {
            target.leave(Background::Rotation, 2)?;
            self.wrap = true;
        }
        Ok(())
    }
}

/// Decides which slot is relied on, and makes the bytes that are to be in both.
fn plan<B: Backing>(shared: &Shared<B>, target: &KekHandle, pair: &SlotPair) -> Result<Plan> {
    let (copy, slot) = pair.authoritative()?;
    shared.keys.permit()?;
    if let Some(plan) = by_service(shared, target, slot, copy)? {
        return Ok(plan);
    }
    let watch = shared.keys.watch();
    let opened = unwrap(shared, slot);
    match &opened {
        Ok(_) if slot.kek == target.id() => watch.ended(Operation::Unwrap, slot.file, slot.kek, None, &opened),
        Ok(_) => {}
        Err(_) => watch.ended(Operation::Rewrap, slot.file, target.id(), Some(slot.kek), &opened),
    }
    match opened {
        Ok(_) if slot.kek == target.id() => Ok(Plan { write: false, slot: copy, bytes: slot.encode() }),
        Ok(dek) => rewrap(&watch, target, slot, &dek, copy),
        // The slot that counts does not open. The other one holds the same DEK: if that opens, it is what is relied on.
        Err(first @ StoreError::Damage(_)) => {
            let Ok(other) = pair.get(copy.other()) else { return Err(first) };
            let watch = shared.keys.watch();
            match unwrap(shared, other) {
                Ok(dek) if other.file == slot.file => rewrap(&watch, target, other, &dek, copy.other()),
                _ => Err(first),
            }
        }
        Err(e) => Err(e),
    }
}

/// By the service's own re-wrap, if it has one for this header. Whatever goes wrong with that but silence, the usual way
/// may do, and tells why if it does not.
fn by_service<B: Backing>(
    shared: &Shared<B>,
    target: &KekHandle,
    slot: &Slot,
    relied_on: Copy2,
) -> Result<Option<Plan>> {
    let may = slot.kek != target.id() && shared.keys.kek_to_move(slot.kek).is_ok_and(|old| target.rewraps(&old));
    let Some(sequence) = slot.sequence.checked_add(1).filter(|_| may) else { return Ok(None) };
    let watch = shared.keys.watch();
    let new = rewrap_slot(target, slot, sequence);
    match &new {
        Err(StoreError::Kms(e)) if e.is_retryable() => {}
        // Said already, and not once for each header.
        Err(StoreError::Kms(KmsError::Denied(_))) => return Ok(None),
        Err(e) => {
            tracing::warn!(file = %slot.file, "the key service's own re-wrap is no use, so the header is moved the usual way: {e}");
            return Ok(None);
        }
        Ok(_) => {}
    }
    watch.ended(Operation::Rewrap, slot.file, target.id(), Some(slot.kek), &new);
    Ok(Some(Plan { write: true, slot: relied_on.other(), bytes: new?.encode() }))
}

/// Past every cache: what is relied on must open from what lies on disk.
fn unwrap<B: Backing>(shared: &Shared<B>, slot: &Slot) -> Result<Dek> {
    unwrap_slot(&*shared.keys.kek_to_move(slot.kek)?, slot)
}

fn rewrap(watch: &Watch<'_>, target: &KekHandle, slot: &Slot, dek: &Dek, relied_on: Copy2) -> Result<Plan> {
    let sequence = slot.sequence.checked_add(1).ok_or(Damage::Malformed)?;
    let new = wrap_slot(target, slot, dek, sequence);
    watch.ended(Operation::Rewrap, slot.file, target.id(), Some(slot.kek), &new);
    Ok(Plan { write: true, slot: relied_on.other(), bytes: new?.encode() })
}

fn put(slots: &mut Slots, copy: Copy2, bytes: &[u8; SLOT]) {
    let (a, b) = slots.split_at_mut(SLOT);
    match copy {
        Copy2::A => a.copy_from_slice(bytes),
        Copy2::B => b.copy_from_slice(bytes),
    }
}

/// What came of the second half.
pub(super) enum Second {
    /// Both slots hold the new wrap.
    Done,
    /// The file was emptied or its header changed meanwhile: begin again.
    Again,
}

/// Writes the new wrap over the other slot, after what the first half wrote was made durable.
///
/// # Errors
/// The backing directory's.
pub(super) fn second_half<B: Backing>(shared: &Shared<B>, half: Half<B>) -> Result<Second> {
    let _lock = shared.inode_locks.exclusive(half.stat.dev, half.stat.ino);
    if !slots_are(&shared.backing, &half.file, &half.expect)? {
        return Ok(Second::Again);
    }
    write_slot(&shared.backing, &half.node, &half.file, half.written.other(), &half.bytes)?;
    Ok(Second::Done)
}

/// Writes one slot and puts back what writing changes and users would see: times, and the setuid and setgid bits that
/// the kernel takes from a file an unprivileged process writes to. The caller holds the inode's lock.
fn write_slot<B: Backing>(b: &B, node: &B::Node, file: &B::File, copy: Copy2, bytes: &[u8; SLOT]) -> Result<()> {
    let before = b.stat_file(file)?;
    let written = b.write_at(file, bytes, slot_offset(copy));
    b.set_file_times(file, SetTime::At(before.atime), SetTime::At(before.mtime))?;
    if before.mode & S_PRIVILEGED != 0 {
        let now = b.stat_file(file)?.mode;
        if now != before.mode && now | (before.mode & S_PRIVILEGED) == before.mode {
            b.set_mode(node, before.mode)?;
        }
    }
    Ok(written?)
}
