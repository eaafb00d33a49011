"""What holds for every csrc/*/cuda.cu and needs no GPU to be seen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted(CSRC.glob("*/cuda.cu"))
CHECKED = re.compile(r"(?:launch|launch_|numbering)\.check\(\);")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_every_launch_is_checked_and_names_its_op(source: Path) -> None:
    """Between a launch and the next one, of another branch or statement, stands a check."""
    text = source.read_text()
    assert "STD_CUDA" not in text  # its message has a build path and no op
    launches = [m.start() for m in re.finditer("<<<", text)]
    assert launches
    for begin, end in zip(launches, [*launches[1:], len(text)], strict=True):
        between = text[begin:end]
        if re.search(r"\n\s*(?:\} )?else\b", between) and not CHECKED.search(between):
            continue  # the branches of one statement share the check behind it
        assert CHECKED.search(between), f"line {text.count(chr(10), 0, begin) + 1} is not checked"


def test_errors_carry_no_build_path() -> None:
    for path in CSRC.glob("*/*"):
        assert "STD_TORCH_CHECK(" not in path.read_text(), path.name


def test_intrinsics_of_newer_gpus_stand_in_one_place() -> None:
    """__reduce_max_sync needs compute capability 8.0; warp_max serves 7.5 too."""
    found = [p.relative_to(CSRC).as_posix() for p in CSRC.glob("*/*")
             if re.search(r"__reduce_\w+_sync\(", p.read_text())]
    assert found == ["common/cuda.h"]
