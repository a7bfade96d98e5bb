//! Between the many who tell and the one who writes: bounded, and nothing in it is ever dropped. Who finds it full waits.

use super::Head;
use super::line::{Event, SealKey};
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

/// Most that waits to be written.
const CAPACITY: usize = 8192;
/// Most that is taken at once.
const BATCH: usize = 1024;

/// What the writer is told.
pub enum Item {
    Event(Box<Event>),
    /// Seal from now on.
    Key(SealKey),
    /// Seal, make durable, and say where the log is.
    Checkpoint(Sender<Head>),
}

#[derive(Default)]
struct Inner {
    items: VecDeque<Item>,
    closing: bool,
    /// The writer has gone: nobody waits for it any more.
    ended: bool,
    refusal: Option<String>,
}

/// The queue, and what the writer says of itself.
#[derive(Default)]
pub struct Queue {
    inner: Mutex<Inner>,
    filled: Condvar,
    room: Condvar,
    refusing: AtomicBool,
    written: AtomicU64,
    lost: AtomicU64,
}

/// What the writer takes.
pub struct Batch {
    pub items: Vec<Item>,
    /// There will be no more.
    pub closing: bool,
}

impl Queue {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `item` in, and waits for room if there is none. What comes after the end is lost.
    pub fn push(&self, item: Item) {
        let mut q = self.inner.lock();
        while q.items.len() >= CAPACITY && !q.ended {
            self.room.wait(&mut q);
        }
        if q.ended {
            return;
        }
        q.items.push_back(item);
        drop(q);
        self.filled.notify_one();
    }

    /// Takes some of what there is, in order. Waits for something, or for the end, at most `patience`. With `none`, takes
    /// nothing before the end, but waits.
    pub fn take(&self, patience: Option<Duration>, none: bool) -> Batch {
        let mut q = self.inner.lock();
        let idle = |q: &Inner| (none || q.items.is_empty()) && !q.closing;
        match patience {
            Some(p) => drop(self.filled.wait_while_for(&mut q, |q| idle(q), p)),
            None => self.filled.wait_while(&mut q, |q| idle(q)),
        }
        let closing = q.closing;
        let n = match (none, closing) {
            (_, true) => q.items.len(),
            (true, false) => 0,
            (false, false) => q.items.len().min(BATCH),
        };
        let items = q.items.drain(..n).collect();
        drop(q);
        self.room.notify_all();
        Batch { items, closing }
    }

    /// Nothing comes after what is in the queue.
    pub fn close(&self) {
        self.inner.lock().closing = true;
        self.filled.notify_one();
    }

    /// The writer has gone.
    pub fn end(&self) {
        let mut q = self.inner.lock();
        q.ended = true;
        q.items.clear();
        drop(q);
        self.room.notify_all();
    }

    /// Says why no key may be used, or that they may.
    pub fn refuse(&self, why: Option<String>) {
        let mut q = self.inner.lock();
        self.refusing.store(why.is_some(), Ordering::Release);
        q.refusal = why;
    }

    /// Why no key may be used.
    pub fn refusal(&self) -> Option<String> {
        if self.refusing.load(Ordering::Acquire) { self.inner.lock().refusal.clone() } else { None }
    }

    /// More records were written, more events lost.
    pub fn count(&self, written: u64, lost: u64) {
        self.written.fetch_add(written, Ordering::Relaxed);
        self.lost.fetch_add(lost, Ordering::Relaxed);
    }

    /// Records written, events lost.
    pub fn counts(&self) -> (u64, u64) {
        (self.written.load(Ordering::Relaxed), self.lost.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::audit::line::Fields;

    fn event() -> Item {
        Item::Event(Box::new(Event::now("x", Fields::default())))
    }

    #[test]
    fn whoever_finds_it_full_waits_and_nothing_is_dropped() {
        let q = Queue::new();
        let n = CAPACITY + 100;
        std::thread::scope(|s| {
            s.spawn(|| {
                for _ in 0..n {
                    q.push(event());
                }
                q.close();
            });
            while q.inner.lock().items.len() < CAPACITY {
                std::thread::yield_now();
            }
            assert_eq!(q.inner.lock().items.len(), CAPACITY);
            assert_eq!(q.take(None, false).items.len(), BATCH);
            let mut taken = BATCH;
            loop {
                let b = q.take(None, false);
                taken += b.items.len();
                if b.closing {
                    break;
                }
            }
            assert_eq!(taken, n);
        });
    }

    #[test]
    fn nobody_waits_for_a_writer_that_has_gone() {
        let q = Queue::new();
        for _ in 0..CAPACITY {
            q.push(event());
        }
        std::thread::scope(|s| {
            let waiting = s.spawn(|| q.push(event()));
            q.end();
            waiting.join().unwrap();
        });
        q.push(event());
        assert!(q.inner.lock().items.is_empty());
    }

    #[test]
    fn a_writer_in_trouble_takes_nothing_until_the_end() {
        let q = Queue::new();
        q.push(event());
        assert!(q.take(Some(Duration::ZERO), true).items.is_empty());
        q.close();
        let b = q.take(None, true);
        assert!(b.closing && b.items.len() == 1);
    }

    #[test]
    fn a_refusal_is_told_until_it_is_over() {
        let q = Queue::new();
        assert_eq!(q.refusal(), None);
        q.refuse(Some("no space".into()));
        assert_eq!(q.refusal().as_deref(), Some("no space"));
        q.refuse(None);
        assert_eq!(q.refusal(), None);
    }
}
