//! Tests of the store's namespace, on the simulated disk and on a real directory.

mod ahead;
mod attrs;
mod crash;
mod damage;
mod names;
mod observe;
mod outage;
mod rekey;

use super::keys::{KekKind, Keys, StoreFlags};
use super::{Node, Store, StoreError, StoreOptions};
use crate::backing::Backing;
use crate::backing::posix::Posix;
use crate::backing::sim::{SimDisk, SimOptions};
use crate::kms::KeyProvider;
use crate::kms::scripted::Scripted;
use std::sync::{Arc, OnceLock};

pub(super) const ENCRYPTED: StoreFlags = StoreFlags { plaintext_names: false };
pub(super) const CLEAR: StoreFlags = StoreFlags { plaintext_names: true };

pub(super) fn root_keys() -> Vec<Arc<dyn KeyProvider>> {
    static KEY: OnceLock<Arc<Scripted>> = OnceLock::new();
    vec![KEY.get_or_init(|| Scripted::new("tests")).clone()]
}

pub(super) fn open_with<B: Backing>(b: B, o: StoreOptions) -> Arc<Store<B>> {
    let keys = Keys::open(&b, &root_keys()).unwrap();
    Store::open(b, keys, o).unwrap()
}

pub(super) fn open<B: Backing>(b: B) -> Arc<Store<B>> {
    open_with(b, StoreOptions::default())
}

pub(super) fn new_disk(flags: StoreFlags) -> SimDisk {
    let disk = SimDisk::new(SimOptions::default());
    Store::init(&disk, &root_keys(), KekKind::Sealed, flags).unwrap();
    disk
}

pub(super) fn new_sim() -> (SimDisk, Arc<Store<SimDisk>>) {
    let disk = new_disk(ENCRYPTED);
    (disk.clone(), open(disk))
}

/// A name whose encrypted form is too long for the backing directory.
pub(super) fn long(c: u8) -> Vec<u8> {
    vec![c; 250]
}

/// Names in a directory, sorted.
pub(super) fn list<B: Backing>(s: &Store<B>, dir: &Arc<Node<B>>) -> Vec<Vec<u8>> {
    let mut names: Vec<_> = s.read_dir(dir).unwrap().into_iter().map(|e| e.name).collect();
    names.sort();
    names
}

/// Everything below `dir` can be listed, looked up and looked at, and links can be read. Adds the
/// paths, directories with a slash at the end.
pub(super) fn walk<B: Backing>(s: &Store<B>, dir: &Arc<Node<B>>, path: &str, out: &mut Vec<String>) {
    for e in s.read_dir(dir).unwrap() {
        let (node, attr) = s.lookup(dir, &e.name).unwrap();
        assert_eq!((node.kind(), attr.ino), (e.kind, e.ino));
        let name: String = String::from_utf8_lossy(&e.name[..e.name.len().min(8)]).into_owned();
        let path = format!("{path}/{name}");
        let mark = if e.kind == crate::backing::Kind::Dir { "/" } else { "" };
        out.push(format!("{path}{mark}"));
        match node.kind() {
            crate::backing::Kind::Dir => walk(s, &node, &path, out),
            crate::backing::Kind::Symlink => {
                assert_eq!(s.readlink(&node).unwrap().len() as u64, attr.size);
            }
            _ => {}
        }
    }
    out.sort();
}

pub(super) fn paths<B: Backing>(s: &Store<B>) -> Vec<String> {
    let mut out = Vec::new();
    walk(s, &s.root(), "", &mut out);
    out
}

/// Runs a generic test on the simulated disk and on a real directory, with encrypted names and with clear ones.
macro_rules! on_each_backing {
    ($($name:ident),* $(,)?) => {
        $(mod $name {
            use super::super::*;

            #[test]
            fn simulated() {
                for flags in [ENCRYPTED, CLEAR] {
                    super::super::simulated(flags, &|open| super::bodies::$name(open));
                }
            }

            #[test]
            fn real() {
                for flags in [ENCRYPTED, CLEAR] {
                    super::super::real(flags, &|open| super::bodies::$name(open));
                }
            }
        })*
    };
}
pub(super) use on_each_backing;

/// Opens the store under test, with this many descriptors at most.
pub(super) type Open<'a, B> = &'a dyn Fn(Option<usize>) -> Arc<Store<B>>;

pub(super) fn simulated(flags: StoreFlags, test: &dyn Fn(Open<'_, SimDisk>)) {
    let disk = new_disk(flags);
    test(&|pinned_max| open_with(disk.clone(), StoreOptions { pinned_max, ..StoreOptions::default() }));
}

pub(super) fn real(flags: StoreFlags, test: &dyn Fn(Open<'_, Posix>)) {
    let dir = tempfile::tempdir().unwrap();
    Store::init(&Posix::open(dir.path()).unwrap(), &root_keys(), KekKind::Sealed, flags).unwrap();
    test(&|pinned_max| {
        open_with(Posix::open(dir.path()).unwrap(), StoreOptions { pinned_max, ..StoreOptions::default() })
    });
}

pub(super) fn errno(e: &StoreError) -> Option<i32> {
    match e {
        StoreError::Backing(e) => e.raw_os_error(),
        _ => None,
    }
}
