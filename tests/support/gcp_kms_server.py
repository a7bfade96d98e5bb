#!/usr/bin/env python3
"""A FAKE of the part of Google Cloud KMS (REST, v1) that envelopefs calls.

There is no emulator of the service. This was written from its public documentation to test the client against: what
passes here proves the client's side (requests, checksums, what it makes of answers and failures) and nothing about how
the service behaves. Encryption is real (AES-256-GCM with the additional authenticated data), access control is not.

  gcp_kms_server.py --port PORT [--state FILE] [--tls DIR]     listens on 127.0.0.1 only

--state FILE  keeps keys across restarts.
--tls DIR     speaks TLS with a certificate made on the spot; its authority goes to DIR/ca.pem.

Besides /v1/projects/... there are:
  POST /__fault  {"op": "encrypt"|"decrypt"|"get"|...|"*", "count": N, and what happens:
                  "status": HTTP status, "code": its name if not the usual one, "message": text,
                  "plain": true (an answer that is not in the service's form), "latency_ms": N, "drop": true (hang up),
                  "location": URL (for a redirect),
                  "corrupt": "ciphertextCrc32c"|"plaintextCrc32c"|"ciphertext"|"plaintext" (changed after the checksum),
                  "ignore_crc": "plaintext"|"aad" (as if that checksum had not arrived), "forget_crc": true (send none),
                  "damage_request": "plaintext"|"aad"|"ciphertext" (a bit flips before the service looks),
                  "name": TEXT (who is said to have answered), "garbage": true (no JSON)}
  GET  /__stats  {"calls": {operation: N}, "last": headers of the last call to the API}
  POST /__reset  forgets faults and counts
"""
import argparse
import base64
import datetime
import ipaddress
import json
import os
import re
import ssl
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CRC_TABLE = []
for _i in range(256):
    _c = _i
    for _ in range(8):
        _c = (_c >> 1) ^ 0x82F63B78 if _c & 1 else _c >> 1
    CRC_TABLE.append(_c)


def crc32c(data):
    c = 0xFFFFFFFF
    for byte in data:
        c = CRC_TABLE[(c ^ byte) & 255] ^ (c >> 8)
    return c ^ 0xFFFFFFFF


assert crc32c(b"123456789") == 0xE3069283

STATUS = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 409: "ALREADY_EXISTS",
    429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}
STATES = {1: "ENABLED", 2: "DISABLED", 3: "DESTROYED", 4: "DESTROY_SCHEDULED"}
KEY = re.compile(
    r"/v1/(?P<key>projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/:]+)"
    r"(?:/cryptoKeyVersions(?:/(?P<version>\d+))?)?(?::(?P<verb>\w+))?"
)
RING = re.compile(r"/v1/(?P<ring>projects/[^/]+/locations/[^/]+/keyRings/[^/]+)/cryptoKeys")


class Refused(Exception):
    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code or STATUS.get(status, "UNKNOWN")


class Keys:
    """All keys: name -> {purpose, primary, versions: {number: {state, material}}}."""

    def __init__(self, path):
        self.path = path
        self.keys = {}
        if path and os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                self.keys = json.load(f)

    def save(self):
        if self.path:
            with open(self.path + ".new", "w", encoding="utf-8") as f:
                json.dump(self.keys, f)
            os.replace(self.path + ".new", self.path)

    def get(self, name):
        if name not in self.keys:
            raise Refused(404, f"CryptoKey {name} not found.")
        return self.keys[name]

    def create(self, name, purpose):
        if name in self.keys:
            raise Refused(409, f"CryptoKey {name} already exists.")
        self.keys[name] = {"purpose": purpose, "primary": None, "versions": {}}
        if purpose == "ENCRYPT_DECRYPT":
            self.keys[name]["primary"] = self.add_version(name)
        return self.describe(name)

    def add_version(self, name):
        versions = self.get(name)["versions"]
        number = str(len(versions) + 1)
        versions[number] = {"state": "ENABLED", "material": os.urandom(32).hex()}
        return number

    def version(self, name, number):
        versions = self.get(name)["versions"]
        if number not in versions:
            raise Refused(404, f"CryptoKeyVersion {name}/cryptoKeyVersions/{number} not found.")
        return versions[number]

    def describe_version(self, name, number):
        state = self.version(name, number)["state"]
        return {"name": f"{name}/cryptoKeyVersions/{number}", "state": state, "protectionLevel": "SOFTWARE",
                "algorithm": "GOOGLE_SYMMETRIC_ENCRYPTION"}

    def describe(self, name):
        key = self.get(name)
        out = {"name": name, "purpose": key["purpose"]}
        if key["primary"]:
            out["primary"] = self.describe_version(name, key["primary"])
        return out

    def cipher(self, name, number):
        v = self.version(name, number)
        if v["state"] != "ENABLED":
            path = f"{name}/cryptoKeyVersions/{number}"
            raise Refused(400, f"{path} is not enabled, current state is: {v['state']}.", "FAILED_PRECONDITION")
        return AESGCM(bytes.fromhex(v["material"]))


def field(body, name, fault, damage):
    data = bytearray(base64.b64decode(body.get(name) or ""))
    if fault.get("damage_request") == damage and data:
        data[0] ^= 1
    return bytes(data)


def check_crc(body, name, data, ignored):
    """Whether a checksum came with `data`; refuses if it does not fit."""
    if name not in body or ignored:
        return False
    if int(body[name]) != crc32c(data):
        raise Refused(400, f"The checksum in field {name} did not match the data.")
    return True


def encode(data):
    return base64.b64encode(data).decode()


def encrypt(keys, name, body, fault):
    plaintext = field(body, "plaintext", fault, "plaintext")
    aad = field(body, "additionalAuthenticatedData", fault, "aad")
    ignored = fault.get("ignore_crc")
    checked = check_crc(body, "plaintextCrc32c", plaintext, ignored == "plaintext")
    aad_checked = check_crc(body, "additionalAuthenticatedDataCrc32c", aad, ignored == "aad")
    number = keys.get(name)["primary"]
    if not number:
        raise Refused(400, f"CryptoKey {name} has no primary version.", "FAILED_PRECONDITION")
    nonce = os.urandom(12)
    ciphertext = struct.pack(">I", int(number)) + nonce + keys.cipher(name, number).encrypt(nonce, plaintext, aad)
    return {"name": f"{name}/cryptoKeyVersions/{number}", "ciphertext": encode(ciphertext),
            "ciphertextCrc32c": str(crc32c(ciphertext)), "verifiedPlaintextCrc32c": checked,
            "verifiedAdditionalAuthenticatedDataCrc32c": aad_checked, "protectionLevel": "SOFTWARE"}


def decrypt(keys, name, body, fault):
    ciphertext = field(body, "ciphertext", fault, "ciphertext")
    aad = field(body, "additionalAuthenticatedData", fault, "aad")
    check_crc(body, "ciphertextCrc32c", ciphertext, False)
    check_crc(body, "additionalAuthenticatedDataCrc32c", aad, False)
    key = keys.get(name)
    bad = Refused(400, "Decryption failed: verify that 'name' refers to the correct CryptoKey.")
    if len(ciphertext) < 32:
        raise bad
    number = str(struct.unpack(">I", ciphertext[:4])[0])
    if number not in key["versions"]:
        raise bad
    try:
        plaintext = keys.cipher(name, number).decrypt(ciphertext[4:16], ciphertext[16:], aad)
    except InvalidTag:
        raise bad from None
    return {"plaintext": encode(plaintext), "plaintextCrc32c": str(crc32c(plaintext)),
            "usedPrimary": number == key["primary"], "protectionLevel": "SOFTWARE"}


def operation(method, path):
    """The name a call is counted by."""
    m = KEY.fullmatch(path)
    if m and m["verb"]:
        return m["verb"]
    if "/cryptoKeyVersions" in path:
        return {"GET": "getVersion", "POST": "createVersion", "PATCH": "patchVersion"}.get(method, method)
    return {"GET": "get", "POST": "create"}.get(method, method)


def answer(keys, method, path, query, body, fault):
    ring = RING.fullmatch(path)
    if method == "POST" and ring:
        return keys.create(f"{ring['ring']}/cryptoKeys/{query['cryptoKeyId']}", body.get("purpose", "ENCRYPT_DECRYPT"))
    m = KEY.fullmatch(path)
    if not m:
        raise Refused(404, f"no such path: {path}")
    name, number, verb = m["key"], m["version"], m["verb"]
    if method == "POST" and verb == "encrypt":
        return encrypt(keys, name, body, fault)
    if method == "POST" and verb == "decrypt":
        return decrypt(keys, name, body, fault)
    if method == "POST" and verb == "updatePrimaryVersion":
        keys.version(name, body["cryptoKeyVersionId"])
        keys.get(name)["primary"] = body["cryptoKeyVersionId"]
        return keys.describe(name)
    if method == "POST" and number and verb in ("destroy", "restore"):
        keys.version(name, number)["state"] = {"destroy": "DESTROY_SCHEDULED", "restore": "DISABLED"}[verb]
        return keys.describe_version(name, number)
    if method == "PATCH" and number:
        # Clients may send enums as numbers.
        keys.version(name, number)["state"] = STATES.get(body["state"], body["state"])
        return keys.describe_version(name, number)
    if method == "POST" and path.endswith("/cryptoKeyVersions"):
        return keys.describe_version(name, keys.add_version(name))
    if method == "GET":
        return keys.describe_version(name, number) if number else keys.describe(name)
    raise Refused(404, f"no such method: {method} {path}")


def spoil(out, fault):
    """What goes wrong with an answer on its way."""
    what = fault.get("corrupt")
    if what in ("ciphertextCrc32c", "plaintextCrc32c") and what in out:
        out[what] = str(int(out[what]) ^ 1)
    elif what in ("ciphertext", "plaintext") and what in out:
        data = bytearray(base64.b64decode(out[what]))
        data[-1] ^= 1
        out[what] = encode(bytes(data))
    if fault.get("forget_crc"):
        out.pop("ciphertextCrc32c", None)
        out.pop("plaintextCrc32c", None)
    if "name" in fault:
        out["name"] = fault["name"]
    return out


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Without it every answer on a kept connection waits 40 ms for an acknowledgement.
    disable_nagle_algorithm = True
    lock, keys, faults, calls, last = threading.Lock(), None, [], {}, {}

    def log_message(self, *_):
        pass

    def take_fault(self, op):
        for f in self.faults:
            if f.get("op", "*") in ("*", op) and f["count"] > 0:
                f["count"] -= 1
                return f
        return {}

    def go(self):
        path, _, text = self.path.partition("?")
        query = dict(p.partition("=")[::2] for p in text.split("&") if p)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(data) if data else {}
        if path.startswith("/__"):
            with self.lock:
                return self.reply(200, json.dumps(self.steer(path, body)).encode())
        op = operation(self.command, path)
        with self.lock:
            self.calls[op] = self.calls.get(op, 0) + 1
            self.last.clear()
            self.last.update({k.lower(): v for k, v in self.headers.items()})
            fault = self.take_fault(op)
        time.sleep(fault.get("latency_ms", 0) / 1000)
        if fault.get("drop"):
            self.close_connection = True
            return None
        if fault.get("garbage"):
            return self.reply(200, b"<html>hello</html>")
        try:
            if "status" in fault:
                raise Refused(fault["status"], fault.get("message", "injected"), fault.get("code"))
            with self.lock:
                out = answer(self.keys, self.command, path, query, body, fault)
                if op not in ("encrypt", "decrypt", "get", "getVersion"):
                    self.keys.save()
            return self.reply(200, json.dumps(spoil(out, fault)).encode())
        except Refused as e:
            if fault.get("plain"):
                return self.reply(e.status, b"<html>no</html>", {"Location": fault.get("location", "")})
            out = {"error": {"code": e.status, "message": e.message, "status": e.code}}
            return self.reply(e.status, json.dumps(out).encode())

    def steer(self, path, body):
        if path == "/__fault":
            self.faults.append(body)
        elif path == "/__reset":
            self.faults.clear()
            self.calls.clear()
        return {"calls": self.calls, "last": self.last}

    def reply(self, status, body, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PATCH = go


def certificate(folder):
    """Makes an authority and a certificate for 127.0.0.1; returns the paths of the certificate and its key."""
    now = datetime.datetime.now(datetime.timezone.utc)

    def make(subject, public, issuer, signer, extensions):
        builder = (x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
                   .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
                   .not_valid_after(now + datetime.timedelta(days=2)))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(signer, hashes.SHA256())

    def name(text):
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = name("envelopefs test authority")
    ca = make(ca_name, ca_key.public_key(), ca_name, ca_key, [(x509.BasicConstraints(ca=True, path_length=0), True)])
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    usage = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH])
    leaf = make(name("127.0.0.1"), key.public_key(), ca_name, ca_key,
                [(alternative, False), (usage, False), (x509.BasicConstraints(ca=False, path_length=None), True)])
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for file, content in [("ca.pem", ca.public_bytes(pem)), ("cert.pem", leaf.public_bytes(pem)), ("key.pem", private)]:
        with open(os.path.join(folder, file), "wb") as f:
            f.write(content)
    return os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--port", type=int, required=True)
    p.add_argument("--state")
    p.add_argument("--tls", metavar="DIR")
    a = p.parse_args()
    Handler.keys = Keys(a.state)
    server = ThreadingHTTPServer(("127.0.0.1", a.port), Handler)
    if a.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate(a.tls))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
