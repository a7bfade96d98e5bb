//! The control socket's client side.

use super::fault::{Fault, FaultKind, plain};
use super::protocol::{self, Reply, Request};
use super::{runtime_dir, server};
use crate::format::ids::StoreId;
use crate::rotation::Status;
use rustix::process::Pid;
use std::io::{self, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A connection to the daemon of a store.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    pid: Pid,
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

    /// Connects to the daemon of `store`, run by `owner`, wherever its socket may be.
    ///
    /// # Errors
    /// As [`Connection::open`], of the first place that has a socket.
    pub fn to_store(store: StoreId, owner: u32) -> Result<Self, Fault> {
        let places = runtime_dir::candidates(owner);
        let path = places.iter().map(|d| runtime_dir::socket_path(d, store)).find(|p| {
            // A place we may not look into may hold it: connecting then tells why not.
            !matches!(std::fs::symlink_metadata(p), Err(e) if e.kind() == io::ErrorKind::NotFound)
        });
        match path {
            Some(p) => Self::open(&p, owner),
            None => Err(Fault::new(FaultKind::Daemon, format!("no control socket of store {store} is there"))),
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
    pub fn ask(mut self, request: &Request, mut progress: impl FnMut(&Status)) -> Result<Reply, Fault> {
        let gone = |e: io::Error| Fault::new(FaultKind::Daemon, format!("the daemon went away: {}", plain(&e)));
        protocol::send(&mut self.stream, request).map_err(gone)?;
        let mut reader = BufReader::new(self.stream);
        loop {
            match protocol::receive::<Reply>(&mut reader, protocol::REPLY_MAX).map_err(gone)? {
                Some(Reply::Progress(p)) => progress(&p),
                Some(Reply::Failed(f)) => return Err(f),
                Some(r) => return Ok(r),
                None => return Err(Fault::new(FaultKind::Daemon, "the daemon went away without an answer")),
            }
        }
    }
}
