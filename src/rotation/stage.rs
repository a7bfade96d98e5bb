//! The beginning of a run: which KEK headers go to, and that KEK made if it is a new one.
//!
//! Apart from the run itself, so that a copy of the keyring with the new KEK in it can be put away before anything is
//! wrapped under it.

use super::options::Options;
use super::plan::{self, Begin, Wish};
use super::run::{Context, now};
use crate::backing::Backing;
use crate::format::damage::Damage;
use crate::format::ids::KekId;
use crate::store::{Result, StoreError};
use serde::{Deserialize, Serialize};

/// Where a run is to begin. [`Options::staged`] takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Staged {
    /// Nowhere: the active KEK is younger than asked for.
    NotDue(KekId),
    /// With the active KEK, which an earlier run has made.
    Resume(KekId),
    /// With this one, which is new and pending.
    New(KekId),
}

/// Finds out what a run with `options` would begin with, and makes the new KEK if there is to be one: durable, read back
/// from disk and unwrapped, but not active. What an earlier run has staged and not made active is discarded; a copy of the
/// keyring that it left old is replaced, if that can be.
///
/// # Errors
/// As [`super::run`], but for what comes after.
pub fn stage<B: Backing>(ctx: &Context<'_, B>, options: &Options) -> Result<Staged> {
    if ctx.shared.read_only {
        return Err(StoreError::ReadOnly);
    }
    let (keys, b) = (&ctx.shared.keys, &ctx.shared.backing);
    if options.destroy_old {
        keys.one_root_key_suffices()?;
    }
    let ring = keys.snapshot();
    let wish = Wish { kind: options.kek, new_roots: !options.root.is_empty(), restart: options.restart };
    let plan = plan::plan(&ring, wish).ok_or(Damage::KeyringUnreadable)?;
    match options.staged {
        // What was said has been acted upon: a copy of the keyring was put away, or there was none to put away.
        Some(Staged::NotDue(id)) => return Ok(Staged::NotDue(id)),
        Some(Staged::New(id)) if ring.pending().is_none_or(|k| k.id != id) => {
            return refuse(format!("KEK {id}, which was staged, is not pending any more"));
        }
        Some(Staged::New(id)) => return Ok(Staged::New(id)),
        Some(Staged::Resume(id)) if plan.begin != Begin::Resume(id) => {
            return refuse(format!("the rotation to KEK {id}, which was to go on, has ended"));
        }
        Some(Staged::Resume(_)) | None => {}
    }
    if let Some(age) = options.if_older_than.filter(|age| !plan::is_due(&ring, *age, now())) {
        let active = ring.active().map(|k| k.id).ok_or(Damage::KeyringUnreadable)?;
        tracing::info!(kek = %active, age, "rotation is not due: the active KEK is younger");
        return Ok(Staged::NotDue(active));
    }
    for id in plan.discard {
        keys.discard_pending(b, id)?;
    }
    match plan.begin {
        Begin::Resume(target) => {
            // Headers name that KEK, and one copy of the keyring may not know it.
            keys.try_to_mend_copies(b);
            Ok(Staged::Resume(target))
        }
        Begin::New(kind) => Ok(Staged::New(keys.stage(b, kind, &options.root)?)),
    }
}

fn refuse(why: String) -> Result<Staged> {
    Err(StoreError::KeyState(format!("{why}: another rotation came in between; rotate again")))
}
