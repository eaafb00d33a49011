"""The weights that ship with the package."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "weights"


def shipped_weights(name: str) -> Path | None:
    """The file with the shipped weights of a model of the zoo; None where none ship.

    Example:
        >>> model = create_model(checkpoint=shipped_weights("groupdnet_scenes")).eval()
    """
    path = _FOLDER / f"{name}.safetensors"
    return path if path.is_file() else None
