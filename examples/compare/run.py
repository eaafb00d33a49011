"""The whole comparison: train each system, measure all, write the tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smis_models.data import GeneratedScenes
from smis_models.families import create_model
from smis_models.io.images import write_atomically
from smis_models.io.provenance import commit, versions
from smis_models.metrics import (
    Distance,
    Metrics,
    Scenes,
    evaluate,
    label_rule,
    protocol,
    scene_labels,
)
from smis_models.metrics.fid import Extractor
from smis_models.training import Progress, TrainConfig

from .measure import speeds, training_memory
from .report import markdown
from .systems import SYSTEMS, parameters, small_config
from .train import Trained, train_system

Step = Callable[[str], None]
SETTINGS, RESULTS, REPORT = "settings.json", "comparison.json", "comparison.md"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all systems share.

    Args:
        minutes: of training, for each.
        systems: which; all of :data:`SYSTEMS` by default.
        size: height and width of the pictures, a multiple of 32.
        width: GroupDNet's ngf; the others' follow from the published ratios of parameters.
        ndf: width of every discriminator.
        batch: images of a step.
        workers: processes that draw scenes.
        seed: of weights, scenes and codes.
        vgg: file with torchvision's VGG19 weights; without one the perceptual term is off for all.
        layouts, samples, pairs: of mCSD and mOCD, on held-out scenes.
        pictures: held-out scenes that are painted for mIoU and FID.
        seconds: of measuring speed.

    Raises:
        ValueError: a number that does not fit, or an unknown system.
    """

    minutes: float
    systems: tuple[str, ...] = tuple(SYSTEMS)
    size: int = 64
    width: int = 20
    ndf: int = 32
    batch: int = 8
    workers: int = 1
    seed: int = 0
    vgg: str | None = None
    layouts: int = 16
    samples: int = 20
    pairs: int = 19
    pictures: int = 200
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.minutes >= 0:
            raise ValueError(f"minutes-per-model: expected 0 or more, got {self.minutes}")
        if self.size < 64 or self.size % 32:
            raise ValueError(f"size: expected a multiple of 32 from 64 on, got {self.size}")
        for name in ("width", "ndf", "batch", "layouts", "pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        unknown = [name for name in self.systems if name not in SYSTEMS]
        if unknown or not self.systems:
            raise ValueError(f"only: expected of {', '.join(SYSTEMS)}; got "
                             f"{unknown[0] if unknown else 'none'!r}")

    def config(self, name: str) -> TrainConfig:
        """A system's training."""
        return small_config(name, size=self.size, width=self.width, ndf=self.ndf, batch=self.batch,
                            workers=self.workers, seed=self.seed, vgg=self.vgg)


# Of a comparison that goes on these may change: nothing that was trained depends on them.
_FREE = ("minutes", "systems", "workers", "layouts", "samples", "pairs", "pictures", "seconds")


def _check_folder(folder: Path, settings: Settings) -> None:
    """Refuse a folder of another comparison; else note the settings."""
    path, now = folder / SETTINGS, json.loads(json.dumps(asdict(settings)))
    if path.exists():
        try:
            then = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"out: {path} is damaged; give another --out") from error
        for key in now:
            if key not in _FREE and then.get(key) != now[key]:
                raise ValueError(f"out: {folder} holds a comparison with {key} {then.get(key)}, "
                                 f"not {now[key]}; give another --out")
    write_atomically(path, (json.dumps(now, indent=1) + "\n").encode())


def _held_out(count: int, settings: Settings) -> GeneratedScenes:
    return GeneratedScenes(count, settings.size, "test", settings.seed)


def _judged(model: Any, weights: Path, settings: Settings, distances: Sequence[Distance],
            extractor: Extractor | None, step: Step,
            expect: Callable[[int], None]) -> dict[str, Any]:
    """Diversity, mIoU and, with an extractor, FID on held-out scenes."""
    count = max(settings.layouts, settings.pictures)
    scenes = Scenes(_held_out(count, settings),
                    {"dataset": "scenes", "split": "test", "seed": settings.seed})
    pinned = protocol("n100-m19", layouts=settings.layouts, samples=settings.samples,
                      pairs=settings.pairs)
    metrics = Metrics(distances, extractor, scene_labels, None, label_rule("same", model.preset))
    return evaluate(model, scenes, metrics, pinned, checkpoint=weights, seed=settings.seed,
                    step=step, expect=expect)


def train(settings: Settings, folder: str | Path, *, device: torch.device | str = "cpu",
          report: Callable[[str, Progress, float], None] = lambda name, progress, left: None,
          ) -> dict[str, Trained]:
    """Train every system; as :func:`compare`."""
    folder = Path(folder)
    configs = {name: settings.config(name) for name in settings.systems}
    _check_folder(folder, settings)
    return {
        name: train_system(config, folder / name, settings.minutes, device=device,
                           report=partial(report, name))
        for name, config in configs.items()
    }


def measure(settings: Settings, folder: str | Path, trained: Mapping[str, Trained],
            distances: Sequence[Distance], *, extractor: Extractor | None = None,
            device: torch.device | str = "cpu", step: Step = lambda what: None,
            expect: Callable[[int], None] = lambda total: None) -> dict[str, Any]:
    """Measure what :func:`train` trained and write comparison.json and .md; as :func:`compare`."""
    folder, place = Path(folder), torch.device(device)
    rows: dict[str, dict[str, Any]] = {}
    judged: dict[str, Any] = {}
    models = {}
    totals = [0] * len(trained)

    def told(index: int, total: int) -> None:
        totals[index:] = [total] * (len(totals) - index)  # those to come are taken to be alike
        expect(sum(totals) + 1)

    for name, run in trained.items():
        config = settings.config(name)
        model = create_model(config.model, run.weights, device=place).eval()
        models[name] = model
        judged = _judged(model, run.weights, settings, distances, extractor,
                         partial(_named, step, name), partial(told, len(models) - 1))
        rows[name] = {
            "model": config.model, "steps": run.steps, "images": run.images,
            "seconds": run.seconds, "failure": run.failure,
            "parameters": parameters(config.network),
            **judged["results"], "options": judged["model"]["options"],
            "weights_sha256": judged["model"]["weights_sha256"],
            "training_memory": training_memory(config, place),
            "published": asdict(SYSTEMS[name].published),
        }
    step("speed")
    layout = Scenes(_held_out(1, settings), {}).scene(0)[0]
    for name, values in speeds(models, layout, settings.seconds).items():
        rows[name] |= values
    result = {
        "systems": rows, "settings": asdict(settings), "data": judged["data"],
        "protocol": judged["protocol"], "distances": [each.facts() for each in distances],
        "fid": extractor is not None, "device": str(place), "versions": versions(),
        "commit": commit(), "command": sys.argv[1:],
    }
    write_atomically(folder / RESULTS, (json.dumps(result, indent=1) + "\n").encode())
    write_atomically(folder / REPORT, markdown(result).encode())
    return result


def _named(step: Step, name: str, what: str) -> None:
    step(f"{name}: {what}")


def compare(settings: Settings, folder: str | Path, distances: Sequence[Distance], *,
            extractor: Extractor | None = None, device: torch.device | str = "cpu",
            report: Callable[[str, Progress, float], None] = lambda name, progress, left: None,
            step: Step = lambda what: None,
            expect: Callable[[int], None] = lambda total: None) -> dict[str, Any]:
    """Train and measure every system; the result is written to ``folder`` too.

    Stopped at any moment and called again, it goes on: a system's training from its last
    checkpoint, with the time that was spent up to it counted.

    Args:
        settings: shared by all.
        folder: of the runs (one folder each), comparison.json and comparison.md.
        distances: of mCSD, mOCD and diversity.
        extractor: of FID; None leaves it out.
        device: of everything.
        report: called while training with the system's name, the progress and the seconds left.
        step: called with a few words while measuring.
        expect: called with how many times ``step`` will be, as well as it is known by then.

    Raises:
        ValueError: settings that do not fit, a folder of another comparison.
        NonFiniteLoss: a loss became NaN before a system's first checkpoint; after it, the system
            is measured as it stood there, and the report says so.

    Paper: Zhu et al., "Semantically Multi-modal Image Synthesis", CVPR 2020, table 1.

    Example:
        >>> result = compare(Settings(minutes=20), "comparison", [create_distance("pixel")])
        >>> print(markdown(result))
    """
    trained = train(settings, folder, device=device, report=report)
    return measure(settings, folder, trained, distances, extractor=extractor, device=device,
                   step=step, expect=expect)
