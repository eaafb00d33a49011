"""What Triton's kernels compile to, without a GPU: specialisations, instructions, accesses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from smis_kernels.ops.conditional_conv.triton import conditional_conv
from smis_kernels.ops.indexed_modulation.triton import indexed_modulation_apply
from smis_kernels.ops.modulation.triton import channel_moments, modulation_apply
from smis_kernels.ops.window_table.triton import table_products, window_sum, window_table
from smis_kernels.runtime.backend import triton_interpreted
from smis_kernels.runtime.triton_support import meta
from tools import kernel_report

pytestmark = pytest.mark.skipif(triton_interpreted(), reason="interpreted kernels do not compile")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(call: Callable[[], object], arch: int = 90) -> dict[str, str]:
    with kernel_report.compiling(arch) as launched:
        call()
    return {name: kernel.asm["ptx"] for name, kernel, _ in launched}


def test_sizes_that_maps_decide_do_not_compile_again() -> None:
    x, m = meta(1, 16, 8, 8, nhwc=True), meta(1, 16)
    index = meta(1, 8, 8, dtype=torch.int32)
    weight, bias = meta(32, 16, 3, 3), meta(32)

    def calls(rows: int, windows: int) -> None:
        ids = meta(windows, 9, dtype=torch.int32)
        indexed_modulation_apply(x, m, m, index, meta(windows, 32), None, None, None, 0.2, 1.0,
                                 False)
        window_sum(meta(rows, 9, 32), ids, None, True)
        table_products(meta(rows, 9, 64), meta(rows, 16), weight, weight, 1, False)
        for one_level in (False, True):
            window_table(meta(rows, 16), weight, bias, weight, bias, ids, 1, one_level)

    kernels: dict[str, set[int]] = {}
    with kernel_report.compiling(90) as launched:
        for rows, windows in ((64, 160), (17, 33), (1, 1), (4000, 9000)):
            calls(rows, windows)
    for name, kernel, _ in launched:
        kernels.setdefault(name, set()).add(id(kernel))
    counts = {name: len(found) for name, found in kernels.items()}
    # two levels, one level; sums with and without a bias
    assert counts == {"indexed_apply_kernel": 1, "window_sum_kernel": 2,
                      "window_product_kernel": 2, "hidden_gradient_kernel": 1,
                      "weight_gradient_kernel": 1}


@pytest.mark.parametrize("channels", [160, 280, 320])
def test_rows_are_read_16_bytes_at_a_time(channels: int) -> None:
    x = meta(2, channels, 21, 13, dtype=torch.bfloat16, nhwc=True)
    m = meta(2, channels)
    (apply,) = compiled(lambda: modulation_apply(x, m, m, x, x, None, None, None, None, 0.2, 1.0,
                                                 False)).values()
    moments = compiled(lambda: channel_moments(x))["channel_moments_kernel"]
    for ptx in (apply, moments):
        assert set(re.findall(r"(\d+):", kernel_report.accesses(ptx, "ld"))) == {"16"}
    assert kernel_report.accesses(apply, "st").startswith("16:")
    assert "bar.sync" not in apply  # statistics reach their threads without shared memory


def test_moments_meet_once_behind_the_loop() -> None:
    ptx = compiled(lambda: channel_moments(meta(1, 128, 256, 256, dtype=torch.bfloat16, nhwc=True))
                   )["channel_moments_kernel"]
    inside: list[str] = []
    for label, body in re.findall(r"^(\$L__BB\d+_\d+):(.*?)bra\s+\1;", ptx, re.M | re.S):
        inside.append(label)
        assert not re.search(r"\bbar\.sync|\bshfl\.", body), label
    assert inside


@pytest.mark.parametrize(("kind", "rounds"), [(torch.bfloat16, True), (torch.float32, False)])
def test_tf32_products_round_their_rows(kind: torch.dtype, rounds: bool) -> None:
    weight, bias = meta(64, 32, 3, 3, dtype=kind), meta(64)
    for arch in (80, 90):
        ptx = compiled(lambda: window_table(meta(70, 32), weight, bias, weight, bias,
                                            meta(99, 9, dtype=torch.int32), 1, True), arch)
        (product,) = ptx.values()
        assert kernel_report.products(product) == ("tf32",)
        if rounds:
            assert "cvt.rna.tf32.f32" in product


@pytest.mark.parametrize(("arch", "instruction"), [
    (80, r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32"),
    (90, r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16"),
])
def test_bfloat16_products_are_bfloat16(arch: int, instruction: str) -> None:
    x, h = (meta(1, c, 32, 32, dtype=torch.bfloat16, nhwc=True) for c in (64, 32))
    weight = meta(9 * 64, 32, 3, 3, dtype=torch.bfloat16)
    (ptx,) = compiled(lambda: conditional_conv(x, h, weight, None), arch).values()
    assert re.search(instruction, ptx)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("arch", [80, 90])
def test_gradients_of_tables_are_products_of_tensor_cores(arch: int, single: bool) -> None:
    weight = meta(64, 32, 3, 3)
    kernels = compiled(lambda: table_products(meta(300, 9, 128), meta(300, 32), weight, weight, 1,
                                              single), arch)
    assert set(kernels) == {"hidden_gradient_kernel", "weight_gradient_kernel"}
    for name, ptx in kernels.items():
        assert kernel_report.products(ptx) == ("tf32",), name
        widths = set(re.findall(r"(\d+):", kernel_report.accesses(ptx, "ld")))
        # an operand that is transposed is read by single floats
        assert widths == ({"16"} if name.startswith("hidden") else {"16", "4"}), name
        assert kernel_report.accesses(ptx, "st").startswith("16:"), name
        # of both operands, 64 x 32 and 32 x 32: the tensor cores cut off what they do not read
        assert not single or ptx.count("cvt.rna.tf32.f32") >= (64 + 32) * 32 // 128, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("channels", "size"), [(128, 256), (64, 256), (1024, 16)])
def test_predicted_kernels_are_bound_by_their_products(channels: int, size: int,
                                                       dtype: torch.dtype, tmp_path: Path) -> None:
    """What CC-FPSE calls: the loop issues in less time than its tensor-core products take."""
    x, h = (meta(1, c, size, size, dtype=dtype, nhwc=True) for c in (channels, 128))
    weight = meta(9 * channels, 128, 3, 3, dtype=dtype)
    with kernel_report.compiling(90) as launched:
        conditional_conv(x, h, weight, None)
    ((_, kernel, _),) = launched
    ptx = kernel.asm["ptx"]
    said, code = kernel_report.assembled(ptx, str(tmp_path))
    assert 0 < kernel_report.issue_share(kernel_report.disassembled(code)) <= 1
    for word in ("ld", "st"):
        assert set(re.findall(r"(\d+):", kernel_report.accesses(ptx, word))) == {"16"}
    (usage,) = kernel_report.parse_ptxas("", said)
    assert usage.spills == 0
