//! A server process for one test.

use crate::cli::support::wait_for;
use envelopefs::kms::KmsError;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use std::ffi::OsStr;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A port of 127.0.0.1 that nothing listens on.
pub fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// A program of the tests' Python environment, which `make setup` makes.
pub fn venv(program: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/venv/bin").join(program);
    assert!(path.exists(), "{} is not there: run `make setup`", path.display());
    path
}

/// A file of `tests/support`.
pub fn support(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support").join(name)
}

/// What `call` returns once it succeeds. On a busy machine a server may take longer than the short time limit of a test
/// about servers that do not answer.
pub fn in_the_end<T>(mut call: impl FnMut() -> Result<T, KmsError>) -> T {
    let mut got = None;
    wait_for("a call that succeeds", || {
        got = call().ok();
        got.is_some()
    });
    got.unwrap()
}

/// A server that runs until this is dropped; it also dies with the test process, however that ends.
pub struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Starts `program` with `args` and waits until `ready` says so. What it prints goes to `log`.
    pub fn start(
        program: &Path,
        args: impl IntoIterator<Item = impl AsRef<OsStr>>,
        environment: &[(&str, &str)],
        log: &Path,
        mut ready: impl FnMut() -> bool,
    ) -> Self {
        let out = std::fs::File::options().create(true).append(true).open(log).unwrap();
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(args)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap();
        let mut server = Self { child, log: log.to_owned() };
        let end = Instant::now() + PATIENCE;
        while !ready() {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < end, "{ended:?}: {}", server.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// What it has printed so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// `kill -9`, and its end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Stops it from answering, without ending it; [`Server::thaw`] lets it go on.
    ///
    /// kill(2) returns before the threads of another process have stopped, and one that still runs may answer once more:
    /// this waits for the last of them (waitid(2), `WSTOPPED`). One that has ended is told, and not waited for.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
        let how = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let stopped = waitid(WaitId::Pid(self.pid()), how).unwrap().expect("waits for it");
        assert!(stopped.stopped(), "{stopped:?}: {}", self.log());
    }

    /// Lets it go on after [`Server::freeze`].
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}
