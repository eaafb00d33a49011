"""Modules at the root of 0.1 import by their old names; a warning says where they stand now."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = "smis_models"
# Old module: the modules that hold its names now, in the order in which they are asked.
MOVED = {
    "animation": ("io.animation", "synthesis.export"),
    "applications": ("synthesis.applications",),
    "bicyclegan": ("families.bicyclegan",),
    "blocks": ("networks.blocks",),
    "ccfpse": ("families.ccfpse",),
    "checkpoint": ("io.checkpoint",),
    "configuration": ("families.models",),
    "demo": ("app.demo",),
    "discriminator": ("networks.discriminator",),
    "edits": ("synthesis.edits",),
    "encoder": ("networks.encoder", "families.groupdnet"),
    "features": ("synthesis.features",),
    "files": ("io.files",),
    "generator": ("networks.generator",),
    "graphs": ("synthesis.graphs",),
    "groupdnet": ("families.groupdnet",),
    "images": ("io.images", "io.names"),
    "labels": ("networks.semantics",),
    "legacy": ("io.state_dict_keys",),
    "losses": ("networks.losses",),
    "memory": ("io.allocator",),
    "perceptual": ("networks.perceptual",),
    "pictures": ("synthesis.pictures",),
    "pix2pixhd": ("families.pix2pixhd",),
    "presets": ("families.groupdnet", "families.spade", "families.pix2pixhd", "families.ccfpse",
                "families.bicyclegan", "networks.preset"),
    "registry": ("families.models", "families.registry"),
    "scenes": ("data.scenes",),
    "shapes": ("synthesis.shapes",),
    "shipped": ("families.models",),
    "spade": ("families.spade",),
    "stripes": ("networks.tiled_inference",),
    "synthesizer": ("synthesis.synthesizer",),
    "zoo": ("families.registry",),
}
# Of modules whose name is a package's now.
SYNTHESIS = {
    "Layout": "synthesis.scene:Scene", "read_layouts": "synthesis.scene:read_scenes",
    "sample_layouts": "synthesis.scene:sample_scenes", "semantics": "synthesis.scene:semantics",
    "draw_input": "synthesis.scene:draw_input", "read_clusters": "synthesis.scene:read_clusters",
    "read_photographs": "synthesis.scene:read_photographs",
    "calibrate": "synthesis.scene:calibrate", "map_files": "io.names:map_files",
    "draw_code": "synthesis.codes:draw_code", "drawn_code": "synthesis.codes:drawn_code",
    "resample_class": "synthesis.codes:resample_class",
}


def old_name(module: ModuleType, names: dict[str, str], name: str) -> Any:
    """What ``name`` of a module that became a package is now.

    Raises:
        AttributeError: it never had that name.
    """
    if name not in names:
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
    home, _, new = names[name].partition(":")
    _warn(f"{module.__name__}.{name} is {_PACKAGE}.{home}.{new}", 4)
    return getattr(import_module(f"{_PACKAGE}.{home}"), new)


def _warn(text: str, stacklevel: int) -> None:
    warnings.warn(f"{text} since 0.2", DeprecationWarning, stacklevel=stacklevel)


class _Moved(ModuleType):
    """A module of which nothing is left but its name."""

    def __getattr__(self, name: str) -> Any:
        homes = MOVED[self.__name__.removeprefix(f"{_PACKAGE}.")]
        if name == "__all__":
            return [public for home in homes
                    for public in vars(import_module(f"{_PACKAGE}.{home}")) if public[0] != "_"]
        if not name.startswith("__"):
            for home in homes:
                module = import_module(f"{_PACKAGE}.{home}")
                if hasattr(module, name):
                    value = getattr(module, name)
                    home = str(getattr(value, "__module__", ""))
                    if getattr(sys.modules.get(home), name, None) is not value:
                        home = module.__name__  # of a constant, or of another's alias
                    _warn(f"{self.__name__}.{name} is {home}.{name}", 3)
                    return value
        now = ", ".join(f"{_PACKAGE}.{home}" for home in homes)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}: what it held "
                             f"stands in {now} since 0.2")


class _OldNames(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None,
                  target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Its names are looked up when they are asked for."""


def install() -> None:
    """Let old names be found, after all that is there."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())
