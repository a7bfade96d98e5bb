//! A real OpenBao server for one test, and what an administrator does to it.

use super::server::{Server, free_port, support, venv};
use envelopefs::kms::services::{VaultAuth, VaultOptions};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Longer than any test needs on a busy machine.
const PATIENCE_MS: u64 = 30_000;

/// What a mount needs of a key `k`.
pub const POLICY: &str = r#"
path "transit/keys/k" { capabilities = ["read"] }
path "transit/encrypt/k" { capabilities = ["update"] }
path "transit/decrypt/k" { capabilities = ["update"] }
path "transit/rewrap/k" { capabilities = ["update"] }
path "transit/datakey/plaintext/k" { capabilities = ["update"] }
"#;

/// The server, with a Transit engine at `transit`.
pub struct Bao {
    pub server: Server,
    pub address: String,
    dir: tempfile::TempDir,
    /// The administrator's token.
    pub root_token: String,
    admin: ureq::Agent,
    tls: bool,
    /// Names handed out so far.
    made: AtomicU32,
}

impl Bao {
    /// In memory, without TLS.
    pub fn dev() -> Self {
        let dir = place();
        let port = free_port();
        let address = format!("http://127.0.0.1:{port}");
        let listen = format!("-dev-listen-address=127.0.0.1:{port}");
        let args = ["server", "-dev", "-dev-root-token-id=root", "-dev-no-store-token", &listen];
        let admin = agent(None);
        let server = start(&args, dir.path(), || status(&admin, &address) == Some(200));
        let bao = Self { server, address, dir, root_token: "root".into(), admin, tls: false, made: AtomicU32::new(0) };
        bao.ok("POST", "sys/mounts/transit", &json!({"type": "transit"}));
        bao
    }

    /// On disk, with TLS; unseals itself.
    pub fn persistent() -> Self {
        let dir = place();
        let made = Command::new(venv("python")).arg(support("certificates.py")).arg(dir.path()).status().unwrap();
        assert!(made.success());
        fs::create_dir(dir.path().join("data")).unwrap();
        fs::write(dir.path().join("seal.key"), [7; 32]).unwrap();
        let (port, cluster, d) = (free_port(), free_port(), dir.path().display());
        let config = format!(
            r#"storage "raft" {{ path = "{d}/data"  node_id = "n" }}
listener "tcp" {{
  address = "127.0.0.1:{port}"  cluster_address = "127.0.0.1:{cluster}"
  tls_cert_file = "{d}/server.pem"  tls_key_file = "{d}/server.key"
}}
api_addr = "https://127.0.0.1:{port}"
cluster_addr = "https://127.0.0.1:{cluster}"
seal "static" {{ current_key_id = "1"  current_key = "file://{d}/seal.key" }}
"#
        );
        fs::write(dir.path().join("bao.hcl"), config).unwrap();
        let address = format!("https://127.0.0.1:{port}");
        let admin = agent(Some(&dir.path().join("ca.pem")));
        let server = start(&["server", "-config=bao.hcl"], dir.path(), || status(&admin, &address).is_some());
        let mut bao =
            Self { server, address, dir, root_token: String::new(), admin, tls: true, made: AtomicU32::new(0) };
        let (_, made) = bao.api("POST", "sys/init", &json!({"recovery_shares": 1, "recovery_threshold": 1}));
        bao.root_token = made["root_token"].as_str().unwrap().to_owned();
        bao.wait_until_usable();
        bao.ok("POST", "sys/mounts/transit", &json!({"type": "transit"}));
        bao
    }

    /// Starts a persistent server again after its end.
    pub fn restart(&mut self) {
        let (admin, address) = (&self.admin, &self.address);
        self.server = start(&["server", "-config=bao.hcl"], self.dir.path(), || status(admin, address) == Some(200));
    }

    fn wait_until_usable(&self) {
        while status(&self.admin, &self.address) != Some(200) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// One request by the administrator: status and body.
    pub fn api(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        self.api_in(None, method, path, body)
    }

    fn api_in(&self, namespace: Option<&str>, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}/v1/{path}", self.address))
            .header("X-Vault-Token", &self.root_token);
        if let Some(n) = namespace {
            request = request.header("X-Vault-Namespace", n);
        }
        let mut response = match method {
            "POST" => self.admin.run(request.body(body.to_string()).unwrap()),
            _ => self.admin.run(request.body(()).unwrap()),
        }
        .unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        (response.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    /// A request that must succeed.
    #[track_caller]
    pub fn ok(&self, method: &str, path: &str, body: &Value) -> Value {
        self.ok_in(None, method, path, body)
    }

    /// A request in a namespace that must succeed.
    #[track_caller]
    pub fn ok_in(&self, namespace: Option<&str>, method: &str, path: &str, body: &Value) -> Value {
        let (status, answer) = self.api_in(namespace, method, path, body);
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    /// A name that has not been used.
    fn name(&self, what: &str) -> String {
        format!("{what}-{}", self.made.fetch_add(1, Ordering::Relaxed))
    }

    /// Makes a Transit key that is good for a root key.
    pub fn key(&self, name: &str) {
        self.ok("POST", &format!("transit/keys/{name}"), &json!({"type": "aes256-gcm96", "derived": true}));
    }

    /// Changes a Transit key's configuration.
    pub fn configure(&self, name: &str, config: &Value) {
        self.ok("POST", &format!("transit/keys/{name}/config"), config);
    }

    /// Makes a token that may do what `policy` says, and what every token may; returns it.
    pub fn token(&self, policy: &str, more: &Value) -> String {
        let name = self.name("policy");
        self.ok("POST", &format!("sys/policies/acl/{name}"), &json!({"policy": policy}));
        let mut body = json!({"policies": [name], "no_parent": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let made = self.ok("POST", "auth/token/create", &body);
        made["auth"]["client_token"].as_str().unwrap().to_owned()
    }

    /// Ends a token.
    pub fn revoke(&self, token: &str) {
        self.ok("POST", "auth/token/revoke", &json!({"token": token}));
    }

    /// Turns on AppRole, makes a role with [`POLICY`] and `config`, and a secret id for it in a file.
    pub fn approle(&self, config: &Value) -> VaultAuth {
        self.ok("POST", "sys/auth/approle", &json!({"type": "approle"}));
        self.ok("POST", "sys/policies/acl/approle", &json!({"policy": POLICY}));
        let mut role = json!({"token_policies": "approle"});
        role.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
        self.ok("POST", "auth/approle/role/r", &role);
        let id = self.ok("GET", "auth/approle/role/r/role-id", &Value::Null);
        let secret_id_file = self.secret("secret-id", &self.secret_id());
        let role_id = id["data"]["role_id"].as_str().unwrap().to_owned();
        VaultAuth::Approle { role_id, secret_id_file, mount: None }
    }

    /// A new secret id for the role.
    pub fn secret_id(&self) -> String {
        let made = self.ok("POST", "auth/approle/role/r/secret-id", &json!({}));
        made["data"]["secret_id"].as_str().unwrap().to_owned()
    }

    /// Ends all tokens that were got by a login at `mount`.
    pub fn revoke_logins(&self, mount: &str) {
        self.ok("POST", &format!("sys/leases/revoke-prefix/auth/{mount}/login"), &json!({}));
    }

    /// Accessors of the living tokens that were got by a login at `path`, with their data.
    pub fn logins(&self, path: &str) -> Vec<Value> {
        let (_, all) = self.api("LIST", "auth/token/accessors", &Value::Null);
        let keys = all["data"]["keys"].as_array().cloned().unwrap_or_default();
        let look = |accessor: &Value| {
            let (status, found) = self.api("POST", "auth/token/lookup-accessor", &json!({"accessor": accessor}));
            (status == 200 && found["data"]["path"] == path).then(|| found["data"].clone())
        };
        keys.iter().filter_map(look).collect()
    }

    /// Writes a file that only its owner may read.
    pub fn secret(&self, name: &str, content: &str) -> PathBuf {
        let path = self.file(name);
        let mut o = fs::File::options();
        let mut f = o.write(true).create(true).truncate(true).mode(0o600).open(&path).unwrap();
        std::io::Write::write_all(&mut f, content.as_bytes()).unwrap();
        path
    }

    /// A file next to the server's: `ca.pem`, `client.pem`, …
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// How a store reaches this server.
    pub fn options(&self, auth: VaultAuth) -> VaultOptions {
        VaultOptions {
            address: Some(self.address.clone()),
            ca_file: self.tls.then(|| self.file("ca.pem")),
            connect_timeout_ms: Some(PATIENCE_MS),
            attempt_timeout_ms: Some(PATIENCE_MS),
            auth,
            ..Default::default()
        }
    }

    /// With this token from a file.
    pub fn with_token(&self, token: &str) -> VaultOptions {
        self.options(VaultAuth::Token { token_file: Some(self.secret(&self.name("token"), token)) })
    }

    /// As the administrator.
    pub fn as_root(&self) -> VaultOptions {
        self.with_token(&self.root_token)
    }
}

fn place() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("envelopefs-bao-").tempdir().unwrap()
}

fn start(args: &[&str], dir: &Path, ready: impl FnMut() -> bool) -> Server {
    // The server takes paths in its arguments as they are.
    let args = args.iter().map(|a| a.replace("bao.hcl", dir.join("bao.hcl").to_str().unwrap()));
    Server::start(&venv("bao"), args, &[("HOME", dir.to_str().unwrap())], &dir.join("log"), ready)
}

fn agent(ca: Option<&Path>) -> ureq::Agent {
    use ureq::tls::{Certificate, RootCerts, TlsConfig};
    let mut tls = TlsConfig::builder()
        .unversioned_rustls_crypto_provider(std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    if let Some(path) = ca {
        tls = tls.root_certs(RootCerts::new_with_certs(&[Certificate::from_pem(&fs::read(path).unwrap()).unwrap()]));
    }
    ureq::Agent::config_builder()
        .tls_config(tls.build())
        .http_status_as_error(false)
        .allow_non_standard_methods(true)
        .proxy(None)
        // Connections of a server that is started anew would be dead.
        .max_idle_connections(0)
        .timeout_global(Some(Duration::from_millis(PATIENCE_MS)))
        .build()
        .new_agent()
}

fn status(admin: &ureq::Agent, address: &str) -> Option<u16> {
    admin.get(format!("{address}/v1/sys/health")).call().ok().map(|r| r.status().as_u16())
}
