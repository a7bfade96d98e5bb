//! What a mount is asked for, and how that is said to mount(2) and to fusermount3.

use std::io;
use std::path::PathBuf;

use rustix::mount::MountFlags;

/// How to mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Where.
    pub mountpoint: PathBuf,
    /// Nothing can be changed through the mount.
    pub read_only: bool,
    /// Other users than the one who mounts may use it; the kernel checks their permissions.
    pub allow_other: bool,
    /// First column of `/proc/mounts`.
    pub fs_name: String,
    /// As after mount(8)'s `-o`: `suid`, `dev`, `noexec`, `noatime`, … An option that is not known is an error.
    pub options: Vec<String>,
    /// Threads that serve requests; by default as many as there are cores, at least 2 and at most 8.
    pub threads: Option<usize>,
    /// Let the kernel collect small writes and send large ones.
    pub writeback: bool,
    /// Read-ahead and asynchronous requests that the kernel may have outstanding.
    pub max_background: u16,
    /// As root, lift the 1 % of dirty memory and the 128 KiB of readahead that the kernel gives a FUSE mount.
    pub raise_limits: bool,
    /// How long the kernel may trust names and attributes without asking. Nobody else changes a mounted store.
    pub cache_seconds: u32,
}

impl MountOptions {
    /// The defaults, at `mountpoint`.
    pub fn new(mountpoint: impl Into<PathBuf>) -> Self {
        Self {
            mountpoint: mountpoint.into(),
            read_only: false,
            allow_other: false,
            fs_name: "envelopefs".to_owned(),
            options: Vec::new(),
            threads: None,
            writeback: true,
            max_background: 64,
            raise_limits: true,
            cache_seconds: 24 * 60 * 60,
        }
    }

    /// How many threads serve requests. Never one: a second request must be taken while a first waits for an fsync.
    pub(super) fn thread_count(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        self.threads.unwrap_or_else(|| cores.min(8)).max(2)
    }
}

/// Options split by who understands them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Parsed {
    /// For mount(2).
    pub flags: MountFlags,
    /// Those of the flags that fusermount3 takes, in words.
    pub words: Vec<String>,
    /// `ro` was among them.
    pub read_only: bool,
    /// `allow_other` was among them.
    pub allow_other: bool,
}

/// Reads options as mount(8) writes them. As FUSE mounts are, these are `nosuid,nodev` unless told otherwise.
///
/// # Errors
/// `InvalidInput` that names the option that is not known.
pub(super) fn parse(o: &MountOptions) -> io::Result<Parsed> {
    let mut p = Parsed {
        flags: MountFlags::NOSUID | MountFlags::NODEV,
        words: Vec::new(),
        read_only: o.read_only,
        allow_other: o.allow_other,
    };
    for word in o.options.iter().flat_map(|w| w.split(',')).map(str::trim).filter(|w| !w.is_empty()) {
        match word {
            "allow_other" => p.allow_other = true,
            // Always on, or for other eyes: mount(8), fstab, systemd.
            "defaults"
            | "default_permissions"
            | "rw"
            | "auto"
            | "noauto"
            | "user"
            | "nouser"
            | "users"
            | "owner"
            | "group"
            | "nofail"
            | "_netdev"
            | "async"
            | "atime" => {}
            w if w.starts_with("x-") || w.starts_with("comment=") => {}
            w => {
                let (flag, on) = flag(w).ok_or_else(|| {
                    io::Error::new(io::ErrorKind::InvalidInput, format!("mount option {w} is not known"))
                })?;
                p.flags.set(flag, on);
                if HELPERS.contains(&w) {
                    p.words.push(w.to_owned());
                }
            }
        }
    }
    p.read_only |= p.flags.contains(MountFlags::RDONLY);
    p.flags.set(MountFlags::RDONLY, p.read_only);
    if p.read_only && !p.words.iter().any(|w| w == "ro") {
        p.words.push("ro".to_owned());
    }
    Ok(p)
}

/// What fusermount3 knows: it hands anything else to the kernel as text, which refuses the mount.
const HELPERS: [&str; 10] = ["ro", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "dirsync", "noatime"];

/// The flag a word stands for, and whether the word sets it.
fn flag(word: &str) -> Option<(MountFlags, bool)> {
    Some(match word {
        "ro" => (MountFlags::RDONLY, true),
        "suid" => (MountFlags::NOSUID, false),
        "nosuid" => (MountFlags::NOSUID, true),
        "dev" => (MountFlags::NODEV, false),
        "nodev" => (MountFlags::NODEV, true),
        "exec" => (MountFlags::NOEXEC, false),
        "noexec" => (MountFlags::NOEXEC, true),
        "sync" => (MountFlags::SYNCHRONOUS, true),
        "dirsync" => (MountFlags::DIRSYNC, true),
        "noatime" => (MountFlags::NOATIME, true),
        "nodiratime" => (MountFlags::NODIRATIME, true),
        "diratime" => (MountFlags::NODIRATIME, false),
        "relatime" => (MountFlags::RELATIME, true),
        "norelatime" => (MountFlags::RELATIME, false),
        "strictatime" => (MountFlags::STRICTATIME, true),
        "nostrictatime" => (MountFlags::STRICTATIME, false),
        "lazytime" => (MountFlags::LAZYTIME, true),
        "nolazytime" => (MountFlags::LAZYTIME, false),
        _ => return None,
    })
}

/// `s` with the characters that mean something in an option list escaped.
pub(super) fn escaped(s: &str) -> String {
    s.chars().flat_map(|c| matches!(c, ',' | '\\').then_some('\\').into_iter().chain([c])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &str) -> io::Result<Parsed> {
        parse(&MountOptions { options: vec![words.to_owned()], ..MountOptions::new("/m") })
    }

    #[test]
    fn devices_and_setuid_programs_are_off_unless_asked_for() {
        assert_eq!(parsed("").unwrap().flags, MountFlags::NOSUID | MountFlags::NODEV);
        assert_eq!(parsed("suid,dev").unwrap().flags, MountFlags::empty());
        assert_eq!(parsed("suid,nosuid").unwrap().flags, MountFlags::NOSUID | MountFlags::NODEV, "the last one counts");
    }

    #[test]
    fn read_only_can_be_asked_for_in_two_ways() {
        let by_word = parsed("ro").unwrap();
        let by_field = parse(&MountOptions { read_only: true, ..MountOptions::new("/m") }).unwrap();
        for p in [by_word, by_field] {
            assert!(p.read_only && p.flags.contains(MountFlags::RDONLY));
            assert_eq!(p.words, ["ro"]);
        }
    }

    #[test]
    fn words_for_others_are_skipped_and_unknown_ones_are_named() {
        let p = parsed("defaults,_netdev,x-systemd.automount,nofail,noatime,allow_other").unwrap();
        assert_eq!(p.words, ["noatime"]);
        assert!(p.allow_other);
        let e = parsed("noatime,frobnicate").unwrap_err();
        assert!(e.to_string().contains("frobnicate"), "{e}");
    }

    #[test]
    fn times_of_access_can_be_spoken_of_in_every_way_mount_knows() {
        let p =
            parsed("norelatime,strictatime,nostrictatime,lazytime,nolazytime,diratime,relatime,nodiratime").unwrap();
        assert!(p.words.is_empty(), "fusermount3 knows none of them: {:?}", p.words);
        assert!(p.flags.contains(MountFlags::RELATIME | MountFlags::NODIRATIME));
        assert!(!p.flags.contains(MountFlags::STRICTATIME) && !p.flags.contains(MountFlags::LAZYTIME));
    }

    #[test]
    fn names_with_commas_stay_one_option() {
        assert_eq!(escaped(r"a,b\c"), r"a\,b\\c");
    }
}
