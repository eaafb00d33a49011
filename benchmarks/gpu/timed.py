"""Parts ``operations``, ``networks``, ``training``: cases of the harness at a GPU's sizes.

Sizes of ops are such that a call's data outgrow the L2 cache several times. What is to be reached,
on an H200, stands with each case. Compiling takes most of the networks' time, and yet the compiled
row of a network follows it at once: a call that ends early, or never comes, costs the last networks
and not every figure against torch.compile.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from smis_kernels import LabelLayout, modulation
from smis_kernels.ops.indexed_modulation.op import indexed_modulation
from smis_kernels.ops.instance_pool.reference import instance_avg_pool2d as pool_reference
from smis_kernels.ops.modulation.reference import modulation as modulation_reference
from smis_kernels.runtime.backend import BackendError
from smis_kernels.testing import rms_error
from smis_models.benchmark import measure, ops
from smis_models.benchmark import networks as zoo
from smis_models.benchmark.case import (
    COCO_CLASSES,
    Case,
    Inputs,
    Maps,
    Provider,
    Setting,
    channels_last,
    contiguous,
    nbytes,
)
from smis_models.benchmark.measure import release
from smis_models.networks.semantics import compile_layout
from smis_models.synthesis.synthesizer import Synthesizer

from .results import Journal, Lacking, Row, Settings, Skip, explain

LOW = torch.bfloat16
ACCURACY = 1.5  # of the reference's own error at the same dtype
LEAST = 1 << 30
JUDGED: dict[str, Any] = {"factor": ACCURACY, "units": 0.5, "floor": None, "every_map": False,
                          "bound": None}


def on_gpu(case: Case, targets: dict[str, float], *more: Provider) -> Case:
    """A case of the CPU's sets judged as strictly as a GPU's ops, ours in both memory formats."""
    (ours,) = (p for p in case.providers if p.name == "fused")
    last = replace(ours, name="fused channels_last", prepare=channels_last)
    return replace(case, **{**JUDGED, "bound": case.bound}, targets=targets,
                   providers=(*case.providers, last, *more))


def indexed_case() -> Case:
    """Gamma and beta of every pixel, or gathered from a table of the map's windows."""
    dense = ops.modulation_case("of_windows", (8, 128, 256, 256))

    def make_inputs(setting: Setting) -> Inputs:
        x, _, _, mean, var = dense.make_inputs(setting)
        labels = setting.labels("indoor", x.shape[2:], COCO_CLASSES, len(x))
        level = LabelLayout.from_labels(labels, COCO_CLASSES).level((x.shape[2], x.shape[3]))
        table = setting.draw(int(level.index5.max()) + 1, 2 * x.shape[1], seed=3) / 4
        rows = table[level.index5.long()].permute(0, 3, 1, 2)
        gamma, beta = (t.contiguous() for t in rows.chunk(2, 1))
        return x, gamma, beta, mean, var, level.index5, table.float()  # the same numbers

    def gathered(x: Any, _: Any, __: Any, mean: Any, var: Any, index: Any, table: Any) -> Any:
        return indexed_modulation(x, index, table, running_mean=mean, running_var=var,
                                  activation="leaky_relu")

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *inputs: ops.modulated(function, *inputs[:5])

    reference, fused = of(modulation_reference), of(modulation)
    x_and_y = lambda inputs, outputs: nbytes(inputs[0], outputs)  # noqa: E731
    return replace(
        dense, **JUDGED, make_inputs=make_inputs,
        moved=lambda inputs, outputs: nbytes(inputs[:3], outputs),
        providers=(
            Provider("reference", reference), Provider("channels_last", reference, channels_last),
            Provider("compiled", reference, compile=True),
            Provider("fused", fused),
            Provider("fused channels_last", fused, channels_last),
            Provider("compiled channels_last", reference, channels_last, compile=True),
            Provider("fused indexed", gathered, moved=x_and_y),
            Provider("fused indexed channels_last", gathered, channels_last, moved=x_and_y),
        ),
        targets={"floor": 0.85, "compiled": 1.0, "fused indexed: floor": 0.85,
                 "fused indexed: compiled": 1.5})


def layer_case() -> Case:
    """One SPADE layer of a COCO model; the layout is given, compiled in the call, tables kept."""
    case = zoo.layer_case("layout_given_batch_8", zoo.layer_layout, batch=8)
    more = (Provider("fused tables kept", zoo.ours, zoo.layer_tables),
            Provider("fused layout in the call", zoo.ours, zoo.layer_map, graph=False))
    return replace(case, **JUDGED, providers=(*case.providers, *more),
                   targets={"eager": 15, "compiled": 6})


def operation_cases() -> list[Case]:
    """In the order in which they are measured."""
    wide, middle = (8, 128, 256, 256), (4, 128, 256, 256)
    pool = ops.pool_case("loop", pool_reference, 64, (1024, 2048))
    torch_s = [Provider(f"index_add{suffix}", ops.index_add_pool, prepare, graph=False,
                        judged=False)
               for suffix, prepare in (("", contiguous), (" channels_last", channels_last))]
    return [
        indexed_case(), layer_case(),
        on_gpu(ops.conditional_case(middle), {
            "compiled": 1.2, "memory": 0.1, "memory channels_last": 0.1,
            "memory compiled": 0.1, "floor": 0.6}),
        on_gpu(ops.varying_case(middle), {"floor": 0.8, "eager": 5}),
        on_gpu(pool, {"floor": 0.75, "eager": 300, "index_add": 5}, *torch_s),
        on_gpu(ops.crops_case("ade20k_batch_4", 151, 4), {"eager": 200}),
        on_gpu(ops.varying_case(middle, "backward"), {}),
        on_gpu(ops.modulation_case("training", wide, training=True), {}),
        on_gpu(ops.norm_act_case("", wide), {}),
        on_gpu(ops.attention_case(wide), {}),
        replace(ops.edges_case((1024, 2048), 8), **JUDGED, targets={}),
    ]


def network_case(name: str, batch: int, targets: dict[str, float], form: str = "") -> Case:
    """A generator: eager references, ours in all its forms; the first image is judged in fp64.

    Forms: "compiled" against torch.compile in bf16, channels-last, replayed from a CUDA graph;
    "rate" for images a second alone.
    """
    def make_inputs(setting: Setting) -> Inputs:
        model = zoo.model_of(name, setting)
        labels, ids, _ = zoo.maps_of(model, name, setting, batch)
        return (*zoo.generator_inputs(name, setting, batch), (model.preset, labels, ids))

    def given(inputs: Inputs) -> Inputs:
        generator, _, *z, (preset, labels, ids) = inputs
        return generator, compile_layout(labels, preset, ids), *z

    def kept(inputs: Inputs) -> Inputs:
        """Further samples of one layout: tables kept, the whole network one graph launch."""
        generator, planes, *z, (_, labels, ids) = inputs
        made = Synthesizer(generator, labels, ids, cuda_graph=planes.is_cuda)
        for _ in range(2):  # eagerly, then captured
            made.sample(*z)
        return made, *z

    reference = Provider("channels_last", zoo.reference, lambda i: channels_last(i[:-1]),
                         graph=False)
    fused = Provider("fused", zoo.ours, given)
    full = (
        Provider("reference fp32", zoo.reference, lambda i: contiguous(i[:-1]),
                 dtype=torch.float32, graph=False),
        reference, fused, replace(fused, name="fused eager", graph=False),
        replace(fused, name="fused fp32", dtype=torch.float32, graph=False),
        Provider("fused layout in the call", zoo.ours, lambda i: i[:-1], graph=False),
        Provider("fused tables kept", lambda made, *z: made.sample(*z), kept, graph=False),
    )
    compiled = replace(reference, name="compiled", compile=True, graph=True)
    providers = {"": full, "compiled": (reference, compiled, fused), "rate": (reference, fused)}
    return zoo.generator_case(
        name, f"{form + '_' if form else ''}batch_{batch}", make_inputs=make_inputs,
        providers=providers[form], targets=targets, error=rms_error,
        sample=lambda i: (i[0], *(t[:1] for t in i[1:-1]), i[-1]),
        macs=lambda inputs: 0, **JUDGED | {"bound": None})


def network_cases() -> list[Case]:
    """In the order in which they are measured."""
    found = []
    for name, batch, eager, compiled, more in (
        ("groupdnet_deepfashion", 1, 6, 2.5, {}), ("spade_coco", 1, 8, 3, {}),
        ("groupdnet_ade20k", 1, 10, 4, {}),
        ("ccfpse_coco", 4, 4, 1.3, {"memory channels_last": 0.25}), ("spade_coco", 16, 5, 3, {}),
    ):
        found += [network_case(name, batch, {"reference fp32": eager, **more}),
                  network_case(name, batch, {"compiled": compiled}, "compiled")]
    found += [network_case("spade_coco", batch, {}, "rate") for batch in (2, 4, 8, 32)]
    return found + [network_case(f"{name}_cityscapes", 1, {}) for name in ("groupdnet", "spade")]


def training_cases() -> list[Case]:
    """Generator steps under autocast, judged against float32 products in full precision."""
    targets = {"eager": 2.5, "memory": 0.6, "memory channels_last": 0.6}
    found = []
    for name in ("groupdnet_deepfashion", "spade_coco", "groupdnet_ade20k"):
        case = zoo.step_case(name, 8, targets={} if name == "groupdnet_ade20k" else targets)
        (*baselines, fused) = case.providers

        def given(inputs: Inputs) -> Inputs:
            return inputs[0], LabelLayout.from_tensor(inputs[1]), *inputs[2:]

        found.append(replace(
            case, **{**JUDGED, "floor": torch.finfo(LOW).eps / 2}, error=rms_error,
            providers=(*baselines, replace(fused, prepare=given),
                       replace(fused, name="fused layout in the call"))))
    return found


ALL: dict[str, Callable[[], list[Case]]] = {
    "operations": operation_cases, "networks": network_cases, "training": training_cases}


def timed(case: Case, setting: Setting) -> Row:
    """One case's records; what failed beside them.

    Raises:
        Lacking: no form of ours runs on this build.
    """
    failures: dict[str, str] = {}
    lacking: dict[str, str] = {}

    def failed(_: Case, provider: Provider, error: Exception) -> None:
        lack = isinstance(error, BackendError) or provider.compile
        (lacking if lack else failures)[provider.name] = explain(error)

    records = measure(case, setting, failed=failed)
    ours = {name for name in lacking if name.startswith("fused")}
    if ours and not any(r.provider.startswith("fused") for r in records):
        raise Lacking(lacking[min(ours)])
    row: Row = {"records": records, "missing": lacking} | ({"again": True} if ours else {})
    if failures:
        row |= {"state": "failed",
                "reason": "; ".join(f"{name}: {why}" for name, why in failures.items())}
    return row


def _checked(case: Case, setting: Setting) -> Row:
    """:func:`timed` where the device's memory holds the case's batch."""
    release()
    batch = int((re.findall(r"batch_?(\d+)", case.name) or ["1"])[0])
    free = torch.cuda.mem_get_info()[0] if setting.device.type == "cuda" else math.inf
    if free < LEAST * (2 + batch):
        raise Skip(f"{free / 2**30:.0f} GiB are free, batch {batch} may need more")
    return timed(case, setting)


def _run(cases: Sequence[Case], seconds: float, needs: float, journal: Journal,
         settings: Settings, compiled: bool) -> None:
    dry = settings.dry_run
    setting = Setting(torch.device(settings.device), LOW, Maps(settings.maps), tiny=dry,
                      seconds=0.0 if dry else seconds, compiled=compiled)
    by_name = {case.group: case for case in cases}
    for name in journal.late_last(by_name):
        least = 3 * needs if "compiled" in name else needs
        journal.row(name, partial(_checked, by_name[name], setting), 0.0 if dry else least)


def operations(journal: Journal, settings: Settings) -> None:
    """Part ``operations``."""
    _run(operation_cases(), 1.5, 3.0, journal, settings, compiled=True)


def networks(journal: Journal, settings: Settings) -> None:
    """Part ``networks``; on a dry run one, since compiling takes minutes on a CPU."""
    cases = network_cases()
    if settings.dry_run:
        cases = [case for case in cases if case.name in ("spade_coco/batch_1",
                                                         "spade_coco/rate_batch_2")]
    _run(cases, 2.0, 8.0, journal, settings, compiled=not settings.dry_run)


def training(journal: Journal, settings: Settings) -> None:
    """Part ``training``."""
    cases = training_cases()
    _run(cases[1:2] if settings.dry_run else cases, 3.0, 10.0, journal, settings, compiled=False)
