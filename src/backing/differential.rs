//! Random operations on a real directory and on a simulated disk: same answers, same tree.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::posix::Posix;
use super::sim::{Journal, PowerCut, SimDisk, SimOptions};
use super::*;

/// Names in play: few, so that operations meet.
const NAMES: [&[u8]; 5] = [b"a", b"b", b"c", b"dir", b"other"];
const XATTRS: [&[u8]; 4] = [b"user.x", b"user.longer", b"trusted.t", b"nonsense.n"];

/// A name in the root (`None`) or in the directory of that name in the root.
type Place = (Option<usize>, usize);

#[derive(Debug, Clone)]
enum Step {
    Create(Place, u32, u32),
    Mkdir(Place, u32, u32),
    Mknod(Place, Kind, u32),
    Symlink(Place, Vec<u8>),
    Readlink(Place),
    Link(Place, Place),
    Unlink(Place),
    Rmdir(Place),
    Rename(Place, Place, RenameMode),
    SetMode(Place, u32),
    SetOwner(Place, Option<u32>, Option<u32>),
    SetTimes(Place, SetTime, SetTime),
    SetXattr(Place, usize, Vec<u8>, XattrMode),
    GetXattr(Place, usize),
    RemoveXattr(Place, usize),
    Open(Place, Access),
    Write(u64, usize, u8),
    Read(u64, usize),
    Truncate(u64),
    Allocate(Allocate, u64, u64),
    NextData(u64),
    SyncFile,
    SyncDir(Option<usize>),
    SyncAll,
}

/// What a step answered, without what differs between disks.
type Answer = Result<String, i32>;

struct Side<B: Backing> {
    disk: B,
    open: Option<B::File>,
    root_user: bool,
    data_by_page: bool,
}

impl<B: Backing> Side<B> {
    fn dir(&self, dir: Option<usize>) -> io::Result<B::Node> {
        let root = self.disk.root()?;
        match dir {
            None => Ok(root),
            Some(name) => self.disk.lookup(&root, NAMES[name]),
        }
    }

    fn node(&self, (dir, name): Place) -> io::Result<B::Node> {
        self.disk.lookup(&self.dir(dir)?, NAMES[name])
    }

    fn file(&self) -> io::Result<&B::File> {
        self.open.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    fn step(&mut self, step: &Step) -> Answer {
        self.run(step).map_err(|e| e.raw_os_error().unwrap_or(0))
    }

    fn run(&mut self, step: &Step) -> io::Result<String> {
        let d = &self.disk;
        match *step {
            Step::Create((dir, name), mode, umask) => {
                let (node, file) = d.create(&self.dir(dir)?, NAMES[name], mode, umask)?;
                assert_eq!(d.stat(&node)?, d.stat_file(&file)?);
                self.open = Some(file);
            }
            Step::Mkdir((dir, name), mode, umask) => d.mkdir(&self.dir(dir)?, NAMES[name], mode, umask)?,
            Step::Mknod((dir, name), kind, mode) => d.mknod(&self.dir(dir)?, NAMES[name], kind, mode, 0o022, 0)?,
            Step::Symlink((dir, name), ref target) => d.symlink(&self.dir(dir)?, NAMES[name], target)?,
            Step::Readlink(at) => return Ok(format!("{:?}", d.readlink(&self.node(at)?)?)),
            Step::Link(from, (dir, name)) => d.link(&self.node(from)?, &self.dir(dir)?, NAMES[name])?,
            Step::Unlink((dir, name)) => d.unlink(&self.dir(dir)?, NAMES[name])?,
            Step::Rmdir((dir, name)) => d.rmdir(&self.dir(dir)?, NAMES[name])?,
            Step::Rename((dir, name), (dir2, name2), mode) => {
                d.rename(&self.dir(dir)?, NAMES[name], &self.dir(dir2)?, NAMES[name2], mode)?;
            }
            Step::SetMode(at, mode) => d.set_mode(&self.node(at)?, mode)?,
            Step::SetOwner(at, uid, gid) if self.root_user => d.set_owner(&self.node(at)?, uid, gid)?,
            Step::SetOwner(..) => {}
            Step::SetTimes(at, atime, mtime) => d.set_times(&self.node(at)?, atime, mtime)?,
            Step::SetXattr(at, name, ref value, mode) if self.may_set(name) => {
                d.set_xattr(&self.node(at)?, XATTRS[name], value, mode)?;
            }
            Step::SetXattr(..) => {}
            Step::GetXattr(at, name) => return Ok(format!("{:?}", d.get_xattr(&self.node(at)?, XATTRS[name])?)),
            Step::RemoveXattr(at, name) if self.may_set(name) => d.remove_xattr(&self.node(at)?, XATTRS[name])?,
            Step::RemoveXattr(..) => {}
            Step::Open(at, access) => self.open = Some(d.open(&self.node(at)?, access)?),
            Step::Write(offset, len, byte) => d.write_at(self.file()?, &vec![byte; len], offset)?,
            Step::Read(offset, len) => {
                let mut buf = vec![0xee; len];
                let (one, two) = buf.split_at_mut(len / 3);
                let n = d.read_at(self.file()?, &mut [IoSliceMut::new(one), IoSliceMut::new(two)], offset)?;
                return Ok(format!("{n} {buf:?}"));
            }
            Step::Truncate(size) => d.truncate(self.file()?, size)?,
            Step::Allocate(mode, offset, len) => {
                // Space allocated but not written counts as data once it has been read.
                self.data_by_page &= mode == Allocate::PunchHole;
                d.allocate(self.file()?, mode, offset, len)?;
            }
            Step::NextData(offset) => {
                let at = d.next_data(self.file()?, offset)?;
                return Ok(if self.data_by_page { format!("{at:?}") } else { String::new() });
            }
            Step::SyncFile => d.sync_file(self.file()?)?,
            Step::SyncDir(dir) => d.sync_dir(&self.dir(dir)?)?,
            Step::SyncAll => d.sync_all()?,
        }
        Ok(String::new())
    }

    /// Only root may touch `trusted.` attributes.
    fn may_set(&self, name: usize) -> bool {
        self.root_user || !XATTRS[name].starts_with(b"trusted.")
    }

    /// Everything that can be seen of the tree.
    fn tree(&self) -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        let mut inodes = BTreeMap::new();
        self.add_tree(&self.disk.root().unwrap(), "", &mut inodes, &mut found);
        found
    }

    fn add_tree(
        &self,
        dir: &B::Node,
        path: &str,
        inodes: &mut BTreeMap<u64, String>,
        found: &mut BTreeMap<String, String>,
    ) {
        let d = &self.disk;
        let mut entries = d.read_dir(dir).unwrap();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        for entry in entries {
            let path = format!("{path}/{}", String::from_utf8_lossy(&entry.name));
            let node = d.lookup(dir, &entry.name).unwrap();
            let stat = d.stat(&node).unwrap();
            assert_eq!(stat, d.stat_at(dir, &entry.name).unwrap());
            assert_eq!((Some(stat.kind), stat.ino), (entry.kind.or(Some(stat.kind)), entry.ino));
            let same_as = inodes.entry(stat.ino).or_insert_with(|| path.clone()).clone();
            let mut xattrs: Vec<_> = d.list_xattr(&node).unwrap();
            xattrs.retain(|name| !name.starts_with(b"security."));
            xattrs.sort();
            let xattrs: Vec<_> = xattrs.iter().map(|name| (name, d.get_xattr(&node, name).unwrap())).collect();
            let content = match stat.kind {
                Kind::File => {
                    let file = d.open(&node, Access::Read).unwrap();
                    let mut content = vec![0; stat.size as usize];
                    assert_eq!(read_into(d, &file, &mut content, 0).unwrap(), content.len());
                    content
                }
                Kind::Symlink => d.readlink(&node).unwrap(),
                _ => Vec::new(),
            };
            let seen = (stat.kind, stat.mode, stat.nlink, stat.uid, stat.gid, same_as, xattrs);
            found.insert(path.clone(), format!("{seen:?} {:?}", runs(&content)));
            if stat.kind == Kind::Dir {
                self.add_tree(&node, &path, inodes, found);
            }
        }
    }
}

impl Side<SimDisk> {
    /// The link counts are those of the entries.
    fn check_links(&self) {
        let d = &self.disk;
        let root = d.stat(&d.root().unwrap()).unwrap();
        let mut counted: BTreeMap<u64, u64> = BTreeMap::new();
        let mut stats = vec![root];
        let mut open = vec![d.root().unwrap()];
        while let Some(dir) = open.pop() {
            for entry in d.read_dir(&dir).unwrap() {
                let stat = d.stat_at(&dir, &entry.name).unwrap();
                *counted.entry(stat.ino).or_default() += 1;
                if stat.kind == Kind::Dir {
                    *counted.entry(d.stat(&dir).unwrap().ino).or_default() += 1;
                    open.push(d.lookup(&dir, &entry.name).unwrap());
                }
                stats.push(stat);
            }
        }
        for stat in stats {
            // A directory's `.`, and the root's `..`.
            let own = u64::from(stat.kind == Kind::Dir) + u64::from(stat.ino == root.ino);
            assert_eq!(stat.nlink, counted.get(&stat.ino).copied().unwrap_or(0) + own, "inode {}", stat.ino);
        }
    }
}

/// Run-length form, to keep failures readable.
fn runs(content: &[u8]) -> Vec<(u8, usize)> {
    content.chunk_by(|a, b| a == b).map(|run| (run[0], run.len())).collect()
}

fn place() -> impl Strategy<Value = Place> {
    (prop_oneof![2 => Just(None), 1 => Just(Some(3)), 1 => Just(Some(4))], 0..NAMES.len())
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..9000, (0u64..5).prop_map(|page| page * 4096), Just((1 << 32) + 5)]
}

/// A file of four gigabytes would take long to compare; offsets beyond that are for reads only.
fn size() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..20000, (0u64..5).prop_map(|page| page * 4096)]
}

fn set_time() -> impl Strategy<Value = SetTime> {
    let at = (-5i64..5_000_000_000, 0u32..1_000_000_000);
    prop_oneof![
        Just(SetTime::Omit),
        Just(SetTime::Now),
        at.prop_map(|(sec, nsec)| SetTime::At(Timestamp { sec, nsec }))
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let mode = || prop_oneof![Just(0o644u32), Just(0o2755), Just(0o600), Just(0o7777), Just(0)];
    let umask = || prop_oneof![Just(0u32), Just(0o022), Just(0o077)];
    let rename = prop_oneof![Just(RenameMode::Replace), Just(RenameMode::NoReplace), Just(RenameMode::Exchange)];
    let xattr = prop_oneof![Just(XattrMode::Any), Just(XattrMode::Create), Just(XattrMode::Replace)];
    let allocate = prop_oneof![Just(Allocate::Extend), Just(Allocate::KeepSize), Just(Allocate::PunchHole)];
    let value = || prop::collection::vec(any::<u8>(), 0..40);
    let id = || prop_oneof![Just(None), (0u32..3).prop_map(Some)];
    let special = prop_oneof![Just(Kind::Fifo), Just(Kind::Socket), Just(Kind::File), Just(Kind::Dir)];
    let names = prop_oneof![
        3 => (place(), mode(), umask()).prop_map(|(p, m, u)| Step::Create(p, m, u)),
        3 => (place(), mode(), umask()).prop_map(|(p, m, u)| Step::Mkdir(p, m, u)),
        1 => (place(), special, mode()).prop_map(|(p, k, m)| Step::Mknod(p, k, m)),
        1 => (place(), prop::collection::vec(1u8..255, 0..60)).prop_map(|(p, t)| Step::Symlink(p, t)),
        1 => place().prop_map(Step::Readlink),
        2 => (place(), place()).prop_map(|(a, b)| Step::Link(a, b)),
        2 => place().prop_map(Step::Unlink),
        1 => place().prop_map(Step::Rmdir),
        4 => (place(), place(), rename).prop_map(|(a, b, m)| Step::Rename(a, b, m)),
    ];
    let attributes = prop_oneof![
        (place(), mode()).prop_map(|(p, m)| Step::SetMode(p, m)),
        (place(), id(), id()).prop_map(|(p, u, g)| Step::SetOwner(p, u, g)),
        (place(), set_time(), set_time()).prop_map(|(p, a, m)| Step::SetTimes(p, a, m)),
        (place(), 0..XATTRS.len(), value(), xattr).prop_map(|(p, n, v, m)| Step::SetXattr(p, n, v, m)),
        (place(), 0..XATTRS.len()).prop_map(|(p, n)| Step::GetXattr(p, n)),
        (place(), 0..XATTRS.len()).prop_map(|(p, n)| Step::RemoveXattr(p, n)),
        // Rare, because on a real disk they take long.
        prop_oneof![20 => Just(Step::SyncFile), 4 => Just(Step::SyncDir(None)), 4 => Just(Step::SyncDir(Some(3))), 1 => Just(Step::SyncAll)],
    ];
    let content = prop_oneof![
        (place(), prop_oneof![Just(Access::Read), Just(Access::ReadWrite)]).prop_map(|(p, a)| Step::Open(p, a)),
        (size(), 0usize..9000, 1u8..255).prop_map(|(o, n, b)| Step::Write(o, n, b)),
        (offset(), 0usize..9000).prop_map(|(o, n)| Step::Read(o, n)),
        size().prop_map(Step::Truncate),
        (allocate, size(), size()).prop_map(|(m, o, n)| Step::Allocate(m, o, n)),
        offset().prop_map(Step::NextData),
    ];
    prop_oneof![3 => names, 2 => attributes, 3 => content]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]

    #[test]
    fn the_simulated_disk_answers_as_the_real_one(steps in prop::collection::vec(step(), 1..80)) {
        let temporary = tempfile::tempdir().unwrap();
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let root_user = uid == 0;
        let data_by_page = rustix::fs::statfs(temporary.path()).unwrap().f_type == 0xEF53;
        let real = Posix::open(temporary.path()).unwrap();
        let mut real = Side { disk: real, open: None, root_user, data_by_page };
        let disk = SimDisk::new(SimOptions { uid, gid, ..SimOptions::default() });
        let mut sim = Side { disk, open: None, root_user, data_by_page };
        for step in &steps {
            prop_assert_eq!(real.step(step), sim.step(step), "{:?}", step);
        }
        prop_assert_eq!(real.tree(), sim.tree());
        // Neither a killed process nor a power cut after a sync changes anything.
        sim.open = None;
        sim.disk.sync_all().unwrap();
        let before = sim.tree();
        for disk in [sim.disk.crash_process(), sim.disk.crash_power(7, PowerCut::Lose)] {
            let after = Side { disk, open: None, root_user, data_by_page };
            prop_assert_eq!(&before, &after.tree());
        }
    }

    #[test]
    fn every_power_cut_leaves_a_sound_tree(
        steps in prop::collection::vec(step(), 1..60), seed: u64, ordered: bool, tear: bool,
    ) {
        let journal = if ordered { Journal::Ordered } else { Journal::None };
        let disk = SimDisk::new(SimOptions { journal, ..SimOptions::default() });
        let mut side = Side { disk, open: None, root_user: true, data_by_page: true };
        for step in &steps {
            let _ = side.step(step);
        }
        // Reading the tree checks that entries, inodes and sizes fit together.
        let running = side.tree();
        let of = |disk| Side { disk, open: None, root_user: true, data_by_page: true };
        let after = of(side.disk.crash_power(seed, PowerCut::Reorder { tear }));
        let tree = after.tree();
        after.check_links();
        // What a power cut left is all on the platter: another one takes nothing away.
        prop_assert_eq!(&tree, &of(after.disk.crash_power(seed, PowerCut::Lose)).tree());
        // The disk that was not crashed goes on as it was, and a killed process leaves all of it.
        prop_assert_eq!(&running, &side.tree());
        side.check_links();
        prop_assert_eq!(&running, &of(side.disk.crash_process()).tree());
    }
}
