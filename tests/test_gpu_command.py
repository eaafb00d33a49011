"""``python -m benchmarks.gpu`` without a GPU: driver, bad parts, targets, report, a dry run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correctness, driver, plan, report, sanitizer, targets, tune, tune_rates
from benchmarks.gpu.cases import CASES, OpCase
from benchmarks.gpu.journal import Journal, OutOfTime, Skip, write_json
from benchmarks.gpu.measure import Floor, Provider, measure, without_gradients
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.regressions import regressions
from benchmarks.gpu.settings import ROOT, TUNED, Settings, environment
from benchmarks.gpu.targets import TARGETS
from smis_kernels import SPADE, norm_act
from smis_kernels.layout import planner
from smis_kernels.runtime import native, tuned
from smis_models.benchmark import timing

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
    again, late = {**done, "name": "again", "again": True}, {**failed, "name": "late", "late": True}
    rows = [late, again, done, failed]
    results = {name: {"rows": rows} for name in ("device", "build", "rates", "networks")}
    write_json(settings.journal("rates"), {"rows": [failed]})  # what this machine has goes first
    driver.restore(settings, results)
    found = {name: json.loads(settings.journal(name).read_text())["rows"] for name in results}
    kept = {"name": "late", "state": "late"}
    assert found == {"device": [], "build": [], "rates": [], "networks": [kept, done]}
    journal = Journal(settings.journal("networks"), 60, lambda: None)
    assert journal.late_last(["late", "new", "done"]) == ["new", "done", "late"]
    assert journal.row("late", lambda: {"ran": True})["ran"]  # type: ignore[index]
    driver.restore(settings, {"networks": results["networks"]})  # its state is known once only
    assert rows_of(settings, "networks")["late"] == "done"


def rows_of(settings: Settings, part: str) -> dict[str, str]:
    return {row["name"]: row["state"]
            for row in json.loads(settings.journal(part).read_text())["rows"]}


def test_a_row_ended_at_the_deadline_is_marked(settings: Settings) -> None:
    write_json(settings.journal("networks"), {"rows": [{"name": "long", "state": "running"},
                                                       {"name": "done", "state": "done"}]})
    driver._fail_running_row(settings, "networks", "ended", late=True)
    driver.restore(settings, {"networks": {"rows": []}})
    assert rows_of(settings, "networks") == {"long": "late", "done": "done"}


def test_the_end_of_a_failed_part_s_log_is_printed_and_kept(
        settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run(settings, "good", "failing", "crashing")
    printed, kept = capsys.readouterr().out, settings.failures.read_text()
    assert settings.failures.parent == Path(settings.out)
    for text in ("failing|   fails: failed: ValueError: x: expected 1, got 2", "crashing| "):
        assert text in printed
    assert kept.count("== ") == 2 and "fails: failed: ValueError: x: expected 1, got 2" in kept
    assert "row 0" not in kept and "good|" not in printed


def test_what_this_build_lacks_is_skipped_and_tried_again(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native.STATUS, "cpu",
                        native.NativeStatus("cpu", False, reason="nvcc failed", cure="build it"))
    x = torch.randn(1, 3, 4, 4)
    plain = without_gradients(torch.relu, x)
    ours = Provider("ours", lambda: without_gradients(
        lambda: norm_act(x, norm="none", activation="relu")), like="reference")
    reference = Provider("reference", lambda: plain)
    form = Provider("ours otherwise", lambda: plain, like="reference")
    journal = Journal(tmp_path / "j.json", 60, lambda: None)
    truth = lambda: x.double().relu()  # noqa: E731
    row = journal.row("alone", lambda: measure([reference, ours], truth, CPU, small=True))
    assert row is not None and row["state"] == "skipped" and row["again"]
    assert "nvcc failed" in row["reason"]
    row = journal.row("two", lambda: measure([reference, ours, form], truth, CPU, small=True))
    assert row is not None and row["state"] == "done" and row["again"]
    assert "nvcc failed" in row["providers"]["ours"]["skipped"]
    assert row["providers"]["ours otherwise"]["median"] > 0
    state = {"compiled": False}

    def steady() -> torch.Tensor:  # as a layout that its first call compiles
        if not state["compiled"]:
            norm_act(x, norm="none", activation="relu")
        state["compiled"] = True
        return x.relu()

    ours = Provider("ours", lambda: steady, like="reference")
    row = journal.row("steady", lambda: measure([reference, ours], truth, CPU, small=True))
    assert row is not None and row["state"] == "done" and "again" not in row


def test_a_failed_library_stops_no_other_part() -> None:
    assert [part.name for part in PARTS if part.fatal] == ["device"]
    assert [part.name for part in PARTS if part.again] == ["device", "build"]


def test_measured_settings_reach_every_later_part(settings: Settings, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    assert TUNED == tuned.ENVIRONMENT
    monkeypatch.delenv(TUNED, raising=False)
    table = tmp_path / "x.tuned.json"
    with_table = Settings(**{**json.loads(settings.to_json()), "table": str(table)})
    assert TUNED not in environment(with_table)
    write_json(table, {"settings": {}})
    assert environment(with_table)[TUNED] == str(table)
    monkeypatch.setenv(TUNED, "none")
    assert environment(with_table)[TUNED] == "none"


def test_the_plan_fills_each_call_in_order() -> None:
    calls, rest = plan.plan(300.0, {})
    assert not {"networks", "training"} & calls[0].keys()
    for call in calls:
        assert {"device", "build"} <= call.keys()
        grouped = [max(call.get(part.name, 0.0) for part in group)
                   for group in driver.grouped(PARTS)]
        assert sum(grouped) <= 300.0
    for part in PARTS:
        if not part.again:
            given = sum(call.get(part.name, 0.0) for call in calls)
            assert given + rest.get(part.name, 0.0) == pytest.approx(part.seconds)
    results = {"calls": [{"seconds": {"build": 90.0, "tune": 30.0}},
                         {"seconds": {"build": 7.0, "tune": 25.0, "networks": 50.0}}],
               "parts": {"build": {"state": "done"}, "tune": {"state": "done"},
                         "networks": {"state": "stopped"}}}
    assert plan.measured_seconds(results) == {"build": 7.0, "tune": 55.0}
    calls, _ = plan.plan(300.0, results)
    assert calls[0]["build"] == 7.0 and "tune" not in calls[0]
    assert "build* 7 s" in plan.text(300.0, results, "abc", "f.json")
    assert "--commit abc --out OUT --from f.json" in plan.text(300.0, results, "abc", "f.json")


def test_networks_are_compiled_before_the_next_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import networks

    class Names(Journal):
        def row(self, name: str, *_: Any) -> None:  # type: ignore[override]
            asked.append(name)

    asked: list[str] = []
    monkeypatch.setattr(networks, "release", lambda: None)
    networks.run(Names(Path("no file"), 60, lambda: None), Settings("", ""))
    for target in TARGETS:
        if target.part == "networks" and target.row.endswith("compiled"):
            plain = target.row.removesuffix(" compiled")
            assert asked.index(target.row) == asked.index(plain) + 1


def test_times_on_a_gpu_are_of_graph_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def graphed(calls: Any) -> Any:
        events.append(f"captured {len(calls)}")
        return lambda: events.append("replayed")

    def clock(call: Any, repeats: int) -> float:
        call()
        return 1e-3 if events[-1] == "eager" else 5e-3

    monkeypatch.setattr(timing, "graphed", graphed)
    monkeypatch.setattr(timing, "cuda_seconds", clock)
    call = lambda: events.append("eager") or torch.zeros(1)  # noqa: E731
    assert timing.replay_seconds(call, torch.device("cuda")) == pytest.approx(5e-3 / 5)
    assert events[:3] == ["eager", "eager", "captured 5"]
    assert set(events[3:]) == {"replayed"} and len(events) == 3 + 8
    events.clear()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    row = tune.choose("kernel", "key", [{"tile": 1}, {"tile": 2}], lambda: call,
                      torch.device("cuda"))
    assert events.count("captured 5") == 2 and row["usual_seconds"] == pytest.approx(1e-3)


def test_rates_are_the_inverse_of_the_planner_s_costs() -> None:
    """Times made from known rates and fixed costs give these back."""
    known = planner.Rates(dense=900.0, two_level=300.0, one_level=200.0, sums=20.0,
                          fixed_dense=9e3, fixed_two_level=30e3, fixed_one_level=15e3)
    norms = []
    for channels, pixels, v, u in ((128, 65536, 900, 2500), (512, 4096, 600, 1300),
                                   (1024, 1024, 300, 500), (1024, 64, 60, 64)):
        norm = SPADE(channels, 183)

        class Level:
            repeats, counts = True, (v, u)

        cost = planner.costs(norm, Level(), pixels, known)  # type: ignore[arg-type]
        convs = 2 * norm.mlp_gamma.weight.numel()
        norms.append({
            "times": {**{path: 7e3 + cost[path] for path in tune_rates.PATHS}, "shared": 7e3,
                      "sums": 4e3 + u * 18 * channels / known.sums},
            "work": {"dense": pixels * (convs + norm.mlp_shared[0].weight.numel()),
                     "two_level": v * convs, "one_level": u * convs, "sums": u * 18 * channels},
            "embedding": v * 9 * norm.hidden})
    found, misfits = tune_rates.fitted(norms)
    assert found == pytest.approx(known._asdict(), rel=1e-6)
    assert max(misfits.values()) < 1e-6
    norms[0]["times"]["dense"] *= 2
    assert tune_rates.fitted(norms)[1]["dense"] > 0.1


def test_a_fit_never_promises_a_free_path() -> None:
    assert tune_rates.fit([(1.0, 12.0), (2.0, 14.0), (4.0, 18.0)]) == pytest.approx((10.0, 2.0))
    for points in ([(1.0, 5.0), (2.0, 4.0)], [(1.0, 1.0), (2.0, 4.0)], [(3.0, 6.0)]):
        fixed, slope = tune_rates.fit(points)
        assert fixed == 0.0 and slope > 0


def test_no_time_left(settings: Settings, tmp_path: Path) -> None:
    found = run(settings, "good", budget=1.0)
    assert found["good"]["state"] == "stopped"
    assert "--from" in found["good"]["reason"]
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


def test_a_report_says_which_rows_ran_untuned() -> None:
    parts = _results()
    (row,) = parts["operations"]["rows"]
    results = {"machine": "gpu", "date": "", "dry_run": False, "commit": "", "parts": parts}
    assert "Tuned settings of the timed rows: none." in report.markdown(results, None)
    parts["operations"]["rows"].append({**row, "name": "other", "tuned": "H200, commit 1"})
    assert "of the timed rows: H200, commit 1; none." in report.markdown(results, None)


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
                and not (ROOT / "smis_kernels" / "ops" / path / "triton.py").exists()}
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


def copy_of_the_tree(place: Path) -> Path:
    left_out = shutil.ignore_patterns("build", ".git", ".*cache", "__pycache__", ".venv*")
    shutil.copytree(ROOT, place, symlinks=True, ignore=left_out)
    return place


def test_three_calls_on_fresh_machines(tmp_path: Path) -> None:
    """Three copies of the tree, three empty folders; one file goes from each call to the next."""
    calls = (("rates", "tune", "--budget", "14"), ("rates", "tune"),
             ("rates", "tune", "operations"))  # the first finishes what it has time for
    carried: Path | None = None
    files: list[dict[str, Any]] = []
    for number, parts in enumerate(calls):
        root, out = copy_of_the_tree(tmp_path / f"tree {number}"), tmp_path / f"out {number}"
        out.mkdir()
        earlier: tuple[str, ...] = ()
        if carried is not None:
            shutil.copy(carried, root / carried.name)
            earlier = ("--from", carried.name)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
        environment.pop(TUNED, None)
        done = subprocess.run(
            (sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), "--commit",
             str(number), *earlier, "--only", *parts), cwd=root, env=environment,
            capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(list(out.iterdir())) <= 8 and all(path.is_file() for path in out.iterdir())
        (carried,) = [path for path in out.glob("*.json") if ".tuned" not in path.name]
        files.append(json.loads(carried.read_text()))
        shutil.rmtree(root)
    assert len({path.name for path in tmp_path.glob("out */*.json")
                if ".tuned" not in path.name}) == 1
    for before, after in pairwise(files):  # measured once, the same ever after
        for name in ("rates", "tune", "operations"):
            ended = [row for row in before["parts"].get(name, {"rows": []})["rows"]
                     if row["state"] == "done"]
            kept = {row["name"]: row for row in after["parts"][name]["rows"]} if ended else {}
            assert ended == [kept[row["name"]] for row in ended]
    last = files[-1]
    assert {part: last["parts"][part]["state"] for part in ("rates", "tune", "operations")} == {
        "rates": "done", "tune": "done", "operations": "done"}
    assert [call["commit"] for call in last["calls"]] == ["0", "1", "2"]
    assert last["tuned"]["settings"] and last["tuned"] == files[1]["tuned"]
    assert {row["tuned"] for row in last["parts"]["operations"]["rows"]} == {
        f"cpu, {last['tuned']['date']}, commit {last['tuned']['commit']}"}
    assert not any(row["tuned"] for row in files[0]["parts"]["rates"]["rows"])
    assert last["machine"] == "cpu"


def test_from_takes_results_of_the_same_machine_only(tmp_path: Path) -> None:
    path = tmp_path / "h200-2026-01-01-000000.json"

    def refusal(*arguments: str) -> str:
        with pytest.raises(Skip) as caught:
            command._settings(command._parser().parse_args(
                ["--dry-run", "--out", str(tmp_path / "out"), "--from", str(path), *arguments]))
        return str(caught.value)

    assert "expected results of python -m benchmarks.gpu" in refusal()
    path.write_text("{")
    assert "expected results of python -m benchmarks.gpu" in refusal()
    write_json(path, {"format": 1, "parts": {}, "dry_run": False, "machine": "NVIDIA H200"})
    assert "is of a run on a GPU, and this is none" in refusal()
    write_json(path, {"format": 1, "parts": {}, "dry_run": True, "machine": "NVIDIA H200"})
    assert "is of NVIDIA H200, this is cpu" in refusal()
    assert command.stem("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    done = launch(tmp_path, "--resume", "--from", str(path))
    assert done.returncode == 2 and "not allowed with" in done.stderr
    done = launch(tmp_path, "--plan", "--commit", "abc", "--budget", "400")
    assert done.returncode == 0 and done.stdout.startswith("3 calls of 400 s")
