"""Outputs are tried before the work, and no command needs a module that only Unix has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smis_models import cli
from smis_models.io import images

UNIX = ("resource", "fcntl", "pwd", "grp", "termios", "readline", "pty", "tty", "syslog", "crypt")
COMMANDS = ("synthesize", "mix", "edit", "morph", "resample", "demo", "evaluate", "features",
            "convert", "benchmark", "scenes", "convert-labels", "convert-data")


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The one line of a command that must end before anything is read or made."""
    def untouched(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)
    monkeypatch.setattr(cli.common, "create_model", untouched)

    def run(*arguments: Any) -> str:
        monkeypatch.setattr("sys.argv", ["smis", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        error = capsys.readouterr().err
        assert (end.value.code, error.count("\n")) == (2, 1), error
        return error

    return run


def _arguments(command: str, folder: Path, out: Path) -> list[Any]:
    given: dict[str, list[Any]] = {
        "evaluate": ["--labels", folder], "features": ["--images", folder, "--instances", folder],
        "mix": ["--labels", folder, "--images", folder, "--image-labels", folder],
        "benchmark": ["--set", "modulation"],
        "resample": ["--labels", folder, "--class", 1],
    }
    if command in ("convert", "scenes", "convert-labels", "convert-data"):
        kind = ["celebamask-hq"] if command == "convert-data" else []
        source = [] if command == "scenes" else [folder]
        return [command, *kind, *source, out]
    named = [] if command in ("benchmark",) else ["--model", "groupdnet_scenes"]
    labels = [] if command == "demo" else ["--labels", folder]
    return [command, *named, *given.get(command, labels), "--out", out]


@pytest.mark.parametrize("command", COMMANDS)
def test_outputs_are_tried_first(command: str, refused: Any, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    ends = {"evaluate": "e.json", "features": "f.npz", "convert": "m.safetensors"}
    name = ends.get(command, "out")
    if command in ends:
        (tmp_path / name).mkdir()
        assert "is a folder; expected a file" in refused(
            *_arguments(command, tmp_path, tmp_path / name))
        (tmp_path / name).rmdir()
    else:
        assert "is a file; expected a folder" in refused(
            *_arguments(command, tmp_path, tmp_path / "file"))
    error = refused(*_arguments(command, tmp_path, tmp_path / "file/deep" / name))
    assert "error: out: " in error
    assert "file; expected a folder" in error
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert "error: out: " in refused(*_arguments(command, tmp_path, tmp_path / "new" / name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("command", ["evaluate", "features", "convert"])
def test_what_is_no_file_is_never_replaced(command: str, refused: Any, tmp_path: Path) -> None:
    ends = {"evaluate": "e.json", "features": "f.npz", "convert": "m.safetensors"}
    pipe, link = tmp_path / ends[command], tmp_path / f"link.{ends[command]}"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    for path in (pipe, link):
        assert "is a device or a pipe; expected a file to write" in refused(
            *_arguments(command, tmp_path, path))
    assert pipe.is_fifo() and link.is_symlink()


@pytest.mark.parametrize(("command", "name"), [
    ("evaluate", "checkpoint.pt"), ("evaluate", "record.json"), ("evaluate", "losses.csv"),
    ("convert", "best.safetensors"), ("convert", "kept/epoch_0001.safetensors"),
])
def test_files_of_a_run_are_never_written_over(command: str, name: str, refused: Any,
                                               tmp_path: Path) -> None:
    (tmp_path / "run/kept").mkdir(parents=True)
    for file in ("checkpoint.pt", name):
        (tmp_path / "run" / file).write_text("all that the run needs")
    error = refused(*_arguments(command, tmp_path, tmp_path / "run" / name))
    assert f"{name} is a file of the training run there; give another name" in error
    assert (tmp_path / "run" / name).read_text() == "all that the run needs"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_only_seems_to_permit_it_is_refused(
        command: str, refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    name = {"evaluate": "e.json", "features": "f.npz", "convert": "m.safetensors"}.get(
        command, "out")
    assert "cannot be written here; choose another place" in refused(
        *_arguments(command, tmp_path, tmp_path / "new" / name))


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_path_is_not_this_folder(command: str, refused: Any, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """An unset variable of a shell: ``--out "$OUT"``."""
    monkeypatch.chdir(tmp_path)
    error = refused(*_arguments(command, tmp_path, Path("out"))[:-1], "")
    assert "out: expected a path, got an empty one; give . for this folder" in error
    assert not list(tmp_path.iterdir())


def test_an_empty_path_to_read_is_refused(refused: Any) -> None:
    for words, name in ((["doctor", ""], "data"), (["synthesize", "--labels=", "--out", "o"],
                                                   "labels"),
                        (["mix", "--labels", "a", "--images", "b", "--images", "", "--image-labels",
                          "c", "--out", "o"], "images")):
        assert f"error: {name}: expected a path, got an empty one" in refused(*words)


def test_a_second_path_hides_no_first(refused: Any) -> None:
    error = refused("synthesize", "--labels", "a.png", "--labels", "b.png", "--out", "o")
    assert "labels: expected one path, got 'a.png' and 'b.png'; give a folder" in error


def test_a_data_set_is_no_file(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert f"got the file {tmp_path / 'a.png'}" in refused("doctor", tmp_path / "a.png")


def test_names_of_any_signs_are_painted_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are no markup, a line's end is no second line, and names may be long."""
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)
    monkeypatch.setenv("COLUMNS", "1000")
    names = ["[bold]", "two\nlines", "\u65e5" * 80, "[red]x[", "%d"]
    for name in names:
        images.write_indices(tmp_path / "maps" / f"{name}.png", np.zeros((8, 8), int))
    (tmp_path / "maps" / "sub[").mkdir()
    images.write_indices(tmp_path / "maps" / "sub[" / "b].png", np.zeros((8, 8), int))
    out = tmp_path / "o[best]"
    monkeypatch.setattr("sys.argv", ["smis", "synthesize", "--model", "groupdnet_scenes",
                                     "--labels", str(tmp_path / "maps"), "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr().out
    assert end.value.code in (0, None), told
    assert all((out / f"{name}_0.png").is_file() for name in [*names, "sub[/b]"])
    assert (out / "grid.png").is_file()
    assert "[bold]_0.png" in told
    assert "sub[/b]_0.png" in told
    assert f"pictures in {out}" in told.replace("\n", "")


def test_commands_run_without_unix_modules(tmp_path: Path) -> None:
    images.write_indices(tmp_path / "a.png", np.zeros((128, 128), int))
    commands = (["list"], ["info"], ["train", "--help"], [
        "synthesize", "--model", "groupdnet_scenes", "--labels", str(tmp_path / "a.png"), "--out",
        str(tmp_path / "out")])
    program = (f"import sys\nfor name in {UNIX!r}:\n    sys.modules[name] = None\n"
               "from smis_models.cli import main\n"
               f"for words in {commands!r}:\n"
               "    sys.argv = ['smis', *words]\n"
               "    try: main()\n"
               "    except SystemExit as end: assert not end.code, words\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out/a_0.png").exists()


def test_no_module_of_the_packages_imports_a_unix_one_at_its_top() -> None:
    """All modules, those of training too, not only what the commands above happen to import."""
    program = (f"import sys\nfor name in {UNIX!r}:\n    sys.modules[name] = None\n"
               "import importlib, pkgutil, smis_models, smis_kernels\n"
               "for package in (smis_models, smis_kernels):\n"
               "    for m in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
               "        if m.name.endswith(('.triton', '__main__')) or '._' in m.name: continue\n"
               "        try: importlib.import_module(m.name)\n"
               "        except ModuleNotFoundError as error:\n"
               f"            if error.name in {UNIX!r}: raise\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-2000:]
