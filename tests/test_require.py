"""SMIS_REQUIRE: what is missing ends the run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from require import unmet

from smis_kernels.runtime import native


def test_a_native_library_that_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(native.STATUS["cpu"], loaded=False, reason="it has not been built",
                     cure="python -m smis_kernels.build")
    monkeypatch.setitem(native.STATUS, "cpu", broken)
    (problem,) = unmet("cpu,torch")
    assert problem == ("SMIS_REQUIRE=cpu: the native cpu library is not loaded: it has not been "
                       "built; cure: python -m smis_kernels.build")


def test_nothing_is_asked_for() -> None:
    assert unmet("") == []
    assert unmet("torch,numpy") == []


def test_the_run_ends(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_require.py",
               "-k", "nothing")
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True,
                          text=True, env={**os.environ, "SMIS_REQUIRE": "no_such_module"})
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "SMIS_REQUIRE=no_such_module: no module 'no_such_module'" in done.stdout + done.stderr
