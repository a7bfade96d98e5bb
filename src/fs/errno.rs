//! The one table from store errors to errno.
//!
//! Every variant is named: a new error does not compile before somebody has chosen what users see. The choices:
//!
//! | what failed | errno | why |
//! |---|---|---|
//! | stored bytes do not authenticate | `EIO` | what a disk says of a bad sector; the log names file, block and code |
//! | the file's KEK was destroyed | `EKEYREVOKED` | nothing will bring the content back but a backup of the keyring |
//! | the file's KEK is below the floor | `EKEYREVOKED` | what a destroyed KEK gives: the floor rehearses that |
//! | no such KEK or root key, service unreachable or throttled, no credentials | `ENOKEY` | "required key not available"; may pass |
//! | the keys are locked | `ENOKEY` | `unlock` brings them back |
//! | the service has been silent for longer than `offline_grace` | `ENOKEY` | may pass; nobody has decided anything |
//! | the service refuses this caller, or the wrapped bytes | `EKEYREJECTED` | `EACCES` would send people to look at mode bits |
//! | the root key is disabled | `EKEYREVOKED` | somebody did that on purpose |
//! | the backing directory's own error | as it is | but see [`of_backing`] |

use std::io;

use crate::format::damage::Damage;
use crate::kms::KmsError;
use crate::store::StoreError;

/// The errno that users of the mount get for `e`. Always between 1 and 511, what the FUSE device takes, and never
/// `ENOSYS`.
pub fn of(e: &StoreError) -> i32 {
    match e {
        StoreError::Backing(e) => of_backing(e),
        StoreError::Damage(d) => of_damage(d),
        StoreError::Kms(k) => of_kms(k),
        StoreError::NotFound => libc::ENOENT,
        StoreError::Exists | StoreError::NotEmptyForInit(_) => libc::EEXIST,
        StoreError::NotADirectory => libc::ENOTDIR,
        StoreError::IsADirectory => libc::EISDIR,
        StoreError::NotEmpty => libc::ENOTEMPTY,
        StoreError::NameTooLong => libc::ENAMETOOLONG,
        // A reserved name is not a user's to make.
        StoreError::BadName | StoreError::NotPermitted | StoreError::KeyState(_) => libc::EPERM,
        StoreError::Invalid => libc::EINVAL,
        StoreError::ReadOnly => libc::EROFS,
        StoreError::TooLarge => libc::EFBIG,
        StoreError::NoAttribute => libc::ENODATA,
        StoreError::NotSupported => libc::EOPNOTSUPP,
        StoreError::NoSuchOffset => libc::ENXIO,
        StoreError::WrongKey(_) | StoreError::KeysLocked => libc::ENOKEY,
        StoreError::Locked(_) => libc::EBUSY,
        StoreError::NotAStore(_) | StoreError::CopyLeft(_) | StoreError::Parted(_) => libc::EIO,
    }
}

/// The backing directory's error as it is, with two exceptions: without an errno it is `EIO`, and `ENOSYS` becomes
/// `EOPNOTSUPP`, because to the FUSE kernel module `ENOSYS` means "never ask again".
fn of_backing(e: &io::Error) -> i32 {
    match e.raw_os_error() {
        Some(libc::ENOSYS) => libc::EOPNOTSUPP,
        Some(n @ 1..512) => n,
        Some(_) | None => libc::EIO,
    }
}

fn of_damage(d: &Damage) -> i32 {
    match d {
        Damage::KekDestroyed(..) | Damage::KekBelowFloor(_) => libc::EKEYREVOKED,
        Damage::KekUnknown(_) => libc::ENOKEY,
        Damage::HeaderUnreadable
        | Damage::HeaderMagic
        | Damage::HeaderShort
        | Damage::UnsupportedVersion(_)
        | Damage::UnsupportedFeature(_)
        | Damage::UnsupportedSuite(_)
        | Damage::Malformed
        | Damage::ForeignStore(_)
        | Damage::WrapAuth(_)
        | Damage::Commitment
        | Damage::HeaderMac
        | Damage::StateAbsent { .. }
        | Damage::StateAuth { .. }
        | Damage::BlockAuth { .. }
        | Damage::SizeShort { .. }
        | Damage::SizeGrown { .. }
        | Damage::DirIdMissing
        | Damage::DirIdAuth
        | Damage::NameAuth
        | Damage::NameSidecar
        | Damage::SymlinkAuth
        | Damage::XattrAuth
        | Damage::KeyringUnreadable
        | Damage::KeyringMac => libc::EIO,
    }
}

fn of_kms(k: &KmsError) -> i32 {
    match k {
        KmsError::Unreachable(_)
        | KmsError::Throttled(_)
        | KmsError::NotFound(_)
        | KmsError::Credentials(_)
        | KmsError::Config(_) => libc::ENOKEY,
        KmsError::Denied(_) | KmsError::BadCiphertext(_) => libc::EKEYREJECTED,
        KmsError::Disabled(_) => libc::EKEYREVOKED,
    }
}

/// How loudly a failure is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gravity {
    /// Part of everyday work: no such file, disk full, not permitted.
    Expected,
    /// Stored bytes or keys are not as they should be; somebody has to look.
    Damage,
}

/// How loudly `e` is logged.
pub fn gravity(e: &StoreError) -> Gravity {
    match e {
        StoreError::Damage(_) | StoreError::Kms(_) => Gravity::Damage,
        StoreError::Backing(e) if of_backing(e) == libc::EIO => Gravity::Damage,
        _ => Gravity::Expected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ids::KekId;

    #[test]
    fn the_backing_directorys_errno_comes_through() {
        for n in [libc::ENOSPC, libc::EIO, libc::EDQUOT, libc::EROFS, libc::EACCES, libc::ENOENT] {
            assert_eq!(of(&StoreError::Backing(io::Error::from_raw_os_error(n))), n);
        }
    }

    #[test]
    fn enosys_and_what_the_device_refuses_never_reach_the_kernel() {
        assert_eq!(of(&io::Error::from_raw_os_error(libc::ENOSYS).into()), libc::EOPNOTSUPP);
        assert_eq!(of(&io::Error::from_raw_os_error(512).into()), libc::EIO);
        assert_eq!(of(&io::Error::from_raw_os_error(-5).into()), libc::EIO);
        assert_eq!(of(&io::Error::other("no number").into()), libc::EIO);
    }

    #[test]
    fn keys_have_errors_of_their_own() {
        let id = KekId([7; 16]);
        assert_eq!(of(&Damage::KekDestroyed(id, 1).into()), libc::EKEYREVOKED);
        assert_eq!(of(&Damage::KekBelowFloor(id).into()), libc::EKEYREVOKED);
        assert_eq!(of(&Damage::KekUnknown(id).into()), libc::ENOKEY);
        assert_eq!(of(&Damage::WrapAuth(id).into()), libc::EIO);
        assert_eq!(of(&StoreError::KeysLocked), libc::ENOKEY);
        assert_eq!(gravity(&StoreError::KeysLocked), Gravity::Expected, "thousands of them say nothing new");
        assert_eq!(of(&KmsError::Unreachable(String::new()).into()), libc::ENOKEY);
        assert_eq!(of(&KmsError::Denied(String::new()).into()), libc::EKEYREJECTED);
        assert_eq!(of(&KmsError::Disabled(String::new()).into()), libc::EKEYREVOKED);
    }

    #[test]
    fn damage_is_loud_and_everyday_errors_are_not() {
        assert_eq!(gravity(&Damage::BlockAuth { block: 3 }.into()), Gravity::Damage);
        assert_eq!(gravity(&io::Error::from_raw_os_error(libc::EIO).into()), Gravity::Damage);
        assert_eq!(gravity(&io::Error::from_raw_os_error(libc::ENOSPC).into()), Gravity::Expected);
        assert_eq!(gravity(&StoreError::NotFound), Gravity::Expected);
    }
}
