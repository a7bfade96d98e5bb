//! Who asks.

use crate::kms::event;
use crate::store::Owner;

/// The process that makes a call, as the kernel names it.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    /// 0 if the process is not visible from here.
    pub pid: u32,
    /// Whether the process `pid` has `gid` among its supplementary groups.
    pub has_group: fn(pid: u32, gid: u32) -> bool,
}

impl Caller {
    /// Whether setuid and setgid bits stay when this caller writes (CAP_FSETID). The kernel says so for writes; for
    /// truncation it does too, but not in a field that reaches us, so root stands for it.
    pub(super) fn keeps_set_bits(&self) -> bool {
        self.uid == 0
    }

    /// The caller, unless set bits stay when he writes.
    pub(super) fn if_he_drops_set_bits(&self) -> Option<&Self> {
        (!self.keeps_set_bits()).then_some(self)
    }

    /// Whether the caller may set the setgid bit on something of group `gid`.
    pub(super) fn is_in_group(&self, gid: u32) -> bool {
        self.uid == 0 || self.gid == gid || (self.has_group)(self.pid, gid)
    }

    /// What the observer of keys is told of him.
    pub(super) fn of_keys(&self) -> event::Caller {
        event::Caller { pid: self.pid, uid: self.uid }
    }

    pub(super) fn owner(&self) -> Owner {
        Owner { uid: self.uid, gid: self.gid }
    }
}
