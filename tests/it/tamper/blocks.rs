//! Blocks: damaged, swapped, grafted, put back.

use super::*;

#[test]
fn a_flipped_bit_costs_its_block_and_no_other() {
    let w = World::new();
    for name in ["small", "large"] {
        let path = w.path(name);
        let len = contents()[name].len();
        for block in blocks_from(0, len).step_by(if name == "large" { 7 } else { 1 }) {
            let last = geometry::block_len(block, len as u64) as u64 - 1;
            for at in [0, last / 2, last] {
                w.disk.flip_bit(&path, at_block(block) + at, (block % 8) as u32).unwrap();
                assert_eq!(w.look(name), bad("block-auth", [block]), "{name}, block {block}, byte {at}");
                w.disk.flip_bit(&path, at_block(block) + at, (block % 8) as u32).unwrap();
            }
        }
    }
    w.others_are_fine(&[]);
}

#[test]
fn every_bit_of_a_byte() {
    let w = World::new();
    let path = w.path("small");
    for bit in 0..8 {
        w.disk.flip_bit(&path, at_block(4) + 77, bit).unwrap();
        assert_eq!(w.look("small"), bad("block-auth", [4]));
        w.disk.flip_bit(&path, at_block(4) + 77, bit).unwrap();
    }
}

#[test]
fn blocks_swapped_within_a_file() {
    let w = World::new();
    let raw = w.raw("large");
    // In one segment, and across segments.
    for (one, two) in [(0, 1), (40, 159), (3, 100), (31, 32)] {
        w.put("large", at_block(one), &raw[at_block(two) as usize..][..4096]);
        w.put("large", at_block(two), &raw[at_block(one) as usize..][..4096]);
        assert_eq!(w.look("large"), bad("block-auth", [one, two]));
        w.put("large", 0, &raw);
    }
    w.others_are_fine(&[]);
}

#[test]
fn blocks_swapped_between_files() {
    let w = World::new();
    let (one, two) = (w.raw("small"), w.raw("small too"));
    w.put("small", at_block(3), &two[at_block(3) as usize..][..4096]);
    w.put("small too", at_block(3), &one[at_block(3) as usize..][..4096]);
    assert_eq!(w.look("small"), bad("block-auth", [3]));
    assert_eq!(w.look("small too"), bad("block-auth", [3]));
    w.others_are_fine(&["small", "small too"]);
}

#[test]
fn a_block_of_another_store() {
    let (w, other) = (World::new(), World::build());
    w.put("small", at_block(3), &other.raw("small")[at_block(3) as usize..][..4096]);
    assert_eq!(w.look("small"), bad("block-auth", [3]));
    w.others_are_fine(&["small"]);
}

#[test]
fn a_block_with_its_state_from_another_file() {
    let w = World::new();
    let two = w.raw("small too");
    // Block and the first page's states: everything of the other file but the header.
    w.put("small", 2048, &two[2048..]);
    assert_eq!(w.look("small"), closed("state-auth"));
}

#[test]
fn segments_swapped_within_and_between_files() {
    let w = World::new();
    let (one, two) = (w.raw("large"), w.raw("large too"));
    let start = |segment| at_state(segment, Copy2::A) as usize;
    let len = one.len() - start(2);
    // As much of segment 1 as segment 2 has, the states included, in each other's place.
    w.put("large", start(1) as u64, &one[start(2)..]);
    w.put("large", start(2) as u64, &one[start(1)..][..len]);
    assert_eq!(w.look("large"), bad("state-auth", blocks_from(32, LARGE)));
    w.put("large", 0, &one);
    // Only the blocks.
    w.put("large", at_block(32), &one[at_block(160) as usize..][..20 * 4096]);
    w.put("large", at_block(160), &one[at_block(32) as usize..][..20 * 4096]);
    assert_eq!(w.look("large"), bad("block-auth", (32..52).chain(160..180)));
    w.put("large", 0, &one);
    // Between files.
    w.put("large", start(1) as u64, &two[start(1)..start(2)]);
    w.put("large too", start(1) as u64, &one[start(1)..start(2)]);
    assert_eq!(w.look("large"), bad("state-auth", 32..160));
    assert_eq!(w.look("large too"), bad("state-auth", 32..160));
    w.others_are_fine(&["large", "large too"]);
}

#[test]
fn an_older_version_of_a_block() {
    let w = World::new();
    let before = w.raw("small");
    // With the same content: the nonce is new all the same.
    w.change("small", |f| write(f, 4096, &contents()["small"][4096..8192]));
    w.put("small", at_block(1), &before[at_block(1) as usize..][..4096]);
    assert_eq!(w.look("small"), bad("block-auth", [1]));
}

/// Not noticed in version 1, and `docs/THREAT_MODEL.md` says so: after a crash the older state copy still speaks for the
/// version before, until the file is opened for writing and closed.
#[test]
fn the_last_version_of_a_block_in_a_file_that_was_not_closed() {
    let mut w = World::new();
    let before = w.raw("small");
    let mut content = contents()["small"].clone();
    content[4096..8192].fill(b'n');
    w.kill_after("small", |f| write(f, 4096, &[b'n'; 4096]));
    assert_eq!(w.look_for("small", &content), fine());
    let put_back = |w: &World| w.put("small", at_block(1), &before[at_block(1) as usize..][..4096]);
    let crashed = w.copy();
    put_back(&crashed);
    assert_eq!(crashed.look("small"), fine(), "the old content");
    // Another byte than those two versions is noticed.
    crashed.put("small", at_block(1), b"other");
    assert_eq!(crashed.look_for("small", &content), bad("block-auth", [1]));
    // Closed once, it is over.
    w.change("small", |f| write(f, 0, &content[..1]));
    put_back(&w);
    assert_eq!(w.look_for("small", &content), bad("block-auth", [1]));
    w.others_are_fine(&["small"]);
}

/// Not noticed in version 1, and `docs/THREAT_MODEL.md` says so: content is bound to the file's id, not to its name.
#[test]
fn whole_files_exchanged_are_not_noticed() {
    let w = World::new();
    let (one, two) = (w.raw("small"), w.raw("small too"));
    w.put("small", 0, &two);
    w.put("small too", 0, &one);
    assert_eq!(w.look_for("small", &contents()["small too"]), fine());
    assert_eq!(w.look_for("small too", &contents()["small"]), fine());
    // A copy has the same id as its source, which a check warns of.
    w.put("small", 0, &one);
    let keys = w.keys();
    let r = check::run(&w.disk, Some(&keys), &CheckOptions::default(), &()).unwrap();
    assert!(r.findings.iter().any(|f| f.code == "duplicate-file-id"));
}
