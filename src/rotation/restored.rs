//! Headers that an old backup brought back under a retired KEK, moved to the active one as they are found.

use super::barrier::Barrier;
use super::control::Control;
use super::failures::Failures;
use super::options::Options;
use super::pass::{Item, Visitor};
use super::patience::Patience;
use super::report::Counts;
use super::sweep::Sweep;
use super::turns::Turns;
use crate::backing::Backing;
use crate::store::Result;
use crate::store::keys::KekHandle;
use crate::store::shared::Shared;
use parking_lot::Mutex;
use std::time::Duration;

/// Files moved in one go.
const BATCH: usize = 16;

/// Moves the headers of files that were opened under a KEK proved unused, a batch of them, as a rotation moves them: in
/// two halves with a barrier between. A file that fails is logged, and left to its next open or the next rotation.
///
/// No rotation may run meanwhile.
///
/// # Errors
/// That the active KEK cannot be had.
pub fn rewrap_restored<B: Backing>(shared: &Shared<B>, control: &Control) -> Result<Counts> {
    let files = shared.restored.take(BATCH);
    let target = shared.keys.kek(shared.keys.with_active(KekHandle::id))?;
    let failures = Failures::default();
    // A handful of headers: not worth listening to what users wait.
    let turns = Turns::new(&Options { full_speed: true, ..Options::default() }, control, &shared.load);
    let sweep = Sweep {
        shared,
        target,
        control,
        failures: &failures,
        again: false,
        turns: &turns,
        calls: 1,
        barrier: Barrier::default(),
        patience: Mutex::new(Patience::new(Duration::ZERO)),
        swept: Mutex::default(),
    };
    // A cancel leaves the rest as it was.
    let _ = sweep.batch(files.into_iter().map(Item::opened).collect());
    Ok(sweep.swept.into_inner().counts)
}
