//! What the return codes of a module mean here. Decides only.
//!
//! Tokens use the codes loosely: some say CKR_GENERAL_ERROR for a tag that does not match (SoftHSM), others for a board
//! that is on fire. Such a code is [`Meaning::Doubtful`], and the caller finds out by decrypting something known to be
//! good.

use crate::kms::KmsError;
use cryptoki::error::{Error, RvError};

/// What to do about an error of a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// The session, the login or the token is gone: open again, once.
    Dead,
    /// A handle names no object any more: look for the key again, once.
    Stale,
    /// The token refuses the PIN. Never to be tried again with this or any other PIN in this process.
    Pin,
    /// The ciphertext is no good.
    Bad,
    /// The ciphertext is no good, or the device is not.
    Doubtful,
    /// The token, or this key, cannot do this.
    Unsupported,
    /// The key or the user may not do this.
    Denied,
    /// Too much at once.
    Busy,
}

/// What `e` means.
pub fn meaning(e: &Error) -> Meaning {
    match e {
        Error::Pkcs11(rv, _) => of_code(*rv),
        Error::NotSupported | Error::NullFunctionPointer | Error::MissingSymbol(_) => Meaning::Unsupported,
        _ => Meaning::Doubtful,
    }
}

fn of_code(rv: RvError) -> Meaning {
    use RvError as R;
    match rv {
        R::SessionHandleInvalid
        | R::SessionClosed
        | R::DeviceRemoved
        | R::TokenNotPresent
        | R::TokenNotRecognized
        | R::SlotIdInvalid
        | R::UserNotLoggedIn
        | R::CryptokiNotInitialized => Meaning::Dead,
        R::ObjectHandleInvalid | R::KeyHandleInvalid | R::WrappingKeyHandleInvalid | R::UnwrappingKeyHandleInvalid => {
            Meaning::Stale
        }
        R::PinIncorrect | R::PinInvalid | R::PinLenRange | R::PinExpired | R::PinLocked | R::UserPinNotInitialized => {
            Meaning::Pin
        }
        R::EncryptedDataInvalid | R::EncryptedDataLenRange | R::WrappedKeyInvalid | R::WrappedKeyLenRange => {
            Meaning::Bad
        }
        // CKR_AEAD_DECRYPT_FAILED of PKCS#11 3.0, which the client library does not name.
        R::UnknownErrorCode(0x42) => Meaning::Bad,
        R::MechanismInvalid
        | R::MechanismParamInvalid
        | R::FunctionNotSupported
        | R::KeyTypeInconsistent
        | R::KeySizeRange
        | R::WrappingKeySizeRange
        | R::WrappingKeyTypeInconsistent
        | R::UnwrappingKeySizeRange
        | R::UnwrappingKeyTypeInconsistent
        | R::TemplateInconsistent
        | R::TemplateIncomplete
        | R::AttributeTypeInvalid
        | R::AttributeValueInvalid
        | R::SessionReadOnly
        | R::RandomNoRng => Meaning::Unsupported,
        R::KeyFunctionNotPermitted
        | R::ActionProhibited
        | R::FunctionRejected
        | R::UserAnotherAlreadyLoggedIn
        | R::UserTooManyTypes
        | R::UserTypeInvalid => Meaning::Denied,
        R::SessionCount | R::HostMemory | R::DeviceMemory => Meaning::Busy,
        _ => Meaning::Doubtful,
    }
}

/// The code as the standard writes it; other errors in their own words.
pub fn name(e: &Error) -> String {
    let Error::Pkcs11(rv, _) = e else { return e.to_string() };
    if let RvError::UnknownErrorCode(n) | RvError::VendorDefined(n) = rv {
        return format!("CKR code {n:#x}");
    }
    let mut out = String::from("CKR");
    for c in format!("{rv:?}").chars() {
        if c.is_ascii_uppercase() {
            out.push('_');
        }
        out.push(c.to_ascii_uppercase());
    }
    out
}

/// The error that the caller gets when nothing more can be done; `what` was tried.
pub fn into_kms(e: &Error, what: &str) -> KmsError {
    let text = format!("{what}: {}", name(e));
    match meaning(e) {
        Meaning::Pin => KmsError::Credentials(text),
        Meaning::Stale => KmsError::NotFound(format!("{text}; was the key deleted from the token?")),
        Meaning::Bad => KmsError::BadCiphertext(text),
        Meaning::Unsupported => KmsError::Config(format!("{text}; the token or the key cannot do this")),
        Meaning::Denied => KmsError::Denied(text),
        Meaning::Busy => KmsError::Throttled(text),
        Meaning::Dead if matches!(e, Error::Pkcs11(RvError::UserNotLoggedIn, _)) => {
            KmsError::Credentials(format!("{text}; the token has ended the login"))
        }
        Meaning::Dead | Meaning::Doubtful => {
            KmsError::Unreachable(format!("{text}; is the device attached and its service running?"))
        }
    }
}

/// What a token says about its user's PIN.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PinFlags {
    pub login_required: bool,
    pub protected_path: bool,
    pub initialized: bool,
    pub locked: bool,
    pub final_try: bool,
}

/// How to log in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Login {
    /// Not at all.
    No,
    /// The PIN is typed at the device itself.
    AtDevice,
    /// With a PIN.
    Pin,
    /// It must not even be tried.
    Refuse(&'static str),
}

/// How to log in to a token that says this of itself. The last try before the token locks itself is not ours to use up.
pub fn login(f: PinFlags) -> Login {
    if !f.login_required {
        return Login::No;
    }
    if !f.initialized {
        return Login::Refuse("the token has no user PIN yet; its security officer has to set one");
    }
    if f.locked {
        return Login::Refuse("the token's PIN is locked; its security officer has to set a new one");
    }
    if f.protected_path {
        return Login::AtDevice;
    }
    if f.final_try {
        return Login::Refuse(
            "one wrong PIN more locks the token; log in once by hand with the right one, then try again",
        );
    }
    Login::Pin
}

#[cfg(test)]
mod tests {
    use super::*;
    use cryptoki::context::Function;

    fn e(rv: RvError) -> Error {
        Error::Pkcs11(rv, Function::Decrypt)
    }

    #[test]
    fn codes_become_classes() {
        type Check = fn(&KmsError) -> bool;
        let rows: [(RvError, Check); 15] = [
            (RvError::DeviceRemoved, |k| matches!(k, KmsError::Unreachable(_))),
            (RvError::TokenNotPresent, |k| matches!(k, KmsError::Unreachable(_))),
            (RvError::GeneralError, |k| matches!(k, KmsError::Unreachable(_))),
            (RvError::DeviceError, |k| matches!(k, KmsError::Unreachable(_))),
            (RvError::VendorDefined(0x8000_0001), |k| matches!(k, KmsError::Unreachable(_))),
            (RvError::SessionCount, |k| matches!(k, KmsError::Throttled(_))),
            (RvError::KeyFunctionNotPermitted, |k| matches!(k, KmsError::Denied(_))),
            (RvError::ObjectHandleInvalid, |k| matches!(k, KmsError::NotFound(_))),
            (RvError::EncryptedDataInvalid, |k| matches!(k, KmsError::BadCiphertext(_))),
            (RvError::UnknownErrorCode(0x42), |k| matches!(k, KmsError::BadCiphertext(_))),
            (RvError::WrappedKeyInvalid, |k| matches!(k, KmsError::BadCiphertext(_))),
            (RvError::PinIncorrect, |k| matches!(k, KmsError::Credentials(_))),
            (RvError::PinLocked, |k| matches!(k, KmsError::Credentials(_))),
            (RvError::UserNotLoggedIn, |k| matches!(k, KmsError::Credentials(_))),
            (RvError::MechanismInvalid, |k| matches!(k, KmsError::Config(_))),
        ];
        for (rv, is) in rows {
            let k = into_kms(&e(rv), "unwrap");
            assert!(is(&k), "{rv:?}: {k:?}");
            assert!(!k.to_string().contains('\n'));
        }
    }

    #[test]
    fn only_what_opening_again_can_cure_is_opened_again() {
        for rv in [
            RvError::SessionHandleInvalid,
            RvError::SessionClosed,
            RvError::DeviceRemoved,
            RvError::TokenNotPresent,
            RvError::UserNotLoggedIn,
        ] {
            assert_eq!(meaning(&e(rv)), Meaning::Dead, "{rv:?}");
        }
        for rv in [RvError::PinIncorrect, RvError::PinLocked, RvError::PinExpired] {
            assert_eq!(meaning(&e(rv)), Meaning::Pin, "{rv:?}");
        }
        assert_eq!(meaning(&e(RvError::ObjectHandleInvalid)), Meaning::Stale);
        assert_eq!(meaning(&e(RvError::GeneralError)), Meaning::Doubtful);
        assert_eq!(meaning(&Error::NullFunctionPointer), Meaning::Unsupported);
        assert_eq!(meaning(&Error::InvalidValue), Meaning::Doubtful);
    }

    #[test]
    fn codes_have_the_names_of_the_standard() {
        assert_eq!(name(&e(RvError::PinIncorrect)), "CKR_PIN_INCORRECT");
        assert_eq!(name(&e(RvError::SessionHandleInvalid)), "CKR_SESSION_HANDLE_INVALID");
        assert_eq!(name(&e(RvError::VendorDefined(0x8000_0001))), "CKR code 0x80000001");
    }

    #[test]
    fn a_pin_is_sent_only_where_it_cannot_lock_the_token() {
        let open = PinFlags { login_required: true, initialized: true, ..Default::default() };
        for (f, how) in [
            (PinFlags::default(), Login::No),
            (open, Login::Pin),
            (PinFlags { protected_path: true, ..open }, Login::AtDevice),
            (PinFlags { protected_path: true, final_try: true, ..open }, Login::AtDevice),
        ] {
            assert_eq!(login(f), how, "{f:?}");
        }
        for f in [
            PinFlags { final_try: true, ..open },
            PinFlags { locked: true, ..open },
            PinFlags { locked: true, protected_path: true, ..open },
            PinFlags { initialized: false, ..open },
        ] {
            assert!(matches!(login(f), Login::Refuse(_)), "{f:?}");
        }
    }
}
