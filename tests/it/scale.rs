//! `docs/SCALE.md` says what the model of `examples/scale` says.

#[path = "../../examples/scale/model.rs"]
mod model;

const DOC: &str = include_str!("../../docs/SCALE.md");

#[test]
fn the_tables_of_the_document_are_what_the_model_prints() {
    let (_, rest) = DOC.split_once(model::BEGIN).expect("the document has the mark where tables begin");
    let (tables, _) = rest.split_once(model::END).expect("the document has the mark where tables end");
    let now = model::tables();
    let first = tables.lines().zip(now.lines()).find(|(a, b)| a != b);
    assert!(tables.trim() == now.trim(), "run cargo run --example scale and put it into docs/SCALE.md: {first:?}");
}

/// The prices and quotas are those of `docs/KEYS.md`, and stand there.
#[test]
fn the_document_of_key_services_has_the_prices() {
    let keys = include_str!("../../docs/KEYS.md");
    for says in [
        "10,000 requests cost 0.03 USD",
        "by default 10,000 a second",
        "cryptographic operations $0.03 per 10,000",
        "60,000 a minute means 1,000 in any second",
        "for each file 1 unwrap (old KEK external), 1 wrap, 1 proving unwrap; within one AWS key 1 re-wrap and 1 proving unwrap",
        "about 0.4 ms a call on loopback",
    ] {
        assert!(keys.contains(says), "docs/KEYS.md does not say: {says}");
    }
}

/// Whatever the quota, the model never gets more out of a service than it gives, nor out of a disk.
#[test]
fn nothing_is_faster_than_what_limits_it() {
    for p in model::PROVIDERS {
        for machines in [1, 4] {
            let r = model::steady(&p, machines, model::Client::Unlimited, 32, p.calls);
            let most = f64::from(p.quota) / f64::from(p.calls);
            assert!(r.rate <= most * 1.02, "{}: {} a second of {most}", p.name, r.rate);
            assert!(r.rate <= f64::from(model::DISK) * f64::from(machines) * 1.02);
        }
    }
}
