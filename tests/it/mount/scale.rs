//! Many of everything.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::sync::Arc;
use std::thread;

use super::support::{Mount, noise, sh};

#[test]
fn three_hundred_threads_work_at_once() {
    let m = Arc::new(Mount::new());
    fs::create_dir(m.path("shared")).unwrap();
    let threads: Vec<_> = (0..300u64)
        .map(|i| {
            let m = m.clone();
            thread::spawn(move || {
                let own = m.path(format!("t{i}"));
                fs::create_dir(&own).unwrap();
                for round in 0..3u64 {
                    let data = noise(i * 7 + round, 20_000);
                    fs::write(own.join("f"), &data).unwrap();
                    assert!(fs::read(own.join("f")).unwrap() == data);
                    fs::rename(own.join("f"), m.path(format!("shared/{i}-{round}"))).unwrap();
                }
                fs::remove_dir(&own).unwrap();
                assert!(fs::read(m.path(format!("shared/{i}-1"))).unwrap() == noise(i * 7 + 1, 20_000));
            })
        })
        .collect();
    for t in threads {
        t.join().unwrap();
    }
    let m = Arc::into_inner(m).expect("all threads are done").remount();
    assert_eq!(fs::read_dir(m.path("shared")).unwrap().count(), 900);
    assert_eq!(fs::read_dir(m.path("")).unwrap().count(), 1);
    assert!(fs::read(m.path("shared/299-2")).unwrap() == noise(299 * 7 + 2, 20_000));
}

#[test]
fn a_directory_of_100_000_entries_is_listed_whole_and_removed() {
    const N: usize = 100_000;
    let m = Mount::new();
    fs::create_dir(m.path("d")).unwrap();
    for i in 0..N {
        File::create(m.path(format!("d/{i}"))).unwrap();
    }
    let m = m.remount();
    let names: HashSet<_> = fs::read_dir(m.path("d")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), N);
    assert_eq!(sh(&m.path(""), "ls -l d | wc -l").trim(), (N + 1).to_string());
    sh(&m.path(""), "rm -r d");
    assert_eq!(fs::read_dir(m.path("")).unwrap().count(), 0);
}

#[test]
fn deep_trees_and_many_open_files() {
    let m = Mount::new();
    let mut path = m.path("");
    for i in 0..200 {
        path.push(format!("d{i}"));
        fs::create_dir(&path).unwrap();
    }
    fs::write(path.join("f"), "deep").unwrap();
    let m = m.remount();
    assert_eq!(sh(&m.path(""), "find . -name f -exec cat {} +"), "deep");
    let open: Vec<File> = (0..500)
        .map(|i| {
            let p = m.path(format!("f{i}"));
            fs::write(&p, noise(i, 100)).unwrap();
            File::open(&p).unwrap()
        })
        .collect();
    for (i, mut f) in open.into_iter().enumerate() {
        let mut got = Vec::new();
        f.read_to_end(&mut got).unwrap();
        assert!(got == noise(i as u64, 100));
    }
}
