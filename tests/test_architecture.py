"""The map of the house, held by its imports: wings apart, no arrow up, nothing heavy at the front door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "tying"

WINGS = {"find", "enforce", "train"}
BASE = {
    *("axes", "errors", "version", "files", "groups", "plan", "models", "equal", "channels", "penalties", "nn"),
    *("evaluation", "outputs", "patterns", "scripts", "usable", "wiring"),
}
"""What the wings stand on; the rest stands on the wings."""
MEETING = {"compress", "cli", "tying"}
"""Where wings meet; `tying` is the `__init__` that lists the public names."""
WITHOUT_MODELS = {"axes", "errors", "plan", "groups", "files"}
"""All of the house that penalties, pure tensor maths, may know."""


@dataclass(frozen=True)
class Import:
    file: str
    room: str
    module: str
    """Absolute, as `tying.find.discover` or `torch.nn`."""

    @property
    def target(self) -> str | None:
        """The room of the house that is imported; None for other people's packages."""
        first, _, rest = self.module.partition(".")
        return None if first != "tying" else rest.partition(".")[0] or "tying"


def imports_of(package: Path) -> Iterator[Import]:
    """Every import, also those inside functions and for type checkers; attributes such as `torch.nn` too."""
    for path in sorted(package.rglob("*.py")):
        parts = ("tying", *path.relative_to(package).with_suffix("").parts)
        room = parts[1] if parts[1] != "__init__" else "tying"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for module in _modules(node, parts, package):
                yield Import(str(path.relative_to(package)), room, module)


def _modules(node: ast.AST, parts: tuple[str, ...], package: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            base = ".".join([*parts[: len(parts) - node.level], *filter(None, [node.module])])
        for alias in node.names:
            # The name is a module of its own where there is such a file, else something inside of one.
            inside = package.joinpath(*f"{base}.{alias.name}".split(".")[1:]) if base.startswith("tying") else None
            is_module = base == "torch" or (
                inside is not None and parts[1] != "cli" and (inside.is_dir() or inside.with_suffix(".py").is_file())
            )
            yield f"{base}.{alias.name}" if is_module else base
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        yield f"torch.{node.attr}"


def reached(rooms: dict[str, set[str]], start: str) -> set[str]:
    """The rooms that a room imports, and those that they import, and so on."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = rooms.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def law_architecture(package: Path) -> None:
    imports = [i for i in imports_of(package) if i.target != i.room]
    assert imports
    rooms: dict[str, set[str]] = {}
    for i in imports:
        if i.target is not None:
            rooms.setdefault(i.room, set()).add(i.target)
    for i in imports:
        where = f"{i.file} imports {i.module}"
        if i.room in BASE:
            assert i.target is None or i.target in BASE, f"{where}: a room that wings stand on knows what stands on it"
        if i.room in WINGS:
            assert i.target is None or i.target in BASE, f"{where}: a wing knows another, or what stands on it"
        if i.room == "penalties":
            assert not (i.module + ".").startswith("torch.nn."), f"{where}: penalties are tensor maths, without models"
            assert i.target is None or i.target in WITHOUT_MODELS, f"{where}: penalties know nothing of models"
        if i.room == "cli":
            public = i.target is None or i.module in ("tying", "tying.errors", "tying.compress", "tying.explain")
            assert public, f"{where}: the command line knows the public names only"
            assert i.target or i.module.split(".")[0] not in ("torch", "numpy"), f"{where}: it does no work itself"
        if i.target == "tying":
            assert i.room == "cli", f"{where}: only the command line goes through the front door"
        assert i.target != "cli", f"{where}: nothing knows the command line"
        assert i.target != "compress" or i.room in ("tying", "cli"), f"{where}: nothing stands on compress"
    for room in rooms:
        assert room not in reached(rooms, room), f"{room} imports itself by way of {sorted(rooms[room])}"
        wings = reached(rooms, room) & WINGS
        assert room in MEETING or len(wings) < 2, f"{room} joins {sorted(wings)}: that is for compress"


def test_the_house_is_as_the_map_says() -> None:
    law_architecture(PACKAGE)


GOOD = {
    "__init__.py": "from tying.find.discover import discover\nfrom tying.compress import compress\n",
    "errors.py": "class TyingError(ValueError): ...\n",
    "groups.py": "import torch\nfrom tying.errors import TyingError\n",
    "plan.py": "from torch import Tensor, nn\nfrom tying.groups import Groups\n",
    "penalties/norms.py": "import torch\nfrom torch import Tensor\nfrom tying.errors import TyingError\n",
    "find/__init__.py": "",
    "find/discover.py": "from tying.find.clusters import cluster\nfrom tying.plan import TiePlan\n",
    "find/clusters.py": "def cluster():\n    from sklearn.cluster import KMeans\n",
    "enforce/compaction/compact.py": "from tying.plan import TiePlan\n",
    "train/proximal.py": "from tying.penalties.norms import Penalty\n",
    "store.py": "from tying.enforce.compaction import compact\n",
    "words.py": "",
    "measure.py": "from tying import words\nfrom tying.store import encode\n",
    "compress/__init__.py": "from tying.find.discover import discover\nfrom tying.enforce.compaction import compact\n",
    "cli.py": "import typer\ndef run():\n    from tying import compress\n    from tying.errors import TyingError\n",
}

VIOLATIONS = {
    "a wing imports a wing": ("find/discover.py", "from tying.enforce.compaction.compact import compact"),
    "inside a function": ("train/proximal.py", "def f():\n    from tying.find.discover import discover"),
    "relatively": ("enforce/compaction/compact.py", "from ...find import discover"),
    "by a plain import": ("enforce/compaction/compact.py", "import tying.train.proximal"),
    "from the package": ("find/clusters.py", "from tying import enforce"),
    "a wing imports what stands on it": ("enforce/compaction/compact.py", "from tying.store import encode"),
    "the base imports a wing": ("plan.py", "from tying.find.discover import discover"),
    "the base imports what stands on wings": ("groups.py", "from tying.measure import measure"),
    "penalties know modules": ("penalties/norms.py", "from torch import nn"),
    "penalties know modules by name": ("penalties/norms.py", "import torch.nn.functional as F"),
    "penalties know modules by attribute": ("penalties/norms.py", "def f(m): return isinstance(m, torch.nn.Linear)"),
    "penalties know models": ("penalties/norms.py", "from tying.channels.find import find_channels"),
    "wings meet elsewhere": ("measure.py", "from tying.find.discover import discover"),
    "something stands on compress": ("measure.py", "from tying.compress import compress"),
    "the command line looks inside": ("cli.py", "from tying.find.discover import discover"),
    "the command line looks inside of a room": ("cli.py", "from tying.compress.load import load_task"),
    "the command line computes": ("cli.py", "import torch"),
    "something knows the command line": ("store.py", "from tying.cli import app"),
    "the front door is used inside": ("store.py", "from tying import discover"),
    "a cycle of two": ("errors.py", "from tying.groups import Groups"),
    "a cycle of three": ("store.py", "from tying import words\nimport tying.measure"),
}


def build(folder: Path, extra: tuple[str, str] | None = None) -> Path:
    for name, text in GOOD.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + (extra[1] if extra and extra[0] == name else ""), encoding="utf-8")
    return folder


def test_a_small_house_of_the_same_plan_stands(tmp_path: Path) -> None:
    law_architecture(build(tmp_path))


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_house_that_breaks_the_plan_fails_the_law(name: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        law_architecture(build(tmp_path, VIOLATIONS[name]))


# ---------------------------------------------------------------- what an import costs

HEAVY = {"matplotlib", "jinja2", "sklearn", "scipy", "typer", "rich", "torch.export", "torch._dynamo", "selenium"}

LOADED = """
import sys
import {first}
before = set(sys.modules)
import {second}
print("\\n".join(sorted(set(sys.modules) - before)))
"""


def law_light(first: str, second: str) -> None:
    """`import second` loads nothing heavy that `import first` has not loaded already."""
    code = LOADED.format(first=first, second=second)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(said.stdout.split())
    assert second in loaded
    assert not {name for name in loaded if name in HEAVY or name.split(".")[0] in HEAVY}


def test_importing_tying_loads_nothing_heavy_that_torch_does_not() -> None:
    law_light("torch", "tying")


def test_importing_something_heavy_fails_the_law() -> None:
    with pytest.raises(AssertionError):
        law_light("torch", "tying.cli")
