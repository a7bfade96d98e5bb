//! Directories on their way in and out, in `.envelopefs/pool/`.
//!
//! A directory must have its id durably before it shows under its name, or a power cut could leave one that nobody
//! can read. An fsync for each `mkdir` would cost milliseconds, so directories are made ahead in batches that share
//! one sync, and `mkdir` renames one out. Where that cannot be (a default ACL to inherit, a quota project, a group
//! that only the kernel may give), the directory is made next to its place under a reserved name, synced, and renamed.
//!
//! A directory to be removed is renamed in here first, then loses its id: at no instant does one without an id stand
//! under a user's name. What a crash leaves in here is cleared when the store is opened; a directory that holds
//! anything of users' is never touched.

use super::attr::{Attr, S_ISGID};
use super::dir::{self, Leftovers};
use super::error::{Result, StoreError};
use super::namespace::Owner;
use super::node::Node;
use super::open::{Store, is, kernel};
use crate::backing::{Backing, Kind, RenameMode, SetTime, Stat};
use crate::format::ids::DirId;
use crate::format::names::{self, Encoded, NameKeys};
use parking_lot::Mutex;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const READY_PREFIX: &[u8] = b"ready.";
const GONE_PREFIX: &[u8] = b"gone.";
const BATCH_MIN: usize = 8;
const BATCH_MAX: usize = 256;
const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";
const ACL_NO: u8 = 1;
const ACL_YES: u8 = 2;

struct Ready {
    name: Vec<u8>,
    id: DirId,
}

struct Stock {
    ready: Vec<Ready>,
    /// Size of the next batch: grows while directories are made in bulk.
    batch: usize,
}

/// Directories made ahead.
pub(super) struct Pool<B: Backing> {
    folder: Option<B::Node>,
    stock: Mutex<Stock>,
    /// Held while a batch is made, so that those who wait for it don't each make one.
    filling: Mutex<()>,
}

/// Why a pooled directory was not used.
enum Refused {
    /// The backing directory forbids this way; another may do.
    Way,
    Error(StoreError),
}

impl<B: Backing> Pool<B> {
    pub fn new(folder: Option<B::Node>) -> Self {
        Self { folder, stock: Mutex::new(Stock { ready: Vec::new(), batch: BATCH_MIN }), filling: Mutex::new(()) }
    }

    fn folder(&self) -> Result<&B::Node> {
        self.folder.as_ref().ok_or(StoreError::ReadOnly)
    }
}

fn named(prefix: &[u8]) -> Vec<u8> {
    [prefix, DirId::random().to_string().as_bytes()].concat()
}

/// Whether this way of renaming is closed, and another may be open.
fn other_way(e: &io::Error) -> bool {
    let closed = [libc::EXDEV, libc::EPERM, libc::EACCES, libc::EINVAL, libc::ENOSYS, libc::EOPNOTSUPP, libc::EDQUOT];
    closed.iter().any(|c| is(e, *c))
}

/// A directory to be made.
struct NewDir<'a, B: Backing> {
    /// The one that it will be in, and its descriptor.
    dir: &'a Arc<Node<B>>,
    fd: &'a B::Node,
    name: &'a Encoded,
    mode: u32,
    umask: u32,
    owner: Option<Owner>,
}

impl<B: Backing> Store<B> {
    /// Makes a directory.
    ///
    /// # Errors
    /// [`StoreError::Exists`], [`StoreError::ReadOnly`], those of [`Store::lookup`].
    pub fn mkdir(
        &self,
        dir: &Arc<Node<B>>,
        name: &[u8],
        mode: u32,
        umask: u32,
        owner: Option<Owner>,
    ) -> Result<(Arc<Node<B>>, Attr)> {
        self.writable()?;
        let b = self.backing();
        let _entries = dir.dir()?.lock.write();
        let enc = self.encode(dir, name)?;
        let fd = dir.fd(b)?;
        // Renaming onto a name asks before, as not every backing file system has RENAME_NOREPLACE.
        match b.stat_at(&fd, enc.content()) {
            Ok(_) => return Err(StoreError::Exists),
            Err(e) if !is(&e, libc::ENOENT) => return Err(kernel(e)),
            Err(_) => {}
        }
        let Some(keys) = &self.names else {
            b.mkdir(&fd, enc.content(), mode, umask).map_err(kernel)?;
            let new = b.lookup(&fd, enc.content()).map_err(kernel)?;
            let st = self.give(dir, &new, 0, owner).inspect_err(|_| {
                let _ = b.rmdir(&fd, enc.content());
            })?;
            return self.made(dir, &enc, &st);
        };
        let new_sidecar = self.put_sidecar(&fd, &enc)?;
        let made = self.mkdir_encrypted(&NewDir { dir, fd: &fd, name: &enc, mode, umask, owner }, keys);
        let (st, id) = made.inspect_err(|_| {
            if new_sidecar {
                self.drop_sidecar(&fd, &enc);
            }
        })?;
        let (node, attr) = self.made(dir, &enc, &st)?;
        let _ = node.dir()?.id.set(id);
        Ok((node, attr))
    }

    fn mkdir_encrypted(&self, new: &NewDir<'_, B>, keys: &NameKeys) -> Result<(Stat, DirId)> {
        if !self.has_default_acl(new.dir, new.fd)? {
            match self.mkdir_from_pool(new, keys) {
                Err(Refused::Way) => {}
                Err(Refused::Error(e)) => return Err(e),
                Ok(made) => return Ok(made),
            }
        }
        self.mkdir_in_place(new, keys)
    }

    fn has_default_acl(&self, dir: &Arc<Node<B>>, fd: &B::Node) -> Result<bool> {
        let known = &dir.dir()?.default_acl;
        match known.load(Ordering::Acquire) {
            ACL_NO => return Ok(false),
            ACL_YES => return Ok(true),
            _ => {}
        }
        let has = match self.backing().get_xattr(fd, DEFAULT_ACL) {
            Ok(_) => true,
            Err(e) if [libc::ENODATA, libc::EOPNOTSUPP, libc::ENOSYS].iter().any(|c| is(&e, *c)) => false,
            Err(e) => return Err(e.into()),
        };
        known.store(if has { ACL_YES } else { ACL_NO }, Ordering::Release);
        Ok(has)
    }

    /// Takes one out of the pool, makes it what mkdir(2) would have made, and renames it to its place.
    fn mkdir_from_pool(&self, wanted: &NewDir<'_, B>, keys: &NameKeys) -> std::result::Result<(Stat, DirId), Refused> {
        let b = self.backing();
        let ready = self.take_ready(keys).map_err(Refused::Error)?;
        let folder = self.pool.folder().map_err(Refused::Error)?;
        let made = self.dress(wanted, folder, &ready).and_then(|(new, last_mode)| {
            b.rename(folder, &ready.name, wanted.fd, wanted.name.content(), RenameMode::Replace)
                .map_err(|e| if other_way(&e) { Refused::Way } else { Refused::Error(kernel(e)) })?;
            Ok((new, last_mode))
        });
        let (new, last_mode) = made.inspect_err(|_| self.discard(folder, &ready.name))?;
        let done = || -> io::Result<Stat> {
            if let Some(mode) = last_mode {
                b.set_mode(&new, mode)?;
            }
            // It was made a while ago.
            b.set_times(&new, SetTime::Now, SetTime::Now)?;
            b.stat(&new)
        };
        // The directory is there and whole; a mode that stays 0700 or an older time is no reason to say it is not.
        let st = done().or_else(|e| {
            tracing::warn!("mode or times of a new directory could not be set: {e}");
            b.stat(&new)
        });
        Ok((st.map_err(|e| Refused::Error(e.into()))?, ready.id))
    }

    /// Gives a pooled directory its owner, group and mode. Returns the mode to set after the rename, if it must wait.
    fn dress(
        &self,
        wanted: &NewDir<'_, B>,
        folder: &B::Node,
        ready: &Ready,
    ) -> std::result::Result<(B::Node, Option<u32>), Refused> {
        let b = self.backing();
        let io = |e: io::Error| Refused::Error(e.into());
        let store = Refused::Error;
        let new = b.lookup(folder, &ready.name).map_err(io)?;
        let st = b.stat(&new).map_err(io)?;
        let parent = wanted.dir.stat(b).map_err(store)?;
        let setgid = parent.mode & S_ISGID;
        let want_uid = wanted.owner.map_or(st.uid, |o| o.uid);
        let want_gid = if setgid != 0 { parent.gid } else { wanted.owner.map_or(st.gid, |o| o.gid) };
        let uid = (st.uid != want_uid).then_some(want_uid);
        let gid = (st.gid != want_gid).then_some(want_gid);
        if uid.is_some() || gid.is_some() {
            b.set_owner(&new, uid, gid).map_err(|e| if other_way(&e) { Refused::Way } else { io(e) })?;
        }
        // Moving a directory writes its `..`, for which its owner needs write permission.
        let mode = (wanted.mode & !wanted.umask & 0o1777) | setgid;
        let first = if mode & 0o200 == 0 { mode | 0o700 } else { mode };
        if first != st.mode {
            b.set_mode(&new, first).map_err(io)?;
        }
        // Who is not in the group gets no setgid from chmod(2), though mkdir(2) would have given it.
        if setgid != 0 && b.stat(&new).map_err(io)?.mode & S_ISGID == 0 {
            return Err(Refused::Way);
        }
        Ok((new, (first != mode).then_some(mode)))
    }

    /// Makes a directory under a reserved name next to its place, and renames it when its id is durable.
    fn mkdir_in_place(&self, wanted: &NewDir<'_, B>, keys: &NameKeys) -> Result<(Stat, DirId)> {
        let fd = wanted.fd;
        let b = self.backing();
        let id = DirId::random();
        let temp = named(names::NEW_DIR_PREFIX);
        b.mkdir(fd, &temp, wanted.mode, wanted.umask).map_err(kernel)?;
        let make = || -> Result<Stat> {
            let new = b.lookup(fd, &temp)?;
            b.sync_file(&dir::write_id(b, &new, keys, &id)?)?;
            b.sync_dir(&new)?;
            self.give(wanted.dir, &new, 0, wanted.owner)?;
            b.rename(fd, &temp, fd, wanted.name.content(), RenameMode::Replace).map_err(kernel)?;
            Ok(b.stat(&new)?)
        };
        let st = make().inspect_err(|_| self.discard(fd, &temp))?;
        Ok((st, id))
    }

    /// Removes an own directory that never got its name.
    fn discard(&self, folder: &B::Node, name: &[u8]) {
        let b = self.backing();
        let gone = b.lookup(folder, name).and_then(|n| match b.unlink(&n, names::DIR_ID_FILE) {
            Err(e) if !is(&e, libc::ENOENT) => Err(e),
            _ => b.rmdir(folder, name),
        });
        if let Err(e) = gone {
            tracing::warn!("a directory made ahead stays behind: {e}");
        }
    }

    fn take_ready(&self, keys: &NameKeys) -> Result<Ready> {
        if let Some(r) = self.pool.stock.lock().ready.pop() {
            return Ok(r);
        }
        let _filling = self.pool.filling.lock();
        if let Some(r) = self.pool.stock.lock().ready.pop() {
            return Ok(r);
        }
        let batch = {
            let mut s = self.pool.stock.lock();
            let batch = s.batch;
            s.batch = (batch * 2).min(BATCH_MAX);
            batch
        };
        let mut made = self.make_batch(keys, batch)?;
        let one = made.pop().ok_or(StoreError::NotFound)?;
        self.pool.stock.lock().ready.append(&mut made);
        Ok(one)
    }

    /// Makes directories with ids, durably: as many as the disk has room for, at least one.
    fn make_batch(&self, keys: &NameKeys, count: usize) -> Result<Vec<Ready>> {
        let b = self.backing();
        let folder = self.pool.folder()?;
        let mut made = Vec::with_capacity(count);
        for _ in 0..count {
            let ready = Ready { name: named(READY_PREFIX), id: DirId::random() };
            let one = b.mkdir(folder, &ready.name, 0o700, 0).map_err(kernel).and_then(|()| {
                let new = b.lookup(folder, &ready.name)?;
                dir::write_id(b, &new, keys, &ready.id)
            });
            match one {
                Ok(_) => made.push(ready),
                Err(e) => {
                    let _ = b.rmdir(folder, &ready.name);
                    if made.is_empty() {
                        return Err(e);
                    }
                    break;
                }
            }
        }
        if let Err(e) = b.sync_all() {
            made.iter().for_each(|r| self.discard(folder, &r.name));
            return Err(e.into());
        }
        Ok(made)
    }

    /// Fills the pool up, if directories are being made.
    pub(super) fn top_up_pool(&self) -> Result<()> {
        let (Some(keys), false) = (&self.names, self.shared().read_only) else { return Ok(()) };
        let Some(_filling) = self.pool.filling.try_lock() else { return Ok(()) };
        let missing = {
            let mut s = self.pool.stock.lock();
            let (have, batch) = (s.ready.len(), s.batch);
            // Nobody made one since the store was opened.
            if batch == BATCH_MIN && have == 0 {
                return Ok(());
            }
            if have > batch / 4 {
                // Enough: the next batch need not be larger.
                s.batch = s.batch.min((have * 2).max(BATCH_MIN * 2));
                return Ok(());
            }
            batch - have
        };
        let mut made = self.make_batch(keys, missing)?;
        self.pool.stock.lock().ready.append(&mut made);
        Ok(())
    }

    /// Removes what was made ahead and not used.
    pub(super) fn empty_pool(&self) {
        let _filling = self.pool.filling.lock();
        let ready = std::mem::take(&mut self.pool.stock.lock().ready);
        if let Some(folder) = &self.pool.folder {
            ready.iter().for_each(|r| self.discard(folder, &r.name));
        }
    }

    /// Removes the directory `name` of `dir`, found to be empty but for `leftovers`. The caller holds the locks of
    /// both. Once it is out of the user's sight there is no error any more: what stays is cleared at the next open.
    pub(super) fn remove_dir(&self, dir: &B::Node, name: &[u8], fd: &B::Node, leftovers: &Leftovers) -> Result<()> {
        let b = self.backing();
        let folder = self.pool.folder()?;
        let temp = named(GONE_PREFIX);
        let (folder, temp) = match b.rename(dir, name, folder, &temp, RenameMode::Replace) {
            Ok(()) => (folder, temp),
            Err(e) if other_way(&e) => {
                let temp = self.set_aside(dir, name)?;
                (dir, temp)
            }
            Err(e) => return Err(kernel(e)),
        };
        if let Err(e) = self.erase_dir(folder, &temp, fd, leftovers) {
            tracing::warn!("a removed directory stays behind in the store's folder: {e}");
        }
        Ok(())
    }

    /// Renames a directory to a reserved name beside it, out of the user's sight.
    pub(super) fn set_aside(&self, dir: &B::Node, name: &[u8]) -> Result<Vec<u8>> {
        let temp = named(names::NEW_DIR_PREFIX);
        self.backing().rename(dir, name, dir, &temp, RenameMode::Replace).map_err(kernel)?;
        Ok(temp)
    }

    fn erase_dir(&self, folder: &B::Node, name: &[u8], fd: &B::Node, leftovers: &Leftovers) -> Result<()> {
        let b = self.backing();
        for s in &leftovers.sidecars {
            b.unlink(fd, s)?;
        }
        for u in &leftovers.unfinished {
            let n = b.lookup(fd, u)?;
            if b.stat(&n)?.kind == Kind::Dir {
                let inside = dir::leftovers(&b.read_dir(&n)?)?;
                if !inside.unfinished.is_empty() {
                    return Err(StoreError::NotEmpty);
                }
                self.erase_dir(fd, u, &n, &inside)?;
            }
        }
        if leftovers.has_id {
            b.unlink(fd, names::DIR_ID_FILE)?;
        }
        Ok(b.rmdir(folder, name)?)
    }

    /// Clears what an earlier session left in the pool.
    pub(super) fn clean_pool(&self) -> Result<()> {
        let Some(folder) = &self.pool.folder else { return Ok(()) };
        let b = self.backing();
        for e in b.read_dir(folder)? {
            if !e.name.starts_with(READY_PREFIX) && !e.name.starts_with(GONE_PREFIX) {
                continue;
            }
            let cleared = b.lookup(folder, &e.name).map_err(kernel).and_then(|fd| {
                let leftovers = dir::leftovers(&b.read_dir(&fd)?)?;
                self.erase_dir(folder, &e.name, &fd, &leftovers)
            });
            if let Err(why) = cleared {
                let shown = String::from_utf8_lossy(&e.name);
                tracing::warn!("{shown} in the store's pool is left as it is: {why}");
            }
        }
        Ok(())
    }
}
