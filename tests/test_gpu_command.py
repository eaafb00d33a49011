"""``python -m benchmarks.gpu`` without a GPU: bad parts, going on, targets, report, a dry run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checks, report, timed, tune, tune_rates, worker
from benchmarks.gpu.op_cases import CASES, GpuCase
from benchmarks.gpu.parts import PARTS, Part, measured_seconds, plan, plan_text
from benchmarks.gpu.results import (
    ROOT,
    TUNED,
    Journal,
    OutOfTime,
    Settings,
    Skip,
    environment,
    going_on,
    read_json,
    write_json,
)
from smis_kernels import SPADE, norm_act
from smis_kernels.layout import planner
from smis_kernels.runtime import native, tuned
from smis_models.benchmark import timing
from smis_models.benchmark.case import Case, Provider, Setting
from smis_models.benchmark.records import Record, load

CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(worker, "GRACE", 0.5)
    monkeypatch.setattr(Settings, "log", lambda self, part: tmp_path / "logs" / f"{part}.log")
    return Settings(str(tmp_path / "results.json"), dry_run=True)


def run(settings: Settings, *names: str, budget: float = 300.0, seconds: float = 30.0
        ) -> dict[str, Any]:
    chosen = [Part(name, seconds, "", f"tests.gpu_parts:{name}") for name in names]
    worker.run_parts(chosen, settings, budget)
    found: dict[str, Any] = read_json(settings.path)["parts"]
    return found


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
    start = time.monotonic()
    budget = 10 * 30.0 + 4.0  # what a dry run keeps for the part behind it, and four seconds
    chosen = [Part("hanging", 0.4, "", "tests.gpu_parts:hanging"),
              Part("good", 30, "", "tests.gpu_parts:good")]
    worker.run_parts(chosen, settings, budget)
    found = read_json(settings.path)["parts"]
    assert time.monotonic() - start < 200
    assert found["hanging"]["state"] == "stopped"
    assert rows(found["hanging"]).get("hang", "failed") == "failed"
    assert found["good"]["state"] == "done"


def test_what_is_measured_is_kept(settings: Settings) -> None:
    write_json(settings.path, {"benchmarks": [], "parts": {"good": {"rows": [
        {"name": "row 1", "state": "done", "value": 77, "seconds": 0.0}]}}})
    found = run(settings, "good")["good"]
    assert {row["name"]: row["value"] for row in found["rows"]} == {
        "row 0": 0, "row 1": 77, "row 2": 2}


def test_going_on_drops_rows_that_failed_and_keeps_their_records() -> None:
    done, failed = ({"name": s, "state": s, "reason": ""} for s in ("done", "failed"))
    again, late = {**done, "name": "again", "again": True}, {**failed, "name": "late", "late": True}
    skipped, cut = {**done, "name": "skipped", "state": "skipped"}, {"name": "cut",
                                                                     "state": "running"}
    names = ("done", "failed", "again", "late", "skipped", "cut")
    results = going_on({
        "benchmarks": [{"group": name} for name in names],
        "parts": {"device": {"state": "done", "rows": [done, late]},
                  "networks": {"state": "done", "rows": [late, again, done, failed, skipped, cut]},
                  "rates": {"state": "done", "rows": [{**done, "name": "rate"}]}}}, ["device"])
    kept = {"name": "late", "state": "late"}
    assert {name: part["rows"] for name, part in results["parts"].items()} == {
        "device": [], "networks": [kept, done, skipped], "rates": [{**done, "name": "rate"}]}
    assert [part.name for part in command.unfinished(None, results["parts"])] == [
        part.name for part in PARTS if part.name != "rates"]
    assert [part.name for part in command.unfinished(["rates"], results["parts"])] == [
        "device", "build"]
    assert [e["group"] for e in results["benchmarks"]] == list(names)  # until there are others


def test_a_late_row_is_tried_last_and_once(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"benchmarks": [], "parts": {"networks": {"rows": [
        {"name": "late", "state": "late"}, {"name": "done", "state": "done"}]}}})
    journal = Journal(path, "networks")
    assert journal.late_last(["late", "new", "done"]) == ["new", "done", "late"]
    assert journal.row("late", lambda: {"ran": True})["ran"]  # type: ignore[index]
    assert rows(read_json(path)["parts"]["networks"]) == {"late": "done", "done": "done"}


def test_the_end_of_a_failed_part_s_log_is_printed_and_kept(
        settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run(settings, "good", "failing", "crashing")
    printed = capsys.readouterr().out
    kept = Path(settings.path).with_suffix(".failed.log").read_text()
    for text in ("failing|   fails: failed: ValueError: x: expected 1, got 2", "crashing| "):
        assert text in printed
    assert kept.count("== ") == 2 and "fails: failed: ValueError: x: expected 1, got 2" in kept
    assert "row 0" not in kept and "good|" not in printed


def case_of(*forms: Provider) -> Case:
    def make_inputs(setting: Setting) -> tuple[torch.Tensor]:
        return (setting.draw(1, 3, 4, 4),)

    reference = Provider("reference", torch.relu)
    return Case("relu/small", make_inputs, (reference, *forms))


def test_what_this_build_lacks_is_skipped_and_tried_again(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native.STATUS, "cpu",
                        native.NativeStatus("cpu", False, reason="nvcc failed", cure="build it"))
    setting = Setting(CPU, tiny=True, seconds=0.0)
    ours = Provider("fused", lambda x: norm_act(x, norm="none", activation="relu"))
    other = Provider("fused otherwise", torch.relu)
    journal = Journal(tmp_path / "j.json", "operations")
    row = journal.row("alone", lambda: timed.timed(case_of(ours), setting))
    assert row is not None and row["state"] == "skipped" and row["again"]
    assert "nvcc failed" in row["reason"]
    row = journal.row("two", lambda: timed.timed(case_of(ours, other), setting))
    assert row is not None and row["state"] == "done" and row["again"]
    assert "nvcc failed" in row["missing"]["fused"]
    assert [r.provider for r in load(journal.path)] == ["reference", "fused otherwise"]
    broken = Provider("fused broken", lambda x: x.no_such_thing)
    row = journal.row("broken", lambda: timed.timed(case_of(other, broken), setting))
    assert row is not None and row["state"] == "failed"
    assert row["reason"].startswith("fused broken: AttributeError")


def test_a_row_s_records_replace_those_of_before(tmp_path: Path) -> None:
    setting = Setting(CPU, tiny=True, seconds=0.0)
    case = case_of(Provider("fused", torch.relu))
    for commit in ("a", "b"):
        journal = Journal(tmp_path / f"{commit}.json", "operations", commit=commit)
        journal.content["benchmarks"] = [{"group": case.group}, {"group": "another"}]
        row = journal.row(case.group, lambda: timed.timed(case, setting))
        assert row is not None and row["commit"] == commit and "records" not in row
        entries = read_json(journal.path)["benchmarks"]
        assert [e["group"] for e in entries] == ["another", case.group, case.group]
        assert {r.commit for r in map(Record.from_entry, entries[1:])} == {commit}


def test_a_failed_library_stops_no_other_part() -> None:
    assert [part.name for part in PARTS if part.fatal] == ["device"]
    assert [part.name for part in PARTS if part.again] == ["device", "build"]


def test_the_package_is_not_loaded_before_it_is_built() -> None:
    program = ("import sys, benchmarks.gpu.worker, benchmarks.gpu.machine\n"
               "print([name for name in sys.modules if name.startswith('smis_')])")
    done = subprocess.run((sys.executable, "-c", program), cwd=ROOT, capture_output=True,
                          text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == "[]"


def test_measured_settings_reach_every_later_part(settings: Settings,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    assert TUNED == tuned.ENVIRONMENT
    monkeypatch.delenv(TUNED, raising=False)
    assert TUNED not in environment(settings)
    write_json(settings.table, {"settings": {}})
    assert environment(settings)[TUNED] == str(settings.table)
    monkeypatch.setenv(TUNED, "none")
    assert environment(settings)[TUNED] == "none"


def test_the_plan_fills_each_call_in_order() -> None:
    calls, rest = plan(300.0, {})
    assert not {"networks", "training"} & calls[0].keys()
    for call in calls:
        assert {"device", "build"} <= call.keys()
        assert sum(call.values()) <= 300.0
    for part in PARTS:
        if not part.again:
            given = sum(call.get(part.name, 0.0) for call in calls)
            assert given + rest.get(part.name, 0.0) == pytest.approx(part.seconds)
    results = {"calls": [{"seconds": {"build": 90.0, "tune": 30.0}},
                         {"seconds": {"build": 7.0, "tune": 25.0, "networks": 50.0}}],
               "parts": {"build": {"state": "done"}, "tune": {"state": "done"},
                         "networks": {"state": "stopped"}}}
    assert measured_seconds(results) == {"build": 7.0, "tune": 55.0}
    calls, _ = plan(300.0, results)
    assert calls[0]["build"] == 7.0 and "tune" not in calls[0]
    text = plan_text(300.0, results, "abc", "f.json")
    assert "build* 7 s" in text
    assert "--commit abc --out OUT --from f.json" in text


def test_networks_are_compiled_before_the_next_network() -> None:
    names = [case.name for case in timed.network_cases()]
    compiled = [name for name in names if "/compiled_" in name]
    assert len(compiled) == 5
    for name in compiled:
        assert names.index(name) == names.index(name.replace("compiled_", "")) + 1


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
    journal = Journal(tmp_path / "j.json", "part", 1.0)
    with pytest.raises(OutOfTime):
        journal.row("long", dict, needs=5.0)


def test_a_journal_is_whole_after_every_row(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    journal = Journal(path, "part")
    for i in range(3):
        journal.row(str(i), lambda: {"seen": len(read_json(path)["parts"]["part"]["rows"])})
    assert [row["seen"] for row in journal.rows] == [1, 2, 3]
    assert not [p for p in tmp_path.iterdir() if p != path]


def record(provider: str, seconds: float, **values: Any) -> Record:
    (case,) = (c for c in timed.operation_cases() if c.name.startswith("spatially") and
               c.direction == "forward")
    fields: dict[str, Any] = {
        "group": case.group, "provider": provider, "times": [seconds] * 3, "device": "cuda",
        "dtype": "bfloat16", "shape": (4, 2), "bytes": 900, "macs": 0, "peak_memory": 100,
        "output_bytes": 100, "max_rel_error": 1e-3, "correct": True, "copy_bandwidth": 1000.0,
        "memory_bound": True, "targets": case.targets}
    return Record(**{**fields, **values})


def measured(ours: float = 1.0, correct: bool = True) -> list[Record]:
    return [record("reference", 6.0), record("channels_last", 5.5),
            record("fused", ours, correct=correct),
            record("fused channels_last", 2 * ours, correct=correct)]


def verdict(records: list[Record], dry_run: bool = False) -> str:
    return dict(report.target_rows(records, dry_run))[record("fused", 1.0).group]


def test_targets() -> None:
    assert verdict(measured()) == (
        ">= 80% of floor: 90.0% reached; >= 5x eager: 5.50x reached")
    assert verdict(measured(1.5)).count("MISSED") == 2
    assert verdict(measured(correct=False)) == (
        ">= 80% of floor: - MISSED; >= 5x eager: - MISSED")
    assert {text for _, text in report.target_rows([])} == {"not measured"}
    assert "1 of 2 MISSED" in report.target_rows(
        [record("fused", 1.0), record("fused eager", 1.0, correct=False)])[-1][1]
    assert verdict(measured(), dry_run=True) == "dry run: computed, says nothing"


def test_the_demands_on_an_h200_are_these() -> None:
    found = {case.name: case.targets for cases in timed.ALL.values() for case in cases()
             if case.targets}
    assert found == {
        "modulation/of_windows_8x128x256x256": {
            "floor": 0.85, "compiled": 1.0, "fused indexed: floor": 0.85,
            "fused indexed: compiled": 1.5},
        "spade_layer/layout_given_batch_8": {"eager": 15, "compiled": 6},
        "conditional_conv2d/forward_4x128x256x256": {
            "compiled": 1.2, "memory": 0.1, "memory channels_last": 0.1, "memory compiled": 0.1,
            "floor": 0.6},
        "spatially_varying_conv2d/forward_4x128x256x256": {"floor": 0.8, "eager": 5},
        "instance_pool/64x1024x2048_loop": {"floor": 0.75, "eager": 300, "index_add": 5},
        "class_crops/ade20k_batch_4": {"eager": 200},
        "groupdnet_deepfashion/batch_1": {"reference fp32": 6},
        "groupdnet_deepfashion/compiled_batch_1": {"compiled": 2.5},
        "spade_coco/batch_1": {"reference fp32": 8}, "spade_coco/compiled_batch_1": {"compiled": 3},
        "groupdnet_ade20k/batch_1": {"reference fp32": 10},
        "groupdnet_ade20k/compiled_batch_1": {"compiled": 4},
        "ccfpse_coco/batch_4": {"reference fp32": 4, "memory channels_last": 0.25},
        "ccfpse_coco/compiled_batch_4": {"compiled": 1.3},
        "spade_coco/batch_16": {"reference fp32": 5},
        "spade_coco/compiled_batch_16": {"compiled": 3},
        **{f"{name}/training_step_batch8": {
            "eager": 2.5, "memory": 0.6, "memory channels_last": 0.6}
           for name in ("groupdnet_deepfashion", "spade_coco")},
    }


def test_every_timed_case_is_judged_as_a_gpu_s() -> None:
    cases = [case for make in timed.ALL.values() for case in make()]
    assert len({case.group for case in cases}) == len(cases) == 30
    for case in cases:
        assert case.factor == 1.5 and not case.every_map
        assert (case.units, case.floor) == (0.5, None) or case.floor == 2**-8
        assert sum(p.name == "fused" for p in case.providers) == 1


def test_report_and_regressions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"name": record("fused", 1.0).group, "state": "done", "missing": {"compiled": "it fell"}}
    for day, ours in (("2026-01-01", 1.0), ("2026-01-02", 1.5)):
        machine = {"name": "machine", "state": "failed" if ours > 1 else "done", "reason": "hot"}
        write_json(tmp_path / f"gpu-{day}.json", {
            "format": 2, "dry_run": False, "commit": "abc", "machine": "gpu", "date": day,
            "benchmarks": [r.to_entry() for r in measured(ours)],
            "parts": {"device": {"state": "done", "rows": [machine]},
                      "operations": {"state": "done", "reason": "", "rows": [row]}}})
    paths = [tmp_path / f"gpu-{day}.json" for day in ("2026-01-01", "2026-01-02")]
    assert command.latest(tmp_path, "gpu", False) == paths[1]
    assert command.latest(tmp_path, "gpu", False, before=paths[1]) == paths[0]
    written = report.write(paths[1], paths[0])
    text = written[1].read_text()
    assert f"- {row['name']}, fused: slower: 1 s -> 1.5 s (1.50x)" in text
    assert "- device, machine: failed: hot" in text
    assert f"- operations, {row['name']}, compiled: it fell" in text
    assert "dry run" not in text and "Tuned settings of the timed rows: none." in text
    assert {p.suffix for p in written} == {".json", ".md", ".png"}
    assert "MISSED" in capsys.readouterr().out


def test_a_dry_run_is_no_result() -> None:
    arguments = command.parser().parse_args(["--dry-run", "--out", str(command.RESULTS)])
    with pytest.raises(Skip, match="a dry run's are none"):
        command.prepare(arguments)
    assert command.machine_name(dry_run=True) == "cpu"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_in_one_shard(case: GpuCase) -> None:
    def selects(expression: str) -> bool:
        found = re.sub(r"\b(?!and\b|or\b|not\b)\w+", lambda m: repr(m[0] in case.name), expression)
        return bool(eval(found))

    assert sum(map(selects, checks.SHARDS)) == 1


def test_what_the_checks_make_of_their_processes(tmp_path: Path, settings: Settings) -> None:
    xml = tmp_path / "junit.xml"
    xml.write_text('<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure '
                   'message="wrong&#10;more"/></testcase><testcase name="c"><skipped '
                   'message="the cuda library is not loaded"/></testcase></testsuite></testsuites>')
    row = checks.tested(xml, 1, "")
    assert (row["passed"], row["state"], row["again"]) == (1, "failed", True)
    assert row["reason"] == "1 failed, first b: wrong"
    assert checks.tested(tmp_path / "none", 3, "x\ny\n")["reason"] == "pytest ended with 3: y"
    clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert checks.sanitized(None, 0, clean) == {"errors": 0}
    with pytest.raises(RuntimeError, match="2 errors, code 99: Invalid __global__ read"):
        checks.sanitized(None, 99, "========= Invalid __global__ read\n"
                                   "========= ERROR SUMMARY: 2 errors\n")
    with pytest.raises(Skip, match="no cuda"):
        checks.sanitized("no cuda", 0, clean)
    row = checks.compared(True, 1, "a 1e-7 ok\nb 0.5   FAIL\n")
    assert (row["passed"], row["failed"], row["reason"]) == (1, 1, "b 0.5 FAIL")
    job = checks.Job("x", (sys.executable, "-c", "print(6 * 7)"), lambda code, out: {"said": out})
    assert job.run(60.0)["said"] == "42\n"
    slow = replace(job, command=(sys.executable, "-c", "import time; time.sleep(60)"))
    assert slow.run(0.0)["state"] == "failed"
    names = [job.name for job in checks.goldens(replace(settings, parity="x", dry_run=False))]
    assert names == [f"parity: {name}" for name in checks.FAMILIES]


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


def copy_of_the_tree(place: Path) -> Path:
    left_out = shutil.ignore_patterns("build", ".git", ".*cache", "__pycache__", ".venv*")
    shutil.copytree(ROOT, place, symlinks=True, ignore=left_out)
    return place


def test_two_calls_on_fresh_machines(tmp_path: Path) -> None:
    """Two copies of the tree, two empty folders; one file goes from a call to the next."""
    files: list[dict[str, Any]] = []
    carried: Path | None = None
    for number, parts in enumerate((("rates", "tune"), ("rates", "tune", "operations"))):
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
        assert "mean nothing" in carried.with_suffix(".md").read_text()
        files.append(json.loads(carried.read_text()))
        if number == 0:  # as a call that had no time for the last row leaves it
            cut = files[0]["parts"]["rates"]["rows"].pop()
            files[0]["parts"]["rates"].update(state="stopped", reason="time budget")
            write_json(carried, files[0])
        shutil.rmtree(root)
    before, last = files
    assert len({path.name for path in tmp_path.glob("out */*.json")
                if ".tuned" not in path.name}) == 1
    for name in ("rates", "tune"):  # measured once, the same ever after
        ended = [row for row in before["parts"][name]["rows"] if row["state"] == "done"]
        kept = {row["name"]: row for row in last["parts"][name]["rows"]}
        assert ended == [kept[row["name"]] for row in ended]
    (again,) = (row for row in last["parts"]["rates"]["rows"] if row["name"] == cut["name"])
    assert (cut["state"], cut["commit"], again["state"], again["commit"]) == (
        "done", "0", "done", "1")
    assert {part: last["parts"][part]["state"] for part in last["parts"]} == dict.fromkeys(
        ("device", "build", "rates", "tune", "operations"), "done")
    assert [call["commit"] for call in last["calls"]] == ["0", "1"]
    assert last["tuned"]["settings"] and last["tuned"] == before["tuned"]
    assert {row["tuned"] for row in last["parts"]["operations"]["rows"]} == {
        f"cpu, {last['tuned']['date']}, commit {last['tuned']['commit']}"}
    assert not any(row["tuned"] for row in before["parts"]["rates"]["rows"])
    assert last["machine"] == "cpu" and last["dry_run"]


def test_from_takes_results_of_the_same_machine_only(tmp_path: Path) -> None:
    path = tmp_path / "h200-2026-01-01-000000.json"

    def refusal(*arguments: str) -> str:
        with pytest.raises(Skip) as caught:
            command.prepare(command.parser().parse_args(
                ["--dry-run", "--out", str(tmp_path / "out"), "--from", str(path), *arguments]))
        return str(caught.value)

    assert "expected results of python -m benchmarks.gpu" in refusal()
    path.write_text("{")
    assert "expected results of python -m benchmarks.gpu" in refusal()
    write_json(path, {"format": 2, "benchmarks": [], "parts": {}, "dry_run": False,
                      "machine": "NVIDIA H200"})
    assert "is of a run on a GPU, and this is none" in refusal()
    write_json(path, {"format": 2, "benchmarks": [], "parts": {}, "dry_run": True,
                      "machine": "NVIDIA H200"})
    assert "is of NVIDIA H200, this is cpu" in refusal()
    assert command.stem("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    done = launch(tmp_path, "--resume", "--from", str(path))
    assert done.returncode == 2 and "not allowed with" in done.stderr
    done = launch(tmp_path, "--plan", "--commit", "abc", "--budget", "400")
    assert done.returncode == 0 and done.stdout.startswith("3 calls of 400 s")
