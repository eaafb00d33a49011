"""Part ``tune``: tries launch settings, forms and paths, and writes what measured fastest.

The table goes to the results and, on a GPU, to ``smis_kernels/tuned/<gpu>.json``, where the
launchers read it from then on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smis_kernels import LabelLayout, conditional_conv2d, modulation, norm_act
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
from smis_models.benchmark.case import COCO_CLASSES, Maps
from smis_models.benchmark.case import Setting as Place
from smis_models.benchmark.measure import release

from .results import Journal, Row, Settings, write_json
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


def _last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def _pointwise(place: Place) -> Iterator[Job]:
    n, c, size = place.pick((8, 128, 256), (1, 8, 8))
    backend = place.pick("auto", "triton")

    def drawn(count: int, last: bool = True) -> list[Tensor]:
        found = (place.draw(n, c, size, size, seed=i) for i in range(count))
        return [_last(x) if last else x for x in found]

    def apply(last: bool) -> Call:
        mean = place.draw(c, seed=3).float()
        return partial(modulation, *drawn(3, last), running_mean=mean, backend=backend,
                       running_var=mean.square() + 0.5, activation="leaky_relu")

    def indexed() -> Call:
        labels = place.labels("indoor", (size, size), COCO_CLASSES, n)
        level = LabelLayout.from_labels(labels, COCO_CLASSES).level((size, size))
        table = place.draw(int(level.index5.max()) + 1, 2 * c, seed=3)
        return partial(indexed_modulation, drawn(1)[0], level.index5, table, norm="none",
                       backend=backend, activation="leaky_relu")

    def backward() -> Call:
        *leaves, dy = drawn(4)
        leaves = [t.requires_grad_() for t in leaves]

        def step() -> Any:
            # forward too: a backward pass runs on the stream of its forward, which is captured
            y = modulation(*leaves, norm="none", activation="leaky_relu", backend=backend)
            return torch.autograd.grad(y, leaves, dy)

        return step

    kind = str(place.dtype).removeprefix("torch.")
    rows, planes = f"{kind} rows", f"{kind} planes"
    yield ("indexed_apply", rows, "indexed_apply, rows", tiles(APPLY, 1024, 4096, 8192), indexed)
    for key, last in ((rows, True), (planes, False)):
        yield ("modulation_apply", key, f"modulation_apply, {key.split()[1]}",
               tiles(APPLY, 1024, 4096), partial(apply, last))
    yield ("channel_moments", rows, "channel_moments, rows", tiles(APPLY, 1024, 4096),
           lambda: partial(channel_moments, "triton", *drawn(1)))
    yield ("modulation_backward", rows, "modulation_backward, rows", tiles(BACKWARD, 1024, 4096),
           backward)
    yield ("norm_act", rows, "norm_act, rows", tiles(APPLY, 1024, 4096),
           lambda: partial(norm_act, *drawn(2), norm="none", activation="relu", backend=backend))


def _products(place: Place) -> Iterator[Job]:
    backend = place.pick("auto", "triton")

    def conv() -> Call:
        n, c, depth, size = place.pick((4, 128, 128, 128), (1, 4, 4, 4))
        x, h = (_last(place.draw(n, k, size, size, seed=k)) for k in (c, depth))
        weight = place.draw(9 * c, depth, 3, 3) / (9 * depth) ** 0.5
        return partial(conditional_conv2d, x, h, weight, backend=backend)

    shapes = ((128, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 8, 5),
              (256, 64, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 64, 4, 4))
    yield ("conditional_conv", str(place.dtype).removeprefix("torch."), "conditional_conv",
           blocks(CONDITIONAL[place.pick(2, 4)], *place.pick(shapes, shapes[:1])), conv)

    def table(one_level: bool, low: bool) -> Call:
        v, u, depth, channels = place.pick((6000, 12000, 128, 512), (5, 7, 6, 8))
        wide = replace(place, dtype=torch.float32)
        given = replace(place, dtype=LOW) if low else wide
        weights = [given.draw(channels, depth, 3, 3, seed=s) / 34 for s in (1, 2)]
        biases = [wide.draw(channels, seed=s) for s in (3, 4)]
        windows = torch.randint(v, (u, 9), device=place.device).int()
        return partial(window_table, wide.draw(v, depth), weights[0], biases[0], weights[1],
                       biases[1], windows, one_level=one_level, backend=backend)

    products = ((64, 64, 32, 4, 3), (64, 64, 32, 8, 3), (128, 64, 32, 8, 3), (64, 128, 32, 8, 3),
                (64, 64, 16, 4, 4), (64, 64, 32, 4, 4))
    for precision, low in (("tf32", True), ("tf32x3", False)):
        for one_level in (True, False):
            key = f"{precision} {'one level' if one_level else 'two levels'}"
            yield ("window_product", key, f"window_product, {key}",
                   blocks(PRODUCT[precision], *place.pick(products, products[:1])),
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
    path = settings.table
    write_json(path, content)
    if not settings.dry_run:
        _tuned.FOLDER.mkdir(exist_ok=True)
        shutil.copyfile(path, _tuned.FOLDER / _tuned.file_name(gpu))
    _tuned.read_table(path)
    return path


def run(journal: Journal, settings: Settings) -> None:
    """Part ``tune``."""
    dry = settings.dry_run
    place = Place(torch.device(settings.device), torch.float32 if dry else LOW,
                  Maps(settings.maps).named("coco"), tiny=dry)
    torch.backends.cudnn.benchmark = True
    jobs = [*_pointwise(place), *_products(place)]
    if dry:
        jobs = [(*job[:3], job[3][:2], job[4]) for job in jobs
                if job[0] in ("indexed_apply", "modulation_apply", "window_product")]
    rows: dict[str, Callable[[], Row]] = {
        name: partial(choose, kernel, key, candidates, make, place.device)
        for kernel, key, name, candidates, make in jobs
    }
    rows |= dict((*path_rates(place), *conv_rows(place)))
    for name in journal.late_last(rows):
        journal.row(name, rows[name])
        write_table(journal, settings)  # now: a part that is ended at its deadline writes no more
        release()
