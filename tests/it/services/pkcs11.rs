//! `pkcs11:` root keys, on SoftHSM.

use super::softhsm::{MODULE, PIN, SoftHsm, Spy, TOKEN, alone};
use crate::cli::support::{Bench, can_mount, wait_for};
use crate::cli::terminal::on_terminal;
use cryptoki::object::Attribute;
use cryptoki::types::Date;
use envelopefs::crypto::secret::Secret32;
use envelopefs::kms::services::Pkcs11Options;
use envelopefs::kms::{KeyProvider, KeyPurpose, KmsError, WrapContext};
use std::fs;
use std::process::Command;
use std::sync::{Arc, Barrier};

fn context(n: u8) -> WrapContext {
    WrapContext { store: [1; 16], purpose: KeyPurpose::Dek, object: [n; 16], extra: vec![n; 60] }
}

fn is_bad(r: Result<Secret32, KmsError>) -> bool {
    matches!(r, Err(KmsError::BadCiphertext(_)))
}

fn config(r: Result<Arc<dyn KeyProvider>, KmsError>) -> String {
    match r.err() {
        Some(KmsError::Config(text)) => text,
        other => panic!("{other:?}"),
    }
}

/// Everything that must hold for a key, whatever its mechanism; `method` is the number that wraps record.
fn round_trip(k: &Arc<dyn KeyProvider>, again: &Arc<dyn KeyProvider>, method: u8, length: usize) {
    let secret = Secret32::random();
    let w = k.wrap(&secret, &context(1)).unwrap();
    assert_eq!((w[0], w[1], w.len()), (1, method, length));
    assert!(again.unwrap(&w, &context(1)).unwrap().ct_eq(&secret));
    assert!(!k.rewrap_due(&w).unwrap());
    assert_ne!(again.wrap(&secret, &context(2)).unwrap(), w);
    for other in [
        context(2),
        WrapContext { purpose: KeyPurpose::Kek, ..context(1) },
        WrapContext { store: [2; 16], ..context(1) },
        WrapContext { extra: vec![], ..context(1) },
    ] {
        assert!(is_bad(k.unwrap(&w, &other)), "{other:?}");
    }
    // From the first byte of the IV or ciphertext on.
    let start = 4 + usize::from(w[2]);
    for at in [start, start + 11, start + 12, start + 40, w.len() - 1] {
        let mut bad = w.clone();
        bad[at] ^= 0x10;
        assert!(is_bad(k.unwrap(&bad, &context(1))), "byte {at}");
    }
    assert!(is_bad(k.unwrap(&w[..w.len() - 1], &context(1))));
    assert!(is_bad(k.unwrap(b"", &context(1))));
    // After all that, what is good opens as before.
    assert!(k.unwrap(&w, &context(1)).unwrap().ct_eq(&secret));
    let moved = k.rewrap(&w, &context(1), &context(3)).unwrap();
    assert!(again.unwrap(&moved, &context(3)).unwrap().ct_eq(&secret));
    k.health().unwrap();
}

#[test]
fn a_key_for_encryption_wraps_with_aes_gcm() {
    alone(module_path!(), "a_key_for_encryption_wraps_with_aes_gcm", |hsm| {
        hsm.aes("kek", 1, &[]);
        let (k, again) = (hsm.connect("kek").unwrap(), hsm.connect("kek").unwrap());
        round_trip(&k, &again, 1, 4 + 1 + 12 + 48);
        let d = k.describe().unwrap();
        assert_eq!(d.uri, "pkcs11:token=test%20token;object=kek");
        assert!(d.key_id.starts_with("pkcs11:token=test%20token;serial="), "{}", d.key_id);
        assert!(d.key_id.ends_with(";id=%01;type=secret-key"), "{}", d.key_id);
        assert!(d.capabilities.remote && d.capabilities.binds_context && !d.capabilities.native_rewrap);
    });
}

#[test]
fn a_key_for_wrapping_wraps_with_aes_key_wrap() {
    alone(module_path!(), "a_key_for_wrapping_wraps_with_aes_key_wrap", |hsm| {
        hsm.aes_wrapping("kek", 1, &[]);
        let (k, again) = (hsm.connect("kek").unwrap(), hsm.connect("kek").unwrap());
        round_trip(&k, &again, 2, 4 + 1 + 72);
        // A wrap by CKM_AES_KEY_WRAP, as it comes from a token without the padded one: unwrap uses what is recorded.
        let secret = [7u8; 32];
        let hash = envelopefs::crypto::kdf::sha256(&context(1).to_aad());
        let w = hsm.key_wrap(1, &[secret, hash].concat());
        let w = [&[1, 3, 1, 0, 1][..], &w].concat();
        assert_eq!(k.unwrap(&w, &context(1)).unwrap().expose(), &secret);
        assert!(is_bad(k.unwrap(&w, &context(2))));
        // No session object is left behind.
        assert_eq!(hsm.session_objects(), 0);
    });
}

#[test]
fn an_rsa_key_wraps_with_oaep_where_that_is_allowed() {
    alone(module_path!(), "an_rsa_key_wraps_with_oaep_where_that_is_allowed", |hsm| {
        hsm.rsa("kek", 1, 2048);
        hsm.rsa("weak", 2, 1024);
        let uri = "pkcs11:token=test%20token;object=kek";
        assert!(config(hsm.connect("kek")).contains("allow_rsa"));
        let allow = |o: &mut Pkcs11Options| o.allow_rsa = true;
        let (k, again) = (hsm.connect_with(uri, allow).unwrap(), hsm.connect_with(uri, allow).unwrap());
        // SoftHSM 2.6 knows OAEP with SHA-1 only.
        round_trip(&k, &again, 5, 4 + 1 + 256);
        assert!(k.describe().unwrap().key_id.ends_with(";id=%01;type=private"));
        let weak = hsm.connect_with("pkcs11:object=weak;type=private", allow);
        assert!(config(weak).contains("1024 bits"));
        // Without its public half nothing can be wrapped.
        hsm.destroy_public(1);
        assert!(config(hsm.connect_with(uri, allow)).contains("public half"));
    });
}

#[test]
fn keys_that_can_leave_the_token_or_may_not_wrap_are_refused() {
    alone(module_path!(), "keys_that_can_leave_the_token_or_may_not_wrap_are_refused", |hsm| {
        hsm.aes("extractable", 1, &[Attribute::Extractable(true)]);
        hsm.aes("readable", 2, &[Attribute::Sensitive(false)]);
        hsm.aes("short", 3, &[Attribute::ValueLen(16.into())]);
        hsm.aes("idle", 4, &[Attribute::Encrypt(false)]);
        hsm.import("imported", 5);
        hsm.aes_without_id("nameless");
        for (label, why) in [
            ("extractable", "CKA_EXTRACTABLE"),
            ("readable", "CKA_SENSITIVE"),
            ("short", "128 bits"),
            ("idle", "CKA_ENCRYPT"),
            ("imported", "CKA_NEVER_EXTRACTABLE"),
            ("nameless", "no CKA_ID"),
        ] {
            let text = config(hsm.connect(label));
            assert!(text.contains(why) && text.starts_with("pkcs11:token=test%20token;object="), "{text}");
        }
        let imports = |o: &mut Pkcs11Options| o.allow_extractable = true;
        let k = hsm.connect_with("pkcs11:object=imported", imports).unwrap();
        round_trip(&k, &k, 1, 65);
        for label in ["extractable", "readable"] {
            config(hsm.connect_with(&format!("pkcs11:object={label}"), imports));
        }
    });
}

#[test]
fn what_is_ambiguous_or_missing_is_said_with_what_is_there() {
    alone(module_path!(), "what_is_ambiguous_or_missing_is_said_with_what_is_there", |hsm| {
        hsm.init_token("other");
        hsm.init_token("twin");
        hsm.init_token("twin");
        hsm.aes("kek", 1, &[]);
        hsm.aes("kek", 2, &[]);
        hsm.aes("solo", 3, &[]);
        hsm.aes("double", 4, &[]);
        hsm.aes("double too", 4, &[]);
        let with = |uri: &str| hsm.connect_with(uri, |_| {});
        let text = config(with("pkcs11:token=test%20token;object=kek"));
        assert!(text.contains("2 keys match") && text.contains("id=%01;type=secret-key, id=%02"), "{text}");
        with("pkcs11:token=test%20token;object=kek;id=%02").unwrap();
        let text = config(with("pkcs11:token=twin;object=kek"));
        assert!(text.contains("2 tokens match; add serial=") && text.contains("token=twin;serial="), "{text}");
        assert!(config(with("pkcs11:object=solo")).contains("4 tokens match"));
        let text = config(with("pkcs11:token=test%20token;object=double"));
        assert!(text.contains("id=%04;type=secret-key is on the token more than once"), "{text}");
        let e = with("pkcs11:token=no;object=kek").err().unwrap();
        assert!(matches!(&e, KmsError::Unreachable(m) if m.contains("token=other;serial=")), "{e}");
        for uri in ["pkcs11:token=test%20token;object=no", "pkcs11:token=test%20token;object=solo;id=%09"] {
            assert!(matches!(with(uri), Err(KmsError::NotFound(_))), "{uri}");
        }
        // By what else RFC 7512 can name it; a serial number alone does.
        let serial = hsm.module().get_token_info(hsm.slot(TOKEN)).unwrap().serial_number().to_owned();
        let slot = hsm.slot(TOKEN).id();
        for uri in [
            format!("pkcs11:serial={serial};object=solo"),
            format!("pkcs11:slot-id={slot};object=solo"),
            format!("pkcs11:serial={serial};id=%03"),
            format!(
                "pkcs11:serial={serial};model=SoftHSM%20v2;manufacturer=SoftHSM%20project;object=solo;type=secret-key"
            ),
            format!("pkcs11:serial={serial};object=solo;library-manufacturer=SoftHSM;library-version=2.6"),
        ] {
            let k = with(&uri).unwrap_or_else(|e| panic!("{uri}: {e}"));
            assert!(k.describe().unwrap().key_id.ends_with(";id=%03;type=secret-key"));
        }
        let text = config(with(&format!("pkcs11:serial={serial};object=solo;library-version=9.9")));
        assert!(text.contains("which is not meant"), "{text}");
        let only = hsm.connect_with("pkcs11:object=solo", |o| o.token = Some(TOKEN.into()));
        assert!(only.is_ok());
    });
}

#[test]
fn a_module_that_is_none_is_said_to_be_none() {
    alone(module_path!(), "a_module_that_is_none_is_said_to_be_none", |hsm| {
        fs::write(hsm.path("text.so"), "no library".repeat(100)).unwrap();
        let module =
            |path: Option<&std::path::Path>| hsm.connect_with("pkcs11:object=kek", |o| o.module = path.map(Into::into));
        for (path, why) in [
            (Some(hsm.path("missing.so")), "cannot open shared object file"),
            (Some(hsm.path("text.so")), "invalid ELF header"),
            (Some(super::softhsm::library_without_pkcs11()), "C_GetFunctionList"),
            (Some("libsofthsm2.so".into()), "absolute path"),
            (None, "--pkcs11-module"),
        ] {
            let text = config(module(path.as_deref()));
            assert!(text.contains(why) && !text.contains('\n'), "{text}");
        }
        // One that is there but does not come up may come up later: that is no matter of configuration.
        fs::remove_dir_all(hsm.tokens()).unwrap();
        fs::write(hsm.path("softhsm2.conf"), "directories.tokendir = /nonexistent\n").unwrap();
        let e = hsm.connect("kek").err().unwrap();
        assert!(matches!(&e, KmsError::Unreachable(m) if m.contains("does not initialise")), "{e}");
    });
}

#[test]
fn dead_sessions_and_logins_are_opened_again() {
    alone(module_path!(), "dead_sessions_and_logins_are_opened_again", |hsm| {
        hsm.aes("kek", 1, &[]);
        hsm.aes_wrapping("wrapping", 2, &[]);
        let keys = [hsm.connect("kek").unwrap(), hsm.connect("wrapping").unwrap()];
        let secret = Secret32::random();
        let wraps: Vec<Vec<u8>> = keys.iter().map(|k| k.wrap(&secret, &context(1)).unwrap()).collect();
        for _ in 0..3 {
            hsm.close_all_sessions();
            for (k, w) in keys.iter().zip(&wraps) {
                assert!(k.unwrap(w, &context(1)).unwrap().ct_eq(&secret));
            }
            hsm.close_all_sessions();
            keys.iter().for_each(|k| k.health().unwrap());
            hsm.close_all_sessions();
            keys.iter().for_each(|k| drop(k.wrap(&secret, &context(2)).unwrap()));
            // Somebody else in the process logs out: the sessions live, the keys are out of sight.
            hsm.session(TOKEN).logout().unwrap();
            for (k, w) in keys.iter().zip(&wraps) {
                assert!(k.unwrap(w, &context(1)).unwrap().ct_eq(&secret));
            }
            hsm.session(TOKEN).logout().unwrap();
            keys.iter().for_each(|k| k.health().unwrap());
            hsm.session(TOKEN).logout().unwrap();
            // What does not open is still told from a device that does not work.
            assert!(is_bad(keys[0].unwrap(&wraps[0], &context(2))));
        }
    });
}

#[test]
fn a_login_that_ends_is_renewed_with_the_pin_read_again_and_never_with_a_wrong_one() {
    let name = "a_login_that_ends_is_renewed_with_the_pin_read_again_and_never_with_a_wrong_one";
    alone(module_path!(), name, |hsm| {
        hsm.aes("kek", 1, &[]);
        let asked = hsm.path("asked");
        let command = format!("echo x >> {}; cat {}", asked.display(), hsm.path("pin").display());
        let times = || fs::read_to_string(&asked).unwrap_or_default().lines().count();
        let by_command = |o: &mut Pkcs11Options| (o.pin_file, o.pin_command) = (None, Some(command.clone()));
        let k = hsm.connect_with("pkcs11:token=test%20token;object=kek", by_command).unwrap();
        let w = k.wrap(&Secret32::random(), &context(1)).unwrap();
        // All root keys on a token share one login.
        let second = hsm.connect_with("pkcs11:token=test%20token;id=%01", by_command).unwrap();
        assert_eq!(times(), 1);
        hsm.close_all_sessions();
        k.unwrap(&w, &context(1)).unwrap();
        assert_eq!(times(), 2);
        assert!(!hsm.pin_count_is_low());

        fs::write(hsm.path("pin"), "wrong").unwrap();
        hsm.close_all_sessions();
        for n in 0..3 {
            let e = k.unwrap(&w, &context(1)).unwrap_err();
            assert!(matches!(&e, KmsError::Credentials(m) if m.contains("CKR_PIN_INCORRECT")), "{n}: {e}");
            let e = second.health().unwrap_err();
            assert!(matches!(&e, KmsError::Credentials(m) if m.contains("not tried again")), "{n}: {e}");
            let e = hsm.connect("kek").err().unwrap();
            assert!(matches!(&e, KmsError::Credentials(_)), "{n}: {e}");
        }
        assert_eq!(times(), 3, "one wrong PIN, once");
        assert!(hsm.pin_count_is_low());
        // Not even the right one: nobody says which tries the token counts.
        fs::write(hsm.path("pin"), PIN).unwrap();
        assert!(matches!(k.unwrap(&w, &context(1)), Err(KmsError::Credentials(_))));
        assert!(matches!(hsm.connect("kek"), Err(KmsError::Credentials(_))));
        assert_eq!(times(), 3);
    });
}

#[test]
fn a_pin_that_is_not_to_be_had_is_no_refused_pin() {
    alone(module_path!(), "a_pin_that_is_not_to_be_had_is_no_refused_pin", |hsm| {
        hsm.aes("kek", 1, &[]);
        let uri = "pkcs11:token=test%20token;object=kek";
        let e = hsm.connect_with(uri, |o| o.pin_file = Some(hsm.path("none"))).err().unwrap();
        assert!(matches!(&e, KmsError::Credentials(m) if m.starts_with("PIN of token=test%20token;")), "{e}");
        fs::write(hsm.path("pin2"), PIN).unwrap();
        let found = format!("{uri}?pin-source=file:{}", hsm.path("pin2").display());
        hsm.connect_with(&found, |o| o.pin_file = Some(hsm.path("none"))).unwrap().health().unwrap();
        assert!(!hsm.pin_count_is_low());
    });
}

/// A key with this CKA_START_DATE. SoftHSM 2.6 cannot read the date of a private object back.
fn since(year: &[u8; 4]) -> [Attribute; 2] {
    [Attribute::StartDate(Date::new(*year, *b"01", *b"31")), Attribute::Private(false)]
}

#[test]
fn a_key_that_was_deleted_fails_what_it_wrapped_and_nothing_else() {
    alone(module_path!(), "a_key_that_was_deleted_fails_what_it_wrapped_and_nothing_else", |hsm| {
        hsm.aes("kek", 1, &since(b"2025"));
        let k = hsm.connect("kek").unwrap();
        let under_old = k.wrap(&Secret32::random(), &context(1)).unwrap();
        hsm.aes("kek", 2, &since(b"2026"));
        k.health().unwrap();
        let under_new = k.wrap(&Secret32::random(), &context(1)).unwrap();
        assert_eq!((under_old[4], under_new[4]), (1, 2));
        k.unwrap(&under_old, &context(1)).unwrap();

        hsm.destroy(1);
        for _ in 0..2 {
            let e = k.unwrap(&under_old, &context(1)).err().unwrap();
            assert!(matches!(&e, KmsError::NotFound(m) if m.contains("key id=%01;type=secret-key")), "{e}");
            k.unwrap(&under_new, &context(1)).unwrap();
        }
        // A wrap that names a key which never was.
        let mut bad = under_new.clone();
        bad[4] = 9;
        assert!(matches!(k.unwrap(&bad, &context(1)), Err(KmsError::NotFound(_))));
        hsm.destroy(2);
        for _ in 0..2 {
            assert!(matches!(k.unwrap(&under_new, &context(1)), Err(KmsError::NotFound(_))));
            assert!(matches!(k.wrap(&Secret32::random(), &context(1)), Err(KmsError::NotFound(_))));
            assert!(matches!(k.health(), Err(KmsError::NotFound(_))));
        }
    });
}

#[test]
fn a_newer_key_of_the_same_label_wraps_and_the_older_one_still_unwraps() {
    alone(module_path!(), "a_newer_key_of_the_same_label_wraps_and_the_older_one_still_unwraps", |hsm| {
        hsm.aes("kek", 1, &since(b"2025"));
        let (k, exact) = (hsm.connect("kek").unwrap(), hsm.connect_with("pkcs11:id=%01", |_| {}).unwrap());
        let secret = Secret32::random();
        let w = k.wrap(&secret, &context(1)).unwrap();
        // Of another make, which cannot do what the first one does.
        hsm.aes_wrapping("kek", 2, &since(b"2026"));
        assert!(!k.rewrap_due(&w).unwrap(), "not noticed yet");
        k.health().unwrap();
        assert!(k.rewrap_due(&w).unwrap());
        let later = hsm.connect("kek").unwrap();
        assert!(later.rewrap_due(&w).unwrap());
        for k in [&k, &later] {
            assert!(k.unwrap(&w, &context(1)).unwrap().ct_eq(&secret));
            let moved = k.rewrap(&w, &context(1), &context(1)).unwrap();
            assert_eq!((moved[1], moved[4]), (2, 2));
            assert!(!k.rewrap_due(&moved).unwrap());
            assert!(later.unwrap(&moved, &context(1)).unwrap().ct_eq(&secret));
            // A URI that names the key by its id means that one only.
            assert!(!exact.rewrap_due(&w).unwrap());
            assert!(is_bad(exact.unwrap(&moved, &context(1))));
        }
        assert!(!k.rewrap_due(b"not a wrap").unwrap());
        // Other keys of the token are other root keys.
        hsm.aes("other", 3, &[]);
        let other = hsm.connect("other").unwrap();
        assert!(is_bad(other.unwrap(&w, &context(1))));
        assert!(is_bad(k.unwrap(&other.wrap(&secret, &context(1)).unwrap(), &context(1))));
        // A wrap cannot talk us into using what is no root key.
        hsm.aes("kek", 4, &[Attribute::Extractable(true)]);
        let mut bad = w.clone();
        bad[4] = 4;
        let e = k.unwrap(&bad, &context(1)).err().unwrap();
        assert!(matches!(&e, KmsError::BadCiphertext(m) if m.contains("CKA_EXTRACTABLE")), "{e}");
        // Nor into a mechanism that the key is not for.
        let mut bad = w.clone();
        bad.truncate(5);
        bad[1] = 2;
        bad.extend_from_slice(&[0; 72]);
        assert!(is_bad(k.unwrap(&bad, &context(1))));
        assert!(k.unwrap(&w, &context(1)).unwrap().ct_eq(&secret));
    });
}

#[test]
fn a_token_that_goes_away_is_unreachable_and_one_made_anew_has_no_such_key() {
    let name = "a_token_that_goes_away_is_unreachable_and_one_made_anew_has_no_such_key";
    alone(module_path!(), name, |hsm| {
        hsm.aes("kek", 1, &[]);
        let k = hsm.connect("kek").unwrap();
        let w = k.wrap(&Secret32::random(), &context(1)).unwrap();
        let gone = |e: Option<KmsError>| assert!(matches!(e, Some(KmsError::Unreachable(_))), "{e:?}");
        for _ in 0..2 {
            fs::rename(hsm.tokens(), hsm.path("away")).unwrap();
            fs::create_dir(hsm.tokens()).unwrap();
            for _ in 0..2 {
                gone(k.unwrap(&w, &context(1)).err());
                gone(k.health().err());
                gone(k.wrap(&Secret32::random(), &context(1)).err());
                gone(hsm.connect("kek").err());
            }
            // It comes back.
            fs::remove_dir(hsm.tokens()).unwrap();
            fs::rename(hsm.path("away"), hsm.tokens()).unwrap();
            k.unwrap(&w, &context(1)).unwrap();
            hsm.connect("kek").unwrap().unwrap(&w, &context(1)).unwrap();
        }
        // Another one of that name, with the same PIN, made in its place.
        fs::remove_dir_all(hsm.tokens()).unwrap();
        fs::create_dir(hsm.tokens()).unwrap();
        hsm.init_token(TOKEN);
        gone(k.unwrap(&w, &context(1)).err());
        let e = hsm.connect("kek").err();
        assert!(matches!(e, Some(KmsError::NotFound(_))), "{e:?}");
        assert!(!hsm.pin_count_is_low());
    });
}

#[test]
fn eight_threads_share_a_token_and_find_it_reset() {
    alone(module_path!(), "eight_threads_share_a_token_and_find_it_reset", |hsm| {
        hsm.aes("kek", 1, &[]);
        hsm.aes_wrapping("wrapping", 2, &[]);
        let keys = [hsm.connect("kek").unwrap(), hsm.connect("wrapping").unwrap()];
        // SoftHSM itself does not survive a reset in the middle of a call, so all wait for it.
        let (before, after) = (Barrier::new(9), Barrier::new(9));
        std::thread::scope(|t| {
            for n in 0..8 {
                let (k, before, after) = (&keys[n % 2], &before, &after);
                t.spawn(move || {
                    for i in 0..200u8 {
                        let secret = Secret32::random();
                        let w = k.wrap(&secret, &context(i)).unwrap();
                        assert!(k.unwrap(&w, &context(i)).unwrap().ct_eq(&secret));
                        if i % 50 == 49 {
                            before.wait();
                            after.wait();
                        }
                    }
                });
            }
            for _ in 0..4 {
                before.wait();
                hsm.close_all_sessions();
                after.wait();
            }
        });
        assert!(!hsm.pin_count_is_low());
        keys.iter().for_each(|k| k.health().unwrap());
        assert_eq!(hsm.session_objects(), 0);
    });
}

/// A bench whose configuration names the module and the PIN's file, and lets `spy` see the calls.
struct Store {
    b: Bench,
    spy: Spy,
}

const KEK: &str = "pkcs11:token=test%20token;object=kek";

impl Store {
    fn new(hsm: &SoftHsm) -> Self {
        let b = Bench::new();
        let spy = Spy::new(&b);
        let s = Self { b, spy };
        s.configure(&format!("pin_file = {:?}", hsm.path("pin")));
        s
    }

    /// `[services.pkcs11]` with the module and `lines`.
    fn configure(&self, lines: &str) {
        // Short of patience, so that an outage costs the tests no time.
        let limits = "attempts = 2\ndeadline = 1\nbreaker_pause_max = 1\nnegative_cache = 0";
        let module = self.spy.module();
        let text = format!("[services.pkcs11]\nmodule = {module:?}\n{lines}\n[services.limits]\n{limits}\n");
        fs::write(self.b.path("c.toml"), text).unwrap();
    }

    /// The program with the words of `line` and the configuration.
    fn command(&self, line: &str) -> Command {
        let mut c = self.b.command(&format!("{line} --config DIR/c.toml"));
        self.spy.prepare(&mut c);
        c
    }

    #[track_caller]
    fn ok(&self, line: &str) -> String {
        let o = self.command(line).output().unwrap();
        assert!(o.status.success(), "{line}: {:?}\n{}", o.status, self.b.masked(&o.stderr));
        self.b.masked(&o.stdout)
    }

    /// Exit code and message of what must fail.
    #[track_caller]
    fn fails(&self, line: &str) -> (i32, String) {
        let o = self.command(line).output().unwrap();
        let said = self.b.masked(&o.stderr);
        assert!(!o.status.success() && said.lines().count() == 1, "{line}: {said}");
        (o.status.code().unwrap(), said)
    }

    /// Calls that wrapped and that unwrapped since the last time.
    fn calls(&self) -> (usize, usize) {
        let n = (self.spy.calls("C_EncryptInit"), self.spy.calls("C_DecryptInit"));
        self.spy.clear();
        n
    }
}

#[test]
fn a_sealed_store_asks_the_token_a_handful_of_times_and_an_external_one_once_a_file() {
    let name = "a_sealed_store_asks_the_token_a_handful_of_times_and_an_external_one_once_a_file";
    if !can_mount() {
        return;
    }
    alone(module_path!(), name, |hsm| {
        hsm.aes("kek", 1, &[]);
        let s = Store::new(hsm);
        const N: usize = 100;
        let write = |n: std::ops::Range<usize>| n.for_each(|i| fs::write(s.b.path(&format!("mnt/{i}")), "it").unwrap());
        let read = |n: std::ops::Range<usize>| {
            n.for_each(|i| assert_eq!(fs::read(s.b.path(&format!("mnt/{i}"))).unwrap(), b"it"));
        };
        let mount = || {
            s.spy.clear();
            s.ok("mount back mnt --log-file DIR/log");
            assert_eq!(s.spy.calls("C_Login"), 1);
            let (wraps, unwraps) = s.calls();
            // The trial of the key, the store secret, and one for each KEK.
            assert!(wraps <= 4 && unwraps <= 10, "{wraps} {unwraps}");
        };
        s.ok(&format!("init back --key {KEK}"));
        mount();
        write(0..N);
        assert_eq!(s.calls(), (0, 0), "sealed: no call for a new file");
        s.b.ok("unmount mnt");
        mount();
        read(0..N);
        assert_eq!(s.calls(), (0, 0), "sealed: no call for an open");
        s.b.ok("rotate mnt");
        let (wraps, unwraps) = s.calls();
        assert!(wraps <= 4 && unwraps <= 8, "sealed: a rotation wraps the KEK, not the files: {wraps} {unwraps}");
        read(0..N);
        s.b.ok("unmount mnt");
        mount();
        read(0..N);

        s.b.ok("rotate mnt --kek external");
        let (wraps, unwraps) = s.calls();
        assert!((N..N + 8).contains(&wraps) && (N..2 * N + 8).contains(&unwraps), "{wraps} {unwraps}");
        s.b.ok("unmount mnt");
        mount();
        read(0..N);
        let (wraps, unwraps) = s.calls();
        // A key that is unwrapped ahead just when its file is opened may be asked for twice.
        assert!(
            wraps <= 4 && (N..N + N / 4).contains(&unwraps),
            "external: one call for a cold open: {wraps} {unwraps}"
        );
        read(0..N);
        assert_eq!(s.calls().1, 0, "and none for a warm one");
        write(N..2 * N);
        let (wraps, unwraps) = s.calls();
        // Each wrap is unwrapped once before it is believed.
        assert!(wraps <= N + 64 && unwraps <= N + 64, "external: one wrap for a new file: {wraps} {unwraps}");
        s.b.ok("rotate mnt --kek sealed --destroy-old");
        s.calls();
        s.b.ok("unmount mnt");
        mount();
        read(0..2 * N);
        assert_eq!(s.calls(), (0, 0));
        s.b.ok("unmount mnt");
        s.ok("check back --deep");
    });
}

#[test]
fn a_wrong_pin_is_sent_once_however_many_root_keys_are_on_the_token() {
    let name = "a_wrong_pin_is_sent_once_however_many_root_keys_are_on_the_token";
    alone(module_path!(), name, |hsm| {
        hsm.aes("kek", 1, &[]);
        hsm.aes("spare", 2, &[]);
        let s = Store::new(hsm);
        let spare = KEK.replace("=kek", "=spare");
        s.ok(&format!("init back --key {KEK} --key {spare} --key keyfile:DIR/key"));
        s.spy.clear();
        fs::write(s.b.path("wrong"), "0000").unwrap();
        s.configure(&format!("pin_file = {:?}", s.b.path("wrong")));
        let (code, said) = s.fails(&format!("check back --key {KEK} --key {spare}"));
        assert_eq!(code, 13, "{said}");
        assert!(said.contains("refused the PIN (CKR_PIN_INCORRECT); it is not tried again"), "{said}");
        assert_eq!(s.spy.calls("C_Login"), 1);
        assert!(hsm.pin_count_is_low());
        // The third root key opens the store all the same, at the price of one more wrong PIN in this new process.
        s.spy.clear();
        s.ok("check back");
        assert_eq!(s.spy.calls("C_Login"), 1);
        // With the right one, the token forgives.
        s.configure(&format!("pin_file = {:?}", hsm.path("pin")));
        s.ok(&format!("check back --key {spare}"));
        assert!(!hsm.pin_count_is_low());
    });
}

#[test]
fn the_pin_comes_from_where_it_is_said_to_be() {
    if !can_mount() {
        return;
    }
    alone(module_path!(), "the_pin_comes_from_where_it_is_said_to_be", |hsm| {
        hsm.aes("kek", 1, &[]);
        let s = Store::new(hsm);
        s.ok(&format!("init back --key {KEK}"));
        let pin = hsm.path("pin");
        s.configure(&format!("pin_command = \"cat {}\"", pin.display()));
        s.ok("check back");
        s.configure("");
        s.ok(&format!("check back --key {KEK}?pin-source=file:{}", pin.display()));
        // What systemd hands over.
        fs::create_dir(s.b.path("credentials")).unwrap();
        fs::copy(&pin, s.b.path("credentials/envelopefs.pkcs11-pin")).unwrap();
        let o = s.command("check back").env("CREDENTIALS_DIRECTORY", s.b.path("credentials")).output().unwrap();
        assert!(o.status.success(), "{}", s.b.masked(&o.stderr));
        let both = format!("pin_file = {pin:?}\npin_command = \"true\"");
        s.configure(&both);
        let (code, said) = s.fails("check back --key pkcs11:object=kek");
        assert!(code == 13 && said.contains("pin_file and pin_command"), "{code} {said}");

        // A person, before the daemon lets go of the terminal. It keeps the PIN for when the token ends the login.
        s.configure("");
        s.spy.clear();
        let (status, shown) = on_terminal(s.command("mount back mnt --log-file DIR/log"), &[PIN]);
        assert_eq!(status.code(), Some(0), "{shown}");
        assert!(shown.contains("PIN of token 'test%20token': ") && !shown.contains(PIN), "{shown}");
        fs::write(s.b.path("mnt/f"), "x").unwrap();
        s.b.ok("unmount mnt");
        let (status, shown) = on_terminal(s.command("mount back mnt"), &["0000"]);
        assert_eq!(status.code(), Some(13), "{shown}");
        assert_eq!(shown.matches("PIN of token").count(), 1, "{shown}");
        assert_eq!(s.spy.calls("C_Login"), 2, "one right, one wrong");
        // Without one there is nobody to ask.
        let (code, said) = s.fails("mount back mnt");
        assert!(
            code == 13
                && said.contains("no terminal to ask on; add ?pin-source=file:/PATH to the root key, or set pin_file"),
            "{code} {said}"
        );
    });
}

#[test]
fn the_module_is_said_by_the_command_line_or_the_configuration_and_never_by_the_store() {
    let name = "the_module_is_said_by_the_command_line_or_the_configuration_and_never_by_the_store";
    if !can_mount() {
        return;
    }
    alone(module_path!(), name, |hsm| {
        // As the documents say to do it.
        for (label, id) in [("store-2026", "01"), ("store-2027", "02")] {
            let o = Command::new("pkcs11-tool")
                .args(["--module", MODULE, "--token-label", TOKEN, "--login", "--pin", PIN])
                .args(["--keygen", "--key-type", "AES:32", "--label", label, "--id", id])
                .args(["--private", "--sensitive", "--usage-decrypt"])
                .output()
                .unwrap();
            assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
        }
        let b = Bench::new();
        let pin = format!("?pin-source=file:{}", hsm.path("pin").display());
        let key = |label: &str| format!("pkcs11:token=test%20token;object={label}");
        let (old, new) = (key("store-2026"), key("store-2027"));
        b.ok(&format!("init back --key {old}{pin} --pkcs11-module {MODULE}"));
        assert_eq!(b.json("key list back --json")["root_keys"][0]["uri"], old.as_str());
        for line in ["check back --key pkcs11:object=store-2026", "mount back mnt"] {
            let o = b.run(line);
            let said = b.masked(&o.stderr);
            assert!(o.status.code() == Some(13) && said.contains("use --pkcs11-module or module in"), "{line}: {said}");
        }
        // To a daemon that was mounted with something else, the client says it.
        b.ok(&format!("key add back keyfile:DIR/key --open-key {old}{pin} --pkcs11-module {MODULE}"));
        b.ok("mount back mnt --key keyfile:DIR/key --log-file DIR/log");
        fs::write(b.path("mnt/f"), "x").unwrap();
        b.ok(&format!("key add mnt {new}{pin} --pkcs11-module {MODULE}"));
        b.ok(&format!("rotate mnt --key {new}{pin} --pkcs11-module {MODULE} --destroy-old"));
        assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"x");
        b.ok("unmount mnt");
        b.ok(&format!("mount back mnt -o pkcs11_module={MODULE} --key {new}{pin}"));
        assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"x");
        b.ok("unmount mnt");
        let listed = b.ok("key list back");
        assert!(!listed.contains("softhsm") && !listed.contains("pin"), "{listed}");
        // The old key has wrapped no KEK that is left.
        let o = b.run(&format!("check back --key {old}{pin} --pkcs11-module {MODULE}"));
        let said = b.masked(&o.stderr);
        assert!(
            o.status.code() == Some(13) && said.contains("is wrapped by pkcs11:token=test%20token;object=store-2027")
        );
        // Deleted from the token while the keyring still has wraps of it: that keeps no other key from joining.
        hsm.destroy(1);
        hsm.aes("store-2028", 3, &[]);
        let newest = key("store-2028");
        b.ok(&format!("key add back {newest}{pin} --open-key {new}{pin} --pkcs11-module {MODULE}"));
        b.ok(&format!("check back --key {newest}{pin} --pkcs11-module {MODULE}"));
    });
}

#[test]
fn a_token_that_goes_away_under_a_mount_costs_only_what_needs_it() {
    if !can_mount() {
        return;
    }
    alone(module_path!(), "a_token_that_goes_away_under_a_mount_costs_only_what_needs_it", |hsm| {
        hsm.aes("kek", 1, &[]);
        let s = Store::new(hsm);
        s.ok(&format!("init back --key {KEK} --kek external"));
        s.ok("mount back mnt --log-file DIR/log");
        for n in ["cold", "cold too", "warm"] {
            fs::write(s.b.path("mnt").join(n), n).unwrap();
        }
        s.b.ok("unmount mnt");
        s.ok("mount back mnt --log-file DIR/log");
        let read = |n: &str| fs::read(s.b.path("mnt").join(n));
        assert_eq!(read("warm").unwrap(), b"warm");
        fs::rename(hsm.tokens(), hsm.path("away")).unwrap();
        fs::create_dir(hsm.tokens()).unwrap();
        assert_eq!(read("warm").unwrap(), b"warm");
        assert_eq!(read("cold").unwrap_err().raw_os_error(), Some(libc::ENOKEY));
        assert_eq!(fs::read_dir(s.b.path("mnt")).unwrap().count(), 3);
        assert_eq!(fs::metadata(s.b.path("mnt/cold")).unwrap().len(), 4);
        fs::rename(s.b.path("mnt/cold too"), s.b.path("mnt/cold")).unwrap();
        let (code, said) = s.fails(&format!("init other --key {KEK}"));
        assert!(code == 5 && said.contains("no token matches"), "{code} {said}");
        fs::remove_dir(hsm.tokens()).unwrap();
        fs::rename(hsm.path("away"), hsm.tokens()).unwrap();
        // It is back, and so is the daemon, as soon as it looks again.
        wait_for("the token to be used again", || read("cold").is_ok());
        assert_eq!(read("cold").unwrap(), b"cold too");
        s.b.ok("unmount mnt");
    });
}

#[test]
fn a_lock_ends_the_login_and_an_unlock_logs_in_again() {
    if !can_mount() {
        return;
    }
    alone(module_path!(), "a_lock_ends_the_login_and_an_unlock_logs_in_again", |hsm| {
        hsm.aes("kek", 1, &[]);
        for kind in ["sealed", "external"] {
            let s = Store::new(hsm);
            s.ok(&format!("init back --key {KEK} --kek {kind}"));
            s.spy.clear();
            s.ok("mount back mnt --log-file DIR/log");
            let path = |n: &str| s.b.path("mnt").join(n);
            let sessions = || s.spy.calls("C_OpenSession") - s.spy.calls("C_CloseSession");
            fs::write(path("cold"), "cold").unwrap();
            fs::write(path("open"), "open").unwrap();
            let mut open = fs::File::open(path("open")).unwrap();
            assert!(sessions() > 0 && s.spy.calls("C_Login") == 1);
            for round in 1..=2 {
                s.b.ok("lock mnt");
                assert_eq!(sessions(), 0, "{kind}, {round}: the login ends with the last session");
                assert_eq!(fs::read(path("cold")).unwrap_err().raw_os_error(), Some(libc::ENOKEY));
                // The token is away, and back.
                fs::rename(hsm.tokens(), hsm.path("away")).unwrap();
                fs::create_dir(hsm.tokens()).unwrap();
                let o = s.command("unlock mnt").output().unwrap();
                assert_eq!(o.status.code(), Some(5), "{}", s.b.masked(&o.stderr));
                assert_eq!(fs::read(path("cold")).unwrap_err().raw_os_error(), Some(libc::ENOKEY));
                fs::remove_dir(hsm.tokens()).unwrap();
                fs::rename(hsm.path("away"), hsm.tokens()).unwrap();
                let before = s.spy.calls("C_Login");
                assert_eq!(s.ok("unlock mnt"), "unlocked\n");
                assert_eq!(s.spy.calls("C_Login") - before, 1, "{kind}, {round}");
                assert_eq!(fs::read(path("cold")).unwrap(), b"cold");
                let mut text = String::new();
                std::io::Seek::rewind(&mut open).unwrap();
                std::io::Read::read_to_string(&mut open, &mut text).unwrap();
                assert_eq!(text, "open");
                fs::write(path(&format!("new {round}")), "new").unwrap();
            }
            drop(open);
            s.b.ok("unmount mnt");
        }
    });
}

/// The daemon of a detached mount has no terminal, and a lock drops the PIN that was typed for it.
#[test]
fn a_lock_forgets_a_typed_pin_and_an_unlock_says_where_to_put_it() {
    if !can_mount() {
        return;
    }
    alone(module_path!(), "a_lock_forgets_a_typed_pin_and_an_unlock_says_where_to_put_it", |hsm| {
        hsm.aes("kek", 1, &[]);
        let s = Store::new(hsm);
        s.ok(&format!("init back --key {KEK}"));
        s.configure("");
        let (status, shown) = on_terminal(s.command("mount back mnt --log-file DIR/log"), &[PIN]);
        assert!(status.success(), "{shown}");
        fs::write(s.b.path("mnt/f"), "x").unwrap();
        s.b.ok("lock mnt");
        s.spy.clear();
        let (code, said) = s.fails("unlock mnt");
        assert!(
            code == 13
                && said.contains("no terminal to ask on; add ?pin-source=file:/PATH to the root key, or set pin_file"),
            "{code} {said}"
        );
        assert_eq!(s.spy.calls("C_Login"), 0);
        let pin = hsm.path("pin");
        s.ok(&format!("unlock mnt --key {KEK}?pin-source=file:{}", pin.display()));
        assert_eq!(fs::read(s.b.path("mnt/f")).unwrap(), b"x");
        s.b.ok("unmount mnt");
    });
}

/// It was dropped on the way to the daemon, which then said to use it.
#[test]
fn an_unlock_takes_the_module_from_the_command_line() {
    if !can_mount() {
        return;
    }
    alone(module_path!(), "an_unlock_takes_the_module_from_the_command_line", |hsm| {
        hsm.aes("kek", 1, &[]);
        let b = Bench::new();
        let key = format!("{KEK}?pin-source=file:{}", hsm.path("pin").display());
        b.ok(&format!("init back --key {key} --key keyfile:DIR/key --pkcs11-module {MODULE}"));
        b.ok("mount back mnt --key keyfile:DIR/key --log-file DIR/log");
        fs::write(b.path("mnt/f"), "x").unwrap();
        b.ok("lock mnt");
        b.ok(&format!("unlock mnt --key {key} --pkcs11-module {MODULE}"));
        assert_eq!(fs::read(b.path("mnt/f")).unwrap(), b"x");
        b.ok("unmount mnt");
    });
}
