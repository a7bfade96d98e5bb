//! Keys in the daemon's memory: a mounted daemon that has written, read, rotated and been given root keys is searched,
//! every mapping of it, for each secret it ever had. That it cannot be traced by its user is tested in `unprivileged`.

use super::support::{Bench, can_mount, wait_for};
use aws_lc_rs::agreement;
use envelopefs::backing::posix::Posix;
use envelopefs::crypto::kdf::{derive, label};
use envelopefs::crypto::secret::Secret32;
use envelopefs::format::header::{Slot, SlotPair};
use envelopefs::kms::{ConnectOptions, KeyProvider, KeyPurpose, RootKeyUri, WrapContext, connect};
use envelopefs::store::header::unwrap_slot;
use envelopefs::store::keys::{KekState, Keys};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What must not be found, by name. A secret is looked for in halves, so that one half overwritten hides nothing.
#[derive(Default)]
struct Secrets {
    /// Name and secret; kept in this process, which is not the one searched.
    all: BTreeMap<String, Vec<u8>>,
}

impl Secrets {
    fn add(&mut self, name: impl Into<String>, secret: &[u8]) {
        self.all.insert(name.into(), secret.to_vec());
    }

    /// The root key, the store secret, every KEK that is not destroyed, and every DEK; of the keys derived from them those
    /// that the daemon keeps in its arena.
    fn of_store(b: &Bench, found: &mut Self) {
        let text = fs::read(b.path("key")).unwrap();
        let hex = std::str::from_utf8(&text).unwrap().trim();
        let raw: Vec<u8> = (0..32).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect();
        found.add("root key", &raw);
        found.add("root key in hexadecimal", hex.as_bytes());
        let root = Secret32::build(|k| k.copy_from_slice(&raw));
        found.add("root wrap key", derive(&root, label::ROOT_WRAP, b"").expose());

        let uri = RootKeyUri::parse(&format!("keyfile:{}", b.path("key").display())).unwrap();
        let provider = connect(&uri, &ConnectOptions::default(), false).unwrap();
        let backing = Posix::open(b.path("back")).unwrap();
        let keys = Keys::open(&backing, std::slice::from_ref(&provider)).unwrap();
        let secret = keys.secret().secret();
        found.add("store secret", secret.expose());
        for label in
            [label::NAMES, label::DIR_ID, label::SYMLINK, label::XATTR_NAME, label::XATTR_VALUE, label::KEYRING_MAC]
        {
            found.add(label, derive(secret, label, b"").expose());
        }
        keks(&keys, &provider, found);
        for_each_file(&b.path("back"), &keys, &mut |slot, dek| {
            found.add(format!("DEK of {}", slot.file), dek.expose());
            found
                .add(format!("header MAC key of {}", slot.file), derive(dek, label::HEADER_MAC, &slot.file.0).expose());
        });
    }
}

fn keks(keys: &Keys, provider: &std::sync::Arc<dyn KeyProvider>, found: &mut Secrets) {
    let ring = keys.snapshot();
    for k in ring.keks.iter().filter(|k| k.state != KekState::Destroyed) {
        let context = WrapContext { store: ring.store.0, purpose: KeyPurpose::Kek, object: k.id.0, extra: Vec::new() };
        let kek = provider.unwrap(&k.wraps[0].bytes, &context).unwrap();
        found.add(format!("KEK {}", k.id), kek.expose());
        found.add(format!("wrapping key of KEK {}", k.id), derive(&kek, label::KEK_WRAP, k.id.as_bytes()).expose());
    }
}

/// The header and the DEK of each file below `dir`.
fn for_each_file(dir: &Path, keys: &Keys, each: &mut dyn FnMut(&Slot, &Secret32)) {
    for e in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        if e.file_type().unwrap().is_dir() {
            for_each_file(&e.path(), keys, each);
        } else if e.file_type().unwrap().is_file() {
            let bytes = fs::read(e.path()).unwrap();
            let header = SlotPair::decode(&bytes).and_then(|p| p.authoritative().map(|(_, s)| s.clone()));
            if let Ok(slot) = header {
                let dek = unwrap_slot(&keys.kek(slot.kek).unwrap(), &slot).unwrap();
                each(&slot, dek.secret());
            }
        }
    }
}

/// A piece of a secret, and what it is.
type Needles = HashMap<[u8; 16], String>;

/// The halves of each secret, as they are and in the forms that HMAC-SHA-256 gives a key: combined with its two paddings,
/// and those loaded as big-endian words.
fn needles(secrets: &Secrets) -> Needles {
    let mut out = Needles::new();
    for (name, secret) in &secrets.all {
        for (i, half) in secret.chunks_exact(16).enumerate() {
            let half: [u8; 16] = half.try_into().unwrap();
            for (form, pad) in [("", 0), (" in HMAC's inner padding", 0x36), (" in HMAC's outer padding", 0x5c)] {
                let padded = half.map(|b| b ^ pad);
                out.insert(padded, format!("half {i} of {name}{form}"));
                let mut swapped = padded;
                swapped.as_chunks_mut::<4>().0.iter_mut().for_each(|w| w.reverse());
                out.insert(swapped, format!("half {i} of {name}{form}, in big-endian words"));
            }
        }
    }
    out
}

/// Finds needles in bytes; `first` says which pairs of bytes a needle begins with, so that most places cost little.
struct Search {
    needles: Needles,
    first: Vec<bool>,
}

impl Search {
    fn new(secrets: &Secrets) -> Self {
        let needles = needles(secrets);
        let mut first = vec![false; 1 << 16];
        needles.keys().for_each(|n| first[usize::from(u16::from_le_bytes([n[0], n[1]]))] = true);
        Self { needles, first }
    }

    fn find(&self, bytes: &[u8], at: u64, place: &str, out: &mut Vec<String>) {
        for (i, w) in bytes.windows(16).enumerate() {
            if self.first[usize::from(u16::from_le_bytes([w[0], w[1]]))]
                && let Some(name) = self.needles.get(w)
            {
                out.push(format!("{name}, at {:#x} in {place}", at + i as u64));
            }
        }
    }
}

/// A mapping of a process.
struct Mapping {
    start: u64,
    end: u64,
    /// The line of /proc/PID/maps.
    line: String,
    /// `VmFlags` of /proc/PID/smaps.
    flags: Vec<String>,
}

fn mappings(pid: i32) -> Vec<Mapping> {
    let mut all: Vec<Mapping> = Vec::new();
    for line in fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap().lines() {
        let range = line.split(' ').next().unwrap().split_once('-');
        let hex = |s| u64::from_str_radix(s, 16).ok();
        if let Some((Some(start), Some(end))) = range.map(|(a, b)| (hex(a), hex(b))) {
            all.push(Mapping { start, end, line: line.to_owned(), flags: Vec::new() });
        } else if let (Some(flags), Some(m)) = (line.strip_prefix("VmFlags: "), all.last_mut()) {
            m.flags = flags.split_whitespace().map(str::to_owned).collect();
        }
    }
    all
}

/// Every place in the process's memory with a piece of a secret, and how many bytes were searched.
fn search(pid: i32, secrets: &Secrets) -> (Vec<String>, u64) {
    const PIECE: u64 = 1 << 20;
    let (s, mem) = (Search::new(secrets), File::open(format!("/proc/{pid}/mem")).unwrap());
    let (mut out, mut read) = (Vec::new(), 0);
    let mut buf = vec![0; PIECE as usize + 16];
    for m in mappings(pid) {
        let mut at = m.start;
        while at < m.end {
            // A little more than a piece, for what lies across the edge.
            let len = (m.end - at).min(buf.len() as u64) as usize;
            match mem.read_at(&mut buf[..len], at) {
                Ok(n) if n > 0 => {
                    read += n as u64;
                    if buf[..n].iter().any(|b| *b != 0) {
                        s.find(&buf[..n], at, &m.line, &mut out);
                    }
                    at += (n as u64).min(PIECE);
                }
                // A page that nobody may look at, as those of the arena.
                _ => at += 4096,
            }
        }
    }
    (out, read)
}

fn assert_none(when: &str, pid: i32, secrets: &Secrets) {
    let (found, read) = search(pid, secrets);
    assert!(read > 1 << 20, "nearly nothing was searched");
    assert!(found.is_empty(), "{when}: {} places\n{}", found.len(), found[..found.len().min(40)].join("\n"));
}

/// The keys of blocks and states, which the cipher's library keeps in its own memory while a file is open
/// (`docs/THREAT_MODEL.md`).
fn file_keys(b: &Bench) -> Secrets {
    let uri = RootKeyUri::parse(&format!("keyfile:{}", b.path("key").display())).unwrap();
    let provider = connect(&uri, &ConnectOptions::default(), false).unwrap();
    let keys = Keys::open(&Posix::open(b.path("back")).unwrap(), &[provider]).unwrap();
    let mut found = Secrets::default();
    for_each_file(&b.path("back"), &keys, &mut |slot, dek| {
        for label in [label::CONTENT, label::STATE] {
            found.add(format!("{label} {}", slot.file), derive(dek, label, &slot.file.0).expose());
        }
    });
    found
}

fn work(b: &Bench, round: &str) -> File {
    let mnt = b.path("mnt");
    for i in 0..12 {
        let content = vec![i as u8; 3000 * (i + 1) * (i + 1)];
        let path = mnt.join(format!("{round} {i}"));
        fs::write(&path, &content).unwrap();
        assert_eq!(fs::read(&path).unwrap(), content);
    }
    fs::create_dir(mnt.join(format!("{round} directory"))).unwrap();
    fs::write(mnt.join(format!("{round} directory/{}", "n".repeat(200))), round).unwrap();
    std::os::unix::fs::symlink("t".repeat(4000), mnt.join(format!("{round} link"))).unwrap();
    let held = File::options().read(true).write(true).open(mnt.join(format!("{round} 3"))).unwrap();
    held.write_at(b"held open", 5000).unwrap();
    held.sync_all().unwrap();
    held
}

#[test]
fn no_key_lies_outside_the_arena() {
    if !rustix::process::geteuid().is_root() || !can_mount() {
        return;
    }
    let b = Bench::mounted();
    let mut secrets = Secrets::default();
    let pid = b.daemon();
    let held = work(&b, "before");
    Secrets::of_store(&b, &mut secrets);
    assert_none("after writing and reading", pid, &secrets);
    let (found, _) = search(pid, &file_keys(&b));
    assert!(!found.is_empty(), "the search does not find the keys of a file that is open");
    b.ok("rotate mnt");
    let too = work(&b, "between");
    b.ok("rotate mnt --destroy-old");
    Secrets::of_store(&b, &mut secrets);
    assert_none("after rotating", pid, &secrets);
    assert_eq!(fs::read(b.path("mnt/between directory").join("n".repeat(200))).unwrap(), b"between");
    drop((held, too));
    let keys = file_keys(&b);
    wait_for("the keys of files to go when these are closed", || search(pid, &keys).0.is_empty());
    b.ok("unmount mnt");
    // A daemon that only opens and reads what is there.
    b.ok("mount back mnt");
    for e in fs::read_dir(b.path("mnt")).unwrap().map(Result::unwrap).filter(|e| e.path().is_file()) {
        fs::read(e.path()).unwrap();
    }
    assert_none("after reading", b.daemon(), &secrets);
}

/// After a lock not even an open file's keys are left, and of the arena nothing but what the store secret needs; that the
/// arena itself is wiped is tested where it can be read: in `src/store/tests/outage.rs`.
#[test]
fn after_a_lock_no_key_of_a_file_is_left() {
    if !rustix::process::geteuid().is_root() || !can_mount() {
        return;
    }
    let b = Bench::mounted();
    let held = work(&b, "before");
    let mut secrets = Secrets::default();
    Secrets::of_store(&b, &mut secrets);
    let (pid, keys) = (b.daemon(), file_keys(&b));
    let (found, _) = search(pid, &keys);
    assert!(!found.is_empty(), "the search does not find the keys of a file that is open");
    b.ok("lock mnt");
    assert_none("locked, keys of blocks and states", pid, &keys);
    assert_none("locked", pid, &secrets);
    b.ok("unlock mnt");
    assert_eq!(held.metadata().unwrap().len(), 3000 * 16);
    held.write_at(b"again", 0).unwrap();
    held.sync_all().unwrap();
    let (found, _) = search(pid, &keys);
    assert!(!found.is_empty(), "the open file has its keys again");
    assert_none("unlocked", pid, &secrets);
}

/// The passphrase, what Argon2id made of it, and what is below it.
#[test]
fn no_passphrase_lies_outside_the_arena() {
    if !rustix::process::geteuid().is_root() || !can_mount() {
        return;
    }
    let b = Bench::new();
    let passphrase = b"kQ7-horse wQ9-vigil xR3-plank yT5-ember zU1-quilt";
    fs::write(b.path("pass"), passphrase).unwrap();
    b.ok("init back --key passphrase: --passphrase-file DIR/pass");
    b.ok("mount back mnt --passphrase-file DIR/pass");
    fs::write(b.path("mnt/f"), b"content").unwrap();
    let mut secrets = Secrets::default();
    secrets.add("passphrase", passphrase);
    let ring = Keys::read_keyring(&Posix::open(b.path("back")).unwrap()).unwrap();
    let mut wraps: Vec<&[u8]> = ring.secret.iter().map(|w| &w.bytes[..]).collect();
    wraps.extend(ring.keks.iter().flat_map(|k| &k.wraps).map(|w| &w.bytes[..]));
    for blob in wraps {
        let number = |at: usize| u32::from_le_bytes(blob[at..at + 4].try_into().unwrap());
        let params = argon2::Params::new(number(4), number(8), number(12), Some(32)).unwrap();
        let argon = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params);
        let mut root = [0; 32];
        argon.hash_password_into(passphrase, &blob[16..32], &mut root).unwrap();
        secrets.add("Argon2id's result", &root);
        let root = Secret32::build(|k| k.copy_from_slice(&root));
        secrets.add("root wrap key", derive(&root, label::ROOT_WRAP, b"").expose());
    }
    assert_none("mounted with a passphrase", b.daemon(), &secrets);
    b.ok("lock mnt");
    assert_none("locked", b.daemon(), &secrets);
    b.ok("unlock mnt --passphrase-file DIR/pass");
    assert_none("unlocked with a passphrase", b.daemon(), &secrets);
}

/// A daemon that was opened with the recovery key, and then wraps new KEKs for it: neither the key in any form nor what
/// HPKE agrees on with it.
#[test]
fn no_recovery_key_lies_outside_the_arena() {
    if !rustix::process::geteuid().is_root() || !can_mount() {
        return;
    }
    let b = Bench::new();
    let out = String::from_utf8(b.run("init back --key keyfile:DIR/key --recovery-key").stdout).unwrap();
    let text = out.lines().find(|l| l.starts_with("    ") && l.len() == 73).unwrap().trim();
    fs::write(b.path("paper"), text).unwrap();
    b.ok("mount back mnt --recovery-file DIR/paper");
    fs::write(b.path("mnt/f"), b"content").unwrap();
    b.ok("rotate mnt");

    let secret = envelopefs::kms::recovery::printed::read(text.as_bytes()).unwrap();
    let mut secrets = Secrets::default();
    secrets.add("recovery key", secret.expose());
    secrets.add("recovery key as printed", text.as_bytes());
    let plain = text.replace('-', "");
    secrets.add("recovery key without dashes", plain.as_bytes());
    let value = |c: u8| if c.is_ascii_digit() { c - b'2' + 26 } else { c - b'A' };
    secrets.add("values of the recovery key's characters", &plain.bytes().map(value).collect::<Vec<u8>>());
    let mut clamped = *secret.expose();
    clamped[0] &= 248;
    clamped[31] = clamped[31] & 127 | 64;
    secrets.add("recovery key as a scalar", &clamped);
    let private = agreement::PrivateKey::from_private_key(&agreement::X25519, secret.expose()).unwrap();
    let ring = Keys::read_keyring(&Posix::open(b.path("back")).unwrap()).unwrap();
    let id = ring.roots.iter().find(|r| r.uri.starts_with("recovery:")).unwrap().id;
    let wraps = ring.secret.iter().chain(ring.keks.iter().flat_map(|k| &k.wraps)).filter(|w| w.root == id);
    let wraps: Vec<&[u8]> = wraps.map(|w| &w.bytes[..]).collect();
    assert_eq!(wraps.len(), 3);
    for (i, w) in wraps.into_iter().enumerate() {
        let peer = agreement::UnparsedPublicKey::new(&agreement::X25519, &w[..32]);
        agreement::agree(&private, peer, (), |dh| {
            secrets.add(format!("X25519's result {i}"), dh);
            Ok(())
        })
        .unwrap();
    }
    Secrets::of_store(&b, &mut secrets);
    assert_none("mounted with the recovery key", b.daemon(), &secrets);
}

/// The test must be able to find what is there.
#[test]
fn the_search_finds_what_is_in_memory() {
    let pid = rustix::process::getpid().as_raw_pid();
    let secret: Vec<u8> = (0..32).map(|i| 0x91u8.wrapping_mul(i + 3)).collect();
    let padded: Vec<u8> = std::hint::black_box(secret.iter().map(|b| b ^ 0x5c).collect());
    let mut secrets = Secrets::default();
    secrets.add("it", &secret);
    let (found, _) = search(pid, &secrets);
    let has = |what: &str| found.iter().any(|f| f.starts_with(what));
    assert!(has("half 0 of it, ") && has("half 1 of it, "), "{found:?}");
    assert!(has("half 1 of it in HMAC's outer padding, "), "{found:?}");
    assert_eq!(padded.len(), 32);
}

#[test]
fn the_arena_is_kept_from_dumps_and_children_and_no_core_is_written() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    fs::write(b.path("mnt/f"), b"content").unwrap();
    let pid = b.daemon();
    let all = mappings(pid);
    let secret: Vec<&Mapping> = all.iter().filter(|m| m.line.contains("secretmem")).collect();
    let has = |m: &Mapping, flag: &str| m.flags.iter().any(|f| f == flag);
    if secret.is_empty() {
        // A kernel without memfd_secret(2).
        let arena = all.iter().filter(|m| has(m, "lo") && has(m, "dd") && has(m, "wf"));
        assert!(arena.count() > 0, "locked, not dumped, wiped in children");
    }
    for m in secret {
        // In no dump, in no child, never swapped.
        assert!(["dd", "dc", "lo"].iter().all(|f| has(m, f)), "{} {:?}", m.line, m.flags);
        // And the kernel itself cannot read it, so nor can root.
        let mem = File::open(format!("/proc/{pid}/mem")).unwrap();
        assert!(mem.read_at(&mut [0; 32], m.start).is_err(), "{}", m.line);
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core: Vec<&str> =
        limits.lines().find(|l| l.starts_with("Max core file size")).unwrap().split_whitespace().collect();
    assert_eq!(core[4..6], ["0", "0"]);
}
