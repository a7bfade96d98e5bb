"""A store made, filled and rotated by the program, read back by the independent reader: the trees are the same.

The program's binary is $ENVELOPEFS.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import unittest

import envelopefs_reader as r

PROGRAM = os.path.abspath(os.environ.get("ENVELOPEFS", "target/debug/envelopefs"))
KIB = 1024
# Around every boundary of the format: block, segment 0, segment 1, the states between them.
SIZES = [
    0, 1, 27, 28, 4095, 4096, 4097, 8192, 12345,
    128 * KIB - 1, 128 * KIB, 128 * KIB + 1, 132 * KIB,
    640 * KIB - 1, 640 * KIB, 640 * KIB + 1, 1152 * KIB + 7,
]


def run(*args):
    done = subprocess.run([PROGRAM, *args], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise AssertionError(f"{' '.join(args)}: exit {done.returncode}: {done.stderr}")
    return done.stdout


def describe(path):
    """What must be the same on both sides, for each path below a directory."""
    out = {}
    for folder, directories, files in os.walk(path):
        for name in directories + files:
            at = os.path.join(folder, name)
            st = os.lstat(at)
            what = [stat.filemode(st.st_mode), st.st_mtime_ns, xattrs(at)]
            if stat.S_ISLNK(st.st_mode):
                what.append(os.readlink(at))
            elif stat.S_ISREG(st.st_mode):
                with open(at, "rb") as f:
                    what += [st.st_size, hashlib.file_digest(f, "sha256").hexdigest(), st.st_nlink]
            out[os.path.relpath(at, path)] = what
    return out


def xattrs(path):
    names = [n for n in os.listxattr(path, follow_symlinks=False) if n.startswith("user.")]
    return {n: os.getxattr(path, n, follow_symlinks=False) for n in names}


def content(seed, size):
    return random.Random(seed).randbytes(size)


def fill(top):
    """A tree with everything that a store can hold and an unprivileged user can make."""
    for size in SIZES:
        with open(os.path.join(top, f"size-{size}"), "wb") as f:
            f.write(content(size, size))
    names = os.path.join(top, "names")
    os.makedirs(os.path.join(names, "d" * 255, "e" * 176))
    for name in ["n" * 175, "n" * 176, "n" * 255, "gr\u00fc\u00dfe", "with space", "-dash", ".hidden", "line\nbreak"]:
        with open(os.path.join(names, name), "w", encoding="utf-8") as f:
            f.write(name)
    with open(os.path.join(names, "d" * 255, "e" * 176, "deep"), "wb") as f:
        f.write(b"deep")
    sparse = os.path.join(top, "sparse")
    with open(sparse, "wb") as f:
        f.write(b"begin")
        f.seek(3 * KIB * KIB)
        f.write(b"middle")
        f.truncate(20 * KIB * KIB + 5)
    for size in (5000, 131072, 700000):
        change(os.path.join(top, f"changed-{size}"), size)
    links = os.path.join(top, "links")
    os.mkdir(links)
    for n in (1, 100, 3000, 3032, 3033, 4095):
        os.symlink("x" * n, os.path.join(links, f"to-{n}"))
    os.link(os.path.join(top, "size-12345"), os.path.join(links, "hard"))
    os.mkfifo(os.path.join(top, "fifo"), 0o640)
    attributed = os.path.join(top, "size-4097")
    os.setxattr(attributed, "user.comment", b"hello")
    os.setxattr(attributed, "user." + "n" * 250, b"long name")
    os.setxattr(attributed, "user.empty", b"")
    os.setxattr(names, "user.of.directory", b"\0\1\2")
    os.chmod(os.path.join(top, "size-27"), 0o400)
    os.utime(os.path.join(top, "size-28"), ns=(1, 1_234_567_890_123_456_789))


def read_file(path):
    with open(path, "rb") as f:
        return f.read()


def change(path, size):
    """A file that was written, overwritten in the middle, cut and extended."""
    with open(path, "wb") as f:
        f.write(content(size, size))
        f.seek(size // 3)
        f.write(b"overwritten")
        f.truncate(size - 100)
        f.seek(size + 10_000)
        f.write(b"end")


class Store:
    """A temporary store, unmounted and removed at the end, come what may."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="envelopefs-reader-")
        self.backing, self.mnt = self.path("backing"), self.path("mnt")
        os.mkdir(self.backing)
        os.mkdir(self.mnt)

    def path(self, name):
        return os.path.join(self.folder, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if os.path.ismount(self.mnt):
            subprocess.run([PROGRAM, "unmount", self.mnt], capture_output=True, timeout=60, check=False)
        if os.path.ismount(self.mnt):
            subprocess.run(["umount", "-l", self.mnt], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def mounted(self, *args):
        run("mount", self.backing, self.mnt, *args)
        try:
            yield self.mnt
        finally:
            run("unmount", self.mnt)


class ReaderAgrees(unittest.TestCase):
    maxDiff = None

    def check_extract(self, store, providers, want):
        read = r.Store(store.backing, providers)
        out = store.path(f"out-{random.randrange(1 << 60)}")
        r.extract_command(read, out)
        self.assertEqual(read.skipped, [])
        self.assertEqual(describe(out), want)

    def whole_life(self, *init):
        with Store() as s:
            run("init", s.backing, "--key", f"keyfile:{s.path('key')}", *init)
            key = r.KeyFile(s.path("key"))
            with s.mounted():
                fill(s.mnt)
                written = describe(s.mnt)
            with s.mounted():
                want = describe(s.mnt)
            # But for times: the kernel's writeback cache may show a time of its own until the inode is read anew.
            self.assertEqual([w[:1] + w[2:] for w in written.values()], [w[:1] + w[2:] for w in want.values()])
            self.assertGreater(len(want), 40)
            self.check_extract(s, [key], want)
            with s.mounted():
                run("rotate", s.mnt, "--destroy-old")
            self.check_extract(s, [key], want)
            run("rotate", s.backing)
            self.check_extract(s, [key], want)
            states = [k.state for k in r.Store(s.backing, [key]).keys.keyring.keks.values()]
            self.assertEqual(sorted(states), [r.ACTIVE, r.RETIRED, r.DESTROYED])

    def test_reader_extracts_what_the_program_wrote(self):
        self.whole_life()

    def test_reader_extracts_a_store_with_plaintext_names(self):
        self.whole_life("--plaintext-names")

    def test_reader_opens_with_a_passphrase(self):
        with Store() as s:
            with open(s.path("pass"), "w", encoding="ascii") as f:
                f.write("correct horse\n")
            run("init", s.backing, "--key", "passphrase:", "--passphrase-file", s.path("pass"))
            with s.mounted("--passphrase-file", s.path("pass")):
                with open(os.path.join(s.mnt, "file"), "wb") as f:
                    f.write(b"content")
            with s.mounted("--passphrase-file", s.path("pass")):
                want = describe(s.mnt)
            self.check_extract(s, [r.Passphrase(b"correct horse")], want)
            with self.assertRaises(r.NoKey):
                r.Store(s.backing, [r.Passphrase(b"wrong horse")])

    def test_reader_opens_with_a_recovery_key(self):
        with Store() as s:
            out = run("init", s.backing, "--key", f"keyfile:{s.path('key')}", "--recovery-key")
            typed = re.search(r"\n    ([A-Z2-7-]{69})\n", out).group(1)
            with s.mounted():
                with open(os.path.join(s.mnt, "file"), "wb") as f:
                    f.write(b"content")
                # The new KEK is wrapped for a key that is not there.
                run("rotate", s.mnt, "--destroy-old")
            with s.mounted():
                want = describe(s.mnt)
            self.check_extract(s, [r.RecoveryKey(typed.lower().replace("-", " "))], want)
            with self.assertRaises(r.Mistyped):
                r.RecoveryKey(typed[:-1] + ("A" if typed[-1] != "A" else "B"))

    def test_reader_recovers_what_a_killed_daemon_left(self):
        with Store() as s:
            run("init", s.backing, "--key", f"keyfile:{s.path('key')}")
            run("mount", s.backing, s.mnt)
            with open(os.path.join(s.mnt, "synced"), "wb") as f:
                f.write(content(1, 300_000))
                f.flush()
                os.fsync(f.fileno())
                want = describe(s.mnt)
                kill_daemon(s.backing)
            subprocess.run(["umount", "-l", s.mnt], check=True)
            out = s.path("out")
            r.extract_command(r.Store(s.backing, [r.KeyFile(s.path("key"))]), out)
            self.assertEqual([w[3:] for w in describe(out).values()], [w[3:] for w in want.values()])

    def test_reader_names_the_damage(self):
        with Store() as s:
            run("init", s.backing, "--key", f"keyfile:{s.path('key')}", "--plaintext-names")
            with s.mounted():
                for name, size in (("a", 200_000), ("b", 200_000), ("c", 50)):
                    with open(os.path.join(s.mnt, name), "wb") as f:
                        f.write(content(name, size))
            at = {n: os.path.join(s.backing, n) for n in "abc"}
            intact = {n: read_file(p) for n, p in at.items()}

            def code(name, data, block=0):
                with open(at[name], "wb") as f:
                    f.write(data)
                try:
                    with r.Store(s.backing, [r.KeyFile(s.path("key"))]).open(at[name]) as f:
                        f.block(block)
                        return None
                except r.Damage as e:
                    return e.code
                finally:
                    with open(at[name], "wb") as f:
                        f.write(intact[name])

            a, b = intact["a"], intact["b"]
            block = slice(2 * 4096, 3 * 4096)
            flip = a[:block.start] + bytes([a[block.start] ^ 1]) + a[block.start + 1:]
            other = a[:block.start] + b[block] + a[block.stop:]
            zeros = a[:block.start] + bytes(4096) + a[block.stop:]
            self.assertIsNone(code("a", a, 1))
            self.assertEqual(code("a", flip, 1), "block-auth")
            self.assertEqual(code("a", other, 1), "block-auth")
            self.assertEqual(code("a", zeros, 1), "block-auth")
            self.assertIsNone(code("a", flip, 0))
            self.assertEqual(code("a", a[:-1]), "size-short")
            self.assertEqual(code("a", a + b"x"), "size-grown")
            self.assertEqual(code("a", b[:2048] + a[2048:]), "state-auth")
            self.assertEqual(code("a", a[:2048] + bytes(2048) + a[4096:]), "state-absent")
            self.assertEqual(code("a", a[:33 * 4096] + bytes(8192) + a[35 * 4096:], 32), "state-absent")
            self.assertEqual(code("a", bytes(2048) + a[2048:]), "header-magic")


class Golden(unittest.TestCase):
    def test_reader_reads_every_golden_store(self):
        folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "golden")
        versions = [v for v in sorted(os.listdir(folder)) if os.path.isdir(os.path.join(folder, v))]
        self.assertTrue(versions)
        for version in versions:
            top = os.path.join(folder, version)
            with open(os.path.join(top, "manifest.json"), encoding="utf-8") as f:
                want = json.load(f)
            roots = [[r.KeyFile(os.path.join(top, "root.key"))]]
            with contextlib.suppress(FileNotFoundError), open(os.path.join(top, "passphrase"), "rb") as f:
                roots.append([r.Passphrase(f.read())])
            for root in roots:
                with self.subTest(version=version, root=root[0].scheme):
                    self.assertEqual(self.described(top, r.Store(os.path.join(top, "store"), root)), want)

    def described(self, top, store):
        """What the manifest says. Version control keeps no extended attributes: they are in xattrs.json."""
        found, xattrs = {}, {}
        with contextlib.suppress(FileNotFoundError), open(os.path.join(top, "xattrs.json"), encoding="utf-8") as f:
            xattrs = json.load(f)
        for path, at, st in store.walk():
            if stat.S_ISDIR(st.st_mode):
                entry = {"directory": True}
            elif stat.S_ISLNK(st.st_mode):
                entry = {"link": os.fsdecode(store.readlink(at))}
            else:
                with store.open(at) as f:
                    content = b"".join(f.blocks())
                entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            sealed = xattrs.get(os.path.relpath(os.fsdecode(at), os.path.join(top, "store")), {})
            opened = [store.xattr(os.fsencode(name), bytes.fromhex(value)) for name, value in sealed.items()]
            if opened:
                entry["xattrs"] = {os.fsdecode(name): value.hex() for name, value in opened}
            found[os.fsdecode(path)] = entry
        return found


def kill_daemon(backing):
    """Sends SIGKILL to the process that has the store's lock file open, which is ours."""
    lock = os.path.join(os.path.realpath(backing), ".envelopefs", "lock")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{fd}") == lock:
                    os.kill(int(pid), signal.SIGKILL)
                    return
    raise AssertionError("no daemon has the store")


if __name__ == "__main__":
    unittest.main()
