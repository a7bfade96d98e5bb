//! Mount options after `-o`, on the command line and in `/etc/fstab`.

use crate::daemon::fault::{Fault, FaultKind};

/// What the options say.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    pub read_only: Option<bool>,
    pub allow_other: bool,
    /// Change the flags of what is mounted already.
    pub remount: bool,
    /// For the kernel.
    pub pass: Vec<String>,
    /// Ours, with their values, in order: `key`, `passphrase_file`, `passphrase_command`, `pkcs11_module`, `config`,
    /// `log_file`, `log_level`, `audit_log`, `metrics_listen`, `threads`.
    pub ours: Vec<(String, String)>,
}

/// Flags the kernel knows.
const PASSED: [&str; 19] = [
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "exec",
    "noexec",
    "atime",
    "noatime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "lazytime",
    "nolazytime",
    "sync",
    "async",
    "dirsync",
    "diratime",
    "nodiratime",
];
/// Options that mean something to mount(8) or systemd only.
const IGNORED: [&str; 13] = [
    "defaults",
    "auto",
    "noauto",
    "user",
    "users",
    "nouser",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "default_permissions",
    "silent",
    "loud",
];
const OURS: [&str; 10] = [
    "key",
    "passphrase_file",
    "passphrase_command",
    "pkcs11_module",
    "config",
    "log_file",
    "log_level",
    "audit_log",
    "metrics_listen",
    "threads",
];

/// Reads a list of options, already split at commas.
///
/// # Errors
/// [`FaultKind::Usage`] on one that is neither known nor harmless.
pub fn parse<S: AsRef<str>>(list: &[S]) -> Result<Options, Fault> {
    let mut o = Options::default();
    for word in list.iter().map(AsRef::as_ref) {
        let (name, value) = word.split_once('=').map_or((word, None), |(n, v)| (n, Some(v)));
        match (name, value) {
            ("", None) => {}
            ("ro", None) => o.read_only = Some(true),
            ("rw", None) => o.read_only = Some(false),
            ("allow_other", None) => o.allow_other = true,
            ("remount", None) => o.remount = true,
            (n, None) if PASSED.contains(&n) => o.pass.push(n.to_string()),
            (n, Some(v)) if OURS.contains(&n) => o.ours.push((n.to_string(), v.to_string())),
            (n, _) if IGNORED.contains(&n) || n.starts_with("x-") || n.starts_with("X-") || n == "comment" => {}
            _ => return Err(Fault::new(FaultKind::Usage, format!("mount option {word:?} is not known"))),
        }
    }
    Ok(o)
}

/// What mount(8) asks of its helper.
#[derive(Debug, PartialEq, Eq)]
pub enum Helper {
    /// The arguments of `envelopefs mount`.
    Mount(Vec<String>),
    /// New flags for what is mounted at this place.
    Remount { mountpoint: String, options: Options },
    /// `-f`: pretend only.
    Nothing,
}

/// Reads the arguments of `mount.fuse.envelopefs SPEC DIR [-sfnv] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]`.
///
/// mount(8) leaves `suid` and `dev` out, as they are its defaults, so they are meant where their opposites are not said.
/// Only root may have them; for others mount(8) has said `nosuid,nodev` itself.
///
/// # Errors
/// [`FaultKind::Usage`].
pub fn parse_helper(args: &[String], is_root: bool) -> Result<Helper, Fault> {
    let (mut places, mut fake) = (Vec::new(), false);
    let mut list = if is_root { vec!["suid", "dev"] } else { Vec::new() };
    let mut rest = args.iter();
    while let Some(a) = rest.next() {
        match a.as_str() {
            "-o" => list.extend(rest.next().into_iter().flat_map(|v| v.split(','))),
            "-t" | "-N" => drop(rest.next()),
            _ if a.starts_with("-o") => list.extend(a[2..].split(',')),
            _ if a.starts_with('-') && a.len() > 1 && a[1..].chars().all(|c| "sfnvrw".contains(c)) => {
                fake |= a.contains('f');
                list.extend(a.contains('r').then_some("ro"));
            }
            _ if a.starts_with('-') => return Err(Fault::new(FaultKind::Usage, format!("option {a:?} is not known"))),
            _ => places.push(a.clone()),
        }
    }
    let options = parse(&list)?;
    let [store, mountpoint] = <[String; 2]>::try_from(places)
        .map_err(|_| Fault::new(FaultKind::Usage, "a backing directory and a mount point are needed"))?;
    if fake {
        return Ok(Helper::Nothing);
    }
    if options.remount {
        return Ok(Helper::Remount { mountpoint, options });
    }
    let mut argv = Vec::new();
    for o in list.into_iter().filter(|o| !o.is_empty()) {
        argv.extend(["-o".to_string(), o.to_string()]);
    }
    argv.extend(["--".to_string(), store, mountpoint]);
    Ok(Helper::Mount(argv))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn helper(line: &str) -> Result<Helper, Fault> {
        parse_helper(&line.split(' ').map(str::to_string).collect::<Vec<_>>(), false)
    }

    #[test]
    fn suid_and_dev_which_mount_leaves_out_are_meant_when_root_mounts() {
        let argv = |line: &str| match parse_helper(&line.split(' ').map(str::to_string).collect::<Vec<_>>(), true) {
            Ok(Helper::Mount(argv)) => argv.join(" "),
            other => panic!("{other:?}"),
        };
        assert_eq!(argv("/srv/x /mnt -o rw"), "-o suid -o dev -o rw -- /srv/x /mnt");
        // The last one counts.
        assert_eq!(argv("/srv/x /mnt -o rw,nosuid"), "-o suid -o dev -o rw -o nosuid -- /srv/x /mnt");
    }

    #[test]
    fn options_are_sorted_by_who_they_are_for() {
        let o = parse(&["ro", "allow_other", "suid", "nofail", "x-systemd.automount", "key=keyfile:/k=1", "user=joe"]);
        let o = o.unwrap();
        assert_eq!((o.read_only, o.allow_other), (Some(true), true));
        assert_eq!(o.pass, ["suid"]);
        assert_eq!(o.ours, [("key".to_string(), "keyfile:/k=1".to_string())]);
        assert!(parse(&["bogus"]).unwrap_err().message.contains("bogus"));
        assert!(parse(&["fsname=x"]).is_err());
    }

    #[test]
    fn fstab_lines_become_mount_commands() {
        assert_eq!(
            helper("/srv/x /mnt -o rw,allow_other,key=keyfile:/k -t fuse.envelopefs").unwrap(),
            Helper::Mount(
                ["-o", "rw", "-o", "allow_other", "-o", "key=keyfile:/k", "--", "/srv/x", "/mnt"]
                    .map(String::from)
                    .to_vec()
            )
        );
        assert_eq!(helper("/srv/x /mnt -fn -o rw").unwrap(), Helper::Nothing);
        assert!(matches!(helper("/srv/x /mnt -o remount,ro").unwrap(), Helper::Remount { mountpoint, options }
            if mountpoint == "/mnt" && options.read_only == Some(true)));
        assert!(helper("/srv/x").is_err());
        assert!(helper("/srv/x /mnt --bogus").is_err());
        assert!(helper("/srv/x /mnt -o bogus").is_err());
    }
}
