//! Metadata on the platter: an image, and transactions on their way there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::prng::Prng;
use crate::backing::{Kind, Timestamp};

/// The root directory's inode number.
pub(super) const ROOT: u64 = 1;
/// Transactions kept back before they are written out anyway, as a journal's timer would.
const MOST_PENDING: usize = 16 * 1024;

/// How metadata operations get to the platter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Journal {
    /// In order, as ext4 does: after a power cut an in-order prefix of all operations is there, and any sync forces
    /// everything before it.
    #[default]
    Ordered,
    /// In any order: each operation not forced is there or not. `sync_file` forces that file's attributes, size and
    /// data, not its name; `sync_dir` the entries of that directory.
    None,
}

/// What an inode is besides its content and names. The number of links follows from the entries.
#[derive(Debug, Clone)]
pub(super) struct Meta {
    pub(super) kind: Kind,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) rdev: u64,
    pub(super) size: u64,
    pub(super) atime: Timestamp,
    pub(super) mtime: Timestamp,
    pub(super) ctime: Timestamp,
    pub(super) xattrs: Arc<BTreeMap<Vec<u8>, Vec<u8>>>,
    /// Of a symbolic link.
    pub(super) target: Arc<[u8]>,
}

#[derive(Debug, Clone)]
pub(super) enum Change {
    /// An inode's attributes become these.
    Put(u64, Arc<Meta>),
    /// The name in the directory refers to that inode, or to none.
    Entry(u64, Vec<u8>, Option<u64>),
}

#[derive(Debug, Clone)]
struct Transaction {
    seq: u64,
    changes: Vec<Change>,
}

#[derive(Debug, Clone)]
pub(super) struct ImageInode {
    pub(super) meta: Arc<Meta>,
    pub(super) entries: BTreeMap<Vec<u8>, u64>,
    /// Entries that refer to it.
    links: u64,
}

impl ImageInode {
    pub(super) fn new(meta: Arc<Meta>) -> Self {
        Self::existing(meta, BTreeMap::new(), 0)
    }

    pub(super) fn existing(meta: Arc<Meta>, entries: BTreeMap<Vec<u8>, u64>, links: u64) -> Self {
        Self { meta, entries, links }
    }
}

/// Inodes by number. May hold some that no entry reaches.
pub(super) type Image = BTreeMap<u64, ImageInode>;

#[derive(Debug, Clone)]
pub(super) struct Log {
    kind: Journal,
    image: Image,
    pending: Vec<Transaction>,
    next_seq: u64,
    /// Attributes each inode was made with, for entries that get to the platter before their inode.
    births: BTreeMap<u64, Arc<Meta>>,
}

impl Log {
    pub(super) fn new(kind: Journal, image: Image) -> Self {
        Self { kind, image, pending: Vec::new(), next_seq: 1, births: BTreeMap::new() }
    }

    pub(super) fn kind(&self) -> Journal {
        self.kind
    }

    pub(super) fn push(&mut self, changes: Vec<Change>) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        for change in &changes {
            if let Change::Put(ino, meta) = change {
                self.births.entry(*ino).or_insert_with(|| Arc::clone(meta));
            }
        }
        self.pending.push(Transaction { seq, changes });
        if self.pending.len() > MOST_PENDING {
            self.commit_all();
        }
        seq
    }

    /// Whether no transaction or durable entry can bring `ino` back.
    pub(super) fn is_forgotten(&self, ino: u64) -> bool {
        self.pending.is_empty() && !self.image.contains_key(&ino)
    }

    pub(super) fn commit_all(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        let mut suspects = BTreeSet::new();
        for transaction in &pending {
            suspects.extend(apply(&mut self.image, &self.births, &transaction.changes));
        }
        self.births.clear();
        // Without an order a name may come later than its inode, so there nothing is dropped.
        if self.kind == Journal::Ordered {
            for ino in suspects {
                if ino != ROOT && self.image.get(&ino).is_some_and(|i| i.links == 0) {
                    self.image.remove(&ino);
                }
            }
        }
    }

    /// Forces the attributes of one inode, without its name (`Journal::None`).
    pub(super) fn force_meta(&mut self, ino: u64, meta: Arc<Meta>) {
        for transaction in &mut self.pending {
            transaction.changes.retain(|c| !matches!(c, Change::Put(of, _) if *of == ino));
        }
        self.pending.retain(|t| !t.changes.is_empty());
        put(&mut self.image, ino, &meta);
    }

    /// Forces the entries of one directory (`Journal::None`), with whatever those operations did elsewhere, and what
    /// came before that to the same names.
    pub(super) fn force_entries(&mut self, dir: u64) {
        let mut names: BTreeSet<(u64, Vec<u8>)> = BTreeSet::new();
        let mut forced = vec![false; self.pending.len()];
        for (transaction, forced) in self.pending.iter().zip(&mut forced).rev() {
            let entries = || {
                transaction.changes.iter().filter_map(|c| match c {
                    Change::Entry(dir, name, _) => Some((*dir, name.clone())),
                    Change::Put(..) => None,
                })
            };
            if entries().any(|key| key.0 == dir || names.contains(&key)) {
                *forced = true;
                names.extend(entries());
            }
        }
        let mut kept = Vec::new();
        for (transaction, forced) in std::mem::take(&mut self.pending).into_iter().zip(forced) {
            if forced {
                apply(&mut self.image, &self.births, &transaction.changes);
            } else {
                kept.push(transaction);
            }
        }
        self.pending = kept;
    }

    /// What a power cut leaves, and the transactions that never happened. With no `rng`, only what was forced is left.
    pub(super) fn after_power_cut(&self, rng: Option<&mut Prng>) -> (Image, BTreeSet<u64>) {
        let kept: Vec<bool> = match (rng, self.kind) {
            (None, _) => vec![false; self.pending.len()],
            (Some(rng), Journal::Ordered) => {
                let all = self.pending.len();
                // The ends are where the bugs are: nothing got there, or all of it did.
                let prefix = match rng.below(4) {
                    0 => 0,
                    1 => all,
                    _ => rng.below(all + 1),
                };
                (0..all).map(|i| i < prefix).collect()
            }
            (Some(rng), Journal::None) => self.pending.iter().map(|_| rng.chance(4)).collect(),
        };
        let mut image = self.image.clone();
        let mut lost = BTreeSet::new();
        for (transaction, kept) in self.pending.iter().zip(kept) {
            if kept {
                apply(&mut image, &self.births, &transaction.changes);
            } else {
                lost.insert(transaction.seq);
            }
        }
        (image, lost)
    }
}

fn put(image: &mut Image, ino: u64, meta: &Arc<Meta>) {
    image.entry(ino).and_modify(|i| i.meta = Arc::clone(meta)).or_insert_with(|| ImageInode::new(Arc::clone(meta)));
}

/// Applies changes in order; returns the inodes that may now be without a name.
fn apply(image: &mut Image, births: &BTreeMap<u64, Arc<Meta>>, changes: &[Change]) -> Vec<u64> {
    let mut suspects = Vec::new();
    for change in changes {
        match change {
            Change::Put(ino, meta) => {
                put(image, *ino, meta);
                suspects.push(*ino);
            }
            Change::Entry(dir, name, child) => {
                for ino in [Some(*dir), *child].into_iter().flatten() {
                    if !image.contains_key(&ino)
                        && let Some(birth) = births.get(&ino)
                    {
                        put(image, ino, birth);
                    }
                }
                let Some(dir) = image.get_mut(dir) else { continue };
                let old = match child {
                    Some(ino) => dir.entries.insert(name.clone(), *ino),
                    None => dir.entries.remove(name),
                };
                if let Some(new) = child.and_then(|ino| image.get_mut(&ino)) {
                    new.links += 1;
                }
                if let Some(old) = old {
                    suspects.push(old);
                    if let Some(old) = image.get_mut(&old) {
                        old.links = old.links.saturating_sub(1);
                    }
                }
            }
        }
    }
    suspects
}
