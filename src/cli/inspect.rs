//! `inspect`: the header of a file in the backing directory in words. Needs no key, proves nothing.

use super::args::InspectArgs;
use super::output;
use crate::backing::posix::Posix;
use crate::daemon::fault::{Fault, FaultKind};
use crate::format::FORMAT_VERSION;
use crate::format::damage::Damage;
use crate::format::geometry::{Copy2, PAGE, block_count, plain_size, segment_count};
use crate::format::header::{SUITE_GCM_SIV, Slot, SlotPair, WRAP_EXTERNAL, WRAP_SEALED};
use crate::format::ids::{FileId, KekId, StoreId};
use crate::format::keyring::KekState;
use crate::format::time::rfc3339_seconds;
use crate::store::keys::Keys;
use rustix::fs::{Mode, OFlags};
use serde::Serialize;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// What a backing file shows without a key. Stable.
#[derive(Debug, Serialize)]
struct Inspection {
    file: String,
    /// Size of the backing file in bytes.
    backing_size: u64,
    /// Size of the plaintext, which follows from it.
    plain_size: u64,
    blocks: u64,
    segments: u64,
    /// Slots A and B; empty for an empty file, which has no header.
    slots: Vec<SlotView>,
    /// The slot that counts: `a` or `b`; `null` if neither is valid or the file is empty.
    authoritative: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct SlotView {
    slot: &'static str,
    /// Checksum and layout are right. Only a key can tell whether it is authentic.
    valid: bool,
    #[serde(flatten)]
    content: Content,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Content {
    Slot(SlotFields),
    Damage { code: &'static str, message: String },
}

#[derive(Debug, Serialize)]
struct SlotFields {
    version: u16,
    suite: String,
    incompatible_features: u32,
    read_only_features: u32,
    store: StoreId,
    file_id: FileId,
    sequence: u64,
    kek: KekId,
    /// `active`, `retired`, …, as the keyring above the file says it, unverified; `null` if there is none or it does
    /// not know the KEK.
    kek_state: Option<&'static str>,
    /// When the KEK was destroyed, in seconds since 1970; 0 if it was not.
    kek_destroyed: u64,
    wrap: String,
    wrapped_length: usize,
}

/// Runs the subcommand.
///
/// # Errors
/// [`FaultKind::Damage`] if neither slot is valid (after saying what is there); the file cannot be read; it is not a
/// regular file.
pub fn run(a: &InspectArgs) -> Result<(), Fault> {
    let mut view = inspect(&a.file)?;
    say_what_became_of_keks(&mut view, &a.file);
    if a.json {
        output::print_json(&view)?
    } else {
        output::print(&text(&view))?
    }
    if view.authoritative.is_none() && view.backing_size > 0 {
        let text = format!("{}: neither header slot is valid", a.file.display());
        return Err(Fault::new(FaultKind::Damage, text));
    }
    Ok(())
}

fn inspect(path: &Path) -> Result<Inspection, Fault> {
    let fail = |e: std::io::Error| Fault::io("read", path, &e);
    // A FIFO must not block, and a symbolic link is not a backing file.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(|e| fail(e.into()))?);
    let meta = file.metadata().map_err(fail)?;
    if !meta.is_file() {
        return Err(Fault::new(FaultKind::Usage, format!("{} is not a regular file", path.display())));
    }
    let mut head = Vec::new();
    file.take(PAGE).read_to_end(&mut head).map_err(fail)?;
    view(path.display().to_string(), meta.len(), &head)
        .map_err(|d| Fault::new(FaultKind::Damage, format!("{}: {d} ({})", path.display(), d.code())))
}

/// What the first page of a file of `size` bytes says.
fn view(file: String, size: u64, head: &[u8]) -> Result<Inspection, Damage> {
    let plain = plain_size(size);
    let mut v = Inspection {
        file,
        backing_size: size,
        plain_size: plain,
        blocks: block_count(plain),
        segments: if plain == 0 { 0 } else { segment_count(plain) },
        slots: Vec::new(),
        authoritative: None,
    };
    if size == 0 {
        return Ok(v);
    }
    let pair = SlotPair::decode(head)?;
    v.slots = vec![slot_view("a", &pair.a), slot_view("b", &pair.b)];
    v.authoritative = pair.authoritative().ok().map(|(copy, _)| if copy == Copy2::A { "a" } else { "b" });
    Ok(v)
}

/// Adds what the keyring of the store that the file lies in says of the KEKs, if there is one.
fn say_what_became_of_keks(v: &mut Inspection, path: &Path) {
    let Ok(path) = std::fs::canonicalize(path) else { return };
    let own = |d: &&Path| d.join(".envelopefs").is_dir();
    let ring = path.ancestors().skip(1).find(own).and_then(|d| Keys::read_keyring(&Posix::open(d).ok()?).ok());
    let Some(ring) = ring else { return };
    for s in &mut v.slots {
        let Content::Slot(f) = &mut s.content else { continue };
        if let Some(k) = ring.kek(f.kek).filter(|_| f.store == ring.store) {
            (f.kek_state, f.kek_destroyed) = (Some(state_name(k.state)), k.destroyed);
        }
    }
}

fn state_name(s: KekState) -> &'static str {
    match s {
        KekState::Pending => "pending",
        KekState::Active => "active",
        KekState::Retired => "retired",
        KekState::Destroyed => "destroyed",
    }
}

fn slot_view(slot: &'static str, s: &Result<Slot, Damage>) -> SlotView {
    match s {
        Ok(s) => SlotView { slot, valid: true, content: Content::Slot(fields(s)) },
        Err(d) => SlotView { slot, valid: false, content: Content::Damage { code: d.code(), message: d.to_string() } },
    }
}

fn fields(s: &Slot) -> SlotFields {
    SlotFields {
        version: FORMAT_VERSION,
        suite: if s.suite == SUITE_GCM_SIV { "aes-256-gcm-siv".into() } else { format!("unknown {}", s.suite) },
        incompatible_features: s.incompat,
        read_only_features: s.ro_compat,
        store: s.store,
        file_id: s.file,
        sequence: s.sequence,
        kek: s.kek,
        kek_state: None,
        kek_destroyed: 0,
        wrap: match s.wrap_suite {
            WRAP_SEALED => "sealed".into(),
            WRAP_EXTERNAL => "external".into(),
            n => format!("unknown {n}"),
        },
        wrapped_length: s.wrapped.len(),
    }
}

/// What became of the KEK, if it is not the active one.
fn fate(f: &SlotFields) -> String {
    match f.kek_state {
        None | Some("active") => String::new(),
        Some("destroyed") => format!(", destroyed at {}", rfc3339_seconds(f.kek_destroyed)),
        Some(state) => format!(", {state}"),
    }
}

fn text(v: &Inspection) -> String {
    let mut t = format!(
        "{}\n  plaintext {} bytes, {} blocks in {} segments; backing file {} bytes\n",
        v.file, v.plain_size, v.blocks, v.segments, v.backing_size
    );
    if v.slots.is_empty() {
        t.push_str("  empty: no header, no key\n");
    }
    for s in &v.slots {
        let mark = if v.authoritative == Some(s.slot) { " (counts)" } else { "" };
        match &s.content {
            Content::Damage { code, message } => {
                t.push_str(&format!("  slot {}: not valid: {message} ({code})\n", s.slot.to_uppercase()));
            }
            Content::Slot(f) => t.push_str(&format!(
                "  slot {}{mark}: format {}, {}, sequence {}\n    store {}\n    file  {}\n    KEK   {}, {}, {} bytes wrapped{}\n",
                s.slot.to_uppercase(), f.version, f.suite, f.sequence, f.store, f.file_id, f.kek, f.wrap, f.wrapped_length,
                fate(f)
            )),
        }
    }
    t
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot() -> Slot {
        Slot {
            suite: SUITE_GCM_SIV,
            incompat: 0,
            ro_compat: 0,
            store: StoreId([1; 16]),
            file: FileId([2; 16]),
            commitment: [3; 32],
            mac: [4; 32],
            sequence: 7,
            kek: KekId([5; 16]),
            wrap_suite: WRAP_SEALED,
            wrapped: vec![6; 60],
        }
    }

    #[test]
    fn both_slots_are_shown_and_the_newer_one_counts() {
        let mut head = vec![0u8; PAGE as usize];
        head[..1024].copy_from_slice(&slot().encode());
        head[1024..2048].copy_from_slice(&Slot { sequence: 8, ..slot() }.encode());
        let v = view("f".into(), PAGE + 5, &head).unwrap();
        assert_eq!((v.plain_size, v.blocks, v.segments, v.authoritative), (5, 1, 1, Some("b")));
        let t = text(&v);
        assert!(t.contains("slot B (counts): format 1, aes-256-gcm-siv, sequence 8"), "{t}");
        head[1024] ^= 1;
        let v = view("f".into(), PAGE + 5, &head).unwrap();
        assert_eq!(v.authoritative, Some("a"));
        let j = serde_json::to_value(&v).unwrap();
        assert_eq!(j["slots"][1]["valid"], false);
        assert!(j["slots"][1]["code"].is_string());
        assert_eq!(j["slots"][0]["file_id"], "02".repeat(16));
    }

    #[test]
    fn an_empty_file_has_nothing_to_show() {
        let v = view("f".into(), 0, b"").unwrap();
        assert_eq!((v.plain_size, v.segments, v.slots.len()), (0, 0, 0));
    }

    #[test]
    fn no_size_and_no_bytes_panic() {
        for size in [1, 100, 2047, 2048, 4095, 4096, 4097, u64::MAX] {
            let _ = view("f".into(), size, &vec![0xff; (size as usize).min(4096)]);
        }
    }
}
