//! Stores written by past versions open for ever: `tests/golden/v*/` is never written again (`tests/golden/make.py`).

use envelopefs::backing::posix::Posix;
use envelopefs::backing::{Access, Kind};
use envelopefs::crypto::kdf;
use envelopefs::kms::{ConnectOptions, RootKeyUri, connect};
use envelopefs::store::keys::Keys;
use envelopefs::store::node::Node;
use envelopefs::store::open::{Store, StoreOptions};
use serde_json::{Map, Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
        out.insert(path, entry);
    }
}

#[test]
fn every_golden_store_opens_and_holds_what_it_held() {
    for version in golden() {
        let folder = tempfile::tempdir().unwrap();
        let (backing, key) = (folder.path().join("store"), folder.path().join("root.key"));
        copy(&version.join("store"), &backing);
        fs::copy(version.join("root.key"), &key).unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        let uri = RootKeyUri::parse(&format!("keyfile:{}", key.display())).unwrap();
        let root = connect(&uri, &ConnectOptions::default(), false).unwrap();
        let disk = Posix::open(&backing).unwrap();
        let keys = Keys::open(&disk, &[root]).unwrap();
        let store = Store::open(disk, keys, StoreOptions::default()).unwrap();
        let mut found = Map::new();
        describe(&store, &store.root(), "", &mut found);
        let manifest = fs::read_to_string(version.join("manifest.json")).unwrap();
        assert_eq!(Value::Object(found), serde_json::from_str::<Value>(&manifest).unwrap(), "{}", version.display());
        store.close().unwrap();
    }
}
