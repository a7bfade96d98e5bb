#!/usr/bin/env python3
"""Measures a mounted store beside the native directory below it and beside gocryptfs, if that is installed.

Every workload runs on each in turn, in an order that changes from round to round, so that what else the machine does
falls on all alike; the table shows medians and ratios. "Cold" means that the kernel's caches were dropped before,
which takes root. The loops are Python's, the same for all: where the file system takes less than a microsecond for an
operation the ratio is flattered.

    bench.py --binary target/release/envelopefs [--rounds 5] [--quick] [--only WORD] [--folder DIR] [--json FILE]
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

MIB = 1 << 20


def quiet(*args, **kwargs):
    done = subprocess.run(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False, **kwargs)
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(args)} in {kwargs.get('cwd', '.')}: {done.stderr.strip()}")


def drop_caches():
    os.sync()
    if os.geteuid() == 0:
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as f:
            f.write("3")


class Native:
    name = "native"

    def __init__(self, base, _binary):
        self.dir = os.path.join(base, "native")
        os.mkdir(self.dir)

    def stop(self):
        pass


class Envelopefs:
    name = "envelopefs"

    def __init__(self, base, binary):
        self.binary, backing, self.dir = binary, os.path.join(base, "env"), os.path.join(base, "env-mnt")
        os.mkdir(backing)
        os.mkdir(self.dir)
        quiet(binary, "init", backing, "--key", f"keyfile:{base}/env.key")
        quiet(binary, "mount", backing, self.dir)

    def stop(self):
        subprocess.run([self.binary, "unmount", self.dir], capture_output=True, check=False)


class Gocryptfs:
    name = "gocryptfs"

    def __init__(self, base, _binary):
        backing, self.dir = os.path.join(base, "go"), os.path.join(base, "go-mnt")
        os.mkdir(backing)
        os.mkdir(self.dir)
        password = os.path.join(base, "go.pass")
        with open(password, "w", encoding="ascii") as f:
            f.write("password\n")
        quiet("gocryptfs", "-q", "-init", "-scryptn", "10", "-passfile", password, backing)
        quiet("gocryptfs", "-q", "-passfile", password, backing, self.dir)

    def stop(self):
        subprocess.run(["fusermount3", "-u", self.dir], capture_output=True, check=False)


class Bench:
    """The workloads. Each is a method that takes the folder, prepares what is not measured, and yields once: what
    comes after the yield is measured."""

    def __init__(self, scale, tar):
        self.big = 256 * MIB // scale
        self.ops = 8000 // scale
        self.small = 2000 // scale
        self.tar = tar
        self.buffer = random.Random(1).randbytes(MIB)

    @staticmethod
    def at(folder, name):
        return os.path.join(folder, name)

    def _make_big(self, folder):
        path = self.at(folder, "big")
        if not os.path.exists(path):
            with open(path, "wb") as f:
                for _ in range(self.big // MIB):
                    f.write(self.buffer)
                os.fsync(f.fileno())
        return path

    def _write(self, folder, size):
        path = self.at(folder, "written")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        yield
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        block = self.buffer[:size]
        for _ in range(self.big // size):
            os.write(fd, block)
        os.fsync(fd)
        os.close(fd)

    def _read(self, folder, size, cold):
        path = self._make_big(folder)
        if cold:
            drop_caches()
        else:
            with open(path, "rb") as f:
                while f.read(MIB):
                    pass
        yield
        fd = os.open(path, os.O_RDONLY)
        buffer = bytearray(size)
        while os.readv(fd, [buffer]):
            pass
        os.close(fd)

    def _random(self, folder):
        path = self._make_big(folder)
        pages = self.big // 4096
        rng = random.Random(7)
        return path, [rng.randrange(pages) * 4096 for _ in range(self.ops)]

    def write_sequential_1m(self, folder):
        """write 1 MiB, then fsync"""
        return self._write(folder, MIB)

    def write_sequential_4k(self, folder):
        """write 4 KiB, then fsync"""
        return self._write(folder, 4096)

    def read_sequential_1m_cold(self, folder):
        """read 1 MiB, cold"""
        return self._read(folder, MIB, True)

    def read_sequential_1m_warm(self, folder):
        """read 1 MiB, warm"""
        return self._read(folder, MIB, False)

    def read_sequential_4k_cold(self, folder):
        """read 4 KiB, cold"""
        return self._read(folder, 4096, True)

    def read_random_cold(self, folder):
        """random 4 KiB reads, cold"""
        path, offsets = self._random(folder)
        drop_caches()
        yield
        fd = os.open(path, os.O_RDONLY)
        for o in offsets:
            os.pread(fd, 4096, o)
        os.close(fd)

    def write_random(self, folder):
        """random 4 KiB writes, then fsync"""
        path, offsets = self._random(folder)
        drop_caches()
        yield
        fd = os.open(path, os.O_RDWR)
        for o in offsets:
            os.pwrite(fd, self.buffer[:4096], o)
        os.fsync(fd)
        os.close(fd)

    def write_random_synced(self, folder):
        """random 4 KiB writes, fdatasync each"""
        path, offsets = self._random(folder)
        yield
        fd = os.open(path, os.O_RDWR)
        for o in offsets[:max(50, self.ops // 40)]:
            os.pwrite(fd, self.buffer[:4096], o)
            os.fdatasync(fd)
        os.close(fd)

    def append(self, folder):
        """appends of 100 bytes"""
        path = self.at(folder, "log")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        yield
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for _ in range(self.ops * 2):
            os.write(fd, self.buffer[:100])
        os.close(fd)

    def _small(self, folder):
        return self.at(folder, "small"), [f"file-{i:05}" for i in range(self.small)]

    def small_create(self, folder):
        """create files of 2 KiB"""
        top, names = self._small(folder)
        shutil.rmtree(top, ignore_errors=True)
        os.mkdir(top)
        yield
        for n in names:
            with open(self.at(top, n), "wb", buffering=0) as f:
                f.write(self.buffer[:2048])

    def _have_small(self, folder):
        top, names = self._small(folder)
        if not os.path.isdir(top):
            os.mkdir(top)
            for n in names:
                with open(self.at(top, n), "wb", buffering=0) as f:
                    f.write(self.buffer[:2048])
        return top, names

    def _read_small(self, folder, cold):
        top, names = self._have_small(folder)
        if cold:
            drop_caches()
        yield
        for n in names:
            with open(self.at(top, n), "rb", buffering=0) as f:
                f.read()

    def small_read_cold(self, folder):
        """read them, cold"""
        return self._read_small(folder, True)

    def small_read_warm(self, folder):
        """read them, warm"""
        return self._read_small(folder, False)

    def small_remove(self, folder):
        """remove them"""
        top, names = self._have_small(folder)
        yield
        for n in names:
            os.unlink(self.at(top, n))
        os.rmdir(top)

    def untar(self, folder):
        """untar /usr/include (quick: linux/ of it)"""
        top = self.at(folder, "tree")
        shutil.rmtree(top, ignore_errors=True)
        os.mkdir(top)
        yield
        quiet("tar", "-xf", self.tar, "-C", top)

    def _tree(self, folder):
        top = self.at(folder, "tree")
        if not os.path.isdir(top):
            os.mkdir(top)
            quiet("tar", "-xf", self.tar, "-C", top)
        return top

    def list_cold(self, folder):
        """ls -lR of it, cold"""
        top = self._tree(folder)
        drop_caches()
        yield
        quiet("ls", "-lR", top)

    def grep_cold(self, folder):
        """grep -r through it, cold"""
        top = self._tree(folder)
        drop_caches()
        yield
        subprocess.run(["grep", "-rq", "no such text in there", top], check=False)

    def git(self, folder):
        """git init, add, commit of it"""
        top = self._tree(folder)
        shutil.rmtree(self.at(top, ".git"), ignore_errors=True)
        who = ["-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "gc.auto=0"]
        yield
        quiet("git", "init", "-q", cwd=top)
        quiet("git", "add", "-A", cwd=top)
        quiet("git", *who, "commit", "-q", "-m", "all", cwd=top)

    def remove_tree(self, folder):
        """rm -r of it"""
        top = self._tree(folder)
        yield
        quiet("rm", "-r", top)


WORKLOADS = [
    "write_sequential_1m", "write_sequential_4k", "read_sequential_1m_cold", "read_sequential_1m_warm",
    "read_sequential_4k_cold", "read_random_cold", "write_random", "write_random_synced", "append",
    "small_create", "small_read_cold", "small_read_warm", "small_remove", "untar", "list_cold", "grep_cold", "git",
    "remove_tree",
]


def measure(workload, folder):
    running = workload(folder)
    next(running)
    start = time.perf_counter()
    for _ in running:
        pass
    return time.perf_counter() - start


def table(results, systems, bench):
    others = [s for s in systems if s != "native"]
    print(f"\n{'':38}{'native':>10}" + "".join(f"{s:>12}{'':>8}" for s in others) + f"{'to gocryptfs':>14}")
    for name, times in results.items():
        middle = {s: statistics.median(times[s]) for s in systems}
        row = f"{getattr(bench, name).__doc__:38}{middle['native'] * 1000:>8.1f}ms"
        for s in others:
            row += f"{middle[s] * 1000:>10.1f}ms{middle[s] / middle['native']:>7.2f}x"
        if "gocryptfs" in middle and "envelopefs" in middle:
            row += f"{middle['envelopefs'] / middle['gocryptfs']:>13.2f}x"
        print(row)
    print("\nTimes are medians; x is the multiple of the native time (or gocryptfs's): lower is better.")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--binary", required=True)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--quick", action="store_true", help="an eighth of the work, 3 rounds")
    p.add_argument("--only", default="", help="workloads whose name holds this, or one of these: WORD,WORD")
    p.add_argument("--folder", help="where the temporary directories go: the file system to measure on")
    p.add_argument("--json", help="write all times here")
    a = p.parse_args()
    rounds = 3 if a.quick else a.rounds
    kinds = [Native, Envelopefs] + ([Gocryptfs] if shutil.which("gocryptfs") else [])
    if len(kinds) == 2:
        print("bench: gocryptfs is not installed (apt-get install gocryptfs); going on without", file=sys.stderr)
    if os.geteuid() != 0:
        print("bench: not root, so caches cannot be dropped: nothing is cold", file=sys.stderr)
    base = tempfile.mkdtemp(prefix="envelopefs-bench-", dir=a.folder)
    systems = []
    try:
        tar = os.path.join(base, "tree.tar")
        quiet("tar", "-cf", tar, "-C", "/usr", "include/linux" if a.quick else "include")
        for kind in kinds:
            systems.append(kind(base, os.path.abspath(a.binary)))
        bench = Bench(8 if a.quick else 1, tar)
        names = [w for w in WORKLOADS if any(word in w for word in a.only.split(","))]
        results = {w: {s.name: [] for s in systems} for w in names}
        for r in range(rounds):
            for w in names:
                for s in systems[r % len(systems):] + systems[:r % len(systems)]:
                    results[w][s.name].append(measure(getattr(bench, w), s.dir))
            print(f"bench: round {r + 1} of {rounds}", file=sys.stderr, flush=True)
        table(results, [s.name for s in systems], bench)
        if a.json:
            with open(a.json, "w", encoding="ascii") as f:
                json.dump(results, f, indent=1)
    finally:
        for s in systems:
            s.stop()
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
