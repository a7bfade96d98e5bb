//! One barrier at a time for all workers of a sweep, shared by those that wait for it.
//!
//! Until syncfs(2) returns it waits for all that the disk is writing, also for another syncfs. Workers that each make
//! their own come out of it together, then work together, and leave the disk idle meanwhile. Here whoever comes while one
//! is under way waits for its end and shares the next, which begins at once: some work while the disk writes for others.
//!
//! The kernel tells a failed write to one syncfs only, and then calls the page clean. So a barrier that fails counts for
//! every batch of which something may have been written before it ended, whichever barrier that batch waits for.

use crate::backing::Backing;
use parking_lot::{Condvar, Mutex};

/// The barriers of a sweep.
#[derive(Debug, Default)]
pub(super) struct Barrier {
    queue: Mutex<Queue>,
    ended: Condvar,
}

/// A moment before the first write of a batch: the number of the last barrier that had ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Since(u64);

/// Who waits for which barrier; they are numbered from 1. Decides only.
#[derive(Debug, Default)]
struct Queue {
    begun: u64,
    running: bool,
    /// The last that failed.
    failed: u64,
}

/// What to do about a barrier that is waited for.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// It has ended. Whether all since then did so well.
    Ended(bool),
    /// Another one is under way.
    Wait,
    /// It is the caller's to make, who says [`Queue::end`] afterwards.
    Make,
}

impl Queue {
    fn ended(&self) -> u64 {
        self.begun - u64::from(self.running)
    }

    /// The first barrier that is good for what was written before this call: one that is under way may have gone past it.
    fn wanted(&self) -> u64 {
        self.begun + 1
    }

    fn next(&mut self, wanted: u64, since: Since) -> Next {
        if self.ended() >= wanted {
            return Next::Ended(self.failed <= since.0);
        }
        if self.running {
            return Next::Wait;
        }
        self.begun += 1;
        self.running = true;
        Next::Make
    }

    fn end(&mut self, ok: bool) {
        self.running = false;
        if !ok {
            self.failed = self.begun;
        }
    }
}

/// A barrier under way, which ends also if it panics.
struct Making<'a> {
    barrier: &'a Barrier,
    ok: bool,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.barrier.queue.lock().end(self.ok);
        self.barrier.ended.notify_all();
    }
}

impl Barrier {
    /// To be asked before the first write of a batch.
    pub(super) fn now(&self) -> Since {
        Since(self.queue.lock().ended())
    }

    /// Waits for a barrier over the whole file system that begins after this call. Whether all that was written between
    /// `since` and this call is durable; if not, each file's own sync tells.
    pub(super) fn wait<B: Backing>(&self, backing: &B, since: Since) -> bool {
        let mut queue = self.queue.lock();
        let wanted = queue.wanted();
        loop {
            match queue.next(wanted, since) {
                Next::Ended(well) => return well,
                Next::Wait => self.ended.wait(&mut queue),
                Next::Make => {
                    drop(queue);
                    let mut making = Making { barrier: self, ok: false };
                    making.ok = backing.sync_all().is_ok();
                    drop(making);
                    queue = self.queue.lock();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A queue with one barrier under way.
    fn busy() -> Queue {
        let mut q = Queue::default();
        assert_eq!(q.next(q.wanted(), Since(0)), Next::Make);
        q
    }

    #[test]
    fn one_that_is_under_way_is_not_enough() {
        let mut q = busy();
        let (wanted, since) = (q.wanted(), Since(q.ended()));
        assert_eq!(q.next(wanted, since), Next::Wait);
        q.end(true);
        assert_eq!(q.next(wanted, since), Next::Make);
        assert_eq!(q.next(wanted, since), Next::Wait);
        q.end(true);
        assert_eq!(q.next(wanted, since), Next::Ended(true));
    }

    #[test]
    fn the_next_one_is_shared_by_all_that_came_before_it_began() {
        let mut q = busy();
        let (first, second) = (q.wanted(), q.wanted());
        q.end(true);
        assert_eq!(q.next(first, Since(0)), Next::Make);
        let late = q.wanted();
        q.end(true);
        assert_eq!(q.next(second, Since(0)), Next::Ended(true));
        assert_eq!(q.next(late, Since(0)), Next::Make);
    }

    #[test]
    fn a_failure_counts_for_all_that_had_begun_to_write_before_it_was_known() {
        let mut q = Queue::default();
        let idle = Since(q.ended());
        assert_eq!(q.next(q.wanted(), idle), Next::Make);
        let during = Since(q.ended());
        q.end(false);
        let after = Since(q.ended());
        let wanted = q.wanted();
        assert_eq!(q.next(wanted, during), Next::Make);
        q.end(true);
        for (since, well) in [(idle, false), (during, false), (after, true)] {
            assert_eq!(q.next(wanted, since), Next::Ended(well), "{since:?}");
        }
    }

    #[test]
    fn the_next_one_begins_also_if_one_panics() {
        use crate::backing::sim::{Moment, Op, SimDisk};
        let (disk, barrier) = (SimDisk::default(), Barrier::default());
        let since = barrier.now();
        disk.set_hook(Some(std::sync::Arc::new(|m| assert_ne!(m, Moment::Before(Op::SyncAll)))));
        let panicked = std::thread::scope(|s| s.spawn(|| barrier.wait(&disk, since)).join().is_err());
        assert!(panicked);
        disk.set_hook(None);
        assert!(!barrier.wait(&disk, since));
        assert!(barrier.wait(&disk, barrier.now()));
    }
}
