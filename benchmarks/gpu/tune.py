"""Part ``tune``: tries launch settings, forms and paths, and writes what measured fastest.

The table goes to the results and, on a GPU, to ``smis_kernels/tuned/<gpu>.json``, where the
launchers read it from then on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smis_kernels import conditional_conv2d, modulation, norm_act
from smis_kernels.ops.conditional_conv.triton import USUAL as CONDITIONAL
from smis_kernels.ops.indexed_modulation.op import indexed_modulation
from smis_kernels.ops.modulation.op import channel_moments
from smis_kernels.ops.window_table.op import window_table
from smis_kernels.ops.window_table.triton import PRODUCT
from smis_kernels.runtime import tuned as _tuned
from smis_kernels.runtime.triton_tile import APPLY, BACKWARD
from smis_kernels.runtime.tuned import Setting
from smis_kernels.testing import max_error
from smis_models.benchmark import timing

from .inputs import COCO, Scene
from .journal import Journal, Row, write_json
from .measure import release
from .settings import Settings
from .tune_convs import conv_rows
from .tune_rates import path_rates

LOW = torch.bfloat16
MARGIN = 0.97  # a setting replaces the usual one where it takes less than this share of its time
Call = Callable[[], Any]


def tiles(usual: Setting, *sizes: int) -> list[Setting]:
    """The usual setting, then other tiles and warps."""
    others = [{"tile": tile, "warps": warps} for tile in sizes for warps in (4, 8)]
    return [usual, *(s for s in others if s != usual)]


def blocks(usual: Setting, *shapes: tuple[int, int, int, int, int]) -> list[Setting]:
    """The usual setting, then other (block, block, depth, warps, stages)."""
    names = list(usual)
    others = [dict(zip(names, shape, strict=True)) for shape in shapes]
    return [usual, *(s for s in others if s != usual)]


def eps(result: Tensor) -> float:
    """The unit of the result's dtype."""
    return float(torch.finfo(result.dtype).eps)


def _first(outputs: Any) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def choose(kernel: str, key: str, candidates: list[Setting], make: Callable[[], Call],
           device: torch.device) -> Row:
    """Time each candidate on one input; a result that differs from the first's is refused."""
    call = make()
    expected = None
    found: list[tuple[float, Setting]] = []
    notes: list[str] = []
    for candidate in candidates:
        with _tuned.trial(kernel, candidate):
            try:
                result = _first(call())
                if expected is None:
                    expected = result.clone()
                error = max_error(result, expected)
                if not error <= (2 if result.element_size() == 2 else 64) * eps(result):
                    raise ArithmeticError(f"differs by {error:.1e}")
                rounds = 7 if device.type == "cuda" else 1
                found.append((timing.replay_seconds(call, device, rounds), candidate))
            except Exception as error:  # out of shared memory, say
                if candidate is candidates[0]:
                    raise
                torch.cuda.synchronize() if device.type == "cuda" else None
                notes.append(f"{candidate}: {type(error).__name__}: {error}"[:200])
    usual = found[0]
    best = min(found, key=lambda pair: pair[0])
    chosen = best if best[0] < MARGIN * usual[0] else usual
    return {"kernel": kernel, "key": key, "chosen": chosen[1], "usual_seconds": usual[0],
            "chosen_seconds": chosen[0], "refused": notes,
            "tried": [{"seconds": seconds, **candidate} for seconds, candidate in found]}


Job = tuple[str, str, str, list[Setting], Callable[[], Call]]


def _pointwise(scene: Scene) -> Iterator[Job]:
    n, c, size = scene.pick((8, 128, 256), (1, 8, 8))
    backend = "triton" if scene.dry else "auto"

    def make(function: Callable[..., Any], last: bool, **options: Any) -> Call:
        x, g, b = (scene.draw(n, c, size, size, seed=i, dtype=LOW if not scene.dry else
                              torch.float32, channels_last=last) for i in range(3))
        mean, var = scene.draw(c, seed=3), scene.draw(c, seed=4).square() + 0.5
        return lambda: function(x, g, b, running_mean=mean, running_var=var, backend=backend,
                                **options)

    def indexed() -> Call:
        x = scene.draw(n, c, size, size, dtype=LOW if not scene.dry else torch.float32,
                       channels_last=True)
        labels = scene.labels("indoor", (size, size), COCO, n)
        level = scene.layout(labels, COCO).level((size, size))
        table = scene.draw(int(level.index5.max()) + 1, 2 * c, seed=3).to(x.dtype)
        return lambda: indexed_modulation(x, level.index5, table, norm="none", backend=backend,
                                          activation="leaky_relu")

    def moments() -> Call:
        x = scene.draw(n, c, size, size, dtype=LOW if not scene.dry else torch.float32,
                       channels_last=True)
        return lambda: channel_moments("triton", x)

    def backward(last: bool) -> Call:
        x, g, b, dy = (scene.draw(n, c, size, size, seed=i, dtype=LOW if not scene.dry else
                                  torch.float32, channels_last=last) for i in range(4))
        leaves = [t.requires_grad_() for t in (x, g, b)]

        def step() -> Any:
            # forward too: a backward pass runs on the stream of its forward, which is captured
            y = modulation(*leaves, norm="none", activation="leaky_relu", backend=backend)
            return torch.autograd.grad(y, leaves, dy)

        return step

    kind = "float32" if scene.dry else "bfloat16"
    rows, planes = f"{kind} rows", f"{kind} planes"
    yield ("indexed_apply", rows, "indexed_apply, rows", tiles(APPLY, 1024, 4096, 8192), indexed)
    for key, last in ((rows, True), (planes, False)):
        yield ("modulation_apply", key, f"modulation_apply, {key.split()[1]}",
               tiles(APPLY, 1024, 4096), partial(make, modulation, last, activation="leaky_relu"))
    yield "channel_moments", rows, "channel_moments, rows", tiles(APPLY, 1024, 4096), moments
    yield ("modulation_backward", rows, "modulation_backward, rows", tiles(BACKWARD, 1024, 4096),
           partial(backward, True))

    def normed() -> Call:
        x, r = (scene.draw(n, c, size, size, seed=i, channels_last=True,
                           dtype=LOW if not scene.dry else torch.float32) for i in range(2))
        return lambda: norm_act(x, r, norm="none", activation="relu", backend=backend)

    yield "norm_act", rows, "norm_act, rows", tiles(APPLY, 1024, 4096), normed


def _products(scene: Scene) -> Iterator[Job]:
    backend = "triton" if scene.dry else "auto"

    def conv() -> Call:
        n, c, depth, size = scene.pick((4, 128, 128, 128), (1, 4, 4, 4))
        dtype = torch.float32 if scene.dry else LOW
        x, h = (scene.draw(n, k, size, size, seed=k, dtype=dtype, channels_last=True)
                for k in (c, depth))
        weight = scene.draw(9 * c, depth, 3, 3, dtype=dtype) / (9 * depth) ** 0.5
        return lambda: conditional_conv2d(x, h, weight, backend=backend)

    shapes = ((64, 64, 64, 4, 3), (64, 64, 64, 8, 3), (128, 64, 64, 8, 3), (128, 64, 32, 8, 4),
              (128, 128, 32, 8, 3), (64, 128, 64, 8, 3), (128, 128, 64, 16, 3))
    yield ("conditional_conv", "float32" if scene.dry else "bfloat16", "conditional_conv",
           blocks(CONDITIONAL["conditional_conv"][4 if scene.dry else 2],
                  *(shapes[:1] if scene.dry else shapes)), conv)

    def table(one_level: bool, low: bool) -> Call:
        v, u, depth, channels = scene.pick((6000, 12000, 128, 512), (5, 7, 6, 8))
        hidden = scene.draw(v, depth)
        kind = LOW if low else torch.float32
        weights = [scene.draw(channels, depth, 3, 3, seed=s).to(kind) / 34 for s in (1, 2)]
        biases = [scene.draw(channels, seed=s) for s in (3, 4)]
        windows = torch.randint(v, (u, 9), device=scene.device).int()
        return lambda: window_table(hidden, weights[0], biases[0], weights[1], biases[1], windows,
                                    one_level=one_level, backend=backend)

    for precision, low in (("tf32", True), ("tf32x3", False)):
        shapes = ((64, 64, 32, 4, 3), (64, 64, 32, 8, 3), (128, 64, 32, 8, 3), (64, 128, 32, 8, 3),
                  (64, 64, 16, 4, 4), (64, 64, 32, 4, 4))
        for one_level in (True, False):
            level = "one level" if one_level else "two levels"
            key = f"{precision} {level}"
            yield ("window_product", key, f"window_product, {key}",
                   blocks(PRODUCT[precision], *(shapes[:1] if scene.dry else shapes)),
                   partial(table, one_level, low))


def write_table(journal: Journal, settings: Settings) -> Path:
    """The launch settings, conv forms and path rates of all rows, as the package reads them."""
    chosen: dict[str, dict[str, Setting]] = {}
    content: dict[str, Any] = {"settings": chosen}
    for row in journal.rows:
        if row["state"] != "done":
            continue
        if "kernel" in row:
            chosen.setdefault(row["kernel"], {})[row["key"]] = row["chosen"]
        for name in ("rates", "convs"):
            if name in row:
                content.setdefault(name, {}).update(row[name])
    gpu = "cpu" if settings.dry_run else torch.cuda.get_device_name(0)
    content |= {"device": gpu, "commit": settings.commit, "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d")}
    assert settings.table is not None
    path = Path(settings.table)
    write_json(path, content)
    if not settings.dry_run:
        _tuned.FOLDER.mkdir(exist_ok=True)
        shutil.copyfile(path, _tuned.FOLDER / _tuned.file_name(gpu))
    _tuned.read_table(path)
    return path


def run(journal: Journal, settings: Settings) -> None:
    scene = Scene(settings)
    torch.backends.cudnn.benchmark = True
    jobs = [*_pointwise(scene), *_products(scene)]
    if settings.dry_run:
        jobs = [(*job[:3], job[3][:2], job[4]) for job in jobs
                if job[0] in ("indexed_apply", "modulation_apply", "window_product")]
    rows: dict[str, Callable[[], Row]] = {
        name: partial(choose, kernel, key, candidates, make, scene.device)
        for kernel, key, name, candidates, make in jobs
    }
    rows |= dict((*path_rates(scene), *conv_rows(scene)))
    for name in journal.late_last(rows):
        journal.row(name, rows[name])
        write_table(journal, settings)  # now: a part that is ended at its deadline writes no more
        release()
