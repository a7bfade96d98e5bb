//! Names of AWS KMS keys, and which of them a root key's URI allows.
//!
//! A wrap names the key that made it, and it lies where an attacker may write. So the key that a call names is never
//! taken from there as it stands: [`Allowed::permit`] holds it against what the operator's URI says.

use crate::kms::KmsError;
use std::fmt;

/// Where a key lives: `arn:PARTITION:kms:REGION:ACCOUNT:…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub partition: String,
    pub region: String,
    pub account: String,
}

/// The full name of one key, `arn:PARTITION:kms:REGION:ACCOUNT:key/ID`. Never an alias.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyArn {
    pub place: Place,
    pub id: String,
}

/// Letters, digits and `-`: nothing that has a meaning in a request or on a terminal.
fn is_word(s: &str) -> bool {
    !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// An ARN of AWS KMS as its place and its resource.
fn split(text: &str) -> Option<(Place, &str)> {
    let mut parts = text.splitn(6, ':');
    let mut next = || parts.next();
    let (arn, partition, kms, region, account, resource) = (next()?, next()?, next()?, next()?, next()?, next()?);
    let known = arn == "arn" && kms == "kms" && [partition, region, account].into_iter().all(is_word);
    let place = || Place { partition: partition.into(), region: region.into(), account: account.into() };
    known.then(|| (place(), resource))
}

impl KeyArn {
    /// Reads the ARN of a key. `None` for anything else, the ARN of an alias included.
    pub fn parse(text: &str) -> Option<Self> {
        let (place, resource) = split(text)?;
        let id = resource.strip_prefix("key/").filter(|id| is_word(id))?;
        Some(Self { place, id: id.to_owned() })
    }

    /// Whether it is a multi-Region key: the same key material under the same id in several regions of one account.
    pub fn is_multi_region(&self) -> bool {
        self.id.starts_with("mrk-")
    }

    /// The same key as `region` knows it: for a multi-Region key the one of that region, for any other key itself.
    pub fn in_region(&self, region: &str) -> Self {
        let mut arn = self.clone();
        if self.is_multi_region() {
            arn.place.region = region.to_owned();
        }
        arn
    }
}

impl fmt::Display for KeyArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { partition, region, account } = &self.place;
        write!(f, "arn:{partition}:kms:{region}:{account}:key/{}", self.id)
    }
}

/// The key as the operator's URI names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// By its ARN.
    Key(KeyArn),
    /// By the ARN of an alias.
    AliasArn { arn: String, place: Place },
    /// `alias/NAME`, in the account of whoever asks.
    Alias(String),
    /// By its id alone, in the account of whoever asks.
    Id(String),
}

impl Target {
    /// Reads the key of an `aws-kms://` URI and its `region=`. Returns the region that this names, if it names one.
    /// A multi-Region key can be used in another region than the one in its ARN; for all else both must agree.
    ///
    /// # Errors
    /// [`KmsError::Config`] if they do not.
    pub fn new(key: &str, region: Option<&str>) -> Result<(Self, Option<String>), KmsError> {
        let agree = |own: &str| match region {
            Some(r) if r != own => Err(KmsError::Config(format!(
                "aws-kms://{key}: the key is in region {own} and no multi-Region key; leave ?region={r} out"
            ))),
            _ => Ok(Some(own.to_owned())),
        };
        if let Some(arn) = KeyArn::parse(key) {
            let at = if arn.is_multi_region() { region } else { None }.unwrap_or(&arn.place.region).to_owned();
            if !arn.is_multi_region() {
                agree(&at)?;
            }
            return Ok((Self::Key(arn.in_region(&at)), Some(at)));
        }
        if let Some((place, _)) = split(key) {
            let at = agree(&place.region)?;
            return Ok((Self::AliasArn { arn: key.to_owned(), place }, at));
        }
        let key = key.to_owned();
        let target = if key.starts_with("alias/") { Self::Alias(key) } else { Self::Id(key) };
        Ok((target, region.map(str::to_owned)))
    }

    /// What a request calls it.
    pub fn request_name(&self) -> String {
        match self {
            Self::Key(arn) => arn.to_string(),
            Self::AliasArn { arn: name, .. } | Self::Alias(name) | Self::Id(name) => name.clone(),
        }
    }

    /// The keys that it allows wraps to be by, given what it stands for now; `None` as long as that has to be asked.
    /// An alias may have stood for other keys of its account and region, and their wraps still open; those of another
    /// account or region never do, because an alias cannot leave its own.
    pub fn allows(&self, now: Option<&KeyArn>) -> Option<Allowed> {
        match self {
            Self::Key(arn) => Some(Allowed::Exactly(arn.clone())),
            Self::AliasArn { place, .. } => Some(Allowed::Within(place.clone())),
            Self::Alias(_) => now.map(|k| Allowed::Within(k.place.clone())),
            Self::Id(_) => now.map(|k| Allowed::Exactly(k.clone())),
        }
    }
}

/// Keys that may have made a wrap. Both kinds name the region we talk to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allowed {
    /// This key.
    Exactly(KeyArn),
    /// Any key that lives here.
    Within(Place),
}

impl Allowed {
    /// The key to name in a call about a wrap that says it is by `named`; `None` if no call must be made. A wrap by a
    /// multi-Region key of another region is opened with the same key in ours.
    pub fn permit(&self, named: &KeyArn) -> Option<KeyArn> {
        match self {
            Self::Exactly(key) => Some(named.in_region(&key.place.region)).filter(|n| n == key),
            Self::Within(place) => Some(named.in_region(&place.region)).filter(|n| n.place == *place),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ONE: &str = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab";
    const MULTI: &str = "arn:aws:kms:eu-west-1:111122223333:key/mrk-1234abcd";

    fn arn(text: &str) -> KeyArn {
        KeyArn::parse(text).unwrap()
    }

    #[test]
    fn an_arn_names_a_key_and_nothing_else() {
        for good in [ONE, MULTI, "arn:aws-us-gov:kms:us-gov-west-1:1:key/a", "arn:aws-cn:kms:cn-north-1:1:key/b"] {
            assert_eq!(arn(good).to_string(), good);
        }
        for bad in [
            "",
            "arn",
            "1234abcd",
            "alias/a",
            "arn:aws:kms:eu-west-1:1:alias/a",
            "arn:aws:kms:eu-west-1:1:key/",
            "arn:aws:kms:eu-west-1:1:key/a/b",
            "arn:aws:kms:eu-west-1:1:key/a:b",
            "arn:aws:kms:eu-west-1:1:key/a b",
            "arn:aws:kms:eu-west-1::key/a",
            "arn:aws:kms:eu.west.1:1:key/a",
            "arn:aws:s3:eu-west-1:1:key/a",
            "ARN:aws:kms:eu-west-1:1:key/a",
            "arn:aws:kms:eu-west-1:1",
        ] {
            assert_eq!(KeyArn::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_region_comes_from_the_arn_and_only_a_multi_region_key_can_be_used_elsewhere() {
        let region = |key: &str, r: Option<&str>| Target::new(key, r).map(|(t, r)| (t.request_name(), r));
        let said = |key: &str, r: &str| Ok((key.to_owned(), Some(r.to_owned())));
        assert_eq!(region(ONE, None), said(ONE, "eu-west-1"));
        assert_eq!(region(ONE, Some("eu-west-1")), said(ONE, "eu-west-1"));
        assert!(matches!(region(ONE, Some("us-east-1")), Err(KmsError::Config(m)) if m.contains("eu-west-1")));
        assert_eq!(region(MULTI, None), said(MULTI, "eu-west-1"));
        assert_eq!(region(MULTI, Some("us-east-1")), said(&MULTI.replace("eu-west-1", "us-east-1"), "us-east-1"));
        let alias = "arn:aws:kms:eu-west-1:1:alias/a";
        assert_eq!(region(alias, None), said(alias, "eu-west-1"));
        assert!(region(alias, Some("us-east-1")).is_err());
        assert_eq!(region("alias/a", Some("us-east-1")), said("alias/a", "us-east-1"));
        assert_eq!(region("alias/a", None), Ok(("alias/a".into(), None)));
        assert_eq!(region("1234abcd-12ab", None), Ok(("1234abcd-12ab".into(), None)));
    }

    /// What a URI allows: (URI's key, its region=, what it stands for now, the wrap's key, the key that is named).
    #[test]
    fn a_wrap_is_opened_only_by_a_key_that_the_uri_allows() {
        let us = |s: &str| s.replace("eu-west-1", "us-east-1");
        let other_account = |s: &str| s.replace("111122223333", "444455556666");
        let other_partition = |s: &str| s.replace("arn:aws:", "arn:aws-cn:");
        let other_key = |s: &str| format!("{s}9");
        let alias_arn = "arn:aws:kms:eu-west-1:111122223333:alias/a";
        let (one, multi) = (ONE.to_owned(), MULTI.to_owned());
        let yes = |s: &String| Some(s.clone());
        let rows = [
            // By ARN: that key and no other.
            (ONE, None, None, one.clone(), yes(&one)),
            (ONE, None, None, other_key(ONE), None),
            (ONE, None, None, other_account(ONE), None),
            (ONE, None, None, other_partition(ONE), None),
            (ONE, None, None, us(ONE), None),
            (ONE, None, None, multi.clone(), None),
            // A multi-Region key: the same id in the region we talk to, wherever the wrap was made.
            (MULTI, None, None, multi.clone(), yes(&multi)),
            (MULTI, None, None, us(MULTI), yes(&multi)),
            (MULTI, Some("us-east-1"), None, multi.clone(), Some(us(MULTI))),
            (MULTI, Some("us-east-1"), None, us(MULTI), Some(us(MULTI))),
            (MULTI, None, None, other_key(MULTI), None),
            (MULTI, None, None, other_account(MULTI), None),
            (MULTI, None, None, other_partition(MULTI), None),
            // By alias: keys of the account and region that the alias is in.
            ("alias/a", None, Some(ONE), one.clone(), yes(&one)),
            ("alias/a", None, Some(ONE), other_key(ONE), Some(other_key(ONE))),
            ("alias/a", None, Some(ONE), us(ONE), None),
            ("alias/a", None, Some(ONE), other_account(ONE), None),
            ("alias/a", None, Some(ONE), other_partition(ONE), None),
            ("alias/a", None, Some(ONE), us(MULTI), yes(&multi)),
            ("alias/a", None, Some(ONE), other_account(MULTI), None),
            (alias_arn, None, None, other_key(ONE), Some(other_key(ONE))),
            (alias_arn, None, None, us(ONE), None),
            (alias_arn, None, None, other_account(ONE), None),
            // By id: that key, once it is known which account and region it is in.
            ("1234abcd-12ab", None, Some(ONE), one.clone(), yes(&one)),
            ("1234abcd-12ab", None, Some(ONE), other_key(ONE), None),
            ("1234abcd-12ab", None, Some(ONE), other_account(ONE), None),
            ("mrk-1234abcd", None, Some(MULTI), us(MULTI), yes(&multi)),
        ];
        for (key, region, now, wrap, expected) in rows {
            let (target, _) = Target::new(key, region).unwrap();
            let allowed = target.allows(now.map(arn).as_ref()).unwrap();
            let named = allowed.permit(&arn(&wrap)).map(|k| k.to_string());
            assert_eq!(named, expected, "{key} {region:?}: a wrap by {wrap}");
        }
        for key in ["alias/a", "1234abcd-12ab"] {
            assert_eq!(Target::new(key, None).unwrap().0.allows(None), None, "{key} has to be asked for");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_an_arn_that_it_is_not(text in "(arn:)?[a-z:/-]{0,60}|\\PC{0,40}") {
            if let Some(a) = KeyArn::parse(&text) {
                prop_assert_eq!(a.to_string(), text);
            }
        }
    }
}
