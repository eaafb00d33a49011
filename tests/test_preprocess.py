"""Crops, flips, sizes and filters of the published loaders: fixed pixels, Pillow beside."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from validation import agree

from smis_models.data import Draw, FileScenes, Preprocess, list_scenes
from smis_models.data.preprocess import Transform
from smis_models.data.sample import image_tensor
from smis_models.io import images

R = np.random.default_rng(0)
PICTURE = R.integers(0, 256, (20, 30, 3), dtype=np.uint8)
LABELS = R.integers(0, 70000, (20, 30))


@pytest.mark.parametrize("flip", [False, True])
def test_a_plan_cuts_and_mirrors_these_pixels(flip: bool) -> None:
    plan = Transform((20, 30), (3, 7, 8, 11), flip)
    rows, columns = slice(3, 11), slice(7, 18)
    step = -1 if flip else 1
    np.testing.assert_array_equal(plan.picture(PICTURE), PICTURE[rows, columns][:, ::step])
    np.testing.assert_array_equal(plan.indices(LABELS), LABELS[rows, columns][:, ::step])


@pytest.mark.parametrize("size", [(13, 47), (40, 9)])
def test_a_plan_resizes_as_pillow(size: tuple[int, int]) -> None:
    plan = Transform(size, None, False)
    wide = size[::-1]
    agree("pictures of another size", "Pillow, bicubic", plan.picture(PICTURE),
          Image.fromarray(PICTURE).resize(wide, Image.Resampling.BICUBIC))
    agree("label maps of another size", "Pillow, nearest", plan.indices(LABELS), Image.fromarray(
        LABELS.astype(np.int32)).resize(wide, Image.Resampling.NEAREST))


# Mode, (height, width) of the scene, of the crop and of the load; what it is resized to.
RESIZED = [
    ("resize", (100, 201), (48, 64), (70, 80), (70, 80)),
    ("resize_and_crop", (100, 201), (48, 64), (70, 80), (70, 80)),
    ("crop", (100, 201), (48, 64), (70, 80), (100, 201)),
    ("scale_width", (99, 201), (48, 64), (70, 80), (39, 80)),
    ("scale_width", (102, 201), (40, 64), (70, 80), (40, 80)),  # 40.6, cut off as published
    ("scale_width_and_crop", (300, 201), (48, 64), (70, 80), (119, 80)),
    ("scale_shortside", (100, 201), (48, 64), (70, 80), (70, 140)),
    ("scale_shortside", (201, 100), (48, 64), (80, 70), (140, 70)),
    ("scale_shortside_and_crop", (99, 201), (48, 64), (70, 80), (70, 142)),
    ("fixed", (100, 201), (48, 64), (70, 80), (48, 64)),
    ("none", (100, 201), (48, 64), (70, 80), (96, 192)),
    ("none", (15, 49), (48, 64), None, (32, 64)),
    ("resize", (100, 201), (48, 64), None, (48, 64)),
]


@pytest.mark.parametrize(("mode", "scene", "size", "load", "resized"), RESIZED)
def test_sizes(mode: str, scene: tuple[int, int], size: tuple[int, int],
               load: tuple[int, int] | None, resized: tuple[int, int]) -> None:
    plan = Preprocess(mode, size, load, augment=False).plan(scene, np.random.default_rng(0))
    assert plan.resized == resized
    assert not plan.flip
    if mode.endswith("crop"):  # central
        top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
        assert plan.box == (top, left, *size)
    else:
        assert plan.box is None


def test_crops_are_drawn_from_every_place() -> None:
    """Uniform over 0..spare of each side, both ends included, the sides on their own."""
    r = np.random.default_rng(1)
    preprocess = Preprocess("crop", (6, 4))
    boxes = [preprocess.plan((9, 10), r).box for _ in range(700)]
    places = [(box[0], box[1]) for box in boxes if box is not None]
    assert {box[2:] for box in boxes if box is not None} == {(6, 4)}
    assert set(places) == {(top, left) for top in range(4) for left in range(7)}
    counts = np.zeros((4, 7))
    for place in places:
        counts[place] += 1
    assert counts.min() > 8 and counts.max() < 50  # 25 each
    fixed = Preprocess("crop", (6, 4), augment=False).plan((9, 10), r)
    assert fixed.box == (1, 3, 6, 4)


def test_a_scene_is_the_same_whenever_it_is_read(tmp_path) -> None:
    """Augmentation by (seed, index, epoch): the draws of numpy's own generator of these three."""
    for i in range(2):
        images.write_png(tmp_path / f"images/{i}.png", np.roll(PICTURE, i, 0))
        images.write_indices(tmp_path / f"labels/{i}.png", LABELS % 8)
    records = list_scenes("folder", tmp_path).records
    preprocess = Preprocess("crop", (9, 8))
    dataset = FileScenes(records, 8, preprocess, seed=6)
    boxes = set()
    for index in (0, 1):
        for epoch in range(3):
            plan = preprocess.plan((20, 30), np.random.default_rng((6, index, epoch)))
            boxes.add(plan.box)
            sample = dataset[Draw(index, epoch)]
            np.testing.assert_array_equal(sample["labels"], plan.indices(LABELS % 8))
            np.testing.assert_array_equal(
                sample["image"], image_tensor(plan.picture(np.roll(PICTURE, index, 0))))
    assert len(boxes) == 6


def test_pictures_in_numbers() -> None:
    found = image_tensor(PICTURE)
    assert found.shape == (3, 20, 30)
    np.testing.assert_allclose(found.permute(1, 2, 0), PICTURE / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("size", [(11, 17), (50, 41)])
def test_a_picture_is_read_as_pillow_resizes(tmp_path, size: tuple[int, int]) -> None:
    images.write_png(tmp_path / "a.png", PICTURE)
    expected = Image.open(tmp_path / "a.png").resize(size[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images.read_picture(tmp_path / "a.png", size), expected)


def test_a_grid_places_these_pixels() -> None:
    row = [np.full((2, 3, 3), value, np.uint8) for value in (10, 20)]
    sheet = images.grid([row, row[1:]], gap=1)
    expected = np.full((5, 7), 255)
    expected[:2, :3], expected[:2, 4:], expected[3:, :3] = 10, 20, 20
    np.testing.assert_array_equal(sheet[..., 0], expected)
