"""`smis paint`'s server and painter: what is refused, what is in order, that pictures are exact."""

from __future__ import annotations

import io
import itertools
import json
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from require import lacking

import smis_kernels
from smis_kernels import use_backend
from smis_kernels.runtime.backend import missing
from smis_models import cli, create_model
from smis_models.io.images import data_uri, encode_png, resize_picture, to_pictures
from smis_models.synthesis.codes import draw_code, interpolate

absent = lacking("starlette") or lacking("uvicorn") or lacking("httpx") or missing("cpu")
pytestmark = pytest.mark.skipif(bool(absent), reason=str(absent))

if not absent:
    from starlette.testclient import TestClient

    from smis_models.app import painter as painting
    from smis_models.app.painter import Look, Painter, Rectangle, StaleError, Stroke
    from smis_models.app.report import report
    from smis_models.app.server import UPLOAD, create_app, listen

SMALL = {"groupdnet_scenes": {"ngf": 8, "nef": 8},
         "groupdnet_cityscapes": {"ngf": 70, "nef": 70, "image_size": (64, 128)},
         "spade_coco_vae": {"ngf": 4, "hidden": 8, "image_size": (64, 64)},
         "spade_ade20k": {"ngf": 4, "hidden": 8, "image_size": (64, 64)},
         "pix2pixhd_cityscapes": {"ngf": 4, "image_size": (64, 128)},
         "bicyclegan_deepfashion": {"ngf": 4, "nef": 4, "image_size": (64, 64)}}


def made(name: str = "groupdnet_scenes", **options: Any) -> Any:
    return create_model(name, init_gain=1.0, **SMALL.get(name, {}), **options).eval()


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter(made())


@pytest.fixture(scope="module")
def client(painter: Painter) -> Iterator[TestClient]:
    with TestClient(create_app(painter, weights="random"), base_url="http://127.0.0.1:8765") as it:
        yield it


def packed(head: Any, content: bytes = b"") -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<I", len(text)) + text + content


LOOKS = [["seed:0", "seed:1", 0.0]] * 8
WHOLE = [[0, 0, 128, 128]]


def head(session: str, version: int = 1, /, **changes: Any) -> dict[str, Any]:
    return {"session": session, "version": version, "base": None, "rectangles": WHOLE,
            "looks": LOOKS, "step": 0, "caption": "", **changes}


def scene(painter: Painter, number: int = 0) -> np.ndarray:
    return painter.scene(list(painter.scenes)[number])


def answer(response: Any) -> tuple[dict[str, Any], np.ndarray]:
    assert response.status_code == 200, response.text
    (length,) = struct.unpack_from("<I", response.content)
    pixels = np.frombuffer(response.content, np.uint8, offset=4 + length)
    return json.loads(response.content[4:4 + length]), pixels


def plain(model: Any, labels: np.ndarray, z: torch.Tensor | None,
          edges: bool = False) -> np.ndarray:
    """The reference's picture."""
    ids = torch.from_numpy(labels.astype(np.int64))[None]
    with use_backend("reference"), torch.no_grad():
        (picture,) = to_pictures(model(model.semantics(ids, ids if edges else None), z))
    return picture


def test_the_benchmark_of_strokes_paints_what_the_model_paints() -> None:
    from benchmarks import paint as benchmark

    times = benchmark.measure(made(), 3)
    assert len(times.answered) == len(times.painted) == len(times.forward) == 3
    assert all(p <= a for p, a in zip(times.painted, times.answered, strict=True))
    assert all(new + kept > 0 for new, kept in times.windows)
    assert times.pictures is not None
    page, plain_picture = times.pictures
    assert np.abs(page.astype(int) - to_pictures(plain_picture)[0]).max() <= 1
    found = benchmark.report("small", (128, 128), times)
    assert "small, 128 x 128, 3 strokes" in found and "goal: 150 ms at 128 x 128: " in found
    assert "goal" not in benchmark.report("wide", (64, 128), times)


def test_looks_that_stay_are_not_made_again(painter: Painter,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []

    def counted(start: torch.Tensor, end: torch.Tensor, t: float) -> torch.Tensor:
        made.append(t)
        return interpolate(start, end, t)

    monkeypatch.setattr(painting, "interpolate", counted)
    looks = [Look("seed:0", "seed:1", 0.5)] * 8
    changed = [*looks[:3], Look("seed:0", "seed:1", 0.75), *looks[4:]]

    def stroke(session: str, version: int, looks: list[Look],
               base: int | None = None) -> np.ndarray:
        whole = [] if base is not None else [Rectangle(0, 0, scene(painter))]
        return painter.paint(Stroke(session, version, base, whole, looks)).picture

    first = stroke("kept", 1, looks)
    assert made == [0.5] * 8
    made.clear()
    assert np.array_equal(stroke("kept", 2, looks, 1), first)
    assert made == []
    second = stroke("kept", 3, changed, 2)
    assert made == [0.75]
    assert np.array_equal(stroke("anew", 1, changed), second) and (second != first).any()
    made.clear()
    with pytest.raises(ValueError, match="seed:N or the picture:N"):
        stroke("kept", 4, [Look("seed:5", "seed:5", 0.0), *looks[1:7],
                           Look("picture:1", "seed:1", 0.0)], 3)
    assert np.array_equal(stroke("kept", 4, changed, 3), second)  # a refused one leaves no trace


def test_strokes_give_the_models_pictures(client: TestClient, painter: Painter) -> None:
    labels = scene(painter, 1)  # the first one has been painted when the server started
    found, pixels = answer(client.post("/api/paint", content=packed(head("a"), labels.tobytes())))
    assert found["version"] == 1 and found["windows"][0] > 0
    z = draw_code(painter.model, 0)
    assert np.abs(pixels.reshape(128, 128, 3).astype(int)
                  - plain(painter.model, labels, z)).max() <= 1
    part = np.full((9, 14), 5, np.uint8)
    looks = [list(look) for look in LOOKS]
    looks[2] = ["seed:7", "seed:8", 0.25]
    body = packed(head("a", 2, base=1, rectangles=[[20, 30, 9, 14]], looks=looks), part.tobytes())
    again, pixels = answer(client.post("/api/paint", content=body))
    labels = labels.copy()
    labels[20:29, 30:44] = part
    channels = painter.model.generator.class_channels(2)
    z[:, channels] = interpolate(*(draw_code(painter.model, seed)[:, channels] for seed in (7, 8)),
                                 0.25)
    assert np.abs(pixels.reshape(128, 128, 3).astype(int)
                  - plain(painter.model, labels, z)).max() <= 1
    new, kept = again["windows"]
    assert 0 < new < kept  # a small stroke keeps most
    saved = client.get("/api/save/map.png?session=a").content
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(saved))), labels)
    unchanged, same = answer(client.post("/api/paint", content=packed(
        head("a", 3, base=2, rectangles=[], looks=looks))))
    assert unchanged["windows"] == [0, new + kept] and np.array_equal(same, pixels)


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"groupdnet_scenes"}))
def test_every_family_is_painted_with(name: str) -> None:
    model = made(name)
    painter = Painter(model)
    rng = np.random.default_rng(0)
    looks = [Look("seed:0", "seed:1", 0.0)] * painter.parts
    labels = scene(painter).copy()
    z = draw_code(model, 0)
    for version in range(1, 4):
        found = painter.paint(Stroke("a", version, None, [Rectangle(0, 0, labels)], looks))
        expected = plain(model, labels, z, edges=model.preset.instance_edge)
        assert np.abs(found.picture.astype(int) - expected).max() <= 1
        labels = labels.copy()
        labels[5:20, 7:30] = rng.integers(0, model.preset.classes)


def test_random_weights_show_the_layout() -> None:
    painter = Painter(made("groupdnet_cityscapes"), random_weights=True)
    looks = [Look("seed:0", "seed:1", 0.0)] * painter.parts
    found = painter.paint(Stroke("a", 1, None, [Rectangle(0, 0, scene(painter))], looks))
    assert found.picture.std() > 10


@pytest.mark.parametrize(("changes", "size", "message"), [
    ({"version": 0}, 128 * 128, "version: expected an integer 1"),
    ({"version": True}, 128 * 128, "version: expected an integer"),
    ({"version": 1.5}, 128 * 128, "version: expected an integer"),
    ({"session": ""}, 128 * 128, "session: expected a text"),
    ({"session": "x" * 101}, 128 * 128, "session: expected a text"),
    ({"session": None}, 128 * 128, "session: expected a text"),
    ({"rectangles": []}, 0, r"rectangles: expected one of \(128, 128\)"),
    ({"rectangles": [[0, 0, 64, 128]]}, 64 * 128, r"rectangles: expected one of \(128, 128\)"),
    ({"rectangles": [[0, 0, 128]]}, 128 * 128, r"rectangles: expected \[top, left"),
    ({"rectangles": [[-1, 0, 128, 128]]}, 128 * 128, r"rectangles: expected \[top, left"),
    ({"rectangles": [[0, 0, 128, 70000]]}, 128 * 128, r"rectangles: expected \[top, left"),
    ({"rectangles": WHOLE * 65}, 128 * 128, "rectangles: expected a list of at most 64"),
    ({"rectangles": [[1, 0, 128, 128]]}, 128 * 128, "rectangles: expected them inside 128x128"),
    ({}, 128 * 128 - 1, "rectangles: expected 16384 bytes of one of 128x128, got 16383"),
    ({}, 128 * 128 + 1, "rectangles: expected 16384 bytes for all, got 16385"),
    ({"looks": LOOKS[:7]}, 128 * 128, "looks: expected 8"),
    ({"looks": [["seed:0", "seed:1", 1.5]] * 8}, 128 * 128, r"looks: expected \[source, source"),
    ({"looks": [["seed:0", "seed:1", -0.5]] * 8}, 128 * 128, r"looks: expected \[source, source"),
    ({"looks": [["seed:0", "seed:1", float("nan")]] * 8}, 128 * 128, "looks: expected"),
    ({"looks": [["seed:0", "seed:1", "0"]] * 8}, 128 * 128, r"looks: expected \[source, source"),
    ({"looks": [["seed:-1", "seed:1", 0]] * 8}, 128 * 128, "looks: expected seed:N"),
    ({"looks": [["seed:²", "seed:1", 0]] * 8}, 128 * 128, "looks: expected seed:N"),
    ({"looks": [["picture:0", "seed:1", 0]] * 8}, 128 * 128, "looks: expected seed:N"),
    ({"looks": [["../x", "seed:1", 0]] * 8}, 128 * 128, "looks: expected seed:N"),
    ({"caption": 3}, 128 * 128, "caption: expected a text"),
    ({"step": "1"}, 128 * 128, "step: expected an integer"),
])
def test_what_does_not_fit_is_one_line(client: TestClient, changes: dict[str, Any], size: int,
                                       message: str) -> None:
    response = client.post("/api/paint", content=packed(head("bad", **changes), bytes(size)))
    assert response.status_code == 400
    text = response.json()["error"]
    assert re.match(message, text), text
    assert "\n" not in text and "Traceback" not in text


@pytest.mark.parametrize("body", [
    b"", b"abc", packed(b"[]"), packed(b"{"), packed(b"\xff"), struct.pack("<I", 2**31) + b"{}",
    packed(b"[" * 50_000), packed(b"3"),
], ids=["empty", "short", "list", "cut", "no utf-8", "long head", "deep", "number"])
@pytest.mark.parametrize("path", ["/api/paint", "/api/picture"])
def test_a_body_of_another_form_is_refused(client: TestClient, path: str, body: bytes) -> None:
    response = client.post(path, content=body)
    assert response.status_code == 400
    assert response.json()["error"].startswith("body: expected 4 bytes of length")


def test_a_class_that_is_none_of_the_models(client: TestClient) -> None:
    labels = np.zeros((128, 128), np.uint8)
    labels[127, 127] = 8
    response = client.post("/api/paint", content=packed(head("bad"), labels.tobytes()))
    assert response.status_code == 400
    assert response.json()["error"] == "labels: expected classes 0..7, got 8"
    assert client.get("/api/save/map.png?session=bad").status_code == 404  # nothing was taken over


def test_bodies_are_bounded(client: TestClient) -> None:
    limit = 128 * 128 + 2**16
    response = client.post("/api/paint", content=bytes(limit + 1))
    assert response.status_code == 413 and f"at most {limit} bytes" in response.json()["error"]

    given = []

    def endless() -> Iterator[bytes]:  # without a length
        for _ in range(UPLOAD // 2**20 + 3):
            given.append(1)
            yield bytes(2**20)

    assert client.post("/api/map", content=endless()).status_code == 413


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8765",
                                  "", "localhost.evil.example", "[::1"])
def test_other_names_are_refused(client: TestClient, host: str) -> None:
    """A page elsewhere may make its name point here."""
    for path in ("/", "/api/model", "/api/scene?name=landscape_0"):
        response = client.get(path, headers={"Host": host})
        assert response.status_code == 403
        assert response.json()["error"].startswith("host: expected this server's address")


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:8765", "[::1]:8765", "192.168.0.7"])
def test_addresses_and_localhost_are_served(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"Host": host}).status_code == 200
    own = {"Host": host, "Origin": f"http://{host}"}
    assert client.get("/api/model", headers=own).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999",
                                    "https://127.0.0.1:8765", "http://127.0.0.1:8765.evil.example",
                                    "http://127.0.0.1:87650"])
def test_pages_elsewhere_are_refused(client: TestClient, origin: str) -> None:
    response = client.post("/api/paint", headers={"Origin": origin},
                           content=packed(head("evil"), bytes(128 * 128)))
    assert response.status_code == 403
    assert response.json()["error"].startswith("origin: expected http://127.0.0.1:8765")
    assert client.get("/api/save/map.png?session=evil").status_code == 404


def test_no_path_of_the_browsers_is_opened(client: TestClient) -> None:
    for path in ("/../pyproject.toml", "/page/app.js", "/app.js/../../server.py",
                 "/%2e%2e/server.py", "/session.html",
                 "/api/save/..%2f..%2fetc%2fpasswd?session=a"):
        assert client.get(path).status_code == 404, path
    response = client.get("/api/scene", params={"name": "../../etc/passwd"})
    assert response.status_code == 404
    assert response.json()["error"].startswith("scene: expected one of landscape_0, ")
    response = client.get("/api/save/x.html?session=a")
    assert response.status_code == 404


def test_versions_are_kept_in_order(client: TestClient, painter: Painter) -> None:
    labels = scene(painter)

    def post(version: int, base: int | None, value: int) -> Any:
        if base is None:
            body = packed(head("order", version), labels.tobytes())
        else:
            body = packed(head("order", version, base=base, rectangles=[[0, 0, 1, 1]]),
                          bytes([value]))
        return client.post("/api/paint", content=body)

    assert post(1, 0, 3).status_code == 409  # nothing is there yet
    assert post(2, None, 0).status_code == 200
    for version, base in ((2, 2), (1, 2), (4, 1), (4, 3)):
        response = post(version, base, 4)
        assert response.status_code == 409
        assert re.match("version|base: expected", response.json()["error"])
    assert post(5, 2, 6).status_code == 200
    assert painter.session("order").labels[0, 0] == 6
    assert painter.session("order").version == 5


def test_pages_at_once_get_their_own_pictures(client: TestClient, painter: Painter) -> None:
    """Each thread is a page with a map of its own, whose strokes come between the others'."""
    faults: list[str] = []

    def page(number: int) -> None:
        labels, rng = scene(painter, number).copy(), np.random.default_rng(number)
        looks = [[f"seed:{number}", "seed:0", 0.0]] * 8
        name, body = f"page {number}", packed(
            head(f"page {number}", looks=looks), labels.tobytes())
        for version in range(1, 5):
            _, pixels = answer(client.post("/api/paint", content=body))
            fresh = Painter(painter.model).paint(Stroke(
                "a", 1, None, [Rectangle(0, 0, labels)],
                [Look(f"seed:{number}", "seed:0", 0.0)] * 8)).picture if version == 4 else None
            if fresh is not None and np.abs(
                    pixels.reshape(fresh.shape).astype(int) - fresh).max() > 1:
                faults.append(name)
            part = np.full((10, 10), rng.integers(8), np.uint8)
            y, x = rng.integers(0, 118, 2).tolist()
            labels[y:y + 10, x:x + 10] = part
            body = packed(head(name, version + 1, base=version, looks=looks,
                               rectangles=[[y, x, 10, 10]]), part.tobytes())

    threads = [threading.Thread(target=page, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_a_failure_of_the_model_leaves_the_session(painter: Painter,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(painter)
    labels = scene(painter)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        answer(client.post("/api/paint", content=packed(head("f"), labels.tobytes())))

        def fails(*_: Any) -> None:
            raise RuntimeError("out of memory\nmany lines")

        body = packed(head("f", 2, base=1, rectangles=[[0, 0, 2, 2]]), bytes([4] * 4))
        with monkeypatch.context() as patch:
            patch.setattr(painting.Synthesizer, "sample", fails)
            response = client.post("/api/paint", content=body)
        assert response.status_code == 500
        assert response.json() == {"error": "RuntimeError: out of memory"}
        assert np.array_equal(painter.session("f").labels, labels)
        _, pixels = answer(client.post("/api/paint", content=body))
        labels = labels.copy()
        labels[:2, :2] = 4
        assert np.abs(pixels.reshape(128, 128, 3).astype(int)
                      - plain(painter.model, labels, draw_code(painter.model, 0))).max() <= 1


def test_maps_and_pictures_are_read_from_bytes(client: TestClient, painter: Painter) -> None:
    labels = scene(painter, 1)
    large = labels.repeat(2, 0).repeat(2, 1)
    assert client.post("/api/map", content=encode_png(large)).content == packed(
        {"size": [256, 256]}, labels.tobytes())
    nine, colours = np.full((4, 4), 9, np.uint8), np.zeros((4, 4, 3), np.uint8)
    for content, message in ((b"no image", "map: cannot be read as an image"),
                             (encode_png(nine), "map: expected labels 0..7"),
                             (encode_png(colours), "map: expected one index")):
        response = client.post("/api/map", content=content)
        assert response.status_code == 400
        assert response.json()["error"].startswith(message), response.text
    picture = encode_png(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8))
    named = {"session": "pictures", "name": "my.png", "bytes": len(picture)}
    response = client.post("/api/picture", content=packed(named, picture))
    assert response.status_code == 400 and "map: expected one" in response.json()["error"]
    found = client.post("/api/picture", content=packed(named, picture + encode_png(labels))).json()
    first_number = found["number"]
    assert found["present"] == np.unique(labels).tolist()
    found = client.post("/api/picture", content=packed({"session": "pictures", "sample": 1})).json()
    second_number = found["number"]
    assert first_number != second_number
    mine, drawn = f"picture:{first_number}", f"picture:{second_number}"
    looks = [[mine, drawn, 0.5]] * 8
    first = answer(client.post("/api/paint", content=packed(head("pictures", looks=looks),
                                                            labels.tobytes())))[1]
    looks = [[drawn, mine, 0.5]] * 7 + [["seed:0", mine, 0.5]]
    second = answer(client.post("/api/paint", content=packed(
        head("pictures", 2, base=1, rectangles=[], looks=looks))))[1]
    assert not np.array_equal(first, second)
    response = client.post("/api/picture", content=packed(named | {"bytes": len(picture) + 1},
                                                          picture))
    assert response.status_code == 400 and "bytes: expected" in response.json()["error"]


def test_a_marked_picture_lies_as_its_map(painter: Painter) -> None:
    """A map that was drawn on the pixels as stored, beside a picture that is shown turned."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    for turned, shape in ((pixels, (64, 128)), (np.rot90(pixels, -1), (128, 64))):
        _, found = painter.add_picture("marked", "a.png", buffer.getvalue(),
                                       encode_png(np.zeros(shape, np.uint8)))
        np.testing.assert_array_equal(found.picture, resize_picture(turned, painter.size))


def test_pictures_of_huge_size_are_refused(client: TestClient,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painting, "PIXELS", 1000)
    response = client.post("/api/map", content=encode_png(np.zeros((40, 40), np.uint8)))
    assert response.status_code == 400 and "at most 1000 pixels" in response.json()["error"]


def test_the_page_is_told_of_the_model(client: TestClient, painter: Painter,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(painter.scenes) == 8
    monkeypatch.setattr(painter, "seed", 5)
    found = client.get("/api/model").json()
    names = ["sky", "mountain", "water", "ground", "building", "tree", "car", "person"]
    assert [shown["name"] for shown in found.pop("classes")] == names
    assert found.pop("scenes") == [f"landscape_{k}" for k in range(8)]
    assert found == {
        "name": "groupdnet_scenes", "size": [128, 128], "weights": "random", "random": False,
        "version": smis_kernels.__version__, "parts": 8, "encodes": True, "samples": True,
        "edges": False, "seed": 5}


def test_unknown_pixels_of_a_map_become_dont_care() -> None:
    own = Painter(create_model("groupdnet_scenes", ngf=8, nef=8, dont_care=7).eval())
    file = io.BytesIO()
    Image.new("L", (32, 16), 255).save(file, "PNG")
    labels, size = own.read_map(file.getvalue())
    assert size == (16, 32) and bool((labels == 7).all())


def test_the_page_is_told_how_long_it_took(client: TestClient, painter: Painter,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0, 0.25)
    monkeypatch.setattr(painting, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    found, _ = answer(client.post("/api/paint", content=packed(
        head("clock"), scene(painter).tobytes())))
    assert found["milliseconds"] == 250


def test_pictures_of_a_session_are_bounded(
        painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painting, "PICTURES", 2)
    for number in range(2):
        assert painter.add_sample("looks", number)[1].name == f"sample {number + 1}"
    with pytest.raises(ValueError, match="picture: expected at most 2 in a session"):
        painter.add_sample("looks", 2)
    assert len(painter.session("looks").appearances) == 2


def test_sessions_and_steps_are_bounded(painter: Painter) -> None:
    labels = scene(painter)
    looks = [Look("seed:0", "seed:1", 0.0)] * 8
    for version in range(1, painting.STEPS + 5):
        painter.paint(Stroke("many", version, None, [Rectangle(0, 0, labels)], looks,
                             (version // 2, str(version))))
    steps = painter.session("many").steps
    assert len(steps) <= painting.STEPS
    assert [s.number for s in steps] == sorted({s.number for s in steps})  # one picture a step
    for k in range(painting.SESSIONS):
        painter.session(f"other {k}")
    assert painter.session("many").labels is None  # forgotten
    for k in range(painting.SESSIONS):
        painter.session(f"page {k}")
    first = painter.session("page 0")  # which speaks again
    painter.session("new")
    assert painter.known("page 0") is first and painter.known("page 1") is None
    with pytest.raises(StaleError, match="send the whole map"):
        painter.paint(Stroke("many", 99, 98, [], looks))


def test_the_report_has_no_links(client: TestClient, painter: Painter) -> None:
    caption = "<script>alert(1)</script>"
    labels = scene(painter)
    answer(client.post("/api/paint", content=packed(head("r", caption=caption), labels.tobytes())))
    response = client.get("/api/save/session.html?session=r")
    assert response.status_code == 200 and "attachment" in response.headers["content-disposition"]
    text = response.text
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search(r"<script|<a |<link|<iframe|href=|url\(|src=\"(?!data:)", text)
    kept = list(painter._sessions)
    for k in range(20):  # as any page's <img src> may ask
        assert client.get(f"/api/save/session.html?session=nobody{k}").status_code == 404
    assert list(painter._sessions) == kept


def test_the_report_shows_each_map_beside_its_picture(painter: Painter) -> None:
    looks, maps = [Look("seed:0", "seed:1", 0.0)] * 8, [scene(painter, k) for k in (0, 1)]
    for k, labels in enumerate(maps):
        painter.paint(Stroke("two", k + 1, None, [Rectangle(0, 0, labels)], looks,
                             (k, f"step {k}")))
    session = painter.session("two")
    text = report(painter, session, "weights")
    assert [step.caption for step in session.steps] == ["step 0", "step 1"]
    assert text.index("step 1") < text.index("step 0")  # the last step first
    places = [text.index(data_uri(shown)) for step in reversed(session.steps)
              for shown in (painter.colours[step.labels], step.picture)]
    assert places == sorted(places)


def test_the_page_asks_for_nothing_elsewhere(client: TestClient) -> None:
    for path in ("/", "/app.js", "/style.css"):
        response = client.get(path)
        assert not re.search(r"https?://|url\(|@import", response.text), path
        assert response.headers["content-security-policy"].startswith("default-src 'self'")
        assert response.headers["cache-control"] == "no-store"


def test_models_that_cannot_be_painted_with_are_refused() -> None:
    with pytest.raises(ValueError, match="reads instance features"):
        Painter(create_model("pix2pixhd_cityscapes_features", ngf=4, image_size=(64, 128)).eval())
    painter = Painter(made("spade_ade20k"))
    assert painter.parts == 0 and not painter.encodes
    with pytest.raises(ValueError, match="sample: expected a model of landscapes"):
        painter.add_sample("a", 0)
    with pytest.raises(ValueError, match="has no encoder here"):
        painter.add_picture("a", "x.png", encode_png(np.zeros((64, 64, 3), np.uint8)),
                            encode_png(np.zeros((64, 64), np.uint8)))


def test_answers_do_not_wait_for_acknowledgements() -> None:
    with listen("127.0.0.1", 0) as bound, socket.create_connection(bound.getsockname()):
        accepted, _ = bound.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_seed_of_the_command_is_the_painters(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def refused(model: Any, **given: Any) -> None:
        asked.update(given, model=model)
        raise ValueError("enough")

    monkeypatch.setattr(painting, "Painter", refused)
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)
    monkeypatch.setattr("sys.argv", ["smis", "paint", "--port", "0", "--seed", "11"])
    with pytest.raises(SystemExit):
        cli.main()
    assert (asked["seed"], asked["random_weights"]) == (11, False)


def test_a_port_in_use_is_one_line() -> None:
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        command = [sys.executable, "-m", "smis_models.cli", "paint", "--port", str(port)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 2
    assert found.stderr.startswith(f"error: host, port: 127.0.0.1:{port} cannot be listened on")
    assert found.stderr.count("\n") == 1
