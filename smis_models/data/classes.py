"""What the classes of each data set are called, and in which colours they are shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ..io.choices import unknown_name
from .celebamask import CLASSES as _FACES
from .scenes import LANDSCAPE, MODES, palette

# As the data sets' own lists have them, in the order of the indices that their models read.
_CITYSCAPES = """
    unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground, road,
    sidewalk, parking, rail track, building, wall, fence, guard rail, bridge, tunnel, pole,
    polegroup, traffic light, traffic sign, vegetation, terrain, sky, person, rider, car, truck,
    bus, caravan, trailer, train, motorcycle, bicycle, license plate
"""  # ids 0..33; the licence plate's is -1, which their maps do not hold
_ADE20K = """
    unlabelled, wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet,
    sidewalk, person, earth, door, table, mountain, plant, curtain, chair, car, water, painting,
    sofa, shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe,
    lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
    sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool
    table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet,
    flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair,
    boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning,
    streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister,
    escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy,
    washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike,
    cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake,
    dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan,
    pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""  # raw: 0 unlabelled, 1..150 the classes
_COCO_STUFF = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
    hydrant, street sign, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
    elephant, bear, zebra, giraffe, hat, backpack, umbrella, shoe, eye glasses, handbag, tie,
    suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
    skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon,
    bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair,
    couch, potted plant, bed, mirror, dining table, window, desk, toilet, door, tv, laptop, mouse,
    remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, blender, book,
    clock, vase, scissors, teddy bear, hair drier, toothbrush, hair brush, banner, blanket,
    branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other,
    ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt,
    door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower,
    fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves,
    light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow,
    plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug,
    salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
    structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick,
    wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other,
    waterdrops, window-blind, window-other, wood, unlabelled
"""  # the label of labels.txt less one; 182 for 255


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in " ".join(text.split()).split(","))


_NAMES = {"cityscapes": _names(_CITYSCAPES), "ade20k": _names(_ADE20K),
          "coco": _names(_COCO_STUFF), "celebamask": _FACES, "scenes": LANDSCAPE}

# Modes of the landscapes' classes whose colours they are shown in.
_NATURAL = {"sky": "clear", "mountain": "rock", "water": "deep", "ground": "grass",
            "building": "brick", "tree": "summer", "car": "yellow", "person": "magenta"}


@cache
def class_names(model: str, classes: int) -> tuple[str, ...]:
    """The names of a model's classes; "class 0", ... where its data set is not known to have any.

    DeepFashion's have none: :func:`class_note` tells why.

    Args:
        model: its name, which tells the data set.
        classes: how many it has; with others than the data set its names are not known.

    Example:
        >>> class_names("groupdnet_scenes", 8)[:2]
        ('sky', 'mountain')
    """
    names = next((_NAMES[part] for part in model.split("_") if part in _NAMES), ())
    return names if len(names) == classes else tuple(f"class {k}" for k in range(classes))


def class_note(model: str, classes: int) -> str | None:
    """Why a model's classes have numbers for names; None where they have names.

    Example:
        >>> class_note("groupdnet_scenes", 7)
        "the classes have no names: 7 is not the number of the data set's"
    """
    if class_names(model, classes)[0] != "class 0":
        return None
    if "deepfashion" in model.split("_"):
        return ("the classes have no names: DeepFashion's maps show hair, face, skin, upper and "
                "lower clothes, socks, shoes and background, and no list tells which number is "
                "which; look at a map beside its picture")
    return f"the classes have no names: {classes} is not the number of the data set's"


def class_colours(names: Sequence[str]) -> NDArray[np.uint8]:
    """(classes, 3) display colours: natural ones of landscapes, else well apart."""
    if tuple(names) == LANDSCAPE:
        natural = np.array([mode.colour for name in LANDSCAPE for mode in MODES[name]
                            if mode.name == _NATURAL[name]])
        return (natural * 255).round().astype(np.uint8)
    return palette(len(names))


def class_index(argument: str, text: str, names: Sequence[str]) -> int:
    """The class that a name or a number means.

    Raises:
        ValueError: neither; the message speaks of ``argument``.

    Example:
        >>> class_index("class", "water", class_names("groupdnet_scenes", 8))
        2
    """
    if re.fullmatch(r"\d+", text):
        if int(text) >= len(names):
            raise ValueError(f"{argument}: expected a class 0..{len(names) - 1}, got {text}")
        return int(text)
    folded = [name.lower() for name in names]
    wanted = text.strip().lower()
    if wanted in folded:
        return folded.index(wanted)
    if names[0] == "class 0":
        raise ValueError(f"{argument}: expected a class 0..{len(names) - 1} (this model's have no "
                         f"names), got {text!r}")
    shown = unknown_name(argument, names, text, "a class's name or number of")
    raise ValueError(shown + "; `smis classes NAME` lists them")
