#!/usr/bin/env python3
"""Measures a rotation: its speed beside what the disk gives, its memory, and what it costs those who use the store.

    rotation_bench.py --binary target/release/envelopefs [--files 20000] [--dir DIR] [--rounds 3] [--seconds 8]
                      [--only speed,cost] [--no-default-pace] [--json FILE]

Speed: for each round a whole rotation unmounted and mounted, at full speed and at the default pace, each next to the
ceiling: a program without keys that does the same writes with the same barriers to the very same files (the bytes that
are there already), and one that reads each header with O_DIRECT. A rotation is seen from outside, by the state in its
journal. "cpu" is the process's own time; what the kernel's threads spend on writing back is not in it.

Cost: a load runs idle, beside a rotation at the default pace, and beside one at full speed, in an order that changes
from round to round; each ratio is to the idle phase of its own round. Loads: files (write 4 KiB and fdatasync, open and
read, create), SQLite with a write-ahead log and with a rollback journal, and fio if it is installed.

With two --binary the first is compared with the second. Ratios count: absolute figures depend on what else the machine
does. A million files take about 9 GB in DIR and some ten minutes to make.
"""

import argparse
import ctypes
import json
import mmap
import os
import pickle
import random
import shutil
import signal
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time

from mounted import Mount

LIBC = ctypes.CDLL(None, use_errno=True)
SYNC_FILE_RANGE_WRITE = 2
BATCH, PER_DIRECTORY, SLOT = 256, 1000, 1024
SWEEPING, VERIFYING = 2, 3
CPUS = os.cpu_count() or 2
READERS = 16


def say(text):
    print(f"rotation_bench: {text}", file=sys.stderr, flush=True)


def in_processes(n, work):
    """Runs work(k) for k below n in n processes at once; returns the seconds they took and what they returned."""
    began, running = time.monotonic(), []
    for k in range(n):
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(r)
                with os.fdopen(w, "wb") as out:
                    pickle.dump(work(k), out)
                code = 0
            finally:
                os._exit(code)
        os.close(w)
        running.append((pid, r))
    results = []
    for pid, r in running:
        with os.fdopen(r, "rb") as answer:
            text = answer.read()
        if os.waitpid(pid, 0)[1] != 0:
            raise SystemExit("rotation_bench: a child failed")
        results.append(pickle.loads(text))
    return time.monotonic() - began, results


class Store(Mount):
    """The store that is measured; `binary` may change while it is not mounted."""

    def unmount(self):
        self.run("unmount", self.mnt)

    def make_files(self, count, size):
        """Files of `size` bytes, many to a directory, by one process for each processor."""
        content = random.Random(1).randbytes(size)

        def some(k):
            for d in range(k, -(-count // PER_DIRECTORY), CPUS):
                top = os.path.join(self.mnt, f"d{d:05}")
                os.mkdir(top)
                for i in range(min(PER_DIRECTORY, count - d * PER_DIRECTORY)):
                    fd = os.open(os.path.join(top, f"f{i:03}"), os.O_WRONLY | os.O_CREAT, 0o644)
                    os.write(fd, content)
                    os.close(fd)

        seconds, _ = in_processes(CPUS, some)
        say(f"made {count} files of {size} bytes, {count / seconds:.0f} a second")

    def headers(self):
        """Every backing file with a header, in the order of the walk."""
        found = []
        for top, dirs, names in os.walk(self.backing):
            dirs[:] = sorted(d for d in dirs if d != ".envelopefs")
            paths = (os.path.join(top, n) for n in sorted(names) if not n.startswith(".envelopefs"))
            found.extend(p for p in paths if os.stat(p).st_size > 0)
        return found

    def daemon(self):
        status = json.loads(self.run("status", self.mnt, "--json").stdout)
        return status["daemon"]["pid"]

    def _journal(self):
        """Sequence number and state of the newest record; FORMAT: src/rotation/record.rs."""
        try:
            with open(os.path.join(self.backing, ".envelopefs", "rotation", "journal"), "rb") as f:
                text = f.read()
        except FileNotFoundError:
            return 0, 0
        records = [text[i:i + 4096] for i in (0, 4096) if len(text) >= i + 4096]
        return max(((struct.unpack_from("<Q", r, 16)[0], r[10]) for r in records), default=(0, 0))

    def rotate(self, mounted, full_speed):
        """One whole rotation: seconds of sweep and scan, CPU seconds and memory of the process that does it."""
        pid = self.daemon() if mounted else None
        before = (cpu_of(pid), memory_of(pid, reset=True)) if mounted else None
        command = [self.binary, "rotate", self.mnt if mounted else self.backing, "--json"]
        command += ["--full-speed"] if full_speed else []
        last, entered, peak, looks = self._journal()[0], {}, 0, 0
        with tempfile.TemporaryFile("w+") as out:
            p = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
            while True:
                ended, status, usage = os.wait4(p.pid, os.WNOHANG)
                sequence, state = self._journal()
                if sequence > last and state not in entered:
                    entered[state] = time.monotonic()
                if ended:
                    break
                looks += 1
                # Not the resource usage at the end: the kernel counts what this program had before it became that one.
                if not mounted and looks % 20 == 0:
                    peak = memory_of(p.pid)["VmHWM"] or peak
                time.sleep(0.003)
            p.returncode = os.waitstatus_to_exitcode(status)
            end = time.monotonic()
            out.seek(0)
            text = out.read()
        report = json.loads(text) if text.strip() else {}
        if p.returncode or report.get("outcome") != "complete" or VERIFYING not in entered:
            raise SystemExit(f"rotation_bench: {' '.join(command)}: exit {p.returncode}: {text[:500]}")
        if report["passes"] != 2:
            say(f"note: {report['passes']} passes instead of 2")
        files, begin = report["verify"]["scanned"], entered.get(SWEEPING, entered[VERIFYING])
        over = min((t for s, t in entered.items() if s not in (1, SWEEPING, VERIFYING)), default=end)
        result = {
            "sweep": report["sweep"]["scanned"] / max(entered[VERIFYING] - begin, 1e-3),
            "verify": files / max(over - entered[VERIFYING], 1e-3),
            "seconds": end - begin,
            "both": files / (end - begin),
        }
        if mounted:
            result["cpu_us"] = (cpu_of(pid) - before[0]) / files * 1e6
            after = memory_of(pid)
            result.update(rss_before=before[1]["VmRSS"], rss_after=after["VmRSS"], rss_peak=after["VmHWM"])
        else:
            result.update(cpu_us=(usage.ru_utime + usage.ru_stime) / files * 1e6, rss_peak=peak)
        return result


def cpu_of(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_of(pid, reset=False):
    """MiB; `reset` begins the peak anew."""
    if reset:
        try:
            with open(f"/proc/{pid}/clear_refs", "w", encoding="ascii") as f:
                f.write("5")
        except OSError:
            say("cannot reset the daemon's peak memory (not root): it is since the mount")
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as f:
        lines = dict(line.split(":", 1) for line in f)
    # One that is ending has no memory any more.
    return {k: int(lines.get(k, "0").split()[0]) / 1024 for k in ("VmRSS", "VmHWM")}


def ceiling_writes(paths, set_off):
    """What a rotation writes, by the same number of workers, without keys: each file's own slots over themselves."""

    def some(k):
        for at in range(k * BATCH, len(paths), CPUS * BATCH):
            begun = []
            for path in paths[at:at + BATCH]:
                fd = os.open(path, os.O_RDWR)
                begun.append((fd, os.pread(fd, 2 * SLOT, 0)))
                write_slot(fd, begun[-1][1][SLOT:], SLOT)
            LIBC.syncfs(begun[0][0])
            for fd, slots in begun:
                write_slot(fd, slots[:SLOT], 0)
                os.close(fd)

    def write_slot(fd, text, at):
        stat = os.fstat(fd)
        os.pwrite(fd, text, at)
        os.utime(fd, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        if set_off:
            LIBC.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(4096), SYNC_FILE_RANGE_WRITE)

    os.sync()
    began = time.monotonic()
    in_processes(CPUS, some)
    os.sync()
    return len(paths) / (time.monotonic() - began)


def ceiling_reads(paths):
    """One O_DIRECT read of the first page of each file, as many at once as a scan has workers."""

    def some(k):
        page = mmap.mmap(-1, 4096)
        for path in paths[k::READERS]:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            os.preadv(fd, [page], 0)
            os.close(fd)

    seconds, _ = in_processes(READERS, some)
    return len(paths) / seconds


def speed(store, binaries, rounds, paces):
    """Lists of figures by what was measured."""
    results = {}

    def note(name, figures):
        results.setdefault(name, []).append(figures)
        say(f"{name}: " + ", ".join(f"{k} {v:.0f}" for k, v in figures.items()))

    paths = store.headers()
    for path in paths:
        with open(path, "rb", buffering=0) as f:
            f.read(2 * SLOT)
    for r in range(rounds):
        try:
            reads = ceiling_reads(paths)
        except OSError as e:
            say(f"no O_DIRECT here ({e})")
            reads = 0
        note("ceiling", {"sweep": ceiling_writes(paths, False), "verify": reads})
        note("ceiling, pages set off", {"sweep": ceiling_writes(paths, True), "verify": reads})
        for b in binaries[r % len(binaries):] + binaries[:r % len(binaries)]:
            store.binary = b
            label = f"{binaries.index(b) + 1}: " if len(binaries) > 1 else ""
            for full in paces:
                note(f"{label}unmounted, {pace(full)}", store.rotate(False, full))
            store.mount()
            for full in paces:
                note(f"{label}mounted, {pace(full)}", store.rotate(True, full))
            store.unmount()
    return results


def pace(full):
    return "full speed" if full else "default pace"


def show_speed(results):
    def middle(name, key):
        values = [f[key] for f in results[name] if key in f]
        return statistics.median(values) if values else None

    def number(v, digits=0):
        return f"{v:>9.{digits}f}" if v is not None else f"{'':>9}"

    print(f"\nHeaders a second, medians; x: of the ceiling of the same round\n{'':34}{'sweep':>9}{'x':>6}{'verify':>9}"
          f"{'x':>6}{'both':>9}{'cpu us':>9}{'RSS MiB':>9}{'after':>9}{'peak':>9}")
    ceiling = results["ceiling"]
    for name in results:
        row = f"{name:34}"
        for key in ("sweep", "verify"):
            parts = [f[key] / c[key] for f, c in zip(results[name], ceiling) if c[key]]
            row += number(middle(name, key)) + (f"{statistics.median(parts):>6.2f}" if parts else f"{'':>6}")
        row += "".join(number(middle(name, k)) for k in ("both", "cpu_us"))
        print(row + "".join(number(middle(name, k), 1) for k in ("rss_before", "rss_after", "rss_peak")))


class Files:
    """Write 4 KiB and fdatasync, open and read a file, create one; all in turn."""

    name = "files"

    def __init__(self, folder, mnt):
        self.folder, self.rng, self.made = folder, random.Random(os.getpid()), 0
        self.block = self.rng.randbytes(4096)
        self.fd = os.open(os.path.join(folder, "big"), os.O_RDWR | os.O_CREAT)
        if os.fstat(self.fd).st_size == 0:
            os.write(self.fd, bytes(32 << 20))
            os.fsync(self.fd)
        top = os.path.join(mnt, "d00000")
        self.there = [os.path.join(top, n) for n in os.listdir(top)]

    def write_and_sync(self):
        os.pwrite(self.fd, self.block, self.rng.randrange(8192) * 4096)
        os.fdatasync(self.fd)

    def open_and_read(self):
        fd = os.open(self.rng.choice(self.there), os.O_RDONLY)
        os.pread(fd, 4096, 0)
        os.close(fd)

    def create(self):
        self.made += 1
        path = os.path.join(self.folder, f"new-{os.getpid()}-{self.made % 500}")
        if self.made > 500:
            os.unlink(path)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))

    def steps(self):
        return [self.write_and_sync, self.open_and_read, self.create]


class Sqlite:
    """One row and one commit at a time."""

    def __init__(self, folder, _mnt):
        self.rng = random.Random(os.getpid())
        self.db = sqlite3.connect(os.path.join(folder, f"{self.name}.db"), isolation_level=None)
        self.db.execute(f"PRAGMA journal_mode={self.mode}")
        self.db.execute("PRAGMA synchronous=FULL")
        self.db.execute("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, text BLOB)")

    def commit(self):
        row = (self.rng.randrange(100_000), self.rng.randbytes(200))
        self.db.execute("INSERT OR REPLACE INTO t VALUES (?, ?)", row)

    def steps(self):
        return [self.commit]


class SqliteWal(Sqlite):
    name, mode = "sqlite-wal", "WAL"


class SqliteRollback(Sqlite):
    name, mode = "sqlite-rollback", "DELETE"


def run_load(load, folder, mnt, seconds):
    """All calls of one load in a process of its own: (kind, when it began, how long it took)."""

    def work(_):
        steps, calls = load(folder, mnt).steps(), []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for step in steps:
                began = time.monotonic()
                step()
                calls.append((step.__name__, began, time.monotonic() - began))
        return calls

    return in_processes(1, work)[1][0]


def run_fio(folder, seconds):
    """fio's own figures, as those of the other loads."""
    command = ["fio", "--name=fio", f"--directory={folder}", "--size=32m", "--rw=randwrite", "--bs=4k", "--fdatasync=1",
               "--ioengine=psync", "--time_based", f"--runtime={seconds}", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    percentile = job["sync"]["lat_ns"]["percentile"]
    figures = {"p50": percentile["50.000000"] / 1e9, "p99": percentile["99.000000"] / 1e9}
    return {"fdatasync": {"rate": job["write"]["iops"], **figures}}


class Rotating:
    """Rotations of the mounted store, one after the other, in a process of their own."""

    def __init__(self, store, full_speed):
        self.command = [store.binary, "rotate", store.mnt] + (["--full-speed"] if full_speed else [])

    def __enter__(self):
        r, w = os.pipe()
        self.pid, self.answer = os.fork(), r
        if self.pid == 0:
            os.close(r)
            self._rotate(w)
        os.close(w)
        time.sleep(0.3)
        return self

    def _rotate(self, out):
        over, intervals = [], []
        signal.signal(signal.SIGTERM, lambda *_: over.append(True))
        while not over:
            began = time.monotonic()
            p = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while p.poll() is None and not over:
                time.sleep(0.005)
            intervals.append((began, time.monotonic()))
            # A client that ends cancels its rotation.
            p.kill()
            p.wait()
        with os.fdopen(out, "wb") as f:
            pickle.dump(intervals, f)
        os._exit(0)

    def __exit__(self, *_):
        os.kill(self.pid, signal.SIGTERM)
        with os.fdopen(self.answer, "rb") as f:
            self.intervals = pickle.load(f)
        os.waitpid(self.pid, 0)
        time.sleep(0.5)


def phase(store, load, folder, seconds, full_speed):
    """Rate, p50 and p99 by kind of call, of the calls that began while a rotation ran (or none, if None)."""
    if full_speed is None:
        calls, running = load(folder, seconds), None
    else:
        with Rotating(store, full_speed) as running:
            calls = load(folder, seconds)
    if isinstance(calls, dict):
        return calls
    during = (lambda t: True) if running is None else (lambda t: any(a <= t <= b for a, b in running.intervals))
    kinds = {}
    for kind, began, took in calls:
        if during(began):
            kinds.setdefault(kind, []).append(took)
    return {kind: figures_of(took) for kind, took in kinds.items()}


def figures_of(took):
    took.sort()
    return {"rate": len(took) / sum(took), "p50": took[len(took) // 2], "p99": took[int(len(took) * 0.99)]}


def cost(store, binaries, rounds, seconds, paces):
    """Binary → (load, kind, pace) → figures of each round, beside those of the idle phase of the same round."""
    loads = [(k.name, lambda folder, s, k=k: run_load(k, folder, store.mnt, s)) for k in (Files, SqliteWal, SqliteRollback)]
    if shutil.which("fio"):
        loads.append(("fio", run_fio))
    else:
        say("fio is not installed (apt-get install fio); going on without it")
    folder, phases = os.path.join(store.mnt, "load"), [None, *paces]
    results = {b: {} for b in binaries}
    for r in range(rounds):
        for b in binaries[r % len(binaries):] + binaries[:r % len(binaries)]:
            store.binary = b
            store.mount()
            os.makedirs(folder, exist_ok=True)
            for name, load in loads:
                load(folder, 1)
                order = phases[r % len(phases):] + phases[:r % len(phases)]
                found = {p: phase(store, load, folder, seconds, p) for p in order}
                for p in paces:
                    for kind in sorted(found[None].keys() & found[p].keys()):
                        results[b].setdefault((name, kind, pace(p)), []).append((found[None][kind], found[p][kind]))
            store.unmount()
        say(f"cost: round {r + 1} of {rounds}")
    return results


def show_cost(results):
    print(f"Beside a rotation, as a multiple of idle; medians of the rounds (least to most)\n{'':46}{'rate':>6}{'p50':>6}"
          f"{'p99':>6}{'':>14}{'idle p99':>11}")
    for (name, kind, at), rounds in results.items():
        ratios = {k: [busy[k] / idle[k] for idle, busy in rounds] for k in ("rate", "p50", "p99")}
        middle = {k: statistics.median(v) for k, v in ratios.items()}
        p99 = statistics.median(idle["p99"] for idle, _ in rounds) * 1000
        spread = f"({min(ratios['p99']):.1f} to {max(ratios['p99']):.1f})"
        print(f"{name + ', ' + kind.replace('_', ' ') + ', ' + at:46}{middle['rate']:>6.2f}{middle['p50']:>6.2f}"
              f"{middle['p99']:>6.2f}{spread:>14}{p99:>9.2f}ms")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--binary", required=True, action="append", help="twice: compare the first with the second")
    p.add_argument("--files", type=int, default=20_000)
    p.add_argument("--size", type=int, default=100, help="bytes of each file")
    p.add_argument("--dir", help="where the temporary directory goes: the file system to measure on")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=8, help="of each phase of a load")
    p.add_argument("--only", default="speed,cost")
    p.add_argument("--no-default-pace", action="store_true", help="full speed only")
    p.add_argument("--json", help="write all figures here")
    a = p.parse_args()
    binaries = [os.path.abspath(b) for b in a.binary]
    paces = [True] if a.no_default_pace else [True, False]
    base = tempfile.mkdtemp(prefix="envelopefs-rotation-bench-", dir=a.dir)
    figures = {}
    store = Store(binaries[0], base)
    try:
        store.mount()
        store.make_files(a.files, a.size)
        store.unmount()
        if "speed" in a.only:
            figures["speed"] = speed(store, binaries, a.rounds, paces)
            show_speed(figures["speed"])
        if "cost" in a.only:
            found = cost(store, binaries, a.rounds, a.seconds, paces)
            for n, b in enumerate(binaries, 1):
                print(f"\n{n}: {b}" if len(binaries) > 1 else "")
                show_cost(found[b])
                figures[f"cost {n}"] = {", ".join(k): v for k, v in found[b].items()}
        if a.json:
            with open(a.json, "w", encoding="ascii") as f:
                json.dump(figures, f, indent=1)
    finally:
        store.kill()
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
