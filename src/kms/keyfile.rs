//! `keyfile:/path`: a root key in a file of 32 raw bytes or 64 hexadecimal digits, mode 0600 or stricter.
//!
//! Wrapped form: [`GcmSiv::wrap`] under derive(key, ROOT_WRAP, "") with [`WrapContext::to_aad`]: nonce 12 ‖
//! ciphertext 32 ‖ tag 16.

use super::fill::fill;
use super::uri::RootKeyUri;
use super::{Capabilities, Description, KeyProvider, KmsError, WrapContext};
use crate::crypto::aead::GcmSiv;
use crate::crypto::kdf::{derive, label};
use crate::crypto::secret::{KEY_LEN, Secret32};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use zeroize::Zeroizing;

/// A root key read from a file. The file is read once, when this is made.
#[derive(Debug)]
pub struct KeyFile {
    uri: String,
    wrap_key: Secret32,
}

/// Longest key file: 64 digits, CR, LF; and one byte to tell that it is longer.
const READ_MAX: usize = 67;

impl KeyFile {
    /// Reads the key file.
    ///
    /// # Errors
    /// [`KmsError::NotFound`] if it is not there, [`KmsError::Denied`] if it may not be read, [`KmsError::Config`] if
    /// others may read it or it does not hold a key.
    pub fn open(uri: &RootKeyUri) -> Result<Self, KmsError> {
        let path = path_of(uri)?;
        // A FIFO in the place of the key file must not hang the mount.
        let mut file =
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(|e| io_error(path, &e))?;
        check_mode(path, &file)?;
        let mut buf = Zeroizing::new([0u8; READ_MAX]);
        let n = fill(&mut file, &mut *buf).map_err(|e| io_error(path, &e))?;
        let key = parse(buf.get(..n).unwrap_or_default()).map_err(|why| refuse(path, why))?;
        Ok(Self { uri: uri.to_string(), wrap_key: derive(&key, label::ROOT_WRAP, b"") })
    }

    /// Makes a new key file with a random key: 64 hexadecimal digits and a newline, mode 0600, durable on return.
    ///
    /// # Errors
    /// [`KmsError::Config`] if something is already there, else as [`KeyFile::open`].
    pub fn create(uri: &RootKeyUri) -> Result<Self, KmsError> {
        let path = path_of(uri)?;
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|e| io_error(path, &e))?;
        let key = Secret32::random();
        let written = write_key(&mut file, &key).and_then(|()| sync_parent(path));
        if let Err(e) = written {
            // A key file that may not last must not be left to be trusted.
            let _ = std::fs::remove_file(path);
            return Err(io_error(path, &e));
        }
        Ok(Self { uri: uri.to_string(), wrap_key: derive(&key, label::ROOT_WRAP, b"") })
    }
}

fn path_of(uri: &RootKeyUri) -> Result<&Path, KmsError> {
    uri.key_file().ok_or_else(|| KmsError::Config(format!("'{uri}' does not name a key file")))
}

fn refuse(path: &Path, why: &str) -> KmsError {
    KmsError::Config(format!("key file {}: {why}", path.display()))
}

fn io_error(path: &Path, e: &io::Error) -> KmsError {
    let text = format!("key file {}: {e}", path.display());
    match e.kind() {
        io::ErrorKind::NotFound => KmsError::NotFound(text),
        io::ErrorKind::PermissionDenied => KmsError::Denied(text),
        _ => KmsError::Config(text),
    }
}

fn check_mode(path: &Path, file: &File) -> Result<(), KmsError> {
    let m = file.metadata().map_err(|e| io_error(path, &e))?;
    if !m.file_type().is_file() {
        return Err(refuse(path, "not a regular file"));
    }
    if m.mode() & 0o077 != 0 {
        let mode = m.mode() & 0o7777;
        let why = format!("mode {mode:04o} lets others at the key; run: chmod 600 {}", path.display());
        return Err(refuse(path, &why));
    }
    Ok(())
}

fn parse(bytes: &[u8]) -> Result<Secret32, &'static str> {
    let key = if let Ok(raw) = <&[u8; KEY_LEN]>::try_from(bytes) {
        Secret32::build(|b| b.copy_from_slice(raw))
    } else {
        let line = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        hex(line).ok_or("must hold 32 raw bytes or 64 hexadecimal digits")?
    };
    // What `truncate -s 32` leaves, or a disk that lost the content.
    if crate::crypto::kdf::ct_eq(key.expose(), &[0; KEY_LEN]) {
        return Err("holds nothing but zeros");
    }
    Ok(key)
}

fn hex(digits: &[u8]) -> Option<Secret32> {
    if digits.len() != 2 * KEY_LEN {
        return None;
    }
    let digit = |c: &u8| char::from(*c).to_digit(16).ok_or(());
    Secret32::try_build(|out| {
        for (o, d) in out.iter_mut().zip(digits.chunks_exact(2)) {
            let [hi, lo] = d else { return Err(()) };
            *o = (digit(hi)? << 4 | digit(lo)?) as u8;
        }
        Ok(())
    })
    .ok()
}

fn write_key(file: &mut File, key: &Secret32) -> io::Result<()> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = Zeroizing::new([b'\n'; 2 * KEY_LEN + 1]);
    for (pair, b) in text.chunks_exact_mut(2).zip(key.expose()) {
        pair.copy_from_slice(&[DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]]);
    }
    file.write_all(&*text)?;
    file.sync_all()
}

fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

impl KeyProvider for KeyFile {
    fn describe(&self) -> Result<Description, KmsError> {
        let capabilities = Capabilities { binds_context: true, ..Capabilities::default() };
        Ok(Description { uri: self.uri.clone(), key_id: self.uri.clone(), capabilities })
    }

    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
        Ok(GcmSiv::wrap(&self.wrap_key, &context.to_aad(), key).to_vec())
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        GcmSiv::unwrap(&self.wrap_key, &context.to_aad(), wrapped)
            .map_err(|_| KmsError::BadCiphertext(format!("not by the key in {}", self.uri)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kms::{ConnectOptions, KeyPurpose, connect};
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self) -> PathBuf {
            self.0.path().join("key")
        }

        fn uri(&self) -> RootKeyUri {
            RootKeyUri::parse(&format!("keyfile:{}", self.path().display())).unwrap()
        }

        fn write(&self, content: &[u8], mode: u32) -> RootKeyUri {
            let _ = std::fs::remove_file(self.path());
            std::fs::write(self.path(), content).unwrap();
            std::fs::set_permissions(self.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            self.uri()
        }
    }

    fn context() -> WrapContext {
        WrapContext { store: [1; 16], purpose: KeyPurpose::Kek, object: [2; 16], extra: vec![] }
    }

    #[test]
    fn raw_and_hexadecimal_are_the_same_key() {
        let at = Place::new();
        let raw: Vec<u8> = (1..=32).collect();
        let digits: String = raw.iter().map(|b| format!("{b:02x}")).collect();
        let key = Secret32::random();
        let w = KeyFile::open(&at.write(&raw, 0o600)).unwrap().wrap(&key, &context()).unwrap();
        assert_eq!(w.len(), 60);
        for text in [digits.clone(), format!("{digits}\n"), format!("{digits}\r\n"), digits.to_uppercase()] {
            let k = KeyFile::open(&at.write(text.as_bytes(), 0o400)).unwrap();
            assert!(k.unwrap(&w, &context()).unwrap().ct_eq(&key));
            let other = WrapContext { object: [3; 16], ..context() };
            assert!(matches!(k.unwrap(&w, &other), Err(KmsError::BadCiphertext(_))));
        }
        let other = KeyFile::open(&at.write(&[7; 32], 0o600)).unwrap();
        assert!(matches!(other.unwrap(&w, &context()), Err(KmsError::BadCiphertext(_))));
    }

    /// What is wrapped is what docs/FORMAT.md says, computed here step by step.
    #[test]
    fn the_wrapped_form_is_as_documented() {
        let at = Place::new();
        let k = KeyFile::open(&at.write(&[7; 32], 0o600)).unwrap();
        let key = Secret32::random();
        let w = k.wrap(&key, &context()).unwrap();
        let wrap_key = derive(&Secret32::build(|b| b.fill(7)), "envelopefs/v1/root-wrap", b"");
        let aad = [&b"envelopefs/v1/kek\0"[..], &[1; 16], &[2; 16]].concat();
        assert_eq!(GcmSiv::open_random(&wrap_key, &aad, &w).unwrap(), key.expose());
    }

    #[test]
    fn what_holds_no_key_is_refused() {
        let at = Place::new();
        let long = "a".repeat(67);
        let cases: [&[u8]; 10] = [
            b"",
            b"\n",
            &[1; 31],
            &[1; 33],
            &[b'a'; 63],
            &[b'a'; 65],
            &[b'g'; 64],
            long.as_bytes(),
            &[0; 32],
            &[b'0'; 64],
        ];
        for c in cases {
            assert!(matches!(KeyFile::open(&at.write(c, 0o600)), Err(KmsError::Config(_))), "{c:?}");
        }
        let two_lines = [&[b'a'; 64][..], b"\n\n"].concat();
        assert!(KeyFile::open(&at.write(&two_lines, 0o600)).is_err());
    }

    #[test]
    fn a_key_file_that_others_may_read_is_refused_and_the_message_says_what_to_do() {
        let at = Place::new();
        for mode in [0o640, 0o604, 0o660, 0o620, 0o601, 0o777] {
            let e = KeyFile::open(&at.write(&[1; 32], mode)).unwrap_err();
            assert!(matches!(&e, KmsError::Config(m) if m.contains("chmod 600")), "{mode:o}: {e}");
        }
        for mode in [0o600, 0o400, 0o700] {
            assert!(KeyFile::open(&at.write(&[1; 32], mode)).is_ok(), "{mode:o}");
        }
    }

    #[test]
    fn what_is_no_file_is_refused_without_waiting() {
        let at = Place::new();
        assert!(matches!(KeyFile::open(&at.uri()), Err(KmsError::NotFound(_))));
        std::fs::create_dir(at.path()).unwrap();
        assert!(matches!(KeyFile::open(&at.uri()), Err(KmsError::Config(_))));
        std::fs::remove_dir(at.path()).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, at.path(), rustix::fs::FileType::Fifo, rustix::fs::Mode::from(0o600), 0)
            .unwrap();
        assert!(matches!(KeyFile::open(&at.uri()), Err(KmsError::Config(_))), "a FIFO that nobody writes to");
    }

    #[test]
    fn connect_makes_a_key_file_only_when_asked_and_only_if_there_is_none() {
        let at = Place::new();
        let o = ConnectOptions::default();
        assert!(matches!(connect(&at.uri(), &o, false), Err(KmsError::NotFound(_))));
        assert!(!at.path().exists());
        let key = Secret32::random();
        let w = connect(&at.uri(), &o, true).unwrap().wrap(&key, &context()).unwrap();
        assert_eq!(std::fs::metadata(at.path()).unwrap().permissions().mode() & 0o7777, 0o600);
        let text = std::fs::read(at.path()).unwrap();
        assert_eq!((text.len(), text[64]), (65, b'\n'));
        // Asked again, the same key is used, not a new one.
        for create in [true, false] {
            assert!(connect(&at.uri(), &o, create).unwrap().unwrap(&w, &context()).unwrap().ct_eq(&key));
        }
        assert!(KeyFile::create(&at.uri()).is_err());
        assert_eq!(std::fs::read(at.path()).unwrap(), text);
        assert_eq!(connect(&at.uri(), &o, false).unwrap().describe().unwrap().uri, at.uri().to_string());
    }
}
