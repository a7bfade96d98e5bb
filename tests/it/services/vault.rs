//! `vault://` against a real OpenBao server.

use super::bao::{Bao, POLICY};
use super::server::{free_port, in_the_end};
use crate::cli::support::wait_for;
use envelopefs::crypto::secret::Secret32;
use envelopefs::kms::services::{VaultAuth, VaultOptions};
use envelopefs::kms::vault::VaultKey;
use envelopefs::kms::{self, KeyProvider, KeyPurpose, KmsError, RootKeyUri, WrapContext};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The provider itself: what the guard around it remembers and tries again is tested elsewhere.
fn connect_to(uri: &str, o: &VaultOptions) -> Result<Arc<dyn KeyProvider>, KmsError> {
    Ok(Arc::new(VaultKey::connect(&RootKeyUri::parse(uri).unwrap(), o)?))
}

fn connect(o: &VaultOptions) -> Arc<dyn KeyProvider> {
    connect_to("vault://transit/k", o).unwrap()
}

/// A server with the key `k`, and a provider that may do everything with it.
fn ready() -> (Bao, Arc<dyn KeyProvider>) {
    let bao = Bao::dev();
    bao.key("k");
    let p = connect(&bao.as_root());
    (bao, p)
}

fn context() -> WrapContext {
    WrapContext { store: [1; 16], purpose: KeyPurpose::Dek, object: [2; 16], extra: vec![3; 146] }
}

/// The error, which must be one line that names what it is about.
#[track_caller]
fn error<T>(r: Result<T, KmsError>) -> KmsError {
    let Err(e) = r else { panic!("did not fail") };
    let text = e.to_string();
    assert!(!text.chars().any(char::is_control) && text.len() < 500, "{text:?}");
    e
}

macro_rules! assert_class {
    ($result:expr, $class:ident, $word:expr) => {
        match error($result) {
            KmsError::$class(text) if text.contains($word) => {}
            e => panic!("{e:?} is not {} with '{}'", stringify!($class), $word),
        }
    };
}

#[test]
fn a_key_is_bound_to_its_context() {
    let (bao, p) = ready();
    let (key, c) = (Secret32::random(), context());
    let w = p.wrap(&key, &c).unwrap();
    assert!(w.starts_with(b"vault:v1:") && w.len() == 89);
    assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
    assert_ne!(p.wrap(&key, &c).unwrap(), w, "a new nonce each time");
    let (made, wrapped) = p.generate(&c).unwrap();
    // A later process has only the configuration.
    let later = connect(&bao.as_root());
    assert!(later.unwrap(&wrapped, &c).unwrap().ct_eq(&made));
    assert!(later.unwrap(&w, &c).unwrap().ct_eq(&key));
    for other in [
        WrapContext { store: [9; 16], ..c.clone() },
        WrapContext { purpose: KeyPurpose::Kek, ..c.clone() },
        WrapContext { object: [9; 16], ..c.clone() },
        WrapContext { extra: vec![], ..c.clone() },
    ] {
        assert_class!(p.unwrap(&w, &other), BadCiphertext, "authentication failed");
        assert_class!(p.unwrap(&wrapped, &other), BadCiphertext, "authentication failed");
        assert_class!(p.rewrap(&w, &other, &other), BadCiphertext, "authentication failed");
    }
    for i in [9, 40, 80] {
        let mut changed = w.clone();
        changed[i] = if changed[i] == b'A' { b'B' } else { b'A' };
        assert_class!(p.unwrap(&changed, &c), BadCiphertext, "authentication failed");
    }
    assert_class!(p.unwrap(b"vault:v1:AAAA", &c), BadCiphertext, "not what a Vault key wraps to");
    // A version that the key has not got yet: from a store that is newer than the server's backup.
    let text = String::from_utf8(w).unwrap().replace(":v1:", ":v2:");
    assert_class!(p.unwrap(text.as_bytes(), &c), BadCiphertext, "too new");
    p.health().unwrap();
    let d = p.describe().unwrap();
    assert_eq!((d.uri.as_str(), d.key_id), ("vault://transit/k", format!("{}/v1/transit/keys/k", bao.address)));
    assert!(d.capabilities.binds_context && d.capabilities.native_rewrap && d.capabilities.remote);
}

#[test]
fn a_call_tells_the_services_id_of_the_request() {
    let (_bao, p) = ready();
    let ids: Vec<String> = (0..2)
        .map(|_| {
            p.generate(&context()).unwrap();
            kms::event::take_request_id().unwrap()
        })
        .collect();
    assert!(ids.iter().all(|i| i.len() == 36) && ids[0] != ids[1], "{ids:?}");
}

#[test]
fn only_keys_that_bind_contexts_are_used_and_none_is_made() {
    let bao = Bao::dev();
    let root = bao.as_root();
    let (key, c) = (Secret32::random(), context());
    let make = |name: &str, body: &Value| bao.ok("POST", &format!("transit/keys/{name}"), body);
    for t in ["aes128-gcm96", "aes256-gcm96", "chacha20-poly1305", "xchacha20-poly1305"] {
        make(t, &json!({"type": t, "derived": true}));
        let p = connect_to(&format!("vault://transit/{t}"), &root).unwrap();
        let w = p.wrap(&key, &c).unwrap();
        assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
        let w = p.rewrap(&w, &c, &c).unwrap();
        assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
        assert!(p.generate(&c).is_ok(), "{t}");
    }
    make("plain", &json!({"type": "aes256-gcm96"}));
    make("convergent", &json!({"type": "aes256-gcm96", "derived": true, "convergent_encryption": true}));
    make("signing", &json!({"type": "ed25519", "derived": true}));
    let good = connect_to("vault://transit/aes256-gcm96", &root).unwrap().wrap(&key, &c).unwrap();
    for (name, word) in [("plain", "derived=true"), ("convergent", "convergent"), ("signing", "ed25519")] {
        let p = connect_to(&format!("vault://transit/{name}"), &root).unwrap();
        assert_class!(p.wrap(&key, &c), Config, word);
        assert_class!(p.unwrap(&good, &c), Config, word);
        assert_class!(p.generate(&c), Config, word);
        assert_class!(p.rewrap(&good, &c, &c), Config, word);
        assert_class!(p.health(), Config, word);
        assert_class!(p.rewrap_due(&good), Config, word);
        assert_class!(p.unwrap_many(&[(&good, &c), (&good, &c)]).remove(1), Config, word);
    }
    // The root token may create: encrypt alone would make the key.
    let absent = connect_to("vault://transit/absent", &root).unwrap();
    for r in [absent.wrap(&key, &c).map(drop), absent.unwrap(&good, &c).map(drop), absent.health()] {
        assert_class!(r, NotFound, "bao write transit/keys/absent type=aes256-gcm96 derived=true");
    }
    assert_eq!(bao.api("GET", "transit/keys/absent", &Value::Null).0, 404);
    assert_class!(connect_to("vault://nowhere/k", &root).unwrap().health(), NotFound, "enable the transit engine");
}

#[test]
fn a_rotated_key_moves_wraps_on_inside_the_service() {
    let (bao, p) = ready();
    let (key, c) = (Secret32::random(), context());
    let old = p.wrap(&key, &c).unwrap();
    assert!(!p.rewrap_due(&old).unwrap());
    bao.ok("POST", "transit/keys/k/rotate", &json!({}));
    assert!(p.rewrap_due(&old).unwrap(), "found out at once");
    assert!(p.unwrap(&old, &c).unwrap().ct_eq(&key), "the version before opens");
    // Whoever moves them need not be able to unwrap: the plaintext never comes here.
    let mover = connect(&bao.with_token(&bao.token(
        r#"path "transit/keys/k" { capabilities = ["read"] }  path "transit/rewrap/k" { capabilities = ["update"] }"#,
        &json!({}),
    )));
    let new = mover.rewrap(&old, &c, &c).unwrap();
    assert!(new.starts_with(b"vault:v2:"));
    assert!(!mover.rewrap_due(&new).unwrap());
    assert_class!(mover.unwrap(&old, &c), Denied, "path \"transit/decrypt/k\" { capabilities = [\"update\"] }");
    assert!(p.unwrap(&new, &c).unwrap().ct_eq(&key));
    // To another context the key must come out and go in again.
    let to = WrapContext { object: [9; 16], ..c.clone() };
    assert_class!(mover.rewrap(&old, &c, &to), Denied, "transit/decrypt/k");
    let moved = p.rewrap(&old, &c, &to).unwrap();
    assert!(p.unwrap(&moved, &to).unwrap().ct_eq(&key));
    // What is below min_decryption_version concerns that wrap alone, and can be let in again.
    bao.configure("k", &json!({"min_decryption_version": 2}));
    for r in [p.unwrap(&old, &c).map(drop), p.rewrap(&old, &c, &c).map(drop)] {
        assert_class!(r, NotFound, "min_decryption_version");
    }
    let both = p.unwrap_many(&[(&old, &c), (&new, &c)]);
    assert!(both[1].as_ref().unwrap().ct_eq(&key));
    assert_class!(both.into_iter().next().unwrap(), NotFound, "min_decryption_version");
    bao.configure("k", &json!({"min_decryption_version": 1}));
    assert!(p.unwrap(&old, &c).unwrap().ct_eq(&key));
}

#[test]
fn a_soft_deleted_key_is_disabled_until_it_is_restored() {
    let (bao, p) = ready();
    let (key, c) = (Secret32::random(), context());
    let w = p.wrap(&key, &c).unwrap();
    bao.ok("DELETE", "transit/keys/k/soft-delete", &Value::Null);
    let fresh = connect(&bao.as_root());
    let all = [p.unwrap(&w, &c).map(drop), p.wrap(&key, &c).map(drop), p.health(), fresh.unwrap(&w, &c).map(drop)];
    for r in all.into_iter().chain(p.unwrap_many(&[(&w, &c), (&w, &c)]).into_iter().map(|r| r.map(drop))) {
        assert_class!(r, Disabled, "soft-delete-restore");
    }
    bao.ok("POST", "transit/keys/k/soft-delete-restore", &json!({}));
    for p in [p, fresh] {
        assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
        p.health().unwrap();
    }
}

#[test]
fn a_sealed_server_is_unreachable_until_it_is_unsealed() {
    let (bao, p) = ready();
    let (key, c) = (Secret32::random(), context());
    let w = p.wrap(&key, &c).unwrap();
    let mut unseal = String::new();
    wait_for("the unseal key", || {
        let log = bao.server.log();
        let found = log.split_once("Unseal Key: ").and_then(|(_, rest)| rest.split_once('\n'));
        unseal = found.map(|(key, _)| key.trim().to_owned()).unwrap_or_default();
        !unseal.is_empty()
    });
    bao.ok("POST", "sys/seal", &json!({}));
    let late = connect(&bao.as_root());
    for r in [p.unwrap(&w, &c).map(drop), p.health(), late.unwrap(&w, &c).map(drop)] {
        assert_class!(r, Unreachable, "sealed");
    }
    bao.ok("POST", "sys/unseal", &json!({"key": unseal}));
    wait_for("the server to be usable", || p.health().is_ok());
    for p in [p, late] {
        assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
    }
}

#[test]
fn a_quota_throttles_and_a_batch_is_one_request_for_a_hundred() {
    let (bao, p) = ready();
    let key = Secret32::random();
    let contexts: Vec<WrapContext> = (0..250u8).map(|i| WrapContext { object: [i; 16], ..context() }).collect();
    let mut wraps: Vec<Vec<u8>> = contexts.iter().map(|c| p.wrap(&key, c).unwrap()).collect();
    wraps[7] = b"vault:v1:AAAA".to_vec();
    wraps.swap(120, 121);
    let items: Vec<(&[u8], &WrapContext)> = wraps.iter().map(Vec::as_slice).zip(&contexts).collect();
    // One look at the key and three batches; one more is too many.
    bao.ok("POST", "sys/quotas/rate-limit/q", &json!({"path": "transit", "rate": 4, "interval": "10m"}));
    let fresh = connect(&bao.as_root());
    let results = fresh.unwrap_many(&items);
    assert_eq!(results.len(), 250);
    for (i, r) in results.into_iter().enumerate() {
        match i {
            7 => assert_class!(r, BadCiphertext, "not what a Vault key wraps to"),
            120 | 121 => assert_class!(r, BadCiphertext, "authentication failed"),
            _ => assert!(r.unwrap().ct_eq(&key), "{i}"),
        }
    }
    assert_class!(fresh.unwrap(items[0].0, items[0].1), Throttled, "quota");
    for r in fresh.unwrap_many(&items[..2]) {
        assert_class!(r, Throttled, "quota");
    }
    bao.ok("DELETE", "sys/quotas/rate-limit/q", &Value::Null);
    assert!(fresh.unwrap(items[0].0, items[0].1).is_ok());
    // The server's limit of JSON strings is what the batches are kept below.
    let many = vec![json!({"ciphertext": "vault:v1:x", "context": "x"}); 1000];
    let (status, answer) = bao.api("POST", "transit/decrypt/k", &json!({"batch_input": many}));
    assert!(status == 400 && !answer["errors"].is_null(), "{status} {answer}");
    // All of a batch failed: the status says so in spite of what was asked for.
    let wrong = [(items[0].0, items[1].1), (items[1].0, items[0].1)];
    for r in fresh.unwrap_many(&wrong) {
        assert_class!(r, BadCiphertext, "authentication failed");
    }
    assert!(fresh.unwrap_many(&[]).is_empty());
}

#[test]
fn a_policy_that_lacks_something_says_what() {
    let bao = Bao::dev();
    bao.key("k");
    let (key, c) = (Secret32::random(), context());
    let w = connect(&bao.as_root()).wrap(&key, &c).unwrap();
    let policy = |p: &str| connect(&bao.with_token(&bao.token(p, &json!({}))));
    let reader = policy(r#"path "transit/keys/k" { capabilities = ["read"] }"#);
    reader.health().unwrap();
    assert_class!(reader.wrap(&key, &c), Denied, "path \"transit/encrypt/k\" { capabilities = [\"update\"] }");
    assert_class!(reader.unwrap(&w, &c), Denied, "path \"transit/decrypt/k\"");
    assert_class!(reader.generate(&c), Denied, "path \"transit/datakey/plaintext/k\"");
    assert_class!(reader.unwrap_many(&[(&w, &c), (&w, &c)]).remove(0), Denied, "path \"transit/decrypt/k\"");
    let blind = policy(r#"path "transit/decrypt/k" { capabilities = ["update"] }"#);
    assert_class!(blind.unwrap(&w, &c), Denied, "path \"transit/keys/k\" { capabilities = [\"read\"] }");
    let full = policy(POLICY);
    assert!(full.unwrap(&w, &c).unwrap().ct_eq(&key));
    assert!(full.wrap(&key, &c).is_ok() && full.generate(&c).is_ok());
    assert!(full.rewrap(&w, &c, &c).is_ok());
}

#[test]
fn a_token_that_ended_is_read_anew_from_its_file() {
    let (bao, root) = ready();
    let (key, c) = (Secret32::random(), context());
    let w = root.wrap(&key, &c).unwrap();
    let token = bao.token(POLICY, &json!({}));
    let file = bao.secret("kept", &token);
    let p = connect(&bao.options(VaultAuth::Token { token_file: Some(file.clone()) }));
    assert!(p.unwrap(&w, &c).is_ok());
    bao.revoke(&token);
    for _ in 0..2 {
        assert_class!(p.unwrap(&w, &c), Credentials, file.to_str().unwrap());
        assert_class!(p.health(), Credentials, "put a new one there");
    }
    bao.secret("kept", "s.never-was");
    assert_class!(p.unwrap(&w, &c), Credentials, "never good");
    bao.secret("kept", &bao.token(r#"path "transit/keys/k" { capabilities = ["read"] }"#, &json!({})));
    assert_class!(p.unwrap(&w, &c), Denied, "transit/decrypt/k");
    // A good token that may do nothing is not given up for another.
    bao.secret("kept", &bao.token(POLICY, &json!({})));
    assert_class!(p.unwrap(&w, &c), Denied, "transit/decrypt/k");
    let p = connect(&bao.options(VaultAuth::Token { token_file: Some(file.clone()) }));
    assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
    // One that others can read is not used.
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let careless = connect(&bao.options(VaultAuth::Token { token_file: Some(file.clone()) }));
    assert_class!(careless.unwrap(&w, &c), Config, "chmod 600");
    std::fs::remove_file(&file).unwrap();
    assert_class!(careless.unwrap(&w, &c), Credentials, file.to_str().unwrap());
    assert!(p.unwrap(&w, &c).is_ok(), "the token at work is not looked for again");
}

#[test]
fn a_token_that_ended_is_replaced_by_a_login() {
    let (bao, root) = ready();
    let (key, c) = (Secret32::random(), context());
    let w = root.wrap(&key, &c).unwrap();
    let auth = bao.approle(&json!({"token_ttl": "1h"}));
    let p = connect(&bao.options(auth));
    for _ in 0..3 {
        assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
        assert_eq!(bao.logins("auth/approle/login").len(), 1);
        bao.revoke_logins("approle");
        assert!(bao.logins("auth/approle/login").is_empty());
    }
    // Many threads that find out at once log in once.
    assert!(p.unwrap(&w, &c).is_ok());
    bao.revoke_logins("approle");
    std::thread::scope(|s| {
        for _ in 0..8 {
            s.spawn(|| assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key)));
        }
    });
    assert_eq!(bao.logins("auth/approle/login").len(), 1);
    // The secret id is gone as well.
    let old = std::fs::read_to_string(bao.file("secret-id")).unwrap();
    bao.ok("POST", "auth/approle/role/r/secret-id/destroy", &json!({"secret_id": old}));
    assert!(p.unwrap(&w, &c).is_ok());
    bao.revoke_logins("approle");
    assert_class!(p.unwrap(&w, &c), Credentials, "invalid role or secret ID");
    bao.secret("secret-id", &bao.secret_id());
    assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
}

#[test]
fn a_token_lives_on_while_its_provider_does() {
    let (bao, root) = ready();
    let (key, c) = (Secret32::random(), context());
    let w = root.wrap(&key, &c).unwrap();
    let p = connect(&bao.options(bao.approle(&json!({"token_ttl": "3s"}))));
    assert!(p.unwrap(&w, &c).is_ok());
    let login = || bao.logins("auth/approle/login");
    // Nobody uses it, and it is renewed all the same. A machine that is too busy to do so in time begins again.
    let (mut accessor, mut ends) = (Value::Null, Vec::new());
    wait_for("three renewals of one token", || {
        let now = login();
        let Some(l) = now.first() else {
            assert!(p.unwrap(&w, &c).is_ok());
            return false;
        };
        if l["accessor"] != accessor {
            (accessor, ends) = (l["accessor"].clone(), Vec::new());
        }
        if !ends.contains(&l["expire_time"]) {
            ends.push(l["expire_time"].clone());
        }
        std::thread::sleep(Duration::from_millis(50));
        ends.len() > 3
    });
    assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
    // A renewable token from a file is renewed just so.
    let token = bao.token(POLICY, &json!({"ttl": "12s"}));
    let kept = connect(&bao.with_token(&token));
    assert!(kept.unwrap(&w, &c).is_ok());
    let end = || bao.ok("POST", "auth/token/lookup", &json!({"token": token}))["data"]["expire_time"].clone();
    let before = end();
    wait_for("its renewal", || end() != before);
    assert!(kept.unwrap(&w, &c).unwrap().ct_eq(&key));
    // Without its provider it is let go.
    drop((p, kept));
    wait_for("the token's end", || login().is_empty());
}

#[test]
fn a_token_that_has_reached_its_maximum_is_replaced_before_it_ends() {
    let (bao, root) = ready();
    let (key, c) = (Secret32::random(), context());
    let w = root.wrap(&key, &c).unwrap();
    let p = connect(&bao.options(bao.approle(&json!({"token_ttl": "3s", "token_max_ttl": "4s"}))));
    assert!(p.unwrap(&w, &c).is_ok());
    // The new token is there while the old one lives. A machine that is too busy for that begins again.
    wait_for("a replacement", || {
        let living = bao.logins("auth/approle/login").len();
        assert!(living > 0 || p.unwrap(&w, &c).is_ok());
        std::thread::sleep(Duration::from_millis(20));
        living > 1
    });
    assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
}

#[test]
fn a_namespace_is_where_the_key_is_looked_for() {
    let (bao, outside) = ready();
    bao.ok("POST", "sys/namespaces/team", &json!({}));
    let team = Some("team");
    bao.ok_in(team, "POST", "sys/mounts/transit", &json!({"type": "transit"}));
    let good = json!({"type": "aes256-gcm96", "derived": true});
    bao.ok_in(team, "POST", "transit/keys/k", &good);
    let inside = connect(&VaultOptions { namespace: Some("team/".into()), ..bao.as_root() });
    let (key, c) = (Secret32::random(), context());
    let w = inside.wrap(&key, &c).unwrap();
    assert!(inside.unwrap(&w, &c).unwrap().ct_eq(&key));
    assert_class!(outside.unwrap(&w, &c), BadCiphertext, "authentication failed");
    let nowhere = connect(&VaultOptions { namespace: Some("nobody".into()), ..bao.as_root() });
    assert_class!(nowhere.unwrap(&w, &c), Config, "namespace not found");
}

#[test]
fn tls_trusts_the_ca_that_is_configured_and_nothing_else() {
    let bao = Bao::persistent();
    bao.key("k");
    let (key, c) = (Secret32::random(), context());
    let good = bao.as_root();
    let p = connect(&good);
    let w = p.wrap(&key, &c).unwrap();
    let no_ca = VaultOptions { ca_file: None, ..good.clone() };
    let wrong_ca = VaultOptions { ca_file: Some(bao.file("stranger.pem")), ..good.clone() };
    let other_name = VaultOptions { address: Some(bao.address.replace("127.0.0.1", "localhost")), ..good.clone() };
    let no_pem = VaultOptions { ca_file: Some(bao.secret("empty.pem", "nothing")), ..good.clone() };
    let in_clear = VaultOptions { address: Some(bao.address.replace("https", "http")), ..good.clone() };
    assert_class!(connect(&no_ca).unwrap(&w, &c), Config, "ca_file");
    assert_class!(connect(&wrong_ca).unwrap(&w, &c), Config, "ca_file");
    assert_class!(connect(&other_name).unwrap(&w, &c), Config, "another name");
    assert_class!(connect(&no_pem).unwrap(&w, &c), Config, "no PEM certificate");
    assert_class!(connect(&in_clear).unwrap(&w, &c), Config, "HTTP request to an HTTPS server");
    assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));

    // Logging in with a client certificate.
    bao.ok("POST", "sys/auth/cert", &json!({"type": "cert"}));
    bao.ok("POST", "sys/policies/acl/host", &json!({"policy": POLICY}));
    let ca = std::fs::read_to_string(bao.file("ca.pem")).unwrap();
    bao.ok("POST", "auth/cert/certs/host", &json!({"certificate": ca, "token_policies": "host", "token_ttl": "6s"}));
    let with = |cert: &str, key: &str, role: &str| {
        let auth = VaultAuth::TlsCert {
            cert_file: bao.file(cert),
            key_file: bao.file(key),
            role: Some(role.into()),
            mount: None,
        };
        connect(&bao.options(auth))
    };
    let host = with("client.pem", "client.key", "host");
    assert!(host.unwrap(&w, &c).unwrap().ct_eq(&key));
    let login = || bao.logins("auth/cert/login");
    // A machine that is too busy to renew it in time begins again.
    let mut ends = BTreeMap::new();
    wait_for("a renewal over the same certificate", || {
        let now = login();
        assert!(!now.is_empty() || host.unwrap(&w, &c).is_ok());
        now.iter().any(|l| {
            ends.entry(l["accessor"].to_string()).or_insert_with(|| l["expire_time"].clone()) != &l["expire_time"]
        })
    });
    assert_class!(with("stranger.pem", "stranger.key", "host").unwrap(&w, &c), Credentials, "cert");
    assert_class!(with("client.pem", "client.key", "nobody").unwrap(&w, &c), Credentials, "cert");
    assert_class!(with("client.pem", "stranger.key", "host").unwrap(&w, &c), Credentials, "client.pem");
    assert_class!(with("client.pem", "absent.key", "host").unwrap(&w, &c), Credentials, "absent.key");
    assert_class!(with("client.pem", "ca.pem", "host").unwrap(&w, &c), Config, "chmod 600");
}

#[test]
fn a_server_that_was_killed_and_started_again_is_used_again() {
    let mut bao = Bao::persistent();
    bao.key("k");
    let (key, c) = (Secret32::random(), context());
    let p = connect(&bao.options(bao.approle(&json!({"token_ttl": "1h"}))));
    let w = p.wrap(&key, &c).unwrap();
    for _ in 0..2 {
        bao.server.kill();
        assert_class!(p.unwrap(&w, &c), Unreachable, "refused");
        assert_class!(p.health(), Unreachable, "refused");
        bao.restart();
        assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key), "with the token and the connections from before");
    }
}

#[test]
fn a_server_that_does_not_answer_is_not_waited_for() {
    let (bao, p) = ready();
    let (key, c) = (Secret32::random(), context());
    let w = p.wrap(&key, &c).unwrap();
    let limits = |o| VaultOptions { connect_timeout_ms: Some(300), attempt_timeout_ms: Some(600), ..o };
    let (warm, cold) = (connect(&limits(bao.as_root())), connect(&limits(bao.as_root())));
    in_the_end(|| warm.health());
    bao.server.freeze();
    for q in [&warm, &cold] {
        let begin = Instant::now();
        assert_class!(q.unwrap(&w, &c), Unreachable, "no answer in time");
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
    // Eight at once do not wait one after the other for a login that does not come.
    let begin = Instant::now();
    std::thread::scope(|s| {
        for _ in 0..8 {
            s.spawn(|| assert_class!(cold.unwrap(&w, &c), Unreachable, "no answer in time"));
        }
    });
    assert!(begin.elapsed() < Duration::from_secs(20));
    bao.server.thaw();
    for q in [&warm, &cold] {
        assert!(in_the_end(|| q.unwrap(&w, &c)).ct_eq(&key));
    }
    let nobody = VaultOptions { address: Some(format!("http://127.0.0.1:{}", free_port())), ..bao.as_root() };
    assert_class!(connect(&nobody).unwrap(&w, &c), Unreachable, "refused");
}

/// Answers every request with `answer` and counts them.
fn answering(answer: String) -> (String, Arc<std::sync::atomic::AtomicU32>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let count = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let counter = count.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            counter.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let mut request = Vec::new();
            let mut room = [0; 4096];
            while !request.windows(4).any(|w| w == b"\r\n\r\n") {
                let n = stream.read(&mut room).unwrap();
                request.extend_from_slice(&room[..n]);
            }
            let text = String::from_utf8_lossy(&request).to_lowercase();
            let length =
                text.split("content-length: ").nth(1).map_or(0, |t| t.split('\r').next().unwrap().parse().unwrap());
            let mut left: usize = length + text.find("\r\n\r\n").unwrap() + 4 - request.len();
            while left > 0 {
                left -= stream.read(&mut room).unwrap();
            }
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    (address, count)
}

fn http(status: &str, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n{body}", body.len())
}

#[test]
fn a_standby_that_sends_elsewhere_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let token_file = dir.path().join("token");
    std::fs::write(&token_file, "s.secret").unwrap();
    std::fs::set_permissions(&token_file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let at = |address: String| {
        let auth = VaultAuth::Token { token_file: Some(token_file.clone()) };
        connect(&VaultOptions { address: Some(address), attempt_timeout_ms: Some(20_000), auth, ..Default::default() })
    };
    let (elsewhere, arrived) = answering(http("200 OK", "", "{}"));
    let (standby, asked) =
        answering(http("307 Temporary Redirect", &format!("Location: {elsewhere}/v1/transit/keys/k\r\n"), ""));
    assert_class!(at(standby).health(), Unreachable, "active node");
    assert_eq!(asked.load(std::sync::atomic::Ordering::SeqCst), 1);
    assert_eq!(arrived.load(std::sync::atomic::Ordering::SeqCst), 0, "the token goes to the configured host only");
    // What is no Vault at all.
    for (answer, word) in [
        (http("200 OK", "", "<html>hello</html>"), "not Vault"),
        (http("200 OK", "", "{\"data\":{}}"), "not Vault"),
        (http("502 Bad Gateway", "", "<html>bad\ngateway</html>"), "502"),
        (http("200 OK", "", &"x".repeat(3_000_000)), "more than"),
        ("garbage\r\n\r\n".into(), ""),
        (String::new(), ""),
    ] {
        assert_class!(at(answering(answer).0).health(), Unreachable, word);
    }
}

/// The part of Kubernetes that Vault asks: says yes to every service account's token.
fn token_review() -> String {
    let user = json!({"username": "system:serviceaccount:default:envelopefs", "uid": "u", "groups": []});
    let body = json!({"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1",
        "status": {"authenticated": true, "user": user}});
    answering(http("201 Created", "Content-Type: application/json\r\n", &body.to_string())).0
}

#[test]
fn a_pod_logs_in_with_its_service_account() {
    use base64::Engine;
    let bao = Bao::persistent();
    bao.key("k");
    bao.ok("POST", "sys/auth/kubernetes", &json!({"type": "kubernetes"}));
    bao.ok("POST", "sys/policies/acl/pod", &json!({"policy": POLICY}));
    let ca = std::fs::read_to_string(bao.file("ca.pem")).unwrap();
    let config = json!({"kubernetes_host": token_review(), "disable_local_ca_jwt": true, "kubernetes_ca_cert": ca});
    bao.ok("POST", "auth/kubernetes/config", &config);
    let role = json!({"bound_service_account_names": "envelopefs", "bound_service_account_namespaces": "default",
        "token_policies": "pod", "token_ttl": "1h"});
    bao.ok("POST", "auth/kubernetes/role/store", &role);
    let part = |v: &Value| base64::prelude::BASE64_URL_SAFE_NO_PAD.encode(v.to_string());
    let jwt = |name: &str| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let claims = json!({"iss": "kubernetes/serviceaccount", "sub": format!("system:serviceaccount:default:{name}"),
            "iat": now - 60, "nbf": now - 60, "exp": now + 3600,
            "kubernetes.io/serviceaccount/namespace": "default",
            "kubernetes.io/serviceaccount/service-account.name": name,
            "kubernetes.io/serviceaccount/service-account.uid": "u"});
        format!("{}.{}.{}", part(&json!({"alg": "RS256", "kid": "a"})), part(&claims), part(&json!("unsigned")))
    };
    let (key, c) = (Secret32::random(), context());
    let file = bao.secret("jwt", &jwt("envelopefs"));
    // Kubernetes makes it readable for everybody in the pod.
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let with = |role: &str| {
        let auth = VaultAuth::Kubernetes { role: role.into(), jwt_file: Some(file.clone()), mount: None };
        connect(&bao.options(auth))
    };
    let p = with("store");
    let w = p.wrap(&key, &c).unwrap();
    assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
    bao.revoke_logins("kubernetes");
    assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key), "logged in again");
    assert_class!(with("other").unwrap(&w, &c), Credentials, "auth/kubernetes/login");
    bao.secret("jwt", &jwt("stranger"));
    assert_class!(with("store").unwrap(&w, &c), Credentials, "auth/kubernetes/login");
}
