//! The control socket, and rotating a mounted store through it.

use super::support::{Bench, can_mount, wait_for};
use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// What the daemon answers to these bytes.
fn said(socket: &Path, bytes: &[u8]) -> String {
    let mut s = UnixStream::connect(socket).unwrap();
    // A daemon that refuses may have closed before it has read.
    let _ = s.write_all(bytes);
    let _ = s.shutdown(Shutdown::Write);
    let mut answer = String::new();
    let _ = s.read_to_string(&mut answer);
    answer
}

/// A mounted store with `n` files, named by numbers.
fn with_files(n: usize) -> Bench {
    let b = Bench::mounted();
    for i in 0..n {
        fs::write(b.path("mnt").join(i.to_string()), i.to_string()).unwrap();
    }
    b
}

/// How the rotation of the store mounted at `mnt/` stands.
pub fn rotation(b: &Bench) -> Value {
    b.json("status mnt --json")["daemon"]["rotation"].clone()
}

#[test]
fn the_socket_is_private() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    assert_eq!((mode(&b.path("run")), mode(&b.socket())), (0o700, 0o600));
}

#[test]
fn another_user_is_refused_even_if_the_modes_let_them_in() {
    if !can_mount() || !rustix::process::geteuid().is_root() {
        return;
    }
    let b = Bench::mounted();
    let socket = b.socket();
    b.chmod("", 0o755);
    b.chmod("run", 0o755);
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    let answer = std::thread::spawn(move || {
        let nobody = 65534;
        // SAFETY: changes the user id of this thread only, which ends here.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, nobody, nobody, nobody) }, 0);
        said(&socket, b"{\"request\":\"rotate-cancel\"}\n")
    });
    let answer = answer.join().unwrap();
    let v: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((&v["reply"], &v["body"]["kind"]), (&"failed".into(), &"denied".into()), "{answer}");
    assert!(said(&b.socket(), b"{\"request\":\"status\"}\n").contains("\"reply\":\"status\""), "its owner is not");
}

#[test]
fn nonsense_on_the_socket_is_answered_and_survived() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    let long = vec![b'x'; 17 << 20];
    for bytes in
        [&b"nonsense\n"[..], b"{\"request\":\"status\"", b"{\"request\":\"format\"}\n", b"\0\xff\n", b"\n", &long]
    {
        let answer = said(&b.socket(), bytes);
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]);
        // The kernel may drop the answer to a client that was still sending.
        assert!(
            answer.is_empty() && bytes.len() > 1 << 20 || answer.contains("\"kind\":\"usage\""),
            "{shown}: {answer}"
        );
    }
    assert_eq!(said(&b.socket(), b""), "");
    // Clients that say nothing keep nobody out.
    let idle: Vec<UnixStream> = (0..8).map(|_| UnixStream::connect(b.socket()).unwrap()).collect();
    b.ok("status mnt");
    drop(idle);
}

#[test]
fn rotate_on_the_mount_moves_every_file_and_says_so() {
    if !can_mount() {
        return;
    }
    let b = with_files(3);
    let report = "complete: 3 files moved to KEK ID\nverified: 3 headers under it in both slots, 0 empty files\n\
                  retired KEK ID\n";
    let advice = |at| {
        format!(
            "envelopefs: the keyring has changed: keep a copy outside of the store (envelopefs key export {at} FILE)\n"
        )
    };
    b.says("rotate mnt", 0, report, &advice("mnt"));
    b.says("rotate back", 0, report, &advice("back"));
    assert!(b.ok("status mnt").contains("rotation  last one complete: 3 files moved to KEK ID\n"));
    b.fails("rotate mnt --pause", 2, "no rotation of this store is under way; see --help");
    assert_eq!(fs::read_to_string(b.path("mnt/2")).unwrap(), "2");
}

#[test]
fn a_detached_rotation_is_paused_resumed_cancelled_and_finished_later() {
    if !can_mount() {
        return;
    }
    let b = with_files(40);
    b.says("rotate mnt --detach --rate 1 --jobs 1", 0, "rotation started; follow it with: envelopefs status\n", "");
    b.fails(
        "rotate mnt",
        12,
        "a rotation of this store is under way already; see how it stands with: envelopefs status mnt",
    );
    b.ok("rotate mnt --pause");
    wait_for("the pause", || rotation(&b)["status"]["paused"] == true);
    assert_eq!(rotation(&b)["running"], true);
    b.ok("rotate mnt --resume");
    b.ok("rotate mnt --cancel");
    wait_for("the end", || rotation(&b)["running"] == false);
    assert_eq!(rotation(&b)["report"]["outcome"], "cancelled");
    assert!(b.ok("status mnt").contains("rotation  unfinished; the next rotate goes on with it\n"));
    let v = b.json("rotate mnt --json");
    assert_eq!((&v["outcome"], &v["resumed"]), (&"complete".into(), &true.into()));
    assert_eq!(b.json("status mnt --json")["rotation_unfinished"], false);
    for i in 0..40 {
        assert_eq!(fs::read_to_string(b.path("mnt").join(i.to_string())).unwrap(), i.to_string());
    }
}

#[test]
fn a_rotation_ends_with_the_client_that_waits_for_it() {
    if !can_mount() {
        return;
    }
    let b = with_files(40);
    let mut client = b.spawn("rotate mnt --rate 1 --jobs 1");
    wait_for("the start", || rotation(&b)["running"] == true);
    client.kill().unwrap();
    client.wait().unwrap();
    wait_for("the end", || rotation(&b)["running"] == false);
    assert_eq!(rotation(&b)["report"]["outcome"], "cancelled");
}

#[test]
fn a_cancelled_rotation_exits_with_its_own_code() {
    if !can_mount() {
        return;
    }
    let b = with_files(40);
    let client = b.spawn("rotate mnt --rate 1 --jobs 1");
    wait_for("the start", || rotation(&b)["running"] == true);
    b.ok("rotate mnt --cancel");
    let o = client.wait_with_output().unwrap();
    assert_eq!(o.status.code(), Some(9));
    assert!(
        b.masked(&o.stderr).ends_with(
            "envelopefs: rotation to KEK ID was cancelled; what is done stays done; finish it with: envelopefs rotate mnt\n"
        ),
        "{}",
        b.masked(&o.stderr)
    );
}

#[test]
fn unmounting_stops_a_rotation_and_a_later_one_finishes_it() {
    if !can_mount() {
        return;
    }
    let b = with_files(40);
    b.ok("rotate mnt --detach --rate 1 --jobs 1");
    b.ok("unmount mnt");
    assert!(b.is_unlocked());
    let v = b.json("rotate back --json");
    assert_eq!(v["outcome"], "complete");
}

#[test]
fn root_keys_of_a_mounted_store_go_through_the_daemon() {
    if !can_mount() {
        return;
    }
    let b = Bench::mounted();
    b.says(
        "key add mnt keyfile:DIR/second",
        0,
        "made key file DIR/second: keep a copy in a safe place\nadded root key keyfile:DIR/second\n",
        "",
    );
    b.says("key remove back keyfile:DIR/key", 0, "removed root key keyfile:DIR/key\n", "");
    b.ok("rotate mnt");
    b.ok("unmount mnt");
    fs::remove_file(b.path("key")).unwrap();
    b.ok("mount back mnt");
    b.ok("unmount mnt");
}

#[test]
fn a_passphrase_that_the_daemon_was_not_opened_with_comes_with_the_request() {
    if !can_mount() {
        return;
    }
    let b = Bench::with_store();
    fs::write(b.path("right"), "correct horse\n").unwrap();
    fs::write(b.path("wrong"), "incorrect horse\n").unwrap();
    b.says("key add back passphrase: --new-passphrase-file DIR/right", 0, "added root key passphrase:\n", "");
    b.ok("mount back mnt");
    let o = b.run("rotate mnt");
    assert!(!o.status.success(), "the new KEK must be wrapped by the passphrase too");
    assert!(b.masked(&o.stderr).contains("root key passphrase: must wrap the new KEK too and is not at hand"));
    let o = b.run("rotate mnt --passphrase-file DIR/wrong");
    assert_eq!(o.status.code(), Some(4), "{}", b.masked(&o.stderr));
    assert_eq!(b.json("key list back --json")["root_keys"].as_array().unwrap().len(), 2, "a wrong one is not added");
    b.ok("rotate mnt --passphrase-file DIR/right");
    b.ok("unmount mnt");
    fs::remove_file(b.path("key")).unwrap();
    b.ok("mount back mnt --key passphrase: --passphrase-file DIR/right");
    b.ok("unmount mnt");
}
