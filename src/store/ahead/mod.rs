//! Work that is done for users before they wait for it, where a KEK is a key in a service: keys for files to come, and keys
//! of files that are likely to be opened next.
//!
//! One thread waits for work, and has helpers while there is some. Without that thread nothing is done ahead of need, and
//! everything works all the same. What is done here asks leave of the service's limits, behind users and sparingly, and
//! stops where the service refuses or does not answer.
//!
//! | module | what it does | I/O |
//! |---|---|---|
//! | `pattern` | sees files being opened one after another | none |
//! | `pool` | fills the DEK pool | calls the service |
//! | `prefetch` | unwraps keys of the files that come next | reads, calls the service |

mod pattern;
mod pool;
mod prefetch;

pub(super) use pool::fill;

use super::Node;
use super::keys::{KekHandle, Making};
use super::open::Store;
use crate::backing::Backing;
use crate::kms::guard::lane::Background;
use parking_lot::{Condvar, Mutex};
use prefetch::Directories;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// Calls under way at once.
const HELPERS: usize = 8;
/// Work that waits; what comes beyond it is not done.
const JOBS_MAX: usize = 1024;
/// How long leave is waited for, and how often it is asked for at least.
const LEAVE_MAX: Duration = Duration::from_secs(2);
const LEAVE_AGAIN: Duration = Duration::from_millis(50);

/// One piece of work.
pub(super) enum Job<B: Backing> {
    /// One entry for the DEK pool.
    Ready(Making),
    /// A file was opened, and perhaps a call was needed for its key: what comes next?
    Opened { dir: Arc<Node<B>>, name: Arc<[u8]>, called: bool },
    /// The key of a file that is likely to be opened next.
    Fetch { dir: Arc<Node<B>>, name: Arc<[u8]> },
}

struct Jobs<B: Backing> {
    queue: VecDeque<Job<B>>,
    working: usize,
    /// A thread is there to do it.
    served: bool,
    closed: bool,
}

impl<B: Backing> Jobs<B> {
    fn take(&mut self) -> Option<Job<B>> {
        let job = self.queue.pop_front();
        self.working += usize::from(job.is_some());
        job
    }
}

/// What there is to do.
pub struct Ahead<B: Backing> {
    jobs: Mutex<Jobs<B>>,
    changed: Condvar,
    /// Most files whose keys are unwrapped ahead in a directory.
    window: AtomicUsize,
    directories: Mutex<Directories>,
}

impl<B: Backing> Default for Ahead<B> {
    fn default() -> Self {
        let jobs = Jobs { queue: VecDeque::new(), working: 0, served: false, closed: false };
        Self {
            jobs: Mutex::new(jobs),
            changed: Condvar::new(),
            window: AtomicUsize::new(0),
            directories: Mutex::default(),
        }
    }
}

impl<B: Backing> Ahead<B> {
    /// Keys of at most `n` files of a directory are unwrapped ahead; 0: none.
    pub(super) fn set_window(&self, n: usize) {
        self.window.store(n, Ordering::Relaxed);
    }

    fn window(&self) -> usize {
        self.window.load(Ordering::Relaxed)
    }

    /// Whether anything that is asked for would be done.
    pub(super) fn is_served(&self) -> bool {
        let j = self.jobs.lock();
        j.served && !j.closed
    }

    /// Adds work. Says no if it will not be done.
    fn push(&self, job: Job<B>) -> bool {
        let mut j = self.jobs.lock();
        let room = j.served && !j.closed && j.queue.len() < JOBS_MAX;
        if room {
            j.queue.push_back(job);
            self.changed.notify_all();
        }
        room
    }

    /// Waits for work that nobody does yet and takes it. `None`: there will be none any more.
    fn next(&self) -> Option<Job<B>> {
        let mut j = self.jobs.lock();
        j.served = true;
        while (j.queue.is_empty() || j.working >= HELPERS) && !j.closed {
            self.changed.wait(&mut j);
        }
        j.take()
    }

    /// Takes more work, if there is some.
    fn more(&self) -> Option<Job<B>> {
        self.jobs.lock().take()
    }

    fn done(&self) {
        self.jobs.lock().working -= 1;
        self.changed.notify_all();
    }

    /// Drops what waits. What is being done goes on.
    pub(super) fn clear(&self) {
        self.jobs.lock().queue.clear();
        self.directories.lock().clear();
    }

    /// Ends it: nothing more is begun.
    fn close(&self) {
        let mut j = self.jobs.lock();
        j.closed = true;
        j.queue.clear();
        self.changed.notify_all();
    }

    /// Returns when there is nothing to do and nothing being done, or after `most`.
    pub fn wait_until_idle(&self, most: Duration) -> bool {
        let (end, mut j) = (Instant::now() + most, self.jobs.lock());
        while !(j.queue.is_empty() && j.working == 0) {
            if self.changed.wait_until(&mut j, end).timed_out() {
                return false;
            }
        }
        true
    }

    /// Whether `kek`'s service has leave for one more call, which is waited for a little.
    fn has_leave(&self, ask: impl Fn() -> Result<(), Duration>) -> bool {
        let end = Instant::now() + LEAVE_MAX;
        loop {
            let Err(wait) = ask() else { return true };
            if !self.is_served() || Instant::now() + wait.min(LEAVE_AGAIN) >= end {
                return false;
            }
            std::thread::sleep(wait.min(LEAVE_AGAIN));
        }
    }
}

fn leave(kek: &KekHandle) -> Result<(), Duration> {
    kek.leave(Background::Ahead, 1)
}

impl<B: Backing> Store<B> {
    /// Does what is to be done ahead of need, until [`Store::stop_working_ahead`]. Has a thread of its own.
    pub fn work_ahead(&self) {
        let shared = self.shared();
        std::thread::scope(|s| {
            while let Some(job) = shared.ahead.next() {
                let work = Work(self, Some(job));
                // What no thread can be had for is not done.
                let _ = Builder::new().name("ahead".to_owned()).spawn_scoped(s, move || work.run());
            }
        });
    }

    /// Nothing is done ahead of need any more, and no key is kept for it. Calls under way are waited for, up to `most`:
    /// a service that hangs would hold up the end of the mount.
    pub fn stop_working_ahead(&self, most: Duration) {
        let shared = self.shared();
        shared.ahead.close();
        if !shared.ahead.wait_until_idle(most) {
            tracing::warn!("a key service takes long to answer; not waited for");
        }
        shared.keys.pool().set_max(0);
        shared.keys.pool().clear();
    }
}

/// A helper and the work it begins with.
struct Work<'a, B: Backing>(&'a Store<B>, Option<Job<B>>);

impl<B: Backing> Work<'_, B> {
    /// Works until there is nothing left.
    fn run(mut self) {
        while let Some(job) = self.1.take() {
            let ahead = &self.0.shared().ahead;
            let done = Done(ahead);
            match job {
                Job::Ready(_making) => pool::make_one(self.0.shared()),
                Job::Opened { dir, name, called } => self.0.look_ahead(&dir, &name, called),
                Job::Fetch { dir, name } => self.0.fetch(&dir, &name),
            }
            drop(done);
            self.1 = ahead.more();
        }
    }
}

impl<B: Backing> Drop for Work<'_, B> {
    fn drop(&mut self) {
        if self.1.take().is_some() {
            self.0.shared().ahead.done();
        }
    }
}

struct Done<'a, B: Backing>(&'a Ahead<B>);

impl<B: Backing> Drop for Done<'_, B> {
    fn drop(&mut self) {
        self.0.done();
    }
}
