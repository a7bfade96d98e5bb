//! A store in a temporary directory, mounted, and taken away again whatever happens.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use envelopefs::backing::posix::Posix;
use envelopefs::daemon::keys::{KeyKeeper, KeyRules};
use envelopefs::fuse::{self, MountOptions, Mounted};
use envelopefs::kms::uri::RootKeyUri;
use envelopefs::kms::{ConnectOptions, KeyProvider, connect};
use envelopefs::store::keys::{KekKind, Keys, StoreFlags};
use envelopefs::store::{Store, StoreOptions};
use tempfile::TempDir;

/// The user and group that nobody is.
pub const NOBODY: u32 = 65534;
/// A user and a group that need not exist.
pub const STRANGER: u32 = 54321;

/// A mounted store. Dropping it unmounts and removes everything.
pub struct Mount {
    mounted: Option<Mounted>,
    store: Arc<Store<Posix>>,
    /// Dropped last.
    place: Place,
}

/// A temporary directory with `backing/`, `mnt/` and a key file in it.
pub struct Place {
    dir: TempDir,
    backing: PathBuf,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("envelopefs-it-").tempdir().expect("a temporary directory");
        // Other users must get through to the mount.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(dir.path().join("mnt")).unwrap();
        let backing = dir.path().join("backing");
        fs::create_dir(&backing).unwrap();
        Self { dir, backing }
    }

    /// Below `dir`, which is somewhere else, such as on a small disk.
    pub fn with_backing(mut self, dir: PathBuf) -> Self {
        self.backing = dir;
        self
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn backing(&self) -> &Path {
        &self.backing
    }

    pub fn mountpoint(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    pub fn root_key(&self, create: bool) -> Arc<dyn KeyProvider> {
        let uri = RootKeyUri::parse(&format!("keyfile:{}", self.dir.path().join("key").display())).unwrap();
        connect(&uri, &ConnectOptions::default(), create).expect("a key file")
    }

    /// Makes a store here.
    pub fn init(&self) {
        let b = Posix::open(&self.backing).unwrap();
        Store::init(&b, &[self.root_key(true)], KekKind::Sealed, StoreFlags::default()).expect("init");
    }

    /// Opens the store that is here.
    pub fn open(&self, o: StoreOptions) -> Arc<Store<Posix>> {
        let b = Posix::open(&self.backing).unwrap();
        let keys = Keys::open(&b, &[self.root_key(false)]).expect("keys");
        Store::open(b, keys, o).expect("open")
    }

    /// Mounts the store that is here.
    pub fn mount(self, change: impl FnOnce(&mut MountOptions)) -> Mount {
        let mut o = MountOptions::new(self.mountpoint());
        o.fs_name = "it".to_owned();
        o.options = vec!["suid".to_owned(), "dev".to_owned()];
        o.allow_other = is_root();
        change(&mut o);
        let store = self.open(StoreOptions { read_only: o.read_only, ..StoreOptions::default() });
        let mounted = fuse::mount(store.clone(), &o).expect("mount");
        Mount { mounted: Some(mounted), store, place: self }
    }
}

impl Mount {
    /// A new store with the usual options.
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// A new store with options changed.
    pub fn with(change: impl FnOnce(&mut MountOptions)) -> Self {
        let place = Place::new();
        place.init();
        place.mount(change)
    }

    /// Where it is mounted, or a path below.
    pub fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.place.mountpoint().join(below)
    }

    pub fn backing(&self) -> &Path {
        self.place.backing()
    }

    /// The root key that opens the store.
    pub fn root_key(&self) -> Arc<dyn KeyProvider> {
        self.place.root_key(false)
    }

    pub fn store(&self) -> &Arc<Store<Posix>> {
        &self.store
    }

    /// What locks and unlocks the store that is mounted.
    pub fn keeper(&self, rules: KeyRules) -> Arc<KeyKeeper> {
        let (at, backing) = (self.place.mountpoint(), self.backing().to_owned());
        let keeper = KeyKeeper::new(self.store.clone(), Arc::default(), rules, at, backing);
        keeper.mounted(self.mounted.as_ref().expect("it is mounted").caches());
        keeper
    }

    /// Unmounts as umount(8) would and closes the store.
    pub fn unmount(mut self) -> Place {
        let unmounter = self.mounted.as_ref().expect("it is mounted").unmount_handle();
        // Children that other tests start hold our descriptors between fork and exec.
        let busy = |r: &io::Result<()>| r.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY));
        let mut tried = unmounter.unmount();
        for _ in 0..500 {
            if !busy(&tried) {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
            tried = unmounter.unmount();
        }
        tried.expect("unmount");
        self.mounted.take().expect("as before").wait().expect("the session ends well");
        self.store.close().expect("close");
        let place = std::mem::replace(&mut self.place, Place::new());
        drop(self);
        place
    }

    /// Unmounts and mounts again, so that nothing is cached any more.
    pub fn remount(self) -> Self {
        self.unmount().mount(|_| {})
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let Some(mounted) = self.mounted.take() else { return };
        if let Err(e) = mounted.unmount_handle().detach() {
            eprintln!("could not unmount {}: {e}", mounted.mountpoint().display());
            return;
        }
        // It ends when the last file is closed. A test that failed may hold one; it goes with the process.
        for _ in 0..500 {
            if mounted.is_over() {
                let _ = mounted.wait();
                let _ = self.store.close();
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A test that lacks what it needs fails: a gate that skips proves nothing.
pub fn missing(why: &str) {
    panic!("{why}; the gate runs as root, after make setup");
}

/// Fails the test unless root runs it.
macro_rules! needs_root {
    () => {
        if !super::support::is_root() {
            return super::support::missing("this test needs root");
        }
    };
}
pub(crate) use needs_root;

/// Runs a shell script as user and group `id`, without supplementary groups.
pub fn as_user(id: u32, at: &Path, script: &str) -> Output {
    as_user_in(id, id, at, script)
}

/// Runs a shell script as a user and a group.
pub fn as_user_in(uid: u32, gid: u32, at: &Path, script: &str) -> Output {
    Command::new("/bin/sh").args(["-c", script]).current_dir(at).uid(uid).gid(gid).output().expect("sh runs")
}

/// Runs a shell script; fails the test with what it said if it fails.
pub fn sh(at: &Path, script: &str) -> String {
    let out = Command::new("/bin/sh").args(["-ec", script]).current_dir(at).output().expect("sh runs");
    let (said, err) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{script}: {}\n{said}{err}", out.status);
    said.into_owned()
}

/// The errno of a failed call.
pub fn errno<T>(r: io::Result<T>) -> i32 {
    match r {
        Ok(_) => panic!("the call was to fail"),
        Err(e) => e.raw_os_error().expect("an errno"),
    }
}

/// `len` bytes that look random and are the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend_from_slice(&x.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Opens for reading and writing, making it if it is not there.
pub fn open_rw(path: impl AsRef<Path>) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// Drops the kernel's caches of pages, names and inodes that nobody uses, so that the daemon is asked again. Root only.
/// Not while a test looks at what the kernel keeps: this is about every file system of the machine.
pub fn drop_caches() {
    let _alone = KERNEL_CACHES.write().unwrap_or_else(PoisonError::into_inner);
    rustix::fs::sync();
    let _ = fs::write("/proc/sys/vm/drop_caches", "3");
}

static KERNEL_CACHES: RwLock<()> = RwLock::new(());

/// Until this is dropped, no test has the kernel write out or forget what it keeps.
pub fn caches_stay() -> RwLockReadGuard<'static, ()> {
    KERNEL_CACHES.read().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until the clock that the kernel takes times from has moved on.
pub fn tick() {
    use rustix::time::{ClockId, clock_gettime};
    let start = clock_gettime(ClockId::RealtimeCoarse);
    while clock_gettime(ClockId::RealtimeCoarse) == start {
        std::thread::yield_now();
    }
}
