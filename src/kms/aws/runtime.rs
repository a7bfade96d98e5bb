//! The tokio runtime under the AWS SDK: one for all AWS root keys of the process, made with the first call.

use crate::kms::KmsError;
use parking_lot::Mutex;
use std::future::Future;
use std::sync::mpsc;
use tokio::runtime::{Builder, Handle, Runtime};

static RUNTIME: Mutex<Option<Runtime>> = Mutex::new(None);

/// One worker is enough: calls wait for the network, and compute next to nothing.
fn handle() -> Result<Handle, KmsError> {
    let mut made = RUNTIME.lock();
    if let Some(runtime) = made.as_ref() {
        return Ok(runtime.handle().clone());
    }
    let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("aws-kms").enable_all().build();
    let runtime = runtime.map_err(|e| KmsError::Unreachable(format!("AWS KMS: cannot start a thread: {e}")))?;
    Ok(made.insert(runtime).handle().clone())
}

/// Runs `work` on the runtime and waits for it. May be called from any thread, one of another tokio runtime included,
/// which `Runtime::block_on` may not; only the worker itself must not call it.
///
/// # Errors
/// [`KmsError::Unreachable`] if no thread can be started, or the SDK has panicked.
pub fn wait<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T, KmsError> {
    let (tell, told) = mpsc::sync_channel(1);
    handle()?.spawn(async move {
        // Nobody listens only if the waiting thread is gone.
        let _ = tell.send(work.await);
    });
    told.recv().map_err(|_| KmsError::Unreachable("AWS KMS: the call broke off inside the AWS SDK".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_thread_can_wait_one_of_another_runtime_included() {
        assert_eq!(wait(async { 1 }), Ok(1));
        let threads: Vec<_> = (0..8).map(|n| std::thread::spawn(move || wait(async move { n }))).collect();
        for (n, t) in threads.into_iter().enumerate() {
            assert_eq!(t.join().unwrap(), Ok(n));
        }
        let other = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let inside = other.block_on(async { wait(async { 2 }) });
        assert_eq!(inside, Ok(2));
        let spawned = other.block_on(other.spawn(async { wait(async { 3 }) })).unwrap();
        assert_eq!(spawned, Ok(3));
    }

    #[test]
    fn a_panic_inside_ends_the_call_and_nothing_else() {
        let broken = wait(async { [0u8; 1].into_iter().nth(1).unwrap() });
        assert!(matches!(broken, Err(KmsError::Unreachable(_))), "{broken:?}");
        assert_eq!(wait(async { 1 }), Ok(1));
    }
}
