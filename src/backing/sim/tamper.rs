//! What an attacker does to the backing directory, or a bad disk: uncounted, never refused, durable at once.

use std::io;

use super::journal::ROOT;
use super::{SimDisk, errno};
use crate::backing::Kind;
use crate::backing::sim::state::State;

impl SimDisk {
    /// Every inode below the root by path (`a/b`), in order; a directory comes before what is in it.
    pub fn paths(&self) -> Vec<(Vec<u8>, Kind)> {
        let state = self.state();
        let mut found = Vec::new();
        let mut open = vec![(ROOT, Vec::new())];
        while let Some((dir, path)) = open.pop() {
            for (name, child) in state.inodes.get(&dir).iter().flat_map(|d| &d.entries) {
                let Some(inode) = state.inodes.get(child) else { continue };
                let path = if path.is_empty() { name.clone() } else { [&path[..], b"/", name].concat() };
                if inode.meta.kind == Kind::Dir {
                    open.push((*child, path.clone()));
                }
                found.push((path, inode.meta.kind));
            }
        }
        found.sort();
        found
    }

    /// Paths of the regular files among [`Self::paths`].
    pub fn files(&self) -> Vec<Vec<u8>> {
        self.paths().into_iter().filter(|(_, kind)| *kind == Kind::File).map(|(path, _)| path).collect()
    }

    /// The whole content of a regular file.
    pub fn read_raw(&self, path: impl AsRef<[u8]>) -> io::Result<Vec<u8>> {
        let state = self.state();
        let inode = state.inode(find(&state, path.as_ref())?)?;
        let len = usize::try_from(inode.meta.size).map_err(|_| errno(libc::EFBIG))?;
        let mut content = vec![0; len];
        inode.content.read(0, &mut content);
        Ok(content)
    }

    /// Writes `data` at `offset` of a regular file, which grows if need be. Its times stay.
    pub fn write_raw(&self, path: impl AsRef<[u8]>, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        let ino = find(&state, path.as_ref())?;
        let end = offset.checked_add(data.len() as u64).ok_or_else(|| errno(libc::EFBIG))?;
        state.with_content(ino, |content| content.tamper(offset, data))?;
        let size = state.inode(ino)?.meta.size.max(end);
        resize(&mut state, ino, size)
    }

    /// Cuts a regular file short, or lengthens it with zeros.
    pub fn truncate_raw(&self, path: impl AsRef<[u8]>, size: u64) -> io::Result<()> {
        let mut state = self.state();
        let ino = find(&state, path.as_ref())?;
        let seq = state.put(ino)?;
        state.with_content(ino, |content| content.cut(size, u64::MAX, seq))?;
        resize(&mut state, ino, size)
    }

    /// Replaces the whole content of a regular file.
    pub fn replace_raw(&self, path: impl AsRef<[u8]>, data: &[u8]) -> io::Result<()> {
        self.truncate_raw(&path, 0)?;
        self.write_raw(path, 0, data)
    }

    /// Flips one bit (0 to 7) of one byte of a regular file; `EINVAL` beyond its end.
    pub fn flip_bit(&self, path: impl AsRef<[u8]>, offset: u64, bit: u32) -> io::Result<()> {
        let mut byte = [0];
        {
            let state = self.state();
            let inode = state.inode(find(&state, path.as_ref())?)?;
            if offset >= inode.meta.size || bit > 7 {
                return Err(errno(libc::EINVAL));
            }
            inode.content.read(offset, &mut byte);
        }
        self.write_raw(path, offset, &[byte[0] ^ (1 << bit)])
    }

    /// Loses the page at `offset` of a regular file on its way to the platter, of which nobody hears: it stays in the cache
    /// until it is written again.
    pub fn fail_writeback(&self, path: impl AsRef<[u8]>, offset: u64) -> io::Result<()> {
        let mut state = self.state();
        let ino = find(&state, path.as_ref())?;
        state.with_content(ino, |content| content.fail_writeback(offset))
    }

    /// Copies `len` bytes between regular files, or within one; what lies beyond the end of `from` is zeros.
    pub fn copy_raw(
        &self,
        from: impl AsRef<[u8]>,
        from_offset: u64,
        to: impl AsRef<[u8]>,
        to_offset: u64,
        len: usize,
    ) -> io::Result<()> {
        let mut data = vec![0; len];
        {
            let state = self.state();
            state.inode(find(&state, from.as_ref())?)?.content.read(from_offset, &mut data);
        }
        self.write_raw(to, to_offset, &data)
    }
}

/// The regular file at `path`.
fn find(state: &State, path: &[u8]) -> io::Result<u64> {
    let mut ino = ROOT;
    for name in path.split(|b| *b == b'/').filter(|name| !name.is_empty()) {
        ino = state.child(ino, name)?;
    }
    match state.inode(ino)?.meta.kind {
        Kind::File => Ok(ino),
        _ => Err(errno(libc::EINVAL)),
    }
}

fn resize(state: &mut State, ino: u64, size: u64) -> io::Result<()> {
    state.inode_mut(ino)?.meta.size = size;
    state.sync_file(ino)
}
