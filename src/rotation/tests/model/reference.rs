//! What the tree of a store should be: names, and contents that hard links share. Knows no keys and does no I/O.

use std::collections::BTreeMap;

/// What a name stands for. Files go by the number of their inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    Dir,
    File(u64),
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Content {
    pub data: Vec<u8>,
    /// Its key is gone, and not by the rotation's doing: a key service lied when it was made, or an old backup brought
    /// it back under a KEK that is destroyed.
    pub lost: bool,
}

/// The tree. Paths have no slash in front; the root is the empty one and has no entry.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reference {
    pub names: BTreeMap<String, Entry>,
    pub files: BTreeMap<u64, Content>,
}

/// What a user does, by choices that mean something in any tree.
#[derive(Debug, Clone)]
pub enum UserOp {
    /// A new file, or an old one begun anew.
    Create {
        dir: u8,
        name: u8,
        len: u16,
        fill: u8,
    },
    Write {
        file: u8,
        at: u16,
        len: u16,
        fill: u8,
    },
    Truncate {
        file: u8,
        len: u16,
    },
    Mkdir {
        dir: u8,
        name: u8,
    },
    Unlink {
        file: u8,
    },
    Rmdir {
        dir: u8,
    },
    Rename {
        what: u8,
        dir: u8,
        name: u8,
    },
    Exchange {
        one: u8,
        other: u8,
    },
    Link {
        file: u8,
        dir: u8,
        name: u8,
    },
    Read {
        file: u8,
    },
    Sync,
    Settle,
}

/// The same, with paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Create(String),
    Write(String, u64, Vec<u8>),
    SetLen(String, u64),
    Mkdir(String),
    Unlink(String),
    Rmdir(String),
    /// Replaces what is there.
    Rename(String, String),
    Exchange(String, String),
    Link(String, String),
    Read(String),
    Sync,
    Settle,
}

/// The last two are long by their ciphertext only, and at the limit.
fn name(i: u8) -> String {
    match i % 5 {
        0 => "a".to_owned(),
        1 => "m".to_owned(),
        2 => "z".to_owned(),
        3 => "l".repeat(176),
        _ => "L".repeat(255),
    }
}

fn pick<T: Clone>(all: &[T], i: u8) -> Option<T> {
    (!all.is_empty()).then(|| all[usize::from(i) % all.len()].clone())
}

pub fn join(dir: &str, name: &str) -> String {
    if dir.is_empty() { name.to_owned() } else { format!("{dir}/{name}") }
}

/// Whether `path` is `of` or lies below it.
pub fn is_at_or_below(path: &str, of: &str) -> bool {
    path.strip_prefix(of).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl Reference {
    /// Every directory, the root first.
    pub fn dirs(&self) -> Vec<String> {
        let below = self.names.iter().filter(|(_, e)| **e == Entry::Dir).map(|(p, _)| p.clone());
        std::iter::once(String::new()).chain(below).collect()
    }

    /// Every name of a file.
    pub fn file_names(&self) -> Vec<String> {
        self.names.iter().filter(|(_, e)| **e != Entry::Dir).map(|(p, _)| p.clone()).collect()
    }

    pub fn ino(&self, path: &str) -> Option<u64> {
        match self.names.get(path) {
            Some(Entry::File(ino)) => Some(*ino),
            _ => None,
        }
    }

    pub fn content(&self, path: &str) -> &Content {
        &self.files[&self.ino(path).unwrap()]
    }

    pub fn lost(&self) -> Vec<String> {
        self.file_names().into_iter().filter(|p| self.content(p).lost).collect()
    }

    fn is_empty_dir(&self, path: &str) -> bool {
        !self.names.keys().any(|p| p != path && is_at_or_below(p, path))
    }

    /// What `op` comes to in this tree; nothing if it would be refused.
    pub fn decide(&self, op: &UserOp) -> Vec<Change> {
        self.try_decide(op).unwrap_or_default()
    }

    fn try_decide(&self, op: &UserOp) -> Option<Vec<Change>> {
        let (dirs, files) = (self.dirs(), self.file_names());
        let all: Vec<String> = self.names.keys().cloned().collect();
        let place = |dir: u8, n: u8| pick(&dirs, dir).map(|d| join(&d, &name(n)));
        // Deep enough, and small enough to stay quick.
        let has_room = |path: &str| path.matches('/').count() < 4 && all.len() < 24;
        Some(match op {
            UserOp::Create { dir, name, len, fill } => {
                let path = place(*dir, *name)?;
                let first = match self.names.get(&path) {
                    Some(Entry::Dir) => return None,
                    Some(Entry::File(_)) => Change::SetLen(path.clone(), 0),
                    None if has_room(&path) => Change::Create(path.clone()),
                    None => return None,
                };
                vec![first, Change::Write(path, 0, super::super::pattern(usize::from(*len), *fill))]
            }
            UserOp::Write { file, at, len, fill } => {
                let data = super::super::pattern(usize::from(*len).max(1), *fill);
                vec![Change::Write(pick(&files, *file)?, u64::from(*at), data)]
            }
            UserOp::Truncate { file, len } => vec![Change::SetLen(pick(&files, *file)?, u64::from(*len))],
            UserOp::Mkdir { dir, name } => {
                let path = place(*dir, *name)?;
                if self.names.contains_key(&path) || !has_room(&path) {
                    return None;
                }
                vec![Change::Mkdir(path)]
            }
            UserOp::Unlink { file } => vec![Change::Unlink(pick(&files, *file)?)],
            UserOp::Rmdir { dir } => {
                let empty: Vec<String> = dirs.into_iter().skip(1).filter(|d| self.is_empty_dir(d)).collect();
                vec![Change::Rmdir(pick(&empty, *dir)?)]
            }
            UserOp::Rename { what, dir, name } => {
                let (from, to) = (pick(&all, *what)?, place(*dir, *name)?);
                if is_at_or_below(&to, &from) || is_at_or_below(&from, &to) {
                    return None;
                }
                match (self.names.get(&from)?, self.names.get(&to)) {
                    (_, None) => {}
                    // Two names of one inode: nothing happens.
                    (Entry::File(a), Some(Entry::File(b))) if a == b => return None,
                    (Entry::File(_), Some(Entry::File(_))) => {}
                    (Entry::Dir, Some(Entry::Dir)) if self.is_empty_dir(&to) => {}
                    _ => return None,
                }
                vec![Change::Rename(from, to)]
            }
            UserOp::Exchange { one, other } => {
                let (a, b) = (pick(&all, *one)?, pick(&all, *other)?);
                if is_at_or_below(&a, &b) || is_at_or_below(&b, &a) || self.names.get(&a) == self.names.get(&b) {
                    // Two directories are equal here, and worth the while.
                    if self.names.get(&a) != Some(&Entry::Dir) || is_at_or_below(&a, &b) || is_at_or_below(&b, &a) {
                        return None;
                    }
                }
                vec![Change::Exchange(a, b)]
            }
            UserOp::Link { file, dir, name } => {
                let (from, to) = (pick(&files, *file)?, place(*dir, *name)?);
                if self.names.contains_key(&to) || !has_room(&to) {
                    return None;
                }
                vec![Change::Link(from, to)]
            }
            UserOp::Read { file } => vec![Change::Read(pick(&files, *file)?)],
            UserOp::Sync => vec![Change::Sync],
            UserOp::Settle => vec![Change::Settle],
        })
    }

    /// Makes the change. `ino` is the new file's.
    pub fn apply(&mut self, change: &Change, ino: u64) {
        match change {
            Change::Create(p) => {
                self.names.insert(p.clone(), Entry::File(ino));
                self.files.insert(ino, Content::default());
            }
            Change::Mkdir(p) => drop(self.names.insert(p.clone(), Entry::Dir)),
            Change::Write(p, at, data) => {
                let c = self.content_mut(p);
                let end = *at as usize + data.len();
                if !data.is_empty() {
                    c.data.resize(c.data.len().max(end), 0);
                    c.data[*at as usize..end].copy_from_slice(data);
                }
            }
            Change::SetLen(p, len) => {
                let c = self.content_mut(p);
                c.data.resize(*len as usize, 0);
                // Without content it has no header, and gets a new key with its next content.
                c.lost &= *len > 0;
            }
            Change::Unlink(p) | Change::Rmdir(p) => drop(self.names.remove(p)),
            Change::Rename(from, to) => {
                self.names.remove(to);
                let moved = self.take(from);
                self.put(to, moved);
            }
            Change::Exchange(a, b) => {
                let (one, other) = (self.take(a), self.take(b));
                self.put(b, one);
                self.put(a, other);
            }
            Change::Link(from, to) => drop(self.names.insert(to.clone(), self.names[from])),
            Change::Read(_) | Change::Sync | Change::Settle => {}
        }
        let named: Vec<u64> = self.file_names().iter().filter_map(|p| self.ino(p)).collect();
        self.files.retain(|ino, _| named.contains(ino));
    }

    fn content_mut(&mut self, path: &str) -> &mut Content {
        let ino = self.ino(path).unwrap();
        self.files.get_mut(&ino).unwrap()
    }

    /// Takes out a name and all below it, by what follows the name.
    fn take(&mut self, path: &str) -> Vec<(String, Entry)> {
        let at: Vec<String> = self.names.keys().filter(|p| is_at_or_below(p, path)).cloned().collect();
        at.iter().map(|p| (p[path.len()..].to_owned(), self.names.remove(p).unwrap())).collect()
    }

    fn put(&mut self, path: &str, entries: Vec<(String, Entry)>) {
        self.names.extend(entries.into_iter().map(|(rest, e)| (format!("{path}{rest}"), e)));
    }
}
