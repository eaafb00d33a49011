"""How soon a stroke is a picture in ``smis paint``: ``python -m benchmarks.paint``.

Each stroke, a disc of a class that the map shows, goes through the page's server in this process,
from the request's bytes to the answer's; a browser adds its canvas and the loopback. Between
strokes the same map is painted by the generator alone, from labels: compiled anew, as without the
page, its weights folded and prepared as the page's are. Goals: 150 ms at 128 x 128, and 1.2 times
the generator's own time at 256 x 256.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smis_kernels.interface import Prepared
from smis_models import create_model, shipped_weights
from smis_models.app.painter import Labels, Painter
from smis_models.app.server import create_app
from smis_models.benchmark.records import markdown_table
from smis_models.families import checkpoint_file
from smis_models.io.images import write_atomically
from smis_models.io.provenance import commit, versions
from smis_models.networks.semantics import compile_layout
from smis_models.synthesis.codes import draw_code
from smis_models.synthesis.synthesizer import frozen_copy

MOST_MILLISECONDS, MOST_RATIO = 150.0, 1.2  # goals, at 128 x 128 and at 256 x 256
_WARM = 3  # strokes that are not counted


@dataclass(frozen=True)
class Drawn:
    """The map after a stroke, and the bytes of the stroke's request."""

    map: Labels
    body: bytes


@dataclass
class Times:
    """Milliseconds of each stroke that counts; ``pictures`` are the last ones of both ways."""

    answered: list[float] = field(default_factory=list)
    painted: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    windows: list[tuple[int, int]] = field(default_factory=list)
    pictures: tuple[NDArray[np.uint8], torch.Tensor] | None = None

    @property
    def ratio(self) -> float:
        """The median over strokes of the answer's time in that of the forward beside it."""
        return statistics.median(a / f for a, f in zip(self.answered, self.forward, strict=True))


def _row(what: str, values: list[float]) -> tuple[str, str, str, str]:
    """Median, 90th percentile and worst."""
    late = sorted(values)[int(0.9 * (len(values) - 1))]
    return what, f"{statistics.median(values):.1f}", f"{late:.1f}", f"{max(values):.1f}"


def strokes(painter: Painter, count: int, radius: int, seed: int) -> Iterator[Drawn]:
    """The first sends a whole sample scene; each other one a disc."""
    random = np.random.default_rng(seed)
    height, width = painter.size
    labels = painter.scene(next(iter(painter.scenes)))
    classes = np.unique(labels)
    looks = [["seed:0", "seed:1", 0.0]] * painter.parts
    rows, columns = np.ogrid[:height, :width]
    for version in range(1, count + 1):
        y0, x0, y1, x1 = 0, 0, height, width
        if version > 1:
            y, x = int(random.integers(height)), int(random.integers(width))
            disc = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
            labels = np.where(disc, random.choice(classes), labels).astype(np.uint8)
            y0, x0 = max(0, y - radius), max(0, x - radius)
            y1, x1 = min(height, y + radius + 1), min(width, x + radius + 1)
        head = json.dumps({
            "session": "benchmark", "version": version, "base": version - 1 or None,
            "rectangles": [[y0, x0, y1 - y0, x1 - x0]], "looks": looks, "step": version,
            "caption": "brush"}).encode()
        yield Drawn(labels, struct.pack("<I", len(head)) + head + labels[y0:y1, x0:x1].tobytes())


async def _answer(app: Any, body: bytes) -> bytes:
    """The body of what the application answers to a stroke."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/api/paint", "raw_path": b"/api/paint", "query_string": b"",
        "root_path": "", "headers": [(b"host", b"127.0.0.1"),
                                     (b"content-length", str(len(body)).encode())],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    found = b"".join(message.get("body", b"") for message in sent)
    if sent[0]["status"] != 200:
        raise RuntimeError(f"stroke: expected a picture, got {found.decode(errors='replace')}")
    return found


def measure(model: Any, count: int, *, radius: int | None = None, seed: int = 0,
            random_weights: bool = False) -> Times:
    """Paint ``count`` strokes and as many plain forwards, in turns, after a few to warm up."""
    painter = Painter(model, random_weights=random_weights, seed=seed)
    app, times = create_app(painter, weights=""), Times()
    height, width = painter.size
    radius = max(1, min(height, width) // 16) if radius is None else radius
    z = draw_code(model, 0)

    async def run() -> None:
        for k, stroke in enumerate(strokes(painter, count + _WARM, radius, seed)):
            start = time.perf_counter()
            answer = await _answer(app, stroke.body)
            answered = time.perf_counter() - start
            ids = torch.from_numpy(stroke.map.astype(np.int64))[None]
            instances = ids if painter.preset.instance_edge else None
            if k == 0:  # after a stroke, which gives random weights their scale
                generator = frozen_copy(model.generator)
                prepared = Prepared(generator)
            start = time.perf_counter()
            with torch.no_grad(), prepared.vouched():
                picture = generator(compile_layout(ids, model.preset, instances), z)
            forward = time.perf_counter() - start
            if k < _WARM:
                continue
            (length,) = struct.unpack_from("<I", answer)
            head = json.loads(answer[4:4 + length])
            times.answered.append(answered * 1e3)
            times.painted.append(head["milliseconds"])
            times.forward.append(forward * 1e3)
            new, kept = head["windows"]
            times.windows.append((new, kept))
            pixels = np.frombuffer(answer, np.uint8, offset=4 + length)
            times.pictures = pixels.reshape(height, width, 3), picture

    asyncio.run(run())
    return times


def report(name: str, size: tuple[int, int], times: Times) -> str:
    """The table of a model, and whether it meets the goal of its size."""
    height, width = size
    table = markdown_table(
        ("ms", "median", "90 %", "worst"),
        [_row("stroke to the answer's bytes", times.answered),
         _row("of which map to picture", times.painted),
         _row("the generator alone, from labels", times.forward)])
    new, kept = (statistics.median(w[k] for w in times.windows) for k in range(2))
    lines = [f"{name}, {width} x {height}, {len(times.answered)} strokes, "
             f"{torch.get_num_threads()} threads; windows of a stroke: {new:.0f} new, "
             f"{kept:.0f} kept", "", table, "",
             f"a stroke takes {times.ratio:.2f} of the generator alone"]
    if min(size) == 128:
        met = statistics.median(times.answered) <= MOST_MILLISECONDS
        lines.append(f"goal: {MOST_MILLISECONDS:.0f} ms at 128 x 128: {'met' if met else 'missed'}")
    if min(size) == 256:
        met = times.ratio <= MOST_RATIO
        lines.append(f"goal: {MOST_RATIO} times the generator alone at 256 x 256: "
                     f"{'met' if met else 'missed'}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paint", description=__doc__)
    parser.add_argument("--model", action="append",
                        help="again for each; default: groupdnet_scenes and spade_celebamask")
    parser.add_argument("--checkpoint", type=Path, help="of the one model; else random weights")
    parser.add_argument("--strokes", type=int, default=40)
    parser.add_argument("--out", type=Path, help="file to write the tables to")
    parser.add_argument("--radius", type=int, help="of the brush; default: a 16th of the map")
    given = parser.parse_args(arguments)
    names = given.model or ["groupdnet_scenes", "spade_celebamask"]
    if given.checkpoint is not None and len(names) != 1:
        parser.error(f"--checkpoint: expected one --model beside it, got {len(names)}")
    if given.strokes < 1 or (given.radius is not None and given.radius < 1):
        parser.error("--strokes, --radius: expected at least 1")
    tables = []
    for name in names:
        weights = (shipped_weights(name) if given.checkpoint is None
                   else checkpoint_file(given.checkpoint))
        model = create_model(name, weights, init_gain=1.0).eval()
        times = measure(model, given.strokes, radius=given.radius, random_weights=weights is None)
        tables.append(report(f"{name}, {'random' if weights is None else 'trained'} weights",
                             model.preset.image_size, times))
        print(tables[-1], end="\n\n")
    if given.out is not None:
        head = ", ".join(f"{k} {v}" for k, v in versions().items())
        text = "\n\n".join((f"Commit {commit()}; {head}.", *tables))
        write_atomically(given.out, (text + "\n").encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
