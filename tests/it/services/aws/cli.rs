//! From the command line, with the service's calls counted.

use super::super::kms_server::{Kms, REGION, prepare};
use crate::cli::support::Bench;
use serde_json::json;
use std::fs;
use std::process::{Command, Output};

/// Files of a store.
const FILES: u64 = 40;

/// A directory to run the program in, and a service that its configuration names.
struct Site {
    kms: Kms,
    b: Bench,
}

impl Site {
    fn new() -> Self {
        let b = Bench::new();
        let kms = Kms::start(&b.path(""));
        let s = Self { kms, b };
        s.configure(&format!("endpoint = \"{}\"\nregion = \"{REGION}\"\n", s.kms.endpoint()));
        s
    }

    fn configure(&self, aws: &str) {
        fs::write(self.b.path("config.toml"), format!("[services.aws-kms]\n{aws}")).unwrap();
    }

    fn command(&self, line: &str) -> Command {
        let mut c = self.b.command(line);
        prepare(&mut c);
        if !line.starts_with("unmount") {
            c.arg("--config").arg(self.b.path("config.toml"));
        }
        c
    }

    fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    #[track_caller]
    fn ok(&self, line: &str) {
        let o = self.run(line);
        assert!(o.status.success(), "{line}: {}\n{}", self.b.masked(&o.stderr), self.kms.server.log());
    }

    #[track_caller]
    fn fails(&self, line: &str, code: i32, says: &str) {
        let o = self.run(line);
        let said = self.b.masked(&o.stderr);
        assert_eq!(o.status.code(), Some(code), "{line}: {said}");
        assert!(said.contains(says) && said.lines().count() == 1, "{line}: {said:?} lacks {says:?}");
    }

    fn write(&self) {
        for n in 0..FILES {
            fs::write(self.b.path(&format!("mnt/{n}")), format!("content {n}")).unwrap();
        }
    }

    fn read(&self) {
        for n in 0..FILES {
            assert_eq!(fs::read_to_string(self.b.path(&format!("mnt/{n}"))).unwrap(), format!("content {n}"));
        }
    }

    /// `ls -l` and what moves names about.
    fn names(&self) {
        for entry in fs::read_dir(self.b.path("mnt")).unwrap() {
            assert!(entry.unwrap().metadata().unwrap().len() > 0);
        }
        fs::rename(self.b.path("mnt/0"), self.b.path("mnt/moved")).unwrap();
        fs::rename(self.b.path("mnt/moved"), self.b.path("mnt/0")).unwrap();
    }

    /// Calls that `work` makes necessary.
    fn calls(&self, work: impl FnOnce()) -> super::super::kms_server::Calls {
        self.kms.reset();
        work();
        self.kms.calls()
    }
}

#[test]
fn a_sealed_store_needs_a_handful_of_calls_whatever_it_holds() {
    let s = Site::new();
    let arn = s.kms.create_alias("alias/store");
    let init = s.calls(|| s.ok("init back --key aws-kms://alias/store"));
    // The store secret and the KEK, each wrapped once and proved in both copies of the keyring.
    assert_eq!((init.of("Encrypt"), init.of("Decrypt"), init.total()), (2, 4, 7), "{init:?}");
    let mount = || s.ok("mount back mnt --log-file DIR/log");
    let mounted = s.calls(mount);
    // The store secret and the KEK; and once, which key the alias stands for.
    assert_eq!((mounted.of("Decrypt"), mounted.of("DescribeKey"), mounted.total()), (2, 1, 3));
    let working = s.calls(|| {
        s.write();
        s.names();
        s.read();
    });
    assert_eq!(working.total(), 0, "{working:?}");
    let rotated = s.calls(|| s.ok("rotate mnt"));
    assert!(rotated.total() <= 16, "{rotated:?}");
    s.read();
    s.ok("unmount mnt");
    // Two KEKs now, of which the retired one holds no file any more.
    let again = s.calls(mount);
    assert!(again.of("Decrypt") <= 3 && again.total() <= 4, "{again:?}");
    assert_eq!(s.calls(|| s.read()).total(), 0);
    s.ok("unmount mnt");

    // The key is rotated: what it wrapped moves to the new material inside the service, and once is enough.
    s.kms.admin("RotateKeyOnDemand", json!({"KeyId": arn}));
    let refreshed = s.calls(|| s.ok("key refresh back"));
    assert!((2..=3).contains(&refreshed.of("ReEncrypt")) && refreshed.of("Encrypt") == 0, "{refreshed:?}");
    assert_eq!(s.calls(|| s.ok("key refresh back")).of("ReEncrypt"), 0);

    // By ARN there is nothing to ask; what the URI does not allow is not asked for.
    let by_arn = s.calls(|| s.ok(&format!("mount back mnt --key aws-kms://{arn}")));
    assert_eq!((by_arn.of("DescribeKey"), by_arn.total()), (0, by_arn.of("Decrypt")), "{by_arn:?}");
    s.ok("unmount mnt");
    let other = s.kms.create_key();
    let refused = s.calls(|| s.fails(&format!("mount back mnt --key aws-kms://{other}"), 4, "none of the root keys"));
    assert_eq!(refused.total(), 0, "{refused:?}");
}

#[test]
fn an_external_store_needs_a_call_for_each_create_and_each_cold_open() {
    let s = Site::new();
    s.kms.create_alias("alias/store");
    s.ok("init back --kek external --key aws-kms://alias/store");
    s.ok("mount back mnt --log-file DIR/log");
    let created = s.calls(|| s.write());
    // One for each file, and for those that are made ready for files to come.
    assert!((FILES..=FILES + 64).contains(&created.of("Encrypt")), "{created:?}");
    assert!(created.of("DescribeKey") <= 2 && created.of("Decrypt") <= FILES, "{created:?}");
    assert_eq!(s.calls(|| s.names()).of("Decrypt"), 0, "names need no key service");
    assert_eq!(s.calls(|| s.read()).of("Decrypt"), 0, "the keys are still there");
    s.ok("unmount mnt");
    s.ok("mount back mnt");
    let cold = s.calls(|| s.read());
    // One for each; a key that was unwrapped ahead just when its file was opened may be asked for twice.
    let twice = cold.of("Decrypt").checked_sub(FILES).unwrap();
    assert!(twice <= FILES / 4 && cold.total() <= FILES + twice + 1, "{cold:?}");
    assert_eq!(s.calls(|| s.read()).total(), 0);
    // To another external KEK: each DEK is re-wrapped by the service, and unwrapped to prove it.
    let rotated = s.calls(|| s.ok("rotate mnt --kek external --key aws-kms://alias/store"));
    assert_eq!(rotated.of("ReEncrypt"), FILES, "{rotated:?}");
    assert!(rotated.of("Encrypt") <= 4 && rotated.of("Decrypt") <= FILES + 8, "{rotated:?}");
    assert!(rotated.of("DescribeKey") <= 4, "{rotated:?}");
    // From external to sealed, on the live mount.
    s.ok("rotate mnt --kek sealed --key aws-kms://alias/store");
    s.ok("unmount mnt");
    s.ok("mount back mnt");
    let sealed = s.calls(|| s.read());
    assert_eq!(sealed.total(), 0, "{sealed:?}");
}

/// Whoever may wrap and unwrap need not be let re-wrap: that costs a call a file and one warning.
#[test]
fn a_key_policy_without_re_encrypt_costs_a_call_a_file_and_one_warning() {
    for (action, lacks) in [("kms:ReEncrypt*", "kms:ReEncryptFrom"), ("kms:ReEncryptTo", "kms:ReEncryptTo")] {
        let s = Site::new();
        let arn = s.kms.create_alias("alias/store");
        s.ok("init back --kek external --key aws-kms://alias/store");
        let statements = [("Allow", "kms:*"), ("Deny", action)]
            .map(|(effect, action)| json!({"Effect": effect, "Principal": "*", "Action": action, "Resource": "*"}));
        let policy = json!({"Version": "2012-10-17", "Statement": statements}).to_string();
        s.kms.admin("PutKeyPolicy", json!({"KeyId": arn, "PolicyName": "default", "Policy": policy}));
        s.ok("mount back mnt --log-file DIR/log");
        s.write();
        let rotated = s.calls(|| s.ok("rotate mnt --kek external --key aws-kms://alias/store"));
        // As many as were under way when the first was denied.
        assert!((1..=16).contains(&rotated.of("ReEncrypt")), "{rotated:?}");
        // And what the new KEK is ready with.
        assert!((FILES..=FILES + 68).contains(&rotated.of("Encrypt")), "{rotated:?}");
        assert!((2 * FILES..=2 * FILES + 8).contains(&rotated.of("Decrypt")), "{rotated:?}");
        s.read();
        let log = fs::read_to_string(s.b.path("log")).unwrap();
        let told: Vec<&str> = log.lines().filter(|l| l.contains("ReEncrypt")).collect();
        assert_eq!(told.len(), 1, "{told:#?}");
        assert!(told[0].contains("WARN") && told[0].contains("re-wrap") && told[0].contains(lacks), "{}", told[0]);
        assert!(told[0].contains("allow kms:ReEncryptFrom and kms:ReEncryptTo"), "{}", told[0]);
        s.ok("unmount mnt");
    }
}

/// The SDK's own chain, endpoint included; moto is STS too, which gives out the last two.
#[test]
fn credentials_region_and_endpoint_are_found_as_amazons_own_tools_find_them() {
    let s = Site::new();
    s.kms.create_alias("alias/store");
    s.configure("");
    let role = "arn:aws:iam::123456789012:role/storage";
    let profiles = format!(
        "[profile work]\nregion = {REGION}\naws_access_key_id = a\naws_secret_access_key = b\n\
         [profile role]\nregion = {REGION}\nrole_arn = {role}\nsource_profile = work\n"
    );
    fs::write(s.b.path("aws"), profiles).unwrap();
    fs::write(s.b.path("token"), "a web identity token").unwrap();
    let (config, token) = (s.b.path("aws"), s.b.path("token"));
    let (config, token, endpoint) = (config.to_str().unwrap(), token.to_str().unwrap(), s.kms.endpoint());
    for (n, (parameters, environment)) in [
        ("?profile=work", vec![("AWS_CONFIG_FILE", config), ("AWS_ENDPOINT_URL_KMS", &endpoint)]),
        ("", vec![("AWS_CONFIG_FILE", config), ("AWS_PROFILE", "work"), ("AWS_ENDPOINT_URL", &endpoint)]),
        ("?profile=role", vec![("AWS_CONFIG_FILE", config), ("AWS_ENDPOINT_URL", &endpoint)]),
        (
            "",
            vec![
                ("AWS_ROLE_ARN", role),
                ("AWS_WEB_IDENTITY_TOKEN_FILE", token),
                ("AWS_REGION", REGION),
                ("AWS_ENDPOINT_URL", &endpoint),
            ],
        ),
    ]
    .into_iter()
    .enumerate()
    {
        s.kms.reset();
        let mut c = s.command(&format!("init new{n} --key aws-kms://alias/store{parameters}"));
        c.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY").envs(environment);
        let o = c.output().unwrap();
        assert!(o.status.success(), "{n}: {}\n{}", s.b.masked(&o.stderr), s.kms.server.log());
        assert_eq!(s.kms.calls().of("Encrypt"), 2);
    }
}

#[test]
fn what_is_wrong_with_the_service_is_said_in_one_line() {
    let mut s = Site::new();
    let arn = s.kms.create_key();
    s.ok(&format!("init back --key aws-kms://{arn}"));
    s.kms.admin("DisableKey", json!({"KeyId": arn}));
    s.fails("mount back mnt", 6, "aws kms enable-key");
    s.kms.admin("EnableKey", json!({"KeyId": arn}));
    s.kms.fault(json!({"op": "Decrypt", "code": "AccessDeniedException", "count": 100}));
    s.fails("mount back mnt", 6, "allow kms:Decrypt");
    s.kms.reset();
    s.fails("init new --key aws-kms://alias/none", 13, "check the key's name, its account and its region");
    s.configure("endpoint = \"http://kms.example\"\n");
    s.fails("mount back mnt", 13, "keys would cross the network in clear");
    s.configure("endpiont = \"x\"\n");
    s.fails("mount back mnt", 16, "endpiont");
    s.configure("");
    s.fails("init new --key aws-kms://alias/none", 13, "no region; write aws-kms://…?region=REGION");
    s.configure(&format!("endpoint = \"{}\"\n", s.kms.endpoint()));
    // What a refused init has left is in nobody's way.
    s.kms.create_alias("alias/none");
    s.ok(&format!("init new --key aws-kms://alias/none?region={REGION}"));
    s.kms.server.kill();
    s.fails("mount back mnt", 5, "key service unreachable");
    assert!(!s.b.is_mounted());
}

/// At the finest level the SDK logs the bodies of requests and answers, and so the keys in them.
#[test]
fn keys_that_go_to_the_service_are_not_in_the_log() {
    let s = Site::new();
    s.kms.create_alias("alias/store");
    s.ok("init back --kek external --key aws-kms://alias/store");
    s.ok("mount back mnt --log-file DIR/log --log-level trace");
    s.write();
    s.ok("unmount mnt");
    let log = fs::read_to_string(s.b.path("log")).unwrap();
    assert!(log.contains("mounted"), "{log}");
    for word in ["Plaintext", "CiphertextBlob", "x-amz-target", "Authorization", "authorization"] {
        assert!(!log.contains(word), "{word} in {}", log.lines().find(|l| l.contains(word)).unwrap_or_default());
    }
}
