"""The demo: GroupDNet's three tricks on a few scenes, and this machine's speed, on one page."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smis_kernels
from smis_kernels import class_crops, explain, instance_edges, use_backend

from ..benchmark.timing import interleave
from ..families import shipped_weights
from ..io.images import Picture, to_pictures, write_atomically, write_png
from ..io.provenance import processor
from ..io.sheet import captioned_grid
from ..synthesis.codes import code_parts, draw_code, interpolate, resample_class
from ..synthesis.scene import Scene, semantics
from ..synthesis.synthesizer import Synthesizer
from .report import rendered

Step = Callable[[str], None]
SHOWN = 256  # pixels of the page: smaller pictures are enlarged by a whole number


@dataclass(frozen=True)
class Stage:
    """A row of the speed table: median seconds by the reference and fused."""

    name: str
    reference: float
    fused: float

    @property
    def speedup(self) -> float:
        """Times faster than the reference."""
        return self.reference / self.fused


@dataclass(frozen=True)
class Strip:
    """One experiment on one scene: a title and captioned pictures."""

    title: str
    pictures: tuple[tuple[str, Picture], ...]


@dataclass(frozen=True)
class Demo:
    """What was made: pictures by scene, speed, and where the files are."""

    strips: tuple[tuple[Scene, tuple[Strip, ...]], ...]
    stages: tuple[Stage, ...]
    backend: str
    files: tuple[Path, ...]


class _ConvClock:
    """Sums the time that chosen convs take during a network's forward."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = 0.0
        self.seconds = 0.0

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _before(self, *_: Any) -> None:
        self._start = self.now()

    def _after(self, *_: Any) -> None:
        self.seconds += self.now() - self._start

    @contextmanager
    def on_main_convs(self, generator: nn.Module) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, conv in generator.named_modules():
                if isinstance(conv, nn.Conv2d) and ".mlp_" not in name:
                    hooks.enter_context(conv.register_forward_pre_hook(self._before))
                    hooks.enter_context(conv.register_forward_hook(self._after))
            yield


@torch.no_grad()
def speed(model: Any, scene: Scene, z: Tensor, seconds: float = 8.0,
          step: Step = lambda what: None) -> list[Stage]:
    """Time each stage by the reference and fused, interleaved in one run; medians.

    Each is the call that applications make. The generator's main convs are timed inside its
    forward; "modulation" is the remainder of the same forward: the convs that predict gamma and
    beta, the modulation, and the upsampling folded into it.
    """
    planes = semantics(model, scene)
    labels = torch.from_numpy(scene.labels)[None].to(planes.device)
    device = planes.device
    image = model.generator(planes, z)
    clock = _ConvClock(device)
    spent: dict[str, list[tuple[float, float]]] = {"reference": [], "auto": []}

    def generate(backend: str) -> Tensor:
        clock.seconds, start = 0.0, clock.now()
        out: Tensor = model.generator(planes, z)
        spent[backend].append((clock.seconds, clock.now() - start - clock.seconds))
        return out

    parts: dict[str, Callable[[str], Any]] = {
        "class crops": lambda backend: class_crops(
            image, labels, model.preset.classes, size=model.preset.image_size),
        "encoder": lambda backend: model.encoder.encode(image, labels),
        "generator": generate,
    }

    def run(part: str, backend: str) -> Any:
        with use_backend(backend):
            return parts[part](backend)

    medians: dict[tuple[str, str], float] = {}
    for part in parts:
        step(f"timing: {part}")
        calls = {backend: partial(run, part, backend) for backend in ("reference", "auto")}
        with clock.on_main_convs(model.generator):
            times = interleave(calls, seconds / len(parts), device=device)
        medians.update({(part, b): statistics.median(t) for b, t in times.items()})
    for backend, calls_of in spent.items():
        warm = calls_of[2:]  # interleave's first calls are not timed
        for stage, seconds_of in zip(("main convs", "modulation"), zip(*warm, strict=True),
                                     strict=True):
            medians[stage, backend] = statistics.median(seconds_of)
    named = {
        "class crops": "class crops (encoder input)", "encoder": "encoder, crops included",
        "modulation": "modulation (with its convs)", "main convs": "main convs",
        "generator": "generator, whole",
    }
    return [
        Stage(title, medians[part, "reference"], medians[part, "auto"])
        for part, title in named.items()
    ]


@torch.no_grad()
def strips(model: Any, scene: Scene, samples: int, seed: int,
           step: Step = lambda what: None) -> tuple[Strip, ...]:
    """Samples of the scene, one class resampled, and a morph between two codes."""
    synthesizer = Synthesizer(model, *scene.tensors())

    def draw(what: str, z: Tensor) -> tuple[str, Picture]:
        step(f"{scene.name}: {what}")
        (picture,) = to_pictures(synthesizer.sample(z))
        return what, picture

    map_picture = ("layout", scene.picture(model.preset.classes))
    codes = [draw_code(model, seed + i) for i in range(max(2, samples))]
    drawn = [draw(f"sample {i + 1}", z) for i, z in enumerate(codes[:samples])]
    # The largest class is background as a rule; the next one shows more.
    index = scene.present[min(1, len(scene.present) - 1)]
    name = scene.class_name(index)
    changed = [
        draw(f"{name}, code {i + 1}", resample_class(model, codes[0], index, seed + 100 + i))
        for i in range(max(1, samples - 1))
    ]
    ends = [drawn[0][1], drawn[1][1] if samples > 1 else draw("end", codes[1])[1]]
    between = [
        draw(f"morph {i}/{samples}",
             interpolate(codes[0], codes[1], i / samples, code_parts(model.generator)))
        for i in range(1, samples)
    ]
    return (
        Strip("Samples: one layout, a new code for every class", (map_picture, *drawn)),
        Strip(f"One class: only {name} gets a new code", (map_picture, drawn[0], *changed)),
        Strip("Morphing: from the first code to the second",
              (map_picture, ("start", ends[0]), *between, ("end", ends[1]))),
    )


def forwards(scenes: int, samples: int) -> int:
    """How many pictures :func:`strips` draws."""
    return scenes * (samples + max(1, samples - 1) + samples - 1 + (samples == 1))


_COMMANDS = {
    "Paint layouts of your own, or these landscapes again": """\
smis scenes data --count 16 --held-out 4
smis synthesize {network} --labels data/val/labels --samples 3 --out pictures""",
    "Edit: one class anew, from one code to another, another map": """\
smis resample {network} --labels data/val/labels/val_000000.png --class 0 --out resampled
smis morph {network} --labels data/val/labels/val_000000.png --steps 8 --out morphed
smis edit {network} --labels data/val/labels/val_000000.png --relabel 5=4 --out edited""",
    "Train": "smis train groupdnet_scenes_codes --data.count 64 --schedule.epochs 1 --out run",
}
_PYTHON = {
    "Make a network of yours faster": """\
from smis_kernels import accelerate

print(accelerate(model))  # same weights, same pictures; says what was replaced, and why not""",
}


def next_steps(model: str) -> dict[str, str]:
    """What to try next, by what it is for; of a model that does not ship with its checkpoint."""
    network = f"--model {model}"
    if shipped_weights(model) is None:
        network += " --checkpoint FILE"
    return {what: text.format(network=network) for what, text in _COMMANDS.items()} | _PYTHON


def page(demo_strips: Sequence[tuple[Scene, tuple[Strip, ...]]], stages: Sequence[Stage],
         facts: dict[str, str], model: str, random_weights: bool, unfused: bool) -> str:
    """The self-contained HTML page: pictures, what the kernels do here, what to try next."""
    return rendered(
        "demo.html",
        scenes=demo_strips, stages=stages, facts=facts, random_weights=random_weights,
        unfused=unfused, whole=stages[-1], shown=SHOWN, model=model,
        next_steps=next_steps(model).items(),
        longest=max(max(s.reference, s.fused) for s in stages),
    )


def run(model: Any, scenes: Sequence[Scene], out: str | Path, *, samples: int = 3, seed: int = 0,
        random_weights: bool = True, width: str = "", seconds: float = 8.0,
        step: Step = lambda what: None) -> Demo:
    """Draw, time and write ``<scene>.png`` grids and ``index.html`` into ``out``.

    Args:
        model: from :func:`create_model`, in eval mode.
        scenes: what to draw.
        out: a folder, made if need be.
        samples: pictures of each scene.
        seed: of the codes.
        random_weights: said on the page.
        width: how wide the network is, in words, for the page.
        seconds: time for the speed table.
        step: called with what is done next: :func:`forwards` pictures and three timings.
    """
    folder = Path(out)
    made = [(scene, strips(model, scene, samples, seed, step)) for scene in scenes]
    stages = speed(model, scenes[0], draw_code(model, seed), seconds, step)
    device = next(model.parameters()).device
    backend = explain(instance_edges, torch.zeros(1, 2, 2, dtype=torch.int64, device=device))
    fused = backend.choices[0].backend
    files = [
        write_png(folder / f"{scene.name}.png",
                  captioned_grid([strip.pictures for strip in of_scene]))
        for scene, of_scene in made
    ]
    height, columns = model.preset.image_size
    facts = {
        "model": f"{width}, {height} x {columns}",
        "machine": f"{processor()}, {torch.get_num_threads()} threads"
        if device.type == "cpu" else torch.cuda.get_device_name(device),
        "versions": f"smis_kernels {smis_kernels.__version__}, torch {torch.__version__}",
    }
    html = page(made, stages, facts, model.name, random_weights, fused == "reference")
    files.insert(0, write_atomically(folder / "index.html", html.encode()))
    return Demo(tuple(made), tuple(stages), fused, tuple(files))
