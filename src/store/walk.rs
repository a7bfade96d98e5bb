//! Walks a backing directory: every entry once, in the order of names, a directory before what is in it.
//!
//! The walk holds one open directory per level, looks names up relative to it, and never follows a symbolic link, so
//! nothing that is renamed or planted while it runs can lead it out of the store or round in circles. What vanishes
//! on the way is passed over.

use crate::backing::{Backing, DirEntry, Kind};
use crate::format::names::STORE_DIR;
use std::io;
use std::sync::Arc;

/// Longest path kept for people to read, in bytes; of a longer one the end is kept.
const PATH_MAX: usize = 4096;

/// An open directory of the walk.
pub struct Dir<B: Backing> {
    /// The directory.
    pub node: Arc<B::Node>,
    path: Vec<u8>,
    root: bool,
}

impl<B: Backing> Dir<B> {
    /// Whether this is the backing root.
    pub fn is_root(&self) -> bool {
        self.root
    }

    /// Path from the backing root, for people; empty for the root itself.
    pub fn path(&self) -> &[u8] {
        &self.path
    }

    /// Path of an entry, for people. One that would be very long keeps only its end.
    pub fn path_of(&self, name: &[u8]) -> Vec<u8> {
        if self.path.is_empty() {
            return name.to_vec();
        }
        let head: &[u8] = if self.path.len() + 1 + name.len() > PATH_MAX { "…".as_bytes() } else { &self.path };
        [head, b"/", name].concat()
    }
}

/// What the walk comes to.
pub enum Visit<B: Backing> {
    /// A directory that was entered, with all its entries in order.
    Dir { dir: Arc<Dir<B>>, entries: Arc<[DirEntry]> },
    /// An entry that is not a directory, as far as the directory's listing says. Whoever opens it has to look again.
    Entry { dir: Arc<Dir<B>>, entry: DirEntry },
}

/// A directory that could not be entered or listed.
#[derive(Debug)]
pub struct WalkError {
    /// Path from the backing root.
    pub path: Vec<u8>,
    /// Why.
    pub error: io::Error,
}

struct Frame<B: Backing> {
    dir: Arc<Dir<B>>,
    entries: Arc<[DirEntry]>,
    next: usize,
}

/// The walk. See the module.
pub struct Walk<'a, B: Backing> {
    backing: &'a B,
    stack: Vec<Frame<B>>,
    start: Option<Dir<B>>,
    /// Components of the path to begin after; those above the stack's depth are still to come.
    after: Vec<Vec<u8>>,
}

impl<'a, B: Backing> Walk<'a, B> {
    /// Over the whole store.
    ///
    /// # Errors
    /// If the backing root cannot be opened.
    pub fn new(backing: &'a B) -> io::Result<Self> {
        let dir = Dir { node: Arc::new(backing.root()?), path: Vec::new(), root: true };
        Ok(Self { backing, stack: Vec::new(), start: Some(dir), after: Vec::new() })
    }

    /// Over the whole store but for what comes before or is `cursor`, a path from the backing root.
    ///
    /// # Errors
    /// As [`Walk::new`].
    pub fn after(backing: &'a B, cursor: &[u8]) -> io::Result<Self> {
        let mut w = Self::new(backing)?;
        if !cursor.is_empty() {
            w.after = cursor.split(|c| *c == b'/').map(<[u8]>::to_vec).collect();
        }
        Ok(w)
    }

    /// Over one directory, called `path` in messages.
    pub fn below(backing: &'a B, node: Arc<B::Node>, path: Vec<u8>) -> Self {
        let dir = Dir { node, path, root: false };
        Self { backing, stack: Vec::new(), start: Some(dir), after: Vec::new() }
    }

    fn enter(&mut self, dir: Dir<B>) -> Option<Result<Visit<B>, WalkError>> {
        let mut entries = match self.backing.read_dir(&dir.node) {
            Ok(e) => e,
            Err(e) if is_gone(&e) => return None,
            Err(error) => return Some(Err(WalkError { path: dir.path, error })),
        };
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let entries: Arc<[DirEntry]> = entries.into();
        let next = self.first_of(&entries);
        let dir = Arc::new(dir);
        self.stack.push(Frame { dir: Arc::clone(&dir), entries: Arc::clone(&entries), next });
        Some(Ok(Visit::Dir { dir, entries }))
    }

    /// Index of the first entry not before the cursor, in a directory that is about to be entered.
    fn first_of(&mut self, entries: &[DirEntry]) -> usize {
        let depth = self.stack.len();
        let Some(c) = self.after.get(depth) else { return 0 };
        let at = entries.partition_point(|e| e.name < *c);
        let found = entries.get(at).is_some_and(|e| e.name == *c);
        let last = depth + 1 == self.after.len();
        if !found || last {
            self.after.clear();
        }
        if found && last { at + 1 } else { at }
    }

    /// Opens the directory `entry`; `None` if it is not there any more or no directory.
    fn descend(&mut self, dir: &Arc<Dir<B>>, entry: &DirEntry) -> Option<Result<Visit<B>, WalkError>> {
        let path = dir.path_of(&entry.name);
        let opened =
            self.backing.lookup(&dir.node, &entry.name).and_then(|n| self.backing.stat(&n).map(|s| (n, s.kind)));
        match opened {
            Ok((node, Kind::Dir)) => self.enter(Dir { node: Arc::new(node), path, root: false }),
            // Replaced since the listing: whoever looks at it will see what it is now.
            Ok(_) => Some(Ok(Visit::Entry { dir: Arc::clone(dir), entry: entry.clone() })),
            Err(e) if is_gone(&e) => None,
            Err(error) => Some(Err(WalkError { path, error })),
        }
    }
}

impl<B: Backing> Iterator for Walk<'_, B> {
    type Item = Result<Visit<B>, WalkError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(dir) = self.start.take()
            && let Some(v) = self.enter(dir)
        {
            return Some(v);
        }
        loop {
            let frame = self.stack.last_mut()?;
            let Some(entry) = frame.entries.get(frame.next).cloned() else {
                self.stack.pop();
                continue;
            };
            frame.next += 1;
            let dir = Arc::clone(&frame.dir);
            if dir.root && entry.name == STORE_DIR {
                continue;
            }
            // Without a kind in the listing every entry is tried as a directory first: one more lookup.
            if matches!(entry.kind, Some(Kind::Dir) | None) {
                match self.descend(&dir, &entry) {
                    Some(v) => return Some(v),
                    None => continue,
                }
            }
            return Some(Ok(Visit::Entry { dir, entry }));
        }
    }
}

/// Whether an error only says that what was looked for is not there (any more).
pub fn is_gone(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESTALE))
}

/// What `found` has found; `None` if that is not there.
///
/// # Errors
/// Its own, but for that one.
pub fn unless_gone<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(t) => Ok(Some(t)),
        Err(e) if is_gone(&e) => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::posix::Posix;

    fn tree() -> (tempfile::TempDir, Posix) {
        let t = tempfile::tempdir().unwrap();
        for d in ["a/b", "c", ".envelopefs/pool", "c/.envelopefs"] {
            std::fs::create_dir_all(t.path().join(d)).unwrap();
        }
        for f in ["a/1", "a/b/2", "a/z", "b", "c/3", ".envelopefs/keyring.a", "c/.envelopefs/4", ".envelopefs.dir"] {
            std::fs::write(t.path().join(f), b"x").unwrap();
        }
        std::os::unix::fs::symlink("..", t.path().join("c/up")).unwrap();
        let p = Posix::open(t.path()).unwrap();
        (t, p)
    }

    fn entries<'a>(w: impl Iterator<Item = Result<Visit<Posix>, WalkError>> + 'a) -> Vec<String> {
        w.filter_map(|v| match v.unwrap() {
            Visit::Entry { dir, entry } => Some(String::from_utf8(dir.path_of(&entry.name)).unwrap()),
            Visit::Dir { .. } => None,
        })
        .collect()
    }

    #[test]
    fn visits_everything_once_in_order_but_the_stores_own_folder() {
        let (_t, p) = tree();
        let all = entries(Walk::new(&p).unwrap());
        assert_eq!(all, [".envelopefs.dir", "a/1", "a/b/2", "a/z", "b", "c/.envelopefs/4", "c/3", "c/up"]);
    }

    #[test]
    fn begins_after_a_cursor_whether_it_exists_or_not() {
        let (_t, p) = tree();
        let from = |c: &[u8]| entries(Walk::after(&p, c).unwrap());
        let all = from(b"");
        for (i, at) in all.iter().enumerate() {
            assert_eq!(from(at.as_bytes()), all[i + 1..], "after {at}");
        }
        assert_eq!(from(b"a/b/"), all[2..], "the directory is entered, nothing in it comes before");
        assert_eq!(from(b"a/b/1"), all[2..]);
        assert_eq!(from(b"a/b/3"), all[3..]);
        assert_eq!(from(b"a/c/9/9"), all[3..]);
        assert_eq!(from(b"d"), all[all.len()..]);
        assert_eq!(from(b"../../x").len(), all.len());
    }
}
