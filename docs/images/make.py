"""Makes the pictures of README by the model that ships: ``python docs/images/make.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from smis_models import Synthesizer, create_model, shipped_weights
from smis_models.data import GeneratedScenes
from smis_models.io.images import to_pictures
from smis_models.synthesis.codes import code_parts, interpolate, resample_class
from smis_models.synthesis.scene import Scene

FOLDER = Path(__file__).parent
LAYOUTS, SAMPLES, STEPS, GAP = (1, 5, 6), 5, 5, 4


def sheet(rows: list[list[np.ndarray]]) -> Image.Image:
    """Pictures in rows, at their own size."""
    height, width = rows[0][0].shape[:2]
    canvas = np.full((len(rows) * (height + GAP) - GAP, len(rows[0]) * (width + GAP) - GAP, 3), 255,
                     np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = i * (height + GAP), j * (width + GAP)
            canvas[top:top + height, left:left + width] = picture
    return Image.fromarray(canvas)


def main() -> None:
    """samples.png: a layout a row, a code a column; edit.gif: one class after another anew."""
    model = create_model(checkpoint=shipped_weights("groupdnet_scenes")).eval()
    scenes = GeneratedScenes(max(LAYOUTS) + 1, model.preset.image_size, "test")
    layouts = [Scene(str(i), scenes[i]["labels"].numpy().astype(np.int64), None) for i in LAYOUTS]
    makers = [Synthesizer(model, *layout.tensors()) for layout in layouts]
    maps = [layout.picture(model.preset.classes) for layout in layouts]
    sheet([[shown, *(to_pictures(maker.sample(seed=s))[0] for s in range(SAMPLES))]
           for shown, maker in zip(maps, makers, strict=True)]).save(
        FOLDER / "samples.png", optimize=True)
    maker, layout, frames = makers[0], layouts[0], []
    z = maker.code(0)
    for index in layout.present[:3]:
        other = resample_class(model, z, index, 10 + index)
        for t in torch.linspace(0, 1, STEPS).tolist()[:-1]:
            code = interpolate(z, other, t, code_parts(model.generator))
            (picture,) = to_pictures(maker.sample(code))
            frames.append(sheet([[maps[0], picture]]).resize((520, 256), Image.Resampling.NEAREST))
        z = other
    frames[0].save(FOLDER / "edit.gif", save_all=True, append_images=frames[1:], loop=0,
                   duration=180, optimize=True)


if __name__ == "__main__":
    main()
