"""A reader of envelopefs stores, written from docs/FORMAT.md and from nothing else.

It shares no code with the program: the cipher is OpenSSL's, by way of the `cryptography` package. It reads, it never
writes to the store. Section numbers are those of FORMAT.md.

    envelopefs_reader.py BACKING KEY... list
    envelopefs_reader.py BACKING KEY... extract DESTINATION
    envelopefs_reader.py BACKING KEY... verify

KEY is --key-file F, --passphrase-file F or --recovery-file F.
"""

import argparse
import base64
import binascii
import hashlib
import hmac
import itertools
import os
import re
import stat
import struct
import sys
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESGCMSIV
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

# --- 1. Conventions -------------------------------------------------------------------------------------------------

VERSION = 1
PAGE = 4096


class Damage(Exception):
    """Something on disk is not what envelopefs writes. `code` is one of section 12."""

    def __init__(self, code, detail=""):
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code = code


class NoKey(Exception):
    """None of the root keys given opens the store."""


def aead_open(key, nonce, aad, ciphertext, tag):
    """Plaintext, or None if it does not authenticate."""
    try:
        return AESGCMSIV(key).decrypt(nonce, ciphertext + tag, aad)
    except InvalidTag:
        return None


def unseal(key, aad, blob):
    """Reverses `sealed`: None if it does not authenticate."""
    if len(blob) < 28:
        return None
    return aead_open(key, blob[:12], aad, blob[12:-16], blob[-16:])


def siv(key, nonce, aad, plaintext):
    return AESGCMSIV(key).encrypt(nonce, plaintext, aad)


def mac(key, data):
    return hmac.new(key, data, hashlib.sha256).digest()


def derive(key, label, context=b""):
    return mac(key, b"envelopefs/v1/" + label + b"\0" + context + b"\1")


def _crc_table():
    table = []
    for n in range(256):
        for _ in range(8):
            n = (n >> 1) ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    return table


_CRC = _crc_table()


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def b64encode(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def b64decode(text):
    """Strict: None for padding, other characters, or bits beyond the last byte."""
    if len(text) % 4 == 1 or any(c in b"+/=" for c in text):
        return None
    try:
        data = base64.b64decode(text.translate(bytes.maketrans(b"-_", b"+/")) + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        return None
    return data if b64encode(data) == text else None


class Cursor:
    """Reads fields one after the other."""

    def __init__(self, data, code):
        self.data, self.at, self.code = data, 0, code

    def require(self, ok):
        if not ok:
            raise Damage(self.code)

    def take(self, n):
        self.require(self.at + n <= len(self.data))
        self.at += n
        return self.data[self.at - n:self.at]

    def number(self, size):
        return int.from_bytes(self.take(size), "little")

    def zeros(self, n):
        self.require(not any(self.take(n)))

    def counted(self, low, high):
        n = self.number(2)
        self.require(low <= n <= high)
        return self.take(n)

    def end(self):
        self.require(self.at == len(self.data))


# --- 4. The keyring -------------------------------------------------------------------------------------------------

PLAINTEXT_NAMES, LIFE_CYCLE = 1, 2
SEALED, EXTERNAL = 1, 2
PENDING, ACTIVE, RETIRED, DESTROYED = 1, 2, 3, 4


@dataclass
class Kek:
    id: bytes
    kind: int
    state: int
    times: tuple
    provider: bytes
    wraps: dict


@dataclass
class LifeCycle:
    """When KEKs end (section 4.4)."""

    quorum: int = 0
    floor: bytes = b""  # KekId, or nothing
    schedules: dict = field(default_factory=dict)  # KekId → (confirmed, scheduled, due, announced, used)


@dataclass
class Keyring:
    flags: int
    store: bytes
    generation: int
    roots: dict  # root key id → URI
    secret: dict  # root key id → wrapped store secret
    keks: dict  # KekId → Kek
    signed: bytes = field(repr=False)
    mac: bytes = field(repr=False)
    life: LifeCycle = field(default_factory=LifeCycle)

    @classmethod
    def parse(cls, data):
        if len(data) > 64 << 20 or data[:8] != b"ENVLPKR1":
            raise Damage("keyring-unreadable")
        if len(data) < 14 or crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise Damage("keyring-unreadable")
        if int.from_bytes(data[8:10], "little") != VERSION:
            raise Damage("unsupported-version")
        signed, found = data[:-36], data[-36:-4]
        c = Cursor(signed, "keyring-unreadable")
        c.take(10)
        c.zeros(2)
        flags, _ = c.number(4), c.number(4)
        if flags & ~(PLAINTEXT_NAMES | LIFE_CYCLE):
            raise Damage("unsupported-feature")
        c.zeros(4)
        store, generation = c.take(16), c.number(8)
        n = c.number(2)
        c.require(1 <= n <= 16 and generation > 0)
        roots = {}
        for _ in range(n):
            root = c.take(16)
            c.require(root not in roots)
            try:
                roots[root] = c.counted(1, 1024).decode("utf-8")
            except UnicodeDecodeError:
                raise Damage("keyring-unreadable") from None
            # The control characters are those of Unicode's category Cc.
            c.require(not any(ord(ch) < 32 or 127 <= ord(ch) < 160 for ch in roots[root]))
        secret = cls._wraps(c, roots)
        n = c.number(4)
        c.require(secret and 1 <= n <= 4096)
        keks = {}
        for _ in range(n):
            kek = cls._kek(c, roots)
            c.require(kek.id not in keks)
            keks[kek.id] = kek
        c.require(sum(k.state == ACTIVE for k in keks.values()) == 1)
        life = cls._life(c, keks) if flags & LIFE_CYCLE else LifeCycle()
        c.end()
        return cls(flags, store, generation, roots, secret, keks, signed, found, life)

    @staticmethod
    def _life(c, keks):
        quorum = c.number(1)
        c.zeros(3)
        floor = c.take(16)
        floor = floor if any(floor) else b""
        order = list(keks)
        active = next(i for i, k in enumerate(keks.values()) if k.state == ACTIVE)
        c.require(quorum == 0 or 2 <= quorum <= 16)
        c.require(not floor or floor in keks and order.index(floor) <= active)
        n = c.number(4)
        c.require(n <= len(keks))
        schedules = {}
        for _ in range(n):
            kek, confirmed = c.take(16), c.number(1)
            c.zeros(7)
            scheduled, due, announced, used = (c.number(8) for _ in range(4))
            c.require(kek in keks and keks[kek].state == RETIRED and kek not in schedules)
            c.require(1 <= confirmed <= 16 and due >= scheduled)
            schedules[kek] = (confirmed, scheduled, due, announced, used)
        c.require(quorum or floor or schedules)
        return LifeCycle(quorum, floor, schedules)

    def is_below_floor(self, kek):
        order = list(self.keks)
        return bool(self.life.floor) and order.index(kek) < order.index(self.life.floor)

    @staticmethod
    def _wraps(c, roots):
        wraps = {}
        n = c.number(2)
        c.require(n <= 16)
        for _ in range(n):
            root = c.take(16)
            c.require(root in roots and root not in wraps)
            wraps[root] = c.counted(1, 640)
        return wraps

    @classmethod
    def _kek(cls, c, roots):
        kek = c.take(16)
        kind, state = c.number(1), c.number(1)
        c.require(kind in (SEALED, EXTERNAL) and state in (PENDING, ACTIVE, RETIRED, DESTROYED))
        c.zeros(2)
        times = tuple(c.number(8) for _ in range(5))
        c.zeros(8)
        provider = c.take(16)
        wraps = cls._wraps(c, roots)
        c.require((kind == EXTERNAL) == any(provider))
        c.require((state == DESTROYED) == (not wraps))
        c.require(state == DESTROYED or kind == SEALED or provider in roots)
        return Kek(kek, kind, state, times, provider, wraps)

    @classmethod
    def load(cls, folder):
        """The copy that counts (section 4.1)."""
        valid, errors = [], []
        for name in (b"keyring.a", b"keyring.b"):
            try:
                with open(os.path.join(folder, name), "rb") as f:
                    valid.append(cls.parse(f.read()))
            except FileNotFoundError:
                errors.append("keyring-unreadable")
            except Damage as e:
                errors.append(e.code)
        known = [e for e in errors if e.startswith("unsupported")]
        if known or not valid:
            raise Damage((known or ["keyring-unreadable"])[0])
        return max(valid, key=lambda k: k.generation)


def wrap_context(purpose, store, obj, extra=b""):
    return b"envelopefs/v1/" + purpose + b"\0" + store + obj + extra


class KeyFile:
    """A root key from a file (section 4.3)."""

    scheme = "keyfile:"

    def __init__(self, path):
        with open(path, "rb") as f:
            data = f.read()
        self.key = data if len(data) == 32 else bytes.fromhex(data.strip().decode("ascii"))
        if len(self.key) != 32:
            raise ValueError(f"{path} holds no key")

    def unwrap(self, wrapped, context):
        return unseal(derive(self.key, b"root-wrap"), context, wrapped) if len(wrapped) == 60 else None


class Passphrase:
    """A root key from a passphrase (section 4.3)."""

    scheme = "passphrase:"

    def __init__(self, passphrase):
        self.passphrase = passphrase
        self.derived = {}

    def unwrap(self, wrapped, context):
        if len(wrapped) != 92 or wrapped[:4] != b"\1\0\0\0":
            return None
        memory, passes, lanes = struct.unpack("<III", wrapped[4:16])
        if not (1024 <= memory <= 1 << 20 and 1 <= passes <= 16 and 1 <= lanes <= 16):
            return None
        parameters = wrapped[4:32]
        if parameters not in self.derived:
            self.derived[parameters] = Argon2id(
                salt=wrapped[16:32], length=32, iterations=passes, lanes=lanes, memory_cost=memory
            ).derive(self.passphrase)
        return unseal(derive(self.derived[parameters], b"root-wrap"), context, wrapped[32:])


class Mistyped(ValueError):
    """What was typed is no recovery key."""


BASE32 = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"


def crc24(data):
    crc = 0xB704CE
    for byte in data:
        crc ^= byte << 16
        for _ in range(8):
            crc = (crc << 1) ^ (0x1864CFB if crc & 0x800000 else 0)
    return crc


def recovery_secret(typed):
    """The private key in the printed form of a recovery key (section 4.3)."""
    text = re.sub(r"[\s-]", "", typed).upper().replace("0", "O").replace("8", "B")
    if len(text) != 56 or any(c not in BASE32 + "1" for c in text) or text.count("1") > 10:
        raise Mistyped(typed)
    found = []
    for letters in itertools.product("IL", repeat=text.count("1")):
        each = iter(letters)
        data = base64.b32decode("".join(next(each) if c == "1" else c for c in text))
        if crc24(data[:32]) == int.from_bytes(data[32:], "big"):
            found.append(data[:32])
    if len(found) != 1:
        raise Mistyped(typed)
    return found[0]


def hpke_open(secret, enc, info, aad, ciphertext):
    """RFC 9180, base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM. None if it does not authenticate."""

    def extract(suite, salt, label, ikm):
        return mac(salt, b"HPKE-v1" + suite + label + ikm)

    def expand(suite, prk, label, info, length):
        return mac(prk, struct.pack(">H", length) + b"HPKE-v1" + suite + label + info + b"\1")[:length]

    private = X25519PrivateKey.from_private_bytes(secret)
    try:
        dh = private.exchange(X25519PublicKey.from_public_bytes(enc))
    except ValueError:  # all zeros
        return None
    kem = b"KEM" + struct.pack(">H", 0x20)
    shared = expand(
        kem, extract(kem, b"", b"eae_prk", dh), b"shared_secret", enc + private.public_key().public_bytes_raw(), 32
    )
    suite = b"HPKE" + struct.pack(">HHH", 0x20, 1, 2)
    schedule = b"\0" + extract(suite, b"", b"psk_id_hash", b"") + extract(suite, b"", b"info_hash", info)
    prk = extract(suite, shared, b"secret", b"")
    try:
        key, nonce = expand(suite, prk, b"key", schedule, 32), expand(suite, prk, b"base_nonce", schedule, 12)
        return AESGCM(key).decrypt(nonce, ciphertext, aad)
    except InvalidTag:
        return None


class RecoveryKey:
    """A recovery key (section 4.3)."""

    scheme = "recovery:"

    def __init__(self, typed):
        self.secret = recovery_secret(typed)
        public = X25519PrivateKey.from_private_bytes(self.secret).public_key().public_bytes_raw()
        self.uri = "recovery:" + b64encode(public).decode("ascii")

    def unwrap(self, wrapped, context):
        if len(wrapped) != 80:
            return None
        return hpke_open(self.secret, wrapped[:32], b"envelopefs/v1/recovery", context, wrapped[32:])


class Keys:
    """The keyring, opened."""

    def __init__(self, keyring, providers):
        self.keyring, self.providers = keyring, providers
        self.secret = self._unwrap(keyring.secret, wrap_context(b"store-secret", keyring.store, keyring.store))
        if self.secret is None:
            raise NoKey(f"none of the keys given opens this store; it knows {sorted(keyring.roots.values())}")
        if not hmac.compare_digest(mac(derive(self.secret, b"keyring-mac"), keyring.signed), keyring.mac):
            raise Damage("keyring-mac")
        self.keks = {}

    def _unwrap(self, wraps, context):
        for root, wrapped in wraps.items():
            for provider in self.providers:
                if self.keyring.roots[root].startswith(provider.scheme):
                    key = provider.unwrap(wrapped, context)
                    if key is not None:
                        return key
        return None

    def unwrap_dek(self, slot):
        kek = self.keyring.keks.get(slot.kek)
        if kek is None:
            raise Damage("kek-unknown", slot.kek.hex())
        if kek.state == DESTROYED:
            raise Damage("kek-destroyed", slot.kek.hex())
        if self.keyring.is_below_floor(slot.kek):
            raise Damage("kek-below-floor", slot.kek.hex())
        if slot.wrap_suite == EXTERNAL:
            context = wrap_context(b"dek", self.keyring.store, slot.file, slot.wrap_aad)
            dek = self._unwrap({kek.provider: slot.wrapped}, context)
        else:
            if kek.id not in self.keks:
                context = wrap_context(b"kek", self.keyring.store, kek.id)
                self.keks[kek.id] = self._unwrap(kek.wraps, context)
            if self.keks[kek.id] is None:
                raise NoKey(f"KEK {kek.id.hex()} is not wrapped by any key given")
            dek = unseal(derive(self.keks[kek.id], b"kek-wrap", kek.id), slot.wrap_aad, slot.wrapped)
        if dek is None or len(dek) != 32:
            raise Damage("wrap-auth", slot.kek.hex())
        return dek


# --- 5. Regular files -----------------------------------------------------------------------------------------------


def segment_of(block):
    return 0 if block < 32 else 1 + (block - 32) // 128


def first_block(segment):
    return 0 if segment == 0 else 32 + 128 * (segment - 1)


def block_offset(block):
    if block < 32:
        return PAGE * (1 + block)
    return PAGE * (35 + 130 * ((block - 32) // 128) + (block - 32) % 128)


def state_offset(segment):
    """Of copy A; copy B follows at once."""
    return 2048 if segment == 0 else PAGE * (33 + 130 * (segment - 1))


def state_len(segment):
    return 1024 if segment == 0 else 4096


def backing_size(plain):
    if plain == 0:
        return 0
    last = (plain - 1) // PAGE
    return block_offset(last) + plain - PAGE * last


def plain_size(backing):
    if backing <= PAGE:
        return 0
    if backing <= PAGE * 33:
        return backing - PAGE
    r = backing - PAGE * 33
    s = 1 + (r - 1) // (PAGE * 130)
    q = r - (s - 1) * PAGE * 130
    return PAGE * (32 + 128 * (s - 1)) + max(0, q - 2 * PAGE)


@dataclass
class Slot:
    store: bytes
    file: bytes
    commitment: bytes
    mac: bytes
    sequence: int
    kek: bytes
    wrap_suite: int
    wrapped: bytes
    prefix: bytes
    wrap_aad: bytes

    @classmethod
    def parse(cls, b):
        """Section 5.2; the first check that fails names the error."""
        if b[:8] != b"ENVLPFS1":
            raise Damage("header-magic")
        if crc32c(b[:1020]) != int.from_bytes(b[1020:], "little"):
            raise Damage("header-unreadable")
        version, suite, incompatible, _, reserved = struct.unpack("<HHIII", b[8:24])
        if version != VERSION:
            raise Damage("unsupported-version")
        if incompatible:
            raise Damage("unsupported-feature")
        wrap_suite, length, reserved2 = struct.unpack("<HHI", b[144:152])
        if suite != 1 or wrap_suite not in (SEALED, EXTERNAL):
            raise Damage("unsupported-suite")
        sequence = int.from_bytes(b[120:128], "little")
        if reserved or reserved2 or not 1 <= length <= 640 or any(b[152 + length:1020]) or sequence == 0:
            raise Damage("malformed")
        return cls(
            store=b[24:40], file=b[40:56], commitment=b[56:88], mac=b[88:120], sequence=sequence, kek=b[128:144],
            wrap_suite=wrap_suite, wrapped=b[152:152 + length], prefix=b[:88], wrap_aad=b[:146],
        )

    def verify(self, dek):
        if not hmac.compare_digest(derive(dek, b"commitment", self.file), self.commitment):
            raise Damage("commitment")
        if not hmac.compare_digest(mac(derive(dek, b"header-mac", self.file), self.prefix), self.mac):
            raise Damage("header-mac")


def read_slots(page):
    """Valid slots, the one that counts first."""
    if len(page) < 2048:
        raise Damage("header-short")
    valid, errors = [], []
    for at in (0, 1024):
        try:
            valid.append(Slot.parse(page[at:at + 1024]))
        except Damage as e:
            errors.append(e.code)
    if not valid:
        order = ["header-magic", "header-unreadable", "malformed"]
        raise Damage(max(errors, key=lambda e: order.index(e) if e in order else len(order)))
    return sorted(valid, key=lambda s: -s.sequence)


HOLE = bytes(28)
CLEAN, SPARSE, TRUNCATING = 1, 2, 4


@dataclass
class State:
    sequence: int
    entries: list
    length: int
    flags: int


def parse_state(key, file, segment, copy):
    """A State, or None if the copy is absent."""
    if not any(copy):
        return None
    sequence = int.from_bytes(copy[:8], "little")
    aad = file + struct.pack("<QQH", segment, sequence, VERSION)
    body = None
    if sequence and not any(copy[36:40]):
        body = aead_open(key, copy[8:20], aad, copy[40:], copy[20:36])
    if body is None:
        raise Damage("state-auth", f"segment {segment}")
    count = 32 if segment == 0 else 128
    entries = [body[28 * i:28 * i + 28] for i in range(count)]
    length = flags = 0
    reserved = body[28 * count:]
    if segment == 0:
        length, flags = struct.unpack("<QI", body[896:908])
        reserved = body[908:]
    if any(reserved) or flags & ~7 or length > 1 << 62:
        raise Damage("malformed", f"state of segment {segment}")
    return State(sequence, entries, length, flags)


class File:
    """The content of one backing file."""

    def __init__(self, keys, path):
        self.f = open(path, "rb")
        try:
            self._open(keys)
        except BaseException:
            self.f.close()
            raise

    def close(self):
        self.f.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _open(self, keys):
        backing = os.fstat(self.f.fileno()).st_size
        self.size = plain_size(backing)
        self.tail = None
        self.segments = {}
        if backing == 0:
            return
        page = self.f.read(PAGE)
        try:
            slots = read_slots(page)
        except Damage as e:
            if backing <= PAGE and e.code in ("header-short", "header-magic", "header-unreadable"):
                return  # never reached the disk: empty (section 5)
            raise
        dek = self._dek(keys, slots)
        self.content_key = derive(dek, b"content", self.id)
        self.state_key = derive(dek, b"state", self.id)
        self._judge_length(backing)

    def _dek(self, keys, slots):
        failure = None
        for slot in slots:
            try:
                if slot.store != keys.keyring.store:
                    raise Damage("foreign-store", slot.store.hex())
                dek = keys.unwrap_dek(slot)
                slot.verify(dek)
                self.id = slot.file
                return dek
            except Damage as e:
                failure = failure or e
        raise failure

    def _judge_length(self, backing):
        """Section 5.6."""
        self.clean, self.sparse = True, False
        newer, older = self._copies(0)
        if newer is None:
            raise Damage("state-absent", "segment 0")
        self.clean, self.sparse = bool(newer.flags & CLEAN), bool(newer.flags & SPARSE)
        if self.size < newer.length:
            raise Damage("size-short", f"sealed {newer.length}, found {self.size}")
        if self.clean:
            exact = backing == (backing_size(newer.length) or PAGE)
            if self.size > newer.length or not exact:
                raise Damage("size-grown", f"sealed {newer.length}, found {self.size}")
        elif newer.flags & TRUNCATING and self.size > newer.length:
            if newer.length % PAGE:
                on_disk = min(PAGE, self.size - newer.length // PAGE * PAGE)
                self.tail = (newer.length // PAGE, on_disk)
            self.size = newer.length

    def _copies(self, segment):
        """The state that counts and the older one; None for what is absent (section 5.3)."""
        length = state_len(segment)
        self.f.seek(state_offset(segment))
        both = self.f.read(2 * length).ljust(2 * length, b"\0")
        states, failure = [], None
        for copy in (both[:length], both[length:]):
            try:
                state = parse_state(self.state_key, self.id, segment, copy)
                if state is not None:
                    states.append(state)
            except Damage as e:
                failure = failure or e
        if not states and failure:
            raise failure
        states.sort(key=lambda s: -s.sequence)
        if len(states) == 1:
            self.lost = bool(failure) or states[0].sequence > 1
        else:
            self.lost = len(states) == 2 and states[0].sequence == states[1].sequence
        return (states + [None, None])[:2]

    def _block_len(self, block):
        return max(0, min(PAGE, self.size - PAGE * block))

    def _raw(self, block, length):
        self.f.seek(block_offset(block))
        return self.f.read(length).ljust(length, b"\0")

    def _open_block(self, block, entry, length):
        aad = self.id + struct.pack("<QH", block, VERSION)
        return aead_open(self.content_key, entry[:12], aad, self._raw(block, length), entry[12:])

    def _try(self, block, entry):
        """Plaintext of a block under an entry, or None (sections 5.4 to 5.6)."""
        length = self._block_len(block)
        plain = self._open_block(block, entry, length)
        if plain is None and self.tail and block == self.tail[0]:
            plain = self._open_block(block, entry, self.tail[1])
            plain = plain if plain is None else plain[:length]
        return plain

    def _segment(self, segment):
        """Newer and older entries of a segment."""
        if segment not in self.segments:
            newer, older = self._copies(segment)
            if newer is None and not self.sparse:
                raise Damage("state-absent", f"segment {segment}")
            self.doubtful = self.lost
            self.segments = {segment: (newer, None if self.clean else older)}
        return self.segments[segment]

    def block(self, block):
        segment = segment_of(block)
        newer, older = self._segment(segment)
        length = self._block_len(block)
        if newer is None:
            return bytes(length)
        index = block - first_block(segment)
        entry = newer.entries[index]
        if entry == HOLE:
            if self.doubtful and any(self._raw(block, length)):
                raise Damage("block-auth", f"block {block}")  # the copy that is left may be out of date
            return bytes(length)
        plain = self._try(block, entry)
        if plain is None and older is not None:
            old = older.entries[index]
            if old == HOLE:
                raw = self._raw(block, length)
                plain = None if any(raw) else raw
            else:
                plain = self._try(block, old)
        if plain is None:
            raise Damage("block-auth", f"block {block}")
        return plain

    def blocks(self):
        return (self.block(b) for b in range(-(-self.size // PAGE)))


# --- 6 to 9. Directories, names, links, extended attributes ---------------------------------------------------------

RESERVED = b".envelopefs"
LONG = b".envelopefs.long."
LINK_REFERENCE = re.compile(b"envelopefs-link:[0-9a-f]{32}:[0-9a-f]{4}")


def check_name(name):
    return 0 < len(name) <= 255 and name not in (b".", b"..") and b"\0" not in name and b"/" not in name


class Store:
    """A store, open for reading."""

    def __init__(self, backing, providers):
        self.backing = os.fsencode(backing)
        self.keys = Keys(Keyring.load(os.path.join(self.backing, RESERVED)), providers)
        secret = self.keys.secret
        self.plaintext_names = bool(self.keys.keyring.flags & PLAINTEXT_NAMES)
        self.name_key = derive(secret, b"names")
        self.dir_key = derive(secret, b"dir-id")
        self.link_key = derive(secret, b"symlink")
        self.xattr_name_key = derive(secret, b"xattr-name")
        self.xattr_value_key = derive(secret, b"xattr-value")
        self.skipped = []  # (backing path, code) of names that cannot be read

    def directory_id(self, path):
        try:
            with open(os.path.join(path, b".envelopefs.dir"), "rb") as f:
                sealed = f.read()
        except FileNotFoundError:
            raise Damage("dir-id-missing", os.fsdecode(path)) from None
        plain = unseal(self.dir_key, b"", sealed)
        if plain is None or len(plain) != 16:
            raise Damage("dir-id-auth", os.fsdecode(path))
        return plain

    def encode_name(self, directory, name):
        return b64encode(siv(self.name_key, directory[:12], directory, name))

    def decode_name(self, directory, text):
        blob = b64decode(text)
        name = None
        if blob is not None and len(blob) >= 16:
            name = aead_open(self.name_key, directory[:12], directory, blob[:-16], blob[-16:])
        if name is None or not check_name(name):
            raise Damage("name-auth", os.fsdecode(text))
        return name

    def decode_long(self, directory, entry, text):
        if text is None or len(text) <= 255 or LONG + b64encode(hashlib.sha256(text).digest()) != entry:
            raise Damage("name-sidecar", os.fsdecode(entry))
        return self.decode_name(directory, text)

    def listing(self, path):
        """(plaintext name, backing path) of each entry of a backing directory."""
        entries = sorted(os.listdir(path))
        if self.plaintext_names:
            return [(e, os.path.join(path, e)) for e in entries if not e.startswith(RESERVED)]
        directory, out = self.directory_id(path), []
        for entry in entries:
            at = os.path.join(path, entry)
            try:
                if not entry.startswith(RESERVED):
                    out.append((self.decode_name(directory, entry), at))
                elif entry.startswith(LONG) and len(entry) == len(LONG) + 43:
                    out.append((self.decode_long(directory, entry, self._sidecar(at)), at))
            except Damage as e:
                self.skipped.append((at, e.code))
        return sorted(out)

    @staticmethod
    def _sidecar(path):
        try:
            with open(path + b".name", "rb") as f:
                return f.read(4096)
        except FileNotFoundError:
            return None

    def readlink(self, path):
        text = os.readlink(path)
        sealed = self._target_apart(text) if LINK_REFERENCE.fullmatch(text) else b64decode(text)
        return self.open_target(sealed, path)

    def open_target(self, sealed, where):
        target = unseal(self.link_key, b"", sealed) if sealed is not None else None
        if not target or len(target) > 4095 or b"\0" in target:
            raise Damage("symlink-auth", os.fsdecode(where))
        return target

    def _target_apart(self, text):
        try:
            with open(os.path.join(self.backing, RESERVED, b"links", text[16:48]), "rb") as f:
                return f.read(8192)
        except FileNotFoundError:
            return None

    def xattr_backing_name(self, name):
        namespace = name[:name.index(b".") + 1]
        text = b64encode(siv(self.xattr_name_key, bytes(12), b"", name))
        backing = namespace + b"envelopefs." + text
        if len(backing) > 255:
            backing = namespace + b"envelopefs.L." + b64encode(hashlib.sha256(text).digest())
        return backing

    def xattr(self, backing, sealed):
        """(name, value) of an attribute of a backing inode, or None if it is not the store's."""
        for namespace in (b"user.", b"trusted.", b"security."):
            if backing.startswith(namespace + b"envelopefs."):
                text = backing[len(namespace) + 11:]
                break
        else:
            return None
        name = None
        if not text.startswith(b"L."):
            blob = b64decode(text)
            if blob is not None and len(blob) >= 16:
                name = aead_open(self.xattr_name_key, bytes(12), b"", blob[:-16], blob[-16:])
            if name is None or self.xattr_backing_name(name) != backing:
                return None
        value = unseal(self.xattr_value_key, backing, sealed)
        if value is None:
            raise Damage("xattr-auth", os.fsdecode(backing))
        if name is None:
            length = int.from_bytes(value[:2], "little")
            name, value = value[2:2 + length], value[2 + length:]
            if len(name) != length or b"." not in name or self.xattr_backing_name(name) != backing:
                raise Damage("xattr-auth", os.fsdecode(backing))
        return name, value

    def xattrs(self, path):
        out = {}
        for name in os.listxattr(path, follow_symlinks=False):
            name = os.fsencode(name)
            value = os.getxattr(path, name, follow_symlinks=False)
            if name in (b"system.posix_acl_access", b"system.posix_acl_default"):
                out[name] = value
            else:
                found = self.xattr(name, value)
                if found:
                    out[found[0]] = found[1]
        return out

    def open(self, path):
        return File(self.keys, path)

    def walk(self, path=None, prefix=b""):
        """(plaintext path, backing path, stat) of everything below a backing directory, parents first."""
        path = path or self.backing
        try:
            entries = self.listing(path)
        except Damage as e:
            self.skipped.append((path, e.code))
            return
        for name, at in entries:
            st = os.lstat(at)
            yield prefix + name, at, st
            if stat.S_ISDIR(st.st_mode):
                yield from self.walk(at, prefix + name + b"/")


# --- Commands -------------------------------------------------------------------------------------------------------


def list_command(store):
    for path, at, st in store.walk():
        size = plain_size(st.st_size) if stat.S_ISREG(st.st_mode) else 0
        print(f"{stat.filemode(st.st_mode)} {size:12} {os.fsdecode(path)}")


def verify_command(store):
    """Reads everything; prints what is damaged; True if nothing is."""
    bad = files = 0
    for path, at, st in store.walk():
        try:
            store.xattrs(at)
            if stat.S_ISLNK(st.st_mode):
                store.readlink(at)
            elif stat.S_ISREG(st.st_mode):
                files += 1
                with store.open(at) as f:
                    for _ in f.blocks():
                        pass
        except Damage as e:
            bad += 1
            print(f"{os.fsdecode(path)}: {e}")
    for at, code in store.skipped:
        bad += 1
        print(f"{os.fsdecode(at)}: {code}")
    print(f"{files} files, {bad} damaged")
    return bad == 0


def extract_command(store, destination):
    """Writes everything below `destination`, with modes, times and extended attributes; links stay links."""
    destination = os.fsencode(destination)
    os.makedirs(destination)
    seen, directories = {}, []
    for path, at, st in store.walk():
        to = os.path.join(destination, path)
        if not stat.S_ISDIR(st.st_mode) and (st.st_dev, st.st_ino) in seen:
            os.link(seen[st.st_dev, st.st_ino], to, follow_symlinks=False)
            continue
        seen[st.st_dev, st.st_ino] = to
        if stat.S_ISDIR(st.st_mode):
            os.mkdir(to)
            directories.append((to, st))
        elif stat.S_ISLNK(st.st_mode):
            os.symlink(store.readlink(at), to)
        elif stat.S_ISREG(st.st_mode):
            with store.open(at) as f, open(to, "wb") as out:
                for block in f.blocks():
                    if any(block):
                        out.write(block)
                    else:
                        out.seek(len(block), os.SEEK_CUR)
                out.truncate(f.size)
        elif stat.S_ISFIFO(st.st_mode):
            os.mkfifo(to)
        else:
            continue
        for name, value in store.xattrs(at).items():
            os.setxattr(to, name, value, follow_symlinks=False)
        finish(to, st)
    for to, st in reversed(directories):
        finish(to, st)


def finish(path, st):
    if not stat.S_ISLNK(st.st_mode):
        os.chmod(path, stat.S_IMODE(st.st_mode))
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns), follow_symlinks=False)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("backing")
    p.add_argument("--key-file", action="append", default=[])
    p.add_argument("--passphrase-file", action="append", default=[])
    p.add_argument("--recovery-file", action="append", default=[])
    p.add_argument("command", choices=["list", "extract", "verify"])
    p.add_argument("destination", nargs="?")
    a = p.parse_args()
    providers = [KeyFile(f) for f in a.key_file]
    for name in a.passphrase_file:
        with open(name, "rb") as f:
            providers.append(Passphrase(f.read().removesuffix(b"\n").removesuffix(b"\r")))
    for name in a.recovery_file:
        with open(name, encoding="utf-8") as f:
            providers.append(RecoveryKey(f.read()))
    store = Store(a.backing, providers)
    if a.command == "list":
        list_command(store)
    elif a.command == "verify":
        sys.exit(0 if verify_command(store) else 1)
    elif a.destination is None:
        p.error("extract needs a destination")
    else:
        extract_command(store, a.destination)


if __name__ == "__main__":
    try:
        main()
    except (Damage, NoKey, OSError, ValueError) as e:
        sys.exit(f"envelopefs_reader: {e}")
