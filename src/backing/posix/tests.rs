//! Every method, on a temporary directory.

use super::*;

#[test]
fn what_is_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let b = Posix::open(dir.path()).unwrap();
    let root = b.root().unwrap();
    let (node, file) = b.create(&root, b"f", 0o640, 0o022).unwrap();
    b.write_at(&file, b"hello", 3).unwrap();
    let (mut one, mut two, mut three) = ([0; 4], [0; 0], [1; 9]);
    let mut bufs = [IoSliceMut::new(&mut two), IoSliceMut::new(&mut one), IoSliceMut::new(&mut three)];
    assert_eq!(b.read_at(&file, &mut bufs, 0).unwrap(), 8);
    assert_eq!((&one, &three), (b"\0\0\0h", b"ello\x01\x01\x01\x01\x01"));
    assert_eq!(b.stat(&node).unwrap(), b.stat_file(&file).unwrap());
    assert_eq!(b.stat_at(&root, b"f").unwrap().mode, 0o640);
}
