//! Making, finding, moving and removing.

use super::super::SetAttr;
use super::*;
use crate::backing::Access;
use crate::backing::sim::Op;
use crate::backing::{RenameMode, XattrMode};

super::on_each_backing!(
    files_come_back,
    a_tree_of_directories,
    renames,
    renames_over_things,
    exchanges,
    hard_links,
    symbolic_links,
    unlinked_while_open,
    bad_names,
    special_files,
    nodes_follow_renames,
    few_descriptors,
    threads_in_one_tree,
);

mod bodies {
    use super::super::{Open, errno, list, long, paths};
    use crate::backing::{Access, Backing, Kind, RenameMode};
    use crate::store::{Node, Store, StoreError};
    use std::sync::Arc;

    fn put<B: Backing>(s: &Store<B>, dir: &Arc<Node<B>>, name: &[u8], data: &[u8]) -> Arc<Node<B>> {
        let (n, _, f) = s.create(dir, name, 0o644, 0o022, None).unwrap();
        assert_eq!(f.write(0, data).unwrap(), data.len());
        n
    }

    fn get<B: Backing>(s: &Store<B>, n: &Arc<Node<B>>) -> Vec<u8> {
        let f = s.open_file(n, Access::Read).unwrap();
        let mut buf = vec![0; 1000];
        let len = f.read(0, &mut buf).unwrap();
        buf.truncate(len);
        buf
    }

    fn find<B: Backing>(s: &Store<B>, dir: &Arc<Node<B>>, name: &[u8]) -> Arc<Node<B>> {
        s.lookup(dir, name).unwrap().0
    }

    fn gone<B: Backing>(s: &Store<B>, dir: &Arc<Node<B>>, name: &[u8]) {
        assert!(matches!(s.lookup(dir, name), Err(StoreError::NotFound)));
    }

    fn clear_names<B: Backing>(s: &Store<B>) -> bool {
        s.shared().keys.flags().plaintext_names
    }

    pub fn files_come_back<B: Backing>(open: Open<'_, B>) {
        let names: Vec<Vec<u8>> = vec![b"a".to_vec(), vec![b'b'; 175], vec![b'c'; 176], vec![0xff; 255], b" ".to_vec()];
        {
            let s = open(None);
            for n in &names {
                put(&s, &s.root(), n, n);
                assert!(matches!(s.create(&s.root(), n, 0o600, 0, None), Err(StoreError::Exists)));
            }
            s.close().unwrap();
        }
        let s = open(None);
        let root = s.root();
        let mut sorted = names.clone();
        sorted.sort();
        assert_eq!(list(&s, &root), sorted);
        for e in s.read_dir(&root).unwrap() {
            let (n, attr) = s.read_dir_node(&root, &e).unwrap();
            assert_eq!((attr.size, attr.mode, attr.ino, e.kind), (e.name.len() as u64, 0o644, e.ino, Kind::File));
            assert_eq!(get(&s, &n), e.name);
            assert!(Arc::ptr_eq(&n, &find(&s, &root, &e.name)));
            s.unlink(&root, &e.name).unwrap();
            gone(&s, &root, &e.name);
            assert!(matches!(s.unlink(&root, &e.name), Err(StoreError::NotFound)));
        }
        assert_eq!(list(&s, &root), Vec::<Vec<u8>>::new());
    }

    pub fn a_tree_of_directories<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let mut at = s.root();
        for i in 0..20u8 {
            let name = if i % 3 == 0 && !clear_names(&s) { long(b'a' + i) } else { vec![b'a' + i] };
            let (d, attr) = s.mkdir(&at, &name, 0o1750, 0o022, None).unwrap();
            assert_eq!((attr.kind, attr.mode, attr.nlink), (Kind::Dir, 0o1750, 2));
            assert!(matches!(s.mkdir(&at, &name, 0o755, 0, None), Err(StoreError::Exists)));
            assert!(matches!(s.unlink(&at, &name), Err(StoreError::IsADirectory)));
            put(&s, &d, b"file", b"deep");
            assert!(matches!(s.rmdir(&at, &name), Err(StoreError::NotEmpty)));
            at = d;
        }
        s.close().unwrap();
        assert_eq!(paths(&open(None)).len(), 40);
        let s = open(None);
        remove_all(&s, &s.root());
        assert_eq!(paths(&s).len(), 0);
        s.close().unwrap();
        // Nothing of the store's own stays behind but what every store has.
        let b = s.shared();
        let own = b.backing.lookup(&b.backing.root().unwrap(), b".envelopefs").unwrap();
        let pool = b.backing.lookup(&own, b"pool").unwrap();
        assert_eq!(b.backing.read_dir(&pool).unwrap(), []);
    }

    fn remove_all<B: Backing>(s: &Store<B>, dir: &Arc<Node<B>>) {
        for e in s.read_dir(dir).unwrap() {
            if e.kind == Kind::Dir {
                let d = find(s, dir, &e.name);
                remove_all(s, &d);
                s.rmdir(dir, &e.name).unwrap();
                assert!(matches!(s.create(&d, b"x", 0o600, 0, None), Err(StoreError::NotFound)));
                assert!(matches!(s.mkdir(&d, b"x", 0o700, 0, None), Err(StoreError::NotFound)));
                assert_eq!(s.read_dir(&d).unwrap(), []);
                gone(s, &d, b"x");
            } else {
                assert!(matches!(s.rmdir(dir, &e.name), Err(StoreError::NotADirectory)));
                s.unlink(dir, &e.name).unwrap();
            }
        }
    }

    pub fn renames<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let root = s.root();
        let (d, _) = s.mkdir(&root, b"d", 0o755, 0, None).unwrap();
        let n = put(&s, &root, b"short", b"content");
        let mut at = (root.clone(), b"short".to_vec());
        // Short to long, long to long, long to short, within and across directories.
        for to in [(&root, long(b'1')), (&d, long(b'2')), (&d, long(b'3')), (&root, b"s".to_vec()), (&d, b"s".to_vec())]
        {
            s.rename(&at.0, &at.1, to.0, &to.1, RenameMode::NoReplace).unwrap();
            gone(&s, &at.0, &at.1);
            assert!(Arc::ptr_eq(&n, &find(&s, to.0, &to.1)));
            assert_eq!(get(&s, &n), b"content");
            at = (to.0.clone(), to.1);
            assert_eq!(paths(&s).len(), 2);
        }
        put(&s, &root, b"other", b"");
        assert!(matches!(s.rename(&d, b"s", &root, b"other", RenameMode::NoReplace), Err(StoreError::Exists)));
        assert!(matches!(s.rename(&d, b"no", &root, b"x", RenameMode::Replace), Err(StoreError::NotFound)));
        assert!(matches!(s.rename(&d, b"s", &root, b"no", RenameMode::Exchange), Err(StoreError::NotFound)));
        let (sub, _) = s.mkdir(&d, &long(b'x'), 0o755, 0, None).unwrap();
        let e = s.rename(&root, b"d", &sub, b"inside", RenameMode::Replace).unwrap_err();
        assert_eq!(errno(&e), Some(libc::EINVAL), "{e}");
        assert_eq!(paths(&s).len(), 4);
        // A sidecar goes with its name: nothing of the store's own is left in a directory emptied by renames.
        s.rename(&d, &long(b'x'), &root, &long(b'y'), RenameMode::Replace).unwrap();
        s.rename(&d, b"s", &root, b"s", RenameMode::Replace).unwrap();
        let left = s.shared().backing.read_dir(&d.fd(&s.shared().backing).unwrap()).unwrap();
        assert_eq!(left.len(), usize::from(!clear_names(&s)), "{left:?}");
        s.rmdir(&root, b"d").unwrap();
    }

    pub fn renames_over_things<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let root = s.root();
        for (from, to) in [(b"f".to_vec(), long(b'g')), (long(b'h'), b"i".to_vec()), (long(b'j'), long(b'k'))] {
            let a = put(&s, &root, &from, b"new");
            let b = put(&s, &root, &to, b"old");
            let held = s.open_file(&b, Access::ReadWrite).unwrap();
            s.rename(&root, &from, &root, &to, RenameMode::Replace).unwrap();
            gone(&s, &root, &from);
            assert!(Arc::ptr_eq(&a, &find(&s, &root, &to)));
            // The replaced file lives on for who has it.
            assert_eq!(get(&s, &b), b"old");
            assert_eq!(s.getattr(&b).unwrap().nlink, 0);
            drop(held);
            s.unlink(&root, &to).unwrap();
        }
        // Directories over empty and not empty ones.
        let (a, _) = s.mkdir(&root, &long(b'a'), 0o755, 0, None).unwrap();
        put(&s, &a, b"in", b"a");
        let (b, _) = s.mkdir(&root, b"b", 0o755, 0, None).unwrap();
        let (_, _, held) = s.create(&b, b"busy", 0o600, 0, None).unwrap();
        drop(held);
        let over = |from: &[u8], to: &[u8]| s.rename(&root, from, &root, to, RenameMode::Replace);
        assert!(matches!(over(&long(b'a'), b"b"), Err(StoreError::NotEmpty)));
        s.unlink(&b, b"busy").unwrap();
        over(&long(b'a'), b"b").unwrap();
        assert!(Arc::ptr_eq(&a, &find(&s, &root, b"b")));
        assert_eq!(paths(&s), ["/b/", "/b/in"]);
        assert!(s.create(&b, b"x", 0o600, 0, None).is_err(), "the replaced directory is gone");
        put(&s, &root, b"file", b"");
        assert!(matches!(over(b"file", b"b"), Err(StoreError::IsADirectory)));
        assert!(matches!(over(b"b", b"file"), Err(StoreError::NotADirectory)));
        over(b"b", b"b").unwrap();
        // Into its own parent's place, and into its own empty child's.
        let (child, _) = s.mkdir(&a, b"child", 0o755, 0, None).unwrap();
        assert!(matches!(s.rename(&a, b"child", &root, b"b", RenameMode::Replace), Err(StoreError::NotEmpty)));
        let e = s.rename(&root, b"b", &a, b"child", RenameMode::Replace).unwrap_err();
        assert_eq!(errno(&e), Some(libc::EINVAL), "{e}");
        assert!(Arc::ptr_eq(&child, &find(&s, &a, b"child")));
        put(&s, &child, b"still", b"usable");
        assert_eq!(paths(&open(None)), ["/b/", "/b/child/", "/b/child/still", "/b/in", "/file"]);
    }

    pub fn exchanges<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let root = s.root();
        let (d, _) = s.mkdir(&root, b"d", 0o755, 0, None).unwrap();
        let inside = put(&s, &d, b"in", b"inside");
        let f = put(&s, &root, &long(b'f'), b"file");
        s.rename(&root, &long(b'f'), &root, b"d", RenameMode::Exchange).unwrap();
        assert!(Arc::ptr_eq(&f, &find(&s, &root, b"d")));
        assert!(Arc::ptr_eq(&d, &find(&s, &root, &long(b'f'))));
        assert_eq!(get(&s, &find(&s, &d, b"in")), b"inside");
        assert!(Arc::ptr_eq(&inside, &find(&s, &d, b"in")));
        let mut names = vec![b"d".to_vec(), long(b'f')];
        names.sort();
        assert_eq!(list(&open(None), &open(None).root()).len(), 2);
        assert_eq!(list(&s, &root), names);
    }

    pub fn hard_links<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let root = s.root();
        let (d, _) = s.mkdir(&root, b"d", 0o755, 0, None).unwrap();
        let n = put(&s, &root, b"one", b"linked");
        assert_eq!(s.link(&n, &d, &long(b'2')).unwrap().nlink, 2);
        assert_eq!(s.link(&n, &root, b"three").unwrap().nlink, 3);
        assert!(matches!(s.link(&n, &root, b"three"), Err(StoreError::Exists)));
        assert!(matches!(s.link(&d, &root, b"dir"), Err(StoreError::NotPermitted)));
        assert!(Arc::ptr_eq(&n, &find(&s, &d, &long(b'2'))));
        s.rename(&root, b"one", &root, b"three", RenameMode::Replace).unwrap();
        assert_eq!(s.getattr(&n).unwrap().nlink, 3, "rename of two names of one inode does nothing");
        s.unlink(&root, b"one").unwrap();
        s.unlink(&root, b"three").unwrap();
        assert_eq!(s.getattr(&n).unwrap().nlink, 1);
        // Its only name now is one it was not first known by.
        drop(n);
        let n = find(&s, &d, &long(b'2'));
        assert_eq!(get(&s, &n), b"linked");
        s.unlink(&d, &long(b'2')).unwrap();
        assert_eq!(s.getattr(&n).unwrap().nlink, 0);
        assert!(s.link(&n, &root, b"back").is_err());
    }

    pub fn symbolic_links<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let root = s.root();
        for len in [1usize, 60, 3032, 3033, 4095] {
            let target = vec![b't'; len];
            let name = format!("link{len}").into_bytes();
            let (n, attr) = s.symlink(&root, &name, &target, None).unwrap();
            assert_eq!((attr.size, attr.kind), (len as u64, Kind::Symlink));
            assert_eq!(s.readlink(&n).unwrap(), target);
            let fresh = open(None);
            let (n2, attr) = fresh.lookup(&fresh.root(), &name).unwrap();
            assert_eq!((attr.size, fresh.readlink(&n2).unwrap()), (len as u64, target.clone()));
            // A second name, then none: who has it open still reads it.
            s.link(&n, &root, b"second").unwrap();
            s.unlink(&root, &name).unwrap();
            assert_eq!(s.readlink(&n).unwrap(), target);
            s.unlink(&root, b"second").unwrap();
            assert_eq!(s.readlink(&n).unwrap(), target);
        }
        // A long target goes when its link is replaced, too.
        s.symlink(&root, b"a", &[b'a'; 4000], None).unwrap();
        put(&s, &root, b"b", b"");
        s.rename(&root, b"b", &root, b"a", RenameMode::Replace).unwrap();
        let b = &s.shared().backing;
        let own = b.lookup(&b.root().unwrap(), b".envelopefs").unwrap();
        assert_eq!(b.read_dir(&b.lookup(&own, b"links").unwrap()).unwrap(), []);
        assert!(matches!(s.symlink(&root, b"x", &[b'a'; 4096], None), Err(StoreError::NameTooLong)));
        assert!(matches!(s.symlink(&root, b"x", b"", None), Err(StoreError::NotFound)));
        assert!(matches!(s.readlink(&find(&s, &root, b"a")), Err(StoreError::Invalid)));
    }

    pub fn unlinked_while_open<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let root = s.root();
        drop(put(&s, &root, b"f", b"kept"));
        // Known by its name only, when the name goes.
        let n = find(&s, &root, b"f");
        s.unlink(&root, b"f").unwrap();
        assert_eq!(get(&s, &n), b"kept");
        let f = s.open_file(&n, Access::ReadWrite).unwrap();
        f.write(4, b" on").unwrap();
        s.sync_file(&n, &f).unwrap();
        let again = put(&s, &root, b"f", b"new");
        assert_ne!(again.key(), n.key());
        assert_ne!(again.id(), n.id());
        assert_eq!(get(&s, &n), b"kept on");
        assert_eq!(get(&s, &again), b"new");
    }

    pub fn bad_names<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let root = s.root();
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0b"] {
            assert!(matches!(s.create(&root, bad, 0o600, 0, None), Err(StoreError::BadName)), "{bad:?}");
            assert!(matches!(s.mkdir(&root, bad, 0o700, 0, None), Err(StoreError::BadName)));
            assert!(matches!(s.symlink(&root, bad, b"t", None), Err(StoreError::BadName)));
            gone(&s, &root, bad);
        }
        assert!(matches!(s.lookup(&root, &[b'a'; 256]), Err(StoreError::NameTooLong)));
        assert!(matches!(s.create(&root, &[b'a'; 256], 0o600, 0, None), Err(StoreError::NameTooLong)));
        let n = put(&s, &root, b"f", b"");
        assert!(matches!(s.lookup(&n, b"x"), Err(StoreError::NotADirectory)));
        assert!(matches!(s.read_dir(&n), Err(StoreError::NotADirectory)));
        for own in [&b".envelopefs"[..], b".envelopefs.dir", b".envelopefs.new.1"] {
            if clear_names(&s) {
                assert!(matches!(s.mkdir(&root, own, 0o700, 0, None), Err(StoreError::BadName)));
                assert!(s.rename(&root, b"f", &root, own, RenameMode::Replace).is_err());
                gone(&s, &root, own);
            } else {
                s.mkdir(&root, own, 0o700, 0, None).unwrap();
                s.rmdir(&root, own).unwrap();
            }
        }
        assert_eq!(list(&s, &root), [b"f"]);
    }

    pub fn special_files<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let root = s.root();
        for kind in [Kind::Fifo, Kind::Socket] {
            let (n, attr) = s.mknod(&root, &long(b'p'), kind, 0o640, 0o022, 0, None).unwrap();
            assert_eq!((n.kind(), attr.mode, attr.size), (kind, 0o640, 0));
            assert!(s.open_file(&n, Access::Read).is_err());
            s.unlink(&root, &long(b'p')).unwrap();
        }
        let (n, _) = s.mknod(&root, b"plain", Kind::File, 0o600, 0, 0, None).unwrap();
        assert_eq!(get(&s, &n), b"");
        assert!(matches!(s.mknod(&root, b"d", Kind::Dir, 0o600, 0, 0, None), Err(StoreError::Invalid)));
    }

    pub fn nodes_follow_renames<B: Backing>(open: Open<'_, B>) {
        {
            let s = open(None);
            let (a, _) = s.mkdir(&s.root(), b"a", 0o755, 0, None).unwrap();
            let (b, _) = s.mkdir(&a, b"b", 0o755, 0, None).unwrap();
            put(&s, &b, b"f", b"x");
        }
        // All known by name only.
        let s = open(None);
        let root = s.root();
        let a = find(&s, &root, b"a");
        let b = find(&s, &a, b"b");
        let f = find(&s, &b, b"f");
        s.rename(&root, b"a", &root, b"z", RenameMode::Replace).unwrap();
        s.rename(&a, b"b", &root, &long(b'b'), RenameMode::Replace).unwrap();
        s.rename(&b, b"f", &a, b"g", RenameMode::Replace).unwrap();
        assert_eq!(get(&s, &f), b"x");
        s.track_moves(true);
        s.rename(&a, b"g", &b, b"h", RenameMode::Replace).unwrap();
        put(&s, &a, b"linked", b"");
        s.link(&find(&s, &a, b"linked"), &a, b"i").unwrap();
        // Kept once, however it moves.
        s.link(&f, &a, b"j").unwrap();
        put(&s, &a, b"new", b"");
        let moved = s.take_moved();
        assert_eq!((moved.nodes.len(), moved.overflowed), (2, false));
        let st = s.shared().backing.stat(&moved.nodes[0]).unwrap();
        assert_eq!((st.dev, st.ino), f.key());
        s.rename(&b, b"h", &b, b"h2", RenameMode::Replace).unwrap();
        s.rename(&b, b"h2", &b, b"h", RenameMode::Replace).unwrap();
        assert!(s.take_moved().nodes.is_empty());
        s.track_moves(true);
        s.rename(&b, b"h", &b, b"h2", RenameMode::Replace).unwrap();
        assert_eq!(s.take_moved().nodes.len(), 1);
        s.rename(&b, b"h2", &b, b"h", RenameMode::Replace).unwrap();
        s.track_moves(false);
        s.rename(&b, b"h", &a, b"h", RenameMode::Replace).unwrap();
        assert!(s.take_moved().nodes.is_empty());
    }

    pub fn few_descriptors<B: Backing>(open: Open<'_, B>) {
        const MAX: usize = 40;
        {
            let s = open(None);
            let mut at = s.root();
            for i in 0..100u8 {
                put(&s, &at, b"f", &[i]);
                at = s.mkdir(&at, b"d", 0o755, 0, None).unwrap().0;
            }
            s.close().unwrap();
        }
        let s = open(Some(MAX));
        let (mut at, mut files, mut dirs) = (s.root(), Vec::new(), Vec::new());
        for _ in 0..100 {
            files.push(find(&s, &at, b"f"));
            at = find(&s, &at, b"d");
            dirs.push(at.clone());
        }
        for _ in 0..3 {
            for (i, f) in files.iter().enumerate() {
                assert_eq!(get(&s, f), [i as u8]);
                assert_eq!(s.getattr(f).unwrap().size, 1);
            }
            assert!(s.pinned() <= MAX + 64, "{} descriptors", s.pinned());
        }
        // The whole path by name, deepest first.
        for d in dirs.iter().rev() {
            s.getattr(d).unwrap();
        }
        drop((at, files, dirs));
        assert!(s.pinned() <= MAX + 1);
    }

    pub fn threads_in_one_tree<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let root = s.root();
        let dirs: Vec<_> = [b"a", b"b", b"c"].iter().map(|n| s.mkdir(&root, *n, 0o755, 0, None).unwrap().0).collect();
        std::thread::scope(|scope| {
            for t in 0..6usize {
                let (s, dirs) = (&s, &dirs);
                scope.spawn(move || {
                    for i in 0..60usize {
                        let (x, y) = (&dirs[(t + i) % 3], &dirs[(t * i + 1) % 3]);
                        let name =
                            if i % 2 == 0 { vec![b'0' + (i % 5) as u8; 200] } else { vec![b'0' + (i % 7) as u8] };
                        // Everything may fail because of another thread, but only with what POSIX allows.
                        let results = [
                            s.create(x, &name, 0o644, 0, None).map(drop),
                            s.mkdir(y, &name, 0o755, 0, None).map(drop),
                            s.rename(x, &name, y, &name, RenameMode::Replace),
                            s.rename(y, &name, x, &name, RenameMode::Exchange),
                            s.lookup(x, &name).and_then(|(n, _)| s.getattr(&n)).map(drop),
                            s.read_dir(x).map(drop),
                            s.rmdir(y, &name),
                            s.unlink(x, &name),
                        ];
                        for r in results {
                            use StoreError::{Exists, IsADirectory, NotADirectory, NotEmpty, NotFound};
                            match r {
                                Ok(()) | Err(Exists | IsADirectory | NotADirectory | NotEmpty | NotFound) => {}
                                Err(e) => panic!("{e:?}"),
                            }
                        }
                    }
                });
            }
        });
        let there = paths(&s);
        s.close().unwrap();
        assert_eq!(paths(&open(None)), there);
    }
}

#[test]
fn init_refuses_what_is_not_empty() {
    let disk = new_disk(ENCRYPTED);
    let again = Store::init(&disk, &root_keys(), KekKind::Sealed, ENCRYPTED);
    assert!(matches!(again, Err(StoreError::NotEmptyForInit(_))));
    let disk = SimDisk::default();
    disk.mkdir(&disk.root().unwrap(), b"lost+found", 0o700, 0).unwrap();
    Store::init(&disk, &root_keys(), KekKind::Sealed, ENCRYPTED).unwrap();
    let s = open(disk);
    assert_eq!(list(&s, &s.root()), Vec::<Vec<u8>>::new());
    let disk = SimDisk::default();
    disk.mkdir(&disk.root().unwrap(), b"data", 0o700, 0).unwrap();
    assert!(matches!(
        Store::init(&disk, &root_keys(), KekKind::Sealed, ENCRYPTED),
        Err(StoreError::NotEmptyForInit(_))
    ));
}

#[test]
fn read_only_changes_nothing() {
    let (disk, s) = new_sim();
    let (d, _) = s.mkdir(&s.root(), b"d", 0o755, 0, None).unwrap();
    drop(d);
    s.close().unwrap();
    let before = disk.operations();
    let s = open_with(disk.clone(), StoreOptions { read_only: true, ..StoreOptions::default() });
    let root = s.root();
    let (d, _) = s.lookup(&root, b"d").unwrap();
    let ro = |r: Result<(), StoreError>| assert!(matches!(r, Err(StoreError::ReadOnly)));
    ro(s.create(&root, b"f", 0o600, 0, None).map(drop));
    ro(s.mkdir(&root, b"e", 0o700, 0, None).map(drop));
    ro(s.rmdir(&root, b"d"));
    ro(s.unlink(&root, b"d"));
    ro(s.symlink(&root, b"l", b"t", None).map(drop));
    ro(s.rename(&root, b"d", &root, b"e", RenameMode::Replace));
    ro(s.setattr(&d, &SetAttr::default(), None).map(drop));
    ro(s.set_xattr(&d, b"user.x", b"", XattrMode::Any));
    s.settle(std::time::Duration::ZERO).unwrap();
    s.close().unwrap();
    assert_eq!(disk.operations(), before);
}

/// A file found by its new name and opened before its maker had registered it got a second core: two keys for one
/// file.
#[test]
fn a_file_opened_while_it_is_being_made_has_one_core() {
    let (_disk, s) = new_sim();
    let (n, _, f) = s.create(&s.root(), b"f", 0o600, 0, None).unwrap();
    let fd = n.fd(s.backing()).unwrap();
    let other = super::super::file::FileCore::new(s.shared(), fd);
    let there = s.table.put_core(n.key(), &other).expect("the core that is there stays");
    assert!(Arc::ptr_eq(&there, f.core()));
    drop(f);
    std::thread::scope(|t| {
        for i in 0..50u8 {
            let name = format!("n{i}").into_bytes();
            let same = name.clone();
            t.spawn({
                let s = &s;
                move || {
                    while s.lookup(&s.root(), &same).and_then(|(n, _)| s.open_file(&n, Access::ReadWrite)).is_err() {}
                }
            });
            let (n, _, f) = s.create(&s.root(), &name, 0o600, 0, None).unwrap();
            f.write(0, b"x").unwrap();
            assert!(Arc::ptr_eq(s.open_file(&n, Access::ReadWrite).unwrap().core(), f.core()));
        }
    });
}

/// A directory that takes an empty one's place is moved by several calls. One that failed in between had moved, and the
/// scan did not hear of it.
#[test]
fn a_rename_that_fails_half_way_is_on_the_list_of_moves() {
    for fails in 0..4 {
        let (disk, s) = new_sim();
        let root = s.root();
        for d in [b"full", b"none"] {
            s.mkdir(&root, d, 0o755, 0, None).unwrap();
        }
        s.track_moves(true);
        disk.fail_next(Some(crate::backing::sim::Op::Rename), fails, libc::ENOSPC);
        let before = s.lookup(&root, b"full").unwrap().0.key();
        let done = s.rename(&root, b"full", &root, b"none", RenameMode::Replace);
        disk.clear_faults();
        let moved = s.take_moved();
        let listed = moved.nodes.iter().any(|n| {
            let st = disk.stat(n).unwrap();
            (st.dev, st.ino) == before
        });
        assert!(listed && !moved.overflowed, "{fails}: {done:?}");
    }
}

/// It listed the whole directory, names decrypted and sidecars read, to find that it had too many.
#[test]
fn a_listing_with_a_limit_looks_at_no_name_of_a_directory_that_has_more() {
    let (disk, s) = new_sim();
    (0..4).for_each(|n| drop(s.create(&s.root(), &long(b'a' + n), 0o644, 0, None).unwrap()));
    // Four files, each with the one that holds the rest of its name, and the directory's id and folder.
    let (all, _) = s.list_up_to(&s.root(), 10).unwrap().unwrap();
    assert_eq!(all.len(), 4);
    // Whoever opens a file from now on, as for the rest of a name, gets an error.
    disk.fail_from(Some(Op::Open), 0, libc::EIO);
    assert!(s.list_up_to(&s.root(), 10).unwrap().is_some_and(|(names, bad)| names.is_empty() && bad.len() == 4));
    assert_eq!(s.list_up_to(&s.root(), 9).unwrap(), None);
}
