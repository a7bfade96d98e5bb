//! `rotate --shard` and `rotate --merge`: a rotation that several machines share.

use super::args::RotateArgs;
use super::config::Config;
use super::keyring::ExportFile;
use super::place::Place;
use super::progress::Meter;
use super::rotate::{Shown, config_of, finish, on_signal, open_keys, report_file};
use super::{audit, report, root_keys};
use crate::backing::posix::Posix;
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::observed::Observed;
use crate::daemon::open;
use crate::daemon::rotate::SharedStore;
use crate::daemon::shard_lock::{MergeLocks, ShardLocks};
use crate::format::keyring::Keyring;
use crate::rotation::{Begun, Control, Options, Report, SealedReport, Shard, Staged, is_unfinished};
use crate::store::StoreError;
use crate::store::keys::KekKind;
use crate::store::rekey;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Runs one share. The first shard that comes makes the new KEK active; one that finds a run unfinished joins it.
///
/// # Errors
/// As `rotate`; [`FaultKind::Locked`] also if this share is being worked on.
pub fn run(a: &RotateArgs, shard: Shard, place: &Place) -> Result<(), Fault> {
    let file = report_file(a, place)?;
    let export = a.export.as_deref().map(|file| ExportFile::of_rotation(place, file)).transpose()?;
    let config = config_of(a)?;
    let observed = Observed::start(audit::options_of(&config, &place.backing)?.as_ref(), place.keyring.store)?;
    let options = Options {
        kek: a.kek.map(Into::into),
        rate: a.rate,
        full_speed: a.work.full_speed,
        jobs: a.jobs,
        patience: Duration::from_secs(a.patience),
        if_older_than: a.if_older_than,
        ..Options::default()
    };
    let control = Arc::new(Control::new());
    let switch = control.clone();
    on_signal(move || switch.cancel())?;
    let meter = Meter::new(a.json);
    let (config, observed, meter, control) = (&config, &observed, &meter, &control);
    let work = Work { a, place, config, observed, options, export, meter, control };
    let ended = work.share(shard);
    meter.end();
    observed.end();
    let (report, sealed) = ended?;
    finish(&report, sealed.as_ref(), file, a)
}

/// One share, and all that it takes.
struct Work<'a> {
    a: &'a RotateArgs,
    place: &'a Place,
    config: &'a Config,
    observed: &'a Observed,
    options: Options,
    export: Option<ExportFile>,
    meter: &'a Meter,
    control: &'a Control,
}

impl Work<'_> {
    /// Under the locks, so that nobody can leave one half done after the look.
    fn open(&self) -> Result<SharedStore<Posix>, Fault> {
        let backing = &self.place.backing;
        if rekey::is_interrupted(&self.place.posix).map_err(|e| Fault::io("read", backing, &e))? {
            let text = format!(
                "store {}: a rekey of files with several names was interrupted, and shards cannot finish it; mount the \
                 store once, or rotate it without --shard",
                backing.display()
            );
            return Err(Fault::new(FaultKind::Busy, text));
        }
        open_keys(self.a, self.place, self.config, self.observed).map(|(b, keys)| SharedStore::new(b, keys))
    }

    /// What the first shard does for all, while nobody else can change the keyring.
    fn begin(&self) -> Result<(SharedStore<Posix>, Option<Begun>), Fault> {
        let store = self.open()?;
        if is_unfinished(&store.keys().snapshot()) {
            store.mend();
            return Ok((store, None));
        }
        let mut options = self.options.clone();
        if let Some(target) = &self.export {
            let staged = store.stage(&options).map_err(|e| self.fail(&e))?;
            target.take(self.place, staged)?;
            options.staged = Some(staged);
        }
        let begun = store.begin(&options, &Shown(self.meter), self.control).map_err(|e| self.fail(&e))?;
        Ok((store, Some(begun)))
    }

    /// The share under its locks. There is nothing to seal if nothing was due.
    fn share(&self, shard: Shard) -> Result<(Report, Option<SealedReport>), Fault> {
        let backing = &self.place.backing;
        let (_locks, begun) = ShardLocks::take(backing, shard, || self.begin())?;
        let (store, exported) = match begun {
            Some((_, Some(Begun::NotDue(report)))) => return Ok((*report, None)),
            Some((store, begun)) => (store, begun.is_some()),
            None => (self.open()?, false),
        };
        let ring = open::keyring(&self.place.posix)?;
        // Between beginning and sharing the lock, the kernel may have let somebody else in.
        if ring.generation != store.keys().snapshot().generation {
            let text = format!("{}: the keyring was changed while this shard began; try again", backing.display());
            return Err(Fault::new(FaultKind::Locked, text));
        }
        may_join(&ring, self.options.kek)?;
        if let (Some(target), Some(active), false) = (&self.export, ring.active(), exported) {
            target.take(self.place, Staged::Resume(active.id))?;
        }
        let done = store.run(shard, &self.options, &Shown(self.meter), self.control);
        root_keys::tell_of_copy(store.keys());
        done.map(|(report, sealed)| (report, Some(sealed))).map_err(|e| self.fail(&e))
    }

    fn fail(&self, e: &StoreError) -> Fault {
        Fault::store(&self.place.backing, e)
    }
}

/// Whether the run that is under way is the one that was asked for.
fn may_join(ring: &Keyring, kind: Option<KekKind>) -> Result<(), Fault> {
    match (ring.active(), kind) {
        (Some(active), Some(kind)) if active.kind != kind => {
            let text = format!(
                "the unfinished rotation goes to KEK {}, which is {}: finish that one first",
                active.id,
                super::status::word(&active.kind)
            );
            Err(Fault::new(FaultKind::Usage, text))
        }
        _ => Ok(()),
    }
}

/// Ends the run from the reports of its shards: those in the store, or in `files`.
///
/// # Errors
/// As `rotate`; [`FaultKind::Report`] if a report is not genuine, and nothing was changed.
pub fn merge(a: &RotateArgs, files: &[PathBuf], place: &Place) -> Result<(), Fault> {
    let fail = |e: &StoreError| Fault::store(&place.backing, e);
    let file = report_file(a, place)?;
    let given: Vec<(String, Vec<u8>)> =
        files.iter().map(|f| report::read(f).map(|b| (f.display().to_string(), b))).collect::<Result<_, _>>()?;
    let _locks = MergeLocks::take(&place.backing)?;
    let config = Config::load(a.open.access.config.as_deref())?;
    let observed = Observed::start(audit::options_of(&config, &place.backing)?.as_ref(), place.keyring.store)?;
    let (b, keys) = open_keys(a, place, &config, &observed)?;
    let store = SharedStore::new(b, keys);
    let merged = reports(&store, given, place).and_then(|r| store.merge(&r).map_err(|e| fail(&e)));
    root_keys::tell_of_copy(store.keys());
    observed.end();
    let (report, sealed) = merged?;
    finish(&report, Some(&sealed), file, a)
}

/// The reports to merge, all genuine and of this store.
fn reports(store: &SharedStore<Posix>, given: Vec<(String, Vec<u8>)>, place: &Place) -> Result<Vec<Report>, Fault> {
    let files = match given.is_empty() {
        false => given,
        true => {
            let found = store.reports().map_err(|e| Fault::store(&place.backing, &e))?;
            found.into_iter().map(|(s, b)| (format!("the report of shard {s} in the store"), b)).collect()
        }
    };
    store.genuine(files).map_err(|name| {
        let text = format!("{name}: not sealed with the key of this store, or changed since; nothing was merged");
        Fault::new(FaultKind::Report, text)
    })
}

/// Whether a merge found shares that are not done.
pub(super) fn is_short(r: &Report) -> bool {
    r.failures.iter().any(|f| f.code.starts_with("share-"))
}
