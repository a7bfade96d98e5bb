//! What can be found wrong with stored bytes, each with its own stable code.

use super::ids::{KekId, StoreId};
use super::time::rfc3339_seconds;

/// Something in the backing directory is not what envelopefs wrote. Codes are stable: they stand in logs, in
/// `check --json` and in `docs/FORMAT.md`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    #[error("neither header slot has a valid checksum")]
    HeaderUnreadable,
    #[error("not an envelopefs file: no magic number in either header slot")]
    HeaderMagic,
    #[error("header is cut short")]
    HeaderShort,
    #[error("format version {0} is not known to this program; a newer envelopefs may open it")]
    UnsupportedVersion(u16),
    #[error("incompatible feature flags {0:#010x} are not known to this program; a newer envelopefs may open it")]
    UnsupportedFeature(u32),
    #[error("cipher suite {0} is not known to this program")]
    UnsupportedSuite(u16),
    #[error("reserved bytes are not zero or a length is out of bounds")]
    Malformed,
    #[error("the file belongs to another store, {0}")]
    ForeignStore(StoreId),
    #[error("KEK {0} is not in this store's keyring")]
    KekUnknown(KekId),
    /// With the time, in seconds since 1970.
    #[error("KEK {0} was destroyed at {when}; only a backup of the keyring from before can open this file", when = rfc3339_seconds(*.1))]
    KekDestroyed(KekId, u64),
    /// Nothing is broken: the operator has closed the KEK for trial.
    #[error(
        "KEK {0} is below the floor that was set for this store (key floor moves it back, rotate moves the file up)"
    )]
    KekBelowFloor(KekId),
    #[error("the wrapped DEK does not open under KEK {0}")]
    WrapAuth(KekId),
    #[error("key commitment does not match the unwrapped DEK")]
    Commitment,
    #[error("header MAC does not match")]
    HeaderMac,
    #[error("state of segment {segment} is missing")]
    StateAbsent { segment: u64 },
    #[error("state of segment {segment} does not authenticate in either copy")]
    StateAuth { segment: u64 },
    #[error("block {block} does not authenticate")]
    BlockAuth { block: u64 },
    #[error("file is cut short: sealed length {sealed}, found {actual}")]
    SizeShort { sealed: u64, actual: u64 },
    #[error("file has grown: sealed length {sealed}, found {actual}")]
    SizeGrown { sealed: u64, actual: u64 },
    #[error("directory id is missing")]
    DirIdMissing,
    #[error("directory id does not authenticate")]
    DirIdAuth,
    #[error("file name does not authenticate")]
    NameAuth,
    #[error("name sidecar is missing or does not match")]
    NameSidecar,
    #[error("symbolic link target does not authenticate")]
    SymlinkAuth,
    #[error("extended attribute does not authenticate")]
    XattrAuth,
    #[error("keyring: neither copy is valid")]
    KeyringUnreadable,
    #[error("keyring MAC does not match")]
    KeyringMac,
}

impl Damage {
    /// The stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::HeaderUnreadable => "header-unreadable",
            Self::HeaderMagic => "header-magic",
            Self::HeaderShort => "header-short",
            Self::UnsupportedVersion(_) => "unsupported-version",
            Self::UnsupportedFeature(_) => "unsupported-feature",
            Self::UnsupportedSuite(_) => "unsupported-suite",
            Self::Malformed => "malformed",
            Self::ForeignStore(_) => "foreign-store",
            Self::KekUnknown(_) => "kek-unknown",
            Self::KekDestroyed(..) => "kek-destroyed",
            Self::KekBelowFloor(_) => "kek-below-floor",
            Self::WrapAuth(_) => "wrap-auth",
            Self::Commitment => "commitment",
            Self::HeaderMac => "header-mac",
            Self::StateAbsent { .. } => "state-absent",
            Self::StateAuth { .. } => "state-auth",
            Self::BlockAuth { .. } => "block-auth",
            Self::SizeShort { .. } => "size-short",
            Self::SizeGrown { .. } => "size-grown",
            Self::DirIdMissing => "dir-id-missing",
            Self::DirIdAuth => "dir-id-auth",
            Self::NameAuth => "name-auth",
            Self::NameSidecar => "name-sidecar",
            Self::SymlinkAuth => "symlink-auth",
            Self::XattrAuth => "xattr-auth",
            Self::KeyringUnreadable => "keyring-unreadable",
            Self::KeyringMac => "keyring-mac",
        }
    }
}
