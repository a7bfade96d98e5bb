//! The keyring's copies.

use super::{Checker, Severity};
use crate::backing::{Access, Backing, Kind, read_into};
use crate::format::damage::Damage;
use crate::format::keyring::{KEYRING_MAX, Keyring};
use crate::store::error::Result;
use crate::store::keys::{COPIES, FOLDER, Keys};
use crate::store::walk::unless_gone;

impl<B: Backing> Checker<'_, B> {
    /// Looks at each copy; takes over the keyring in force.
    ///
    /// # Errors
    /// [`crate::store::StoreError::NotAStore`] if there is no folder to look in.
    pub(super) fn check_keyring(&mut self) -> Result<()> {
        let readable = Keys::read_keyring(self.b);
        if let Err(e @ crate::store::StoreError::NotAStore(_)) = readable {
            return Err(e);
        }
        let mut generations = Vec::new();
        for name in COPIES {
            let path = [FOLDER, b"/", name.as_bytes()].concat();
            match self.read_copy(name) {
                Ok(Some(ring)) => generations.push((path, ring.generation)),
                Ok(None) => self.add(&path, "keyring-copy", "this copy of the keyring is missing", Severity::Warning),
                Err(e) => self.add(&path, "keyring-copy", format!("this copy of the keyring: {e}"), Severity::Warning),
            }
        }
        let newest = generations.iter().map(|(_, g)| *g).max();
        for (path, g) in generations.iter().filter(|(_, g)| Some(*g) < newest) {
            let why = format!("generation {g} is older than the other copy's: an update was cut short");
            self.add(path, "keyring-copy-old", why, Severity::Note);
        }
        match (self.keys, readable) {
            (Some(keys), _) => {
                for (copy, d) in keys.damaged_copies().iter().filter(|(_, d)| matches!(d, Damage::KeyringMac)) {
                    let path = [FOLDER, b"/", copy.as_bytes()].concat();
                    self.add(&path, d.code(), d.to_string(), Severity::Warning);
                }
                self.ring = Some(keys.snapshot());
            }
            (None, Ok(ring)) => self.ring = Some(ring),
            (None, Err(e)) => self.damaged(FOLDER, &e),
        }
        Ok(())
    }

    fn read_copy(&self, name: &str) -> Result<Option<Keyring>> {
        let b = self.b;
        let node = b.root().and_then(|r| b.lookup(&r, FOLDER)).and_then(|f| b.lookup(&f, name.as_bytes()));
        let Some(node) = unless_gone(node)? else { return Ok(None) };
        let stat = b.stat(&node)?;
        if stat.kind != Kind::File || stat.size > KEYRING_MAX as u64 {
            return Err(Damage::KeyringUnreadable.into());
        }
        let mut bytes = vec![0; stat.size as usize];
        let n = read_into(b, &b.open(&node, Access::Read)?, &mut bytes, 0)?;
        Ok(Some(Keyring::decode(bytes.get(..n).unwrap_or_default())?.keyring))
    }
}
