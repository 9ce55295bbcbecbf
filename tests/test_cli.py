"""The command line: it says what it does, its JSON is JSON, and it ends with one line and the right status."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import tying.cli
from made_up_result import BARE, example
from tying import store
from tying.cli import app
from tying.compress import load_task
from tying.errors import FileError
from tying.inspect import inspect
from tying.nn import TiedLinear

COMMANDS = ("compress", "explain", "inspect", "measure", "report")

TASK = '''
"""Which of three corners a point in 12 dimensions is near to; half of the dimensions say nothing."""
import torch
from torch import nn
from torch.nn import functional

name = "corners"


def _data(split):
    generator = torch.Generator().manual_seed({"train": 0, "validation": 1, "test": 2}[split])
    y = torch.arange(120) % 3
    return 0.5 * torch.randn(120, 12, generator=generator) + functional.one_hot(y % 3, 12), y


def model():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))


def fit(model, *, epochs, on_step, on_epoch):
    x, y = _data("train")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(120).split(30):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            on_step(optimizer)
        on_epoch(epoch)
    print("the task talks")


def evaluate(model, split):
    x, y = _data(split)
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).double().mean().item()


def example_inputs():
    return _data("train")[0][:4]
'''


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "corners.py"
    path.write_text(TASK, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compressed(task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("compressed") / "made"
    return out, run("compress", task, "--ratio", 3, "--epochs", 3, "--seed", 1, "--out", out, "--json")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def check_ends_well(result: Result, status: int, said: str) -> None:
    """The law of failure: this status, one line that says it, no traceback, nothing on standard output."""
    assert result.exit_code == status
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert not result.stdout


@pytest.mark.parametrize("command", [*COMMANDS, None])
def test_help_says_what_it_does_with_examples(command: str | None) -> None:
    result = run(*([command] if command else []), "--help")
    assert result.exit_code == 0
    assert f"tying {command or 'compress'}" in result.stdout
    for option in ("--json",) if command else COMMANDS:
        assert option in result.stdout


def test_the_installed_command_answers() -> None:
    command = Path(sys.executable).with_name("tying")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("tying ")
    assert not done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compress", "--ratio", "3", "--bytes", "100"), "--ratio and --bytes"),
        (("compress", "--ratio", "many"), "'--ratio': Input should be a valid number"),
        (("compress", "--what"), "--what"),
        (("inspect",), "FILE"),
        (("report",), "RESULT"),
        (("explain",), "MODEL"),
        (("explain", "corners.py", "--shifts", "-1"), "'--shifts'"),
        (("measure",), "FILE"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_usage_errors_end_with_2(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert not result.stdout


@pytest.mark.parametrize("flag", [(), ("--json",)])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compress", "none.py"), "none.py: expected a Python file"),
        (("compress", "empty.py"), "evaluate(model, split)"),
        (("compress", "wrong.py"), "SyntaxError"),
        (("compress", "corners.py", "--ratio", "0.5"), "ratio: expected"),
        (("compress", "corners.py", "--out", "file/folder"), "file"),
        (("inspect", "none.safetensors"), "none.safetensors: expected a checkpoint"),
        (("inspect", "file"), "file: expected a .safetensors file"),
        (("inspect", "w.safetensors", "--support", "2"), "support: expected"),
        (("measure", "none.safetensors"), "none.safetensors: expected"),
        (("measure", "w.safetensors"), "w.safetensors: expected a file that tying.save wrote"),
        (("measure", "w.safetensors", "--task", "none.py"), "none.py: expected"),
        (("explain", "none.py"), "none.py: expected a Python file"),
        (("explain", "empty.py"), "model() -> nn.Module"),
        (("explain", "wrong.py"), "SyntaxError"),
        (("explain", "corners.py", "--out", "picture.jpg"), "path: expected a name that ends with .png"),
        (("explain", "corners.py", "--out", "none/picture.png"), "path: expected a place"),
        (("report", "none"), "none: expected the result.json"),
        (("report", "."), "result.json: expected"),
        (("report", "file"), "file: result: expected JSON"),
        (("report", "bare.json", "--out", "none/page.html"), "path: expected a place"),
    ],
)
def test_errors_end_with_one_line_and_1(
    arguments: tuple[str, ...],
    said: str,
    flag: tuple[str, ...],
    task: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corners.py").write_bytes(task.read_bytes())
    (tmp_path / "empty.py").touch()
    (tmp_path / "wrong.py").write_text("def", encoding="utf-8")
    (tmp_path / "file").write_text("this is no such file", encoding="utf-8")
    save_file({"w": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    BARE.save(tmp_path / "bare.json")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    check_ends_well(run(*arguments, *flag), 1, said)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def _raising(error: BaseException, say: Callable[[], None]) -> typer.Typer:
    twin = typer.Typer(pretty_exceptions_enable=False)

    @twin.command()
    def command() -> None:
        say()
        raise error

    return twin


@pytest.mark.parametrize(
    ("error", "say"),
    [
        (FileError("file: expected one"), lambda: None),
        (typer.Exit(1), lambda: typer.echo("error: file: expected one")),
        (typer.Exit(1), lambda: typer.echo("error: file: expected one\nand more", err=True)),
        (typer.Exit(2), lambda: typer.echo("error: file: expected one", err=True)),
    ],
    ids=["traceback", "on standard output", "two lines", "wrong status"],
)
def test_a_bad_end_is_caught(error: BaseException, say: Callable[[], None]) -> None:
    result = CliRunner().invoke(_raising(error, say), [])
    with pytest.raises(AssertionError):
        check_ends_well(result, 1, "file: expected one")


def test_inspect_prints_the_table_or_the_json_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]])}, path)
    assert run("inspect", path).stdout == f"{inspect(path)}\n"
    result = run("inspect", path, "--tolerance", 0.2, "--json")
    assert json.loads(result.stdout) == json.loads(inspect(path, tolerance=0.2).to_json())
    assert not result.stderr


def test_inspect_says_what_several_files_share(tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for file in files:
        save_file({"w": weight, file.stem: torch.randn(3)}, file)
    assert run("inspect", *files).stdout == f"{inspect(*files)}\n"
    result = run("inspect", *files, "--tolerance", 0.2, "--json")
    assert json.loads(result.stdout) == json.loads(inspect(*files, tolerance=0.2).to_json())
    assert json.loads(result.stdout)["totals"]["saved"] == 4 * 6 * 4
    assert "none.pt: expected a checkpoint" in run("inspect", files[0], "none.pt").stderr
    assert not result.stderr


def test_report_draws_from_a_file_or_its_folder(tmp_path: Path) -> None:
    example().save(tmp_path / "result.json")
    result = run("report", tmp_path)
    assert (result.exit_code, result.stdout) == (0, f"page: {tmp_path / 'report.html'}\n")
    result = run("report", tmp_path / "result.json", "--out", tmp_path / "page.html", "--json")
    assert json.loads(result.stdout) == {"page": str(tmp_path / "page.html")}
    assert (tmp_path / "page.html").read_bytes() == (tmp_path / "report.html").read_bytes()


def test_measure_asks_the_task(task: Path, tmp_path: Path) -> None:
    small = nn.Sequential(TiedLinear([0, 0, 1, 1, 2, 2] + [-1] * 6, 16), nn.ReLU(), nn.Linear(16, 3))
    store.save(small, tmp_path / "small.safetensors")
    read = json.loads(run("measure", tmp_path / "small.safetensors", "--task", task, "--json").stdout)
    assert read["model"]["accuracy"] == load_task(task).evaluate(small, "test")
    assert read["model"]["bytes"] == (tmp_path / "small.safetensors").stat().st_size
    assert read["like"]["parameters"] == 12 * 16 + 16 + 16 * 3 + 3
    assert read["like"]["accuracy"] is None, "the dense network is not trained"


def test_measure_judges_the_network_as_it_is_used(task: Path, tmp_path: Path) -> None:
    """In evaluation mode, whether the task sees to that or not; and only an accuracy is one."""
    text = task.read_text(encoding="utf-8").replace("nn.ReLU()", "nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.9)")
    careless = tmp_path / "careless.py"
    careless.write_text(text.replace("model.eval()(x)", "model(x)"), encoding="utf-8")
    small = load_task(careless).model()
    store.save(small, tmp_path / "small.safetensors")
    read = json.loads(run("measure", tmp_path / "small.safetensors", "--task", careless, "--json").stdout)
    assert read["model"]["accuracy"] == load_task(careless).evaluate(small.eval(), "test")
    careless.write_text(text.replace(".mean().item()", ".sum().item()"), encoding="utf-8")
    check_ends_well(run("measure", tmp_path / "small.safetensors", "--task", careless), 1, "evaluate: expected")


def imported(source: str) -> set[str]:
    """What a module takes from the package: `name` for a public name, `tying.room.name` for another."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tying":
            prefix = "" if node.module == "tying" else f"{node.module}."
            found |= {prefix + alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "tying"}
    return found


def test_the_command_line_knows_public_names_only() -> None:
    rooms = {"tying.compress": tying.compress, "tying.explain": tying.explain}
    assert all(callable(verb) for verb in rooms.values())  # the names of the rooms are those of their verbs
    inside_rooms = {f"{room}.{name}" for room in rooms for name in sys.modules[room].__all__}
    assert imported(Path(tying.cli.__file__).read_text(encoding="utf-8")) <= set(tying.__all__) | inside_rooms
    for inside in ("from tying.report import ReportData", "import tying.store", "def f():\n from tying import plan"):
        assert not imported(inside) <= set(tying.__all__)


def test_compress_leaves_all_that_it_says(compressed: tuple[Path, Result], task: Path) -> None:
    out, result = compressed
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    assert "the task talks" in result.stderr
    assert {name: Path(path).is_file() for name, path in answer["files"].items()} == {
        "network": True,
        "figures": True,
        "page": True,
    }
    small = store.load(out / "small.safetensors", load_task(task).model())
    assert sum(p.numel() for p in small.parameters()) * 3 <= 12 * 16 + 16 + 16 * 3 + 3
    again = run("report", out, "--out", out / "again.html")
    assert again.exit_code == 0
    assert (out / "again.html").read_bytes() == (out / "report.html").read_bytes()


def test_a_finished_run_goes_on_from_its_folder(compressed: tuple[Path, Result], task: Path) -> None:
    out, _ = compressed
    before = (out / "small.safetensors").read_bytes()
    result = run("compress", task, "--ratio", 3, "--epochs", 3, "--seed", 1, "--out", out)
    assert result.exit_code == 0
    assert "accuracy" in result.stdout
    assert "asked for at least 3× fewer parameters, got" in result.stdout
    assert "the budget was kept" in result.stdout
    assert str(out / "report.html") in result.stdout
    assert (out / "small.safetensors").read_bytes() == before


def test_ctrl_c_says_how_to_go_on(task: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tying.cli", "compress", str(task), "--epochs", "100000", "--out", "made"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "made").exists() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    # Where the signal came inside an `exec`, as dataclasses use it, Python ends by it: a shell says 130 then too.
    assert process.returncode in (130, -signal.SIGINT), err
    assert "Traceback" not in err
    assert "kept in made; to go on, run again: tying compress" in err
    assert "--epochs 100000" in err
    assert not out


LENET = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))

def example_inputs():
    print("the file talks")
    return torch.rand(5, 1, 8, 8)
"""


@pytest.mark.parametrize("flag", [(), ("--json",)])
def test_explain_says_what_sharing_saves_and_draws(flag: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "lenet.py").write_text(LENET, encoding="utf-8")
    picture = tmp_path / "fields.png"
    result = run("explain", tmp_path / "lenet.py", "--out", picture, *flag)
    assert result.exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    if flag:
        read = json.loads(result.stdout)
        assert read["totals"]["shared"]["values"] == 4 * 9 + 4
        assert read["files"] == {"picture": str(picture)}
    else:
        assert "6×6 positions" in result.stdout
        assert result.stdout.endswith(f"picture: {picture}\n")


UNTRACED = """
import torch
from torch import nn

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3)

    def forward(self, x):
        return self.conv(x) if float(x.sum()) > 0 else x

def model():
    return Branches()

def example_inputs():
    return torch.ones(1, 1, 6)
"""


def test_explain_says_what_it_knows_where_there_is_nothing_to_draw(tmp_path: Path) -> None:
    (tmp_path / "branches.py").write_text(UNTRACED, encoding="utf-8")
    result = run("explain", tmp_path / "branches.py", "--out", tmp_path / "fields.png")
    assert result.exit_code == 0
    assert "What is stored" in result.stdout
    assert result.stderr == "no picture: there is nothing to draw\n"
    assert not (tmp_path / "fields.png").exists()


@pytest.mark.parametrize("name", ["model", "example_inputs"])
def test_explain_names_the_function_of_the_file_that_fails(name: str, tmp_path: Path) -> None:
    text = LENET + f"\ndef {name}():\n    raise KeyError('layers')\n"
    (tmp_path / "lenet.py").write_text(text, encoding="utf-8")
    result = run("explain", tmp_path / "lenet.py")
    assert result.exit_code == 1
    assert f"lenet.py: expected {name}() to return, got KeyError('layers')" in " ".join(result.stderr.split())


def test_explain_looks_at_the_place_of_the_picture_before_it_starts(tmp_path: Path) -> None:
    result = run("explain", tmp_path / "none.py", "--out", tmp_path / "fields.jpg")
    assert "path: expected a name that ends with .png" in " ".join(result.stderr.split())
