"""What the papers use their models for: mixing, editing, morphing, resampling, new shapes.

Every function yields :class:`Frame` after frame; all frames of one scene share what a
:class:`Synthesizer` has computed for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..io.images import Picture, PictureSpan, check_pictures, to_pictures
from ..networks.encoder import reparameterize
from .codes import code_parts, draw_code, drawn_code, interpolate, resample_class, with_class
from .features import FeatureClusters
from .scene import Scene
from .shapes import ShapeLibrary, exchange_shape, target_region
from .synthesizer import Synthesizer


@dataclass(frozen=True)
class Frame:
    """A picture, what was done to get it, and its scene."""

    caption: str
    picture: Picture
    scene: Scene


@torch.no_grad()
def encode(model: Any, image: Tensor, labels: Tensor, seed: int | None = None) -> Tensor:
    r"""The latent code of a picture: the encoder's mean, or a draw around it.

    .. math:: z = \mu \quad \text{or} \quad z = \mu + \sigma \epsilon, \; \epsilon \sim N(0, 1)

    The published GroupDNet test code draws all codes from N(0, 1); its encoder serves here.

    Args:
        model: with an encoder of codes.
        image: (N, 3, H, W) in [-1, 1].
        labels: (N, H, W) integers, of the picture.
        seed: of the draw; None for the mean.

    Raises:
        ValueError: a model without such an encoder.

    Warns:
        UserWarning: no value is below 0, as in pictures in 0..1.

    Example:
        >>> from smis_models import create_model
        >>> model = create_model("groupdnet_scenes", ngf=8, nef=8).eval()
        >>> image, labels = torch.rand(1, 3, 128, 128) * 2 - 1, torch.zeros(1, 128, 128).long()
        >>> z = encode(model, image, labels)
        >>> again = model(model.semantics(labels), z)
    """
    parts = dict(model.named_children())
    if "encoder" not in parts or not hasattr(parts["encoder"], "encode"):
        raise ValueError(f"model: expected one with an encoder of latent codes, got {model.name}; "
                         "pass a checkpoint that holds the encoder, or draw codes by seed")
    check_pictures(image, name="image")
    PictureSpan(image).tell("image")
    weight = next(model.encoder.parameters())
    mean, logvar = model.encoder.encode(image.to(weight), labels.to(weight.device))
    if seed is None:
        return mean
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    return reparameterize(mean, logvar, noise=noise.to(mean))


def mixed_code(model: Any, codes: Sequence[Tensor], take: Mapping[int, int],
               rest: int = 0) -> Tensor:
    """A code whose classes come from several: class c from ``codes[take[c]]``, else ``rest``.

    Raises:
        ValueError: a model with one code for the whole picture, no such class or code.
    """
    _check_class_codes(model)
    z = codes[rest].clone()
    for index, source in take.items():
        if not 0 <= source < len(codes):
            raise ValueError(f"take: expected a picture 0..{len(codes) - 1} for class {index}, got "
                             f"{source}")
        z = with_class(model.generator, z, index, codes[source])
    return z


def _check_class_codes(model: Any) -> None:
    if not hasattr(model.generator, "class_channels"):
        raise ValueError("model: expected one with a code for each class (a GroupDNet or its "
                         f"relatives), got {model.name}")


def synthesizer(model: Any, scene: Scene) -> Synthesizer:
    """A :class:`Synthesizer` of one scene."""
    return Synthesizer(model, *scene.tensors())


def _frame(made: Synthesizer, caption: str, z: Tensor | None, scene: Scene) -> Frame:
    (picture,) = to_pictures(made.sample(z))
    return Frame(caption, picture, scene)


def mix(model: Any, scene: Scene, codes: Sequence[Tensor], take: Mapping[int, int] | None = None,
        names: Sequence[str] = ()) -> Iterator[Frame]:
    """Appearance mixture: classes one after another take the code of another picture.

    The first frame has all codes of the first picture; each further frame one class's more.

    Args:
        model: with a code for each class.
        scene: what is painted.
        codes: of the pictures, from :func:`encode`.
        take: class -> picture; by default the scene's classes in turn, largest first, from the
            second picture on.
        names: of the pictures, for captions.

    Example:
        >>> import numpy as np
        >>> from smis_models import create_model
        >>> model = create_model("groupdnet_scenes", ngf=8, nef=8).eval()
        >>> scene = Scene("plain", np.zeros((128, 128), np.int64), None)
        >>> codes = [drawn_code(model, seed) for seed in (0, 1)]  # or of pictures: encode
        >>> [frame.caption for frame in mix(model, scene, codes)]
        ['all from picture 0', 'class 0 from picture 1']
    """
    _check_class_codes(model)
    if take is None:
        others = max(1, len(codes) - 1)
        take = {c: (1 + k % others) % len(codes) for k, c in enumerate(scene.present)}
    mixed_code(model, codes, take)  # all of it is checked before anything is painted
    names = names or [f"picture {i}" for i in range(len(codes))]
    made = synthesizer(model, scene)
    yield _frame(made, f"all from {names[0]}", codes[0], scene)
    taken: dict[int, int] = {}
    for index, source in take.items():
        taken[index] = source
        yield _frame(made, f"{scene.class_name(index)} from {names[source]}",
                     mixed_code(model, codes, taken), scene)


def edit(model: Any, scenes: Sequence[Scene],
         codes: Tensor | Sequence[Tensor] | None = None) -> Iterator[Frame]:
    """Semantic manipulation: the label map changes from frame to frame, the codes are kept.

    Args:
        model: any.
        scenes: the scene before and after each edit.
        codes: the code that is kept; or, of a model that reads instance features, which lie on the
            map as instances do, those of each scene.

    Example:
        >>> import numpy as np
        >>> from smis_models import create_model
        >>> from smis_models.synthesis.edits import painted
        >>> model = create_model("groupdnet_scenes", ngf=8, nef=8).eval()
        >>> scene = Scene("plain", np.zeros((128, 128), np.int64), None)
        >>> edited = painted(scene, "3:10,20,30,60", classes=8)
        >>> frames = list(edit(model, [scene, edited], drawn_code(model, 0)))
    """
    made = synthesizer(model, scenes[0])
    for k, scene in enumerate(scenes):
        if k:
            made.update(*scene.tensors())  # only windows that are new are computed
        z = codes if codes is None or isinstance(codes, Tensor) else codes[k]
        yield _frame(made, f"edit {k}" if k else "before", z, scene)


def morph(model: Any, scene: Scene, start: Tensor, end: Tensor, steps: int,
          classes: Sequence[int] | None = None) -> Iterator[Frame]:
    """Style morphing: from one code to another on the sphere, both ends included.

    Args:
        model: with a code.
        scene: what is painted.
        start, end: codes, from :func:`encode` or drawn.
        steps: frames, at least 2.
        classes: whose codes change; all by default.

    Raises:
        ValueError: fewer than 2 steps; ``classes`` for a model without class codes.
    """
    if not isinstance(steps, int) or steps < 2:
        raise ValueError(f"steps: expected a whole number of at least 2, got {steps}")
    if classes is not None:
        end = mixed_code(model, [start, end], dict.fromkeys(classes, 1))
    made = synthesizer(model, scene)
    for t in torch.linspace(0, 1, steps).tolist():
        z = interpolate(start, end, t, code_parts(model.generator))
        yield _frame(made, f"{t:.0%}", z, scene)


def resample(model: Any, scene: Scene, index: int, samples: int, seed: int = 0,
             z: Tensor | None = None) -> Iterator[Frame]:
    """Per-class resampling: the code of one class is drawn anew, all else is kept.

    Args:
        model: with a code for each class.
        scene: what is painted.
        index: the class.
        samples: further frames after the first, which shows the code as it is.
        seed: of the codes.
        z: the code; drawn by default.

    Raises:
        ValueError: the class is not in the scene, or the model has no class codes.
    """
    _check_class_codes(model)
    if index not in scene.present:
        raise ValueError(f"class: expected one of {scene.name}, {scene.shown}; got {index}")
    start = drawn_code(model, seed) if z is None else z
    made = synthesizer(model, scene)
    yield _frame(made, "first", start, scene)
    for k in range(1, samples + 1):
        changed = resample_class(model, start, index, seed + k)
        yield _frame(made, f"{scene.class_name(index)}, draw {k}", changed, scene)


def edit_features(model: Any, scene: Scene, clusters: FeatureClusters, instance: int,
                  seed: int = 0, samples: int | None = None) -> Iterator[Frame]:
    """Instance features of pix2pixHD: one instance goes through its clusters, all else is kept.

    Args:
        model: a pix2pixHD that reads instance features.
        scene: with instance ids.
        clusters: of the features.
        instance: its id.
        seed: of the other instances' features.
        samples: clusters that are shown; all of the instance's class by default.

    Raises:
        ValueError: no such instance, or no clusters of its class.
    """
    labels, ids = scene.tensors()
    if ids is None:
        raise ValueError(f"instances: expected ids with the scene {scene.name}, got none; give "
                         "--instances")
    clusters.sample(ids, seed=seed, chosen={instance: 0})  # refuses an unknown instance
    count = clusters.count(instance)
    made = Synthesizer(model, labels, ids)
    place = next(model.parameters())
    for k in range(count if samples is None else min(samples, count)):
        planes = clusters.sample(ids, seed=seed, chosen={instance: k})
        yield _frame(made, f"instance {instance}, cluster {k}", planes.to(place), scene)


def exchange(model: Any, scene: Scene, target: int, library: ShapeLibrary, shapes: int,
             seed: int = 0, z: Tensor | None = None, texture: bool = True) -> Iterator[Frame]:
    """An instance's shape exchanged for others of its class; with ``texture`` its code too.

    Args:
        model: with a code for each class, for ``texture``; else any that draws codes or none.
        scene: the scene; the first frame shows it as it is.
        target: an instance id, or a class, of which the largest region is taken.
        library: of shapes.
        shapes: how many are shown, in an order drawn by the seed.
        seed: of shapes and codes.
        z: the code; drawn by default.
        texture: draw the class's code anew with every shape.

    Raises:
        ValueError: no such target, no shape of its class, no class codes.
    """
    _, index = target_region(scene, target)
    known = library.of(index)
    if texture:
        _check_class_codes(model)
    start = draw_code(model, seed) if z is None else z
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    made = synthesizer(model, scene)
    yield _frame(made, "first", start, scene)
    for k in range(shapes):
        changed = exchange_shape(scene, target, known[order[k % len(order)]])
        made.update(*changed.tensors())
        code = resample_class(model, start, index, seed + 1 + k) if texture else start
        yield _frame(made, f"shape {k + 1}", code, changed)
