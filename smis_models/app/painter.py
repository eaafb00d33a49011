"""What stands behind the page: maps of classes, looks of each class, and pictures of both."""

from __future__ import annotations

import functools
import secrets
import tempfile
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.classes import class_colours, class_names
from ..data.sample import image_tensor
from ..data.scenes import LANDSCAPE, draw_modes, paint, sample_scene
from ..families import Pix2pixHDPreset, Preset
from ..io.images import (
    ImageError,
    Picture,
    image_size,
    read_labels,
    read_picture,
    resize_nearest,
    resize_picture,
    to_pictures,
)
from ..synthesis.applications import encode
from ..synthesis.codes import code_parts, draw_code, interpolate
from ..synthesis.scene import Scene, calibrate, sample_scenes
from ..synthesis.synthesizer import Synthesizer

Labels = NDArray[np.uint8]

SCENES = 8  # sample scenes that the page offers
SESSIONS = 16  # pages that are remembered
STEPS = 24  # last steps of a session, for its report
PICTURES = 16  # pictures of a session whose looks can be taken
PIXELS = 64 * 2**20  # of a picture or map that is sent

T = TypeVar("T")


class StaleError(ValueError):
    """What was sent is older than what the session has, or builds on what it has not."""


@dataclass(frozen=True)
class Look:
    """The look of one class: on the way, t in 0..1, from a source to another.

    A source is "seed:N", a code drawn from N(0, 1), or "picture:N", the code of the N-th picture
    that the session was given.
    """

    start: str
    end: str
    t: float


@dataclass(frozen=True)
class Rectangle:
    """Classes (h, w) of a part of the map, from a corner on."""

    top: int
    left: int
    classes: Labels


@dataclass(frozen=True)
class Stroke:
    """What changed since ``base``, a version of the session's map; None: the map is sent whole.

    ``step``: (number, caption) of what the person does, which may take several strokes.
    """

    session: str
    version: int
    base: int | None
    rectangles: Sequence[Rectangle]
    looks: Sequence[Look]
    step: tuple[int, str] = (0, "")


@dataclass(frozen=True)
class Painted:
    """A picture (H, W, 3), the seconds that it took, and the windows (new, kept) behind it."""

    version: int
    picture: Picture
    seconds: float
    windows: tuple[int, int]


@dataclass(frozen=True)
class Step:
    """A state of the session that its report shows."""

    number: int
    caption: str
    labels: Labels
    picture: Picture


@dataclass(frozen=True)
class Appearance:
    """A picture whose looks can be taken: its code, and the classes that it shows."""

    name: str
    picture: Picture
    code: Tensor
    present: tuple[int, ...]


@dataclass
class Session:
    """What is remembered of one page."""

    labels: Labels | None = None
    version: int = 0
    steps: deque[Step] = field(default_factory=lambda: deque(maxlen=STEPS))
    appearances: dict[int, Appearance] = field(default_factory=dict)
    looks: tuple[Look, ...] = ()
    code: Tensor | None = None
    """What the looks give; most strokes change none of them."""


def _read(content: bytes, name: str, reader: Callable[[Path], T]) -> T:
    """``reader`` of a file that holds ``content``; errors call it ``name``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_bytes(content)
        try:
            height, width = image_size(path)
            if height * width > PIXELS:
                raise ImageError(f"{path}: expected at most {PIXELS} pixels, got {width}x{height}")
            return reader(path)
        except ImageError as error:
            raise ImageError(str(error).replace(str(path), name)) from error


class Painter:
    """Paints the maps of all pages with one model; for one thread at a time.

    Args:
        model: from :func:`create_model`, in eval mode.
        random_weights: calibrate them, so that their pictures show the layout.
        seed: of the sample scenes and of the looks that a page starts with.

    Raises:
        ValueError: a model that cannot be painted with: of more than 256 classes, or one that reads
            instance features.

    Example:
        >>> from smis_models import create_model
        >>> painter = Painter(create_model("groupdnet_scenes", ngf=8, nef=8).eval())
        >>> everything = Rectangle(0, 0, np.zeros((128, 128), np.uint8))
        >>> looks = [Look("seed:0", "seed:1", 0.5)] * 8
        >>> painter.paint(Stroke("page", 1, None, [everything], looks)).picture.shape
        (128, 128, 3)
    """

    def __init__(self, model: Any, *, random_weights: bool = False, seed: int = 0) -> None:
        preset: Preset = model.preset
        if isinstance(preset, Pix2pixHDPreset) and preset.features:
            raise ValueError("model: expected one that reads labels alone, got "
                             f"{model.name}, which reads instance features")
        if preset.classes > 256:
            raise ValueError(f"model: expected at most 256 classes, got {preset.classes}")
        self.model, self.preset, self.random_weights = model, preset, random_weights
        self.seed = seed
        self.size = preset.image_size
        self._draw = functools.lru_cache(64)(functools.partial(draw_code, model))
        self.parts = 0 if self._draw(0) is None else code_parts(model.generator)
        """Codes side by side: one for each class, one for the whole picture, or none."""
        parts = dict(model.named_children())
        self.encodes = self.parts > 0 and hasattr(parts.get("encoder"), "encode")
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._synthesizer: Synthesizer | None = None
        self._painted: Labels | None = None

    @functools.cached_property
    def scenes(self) -> dict[str, Scene]:
        """The sample scenes by name."""
        found = sample_scenes(self.preset, SCENES, self.seed, self.model.name)
        return {scene.name: scene for scene in found}

    @property
    def class_names(self) -> list[str]:
        """What each class is called."""
        return list(class_names(self.model.name, self.preset.classes))

    @property
    def colours(self) -> NDArray[np.uint8]:
        """(classes, 3) that the map is shown in: landscapes' natural ones, else distinct ones."""
        return class_colours(self.class_names)

    @property
    def landscapes(self) -> bool:
        """Whether the model paints the package's landscapes, whose pictures are at hand."""
        return next(iter(self.scenes.values())).class_names == LANDSCAPE

    def session(self, name: str) -> Session:
        """A page's session, made if need be; the one that was silent longest is forgotten."""
        found = self._sessions.setdefault(name, Session())
        self._sessions.move_to_end(name)
        if len(self._sessions) > SESSIONS:
            self._sessions.popitem(last=False)
        return found

    def known(self, name: str) -> Session | None:
        """A page's session where there is one; none is made, so that none is forgotten."""
        return self._sessions.get(name)

    def scene(self, name: str) -> Labels:
        """A sample scene's map.

        Raises:
            LookupError: no such scene.
        """
        if name not in self.scenes:
            raise LookupError(f"scene: expected one of {', '.join(self.scenes)}; got {name!r}")
        return self.scenes[name].labels.astype(np.uint8)

    def read_map(self, content: bytes, name: str = "map") -> tuple[Labels, tuple[int, int]]:
        """A map from a file's bytes, resized to the model's size by nearest, and its own size.

        Raises:
            ImageError: no index map of the model's classes.
        """
        preset = self.preset
        labels = _read(content, name, lambda path: read_labels(
            path, preset.classes, unknown=preset.dont_care))
        height, width = labels.shape
        return resize_nearest(labels, self.size).astype(np.uint8), (height, width)

    def add_picture(self, session: str, name: str, picture: bytes,
                    labels: bytes | None) -> tuple[int, Appearance]:
        """Take in a picture whose looks can be taken; without a map of its own the canvas's serves.

        Raises:
            ValueError: a model without an encoder, no map at all.
            ImageError: a file that cannot be read.
        """
        own = self.session(session)
        size: tuple[int, int] | None = None
        if labels is not None:
            classes, size = self.read_map(labels, f"{name}, map")
        elif own.labels is not None:
            classes = own.labels
        else:
            raise ValueError("map: expected one of the picture or on the canvas, got none")
        pixels = _read(picture, name, lambda path: read_picture(path, like=size))
        return self._add(own, name, resize_picture(pixels, self.size), classes)

    def add_sample(self, session: str, number: int) -> tuple[int, Appearance]:
        """Take in one of the package's own pictures of landscapes.

        Raises:
            ValueError: a model of something else, or without an encoder.
        """
        if not self.landscapes:
            raise ValueError(f"sample: expected a model of landscapes, got {self.model.name}")
        scene = sample_scene("landscape", *self.size, self.preset.classes, 1000 + number)
        r = np.random.default_rng(number)
        picture = paint(scene.labels, scene.instances, draw_modes(r), r)
        return self._add(self.session(session), f"sample {number + 1}", picture,
                         scene.labels.astype(np.uint8))

    def _add(self, session: Session, name: str, picture: Picture,
             labels: Labels) -> tuple[int, Appearance]:
        if not self.encodes:
            raise ValueError(f"picture: {self.model.name} has no encoder here that reads looks; "
                             "give --checkpoint one that holds it")
        ids = torch.from_numpy(labels.astype(np.int64))[None]
        code = encode(self.model, image_tensor(picture)[None], ids)
        number = secrets.randbelow(2**40)  # no page has it of an earlier server
        if len(session.appearances) >= PICTURES:
            raise ValueError(f"picture: expected at most {PICTURES} in a session; open a new page")
        found = Appearance(name, picture, code, tuple(int(c) for c in np.unique(labels)))
        session.appearances[number] = found
        return number, found

    def _source(self, session: Session, source: str) -> Tensor:
        kind, _, text = source.partition(":")
        if text.isdecimal() and len(text) < 16:
            if kind == "seed":
                return self._draw(int(text))
            if kind == "picture" and int(text) in session.appearances:
                return session.appearances[int(text)].code
        raise ValueError(f"looks: expected seed:N or the picture:N of this session, got {source!r}")

    def _code(self, session: Session, looks: Sequence[Look]) -> Tensor | None:
        if len(looks) != self.parts:
            raise ValueError(f"looks: expected {self.parts} of {self.model.name}, got {len(looks)}")
        if not looks:
            return None
        kept = session.looks
        z = (self._source(session, looks[0].start) if session.code is None
             else session.code).clone()
        size = z.shape[1] // self.parts
        for k, look in enumerate(looks):
            if kept and look == kept[k]:
                continue
            channels = slice(k * size, (k + 1) * size)
            start, end = (self._source(session, source)[:, channels]
                          for source in (look.start, look.end))
            z[:, channels] = interpolate(start, end, look.t)
        session.looks, session.code = tuple(looks), z
        return z

    def _drawn(self, session: Session, stroke: Stroke) -> Labels:
        """The session's map after the stroke."""
        if stroke.version <= session.version:
            raise StaleError(f"version: expected one after {session.version}, got {stroke.version}")
        if stroke.base is None:
            labels = np.zeros(self.size, np.uint8)
            if [r.classes.shape for r in stroke.rectangles] != [self.size]:
                raise ValueError(f"rectangles: expected one of {self.size} (height, width) where "
                                 "base is null")
        elif session.labels is None or stroke.base != session.version:
            raise StaleError(f"base: expected {session.version}, the session's version, got "
                             f"{stroke.base}; send the whole map")
        else:
            labels = session.labels.copy()
        height, width = self.size
        for part in stroke.rectangles:
            h, w = part.classes.shape
            if part.top + h > height or part.left + w > width:
                raise ValueError(f"rectangles: expected them inside {height}x{width} (height, "
                                 f"width), got {h}x{w} at {part.top}, {part.left}")
            worst = int(part.classes.max(initial=0))
            if worst >= self.preset.classes:
                raise ValueError(f"labels: expected classes 0..{self.preset.classes - 1}, got "
                                 f"{worst}")
            labels[part.top:part.top + h, part.left:part.left + w] = part.classes
        return labels

    def paint(self, stroke: Stroke) -> Painted:
        """The picture after a stroke; the session has changed only where there is one.

        Raises:
            StaleError: see there. ValueError: a rectangle, class or look that does not fit.
        """
        session = self.session(stroke.session)
        labels = self._drawn(session, stroke)
        z = self._code(session, stroke.looks)
        start = time.perf_counter()
        made, unchanged = self._of(labels)
        (picture,) = to_pictures(made.sample(z))
        seconds = time.perf_counter() - start
        new, kept = made.windows
        session.labels, session.version = labels, stroke.version
        number, caption = stroke.step
        if session.steps and session.steps[-1].number == number:
            session.steps.pop()
        session.steps.append(Step(number, caption, labels, picture))
        return Painted(stroke.version, picture, seconds,
                       (0, new + kept) if unchanged else (new, kept))

    def _of(self, labels: Labels) -> tuple[Synthesizer, bool]:
        """The synthesizer on a map, and whether that was its map before."""
        painted = self._painted
        if self._synthesizer is not None and painted is not None and np.array_equal(
                labels, painted):
            return self._synthesizer, True
        ids = torch.from_numpy(labels.astype(np.int64))[None]
        # A map that is painted has no instances: its edges are those between classes.
        instances = ids if self.preset.instance_edge else None
        self._painted = None  # until the update is through
        if self._synthesizer is None:
            if self.random_weights:
                calibrate(self.model, self.model.semantics(ids, instances), self._draw(0))
            self._synthesizer = Synthesizer(self.model, ids, instances)
        else:
            self._synthesizer.update(ids, instances)
        self._painted = labels
        return self._synthesizer, False

    def warm_up(self) -> None:
        """Make what the first picture would wait for."""
        labels = self.scene(next(iter(self.scenes)))
        looks = [Look("seed:0", "seed:1", 0.0)] * self.parts
        self.paint(Stroke("warm-up", self.session("warm-up").version + 1, None,
                          [Rectangle(0, 0, labels)], looks))
        self._sessions.pop("warm-up")
