"""What each kind of scene is made of: a function that paints it on a canvas."""

from __future__ import annotations

import numpy as np

from .shapes import Canvas, Shape, below, blob, figure, polygon, rectangle, vehicle


def street(canvas: Canvas, r: np.random.Generator) -> None:
    horizon = r.uniform(0.38, 0.5)
    vanish = r.uniform(0.4, 0.6)
    canvas.stuff("sky", rectangle(0, 0, 1, 1))
    canvas.stuff("vegetation", below(horizon - 0.12, r.uniform(-0.03, 0.03, 4), r.uniform(0, 6)))
    left = 0.0
    while left < 1:
        width = r.uniform(0.08, 0.22)
        distance = abs(left + width / 2 - vanish)
        if distance > 0.12:
            top = horizon - r.uniform(0.3, 0.9) * distance - 0.05
            slope = r.uniform(-0.05, 0.05)
            canvas.stuff("building", polygon((top, left), (top + slope, left + width),
                                             (horizon + 0.1, left + width), (horizon + 0.1, left)))
        left += width
    canvas.stuff("terrain", below(horizon, r.uniform(-0.01, 0.01, 3)))
    canvas.stuff("wall", rectangle(horizon - 0.04, 0, horizon + 0.05, r.uniform(0.15, 0.3)))
    canvas.stuff("fence", rectangle(horizon - 0.02, r.uniform(0.7, 0.8), horizon + 0.06, 1))
    canvas.stuff("sidewalk", polygon((horizon + 0.02, vanish - 0.1), (horizon + 0.02, vanish + 0.1),
                                     (0.9, 1.3), (1, 1.3), (1, -0.3), (0.9, -0.3)))
    canvas.stuff("road", polygon((horizon + 0.02, vanish - 0.05), (horizon + 0.02, vanish + 0.05),
                                 (1, 1.05), (1, -0.05)))
    for _ in range(r.integers(3, 6)):
        x = r.uniform(0, 1)
        crown = r.uniform(0.06, 0.13)
        canvas.stuff("vegetation",
                     rectangle(horizon - crown, x - 0.006, horizon + 0.06, x + 0.006),
                     blob(horizon - 1.3 * crown, x, crown, crown * 0.8, r.uniform(-0.1, 0.1, 4)))
    for part, height in (("traffic light", 0.04), ("traffic sign", 0.03), ("traffic sign", 0.025)):
        x, top = r.uniform(0.1, 0.9), horizon - r.uniform(0.08, 0.25)
        canvas.stuff("pole", rectangle(top, x - 0.004, horizon + 0.1, x + 0.004))
        canvas.thing(part, rectangle(top - height, x - 0.015, top + height, x + 0.015))
    depths = np.sort(r.uniform(0.05, 0.45, r.integers(6, 11)))
    for i, depth in enumerate(depths):
        y, size = horizon + 0.05 + depth, 0.04 + 0.2 * depth
        x = vanish + (1 if i % 2 else -1) * r.uniform(0.15, 1.0) * (depth + 0.1)
        part, cab = (("bus", 1.5), ("truck", 1.3), ("car", 0.9))[min(i, 2)]
        vehicle(canvas, part, y, x, size, cab)
    for depth in np.sort(r.uniform(0.05, 0.35, r.integers(4, 8))):
        y = horizon + 0.06 + depth
        figure(canvas, "person", y, r.uniform(0.03, 0.97), 0.12 + 0.5 * depth)
    y, x, s = r.uniform(0.7, 0.9), r.uniform(0.2, 0.8), r.uniform(0.04, 0.06)
    canvas.thing("bicycle", blob(y - s, x - s, s, s * 0.8), blob(y - s, x + s, s, s * 0.8))
    figure(canvas, "rider", y - 0.5 * s, x, 4 * s)


def indoor(canvas: Canvas, r: np.random.Generator) -> None:
    floor, ceiling = r.uniform(0.62, 0.72), r.uniform(0.08, 0.16)
    left, right = r.uniform(0.08, 0.2), r.uniform(0.8, 0.92)
    canvas.stuff("wall", rectangle(0, 0, 1, 1))
    canvas.stuff("ceiling", polygon((0, 0), (0, 1), (ceiling, right), (ceiling, left)))
    canvas.stuff("floor", polygon((1, 0), (1, 1), (floor, right), (floor, left)))
    x = r.uniform(0.28, 0.4)
    canvas.thing("windowpane", rectangle(0.2, x, 0.45, x + 0.22))
    for side in (x - 0.03, x + 0.22):
        fold = r.uniform(-0.008, 0.008)
        canvas.thing("curtain", polygon((0.17, side - 0.02), (0.17, side + 0.05),
                                        (0.35, side + 0.04 + fold), (0.56, side + 0.055),
                                        (0.56, side - 0.025), (0.35, side - 0.01 + fold)))
    canvas.thing("door", polygon((0.24, 0.01), (0.26, left - 0.02), (floor + 0.03, left - 0.02),
                                 (floor + 0.16, 0.01)))
    for _ in range(r.integers(1, 4)):
        y, x = r.uniform(0.2, 0.35), r.uniform(0.62, 0.76)
        canvas.thing("painting", rectangle(y, x, y + r.uniform(0.05, 0.1), x + 0.07))
    x = r.uniform(0.78, 0.84)
    canvas.thing("cabinet", rectangle(floor - 0.22, x, floor + 0.04, x + 0.16))
    canvas.thing("shelf", rectangle(0.18, x + 0.02, floor - 0.24, x + 0.15))
    for i in range(r.integers(5, 9)):
        top = r.uniform(0.2, 0.24)
        canvas.thing("book", rectangle(top, x + 0.03 + 0.014 * i, 0.3, x + 0.041 + 0.014 * i))
    canvas.stuff("rug", blob(0.85, r.uniform(0.4, 0.6), 0.1, 0.3, (0.02,)))
    x = r.uniform(0.25, 0.4)
    canvas.thing("sofa", blob(floor + 0.02, x + 0.15, 0.13, 0.2, (0.03, -0.03)),
                 rectangle(floor, x - 0.05, floor + 0.13, x + 0.35))
    for i in range(3):
        canvas.thing("cushion", blob(floor - 0.01, x + 0.04 + 0.11 * i, 0.045, 0.04, (0.06,)))
    x = r.uniform(0.55, 0.7)
    canvas.thing("table", blob(0.8, x, 0.035, 0.15), rectangle(0.8, x - 0.01, 0.94, x + 0.01))
    for side in (-0.17, 0.17):
        canvas.thing("chair", rectangle(0.7, x + side - 0.05, 0.84, x + side + 0.03),
                     polygon((0.84, x + side - 0.05), (0.84, x + side + 0.05),
                             (0.97, x + side + 0.04), (0.97, x + side - 0.04)))
    x = r.uniform(0.2, 0.26)
    canvas.thing("lamp", rectangle(0.4, x - 0.006, floor + 0.05, x + 0.006),
                 polygon((0.36, x - 0.025), (0.36, x + 0.025), (0.46, x + 0.05), (0.46, x - 0.05)))
    x = r.uniform(0.88, 0.95)
    canvas.thing("plant", blob(0.68, x, 0.12, 0.07, r.uniform(-0.12, 0.12, 5)))
    for _ in range(r.integers(1, 3)):
        figure(canvas, "person", r.uniform(0.86, 0.98), r.uniform(0.1, 0.9), r.uniform(0.4, 0.6))


def person(canvas: Canvas, r: np.random.Generator) -> None:
    x, lean = r.uniform(0.44, 0.56), r.uniform(-0.02, 0.02)
    head, shoulder, hip = 0.14, r.uniform(0.12, 0.15), r.uniform(0.09, 0.12)
    waist, hem = r.uniform(0.46, 0.54), r.uniform(0.6, 0.88)
    canvas.stuff("background", rectangle(0, 0, 1, 1))
    canvas.stuff("hair", blob(head + r.uniform(0, 0.05), x + lean, 0.12, 0.085,
                              r.uniform(-0.05, 0.05, 3)))
    for side in (-1, 1):
        canvas.stuff("legs", polygon((hem - 0.1, x), (hem - 0.1, x + side * hip),
                                     (0.96, x + side * 0.075), (0.96, x + side * 0.03)))
        canvas.stuff("shoes", blob(0.965, x + side * 0.06, 0.018, 0.04))
        elbow = shoulder + r.uniform(0.02, 0.08)
        canvas.stuff("arms", polygon((0.28, x + side * shoulder * 0.8), (0.27, x + side * shoulder),
                                     (0.43, x + side * (elbow + 0.015)), (0.58, x + side * elbow),
                                     (0.58, x + side * (elbow - 0.04)),
                                     (0.43, x + side * (elbow - 0.04))))
    canvas.stuff("face", blob(head, x + lean, 0.075, 0.048), rectangle(0.2, x - 0.025, 0.27,
                                                                     x + 0.025))
    canvas.stuff("lower clothes", polygon((waist - 0.04, x - hip), (waist - 0.04, x + hip),
                                          (hem, x + hip * 1.1), (hem, x + 0.01),
                                          (waist + 0.1, x), (hem, x - 0.01),
                                          (hem, x - hip * 1.1)))
    canvas.stuff("upper clothes", blob(0.39, x, 0.155, shoulder, r.uniform(-0.04, 0.04, 3)),
                 polygon((0.25, x - shoulder * 0.6), (0.25, x + shoulder * 0.6),
                         (waist, x + hip), (waist, x - hip)))
    canvas.stuff("hair", blob(head - 0.06, x + lean, 0.04, 0.06, r.uniform(-0.05, 0.05, 2)))
    extras: tuple[tuple[str, Shape], ...] = (
        ("bag", blob(0.62, x + shoulder + 0.1, 0.07, 0.06, (0.05,))),
        ("hat", polygon((0.05, x - 0.06), (0.05, x + 0.06), (0.08, x + 0.1), (0.08, x - 0.1))),
        ("belt", rectangle(waist - 0.015, x - hip, waist + 0.01, x + hip)),
        ("scarf", blob(0.26, x, 0.03, 0.08, (0.1,))),
    )
    for part, shape in extras:
        if canvas.class_of[part] != canvas.class_of["background"]:
            canvas.stuff(part, shape)


def landscape(canvas: Canvas, r: np.random.Generator) -> None:
    """A view over a lake or a plain: every part is large enough to show a texture at 64 pixels."""
    horizon = r.uniform(0.42, 0.56)
    canvas.stuff("sky", rectangle(0, 0, 1, 1))
    if r.random() < 0.9:
        canvas.stuff("mountain", below(horizon - r.uniform(0.1, 0.2), r.uniform(-0.06, 0.06, 3),
                                       r.uniform(0, 6)))
    canvas.stuff("ground", below(horizon, r.uniform(-0.012, 0.012, 3)))
    if r.random() < 0.85:
        y, x = r.uniform(horizon + 0.14, 0.86), r.uniform(0.1, 0.9)
        canvas.stuff("water", blob(y, x, r.uniform(0.07, 0.12), r.uniform(0.3, 0.5),
                                   r.uniform(-0.06, 0.06, 3)))
    left = r.uniform(-0.1, 0.3)
    for _ in range(r.integers(1, 4)):
        width, top = r.uniform(0.12, 0.26), horizon - r.uniform(0.1, 0.34)
        foot = horizon + r.uniform(0.02, 0.06)
        roof = r.uniform(0, 0.06)
        canvas.thing("building", polygon((top, left), (top - roof, left + width / 2),
                                         (top, left + width), (foot, left + width), (foot, left)))
        left += width + r.uniform(0, 0.25)
    things = [("tree", d) for d in r.uniform(0.03, 0.3, r.integers(2, 5))]
    things += [("car", d) for d in r.uniform(0.12, 0.38, r.integers(1, 3))]
    things += [("person", d) for d in r.uniform(0.15, 0.42, r.integers(1, 4))]
    for part, depth in sorted(things, key=lambda thing: thing[1]):
        y, x = horizon + depth, r.uniform(0.05, 0.95)
        if part == "tree":
            height = r.uniform(0.22, 0.32) + 0.5 * depth
            canvas.thing("tree", rectangle(y - 0.4 * height, x - 0.015, y, x + 0.015),
                         blob(y - 0.63 * height, x, 0.37 * height, 0.28 * height,
                              r.uniform(-0.08, 0.08, 3)))
        elif part == "car":
            vehicle(canvas, "car", y, x, 0.08 + 0.18 * depth, 0.95)
        else:
            figure(canvas, "person", y, x, 0.22 + 0.5 * depth)
