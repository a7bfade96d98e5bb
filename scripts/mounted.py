"""A store mounted in a temporary folder, for the long tests of this directory."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile


class Mount:
    def __init__(self, binary, folder):
        self.binary = os.path.abspath(binary)
        self.backing, self.mnt = os.path.join(folder, "backing"), os.path.join(folder, "mnt")
        os.mkdir(self.backing)
        os.mkdir(self.mnt)
        self.run("init", self.backing, "--key", f"keyfile:{folder}/key")

    def run(self, *args, check=True):
        done = subprocess.run([self.binary, *args], capture_output=True, text=True, timeout=600)
        if check and done.returncode:
            raise SystemExit(f"{os.path.basename(sys.argv[0])}: {' '.join(args)}: exit {done.returncode}: {done.stderr}{done.stdout}")
        return done

    def mount(self):
        self.run("mount", self.backing, self.mnt)

    def kill(self):
        """SIGKILL to the process that has the volume lock open, then takes the dead mount away."""
        lock = os.path.join(os.path.realpath(self.backing), ".envelopefs", "lock")
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if any(os.readlink(f"/proc/{pid}/fd/{fd}") == lock for fd in os.listdir(f"/proc/{pid}/fd")):
                    os.kill(int(pid), signal.SIGKILL)
        self.detach()

    def detach(self):
        command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
        subprocess.run([*command, self.mnt], capture_output=True, check=False)


@contextlib.contextmanager
def temporary(binary, folder):
    """A new store, unmounted at the end; left where it is, for people to look at, if the test fails."""
    name = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    place = tempfile.mkdtemp(prefix=f"envelopefs-{name}-", dir=folder)
    mount = Mount(binary, place)
    try:
        yield mount
    except BaseException:
        mount.kill()
        print(f"{name}: the store is left in {place}", file=sys.stderr)
        raise
    mount.kill()
    shutil.rmtree(place, ignore_errors=True)
