"""``smis paint``."""

from __future__ import annotations

import ipaddress
import webbrowser
from typing import Annotated

import typer

from ..io.extras import cure
from .common import (
    Backend,
    Checkpoint,
    Device,
    Model,
    Seed,
    chosen,
    command,
    console,
    selected,
)


@command()
def paint(
    model: Model = None, checkpoint: Checkpoint = None,
    host: Annotated[str, typer.Option(help="address to listen on; others than 127.0.0.1 let other "
                                           "machines paint")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free", min=0, max=65535)] = 8765,
    open_browser: Annotated[bool, typer.Option("--open", help="open it in a browser")] = False,
    seed: Seed = 0, backend: Backend = None, device: Device = "cpu",
) -> None:
    """Paint label maps in the browser and see their pictures as you draw."""
    try:
        from ..app.painter import Painter
        from ..app.server import create_app, listen, serve
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name}: smis paint needs it; {cure('app')}"
                                  ) from error
    which = chosen(model, checkpoint, device, seed, default="groupdnet_scenes")
    with listen(host, port) as bound, selected(backend):
        network = which.load()
        painter = Painter(network, random_weights=which.checkpoint is None, seed=seed)
        address = f"http://{_reachable(host)}:{bound.getsockname()[1]}/"
        console.print(f"{network.name} paints at {address} (Ctrl-C ends it)", soft_wrap=True,
                      highlight=False)
        if open_browser:
            webbrowser.open(address)
        serve(create_app(painter, weights=which.weights, host=host), bound)


def _reachable(host: str) -> str:
    """What to call a host that is listened on, in an address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "localhost"
    return f"[{host}]" if address.version == 6 else host
