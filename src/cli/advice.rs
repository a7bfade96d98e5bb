//! What to do next after a failure. The only place that advises.

use crate::daemon::fault::{Fault, FaultKind};

/// The line for standard error: what happened, on what, and what to do next. `subject` is what the command was given.
pub fn line(fault: &Fault, subject: &str) -> String {
    let advice = advice(fault.kind, fault.about.as_deref().unwrap_or(subject));
    match advice.is_empty() {
        true => format!("envelopefs: {}", fault.message),
        false => format!("envelopefs: {}; {advice}", fault.message),
    }
}

/// The advice alone; empty if there is nothing useful to say.
fn advice(kind: FaultKind, subject: &str) -> String {
    let s = subject;
    match kind {
        FaultKind::Other => String::new(),
        FaultKind::Usage => "see --help".into(),
        FaultKind::NotAStore => format!("check the path, or make a store with: envelopefs init {s}"),
        FaultKind::WrongKey => {
            "check the passphrase or name the right root key with --key (recorded ones: envelopefs key list)".into()
        }
        FaultKind::Unreachable => "check the network and the service, then try again; nothing was changed".into(),
        FaultKind::Denied => "check permissions and credentials, then try again".into(),
        FaultKind::Locked => format!("see who with: envelopefs status {s}; unmount it there first"),
        FaultKind::KeysLocked => format!("bring them back with: envelopefs unlock {s}"),
        FaultKind::Damage => {
            format!("look closer with: envelopefs check --deep {s}; restore what it names from a backup")
        }
        FaultKind::AuditLog => {
            "keep the log as it is, and compare it with a copy or a head that was noted before".into()
        }
        FaultKind::Report => {
            "it proves nothing: keep it as it is, and take another copy, or make a new one with: rotate --report".into()
        }
        FaultKind::RotationIncomplete => format!("what is done stays done; finish it with: envelopefs rotate {s}"),
        FaultKind::RekeyIncomplete => {
            "what is done stays done; a rekey of the same paths and options goes on with the rest".into()
        }
        FaultKind::NotMounted => "mount it first with: envelopefs mount BACKING MOUNTPOINT".into(),
        FaultKind::MountPoint => "use an existing directory outside the backing directory".into(),
        FaultKind::MountTaken => "use another mount point, or unmount that one first".into(),
        FaultKind::DeadMount => format!("take it away with: envelopefs unmount {s}, then mount again"),
        FaultKind::Busy => format!("see who uses it with: fuser -vm {s}, and try again when they are done"),
        FaultKind::RotationRunning => format!("see how it stands with: envelopefs status {s}"),
        FaultKind::RootKey => {
            "check the root key's URI and what it stands for (a key file's mode, a service's settings: docs/KEYS.md)"
                .into()
        }
        FaultKind::NotEmpty => "use an empty directory".into(),
        FaultKind::Daemon => "see the system log or --log-file, then mount again".into(),
        FaultKind::Config => "compare with config.example.toml".into(),
        FaultKind::Fuse => "install the package fuse3 and see that /dev/fuse is there and open to you".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_each() {
        let l = line(&Fault::new(FaultKind::NotAStore, "/x is not a store"), "/x");
        assert_eq!(l, "envelopefs: /x is not a store; check the path, or make a store with: envelopefs init /x");
        assert_eq!(line(&Fault::new(FaultKind::Other, "no space"), "/x"), "envelopefs: no space");
    }
}
