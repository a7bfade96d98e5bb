//! Locks of a rotation that several processes share, on machines that share the backing file system.
//!
//! - `.envelopefs/lock` ([`VolumeLock`]), shared: nobody mounts to write, rotates alone or changes root keys meanwhile.
//!   Read-only mounts share it too.
//! - `.envelopefs/rotation/shards`: held shared by every shard that runs, exclusively by whoever changes the keyring for
//!   all: the first shard, which begins the run, and the merge. It says how the files are divided, and by which inode
//!   numbers; one that comes later must divide and see them alike, or two might write the same header.
//! - `.envelopefs/rotation/shard-K-of-N.lock`, exclusively: no share is worked on twice at once.
//!
//! All are flock(2), which ends with the process. Over NFS, Linux makes byte-range locks of them that the server keeps for
//! all machines; CephFS has flock itself. The file system must not be mounted with `nolock` or `local_lock`.

use super::fault::{Fault, FaultKind};
use super::lock::VolumeLock;
use crate::rotation::Shard;
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a shard waits for another one that makes the new KEK active, with what key services take for that.
const BEGINNING_MAX: Duration = Duration::from_secs(120);
/// How long a division that is not ours may stand in the file without being anybody's: whoever wrote it may have ended.
const STALE_MAX: Duration = Duration::from_secs(1);
/// What the file of a share that is locked ends in.
const LOCK: &str = "lock";
/// How often, and how long each time, somebody who only looks is waited for.
const LOOKS: u32 = 3;
const LOOK: Duration = Duration::from_millis(50);

/// The locks of one shard that runs; dropping them lets others begin.
#[derive(Debug)]
pub struct ShardLocks {
    _volume: VolumeLock,
    _division: File,
    _share: File,
}

impl ShardLocks {
    /// Takes the locks of `shard` of the store at `backing`. If no other shard runs, `begin` is called first, while nobody
    /// else can change the keyring; what it returned is returned.
    ///
    /// # Errors
    /// [`FaultKind::Locked`] if somebody else has the store, this share is being worked on, or shards of another division
    /// run; [`FaultKind::NotAStore`]; `begin`'s.
    pub fn take<T>(
        backing: &Path,
        shard: Shard,
        begin: impl FnOnce() -> Result<T, Fault>,
    ) -> Result<(Self, Option<T>), Fault> {
        let volume = VolumeLock::share(backing, &format!("rotate shard {} of {}", shard.number(), shard.of()))?;
        let folder = make_folder(backing)?;
        let share = open(&share_path(&folder, shard))?;
        let mut looks = 0;
        while !try_lock(&share, FlockOperation::NonBlockingLockExclusive, backing)? {
            looks += 1;
            // A merge that is refused only looks who is at work.
            if looks < LOOKS {
                std::thread::sleep(LOOK);
                continue;
            }
            let text = format!("share {shard} of store {} is being worked on by another process", backing.display());
            return Err(Fault::new(FaultKind::Locked, text));
        }
        let mut division = open(&folder.join("shards"))?;
        let ours = division_of(backing, shard)?;
        let (began, mut other_since) = (Instant::now(), None);
        let begun = loop {
            if try_lock(&division, FlockOperation::NonBlockingLockExclusive, backing)? {
                let begun = begin()?;
                write(&mut division, &ours).map_err(|e| Fault::io("write", &folder.join("shards"), &e))?;
                // The kernel may let somebody else in between; the text is looked at again below.
                if try_lock(&division, FlockOperation::LockShared, backing)? && read(&mut division) == ours {
                    break Some(begun);
                }
                return Err(others(backing, &read(&mut division)));
            }
            if try_lock(&division, FlockOperation::NonBlockingLockShared, backing)? {
                let theirs = read(&mut division);
                if theirs == ours {
                    break None;
                }
                let since = *other_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= STALE_MAX {
                    return Err(others(backing, &theirs));
                }
                let _ = flock(&division, FlockOperation::Unlock);
            }
            if began.elapsed() >= BEGINNING_MAX {
                let text = format!("store {}: another process is beginning or merging the rotation", backing.display());
                return Err(Fault::new(FaultKind::Locked, text));
            }
            std::thread::sleep(LOOK);
        };
        Ok((Self { _volume: volume, _division: division, _share: share }, begun))
    }
}

/// The locks of a merge: no shard runs, and nobody else has the store.
#[derive(Debug)]
pub struct MergeLocks {
    _volume: VolumeLock,
    _division: File,
}

impl MergeLocks {
    /// Takes them.
    ///
    /// # Errors
    /// [`FaultKind::Locked`] if somebody else has the store, or shards run; [`FaultKind::NotAStore`].
    pub fn take(backing: &Path) -> Result<Self, Fault> {
        let volume = VolumeLock::share(backing, "rotate merge")?;
        let folder = make_folder(backing)?;
        let division = open(&folder.join("shards"))?;
        if !try_lock(&division, FlockOperation::NonBlockingLockExclusive, backing)? {
            let text = format!("store {}: {} at work: merge when they are done", backing.display(), running(&folder));
            return Err(Fault::new(FaultKind::Locked, text));
        }
        Ok(Self { _volume: volume, _division: division })
    }
}

/// The shards of the store at `backing` that run now, as far as their locks tell.
pub fn at_work(backing: &Path) -> Vec<Shard> {
    at_work_in(&folder_of(backing))
}

fn at_work_in(folder: &Path) -> Vec<Shard> {
    let flags = OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::RDONLY;
    let taken = |s: &Shard| {
        rustix::fs::open(share_path(folder, *s), flags, Mode::empty())
            .is_ok_and(|f| flock(&f, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK))
    };
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let shards = entries.filter_map(|e| Shard::of_file(e.file_name().as_encoded_bytes(), LOCK));
    let mut found: Vec<Shard> = shards.filter(taken).collect();
    found.sort();
    found
}

/// The same in words.
fn running(folder: &Path) -> String {
    let at_work: Vec<String> = at_work_in(folder).iter().map(Shard::to_string).collect();
    match at_work.is_empty() {
        true => "shards are".to_owned(),
        false => format!("shards {} are", at_work.join(", ")),
    }
}

fn share_path(folder: &Path, shard: Shard) -> PathBuf {
    folder.join(shard.file_name(LOCK))
}

/// What the file says of a division: its rule, of how many shares, and what number an inode has that all can see.
fn division_of(backing: &Path, shard: Shard) -> Result<String, Fault> {
    let own = backing.join(".envelopefs");
    let inode = std::fs::metadata(&own).map_err(|e| Fault::io("look at", &own, &e))?.ino();
    Ok(format!("envelopefs shards 1\nof {}\ninode {inode}\n", shard.of()))
}

fn others(backing: &Path, theirs: &str) -> Fault {
    let of = theirs.lines().find_map(|l| l.strip_prefix("of ")).filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
    let text = format!(
        "store {}: shards of another division run ({} of them, or on a machine that sees other inode numbers)",
        backing.display(),
        of.unwrap_or("some")
    );
    Fault::new(FaultKind::Locked, text)
}

fn folder_of(backing: &Path) -> PathBuf {
    backing.join(".envelopefs/rotation")
}

fn make_folder(backing: &Path) -> Result<PathBuf, Fault> {
    let folder = folder_of(backing);
    match std::fs::DirBuilder::new().mode(0o700).create(&folder) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(Fault::io("make", &folder, &e)),
        _ => Ok(folder),
    }
}

fn open(path: &Path) -> Result<File, Fault> {
    let flags = OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::RDWR | OFlags::CREATE;
    rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
        .map(File::from)
        .map_err(|e| Fault::io("open", path, &e.into()))
}

fn try_lock(file: &File, how: FlockOperation, backing: &Path) -> Result<bool, Fault> {
    match flock(file, how) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(Fault::io("lock the rotation of", backing, &e.into())),
    }
}

fn write(file: &mut File, text: &str) -> std::io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

fn read(file: &mut File) -> String {
    let mut text = String::new();
    let _ = file.rewind();
    let _ = file.take(256).read_to_string(&mut text);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> tempfile::TempDir {
        let d = tempfile::tempdir().unwrap();
        std::fs::create_dir(d.path().join(".envelopefs")).unwrap();
        d
    }

    fn shard(text: &str) -> Shard {
        text.parse().unwrap()
    }

    fn take(d: &tempfile::TempDir, s: &str) -> Result<(ShardLocks, Option<()>), Fault> {
        ShardLocks::take(d.path(), shard(s), || Ok(()))
    }

    fn refused<T: std::fmt::Debug>(r: Result<T, Fault>, says: &str) {
        let f = r.unwrap_err();
        assert!(f.kind == FaultKind::Locked && f.message.contains(says), "{f:?}");
    }

    #[test]
    fn the_first_shard_begins_and_the_others_join() {
        let d = store();
        let (first, begun) = take(&d, "1/3").unwrap();
        assert_eq!(begun, Some(()));
        let (second, begun) = take(&d, "2/3").unwrap();
        assert_eq!(begun, None);
        refused(take(&d, "2/3"), "share 2/3 of store");
        refused(take(&d, "1/4"), "another division run (3 of them");
        refused(MergeLocks::take(d.path()), "shards 1/3, 2/3 are at work");
        refused(VolumeLock::take(d.path(), "mount"), "shards of a rotation (the last to come: pid");
        assert_eq!(at_work(d.path()), ["1/3", "2/3"].map(shard));
        assert!(VolumeLock::is_taken(d.path()));
        drop(first);
        refused(MergeLocks::take(d.path()), "shards 2/3 are at work");
        drop(second);
        let merging = MergeLocks::take(d.path()).unwrap();
        refused(VolumeLock::take(d.path(), "mount"), "is in use");
        drop(merging);
        assert_eq!(at_work(d.path()), []);
        // What the last division was binds nobody.
        assert_eq!(take(&d, "1/4").unwrap().1, Some(()));
        assert!(!VolumeLock::is_taken(d.path()));
    }

    #[test]
    fn a_look_at_who_is_at_work_does_not_wait_for_what_lies_in_place_of_a_lock() {
        let d = store();
        make_folder(d.path()).unwrap();
        let at = share_path(&folder_of(d.path()), shard("1/2"));
        rustix::fs::mknodat(rustix::fs::CWD, &at, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert_eq!(at_work(d.path()), []);
    }

    #[test]
    fn a_store_that_somebody_has_is_refused() {
        let d = store();
        let held = VolumeLock::take(d.path(), "mount").unwrap();
        refused(take(&d, "1/2"), "for mount");
        refused(MergeLocks::take(d.path()), "for mount");
        drop(held);
        take(&d, "1/2").unwrap();
    }

    #[test]
    fn read_only_mounts_shards_and_a_merge_have_the_store_together() {
        let d = store();
        let (one, other) =
            (VolumeLock::share(d.path(), "mount").unwrap(), VolumeLock::share(d.path(), "mount").unwrap());
        let shards = (take(&d, "1/2").unwrap(), take(&d, "2/2").unwrap());
        refused(VolumeLock::take(d.path(), "rotate"), "is in use by read-only mounts or shards");
        drop(shards);
        let merging = MergeLocks::take(d.path()).unwrap();
        // Whoever comes while the others are there.
        let late = VolumeLock::share(d.path(), "mount").unwrap();
        drop((one, other, merging));
        refused(VolumeLock::take(d.path(), "mount"), "is in use by read-only mounts or shards");
        take(&d, "1/2").unwrap();
        drop(late);
        VolumeLock::take(d.path(), "mount").unwrap();
    }

    #[test]
    fn a_machine_that_sees_other_inode_numbers_is_refused() {
        let d = store();
        let _first = take(&d, "1/2").unwrap();
        std::fs::write(d.path().join(".envelopefs/rotation/shards"), "envelopefs shards 1\nof 2\ninode 1\n").unwrap();
        refused(take(&d, "2/2"), "sees other inode numbers");
    }

    #[test]
    fn a_beginning_that_fails_lets_the_next_one_begin() {
        let d = store();
        let no = ShardLocks::take(d.path(), shard("1/2"), || Err::<(), _>(Fault::new(FaultKind::Denied, "no")));
        assert_eq!(no.unwrap_err().kind, FaultKind::Denied);
        assert_eq!(take(&d, "2/2").unwrap().1, Some(()));
    }

    #[test]
    fn only_one_of_many_begins() {
        let d = store();
        let (begun, all) = (std::sync::atomic::AtomicU32::new(0), std::sync::Barrier::new(8));
        std::thread::scope(|s| {
            for n in 1..=8 {
                let (d, begun, all) = (&d, &begun, &all);
                s.spawn(move || {
                    let held = ShardLocks::take(d.path(), Shard::new(n, 8).unwrap(), || Ok(())).unwrap();
                    begun.fetch_add(u32::from(held.1.is_some()), std::sync::atomic::Ordering::Relaxed);
                    // Nobody lets go before all have come.
                    all.wait();
                });
            }
        });
        assert_eq!(begun.into_inner(), 1);
    }
}
