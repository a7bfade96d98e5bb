//! The whole store against a model in memory: long random sequences of operations on a tree, compared step by step, with
//! reopening, with the daemon killed between operations, and with the daemon killed in the middle of one.
//!
//! proptest prints what failed, shrinks it, and keeps it under `tests/it/store_model.proptest-regressions`.

use envelopefs::backing::sim::{SimDisk, SimOptions};
use envelopefs::backing::{Access, Kind, RenameMode};
use envelopefs::kms::KeyProvider;
use envelopefs::kms::scripted::Scripted;
use envelopefs::store::attr::SetAttr;
use envelopefs::store::file::FileAllocate;
use envelopefs::store::keys::{KekKind, Keys, StoreFlags};
use envelopefs::store::node::Node;
use envelopefs::store::open::{Store, StoreOptions};
use envelopefs::store::{Result, StoreError};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

type Path = Vec<usize>;

/// Names that matter: short, long by ciphertext only, at the limit.
fn name(i: usize) -> Vec<u8> {
    match i % 6 {
        0 => b"a".to_vec(),
        1 => b"b b".to_vec(),
        2 => "ü\u{1F600}".as_bytes().to_vec(),
        3 => vec![b'l'; 176],
        4 => vec![b'L'; 255],
        _ => b"z.txt".to_vec(),
    }
}

#[derive(Debug, Clone)]
enum Op {
    Create(Path),
    Mkdir(Path),
    Symlink(Path, usize),
    Link(Path, Path),
    Unlink(Path),
    Rmdir(Path),
    Rename(Path, Path, RenameMode),
    Write(Path, u64, usize, u8),
    Truncate(Path, u64),
    Punch(Path, u64, u64),
    SetXattr(Path, usize, u8),
    RemoveXattr(Path, usize),
    Chmod(Path, u32),
    /// Unmount and mount.
    Remount,
    /// The daemon is killed and the store mounted again.
    Kill,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Body {
    File(Vec<u8>),
    Dir(BTreeMap<usize, usize>),
    Symlink(Vec<u8>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Inode {
    body: Body,
    mode: u32,
    xattrs: BTreeMap<usize, Vec<u8>>,
}

/// The reference: inodes by number, the root is 0.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Model(Vec<Inode>);

type Outcome<T> = std::result::Result<T, ()>;

impl Model {
    fn new() -> Self {
        Self(vec![Inode { body: Body::Dir(BTreeMap::new()), mode: 0o700, xattrs: BTreeMap::new() }])
    }

    fn entries(&self, ino: usize) -> Outcome<&BTreeMap<usize, usize>> {
        match &self.0[ino].body {
            Body::Dir(e) => Ok(e),
            _ => Err(()),
        }
    }

    fn entries_mut(&mut self, ino: usize) -> &mut BTreeMap<usize, usize> {
        match &mut self.0[ino].body {
            Body::Dir(e) => e,
            _ => unreachable!("checked by parent()"),
        }
    }

    fn find(&self, path: &[usize]) -> Outcome<usize> {
        path.iter().try_fold(0, |ino, n| self.entries(ino)?.get(n).copied().ok_or(()))
    }

    /// The directory a path's last name is in, and that name.
    fn parent(&self, path: &[usize]) -> Outcome<(usize, usize)> {
        let (last, front) = path.split_last().ok_or(())?;
        let dir = self.find(front)?;
        self.entries(dir)?;
        Ok((dir, *last))
    }

    fn add(&mut self, path: &[usize], body: Body, mode: u32) -> Outcome<()> {
        let (dir, n) = self.parent(path)?;
        if self.entries(dir)?.contains_key(&n) {
            return Err(());
        }
        self.0.push(Inode { body, mode, xattrs: BTreeMap::new() });
        let ino = self.0.len() - 1;
        self.entries_mut(dir).insert(n, ino);
        Ok(())
    }

    fn is_dir(&self, ino: usize) -> bool {
        matches!(self.0[ino].body, Body::Dir(_))
    }

    fn file_mut(&mut self, path: &[usize]) -> Outcome<&mut Vec<u8>> {
        let ino = self.find(path)?;
        match &mut self.0[ino].body {
            Body::File(d) => Ok(d),
            _ => Err(()),
        }
    }

    fn rename(&mut self, from: &[usize], to: &[usize], mode: RenameMode) -> Outcome<()> {
        let (d1, n1) = self.parent(from)?;
        let (d2, n2) = self.parent(to)?;
        let src = *self.entries(d1)?.get(&n1).ok_or(())?;
        let dst = self.entries(d2)?.get(&n2).copied();
        // Into itself or below: whatever the mode.
        if self.is_dir(src) && to.len() > from.len() && to.starts_with(from) {
            return Err(());
        }
        match (mode, dst) {
            (RenameMode::NoReplace, Some(_)) | (RenameMode::Exchange, None) => return Err(()),
            (RenameMode::Exchange, Some(dst)) => {
                if self.is_dir(dst) && from.len() > to.len() && from.starts_with(to) {
                    return Err(());
                }
                self.entries_mut(d1).insert(n1, dst);
                self.entries_mut(d2).insert(n2, src);
                return Ok(());
            }
            (_, Some(dst)) if dst == src => return Ok(()),
            (_, Some(dst)) => match (self.is_dir(src), self.is_dir(dst)) {
                (true, true) if !self.entries(dst)?.is_empty() => return Err(()),
                (a, b) if a != b => return Err(()),
                _ => {}
            },
            (_, None) => {}
        }
        self.entries_mut(d1).remove(&n1);
        self.entries_mut(d2).insert(n2, src);
        Ok(())
    }

    fn run(&mut self, op: &Op) -> Outcome<()> {
        match op {
            Op::Create(p) => self.add(p, Body::File(Vec::new()), 0o640),
            Op::Mkdir(p) => self.add(p, Body::Dir(BTreeMap::new()), 0o750),
            Op::Symlink(p, len) => self.add(p, Body::Symlink(target(*len)), 0o777),
            Op::Link(from, to) => {
                let ino = self.find(from)?;
                let (dir, n) = self.parent(to)?;
                if self.is_dir(ino) || self.entries(dir)?.contains_key(&n) {
                    return Err(());
                }
                self.entries_mut(dir).insert(n, ino);
                Ok(())
            }
            Op::Unlink(p) | Op::Rmdir(p) => {
                let (dir, n) = self.parent(p)?;
                let ino = *self.entries(dir)?.get(&n).ok_or(())?;
                let rmdir = matches!(op, Op::Rmdir(_));
                if self.is_dir(ino) != rmdir || rmdir && !self.entries(ino)?.is_empty() {
                    return Err(());
                }
                self.entries_mut(dir).remove(&n);
                Ok(())
            }
            Op::Rename(a, b, m) => self.rename(a, b, *m),
            Op::Write(p, at, len, fill) => {
                let d = self.file_mut(p)?;
                let end = *at as usize + len;
                if *len > 0 && d.len() < end {
                    d.resize(end, 0);
                }
                if *len > 0 {
                    d[*at as usize..end].fill(*fill);
                }
                Ok(())
            }
            Op::Truncate(p, len) => {
                self.file_mut(p)?.resize(*len as usize, 0);
                Ok(())
            }
            Op::Punch(p, at, len) => {
                let d = self.file_mut(p)?;
                let end = ((at + len) as usize).min(d.len());
                let at = (*at as usize).min(end);
                d[at..end].fill(0);
                Ok(())
            }
            Op::SetXattr(p, n, v) => {
                let ino = self.find(p)?;
                if matches!(self.0[ino].body, Body::Symlink(_)) {
                    return Err(());
                }
                self.0[ino].xattrs.insert(*n, vec![*v; usize::from(*v)]);
                Ok(())
            }
            Op::RemoveXattr(p, n) => {
                let ino = self.find(p)?;
                self.0[ino].xattrs.remove(n).map(|_| ()).ok_or(())
            }
            Op::Chmod(p, m) => {
                let ino = self.find(p)?;
                if matches!(self.0[ino].body, Body::Symlink(_)) {
                    return Err(());
                }
                self.0[ino].mode = *m;
                Ok(())
            }
            Op::Remount | Op::Kill => Ok(()),
        }
    }

    /// Everything below `ino`, by path.
    fn tree(&self) -> BTreeMap<Path, Inode> {
        let mut out = BTreeMap::new();
        let mut todo = vec![(Vec::new(), 0)];
        while let Some((path, ino)) = todo.pop() {
            let mut inode = self.0[ino].clone();
            if let Body::Dir(e) = &mut inode.body {
                for (n, child) in std::mem::take(e) {
                    let mut p: Path = path.clone();
                    p.push(n);
                    todo.push((p, child));
                }
            }
            out.insert(path, inode);
        }
        out
    }
}

fn target(len: usize) -> Vec<u8> {
    (0..len).map(|i| b'a' + (i % 23) as u8).collect()
}

fn xattr(i: usize) -> Vec<u8> {
    [b"user.one".to_vec(), b"user.two".to_vec(), [b"user.".to_vec(), vec![b'x'; 240]].concat()][i % 3].clone()
}

struct Mounted {
    disk: SimDisk,
    store: Arc<Store<SimDisk>>,
    root_key: Vec<Arc<dyn KeyProvider>>,
    flags: StoreFlags,
}

impl Mounted {
    fn new(plaintext_names: bool) -> Self {
        let disk = SimDisk::new(SimOptions { split_last_write: true, ..SimOptions::default() });
        let root_key: Vec<Arc<dyn KeyProvider>> = vec![Scripted::new("model")];
        let flags = StoreFlags { plaintext_names };
        Store::init(&disk, &root_key, KekKind::Sealed, flags).unwrap();
        Self { store: mount(&disk, &root_key).unwrap(), disk, root_key, flags }
    }

    fn find(&self, path: &[usize]) -> Result<Arc<Node<SimDisk>>> {
        path.iter().try_fold(self.store.root(), |n, i| Ok(self.store.lookup(&n, &name(*i))?.0))
    }

    fn parent(&self, path: &[usize]) -> Result<(Arc<Node<SimDisk>>, Vec<u8>)> {
        let (last, front) = path.split_last().ok_or(StoreError::Invalid)?;
        Ok((self.find(front)?, name(*last)))
    }

    fn open(&self, path: &[usize]) -> Result<envelopefs::store::file::OpenFile<SimDisk>> {
        let n = self.find(path)?;
        if n.kind() != Kind::File {
            return Err(StoreError::Invalid);
        }
        self.store.open_file(&n, Access::ReadWrite)
    }

    fn run(&mut self, op: &Op) -> Result<()> {
        let s = &self.store;
        match op {
            Op::Create(p) => {
                let (d, n) = self.parent(p)?;
                s.create(&d, &n, 0o640, 0, None).map(|_| ())
            }
            Op::Mkdir(p) => {
                let (d, n) = self.parent(p)?;
                s.mkdir(&d, &n, 0o750, 0, None).map(|_| ())
            }
            Op::Symlink(p, len) => {
                let (d, n) = self.parent(p)?;
                s.symlink(&d, &n, &target(*len), None).map(|_| ())
            }
            Op::Link(a, b) => {
                let node = self.find(a)?;
                let (d, n) = self.parent(b)?;
                s.link(&node, &d, &n).map(|_| ())
            }
            Op::Unlink(p) => {
                let (d, n) = self.parent(p)?;
                s.unlink(&d, &n)
            }
            Op::Rmdir(p) => {
                let (d, n) = self.parent(p)?;
                s.rmdir(&d, &n)
            }
            Op::Rename(a, b, m) => {
                let (d1, n1) = self.parent(a)?;
                let (d2, n2) = self.parent(b)?;
                s.rename(&d1, &n1, &d2, &n2, *m)
            }
            Op::Write(p, at, len, fill) => self.open(p)?.write(*at, &vec![*fill; *len]).map(|_| ()),
            Op::Truncate(p, len) => self.open(p)?.set_len(*len),
            Op::Punch(p, at, len) => self.open(p)?.allocate(FileAllocate::PunchHole, *at, *len),
            Op::SetXattr(p, n, v) => {
                let node = self.find(p)?;
                s.set_xattr(&node, &xattr(*n), &vec![*v; usize::from(*v)], envelopefs::backing::XattrMode::Any)
            }
            Op::RemoveXattr(p, n) => s.remove_xattr(&self.find(p)?, &xattr(*n)),
            Op::Chmod(p, m) => {
                let node = self.find(p)?;
                if node.kind() == Kind::Symlink {
                    return Err(StoreError::NotSupported);
                }
                s.setattr(&node, &SetAttr { mode: Some(*m), ..SetAttr::default() }, None).map(|_| ())
            }
            Op::Remount => {
                s.close()?;
                self.store = mount(&self.disk, &self.root_key)?;
                Ok(())
            }
            Op::Kill => {
                self.disk = self.disk.crash_process();
                self.store = mount(&self.disk, &self.root_key)?;
                Ok(())
            }
        }
    }

    fn tree(&self) -> Result<BTreeMap<Path, Inode>> {
        let mut out = BTreeMap::new();
        let mut todo = vec![(Vec::new(), self.store.root())];
        while let Some((path, node)) = todo.pop() {
            let attr = self.store.getattr(&node)?;
            let body = match attr.kind {
                Kind::Dir => {
                    for e in self.store.read_dir(&node)? {
                        let i = (0..6).find(|i| name(*i) == e.name).expect("only names that were made");
                        let (child, _) = self.store.read_dir_node(&node, &e)?;
                        let (same, _) = self.store.lookup(&node, &e.name)?;
                        assert!(Arc::ptr_eq(&child, &same), "two nodes for one inode");
                        let mut p: Path = path.clone();
                        p.push(i);
                        todo.push((p, child));
                    }
                    Body::Dir(BTreeMap::new())
                }
                Kind::File => {
                    let f = self.store.open_file(&node, Access::Read)?;
                    let mut d = vec![0; attr.size as usize];
                    assert_eq!(f.read(0, &mut d)?, d.len());
                    assert_eq!(f.len(), attr.size, "stat and the open file disagree");
                    Body::File(d)
                }
                Kind::Symlink => {
                    let t = self.store.readlink(&node)?;
                    assert_eq!(t.len() as u64, attr.size);
                    Body::Symlink(t)
                }
                k => panic!("nobody made a {k:?}"),
            };
            let mut xattrs = BTreeMap::new();
            for n in self.store.list_xattr(&node)? {
                let i = (0..3).find(|i| xattr(*i) == n).expect("only attributes that were made");
                xattrs.insert(i, self.store.get_xattr(&node, &n)?);
            }
            let mode = if path.is_empty() { 0o700 } else { attr.mode };
            out.insert(path, Inode { body, mode, xattrs });
        }
        Ok(out)
    }
}

fn mount(disk: &SimDisk, root_key: &[Arc<dyn KeyProvider>]) -> Result<Arc<Store<SimDisk>>> {
    Store::open(disk.clone(), Keys::open(disk, root_key)?, StoreOptions::default())
}

fn path() -> impl Strategy<Value = Path> {
    proptest::collection::vec(0usize..6, 1..4)
}

fn op() -> impl Strategy<Value = Op> {
    let mode =
        prop_oneof![3 => Just(RenameMode::Replace), 1 => Just(RenameMode::NoReplace), 1 => Just(RenameMode::Exchange)];
    let at = prop_oneof![Just(0u64), 0u64..9000, Just(131_000), Just(655_000)];
    prop_oneof![
        6 => path().prop_map(Op::Create),
        6 => path().prop_map(Op::Mkdir),
        2 => (path(), prop_oneof![1usize..50, Just(3000), Just(3050), Just(4095)]).prop_map(|(p, l)| Op::Symlink(p, l)),
        2 => (path(), path()).prop_map(|(a, b)| Op::Link(a, b)),
        3 => path().prop_map(Op::Unlink),
        3 => path().prop_map(Op::Rmdir),
        6 => (path(), path(), mode).prop_map(|(a, b, m)| Op::Rename(a, b, m)),
        8 => (path(), at.clone(), 1usize..9000, any::<u8>()).prop_map(|(p, a, l, f)| Op::Write(p, a, l, f)),
        2 => (path(), at.clone()).prop_map(|(p, l)| Op::Truncate(p, l)),
        1 => (path(), at, 1u64..20_000).prop_map(|(p, a, l)| Op::Punch(p, a, l)),
        2 => (path(), 0usize..3, any::<u8>()).prop_map(|(p, n, v)| Op::SetXattr(p, n, v)),
        1 => (path(), 0usize..3).prop_map(|(p, n)| Op::RemoveXattr(p, n)),
        1 => (path(), prop_oneof![Just(0o600u32), Just(0o444), Just(0o000), Just(0o4755)]).prop_map(|(p, m)| Op::Chmod(p, m)),
        1 => Just(Op::Remount),
        1 => Just(Op::Kill),
    ]
}

fn same(got: &BTreeMap<Path, Inode>, want: &BTreeMap<Path, Inode>) -> std::result::Result<(), TestCaseError> {
    let keys = |t: &BTreeMap<Path, Inode>| t.keys().cloned().collect::<Vec<_>>();
    prop_assert_eq!(keys(got), keys(want));
    for (p, w) in want {
        prop_assert!(&got[p] == w, "{:?} differs", p);
    }
    Ok(())
}

fn run_both(m: &mut Mounted, model: &mut Model, ops: &[Op]) -> std::result::Result<(), TestCaseError> {
    for (i, o) in ops.iter().enumerate() {
        let mut next = model.clone();
        let want = next.run(o);
        let got = m.run(o);
        prop_assert!(got.is_ok() == want.is_ok(), "step {}, {:?}: store {:?}, model {:?}", i, o, got, want);
        if want.is_ok() {
            *model = next;
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn the_store_is_its_model(ops in proptest::collection::vec(op(), 1..80), plaintext in any::<bool>()) {
        let mut m = Mounted::new(plaintext);
        let mut model = Model::new();
        run_both(&mut m, &mut model, &ops)?;
        same(&m.tree().unwrap(), &model.tree())?;
        m.run(&Op::Remount).unwrap();
        same(&m.tree().unwrap(), &model.tree())?;
        prop_assert_eq!(m.store.shared().keys.flags(), m.flags);
    }

    #[test]
    fn a_killed_operation_happened_or_did_not(
        ops in proptest::collection::vec(op(), 1..30), victim in op(), stop in 0u64..30,
    ) {
        let mut m = Mounted::new(false);
        let mut model = Model::new();
        run_both(&mut m, &mut model, &ops)?;
        let before = model.tree();
        let mut next = model.clone();
        let after = if next.run(&victim).is_ok() { next.tree() } else { before.clone() };
        m.disk.stop_after(m.disk.operations() + stop);
        let done = m.run(&victim).is_ok() && !m.disk.is_stopped();
        m.disk = m.disk.crash_process();
        m.store = mount(&m.disk, &m.root_key).unwrap();
        let got = m.tree().unwrap();
        // What a file's content may be in between is the file tests' matter; here the tree counts.
        let shape = |t: &BTreeMap<Path, Inode>| -> Vec<(Path, Option<Inode>)> {
            let is_file = |i: &Inode| matches!(i.body, Body::File(_));
            t.iter().map(|(p, i)| (p.clone(), (!is_file(i)).then(|| i.clone()))).collect()
        };
        if done {
            same(&got, &after)?;
        } else {
            let ok = shape(&got) == shape(&before) || shape(&got) == shape(&after);
            prop_assert!(ok, "{:?} stopped after {} left neither the old nor the new tree", victim, stop);
        }
        // And the store goes on.
        m.run(&Op::Create(vec![5, 5])).ok();
        m.run(&Op::Remount).unwrap();
        m.tree().unwrap();
    }
}
