//! From mount to unmount, and what comes between.

use super::support::{Bench, can_mount, wait_for};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::Command;

#[test]
fn what_is_written_is_there_after_a_remount_and_not_in_clear_below() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    fs::create_dir(b.path("mnt/letters")).unwrap();
    fs::write(b.path("mnt/letters/to-bob"), "meet me at nine").unwrap();
    b.ok("unmount mnt");
    assert_eq!(fs::read_dir(b.path("mnt")).unwrap().count(), 0);
    b.ok("mount back mnt");
    assert_eq!(fs::read_to_string(b.path("mnt/letters/to-bob")).unwrap(), "meet me at nine");
    let found =
        Command::new("grep").args(["-r", "-l", "-e", "nine", "-e", "letters"]).arg(b.path("back")).output().unwrap();
    assert_eq!(found.status.code(), Some(1), "{}", String::from_utf8_lossy(&found.stdout));
    let names = Command::new("find").arg(b.path("back")).args(["-name", "*bob*"]).output().unwrap();
    assert!(names.stdout.is_empty());
}

#[test]
fn the_daemon_keeps_its_keys_to_itself_and_lets_the_terminal_go() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    let proc_file = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", b.daemon())).unwrap();
    let limits = proc_file("limits");
    let limit = |name: &str| -> Vec<String> {
        let line = limits.lines().find(|l| l.starts_with(name)).unwrap();
        line[name.len()..].split_whitespace().map(str::to_string).collect()
    };
    assert_eq!(limit("Max core file size")[..2], ["0", "0"]);
    assert_eq!(limit("Max open files")[0], limit("Max open files")[1]);
    let stat = proc_file("stat");
    let after: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    assert_eq!(after[3], b.daemon().to_string(), "a session of its own");
    assert_eq!(after[4], "0", "no terminal");
    for fd in 0..3 {
        let to = fs::read_link(format!("/proc/{}/fd/{fd}", b.daemon())).unwrap();
        assert_eq!(to.to_str(), Some("/dev/null"));
    }
    assert_eq!(fs::read_link(format!("/proc/{}/cwd", b.daemon())).unwrap().to_str(), Some("/"));
    // PR_SET_DUMPABLE=0 gives a process's files under /proc to root, whoever runs it.
    if !rustix::process::geteuid().is_root() {
        assert!(File::open(format!("/proc/{}/mem", b.daemon())).is_err());
    }
    let log = fs::read_to_string(b.path("log")).unwrap();
    assert_eq!(log.matches("INFO mounted ").count(), 1, "{log}");
}

#[test]
fn after_kill_9_the_dead_mount_is_explained_and_the_next_mount_takes_it_away() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    let mut f = File::create(b.path("mnt/f")).unwrap();
    f.write_all(b"acknowledged").unwrap();
    f.sync_all().unwrap();
    b.kill();
    drop(f);
    let stale = b.socket();
    assert!(stale.exists() && b.is_mounted());
    assert_eq!(fs::read_dir(b.path("mnt")).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    b.fails(
        "status mnt",
        15,
        "the daemon of the mount at DIR/mnt has died; take it away with: envelopefs unmount DIR/mnt, then mount again",
    );
    b.ok("mount back mnt");
    assert_eq!(fs::read_to_string(b.path("mnt/f")).unwrap(), "acknowledged");
    b.ok("status mnt");
    b.ok("unmount mnt");
    assert!(!b.is_mounted(), "the dead mount is gone too");
    assert!(!stale.exists());
}

#[test]
fn unmount_takes_a_dead_mount_away() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    b.kill();
    b.says("unmount mnt", 0, "", "");
    assert!(!b.is_mounted());
}

#[test]
fn a_dead_mount_of_another_store_is_left_alone() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    b.ok("init other --key keyfile:DIR/key");
    b.fails(
        "mount other mnt",
        11,
        "DIR/back is mounted at DIR/mnt already; use another mount point, or unmount that one first",
    );
    b.kill();
    b.fails(
        "mount other mnt",
        15,
        "a mount of DIR/back whose daemon has died is in the way at DIR/mnt; take it away with: envelopefs unmount \
         DIR/mnt, then mount again",
    );
    assert!(b.is_mounted());
}

/// The messages systemd would have got until one that begins with `last`.
fn notified(socket: &UnixDatagram, last: &str) -> Vec<String> {
    socket.set_read_timeout(Some(super::support::PATIENCE)).unwrap();
    let (mut all, mut buf) = (Vec::new(), [0u8; 256]);
    loop {
        let n = socket.recv(&mut buf).unwrap();
        all.push(String::from_utf8(buf[..n].to_vec()).unwrap());
        if all.last().unwrap().starts_with(last) {
            return all;
        }
    }
}

#[test]
fn in_the_foreground_systemd_is_told_and_sigterm_unmounts() {
    if !can_mount() {
        return;
    }
    let b = Bench::with_store();
    let socket = UnixDatagram::bind(b.path("notify")).unwrap();
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT, rustix::process::Signal::HUP] {
        let mut daemon = b
            .command("mount back mnt --foreground --log-file DIR/log")
            .env("NOTIFY_SOCKET", b.path("notify"))
            .spawn()
            .unwrap();
        assert_eq!(notified(&socket, "READY").len(), 1);
        assert!(b.is_mounted());
        fs::write(b.path("mnt/f"), "x").unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_child(&daemon), signal).unwrap();
        notified(&socket, "STOPPING");
        assert_eq!(daemon.wait().unwrap().code(), Some(0));
        assert!(!b.is_mounted() && b.is_unlocked());
        socket.set_nonblocking(true).unwrap();
        while socket.recv(&mut [0; 64]).is_ok() {}
        socket.set_nonblocking(false).unwrap();
    }
}

#[test]
fn a_mount_in_use_goes_out_of_sight_at_sigterm_and_ends_with_its_last_user() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    let mut f = File::create(b.path("mnt/f")).unwrap();
    f.write_all(b"before ").unwrap();
    let pid = rustix::process::Pid::from_raw(b.daemon()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    wait_for("the mount to go", || !b.is_mounted());
    f.write_all(b"and after").unwrap();
    f.sync_all().unwrap();
    assert!(!b.is_unlocked(), "it serves while the file is open");
    drop(f);
    wait_for("the daemon's end", || b.is_unlocked());
    b.ok("mount back mnt");
    assert_eq!(fs::read_to_string(b.path("mnt/f")).unwrap(), "before and after");
}

#[test]
fn a_daemon_that_fails_tells_who_started_it() {
    let b = Bench::with_store();
    fs::create_dir(b.path("run")).unwrap();
    b.chmod("run", 0o755);
    let o = b.run("mount back mnt");
    assert_eq!(o.status.code(), Some(6));
    assert_eq!(
        b.masked(&o.stderr),
        "envelopefs: runtime directory DIR/run is open to other users; its mode must be 0700; check permissions and \
         credentials, then try again\n"
    );
    assert!(!b.is_mounted() && b.is_unlocked());
}

#[test]
fn the_mount_helper_does_what_mount_8_asks() {
    if !can_mount() {
        return;
    }
    let b = Bench::with_store();
    b.says("mount-helper DIR/back DIR/mnt -f -o rw", 0, "", "");
    assert!(!b.is_mounted());
    b.says(
        "mount-helper DIR/back DIR/mnt -n -o rw,allow_other,suid,dev,noatime,nofail,x-systemd.idle,user=joe",
        0,
        "",
        "",
    );
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let at = b.path("mnt");
    let line = text.lines().find(|l| l.contains(at.to_str().unwrap())).unwrap();
    assert!(line.contains("noatime") && line.contains("allow_other") && line.contains(" fuse.envelopefs "), "{line}");
    assert!(!line.contains("nosuid") && !line.contains("nodev"), "{line}");
    fs::write(b.path("mnt/f"), "x").unwrap();
    if rustix::process::geteuid().is_root() {
        b.says("mount-helper DIR/back DIR/mnt -o remount,ro", 0, "", "");
        assert_eq!(fs::write(b.path("mnt/f"), "y").unwrap_err().raw_os_error(), Some(libc::EROFS));
        b.says("mount-helper DIR/back DIR/mnt -o remount,rw", 0, "", "");
        fs::write(b.path("mnt/f"), "z").unwrap();
    }
    fs::create_dir(b.path("other")).unwrap();
    let o = b.run("mount-helper DIR/back DIR/other -o rw");
    let said = b.masked(&o.stderr);
    assert!(said.ends_with("see who with: envelopefs status DIR/back; unmount it there first\n"), "{said}");
    b.ok("unmount mnt");
    b.fails(
        "mount-helper DIR/back DIR/mnt -o remount,ro",
        10,
        "no envelopefs is mounted at DIR/mnt; mount it first with: envelopefs mount BACKING MOUNTPOINT",
    );
    // A symbolic link of this name is enough.
    let mut c = b.command("DIR/back DIR/mnt -o ro");
    c.arg0("/sbin/mount.fuse.envelopefs");
    assert!(c.status().unwrap().success());
    assert_eq!(fs::read_to_string(b.path("mnt/f")).unwrap(), "z");
    if rustix::process::geteuid().is_root() {
        b.fails(
            "mount-helper DIR/back DIR/mnt -o remount,rw",
            2,
            "the store at DIR/mnt was mounted read-only; unmount it and mount it again; see --help",
        );
    }
    b.ok("unmount mnt");
}

#[test]
fn the_script_for_sbin_finds_the_program() {
    if !can_mount() {
        return;
    }
    let b = Bench::with_store();
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_envelopefs"));
    let mut c = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/mount.fuse.envelopefs"));
    b.prepare(&mut c);
    c.env("PATH", format!("{}:/usr/bin:/bin", program.parent().unwrap().display()));
    assert!(c.arg(b.path("back")).arg(b.path("mnt")).args(["-o", "rw"]).status().unwrap().success());
    assert!(b.is_mounted());
    b.ok("unmount mnt");
}
