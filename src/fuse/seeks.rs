//! Looking for holes in a file that somebody is writing.
//!
//! With the writeback cache the kernel has written data that has not reached us, and (as of Linux 6.18) asks for holes
//! without sending it first: the answer from the store alone would call new data a hole, and `cp` would lose it. So the
//! kernel is told to let go of the file's pages, which makes it send the dirty ones, and only then the store is asked.
//! That waits for write requests, which the threads that serve requests must be free to take: it has a thread of its
//! own.
//!
//! Nothing of this happens for a file that nobody has open for writing: closing has sent everything.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};

use fuser::{Errno, INodeNo, Notifier, ReplyLseek};

/// Says something to the kernel; known once the session stands.
pub(super) type LateNotifier = Arc<OnceLock<Notifier>>;

/// A question that has to wait for the kernel's dirty pages.
struct Question {
    node: INodeNo,
    from: u64,
    answer: Box<dyn FnOnce() -> Result<i64, Errno> + Send>,
    reply: ReplyLseek,
}

/// The thread that waits. It ends when this is dropped.
pub(super) struct Seeks {
    questions: Sender<Question>,
}

impl Seeks {
    /// # Errors
    /// If the thread cannot be started.
    pub(super) fn start(notifier: LateNotifier) -> io::Result<Self> {
        let (questions, inbox) = channel();
        std::thread::Builder::new().name("fuse-seek".to_owned()).spawn(move || serve(&inbox, &notifier))?;
        Ok(Self { questions })
    }

    /// Has `answer` found and sent once the kernel has written back what it holds of `node` after `from`.
    pub(super) fn ask(
        &self,
        node: INodeNo,
        from: u64,
        reply: ReplyLseek,
        answer: impl FnOnce() -> Result<i64, Errno> + Send + 'static,
    ) {
        // A question that cannot be handed over is dropped, and its reply with it answers EIO.
        let _ = self.questions.send(Question { node, from, answer: Box::new(answer), reply });
    }
}

fn serve(inbox: &Receiver<Question>, notifier: &LateNotifier) {
    while let Ok(q) = inbox.recv() {
        let written_back = match (notifier.get(), i64::try_from(q.from)) {
            (Some(n), Ok(from)) => n.inval_inode(q.node, from, 0),
            _ => Err(io::Error::from_raw_os_error(libc::EIO)),
        };
        let answer = written_back.map_err(Errno::from).and_then(|()| (q.answer)());
        match answer {
            Ok(at) => q.reply.offset(at),
            Err(e) => q.reply.error(e),
        }
    }
}
