"""`smis paint` in a real headless Chromium: strokes, undo, looks, what is saved."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from require import CHROMIUM, lacking

from smis_kernels.runtime.backend import missing
from smis_models.io.images import encode_png

pytestmark = pytest.mark.skipif(
    bool(lacking("chromium") or missing("cpu")), reason=str(lacking("chromium") or missing("cpu")))
TREE, SKY, WATER = 5, 0, 2
REACH = 32  # pixels beyond which a stroke's change of the picture is small


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The command itself, on a free port, ended by Ctrl-C."""
    command = [sys.executable, "-m", "smis_models.cli", "paint", "--port", "0"]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+/", line)
    assert found is not None, line + process.communicate()[1]
    print(f"started in {time.monotonic() - started:.1f} s")
    yield found[0]
    process.send_signal(2)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: SMIS_SCREENSHOTS, which CI keeps, or a temporary folder."""
    named = os.environ.get("SMIS_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


class Board:
    """A page and what a person does on it."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.problems: list[str] = []
        self.asked: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda message: self.problems.append(message.text)
                if message.type == "error" else None)
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(address)
        self.settle(0)

    def shown(self) -> int:
        return int(self.page.evaluate("document.body.dataset.shown || '0'"))

    def settle(self, after: int) -> None:
        """Wait for a picture later than ``after``, and until none is under way."""
        end = time.monotonic() + 60
        while not self.page.evaluate(
                f"Number(document.body.dataset.shown || 0) > {after} && !running && !wanted"):
            assert not self.page.evaluate(
                "document.querySelector('#message:not(.note)')?.textContent")
            assert time.monotonic() < end, "no picture"
            self.page.wait_for_timeout(20)

    def doing(self, action: Any) -> None:
        before = self.shown()
        action()
        self.settle(before)

    def labels(self) -> np.ndarray:
        values = self.page.evaluate("Array.from(labels)")
        return np.array(values, np.uint8).reshape(128, 128)

    def canvas(self, name: str) -> np.ndarray:
        values = self.page.evaluate(
            f"Array.from(document.getElementById('{name}').getContext('2d')"
            ".getImageData(0, 0, 128, 128).data)")
        pixels = np.array(values, np.uint8).reshape(128, 128, 4)
        assert (pixels[..., 3] == 255).all()
        return pixels[..., :3]

    def stroke(self, *points: tuple[float, float]) -> None:
        """Press, drag and release on the map, (x, y) in its pixels."""
        box = self.page.locator("#map").bounding_box()
        scale = box["width"] / 128

        def at(point: tuple[float, float]) -> tuple[float, float]:
            return box["x"] + point[0] * scale, box["y"] + point[1] * scale

        def draw() -> None:
            self.page.mouse.move(*at(points[0]))
            self.page.mouse.down()
            for point in points[1:]:
                self.page.mouse.move(*at(point), steps=6)
            self.page.mouse.up()

        self.doing(draw)

    def choose(self, index: int) -> None:
        self.page.locator(f"#classes button[data-class='{index}']").click()

    def saved(self, kind: str) -> bytes:
        with self.page.expect_download() as waiting:
            self.page.locator(f"[data-save='{kind}']").click()
        return Path(waiting.value.path()).read_bytes()


@pytest.fixture
def board(browser: Any, address: str) -> Iterator[Board]:
    # Without the page's policy, for playwright waits by eval; test_light_and_dark is under it.
    page = browser.new_page(viewport={"width": 1180, "height": 880}, bypass_csp=True)
    made = Board(page, address)
    yield made
    page.close()
    assert made.problems == []
    assert all(url.startswith((address, "data:", "blob:")) for url in made.asked)


def test_a_stroke_paints_its_class_and_undo_takes_it_back(board: Board, screenshots: Path) -> None:
    before, first = board.labels(), board.canvas("picture")
    board.choose(TREE)
    board.stroke((30, 30), (50, 34))
    after, second = board.labels(), board.canvas("picture")
    changed = after != before
    assert changed.sum() > 100
    assert (after[changed] == TREE).all()
    rows, columns = np.nonzero(changed)
    assert min(rows.min(), columns.min()) > 20 and rows.max() < 44 and columns.max() < 60
    # Exact labels: every colour of the map on the screen is a class's.
    colours = np.array([c["colour"] for c in board.page.evaluate("model.classes")], np.uint8)
    assert np.array_equal(board.canvas("map"), colours[after])
    # The picture changes where the stroke is, and little far from it.
    difference = np.abs(second.astype(int) - first).max(2)
    distance = np.sqrt((((np.argwhere(changed)[None, ::7]
                          - np.indices((128, 128)).reshape(2, -1).T[:, None]) ** 2).sum(2)).min(1))
    far = distance.reshape(128, 128) > REACH
    assert difference[changed].mean() > 20
    assert difference[far].mean() < difference[changed].mean() / 5
    board.page.screenshot(path=screenshots / "stroke.png")
    board.doing(lambda: board.page.keyboard.press("Control+z"))
    assert np.array_equal(board.labels(), before)
    assert np.array_equal(board.canvas("picture"), first)  # bit-equal
    board.doing(lambda: board.page.keyboard.press("Control+Shift+Z"))
    assert np.array_equal(board.labels(), after)
    assert np.array_equal(board.canvas("picture"), second)
    assert re.search(r"Picture in \d+ ms, of these the model \d+ ms · windows: [\d,]+ new, "
                     r"[\d,]+ kept", board.page.inner_text("#status"))


def test_fill_eraser_and_pick(board: Board) -> None:
    before = board.labels()
    y, x = (int(n) for n in np.argwhere(before == SKY)[0])
    board.choose(WATER)
    board.page.keyboard.press("f")
    board.stroke((x + .5, y + .5))
    filled = board.labels()
    region = filled != before
    assert region.any() and (before[region] == SKY).all() and (filled[region] == WATER).all()
    board.page.keyboard.press("e")
    board.stroke((x + .5, y + .5), (x + 20, y + .5))
    erased = board.labels()
    assert (erased != filled).sum() > 50
    assert (erased[erased != filled] == before[erased != filled]).all()
    # Undone, another scene's labels are no longer what the eraser brings back.
    board.doing(lambda: board.page.select_option("#scene", index=1))
    assert not np.array_equal(board.labels(), erased)
    board.doing(lambda: board.page.click("#undo"))
    board.stroke((8.5, y + .5), (120, 100))
    again = board.labels()
    assert (again != erased).any()
    assert (again[again != erased] == before[again != erased]).all()
    board.page.keyboard.press("i")
    other = int(before[127, 64])
    box = board.page.locator("#map").bounding_box()
    board.page.mouse.click(box["x"] + box["width"] * 64.5 / 128, box["y"] + box["height"] * .997)
    assert board.page.evaluate("selected") == other


def test_one_class_is_drawn_anew_and_morphed(board: Board, screenshots: Path) -> None:
    labels, first = board.labels(), board.canvas("picture")
    largest = int(np.bincount(labels.ravel()).argmax())
    board.choose(largest)
    board.doing(lambda: board.page.click("#anew"))
    second = board.canvas("picture")
    difference = np.abs(second.astype(int) - first).max(2)
    assert difference[labels == largest].mean() > 2 * difference[labels != largest].mean()
    looks = board.page.evaluate("looks.map((look) => look.start)")
    assert [k for k, start in enumerate(looks) if start != "seed:0"] == [largest]

    def slide(value: float) -> None:
        board.page.evaluate(f"""() => {{ const slider = document.getElementById("morph");
            slider.value = {value}; slider.dispatchEvent(new Event("input"));
            slider.dispatchEvent(new Event("change")); }}""")

    board.doing(lambda: slide(.5))
    middle = board.canvas("picture")
    assert not np.array_equal(middle, second)
    board.page.screenshot(path=screenshots / "morph.png")
    for _ in range(2):  # the slide, then the draw
        board.doing(lambda: board.page.click("#undo"))
    assert np.array_equal(board.canvas("picture"), first)


def test_a_look_is_taken_from_another_picture(board: Board, screenshots: Path) -> None:
    first = board.canvas("picture")
    board.page.click("#sample")
    board.page.wait_for_selector("#pictures img")
    board.doing(lambda: board.page.click("#take-all"))
    assert not np.array_equal(board.canvas("picture"), first)
    assert board.page.evaluate(
        "looks.some((look) => look.start === `picture:${pictures[0].number}`)")
    board.page.screenshot(path=screenshots / "look.png")
    picture = encode_png(first)
    board.page.set_input_files("#picture-files", files=[
        {"name": "own.png", "mimeType": "image/png", "buffer": picture}])
    board.page.wait_for_function("pictures.length === 2")
    board.doing(lambda: board.page.click("#take-all"))
    assert board.page.evaluate(
        "looks.some((look) => look.start === `picture:${pictures[1].number}`)")


def test_what_is_saved_is_what_is_shown(board: Board, tmp_path: Path) -> None:
    board.choose(TREE)
    board.stroke((64, 64), (90, 70))
    picture = np.asarray(Image.open(io.BytesIO(board.saved("picture.png"))))
    assert np.array_equal(picture, board.canvas("picture"))
    saved = board.saved("map.png")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(saved))), board.labels())
    text = board.saved("session.html").decode()
    assert "brush: tree" in text
    without = re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
    assert not re.search(r"//|<script|<a |<link", without)
    # The map that was saved is a map that can be loaded.
    labels = board.labels()
    board.doing(lambda: board.page.select_option("#scene", "landscape_1"))
    assert not np.array_equal(board.labels(), labels)
    board.doing(lambda: board.page.set_input_files("#map-file", files=[
        {"name": "map.png", "mimeType": "image/png", "buffer": saved}]))
    assert np.array_equal(board.labels(), labels)
    assert board.page.is_hidden("#message")
    large = encode_png(labels.repeat(2, 0).repeat(3, 1))
    board.page.set_input_files("#map-file", files=[
        {"name": "large.png", "mimeType": "image/png", "buffer": large}])
    board.page.wait_for_selector("#message.note")
    assert board.page.inner_text("#message") == (
        "large.png, 384x256, was resized to 128x128 by nearest; its shape is stretched")
    assert np.array_equal(board.labels(), labels)


def test_a_mistake_is_a_line_on_the_page(board: Board) -> None:
    before = board.labels()
    wrong = encode_png(np.full((128, 128), 9, np.uint8))
    board.page.set_input_files("#map-file", files=[
        {"name": "wrong.png", "mimeType": "image/png", "buffer": wrong}])
    board.page.wait_for_selector("#message:not([hidden])")
    text = board.page.inner_text("#message")
    assert "expected labels 0..7, got 9" in text and "Traceback" not in text and "/tmp" not in text
    assert np.array_equal(board.labels(), before)
    board.problems.clear()  # Chromium logs the answer's status, 400
    board.doing(lambda: board.page.evaluate(
        "say(''), known = 999, repaint()"))
    assert board.page.is_hidden("#message")
    board.problems.clear()


STROKES = (  # of the screenshots: class, brush, way
    (1, 22, ((70, 58), (90, 44), (104, 52), (122, 40))), (TREE, 16, ((118, 52), (112, 60))),
    (TREE, 13, ((14, 66), (10, 72))), (WATER, 11, ((60, 112), (96, 114), (126, 110))))
LOOKS = {"sky": 4, "tree": 10, "car": 4}


def test_light_and_dark(browser: Any, address: str, screenshots: Path) -> None:
    """Under the page's own policy; README's screenshot is light.png."""
    backs = []
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 1180, "height": 880}, color_scheme=scheme)
        board = Board(page, address)
        for name, seed in LOOKS.items():
            page.evaluate("([name, source]) => { looks[model.classes.findIndex("
                          "(each) => each.name === name)].start = source; }",
                          [name, f"seed:{seed}"])
        for index, size, way in STROKES:
            board.choose(index)
            page.evaluate(f"resize({size})")
            board.stroke(*way)
        page.click("#sample")
        page.wait_for_selector("#pictures img")
        backs.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.screenshot(path=screenshots / f"{scheme}.png")
        assert board.problems == []
        page.close()
    assert backs[0] != backs[1]
