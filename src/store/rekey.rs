//! A new DEK for a file, and its content encrypted anew under it, while the file is in use.
//!
//! A new backing file is made in `.envelopefs/rekey/`, filled ([`super::file::Fresh`]), made durable, and renamed over
//! the old one. So at every instant the name leads to a whole file under one DEK, and what a crash leaves besides is an
//! unfinished file in the folder, removed by the next open for writing. The node stays and stands for the new inode from
//! then on; whoever has the file open goes on with the new content's keys.
//!
//! # Several names
//! All of them have to move to the new inode. Renames of several names are not one operation, so before the first of
//! them the new file is given a name in the folder that says whose place it takes, durably; if the program is stopped
//! before the last, the next open finishes the work ([`Store::finish_rekeys`]) before anybody can write to either inode.
//! Until then both hold the same content, so any reader reads what it should.
//!
//! # Locks
//! Copying holds the file's lock shared, a segment at a time. The exchange holds, in this order: the directories the
//! names are in; the file's lock, exclusively; its inode's stripe, exclusively, so that no change of attributes is lost;
//! and the KEK, so that nothing under a KEK that is no longer active appears under a name.

mod attributes;
mod links;

pub use links::{Names, is_interrupted};

use super::dir::lock_dirs;
use super::error::{Result, StoreError};
use super::file::{Finished, Fresh};
use super::header::{Header, Source, read_header, read_slots, unwrap_slot};
use super::node::{Location, Node};
use super::open::{Store, is, kernel, own_folder};
use crate::backing::{Access, Backing, Kind, SetTime};
use crate::format::damage::Damage;
use crate::format::geometry;
use crate::format::header::Slot;
use crate::format::ids::{DirId, FileId, KekId};
use crate::format::names::STORE_DIR;
use crate::format::xattrs::FoundXattr;
use crate::kms::event::Operation;
use attributes::Attributes;
use std::collections::HashSet;
use std::io;
use std::sync::Arc;

/// The folder, in the store's own.
pub const REKEY_DIR: &[u8] = b"rekey";
/// Names of files that are being made.
const NEW_PREFIX: &[u8] = b"new.";
/// Rounds in which what was written meanwhile is copied again, before the rest is done with the file's lock held.
const ROUNDS: usize = 8;
/// In so many of them `step` may wait. In the others the copy must be quicker than whoever writes, or it never catches up.
const GENTLE_ROUNDS: usize = 2;
/// So many segments are few enough to be copied while everybody waits: 2 MiB.
const FEW: usize = 4;
/// How often a file is begun anew whose names or KEK changed on the way.
const TRIES: usize = 4;

/// One name of a file.
pub struct Name<B: Backing> {
    /// The directory.
    pub dir: Arc<Node<B>>,
    /// The backing name.
    pub name: Arc<[u8]>,
}

impl<B: Backing> Clone for Name<B> {
    fn clone(&self) -> Self {
        Self { dir: Arc::clone(&self.dir), name: Arc::clone(&self.name) }
    }
}

/// What a rekey came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rekeyed {
    /// The file has a new DEK.
    Done {
        /// The id the file had.
        from: FileId,
        /// The id it has.
        file: FileId,
        /// The KEK its DEK is wrapped under.
        kek: KekId,
        /// Bytes of its content.
        bytes: u64,
    },
    /// It has no content, so no DEK.
    Empty,
    /// It is not there any more, or no regular file.
    Gone,
    /// It has other names, which have to be found first: see [`Store::names_of`].
    Linked,
}

/// A file in the folder, removed when this is dropped unless it was renamed away.
struct Unfinished<'a, B: Backing> {
    backing: &'a B,
    folder: Arc<B::Node>,
    name: Vec<u8>,
    keep: bool,
}

impl<B: Backing> Drop for Unfinished<'_, B> {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        match self.backing.unlink(&self.folder, &self.name) {
            Err(e) if !is(&e, libc::ENOENT) => {
                tracing::warn!("an unfinished file of a rekey stays behind until the next mount: {e}");
            }
            _ => {}
        }
    }
}

/// What was done for a copy before the locks were taken.
struct Ready {
    attributes: Attributes,
    /// Its header was proved to open, if it had this id.
    proved: Option<FileId>,
}

/// How an attempt ended that is no error.
enum Attempt {
    Ended(Rekeyed),
    /// The names or the active KEK are others by now.
    Again,
}

/// A name in the folder that no other file has.
fn new_name() -> Vec<u8> {
    [NEW_PREFIX, DirId::random().to_string().as_bytes()].concat()
}

fn busy() -> StoreError {
    io::Error::from_raw_os_error(libc::EBUSY).into()
}

impl<B: Backing> Store<B> {
    /// Gives the file at `name`, its only name, a new DEK. `step` is told the bytes of each stretch that was copied, and
    /// may wait, for no lock is held then, or end the work. When it is told 0, it may only end it: the longer it takes,
    /// the more is written meanwhile that users must wait for. Durable when it returns. The file's times, mode, owner and attributes stay, but for ctime; so
    /// does its inode number while the mount lives and the kernel knows it.
    ///
    /// # Errors
    /// [`StoreError::ReadOnly`]; damage of the header or of any block; the key service's; the backing directory's, such
    /// as `ENOSPC`; `EBUSY` if the file's names or the active KEK change all the time; those of `step`. After an error
    /// the file is as it was, or, if only making the new name durable failed, rekeyed; but for [`StoreError::Parted`],
    /// after which some of its names are those of another file.
    pub fn rekey(&self, name: &Name<B>, step: &dyn Fn(u64) -> Result<()>) -> Result<Rekeyed> {
        self.rekey_all(std::slice::from_ref(name), step)
    }

    /// The same for a file with several names, which are all of `names`. [`Rekeyed::Linked`] if they are not all. A name
    /// that is there twice counts once.
    ///
    /// # Errors
    /// As [`Store::rekey`].
    pub fn rekey_all(&self, names: &[Name<B>], step: &dyn Fn(u64) -> Result<()>) -> Result<Rekeyed> {
        self.writable()?;
        let mut seen = HashSet::new();
        let names: Vec<_> = names.iter().filter(|n| seen.insert((n.dir.id(), Arc::clone(&n.name)))).cloned().collect();
        for _ in 0..TRIES {
            if let Attempt::Ended(r) = self.attempt(&names, step)? {
                return Ok(r);
            }
        }
        Err(busy())
    }

    fn attempt(&self, names: &[Name<B>], step: &dyn Fn(u64) -> Result<()>) -> Result<Attempt> {
        let Some(first) = names.first() else { return Ok(Attempt::Ended(Rekeyed::Gone)) };
        let found = {
            let _entries = first.dir.dir()?.lock.read();
            self.child(&first.dir, &first.name)
        };
        let (node, attr) = match found {
            Err(StoreError::NotFound) => return Ok(Attempt::Ended(Rekeyed::Gone)),
            other => other?,
        };
        if node.kind() != Kind::File {
            return Ok(Attempt::Ended(Rekeyed::Gone));
        }
        if attr.nlink != names.len() as u64 {
            return Ok(Attempt::Ended(Rekeyed::Linked));
        }
        let source = self.core(&node)?.open(Access::Read)?;
        if source.is_empty() {
            return Ok(Attempt::Ended(Rekeyed::Empty));
        }
        // What a newer program says in the header would be lost.
        if let Header::Slots(read) = self.header_of(&node)?
            && let (_, slot) = read.0.authoritative()?
            && !slot.writable()
        {
            return Err(Damage::UnsupportedFeature(slot.ro_compat).into());
        }
        let b = self.backing();
        let folder = self.rekey_folder()?;
        let name = new_name();
        let (copy, file) = b.create(&folder, &name, 0o600, 0).map_err(kernel)?;
        let copy = Arc::new(copy);
        let mut unfinished = Unfinished { backing: b, folder, name, keep: false };
        let fresh = Fresh::begin(self.shared(), source, Arc::clone(&copy), file)?;
        let file = fresh.file()?;
        fresh.copy_all(step)?;
        let mut durable = geometry::block_count(fresh.len()) <= geometry::first_block(FEW as u64);
        for round in 0..=ROUNDS {
            let gently = round < GENTLE_ROUNDS;
            if fresh.catch_up(&|bytes| step(if gently { bytes } else { 0 }))? <= FEW && durable {
                break;
            }
            // Of much, that takes long, and what is written meanwhile is copied in the next round, not while users wait.
            b.sync_inode(&file)?;
            durable = true;
        }
        // Most of it is made durable, and a header made if all is a hole, while nobody waits.
        fresh.stretch()?;
        fresh.settle()?;
        let before = Attributes::of(b, &*node.fd(b)?)?;
        before.give_to(b, &copy, |x| self.is_ours(x))?;
        b.sync_inode(&file)?;
        let proved = self.prove(&file)?;
        step(0)?;
        self.exchange(&node, names, &fresh, &copy, &Ready { attributes: before, proved }, &mut unfinished)
    }

    /// Opens the header of a copy past every cache: it is about to take the place of one that is known to open.
    fn prove(&self, copy: &B::File) -> Result<Option<FileId>> {
        let Some((pair, _)) = read_slots(self.backing(), copy, Source::Cache)? else { return Ok(None) };
        let (_, slot) = pair.authoritative()?;
        self.shared().keys.permit()?;
        unwrap_slot(&*self.shared().keys.kek(slot.kek)?, slot)?;
        Ok(Some(slot.file))
    }

    /// Puts the copy in the file's place under all its names.
    fn exchange(
        &self,
        node: &Arc<Node<B>>,
        names: &[Name<B>],
        fresh: &Fresh<B>,
        copy: &Arc<B::Node>,
        ready: &Ready,
        unfinished: &mut Unfinished<'_, B>,
    ) -> Result<Attempt> {
        let b = self.backing();
        let dirs: Vec<_> = names.iter().map(|n| &n.dir).collect();
        let entries = lock_dirs(&dirs)?;
        if !self.are_its_names(node, names)? {
            return Ok(Attempt::Again);
        }
        // Before anything of the file is held: this may find a directory by its name.
        let dir_fds = names.iter().map(|n| n.dir.fd(b)).collect::<Result<Vec<_>>>()?;
        let fd = node.fd(b)?;
        let held = fresh.hold()?;
        let finished = fresh.finish(&held)?;
        match finished {
            Finished::Empty => return Ok(Attempt::Ended(Rekeyed::Empty)),
            Finished::Anew => return Ok(Attempt::Again),
            Finished::Changed | Finished::AsBefore => {}
        }
        let bytes = fresh.len();
        let (dev, ino) = held.key();
        let kept = self.shared().inode_locks.exclusive(dev, ino);
        // A link into another directory needs none of the locks above but this one: it may have come between.
        if b.stat(&fd)?.nlink != names.len() as u64 {
            return Ok(Attempt::Again);
        }
        let now = Attributes::of(b, &fd)?;
        let file = fresh.file()?;
        if finished == Finished::Changed || now != ready.attributes {
            now.give_to(b, copy, |x| self.is_ours(x))?;
            b.sync_inode(&file)?;
        }
        let Some((from, id)) = fresh.ids(&held) else { return Ok(Attempt::Ended(Rekeyed::Empty)) };
        if ready.proved != Some(id) {
            // It has another header by now. No key service is called while users wait.
            return Ok(Attempt::Again);
        }
        let old = b.open(&fd, Access::Read)?;
        if names.len() > 1 {
            // Whoever finishes this after a crash tells by its size, times and owner that nobody has changed it since.
            b.sync_inode(&old)?;
        }
        let (old_kek, new) = (self.slot_of(&old)?.kek, self.slot_of(&file)?);
        let stat = b.stat(copy)?;
        let dir_times = dir_fds.iter().map(|fd| b.stat(fd)).collect::<io::Result<Vec<_>>>()?;
        let watch = self.shared().keys.watch();
        let moved = self.shared().keys.with_active(|kek| {
            if kek.id() != new.kek {
                return Ok(false);
            }
            self.rename_all(names, &dir_fds, copy, (from, ino), unfinished).map(|()| true)
        });
        if !moved? {
            return Ok(Attempt::Again);
        }
        watch.ended(Operation::Rekey, id, new.kek, Some(old_kek), &Ok(()));
        // Before anybody writes to the new inode: their fsync promises its names, too.
        for ((n, dir), times) in names.iter().zip(&dir_fds).zip(&dir_times) {
            let made = self.unsynced.note(n.dir.key(), None);
            node.moved(&n.dir, &n.name, Location { parent: Arc::clone(&n.dir), name: Arc::clone(&n.name), made });
            // Users have changed nothing in it. A time that cannot be put back is no reason to fail now.
            let _ = b.set_times(dir, SetTime::Omit, SetTime::At(times.mtime));
        }
        // With several names, what a crash leaves under some of them must be what is under the others.
        let durable = (names.len() > 1).then(|| self.all_durable(&dir_fds, unfinished));
        self.table.replace(node, stat.ino, Arc::clone(copy));
        drop(kept);
        fresh.take_over(held);
        durable.unwrap_or_else(|| self.all_durable(&dir_fds, unfinished))?;
        drop(entries);
        Ok(Attempt::Ended(Rekeyed::Done { from, file: id, kek: new.kek, bytes }))
    }

    fn slot_of(&self, file: &B::File) -> Result<Slot> {
        let (pair, _) = read_slots(self.backing(), file, Source::Cache)?.ok_or(StoreError::Invalid)?;
        Ok(pair.authoritative()?.1.clone())
    }

    /// Whether these are the names of the node, all of them. The caller holds the directories' locks.
    fn are_its_names(&self, node: &Arc<Node<B>>, names: &[Name<B>]) -> Result<bool> {
        let b = self.backing();
        for n in names {
            match b.stat_at(&*n.dir.fd(b)?, &n.name) {
                Ok(st) if (st.dev, st.ino) == node.key() && st.nlink == names.len() as u64 => {}
                Ok(_) => return Ok(false),
                Err(e) if is(&e, libc::ENOENT) => return Ok(false),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    /// The live node of an inode that users may know by another number than the backing inode's.
    pub fn renumbered(&self, dev: u64, ino: u64) -> Option<Arc<Node<B>>> {
        self.table.renumbered((dev, ino))
    }

    /// Whether an attribute of a backing inode is one that the store keeps there.
    fn is_ours(&self, xattr: &[u8]) -> bool {
        !matches!(self.xattrs.decode_name(xattr), FoundXattr::Foreign)
    }

    /// The name `name` of what lies in `dir`.
    ///
    /// # Errors
    /// Those of [`Store::lookup`].
    pub fn name_of(&self, dir: &Arc<Node<B>>, name: &[u8]) -> Result<Name<B>> {
        Ok(Name { dir: Arc::clone(dir), name: self.encode(dir, name)?.content().into() })
    }

    /// A name of the node, if one is known.
    pub fn whereabouts(&self, node: &Node<B>) -> Option<Name<B>> {
        node.location().map(|l| Name { dir: l.parent, name: l.name })
    }

    /// What a regular file has for a header. Takes no key.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if the file is gone; those of [`read_header`].
    pub fn header_of(&self, node: &Arc<Node<B>>) -> Result<Header> {
        let b = self.backing();
        let read = (|| read_header(b, &b.open(&*node.fd(b)?, Access::Read)?, Source::Cache))();
        match read {
            // Known by a name that leads nowhere any more.
            Err(StoreError::Backing(e)) if is(&e, libc::ESTALE) => Err(StoreError::NotFound),
            other => other,
        }
    }

    /// The folder of files that are being made, made on first need.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn rekey_folder(&self) -> Result<Arc<B::Node>> {
        let mut folder = self.rekey_dir.lock();
        if let Some(f) = &*folder {
            return Ok(Arc::clone(f));
        }
        let b = self.backing();
        let own = b.lookup(&b.root()?, STORE_DIR)?;
        let made = Arc::new(own_folder(b, &own, REKEY_DIR)?);
        b.sync_dir(&own)?;
        *folder = Some(Arc::clone(&made));
        Ok(made)
    }
}
