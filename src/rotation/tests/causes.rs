//! Each kind of failure: the run is incomplete, says which file and why, and a run after the cause is mended completes.

use super::*;
use crate::backing::sim::Op;
use crate::kms::KmsError;
use crate::kms::scripted::{Behaviour, Call};

/// Something that goes wrong with one file or directory.
struct Cause {
    code: &'static str,
    /// Part of what is said about it.
    why: &'static str,
    directory: bool,
    kind: KekKind,
    /// Brings it about, before the run; what is not about a certain file is done by `in_pass`.
    spoil: fn(&SimDisk, &Scripted, &[u8]),
    /// Brings it about at the beginning of each pass.
    in_pass: Option<(Op, u64, i32)>,
    mend: fn(&SimDisk, &Scripted, &[u8]),
}

fn file_id(disk: &SimDisk, path: &[u8]) -> [u8; 16] {
    disk.read_raw(path).unwrap()[40..56].try_into().unwrap()
}

fn nothing(_: &SimDisk, _: &Scripted, _: &[u8]) {}

fn causes() -> Vec<Cause> {
    let damage = |at: &'static str, why, spoil| Cause {
        code: at,
        why,
        directory: false,
        kind: KekKind::Sealed,
        spoil,
        in_pass: None,
        // Puts the saved first page back.
        mend: nothing,
    };
    let io = |code, why, directory, op, after, errno| Cause {
        code,
        why,
        directory,
        kind: KekKind::Sealed,
        spoil: nothing,
        in_pass: Some((op, after, errno)),
        mend: nothing,
    };
    let service = |code, why, spoil| Cause {
        code,
        why,
        directory: false,
        kind: KekKind::External,
        spoil,
        in_pass: None,
        mend: |disk, root, path| {
            root.about(file_id(disk, path), Behaviour::Obey);
        },
    };
    vec![
        damage("header-magic", "not an envelopefs file", |d, _, p| d.write_raw(p, 0, &[0x55; 2048]).unwrap()),
        damage("header-unreadable", "neither header slot has a valid checksum", |d, _, p| {
            [200, 1224].iter().for_each(|at| d.flip_bit(p, *at, 0).unwrap());
        }),
        // The third listing of a pass is that of d, after the pool and the root.
        io("EACCES", "denied", true, Op::ReadDir, 2, libc::EACCES),
        io("EIO", "Input/output error", true, Op::ReadDir, 3, libc::EIO),
        io("EIO", "Input/output error", false, Op::Open, 1, libc::EIO),
        io("EIO", "Input/output error", false, Op::Read, 0, libc::EIO),
        io("EACCES", "denied", false, Op::Open, 0, libc::EACCES),
        service("kms-denied", "no such permission", |d, root, p| {
            root.about(file_id(d, p), Behaviour::Fail(KmsError::Denied("no such permission".into())));
        }),
        service("kms-unreachable", "gone", |d, root, p| {
            root.about(file_id(d, p), Behaviour::Fail(KmsError::Unreachable("gone".into())));
        }),
        service("kms-not-found", "no such key", |d, root, p| {
            root.about(file_id(d, p), Behaviour::Fail(KmsError::NotFound("no such key".into())));
        }),
        // It says that all went well, and gives or takes another key.
        service("commitment", "key commitment does not match", |d, root, p| {
            root.about(file_id(d, p), Behaviour::AnotherKey);
        }),
    ]
}

/// A store under a KEK of this kind, one file of it, and that file's header.
fn prepared(kind: KekKind) -> (SimDisk, Arc<Scripted>, Tree, Vec<u8>, Vec<u8>) {
    let (disk, root, tree) = filled();
    if kind == KekKind::External {
        rotate(&open(disk.clone(), &root), &Options { kek: Some(kind), ..one_job() }).unwrap();
    }
    let path = content_files(&disk).remove(0);
    let header = disk.read_raw(&path).unwrap()[..2048].to_vec();
    (disk, root, tree, path, header)
}

#[test]
fn each_kind_of_failure_is_told_with_its_file_and_mended_by_the_next_run() {
    for cause in causes() {
        let (disk, root, tree, path, header) = prepared(cause.kind);
        let store = open(disk.clone(), &root);
        let old = active(&store.shared().keys);
        (cause.spoil)(&disk, &root, &path);
        let report =
            rotate_with(&store, &Options { destroy_old: true, ..one_job() }, |s| match (s.state, cause.in_pass) {
                (State::Sweeping | State::Verifying, Some((op, after, errno))) => {
                    disk.fail_next(Some(op), after, errno)
                }
                _ => disk.clear_faults(),
            });
        let report = report.unwrap_or_else(|e| panic!("{}: {e}", cause.code));
        assert_eq!(report.outcome, Outcome::Incomplete, "{}: {report:?}", cause.code);
        assert!(report.failures_total >= 1 && report.failures_total == report.failures.len() as u64);
        for f in &report.failures {
            assert_eq!((f.code.as_str(), f.directory), (cause.code, cause.directory), "{report:?}");
            assert!(f.message.contains(cause.why), "{f:?}");
            if cause.in_pass.is_none() {
                assert_eq!(f.path.as_bytes(), path, "{}", cause.code);
            } else {
                assert!(disk.paths().iter().any(|(p, _)| *p == f.path.as_bytes()), "{f:?}");
            }
        }
        assert_eq!((report.retired.len(), report.destroyed.len(), report.kept.len()), (0, 0, 0), "{}", cause.code);
        assert!(is_unfinished(&store.shared().keys.snapshot()));
        assert!(store.shared().keys.kek(old).is_ok(), "{}: the old KEK still opens", cause.code);
        (cause.mend)(&disk, &root, &path);
        if cause.in_pass.is_none() && cause.kind == KekKind::Sealed {
            disk.write_raw(&path, 0, &header).unwrap();
        }
        let again = rotate(&store, &Options { destroy_old: true, ..one_job() }).unwrap();
        assert_eq!((again.outcome, again.resumed, again.target), (Outcome::Complete, true, report.target));
        assert!(again.destroyed.contains(&old));
        assert_eq!(keks_named(&disk), BTreeSet::from([again.target]), "{}", cause.code);
        assert_eq!(read_all(&open(disk, &root)), tree, "{}", cause.code);
    }
}

/// The service takes the DEK, says that all went well, and has wrapped another one, or nothing at all.
#[test]
fn a_service_that_lies_about_one_wrap_in_the_sweep_changes_nothing_and_is_told() {
    for (lie, code) in [(Behaviour::AnotherKey, "commitment"), (Behaviour::Garbage, "wrap-auth")] {
        let (disk, root, mut tree, _, _) = prepared(KekKind::Sealed);
        let store = open(disk.clone(), &root);
        // With two names a file gets two tries.
        store.unlink(&dir(&store, "d/e"), b"hard link").unwrap();
        tree.remove("d/e/hard link").unwrap();
        let old = active(&store.shared().keys);
        let external = Options { kek: Some(KekKind::External), ..one_job() };
        let report = rotate_with(&store, &external, |s| {
            if s.state == State::Sweeping {
                root.then(Call::Wrap, lie.clone());
            }
        });
        let report = report.unwrap();
        assert_eq!((report.outcome, report.failures_total), (Outcome::Incomplete, 1), "{lie:?}: {report:?}");
        let f = &report.failures[0];
        assert_eq!(f.code, code, "{lie:?}: {f:?}");
        let named = slots(&disk, f.path.as_bytes());
        assert_eq!((named.a.unwrap().kek, named.b.unwrap().kek), (old, old), "its header is as it was");
        assert_eq!(read_all(&open(disk.clone(), &root)), tree);
        let again = rotate(&store, &external).unwrap();
        assert_eq!((again.outcome, again.resumed), (Outcome::Complete, true));
        assert_eq!(read_all(&open(disk, &root)), tree);
    }
}
