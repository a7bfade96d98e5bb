//! Wrapping and unwrapping in a session, by each mechanism.

use super::keys::Key;
use super::mechanism::Method;
use super::token::Fail;
use crate::crypto::kdf::{ct_eq, sha256};
use crate::crypto::random;
use crate::crypto::secret::{KEY_LEN, Secret32};
use crate::kms::KmsError;
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use zeroize::Zeroizing;

/// Length of what is wrapped where the context's hash goes with the key.
const PAIR_LEN: usize = 2 * KEY_LEN;

/// IV and ciphertext.
pub type Sealed = (Vec<u8>, Vec<u8>);

/// The PKCS#11 name of a mechanism.
pub fn mechanism_type(m: Method) -> MechanismType {
    match m {
        Method::AesGcm => MechanismType::AES_GCM,
        Method::AesKeyWrapPad => MechanismType::AES_KEY_WRAP_PAD,
        Method::AesKeyWrap => MechanismType::AES_KEY_WRAP,
        Method::RsaOaepSha256 | Method::RsaOaepSha1 => MechanismType::RSA_PKCS_OAEP,
    }
}

/// Wraps `secret`, bound to `context`.
///
/// # Errors
/// As the module says.
pub fn seal(s: &Session, key: &Key, m: Method, secret: &Secret32, context: &[u8]) -> Result<Sealed, Fail> {
    let (iv, ciphertext) = match m {
        Method::AesGcm => {
            let mut iv = nonce(s)?;
            let ciphertext = {
                let params = GcmParams::new(&mut iv, context, 128.into())?;
                s.encrypt(&Mechanism::AesGcm(params), key.handle, secret.expose())?
            };
            // Some tokens choose the IV themselves and write it where ours was.
            (iv, ciphertext)
        }
        Method::AesKeyWrapPad => (vec![], wrap_object(s, key, &Mechanism::AesKeyWrapPad, &pair(secret, context))?),
        Method::AesKeyWrap => (vec![], wrap_object(s, key, &Mechanism::AesKeyWrap, &pair(secret, context))?),
        Method::RsaOaepSha256 | Method::RsaOaepSha1 => {
            let public = key.public.ok_or_else(|| KmsError::NotFound("the RSA key's public half".into()))?;
            (vec![], s.encrypt(&oaep(m), public, &pair(secret, context))?)
        }
    };
    Ok((iv, ciphertext))
}

/// Reverses [`seal`].
///
/// # Errors
/// [`KmsError::BadCiphertext`] if it belongs to another context; as the module says.
pub fn open(s: &Session, key: &Key, m: Method, iv: &[u8], sealed: &[u8], context: &[u8]) -> Result<Secret32, Fail> {
    let plain = match m {
        Method::AesGcm => {
            let mut iv = iv.to_vec();
            let params = GcmParams::new(&mut iv, context, 128.into())?;
            Zeroizing::new(s.decrypt(&Mechanism::AesGcm(params), key.handle, sealed)?)
        }
        Method::AesKeyWrapPad => unwrap_object(s, key, &Mechanism::AesKeyWrapPad, sealed)?,
        Method::AesKeyWrap => unwrap_object(s, key, &Mechanism::AesKeyWrap, sealed)?,
        Method::RsaOaepSha256 | Method::RsaOaepSha1 => Zeroizing::new(s.decrypt(&oaep(m), key.handle, sealed)?),
    };
    let (secret, rest) = plain.split_at_checked(KEY_LEN).ok_or_else(|| bad("too short"))?;
    let bound = if m.has_associated_data() { rest.is_empty() } else { ct_eq(rest, &sha256(context)) };
    if !bound {
        return Err(bad("it was wrapped for another context").into());
    }
    Ok(Secret32::build(|b| b.copy_from_slice(secret)))
}

fn bad(why: &str) -> KmsError {
    KmsError::BadCiphertext(why.into())
}

/// A random IV from the token; from the kernel if the token makes no random numbers.
fn nonce(s: &Session) -> Result<Vec<u8>, Error> {
    let mut iv = vec![0u8; Method::AesGcm.iv_len()];
    match s.generate_random_slice(&mut iv) {
        Ok(()) => {}
        Err(Error::Pkcs11(RvError::RandomNoRng | RvError::FunctionNotSupported, _) | Error::NullFunctionPointer) => {
            random::fill(&mut iv);
        }
        Err(e) => return Err(e),
    }
    Ok(iv)
}

/// key ‖ SHA-256(context).
fn pair(secret: &Secret32, context: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut v = Zeroizing::new(Vec::with_capacity(PAIR_LEN));
    v.extend_from_slice(secret.expose());
    v.extend_from_slice(&sha256(context));
    v
}

fn oaep(m: Method) -> Mechanism<'static> {
    let (hash, mgf) = match m {
        Method::RsaOaepSha1 => (MechanismType::SHA1, PkcsMgfType::MGF1_SHA1),
        _ => (MechanismType::SHA256, PkcsMgfType::MGF1_SHA256),
    };
    Mechanism::RsaPkcsOaep(PkcsOaepParams::new(hash, mgf, PkcsOaepSource::empty()))
}

/// A key object of the session that is taken away again, whatever happens.
struct Temporary<'a> {
    session: &'a Session,
    object: ObjectHandle,
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        // If it fails the object goes with the session, which an error closes.
        let _ = self.session.destroy_object(self.object);
    }
}

fn template() -> Vec<Attribute> {
    vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::GENERIC_SECRET),
        Attribute::Token(false),
        Attribute::Private(true),
        Attribute::Sensitive(false),
        Attribute::Extractable(true),
    ]
}

fn wrap_object(session: &Session, key: &Key, m: &Mechanism<'_>, plain: &[u8]) -> Result<Vec<u8>, Fail> {
    let mut t = template();
    t.push(Attribute::Value(plain.to_vec()));
    let object = session.create_object(&t);
    wipe(&mut t);
    let object = Temporary { session, object: object? };
    let mut wrapped = session.wrap_key(m, key.handle, object.object)?;
    // Asked for the length first, a module may name more than it then writes.
    wrapped.truncate(plain.len() + 8);
    Ok(wrapped)
}

fn unwrap_object(session: &Session, key: &Key, m: &Mechanism<'_>, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, Fail> {
    let object = Temporary { session, object: session.unwrap_key(m, key.handle, sealed, &template())? };
    let mut found = session.get_attributes(object.object, &[AttributeType::Value])?;
    match found.pop() {
        Some(Attribute::Value(v)) => Ok(Zeroizing::new(v)),
        _ => Err(KmsError::Config("the token does not show the value of an unwrapped session key".into()).into()),
    }
}

fn wipe(attributes: &mut [Attribute]) {
    for a in attributes {
        if let Attribute::Value(v) = a {
            zeroize::Zeroize::zeroize(v);
        }
    }
}
