//! Makes the test vectors from fixed inputs. Each defect vector breaks one thing in a good one.

use super::hex;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use envelopefs::crypto::aead::{BlockCipher, GcmSiv, Nonce};
use envelopefs::crypto::kdf::{self, label};
use envelopefs::crypto::secret::{Dek, Secret32, StoreSecret};
use envelopefs::format::geometry::{self, STATE};
use envelopefs::format::header::Slot;
use envelopefs::format::ids::{DirId, FileId, KekId, RootKeyId, StoreId};
use envelopefs::format::keyring::{KekKind, KekRecord, KekState, Keyring, RootKeyRecord, Wrap};
use envelopefs::format::lifecycle::{LifeCycle, Schedule};
use envelopefs::format::links::Reference;
use envelopefs::format::names::{Encoded, NameKeys};
use envelopefs::format::state::{self, CLEAN, Entry, FileState, SPARSE, SegmentState, TRUNCATING};
use envelopefs::format::xattrs::{XattrKeys, XattrName};
use envelopefs::kms::recovery::{INFO, RecoveryKey};
use envelopefs::kms::{KeyPurpose, WrapContext};
use hpke::{Deserializable, Kem, OpModeS, Serializable};
use serde_json::{Value, json};

const STORE: StoreId = StoreId([0x51; 16]);
const FILE: FileId = FileId([0xf1; 16]);
const DEK: [u8; 32] = [0xde; 32];
const KEK1: (KekId, [u8; 32]) = (KekId([0xa1; 16]), [0xe1; 32]);
const KEK2: (KekId, [u8; 32]) = (KekId([0xa2; 16]), [0xe2; 32]);
const SECRET: [u8; 32] = [0x5e; 32];
const ROOT: [u8; 32] = [0x77; 32];
const NONCE: Nonce = [0x4e; 12];
const DIR: DirId = DirId([0xd1; 16]);

/// (kind, what the file is about, vectors)
pub fn all() -> Vec<(&'static str, &'static str, Vec<Value>)> {
    vec![
        ("kdf", "derive(key, label, context), section 1", kdf_vectors()),
        (
            "geometry",
            "plaintext size of a backing size, section 5.1; exact: it is the backing size of that plaintext size",
            geometry_vectors(),
        ),
        ("header", "the first 2048 bytes of a backing file, section 5.2", header_vectors()),
        ("state", "one copy of a segment's state, section 5.3", state_vectors()),
        ("block", "one block, section 5.4", block_vectors()),
        ("directory-id", "content of .envelopefs.dir, section 7.1", directory_id_vectors()),
        ("name", "a name in a backing directory, sections 7.2 and 7.3; bytes of names are hexadecimal", name_vectors()),
        ("symlink", "text of a backing link, and the file in links/ if it lies apart, section 8", symlink_vectors()),
        ("xattr", "an extended attribute of a backing inode, section 9", xattr_vectors()),
        ("keyring", "a keyring whose root key is a key file, section 4", keyring_vectors()),
        (
            "passphrase",
            "a store secret wrapped by a passphrase, section 4.3; the error is not a damage code",
            passphrase_vectors(),
        ),
        (
            "recovery",
            "a store secret wrapped for a recovery key, section 4.3; the errors are not damage codes",
            recovery_vectors(),
        ),
    ]
}

/// Bytes that look different everywhere.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8).wrapping_add(seed)).collect()
}

fn sec(b: [u8; 32]) -> Secret32 {
    Secret32::build(|s| s.copy_from_slice(&b))
}

/// `sealed` of FORMAT.md with a fixed nonce.
fn sealed(key: &Secret32, aad: &[u8], plain: &[u8]) -> Vec<u8> {
    let mut data = plain.to_vec();
    let tag = GcmSiv::seal(key, &NONCE, aad, &mut data);
    [&NONCE[..], &data, &tag].concat()
}

/// A vector: the inputs, with name and outcome put in.
fn good(name: &str, mut inputs: Value, expect: Value) -> Value {
    inputs["name"] = json!(name);
    inputs["expect"] = expect;
    inputs
}

fn bad(name: &str, mut inputs: Value, code: &str) -> Value {
    inputs["name"] = json!(name);
    inputs["error"] = json!(code);
    inputs
}

fn flipped(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut b = bytes.to_vec();
    b[at] ^= 1;
    b
}

fn kdf_vectors() -> Vec<Value> {
    let labels = [label::CONTENT, label::STATE, label::KEK_WRAP, label::NAMES, label::REPORT_MAC];
    let contexts: [&[u8]; 3] = [b"", &[0xf1; 16], b"envelopefs"];
    let mut out = Vec::new();
    for l in labels {
        for c in contexts {
            let derived = kdf::derive_public(&sec(DEK), l, c);
            let inputs = json!({ "key": hex(&DEK), "label": l, "context": hex(c) });
            out.push(good(&format!("{l}, context of {} bytes", c.len()), inputs, json!({ "derived": hex(&derived) })));
        }
    }
    out
}

fn geometry_vectors() -> Vec<Value> {
    let plain = [
        0,
        1,
        4095,
        4096,
        4097,
        131_071,
        131_072,
        131_073,
        135_168,
        655_359,
        655_360,
        655_361,
        1_000_000,
        1 << 30,
        (1 << 32) + 5,
        20 << 30,
        1 << 62,
    ];
    let inside = [1, 4095, 4096, 33 * 4096 + 1, 34 * 4096, 35 * 4096, 163 * 4096 + 7, 165 * 4096];
    let mut out = Vec::new();
    for p in plain {
        let expect = json!({ "plain": p, "exact": true });
        out.push(good(&format!("{p} bytes"), json!({ "backing": geometry::backing_size(p) }), expect));
    }
    for b in inside {
        let expect = json!({ "plain": geometry::plain_size(b), "exact": false });
        out.push(good(&format!("ends inside metadata at {b}"), json!({ "backing": b }), expect));
    }
    out
}

fn slot(sequence: u64, kek: &(KekId, [u8; 32])) -> Slot {
    wrapped(Slot::new(STORE, FILE, &Dek::from_secret(sec(DEK))), sequence, kek)
}

fn wrapped(mut s: Slot, sequence: u64, kek: &(KekId, [u8; 32])) -> Slot {
    s.sequence = sequence;
    s.kek = kek.0;
    let key = kdf::derive(&sec(kek.1), label::KEK_WRAP, kek.0.as_bytes());
    s.wrapped = sealed(&key, &s.wrap_aad(), &DEK);
    s
}

fn header_inputs(header: &[u8]) -> Value {
    json!({
        "header": hex(header),
        "store": STORE.to_string(),
        "keks": [
            { "id": KEK1.0.to_string(), "state": "retired", "key": hex(&KEK1.1) },
            { "id": KEK2.0.to_string(), "state": "active", "key": hex(&KEK2.1) },
        ],
    })
}

/// Both slots the same, with `bytes` put at `at` and the checksum made right again.
fn patched(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut b = slot(1, &KEK1).encode().to_vec();
    b[at..at + bytes.len()].copy_from_slice(bytes);
    let crc = crc32c::crc32c(&b[..1020]);
    b[1020..].copy_from_slice(&crc.to_le_bytes());
    [b.clone(), b].concat()
}

fn header_vectors() -> Vec<Value> {
    let (one, two) = (slot(1, &KEK1).encode(), slot(2, &KEK2).encode());
    let both = |a: &[u8], b: &[u8]| header_inputs(&[a, b].concat());
    let expect = |sequence| json!({ "file": FILE.to_string(), "sequence": sequence, "dek": hex(&DEK) });
    let mut out = vec![
        good("new file: both slots the same", both(&one, &one), expect(1)),
        good("rewrap begun: slot B is newer", both(&one, &two), expect(2)),
        good("rewrap begun: slot A is newer", both(&two, &one), expect(2)),
        good("rewrap done", both(&two, &two), expect(2)),
        good("slot A torn", both(&flipped(&one, 500), &one), expect(1)),
        good("newer slot torn", both(&one, &flipped(&two, 160)), expect(1)),
        good("slot B lost", both(&one, &[0; 1024]), expect(1)),
        good("slot A of a newer version, slot B of this one", both(&patched(8, &[2, 0])[..1024], &one), expect(1)),
        bad("2047 bytes", header_inputs(&[one, one].concat()[..2047]), "header-short"),
        bad("no magic in either slot", header_inputs(&patched(0, b"X")), "header-magic"),
        bad("all zeros", header_inputs(&[0; 2048]), "header-magic"),
        bad("checksum wrong in both", both(&flipped(&one, 1023), &flipped(&one, 1023)), "header-unreadable"),
        bad("no magic in A, checksum wrong in B", both(&[0; 1024], &flipped(&one, 200)), "header-unreadable"),
    ];
    let patches: [(&str, usize, &[u8], &str); 17] = [
        ("version 2", 8, &[2, 0], "unsupported-version"),
        ("incompatible flag", 12, &[1, 0, 0, 0], "unsupported-feature"),
        ("suite 2", 10, &[2, 0], "unsupported-suite"),
        ("wrap suite 3", 144, &[3, 0], "unsupported-suite"),
        ("reserved bytes 20", 20, &[1], "malformed"),
        ("reserved bytes 148", 148, &[1], "malformed"),
        ("reserved bytes 792", 792, &[1], "malformed"),
        ("reserved byte 1019", 1019, &[1], "malformed"),
        ("byte after the wrapped DEK", 152 + 60, &[1], "malformed"),
        ("wrapped DEK of 0 bytes", 146, &[0, 0], "malformed"),
        ("wrapped DEK of 641 bytes", 146, &[129, 2], "malformed"),
        ("sequence 0", 120, &[0], "malformed"),
        ("sequence changed", 120, &[9], "wrap-auth"),
        ("wrap's nonce changed", 152, &[0], "wrap-auth"),
        ("wrap's tag changed", 152 + 59, &[0], "wrap-auth"),
        ("file id changed", 40, &[0], "wrap-auth"),
        ("KekId of another KEK", 128, &[0xa2; 16], "wrap-auth"),
    ];
    out.extend(patches.iter().map(|(name, at, bytes, code)| bad(name, header_inputs(&patched(*at, bytes)), code)));
    out.push(good("read-only-compatible flag in the wrap of one who knew it", header_inputs(&flagged()), expect(1)));
    out.extend(header_key_vectors(&[one, one].concat()));
    out
}

/// A header with a read-only-compatible flag, otherwise right: it may be read.
fn flagged() -> Vec<u8> {
    let mut s = slot(1, &KEK1);
    s.ro_compat = 1;
    let key = kdf::derive(&sec(DEK), label::HEADER_MAC, FILE.as_bytes());
    s.mac = kdf::mac(&key, &[&s.wrap_aad()[..88]]);
    let b = wrapped(s, 1, &KEK1).encode();
    [b, b].concat()
}

fn header_key_vectors(header: &[u8]) -> Vec<Value> {
    let with = |change: &dyn Fn(&mut Value)| {
        let mut i = header_inputs(header);
        change(&mut i);
        i
    };
    let with_slot = |change: &dyn Fn(&mut Slot)| {
        let mut s = slot(1, &KEK1);
        change(&mut s);
        let b = wrapped(s, 1, &KEK1).encode();
        header_inputs(&[b, b].concat())
    };
    vec![
        bad("of another store", with(&|i| i["store"] = json!(hex(&[0x52; 16]))), "foreign-store"),
        bad("KEK not in the keyring", with(&|i| i["keks"][0]["id"] = json!(hex(&[9; 16]))), "kek-unknown"),
        bad("KEK destroyed", with(&|i| i["keks"][0]["state"] = json!("destroyed")), "kek-destroyed"),
        bad("commitment of another DEK", with_slot(&|s| s.commitment[0] ^= 1), "commitment"),
        bad("MAC of another prefix", with_slot(&|s| s.mac[0] ^= 1), "header-mac"),
    ]
}

fn entry(seed: u8) -> Entry {
    Entry { nonce: [seed; 12], tag: [seed ^ 0xff; 16] }
}

fn segment_state(sequence: u64, length: u64, flags: u32) -> SegmentState {
    let mut s = SegmentState::EMPTY;
    s.sequence = sequence;
    s.file = FileState { length, flags };
    s
}

fn seal_state(segment: u64, s: &SegmentState) -> Vec<u8> {
    let key = BlockCipher::new(&kdf::derive(&sec(DEK), label::STATE, FILE.as_bytes()));
    let mut out = [0u8; STATE];
    state::seal(&key, FILE, segment, s, NONCE, &mut out);
    out[..geometry::state_len(segment)].to_vec()
}

/// A state of segment 0 whose body is given, sealed rightly.
fn seal_body(body: &[u8; 984]) -> Vec<u8> {
    let key = kdf::derive(&sec(DEK), label::STATE, FILE.as_bytes());
    let sequence = 7u64.to_le_bytes();
    let aad = [&FILE.0[..], &0u64.to_le_bytes(), &sequence, &1u16.to_le_bytes()].concat();
    let mut data = *body;
    let tag = GcmSiv::seal(&key, &NONCE, &aad, &mut data);
    [&sequence[..], &NONCE, &tag, &[0; 4], &data].concat()
}

fn state_inputs(segment: u64, copy: &[u8]) -> Value {
    json!({ "dek": hex(&DEK), "file": FILE.to_string(), "segment": segment, "copy": hex(copy) })
}

fn state_vectors() -> Vec<Value> {
    let mut first = segment_state(7, 9000, CLEAN);
    [0, 2, 31].into_iter().for_each(|i| first.set(i, entry(i as u8 + 1)));
    let mut later = segment_state(3, 0, 0);
    [1, 127].into_iter().for_each(|i| later.set(i, entry(i as u8 + 1)));
    let shown = |i: usize| {
        let e = entry(i as u8 + 1);
        json!({ "index": i, "nonce": hex(&e.nonce), "tag": hex(&e.tag) })
    };
    let expect = |sequence: u64, entries: &[usize], length: u64, flags: u32| {
        let entries: Vec<Value> = entries.iter().map(|i| shown(*i)).collect();
        json!({ "sequence": sequence, "entries": entries, "length": length, "flags": flags })
    };
    let holes = segment_state(1, 0, SPARSE);
    let cut = segment_state(2, 5, TRUNCATING);
    let (zero, one) = (seal_state(0, &first), seal_state(1, &later));
    let mut out = vec![
        good("segment 0 with three blocks, CLEAN", state_inputs(0, &zero), expect(7, &[0, 2, 31], 9000, CLEAN)),
        good("segment 0, all holes, SPARSE", state_inputs(0, &seal_state(0, &holes)), expect(1, &[], 0, SPARSE)),
        good("segment 0, TRUNCATING", state_inputs(0, &seal_state(0, &cut)), expect(2, &[], 5, TRUNCATING)),
        good("segment 1 with two blocks", state_inputs(1, &one), expect(3, &[1, 127], 0, 0)),
        bad("segment 0 never written", state_inputs(0, &[0; 1024]), "state-absent"),
        bad("segment 1 never written", state_inputs(1, &[0; 4096]), "state-absent"),
        bad("state of segment 1 read as segment 2", state_inputs(2, &one), "state-auth"),
    ];
    for (name, at) in [
        ("sequence", 0),
        ("nonce", 8),
        ("tag", 20),
        ("reserved bytes", 36),
        ("first entry", 40),
        ("length", 40 + 896),
        ("last byte", 1023),
    ] {
        out.push(bad(&format!("{name} changed"), state_inputs(0, &flipped(&zero, at)), "state-auth"));
    }
    let mut none = zero.clone();
    none[..8].fill(0);
    out.push(bad("sequence 0, the rest as it was", state_inputs(0, &none), "state-auth"));
    let mut other = state_inputs(0, &zero);
    other["file"] = json!(hex(&[0xf2; 16]));
    out.push(bad("state of another file", other, "state-auth"));
    let body = |at: usize, value: u8| {
        let mut b = [0u8; 984];
        b[at] = value;
        state_inputs(0, &seal_body(&b))
    };
    out.push(bad("sealed with an unknown flag", body(904, 8), "malformed"));
    out.push(bad("sealed with a length above 2^62", body(903, 0x41), "malformed"));
    out.push(bad("sealed with reserved bytes", body(908, 1), "malformed"));
    out
}

fn block_vectors() -> Vec<Value> {
    let inputs = |block: u64, plain: &[u8]| {
        let key = BlockCipher::new(&kdf::derive(&sec(DEK), label::CONTENT, FILE.as_bytes()));
        let mut data = plain.to_vec();
        let tag = key.seal(&NONCE, &state::block_aad(FILE, block), &mut data);
        json!({
            "dek": hex(&DEK), "file": FILE.to_string(), "block": block,
            "nonce": hex(&NONCE), "tag": hex(&tag), "ciphertext": hex(&data),
        })
    };
    let plain = pattern(100, 1);
    let flip = |member: &str| {
        let mut i = inputs(5, &plain);
        i[member] = json!(hex(&flipped(&super::unhex(&i[member]), 0)));
        i
    };
    let with = |member: &str, value: Value| {
        let mut i = inputs(5, &plain);
        i[member] = value;
        i
    };
    let mut out: Vec<Value> = [(0u64, 1usize), (5, 100), (31, 4096), (1 << 40, 17)]
        .iter()
        .map(|(block, len)| {
            let p = pattern(*len, 9);
            good(&format!("block {block} of {len} bytes"), inputs(*block, &p), json!({ "plaintext": hex(&p) }))
        })
        .collect();
    for member in ["ciphertext", "nonce", "tag"] {
        out.push(bad(&format!("{member} changed"), flip(member), "block-auth"));
    }
    out.push(bad("moved to another place", with("block", json!(6)), "block-auth"));
    out.push(bad("moved to another file", with("file", json!(hex(&[0xf2; 16]))), "block-auth"));
    let short = inputs(5, &plain)["ciphertext"].as_str().unwrap()[..198].to_owned();
    out.push(bad("cut short", with("ciphertext", json!(short)), "block-auth"));
    out
}

fn store_secret() -> StoreSecret {
    StoreSecret::from_secret(sec(SECRET))
}

fn derived(label: &str) -> Secret32 {
    kdf::derive(&sec(SECRET), label, b"")
}

fn directory_id_vectors() -> Vec<Value> {
    let blob = sealed(&derived(label::DIR_ID), b"", DIR.as_bytes());
    let inputs = |b: &[u8]| json!({ "secret": hex(&SECRET), "sealed": hex(b) });
    let long = sealed(&derived(label::DIR_ID), b"", &[1; 17]);
    vec![
        good("44 bytes", inputs(&blob), json!({ "directory": DIR.to_string() })),
        bad("nonce changed", inputs(&flipped(&blob, 0)), "dir-id-auth"),
        bad("id changed", inputs(&flipped(&blob, 12)), "dir-id-auth"),
        bad("tag changed", inputs(&flipped(&blob, 43)), "dir-id-auth"),
        bad("43 bytes", inputs(&blob[..43]), "dir-id-auth"),
        bad("empty", inputs(b""), "dir-id-auth"),
        bad("an id of 17 bytes", inputs(&long), "dir-id-auth"),
    ]
}

fn name_inputs(entry: &[u8], sidecar: Option<&[u8]>) -> Value {
    let text = |b: &[u8]| String::from_utf8(b.to_vec()).unwrap();
    json!({
        "secret": hex(&SECRET), "directory": DIR.to_string(), "entry": text(entry), "sidecar": sidecar.map(text),
    })
}

/// The text of bytes that no writer would take for a name.
fn text_of(name: &[u8]) -> Vec<u8> {
    let mut data = name.to_vec();
    let mut nonce = [0u8; 12];
    nonce.copy_from_slice(&DIR.as_bytes()[..12]);
    let tag = GcmSiv::seal(&derived(label::NAMES), &nonce, DIR.as_bytes(), &mut data);
    data.extend_from_slice(&tag);
    BASE64URL.encode(&data).into_bytes()
}

fn name_vectors() -> Vec<Value> {
    let keys = NameKeys::new(&store_secret());
    let longest = pattern(255, 7).iter().map(|b| b'a' + b % 26).collect::<Vec<u8>>();
    let mut out: Vec<Value> = [
        &b"a"[..],
        b"README.md",
        "gr\u{fc}\u{df}e".as_bytes(),
        b"\xff\xfe",
        b".hidden",
        &longest[..175],
        &longest[..176],
        &longest,
    ]
    .iter()
    .map(|name| {
        let e = keys.encode(&DIR, name);
        let inputs = name_inputs(e.content(), e.sidecar().map(|s| s.1));
        good(&format!("{} bytes", name.len()), inputs, json!({ "name": hex(name) }))
    })
    .collect();
    let text = text_of(b"README.md");
    let mut other = name_inputs(&text, None);
    other["directory"] = json!(hex(&[0xd2; 16]));
    out.push(bad("of another directory", other, "name-auth"));
    let faults: [(&str, Vec<u8>); 9] = [
        ("a character changed", {
            let mut t = text.clone();
            t[0] = if t[0] == b'A' { b'B' } else { b'A' };
            t
        }),
        ("padding", [&text[..], b"=="].concat()),
        ("standard alphabet", b"++++++++++++++++++++++++".to_vec()),
        ("too short for a tag", text[..20].to_vec()),
        ("opens to nothing", text_of(b"")),
        ("opens to ..", text_of(b"..")),
        ("opens to a name with a slash", text_of(b"a/b")),
        ("opens to a name with a zero byte", text_of(b"a\0b")),
        ("a name in clear", b"README.md".to_vec()),
    ];
    out.extend(faults.iter().map(|(name, t)| bad(name, name_inputs(t, None), "name-auth")));
    out.push(bad("bits beyond the last byte", name_inputs(&loose_bits(), None), "name-auth"));
    let (one, two) = (keys.encode(&DIR, &longest), keys.encode(&DIR, &longest[..200]));
    let sidecar = |e: &Encoded| e.sidecar().expect("a long name").1.to_vec();
    out.push(bad("sidecar of another name", name_inputs(one.content(), Some(&sidecar(&two))), "name-sidecar"));
    let cut = &sidecar(&one)[..300];
    out.push(bad("sidecar cut short", name_inputs(one.content(), Some(cut)), "name-sidecar"));
    out.push(bad("sidecar empty", name_inputs(one.content(), Some(b"")), "name-sidecar"));
    out.push(bad("long form of a short text", short_as_long(&text), "name-sidecar"));
    out
}

/// A good text of 17 bytes, with a bit set that its last character has to spare.
fn loose_bits() -> Vec<u8> {
    let mut t = text_of(b"a");
    let last = t.pop().expect("23 characters");
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let at = ALPHABET.iter().position(|c| *c == last).expect("base64url");
    t.push(ALPHABET[at | 1]);
    t
}

fn short_as_long(text: &[u8]) -> Value {
    let entry = format!(".envelopefs.long.{}", BASE64URL.encode(kdf::sha256(text)));
    name_inputs(entry.as_bytes(), Some(text))
}

fn symlink_vectors() -> Vec<Value> {
    let key = derived(label::SYMLINK);
    let inline = |blob: &[u8]| json!({ "secret": hex(&SECRET), "text": BASE64URL.encode(blob) });
    let apart = |text: &str, blob: &[u8]| json!({ "secret": hex(&SECRET), "text": text, "apart": hex(blob) });
    let short = sealed(&key, b"", b"../some/where");
    let long = pattern(4095, 3).iter().map(|b| b'a' + b % 26).collect::<Vec<u8>>();
    let blob = sealed(&key, b"", &long);
    let reference = Reference { name: b"00112233445566778899aabbccddeeff".to_vec(), len: 4095 };
    let reference = String::from_utf8(reference.to_text()).expect("ASCII");
    vec![
        good("in the link", inline(&short), json!({ "target": hex(b"../some/where") })),
        good("apart", apart(&reference, &blob), json!({ "target": hex(&long) })),
        bad("changed", inline(&flipped(&short, 14)), "symlink-auth"),
        bad("empty target", inline(&sealed(&key, b"", b"")), "symlink-auth"),
        bad("target with a zero byte", inline(&sealed(&key, b"", b"a\0b")), "symlink-auth"),
        bad("too short", inline(&short[..20]), "symlink-auth"),
        bad("apart, changed", apart(&reference, &flipped(&blob, 2000)), "symlink-auth"),
        bad("reference with capitals", apart(&reference.replace("aabb", "AABB"), &blob), "symlink-auth"),
    ]
}

fn xattr_vectors() -> Vec<Value> {
    let keys = XattrKeys::new(&store_secret());
    let stored = |name: &str| match keys.encode_name(name.as_bytes()) {
        XattrName::Sealed { backing, long } => (String::from_utf8(backing).expect("ASCII"), long),
        other => panic!("{other:?}"),
    };
    let inputs = |backing: &str, plain: &[u8]| {
        let value = sealed(&derived(label::XATTR_VALUE), backing.as_bytes(), plain);
        json!({ "secret": hex(&SECRET), "backing_name": backing, "backing_value": hex(&value) })
    };
    let named = |name: &str, value: &[u8]| [&(name.len() as u16).to_le_bytes()[..], name.as_bytes(), value].concat();
    let mut out = Vec::new();
    for (name, value) in [("user.comment", &b"hello"[..]), ("security.capability", b"\x01\x02"), ("trusted.x", b"")] {
        out.push(good(name, inputs(&stored(name).0, value), json!({ "name": name, "value": hex(value) })));
    }
    let long = format!("user.{}", "n".repeat(250));
    let backing = stored(&long).0;
    let expect = json!({ "name": long.as_str(), "value": hex(b"v") });
    out.push(good("a name too long for its text", inputs(&backing, &named(&long, b"v")), expect));
    let comment = stored("user.comment").0;
    let mut moved = inputs(&comment, b"hello");
    moved["backing_name"] = json!(stored("user.other").0);
    out.push(bad("value moved to another name", moved, "xattr-auth"));
    let mut changed = inputs(&comment, b"hello");
    changed["backing_value"] = json!(hex(&flipped(&super::unhex(&changed["backing_value"]), 30)));
    out.push(bad("value changed", changed, "xattr-auth"));
    let mut none = inputs(&comment, b"hello");
    none["backing_value"] = json!("");
    out.push(bad("value empty", none, "xattr-auth"));
    out.push(bad("long name, another name inside", inputs(&backing, &named("user.other", b"v")), "xattr-auth"));
    out.push(bad("long name, value cut inside the name", inputs(&backing, &named(&long, b"")[..50]), "xattr-auth"));
    let foreign = json!({ "foreign": true });
    out.push(good("another program's", inputs("user.mime_type", b"x"), foreign.clone()));
    out.push(good("moved to another namespace", inputs(&comment.replace("user.", "trusted."), b"x"), foreign));
    out
}

fn wrap_by_root(purpose: KeyPurpose, object: [u8; 16], key: &[u8; 32]) -> Vec<u8> {
    let context = WrapContext { store: STORE.0, purpose, object, extra: Vec::new() };
    sealed(&kdf::derive(&sec(ROOT), label::ROOT_WRAP, b""), &context.to_aad(), key)
}

const ROOT_ID: RootKeyId = RootKeyId([0x71; 16]);

fn kek_record(kek: &(KekId, [u8; 32]), state: KekState) -> KekRecord {
    let bytes = wrap_by_root(KeyPurpose::Kek, kek.0.0, &kek.1);
    let destroyed = state == KekState::Destroyed;
    KekRecord {
        id: kek.0,
        kind: KekKind::Sealed,
        state,
        created: 1_700_000_000,
        activated: 1_700_000_001,
        retired: if state == KekState::Active { 0 } else { 1_700_000_002 },
        unused: if destroyed { 1_700_000_003 } else { 0 },
        destroyed: if destroyed { 1_700_000_004 } else { 0 },
        provider: None,
        wraps: if destroyed { Vec::new() } else { vec![Wrap { root: ROOT_ID, bytes }] },
    }
}

fn keyring(keks: Vec<KekRecord>) -> Keyring {
    Keyring {
        store: STORE,
        generation: 5,
        incompat: 0,
        ro_compat: 0,
        roots: vec![RootKeyRecord { id: ROOT_ID, uri: "keyfile:/etc/envelopefs/key".to_owned() }],
        secret: vec![Wrap { root: ROOT_ID, bytes: wrap_by_root(KeyPurpose::StoreSecret, STORE.0, &SECRET) }],
        keks,
        life: LifeCycle::default(),
    }
}

fn encode(k: &Keyring) -> Vec<u8> {
    k.encode(|signed| kdf::mac(&derived(label::KEYRING_MAC), &[signed])).expect("a sound keyring")
}

/// `bytes` with a change before the MAC, MAC and checksum made right again.
fn resigned(bytes: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut b = bytes[..bytes.len() - 36].to_vec();
    change(&mut b);
    let mac = kdf::mac(&derived(label::KEYRING_MAC), &[&b]);
    b.extend_from_slice(&mac);
    let crc = crc32c::crc32c(&b);
    b.extend_from_slice(&crc.to_le_bytes());
    b
}

fn keyring_vectors() -> Vec<Value> {
    let inputs = |b: &[u8]| json!({ "keyring": hex(b), "root_key": hex(&ROOT) });
    let expect = |plaintext_names: bool, keks: Value| {
        json!({
            "store": STORE.to_string(), "generation": 5, "plaintext_names": plaintext_names,
            "roots": ["keyfile:/etc/envelopefs/key"], "secret": hex(&SECRET), "keks": keks,
        })
    };
    let shown =
        |kek: &(KekId, [u8; 32]), state: &str| json!({ "id": kek.0.to_string(), "state": state, "key": hex(&kek.1) });
    let one = encode(&keyring(vec![kek_record(&KEK1, KekState::Active)]));
    let rotated = keyring(vec![kek_record(&KEK1, KekState::Retired), kek_record(&KEK2, KekState::Active)]);
    let destroyed = keyring(vec![kek_record(&KEK1, KekState::Destroyed), kek_record(&KEK2, KekState::Active)]);
    let mut plain = keyring(vec![kek_record(&KEK1, KekState::Active)]);
    plain.incompat = 1;
    let mut ending = rotated.clone();
    let schedule =
        Schedule { kek: KEK1.0, confirmed: 2, scheduled: 1_700_000_100, due: 1_700_604_900, announced: 0, used: 0 };
    ending.life = LifeCycle { quorum: 2, floor: Some(KEK2.0), schedules: vec![schedule] };
    let mut expect_ending = expect(false, json!([shown(&KEK1, "retired"), shown(&KEK2, "active")]));
    expect_ending["life"] = json!({
        "quorum": 2,
        "below_floor": [KEK1.0.to_string()],
        "schedules": { KEK1.0.to_string(): serde_json::to_value(schedule).unwrap() },
    });
    let ending = encode(&ending);
    let life_at = ending.len() - 36 - 56 - 24;
    let unfit = |change: &dyn Fn(&mut Vec<u8>)| inputs(&resigned(&ending, change));
    let gone = json!({ "id": KEK1.0.to_string(), "state": "destroyed", "key": null });
    let kek_at = 48 + 2 + 16 + 2 + 27 + 2 + 16 + 2 + 60 + 4;
    assert_eq!(one[kek_at..kek_at + 16], KEK1.0.0, "the layout of FORMAT.md section 4.2");
    let unsound = |change: &dyn Fn(&mut Vec<u8>)| inputs(&resigned(&one, change));
    vec![
        good("one active KEK", inputs(&one), expect(false, json!([shown(&KEK1, "active")]))),
        good(
            "after a rotation",
            inputs(&encode(&rotated)),
            expect(false, json!([shown(&KEK1, "retired"), shown(&KEK2, "active")])),
        ),
        good("old KEK destroyed", inputs(&encode(&destroyed)), expect(false, json!([gone, shown(&KEK2, "active")]))),
        good("plaintext names", inputs(&encode(&plain)), expect(true, json!([shown(&KEK1, "active")]))),
        good("a quorum, a floor, and a KEK to be destroyed", inputs(&ending), expect_ending),
        bad("empty", inputs(b""), "keyring-unreadable"),
        bad("magic changed", unsound(&|b| b[0] ^= 1), "keyring-unreadable"),
        bad("checksum wrong", inputs(&flipped(&one, one.len() - 1)), "keyring-unreadable"),
        bad("cut short", inputs(&one[..one.len() - 1]), "keyring-unreadable"),
        bad("version 2", unsound(&|b| b[8] = 2), "unsupported-version"),
        bad("unknown incompatible flag", unsound(&|b| b[12] = 4), "unsupported-feature"),
        bad("flag of a life-cycle section that is not there", unsound(&|b| b[12] = 2), "keyring-unreadable"),
        bad("life-cycle section without its flag", unfit(&|b| b[12] = 0), "keyring-unreadable"),
        bad("quorum of 1", unfit(&|b| b[life_at] = 1), "keyring-unreadable"),
        bad("floor that is no KEK", unfit(&|b| b[life_at + 4] ^= 1), "keyring-unreadable"),
        bad(
            "schedule of the active KEK",
            unfit(&|b| b[life_at + 24..life_at + 40].copy_from_slice(&KEK2.0.0)),
            "keyring-unreadable",
        ),
        bad("due before it was scheduled", unfit(&|b| b[life_at + 56..life_at + 64].fill(0)), "keyring-unreadable"),
        bad(
            "life-cycle section that says nothing",
            unsound(&|b| {
                b[12] = 2;
                b.extend_from_slice(&[0; 24]);
            }),
            "keyring-unreadable",
        ),
        bad("reserved bytes 10", unsound(&|b| b[10] = 1), "keyring-unreadable"),
        bad("reserved bytes 20", unsound(&|b| b[20] = 1), "keyring-unreadable"),
        bad("generation 0", unsound(&|b| b[40..48].fill(0)), "keyring-unreadable"),
        bad("no root key", unsound(&|b| b[48] = 0), "keyring-unreadable"),
        bad("control character in a URI", unsound(&|b| b[70] = 10), "keyring-unreadable"),
        bad("no active KEK", unsound(&|b| b[kek_at + 17] = 3), "keyring-unreadable"),
        bad("kind 3", unsound(&|b| b[kek_at + 16] = 3), "keyring-unreadable"),
        bad("state 5", unsound(&|b| b[kek_at + 17] = 5), "keyring-unreadable"),
        bad("sealed KEK with a provider", unsound(&|b| b[kek_at + 68..kek_at + 84].fill(0x71)), "keyring-unreadable"),
        bad("bytes left over", unsound(&|b| b.push(0)), "keyring-unreadable"),
        bad("KEK added without the MAC's key", inputs(&forged()), "keyring-mac"),
    ]
}

/// A sound keyring whose MAC was made with another key.
fn forged() -> Vec<u8> {
    let k = keyring(vec![kek_record(&KEK1, KekState::Retired), kek_record(&KEK2, KekState::Active)]);
    k.encode(|signed| kdf::mac(&sec([1; 32]), &[signed])).expect("a sound keyring")
}

fn passphrase_vectors() -> Vec<Value> {
    const PASSPHRASE: &str = "correct horse battery staple";
    let context = WrapContext { store: STORE.0, purpose: KeyPurpose::StoreSecret, object: STORE.0, extra: Vec::new() };
    let wrapped = |memory: u32, passes: u32, lanes: u32| {
        let salt = [0x5a; 16];
        let params = argon2::Params::new(memory.min(2048), passes.clamp(1, 16), lanes.clamp(1, 16), Some(32)).unwrap();
        let mut root = [0u8; 32];
        argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params)
            .hash_password_into(PASSPHRASE.as_bytes(), &salt, &mut root)
            .unwrap();
        let key = kdf::derive(&sec(root), label::ROOT_WRAP, b"");
        let numbers = [memory.to_le_bytes(), passes.to_le_bytes(), lanes.to_le_bytes()].concat();
        [&[1, 0, 0, 0][..], &numbers, &salt, &sealed(&key, &context.to_aad(), &SECRET)].concat()
    };
    let inputs = |w: &[u8]| json!({ "passphrase": PASSPHRASE, "store": STORE.to_string(), "wrapped": hex(w) });
    let one = wrapped(1024, 1, 1);
    let mut wrong = inputs(&one);
    wrong["passphrase"] = json!("wrong horse");
    let expect = || json!({ "key": hex(&SECRET) });
    vec![
        good("1 MiB, 1 pass, 1 lane", inputs(&one), expect()),
        good("2 MiB, 2 passes, 4 lanes", inputs(&wrapped(2048, 2, 4)), expect()),
        bad("another passphrase", wrong, "bad-ciphertext"),
        bad("version 2", inputs(&[&[2], &one[1..]].concat()), "bad-ciphertext"),
        bad("reserved bytes", inputs(&[&[1, 1], &one[2..]].concat()), "bad-ciphertext"),
        bad("1 KiB too much memory", inputs(&wrapped(1024 * 1024 + 1, 1, 1)), "bad-ciphertext"),
        bad("no pass", inputs(&wrapped(1024, 0, 1)), "bad-ciphertext"),
        bad("17 lanes", inputs(&wrapped(1024, 1, 17)), "bad-ciphertext"),
        bad("cut short", inputs(&one[..91]), "bad-ciphertext"),
        bad("changed", inputs(&flipped(&one, 50)), "bad-ciphertext"),
    ]
}

/// Gives HPKE the same ephemeral key every time.
struct Fixed(u8);

impl hpke::rand_core::RngCore for Fixed {
    fn next_u32(&mut self) -> u32 {
        u32::from_ne_bytes([self.0; 4])
    }

    fn next_u64(&mut self) -> u64 {
        u64::from_ne_bytes([self.0; 8])
    }

    fn fill_bytes(&mut self, to: &mut [u8]) {
        to.fill(self.0);
    }
}

impl hpke::rand_core::CryptoRng for Fixed {}

fn recovery_vectors() -> Vec<Value> {
    type X25519 = hpke::kem::X25519HkdfSha256;
    let key = RecoveryKey::from_secret(Secret32::take_from(&mut pattern(32, 0x21).try_into().unwrap())).unwrap();
    let text = key.printed().unwrap().to_string();
    let context = |purpose| WrapContext { store: STORE.0, purpose, object: STORE.0, extra: Vec::new() };
    let wrapped = |seed: u8, purpose| {
        let public = <X25519 as Kem>::PublicKey::from_bytes(key.uri().recovery_key().unwrap()).unwrap();
        let mut data = SECRET;
        let (enc, tag) = hpke::single_shot_seal_in_place_detached::<
            hpke::aead::AesGcm256,
            hpke::kdf::HkdfSha256,
            X25519,
            _,
        >(
            &OpModeS::Base, &public, INFO, &mut data, &context(purpose).to_aad(), &mut Fixed(seed)
        )
        .unwrap();
        [&enc.to_bytes()[..], &data, &tag.to_bytes()[..]].concat()
    };
    let inputs = |text: &str, w: &[u8]| json!({ "recovery_key": text, "store": STORE.to_string(), "wrapped": hex(w) });
    let expect = || json!({ "uri": key.uri().to_string(), "key": hex(&SECRET) });
    let one = wrapped(0xe1, KeyPurpose::StoreSecret);
    let other = RecoveryKey::from_secret(sec([7; 32])).unwrap().printed().unwrap().to_string();
    let with = |at: usize, c: &str| {
        let mut t = text.clone();
        assert_ne!(&t[at..at + c.len()], c);
        t.replace_range(at..at + c.len(), c);
        t
    };
    let swapped = {
        let at = text.as_bytes().windows(2).position(|w| w[0] != w[1] && !w.contains(&b'-')).unwrap();
        let pair: String = text[at..at + 2].chars().rev().collect();
        with(at, &pair)
    };
    let digits = text.to_lowercase().replace('-', " ").replace('o', "0").replace('b', "8").replace(['i', 'l'], "1");
    assert!(["0", "8", "1"].iter().all(|d| digits.contains(d)), "{digits}");
    vec![
        good("as it is printed", inputs(&text, &one), expect()),
        good("another ephemeral key", inputs(&text, &wrapped(0xe2, KeyPurpose::StoreSecret)), expect()),
        good("in small letters, with spaces, and digits for letters", inputs(&digits, &one), expect()),
        good("without dashes", inputs(&text.replace('-', ""), &one), expect()),
        bad("one character changed", inputs(&with(10, if &text[10..11] == "A" { "C" } else { "A" }), &one), "mistyped"),
        bad("two neighbours exchanged", inputs(&swapped, &one), "mistyped"),
        bad("one character too few", inputs(&text[..68], &one), "mistyped"),
        bad("a character that is none", inputs(&with(0, "9"), &one), "mistyped"),
        bad("another recovery key", inputs(&other, &one), "bad-ciphertext"),
        bad("another purpose", inputs(&text, &wrapped(0xe1, KeyPurpose::Kek)), "bad-ciphertext"),
        bad("enc changed", inputs(&text, &flipped(&one, 3)), "bad-ciphertext"),
        bad("ciphertext changed", inputs(&text, &flipped(&one, 40)), "bad-ciphertext"),
        bad("tag changed", inputs(&text, &flipped(&one, 79)), "bad-ciphertext"),
        bad("enc of low order", inputs(&text, &[&[0; 32], &one[32..]].concat()), "bad-ciphertext"),
        bad("cut short", inputs(&text, &one[..79]), "bad-ciphertext"),
        bad("too long", inputs(&text, &[&one[..], &[0]].concat()), "bad-ciphertext"),
    ]
}
