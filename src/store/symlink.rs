//! Symbolic links.

use super::attr::Attr;
use super::dir::{read_small, write_small};
use super::error::{Result, StoreError};
use super::namespace::Owner;
use super::node::Node;
use super::open::{Store, is, kernel};
use crate::backing::{Backing, Kind};
use crate::format::damage::Damage;
use crate::format::links::{self, Reference, SealedTarget};
use crate::format::names::Encoded;
use std::sync::Arc;

impl<B: Backing> Store<B> {
    /// Makes a symbolic link with a target of 1 to 4095 bytes.
    ///
    /// # Errors
    /// [`StoreError::NameTooLong`] for a longer target, [`StoreError::NotFound`] for an empty one, those of
    /// [`Store::create`].
    pub fn symlink(
        &self,
        dir: &Arc<Node<B>>,
        name: &[u8],
        target: &[u8],
        owner: Option<Owner>,
    ) -> Result<(Arc<Node<B>>, Attr)> {
        self.writable()?;
        if target.len() > links::TARGET_MAX {
            return Err(StoreError::NameTooLong);
        }
        if target.is_empty() {
            return Err(StoreError::NotFound);
        }
        if target.contains(&0) {
            return Err(StoreError::Invalid);
        }
        let (text, apart) = match self.links.seal(target) {
            SealedTarget::Inline(text) => (text, None),
            SealedTarget::Apart { sealed, len } => {
                let reference = Reference::new(len);
                self.put_target(&reference, &sealed)?;
                (reference.to_text(), Some(reference))
            }
        };
        let b = self.backing();
        let make = |fd: &B::Node, name: &Encoded| {
            b.symlink(fd, name.content(), &text).map_err(kernel)?;
            b.lookup(fd, name.content()).map_err(kernel)
        };
        let made = self.make_entry(dir, name, make, |fd| self.give(dir, fd, 0, owner));
        let (node, attr, _) = made.inspect_err(|_| {
            if let (Some(r), Some(folder)) = (&apart, &self.links_dir) {
                let _ = b.unlink(folder, &r.name);
            }
        })?;
        Ok((node, attr))
    }

    /// Stores a long target, durably: a link cannot be fsynced, so there is no later moment for it.
    fn put_target(&self, reference: &Reference, sealed: &[u8]) -> Result<()> {
        let b = self.backing();
        let folder = self.links_dir.as_ref().ok_or(StoreError::ReadOnly)?;
        let file = write_small(b, folder, &reference.name, sealed)?;
        b.sync_file(&file).and_then(|()| b.sync_dir(folder)).map_err(|e| {
            let _ = b.unlink(folder, &reference.name);
            e.into()
        })
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if it is none, [`Damage::SymlinkAuth`], the backing directory's.
    pub fn readlink(&self, n: &Arc<Node<B>>) -> Result<Vec<u8>> {
        if n.kind() != Kind::Symlink {
            return Err(StoreError::Invalid);
        }
        if let Some(kept) = n.target.get() {
            return Ok(kept.clone());
        }
        let b = self.backing();
        let text = b.readlink(&*n.fd(b)?)?;
        let target = if text.len() == links::REFERENCE_LEN {
            let reference = Reference::parse(&text)?;
            let folder = self.links_dir.as_ref().ok_or(Damage::SymlinkAuth)?;
            match read_small(b, folder, &reference.name, links::SEALED_MAX) {
                Ok(sealed) => self.links.open_sealed(&sealed),
                Err(e) if is(&e, libc::ENOENT) => match n.target.get() {
                    // The last name went between the two looks.
                    Some(kept) => Ok(kept.clone()),
                    None => Err(Damage::SymlinkAuth),
                },
                Err(e) => return Err(e.into()),
            }
        } else {
            self.links.open_text(&text)
        };
        target.map_err(|d| {
            tracing::error!(inode = n.key().1, code = d.code(), "{d}");
            d.into()
        })
    }

    /// Plaintext length of a target that lies apart.
    pub(super) fn referred_len(&self, n: &Arc<Node<B>>) -> Result<u64> {
        let b = self.backing();
        match Reference::parse(&b.readlink(&*n.fd(b)?)?) {
            Ok(r) => Ok(r.len),
            // A damaged link can still be looked at and removed; reading it tells.
            Err(_) => Ok(0),
        }
    }
}
