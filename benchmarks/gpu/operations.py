"""Part ``operations``: every op against its reference and torch.compile, beside its floor.

Sizes are such that a call's data outgrows the L2 cache several times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smis_kernels import (
    SPADE,
    LabelLayout,
    class_crops,
    conditional_attention,
    conditional_conv2d,
    instance_avg_pool2d,
    instance_edges,
    modulation,
    norm_act,
    spatially_varying_conv2d,
    use_backend,
)
from smis_kernels.layout.label_layout import TableCache
from smis_kernels.ops.class_crops import reference as crops_reference
from smis_kernels.ops.conditional_attention import reference as attention_reference
from smis_kernels.ops.conditional_conv import reference as conditional_reference
from smis_kernels.ops.indexed_modulation.op import indexed_modulation
from smis_kernels.ops.instance_edges import reference as edges_reference
from smis_kernels.ops.instance_pool import reference as pool_reference
from smis_kernels.ops.modulation import reference as modulation_reference
from smis_kernels.ops.norm_act import reference as norm_act_reference
from smis_kernels.ops.spatially_varying_conv import reference as varying_reference
from smis_models.benchmark.case import nbytes
from smis_models.benchmark.pix2pixhd import index_add_pool
from smis_models.networks.semantics import one_hot

from .inputs import COCO, Scene
from .journal import Journal, Row
from .measure import Floor, Provider, compiled, measure, without_gradients
from .settings import Settings

LOW = torch.bfloat16
Function = Callable[..., Any]


def last(x: Any) -> Any:
    """4-D tensors in channels-last memory."""
    return x.to(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x


def forward(function: Function, *inputs: Any) -> Callable[[], Callable[[], Any]]:
    """What makes the call of an eager or native function."""
    return lambda: without_gradients(function, *inputs)


def compiled_forward(function: Function, *inputs: Any) -> Callable[[], Callable[[], Any]]:
    """What compiles the function and makes its call."""
    return lambda: without_gradients(compiled(function), *inputs)


def usual(reference: Function, ours: Function, *inputs: Any, like: str = "reference",
          graph: bool = True) -> list[Provider]:
    """Reference, reference channels-last, compiled, ours in both formats."""
    lasts = tuple(map(last, inputs))
    make = partial(Provider, dtype=LOW, graph=graph)
    return [
        make("reference", forward(reference, *inputs)),
        make("reference channels-last", forward(reference, *lasts), like=like),
        make("compiled", compiled_forward(reference, *inputs), like=like, optional=True),
        make("ours", forward(ours, *inputs), like=like),
        make("ours channels-last", forward(ours, *lasts), like=like),
    ]


def wide(*inputs: Any) -> tuple[Any, ...]:
    """Floating tensors in fp64."""
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
                 for x in inputs)


def _modulation(scene: Scene) -> Row:
    """Known statistics; gamma and beta given, or gathered from a table of real windows."""
    n, c, size = scene.pick((8, 128, 256), (1, 8, 32))
    x = scene.draw(n, c, size, size, dtype=LOW)
    mean, var = scene.draw(c, seed=1), scene.draw(c, seed=2).square() + 0.5
    labels = scene.labels("indoor", (size, size), COCO, n)
    level = scene.layout(labels, COCO).level((size, size))
    table = scene.draw(int(level.index5.max()) + 1, 2 * c, seed=3) / 4
    rows = table[level.index5.long()].permute(0, 3, 1, 2).to(LOW)
    gamma, beta = (t.contiguous() for t in rows.chunk(2, 1))
    options = {"running_mean": mean, "running_var": var, "activation": "leaky_relu"}
    dense = partial(modulation_reference.modulation, **options)
    providers = usual(dense, partial(modulation, **options), x, gamma, beta)
    providers.insert(3, Provider("compiled channels-last",
                                 compiled_forward(dense, *map(last, (x, gamma, beta))), LOW,
                                 "reference", graph=True, optional=True))
    gathered = partial(indexed_modulation, **options)
    providers += [
        Provider(f"ours indexed{name}", forward(gathered, form(x), level.index5, table), LOW,
                 "reference", graph=True)
        for name, form in (("", lambda t: t), (" channels-last", last))
    ]

    def truth() -> Tensor:
        exact = table.double()[level.index5.long()].permute(0, 3, 1, 2).chunk(2, 1)
        return partial(modulation_reference.modulation, **{
            **options, "running_mean": mean.double(), "running_var": var.double(),
        })(x.double(), *exact)

    row = measure(providers, truth, scene.device, floor=Floor(nbytes(x, gamma, beta, x)),
                  small=scene.dry)
    share = row["floor"]["seconds"] * nbytes(x, x) / nbytes(x, gamma, beta, x)
    for name, entry in row["providers"].items():
        if "indexed" in name:
            entry["floor_seconds"] = share
    return {**row, "pixels": n * size * size, "table_rows": len(table)}


def _modulation_step(scene: Scene) -> Row:
    """Batch statistics, forward and backward: 15 streams of the input's size at the least."""
    n, c, size = scene.pick((8, 128, 256), (1, 8, 16))
    x, gamma, beta = (scene.draw(n, c, size, size, seed=i, dtype=LOW) for i in range(3))
    cotangent = scene.draw(n, c, size, size, seed=3, dtype=LOW)

    def step(function: Function, *inputs: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in inputs[:3]]
        out = function(*leaves, training=True, activation="leaky_relu")
        return torch.autograd.grad(out, leaves, inputs[3])

    def call(function: Function, form: Function = lambda t: t) -> Function:
        inputs = tuple(map(form, (x, gamma, beta, cotangent)))
        return lambda: partial(step, function, *inputs)

    dense = modulation_reference.modulation
    providers = [
        Provider("reference", call(dense), LOW),
        Provider("compiled", lambda: call(compiled(dense))(), LOW, "reference", optional=True),
        Provider("ours", call(modulation), LOW, "reference"),
        Provider("ours channels-last", call(modulation, last), LOW, "reference"),
    ]
    return measure(providers, lambda: step(dense, *wide(x, gamma, beta, cotangent)), scene.device,
                   floor=Floor(15 * nbytes(x)), small=scene.dry)


def _spade_layer(scene: Scene) -> Row:
    """One SPADE layer of a COCO model; the layout is given, compiled in the call, tables kept."""
    n, c, size = scene.pick((8, 128, 256), (1, 8, 32))
    torch.manual_seed(0)
    module = SPADE(c, COCO).eval().to(scene.device)
    low = SPADE(c, COCO).eval().to(scene.device, LOW)
    low.load_state_dict(module.state_dict())
    module.load_state_dict(low.state_dict())  # the same numbers on both sides
    labels = scene.labels("indoor", (size, size), COCO, n)
    planes = one_hot(labels, COCO, LOW)
    x = scene.draw(n, c, size, size, seed=1, dtype=LOW)
    layout = scene.layout(labels, COCO, (size, size))
    kept = LabelLayout(layout.symbols, layout.vectors)
    kept._levels, kept.tables = layout._levels, TableCache()

    def reference(module: SPADE, x: Tensor, planes: Tensor) -> Tensor:
        with use_backend("reference"):
            return module(x, planes)

    lasts = (last(x), last(planes))
    make = partial(Provider, dtype=LOW, like="reference", graph=True)
    providers = [
        Provider("reference", forward(reference, low, x, planes), LOW, graph=True),
        make("reference channels-last", forward(reference, low, *lasts)),
        make("compiled", compiled_forward(reference, low, *lasts), optional=True),
        make("ours", forward(low, last(x), layout)),
        make("ours, tables kept", forward(low, last(x), kept)),
        make("ours, layout in the call", forward(low, last(x), planes), graph=False),
    ]
    truth = lambda: reference(module.double(), x.double(), planes.double())  # noqa: E731
    row = measure(providers, truth, scene.device, floor=Floor(nbytes(x, x)), small=scene.dry)
    v, u = layout.level((size, size)).counts
    return {**row, "V": v, "U": u, "pixels": n * size * size}


def _varying(scene: Scene, backward: bool) -> Row:
    n, c, size = scene.pick((4, 128, 256), (1, 8, 12))
    x = scene.draw(n, c, size, size, dtype=LOW)
    weight = scene.draw(n, 9 * c, size, size, seed=1, dtype=LOW)
    reference = lambda x, w: varying_reference.spatially_varying_conv2d(  # noqa: E731
        x, w.unflatten(1, (c, 9)))
    ours = spatially_varying_conv2d
    if not backward:
        return measure(usual(reference, ours, x, weight), lambda: reference(*wide(x, weight)),
                       scene.device, floor=Floor(nbytes(x, weight, x)), small=scene.dry)
    cotangent = scene.draw(n, c, size, size, seed=2, dtype=LOW)

    def step(function: Function, form: Function, *inputs: Tensor) -> Any:
        leaves = [form(t).detach().requires_grad_() for t in inputs[:2]]
        out, grad = function(*leaves), form(inputs[2])
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    same = lambda t: t  # noqa: E731
    make = partial(Provider, dtype=LOW)
    providers = [
        make("reference", lambda: step(reference, same, x, weight, cotangent)),
        make("ours", lambda: step(ours, same, x, weight, cotangent), like="reference"),
        make("ours channels-last", lambda: step(ours, last, x, weight, cotangent),
             like="reference"),
    ]
    return measure(providers, lambda: step(reference, same, *wide(x, weight, cotangent))(),
                   scene.device, floor=Floor(2 * nbytes(x, weight) + nbytes(x)), small=scene.dry)


def _conditional(scene: Scene) -> Row:
    n, c, depth, size = scene.pick((4, 128, 128, 256), (1, 8, 8, 8))
    x = scene.draw(n, c, size, size, dtype=LOW)
    condition = scene.draw(n, depth, size, size, seed=1, dtype=LOW).relu()
    weight = scene.draw(9 * c, depth, 3, 3, seed=2, dtype=LOW) / (9 * depth) ** 0.5
    inputs = (x, condition, weight, scene.draw(9 * c, seed=3, dtype=LOW))
    operations = 2 * weight.numel() * n * size * size
    reference = conditional_reference.conditional_conv2d
    return measure(usual(reference, conditional_conv2d, *inputs),
                   lambda: reference(*wide(*inputs)), scene.device, matrix=True, small=scene.dry,
                   floor=Floor(nbytes(x, condition, x), operations))


def _elementwise(scene: Scene, op: str) -> Row:
    n, c, size = scene.pick((8, 128, 256), (1, 8, 16))
    x, other = (scene.draw(n, c, size, size, seed=i, dtype=LOW) for i in range(2))
    if op == "norm_act":
        reference: Function = partial(norm_act_reference.norm_act, norm="instance",
                                      activation="relu")
        ours: Function = partial(norm_act, activation="relu")
        bytes_ = nbytes(x, x, other, x)  # statistics first
    else:
        reference, ours = attention_reference.conditional_attention, conditional_attention
        bytes_ = nbytes(x, other, x)
    return measure(usual(reference, ours, x, other), lambda: reference(*wide(x, other)),
                   scene.device, floor=Floor(bytes_), small=scene.dry)


def _pooling(scene: Scene) -> Row:
    """Against the published loop, and torch's own calls on (pixels, C) rows."""
    c, height, width = scene.pick((64, 1024, 2048), (4, 16, 32))
    x = scene.draw(1, c, height, width, dtype=LOW)
    ids = scene.instances("street", (height, width))
    make = partial(Provider, dtype=LOW)
    loop = pool_reference.instance_avg_pool2d
    providers = [
        make("reference", forward(loop, x, ids)),
        make("index_add channels-last", forward(index_add_pool, last(x), ids), like=None),
        make("index_add", forward(index_add_pool, x, ids), like=None),
        make("ours", forward(instance_avg_pool2d, x, ids), like="reference", graph=True),
        make("ours channels-last", forward(instance_avg_pool2d, last(x), ids), like="reference",
             graph=True),
    ]
    row = measure(providers, lambda: loop(x.double(), ids), scene.device, least=3,
                  floor=Floor(nbytes(x, ids, ids, x)), small=scene.dry)
    return {**row, "instances": int(ids.unique().numel())}


def _crops(scene: Scene) -> Row:
    n, classes, size = scene.pick((4, 151, 256), (1, 7, 16))
    image = scene.draw(n, 3, size, size, dtype=LOW)
    labels = scene.labels("indoor", (size, size), classes, n)
    reference = lambda x, s: crops_reference.class_crops(  # noqa: E731
        x, s, classes, (size, size), "nonzero")
    ours = lambda x, s: class_crops(x, s, classes)  # noqa: E731
    make = partial(Provider, dtype=LOW)
    providers = [
        make("reference", forward(reference, image, labels)),
        make("ours", forward(ours, image, labels), like="reference", graph=True),
        make("ours channels-last", forward(ours, last(image), labels), like="reference",
             graph=True),
    ]
    out = image.numel() * classes * image.element_size()
    return measure(providers, lambda: reference(image.double(), labels), scene.device, least=3,
                   floor=Floor(nbytes(image, labels) + out), small=scene.dry)


def _edges(scene: Scene) -> Row:
    n, height, width = scene.pick((8, 1024, 2048), (1, 16, 32))
    ids = scene.instances("street", (height, width)).expand(n, -1, -1).contiguous()
    reference = partial(edges_reference.instance_edges, dtype=torch.float32)
    providers = [
        Provider("reference", forward(reference, ids), graph=True),
        Provider("compiled", compiled_forward(reference, ids), like="reference", graph=True,
                 optional=True),
        Provider("ours", forward(instance_edges, ids), like="reference", graph=True),
    ]
    return measure(providers, lambda: reference(ids), scene.device,
                   floor=Floor(nbytes(ids) + 4 * ids.numel()), small=scene.dry)


def run(journal: Journal, settings: Settings) -> None:
    scene = Scene(settings)
    torch.backends.cudnn.benchmark = True
    rows: dict[str, Callable[[], Row]] = {
        "modulation": partial(_modulation, scene),
        "SPADE layer": partial(_spade_layer, scene),
        "conditional_conv2d": partial(_conditional, scene),
        "spatially_varying_conv2d": partial(_varying, scene, False),
        "instance_avg_pool2d": partial(_pooling, scene),
        "class_crops": partial(_crops, scene),
        "spatially_varying_conv2d backward": partial(_varying, scene, True),
        "modulation step": partial(_modulation_step, scene),
        "norm_act": partial(_elementwise, scene, "norm_act"),
        "conditional_attention": partial(_elementwise, scene, "attention"),
        "instance_edges": partial(_edges, scene),
    }
    for name in journal.late_last(rows):
        journal.row(name, rows[name], needs=3.0 if not settings.dry_run else 0.0)
