"""Small calls of every op with a GPU kernel, which the GPU tests and the sanitizer run.

``python -m benchmarks.gpu.op_cases OP DEVICE`` runs those of one op. Their inputs are made by the
table of the CPU's tests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smis_kernels.runtime.backend import missing, triton_interpreted
from smis_kernels.runtime.native import cuda_emulated
from tests.op_cases import CASES as TABLE
from tests.op_cases import Made, OpCase, Shape, results

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class GpuCase:
    """One op on small inputs.

    Attributes:
        op: its folder. name: unique.
        row: of the table of ops.
        shape: of its features.
        options: of the row that differ from its default.
        repeatable: the same bits in every run.
        wide: positions of inputs that stay in the accumulation dtype.
        only: the dtypes that it is run in; default: the row's.
    """

    op: str
    name: str
    row: str
    shape: Shape
    options: dict[str, Any] = field(default_factory=dict)
    repeatable: bool = True
    wide: tuple[int, ...] = ()
    only: tuple[torch.dtype, ...] = ()

    @property
    def case(self) -> OpCase:
        """The row of the table."""
        return TABLE[self.row]

    @property
    def kind(self) -> str:
        """Of its GPU kernel, "triton" or "cuda"."""
        return self.case.gpu

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """That it takes."""
        return self.only or self.case.dtypes

    def inputs(self, device: str | torch.device, dtype: torch.dtype,
               layout: str = "contiguous") -> Made:
        """The call, and inputs of ``dtype``; 4-D ones in ``layout``."""
        options = self.case.default(**self.options)
        return self.case.build(self.shape, layout, dtype, options, device=device, wide=self.wide)

    def run(self, made: Made, backend: str, against: list[Tensor] | None = None) -> list[Tensor]:
        """Outputs, then gradients."""
        return results(self.case, *made, backend, against)

    def backend(self, device: str) -> str:
        """The kernel's backend; on a CPU, the interpreted or emulated one or the C++ kernel."""
        if device == "cuda" or (self.kind == "cuda" and cuda_emulated()):
            return self.kind
        return "triton" if self.kind == "triton" and triton_interpreted() else "cpu"

    def problem(self, device: str) -> str | None:
        """Why the kernel cannot run here, or None."""
        return missing(self.backend(device))


SHAPE: Shape = (2, 24, 9, 20)
_NORMS: dict[str, dict[str, Any]] = {
    "batch": {}, "instance": {"norm": "instance", "activation": "relu"},
    "group": {"norm": "group", "activation": None}, "none": {"norm": "none", "activation": None},
    "upsampled": {"upsample": True}, "pair": {}, "pair upsampled": {"upsample": True},
}


def _norm_cases() -> Iterator[GpuCase]:
    for name, options in _NORMS.items():
        pair = "_pair" if "pair" in name else ""
        yield GpuCase("modulation", f"modulation {name}", f"modulation{pair}", SHAPE, options)
        yield GpuCase("indexed_modulation", f"indexed_modulation {name}",
                      f"indexed_modulation{pair}", SHAPE, {**options, "rows": 11}, wide=(1, 2))
    for name in ("instance", "batch"):
        yield GpuCase("norm_act", f"norm_act {name}", "norm_act", SHAPE, {
            "norm": name, "activation": "relu" if name == "instance" else None})


def _table_cases() -> Iterator[GpuCase]:
    yield GpuCase("indexed_relu", "indexed_relu", "indexed_relu", SHAPE, {"parts": 5, "rows": 11})
    yield GpuCase("window_table", "window_embedding", "window_embedding", (3, 4, 8, 5),
                  {"groups": 2})
    for groups, shape in ((1, (20, 72, 10, 7)), (2, (3, 2, 10, 7))):
        for level in (False, True):
            yield GpuCase("window_table", f"window_table {groups} groups, "
                          f"{'one level' if level else 'two levels'}", "window_table", shape,
                          {"groups": groups, "one_level": level})
        yield GpuCase("level_tables", f"level_tables of two norms, {groups} groups",
                      "level_tables", shape, {"groups": groups, "norms": 2})


def _conv_cases() -> Iterator[GpuCase]:
    for name, groups, options in (
        ("3x3", 8, {}), ("3x3 of 2 groups", 2, {"each": 4}),
        ("1x1", 8, {"kernel_size": 1, "padding": 0}), ("5x5", 8, {"kernel_size": 5, "padding": 2}),
        ("stride 2", 8, {"stride": 2}), ("dilation 2", 8, {"dilation": 2, "padding": 2}),
    ):
        yield GpuCase("spatially_varying_conv", f"spatially_varying_conv {name}",
                      "spatially_varying_conv2d", (2, groups, 11, 14), options)
    yield GpuCase("conditional_conv", "conditional_conv", "conditional_conv2d", (1, 10, 6, 9),
                  {"depth": 20}, repeatable=False)
    yield GpuCase("conditional_attention", "conditional_attention", "conditional_attention", SHAPE)


def _integer_cases() -> Iterator[GpuCase]:
    maps: Shape = (2, 5, 21, 34)
    for of, planes in (("labels", False), ("planes", True)):
        yield GpuCase("class_crops", f"class_crops of {of}", "class_crops", (2, 3, 21, 34),
                      {"planes": planes, "size": (16, 24)})
    for name in ("instance_avg_pool2d", "instance_mean_table"):
        yield GpuCase("instance_pool", name, name, maps, {"ids": 9}, repeatable=False)
    single = (torch.float32,)
    yield GpuCase("instance_edges", "instance_edges", "instance_edges", maps, only=single)
    yield GpuCase("label_windows", "number_windows", "number_windows", maps, only=single)
    yield GpuCase("label_windows", "number_vectors", "number_vectors", maps)


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
            dtype = dtype if dtype in case.dtypes else torch.float32
            case.run(case.inputs(device, dtype, layout), case.backend(device))
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(chosen) * len(kinds)} runs of {name}")


if __name__ == "__main__":
    main()
