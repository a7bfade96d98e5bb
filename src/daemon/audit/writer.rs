//! The thread that writes: takes what is told in batches, appends it to the file, seals and syncs it, follows the file when
//! it is rotated, and keeps account of what the disk did not take.

use super::chain::{self, CONTINUED, GAP, SEAL, SEAL_EVERY, STARTED};
use super::file::{LogFile, Look};
use super::line::{Event, Fields, LINE_MAX, SealKey, text};
use super::outbox::{Outbox, Weight};
use super::queue::{Batch, Item, Queue};
use super::{Head, OnError, Options};
use crate::daemon::fault::{Fault, FaultKind, plain};
use crate::format::ids::StoreId;
use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

/// A mount goes on with a log that was there.
const OPENED: &str = "opened";
/// How often a disk that refused is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often trouble is told in the daemon's own log.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// The log's writer.
pub struct Writer {
    file: LogFile,
    path: PathBuf,
    store: StoreId,
    on_error: OnError,
    fsync: Duration,
    queue: Arc<Queue>,
    key: Option<SealKey>,
    outbox: Outbox,
    /// Events that wait to be put into the outbox, and those in it.
    todo: VecDeque<Event>,
    in_flight: VecDeque<Event>,
    /// Events that were lost and not told of yet.
    lost: u64,
    /// Records since the last seal.
    unsealed: u64,
    want_seal: bool,
    want_sync: bool,
    /// Since when something has been written that is not durable.
    dirty: Option<Instant>,
    trouble: Option<String>,
    said: Option<Instant>,
}

impl Writer {
    /// Opens the log at `path` and brings it into order: what a crash has torn is accounted for, and a first record is
    /// written.
    ///
    /// # Errors
    /// See [`super::Log::open`].
    pub fn open(path: &Path, store: StoreId, o: &Options, queue: Arc<Queue>) -> Result<Self, Fault> {
        let fail = |what: &str, e: &io::Error| match e.kind() {
            io::ErrorKind::WouldBlock => Fault::new(
                FaultKind::Locked,
                format!(
                    "audit log {} is being written by another process: name another one for this (audit_log in a file for \
                     --config)",
                    path.display()
                ),
            ),
            _ => Fault::io(what, path, e),
        };
        let mut file = LogFile::open(path).map_err(|e| fail("open the audit log", &e))?;
        let most = (chain::TORN_MAX + LINE_MAX) as u64;
        let (last, all) = file.last(most).map_err(|e| fail("read the audit log", &e))?;
        let refuse = |why: String| {
            let text =
                format!("audit log {} cannot be gone on with: {why}; move it away or name another", path.display());
            Fault::new(FaultKind::Other, text)
        };
        let tail = chain::tail(&last, all).map_err(|e| refuse(e.to_string()))?;
        if let Some(other) = tail.store.filter(|s| *s != store) {
            return Err(refuse(format!("it is that of store {other}")));
        }
        let mut w = Self {
            file,
            path: path.to_owned(),
            store,
            on_error: o.on_error,
            fsync: o.fsync,
            queue,
            key: None,
            outbox: Outbox::new(tail.chain),
            todo: VecDeque::new(),
            in_flight: VecDeque::new(),
            lost: 0,
            unsealed: 0,
            want_seal: false,
            want_sync: true,
            dirty: None,
            trouble: None,
            said: None,
        };
        if tail.unfinished {
            w.outbox.end_line();
        }
        if let Some(torn) = &tail.torn {
            tracing::warn!("audit log {} ends in {} bytes that a crash has torn", path.display(), torn.len);
            let mut c = w.outbox.chain();
            let line = c.recover(torn, store);
            w.outbox.push(&line, c, Weight::OWN);
        }
        if !last.is_empty() {
            w.own(OPENED);
        }
        w.write().map_err(|e| fail("write the audit log", &e))?;
        Ok(w)
    }

    /// Writes until the queue is closed.
    pub fn run(mut self) {
        loop {
            // What waits already comes first; the queue fills up meanwhile, and those who tell wait.
            let Batch { items, closing } = self.queue.take(self.patience(Instant::now()), !self.todo.is_empty());
            self.want_seal |= closing;
            self.want_sync |= closing;
            self.step(items);
            if closing {
                break;
            }
        }
        if let Some(why) = &self.trouble {
            let n = self.lost + self.todo.len() as u64;
            tracing::error!("audit log {}: {n} events could not be written: {why}", self.path.display());
        }
    }

    /// How long to wait for something to write; `None`: as long as it takes.
    fn patience(&self, now: Instant) -> Option<Duration> {
        match (&self.trouble, self.dirty) {
            (Some(_), _) => Some(RETRY),
            (None, Some(since)) => Some((since + self.fsync).saturating_duration_since(now)),
            (None, None) => None,
        }
    }

    fn step(&mut self, items: Vec<Item>) {
        let mut asked: Vec<Sender<Head>> = Vec::new();
        for i in items {
            match i {
                Item::Event(e) => self.todo.push_back(*e),
                Item::Key(k) => {
                    self.key = Some(k);
                    self.want_seal = true;
                }
                Item::Checkpoint(tell) => {
                    self.want_seal = true;
                    self.want_sync = true;
                    asked.push(tell);
                }
            }
        }
        match self.write() {
            Ok(()) => self.well(),
            Err(e) => self.failed(&e),
        }
        for tell in asked {
            // Who asked may have gone.
            let _ = tell.send(Head { chain: self.outbox.on_disk(), trouble: self.trouble.clone() });
        }
    }

    /// Writes all that waits.
    fn write(&mut self) -> io::Result<()> {
        // A line that was begun is finished in the file it was begun in.
        self.flush()?;
        self.follow();
        self.fill();
        self.flush()?;
        let due = self.dirty.is_some_and(|since| since.elapsed() >= self.fsync);
        if due || (self.want_sync && self.dirty.is_some()) {
            self.file.sync()?;
            self.dirty = None;
        }
        self.want_sync = false;
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.outbox.is_empty() {
            match self.file.append(self.outbox.rest()) {
                Ok(n) => {
                    let done = self.outbox.wrote(n);
                    self.queue.count(done.records, 0);
                    self.in_flight.drain(..(done.events as usize).min(self.in_flight.len()));
                    self.dirty.get_or_insert_with(Instant::now);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Goes on in a new file if the present one was moved away. If there can be none, goes on in the old one.
    fn follow(&mut self) {
        let moved = match self.file.look() {
            Ok(Look::Same | Look::Emptied) => return,
            Ok(Look::Moved) => self.file.sync().and_then(|()| self.file.next()),
            Err(e) => Err(e),
        };
        match moved {
            Ok(next) => {
                self.file = next;
                self.dirty = None;
                self.want_seal = true;
            }
            Err(e) => self.say(&format!("goes on in the file that was moved away: {}", plain(&e))),
        }
    }

    /// Puts everything that waits into the outbox.
    fn fill(&mut self) {
        if self.lost > 0 {
            let fields = Fields { lost: Some(self.lost), ..Fields::default() };
            let weight = Weight::gap(std::mem::take(&mut self.lost));
            self.record(&Event::now(GAP, fields), weight);
        }
        while let Some(e) = self.todo.pop_front() {
            self.record(&e, Weight::EVENT);
            self.in_flight.push_back(e);
            if self.unsealed + 1 >= SEAL_EVERY {
                self.seal();
            }
        }
        // An empty file gets its first record at once, so that the chain's link is there.
        if self.is_blank() {
            self.begin();
        }
        if std::mem::take(&mut self.want_seal) {
            self.seal();
        }
    }

    /// Nothing is in the file, nor on its way there.
    fn is_blank(&self) -> bool {
        self.file.size() == 0 && self.outbox.is_empty()
    }

    /// The first record of a file.
    fn begin(&mut self) {
        let first = if self.outbox.chain() == chain::Chain::EMPTY { STARTED } else { CONTINUED };
        self.own(first);
    }

    /// A record about the log itself.
    fn own(&mut self, event: &'static str) {
        let about = Some(text(concat!("envelopefs ", env!("CARGO_PKG_VERSION"))));
        let uid = Some(crate::daemon::process::uid());
        let fields = Fields { about, pid: Some(std::process::id()), uid, ..Fields::default() };
        self.append(&Event::now(event, fields), Weight::OWN, false);
    }

    fn record(&mut self, e: &Event, weight: Weight) {
        if self.is_blank() {
            self.begin();
        }
        self.append(e, weight, false);
    }

    fn seal(&mut self) {
        if self.key.is_none() || self.unsealed == 0 {
            return;
        }
        self.append(&Event::now(SEAL, Fields::default()), Weight::OWN, true);
        self.unsealed = 0;
        self.want_sync = true;
    }

    fn append(&mut self, e: &Event, weight: Weight, sealed: bool) {
        let mut c = self.outbox.chain();
        let line = c.append(e, self.store, self.key.as_ref().filter(|_| sealed));
        self.outbox.push(&line, c, weight);
        self.unsealed += 1;
    }

    /// The disk takes everything.
    fn well(&mut self) {
        if self.trouble.take().is_some() {
            tracing::warn!("audit log {} can be written again", self.path.display());
            self.queue.refuse(None);
            self.said = None;
        }
    }

    /// The disk does not take everything.
    fn failed(&mut self, e: &io::Error) {
        let dropped = self.outbox.give_up();
        self.lost += dropped.lost;
        let at = self.in_flight.len().saturating_sub(dropped.events as usize);
        let back = self.in_flight.split_off(at);
        // Perhaps a seal was among them.
        self.unsealed = self.unsealed.max(1);
        self.want_seal = true;
        let why = plain(e);
        let consequence = match self.on_error {
            OnError::Continue => {
                // Also what did not get as far as the outbox, because a line that was begun is still in it.
                let lost = (back.len() + self.todo.len()) as u64;
                self.todo.clear();
                self.lost += lost;
                self.queue.count(0, lost);
                "events are lost"
            }
            OnError::Stop => {
                back.into_iter().rev().for_each(|e| self.todo.push_front(e));
                self.queue.refuse(Some(format!("the audit log {} cannot be written: {why}", self.path.display())));
                "no key is used until it can"
            }
        };
        self.say(&format!("{why}; {consequence}"));
        self.trouble = Some(why);
    }

    fn say(&mut self, what: &str) {
        if self.said.is_none_or(|s| s.elapsed() >= SAY_EVERY) {
            self.said = Some(Instant::now());
            tracing::error!("audit log {}: {what}", self.path.display());
        }
    }
}

impl Drop for Writer {
    /// Whatever it ended for, nobody waits for it.
    fn drop(&mut self) {
        self.queue.end();
    }
}
