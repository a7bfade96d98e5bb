//! Where a mounted store's figures come from.

use super::deks::DekCounts;
use super::page::{AuditFigures, Figures, text};
use crate::backing::posix::Posix;
use crate::crypto::secret::memory_is_locked;
use crate::daemon::audit::Log;
use crate::daemon::job::{Job, Rotation};
use crate::kms::metrics::Registry;
use crate::store::Store;
use std::sync::Arc;
use std::time::Instant;

/// The mounted store.
pub struct Source {
    pub store: Arc<Store<Posix>>,
    pub job: Arc<Job>,
    pub deks: Arc<DekCounts>,
    /// Calls to root keys.
    pub calls: Arc<Registry>,
    pub audit: Option<Arc<Log>>,
    pub started: Instant,
}

impl Source {
    /// All figures as they are now.
    pub fn page(&self) -> String {
        let shared = self.store.shared();
        let rotation = self.job.state::<Rotation>();
        let audit = self.audit.as_ref().map(|a| {
            let (written, lost) = a.counts();
            AuditFigures { written, lost, refusing: a.refusal().is_some() }
        });
        let figures = Figures {
            uptime: self.started.elapsed().as_secs_f64(),
            read_only: shared.read_only,
            memory_locked: memory_is_locked(),
            keyring: &shared.keys.snapshot(),
            dek_cache: shared.deks.stats(),
            dek_pool: shared.keys.pool().stats(),
            rotation: rotation.as_ref(),
            deks: &self.deks,
            audit,
        };
        let mut page = text(&figures).0;
        self.calls.render(&mut page);
        page
    }
}
