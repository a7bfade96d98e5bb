//! What the daemon does for its clients.

use super::fault::{Fault, FaultKind};
use super::job::{Job, Rekey, Rotation, Run};
use super::keys::KeyKeeper;
use super::metrics::source::Source;
use super::observed::Observed;
use super::open;
use super::protocol::{
    AuditHead, CacheStatus, Confirming, DaemonStatus, Hidden, KeysReply, KeysState, RefreshReport, Reply, Request,
    RotateRequest, SealToCheck, Sealed, Switch, Work,
};
use super::rotate::BESIDE_READERS;
use super::server::{Client, Handler};
use crate::backing::posix::Posix;
use crate::crypto::seal::{Seal, hash_from, hex};
use crate::crypto::secret::memory_is_locked;
use crate::format::ids::{KekId, RootKeyId};
use crate::kms::guard;
use crate::kms::recovery::RecoveryKey;
use crate::kms::services::Services;
use crate::kms::{ConnectOptions, KeyProvider, PassphraseSource, RootKeyUri, passphrase};
use crate::rotation::{self, Destruction, Staged, When, rekey};
use crate::store::keys::Confirmation;
use crate::store::shared::Shared;
use crate::store::{Store, StoreError};
use parking_lot::Mutex;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// The mounted store, as clients see it.
pub struct Control {
    pub store: Arc<Store<Posix>>,
    pub job: Arc<Job>,
    pub keeper: Arc<KeyKeeper>,
    /// Root keys the store was mounted with; empty: those of the keyring.
    pub keys: Vec<String>,
    pub mountpoint: PathBuf,
    pub backing: PathBuf,
    /// Where key services are, for new root keys.
    pub services: Services,
    pub started: Instant,
    pub observed: Arc<Observed>,
    pub metrics: Arc<Source>,
}

impl Handler for Control {
    fn handle(&self, request: Request, client: &mut Client) -> io::Result<()> {
        let reply = match request {
            Request::Rotate(r) => return self.rotate(&r, client),
            Request::Rekey { asked, detach } => return self.rekey(asked, detach, client),
            Request::RotateStage(r) => self.rotate_stage(&r).map(Reply::Staged),
            Request::Status => Ok(Reply::Status(Box::new(self.status()))),
            Request::Steer { what, how } => self.steer(what, how).map(|()| Reply::Done),
            Request::KeyAdd { uri, passphrase, confirm } => {
                self.key_add(&uri, passphrase.as_ref(), &confirm).map(|()| Reply::Done)
            }
            Request::KeyPolicy { quorum, confirm } => self.key_policy(quorum, &confirm).map(|()| Reply::Done),
            Request::KeyFloor { floor } => self.key_floor(floor.as_deref()).map(|()| Reply::Done),
            Request::Lock => self.lock().map(Reply::Keys),
            Request::Unlock { keys, passphrase, recovery } => {
                self.unlock(&keys, passphrase.as_ref(), recovery.as_ref()).map(Reply::Keys)
            }
            Request::KeyRemove { id } => self.key_remove(&id).map(|()| Reply::Done),
            Request::KeyRefresh { dry_run } => self.key_refresh(dry_run).map(Reply::Refreshed),
            Request::KekDestroy { id, when, confirm } => {
                self.kek_destroy(&id, when, &confirm, client).map(Reply::Destruction)
            }
            Request::Metrics => Ok(Reply::Metrics(self.metrics.page())),
            Request::AuditHead => Ok(Reply::AuditHead(self.audit_head())),
            Request::Seals { of, seals } => Ok(Reply::Seals(self.genuine(of, &seals))),
        };
        client.send(&reply.unwrap_or_else(Reply::Failed))
    }
}

/// Work that a client waits for.
struct Watched<'a> {
    client: Mutex<&'a mut Client>,
    control: &'a rotation::Control,
}

impl rotation::Progress for Watched<'_> {
    fn update(&self, s: &rotation::Status) {
        let mut client = self.client.lock();
        if client.is_gone() || client.send(&Reply::Progress(Box::new(s.clone()))).is_err() {
            tracing::info!("the client that waits for a scan has gone: cancelling it");
            self.control.cancel();
        }
    }
}

impl Control {
    fn status(&self) -> DaemonStatus {
        let shared = self.store.shared();
        let c = shared.deks.stats();
        DaemonStatus {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            store: shared.keys.store_id().to_string(),
            mountpoint: self.mountpoint.display().to_string(),
            backing: self.backing.display().to_string(),
            uptime: self.started.elapsed().as_secs(),
            read_only: shared.read_only,
            memory_locked: memory_is_locked(),
            keys: self.keeper.status(),
            dek_cache: CacheStatus {
                entries: c.entries as u64,
                hits: c.hits,
                misses: c.misses,
                evicted: c.evicted,
                expired: c.expired,
            },
            rotation: self.job.state::<Rotation>(),
            rekey: self.job.state::<Rekey>(),
            // What cannot be read is left out, as by who looks from outside.
            rekey_asked: rekey::asked(&shared.backing, shared.keys.secret()).unwrap_or_default(),
        }
    }

    /// Where the audit log is, after all of it was written.
    fn audit_head(&self) -> Option<AuditHead> {
        let log = self.observed.audit.as_ref()?;
        let h = log.checkpoint()?;
        let path = log.path().display().to_string();
        Some(AuditHead { path, seq: h.chain.seq, head: hex(&h.chain.head), trouble: h.trouble })
    }

    /// Which of `seals` were made with this store's key. Tells nobody how to make one.
    fn genuine(&self, of: Sealed, seals: &[SealToCheck]) -> Vec<bool> {
        let key = of.key(self.store.shared().keys.secret());
        let read = |s: &SealToCheck| Some(Seal { digest: hash_from(&s.digest)?, mac: hash_from(&s.mac)? });
        seals.iter().map(|s| read(s).is_some_and(|s| key.is_genuine(&s))).collect()
    }

    fn lock(&self) -> Result<KeysReply, Fault> {
        let changed = self.keeper.lock()?;
        Ok(KeysReply { changed, keys: self.keeper.status(), ..Default::default() })
    }

    /// With root keys given, or keys that are not in memory, opens the keyring anew. Else there is nothing to unlock, and
    /// the service is asked at once, for somebody may have put right what it refused.
    fn unlock(
        &self,
        given: &[String],
        passphrase: Option<&Hidden>,
        recovery: Option<&Hidden>,
    ) -> Result<KeysReply, Fault> {
        let before = self.keeper.status();
        let brought = !given.is_empty() || passphrase.is_some() || recovery.is_some();
        if !brought && before.state != KeysState::Locked {
            if before.state != KeysState::Ready {
                self.keeper.refresh();
            }
            let keys = self.keeper.status();
            return Ok(KeysReply { changed: keys.state != before.state, keys, ..Default::default() });
        }
        let uris = if given.is_empty() { &self.keys } else { given };
        let o = ConnectOptions { passphrase: Some(not_asked()), services: self.services.clone(), ..Default::default() };
        let o = self.observed.connect(&o);
        let ring = self.store.shared().keys.snapshot();
        let mut root = open::root_keys(uris, &ring, &o)?;
        if let Some(p) = passphrase {
            root.retain(|k| !k.describe().is_ok_and(|d| d.uri.starts_with("passphrase:")));
            // Connected to now, and first: what waits to be needed would keep the passphrase as it waits.
            let uri = RootKeyUri::parse("passphrase:").map_err(|e| Fault::new(FaultKind::RootKey, e.to_string()))?;
            root.insert(0, self.connect_to(&uri, Some(p), false)?);
        }
        if let Some(r) = recovery {
            let text = PassphraseSource::Fixed(Zeroizing::new(r.expose().as_bytes().to_vec()));
            let key = RecoveryKey::enter(&text).map_err(|e| Fault::kms("recovery:", &e))?;
            // It was asked for, so it is what shall be used.
            let uri = key.uri().clone();
            root.insert(0, guard::around(Arc::new(key), &uri, &o));
        }
        let done = self.keeper.unlock(&root)?;
        Ok(KeysReply { changed: true, regained: done.regained, failed: done.failed, keys: self.keeper.status() })
    }

    fn rotate(&self, r: &RotateRequest, client: &mut Client) -> io::Result<()> {
        let started = self.may_rotate(r).and_then(|()| self.connect_root(r)).and_then(|()| self.rotate_options(r));
        let started = started.and_then(|options| {
            let store = self.store.clone();
            let backing = self.backing.clone();
            self.job.start::<Rotation>(move |progress, control| {
                // What a dry run counts may be what shards are moving.
                store.shared().renew_keys();
                let report = super::rotate::mounted(&store, &options, progress, control);
                let report = report.map_err(|e| Fault::store(&backing, &e))?;
                let sealed = super::rotate::seal(&store, &report);
                Ok((report, Some(sealed)))
            })
        });
        self.started::<Rotation>(started, r.detach, client)
    }

    /// Tells the client how a run gets on that it has started, or leaves it to itself.
    fn started<K: Run>(&self, number: Result<u64, Fault>, detach: bool, client: &mut Client) -> io::Result<()> {
        match number {
            Ok(_) if detach => client.send(&Reply::Done),
            Ok(number) => self.job.watch::<K>(number, client),
            Err(f) => client.send(&Reply::Failed(f)),
        }
    }

    fn steer(&self, what: Work, how: Switch) -> Result<(), Fault> {
        let how = match how {
            Switch::Pause => rotation::Control::pause,
            Switch::Resume => rotation::Control::resume,
            Switch::Cancel => rotation::Control::cancel,
        };
        match what {
            Work::Rotation => self.job.steer::<Rotation>(how),
            Work::Rekey => self.job.steer::<Rekey>(how),
        }
    }

    fn rotate_stage(&self, r: &RotateRequest) -> Result<Staged, Fault> {
        self.may_rotate(r)?;
        self.connect_root(r)?;
        let options = self.rotate_options(r)?;
        self.job.alone(|_| super::rotate::stage(&self.store, &options).map_err(|e| Fault::store(&self.backing, &e)))
    }

    /// A read-only mount writes nothing, but it is in nobody's way who says so.
    fn may_rotate(&self, r: &RotateRequest) -> Result<(), Fault> {
        match self.to_write() {
            Err(f) if !r.dry_run => {
                let text = format!("{} at {}; {BESIDE_READERS}", f.message, self.mountpoint.display());
                Err(Fault::new(FaultKind::Locked, text))
            }
            _ => Ok(()),
        }
    }

    /// A passphrase without new root keys must be that of a root key the store has.
    fn connect_root(&self, r: &RotateRequest) -> Result<(), Fault> {
        let Some(p) = r.passphrase.as_ref().filter(|_| r.keys.is_empty()) else { return Ok(()) };
        let uri = RootKeyUri::parse("passphrase:").map_err(|e| Fault::new(FaultKind::RootKey, e.to_string()))?;
        let key = self.connect_to(&uri, Some(p), false)?;
        self.store.shared().keys.connect_root(&key).map(drop).map_err(|e| Fault::store(&self.backing, &e))
    }

    /// Has root keys prove themselves for what cannot be undone.
    fn confirmed(&self, c: &Confirming) -> Result<Confirmation, Fault> {
        let connect = |u: &RootKeyUri| self.connect_to(u, c.passphrase.as_ref(), false);
        let given = open::parse(&c.keys)?.iter().map(connect).collect::<Result<Vec<_>, _>>()?;
        self.store.shared().keys.confirm(&given).map_err(|e| Fault::store(&self.backing, &e))
    }

    fn key_policy(&self, quorum: u8, confirm: &Confirming) -> Result<(), Fault> {
        let confirmed = self.confirmed(confirm)?;
        let shared = self.to_write()?;
        shared.keys.set_quorum(&shared.backing, quorum, &confirmed).map_err(|e| Fault::store(&self.backing, &e))
    }

    fn key_floor(&self, floor: Option<&str>) -> Result<(), Fault> {
        let floor = floor.map(kek_id).transpose()?;
        let shared = self.to_write()?;
        shared.keys.set_floor(&shared.backing, floor).map_err(|e| Fault::store(&self.backing, &e))?;
        // A file that was closed a moment ago is not to be opened again with what is left of it.
        self.store.forget_idle_keys();
        Ok(())
    }

    /// The store, if it is mounted to be written.
    fn to_write(&self) -> Result<&Shared<Posix>, Fault> {
        let shared = self.store.shared();
        if shared.read_only { Err(Fault::store(&self.backing, &StoreError::ReadOnly)) } else { Ok(shared) }
    }

    fn key_add(&self, uri: &str, passphrase: Option<&Hidden>, confirm: &Confirming) -> Result<(), Fault> {
        // Before a key file is made for nothing.
        let shared = self.to_write()?;
        let confirmed = self.confirmed(confirm)?;
        let uri = RootKeyUri::parse(uri).map_err(|e| Fault::new(FaultKind::RootKey, e.to_string()))?;
        let key = self.connect_to(&uri, passphrase, true)?;
        let added = shared.keys.add_root_key(&shared.backing, &key, &confirmed);
        added.map(drop).map_err(|e| Fault::store(&self.backing, &e))
    }

    fn key_remove(&self, id: &str) -> Result<(), Fault> {
        let id: RootKeyId = id.parse().map_err(|e| Fault::new(FaultKind::Usage, format!("root key id: {e}")))?;
        let shared = self.to_write()?;
        shared.keys.remove_root_key(&shared.backing, id).map_err(|e| Fault::store(&self.backing, &e))
    }

    /// The client hears how the scan gets on, and ends it by going away.
    fn kek_destroy(
        &self,
        id: &str,
        when: When,
        confirm: &Confirming,
        client: &mut Client,
    ) -> Result<Destruction, Fault> {
        let (id, confirmed) = (kek_id(id)?, self.confirmed(confirm)?);
        let end = |progress: &dyn rotation::Progress, control: &rotation::Control| {
            rotation::destroy(&super::rotate::in_use(&self.store), id, when, &confirmed, progress, control)
                .map_err(|e| Fault::store(&self.backing, &e))
        };
        match when {
            When::Now | When::Due => {
                self.job.alone(|control| end(&Watched { client: Mutex::new(client), control }, control))
            }
            // No scan, and not to be kept waiting by one.
            When::After(_) | When::Never => end(&(), &rotation::Control::new()),
        }
    }

    fn rekey(&self, request: rekey::Request, detach: bool, client: &mut Client) -> io::Result<()> {
        let (store, mountpoint) = (self.store.clone(), self.mountpoint.clone());
        let started = match store.shared().read_only && !request.dry_run {
            true => Err(Fault::store(&mountpoint, &StoreError::ReadOnly)),
            false => self.job.start::<Rekey>(move |progress, control| {
                let report = rekey::rekey(&store, &request, progress, control);
                Ok((report.map_err(|e| Fault::store(&mountpoint, &e))?, None))
            }),
        };
        self.started::<Rekey>(started, detach, client)
    }

    fn key_refresh(&self, dry_run: bool) -> Result<RefreshReport, Fault> {
        let shared = self.store.shared();
        if shared.read_only && !dry_run {
            return Err(Fault::store(&self.backing, &StoreError::ReadOnly));
        }
        let roots = shared.keys.refresh(&shared.backing, dry_run).map_err(|e| Fault::store(&self.backing, &e))?;
        Ok(RefreshReport::new(dry_run, shared.keys.snapshot().generation, roots))
    }

    /// The provider of `uri`; with `create`, a key file that is not there is made. The daemon has no terminal: a passphrase comes with the request or not at all.
    fn connect_to(
        &self,
        uri: &RootKeyUri,
        passphrase: Option<&Hidden>,
        create: bool,
    ) -> Result<Arc<dyn KeyProvider>, Fault> {
        let fixed = passphrase.map(|p| PassphraseSource::Fixed(Zeroizing::new(p.expose().as_bytes().to_vec())));
        let o = ConnectOptions { passphrase: fixed, services: self.services.clone(), ..Default::default() };
        crate::kms::connect(uri, &self.observed.connect(&o), create).map_err(|e| Fault::kms(&uri.to_string(), &e))
    }

    /// What a run is asked to do.
    fn rotate_options(&self, r: &RotateRequest) -> Result<rotation::Options, Fault> {
        let uris = open::parse(&r.keys)?;
        let root = uris.iter().map(|u| self.connect_to(u, r.passphrase.as_ref(), false)).collect::<Result<_, _>>()?;
        let waive = rotation::Waivers::new(r.waive.iter().map(String::as_str));
        Ok(rotation::Options {
            kek: r.kek,
            root,
            rate: r.rate,
            full_speed: r.full_speed,
            jobs: r.jobs,
            patience: Duration::from_secs(r.patience),
            if_older_than: r.if_older_than,
            dry_run: r.dry_run,
            destroy_old: r.destroy_old,
            waive: Arc::new(waive.map_err(|e| Fault::new(FaultKind::Usage, format!("waivers: {e}")))?),
            restart: r.restart,
            staged: r.staged,
            shard: None,
        })
    }
}

fn kek_id(id: &str) -> Result<KekId, Fault> {
    id.parse().map_err(|e| Fault::new(FaultKind::Usage, format!("KEK id: {e}")))
}

/// Where a passphrase comes from that no request brought: nobody can be asked, even if the daemon has a terminal.
fn not_asked() -> PassphraseSource {
    match passphrase::credential(passphrase::CREDENTIAL) {
        Some(path) if path.exists() => PassphraseSource::SystemdCredential(passphrase::CREDENTIAL.into()),
        _ => PassphraseSource::Prompt(Arc::new(|_| Err(io::Error::other("none came with the request")))),
    }
}
