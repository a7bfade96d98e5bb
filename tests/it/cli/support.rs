//! A directory to run the program in. Whatever it has mounted and started there is taken away when it is dropped.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The directory, with `back/` and `mnt/` in it, and a runtime directory of its own.
pub struct Bench {
    dir: tempfile::TempDir,
}

/// Whether this machine lets this test mount; says so if not.
pub fn can_mount() -> bool {
    let can = fs::File::options().read(true).write(true).open("/dev/fuse").is_ok();
    if !can {
        eprintln!("skipped: /dev/fuse cannot be opened");
    }
    can
}

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("envelopefs-cli-").tempdir().unwrap();
        // Canonical, so that what the program prints can be compared.
        assert_eq!(fs::canonicalize(dir.path()).unwrap(), dir.path());
        for name in ["back", "mnt"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        Self { dir }
    }

    /// With a store in `back/` that `DIR/key` opens.
    pub fn with_store() -> Self {
        let b = Self::new();
        b.ok("init back --key keyfile:DIR/key");
        b
    }

    /// With that store mounted at `mnt/`.
    pub fn mounted() -> Self {
        let b = Self::with_store();
        b.ok("mount back mnt --log-file DIR/log");
        b
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The program with the words of `line`, in which `DIR` stands for this directory.
    pub fn command(&self, line: &str) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_envelopefs"));
        self.prepare(&mut c);
        c.args(line.split_whitespace().map(|w| w.replace("DIR", self.dir.path().to_str().unwrap())));
        c
    }

    pub fn prepare(&self, c: &mut Command) {
        c.current_dir(self.dir.path())
            .env("ENVELOPEFS_RUNTIME_DIR", self.path("run"))
            .env("HOME", self.dir.path())
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("CREDENTIALS_DIRECTORY")
            .env_remove("NOTIFY_SOCKET")
            .env("COLUMNS", "100")
            .stdin(Stdio::null());
    }

    pub fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    pub fn spawn(&self, line: &str) -> Child {
        self.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Runs what must succeed; returns its standard output, masked.
    pub fn ok(&self, line: &str) -> String {
        let o = self.run(line);
        assert!(o.status.success(), "{line}: {:?}\n{}", o.status, self.masked(&o.stderr));
        self.masked(&o.stdout)
    }

    /// Runs what must exit with `code`, printing exactly `out` and, on standard error, `err`.
    #[track_caller]
    pub fn says(&self, line: &str, code: i32, out: &str, err: &str) {
        let o = self.run(line);
        let got = (o.status.code(), self.masked(&o.stdout), self.masked(&o.stderr));
        assert_eq!(got, (Some(code), out.to_string(), err.to_string()), "envelopefs {line}");
    }

    /// Runs what must fail with `code` and this one line.
    #[track_caller]
    pub fn fails(&self, line: &str, code: i32, err: &str) {
        self.says(line, code, "", &format!("envelopefs: {err}\n"));
    }

    pub fn json(&self, line: &str) -> serde_json::Value {
        let o = self.run(line);
        assert!(o.status.success(), "{line}: {}", self.masked(&o.stderr));
        serde_json::from_slice(&o.stdout).unwrap()
    }

    /// Output with this directory as `DIR`, ids as `ID` and process ids as `PID`.
    pub fn masked(&self, out: &[u8]) -> String {
        let text = String::from_utf8(out.to_vec()).unwrap().replace(self.dir.path().to_str().unwrap(), "DIR");
        let mut masked = String::new();
        let mut rest = text.as_str();
        while let Some(c) = rest.chars().next() {
            let hex = rest.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(rest.len());
            let (word, len) = match hex {
                32 => ("ID", 32),
                _ if rest.starts_with("(pid ") => ("(pid PID", 5 + rest[5..].find(' ').unwrap()),
                0 => ("", 0),
                n => (&rest[..n], n),
            };
            if len == 0 {
                masked.push(c);
                rest = &rest[c.len_utf8()..];
            } else {
                masked.push_str(word);
                rest = &rest[len..];
            }
        }
        masked
    }

    /// The daemon's process id, as the lock file says it.
    pub fn daemon(&self) -> i32 {
        let text = fs::read_to_string(self.path("back/.envelopefs/lock")).unwrap();
        text.split(' ').nth(1).unwrap().parse().unwrap()
    }

    /// The daemon's control socket.
    pub fn socket(&self) -> PathBuf {
        let mut found = fs::read_dir(self.path("run")).unwrap();
        found.next().unwrap().unwrap().path()
    }

    /// `kill -9` of the daemon, and its end.
    pub fn kill(&self) {
        let pid = rustix::process::Pid::from_raw(self.daemon()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        wait_for("the daemon's end", || self.is_unlocked());
    }

    pub fn is_unlocked(&self) -> bool {
        match fs::File::open(self.path("back/.envelopefs/lock")) {
            Ok(f) => rustix::fs::flock(&f, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok(),
            Err(_) => true,
        }
    }

    pub fn is_mounted(&self) -> bool {
        !mounts_below(self.dir.path()).is_empty()
    }

    pub fn chmod(&self, name: &str, mode: u32) {
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode)).unwrap();
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for at in mounts_below(self.dir.path()) {
            let _ = rustix::mount::unmount(&at, rustix::mount::UnmountFlags::DETACH);
        }
        let end = Instant::now() + Duration::from_secs(10);
        while !self.is_unlocked() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        if !self.is_unlocked()
            && let Some(pid) = rustix::process::Pid::from_raw(self.daemon())
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let at = text.lines().filter_map(|l| l.split(' ').nth(4)).map(PathBuf::from);
    at.filter(|p| p.starts_with(dir)).collect()
}

/// Waits until `done`; fails the test if that takes too long.
#[track_caller]
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
