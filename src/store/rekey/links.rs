//! Files with several names: finding them, moving them all, and finishing that after a crash.

use super::{NEW_PREFIX, Name, REKEY_DIR, Unfinished, new_name};
use crate::backing::{Access, Backing, Kind, RenameMode, Stat};
use crate::format::ids::FileId;
use crate::format::names::{self, Listed, STORE_DIR};
use crate::store::Store;
use crate::store::error::{Result, StoreError};
use crate::store::header::{Source, read_slots};
use crate::store::node::InodeKey;
use crate::store::open::{LOST_AND_FOUND, is, kernel};
use crate::store::walk::{Visit, Walk};
use std::collections::HashMap;
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

impl<B: Backing> Store<B> {
    /// Walks the store and collects the names of these inodes, as they are now; what changes during the walk may be
    /// missed, which [`Store::rekey_all`] notices. `step` may end it.
    ///
    /// # Errors
    /// The backing directory's, those of `step`. Directories whose names cannot be read are passed over.
    pub fn names_of(&self, wanted: &[InodeKey], step: &dyn Fn(u64) -> Result<()>) -> Result<Names<B>> {
        let mut found: Names<B> = wanted.iter().map(|k| (*k, Vec::new())).collect();
        let mut todo = vec![self.root()];
        while let Some(dir) = todo.pop() {
            step(0)?;
            let entries = match self.read_dir(&dir) {
                Ok(e) => e,
                Err(StoreError::NotFound | StoreError::Damage(_)) => continue,
                Err(e) => return Err(e),
            };
            for e in entries {
                match e.kind {
                    Kind::Dir => match self.read_dir_node(&dir, &e) {
                        Ok((n, _)) => todo.push(n),
                        Err(StoreError::NotFound) => {}
                        Err(e) => return Err(e),
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
    /// The backing directory's. The names are then as they were.
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
        let marker = marker(from, ino);
        b.rename(&folder, &unfinished.name, &folder, &marker, RenameMode::Replace)?;
        unfinished.name = marker;
        b.sync_dir(&folder)?;
        let exchange = |i: usize| b.rename(&folder, &links[i].name, &dirs[i], &names[i].name, RenameMode::Exchange);
        for i in 0..links.len() {
            let Err(e) = exchange(i) else { continue };
            let back = (0..i).rev().try_for_each(exchange).and_then(|()| {
                b.unlink(&folder, &unfinished.name)?;
                b.sync_dir(&folder)
            });
            if let Err(e) = back {
                unfinished.keep = true;
                tracing::error!("the names of a file lead to two copies of it now; unmount and mount again: {e}");
            }
            return Err(kernel(e));
        }
        unfinished.keep = true;
        Ok(())
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
        let mut linked = HashMap::new();
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
        tracing::info!("finishing the rekey of {} files with several names that was interrupted", linked.len());
        for visit in Walk::new(b)? {
            let (dir, entry) = match visit {
                Ok(Visit::Entry { dir, entry }) => (dir, entry),
                Ok(Visit::Dir { .. }) => continue,
                // Belongs to root, whoever the store belongs to.
                Err(e) if e.path == LOST_AND_FOUND && is(&e.error, libc::EACCES) => continue,
                Err(e) => return Err(e.error.into()),
            };
            let Some((from, copy)) = linked.get(&entry.ino) else { continue };
            if !matches!(names::classify(&entry.name), Listed::Short | Listed::Long) {
                continue;
            }
            let copy = b.lookup(&folder, copy)?;
            if is_old(b, &dir.node, &entry.name, &b.stat(&copy)?, *from)? {
                let link = new_name();
                b.link(&copy, &folder, &link)?;
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

/// Whether the entry is still the file `from` as it was when `copy` took its place.
fn is_old<B: Backing>(b: &B, dir: &B::Node, name: &[u8], copy: &Stat, from: FileId) -> Result<bool> {
    let node = b.lookup(dir, name)?;
    let st = b.stat(&node)?;
    // A program that does not know of the folder may have written to either since: they are two files then.
    if st.kind != Kind::File || st.mtime != copy.mtime {
        return Ok(false);
    }
    match read_slots(b, &b.open(&node, Access::Read)?, Source::Cache) {
        Ok(read) => Ok(read.is_some_and(|(pair, _)| pair.authoritative().is_ok_and(|(_, s)| s.file == from))),
        Err(StoreError::Damage(_)) => Ok(false),
        Err(e) => Err(e),
    }
}
