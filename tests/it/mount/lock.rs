//! `lock` and `unlock` on a real mount: what processes see that have files open, cached and mapped.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use envelopefs::backing::posix::Posix;
use envelopefs::daemon::keys::{KeyKeeper, KeyRules, OnDenied};
use envelopefs::fuse::MountOptions;
use envelopefs::kms::scripted::{Behaviour, Gate, Scripted};
use envelopefs::kms::{KeyProvider, KmsError};
use envelopefs::store::dek_cache::DekCacheLimits;
use envelopefs::store::keys::authority::Policy;
use envelopefs::store::keys::{KekKind, Keys, StoreFlags};
use envelopefs::store::{Store, StoreOptions};
use rustix::mm::{MapFlags, ProtFlags};

use super::support::{Mount, errno, noise, open_rw};
use crate::cli::support::PATIENCE;

const ENOKEY: i32 = libc::ENOKEY;

/// A mount whose kernel caches are written back as the daemon does it.
fn mounted() -> (Mount, Arc<KeyKeeper>) {
    let place = super::support::Place::new();
    place.init();
    let source = place.backing().to_str().unwrap().to_owned();
    let m = place.mount(|o| o.fs_name = source);
    let keeper = m.keeper(KeyRules::default());
    (m, keeper)
}

fn unlock(m: &Mount, k: &KeyKeeper) {
    let done = k.unlock(&[m.root_key()]).unwrap();
    assert_eq!(done.failed, 0);
}

fn read_at(f: &File, at: u64) -> io::Result<Vec<u8>> {
    let mut buf = vec![0; 4096];
    f.read_at(&mut buf, at).map(|n| {
        buf.truncate(n);
        buf
    })
}

#[test]
fn a_locked_store_gives_no_content_and_all_the_rest() {
    let (m, k) = mounted();
    let data = noise(1, 300_000);
    fs::create_dir(m.path("d")).unwrap();
    fs::write(m.path("d/f"), &data).unwrap();
    fs::write(m.path("other"), &data).unwrap();
    fs::write(m.path("empty"), b"").unwrap();
    std::os::unix::fs::symlink("d/f", m.path("l")).unwrap();
    // Cached, all of it, and open.
    let f = open_rw(m.path("d/f"));
    assert!(fs::read(m.path("d/f")).unwrap() == data && fs::read(m.path("other")).unwrap() == data);
    let before = f.metadata().unwrap();
    assert!(k.lock().unwrap());
    assert!(!k.lock().unwrap(), "locked already");

    for name in ["d/f", "other", "empty", "l"] {
        assert_eq!(errno(File::open(m.path(name))), ENOKEY, "{name}");
        assert_eq!(errno(OpenOptions::new().write(true).open(m.path(name))), ENOKEY, "{name}");
    }
    assert_eq!(errno(File::create(m.path("new"))), ENOKEY);
    assert_eq!(errno(fs::write(m.path("d/f"), b"emptied?")), ENOKEY);
    // The page cache is gone: what was in it is not to be had.
    for at in [0, 4096, 200_000] {
        assert_eq!(errno(read_at(&f, at)), ENOKEY, "read at {at}");
    }
    assert_eq!(errno(f.write_at(b"part of a block", 5)), ENOKEY);
    assert_eq!(errno(f.write_at(&[7; 8192], 4096)), ENOKEY, "whole pages, which the kernel need not read first");
    assert_eq!(errno(f.write_at(b"behind the end", 400_000)), ENOKEY);
    assert_eq!(errno(f.set_len(10)), ENOKEY);
    assert_eq!(errno(f.set_len(0)), ENOKEY);
    let now = f.metadata().unwrap();
    let times = |m: &fs::Metadata| (m.modified().unwrap(), m.ctime(), m.ctime_nsec());
    assert_eq!((now.len(), now.ino(), times(&now)), (before.len(), before.ino(), times(&before)));
    assert_eq!(
        errno(rustix::fs::fallocate(&f, rustix::fs::FallocateFlags::empty(), 0, 1 << 20).map_err(Into::into)),
        ENOKEY
    );
    f.sync_all().expect("nothing is dirty");
    f.sync_data().expect("nothing is dirty");

    // (A refused fallocate moves the times: the kernel does that before it asks.)
    assert_eq!(f.metadata().unwrap().len(), before.len());
    assert_eq!(fs::metadata(m.path("other")).unwrap().len(), 300_000);
    // A stat makes attributes known again; that must not let a write through.
    assert_eq!(errno(f.write_at(&[7; 8192], 4096)), ENOKEY);
    let mut names: Vec<_> =
        fs::read_dir(m.path("")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["d", "empty", "l", "other"]);
    assert_eq!(fs::read_link(m.path("l")).unwrap(), Path::new("d/f"));
    fs::rename(m.path("d/f"), m.path("d/g")).unwrap();
    fs::hard_link(m.path("d/g"), m.path("h")).unwrap();
    fs::remove_file(m.path("empty")).unwrap();
    fs::create_dir(m.path("d/e")).unwrap();
    fs::set_permissions(m.path("other"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    rustix::fs::statvfs(m.path("")).unwrap();
    assert!(m.store().shared().deks.stats().entries == 0);

    unlock(&m, &k);
    assert!(read_at(&f, 4096).unwrap() == data[4096..8192], "without opening it again");
    f.write_at(b"after", 10).unwrap();
    f.sync_all().unwrap();
    assert_eq!(&fs::read(m.path("h")).unwrap()[10..15], b"after");
    assert!(fs::read(m.path("other")).unwrap() == data);
    drop(f);
    let m = m.remount();
    assert_eq!(&fs::read(m.path("d/g")).unwrap()[10..15], b"after");
}

/// Without the kernel's writeback cache every write reaches the daemon.
#[test]
fn a_locked_store_takes_no_write_without_the_writeback_cache_either() {
    let m = Mount::with(|o| o.writeback = false);
    let k = m.keeper(KeyRules::default());
    let f = open_rw(m.path("f"));
    f.write_at(&noise(1, 10_000), 0).unwrap();
    k.lock().unwrap();
    assert_eq!(errno(f.write_at(b"x", 0)), ENOKEY);
    assert_eq!(errno(read_at(&f, 0)), ENOKEY);
    unlock(&m, &k);
    f.write_at(b"x", 0).unwrap();
    assert!(read_at(&f, 4096).unwrap() == noise(1, 10_000)[4096..8192]);
}

#[test]
fn what_was_written_before_a_lock_is_written_back_and_closed_cleanly() {
    let (m, k) = mounted();
    let data = noise(3, 3 << 20);
    let f = open_rw(m.path("f"));
    f.write_at(&data, 0).unwrap();
    let new = open_rw(m.path("new"));
    new.write_at(b"its first byte makes a header", 0).unwrap();
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(m.path("f")).unwrap();
    k.lock().unwrap();
    assert_eq!(errno(read_at(&direct, 0)), ENOKEY);
    f.sync_all().expect("all of it was written back");
    new.sync_all().expect("all of it was written back");
    // As if the daemon had been killed now: another opens what lies there.
    let root = m.root_key();
    let b = Posix::open(m.backing()).unwrap();
    let keys = Keys::open(&b, &[root]).unwrap();
    let options = envelopefs::store::check::CheckOptions { deep: true };
    struct Quiet;
    impl envelopefs::store::check::CheckProgress for Quiet {
        fn update(&self, _: &envelopefs::store::check::CheckCounts) {}
    }
    let report = envelopefs::store::check::run(&b, Some(&keys), &options, &Quiet).unwrap();
    assert!(report.is_clean() && report.notes == 0, "{report:?}");
    drop((f, new, direct));
    // Unmounts while locked, and nothing is missing.
    let m = m.remount();
    assert!(fs::read(m.path("f")).unwrap() == data);
    assert_eq!(fs::read(m.path("new")).unwrap(), b"its first byte makes a header");
}

/// A page of `f` mapped shared.
struct Mapped(*mut u8, usize);

impl Mapped {
    fn new(f: &File, len: usize) -> Self {
        // SAFETY: a new mapping of a file that lives as long as the test.
        let p = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, f, 0)
        };
        Self(p.unwrap().cast(), len)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped above, and nobody uses it any more.
        let _ = unsafe { rustix::mm::munmap(self.0.cast(), self.1) };
    }
}

/// How a child process ends that touches the mapping at `at`.
fn child_touches(map: &Mapped, at: usize, write: bool) -> i32 {
    // SAFETY: the child touches one byte and ends, calling nothing that could wait for a lock of this process.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0);
        if pid == 0 {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            let p = map.0.add(at);
            if write {
                p.write_volatile(1);
            } else {
                let _ = p.read_volatile();
            }
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
        if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) } else { 0 }
    }
}

#[test]
fn mapped_pages_are_gone_and_come_back() {
    let (m, k) = mounted();
    let data = noise(5, 40_000);
    fs::write(m.path("f"), &data).unwrap();
    let f = open_rw(m.path("f"));
    let map = Mapped::new(&f, 40_000);
    // SAFETY: inside the mapping, whose file is readable now.
    unsafe {
        assert_eq!(map.0.add(5000).read_volatile(), data[5000]);
        map.0.add(9000).write_volatile(0xAB);
    }
    assert_eq!((child_touches(&map, 5000, false), child_touches(&map, 9000, true)), (0, 0));
    k.lock().unwrap();
    for (at, write) in [(5000, false), (9000, true), (30_000, false)] {
        assert_eq!(child_touches(&map, at, write), libc::SIGBUS, "at {at}");
    }
    f.sync_all().expect("the page that was dirty was written back before");
    unlock(&m, &k);
    // SAFETY: as above, and the file is readable again.
    unsafe {
        assert_eq!(map.0.add(5000).read_volatile(), data[5000]);
        assert_eq!(map.0.add(9000).read_volatile(), 1, "what the child wrote last");
    }
}

/// Writers all the while: what an fsync acknowledged is there, no wrong bytes are read, nothing waits for ever.
#[test]
fn locking_fifty_times_among_writers_loses_nothing_acknowledged() {
    const WRITERS: u64 = 4;
    let (m, k) = mounted();
    let stop = AtomicBool::new(false);
    let acknowledged: Vec<AtomicU64> = (0..WRITERS).map(|_| AtomicU64::new(0)).collect();
    let refused = AtomicU64::new(0);
    let may_fail = |e: &io::Error| {
        assert!(matches!(e.raw_os_error(), Some(ENOKEY | libc::EIO)), "{e}");
        refused.fetch_add(1, Ordering::Relaxed);
    };
    std::thread::scope(|s| {
        for w in 0..WRITERS {
            let first = open_rw(m.path(format!("w{w}")));
            let (m, stop, acknowledged, may_fail) = (&m, &stop, &acknowledged, &may_fail);
            s.spawn(move || {
                // Each block holds the number of the round that wrote it, 512 times.
                let block = |n: u64| n.to_le_bytes().repeat(512);
                let mut f = first;
                for n in 1u64.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let wrote =
                        (0..8).try_for_each(|i| f.write_all_at(&block(n), i * 4096)).and_then(|()| f.sync_data());
                    match wrote {
                        Ok(()) => acknowledged[w as usize].store(n, Ordering::Relaxed),
                        Err(e) => may_fail(&e),
                    }
                    if n % 7 == 0 {
                        // Open it anew, as often as the lock lets us.
                        match OpenOptions::new().read(true).write(true).open(m.path(format!("w{w}"))) {
                            Ok(new) => f = new,
                            Err(e) => may_fail(&e),
                        }
                    }
                    // Another file, made and removed.
                    let name = m.path(format!("t{w}"));
                    match File::create(&name).and_then(|mut t| t.write_all(&block(n))) {
                        Ok(()) => fs::remove_file(&name).unwrap(),
                        Err(e) => {
                            may_fail(&e);
                            let _ = fs::remove_file(&name);
                        }
                    }
                    match read_at(&f, 4096) {
                        Ok(b) if b.is_empty() => {}
                        Ok(b) => {
                            let n = u64::from_le_bytes(b[..8].try_into().unwrap());
                            assert!(b == block(n), "a block of two rounds, or of none");
                        }
                        Err(e) => may_fail(&e),
                    }
                }
            });
        }
        /// Also if the test fails: the writers must end.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _stop = Stop(&stop);
        // On a slow machine it may take more rounds, and longer ones, until each writer has met an unlocked store.
        let end = Instant::now() + PATIENCE;
        let met = || refused.load(Ordering::Relaxed) > 0 && acknowledged.iter().all(|a| a.load(Ordering::Relaxed) > 0);
        for i in (0u64..).take_while(|i| *i < 50 || (!met() && Instant::now() < end)) {
            std::thread::sleep(Duration::from_millis(5 + i % 7 * 5 + i.saturating_sub(50) * 10));
            assert!(k.lock().unwrap());
            assert_eq!(errno(File::open(m.path("w0"))), ENOKEY);
            unlock(&m, &k);
        }
    });
    assert!(refused.load(Ordering::Relaxed) > 0, "no lock met a writer");
    let m = m.remount();
    for w in 0..WRITERS {
        let last = acknowledged[w as usize].load(Ordering::Relaxed);
        let got = fs::read(m.path(format!("w{w}"))).unwrap();
        assert!(last > 0 && got.len() == 8 * 4096, "{last} {}", got.len());
        for b in got.chunks(4096) {
            let n = u64::from_le_bytes(b[..8].try_into().unwrap());
            assert!(n >= last && b == n.to_le_bytes().repeat(512), "block of round {n}, acknowledged {last}");
        }
    }
}

/// A large write(2) that is under way while the keys are locked may come too late. It is whole, or somebody is told.
#[test]
fn a_write_that_a_lock_overtakes_is_whole_or_told_of() {
    let (m, k) = mounted();
    let data = noise(9, 64 << 20);
    for i in 0..10 {
        let f = open_rw(m.path("f"));
        f.set_len(0).unwrap();
        let wrote = std::thread::scope(|s| {
            let writer = s.spawn(|| f.write_all_at(&data, 0));
            std::thread::sleep(Duration::from_millis(i * 3));
            k.lock().unwrap();
            writer.join().unwrap()
        });
        let synced = f.sync_all();
        unlock(&m, &k);
        match (wrote, synced) {
            (Ok(()), Ok(())) => {
                drop(f);
                let mut back = Vec::new();
                let mut f = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(m.path("f")).unwrap();
                f.seek(SeekFrom::Start(0)).unwrap();
                f.read_to_end(&mut back).unwrap();
                assert!(back == data, "acknowledged, and not there");
            }
            (Err(e), _) | (_, Err(e)) => {
                assert!(matches!(e.raw_os_error(), Some(ENOKEY | libc::EIO)), "{e}");
            }
        }
    }
}

/// A store whose KEK is a key in a service, mounted with two threads.
struct Hanging {
    service: Arc<Scripted>,
    mounted: Option<envelopefs::fuse::Mounted>,
    store: Arc<Store<Posix>>,
    dir: tempfile::TempDir,
}

impl Hanging {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("envelopefs-it-").tempdir().unwrap();
        for name in ["back", "mnt"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let service = Scripted::new("s");
        let root: [Arc<dyn KeyProvider>; 1] = [service.clone()];
        let b = Posix::open(dir.path().join("back")).unwrap();
        Store::init(&b, &root, KekKind::External, StoreFlags::default()).unwrap();
        let keys = Keys::open(&b, &root).unwrap();
        // So that every open is a call.
        let deks = DekCacheLimits { entries: 0, ..DekCacheLimits::default() };
        let store = Store::open(b, keys, StoreOptions { deks, ..StoreOptions::default() }).unwrap();
        let mut o = MountOptions::new(dir.path().join("mnt"));
        o.threads = Some(2);
        let mounted = envelopefs::fuse::mount(store.clone(), &o).unwrap();
        Self { service, mounted: Some(mounted), store, dir }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join("mnt").join(name)
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        let Some(m) = self.mounted.take() else { return };
        if m.unmount_handle().detach().is_ok() && !std::thread::panicking() {
            m.wait().unwrap();
            self.store.close().unwrap();
        }
    }
}

/// Opens the gate also if the test fails, or its threads would wait for ever.
struct Opens(Arc<Gate>);

impl Drop for Opens {
    fn drop(&mut self) {
        self.0.open();
    }
}

#[test]
fn a_service_that_hangs_holds_up_only_who_needs_it() {
    const WAITING: usize = 10;
    let h = Hanging::new();
    for i in 0..WAITING {
        fs::write(h.path(&format!("cold{i}")), noise(i as u64, 10_000)).unwrap();
    }
    let warm = open_rw(h.path("warm"));
    warm.write_at(&noise(77, 100_000), 0).unwrap();
    warm.sync_all().unwrap();
    let gate = Gate::new();
    h.service.always(Behaviour::Hold(gate.clone()));
    std::thread::scope(|s| {
        let _opens = Opens(gate.clone());
        let (h, warm) = (&h, &warm);
        let opens: Vec<_> =
            (0..WAITING).map(|i| s.spawn(move || fs::read(h.path(&format!("cold{i}"))).unwrap())).collect();
        let makes: Vec<_> = (0..WAITING)
            .map(|i| {
                s.spawn(move || {
                    let f = File::create(h.path(&format!("new{i}"))).unwrap();
                    f.write_at(b"its first byte needs a wrap", 0).unwrap();
                    f.sync_all().unwrap();
                })
            })
            .collect();
        // All of them wait for the service, many more than there are threads to serve the mount.
        gate.wait_for(2 * WAITING);
        assert_eq!(fs::metadata(h.path("cold3")).unwrap().len(), 10_000);
        assert_eq!(fs::read_dir(h.path("")).unwrap().count(), 2 * WAITING + 1);
        fs::create_dir(h.path("d")).unwrap();
        fs::rename(h.path("cold3"), h.path("d/moved")).unwrap();
        fs::hard_link(h.path("d/moved"), h.path("cold3")).unwrap();
        fs::remove_file(h.path("d/moved")).unwrap();
        rustix::fs::statvfs(h.path("")).unwrap();
        let mut buf = vec![0; 50_000];
        warm.read_exact_at(&mut buf, 1000).unwrap();
        assert!(buf == noise(77, 100_000)[1000..51_000]);
        warm.write_at(b"goes on", 200_000).unwrap();
        warm.sync_all().unwrap();
        gate.open();
        for (i, o) in opens.into_iter().enumerate() {
            assert!(o.join().unwrap() == noise(i as u64, 10_000));
        }
        makes.into_iter().for_each(|m| m.join().unwrap());
    });
    h.service.always(Behaviour::Obey);
    assert_eq!(fs::read(h.path("new3")).unwrap(), b"its first byte needs a wrap");
}

/// The daemon's part: what a refusal does to open files, by the rule that was chosen.
#[test]
fn a_refusal_leaves_open_files_or_drops_them_and_is_lifted_by_itself() {
    for on_denied in [OnDenied::Keep, OnDenied::Drop] {
        let h = Hanging::new();
        let f = open_rw(h.path("open"));
        f.write_at(&noise(1, 10_000), 0).unwrap();
        // Its first byte needs a wrap by the service, which must not come after the refusal.
        f.sync_all().unwrap();
        fs::write(h.path("cold"), b"cold").unwrap();
        let hour = Duration::from_secs(3600);
        let rules = KeyRules { policy: Policy { refresh: hour, offline_grace: hour }, on_denied };
        let k = KeyKeeper::new(h.store.clone(), Arc::default(), rules, h.path(""), h.dir.path().join("back"));
        k.mounted(h.mounted.as_ref().unwrap().caches());
        h.service.always(Behaviour::Fail(KmsError::Denied("no".into())));
        k.refresh();
        let held = read_at(&f, 4096);
        match on_denied {
            OnDenied::Keep => {
                assert_eq!(errno(File::open(h.path("cold"))), libc::EKEYREJECTED);
                assert_eq!(errno(File::create(h.path("new"))), libc::EKEYREJECTED);
                assert!(held.unwrap() == noise(1, 10_000)[4096..8192]);
                f.write_at(b"on", 0).unwrap();
                f.sync_all().unwrap();
            }
            OnDenied::Drop => {
                assert_eq!(errno(held), ENOKEY);
                assert_eq!(errno(File::open(h.path("cold"))), ENOKEY);
            }
        }
        assert!(k.status().dropped == (on_denied == OnDenied::Drop));
        h.service.always(Behaviour::Obey);
        k.refresh();
        assert_eq!(fs::read(h.path("cold")).unwrap(), b"cold");
        assert!(read_at(&f, 4096).unwrap() == noise(1, 10_000)[4096..8192]);
        drop(f);
    }
}
