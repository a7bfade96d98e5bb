//! Names: looking up, making, linking, removing.

use super::attr::{Attr, S_ISGID, S_PRIVILEGED};
use super::dir;
use super::error::{Result, StoreError};
use super::file::{FileCore, OpenFile};
use super::node::{Location, Node};
use super::open::{Store, kernel};
use crate::backing::{Access, Backing, Kind, Stat};
use crate::format::links::{self, Reference};
use crate::format::names::Encoded;
use std::sync::Arc;

/// Whom a new inode shall belong to: given if the daemon is root and acts for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// A live node, and the pin that keeps it.
type Pinned<B> = (Arc<Node<B>>, Arc<<B as Backing>::Node>);

/// An entry about to be removed or replaced.
pub(super) struct Leaving<B: Backing> {
    node: Option<Pinned<B>>,
    /// Where its target lies, if it is a symbolic link with a long one.
    target: Option<(Reference, B::Node)>,
}

impl<B: Backing> Leaving<B> {
    /// The live node, if there is one.
    pub(super) fn node(&self) -> Option<&Arc<Node<B>>> {
        self.node.as_ref().map(|(n, _)| n)
    }

    /// The node, for an entry that did not go after all.
    pub(super) fn into_node(self) -> Option<Pinned<B>> {
        self.node
    }
}

impl<B: Backing> Store<B> {
    /// What lies under `name` in `dir`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::NotADirectory`], [`StoreError::NameTooLong`], [`StoreError::BadName`],
    /// damage of the directory's id, the backing directory's.
    pub fn lookup(&self, dir: &Arc<Node<B>>, name: &[u8]) -> Result<(Arc<Node<B>>, Attr)> {
        let _entries = dir.dir()?.lock.read();
        let name = match self.encode(dir, name) {
            // What cannot be made does not exist either.
            Err(StoreError::BadName) => return Err(StoreError::NotFound),
            other => other?,
        };
        self.child(dir, name.content())
    }

    /// Makes a regular file (`O_EXCL`) and opens it for reading and writing.
    ///
    /// # Errors
    /// [`StoreError::Exists`], [`StoreError::ReadOnly`], those of [`Store::lookup`] and of
    /// [`super::keys::Keys::may_create`]. Nothing stays after an error.
    pub fn create(
        &self,
        dir: &Arc<Node<B>>,
        name: &[u8],
        mode: u32,
        umask: u32,
        owner: Option<Owner>,
    ) -> Result<(Arc<Node<B>>, Attr, OpenFile<B>)> {
        // Its first write will need the active KEK, and may reach us when nobody can be told of an error any more.
        let mut ready = None;
        self.shared().may_create(&mut ready)?;
        let b = self.backing();
        let make = |fd: &B::Node, name: &Encoded| {
            // Never setuid as root, not for an instant: see `give`.
            let first = if owner.is_some() { mode & !S_PRIVILEGED } else { mode };
            b.create(fd, name.content(), first, umask).map_err(kernel)
        };
        let (node, attr, (fd, file)) = match self.make_entry(dir, name, make, |(fd, _)| self.give(dir, fd, mode, owner))
        {
            Ok(made) => made,
            Err(e) => {
                if let Some(unused) = ready.take() {
                    self.shared().keys.put_back_ready(unused);
                }
                return Err(e);
            }
        };
        let fd = node.pin_new(fd);
        let (core, open) = FileCore::with_new_file(self.shared(), fd, file, ready)?;
        let open = match self.table.put_core(node.key(), &core) {
            None => {
                // The keys may have been locked before the file was in the table.
                core.forget_ready_if_locked();
                open
            }
            Some(theirs) => theirs.open(Access::ReadWrite)?,
        };
        Ok((node, attr, open))
    }

    /// Makes a FIFO, socket, device, or an empty regular file.
    ///
    /// # Errors
    /// As [`Store::create`].
    #[allow(clippy::too_many_arguments, reason = "mknod(2) and who asks for it")]
    pub fn mknod(
        &self,
        dir: &Arc<Node<B>>,
        name: &[u8],
        kind: Kind,
        mode: u32,
        umask: u32,
        rdev: u64,
        owner: Option<Owner>,
    ) -> Result<(Arc<Node<B>>, Attr)> {
        if matches!(kind, Kind::Dir | Kind::Symlink) {
            return Err(StoreError::Invalid);
        }
        let b = self.backing();
        let make = |fd: &B::Node, name: &Encoded| {
            let first = if owner.is_some() { mode & !S_PRIVILEGED } else { mode };
            b.mknod(fd, name.content(), kind, first, umask, rdev).map_err(kernel)?;
            b.lookup(fd, name.content()).map_err(kernel)
        };
        let (node, attr, _) = self.make_entry(dir, name, make, |fd| self.give(dir, fd, mode, owner))?;
        Ok((node, attr))
    }

    /// Makes an entry: sidecar, then `make`, then `finish`, which gives the stat; undoes it all if one fails.
    pub(super) fn make_entry<T>(
        &self,
        dir: &Arc<Node<B>>,
        name: &[u8],
        make: impl FnOnce(&B::Node, &Encoded) -> Result<T>,
        finish: impl FnOnce(&T) -> Result<Stat>,
    ) -> Result<(Arc<Node<B>>, Attr, T)> {
        self.writable()?;
        let b = self.backing();
        let _entries = dir.dir()?.lock.write();
        let name = self.encode(dir, name)?;
        let dir_fd = dir.fd(b)?;
        let new_sidecar = self.put_sidecar(&dir_fd, &name)?;
        let undo = |e| {
            // If something has the name already, the sidecar that was missing is its own.
            if new_sidecar && !matches!(e, StoreError::Exists) {
                self.drop_sidecar(&dir_fd, &name);
            }
            e
        };
        let made = make(&dir_fd, &name).map_err(undo)?;
        let st = finish(&made).map_err(|e| {
            let _ = b.unlink(&dir_fd, name.content());
            undo(e)
        })?;
        let (node, attr) = self.made(dir, &name, &st)?;
        Ok((node, attr, made))
    }

    /// Takes note of a new entry. The caller holds the directory's lock.
    pub(super) fn made(&self, dir: &Arc<Node<B>>, name: &Encoded, st: &Stat) -> Result<(Arc<Node<B>>, Attr)> {
        let node = self.table.adopt(st, Some(self.new_location(dir, name)), None);
        let attr = self.attr(&node, st)?;
        Ok((node, attr))
    }

    /// Where an entry lies that was made just now.
    pub(super) fn new_location(&self, dir: &Arc<Node<B>>, name: &Encoded) -> Location<B> {
        let made = self.unsynced.note(dir.key(), name.sidecar().map(|(s, _)| s));
        Location { parent: dir.clone(), name: name.content().into(), made }
    }

    /// Gives a new inode that is no directory to its owner, and its mode's privileged bits, in this order: a file of
    /// root's is never setuid. A setgid parent has given its group already, which stays. Returns the final stat.
    pub(super) fn give(&self, dir: &Arc<Node<B>>, fd: &B::Node, mode: u32, owner: Option<Owner>) -> Result<Stat> {
        let b = self.backing();
        let st = b.stat(fd)?;
        let Some(owner) = owner else { return Ok(st) };
        let uid = (st.uid != owner.uid).then_some(owner.uid);
        let mut gid = (st.gid != owner.gid).then_some(owner.gid);
        if gid.is_some() && dir.stat(b)?.mode & S_ISGID != 0 {
            gid = None;
        }
        // A change of owner takes them away, so that they are given after it.
        let privileged = if st.kind == Kind::Symlink { 0 } else { mode & S_PRIVILEGED };
        if uid.is_none() && gid.is_none() && privileged == 0 {
            return Ok(st);
        }
        if uid.is_some() || gid.is_some() {
            b.set_owner(fd, uid, gid)?;
        }
        if privileged != 0 {
            b.set_mode(fd, st.mode | privileged)?;
        }
        Ok(b.stat(fd)?)
    }

    /// Gives `node` another name.
    ///
    /// # Errors
    /// [`StoreError::NotPermitted`] for directories, [`StoreError::Exists`], those of [`Store::lookup`].
    pub fn link(&self, node: &Arc<Node<B>>, dir: &Arc<Node<B>>, name: &[u8]) -> Result<Attr> {
        if node.kind() == Kind::Dir {
            return Err(StoreError::NotPermitted);
        }
        self.moves.make_room();
        let b = self.backing();
        // Begun under the directory's lock, as in a rename: the other way round they could wait for each other.
        let make = |dir: &B::Node, name: &Encoded| {
            let (fd, kept) = self.kept(node)?;
            let moving = self.moves.begin();
            b.link(&fd, dir, name.content()).map_err(kernel).map(|()| (fd, moving, kept))
        };
        let (_, attr, (fd, _moving, _kept)) = self.make_entry(dir, name, make, |(fd, ..)| Ok(b.stat(fd)?))?;
        if self.moves.on() {
            self.moves.record(node.key(), fd);
        }
        Ok(attr)
    }

    /// Removes an entry that is no directory.
    ///
    /// # Errors
    /// [`StoreError::IsADirectory`], those of [`Store::lookup`].
    pub fn unlink(&self, dir: &Arc<Node<B>>, name: &[u8]) -> Result<()> {
        self.writable()?;
        let b = self.backing();
        let _entries = dir.dir()?.lock.write();
        let name = self.encode(dir, name)?;
        let dir_fd = dir.fd(b)?;
        let st = b.stat_at(&dir_fd, name.content()).map_err(kernel)?;
        if st.kind == Kind::Dir {
            return Err(StoreError::IsADirectory);
        }
        let leaving = self.leaving(&dir_fd, name.content(), &st)?;
        b.unlink(&dir_fd, name.content()).map_err(kernel)?;
        self.drop_sidecar(&dir_fd, &name);
        self.left(dir, name.content(), leaving);
        Ok(())
    }

    /// Prepares for the removal of an entry: its live node is pinned, a long link target is kept for it. The caller
    /// holds the directory's lock.
    pub(super) fn leaving(&self, dir: &B::Node, name: &[u8], st: &Stat) -> Result<Leaving<B>> {
        let b = self.backing();
        let node = match self.table.get((st.dev, st.ino)) {
            Some(n) => {
                let fd = n.fd(b)?;
                Some((n, fd))
            }
            None => None,
        };
        let mut target = None;
        if st.kind == Kind::Symlink && st.size == links::REFERENCE_LEN as u64 {
            let link = b.lookup(dir, name).map_err(kernel)?;
            // A damaged reference must not keep the link from being removed.
            if let Ok(r) = Reference::parse(&b.readlink(&link)?) {
                if let Some((n, _)) = &node {
                    let _ = self.readlink(n).map(|t| n.target.set(t));
                }
                target = Some((r, link));
            }
        }
        Ok(Leaving { node, target })
    }

    /// Completes the removal of an entry.
    pub(super) fn left(&self, dir: &Arc<Node<B>>, name: &[u8], leaving: Leaving<B>) {
        if let Some((node, _pin)) = &leaving.node {
            node.lost(dir, name);
        }
        let Some((reference, link)) = leaving.target else { return };
        let last = self.backing().stat(&link).is_ok_and(|st| st.nlink == 0);
        if let (true, Some(links)) = (last, &self.links_dir)
            && let Err(e) = self.backing().unlink(links, &reference.name)
        {
            tracing::warn!("the file of a removed link's target stays behind: {e}");
        }
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// [`StoreError::NotEmpty`], [`StoreError::NotADirectory`], those of [`Store::lookup`].
    pub fn rmdir(&self, dir: &Arc<Node<B>>, name: &[u8]) -> Result<()> {
        self.writable()?;
        let b = self.backing();
        loop {
            // To learn which directory it is takes the parent's lock, to remove it both, in order.
            let (child, _) = self.lookup(dir, name)?;
            child.dir()?;
            let _entries = dir::lock_dirs(&[dir, &child])?;
            let name = self.encode(dir, name)?;
            let dir_fd = dir.fd(b)?;
            let st = b.stat_at(&dir_fd, name.content()).map_err(kernel)?;
            if (st.dev, st.ino) != child.key() {
                continue;
            }
            let fd = child.fd(b)?;
            if self.names.is_none() {
                b.rmdir(&dir_fd, name.content()).map_err(kernel)?;
            } else {
                let leftovers = dir::leftovers(&b.read_dir(&fd)?)?;
                self.remove_dir(&dir_fd, name.content(), &fd, &leftovers)?;
                self.drop_sidecar(&dir_fd, &name);
            }
            child.lost(dir, name.content());
            self.unsynced.forget(child.key());
            return Ok(());
        }
    }
}
