//! Lets a thread of background work stand back behind everybody else.

/// `nice` of such a thread: it still gets on when the processors are busy, so that a lock it holds is not held for long.
const NICE: i32 = 10;
/// ioprio_set(2): who, and the idle class, which gets the disk when nobody else wants it (where the I/O scheduler knows
/// classes at all).
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
const IOPRIO_CLASS_IDLE: libc::c_int = 3;
const IOPRIO_CLASS_SHIFT: libc::c_int = 13;

/// For the calling thread, until it ends. Best effort: where it is refused, work goes on at the usual priority.
pub(super) fn give_way() {
    // SAFETY: ioprio_set(2) takes three integers and changes nothing but the I/O priority of the calling thread (who 0).
    let io =
        unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_CLASS_IDLE << IOPRIO_CLASS_SHIFT) };
    let cpu = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE);
    if io != 0 || cpu.is_err() {
        tracing::debug!("background thread keeps its priority");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_changes_the_calling_thread_and_no_other() {
        let nice = || rustix::process::getpriority_process(Some(rustix::thread::gettid())).unwrap();
        let before = nice();
        let there = std::thread::spawn(move || {
            give_way();
            // SAFETY: ioprio_get(2) takes two integers and only returns one.
            (nice(), unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0) })
        });
        assert_eq!(there.join().unwrap(), (NICE.max(before), i64::from(IOPRIO_CLASS_IDLE << IOPRIO_CLASS_SHIFT)));
        assert_eq!(nice(), before);
    }
}
