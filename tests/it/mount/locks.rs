//! flock(2) and fcntl(2) locks, between processes.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::support::{Mount, open_rw};

/// A Python process that locks on demand, and says how it went.
struct Locker {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Locker {
    fn start(m: &Mount) -> Self {
        let script = "import sys,fcntl\nf=open('f','r+b')\nprint('ready',flush=True)\nfor l in sys.stdin:\n \
                      kind,how,start,length=l.split()\n op={'ex':fcntl.LOCK_EX,'sh':fcntl.LOCK_SH,'un':fcntl.LOCK_UN}[how]\n \
                      op|=0 if how=='un' else fcntl.LOCK_NB\n try:\n  \
                      fcntl.flock(f,op) if kind=='flock' else fcntl.lockf(f,op,int(length),int(start))\n  \
                      print('ok',flush=True)\n except OSError: print('held',flush=True)\n";
        let mut child = Command::new("python3")
            .args(["-c", script])
            .current_dir(m.path(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3");
        let stdin = child.stdin.take().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut ready = String::new();
        stdout.read_line(&mut ready).unwrap();
        assert_eq!(ready, "ready\n");
        Self { child, stdin, stdout }
    }

    fn ask(&mut self, what: &str) -> String {
        writeln!(self.stdin, "{what}").unwrap();
        let mut said = String::new();
        self.stdout.read_line(&mut said).unwrap();
        said.trim().to_owned()
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn flock_keeps_other_processes_out() {
    let m = Mount::new();
    File::create(m.path("f")).unwrap();
    let (mut a, mut b) = (Locker::start(&m), Locker::start(&m));
    assert_eq!(a.ask("flock ex 0 0"), "ok");
    assert_eq!(b.ask("flock ex 0 0"), "held");
    assert_eq!(b.ask("flock sh 0 0"), "held");
    let own = open_rw(m.path("f"));
    assert!(own.try_lock().is_err());
    assert_eq!(a.ask("flock sh 0 0"), "ok");
    assert_eq!(b.ask("flock sh 0 0"), "ok");
    assert_eq!(b.ask("flock ex 0 0"), "held");
    drop(a);
    assert_eq!(b.ask("flock ex 0 0"), "ok", "a lock goes with its process");
}

#[test]
fn byte_range_locks_keep_other_processes_out_of_their_range_only() {
    let m = Mount::new();
    File::create(m.path("f")).unwrap();
    let (mut a, mut b) = (Locker::start(&m), Locker::start(&m));
    assert_eq!(a.ask("posix ex 100 50"), "ok");
    assert_eq!(b.ask("posix ex 0 100"), "ok");
    assert_eq!(b.ask("posix sh 149 1"), "held");
    assert_eq!(b.ask("posix ex 150 10"), "ok");
    assert_eq!(a.ask("posix un 100 25"), "ok");
    assert_eq!(b.ask("posix ex 100 25"), "ok");
    assert_eq!(b.ask("posix ex 100 26"), "held");
    drop(a);
    assert_eq!(b.ask("posix ex 100 26"), "ok");
}
