//! The store itself: making one, opening one, closing it, and making things durable.

use super::dek_cache::{DekCache, DekCacheLimits};
use super::dir;
use super::error::{Result, StoreError};
use super::file::{FileCore, OpenFile};
use super::keys::{COPIES, KekKind, Keys, StoreFlags};
use super::moves::Moves;
use super::node::{Node, Table};
use super::pool::Pool;
use super::shared::Shared;
use super::unsynced::{Need, Unsynced};
use crate::backing::{Access, Backing, Kind};
use crate::format::damage::Damage;
use crate::format::ids::{DirId, StoreId};
use crate::format::links::LinkKey;
use crate::format::names::{self, NameKeys};
use crate::format::xattrs::XattrKeys;
use crate::kms::KeyProvider;
use parking_lot::Mutex;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Long symbolic link targets.
const LINKS_DIR: &[u8] = b"links";
/// Directories on their way in and out.
const POOL_DIR: &[u8] = b"pool";
/// What a fresh ext file system holds.
pub(super) const LOST_AND_FOUND: &[u8] = b"lost+found";

/// How a store is opened.
#[derive(Debug, Clone, Copy, Default)]
pub struct StoreOptions {
    /// Change nothing in the backing directory.
    pub read_only: bool,
    /// Bounds of the DEK cache.
    pub deks: DekCacheLimits,
    /// Descriptors of inodes to keep open at most; `None`: half of what the process may have, and no
    /// more than 65,536.
    pub pinned_max: Option<usize>,
    /// Most keys kept ready for files to come, where a key service wraps them; 0: none. See [`Store::work_ahead`].
    pub dek_pool: usize,
    /// Most files of a directory whose keys are unwrapped ahead, where a key service does that; 0: none. See
    /// [`Store::work_ahead`].
    pub prefetch: usize,
}

/// An open store.
pub struct Store<B: Backing> {
    shared: Arc<Shared<B>>,
    pub(super) table: Arc<Table<B>>,
    root: Arc<Node<B>>,
    /// `None`: names are in clear.
    pub(super) names: Option<NameKeys>,
    pub(super) links: LinkKey,
    pub(super) xattrs: XattrKeys,
    pub(super) unsynced: Unsynced,
    pub(super) pool: Pool<B>,
    /// `.envelopefs/links/`; `None` in a store opened read-only that has none.
    pub(super) links_dir: Option<B::Node>,
    pub(super) moves: Moves<B>,
    /// `.envelopefs/rekey/`, once it was needed.
    pub(super) rekey_dir: Mutex<Option<Arc<B::Node>>>,
}

/// The kernel's errors that the store has words for.
pub(super) fn kernel(e: io::Error) -> StoreError {
    match e.raw_os_error() {
        Some(libc::ENOENT) => StoreError::NotFound,
        Some(libc::EEXIST) => StoreError::Exists,
        Some(libc::ENOTDIR) => StoreError::NotADirectory,
        Some(libc::EISDIR) => StoreError::IsADirectory,
        Some(libc::ENOTEMPTY) => StoreError::NotEmpty,
        Some(libc::ENAMETOOLONG) => StoreError::NameTooLong,
        Some(libc::EPERM) => StoreError::NotPermitted,
        Some(libc::ENODATA) => StoreError::NoAttribute,
        Some(libc::EOPNOTSUPP) => StoreError::NotSupported,
        _ => StoreError::Backing(e),
    }
}

pub(super) fn is(e: &io::Error, code: i32) -> bool {
    e.raw_os_error() == Some(code)
}

fn pinned_max_by_default() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    // Open files and the daemon's own need the other half. Each holds an inode in the kernel's memory, so not too many.
    usize::try_from(limit.unwrap_or(1 << 17) / 2).unwrap_or(1 << 16).clamp(32, 1 << 16)
}

impl<B: Backing> Store<B> {
    /// Makes a store in the backing directory: keyring, folders, the root's directory id. Durable when it returns.
    ///
    /// # Errors
    /// [`StoreError::NotEmptyForInit`] if the directory holds anything but `lost+found`; the root keys' and the
    /// backing directory's errors.
    pub fn init(b: &B, root: &[Arc<dyn KeyProvider>], kind: KekKind, flags: StoreFlags) -> Result<StoreId> {
        let dir = b.root()?;
        for e in b.read_dir(&dir)? {
            if e.name == names::STORE_DIR {
                // One without any keyring is what an init that was killed early leaves.
                let own = b.read_dir(&b.lookup(&dir, names::STORE_DIR)?)?;
                if own.iter().any(|e| COPIES.iter().any(|c| c.as_bytes() == e.name)) {
                    return Err(StoreError::NotEmptyForInit("there is a store in this directory already".into()));
                }
            } else if e.name != LOST_AND_FOUND {
                return Err(StoreError::NotEmptyForInit("the directory is not empty".into()));
            }
        }
        let plaintext = flags.plaintext_names;
        let keys = Keys::create(b, root, kind, flags)?;
        let own = b.lookup(&dir, names::STORE_DIR)?;
        for name in [LINKS_DIR, POOL_DIR] {
            own_folder(b, &own, name)?;
        }
        if !plaintext {
            dir::write_id(b, &dir, &NameKeys::new(keys.secret()), &DirId::random())?;
        }
        b.sync_all()?;
        Ok(keys.store_id())
    }

    /// Opens a store. The caller has opened the keyring and holds the volume lock.
    ///
    /// # Errors
    /// [`StoreError::NotAStore`], and the backing directory's errors.
    pub fn open(b: B, keys: Keys, o: StoreOptions) -> Result<Arc<Self>> {
        let root_fd = b.root()?;
        let own = b.lookup(&root_fd, names::STORE_DIR).map_err(|e| match kernel(e) {
            StoreError::NotFound => StoreError::NotAStore("it has no .envelopefs folder".into()),
            e => e,
        })?;
        let names = (!keys.flags().plaintext_names).then(|| NameKeys::new(keys.secret()));
        let folder = |name: &[u8]| match b.lookup(&own, name) {
            Ok(n) => Ok(Some(n)),
            Err(e) if !is(&e, libc::ENOENT) => Err(e),
            Err(_) if o.read_only => Ok(None),
            Err(_) => own_folder(&b, &own, name).map(Some),
        };
        let (links_dir, pool_dir) = (folder(LINKS_DIR)?, folder(POOL_DIR)?);
        if let (false, Some(k)) = (o.read_only, &names) {
            finish_init(&b, &root_fd, k)?;
        }
        keys.pool().set_max(if o.read_only { 0 } else { o.dek_pool });
        let table = Table::new(o.pinned_max.unwrap_or_else(pinned_max_by_default));
        let root = table.adopt(&b.stat(&root_fd)?, None, Some(Arc::new(root_fd)));
        let store = Arc::new(Self {
            links: LinkKey::new(keys.secret()),
            xattrs: XattrKeys::new(keys.secret()),
            shared: Arc::new(Shared::new(b, keys, DekCache::new(o.deks), o.read_only)),
            table,
            root,
            names,
            unsynced: Unsynced::default(),
            pool: Pool::new(pool_dir),
            links_dir,
            moves: Moves::default(),
            rekey_dir: Mutex::default(),
        });
        // What is fetched must not push out what is used.
        store.shared.ahead.set_window(o.prefetch.min(store.shared.deks.room() / 4));
        if !o.read_only {
            store.finish_rekeys()?;
            store.clean_pool()?;
        }
        Ok(store)
    }

    /// What files, rotation and check share with this store.
    pub fn shared(&self) -> &Arc<Shared<B>> {
        &self.shared
    }

    /// The root directory; its id is [`super::node::ROOT_ID`].
    pub fn root(&self) -> Arc<Node<B>> {
        self.root.clone()
    }

    /// Descriptors of inodes that are open now.
    pub fn pinned(&self) -> usize {
        self.table.pinned_count()
    }

    pub(super) fn backing(&self) -> &B {
        &self.shared.backing
    }

    pub(super) fn writable(&self) -> Result<()> {
        if self.shared.read_only { Err(StoreError::ReadOnly) } else { Ok(()) }
    }

    pub(super) fn core(&self, n: &Arc<Node<B>>) -> Result<Arc<FileCore<B>>> {
        match n.kind() {
            Kind::File => self.table.core(&self.shared, n),
            Kind::Dir => Err(StoreError::IsADirectory),
            _ => Err(StoreError::Invalid),
        }
    }

    /// Opens a regular file.
    ///
    /// # Errors
    /// [`StoreError::IsADirectory`], [`StoreError::Invalid`] for other kinds, and those of [`FileCore::open`].
    pub fn open_file(&self, n: &Arc<Node<B>>, access: Access) -> Result<OpenFile<B>> {
        let open = self.core(n)?.open(access)?;
        self.note_open(n, open.took_a_call());
        Ok(open)
    }

    /// fsync of a file: its content, its name, and the names of the directories above it are durable.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn sync_file(&self, n: &Arc<Node<B>>, f: &OpenFile<B>) -> Result<()> {
        f.sync()?;
        self.sync_name(n)
    }

    /// fsync of a directory: its entries, its name, and the names of the directories above it are durable.
    ///
    /// # Errors
    /// [`StoreError::NotADirectory`], the backing directory's.
    pub fn sync_dir(&self, n: &Arc<Node<B>>) -> Result<()> {
        n.dir()?;
        self.make_durable(n, self.unsynced.need_all_of(n.key()))?;
        self.sync_name(n)
    }

    /// Everything written so far is durable.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn sync_all(&self) -> Result<()> {
        let upto = self.unsynced.now();
        self.backing().sync_all()?;
        self.unsynced.all_synced(upto);
        Ok(())
    }

    /// Makes the names on the way from the root to `n` durable. One that was removed has none.
    fn sync_name(&self, n: &Arc<Node<B>>) -> Result<()> {
        let mut at = n.location();
        while let Some(l) = at {
            self.make_durable(&l.parent, self.unsynced.need(l.parent.key(), l.made))?;
            at = l.parent.location();
        }
        Ok(())
    }

    fn make_durable(&self, dir: &Arc<Node<B>>, need: Need) -> Result<()> {
        let b = self.backing();
        match need {
            Need::Nothing => Ok(()),
            Need::All { .. } => self.sync_all(),
            Need::Dir { upto, sidecars } => {
                let fd = dir.fd(b)?;
                for s in sidecars {
                    match b.lookup(&fd, &s).and_then(|n| b.open(&n, Access::Read)) {
                        Ok(f) => b.sync_file(&f)?,
                        // Removed with its file since.
                        Err(e) if is(&e, libc::ENOENT) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
                b.sync_dir(&fd)?;
                self.unsynced.dir_synced(dir.key(), upto);
                Ok(())
            }
        }
    }

    /// What wants doing about once a second: marks files closed at least `min_idle` ago clean, fills the pool of
    /// directories up.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn settle(&self, min_idle: Duration) -> Result<()> {
        self.shared.settle.settle(min_idle);
        self.shared.deks.expire();
        self.top_up_pool()
    }

    /// For unmount: every closed file is marked clean, the pool is emptied, and everything is durable.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn close(&self) -> Result<()> {
        self.shared.settle.close();
        if self.shared.read_only {
            return Ok(());
        }
        self.empty_pool();
        self.sync_all()
    }
}

/// A folder in the store's own, made if it is not there.
pub(super) fn own_folder<B: Backing>(b: &B, own: &B::Node, name: &[u8]) -> io::Result<B::Node> {
    match b.mkdir(own, name, 0o700, 0) {
        Err(e) if !is(&e, libc::EEXIST) => Err(e),
        _ => b.lookup(own, name),
    }
}

/// An `init` that was killed may have left no directory id in the root. If there is nothing else there, it gets one.
fn finish_init<B: Backing>(b: &B, root: &B::Node, keys: &NameKeys) -> Result<()> {
    let unfinished = match dir::read_id(b, root, keys) {
        Ok(_) => false,
        Err(StoreError::Damage(Damage::DirIdMissing | Damage::DirIdAuth)) => {
            let own = |n: &[u8]| n == names::STORE_DIR || n == names::DIR_ID_FILE || n == LOST_AND_FOUND;
            b.read_dir(root)?.iter().all(|e| own(&e.name))
        }
        Err(e) => return Err(e),
    };
    if unfinished {
        match b.unlink(root, names::DIR_ID_FILE) {
            Err(e) if !is(&e, libc::ENOENT) => return Err(e.into()),
            _ => {}
        }
        dir::write_id(b, root, keys, &DirId::random())?;
        b.sync_all()?;
    }
    Ok(())
}
