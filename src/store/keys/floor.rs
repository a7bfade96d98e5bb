//! Closing older KEKs for trial: no file is opened under a KEK below the floor, and the floor can be moved back.

use super::{Keys, refuse};
use crate::backing::Backing;
use crate::format::damage::Damage;
use crate::format::ids::KekId;
use crate::format::keyring::KekState;
use crate::kms::event::{Change, StoreChange};
use crate::store::Result;

const DONE: &str = "the floor is set";

impl Keys {
    /// Opens no file under a KEK older than `floor` from now on; `None`: under any. Open files go on, and headers can
    /// still be moved ([`Keys::kek_to_move`]).
    ///
    /// # Errors
    /// [`Damage::KekUnknown`]; [`crate::store::StoreError::KeyState`] if `floor` is neither active nor retired, for then
    /// the active KEK would be below it or the trial about nothing; the backing directory's;
    /// [`crate::store::StoreError::CopyLeft`].
    pub fn set_floor<B: Backing>(&self, b: &B, floor: Option<KekId>) -> Result<()> {
        let _update = self.update.lock();
        let mut ring = self.to_change()?;
        if let Some(id) = floor {
            match ring.kek(id).ok_or(Damage::KekUnknown(id))?.state {
                KekState::Active | KekState::Retired => {}
                KekState::Pending => return refuse(format!("KEK {id} is pending: the active one would be below it")),
                KekState::Destroyed => {
                    return refuse(format!(
                        "KEK {id} was destroyed: name the oldest KEK that files may be opened under"
                    ));
                }
            }
        }
        if ring.life.floor == floor {
            return self.settle(b, DONE);
        }
        ring.life.floor = floor;
        self.adopt(b, ring, &[])?;
        let about = floor.map_or_else(|| "none".to_owned(), |id| id.to_string());
        self.tell(&Change::Store { change: StoreChange::Floor, about: &about });
        self.settle(b, DONE)
    }

    /// Whether files may be opened under `id`, as far as the floor goes.
    ///
    /// # Errors
    /// [`Damage::KekBelowFloor`].
    pub fn above_floor(&self, id: KekId) -> Result<()> {
        match self.state.read().ring.is_below_floor(id) {
            true => Err(Damage::KekBelowFloor(id).into()),
            false => Ok(()),
        }
    }
}
