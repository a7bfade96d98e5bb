//! A rotation inside the daemon: one at a time, watched by any number of clients, steered by any of them.

use super::fault::{Fault, FaultKind};
use super::protocol::{Reply, RotationState};
use super::server::Client;
use crate::rotation::{Control, Progress, Report, SealedReport, Status};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// How often a watching client hears something, and is looked at whether it is still there.
const TICK: Duration = Duration::from_millis(250);

#[derive(Default)]
struct Inner {
    state: Option<RotationState>,
    control: Option<Arc<Control>>,
    /// Work that must not meet a rotation.
    other: Option<Other>,
    /// Counts the rotations, so that a client watches the one it asked for.
    number: u64,
    /// The daemon is about to end: no rotation begins any more, for nothing would wait for it.
    ended: bool,
    /// The keys are locked: no rotation begins before they are back.
    held: bool,
}

/// What keeps rotations out while it is under way, besides rotations.
struct Other {
    control: Arc<Control>,
    /// In words.
    what: &'static str,
    /// Nobody waits for it: it gives way to whoever comes.
    yields: bool,
}

/// The daemon's rotation.
#[derive(Default)]
pub struct Job {
    inner: Mutex<Inner>,
    changed: Condvar,
}

/// Passes a run's progress to whoever watches.
struct Teller<'a>(&'a Job);

impl Progress for Teller<'_> {
    fn update(&self, s: &Status) {
        if let Some(state) = self.0.inner.lock().state.as_mut() {
            state.status = Some(s.clone());
        }
        self.0.changed.notify_all();
    }
}

impl Job {
    /// The rotation under way, or the last one, without its sealed report.
    pub fn state(&self) -> Option<RotationState> {
        self.inner.lock().state.clone().map(|s| RotationState { sealed: None, ..s })
    }

    /// Starts `run` in a thread of its own. Returns the rotation's number.
    ///
    /// # Errors
    /// [`FaultKind::RotationRunning`] if one is under way; [`FaultKind::KeysLocked`] between [`Job::hold`] and
    /// [`Job::release`].
    pub fn start(
        self: &Arc<Self>,
        run: impl FnOnce(&dyn Progress, &Control) -> Result<(Report, SealedReport), Fault> + Send + 'static,
    ) -> Result<u64, Fault> {
        let control = Arc::new(Control::new());
        let number = {
            let mut inner = self.inner.lock();
            self.make_way(&mut inner)?;
            inner.control = Some(control.clone());
            inner.state = Some(RotationState { running: true, ..Default::default() });
            inner.number += 1;
            inner.number
        };
        let job = self.clone();
        let spawned = std::thread::Builder::new().name("rotate".into()).spawn(move || {
            let work = std::panic::AssertUnwindSafe(|| run(&Teller(&job), &control));
            let ended = std::panic::catch_unwind(work)
                .unwrap_or_else(|_| Err(Fault::new(FaultKind::Other, "the rotation panicked; see the log")));
            job.end(ended);
        });
        spawned.map_err(|e| {
            self.end(Err(Fault::new(FaultKind::Other, "no thread for the rotation")));
            Fault::new(FaultKind::Other, format!("cannot start a thread: {e}"))
        })?;
        Ok(number)
    }

    fn end(&self, ended: Result<(Report, SealedReport), Fault>) {
        let mut inner = self.inner.lock();
        inner.control = None;
        if let Some(s) = inner.state.as_mut() {
            s.running = false;
            match ended {
                Ok((r, sealed)) => (s.report, s.sealed) = (Some(r), Some(sealed)),
                Err(f) => s.fault = Some(f),
            }
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Runs `scan` on this thread, while no rotation is under way and none can begin.
    ///
    /// # Errors
    /// [`FaultKind::RotationRunning`] if one is under way; [`FaultKind::KeysLocked`]; those of `scan`.
    pub fn alone<R>(&self, scan: impl FnOnce(&Control) -> Result<R, Fault>) -> Result<R, Fault> {
        self.without_rotation(("headers of this store are being scanned for key destroy", false), scan)
    }

    /// Runs `work`, a rekey, on this thread, while no rotation is under way and none can begin.
    ///
    /// # Errors
    /// As [`Job::alone`].
    pub fn rekey<R>(&self, work: impl FnOnce(&Control) -> Result<R, Fault>) -> Result<R, Fault> {
        self.without_rotation(("files of this store are being rekeyed", false), work)
    }

    /// As [`Job::alone`], for small work that nobody waits for: it is cancelled when something else is to begin.
    ///
    /// # Errors
    /// As [`Job::alone`].
    pub fn in_between<R>(&self, work: impl FnOnce(&Control) -> Result<R, Fault>) -> Result<R, Fault> {
        self.without_rotation(("headers of this store are being moved", true), work)
    }

    fn without_rotation<R>(
        &self,
        (what, yields): (&'static str, bool),
        work: impl FnOnce(&Control) -> Result<R, Fault>,
    ) -> Result<R, Fault> {
        struct End<'a>(&'a Job);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.inner.lock().other = None;
                self.0.changed.notify_all();
            }
        }
        let control = Arc::new(Control::new());
        {
            let mut inner = self.inner.lock();
            self.make_way(&mut inner)?;
            inner.other = Some(Other { control: control.clone(), what, yields });
        }
        let _end = End(self);
        work(&control)
    }

    /// Ends work that gives way. On return nothing is under way.
    ///
    /// # Errors
    /// That something is, that the keys are locked, or that the daemon is about to end.
    fn make_way(&self, inner: &mut MutexGuard<'_, Inner>) -> Result<(), Fault> {
        while let Some(o) = &inner.other {
            if !o.yields {
                return Err(Fault::new(FaultKind::RotationRunning, o.what));
            }
            o.control.cancel();
            self.changed.wait(inner);
        }
        // Whatever came first while this one waited, too.
        match (inner.ended, inner.held, inner.control.is_some()) {
            (true, _, _) => Err(Fault::new(FaultKind::Other, "the store is being unmounted")),
            (_, true, _) => Err(Fault::new(FaultKind::KeysLocked, "the keys of this store are locked")),
            (_, _, true) => {
                Err(Fault::new(FaultKind::RotationRunning, "a rotation of this store is under way already"))
            }
            _ => Ok(()),
        }
    }

    /// Runs `f` on the switches of the rotation under way.
    ///
    /// # Errors
    /// [`FaultKind::Usage`] if there is none.
    pub fn steer(&self, f: impl FnOnce(&Control)) -> Result<(), Fault> {
        match &self.inner.lock().control {
            Some(c) => {
                f(c);
                Ok(())
            }
            None => Err(Fault::new(FaultKind::Usage, "no rotation of this store is under way")),
        }
    }

    /// Cancels the rotation or scan under way, if any, and waits until it has stopped. None can be started after.
    pub fn stop(&self) {
        let mut inner = self.inner.lock();
        inner.ended = true;
        self.cancel_and_wait(inner);
    }

    /// Cancels the rotation or scan under way, if any, and waits until it has stopped. None can be started before
    /// [`Job::release`].
    pub fn hold(&self) {
        let mut inner = self.inner.lock();
        inner.held = true;
        self.cancel_and_wait(inner);
    }

    /// Lets rotations begin again.
    pub fn release(&self) {
        self.inner.lock().held = false;
    }

    fn cancel_and_wait(&self, mut inner: MutexGuard<'_, Inner>) {
        while let Some(c) = inner.control.as_ref().or(inner.other.as_ref().map(|o| &o.control)) {
            c.cancel();
            self.changed.wait(&mut inner);
        }
    }

    /// Tells `client` how rotation `number` gets on until it has ended. If the client goes away first, the rotation is
    /// cancelled, unless `detached`.
    ///
    /// # Errors
    /// That the client has gone away.
    pub fn watch(&self, number: u64, detached: bool, client: &mut Client) -> io::Result<()> {
        let leave = |e: io::Error| {
            if !detached {
                tracing::info!("the client that started the rotation has gone: cancelling it");
                let _ = self.steer(Control::cancel);
            }
            Err(e)
        };
        let mut told: Option<Status> = None;
        loop {
            let mut inner = self.inner.lock();
            let same = |i: &Inner| i.number == number && i.state.as_ref().is_some_and(|s| s.running);
            if same(&inner) {
                self.changed.wait_for(&mut inner, TICK);
            }
            let running = same(&inner);
            let state = inner.state.clone().unwrap_or_default();
            drop(inner);
            if !running {
                return client.send(&Reply::Rotation(Box::new(state)));
            }
            if client.is_gone() {
                return leave(io::ErrorKind::BrokenPipe.into());
            }
            if let Some(s) = state.status.filter(|s| told.as_ref() != Some(s)) {
                if let Err(e) = client.send(&Reply::Progress(Box::new(s.clone()))) {
                    return leave(e);
                }
                told = Some(s);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotation::{Outcome, State};

    fn cancelled() -> Fault {
        Fault::new(FaultKind::RotationIncomplete, "cancelled")
    }

    #[test]
    fn one_at_a_time_and_a_cancel_ends_it() {
        let job = Arc::new(Job::default());
        assert_eq!(job.steer(Control::pause).unwrap_err().kind, FaultKind::Usage);
        job.start(|_, c| {
            let _ = c.wait(Duration::from_secs(600));
            Err(cancelled())
        })
        .unwrap();
        assert_eq!(job.start(|_, _| Err(cancelled())).unwrap_err().kind, FaultKind::RotationRunning);
        assert!(job.state().unwrap().running);
        job.stop();
        let s = job.state().unwrap();
        assert!(!s.running);
        assert_eq!(s.fault, Some(cancelled()));
        // The daemon closes the store now and lets others have it.
        assert_eq!(job.start(|_, _| Err(cancelled())).unwrap_err().message, "the store is being unmounted");
    }

    /// Stops a run as it comes into a state, until the test has done what it wants.
    struct StopAt<'a> {
        state: State,
        teller: &'a dyn Progress,
        there: std::sync::mpsc::SyncSender<()>,
        go_on: parking_lot::Mutex<std::sync::mpsc::Receiver<()>>,
    }

    impl Progress for StopAt<'_> {
        fn update(&self, s: &Status) {
            self.teller.update(s);
            if s.state == self.state && self.there.try_send(()).is_ok() {
                // Fails once the test has gone on.
                let _ = self.go_on.lock().recv();
            }
        }
    }

    /// A rotation of a store in use, as the control socket steers it.
    #[test]
    fn a_rotation_is_paused_resumed_and_cancelled_in_each_state() {
        use crate::store::keys::{Keys, StoreFlags};
        use crate::store::{Store, StoreOptions};
        let root: Vec<Arc<dyn crate::kms::KeyProvider>> = vec![crate::kms::scripted::Scripted::new("root")];
        for state in [State::Staged, State::Sweeping, State::Verifying, State::Retiring] {
            let disk = crate::backing::sim::SimDisk::default();
            let kind = crate::format::keyring::KekKind::Sealed;
            Store::init(&disk, &root, kind, StoreFlags::default()).unwrap();
            let keys = Keys::open(&disk, &root).unwrap();
            let store = Store::open(disk, keys, StoreOptions::default()).unwrap();
            let (_, _, file) = store.create(&store.root(), b"f", 0o600, 0, None).unwrap();
            file.write(0, b"x").unwrap();
            let job = Arc::new(Job::default());
            for switch in [Control::pause, Control::resume, Control::cancel] {
                assert_eq!(job.steer(switch).unwrap_err().message, "no rotation of this store is under way");
            }
            let (there, arrived) = std::sync::mpsc::sync_channel(1);
            let (go, go_on) = std::sync::mpsc::channel();
            let running = store.clone();
            job.start(move |teller, control| {
                let stop = StopAt { state, teller, there, go_on: parking_lot::Mutex::new(go_on) };
                let report = crate::daemon::rotate::mounted(&running, &Default::default(), &stop, control);
                let report = report.map_err(|e| Fault::new(FaultKind::Other, e.to_string()))?;
                let sealed = crate::daemon::rotate::seal(&running, &report);
                Ok((report, sealed))
            })
            .unwrap();
            arrived.recv().unwrap();
            assert_eq!(job.state().unwrap().status.unwrap().state, state);
            for switch in
                [Control::resume, Control::pause, Control::pause, Control::resume, Control::cancel, Control::pause]
            {
                job.steer(switch).unwrap();
            }
            drop(go);
            while job.state().unwrap().running {
                std::thread::yield_now();
            }
            let report = job.state().unwrap().report.unwrap();
            let ended = if state == State::Retiring { Outcome::Complete } else { Outcome::Cancelled };
            assert_eq!(report.outcome, ended, "{state:?}");
            assert_eq!(job.steer(Control::cancel).unwrap_err().kind, FaultKind::Usage, "{state:?}");
            let again = crate::daemon::rotate::mounted(&store, &Default::default(), &(), &Control::new()).unwrap();
            assert_eq!((again.outcome, again.resumed), (Outcome::Complete, state != State::Retiring), "{state:?}");
        }
    }

    #[test]
    fn none_begins_while_the_keys_are_locked() {
        let job = Arc::new(Job::default());
        job.start(|_, c| {
            let _ = c.wait(Duration::from_secs(600));
            Err(cancelled())
        })
        .unwrap();
        job.hold();
        assert!(!job.state().unwrap().running, "the one under way was cancelled and has ended");
        assert_eq!(job.start(|_, _| Err(cancelled())).unwrap_err().kind, FaultKind::KeysLocked);
        job.release();
        job.start(|_, _| Err(cancelled())).unwrap();
        job.stop();
    }

    #[test]
    fn a_panic_ends_the_rotation_not_the_daemon() {
        let job = Arc::new(Job::default());
        job.start(|_, _| std::panic::resume_unwind(Box::new("boom"))).unwrap();
        job.stop();
        assert!(job.state().unwrap().fault.unwrap().message.contains("panicked"));
        job.stop();
    }

    #[test]
    fn a_scan_and_a_rotation_keep_each_other_out_and_an_unmount_ends_both() {
        let job = Arc::new(Job::default());
        job.alone(|c| {
            assert_eq!(job.start(|_, _| Err(cancelled())).unwrap_err().kind, FaultKind::RotationRunning);
            assert_eq!(job.alone(|_| Ok(())).unwrap_err().kind, FaultKind::RotationRunning);
            assert!(c.checkpoint().is_ok());
            Ok(())
        })
        .unwrap();
        job.start(|_, c| {
            let _ = c.wait(Duration::from_secs(600));
            Err(cancelled())
        })
        .unwrap();
        assert_eq!(job.alone(|_| Ok(())).unwrap_err().kind, FaultKind::RotationRunning);
        job.steer(Control::cancel).unwrap();
        let other = job.clone();
        let (begun, ready) = std::sync::mpsc::channel();
        std::thread::scope(|s| {
            let scan = s.spawn(move || {
                loop {
                    // Until the rotation has stopped.
                    let r = other.alone(|c| {
                        begun.send(()).unwrap();
                        Ok(c.wait(Duration::from_secs(600)).is_err())
                    });
                    if !matches!(&r, Err(f) if f.kind == FaultKind::RotationRunning) {
                        return r;
                    }
                    std::thread::yield_now();
                }
            });
            ready.recv().unwrap();
            job.stop();
            assert_eq!(scan.join().unwrap(), Ok(true), "the scan was cancelled");
        });
        assert!(job.alone(|_| Ok(())).is_err(), "none begins any more");
    }

    #[test]
    fn small_work_gives_way_to_whoever_comes() {
        let job = Job::default();
        let (begun, ready) = std::sync::mpsc::channel();
        std::thread::scope(|s| {
            let small = s.spawn(|| {
                job.in_between(|c| {
                    begun.send(()).unwrap();
                    Ok(c.wait(Duration::from_secs(600)).is_err())
                })
            });
            ready.recv().unwrap();
            assert_eq!(job.alone(|_| Ok(7)), Ok(7));
            assert_eq!(small.join().unwrap(), Ok(true), "it was cancelled");
        });
    }
}
