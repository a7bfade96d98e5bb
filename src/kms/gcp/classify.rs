//! From what went wrong with a call to what the caller must do about it. Decides only.

use crate::kms::KmsError;
use google_cloud_gax::error::rpc::Code;
use google_cloud_kms_v1::Error;
use google_cloud_kms_v1::model::crypto_key_version::CryptoKeyVersionState as State;
use google_cloud_kms_v1::model::{CryptoKey, crypto_key::CryptoKeyPurpose as Purpose};

/// What was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Encrypt,
    /// With the number of the key version that is recorded with the ciphertext.
    Decrypt(u64),
    Get,
}

const RESTORE: &str = "restore and enable it while its waiting time lasts: gcloud kms keys versions restore";
const ENABLE: &str = "enable it again if that was a mistake: gcloud kms keys versions enable";
/// Longest text of the service that is passed on, in characters.
const SAID_MAX: usize = 300;

/// The class and the message of `e`. `key` is the root key's URI.
pub fn failure(e: &Error, call: Call, key: &str) -> KmsError {
    if let Some(s) = e.status() {
        return status(s.code, &s.message, call, key);
    }
    if let Some(code) = e.http_status_code() {
        return http(code, key);
    }
    if e.is_timeout() {
        return KmsError::Unreachable(format!("{key}: no answer in time"));
    }
    if e.is_authentication() {
        return KmsError::Credentials(format!("{key}: {}", root_cause(e)));
    }
    if e.is_binding() || e.is_serialization() {
        return KmsError::Config(format!("{key}: the request cannot be made: {}", said_by(e)));
    }
    if e.is_deserialization() {
        // Not what the parser says of it, which may quote a key.
        return KmsError::Unreachable(format!("{key}: the answer is not one of Cloud KMS"));
    }
    let what = if e.is_connect() { "cannot connect" } else { "the connection broke" };
    KmsError::Unreachable(format!("{key}: {what}: {}", root_cause(e)))
}

/// An answer in the service's own form.
fn status(code: Code, text: &str, call: Call, key: &str) -> KmsError {
    let said = format!("{key}: {code}: {}", one_line(text));
    match code {
        Code::ResourceExhausted => KmsError::Throttled(format!("{said}; see the quotas of the calling project")),
        Code::PermissionDenied => KmsError::Denied(format!(
            "{said}; grant roles/cloudkms.cryptoKeyEncrypterDecrypter on the key, or see whether it exists"
        )),
        Code::Unauthenticated => KmsError::Credentials(format!("{said}; renew the credentials")),
        Code::NotFound => KmsError::NotFound(said),
        Code::FailedPrecondition => precondition(text, call, key),
        Code::InvalidArgument => invalid(text, call, said),
        Code::Unavailable
        | Code::Internal
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::Cancelled
        | Code::Unknown
        | Code::DataLoss => KmsError::Unreachable(said),
        _ => KmsError::Config(said),
    }
}

fn invalid(text: &str, call: Call, said: String) -> KmsError {
    let lower = text.to_ascii_lowercase();
    if lower.contains("crc32c") || lower.contains("checksum") {
        // The service checked what we sent and found other bytes: damaged on the way.
        return KmsError::Unreachable(said);
    }
    match call {
        Call::Decrypt(_) if lower.contains("decryption failed") || lower.contains("ciphertext") => {
            KmsError::BadCiphertext(said)
        }
        _ => KmsError::Config(said),
    }
}

/// The state of a key version stands in the way. That of the primary version concerns all that uses the key; a version
/// that is gone concerns only what it wrapped.
fn precondition(text: &str, call: Call, key: &str) -> KmsError {
    let state = text
        .split_once("current state is: ")
        .map(|(_, s)| s.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect::<String>());
    let said = format!("{key}: {}", one_line(text));
    match (state.as_deref(), call) {
        (Some("DESTROYED"), Call::Decrypt(version)) => KmsError::NotFound(format!(
            "{key}: version {version} is destroyed, and nothing but another root key opens what it wrapped"
        )),
        (Some("DESTROYED"), _) => KmsError::Disabled(format!("{said}; make another version the primary one")),
        (Some("DESTROY_SCHEDULED"), _) => KmsError::Disabled(format!("{said}; {RESTORE}")),
        (Some("DISABLED"), _) => KmsError::Disabled(format!("{said}; {ENABLE}")),
        (Some("PENDING_GENERATION" | "PENDING_IMPORT"), _) => KmsError::Unreachable(said),
        _ => KmsError::Disabled(said),
    }
}

/// An answer that is not in the service's form: from a proxy, a load balancer, or something else altogether.
fn http(code: u16, key: &str) -> KmsError {
    let said = format!("{key}: HTTP status {code}, not in the form of Cloud KMS");
    match code {
        429 => KmsError::Throttled(said),
        401 => KmsError::Credentials(said),
        403 => KmsError::Denied(said),
        408 | 500.. => KmsError::Unreachable(said),
        // A 404 of the service's own has a status: this one says nothing about the key.
        _ => KmsError::Config(format!("{said}; check endpoint under [services.gcp-kms]")),
    }
}

/// Whether the service did not accept the access token: another one may do.
pub fn is_unauthenticated(e: &Error) -> bool {
    match e.status() {
        Some(s) => s.code == Code::Unauthenticated,
        None => e.http_status_code() == Some(401),
    }
}

/// No access token was to be had, because of `why`. `transient`: the library thinks that it may work later. `unproven`: no credentials
/// are configured and none worked so far, so that only the metadata server was left to ask: most likely this is no
/// machine of Google's and somebody has to log in.
pub fn no_token(why: &str, transient: bool, unproven: bool, key: &str) -> KmsError {
    let why = one_line(why);
    match (unproven, transient) {
        (true, _) => KmsError::Credentials(format!(
            "{key}: no credentials found; set credentials_file under [services.gcp-kms] or \
             GOOGLE_APPLICATION_CREDENTIALS, or run: gcloud auth application-default login"
        )),
        (false, true) => KmsError::Unreachable(format!("{key}: no access token: {why}")),
        (false, false) => KmsError::Credentials(format!("{key}: no access token: {why}")),
    }
}

/// The primary version's number, if `found` is `name` and can wrap now.
///
/// # Errors
/// What is wrong with it.
pub fn usable(found: &CryptoKey, name: &str, key: &str) -> Result<u64, KmsError> {
    if found.name != name {
        let other = one_line(&found.name);
        return Err(KmsError::Config(format!("{key}: the answer is about another key, '{other}'; check endpoint")));
    }
    if found.purpose != Purpose::EncryptDecrypt {
        let purpose = found.purpose.name().unwrap_or("unknown").to_owned();
        return Err(KmsError::Config(format!(
            "{key}: its purpose is {purpose}; use a key made with: gcloud kms keys create --purpose=encryption"
        )));
    }
    let Some(primary) = &found.primary else {
        return Err(KmsError::Disabled(format!("{key}: it has no primary version; make one the primary version")));
    };
    let version = super::answer::version_of(&primary.name, name)
        .ok_or_else(|| KmsError::Config(format!("{key}: the answer names another key's version; check endpoint")))?;
    let is = |what: &str, next: &str| {
        let text = format!("{key}: its primary version {version} is {what}");
        if next.is_empty() { text } else { format!("{text}; {next}") }
    };
    match &primary.state {
        State::Enabled => Ok(version),
        State::Disabled => Err(KmsError::Disabled(is("disabled", ENABLE))),
        State::DestroyScheduled => Err(KmsError::Disabled(is("scheduled for destruction", RESTORE))),
        State::Destroyed => Err(KmsError::Disabled(is("destroyed", "make another version the primary one"))),
        State::PendingGeneration | State::PendingImport => Err(KmsError::Unreachable(is("not ready yet", ""))),
        other => Err(KmsError::Disabled(is(other.name().unwrap_or("in an unknown state"), ""))),
    }
}

/// The error and what caused it, in one line.
pub fn said_by(e: &(dyn std::error::Error + 'static)) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(cause) = next {
        let more = cause.to_string();
        // Many an error repeats its cause.
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = cause.source();
    }
    one_line(&text)
}

/// What caused `e` in the end. Errors of the network come in many layers, of which the outer ones say little, and that
/// in many words.
pub fn root_cause(e: &(dyn std::error::Error + 'static)) -> String {
    let mut last = e;
    while let Some(cause) = last.source() {
        last = cause;
    }
    one_line(&last.to_string())
}

/// What came from elsewhere, fit for a message: one line, no control characters, not endless.
pub fn one_line(text: &str) -> String {
    let plain: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let words: Vec<&str> = plain.split_whitespace().collect();
    let line = words.join(" ");
    match line.char_indices().nth(SAID_MAX) {
        Some((cut, _)) => format!("{}…", line.get(..cut).unwrap_or_default()),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use google_cloud_gax::error::rpc::Status;
    use google_cloud_kms_v1::model::CryptoKeyVersion;

    const KEY: &str = "gcp-kms://projects/p/locations/l/keyRings/r/cryptoKeys/k";
    const NAME: &str = "projects/p/locations/l/keyRings/r/cryptoKeys/k";

    /// Every error class, from every form an error comes in.
    #[test]
    fn every_failure_has_its_class_and_names_the_key() {
        let service = |code, text: &str| Error::service(Status::default().set_code(code).set_message(text));
        let state = |s| {
            service(
                Code::FailedPrecondition,
                &format!("{NAME}/cryptoKeyVersions/3 is not enabled, current state is: {s}."),
            )
        };
        let http = |code| Error::http(code, Default::default(), Vec::from("<html>").into());
        let io = || std::io::Error::other("reset");
        let old = Call::Decrypt(3);
        let failed = "Decryption failed: verify that 'name' refers to the correct CryptoKey.";
        let crc = "The checksum in field plaintext_crc32c did not match the data in field plaintext.";
        let table = [
            (service(Code::ResourceExhausted, "Quota exceeded"), Call::Encrypt, "kms-throttled"),
            (service(Code::PermissionDenied, "Permission denied"), old, "kms-denied"),
            (service(Code::Unauthenticated, "invalid credentials"), old, "kms-credentials"),
            (service(Code::NotFound, "CryptoKey not found"), Call::Get, "kms-not-found"),
            (service(Code::InvalidArgument, failed), old, "kms-bad-ciphertext"),
            (service(Code::InvalidArgument, "ciphertext is malformed"), old, "kms-bad-ciphertext"),
            (service(Code::InvalidArgument, failed), Call::Encrypt, "kms-config"),
            (service(Code::InvalidArgument, "name is malformed"), old, "kms-config"),
            (service(Code::InvalidArgument, crc), Call::Encrypt, "kms-unreachable"),
            (service(Code::InvalidArgument, "ciphertext_crc32c does not match"), old, "kms-unreachable"),
            (state("DISABLED"), old, "kms-disabled"),
            (state("DISABLED"), Call::Encrypt, "kms-disabled"),
            (state("DESTROY_SCHEDULED"), old, "kms-disabled"),
            (state("DESTROY_SCHEDULED"), Call::Encrypt, "kms-disabled"),
            (state("DESTROYED"), old, "kms-not-found"),
            (state("DESTROYED"), Call::Encrypt, "kms-disabled"),
            (state("PENDING_GENERATION"), Call::Encrypt, "kms-unreachable"),
            (state("IMPORT_FAILED"), Call::Encrypt, "kms-disabled"),
            (service(Code::FailedPrecondition, "no primary version"), Call::Encrypt, "kms-disabled"),
            (service(Code::Unavailable, "try again"), old, "kms-unreachable"),
            (service(Code::Internal, "oops"), old, "kms-unreachable"),
            (service(Code::DeadlineExceeded, "late"), old, "kms-unreachable"),
            (service(Code::Aborted, "oops"), old, "kms-unreachable"),
            (service(Code::Cancelled, "oops"), old, "kms-unreachable"),
            (service(Code::Unknown, "oops"), old, "kms-unreachable"),
            (service(Code::DataLoss, "oops"), old, "kms-unreachable"),
            (service(Code::Unimplemented, "no such method"), old, "kms-config"),
            (http(429), old, "kms-throttled"),
            (http(401), old, "kms-credentials"),
            (http(403), old, "kms-denied"),
            (http(408), old, "kms-unreachable"),
            (http(500), old, "kms-unreachable"),
            (http(503), old, "kms-unreachable"),
            (http(404), old, "kms-config"),
            (http(307), old, "kms-config"),
            (http(407), old, "kms-config"),
            (Error::timeout(io()), old, "kms-unreachable"),
            (Error::connect(io()), old, "kms-unreachable"),
            (Error::io(io()), old, "kms-unreachable"),
            (Error::deser(io()), old, "kms-unreachable"),
            (Error::ser(io()), old, "kms-config"),
        ];
        for (e, call, want) in table {
            let got = failure(&e, call, KEY);
            let text = got.to_string();
            assert_eq!(got.code(), want, "{e:?} -> {text}");
            assert!(text.contains(KEY) && !text.contains('\n'), "{text}");
        }
    }

    #[test]
    fn messages_say_what_to_do_next() {
        let text = |code, text: &str, call| status(code, text, call, KEY).to_string();
        let state = |s: &str| format!("x is not enabled, current state is: {s}.");
        for (got, want) in [
            (text(Code::FailedPrecondition, &state("DISABLED"), Call::Get), "gcloud kms keys versions enable"),
            (
                text(Code::FailedPrecondition, &state("DESTROY_SCHEDULED"), Call::Get),
                "gcloud kms keys versions restore",
            ),
            (text(Code::FailedPrecondition, &state("DESTROYED"), Call::Decrypt(3)), "version 3 is destroyed"),
            (text(Code::PermissionDenied, "no", Call::Get), "roles/cloudkms.cryptoKeyEncrypterDecrypter"),
            (text(Code::ResourceExhausted, "no", Call::Get), "quotas"),
        ] {
            assert!(got.contains(want), "{got}");
        }
    }

    #[test]
    fn a_missing_token_is_told_from_one_that_may_come() {
        let of = |transient, unproven| no_token("why", transient, unproven, KEY).code();
        assert_eq!(of(true, false), "kms-unreachable");
        assert_eq!(of(false, false), "kms-credentials");
        assert_eq!((of(true, true), of(false, true)), ("kms-credentials", "kms-credentials"));
        let e = no_token("why", true, true, KEY).to_string();
        assert!(e.contains("GOOGLE_APPLICATION_CREDENTIALS") && e.contains("gcloud auth"), "{e}");
    }

    #[test]
    fn only_a_key_that_can_wrap_is_usable() {
        let version = |n: u64| format!("{NAME}/cryptoKeyVersions/{n}");
        let key = |state| {
            let primary = CryptoKeyVersion::new().set_name(version(4)).set_state(state);
            CryptoKey::new().set_name(NAME).set_purpose(Purpose::EncryptDecrypt).set_primary(primary)
        };
        let class_of = |k: &CryptoKey| usable(k, NAME, KEY).map_err(|e| e.code());
        assert_eq!(class_of(&key(State::Enabled)), Ok(4));
        for (state, want) in [
            (State::Disabled, "kms-disabled"),
            (State::Destroyed, "kms-disabled"),
            (State::DestroyScheduled, "kms-disabled"),
            (State::ImportFailed, "kms-disabled"),
            (State::GenerationFailed, "kms-disabled"),
            (State::Unspecified, "kms-disabled"),
            (State::from(99), "kms-disabled"),
            (State::PendingGeneration, "kms-unreachable"),
            (State::PendingImport, "kms-unreachable"),
        ] {
            assert_eq!(class_of(&key(state.clone())), Err(want), "{state:?}");
        }
        let good = || key(State::Enabled);
        assert_eq!(class_of(&good().set_name("projects/p/locations/l/keyRings/r/cryptoKeys/k2")), Err("kms-config"));
        assert_eq!(class_of(&good().set_purpose(Purpose::AsymmetricSign)), Err("kms-config"));
        assert_eq!(class_of(&good().set_or_clear_primary(None::<CryptoKeyVersion>)), Err("kms-disabled"));
        let foreign = CryptoKeyVersion::new().set_name("x/cryptoKeyVersions/4").set_state(State::Enabled);
        assert_eq!(class_of(&good().set_primary(foreign)), Err("kms-config"));
    }

    #[test]
    fn of_many_layers_the_innermost_is_shown() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let e = failure(&Error::connect(refused), Call::Get, KEY).to_string();
        assert_eq!(e, format!("key service unreachable: {KEY}: cannot connect: connection refused"));
        let broken = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        let e = failure(&Error::io(broken), Call::Get, KEY).to_string();
        assert_eq!(e, format!("key service unreachable: {KEY}: the connection broke: connection reset"));
    }

    #[test]
    fn what_comes_from_elsewhere_becomes_one_short_line() {
        assert_eq!(one_line("a\n\tb\u{1b}[31m  c\0"), "a b [31m c");
        let long = one_line(&"é".repeat(1000));
        assert_eq!(long.chars().count(), SAID_MAX + 1);
        assert!(long.ends_with('…'));
    }
}
