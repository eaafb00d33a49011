"""First steps: what is not installed, narrow terminals, plain locales, long work without a word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from smis_kernels import build, info
from smis_models import cli
from smis_models.cli import common
from smis_models.data import GeneratedScenes
from smis_models.families import create_model, list_models
from smis_models.io import extras
from smis_models.io.images import write_indices
from smis_models.metrics import Metrics, PixelDistance, Scenes, evaluate, protocol, scene_labels

ROOT = Path(__file__).resolve().parents[1]


def _smis(*words: str, blocked: tuple[str, ...] = (), **environment: str,
          ) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own, without the modules that are blocked."""
    code = ("import sys\n"
            "class Absent:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name.partition('.')[0] in {blocked!r}:\n"
            "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
            "sys.meta_path.insert(0, Absent())\n"
            f"sys.argv = ['smis', *{list(words)!r}]\n"
            "from smis_models.cli import main\nmain()\n")
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False,
                          env=settings, timeout=600)


@pytest.mark.parametrize("module", ["typer", "PIL", "torch"])
def test_what_is_not_installed_is_one_line(module: str) -> None:
    done = _smis("info", blocked=(module,))
    error = done.stderr.decode()
    assert (done.returncode, error.count("\n")) == (2, 1), error
    assert error.startswith("error: ") and "pip install" in error
    assert "smis-kernels" not in error  # no index has it


def test_a_cure_names_what_an_index_has() -> None:
    assert extras.cure("models", "scikit-learn").startswith("pip install '")
    assert "scikit-learn" in extras.cure("models", "scikit-learn")
    assert "tensorboard" in extras.cure("train", "tensorboard")
    assert extras.cure("nothing") == "pip install '.[nothing]'"
    for path in [*ROOT.glob("smis_models/**/*.py"), *ROOT.glob("smis_kernels/**/*.py")]:
        assert "pip install 'smis" not in path.read_text() and (
            "pip install smis" not in path.read_text()), path


def test_list_is_whole_in_a_narrow_terminal_and_a_plain_locale() -> None:
    done = _smis("list", LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="ascii",
                 PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode("ascii")
    assert max(map(len, text.splitlines())) <= 80
    for model in list_models():
        assert any(model.name in line.replace("|", " ").split() for line in text.splitlines()), (
            model.name)


def test_version_and_short_help() -> None:
    """One process after another call, as its parser must not remember the last."""
    calls = (["--version"], ["-h"], ["synthesize", "-h"], [])
    code = ("import sys\nfrom smis_models.cli import main\n"
            f"for words in {calls!r}:\n"
            "    sys.argv = ['smis', *words]\n"
            "    try:\n        main()\n"
            "    except SystemExit as end:\n"
            "        print(f'\\n== {end.code or 0}', flush=True)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}, timeout=600)
    version, helped, synthesize, nothing, rest = done.stdout.split("\n== ")
    assert version.startswith("smis-kernels 0.")
    assert "synthesize" in helped and "--labels" in synthesize
    codes = [part.split("\n", 1)[0] for part in (helped, synthesize, nothing, rest)]
    assert codes == ["0", "0", "0", "2"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_has_a_total_and_speaks_once_a_minute(terminal: bool,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Console(force_terminal=terminal, record=True, width=80, file=open(os.devnull, "w"))  # noqa: SIM115
    clock = [0.0]
    monkeypatch.setattr(common, "console", shown)
    monkeypatch.setattr(common.time, "monotonic", lambda: clock[0])
    with common.progress(None) as step:
        step.expect(40)
        for k in range(40):
            clock[0] += 7
            step(f"scene {k} [x]")
    lines = [line for line in shown.export_text().splitlines() if " of 40, " in line]
    assert len(lines) == (0 if terminal else 4)
    if not terminal:
        assert lines[0] == "9 of 40, 63 s: scene 8 [x]"


@pytest.mark.parametrize("source", ["files", "generated"])
def test_evaluate_tells_how_many_steps_there_are(source: str, tmp_path: Path) -> None:
    from smis_models.synthesis.scene import read_scenes

    model = create_model("groupdnet_scenes", ngf=8, nef=8).eval()
    scenes = Scenes(GeneratedScenes(3, 128, "test"), {"dataset": "scenes"})
    if source == "files":
        for k in range(3):
            write_indices(tmp_path / f"{k}.png", np.arange(128)[:, None].repeat(128, 1) // (40 + k))
        scenes = Scenes(read_scenes(tmp_path, None, model.preset), {})
    told: list[int] = []
    taken: list[str] = []
    evaluate(model, scenes, Metrics([PixelDistance()], None, scene_labels),
             protocol("n100-m19", layouts=2, samples=2, pairs=1), step=taken.append,
             expect=told.append)
    assert told[-1] == len(taken)
    assert told == sorted(told, reverse=True)


def test_options_of_a_recipe_need_no_folder(monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)
    for words, code in ((("--options",), 0), ((), 2)):
        monkeypatch.setattr("sys.argv", ["smis", "train", "groupdnet_scenes", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert (end.value.code or 0) == code
    out, error = capsys.readouterr()
    assert '"model": "groupdnet_scenes"' in out
    assert error == "error: out: expected a folder for the run; give --out\n"


@pytest.mark.parametrize("value", ["two", "0", "-1", "1.5"])
def test_max_jobs_is_a_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", value)
    with pytest.raises(SystemExit, match="MAX_JOBS: expected a number of at least 1"):
        build.jobs()


def test_a_checkout_says_that_another_package_is_installed(tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    package = build.locate()[0]
    monkeypatch.setattr(sys, "path", [str(package.parent)])
    assert info.info()["versions"]["package"] == str(package)
    (tmp_path / "smis_kernels").mkdir()
    (tmp_path / "smis_kernels/__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(package.parent), str(tmp_path)])
    told: Any = info.info()["versions"]["package"]
    assert told.startswith(f"{package}, not the installed {tmp_path / 'smis_kernels'}")
    assert "python -I -m smis_kernels.info" in told
