//! Headers of backing files: read the slots, get the DEK, make a new header.
//!
//! Invariants of the two slots, which every writer here and in `rotation` keeps:
//!
//! * at every instant at least one slot unwraps to the file's DEK;
//! * both slots hold the same DEK; it never changes in a rewrap;
//! * the sequence never goes back;
//! * nothing is wrapped under a KEK that is not active.

use super::ahead;
use super::error::{Result, StoreError};
use super::keys::{KekHandle, KekKind, Keys, Phase, Ready, WRAP_EXTERNAL, Watch};
use super::shared::Shared;
use crate::backing::{self, Backing};
use crate::crypto::secret::Dek;
use crate::format::damage::Damage;
use crate::format::geometry::SLOT;
use crate::format::header::{Slot, SlotPair};
use crate::format::ids::FileId;
use crate::kms::WRAPPED_MAX;
use crate::kms::event::Operation;
use std::sync::Arc;

/// Bytes of both slots.
pub const SLOTS_LEN: usize = 2 * SLOT;

/// Where slots are read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// As any reader sees them.
    Cache,
    /// Past the page cache: for a proof of what is on disk.
    Disk,
}

/// Reads both slots of a backing file. `Ok(None)` for an empty file: it has no header and no key.
///
/// # Errors
/// The backing directory's, or [`Damage::HeaderShort`].
pub fn read_slots<B: Backing>(b: &B, file: &B::File, from: Source) -> Result<Option<(SlotPair, [u8; SLOTS_LEN])>> {
    let mut bytes = [0u8; SLOTS_LEN];
    let n = match from {
        Source::Cache => backing::read_into(b, file, &mut bytes, 0)?,
        Source::Disk => b.read_past_cache(file, &mut bytes, 0)?,
    };
    if n == 0 {
        return Ok(None);
    }
    let pair = SlotPair::decode(bytes.get(..n).unwrap_or_default())?;
    Ok(Some((pair, bytes)))
}

/// Whether a backing file's slots are these bytes, as any reader sees them.
///
/// # Errors
/// The backing directory's.
pub fn slots_are<B: Backing>(b: &B, file: &B::File, expected: &[u8; SLOTS_LEN]) -> Result<bool> {
    let mut bytes = [0u8; SLOTS_LEN];
    Ok(backing::read_into(b, file, &mut bytes, 0)? == SLOTS_LEN && bytes == *expected)
}

/// Whether a file of `size` backing bytes with this damage to its header is a new one whose first page never reached
/// the disk: it has no content, so nothing is lost, and its next writer starts it afresh.
pub fn is_unborn(size: u64, d: &Damage) -> bool {
    crate::format::geometry::plain_size(size) == 0
        && matches!(d, Damage::HeaderMagic | Damage::HeaderUnreadable | Damage::HeaderShort)
}

/// Whether there are only zeros where both slots should be: then there is no wrap, and none was ever damaged into this by
/// flipped bits. In a file that has content see [`is_unborn`] for one that has none.
pub fn is_zeros(slots: &[u8; SLOTS_LEN]) -> bool {
    slots.iter().all(|b| *b == 0)
}

/// What is where a file has its header.
pub enum Header {
    /// Slots, whatever is wrong with them.
    Slots(Box<(SlotPair, [u8; SLOTS_LEN])>),
    /// Nothing, and there is no content: an empty file, or a new one whose first page never reached the disk.
    None,
    /// Zeros in place of both slots, and content behind. No wrap is there to be moved or to name a KEK, and what the file
    /// held opens for nobody: it was new and not synced when the power failed, or the disk has lost what was. Never seen of
    /// a file that is being made, which has its header before it has content; under the inode's lock not even for a moment.
    Zeros,
}

/// Reads both slots of a file.
///
/// # Errors
/// As [`read_slots`].
pub fn read_header<B: Backing>(b: &B, file: &B::File, from: Source) -> Result<Header> {
    let read = read_slots(b, file, from);
    let damage = match &read {
        Ok(Some((pair, _))) => pair.authoritative().err(),
        Err(StoreError::Damage(d)) => Some(d.clone()),
        _ => None,
    };
    match (read, damage) {
        (_, Some(d)) if is_unborn(b.stat_file(file)?.size, &d) => Ok(Header::None),
        (Ok(Some((_, bytes))), _) if is_zeros(&bytes) => Ok(Header::Zeros),
        (Ok(Some(read)), _) => Ok(Header::Slots(Box::new(read))),
        (Ok(None), _) => Ok(Header::None),
        (Err(e), _) => Err(e),
    }
}

/// The DEK of a header, and how it was come by.
pub struct Opened {
    pub dek: Arc<Dek>,
    pub slot: Slot,
    /// By a call to the provider of an external KEK.
    pub called: bool,
}

/// The DEK of a header, proven to be it: commitment and MAC are checked also when it comes from the cache.
///
/// The slot with the higher sequence counts. If it does not open, an intact other slot is used and a warning logged:
/// both hold the same DEK, and what opens is authentic either way.
///
/// # Errors
/// As [`super::keys::Keys::may_open`]; [`Damage`] for whatever is wrong with the authoritative slot; the key service's.
pub fn open_dek<B: Backing>(shared: &Shared<B>, pair: &SlotPair) -> Result<Opened> {
    // Also for a DEK that the cache has.
    shared.keys.may_open()?;
    let (copy, slot) = pair.authoritative()?;
    let first = match unwrap_cached(shared, slot) {
        Ok((dek, called)) => return Ok(Opened { dek, slot: slot.clone(), called }),
        Err(e @ StoreError::Damage(_)) => e,
        Err(e) => return Err(e),
    };
    if let Ok(other) = pair.get(copy.other())
        && other != slot
        && let Ok((dek, called)) = unwrap_cached(shared, other)
    {
        tracing::warn!(file = %slot.file, "the newer header slot does not open ({first}); using the other");
        return Ok(Opened { dek, slot: other.clone(), called });
    }
    Err(first)
}

fn unwrap_cached<B: Backing>(shared: &Shared<B>, slot: &Slot) -> Result<(Arc<Dek>, bool)> {
    check_store(shared, slot)?;
    if let Some(dek) = shared.deks.get(&slot.file) {
        shared.keys.above_floor(slot.kek)?;
        slot.verify(&dek)?;
        return Ok((dek, false));
    }
    shared.keys.permit()?;
    let watch = shared.keys.watch();
    let opened = shared.kek(slot.kek).and_then(|kek| Ok((unwrap_slot(&kek, slot)?, kek)));
    watch.ended(Operation::Unwrap, slot.file, slot.kek, None, &opened);
    let (dek, kek) = opened?;
    let dek = Arc::new(dek);
    shared.deks.put(slot.file, Arc::clone(&dek));
    // A refusal or a lock that came during the call has emptied the cache already, or will yet.
    if shared.keys.is_refused() || shared.keys.phase() != Phase::Open {
        shared.deks.remove(&slot.file);
    }
    // Only now: a lock ends when nobody has the KEK any more, and no DEK may come into the cache after it.
    drop(kek);
    Ok((dek, slot.wrap_suite == WRAP_EXTERNAL))
}

/// Unwraps a slot's DEK into the cache, for whoever may open the file next.
///
/// # Errors
/// As [`unwrap_slot`].
pub(super) fn prefetch<B: Backing>(shared: &Shared<B>, slot: &Slot) -> Result<()> {
    check_store(shared, slot)?;
    let watch = shared.keys.watch().ahead();
    let opened = shared.keys.kek(slot.kek).and_then(|kek| Ok((unwrap_slot(&kek, slot)?, kek)));
    watch.ended(Operation::Unwrap, slot.file, slot.kek, None, &opened);
    let (dek, kek) = opened?;
    shared.deks.put(slot.file, Arc::new(dek));
    // Unlike a request on an open file, this is not waited for by a refusal. One that has emptied the cache shows here;
    // one that does not will empty it yet.
    if !shared.keys.may_fetch() {
        shared.deks.remove(&slot.file);
    }
    // Only now: a lock has emptied the cache, and ends when nobody has the KEK any more.
    drop(kek);
    Ok(())
}

fn check_store<B: Backing>(shared: &Shared<B>, slot: &Slot) -> Result<()> {
    if slot.store == shared.keys.store_id() { Ok(()) } else { Err(Damage::ForeignStore(slot.store).into()) }
}

/// Unwraps a slot's DEK with its KEK, past every cache, and proves commitment and MAC.
///
/// # Errors
/// [`Damage::WrapAuth`], [`Damage::Commitment`], [`Damage::HeaderMac`], or the key service's.
pub fn unwrap_slot(kek: &KekHandle, slot: &Slot) -> Result<Dek> {
    let dek = kek.unwrap(&slot.wrap_aad(), slot.file, &slot.wrapped)?;
    slot.verify(&dek)?;
    Ok(dek)
}

/// `slot` wrapped anew under `kek` with sequence `sequence`; the new wrap is unwrapped and compared before it is
/// returned.
///
/// # Errors
/// The key service's; [`Damage::WrapAuth`] if what it returned does not unwrap to the same DEK.
pub fn wrap_slot(kek: &KekHandle, slot: &Slot, dek: &Dek, sequence: u64) -> Result<Slot> {
    let new = wrap_unproved(kek, slot, dek, sequence)?;
    if !unwrap_slot(kek, &new)?.secret().ct_eq(dek.secret()) {
        return Err(Damage::WrapAuth(kek.id()).into());
    }
    Ok(new)
}

/// `slot`, which `old` wraps, moved to `kek` with sequence `sequence` by the service itself: see [`KekHandle::rewraps`]. The
/// new wrap is unwrapped before it is returned, and what comes out is held against the commitment and the MAC of the
/// slot's prefix, which only the file's DEK fits: as good a proof as comparing it with what the old wrap holds.
///
/// # Errors
/// The key service's; [`Damage`] if what it returned does not unwrap to the file's DEK.
pub fn rewrap_slot(kek: &KekHandle, slot: &Slot, sequence: u64) -> Result<Slot> {
    let mut new = renewed(kek, slot, sequence);
    new.wrapped = kek.rewrap(&slot.wrap_aad(), &new.wrap_aad(), slot.file, &slot.wrapped)?;
    unwrap_slot(kek, &new)?;
    Ok(new)
}

/// The slot of a new file.
///
/// Of kind external it is not proved by a second call, so that a create is one call to the service. A rewrap is always
/// proved, because it is about to overwrite the one wrap that is known to open; here there is no such wrap and no content
/// yet. What is left to chance is a service that wraps and cannot unwrap: that it can was proved when the KEK was staged
/// and is proved again by every refresh; its AEAD binds the context; and its provider checks what it can of the answer
/// (the key's name, checksums). What no check finds then costs the new file, with an error at its next open, and nothing
/// that was there before.
fn wrap_new(kek: &KekHandle, slot: &Slot, dek: &Dek) -> Result<Slot> {
    match kek.kind() {
        KekKind::Sealed => wrap_slot(kek, slot, dek, 1),
        KekKind::External => wrap_unproved(kek, slot, dek, 1),
    }
}

/// `slot` as `kek` will wrap it.
fn renewed(kek: &KekHandle, slot: &Slot, sequence: u64) -> Slot {
    Slot { sequence, kek: kek.id(), wrap_suite: kek.wrap_suite(), ..slot.clone() }
}

fn wrap_unproved(kek: &KekHandle, slot: &Slot, dek: &Dek, sequence: u64) -> Result<Slot> {
    let mut new = renewed(kek, slot, sequence);
    new.wrapped = kek.wrap(&new.wrap_aad(), new.file, dek)?;
    if new.wrapped.is_empty() || new.wrapped.len() > WRAPPED_MAX {
        return Err(Damage::WrapAuth(kek.id()).into());
    }
    Ok(new)
}

/// Makes a new file's identity and key, or takes one from the DEK pool (`had`, if it was taken for this file before), and
/// calls `write` with its slot while the activation lock is held: once a newer KEK is active, no header under the old one
/// can still be on its way to disk. What was taken is not used again, whatever becomes of it.
///
/// # Errors
/// The key service's, those of [`Keys::permit`](super::keys::Keys::permit), and those of `write`.
pub fn with_new_header<B: Backing, R>(
    shared: &Shared<B>,
    had: Option<Ready>,
    write: impl FnOnce(Arc<Dek>, &Slot) -> Result<R>,
) -> Result<R> {
    let keys = &shared.keys;
    keys.permit()?;
    let r = keys.with_active(|kek| {
        let watch = keys.watch();
        let Ready { dek, slot, .. } = match keys.take_ready(kek, had) {
            Some(ready) if ready.own => ready,
            Some(ready) => {
                watch.ended_before(Operation::Wrap, ready.slot.file, kek.id(), ready.request_id.clone());
                ready
            }
            None => new_identity(keys, kek, watch)?,
        };
        let r = write(Arc::clone(&dek), &slot)?;
        shared.deks.put(slot.file, dek);
        Ok(r)
    });
    ahead::fill(shared);
    r
}

/// For whoever is about to call [`with_new_header`] with locks held that other files' users may want: what a call to a key
/// service is needed for is made here, before them, and without the activation lock. `had` is what was put by for the
/// file; what is returned takes its place. If another KEK is active by the time that it is used, it is not, and
/// `with_new_header` makes the call after all.
///
/// # Errors
/// As [`with_new_header`].
pub(super) fn prepare<B: Backing>(shared: &Shared<B>, had: Option<Ready>) -> Result<Option<Ready>> {
    let keys = &shared.keys;
    if keys.active_kek().kind() != KekKind::External {
        return Ok(None);
    }
    keys.permit()?;
    match keys.with_active(|active| keys.take_ready(active, had)) {
        None => prepare_own(shared),
        ready => Ok(ready),
    }
}

/// As [`prepare`], for work that no user waits for: what the pool holds is left to users.
///
/// # Errors
/// As [`with_new_header`].
pub(super) fn prepare_own<B: Backing>(shared: &Shared<B>) -> Result<Option<Ready>> {
    let keys = &shared.keys;
    let kek = keys.active_kek();
    if kek.kind() != KekKind::External {
        return Ok(None);
    }
    keys.permit()?;
    match new_identity(keys, &kek, keys.watch()) {
        Ok(ready) => Ok(Some(Ready { own: true, ..ready })),
        Err(_) if !keys.is_active(&kek) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Makes the identity and key of a file to come, and puts it into the DEK pool if its KEK is still the active one. The call
/// is made without the activation lock: while somebody waits to take that exclusively, nobody else gets it.
///
/// # Errors
/// The key service's.
pub(super) fn make_ready<B: Backing>(shared: &Shared<B>) -> Result<()> {
    let keys = &shared.keys;
    let kek = keys.active_kek();
    if kek.kind() == KekKind::External {
        let ready = new_identity(keys, &kek, keys.watch().ahead())?;
        keys.with_active(|active| keys.put_ready(active, ready));
    }
    // Only now: a lock that came meanwhile ends when nobody has the KEK any more.
    drop(kek);
    Ok(())
}

fn new_identity(keys: &Keys, kek: &KekHandle, watch: Watch<'_>) -> Result<Ready> {
    let dek = Arc::new(Dek::random());
    let plain = Slot::new(keys.store_id(), FileId::random(), &dek);
    let wrapped = wrap_new(kek, &plain, &dek);
    let request_id = watch.ended_by(Operation::Wrap, plain.file, kek.id(), None, &wrapped);
    Ok(Ready { dek, slot: wrapped?, request_id, own: false })
}
