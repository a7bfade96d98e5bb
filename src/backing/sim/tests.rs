//! Each promise of the simulated disk.

use super::*;

#[test]
fn a_stopped_disk_leaves_what_was_written() {
    let disk = SimDisk::default();
    let root = disk.root().unwrap();
    let (_, file) = disk.create(&root, b"f", 0o600, 0).unwrap();
    disk.write_at(&file, b"one", 0).unwrap();
    assert_eq!(disk.operations(), 2);
    disk.stop_after(3);
    disk.write_at(&file, b"two", 3).unwrap();
    assert!(is_stopped(&disk.write_at(&file, b"three", 6).unwrap_err()));
    assert!(is_stopped(&disk.stat(&root).unwrap_err()));
    let after = disk.crash_process();
    assert_eq!(after.read_raw("f").unwrap(), b"onetwo");
    assert_eq!((after.operations(), after.is_stopped()), (0, false));
    // The handles died with the process.
    assert_eq!(after.stat(&root).unwrap_err().raw_os_error(), Some(libc::EBADF));
}
