//! The proof: a fresh scan from disk of both slots of every header. Uses no key and no cache.

use super::control::Cancelled;
use super::destroy::PATHS_MAX;
use super::failures::Failures;
use super::pass::{Item, Visitor};
use super::report::{Counts, Named};
use super::rewrap::{Look, Standing, judge, look};
use super::turns::Turns;
use crate::backing::{Access, Backing, Kind};
use crate::format::damage::Damage;
use crate::format::header::SlotPair;
use crate::format::ids::{KekId, StoreId};
use crate::store::header::{Header, SLOTS_LEN, Source, read_header};
use crate::store::shared::Shared;
use crate::store::{Result as StoreResult, StoreError};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};

/// What a scan found.
#[derive(Debug, Clone, Default)]
pub(super) struct Found {
    pub(super) counts: Counts,
    /// Headers that are not, in both slots, under the target, and for which there is no waiver.
    pub(super) behind: u64,
    /// Paths of those for which there is one.
    pub(super) excused: BTreeSet<String>,
    /// KEKs that a header which is no such, or failed, names.
    pub(super) left: BTreeSet<KekId>,
    /// Files that failed of which it is not known which KEK they need.
    pub(super) unsaid: u64,
    /// Valid slots by the KEK they name.
    pub(super) by_kek: BTreeMap<KekId, u64>,
    /// Headers by each KEK that one of their valid slots names.
    pub(super) headers: BTreeMap<KekId, u64>,
    /// Paths of files with content and no header that nobody waived, as many as a report names; `counts` has all.
    pub(super) no_header: Named<String>,
    /// Headers of which a slot names the KEK that none should.
    pub(super) unwanted: u64,
    /// The first few of them.
    pub(super) unwanted_paths: Vec<String>,
}

impl Found {
    fn note(&mut self, needs: Needs) {
        match needs {
            Needs::Keks(keks) => self.left.extend(keks),
            Needs::Unsaid => self.unsaid += 1,
        }
    }
}

/// Looks at what it is given.
pub(super) struct Verify<'a, B: Backing> {
    pub(super) shared: &'a Shared<B>,
    pub(super) target: KekId,
    pub(super) turns: &'a Turns<'a>,
    /// Paths at which the sweep before failed with something that is waived: a header that is behind there is excused.
    pub(super) excused: &'a BTreeSet<String>,
    /// A KEK of which the files are to be named, if any.
    pub(super) unwanted: Option<KekId>,
    pub(super) failures: &'a Failures,
    pub(super) found: Mutex<Found>,
}

/// What a header that was not judged to be current says of the KEKs it needs.
enum Needs {
    /// These.
    Keks(Vec<KekId>),
    /// It could not be read, or is a newer program's: perhaps any.
    Unsaid,
}

/// What both slots say. A slot that was overwritten or does not add up opens for nobody, whatever it named.
fn needs(pair: &SlotPair, store: StoreId) -> Needs {
    let mut keks = Vec::new();
    for slot in [&pair.a, &pair.b] {
        match slot {
            Ok(s) if s.store == store => keks.push(s.kek),
            Ok(_) | Err(Damage::HeaderMagic | Damage::HeaderUnreadable) => {}
            Err(_) => return Needs::Unsaid,
        }
    }
    Needs::Keks(keks)
}

enum Seen {
    Header(Box<(SlotPair, [u8; SLOTS_LEN])>),
    NoHeader {
        /// The page cache has one: its writeback failed, and it was told to nobody.
        cached: bool,
    },
    Empty,
    Gone,
    /// No regular file, or one that another program keeps under a name like ours.
    NotOurs,
}

impl<B: Backing> Verify<'_, B> {
    fn read(&self, item: &Item<B>, locked: bool) -> StoreResult<Seen> {
        let b = &self.shared.backing;
        let (file, stat) = match look(b, item, Access::Read)? {
            Look::Open { file, stat, .. } => (file, stat),
            Look::Empty => return Ok(Seen::Empty),
            // A listing that does not say of what kind an entry is gives more than files.
            Look::Gone => {
                let is_there = item.node(b).and_then(|node| b.stat(&node)).is_ok_and(|s| s.kind != Kind::File);
                return Ok(if is_there { Seen::NotOurs } else { Seen::Gone });
            }
        };
        // The lock only keeps a header from being seen half made; it is not needed for one that is whole.
        let _lock = locked.then(|| self.shared.inode_locks.exclusive(stat.dev, stat.ino));
        Ok(match read_header(b, &file, Source::Disk)? {
            Header::None => Seen::Empty,
            Header::Zeros if item.reserved => Seen::NotOurs,
            Header::Zeros => {
                let cached = locked.then(|| read_header(b, &file, Source::Cache)).transpose()?;
                let is_whole = |h| matches!(h, Header::Slots(read) if read.0.authoritative().is_ok());
                Seen::NoHeader { cached: cached.is_some_and(is_whole) }
            }
            Header::Slots(read) => match (&read.0.a, &read.0.b) {
                (Err(Damage::HeaderMagic), Err(Damage::HeaderMagic)) if item.reserved => Seen::NotOurs,
                _ => Seen::Header(read),
            },
        })
    }

    fn judge(&self, item: &Item<B>, locked: bool, found: &mut Found, said: &mut Needs) -> StoreResult<()> {
        let (pair, bytes) = match self.read(item, locked)? {
            Seen::Header(read) => *read,
            Seen::NoHeader { .. } if !locked => return self.judge(item, true, found, said),
            Seen::NoHeader { cached } => return self.no_header(item.shown(), cached, found, said),
            Seen::Empty => {
                found.counts.empty += 1;
                return Ok(());
            }
            Seen::Gone => {
                found.counts.vanished += 1;
                return Ok(());
            }
            // Of those that are the store's it says nothing, and that it vanished would spoil a share's proof.
            Seen::NotOurs => {
                found.counts.scanned -= 1;
                return Ok(());
            }
        };
        let store = self.shared.keys.store_id();
        *said = needs(&pair, store);
        let standing = judge(&pair, &bytes, store, self.target)?;
        if standing == Standing::Behind && !locked {
            return self.judge(item, true, found, said);
        }
        let [a, b] = [&pair.a, &pair.b].map(|s| s.as_ref().ok().map(|s| s.kek));
        for kek in a.into_iter().chain(b) {
            *found.by_kek.entry(kek).or_default() += 1;
        }
        for kek in a.into_iter().chain(b.filter(|_| a != b)) {
            *found.headers.entry(kek).or_default() += 1;
        }
        if [&pair.a, &pair.b].into_iter().flatten().any(|slot| Some(slot.kek) == self.unwanted) {
            found.unwanted += 1;
            if found.unwanted_paths.len() < PATHS_MAX {
                found.unwanted_paths.push(item.shown());
            }
        }
        match standing {
            Standing::Current => found.counts.current += 1,
            Standing::Behind => {
                let path = item.shown();
                if self.excused.contains(&path) {
                    found.excused.insert(path);
                } else {
                    found.behind += 1;
                }
                found.note(std::mem::replace(said, Needs::Unsaid));
            }
        }
        Ok(())
    }

    /// No header names a KEK here, so nothing is left undone, and nothing is proved of the file either: it is told. For one
    /// that is waived somebody answers, as for any other that does not open. One that only the page cache has is lost with the
    /// next boot: the next sweep is to write it again.
    fn no_header(&self, path: String, cached: bool, found: &mut Found, said: &mut Needs) -> StoreResult<()> {
        if cached {
            found.behind += 1;
        } else if self.failures.is_waived(&path) {
            *said = Needs::Keks(Vec::new());
            return Err(Damage::HeaderMagic.into());
        }
        found.counts.no_header += 1;
        tracing::warn!(path, "rotation: content without a header");
        found.no_header.add(path);
        Ok(())
    }

    fn one(&self, item: &Item<B>, found: &mut Found) {
        let mut said = Needs::Unsaid;
        let result = match self.judge(item, false, found, &mut said) {
            Err(StoreError::Damage(_)) => self.judge(item, true, found, &mut said),
            other => other,
        };
        if let Err(e) = result {
            found.counts.failed += 1;
            found.note(said);
            self.failures.add(item.shown(), &e);
        }
    }
}

impl<B: Backing> Visitor<B> for Verify<'_, B> {
    fn batch(&self, items: Vec<Item<B>>) -> Result<(), Cancelled> {
        let _at_work = self.turns.at_work();
        let mut found = Found::default();
        let mut end = Ok(());
        for item in items {
            end = self.turns.next(!item.has_moved());
            if end.is_err() {
                break;
            }
            found.counts.scanned += 1;
            self.one(&item, &mut found);
        }
        let mut all = self.found.lock();
        all.counts += found.counts;
        all.behind += found.behind;
        all.excused.extend(found.excused);
        all.left.extend(found.left);
        all.unsaid += found.unsaid;
        all.no_header.extend(found.no_header);
        for (kek, n) in found.by_kek {
            *all.by_kek.entry(kek).or_default() += n;
        }
        for (kek, n) in found.headers {
            *all.headers.entry(kek).or_default() += n;
        }
        all.unwanted += found.unwanted;
        all.unwanted_paths.extend(found.unwanted_paths);
        all.unwanted_paths.truncate(PATHS_MAX);
        end
    }
}
