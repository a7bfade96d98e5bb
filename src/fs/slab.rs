//! Handles: small numbers for things the kernel holds open.

use std::sync::Arc;

use parking_lot::RwLock;

/// Numbers to values. A number is used again only after it was removed, and never while it is in use, so a lookup is an
/// index and an `Arc` clone under a shared lock.
#[derive(Debug)]
pub(super) struct Slab<T> {
    inner: RwLock<Inner<T>>,
}

#[derive(Debug)]
struct Inner<T> {
    slots: Vec<Option<Arc<T>>>,
    free: Vec<usize>,
}

impl<T> Slab<T> {
    pub(super) fn new() -> Self {
        Self { inner: RwLock::new(Inner { slots: Vec::new(), free: Vec::new() }) }
    }

    /// Keeps `value`; returns its number, which is never 0.
    pub(super) fn insert(&self, value: T) -> u64 {
        let value = Some(Arc::new(value));
        let mut inner = self.inner.write();
        let at = match inner.free.pop() {
            Some(at) => at,
            None => {
                inner.slots.push(None);
                inner.slots.len() - 1
            }
        };
        if let Some(slot) = inner.slots.get_mut(at) {
            *slot = value;
        }
        at as u64 + 1
    }

    pub(super) fn get(&self, number: u64) -> Option<Arc<T>> {
        self.inner.read().slots.get(index(number)?)?.clone()
    }

    /// Takes the value out; the number may be used again.
    pub(super) fn remove(&self, number: u64) -> Option<Arc<T>> {
        let at = index(number)?;
        let mut inner = self.inner.write();
        let value = inner.slots.get_mut(at)?.take()?;
        inner.free.push(at);
        Some(value)
    }

    /// How many are held.
    pub(super) fn len(&self) -> usize {
        let inner = self.inner.read();
        inner.slots.len() - inner.free.len()
    }
}

fn index(number: u64) -> Option<usize> {
    usize::try_from(number.checked_sub(1)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_until_removed_and_then_used_again() {
        let slab = Slab::new();
        let (a, b) = (slab.insert('a'), slab.insert('b'));
        assert_ne!(a, 0);
        assert_ne!(a, b);
        assert_eq!(slab.get(a).as_deref(), Some(&'a'));
        assert_eq!(slab.remove(a).as_deref(), Some(&'a'));
        assert_eq!(slab.get(a), None);
        assert_eq!(slab.remove(a), None, "a number is taken out once");
        assert_eq!(slab.len(), 1);
        assert_eq!(slab.insert('c'), a);
        assert_eq!(slab.get(b).as_deref(), Some(&'b'));
    }

    #[test]
    fn numbers_never_given_out_are_nothing() {
        let slab: Slab<u8> = Slab::new();
        for n in [0, 1, u64::MAX] {
            assert_eq!(slab.get(n), None);
            assert_eq!(slab.remove(n), None);
        }
    }
}
