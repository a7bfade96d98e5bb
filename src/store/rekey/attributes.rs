//! What a file is besides its content: copied from one backing inode to another as it lies there, sealed or not. No
//! sealed value is bound to an inode or a file id.

use crate::backing::{Backing, SetTime, Timestamp, XattrMode};
use crate::store::Result;
use crate::store::open::is;
use std::collections::BTreeMap;
use std::io;

/// Owner, mode, times, and extended attributes with ACLs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Attributes {
    uid: u32,
    gid: u32,
    mode: u32,
    atime: Timestamp,
    mtime: Timestamp,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What the kernel says where there are no extended attributes.
fn has_none(e: &io::Error) -> bool {
    [libc::EOPNOTSUPP, libc::ENOSYS].iter().any(|c| is(e, *c))
}

fn xattrs<B: Backing>(b: &B, node: &B::Node) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let names = match b.list_xattr(node) {
        Err(e) if has_none(&e) => Vec::new(),
        other => other?,
    };
    let mut found = BTreeMap::new();
    for name in names {
        match b.get_xattr(node, &name) {
            Ok(value) => drop(found.insert(name, value)),
            Err(e) if is(&e, libc::ENODATA) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

impl Attributes {
    /// Those of an inode.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn of<B: Backing>(b: &B, node: &B::Node) -> Result<Self> {
        let st = b.stat(node)?;
        let xattrs = xattrs(b, node)?;
        Ok(Self { uid: st.uid, gid: st.gid, mode: st.mode, atime: st.atime, mtime: st.mtime, xattrs })
    }

    /// Makes another inode's like these. Extended attributes that are not `ours` (labels of the backing file system's
    /// own) are copied and removed where that is allowed.
    ///
    /// # Errors
    /// The backing directory's: an owner that this process may not give, no space for an attribute.
    pub fn give_to<B: Backing>(&self, b: &B, node: &B::Node, ours: impl Fn(&[u8]) -> bool) -> Result<()> {
        let st = b.stat(node)?;
        let (uid, gid) = ((st.uid != self.uid).then_some(self.uid), (st.gid != self.gid).then_some(self.gid));
        if uid.is_some() || gid.is_some() {
            b.set_owner(node, uid, gid)?;
        }
        let there = xattrs(b, node)?;
        let allowed = |name: &[u8], r: io::Result<()>| if ours(name) { r } else { Ok(()) };
        for name in there.keys().filter(|n| !self.xattrs.contains_key(*n)) {
            allowed(name, b.remove_xattr(node, name))?;
        }
        for (name, value) in self.xattrs.iter().filter(|(n, v)| there.get(*n) != Some(v)) {
            allowed(name, b.set_xattr(node, name, value, XattrMode::Any))?;
        }
        // After owner and ACL, which change it; the ACL's mask is in it.
        if b.stat(node)?.mode != self.mode {
            b.set_mode(node, self.mode)?;
        }
        Ok(b.set_times(node, SetTime::At(self.atime), SetTime::At(self.mtime))?)
    }
}
