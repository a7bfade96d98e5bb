//! The encryption context: what the service authenticates together with a wrapped key, and writes into its log in clear.
//!
//! Only opaque ids go there, never a name: whoever reads the log learns which store and which file a call was for, and
//! can look the file up only in the store. `docs/FORMAT.md`, section 4.3, and `docs/KEYS.md`, whose policies name these.

use crate::kms::WrapContext;
use sha2::{Digest, Sha256};
use std::collections::HashMap;

/// The store's id.
pub const STORE: &str = "envelopefs-store";
/// What the key is for: `kek`, `store-secret` or `dek`.
pub const PURPOSE: &str = "envelopefs-purpose";
/// The id of what is wrapped: a KEK, the store, a file.
pub const OBJECT: &str = "envelopefs-object";
/// SHA-256 of the rest of the context; absent if there is none.
pub const EXTRA: &str = "envelopefs-extra-sha256";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The context as the service takes it.
pub fn map(c: &WrapContext) -> HashMap<String, String> {
    let mut map: HashMap<String, String> = HashMap::new();
    let mut put = |name: &str, value: String| map.insert(name.to_owned(), value);
    put(STORE, hex(&c.store));
    put(PURPOSE, c.purpose.as_str().to_owned());
    put(OBJECT, hex(&c.object));
    if !c.extra.is_empty() {
        put(EXTRA, hex(&Sha256::digest(&c.extra)));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kms::KeyPurpose;

    #[test]
    fn the_context_is_as_documented() {
        let kek = WrapContext { store: [0xab; 16], purpose: KeyPurpose::Kek, object: [1; 16], extra: vec![] };
        let expected: HashMap<String, String> = [
            ("envelopefs-store", "abababababababababababababababab"),
            ("envelopefs-purpose", "kek"),
            ("envelopefs-object", "01010101010101010101010101010101"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .into();
        assert_eq!(map(&kek), expected);
        let dek = map(&WrapContext { purpose: KeyPurpose::Dek, extra: b"abc".to_vec(), ..kek });
        assert_eq!(dek.len(), 4);
        assert_eq!(dek[PURPOSE], "dek");
        // FIPS 180-2, appendix B.1.
        assert_eq!(dek[EXTRA], "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
