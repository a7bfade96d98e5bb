//! Moving what root keys wrapped to their newest versions, so that older versions can be retired in the service.

use super::handle::bounded;
use super::roots::{self, Connected, Object, PassedOver};
use super::{Keys, Proof};
use crate::backing::Backing;
use crate::format::ids::RootKeyId;
use crate::format::keyring::{KekState, Keyring, RootKeyRecord};
use crate::kms::{KmsError, RootKeyUri};
use crate::store::{Result, StoreError};

/// What [`Keys::refresh`] found and did with one root key. What it wraps is counted: the store secret and KEKs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefreshedRoot {
    pub id: RootKeyId,
    pub uri: String,
    /// Wrapped by the newest version already.
    pub current: u32,
    /// Wrapped by an older one.
    pub due: u32,
    /// Of those that were due, moved to the newest one: all or none.
    pub moved: u32,
    /// Why not everything was looked at or moved.
    pub problem: Option<KmsError>,
}

/// Whether a root key recorded as `uri` can have versions. One that cannot is not asked: a passphrase would have to be
/// typed for nothing.
fn has_versions(uri: &str) -> bool {
    RootKeyUri::recorded(uri).map_or(true, |u| u.scheme().has_versions())
}

/// What `root` wraps in `ring`.
fn objects(ring: &Keyring, root: RootKeyId) -> Vec<Object> {
    let keks = ring.keks.iter().filter(|k| k.state != KekState::Destroyed).map(|k| Object::Kek(k.id));
    std::iter::once(Object::Secret).chain(keks).filter(|o| o.wrap_in(ring, root).is_some()).collect()
}

/// Has the provider of `c` wrap `object` of `ring` with its newest version.
fn rewrap(ring: &mut Keyring, c: &Connected, object: Object) -> roots::Outcome<()> {
    let context = object.context(ring.store);
    let Some(old) = object.wrap_in(ring, c.id) else { return Ok(()) };
    let new = bounded(c.provider.rewrap(&old.bytes, &context, &context)?)?;
    let wraps = match object {
        Object::Secret => Some(&mut ring.secret),
        Object::Kek(id) => ring.kek_mut(id).map(|k| &mut k.wraps),
    };
    if let Some(w) = wraps.into_iter().flatten().find(|w| w.root == c.id) {
        w.bytes = new;
    }
    Ok(())
}

impl Keys {
    /// Moves every wrap in the keyring that is due to its root key's newest version, with the service's own re-wrap where
    /// it has one. One root key after the other: its wraps are written, and it has unwrapped every one of them, from what
    /// was read back from disk, before the old ones go. A root key that does not answer or fails is told and left as it
    /// was; the others go on. With `dry_run` only looks.
    ///
    /// # Errors
    /// [`StoreError::KeyState`] if this program may not change the keyring; the backing directory's;
    /// [`StoreError::CopyLeft`]. What was moved until then stays moved.
    pub fn refresh<B: Backing>(&self, b: &B, dry_run: bool) -> Result<Vec<RefreshedRoot>> {
        let _update = self.update.lock();
        let ring = if dry_run { self.snapshot() } else { self.to_change()? };
        let silent = self.connect_some(&ring, has_versions);
        let refreshed = ring.roots.iter().map(|r| self.refresh_root(b, r, dry_run, &silent)).collect::<Result<_>>()?;
        if !dry_run {
            // Or somebody retires a version that the one whole copy needs some day.
            self.settle(b, "what root keys wrap is moved")?;
        }
        Ok(refreshed)
    }

    fn refresh_root<B: Backing>(
        &self,
        b: &B,
        root: &RootKeyRecord,
        dry_run: bool,
        silent: &[PassedOver],
    ) -> Result<RefreshedRoot> {
        let mut ring = self.snapshot();
        let mut out = RefreshedRoot { id: root.id, uri: root.uri.clone(), current: 0, due: 0, moved: 0, problem: None };
        let all = objects(&ring, root.id);
        if !has_versions(&root.uri) {
            out.current = all.len() as u32;
            return Ok(out);
        }
        let Some(c) = self.state.read().connected.iter().find(|c| c.id == root.id).cloned() else {
            let why = silent.iter().find(|(uri, _)| *uri == root.uri).map(|(_, e)| e.clone());
            out.problem = Some(why.unwrap_or_else(|| KmsError::Config("it is not at hand".into())));
            return Ok(out);
        };
        let due = match due(&ring, &c, &all) {
            Ok(due) => due,
            Err(e) => return Ok(RefreshedRoot { problem: Some(e), ..out }),
        };
        (out.due, out.current) = (due.len() as u32, (all.len() - due.len()) as u32);
        if dry_run || due.is_empty() {
            return Ok(out);
        }
        match self.move_wraps(b, &mut ring, &c, &due) {
            Ok(()) => out.moved = out.due,
            Err(StoreError::Kms(e)) => out.problem = Some(e),
            Err(e) => return Err(e),
        }
        Ok(out)
    }

    /// Re-wraps `due` and writes the keyring; in force only if every one of them was proved.
    fn move_wraps<B: Backing>(&self, b: &B, ring: &mut Keyring, c: &Connected, due: &[Object]) -> Result<()> {
        for object in due {
            rewrap(ring, c, *object)?;
        }
        let keks = due.iter().filter_map(|o| match o {
            Object::Secret => None,
            Object::Kek(id) => Some(self.opened(*id)),
        });
        let keks = keks.collect::<Result<Vec<_>>>()?;
        let mut proofs: Vec<Proof<'_>> = keks.iter().map(|h| (c.clone(), Object::Kek(h.id()), h.key())).collect();
        if due.contains(&Object::Secret) {
            proofs.push((c.clone(), Object::Secret, self.secret().secret()));
        }
        self.adopt(b, ring.clone(), &proofs)
    }

    /// Moves the store secret's wraps in `ring` by `roots` that are due, so that a rotation leaves nothing that needs an
    /// old version. Returns the root keys that must prove their new wrap. One that fails here keeps its old wrap, which
    /// still opens: [`Keys::refresh`] tells why.
    pub(super) fn refresh_secret(&self, ring: &mut Keyring, roots: &[Connected]) -> Vec<Connected> {
        let mut moved = Vec::new();
        for c in roots.iter().filter(|c| !c.wraps_only()) {
            let done = match due(ring, c, &[Object::Secret]) {
                Ok(due) if due.is_empty() => continue,
                Ok(_) => rewrap(ring, c, Object::Secret),
                Err(e) => Err(e),
            };
            match done {
                Ok(()) => moved.push(c.clone()),
                Err(why) => {
                    let root = roots::name_of(c.provider.as_ref());
                    tracing::warn!(root, %why, "the store secret stays wrapped by an older version of the root key");
                }
            }
        }
        moved
    }
}

/// Those of `objects` that `c` wrapped with an older version.
fn due(ring: &Keyring, c: &Connected, objects: &[Object]) -> roots::Outcome<Vec<Object>> {
    let mut due = Vec::new();
    for o in objects {
        if let Some(w) = o.wrap_in(ring, c.id)
            && c.provider.rewrap_due(&w.bytes)?
        {
            due.push(*o);
        }
    }
    Ok(due)
}
