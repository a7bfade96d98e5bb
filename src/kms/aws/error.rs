//! What a failed call to AWS KMS means, and what to say about it.
//!
//! The service answers a throttled call, a denied one and a damaged ciphertext with the same HTTP status, 400, so the
//! error's code decides; the status counts only for an answer without a code, which is some proxy's.

use crate::kms::KmsError;
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_kms::error::{ConnectorError, ProvideErrorMetadata, SdkError};
use std::error::Error;

/// What was asked of the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Encrypt,
    Decrypt,
    ReEncrypt,
    GenerateDataKey,
    DescribeKey,
}

impl Action {
    /// The operation's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Encrypt => "Encrypt",
            Self::Decrypt => "Decrypt",
            Self::ReEncrypt => "ReEncrypt",
            Self::GenerateDataKey => "GenerateDataKey",
            Self::DescribeKey => "DescribeKey",
        }
    }

    /// The permission it needs.
    fn permission(self) -> &'static str {
        match self {
            Self::Encrypt => "kms:Encrypt",
            Self::Decrypt => "kms:Decrypt",
            Self::ReEncrypt => "kms:ReEncryptFrom and kms:ReEncryptTo",
            Self::GenerateDataKey => "kms:GenerateDataKey",
            Self::DescribeKey => "kms:DescribeKey",
        }
    }
}

/// How a call failed, without the SDK's types.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The service, or something on the way, answered with an error.
    Answer { code: Option<String>, status: u16, message: String },
    /// No whole answer in time, or no connection.
    TimedOut(String),
    /// No connection, or one that broke, or an answer that is none.
    Broken(String),
    /// There are no credentials; `network` if that is because whoever gives them did not answer.
    Credentials { network: bool, text: String },
    /// The SDK made no request of it.
    Request(String),
}

/// The code of a call that the key's state does not allow; which state, only [`Action::DescribeKey`] tells.
pub const INVALID_STATE: &str = "KMSInvalidStateException";

const LOG_IN: &str = "log in again (aws sso login), or check the profile and the AWS_… environment of the process that \
                      runs envelopefs";

/// What `f` means. `key` is what the request called the key.
pub fn classify(f: &Failure, action: Action, key: &str) -> KmsError {
    let at = format!("AWS KMS {} with {key}", action.as_str());
    match f {
        Failure::Answer { code, status, message } => answered(code.as_deref(), *status, message, action, key),
        Failure::TimedOut(text) => KmsError::Unreachable(format!("{at}: no answer in time: {text}")),
        Failure::Broken(text) => KmsError::Unreachable(format!("{at}: {text}")),
        Failure::Credentials { network: true, text } => {
            KmsError::Unreachable(format!("{at}: whoever gives out credentials does not answer: {text}"))
        }
        Failure::Credentials { network: false, text } => {
            KmsError::Credentials(format!("{at}: no AWS credentials: {text}; {LOG_IN}"))
        }
        Failure::Request(text) => KmsError::Config(format!("{at}: {text}")),
    }
}

fn answered(code: Option<&str>, status: u16, message: &str, action: Action, key: &str) -> KmsError {
    let what = code.map_or_else(|| format!("HTTP status {status}"), str::to_owned);
    let colon = if message.is_empty() { "" } else { ": " };
    let says = format!("AWS KMS {} with {key}: {what}{colon}{}", action.as_str(), one_line(message));
    match code.unwrap_or_default() {
        "ThrottlingException"
        | "Throttling"
        | "LimitExceededException"
        | "RequestLimitExceeded"
        | "TooManyRequestsException"
        | "RequestThrottled"
        | "RequestThrottledException"
        | "SlowDown" => KmsError::Throttled(says),
        "AccessDeniedException" | "AccessDenied" | "NotAuthorizedException" | "OptInRequired" => {
            KmsError::Denied(format!("{says}; allow {} in the caller's policy or the key's", action.permission()))
        }
        "UnrecognizedClientException"
        | "InvalidClientTokenId"
        | "ExpiredTokenException"
        | "ExpiredToken"
        | "InvalidSignatureException"
        | "SignatureDoesNotMatch"
        | "MissingAuthenticationToken"
        | "MissingAuthenticationTokenException"
        | "IncompleteSignature"
        | "IncompleteSignatureException" => KmsError::Credentials(format!("{says}; {LOG_IN}")),
        "RequestTimeTooSkewed" | "RequestExpired" => KmsError::Credentials(format!("{says}; set this machine's clock")),
        "DisabledException" => {
            KmsError::Disabled(format!("{says}; if that is a mistake: aws kms enable-key --key-id {key}"))
        }
        INVALID_STATE => KmsError::Disabled(format!("{says}; see its state with: aws kms describe-key --key-id {key}")),
        "NotFoundException" => KmsError::NotFound(format!("{says}; check the key's name, its account and its region")),
        "InvalidCiphertextException" | "IncorrectKeyException" => KmsError::BadCiphertext(says),
        "KMSInternalException"
        | "DependencyTimeoutException"
        | "KeyUnavailableException"
        | "ServiceUnavailable"
        | "ServiceUnavailableException"
        | "InternalFailure"
        | "InternalServerError"
        | "InternalError" => KmsError::Unreachable(says),
        "" if status == 429 => KmsError::Throttled(says),
        "" if status >= 500 => KmsError::Unreachable(says),
        // Such as ValidationException and InvalidKeyUsageException: asking again does not help.
        _ => KmsError::Config(says),
    }
}

/// What a key in `state`, as DescribeKey names it, can be used for: all, or an error that says what is wrong with it.
///
/// # Errors
/// [`KmsError::Disabled`] if somebody has to act, [`KmsError::Unreachable`] if the state passes by itself.
pub fn check_state(state: &str, key: &str, deletion: Option<&str>) -> Result<(), KmsError> {
    let on = deletion.map(|d| format!(" on {d}")).unwrap_or_default();
    let cancel = format!("aws kms cancel-key-deletion --key-id {key} && aws kms enable-key --key-id {key}");
    match state {
        "Enabled" => Ok(()),
        "Disabled" => Err(KmsError::Disabled(format!(
            "AWS KMS key {key} is disabled; if that is a mistake: aws kms enable-key --key-id {key}"
        ))),
        "PendingDeletion" => Err(KmsError::Disabled(format!(
            "AWS KMS key {key} will be deleted{on}, and all it protects will be lost; keep it with: {cancel}"
        ))),
        "PendingReplicaDeletion" => Err(KmsError::Disabled(format!(
            "AWS KMS key {key} will be deleted once its replicas are gone; keep it with: {cancel}"
        ))),
        "PendingImport" => Err(KmsError::Disabled(format!("AWS KMS key {key} has no key material; import it again"))),
        "Unavailable" | "Creating" | "Updating" => {
            Err(KmsError::Unreachable(format!("AWS KMS key {key} is {} at the moment", state.to_ascii_lowercase())))
        }
        other => Err(KmsError::Disabled(format!("AWS KMS key {key} is in state {}", one_line(other)))),
    }
}

/// What comes from the service may be shown, on one line and without control characters.
fn one_line(text: &str) -> String {
    text.chars().take(400).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// `e` and what caused it, one after the other.
fn causes<'a>(e: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let mut next = Some(e);
    std::iter::from_fn(move || {
        let e = next?;
        next = e.source();
        Some(e)
    })
}

/// `e` and all that caused it, in one line. Not in Rust's notation, which shows requests and answers.
fn chain(e: &(dyn Error + 'static)) -> String {
    let said: Vec<String> = causes(e).map(ToString::to_string).collect();
    one_line(&said.join(": "))
}

fn find<'a, T: Error + 'static>(e: &'a (dyn Error + 'static)) -> Option<&'a T> {
    causes(e).find_map(|e| e.downcast_ref())
}

/// Reads an SDK error.
pub fn failure<E>(e: &SdkError<E>) -> Failure
where
    E: ProvideErrorMetadata + Error + 'static,
{
    if let SdkError::ServiceError(s) = e {
        let meta = s.err().meta();
        return Failure::Answer {
            code: meta.code().map(str::to_owned),
            status: s.raw().status().as_u16(),
            message: meta.message().unwrap_or_default().to_owned(),
        };
    }
    if let Some(c) = find::<CredentialsError>(e) {
        let network = matches!(c, CredentialsError::ProviderTimedOut(_))
            || find::<ConnectorError>(c).is_some_and(|c| c.is_io() || c.is_timeout());
        let text = match c {
            // Its own words list all the places that have none.
            CredentialsError::CredentialsNotLoaded(_) => {
                "none in the environment or the profile, and none for this machine".into()
            }
            _ => chain(c),
        };
        return Failure::Credentials { network, text };
    }
    match e {
        SdkError::TimeoutError(_) => Failure::TimedOut(chain(e)),
        SdkError::DispatchFailure(d) if d.is_timeout() => Failure::TimedOut(chain(e)),
        SdkError::ConstructionFailure(_) => Failure::Request(chain(e)),
        _ => Failure::Broken(chain(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "arn:aws:kms:eu-west-1:1:key/k";

    fn means(f: &Failure) -> KmsError {
        classify(f, Action::Decrypt, KEY)
    }

    #[test]
    fn every_failure_has_its_class() {
        let answer = |code: &str, status| Failure::Answer {
            code: Some(code).filter(|c| !c.is_empty()).map(str::to_owned),
            status,
            message: "the service's words".into(),
        };
        for (code, status, expected) in [
            ("ThrottlingException", 400, "kms-throttled"),
            ("LimitExceededException", 400, "kms-throttled"),
            ("AccessDeniedException", 400, "kms-denied"),
            ("UnrecognizedClientException", 400, "kms-credentials"),
            ("ExpiredTokenException", 400, "kms-credentials"),
            ("InvalidSignatureException", 400, "kms-credentials"),
            ("InvalidClientTokenId", 403, "kms-credentials"),
            ("RequestTimeTooSkewed", 403, "kms-credentials"),
            ("DisabledException", 400, "kms-disabled"),
            ("KMSInvalidStateException", 400, "kms-disabled"),
            ("NotFoundException", 400, "kms-not-found"),
            ("InvalidCiphertextException", 400, "kms-bad-ciphertext"),
            ("IncorrectKeyException", 400, "kms-bad-ciphertext"),
            ("KMSInternalException", 500, "kms-unreachable"),
            ("DependencyTimeoutException", 503, "kms-unreachable"),
            ("KeyUnavailableException", 500, "kms-unreachable"),
            // The code counts, not the status.
            ("KMSInternalException", 400, "kms-unreachable"),
            ("ThrottlingException", 500, "kms-throttled"),
            ("ValidationException", 400, "kms-config"),
            ("InvalidKeyUsageException", 400, "kms-config"),
            ("SomethingNewException", 500, "kms-config"),
            // A proxy's answer has no code.
            ("", 502, "kms-unreachable"),
            ("", 429, "kms-throttled"),
            ("", 404, "kms-config"),
        ] {
            let e = means(&answer(code, status));
            assert_eq!(e.code(), expected, "{code} {status}");
            let said = e.to_string();
            for part in [code, KEY, "Decrypt", "the service's words"] {
                assert!(said.contains(part), "{code}: {said}");
            }
        }
        for (f, expected) in [
            (Failure::TimedOut("read timeout after 2s".into()), "kms-unreachable"),
            (Failure::Broken("connection refused".into()), "kms-unreachable"),
            (Failure::Credentials { network: true, text: "STS timed out".into() }, "kms-unreachable"),
            (Failure::Credentials { network: false, text: "none".into() }, "kms-credentials"),
            (Failure::Request("no such thing".into()), "kms-config"),
        ] {
            assert_eq!(means(&f).code(), expected, "{f:?}");
        }
    }

    #[test]
    fn messages_say_what_to_do_and_stay_on_one_line() {
        let of = |code: &str| Failure::Answer { code: Some(code.into()), status: 400, message: "a\n\u{1b}[2Jb".into() };
        for (code, advice) in [
            ("AccessDeniedException", "allow kms:Decrypt in the caller's policy or the key's"),
            ("DisabledException", "aws kms enable-key --key-id arn:aws:kms:eu-west-1:1:key/k"),
            ("NotFoundException", "check the key's name, its account and its region"),
            ("ExpiredTokenException", "aws sso login"),
        ] {
            let said = means(&of(code)).to_string();
            assert!(said.contains(advice), "{said}");
            assert!(!said.chars().any(char::is_control), "{said:?}");
        }
        let said = means(&Failure::TimedOut("read timeout after 2s".into())).to_string();
        assert!(said.ends_with("no answer in time: read timeout after 2s"), "{said}");
    }

    #[test]
    fn every_key_state_has_its_class() {
        for (state, expected) in [
            ("Disabled", "kms-disabled"),
            ("PendingDeletion", "kms-disabled"),
            ("PendingReplicaDeletion", "kms-disabled"),
            ("PendingImport", "kms-disabled"),
            ("Unavailable", "kms-unreachable"),
            ("Creating", "kms-unreachable"),
            ("Updating", "kms-unreachable"),
            ("SomethingNew", "kms-disabled"),
        ] {
            let e = check_state(state, KEY, Some("2026-12-01T00:00:00Z")).unwrap_err();
            assert_eq!(e.code(), expected, "{state}");
            assert!(e.to_string().contains(KEY));
        }
        assert_eq!(check_state("Enabled", KEY, None), Ok(()));
        let e = check_state("PendingDeletion", KEY, Some("2026-12-01T00:00:00Z")).unwrap_err().to_string();
        assert!(e.contains("on 2026-12-01") && e.contains("cancel-key-deletion"), "{e}");
    }
}
