//! `gcp-kms:` root keys against our own fake of the service (`tests/support/gcp_kms_server.py`): what passes here proves
//! the client's side, not how the service behaves.

use super::server::{Server, free_port, in_the_end, support, venv};
use crate::cli::support::{Bench, can_mount, wait_for};
use envelopefs::crypto::secret::Secret32;
use envelopefs::kms::gcp::GcpKms;
use envelopefs::kms::services::GcpOptions;
use envelopefs::kms::{KeyProvider, KeyPurpose, KmsError, RootKeyUri, WRAPPED_MAX, WrapContext};
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

const RING: &str = "projects/test-project/locations/europe-west3/keyRings/ring";

/// The fake, with a key `k`.
pub struct Fake {
    pub server: Server,
    port: u16,
    dir: tempfile::TempDir,
}

impl Fake {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        let fake = Self { server: Self::spawn(&dir, port), port, dir };
        fake.make("k");
        fake
    }

    fn spawn(dir: &tempfile::TempDir, port: u16) -> Server {
        let args = [support("gcp_kms_server.py").display().to_string(), "--port".into(), port.to_string()];
        let state = ["--state".into(), dir.path().join("state").display().to_string()];
        let log = dir.path().join("log");
        Server::start(&venv("python"), args.into_iter().chain(state), &[], &log, || {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        })
    }

    fn restart(&mut self) {
        self.server.kill();
        self.server = Self::spawn(&self.dir, self.port);
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let mut s = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let length = body.len();
        write!(s, "{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
        let mut answer = String::new();
        s.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{method} {path}: {answer}");
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    }

    fn make(&self, key: &str) {
        let body = json!({"purpose": "ENCRYPT_DECRYPT"});
        self.ask("POST", &format!("/v1/{RING}/cryptoKeys?cryptoKeyId={key}"), &body);
    }

    /// Adds a version and makes it the primary one.
    fn rotate(&self, key: &str) {
        let path = format!("/v1/{RING}/cryptoKeys/{key}");
        let made = self.ask("POST", &format!("{path}/cryptoKeyVersions"), &json!({}));
        let number = made["name"].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
        self.ask("POST", &format!("{path}:updatePrimaryVersion"), &json!({"cryptoKeyVersionId": number}));
    }

    fn state(&self, key: &str, version: u64, state: &str) {
        let path = format!("/v1/{RING}/cryptoKeys/{key}/cryptoKeyVersions/{version}?updateMask=state");
        self.ask("PATCH", &path, &json!({"state": state}));
    }

    /// Lets the next calls fail.
    pub fn fault(&self, fault: Value) {
        self.ask("POST", "/__fault", &fault);
    }

    /// Forgets faults and counts.
    pub fn reset(&self) {
        self.ask("POST", "/__reset", &Value::Null);
    }

    /// Number of calls of one kind since the last reset.
    pub fn calls(&self, operation: &str) -> u64 {
        self.ask("GET", "/__stats", &Value::Null)["calls"][operation].as_u64().unwrap_or(0)
    }

    /// A header of the last request.
    fn header(&self, name: &str) -> String {
        self.ask("GET", "/__stats", &Value::Null)["last"][name].as_str().unwrap_or_default().to_owned()
    }

    /// For the configuration.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn options(&self) -> GcpOptions {
        let endpoint = Some(self.endpoint());
        GcpOptions { endpoint, anonymous: true, ..GcpOptions::default() }
    }

    fn provider(&self) -> Arc<dyn KeyProvider> {
        open(self.options()).unwrap()
    }

    /// A configuration that leads to it.
    fn configure(&self, b: &Bench, more: &str) {
        let text = format!("[services.gcp-kms]\nendpoint = \"{}\"\nanonymous = true\n{more}", self.endpoint());
        fs::write(b.path("config.toml"), text).unwrap();
    }
}

pub fn uri(key: &str) -> String {
    format!("gcp-kms://{RING}/cryptoKeys/{key}")
}

/// The provider itself, without what is put around it for daily use.
fn open(gcp: GcpOptions) -> Result<Arc<dyn KeyProvider>, KmsError> {
    open_key("k", &gcp)
}

fn open_key(key: &str, gcp: &GcpOptions) -> Result<Arc<dyn KeyProvider>, KmsError> {
    Ok(Arc::new(GcpKms::open(&RootKeyUri::parse(&uri(key)).unwrap(), gcp)?))
}

fn context() -> WrapContext {
    WrapContext { store: [1; 16], purpose: KeyPurpose::Dek, object: [2; 16], extra: vec![3; 146] }
}

#[track_caller]
fn fails<T>(r: Result<T, KmsError>, want: &str, text: &str) {
    let e = r.err().expect("must fail");
    assert_eq!(e.code(), want, "{e}");
    let said = e.to_string();
    assert!(said.contains(text) && !said.contains('\n'), "{said}");
}

#[test]
fn a_key_goes_there_and_back_only_in_its_context() {
    let fake = Fake::start();
    let (p, key, c) = (fake.provider(), Secret32::random(), context());
    let w = p.wrap(&key, &c).unwrap();
    assert!(w.len() <= WRAPPED_MAX && w.starts_with(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]));
    assert_ne!(w, p.wrap(&key, &c).unwrap());
    // By another provider too, as after a restart of the program.
    assert!(fake.provider().unwrap(&w, &c).unwrap().ct_eq(&key));
    for other in [
        WrapContext { store: [9; 16], ..c.clone() },
        WrapContext { purpose: KeyPurpose::Kek, ..c.clone() },
        WrapContext { object: [9; 16], ..c.clone() },
        WrapContext { extra: vec![], ..c.clone() },
    ] {
        fails(p.unwrap(&w, &other), "kms-bad-ciphertext", "Decryption failed");
    }
    let mut changed = w.clone();
    *changed.last_mut().unwrap() ^= 1;
    fails(p.unwrap(&changed, &c), "kms-bad-ciphertext", &uri("k"));
    for not_ours in [&b""[..], &w[..11], &w[..12], &[&[2], &w[1..]].concat()] {
        fails(p.unwrap(not_ours, &c), "kms-bad-ciphertext", "not wrapped by a key of Cloud KMS");
    }
    let (made, w) = p.generate(&c).unwrap();
    assert!(p.unwrap(&w, &c).unwrap().ct_eq(&made));
    let d = p.describe().unwrap();
    assert_eq!((d.uri, d.key_id), (uri("k"), format!("{RING}/cryptoKeys/k")));
    assert!(d.capabilities.remote && d.capabilities.binds_context && !d.capabilities.native_rewrap);
    assert_eq!(fake.header("user-agent"), concat!("envelopefs/", env!("CARGO_PKG_VERSION")));
    assert_eq!(fake.header("authorization"), "");
}

#[test]
fn checksums_are_checked_both_ways_and_nothing_damaged_is_used() {
    let fake = Fake::start();
    let (p, key, c) = (fake.provider(), Secret32::random(), context());
    let w = p.wrap(&key, &c).unwrap();
    for (fault, text) in [
        (json!({"corrupt": "ciphertextCrc32c"}), "does not fit its checksum"),
        (json!({"corrupt": "ciphertext"}), "does not fit its checksum"),
        (json!({"forget_crc": true}), "does not fit its checksum"),
        (json!({"ignore_crc": "plaintext"}), "did not check"),
        (json!({"ignore_crc": "aad"}), "did not check"),
        // The service finds out itself.
        (json!({"damage_request": "plaintext"}), "plaintextCrc32c"),
        (json!({"damage_request": "aad"}), "additionalAuthenticatedDataCrc32c"),
    ] {
        let mut fault = fault;
        fault["op"] = "encrypt".into();
        fault["count"] = 1.into();
        fake.fault(fault);
        fails(p.wrap(&key, &c), "kms-unreachable", text);
    }
    for (fault, text) in [
        (json!({"corrupt": "plaintextCrc32c"}), "does not fit its checksum"),
        (json!({"corrupt": "plaintext"}), "does not fit its checksum"),
        (json!({"forget_crc": true}), "does not fit its checksum"),
        (json!({"damage_request": "ciphertext"}), "ciphertextCrc32c"),
        (json!({"damage_request": "aad"}), "additionalAuthenticatedDataCrc32c"),
    ] {
        let mut fault = fault;
        fault["op"] = "decrypt".into();
        fault["count"] = 1.into();
        fake.fault(fault);
        fails(p.unwrap(&w, &c), "kms-unreachable", text);
    }
    assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key), "and after that it goes on");
}

#[test]
fn an_answer_by_another_key_is_refused() {
    let fake = Fake::start();
    let (p, c) = (fake.provider(), context());
    for name in [
        format!("{RING}/cryptoKeys/other/cryptoKeyVersions/1"),
        format!("{RING}/cryptoKeys/k2/cryptoKeyVersions/1"),
        "projects/evil/locations/europe-west3/keyRings/ring/cryptoKeys/k/cryptoKeyVersions/1".into(),
        format!("{RING}/cryptoKeys/k"),
    ] {
        fake.fault(json!({"op": "encrypt", "count": 1, "name": name}));
        fails(p.wrap(&Secret32::random(), &c), "kms-config", "not by a version of this key");
    }
    fake.fault(json!({"op": "get", "count": 1, "name": format!("{RING}/cryptoKeys/other")}));
    fails(p.health(), "kms-config", "another key");
}

#[test]
fn a_new_primary_version_makes_old_wraps_due_for_a_rewrap() {
    let fake = Fake::start();
    let (p, key, c) = (fake.provider(), Secret32::random(), context());
    let old = p.wrap(&key, &c).unwrap();
    assert!(!p.rewrap_due(&old).unwrap());
    fake.rotate("k");
    // What an earlier answer said is believed for a while; a decryption tells better.
    assert!(p.unwrap(&old, &c).unwrap().ct_eq(&key));
    assert!(p.rewrap_due(&old).unwrap());
    assert_eq!(fake.calls("get"), 0, "all of this was learned on the way");
    // To another context, as the move of a slot does.
    let to = WrapContext { extra: vec![4; 146], ..c.clone() };
    let new = p.rewrap(&old, &c, &to).unwrap();
    assert_eq!(new[4..12], [2, 0, 0, 0, 0, 0, 0, 0]);
    assert!(!p.rewrap_due(&new).unwrap() && p.rewrap_due(&old).unwrap());
    assert!(p.unwrap(&new, &to).unwrap().ct_eq(&key));
    // A provider that has seen nothing yet asks once, and then knows for both.
    let fresh = fake.provider();
    assert!(fresh.rewrap_due(&old).unwrap() && !fresh.rewrap_due(&new).unwrap());
    assert_eq!(fake.calls("get"), 1);
    fails(p.rewrap_due(b"x"), "kms-bad-ciphertext", "not wrapped by a key of Cloud KMS");
}

#[test]
fn states_of_versions_are_told_apart() {
    let fake = Fake::start();
    let (p, key, c) = (fake.provider(), Secret32::random(), context());
    let first = p.wrap(&key, &c).unwrap();
    fake.rotate("k");
    let second = p.wrap(&key, &c).unwrap();
    // The old version: the key goes on, only what it wrapped does not open.
    fake.state("k", 1, "DISABLED");
    fails(p.unwrap(&first, &c), "kms-disabled", "gcloud kms keys versions enable");
    fake.state("k", 1, "DESTROY_SCHEDULED");
    fails(p.unwrap(&first, &c), "kms-disabled", "gcloud kms keys versions restore");
    fake.state("k", 1, "DESTROYED");
    fails(p.unwrap(&first, &c), "kms-not-found", "version 1 is destroyed");
    assert!(p.unwrap(&second, &c).unwrap().ct_eq(&key));
    p.health().unwrap();
    // The primary version: nothing is wrapped any more, and health says why.
    for (state, text) in [
        ("DISABLED", "gcloud kms keys versions enable"),
        ("DESTROY_SCHEDULED", "gcloud kms keys versions restore"),
        ("DESTROYED", "make another version the primary one"),
    ] {
        fake.state("k", 2, state);
        fails(p.health(), "kms-disabled", text);
        fails(p.wrap(&key, &c), "kms-disabled", text);
    }
    fake.state("k", 2, "ENABLED");
    p.health().unwrap();
    assert!(p.unwrap(&second, &c).unwrap().ct_eq(&key));
    // No key at all, and one for another purpose.
    let other = |key: &str| open_key(key, &fake.options()).unwrap();
    fails(other("none").health(), "kms-not-found", "cryptoKeys/none not found");
    fails(other("none").wrap(&key, &c), "kms-not-found", "cryptoKeys/none not found");
    let body = json!({"purpose": "ASYMMETRIC_SIGN"});
    fake.ask("POST", &format!("/v1/{RING}/cryptoKeys?cryptoKeyId=signer"), &body);
    fails(other("signer").health(), "kms-config", "--purpose=encryption");
}

#[test]
fn every_class_of_failure_is_told_and_passes() {
    let fake = Fake::start();
    let (p, key, c) = (fake.provider(), Secret32::random(), context());
    let w = p.wrap(&key, &c).unwrap();
    for (fault, want, text) in [
        (json!({"status": 429, "message": "Quota exceeded for quota metric"}), "kms-throttled", "Quota exceeded"),
        (json!({"status": 403}), "kms-denied", "roles/cloudkms.cryptoKeyEncrypterDecrypter"),
        (json!({"status": 401}), "kms-credentials", "UNAUTHENTICATED"),
        (json!({"status": 404}), "kms-not-found", "NOT_FOUND"),
        (json!({"status": 400, "message": "Decryption failed: x"}), "kms-bad-ciphertext", "Decryption failed"),
        (json!({"status": 400, "code": "FAILED_PRECONDITION"}), "kms-disabled", "injected"),
        (json!({"status": 500}), "kms-unreachable", "INTERNAL"),
        (json!({"status": 503}), "kms-unreachable", "UNAVAILABLE"),
        (json!({"status": 504}), "kms-unreachable", "DEADLINE_EXCEEDED"),
        (json!({"status": 502, "plain": true}), "kms-unreachable", "HTTP status 502"),
        (json!({"status": 429, "plain": true}), "kms-throttled", "HTTP status 429"),
        (json!({"status": 404, "plain": true}), "kms-config", "check endpoint"),
        (json!({"drop": true}), "kms-unreachable", &uri("k")),
        (json!({"garbage": true}), "kms-unreachable", "not one of Cloud KMS"),
    ] {
        let mut fault = fault;
        fault["op"] = "decrypt".into();
        fault["count"] = 1.into();
        fake.reset();
        fake.fault(fault);
        fails(p.unwrap(&w, &c), want, text);
        assert_eq!(fake.calls("decrypt"), 1, "{want}: one attempt, retries are made elsewhere");
        assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key), "{want}");
    }
}

#[test]
fn a_redirect_is_not_followed() {
    let (fake, other) = (Fake::start(), Fake::start());
    let location = format!("http://127.0.0.1:{}/v1/{RING}/cryptoKeys/k:encrypt", other.port);
    fake.fault(json!({"op": "encrypt", "count": 1, "status": 307, "plain": true, "location": location}));
    fails(fake.provider().wrap(&Secret32::random(), &context()), "kms-config", "HTTP status 307");
    assert_eq!(other.calls("encrypt"), 0);
}

#[test]
fn a_frozen_server_holds_nobody_for_longer_than_configured() {
    let fake = Fake::start();
    let (key, c) = (Secret32::random(), context());
    let p = open(GcpOptions { timeout_ms: Some(300), ..fake.options() }).unwrap();
    let w = in_the_end(|| p.wrap(&key, &c));
    fake.server.freeze();
    // Both with the connection that is there and with new ones.
    for _ in 0..2 {
        let begin = Instant::now();
        fails(p.unwrap(&w, &c), "kms-unreachable", "in time");
        fails(p.health(), "kms-unreachable", "in time");
        let took = begin.elapsed();
        assert!(took >= Duration::from_millis(600) && took < Duration::from_secs(20), "{took:?}");
    }
    fake.server.thaw();
    assert!(in_the_end(|| p.unwrap(&w, &c)).ct_eq(&key));
}

#[test]
fn a_server_that_was_away_is_used_again() {
    let mut fake = Fake::start();
    let (p, key, c) = (fake.provider(), Secret32::random(), context());
    let w = p.wrap(&key, &c).unwrap();
    fake.server.kill();
    fails(p.unwrap(&w, &c), "kms-unreachable", &uri("k"));
    fails(p.wrap(&key, &c), "kms-unreachable", &uri("k"));
    fails(p.health(), "kms-unreachable", &uri("k"));
    fake.restart();
    assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
    p.health().unwrap();
}

#[test]
fn health_does_without_the_right_to_read_the_key() {
    let fake = Fake::start();
    let (p, c) = (fake.provider(), context());
    let w = p.wrap(&Secret32::random(), &c).unwrap();
    fake.reset();
    fake.fault(json!({"op": "get", "count": 1000, "status": 403}));
    // The role that lets a caller encrypt and decrypt is enough; the refusal is remembered.
    for n in 1..=3 {
        p.health().unwrap();
        assert_eq!((fake.calls("get"), fake.calls("encrypt"), fake.calls("decrypt")), (1, n, 0));
    }
    fake.state("k", 1, "DISABLED");
    fails(p.health(), "kms-disabled", "gcloud kms keys versions enable");
    // A caller who may do neither is denied, and versions are found out all the same.
    fake.state("k", 1, "ENABLED");
    fake.rotate("k");
    fake.fault(json!({"op": "encrypt", "count": 1, "status": 403}));
    fails(fake.provider().health(), "kms-denied", "PERMISSION_DENIED");
    assert!(fake.provider().rewrap_due(&w).unwrap());
}

#[test]
fn eight_threads_and_a_runtimes_own_thread_may_call() {
    let fake = Fake::start();
    let (p, c) = (fake.provider(), context());
    std::thread::scope(|s| {
        for n in 0..8u8 {
            let (p, c) = (&p, WrapContext { object: [n; 16], ..c.clone() });
            s.spawn(move || {
                for _ in 0..20 {
                    let key = Secret32::random();
                    let w = p.wrap(&key, &c).unwrap();
                    assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
                }
            });
        }
    });
    assert_eq!((fake.calls("encrypt"), fake.calls("decrypt")), (160, 160));
    let inside = tokio::runtime::Builder::new_current_thread().build().unwrap();
    inside.block_on(async {
        let p = fake.provider();
        p.health().unwrap();
        drop(p);
    });
}

/// The JSON of a service account with a key of its own.
fn service_account(at: &Path) -> Value {
    let script = "from cryptography.hazmat.primitives.asymmetric import rsa\n\
                  from cryptography.hazmat.primitives import serialization as s\n\
                  k = rsa.generate_private_key(65537, 2048)\n\
                  print(k.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()).decode())";
    let o = Command::new(venv("python")).args(["-c", script]).output().unwrap();
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    let account = json!({
        "type": "service_account", "project_id": "test-project", "private_key_id": "1",
        "client_email": "envelopefs@test-project.iam.gserviceaccount.com",
        "private_key": String::from_utf8(o.stdout).unwrap(), "token_uri": "http://127.0.0.1:1/token",
    });
    write_secret(at, &account);
    account
}

fn write_secret(at: &Path, json: &Value) {
    fs::write(at, json.to_string()).unwrap();
    fs::set_permissions(at, fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn a_service_account_signs_for_this_service_only_and_logs_in_anew_once() {
    use base64::Engine;
    let fake = Fake::start();
    let file = fake.dir.path().join("account.json");
    service_account(&file);
    let p = open(GcpOptions {
        anonymous: false,
        credentials_file: Some(file),
        quota_project: Some("billing-project".into()),
        ..fake.options()
    })
    .unwrap();
    let (key, c) = (Secret32::random(), context());
    let w = p.wrap(&key, &c).unwrap();
    assert_eq!(fake.header("x-goog-user-project"), "billing-project");
    let authorization = fake.header("authorization");
    let claims = authorization.strip_prefix("Bearer ").unwrap().split('.').nth(1).unwrap();
    let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(claims).unwrap();
    let claims: Value = serde_json::from_slice(&claims).unwrap();
    assert_eq!(claims["scope"], "https://www.googleapis.com/auth/cloudkms");
    assert_eq!(claims["iss"], "envelopefs@test-project.iam.gserviceaccount.com");
    // A token that is not accepted any more is replaced, once.
    fake.reset();
    fake.fault(json!({"op": "decrypt", "count": 1, "status": 401}));
    assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
    assert_eq!(fake.calls("decrypt"), 2);
    fake.fault(json!({"op": "decrypt", "count": 2, "status": 401}));
    fails(p.unwrap(&w, &c), "kms-credentials", "UNAUTHENTICATED");
    assert_eq!(fake.calls("decrypt"), 4);
}

#[test]
fn credentials_that_cannot_be_used_say_why() {
    let fake = Fake::start();
    let file = fake.dir.path().join("account.json");
    let with = |file: &Path| {
        open(GcpOptions {
            anonymous: false,
            credentials_file: Some(file.to_owned()),
            credentials_timeout_ms: Some(2000),
            ..fake.options()
        })
    };
    fails(with(&file), "kms-credentials", "No such file");
    fs::write(&file, "{").unwrap();
    fails(with(&file), "kms-credentials", "not JSON");
    let mut account = service_account(&file);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    fails(with(&file), "kms-credentials", "chmod 600");
    // What shows only when a token is needed, and is mended in the file while the program runs.
    let good = account["private_key"].take();
    account["private_key"] = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n".into();
    write_secret(&file, &account);
    let p = with(&file).unwrap();
    fails(p.health(), "kms-credentials", "no access token");
    account["private_key"] = good;
    write_secret(&file, &account);
    in_the_end(|| p.health());
    // A token service that does not answer is an outage, not a lack of credentials.
    let nobody = format!("http://127.0.0.1:{}/token", free_port());
    let subject = fake.dir.path().join("subject");
    fs::write(&subject, "token").unwrap();
    let external = json!({
        "type": "external_account", "audience": "//iam.googleapis.com/x", "token_url": nobody,
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt", "credential_source": {"file": subject},
    });
    fs::write(&file, external.to_string()).unwrap();
    fails(with(&file).unwrap().health(), "kms-unreachable", "no access token");
    assert_eq!(fake.calls("encrypt") + fake.calls("decrypt"), 0);
}

#[test]
fn an_endpoint_that_would_leak_is_refused_before_anything_is_sent() {
    let at = |endpoint: &str| GcpOptions { endpoint: Some(endpoint.into()), ..GcpOptions::default() };
    for (o, text) in [
        (at("http://kms.example"), "in clear"),
        (at("https://user@kms.example"), "nothing else"),
        (GcpOptions { anonymous: true, ..at("https://kms.example") }, "loopback"),
        (GcpOptions { anonymous: true, ..GcpOptions::default() }, "loopback"),
        (GcpOptions { timeout_ms: Some(1), ..GcpOptions::default() }, "timeout_ms"),
    ] {
        fails(open(o), "kms-config", text);
    }
    assert!(open(GcpOptions { allow_http: true, ..at("http://kms.example") }).is_ok());
    // TLS towards something that does not speak it.
    let fake = Fake::start();
    let p = open(GcpOptions { endpoint: Some(format!("https://127.0.0.1:{}", fake.port)), ..fake.options() }).unwrap();
    fails(p.health(), "kms-unreachable", &uri("k"));
}

/// TLS is set up without a default provider of the process, and trusts what the system trusts.
#[test]
fn tls_works_and_a_certificate_of_nobody_known_is_refused() {
    let fake = Fake::start();
    let b = Bench::new();
    let port = free_port();
    let args = [
        support("gcp_kms_server.py").display().to_string(),
        "--port".into(),
        port.to_string(),
        "--state".into(),
        fake.dir.path().join("state").display().to_string(),
        "--tls".into(),
        fake.dir.path().display().to_string(),
    ];
    let log = fake.dir.path().join("tls-log");
    let _tls = Server::start(&venv("python"), args, &[], &log, || TcpStream::connect(("127.0.0.1", port)).is_ok());
    let config = format!("[services.gcp-kms]\nendpoint = \"https://127.0.0.1:{port}\"\nanonymous = true\n");
    fs::write(b.path("config.toml"), config).unwrap();
    let init = |to: &str| b.command(&format!("init {to} --config DIR/config.toml --key {}", uri("k")));
    let o = init("one").output().unwrap();
    let said = String::from_utf8(o.stderr).unwrap();
    assert!(!o.status.success() && said.contains("unreachable") && said.contains("certificate"), "{said}");
    let o = init("two").env("SSL_CERT_FILE", fake.dir.path().join("ca.pem")).output().unwrap();
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
}

#[test]
fn without_any_credentials_the_program_says_where_they_are_looked_for() {
    let fake = Fake::start();
    let b = Bench::new();
    let text =
        format!("[services.gcp-kms]\nendpoint = \"http://127.0.0.1:{}\"\ncredentials_timeout_ms = 1000\n", fake.port);
    fs::write(b.path("config.toml"), text).unwrap();
    let line = |to: &str| b.command(&format!("init {to} --config DIR/config.toml --key {}", uri("k")));
    let init = |name: &str, value: &str| {
        let mut c = line(name);
        c.env_remove("GOOGLE_APPLICATION_CREDENTIALS").env_remove("GCE_METADATA_HOST");
        let o = c.env(name, value).output().unwrap();
        assert!(!o.status.success());
        String::from_utf8(o.stderr).unwrap()
    };
    let said = init("GOOGLE_APPLICATION_CREDENTIALS", b.path("none").to_str().unwrap());
    assert!(said.contains("application default credentials") && said.contains("/none"), "{said}");
    // A metadata server that should be there and is not.
    let said = init("GCE_METADATA_HOST", &format!("127.0.0.1:{}", free_port()));
    assert!(said.contains("unreachable") && said.contains("no access token"), "{said}");
    // Nothing configured, and no network to find a metadata server on.
    let program = line("apart");
    let apart = if rustix::process::geteuid().is_root() { "-n" } else { "-rn" };
    let mut c = Command::new("unshare");
    b.prepare(&mut c);
    c.arg(apart).arg(program.get_program()).args(program.get_args());
    let o = c.env_remove("GOOGLE_APPLICATION_CREDENTIALS").env_remove("GCE_METADATA_HOST").output().unwrap();
    let said = String::from_utf8(o.stderr).unwrap();
    assert!(said.contains("no credentials found") && said.contains("gcloud auth"), "{said}");
    assert_eq!(fake.calls("encrypt"), 0);
}

/// Calls of all kinds since the last reset that use the key.
fn used(fake: &Fake) -> u64 {
    fake.calls("encrypt") + fake.calls("decrypt")
}

fn write_files(b: &Bench, from: usize, n: usize) {
    for i in from..from + n {
        fs::write(b.path(&format!("mnt/{i}")), format!("content {i}")).unwrap();
    }
}

fn read_files(b: &Bench, n: usize) {
    for i in 0..n {
        assert_eq!(fs::read_to_string(b.path(&format!("mnt/{i}"))).unwrap(), format!("content {i}"));
    }
}

#[test]
fn a_sealed_store_calls_the_service_a_handful_of_times_whatever_it_holds() {
    if !can_mount() {
        return;
    }
    let (mut fake, b) = (Fake::start(), Bench::new());
    fake.configure(&b, "");
    let mount = "mount back mnt --config DIR/config.toml --log-file DIR/log";
    b.ok(&format!("init back --config DIR/config.toml --key {}", uri("k")));
    let init = used(&fake);
    b.ok(mount);
    let mounted = used(&fake);
    write_files(&b, 0, 1000);
    assert_eq!(used(&fake), mounted, "files cost nothing");
    b.ok("unmount mnt");
    fake.reset();
    fake.rotate("k");
    b.ok(mount);
    read_files(&b, 1000);
    let again = used(&fake);
    b.ok("rotate mnt --config DIR/config.toml");
    let rotated = used(&fake) - again;
    read_files(&b, 1000);
    write_files(&b, 1000, 1);
    assert!(init <= 8 && mounted - init <= 8 && again <= 8 && rotated <= 12, "{init} {mounted} {again} {rotated}");
    // The service goes away: what is mounted goes on, and a mount says what is wrong.
    fake.server.kill();
    read_files(&b, 1001);
    b.ok("unmount mnt");
    let o = b.run(mount);
    let said = String::from_utf8(o.stderr).unwrap();
    assert!(!o.status.success() && said.contains("unreachable") && said.contains(&uri("k")), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1);
    fake.restart();
    b.ok(mount);
    read_files(&b, 1001);
    // The keyring names the key, and nothing of the way there.
    let listed = b.ok("key list back");
    assert!(listed.contains(&uri("k")) && !listed.contains("127.0.0.1"), "{listed}");
    b.ok("unmount mnt");
}

#[test]
fn an_external_store_wraps_once_for_a_create_and_unwraps_once_for_a_cold_open() {
    if !can_mount() {
        return;
    }
    let (mut fake, b) = (Fake::start(), Bench::new());
    // Nothing ahead: a key that is unwrapped ahead just when its file is opened may be asked for twice.
    fake.configure(&b, "\n[defaults]\ndek_pool = 0\nprefetch = 0\n");
    let mount = "mount back mnt --config DIR/config.toml --log-file DIR/log";
    b.ok(&format!("init back --kek external --config DIR/config.toml --key {}", uri("k")));
    b.ok(mount);
    fake.reset();
    write_files(&b, 0, 50);
    assert_eq!((fake.calls("encrypt"), fake.calls("decrypt")), (50, 0));
    let created = used(&fake);
    read_files(&b, 50);
    assert_eq!(used(&fake), created, "the keys are still there");
    b.ok("unmount mnt");
    b.ok(mount);
    fake.reset();
    for i in 0..50 {
        fs::metadata(b.path(&format!("mnt/{i}"))).unwrap();
    }
    fs::rename(b.path("mnt/0"), b.path("mnt/x")).unwrap();
    fs::rename(b.path("mnt/x"), b.path("mnt/0")).unwrap();
    assert_eq!(used(&fake), 0, "names and attributes need no key of a file");
    read_files(&b, 50);
    assert_eq!((fake.calls("encrypt"), fake.calls("decrypt")), (0, 50));
    // To a new KEK, by way of a new version of the key.
    fake.rotate("k");
    fake.reset();
    b.ok("rotate mnt --kek external --config DIR/config.toml");
    let rotation = (fake.calls("encrypt"), fake.calls("decrypt"));
    assert!(rotation.0 <= 60 && rotation.1 <= 160, "{rotation:?}");
    b.ok("unmount mnt");
    fake.restart();
    b.ok(mount);
    read_files(&b, 50);
    fake.server.kill();
    // A new file needs a key with its first content, which the kernel may hold back until it is told to sync.
    let mut new = fs::File::create(b.path("mnt/new")).unwrap();
    let e = new.write_all(b"x").and_then(|()| new.sync_all()).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(libc::ENOKEY));
    drop(new);
    assert_eq!(fs::read_dir(b.path("mnt")).unwrap().count(), 51);
    b.ok("unmount mnt");
}

#[test]
fn a_rotation_survives_the_end_of_the_server_in_its_middle_and_leads_to_another_root_key() {
    if !can_mount() {
        return;
    }
    let (mut fake, b) = (Fake::start(), Bench::new());
    fake.configure(&b, "");
    fake.make("other");
    b.ok(&format!("init back --kek external --config DIR/config.toml --key {}", uri("k")));
    b.ok("mount back mnt --config DIR/config.toml --log-file DIR/log");
    write_files(&b, 0, 200);
    fake.reset();
    // Slow enough to be met in the middle.
    let line = format!("rotate mnt --rate 60 --config DIR/config.toml --key {}", uri("other"));
    let rotation = b.spawn(&line);
    wait_for("the sweep", || fake.calls("encrypt") > 40);
    fake.server.kill();
    fake.restart();
    let before = fs::read_to_string(b.path("mnt/0"));
    let o = rotation.wait_with_output().unwrap();
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    assert_eq!(before.unwrap(), "content 0");
    read_files(&b, 200);
    b.ok("unmount mnt");
    // The first key is not needed any more.
    fake.state("k", 1, "DISABLED");
    b.ok("mount back mnt --config DIR/config.toml");
    read_files(&b, 200);
    b.ok("unmount mnt");
}
