"""Laws of a file that is written while the disk fills up or Ctrl-C comes: for real, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

OLD = b"what was there before"

CHILD = """
import resource, signal, sys
limit, path, code = int(sys.argv[1]), sys.argv[2], sys.argv[3]
exec(code)
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("ready", flush=True)
try:
    write(path)
except OSError as error:
    print("OSError", error.errno)
except KeyboardInterrupt:
    print("KeyboardInterrupt")
else:
    print("written")
"""


def law_a_full_disk_leaves_the_old_file(code: str, path: Path) -> None:
    """No more than 100 kB can be written.

    Args:
        code: Defines `write(path)`, which writes more than that.
        path: In a folder of its own.
    """
    path.write_bytes(OLD)
    said, _ = _child(100_000, path, code).communicate(timeout=60)
    assert said.split() == ["ready", "OSError", "27"]  # EFBIG: the system refuses to write on, as when it is full
    _check_only_the_old_file_is_there(path)


def law_ctrl_c_leaves_the_old_file(code: str, path: Path) -> None:
    """SIGINT comes as soon as the folder changes.

    Args:
        code: Defines `write(path)`, which writes so much (100 MB) that it takes a while.
        path: In a folder of its own.
    """
    for _ in range(5):  # a busy machine may give the signal too late
        path.write_bytes(OLD)
        said = _interrupted(path, code)
        if said == "KeyboardInterrupt":
            _check_only_the_old_file_is_there(path)
            return
        assert said == "written"
        assert os.listdir(path.parent) == [path.name]
    pytest.fail("the signal came too late five times")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 64 kB; skips the test where it can't be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk can't be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def _check_only_the_old_file_is_there(path: Path) -> None:
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == OLD


def _child(limit: int, path: Path, code: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(limit), str(path), code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def _interrupted(path: Path, code: str) -> str:
    process = _child(0, path, code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    while process.poll() is None and len(os.listdir(path.parent)) == 1 and path.stat().st_size == len(OLD):
        time.sleep(0.0005)
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=60)[0].strip()
