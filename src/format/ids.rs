//! 16-byte random identifiers, each its own type.

use std::fmt;
use std::str::FromStr;

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// A new random one.
            pub fn random() -> Self {
                Self(crate::crypto::random::array())
            }

            /// Its bytes.
            pub fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = NotAnId;

            /// 32 hexadecimal digits.
            fn from_str(s: &str) -> Result<Self, NotAnId> {
                let mut out = [0u8; 16];
                let digits = s.as_bytes();
                if digits.len() != 32 {
                    return Err(NotAnId);
                }
                for (o, d) in out.iter_mut().zip(digits.chunks_exact(2)) {
                    let hex = |c: u8| (c as char).to_digit(16).ok_or(NotAnId);
                    let (hi, lo) = match d {
                        [h, l] => (hex(*h)?, hex(*l)?),
                        _ => return Err(NotAnId),
                    };
                    *o = (hi * 16 + lo) as u8;
                }
                Ok(Self(out))
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let s = <std::borrow::Cow<'_, str>>::deserialize(d)?;
                s.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

/// The text is not 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected 32 hexadecimal digits")]
pub struct NotAnId;

id_type!(
    /// Names a store; in the keyring and in every header.
    StoreId
);
id_type!(
    /// Names a file's content for ever; in its header, and bound into every block.
    FileId
);
id_type!(
    /// Names a KEK; random, never reused.
    KekId
);
id_type!(
    /// A directory's id, the context of its entries' names.
    DirId
);
id_type!(
    /// Names a root key's record in the keyring.
    RootKeyId
);
