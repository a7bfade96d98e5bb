//! Requests that may wait for a key service, on threads of their own: those that serve the kernel are few, and a service
//! that hangs must not keep them from answering stat, ls, or the reads of files that are open.
//!
//! Only stores whose KEK is a key in a service (kind external) ever need this, and those that are only read: they may have to
//! open a KEK that somebody else has made since.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// Requests that wait at a time; more wait in the queue.
const THREADS_MAX: usize = 64;
/// A thread with nothing to do ends after this.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    ended: bool,
}

#[derive(Default)]
struct Inner {
    queue: Mutex<Queue>,
    wake: Condvar,
}

/// The threads. They end with this, each after what it has begun.
#[derive(Default)]
pub(super) struct Aside(Arc<Inner>);

impl Aside {
    /// Has `job` run, soon.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut q = self.0.queue.lock();
        q.jobs.push_back(Box::new(job));
        if q.jobs.len() <= q.idle || q.threads >= THREADS_MAX {
            drop(q);
            self.0.wake.notify_one();
            return;
        }
        q.threads += 1;
        drop(q);
        let inner = Arc::clone(&self.0);
        if std::thread::Builder::new().name("fuse-aside".to_owned()).spawn(move || inner.work()).is_err() {
            // No thread to be had: this one does it, and whoever else it was that waits.
            self.0.work_off();
        }
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        self.0.queue.lock().ended = true;
        self.0.wake.notify_all();
    }
}

impl Inner {
    fn work(&self) {
        let mut q = self.queue.lock();
        loop {
            if let Some(job) = q.jobs.pop_front() {
                drop(q);
                job();
                q = self.queue.lock();
                continue;
            }
            if q.ended {
                break;
            }
            q.idle += 1;
            let waited = self.wake.wait_for(&mut q, IDLE);
            q.idle -= 1;
            if waited.timed_out() && q.jobs.is_empty() {
                break;
            }
        }
        q.threads -= 1;
    }

    fn work_off(&self) {
        let mut q = self.queue.lock();
        q.threads -= 1;
        while let Some(job) = q.jobs.pop_front() {
            drop(q);
            job();
            q = self.queue.lock();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn one_that_waits_holds_up_no_other() {
        let (aside, (release, gate), (done, finished)) = (Aside::default(), channel::<()>(), channel());
        let first = done.clone();
        aside.run(move || {
            let _ = gate.recv();
            let _ = first.send(0);
        });
        for i in 1..=200 {
            let done = done.clone();
            aside.run(move || done.send(i).unwrap());
        }
        let mut got: Vec<i32> = (0..200).map(|_| finished.recv().unwrap()).collect();
        got.sort_unstable();
        assert_eq!(got, (1..=200).collect::<Vec<_>>());
        release.send(()).unwrap();
        assert_eq!(finished.recv(), Ok(0));
        let inner = Arc::clone(&aside.0);
        assert!(inner.queue.lock().threads <= THREADS_MAX);
        drop(aside);
        while inner.queue.lock().threads > 0 {
            std::thread::yield_now();
        }
    }
}
