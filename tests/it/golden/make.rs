//! Makes the golden stores that the command line alone cannot make: `tests/golden/README.md`.

use super::*;
use envelopefs::backing::XattrMode;
use envelopefs::format::geometry;
use envelopefs::kms::KeyProvider;
use envelopefs::kms::passphrase::Argon2Cost;
use envelopefs::store::file::OpenFile;
use envelopefs::store::header::{open_dek, wrap_slot};
use envelopefs::store::keys::{KekKind, StoreFlags};

const PASSPHRASE: &[u8] = b"golden test passphrase";

fn content(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(97).wrapping_add((i >> 7) as u8) ^ seed).collect()
}

struct Making {
    store: Arc<Store<Posix>>,
    want: Map<String, Value>,
}

impl Making {
    fn file(&mut self, name: &str, content: &[u8]) -> OpenFile<Posix> {
        let (_, _, f) = self.store.create(&self.store.root(), name.as_bytes(), 0o644, 0, None).unwrap();
        if !content.is_empty() {
            f.write(0, content).unwrap();
        }
        self.want.insert(name.to_owned(), json!({ "size": content.len(), "sha256": hex(&kdf::sha256(content)) }));
        f
    }

    fn link(&mut self, name: &str, target: &str) {
        self.store.symlink(&self.store.root(), name.as_bytes(), target.as_bytes(), None).unwrap();
        self.want.insert(name.to_owned(), json!({ "link": target }));
    }

    fn dir(&mut self, name: &str) {
        self.store.mkdir(&self.store.root(), name.as_bytes(), 0o755, 0, None).unwrap();
        self.want.insert(name.to_owned(), json!({ "directory": true }));
        // Version control keeps no empty directory.
        let (dir, _) = self.store.lookup(&self.store.root(), name.as_bytes()).unwrap();
        let (_, _, f) = self.store.create(&dir, b"inside", 0o644, 0, None).unwrap();
        f.write(0, b"inside").unwrap();
        self.want.insert(format!("{name}/inside"), json!({ "size": 6, "sha256": hex(&kdf::sha256(b"inside")) }));
    }

    fn xattr(&mut self, of: &str, name: &str, value: &[u8]) {
        let (n, _) = self.store.lookup(&self.store.root(), of.as_bytes()).unwrap();
        self.store.set_xattr(&n, name.as_bytes(), value, XattrMode::Any).unwrap();
        let entry = self.want.get_mut(of).unwrap().as_object_mut().unwrap();
        entry.entry("xattrs").or_insert_with(|| json!({}))[name] = json!(hex(value));
    }

    fn backing(&self, name: &str) -> PathBuf {
        let all = self.store.read_dir(&self.store.root()).unwrap();
        let found = all.into_iter().find(|e| e.name == name.as_bytes()).unwrap().backing;
        PathBuf::from(String::from_utf8(found).unwrap())
    }
}

/// Boundaries, links, attributes: what both kinds of store have.
fn fill(m: &mut Making) {
    m.file("empty", b"");
    for len in [1, 4095, 4096, 4097] {
        m.file(&format!("{len} bytes"), &content(len, len as u8));
    }
    m.dir("folder");
    m.dir(&"d".repeat(255));
    m.file(&"f".repeat(176), b"a long name");
    m.file(&"\u{fc}".repeat(127), b"a long name, not ASCII");
    m.link("link", "folder/nothing");
    m.link("long link", &"t/".repeat(2047));
    m.xattr("1 bytes", "user.short", b"value");
    m.xattr("1 bytes", "user.empty", b"");
    m.xattr("folder", &format!("user.{}", "x".repeat(240)), &content(1000, 5));
}

/// Files as nothing but a crash leaves them.
fn unfinished(m: &mut Making, top: &Path) {
    let plain = m.file("not closed", &content(9000, 6));
    plain.sync().unwrap();
    std::mem::forget(plain);
    // Killed between the state and the data: the older state copy speaks for the block.
    let before = content(5000, 7);
    let f = m.file("killed while overwriting", &before);
    f.sync().unwrap();
    let path = top.join(m.backing("killed while overwriting"));
    let old = fs::read(&path).unwrap();
    f.write(0, &content(4096, 8)).unwrap();
    std::mem::forget(f);
    let mut now = fs::read(&path).unwrap();
    let block = geometry::block_offset(0) as usize;
    now[block..block + 4096].copy_from_slice(&old[block..block + 4096]);
    fs::write(&path, &now).unwrap();
}

/// A header of which one slot is under the new KEK and the other still under the old one.
fn half_rewrapped(m: &Making, top: &Path, name: &str) {
    let path = top.join(m.backing(name));
    let mut bytes = fs::read(&path).unwrap();
    let pair = envelopefs::format::header::SlotPair::decode(&bytes).unwrap();
    let envelopefs::store::header::Opened { dek, slot, .. } = open_dek(m.store.shared(), &pair).unwrap();
    let new = m.store.shared().keys.with_active(|k| wrap_slot(k, &slot, &dek, slot.sequence + 1)).unwrap();
    assert_ne!(new.kek, slot.kek);
    bytes[1024..2048].copy_from_slice(&new.encode());
    fs::write(path, bytes).unwrap();
}

fn backing_xattrs(top: &Path, at: &Path, out: &mut Map<String, Value>) {
    for e in fs::read_dir(at).unwrap().map(Result::unwrap) {
        let mut list = [0u8; 4096];
        let n = rustix::fs::llistxattr(e.path(), &mut list).unwrap();
        let mut of = Map::new();
        for name in list[..n].split(|b| *b == 0).filter(|n| n.starts_with(b"user.envelopefs.")) {
            let mut value = vec![0u8; 4096];
            let len = rustix::fs::lgetxattr(e.path(), name, &mut value[..]).unwrap();
            of.insert(String::from_utf8(name.to_vec()).unwrap(), json!(hex(&value[..len])));
        }
        if !of.is_empty() {
            out.insert(e.path().strip_prefix(top).unwrap().to_str().unwrap().to_owned(), Value::Object(of));
        }
        if e.file_type().unwrap().is_dir() {
            backing_xattrs(top, &e.path(), out);
        }
    }
}

fn make(target: &Path, plaintext_names: bool) {
    let top = target.join("store");
    fs::create_dir_all(&top).unwrap();
    // The keyring records the key's path, which should be nobody's.
    let folder = tempfile::Builder::new().prefix("envelopefs-golden-").tempdir().unwrap();
    let key = folder.path().join("root.key");
    let o = ConnectOptions {
        passphrase: Some(PassphraseSource::Fixed(Zeroizing::new(PASSPHRASE.to_vec()))),
        argon2: Some(Argon2Cost::LEAST),
        ..Default::default()
    };
    let uris = [format!("keyfile:{}", key.display()), "passphrase:".to_owned()];
    let roots: Vec<Arc<dyn KeyProvider>> =
        uris.iter().map(|u| connect(&RootKeyUri::parse(u).unwrap(), &o, true).unwrap()).collect();
    let disk = Posix::open(&top).unwrap();
    Store::init(&disk, &roots, KekKind::Sealed, StoreFlags { plaintext_names }).unwrap();
    let keys = Keys::open(&disk, &roots).unwrap();
    let mut m = Making { store: Store::open(disk, keys, StoreOptions::default()).unwrap(), want: Map::new() };
    if plaintext_names {
        fill(&mut m);
        m.file(".hidden name with spaces", b"in clear");
    } else {
        m.file("two segments", &content(131_073, 9));
        m.file("half rewrapped", &content(100, 10));
        fill(&mut m);
        let shared = m.store.shared();
        let id = shared.keys.stage(&shared.backing, KekKind::Sealed, &[]).unwrap();
        shared.keys.activate(&shared.backing, id).unwrap();
        m.file("under the active KEK", &content(200, 11));
        half_rewrapped(&m, &top, "half rewrapped");
        unfinished(&mut m, &top);
    }
    m.store.sync_all().unwrap();
    m.store.settle(std::time::Duration::ZERO).unwrap();
    write_down(target, &top, &key, &m);
}

fn write_down(target: &Path, top: &Path, key: &Path, m: &Making) {
    let mut xattrs = Map::new();
    backing_xattrs(top, top, &mut xattrs);
    for name in ["pool", "rotation", "lock"] {
        let path = top.join(".envelopefs").join(name);
        let _ = fs::remove_dir_all(&path);
        let _ = fs::remove_file(&path);
    }
    let text = |v: &Map<String, Value>| serde_json::to_string_pretty(v).unwrap() + "\n";
    fs::write(target.join("manifest.json"), text(&m.want)).unwrap();
    fs::write(target.join("xattrs.json"), text(&xattrs)).unwrap();
    fs::write(target.join("passphrase"), PASSPHRASE).unwrap();
    fs::copy(key, target.join("root.key")).unwrap();
    fs::set_permissions(target.join("root.key"), fs::Permissions::from_mode(0o644)).unwrap();
}

/// Golden stores are never made again: the target must not be there.
#[test]
#[ignore = "makes new golden stores in $ENVELOPEFS_GOLDEN; run once for each released format"]
fn make_golden_stores() {
    let target = PathBuf::from(std::env::var_os("ENVELOPEFS_GOLDEN").expect("ENVELOPEFS_GOLDEN names a folder"));
    for (name, plaintext_names) in [("keys", false), ("plaintext", true)] {
        let target = target.join(name);
        assert!(!target.exists(), "{} is there already", target.display());
        make(&target, plaintext_names);
    }
}
