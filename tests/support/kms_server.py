#!/usr/bin/env python3
"""AWS KMS for tests: moto's KMS with what moto leaves out, and with faults on demand.

    python kms_server.py --port N                      listens on 127.0.0.1 only

moto keeps the keys, aliases and replicas, and checks the requests. Added here, as AWS documents it:
  - a disabled key answers DisabledException, one that is pending deletion KMSInvalidStateException
  - Decrypt and ReEncrypt with the id of another key answer IncorrectKeyException
  - RotateKeyOnDemand makes new key material; older ciphertexts still decrypt; answers name the material
  - the material of a multi-Region key is shared by its replicas
  - keys can be enabled, disabled, deleted and replicated by their ARN
  - PutKeyPolicy counts: who asks is anybody, conditions are not looked at, and an action that no statement allows or
    one denies answers AccessDeniedException (of Encrypt, Decrypt, ReEncryptFrom and ReEncryptTo)
  - every answer has a request id

Control, by HTTP on the same port, with JSON bodies:
  POST /control/fault   {"op": "Decrypt" or "*", "count": 1, "code": "ThrottlingException", "status": 400,
                         "message": "...", "latency_ms": 0, "drop": false}
                        The next `count` calls of `op` wait, then fail with `code` (if given), or lose their
                        connection (`drop`). With neither they are carried out, late.
  GET  /control/calls   {"Decrypt": 12, ...}: calls since the start or the last reset, failed ones included
  GET  /control/seen    [{"op": "Decrypt", "KeyId": "...", "EncryptionContext": {...}, "RequestId": "..."}, ...]:
                        the same calls, oldest first, without what they carried
  POST /control/reset   forgets faults, counts and calls seen; keys stay

Signatures are not checked. The region comes from the request's credential scope, so a request needs one:
    Authorization: AWS4-HMAC-SHA256 Credential=x/20260101/eu-west-1/kms/aws4_request, ...
"""

import argparse
import fnmatch
import hashlib
import json
import os
import socket
import struct
import threading
import time
import uuid
from base64 import b64decode

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from moto.core.exceptions import JsonRESTError
from moto.kms.exceptions import InvalidCiphertextException, NotFoundException, ValidationException
from moto.kms.models import KmsBackend
from moto.kms.responses import KmsResponse
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, run_simple

PLAINTEXT_MAX = 4096
SEEN_MAX = 100_000


class DisabledException(JsonRESTError):
    code = 400

    def __init__(self, arn):
        super().__init__("DisabledException", f"{arn} is disabled.")


class InvalidStateException(JsonRESTError):
    code = 400

    def __init__(self, arn, state):
        super().__init__("KMSInvalidStateException", f"{arn} is {state}.")


class IncorrectKeyException(JsonRESTError):
    code = 400

    def __init__(self):
        super().__init__(
            "IncorrectKeyException",
            "The key ID in the request does not identify a CMK that can perform this operation.",
        )


class AccessDeniedException(JsonRESTError):
    code = 400

    def __init__(self, arn, action):
        super().__init__(
            "AccessDeniedException",
            f"User: arn:aws:iam::123456789012:user/test is not authorized to perform: {action} on resource: {arn}",
        )


# --- Keys, their material, and ciphertexts ---------------------------------------------------------------------------


def materials(key):
    """All key material of `key`, oldest first. A replica is a shallow copy of its key, so it shares the list."""
    return key.test_materials


def material_id(key, n):
    return hashlib.sha256(b"material" + materials(key)[n]).hexdigest()


def check_usable(key):
    if key.key_state == "Disabled":
        raise DisabledException(key.arn)
    if key.key_state != "Enabled":
        raise InvalidStateException(key.arn, "pending deletion" if key.key_state == "PendingDeletion" else key.key_state)


def check_allowed(key, action):
    def effects():
        for statement in json.loads(key.policy)["Statement"]:
            actions = statement["Action"]
            for pattern in [actions] if isinstance(actions, str) else actions:
                if fnmatch.fnmatchcase(action.lower(), pattern.lower()):
                    yield statement["Effect"]

    said = set(effects())
    if "Allow" not in said or "Deny" in said:
        raise AccessDeniedException(key.arn, action)


class Ciphertext:
    """length of the key id (1) | key id | number of the material (4) | IV (12) | AES-256-GCM, as long as AWS's blobs."""

    # AWS's ciphertexts of 32 bytes are about this much longer than they need to be.
    PADDING = bytes(60)

    def __init__(self, key_id, number, iv, sealed):
        self.key_id, self.number, self.iv, self.sealed = key_id, number, iv, sealed

    @staticmethod
    def associated(key_id, context):
        return json.dumps([key_id, sorted((context or {}).items())]).encode()

    @classmethod
    def seal(cls, key, plaintext, context):
        number, iv = len(materials(key)) - 1, os.urandom(12)
        sealed = AESGCM(materials(key)[number]).encrypt(iv, plaintext + cls.PADDING, cls.associated(key.id, context))
        return cls(key.id, number, iv, sealed)

    def open(self, key, context):
        try:
            opened = AESGCM(materials(key)[self.number]).decrypt(
                self.iv, self.sealed, self.associated(key.id, context)
            )
        except (InvalidTag, IndexError):
            raise InvalidCiphertextException()
        return opened[: -len(self.PADDING)]

    def __bytes__(self):
        name = self.key_id.encode()
        return bytes([len(name)]) + name + struct.pack(">I", self.number) + self.iv + self.sealed

    @classmethod
    def parse(cls, blob):
        try:
            end = 1 + blob[0]
            name = blob[1:end].decode("ascii")
            (number,) = struct.unpack_from(">I", blob, end)
        except (IndexError, UnicodeDecodeError, struct.error):
            raise InvalidCiphertextException()
        if len(blob) < end + 4 + 12 + 16:
            raise InvalidCiphertextException()
        return cls(name, number, blob[end + 4 : end + 16], blob[end + 16 :])


def install_rules():
    """Puts the rules above in the place of moto's."""
    moto = {name: getattr(KmsBackend, name) for name in ("create_key", "any_id_to_key_id", "rotate_key_on_demand")}

    def create_key(self, *args, **kwargs):
        key = moto["create_key"](self, *args, **kwargs)
        key.test_materials = [os.urandom(32)]
        return key

    def any_id_to_key_id(self, key_id):
        key_id = moto["any_id_to_key_id"](self, key_id)
        if key_id not in self.keys:
            raise NotFoundException(f"Key '{key_id}' does not exist")
        return key_id

    def encrypt(self, key_id, plaintext, encryption_context, action="kms:Encrypt"):
        if len(plaintext) > PLAINTEXT_MAX:
            raise ValidationException("1 validation error detected: Value at 'plaintext' is too long")
        key = self.keys[self.any_id_to_key_id(key_id)]
        check_allowed(key, action)
        check_usable(key)
        return bytes(Ciphertext.seal(key, plaintext, encryption_context)), key.arn

    def decrypt(self, ciphertext_blob, encryption_context, key_id=None, action="kms:Decrypt"):
        ciphertext = Ciphertext.parse(ciphertext_blob)
        if key_id is not None and self.any_id_to_key_id(key_id) != ciphertext.key_id:
            raise IncorrectKeyException()
        if ciphertext.key_id not in self.keys:
            raise InvalidCiphertextException()
        key = self.keys[ciphertext.key_id]
        check_allowed(key, action)
        check_usable(key)
        return ciphertext.open(key, encryption_context), key.arn

    def re_encrypt(self, ciphertext_blob, source_encryption_context, destination_key_id, destination_encryption_context):
        plaintext, source = self.decrypt(
            ciphertext_blob, source_encryption_context, action="kms:ReEncryptFrom"
        )
        new, destination = self.encrypt(
            destination_key_id, plaintext, destination_encryption_context, action="kms:ReEncryptTo"
        )
        return new, source, destination

    def rotate_key_on_demand(self, key_id):
        key = self.keys[self.any_id_to_key_id(key_id)]
        check_usable(key)
        materials(key).append(os.urandom(32))
        return moto["rotate_key_on_demand"](self, key.id)

    def by_any_id(name):
        """moto takes a key's ARN here and then fails to find it."""
        original = getattr(KmsBackend, name)

        def resolved(self, key_id, *args, **kwargs):
            return original(self, self.any_id_to_key_id(key_id), *args, **kwargs)

        setattr(KmsBackend, name, resolved)

    for name in ("disable_key", "enable_key", "schedule_key_deletion", "cancel_key_deletion", "replicate_key"):
        by_any_id(name)
    KmsBackend.create_key, KmsBackend.any_id_to_key_id = create_key, any_id_to_key_id
    KmsBackend.encrypt, KmsBackend.decrypt, KmsBackend.re_encrypt = encrypt, decrypt, re_encrypt
    KmsBackend.rotate_key_on_demand = rotate_key_on_demand


def install_answers():
    """Adds to moto's answers what they lack."""

    def extend(name, add):
        original = getattr(KmsResponse, name)

        def extended(self):
            answer = json.loads(original(self))
            add(self, answer)
            return json.dumps(answer)

        setattr(KmsResponse, name, extended)

    def id_of(self, blob):
        ciphertext = Ciphertext.parse(blob)
        return material_id(self.kms_backend.keys[ciphertext.key_id], ciphertext.number)

    def generated(self, answer):
        answer["KeyMaterialId"] = id_of(self, b64decode(answer["CiphertextBlob"]))

    def decrypted(self, answer):
        answer["KeyMaterialId"] = id_of(self, self._get_param("CiphertextBlob"))

    def reencrypted(self, answer):
        answer["SourceKeyMaterialId"] = id_of(self, self._get_param("CiphertextBlob"))
        answer["DestinationKeyMaterialId"] = id_of(self, b64decode(answer["CiphertextBlob"]))

    def described(self, answer):
        metadata = answer["KeyMetadata"]
        key = self.kms_backend.keys[metadata["Arn"].rsplit("/", 1)[-1]]
        metadata["CurrentKeyMaterialId"] = material_id(key, -1)

    extend("generate_data_key", generated)
    extend("decrypt", decrypted)
    extend("describe_key", described)

    # moto's ReEncrypt leaves the source key's id out, which would let any key decrypt.
    moto_re_encrypt = KmsResponse.re_encrypt

    def re_encrypt(self):
        source = self._get_param("SourceKeyId")
        if source is not None:
            named = self.kms_backend.any_id_to_key_id(source)
            if named != Ciphertext.parse(self._get_param("CiphertextBlob")).key_id:
                raise IncorrectKeyException()
        return moto_re_encrypt(self)

    KmsResponse.re_encrypt = re_encrypt
    extend("re_encrypt", reencrypted)


# --- Faults and counts -----------------------------------------------------------------------------------------------


class Script:
    """What calls are to do, and what they did."""

    def __init__(self):
        self.lock = threading.Lock()
        self.reset()

    def reset(self):
        self.faults, self.calls, self.seen = [], {}, []

    def next(self, op, request, request_id):
        """Notes a call, and returns the fault that is due for it."""
        with self.lock:
            self.calls[op] = self.calls.get(op, 0) + 1
            if len(self.seen) < SEEN_MAX:
                public = {k: v for k, v in request.items() if k.endswith("KeyId") or k.endswith("EncryptionContext")}
                self.seen.append({"op": op, "RequestId": request_id, **public})
            for fault in self.faults:
                if fault.get("op", "*") in ("*", op) and fault["count"] > 0:
                    fault["count"] -= 1
                    return dict(fault)
        return {}


class Server:
    """The WSGI application: control requests, then faults, then moto."""

    def __init__(self, moto):
        self.moto, self.script = moto, Script()

    def __call__(self, env, start):
        path = env.get("PATH_INFO", "/")
        if path.startswith("/control/"):
            return self.control(env["REQUEST_METHOD"], path, self.body(env), start)
        op = env.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2]
        if not op:
            return self.moto(env, start)
        return self.call(op, env, start)

    @staticmethod
    def body(env):
        return env["wsgi.input"].read(int(env.get("CONTENT_LENGTH") or 0))

    @staticmethod
    def reply(start, status, value, request_id=None):
        body = json.dumps(value).encode()
        headers = [("Content-Type", "application/x-amz-json-1.1"), ("Content-Length", str(len(body)))]
        if request_id:
            headers.append(("x-amzn-RequestId", request_id))
        start(f"{status} -", headers)
        return [body]

    def control(self, method, path, body, start):
        script = self.script
        with script.lock:
            if (method, path) == ("GET", "/control/calls"):
                return self.reply(start, 200, script.calls)
            if (method, path) == ("GET", "/control/seen"):
                return self.reply(start, 200, script.seen)
            if (method, path) == ("POST", "/control/reset"):
                script.reset()
                return self.reply(start, 200, {})
            if (method, path) == ("POST", "/control/fault"):
                script.faults.append({"count": 1, **json.loads(body)})
                return self.reply(start, 200, {})
        return self.reply(start, 404, {"message": f"no such control: {method} {path}"})

    def call(self, op, env, start):
        body, request_id = self.body(env), str(uuid.uuid4())
        fault = self.script.next(op, json.loads(body or b"{}"), request_id)
        time.sleep(fault.get("latency_ms", 0) / 1000)
        if fault.get("drop"):
            env["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError("dropped on demand")
        if fault.get("code"):
            answer = {"__type": fault["code"], "message": fault.get("message", "injected")}
            return self.reply(start, fault.get("status", 400), answer, request_id)

        def start_with_id(status, headers, *rest):
            headers = [(k, v) for k, v in headers if k.lower() not in ("x-amzn-requestid", "x-amz-request-id")]
            return start(status, [*headers, ("x-amzn-RequestId", request_id)], *rest)

        return self.moto({**env, "wsgi.input": Replay(body)}, start_with_id)


class Replay:
    """A request's body, read already."""

    def __init__(self, body):
        self.rest = body

    def read(self, n=-1):
        n = len(self.rest) if n is None or n < 0 else n
        taken, self.rest = self.rest[:n], self.rest[n:]
        return taken


class QuietHandler(WSGIRequestHandler):
    """Says nothing of requests."""

    def log_request(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser(description="AWS KMS for tests, on 127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    install_rules()
    install_answers()
    app = Server(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", port, app, threaded=True, request_handler=QuietHandler)


if __name__ == "__main__":
    main()
