"""Builds the emulated CUDA library, loads it, and reads what it counted and found."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuda_on_cpu import translate

from smis_kernels import build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "emulated"
# How the kernels, and the runtime, are compiled and linked.
SANITIZERS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize=vptr",
              "-fno-sanitize-recover=undefined")
MODES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "plain": (("-O2", "-DEMULATED_ARCH=900"), ("-O2",), ()),
    # The fallbacks for older devices are checked here. Linked without its own runtime.
    "race": (("-O1", "-fsanitize=thread", "--param", "tsan-distinguish-volatile=1",
              "-DEMULATED_ARCH=750"), ("-O2",), ()),
    "asan": (("-O1", *SANITIZERS, "-DEMULATED_ARCH=900"), ("-O1", "-fsanitize=address"),
             ("-fsanitize=address,undefined",)),
}
FLAGS = (
    "-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-DUSE_CUDA", "-Wno-unknown-pragmas",
    "-DTORCH_TARGET_VERSION=0x020a000000000000", "-fno-strict-aliasing",
    "-mfma", "-ffp-contract=fast",  # as nvcc contracts products and sums
)


def toolkit_headers() -> str:
    """The toolkit's include folder, as nvcc names it."""
    command = (build.find_nvcc(), "-dryrun", "-E", "-x", "cu", os.devnull)
    said = subprocess.run(command, capture_output=True, text=True).stderr
    found = re.search(r'INCLUDES="?-I([^"\s]+)', said)
    if not found:
        raise build.NotBuilt("nvcc does not say where its headers are", "install the CUDA toolkit")
    return os.path.normpath(found[1])


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise build.NotBuilt("the emulated library does not build", "", done.stderr)


def make(mode: str, csrc: Path = ROOT / "csrc", name: str = "emulated") -> Path:
    """The emulated library of ``csrc`` and of the faulty kernels; objects are kept."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:  # one build at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _make(mode, csrc, name)


def _make(mode: str, csrc: Path, name: str) -> Path:
    torch, cxx = build.find_torch(), build.find_cxx()
    assert torch is not None
    kernel_flags, runtime_flags, link_flags = MODES[mode]
    folder = CACHE / mode / name
    sources = translate.translate_tree(csrc, folder / "csrc")
    for own in ("faults.cu", "runtime.cpp"):
        text = (HERE / own).read_text()
        path = folder / "csrc" / own.partition(".")[0] / "cuda.cpp"
        path.parent.mkdir()
        path.write_text(translate.translate(text, own) if own.endswith(".cu") else text)
        sources.append(path)
    include = (f"-I{folder / 'csrc'}", f"-I{HERE}", *torch.includes, "-isystem", toolkit_headers())
    version = subprocess.run((*cxx, "--version"), capture_output=True, text=True).stdout
    headers = sorted((*(folder / "csrc").rglob("*.h"), HERE / "device.h"))

    def compiled(path: Path) -> Path:
        """The object, whose name says all that went into it; made where it is not there."""
        flags = (*FLAGS, *(runtime_flags if path.parent.name == "runtime" else kernel_flags))
        digest = hashlib.sha256(repr((version, torch.version, flags)).encode())
        for file in (path, *headers):
            digest.update(file.read_bytes())
        target = CACHE / mode / f"{path.parent.name}.{digest.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            _run(*cxx, *flags, *include, "-c", str(path), "-o", str(partial))
            os.replace(partial, target)
        return target

    with ThreadPoolExecutor(build.jobs()) as pool:
        objects = list(pool.map(compiled, sources))
    key = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:16]
    library = folder / f"{key}.so"  # one that is loaded is never written over
    if not library.exists():
        lib = torch.root / "lib"
        partial = library.with_suffix(f".{os.getpid()}")
        defined = () if mode == "asan" else ("-Wl,-z,defs",)  # its runtime is loaded first
        _run(*cxx, "-shared", *link_flags, "-Wl,-Bsymbolic", *map(str, objects), f"-L{lib}",
             f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-lc10", "-ldl", *defined, "-o", str(partial))
        os.replace(partial, library)
    return library


@dataclass(frozen=True)
class Finding:
    """What the emulated device objects to, and the lines of source where."""

    text: str
    kernel: str
    places: tuple[str, ...]
    sources: tuple[str, ...]
    times: int

    def __str__(self) -> str:
        where = "; ".join(f"{p}: {s}" for p, s in zip(self.places, self.sources, strict=True))
        return f"{self.text} in {self.kernel} ({self.times} times) {where}".rstrip()


class Device:
    """The library that is loaded: its settings, counters and findings."""

    def __init__(self, library: Path, csrc: Path = ROOT / "csrc") -> None:
        self.library, self.csrc = library, csrc
        self._c = ctypes.CDLL(str(library))
        self._c.emulated_set.argtypes = (ctypes.c_char_p, ctypes.c_double)
        for name in ("kernels", "findings"):
            getattr(self._c, f"emulated_{name}").restype = ctypes.c_char_p
        for name in ("waits", "calls"):
            getattr(self._c, f"emulated_{name}").restype = ctypes.c_int64

    def set(self, **values: float) -> None:
        """Any of seed, preempt, preempt_plain, resident, grid_x, grid_y, most_steps."""
        for name, value in values.items():
            if not self._c.emulated_set(name.encode(), float(value)):
                raise ValueError(f"the emulated device has no setting {name}")

    @property
    def waits(self) -> int:
        """How often the host has waited for the device."""
        return int(self._c.emulated_waits())

    @property
    def calls(self) -> int:
        """Calls of ops: device guards taken."""
        return int(self._c.emulated_calls())

    def kernels(self) -> dict[str, tuple[int, int, int]]:
        """Kernel: launches, calls of ops that launched it, threads."""
        rows = (line.split("\t") for line in self._c.emulated_kernels().decode().splitlines())
        return {name: (int(a), int(b), int(c)) for name, a, b, c in rows}

    def findings(self) -> list[Finding]:
        """What was found since the last call, without the races that ``benign.json`` lists."""
        rows = [line.split("\t") for line in self._c.emulated_findings().decode().splitlines()]
        addresses = sorted({a for row in rows for a in row[2:4] if int(a, 16)})
        lines = self._lines(addresses)
        found: dict[tuple[str, str, tuple[str, ...]], int] = {}
        for text, kernel, a, b, times in rows:
            places = tuple(self._place(lines[x]) for x in (a, b) if x in lines)
            key = (text, kernel, places)
            found[key] = found.get(key, 0) + int(times)
        made = [Finding(text, kernel, places, tuple(map(self._source, places)), times)
                for (text, kernel, places), times in found.items()]
        return [finding for finding in made if not benign(finding)]

    def _lines(self, addresses: list[str]) -> dict[str, str]:
        """Where each address is: the innermost line of those inlined there that is the kernel's."""
        command = ("addr2line", "-a", "-i", "-e", str(self.library), *addresses)
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        frames = [part.splitlines()[1:] for part in re.split(r"^(?=0x)", said, flags=re.M)[1:]]
        own = (next((f for f in each if "device.h" not in f), each[0]) for each in frames)
        return dict(zip(addresses, own, strict=True)) if addresses else {}

    def _place(self, line: str) -> str:
        return "/".join(line.partition(" ")[0].split("/")[-2:])

    def _source(self, place: str) -> str:
        file, _, number = place.rpartition(":")
        path = HERE / "faults.cu" if file.endswith("faults.cu") else self.csrc / file
        if not path.exists() or not number.isdigit():
            return ""
        return path.read_text().splitlines()[int(number) - 1].strip()


_LISTED = json.loads((HERE / "benign.json").read_text())


def benign(finding: Finding) -> bool:
    """Whether it is a race that is listed with the reason why it does no harm."""
    return finding.text.startswith("race:") and any(
        finding.text in entry["races"] and all(s in entry["lines"] for s in finding.sources)
        for entry in _LISTED
    )


if __name__ == "__main__":
    for selected in sys.argv[1:]:
        try:
            print(make(selected))
        except build.NotBuilt as problem:
            sys.exit(f"{problem}\n{problem.output}")
