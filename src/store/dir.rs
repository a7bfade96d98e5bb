//! Directories: their ids, the names in them, and listing them.

use super::attr::Attr;
use super::error::{Result, StoreError};
use super::node::{Location, Node};
use super::open::{LOST_AND_FOUND, Store, is, kernel};
use crate::backing::{Access, Backing, DirEntry, Kind, read_into};
use crate::format::damage::Damage;
use crate::format::ids::DirId;
use crate::format::names::{self, Encoded, Listed, NameFault, NameKeys};
use parking_lot::RwLockWriteGuard;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The plaintext name.
    pub name: Vec<u8>,
    /// The backing inode's number.
    pub ino: u64,
    pub kind: Kind,
    /// The name in the backing directory.
    pub backing: Vec<u8>,
}

/// A backing name that is no entry's, with what is wrong with it.
pub type LeftOut = (Vec<u8>, Damage);

/// Reads a whole small file of the store's own, which is at most `max` bytes long; a longer one is cut at `max + 1`.
pub(super) fn read_small<B: Backing>(b: &B, dir: &B::Node, name: &[u8], max: usize) -> io::Result<Vec<u8>> {
    let file = b.open(&b.lookup(dir, name)?, Access::Read)?;
    let mut buf = vec![0; max + 1];
    let n = read_into(b, &file, &mut buf, 0)?;
    buf.truncate(n);
    Ok(buf)
}

/// Makes a small file of the store's own. On an error nothing of it stays.
pub(super) fn write_small<B: Backing>(b: &B, dir: &B::Node, name: &[u8], data: &[u8]) -> io::Result<B::File> {
    let (_, file) = b.create(dir, name, 0o400, 0)?;
    match b.write_at(&file, data, 0) {
        Ok(()) => Ok(file),
        Err(e) => {
            let _ = b.unlink(dir, name);
            Err(e)
        }
    }
}

/// Reads a directory's id.
///
/// # Errors
/// [`Damage::DirIdMissing`], [`Damage::DirIdAuth`], the backing directory's.
pub(super) fn read_id<B: Backing>(b: &B, dir: &B::Node, keys: &NameKeys) -> Result<DirId> {
    match read_small(b, dir, names::DIR_ID_FILE, names::SEALED_DIR_ID_LEN) {
        Ok(sealed) => Ok(keys.open_dir_id(&sealed)?),
        Err(e) if is(&e, libc::ENOENT) => Err(Damage::DirIdMissing.into()),
        // Something else than a file stands there.
        Err(e) if [libc::EISDIR, libc::ELOOP, libc::EINVAL].iter().any(|c| is(&e, *c)) => Err(Damage::DirIdAuth.into()),
        Err(e) => Err(e.into()),
    }
}

/// Gives a directory its id. Returns the file, for syncing.
pub(super) fn write_id<B: Backing>(b: &B, dir: &B::Node, keys: &NameKeys, id: &DirId) -> Result<B::File> {
    Ok(write_small(b, dir, names::DIR_ID_FILE, &keys.seal_dir_id(id))?)
}

/// Takes the locks of several directories, in order of node id, each once.
pub(super) fn lock_dirs<'a, B: Backing>(dirs: &[&'a Arc<Node<B>>]) -> Result<Vec<RwLockWriteGuard<'a, ()>>> {
    let mut sorted = dirs.to_vec();
    sorted.sort_by_key(|n| n.id());
    sorted.dedup_by_key(|n| n.id());
    sorted.into_iter().map(|n| Ok(n.dir()?.lock.write())).collect()
}

/// What a directory holds besides entries of users.
pub(super) struct Leftovers {
    /// Sidecars without a file.
    pub sidecars: Vec<Vec<u8>>,
    /// Directories whose making was cut short.
    pub unfinished: Vec<Vec<u8>>,
    pub has_id: bool,
}

/// What may go with an empty directory.
///
/// # Errors
/// [`StoreError::NotEmpty`].
pub(super) fn leftovers(entries: &[DirEntry]) -> Result<Leftovers> {
    let mut l = Leftovers { sidecars: Vec::new(), unfinished: Vec::new(), has_id: false };
    for e in entries {
        match names::classify(&e.name) {
            Listed::DirId => l.has_id = true,
            // An own file never goes by this without its content, which the next arm finds.
            Listed::Sidecar => l.sidecars.push(e.name.clone()),
            Listed::Unfinished => l.unfinished.push(e.name.clone()),
            Listed::Short | Listed::Long | Listed::Reserved => return Err(StoreError::NotEmpty),
        }
    }
    Ok(l)
}

impl<B: Backing> Store<B> {
    /// The id of a directory, read once.
    pub(super) fn dir_id(&self, dir: &Arc<Node<B>>, keys: &NameKeys) -> Result<DirId> {
        let state = dir.dir()?;
        if let Some(id) = state.id.get() {
            return Ok(*id);
        }
        let b = self.backing();
        let fd = dir.fd(b)?;
        let id = match read_id(b, &fd, keys) {
            // A directory that was removed while somebody had it open has lost its id on purpose.
            Err(StoreError::Damage(Damage::DirIdMissing)) if b.stat(&fd)?.nlink == 0 => {
                return Err(StoreError::NotFound);
            }
            other => other?,
        };
        Ok(*state.id.get_or_init(|| id))
    }

    /// The backing name of `name` in `dir`.
    ///
    /// # Errors
    /// [`StoreError::NameTooLong`], [`StoreError::BadName`], damage of the directory's id.
    pub(super) fn encode(&self, dir: &Arc<Node<B>>, name: &[u8]) -> Result<Encoded> {
        names::check(name).map_err(|f| match f {
            NameFault::TooLong => StoreError::NameTooLong,
            NameFault::Invalid => StoreError::BadName,
        })?;
        match &self.names {
            Some(keys) => Ok(keys.encode(&self.dir_id(dir, keys)?, name)),
            None if name.starts_with(names::RESERVED) => Err(StoreError::BadName),
            None => Ok(Encoded::Short(name.to_vec())),
        }
    }

    /// Entries of a directory, in the backing directory's order, without `.` and `..`. Names that are not this
    /// directory's are left out, with a warning in the log.
    ///
    /// # Errors
    /// [`StoreError::NotADirectory`], damage of the directory's id, the backing directory's.
    pub fn read_dir(&self, dir: &Arc<Node<B>>) -> Result<Vec<Entry>> {
        self.list(dir).map(|(entries, _)| entries)
    }

    /// As [`Store::read_dir`], and what was left out: backing names, with what is wrong with them.
    ///
    /// # Errors
    /// As [`Store::read_dir`].
    pub fn list(&self, dir: &Arc<Node<B>>) -> Result<(Vec<Entry>, Vec<LeftOut>)> {
        Ok(self.list_up_to(dir, usize::MAX)?.unwrap_or_default())
    }

    /// As [`Store::list`]; `None` if there are more than `most` entries in the backing directory, of which a long name has
    /// two. Then no name was looked at.
    pub(super) fn list_up_to(&self, dir: &Arc<Node<B>>, most: usize) -> Result<Option<(Vec<Entry>, Vec<LeftOut>)>> {
        let state = dir.dir()?;
        let _entries = state.lock.read();
        let fd = dir.fd(self.backing())?;
        let id = match &self.names {
            Some(keys) => match self.dir_id(dir, keys) {
                Ok(id) => Some((keys, id)),
                // Removed while it was open: an empty listing, as everywhere.
                Err(StoreError::NotFound) => return Ok(Some(Default::default())),
                Err(e) => return Err(e),
            },
            None => None,
        };
        let Some(found) = self.backing().read_dir_up_to(&fd, most)? else { return Ok(None) };
        let mut out = Vec::with_capacity(found.len());
        let mut bad: Vec<LeftOut> = Vec::new();
        for e in found {
            let name = match &id {
                Some((keys, id)) => self.plain_name(keys, id, &fd, &e.name),
                None if e.name.starts_with(names::RESERVED) => Ok(None),
                None => Ok(Some(e.name.clone())),
            };
            match name {
                Ok(None) => {}
                Ok(Some(name)) => out.extend(self.entry(&fd, name, e)?),
                Err(StoreError::Damage(_)) if e.name == LOST_AND_FOUND && dir.id() == super::node::ROOT_ID => {}
                Err(StoreError::Damage(d)) => {
                    let shown = String::from_utf8_lossy(&e.name);
                    tracing::debug!(inode = dir.key().1, code = d.code(), "entry {shown:?} left out: {d}");
                    bad.push((e.name, d));
                }
                Err(e) => return Err(e),
            }
        }
        if !bad.is_empty() && !state.warned.swap(true, Ordering::Relaxed) {
            let bad = bad.len();
            tracing::warn!(inode = dir.key().1, "{bad} entries with names that are not this directory's left out");
        }
        Ok(Some((out, bad)))
    }

    fn entry(&self, dir: &B::Node, name: Vec<u8>, e: DirEntry) -> Result<Option<Entry>> {
        let kind = match e.kind {
            Some(k) => k,
            None => match self.backing().stat_at(dir, &e.name) {
                Ok(st) => st.kind,
                Err(e) if is(&e, libc::ENOENT) => return Ok(None),
                Err(e) => return Err(e.into()),
            },
        };
        Ok(Some(Entry { name, ino: e.ino, kind, backing: e.name }))
    }

    /// The plaintext of a backing name; `None` for what is the store's own.
    fn plain_name(&self, keys: &NameKeys, id: &DirId, dir: &B::Node, name: &[u8]) -> Result<Option<Vec<u8>>> {
        match names::classify(name) {
            Listed::Short => Ok(Some(keys.decode(id, name)?)),
            Listed::Long => {
                match read_small(self.backing(), dir, &names::sidecar_of(name), names::TEXT_MAX) {
                    Ok(text) => Ok(Some(keys.decode_long(id, name, &text)?)),
                    // Missing, or not a file: one bad entry must not hide the others.
                    Err(_) => Err(Damage::NameSidecar.into()),
                }
            }
            Listed::Sidecar | Listed::DirId | Listed::Unfinished | Listed::Reserved => Ok(None),
        }
    }

    /// Node and attributes of an entry that [`Store::read_dir`] gave. Opens nothing.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if it is gone since.
    pub fn read_dir_node(&self, dir: &Arc<Node<B>>, e: &Entry) -> Result<(Arc<Node<B>>, Attr)> {
        let _entries = dir.dir()?.lock.read();
        self.child(dir, &e.backing)
    }

    /// Node and attributes of what lies under a backing name. The caller holds the directory's lock.
    pub(super) fn child(&self, dir: &Arc<Node<B>>, name: &[u8]) -> Result<(Arc<Node<B>>, Attr)> {
        let b = self.backing();
        let st = b.stat_at(&*dir.fd(b)?, name).map_err(kernel)?;
        let made = self.unsynced.latest(dir.key());
        let at = Location { parent: dir.clone(), name: name.into(), made };
        let node = self.table.adopt(&st, Some(at), None);
        let attr = self.attr(&node, &st)?;
        Ok((node, attr))
    }

    /// Writes a long name's sidecar, unless it is there. Returns whether it made one. The caller holds the
    /// directory's lock.
    pub(super) fn put_sidecar(&self, dir: &B::Node, name: &Encoded) -> Result<bool> {
        let Some((sidecar, text)) = name.sidecar() else { return Ok(false) };
        let b = self.backing();
        match write_small(b, dir, sidecar, text) {
            Ok(_) => return Ok(true),
            Err(e) if is(&e, libc::EEXIST) => {}
            Err(e) => return Err(kernel(e)),
        }
        if read_small(b, dir, sidecar, names::TEXT_MAX).is_ok_and(|t| t == text) {
            return Ok(false);
        }
        // A power cut or a full disk left an empty or torn one.
        b.unlink(dir, sidecar).map_err(kernel)?;
        write_small(b, dir, sidecar, text).map_err(kernel)?;
        Ok(false)
    }

    /// Removes a long name's sidecar. One that stays behind is harmless.
    pub(super) fn drop_sidecar(&self, dir: &B::Node, name: &Encoded) {
        let Some((sidecar, _)) = name.sidecar() else { return };
        match self.backing().unlink(dir, sidecar) {
            Err(e) if !is(&e, libc::ENOENT) => tracing::warn!("name sidecar stays behind: {e}"),
            _ => {}
        }
    }
}
