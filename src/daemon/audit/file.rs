//! The log's file: opened for appending, locked, and followed when somebody moves it away.

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// An open log file, locked by this process.
#[derive(Debug)]
pub struct LogFile {
    file: File,
    path: PathBuf,
    /// Device and inode.
    id: (u64, u64),
    /// Bytes in it, as far as we have written and seen.
    len: u64,
}

/// What became of the file at the path.
#[derive(Debug, PartialEq, Eq)]
pub enum Look {
    /// It is the open one.
    Same,
    /// The open one was emptied.
    Emptied,
    /// There is none, or another.
    Moved,
}

impl LogFile {
    /// Opens the regular file at `path`, which is made with mode 0600 if it is not there, and locks it.
    ///
    /// # Errors
    /// `WouldBlock` if another process has the lock; `InvalidInput` if it is no regular file; the kernel's.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let mode = Mode::RUSR | Mode::WUSR;
        let (file, made) = match rustix::fs::open(path, flags, mode) {
            Err(rustix::io::Errno::NOENT) => {
                (rustix::fs::open(path, flags | OFlags::CREATE | OFlags::EXCL, mode)?, true)
            }
            other => (other?, false),
        };
        let file = File::from(file);
        let m = file.metadata()?;
        if !m.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "is no regular file"));
        }
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        if made && let Some(dir) = path.parent() {
            // So that a power cut does not take the whole file with it.
            File::open(dir)?.sync_all()?;
        }
        Ok(Self { file, path: path.to_owned(), id: (m.dev(), m.ino()), len: m.len() })
    }

    /// Bytes in it.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Its last bytes, at most `max`, and whether these are all.
    ///
    /// # Errors
    /// The kernel's.
    pub fn last(&mut self, max: u64) -> io::Result<(Vec<u8>, bool)> {
        let from = self.len.saturating_sub(max);
        self.file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        (&self.file).take(self.len - from).read_to_end(&mut bytes)?;
        Ok((bytes, from == 0))
    }

    /// Appends some of `bytes`; says how many.
    ///
    /// # Errors
    /// The kernel's.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.len += n as u64;
        Ok(n)
    }

    /// Makes what was appended durable.
    ///
    /// # Errors
    /// The kernel's.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Looks what is at the path now.
    ///
    /// # Errors
    /// The kernel's.
    pub fn look(&mut self) -> io::Result<Look> {
        match std::fs::symlink_metadata(&self.path) {
            Ok(m) if (m.dev(), m.ino()) == self.id => {
                let emptied = m.len() == 0 && self.len > 0;
                self.len = m.len();
                Ok(if emptied { Look::Emptied } else { Look::Same })
            }
            Ok(_) => Ok(Look::Moved),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Look::Moved),
            Err(e) => Err(e),
        }
    }

    /// The file at the path after the open one was moved away; it must be empty.
    ///
    /// # Errors
    /// `AlreadyExists` if it is not; as [`LogFile::open`].
    pub fn next(&self) -> io::Result<Self> {
        let next = Self::open(&self.path)?;
        if next.len > 0 {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "another file with content was put in its place"));
        }
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn it_is_private_locked_and_no_link() {
        let d = tempfile::tempdir().unwrap();
        let path = d.path().join("log");
        let mut f = LogFile::open(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(LogFile::open(&path).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(f.append(b"abc").unwrap(), 3);
        f.sync().unwrap();
        assert_eq!(f.last(2).unwrap(), (b"bc".to_vec(), false));
        drop(f);
        let mut f = LogFile::open(&path).unwrap();
        assert_eq!((f.size(), f.last(9).unwrap()), (3, (b"abc".to_vec(), true)));
        let link = d.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(LogFile::open(&link).is_err());
        assert!(LogFile::open(d.path()).is_err());
        assert_eq!(LogFile::open(Path::new("/dev/null")).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_file_moved_away_or_emptied_is_noticed() {
        let d = tempfile::tempdir().unwrap();
        let path = d.path().join("log");
        let mut f = LogFile::open(&path).unwrap();
        f.append(b"abc").unwrap();
        assert_eq!(f.look().unwrap(), Look::Same);
        File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        assert_eq!(f.look().unwrap(), Look::Emptied);
        assert_eq!(f.size(), 0);
        std::fs::rename(&path, d.path().join("log.1")).unwrap();
        assert_eq!(f.look().unwrap(), Look::Moved);
        std::fs::write(&path, "strange").unwrap();
        assert_eq!(f.look().unwrap(), Look::Moved);
        assert_eq!(f.next().unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(f.next().unwrap().size(), 0);
    }
}
