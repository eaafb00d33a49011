"""Compiles both libraries against the headers of the oldest torch that is supported.

An index's wheel is the CUDA build (0.9 GB, for 2.10.0 of CUDA 12.8), so these are the headers
that a user with a GPU has; torch/include and torch/version.py of it are kept in build/headers.
Nothing is linked: ``python -m tools.tasks abi`` holds the symbols. The CUDA sources are compiled
for the least GPU that README names, which the ordinary build leaves out. That they compile is all
that is asked, so nothing is optimised.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from smis_kernels import build
from smis_kernels.runtime.backend import CUDA_LEAST

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "headers"
OLDEST = "{}.{}.0".format(*build.MINIMUM_TORCH)
LEAST_GPU = "{}.{}".format(*CUDA_LEAST)


def headers(version: str, cache: Path) -> build.Torch:
    """The headers of torch ``version`` in ``cache``, downloaded where they are not there yet."""
    root = cache / version / "torch"
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as folder:
            command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                       "--only-binary=:all:", "--dest", folder, f"torch=={version}")
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                said = re.search(r"^ERROR: .*", done.stderr, re.M)
                sys.exit(f"headers: torch {version} could not be downloaded: "
                         f"{said[0] if said else f'pip ended with {done.returncode}'}")
            (wheel,) = Path(folder).glob("torch-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder, [
                    name for name in archive.namelist()
                    if name.startswith("torch/include/") or name == "torch/version.py"
                ])
            os.replace(Path(folder, "torch"), root)
    found = build.read_torch(root)
    if found is None or not found.cuda:
        kind = f"torch {found.version} without CUDA" if found else "a wheel without headers"
        sys.exit(f"headers: expected a CUDA build of torch {version}, got {kind}; "
                 f"cure: rm -r {root}, and PIP_FIND_LINKS and the index name another wheel")
    return found


def main(version: str = OLDEST) -> None:
    """Compile every source that includes torch, for one architecture."""
    if version == "download":
        headers(OLDEST, CACHE)
        return
    torch = headers(version, CACHE)
    print(f"headers of torch {torch.version}")
    os.environ["TORCH_CUDA_ARCH_LIST"] = LEAST_GPU
    for name, plan_of in build.PLANS.items():
        try:
            # No CUDA version: nvcc may be of another than this wheel, which is not linked.
            plan = plan_of(ROOT / "csrc", dataclasses.replace(torch, cuda=""))
            quick = "-O0 --Ofast-compile=max" if name == "cuda" else "-O0"
            plan = dataclasses.replace(plan, ninja=plan.ninja.replace(" -O3 ", f" {quick} "))
            objects = re.findall(r"^build (\S+): compile .*/(?:cpu\.cpp|cuda\.cu)$", plan.ninja,
                                 re.M)
            build.make(plan, CACHE / version / name, *objects)
        except build.NotBuilt as problem:
            sys.exit(f"headers: {name} does not compile with torch {torch.version}: "
                     f"{problem.reason}")
        print(f"{name}: {len(objects)} sources compiled")


if __name__ == "__main__":
    main(*sys.argv[1:])
