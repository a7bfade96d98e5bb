//! Settings every envelopefs process starts with: keys must not reach a core dump or a debugger of the same user, and
//! a mount holds many descriptors.

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use std::io;

/// `PR_SET_DUMPABLE=0`, `RLIMIT_CORE=0`, `RLIMIT_NOFILE` to its hard limit.
///
/// # Errors
/// The kernel's, if keys could end up in a core dump. A descriptor limit that cannot be raised is no error.
pub fn harden() -> io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let files = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: files.maximum, maximum: files.maximum });
    Ok(())
}

/// The user id this process acts as.
pub fn uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardening_takes_effect() {
        harden().unwrap();
        assert_eq!(getrlimit(Resource::Core).current, Some(0));
        assert_eq!(getrlimit(Resource::Nofile).current, getrlimit(Resource::Nofile).maximum);
        assert!(matches!(rustix::process::dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable));
    }
}
