//! That more than one root key must agree to what cannot be undone.
//!
//! A root key agrees by unwrapping the store secret now, in a call of its own, whatever it has unwrapped before. The one
//! that opened the store speaks without being named; every other one is named by whoever asks.
//!
//! This is held by the program, and so binds whoever has to use the program: an operator with one credential, a script
//! with a wrong id. Who has a root key and can write to the backing directory can write a keyring without a quorum.

use super::roots::{self, Connected, Object};
use super::{Keys, refuse};
use crate::backing::Backing;
use crate::format::ids::RootKeyId;
use crate::format::keyring::{Keyring, ROOTS_MAX};
use crate::kms::event::{Change, StoreChange};
use crate::kms::{KeyProvider, KmsError};
use crate::store::{Result, StoreError};
use std::sync::Arc;

/// The root keys that have proved themselves, each another key than the others.
#[derive(Debug, Default)]
pub struct Confirmation {
    roots: Vec<RootKeyId>,
}

impl Confirmation {
    /// How many there are, the one that opened the store included: at least 1, for the store is open.
    pub fn count(&self) -> u8 {
        u8::try_from(self.roots.len()).unwrap_or(u8::MAX).max(1)
    }

    /// Whether that is enough.
    ///
    /// # Errors
    /// [`StoreError::KeyState`].
    pub(super) fn suffices(&self, required: u8) -> Result<()> {
        match self.count() {
            n if n >= required => Ok(()),
            n => refuse(format!(
                "this store requires {required} different root keys to confirm this, and there {} {n}: name another with \
                 --confirm",
                if n == 1 { "is" } else { "are" }
            )),
        }
    }
}

/// Whether `c` opens what root key `other` wrapped of the store secret: then they are one key under two names.
fn opens(ring: &Keyring, c: &Connected, other: RootKeyId) -> Result<bool> {
    let scheme = |id| ring.root(id).and_then(|r| r.uri.split_once(':')).map(|(s, _)| s.to_owned());
    let Some(w) = Object::Secret.wrap_in(ring, other).filter(|_| scheme(c.id) == scheme(other)) else {
        return Ok(false);
    };
    match c.provider.unwrap(&w.bytes, &Object::Secret.context(ring.store)) {
        Ok(_) => Ok(true),
        Err(KmsError::BadCiphertext(_) | KmsError::NotFound(_)) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

impl Keys {
    /// Has root keys prove themselves: the one that opened the store, and `given`. If the store requires no more than one
    /// and none is given, nobody is asked.
    ///
    /// # Errors
    /// [`StoreError::WrongKey`] if one of `given` is none of the store's; a provider's.
    pub fn confirm(&self, given: &[Arc<dyn KeyProvider>]) -> Result<Confirmation> {
        let ring = self.to_change()?;
        let mut proved: Vec<Connected> = Vec::new();
        let mut confirmation = Confirmation::default();
        if ring.life.required() == 1 && given.is_empty() {
            return Ok(confirmation);
        }
        let opener = self.state.read().connected.first().map(|c| c.provider.clone());
        for (named, p) in opener.iter().map(|p| (false, p)).chain(given.iter().map(|p| (true, p))) {
            let found = roots::identify(&ring, p)?.filter(|(_, key)| key.ct_eq(self.secret.secret()));
            let Some((c, _)) = found else {
                if named {
                    let name = roots::name_of(p.as_ref());
                    return Err(StoreError::WrongKey(format!("{name}, which is to confirm, is none of them")));
                }
                continue;
            };
            let mut same = false;
            for other in &proved {
                same = same || other.id == c.id || opens(&ring, &c, other.id)?;
            }
            if !same {
                confirmation.roots.push(c.id);
                proved.push(c);
            }
        }
        Ok(confirmation)
    }

    /// Whether the word of the root key that opened the store will do for what cannot be undone.
    ///
    /// # Errors
    /// [`StoreError::KeyState`].
    pub fn one_root_key_suffices(&self) -> Result<()> {
        Confirmation::default().suffices(self.state.read().ring.life.required())
    }

    /// Sets how many different root keys must confirm what cannot be undone: destroying a KEK, adding a root key, and
    /// this. As many must confirm this as it was before and as it will be, so that it can be met.
    ///
    /// # Errors
    /// [`StoreError::KeyState`] if too few have confirmed; the backing directory's; [`StoreError::CopyLeft`].
    pub fn set_quorum<B: Backing>(&self, b: &B, quorum: u8, confirmed: &Confirmation) -> Result<()> {
        let _update = self.update.lock();
        let mut ring = self.to_change()?;
        if !(1..=ROOTS_MAX).contains(&quorum.into()) {
            return refuse(format!("a quorum is 1 to {ROOTS_MAX} root keys"));
        }
        let done = "the quorum is set";
        if ring.life.required() == quorum {
            return self.settle(b, done);
        }
        confirmed.suffices(quorum.max(ring.life.required()))?;
        ring.life.quorum = if quorum == 1 { 0 } else { quorum };
        self.adopt(b, ring, &[])?;
        self.tell(&Change::Store { change: StoreChange::Quorum, about: &format!("{quorum} root keys") });
        self.settle(b, done)
    }
}
