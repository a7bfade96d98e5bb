//! The control socket's server side: who may ask, and one thread for each who does.

use super::accept::{Socket, serve_all};
use super::fault::{Fault, FaultKind};
use super::protocol::{self, Reply, Request};
use super::{process, runtime_dir};
use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const SOCKET: Socket = Socket { name: "control", most: 32 };
/// How long a client may take to say what it wants, and to take an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers requests.
pub trait Handler: Send + Sync + 'static {
    /// Answers `request` through `client`.
    ///
    /// # Errors
    /// That the client has gone away.
    fn handle(&self, request: Request, client: &mut Client) -> io::Result<()>;
}

/// The connection of one client.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

impl Client {
    /// Sends one line.
    ///
    /// # Errors
    /// That the client has gone away.
    pub fn send(&mut self, reply: &Reply) -> io::Result<()> {
        protocol::send(&mut self.stream, reply)
    }

    /// Whether the client has closed its side.
    pub fn is_gone(&self) -> bool {
        let mut b = [0u8; 1];
        let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
        match rustix::net::recv(&self.stream, &mut b[..], flags) {
            Ok((n, _)) => n == 0,
            Err(e) => e != rustix::io::Errno::AGAIN,
        }
    }
}

/// A listening control socket; the file goes away when this is dropped.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    /// Device and inode number of the file.
    made: Option<(u64, u64)>,
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

impl Server {
    /// Listens at `path`, in a directory [`runtime_dir::check`] approves, and serves in threads of its own. A socket left
    /// by a daemon that died, or whose mount is gone, is replaced: the caller has seen to it that nobody else's is needed
    /// there.
    ///
    /// # Errors
    /// The kernel's, or that the directory is not safe.
    pub fn start(path: &Path, handler: Arc<dyn Handler>) -> Result<Self, Fault> {
        if let Some(dir) = path.parent() {
            runtime_dir::check(dir, process::uid())?;
        }
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Fault::io("replace", path, &e)),
            _ => {}
        }
        let fail = |e: io::Error| Fault::io("listen on", path, &e);
        let listener = UnixListener::bind(path).map_err(fail)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
        let next = move || listener.accept().map(|(stream, _)| stream);
        let accept = move || serve_all(SOCKET, next, move |stream| serve(stream, handler.as_ref()));
        std::thread::Builder::new().name(SOCKET.name.into()).spawn(accept).map_err(fail)?;
        Ok(Self { path: path.to_path_buf(), made: inode(path) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Somebody may have mounted a store at the same place that is shared, while we were leaving.
        if inode(&self.path) == self.made {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Whether a peer with `peer`'s user id may talk to a daemon of `own`.
fn may_talk(peer: u32, own: u32) -> bool {
    peer == 0 || peer == own
}

/// The user id at the other end of a socket.
///
/// # Errors
/// The kernel's.
pub fn peer(stream: &UnixStream) -> io::Result<(u32, rustix::process::Pid)> {
    let c = rustix::net::sockopt::socket_peercred(stream.as_fd())?;
    Ok((c.uid.as_raw(), c.pid))
}

fn serve(stream: UnixStream, handler: &dyn Handler) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let (uid, pid) = peer(&stream)?;
    let mut reader = stream.try_clone()?;
    let mut client = Client { stream };
    if !may_talk(uid, process::uid()) {
        tracing::warn!("control socket: refused user {uid} (process {})", pid.as_raw_nonzero());
        let f = Fault::new(FaultKind::Denied, "only the user who mounted the store and root may control it");
        return client.send(&Reply::Failed(f));
    }
    match protocol::receive_only::<Request>(&mut reader) {
        Ok(Some(r)) => handler.handle(r, &mut client),
        Ok(None) => Ok(()),
        Err(e) => client.send(&Reply::Failed(Fault::new(FaultKind::Usage, format!("request not understood: {e}")))),
    }
}

/// A descriptor of the directory `path`, which keeps a mount below it reachable after a lazy unmount.
///
/// # Errors
/// The kernel's.
pub fn open_dir(path: &Path) -> io::Result<std::os::fd::OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::client::Connection;
    use crate::rotation::{State, Status};

    struct Echo;

    impl Handler for Echo {
        fn handle(&self, request: Request, client: &mut Client) -> io::Result<()> {
            match request {
                Request::Metrics => {
                    client.send(&Reply::Progress(Box::new(running(3))))?;
                    client.send(&Reply::Done)
                }
                _ => client.send(&Reply::Failed(Fault::new(FaultKind::Usage, "no"))),
            }
        }
    }

    fn running(pass: u32) -> Status {
        Status { state: State::Sweeping, pass, ..Status::default() }
    }

    fn dir() -> tempfile::TempDir {
        let d = tempfile::tempdir().unwrap();
        std::fs::set_permissions(d.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        d
    }

    #[test]
    fn only_the_owner_and_root_may_talk() {
        assert!(may_talk(0, 1000) && may_talk(1000, 1000));
        assert!(!may_talk(1000, 0) && !may_talk(1001, 1000));
    }

    #[test]
    fn requests_are_answered_and_the_socket_is_private() {
        let d = dir();
        let path = d.path().join("s.sock");
        std::fs::write(&path, "stale").unwrap();
        let server = Server::start(&path, Arc::new(Echo)).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut seen = 0;
        let c = Connection::open(&path, process::uid()).unwrap();
        assert_eq!(c.ask(&Request::Metrics, |p| seen += p.pass), Ok(Reply::Done));
        assert_eq!(seen, 3);
        let c = Connection::open(&path, process::uid()).unwrap();
        assert_eq!(c.ask(&Request::Status, |_| {}).unwrap_err().kind, FaultKind::Usage);
        // The next one at the same place is not taken away by the one that leaves.
        let next = Server::start(&path, Arc::new(Echo)).unwrap();
        drop(server);
        Connection::open(&path, process::uid()).unwrap();
        drop(next);
        assert!(!path.exists());
    }

    #[test]
    fn a_directory_open_to_others_is_refused() {
        let d = dir();
        std::fs::set_permissions(d.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(Server::start(&d.path().join("s"), Arc::new(Echo)).unwrap_err().kind, FaultKind::Denied);
    }
}
