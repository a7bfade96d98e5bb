//! Recovery keys: made, proved and shown in this process, which ends soon after; no daemon gets to see their secrets.

use super::output;
use crate::backing::posix::Posix;
use crate::daemon::fault::{Fault, FaultKind};
use crate::format::keyring::KekState;
use crate::kms::KeyProvider;
use crate::kms::recovery::RecoveryKey;
use crate::store::StoreError;
use crate::store::keys::Keys;
use std::sync::Arc;
use zeroize::Zeroizing;

/// A new recovery key, and its secret as it is printed.
///
/// # Errors
/// None that can happen.
pub fn new() -> Result<(Arc<RecoveryKey>, Zeroizing<String>), Fault> {
    let key = RecoveryKey::generate().map_err(|e| Fault::new(FaultKind::Other, e.to_string()))?;
    let text = key.printed().ok_or_else(|| Fault::new(FaultKind::Other, "the new recovery key has no secret"))?;
    Ok((Arc::new(key), text))
}

/// That `key` alone opens the keyring as it lies on disk, MAC and all, with every KEK that is in use.
///
/// # Errors
/// What did not open.
pub fn prove(b: &Posix, key: &Arc<dyn KeyProvider>) -> Result<(), Fault> {
    let prove = || -> Result<(), StoreError> {
        let keys = Keys::open(b, std::slice::from_ref(key))?;
        let ring = keys.snapshot();
        let mut in_use = ring.keks.iter().filter(|k| matches!(k.state, KekState::Active | KekState::Retired));
        in_use.try_for_each(|k| keys.kek(k.id).map(drop))
    };
    prove().map_err(|e| Fault::store(b.path(), &e))
}

/// Prints the secret in a frame of words.
///
/// # Errors
/// It could not be shown: nobody has it then.
pub fn show(text: &str) -> Result<(), Fault> {
    const BEFORE: &str =
        "\nThe recovery key, shown this once. Write it down and keep it away from this machine:\n\n    ";
    const AFTER: &str =
        "\n\nWhoever has it can read the store, also when every other root key is lost (mount --recovery).\n\n";
    let mut all = Zeroizing::new(String::with_capacity(BEFORE.len() + text.len() + AFTER.len()));
    [BEFORE, text, AFTER].iter().for_each(|part| all.push_str(part));
    output::print_secret(&all)
}

/// The fault for a recovery key that nobody has seen, and what became of it in the keyring.
pub fn not_shown(why: &Fault, taken_out: Result<(), Fault>) -> Fault {
    let end = match taken_out {
        Ok(()) => "it was taken out of the keyring again".to_owned(),
        Err(f) => format!("and it is still in the keyring: key remove it ({})", f.message),
    };
    Fault::new(why.kind, format!("the recovery key was not shown: {}; {end}", why.message))
}
