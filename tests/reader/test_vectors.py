"""The independent reader agrees with every test vector in tests/vectors/."""

import hashlib
import json
import os
import unittest

import envelopefs_reader as r

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "vectors")
STATES = {r.PENDING: "pending", r.ACTIVE: "active", r.RETIRED: "retired", r.DESTROYED: "destroyed"}


def b(v, member):
    return bytes.fromhex(v[member])


class FixedKey:
    """A key file's root key, without the file."""

    scheme = "keyfile:"
    unwrap = r.KeyFile.unwrap

    def __init__(self, key):
        self.key = key


def store(v):
    """A Store with nothing but its keys."""
    s = r.Store.__new__(r.Store)
    secret = b(v, "secret")
    s.name_key, s.dir_key, s.link_key = (r.derive(secret, x) for x in (b"names", b"dir-id", b"symlink"))
    s.xattr_name_key, s.xattr_value_key = r.derive(secret, b"xattr-name"), r.derive(secret, b"xattr-value")
    return s


def kdf(v):
    label = v["label"].removeprefix("envelopefs/v1/").encode()
    return {"derived": r.derive(b(v, "key"), label, b(v, "context")).hex()}


def geometry(v):
    plain = r.plain_size(v["backing"])
    return {"plain": plain, "exact": r.backing_size(plain) == v["backing"]}


def header(v):
    slot = r.read_slots(b(v, "header"))[0]
    if slot.store != b(v, "store"):
        raise r.Damage("foreign-store")
    keys = r.Keys.__new__(r.Keys)
    states = {name: number for number, name in STATES.items()}
    records = {b(k, "id"): r.Kek(b(k, "id"), r.SEALED, states[k["state"]], (), b"", {}) for k in v["keks"]}
    keys.keyring = r.Keyring(0, b(v, "store"), 1, {}, {}, records, b"", b"")
    keys.keks = {b(k, "id"): b(k, "key") for k in v["keks"]}
    dek = keys.unwrap_dek(slot)
    slot.verify(dek)
    return {"file": slot.file.hex(), "sequence": slot.sequence, "dek": dek.hex()}


def state(v):
    key = r.derive(b(v, "dek"), b"state", b(v, "file"))
    s = r.parse_state(key, b(v, "file"), v["segment"], b(v, "copy"))
    if s is None:
        raise r.Damage("state-absent")
    entries = [
        {"index": i, "nonce": e[:12].hex(), "tag": e[12:].hex()} for i, e in enumerate(s.entries) if e != r.HOLE
    ]
    return {"sequence": s.sequence, "entries": entries, "length": s.length, "flags": s.flags}


def block(v):
    key = r.derive(b(v, "dek"), b"content", b(v, "file"))
    aad = b(v, "file") + v["block"].to_bytes(8, "little") + b"\1\0"
    plain = r.aead_open(key, b(v, "nonce"), aad, b(v, "ciphertext"), b(v, "tag"))
    if plain is None:
        raise r.Damage("block-auth")
    return {"plaintext": plain.hex()}


def directory_id(v):
    plain = r.unseal(store(v).dir_key, b"", b(v, "sealed"))
    if plain is None or len(plain) != 16:
        raise r.Damage("dir-id-auth")
    return {"directory": plain.hex()}


def name(v):
    entry, sidecar = v["entry"].encode(), v["sidecar"]
    if sidecar is None:
        plain = store(v).decode_name(b(v, "directory"), entry)
        assert store(v).encode_name(b(v, "directory"), plain) == entry
    else:
        plain = store(v).decode_long(b(v, "directory"), entry, sidecar.encode())
    return {"name": plain.hex()}


def symlink(v):
    s, text = store(v), v["text"].encode()
    if len(text) == 53 and not r.LINK_REFERENCE.fullmatch(text):
        raise r.Damage("symlink-auth")
    sealed = b(v, "apart") if "apart" in v else r.b64decode(text)
    return {"target": s.open_target(sealed, text).hex()}


def xattr(v):
    found = store(v).xattr(v["backing_name"].encode(), b(v, "backing_value"))
    return {"foreign": True} if found is None else {"name": found[0].decode(), "value": found[1].hex()}


def keyring(v):
    k = r.Keyring.parse(b(v, "keyring"))
    keys = r.Keys(k, [FixedKey(b(v, "root_key"))])
    keks = []
    for kek in k.keks.values():
        key = keys._unwrap(kek.wraps, r.wrap_context(b"kek", k.store, kek.id))
        keks.append({"id": kek.id.hex(), "state": STATES[kek.state], "key": key and key.hex()})
    found = {
        "store": k.store.hex(), "generation": k.generation, "plaintext_names": bool(k.flags & r.PLAINTEXT_NAMES),
        "roots": list(k.roots.values()), "secret": keys.secret.hex(), "keks": keks,
    }
    if k.flags & r.LIFE_CYCLE:
        names = ("confirmed", "scheduled", "due", "announced", "used")
        schedules = {kek.hex(): dict(zip(names, s)) for kek, s in k.life.schedules.items()}
        below = [kek.hex() for kek in k.keks if k.is_below_floor(kek)]
        found["life"] = {"quorum": k.life.quorum, "below_floor": below, "schedules": schedules}
    return found


def passphrase(v):
    context = r.wrap_context(b"store-secret", b(v, "store"), b(v, "store"))
    key = r.Passphrase(v["passphrase"].encode()).unwrap(b(v, "wrapped"), context)
    if key is None:
        raise r.Damage("bad-ciphertext")
    return {"key": key.hex()}


def recovery(v):
    try:
        provider = r.RecoveryKey(v["recovery_key"])
    except r.Mistyped:
        raise r.Damage("mistyped") from None
    key = provider.unwrap(b(v, "wrapped"), r.wrap_context(b"store-secret", b(v, "store"), b(v, "store")))
    if key is None:
        raise r.Damage("bad-ciphertext")
    return {"uri": provider.uri, "key": key.hex()}


KINDS = {
    "kdf": kdf, "geometry": geometry, "header": header, "state": state, "block": block,
    "directory-id": directory_id, "name": name, "symlink": symlink, "xattr": xattr, "keyring": keyring,
    "passphrase": passphrase, "recovery": recovery,
}


class Vectors(unittest.TestCase):
    def test_reader_agrees_with_every_vector(self):
        files = [f for f in os.listdir(FOLDER) if f.endswith(".json")]
        self.assertEqual({f.removesuffix(".json") for f in files}, set(KINDS))
        count = 0
        for f in files:
            with open(os.path.join(FOLDER, f), encoding="utf-8") as text:
                content = json.load(text)
            for v in content["vectors"]:
                with self.subTest(kind=content["kind"], name=v["name"]):
                    try:
                        got = {"expect": KINDS[content["kind"]](v)}
                    except r.Damage as e:
                        got = {"error": e.code}
                    self.assertEqual(got, {k: v[k] for k in ("expect", "error") if k in v})
                count += 1
        self.assertGreater(count, 100)

    def test_crc24_is_openpgps(self):
        self.assertEqual(r.crc24(b"123456789"), 0x21CF02)

    def test_crc32c_is_castagnoli(self):
        self.assertEqual(r.crc32c(b"123456789"), 0xE3069283)
        self.assertEqual(r.crc32c(bytes(32)), 0x8A9136AA)

    def test_long_names_go_by_their_hash(self):
        self.assertEqual(len(r.b64encode(hashlib.sha256(b"").digest())), 43)


if __name__ == "__main__":
    unittest.main()
