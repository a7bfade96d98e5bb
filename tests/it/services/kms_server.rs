//! `tests/support/kms_server.py`, AWS KMS for tests: its Rust side.

use super::server::{Server, free_port, support, venv};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::Command;

/// Where keys are made if nothing else is said.
pub const REGION: &str = "eu-west-1";
/// Whom moto takes everybody for.
pub const ACCOUNT: &str = "123456789012";

/// The server. Ends when this is dropped.
pub struct Kms {
    pub server: Server,
    port: u16,
}

impl Kms {
    /// Starts it; `dir` gets its log.
    pub fn start(dir: &Path) -> Self {
        Self::start_at(dir, free_port())
    }

    /// The same at this port, without any keys.
    pub fn start_at(dir: &Path, port: u16) -> Self {
        let args = [support("kms_server.py").into_os_string(), "--port".into(), port.to_string().into()];
        let ready = || request(port, "GET", "/control/calls", "", "").is_some();
        let environment = [("PYTHONDONTWRITEBYTECODE", "1")];
        Self { server: Server::start(&venv("python"), args, &environment, &dir.join("kms.log"), ready), port }
    }

    /// For the configuration.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Carries out an operation in a region, as an administrator. It counts as a call.
    pub fn admin_in(&self, region: &str, op: &str, body: &Value) -> Value {
        let headers = format!(
            "X-Amz-Target: TrentService.{op}\r\nContent-Type: application/x-amz-json-1.1\r\n\
             Authorization: AWS4-HMAC-SHA256 Credential=admin/20260101/{region}/kms/aws4_request, \
             SignedHeaders=host, Signature=0\r\n"
        );
        let answer = request(self.port, "POST", "/", &headers, &body.to_string());
        answer.unwrap_or_else(|| panic!("{op} {body}: {}", self.server.log()))
    }

    /// Carries out an operation, as an administrator. It counts as a call.
    pub fn admin(&self, op: &str, body: Value) -> Value {
        self.admin_in(REGION, op, &body)
    }

    /// Makes a key; returns its ARN.
    pub fn create_key(&self) -> String {
        self.admin("CreateKey", json!({}))["KeyMetadata"]["Arn"].as_str().unwrap().to_owned()
    }

    /// Makes a key and an alias for it, which starts with `alias/`; returns the key's ARN.
    pub fn create_alias(&self, alias: &str) -> String {
        let arn = self.create_key();
        self.admin("CreateAlias", json!({"AliasName": alias, "TargetKeyId": arn}));
        arn
    }

    /// Calls so far by operation; 0 for all else.
    pub fn calls(&self) -> Calls {
        let all = request(self.port, "GET", "/control/calls", "", "").unwrap();
        Calls(all.as_object().unwrap().iter().map(|(op, n)| (op.clone(), n.as_u64().unwrap())).collect())
    }

    /// The calls themselves, oldest first.
    pub fn seen(&self) -> Vec<Value> {
        request(self.port, "GET", "/control/seen", "", "").unwrap().as_array().unwrap().clone()
    }

    /// Forgets calls and faults; keys stay.
    pub fn reset(&self) {
        request(self.port, "POST", "/control/reset", "", "{}").unwrap();
    }

    /// Lets the next calls fail: see `kms_server.py`.
    pub fn fault(&self, fault: Value) {
        request(self.port, "POST", "/control/fault", "", &fault.to_string()).unwrap();
    }
}

/// Numbers of calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Calls(HashMap<String, u64>);

impl Calls {
    /// Of one operation.
    pub fn of(&self, op: &str) -> u64 {
        self.0.get(op).copied().unwrap_or_default()
    }

    /// Of all together.
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }
}

/// The answer to a request, if it is one of success.
fn request(port: u16, method: &str, path: &str, headers: &str, body: &str) -> Option<Value> {
    let mut s = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok()?;
    let n = body.len();
    write!(s, "{method} {path} HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Length: {n}\r\n{headers}\r\n{body}").ok()?;
    let mut answer = String::new();
    s.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let ok = head.split(' ').nth(1) == Some("200");
    ok.then(|| serde_json::from_str(if body.is_empty() { "null" } else { body }).ok())?
}

/// Takes every AWS and proxy setting out of the environment of `c` and puts test credentials in.
pub fn prepare(c: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let upper = name.to_string_lossy().to_ascii_uppercase();
        if upper.starts_with("AWS_") || upper.ends_with("_PROXY") {
            c.env_remove(name);
        }
    }
    c.env("AWS_EC2_METADATA_DISABLED", "true")
        // A call that is not told where to go must not leave this machine.
        .env("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        .env("AWS_CONFIG_FILE", "/dev/null")
        .env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        .env("AWS_ACCESS_KEY_ID", "test")
        .env("AWS_SECRET_ACCESS_KEY", "test");
}

/// Runs `body` in a process of its own: the test called `test` once more, with the environment of [`prepare`] and
/// `more`, in which an empty value takes a name out. The SDK reads the environment, and tests are threads of one process.
#[track_caller]
pub fn alone(test: &str, more: &[(&str, &str)], body: impl FnOnce()) {
    const MARK: &str = "ENVELOPEFS_TEST_ALONE";
    if std::env::var(MARK).is_ok_and(|t| t == test) {
        return body();
    }
    let mut c = Command::new(std::env::current_exe().unwrap());
    prepare(&mut c);
    for (name, value) in more {
        if value.is_empty() {
            c.env_remove(name)
        } else {
            c.env(name, value)
        };
    }
    let o = c.args(["--exact", test, "--nocapture"]).env(MARK, test).output().unwrap();
    let said = String::from_utf8_lossy(&o.stdout);
    let ran = o.status.success() && said.contains("1 passed");
    assert!(ran, "{:?}\n{said}\n{}", o.status, String::from_utf8_lossy(&o.stderr));
}
