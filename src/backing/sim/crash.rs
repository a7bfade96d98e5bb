//! What is left after the power went.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::content::{Content, PAGE_LEN, Page};
use super::journal::{Image, ImageInode, Log, ROOT};
use super::prng::Prng;
use super::state::{Inode, State};
use crate::backing::Kind;

const SECTOR: usize = 512;

/// What becomes of everything that was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerCut {
    /// All of it is lost.
    Lose,
    /// Each page is there or not, whatever the order of the writes; metadata operations as
    /// [`Journal`](super::Journal) says. With `tear`, a page may hold sectors of 512 bytes of different versions.
    Reorder { tear: bool },
}

pub(super) fn after_power_cut(state: &State, seed: u64, cut: PowerCut) -> State {
    let mut rng = Prng::new(seed);
    let order = match cut {
        PowerCut::Lose => None,
        PowerCut::Reorder { .. } => Some(&mut rng),
    };
    let (image, lost) = state.log.after_power_cut(order);
    let mut inodes = reachable(image);
    // How likely an unsynced write got there, in eighths: all and none are as likely as anything in between.
    let got_there = [0, 1, 4, 7, 8][rng.below(5)];
    for (ino, inode) in &mut inodes {
        if inode.meta.kind == Kind::File
            && let Some(before) = state.inodes.get(ino)
        {
            let mut pick = |candidates: Vec<Option<Arc<Page>>>| match cut {
                PowerCut::Lose => candidates.into_iter().next().flatten(),
                PowerCut::Reorder { tear } => pick(&mut rng, candidates, got_there, tear),
            };
            inode.content = content_after(&before.content, inode.meta.size, &lost, &mut pick);
        }
    }
    let mut durable = Image::new();
    for (ino, inode) in &inodes {
        let links = if inode.meta.kind == Kind::Dir { 1 } else { inode.nlink };
        durable.insert(*ino, ImageInode::existing(Arc::new(inode.meta.clone()), inode.entries.clone(), links));
    }
    let log = Log::new(state.options.journal, durable);
    State::with_inodes(state.options.clone(), log, inodes, state.next_ino, state.clock)
}

/// The tree below the root. Entries of inodes that never got there, and second names of a directory, are dropped, as a
/// file system check would.
fn reachable(mut image: Image) -> BTreeMap<u64, Inode> {
    let mut inodes: BTreeMap<u64, Inode> = BTreeMap::new();
    let mut open = vec![(ROOT, ROOT)];
    while let Some((ino, parent)) = open.pop() {
        let Some(found) = image.remove(&ino) else { continue };
        let mut inode = Inode::new(found.meta.as_ref().clone());
        inode.parent = parent;
        for (name, child) in found.entries {
            if let Some(known) = inodes.get_mut(&child) {
                if known.meta.kind != Kind::Dir {
                    known.nlink += 1;
                    inode.entries.insert(name, child);
                }
                continue;
            }
            let Some(meta) = image.get(&child).map(|i| Arc::clone(&i.meta)) else { continue };
            if meta.kind == Kind::Dir {
                if open.iter().any(|(waiting, _)| *waiting == child) {
                    continue;
                }
                inode.nlink += 1;
                open.push((child, ino));
            } else {
                image.remove(&child);
                inodes.insert(child, Inode::new(meta.as_ref().clone()));
            }
            inode.entries.insert(name, child);
        }
        inodes.insert(ino, inode);
    }
    inodes
}

fn content_after(
    before: &Content,
    size: u64,
    lost: &BTreeSet<u64>,
    pick: &mut impl FnMut(Vec<Option<Arc<Page>>>) -> Option<Arc<Page>>,
) -> Content {
    let mut pages = BTreeMap::new();
    for index in before.platter_pages() {
        let Some(mut page) = pick(before.candidates(index, |seq| lost.contains(&seq))) else { continue };
        let start = index * PAGE_LEN as u64;
        if start >= size {
            continue;
        }
        let inside = usize::try_from(size - start).unwrap_or(PAGE_LEN);
        if inside < PAGE_LEN {
            // Nothing beyond the end is ever read.
            Arc::make_mut(&mut page)[inside..].fill(0);
        }
        pages.insert(index, page);
    }
    Content::durable(pages)
}

fn pick(rng: &mut Prng, candidates: Vec<Option<Arc<Page>>>, got_there: u64, tear: bool) -> Option<Arc<Page>> {
    let one = |rng: &mut Prng| {
        let newest = candidates.len() - 1;
        let index = match rng.chance(got_there) {
            false => 0,
            // Mostly the newest, now and then one that was overwritten in the cache.
            true if newest < 2 || rng.chance(6) => newest,
            true => 1 + rng.below(newest),
        };
        candidates.get(index).cloned().flatten()
    };
    let first = one(rng);
    if !tear || candidates.len() < 2 || !rng.chance(2) {
        return first;
    }
    let mut torn: Page = first.as_deref().copied().unwrap_or([0; PAGE_LEN]);
    for (index, sector) in torn.chunks_exact_mut(SECTOR).enumerate() {
        match candidates.get(rng.below(candidates.len())).and_then(Option::as_ref) {
            Some(other) => sector.copy_from_slice(&other[index * SECTOR..(index + 1) * SECTOR]),
            None => sector.fill(0),
        }
    }
    Some(Arc::new(torn))
}
