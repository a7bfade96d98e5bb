#!/usr/bin/env python3
"""Makes a golden store: one that every later version must open. Run once for each released format, never again.

    tests/golden/make.py target/release/envelopefs tests/golden/v1
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile


def run(*args):
    subprocess.run(args, check=True, stdout=subprocess.DEVNULL)


def fill(top):
    files = {
        "empty": b"",
        "one-byte": b"1",
        "two-blocks": random.Random(1).randbytes(5000),
        "two-segments": random.Random(2).randbytes(140_000),
        "folder/inner/deep.txt": b"deep\n",
        "n" * 176: b"long name\n",
        "gr\u00fc\u00dfe": b"not ASCII\n",
    }
    for name, content in files.items():
        path = os.path.join(top, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(content)
    with open(os.path.join(top, "sparse"), "wb") as f:
        f.write(b"begin")
        f.seek(1_300_000)
        f.write(b"end")
    os.symlink("folder/inner", os.path.join(top, "link"))
    os.symlink("t" * 3500, os.path.join(top, "long-link"))
    os.mkdir(os.path.join(top, "folder", "empty-folder"))


def manifest(top):
    out = {}
    for folder, directories, files in os.walk(top):
        for name in directories + files:
            path = os.path.join(folder, name)
            if os.path.islink(path):
                entry = {"link": os.readlink(path)}
            elif os.path.isdir(path):
                entry = {"directory": True}
            else:
                with open(path, "rb") as f:
                    entry = {"size": os.path.getsize(path), "sha256": hashlib.file_digest(f, "sha256").hexdigest()}
            out[os.path.relpath(path, top)] = entry
    return dict(sorted(out.items()))


def main():
    binary, target = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
    if os.path.exists(target):
        sys.exit(f"{target} is there already: golden stores are never made again")
    store = os.path.join(target, "store")
    os.makedirs(store)
    with tempfile.TemporaryDirectory(prefix="envelopefs-golden-") as folder:
        # The keyring records the key's path, which should be nobody's.
        key, mnt = os.path.join(folder, "root.key"), os.path.join(folder, "mnt")
        os.mkdir(mnt)
        run(binary, "init", store, "--key", f"keyfile:{key}")
        for step in (fill, None):
            run(binary, "mount", store, mnt)
            try:
                if step:
                    step(mnt)
                    run(binary, "rotate", mnt, "--destroy-old")
                else:
                    entries = manifest(mnt)
            finally:
                run(binary, "unmount", mnt)
        run(binary, "rotate", store)
        shutil.copy(key, os.path.join(target, "root.key"))
    for leftover in ("pool", "rotation", "lock"):
        path = os.path.join(store, ".envelopefs", leftover)
        shutil.rmtree(path) if os.path.isdir(path) else os.path.exists(path) and os.unlink(path)
    with open(os.path.join(target, "manifest.json"), "w", encoding="utf-8") as f:
        json.dump(entries, f, indent=1, ensure_ascii=False)
        f.write("\n")


if __name__ == "__main__":
    main()
