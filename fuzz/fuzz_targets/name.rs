//! Names, directory ids, link targets and attributes: any text is refused, and any name comes back from its own.
#![no_main]

use envelopefs::crypto::secret::{Secret32, StoreSecret};
use envelopefs::format::ids::DirId;
use envelopefs::format::links::{self, LinkKey, Reference};
use envelopefs::format::names::{self, Encoded, NameKeys};
use envelopefs::format::xattrs::{FoundXattr, XattrKeys, XattrName};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

struct Keys {
    names: NameKeys,
    links: LinkKey,
    xattrs: XattrKeys,
}

static KEYS: LazyLock<Keys> = LazyLock::new(|| {
    let secret = StoreSecret::from_secret(Secret32::build(|k| k.fill(7)));
    Keys { names: NameKeys::new(&secret), links: LinkKey::new(&secret), xattrs: XattrKeys::new(&secret) }
});
const DIR: DirId = DirId([3; 16]);

fuzz_target!(|data: &[u8]| {
    let k = &*KEYS;
    let _ = names::classify(data);
    assert!(k.names.decode(&DIR, data).is_err());
    assert!(k.names.decode_long(&DIR, data, data).is_err());
    assert!(k.names.open_dir_id(data).is_err());
    if names::check(data).is_ok() {
        let decoded = match k.names.encode(&DIR, data) {
            Encoded::Short(text) => k.names.decode(&DIR, &text),
            Encoded::Long { content, text, .. } => k.names.decode_long(&DIR, &content, &text),
        };
        assert_eq!(decoded.as_deref(), Ok(data));
    }
    let _ = links::plain_len(data.len() as u64);
    assert!(k.links.open_text(data).is_err() && k.links.open_sealed(data).is_err());
    if let Ok(r) = Reference::parse(data) {
        assert_eq!(r.to_text(), data);
    }
    assert!(k.xattrs.open_value(b"user.envelopefs.x", true, data).is_err());
    let _ = k.xattrs.decode_name(data);
    if data.len() <= 255
        && let XattrName::Sealed { backing, long } = k.xattrs.encode_name(data)
    {
        let found = if long { FoundXattr::InValue } else { FoundXattr::Plain(data.to_vec()) };
        assert_eq!(k.xattrs.decode_name(&backing), found);
    }
});
