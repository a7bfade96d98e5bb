//! `mount`: puts together what is to be mounted from the command line, fstab and the configuration, in this order of
//! precedence, and mounts it in the foreground or in a daemon of its own.

use super::args::MountArgs;
use super::config::{Config, StoreConfig};
use super::exit::Exit;
use super::options::{self, Helper, Options};
use super::{audit, root_keys};
use crate::daemon::fault::{Fault, FaultKind, plain};
use crate::daemon::keys::KeyRules;
use crate::daemon::metrics::listen;
use crate::daemon::ready::Sender;
use crate::daemon::run::{self, Plan};
use crate::daemon::{log, mounts, spawn};
use crate::fuse::MountOptions;
use crate::kms::ConnectOptions;
use crate::store::dek_cache::DekCacheLimits;
use crate::store::keys::authority::Policy;
use rustix::mount::MountFlags;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Keys kept ready for files to come, unless the configuration says otherwise.
pub(super) const DEK_POOL: usize = 64;
/// Files of a directory whose keys are unwrapped ahead, unless the configuration says otherwise.
pub(super) const PREFETCH: usize = 32;

/// Runs the subcommand; `argv` is what followed `mount` on the command line, for the child. The child itself returns its
/// exit code and no fault: whoever started it has the fault from the pipe, and tells it.
///
/// # Errors
/// Why there is no mount, from whichever process found out.
pub fn run(a: MountArgs, argv: &[OsString]) -> Result<Exit, Fault> {
    match (a.foreground, a.ready_fd) {
        (true, _) => run::run(plan(a, false)?, &mut Sender::none())?,
        (false, None) => spawn::start(OsStr::new("mount"), argv)?,
        (false, Some(fd)) => {
            let mut ready = Sender::inherited(fd)
                .ok_or_else(|| Fault::new(FaultKind::Usage, "--ready-fd names no open descriptor"))?;
            if let Err(f) = plan(a, true).and_then(|p| run::run(p, &mut ready)) {
                ready.failed(&f);
                return Ok(f.kind.into());
            }
        }
    }
    Ok(Exit::Done)
}

/// `mount-helper`: what mount(8) calls.
///
/// # Errors
/// As [`run`]; of remounting.
pub fn helper(args: &[String]) -> Result<(), Fault> {
    match options::parse_helper(args, rustix::process::geteuid().is_root())? {
        Helper::Nothing => Ok(()),
        Helper::Remount { mountpoint, options } => remount(Path::new(&mountpoint), &options),
        Helper::Mount(argv) => {
            let argv: Vec<OsString> = argv.into_iter().map(OsString::from).collect();
            spawn::start(OsStr::new("mount"), &argv)
        }
    }
}

/// Changes the flags of a mount that is there. What the daemon was started with stays: a store mounted read-only is
/// opened read-only, so it has to be mounted anew to be written to.
fn remount(mountpoint: &Path, o: &Options) -> Result<(), Fault> {
    let at = mounts::resolve(mountpoint).map_err(|e| Fault::io("look at", mountpoint, &e))?;
    let there = mounts::at(&at).map_err(|e| Fault::io("look at", &at, &e))?.filter(mounts::Mount::is_ours);
    if there.is_none() {
        return Err(Fault::new(FaultKind::NotMounted, format!("no envelopefs is mounted at {}", at.display())));
    }
    if o.read_only == Some(false) {
        let place = super::place::Place::find(&at)?;
        let read_only = match place.connect()?.map(|c| c.ask(&crate::daemon::protocol::Request::Status, |_| {})) {
            Some(Ok(crate::daemon::protocol::Reply::Status(s))) => s.read_only,
            _ => false,
        };
        if read_only {
            let text = format!("the store at {} was mounted read-only; unmount it and mount it again", at.display());
            return Err(Fault::new(FaultKind::Usage, text));
        }
    }
    let mut flags = MountFlags::empty();
    flags.set(MountFlags::RDONLY, o.read_only == Some(true));
    for (word, flag) in [
        ("nosuid", MountFlags::NOSUID),
        ("nodev", MountFlags::NODEV),
        ("noexec", MountFlags::NOEXEC),
        ("noatime", MountFlags::NOATIME),
        ("nodiratime", MountFlags::NODIRATIME),
        ("sync", MountFlags::SYNCHRONOUS),
        ("dirsync", MountFlags::DIRSYNC),
    ] {
        flags.set(flag, o.pass.iter().any(|w| w == word));
    }
    rustix::mount::mount_remount(&at, flags, c"").map_err(|e| Fault::io("remount", &at, &e.into()))
}

/// Everything that was said about the mount, put together.
fn plan(mut a: MountArgs, background: bool) -> Result<Plan, Fault> {
    let mut o = options::parse(&a.options)?;
    ours(&mut a, &mut o)?;
    let config = Config::load(a.key.access.config.as_deref())?;
    let table = config.store.get(&a.store).filter(|_| !a.store.contains('/'));
    if let Some(t) = table {
        merge(&mut a, &mut o, t)?;
    }
    let backing = table.map_or_else(|| PathBuf::from(&a.store), |t| t.backing.clone());
    let backing = std::fs::canonicalize(&backing).map_err(|e| not_a_store(&backing, &e))?;
    let mountpoint = mountpoint(a.mountpoint.as_deref(), &backing)?;
    let d = &config.defaults;
    let level = match (&a.log_level, &d.log_level) {
        (Some(l), _) => *l,
        (None, Some(text)) => level(text)?,
        (None, None) => tracing::Level::INFO,
    };
    let log = match a.log_file.as_ref().or(d.log_file.as_ref()) {
        Some(f) => log::Target::file(f).map_err(|e| Fault::io("open the log file", f, &e))?,
        None if background => log::Target::System,
        None => log::Target::Stderr,
    };
    let audit = audit::options(a.audit_log.as_deref(), &config, table)?;
    if let Some(o) = &audit {
        audit::refuse_inside("audit log", &o.path, &[&mountpoint, &backing])?;
    }
    let metrics = a.metrics_listen.as_ref().or(d.metrics_listen.as_ref());
    let metrics = metrics.map(|at| listen::address(at)).transpose()?;
    let mut mount = MountOptions::new(mountpoint);
    mount.read_only = a.read_only || o.read_only == Some(true);
    mount.allow_other = a.allow_other || o.allow_other;
    // The kernel's list of mounts is where the store is looked up again.
    let name = backing.to_str().ok_or_else(|| {
        Fault::new(FaultKind::Usage, format!("the path of the backing directory {} is not UTF-8", backing.display()))
    })?;
    mount.fs_name = name.to_string();
    mount.options = o.pass;
    mount.threads = a.threads.or(d.threads).map(usize::from);
    let recovery = root_keys::recovery_source(&a.recovery);
    let connect = ConnectOptions { recovery, ..root_keys::connect_with(&a.key.access, &config) };
    Ok(Plan {
        backing,
        keys: a.key.keys,
        connect,
        dek_cache: limits(&config),
        dek_pool: d.dek_pool.unwrap_or(DEK_POOL),
        prefetch: d.prefetch.unwrap_or(PREFETCH),
        key_rules: key_rules(&config, table),
        mount,
        log,
        log_level: level,
        background,
        audit,
        metrics,
    })
}

fn not_a_store(path: &Path, e: &std::io::Error) -> Fault {
    match e.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
            Fault::new(FaultKind::NotAStore, format!("{} is not an envelopefs store: {}", path.display(), plain(e)))
        }
        _ => Fault::io("look at", path, e),
    }
}

/// Options after `-o` that have a long form; the long form wins.
fn ours(a: &mut MountArgs, o: &mut Options) -> Result<(), Fault> {
    for (name, value) in std::mem::take(&mut o.ours) {
        let path = || Some(PathBuf::from(&value));
        match name.as_str() {
            "key" => a.key.keys.push(value),
            "passphrase_file" => a.key.access.passphrase_file = a.key.access.passphrase_file.take().or(path()),
            "passphrase_command" => a.key.access.passphrase_command = Some(value),
            "pkcs11_module" => a.key.access.pkcs11_module = a.key.access.pkcs11_module.take().or(path()),
            "config" => a.key.access.config = a.key.access.config.take().or(path()),
            "log_file" => a.log_file = a.log_file.take().or(path()),
            "log_level" => a.log_level = Some(level(&value)?),
            "audit_log" => a.audit_log = a.audit_log.take().or(path()),
            "metrics_listen" => a.metrics_listen = a.metrics_listen.take().or(Some(value)),
            _ => {
                let n = value.parse().ok().filter(|n| (1..=256).contains(n));
                let bad = || Fault::new(FaultKind::Usage, format!("mount option {name}={value} is not valid"));
                a.threads = Some(n.ok_or_else(bad)?);
            }
        }
    }
    Ok(())
}

fn level(text: &str) -> Result<tracing::Level, Fault> {
    text.parse().map_err(|_| Fault::new(FaultKind::Usage, format!("log level {text:?} is not known")))
}

/// What the configuration says where the command line said nothing.
fn merge(a: &mut MountArgs, o: &mut Options, t: &StoreConfig) -> Result<(), Fault> {
    let c = options::parse(&t.options)?;
    if !c.ours.is_empty() || c.remount {
        let text =
            "in the configuration, options hold the kernel's mount options only; the others have keys of their own";
        return Err(Fault::new(FaultKind::Config, text));
    }
    o.read_only = o.read_only.or(c.read_only).or(t.read_only.then_some(true));
    o.allow_other |= c.allow_other || t.allow_other;
    o.pass.splice(0..0, c.pass);
    a.mountpoint = a.mountpoint.take().or_else(|| t.mountpoint.clone());
    if a.key.keys.is_empty() {
        a.key.keys.clone_from(&t.keys);
    }
    if a.key.access.passphrase_file.is_none() && a.key.access.passphrase_command.is_none() {
        a.key.access.passphrase_file.clone_from(&t.passphrase_file);
        a.key.access.passphrase_command.clone_from(&t.passphrase_command);
    }
    a.log_file = a.log_file.take().or_else(|| t.log_file.clone());
    a.threads = a.threads.or(t.threads);
    a.metrics_listen = a.metrics_listen.take().or_else(|| t.metrics_listen.clone());
    Ok(())
}

fn limits(c: &Config) -> DekCacheLimits {
    let (given, usual) = (&c.defaults.dek_cache, DekCacheLimits::default());
    DekCacheLimits {
        entries: given.entries.unwrap_or(usual.entries),
        age: given.max_age.map_or(usual.age, Duration::from_secs),
        idle: given.max_idle.map_or(usual.idle, Duration::from_secs),
    }
}

/// How the key service's word counts; what a store says goes before the defaults.
fn key_rules(c: &Config, t: Option<&StoreConfig>) -> KeyRules {
    let (d, usual) = (&c.defaults, Policy::default());
    let refresh = t.and_then(|t| t.refresh).or(d.refresh);
    let grace = t.and_then(|t| t.offline_grace).or(d.offline_grace);
    KeyRules {
        policy: Policy {
            refresh: refresh.map_or(usual.refresh, Duration::from_secs),
            offline_grace: grace.map_or(usual.offline_grace, Duration::from_secs),
        },
        on_denied: t.and_then(|t| t.on_denied).or(d.on_denied).unwrap_or_default(),
    }
}

/// The mount point, resolved: an existing directory (or a dead mount) that neither lies in the backing directory nor
/// hides it.
fn mountpoint(given: Option<&Path>, backing: &Path) -> Result<PathBuf, Fault> {
    let bad = |text: String| Fault::new(FaultKind::MountPoint, text);
    let Some(given) = given else {
        return Err(Fault::new(FaultKind::Usage, "a mount point is needed, here or in the configuration"));
    };
    let at = mounts::resolve(given).map_err(|e| bad(format!("mount point {}: {}", given.display(), plain(&e))))?;
    if !mounts::is_dead(&at) && !at.is_dir() {
        return Err(bad(format!("mount point {} is not a directory", given.display())));
    }
    if mounts::overlap(&at, backing) {
        let text = format!("mount point {} and backing directory {} overlap", given.display(), backing.display());
        return Err(bad(text));
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Cli, Command};
    use crate::daemon::keys::OnDenied;
    use clap::Parser;
    use std::os::unix::fs::DirBuilderExt;

    fn planned(words: &[&str]) -> Result<Plan, Fault> {
        match Cli::try_parse_from(["envelopefs", "mount"].iter().chain(words)).unwrap().command {
            Command::Mount(a) => plan(a, false),
            _ => unreachable!(),
        }
    }

    #[test]
    fn the_command_line_wins_over_the_configuration() {
        let d = tempfile::tempdir().unwrap();
        let p = |n: &str| d.path().join(n).display().to_string();
        for n in ["back", "mnt", "other"] {
            std::fs::DirBuilder::new().mode(0o700).create(p(n)).unwrap();
        }
        let text = format!(
            "[defaults]\nthreads = 3\nrefresh = 60\noffline_grace = 0\n[defaults.dek_cache]\nentries = 7\n[store.s]\nbacking = {:?}\nmountpoint = {:?}\n\
             keys = [\"keyfile:/k\"]\nrefresh = 7\non_denied = \"drop\"\nread_only = true\noptions = [\"noatime\"]\n",
            p("back"),
            p("mnt")
        );
        std::fs::write(p("c.toml"), text).unwrap();
        let c = p("c.toml");
        let plan = planned(&["s", "--config", &c]).unwrap();
        assert!(plan.mount.read_only && plan.mount.mountpoint.ends_with("mnt"));
        assert_eq!((plan.mount.threads, plan.dek_cache.entries), (Some(3), 7));
        let policy = Policy { refresh: Duration::from_secs(7), offline_grace: Duration::ZERO };
        assert_eq!(plan.key_rules, KeyRules { policy, on_denied: OnDenied::Drop });
        assert_eq!((plan.keys, plan.mount.options), (vec!["keyfile:/k".into()], vec!["noatime".into()]));
        let other = p("other");
        let plan = planned(&["s", &other, "-o", "rw,nosuid,key=keyfile:/q", "--config", &c, "--threads", "9"]).unwrap();
        assert!(!plan.mount.read_only && plan.mount.mountpoint.ends_with("other"));
        assert_eq!(plan.mount.threads, Some(9));
        assert_eq!(plan.keys, ["keyfile:/q"]);
        assert_eq!(plan.mount.options, ["noatime", "nosuid"]);
    }

    #[test]
    fn bad_mount_points_are_refused() {
        let d = tempfile::tempdir().unwrap();
        let p = |n: &str| d.path().join(n).display().to_string();
        std::fs::create_dir_all(p("back/inside")).unwrap();
        std::fs::create_dir(p("back/inside/x")).unwrap();
        std::fs::write(p("file"), "").unwrap();
        std::fs::write(p("c.toml"), "").unwrap();
        for (at, kind) in [
            (p("missing"), FaultKind::MountPoint),
            (p("file"), FaultKind::MountPoint),
            (p("back"), FaultKind::MountPoint),
            (p("back/inside"), FaultKind::MountPoint),
            (p(""), FaultKind::MountPoint),
        ] {
            assert_eq!(planned(&[&p("back"), &at, "--config", &p("c.toml")]).unwrap_err().kind, kind, "{at}");
        }
        assert_eq!(planned(&[&p("back"), "--config", &p("c.toml")]).unwrap_err().kind, FaultKind::Usage);
        assert_eq!(planned(&[&p("no"), &p("back"), "--config", &p("c.toml")]).unwrap_err().kind, FaultKind::NotAStore);
    }
}
