//! Exit codes: numbered, stable, listed in `docs/CLI.md` (a test compares).

use crate::daemon::fault::FaultKind;

/// Every way the program can end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Done = 0,
    Other = 1,
    Usage = 2,
    NotAStore = 3,
    WrongKey = 4,
    Unreachable = 5,
    Denied = 6,
    Locked = 7,
    Damage = 8,
    RotationIncomplete = 9,
    NotMounted = 10,
    MountPoint = 11,
    Busy = 12,
    RootKey = 13,
    NotEmpty = 14,
    Daemon = 15,
    Config = 16,
    Fuse = 17,
    KeysLocked = 18,
}

impl Exit {
    /// All of them, in order.
    pub const ALL: [Exit; 19] = [
        Exit::Done,
        Exit::Other,
        Exit::Usage,
        Exit::NotAStore,
        Exit::WrongKey,
        Exit::Unreachable,
        Exit::Denied,
        Exit::Locked,
        Exit::Damage,
        Exit::RotationIncomplete,
        Exit::NotMounted,
        Exit::MountPoint,
        Exit::Busy,
        Exit::RootKey,
        Exit::NotEmpty,
        Exit::Daemon,
        Exit::Config,
        Exit::Fuse,
        Exit::KeysLocked,
    ];

    /// The number.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// What it means, as `docs/CLI.md` says it.
    pub fn meaning(self) -> &'static str {
        match self {
            Exit::Done => "done",
            Exit::Other => "other failure",
            Exit::Usage => "usage: unknown option, missing argument, request that makes no sense",
            Exit::NotAStore => "not a store",
            Exit::WrongKey => "wrong key or passphrase",
            Exit::Unreachable => "key service unreachable or throttling",
            Exit::Denied => "access denied, by the key service or the operating system",
            Exit::Locked => "store locked by another process",
            Exit::Damage => "damage found",
            Exit::RotationIncomplete => "rotation or rekey incomplete: cancelled, or files could not be dealt with",
            Exit::NotMounted => "not mounted",
            Exit::MountPoint => "mount point cannot be used",
            Exit::Busy => "busy: files of the mount are open, or a rotation or a rekey is under way",
            Exit::RootKey => {
                "root key unusable: no such key, mode too open, wrong length, no passphrase or credentials to be had"
            }
            Exit::NotEmpty => "directory is not empty, or already a store",
            Exit::Daemon => "daemon died or does not answer",
            Exit::Config => "configuration file cannot be used",
            Exit::Fuse => "FUSE not available or not permitted",
            Exit::KeysLocked => "keys of the mounted store are locked",
        }
    }
}

impl From<FaultKind> for Exit {
    fn from(k: FaultKind) -> Self {
        match k {
            FaultKind::Other => Exit::Other,
            FaultKind::Usage => Exit::Usage,
            FaultKind::NotAStore => Exit::NotAStore,
            FaultKind::WrongKey => Exit::WrongKey,
            FaultKind::Unreachable => Exit::Unreachable,
            FaultKind::Denied => Exit::Denied,
            FaultKind::Locked => Exit::Locked,
            FaultKind::Damage | FaultKind::AuditLog | FaultKind::Report => Exit::Damage,
            FaultKind::RotationIncomplete | FaultKind::RekeyIncomplete => Exit::RotationIncomplete,
            FaultKind::NotMounted => Exit::NotMounted,
            FaultKind::MountPoint | FaultKind::MountTaken => Exit::MountPoint,
            FaultKind::Busy | FaultKind::RotationRunning => Exit::Busy,
            FaultKind::RootKey => Exit::RootKey,
            FaultKind::NotEmpty => Exit::NotEmpty,
            FaultKind::Daemon | FaultKind::DeadMount => Exit::Daemon,
            FaultKind::Config => Exit::Config,
            FaultKind::Fuse => Exit::Fuse,
            FaultKind::KeysLocked => Exit::KeysLocked,
        }
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(e: Exit) -> Self {
        Self::from(e.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_in_order_and_documented() {
        let doc = include_str!("../../docs/CLI.md");
        for (i, e) in Exit::ALL.iter().enumerate() {
            assert_eq!(usize::from(e.code()), i);
            let row = format!("| {} | {} |", e.code(), e.meaning());
            assert!(doc.contains(&row), "docs/CLI.md lacks the line: {row}");
        }
    }
}
