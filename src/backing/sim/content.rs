//! The bytes of a regular file: as a reader sees them now, as they are surely on the platter, and what may be there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub(super) const PAGE_LEN: usize = 4096;
pub(super) type Page = [u8; PAGE_LEN];

/// Versions remembered of a page written over and over without a sync.
const MOST_VERSIONS: usize = 6;

/// Pages that one call can allocate, so that no test fills the machine's memory.
const MOST_RESERVED: u64 = 1 << 22;

/// What happened to a page since it was last made durable.
#[derive(Debug, Clone)]
enum Event {
    /// It was written: from then on the page may have got to the platter like this.
    Write(Arc<Page>),
    /// `from..to` became zeros by a truncation or a punched hole, with the transaction `seq`.
    Cut { seq: u64, from: usize, to: usize },
}

#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    now: BTreeMap<u64, Arc<Page>>,
    /// Pages allocated, not written.
    reserved: BTreeSet<u64>,
    durable: BTreeMap<u64, Arc<Page>>,
    events: BTreeMap<u64, Vec<Event>>,
    /// Pages whose writeback failed: zeros on the platter, and in the cache as if they were clean.
    unwritten: BTreeSet<u64>,
}

/// The page that byte `offset` is in, and where in it.
fn locate(offset: u64) -> (u64, usize) {
    (offset / PAGE_LEN as u64, (offset % PAGE_LEN as u64) as usize)
}

impl Content {
    /// A file with these pages, all of them durable.
    pub(super) fn durable(pages: BTreeMap<u64, Arc<Page>>) -> Self {
        Self { now: pages.clone(), durable: pages, ..Self::default() }
    }

    /// Pages that take up space.
    pub(super) fn allocated(&self) -> u64 {
        (self.now.len() + self.reserved.len()) as u64
    }

    /// Fills `buf` from `offset`; pages that are not there are zeros.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) {
        let mut done = 0;
        while done < buf.len() {
            let (index, at) = locate(offset + done as u64);
            let len = (PAGE_LEN - at).min(buf.len() - done);
            let out = &mut buf[done..done + len];
            match self.now.get(&index) {
                Some(page) => out.copy_from_slice(&page[at..at + len]),
                None => out.fill(0),
            }
            done += len;
        }
    }

    /// Makes of what was read, at most a page at its beginning, what a reader past the cache sees. Returns its length.
    pub(super) fn as_on_platter(&self, offset: u64, read: &mut [u8]) -> usize {
        if self.unwritten.contains(&locate(offset).0) {
            read.fill(0);
        }
        read.len()
    }

    /// The page of `offset` is lost on its way to the platter, and whoever waits for it hears nothing.
    pub(super) fn fail_writeback(&mut self, offset: u64) {
        let (index, _) = locate(offset);
        self.durable.remove(&index);
        self.events.remove(&index);
        self.unwritten.insert(index);
    }

    /// Whether writing to the page of `offset` takes no new space.
    pub(super) fn has_space_at(&self, offset: u64) -> bool {
        let (index, _) = locate(offset);
        self.now.contains_key(&index) || self.reserved.contains(&index)
    }

    /// Writes `data`, which must not cross a page, at `offset`.
    pub(super) fn write_in_page(&mut self, offset: u64, data: &[u8]) {
        let (index, at) = locate(offset);
        self.reserved.remove(&index);
        self.unwritten.remove(&index);
        let page = self.now.entry(index).or_insert_with(|| Arc::new([0; PAGE_LEN]));
        Arc::make_mut(page)[at..at + data.len()].copy_from_slice(data);
        let events = self.events.entry(index).or_default();
        events.push(Event::Write(Arc::clone(page)));
        forget_versions(events);
    }

    /// Allocates the pages of `from..to`, at most `room` of them; returns whether that was enough.
    pub(super) fn reserve(&mut self, from: u64, to: u64, room: u64) -> bool {
        let pages = from / PAGE_LEN as u64..to.div_ceil(PAGE_LEN as u64);
        if pages.end - pages.start > MOST_RESERVED {
            return false;
        }
        let missing: Vec<u64> = pages.filter(|i| !self.now.contains_key(i) && !self.reserved.contains(i)).collect();
        let enough = missing.len() as u64 <= room;
        if enough {
            self.reserved.extend(missing);
        }
        enough
    }

    /// Zeros and frees `from..to` as part of the transaction `seq`.
    pub(super) fn cut(&mut self, from: u64, to: u64, seq: u64) {
        if from >= to {
            return;
        }
        let (first, first_at) = locate(from);
        let (last, last_at) = locate(to - 1);
        let touched: BTreeSet<u64> = [
            self.now.range(first..=last).map(|(i, _)| *i).collect::<Vec<_>>(),
            self.durable.range(first..=last).map(|(i, _)| *i).collect(),
            self.events.range(first..=last).map(|(i, _)| *i).collect(),
        ]
        .concat()
        .into_iter()
        .collect();
        for index in touched {
            let from = if index == first { first_at } else { 0 };
            let to = if index == last { last_at + 1 } else { PAGE_LEN };
            if to - from == PAGE_LEN {
                self.now.remove(&index);
            } else if let Some(page) = self.now.get_mut(&index) {
                Arc::make_mut(page)[from..to].fill(0);
            }
            self.unwritten.remove(&index);
            self.events.entry(index).or_default().push(Event::Cut { seq, from, to });
        }
        self.reserved.retain(|i| *i < first || *i > last || (*i == first && first_at > 0));
    }

    /// First byte at or after `offset` in a written page.
    pub(super) fn next_data(&self, offset: u64) -> Option<u64> {
        let (index, _) = locate(offset);
        self.now.range(index..).next().map(|(i, _)| offset.max(i * PAGE_LEN as u64))
    }

    /// Everything written is on the platter.
    pub(super) fn settle(&mut self) {
        for (index, _) in std::mem::take(&mut self.events) {
            match self.now.get(&index) {
                Some(page) => self.durable.insert(index, Arc::clone(page)),
                None => self.durable.remove(&index),
            };
        }
    }

    /// The last name and handle are gone: the space is free. What is on the platter stays there until that is durable.
    pub(super) fn release(&mut self) {
        self.now.clear();
        self.reserved.clear();
    }

    /// Pages that were or may be on the platter.
    pub(super) fn platter_pages(&self) -> BTreeSet<u64> {
        self.durable.keys().chain(self.events.keys()).copied().collect()
    }

    /// What the platter may hold of a page when the transactions for which `lost` holds never happened: the durable
    /// version first, the newest last.
    pub(super) fn candidates(&self, index: u64, lost: impl Fn(u64) -> bool) -> Vec<Option<Arc<Page>>> {
        let mut all = vec![self.durable.get(&index).cloned()];
        for event in self.events.get(&index).into_iter().flatten() {
            match event {
                Event::Write(page) => all.push(Some(Arc::clone(page))),
                // What was written after the space was given up lies elsewhere, unreachable without the transaction.
                Event::Cut { seq, from, to } if lost(*seq) => {
                    if to - from == PAGE_LEN {
                        break;
                    }
                }
                Event::Cut { from: 0, to: PAGE_LEN, .. } => all = vec![None],
                Event::Cut { from, to, .. } => {
                    for page in all.iter_mut().flatten() {
                        Arc::make_mut(page)[*from..*to].fill(0);
                    }
                }
            }
        }
        all
    }

    /// Changes bytes behind everyone's back, now and on the platter.
    pub(super) fn tamper(&mut self, offset: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let (index, at) = locate(offset + done as u64);
            let len = (PAGE_LEN - at).min(data.len() - done);
            let page = self.now.entry(index).or_insert_with(|| Arc::new([0; PAGE_LEN]));
            Arc::make_mut(page)[at..at + len].copy_from_slice(&data[done..done + len]);
            self.durable.insert(index, Arc::clone(page));
            self.events.remove(&index);
            self.unwritten.remove(&index);
            done += len;
        }
    }
}

/// Drops the oldest unsynced version once there are too many. The newest always stays.
fn forget_versions(events: &mut Vec<Event>) {
    let is_write = |e: &Event| matches!(e, Event::Write(_));
    if events.iter().filter(|e| is_write(e)).count() > MOST_VERSIONS
        && let Some(oldest) = events.iter().position(is_write)
    {
        events.remove(oldest);
    }
}
