"""``python -m smis_kernels.info``: what is here, what is not, and the command that changes it."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smis_kernels import build, info
from smis_kernels.runtime import backend as _backend
from smis_kernels.runtime import native as _native


def test_command_prints_the_dict_and_the_table():
    def run(*arguments):
        command = [sys.executable, "-m", "smis_kernels.info", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    found = json.loads(run("--json"))
    assert found["versions"]["torch"] == torch.__version__
    assert run() == info.report(found) + "\n"


IN_TORCH = ("indexed_relu", "level_tables")  # what a CPU computes without a file of its own


def test_every_op_is_listed_with_the_kinds_it_has_files_for():
    ops = info.info()["ops"]
    package, source, _ = build.locate()
    assert set(ops) == {path.parent.name for path in package.glob("ops/*/op.py")}
    for op, kinds in ops.items():
        assert kinds["reference"] == ""
        assert ("cpu" in kinds) == (source / op / "cpu.cpp").exists()
        assert ("cuda" in kinds) == (source / op / "cuda.cu").exists()
        assert ("triton" in kinds) == (package / "ops" / op / "triton.py").exists()
        for kind in set(kinds) - {"reference"}:
            assert kinds[kind] or _backend.missing(kind) is None
        stated = importlib.import_module(f"smis_kernels.ops.{op}.op").KINDS
        in_torch = {"cpu"} if op in IN_TORCH else set()
        assert set(stated) - in_torch == set(kinds) - {"reference"}, op


@pytest.mark.parametrize("loaded", [True, False])
def test_library_says_why_and_what_to_do(monkeypatch, tmp_path, loaded):
    status = _native.NativeStatus("cpu", True, "library") if loaded else _native.NativeStatus(
        "cpu", False, "", "no C++ compiler", "install g++"
    )
    monkeypatch.setitem(_native.STATUS, "cpu", status)
    monkeypatch.setattr(_native, "PACKAGE", Path(tmp_path))
    entry = {"state": "not built", "reason": "no C++ compiler", "cure": "install g++"}
    (tmp_path / build.RECORD).write_text(json.dumps({"cpu": entry}))
    found = info.info()
    assert found["libraries"]["cpu"] == {
        "built": False, "loaded": loaded, "reason": status.reason, "cure": status.cure,
        "emulated": False, "last_build": "not built: no C++ compiler; cure: install g++",
    }
    rows = [line.split(None, 1) for line in info.report(found).splitlines()]
    why = "loaded" if loaded else "missing: no C++ compiler; cure: install g++"
    assert ["cpu", why] in rows


def test_an_old_library_and_the_error_of_the_last_build_are_both_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "PACKAGE", tmp_path)
    (tmp_path / "_cpu.abi3.so").touch()
    entry = {"state": "not built", "reason": "cpu.cpp:1: error: x", "cure": build.COMMAND}
    (tmp_path / build.RECORD).write_text(json.dumps({"cpu": entry}))
    found = info.info()
    assert found["libraries"]["cpu"]["built"]
    assert "cpu.cpp:1: error: x" in info.report(found)


def test_only_variables_that_are_set_are_shown(monkeypatch):
    monkeypatch.delenv("SMIS_PATH", raising=False)
    monkeypatch.setenv("SMIS_BUILD", "cpu")
    found = info.info()["environment"]
    assert found["SMIS_BUILD"] == "cpu"
    assert "SMIS_PATH" not in found
