//! PKCS#11 modules in this process. A module is a library with state of its own: it is loaded and initialised once, when
//! it is first needed, and stays until the process ends.
//!
//! Many modules look for their tokens and build up their connections in C_Initialize only, and are blind for a device that
//! went away and came back. So a module none of whose tokens is open is initialised anew when a token is missed.

use super::fault::{PinFlags, into_kms, name};
use super::matching::{Identity, LibraryFacts, TokenFacts};
use super::pin::Pin;
use super::token::Token;
use crate::kms::KmsError;
use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::{MechanismInfo, MechanismType};
use cryptoki::slot::{Limit, Slot, TokenInfo};
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

static MODULES: Mutex<BTreeMap<PathBuf, Arc<Module>>> = Mutex::new(BTreeMap::new());

/// A module that is ready for use.
pub struct Module {
    path: PathBuf,
    context: Pkcs11,
    /// How often the module was initialised anew. Held for reading by every call to it, for C_Finalize must come when
    /// there is no other.
    epoch: RwLock<u64>,
    /// Tokens in use, so that all root keys on one token share its sessions and its login.
    tokens: Mutex<BTreeMap<Identity, Weak<Token>>>,
}

/// A token that is there now.
pub struct Present {
    pub facts: TokenFacts,
    pub slot: Slot,
    pub pin: PinFlags,
    /// Most sessions the token can have; `None`: no limit known.
    pub sessions_max: Option<u64>,
}

/// The module at `path`, an absolute path, initialised.
///
/// # Errors
/// [`KmsError::Config`] if it is no module, [`KmsError::Unreachable`] if it does not come up.
pub fn load(path: &Path) -> Result<Arc<Module>, KmsError> {
    let mut modules = MODULES.lock();
    if let Some(m) = modules.get(path) {
        return Ok(m.clone());
    }
    let shown = path.display();
    let context = Pkcs11::new(path).map_err(|e| {
        let what = "give the PKCS#11 library of your token with --pkcs11-module or in [services.pkcs11]";
        let why = reason(&e);
        let why = why.strip_prefix(&format!("{shown}: ")).unwrap_or(&why);
        KmsError::Config(format!("{shown} is no PKCS#11 module: {why}; {what}"))
    })?;
    let module =
        Arc::new(Module { path: path.to_owned(), context, epoch: RwLock::default(), tokens: Mutex::default() });
    module.initialize()?;
    modules.insert(path.to_owned(), module.clone());
    Ok(module)
}

/// Why a library was not loaded: the loader's own text.
fn reason(e: &Error) -> String {
    match e {
        Error::LibraryLoading(inner) => std::error::Error::source(inner).map_or(inner.to_string(), ToString::to_string),
        other => name(other),
    }
}

impl Module {
    /// The module's functions.
    pub fn context(&self) -> &Pkcs11 {
        &self.context
    }

    fn initialize(&self) -> Result<(), KmsError> {
        match self.context.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
            // Under another name, or by another part of the process.
            Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => Ok(()),
            Err(e) => {
                let (shown, why) = (self.path.display(), name(&e));
                let what = "check its own configuration and that its service runs";
                Err(KmsError::Unreachable(format!("PKCS#11 module {shown} does not initialise: {why}; {what}")))
            }
        }
    }

    /// To be held during calls to the module. Says how often it was initialised anew: sessions of before are gone, and
    /// their numbers may have been given to others.
    pub fn calls(&self) -> RwLockReadGuard<'_, u64> {
        self.epoch.read()
    }

    /// Initialises the module anew, unless it is in use. The caller holds nothing of it.
    ///
    /// # Errors
    /// [`KmsError::Unreachable`] if it does not come up again.
    pub fn restart(&self) -> Result<(), KmsError> {
        // Outlives the lock: one of these may be the last of its token, which closes sessions when it goes.
        let tokens: Vec<Arc<Token>> = self.tokens.lock().values().filter_map(Weak::upgrade).collect();
        let Some(mut epoch) = self.epoch.try_write() else { return Ok(()) };
        if tokens.iter().any(|t| t.is_open()) {
            return Ok(());
        }
        *epoch += 1;
        // If it fails it was not initialised, or says so in a moment.
        let _ = self.context.clone().finalize();
        self.initialize()
    }

    /// What a mechanism does on the token in `slot`; `None` if it does not know it.
    pub fn mechanism(&self, slot: Slot, m: MechanismType) -> Option<MechanismInfo> {
        let _calls = self.calls();
        self.context.get_mechanism_info(slot, m).ok()
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// As the module says.
    pub fn library(&self) -> Result<LibraryFacts, KmsError> {
        let _calls = self.calls();
        let info = self.context.get_library_info().map_err(|e| self.failed(&e, "C_GetInfo"))?;
        let version = info.library_version();
        Ok(LibraryFacts {
            manufacturer: trimmed(info.manufacturer_id()),
            description: trimmed(info.library_description()),
            version: (version.major(), version.minor()),
        })
    }

    /// The initialised tokens that are there now. One that does not answer is as good as not there.
    ///
    /// # Errors
    /// As the module says.
    pub fn tokens(&self) -> Result<Vec<Present>, KmsError> {
        let _calls = self.calls();
        let slots = self.context.get_slots_with_token().map_err(|e| self.failed(&e, "C_GetSlotList"))?;
        Ok(slots.into_iter().filter_map(|slot| self.present(slot)).collect())
    }

    /// What is in a slot; `None` if there is no initialised token, or none that answers.
    pub fn present(&self, slot: Slot) -> Option<Present> {
        let info = self.context.get_token_info(slot).ok().filter(TokenInfo::token_initialized)?;
        let place = self.context.get_slot_info(slot).ok()?;
        let identity = Identity {
            manufacturer: trimmed(info.manufacturer_id()),
            model: trimmed(info.model()),
            serial: trimmed(info.serial_number()),
            label: trimmed(info.label()),
        };
        let facts = TokenFacts {
            identity,
            slot: slot.id(),
            slot_description: trimmed(place.slot_description()),
            slot_manufacturer: trimmed(place.manufacturer_id()),
        };
        let pin = PinFlags {
            login_required: info.login_required(),
            protected_path: info.protected_authentication_path(),
            initialized: info.user_pin_initialized(),
            locked: info.user_pin_locked(),
            final_try: info.user_pin_final_try(),
        };
        let sessions_max = match info.max_session_count() {
            Limit::Max(n) => Some(n),
            Limit::Unavailable | Limit::Infinite => None,
        };
        Some(Present { facts, slot, pin, sessions_max })
    }

    /// The token of this identity, with what others in this process have opened of it; `pin` is for when it is not open.
    pub fn token(self: &Arc<Self>, identity: &Identity, slot: u64, pin: Pin) -> Arc<Token> {
        let mut tokens = self.tokens.lock();
        if let Some(t) = tokens.get(identity).and_then(Weak::upgrade) {
            t.offer(pin);
            return t;
        }
        let t = Arc::new(Token::new(self.clone(), identity.clone(), slot, pin));
        tokens.insert(identity.clone(), Arc::downgrade(&t));
        t
    }

    fn failed(&self, e: &Error, what: &str) -> KmsError {
        into_kms(e, &format!("PKCS#11 module {}: {what}", self.path.display()))
    }
}

/// Texts of PKCS#11 are padded with blanks.
fn trimmed(text: &str) -> String {
    text.trim_end_matches([' ', '\0']).to_owned()
}
