//! `docs/CLI.md` shows an example of every `--json` output; what the program prints has exactly its fields.

use super::support::{Bench, can_mount};
use serde_json::Value;
use std::fs;

/// The JSON block after the heading `### name` of `docs/CLI.md`.
fn documented(name: &str) -> Value {
    let doc = include_str!("../../../docs/CLI.md");
    let section = doc.split(&format!("\n### `{name}`\n")).nth(1).unwrap_or_else(|| panic!("no section {name}"));
    let block = section.split("```json\n").nth(1).unwrap().split("```").next().unwrap();
    serde_json::from_str(block).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Same fields, same types, in every object; `null` stands for any type, and arrays are as their first element.
fn same_shape(at: &str, doc: &Value, real: &Value) {
    match (doc, real) {
        (Value::Object(d), Value::Object(r)) => {
            let names = |m: &serde_json::Map<String, Value>| m.keys().cloned().collect::<Vec<_>>();
            // Objects keyed by ids.
            if d.keys().all(|k| k.len() == 32) && r.keys().all(|k| k.len() == 32) {
                return;
            }
            assert_eq!(names(d), names(r), "fields of {at}");
            d.iter().for_each(|(k, v)| same_shape(&format!("{at}.{k}"), v, &r[k]));
        }
        (Value::Array(d), Value::Array(r)) => {
            if let (Some(d), Some(r)) = (d.first(), r.first()) {
                same_shape(&format!("{at}[]"), d, r);
            }
        }
        (Value::Null, _) | (_, Value::Null) => {}
        _ => assert_eq!(std::mem::discriminant(doc), std::mem::discriminant(real), "type of {at}: {doc} or {real}"),
    }
}

#[track_caller]
fn check(b: &Bench, line: &str, name: &str) {
    same_shape(name, &documented(name), &b.json(line));
}

#[test]
fn output_without_a_mount_is_as_documented() {
    let b = Bench::with_store();
    check(&b, "key list back --json", "key list --json");
    check(&b, "key refresh back --json", "key refresh --json");
    check(&b, "rotate back --status --json", "rotate --status --json");
    check(&b, "rotate back --json --report report", "rotate --json");
    check(&b, "rotate back --status --json", "rotate --status --json");
    let ring = b.json("key list back --json");
    let old = ring["keks"].as_array().unwrap().iter().find(|k| k["state"] == "retired").unwrap()["id"].clone();
    let old = old.as_str().unwrap();
    check(&b, &format!("key destroy back {old} --after 7d --yes --json"), "key destroy --json");
    check(&b, &format!("key destroy back {old} --cancel --json"), "key destroy --json");
    check(&b, &format!("key destroy back {old} --yes --json"), "key destroy --json");
    check(&b, "key policy back --json", "key policy --json");
    check(&b, "key floor back none --json", "key floor --json");
    check(&b, "key export back DIR/copy --json", "key export --json");
    check(&b, "key import back DIR/copy --force --json", "key import --json");
    check(&b, "key verify-report report back --json", "key verify-report --json");
    check(&b, "key list back --json", "key list --json");
    check(&b, "speed --json", "speed --json");
    check(&b, "check back --json", "check --json");
    let s = b.json("status back --json");
    assert_eq!((&s["mounted"], &s["daemon"], &s["locked"]), (&false.into(), &Value::Null, &false.into()));
    let speed = b.json("speed --json");
    assert_eq!(speed["results"].as_array().unwrap().len(), 4);
    assert!(speed["results"].as_array().unwrap().iter().all(|r| r["seal_gb_per_s"].as_f64().unwrap() > 0.0));
}

#[test]
fn output_with_a_mount_is_as_documented() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    b.ok("init back --key keyfile:DIR/key --plaintext-names");
    b.ok("mount back mnt --audit-log DIR/audit");
    fs::write(b.path("mnt/f"), "x").unwrap();
    b.ok("rotate mnt");
    check(&b, "status mnt --json", "status --json");
    check(&b, "status back --json", "status --json");
    let status = b.json("status mnt --json");
    assert_eq!((&status["mounted"], &status["locked"]), (&true.into(), &true.into()));
    assert_eq!(status["daemon"]["pid"], b.daemon());
    assert!(status["daemon"]["memory_locked"].is_boolean());
    check(&b, "rotate mnt --dry-run --json", "rotate --json");
    check(&b, "inspect back/f --json", "inspect --json");
    check(&b, "rotate mnt --status --json", "rotate --status --json");
    check(&b, "rekey mnt --json", "rekey --json");
    check(&b, "rekey mnt --status --json", "rekey --status --json");
    check(&b, "status mnt --json", "status --json");
    b.ok("unmount mnt");
    // With something waived.
    fs::write(b.path("back/f"), [0xff; 5000]).unwrap();
    fs::write(b.path("list"), "f\n").unwrap();
    check(&b, "rotate back --waive list --json", "rotate --json");
    check(&b, "rotate back --status --json", "rotate --status --json");
    check(&b, "audit verify audit --store back --json", "audit verify --json");
}
