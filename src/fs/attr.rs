//! Attributes, and when setuid bits and file capabilities fall.
//!
//! With FUSE_HANDLE_KILLPRIV_V2 the kernel leaves that to us: file capabilities go with every write, truncation and
//! change of owner; setuid and setgid bits with a write or truncation by somebody without CAP_FSETID. (A change of owner
//! drops the bits by itself: the backing kernel does that.)

use super::caller::Caller;
use super::inode::Inode;
use super::{EnvelopeFs, StoreError};
use crate::backing::{Backing, Kind, SetTime};
use crate::kms::event;
use crate::store::attr::{CAPABILITY, S_PRIVILEGED};
use crate::store::{Attr, Result, SetAttr};

impl<B: Backing> EnvelopeFs<B> {
    /// stat(2).
    ///
    /// # Errors
    /// Those of the backing directory; `ESTALE` for a node the kernel was never told of.
    pub fn get_attr(&self, node: u64) -> Result<Attr> {
        self.store.getattr(&self.inode(node)?.node)
    }

    /// The attributes that the kernel asks for before it reads or writes through its own cache.
    ///
    /// # Errors
    /// [`StoreError::KeysLocked`]; as [`EnvelopeFs::get_attr`].
    pub fn get_attr_for_io(&self, node: u64) -> Result<Attr> {
        self.store.may_read()?;
        self.get_attr(node)
    }

    /// chmod(2), chown(2), truncate(2) and utimensat(2), all at once or some of them, through the open file `handle` if there
    /// is one. Whether privileges are killed is decided here.
    ///
    /// # Errors
    /// Those of the store.
    pub fn set_attr(&self, caller: &Caller, node: u64, set: SetAttr, handle: Option<u64>) -> Result<Attr> {
        let inode = self.inode(node)?;
        // A handle that is gone is no reason to fail: the change can be made without one.
        let handle = handle.and_then(|h| self.handles.get(h)).filter(|h| h.is_writable());
        let set = SetAttr { kill_suidgid: set.size.is_some() && !caller.keeps_set_bits(), ..set };
        let touches_privileges = set.mode.is_some() || set.uid.is_some() || set.gid.is_some();
        if touches_privileges {
            inode.privileges.change();
        }
        let apply = || self.store.setattr(&inode.node, &set, handle.as_ref().map(|h| &h.file));
        // A file is cut or grown by its states, which takes its key.
        let mut attr = event::on_behalf_of(caller.of_keys(), apply);
        if set.kill_suidgid {
            attr = attr.and_then(|a| self.drop_setgid_of_strangers(caller, &inode, a));
        }
        if touches_privileges {
            inode.privileges.change();
        }
        let attr = attr?;
        if set.mtime != SetTime::Omit {
            inode.kernels_mtime.set(attr.mtime);
        }
        if set.size.is_some() || set.uid.is_some() || set.gid.is_some() {
            self.drop_capability(&inode, attr.kind)?;
        }
        Ok(attr)
    }

    /// Called before data of `inode` changes: drops what a change must not leave; with `kill`, who has no right to leave
    /// them, setuid and setgid too.
    pub(super) fn before_change(&self, inode: &Inode<B>, kill: Option<&Caller>) -> Result<()> {
        if inode.privileges.are_known_absent() {
            return Ok(());
        }
        let before = inode.privileges.look();
        let mut attr = self.store.getattr(&inode.node)?;
        if let Some(caller) = kill.filter(|_| attr.mode & S_PRIVILEGED != 0) {
            attr = self.store.setattr(&inode.node, &SetAttr { kill_suidgid: true, ..SetAttr::default() }, None)?;
            attr = self.drop_setgid_of_strangers(caller, inode, attr)?;
            if let Some(tell) = self.mode_changed.get() {
                tell(inode.id);
            }
        }
        self.drop_capability(inode, attr.kind)?;
        if attr.mode & S_PRIVILEGED == 0 {
            inode.privileges.absent(before);
        }
        Ok(())
    }

    /// Removes file capabilities, if there are any.
    fn drop_capability(&self, inode: &Inode<B>, kind: Kind) -> Result<()> {
        if kind != Kind::File || inode.privileges.are_known_absent() {
            return Ok(());
        }
        match self.store.get_xattr(&inode.node, CAPABILITY) {
            Ok(_) => self.store.remove_xattr(&inode.node, CAPABILITY),
            Err(e) if is_no_attribute(&e) => Ok(()),
            Err(e) => Err(e),
        }
    }
}

/// The inode has no such attribute, or the backing directory can hold none.
pub(super) fn is_no_attribute(e: &StoreError) -> bool {
    matches!(super::errno::of(e), libc::ENODATA | libc::EOPNOTSUPP)
}
