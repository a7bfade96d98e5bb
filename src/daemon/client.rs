//! The control socket's client side.

use super::fault::{Fault, FaultKind, plain};
use super::protocol::{self, Reply, Request};
use super::{runtime_dir, server};
use crate::format::ids::StoreId;
use crate::rotation::Status;
use crate::rotation::rekey::RekeyStatus;
use rustix::process::Pid;
use std::io::{self, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// A connection to the daemon of a store.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    pid: Pid,
}

fn none(store: StoreId) -> Fault {
    Fault::new(FaultKind::Daemon, format!("no control socket of store {store} is there"))
}

/// Connects to the first of `paths` at which somebody listens. If nobody does, the first that is there counts.
fn first_alive(paths: impl Iterator<Item = PathBuf>, owner: u32) -> Option<Result<Connection, Fault>> {
    let mut dead = None;
    // A place we may not look into may hold one: connecting then tells why not.
    let there = |p: &PathBuf| !matches!(std::fs::symlink_metadata(p), Err(e) if e.kind() == io::ErrorKind::NotFound);
    for p in paths.filter(there) {
        match Connection::open(&p, owner) {
            Err(f) if f.kind == FaultKind::Daemon => dead = dead.or(Some(Err(f))),
            found => return Some(found),
        }
    }
    dead
}

impl Connection {
    /// Connects to the socket at `path`, which must be served by `owner` or root.
    ///
    /// # Errors
    /// [`FaultKind::Daemon`] if nobody listens, [`FaultKind::Denied`] if the socket is not ours to use or somebody else
    /// serves it.
    pub fn open(path: &Path, owner: u32) -> Result<Self, Fault> {
        let fail = |e: io::Error| match e.kind() {
            io::ErrorKind::PermissionDenied => {
                Fault::new(FaultKind::Denied, format!("control socket {}: {}", path.display(), plain(&e)))
            }
            _ => Fault::new(FaultKind::Daemon, format!("control socket {}: {}", path.display(), plain(&e))),
        };
        let stream = UnixStream::connect(path).map_err(fail)?;
        let (uid, pid) = server::peer(&stream).map_err(fail)?;
        if uid != 0 && uid != owner {
            let text = format!("control socket {} is served by user {uid}", path.display());
            return Err(Fault::new(FaultKind::Denied, text));
        }
        Ok(Self { stream, pid })
    }

    /// Connects to the daemon that has `store` mounted at `mountpoint`, run by `owner`, wherever its socket may be.
    ///
    /// # Errors
    /// As [`Connection::open`], of the first place that has a socket.
    pub fn to_mount(store: StoreId, owner: u32, mountpoint: &Path) -> Result<Self, Fault> {
        let places = runtime_dir::candidates(owner);
        let shared = places.iter().map(|d| runtime_dir::shared_socket_path(d, store, mountpoint));
        let alone = places.iter().map(|d| runtime_dir::socket_path(d, store));
        // A socket may be left from a daemon that was killed.
        first_alive(shared.chain(alone), owner).unwrap_or_else(|| Err(none(store)))
    }

    /// Connects to the daemon of `store`, run by `owner`, wherever it has it mounted.
    ///
    /// # Errors
    /// As [`Connection::to_mount`]; [`FaultKind::Usage`] if there are several.
    pub fn to_store(store: StoreId, owner: u32) -> Result<Self, Fault> {
        let places = runtime_dir::candidates(owner);
        let alone = first_alive(places.iter().map(|d| runtime_dir::socket_path(d, store)), owner);
        match alone.unwrap_or_else(|| Err(none(store))) {
            Err(f) if f.kind == FaultKind::Daemon => {
                let paths = places.iter().flat_map(|d| runtime_dir::shared_sockets(d, store));
                let mut alive = paths.filter_map(|p| Self::open(&p, owner).ok());
                match (alive.next(), alive.next()) {
                    (Some(one), None) => Ok(one),
                    (Some(_), Some(_)) => {
                        let text = format!("store {store} is mounted read-only several times: name the mount point");
                        Err(Fault::new(FaultKind::Usage, text))
                    }
                    (None, _) => Err(f),
                }
            }
            alone => alone,
        }
    }

    /// The daemon's process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends `request` and returns the last reply; `progress` gets those before.
    ///
    /// # Errors
    /// The daemon's own fault, or [`FaultKind::Daemon`] if it went away.
    pub fn ask(self, request: &Request, mut progress: impl FnMut(&Status)) -> Result<Reply, Fault> {
        self.until_the_last(request, |r| {
            let Reply::Progress(s) = r else { return false };
            progress(s);
            true
        })
    }

    /// The same for a rekey.
    ///
    /// # Errors
    /// As [`Connection::ask`].
    pub fn ask_rekey(self, request: &Request, mut progress: impl FnMut(&RekeyStatus)) -> Result<Reply, Fault> {
        self.until_the_last(request, |r| {
            let Reply::RekeyProgress(s) = r else { return false };
            progress(s);
            true
        })
    }

    /// Sends `request` and returns the first reply that is not for `progress`.
    fn until_the_last(mut self, request: &Request, mut progress: impl FnMut(&Reply) -> bool) -> Result<Reply, Fault> {
        let gone = |e: io::Error| Fault::new(FaultKind::Daemon, format!("the daemon went away: {}", plain(&e)));
        protocol::send(&mut self.stream, request).map_err(gone)?;
        let mut reader = BufReader::new(self.stream);
        loop {
            match protocol::receive::<Reply>(&mut reader, protocol::REPLY_MAX).map_err(gone)? {
                Some(Reply::Failed(f)) => return Err(f),
                Some(r) if !progress(&r) => return Ok(r),
                Some(_) => {}
                None => return Err(Fault::new(FaultKind::Daemon, "the daemon went away without an answer")),
            }
        }
    }
}
