//! Files with several names: finding them, moving them all, and finishing that after a crash.

use super::{NEW_PREFIX, Name, REKEY_DIR, Unfinished, new_name};
use crate::backing::{Access, Backing, Kind, RenameMode, SetTime, Stat, Timestamp};
use crate::format::geometry;
use crate::format::ids::FileId;
use crate::format::names::{self, Listed, STORE_DIR};
use crate::store::Store;
use crate::store::error::{Result, StoreError};
use crate::store::header::{Source, read_slots};
use crate::store::node::InodeKey;
use crate::store::open::{LOST_AND_FOUND, is, kernel};
use crate::store::walk::{Visit, Walk};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;

/// Names of files that take the place of another inode's: this, its file id, a dot, its number.
const LINKED_PREFIX: &[u8] = b"linked.";
/// Directories synced one by one; more are synced all at once.
const SYNCED_SINGLY: usize = 16;

/// The names of some files, by device and inode number.
pub type Names<B> = HashMap<InodeKey, Vec<Name<B>>>;

/// The name of a file that takes the place of the inode `ino`, which holds the file `from`.
fn marker(from: FileId, ino: u64) -> Vec<u8> {
    [LINKED_PREFIX, format!("{from}.{ino}").as_bytes()].concat()
}

/// Reverses [`marker`].
fn whose(name: &[u8]) -> Option<(FileId, u64)> {
    let text = std::str::from_utf8(name.strip_prefix(LINKED_PREFIX)?).ok()?;
    let (id, ino) = text.split_once('.')?;
    Some((id.parse().ok()?, ino.parse().ok()?))
}

/// Says that names may be missing for want of a directory.
fn missed(e: &StoreError) {
    if !matches!(e, StoreError::NotFound | StoreError::Damage(_)) {
        tracing::warn!("a directory is passed over in the search for names of a file with several: {e}");
    }
}

impl<B: Backing> Store<B> {
    /// Walks the store and collects the names of these inodes, as they are now; what changes during the walk may be
    /// missed, which [`Store::rekey_all`] notices, and so is what lies in directories that cannot be listed. `step` may end
    /// it.
    ///
    /// # Errors
    /// Those of `step`.
    pub fn names_of(&self, wanted: &[InodeKey], step: &dyn Fn(u64) -> Result<()>) -> Result<Names<B>> {
        let mut found: Names<B> = wanted.iter().map(|k| (*k, Vec::new())).collect();
        let mut todo = vec![self.root()];
        while let Some(dir) = todo.pop() {
            step(0)?;
            let entries = match self.read_dir(&dir) {
                Ok(e) => e,
                Err(e) => {
                    missed(&e);
                    continue;
                }
            };
            for e in entries {
                match e.kind {
                    Kind::Dir => match self.read_dir_node(&dir, &e) {
                        Ok((n, _)) => todo.push(n),
                        Err(e) => missed(&e),
                    },
                    Kind::File => {
                        if let Some(names) = found.get_mut(&(dir.key().0, e.ino)) {
                            names.push(Name { dir: Arc::clone(&dir), name: e.backing.into() });
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(found)
    }

    /// Renames the finished copy to each of the names; with several, a crash on the way is finished by the next open.
    /// The caller holds every lock there is.
    ///
    /// # Errors
    /// The backing directory's. The names are then as they were; but for [`StoreError::Parted`].
    pub(super) fn rename_all(
        &self,
        names: &[Name<B>],
        dirs: &[Arc<B::Node>],
        copy: &B::Node,
        (from, ino): (FileId, u64),
        unfinished: &mut Unfinished<'_, B>,
    ) -> Result<()> {
        let b = self.backing();
        let folder = Arc::clone(&unfinished.folder);
        if let ([name], [dir]) = (names, dirs) {
            b.rename(&folder, &unfinished.name, dir, &name.name, RenameMode::Replace).map_err(kernel)?;
            unfinished.keep = true;
            return Ok(());
        }
        // All the names it takes are made first. What is left then are exchanges, which need no space and can be taken
        // back; they leave the old inode under these names, which go with the end of this function.
        let mut links = Vec::new();
        for _ in names {
            let link = new_name();
            b.link(copy, &folder, &link).map_err(kernel)?;
            links.push(Unfinished { backing: b, folder: Arc::clone(&folder), name: link, keep: false });
        }
        let new = b.stat(copy)?.ino;
        let marker = marker(from, ino);
        b.rename(&folder, &unfinished.name, &folder, &marker, RenameMode::Replace)?;
        unfinished.name = marker;
        b.sync_dir(&folder)?;
        let exchange = |i: usize| b.rename(&folder, &links[i].name, &dirs[i], &names[i].name, RenameMode::Exchange);
        for i in 0..links.len() {
            let Err(e) = exchange(i) else { continue };
            // An exchange that failed may have been done all the same.
            let is_at = |i: usize, ino: u64| b.stat_at(&dirs[i], &names[i].name).is_ok_and(|st| st.ino == ino);
            // A name of which it cannot be told where it leads is not exchanged: that might part it from the others.
            let lead = |i: usize, ino: u64| match b.stat_at(&dirs[i], &names[i].name)?.ino == ino {
                true => Ok(()),
                false => exchange(i),
            };
            let back = (0..=i).rev().try_for_each(|i| lead(i, ino).or_else(|_| lead(i, ino)));
            if back.is_err() {
                // Neither forth nor back: forth once more, for what must not be is one file under two inodes.
                if (0..links.len()).all(|i| lead(i, new).is_ok()) {
                    break;
                }
            }
            // Users go on with what there is. The next open must put nothing in the place of what they write.
            if let Err(e) = self.call_off(copy, unfinished) {
                tracing::error!("the note of a rekey of file {from} cannot be removed; unmount before it is used: {e}");
            }
            let Err(stuck) = back else { return Err(kernel(e)) };
            // What failed on the way forth may have put all of them back in the end.
            if (0..links.len()).all(|i| is_at(i, ino)) {
                return Err(kernel(e));
            }
            tracing::error!("the names of file {from} lead to two files with the same content now: {stuck}");
            return Err(StoreError::Parted(stuck));
        }
        unfinished.keep = true;
        Ok(())
    }

    /// Removes the note for a crash of what was taken back, or makes it one that the next open does not follow.
    fn call_off(&self, copy: &B::Node, unfinished: &Unfinished<'_, B>) -> io::Result<()> {
        let b = self.backing();
        let gone = b.unlink(&unfinished.folder, &unfinished.name).and_then(|()| b.sync_dir(&unfinished.folder));
        gone.or_else(|_| {
            // Of files whose times differ it leaves both.
            let mtime = b.stat(copy)?.mtime;
            let other = Timestamp { nsec: mtime.nsec ^ 1, ..mtime };
            b.set_times(copy, SetTime::Omit, SetTime::At(other))
        })
    }

    /// Makes the renames durable, and forgets what was noted for a crash.
    pub(super) fn all_durable(&self, dirs: &[Arc<B::Node>], unfinished: &Unfinished<'_, B>) -> Result<()> {
        let b = self.backing();
        let singly = dirs.len() <= SYNCED_SINGLY && dirs.iter().all(|d| b.sync_dir(d).is_ok());
        if !singly {
            b.sync_all()?;
        }
        if unfinished.name.starts_with(LINKED_PREFIX)
            && let Err(e) = b.unlink(&unfinished.folder, &unfinished.name)
        {
            tracing::warn!("a rekeyed file shows one name too many until the next mount: {e}");
        }
        Ok(())
    }

    /// Deals with what a crash left in the folder: unfinished copies are removed; of a file with several names the rest
    /// is renamed, which takes a walk over the store.
    ///
    /// # Errors
    /// The backing directory's. The store must not be used then: of a file with several names some lead to the one inode
    /// and some to the other, and a write to either would part them for good.
    pub(in crate::store) fn finish_rekeys(&self) -> Result<()> {
        let b = self.backing();
        let own = b.lookup(&b.root()?, STORE_DIR)?;
        let folder = match b.lookup(&own, REKEY_DIR) {
            Err(e) if is(&e, libc::ENOENT) => return Ok(()),
            other => other?,
        };
        let mut linked: HashMap<u64, (FileId, Vec<u8>)> = HashMap::new();
        for e in b.read_dir(&folder)? {
            match whose(&e.name) {
                Some((from, ino)) => drop(linked.insert(ino, (from, e.name))),
                None if e.name.starts_with(NEW_PREFIX) => b.unlink(&folder, &e.name)?,
                None => {}
            }
        }
        if linked.is_empty() {
            return Ok(());
        }
        let mut to_move = HashMap::new();
        for (ino, (from, name)) in &linked {
            let copy = b.lookup(&folder, name)?;
            match self.prove(&b.open(&copy, Access::Read)?) {
                Ok(Some(_)) => drop(to_move.insert(*ino, (*from, copy))),
                // What does not open takes nobody's place: the old file stays under the names that lead to it.
                Ok(None) | Err(StoreError::Damage(_)) => {
                    let names = b.stat(&copy)?.nlink.saturating_sub(1);
                    tracing::error!(
                        "the copy of file {from} does not open: dropped, but for {names} names that lead to it"
                    );
                }
                // Says nothing about the copy: the next open may know more.
                Err(e) => return Err(e),
            }
        }
        tracing::info!("finishing the rekey of {} files with several names that was interrupted", linked.len());
        for visit in Walk::new(b)? {
            let (dir, entry) = match visit {
                Ok(Visit::Entry { dir, entry }) => (dir, entry),
                Ok(Visit::Dir { .. }) => continue,
                // Belongs to root, whoever the store belongs to.
                Err(e) if e.path == LOST_AND_FOUND && is(&e.error, libc::EACCES) => continue,
                Err(e) => return Err(e.error.into()),
            };
            let Some((from, copy)) = to_move.get(&entry.ino) else { continue };
            if !matches!(names::classify(&entry.name), Listed::Short | Listed::Long) {
                continue;
            }
            if is_old(b, &dir.node, &entry.name, &b.stat(copy)?, *from)? {
                let link = new_name();
                b.link(copy, &folder, &link)?;
                b.rename(&folder, &link, &dir.node, &entry.name, RenameMode::Replace)?;
            }
        }
        b.sync_all()?;
        for (_, name) in linked.values() {
            b.unlink(&folder, name)?;
        }
        Ok(())
    }
}

/// Whether a rekey of a file with several names was interrupted in this store. Nothing but
/// [`Store::open`](crate::store::Store::open) for writing may change a file then.
///
/// # Errors
/// The backing directory's.
pub fn is_interrupted<B: Backing>(b: &B) -> io::Result<bool> {
    let folder = match b.root().and_then(|r| b.lookup(&b.lookup(&r, STORE_DIR)?, REKEY_DIR)) {
        Err(e) if is(&e, libc::ENOENT) => return Ok(false),
        other => other?,
    };
    Ok(b.read_dir(&folder)?.iter().any(|e| whose(&e.name).is_some()))
}

/// Whether the entry is still the file `from` as it was when `copy` took its place.
fn is_old<B: Backing>(b: &B, dir: &B::Node, name: &[u8], copy: &Stat, from: FileId) -> Result<bool> {
    let node = b.lookup(dir, name)?;
    let st = b.stat(&node)?;
    // A program that does not know of the folder may have changed either since: they are two files then.
    let looks = |s: &Stat| (s.kind, s.mtime, s.uid, s.gid, s.mode, geometry::plain_size(s.size));
    if st.kind != Kind::File || looks(&st) != looks(copy) {
        return Ok(false);
    }
    match read_slots(b, &b.open(&node, Access::Read)?, Source::Cache) {
        Ok(read) => Ok(read.is_some_and(|(pair, _)| pair.authoritative().is_ok_and(|(_, s)| s.file == from))),
        Err(StoreError::Damage(_)) => Ok(false),
        Err(e) => Err(e),
    }
}
