//! Reading directories while they change, and what a directory looks like to stat(2).

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::support::{Mount, errno, tick};

/// opendir(3) and friends, for what std does not have: rewinddir, telldir, seekdir.
struct Dir(*mut libc::DIR);

impl Dir {
    fn open(path: &Path) -> Self {
        let path = CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: a NUL-terminated path; the result is checked.
        let dir = unsafe { libc::opendir(path.as_ptr()) };
        assert!(!dir.is_null(), "{}", std::io::Error::last_os_error());
        Self(dir)
    }

    fn next(&mut self) -> Option<String> {
        // SAFETY: the stream is open, and the entry is read before the next call on it.
        unsafe {
            let e = libc::readdir(self.0);
            (!e.is_null()).then(|| CStr::from_ptr((*e).d_name.as_ptr()).to_str().unwrap().to_owned())
        }
    }

    fn rest(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.next()).filter(|n| n != "." && n != "..").collect()
    }

    fn tell(&mut self) -> libc::c_long {
        // SAFETY: the stream is open.
        unsafe { libc::telldir(self.0) }
    }

    fn seek(&mut self, to: libc::c_long) {
        // SAFETY: the stream is open and `to` came from telldir.
        unsafe { libc::seekdir(self.0, to) }
    }

    fn rewind(&mut self) {
        // SAFETY: the stream is open.
        unsafe { libc::rewinddir(self.0) }
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // SAFETY: open until here.
        unsafe { libc::closedir(self.0) };
    }
}

fn fill(m: &Mount, from: usize, to: usize) -> BTreeSet<String> {
    (from..to)
        .map(|i| {
            let name = format!("file-with-a-longer-name-{i}");
            File::create(m.path(&name)).unwrap();
            name
        })
        .collect()
}

fn set(names: impl IntoIterator<Item = String>) -> BTreeSet<String> {
    names.into_iter().collect()
}

#[test]
fn rewinddir_shows_what_was_made_and_removed_since_opendir() {
    let m = Mount::new();
    fill(&m, 0, 10);
    let mut d = Dir::open(&m.path(""));
    assert_eq!(d.rest().len(), 10);
    let more = fill(&m, 10, 15);
    fs::remove_file(m.path("file-with-a-longer-name-3")).unwrap();
    d.rewind();
    let now = set(d.rest());
    assert!(now.is_superset(&more));
    assert!(!now.contains("file-with-a-longer-name-3"));
    assert_eq!(now.len(), 14);
    // Before anything was read, too.
    let mut d = Dir::open(&m.path(""));
    fill(&m, 15, 16);
    d.rewind();
    assert_eq!(d.rest().len(), 15);
}

#[test]
fn seekdir_goes_back_to_where_telldir_was() {
    let m = Mount::new();
    fill(&m, 0, 1000);
    let mut d = Dir::open(&m.path(""));
    let mut places = Vec::new();
    loop {
        let at = d.tell();
        let Some(name) = d.next() else { break };
        places.push((at, name));
    }
    assert_eq!(places.len(), 1002);
    for (at, name) in places.iter().rev().step_by(37) {
        d.seek(*at);
        assert_eq!(d.next().as_ref(), Some(name));
    }
    // Other names coming and going change nothing for those that stay.
    fill(&m, 1000, 1500);
    for (_, name) in places.iter().filter(|(_, n)| n.ends_with('7')) {
        fs::remove_file(m.path(name)).unwrap();
    }
    let mut again = Dir::open(&m.path(""));
    for i in (0..places.len()).step_by(101) {
        again.seek(places[i].0);
        let rest = set(again.rest());
        let stayed = places[i..].iter().map(|(_, n)| n).filter(|n| !n.ends_with('7') && !n.starts_with('.'));
        for name in stayed {
            assert!(rest.contains(name), "{name} is not found after seeking to entry {i}");
        }
    }
}

#[test]
fn removing_what_was_read_while_reading_skips_nothing() {
    let m = Mount::new();
    let all = fill(&m, 0, 3000);
    let mut seen = BTreeSet::new();
    let mut d = Dir::open(&m.path(""));
    while let Some(name) = d.next() {
        if name != "." && name != ".." {
            fs::remove_file(m.path(&name)).unwrap();
            assert!(seen.insert(name), "an entry was reported twice");
        }
    }
    assert_eq!(seen, all);
    assert_eq!(fs::read_dir(m.path("")).unwrap().count(), 0);
}

#[test]
fn entries_that_stay_are_seen_once_while_others_come() {
    let m = Mount::new();
    let all = fill(&m, 0, 2000);
    let mut d = Dir::open(&m.path(""));
    let mut seen = Vec::new();
    let mut i = 0;
    while let Some(name) = d.next() {
        seen.push(name);
        if i % 3 == 0 {
            File::create(m.path(format!("new-{i}"))).unwrap();
        }
        i += 1;
    }
    seen.retain(|n| n.starts_with("file-"));
    assert_eq!(seen.len(), 2000, "an entry was left out or reported twice");
    assert_eq!(set(seen), all);
}

#[test]
fn a_listing_gives_the_inode_numbers_and_kinds_that_stat_gives() {
    use std::os::unix::fs::DirEntryExt;
    let m = Mount::new();
    fs::write(m.path("f"), "").unwrap();
    fs::create_dir(m.path("d")).unwrap();
    std::os::unix::fs::symlink("x", m.path("l")).unwrap();
    let check = |m: &Mount| -> BTreeSet<(String, u64)> {
        fs::read_dir(m.path(""))
            .unwrap()
            .map(|e| {
                let e = e.unwrap();
                let meta = fs::symlink_metadata(e.path()).unwrap();
                assert_eq!(e.ino(), meta.ino());
                assert_eq!(e.file_type().unwrap(), meta.file_type());
                (e.file_name().into_string().unwrap(), meta.ino())
            })
            .collect()
    };
    let before = check(&m);
    assert_eq!(before.len(), 3);
    assert_eq!(check(&m.remount()), before, "inode numbers are the same in every mount");
}

#[test]
fn directories_count_their_subdirectories_and_know_when_they_changed() {
    let m = Mount::new();
    fs::create_dir(m.path("d")).unwrap();
    let meta = || fs::metadata(m.path("d")).unwrap();
    let links = meta().nlink();
    let mut before = meta().modified().unwrap();
    tick();
    let mut changed = |what: &str| {
        tick();
        let now = meta().modified().unwrap();
        assert!(now > before, "mtime of the parent after {what}");
        before = now;
    };
    fs::create_dir(m.path("d/sub")).unwrap();
    changed("mkdir");
    assert_eq!(meta().nlink(), links + 1);
    fs::write(m.path("d/f"), "").unwrap();
    changed("create");
    fs::rename(m.path("d/f"), m.path("d/g")).unwrap();
    changed("rename");
    fs::hard_link(m.path("d/g"), m.path("d/h")).unwrap();
    changed("link");
    fs::remove_file(m.path("d/h")).unwrap();
    changed("unlink");
    fs::rename(m.path("d/sub"), m.path("moved")).unwrap();
    changed("moving a directory away");
    assert_eq!(meta().nlink(), links);
    fs::rename(m.path("moved"), m.path("d/back")).unwrap();
    changed("moving a directory in");
    fs::remove_dir(m.path("d/back")).unwrap();
    changed("rmdir");
    assert_eq!(meta().nlink(), links);
}

#[test]
fn only_empty_directories_are_removed() {
    let m = Mount::new();
    fs::create_dir_all(m.path("d/e")).unwrap();
    assert_eq!(errno(fs::remove_dir(m.path("d"))), libc::ENOTEMPTY);
    fs::write(m.path("d/e/f"), "").unwrap();
    assert_eq!(errno(fs::remove_dir(m.path("d/e"))), libc::ENOTEMPTY);
    fs::remove_file(m.path("d/e/f")).unwrap();
    let held = File::open(m.path("d/e")).unwrap();
    fs::remove_dir(m.path("d/e")).unwrap();
    // In a directory that was removed nothing can be made.
    let made = rustix::fs::openat(
        &held,
        "x",
        rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY,
        rustix::fs::Mode::from_raw_mode(0o600),
    );
    assert_eq!(made.unwrap_err(), rustix::io::Errno::NOENT);
    drop(held);
    fs::remove_dir(m.path("d")).unwrap();
    assert_eq!(errno(fs::remove_dir(m.path("d"))), libc::ENOENT);
}

#[test]
fn directories_can_be_synced() {
    let m = Mount::new();
    fs::create_dir(m.path("d")).unwrap();
    fs::write(m.path("d/f"), "x").unwrap();
    File::open(m.path("d")).unwrap().sync_all().unwrap();
    File::open(m.path("")).unwrap().sync_all().unwrap();
    File::open(m.path("d/f")).unwrap().sync_data().unwrap();
}
