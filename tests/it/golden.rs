//! Stores written by past versions open for ever: `tests/golden/v*/` is never written again (`tests/golden/README.md`).

mod make;

use envelopefs::backing::posix::Posix;
use envelopefs::backing::{Access, Kind};
use envelopefs::crypto::kdf;
use envelopefs::kms::{ConnectOptions, PassphraseSource, RootKeyUri, connect};
use envelopefs::store::keys::Keys;
use envelopefs::store::node::Node;
use envelopefs::store::open::{Store, StoreOptions};
use serde_json::{Map, Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use zeroize::Zeroizing;

fn golden() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut versions: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    versions.retain(|p| p.is_dir());
    versions.sort();
    assert!(!versions.is_empty());
    versions
}

/// A copy that may be written to, with the modes that version control does not keep.
fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for e in fs::read_dir(from).unwrap() {
        let e = e.unwrap();
        let target = to.join(e.file_name());
        let kind = e.file_type().unwrap();
        if kind.is_dir() {
            copy(&e.path(), &target);
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(e.path()).unwrap(), target).unwrap();
        } else {
            fs::copy(e.path(), &target).unwrap();
            fs::set_permissions(&target, fs::Permissions::from_mode(0o600)).unwrap();
        }
    }
}

fn hex(b: &[u8]) -> String {
    b.iter().map(|x| format!("{x:02x}")).collect()
}

fn unhex(s: &str) -> Vec<u8> {
    (0..s.len() / 2).map(|i| u8::from_str_radix(&s[2 * i..2 * i + 2], 16).unwrap()).collect()
}

/// Puts the extended attributes back, which version control does not keep either.
fn set_xattrs(version: &Path, store: &Path) {
    let Ok(text) = fs::read_to_string(version.join("xattrs.json")) else { return };
    let all: Map<String, Value> = serde_json::from_str(&text).unwrap();
    for (path, xattrs) in &all {
        for (name, value) in xattrs.as_object().unwrap() {
            let value = unhex(value.as_str().unwrap());
            rustix::fs::lsetxattr(store.join(path), name.as_str(), &value, rustix::fs::XattrFlags::empty()).unwrap();
        }
    }
}

fn with_xattrs(s: &Store<Posix>, node: &Arc<Node<Posix>>, mut entry: Value) -> Value {
    let names = s.list_xattr(node).unwrap();
    let value = |n: &Vec<u8>| json!(hex(&s.get_xattr(node, n).unwrap()));
    let all: Map<String, Value> = names.iter().map(|n| (String::from_utf8(n.clone()).unwrap(), value(n))).collect();
    if !all.is_empty() {
        entry["xattrs"] = Value::Object(all);
    }
    entry
}

/// What the manifest says, read from the store.
fn describe(s: &Store<Posix>, dir: &Arc<Node<Posix>>, prefix: &str, out: &mut Map<String, Value>) {
    for e in s.read_dir(dir).unwrap() {
        let path = format!("{prefix}{}", String::from_utf8(e.name.clone()).unwrap());
        let (node, attr) = s.lookup(dir, &e.name).unwrap();
        let entry = match attr.kind {
            Kind::Dir => {
                describe(s, &node, &format!("{path}/"), out);
                json!({ "directory": true })
            }
            Kind::Symlink => json!({ "link": String::from_utf8(s.readlink(&node).unwrap()).unwrap() }),
            _ => {
                let mut content = vec![0u8; attr.size as usize];
                let n = s.open_file(&node, Access::Read).unwrap().read(0, &mut content).unwrap();
                assert_eq!(n as u64, attr.size);
                json!({ "size": n, "sha256": hex(&kdf::sha256(&content)) })
            }
        };
        out.insert(path, with_xattrs(s, &node, entry));
    }
}

/// Everything below `folder`, with contents and times of change.
fn snapshot(folder: &Path, out: &mut Vec<(PathBuf, Vec<u8>, std::time::SystemTime)>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        let m = fs::symlink_metadata(&path).unwrap();
        let content = if m.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
        out.push((path.clone(), content, m.modified().unwrap()));
        if m.is_dir() {
            snapshot(&path, out);
        }
    }
}

fn open(backing: &Path, key: &str, o: &ConnectOptions, read_only: bool) -> Arc<Store<Posix>> {
    let root = connect(&RootKeyUri::parse(key).unwrap(), o, false).unwrap();
    let disk = Posix::open(backing).unwrap();
    let keys = Keys::open(&disk, &[root]).unwrap();
    Store::open(disk, keys, StoreOptions { read_only, ..StoreOptions::default() }).unwrap()
}

#[test]
fn every_golden_store_opens_and_holds_what_it_held() {
    for version in golden() {
        let folder = tempfile::tempdir().unwrap();
        let (backing, key) = (folder.path().join("store"), folder.path().join("root.key"));
        copy(&version.join("store"), &backing);
        set_xattrs(&version, &backing);
        fs::copy(version.join("root.key"), &key).unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        let manifest = fs::read_to_string(version.join("manifest.json")).unwrap();
        let manifest: Value = serde_json::from_str(&manifest).unwrap();
        let agrees = |s: &Arc<Store<Posix>>| {
            let mut found = Map::new();
            describe(s, &s.root(), "", &mut found);
            assert_eq!(Value::Object(found), manifest, "{}", version.display());
        };
        let by_file = format!("keyfile:{}", key.display());
        let (mut before, mut after) = (Vec::new(), Vec::new());
        snapshot(&backing, &mut before);
        agrees(&open(&backing, &by_file, &ConnectOptions::default(), true));
        if let Ok(passphrase) = fs::read(version.join("passphrase")) {
            let passphrase = Some(PassphraseSource::Fixed(Zeroizing::new(passphrase)));
            let o = ConnectOptions { passphrase, ..ConnectOptions::default() };
            agrees(&open(&backing, "passphrase:", &o, true));
        }
        snapshot(&backing, &mut after);
        assert!(before == after, "reading changed {}", version.display());
        let store = open(&backing, &by_file, &ConnectOptions::default(), false);
        agrees(&store);
        store.close().unwrap();
    }
}
