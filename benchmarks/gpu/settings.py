"""What one run of the command was asked for; handed to every part's process as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TUNED = "SMIS_TUNED"  # smis_kernels.runtime.tuned.ENVIRONMENT; the driver runs without the package


@dataclass(frozen=True)
class Settings:
    """Options of the command line, and where files go.

    ``work`` holds the journals of the parts, ``out`` the results.
    """

    out: str
    work: str
    maps: str | None = None
    parity: str | None = None
    dry_run: bool = False
    commit: str = "unknown"
    table: str | None = None
    """The launch settings: the ``tune`` part writes them, later parts use them."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        return cls(**json.loads(text))

    @property
    def device(self) -> str:
        """"cuda", or "cpu" on a dry run."""
        return "cpu" if self.dry_run else "cuda"

    def journal(self, part: str) -> Path:
        """The journal of a part."""
        return Path(self.work) / f"{part}.json"

    def log(self, part: str) -> Path:
        """What a part's processes printed."""
        return Path(self.work) / f"{part}.log"

    @property
    def failures(self) -> Path:
        """The ends of the logs of parts that failed, beside the results."""
        return Path(self.out) / f"{Path(self.work).name}.failed.log"


def environment(settings: Settings) -> dict[str, str]:
    """The environment of the parts' processes: caches that later calls find again."""
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [found.get("PYTHONPATH", "")])]
    )
    found["PYTHONUNBUFFERED"] = "1"
    found.setdefault("MPLBACKEND", "Agg")
    if settings.table is not None and Path(settings.table).exists():
        found.setdefault(TUNED, settings.table)
    for name in ("SMIS_BACKEND", "SMIS_PATH", "TRITON_INTERPRET"):
        found.pop(name, None)
    if settings.dry_run:
        # Kernels are interpreted, so a machine with a GPU does the same as one without.
        found.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
        return found
    caches = ROOT / "build" / "gpu-cache"
    found.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "inductor"))
    found.setdefault("TRITON_CACHE_DIR", str(caches / "triton"))
    return found
