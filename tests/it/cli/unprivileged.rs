//! Everything as an ordinary user, through fusermount3.

use super::support::Bench;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::Command;

/// Runs as user and group 65534, in a mount name space of its own where everybody may open `/dev/fuse`.
const OUTER: &str = r#"
mknod fuse c 10 229 && chmod 666 fuse && mount --bind fuse /dev/fuse || exit 99
setpriv --reuid=65534 --regid=65534 --clear-groups sh inner.sh
code=$?
umount -l home/mnt 2>/dev/null
exit $code
"#;
const INNER: &str = r#"
set -e
cd home
mkdir back mnt
../envelopefs init back --key keyfile:$PWD/key
../envelopefs mount back mnt
echo hello > mnt/f
test "$(stat -c %a run)" = 700
../envelopefs status mnt | grep -q '^mounted '
../envelopefs rotate mnt
exec 5> mnt/g
code=0; ../envelopefs unmount mnt 2> busy || code=$?
test $code = 12
exec 5>&-
../envelopefs unmount mnt
../envelopefs mount back mnt
pid=$(cut -d' ' -f2 back/.envelopefs/lock)
kill -9 $pid
flock -w 60 back/.envelopefs/lock true
code=0; ../envelopefs status mnt 2> dead || code=$?
test $code = 15
../envelopefs mount back mnt
test "$(cat mnt/f)" = hello
test "$(stat -c %u /proc/$(cut -d' ' -f2 back/.envelopefs/lock)/mem)" = 0
../envelopefs unmount mnt
"#;

#[test]
fn an_ordinary_user_can_do_all_of_it() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let b = Bench::new();
    b.chmod("", 0o755);
    fs::create_dir(b.path("home")).unwrap();
    chown(b.path("home"), Some(65534), Some(65534)).unwrap();
    // The user may have no way to where it was built.
    fs::copy(env!("CARGO_BIN_EXE_envelopefs"), b.path("envelopefs")).unwrap();
    fs::set_permissions(b.path("envelopefs"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(b.path("inner.sh"), INNER).unwrap();
    fs::write(b.path("outer.sh"), OUTER).unwrap();
    let mut c = Command::new("unshare");
    b.prepare(&mut c);
    c.env("ENVELOPEFS_RUNTIME_DIR", b.path("home/run"));
    let o = c.args(["-m", "--propagation", "private", "sh", "outer.sh"]).output().unwrap();
    if o.status.code() == Some(99) || !std::path::Path::new("/usr/bin/fusermount3").exists() {
        eprintln!("skipped: no device, or no fusermount3");
        return;
    }
    assert!(o.status.success(), "{}\n{}", b.masked(&o.stdout), b.masked(&o.stderr));
}
