//! Unwraps the keys of files that are likely to be opened next.

use super::pattern::{Listing, Run};
use super::{Job, leave};
use crate::backing::{Access, Backing, Kind};
use crate::store::header::{self, Source};
use crate::store::keys::KekKind;
use crate::store::open::Store;
use crate::store::shared::Shared;
use crate::store::{Node, Result};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Directories in which something is remembered.
const DIRS_MAX: usize = 8;
/// Files of a directory that is looked at.
const FILES_MAX: usize = 20_000;
/// How long it is remembered what was opened last.
const AGE_MAX: Duration = Duration::from_secs(30);

/// What is known of the opens in a directory.
enum Seen {
    /// One that needed a call.
    One(Arc<[u8]>),
    Run(Box<Run>),
    /// Too many files, or none in any order: not looked at again for a while.
    Nothing,
}

/// Directories in which files were opened lately, the latest last.
#[derive(Default)]
pub(super) struct Directories(Vec<(u64, Instant, Seen)>);

impl Directories {
    /// Takes out what is known of a directory; it is put back changed.
    fn take(&mut self, dir: u64, now: Instant) -> Option<Seen> {
        self.0.retain(|(_, at, _)| now.saturating_duration_since(*at) < AGE_MAX);
        let i = self.0.iter().position(|(d, ..)| *d == dir)?;
        Some(self.0.remove(i).2)
    }

    fn put(&mut self, dir: u64, now: Instant, seen: Seen) {
        if self.0.len() >= DIRS_MAX {
            self.0.remove(0);
        }
        self.0.push((dir, now, seen));
    }

    fn has(&self, dir: u64) -> bool {
        self.0.iter().any(|(d, ..)| *d == dir)
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
        // Keys that are cached are of interest only where files are opened one after another.
        if called || ahead.directories.lock().has(l.parent.id()) {
            ahead.push(Job::Opened { dir: l.parent, name: l.name, called });
        }
    }

    /// Thinks over what comes after the open of `name`, and has it fetched.
    pub(super) fn look_ahead(&self, dir: &Arc<Node<B>>, name: &Arc<[u8]>, called: bool) {
        let ahead = &self.shared().ahead;
        let now = Instant::now();
        let mut directories = ahead.directories.lock();
        let (seen, next) = match directories.take(dir.id(), now) {
            Some(Seen::Nothing) => (Some(Seen::Nothing), Vec::new()),
            Some(Seen::Run(mut run)) => match run.step(name) {
                Some(next) => (Some(Seen::Run(run)), next),
                None => (called.then(|| Seen::One(Arc::clone(name))), Vec::new()),
            },
            Some(Seen::One(first)) if called => match self.run_from(dir, &first, name) {
                Ok(Some(mut run)) => {
                    let next = run.step(name).unwrap_or_default();
                    (Some(Seen::Run(Box::new(run))), next)
                }
                Ok(None) => (Some(Seen::One(Arc::clone(name))), Vec::new()),
                Err(TooMany) => (Some(Seen::Nothing), Vec::new()),
            },
            Some(Seen::One(first)) => (Some(Seen::One(first)), Vec::new()),
            None => (called.then(|| Seen::One(Arc::clone(name))), Vec::new()),
        };
        if let Some(seen) = seen {
            directories.put(dir.id(), now, seen);
        }
        drop(directories);
        for name in next {
            ahead.push(Job::Fetch { dir: Arc::clone(dir), name });
        }
    }

    fn run_from(&self, dir: &Arc<Node<B>>, first: &[u8], second: &[u8]) -> std::result::Result<Option<Run>, TooMany> {
        let entries = self.read_dir(dir).map_err(|_| TooMany)?;
        if entries.len() > FILES_MAX {
            return Err(TooMany);
        }
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
        let Some((pair, _)) = header::read_slots(b, &b.open(&node, Access::Read)?, Source::Cache)? else {
            return Ok(());
        };
        let (_, slot) = pair.authoritative()?;
        if shared.deks.has(&slot.file) || !is_in_a_service(shared, slot.kek) {
            return Ok(());
        }
        let ask = || shared.keys.kek(slot.kek).map_or(Ok(()), |kek| leave(&kek));
        // Whoever has opened the file meanwhile has its key: asked last, for that is a call saved.
        if shared.ahead.has_leave(ask) && shared.keys.may_fetch() && !shared.deks.has(&slot.file) {
            header::prefetch(shared, slot)?;
        }
        Ok(())
    }
}

fn is_in_a_service<B: Backing>(shared: &Shared<B>, kek: crate::format::ids::KekId) -> bool {
    shared.keys.kek(kek).is_ok_and(|k| k.kind() == KekKind::External)
}

/// More files than are looked at, or they cannot be listed.
struct TooMany;
