"""The benchmark harness: honest ratios, exact memory, records that survive the trip."""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smis_kernels.runtime import native
from smis_models import benchmark as harness
from smis_models import cli
from smis_models.benchmark import evaluation, records, timing, training
from smis_models.benchmark.case import (
    Case,
    Provider,
    Remaining,
    Setting,
    channels_last,
    convert,
    nbytes,
    providers,
)
from smis_models.benchmark.measure import bind, resident_peak, under_default_allocator
from smis_models.data.scenes import sample_scene
from smis_models.io import images
from smis_models.io.allocator import ENVIRONMENT, reuse_freed_memory
from smis_models.metrics import PixelDistance

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def _inputs(setting):
    x = torch.arange(24, dtype=setting.dtype).view(1, 2, 3, 4)
    return x, x + 1


def _case(fused=lambda x, y: x * y, **options):
    return Case(name="product/small", make_inputs=_inputs, seconds=0.02,
                **{"providers": providers(lambda x, y: x * y, fused, loops=True), **options})


def _measured(case, **options):
    return {r.provider: r for r in harness.measure(case, Setting(CPU, **options))}


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


@pytest.mark.parametrize("wrong", [2.0, float("nan")])
def test_no_speedup_is_reported_for_a_wrong_result_on_a_later_map(wrong):
    case = replace(_case(lambda x, y: x * y * (wrong if y.flatten()[0] == 3 else 1),
                         every_map=True),
                   make_inputs=lambda setting: tuple(t + setting.index for t in _inputs(setting)))
    rows = _measured(case)
    assert rows["reference"].correct and not rows["fused"].correct
    assert records.speedup(rows) is None


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


def test_times_are_of_one_call(monkeypatch):
    """On a clock that the calls turn: the mean of a sample, and as many rounds as asked for."""
    now, cost = [0.0], {"slow": 1.0, "half": 0.5, "fast": 2.0**-12}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name):
        now[0] += cost[name]

    assert timing.cpu_seconds(lambda: call("half"), 4) == 0.5
    for names, seconds, rounds in ((("slow", "half"), 6, 4), (("slow",), 0, 3), (("slow",), 999, 5),
                                   (("fast",), 9 * 2.0**-12 * 5, 5)):  # of nine calls each
        times = timing.interleave({name: lambda name=name: call(name) for name in names}, seconds,
                                  most=5)
        assert times == {name: [cost[name]] * rounds for name in names}


@pytest.mark.parametrize(("moved", "copies"), [(8 << 20, 13), (100 << 20, 1), (200 << 20, 1),
                                               (1 << 20, 64), (0, 64)])
def test_rotating_inputs_outgrow_the_cache(moved, copies, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(L2_cache_size=50 << 20))
    assert timing.rotations(moved, torch.device("cuda")) == copies


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


TINY = Setting(CPU, seconds=0.0, tiny=True, compiled=False)
QUICK = [case for case in harness.cases("all") if case.name.split("/")[0] in (
    "modulation", "class_crops", "instance_edges", "instance_pool", "norm_act", "spade_layer",
    "spatially_varying_conv2d", "conditional_conv2d", "conditional_attention", "spectral_weight")]
NETWORKS = [case for case in harness.cases("all") if case.name in (
    "pix2pixhd_cityscapes/generator", "spade_coco/training_step_batch2",
    "groupdnet_deepfashion/further_sample", "family/bicyclegan_deepfashion")]


@pytest.mark.parametrize("case", [*QUICK, *NETWORKS], ids=lambda case: case.group)
def test_every_case_is_right_at_its_smallest(case):
    rows = {r.provider: r for r in harness.measure(case, TINY)}
    assert list(rows) == [p.name for p in case.providers if not p.compile]
    assert all(row.correct and row.median > 0 for row in rows.values())


# Of each op on 16 x 16 pixels and as many channels: bytes that must move, and multiply-adds.
_P = 16 * 16 * 16 * 4  # bytes of a plane of features
_MAP = 16 * 16 * 8  # of an int64 map
MOVED = {
    "modulation/dense_128x256x256/forward": (4 * _P + 2 * 64, 2 * 16**3),
    "modulation/upsampled_128x256x256/forward": (_P + 3 * 4 * _P + 2 * 64, 2 * 4 * 16**3),
    "modulation/training_128x256x256/step": (15 * _P, 6 * 16**3),
    "class_crops/ade20k/forward": (3 * 1024 + _MAP + 3 * 151 * 1024, 0),
    "class_crops/deepfashion/forward": (3 * 1024 + _MAP + 3 * 8 * 1024, 0),
    "instance_edges/512x1024/forward": (_MAP + 1024, 0),
    "instance_pool/3x512x1024_loop/forward": (2 * 3 * 1024 + 2 * _MAP, 0),
    "instance_pool/64x512x1024_index_add/forward": (2 * _P + 2 * _MAP, 0),
    "norm_act/64x512x1024/forward": (4 * _P, 0),
    "spatially_varying_conv2d/forward_128x256x256/forward": (11 * _P, 9 * 16**3),
    "spatially_varying_conv2d/backward_128x256x256/backward": (21 * _P, 2 * 9 * 16**3),
    "conditional_conv2d/forward_128x256x256/forward": (
        3 * _P + 4 * 9 * 16 * (9 * 16 + 1), 9 * 16 * 9 * 16 * 16**2),
    "conditional_attention/128x256x256/forward": (3 * _P, 0),
    "spectral_weight/1024x1024x3x3/step": (7 * 4 * 9 * 16**2, 0),
}


@pytest.mark.parametrize("group", MOVED)
def test_bytes_and_products_by_hand(group):
    (case,) = (case for case in harness.cases("all") if case.group == group)
    inputs = case.make_inputs(TINY)
    outputs = bind(case, case.providers[0].run, inputs)()
    assert (case.moved(inputs, outputs), case.macs(inputs)) == MOVED[group]


@pytest.mark.parametrize("case", [training.CASES[0], training.CASES[3]], ids=lambda case: case.name)
def test_training_steps_are_measured(case, monkeypatch):
    monkeypatch.setattr(training, "SIZE", (64, 64))
    rows = {r.provider: r for r in harness.measure(case, TINY)}
    assert {"reference", "fused"} <= rows.keys()
    assert all(row.correct and row.median > 0 for row in rows.values())


def test_diversity_is_measured(monkeypatch):
    monkeypatch.setattr(evaluation, "NGF", 8)
    monkeypatch.setattr(evaluation, "SAMPLES", 2)
    monkeypatch.setattr(evaluation, "_distance", lambda *_: PixelDistance())
    rows = {r.provider: r for r in harness.measure(evaluation.CASES[0], TINY)}
    assert rows.keys() == {"reference", "channels_last", "fused"}
    assert all(row.correct and row.median > 0 for row in rows.values())


def test_the_yardstick_is_the_first_provider_of_the_same_dtype():
    """A fused error in bfloat16 is held against the reference's own there, not in float32."""
    def rounded(x, y):
        return (x * y).float() * 1.004  # within bfloat16's rounding, far beyond float32's

    given = (Provider("reference", lambda x, y: x * y),
             Provider("channels_last", lambda x, y: (x * y).bfloat16(), dtype=torch.bfloat16),
             Provider("fused", rounded, dtype=torch.bfloat16), Provider("fused fp32", rounded))
    case = replace(_case(providers=given), make_inputs=lambda s: (
        torch.linspace(1, 2, 24, dtype=s.dtype).view(1, 2, 3, 4),) * 2)
    rows = _measured(case)
    assert {name: row.correct for name, row in rows.items()} == {
        "reference": True, "channels_last": True, "fused": True, "fused fp32": False}


@pytest.mark.parametrize(("error", "right"), [(2.5e-3, True), (3.5e-3, False)])
def test_three_times_the_references_error_is_allowed(error, right):
    def off_by(share):
        return lambda x, y: x * y * (1 + share * (x.dtype == torch.float32))

    case = _case(providers=providers(off_by(1e-3), off_by(error), loops=True))
    assert _measured(case, seconds=0.0)["fused"].correct == right


@pytest.mark.parametrize("status", [1, 0])
def test_what_glibc_is_told(status, monkeypatch):
    """M_MMAP_THRESHOLD is -3, M_TRIM_THRESHOLD -1 and M_TOP_PAD -2 in its malloc.h."""
    told = {}
    library = SimpleNamespace(mallopt=lambda name, value: told.update({name: value}) or status)
    monkeypatch.setattr("smis_models.io.allocator.ctypes.CDLL", lambda _: library)
    assert reuse_freed_memory() == (status == 1)
    assert told == {-3: 2**30, -1: -1, -2: 64 * 2**20}
    assert {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": "-1",
                           "MALLOC_TOP_PAD_": str(64 * 2**20)} == ENVIRONMENT


def test_a_sample_of_the_images_is_judged():
    truth_of = []
    given = providers(lambda x: x + 1, lambda x: torch.cat([x[:1] + 1, x[1:] + 7]), loops=True)
    case = Case(name="sampled/case", make_inputs=lambda s: (torch.zeros(3, 2),), providers=given,
                sample=lambda inputs: (truth_of.append(len(inputs[0])) or inputs[0][:1],))
    assert _measured(case, seconds=0.0)["fused"].correct and truth_of == [3]
    assert not _measured(replace(case, sample=lambda i: (i[0][:2],)), seconds=0.0)["fused"].correct


def test_other_forms_fail_alone():
    def broken(x, y):
        raise ArithmeticError("it broke")

    seen = []
    case = _case(providers=(*_case().providers, Provider("fused broken", broken)))
    rows = harness.measure(case, Setting(CPU), failed=lambda c, p, e: seen.append((p.name, str(e))))
    assert seen == [("fused broken", "it broke")]
    assert [r.provider for r in rows] == ["reference", "channels_last", "fused"]
    with pytest.raises(ArithmeticError):
        _measured(case)
    with pytest.raises(ArithmeticError):  # without the reference nothing is judged
        harness.measure(_case(providers=(Provider("reference", broken),)), Setting(CPU),
                        failed=lambda *_: None)


def test_ours_may_not_fall_back(monkeypatch):
    from smis_kernels import norm_act
    from smis_kernels.runtime import native
    from smis_kernels.runtime.backend import BackendError

    monkeypatch.setitem(native.STATUS, "cpu",
                        native.NativeStatus("cpu", False, reason="g++ failed", cure="build it"))

    def normed(x, y):
        return norm_act(x, norm="none", activation="relu")

    case = _case(providers=providers(lambda x, y: x.relu(), normed, loops=True))
    with pytest.raises(BackendError, match="failed"):
        _measured(case)


def test_the_bound_is_the_time_at_the_rates_of_the_run():
    rows = _measured(_case(bound=lambda inputs: Remaining(10**9, 0, 0)), tiny=True)
    record = rows["fused"]
    assert 1e-3 < record.bound < 10  # 1e9 multiply-adds at a slow core's rate
    assert records.floor_share(record) == record.bound / record.median


TIMES = {"reference": 4.0, "channels_last": 3.0, "fused": 1.0, "copy": 0.5, "rate": 0.25,
         "features": 0.125, "map 1": 8.0, "map 2": 1.0, "map 3": 2.0}


def test_figures_of_given_times(monkeypatch):
    monkeypatch.setattr(timing, "interleave", lambda calls, *_, **__: {
        name: [TIMES[name]] * 3 for name in calls})
    row = _measured(_case(bound=lambda inputs: Remaining(6000, 700, 64)), tiny=True)["fused"]
    macs = timing.rate_call(CPU, torch.float32, tiny=True)[1]
    assert macs == 9 * 16**2 * 8**2
    assert row.copy_bandwidth == 2 * 24 * 4 / 0.5
    assert row.bound == pytest.approx(6000 * 0.25 / macs + 700 * 0.125 / (2 * 64))
    rows = _measured(_case(every_map=True))
    assert records.speedup(rows) == pytest.approx(4 / 2)
    assert records.speedup(rows, slowest=True) == 4 / 8
    row = rows["fused"]
    assert records.floor_share(replace(row, bound=0.25)) == 0.25 / 1.0  # both of the first map
    assert row.times == [pytest.approx(2.0)] * 3  # the geometric mean of four maps
    assert row.maps == {"map 0": 1.0, "map 1": 8.0, "map 2": 1.0, "map 3": 2.0}
    assert row.slowest == 8.0


def test_copies_and_turns():
    order = []
    call = timing.rotating([lambda k=k: order.append(k) or k for k in range(3)])
    assert [call() for _ in range(5)] == order == [0, 1, 2, 0, 1]
    for like in (torch.empty(50), torch.empty(50, dtype=torch.uint8)):
        copied = timing.copy_call(like)()
        assert copied.shape == like.shape and copied.dtype == like.dtype
        assert len(copied.unique()) > 20  # no zeros, which move faster


def test_figures_in_words():
    assert [records.duration(s) for s in (2.0, 1.0, 0.5, 1e-3, 2.5e-6)] == [
        "2 s", "1 s", "500 ms", "1 ms", "2.5 µs"]
    assert [records.times_text(x) for x in (None, 2.314, 12.34, 123.4)] == [
        "-", "2.31x", "12.3x", "123x"]
    assert _record("fused", 0.0, times=[4.0, 1.0, 2.0, 3.0]).quartiles == (1.75, 3.25)
    assert records.scratch_share(_record("fused", 1.0, peak_memory=150)) == 0.5
    assert records.scratch_share(_record("fused", 1.0, peak_memory=50)) == 0


def test_unknown_pixels_of_coco_are_its_last_class(tmp_path):
    images.write_indices(tmp_path / "a.png", np.array([[3, 255, 181]]))
    setting = Setting(CPU, maps=harness.Maps(tmp_path))
    assert setting.labels("indoor", (1, 3), 183).tolist() == [[[3, 182, 181]]]


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
    (case,) = harness.cases("modulation", "dense_128x256x256")
    plane = 128 * 256 * 256 * 4
    grown = {p: resident_peak(case, p, harness.Maps()) for p in ("reference", "fused")}
    # The output at least; the reference holds two intermediates beside it.
    assert plane * 0.9 < grown["fused"] < plane * 1.5
    assert plane * 2.5 < grown["reference"]


def _malloc_settings(*_: object) -> list[str]:
    return [name for name in ENVIRONMENT if name in os.environ]


def test_the_default_allocator_is_that_of_a_fresh_process(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "64")
    (case,) = harness.cases("modulation", "class_crops/deepfashion")
    found = under_default_allocator(case, harness.Maps())
    assert [r.provider for r in found] == ["reference", "channels_last", "fused"]
    assert {r.allocator for r in found} == {"default"}
    assert os.environ["MALLOC_TOP_PAD_"] == "64"
    module = importlib.import_module("smis_models.benchmark.measure")  # a function has its name
    monkeypatch.setattr(module, "_again", _malloc_settings)
    assert module._in_a_fresh_process(case, None, harness.Maps()) == []


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch):
    case = SimpleNamespace(group="a", confirm=False, scenes="")

    def fails_second(*_):
        if (tmp_path / "records.json").exists():
            raise ValueError("maps: a bad one")
        return [_record("reference", 2.0)]

    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)
    monkeypatch.setattr(harness, "cases", lambda *_: [case, case])
    monkeypatch.setattr(harness, "measure", fails_second)
    monkeypatch.setattr("sys.argv", ["smis", "benchmark", "--set", "modulation", "--out",
                                     str(tmp_path), "--no-default-allocator"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert [r.median for r in harness.load(tmp_path / "records.json")] == [2.0]


@pytest.mark.parametrize(("arguments", "dtypes"), [
    ([], ["float32", "default float32"]), (["--dtype", "float32"], ["float32", "default float32"]),
    (["--dtype", "bfloat16"], ["bfloat16"]),
])
def test_the_dtype_that_is_asked_for(tmp_path, monkeypatch, arguments, dtypes):
    """Targets, resident memory and the default allocator are of float32 alone."""
    taken, resident = [], []
    case = harness.Case("a/b", None, (), targets={"reference": 2.0}, confirm=True)

    def measure(case, setting, *_):
        name = str(setting.dtype).removeprefix("torch.")
        taken.append(name)
        return [_record("reference", 2.0, dtype=name, targets=case.targets)]

    def again(*_):
        taken.append("default float32")
        return []

    module = importlib.import_module("smis_models.cli.measure")
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)
    monkeypatch.setattr(harness, "cases", lambda *_: [case])
    monkeypatch.setattr(harness, "measure", measure)
    monkeypatch.setattr(module, "under_default_allocator", again)
    monkeypatch.setattr(module, "resident_peak", lambda *_: resident.append(1) or 5)
    monkeypatch.setattr("sys.argv", ["smis", "benchmark", "--set", "modulation", "--out",
                                     str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert taken == dtypes
    (record,) = harness.load(tmp_path / "records.json")
    wide = "float32" in dtypes
    assert record.targets == ({"reference": 2.0} if wide else {})
    assert bool(resident) == wide


def test_an_unknown_dtype_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["smis", "benchmark", "--set", "modulation", "--out",
                                     str(tmp_path), "--dtype", "half"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "dtype: expected float32 or bfloat16, got 'half'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_pytest_benchmark_and_the_report(tmp_path):
    out = tmp_path / "out.json"
    _run("-m", "pytest", "benchmarks/test_sets.py", "-k", "class_crops and deepfashion",
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


def test_targets_read_as_they_are_written():
    """Against other providers, formats and forms; with floors, shares and peaks."""
    rows = {r.provider: r for r in (
        _record("reference", 4.0, peak_memory=200), _record("channels_last", 3.0),
        _record("compiled", 2.0, peak_memory=150), _record("index_add", 1.0),
        _record("fused", 0.5), _record("fused channels_last", 0.4, peak_memory=90),
        _record("fused indexed", 0.2, bytes=100, targets={}))}
    targets = {"reference": 10.0, "eager": 7.5, "best": 6.0, "compiled": 5.0, "index_add": 2.5,
               "floor": 1.0, "memory": 0.5, "memory compiled": 0.5,
               "fused indexed: compiled": 10.0, "fused indexed: floor": 0.6}
    rows["fused"] = replace(rows["fused"], targets=targets)
    found = {what: (value, reached) for what, value, _, reached in records.checks(rows)}
    assert found == {
        "reference": (10.0, True), "eager": (7.5, True), "best": (2.5, False),
        "compiled": (5.0, True), "index_add": (2.5, True), "floor": (1.0, True),
        "memory": (0.45, True), "memory compiled": (0.6, False),
        "fused indexed: compiled": (10.0, True), "fused indexed: floor": (0.5, False)}
    text = records.target_lines(list(rows.values()))[0]
    assert ">= 5x compiled: 5.00x reached" in text
    assert "fused indexed: >= 60% of floor: 50.0% MISSED" in text
    rows["fused channels_last"] = replace(rows["fused channels_last"], correct=False)
    assert records.speedup(rows, "compiled") == 4.0  # the fastest right one
    assert "fused indexed" in harness.markdown(list(rows.values()))


def test_what_is_worse_than_before():
    before = [_record("fused", 1.0), _record("fused indexed", 1.0), _record("reference", 1.0)]
    assert records.regressions(before, before) == {}
    now = [_record("fused", 1.2, peak_memory=120), _record("reference", 9.0),
           _record("fused indexed", 1.05, correct=False), _record("fused new", 9.0)]
    assert records.regressions(now, before) == {
        ("op/case/forward", "fused"): "slower: 1 s -> 1.2 s (1.20x); more memory: 0.0 -> 0.0 MB",
        ("op/case/forward", "fused indexed"): "wrong: error 0.0e+00 -> 0.0e+00"}


def test_noise_and_a_tenth_more_memory_are_not_worse():
    """Times of which the quartiles overlap, and peaks at the bound."""
    before = replace(_record("fused", 1.0, peak_memory=100), times=[1.0, 1.0, 1.3])
    for times, worse in (([1.0, 1.2, 1.2], False), ([1.2, 1.2, 1.2], True), ([1.08] * 3, False)):
        now = replace(before, times=times, peak_memory=110)
        assert bool(records.regressions([now], [before])) is worse
    steady = replace(before, times=[1.0] * 3)
    for seconds, peak, worse in ((1.09, 110, False), (1.11, 110, True), (1.0, 111, True)):
        now = replace(steady, times=[seconds] * 3, peak_memory=peak)
        assert bool(records.regressions([now], [steady])) is worse


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("cpu-*.json")),
                         ids=lambda path: path.stem)
def test_committed_records_give_their_committed_tables(path):
    def lines(text):
        return [line for line in text.splitlines() if line.startswith("|")]

    assert lines(harness.markdown(harness.load(path))) == lines(path.with_suffix(".md").read_text())


def test_records_name_the_instruction_set() -> None:
    """Two machines of one name may differ in it, and their ratios with it."""
    code = "from smis_models.io.provenance import versions; print(versions()['instructions'])"
    for wanted in ("baseline", ""):
        done = subprocess.run((sys.executable, "-c", code), text=True, capture_output=True,
                              check=True, env={**os.environ, "SMIS_ISA": wanted})
        assert done.stdout.strip() == (wanted or native.STATUS["cpu"].isa or "none")


def test_every_driver_is_imported_from_the_root_alone() -> None:
    """As ``python -m benchmarks.NAME`` does: what only pytest puts on the path is not there."""
    root = Path(__file__).parents[1]
    names = sorted(f"benchmarks.{path.stem}" for path in (root / "benchmarks").glob("[a-z]*.py"))
    assert "benchmarks.foreign" in names
    subprocess.run((sys.executable, "-c", f"import {', '.join(names)}"), cwd=root, check=True,
                   env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
