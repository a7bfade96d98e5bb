//! Which token and which key a `pkcs11:` URI (RFC 7512) names. Decides only; what is there has been read before.
//!
//! Every attribute that the URI gives must match. A slot's number changes when tokens come and go, so it is one
//! attribute among others and never what a token is remembered by.

use crate::kms::{KmsError, RootKeyUri};

/// What a module says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LibraryFacts {
    pub manufacturer: String,
    pub description: String,
    pub version: (u8, u8),
}

/// What a token is known by, wherever it is plugged in.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Identity {
    pub manufacturer: String,
    pub model: String,
    pub serial: String,
    pub label: String,
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "token={};serial={}", escaped(self.label.as_bytes()), escaped(self.serial.as_bytes()))
    }
}

/// A token and the slot it is in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenFacts {
    pub identity: Identity,
    pub slot: u64,
    pub slot_description: String,
    pub slot_manufacturer: String,
}

/// Kind of a key that can wrap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A secret AES key.
    Aes,
    /// A private RSA key, whose public half is on the token too.
    Rsa,
}

impl Kind {
    /// The value of RFC 7512's `type`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Aes => "secret-key",
            Self::Rsa => "private",
        }
    }
}

/// A key that matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub kind: Kind,
    pub id: Vec<u8>,
    /// CKA_START_DATE as `YYYYMMDD`, if it has one.
    pub start: Option<[u8; 8]>,
}

/// What a URI asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    uri: String,
    attributes: Vec<(String, Vec<u8>)>,
    kind: Option<Kind>,
}

impl Wanted {
    /// What `uri` asks for.
    ///
    /// # Errors
    /// [`KmsError::Config`] if it asks for a kind of object that cannot be a root key.
    pub fn of(uri: &RootKeyUri) -> Result<Self, KmsError> {
        let attributes: Vec<(String, Vec<u8>)> =
            uri.pkcs11_attributes().into_iter().map(|(n, v)| (n.to_owned(), v)).collect();
        let kind = match attributes.iter().find(|(n, _)| n == "type").map(|(_, v)| v.as_slice()) {
            None => None,
            Some(b"secret-key") => Some(Kind::Aes),
            Some(b"private") => Some(Kind::Rsa),
            Some(_) => {
                let why = "a root key is type=secret-key (AES) or type=private (RSA)";
                return Err(KmsError::Config(format!("{uri}: {why}")));
            }
        };
        Ok(Self { uri: uri.to_string(), attributes, kind })
    }

    /// The canonical URI.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The key's label.
    pub fn label(&self) -> Option<&[u8]> {
        self.get("object")
    }

    /// The key's CKA_ID.
    pub fn id(&self) -> Option<&[u8]> {
        self.get("id")
    }

    /// Kinds of keys to look for.
    pub fn kinds(&self) -> &[Kind] {
        match self.kind {
            Some(Kind::Aes) => &[Kind::Aes],
            Some(Kind::Rsa) => &[Kind::Rsa],
            None => &[Kind::Aes, Kind::Rsa],
        }
    }

    fn get(&self, name: &str) -> Option<&[u8]> {
        self.attributes.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_slice())
    }

    /// Whether this is the module the URI means, if it says so at all.
    pub fn is_library(&self, l: &LibraryFacts) -> bool {
        let (major, minor) = l.version;
        let versions = [format!("{major}.{minor}"), format!("{major}.{minor:02}")];
        self.all(|name, value| match name {
            "library-manufacturer" => value == l.manufacturer.as_bytes(),
            "library-description" => value == l.description.as_bytes(),
            "library-version" => versions.iter().any(|v| value == v.as_bytes()),
            _ => true,
        })
    }

    fn is_token(&self, t: &TokenFacts) -> bool {
        let id = &t.identity;
        self.all(|name, value| match name {
            "token" => value == id.label.as_bytes(),
            "manufacturer" => value == id.manufacturer.as_bytes(),
            "serial" => value == id.serial.as_bytes(),
            "model" => value == id.model.as_bytes(),
            "slot-id" => value == t.slot.to_string().as_bytes(),
            "slot-description" => value == t.slot_description.as_bytes(),
            "slot-manufacturer" => value == t.slot_manufacturer.as_bytes(),
            _ => true,
        })
    }

    fn all(&self, fits: impl Fn(&str, &[u8]) -> bool) -> bool {
        self.attributes.iter().all(|(n, v)| fits(n, v))
    }

    /// The one token that is meant; `only` is the label of the only one that may be.
    ///
    /// # Errors
    /// [`KmsError::Unreachable`] if it is not there now, [`KmsError::Config`] if several are meant or it may not be used.
    pub fn token<'a>(&self, there: &'a [TokenFacts], only: Option<&str>) -> Result<&'a TokenFacts, KmsError> {
        let fit: Vec<&TokenFacts> = there.iter().filter(|t| self.is_token(t)).collect();
        let allowed: Vec<&TokenFacts> =
            fit.iter().copied().filter(|t| only.is_none_or(|o| o == t.identity.label)).collect();
        match (allowed.as_slice(), fit.as_slice()) {
            ([one], _) => Ok(one),
            ([], []) => {
                let uri = &self.uri;
                let why = "is the device attached, is the name right?";
                Err(KmsError::Unreachable(format!("no token matches {uri}: {why} there is {}", listed(there.iter()))))
            }
            ([], _) => Err(KmsError::Config(format!(
                "{}: the configuration (services.pkcs11.token) allows only token '{}'",
                self.uri,
                only.unwrap_or_default()
            ))),
            (several, _) => Err(KmsError::Config(format!(
                "{}: {} tokens match; add serial= of the one that is meant: {}",
                self.uri,
                several.len(),
                listed(several.iter().copied())
            ))),
        }
    }

    /// Which of the keys that match is meant: the only one, or, of several of one kind that all say since when they
    /// count (CKA_START_DATE), the newest. The others are its predecessors.
    ///
    /// # Errors
    /// [`KmsError::NotFound`], or [`KmsError::Config`] if it could be either of several.
    pub fn newest_key(&self, found: &[Candidate], token: &Identity) -> Result<usize, KmsError> {
        if found.is_empty() {
            return Err(KmsError::NotFound(format!("{}: the user of {token} sees no such AES or RSA key", self.uri)));
        }
        let dated = found.len() == 1
            || found.iter().all(|c| c.start.is_some()) && found.windows(2).all(|w| w[0].kind == w[1].kind);
        let newest = found.iter().map(|c| c.start).max();
        let mut newest = found.iter().enumerate().filter(|(_, c)| Some(c.start) == newest);
        match (dated, newest.next(), newest.next()) {
            (true, Some((at, _)), None) => Ok(at),
            _ => {
                let all: Vec<String> =
                    found.iter().map(|c| format!("id={};type={}", escaped(&c.id), c.kind.as_str())).collect();
                let why =
                    "make the URI exact with one of these, or give the keys different start dates (CKA_START_DATE)";
                Err(KmsError::Config(format!("{}: {} keys match; {why}: {}", self.uri, found.len(), all.join(", "))))
            }
        }
    }
}

fn listed<'a>(tokens: impl Iterator<Item = &'a TokenFacts>) -> String {
    let all: Vec<String> = tokens.map(|t| t.identity.to_string()).collect();
    if all.is_empty() { "none".into() } else { all.join(", ") }
}

/// As RFC 7512 writes a value: all but unreserved characters as `%XX`.
pub fn escaped(value: &[u8]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._~".contains(c);
    value.iter().map(|b| if plain(char::from(*b)) { char::from(*b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(text: &str) -> Wanted {
        Wanted::of(&RootKeyUri::parse(text).unwrap()).unwrap()
    }

    fn token(label: &str, serial: &str, slot: u64) -> TokenFacts {
        TokenFacts {
            identity: Identity {
                manufacturer: "Maker".into(),
                model: "M 1".into(),
                serial: serial.into(),
                label: label.into(),
            },
            slot,
            slot_description: "Slot one".into(),
            slot_manufacturer: "Reader".into(),
        }
    }

    #[test]
    fn every_attribute_given_must_match() {
        let t = [token("a b", "01", 7)];
        for (text, fits) in [
            ("pkcs11:object=k", true),
            ("pkcs11:token=a%20b;object=k", true),
            ("pkcs11:token=a;object=k", false),
            ("pkcs11:token=a%20b%20;object=k", false),
            ("pkcs11:serial=01;object=k", true),
            ("pkcs11:serial=1;object=k", false),
            ("pkcs11:model=M%201;manufacturer=Maker;object=k", true),
            ("pkcs11:model=M%201;manufacturer=maker;object=k", false),
            ("pkcs11:slot-id=7;object=k", true),
            ("pkcs11:slot-id=07;object=k", false),
            ("pkcs11:slot-id=8;token=a%20b;object=k", false),
            ("pkcs11:slot-description=Slot%20one;slot-manufacturer=Reader;object=k", true),
            ("pkcs11:slot-description=Slot;object=k", false),
        ] {
            let w = wanted(text);
            assert_eq!(w.is_token(&t[0]), fits, "{text}");
            assert_eq!(matches!(w.token(&t, None), Err(KmsError::Unreachable(_))), !fits, "{text}");
        }
        let l = LibraryFacts { manufacturer: "S p".into(), description: "Impl".into(), version: (2, 6) };
        for (text, fits) in [
            ("pkcs11:object=k", true),
            ("pkcs11:object=k;library-manufacturer=S%20p;library-description=Impl;library-version=2.6", true),
            ("pkcs11:object=k;library-version=2.06", true),
            ("pkcs11:object=k;library-version=2.60", false),
            ("pkcs11:object=k;library-description=Imp", false),
        ] {
            assert_eq!(wanted(text).is_library(&l), fits, "{text}");
        }
    }

    #[test]
    fn what_could_mean_two_tokens_is_refused_with_what_tells_them_apart() {
        let two = [token("t", "01", 1), token("t", "02", 2), token("u", "03", 3)];
        let w = wanted("pkcs11:token=t;object=k");
        let e = w.token(&two, None).unwrap_err();
        let text = "pkcs11:token=t;object=k: 2 tokens match; add serial= of the one that is meant: \
                    token=t;serial=01, token=t;serial=02";
        assert_eq!(e, KmsError::Config(text.into()));
        assert_eq!(wanted("pkcs11:token=t;serial=02;object=k").token(&two, None).unwrap().slot, 2);
        let none = wanted("pkcs11:token=x;object=k").token(&two[2..], None).unwrap_err().to_string();
        assert!(none.ends_with("there is token=u;serial=03"), "{none}");
    }

    #[test]
    fn the_configuration_can_limit_which_token_is_used() {
        let two = [token("t", "01", 1), token("u", "02", 2)];
        let any = wanted("pkcs11:object=k");
        assert!(matches!(any.token(&two, None), Err(KmsError::Config(_))));
        assert_eq!(any.token(&two, Some("u")).unwrap().slot, 2);
        let e = wanted("pkcs11:token=t;object=k").token(&two, Some("u")).unwrap_err();
        assert!(matches!(&e, KmsError::Config(m) if m.contains("allows only token 'u'")), "{e}");
    }

    #[test]
    fn one_key_is_taken_or_the_newest_and_else_none() {
        let w = wanted("pkcs11:object=k");
        let token = Identity::default();
        let key = |kind, id: u8, start: Option<&[u8; 8]>| Candidate { kind, id: vec![id], start: start.copied() };
        use Kind::{Aes, Rsa};
        let (a, b) = (b"20250101", b"20260101");
        for (found, which) in [
            (vec![key(Aes, 1, None)], Some(0)),
            (vec![key(Aes, 1, Some(a)), key(Aes, 2, Some(b))], Some(1)),
            (vec![key(Aes, 2, Some(b)), key(Aes, 3, Some(a)), key(Aes, 1, Some(a))], Some(0)),
            (vec![key(Aes, 1, None), key(Aes, 2, None)], None),
            (vec![key(Aes, 1, None), key(Aes, 2, Some(b))], None),
            (vec![key(Aes, 1, Some(b)), key(Aes, 2, Some(b))], None),
            (vec![key(Aes, 1, Some(a)), key(Rsa, 2, Some(b))], None),
        ] {
            let r = w.newest_key(&found, &token);
            assert_eq!(r.as_ref().ok().copied(), which, "{found:?}");
            assert!(which.is_some() || matches!(r, Err(KmsError::Config(_))));
        }
        assert!(matches!(w.newest_key(&[], &token), Err(KmsError::NotFound(_))));
        let e = w.newest_key(&[key(Aes, 1, None), key(Rsa, b'a', None)], &token).unwrap_err();
        assert!(matches!(&e, KmsError::Config(m) if m.ends_with("id=%01;type=secret-key, id=a;type=private")), "{e}");
    }

    #[test]
    fn only_what_can_be_a_root_key_is_looked_for() {
        assert_eq!(wanted("pkcs11:object=k").kinds(), [Kind::Aes, Kind::Rsa]);
        assert_eq!(wanted("pkcs11:object=k;type=secret-key").kinds(), [Kind::Aes]);
        assert_eq!(wanted("pkcs11:object=k;type=private").kinds(), [Kind::Rsa]);
        for t in ["public", "cert", "data", "x"] {
            let uri = RootKeyUri::parse(&format!("pkcs11:object=k;type={t}")).unwrap();
            assert!(matches!(Wanted::of(&uri), Err(KmsError::Config(_))), "{t}");
        }
    }
}
