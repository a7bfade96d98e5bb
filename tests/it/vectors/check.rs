//! Runs one vector through this program's code: what it gives, or the damage code.

use super::{array, hex, unhex};
use envelopefs::crypto::aead::{BlockCipher, GcmSiv};
use envelopefs::crypto::kdf::{self, label};
use envelopefs::crypto::secret::{Dek, Secret32, StoreSecret};
use envelopefs::format::damage::Damage;
use envelopefs::format::geometry;
use envelopefs::format::header::SlotPair;
use envelopefs::format::ids::{DirId, FileId, KekId};
use envelopefs::format::keyring::{KekState, Keyring, Wrap};
use envelopefs::format::links::{LinkKey, Reference};
use envelopefs::format::names::NameKeys;
use envelopefs::format::state;
use envelopefs::format::xattrs::{FoundXattr, XattrKeys};
use envelopefs::kms::passphrase::PassphraseKey;
use envelopefs::kms::recovery::{RecoveryKey, printed};
use envelopefs::kms::{Argon2Cost, KeyProvider, KeyPurpose, PassphraseSource, WrapContext};
use serde_json::{Value, json};

type Outcome = Result<Value, String>;

pub fn run(kind: &str, v: &Value) -> Outcome {
    let damage = |d: Damage| d.code().to_owned();
    match kind {
        "kdf" => kdf_vector(v),
        "geometry" => geometry_vector(v),
        "header" => header_vector(v).map_err(damage),
        "state" => state_vector(v).map_err(damage),
        "block" => block_vector(v).map_err(damage),
        "name" => name_vector(v).map_err(damage),
        "directory-id" => directory_id_vector(v).map_err(damage),
        "symlink" => symlink_vector(v).map_err(damage),
        "xattr" => xattr_vector(v).map_err(damage),
        "keyring" => keyring_vector(v).map_err(damage),
        "passphrase" => passphrase_vector(v),
        "recovery" => recovery_vector(v),
        _ => panic!("unknown kind {kind}"),
    }
}

pub fn secret(v: &Value) -> Secret32 {
    Secret32::take_from(&mut array(v))
}

fn kdf_vector(v: &Value) -> Outcome {
    let key = secret(&v["key"]);
    let out = kdf::derive_public(&key, v["label"].as_str().unwrap(), &unhex(&v["context"]));
    Ok(json!({ "derived": hex(&out) }))
}

fn geometry_vector(v: &Value) -> Outcome {
    let backing = v["backing"].as_u64().unwrap();
    let plain = geometry::plain_size(backing);
    Ok(json!({ "plain": plain, "exact": geometry::backing_size(plain) == backing }))
}

/// The checks of FORMAT.md section 5.2 in their order.
fn header_vector(v: &Value) -> Result<Value, Damage> {
    let pair = SlotPair::decode(&unhex(&v["header"]))?;
    let (_, slot) = pair.authoritative()?;
    if slot.store.0 != array::<16>(&v["store"]) {
        return Err(Damage::ForeignStore(slot.store));
    }
    let keks = v["keks"].as_array().unwrap();
    let kek = keks.iter().find(|k| array::<16>(&k["id"]) == slot.kek.0).ok_or(Damage::KekUnknown(slot.kek))?;
    if kek["state"] == "destroyed" {
        return Err(Damage::KekDestroyed(slot.kek, 0));
    }
    let key = kdf::derive(&secret(&kek["key"]), label::KEK_WRAP, slot.kek.as_bytes());
    let dek = GcmSiv::unwrap(&key, &slot.wrap_aad(), &slot.wrapped).map_err(|_| Damage::WrapAuth(slot.kek))?;
    let dek = Dek::from_secret(dek);
    slot.verify(&dek)?;
    Ok(json!({ "file": slot.file.to_string(), "sequence": slot.sequence, "dek": hex(dek.secret().expose()) }))
}

fn derived(v: &Value, label: &str) -> BlockCipher {
    BlockCipher::new(&kdf::derive(&secret(&v["dek"]), label, &unhex(&v["file"])))
}

fn state_vector(v: &Value) -> Result<Value, Damage> {
    let segment = v["segment"].as_u64().unwrap();
    let file = FileId(array(&v["file"]));
    let mut copy = unhex(&v["copy"]);
    let s = state::open(&derived(v, label::STATE), file, segment, &mut copy)?;
    let entries: Vec<Value> = (0..geometry::segment_capacity(segment))
        .map(|i| s.entry(i))
        .enumerate()
        .filter(|(_, e)| !e.is_hole())
        .map(|(i, e)| json!({ "index": i, "nonce": hex(&e.nonce), "tag": hex(&e.tag) }))
        .collect();
    Ok(json!({ "sequence": s.sequence, "entries": entries, "length": s.file.length, "flags": s.file.flags }))
}

fn block_vector(v: &Value) -> Result<Value, Damage> {
    let block = v["block"].as_u64().unwrap();
    let mut data = unhex(&v["ciphertext"]);
    let aad = state::block_aad(FileId(array(&v["file"])), block);
    derived(v, label::CONTENT)
        .open(&array(&v["nonce"]), &aad, &array(&v["tag"]), &mut data)
        .map_err(|_| Damage::BlockAuth { block })?;
    Ok(json!({ "plaintext": hex(&data) }))
}

fn store_secret(v: &Value) -> StoreSecret {
    StoreSecret::from_secret(secret(&v["secret"]))
}

fn name_vector(v: &Value) -> Result<Value, Damage> {
    let keys = NameKeys::new(&store_secret(v));
    let dir = DirId(array(&v["directory"]));
    let entry = v["entry"].as_str().unwrap().as_bytes();
    let name = match v["sidecar"].as_str() {
        Some(text) => keys.decode_long(&dir, entry, text.as_bytes())?,
        None => keys.decode(&dir, entry)?,
    };
    // What decodes must be what this program would have written.
    assert_eq!(keys.encode(&dir, &name).content(), entry);
    Ok(json!({ "name": hex(&name) }))
}

fn directory_id_vector(v: &Value) -> Result<Value, Damage> {
    let id = NameKeys::new(&store_secret(v)).open_dir_id(&unhex(&v["sealed"]))?;
    Ok(json!({ "directory": id.to_string() }))
}

fn symlink_vector(v: &Value) -> Result<Value, Damage> {
    let key = LinkKey::new(&store_secret(v));
    let text = v["text"].as_str().unwrap().as_bytes();
    let target = match v.get("apart") {
        Some(apart) => {
            Reference::parse(text)?;
            key.open_sealed(&unhex(apart))?
        }
        None => key.open_text(text)?,
    };
    Ok(json!({ "target": hex(&target) }))
}

fn xattr_vector(v: &Value) -> Result<Value, Damage> {
    let keys = XattrKeys::new(&store_secret(v));
    let backing = v["backing_name"].as_str().unwrap().as_bytes();
    let sealed = unhex(&v["backing_value"]);
    let (name, value) = match keys.decode_name(backing) {
        FoundXattr::Plain(name) => (name, keys.open_value(backing, false, &sealed)?.1),
        FoundXattr::InValue => {
            let (name, value) = keys.open_value(backing, true, &sealed)?;
            (name.expect("the name stands in the value"), value)
        }
        FoundXattr::Foreign => return Ok(json!({ "foreign": true })),
    };
    Ok(json!({ "name": String::from_utf8(name).unwrap(), "value": hex(&value) }))
}

fn unwrap_by_key_file(root: &Secret32, wraps: &[Wrap], context: &WrapContext) -> Secret32 {
    let key = kdf::derive(root, label::ROOT_WRAP, b"");
    wraps.iter().find_map(|w| GcmSiv::unwrap(&key, &context.to_aad(), &w.bytes).ok()).expect("wrapped by this root key")
}

fn keyring_vector(v: &Value) -> Result<Value, Damage> {
    let decoded = Keyring::decode(&unhex(&v["keyring"]))?;
    let k = &decoded.keyring;
    let root = secret(&v["root_key"]);
    let context = |purpose, object| WrapContext { store: k.store.0, purpose, object, extra: Vec::new() };
    let secret = unwrap_by_key_file(&root, &k.secret, &context(KeyPurpose::StoreSecret, k.store.0));
    let mac_key = kdf::derive(&secret, label::KEYRING_MAC, b"");
    if kdf::mac(&mac_key, &[&decoded.signed]) != decoded.mac {
        return Err(Damage::KeyringMac);
    }
    let kek = |k: &envelopefs::format::keyring::KekRecord| {
        let key = (k.state != KekState::Destroyed)
            .then(|| hex(unwrap_by_key_file(&root, &k.wraps, &context(KeyPurpose::Kek, k.id.0)).expose()));
        let state = serde_json::to_value(k.state).unwrap();
        json!({ "id": KekId::to_string(&k.id), "state": state, "key": key })
    };
    let mut found = json!({
        "store": k.store.to_string(),
        "generation": k.generation,
        "plaintext_names": k.plaintext_names(),
        "roots": k.roots.iter().map(|r| r.uri.as_str()).collect::<Vec<_>>(),
        "secret": hex(secret.expose()),
        "keks": k.keks.iter().map(kek).collect::<Vec<_>>(),
    });
    if !k.life.is_empty() {
        let below: Vec<String> = k.keks.iter().filter(|r| k.is_below_floor(r.id)).map(|r| r.id.to_string()).collect();
        let schedules: serde_json::Map<String, Value> =
            k.life.schedules.iter().map(|s| (s.kek.to_string(), serde_json::to_value(s).unwrap())).collect();
        found["life"] = json!({ "quorum": k.life.quorum, "below_floor": below, "schedules": schedules });
    }
    Ok(found)
}

fn passphrase_vector(v: &Value) -> Outcome {
    let source = PassphraseSource::Fixed(v["passphrase"].as_str().unwrap().as_bytes().to_vec().into());
    let key = PassphraseKey::open(&source, Argon2Cost::LEAST, false).unwrap();
    let context = WrapContext {
        store: array(&v["store"]),
        purpose: KeyPurpose::StoreSecret,
        object: array(&v["store"]),
        extra: Vec::new(),
    };
    match key.unwrap(&unhex(&v["wrapped"]), &context) {
        Ok(k) => Ok(json!({ "key": hex(k.expose()) })),
        Err(e) => match e {
            envelopefs::kms::KmsError::BadCiphertext(_) => Err("bad-ciphertext".to_owned()),
            e => panic!("{e}"),
        },
    }
}

fn recovery_vector(v: &Value) -> Outcome {
    let secret = printed::read(v["recovery_key"].as_str().unwrap().as_bytes()).map_err(|_| "mistyped".to_owned())?;
    let key = RecoveryKey::from_secret(secret).unwrap();
    let context = WrapContext {
        store: array(&v["store"]),
        purpose: KeyPurpose::StoreSecret,
        object: array(&v["store"]),
        extra: Vec::new(),
    };
    match key.unwrap(&unhex(&v["wrapped"]), &context) {
        Ok(k) => Ok(json!({ "uri": key.uri().to_string(), "key": hex(k.expose()) })),
        Err(envelopefs::kms::KmsError::BadCiphertext(_)) => Err("bad-ciphertext".to_owned()),
        Err(e) => panic!("{e}"),
    }
}
