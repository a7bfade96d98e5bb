//! What a keyring says about the end of its KEKs: when they are to be destroyed, how many root keys that takes, and which
//! of them files may still be opened under.
//!
//! A section of the keyring between the KEKs and the MAC, there if and only if it says anything
//! ([`super::keyring::INCOMPAT_LIFE_CYCLE`]):
//!
//! | bytes | what |
//! |---|---|
//! | 1 | quorum: 0, or 2…16 |
//! | 3 | reserved, 0 |
//! | 16 | floor: KEK id, or zeros |
//! | 4 | number of schedules, at most as many as there are KEKs |
//! | … | each: KEK id 16 · confirmed u8, 1…16 · reserved 7 · four times u64: scheduled, due, announced, used |

use super::codec::{Malformed, Reader, Writer};
use super::ids::KekId;
use super::keyring::{KekRecord, KekState, ROOTS_MAX};

const HEAD_LEN: usize = 4 + 16 + 4;
const SCHEDULE_LEN: usize = 16 + 8 + 4 * 8;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LifeCycle {
    /// So many different root keys must confirm what cannot be undone; 0: the one that opens the store will do.
    pub quorum: u8,
    /// No file is opened under a KEK that stands before this one in the keyring.
    pub floor: Option<KekId>,
    /// Retired KEKs that are to be destroyed.
    pub schedules: Vec<Schedule>,
}

/// That a KEK is to be destroyed. Times are Unix seconds; 0 = has not happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Schedule {
    #[serde(skip, default = "nobody")]
    pub kek: KekId,
    /// How many different root keys have confirmed it.
    pub confirmed: u8,
    /// When it was decided.
    pub scheduled: u64,
    /// Not before this time.
    pub due: u64,
    /// When somebody who looked found the end near.
    pub announced: u64,
    /// When a file was first seen to need the KEK since.
    pub used: u64,
}

fn nobody() -> KekId {
    KekId([0; 16])
}

impl LifeCycle {
    /// Whether there is nothing to say.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// How many different root keys must confirm what cannot be undone.
    pub fn required(&self) -> u8 {
        self.quorum.max(1)
    }

    /// When `kek` is to be destroyed.
    pub fn schedule(&self, kek: KekId) -> Option<&Schedule> {
        self.schedules.iter().find(|s| s.kek == kek)
    }

    /// The same, to be changed.
    pub fn schedule_mut(&mut self, kek: KekId) -> Option<&mut Schedule> {
        self.schedules.iter_mut().find(|s| s.kek == kek)
    }

    /// Bytes of the section.
    pub(super) fn len(&self) -> usize {
        if self.is_empty() { 0 } else { HEAD_LEN + self.schedules.len() * SCHEDULE_LEN }
    }

    /// Whether it goes with these KEKs.
    pub(super) fn is_sound(&self, keks: &[KekRecord]) -> bool {
        let at = |id: KekId| keks.iter().position(|k| k.id == id);
        let active = keks.iter().position(|k| k.state == KekState::Active);
        let mut ids: Vec<KekId> = self.schedules.iter().map(|s| s.kek).collect();
        ids.sort_unstable();
        (self.quorum == 0 || (2..=ROOTS_MAX).contains(&self.quorum.into()))
            && self.floor.is_none_or(|f| at(f).is_some_and(|n| Some(n) <= active))
            && ids.windows(2).all(|w| w.first() != w.last())
            && self.schedules.iter().all(|s| {
                (1..=ROOTS_MAX).contains(&s.confirmed.into())
                    && s.due >= s.scheduled
                    && keks.iter().any(|k| k.id == s.kek && k.state == KekState::Retired)
            })
    }

    pub(super) fn write(&self, w: &mut Writer<'_>) -> Result<(), Malformed> {
        if self.is_empty() {
            return Ok(());
        }
        w.u8(self.quorum)?;
        w.zeros(3)?;
        match self.floor {
            Some(KekId(id)) if id != [0; 16] => w.put(&id)?,
            Some(_) => return Err(Malformed),
            None => w.zeros(16)?,
        }
        w.u32(u32::try_from(self.schedules.len()).map_err(|_| Malformed)?)?;
        for s in &self.schedules {
            w.put(s.kek.as_bytes())?;
            w.u8(s.confirmed)?;
            w.zeros(7)?;
            for t in [s.scheduled, s.due, s.announced, s.used] {
                w.u64(t)?;
            }
        }
        Ok(())
    }

    /// Reads the section of a keyring with `keks` KEKs; that it goes with them is for [`LifeCycle::is_sound`].
    pub(super) fn read(r: &mut Reader<'_>, keks: usize) -> Result<Self, Malformed> {
        let quorum = r.u8()?;
        r.zeros(3)?;
        let floor = Some(KekId(r.array()?)).filter(|f| f.0 != [0; 16]);
        let n = usize::try_from(r.u32()?).map_err(|_| Malformed)?;
        if n > keks {
            return Err(Malformed);
        }
        let schedules = (0..n).map(|_| read_schedule(r)).collect::<Result<_, _>>()?;
        let life = Self { quorum, floor, schedules };
        // There is one spelling of nothing: no section.
        if life.is_empty() { Err(Malformed) } else { Ok(life) }
    }
}

fn read_schedule(r: &mut Reader<'_>) -> Result<Schedule, Malformed> {
    let (kek, confirmed) = (KekId(r.array()?), r.u8()?);
    r.zeros(7)?;
    let (scheduled, due, announced, used) = (r.u64()?, r.u64()?, r.u64()?, r.u64()?);
    Ok(Schedule { kek, confirmed, scheduled, due, announced, used })
}
