//! Times: to the nanosecond, through close, remount, and the kernel's late write-back of them.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_OMIT};

use super::support::{Mount, noise, open_rw, sh, tick};

fn set_times(path: &Path, atime: (i64, i64), mtime: (i64, i64)) {
    let spec = |(tv_sec, tv_nsec)| Timespec { tv_sec, tv_nsec: tv_nsec as _ };
    let times = Timestamps { last_access: spec(atime), last_modification: spec(mtime) };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn mtime(path: impl AsRef<Path>) -> (i64, i64) {
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.mtime(), meta.mtime_nsec())
}

fn atime(path: impl AsRef<Path>) -> (i64, i64) {
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.atime(), meta.atime_nsec())
}

#[test]
fn times_set_to_the_nanosecond_survive_a_remount() {
    let m = Mount::new();
    fs::write(m.path("f"), noise(1, 10_000)).unwrap();
    fs::create_dir(m.path("d")).unwrap();
    std::os::unix::fs::symlink("x", m.path("l")).unwrap();
    let (a, t) = ((1_000_000_001, 123_456_789), (1_234_567_890, 987_654_321));
    for n in ["f", "d", "l"] {
        set_times(&m.path(n), a, t);
        assert_eq!((atime(m.path(n)), mtime(m.path(n))), (a, t), "{n}");
    }
    let m = m.remount();
    for n in ["f", "d"] {
        assert_eq!((atime(m.path(n)), mtime(m.path(n))), (a, t), "{n}");
    }
    assert_eq!(mtime(m.path("l")), t);
}

#[test]
fn a_time_set_right_after_writing_is_not_overwritten_by_what_is_written_back() {
    let m = Mount::new();
    let t = (1_111_111_111, 111_111_111);
    // As tar and cp -a do it: write, set times, close; or write, close, set times.
    let mut f = File::create(m.path("tar")).unwrap();
    f.write_all(&noise(1, 500_000)).unwrap();
    f.set_times(fs::FileTimes::new().set_modified(UNIX_EPOCH + Duration::new(1_111_111_111, 111_111_111))).unwrap();
    drop(f);
    fs::write(m.path("cp"), noise(2, 500_000)).unwrap();
    set_times(&m.path("cp"), t, t);
    for n in ["tar", "cp"] {
        assert_eq!(mtime(m.path(n)), t, "{n}");
    }
    File::open(m.path("tar")).unwrap().sync_all().unwrap();
    let m = m.remount();
    for n in ["tar", "cp"] {
        assert_eq!(mtime(m.path(n)), t, "{n}");
    }
    // Opening, reading and closing leaves it alone, and so does settling at unmount.
    fs::read(m.path("tar")).unwrap();
    drop(open_rw(m.path("cp")));
    let m = m.remount();
    for n in ["tar", "cp"] {
        assert_eq!(mtime(m.path(n)), t, "{n}");
    }
}

#[test]
fn the_time_of_a_write_seen_before_closing_is_the_one_after_a_remount() {
    let m = Mount::new();
    let f = open_rw(m.path("f"));
    f.write_all_at(&noise(3, 100_000), 0).unwrap();
    let seen = mtime(m.path("f"));
    drop(f);
    assert_eq!(mtime(m.path("f")), seen);
    assert_eq!(mtime(m.remount().path("f")), seen);
}

#[test]
fn writing_and_truncating_move_mtime_and_reading_does_not() {
    let m = Mount::new();
    fs::write(m.path("f"), noise(4, 10_000)).unwrap();
    let past = (1_000_000_000, 5);
    let touched = |what: &str, act: &dyn Fn(&Path)| {
        set_times(&m.path("f"), past, past);
        act(&m.path("f"));
        assert_ne!(mtime(m.path("f")), past, "{what}");
    };
    touched("write", &|p| open_rw(p).write_all_at(b"x", 3).unwrap());
    touched("truncate", &|p| open_rw(p).set_len(5000).unwrap());
    touched("O_TRUNC", &|p| drop(File::create(p).unwrap()));
    set_times(&m.path("f"), past, past);
    fs::read(m.path("f")).unwrap();
    assert_eq!(mtime(m.path("f")), past);
}

#[test]
fn ctime_follows_every_change_of_the_inode() {
    let m = Mount::new();
    fs::write(m.path("f"), "x").unwrap();
    let ctime = || {
        let meta = fs::metadata(m.path("f")).unwrap();
        (meta.ctime(), meta.ctime_nsec())
    };
    let mut before = ctime();
    tick();
    let mut changed = |what: &str| {
        tick();
        let now = ctime();
        assert!(now > before, "ctime after {what}");
        before = now;
    };
    sh(&m.path(""), "chmod 600 f");
    changed("chmod");
    fs::hard_link(m.path("f"), m.path("g")).unwrap();
    changed("link");
    fs::remove_file(m.path("g")).unwrap();
    changed("unlink");
    set_times(&m.path("f"), (5, 5), (6, 6));
    changed("utimens");
    rustix::fs::setxattr(m.path("f"), "user.x", b"y", rustix::fs::XattrFlags::empty()).unwrap();
    changed("setxattr");
}

#[test]
fn one_time_is_set_and_the_other_kept() {
    let m = Mount::new();
    fs::write(m.path("f"), "").unwrap();
    set_times(&m.path("f"), (10, 1), (20, 2));
    set_times(&m.path("f"), (0, UTIME_OMIT), (30, 3));
    assert_eq!((atime(m.path("f")), mtime(m.path("f"))), ((10, 1), (30, 3)));
    let now = SystemTime::now() - Duration::from_secs(60);
    sh(&m.path(""), "touch f");
    assert!(fs::metadata(m.path("f")).unwrap().modified().unwrap() > now);
}

#[test]
fn times_before_1970_are_kept() {
    let m = Mount::new();
    fs::write(m.path("f"), "").unwrap();
    set_times(&m.path("f"), (-1, 999_999_999), (-86_400, 250_000_000));
    assert_eq!((atime(m.path("f")), mtime(m.path("f"))), ((-1, 999_999_999), (-86_400, 250_000_000)));
    assert_eq!(mtime(m.remount().path("f")), (-86_400, 250_000_000));
}

#[test]
fn no_time_that_a_user_can_set_stops_the_daemon() {
    let m = Mount::new();
    fs::write(m.path("f"), "").unwrap();
    // Not i64::MIN, on which fuser 0.18 overflows where overflow is checked: in debug builds.
    for sec in [i64::MIN + 1, i64::MAX, -62_135_596_800, 1 << 40] {
        for nsec in [0, 1, 999_999_999] {
            let spec = Timespec { tv_sec: sec, tv_nsec: nsec };
            let times = Timestamps { last_access: spec, last_modification: spec };
            // It may be refused or clamped by the backing file system.
            let _ = rustix::fs::utimensat(CWD, m.path("f"), &times, AtFlags::empty());
        }
    }
    for i in 0..50 {
        fs::write(m.path(format!("after{i}")), "x").unwrap();
    }
}
