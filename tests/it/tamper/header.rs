//! The two slots: every byte damaged, edited with the checksum made right, forged, taken from elsewhere, put back.

use super::*;

#[test]
fn every_byte_of_both_slots() {
    let w = World::new();
    let path = w.path("small");
    for at in 0..1024 {
        let want = if at < 8 { "header-magic" } else { "header-unreadable" };
        for slot in [0, 1024] {
            w.disk.flip_bit(&path, slot + at, (at % 8) as u32).unwrap();
        }
        assert_eq!(w.look("small"), closed(want), "byte {at}");
        for slot in [0, 1024] {
            w.disk.flip_bit(&path, slot + at, (at % 8) as u32).unwrap();
        }
    }
    w.others_are_fine(&[]);
}

#[test]
fn every_byte_of_one_slot_costs_nothing() {
    let w = World::new();
    let path = w.path("small");
    for at in 0..2048 {
        w.disk.flip_bit(&path, at, (at % 8) as u32).unwrap();
        assert_eq!(w.look("small"), fine(), "byte {at}");
        w.disk.flip_bit(&path, at, (at % 8) as u32).unwrap();
    }
    w.disk.flip_bit(&path, 1, 1).unwrap();
    assert_eq!(w.check(), []);
}

/// The code for an edit of byte `at` of both slots whose checksum is made right.
fn code_of_edit(at: usize) -> &'static str {
    match at {
        0..8 => "header-magic",
        8..10 => "unsupported-version",
        10..12 => "unsupported-suite",
        12..16 => "unsupported-feature",
        20..24 => "malformed",
        24..40 => "foreign-store",
        128..=143 => "kek-unknown",
        144 | 145 => "unsupported-suite",
        // A length over 640.
        147 => "malformed",
        148..152 | 212..1020 => "malformed",
        // Read-only-compatible flags, file id, commitment, MAC, sequence, wrap.
        _ => "wrap-auth",
    }
}

#[test]
fn every_byte_edited_with_the_checksum_made_right() {
    let w = World::new();
    let (path, whole) = (w.path("small"), w.raw("small"));
    for at in 0..1020 {
        let mut slot = whole[..1024].to_vec();
        // Another value and never zero, which for some fields has a meaning of its own.
        slot[at] = if slot[at] == 0x40 { 0x41 } else { 0x40 };
        let want = match at {
            // A wrap of 64 bytes instead of 60.
            146 => "wrap-auth",
            _ => code_of_edit(at),
        };
        let slot = with_crc(slot);
        w.disk.write_raw(&path, 0, &[&slot[..], &slot[..]].concat()).unwrap();
        assert_eq!(w.look("small"), closed(want), "byte {at}");
        // In one slot only, the other is used.
        w.disk.write_raw(&path, 1024, &whole[1024..2048]).unwrap();
        assert_eq!(w.look("small"), fine(), "byte {at} of one slot");
    }
    w.disk.write_raw(&path, 0, &whole[..2048]).unwrap();
    w.others_are_fine(&[]);
}

#[test]
fn fields_with_special_values() {
    let w = World::new();
    let whole = w.raw("small");
    let cases: [(&str, usize, &[u8], &str); 11] = [
        ("version 0", 8, &[0, 0], "unsupported-version"),
        ("version 2", 8, &[2, 0], "unsupported-version"),
        ("the reserved suite", 10, &[2, 0], "unsupported-suite"),
        ("suite 0", 10, &[0, 0], "unsupported-suite"),
        ("the last incompatible flag", 12, &[0, 0, 0, 0x80], "unsupported-feature"),
        ("sequence 0", 120, &[0; 8], "malformed"),
        ("the highest sequence", 120, &[0xff; 8], "wrap-auth"),
        ("wrapped by a provider", 144, &[2, 0], "wrap-auth"),
        ("no wrap", 146, &[0, 0], "malformed"),
        ("a wrap too short", 146, &[59, 0], "malformed"),
        ("a wrap of 641 bytes", 146, &[0x81, 2], "malformed"),
    ];
    for (what, at, bytes, want) in cases {
        let mut slot = whole[..1024].to_vec();
        slot[at..at + bytes.len()].copy_from_slice(bytes);
        let slot = with_crc(slot);
        w.put("small", 0, &[&slot[..], &slot[..]].concat());
        assert_eq!(w.look("small"), closed(want), "{what}");
    }
}

/// What says most counts: that a newer program was here, before mere damage.
#[test]
fn a_newer_version_in_one_slot_is_told_before_damage_in_the_other() {
    let w = World::new();
    let whole = w.raw("small");
    let mut newer = whole[..1024].to_vec();
    newer[8] = 2;
    w.put("small", 0, &with_crc(newer));
    w.put("small", 1024 + 500, b"x");
    assert_eq!(w.look("small"), closed("unsupported-version"));
    assert_eq!(w.check(), [(String::from_utf8(w.path("small")).unwrap(), "unsupported-version".to_owned())]);
}

/// Whoever had a KEK can make a wrap that opens; commitment and MAC still tell that it is not this file's.
#[test]
fn a_wrap_of_another_dek_and_a_prefix_of_another_make() {
    let w = World::new();
    let dek = w.dek("small");
    let keys = w.keys();
    let slot = w.slots("small").a.unwrap();
    let seal = |slot: &Slot, dek: &Dek| {
        let wrapped = keys.with_active(|k| k.wrap(&slot.wrap_aad(), slot.file, dek)).unwrap();
        Slot { wrapped, ..slot.clone() }
    };
    let again = seal(&Slot { sequence: 9, ..slot.clone() }, &dek);
    w.put_slots("small", &again, &again);
    assert_eq!(w.look("small"), fine(), "the forger's tools are good");
    let other = seal(&slot, &Dek::random());
    w.put_slots("small", &other, &other);
    assert_eq!(w.look("small"), closed("commitment"));
    let mut mac = slot.clone();
    mac.mac[31] ^= 1;
    let mac = seal(&mac, &dek);
    w.put_slots("small", &mac, &mac);
    assert_eq!(w.look("small"), closed("header-mac"));
    let flags = seal(&Slot { ro_compat: 1, ..slot }, &dek);
    w.put_slots("small", &flags, &flags);
    assert_eq!(w.look("small"), closed("header-mac"));
    w.others_are_fine(&["small"]);
}

#[test]
fn a_forged_slot_with_a_higher_sequence_is_passed_over() {
    let w = World::new();
    let slot = w.slots("small").a.unwrap();
    for sequence in [slot.sequence + 1, u64::MAX] {
        let forged = Slot { sequence, ..slot.clone() };
        w.put_slots("small", &slot, &forged);
        assert_eq!(w.look("small"), fine());
        w.put_slots("small", &forged, &slot);
        assert_eq!(w.look("small"), fine());
        w.put_slots("small", &forged, &forged);
        assert_eq!(w.look("small"), closed("wrap-auth"));
    }
    // A rotation makes the file whole again.
    w.put_slots("small", &Slot { sequence: u64::MAX, ..slot.clone() }, &slot);
    w.rotate(false);
    assert_eq!(w.look("small"), fine());
    let now = w.slots("small");
    assert_eq!(now.a, now.b);
}

/// Somebody who had a KEK can give a slot the highest sequence there is. Nothing overflows, and nothing is lost.
#[test]
fn the_highest_sequence_leaves_nowhere_to_go() {
    let w = World::new();
    let dek = w.dek("small");
    let keys = w.keys();
    let mut slot = Slot { sequence: u64::MAX, ..w.slots("small").a.unwrap() };
    slot.wrapped = keys.with_active(|k| k.wrap(&slot.wrap_aad(), slot.file, &dek)).unwrap();
    w.put_slots("small", &slot, &slot);
    assert_eq!(w.look("small"), fine());
    let s = w.mount(false);
    let ctx = rotation::Context { shared: s.shared(), moves: &*s };
    let r = rotation::run(&ctx, &rotation::Options::default(), &(), &rotation::Control::new()).unwrap();
    assert_eq!(r.outcome, rotation::Outcome::Incomplete);
    s.close().unwrap();
    drop(s);
    assert_eq!(w.look("small"), fine());
    w.others_are_fine(&[]);
}

#[test]
fn grafts_from_another_file_of_the_store() {
    let w = World::new();
    let (one, two) = (w.raw("small"), w.raw("small too"));
    let graft = |from: usize, to: usize| {
        let w = w.copy();
        w.put("small", from as u64, &two[from..to]);
        let seen = w.look("small");
        w.others_are_fine(&["small"]);
        seen
    };
    assert_eq!(graft(0, SLOTS), closed("state-auth"), "both slots");
    assert_eq!(graft(0, 1024), closed("state-auth"), "slot A, which counts");
    assert_eq!(graft(1024, SLOTS), fine(), "slot B, which does not");
    assert_eq!(graft(2048, 4096), closed("state-auth"), "both states");
    assert_eq!(graft(0, 4096), bad("block-auth", blocks_from(0, SMALL)), "the whole first page");
    let slot = with_crc([&two[..120], &one[120..1024]].concat());
    w.put("small", 0, &[&slot[..], &slot[..]].concat());
    assert_eq!(w.look("small"), closed("wrap-auth"), "a prefix, the checksum made right");
}

#[test]
fn grafts_from_another_store() {
    let (w, other) = (World::new(), World::build());
    let theirs = other.raw("small");
    w.put("small", 0, &theirs[..SLOTS]);
    assert_eq!(w.look("small"), closed("foreign-store"));
    w.put("small", 0, &theirs);
    assert_eq!(w.look("small"), closed("foreign-store"), "the whole file");
    let mut slot = theirs[..1024].to_vec();
    slot[24..40].copy_from_slice(&w.keys().store_id().0);
    let slot = with_crc(slot);
    w.put("small", 0, &[&slot[..], &slot[..]].concat());
    assert_eq!(w.look("small"), closed("kek-unknown"), "with this store's id");
    let mut slot = slot;
    slot[128..144].copy_from_slice(&w.keys().snapshot().active().unwrap().id.0);
    let slot = with_crc(slot);
    w.put("small", 0, &[&slot[..], &slot[..]].concat());
    assert_eq!(w.look("small"), closed("wrap-auth"), "and this store's KEK");
    w.others_are_fine(&["small"]);
}

#[test]
fn slots_put_back_after_a_rotation() {
    let w = World::new();
    let old = w.raw("small")[..SLOTS].to_vec();
    let retired = w.rotate(false);
    let new = w.raw("small")[..SLOTS].to_vec();
    assert_ne!(old, new);
    // Under a KEK that is retired and still there: opens, and the next rotation moves it again.
    w.put("small", 0, &old);
    assert_eq!(w.look("small"), fine());
    assert!(w.slots("small").a.is_ok_and(|s| s.kek == retired));
    // In one slot, the newer one counts.
    w.put("small", 1024, &new[1024..]);
    assert_eq!(w.look("small"), fine());
    // Once the KEK is destroyed.
    w.rotate(true);
    let newest = w.raw("small")[..SLOTS].to_vec();
    w.put("small", 0, &old);
    assert_eq!(w.look("small"), closed("kek-destroyed"));
    assert_eq!(w.check(), [(String::from_utf8(w.path("small")).unwrap(), "kek-destroyed".to_owned())]);
    w.put("small", 1024, &newest[1024..]);
    assert_eq!(w.look("small"), fine(), "one slot put back");
    w.others_are_fine(&[]);
}
