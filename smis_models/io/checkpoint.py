"""Checkpoints: official ``.pth`` files and safetensors; strict, and no code in them is run."""

from __future__ import annotations

import pickle
import pickletools
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import replacing
from .state_dict_keys import PART_NAMES, networks_keys
from .state_dict_keys import State as State

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # of a run's folder, and of the hub's
_IMAGES = {b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image", b"GIF8": "a GIF image",
           b"BM": "a BMP image", b"RIFF": "a WebP image"}
_CHECKPOINTS = (b"PK", b"\x80")  # what torch.save writes: a zip file, once a pickle


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or is of another model; the message is one line."""


def read_checkpoint(path: str | Path) -> State:
    """The tensors of a ``.pth`` or ``.safetensors`` file, on the CPU, by their keys.

    A ``.pth`` file is read with ``weights_only=True``: code in it is refused, never run. A dict
    around the state dict is opened (``state_dict``, ``model``, ``net_G``, ...), and keys that older
    and newer PyTorch wrote become the networks' own (prefixes of ``DataParallel``, spectral norm).

    Raises:
        CheckpointError: no file, an image or other content, truncated, pickled code, no tensors.

    Example:
        >>> torch.save({"module.weight": torch.ones(2)}, "latest_net_G.pth")
        >>> list(read_checkpoint("latest_net_G.pth"))
        ['weight']
    """
    path = Path(path)
    head = _head(path)
    state = _read_safetensors(path, head)[0] if _is_safetensors(path, head) else (
        _read_torch(path, head))
    if not state:
        raise CheckpointError(f"checkpoint: {path} holds no tensors; save module.state_dict()")
    return networks_keys(state)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text that a ``.safetensors`` file holds beside its tensors.

    Raises:
        CheckpointError: as :func:`read_checkpoint`.
    """
    path = Path(path)
    return _read_safetensors(path, _head(path), tensors=False)[1]


def holds_text(path: str | Path) -> bool:
    """Whether a path is a safetensors file, whatever its name: :func:`read_metadata` reads it."""
    path = Path(path)
    return path.is_file() and _is_safetensors(path, _head(path))


def _is_safetensors(path: Path, head: bytes) -> bool:
    """By the content, which hubs and tools name .bin or .ckpt too; else by the name."""
    if head.startswith(_CHECKPOINTS) and head[8:9] != b"{":
        return False
    return head[8:9] == b"{" or path.suffix == ".safetensors"


def _head(path: Path) -> bytes:
    """The first bytes of a checkpoint."""
    if not path.is_file():
        kind = "is a directory" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint: expected a .pth or .safetensors file; {path} {kind}")
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read: {error.strerror}") from error


def _read_safetensors(path: Path, head: bytes,
                      tensors: bool = True) -> tuple[State, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            keys = file.keys() if tensors else []
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"checkpoint: {path} is no complete safetensors file: {_looks_like(head, error)}"
        ) from error


def _read_torch(path: Path, head: bytes) -> State:
    try:
        # A file, not a path: whose ending alone makes torch read safetensors.
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; the error says what matters
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the parser raises many kinds on damaged bytes
        if isinstance(error, pickle.UnpicklingError) and (
                " GLOBAL " in str(error) or _names_code(path)):
            raise CheckpointError(
                f"checkpoint: {path} holds pickled code, which is never run; expected a plain "
                "state dict: save module.state_dict() instead of the module"
            ) from error
        raise CheckpointError(
            f"checkpoint: {path} is no complete PyTorch checkpoint: {_looks_like(head, error)}"
        ) from error
    if isinstance(state, Mapping) and {"format", "config", "place"} <= state.keys():
        raise CheckpointError(f"checkpoint: {path} is the state that smis train goes on from; give "
                              "its folder, whose model.safetensors are the weights")
    return _unwrapped(state, path)


def _names_code(path: Path) -> bool:
    """Whether a file is a whole pickle that names functions or classes."""
    try:
        with path.open("rb") as file:
            found = {opcode.name for opcode, _, _ in pickletools.genops(file)}
    except Exception:  # no pickle, or a damaged one
        return False
    return bool(found & {"GLOBAL", "STACK_GLOBAL", "INST"})


# Names under which training codes keep a network in a dict: one network, or those of a GAN.
_WHOLE = ("state_dict", "model_state_dict", "model", "params", "weights")


def _part_named(key: Any) -> str | None:
    """The network that a dict's key means: ``G``, ``generator_state_dict``, ``state_dict_G``."""
    if not isinstance(key, str):
        return None
    return PART_NAMES.get(key.removesuffix("_state_dict").removeprefix("state_dict_"))


def _unwrapped(content: Any, path: Path) -> State:
    """The tensors by their keys, from a state dict or a dict that holds one or one a network."""
    while True:
        if not isinstance(content, Mapping):
            raise CheckpointError(f"checkpoint: expected a plain state dict (name -> tensor) in "
                                  f"{path}, got {type(content).__name__}; save module.state_dict()")
        other = [key for key, value in content.items()
                 if not (isinstance(key, str) and isinstance(value, Tensor))]
        if not other:
            return dict(content)
        mappings = [key for key in other if isinstance(content[key], Mapping) and content[key]]
        whole = [key for key in mappings if key in _WHOLE]
        parts = {key: part for key in mappings if (part := _part_named(key)) is not None}
        averages = [key for key in mappings if isinstance(key, str) and "ema" in key.lower()]
        found = whole or parts
        twice = len(set(parts.values())) < len(parts)
        if not found or len(whole) > 1 or averages or twice:
            break
        if whole:
            content = content[whole[0]]
        else:
            return {f"{part}.{name}": tensor for key, part in parts.items()
                    for name, tensor in _unwrapped(content[key], path).items()}
    several = [*whole, *parts, *averages]
    if len(several) > 1:
        raise CheckpointError(f"checkpoint: expected one network in {path}, got "
                              f"{', '.join(map(repr, several))}; save the one that is meant")
    bad = content[other[0]]
    raise CheckpointError(
        f"checkpoint: expected a plain state dict (name -> tensor) in {path}, got "
        f"{type(bad).__name__} under the key {other[0]!r}; save module.state_dict()"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _looks_like(head: bytes, error: Exception) -> str:
    for magic, name in _IMAGES.items():
        if head.startswith(magic):
            return f"it looks like {name}"
    if not head:
        return "it is empty"
    if head.startswith(_CHECKPOINTS) or head[8:9] == b"{":  # safetensors: a length, then JSON
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({_first_line(error)})"
        return f"it is truncated or damaged{reason}; copy or save it again"
    return "it is some other kind of file"


def _examples(keys: Iterable[str]) -> str:
    return ", ".join(list(keys)[:2])


def mismatch(module: nn.Module, state: Mapping[str, Tensor]) -> str:
    """How ``state`` differs from the module's keys and shapes, in a few words; empty: it fits."""
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    parts = []
    if missing:
        parts.append(f"{len(missing)} keys missing ({_examples(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_examples(unexpected)})")
    if shapes:
        key = shapes[0]
        parts.append(
            f"{len(shapes)} of another shape ({key}: expected {tuple(own[key].shape)}, "
            f"got {tuple(state[key].shape)})"
        )
    return ", ".join(parts)


def load_state(module: nn.Module, state: Mapping[str, Tensor], *, source: str | Path, model: str,
               fits: Callable[[Mapping[str, Tensor]], str | None] = lambda state: None) -> None:
    """Load ``state`` strictly into ``module``, whose tensors may still be on the meta device.

    The tensors are taken over, not copied. ``num_batches_tracked``, which old files lack and which
    nothing reads, starts at zero. ``fits`` names the model that a state dict belongs to.

    Raises:
        CheckpointError: missing, unexpected or misshapen entries: how many, with two examples;
            integers or complex numbers where floats belong.
    """
    own = module.state_dict()
    filled = {**state, **{
        key: torch.zeros((), dtype=torch.long) for key in own
        if key.endswith(".num_batches_tracked") and key not in state
    }}
    difference = mismatch(module, filled)
    if difference:
        if set(own) <= set(filled) and all(own[k].shape == filled[k].shape for k in own):
            raise CheckpointError(f"checkpoint: {source} is not {model} alone: {difference}; all "
                                  "else fits: save it without them")
        other = fits(state)
        hint = f"it fits {other}" if other else "it fits no listed model with published options"
        raise CheckpointError(f"checkpoint: {source} is not {model}: {difference}; {hint}")
    for key, tensor in own.items():
        found = filled[key]
        if not tensor.is_floating_point():  # a counter, which `half()` of all tensors cast too
            filled[key] = found.to(tensor.dtype)
        elif not found.is_floating_point():
            raise CheckpointError(f"checkpoint: expected floats under {key!r} in {source}, got "
                                  f"{found.dtype}; save the weights as they were trained")
    module.load_state_dict(filled, strict=True, assign=True)


def save_checkpoint(module: nn.Module, path: str | Path,
                    notes: Mapping[str, str] | None = None) -> None:
    """Write the module's state dict as safetensors: the whole file or none.

    A model of the zoo is written with its configuration, so that
    ``create_model(checkpoint=path)`` makes it again; ``notes`` stand beside it in the metadata.

    Raises:
        CheckpointError: the name does not end in ``.safetensors``, or the folder is not writable.

    Example:
        >>> from smis_models import create_model
        >>> model = create_model("groupdnet_scenes", ngf=8, nef=8)
        >>> _ = save_checkpoint(model, "groupdnet.safetensors")
        >>> model = create_model(checkpoint="groupdnet.safetensors")
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"path: expected a name ending in .safetensors, got {path.name!r}")
    state = {
        key: tensor.detach().cpu().contiguous() for key, tensor in module.state_dict().items()
    }
    configuration = getattr(module, "configuration", None)
    metadata = {**(notes or {}), **({} if configuration is None else configuration.to_metadata())}
    try:
        with replacing(path, sync=True) as partial:
            save_file(state, partial, metadata or None)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"path: {path} cannot be written: {_first_line(error)}"
        ) from error
