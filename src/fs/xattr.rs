//! Extended attributes and ACLs.

use super::attr::is_no_attribute;
use super::caller::Caller;
use super::inode::Inode;
use super::{EnvelopeFs, StoreError, os};
use crate::backing::{Backing, Kind, XattrMode};
use crate::store::attr::CAPABILITY;
use crate::store::{Attr, Result, SetAttr};

const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";

/// Answer to a question that may be about the size only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Size(u32),
    Data(Vec<u8>),
}

impl Answer {
    /// # Errors
    /// `ERANGE` if `data` is longer than `room`; a `room` of 0 asks for the size.
    fn fitting(data: Vec<u8>, room: u32) -> Result<Self> {
        let len = u32::try_from(data.len()).map_err(|_| os(libc::E2BIG))?;
        match room {
            0 => Ok(Self::Size(len)),
            r if len <= r => Ok(Self::Data(data)),
            _ => Err(os(libc::ERANGE)),
        }
    }
}

impl<B: Backing> EnvelopeFs<B> {
    /// Whether the backing directory keeps ACLs. Without, the kernel must not be told that we do.
    pub fn has_acls(&self) -> bool {
        match self.store.get_xattr(&self.store.root(), ACL_ACCESS) {
            Ok(_) | Err(StoreError::NoAttribute) => true,
            Err(e) => super::errno::of(&e) == libc::ENODATA,
        }
    }

    /// getxattr(2).
    ///
    /// # Errors
    /// `NoAttribute`; `ERANGE`; those of the store.
    pub fn get_xattr(&self, node: u64, name: &[u8], room: u32) -> Result<Answer> {
        let inode = self.inode(node)?;
        let value = self.store.get_xattr(&inode.node, name).map_err(|e| {
            // "No ACL" grants what the mode says; "not supported" would grant nothing.
            if is_acl(name) && is_no_attribute(&e) { StoreError::NoAttribute } else { e }
        })?;
        Answer::fitting(value, room)
    }

    /// listxattr(2).
    ///
    /// # Errors
    /// `ERANGE`; those of the store.
    pub fn list_xattr(&self, node: u64, room: u32) -> Result<Answer> {
        let names = self.store.list_xattr(&self.inode(node)?.node)?;
        let mut list = Vec::with_capacity(names.iter().map(|n| n.len() + 1).sum());
        for name in names {
            list.extend_from_slice(&name);
            list.push(0);
        }
        Answer::fitting(list, room)
    }

    /// setxattr(2).
    ///
    /// # Errors
    /// Those of the store.
    pub fn set_xattr(&self, caller: &Caller, node: u64, name: &[u8], value: &[u8], mode: XattrMode) -> Result<()> {
        let inode = self.inode(node)?;
        let changes = name == CAPABILITY || name == ACL_ACCESS;
        if changes {
            inode.privileges.change();
        }
        let mut done = self.store.set_xattr(&inode.node, name, value, mode);
        if done.is_ok() && name == ACL_ACCESS {
            let attr = self.store.getattr(&inode.node);
            done = attr.and_then(|a| self.drop_setgid_of_strangers(caller, &inode, a)).map(drop);
        }
        if changes {
            inode.privileges.change();
        }
        done
    }

    /// removexattr(2).
    ///
    /// # Errors
    /// Those of the store.
    pub fn remove_xattr(&self, node: u64, name: &[u8]) -> Result<()> {
        self.store.remove_xattr(&self.inode(node)?.node, name)
    }

    /// Who sets an ACL on a file of a group that is not his, or writes to it, loses the file's setgid bit, as with
    /// chmod(2). The backing kernel sees only the daemon, so it is done here. Returns the attributes then.
    pub(super) fn drop_setgid_of_strangers(&self, caller: &Caller, inode: &Inode<B>, attr: Attr) -> Result<Attr> {
        if attr.mode & libc::S_ISGID == 0 || attr.kind == Kind::Symlink || caller.is_in_group(attr.gid) {
            return Ok(attr);
        }
        let set = SetAttr { mode: Some(attr.mode & !libc::S_ISGID), ..SetAttr::default() };
        self.store.setattr(&inode.node, &set, None)
    }
}

fn is_acl(name: &[u8]) -> bool {
    name == ACL_ACCESS || name == ACL_DEFAULT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asking_for_the_size_and_asking_with_too_little_room_differ() {
        assert_eq!(Answer::fitting(vec![1, 2, 3], 0).unwrap(), Answer::Size(3));
        assert_eq!(Answer::fitting(vec![1, 2, 3], 3).unwrap(), Answer::Data(vec![1, 2, 3]));
        let e = Answer::fitting(vec![1, 2, 3], 2).unwrap_err();
        assert_eq!(super::super::errno::of(&e), libc::ERANGE);
        assert_eq!(Answer::fitting(Vec::new(), 0).unwrap(), Answer::Size(0));
    }
}
