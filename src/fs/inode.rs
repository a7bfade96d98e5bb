//! Node ids: the numbers by which the kernel names inodes, and how many lookups of each it still holds.
//!
//! A node's id is the backing inode's number, so `st_ino` is the same in every mount. (After a `rekey`, which puts another
//! inode in its place, it is that of before, until the kernel forgets the inode.) Inodes of another device below the
//! backing directory, number 1 (the root's, to FUSE), and those whose number is still another's get ids from the upper
//! half, which no file system uses.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::backing::{Backing, Kind, Timestamp};
use crate::store::Node;

/// The root directory's id.
pub const ROOT: u64 = 1;
/// Ids that are not inode numbers lie here.
const UPPER: u64 = 1 << 63;

/// An inode that the kernel knows.
pub(super) struct Inode<B: Backing> {
    pub id: u64,
    pub node: Arc<Node<B>>,
    pub privileges: Privileges,
    /// Handles open for writing.
    pub writers: AtomicU32,
    pub kernels_mtime: KernelsMtime,
}

impl<B: Backing> Inode<B> {
    fn new(id: u64, node: Arc<Node<B>>, mtime: Timestamp) -> Arc<Self> {
        let kernels_mtime = KernelsMtime { time: Mutex::new(mtime), written: AtomicBool::new(false) };
        Arc::new(Self { id, node, privileges: Privileges::unknown(), writers: AtomicU32::new(0), kernels_mtime })
    }
}

/// The mtime of a regular file as the kernel has it, which with the writeback cache is the true one: it begins with what
/// we said when the kernel met the inode, and the kernel tells us when it changes. A write that falls into the same tick
/// of its clock changes nothing for the kernel, so nobody is told, while the backing file's mtime moves on; then what
/// `stat` showed before would not be what it shows after a remount. Hence this.
pub(super) struct KernelsMtime {
    time: Mutex<Timestamp>,
    /// Content has been written since the kernel last said the time.
    written: AtomicBool,
}

impl KernelsMtime {
    /// The kernel has said the time.
    pub(super) fn set(&self, time: Timestamp) {
        *self.time.lock() = time;
        self.written.store(false, Ordering::Release);
    }

    pub(super) fn content_written(&self) {
        self.written.store(true, Ordering::Release);
    }

    /// The time to set on the backing file when nobody writes it any more, if it has moved on there.
    pub(super) fn left_behind(&self) -> Option<Timestamp> {
        self.written.swap(false, Ordering::AcqRel).then(|| *self.time.lock())
    }
}

/// Ids to inodes, with lookup counts.
pub(super) struct Inodes<B: Backing> {
    map: RwLock<HashMap<u64, Known<B>>>,
    device: u64,
}

struct Known<B: Backing> {
    inode: Arc<Inode<B>>,
    lookups: AtomicU64,
}

impl<B: Backing> Inodes<B> {
    /// Knows the root, which is never forgotten.
    pub(super) fn new(root: Arc<Node<B>>) -> Self {
        let device = root.key().0;
        let inode = Inode::new(ROOT, root, Timestamp::default());
        let known = Known { inode, lookups: AtomicU64::new(1) };
        Self { map: RwLock::new(HashMap::from([(ROOT, known)])), device }
    }

    /// The id of `node`, whether it is known or not.
    pub(super) fn id_of(&self, node: &Node<B>) -> u64 {
        let number = || node.number().and_then(|n| self.id_for(node.key().0, n));
        if node.id() == ROOT { ROOT } else { number().unwrap_or(UPPER | node.id()) }
    }

    /// The id that an inode number stands for; `None` if such an inode's id is not its number.
    pub(super) fn id_for(&self, dev: u64, ino: u64) -> Option<u64> {
        (dev == self.device && ino > ROOT && ino < UPPER).then_some(ino)
    }

    /// The backing directory's device.
    pub(super) fn device(&self) -> u64 {
        self.device
    }

    pub(super) fn get(&self, id: u64) -> Option<Arc<Inode<B>>> {
        Some(self.map.read().get(&id)?.inode.clone())
    }

    /// One more lookup of `node`, whose mtime is `mtime`.
    pub(super) fn enter(&self, node: Arc<Node<B>>, mtime: Timestamp) -> Arc<Inode<B>> {
        let id = self.id_of(&node);
        if let Some(known) = self.map.read().get(&id) {
            // Under the lock, so that forget, which removes under the exclusive one, sees it.
            known.lookups.fetch_add(1, Ordering::Relaxed);
            return known.inode.clone();
        }
        let mut map = self.map.write();
        let known =
            map.entry(id).or_insert_with(|| Known { inode: Inode::new(id, node, mtime), lookups: AtomicU64::new(0) });
        known.lookups.fetch_add(1, Ordering::Relaxed);
        known.inode.clone()
    }

    /// Takes away `lookups`; says whether the inode is no longer known.
    pub(super) fn forget(&self, id: u64, lookups: u64) -> bool {
        if id == ROOT {
            return false;
        }
        match self.map.read().get(&id) {
            None => return false,
            Some(known) => {
                let take = |held: u64| Some(held.saturating_sub(lookups));
                let before = known.lookups.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
                if before.is_ok_and(|held| held > lookups) {
                    return false;
                }
            }
        }
        let mut map = self.map.write();
        let gone = map.get(&id).is_some_and(|known| known.lookups.load(Ordering::Relaxed) == 0);
        let known = if gone { map.remove(&id) } else { None };
        drop(map);
        // Dropped here: closing descriptors takes its time, and the lock is everybody's.
        known.is_some()
    }

    /// Ids of regular files.
    pub(super) fn files(&self) -> Vec<u64> {
        self.map.read().values().filter(|k| k.inode.node.kind() == Kind::File).map(|k| k.inode.id).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.map.read().len()
    }

    #[cfg(test)]
    pub(super) fn lookups(&self, id: u64) -> u64 {
        self.map.read().get(&id).map_or(0, |k| k.lookups.load(Ordering::Relaxed))
    }
}

/// Whether an inode is known to have neither setuid or setgid bits nor file capabilities, so that a write need not look.
///
/// The value is a count of changes, times two, plus one if it is known. Whoever looks remembers the count from before,
/// and what was seen counts only if nothing changed meanwhile.
pub(super) struct Privileges(AtomicU64);

/// The count before looking.
#[derive(Debug, Clone, Copy)]
pub(super) struct Before(u64);

impl Privileges {
    fn unknown() -> Self {
        Self(AtomicU64::new(0))
    }

    pub(super) fn are_known_absent(&self) -> bool {
        self.0.load(Ordering::Acquire) & 1 == 1
    }

    pub(super) fn look(&self) -> Before {
        Before(self.0.load(Ordering::Acquire) & !1)
    }

    /// None were seen since `before`.
    pub(super) fn absent(&self, before: Before) {
        // Failing means that they were changed meanwhile, or that another thread has seen the same.
        let _ = self.0.compare_exchange(before.0, before.0 | 1, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Mode, owner or capabilities are being changed: call it before and after.
    pub(super) fn change(&self) {
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |v| Some((v | 1).wrapping_add(1)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_before_a_change_does_not_count() {
        let p = Privileges::unknown();
        let before = p.look();
        p.change();
        p.absent(before);
        assert!(!p.are_known_absent());
        p.absent(p.look());
        assert!(p.are_known_absent());
        p.change();
        assert!(!p.are_known_absent());
    }
}
