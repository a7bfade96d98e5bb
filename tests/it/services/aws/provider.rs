//! What the provider does when all is well.

use super::super::kms_server::{ACCOUNT, REGION, alone};
use super::{Place, context};
use envelopefs::crypto::secret::Secret32;
use envelopefs::kms::{KeyPurpose, KmsError, WRAPPED_MAX, WrapContext, event};
use serde_json::json;
use std::collections::BTreeSet;

macro_rules! name {
    ($test:literal) => {
        concat!("services::aws::provider::", $test)
    };
}

#[test]
fn a_key_comes_back_only_in_its_own_context() {
    alone(name!("a_key_comes_back_only_in_its_own_context"), &[], || {
        let at = Place::new();
        let arn = at.kms.create_key();
        let (p, c, key) = (at.key(&arn), context(), Secret32::random());
        let w = p.wrap(&key, &c).unwrap();
        assert!(w.len() <= WRAPPED_MAX);
        assert!(event::take_request_id().is_some());
        assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
        // A later process.
        assert!(at.key(&arn).unwrap(&w, &c).unwrap().ct_eq(&key));
        for other in [
            WrapContext { store: [9; 16], ..c.clone() },
            WrapContext { purpose: KeyPurpose::Kek, ..c.clone() },
            WrapContext { object: [9; 16], ..c.clone() },
            WrapContext { extra: b"another slot's".to_vec(), ..c.clone() },
            WrapContext { extra: vec![], ..c.clone() },
        ] {
            assert!(matches!(p.unwrap(&w, &other), Err(KmsError::BadCiphertext(_))), "{other:?}");
        }
        let (last, mut tampered) = (w.len() - 1, w.clone());
        tampered[last] ^= 1;
        assert!(matches!(p.unwrap(&tampered, &c), Err(KmsError::BadCiphertext(_))));
        // Two wraps of one key have nothing to tell each other apart by.
        assert_ne!(p.wrap(&key, &c).unwrap(), w);
        assert_eq!(p.describe().unwrap().key_id, arn);
        assert_eq!(p.health(), Ok(()));

        // All that the service's log gets to see.
        let (mut names, mut values) = (BTreeSet::new(), BTreeSet::new());
        for call in at.kms.seen() {
            for (name, value) in call["EncryptionContext"].as_object().into_iter().flatten() {
                names.insert(name.clone());
                values.insert(value.as_str().unwrap().to_owned());
            }
        }
        let known = ["envelopefs-extra-sha256", "envelopefs-object", "envelopefs-purpose", "envelopefs-store"];
        assert_eq!(names.iter().map(String::as_str).collect::<Vec<_>>(), known);
        let opaque = |v: &String| v == "dek" || v == "kek" || v.bytes().all(|b| b.is_ascii_hexdigit());
        assert!(values.iter().all(opaque), "{values:?}");
    });
}

#[test]
fn a_request_id_is_the_services_own() {
    alone(name!("a_request_id_is_the_services_own"), &[], || {
        let at = Place::new();
        let (p, c) = (at.key(&at.kms.create_key()), context());
        let w = p.wrap(&Secret32::random(), &c).unwrap();
        for fails in [false, true] {
            let c = if fails { WrapContext { object: [9; 16], ..c.clone() } } else { c.clone() };
            let _ = event::take_request_id();
            assert_eq!(p.unwrap(&w, &c).is_err(), fails);
            let seen = at.kms.seen();
            let last = seen.last().unwrap();
            assert_eq!(
                (&last["op"], last["RequestId"].as_str()),
                (&"Decrypt".into(), event::take_request_id().as_deref())
            );
        }
    });
}

#[test]
fn wraps_by_keys_that_the_uri_does_not_allow_are_refused_without_a_call() {
    alone(name!("wraps_by_keys_that_the_uri_does_not_allow_are_refused_without_a_call"), &[], || {
        let at = Place::new();
        let (mine, other) = (at.kms.create_alias("alias/mine"), at.kms.create_key());
        let (c, key) = (context(), Secret32::random());
        let by_mine = at.key(&mine).wrap(&key, &c).unwrap();
        let by_other = at.key(&other).wrap(&key, &c).unwrap();
        // The same bytes, naming another key of the same length.
        let naming = |wrap: &[u8], old: &str, new: &str| {
            assert_eq!(old.len(), new.len());
            let at = wrap.windows(old.len()).position(|w| w == old.as_bytes()).unwrap();
            [&wrap[..at], new.as_bytes(), &wrap[at + old.len()..]].concat()
        };
        let other_account = naming(&by_mine, ACCOUNT, "444455556666");
        let other_region = naming(&by_mine, REGION, "eu-west-9");
        let refused = |uri: &str, wrap: &[u8], calls: u64| {
            let p = at.key(uri);
            at.kms.reset();
            let e = p.unwrap(wrap, &c).unwrap_err();
            assert_eq!(e.code(), "kms-bad-ciphertext", "{uri}: {e}");
            assert_eq!(p.rewrap(wrap, &c, &c).unwrap_err().code(), "kms-bad-ciphertext");
            assert_eq!(p.rewrap_due(wrap), Ok(false));
            let seen = at.kms.calls();
            assert_eq!((seen.total(), seen.of("DescribeKey")), (calls, calls), "{uri}: {seen:?}");
        };
        refused(&mine, &by_other, 0);
        refused(&mine, &other_account, 0);
        refused(&mine, &other_region, 0);
        refused(&mine, b"", 0);
        let alias_arn = format!("arn:aws:kms:{REGION}:{ACCOUNT}:alias/mine");
        refused(&alias_arn, &other_account, 0);
        refused(&alias_arn, &other_region, 0);
        // Which account an alias or an id is in has to be asked, of the operator's own service.
        let alias = format!("alias/mine?region={REGION}");
        refused(&alias, &other_account, 1);
        refused(&alias, &other_region, 1);
        let id = format!("{}?region={REGION}", mine.rsplit('/').next().unwrap());
        refused(&id, &by_other, 1);
        refused(&id, &other_account, 1);
        for uri in [&mine, &alias_arn, &alias, &id] {
            assert!(at.key(uri).unwrap(&by_mine, &c).unwrap().ct_eq(&key), "{uri}");
        }
        // A wrap that says it is by the right key and is not reaches the service, which refuses it.
        let lie = naming(&by_other, &other, &mine);
        at.kms.reset();
        let e = at.key(&mine).unwrap(&lie, &c).unwrap_err();
        assert_eq!((e.code(), at.kms.calls().of("Decrypt")), ("kms-bad-ciphertext", 1), "{e}");
        assert!(e.to_string().contains("IncorrectKeyException"), "{e}");
        assert_eq!(at.key(&mine).rewrap(&lie, &c, &c).unwrap_err().code(), "kms-bad-ciphertext");
    });
}

#[test]
fn an_alias_that_is_pointed_elsewhere_opens_old_wraps_and_asks_for_a_rewrap() {
    alone(name!("an_alias_that_is_pointed_elsewhere_opens_old_wraps_and_asks_for_a_rewrap"), &[], || {
        let at = Place::new();
        let (old, c, key) = (at.kms.create_alias("alias/a"), context(), Secret32::random());
        let uri = format!("alias/a?region={REGION}");
        let (running, w) = (at.key(&uri), at.key(&uri).wrap(&key, &c).unwrap());
        assert_eq!(running.rewrap_due(&w), Ok(false));
        let new = at.kms.create_key();
        at.kms.admin("UpdateAlias", json!({"AliasName": "alias/a", "TargetKeyId": new}));
        // A running process notices with its next look; a new one at once.
        assert_eq!(running.health(), Ok(()));
        for p in [running, at.key(&uri)] {
            assert_eq!(p.rewrap_due(&w), Ok(true));
            assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
            let moved = p.rewrap(&w, &c, &c).unwrap();
            assert_eq!(p.rewrap_due(&moved), Ok(false));
            assert!(at.key(&new).unwrap(&moved, &c).unwrap().ct_eq(&key));
            assert_eq!(at.key(&old).unwrap(&moved, &c).unwrap_err().code(), "kms-bad-ciphertext");
            assert_eq!(p.describe().unwrap().key_id, new);
        }
    });
}

#[test]
fn a_rewrap_follows_a_rotation_without_the_key_leaving_the_service() {
    alone(name!("a_rewrap_follows_a_rotation_without_the_key_leaving_the_service"), &[], || {
        let at = Place::new();
        let (arn, from) = (at.kms.create_key(), context());
        let to = WrapContext { extra: b"the next slot's prefix".to_vec(), ..from.clone() };
        let p = at.key(&arn);
        let key = Secret32::random();
        let wrapped = p.wrap(&key, &from).unwrap();
        let (generated, by_generate) = p.generate(&from).unwrap();
        assert!(p.unwrap(&by_generate, &from).unwrap().ct_eq(&generated));
        assert_eq!(p.rewrap_due(&wrapped), Ok(false));
        assert_eq!(p.rewrap_due(&by_generate), Ok(false));

        at.kms.admin("RotateKeyOnDemand", json!({"KeyId": arn}));
        let p = at.key(&arn);
        for (w, key) in [(&wrapped, &key), (&by_generate, &generated)] {
            assert_eq!(p.rewrap_due(w), Ok(true));
            assert!(p.unwrap(w, &from).unwrap().ct_eq(key), "old material still opens");
            at.kms.reset();
            let moved = p.rewrap(w, &from, &to).unwrap();
            let calls = at.kms.calls();
            assert_eq!((calls.of("ReEncrypt"), calls.total()), (1, 1), "{calls:?}");
            assert_eq!(p.rewrap_due(&moved), Ok(false));
            assert!(p.unwrap(&moved, &to).unwrap().ct_eq(key));
            assert_eq!(p.unwrap(&moved, &from).unwrap_err().code(), "kms-bad-ciphertext");
            assert_eq!(p.rewrap(w, &to, &to).unwrap_err().code(), "kms-bad-ciphertext");
        }
        assert_eq!(at.kms.seen().iter().filter(|c| c["op"] == "ReEncrypt").count(), 2);
        let last = at.kms.seen();
        let re = last.iter().find(|c| c["op"] == "ReEncrypt").unwrap();
        assert_eq!(re["SourceKeyId"], re["DestinationKeyId"]);
        assert!(!re["SourceEncryptionContext"].is_null() && !re["DestinationEncryptionContext"].is_null());
    });
}

#[test]
fn a_multi_region_key_opens_in_another_region() {
    alone(name!("a_multi_region_key_opens_in_another_region"), &[], || {
        let at = Place::new();
        let answer = at.kms.admin("CreateKey", json!({"MultiRegion": true}));
        let arn = answer["KeyMetadata"]["Arn"].as_str().unwrap().to_owned();
        at.kms.admin("ReplicateKey", json!({"KeyId": arn, "ReplicaRegion": "us-east-1"}));
        let (c, key) = (context(), Secret32::random());
        let home = at.key(&arn);
        let w = home.wrap(&key, &c).unwrap();
        let away = at.key(&format!("{arn}?region=us-east-1"));
        assert_eq!(away.describe().unwrap().key_id, arn.replace(REGION, "us-east-1"));
        assert!(away.unwrap(&w, &c).unwrap().ct_eq(&key));
        assert_eq!(away.rewrap_due(&w), Ok(false), "it is the same key");
        let by_away = away.wrap(&key, &c).unwrap();
        assert!(home.unwrap(&by_away, &c).unwrap().ct_eq(&key));
        let seen = at.kms.seen();
        let named = |op: &str| seen.iter().filter(|c| c["op"] == op).map(|c| c["KeyId"].clone()).collect::<Vec<_>>();
        assert_eq!(named("Decrypt"), [json!(arn.replace(REGION, "us-east-1")), json!(arn)]);
    });
}

#[test]
fn many_threads_share_a_connection_and_ask_for_the_alias_once() {
    alone(name!("many_threads_share_a_connection_and_ask_for_the_alias_once"), &[], || {
        let at = Place::new();
        at.kms.create_alias("alias/a");
        let p = at.key(&format!("alias/a?region={REGION}"));
        let (c, key) = (context(), Secret32::random());
        let w = p.wrap(&key, &c).unwrap();
        let p = at.key(&format!("alias/a?region={REGION}"));
        at.kms.reset();
        std::thread::scope(|t| {
            for _ in 0..8 {
                t.spawn(|| assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key)));
            }
        });
        let calls = at.kms.calls();
        assert_eq!((calls.of("DescribeKey"), calls.of("Decrypt"), calls.total()), (1, 8, 9));
    });
}
