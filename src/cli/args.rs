//! The command line, as clap reads it. Help texts here are what users and the manual page show.

use crate::format::ids::KekId;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

/// Transparent encryption of a directory: one wrapped key per file, key rotation in place.
#[derive(Debug, Parser)]
#[command(name = "envelopefs", version, max_term_width = 110, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a new store in an empty directory
    Init(InitArgs),
    /// Mount a store
    Mount(MountArgs),
    /// Unmount, and wait until everything is written back
    Unmount(UnmountArgs),
    /// Drop every key of a mounted store now: files give ENOKEY until unlock
    Lock(LockArgs),
    /// Bring the keys of a locked store back
    Unlock(UnlockArgs),
    /// Say what a store is and how it stands
    Status(StatusArgs),
    /// Re-wrap every file's key under a new KEK, mounted or not
    Rotate(RotateArgs),
    /// Give files new keys and encrypt their content anew, for when a key may have leaked
    Rekey(RekeyArgs),
    /// List, add, remove and refresh root keys; destroy KEKs and close them for trial; export and import the keyring; check reports
    #[command(subcommand)]
    Key(KeyCommand),
    /// Look for damage
    Check(CheckArgs),
    /// Check an audit log
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Print the figures of a mounted store for monitoring, as Prometheus text
    Metrics(MetricsArgs),
    /// Say in words what the header of a file in the backing directory holds; needs no key
    Inspect(InspectArgs),
    /// Measure the ciphers on this machine
    Speed(SpeedArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
    /// What mount(8) calls as mount.fuse.envelopefs
    #[command(hide = true, disable_help_flag = true)]
    MountHelper {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, num_args = 0..)]
        args: Vec<String>,
    },
}

/// Where root keys are looked for.
#[derive(Debug, Args, Default, Clone)]
pub struct KeySource {
    /// Root key: passphrase:, keyfile:/PATH, aws-kms://…, gcp-kms://…, vault://MOUNT/KEY, pkcs11:…; repeat for several. Replaces what the keyring records
    #[arg(long = "key", value_name = "URI")]
    pub keys: Vec<String>,
    #[command(flatten)]
    pub access: AccessArgs,
}

/// How to get at root keys: where a passphrase comes from (without any of these, from the terminal), and the
/// configuration that says where key services are.
#[derive(Debug, Args, Default, Clone)]
pub struct AccessArgs {
    /// Read the passphrase from FILE; one newline at the end is left out
    #[arg(long, value_name = "FILE", conflicts_with = "passphrase_command")]
    pub passphrase_file: Option<PathBuf>,
    /// Read the passphrase from what COMMAND (run by sh) prints
    #[arg(long, value_name = "COMMAND")]
    pub passphrase_command: Option<String>,
    /// PKCS#11 library of the token that holds pkcs11: root keys
    #[arg(long, value_name = "FILE")]
    pub pkcs11_module: Option<PathBuf>,
    /// Configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// The recovery key, for when no other root key opens the store. Never used without one of these.
#[derive(Debug, Args, Default, Clone)]
pub struct RecoveryArgs {
    /// Open the store (an unmounted one, or one to be unlocked) with its recovery key, asked for on the terminal
    #[arg(long, conflicts_with = "recovery_file")]
    pub recovery: bool,
    /// Open the store (an unmounted one, or one to be unlocked) with the recovery key in FILE
    #[arg(long, value_name = "FILE")]
    pub recovery_file: Option<PathBuf>,
}

/// What opens a store that is about to get or lose root keys.
#[derive(Debug, Args, Default, Clone)]
pub struct OpenKeys {
    /// Root key that opens the store now (unmounted stores). Without: those of the keyring
    #[arg(long = "open-key", value_name = "URI")]
    pub open_keys: Vec<String>,
    #[command(flatten)]
    pub recovery: RecoveryArgs,
    #[command(flatten)]
    pub access: AccessArgs,
}

/// Who agrees to what cannot be undone, in a store that asks for more than one (`key policy --quorum`).
#[derive(Debug, Args, Default, Clone)]
pub struct ConfirmArgs {
    /// Another root key of the store that confirms this, besides the one that opens the store; repeat for several
    #[arg(long, value_name = "URI")]
    pub confirm: Vec<String>,
    /// Read the passphrase of a passphrase: root key after --confirm from FILE; without: as the one that opens the store
    #[arg(long, value_name = "FILE", requires = "confirm")]
    pub confirm_passphrase_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KekKindArg {
    /// A random key wrapped by the root keys: opening a file calls no key service
    Sealed,
    /// The key in the provider itself: every file opened is a call to it
    External,
}

impl From<KekKindArg> for crate::format::keyring::KekKind {
    fn from(k: KekKindArg) -> Self {
        match k {
            KekKindArg::Sealed => Self::Sealed,
            KekKindArg::External => Self::External,
        }
    }
}

#[derive(Debug, Args)]
pub struct InitArgs {
    /// Directory for the ciphertext; made if it is not there
    pub backing: PathBuf,
    #[command(flatten)]
    pub key: KeySource,
    /// Kind of the first KEK
    #[arg(long, value_enum, default_value = "sealed")]
    pub kek: KekKindArg,
    /// Leave file names as they are
    #[arg(long)]
    pub plaintext_names: bool,
    /// Make a recovery key too, and print it, once
    #[arg(long)]
    pub recovery_key: bool,
}

#[derive(Debug, Args)]
pub struct MountArgs {
    /// Backing directory, or the name of a [store.NAME] table in the configuration
    #[arg(value_name = "BACKING|NAME")]
    pub store: String,
    /// Where to mount; may be left out if the configuration says
    pub mountpoint: Option<PathBuf>,
    /// Stay in the foreground, log to standard error, notify systemd
    #[arg(long)]
    pub foreground: bool,
    /// Mount read-only
    #[arg(long)]
    pub read_only: bool,
    /// Let other users use the mount
    #[arg(long)]
    pub allow_other: bool,
    /// Mount options as in fstab, separated by commas
    #[arg(short = 'o', value_name = "OPT", value_delimiter = ',')]
    pub options: Vec<String>,
    #[command(flatten)]
    pub key: KeySource,
    #[command(flatten)]
    pub recovery: RecoveryArgs,
    /// Log to FILE, not to the system log
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Log what is at least this grave: error, warn, info, debug, trace
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<tracing::Level>,
    /// Write a line for each use and change of keys to FILE; {store} in it stands for the store's id
    #[arg(long, value_name = "FILE")]
    pub audit_log: Option<PathBuf>,
    /// Serve metrics over HTTP at ADDR, such as 127.0.0.1:9464; loopback addresses only
    #[arg(long, value_name = "ADDR")]
    pub metrics_listen: Option<String>,
    /// FUSE threads
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: Option<u16>,
    /// The background daemon's end of the readiness pipe
    #[arg(long, hide = true, value_name = "FD")]
    pub ready_fd: Option<i32>,
}

#[derive(Debug, Args)]
pub struct UnmountArgs {
    pub mountpoint: PathBuf,
}

#[derive(Debug, Args)]
pub struct LockArgs {
    /// Mount point, or backing directory of a mounted store
    #[arg(value_name = "MOUNTPOINT|BACKING")]
    pub target: PathBuf,
}

#[derive(Debug, Args)]
pub struct UnlockArgs {
    /// Mount point, or backing directory of a mounted store
    #[arg(value_name = "MOUNTPOINT|BACKING")]
    pub target: PathBuf,
    #[command(flatten)]
    pub key: KeySource,
    #[command(flatten)]
    pub recovery: RecoveryArgs,
}

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Mount point or backing directory
    #[arg(value_name = "MOUNTPOINT|BACKING")]
    pub target: PathBuf,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// What rotate and rekey have in common: work that a daemon does and that can be steered.
#[derive(Debug, Args)]
pub struct WorkArgs {
    /// Take no heed of what users of the store wait meanwhile; without: as fast as they hardly feel it
    #[arg(long)]
    pub full_speed: bool,
    /// Count what would be done, change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Leave the work to the daemon and return
    #[arg(long, conflicts_with = "steer")]
    pub detach: bool,
    /// Pause what is under way
    #[arg(long, group = "steer")]
    pub pause: bool,
    /// Let what is paused go on
    #[arg(long, group = "steer")]
    pub resume: bool,
    /// Stop what is under way; a later run of the same command finishes it
    #[arg(long, group = "steer")]
    pub cancel: bool,
    /// Say how what is under way stands, or how the last run ended
    #[arg(long, group = "steer")]
    pub status: bool,
}

#[derive(Debug, Args)]
pub struct RotateArgs {
    /// Mount point or backing directory
    #[arg(value_name = "MOUNTPOINT|BACKING")]
    pub target: PathBuf,
    /// Root key for the new KEK, as for mount; repeat for several. Without: those of the keyring
    #[arg(long = "key", value_name = "URI")]
    pub keys: Vec<String>,
    #[command(flatten)]
    pub open: OpenKeys,
    /// Read the passphrase of a passphrase: root key after --key from FILE; without: as the one that opens the store
    #[arg(long, value_name = "FILE")]
    pub new_passphrase_file: Option<PathBuf>,
    /// Kind of the new KEK; without: as the present one
    #[arg(long, value_enum)]
    pub kek: Option<KekKindArg>,
    /// At most N files a second
    #[arg(long, value_name = "N")]
    pub rate: Option<NonZeroU32>,
    #[command(flatten)]
    pub work: WorkArgs,
    /// N worker threads, for the sweep and for the scan
    #[arg(long, value_name = "N")]
    pub jobs: Option<NonZeroUsize>,
    /// Wait up to SECONDS for a key service that stops answering, before files count as failed
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub patience: u64,
    /// Do nothing unless the active KEK has been in use for AGE, such as 90d, 12h, 30m or 45s, or a rotation is unfinished
    #[arg(long, value_name = "AGE", value_parser = age)]
    pub if_older_than: Option<u64>,
    /// Make a new KEK even though an earlier rotation is unfinished; without: finish that one
    #[arg(long)]
    pub restart: bool,
    /// Be complete although what FILE lists fails: a path a line, as a report's failures name it
    #[arg(long, value_name = "FILE", conflicts_with = "steer")]
    pub waive: Option<PathBuf>,
    /// Destroy the old KEK once no header names it
    #[arg(long)]
    pub destroy_old: bool,
    /// Write a report to FILE, sealed with the store's key, also if the rotation is cancelled or incomplete
    #[arg(long, value_name = "FILE", conflicts_with = "steer")]
    pub report: Option<PathBuf>,
    /// Write a copy of the keyring with the new KEK to FILE before the new KEK is used; an older copy of this store's is replaced
    #[arg(long, value_name = "FILE", conflicts_with_all = ["steer", "dry_run"])]
    pub export: Option<PathBuf>,
    /// Move the K-th of N shares of the files, on one of N machines that share the file system of a store that is not mounted, or only read-only
    #[arg(long, value_name = "K/N", conflicts_with_all = ["steer", "detach", "dry_run", "restart", "destroy_old", "waive", "keys", "merge"])]
    pub shard: Option<crate::rotation::Shard>,
    /// End a rotation that --shard runs have done, from their reports in the store or in FILEs
    #[arg(long, value_name = "FILE", num_args = 0.., conflicts_with_all = ["steer", "detach", "dry_run", "restart", "destroy_old", "waive", "export", "keys", "kek", "if_older_than"])]
    pub merge: Option<Vec<PathBuf>>,
    /// One JSON object at the end
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct RekeyArgs {
    /// Files and directories of one mounted store; directories with all that is in them. With --status, --pause, --resume and --cancel: anything in the store, or its backing directory
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<PathBuf>,
    /// Only files whose content was last changed before DATE, such as 2026-11-24 or 2026-11-24T18:00:00+01:00
    #[arg(long, value_name = "DATE", value_parser = date)]
    pub written_before: Option<(i64, u32)>,
    /// Only files whose key is wrapped under this KEK now
    #[arg(long, value_name = "KEKID")]
    pub kek: Option<KekId>,
    /// At most N megabytes of content a second
    #[arg(long, value_name = "N")]
    pub rate: Option<NonZeroU32>,
    #[command(flatten)]
    pub work: WorkArgs,
    /// N worker threads
    #[arg(long, value_name = "N")]
    pub jobs: Option<NonZeroUsize>,
    /// Begin anew; without: go on with an unfinished rekey of the same paths and options
    #[arg(long)]
    pub restart: bool,
    /// One JSON object at the end
    #[arg(long)]
    pub json: bool,
}

/// A date, or a date and time.
fn date(text: &str) -> Result<(i64, u32), String> {
    let bad = "not a date such as 2026-11-24, or a date and time such as 2026-11-24T18:00:00Z";
    crate::format::time::parse_rfc3339(text).ok_or_else(|| bad.to_owned())
}

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// List root keys and KEKs; needs no key
    List {
        /// Mount point or backing directory
        #[arg(value_name = "MOUNTPOINT|BACKING")]
        target: PathBuf,
        /// Count the headers that name each KEK, too: looks at every file, and opens the store if it is not mounted
        #[arg(long)]
        count: bool,
        /// One JSON object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        open: OpenKeys,
    },
    /// Check that a report of rotate --report is this store's, and say what it proves
    VerifyReport {
        /// The report
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// The store that it is about; may be left out if that is mounted
        #[arg(value_name = "MOUNTPOINT|BACKING")]
        target: Option<PathBuf>,
        /// One JSON object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        open: OpenKeys,
    },
    /// Add a root key: from then on it opens the store too
    Add {
        /// Mount point or backing directory
        #[arg(value_name = "MOUNTPOINT|BACKING")]
        target: PathBuf,
        /// The new root key: passphrase:, keyfile:/PATH, aws-kms://…, gcp-kms://…, vault://…, pkcs11:…; recovery: makes a recovery key and prints it, once
        #[arg(value_name = "URI", required_unless_present = "key")]
        uri: Option<String>,
        /// The same as URI
        #[arg(long, value_name = "URI", conflicts_with = "uri")]
        key: Option<String>,
        /// Read the new passphrase from FILE
        #[arg(long, value_name = "FILE")]
        new_passphrase_file: Option<PathBuf>,
        #[command(flatten)]
        confirm: ConfirmArgs,
        #[command(flatten)]
        open: OpenKeys,
    },
    /// Remove a root key; the last one that is no recovery key cannot be removed
    Remove {
        /// Mount point or backing directory
        #[arg(value_name = "MOUNTPOINT|BACKING")]
        target: PathBuf,
        /// Id of the root key as `key list` shows it, or its URI if only one has it
        #[arg(value_name = "ID|URI")]
        which: String,
        #[command(flatten)]
        open: OpenKeys,
    },
    /// Move what root keys wrapped to their newest versions, so that older ones can be retired
    Refresh {
        /// Mount point or backing directory
        #[arg(value_name = "MOUNTPOINT|BACKING")]
        target: PathBuf,
        /// Say what is due, change nothing
        #[arg(long)]
        dry_run: bool,
        /// One JSON object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        open: OpenKeys,
    },
    /// Destroy a retired KEK for good, now or after a while, once a scan of every header has proved that none names it
    Destroy {
        /// Mount point or backing directory
        #[arg(value_name = "MOUNTPOINT|BACKING")]
        target: PathBuf,
        /// Id of the KEK as `key list` shows it
        #[arg(value_name = "KEK")]
        kek: String,
        /// Not now, but after AGE, such as 7d, 12h or 30m: by the daemon if the store is mounted then, else by the next key destroy
        #[arg(long, value_name = "AGE", value_parser = age)]
        after: Option<u64>,
        /// Take it back that the KEK is to be destroyed after a while
        #[arg(long, conflicts_with = "after")]
        cancel: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// One JSON object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        confirm: ConfirmArgs,
        #[command(flatten)]
        open: OpenKeys,
    },
    /// Show or set how many different root keys must confirm that KEKs are destroyed and root keys added
    Policy {
        /// Mount point or backing directory
        #[arg(value_name = "MOUNTPOINT|BACKING")]
        target: PathBuf,
        /// From now on N; as many must confirm this as before and as will be
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
        quorum: Option<u8>,
        /// One JSON object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        confirm: ConfirmArgs,
        #[command(flatten)]
        open: OpenKeys,
    },
    /// Show or move the oldest KEK under which files are opened: those below are there and refused, as if destroyed
    Floor {
        /// Mount point or backing directory
        #[arg(value_name = "MOUNTPOINT|BACKING")]
        target: PathBuf,
        /// Id of the KEK as `key list` shows it; none: files are opened under any
        #[arg(value_name = "KEK|none")]
        kek: Option<String>,
        /// One JSON object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        open: OpenKeys,
    },
    /// Write a copy of the keyring to a file; needs no key, and the copy is of no use without a root key
    Export {
        /// Mount point or backing directory
        #[arg(value_name = "MOUNTPOINT|BACKING")]
        target: PathBuf,
        /// Where to, outside of the store
        file: PathBuf,
        /// Replace FILE if it is there
        #[arg(long)]
        force: bool,
        /// One JSON object
        #[arg(long)]
        json: bool,
    },
    /// Put an exported keyring back into a store whose own is lost or damaged
    Import {
        /// The backing directory; not mounted
        backing: PathBuf,
        /// What `key export` wrote
        file: PathBuf,
        /// Also over a whole keyring that is newer, or another's
        #[arg(long)]
        force: bool,
        /// One JSON object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        open: OpenKeys,
    },
}

#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The backing directory
    pub backing: PathBuf,
    /// Read and authenticate every block
    #[arg(long)]
    pub deep: bool,
    /// Look only at what can be seen without keys
    #[arg(long, conflicts_with_all = ["keys", "deep", "recovery", "recovery_file"])]
    pub no_key: bool,
    #[command(flatten)]
    pub key: KeySource,
    #[command(flatten)]
    pub recovery: RecoveryArgs,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Say whether an audit log is whole, and with --store whether this store's key sealed it
    Verify(AuditVerifyArgs),
}

#[derive(Debug, Args)]
pub struct AuditVerifyArgs {
    /// The log; several files of one log in their order, oldest first
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// Check the seals with this store's key: through its daemon if it is mounted, else with its root keys
    #[arg(long, value_name = "MOUNTPOINT|BACKING")]
    pub store: Option<PathBuf>,
    /// The hash of a record that must be in it, as an earlier check told it: nothing before it was cut off
    #[arg(long, value_name = "HASH")]
    pub expect_head: Option<String>,
    #[command(flatten)]
    pub key: KeySource,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct MetricsArgs {
    /// Mount point, or backing directory of a mounted store
    #[arg(value_name = "MOUNTPOINT|BACKING")]
    pub target: PathBuf,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A file in the backing directory
    #[arg(value_name = "BACKING-FILE")]
    pub file: PathBuf,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct SpeedArgs {
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// Seconds of an age such as `90d`, `12h`, `30m` or `45s`.
fn age(text: &str) -> Result<u64, String> {
    let units = [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)];
    let (digits, unit) = units
        .iter()
        .find_map(|(suffix, seconds)| Some((text.strip_suffix(suffix)?, *seconds)))
        .ok_or("an age is a number and d, h, m or s, such as 90d")?;
    let n: u64 = digits.parse().map_err(|_| "an age begins with a whole number, such as 90d")?;
    n.checked_mul(unit).ok_or_else(|| "an age that long is no age".to_owned())
}

#[cfg(test)]
mod tests {
    use super::age;
    use clap::CommandFactory;

    #[test]
    fn ages_have_units() {
        for (text, seconds) in [("90d", 7_776_000), ("12h", 43_200), ("30m", 1_800), ("45s", 45), ("0d", 0)] {
            assert_eq!(age(text), Ok(seconds));
        }
        for bad in ["", "90", "d", "-1d", "1.5h", "90 d", "1w", "99999999999999999d"] {
            assert!(age(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_definition_is_sound() {
        super::Cli::command().debug_assert();
    }
}
