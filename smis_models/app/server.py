"""The server of the page: what may be asked, how it is checked, and how it is answered."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from importlib import resources
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import smis_kernels

from ..io.images import data_uri, encode_png
from .painter import Look, Painter, Rectangle, StaleError, Stroke
from .report import report

UPLOAD = 32 * 2**20  # bytes of a picture with its map, at most
_HEAD = 64 * 2**10  # bytes of what goes with a map

_log = logging.getLogger(__name__)
_FILES = {"/": ("index.html", "text/html"), "/app.js": ("app.js", "text/javascript"),
          "/style.css": ("style.css", "text/css")}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; "
                               "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

T = TypeVar("T")


class _TooLargeError(ValueError):
    """A body beyond what its kind may have."""


def _is_local(host: str, names: frozenset[str]) -> bool:
    """Whether a Host header is this server's: an address, "localhost", or the name it was given.

    A page elsewhere whose name is made to point here (DNS rebinding) comes under that name.
    """
    with suppress(ValueError):
        name = urlsplit(f"//{host}").hostname
        return name is not None and (name in names or bool(ipaddress.ip_address(name)))
    return False


class _OwnPagesOnly:
    """Refuses what comes under another host's name or from another host's page."""

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Request(scope).headers
            host, origin = headers.get("host", ""), headers.get("origin")
            reason = None
            if not _is_local(host, self._names):
                reason = f"host: expected this server's address, got {host!r}"
            elif origin is not None and origin != f"http://{host}":
                reason = f"origin: expected http://{host}, got {origin!r}"
            if reason is not None:
                await _error(403, reason)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status, headers=_HEADERS)


async def _body(request: Request, limit: int) -> bytes:
    """The body, never more than ``limit`` bytes of it in memory."""
    stated = request.headers.get("content-length", "")
    size, parts = 0, []
    if not (stated.isdecimal() and int(stated) > limit):
        async for part in request.stream():
            size += len(part)
            if size > limit:
                break
            parts.append(part)
        else:
            return b"".join(parts)
    raise _TooLargeError(f"body: expected at most {limit} bytes, got more")


def _unpacked(body: bytes) -> tuple[dict[str, Any], bytes]:
    """A head, in JSON, and the bytes after it: the head's length stands first, as 4 bytes."""
    if len(body) >= 4:
        (length,) = struct.unpack_from("<I", body)
        try:
            head = json.loads(body[4:4 + length])
        except (ValueError, RecursionError):
            head = None
        if isinstance(head, dict) and 4 + length <= len(body):
            return head, body[4 + length:]
    raise ValueError("body: expected 4 bytes of length, a head in JSON and bytes, got something "
                     "else; reload the page")


def _packed(head: Mapping[str, Any], content: bytes) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<I", len(text)) + text + content


def _integer(head: Mapping[str, Any], name: str, least: int = 0, most: int = 2**53) -> int:
    value = head.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: expected an integer {least}..{most}, got {value!r:.80}")
    return value


def _text(head: Mapping[str, Any], name: str, most: int = 100) -> str:
    value = head.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= most:
        raise ValueError(f"{name}: expected a text of 1..{most} characters, got {value!r:.80}")
    return value


def _list(head: Mapping[str, Any], name: str, most: int) -> list[Any]:
    value = head.get(name)
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"{name}: expected a list of at most {most}, got {value!r:.80}")
    return value


def _look(value: Any) -> Look:
    if (isinstance(value, list) and len(value) == 3 and isinstance(value[0], str)
            and isinstance(value[1], str) and type(value[2]) in (int, float)
            and 0 <= value[2] <= 1):
        return Look(value[0], value[1], float(value[2]))
    raise ValueError(f"looks: expected [source, source, 0..1] each, got {value!r:.80}")


def _rectangles(values: list[Any], pixels: bytes) -> list[Rectangle]:
    found, start = [], 0
    for value in values:
        if not (isinstance(value, list) and len(value) == 4
                and all(type(n) is int and 0 <= n < 2**16 for n in value)):
            raise ValueError("rectangles: expected [top, left, height, width] each, got "
                             f"{value!r:.80}")
        top, left, height, width = value
        part = np.frombuffer(pixels[start:start + height * width], np.uint8)
        if len(part) != height * width:
            raise ValueError(f"rectangles: expected {height * width} bytes of one of "
                             f"{height}x{width}, got {len(part)}")
        found.append(Rectangle(top, left, part.reshape(height, width)))
        start += height * width
    if start != len(pixels):
        raise ValueError(f"rectangles: expected {start} bytes for all, got {len(pixels)}")
    return found


def read_stroke(body: bytes) -> Stroke:
    """A stroke as the page sends it: a head, and the classes of each rectangle, a byte a pixel.

    Raises:
        ValueError: anything else; the message names what.
    """
    head, pixels = _unpacked(body)
    base = None if head.get("base") is None else _integer(head, "base")
    caption = head.get("caption", "")
    if not isinstance(caption, str) or len(caption) > 100:
        raise ValueError(f"caption: expected a text, got {caption!r:.80}")
    return Stroke(
        _text(head, "session"), _integer(head, "version", 1), base,
        _rectangles(_list(head, "rectangles", 64), pixels),
        [_look(value) for value in _list(head, "looks", 256)],
        (_integer(head, "step"), caption),
    )


Endpoint = Callable[[Request], Awaitable[Response]]


def _answering(endpoint: Endpoint) -> Endpoint:
    """Every error as one line of JSON, which the page shows."""
    async def answer(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except _TooLargeError as error:
            return _error(413, str(error))
        except StaleError as error:
            return _error(409, str(error))
        except LookupError as error:
            return _error(404, str(error.args[0] if error.args else error))
        except (ValueError, OSError) as error:
            return _error(400, str(error))
        except ClientDisconnect:
            return _error(400, "body: expected a whole one, got a part")
        except Exception as error:
            _log.exception("%s failed", request.url.path)
            return _error(500, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        response.headers.update(_HEADERS)
        return response

    return answer


class Pages:
    """What the routes answer. The model works in one thread, in the order of what was asked."""

    def __init__(self, painter: Painter, weights: str) -> None:
        self._painter, self._weights = painter, weights
        self._worker = ThreadPoolExecutor(1, "painter")
        height, width = painter.size
        self._stroke_limit = height * width + _HEAD
        page = resources.files("smis_models.app") / "page"
        self._files = {path: ((page / name).read_bytes(), kind)
                       for path, (name, kind) in _FILES.items()}

    async def _in_turn(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._worker, function, *arguments)

    async def file(self, request: Request) -> Response:
        content, kind = self._files[request.url.path]  # none but those that are routes
        return Response(content, media_type=kind)

    async def model(self, request: Request) -> Response:
        return JSONResponse(await self._in_turn(self._model))

    def _model(self) -> dict[str, Any]:
        painter = self._painter
        return {
            "name": painter.model.name, "size": painter.size, "weights": self._weights,
            "random": painter.random_weights, "version": smis_kernels.__version__,
            "classes": [{"name": name, "colour": colour.tolist()} for name, colour in
                        zip(painter.class_names, painter.colours, strict=True)],
            "parts": painter.parts, "encodes": painter.encodes,
            "samples": painter.encodes and painter.landscapes, "scenes": list(painter.scenes),
            "edges": painter.preset.instance_edge, "seed": painter.seed,
        }

    async def scene(self, request: Request) -> Response:
        labels = await self._in_turn(self._painter.scene, request.query_params.get("name", ""))
        return Response(labels.tobytes(), media_type="application/octet-stream")

    async def map(self, request: Request) -> Response:
        content = await _body(request, UPLOAD)
        labels, size = await self._in_turn(self._painter.read_map, content)
        return Response(_packed({"size": size}, labels.tobytes()),
                        media_type="application/octet-stream")

    async def paint(self, request: Request) -> Response:
        stroke = read_stroke(await _body(request, self._stroke_limit))
        found = await self._in_turn(self._painter.paint, stroke)
        head = {"version": found.version, "milliseconds": round(found.seconds * 1e3, 2),
                "windows": found.windows}
        return Response(_packed(head, found.picture.tobytes()),
                        media_type="application/octet-stream")

    async def picture(self, request: Request) -> Response:
        """A picture whose looks are to be taken: sent, with or without its map, or a sample."""
        head, content = _unpacked(await _body(request, UPLOAD))
        session = _text(head, "session")
        if "sample" in head:
            added = self._in_turn(self._painter.add_sample, session,
                                  _integer(head, "sample", 0, 10**6))
        else:
            size = _integer(head, "bytes", 1, len(content))
            added = self._in_turn(self._painter.add_picture, session, _text(head, "name"),
                                  content[:size], content[size:] or None)
        number, found = await added
        return JSONResponse({"number": number, "name": found.name, "present": found.present,
                             "picture": data_uri(found.picture)})

    async def save(self, request: Request) -> Response:
        """The session's picture, its map or its report, as a file."""
        kind = request.path_params["kind"]
        content, media = await self._in_turn(
            self._saved, kind, _text(dict(request.query_params), "session"))
        return Response(content, media_type=media, headers={
            "Content-Disposition": f'attachment; filename="{kind}"'})

    def _saved(self, kind: str, name: str) -> tuple[bytes, str]:
        session = self._painter.known(name)
        if session is None or not session.steps:
            raise LookupError("session: expected one with a picture, got none; draw, then save")
        last = session.steps[-1]
        if kind == "picture.png":
            return encode_png(last.picture), "image/png"
        if kind == "map.png":
            return encode_png(last.labels), "image/png"
        if kind == "session.html":
            return report(self._painter, session, self._weights).encode(), "text/html"
        raise LookupError(f"file: expected picture.png, map.png or session.html, got {kind!r:.80}")

    def routes(self) -> list[Route]:
        return [
            *(Route(path, _answering(self.file)) for path in _FILES),
            Route("/api/model", _answering(self.model)),
            Route("/api/scene", _answering(self.scene)),
            Route("/api/save/{kind}", _answering(self.save)),
            *(Route(f"/api/{name}", _answering(endpoint), methods=["POST"]) for name, endpoint in (
                ("map", self.map), ("paint", self.paint), ("picture", self.picture))),
        ]

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> Any:
        warm = self._worker.submit(self._painter.warm_up)
        warm.add_done_callback(_complain)
        yield
        self._worker.shutdown(wait=False, cancel_futures=True)


def _complain(done: Any) -> None:
    if not done.cancelled() and done.exception() is not None:
        _log.error("the first picture failed: %s", done.exception())


def create_app(painter: Painter, *, weights: str = "", host: str = "127.0.0.1") -> Starlette:
    """The page as an ASGI application.

    Args:
        painter: what paints.
        weights: where the model's come from, for the page.
        host: what the server is bound to: a Host header may give that name, "localhost" or an
            address, no other name.
    """
    pages = Pages(painter, weights)
    names = frozenset({"localhost", host.lower()})
    return Starlette(routes=pages.routes(), lifespan=pages.lifespan,
                     middleware=[Middleware(_OwnPagesOnly, names=names)])


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; port 0 takes a free one.

    Raises:
        ValueError: an address that is not this machine's, or a port in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"host, port: {host}:{port} cannot be listened on ({error.strerror}); "
                         "choose another --port (0: any that is free)") from error
    # Else a picture waits 40 ms for the acknowledgement of its head; asyncio sees to it only on
    # sockets that it made.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return bound


def serve(app: Starlette, bound: socket.socket) -> None:
    """Answer until Ctrl-C."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1,
                            limit_concurrency=32)
    with suppress(KeyboardInterrupt):  # which uvicorn raises once more when it has shut down
        uvicorn.Server(config).run(sockets=[bound])
