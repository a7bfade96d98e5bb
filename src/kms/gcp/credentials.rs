//! Credentials for Google Cloud, from a file that the configuration names or as the library finds them.

use super::classify::{one_line, said_by};
use super::settings::Source;
use crate::kms::KmsError;
use google_cloud_auth::build_errors::Error as BuildError;
use google_cloud_auth::credentials::{
    Builder, Credentials, anonymous, external_account, impersonated, service_account, user_account,
};
use serde_json::Value;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use zeroize::Zeroizing;

/// Longest credentials file, in bytes; real ones have two or three thousand.
const FILE_MAX: u64 = 64 * 1024;
/// What a service account's own token may be used for: this service, and nothing else of the account's.
const SCOPE: &str = "https://www.googleapis.com/auth/cloudkms";

/// Makes the credentials; reads the file anew if there is one. Must be called within a tokio runtime, where the
/// library keeps its tokens fresh.
///
/// # Errors
/// [`KmsError::Credentials`] that says what is wrong with the file, or with what the library found.
pub fn build(source: &Source, key: &str) -> Result<Credentials, KmsError> {
    match source {
        Source::Anonymous => Ok(anonymous::Builder::new().build()),
        Source::Default => Builder::default()
            .build()
            .map_err(|e| KmsError::Credentials(format!("{key}: application default credentials: {}", described(&e)))),
        Source::File(path) => {
            let json = read(path)?;
            of_file(json).map_err(|why| refuse(path, &why))
        }
    }
}

fn of_file(json: Value) -> Result<Credentials, String> {
    match kind(&json) {
        Some("service_account") => service_account::Builder::new(json)
            .with_access_specifier(service_account::AccessSpecifier::from_scopes([SCOPE]))
            .build(),
        Some("external_account") => external_account::Builder::new(json).build(),
        Some("impersonated_service_account") => impersonated::Builder::new(json).build(),
        Some("authorized_user") => user_account::Builder::new(json).build(),
        other => return Err(format!("type {:?} is not supported", other.unwrap_or_default())),
    }
    .map_err(|e| described(&e))
}

fn kind(json: &Value) -> Option<&str> {
    json.get("type")?.as_str()
}

/// The library's error, but not what it quotes of a file that may hold a private key.
fn described(e: &BuildError) -> String {
    let text = said_by(e);
    match text.find("missing field") {
        Some(at) => one_line(text.get(at..).unwrap_or_default()),
        None if e.is_parsing() => "not the JSON of Google credentials".into(),
        None => text,
    }
}

/// Whether application default credentials are there to be found without asking the metadata server, or that server's
/// address is set by hand.
pub fn are_configured() -> bool {
    let user = || {
        let home = std::env::var_os("HOME")?;
        Some(Path::new(&home).join(".config/gcloud/application_default_credentials.json").exists())
    };
    ["GOOGLE_APPLICATION_CREDENTIALS", "GCE_METADATA_HOST"].iter().any(|n| std::env::var_os(n).is_some())
        || user() == Some(true)
}

/// Reads and checks the credentials file.
///
/// # Errors
/// [`KmsError::Credentials`] that says what is wrong with it.
pub fn read(path: &Path) -> Result<Value, KmsError> {
    let failed = |e: io::Error| refuse(path, &e.to_string());
    // A FIFO in the place of the file must not hang the mount.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.file_type().is_file() {
        return Err(refuse(path, "not a regular file"));
    }
    if meta.len() > FILE_MAX {
        return Err(refuse(path, "too long for Google credentials"));
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(FILE_MAX as usize));
    file.take(FILE_MAX).read_to_end(&mut bytes).map_err(failed)?;
    let json: Value = serde_json::from_slice(&bytes)
        .map_err(|e| refuse(path, &format!("not JSON (line {}, column {})", e.line(), e.column())))?;
    let kind = kind(&json).ok_or_else(|| refuse(path, "not the JSON of Google credentials: it has no type"))?;
    if holds_secret(kind, &json) && is_exposed(meta.mode()) {
        let mode = meta.mode() & 0o7777;
        let why = format!("mode {mode:04o} lets others at the credentials; run: chmod 600 {}", path.display());
        return Err(refuse(path, &why));
    }
    Ok(json)
}

/// An external account's file names places to fetch tokens from and is often readable by all; the others hold a private
/// key or a refresh token.
fn holds_secret(kind: &str, json: &Value) -> bool {
    kind != "external_account" || json.get("client_secret").is_some()
}

/// Others may do nothing with the file and the group may not change it. Unlike with key files the group may read it:
/// volumes of secrets in Kubernetes (`fsGroup`) come with mode 0440.
fn is_exposed(mode: u32) -> bool {
    mode & 0o027 != 0
}

fn refuse(path: &Path, why: &str) -> KmsError {
    KmsError::Credentials(format!("Google credentials {}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::PermissionsExt;

    fn at(dir: &tempfile::TempDir, text: &str, mode: u32) -> std::path::PathBuf {
        let path = dir.path().join("credentials.json");
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn a_file_with_a_secret_is_not_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let account = json!({"type": "service_account", "private_key": "x"}).to_string();
        for mode in [0o644, 0o604, 0o620, 0o660, 0o602, 0o601, 0o777] {
            let e = read(&at(&dir, &account, mode)).unwrap_err().to_string();
            assert!(e.contains("chmod 600"), "{mode:o}: {e}");
        }
        for mode in [0o600, 0o400, 0o440, 0o640, 0o700] {
            assert!(read(&at(&dir, &account, mode)).is_ok(), "{mode:o}");
        }
        let open = json!({"type": "external_account"}).to_string();
        assert!(read(&at(&dir, &open, 0o644)).is_ok());
        let closed = json!({"type": "external_account", "client_secret": "x"}).to_string();
        assert!(read(&at(&dir, &closed, 0o644)).is_err());
        assert!(read(&at(&dir, &json!({"type": "authorized_user"}).to_string(), 0o644)).is_err());
    }

    #[test]
    fn what_holds_no_credentials_is_refused_and_never_quoted() {
        let dir = tempfile::tempdir().unwrap();
        for (text, want) in [
            ("", "not JSON"),
            ("{\"type\": \"s3cret", "not JSON (line 1"),
            ("[\"s3cret\"]", "has no type"),
            ("{\"type\": 7}", "has no type"),
            ("{\"type\": \"gdch_service_account\"}", "\"gdch_service_account\" is not supported"),
            ("{\"type\": \"service_account\", \"private_key\": \"s3cret\"}", "missing field"),
            ("{\"type\": \"service_account\", \"client_email\": [\"s3cret\"]}", "not the JSON of Google credentials"),
        ] {
            let path = at(&dir, text, 0o600);
            let e = build(&Source::File(path.clone()), "k").unwrap_err();
            let said = e.to_string();
            assert!(matches!(e, KmsError::Credentials(_)), "{said}");
            assert!(said.contains(want) && said.contains("credentials.json") && !said.contains("s3cret"), "{said}");
        }
        let long = at(&dir, &" ".repeat(FILE_MAX as usize + 1), 0o600);
        assert!(read(&long).unwrap_err().to_string().contains("too long"));
    }

    #[test]
    fn what_is_no_file_is_refused_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none");
        assert!(read(&path).unwrap_err().to_string().contains("No such file"));
        assert!(read(dir.path()).unwrap_err().to_string().contains("not a regular file"));
        let mode = rustix::fs::Mode::from(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("not a regular file"));
    }
}
