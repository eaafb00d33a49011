"""The benchmark harness: honest ratios, exact memory, records that survive the trip."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smis_models import benchmark as harness
from smis_models import create_model
from smis_models.benchmark import evaluation, records, timing, training
from smis_models.benchmark.case import Case, Setting, channels_last, convert, nbytes, providers
from smis_models.benchmark.measure import bind
from smis_models.data.scenes import sample_scene
from smis_models.families import with_options
from smis_models.io import images
from smis_models.metrics import PixelDistance

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def _inputs(setting):
    x = torch.arange(24, dtype=setting.dtype).view(1, 2, 3, 4)
    return x, x + 1


def _case(fused=lambda x, y: x * y, **options):
    return Case(name="product/small", make_inputs=_inputs, seconds=0.02,
                providers=providers(lambda x, y: x * y, fused, compile=False), **options)


def _measured(case):
    return {r.provider: r for r in harness.measure(case, Setting(CPU))}


def test_every_provider_is_measured_in_one_run():
    rows = _measured(_case())
    assert list(rows) == ["reference", "channels_last", "fused"]
    assert len({len(r.times) for r in rows.values()}) == 1
    assert len({r.copy_bandwidth for r in rows.values()}) == 1
    assert all(r.correct and r.median > 0 for r in rows.values())
    assert rows["fused"].bytes == 3 * 24 * 4
    assert rows["fused"].shape == (1, 2, 3, 4)


@pytest.mark.parametrize("wrong", [lambda x, y: x * y + 1, lambda x, y: x * y * float("nan")])
def test_no_speedup_is_reported_for_a_wrong_result(wrong):
    rows = _measured(_case(wrong, targets={"reference": 0.0, "copy": 0.0}))
    assert not rows["fused"].correct
    assert records.speedup(rows) is None
    assert [reached for *_, reached in records.checks(rows)] == [False, False]
    assert "WRONG" in harness.markdown(list(rows.values()))


def test_a_result_of_another_shape_is_refused():
    with pytest.raises((RuntimeError, ValueError)):
        _measured(_case(lambda x, y: (x * y)[..., :2]))


@pytest.mark.parametrize("direction", ["forward", "backward", "step"])
def test_directions_compute_what_they_say(direction):
    case = _case(direction=direction, leaves=() if direction == "forward" else (0, 1))
    x, y = (v + 1 for v in _inputs(Setting(CPU)))
    outputs = bind(case, case.providers[0].run, (x, y))()
    if direction == "forward":
        torch.testing.assert_close(outputs, x * y)
        return
    dx, dy = outputs[-2:]
    torch.testing.assert_close(dx / y, dy / x)  # both are the cotangent
    assert len(outputs) == (2 if direction == "backward" else 3)


def test_interleaving_rotates_the_order():
    order = []
    calls = {name: lambda name=name: (order.append(name), time.sleep(2e-3)) for name in "abc"}
    times = timing.interleave(calls, 0.0, least=3)
    assert order[-9:] == list("abcbcacab")
    assert all(len(t) == 3 and min(t) >= 2e-3 for t in times.values())


def test_peak_memory_is_that_of_live_allocations():
    x = torch.zeros(1 << 18)
    scalars = 64  # bytes that 0-d constants take
    for call, tensors in ((lambda: x + 1, 1), (lambda: (x + 1) * 2, 2),
                          (lambda: ((x + 1) * 2 * 3).sum(), 2)):
        peak = timing.peak_allocated(call, CPU)
        assert 0 <= peak - (tensors << 20) <= scalars


def test_layouts_and_bytes():
    x = torch.zeros(1, 2, 3, 4)
    (y, v) = channels_last((x, torch.zeros(5)))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert v.is_contiguous()
    assert nbytes((x, [v])) == (24 + 5) * 4
    assert convert((x, v), dtype=torch.float64)[1].dtype == torch.float64


def _record(provider, seconds, **values):
    fields = {
        "group": "op/case/forward", "provider": provider, "times": [seconds] * 3, "device": "cpu",
        "dtype": "float32", "shape": (1, 2), "bytes": 400, "macs": 0, "peak_memory": 101,
        "output_bytes": 100, "max_rel_error": 0.0, "correct": True, "copy_bandwidth": 1000.0,
        "memory_bound": True, "targets": {"reference": 3.0, "copy": 0.8, "scratch": 0.01},
    }
    return records.Record(**{**fields, **values})


def test_ratios_shares_and_targets():
    rows = {r.provider: r for r in (
        _record("reference", 1.6), _record("channels_last", 1.2), _record("fused", 0.4))}
    assert records.speedup(rows) == pytest.approx(4)
    assert records.speedup(rows, "best") == pytest.approx(3)
    assert [(what, pytest.approx(value), reached) for what, value, _, reached
            in records.checks(rows)] == [
        ("reference", 4.0, True), ("copy", 1.0, True), ("scratch", 0.01, True)]
    rows["fused"] = _record("fused", 0.8, peak_memory=150)
    assert [reached for *_, reached in records.checks(rows)] == [False, False, False]


def _tiny_training(name):
    config = training.recipe(name)
    options = {"ngf": 8, "nef": 8} if hasattr(config.network, "nef") else {"ngf": 2, "hidden": 16}
    network = with_options(config.network, {
        **options, "ndf": 4, "image_size": training.SIZE, "upsampling": "normal"}, name)
    still = replace(config.optimizer, generator=0.0, discriminator=0.0)
    return replace(config, network=network, optimizer=still, init_gain=1.0,
                   losses=replace(config.losses, perceptual=0.0))


@pytest.mark.parametrize("case", training.CASES, ids=lambda case: case.name)
def test_training_steps_are_measured(case, monkeypatch):
    monkeypatch.setattr(training, "_config", _tiny_training)
    rows = {r.provider: r for r in harness.measure(replace(case, seconds=0.01), Setting(CPU))}
    assert {"reference", "fused"} <= rows.keys()
    assert all(row.median > 0 for row in rows.values())


def test_diversity_is_measured(monkeypatch):
    small = create_model("groupdnet_deepfashion", ngf=8, nef=8, image_size=(64, 64), init_gain=1.0)
    monkeypatch.setattr(evaluation, "_model", lambda *_: small.eval())
    monkeypatch.setattr(evaluation, "SAMPLES", 2)
    monkeypatch.setattr(evaluation, "_distance", lambda *_: PixelDistance())
    case = replace(evaluation._diversity_case("small", 64, 0.01), floor=1e-3)
    rows = {r.provider: r for r in harness.measure(case, Setting(CPU))}
    assert rows.keys() == {"reference", "channels_last", "fused"}
    assert all(row.correct and row.median > 0 for row in rows.values())


def test_a_report_names_the_machine_that_was_measured():
    elsewhere = [_record(name, 1.0, versions={"torch": "1.2", "threads": "64"})
                 for name in ("reference", "fused")]
    assert "; torch 1.2, threads 64." in harness.markdown(elsewhere)


def test_records_survive_json(tmp_path):
    written = [_record("reference", 2.0, compile_seconds=1.5), _record("fused", 1.0)]
    path = harness.save(tmp_path / "records.json", written)
    assert harness.load(path) == written
    (entry, _) = json.loads(path.read_text())["benchmarks"]
    assert entry["group"] == "op/case/forward"
    expected = {"provider", "device", "dtype", "shape", "bytes", "macs", "peak_memory",
                "max_rel_error", "commit", "versions"}
    assert expected <= set(entry["extra_info"])
    with pytest.raises(FileNotFoundError, match="no such file"):
        harness.load(tmp_path / "absent.json")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json: expected the JSON of a benchmark run"):
        harness.load(tmp_path / "other.json")


def test_the_report_names_every_part():
    text = harness.markdown([
        _record("reference", 2.0), _record("fused", 0.5, resident_memory=10**6, peak_memory=150),
        _record("reference", 3.0, allocator="default"), _record("fused", 1.0, allocator="default"),
    ])
    for part in ("4.00x", "3.00x", "default allocator", "resident", "MISSED", "Copy bandwidth"):
        assert part in text


def test_sets_and_cases_are_found_by_name():
    found = harness.cases("all")
    assert len({case.group for case in found}) == len(found)
    assert {case.group.split("/")[0] for case in found} >= {
        "modulation", "class_crops", "instance_edges", "groupdnet_deepfashion"}
    for case in found:
        names = [p.name for p in case.providers]
        assert names == [name for name in records.PROVIDERS if name in names]
    with pytest.raises(ValueError, match="set: expected one of modulation"):
        harness.cases("speed")
    with pytest.raises(ValueError, match="only: no case"):
        harness.cases("modulation", "absent")


def test_maps_come_from_a_folder(tmp_path):
    scene = sample_scene("street", 32, 64, 35, seed=4)
    images.write_indices(tmp_path / "label/0.png", scene.labels)
    images.write_indices(tmp_path / "inst/0.png", scene.instances)
    maps = harness.Maps(tmp_path)
    assert (maps.labels("street", (32, 64), 8) == scene.labels.astype(int) % 8).all()
    assert (maps.instances("street", (32, 64)) == scene.instances).all()
    with pytest.raises(FileNotFoundError, match="maps: "):
        harness.Maps(tmp_path / "absent")


def _run(*command, cwd=ROOT):
    # A worker of pytest-xdist has pytest-benchmark turn itself off in the run that it starts.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, check=True,
                          capture_output=True, text=True, timeout=300).stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_confirms_the_allocations():
    group = "modulation/dense_128x256x256/forward"
    plane = 128 * 256 * 256 * 4
    grown = {p: int(_run("-m", "smis_models.benchmark.worker", "resident", group, p))
             for p in ("reference", "fused")}
    # The output at least; the reference holds two intermediates beside it.
    assert plane * 0.9 < grown["fused"] < plane * 1.5
    assert plane * 2.5 < grown["reference"]


def test_pytest_benchmark_and_the_report(tmp_path):
    out = tmp_path / "out.json"
    _run("-m", "pytest", "benchmarks/test_class_crops.py", "-k", "deepfashion",
         f"--benchmark-json={out}")
    found = harness.load(out)
    assert {r.provider for r in found} == {"reference", "channels_last", "fused"}
    assert {r.group for r in found} == {"class_crops/deepfashion/forward"}
    # The statistics of pytest-benchmark are those of our interleaved run.
    for entry in json.loads(out.read_text())["benchmarks"]:
        (record,) = (r for r in found if r.provider == entry["extra_info"]["provider"])
        assert entry["stats"]["median"] == pytest.approx(record.median)
        assert 1e-6 < record.median < 60
    printed = _run("-m", "benchmarks.report", out)
    assert "class_crops/deepfashion/forward" in printed
    for name in ("out.md", "times.png", "memory.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_the_terminal_summary_has_ratios_and_targets():
    rows = [_record("reference", 2.0), _record("fused", 0.5)]
    assert records.summary(rows) == [("op/case", "2 s", "500 ms", "4.00x", "4.00x", "80%")]
    (line,) = records.target_lines(rows)
    assert "4.00x reached" in line
