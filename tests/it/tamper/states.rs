//! Segment states: damaged in one copy and in both, swapped, grafted, zeroed, put back.

use super::*;

/// Where the copy that counts and the older one lie.
fn newest(raw: &[u8], segment: u64) -> (u64, u64) {
    let sequence = |copy| {
        let at = at_state(segment, copy) as usize;
        u64::from_le_bytes(raw[at..at + 8].try_into().unwrap())
    };
    let (a, b) = (at_state(segment, Copy2::A), at_state(segment, Copy2::B));
    assert_ne!(sequence(Copy2::A), sequence(Copy2::B), "both copies were written");
    if sequence(Copy2::B) > sequence(Copy2::A) { (b, a) } else { (a, b) }
}

#[test]
fn every_byte_of_both_copies_of_the_first_state() {
    let w = World::new();
    let path = w.path("small");
    for at in 0..1024 {
        for copy in [Copy2::A, Copy2::B] {
            w.disk.flip_bit(&path, at_state(0, copy) + at, (at % 8) as u32).unwrap();
        }
        assert_eq!(w.look("small"), closed("state-auth"), "byte {at}");
        for copy in [Copy2::A, Copy2::B] {
            w.disk.flip_bit(&path, at_state(0, copy) + at, (at % 8) as u32).unwrap();
        }
    }
    w.others_are_fine(&[]);
}

#[test]
fn every_byte_of_one_copy_of_the_first_state_costs_nothing() {
    let w = World::new();
    let path = w.path("small");
    for at in 2048..4096 {
        w.disk.flip_bit(&path, at, (at % 8) as u32).unwrap();
        assert_eq!(w.look("small"), fine(), "byte {at}");
        w.disk.flip_bit(&path, at, (at % 8) as u32).unwrap();
    }
}

/// Offsets in a state copy: all of the front, then some in each entry.
fn sampled() -> impl Iterator<Item = u64> {
    (0..48u64).chain((48..4096).step_by(61))
}

#[test]
fn both_copies_of_a_later_state() {
    let w = World::new();
    let path = w.path("large");
    for at in sampled() {
        for copy in [Copy2::A, Copy2::B] {
            w.disk.flip_bit(&path, at_state(1, copy) + at, (at % 8) as u32).unwrap();
        }
        assert_eq!(w.look("large"), bad("state-auth", 32..160), "byte {at}");
        for copy in [Copy2::A, Copy2::B] {
            w.disk.flip_bit(&path, at_state(1, copy) + at, (at % 8) as u32).unwrap();
        }
    }
    w.others_are_fine(&[]);
}

/// The newer copy of a later state has entries that the older one lacks. Those blocks must not become holes.
#[test]
fn the_newer_copy_of_a_later_state_damaged() {
    let w = World::new();
    let (path, raw) = (w.path("large"), w.raw("large"));
    let (newer, older) = newest(&raw, 1);
    // The last write to segment 1 was blocks 155 to 159.
    let lost = || bad("block-auth", 155..160);
    for at in sampled() {
        w.disk.flip_bit(&path, newer + at, (at % 8) as u32).unwrap();
        assert_eq!(w.look("large"), lost(), "byte {at}");
        w.disk.flip_bit(&path, newer + at, (at % 8) as u32).unwrap();
        w.disk.flip_bit(&path, older + at, (at % 8) as u32).unwrap();
        assert_eq!(w.look("large"), fine(), "byte {at} of the older copy");
        w.disk.flip_bit(&path, older + at, (at % 8) as u32).unwrap();
    }
    w.put("large", newer, &[0; 4096]);
    assert_eq!(w.look("large"), lost(), "zeroed");
    w.disk.copy_raw(&path, older, &path, newer, 4096).unwrap();
    assert_eq!(w.look("large"), lost(), "replaced by the older copy");
    w.others_are_fine(&["large"]);
}

/// Writing elsewhere in the segment replaces the damaged copy. What was lost stays lost, and does not turn into zeros.
#[test]
fn what_a_damaged_copy_lost_stays_lost_after_a_write() {
    let w = World::new();
    let (newer, _) = newest(&w.raw("large"), 1);
    w.put("large", newer + 100, b"damage");
    let at = 40 * 4096;
    w.change("large", |f| write(f, at, &contents()["large"][at as usize..][..4096]));
    assert_eq!(w.look("large"), bad("block-auth", 155..160));
    assert_eq!(w.check().len(), 5, "a deep check finds each");
    // Until it is written again.
    let at = 155 * 4096;
    w.change("large", |f| write(f, at, &contents()["large"][at as usize..][..5 * 4096]));
    assert_eq!(w.look("large"), fine());
    assert_eq!(w.check(), []);
}

#[test]
fn a_deep_check_sees_what_a_damaged_newer_copy_lost() {
    let w = World::new();
    let (newer, _) = newest(&w.raw("large"), 1);
    w.put("large", newer + 100, b"damage");
    let path = String::from_utf8(w.path("large")).unwrap();
    assert_eq!(w.check(), vec![(path, "block-auth".to_owned()); 5]);
}

#[test]
fn copies_swapped_with_each_other() {
    let w = World::new();
    let raw = w.raw("large");
    for (segment, len) in [(0, 1024), (1, 4096), (2, 4096)] {
        let (a, b) = (at_state(segment, Copy2::A), at_state(segment, Copy2::B));
        w.put("large", a, &raw[b as usize..][..len]);
        w.put("large", b, &raw[a as usize..][..len]);
        assert_eq!(w.look("large"), fine(), "segment {segment}");
    }
}

#[test]
fn states_of_another_segment_and_of_another_file() {
    let w = World::new();
    let (raw, too) = (w.raw("large"), w.raw("large too"));
    let states = |segment| at_state(segment, Copy2::A) as usize..at_state(segment, Copy2::A) as usize + 8192;
    for (what, from, to, want) in [
        ("another segment's", &raw[states(1)], 2, bad("state-auth", blocks_from(160, LARGE))),
        ("another file's", &too[states(1)], 1, bad("state-auth", 32..160)),
    ] {
        let w = w.copy();
        w.put("large", at_state(to, Copy2::A), from);
        assert_eq!(w.look("large"), want, "{what}");
        w.others_are_fine(&["large"]);
    }
    // The first state holds length and flags, so without it there is nothing.
    w.put("large", 2048, &too[2048..4096]);
    assert_eq!(w.look("large"), closed("state-auth"));
}

#[test]
fn states_of_another_store() {
    let (w, other) = (World::new(), World::build());
    w.put("large", 2048, &other.raw("large")[2048..4096]);
    assert_eq!(w.look("large"), closed("state-auth"));
    w.others_are_fine(&["large"]);
}

#[test]
fn an_edited_sequence() {
    let w = World::new();
    let raw = w.raw("small");
    let (newer, older) = newest(&raw, 0);
    for sequence in [0, 1, u64::MAX] {
        let sequence = u64::to_le_bytes(sequence);
        w.put("small", older, &sequence);
        assert_eq!(w.look("small"), fine(), "of the older copy");
        w.put("small", newer, &sequence);
        assert_eq!(w.look("small"), closed("state-auth"), "of both copies");
        w.put("small", 0, &raw);
    }
}

/// An older state under newer data: what was overwritten since does not open.
#[test]
fn both_copies_put_back_without_the_data() {
    let w = World::new();
    let before = w.raw("large");
    let at = 33 * 4096;
    // Twice, so that neither copy is from before.
    for _ in 0..2 {
        w.change("large", |f| write(f, at, &contents()["large"][at as usize..][..8192]));
    }
    assert_eq!(w.look("large"), fine());
    let states = at_state(1, Copy2::A);
    w.put("large", states, &before[states as usize..][..8192]);
    assert_eq!(w.look("large"), bad("block-auth", 33..35));
}

/// Not noticed in version 1, and `docs/THREAT_MODEL.md` says so: a whole segment put back to its own older version.
#[test]
fn a_whole_segment_put_back_is_not_noticed() {
    let w = World::new();
    let before = w.raw("large");
    let mut content = contents()["large"].clone();
    let at = 33 * 4096;
    content[at..at + 8192].fill(b'n');
    w.change("large", |f| write(f, at as u64, &content[at..][..8192]));
    assert_eq!(w.look_for("large", &content), fine());
    let segment = at_state(1, Copy2::A) as usize..at_state(2, Copy2::A) as usize;
    w.put("large", segment.start as u64, &before[segment]);
    assert_eq!(w.look("large"), fine(), "the old content");
    // Nor a whole file.
    w.change("small", |f| write(f, 0, b"new"));
    let old = World::new().raw("small");
    w.put("small", 0, &old);
    assert_eq!(w.look("small"), fine(), "the old content");
}
