//! Taking in the clients of a socket: a thread for each, and only so many at a time.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;
use std::time::Duration;

/// What a socket is like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Socket {
    /// Names the clients' threads, and what is logged.
    pub name: &'static str,
    /// Clients at a time; more are turned away.
    pub most: usize,
}

/// One client's place, free again when dropped.
struct Place(Arc<AtomicUsize>);

impl Place {
    /// `None` if all `most` places are taken.
    fn take(taken: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let place = Self(Arc::clone(taken));
        (taken.fetch_add(1, Ordering::AcqRel) < most).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Serves each client that `next` gives, in a thread of its own, until the process ends.
pub(super) fn serve_all<S: Send + 'static>(
    socket: Socket,
    next: impl Fn() -> io::Result<S>,
    serve: impl Fn(S) -> io::Result<()> + Send + Sync + 'static,
) {
    let Socket { name, most } = socket;
    let (taken, serve) = (Arc::default(), Arc::new(serve));
    loop {
        let client = match next() {
            Ok(c) => c,
            Err(e) => {
                tracing::warn!("{name} socket: {e}");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let Some(place) = Place::take(&taken, most) else { continue };
        let serve = Arc::clone(&serve);
        // A client that no thread can be had for is turned away.
        let _ = Builder::new().name(format!("{name}-client")).spawn(move || {
            let _place = place;
            if let Err(e) = serve(client) {
                tracing::debug!("{name} client: {e}");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_free_again_whatever_became_of_its_client() {
        let taken = Arc::default();
        let two: Vec<_> = (0..2).map(|_| Place::take(&taken, 2).unwrap()).collect();
        assert!((0..9).all(|_| Place::take(&taken, 2).is_none()));
        drop(two);
        let place = Place::take(&taken, 2).unwrap();
        let died = std::thread::spawn(move || {
            let _place = place;
            std::panic::resume_unwind(Box::new("a client's thread dies"));
        });
        assert!(died.join().is_err());
        assert_eq!(taken.load(Ordering::Acquire), 0);
    }
}
