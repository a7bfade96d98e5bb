//! `keyfile:/path`: a root key in a file of 32 raw bytes or 64 hexadecimal digits, mode 0600 or stricter.
//!
//! Wrapped form: [`GcmSiv::wrap`] under derive(key, ROOT_WRAP, "") with [`WrapContext::to_aad`]: nonce 12 ‖
//! ciphertext 32 ‖ tag 16.

use super::uri::RootKeyUri;
use super::{Capabilities, Description, KeyProvider, KmsError, WrapContext};
use crate::crypto::aead::GcmSiv;
use crate::crypto::kdf::{derive, label};
use crate::crypto::secret::{KEY_LEN, Secret32};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
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
        let n = read_all(&mut file, &mut *buf).map_err(|e| io_error(path, &e))?;
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

fn read_all(file: &mut File, buf: &mut [u8]) -> io::Result<usize> {
    let mut n = 0;
    while let Some(rest) = buf.get_mut(n..).filter(|r| !r.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(k) => n += k,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(n)
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
