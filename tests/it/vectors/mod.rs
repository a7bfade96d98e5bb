//! Test vectors in `tests/vectors/*.json`: this program reads them as `docs/FORMAT.md` says. The Python reader runs the
//! same files.
//!
//! `cargo test --test it regenerate_vectors -- --ignored` writes them anew from fixed inputs; that must change nothing
//! unless the format does.

mod check;
mod generate;

use serde_json::{Value, json};
use std::path::PathBuf;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors")
}

pub(super) fn hex(b: &[u8]) -> String {
    b.iter().map(|x| format!("{x:02x}")).collect()
}

pub(super) fn unhex(v: &Value) -> Vec<u8> {
    let text = v.as_str().unwrap_or_else(|| panic!("not a string: {v}"));
    assert_eq!(text.len() % 2, 0);
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).expect("hexadecimal")).collect()
}

pub(super) fn array<const N: usize>(v: &Value) -> [u8; N] {
    unhex(v).try_into().unwrap_or_else(|_| panic!("not {N} bytes: {v}"))
}

/// What a vector's file says, as text: stable, one vector after the other.
fn file_text(kind: &str, about: &str, vectors: &[Value]) -> String {
    let mut text = serde_json::to_string_pretty(&json!({ "kind": kind, "about": about, "vectors": vectors }))
        .expect("JSON of strings and numbers");
    text.push('\n');
    text
}

#[test]
#[ignore = "writes tests/vectors/"]
fn regenerate_vectors() {
    for (kind, about, vectors) in generate::all() {
        std::fs::write(folder().join(format!("{kind}.json")), file_text(kind, about, &vectors)).unwrap();
    }
}

#[test]
fn vectors_are_those_of_the_generator() {
    for (kind, about, vectors) in generate::all() {
        let path = folder().join(format!("{kind}.json"));
        let found = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(found == file_text(kind, about, &vectors), "{kind}.json is not what the generator makes");
    }
}

#[test]
fn vectors_are_read_as_expected() {
    let mut count = 0;
    for (kind, _, _) in generate::all() {
        let text = std::fs::read_to_string(folder().join(format!("{kind}.json"))).unwrap();
        let file: Value = serde_json::from_str(&text).unwrap();
        for v in file["vectors"].as_array().unwrap() {
            let name = format!("{kind}: {}", v["name"].as_str().unwrap());
            match (check::run(kind, v), v.get("error")) {
                (Ok(got), None) => assert_eq!(got, v["expect"], "{name}"),
                (Err(code), Some(expected)) => assert_eq!(code, expected.as_str().unwrap(), "{name}"),
                (got, _) => panic!("{name}: got {got:?}"),
            }
            count += 1;
        }
    }
    assert!(count > 80, "only {count} vectors");
}
