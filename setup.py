"""Packaging around smis_kernels/build.py: the metadata is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "smis_kernels"

# By path: importing the package would import torch, which an isolated build lacks.
_spec = importlib.util.spec_from_file_location("smis_kernels_build", PACKAGE / "build.py")
native = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = native
_spec.loader.exec_module(native)


class BuildPy(build_py):
    """Adds csrc, so that a later ``python -m smis_kernels.build`` works, and the libraries."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            package = PACKAGE
        else:
            # setuptools keeps what earlier builds left here, and a wheel would carry it.
            package = Path(self.build_lib).resolve() / PACKAGE.name
            shutil.rmtree(self.build_lib, ignore_errors=True)
            super().run()
            shutil.copytree(ROOT / "csrc", package / "csrc")
        cache = ROOT / "build" / "native"
        native.build(package, ROOT / "csrc", native.find_torch(), cache=cache)


class BdistWheel(bdist_wheel):
    """No Python symbol is in the libraries, so one wheel serves every CPython from 3.10 on."""

    def get_tag(self) -> tuple[str, str, str]:
        build_lib = Path(self.get_finalized_command("build").build_lib)
        if not any((build_lib / PACKAGE.name).glob("*.abi3.so")):
            return super().get_tag()
        self.root_is_pure = False
        return ("cp310", "abi3", super().get_tag()[2])


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
