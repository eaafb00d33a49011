"""Every python and console block of README and of the site runs as it stands.

README's blocks run each on its own, as they are pasted; a page's follow one another in one folder.
Blocks in other words (``bash``) need what a test has not: a network, a GPU, a user's files.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import smis_kernels
import smis_models
import smis_models.data
import smis_models.metrics
import smis_models.training
from smis_models import cli

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "```python" in path.read_text()
               or "```console" in path.read_text())
Block = tuple[str, str, int]  # language, text, line


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text()
    for found in re.finditer(r"^```(python|console)\n(.*?)^```$", text, re.M | re.S):
        yield found[1], found[2], text.count("\n", 0, found.start(2))


def commands(block: str) -> Iterator[list[str]]:
    for line in block.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.fixture
def smis(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)

    def run(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["smis", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        assert not end.value.code, (arguments, printed.out, printed.err)

    return run


@pytest.fixture
def run(smis: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def block(path: Path, found: Block, names: dict[str, Any]) -> None:
        language, text, line = found
        if language == "python":
            # As many lines before it as on the page, so that a failure names the page's line.
            exec(compile("\n" * line + text, str(path), "exec"), names)
        for words in commands(text) if language == "console" else ():
            assert words[0] == "smis", words
            smis(*words[1:])

    yield block
    torch.set_num_threads(threads)


@pytest.mark.parametrize("found", [
    pytest.param(found, id=f"line {found[2]}") for found in blocks(README) if found[0] == "python"])
def test_readme_runs_as_pasted(found: Block, run: Callable[..., None]) -> None:
    run(README, found, {"__name__": "__main__"})


def test_readme_tour_makes_what_it_says(run: Callable[..., None], tmp_path: Path) -> None:
    (tour,) = (found for found in blocks(README) if found[0] == "console")
    run(README, tour, {})
    assert {words[1] for words in commands(tour[1])} >= {
        "scenes", "doctor", "train", "synthesize", "mix", "edit", "morph", "resample", "evaluate"}
    for name in ("mixed/mix.gif", "edited/edit.gif", "morphed/morph.gif", "resampled/resample.gif"):
        with Image.open(tmp_path / name) as animation:
            assert getattr(animation, "n_frames", 1) > 1


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_run_from_top_to_bottom(path: Path, run: Callable[..., None]) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for found in blocks(path):
        run(path, found, names)


def test_what_has_to_run_is_there() -> None:
    assert sum(language == "python" for language, _, _ in blocks(README)) >= 4
    tutorials = {path for path in PAGES if path.parent.name == "tutorials"}
    assert tutorials == set((DOCS / "tutorials").glob("*.md")) and len(tutorials) >= 5


def test_readme_is_short_and_its_pictures_are_small() -> None:
    assert len(README.read_text().splitlines()) < 150
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README.read_text())
    assert {Path(picture).suffix for picture in pictures} >= {".png", ".gif"}
    assert all((ROOT / picture).stat().st_size < 400_000 for picture in pictures)


def test_links_to_files_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README.read_text()):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("package", [
    smis_kernels, smis_models, smis_models.data, smis_models.metrics, smis_models.training,
], ids=lambda package: str(package.__name__))
def test_the_reference_has_every_public_name(package: Any) -> None:
    name = package.__name__
    page = DOCS / "api" / f"{name.removeprefix('smis_models.')}.md"
    listed = re.findall(r"^\.\. (?:auto|py:)\w+:: (\w+)$", page.read_text(), re.M)
    assert sorted(listed) == sorted(package.__all__)


def test_names_of_the_table_of_operations_are_importable() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "operations.md").read_text(), re.M)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) > 15
    assert [name for name in names if not hasattr(smis_kernels, name)] == []


def test_the_kernels_page_has_every_operations_readme() -> None:
    page = (DOCS / "kernels.md").read_text()
    ops = sorted(path.name for path in (ROOT / "smis_kernels/ops").iterdir() if path.is_dir()
                 and path.name != "__pycache__")
    assert [op for op in ops if f"../smis_kernels/ops/{op}/README.md" not in page] == []
