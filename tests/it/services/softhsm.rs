//! A SoftHSM token for one test. SoftHSM reads where its tokens lie from the environment of the process, once, so each
//! test runs alone in a process of its own: this test program again, told to run that one test.

use crate::cli::support::Bench;
use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use envelopefs::kms::pkcs11::Pkcs11Key;
use envelopefs::kms::services::Pkcs11Options;
use envelopefs::kms::{KeyProvider, KmsError, RootKeyUri};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

/// The module of the package `softhsm2`.
pub const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
/// PINs of tokens that live as long as one test.
pub const PIN: &str = "1234-test-only";
const SO_PIN: &str = "5678-test-only";
pub const TOKEN: &str = "test token";

const DIR: &str = "ENVELOPEFS_TEST_SOFTHSM";

/// A directory with tokens, and one token called [`TOKEN`] in it.
pub struct SoftHsm {
    dir: PathBuf,
}

/// Runs `scenario` as the test `name` of `module` (`module_path!()`) in a process that has a token of its own.
#[track_caller]
pub fn alone(module: &str, name: &str, scenario: impl FnOnce(&SoftHsm)) {
    if let Some(dir) = std::env::var_os(DIR) {
        return scenario(&SoftHsm { dir: dir.into() });
    }
    let dir = tempfile::Builder::new().prefix("envelopefs-softhsm-").tempdir().unwrap();
    let hsm = SoftHsm { dir: dir.path().to_owned() };
    std::fs::create_dir(hsm.tokens()).unwrap();
    let conf =
        format!("directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n", hsm.tokens().display());
    std::fs::write(hsm.path("softhsm2.conf"), conf).unwrap();
    std::fs::write(hsm.path("pin"), format!("{PIN}\n")).unwrap();
    hsm.init_token(TOKEN);
    let test = format!("{}::{name}", module.strip_prefix("it::").unwrap());
    let out = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &test, "--nocapture", "--test-threads=1"])
        .env("SOFTHSM2_CONF", hsm.path("softhsm2.conf"))
        .env(DIR, dir.path())
        .output()
        .unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() && said.contains("1 passed"), "{said}");
    print!("{said}");
}

impl SoftHsm {
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Where the tokens lie, a directory each.
    pub fn tokens(&self) -> PathBuf {
        self.path("tokens")
    }

    /// Makes another token, by the command that the documents name.
    pub fn init_token(&self, label: &str) {
        let o = Command::new("softhsm2-util")
            .args(["--init-token", "--free", "--label", label, "--pin", PIN, "--so-pin", SO_PIN])
            .env("SOFTHSM2_CONF", self.path("softhsm2.conf"))
            .output()
            .unwrap();
        assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    }

    /// The module in this process, ready for use.
    pub fn module(&self) -> &'static Pkcs11 {
        static MODULE_HERE: OnceLock<Pkcs11> = OnceLock::new();
        MODULE_HERE.get_or_init(|| {
            let p = Pkcs11::new(MODULE).unwrap();
            match p.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
                Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => p,
                Err(e) => panic!("{e}"),
            }
        })
    }

    pub fn slot(&self, label: &str) -> Slot {
        let p = self.module();
        let slots = p.get_slots_with_initialized_token().unwrap();
        slots.into_iter().find(|s| p.get_token_info(*s).unwrap().label().trim_end() == label).unwrap()
    }

    /// A session of the token's user, by the side of those that the provider has.
    pub fn session(&self, token: &str) -> Session {
        let s = self.module().open_rw_session(self.slot(token)).unwrap();
        match s.login(UserType::User, Some(&PIN.to_owned().into())) {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => s,
            Err(e) => panic!("{e}"),
        }
    }

    /// Generates a 256-bit AES key that cannot leave the token; `more` replaces or adds attributes.
    pub fn aes_on(&self, token: &str, label: &str, id: u8, more: &[Attribute]) {
        let mut t = vec![
            Attribute::Token(true),
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
            Attribute::ValueLen(32.into()),
            Attribute::Encrypt(true),
            Attribute::Decrypt(true),
            Attribute::Wrap(false),
            Attribute::Unwrap(false),
            Attribute::Label(label.into()),
            Attribute::Id(vec![id]),
        ];
        t.retain(|a| more.iter().all(|m| m.attribute_type() != a.attribute_type()));
        t.extend_from_slice(more);
        self.session(token).generate_key(&Mechanism::AesKeyGen, &t).unwrap();
    }

    pub fn aes(&self, label: &str, id: u8, more: &[Attribute]) {
        self.aes_on(TOKEN, label, id, more);
    }

    /// An AES key for wrapping key objects only.
    pub fn aes_wrapping(&self, label: &str, id: u8, more: &[Attribute]) {
        let mut t =
            vec![Attribute::Encrypt(false), Attribute::Decrypt(false), Attribute::Wrap(true), Attribute::Unwrap(true)];
        t.extend_from_slice(more);
        self.aes(label, id, &t);
    }

    pub fn rsa(&self, label: &str, id: u8, bits: u64) {
        let both = [Attribute::Token(true), Attribute::Label(label.into()), Attribute::Id(vec![id])];
        let public = [
            Attribute::Private(false),
            Attribute::Encrypt(true),
            Attribute::ModulusBits(bits.into()),
            Attribute::PublicExponent(vec![1, 0, 1]),
        ];
        let private = [
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
            Attribute::Decrypt(true),
        ];
        let (public, private) = ([&both[..], &public].concat(), [&both[..], &private].concat());
        self.session(TOKEN).generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &public, &private).unwrap();
    }

    /// A key whose bytes came from outside.
    pub fn import(&self, label: &str, id: u8) {
        let t = [
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(KeyType::AES),
            Attribute::Token(true),
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
            Attribute::Encrypt(true),
            Attribute::Decrypt(true),
            Attribute::Label(label.into()),
            Attribute::Id(vec![id]),
            Attribute::Value(vec![0x42; 32]),
        ];
        self.session(TOKEN).create_object(&t).unwrap();
    }

    /// A key without CKA_ID.
    pub fn aes_without_id(&self, label: &str) {
        self.aes(label, 0, &[Attribute::Id(vec![])]);
    }

    /// `plain` wrapped with CKM_AES_KEY_WRAP under the key with this CKA_ID.
    pub fn key_wrap(&self, id: u8, plain: &[u8]) -> Vec<u8> {
        let s = self.session(TOKEN);
        let t = [
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(KeyType::GENERIC_SECRET),
            Attribute::Token(false),
            Attribute::Private(true),
            Attribute::Extractable(true),
            Attribute::Value(plain.to_vec()),
        ];
        let object = s.create_object(&t).unwrap();
        s.wrap_key(&Mechanism::AesKeyWrap, Self::objects(&s, id)[0], object).unwrap()
    }

    /// How many session objects there are in this process.
    pub fn session_objects(&self) -> usize {
        self.session(TOKEN).find_objects(&[Attribute::Token(false)]).unwrap().len()
    }

    pub fn destroy_public(&self, id: u8) {
        let s = self.session(TOKEN);
        let t = [Attribute::Class(ObjectClass::PUBLIC_KEY), Attribute::Id(vec![id])];
        s.find_objects(&t).unwrap().into_iter().for_each(|o| s.destroy_object(o).unwrap());
    }

    /// All objects with this CKA_ID.
    fn objects(s: &Session, id: u8) -> Vec<ObjectHandle> {
        s.find_objects(&[Attribute::Id(vec![id])]).unwrap()
    }

    pub fn destroy(&self, id: u8) {
        let s = self.session(TOKEN);
        let found = Self::objects(&s, id);
        assert!(!found.is_empty());
        found.into_iter().for_each(|o| s.destroy_object(o).unwrap());
    }

    /// What a reset of the device does to all sessions. Straight from the library: the client has no name for it.
    pub fn close_all_sessions(&self) {
        let path = std::ffi::CString::new(MODULE).unwrap();
        // SAFETY: the module is loaded and initialised; the function takes a slot's number and returns a code, both
        // CK_ULONG, as PKCS#11 lays down.
        let code = unsafe {
            let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
            assert!(!library.is_null());
            let f = libc::dlsym(library, c"C_CloseAllSessions".as_ptr());
            assert!(!f.is_null());
            let f: extern "C" fn(libc::c_ulong) -> libc::c_ulong = std::mem::transmute(f);
            f(self.slot(TOKEN).id())
        };
        assert_eq!(code, 0);
    }

    /// Whether the token has seen a wrong PIN since the last right one.
    pub fn pin_count_is_low(&self) -> bool {
        self.module().get_token_info(self.slot(TOKEN)).unwrap().user_pin_count_low()
    }

    /// The root key with this label; the provider itself, without the guard that `kms::connect` puts around it.
    pub fn connect(&self, label: &str) -> Result<Arc<dyn KeyProvider>, KmsError> {
        self.connect_with(&format!("pkcs11:token=test%20token;object={label}"), |_| {})
    }

    pub fn connect_with(
        &self,
        uri: &str,
        change: impl FnOnce(&mut Pkcs11Options),
    ) -> Result<Arc<dyn KeyProvider>, KmsError> {
        let pin_file = Some(self.path("pin"));
        let mut o = Pkcs11Options { module: Some(MODULE.into()), pin_file, ..Default::default() };
        change(&mut o);
        Ok(Arc::new(Pkcs11Key::connect(&RootKeyUri::parse(uri).unwrap(), &o)?))
    }
}

/// Writes down the calls to the module that the commands of a bench make: a module of the package `opensc` that passes
/// everything on to another one.
pub struct Spy {
    module: PathBuf,
    log: PathBuf,
}

impl Spy {
    pub fn new(b: &Bench) -> Self {
        let places = std::fs::read_dir("/usr/lib").unwrap().map(|e| e.unwrap().path().join("pkcs11-spy.so"));
        let module = places.into_iter().find(|p| p.exists());
        let module = module.expect("pkcs11-spy.so is not there: run `make setup`");
        Self { module, log: b.path("spy.log") }
    }

    /// The module to use.
    pub fn module(&self) -> &Path {
        &self.module
    }

    pub fn prepare(&self, c: &mut Command) {
        c.env("PKCS11SPY", MODULE).env("PKCS11SPY_OUTPUT", &self.log);
    }

    /// How often `function` was called since the last [`Spy::clear`].
    pub fn calls(&self, function: &str) -> usize {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        // Lines such as "23: C_Login".
        text.lines().filter(|l| l.split_once(": ").is_some_and(|(_, f)| f.trim() == function)).count()
    }

    pub fn clear(&self) {
        let _ = std::fs::write(&self.log, "");
    }
}

/// A library that can be loaded and is no module.
pub fn library_without_pkcs11() -> PathBuf {
    // What this process itself was linked with.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let libc = maps.lines().filter_map(|l| l.split_whitespace().nth(5)).find(|p| p.contains("/libc.so"));
    libc.expect("the C library is mapped").into()
}
