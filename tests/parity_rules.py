"""Weights and inputs by rule, so that parity tests need no weight files.

Every array comes from ``RandomState(crc32(name) & 0x7fffffff)``: weights are named by their
state-dict key, inputs ``<config>/<input>``, loss cotangents ``<config>/cot/<index>``.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def stream(name: str) -> np.random.RandomState:
    """The random numbers that belong to a name."""
    return np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)


def _entry(key: str, shape: tuple[int, ...]) -> np.ndarray:
    numbers, leaf = stream(key), key.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.ones(shape)
    if leaf == "running_var":
        return 0.5 + numbers.uniform(0, 1, shape)
    drawn = numbers.standard_normal(shape)
    if leaf == "weight" and len(shape) == 1:  # of a batch norm
        return 1 + 0.1 * drawn
    if leaf in ("weight", "weight_orig"):
        return drawn / np.sqrt(np.prod(shape[1:]))
    if leaf == "weight_u":
        return drawn / np.linalg.norm(drawn)
    assert leaf in ("bias", "running_mean"), key
    return 0.1 * drawn


def fill(module: nn.Module, gains: dict[str, float]) -> None:
    """Load the weights that the module's keys and shapes mean, rounded to fp32."""
    state: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        if not key.endswith(".weight_v"):
            values = gains.get(key, 1.0) * _entry(key, tuple(tensor.shape))
            state[key] = torch.from_numpy(np.asarray(values, np.float32)).to(tensor.dtype)
    for key in [key for key in state if key.endswith(".weight_u")]:
        # v follows from W and u: drawn apart, sigma would be near zero.
        stem = key.removesuffix("_u")
        weight = state[stem + "_orig"].double().flatten(1)
        v = weight.T @ state[key].double()
        state[stem + "_v"] = (v / v.norm()).float()
    module.load_state_dict({k: v.to(module.state_dict()[k].dtype) for k, v in state.items()})


def _cells(name: str, h: int, w: int, cells: int) -> tuple[np.ndarray, np.random.RandomState]:
    """The Voronoi cell of every pixel, and the numbers that the points were drawn from."""
    numbers = stream(name)
    ys, xs = (numbers.randint(0, size, cells) for size in (h, w))
    rows, columns = np.arange(h)[:, None, None], np.arange(w)[None, :, None]
    return ((rows - ys) ** 2 + (columns - xs) ** 2).argmin(2), numbers


def _instances(name: str, recipe: dict[str, Any]) -> np.ndarray:
    """Voronoi cells of the ids that the recipe lists for each image."""
    out = np.empty((recipe["B"], 1, recipe["H"], recipe["W"]), np.int64)
    for b in range(recipe["B"]):
        cell, _ = _cells(f"{name}/{b}", recipe["H"], recipe["W"], recipe["cells"])
        ids = np.asarray(recipe["ids"][b % len(recipe["ids"])])
        out[b, 0] = ids[cell % len(ids)]
    return out


def _semantics(name: str, recipe: dict[str, Any]) -> np.ndarray:
    """Voronoi cells of random classes as one-hot planes, and the edges between instances."""
    n, h, w, classes = (recipe[k] for k in ("B", "H", "W", "nc"))
    out = np.zeros((n, classes + recipe["edge"], h, w), np.float32)
    for b in range(n):
        cell, numbers = _cells(f"{name}/{b}", h, w, recipe["cells"])
        labels = numbers.randint(0, classes, recipe["cells"])
        np.put_along_axis(out[b, :classes], labels[cell][None], 1.0, axis=0)
        if recipe["edge"]:
            ids = np.where(labels >= 24, 1000 * labels + np.arange(recipe["cells"]), labels)[cell]
            for axis in (0, 1):
                differs = np.diff(ids, axis=axis) != 0
                last = out[b, -1] if axis == 0 else out[b, -1].T
                differs = differs if axis == 0 else differs.T
                last[1:][differs] = 1
                last[:-1][differs] = 1
    return out


def make_input(name: str, recipe: dict[str, Any]) -> np.ndarray:
    """One input from its recipe: fp32, instance ids int64."""
    kind = recipe["recipe"]
    if kind == "normal":
        return stream(name).standard_normal(recipe["shape"]).astype(np.float32)
    if kind == "semantics":
        return _semantics(name, recipe)
    if kind == "inst_ids":
        return _instances(name, recipe)
    if kind == "concat":
        parts = [make_input(f"{name}/{i}", part) for i, part in enumerate(recipe["parts"])]
        return np.concatenate(parts, 1)
    assert kind in ("uniform", "classwise"), kind
    out = stream(name).uniform(-1, 1, recipe["shape"]).astype(np.float32)
    if kind == "classwise":  # some classes are absent
        for b in range(out.shape[0]):
            for c in range(out.shape[1] // 3):
                if (b + c) % 3 == 2:
                    out[b, 3 * c : 3 * c + 3] = 0
    return out


def cotangent(config: str, index: int, shape: torch.Size) -> Tensor:
    """What output ``index`` is multiplied with before the sum that is differentiated."""
    return torch.from_numpy(stream(f"{config}/cot/{index}").standard_normal(tuple(shape)))


def fingerprint(module: nn.Module) -> list[int]:
    """Entries, parameters, and a checksum of all keys and shapes."""
    state = module.state_dict()
    text = "\n".join(f"{key} {list(state[key].shape)}" for key in sorted(state))
    return [len(state), sum(p.numel() for p in module.parameters()), zlib.crc32(text.encode())]
