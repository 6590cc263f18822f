"""The house rules that no single module can hold: which room may import which, and what may not be written down."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("flamingo", "data_shards", "icl_eval", "train")
"""Each may import itself and those before it."""
UNDECLARED = {"open_flamingo", "open_clip"}
"""Peers that only a guarded import reaches: see pyproject.toml."""


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Absolute names of all that a module imports: anywhere in it, relatively, or by a name given to importlib."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=name, names=names, level=level):
                climbed = package[: len(package) - level + 1] if level else []
                origin = ".".join([*climbed, *([name] if name else [])])
                yield from [origin] if origin else (alias.name for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def modules(room: str) -> Iterator[tuple[Path, str, list[str]]]:
    """Path, module name and imports of every file of a room."""
    for path in sorted((ROOT / room).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        yield path, name, list(imported(path.read_text(encoding="utf-8"), name, is_package))


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    """A lower room that reaches up, even within a function: a user of the model would then need the trainer."""
    above = ROOMS[ROOMS.index(room) + 1 :]
    files = list(modules(room))
    assert files, f"{room}/ has no modules"
    wrong = [f"{name} imports {each}" for _, name, names in files for each in names if each.split(".")[0] in above]
    assert not wrong


@pytest.mark.parametrize(
    "source",
    [
        "import train.loop as l",
        "import os, train",
        "from train.loop import run",
        "def f():\n    if True:\n        from train import loop",
        "from ..train import loop",
        "from .. import train",
        "import importlib\nimportlib.import_module('train.loop')",
        "__import__('train')",
    ],
)
def test_no_spelling_of_an_import_is_overlooked(source: str) -> None:
    """A spelling that `test_imports_run_one_way` does not see."""
    assert "train" in {name.split(".")[0] for name in imported(source, "flamingo.media")}


def test_an_import_within_the_room_is_not_taken_for_another() -> None:
    """`from . import train` within a room named like the room above."""
    assert list(imported("from . import train", "flamingo.interop.otter")) == ["flamingo.interop"]
    assert list(imported("from .media import train", "flamingo", is_package=True)) == ["flamingo.media"]


def test_what_is_imported_is_declared() -> None:
    """A package that is here only because another one brought it: gone with that one's next release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {_normal(re.split(r"[\s\[<>=~!;]", line, maxsplit=1)[0]) for group in groups for line in group}
    distributions = packages_distributions()
    undeclared = {
        f"{top} in {path.relative_to(ROOT)}"
        for room in ROOMS
        for path, _, names in modules(room)
        for top in {name.split(".")[0] for name in names} - {*ROOMS, *UNDECLARED, *sys.stdlib_module_names}
        if declared.isdisjoint(_normal(each) for each in distributions.get(top, [top]))
    }
    assert not undeclared


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_path_of_a_machine_is_written_down() -> None:
    """A script, a log or a recipe that holds a folder of the machine it was written on, and works nowhere else."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    folders = re.compile(rb"(?<![\w./~$}-])/(?:" + b"|".join([b"work", b"root", b"tmp", b"home"]) + rb")/")
    found = []
    for path in (ROOT / name for name in names if name):
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" in content:
            continue  # binary
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.decode(errors='replace').strip()[:120]}"
            for number, line in enumerate(content.splitlines(), 1)
            if folders.search(line)
        ]
    assert not found
