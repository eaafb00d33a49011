"""Every op runs on the backend that was asked for, or says why not."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_cases import PUBLIC
from torch._subclasses.fake_tensor import FakeTensorMode

from smis_kernels import (
    BackendError,
    class_boxes,
    explain,
    instance_avg_pool2d,
    instance_edges,
    layout_scope,
    norm_act,
    use_backend,
    use_path,
)
from smis_kernels.acceleration import formats, swap
from smis_kernels.layout import scope
from smis_kernels.ops.label_windows.op import number_windows
from smis_kernels.runtime import backend as selector
from smis_kernels.runtime import constants, native, tuned
from smis_kernels.runtime.backend import missing, no_fallback, requested, resolve
from smis_kernels.runtime.path import requested_path

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))


@pytest.mark.parametrize("name", PUBLIC)
def test_an_absent_backend_raises(name: str) -> None:
    call: Callable[..., Any] = PUBLIC[name]
    for kind in ("cuda", "triton"):
        with pytest.raises(BackendError, match="backend: "):
            call(backend=kind)
        with use_backend(kind), pytest.raises(BackendError, match="backend: "):
            call()
    with pytest.raises(ValueError, match="backend: expected one of auto, reference"):
        call(backend="gpu")


@pytest.mark.parametrize("name", PUBLIC)
def test_a_missing_library_is_no_silent_fallback(name: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector, "missing",
                        lambda kind, device=None: "it was not built; cure: build it")
    monkeypatch.setattr(selector, "_warned", set())
    with pytest.raises(BackendError, match="cannot run: it was not built"):
        PUBLIC[name](backend="cpu")
    with pytest.warns(UserWarning, match="runs on the reference path: it was not built"):
        PUBLIC[name]()


# These tell explain nothing of their own: the modules that call them do.
INNER = {"window_table", "window_embedding", "number_vectors", "number_windows", "group_windows",
         "label_conv", "level_tables"}


@needs_cpu
@pytest.mark.parametrize("name", sorted(set(PUBLIC) - INNER))
def test_the_backend_that_runs_is_the_one_named(name: str) -> None:
    for asked, ran in (("cpu", "cpu"), ("reference", "reference"), (None, "cpu")):
        given = {} if asked is None else {"backend": asked}
        choices = explain(PUBLIC[name], **given).choices
        assert choices and {choice.backend for choice in choices} == {ran}, asked
    with use_backend("reference"):
        assert {c.backend for c in explain(PUBLIC[name]).choices} == {"reference"}
        assert {c.backend for c in explain(PUBLIC[name], backend="cpu").choices} == {"cpu"}


def test_the_argument_comes_first_then_the_block_then_the_environment(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector, "_environment", "reference")
    assert requested() == "reference"
    with use_backend("cpu"):
        assert requested() == "cpu"
        assert requested("auto") == "auto"
        with use_backend("reference"):
            assert requested() == "reference"
        assert requested() == "cpu"
    assert requested() == "reference"
    monkeypatch.setattr(selector, "_environment", "fast")
    with pytest.raises(ValueError, match="SMIS_BACKEND: expected one of"):
        resolve("op", torch.zeros(1), None, ("cpu",))


# A block, and what is to be as it was before it.
BLOCKS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "use_backend": (lambda: use_backend("reference"), requested),
    "no_fallback": (no_fallback, lambda: selector._selection.fallback),
    "use_path": (lambda: use_path("dense"), requested_path),
    "using": (lambda: constants.using(constants.Store([])), lambda: constants.scope()),
    "trial": (lambda: tuned.trial("rates", {}), lambda: dict(tuned._trials)),
    "layout_scope": (layout_scope, lambda: scope._known.depth),
    "network_call": (lambda: formats.network_call(torch.zeros(1)), lambda: (
        formats._calls.depth, len(torch.overrides._get_current_function_mode_stack()))),
    "at_any_size": (swap.at_any_size, lambda: swap._sizes.any),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_that_raises_changes_nothing_behind_it(name: str,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap._sizes, "any", False)
    block, state = BLOCKS[name]
    before = state()

    def interrupted() -> None:
        with block():
            assert state() != before
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            interrupted()
        assert state() == before


def test_explain_inside_of_explain_takes_nothing_from_it() -> None:
    x = torch.zeros(1, 2, 3, 4)

    def both() -> None:
        norm_act(x)
        assert len(explain(norm_act, x).choices) == 1
        with pytest.raises(ValueError, match="eps"):
            explain(norm_act, x, eps=-1.0)
        norm_act(x)

    assert [choice.op for choice in explain(both).choices] == ["norm_act"] * 2


@needs_cpu
@pytest.mark.parametrize("call", [
    lambda: class_boxes(torch.zeros(1, 1, 1, 2), torch.tensor([[[0, 3]]]), 3, backend="cpu"),
    lambda: instance_avg_pool2d(torch.zeros(1, 1, 1, 2), torch.tensor([[[0, -3]]]), backend="cpu"),
    lambda: number_windows(torch.zeros(1, 1, 2, dtype=torch.int32), 9, backend="cpu"),
], ids=["labels", "instances", "windows"])
def test_what_a_kernel_refuses_is_a_value_error(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"^\w+: expected .*, got -?\d+; "):
        call()


def test_interpreted_triton_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match=r"needs a CUDA tensor \(or TRITON_INTERPRET=1\)"):
        resolve("op", torch.zeros(1), "triton", ("cpu", "triton"))
    with pytest.raises(BackendError, match="needs a cpu tensor, got one on meta"):
        resolve("op", torch.zeros(1, device="meta"), "cpu", ("cpu",))
    assert resolve("op", torch.zeros(1, device="meta"), None, ("cpu",)) == "reference"


DEFAULT = "8.0 9.0 10.0+PTX"
Capability = tuple[int, int]
SetGPU = Callable[[Capability, str], None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SetGPU]:
    """A GPU of a capability, beside a loaded CUDA library that was built for architectures."""

    class Torch:
        cuda: Any = None

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    def put(capability: Capability, built: str) -> None:
        fake = Torch()
        fake.cuda = SimpleNamespace(
            is_available=lambda: True, get_device_capability=lambda index: capability,
            get_device_name=lambda index: "Tesla T4")
        monkeypatch.setattr(selector, "torch", fake)
        monkeypatch.setitem(native.STATUS, "cuda", native.NativeStatus("cuda", True, "library"))
        monkeypatch.setattr(native, "build_record", lambda: {"cuda": {"architectures": built}})
        monkeypatch.setattr(selector, "_warned", set())
        selector._refused_by_gpu.cache_clear()

    yield put
    selector._refused_by_gpu.cache_clear()


def on_gpu() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros((1, 4, 5), dtype=torch.int64, device="cuda:0")


@pytest.mark.parametrize(("capability", "built"), [
    ((7, 0), DEFAULT), ((7, 5), DEFAULT), ((12, 0), "8.0 9.0 10.0"), ((8, 0), "8.6"),
    ((9, 0), "8.0"), ((7, 0), "7.5+PTX"), ((10, 0), "9.0a+PTX"), ((10, 3), "10.0a"),
    ((12, 0), "10.0f+PTX"),
])
def test_a_gpu_that_the_library_is_not_built_for(gpu: SetGPU, capability: Capability,
                                                 built: str) -> None:
    """auto: the reference and one line; an explicit choice: an error with the cure."""
    gpu(capability, built)
    number = ".".join(map(str, capability))
    cure = (f"TORCH_CUDA_ARCH_LIST={number} {native.BUILD_COMMAND}" if capability != (7, 0)
            else "a GPU of 7.5 or newer")  # which nvcc 13 does not compile for
    says = re.escape(f"Tesla T4 has compute capability {number}, the library is built for {built}; "
                     f"cure: {cure}") + "$"
    ids = on_gpu()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            assert resolve("edges", ids, None, ("cpu", "cuda")) == "reference"
    (line,) = [str(warning.message) for warning in told]
    assert re.fullmatch(f"smis_kernels.edges runs on the reference path: {says}", line)
    with pytest.raises(BackendError, match="'cuda' of instance_edges cannot run: " + says):
        instance_edges(ids, backend="cuda")


@pytest.mark.parametrize(("capability", "built"), [
    ((8, 0), DEFAULT), ((8, 6), DEFAULT), ((8, 9), DEFAULT), ((9, 0), DEFAULT), ((10, 3), DEFAULT),
    ((12, 0), DEFAULT), ((12, 1), DEFAULT), ((7, 5), "7.5"), ((9, 0), "9.0a"), ((10, 3), "10.0f"),
    ((8, 6), "7.5+PTX"),
])
def test_a_gpu_that_the_library_is_built_for(gpu: SetGPU, capability: Capability,
                                             built: str) -> None:
    gpu(capability, built)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for backend in ("auto", "cuda"):
            assert resolve("instance_edges", on_gpu(), backend, ("cpu", "cuda")) == "cuda"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("capability", "runs"), [((7, 0), False), ((7, 5), False), ((8, 0), True),
                                                  ((12, 0), True)])
def test_a_gpu_that_triton_does_not_support(gpu: SetGPU, monkeypatch: pytest.MonkeyPatch,
                                            capability: Capability, runs: bool) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    gpu(capability, "7.5")
    problem = missing("triton", torch.device("cuda", 0))
    if runs:
        assert problem is None
    else:
        number = ".".join(map(str, capability))
        assert problem == (f"Tesla T4 has compute capability {number}, triton needs 8.0; "
                           "cure: a newer GPU")


@pytest.mark.parametrize(("torch_cuda", "loads"), [("12.8", False), ("13.2", True)])
def test_a_library_of_another_cuda_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                 torch_cuda: str, loads: bool) -> None:
    loaded: list[Path] = []
    monkeypatch.delenv("SMIS_CUDA_EMULATED", raising=False)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    monkeypatch.setattr(native, "build_record", lambda: {"cuda": {"cuda": "13.0"}})
    (tmp_path / "_cuda.abi3.so").touch()
    status = native._load("cuda")
    assert status.loaded == loads
    assert loaded == [tmp_path / "_cuda.abi3.so"] * loads
    if not loads:
        assert status.reason == ("nvcc is of CUDA 13.0 and torch of CUDA 12.8: "
                                 "their major versions must agree")
        assert status.cure == f"set CUDA_HOME to a CUDA 12 toolkit, then {native.BUILD_COMMAND}"


def test_a_gpus_capability_is_a_constant_of_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refused(kind: str, index: int) -> str | None:
        asked.append((kind, index))
        print("what no graph can hold")
        return "abc"

    monkeypatch.setattr(selector, "_refused_by_gpu", refused)

    @torch.compile(fullgraph=True, backend="eager")
    def count(x: torch.Tensor) -> torch.Tensor:
        return x + len(selector._gpu_problem("triton", 0) or "")

    assert count(torch.zeros(1)) == 3
    assert asked == [("triton", 0)]


def test_importing_leaves_torchs_compiler_out() -> None:
    """It takes as long as all else; `smis` and every worker would pay it."""
    ask = "import sys, smis_models.cli; print('torch._dynamo' in sys.modules)"
    said = subprocess.run((sys.executable, "-c", ask), capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the address space")
@pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
def test_a_kernel_without_memory_says_so() -> None:
    """As torch does; its C++ interface keeps torch's words to itself."""
    program = """
import resource, torch
from smis_kernels.ops.reformat.op import reformat
x = torch.zeros(1, 64, 1024, 2048)
reformat(x[..., :8].contiguous(), torch.channels_last)  # the library is loaded, threads are there
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (200 << 20),) * 2)
try:
    reformat(x, torch.channels_last)
except RuntimeError as error:
    print(str(error))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          timeout=120)
    assert done.stdout == "reformat: can't allocate memory for what it makes\n", done.stderr
