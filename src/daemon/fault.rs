//! What went wrong, in a form that crosses processes: over the readiness pipe and over the control socket.

use crate::kms::KmsError;
use crate::store::StoreError;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Kinds of failure a caller can tell apart. Each has its own exit code (`cli::exit`); the names are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// Anything without a kind of its own.
    Other,
    /// The request makes no sense.
    Usage,
    /// The directory is not a store.
    NotAStore,
    /// No root key given opens the store.
    WrongKey,
    /// The key service does not answer or throttles.
    Unreachable,
    /// The key service or the operating system refuses access.
    Denied,
    /// Another process has the store.
    Locked,
    /// The keys of the mounted store were locked.
    KeysLocked,
    /// Stored bytes are damaged.
    Damage,
    /// An audit log is not whole, or not what the store's key sealed.
    AuditLog,
    /// A report of a rotation is not what the store's key sealed.
    Report,
    /// A rotation was stopped or could not move every file.
    RotationIncomplete,
    /// A rekey was stopped or could not deal with every file.
    RekeyIncomplete,
    /// Nothing of ours is mounted there.
    NotMounted,
    /// The mount point cannot be used.
    MountPoint,
    /// Something of ours is mounted there already.
    MountTaken,
    /// A mount of ours whose daemon has died.
    DeadMount,
    /// The mount is in use.
    Busy,
    /// A rotation is under way already.
    RotationRunning,
    /// A root key is unusable: no such key, mode too open, wrong length, no passphrase or credentials to be had.
    RootKey,
    /// There is already something where a store should be made.
    NotEmpty,
    /// The daemon died or does not answer.
    Daemon,
    /// The configuration file cannot be used.
    Config,
    /// FUSE is not available on this machine or not permitted.
    Fuse,
}

/// One failure: its kind, and one line that says what happened and on what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    pub kind: FaultKind,
    pub message: String,
    /// The path that advice should be about, if not the one the command was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub about: Option<String>,
}

impl Fault {
    /// A fault of `kind`.
    pub fn new(kind: FaultKind, message: impl Into<String>) -> Self {
        Self { kind, message: one_line(&without_numbers(&message.into())), about: None }
    }

    /// The same fault, with advice about `path`.
    pub fn about(mut self, path: &Path) -> Self {
        self.about = Some(path.display().to_string());
        self
    }

    /// A failed system call on `path`. Says `what` was tried.
    pub fn io(what: &str, path: &Path, e: &std::io::Error) -> Self {
        let kind = match e.kind() {
            std::io::ErrorKind::PermissionDenied => FaultKind::Denied,
            _ => FaultKind::Other,
        };
        Self::new(kind, format!("cannot {what} {}: {}", path.display(), plain(e)))
    }

    /// A store error on the store at `path`.
    pub fn store(path: &Path, e: &StoreError) -> Self {
        Self::new(kind_of(e), format!("{}: {e}", path.display()))
    }

    /// A key provider's error with the root key `uri`.
    pub fn kms(uri: &str, e: &KmsError) -> Self {
        let text = match e {
            // These name the root key themselves.
            KmsError::Config(text) | KmsError::Credentials(text) => text.clone(),
            KmsError::NotFound(_) => e.to_string(),
            _ => format!("root key {uri}: {e}"),
        };
        Self::new(kind_of_kms(e), text)
    }
}

/// The text of an I/O error without Rust's "(os error N)".
pub fn plain(e: &std::io::Error) -> String {
    without_numbers(&e.to_string())
}

/// `text` without every "(os error N)", which helps nobody.
fn without_numbers(text: &str) -> String {
    let mut parts = text.split(" (os error ");
    let mut out = parts.next().unwrap_or_default().to_string();
    for p in parts {
        out.push_str(p.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start_matches(')'));
    }
    out
}

fn one_line(s: &str) -> String {
    s.split(['\n', '\r']).map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ")
}

/// The kind of a key provider's error.
pub fn kind_of_kms(e: &KmsError) -> FaultKind {
    match e {
        KmsError::Unreachable(_) | KmsError::Throttled(_) => FaultKind::Unreachable,
        KmsError::Denied(_) | KmsError::Disabled(_) => FaultKind::Denied,
        KmsError::BadCiphertext(_) => FaultKind::WrongKey,
        KmsError::NotFound(_) | KmsError::Config(_) | KmsError::Credentials(_) => FaultKind::RootKey,
    }
}

/// The kind of a store error.
pub fn kind_of(e: &StoreError) -> FaultKind {
    match e {
        StoreError::Damage(_) => FaultKind::Damage,
        StoreError::Kms(k) => kind_of_kms(k),
        StoreError::NotAStore(_) => FaultKind::NotAStore,
        StoreError::WrongKey(_) => FaultKind::WrongKey,
        StoreError::Locked(_) => FaultKind::Locked,
        StoreError::KeysLocked => FaultKind::KeysLocked,
        StoreError::NotEmptyForInit(_) => FaultKind::NotEmpty,
        StoreError::Backing(io) if io.kind() == std::io::ErrorKind::PermissionDenied => FaultKind::Denied,
        _ => FaultKind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_one_line() {
        assert_eq!(Fault::new(FaultKind::Other, "a\nb\r\n c").message, "a b c");
        let e = std::io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(Fault::new(FaultKind::Other, format!("x: {e}; y")).message, "x: No such file or directory; y");
    }

    #[test]
    fn wrong_key_and_unreachable_are_kept_apart() {
        assert_eq!(kind_of(&StoreError::Kms(KmsError::BadCiphertext("x".into()))), FaultKind::WrongKey);
        assert_eq!(kind_of(&StoreError::Kms(KmsError::Unreachable("x".into()))), FaultKind::Unreachable);
        assert_eq!(kind_of(&StoreError::Kms(KmsError::Denied("x".into()))), FaultKind::Denied);
    }

    #[test]
    fn it_survives_the_wire() {
        let f = Fault::new(FaultKind::RootKey, "x: \"quoted\"");
        let s = serde_json::to_string(&f).unwrap();
        assert_eq!(s, r#"{"kind":"root-key","message":"x: \"quoted\""}"#);
        assert_eq!(serde_json::from_str::<Fault>(&s).unwrap(), f);
    }
}
