//! What somebody else may do to the backing directory.

use super::*;
use crate::backing::{Backing, Kind, XattrMode};
use crate::format::damage::Damage;

/// The backing path of the only entry of the root that is of this kind.
fn backing_name(s: &Store<SimDisk>, kind: Kind) -> Vec<u8> {
    let all = s.read_dir(&s.root()).unwrap();
    all.into_iter().find(|e| e.kind == kind).unwrap().backing
}

fn node_at(disk: &SimDisk, path: &[&[u8]]) -> crate::backing::sim::SimNode {
    path.iter().fold(disk.root().unwrap(), |at, name| disk.lookup(&at, name).unwrap())
}

#[test]
fn a_directory_without_its_id_is_damaged_and_no_other_is() {
    let (disk, s) = new_sim();
    let (bad, _) = s.mkdir(&s.root(), b"bad", 0o755, 0, None).unwrap();
    s.create(&bad, b"f", 0o600, 0, None).unwrap();
    let dir = backing_name(&s, Kind::Dir);
    let (good, _) = s.mkdir(&s.root(), b"good", 0o755, 0, None).unwrap();
    s.create(&good, b"f", 0o600, 0, None).unwrap();
    drop((bad, good));
    let path = [&dir[..], b"/.envelopefs.dir"].concat();
    let sealed = disk.read_raw(&path).unwrap();
    assert_eq!(sealed.len(), 44);
    let mut cut = sealed.clone();
    cut.pop();
    let grown = [&sealed[..], b"x"].concat();
    let mut flipped = sealed.clone();
    flipped[20] ^= 1;
    let others = disk.read_raw(".envelopefs.dir").unwrap();
    assert_ne!(others, sealed);
    for bad_id in [None, Some(cut), Some(grown), Some(flipped), Some(vec![])] {
        let copy = disk.crash_process();
        match &bad_id {
            Some(b) => copy.replace_raw(&path, b).unwrap(),
            None => copy.unlink(&node_at(&copy, &[&dir]), b".envelopefs.dir").unwrap(),
        }
        let s = open(copy);
        let (bad, _) = s.lookup(&s.root(), b"bad").unwrap();
        let want = if bad_id.is_none() { Damage::DirIdMissing } else { Damage::DirIdAuth };
        let is = |e: StoreError| matches!(e, StoreError::Damage(d) if d == want);
        assert!(is(s.lookup(&bad, b"f").unwrap_err()));
        assert!(is(s.read_dir(&bad).unwrap_err()));
        assert!(is(s.create(&bad, b"g", 0o600, 0, None).map(drop).unwrap_err()));
        let (good, _) = s.lookup(&s.root(), b"good").unwrap();
        assert_eq!(list(&s, &good), [b"f"]);
        // It can still be moved.
        s.rename(&s.root(), b"bad", &good, b"moved", crate::backing::RenameMode::Replace).unwrap();
    }
}

#[test]
fn foreign_names_are_left_out() {
    let (disk, s) = new_sim();
    s.create(&s.root(), b"f", 0o600, 0, None).unwrap();
    let root = disk.root().unwrap();
    let (d, _) = s.mkdir(&s.root(), b"d", 0o755, 0, None).unwrap();
    s.create(&d, b"inside", 0o600, 0, None).unwrap();
    let inside = s.read_dir(&d).unwrap()[0].backing.clone();
    for name in [&b"foreign"[..], &[0xff, 0xfe], b".nfs0000", &[b'A'; 200], &inside] {
        disk.create(&root, name, 0o600, 0).unwrap();
    }
    assert_eq!(list(&s, &s.root()), [b"d", b"f"]);
}

#[test]
fn a_long_name_with_a_bad_sidecar_is_found_by_name_only() {
    let (disk, s) = new_sim();
    s.create(&s.root(), &long(b'x'), 0o600, 0, None).unwrap();
    s.create(&s.root(), b"other", 0o600, 0, None).unwrap();
    let mut e = s.read_dir(&s.root()).unwrap();
    e.retain(|e| e.name.len() > 100);
    let sidecar = [&e[0].backing[..], b".name"].concat();
    let text = disk.read_raw(&sidecar).unwrap();
    let other = [&text[..10], b"AAAA", &text[14..]].concat();
    for bad in [&b""[..], &text[1..], &other, &[b'A'; 5000]] {
        disk.replace_raw(&sidecar, bad).unwrap();
        let s = open(disk.clone());
        assert_eq!(list(&s, &s.root()), [b"other"]);
        s.lookup(&s.root(), &long(b'x')).unwrap();
        // Making it again says that it is there, and mends it.
        assert!(matches!(s.create(&s.root(), &long(b'x'), 0o600, 0, None), Err(StoreError::Exists)));
        assert_eq!(list(&s, &s.root()).len(), 2);
    }
    disk.unlink(&disk.root().unwrap(), &sidecar).unwrap();
    assert_eq!(list(&s, &s.root()), [b"other"]);
    s.unlink(&s.root(), &long(b'x')).unwrap();
}

#[test]
fn leftovers_do_not_keep_a_directory() {
    let (disk, s) = new_sim();
    let (d, _) = s.mkdir(&s.root(), b"d", 0o755, 0, None).unwrap();
    let b = backing_name(&s, Kind::Dir);
    let dir = node_at(&disk, &[&b]);
    let orphan = [b".envelopefs.long.".as_slice(), &[b'A'; 43], b".name"].concat();
    disk.create(&dir, &orphan, 0o600, 0).unwrap();
    disk.mkdir(&dir, b".envelopefs.new.00", 0o700, 0).unwrap();
    assert_eq!(list(&s, &d), Vec::<Vec<u8>>::new());
    s.rmdir(&s.root(), b"d").unwrap();
    let pool = node_at(&disk, &[b".envelopefs", b"pool"]);
    let left = disk.read_dir(&pool).unwrap();
    assert!(left.iter().all(|e| e.name.starts_with(b"ready.")), "{left:?}");
}

#[test]
fn the_pool_is_cleared_but_never_of_what_users_made() {
    let (disk, s) = new_sim();
    s.mkdir(&s.root(), b"d", 0o755, 0, None).unwrap();
    let pool = node_at(&disk, &[b".envelopefs", b"pool"]);
    assert!(!disk.read_dir(&pool).unwrap().is_empty());
    // As if a rename out of the pool had been lost, but not what was made in the directory afterwards.
    let ready = disk.read_dir(&pool).unwrap()[0].name.clone();
    disk.create(&disk.lookup(&pool, &ready).unwrap(), b"somebodys", 0o600, 0).unwrap();
    drop(s);
    let s = open(disk.clone());
    let left: Vec<_> = disk.read_dir(&pool).unwrap().into_iter().map(|e| e.name).collect();
    assert_eq!(left, [ready]);
    assert_eq!(list(&s, &s.root()), [b"d"]);
}

#[test]
fn links_and_attributes_are_authenticated() {
    let (disk, s) = new_sim();
    let (n, _) = s.symlink(&s.root(), b"l", &[b'x'; 4000], None).unwrap();
    let links = disk.read_dir(&node_at(&disk, &[b".envelopefs", b"links"])).unwrap();
    let path = [b".envelopefs/links/".as_slice(), &links[0].name].concat();
    disk.flip_bit(&path, 100, 3).unwrap();
    assert!(matches!(s.readlink(&n), Err(StoreError::Damage(Damage::SymlinkAuth))));
    disk.replace_raw(&path, b"").unwrap();
    assert!(matches!(s.readlink(&n), Err(StoreError::Damage(Damage::SymlinkAuth))));
    assert_eq!(s.getattr(&n).unwrap().size, 4000);
    s.unlink(&s.root(), b"l").unwrap();
    disk.symlink(&disk.root().unwrap(), &[b'x'; 20], b"/etc/passwd").unwrap();

    let (f, _, _) = s.create(&s.root(), b"f", 0o600, 0, None).unwrap();
    s.set_xattr(&f, b"user.a", b"1", XattrMode::Any).unwrap();
    let fd = f.fd(&disk).unwrap();
    let name = disk.list_xattr(&fd).unwrap().remove(0);
    let mut value = disk.get_xattr(&fd, &name).unwrap();
    value[13] ^= 1;
    disk.set_xattr(&fd, &name, &value, XattrMode::Any).unwrap();
    disk.set_xattr(&fd, b"user.foreign", b"", XattrMode::Any).unwrap();
    assert!(matches!(s.get_xattr(&f, b"user.a"), Err(StoreError::Damage(Damage::XattrAuth))));
    assert_eq!(s.list_xattr(&f).unwrap(), [b"user.a"]);
}
