#!/usr/bin/env python3
"""Measures making and opening files with a root key in each key service, KEKs sealed and external.

Starts the services' test servers on loopback (tests/support, OpenBao, SoftHSM), so the figures are the client's and the
kernel's share; a real service adds its network and its own time to each call that the table counts.

    services_bench.py --binary target/release/envelopefs [--files 300]

Run it with the Python of the test environment (target/venv/bin/python).
"""

import argparse
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
SUPPORT = ROOT / "tests" / "support"
VENV = pathlib.Path(sys.executable).parent
RING = "projects/test/locations/global/keyRings/ring"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(url, body=None, headers=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers or {}, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        text = answer.read()
    return json.loads(text) if text else None


class Services:
    """The servers, what the configuration says of them, and the root keys' URIs."""

    def __init__(self, base):
        self.base, self.running, self.uris, self.config = base, [], {}, ""
        self.environment = dict(os.environ, AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test",
                                AWS_EC2_METADATA_DISABLED="true")

    def start(self, *command, ready):
        log = open(self.base / "servers.log", "ab")
        self.running.append(subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *map(str, command)],
                                             stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        for _ in range(600):
            try:
                return ready()
            except OSError:
                time.sleep(0.05)
        raise SystemExit(f"services_bench: {command[0]} does not start; see {self.base}/servers.log")

    def aws(self):
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        self.start(VENV / "python", SUPPORT / "kms_server.py", "--port", port, ready=lambda: ask(url + "/control/calls"))
        scope = "Credential=x/20260101/eu-west-1/kms/aws4_request, SignedHeaders=host, Signature=0"
        made = ask(url, {}, {"X-Amz-Target": "TrentService.CreateKey", "Content-Type": "application/x-amz-json-1.1",
                             "Authorization": f"AWS4-HMAC-SHA256 {scope}"})
        self.uris["aws-kms"] = "aws-kms://" + made["KeyMetadata"]["Arn"]
        self.config += f'[services.aws-kms]\nendpoint = "{url}"\nregion = "eu-west-1"\n'

    def vault(self):
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        self.start(VENV / "bao", "server", "-dev", "-dev-root-token-id=root", f"-dev-listen-address=127.0.0.1:{port}",
                   "-dev-no-store-token", ready=lambda: ask(url + "/v1/sys/health"))
        token = {"X-Vault-Token": "root"}
        ask(url + "/v1/sys/mounts/transit", {"type": "transit"}, token)
        ask(url + "/v1/transit/keys/k", {"type": "aes256-gcm96", "derived": True}, token)
        secret = self.base / "token"
        secret.write_text("root")
        secret.chmod(0o600)
        self.uris["vault"] = "vault://transit/k"
        self.config += (f'[services.vault]\naddress = "{url}"\n[services.vault.auth]\nmethod = "token"\n'
                        f'token_file = "{secret}"\n')

    def gcp(self):
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        self.start(VENV / "python", SUPPORT / "gcp_kms_server.py", "--port", port, ready=lambda: ask(url + "/__stats"))
        ask(f"{url}/v1/{RING}/cryptoKeys?cryptoKeyId=k", {"purpose": "ENCRYPT_DECRYPT"})
        self.uris["gcp-kms"] = f"gcp-kms://{RING}/cryptoKeys/k"
        self.config += f'[services.gcp-kms]\nendpoint = "{url}"\nanonymous = true\n'

    def pkcs11(self):
        tokens, module = self.base / "tokens", "/usr/lib/softhsm/libsofthsm2.so"
        tokens.mkdir()
        (self.base / "softhsm2.conf").write_text(f"directories.tokendir = {tokens}\nobjectstore.backend = file\n")
        self.environment["SOFTHSM2_CONF"] = str(self.base / "softhsm2.conf")
        pin = self.base / "pin"
        pin.write_text("1234-test-only")
        pin.chmod(0o600)

        def run(*command):
            subprocess.run(command, check=True, env=self.environment, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)

        run("softhsm2-util", "--init-token", "--free", "--label", "bench", "--pin", "1234-test-only",
            "--so-pin", "5678-test-only")
        run("pkcs11-tool", "--module", module, "--token-label", "bench", "--login", "--pin", "1234-test-only",
            "--keygen", "--key-type", "AES:32", "--label", "k", "--id", "01", "--private", "--sensitive",
            "--usage-decrypt")
        self.uris["pkcs11"] = "pkcs11:token=bench;object=k"
        self.config += f'[services.pkcs11]\nmodule = "{module}"\npin_file = "{pin}"\n'

    def stop(self):
        for server in self.running:
            server.kill()
            server.wait()


def timed(work, files):
    spent = []
    for n in range(files):
        began = time.perf_counter()
        work(n)
        spent.append((time.perf_counter() - began) * 1000)
    spent.sort()
    return statistics.median(spent), spent[int(len(spent) * 0.99)]


def measure(services, binary, uri, kind, files):
    back, mnt = services.base / "back", services.base / "mnt"
    subprocess.run(["rm", "-rf", back], check=True)
    mnt.mkdir(exist_ok=True)
    config = services.base / "config.toml"
    config.write_text(services.config)

    def run(*words):
        more = [] if words[0] == "unmount" else ["--config", config]
        subprocess.run([binary, *words, *more], check=True, env=services.environment, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)

    def create(n):
        with open(mnt / str(n), "wb", buffering=0) as f:
            f.write(b"content")

    def read(n):
        with open(mnt / str(n), "rb", buffering=0) as f:
            f.read()

    run("init", back, "--kek", kind, "--key", uri)
    began = time.perf_counter()
    run("mount", back, mnt)
    mount = (time.perf_counter() - began) * 1000
    try:
        made = timed(create, files)
        run("unmount", mnt)
        run("mount", back, mnt)
        cold = timed(read, files)
        warm = timed(read, files)
    finally:
        run("unmount", mnt)
    return mount, made, cold, warm


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--files", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="envelopefs-services-") as base:
        services = Services(pathlib.Path(base))
        try:
            for start in (services.aws, services.vault, services.pkcs11, services.gcp):
                start()
            keyfile = {"keyfile": f"keyfile:{base}/key"}
            print(f"{'root key':10} {'KEK':9} {'mount':>8} | {'create':>8} {'p99':>8} | {'open cold':>9} {'p99':>8} |"
                  f" {'open warm':>9} {'p99':>8}   (milliseconds, median of {options.files})")
            for name, uri in {**keyfile, **services.uris}.items():
                for kind in ("sealed", "external"):
                    mount, made, cold, warm = measure(services, options.binary, uri, kind, options.files)
                    print(f"{name:10} {kind:9} {mount:8.0f} | {made[0]:8.2f} {made[1]:8.2f} | {cold[0]:9.2f} "
                          f"{cold[1]:8.2f} | {warm[0]:9.2f} {warm[1]:8.2f}", flush=True)
        finally:
            services.stop()


if __name__ == "__main__":
    main()
