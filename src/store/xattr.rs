//! Extended attributes.

use super::error::{Result, StoreError};
use super::node::Node;
use super::open::{Store, is, kernel};
use crate::backing::{Backing, XattrMode};
use crate::format::damage::Damage;
use crate::format::xattrs::{FoundXattr, XATTR_NAME_MAX, XATTR_VALUE_MAX, XattrName};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What the kernel says of a name that is too long for an attribute.
fn out_of_range() -> StoreError {
    StoreError::Backing(io::Error::from_raw_os_error(libc::ERANGE))
}

fn too_big() -> StoreError {
    StoreError::Backing(io::Error::from_raw_os_error(libc::E2BIG))
}

impl<B: Backing> Store<B> {
    fn xattr_name(&self, name: &[u8]) -> Result<XattrName> {
        if name.is_empty() || name.len() > XATTR_NAME_MAX {
            return Err(out_of_range());
        }
        if name.contains(&0) {
            return Err(StoreError::Invalid);
        }
        match self.xattrs.encode_name(name) {
            XattrName::Unsupported => Err(StoreError::NotSupported),
            n => Ok(n),
        }
    }

    /// The value of an attribute.
    ///
    /// # Errors
    /// [`StoreError::NoAttribute`], [`StoreError::NotSupported`] for a namespace that is not stored,
    /// [`Damage::XattrAuth`], the backing directory's.
    pub fn get_xattr(&self, n: &Arc<Node<B>>, name: &[u8]) -> Result<Vec<u8>> {
        let stored = self.xattr_name(name)?;
        let b = self.backing();
        let fd = n.fd(b)?;
        match stored {
            XattrName::Sealed { backing, long } => {
                let sealed = b.get_xattr(&fd, &backing).map_err(kernel)?;
                let (_, value) = self.xattrs.open_value(&backing, long, &sealed)?;
                Ok(value)
            }
            _ => b.get_xattr(&fd, name).map_err(kernel),
        }
    }

    /// Sets an attribute.
    ///
    /// # Errors
    /// [`StoreError::Exists`] and [`StoreError::NoAttribute`] as `mode` asks, [`StoreError::NotSupported`], `E2BIG`
    /// for a value over 64 KiB, `ERANGE` for a name over 255 bytes, the backing directory's.
    pub fn set_xattr(&self, n: &Arc<Node<B>>, name: &[u8], value: &[u8], mode: XattrMode) -> Result<()> {
        self.writable()?;
        let stored = self.xattr_name(name)?;
        if value.len() > XATTR_VALUE_MAX {
            return Err(too_big());
        }
        let b = self.backing();
        let (fd, _kept) = self.kept(n)?;
        match stored {
            XattrName::Sealed { backing, long } => {
                let sealed = self.xattrs.seal_value(&backing, long, name, value);
                b.set_xattr(&fd, &backing, &sealed, mode).map_err(kernel)
            }
            _ => {
                let done = b.set_xattr(&fd, name, value, mode).map_err(kernel);
                self.acl_changed(n);
                done
            }
        }
    }

    /// Names of an inode's attributes. Those that this store did not make are left out.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn list_xattr(&self, n: &Arc<Node<B>>) -> Result<Vec<Vec<u8>>> {
        let b = self.backing();
        let fd = n.fd(b)?;
        let mut names = Vec::new();
        for found in b.list_xattr(&fd).map_err(kernel)? {
            match self.xattrs.decode_name(&found) {
                FoundXattr::Plain(name) => names.push(name),
                FoundXattr::InValue => match self.name_in_value(&fd, &found) {
                    Ok(name) => names.extend(name),
                    // One damaged attribute must not hide the others.
                    Err(StoreError::Damage(d)) => tracing::warn!(inode = n.key().1, code = d.code(), "{d}"),
                    Err(e) => return Err(e),
                },
                FoundXattr::Foreign => {}
            }
        }
        Ok(names)
    }

    fn name_in_value(&self, fd: &B::Node, backing: &[u8]) -> Result<Option<Vec<u8>>> {
        match self.backing().get_xattr(fd, backing) {
            Ok(sealed) => Ok(Some(self.xattrs.open_value(backing, true, &sealed)?.0.ok_or(Damage::XattrAuth)?)),
            // Removed since it was listed.
            Err(e) if is(&e, libc::ENODATA) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Removes an attribute.
    ///
    /// # Errors
    /// [`StoreError::NoAttribute`], [`StoreError::NotSupported`], the backing directory's.
    pub fn remove_xattr(&self, n: &Arc<Node<B>>, name: &[u8]) -> Result<()> {
        self.writable()?;
        let (fd, _kept) = self.kept(n)?;
        self.remove_xattr_of(n, &fd, name)
    }

    /// The same of the inode that `fd` refers to, which is the node's.
    pub(super) fn remove_xattr_of(&self, n: &Arc<Node<B>>, fd: &B::Node, name: &[u8]) -> Result<()> {
        let b = self.backing();
        match self.xattr_name(name)? {
            XattrName::Sealed { backing, .. } => b.remove_xattr(fd, &backing).map_err(kernel),
            _ => {
                let done = b.remove_xattr(fd, name).map_err(kernel);
                self.acl_changed(n);
                done
            }
        }
    }

    /// An ACL may have been set or removed: whether a directory has a default one is to be asked again.
    fn acl_changed(&self, n: &Arc<Node<B>>) {
        if let Ok(state) = n.dir() {
            state.default_acl.store(0, Ordering::Release);
        }
    }
}
