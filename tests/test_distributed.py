"""Penalties and ties over several machines: real processes, started once, that hold the laws of `distributed/`."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.worker import checks

TESTS = Path(__file__).parent
NAMES = [(world, name) for world in (2, 4) for name in checks(world, TESTS)]
LAWS = [case for case in NAMES if not case[1].startswith("broken")]
BROKEN = [case for case in NAMES if case[1].startswith("broken")]

_TIMEOUT = 240
"""Seconds, on a machine that is busy; a message that never comes is given up after 30."""


def _run(world: int, folder: Path) -> None:
    """Start the processes; none outlives this call. How they end says little: gloo may abort at the very exit."""
    paths = os.pathsep.join(filter(None, [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
        "-m",
        "distributed.worker",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command, str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(_TIMEOUT)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[str]]]:
    """What every rank found of every law: found once, also if pytest itself runs in several processes."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    found: dict[int, dict[str, list[str]]] = {}
    for world in (2, 4):
        folder = base / f"distributed-{world}"
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "log").exists():
                _run(world, folder)
        verdicts = folder / "verdicts.json"
        found[world] = json.loads(verdicts.read_text()) if verdicts.exists() else {}
        missing = [name for name in checks(world, TESTS) if name not in found[world]]
        if missing:
            pytest.fail(f"no verdict on {missing[0]}: {(folder / 'log').read_text()[-6000:]}")
    return found


@pytest.mark.parametrize(("world", "name"), LAWS)
def test_it_holds_on_every_rank(world: int, name: str, results: dict[int, dict[str, list[str]]]) -> None:
    assert results[world][name] == ["held"] * world


@pytest.mark.parametrize(("world", "name"), BROKEN)
def test_what_is_wrong_fails_the_law(world: int, name: str, results: dict[int, dict[str, list[str]]]) -> None:
    said = results[world][name]
    assert any(verdict.startswith("failed") for verdict in said), said
    assert all(verdict == "held" or verdict.startswith("failed") for verdict in said), said
