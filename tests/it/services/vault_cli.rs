//! A store whose root key is in OpenBao, from the command line.

use super::bao::{Bao, POLICY};
use crate::cli::support::{Bench, wait_for};
use envelopefs::kms::services::VaultAuth;
use serde_json::json;
use std::fs;
use std::io::Write;
use std::process::Output;

/// What a mount with a sealed KEK needs.
const MOUNT_ONLY: &str = r#"
path "transit/keys/k" { capabilities = ["read"] }
path "transit/decrypt/k" { capabilities = ["update"] }
"#;

/// A bench whose commands find `bao` with `token` in the environment.
struct Host<'a> {
    bench: Bench,
    bao: &'a Bao,
    token: String,
}

impl<'a> Host<'a> {
    fn new(bao: &'a Bao, token: &str) -> Self {
        Self { bench: Bench::new(), bao, token: token.to_owned() }
    }

    fn run(&self, line: &str) -> Output {
        let mut c = self.bench.command(line);
        c.env("VAULT_ADDR", &self.bao.address).env("VAULT_TOKEN", &self.token);
        for name in ["BAO_ADDR", "BAO_TOKEN", "VAULT_NAMESPACE", "BAO_NAMESPACE", "VAULT_CACERT", "BAO_CACERT"] {
            c.env_remove(name);
        }
        c.output().unwrap()
    }

    #[track_caller]
    fn ok(&self, line: &str) -> String {
        let o = self.run(line);
        assert!(o.status.success(), "{line}: {}", self.bench.masked(&o.stderr));
        self.bench.masked(&o.stdout)
    }

    /// Must fail with `code` and one line with `word`.
    #[track_caller]
    fn fails(&self, line: &str, code: i32, word: &str) {
        let o = self.run(line);
        let text = self.bench.masked(&o.stderr);
        assert!(o.status.code() == Some(code) && text.contains(word) && text.lines().count() == 1, "{line}: {text}");
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.bench.path(name), content).unwrap();
    }

    #[track_caller]
    fn reads(&self, name: &str, content: &str) {
        assert_eq!(fs::read_to_string(self.bench.path(name)).unwrap(), content, "{name}");
    }
}

/// The life of a store, with its KEK in the keyring or in the service.
fn life(kind: &str) {
    let bao = Bao::dev();
    bao.key("k");
    bao.key("next");
    let policy = format!("{POLICY}{}", POLICY.replace("/k\"", "/next\""));
    let h = Host::new(&bao, &bao.token(&policy, &json!({})));
    h.ok(&format!("init back --key vault://transit/k --kek {kind}"));
    h.ok("mount back mnt");
    for i in 0..20 {
        h.write(&format!("mnt/{i}"), &format!("file {i}"));
    }
    h.ok("unmount mnt");
    // The keyring holds the URI and neither host nor token.
    let keyring = fs::read(h.bench.path("back/.envelopefs/keyring.a")).unwrap();
    let text = String::from_utf8_lossy(&keyring);
    assert!(text.contains("vault://transit/k") && !text.contains("127.0.0.1") && !text.contains(&h.token));
    h.ok("mount back mnt");
    for i in 0..20 {
        h.reads(&format!("mnt/{i}"), &format!("file {i}"));
    }
    // A new version in the service, a new KEK here, on the live mount.
    bao.ok("POST", "transit/keys/k/rotate", &json!({}));
    h.ok(&format!("rotate mnt --kek {kind} --destroy-old"));
    h.write("mnt/20", "file 20");
    bao.configure("k", &json!({"min_decryption_version": 2}));
    h.ok("unmount mnt");
    h.ok("mount back mnt");
    h.ok("rotate mnt --key vault://transit/next --destroy-old");
    h.ok("unmount mnt");
    h.ok("mount back mnt");
    for i in 0..=20 {
        h.reads(&format!("mnt/{i}"), &format!("file {i}"));
    }
    h.ok("unmount mnt");
    h.ok("check back --deep");
}

#[test]
fn a_sealed_store_lives_with_a_vault_key() {
    life("sealed");
}

#[test]
fn an_external_store_lives_with_a_vault_key() {
    life("external");
}

#[test]
fn a_sealed_mount_asks_three_times_however_many_files_there_are() {
    let bao = Bao::dev();
    bao.key("k");
    let mut h = Host::new(&bao, &bao.token(POLICY, &json!({})));
    h.ok("init back --key vault://transit/k");
    // To mount needs less than to make.
    h.token = bao.token(MOUNT_ONLY, &json!({}));
    bao.ok("POST", "sys/quotas/rate-limit/q", &json!({"path": "transit", "rate": 3, "interval": "10m"}));
    // The key, the store secret, the KEK.
    h.ok("mount back mnt");
    for i in 0..200 {
        h.write(&format!("mnt/{i}"), "x");
    }
    for i in 0..200 {
        h.reads(&format!("mnt/{i}"), "x");
    }
    h.ok("unmount mnt");
    h.fails("mount back mnt", 5, "rate limit quota exceeded");
}

#[test]
fn an_old_version_can_be_let_go_after_a_refresh() {
    let bao = Bao::dev();
    bao.key("k");
    let h = Host::new(&bao, &bao.token(POLICY, &json!({})));
    h.ok("init back --key vault://transit/k");
    bao.ok("POST", "transit/keys/k/rotate", &json!({}));
    bao.configure("k", &json!({"min_decryption_version": 2}));
    h.fails("mount back mnt", 13, "min_decryption_version");
    bao.configure("k", &json!({"min_decryption_version": 1}));
    h.ok("key refresh back");
    bao.configure("k", &json!({"min_decryption_version": 2}));
    h.ok("mount back mnt");
    // The daemon has looked at the key just before.
    bao.ok("POST", "transit/keys/k/rotate", &json!({}));
    assert!(h.ok("key refresh mnt --dry-run").contains("2 due"));
    h.ok("key refresh mnt");
    bao.configure("k", &json!({"min_decryption_version": 3}));
    h.ok("unmount mnt");
    h.ok("mount back mnt");
    h.ok("unmount mnt");
}

#[test]
fn what_is_wrong_with_the_service_is_said_in_one_line_with_its_exit_code() {
    let bao = Bao::dev();
    bao.key("k");
    bao.ok("POST", "transit/keys/plain", &json!({"type": "aes256-gcm96"}));
    let token = bao.token(POLICY, &json!({}));
    let mut h = Host::new(&bao, &token);
    h.fails("init back --key vault://transit/plain", 6, "transit/keys/plain");
    h.token = bao.root_token.clone();
    h.fails("init back --key vault://transit/plain", 13, "derived=true");
    h.fails("init back --key vault://transit/absent", 13, "bao write transit/keys/absent");
    h.token = token.clone();
    h.ok("init back --key vault://transit/k");
    bao.ok("POST", "transit/keys/k/config", &json!({"deletion_allowed": true}));
    bao.ok("DELETE", "transit/keys/k/soft-delete", &json!({}));
    h.fails("mount back mnt", 6, "soft-delete-restore");
    bao.ok("POST", "transit/keys/k/soft-delete-restore", &json!({}));
    bao.revoke(&token);
    h.fails("mount back mnt", 13, "VAULT_TOKEN");
    h.token = bao.token(POLICY, &json!({}));
    bao.ok("POST", "sys/seal", &json!({}));
    h.fails("mount back mnt", 5, "sealed");
}

#[test]
fn a_mount_outlives_the_server_and_its_token() {
    let mut bao = Bao::persistent();
    bao.key("k");
    let VaultAuth::Approle { role_id, secret_id_file, .. } = bao.approle(&json!({"token_ttl": "1h"})) else { panic!() };
    let b = Bench::new();
    let config = format!(
        r#"
[defaults]
dek_pool = 0

[defaults.dek_cache]
entries = 0

[services.vault]
address = "{}"
ca_file = "{}"
connect_timeout_ms = 20000
attempt_timeout_ms = 20000

[services.vault.auth]
method = "approle"
role_id = "{role_id}"
secret_id_file = "{}"
"#,
        bao.address,
        bao.file("ca.pem").display(),
        secret_id_file.display()
    );
    fs::write(b.path("config.toml"), config).unwrap();
    b.ok("init back --key vault://transit/k --kek external --config DIR/config.toml");
    b.ok("mount back mnt --config DIR/config.toml --log-file DIR/log");
    fs::write(b.path("mnt/before"), "before").unwrap();
    bao.revoke_logins("approle");
    fs::write(b.path("mnt/logged-in-again"), "x").unwrap();
    let open = fs::File::open(b.path("mnt/before")).unwrap();
    bao.server.kill();
    let during = fs::File::create(b.path("mnt/during")).and_then(|mut f| {
        f.write_all(b"x")?;
        f.sync_all()
    });
    assert!(during.is_err());
    // What is open stays readable; names and sizes need no key.
    assert_eq!(std::io::read_to_string(&open).unwrap(), "before");
    assert_eq!(fs::metadata(b.path("mnt/before")).unwrap().len(), 6);
    drop(open);
    bao.restart();
    wait_for("the mount to work again", || fs::write(b.path("mnt/after"), "after").is_ok());
    wait_for("old files", || fs::read_to_string(b.path("mnt/logged-in-again")).is_ok_and(|t| t == "x"));
    b.ok("unmount mnt");
    b.ok("mount back mnt --config DIR/config.toml");
    assert_eq!(fs::read_to_string(b.path("mnt/after")).unwrap(), "after");
    b.ok("unmount mnt");
}

/// The service goes away in the middle of a rekey and comes back: files that needed it are named and are as they were, and
/// the same command does them.
#[test]
fn a_rekey_with_a_key_in_the_service_goes_on_after_an_outage() {
    const FILES: usize = 12;
    let b = Bench::new();
    let mut bao = Bao::persistent();
    bao.key("k");
    let token = bao.secret("token", &bao.token(POLICY, &json!({})));
    let config = format!(
        "[services.vault]\naddress = \"{}\"\nca_file = \"{}\"\nconnect_timeout_ms = 20000\nattempt_timeout_ms = 20000\n\
         [services.vault.auth]\nmethod = \"token\"\ntoken_file = \"{}\"\n[services.limits]\nattempts = 1\n",
        bao.address,
        bao.file("ca.pem").display(),
        token.display()
    );
    fs::write(b.path("config.toml"), config).unwrap();
    b.ok("init back --key vault://transit/k --kek external --plaintext-names --config DIR/config.toml");
    b.ok("mount back mnt --config DIR/config.toml --log-file DIR/log");
    let content = |n: usize| vec![n as u8; 1_000_000];
    (0..FILES).for_each(|n| fs::write(b.path(&format!("mnt/{n}")), content(n)).unwrap());
    let id = |n: usize| b.json(&format!("inspect back/{n} --json"))["slots"][0]["file_id"].clone();
    let before: Vec<_> = (0..FILES).map(id).collect();
    // A file a second: it is in the middle for a while.
    b.ok("rekey mnt --rate 1 --jobs 1 --detach");
    let rekey = || b.json("status mnt --json")["daemon"]["rekey"].clone();
    wait_for("some files to be done", || rekey()["status"]["counts"]["rekeyed"].as_u64() >= Some(2));
    bao.server.kill();
    wait_for("the end", || rekey()["running"] == false);
    let report = rekey()["report"].clone();
    let done = report["counts"]["rekeyed"].as_u64().unwrap();
    assert_eq!(report["outcome"], "incomplete", "{report}");
    assert_eq!(report["failures_total"].as_u64().unwrap() + done, FILES as u64, "{report}");
    let failures = report["failures"].as_array().unwrap();
    assert!(failures.iter().all(|f| f["code"] == "kms-unreachable"), "{report}");
    let failed: Vec<usize> = failures.iter().map(|f| f["path"].as_str().unwrap().parse().unwrap()).collect();
    assert!((0..FILES).all(|n| (id(n) == before[n]) == failed.contains(&n)));
    // What is open, or was a while ago, can be used without the service, also what has a new key.
    assert!((0..FILES).all(|n| fs::read(b.path(&format!("mnt/{n}"))).unwrap() == content(n)));
    bao.restart();
    let again = || b.run("rekey mnt --json").status.success();
    wait_for("the rest to be done", again);
    assert!((0..FILES).all(|n| id(n) != before[n]));
    b.ok("unmount mnt");
    b.ok("mount back mnt --config DIR/config.toml");
    assert!((0..FILES).all(|n| fs::read(b.path(&format!("mnt/{n}"))).unwrap() == content(n)));
    b.ok("unmount mnt");
    b.ok("check back --deep --config DIR/config.toml");
}
