//! What a path on the command line is: a mount point of ours, or a backing directory, mounted or not.

use crate::backing::posix::Posix;
use crate::daemon::client::Connection;
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::lock::VolumeLock;
use crate::daemon::{mounts, open, process};
use crate::format::ids::KekId;
use crate::format::keyring::Keyring;
use std::path::{Path, PathBuf};

/// A store that was named by its mount point or its backing directory.
pub struct Place {
    /// The backing directory, absolute.
    pub backing: PathBuf,
    /// Where it is mounted, if that can be seen from here.
    pub mount: Option<mounts::Mount>,
    /// Where else, if it was named by its backing directory: read-only mounts can be several.
    pub other_mounts: Vec<PathBuf>,
    /// The backing directory, open.
    pub posix: Posix,
    /// The public part of its keyring.
    pub keyring: Keyring,
}

impl Place {
    /// Finds the store at `path`.
    ///
    /// # Errors
    /// [`FaultKind::NotAStore`] if `path` is neither.
    pub fn find(path: &Path) -> Result<Self, Fault> {
        let looked = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
                Fault::new(FaultKind::NotAStore, format!("{}: no such directory", path.display()))
            }
            _ => Fault::io("look at", path, &e),
        };
        let at = mounts::resolve(path).map_err(looked)?;
        let mounted = mounts::at(&at).map_err(looked)?.filter(mounts::Mount::is_ours);
        let (backing, mount, others) = match mounted {
            Some(m) => (m.source.clone(), Some(m), Vec::new()),
            None => {
                let mut all = mounts::all_of(&at).map_err(looked)?;
                let newest = all.pop();
                (at, newest, all)
            }
        };
        let posix = open::backing(&backing)?;
        let keyring = open::keyring(&posix)?;
        let other_mounts = others.into_iter().map(|m| m.mountpoint).collect();
        Ok(Self { backing, mount, other_mounts, posix, keyring })
    }

    /// The KEK of the store that `which` is the id of.
    ///
    /// # Errors
    /// [`FaultKind::Other`] if it is none.
    pub fn kek(&self, which: &str) -> Result<KekId, Fault> {
        which.parse::<KekId>().ok().filter(|id| self.keyring.kek(*id).is_some()).ok_or_else(|| {
            let text = format!("{which} is not a KEK of {}; key list shows their ids", self.backing.display());
            Fault::new(FaultKind::Other, text)
        })
    }

    /// A connection to the daemon that has the store mounted, as [`Place::connect`] has said. A daemon does not wait long
    /// for what a client wants: whoever has to ask somebody first connects afterwards.
    ///
    /// # Errors
    /// As [`Place::connect`]; [`FaultKind::Daemon`] if the store was unmounted since.
    pub fn daemon(&self) -> Result<Connection, Fault> {
        self.connect()?.ok_or_else(|| Fault::new(FaultKind::Daemon, "the daemon is gone"))
    }

    /// A connection to the daemon that has the store mounted; `None` if nobody has the store.
    ///
    /// # Errors
    /// [`FaultKind::Locked`] if somebody has it who cannot be talked to; [`FaultKind::Denied`].
    pub fn connect(&self) -> Result<Option<Connection>, Fault> {
        if !VolumeLock::is_taken(&self.backing) {
            return Ok(None);
        }
        let owner = self.mount.as_ref().and_then(mounts::Mount::owner).unwrap_or_else(process::uid);
        let store = self.keyring.store;
        let found = match &self.mount {
            None => Connection::to_store(store, owner),
            Some(m) => self.daemon_of(m, owner),
        };
        match found {
            Ok(c) => Ok(Some(c)),
            Err(f) if f.kind == FaultKind::Daemon => {
                // Says who, as far as it is known. Free by now: then nobody has it.
                match VolumeLock::take(&self.backing, "a look") {
                    Err(f) => Err(f),
                    Ok(_) => Ok(None),
                }
            }
            Err(f) => Err(f),
        }
    }

    /// A connection to the daemon of `m`, and to no other one that has the store mounted, too: it may have to lock keys.
    fn daemon_of(&self, m: &mounts::Mount, owner: u32) -> Result<Connection, Fault> {
        let store = self.keyring.store;
        let found = Connection::to_mount(store, owner, &m.mountpoint);
        if !matches!(&found, Err(f) if f.kind == FaultKind::Daemon) {
            return found;
        }
        // A bind mount, or moved. But another mount does not stand in for one whose daemon has died or has its socket elsewhere.
        let all = mounts::all_of(&self.backing).map_err(|e| Fault::io("look for mounts of", &self.backing, &e))?;
        let (same, others): (Vec<_>, Vec<_>) = all.iter().partition(|o| o.device == m.device);
        let bound = same.iter().map(|o| Connection::to_mount(store, owner, &o.mountpoint)).find(Result::is_ok);
        match bound {
            Some(c) => c,
            None if others.is_empty() && !mounts::is_dead(&m.mountpoint) => Connection::to_store(store, owner),
            None => found,
        }
    }
}
