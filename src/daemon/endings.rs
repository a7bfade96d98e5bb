//! Destroying KEKs whose time has come, while the store is mounted.
//!
//! Once a second it is looked at the clock, in memory. What there is to do for a KEK is announcing that its end is near,
//! noting that it was used, and in the end a scan of every header and its destruction, as `key destroy` does it. The scan
//! gives way to a rotation, and to users as every scan does. One that fails, because a header needs the KEK or a file cannot
//! be looked at, destroys nothing, and is made again an hour later.
//!
//! The same look finds a copy of the keyring that an update which was cut short, or an error, left as it was before, and
//! replaces it: it holds what was removed since, and if the other one is lost it knows nothing of the newest KEK.

use super::fault::{Fault, FaultKind};
use super::job::Job;
use super::rotate;
use crate::backing::Backing;
use crate::format::ids::KekId;
use crate::rotation::{self, Fate, When};
use crate::store::Store;
use crate::store::keys::Confirmation;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// After an attempt that failed.
const AGAIN_AFTER: Duration = Duration::from_secs(3600);
/// After one that met a rotation or another scan, or a copy of the keyring that could not be replaced.
const BUSY_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// The thread that looks.
pub struct Endings {
    stop: Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Endings {
    /// Begins to look, unless the store may not be written.
    pub fn start<B: Backing>(store: Arc<Store<B>>, job: Arc<Job>, backing: PathBuf) -> Self {
        let (stop, stopped) = channel();
        let work = move || {
            let (mut put_off, mut mend_after) = (HashMap::new(), Instant::now());
            while stopped.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
                if store.shared().read_only {
                    continue;
                }
                look(&store, &job, &backing, &mut put_off);
                let shared = store.shared();
                if mend_after <= Instant::now() && !shared.keys.try_to_mend_copies(&shared.backing) {
                    mend_after = Instant::now() + BUSY_AGAIN_AFTER;
                }
            }
        };
        let thread = std::thread::Builder::new().name("endings".into()).spawn(work);
        let thread = thread.inspect_err(|e| tracing::error!("no thread to destroy scheduled KEKs: {e}")).ok();
        Self { stop, thread }
    }

    /// Ends it. A scan must have been cancelled, see [`Job::stop`].
    pub fn stop(self) {
        drop(self.stop);
        if let Some(t) = self.thread {
            let _ = t.join();
        }
    }
}

fn look<B: Backing>(store: &Store<B>, job: &Job, backing: &std::path::Path, put_off: &mut HashMap<KekId, Instant>) {
    let shared = store.shared();
    put_off.retain(|_, until| *until > Instant::now());
    for kek in shared.keys.endings_due() {
        if put_off.contains_key(&kek) {
            continue;
        }
        let ended =
            shared.keys.record_use(&shared.backing, kek).map_err(|e| Fault::store(backing, &e)).and_then(|()| {
                job.in_between(|control| {
                    rotation::destroy(&rotate::in_use(store), kek, When::Due, &Confirmation::default(), &(), control)
                        .map_err(|e| Fault::store(backing, &e))
                })
            });
        let wait = match ended {
            Ok(d) if d.outcome == Fate::Destroyed => {
                tracing::warn!(%kek, "destroyed a KEK whose time had come: no header names it");
                continue;
            }
            Ok(_) => continue,
            Err(f) if matches!(f.kind, FaultKind::RotationRunning | FaultKind::KeysLocked) => BUSY_AGAIN_AFTER,
            Err(f) => {
                tracing::warn!("{f}");
                AGAIN_AFTER
            }
        };
        put_off.insert(kek, Instant::now() + wait);
    }
}
