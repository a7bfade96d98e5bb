//! Names, directory ids, symbolic links and extended attributes.

use super::*;
use envelopefs::backing::sim::SimNode;
use envelopefs::backing::{RenameMode, XattrMode};
use envelopefs::format::xattrs::{XattrKeys, XattrName};

/// A name whose encrypted form is too long for an entry.
fn long(c: u8) -> Vec<u8> {
    vec![c; 250]
}

/// A long and a short target of a symbolic link.
fn target(c: u8, len: usize) -> Vec<u8> {
    vec![c; len]
}

impl World {
    /// With two directories of three files each, four links, and attributes on two files.
    fn tree() -> Self {
        let w = Self::new();
        let s = w.mount(false);
        let root = s.root();
        for d in [b"d1", b"d2"] {
            let (dir, _) = s.mkdir(&root, d, 0o755, 0, None).unwrap();
            for name in [b"a".to_vec(), [d, &b" own"[..]].concat(), long(d[1])] {
                let (_, _, f) = s.create(&dir, &name, 0o600, 0, None).unwrap();
                write(&f, 0, &[&d[..], &name].concat());
            }
        }
        for (name, c, len) in [(b"l1", b'1', 20), (b"l2", b'2', 20), (b"L1", b'3', 4000), (b"L2", b'4', 4000)] {
            s.symlink(&root, name, &target(c, len), None).unwrap();
        }
        for file in [&b"small"[..], b"small too"] {
            let (n, _) = s.lookup(&root, file).unwrap();
            for (name, value) in [(&b"user.a"[..], &b"a of "[..]), (b"user.b", b"b of "), (&long_xattr(), b"long of ")]
            {
                s.set_xattr(&n, name, &[value, file].concat(), XattrMode::Any).unwrap();
            }
        }
        s.close().unwrap();
        drop(root);
        drop(s);
        w
    }

    fn node(&self, path: &[u8]) -> SimNode {
        let names = path.split(|c| *c == b'/').filter(|n| !n.is_empty());
        names.fold(self.disk.root().unwrap(), |at, n| self.disk.lookup(&at, n).unwrap())
    }

    /// Names and backing names in a directory of the root, or the code that listing it gives.
    fn list(&self, dir: &str) -> std::result::Result<BTreeMap<Vec<u8>, Vec<u8>>, String> {
        let before = self.disk.operations();
        let s = self.mount(true);
        let (d, _) = s.lookup(&s.root(), dir.as_bytes()).unwrap();
        let r = s.read_dir(&d).map_err(|e| e.code())?;
        drop((d, s));
        assert_eq!(self.disk.operations(), before, "listing changed the backing directory");
        Ok(r.into_iter().map(|e| (e.name, e.backing)).collect())
    }

    /// The content of a file in a directory of the root, or the code.
    fn read_in(&self, dir: &str, name: &[u8]) -> std::result::Result<Vec<u8>, String> {
        let s = self.mount(true);
        let read = || -> Result<Vec<u8>> {
            let (d, _) = s.lookup(&s.root(), dir.as_bytes())?;
            let (n, a) = s.lookup(&d, name)?;
            let mut content = vec![0; a.size as usize];
            s.open_file(&n, Access::Read)?.read(0, &mut content)?;
            Ok(content)
        };
        read().map_err(|e| e.code())
    }

    /// Moves an entry below, and its sidecar if it has one.
    fn rename_raw(&self, from: &[u8], name: &[u8], to: &[u8], new: &[u8], mode: RenameMode) {
        self.disk.rename(&self.node(from), name, &self.node(to), new, mode).unwrap();
    }

    fn readlink(&self, name: &[u8]) -> std::result::Result<Vec<u8>, String> {
        let before = self.disk.operations();
        let s = self.mount(true);
        let (n, _) = s.lookup(&s.root(), name).unwrap();
        let r = s.readlink(&n).map_err(|e| e.code());
        drop((n, s));
        assert_eq!(self.disk.operations(), before, "reading a link changed the backing directory");
        r
    }

    /// Puts another text in the place of a link's.
    fn relink(&self, name: &str, text: &[u8]) {
        let backing = self.path(name);
        let root = self.disk.root().unwrap();
        self.disk.unlink(&root, &backing).unwrap();
        self.disk.symlink(&root, &backing, text).unwrap();
    }

    fn link_text(&self, name: &str) -> Vec<u8> {
        self.disk.readlink(&self.node(&self.path(name))).unwrap()
    }

    fn xattr(&self, file: &str, name: &[u8]) -> std::result::Result<Vec<u8>, String> {
        let s = self.mount(true);
        let (n, _) = s.lookup(&s.root(), file.as_bytes()).unwrap();
        s.get_xattr(&n, name).map_err(|e| e.code())
    }

    fn xattrs(&self, file: &str) -> Vec<Vec<u8>> {
        let s = self.mount(true);
        let (n, _) = s.lookup(&s.root(), file.as_bytes()).unwrap();
        let mut all = s.list_xattr(&n).unwrap();
        all.sort();
        all
    }

    /// The backing names of a file's attributes: `user.a`, `user.b`, the long one.
    fn xattr_names(&self, file: &str) -> [Vec<u8>; 3] {
        let s = self.mount(true);
        let keys = XattrKeys::new(s.shared().keys.secret());
        let node = self.node(&self.path(file));
        let all = self.disk.list_xattr(&node).unwrap();
        let pick = |want: &[u8]| all.iter().find(|n| is_named(&keys, n, want)).cloned();
        [b"user.a".to_vec(), b"user.b".to_vec(), long_xattr()].map(|want| pick(&want).expect("it was set"))
    }
}

fn is_named(keys: &XattrKeys, backing: &[u8], plain: &[u8]) -> bool {
    matches!(keys.encode_name(plain), XattrName::Sealed { backing: b, .. } if b == backing)
}

fn long_xattr() -> Vec<u8> {
    [&b"user."[..], &[b'x'; 240]].concat()
}

fn at(dir: &[u8], name: &[u8]) -> String {
    String::from_utf8([dir, b"/", name].concat()).unwrap()
}

#[test]
fn an_entry_moved_to_another_directory() {
    let w = World::tree();
    let (d1, d2) = (w.path("d1"), w.path("d2"));
    let own = w.list("d1").unwrap()[&b"d1 own"[..]].clone();
    w.rename_raw(&d1, &own, &d2, &own, RenameMode::Replace);
    assert_eq!(w.read_in("d1", b"d1 own"), Err("ENOENT".into()));
    assert_eq!(w.read_in("d2", b"d1 own"), Err("ENOENT".into()));
    assert_eq!(w.list("d1").unwrap().len(), 2);
    assert_eq!(w.list("d2").unwrap().len(), 3, "left out");
    assert_eq!(w.check(), [(at(&d2, &own), "name-auth".to_owned())]);
    w.others_are_fine(&[]);
    w.rename_raw(&d2, &own, &d1, &own, RenameMode::Replace);
    assert_eq!(w.read_in("d1", b"d1 own").unwrap(), b"d1d1 own");
}

#[test]
fn entries_of_the_same_name_swapped_between_directories() {
    let w = World::tree();
    let (d1, d2) = (w.path("d1"), w.path("d2"));
    let (a1, a2) = (w.list("d1").unwrap()[&b"a"[..]].clone(), w.list("d2").unwrap()[&b"a"[..]].clone());
    assert_ne!(a1, a2, "one name, two directories");
    // Each under the name it had.
    w.rename_raw(&d1, &a1, &d2, &a1, RenameMode::Replace);
    w.rename_raw(&d2, &a2, &d1, &a2, RenameMode::Replace);
    for d in ["d1", "d2"] {
        assert_eq!(w.read_in(d, b"a"), Err("ENOENT".into()));
    }
    let mut want = [(at(&d2, &a1), "name-auth".to_owned()), (at(&d1, &a2), "name-auth".to_owned())];
    want.sort();
    let mut found = w.check();
    found.sort();
    assert_eq!(found, want);
    // Each under the name that belongs there: two whole files exchanged, which version 1 does not notice.
    w.rename_raw(&d2, &a1, &d1, &a1, RenameMode::Replace);
    w.rename_raw(&d1, &a2, &d2, &a2, RenameMode::Replace);
    w.rename_raw(&d1, &a1, &d2, &a2, RenameMode::Exchange);
    assert_eq!(w.read_in("d1", b"a").unwrap(), b"d2a");
    assert_eq!(w.check(), []);
}

#[test]
fn a_name_that_was_edited() {
    let w = World::tree();
    let d1 = w.path("d1");
    let own = w.list("d1").unwrap()[&b"d1 own"[..]].clone();
    for i in 0..own.len() {
        let w = w.copy();
        let mut edited = own.clone();
        edited[i] = if edited[i] == b'A' { b'B' } else { b'A' };
        w.rename_raw(&d1, &own, &d1, &edited, RenameMode::Replace);
        assert_eq!(w.list("d1").unwrap().len(), 2);
        assert_eq!(w.check(), [(at(&d1, &edited), "name-auth".to_owned())], "character {i}");
    }
}

#[test]
fn sidecars() {
    let w = World::tree();
    let (d1, d2) = (w.path("d1"), w.path("d2"));
    let (name, backing) = (long(b'1'), w.list("d1").unwrap()[&long(b'1')].clone());
    let sidecar = [&d1[..], b"/", &backing, b".name"].concat();
    let text = w.disk.read_raw(&sidecar).unwrap();
    let theirs = [&d2[..], b"/", &w.list("d2").unwrap()[&long(b'2')], b".name"].concat();
    let theirs = w.disk.read_raw(&theirs).unwrap();
    let mut bad = vec![vec![], text[1..].to_vec(), [&text[..], b"A"].concat(), theirs, vec![b'A'; 5000]];
    bad.extend((0..text.len()).step_by(37).map(|i| {
        let mut t = text.clone();
        t[i] = if t[i] == b'A' { b'B' } else { b'A' };
        t
    }));
    for b in bad {
        w.disk.replace_raw(&sidecar, &b).unwrap();
        assert_eq!(w.list("d1").unwrap().len(), 2, "left out of the listing");
        assert_eq!(w.check(), [(at(&d1, &backing), "name-sidecar".to_owned())]);
        assert_eq!(w.read_in("d1", &name).unwrap(), [b"d1", &name[..]].concat(), "found by its name all the same");
    }
    w.disk.unlink(&w.node(&d1), &[&backing[..], b".name"].concat()).unwrap();
    assert_eq!(w.list("d1").unwrap().len(), 2);
    assert_eq!(w.check(), [(at(&d1, &backing), "name-sidecar".to_owned())]);
    assert_eq!(w.list("d2").unwrap().len(), 3);
}

#[test]
fn a_long_name_moved_with_its_sidecar() {
    let w = World::tree();
    let (d1, d2) = (w.path("d1"), w.path("d2"));
    let backing = w.list("d1").unwrap()[&long(b'1')].clone();
    let sidecar = [&backing[..], b".name"].concat();
    w.rename_raw(&d1, &backing, &d2, &backing, RenameMode::Replace);
    w.rename_raw(&d1, &sidecar, &d2, &sidecar, RenameMode::Replace);
    assert_eq!(w.list("d2").unwrap().len(), 3);
    assert_eq!(w.check(), [(at(&d2, &backing), "name-auth".to_owned())]);
    assert_eq!(w.read_in("d2", &long(b'1')), Err("ENOENT".into()));
}

#[test]
fn directory_ids() {
    let (w, other) = (World::tree(), World::build());
    let (d1, d2) = (w.path("d1"), w.path("d2"));
    let id = [&d1[..], b"/.envelopefs.dir"].concat();
    let sealed = w.disk.read_raw(&id).unwrap();
    let mut bad = vec![vec![], sealed[1..].to_vec(), [&sealed[..], b"x"].concat(), vec![0; 44]];
    bad.push(other.disk.read_raw(".envelopefs.dir").unwrap());
    bad.extend((0..44).map(|i| {
        let mut s = sealed.clone();
        s[i] ^= 1 << (i % 8);
        s
    }));
    let path = String::from_utf8(d1.clone()).unwrap();
    for b in bad {
        w.disk.replace_raw(&id, &b).unwrap();
        assert_eq!(w.list("d1"), Err("dir-id-auth".into()));
        assert_eq!(w.read_in("d1", b"a"), Err("dir-id-auth".into()));
        assert_eq!(w.check(), [(path.clone(), "dir-id-auth".to_owned())]);
        assert_eq!(w.read_in("d2", b"a").unwrap(), b"d2a");
    }
    w.disk.unlink(&w.node(&d1), b".envelopefs.dir").unwrap();
    assert_eq!(w.list("d1"), Err("dir-id-missing".into()));
    assert_eq!(w.check(), [(path, "dir-id-missing".to_owned())]);
    w.others_are_fine(&[]);
    // Another directory's: authentic, but no name here is under it.
    let theirs = w.disk.read_raw([&d2[..], b"/.envelopefs.dir"].concat()).unwrap();
    w.disk.create(&w.node(&d1), b".envelopefs.dir", 0o600, 0).unwrap();
    w.disk.replace_raw(&id, &theirs).unwrap();
    assert_eq!(w.list("d1").unwrap().len(), 0);
    assert_eq!(w.read_in("d1", b"a"), Err("ENOENT".into()));
    let found = w.check();
    assert!(found.len() == 3 && found.iter().all(|(_, c)| c == "name-auth"), "{found:?}");
    assert_eq!(w.list("d2").unwrap().len(), 3);
    w.disk.replace_raw(&id, &sealed).unwrap();
    assert_eq!(w.read_in("d1", b"a").unwrap(), b"d1a");
}

#[test]
fn the_root_without_its_id() {
    let w = World::tree();
    let sealed = w.disk.read_raw(".envelopefs.dir").unwrap();
    w.disk.replace_raw(".envelopefs.dir", &[0; 44]).unwrap();
    let s = w.mount(true);
    assert_eq!(code(s.read_dir(&s.root())), "dir-id-auth");
    assert_eq!(code(s.lookup(&s.root(), b"small")), "dir-id-auth");
    w.disk.unlink(&w.disk.root().unwrap(), b".envelopefs.dir").unwrap();
    let s = w.mount(true);
    assert_eq!(code(s.read_dir(&s.root())), "dir-id-missing");
    w.disk.create(&w.disk.root().unwrap(), b".envelopefs.dir", 0o600, 0).unwrap();
    w.disk.replace_raw(".envelopefs.dir", &sealed).unwrap();
    w.others_are_fine(&[]);
}

#[test]
fn short_links() {
    let (w, other) = (World::tree(), World::tree_of_another_store());
    let text = w.link_text("l1");
    let mut bad = vec![text[1..].to_vec(), [&text[..], b"A"].concat(), b"/etc/passwd".to_vec(), vec![b'A'; 53]];
    bad.push(other.link_text("l1"));
    bad.extend((0..text.len()).map(|i| {
        let mut t = text.clone();
        t[i] = if t[i] == b'A' { b'B' } else { b'A' };
        t
    }));
    for b in bad {
        w.relink("l1", &b);
        assert_eq!(w.readlink(b"l1"), Err("symlink-auth".into()), "{}", String::from_utf8_lossy(&b));
        assert_eq!(w.check(), [(String::from_utf8(w.path("l1")).unwrap(), "symlink-auth".to_owned())]);
    }
    assert_eq!(w.readlink(b"l2").unwrap(), target(b'2', 20));
    // Not noticed in version 1, and `docs/THREAT_MODEL.md` says so: another link's target.
    w.relink("l1", &w.link_text("l2"));
    assert_eq!(w.readlink(b"l1").unwrap(), target(b'2', 20));
}

#[test]
fn long_links() {
    let w = World::tree();
    let text = w.link_text("L1");
    assert_eq!(text.len(), 53);
    let file = |text: &[u8]| [b".envelopefs/links/", &text[16..48]].concat();
    let (one, two) = (file(&text), file(&w.link_text("L2")));
    let sealed = w.disk.read_raw(&one).unwrap();
    let path = String::from_utf8(w.path("L1")).unwrap();
    let bad = || {
        assert_eq!(w.readlink(b"L1"), Err("symlink-auth".into()));
        assert_eq!(w.check(), [(path.clone(), "symlink-auth".to_owned())]);
    };
    for at in (0..sealed.len() as u64).step_by(131) {
        w.disk.flip_bit(&one, at, 5).unwrap();
        bad();
        w.disk.flip_bit(&one, at, 5).unwrap();
    }
    for wrong in [&sealed[1..], b"", &[&sealed[..], b"x"].concat(), &vec![0; 6000]] {
        w.disk.replace_raw(&one, wrong).unwrap();
        bad();
    }
    // Not noticed in version 1: another link's target.
    w.disk.replace_raw(&one, &w.disk.read_raw(&two).unwrap()).unwrap();
    assert_eq!(w.readlink(b"L1").unwrap(), target(b'4', 4000));
    w.disk.unlink(&w.node(b".envelopefs/links"), &text[16..48]).unwrap();
    bad();
    for wrong in [&b"envelopefs-link:../../../../../../etc/passwd00000000:0fa0"[..53], &[&text[..52], b"G"].concat()] {
        w.relink("L1", wrong);
        bad();
    }
    assert_eq!(w.readlink(b"L2").unwrap(), target(b'4', 4000));
}

impl World {
    fn tree_of_another_store() -> Self {
        let w = Self::build();
        let s = w.mount(false);
        s.symlink(&s.root(), b"l1", &target(b'1', 20), None).unwrap();
        let (n, _) = s.lookup(&s.root(), b"small").unwrap();
        s.set_xattr(&n, b"user.a", b"theirs", XattrMode::Any).unwrap();
        s.close().unwrap();
        drop((n, s));
        w
    }
}

#[test]
fn attributes() {
    let w = World::tree();
    let backing = w.xattr_names("small");
    let plain = [b"user.a".to_vec(), b"user.b".to_vec(), long_xattr()];
    let node = w.node(&w.path("small"));
    let path = String::from_utf8(w.path("small")).unwrap();
    let set = |name: &[u8], value: &[u8]| w.disk.set_xattr(&node, name, value, XattrMode::Any).unwrap();
    for (backing, plain) in backing.iter().zip(&plain) {
        let value = w.disk.get_xattr(&node, backing).unwrap();
        let mut bad = vec![vec![], value[1..].to_vec(), [&value[..], b"x"].concat()];
        bad.extend((0..value.len()).map(|i| {
            let mut v = value.clone();
            v[i] ^= 1 << (i % 8);
            v
        }));
        for b in bad {
            set(backing, &b);
            assert_eq!(w.xattr("small", plain), Err("xattr-auth".into()));
            assert_eq!(w.check(), [(path.clone(), "xattr-auth".to_owned())]);
        }
        set(backing, &value);
    }
    // Under another attribute's name.
    let values = backing.clone().map(|n| w.disk.get_xattr(&node, &n).unwrap());
    for (to, from) in [(0, 1), (1, 0), (0, 2), (2, 0)] {
        set(&backing[to], &values[from]);
        assert_eq!(w.xattr("small", &plain[to]), Err("xattr-auth".into()));
        assert_eq!(w.xattr("small", &plain[from]).map(|_| ()), Ok(()), "the other attribute");
        set(&backing[to], &values[to]);
    }
    assert_eq!(w.check(), []);
    // A name that nobody made: not listed, and a check tells.
    let mut forged = backing[0].clone();
    let last = forged.len() - 5;
    forged[last] = if forged[last] == b'A' { b'B' } else { b'A' };
    set(&forged, &values[0]);
    assert_eq!(w.xattrs("small"), plain);
    assert_eq!(w.check(), [(path, "xattr-auth".to_owned())]);
    w.others_are_fine(&[]);
}

#[test]
fn attributes_of_other_inodes_and_stores() {
    let (w, other) = (World::tree(), World::tree_of_another_store());
    let [name, ..] = w.xattr_names("small");
    let (to, from) = (w.node(&w.path("small")), w.node(&w.path("small too")));
    // Not noticed in version 1, and `docs/THREAT_MODEL.md` says so: the same attribute of another inode.
    w.disk.set_xattr(&to, &name, &w.disk.get_xattr(&from, &name).unwrap(), XattrMode::Any).unwrap();
    assert_eq!(w.xattr("small", b"user.a").unwrap(), b"a of small too");
    // Another store's.
    let their_node = other.node(&other.path("small"));
    let theirs = other.disk.list_xattr(&their_node).unwrap().remove(0);
    let value = other.disk.get_xattr(&their_node, &theirs).unwrap();
    w.disk.set_xattr(&to, &name, &value, XattrMode::Any).unwrap();
    assert_eq!(w.xattr("small", b"user.a"), Err("xattr-auth".into()));
    w.disk.set_xattr(&from, &theirs, &value, XattrMode::Any).unwrap();
    assert_eq!(w.xattrs("small too").len(), 3, "left out");
}
