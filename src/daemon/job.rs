//! Rotations and rekeys inside the daemon: one at a time, watched by any number of clients, steered by any of them.

use super::fault::{Fault, FaultKind};
use super::protocol::{RekeyState, Reply, RotationState, RunState};
use super::server::Client;
use crate::rotation::rekey::{RekeyReport, RekeyStatus};
use crate::rotation::{Control, Progress, Report, SealedReport, Status};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

/// How often a watching client hears something, and is looked at whether it is still there.
const TICK: Duration = Duration::from_millis(250);

/// A kind of work that has a thread of its own, and whose last one is remembered.
pub(super) trait Run: 'static {
    type Status: Clone + PartialEq + Send;
    type Report: Clone + Send;
    /// What it is called.
    const NAME: &'static str;
    /// What keeps others out.
    const WHAT: What;

    /// Its place among what the daemon remembers.
    fn last(inner: &mut Inner) -> &mut Last<Self::Status, Self::Report>;
    /// What a client hears that watches it.
    fn progress(status: Self::Status) -> Reply;
    /// What that client hears in the end.
    fn ended(state: RunState<Self::Status, Self::Report>) -> Reply;
}

/// A rotation.
pub(super) struct Rotation;

impl Run for Rotation {
    type Status = Status;
    type Report = Report;
    const NAME: &'static str = "rotation";
    const WHAT: What = What::Rotation;

    fn last(inner: &mut Inner) -> &mut Last<Status, Report> {
        &mut inner.rotation
    }

    fn progress(status: Status) -> Reply {
        Reply::Progress(Box::new(status))
    }

    fn ended(state: RotationState) -> Reply {
        Reply::Rotation(Box::new(state))
    }
}

/// A rekey.
pub(super) struct Rekey;

impl Run for Rekey {
    type Status = RekeyStatus;
    type Report = RekeyReport;
    const NAME: &'static str = "rekey";
    const WHAT: What = What::Rekey;

    fn last(inner: &mut Inner) -> &mut Last<RekeyStatus, RekeyReport> {
        &mut inner.rekey
    }

    fn progress(status: RekeyStatus) -> Reply {
        Reply::RekeyProgress(Box::new(status))
    }

    fn ended(state: RekeyState) -> Reply {
        Reply::Rekey(Box::new(state))
    }
}

/// The one of a kind that is under way, or was last.
pub(super) struct Last<S, R> {
    state: Option<RunState<S, R>>,
    /// Counts them, so that a client watches the one it asked for.
    number: u64,
}

impl<S, R> Default for Last<S, R> {
    fn default() -> Self {
        Self { state: None, number: 0 }
    }
}

#[derive(Default)]
pub(super) struct Inner {
    rotation: Last<Status, Report>,
    rekey: Last<RekeyStatus, RekeyReport>,
    /// What is under way; nothing else begins meanwhile.
    work: Option<Work>,
    /// The daemon is about to end: nothing begins any more, for nothing would wait for it.
    ended: bool,
    /// The keys are locked: nothing begins before they are back.
    held: bool,
}

struct Work {
    control: Arc<Control>,
    what: What,
}

/// Work of which there is never more than one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Rotation,
    Rekey,
    /// A look at all headers, for a client that waits for it.
    Scan,
    /// Small work that nobody waits for: it gives way to whoever comes.
    Moves,
}

impl What {
    fn in_words(self) -> &'static str {
        match self {
            Self::Rotation => "a rotation of this store is under way already",
            Self::Rekey => "files of this store are being rekeyed",
            Self::Scan => "headers of this store are being scanned for key destroy",
            Self::Moves => "headers of this store are being moved",
        }
    }
}

/// The daemon's rotation or rekey.
#[derive(Default)]
pub struct Job {
    inner: Mutex<Inner>,
    changed: Condvar,
}

/// Passes a run's progress to whoever watches.
struct Teller<'a, K>(&'a Job, PhantomData<fn() -> K>);

impl<K: Run> Progress<K::Status> for Teller<'_, K> {
    fn update(&self, s: &K::Status) {
        if let Some(state) = K::last(&mut self.0.inner.lock()).state.as_mut() {
            state.status = Some(s.clone());
        }
        self.0.changed.notify_all();
    }
}

/// Work has ended when this is dropped.
struct End<'a>(&'a Job);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.inner.lock().work = None;
        self.0.changed.notify_all();
    }
}

impl Job {
    /// The run of a kind that is under way, or the last one, without its sealed report.
    pub(super) fn state<K: Run>(&self) -> Option<RunState<K::Status, K::Report>> {
        K::last(&mut self.inner.lock()).state.clone().map(|s| RunState { sealed: None, ..s })
    }

    /// Starts `run` in a thread of its own. Returns its number among those of its kind.
    ///
    /// # Errors
    /// [`FaultKind::RotationRunning`] if something is under way; [`FaultKind::KeysLocked`] between [`Job::hold`] and
    /// [`Job::release`].
    pub(super) fn start<K: Run>(
        self: &Arc<Self>,
        run: impl FnOnce(&dyn Progress<K::Status>, &Control) -> Result<(K::Report, Option<SealedReport>), Fault>
        + Send
        + 'static,
    ) -> Result<u64, Fault> {
        let control = Arc::new(Control::new());
        let number = {
            let mut inner = self.begin(&control, K::WHAT)?;
            let last = K::last(&mut inner);
            last.state = Some(RunState { running: true, ..RunState::default() });
            last.number += 1;
            last.number
        };
        let job = self.clone();
        let spawned = std::thread::Builder::new().name(K::NAME.into()).spawn(move || {
            let teller = Teller(&job, PhantomData::<fn() -> K>);
            let work = std::panic::AssertUnwindSafe(|| run(&teller, &control));
            let ended = std::panic::catch_unwind(work).unwrap_or_else(|_| {
                Err(Fault::new(FaultKind::Other, format!("the {} panicked; see the log", K::NAME)))
            });
            job.end::<K>(ended);
        });
        spawned.map_err(|e| {
            self.end::<K>(Err(Fault::new(FaultKind::Other, format!("no thread for the {}", K::NAME))));
            Fault::new(FaultKind::Other, format!("cannot start a thread: {e}"))
        })?;
        Ok(number)
    }

    fn end<K: Run>(&self, ended: Result<(K::Report, Option<SealedReport>), Fault>) {
        let mut inner = self.inner.lock();
        if let Some(s) = K::last(&mut inner).state.as_mut() {
            s.running = false;
            match ended {
                Ok((r, sealed)) => (s.report, s.sealed) = (Some(r), sealed),
                Err(f) => s.fault = Some(f),
            }
        }
        inner.work = None;
        drop(inner);
        self.changed.notify_all();
    }

    /// Runs `scan` on this thread, while nothing is under way and nothing can begin.
    ///
    /// # Errors
    /// [`FaultKind::RotationRunning`] if something is under way; [`FaultKind::KeysLocked`]; those of `scan`.
    pub fn alone<R>(&self, scan: impl FnOnce(&Control) -> Result<R, Fault>) -> Result<R, Fault> {
        self.on_this_thread(What::Scan, scan)
    }

    /// As [`Job::alone`], for small work that nobody waits for: it is cancelled when something else is to begin.
    ///
    /// # Errors
    /// As [`Job::alone`].
    pub fn in_between<R>(&self, work: impl FnOnce(&Control) -> Result<R, Fault>) -> Result<R, Fault> {
        self.on_this_thread(What::Moves, work)
    }

    fn on_this_thread<R>(&self, what: What, work: impl FnOnce(&Control) -> Result<R, Fault>) -> Result<R, Fault> {
        let control = Arc::new(Control::new());
        drop(self.begin(&control, what)?);
        let _end = End(self);
        work(&control)
    }

    /// Notes that work begins, once nothing is under way. Ends work that gives way.
    ///
    /// # Errors
    /// That something is under way, that the keys are locked, or that the daemon is about to end.
    fn begin(&self, control: &Arc<Control>, what: What) -> Result<MutexGuard<'_, Inner>, Fault> {
        let mut inner = self.inner.lock();
        while let Some(w) = &inner.work {
            if w.what != What::Moves {
                return Err(Fault::new(FaultKind::RotationRunning, w.what.in_words()));
            }
            w.control.cancel();
            self.changed.wait(&mut inner);
        }
        if inner.ended {
            return Err(Fault::new(FaultKind::Other, "the store is being unmounted"));
        }
        if inner.held {
            return Err(Fault::new(FaultKind::KeysLocked, "the keys of this store are locked"));
        }
        inner.work = Some(Work { control: Arc::clone(control), what });
        Ok(inner)
    }

    /// Runs `f` on the switches of the run of a kind that is under way.
    ///
    /// # Errors
    /// [`FaultKind::Usage`] if there is none.
    pub(super) fn steer<K: Run>(&self, f: impl FnOnce(&Control)) -> Result<(), Fault> {
        match &self.inner.lock().work {
            Some(w) if w.what == K::WHAT => {
                f(&w.control);
                Ok(())
            }
            _ => Err(Fault::new(FaultKind::Usage, format!("no {} of this store is under way", K::NAME))),
        }
    }

    /// Cancels what is under way, if anything, and waits until it has stopped. Nothing can be started after.
    pub fn stop(&self) {
        let mut inner = self.inner.lock();
        inner.ended = true;
        self.cancel_and_wait(inner);
    }

    /// Cancels what is under way, if anything, and waits until it has stopped. Nothing can be started before
    /// [`Job::release`].
    pub fn hold(&self) {
        let mut inner = self.inner.lock();
        inner.held = true;
        self.cancel_and_wait(inner);
    }

    /// Lets work begin again.
    pub fn release(&self) {
        self.inner.lock().held = false;
    }

    fn cancel_and_wait(&self, mut inner: MutexGuard<'_, Inner>) {
        while let Some(w) = &inner.work {
            w.control.cancel();
            self.changed.wait(&mut inner);
        }
    }

    /// Tells `client` how the run `number` of its kind gets on until it has ended. If the client goes away first, the run
    /// is cancelled.
    ///
    /// # Errors
    /// That the client has gone away.
    pub(super) fn watch<K: Run>(&self, number: u64, client: &mut Client) -> io::Result<()> {
        let mut told: Option<K::Status> = None;
        loop {
            let mut inner = self.inner.lock();
            let same = |i: &mut Inner| {
                let last = K::last(i);
                last.number == number && last.state.as_ref().is_some_and(|s| s.running)
            };
            if same(&mut inner) {
                self.changed.wait_for(&mut inner, TICK);
            }
            let running = same(&mut inner);
            let state = K::last(&mut inner).state.clone().unwrap_or_default();
            drop(inner);
            if !running {
                return client.send(&K::ended(state));
            }
            if client.is_gone() {
                self.leave::<K>(number);
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            if let Some(s) = state.status.filter(|s| told.as_ref() != Some(s)) {
                client.send(&K::progress(s.clone())).inspect_err(|_| self.leave::<K>(number))?;
                told = Some(s);
            }
        }
    }

    /// The client that waits for the run `number` of a kind has gone. If another one has begun since, that goes on.
    fn leave<K: Run>(&self, number: u64) {
        let mut inner = self.inner.lock();
        let is_last = K::last(&mut inner).number == number;
        if let Some(w) = inner.work.as_ref().filter(|w| is_last && w.what == K::WHAT) {
            tracing::info!("the client that started the {} has gone: cancelling it", K::NAME);
            w.control.cancel();
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
        assert_eq!(job.steer::<Rotation>(Control::pause).unwrap_err().kind, FaultKind::Usage);
        job.start::<Rotation>(|_, c| {
            let _ = c.wait(Duration::from_secs(600));
            Err(cancelled())
        })
        .unwrap();
        assert_eq!(job.start::<Rotation>(|_, _| Err(cancelled())).unwrap_err().kind, FaultKind::RotationRunning);
        assert!(job.state::<Rotation>().unwrap().running);
        job.stop();
        let s = job.state::<Rotation>().unwrap();
        assert!(!s.running);
        assert_eq!(s.fault, Some(cancelled()));
        // The daemon closes the store now and lets others have it.
        assert_eq!(job.start::<Rotation>(|_, _| Err(cancelled())).unwrap_err().message, "the store is being unmounted");
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
                assert_eq!(
                    job.steer::<Rotation>(switch).unwrap_err().message,
                    "no rotation of this store is under way"
                );
            }
            let (there, arrived) = std::sync::mpsc::sync_channel(1);
            let (go, go_on) = std::sync::mpsc::channel();
            let running = store.clone();
            job.start::<Rotation>(move |teller, control| {
                let stop = StopAt { state, teller, there, go_on: parking_lot::Mutex::new(go_on) };
                let report = crate::daemon::rotate::mounted(&running, &Default::default(), &stop, control);
                let report = report.map_err(|e| Fault::new(FaultKind::Other, e.to_string()))?;
                let sealed = crate::daemon::rotate::seal(&running, &report);
                Ok((report, Some(sealed)))
            })
            .unwrap();
            arrived.recv().unwrap();
            assert_eq!(job.state::<Rotation>().unwrap().status.unwrap().state, state);
            for switch in
                [Control::resume, Control::pause, Control::pause, Control::resume, Control::cancel, Control::pause]
            {
                job.steer::<Rotation>(switch).unwrap();
            }
            drop(go);
            while job.state::<Rotation>().unwrap().running {
                std::thread::yield_now();
            }
            let report = job.state::<Rotation>().unwrap().report.unwrap();
            let ended = if state == State::Retiring { Outcome::Complete } else { Outcome::Cancelled };
            assert_eq!(report.outcome, ended, "{state:?}");
            assert_eq!(job.steer::<Rotation>(Control::cancel).unwrap_err().kind, FaultKind::Usage, "{state:?}");
            let again = crate::daemon::rotate::mounted(&store, &Default::default(), &(), &Control::new()).unwrap();
            assert_eq!((again.outcome, again.resumed), (Outcome::Complete, state != State::Retiring), "{state:?}");
        }
    }

    #[test]
    fn none_begins_while_the_keys_are_locked() {
        let job = Arc::new(Job::default());
        job.start::<Rotation>(|_, c| {
            let _ = c.wait(Duration::from_secs(600));
            Err(cancelled())
        })
        .unwrap();
        job.hold();
        assert!(!job.state::<Rotation>().unwrap().running, "the one under way was cancelled and has ended");
        assert_eq!(job.start::<Rotation>(|_, _| Err(cancelled())).unwrap_err().kind, FaultKind::KeysLocked);
        job.release();
        job.start::<Rotation>(|_, _| Err(cancelled())).unwrap();
        job.stop();
    }

    #[test]
    fn a_panic_ends_the_rotation_not_the_daemon() {
        let job = Arc::new(Job::default());
        job.start::<Rotation>(|_, _| std::panic::resume_unwind(Box::new("boom"))).unwrap();
        job.stop();
        assert!(job.state::<Rotation>().unwrap().fault.unwrap().message.contains("panicked"));
        job.stop();
    }

    #[test]
    fn a_scan_and_a_rotation_keep_each_other_out_and_an_unmount_ends_both() {
        let job = Arc::new(Job::default());
        job.alone(|c| {
            assert_eq!(job.start::<Rotation>(|_, _| Err(cancelled())).unwrap_err().kind, FaultKind::RotationRunning);
            assert_eq!(job.alone(|_| Ok(())).unwrap_err().kind, FaultKind::RotationRunning);
            assert!(c.checkpoint().is_ok());
            Ok(())
        })
        .unwrap();
        job.start::<Rotation>(|_, c| {
            let _ = c.wait(Duration::from_secs(600));
            Err(cancelled())
        })
        .unwrap();
        assert_eq!(job.alone(|_| Ok(())).unwrap_err().kind, FaultKind::RotationRunning);
        job.steer::<Rotation>(Control::cancel).unwrap();
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

    /// Each is steered by its own name only, and remembered beside the other.
    #[test]
    fn a_rotation_and_a_rekey_keep_each_other_out_and_are_steered_apart() {
        let job = Arc::new(Job::default());
        let ended = |_: &dyn Progress<RekeyStatus>, c: &Control| {
            let _ = c.wait(Duration::from_secs(600));
            Err(Fault::new(FaultKind::RekeyIncomplete, "cancelled"))
        };
        job.start::<Rekey>(ended).unwrap();
        let busy = job.start::<Rotation>(|_, _| Err(cancelled())).unwrap_err();
        assert_eq!(
            (busy.kind, busy.message.as_str()),
            (FaultKind::RotationRunning, "files of this store are being rekeyed")
        );
        assert_eq!(job.start::<Rekey>(ended).unwrap_err().kind, FaultKind::RotationRunning);
        assert_eq!(
            job.steer::<Rotation>(Control::cancel).unwrap_err().message,
            "no rotation of this store is under way"
        );
        for switch in [Control::pause, Control::resume, Control::cancel] {
            job.steer::<Rekey>(switch).unwrap();
        }
        while job.state::<Rekey>().unwrap().running {
            std::thread::yield_now();
        }
        assert_eq!(job.state::<Rekey>().unwrap().fault.unwrap().message, "cancelled");
        assert!(job.state::<Rotation>().is_none());
        assert_eq!(job.steer::<Rekey>(Control::pause).unwrap_err().message, "no rekey of this store is under way");
        job.start::<Rotation>(|_, _| Err(cancelled())).unwrap();
        job.stop();
        assert!(job.state::<Rotation>().is_some() && job.state::<Rekey>().is_some());
    }

    /// A run that ended just when its client went away let the next one be cancelled in its place.
    #[test]
    fn a_client_that_goes_away_ends_its_own_run_only() {
        let job = Arc::new(Job::default());
        let ended = |_: &dyn Progress<RekeyStatus>, c: &Control| {
            let _ = c.wait(Duration::from_secs(600));
            Err(Fault::new(FaultKind::RekeyIncomplete, "cancelled"))
        };
        let first = job.start::<Rekey>(|_, _| Err(cancelled())).unwrap();
        while job.state::<Rekey>().unwrap().running {
            std::thread::yield_now();
        }
        let second = job.start::<Rekey>(ended).unwrap();
        job.leave::<Rekey>(first);
        job.leave::<Rotation>(second);
        job.steer::<Rekey>(|c| assert_eq!(c.check(), Ok(()))).unwrap();
        job.leave::<Rekey>(second);
        job.stop();
        assert_eq!(job.state::<Rekey>().unwrap().fault.unwrap().message, "cancelled");
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
