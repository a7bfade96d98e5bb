//! Reading the files that the configuration names: tokens and other secrets, certificates.

use crate::kms::KmsError;
use crate::kms::fill::fill;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use zeroize::Zeroizing;

/// Longest file that is read, in bytes. A CA bundle of a machine has some 200 KiB.
const FILE_MAX: u64 = 1024 * 1024;

/// Who may read a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Its owner alone.
    Secret,
    /// Anybody: certificates, and the service account's token of a pod, whose mode Kubernetes chooses and whose fence
    /// is the pod.
    Public,
}

/// The content of `path`; `what` is its name in messages.
///
/// # Errors
/// [`KmsError::Credentials`] if it is not there or cannot be read; [`KmsError::Config`] if it is no regular file, too
/// long, or a secret that others may read.
pub fn read(path: &Path, what: &str, mode: Mode) -> Result<Zeroizing<Vec<u8>>, KmsError> {
    let refuse = |why: String| KmsError::Config(format!("{what} {}: {why}", path.display()));
    let io = |e: io::Error| KmsError::Credentials(format!("{what} {}: {e}", path.display()));
    // A FIFO in the place of the file must not hang the mount.
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(io)?;
    let m = file.metadata().map_err(io)?;
    if !m.file_type().is_file() {
        return Err(refuse("not a regular file".into()));
    }
    if mode == Mode::Secret && m.mode() & 0o077 != 0 {
        let bits = m.mode() & 0o7777;
        return Err(refuse(format!("mode {bits:04o} lets others at it; run: chmod 600 {}", path.display())));
    }
    if m.len() > FILE_MAX {
        return Err(refuse(format!("{} bytes; at most {FILE_MAX} are read", m.len())));
    }
    // All the room at once, so that no copy is left behind when it grows.
    let room = usize::try_from(m.len()).unwrap_or(0) + 1;
    let mut content = Zeroizing::new(vec![0; room]);
    let n = fill(&mut file, &mut content).map_err(io)?;
    content.truncate(n);
    Ok(content)
}

/// The one line in `path`, without the line end.
///
/// # Errors
/// As [`read`]; [`KmsError::Credentials`] if it is empty, or holds what cannot stand in a header.
pub fn line(path: &Path, what: &str, mode: Mode) -> Result<Zeroizing<String>, KmsError> {
    let content = read(path, what, mode)?;
    one_line(&content).ok_or_else(|| {
        KmsError::Credentials(format!("{what} {}: must hold one line of printable characters", path.display()))
    })
}

/// `bytes` without one line end, if they are printable ASCII without blanks.
pub fn one_line(bytes: &[u8]) -> Option<Zeroizing<String>> {
    let line = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let good = !line.is_empty() && line.iter().all(u8::is_ascii_graphic);
    good.then(|| Zeroizing::new(String::from_utf8_lossy(line).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_secret_is_read_only_if_others_cannot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "s.abc\r\n").unwrap();
        let with = |bits, mode| {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(bits)).unwrap();
            line(&path, "token", mode)
        };
        assert_eq!(with(0o600, Mode::Secret).unwrap().as_str(), "s.abc");
        assert_eq!(with(0o400, Mode::Secret).unwrap().as_str(), "s.abc");
        assert_eq!(with(0o644, Mode::Public).unwrap().as_str(), "s.abc");
        for bits in [0o640, 0o604, 0o660] {
            let e = with(bits, Mode::Secret).unwrap_err();
            assert!(matches!(&e, KmsError::Config(m) if m.contains("chmod 600")), "{e}");
        }
    }

    #[test]
    fn what_is_no_line_is_refused() {
        for (content, expected) in [
            (&b"t"[..], Some("t")),
            (b"t\n", Some("t")),
            (b"", None),
            (b"\n", None),
            (b"a b", None),
            (b"a\nb", None),
            (b"t\n\n", None),
            (b"\xff", None),
        ] {
            assert_eq!(one_line(content).as_deref().map(String::as_str), expected, "{content:?}");
        }
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let absent = read(&dir.path().join("none"), "token", Mode::Secret);
        assert!(matches!(absent, Err(KmsError::Credentials(e)) if e.contains("none")));
        assert!(matches!(read(dir.path(), "token", Mode::Public), Err(KmsError::Config(_))));
        let long = dir.path().join("long");
        std::fs::File::create(&long).unwrap().set_len(FILE_MAX + 1).unwrap();
        assert!(matches!(read(&long, "CA file", Mode::Public), Err(KmsError::Config(_))));
    }
}
