//! Mounting through FUSE: an adapter from fuser's trait to [`crate::fs`]. It decides nothing but how to talk to the kernel.

mod adapter;
mod aside;
mod caches;
mod convert;
mod mountpoint;
mod options;
mod process;
mod seeks;
mod tune;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use fuser::{Config, Session, SessionACL};

use crate::backing::Backing;
use crate::fs::{EnvelopeFs, Settings};
use crate::store::Store;

use adapter::Adapter;
use seeks::LateNotifier;

pub use caches::Caches;
pub use options::MountOptions;

/// A mounted store. Dropping this leaves it mounted.
#[derive(Debug)]
pub struct Mounted {
    mountpoint: PathBuf,
    session: JoinHandle<io::Result<()>>,
    caches: Arc<Caches>,
}

/// Unmounts; can be sent to another thread, such as the one that waits for signals.
#[derive(Debug, Clone)]
pub struct Unmounter {
    mountpoint: PathBuf,
}

impl Unmounter {
    /// For what is mounted at `mountpoint`, which is absolute and free of symbolic links, by whichever process.
    pub fn new(mountpoint: impl Into<PathBuf>) -> Self {
        Self { mountpoint: mountpoint.into() }
    }

    /// Unmounts, as umount(8) does: the kernel writes back what it has cached first.
    ///
    /// # Errors
    /// `EBUSY` while files are open; those of umount(2).
    pub fn unmount(&self) -> io::Result<()> {
        mountpoint::unmount(&self.mountpoint, false)
    }

    /// Takes the mount out of sight now; it ends when the last open file is closed.
    ///
    /// # Errors
    /// Those of umount(2).
    pub fn detach(&self) -> io::Result<()> {
        mountpoint::unmount(&self.mountpoint, true)
    }
}

impl Mounted {
    /// Waits until it is unmounted, by whomever. The store is not closed by that: see [`Store::close`].
    ///
    /// # Errors
    /// The FUSE connection's: `ECONNABORTED` if it was aborted through `/sys/fs/fuse`.
    pub fn wait(self) -> io::Result<()> {
        self.session.join().unwrap_or_else(|_| Err(io::Error::other("a thread of the FUSE session panicked")))
    }

    /// Whether it was unmounted and nobody has a file open any more: [`Mounted::wait`] would not wait.
    pub fn is_over(&self) -> bool {
        self.session.is_finished()
    }

    /// The mount point, absolute.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// What the kernel keeps of it.
    pub fn caches(&self) -> Arc<Caches> {
        Arc::clone(&self.caches)
    }

    /// What unmounts this.
    pub fn unmount_handle(&self) -> Unmounter {
        Unmounter { mountpoint: self.mountpoint.clone() }
    }
}

/// Mounts `store` and returns once the mount answers.
///
/// # Errors
/// Those of mount(2) or of fusermount3; `InvalidInput` for an option that is not known.
pub fn mount<B: Backing>(store: Arc<Store<B>>, o: &MountOptions) -> io::Result<Mounted> {
    let parsed = options::parse(o)?;
    let at = mountpoint::resolve(&o.mountpoint)?;
    let root = rustix::process::geteuid().is_root();
    let fs = EnvelopeFs::new(store, Settings { gives_away: root, kernel_keeps_mtime: o.writeback });
    let device = mountpoint::mount(&at, o, &parsed)?;
    let session = start(fs, device, o).and_then(|session| {
        // The first answer comes from the threads just started.
        let answered = rustix::fs::stat(&at)?;
        Ok((session, answered))
    });
    match session {
        Ok(((session, caches), answered)) => {
            if root
                && o.raise_limits
                && let Err(e) = tune::raise_limits(answered.st_dev)
            {
                tracing::warn!("could not raise the mount's limits, streams and buffered writes stay slower: {e}");
            }
            Ok(Mounted { mountpoint: at, session, caches })
        }
        Err(e) => {
            if let Err(left) = mountpoint::unmount(&at, true) {
                tracing::warn!("could not unmount {} after a failed start: {left}", at.display());
            }
            Err(e)
        }
    }
}

/// Answers the kernel's greeting and starts the threads.
fn start<B: Backing>(
    fs: EnvelopeFs<B>,
    device: std::os::fd::OwnedFd,
    o: &MountOptions,
) -> io::Result<(JoinHandle<io::Result<()>>, Arc<Caches>)> {
    let mut config = Config::default();
    config.n_threads = Some(o.thread_count());
    config.clone_fd = true;
    // The kernel lets nobody through who is not allowed; see `mountpoint` for why fuser must not check again.
    let notifier = LateNotifier::default();
    let fs = Arc::new(fs);
    let adapter = Adapter::new(Arc::clone(&fs), o, notifier.clone())?;
    let session = Session::from_fd(adapter, device, SessionACL::All, config)?;
    // Set once and here only.
    let _ = notifier.set(session.notifier());
    let caches = Arc::new(Caches::new(session.notifier(), &fs));
    drop(fs);
    let session = std::thread::Builder::new().name("fuse".to_owned()).spawn(move || session.run())?;
    Ok((session, caches))
}
