//! Fills the DEK pool.

use super::{Job, leave};
use crate::backing::Backing;
use crate::store::header;
use crate::store::keys::KekKind;
use crate::store::shared::Shared;

/// After a file was made: what the pool is short of is made ahead of the next ones.
pub(in crate::store) fn fill<B: Backing>(shared: &Shared<B>) {
    if !shared.ahead.is_served() {
        return;
    }
    for making in shared.keys.pool().missing() {
        if !shared.ahead.push(Job::Ready(making)) {
            return;
        }
    }
}

/// Makes one entry, if the service may be asked for it. A failure is told where the service's word counts, and costs
/// nobody anything: whoever makes the next file asks the service himself.
pub(super) fn make_one<B: Backing>(shared: &Shared<B>) {
    let keys = &shared.keys;
    // Only while the active KEK is one in a service.
    let ask = || keys.with_active(|kek| if kek.kind() == KekKind::External { leave(kek) } else { Ok(()) });
    let may = keys.may_make_ready() && shared.ahead.has_leave(ask) && keys.may_make_ready();
    if may && let Err(e) = header::make_ready(shared) {
        tracing::debug!("no key was made ahead of need: {e}");
    }
}
