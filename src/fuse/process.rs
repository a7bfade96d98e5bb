//! What `/proc` knows of the process that makes a request.

use std::fs;

/// Whether `gid` is among the supplementary groups of the process `pid`. `false` if that cannot be found out.
pub(super) fn has_group(pid: u32, gid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|s| lists_group(&s, gid))
}

fn lists_group(status: &str, gid: u32) -> bool {
    let groups = status.lines().find_map(|l| l.strip_prefix("Groups:"));
    groups.is_some_and(|g| g.split_ascii_whitespace().any(|w| w.parse() == Ok(gid)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_whole_numbers_of_the_right_line() {
        let status = "Name:\tcat\nGid:\t7\t7\t7\t7\nGroups:\t20 1000 \nNStgid:\t30\n";
        assert!(lists_group(status, 1000) && lists_group(status, 20));
        assert!(!lists_group(status, 100) && !lists_group(status, 7) && !lists_group(status, 30));
        assert!(!lists_group("", 0));
    }
}
