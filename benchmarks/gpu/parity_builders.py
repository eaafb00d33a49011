"""The builders of tests/parity_builders.py with networks and ops on the GPU, for the checker."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.parity_builders import BUILDERS as ON_CPU

DEVICE = os.environ["SMIS_PARITY_DEVICE"]
GOLDEN = Path(os.environ["SMIS_PARITY"], "golden")
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def _place(value: Any, device: str) -> Any:
    """Tensors in nested containers, on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _place(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_place(v, device) for v in value)
    return value


def _network(config: str, build: Callable[..., Any]) -> Callable[..., Any]:
    def builder(spec: Any) -> tuple[nn.Module, Callable[..., Any]]:
        built = build(spec)
        network, call = built if isinstance(built, tuple) else (built, None)

        def run(network: nn.Module, inputs: dict[str, Tensor]) -> Any:
            placed = _place(inputs, DEVICE)
            if call is not None:
                return _place(call(network, placed), "cpu")
            with np.load(GOLDEN / f"{config}.npz") as golden:
                order = json.loads(str(golden["meta"]))["call"]
            return _place(network(*(placed[name] for name in order)), "cpu")

        return network.to(DEVICE), run

    return builder


def _ops(build: Callable[..., Any]) -> Callable[..., Any]:
    def one(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: _place(function(*_place(args, DEVICE)), "cpu")

    return lambda spec: {name: one(function) for name, function in build(spec).items()}


BUILDERS = {
    config: _ops(build) if config.startswith("ops_") else _network(config, build)
    for config, build in ON_CPU.items()
}
