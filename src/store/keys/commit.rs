//! Putting a changed keyring in force: on disk, then in memory; and the copy on disk that could not be written.
//!
//! A change happens when its first copy is durable. Before that an error is taken back, so that whoever opens the store
//! finds what this process goes on with. From then on every open finds the change, whatever becomes of the second copy, so
//! memory follows, and an error with that copy is no error of the change: it is remembered, told in the log, and the copy is
//! written by the next change, by [`Keys::mend_copies`], or by those who promised that something is *gone* and so must not
//! return before it is ([`Keys::settle`]).
//!
//! That a change was taken back can fail, too. Then it is not known which keyring a crash would leave in force, and memory
//! stays at the one before, with which nothing can be lost: what is wrapped under a KEK that was active before opens
//! under both, while under one that may turn out to be pending it would not.

use super::{COPIES, Keys, Phase, Proof, disk, encode, prove, refuse, roots};
use crate::backing::Backing;
use crate::format::keyring::Keyring;
use crate::store::{Result, StoreError};
use std::io;
use std::sync::atomic::Ordering;

/// A copy on disk that is not known to be the keyring in force.
#[derive(Debug, Clone)]
pub(super) struct Left {
    copy: &'static str,
    /// Why it could not be written.
    why: String,
}

/// Why, if nobody tried.
pub(super) const OLD: &str = "it is damaged, or older";

impl Left {
    pub(super) fn new(copy: &'static str, why: impl ToString) -> Self {
        Self { copy, why: why.to_string() }
    }
}

impl std::fmt::Display for Left {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, ".envelopefs/{} is not the keyring in force: {}", self.copy, self.why)
    }
}

impl Keys {
    /// Writes `ring` with the next generation over both copies, and takes it over. Once this returns, `ring` is in force here
    /// and for whoever opens the store; every proof was held against what was read back from disk before. What else
    /// follows from it in memory is the caller's, who holds `update`. The second copy may not be written yet: see
    /// [`Keys::settle`].
    ///
    /// # Errors
    /// A proof's, the backing directory's: the keyring before is in force. [`StoreError::KeyState`] if there is a newer one on
    /// disk: it could not be read when this was opened, or somebody changed it whom no lock kept out.
    pub(super) fn adopt<B: Backing>(&self, b: &B, mut ring: Keyring, proofs: &[Proof<'_>]) -> Result<()> {
        let folder = disk::folder(b)?;
        let on_disk = disk::load(b, &folder).map(|f| match f {
            disk::Found::Valid(d) if roots::is_authentic(&self.secret, &d) => Some(d.keyring.generation),
            _ => None,
        });
        // What could not be taken back may have left a higher generation than the one in force here.
        let known = ring.generation.max(self.not_taken_back.load(Ordering::Acquire));
        let highest = on_disk.iter().flatten().copied().fold(known, u64::max);
        if highest > known {
            return refuse(format!(
                "the keyring on disk is of generation {highest}, and newer than the one that was opened, {}: open the store \
                 again",
                ring.generation
            ));
        }
        ring.generation = highest.checked_add(1).ok_or_else(|| StoreError::KeyState("no generation is left".into()))?;
        let bytes = encode(&ring, &self.secret)?;
        let [a, z] = COPIES;
        let [first, second] = if on_disk.first() < on_disk.last() { [a, z] } else { [z, a] };
        let before = disk::read(b, &folder, first.as_bytes());
        if let Err(e) = disk::replace(b, &folder, first, &bytes, |back| prove(back, proofs)) {
            if let Err(why) = take_back(b, &folder, first, before, &bytes) {
                tracing::error!(
                    copy = first, %why,
                    "a change of the keyring failed and could not be taken back: the store may open with it"
                );
                *self.left.lock() = Some(Left::new(first, why));
                self.not_taken_back.fetch_max(ring.generation, Ordering::AcqRel);
            }
            return Err(e);
        }
        self.state.write().ring = ring;
        let second_written = disk::replace(b, &folder, second, &bytes, |_| Ok(()));
        *self.left.lock() = second_written.err().map(|why| {
            tracing::warn!(copy = second, %why, "the keyring was changed, but a copy of it could not be replaced");
            Left::new(second, why)
        });
        Ok(())
    }

    /// Whether a copy on disk is not known to be the keyring in force.
    pub fn copy_is_left(&self) -> bool {
        self.left.lock().is_some()
    }

    /// What there is to say of a copy on disk that is not known to be the keyring in force.
    pub fn copy_left(&self) -> Option<String> {
        self.left
            .lock()
            .as_ref()
            .map(|l| format!("{l}; the next change of the keyring replaces it, and so does a mount that may write"))
    }

    /// For a change that is in force, and whose point is what no copy on disk may hold any more: tries once more to
    /// replace a copy that is left. The caller holds `update`.
    ///
    /// # Errors
    /// [`StoreError::CopyLeft`] with `done`, which is what the change has done; [`StoreError::KeyState`] as [`Keys::adopt`].
    pub(super) fn settle<B: Backing>(&self, b: &B, done: &str) -> Result<()> {
        let Some(before) = self.left.lock().clone() else { return Ok(()) };
        let again = self.to_change().and_then(|ring| self.adopt(b, ring, &[]));
        let left = self.left.lock().clone();
        match (again, left) {
            (Ok(()), None) => Ok(()),
            (Err(e @ StoreError::KeyState(_)), _) => Err(e),
            (_, left) => {
                let left = left.unwrap_or(before);
                Err(StoreError::CopyLeft(format!("{done}, but {left}; mend that and do it again")))
            }
        }
    }

    /// Replaces a copy on disk that is known not to be the keyring in force. Says whether anything was to do.
    ///
    /// # Errors
    /// [`StoreError::KeysLocked`]; [`StoreError::KeyState`] if this program may not change the keyring; the backing
    /// directory's; [`StoreError::CopyLeft`].
    pub fn mend_copies<B: Backing>(&self, b: &B) -> Result<bool> {
        let _update = self.update.lock();
        self.to_change()?;
        let is_left = self.copy_is_left();
        self.settle(b, "the keyring is as it should be")?;
        Ok(is_left)
    }

    /// As [`Keys::mend_copies`], for whoever has something else to do: does nothing if there is nothing to replace or the keys
    /// are locked, and what goes wrong is logged. Says no if it did.
    pub fn try_to_mend_copies<B: Backing>(&self, b: &B) -> bool {
        if !self.copy_is_left() || self.gate.phase() != Phase::Open {
            return true;
        }
        match self.mend_copies(b) {
            Ok(_) => tracing::info!("both copies of the keyring are whole and equal again"),
            Err(e) => tracing::warn!("{e}"),
        }
        !self.copy_is_left()
    }

    /// As [`Keys::mend_copies`], after a look at both copies.
    ///
    /// # Errors
    /// As [`Keys::mend_copies`].
    pub fn repair_copies<B: Backing>(&self, b: &B) -> Result<bool> {
        let _update = self.update.lock();
        let ring = self.to_change()?;
        let found = disk::load(b, &disk::folder(b)?);
        let whole = |f: &disk::Found| matches!(f, disk::Found::Valid(d) if roots::is_authentic(&self.secret, d) && d.keyring == ring);
        let bad = COPIES.into_iter().zip(&found).find(|(_, f)| !whole(f));
        *self.left.lock() = bad.map(|(copy, _)| Left::new(copy, OLD));
        self.settle(b, "the keyring is as it should be")?;
        Ok(bad.is_some())
    }
}

/// Puts `before` back in the place of copy `name`, if what could not be written there for certain can be seen there, or
/// might be. The other copy is not touched.
///
/// # Errors
/// The backing directory's; and why it could not be read, if it is not known for that what lay there: it may be the only
/// copy of the keyring in force.
fn take_back<B: Backing>(
    b: &B,
    folder: &B::Node,
    name: &str,
    before: io::Result<Option<Vec<u8>>>,
    written: &[u8],
) -> Result<()> {
    match (disk::read(b, folder, name.as_bytes()), before) {
        (Err(e), _) if disk::is_absent(&e) => Ok(()),
        (Ok(there), _) if there.as_deref() != Some(written) => Ok(()),
        (_, Ok(Some(old))) => disk::replace(b, folder, name, &old, |_| Ok(())),
        (_, Err(e)) if !disk::is_absent(&e) => Err(e.into()),
        // There was nothing, or nothing that was any good.
        (_, Ok(None) | Err(_)) => {
            b.unlink(folder, name.as_bytes())?;
            Ok(b.sync_dir(folder)?)
        }
    }
}
