"""The emulation catches what it is for: kernels with one fault each, and real ones with a cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smis_kernels.runtime.native import cuda_emulated

if not cuda_emulated():
    pytest.skip("SMIS_CUDA_EMULATED=1 runs it", allow_module_level=True)

from cuda_on_cpu import emulator
from cuda_on_cpu.plugin import DEVICE, MODE

from smis_kernels.runtime.library import _CUDA

NAMES = (
    "none", "missing barrier", "wrong mask", "divergent barrier", "ended lane", "beyond shared",
    "beyond tensor", "no memory", "race of blocks", "full table", "too many threads",
    "grid too large", "too much shared", "nothing written", "unchecked", "no wait",
    "wrong stream", "misaligned", "beyond local", "lanes apart",
)
EVERYWHERE = {
    "missing barrier": "wrong", "wrong mask": "takes no part|leaves out|different calls|deadlock",
    "divergent barrier": "different barriers", "ended lane": "has ended",
    "full table": "does not end", "too many threads": "invalid configuration",
    "grid too large": "invalid configuration", "too much shared": "invalid argument",
    "unchecked": "was not checked", "no wait": "did not wait",
    "wrong stream": "not on the current stream", "lanes apart": "different calls|deadlock",
    "race of blocks": "wrong",
}
IN_RACE = {
    **EVERYWHERE, "missing barrier": "race: ", "race of blocks": "race: write, write",
    "beyond shared": "beyond shared memory|write of no device memory",
    "beyond tensor": "no device memory|beyond a tensor|nothing wrote",
    "no memory": "no device memory", "nothing written": "nothing wrote",
    "misaligned": "misaligned",
}
ENDS_THE_PROCESS = {
    "beyond shared": "heap-buffer-overflow", "beyond tensor": "heap-buffer-overflow",
    "misaligned": "misaligned address", "beyond local": "insufficient space",
}
CAUGHT = IN_RACE if MODE == "race" else EVERYWHERE


def outcome(name: str) -> str:
    """What a kernel's fault leads to: the error, the findings, or "wrong" for wrong numbers."""
    x = torch.arange(256, dtype=torch.int32)
    DEVICE.set(most_steps=200_000)
    said = ""
    try:
        y = torch.ops.smis_emulated_faults.faulty.default.redispatch(_CUDA, x, NAMES.index(name))
        said = "" if torch.equal(y.view(4, 64), x.view(4, 64).flip(1)) else "wrong"
    except RuntimeError as error:
        said = str(error)
    return "\n".join([said, *map(str, DEVICE.findings())]).strip()


def test_no_fault_is_found_where_there_is_none() -> None:
    assert outcome("none") == ""


@pytest.mark.parametrize("name", CAUGHT)
def test_a_fault_is_caught(name: str) -> None:
    said = outcome(name)
    assert any(words in said for words in CAUGHT[name].split("|")), said or "nothing"


@pytest.mark.skipif(MODE != "asan", reason="AddressSanitizer and UBSan end the process")
@pytest.mark.parametrize("name", ENDS_THE_PROCESS)
def test_a_sanitizer_ends_the_process(name: str) -> None:
    code = f"import torch; from test_faults import outcome; outcome({name!r})"
    paths = os.pathsep.join([str(emulator.ROOT), *map(str, (emulator.HERE.parent, emulator.HERE))])
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode != 0
    assert any(words in done.stderr for words in ENDS_THE_PROCESS[name].split("|")), done.stderr


# Edited copies of the kernels: (file, text, its replacement, the call, what is said)
WINDOWS = ("m = torch.randint(1, 40, (2, 33, 65)).int(); "
           "a = number_windows(m, 10**6, backend='cuda'); "
           "b = number_windows(m, 10**6, backend='reference')")
CROPS = ("x, m = torch.randn(2, 3, 33, 65), torch.randint(0, 9, (2, 33, 65)); "
         "a = [class_crops(x, m, 9, backend='cuda')]; "
         "b = [class_crops(x, m, 9, backend='reference')]")
CUTS = [
    ("label_windows/cuda.cu", "if (lane == kLane) warps[warp] = through;\n  __syncthreads();",
     "if (lane == kLane) warps[warp] = through;", WINDOWS, "race: "),
    ("label_windows/cuda.cu", "held = atomicCAS(&slot.key, 0ull, key);",
     "held = slot.key; slot.key = key;", WINDOWS, "race: "),
    ("class_crops/cuda.cu", "const unsigned group = __match_any_sync(kWarp, box);",
     "const unsigned group = __match_any_sync(kWarp, box) | 1u;", CROPS,
     "different calls|leaves out"),
]


@pytest.mark.skipif(MODE != "race", reason="races are looked for in the race build")
@pytest.mark.parametrize(("file", "text", "replacement", "call", "words"), CUTS,
                         ids=["barrier", "atomic", "mask"])
def test_a_cut_in_a_real_kernel_is_caught(tmp_path: Path, file: str, text: str, replacement: str,
                                          call: str, words: str) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(emulator.ROOT / "csrc", csrc)
    source = (csrc / file).read_text()
    assert source.count(text) == 1, "the kernel has changed: adapt the cut"
    (csrc / file).write_text(source.replace(text, replacement))
    code = "\n".join((
        "import sys, torch", "from pathlib import Path", "from cuda_on_cpu import emulator",
        "from smis_kernels import class_crops", "from smis_kernels.runtime import native",
        "from smis_kernels.ops.label_windows.op import number_windows",
        f"library = emulator.make('race', Path({str(csrc)!r}), 'cut')",
        "native.load_emulated(library); device = emulator.Device(library)",
        "device.set(preempt_plain=0.1, seed=3)",
        "try:", f"    {call}",
        "    print('' if all(map(torch.equal, a, b)) else 'wrong numbers')",
        "except RuntimeError as error: print(error)",
        "print(*device.findings(), sep='\\n')",
    ))
    paths = os.pathsep.join([str(emulator.ROOT), str(emulator.HERE.parent)])
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": paths})
    assert any(w in done.stdout for w in words.split("|")), done.stdout + done.stderr
