//! Renaming: within a directory, across, over something, without replacing, and exchanging.

use super::dir::{self, Leftovers};
use super::error::{Result, StoreError};
use super::namespace::Leaving;
use super::node::{Location, Node};
use super::open::{Store, is, kernel};
use super::unsynced::Need;
use crate::backing::{Access, Backing, Kind, RenameMode, Stat};
use crate::format::names::Encoded;
use std::io;
use std::sync::Arc;

/// One end of a rename.
struct End<'a, B: Backing> {
    dir: &'a Arc<Node<B>>,
    fd: Arc<B::Node>,
    name: Encoded,
    /// What lies there.
    st: Option<Stat>,
}

/// What a rename comes down to.
enum Plan {
    /// The two names are one inode's: nothing happens.
    Nothing,
    /// One call does it.
    Simple,
    /// A directory replaces an empty directory, which holds its id and these leftovers.
    OverEmptyDir(Leftovers),
}

fn key(st: &Stat) -> (u64, u64) {
    (st.dev, st.ino)
}

impl<B: Backing> Store<B> {
    /// Renames `name` in `from` to `new_name` in `to`.
    ///
    /// # Errors
    /// Those of rename(2): [`StoreError::NotFound`], [`StoreError::Exists`], [`StoreError::NotEmpty`],
    /// [`StoreError::IsADirectory`], [`StoreError::NotADirectory`], `EINVAL` for a directory into itself, …
    pub fn rename(
        &self,
        from: &Arc<Node<B>>,
        name: &[u8],
        to: &Arc<Node<B>>,
        new_name: &[u8],
        mode: RenameMode,
    ) -> Result<()> {
        self.writable()?;
        self.moves.make_room();
        loop {
            // A directory that is replaced is locked too, so that nothing is made in it meanwhile. To learn which it
            // is takes its parent's lock; if it is another by the time that all are locked, again.
            let target = match (mode, self.lookup(to, new_name)) {
                (RenameMode::Replace, Ok((n, _))) if n.kind() == Kind::Dir => Some(n),
                (_, Err(e)) if !matches!(e, StoreError::NotFound) => return Err(e),
                _ => None,
            };
            let mut dirs = vec![from, to];
            dirs.extend(&target);
            let _entries = dir::lock_dirs(&dirs)?;
            let src = self.end(from, name)?;
            let dst = self.end(to, new_name)?;
            let there = dst.st.filter(|st| mode == RenameMode::Replace && st.kind == Kind::Dir).map(|st| key(&st));
            if there != target.as_ref().map(|n| n.key()) {
                continue;
            }
            let moved = src.st.ok_or(StoreError::NotFound)?;
            return self.rename_locked(&src, &dst, &moved, mode, target.as_ref());
        }
    }

    fn end<'a>(&self, dir: &'a Arc<Node<B>>, name: &[u8]) -> Result<End<'a, B>> {
        let b = self.backing();
        let name = self.encode(dir, name)?;
        let fd = dir.fd(b)?;
        let st = match b.stat_at(&fd, name.content()) {
            Ok(st) => Some(st),
            Err(e) if is(&e, libc::ENOENT) => None,
            Err(e) => return Err(kernel(e)),
        };
        Ok(End { dir, fd, name, st })
    }

    fn rename_locked(
        &self,
        src: &End<'_, B>,
        dst: &End<'_, B>,
        moved: &Stat,
        mode: RenameMode,
        target: Option<&Arc<Node<B>>>,
    ) -> Result<()> {
        let plan = self.plan(src, dst, moved, mode, target)?;
        if matches!(plan, Plan::Nothing) {
            return Ok(());
        }
        let _moving = self.moves.begin();
        // Both live nodes are pinned until their places are known again.
        let b = self.backing();
        let mover = self.table.get(key(moved));
        let _mover_pin = mover.as_ref().map(|n| n.fd(b)).transpose()?;
        let leaving = match (mode, &dst.st) {
            (_, None) => None,
            (_, Some(st)) => Some(self.leaving(&dst.fd, dst.name.content(), st)?),
        };
        let new_sidecar = self.put_sidecar(&dst.fd, &dst.name)?;
        let ready = self.sync_sidecar(mover.as_ref(), src, dst).and_then(|()| match (mode, &leaving) {
            (RenameMode::Exchange, Some(l)) => self.sync_sidecar(l.node(), dst, src),
            _ => Ok(()),
        });
        let done = ready.and_then(|()| match &plan {
            Plan::OverEmptyDir(leftovers) => self.replace_empty_dir(src, dst, target, leftovers),
            _ => self.rename_call(src, dst, mode).map_err(kernel),
        });
        done.inspect_err(|_| {
            if new_sidecar && dst.st.is_none() {
                self.drop_sidecar(&dst.fd, &dst.name);
            }
            // Several calls: the source may have moved, and even have moved back.
            if matches!(plan, Plan::OverEmptyDir(_)) && self.moves.on() {
                self.record_move(dst);
                self.record_move(src);
            }
        })?;
        self.renamed(src, dst, mode, mover, leaving);
        if let Some(replaced) = target {
            self.unsynced.forget(replaced.key());
        }
        Ok(())
    }

    /// Decides; the checks are those that the backing directory cannot make, because its directories hold an id.
    fn plan(
        &self,
        src: &End<'_, B>,
        dst: &End<'_, B>,
        moved: &Stat,
        mode: RenameMode,
        target: Option<&Arc<Node<B>>>,
    ) -> Result<Plan> {
        match (mode, &dst.st) {
            (RenameMode::NoReplace, Some(_)) => Err(StoreError::Exists),
            (RenameMode::Exchange, None) => Err(StoreError::NotFound),
            (RenameMode::Exchange | RenameMode::Replace, Some(st)) if key(st) == key(moved) => Ok(Plan::Nothing),
            (RenameMode::Replace, Some(st)) => match (moved.kind == Kind::Dir, st.kind == Kind::Dir) {
                (false, true) => Err(StoreError::IsADirectory),
                (true, false) => Err(StoreError::NotADirectory),
                (true, true) if self.names.is_some() => {
                    let target = target.ok_or(StoreError::NotADirectory)?;
                    // The source lies in it.
                    if target.id() == src.dir.id() {
                        return Err(StoreError::NotEmpty);
                    }
                    let fd = target.fd(self.backing())?;
                    Ok(Plan::OverEmptyDir(dir::leftovers(&self.backing().read_dir(&fd)?)?))
                }
                _ => Ok(Plan::Simple),
            },
            _ => Ok(Plan::Simple),
        }
    }

    /// Makes the sidecar of a long name durable before something that is durable already goes by that name: after a
    /// power cut it would otherwise be in no listing, under neither name. What is new pays nothing here, fsync does it.
    fn sync_sidecar(&self, moving: Option<&Arc<Node<B>>>, from: &End<'_, B>, to: &End<'_, B>) -> Result<()> {
        let Some((sidecar, _)) = to.name.sidecar() else { return Ok(()) };
        let at = moving.and_then(|n| n.location()).filter(|l| l.is(from.dir, from.name.content()));
        if at.is_some_and(|l| self.unsynced.need(from.dir.key(), l.made) != Need::Nothing) {
            return Ok(());
        }
        let b = self.backing();
        let file = b.lookup(&to.fd, sidecar).and_then(|n| b.open(&n, Access::Read)).map_err(kernel)?;
        Ok(b.sync_file(&file)?)
    }

    /// rename(2), and RENAME_NOREPLACE also where the backing file system has none: the store has one writer, and the
    /// caller holds the locks and has seen that there is nothing.
    fn rename_call(&self, src: &End<'_, B>, dst: &End<'_, B>, mode: RenameMode) -> io::Result<()> {
        let b = self.backing();
        let call = |mode| b.rename(&src.fd, src.name.content(), &dst.fd, dst.name.content(), mode);
        match call(mode) {
            Err(e) if mode == RenameMode::NoReplace && (is(&e, libc::EINVAL) || is(&e, libc::ENOSYS)) => {
                call(RenameMode::Replace)
            }
            other => other,
        }
    }

    /// A directory takes the place of an empty one. That is never empty below, so the two are exchanged, which leaves
    /// no instant without the name, and the empty one is then removed from where the source was.
    fn replace_empty_dir(
        &self,
        src: &End<'_, B>,
        dst: &End<'_, B>,
        target: Option<&Arc<Node<B>>>,
        leftovers: &Leftovers,
    ) -> Result<()> {
        let b = self.backing();
        let target = target.ok_or(StoreError::NotADirectory)?.fd(b)?;
        match self.rename_call(src, dst, RenameMode::Exchange) {
            Ok(()) => self.remove_dir(&src.fd, src.name.content(), &target, leftovers).or_else(|e| {
                // Nothing has happened then.
                self.rename_call(src, dst, RenameMode::Exchange).map_err(kernel)?;
                Err(e)
            }),
            // No exchange on this file system, or a directory into itself.
            Err(e) if is(&e, libc::EINVAL) || is(&e, libc::ENOSYS) || is(&e, libc::EOPNOTSUPP) => {
                self.replace_in_two_steps(src, dst, &target, leftovers)
            }
            Err(e) => Err(kernel(e)),
        }
    }

    fn replace_in_two_steps(
        &self,
        src: &End<'_, B>,
        dst: &End<'_, B>,
        target: &B::Node,
        leftovers: &Leftovers,
    ) -> Result<()> {
        let b = self.backing();
        let aside = self.set_aside(&dst.fd, dst.name.content())?;
        match b.rename(&src.fd, src.name.content(), &dst.fd, dst.name.content(), RenameMode::Replace) {
            Ok(()) => self.remove_dir(&dst.fd, &aside, target, leftovers),
            Err(e) => {
                b.rename(&dst.fd, &aside, &dst.fd, dst.name.content(), RenameMode::Replace).map_err(kernel)?;
                Err(kernel(e))
            }
        }
    }

    /// What is true after the call: places of nodes, sidecars, what is not durable, who else wants to know.
    fn renamed(
        &self,
        src: &End<'_, B>,
        dst: &End<'_, B>,
        mode: RenameMode,
        mover: Option<Arc<Node<B>>>,
        leaving: Option<Leaving<B>>,
    ) {
        let at = self.new_location(dst.dir, &dst.name);
        if let Some(n) = &mover {
            n.moved(src.dir, src.name.content(), at);
        }
        if mode == RenameMode::Exchange {
            let at: Location<B> = self.new_location(src.dir, &src.name);
            if let Some((n, _pin)) = leaving.and_then(Leaving::into_node) {
                n.moved(dst.dir, dst.name.content(), at);
            }
        } else {
            self.drop_sidecar(&src.fd, &src.name);
            if let Some(gone) = leaving {
                self.left(dst.dir, dst.name.content(), gone);
            }
        }
        if self.moves.on() {
            self.record_move(dst);
            if mode == RenameMode::Exchange {
                self.record_move(src);
            }
        }
    }

    fn record_move(&self, end: &End<'_, B>) {
        let b = self.backing();
        match b.lookup(&end.fd, end.name.content()).and_then(|n| b.stat(&n).map(|st| (n, st))) {
            Ok((n, st)) => self.moves.record(key(&st), Arc::new(n)),
            // A rename that failed half-way may leave one of its names without anything.
            Err(e) if is(&e, libc::ENOENT) => {}
            Err(e) => {
                tracing::warn!("a renamed inode could not be kept for the scan, which begins anew: {e}");
                self.moves.lose();
            }
        }
    }
}
