//! A backing file system that is full.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::support::{Mount, Place, errno, needs_root, noise, open_rw, sh};

/// A small ext4 file system in an image file, mounted. Dropping it unmounts.
struct SmallDisk {
    at: PathBuf,
}

impl SmallDisk {
    fn new(place: &Path, mebibytes: u32) -> Self {
        let at = place.join("disk");
        fs::create_dir(&at).unwrap();
        sh(place, &format!("truncate -s {mebibytes}M image; mkfs.ext4 -q -m 0 image; mount -o loop image disk"));
        fs::create_dir(at.join("backing")).unwrap();
        Self { at }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
        // Whoever removed the folder around it before this could not remove the mount point.
        let _ = fs::remove_dir(&self.at);
        let _ = self.at.parent().map(fs::remove_dir);
    }
}

#[test]
fn a_full_disk_is_enospc_and_leaves_everything_readable() {
    needs_root!();
    let place = Place::new();
    // Dropped last: declared first, and the mount after it.
    let disk = SmallDisk::new(place.path(), 32);
    let place = place.with_backing(disk.at.join("backing"));
    place.init();
    let m = place.mount(|_| {});
    fs::write(m.path("kept"), noise(1, 1_000_000)).unwrap();
    File::open(m.path("kept")).unwrap().sync_all().unwrap();
    // Until it is full. With the writeback cache a write may succeed and its fsync fail.
    let mut f = File::create(m.path("big")).unwrap();
    let mut whole = 0;
    let failed = loop {
        let piece = noise(whole, 1 << 20);
        if let Err(e) = f.write_all(&piece).and_then(|()| f.sync_all()) {
            break e;
        }
        whole += 1;
        assert!(whole < 64, "the disk never fills");
    };
    assert_eq!(failed.raw_os_error(), Some(libc::ENOSPC), "{failed}");
    assert!(whole > 10);
    drop(f);
    assert_eq!(
        errno(
            fs::write(m.path("more"), noise(9, 1 << 20))
                .and_then(|()| File::open(m.path("more"))?.sync_all())
                .and_then(|()| fs::write(m.path("again"), noise(9, 1 << 20)))
        ),
        libc::ENOSPC
    );
    let check = |m: &Mount| {
        assert!(fs::read(m.path("kept")).unwrap() == noise(1, 1_000_000));
        let f = File::open(m.path("big")).unwrap();
        let mut got = vec![0; 1 << 20];
        for i in 0..whole {
            f.read_exact_at(&mut got, i << 20).unwrap();
            assert!(got == noise(i, 1 << 20), "MiB {i}, which was synced");
        }
        // Whatever came after is readable too, up to the size.
        let len = f.metadata().unwrap().len();
        let mut at = whole << 20;
        while at < len {
            at += f.read_at(&mut got, at).expect("readable").max(1) as u64;
        }
    };
    check(&m);
    let m = m.remount();
    check(&m);
    // Removing makes room.
    fs::remove_file(m.path("big")).unwrap();
    let _ = fs::remove_file(m.path("more"));
    let _ = fs::remove_file(m.path("again"));
    fs::write(m.path("again"), noise(3, 5 << 20)).unwrap();
    open_rw(m.path("again")).sync_all().unwrap();
    assert!(fs::read(m.remount().path("again")).unwrap() == noise(3, 5 << 20));
}
