//! What the kernel keeps of files, and how it is made to let go of it when the keys are locked.

use std::io;
use std::sync::{Arc, Weak};

use fuser::{INodeNo, Notifier};

use crate::backing::Backing;
use crate::fs::EnvelopeFs;

/// The kernel's caches of one mount.
pub struct Caches {
    notifier: Notifier,
    /// Ids of the regular files that the kernel knows.
    files: Box<dyn Fn() -> Vec<u64> + Send + Sync>,
}

impl std::fmt::Debug for Caches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Caches")
    }
}

impl Caches {
    /// Of the session that `notifier` speaks to. Does not keep the file system alive: its open files end with it.
    pub(super) fn new<B: Backing>(notifier: Notifier, fs: &Arc<EnvelopeFs<B>>) -> Self {
        let fs: Weak<EnvelopeFs<B>> = Arc::downgrade(fs);
        let files = move || fs.upgrade().map(|fs| fs.files()).unwrap_or_default();
        Self { notifier, files: Box::new(files) }
    }

    /// The kernel asks for every file's attributes before it uses them again: also before it takes a write(2) into its
    /// cache, which is where a locked store says no.
    pub fn forget_attributes(&self) {
        self.each(|n| self.notifier.inval_inode(n, -1, 0));
    }

    /// The kernel writes back what is dirty and lets go of every file's pages, also of those that are mapped into
    /// processes. Waits for write requests, so whoever serves them must not call it.
    pub fn drop_pages(&self) {
        self.each(|n| self.notifier.inval_inode(n, 0, 0));
    }

    fn each(&self, tell: impl Fn(INodeNo) -> io::Result<()>) {
        for id in (self.files)() {
            match tell(INodeNo(id)) {
                // The kernel has forgotten it, or the mount is gone.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENOTCONN)) => {}
                Err(e) => tracing::warn!(node = id, "the kernel did not let go of a file's pages: {e}"),
                Ok(()) => {}
            }
        }
    }
}
