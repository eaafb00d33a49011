"""Small calls of every op, which the GPU tests and the sanitizer run.

``python -m benchmarks.gpu.op_cases OP DEVICE`` runs those of one op.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smis_kernels import (
    class_crops,
    conditional_attention,
    conditional_conv2d,
    instance_avg_pool2d,
    instance_edges,
    instance_mean_table,
    modulation,
    modulation_pair,
    norm_act,
    spatially_varying_conv2d,
)
from smis_kernels.ops.indexed_modulation.op import indexed_modulation, indexed_modulation_pair
from smis_kernels.ops.label_windows.op import number_vectors, number_windows
from smis_kernels.ops.window_table.op import window_embedding, window_table
from smis_kernels.runtime.backend import missing, triton_interpreted
from smis_kernels.runtime.native import cuda_emulated
from smis_kernels.testing import with_memory_format

HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64, *HALF)
WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class OpCase:
    """One op on small inputs.

    Attributes:
        op: its folder. name: unique.
        kind: of its GPU kernel, "triton" or "cuda".
        make: floating inputs (float64, on the CPU) and integer ones.
        call: ``call(*floating, *integer, backend=...)``.
        dtypes: that it takes.
        wide: positions of floating inputs that stay in the accumulation dtype.
        leaves: how many of the floating inputs get gradients, from the first on.
        repeatable: the same bits in every run.
    """

    op: str
    name: str
    kind: str
    make: Callable[[], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
    call: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    wide: tuple[int, ...] = ()
    leaves: int = 99
    repeatable: bool = True

    def inputs(self, device: str | torch.device, dtype: torch.dtype,
               layout: str = "contiguous") -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Inputs of ``dtype``; 4-D ones in ``layout``."""
        floating, integer = self.make()
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        placed = [t.to(device, acc if i in self.wide else dtype) for i, t in enumerate(floating)]
        laid = tuple(with_memory_format(t, layout) if t.dim() == 4 else t for t in placed)
        return laid, tuple(t.to(device) for t in integer)

    def backend(self, device: str) -> str:
        """The kernel's backend; on a CPU, the interpreted or emulated one or the C++ kernel."""
        if device == "cuda" or (self.kind == "cuda" and cuda_emulated()):
            return self.kind
        return "triton" if self.kind == "triton" and triton_interpreted() else "cpu"

    def problem(self, device: str) -> str | None:
        """Why the kernel cannot run here, or None."""
        return missing(self.backend(device))


def outputs(result: Any) -> list[Tensor]:
    """The tensors that an op returns."""
    return [result] if isinstance(result, Tensor) else list(result)


def cotangents(results: list[Tensor]) -> list[Tensor]:
    """What the gradients of ``results`` are taken against: normal, the same in every run."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in results]


def run(case: OpCase, floating: tuple[Tensor, ...], integer: tuple[Tensor, ...], backend: str,
        against: list[Tensor] | None = None) -> list[Tensor]:
    """Outputs, then the gradients against ``against`` (:func:`cotangents` by default)."""
    count = min(case.leaves, len(floating))
    leaves = [t.detach().requires_grad_(i < count) for i, t in enumerate(floating)]
    found = outputs(case.call(*leaves, *integer, backend=backend))
    if count == 0:
        return found
    against = cotangents(found) if against is None else against
    return [*(t.detach() for t in found),
            *torch.autograd.grad(found, leaves[:count], against)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def blocky(shape: tuple[int, int, int], count: int, seed: int = 0) -> Tensor:
    """(N, H, W) numbers below ``count`` in patches, as label maps have them."""
    n, h, w = shape
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(count, (n, -(-h // 4), -(-w // 5)), generator=generator)
    return coarse.repeat_interleave(4, 1).repeat_interleave(5, 2)[:, :h, :w].contiguous()


def _windows(count: int, rows: int) -> Tensor:
    found = torch.randint(rows, (count + 1, 9), generator=torch.Generator().manual_seed(count))
    found[0] = 0
    return found.int()


def _outside_zero(rows: Tensor) -> Tensor:
    rows[0] = 0
    return rows


SHAPE = (2, 24, 9, 20)


def _modulation(outputs: int, up: int, shape: tuple[int, ...] = SHAPE) -> Any:
    n, c, h, w = shape
    wide = (n, c, up * h, up * w)
    return (draw(*shape) + 1, *(draw(*wide, seed=s) for s in range(1, 2 * outputs + 1))), ()


def _indexed(outputs: int, up: int, shape: tuple[int, ...] = SHAPE) -> Any:
    n, c, h, w = shape
    tables = (draw(11, 2 * c, seed=s) for s in range(outputs))
    return (draw(*shape) + 1, *tables), (blocky((n, up * h, up * w), 11).int(),)


def _index_second(function: Any, x: Tensor, *rest: Tensor, **options: Any) -> Any:
    *tables, index = rest
    return function(x, index, *tables, **options)


def _norm_cases() -> list[OpCase]:
    found = []
    trained = {"training": True, "activation": "leaky_relu"}
    for name, count, up, options in (
        ("batch", 1, 1, trained), ("instance", 1, 1, {"norm": "instance", "activation": "relu"}),
        ("group", 1, 1, {"norm": "group", "num_groups": 4}), ("none", 1, 1, {"norm": "none"}),
        ("upsampled", 1, 2, trained), ("pair", 2, 1, trained),
        ("pair upsampled", 2, 2, trained),
    ):
        options = {**options, "upsample": up == 2}
        dense = partial(modulation_pair if count == 2 else modulation, **options)
        indexed = partial(_index_second, partial(
            indexed_modulation_pair if count == 2 else indexed_modulation, **options))
        found += [
            OpCase("modulation", f"modulation {name}", "triton",
                   partial(_modulation, count, up), dense),
            OpCase("indexed_modulation", f"indexed_modulation {name}", "triton",
                   partial(_indexed, count, up), indexed, wide=(1, 2)),
        ]
    for name, options in (("instance", {"activation": "relu"}),
                          ("batch", {"norm": "batch", "training": True})):
        found.append(OpCase("norm_act", f"norm_act {name}", "triton",
                            lambda: ((draw(*SHAPE), draw(*SHAPE, seed=1)), ()),
                            partial(norm_act, **options)))
    return found


def _table(groups: int, depth: int, channels: int) -> Any:
    hidden = _outside_zero(draw(6, depth))
    weights = (draw(channels, depth // groups, 3, 3, seed=s) for s in (1, 2))
    biases = (draw(channels, seed=s) for s in (3, 4))
    pairs = (t for pair in zip(weights, biases, strict=True) for t in pair)
    return (hidden, *pairs), (_windows(70, 6),)


def _embedding() -> Any:
    return (_outside_zero(draw(5, 6)), draw(8, 3, 3, 3), draw(8)), (_windows(40, 5),)


def _table_cases() -> list[OpCase]:
    cases = [OpCase("window_table", "window_embedding", "triton", _embedding,
                    partial(window_embedding, groups=2), WIDE)]
    for groups, depth, channels in ((1, 40, 72), (2, 6, 4)):
        for level in (False, True):
            name = f"window_table {groups} groups, {'one level' if level else 'two levels'}"
            call = partial(window_table, groups=groups, one_level=level)
            cases.append(OpCase("window_table", name, "triton",
                                partial(_table, groups, depth, channels), call, WIDE))
    return cases


def _varying(groups: int, kernel: int, height: int, width: int) -> Any:
    return (draw(2, 8, 11, 14), draw(2, groups * kernel**2, height, width)), ()


def _conv_cases() -> list[OpCase]:
    op = "spatially_varying_conv"
    cases = [
        OpCase(op, f"{op} {name}", "cuda", partial(_varying, groups, size, *out),
               partial(spatially_varying_conv2d, kernel_size=size, **options))
        for name, groups, size, out, options in (
            ("3x3", 8, 3, (11, 14), {}), ("3x3 of 2 groups", 2, 3, (11, 14), {}),
            ("1x1", 8, 1, (11, 14), {"padding": 0}), ("5x5", 8, 5, (11, 14), {"padding": 2}),
            ("stride 2", 8, 3, (6, 7), {"stride": 2}),
            ("dilation 2", 8, 3, (11, 14), {"dilation": 2, "padding": 2}),
        )
    ]

    def conditional() -> Any:
        floating = (draw(1, 10, 6, 9), draw(1, 20, 6, 9), draw(90, 20, 3, 3) / 13, draw(90))
        return floating, ()

    cases.append(OpCase("conditional_conv", "conditional_conv", "triton", conditional,
                        conditional_conv2d))
    cases.append(OpCase("conditional_attention", "conditional_attention", "triton",
                        lambda: ((draw(*SHAPE), draw(*SHAPE, seed=1)), ()),
                        conditional_attention))
    return cases


def _crops(planes: bool) -> Any:
    labels = blocky((2, 21, 34), 6)
    if not planes:
        return (draw(2, 3, 21, 34),), (labels,)
    one_hot = torch.nn.functional.one_hot(labels, 6).permute(0, 3, 1, 2).double()
    return (draw(2, 3, 21, 34), one_hot), ()


def _integer_cases() -> list[OpCase]:
    crops = partial(class_crops, num_classes=6, size=(16, 24))
    ids = 1000 * blocky((2, 21, 34), 9)
    one_hot = torch.nn.functional.one_hot(blocky((2, 21, 34), 6), 6).permute(0, 3, 1, 2).double()

    def pooled() -> Any:
        return (draw(2, 5, 21, 34),), (ids,)

    return [
        OpCase("class_crops", "class_crops of labels", "cuda", partial(_crops, False), crops),
        OpCase("class_crops", "class_crops of planes", "cuda", partial(_crops, True), crops,
               leaves=1),
        OpCase("instance_pool", "instance_avg_pool2d", "cuda", pooled, instance_avg_pool2d,
               repeatable=False),
        OpCase("instance_pool", "instance_mean_table", "cuda", pooled,
               lambda x, ids, backend: instance_mean_table(x, ids, backend=backend), leaves=0,
               repeatable=False),
        OpCase("instance_edges", "instance_edges", "cuda", lambda: ((), (ids,)), instance_edges,
               (torch.float32,)),
        OpCase("label_windows", "number_windows", "cuda", lambda: ((), (ids.int() // 1000 + 1,)),
               lambda ids, backend: number_windows(ids, 999, backend=backend), (torch.float32,)),
        OpCase("label_windows", "number_vectors", "cuda", lambda: ((one_hot,), ()),
               lambda x, backend: number_vectors(x, 99, backend=backend), leaves=0),
    ]


CASES = [*_norm_cases(), *_table_cases(), *_conv_cases(), *_integer_cases()]

# Not sliced: beyond its end a slice has memory that is the program's own.
KINDS = ((torch.float32, "contiguous"), (torch.bfloat16, "channels_last"))


def main() -> None:
    """Run the cases of one op."""
    name, device = sys.argv[1:3]
    chosen = [case for case in CASES if case.op == name]
    if not chosen:
        sys.exit(f"no case of {name}")
    kinds = KINDS[:1] if device == "cpu" else KINDS
    for case in chosen:
        for dtype, layout in kinds:
            floating, integer = case.inputs(
                device, dtype if dtype in case.dtypes else torch.float32, layout)
            run(case, floating, integer, case.backend(device))
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(chosen) * len(kinds)} runs of {name}")


if __name__ == "__main__":
    main()
