//! The volume lock: one process at a time has a store, through flock(2) on `.envelopefs/lock`; or several, which have agreed
//! on who does what (the shards of a rotation, see [`super::shard_lock`]), share it.
//!
//! The kernel drops the lock when the process ends, however it ends, so there is no stale lock. What the file holds (who
//! has it) is for people only and is never trusted.

use super::fault::{Fault, FaultKind};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

/// How often, and how long each time, a taker waits for somebody who only looks: [`VolumeLock::is_taken`] holds the lock
/// for microseconds.
const LOOKS: u32 = 5;
const LOOK: Duration = Duration::from_millis(20);
/// The same for somebody who looks himself.
const GLANCES: u32 = 3;
const GLANCE: Duration = Duration::from_millis(1);

/// A held lock; dropping it lets the store go.
#[derive(Debug)]
pub struct VolumeLock {
    _file: File,
}

impl VolumeLock {
    /// Takes the lock of the store at `backing`, for `purpose` ("mount", "rotate", …).
    ///
    /// # Errors
    /// [`FaultKind::Locked`] if another process has it; [`FaultKind::NotAStore`] if there is no `.envelopefs`.
    pub fn take(backing: &Path, purpose: &str) -> Result<Self, Fault> {
        Self::hold(backing, purpose, FlockOperation::NonBlockingLockExclusive)
    }

    /// Takes the lock together with others who share it.
    ///
    /// # Errors
    /// As [`VolumeLock::take`].
    pub fn share(backing: &Path, purpose: &str) -> Result<Self, Fault> {
        Self::hold(backing, purpose, FlockOperation::NonBlockingLockShared)
    }

    fn hold(backing: &Path, purpose: &str, how: FlockOperation) -> Result<Self, Fault> {
        let mut file = open(backing)?;
        let mut tries = 0;
        loop {
            match flock(&file, how) {
                Ok(()) => break,
                // Somebody may only have looked whether it is taken.
                Err(rustix::io::Errno::WOULDBLOCK) if tries < LOOKS => std::thread::sleep(LOOK),
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(locked(backing, &mut file)),
                Err(e) => return Err(Fault::io("lock the store", backing, &e.into())),
            }
            tries += 1;
        }
        // For people; a read-only backing directory has no room for it.
        let _ = file.set_len(0);
        let _ = writeln!(file, "pid {} for {purpose}", std::process::id());
        Ok(Self { _file: file })
    }

    /// Waits until nobody has the lock of the store at `backing`. Returns at once if there is no lock file.
    pub fn wait_free(backing: &Path) {
        if let Ok(f) = open(backing) {
            let _ = flock(&f, FlockOperation::LockShared);
        }
    }

    /// Who the lock file says has the store, or had it last: `pid N for PURPOSE`. A hint, not to be trusted.
    pub fn holder(backing: &Path) -> Option<String> {
        let who = holder(&mut open(backing).ok()?);
        (!who.is_empty()).then_some(who)
    }

    /// Whether some process has the store at `backing` now, alone or with others.
    pub fn is_taken(backing: &Path) -> bool {
        let Ok(file) = open(backing) else { return false };
        for glance in 0..GLANCES {
            // Two who look at once see each other.
            if glance > 0 {
                std::thread::sleep(GLANCE);
            }
            if flock(&file, FlockOperation::NonBlockingLockExclusive) != Err(rustix::io::Errno::WOULDBLOCK) {
                return false;
            }
        }
        true
    }
}

fn open(backing: &Path) -> Result<File, Fault> {
    let path = backing.join(".envelopefs/lock");
    let flags = OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened =
        rustix::fs::open(&path, flags | OFlags::RDWR | OFlags::CREATE, Mode::RUSR | Mode::WUSR).or_else(|e| match e {
            rustix::io::Errno::ROFS => rustix::fs::open(&path, flags | OFlags::RDONLY, Mode::empty()),
            e => Err(e),
        });
    opened.map(File::from).map_err(|e| match e {
        rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR => {
            Fault::new(FaultKind::NotAStore, format!("{} is not an envelopefs store", backing.display()))
        }
        e => Fault::io("open", &path, &e.into()),
    })
}

/// What the file says, cut down to harmless characters; empty if nothing.
fn holder(file: &mut File) -> String {
    let mut who = String::new();
    let _ = file.take(80).read_to_string(&mut who);
    who.trim().chars().filter(|c| c.is_ascii_alphanumeric() || *c == ' ').collect()
}

fn locked(backing: &Path, file: &mut File) -> Fault {
    let who = holder(file);
    let by = if who.is_empty() { "another process".to_string() } else { format!("another process ({who})") };
    Fault::new(FaultKind::Locked, format!("store {} is in use by {by}", backing.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_taker_is_refused_until_the_first_lets_go() {
        let d = tempfile::tempdir().unwrap();
        assert_eq!(VolumeLock::take(d.path(), "mount").unwrap_err().kind, FaultKind::NotAStore);
        std::fs::create_dir(d.path().join(".envelopefs")).unwrap();
        assert!(!VolumeLock::is_taken(d.path()));
        let held = VolumeLock::take(d.path(), "mount").unwrap();
        let e = VolumeLock::take(d.path(), "rotate").unwrap_err();
        assert_eq!(e.kind, FaultKind::Locked);
        assert!(e.message.contains("for mount"), "{}", e.message);
        assert!(VolumeLock::is_taken(d.path()));
        drop(held);
        assert!(!VolumeLock::is_taken(d.path()));
        VolumeLock::wait_free(d.path());
        VolumeLock::take(d.path(), "rotate").unwrap();
    }

    #[test]
    fn those_who_share_keep_out_who_wants_it_alone() {
        let d = tempfile::tempdir().unwrap();
        std::fs::create_dir(d.path().join(".envelopefs")).unwrap();
        let (one, other) = (VolumeLock::share(d.path(), "a").unwrap(), VolumeLock::share(d.path(), "b").unwrap());
        drop(one);
        assert!(VolumeLock::is_taken(d.path()));
        assert_eq!(VolumeLock::take(d.path(), "mount").unwrap_err().kind, FaultKind::Locked);
        drop(other);
        let _alone = VolumeLock::take(d.path(), "mount").unwrap();
        assert_eq!(VolumeLock::share(d.path(), "a").unwrap_err().kind, FaultKind::Locked);
    }

    #[test]
    fn somebody_who_only_looks_keeps_nobody_out() {
        let d = tempfile::tempdir().unwrap();
        std::fs::create_dir(d.path().join(".envelopefs")).unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    VolumeLock::is_taken(d.path());
                }
            });
            for _ in 0..50 {
                VolumeLock::take(d.path(), "mount").unwrap();
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }

    #[test]
    fn a_symbolic_link_in_place_of_the_lock_is_refused() {
        let d = tempfile::tempdir().unwrap();
        std::fs::create_dir(d.path().join(".envelopefs")).unwrap();
        let victim = d.path().join("victim");
        std::fs::write(&victim, "keep").unwrap();
        std::os::unix::fs::symlink(&victim, d.path().join(".envelopefs/lock")).unwrap();
        assert!(VolumeLock::take(d.path(), "mount").is_err());
        assert_eq!(std::fs::read(&victim).unwrap(), b"keep");
    }
}
