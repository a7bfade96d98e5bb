//! Unwraps the keys of files that are likely to be opened next.

use super::pattern::{Listing, Run};
use super::{Job, leave};
use crate::backing::{Access, Backing, Kind};
use crate::format::header::SlotPair;
use crate::format::ids::FileId;
use crate::store::header::{self, Source};
use crate::store::keys::KekKind;
use crate::store::open::Store;
use crate::store::shared::Shared;
use crate::store::{Node, Result};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Directories in which something is remembered.
const DIRS_MAX: usize = 8;
/// Entries of a directory that is looked at, in the backing directory. Of a larger one no more are read.
const ENTRIES_MAX: usize = 20_000;
/// How long it is remembered what was opened last.
const AGE_MAX: Duration = Duration::from_secs(30);

/// How often a directory is listed to see an order in its opens: those in none must not have it listed each time.
const LIST_AGAIN: Duration = Duration::from_secs(2);

/// What is known of the opens in a directory.
enum Seen {
    /// One that needed a call, and when the directory was listed last.
    One(Arc<[u8]>, Option<Instant>),
    /// Somebody is listing it. What is opened meanwhile is passed over: a run allows for that.
    Listing,
    Run(Box<Run>, Instant),
    /// Too many files: not looked at again for a while.
    Nothing,
}

/// What an open asks for.
enum Step {
    /// These files' keys.
    Fetch(Vec<Arc<[u8]>>),
    /// To find out whether it follows that of the file given here, see [`Directories::listed`].
    List(Arc<[u8]>),
}

/// A directory, when an open in it changed something last, and what is known.
struct Directory(u64, Instant, Seen);

/// Directories in which files were opened lately, the latest last.
#[derive(Default)]
pub(super) struct Directories(Vec<Directory>);

impl Directories {
    /// `name` was opened in `dir`; `called`: its key had to be asked for.
    fn opened(&mut self, dir: u64, name: &Arc<[u8]>, called: bool, now: Instant) -> Step {
        self.0.retain(|Directory(_, at, _)| now.saturating_duration_since(*at) < AGE_MAX);
        let one = |listed| called.then(|| Seen::One(Arc::clone(name), listed));
        let mut step = Step::Fetch(Vec::new());
        let found = self.0.iter().position(|d| d.0 == dir).map(|i| self.0.remove(i));
        let seen = match found {
            Some(d @ Directory(_, _, Seen::Nothing | Seen::Listing)) => {
                // At its old time: opens do not renew it.
                self.0.push(d);
                return step;
            }
            Some(Directory(_, _, Seen::Run(mut run, listed))) => match run.step(name) {
                Some(next) => {
                    step = Step::Fetch(next);
                    Some(Seen::Run(run, listed))
                }
                None => one(Some(listed)),
            },
            Some(Directory(_, _, Seen::One(first, listed))) if called => {
                if listed.is_some_and(|t| now.saturating_duration_since(t) < LIST_AGAIN) {
                    one(listed)
                } else {
                    step = Step::List(first);
                    Some(Seen::Listing)
                }
            }
            Some(Directory(_, _, seen @ Seen::One(..))) => Some(seen),
            None => one(None),
        };
        if let Some(seen) = seen {
            self.put(dir, now, seen);
        }
        step
    }

    /// The directory was listed for the open of `name`: the run that it begins, if it does. Returns the files whose keys
    /// to fetch: none if it was forgotten meanwhile.
    fn listed(
        &mut self,
        dir: u64,
        name: &Arc<[u8]>,
        run: std::result::Result<Option<Run>, TooMany>,
        now: Instant,
    ) -> Vec<Arc<[u8]>> {
        let is_ours = |d: &Directory| d.0 == dir && matches!(d.2, Seen::Listing);
        let Some(i) = self.0.iter().position(is_ours) else { return Vec::new() };
        self.0.remove(i);
        let mut next = Vec::new();
        let seen = match run {
            Ok(Some(mut run)) => {
                next = run.step(name).unwrap_or_default();
                Seen::Run(Box::new(run), now)
            }
            Ok(None) => Seen::One(Arc::clone(name), Some(now)),
            Err(TooMany) => Seen::Nothing,
        };
        self.put(dir, now, seen);
        next
    }

    fn put(&mut self, dir: u64, now: Instant, seen: Seen) {
        if self.0.len() >= DIRS_MAX {
            self.0.remove(0);
        }
        self.0.push(Directory(dir, now, seen));
    }

    /// Whether files are being opened one after another in it.
    fn has_run(&self, dir: u64) -> bool {
        self.0.iter().any(|d| d.0 == dir && matches!(d.2, Seen::Run(..)))
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

impl<B: Backing> Store<B> {
    /// A file was opened; `called`: its key had to be asked for.
    pub(in crate::store) fn note_open(&self, n: &Arc<Node<B>>, called: bool) {
        let ahead = &self.shared().ahead;
        if ahead.window() == 0 || !self.shared().keys.calls_a_service() {
            return;
        }
        let Some(l) = n.location() else { return };
        // Keys that are cached are of interest only where files are opened one after another. That one of them is missed
        // is no harm; that an open waits here would be.
        let in_a_run = || ahead.directories.try_lock().is_some_and(|d| d.has_run(l.parent.id()));
        if called || in_a_run() {
            ahead.push(Job::Opened { dir: l.parent, name: l.name, called });
        }
    }

    /// Thinks over what comes after the open of `name`, and has it fetched.
    pub(super) fn look_ahead(&self, dir: &Arc<Node<B>>, name: &Arc<[u8]>, called: bool) {
        let ahead = &self.shared().ahead;
        let step = ahead.directories.lock().opened(dir.id(), name, called, Instant::now());
        let next = match step {
            Step::Fetch(next) => next,
            Step::List(first) => {
                // This may take long, so nothing is held.
                let run = self.run_from(dir, &first, name);
                ahead.directories.lock().listed(dir.id(), name, run, Instant::now())
            }
        };
        for name in next {
            ahead.push(Job::Fetch { dir: Arc::clone(dir), name });
        }
    }

    fn run_from(&self, dir: &Arc<Node<B>>, first: &[u8], second: &[u8]) -> std::result::Result<Option<Run>, TooMany> {
        let Ok(Some((entries, _))) = self.list_up_to(dir, ENTRIES_MAX) else { return Err(TooMany) };
        let files = entries.into_iter().filter(|e| e.kind == Kind::File).map(|e| (e.name, e.backing)).collect();
        Ok(Run::begin(Listing::new(files), first, second, self.shared().ahead.window()))
    }

    /// Unwraps the key of one file into the cache, if it is in a service and not there. A failure costs nobody anything:
    /// whoever opens the file asks himself.
    pub(super) fn fetch(&self, dir: &Arc<Node<B>>, name: &[u8]) {
        if let Err(e) = self.try_fetch(dir, name) {
            tracing::debug!("no key was unwrapped ahead of need: {e}");
        }
    }

    fn try_fetch(&self, dir: &Arc<Node<B>>, name: &[u8]) -> Result<()> {
        let (shared, b) = (self.shared(), self.backing());
        if !shared.keys.may_fetch() {
            return Ok(());
        }
        let node = b.lookup(&*dir.fd(b)?, name)?;
        if b.stat(&node)?.kind != Kind::File {
            return Ok(());
        }
        let file = b.open(&node, Access::Read)?;
        let Some((pair, _)) = header::read_slots(b, &file, Source::Cache)? else { return Ok(()) };
        let (_, slot) = pair.authoritative()?;
        if shared.deks.has(&slot.file) || !is_in_a_service(shared, slot.kek) {
            return Ok(());
        }
        let ask = || shared.keys.kek(slot.kek).map_or(Ok(()), |kek| leave(&kek));
        // Whoever has opened the file meanwhile has its key: asked last, for that is a call saved.
        if shared.ahead.has_leave(ask) && shared.keys.may_fetch() && !shared.deks.has(&slot.file) {
            header::prefetch(shared, slot)?;
            // The key of a file that was removed or begun anew meanwhile is nobody's any more.
            if !still_has(b, &file, slot.file) {
                shared.deks.remove(&slot.file);
            }
        }
        Ok(())
    }
}

fn is_in_a_service<B: Backing>(shared: &Shared<B>, kek: crate::format::ids::KekId) -> bool {
    shared.keys.kek(kek).is_ok_and(|k| k.kind() == KekKind::External)
}

/// Whether a backing file has a name, and the header of `id`.
fn still_has<B: Backing>(b: &B, file: &B::File, id: FileId) -> bool {
    let is_linked = b.stat_file(file).is_ok_and(|st| st.nlink > 0);
    let same = |pair: &SlotPair| pair.authoritative().is_ok_and(|(_, slot)| slot.file == id);
    is_linked && header::read_slots(b, file, Source::Cache).is_ok_and(|read| read.is_some_and(|(pair, _)| same(&pair)))
}

/// More entries than are looked at, or they cannot be listed.
struct TooMany;

#[cfg(test)]
mod tests {
    use super::*;

    const DIR: u64 = 7;

    fn name(n: usize) -> Arc<[u8]> {
        format!("f{n:03}").into_bytes().into()
    }

    fn run(first: usize, second: usize) -> Option<Run> {
        let files = (0..100).map(|n| (name(n).to_vec(), name(n).to_vec())).collect();
        Run::begin(Listing::new(files), &name(first), &name(second), 32)
    }

    fn lists(step: &Step) -> bool {
        matches!(step, Step::List(_))
    }

    #[test]
    fn opens_in_no_order_have_a_directory_listed_every_two_seconds_at_most() {
        let (t, mut d) = (Instant::now(), Directories::default());
        let mut listings = 0;
        for ms in (0..10_000).step_by(10) {
            let (at, file) = (t + Duration::from_millis(ms), name((ms as usize * 37) % 97));
            if lists(&d.opened(DIR, &file, true, at)) {
                listings += 1;
                assert!(d.listed(DIR, &file, Ok(None), at).is_empty());
            }
        }
        assert_eq!(listings, 5);
    }

    #[test]
    fn a_run_that_ends_and_begins_elsewhere_does_not_have_it_listed_again_at_once() {
        let (t, mut d) = (Instant::now(), Directories::default());
        assert!(!lists(&d.opened(DIR, &name(1), true, t)));
        assert!(lists(&d.opened(DIR, &name(2), true, t)));
        assert_eq!(d.listed(DIR, &name(2), Ok(run(1, 2)), t).len(), 4);
        assert!(d.has_run(DIR));
        assert!(!lists(&d.opened(DIR, &name(90), true, t)), "the run ends");
        assert!(!d.has_run(DIR) && !lists(&d.opened(DIR, &name(91), true, t)));
        assert!(lists(&d.opened(DIR, &name(92), true, t + LIST_AGAIN)));
    }

    #[test]
    fn a_directory_with_too_many_files_is_looked_at_again_however_much_is_opened_in_it() {
        let (t, mut d) = (Instant::now(), Directories::default());
        d.opened(DIR, &name(1), true, t);
        assert!(lists(&d.opened(DIR, &name(2), true, t)));
        d.listed(DIR, &name(2), Err(TooMany), t);
        let opens = (0..40).filter(|s| lists(&d.opened(DIR, &name(3), true, t + Duration::from_secs(*s))));
        assert_eq!(opens.count(), 1, "after half a minute");
    }

    #[test]
    fn what_is_opened_while_it_is_listed_is_passed_over_and_what_was_forgotten_stays_so() {
        let (t, mut d) = (Instant::now(), Directories::default());
        d.opened(DIR, &name(1), true, t);
        assert!(lists(&d.opened(DIR, &name(2), true, t)));
        assert!(!lists(&d.opened(DIR, &name(3), true, t)), "one lists it");
        assert_eq!(d.listed(DIR, &name(2), Ok(run(1, 2)), t).len(), 4);
        assert!(matches!(d.opened(DIR, &name(4), true, t), Step::Fetch(next) if !next.is_empty()));
        let mut d = Directories::default();
        d.opened(DIR, &name(1), true, t);
        d.opened(DIR, &name(2), true, t);
        d.clear();
        assert!(d.listed(DIR, &name(2), Ok(run(1, 2)), t).is_empty() && !d.has_run(DIR));
    }
}
