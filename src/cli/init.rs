//! `init`: a new store.

use super::args::{InitArgs, KekKindArg};
use super::{output, recovery, root_keys};
use crate::backing::posix::Posix;
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::open;
use crate::kms;
use crate::store::Store;
use crate::store::keys::{COPIES, StoreFlags};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

/// Runs the subcommand.
///
/// # Errors
/// [`FaultKind::NotEmpty`]; root keys; the kernel's.
pub fn run(a: &InitArgs) -> Result<(), Fault> {
    let given = if a.key.keys.is_empty() { vec!["passphrase:".to_string()] } else { a.key.keys.clone() };
    let uris = open::parse(&given)?;
    if a.recovery_key && a.kek == KekKindArg::External {
        let text = "--recovery-key: a recovery key does not open files under an external KEK; use --kek sealed";
        return Err(Fault::new(FaultKind::Usage, text));
    }
    make_directory(&a.backing)?;
    refuse_unless_empty(&a.backing)?;
    let b = Posix::open(&a.backing).map_err(|e| Fault::io("open", &a.backing, &e))?;
    let connect = root_keys::connect_options(&a.key.access)?;
    let (mut said, mut roots) = (String::new(), Vec::new());
    for u in &uris {
        let made = root_keys::made(u);
        roots.push(kms::connect(u, &connect, true).map_err(|e| Fault::kms(&u.to_string(), &e))?);
        said += &made;
    }
    let recovery = if a.recovery_key { Some(recovery::new()?) } else { None };
    if let Some((key, _)) = &recovery {
        roots.push(key.clone());
    }
    let flags = StoreFlags { plaintext_names: a.plaintext_names };
    let id = Store::init(&b, &roots, a.kek.into(), flags).map_err(|e| Fault::store(&a.backing, &e))?;
    said += &format!("made store {id} in {}\n", a.backing.display());
    output::print(&said)?;
    match (recovery, roots.as_slice()) {
        (Some((_, text)), _) => recovery::show(&text).map_err(|f| {
            let text = format!("{}: nobody has seen the recovery key: key remove it and key add another", f.message);
            Fault::new(f.kind, text)
        }),
        (None, [_]) => {
            eprintln!(
                "envelopefs: this store has one root key: if that is lost so are the files; add a second one (envelopefs key \
                 add {} recovery:)",
                a.backing.display()
            );
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The last component is made if it is not there.
fn make_directory(path: &Path) -> Result<(), Fault> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(Fault::io("make", path, &e)),
    }
}

/// Before any passphrase is asked for; [`Store::init`] looks again.
fn refuse_unless_empty(path: &Path) -> Result<(), Fault> {
    let fail = |e: io::Error| Fault::io("read", path, &e);
    for e in std::fs::read_dir(path).map_err(fail)? {
        let name = e.map_err(fail)?.file_name();
        // What an init that failed or was killed left there holds no keyring.
        let keyring = |name: &&str| path.join(".envelopefs").join(name).symlink_metadata().is_ok();
        if name == ".envelopefs" && !COPIES.iter().any(keyring) {
            continue;
        }
        if name == ".envelopefs" {
            return Err(Fault::new(FaultKind::NotEmpty, format!("{} holds a store already", path.display())));
        }
        if name != "lost+found" {
            return Err(Fault::new(FaultKind::NotEmpty, format!("{} is not empty", path.display())));
        }
    }
    Ok(())
}
