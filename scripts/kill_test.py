#!/usr/bin/env python3
"""Kills the daemon with SIGKILL, again and again, while programs write, sync, rename and remove, and while a rotation
runs; after each kill mounts again and holds what is there against what had been acknowledged.

Checked after every kill: every byte acknowledged by fsync is there; every other byte is the old or the new one; no
read gives an error; new names that an fsync of file or directory acknowledged are there. At the end `check --deep`
finds nothing and a rotation completes.

    kill_test.py --binary target/release/envelopefs [--kills 100] [--seed N] [--folder DIR]
"""

import argparse
import contextlib
import os
import random
import sys
import threading
import time

from mounted import temporary

BLOCK = 4096


class Killed(Exception):
    """The mount answered with the error of a dead daemon."""


class File:
    """One file, and what its content may be: for each block the version acknowledged, and those written since."""

    def __init__(self, name):
        self.name = name
        self.synced = []  # per block: version
        self.pending = []  # (block, version) written since, in order
        self.exists = False  # acknowledged
        self.version = 0

    @staticmethod
    def content(name, block, version):
        return random.Random(f"{name}/{block}/{version}").randbytes(BLOCK) if version else bytes(BLOCK)

    def write(self, fd, block):
        self.version += 1
        self.pending.append((block, self.version))
        os.pwrite(fd, self.content(self.name, block, self.version), block * BLOCK)

    def sync(self, fd):
        os.fsync(fd)
        for block, version in self.pending:
            self.synced += [0] * (block + 1 - len(self.synced))
            self.synced[block] = version
        self.pending = []
        self.exists = True

    def verify(self, folder):
        """Problems found; and takes what is there as the new truth."""
        path = os.path.join(folder, self.name)
        try:
            with open(path, "rb") as f:
                data = f.read()
        except FileNotFoundError:
            found = [f"{self.name}: acknowledged, and gone"] if self.exists else []
            self.synced, self.pending, self.exists = [], [], False
            return found
        except OSError as e:
            return [f"{self.name}: {e}"]
        problems = []
        if len(data) < len(self.synced) * BLOCK:
            problems.append(f"{self.name}: {len(data)} bytes, {len(self.synced) * BLOCK} acknowledged")
        now = []
        for block in range(-(-len(data) // BLOCK)):
            have = data[block * BLOCK:(block + 1) * BLOCK]
            base = self.synced[block] if block < len(self.synced) else 0
            versions = [base] + [v for b, v in self.pending if b == block]
            match = next((v for v in reversed(versions) if self.content(self.name, block, v)[:len(have)] == have), None)
            if match is None:
                problems.append(f"{self.name}: block {block} is none of versions {versions}")
            now.append(match or 0)
        self.synced, self.pending, self.exists = now, [], True
        return problems


class Writer(threading.Thread):
    """Writes its own files until the daemon dies."""

    def __init__(self, mnt, number, seed):
        super().__init__(daemon=True)
        self.folder = os.path.join(mnt, f"writer-{number}")
        self.random = random.Random(seed)
        self.files = {f"file-{i}": File(f"file-{i}") for i in range(6)}
        self.renamed = {}  # final name → (content, acknowledged)
        self.counter = 0
        self.acknowledged = 0
        self.fault = None

    def again(self):
        """A thread that goes on with this one's files."""
        t = Writer.__new__(Writer)
        threading.Thread.__init__(t, daemon=True)
        for k in ("folder", "random", "files", "renamed", "counter"):
            setattr(t, k, getattr(self, k))
        t.acknowledged, t.fault = 0, None
        return t

    def run(self):
        try:
            os.makedirs(self.folder, exist_ok=True)
            while True:
                self.overwrite() if self.random.random() < 0.7 else self.replace()
        except OSError as e:
            # ENOTCONN and its kin: the daemon is gone. Anything else is a fault, unless it comes with the kill.
            self.fault = e

    def overwrite(self):
        f = self.random.choice(list(self.files.values()))
        fd = os.open(os.path.join(self.folder, f.name), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            for _ in range(self.random.randint(1, 4)):
                top = max(1, len(f.synced))
                f.write(fd, self.random.randrange(min(300, top + 8)))
            if self.random.random() < 0.8:
                f.sync(fd)
                self.acknowledged += 1
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)

    def replace(self):
        """Writes a new file, syncs it, renames it over an old name, syncs the directory: the way editors save."""
        self.counter += 1
        name = f"saved-{self.random.randrange(4)}"
        content = random.Random(self.counter).randbytes(self.random.randrange(1, 20_000))
        old = self.renamed.get(name)
        temporary = os.path.join(self.folder, f".tmp-{self.counter}")
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        self.renamed[name] = (content, False, old)
        os.rename(temporary, os.path.join(self.folder, name))
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        self.renamed[name] = (content, True, None)
        self.acknowledged += 1

    def verify(self):
        problems = []
        if not os.path.isdir(self.folder):
            had = any(f.exists for f in self.files.values()) or any(r[1] for r in self.renamed.values())
            return [f"{self.folder} is gone"] if had else []
        for f in self.files.values():
            problems += f.verify(self.folder)
        for name, (content, acknowledged, old) in list(self.renamed.items()):
            path = os.path.join(self.folder, name)
            allowed = [content] if acknowledged else [content, old[0] if old else None]
            try:
                with open(path, "rb") as f:
                    have = f.read()
            except FileNotFoundError:
                have = None
            except OSError as e:
                problems.append(f"{name}: {e}")
                continue
            if have not in allowed:
                problems.append(f"{name}: {'gone' if have is None else 'neither old nor new'}")
            if have is None:
                del self.renamed[name]
            else:
                self.renamed[name] = (have, True, None)
        for name in os.listdir(self.folder):
            if name.startswith(".tmp-"):
                with open(os.path.join(self.folder, name), "rb") as f:
                    f.read()
                os.unlink(os.path.join(self.folder, name))
        return problems


def rotate_until_killed(mount):
    while True:
        done = mount.run("rotate", mount.mnt, "--destroy-old", check=False)
        if done.returncode:
            return


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--binary", required=True)
    p.add_argument("--kills", type=int, default=100)
    p.add_argument("--seed", type=int, default=int(time.time()))
    p.add_argument("--folder", help="where to make the temporary store")
    a = p.parse_args()
    print(f"kill_test: seed {a.seed}", flush=True)
    with temporary(a.binary, a.folder) as mount:
        kill_again_and_again(mount, a)


def kill_again_and_again(mount, a):
    chance = random.Random(a.seed)
    writers = [Writer(mount.mnt, i, f"{a.seed}/{i}") for i in range(3)]
    acknowledged = 0
    for kill in range(1, a.kills + 1):
        mount.mount()
        problems = [x for w in writers for x in w.verify()]
        if problems:
            sys.exit(f"kill_test: after kill {kill - 1}:\n  " + "\n  ".join(problems[:20]))
        writers = [w.again() for w in writers]
        rotation = threading.Thread(target=rotate_until_killed, args=(mount,), daemon=True)
        for t in [*writers, rotation]:
            t.start()
        time.sleep(chance.uniform(0.05, 1.0))
        early = [w.fault for w in writers if w.fault]
        mount.kill()
        for t in [*writers, rotation]:
            t.join(120)
        if early:
            sys.exit(f"kill_test: before kill {kill}: {early[0]}")
        acknowledged += sum(w.acknowledged for w in writers)
        if kill % 10 == 0:
            print(f"kill_test: {kill} kills, {acknowledged} acknowledged writes and renames all there", flush=True)
    mount.mount()
    problems = [x for w in writers for x in w.verify()]
    mount.run("rotate", mount.mnt, "--destroy-old")
    problems += [x for w in writers for x in w.verify()]
    mount.run("unmount", mount.mnt)
    if problems:
        sys.exit("kill_test: at the end:\n  " + "\n  ".join(problems[:20]))
    print(mount.run("check", mount.backing, "--deep").stdout.strip())
    print(f"kill_test: {a.kills} kills, {acknowledged} acknowledged: nothing lost, no error, rotation complete")


if __name__ == "__main__":
    main()
