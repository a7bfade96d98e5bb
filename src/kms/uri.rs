//! Root key URIs: parsed, checked and brought to one canonical text, which is what the keyring records.
//!
//! The keyring lies where an attacker may write, so nothing in a recorded URI may choose which host gets
//! credentials, which library is loaded, or what is run: endpoints, addresses, module paths and PIN sources are
//! accepted on the command line at most and never part of the canonical text. Characters are limited to what the
//! schemes need, so that a URI can be put into a message or a request path as it is.

use super::KmsError;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use std::fmt;
use std::path::{Path, PathBuf};

/// Longest URI accepted, in bytes.
pub const URI_MAX: usize = 1024;

/// Kind of a root key, by its scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    Passphrase,
    KeyFile,
    AwsKms,
    GcpKms,
    Vault,
    Pkcs11,
    Recovery,
}

impl Scheme {
    /// The scheme as it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Passphrase => "passphrase",
            Self::KeyFile => "keyfile",
            Self::AwsKms => "aws-kms",
            Self::GcpKms => "gcp-kms",
            Self::Vault => "vault",
            Self::Pkcs11 => "pkcs11",
            Self::Recovery => "recovery",
        }
    }

    /// Whether root keys of this kind can get newer versions, so that what an older one wrapped may be due to be
    /// wrapped again.
    pub fn has_versions(self) -> bool {
        !matches!(self, Self::Passphrase | Self::KeyFile | Self::Recovery)
    }

    /// Whether such a key lives in a service or device, so that calls can be slow, throttled or unreachable.
    pub fn is_remote(self) -> bool {
        match self {
            Self::Passphrase | Self::KeyFile | Self::Recovery => false,
            Self::AwsKms | Self::GcpKms | Self::Vault | Self::Pkcs11 => true,
        }
    }
}

/// A parsed root key URI. `Display` is the canonical text; it holds no secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootKeyUri {
    kind: Kind,
    module_path: Option<PathBuf>,
    pin_source: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Passphrase,
    KeyFile {
        path: String,
    },
    AwsKms {
        key: String,
        region: Option<String>,
        profile: Option<String>,
    },
    GcpKms {
        name: String,
    },
    Vault {
        mount: String,
        key: String,
    },
    Pkcs11 {
        attributes: Vec<(String, String)>,
    },
    /// `None`: one that is yet to be made or entered; never recorded.
    Recovery {
        public: Option<[u8; 32]>,
    },
}

/// What an `aws-kms:` URI says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AwsKey<'a> {
    /// The ARN of a key or of an alias, `alias/NAME`, or a key's id.
    pub key: &'a str,
    /// `region=`.
    pub region: Option<&'a str>,
    /// `profile=`.
    pub profile: Option<&'a str>,
}

fn bad(text: &str, why: &str) -> KmsError {
    // What was typed may be long or hold control characters: shown escaped and cut.
    let shown: String = text.chars().take(80).flat_map(char::escape_debug).collect();
    KmsError::Config(format!("root key URI '{shown}': {why}"))
}

impl RootKeyUri {
    /// Parses a URI given by the user.
    ///
    /// # Errors
    /// [`KmsError::Config`] that says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, KmsError> {
        if text.len() > URI_MAX {
            return Err(bad(text, "longer than 1024 bytes"));
        }
        if text.chars().any(char::is_control) {
            return Err(bad(text, "holds a control character"));
        }
        let (scheme, rest) = text.split_once(':').ok_or_else(|| bad(text, NO_SCHEME))?;
        let plain = |kind| Self { kind, module_path: None, pin_source: None };
        let parsed = match scheme {
            "passphrase" if rest.is_empty() => Ok(plain(Kind::Passphrase)),
            "passphrase" => Err("nothing may follow 'passphrase:' (a passphrase never stands in a URI)"),
            "keyfile" => key_file(rest).map(plain),
            "aws-kms" => aws(rest).map(plain),
            "gcp-kms" => gcp(rest).map(plain),
            "vault" => vault(rest).map(plain),
            "pkcs11" => pkcs11(rest),
            "recovery" => recovery(rest).map(plain),
            _ => Err(NO_SCHEME),
        };
        // The canonical text is what the keyring records, and escapes make it longer than what was typed.
        let short = |uri: Self| if uri.to_string().len() <= URI_MAX { Ok(uri) } else { Err("longer than 1024 bytes") };
        parsed.and_then(short).map_err(|why| bad(text, why))
    }

    /// Parses a URI recorded in a keyring: only the canonical text is accepted, so nothing that may only come from
    /// the command line can come from there.
    ///
    /// # Errors
    /// [`KmsError::Config`] if it does not parse or is not canonical.
    pub fn recorded(text: &str) -> Result<Self, KmsError> {
        let uri = Self::parse(text)?;
        let nameless = uri.kind == Kind::Recovery { public: None };
        if uri.to_string() == text && uri.module_path.is_none() && uri.pin_source.is_none() && !nameless {
            Ok(uri)
        } else {
            Err(bad(
                text,
                "recorded in the keyring in a form this program does not write; give the root key with --key",
            ))
        }
    }

    /// Its scheme.
    pub fn scheme(&self) -> Scheme {
        match self.kind {
            Kind::Passphrase => Scheme::Passphrase,
            Kind::KeyFile { .. } => Scheme::KeyFile,
            Kind::AwsKms { .. } => Scheme::AwsKms,
            Kind::GcpKms { .. } => Scheme::GcpKms,
            Kind::Vault { .. } => Scheme::Vault,
            Kind::Pkcs11 { .. } => Scheme::Pkcs11,
            Kind::Recovery { .. } => Scheme::Recovery,
        }
    }

    /// The URI of the recovery key with this public key.
    pub fn of_recovery_key(public: [u8; 32]) -> Self {
        Self { kind: Kind::Recovery { public: Some(public) }, module_path: None, pin_source: None }
    }

    /// The public key of a `recovery:` that names one.
    pub fn recovery_key(&self) -> Option<&[u8; 32]> {
        match &self.kind {
            Kind::Recovery { public } => public.as_ref(),
            _ => None,
        }
    }

    /// The path of a `keyfile:`.
    pub fn key_file(&self) -> Option<&Path> {
        match &self.kind {
            Kind::KeyFile { path } => Some(Path::new(path)),
            _ => None,
        }
    }

    /// The key of an `aws-kms:` URI, and the region and profile that it names.
    pub fn aws_key(&self) -> Option<AwsKey<'_>> {
        match &self.kind {
            Kind::AwsKms { key, region, profile } => {
                Some(AwsKey { key, region: region.as_deref(), profile: profile.as_deref() })
            }
            _ => None,
        }
    }

    /// The resource name of a `gcp-kms:` key, `projects/…/cryptoKeys/K`.
    pub fn gcp_key(&self) -> Option<&str> {
        match &self.kind {
            Kind::GcpKms { name } => Some(name),
            _ => None,
        }
    }

    /// Transit mount and key name of a `vault:`. Both can stand in a request path as they are.
    pub fn vault(&self) -> Option<(&str, &str)> {
        match &self.kind {
            Kind::Vault { mount, key } => Some((mount, key)),
            _ => None,
        }
    }

    /// The path attributes of a `pkcs11:` URI, decoded: name and value, in canonical order. Empty for other schemes.
    pub fn pkcs11_attributes(&self) -> Vec<(&str, Vec<u8>)> {
        match &self.kind {
            // What the parser wrote decodes.
            Kind::Pkcs11 { attributes } => {
                attributes.iter().filter_map(|(n, v)| Some((n.as_str(), percent_decode(v).ok()?))).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The PKCS#11 module's path, if the command line gave one. Never recorded.
    pub fn module_path(&self) -> Option<&Path> {
        self.module_path.as_deref()
    }

    /// The text of this URI with `module` for its PKCS#11 module, unless it has one already; with its PIN source.
    pub fn with_module_path(&self, module: &Path) -> String {
        let encoded = |text: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-._~/:".contains(c);
            let one = |b: u8| if plain(b.into()) { char::from(b).to_string() } else { format!("%{b:02X}") };
            text.bytes().map(one).collect::<String>()
        };
        let module = self.module_path.as_deref().unwrap_or(module);
        let pin = self.pin_source.as_deref().map_or(String::new(), |p| format!("&pin-source={}", encoded(p)));
        format!("{self}?module-path={}{pin}", encoded(&module.to_string_lossy()))
    }

    /// Where the PKCS#11 PIN comes from, if the command line said so. Never recorded.
    pub fn pin_source(&self) -> Option<&str> {
        self.pin_source.as_deref()
    }
}

impl std::str::FromStr for RootKeyUri {
    type Err = KmsError;

    /// As [`RootKeyUri::parse`].
    fn from_str(s: &str) -> Result<Self, KmsError> {
        Self::parse(s)
    }
}

impl fmt::Display for RootKeyUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.scheme().as_str())?;
        match &self.kind {
            Kind::Passphrase => Ok(()),
            Kind::KeyFile { path } => f.write_str(path),
            Kind::AwsKms { key, region, profile } => {
                write!(f, "//{key}")?;
                let mut mark = '?';
                for (name, value) in [("region", region), ("profile", profile)] {
                    if let Some(v) = value {
                        write!(f, "{mark}{name}={v}")?;
                        mark = '&';
                    }
                }
                Ok(())
            }
            Kind::GcpKms { name } => write!(f, "//{name}"),
            Kind::Vault { mount, key } => write!(f, "//{mount}/{key}"),
            Kind::Pkcs11 { attributes } => {
                let all: Vec<String> = attributes.iter().map(|(n, v)| format!("{n}={v}")).collect();
                f.write_str(&all.join(";"))
            }
            Kind::Recovery { public } => public.map_or(Ok(()), |p| f.write_str(&BASE64URL.encode(p))),
        }
    }
}

const NO_SCHEME: &str =
    "unknown kind; use passphrase:, keyfile:/path, aws-kms://…, gcp-kms://…, vault://…, pkcs11:… or recovery:";

type Parsed<T> = Result<T, &'static str>;

fn key_file(rest: &str) -> Parsed<Kind> {
    let path = rest.strip_prefix("//").unwrap_or(rest);
    if !path.starts_with('/') {
        return Err("a key file's path must be absolute: keyfile:/path");
    }
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty() && *p != ".").collect();
    if parts.is_empty() || path.ends_with('/') {
        return Err("no file is named");
    }
    Ok(Kind::KeyFile { path: format!("/{}", parts.join("/")) })
}

fn is_word(s: &str, more: &str) -> bool {
    !s.is_empty() && s.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
}

/// A path of names that can stand in a request as it is: no empty one, no `.` or `..`.
fn is_path(s: &str, more: &str) -> bool {
    s.split('/').all(|p| is_word(p, more) && p != "." && p != "..")
}

fn aws(rest: &str) -> Parsed<Kind> {
    let rest = rest.strip_prefix("//").ok_or("write aws-kms://arn:aws:kms:… or aws-kms://alias/NAME")?;
    let (key, query) = rest.split_once('?').map_or((rest, None), |(k, q)| (k, Some(q)));
    let (mut region, mut profile) = (None, None);
    for pair in query.into_iter().flat_map(|q| q.split('&')) {
        let (name, value) = pair.split_once('=').ok_or("a parameter is name=value")?;
        let slot = match name {
            "region" if is_word(value, "-") => &mut region,
            "profile" if is_word(value, "-_.@+") => &mut profile,
            "region" | "profile" => return Err("characters in a parameter that it cannot have"),
            _ => return Err("only region= and profile= can follow; endpoints come from the configuration"),
        };
        if slot.replace(value.to_owned()).is_some() {
            return Err("a parameter is given twice");
        }
    }
    let named = key.strip_prefix("alias/").is_some_and(|n| is_path(n, "-_"));
    if !(named || is_arn(key) || is_word(key, "-")) {
        return Err("the key is an ARN (arn:aws:kms:REGION:ACCOUNT:key/ID or …:alias/NAME), alias/NAME or a key id");
    }
    Ok(Kind::AwsKms { key: key.to_owned(), region, profile })
}

fn is_arn(key: &str) -> bool {
    let parts: Vec<&str> = key.split(':').collect();
    match parts.as_slice() {
        ["arn", partition, "kms", region, account, resource] => {
            is_word(partition, "-")
                && is_word(region, "-")
                && is_word(account, "")
                && (resource.strip_prefix("key/").is_some_and(|k| is_word(k, "-"))
                    || resource.strip_prefix("alias/").is_some_and(|a| is_path(a, "-_")))
        }
        _ => false,
    }
}

fn gcp(rest: &str) -> Parsed<Kind> {
    const FORM: &str = "write gcp-kms://projects/P/locations/L/keyRings/R/cryptoKeys/K";
    let name = rest.strip_prefix("//").ok_or(FORM)?;
    let parts: Vec<&str> = name.split('/').collect();
    match parts.as_slice() {
        ["projects", p, "locations", l, "keyRings", r, "cryptoKeys", k]
            if is_path(p, "-.:") && [l, r, k].iter().all(|s| is_word(s, "-_")) =>
        {
            Ok(Kind::GcpKms { name: name.to_owned() })
        }
        _ => Err(FORM),
    }
}

fn vault(rest: &str) -> Parsed<Kind> {
    const FORM: &str =
        "write vault://MOUNT/KEYNAME; the address comes from VAULT_ADDR or BAO_ADDR or the configuration";
    let path = rest.strip_prefix("//").ok_or(FORM)?;
    let (mount, key) = path.trim_end_matches('/').rsplit_once('/').ok_or(FORM)?;
    if !is_path(mount, "-_.") || !is_path(key, "-_.") {
        return Err(FORM);
    }
    Ok(Kind::Vault { mount: mount.to_owned(), key: key.to_owned() })
}

fn recovery(rest: &str) -> Parsed<Kind> {
    const FORM: &str = "write recovery: for a new one; what follows is the public key, 43 characters of base64url";
    if rest.is_empty() {
        return Ok(Kind::Recovery { public: None });
    }
    let bytes = BASE64URL.decode(rest).map_err(|_| FORM)?;
    Ok(Kind::Recovery { public: Some(bytes.try_into().map_err(|_| FORM)?) })
}

/// Path attributes of RFC 7512, in the order of the canonical text.
const PKCS11_PATH: [&str; 13] = [
    "token",
    "manufacturer",
    "serial",
    "model",
    "object",
    "type",
    "id",
    "library-manufacturer",
    "library-description",
    "library-version",
    "slot-manufacturer",
    "slot-description",
    "slot-id",
];

fn pkcs11(rest: &str) -> Parsed<RootKeyUri> {
    let (path, query) = rest.split_once('?').map_or((rest, None), |(p, q)| (p, Some(q)));
    let mut attributes: Vec<(String, String)> = Vec::new();
    for pair in path.split(';').filter(|p| !p.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or("an attribute is name=value")?;
        if !PKCS11_PATH.contains(&name) {
            return Err("an attribute that RFC 7512 does not name");
        }
        if attributes.iter().any(|(n, _)| n == name) {
            return Err("an attribute is given twice");
        }
        attributes.push((name.to_owned(), canonical_percent(value)?));
    }
    if !attributes.iter().any(|(n, _)| n == "object" || n == "id") {
        return Err("object= or id= must name the key");
    }
    attributes.sort_by_key(|(n, _)| PKCS11_PATH.iter().position(|p| p == n));
    let mut uri = RootKeyUri { kind: Kind::Pkcs11 { attributes }, module_path: None, pin_source: None };
    for pair in query.into_iter().flat_map(|q| q.split('&')) {
        match pair.split_once('=') {
            Some(("module-path", v)) if uri.module_path.is_none() => {
                let p = PathBuf::from(percent_text(v)?);
                if !p.is_absolute() {
                    return Err("module-path must be absolute");
                }
                uri.module_path = Some(p);
            }
            Some(("pin-source", v)) if uri.pin_source.is_none() => uri.pin_source = Some(percent_text(v)?),
            Some(("pin-value", _)) => {
                return Err("a PIN never stands in a URI, where others can see it; use pin-source=");
            }
            _ => return Err("only one module-path= and one pin-source= can follow '?'"),
        }
    }
    Ok(uri)
}

fn percent_decode(text: &str) -> Parsed<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(c) = rest.next() {
        if c != b'%' {
            out.push(c);
            continue;
        }
        let mut hex = || rest.next().and_then(|d| char::from(d).to_digit(16)).ok_or("a % without two hex digits");
        let (hi, lo) = (hex()?, hex()?);
        out.push((hi << 4 | lo) as u8);
    }
    Ok(out)
}

fn percent_text(text: &str) -> Parsed<String> {
    let s = String::from_utf8(percent_decode(text)?).map_err(|_| "not UTF-8 after decoding %xx")?;
    if s.is_empty() || s.chars().any(char::is_control) { Err("an empty value or a control character") } else { Ok(s) }
}

/// One spelling for each value: unreserved characters as they are, all else as `%XX`.
fn canonical_percent(text: &str) -> Parsed<String> {
    let bytes = percent_decode(text)?;
    if bytes.is_empty() {
        return Err("an attribute is empty");
    }
    let mut s = String::new();
    for b in bytes {
        let c = char::from(b);
        if c.is_ascii_alphanumeric() || "-._~".contains(c) {
            s.push(c);
        } else {
            s.push_str(&format!("%{b:02X}"));
        }
    }
    Ok(s)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_scheme_has_one_canonical_text() {
        for (text, canonical) in [
            ("passphrase:", "passphrase:"),
            ("keyfile:/etc/key", "keyfile:/etc/key"),
            ("keyfile:///etc//./key", "keyfile:/etc/key"),
            ("keyfile:/with space/ü", "keyfile:/with space/ü"),
            ("aws-kms://alias/my/key", "aws-kms://alias/my/key"),
            ("aws-kms://alias/k?profile=p@x&region=eu-west-1", "aws-kms://alias/k?region=eu-west-1&profile=p@x"),
            (
                "aws-kms://arn:aws:kms:eu-west-1:123456789012:key/1234-ab",
                "aws-kms://arn:aws:kms:eu-west-1:123456789012:key/1234-ab",
            ),
            ("aws-kms://arn:aws-cn:kms:cn-north-1:1:alias/a", "aws-kms://arn:aws-cn:kms:cn-north-1:1:alias/a"),
            (
                "gcp-kms://projects/p-1/locations/global/keyRings/r/cryptoKeys/k_1",
                "gcp-kms://projects/p-1/locations/global/keyRings/r/cryptoKeys/k_1",
            ),
            ("vault://transit/key", "vault://transit/key"),
            ("vault://team/transit/key", "vault://team/transit/key"),
            ("pkcs11:object=k;token=My%20Token", "pkcs11:token=My%20Token;object=k"),
            ("pkcs11:id=%01%aF;token=a:b", "pkcs11:token=a%3Ab;id=%01%AF"),
            (
                "recovery:CQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
                "recovery:CQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
            ),
        ] {
            let uri = RootKeyUri::parse(text).unwrap();
            assert_eq!(uri.to_string(), canonical);
            assert_eq!(RootKeyUri::recorded(canonical).unwrap(), uri);
            assert_eq!(RootKeyUri::recorded(text).is_ok(), text == canonical, "{text}");
        }
    }

    #[test]
    fn what_does_not_belong_in_a_uri_is_refused() {
        for text in [
            "",
            "key",
            "/etc/key",
            "http://host/key",
            "Passphrase:",
            "passphrase:secret",
            "keyfile:",
            "keyfile:key",
            "keyfile:/",
            "keyfile:/dir/",
            "keyfile:/a\nb",
            "aws-kms:alias/k",
            "aws-kms://",
            "aws-kms://alias/",
            "aws-kms://alias/../k",
            "aws-kms://alias/k?endpoint=http://evil",
            "aws-kms://alias/k?region=evil.example/",
            "aws-kms://alias/k?region=a&region=b",
            "aws-kms://alias/k?region",
            "aws-kms://arn:aws:s3:r:1:key/x",
            "gcp-kms://projects/p/locations/l/keyRings/r",
            "gcp-kms://projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1",
            "vault://transit",
            "vault://host:8200/transit/key",
            "vault://user@host/transit/key",
            "vault://../sys/key",
            "vault://transit/key?address=http://evil",
            "pkcs11:token=t",
            "pkcs11:object=",
            "pkcs11:object=a;object=b",
            "pkcs11:object=a;x-evil=b",
            "pkcs11:object=%4",
            "pkcs11:object=a?pin-value=1234",
            "pkcs11:object=a?module-path=lib.so",
            "pkcs11:object=a?module-path=/a&module-path=/b",
            "recovery:CQAA",
            "recovery://CQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
            "recovery:CQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
            "recovery:CQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAB",
            "recovery:CQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
            "recovery:CQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA+",
        ] {
            assert!(matches!(RootKeyUri::parse(text), Err(KmsError::Config(_))), "{text:?}");
        }
        assert!(RootKeyUri::parse(&format!("keyfile:/{}", "k".repeat(URI_MAX))).is_err());
    }

    #[test]
    fn a_module_path_is_for_the_command_line_only_and_never_recorded() {
        let text = "pkcs11:object=k?module-path=/usr/lib/p11.so&pin-source=file:/run/pin";
        let uri = RootKeyUri::parse(text).unwrap();
        assert_eq!(uri.module_path(), Some(Path::new("/usr/lib/p11.so")));
        assert_eq!(uri.pin_source(), Some("file:/run/pin"));
        assert_eq!(uri.to_string(), "pkcs11:object=k");
        for (given, whole) in [
            ("pkcs11:object=k", "pkcs11:object=k?module-path=/m%20%26.so"),
            (text, text),
            ("pkcs11:object=k?pin-source=/p%26", "pkcs11:object=k?module-path=/m%20%26.so&pin-source=/p%26"),
        ] {
            assert_eq!(RootKeyUri::parse(given).unwrap().with_module_path(Path::new("/m &.so")), whole);
            assert!(RootKeyUri::parse(whole).is_ok(), "{whole}");
        }
        assert_eq!(
            RootKeyUri::parse("pkcs11:id=%01%fF;token=a%20b").unwrap().pkcs11_attributes(),
            [("token", b"a b".to_vec()), ("id", vec![1, 0xff])]
        );
        assert!(RootKeyUri::recorded(text).is_err());
        assert!(RootKeyUri::recorded("pkcs11:object=k?module-path=/usr/lib/p11.so").is_err());
    }

    #[test]
    fn a_recovery_key_is_recorded_by_its_public_key_only() {
        let uri = RootKeyUri::of_recovery_key([9; 32]);
        assert_eq!(RootKeyUri::recorded(&uri.to_string()).unwrap().recovery_key(), Some(&[9; 32]));
        assert_eq!(RootKeyUri::parse("recovery:").unwrap().recovery_key(), None);
        assert!(RootKeyUri::recorded("recovery:").is_err());
    }

    #[test]
    fn messages_show_no_control_characters() {
        let e = RootKeyUri::parse("\u{1b}[2J:evil\n").unwrap_err().to_string();
        assert!(!e.chars().any(char::is_control), "{e:?}");
    }

    #[test]
    fn a_uri_whose_canonical_text_is_too_long_for_the_keyring_is_refused() {
        // Found by fuzzing: each backslash takes three characters in the canonical text.
        let text = format!("pkcs11:token=t;object={}", "\\".repeat(400));
        assert!(text.len() < URI_MAX);
        assert!(matches!(RootKeyUri::parse(&text), Err(KmsError::Config(_))));
    }

    proptest! {
        #[test]
        fn any_text_is_safe_and_the_canonical_text_is_a_fixed_point(
            scheme in prop_oneof![
                Just("keyfile:/"), Just("aws-kms://alias/"), Just("aws-kms://"), Just("gcp-kms://projects/"),
                Just("vault://"), Just("pkcs11:object="), Just("pkcs11:"), Just("recovery:"), Just("")
            ],
            rest in "[ -~ü]{0,40}",
        ) {
            if let Ok(uri) = RootKeyUri::parse(&format!("{scheme}{rest}")) {
                let canonical = uri.to_string();
                prop_assume!(canonical != "recovery:");
                let again = RootKeyUri::recorded(&canonical).unwrap();
                prop_assert_eq!(again.to_string(), canonical);
            }
        }
    }
}
