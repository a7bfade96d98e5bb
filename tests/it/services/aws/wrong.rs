//! What the provider says when something is wrong.

use super::super::kms_server::{ACCOUNT, REGION, alone};
use super::super::server::in_the_end;
use super::{Place, context, open};
use envelopefs::crypto::secret::Secret32;
use envelopefs::kms::services::AwsOptions;
use envelopefs::kms::{KeyProvider, KmsError};
use serde_json::json;

macro_rules! name {
    ($test:literal) => {
        concat!("services::aws::wrong::", $test)
    };
}

#[track_caller]
fn fails<T>(r: Result<T, KmsError>, expected: &str, says: &str) {
    let e = r.err().unwrap_or_else(|| panic!("it went well; expected: {expected}"));
    let text = e.to_string();
    assert_eq!(e.code(), expected, "{text}");
    assert!(text.contains(says), "{text:?} lacks {says:?}");
    assert!(!text.chars().any(char::is_control), "{text:?}");
}

#[test]
fn every_error_of_the_service_has_its_class_and_a_message_that_helps() {
    alone(name!("every_error_of_the_service_has_its_class_and_a_message_that_helps"), &[], || {
        let at = Place::new();
        let arn = at.kms.create_key();
        let (p, c, key) = (at.key(&arn), context(), Secret32::random());
        let w = p.wrap(&key, &c).unwrap();
        for (code, status, expected, says) in [
            ("ThrottlingException", 400, "kms-throttled", "injected"),
            ("LimitExceededException", 400, "kms-throttled", "injected"),
            ("AccessDeniedException", 400, "kms-denied", "allow kms:Decrypt"),
            ("UnrecognizedClientException", 400, "kms-credentials", "aws sso login"),
            ("ExpiredTokenException", 400, "kms-credentials", "aws sso login"),
            ("InvalidSignatureException", 400, "kms-credentials", "aws sso login"),
            ("DisabledException", 400, "kms-disabled", "aws kms enable-key"),
            ("KMSInvalidStateException", 400, "kms-disabled", "aws kms describe-key"),
            ("NotFoundException", 400, "kms-not-found", "check the key's name"),
            ("InvalidCiphertextException", 400, "kms-bad-ciphertext", "injected"),
            ("IncorrectKeyException", 400, "kms-bad-ciphertext", "injected"),
            ("KMSInternalException", 500, "kms-unreachable", "injected"),
            ("DependencyTimeoutException", 503, "kms-unreachable", "injected"),
            ("KeyUnavailableException", 500, "kms-unreachable", "injected"),
            ("InvalidKeyUsageException", 400, "kms-config", "injected"),
        ] {
            at.kms.reset();
            at.kms.fault(json!({"op": "Decrypt", "code": code, "status": status}));
            fails(p.unwrap(&w, &c), expected, says);
            assert_eq!(at.kms.calls().of("Decrypt"), 1, "{code}: the provider itself does not try again");
            assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key), "and then all is well");
        }
        // The same class from every operation.
        at.kms.fault(json!({"op": "*", "code": "AccessDeniedException", "count": 5}));
        fails(p.wrap(&key, &c), "kms-denied", "allow kms:Encrypt");
        fails(p.unwrap(&w, &c), "kms-denied", "allow kms:Decrypt");
        fails(p.rewrap(&w, &c, &c), "kms-denied", "allow kms:ReEncryptFrom and kms:ReEncryptTo");
        fails(p.generate(&c), "kms-denied", "allow kms:GenerateDataKey");
        fails(p.health(), "kms-denied", "allow kms:DescribeKey");
        assert_eq!(p.health(), Ok(()));
    });
}

#[test]
fn a_key_that_cannot_be_used_says_why() {
    alone(name!("a_key_that_cannot_be_used_says_why"), &[], || {
        let at = Place::new();
        let arn = at.kms.create_key();
        let (p, c) = (at.key(&arn), context());
        let w = p.wrap(&Secret32::random(), &c).unwrap();
        let id = json!({"KeyId": arn});

        at.kms.admin("DisableKey", id.clone());
        fails(p.unwrap(&w, &c), "kms-disabled", "aws kms enable-key");
        fails(p.wrap(&Secret32::random(), &c), "kms-disabled", &arn);
        fails(p.rewrap(&w, &c, &c), "kms-disabled", &arn);
        fails(p.generate(&c), "kms-disabled", &arn);
        fails(p.health(), "kms-disabled", "is disabled; if that is a mistake: aws kms enable-key");
        at.kms.admin("EnableKey", id.clone());
        assert_eq!(p.health(), Ok(()));

        at.kms.admin("ScheduleKeyDeletion", json!({"KeyId": arn, "PendingWindowInDays": 7}));
        for r in [p.unwrap(&w, &c).map(drop), p.health()] {
            fails(r.clone(), "kms-disabled", "will be deleted on 20");
            fails(r, "kms-disabled", "aws kms cancel-key-deletion");
        }
        at.kms.admin("CancelKeyDeletion", id.clone());
        at.kms.admin("EnableKey", id);
        assert!(p.unwrap(&w, &c).is_ok());

        // A key that is gone for good is as one that never was.
        let gone = format!("arn:aws:kms:{REGION}:{ACCOUNT}:key/00000000-0000-0000-0000-000000000000");
        for uri in [gone, format!("alias/none?region={REGION}")] {
            let p = at.key(&uri);
            fails(p.wrap(&Secret32::random(), &c), "kms-not-found", "its account and its region");
            fails(p.health(), "kms-not-found", "check the key's name");
        }
        let rsa = at.kms.admin("CreateKey", json!({"KeySpec": "RSA_2048", "KeyUsage": "SIGN_VERIFY"}));
        fails(at.key(rsa["KeyMetadata"]["Arn"].as_str().unwrap()).health(), "kms-config", "SYMMETRIC_DEFAULT");
    });
}

/// By ARN, the caller need not be allowed to describe the key; by alias it must, and hears so.
#[test]
fn describing_may_be_denied_if_the_arn_is_known() {
    alone(name!("describing_may_be_denied_if_the_arn_is_known"), &[], || {
        let at = Place::new();
        let arn = at.kms.create_alias("alias/a");
        at.kms.fault(json!({"op": "DescribeKey", "code": "AccessDeniedException", "count": 1000}));
        let (p, c, key) = (at.key(&arn), context(), Secret32::random());
        let w = p.wrap(&key, &c).unwrap();
        assert!(p.unwrap(&w, &c).unwrap().ct_eq(&key));
        fails(p.rewrap_due(&w), "kms-denied", "kms:DescribeKey");
        fails(at.key(&format!("alias/a?region={REGION}")).unwrap(&w, &c), "kms-denied", "allow kms:DescribeKey");
        // Without knowing its material a rewrap is due as soon as somebody may look.
        at.kms.reset();
        let p = at.key(&arn);
        assert_eq!(p.rewrap_due(&w), Ok(true));
        assert_eq!(p.rewrap_due(&p.rewrap(&w, &c, &c).unwrap()), Ok(false));
    });
}

#[test]
fn a_service_that_does_not_answer_is_unreachable() {
    alone(name!("a_service_that_does_not_answer_is_unreachable"), &[], || {
        let mut at = Place::new();
        let arn = at.kms.create_key();
        let o = AwsOptions { attempt_timeout_ms: Some(500), ..at.options() };
        let (p, c, key) = (open(&arn, o).unwrap(), context(), Secret32::random());
        let w = in_the_end(|| p.wrap(&key, &c));
        let all = |p: &dyn KeyProvider, says: &str| {
            fails(p.wrap(&key, &c), "kms-unreachable", says);
            fails(p.unwrap(&w, &c), "kms-unreachable", says);
            fails(p.health(), "kms-unreachable", says);
        };
        at.kms.fault(json!({"op": "Decrypt", "drop": true}));
        fails(p.unwrap(&w, &c), "kms-unreachable", "AWS KMS Decrypt");
        // A lost connection is made anew.
        assert!(in_the_end(|| p.unwrap(&w, &c)).ct_eq(&key));
        // Nothing ends these calls but their time limit.
        at.kms.server.freeze();
        all(&*p, "timeout occurred after 500ms");
        at.kms.server.thaw();
        assert!(in_the_end(|| p.unwrap(&w, &c)).ct_eq(&key));
        at.kms.server.kill();
        all(&*p, "AWS KMS");
    });
}

#[test]
fn without_credentials_it_says_so() {
    let none = [("AWS_ACCESS_KEY_ID", ""), ("AWS_SECRET_ACCESS_KEY", "")];
    alone(name!("without_credentials_it_says_so"), &none, || {
        let at = Place::new();
        let p = at.key(&at.kms.create_key());
        at.kms.reset();
        fails(p.wrap(&Secret32::random(), &context()), "kms-credentials", "no AWS credentials");
        fails(p.health(), "kms-credentials", "aws sso login");
        let profile = at.key("alias/a?region=eu-west-1&profile=nobody");
        fails(profile.health(), "kms-credentials", "nobody");
        assert_eq!(at.kms.calls().total(), 0);
    });
}

#[test]
fn without_a_region_it_says_what_to_write() {
    alone(name!("without_a_region_it_says_what_to_write"), &[], || {
        let o = || AwsOptions { endpoint: Some("http://127.0.0.1:1".into()), ..AwsOptions::default() };
        let p = open("alias/a", o()).unwrap();
        for _ in 0..2 {
            fails(p.health(), "kms-config", "aws-kms://…?region=REGION");
        }
        // With one, the call is made, to nobody.
        let p = open("alias/a", AwsOptions { region: Some("eu-west-1".into()), ..o() }).unwrap();
        fails(p.health(), "kms-unreachable", "AWS KMS DescribeKey with alias/a");
        fails(open("arn:aws:kms:eu-west-1:1:key/k?region=us-east-1", o()), "kms-config", "leave ?region=us-east-1 out");
        let bad = AwsOptions { endpoint: Some("http://kms.example".into()), ..AwsOptions::default() };
        fails(open("alias/a", bad), "kms-config", "use https://");
    });
}

/// The state that is asked for is that of the key that the call was about, not of what the alias stands for now.
#[test]
fn what_is_said_of_a_key_is_about_that_key() {
    alone(name!("what_is_said_of_a_key_is_about_that_key"), &[], || {
        let at = Place::new();
        let (old, c) = (at.kms.create_alias("alias/a"), context());
        let p = at.key(&format!("alias/a?region={REGION}"));
        let w = p.wrap(&Secret32::random(), &c).unwrap();
        let new = at.kms.create_key();
        at.kms.admin("UpdateAlias", json!({"AliasName": "alias/a", "TargetKeyId": new}));
        at.kms.admin("ScheduleKeyDeletion", json!({"KeyId": old, "PendingWindowInDays": 7}));
        fails(p.unwrap(&w, &c), "kms-disabled", &format!("AWS KMS key {old} will be deleted on 20"));
        assert_eq!(p.health(), Ok(()), "the new key is well");
    });
}
