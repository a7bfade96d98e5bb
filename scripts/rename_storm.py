#!/usr/bin/env python3
"""Renames, links, makes and removes files and directories all the time, in several processes, while the store they
lie in is rotated again and again.

Checked after every rotation: it ended, completely, although nothing stood still. Checked at the end, without the
program: every slot of every backing file names the last KEK; and through the mount: every file holds what was written.

    rename_storm.py --binary target/release/envelopefs [--seconds 180] [--files 2000] [--seed N] [--folder DIR]
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import time

from mounted import temporary

MAGIC = b"ENVLPFS1"
SLOT = 1024
TOPS, SUBS = 6, 4


def content(name):
    return random.Random(name).randbytes(len(name) * 37)


def make(folder, name):
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=folder)
    with os.fdopen(fd, "wb") as f:
        f.write(content(name))


def move_files(top, number, seed, files, stop, done):
    """Owns its files, and works by descriptors of directories, which somebody else moves meanwhile."""
    chance = random.Random(seed)
    folders = [os.open(os.path.join(top, f"t{t}", f"s{t}-{s}"), os.O_RDONLY) for t in range(TOPS) for s in range(SUBS)]
    place, moves, born = {}, 0, files
    for n in range(files):
        name = f"{number}-{n}"
        place[name] = chance.choice(folders)
        make(place[name], name)
    done.put((number, None, 0))
    while not stop.is_set():
        names = list(place)
        chance.shuffle(names)
        for name in names:
            to, what = chance.choice(folders), chance.random()
            if what < 0.9 and to != place[name]:
                os.rename(name, name, src_dir_fd=place[name], dst_dir_fd=to)
            elif what < 0.95 and to != place[name]:
                os.link(name, name, src_dir_fd=place[name], dst_dir_fd=to)
                os.unlink(name, dir_fd=place[name])
            elif what > 0.98:
                os.unlink(name, dir_fd=place.pop(name))
                name, born = f"{number}-{born}", born + 1
                make(to, name)
            else:
                continue
            place[name] = to
            moves += 1
            if stop.is_set():
                break
    done.put((number, sorted(place), moves))


def move_directories(top, seed, stop, done):
    chance = random.Random(seed)
    place, moves = {f"s{t}-{s}": t for t in range(TOPS) for s in range(SUBS)}, 0
    while not stop.is_set():
        name, to = chance.choice(list(place)), chance.randrange(TOPS)
        os.rename(os.path.join(top, f"t{place[name]}", name), os.path.join(top, f"t{to}", name))
        place[name], moves = to, moves + 1
    done.put(("directories", None, moves))


def keks_below(backing):
    """How many valid-looking slots name each KEK (docs/FORMAT.md: 16 bytes at offset 128)."""
    found = {}
    for at, _, names in os.walk(backing):
        for name in names:
            with open(os.path.join(at, name), "rb") as f:
                head = f.read(2 * SLOT)
            for slot in (head[:SLOT], head[SLOT:]):
                if slot.startswith(MAGIC):
                    kek = slot[128:144].hex()
                    found[kek] = found.get(kek, 0) + 1
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--binary", required=True)
    p.add_argument("--seconds", type=float, default=180)
    p.add_argument("--files", type=int, default=2000)
    p.add_argument("--movers", type=int, default=3)
    p.add_argument("--seed", type=int, default=int(time.time()))
    p.add_argument("--folder", help="where to make the temporary store")
    a = p.parse_args()
    print(f"rename_storm: seed {a.seed}", flush=True)
    with temporary(a.binary, a.folder) as mount:
        storm(mount, a)


def storm(mount, a):
    stop, done = multiprocessing.Event(), multiprocessing.Queue()
    mount.mount()
    for t in range(TOPS):
        for s in range(SUBS):
            os.makedirs(os.path.join(mount.mnt, f"t{t}", f"s{t}-{s}"))
    movers = []

    def start(target, *arguments):
        movers.append(multiprocessing.Process(target=target, args=(mount.mnt, *arguments, stop, done), daemon=True))
        movers[-1].start()

    for n in range(a.movers):
        start(move_files, n, f"{a.seed}/{n}", a.files // a.movers)
    for _ in range(a.movers):
        done.get(timeout=600)
    start(move_directories, f"{a.seed}/d")
    began, runs, target = time.monotonic(), 0, None
    while time.monotonic() - began < a.seconds:
        pace = ["--full-speed"] if runs % 2 else []
        took = time.monotonic()
        report = json.loads(mount.run("rotate", mount.mnt, "--json", *pace).stdout)
        if report["outcome"] != "complete" or report["verify"]["failed"]:
            sys.exit(f"rename_storm: {report}")
        if not all(m.is_alive() for m in movers):
            sys.exit("rename_storm: a mover died")
        runs, target = runs + 1, report["target"]
        print(
            f"rename_storm: rotation {runs}{' at full speed' if pace else ''}: {time.monotonic() - took:.1f} s, "
            f"{report['passes']} passes, {report['verify']['scanned']} looked at in the last", flush=True)
    stop.set()
    moves, wanted, problems = 0, set(), []
    for _ in movers:
        _, names, n = done.get(timeout=600)
        moves += n
        wanted.update(names or [])
    for at, _, names in os.walk(mount.mnt):
        for name in names:
            wanted.discard(name)
            with open(os.path.join(at, name), "rb") as f:
                if f.read() != content(name):
                    problems.append(f"{name}: not what was written")
    problems += [f"{name}: gone" for name in wanted]
    for m in movers:
        m.join(60)
    mount.run("unmount", mount.mnt)
    left = keks_below(mount.backing)
    if set(left) != {target}:
        problems.append(f"slots by KEK: {left}, the last rotation's is {target}")
    if problems:
        sys.exit("rename_storm: " + "\n  ".join(problems[:20]))
    print(mount.run("check", mount.backing, "--deep").stdout.strip())
    print(f"rename_storm: {runs} rotations, all complete, under {moves} moves in {time.monotonic() - began:.0f} s; "
          f"{left[target]} slots, all under the last KEK")


if __name__ == "__main__":
    main()
