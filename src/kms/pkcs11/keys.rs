//! Finding keys on a token and reading what the token says of them.

use super::fault::{Meaning, meaning};
use super::matching::{Candidate, Kind, Wanted};
use super::mechanism::{KeyFacts, named};
use super::token::{Fail, Token};
use crate::kms::KmsError;
use cryptoki::error::Error;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;

/// A key that was found. The handles hold for one generation of the token.
#[derive(Debug, Clone)]
pub struct Key {
    pub kind: Kind,
    pub handle: ObjectHandle,
    /// The public half of an RSA key.
    pub public: Option<ObjectHandle>,
    pub facts: KeyFacts,
}

/// The key that the URI names, on this token.
///
/// # Errors
/// [`KmsError::NotFound`], or [`KmsError::Config`] if there are several; as the module says.
pub fn named_by(s: &Session, token: &Token, wanted: &Wanted) -> Result<Key, Fail> {
    let mut found = Vec::new();
    for kind in wanted.kinds() {
        for handle in find(s, *kind, wanted.label(), wanted.id())? {
            found.push((*kind, handle));
        }
    }
    if found.is_empty() {
        token.check_sight(s)?;
    }
    let mut keys = Vec::new();
    for (kind, handle) in &found {
        keys.push((*kind, facts(s, *kind, *handle)?));
    }
    let mut candidates = Vec::new();
    for ((kind, f), (_, handle)) in keys.iter().zip(&found) {
        // Not asked for where nothing hangs on it: tokens answer with errors of all kinds.
        let start = if found.len() > 1 { start_date(s, *handle)? } else { None };
        candidates.push(Candidate { kind: *kind, id: f.id.clone(), start });
    }
    let at = wanted.newest_key(&candidates, token.identity())?;
    let ((kind, handle), (_, facts)) = (found.swap_remove(at), keys.swap_remove(at));
    // Wraps record the CKA_ID, so it must not mean another key as well.
    if !facts.id.is_empty() && find(s, kind, None, Some(&facts.id))?.len() > 1 {
        let why = "is on the token more than once; give each key a CKA_ID of its own";
        return Err(KmsError::Config(format!("{}: {} {why}", wanted.uri(), named(&facts.id, kind))).into());
    }
    complete(s, kind, handle, facts)
}

/// The key of this kind with this CKA_ID.
///
/// # Errors
/// [`KmsError::NotFound`], also if there are several; as the module says.
pub fn with_id(s: &Session, token: &Token, kind: Kind, id: &[u8]) -> Result<Key, Fail> {
    let found = find(s, kind, None, Some(id))?;
    match found.as_slice() {
        [handle] => complete(s, kind, *handle, facts(s, kind, *handle)?),
        [] => {
            token.check_sight(s)?;
            let why =
                "not on the token any more; bring it back from its backup, or open the store with another root key";
            Err(KmsError::NotFound(format!("{} of {}: {why}", named(id, kind), token.identity())).into())
        }
        _ => {
            let why = "on the token more than once; give each key a CKA_ID of its own";
            Err(KmsError::NotFound(format!("{} of {}: {why}", named(id, kind), token.identity())).into())
        }
    }
}

fn complete(s: &Session, kind: Kind, handle: ObjectHandle, facts: KeyFacts) -> Result<Key, Fail> {
    let public = match kind {
        Kind::Aes => None,
        Kind::Rsa => public_half(s, handle, &facts.id)?,
    };
    Ok(Key { kind, handle, public, facts })
}

fn find(s: &Session, kind: Kind, label: Option<&[u8]>, id: Option<&[u8]>) -> Result<Vec<ObjectHandle>, Error> {
    let (class, key_type) = match kind {
        Kind::Aes => (ObjectClass::SECRET_KEY, KeyType::AES),
        Kind::Rsa => (ObjectClass::PRIVATE_KEY, KeyType::RSA),
    };
    let mut template = vec![Attribute::Class(class), Attribute::KeyType(key_type), Attribute::Token(true)];
    template.extend(label.map(|l| Attribute::Label(l.to_vec())));
    template.extend(id.map(|i| Attribute::Id(i.to_vec())));
    s.find_objects(&template)
}

/// The public key with the same CKA_ID and the same modulus.
fn public_half(s: &Session, private: ObjectHandle, id: &[u8]) -> Result<Option<ObjectHandle>, Error> {
    let ours = modulus(s, private)?;
    let template = [
        Attribute::Class(ObjectClass::PUBLIC_KEY),
        Attribute::KeyType(KeyType::RSA),
        Attribute::Token(true),
        Attribute::Id(id.to_vec()),
    ];
    for handle in s.find_objects(&template)? {
        if modulus(s, handle)? == ours {
            return Ok(Some(handle));
        }
    }
    Ok(None)
}

fn modulus(s: &Session, handle: ObjectHandle) -> Result<Vec<u8>, Error> {
    let found = s.get_attributes(handle, &[AttributeType::Modulus])?;
    Ok(found
        .into_iter()
        .find_map(|a| match a {
            Attribute::Modulus(m) => Some(m.into_iter().skip_while(|b| *b == 0).collect()),
            _ => None,
        })
        .unwrap_or_default())
}

/// CKA_START_DATE. Tokens leave an absent one empty, or fill it with zeros or with blanks, which the client library takes
/// for an error; SoftHSM has errors of its own for those of private objects.
fn start_date(s: &Session, handle: ObjectHandle) -> Result<Option<[u8; 8]>, Error> {
    let found = match s.get_attributes(handle, &[AttributeType::StartDate]) {
        Err(e) if matches!(meaning(&e), Meaning::Doubtful | Meaning::Unsupported) => return Ok(None),
        found => found?,
    };
    let Some(Attribute::StartDate(date)) = found.first() else { return Ok(None) };
    let ([a, b, c, d], [e, f], [g, h]) = (date.year, date.month, date.day);
    let all = [a, b, c, d, e, f, g, h];
    Ok((all.iter().all(u8::is_ascii_digit) && all != *b"00000000").then_some(all))
}

fn facts(s: &Session, kind: Kind, handle: ObjectHandle) -> Result<KeyFacts, Error> {
    let mut wanted = vec![
        AttributeType::Id,
        AttributeType::Label,
        AttributeType::Extractable,
        AttributeType::NeverExtractable,
        AttributeType::Sensitive,
        AttributeType::AlwaysSensitive,
        AttributeType::Decrypt,
        AttributeType::Unwrap,
    ];
    wanted.extend_from_slice(match kind {
        Kind::Aes => &[AttributeType::Encrypt, AttributeType::Wrap, AttributeType::ValueLen],
        Kind::Rsa => &[AttributeType::AlwaysAuthenticate],
    });
    let mut f = KeyFacts::default();
    for a in s.get_attributes(handle, &wanted)? {
        match a {
            Attribute::Id(v) => f.id = v,
            Attribute::Label(v) => f.label = v,
            Attribute::Extractable(v) => f.extractable = Some(v),
            Attribute::NeverExtractable(v) => f.never_extractable = Some(v),
            Attribute::Sensitive(v) => f.sensitive = Some(v),
            Attribute::AlwaysSensitive(v) => f.always_sensitive = Some(v),
            Attribute::AlwaysAuthenticate(v) => f.always_authenticate = Some(v),
            Attribute::Encrypt(v) => f.encrypt = Some(v),
            Attribute::Decrypt(v) => f.decrypt = Some(v),
            Attribute::Wrap(v) => f.wrap = Some(v),
            Attribute::Unwrap(v) => f.unwrap = Some(v),
            Attribute::ValueLen(v) => f.bits = usize::try_from(u64::from(v)).unwrap_or(0).saturating_mul(8),
            _ => {}
        }
    }
    if kind == Kind::Rsa {
        f.bits = modulus(s, handle)?.len() * 8;
    }
    Ok(f)
}
