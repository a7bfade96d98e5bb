//! The volume lock: one process at a time has a store, through flock(2) on `.envelopefs/lock`; or several share it, which
//! have agreed on who does what: read-only mounts, which write nothing, and the shards of a rotation (see
//! [`super::shard_lock`]). Whoever changes anything else takes it alone.
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

/// Whether somebody has a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    No,
    /// By read-only mounts, shards of a rotation, or both.
    Shared,
    Alone,
}

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

    /// Waits until nobody has the store at `backing` alone: those who share it have nothing that they must write before they
    /// go. Returns at once if there is no lock file.
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
        Self::taken(backing) != Taken::No
    }

    /// Who has the store at `backing` now.
    pub fn taken(backing: &Path) -> Taken {
        let Ok(file) = open(backing) else { return Taken::No };
        let mut seen = Taken::No;
        for glance in 0..GLANCES {
            // Two who look at once see each other.
            if glance > 0 {
                std::thread::sleep(GLANCE);
            }
            seen = look(&file);
            if seen == Taken::No {
                break;
            }
        }
        seen
    }
}

/// What can be told from trying the lock of `file`, which holds none.
fn look(file: &File) -> Taken {
    let refuses = |how| flock(file, how) == Err(rustix::io::Errno::WOULDBLOCK);
    match (refuses(FlockOperation::NonBlockingLockExclusive), refuses(FlockOperation::NonBlockingLockShared)) {
        (false, _) => Taken::No,
        (true, false) => Taken::Shared,
        (true, true) => Taken::Alone,
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
    let shown = backing.display();
    let text = match (look(file), who.is_empty()) {
        (Taken::Shared, true) => format!("store {shown} is in use by read-only mounts or shards of a rotation"),
        (Taken::Shared, false) => {
            format!("store {shown} is in use by read-only mounts or shards of a rotation (the last to come: {who})")
        }
        (_, true) => format!("store {shown} is in use by another process"),
        (_, false) => format!("store {shown} is in use by another process ({who})"),
    };
    Fault::new(FaultKind::Locked, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_taker_is_refused_until_the_first_lets_go() {
        let d = tempfile::tempdir().unwrap();
        assert_eq!(VolumeLock::take(d.path(), "mount").unwrap_err().kind, FaultKind::NotAStore);
        std::fs::create_dir(d.path().join(".envelopefs")).unwrap();
        assert_eq!(VolumeLock::taken(d.path()), Taken::No);
        let held = VolumeLock::take(d.path(), "mount").unwrap();
        assert_eq!(VolumeLock::taken(d.path()), Taken::Alone);
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
        assert_eq!(VolumeLock::taken(d.path()), Taken::Shared);
        // They are not waited for: nothing that they leave is still to be written.
        VolumeLock::wait_free(d.path());
        let refused = VolumeLock::take(d.path(), "mount").unwrap_err();
        assert_eq!(refused.kind, FaultKind::Locked);
        assert!(refused.message.contains("shards of a rotation (the last to come: pid "), "{}", refused.message);
        assert_eq!(VolumeLock::taken(d.path()), Taken::Shared, "whoever was refused keeps nothing");
        drop(other);
        let _alone = VolumeLock::take(d.path(), "mount").unwrap();
        let refused = VolumeLock::share(d.path(), "a").unwrap_err();
        assert_eq!(refused.kind, FaultKind::Locked);
        assert!(refused.message.contains("is in use by another process (pid "), "{}", refused.message);
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
