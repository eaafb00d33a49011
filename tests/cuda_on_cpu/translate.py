"""CUDA C++ as the host compiler takes it: launches, shared memory and the bounds of grids."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

IDENTIFIER = re.compile(r"[\w:]")
SHARED = re.compile(r"(extern\s+)?\b__shared__\s+([\w:<>]+)\s+(\w+)\s*((?:\[[^\]]*\]\s*)*);")
CLAMP = re.compile(r"(std::clamp<int64_t>\(\w+(?:\([^()]*\))?, 1), ([^()]+)\)")


def kernel_start(text: str, end: int) -> int:
    """Where the ``name<arguments>`` begins that ends before ``end``."""
    at = len(text[:end].rstrip())
    if text[at - 1] == ">":
        depth = 0
        while True:
            at -= 1
            depth += (text[at] == ">") - (text[at] == "<")
            if depth == 0:
                break
    while IDENTIFIER.match(text[at - 1]):
        at -= 1
    return at


def launches(text: str, op: str) -> str:
    """``kernel<T><<<grid, block>>>(a, b)`` as a call that runs the kernel for every thread."""
    while (found := text.find("<<<")) >= 0:
        start, stop = kernel_start(text, found), text.index(">>>", found)
        opening = text.index("(", stop)
        if text[stop + 3 : opening].strip():
            raise ValueError(f"a launch without arguments: {text[found:opening]!r}")
        kernel = text[start:found].strip()
        name = f"{op}/{kernel.partition('<')[0]}"
        separator = "" if text[opening + 1 :].lstrip().startswith(")") else ", "
        dropped = "\n" * (text.count("\n", start, opening) - text.count("\n", found, stop))
        call = (f"::emulated::launch(::emulated::Config({text[found + 3 : stop]}), "
                f'::emulated::Site{{"{name}", __LINE__}}, '
                f"[&](const auto&... a) {{ {kernel}(a...); }}{separator}{dropped}")
        text = text[:start] + call + text[opening + 1 :]
    return text


def shared(match: re.Match[str]) -> str:
    external, type_, name, extents = match.groups()
    if external:
        return f"{type_}* const {name} = ::emulated::dynamic_shared<{type_}>();"
    return f"auto& {name} = ::emulated::static_shared<{type_}{extents}>([] {{}});"


def translate(text: str, name: str) -> str:
    """One file; messages and debug information name it ``name``, with its own lines."""
    text = SHARED.sub(shared, launches(text, name.partition("/")[0]))
    text = text.replace("__CUDA_ARCH__", "EMULATED_ARCH")
    if "__shared__" in text:
        raise ValueError(f"{name}: a declaration of shared memory that this step does not know")
    return f'#include "device.h"\n#line 1 "{name}"\n{text}'


def translate_tree(source: Path, target: Path) -> list[Path]:
    """``csrc`` into ``target``, with a ``cuda.cpp`` for every ``cuda.cu``; the paths of those."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    for path in (p for p in target.rglob("*") if p.suffix in (".cu", ".h")):
        text = path.read_text()
        if path.suffix == ".cu":
            name = path.relative_to(target).as_posix()
            path.with_suffix(".cpp").write_text(translate(text, name))
        elif "__CUDA_ARCH__" in text:
            path.write_text(text.replace("__CUDA_ARCH__", "EMULATED_ARCH"))
    common = target / "common" / "cuda.h"
    axes = iter("01")
    text, count = CLAMP.subn(
        lambda m: f"{m[1]}, ::emulated::grid_limit({next(axes)}, {m[2]}))", common.read_text())
    if count != 2:
        raise ValueError(f"common/cuda.h: expected 2 bounds of a grid (x, y), found {count}")
    common.write_text(text)
    return sorted(target.glob("*/cuda.cpp"))
