//! The kernel features that are negotiated, each by what it changes: how often and how the daemon is asked.
//!
//! What reaches the daemon is counted by what reaches the backing file: `/proc/self/io` would count everything, so the
//! backing directory's own times and the store's behaviour are looked at instead.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::support::{Mount, caches_stay, drop_caches, needs_root, noise, open_rw};

/// The only regular file in the backing directory's root that is not the store's own.
fn backing_file(m: &Mount) -> PathBuf {
    let mut found: Vec<_> = fs::read_dir(m.backing())
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.is_file() && !p.file_name().unwrap().to_str().unwrap().starts_with(".envelopefs"))
        .collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found.pop().unwrap()
}

fn size(p: &Path) -> u64 {
    fs::metadata(p).unwrap().len()
}

#[test]
fn with_the_writeback_cache_small_writes_wait_for_each_other() {
    let _stay = caches_stay();
    let m = Mount::new();
    let mut f = OpenOptions::new().append(true).create(true).open(m.path("f")).unwrap();
    for i in 0..1000u32 {
        f.write_all(&i.to_le_bytes()).unwrap();
    }
    assert_eq!(size(&backing_file(&m)), 0, "the writes reached the daemon one by one");
    assert_eq!(f.metadata().unwrap().len(), 4000);
    f.sync_all().unwrap();
    assert!(size(&backing_file(&m)) > 4000);
    drop(f);
    let want: Vec<u8> = (0..1000u32).flat_map(u32::to_le_bytes).collect();
    assert_eq!(fs::read(m.remount().path("f")).unwrap(), want);
}

#[test]
fn without_the_writeback_cache_every_write_arrives_at_once() {
    let m = Mount::with(|o| o.writeback = false);
    let mut f = OpenOptions::new().append(true).create(true).open(m.path("f")).unwrap();
    f.write_all(b"now").unwrap();
    assert!(size(&backing_file(&m)) > 0);
    f.write_all(b"then").unwrap();
    assert_eq!(fs::read(m.path("f")).unwrap(), b"nowthen");
    // Times are ours then, and right.
    let seen = f.metadata().unwrap().modified().unwrap();
    drop(f);
    let m = m.unmount().mount(|o| o.writeback = false);
    assert_eq!(fs::metadata(m.path("f")).unwrap().modified().unwrap(), seen);
}

#[test]
fn pages_stay_cached_from_one_open_to_the_next() {
    let _stay = caches_stay();
    let m = Mount::new();
    fs::write(m.path("f"), noise(1, 100_000)).unwrap();
    let m = m.remount();
    assert!(fs::read(m.path("f")).unwrap() == noise(1, 100_000));
    // Damage below is not seen while the kernel has the pages.
    let below = OpenOptions::new().write(true).open(backing_file(&m)).unwrap();
    below.write_all_at(&[0xff; 4096], 4096).unwrap();
    assert!(fs::read(m.path("f")).unwrap() == noise(1, 100_000), "FOPEN_KEEP_CACHE");
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(m.path("f")).unwrap();
    let failed = direct.read_at(&mut [0; 4096], 0).unwrap_err();
    assert_eq!(failed.raw_os_error(), Some(libc::EIO));
}

#[test]
fn a_damaged_block_is_eio_and_the_others_stay_readable() {
    let m = Mount::new();
    fs::write(m.path("f"), noise(2, 400_000)).unwrap();
    let m = m.remount();
    let below = OpenOptions::new().read(true).write(true).open(backing_file(&m)).unwrap();
    // Block 10 of segment 0 lies in page 11.
    let mut byte = [0];
    below.read_exact_at(&mut byte, 11 * 4096 + 7).unwrap();
    below.write_all_at(&[byte[0] ^ 1], 11 * 4096 + 7).unwrap();
    let f = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(m.path("f")).unwrap();
    let mut buf = vec![0; 4096];
    for block in [0u64, 9, 11, 50, 90] {
        f.read_exact_at(&mut buf, block * 4096).unwrap();
        assert!(buf == noise(2, 400_000)[block as usize * 4096..][..4096]);
    }
    assert_eq!(f.read_at(&mut buf, 10 * 4096).unwrap_err().raw_os_error(), Some(libc::EIO));
}

#[test]
fn names_that_are_not_there_are_remembered_until_they_are_made() {
    let m = Mount::new();
    for _ in 0..3 {
        assert!(!m.path("later").exists());
    }
    fs::write(m.path("later"), "x").unwrap();
    assert!(m.path("later").exists());
    fs::rename(m.path("later"), m.path("moved")).unwrap();
    assert!(!m.path("later").exists() && m.path("moved").exists());
    fs::hard_link(m.path("moved"), m.path("later")).unwrap();
    assert!(m.path("later").exists());
    fs::remove_file(m.path("later")).unwrap();
    assert!(!m.path("later").exists());
    fs::create_dir(m.path("later")).unwrap();
    assert!(m.path("later").is_dir());
}

#[test]
fn inodes_that_the_kernel_forgets_are_found_again_as_the_same() {
    needs_root!();
    let m = Mount::new();
    fs::create_dir_all(m.path("a/b")).unwrap();
    for i in 0..100 {
        fs::write(m.path(format!("a/b/{i}")), noise(i, 1000)).unwrap();
    }
    let inos: Vec<_> = (0..100).map(|i| fs::metadata(m.path(format!("a/b/{i}"))).unwrap().ino()).collect();
    let held = File::open(m.path("a/b/7")).unwrap();
    drop_caches();
    fs::rename(m.path("a"), m.path("z")).unwrap();
    for i in 0..100 {
        let p = m.path(format!("z/b/{i}"));
        assert_eq!(fs::metadata(&p).unwrap().ino(), inos[i as usize]);
        assert!(fs::read(&p).unwrap() == noise(i, 1000));
    }
    let mut got = Vec::new();
    (&held).read_to_end(&mut got).unwrap();
    assert!(got == noise(7, 1000));
}

#[test]
fn the_mounts_limits_on_dirty_memory_and_readahead_are_raised() {
    needs_root!();
    let read = |m: &Mount, what: &str| {
        let dev = fs::metadata(m.path("")).unwrap().dev();
        let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
        let text = fs::read_to_string(format!("/sys/class/bdi/{major}:{minor}/{what}")).unwrap();
        text.trim().parse::<u32>().unwrap()
    };
    let raised = Mount::new();
    assert_eq!((read(&raised, "max_ratio"), read(&raised, "read_ahead_kb")), (100, 1024));
    let left = Mount::with(|o| o.raise_limits = false);
    assert!(read(&left, "max_ratio") < 100 && read(&left, "read_ahead_kb") < 1024);
}

#[test]
fn requests_carry_up_to_a_mebibyte() {
    // A write of 1 MiB through O_DIRECT is one request; smaller limits would split it, which cannot be seen from
    // outside but by content, so what is tested is that large ones arrive whole at every alignment.
    let m = Mount::new();
    let f = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_DIRECT)
        .open(m.path("f"))
        .unwrap();
    let data = noise(5, (4 << 20) + 12_345);
    f.write_all_at(&data, 3).unwrap();
    let mut got = vec![0; data.len()];
    f.read_exact_at(&mut got, 3).unwrap();
    assert!(got == data);
}

#[test]
fn symbolic_links_are_cached_and_replaced_ones_are_not() {
    let m = Mount::new();
    for target in ["one", "two", "three"] {
        let _ = fs::remove_file(m.path("l"));
        std::os::unix::fs::symlink(target, m.path("l")).unwrap();
        assert_eq!(fs::read_link(m.path("l")).unwrap(), Path::new(target));
        assert_eq!(fs::read_link(m.path("l")).unwrap(), Path::new(target));
    }
}

#[test]
fn blocks_are_counted_after_writing() {
    let m = Mount::new();
    fs::write(m.path("f"), noise(6, 1_000_000)).unwrap();
    assert!(fs::metadata(m.path("f")).unwrap().blocks() >= 1_000_000 / 512);
    let f = open_rw(m.path("f"));
    f.set_len(0).unwrap();
    assert_eq!(f.metadata().unwrap().blocks(), 0);
}
