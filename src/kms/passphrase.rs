//! `passphrase:`: a root key derived from a passphrase by Argon2id (RFC 9106, version 0x13).
//!
//! Wrapped form, 92 bytes, little-endian: version u8 = 1 · reserved 3 × 0 · memory in KiB u32 · passes u32 · lanes
//! u32 · salt 16 · [`GcmSiv::wrap`] (60) under derive(Argon2id(passphrase, salt), ROOT_WRAP, "") with
//! [`WrapContext::to_aad`]. What parameters are accepted is bounded on reading, for they come from where an attacker
//! may write.

use super::fill::fill;
use super::{Capabilities, Description, KeyProvider, KmsError, WrapContext};
use crate::crypto::aead::{GcmSiv, WRAPPED_LEN};
use crate::crypto::kdf::{derive, label};
use crate::crypto::random;
use crate::crypto::secret::{KEY_LEN, Secret32};
use crate::crypto::stack::wiped;
use crate::format::codec::{Malformed, Reader, Writer};
use parking_lot::Mutex;
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use zeroize::{Zeroize, Zeroizing};

/// Longest passphrase, in bytes.
pub const PASSPHRASE_MAX: usize = 4096;
/// The systemd credential looked for when no source is given.
pub const CREDENTIAL: &str = "envelopefs.passphrase";

const SALT_LEN: usize = 16;
const BLOB_LEN: usize = 16 + SALT_LEN + WRAPPED_LEN;
const BLOB_VERSION: u8 = 1;

/// Asks for a passphrase with the given prompt.
pub type Prompt = Arc<dyn Fn(&str) -> io::Result<Zeroizing<String>> + Send + Sync>;

/// Where a passphrase comes from.
#[derive(Clone)]
pub enum PassphraseSource {
    /// Asked on the terminal; twice when a new one is set.
    Terminal,
    /// Asked by the caller's function; twice when a new one is set.
    Prompt(Prompt),
    /// The content of a file, without one trailing newline.
    File(PathBuf),
    /// The standard output of `sh -c COMMAND`, without one trailing newline.
    Command(String),
    /// A systemd credential by its name, in `$CREDENTIALS_DIRECTORY`, without one trailing newline.
    SystemdCredential(String),
    /// These bytes, for tests.
    Fixed(Zeroizing<Vec<u8>>),
}

impl std::fmt::Debug for PassphraseSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Terminal => "Terminal",
            Self::Prompt(_) => "Prompt",
            Self::File(_) => "File",
            Self::Command(_) => "Command",
            Self::SystemdCredential(_) => "SystemdCredential",
            Self::Fixed(_) => "Fixed",
        })
    }
}

/// Cost of Argon2id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Argon2Cost {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
    /// Lanes.
    pub lanes: u32,
}

impl Default for Argon2Cost {
    /// 256 MiB, 3 passes, 4 lanes: about a second on a small machine; four times the memory of RFC 9106's second
    /// recommended choice.
    fn default() -> Self {
        Self { memory_kib: 256 * 1024, passes: 3, lanes: 4 }
    }
}

impl Argon2Cost {
    /// The least that is accepted: 1 MiB, 1 pass. For tests.
    pub const LEAST: Self = Self { memory_kib: 1024, passes: 1, lanes: 1 };

    /// Whether a wrapped key with this cost is accepted: 1 MiB to 1 GiB, 1 to 16 passes, 1 to 16 lanes.
    pub fn is_acceptable(&self) -> bool {
        (1024..=1024 * 1024).contains(&self.memory_kib)
            && (1..=16).contains(&self.passes)
            && (1..=16).contains(&self.lanes)
    }
}

/// A passphrase, or a PIN, in secret memory, in pieces of 32 bytes.
pub(super) struct Passphrase {
    pieces: Vec<Secret32>,
    len: usize,
}

impl Passphrase {
    fn new(bytes: &[u8]) -> Self {
        let pieces = bytes.chunks(KEY_LEN).map(|c| Secret32::build(|b| b.iter_mut().zip(c).for_each(|(b, c)| *b = *c)));
        Self { pieces: pieces.collect(), len: bytes.len() }
    }

    /// The bytes, in one piece, wiped when dropped.
    pub(super) fn assemble(&self) -> Zeroizing<Vec<u8>> {
        let mut v = Zeroizing::new(Vec::with_capacity(self.pieces.len() * KEY_LEN));
        self.pieces.iter().for_each(|p| v.extend_from_slice(p.expose()));
        v.truncate(self.len);
        v
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Derivation {
    cost: Argon2Cost,
    salt: [u8; SALT_LEN],
}

/// Most derived keys kept: one for each salt in use, which is one for each time the passphrase was set.
const DERIVED_MAX: usize = 8;

#[derive(Default)]
struct Derived {
    /// Key that wraps, by what it was derived with; the latest last.
    keys: Vec<(Derivation, Arc<Secret32>)>,
    /// What new wraps are made with: set by the first wrap, or the first unwrap that succeeded.
    current: Option<Derivation>,
    /// Argon2 runs so far.
    runs: u64,
}

/// A root key from a passphrase.
pub struct PassphraseKey {
    passphrase: Passphrase,
    cost: Argon2Cost,
    derived: Mutex<Derived>,
}

impl std::fmt::Debug for PassphraseKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PassphraseKey(redacted)")
    }
}

impl PassphraseKey {
    /// Gets the passphrase from `source`; `cost` is for wraps under a new salt. With `create`, a terminal or prompt
    /// asks twice.
    ///
    /// # Errors
    /// [`KmsError::Credentials`] if the source gives none, an empty or a too long one, or two that differ;
    /// [`KmsError::Config`] for a cost out of bounds.
    pub fn open(source: &PassphraseSource, cost: Argon2Cost, create: bool) -> Result<Self, KmsError> {
        if !cost.is_acceptable() {
            return Err(KmsError::Config("Argon2 cost out of bounds: 1 MiB to 1 GiB, 1-16 passes, 1-16 lanes".into()));
        }
        let passphrase = read(source, create).map_err(no_passphrase)?;
        Ok(Self { passphrase, cost, derived: Mutex::default() })
    }

    /// Argon2 runs so far, for tests and statistics.
    pub fn derivations(&self) -> u64 {
        self.derived.lock().runs
    }

    /// The wrapping key for `with`. Held under the lock, so that callers at the same time cost one Argon2.
    fn key(&self, derived: &mut Derived, with: Derivation) -> Result<Arc<Secret32>, KmsError> {
        if let Some((_, k)) = derived.keys.iter().find(|(d, _)| *d == with) {
            return Ok(k.clone());
        }
        derived.runs += 1;
        let root = argon2id(&self.passphrase, with)?;
        let key = Arc::new(derive(&root, label::ROOT_WRAP, b""));
        if derived.keys.len() >= DERIVED_MAX {
            derived.keys.remove(0);
        }
        derived.keys.push((with, key.clone()));
        Ok(key)
    }
}

fn argon2id(passphrase: &Passphrase, with: Derivation) -> Result<Secret32, KmsError> {
    let c = with.cost;
    let failed = |e: argon2::Error| KmsError::Config(format!("Argon2id: {e}"));
    let params = argon2::Params::new(c.memory_kib, c.passes, c.lanes, Some(KEY_LEN)).map_err(failed)?;
    let mut memory: Vec<argon2::Block> = Vec::new();
    let blocks = params.block_count();
    memory.try_reserve_exact(blocks).map_err(|_| failed(argon2::Error::OutOfMemory))?;
    memory.resize(blocks, argon2::Block::default());
    let argon = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params);
    let text = passphrase.assemble();
    let key =
        Secret32::try_build(|out| wiped(|| argon.hash_password_into_with_memory(&text, &with.salt, out, &mut memory)));
    // The memory's last blocks give the key away.
    memory.iter_mut().for_each(Zeroize::zeroize);
    key.map_err(failed)
}

fn no_passphrase(why: impl std::fmt::Display) -> KmsError {
    KmsError::Credentials(format!("passphrase: {why}"))
}

/// The passphrase itself, for handing it to a process that has no terminal to ask on.
///
/// # Errors
/// As [`PassphraseKey::open`].
pub fn text(source: &PassphraseSource, create: bool) -> Result<Zeroizing<Vec<u8>>, KmsError> {
    read(source, create).map(|p| p.assemble()).map_err(no_passphrase)
}

/// Something else than a passphrase from such a source: a recovery key. A terminal or prompt shows `prompt`.
///
/// # Errors
/// As [`PassphraseKey::open`].
pub(super) fn ask_for(source: &PassphraseSource, prompt: &str) -> Result<Zeroizing<Vec<u8>>, KmsError> {
    let answer = match source {
        PassphraseSource::Terminal => terminal(prompt),
        PassphraseSource::Prompt(p) => p(prompt),
        other => return text(other, false),
    };
    let accepted = answer.map_err(|e| e.to_string()).and_then(|a| accept(a.as_bytes()));
    accepted.map(|p| p.assemble()).map_err(no_passphrase)
}

/// What `source` gives, for whatever it is used as; `Err` is the reason why there is nothing.
pub(super) fn read(source: &PassphraseSource, create: bool) -> Result<Passphrase, String> {
    match source {
        PassphraseSource::Terminal => ask(&terminal, create),
        PassphraseSource::Prompt(p) => ask(p.as_ref(), create),
        PassphraseSource::File(path) => read_file(path),
        PassphraseSource::Command(c) => run(c),
        PassphraseSource::SystemdCredential(name) => match credential(name) {
            Some(path) => read_file(&path),
            None => Err(format!("no systemd credential '{name}': CREDENTIALS_DIRECTORY is not set")),
        },
        PassphraseSource::Fixed(bytes) => accept(bytes),
    }
}

/// Where a systemd credential lies, if systemd gave this process any.
pub fn credential(name: &str) -> Option<PathBuf> {
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        return None;
    }
    std::env::var_os("CREDENTIALS_DIRECTORY").map(|d| Path::new(&d).join(name))
}

fn terminal(prompt: &str) -> io::Result<Zeroizing<String>> {
    ask_on_terminal(prompt, "no terminal to ask on; use --passphrase-file or --passphrase-command")
}

/// Asks on the terminal, without echo; says `otherwise` if there is none.
pub(super) fn ask_on_terminal(prompt: &str, otherwise: &str) -> io::Result<Zeroizing<String>> {
    if !io::stdin().is_terminal() && std::fs::File::open("/dev/tty").is_err() {
        return Err(io::Error::new(io::ErrorKind::NotFound, otherwise));
    }
    rpassword::prompt_password(prompt).map(Zeroizing::new)
}

fn ask(prompt: &(impl Fn(&str) -> io::Result<Zeroizing<String>> + ?Sized), create: bool) -> Result<Passphrase, String> {
    let first = prompt(if create { "New passphrase: " } else { "Passphrase: " }).map_err(|e| e.to_string())?;
    let accepted = accept(first.as_bytes())?;
    if create {
        let again = prompt("The same again: ").map_err(|e| e.to_string())?;
        if !crate::crypto::kdf::ct_eq(first.as_bytes(), again.as_bytes()) {
            return Err("the two differ; try again".into());
        }
    }
    Ok(accepted)
}

fn accept(bytes: &[u8]) -> Result<Passphrase, String> {
    match bytes.len() {
        0 => Err("it is empty".into()),
        n if n > PASSPHRASE_MAX => Err("it is longer than 4096 bytes".into()),
        _ => Ok(Passphrase::new(bytes)),
    }
}

fn accept_line(bytes: &[u8]) -> Result<Passphrase, String> {
    let line = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    accept(line.strip_suffix(b"\r").unwrap_or(line))
}

/// Everything from `from`, into one buffer that is never moved and is wiped; at most what tells that it is too long.
fn slurp(from: &mut impl Read) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut buf = Zeroizing::new(vec![0u8; PASSPHRASE_MAX + 3]);
    let n = fill(from, &mut buf)?;
    buf.truncate(n);
    Ok(buf)
}

fn read_file(path: &Path) -> Result<Passphrase, String> {
    let failed = |e: io::Error| format!("{}: {e}", path.display());
    let mut file = std::fs::File::open(path).map_err(failed)?;
    accept_line(&slurp(&mut file).map_err(failed)?)
}

fn run(command: &str) -> Result<Passphrase, String> {
    let failed = |e: io::Error| format!("command '{command}': {e}");
    let mut child = Command::new("/bin/sh").arg("-c").arg(command).stdout(Stdio::piped()).spawn().map_err(failed)?;
    let output = match child.stdout.take() {
        Some(mut out) => slurp(&mut out),
        None => Err(io::Error::other("no output")),
    };
    // The pipe is closed by now, so a command that goes on writing ends by SIGPIPE.
    let status = child.wait().map_err(failed)?;
    let output = output.map_err(failed)?;
    if output.len() <= PASSPHRASE_MAX + 2 && !status.success() {
        return Err(format!("command '{command}' failed: {status}"));
    }
    accept_line(&output)
}

fn encode(with: Derivation, wrapped: &[u8; WRAPPED_LEN]) -> Result<Vec<u8>, Malformed> {
    let mut out = vec![0u8; BLOB_LEN];
    let mut w = Writer::new(&mut out);
    w.u8(BLOB_VERSION)?;
    w.zeros(3)?;
    w.u32(with.cost.memory_kib)?;
    w.u32(with.cost.passes)?;
    w.u32(with.cost.lanes)?;
    w.put(&with.salt)?;
    w.put(wrapped)?;
    w.finish()?;
    Ok(out)
}

fn decode(blob: &[u8]) -> Result<(Derivation, [u8; WRAPPED_LEN]), Malformed> {
    let mut r = Reader::new(blob);
    if r.u8()? != BLOB_VERSION {
        return Err(Malformed);
    }
    r.zeros(3)?;
    let cost = Argon2Cost { memory_kib: r.u32()?, passes: r.u32()?, lanes: r.u32()? };
    let with = Derivation { cost, salt: r.array()? };
    let wrapped = r.array()?;
    r.finish()?;
    if with.cost.is_acceptable() { Ok((with, wrapped)) } else { Err(Malformed) }
}

impl KeyProvider for PassphraseKey {
    fn describe(&self) -> Result<Description, KmsError> {
        let capabilities = Capabilities { binds_context: true, ..Capabilities::default() };
        Ok(Description { uri: "passphrase:".into(), key_id: "passphrase".into(), capabilities })
    }

    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
        let mut derived = self.derived.lock();
        let with = derived.current.unwrap_or_else(|| Derivation { cost: self.cost, salt: random::array() });
        let wrapping = self.key(&mut derived, with)?;
        derived.current = Some(with);
        drop(derived);
        encode(with, &GcmSiv::wrap(&wrapping, &context.to_aad(), key))
            .map_err(|Malformed| KmsError::Config("wrapped key does not fit its layout".into()))
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        let (with, sealed) = decode(wrapped)
            .map_err(|Malformed| KmsError::BadCiphertext("not wrapped by a passphrase, or damaged".into()))?;
        let wrapping = self.key(&mut self.derived.lock(), with)?;
        let key = GcmSiv::unwrap(&wrapping, &context.to_aad(), &sealed)
            .map_err(|_| KmsError::BadCiphertext("wrong passphrase, or damaged".into()))?;
        self.derived.lock().current.get_or_insert(with);
        Ok(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kms::KeyPurpose;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn fixed(text: &[u8]) -> PassphraseSource {
        PassphraseSource::Fixed(Zeroizing::new(text.to_vec()))
    }

    fn key(text: &[u8]) -> PassphraseKey {
        PassphraseKey::open(&fixed(text), Argon2Cost::LEAST, false).unwrap()
    }

    fn context(n: u8) -> WrapContext {
        WrapContext { store: [1; 16], purpose: KeyPurpose::Kek, object: [n; 16], extra: vec![] }
    }

    fn text(source: &PassphraseSource, create: bool) -> Result<Vec<u8>, KmsError> {
        super::text(source, create).map(|t| t.to_vec())
    }

    #[test]
    fn many_wraps_cost_one_argon2_on_either_side() {
        let p = key(b"correct horse");
        let keys: Vec<Secret32> = (0..5).map(|_| Secret32::random()).collect();
        let wraps: Vec<Vec<u8>> = keys.iter().zip(0..).map(|(k, n)| p.wrap(k, &context(n)).unwrap()).collect();
        assert_eq!(p.derivations(), 1);
        let later = key(b"correct horse");
        for ((k, w), n) in keys.iter().zip(&wraps).zip(0..) {
            assert!(later.unwrap(w, &context(n)).unwrap().ct_eq(k));
        }
        // A new wrap goes on with the salt that is known, so that the next process needs one Argon2 too.
        let more = later.wrap(&keys[0], &context(9)).unwrap();
        assert_eq!(later.derivations(), 1);
        assert_eq!(more[..32], wraps[0][..32]);
        assert!(p.unwrap(&more, &context(9)).unwrap().ct_eq(&keys[0]));
        assert_eq!(p.derivations(), 1);
        assert_ne!(
            key(b"correct horse").wrap(&keys[0], &context(9)).unwrap()[16..32],
            more[16..32],
            "a salt of its own"
        );
    }

    #[test]
    fn callers_at_the_same_time_cost_one_argon2() {
        let w = key(b"p").wrap(&Secret32::random(), &context(1)).unwrap();
        let p = key(b"p");
        std::thread::scope(|t| {
            for _ in 0..4 {
                t.spawn(|| p.unwrap(&w, &context(1)).unwrap());
            }
        });
        assert_eq!(p.derivations(), 1);
    }

    /// What is wrapped is what docs/FORMAT.md says, computed here step by step.
    #[test]
    fn the_wrapped_form_is_as_documented() {
        let secret = Secret32::random();
        let w = key(b"pass").wrap(&secret, &context(2)).unwrap();
        assert_eq!(w.len(), 92);
        assert_eq!(w[..16], [1, 0, 0, 0, 0, 4, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
        let mut root = [0u8; 32];
        argon2::Argon2::new(
            argon2::Algorithm::Argon2id,
            argon2::Version::V0x13,
            argon2::Params::new(1024, 1, 1, Some(32)).unwrap(),
        )
        .hash_password_into(b"pass", &w[16..32], &mut root)
        .unwrap();
        let wrap_key = derive(&Secret32::take_from(&mut root), "envelopefs/v1/root-wrap", b"");
        let aad = [&b"envelopefs/v1/kek\0"[..], &[1; 16], &[2; 16]].concat();
        assert_eq!(GcmSiv::open_random(&wrap_key, &aad, &w[32..]).unwrap(), secret.expose());
    }

    #[test]
    fn a_wrong_passphrase_context_or_bit_is_bad_ciphertext() {
        let p = key(b"right");
        let w = p.wrap(&Secret32::random(), &context(1)).unwrap();
        let is_bad = |r: Result<Secret32, KmsError>| matches!(r, Err(KmsError::BadCiphertext(_)));
        assert!(is_bad(key(b"wrong").unwrap(&w, &context(1))));
        assert!(is_bad(p.unwrap(&w, &context(2))));
        for i in (0..16).chain([16, 31, 32, 91]) {
            let mut bad = w.clone();
            bad[i] ^= if i == 6 { 0x80 } else { 1 };
            assert!(is_bad(p.unwrap(&bad, &context(1))), "byte {i}");
        }
        assert!(is_bad(p.unwrap(&w[..91], &context(1))));
        assert!(is_bad(p.unwrap(&[&w[..], &[0]].concat(), &context(1))));
    }

    #[test]
    fn costs_from_disk_are_bounded_before_argon2_runs() {
        let p = key(b"p");
        let good = p.wrap(&Secret32::random(), &context(1)).unwrap();
        let runs = p.derivations();
        for (m, t, l) in [
            (1024 * 1024 + 1, 1, 1),
            (u32::MAX, 1, 1),
            (1023, 1, 1),
            (0, 1, 1),
            (1024, 0, 1),
            (1024, 17, 1),
            (1024, u32::MAX, 1),
            (1024, 1, 0),
            (1024, 1, 17),
        ] {
            let mut blob = good.clone();
            for (at, v) in [(4, m), (8, t), (12, l)] {
                blob[at..at + 4].copy_from_slice(&v.to_le_bytes());
            }
            assert!(matches!(p.unwrap(&blob, &context(1)), Err(KmsError::BadCiphertext(_))), "{m} {t} {l}");
            let cost = Argon2Cost { memory_kib: m, passes: t, lanes: l };
            assert!(matches!(PassphraseKey::open(&fixed(b"p"), cost, true), Err(KmsError::Config(_))));
        }
        assert_eq!(p.derivations(), runs, "none was tried");
        assert!(Argon2Cost::default().is_acceptable() && Argon2Cost::LEAST.is_acceptable());
        assert!(Argon2Cost { memory_kib: 1024 * 1024, passes: 16, lanes: 16 }.is_acceptable());
    }

    #[test]
    fn sources_give_the_passphrase_without_one_line_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        let file = PassphraseSource::File(path.clone());
        for (content, found) in [
            (&b"one two\n"[..], &b"one two"[..]),
            (b"one two", b"one two"),
            (b"one two\r\n", b"one two"),
            (b" two\n\n", b" two\n"),
            (b"\xff\x00\n", b"\xff\x00"),
        ] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(text(&file, true).unwrap(), found);
        }
        for n in [PASSPHRASE_MAX, 31, 32, 33] {
            std::fs::write(&path, vec![b'x'; n]).unwrap();
            assert_eq!(text(&file, false).unwrap(), vec![b'x'; n]);
        }
        let no = |r: Result<Vec<u8>, KmsError>| assert!(matches!(r, Err(KmsError::Credentials(_))), "{r:?}");
        for content in [&b""[..], b"\n", &[b'x'; PASSPHRASE_MAX + 1], &[b'x'; 3 * PASSPHRASE_MAX]] {
            std::fs::write(&path, content).unwrap();
            no(text(&file, false));
        }
        no(text(&PassphraseSource::File(dir.path().join("absent")), false));

        let command = |c: &str| text(&PassphraseSource::Command(c.into()), false);
        assert_eq!(command("echo 'from a command'").unwrap(), b"from a command");
        no(command("echo partly; exit 3"));
        no(command("true"));
        no(command("yes"));
        no(text(&PassphraseSource::SystemdCredential("../x".into()), false));
    }

    #[test]
    fn a_new_passphrase_is_asked_twice_and_must_be_the_same() {
        let asked = Arc::new(AtomicUsize::new(0));
        let prompt = |answers: &'static [&'static str]| {
            let asked = asked.clone();
            asked.store(0, Ordering::SeqCst);
            PassphraseSource::Prompt(Arc::new(move |_| {
                let n = asked.fetch_add(1, Ordering::SeqCst);
                let answer = answers.get(n).ok_or(io::ErrorKind::UnexpectedEof)?;
                Ok(Zeroizing::new((*answer).to_owned()))
            }))
        };
        assert_eq!(text(&prompt(&["a", "a"]), true).unwrap(), b"a");
        assert_eq!(asked.load(Ordering::SeqCst), 2);
        assert_eq!(text(&prompt(&["a"]), false).unwrap(), b"a");
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        assert!(matches!(text(&prompt(&["a", "b"]), true), Err(KmsError::Credentials(_))));
        assert!(matches!(text(&prompt(&["a"]), true), Err(KmsError::Credentials(_))));
        assert!(matches!(text(&prompt(&[""]), true), Err(KmsError::Credentials(_))));
        assert_eq!(asked.load(Ordering::SeqCst), 1, "an empty one is not asked for again");
    }

    #[test]
    fn nothing_prints_a_passphrase() {
        assert_eq!(format!("{:?}", fixed(b"secret")), "Fixed");
        assert_eq!(format!("{:?}", key(b"secret")), "PassphraseKey(redacted)");
    }

    proptest! {
        #[test]
        fn any_blob_is_safe(blob in proptest::collection::vec(any::<u8>(), 0..120)) {
            prop_assert!(decode(&blob).is_err() || blob.len() == BLOB_LEN);
        }

        #[test]
        fn any_accepted_blob_has_one_spelling(m in any::<u32>(), t in 0u32..20, l in 0u32..20, rest in any::<[u8; 32]>()) {
            let cost = Argon2Cost { memory_kib: m, passes: t, lanes: l };
            let with = Derivation { cost, salt: rest[..16].try_into().unwrap() };
            let blob = encode(with, &[rest[31]; WRAPPED_LEN]).unwrap();
            prop_assert_eq!(decode(&blob).is_ok(), cost.is_acceptable());
            if let Ok(d) = decode(&blob) {
                prop_assert_eq!(d, (with, [rest[31]; WRAPPED_LEN]));
            }
        }
    }
}
