"""``python -m benchmarks.gpu`` without a GPU: driver, bad parts, targets, report, a dry run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correctness, driver, report, sanitizer, targets
from benchmarks.gpu.cases import CASES, OpCase
from benchmarks.gpu.journal import Journal, OutOfTime, Skip, write_json
from benchmarks.gpu.measure import Floor, Provider, measure, without_gradients
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.regressions import regressions
from benchmarks.gpu.settings import ROOT, Settings
from benchmarks.gpu.targets import TARGETS

CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(driver, "GRACE", 0.5)
    return Settings(out=str(tmp_path), work=str(tmp_path / "work"), dry_run=True)


def run(settings: Settings, *names: str, budget: float = 300.0,
        results: dict[str, Any] | None = None) -> dict[str, Any]:
    parts = [Part(name, 30, "", function=f"tests.gpu_parts:{name}") for name in names]
    return driver.run_parts(parts, settings, budget, lambda _: None, results or {})


def rows(part: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["state"] for row in part["rows"]}


def test_a_crash_costs_one_row_and_no_other_part(settings: Settings) -> None:
    found = run(settings, "crashing", "good")
    assert rows(found["crashing"]) == {"before": "done", "crash": "failed", "after": "done"}
    assert "ended with code" in found["crashing"]["rows"][1]["reason"]
    assert found["crashing"]["state"] == "failed"
    assert found["good"]["state"] == "done"
    assert [row["value"] for row in found["good"]["rows"]] == [0, 1, 2]


def test_a_lost_device_is_left_for_a_new_process(settings: Settings) -> None:
    found = run(settings, "losing")["losing"]
    assert rows(found) == {"lost": "failed", "after": "done"}


def test_failures_and_missing_tools_are_told_apart(settings: Settings) -> None:
    found = run(settings, "failing", "skipped")
    assert rows(found["failing"]) == {"fails": "failed", "skips": "skipped", "after": "done"}
    assert found["failing"]["rows"][0]["reason"] == "ValueError: x: expected 1, got 2"
    assert found["failing"]["reason"] == "fails"
    assert found["skipped"] == {**found["skipped"], "state": "skipped",
                                "reason": "nothing to do here"}


def test_a_part_ends_at_its_deadline_with_its_children(settings: Settings) -> None:
    part = Part("hanging", 0.4, "", function="tests.gpu_parts:hanging")  # ten times that: dry run
    start = time.monotonic()
    found = driver.run_parts([part, Part("good", 30, "", function="tests.gpu_parts:good")],
                             settings, 300, lambda _: None, {})
    assert time.monotonic() - start < 200
    assert found["hanging"]["state"] in ("stopped", "failed")
    assert rows(found["hanging"]).get("hang", "failed") == "failed"
    assert found["good"]["state"] == "done"


def test_resuming_runs_what_is_missing(settings: Settings) -> None:
    found = run(settings, "failing")
    write_json(settings.journal("good"), {"rows": [{"name": "row 1", "state": "done",
                                                    "value": 77, "seconds": 0.0}]})
    parts = [Part(name, 30, "", function=f"tests.gpu_parts:{name}") for name in
             ("failing", "good")]
    kept = {row["name"] for row in found["failing"]["rows"] if row["state"] in ("done", "skipped")}
    assert kept == {"skips", "after"}
    before = settings.journal("failing").stat().st_mtime_ns
    again = driver.run_parts(parts, settings, 300, lambda _: None, {})
    assert settings.journal("failing").stat().st_mtime_ns == before  # all its rows have ended
    assert {row["name"]: row["value"] for row in again["good"]["rows"]} == {
        "row 0": 0, "row 1": 77, "row 2": 2}


def test_restoring_drops_rows_that_failed(settings: Settings) -> None:
    done, failed = ({"name": s, "state": s, "reason": ""} for s in ("done", "failed"))
    results = {name: {"rows": [done, failed]} for name in ("device", "rates", "networks")}
    write_json(settings.journal("rates"), {"rows": [failed]})  # what this machine has goes first
    driver.restore(settings, results)
    found = {name: json.loads(settings.journal(name).read_text())["rows"] for name in results}
    assert found == {"device": [], "rates": [], "networks": [done]}


def test_no_time_left(settings: Settings, tmp_path: Path) -> None:
    found = run(settings, "good", budget=1.0)
    assert found["good"]["state"] == "stopped"
    assert "--resume" in found["good"]["reason"]
    journal = Journal(tmp_path / "j.json", 1.0, lambda: None)
    with pytest.raises(OutOfTime):
        journal.row("long", dict, needs=5.0)


def test_a_journal_is_whole_after_every_row(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    journal = Journal(path, 60, lambda: None)
    for i in range(3):
        journal.row(str(i), lambda: {"seen": len(json.loads(path.read_text())["rows"])})
    assert [row["seen"] for row in journal.rows] == [1, 2, 3]
    assert not [p for p in tmp_path.iterdir() if p != path]


def _providers(wrong: bool = False) -> list[Provider]:
    x = torch.randn(64, 64)
    product = without_gradients(torch.mm, x, x)
    bad = without_gradients(lambda: x @ x + 1)
    return [Provider("reference", lambda: product),
            Provider("ours", lambda: bad if wrong else product, like="reference"),
            Provider("compiled", lambda: 1 / 0, like="reference", optional=True)]


@pytest.mark.parametrize("wrong", [False, True])
def test_a_row_is_judged_before_it_is_timed(wrong: bool) -> None:
    providers = _providers(wrong)
    truth = lambda: providers[0].make()().double()  # noqa: E731
    row = measure(providers, truth, CPU, floor=Floor(3 * 64 * 64 * 4), seconds=0.01, least=2,
                  small=True, matrix=True)
    found = row["providers"]
    assert found["ours"]["correct"] is not wrong
    assert found["compiled"] == {"skipped": "ZeroDivisionError: division by zero"}
    assert row["floor"]["seconds"] > 0 and row["rates"]["copy"] > 0
    assert found["ours"]["peak_bytes"] >= 64 * 64 * 4


def _entry(median: float, **more: Any) -> dict[str, Any]:
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "correct": True,
            "peak_bytes": 100, "error": 1e-3, **more}


def _results(ours: float = 1.0, correct: bool = True) -> dict[str, Any]:
    row = {"name": "spatially_varying_conv2d", "state": "done",
           "floor": {"seconds": 0.9, "bytes": 9, "operations": 0},
           "rates": {"copy": 10.0}, "providers": {
               "reference": _entry(6.0), "compiled": {"skipped": "it failed"},
               "ours": _entry(ours, correct=correct),
               "ours channels-last": _entry(2 * ours, correct=correct)}}
    return {"operations": {"state": "done", "reason": "", "rows": [row]}}


def _verdicts(parts: dict[str, Any]) -> dict[str, str]:
    return {f"{case}, {demand}": verdict for case, demand, _, verdict in report.target_rows(parts)
            if case.startswith("spatially")}


def test_targets() -> None:
    assert list(_verdicts(_results()).values()) == ["reached", "reached"]
    assert list(_verdicts(_results(ours=1.5)).values()) == ["MISSED", "MISSED"]
    wrong = _verdicts(_results(correct=False))
    assert set(wrong.values()) == {"fails its check against fp64"}
    assert {verdict for *_, verdict in report.target_rows({})} == {"not measured"}


def test_less_work_does_not_satisfy_a_target_for_all_of_it() -> None:
    row = {"name": "SPADE layer", "state": "done", "providers": {
        "reference": _entry(16.0), "ours": _entry(8.0), "ours, tables kept": _entry(0.1)}}
    parts = {"operations": {"state": "done", "reason": "", "rows": [row]}}
    target = next(t for t in TARGETS if t.row == "SPADE layer" and t.against == "reference")
    assert targets.measured(parts, target) == (2.0, "")


def test_every_target_names_a_part() -> None:
    assert {target.part for target in TARGETS} <= {part.name for part in PARTS}
    assert len(TARGETS) > 25


def test_report_and_regressions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {"format": 1, "dry_run": False, "commit": "abc", "machine": "gpu"}
    for day, ours in (("2026-01-01", 1.0), ("2026-01-02", 1.5)):
        write_json(tmp_path / f"gpu-{day}.json",
                   {**common, "date": day, "parts": _results(ours)})
    paths = [tmp_path / f"gpu-{day}.json" for day in ("2026-01-01", "2026-01-02")]
    assert command.latest(tmp_path, "gpu", False) == paths[1]
    assert command.latest(tmp_path, "gpu", False, before=paths[1]) == paths[0]
    written = report.write(paths[1], paths[0])
    text = written[1].read_text()
    worse = "slower: 1 s -> 1.5 s (1.50x)"
    assert f"- operations, spatially_varying_conv2d, ours: {worse}" in text
    assert f"**{worse}**" in text
    assert "skipped: it failed" in text
    assert "dry run" not in text
    assert {p.suffix for p in written} == {".json", ".md", ".png"}
    assert "MISSED" in capsys.readouterr().out


def test_names_of_results_fit_any_file_system() -> None:
    settings = Settings("", "", dry_run=True)
    assert command.machine_name(dry_run=True) == "cpu"
    assert Settings.from_json(settings.to_json()) == settings


def test_what_is_worse_than_before() -> None:
    before, now = _results(), _results()
    assert regressions(now, before) == {}
    (row,) = now["operations"]["rows"]
    row["providers"]["ours"].update(peak_bytes=120, correct=False)
    row["providers"]["ours channels-last"] = {"failed": "it broke"}
    row.update(state="failed", reason="it broke")
    place = ("operations", row["name"])
    assert regressions(now, before) == {
        (*place, ""): "failed: it broke",
        (*place, "ours"): "wrong: error 1.0e-03 -> 1.0e-03; more memory: 0.0 -> 0.0 MB",
        (*place, "ours channels-last"): "failed: it broke",
    }


def test_a_provider_that_fails_fails_its_row_and_no_other_provider() -> None:
    providers = [*_providers(), Provider("ours broken", lambda: 1 / 0, like="reference")]
    row = measure(providers, lambda: providers[0].make()().double(), CPU, small=True)
    assert row["state"] == "failed"
    assert row["reason"] == "ours broken: ZeroDivisionError: division by zero"
    assert row["providers"]["ours"]["median"] > 0
    parts = {"operations": {"state": "failed", "reason": "", "rows": [{"name": "x", **row}]}}
    results = {"machine": "gpu", "date": "", "dry_run": False, "commit": "", "parts": parts}
    assert "failed: ZeroDivisionError" in report.markdown(results, None)


def test_a_dry_run_is_no_result() -> None:
    arguments = command._parser().parse_args(["--dry-run", "--out", str(command.RESULTS)])
    with pytest.raises(Skip, match="a dry run's are none"):
        command._settings(arguments)
    rows = report.target_rows(_results(), dry_run=True)
    assert {value for _, _, value, _ in rows} == {"-"}
    assert not {verdict for *_, verdict in rows} & {"reached", "MISSED"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_in_one_shard(case: OpCase) -> None:
    def selects(expression: str) -> bool:
        found = re.sub(r"\b(?!and\b|or\b|not\b)\w+", lambda m: repr(m[0] in case.name), expression)
        return bool(eval(found))

    assert sum(map(selects, correctness.OPS)) == 1
    assert case.op in sanitizer.OPS


def test_every_op_has_a_case() -> None:
    folders = {path.parent.name for path in ROOT.glob("smis_kernels/ops/*/op.py")}
    cpu_only = {path for path in folders
                if not (ROOT / "csrc" / path / "cuda.cu").exists()
                and not (ROOT / "smis_kernels" / path / "triton.py").exists()}
    assert {case.op for case in CASES} == folders - cpu_only


def launch(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        (sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), *arguments), cwd=ROOT,
        env=environment, capture_output=True, text=True, check=False, timeout=1200)


def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    done = launch(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no CUDA GPU is visible to torch")
    assert done.stderr.count("\n") == 1
    done = launch(tmp_path, "--dry-run", "--resume")
    assert done.returncode == 2
    assert "error: --resume: no results of cpu" in done.stderr


def test_dry_run_of_a_timed_part(tmp_path: Path) -> None:
    done = launch(tmp_path, "--dry-run", "--only", "rates", "--commit", "1234")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("dry-run-cpu-*.json")
    results = json.loads(path.read_text())
    assert results["commit"] == "1234" and results["dry_run"]
    assert {name: part["state"] for name, part in results["parts"].items()} == dict.fromkeys(
        ("device", "build", "rates"), "done")
    assert "mean nothing" in path.with_suffix(".md").read_text()
