//! Names: lookup, and everything that makes, moves and removes them.

use std::sync::Arc;

use super::caller::Caller;
use super::{EnvelopeFs, Found};
use crate::backing::{Backing, Kind, RenameMode};
use crate::store::{Attr, Node, Owner, Result};

impl<B: Backing> EnvelopeFs<B> {
    /// The child `name` of `parent`.
    ///
    /// # Errors
    /// `NotFound`; those of the store.
    pub fn lookup(&self, parent: u64, name: &[u8]) -> Result<Found> {
        let dir = self.inode(parent)?;
        let (node, attr) = self.store.lookup(&dir.node, name)?;
        Ok(self.enter(node, attr))
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// Those of the store.
    pub fn mkdir(&self, caller: &Caller, parent: u64, name: &[u8], mode: u32, umask: u32) -> Result<Found> {
        let dir = self.inode(parent)?;
        let (node, attr) = self.store.mkdir(&dir.node, name, mode, umask, self.owner(caller))?;
        Ok(self.enter(node, attr))
    }

    /// Makes a FIFO, socket, device or regular file without opening it. `rdev` is as in `st_rdev`.
    ///
    /// # Errors
    /// Those of the store.
    pub fn mknod(&self, caller: &Caller, parent: u64, name: &[u8], new: &NewNode) -> Result<Found> {
        let dir = self.inode(parent)?;
        let owner = self.owner(caller);
        let (node, attr) = self.store.mknod(&dir.node, name, new.kind, new.mode, new.umask, new.rdev, owner)?;
        Ok(self.enter(node, attr))
    }

    /// Makes a symbolic link.
    ///
    /// # Errors
    /// Those of the store.
    pub fn symlink(&self, caller: &Caller, parent: u64, name: &[u8], target: &[u8]) -> Result<Found> {
        let dir = self.inode(parent)?;
        let (node, attr) = self.store.symlink(&dir.node, name, target, self.owner(caller))?;
        Ok(self.enter(node, attr))
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// Those of the store.
    pub fn read_link(&self, node: u64) -> Result<Vec<u8>> {
        self.store.readlink(&self.inode(node)?.node)
    }

    /// Gives `node` another name.
    ///
    /// # Errors
    /// Those of the store.
    pub fn link(&self, node: u64, parent: u64, name: &[u8]) -> Result<Found> {
        let inode = self.inode(node)?;
        let dir = self.inode(parent)?;
        let attr = self.store.link(&inode.node, &dir.node, name)?;
        Ok(self.enter(inode.node.clone(), attr))
    }

    /// Removes a name that is not a directory's.
    ///
    /// # Errors
    /// Those of the store.
    pub fn unlink(&self, parent: u64, name: &[u8]) -> Result<()> {
        self.store.unlink(&self.inode(parent)?.node, name)
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// Those of the store.
    pub fn rmdir(&self, parent: u64, name: &[u8]) -> Result<()> {
        self.store.rmdir(&self.inode(parent)?.node, name)
    }

    /// Renames, replaces or exchanges.
    ///
    /// # Errors
    /// Those of the store.
    pub fn rename(&self, from: (u64, &[u8]), to: (u64, &[u8]), mode: RenameMode) -> Result<()> {
        let (old, new) = (self.inode(from.0)?, self.inode(to.0)?);
        self.store.rename(&old.node, from.1, &new.node, to.1, mode)
    }

    /// Counts one more lookup of `node`.
    pub(super) fn enter(&self, node: Arc<Node<B>>, attr: Attr) -> Found {
        let generation = node.id();
        let inode = self.inodes.enter(node, attr.mtime);
        Found { node: inode.id, generation, attr }
    }

    /// Whom a new inode belongs to; `None` leaves it to the backing directory.
    pub(super) fn owner(&self, caller: &Caller) -> Option<Owner> {
        self.settings.gives_away.then(|| caller.owner())
    }
}

/// What [`EnvelopeFs::mknod`] makes.
#[derive(Debug, Clone, Copy)]
pub struct NewNode {
    pub kind: Kind,
    /// Permission bits; the umask has not been applied to them.
    pub mode: u32,
    pub umask: u32,
    pub rdev: u64,
}
