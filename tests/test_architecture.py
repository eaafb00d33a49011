"""The rooms of both packages: imports point downwards only, and the models' root stays small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground up: a room imports from those before it.
ROOMS = {
    "smis_kernels": ("build", "runtime", "testing", "ops", "layout", "modules", "acceleration",
                     "info", "interface"),
    "smis_models": ("io", "networks", "families", "data", "synthesis", "metrics", "training",
                    "benchmark", "app", "cli"),
}


def _imports(path: Path) -> Iterator[str]:
    """The dotted names that a file of the packages imports from them."""
    module = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = module[:len(module) - node.level] if node.level else ()
            whole = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{whole}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("package", ROOMS)
def test_imports_point_downwards(package: str) -> None:
    order = {room: height for height, room in enumerate(ROOMS[package])}
    upward = []
    for path in sorted((ROOT / package).rglob("*.py")):
        room = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        for name in _imports(path):
            parts = name.split(".")
            if room == "__init__" or parts[0] != package or parts[1] not in order:
                continue
            if order[parts[1]] > order[room]:
                upward.append(f"{path.relative_to(ROOT)}: {name}")
    assert not upward


def test_every_room_is_placed() -> None:
    for package, rooms in ROOMS.items():
        found = {path.stem for path in (ROOT / package).iterdir()
                 if path.suffix == ".py" or (path / "__init__.py").exists()}
        assert found - {"__init__"} == set(rooms)


def test_kernels_never_import_models() -> None:
    for path in (ROOT / "smis_kernels").rglob("*.py"):
        assert not [name for name in _imports(path) if name.startswith("smis_models")], path


def test_models_enter_kernels_by_their_doors() -> None:
    """The root's names, `interface`, and beside them the references and what a report needs."""
    doors = {"interface", "testing", "build", "info"}
    for path in (ROOT / "smis_models").rglob("*.py"):
        behind = [
            name for name in _imports(path)
            if name.startswith("smis_kernels.") and len(parts := name.split(".")) > 2
            and parts[1] not in doors and not (parts[1] == "ops" and parts[-1] == "reference")
        ]
        assert not behind, path


def test_the_root_of_the_models_holds_twelve_entries() -> None:
    tracked = [path for path in (ROOT / "smis_models").iterdir() if path.name != "__pycache__"]
    assert len(tracked) <= 12
