//! `recovery:PUBLIC`: a root key that exists on paper only. Its private key is printed once and kept nowhere; its public
//! key stands in the URI, so that every new KEK can be wrapped for it while the paper lies in a safe.
//!
//! Wrapped form, 80 bytes: enc 32 ‖ ciphertext 32 ‖ tag 16, by HPKE (RFC 9180) in base mode with DHKEM(X25519,
//! HKDF-SHA256), HKDF-SHA256 and AES-256-GCM; info = [`INFO`], aad = [`WrapContext::to_aad`]. The private key is 32
//! random bytes, used as X25519 takes them (RFC 7748 section 5). For their printed form see [`printed`].
//!
//! Anybody who knows the public key can wrap for it. So the URI must be known to be genuine: it is either freshly made,
//! or read from a keyring whose MAC was verified.
//!
//! What becomes of secrets: crate `hpke` wipes the KEM's shared secret, the AEAD key, nonces and the exporter secret,
//! and `x25519-dalek` private keys and results of the exchange. It does not wipe copies of these in passing, the states
//! of HKDF and HMAC, and AES's key schedule. All of them are on the stack, none on the heap, so every call runs within
//! [`wiped`].

pub mod printed;

use super::uri::RootKeyUri;
use super::{Capabilities, Description, KeyProvider, KmsError, PassphraseSource, WrapContext, passphrase};
use crate::crypto::random;
use crate::crypto::secret::{KEY_LEN, Secret32};
use crate::crypto::stack::wiped;
use hpke::aead::{AeadTag, AesGcm256};
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, HpkeError, Kem, OpModeR, OpModeS, Serializable};
use zeroize::Zeroizing;

/// HPKE's `info`.
pub const INFO: &[u8] = b"envelopefs/v1/recovery";
/// Length of a wrapped key.
pub const WRAPPED_LEN: usize = ENC_LEN + KEY_LEN + TAG_LEN;

const ENC_LEN: usize = 32;
const TAG_LEN: usize = 16;
/// How often a key that was mistyped on a terminal is asked for.
const TRIES: usize = 3;

type Public = <X25519HkdfSha256 as Kem>::PublicKey;
type Private = <X25519HkdfSha256 as Kem>::PrivateKey;
type Encapsulated = <X25519HkdfSha256 as Kem>::EncappedKey;

/// A recovery key: with its secret, or to wrap only.
pub struct RecoveryKey {
    uri: RootKeyUri,
    public: Public,
    secret: Option<Secret32>,
}

impl std::fmt::Debug for RecoveryKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RecoveryKey({}, {})", self.uri, if self.secret.is_some() { "redacted" } else { "wraps only" })
    }
}

impl RecoveryKey {
    /// A new one.
    ///
    /// # Errors
    /// None that can happen: [`KmsError::Config`] as [`RecoveryKey::from_secret`].
    pub fn generate() -> Result<Self, KmsError> {
        Self::from_secret(Secret32::random())
    }

    /// The one with this private key.
    ///
    /// # Errors
    /// [`KmsError::Config`] if the library does not take it; it takes every one.
    pub fn from_secret(secret: Secret32) -> Result<Self, KmsError> {
        let public = wiped(|| Private::from_bytes(secret.expose()).map(|s| X25519HkdfSha256::sk_to_pk(&s)));
        let public = public.map_err(|e| unusable("the recovery key", e))?;
        Ok(Self { uri: RootKeyUri::of_recovery_key(public.to_bytes().into()), public, secret: Some(secret) })
    }

    /// The one whose public key stands in `uri`, to wrap for it.
    ///
    /// # Errors
    /// [`KmsError::Config`] if there is none.
    pub fn public(uri: &RootKeyUri) -> Result<Self, KmsError> {
        let bytes = uri.recovery_key().ok_or_else(|| {
            KmsError::Config("'recovery:' names no key yet; make one with init --recovery-key or key add".into())
        })?;
        let public = Public::from_bytes(bytes).map_err(|e| unusable(&uri.to_string(), e))?;
        Ok(Self { uri: uri.clone(), public, secret: None })
    }

    /// The one that somebody enters. On a terminal, a key with a wrong checksum is asked for again.
    ///
    /// # Errors
    /// [`KmsError::Credentials`] if there is none to be had, or it is mistyped: says where if it can.
    pub fn enter(source: &PassphraseSource) -> Result<Self, KmsError> {
        let tries = match source {
            PassphraseSource::Terminal | PassphraseSource::Prompt(_) => TRIES,
            _ => 1,
        };
        let mut asked = String::from("Recovery key: ");
        let mut mistake = None;
        for _ in 0..tries {
            let text = passphrase::ask_for(source, &asked)
                .map_err(|e| KmsError::Credentials(format!("recovery key: {}", bare(e))))?;
            match printed::read(&text) {
                Ok(secret) => return Self::from_secret(secret),
                Err(m) => {
                    asked = format!("{m}\nRecovery key: ");
                    mistake = Some(m);
                }
            }
        }
        let why = mistake.map(|m| m.to_string()).unwrap_or_default();
        Err(KmsError::Credentials(format!("recovery key: {why}")))
    }

    /// As [`RecoveryKey::enter`]; if `uri` names a recovery key, it must be that one.
    ///
    /// # Errors
    /// As [`RecoveryKey::enter`]; [`KmsError::BadCiphertext`] if it is another one.
    pub fn enter_that_of(uri: &RootKeyUri, source: &PassphraseSource) -> Result<Self, KmsError> {
        let key = Self::enter(source)?;
        if uri.recovery_key().is_none() || key.uri == *uri {
            return Ok(key);
        }
        Err(KmsError::BadCiphertext(format!("the recovery key entered is {}, not {uri}", key.uri)))
    }

    /// Its URI, with the public key.
    pub fn uri(&self) -> &RootKeyUri {
        &self.uri
    }

    /// The secret as it is printed, if it is at hand.
    pub fn printed(&self) -> Option<Zeroizing<String>> {
        self.secret.as_ref().map(printed::print)
    }
}

/// Whether a recorded URI is that of a recovery key.
pub fn is_recovery(uri: &str) -> bool {
    uri.starts_with("recovery:")
}

fn unusable(what: &str, e: HpkeError) -> KmsError {
    KmsError::Config(format!("{what}: {e}"))
}

/// The text of a failure to read a passphrase, without saying that it was one.
fn bare(e: KmsError) -> String {
    match e {
        KmsError::Credentials(t) => t.strip_prefix("passphrase: ").map_or(t.clone(), str::to_owned),
        other => other.to_string(),
    }
}

/// The kernel's generator, as HPKE takes one.
struct Kernel;

impl hpke::rand_core::RngCore for Kernel {
    fn next_u32(&mut self) -> u32 {
        u32::from_ne_bytes(random::array())
    }

    fn next_u64(&mut self) -> u64 {
        u64::from_ne_bytes(random::array())
    }

    fn fill_bytes(&mut self, to: &mut [u8]) {
        random::fill(to);
    }
}

impl hpke::rand_core::CryptoRng for Kernel {}

impl KeyProvider for RecoveryKey {
    fn describe(&self) -> Result<Description, KmsError> {
        let uri = self.uri.to_string();
        let capabilities =
            Capabilities { binds_context: true, wrap_only: self.secret.is_none(), ..Capabilities::default() };
        Ok(Description { key_id: uri.clone(), uri, capabilities })
    }

    fn wrap(&self, key: &Secret32, context: &WrapContext) -> Result<Vec<u8>, KmsError> {
        let mut data = Zeroizing::new(*key.expose());
        let sealed = wiped(|| {
            hpke::single_shot_seal_in_place_detached::<AesGcm256, HkdfSha256, X25519HkdfSha256, _>(
                &OpModeS::Base,
                &self.public,
                INFO,
                &mut *data,
                &context.to_aad(),
                &mut Kernel,
            )
        });
        // A public key of low order: nobody has its private key, and the exchange gives zeros.
        let (enc, tag) = sealed.map_err(|e| unusable(&self.uri.to_string(), e))?;
        Ok([&enc.to_bytes()[..], &data[..], &tag.to_bytes()[..]].concat())
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> Result<Secret32, KmsError> {
        let Some(secret) = &self.secret else {
            return Err(KmsError::Credentials(format!("{}: the recovery key is needed: use --recovery", self.uri)));
        };
        let bad = |_| KmsError::BadCiphertext(format!("not for {}", self.uri));
        let sealed = <&[u8; WRAPPED_LEN]>::try_from(wrapped).map_err(|_| bad(HpkeError::OpenError))?;
        let (enc, rest) = sealed.split_at(ENC_LEN);
        let (data, tag) = rest.split_at(KEY_LEN);
        Secret32::try_build(|out| {
            out.copy_from_slice(data);
            wiped(|| {
                hpke::single_shot_open_in_place_detached::<AesGcm256, HkdfSha256, X25519HkdfSha256>(
                    &OpModeR::Base,
                    &Private::from_bytes(secret.expose())?,
                    &Encapsulated::from_bytes(enc)?,
                    INFO,
                    out,
                    &context.to_aad(),
                    &AeadTag::from_bytes(tag)?,
                )
            })
        })
        .map_err(bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kms::{ConnectOptions, KeyPurpose, connect};
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn context() -> WrapContext {
        WrapContext { store: [1; 16], purpose: KeyPurpose::Kek, object: [2; 16], extra: vec![] }
    }

    fn is_bad(r: Result<Secret32, KmsError>) -> bool {
        matches!(r, Err(KmsError::BadCiphertext(_)))
    }

    #[test]
    fn what_the_public_key_wraps_the_secret_alone_unwraps() {
        let full = RecoveryKey::generate().unwrap();
        let public = RecoveryKey::public(full.uri()).unwrap();
        let key = Secret32::random();
        let w = public.wrap(&key, &context()).unwrap();
        assert_eq!(w.len(), WRAPPED_LEN);
        assert!(full.unwrap(&w, &context()).unwrap().ct_eq(&key));
        assert!(matches!(public.unwrap(&w, &context()), Err(KmsError::Credentials(_))));
        assert!(is_bad(RecoveryKey::generate().unwrap().unwrap(&w, &context())));
        assert_ne!(public.wrap(&key, &context()).unwrap(), w, "a fresh key for each wrap");
        for other in [
            WrapContext { store: [9; 16], ..context() },
            WrapContext { purpose: KeyPurpose::StoreSecret, ..context() },
            WrapContext { object: [9; 16], ..context() },
            WrapContext { extra: vec![0], ..context() },
        ] {
            assert!(is_bad(full.unwrap(&w, &other)));
        }
        for at in 0..w.len() {
            let mut bad = w.clone();
            bad[at] ^= 1;
            assert!(is_bad(full.unwrap(&bad, &context())), "byte {at}");
        }
        assert!(is_bad(full.unwrap(&w[1..], &context())));
        assert!(is_bad(full.unwrap(&[&w[..], &[0]].concat(), &context())));
        let capabilities = |k: &RecoveryKey| k.describe().unwrap().capabilities;
        assert!(capabilities(&public).wrap_only && !capabilities(&full).wrap_only);
    }

    /// RFC 7748 section 6.1: Alice's key pair.
    #[test]
    fn the_public_key_is_x25519s() {
        let secret = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo";
        let public = "hSDwCYkwp1R0i33ctD73Wg2_Og0mOBr066SpjqqbTmo";
        use base64::Engine as _;
        let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(secret).unwrap();
        let key = RecoveryKey::from_secret(Secret32::build(|b| b.copy_from_slice(&bytes))).unwrap();
        assert_eq!(key.uri().to_string(), format!("recovery:{public}"));
    }

    /// RFC 9180 appendix A.1 is this KEM and KDF with AES-128-GCM; here the whole schedule is computed step by step with
    /// the suite in use, from the primitives, and must open what [`RecoveryKey::wrap`] made.
    #[test]
    fn the_wrapped_form_is_rfc_9180_base_mode() {
        use hmac::{Hmac, KeyInit, Mac};
        fn extract(salt: &[u8], suite: &[u8], label: &[u8], ikm: &[u8]) -> Vec<u8> {
            let mut m = Hmac::<sha2::Sha256>::new_from_slice(salt).unwrap();
            [b"HPKE-v1", suite, label, ikm].iter().for_each(|p| m.update(p));
            m.finalize().into_bytes().to_vec()
        }
        fn expand(prk: &[u8], suite: &[u8], label: &[u8], info: &[u8], len: u16) -> Vec<u8> {
            let mut m = Hmac::<sha2::Sha256>::new_from_slice(prk).unwrap();
            [&len.to_be_bytes(), &b"HPKE-v1"[..], suite, label, info, &[1]].iter().for_each(|p| m.update(p));
            m.finalize().into_bytes()[..usize::from(len)].to_vec()
        }
        let full = RecoveryKey::generate().unwrap();
        let key = Secret32::random();
        let w = full.wrap(&key, &context()).unwrap();
        let (enc, sealed) = w.split_at(32);
        let private = aws_lc_rs::agreement::PrivateKey::from_private_key(
            &aws_lc_rs::agreement::X25519,
            full.secret.as_ref().unwrap().expose(),
        )
        .unwrap();
        let peer = aws_lc_rs::agreement::UnparsedPublicKey::new(&aws_lc_rs::agreement::X25519, enc);
        let dh = aws_lc_rs::agreement::agree(&private, peer, (), |s| Ok(s.to_vec())).unwrap();

        let kem = b"KEM\x00\x20";
        let kem_context = [enc, full.uri().recovery_key().unwrap()].concat();
        let prk = extract(b"", kem, b"eae_prk", &dh);
        let shared = expand(&prk, kem, b"shared_secret", &kem_context, 32);
        let suite = b"HPKE\x00\x20\x00\x01\x00\x02";
        let schedule = [
            &[0][..],
            &extract(b"", suite, b"psk_id_hash", b""),
            &extract(b"", suite, b"info_hash", b"envelopefs/v1/recovery"),
        ]
        .concat();
        let secret = extract(&shared, suite, b"secret", b"");
        let aead_key = expand(&secret, suite, b"key", &schedule, 32);
        let nonce: [u8; 12] = expand(&secret, suite, b"base_nonce", &schedule, 12).try_into().unwrap();
        let aead = aws_lc_rs::aead::UnboundKey::new(&aws_lc_rs::aead::AES_256_GCM, &aead_key).unwrap();
        let aad = [&b"envelopefs/v1/kek\0"[..], &[1; 16], &[2; 16]].concat();
        let mut data = sealed.to_vec();
        let plain = aws_lc_rs::aead::LessSafeKey::new(aead)
            .open_in_place(
                aws_lc_rs::aead::Nonce::assume_unique_for_key(nonce),
                aws_lc_rs::aead::Aad::from(&aad),
                &mut data,
            )
            .unwrap();
        assert_eq!(plain, key.expose());
    }

    #[test]
    fn a_public_key_of_low_order_is_refused() {
        for low in [[0; 32], std::array::from_fn(|i| u8::from(i == 0))] {
            let k = RecoveryKey::public(&RootKeyUri::of_recovery_key(low)).unwrap();
            assert!(matches!(k.wrap(&Secret32::random(), &context()), Err(KmsError::Config(_))));
        }
    }

    #[test]
    fn it_is_entered_as_it_was_printed_and_a_slip_is_asked_about_again() {
        let key = RecoveryKey::generate().unwrap();
        let text = key.printed().unwrap();
        let mut slip = text.to_string();
        slip.replace_range(0..1, if text.starts_with('A') { "B" } else { "A" });
        let asked = Arc::new(AtomicUsize::new(0));
        let prompt = |answers: Vec<String>| {
            let asked = asked.clone();
            asked.store(0, Ordering::SeqCst);
            PassphraseSource::Prompt(Arc::new(move |shown: &str| {
                let n = asked.fetch_add(1, Ordering::SeqCst);
                assert_eq!(n > 0, shown.contains("mistyped: look at group 1\n"), "{shown}");
                assert!(shown.ends_with("Recovery key: "));
                answers.get(n).map(|a| Zeroizing::new(a.clone())).ok_or(io::ErrorKind::UnexpectedEof.into())
            }))
        };
        let entered = RecoveryKey::enter(&prompt(vec![slip.clone(), text.to_lowercase()])).unwrap();
        assert_eq!(entered.uri(), key.uri());
        let e = RecoveryKey::enter(&prompt(vec![slip.clone(); 9])).unwrap_err();
        assert_eq!(asked.load(Ordering::SeqCst), 3);
        assert_eq!(e, KmsError::Credentials("recovery key: mistyped: look at group 1".into()));
        let fixed = |t: &str| PassphraseSource::Fixed(Zeroizing::new(t.as_bytes().to_vec()));
        assert_eq!(RecoveryKey::enter(&fixed(&text)).unwrap().uri(), key.uri());
        assert!(matches!(RecoveryKey::enter(&fixed(&slip)), Err(KmsError::Credentials(_))));
        assert!(matches!(RecoveryKey::enter(&fixed("")), Err(KmsError::Credentials(t)) if !t.contains("passphrase")));
    }

    #[test]
    fn connect_gives_the_secret_only_to_who_has_it() {
        let key = RecoveryKey::generate().unwrap();
        let text = key.printed().unwrap();
        let with = |recovery| ConnectOptions { recovery, ..Default::default() };
        let source = PassphraseSource::Fixed(Zeroizing::new(text.as_bytes().to_vec()));
        let w = connect(key.uri(), &with(None), false).unwrap().wrap(&Secret32::random(), &context()).unwrap();
        assert!(connect(key.uri(), &with(None), false).unwrap().unwrap(&w, &context()).is_err());
        assert!(connect(key.uri(), &with(Some(source)), false).unwrap().unwrap(&w, &context()).is_ok());
        let source = PassphraseSource::Fixed(Zeroizing::new(text.as_bytes().to_vec()));
        let other = RootKeyUri::of_recovery_key([7; 32]);
        assert!(matches!(connect(&other, &with(Some(source)), false), Err(KmsError::BadCiphertext(_))));
        let nameless = RootKeyUri::parse("recovery:").unwrap();
        assert!(matches!(connect(&nameless, &with(None), true), Err(KmsError::Config(_))));
    }

    #[test]
    fn nothing_prints_it_by_accident() {
        let key = RecoveryKey::generate().unwrap();
        assert!(format!("{key:?}").ends_with("redacted)"));
    }
}
