//! One store on its way through all four key services, mounted and in use, and what its users see when one fails.

use super::bao::{Bao, POLICY};
use super::gcp::{self, Fake};
use super::kms_server::{Kms, REGION, prepare};
use super::server::Server;
use super::softhsm::{self, MODULE, SoftHsm, TOKEN};
use crate::cli::support::{Bench, wait_for};
use serde_json::json;
use std::fs;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// Every service, and a directory to run the program in whose configuration names them all.
struct Site<'a> {
    hsm: &'a SoftHsm,
    aws: Kms,
    bao: Bao,
    gcp: Fake,
    b: Bench,
    arn: String,
}

impl<'a> Site<'a> {
    fn new(hsm: &'a SoftHsm, more: &str) -> Self {
        let b = Bench::new();
        let (aws, bao, gcp) = (Kms::start(&b.path("")), Bao::persistent(), Fake::start());
        let arn = aws.create_key();
        bao.key("k");
        hsm.aes("k", 1, &[]);
        let token = bao.secret("token-of-the-store", &bao.token(POLICY, &json!({})));
        let config = format!(
            "[services.aws-kms]\nendpoint = \"{}\"\nregion = \"{REGION}\"\n\
             [services.vault]\naddress = \"{}\"\nca_file = \"{}\"\n\
             [services.vault.auth]\nmethod = \"token\"\ntoken_file = \"{}\"\n\
             [services.pkcs11]\nmodule = \"{MODULE}\"\ntoken = \"{TOKEN}\"\npin_file = \"{}\"\n\
             [services.gcp-kms]\nendpoint = \"{}\"\nanonymous = true\n{more}",
            aws.endpoint(),
            bao.address,
            bao.file("ca.pem").display(),
            token.display(),
            hsm.path("pin").display(),
            gcp.endpoint(),
        );
        fs::write(b.path("config.toml"), config).unwrap();
        b.chmod("config.toml", 0o600);
        let pin = hsm.path("pin");
        fs::set_permissions(pin, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        Self { hsm, aws, bao, gcp, b, arn }
    }

    /// The root keys, in the order of the journey.
    fn stations(&self) -> [(&'static str, String); 4] {
        [
            ("aws-kms", format!("aws-kms://{}", self.arn)),
            ("vault", "vault://transit/k".to_owned()),
            ("pkcs11", format!("pkcs11:token={};object=k", TOKEN.replace(' ', "%20"))),
            ("gcp-kms", gcp::uri("k")),
        ]
    }

    fn command(&self, line: &str) -> Command {
        let mut c = self.b.command(line);
        prepare(&mut c);
        c.env("SOFTHSM2_CONF", self.hsm.path("softhsm2.conf"));
        if ["init", "mount", "rotate", "key", "check"].iter().any(|w| line.starts_with(w))
            && !line.starts_with("key list")
        {
            c.arg("--config").arg(self.b.path("config.toml"));
        }
        c
    }

    #[track_caller]
    fn ok(&self, line: &str) -> String {
        let o = self.command(line).output().unwrap();
        assert!(o.status.success(), "{line}: {}", self.b.masked(&o.stderr));
        String::from_utf8(o.stdout).unwrap()
    }

    fn write(&self, n: usize) {
        for i in 0..n {
            fs::write(self.b.path(&format!("mnt/{i}")), format!("content {i}")).unwrap();
        }
    }

    #[track_caller]
    fn read(&self, n: usize) {
        for i in 0..n {
            assert_eq!(fs::read_to_string(self.b.path(&format!("mnt/{i}"))).unwrap(), format!("content {i}"));
        }
    }

    /// Calls of AWS and Google that use a key, so far.
    fn calls(&self) -> u64 {
        let aws = self.aws.calls();
        let used = ["Encrypt", "Decrypt", "GenerateDataKey", "ReEncrypt"].iter().map(|op| aws.of(op)).sum::<u64>();
        used + self.gcp.calls("encrypt") + self.gcp.calls("decrypt")
    }
}

/// From station to station with `rotate --key`; at each one the store is opened by the new root key alone, and the old
/// one is taken out of the keyring.
fn journey(
    site: &Site<'_>,
    (kind, files, rate): (&str, usize, u32),
    during: impl Fn(&Site<'_>, &str, &mut Option<Child>),
) {
    let stations = site.stations();
    site.ok(&format!("init back --kek {kind} --key {}", stations[0].1));
    site.ok("mount back mnt --log-file DIR/log");
    site.write(files);
    site.ok("rotate mnt");
    site.read(files);
    for (from, to) in stations.iter().zip(stations.iter().skip(1).chain(&stations[..1])) {
        // Back at the first station, that service's key is a root key once more, under another id.
        let line = format!("rotate mnt --destroy-old --json --rate {rate} --key {}", to.1);
        let mut run = Some(site.command(&line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
        during(site, to.0, &mut run);
        let o: Output = run.take().unwrap().wait_with_output().unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&o.stdout), String::from_utf8_lossy(&o.stderr));
        assert!(o.status.success(), "{} → {}: {said}", from.0, to.0);
        let report: serde_json::Value = serde_json::from_slice(&o.stdout).unwrap();
        assert_eq!((&report["outcome"], &report["failures_total"]), (&json!("complete"), &json!(0)), "{said}");
        assert_eq!(report["sweep"]["rewrapped"], json!(files), "{said}");
        site.read(files);
        site.ok(&format!("key remove mnt {}", from.1));
        site.ok("unmount mnt");
        site.ok(&format!("mount back mnt --log-file DIR/log --key {}", to.1));
        site.read(files);
        let keys = site.ok("key list back");
        assert!(keys.contains(&to.1) && !keys.contains(&from.1), "{keys}");
    }
    site.ok("unmount mnt");
    site.ok(&format!("check back --deep --key {}", stations[0].1));
}

#[test]
fn a_sealed_store_moves_through_all_services_with_a_handful_of_calls() {
    softhsm::alone(module_path!(), "a_sealed_store_moves_through_all_services_with_a_handful_of_calls", |hsm| {
        let site = Site::new(hsm, "");
        journey(&site, ("sealed", 1000, 100_000), |_, _, _| {});
        // Of 1,000 files and five rotations; a call for each file would be thousands.
        assert!(site.calls() < 150, "{}", site.calls());
    });
}

/// Stops a server from answering, longer than a call waits for it.
fn freeze(server: &Server) {
    server.freeze();
    std::thread::sleep(Duration::from_secs(5));
    server.thaw();
}

/// Each rotation meets an outage of the service it moves to, in its middle. (Servers that are killed there and started
/// again: `gcp::a_rotation_survives_the_end_of_the_server_in_its_middle_and_leads_to_another_root_key`,
/// `vault_cli::a_mount_outlives_the_server_and_its_token`.)
#[test]
fn an_external_store_moves_through_all_services_which_fail_on_the_way() {
    softhsm::alone(module_path!(), "an_external_store_moves_through_all_services_which_fail_on_the_way", |hsm| {
        let site = Site::new(hsm, "");
        let swept = |run: &mut Option<Child>, site: &Site<'_>| {
            wait_for("the middle of the sweep", || {
                let ended = run.as_mut().unwrap().try_wait().unwrap().is_some();
                let done =
                    site.b.json("status mnt --json")["daemon"]["rotation"]["status"]["counts"]["rewrapped"].clone();
                ended || done.as_u64().unwrap_or(0) > 0
            });
        };
        journey(&site, ("external", 300, 100), |site, to, run| match to {
            "aws-kms" => {
                swept(run, site);
                freeze(&site.aws.server);
            }
            "vault" => {
                swept(run, site);
                freeze(&site.bao.server);
            }
            "gcp-kms" => {
                swept(run, site);
                freeze(&site.gcp.server);
            }
            _ => {}
        });
    });
}

/// One failed open of a file under an external KEK of the service at `station`: `fail` brings the failure about, and the
/// program sees `errno`, the log a line with `word`. After `mend` the file opens.
#[track_caller]
fn failing(site: &Site<'_>, station: usize, n: usize, fail: impl Fn(), mend: impl Fn(), errno: i32, word: &str) {
    site.ok("mount back mnt --log-file DIR/log");
    fs::write(site.b.path("log"), "").unwrap();
    fail();
    let e = fs::read(site.b.path(&format!("mnt/{n}"))).unwrap_err();
    let log = fs::read_to_string(site.b.path("log")).unwrap();
    let name = site.stations()[station].0;
    assert_eq!(e.raw_os_error(), Some(errno), "{name}, {word}: {e}: {log}");
    assert!(log.lines().any(|l| l.contains(word)), "{name}, {word}: {log}");
    // Names and attributes go on all the while.
    assert!(fs::read_dir(site.b.path("mnt")).unwrap().all(|f| f.unwrap().metadata().is_ok()));
    mend();
    site.ok("unmount mnt");
    site.ok("mount back mnt --log-file DIR/log");
    assert_eq!(fs::read_to_string(site.b.path(&format!("mnt/{n}"))).unwrap(), format!("content {n}"));
    site.ok("unmount mnt");
}

/// A store with a few files under an external KEK of the service at `station`.
fn external(site: &Site<'_>, station: usize) {
    let _ = fs::remove_dir_all(site.b.path("back"));
    site.ok(&format!("init back --kek external --key {}", site.stations()[station].1));
    site.ok("mount back mnt --log-file DIR/log");
    site.write(8);
    site.ok("unmount mnt");
}

/// One of each class of failure, as a program that opens a file sees it and as the log tells it: injected into the
/// stand-ins for AWS and Google, brought about in OpenBao and on the token.
#[test]
fn each_class_of_failure_has_its_errno_and_its_line_in_the_log() {
    softhsm::alone(module_path!(), "each_class_of_failure_has_its_errno_and_its_line_in_the_log", |hsm| {
        // One attempt, so that one injected failure is one failed open.
        let site = Site::new(hsm, "[services.limits]\nattempts = 1\n");
        let nothing = || ();

        external(&site, 0);
        for (n, (code, status, errno, word)) in [
            ("ThrottlingException", 400, libc::ENOKEY, "throttles"),
            ("KMSInternalException", 500, libc::ENOKEY, "unreachable"),
            ("AccessDeniedException", 400, libc::EKEYREJECTED, "denied"),
            ("DisabledException", 400, libc::EKEYREVOKED, "disabled"),
            ("NotFoundException", 400, libc::ENOKEY, "not found"),
            ("InvalidCiphertextException", 400, libc::EIO, "wrap-auth"),
            ("ExpiredTokenException", 400, libc::ENOKEY, "credentials"),
        ]
        .into_iter()
        .enumerate()
        {
            let fault = json!({"op": "Decrypt", "count": 1, "code": code, "status": status, "message": "injected"});
            failing(&site, 0, n, || site.aws.fault(fault.clone()), nothing, errno, word);
        }

        external(&site, 3);
        let disabled = "key version is not enabled, current state is: DISABLED.";
        for (n, (status, count, message, errno, word)) in [
            (429, 1, "injected", libc::ENOKEY, "throttles"),
            (503, 1, "injected", libc::ENOKEY, "unreachable"),
            (403, 1, "injected", libc::EKEYREJECTED, "denied"),
            (400, 1, disabled, libc::EKEYREVOKED, "disabled"),
            (404, 1, "injected", libc::ENOKEY, "not found"),
            (400, 1, "Decryption failed: verify that 'name' refers to the correct CryptoKey.", libc::EIO, "wrap-auth"),
            // Where there is a token to renew, it tries once more.
            (401, 2, "injected", libc::ENOKEY, "credentials"),
        ]
        .into_iter()
        .enumerate()
        {
            let code = if message == disabled { "FAILED_PRECONDITION" } else { "" };
            let mut fault = json!({"op": "decrypt", "count": count, "status": status, "message": message});
            if !code.is_empty() {
                fault["code"] = code.into();
            }
            failing(&site, 3, n, || site.gcp.fault(fault.clone()), || site.gcp.reset(), errno, word);
        }

        external(&site, 1);
        let admin = |method: &str, path: &str, body: serde_json::Value| drop(site.bao.ok(method, path, &body));
        let soft = |path: &str| admin(if path.ends_with("restore") { "POST" } else { "DELETE" }, path, json!({}));
        let quota = "sys/quotas/rate-limit/q";
        failing(
            &site,
            1,
            0,
            || soft("transit/keys/k/soft-delete"),
            || soft("transit/keys/k/soft-delete-restore"),
            libc::EKEYREVOKED,
            "disabled",
        );
        failing(
            &site,
            1,
            1,
            || {
                admin("POST", quota, json!({"rate": 1, "interval": "600s", "path": "transit"}));
                // Whatever is left of it.
                while site.bao.api("GET", "transit/keys/k", &json!({})).0 != 429 {}
            },
            || admin("DELETE", quota, json!({})),
            libc::ENOKEY,
            "throttles",
        );

        external(&site, 2);
        let away = site.hsm.path("away");
        failing(
            &site,
            2,
            0,
            || fs::rename(site.hsm.tokens(), &away).unwrap(),
            || fs::rename(&away, site.hsm.tokens()).unwrap(),
            libc::ENOKEY,
            "unreachable",
        );
    });
}
