//! Why an operation on the store failed.

use crate::format::damage::Damage;
use crate::kms::KmsError;
use std::io;

/// Errors of the store, by whose fault they are. `fs::errno` holds the one table from these to errno.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The backing directory's own error, passed through as it is (ENOSPC, EIO, EACCES, ENOENT, …).
    #[error("{0}")]
    Backing(#[from] io::Error),
    /// Stored bytes are damaged or were tampered with. EIO.
    #[error("{0}")]
    Damage(#[from] Damage),
    /// The key service or its key failed. ENOKEY, EKEYREVOKED, …
    #[error("{0}")]
    Kms(#[from] KmsError),
    /// No such file or directory.
    #[error("no such file or directory")]
    NotFound,
    #[error("file exists")]
    Exists,
    #[error("not a directory")]
    NotADirectory,
    #[error("is a directory")]
    IsADirectory,
    #[error("directory not empty")]
    NotEmpty,
    #[error("name too long")]
    NameTooLong,
    /// The name is reserved for the store (`.envelopefs…` with plaintext names), or holds a NUL or a slash.
    #[error("name is reserved or not valid")]
    BadName,
    #[error("invalid argument")]
    Invalid,
    #[error("store is mounted read-only")]
    ReadOnly,
    #[error("file too large")]
    TooLarge,
    #[error("no such attribute")]
    NoAttribute,
    #[error("operation not permitted")]
    NotPermitted,
    #[error("operation not supported")]
    NotSupported,
    #[error("no data or hole at or after this offset")]
    NoSuchOffset,
    /// The directory is not a store.
    #[error("not an envelopefs store: {0}")]
    NotAStore(String),
    /// No root key given opens the keyring.
    #[error("none of the root keys opens this store: {0}")]
    WrongKey(String),
    /// The keys were locked; `unlock` brings them back. ENOKEY.
    #[error("the keys of this store are locked")]
    KeysLocked,
    /// Another process has the store.
    #[error("store is in use by another process: {0}")]
    Locked(String),
    /// There is already a store here, or something else is in the way of making one.
    #[error("{0}")]
    NotEmptyForInit(String),
    /// The names of a file with several lead to two files since: a rekey could exchange some of them only, and not take that
    /// back. EIO.
    #[error(
        "some of its names lead to another file with the same content since, as they could not be renamed back ({0}); \
             see which by ls -i, and make them one again with ln -f"
    )]
    Parted(io::Error),
    /// A KEK or root key operation that the key's state forbids; says why.
    #[error("{0}")]
    KeyState(String),
    /// A change of the keyring is in force, but a copy from before it is left on disk; says what to do.
    #[error("{0}")]
    CopyLeft(String),
}

impl StoreError {
    /// Stable code for reports and logs: the damage's own, `kms-…`, an errno's name, or a word for the rest.
    pub fn code(&self) -> String {
        let code = match self {
            Self::Damage(d) => d.code(),
            Self::Kms(e) => e.code(),
            Self::Backing(e) => return errno_code(e),
            Self::NotFound => "ENOENT",
            Self::ReadOnly => "EROFS",
            Self::NotAStore(_) => "not-a-store",
            Self::WrongKey(_) => "wrong-key",
            Self::Locked(_) => "locked",
            Self::KeysLocked => "keys-locked",
            Self::KeyState(_) => "key-state",
            Self::CopyLeft(_) => "keyring-copy-old",
            Self::Parted(_) => "names-parted",
            _ => "other",
        };
        code.to_owned()
    }
}

/// `EIO` and the like for the errors that storage gives; `errno-N` for others.
fn errno_code(e: &io::Error) -> String {
    const NAMES: [(i32, &str); 16] = [
        (libc::EIO, "EIO"),
        (libc::EACCES, "EACCES"),
        (libc::EPERM, "EPERM"),
        (libc::EROFS, "EROFS"),
        (libc::ENOSPC, "ENOSPC"),
        (libc::EDQUOT, "EDQUOT"),
        (libc::EMFILE, "EMFILE"),
        (libc::ENFILE, "ENFILE"),
        (libc::ENOMEM, "ENOMEM"),
        (libc::ESTALE, "ESTALE"),
        (libc::EBUSY, "EBUSY"),
        (libc::ETXTBSY, "ETXTBSY"),
        (libc::ENOENT, "ENOENT"),
        (libc::ENOTDIR, "ENOTDIR"),
        (libc::ELOOP, "ELOOP"),
        (libc::ENXIO, "ENXIO"),
    ];
    match e.raw_os_error() {
        Some(n) => NAMES.iter().find(|(k, _)| *k == n).map_or_else(|| format!("errno-{n}"), |(_, s)| (*s).to_owned()),
        None => "io".to_owned(),
    }
}

/// Result of a store operation.
pub type Result<T> = std::result::Result<T, StoreError>;
