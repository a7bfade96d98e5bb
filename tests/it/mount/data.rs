//! Content: reading and writing in every way that programs do.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use rustix::fs::FallocateFlags;
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

use super::support::{Mount, drop_caches, errno, needs_root, noise, open_rw, sh};

#[test]
fn what_is_written_is_read_back_after_a_remount() {
    let m = Mount::new();
    let sizes = [0, 1, 4095, 4096, 4097, 131_072, 131_073, 700_001];
    for n in sizes {
        fs::write(m.path(format!("f{n}")), noise(n as u64, n)).unwrap();
    }
    let check = |m: &Mount| {
        for n in sizes {
            assert!(fs::read(m.path(format!("f{n}"))).unwrap() == noise(n as u64, n), "{n} bytes");
            assert_eq!(fs::metadata(m.path(format!("f{n}"))).unwrap().len(), n as u64);
        }
    };
    check(&m);
    check(&m.remount());
}

#[test]
fn content_and_names_are_not_in_clear_below() {
    let m = Mount::new();
    fs::create_dir(m.path("a-directory-name")).unwrap();
    fs::write(m.path("a-directory-name/a-file-name"), "some content that can be found".repeat(1000)).unwrap();
    std::os::unix::fs::symlink("a-link-target", m.path("a-link-name")).unwrap();
    let place = m.unmount();
    let below = sh(place.backing(), "ls -lR; find . -type f -exec cat {} +; find . -type l -exec readlink {} \\;");
    for clear in ["a-directory", "a-file", "some content", "a-link"] {
        assert!(!below.contains(clear), "{clear} is in clear below");
    }
}

#[test]
fn a_file_opened_for_writing_only_can_be_changed_in_the_middle_of_a_block() {
    let m = Mount::new();
    fs::write(m.path("f"), noise(1, 10_000)).unwrap();
    let m = m.remount();
    let f = OpenOptions::new().write(true).open(m.path("f")).unwrap();
    f.write_all_at(b"xyz", 5000).unwrap();
    drop(f);
    let mut want = noise(1, 10_000);
    want[5000..5003].copy_from_slice(b"xyz");
    assert!(fs::read(m.remount().path("f")).unwrap() == want);
}

#[test]
fn a_file_opened_for_reading_only_cannot_be_written() {
    let m = Mount::new();
    fs::write(m.path("f"), "x").unwrap();
    let f = File::open(m.path("f")).unwrap();
    assert_eq!(errno((&f).write(b"y")), libc::EBADF);
}

#[test]
fn appends_of_several_processes_do_not_overwrite_each_other() {
    let m = Mount::new();
    let path = m.path("log");
    File::create(&path).unwrap();
    let writers: Vec<_> = (0..4)
        .map(|i| {
            let script = format!("i=0; while [ $i -lt 250 ]; do echo w{i}-$i >> log; i=$((i+1)); done");
            Command::new("/bin/sh").args(["-c", &script]).current_dir(m.path("")).spawn().unwrap()
        })
        .collect();
    for mut w in writers {
        assert!(w.wait().unwrap().success());
    }
    let m = m.remount();
    let text = fs::read_to_string(m.path("log")).unwrap();
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines.sort();
    let mut want: Vec<_> = (0..4).flat_map(|w| (0..250).map(move |i| format!("w{w}-{i}"))).collect();
    want.sort();
    assert_eq!(lines, want);
}

#[test]
fn opening_with_trunc_empties_the_file() {
    let m = Mount::new();
    fs::write(m.path("f"), noise(3, 300_000)).unwrap();
    let other = File::open(m.path("f")).unwrap();
    let f = OpenOptions::new().write(true).truncate(true).open(m.path("f")).unwrap();
    assert_eq!(other.metadata().unwrap().len(), 0);
    (&f).write_all(b"new").unwrap();
    drop((f, other));
    assert_eq!(fs::read(m.remount().path("f")).unwrap(), b"new");
}

#[test]
fn truncating_shrinks_and_grows_with_zeros() {
    let m = Mount::new();
    fs::write(m.path("f"), noise(4, 200_000)).unwrap();
    let f = open_rw(m.path("f"));
    f.set_len(70_001).unwrap();
    f.set_len(300_000).unwrap();
    rustix::fs::chmod(m.path("f"), rustix::fs::Mode::from_raw_mode(0o644)).unwrap();
    drop(f);
    let m = m.remount();
    let got = fs::read(m.path("f")).unwrap();
    assert_eq!(got.len(), 300_000);
    assert!(got[..70_001] == noise(4, 200_000)[..70_001]);
    assert!(got[70_001..].iter().all(|b| *b == 0));
    // By name, without a handle.
    sh(&m.path(""), "truncate -s 5 f");
    assert_eq!(fs::read(m.remount().path("f")).unwrap(), noise(4, 200_000)[..5]);
}

#[test]
fn an_unlinked_open_file_stays_usable() {
    let m = Mount::new();
    fs::write(m.path("f"), noise(5, 50_000)).unwrap();
    let m = m.remount();
    let mut f = open_rw(m.path("f"));
    fs::remove_file(m.path("f")).unwrap();
    assert_eq!(fs::read_dir(m.path("")).unwrap().count(), 0);
    let mut got = Vec::new();
    f.read_to_end(&mut got).unwrap();
    assert!(got == noise(5, 50_000));
    f.write_all_at(b"after", 60_000).unwrap();
    f.sync_all().unwrap();
    let meta = f.metadata().unwrap();
    assert_eq!(meta.len(), 60_005);
    assert_eq!(std::os::unix::fs::MetadataExt::nlink(&meta), 0);
    f.set_len(10).unwrap();
    f.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    // A new file of that name is another file.
    fs::write(m.path("f"), "other").unwrap();
    f.seek(SeekFrom::Start(0)).unwrap();
    got.clear();
    f.read_to_end(&mut got).unwrap();
    assert!(got == noise(5, 50_000)[..10]);
    assert_eq!(fs::read(m.path("f")).unwrap(), b"other");
}

#[test]
fn shared_mappings_reach_the_file_and_other_processes() {
    let m = Mount::new();
    const LEN: usize = 3 * 4096;
    let f = open_rw(m.path("f"));
    f.set_len(LEN as u64).unwrap();
    // SAFETY: a fresh mapping of an open file, used only within its length and unmapped below.
    unsafe {
        let at = mmap(std::ptr::null_mut(), LEN, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &f, 0).unwrap();
        let bytes = std::slice::from_raw_parts_mut(at.cast::<u8>(), LEN);
        bytes[5000..5005].copy_from_slice(b"mmap!");
        // Through write(2), seen in the mapping.
        f.write_all_at(b"write", 100).unwrap();
        assert_eq!(&bytes[100..105], b"write");
        // The mapping, seen by another process.
        assert!(sh(&m.path(""), "cat f").contains("mmap!"));
        msync(at, LEN, MsyncFlags::SYNC).unwrap();
        munmap(at, LEN).unwrap();
    }
    drop(f);
    let got = fs::read(m.remount().path("f")).unwrap();
    assert_eq!(&got[5000..5005], b"mmap!");
    assert_eq!(&got[100..105], b"write");
}

#[test]
fn private_mappings_do_not_reach_the_file() {
    let m = Mount::new();
    fs::write(m.path("f"), noise(6, 8192)).unwrap();
    let f = File::open(m.path("f")).unwrap();
    // SAFETY: a fresh private mapping, used only within its length and unmapped below.
    unsafe {
        let at =
            mmap(std::ptr::null_mut(), 8192, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE, &f, 0).unwrap();
        let bytes = std::slice::from_raw_parts_mut(at.cast::<u8>(), 8192);
        assert!(bytes == noise(6, 8192));
        bytes.fill(0);
        munmap(at, 8192).unwrap();
    }
    assert!(fs::read(m.path("f")).unwrap() == noise(6, 8192));
}

#[test]
fn direct_io_and_the_page_cache_agree() {
    let m = Mount::new();
    fs::write(m.path("f"), noise(7, 40_000)).unwrap();
    let direct = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(m.path("f")).unwrap();
    let mut got = vec![0; 40_000];
    assert_eq!(direct.read_at(&mut got, 0).unwrap(), 40_000);
    assert!(got == noise(7, 40_000));
    direct.write_all_at(&noise(8, 8192), 4096).unwrap();
    let cached = fs::read(m.path("f")).unwrap();
    assert!(cached[4096..12_288] == noise(8, 8192));
    // Not aligned, which FUSE takes.
    direct.write_all_at(b"odd", 12_289).unwrap();
    assert_eq!(&fs::read(m.path("f")).unwrap()[12_289..12_292], b"odd");
    drop(direct);
    let got = fs::read(m.remount().path("f")).unwrap();
    assert_eq!(got.len(), 40_000);
    assert_eq!(&got[12_289..12_292], b"odd");
}

#[test]
fn offsets_past_4_gib_hold_what_was_written_there() {
    let m = Mount::new();
    let f = open_rw(m.path("f"));
    let far = (5u64 << 30) + 123;
    f.write_all_at(&noise(9, 10_000), far).unwrap();
    f.write_all_at(b"near", 0).unwrap();
    drop(f);
    let m = m.remount();
    let f = File::open(m.path("f")).unwrap();
    assert_eq!(f.metadata().unwrap().len(), far + 10_000);
    let mut got = vec![1; 10_000];
    f.read_exact_at(&mut got, far).unwrap();
    assert!(got == noise(9, 10_000));
    f.read_exact_at(&mut got, 1 << 32).unwrap();
    assert!(got.iter().all(|b| *b == 0));
}

#[test]
fn a_sparse_file_of_20_gib_takes_little_space() {
    let m = Mount::new();
    const LEN: u64 = 20 << 30;
    let f = open_rw(m.path("f"));
    f.set_len(LEN).unwrap();
    for at in [0, LEN / 2, LEN - 4096] {
        f.write_all_at(&noise(at, 4096), at).unwrap();
    }
    f.sync_all().unwrap();
    drop(f);
    let m = m.remount();
    let f = File::open(m.path("f")).unwrap();
    let meta = f.metadata().unwrap();
    assert_eq!(meta.len(), LEN);
    assert!(std::os::unix::fs::MetadataExt::blocks(&meta) * 512 < 64 << 20, "it is not sparse below");
    let mut got = vec![0; 4096];
    for at in [0, LEN / 2, LEN - 4096] {
        f.read_exact_at(&mut got, at).unwrap();
        assert!(got == noise(at, 4096));
    }
    f.read_exact_at(&mut got, 7 << 30).unwrap();
    assert!(got.iter().all(|b| *b == 0));
}

fn seek(f: &File, at: u64, whence: i32) -> std::io::Result<u64> {
    // SAFETY: lseek touches no memory.
    let r = unsafe { libc::lseek(f.as_raw_fd(), at as i64, whence) };
    u64::try_from(r).map_err(|_| std::io::Error::last_os_error())
}

#[test]
fn holes_are_found_and_data_not_yet_written_back_is_not_taken_for_one() {
    let m = Mount::new();
    let f = open_rw(m.path("f"));
    // Still in the kernel's cache when the question comes.
    f.write_all_at(&noise(1, 4096), 1 << 20).unwrap();
    assert_eq!(seek(&f, 1 << 20, libc::SEEK_DATA).unwrap(), 1 << 20);
    assert!(seek(&f, 0, libc::SEEK_DATA).unwrap() <= 1 << 20);
    assert_eq!(seek(&f, 1 << 20, libc::SEEK_HOLE).unwrap(), (1 << 20) + 4096);
    f.sync_all().unwrap();
    f.set_len(8 << 20).unwrap();
    assert_eq!(errno(seek(&f, 8 << 20, libc::SEEK_DATA)), libc::ENXIO);
    assert!(seek(&f, 2 << 20, libc::SEEK_HOLE).unwrap() >= 2 << 20);
    // Copied with its holes, it is the same file.
    sh(&m.path(""), "cp --sparse=auto f g && cmp f g && cp --sparse=always f h && cmp f h");
}

#[test]
fn copying_a_file_right_after_writing_it_copies_all_of_it() {
    let m = Mount::new();
    // coreutils' cp asks for holes, or uses copy_file_range(2).
    let script = "head -c 3000000 /dev/urandom > a; cp a b; cmp a b; \
                  truncate -s 10M c; printf x | dd of=c bs=1 seek=5000000 conv=notrunc status=none; cp c d; cmp c d";
    sh(&m.path(""), script);
}

fn allocate(f: &File, flags: FallocateFlags, at: u64, len: u64) -> std::io::Result<()> {
    Ok(rustix::fs::fallocate(f, flags, at, len)?)
}

#[test]
fn fallocate_in_every_mode() {
    let m = Mount::new();
    let f = open_rw(m.path("f"));
    f.write_all_at(&noise(2, 100_000), 0).unwrap();
    let keep = FallocateFlags::KEEP_SIZE;
    allocate(&f, FallocateFlags::empty(), 0, 150_000).unwrap();
    assert_eq!(f.metadata().unwrap().len(), 150_000);
    allocate(&f, keep, 0, 500_000).unwrap();
    assert_eq!(f.metadata().unwrap().len(), 150_000);
    allocate(&f, FallocateFlags::PUNCH_HOLE | keep, 10_000, 20_000).unwrap();
    allocate(&f, FallocateFlags::ZERO_RANGE, 60_000, 5_000).unwrap();
    allocate(&f, FallocateFlags::ZERO_RANGE | keep, 140_000, 100_000).unwrap();
    assert_eq!(f.metadata().unwrap().len(), 150_000);
    allocate(&f, FallocateFlags::ZERO_RANGE, 149_000, 2_000).unwrap();
    assert_eq!(f.metadata().unwrap().len(), 151_000);
    for unknown in [FallocateFlags::COLLAPSE_RANGE, FallocateFlags::INSERT_RANGE] {
        assert_eq!(errno(allocate(&f, unknown, 0, 4096)), libc::EOPNOTSUPP);
    }
    let mut want = noise(2, 100_000);
    want.resize(151_000, 0);
    want[10_000..30_000].fill(0);
    want[60_000..65_000].fill(0);
    assert!(fs::read(m.path("f")).unwrap() == want);
    drop(f);
    assert!(fs::read(m.remount().path("f")).unwrap() == want);
}

#[test]
fn copy_file_range_copies_between_and_within_files() {
    let m = Mount::new();
    fs::write(m.path("a"), noise(3, 3_000_000)).unwrap();
    let (a, b) = (open_rw(m.path("a")), open_rw(m.path("b")));
    let copy = |from: &File, mut at: u64, to: &File, mut target: u64, len: usize| {
        let mut left = len;
        while left > 0 {
            match rustix::fs::copy_file_range(from, Some(&mut at), to, Some(&mut target), left).unwrap() {
                0 => break,
                n => left -= n,
            }
        }
        len - left
    };
    assert_eq!(copy(&a, 1000, &b, 5, 2_500_000), 2_500_000);
    let want = noise(3, 3_000_000);
    let got = fs::read(m.path("b")).unwrap();
    assert!(got[5..] == want[1000..2_501_000]);
    // To the end of the source, and no further.
    assert_eq!(copy(&a, 2_999_000, &b, 0, 10_000), 1000);
    // Within a file.
    assert_eq!(copy(&a, 0, &a, 3_000_000, 5000), 5000);
    drop((a, b));
    assert!(fs::read(m.remount().path("a")).unwrap()[3_000_000..] == want[..5000]);
}

#[test]
fn two_processes_write_to_different_parts_of_one_file() {
    let m = Mount::new();
    let script = |seed: u32, seek: u32| {
        format!("yes {seed} | head -c 2000000 | dd of=f bs=7777 seek={seek} oflag=seek_bytes conv=notrunc status=none")
    };
    let spawn = |s: String| {
        Command::new("/bin/sh").args(["-c", &s]).current_dir(m.path("")).stdin(Stdio::null()).spawn().unwrap()
    };
    let (mut a, mut b) = (spawn(script(1, 0)), spawn(script(2, 2_000_000)));
    assert!(a.wait().unwrap().success() && b.wait().unwrap().success());
    let got = fs::read(m.remount().path("f")).unwrap();
    assert_eq!(got.len(), 4_000_000);
    assert!(got[..2_000_000].chunks(2).all(|c| c == b"1\n"));
    assert!(got[2_000_000..].chunks(2).all(|c| c == b"2\n"));
}

#[test]
fn many_threads_write_and_read_one_file() {
    let m = Mount::new();
    let f = Arc::new(open_rw(m.path("f")));
    const PIECE: usize = 50_000;
    let threads: Vec<_> = (0..16u64)
        .map(|i| {
            let f = f.clone();
            thread::spawn(move || {
                for round in 0..4 {
                    let data = noise(i * 10 + round, PIECE);
                    f.write_all_at(&data, i * PIECE as u64).unwrap();
                    let mut got = vec![0; PIECE];
                    f.read_exact_at(&mut got, i * PIECE as u64).unwrap();
                    assert!(got == data);
                }
            })
        })
        .collect();
    for t in threads {
        t.join().unwrap();
    }
    drop(f);
    let got = fs::read(m.remount().path("f")).unwrap();
    for i in 0..16 {
        assert!(got[i * PIECE..(i + 1) * PIECE] == noise(i as u64 * 10 + 3, PIECE));
    }
}

#[test]
fn reads_after_the_page_cache_is_dropped_come_from_the_store() {
    needs_root!();
    let m = Mount::new();
    fs::write(m.path("f"), noise(12, 3_000_000)).unwrap();
    let f = File::open(m.path("f")).unwrap();
    drop_caches();
    let mut got = vec![0; 3_000_000];
    f.read_exact_at(&mut got, 0).unwrap();
    assert!(got == noise(12, 3_000_000));
}
