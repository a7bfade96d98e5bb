//! A mount from beginning to end, in the process that serves it.

use super::control::Control;
use super::endings::Endings;
use super::fault::{Fault, FaultKind, plain};
use super::job::Job;
use super::keys::{KeyKeeper, KeyRules, Refresher};
use super::lock::{Taken, VolumeLock};
use super::metrics::listen;
use super::metrics::source::Source;
use super::observed::Observed;
use super::ready::Sender;
use super::server::{Server, open_dir};
use super::{audit, log, mounts, open, rotate, runtime_dir, shard_lock, spawn};
use crate::backing::posix::Posix;
use crate::fuse::{self, MountOptions, Unmounter};
use crate::kms::ConnectOptions;
use crate::kms::event::StoreChange;
use crate::store::dek_cache::DekCacheLimits;
use crate::store::{Store, StoreOptions};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender as StopSender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often files closed a while ago are settled, and how long ago that must be.
const SETTLE_EVERY: Duration = Duration::from_secs(1);
const SETTLE_AFTER: Duration = Duration::from_secs(2);

/// What the lock file says of us.
const PURPOSE: &str = "mount";
const READING: &str = "read only mount";
/// How long a daemon that is about to end is waited for, and how often it is looked for.
const LEAVING_MAX: Duration = Duration::from_secs(10);
const LEAVING_LOOK: Duration = Duration::from_millis(50);
/// How long calls to a key service that nobody waits for hold up an unmount.
const CALLS_END_MAX: Duration = Duration::from_secs(2);

/// What is to be mounted, and how.
#[derive(Debug)]
pub struct Plan {
    /// The backing directory, absolute, without symbolic links.
    pub backing: PathBuf,
    /// Root key URIs; empty: those of the keyring.
    pub keys: Vec<String>,
    pub connect: ConnectOptions,
    pub dek_cache: DekCacheLimits,
    /// Most keys kept ready for files to come, where a key service wraps them.
    pub dek_pool: usize,
    /// Most files of a directory whose keys are unwrapped ahead.
    pub prefetch: usize,
    /// How the key service's word counts while mounted.
    pub key_rules: KeyRules,
    /// How to mount; the mount point absolute, without symbolic links.
    pub mount: MountOptions,
    pub log: log::Target,
    pub log_level: tracing::Level,
    /// Leave the terminal once mounted.
    pub background: bool,
    /// The audit log, if there is to be one.
    pub audit: Option<audit::Options>,
    /// Where metrics are served, if anywhere: a loopback address.
    pub metrics: Option<SocketAddr>,
}

/// Mounts, tells `ready` (and systemd), serves until unmounted, and closes the store.
///
/// # Errors
/// Before the mount: why there is none. After: why the store could not be closed in order.
pub fn run(plan: Plan, ready: &mut Sender) -> Result<(), Fault> {
    let lock = take_lock(&plan.backing, plan.mount.read_only)?;
    let b = open::backing(&plan.backing)?;
    let observed = Arc::new(Observed::start(plan.audit.as_ref(), open::keyring(&b)?.store)?);
    // The last thing that may need the terminal and the working directory.
    let keys = open::keys(&b, &plan.keys, &observed.connect(&plan.connect))
        .inspect_err(|f| observed.refused(StoreChange::Mount.as_str(), &plan.backing, f))?;
    observed.opened(&keys);
    let _ = std::env::set_current_dir("/");
    clear_mountpoint(&plan.mount.mountpoint, &plan.backing)?;
    let on_stderr = matches!(plan.log, log::Target::Stderr);
    log::install(plan.log, plan.log_level);
    for w in open::warnings(&keys, &plan.connect) {
        tracing::warn!("{w}");
        if !on_stderr {
            eprintln!("envelopefs: {w}");
        }
    }
    let options = StoreOptions {
        read_only: plan.mount.read_only,
        deks: plan.dek_cache,
        dek_pool: plan.dek_pool,
        prefetch: plan.prefetch,
        ..Default::default()
    };
    let store = Store::open(b, keys, options).map_err(|e| Fault::store(&plan.backing, &e))?;
    let job = Arc::new(Job::default());
    let started = Instant::now();
    let metrics = Arc::new(Source {
        store: store.clone(),
        job: job.clone(),
        deks: observed.deks.clone(),
        calls: observed.calls.clone(),
        audit: observed.audit.clone(),
        started,
    });
    if let Some(at) = plan.metrics {
        let source = metrics.clone();
        let at = listen::start(at, move || source.page())?;
        tracing::info!("metrics at http://{at}/metrics");
    }
    let (mountpoint, backing) = (plan.mount.mountpoint.clone(), plan.backing.clone());
    let keeper = KeyKeeper::new(store.clone(), job.clone(), plan.key_rules, mountpoint, backing);
    let control = Control {
        store: store.clone(),
        job: job.clone(),
        keeper: keeper.clone(),
        keys: plan.keys.clone(),
        mountpoint: plan.mount.mountpoint.clone(),
        backing: plan.backing.clone(),
        services: plan.connect.services.clone(),
        started,
        observed: observed.clone(),
        metrics,
    };
    let id = store.shared().keys.store_id();
    let sockets = runtime_dir::make()?;
    let turn = runtime_dir::turn(&sockets)?;
    // Somebody else who shares the store may have been faster.
    clear_mountpoint(&plan.mount.mountpoint, &plan.backing)?;
    let socket = match plan.mount.read_only {
        true => runtime_dir::shared_socket_path(&sockets, id, &plan.mount.mountpoint),
        false => runtime_dir::socket_path(&sockets, id),
    };
    let server = Server::start(&socket, Arc::new(control))?;
    let mounted = fuse::mount(store.clone(), &plan.mount).map_err(|e| mount_fault(&plan.mount, &e))?;
    drop(turn);
    on_signals(mounted.unmount_handle(), plan.mount.mountpoint.clone())
        .map_err(|e| Fault::new(FaultKind::Other, format!("cannot wait for signals: {}", plain(&e))))?;
    keeper.mounted(mounted.caches());
    let settling = Settling::start(store.clone(), job.clone());
    let endings = Endings::start(store.clone(), job.clone(), plan.backing.clone());
    work_ahead(store.clone());
    let place = format!("{} at {}", plan.backing.display(), plan.mount.mountpoint.display());
    observed.tell(StoreChange::Mount, &place);
    let refresher = Refresher::start(keeper.clone());
    tracing::info!("mounted {} (store {id}) at {}", plan.backing.display(), plan.mount.mountpoint.display());
    if plan.background {
        spawn::detach()
            .map_err(|e| Fault::new(FaultKind::Other, format!("cannot leave the terminal: {}", plain(&e))))?;
    }
    ready.ready();
    let _ = sd_notify::notify(&[NotifyState::Ready]);

    let served = mounted.wait();
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    job.stop();
    drop(refresher);
    keeper.end();
    endings.stop();
    settling.stop();
    store.stop_working_ahead(CALLS_END_MAX);
    let closed = store.close();
    observed.tell(StoreChange::Unmount, &place);
    observed.end();
    // Only now may somebody else have the store.
    drop(server);
    drop(lock);
    ended(&plan.backing, served, closed.map_err(|e| Fault::store(&plan.backing, &e)))
}

/// Takes the volume lock: alone, or to read only, which writes nothing to the backing directory, together with others who
/// share it. umount(8) returns when the mount is gone, not when its daemon has written everything back: one that mounted the
/// store and has no mount any more is waited for, so that `umount x; mount x` works.
fn take_lock(backing: &Path, read_only: bool) -> Result<VolumeLock, Fault> {
    let deadline = Instant::now() + LEAVING_MAX;
    loop {
        let taken = match read_only {
            true => VolumeLock::share(backing, READING),
            false => VolumeLock::take(backing, PURPOSE),
        };
        match taken {
            Err(f) if f.kind == FaultKind::Locked && Instant::now() < deadline && is_leaving(backing) => {
                std::thread::sleep(LEAVING_LOOK);
            }
            other => return other,
        }
    }
}

/// Whether whoever has the lock mounted the store, as far as can be told, and it is not mounted. Those who share it and are
/// no shards have mounted it to read.
fn is_leaving(backing: &Path) -> bool {
    let mounted_it = match VolumeLock::taken(backing) {
        Taken::No => true,
        Taken::Shared => shard_lock::at_work(backing).is_empty(),
        Taken::Alone => VolumeLock::holder(backing).is_some_and(|who| who.ends_with(PURPOSE)),
    };
    mounted_it && mounts::of_backing(backing).is_ok_and(|m| m.is_none())
}

fn ended(backing: &Path, served: io::Result<()>, closed: Result<(), Fault>) -> Result<(), Fault> {
    match (&closed, &served) {
        (Err(f), _) => tracing::error!("closing the store: {f}"),
        (_, Err(e)) => tracing::error!("the FUSE connection ended: {e}"),
        _ => tracing::info!("unmounted {}", backing.display()),
    }
    closed?;
    served.map_err(|e| Fault::new(FaultKind::Fuse, format!("the FUSE connection ended: {}", plain(&e))))
}

/// Refuses a mount point where an envelopefs is mounted already; takes away one of ours whose daemon has died.
fn clear_mountpoint(at: &Path, backing: &Path) -> Result<(), Fault> {
    let shown = at.display();
    let there = mounts::at(at).map_err(|e| Fault::io("look for mounts at", at, &e))?;
    let Some(m) = there.filter(mounts::Mount::is_ours) else { return Ok(()) };
    if !mounts::is_dead(at) {
        let text = format!("{} is mounted at {shown} already", m.source.display());
        return Err(Fault::new(FaultKind::MountTaken, text));
    }
    if m.source != backing {
        let text = format!("a mount of {} whose daemon has died is in the way at {shown}", m.source.display());
        return Err(Fault::new(FaultKind::DeadMount, text).about(at));
    }
    // It was mounted before, by a daemon that is gone for good.
    Unmounter::new(at).detach().map_err(|e| Fault::io("take away the dead mount at", at, &e))
}

fn mount_fault(o: &MountOptions, e: &io::Error) -> Fault {
    let kind = match e.raw_os_error() {
        Some(libc::ENOENT | libc::EPERM | libc::EACCES | libc::ENODEV | libc::ENXIO) | None => FaultKind::Fuse,
        _ => FaultKind::MountPoint,
    };
    let kind = if e.kind() == io::ErrorKind::InvalidInput { FaultKind::Usage } else { kind };
    Fault::new(kind, format!("cannot mount at {}: {}", o.mountpoint.display(), plain(e)))
}

/// SIGTERM, SIGINT and SIGHUP unmount. While files are open, the mount leaves the name space at once and ends with the
/// last of them; what was written is written back first.
fn on_signals(unmounter: Unmounter, mountpoint: PathBuf) -> io::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            tracing::info!("signal {signal}: unmounting");
            let _ = sd_notify::notify(&[NotifyState::Stopping]);
            match unmounter.unmount() {
                Ok(()) => {}
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    tracing::warn!("{} is in use; it will end with its last user", mountpoint.display());
                    detach(&unmounter, &mountpoint);
                }
                // A second signal, or somebody else was faster.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                Err(e) => tracing::error!("cannot unmount {}: {e}", mountpoint.display()),
            }
        }
    })?;
    Ok(())
}

/// Takes the mount out of the name space, and has the kernel write back what it holds.
fn detach(unmounter: &Unmounter, mountpoint: &Path) {
    let dir = open_dir(mountpoint);
    if let Err(e) = unmounter.detach() {
        tracing::error!("cannot unmount {}: {e}", mountpoint.display());
    }
    if let Ok(d) = dir {
        let _ = rustix::fs::syncfs(&d);
    }
}

/// The thread that does what is done ahead of need. It is not waited for longer than its calls may take.
fn work_ahead(store: Arc<Store<Posix>>) {
    // Without it everything works all the same.
    if let Err(e) = std::thread::Builder::new().name("ahead".into()).spawn(move || store.work_ahead()) {
        tracing::warn!("no thread to make keys ahead of need: {e}");
    }
}

/// The thread that marks closed files clean, forgets old keys, and moves headers that old backups brought back.
struct Settling {
    stop: StopSender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Settling {
    fn start(store: Arc<Store<Posix>>, job: Arc<Job>) -> Self {
        let (stop, stopped) = channel();
        let work = move || {
            while stopped.recv_timeout(SETTLE_EVERY) == Err(RecvTimeoutError::Timeout) {
                if let Err(e) = store.settle(SETTLE_AFTER) {
                    tracing::warn!("settling closed files: {e}");
                }
                store.shared().deks.expire();
                rotate::restored(&store, &job);
            }
        };
        // Without the thread files are settled at unmount.
        let thread = std::thread::Builder::new().name("settle".into()).spawn(work).ok();
        Self { stop, thread }
    }

    fn stop(self) {
        drop(self.stop);
        if let Some(t) = self.thread {
            let _ = t.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_whose_mount_is_gone_already_is_waited_for() {
        let leaving = [VolumeLock::take, VolumeLock::share];
        for (how, read_only) in leaving.into_iter().flat_map(|l| [(l, false), (l, true)]) {
            let d = tempfile::tempdir().unwrap();
            std::fs::create_dir(d.path().join(".envelopefs")).unwrap();
            let leaving = how(d.path(), PURPOSE).unwrap();
            std::thread::scope(|s| {
                let waiting = s.spawn(|| take_lock(d.path(), read_only));
                // Longer than a taker is patient with those who only look.
                std::thread::sleep(Duration::from_millis(300));
                drop(leaving);
                waiting.join().unwrap().unwrap();
            });
        }
    }

    #[test]
    fn a_store_that_is_being_rotated_is_not_waited_for() {
        let d = tempfile::tempdir().unwrap();
        std::fs::create_dir(d.path().join(".envelopefs")).unwrap();
        let rotating = VolumeLock::take(d.path(), "rotate").unwrap();
        assert!(!is_leaving(d.path()));
        for read_only in [false, true] {
            assert_eq!(take_lock(d.path(), read_only).unwrap_err().kind, FaultKind::Locked);
        }
        drop(rotating);
        let shard = crate::rotation::Shard::new(1, 1).unwrap();
        let _shard = shard_lock::ShardLocks::take(d.path(), shard, || Ok(())).unwrap();
        assert!(!is_leaving(d.path()));
        assert_eq!(take_lock(d.path(), false).unwrap_err().kind, FaultKind::Locked);
        take_lock(d.path(), true).unwrap();
    }
}
