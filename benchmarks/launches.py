"""What one forward asks of a GPU, counted without one: ``python -m benchmarks.launches``.

A bf16 forward in eval mode at batch 1 runs on fake CUDA tensors, layout compiled and weights
packed beforehand. *Operations* are what torch is asked for, our ops as one each; *launches* are
kernels and memory sets: one for an operation of torch that is no view, and for ours what their
launchers, which run too, start. A conv counts once, whatever cuDNN makes of it. *Training* is a
step's forward and backward of the generator, in training mode under autocast as the trainer runs
it, its layout at hand; *sorts* are operations that sort, several launches each.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from smis_kernels import CGNorm, LabelLayout, use_backend, use_path
from smis_kernels.acceleration.prepared import Prepared
from smis_kernels.layout import label_layout, levels
from smis_kernels.layout.levels import WindowLevel
from smis_kernels.layout.table_cache import TableCache
from smis_kernels.ops.instance_edges import op as edges
from smis_kernels.ops.label_windows import op as label_windows
from smis_kernels.runtime.library import NAMESPACE, raw_ops
from smis_models.benchmark.case import Maps, Setting
from smis_models.benchmark.records import markdown_table
from smis_models.families import create_model
from smis_models.families.ccfpse import CCFPSEGenerator, Condition
from smis_models.io.images import write_atomically
from smis_models.io.provenance import commit, versions
from smis_models.networks import blocks, semantics
from smis_models.synthesis.synthesizer import frozen_copy

RESULTS = Path(__file__).parent / "results"
GENERATORS = ("spade_coco", "groupdnet_ade20k", "groupdnet_deepfashion", "ccfpse_coco")
WAYS = ("reference", "auto", "two_level", "kept")  # kept: auto, the layout's second sample
PARTS = ("norms", "conditions", "convs", "tail", "backward")
TRAINED = ("spade_coco", "groupdnet_ade20k")
TRAINING_WAYS = ("reference", "auto")

_VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "device",
    "diagonal", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "narrow",
    "new_empty", "new_empty_strided", "permute", "reshape", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
}
_WAITS = {"_local_scalar_dense", "nonzero", "bincount", "equal", "masked_select"}
_SORTS = {"sort", "argsort", "embedding_dense_backward"}
# Kernels, memory sets and copies of CUDA C++ (tests/cuda_on_cpu holds them), and who waits.
NATIVE = {"number_vectors": 7, "number_windows": 9, "number_labels": 5,
          "number_levels": 15}
_WAITING = {"number_vectors", "number_windows"}


class Count(TorchDispatchMode):
    """Operations, launches and waits for the device by the part of the network they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.waits = self.sorts = 0
        self.names: Counter[tuple[str, str]] = Counter()  # of launches, by part
        self.part: str | None = None
        self._inside = False  # one of our launchers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name in _VIEWS:
            return func(*args, **(kwargs or {}))
        part = self.part or _part_of(name)
        op = raw_ops.get(name) if func.namespace == NAMESPACE else None
        if not self._inside:
            self.operations[part] += 1
        if op is not None and op.triton is not None and args[0].is_cuda:
            return self._launched(op, part, args)
        # Where a mask or ids decide how many rows there are, the host waits for them.
        picked = name == "index" and any(t is not None and t.dtype in (torch.bool, torch.uint8)
                                         for t in args[1])
        self.waits += name in _WAITS or name in _WAITING or name.startswith("_unique") or picked
        summed = name.strip("_").startswith("index_put") and len(args) > 3 and args[3]
        self.sorts += name in _SORTS or bool(summed)
        self._note(part, name, NATIVE.get(name, 1))
        return func(*args, **(kwargs or {}))

    def _note(self, part: str, name: str, count: int = 1) -> None:
        self.launches[part] += count
        self.names[part, name] += count

    def _launched(self, op: Any, part: str, args: Any) -> Any:
        import triton

        before, self.part, self._inside = (self.part, self._inside), part, True

        def run(kernel: Any, *_: Any, **__: Any) -> None:
            self._note(part, kernel.__name__)

        with mock.patch.object(triton.JITFunction, "run", run), self:
            result = op.launch(*args)
        self.part, self._inside = before
        return result

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Know the parts by the calls that compute them; the outermost counts."""
        marked = [
            (CGNorm, "forward", "norms"), (CGNorm, "convolved", "norms"),
            (blocks, "modulate_pair", "norms"), (_BatchNorm, "forward", "norms"),
            (CCFPSEGenerator, "_pyramid", "conditions"), (Condition, "__init__", "conditions"),
            (Condition, "__call__", "conditions"),
        ]
        with ExitStack() as stack:
            for owner, attribute, part in marked:
                stack.enter_context(mock.patch.object(
                    owner, attribute, self._marked(getattr(owner, attribute), part)))
            yield

    def _marked(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.part
            self.part = before or part
            try:
                return function(*args, **kwargs)
            finally:
                self.part = before

        return call


def _part_of(name: str) -> str:
    return "convs" if "conv" in name else "tail"


def _picked(t: Tensor, index: Any) -> Tensor:
    """``t[index]`` in operations."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [p for p in parts if not isinstance(p, Tensor)]:
        at = next(i for i, p in enumerate(parts) if p is Ellipsis)
        fill = t.dim() - sum(p is not None for p in parts) + 1
        parts[at:at + 1] = [slice(None)] * fill
    axis = 0
    rows: list[Tensor | None] = []
    for part in parts:
        if isinstance(part, Tensor):
            rows.append(part)
        elif part is None:
            t = t.unsqueeze(axis)
            rows.append(None)
        elif isinstance(part, slice):
            t = torch.ops.aten.slice(t, axis, part.start, part.stop, part.step or 1)
            rows.append(None)
        else:
            t = t.select(axis, part)
            continue
        axis += 1
    if all(row is None for row in rows):
        return t
    picked: Tensor = torch.ops.aten.index(t, rows)
    return picked


def _contiguous(t: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    if t.is_contiguous(memory_format=memory_format):
        return t
    copied: Tensor = torch.ops.aten.clone(t, memory_format=memory_format)
    return copied


def _conv_format(input: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """The format of a conv's output as cuDNN makes it; a build without CUDA knows others only."""
    def last(t: Tensor) -> bool:
        return torch._prims_common.suggest_memory_format(t) == torch.channels_last

    either = input.dtype != torch.float64 and (last(input) or last(weight))
    return torch.channels_last if either else torch.contiguous_format


@contextmanager
def _guarded() -> Iterator[None]:
    """Autograd asks for the stream of a device: that of meta tensors, in a build without CUDA."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # of c10::DeviceType
    before = guards[cuda]
    if before is None:
        guards[cuda] = guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


@contextmanager
def without_a_gpu() -> Iterator[None]:
    """Fake CUDA tensors may be computed with, and launchers called on them."""
    for op in raw_ops.values():  # their compile cases are to hold no fake tensors
        if op.triton is not None:
            importlib.import_module(op.triton.partition(":")[0])
    # Methods that ask for a device, as operations.
    methods: dict[str, Any] = {
        "__getitem__": _picked, "contiguous": _contiguous,
        "copy_": lambda t, source: torch.ops.aten.copy_(t, source),
        "long": lambda t: t.to(torch.int64), "int": lambda t: t.to(torch.int32),
        "float": lambda t: t.to(torch.float32),
    }
    with ExitStack() as stack:
        for name, method in methods.items():
            stack.enter_context(mock.patch.object(Tensor, name, method))
        stack.enter_context(mock.patch.object(
            torch._C, "_conv_determine_backend_memory_format", _conv_format))
        stack.enter_context(mock.patch.object(torch.cuda, "device", nullcontext))
        # autocast asks whether there is a GPU, and of which kind
        stack.enter_context(mock.patch.object(
            torch.cuda.amp.common, "amp_definitely_not_available", return_value=False))
        stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True))
        stack.enter_context(mock.patch.dict(os.environ, {"SMIS_TUNED": "none"}))
        yield


def _fake(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    kept = dtype if dtype is not None and t.is_floating_point() else t.dtype
    return torch.empty_strided(t.shape, t.stride(), dtype=kept, device="cuda")


def _move(network: nn.Module, dtype: torch.dtype, *, trained: bool = False) -> None:
    """Parameters and buffers become fake ones on a GPU, stored as they were."""
    for module in network.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = nn.Parameter(_fake(p, dtype), requires_grad=trained)
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = _fake(b, dtype)


def scene(name: str, maps: Maps) -> tuple[Tensor, Tensor | None, Any]:
    """Labels, instances where the model reads them, and its options."""
    preset = create_model(name, part="generator", device="meta").preset
    setting = Setting(torch.device("cpu"), maps=maps.named("coco"))
    labels = setting.labels("indoor", preset.image_size, preset.classes)
    ids = setting.instances("indoor", preset.image_size) if preset.instance_edge else None
    return labels, ids, preset


def _sizes(preset: Any) -> list[tuple[int, int]]:
    height, width = preset.latent_size
    steps = range(preset.upsamplings[preset.upsampling] + 1)
    return [(height << i, width << i) for i in steps]


class _Counted(levels.Reading):
    """A reading that counts as a copy to the host, and as a wait once the host asks for it."""

    asked = 0

    def __init__(self, numbers: Tensor) -> None:
        torch.empty_like(numbers).copy_(numbers)
        self._shape: tuple[int, ...] | None = tuple(numbers.shape)

    def numbers(self) -> Any:
        _Counted.asked += self._shape is not None
        self._read = self._read if self._shape is None else np.zeros(self._shape, int).tolist()
        self._shape = None
        return self._read


def count_layout(name: str, maps: Maps) -> tuple[LabelLayout, dict[str, int]]:
    """A layout at all sizes of a generator, and what a GPU takes to compile a later one like it.

    ``waits_to_use``: what the host waits for once norms ask how many windows there are.
    """
    labels, instances, preset = scene(name, maps)
    layout = semantics.compile_layout(labels, preset, instances)
    for size in _sizes(preset):
        layout.level(size)
    asked = dict.fromkeys(_sizes(preset))
    patched = (
        (label_layout, "device_kernels", lambda map: True),
        (label_layout, "sizes_asked", lambda device, shape: asked),
        (label_layout, "capturing", lambda map: False),
        (label_layout, "Reading", _Counted), (_Counted, "asked", 0),
        (label_windows, "resolve", lambda *_: "cuda"), (edges, "resolve", lambda *_: "cuda"),
    )
    with ExitStack() as stack:
        for owner, attribute, value in patched:
            stack.enter_context(mock.patch.object(owner, attribute, value))
        stack.enter_context(without_a_gpu())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        held, ids = _fake(labels), None if instances is None else _fake(instances)
        with Count() as count:
            compiled = semantics.compile_layout(held, preset, ids)
        counts = {"operations": count.operations.total(), "launches": count.launches.total(),
                  "waits": count.waits + _Counted.asked}
        with Count() as using:
            for size in asked:
                compiled.level(size)
        assert not using.launches
        counts["waits_to_use"] = _Counted.asked
    return layout, counts


def _on_a_gpu(layout: LabelLayout) -> LabelLayout:
    """The layout in fake tensors, resolutions included."""
    moved = LabelLayout(_fake(layout.symbols), _fake(layout.vectors))
    moved._levels = {
        size: WindowLevel(**{k: _fake(v) for k, v in vars(level).items()})
        for size, level in layout._levels.items()
    }
    return moved


def _planes(layout: LabelLayout, dtype: torch.dtype) -> Tensor:
    """What the reference reads in its place."""
    return torch.empty(layout.shape, dtype=dtype, device="cuda")


def count_forward(name: str, layout: LabelLayout, way: str, *,
                  dtype: torch.dtype = torch.bfloat16) -> Count:
    """One forward of a frozen generator on fake tensors; the one before it, uncounted, prepares."""
    source = create_model(name, part="generator", device="meta").eval()
    generator: Any = frozen_copy(source)
    backend = "reference" if way == "reference" else "auto"
    path = way if way == "two_level" else "auto"
    with without_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), \
            use_backend(backend), use_path(path):
        _move(generator, dtype)
        semantic: Any = _planes(layout, dtype) if way == "reference" else _on_a_gpu(layout)
        if way == "kept":
            semantic.tables = TableCache()
        z = generator.sample_latent(layout.shape[0])
        prepared = Prepared(generator)  # as a Synthesizer's
        # Which norms may share is known after a call, which do after two; then weights are packed.
        for _ in range(1 if way == "kept" else 3):
            with Count(), prepared.vouched():  # launchers run here alone, and have constants too
                generator(semantic, z)
        with Count() as count, count.marking(), prepared.vouched():
            generator(semantic, z)
    return count


def _differentiate(output: Tensor, grad: Tensor) -> None:
    """``output.backward(grad)`` node by node: torch's engine asks for an accelerator that exists.

    It leaves out what the engine adds: zeros for an output of ours that nobody reads.
    """
    root: Any = output.grad_fn
    waiting: Counter[Any] = Counter()  # edges into each node
    stack, met = [root], {root}
    while stack:
        for node, _ in stack.pop().next_functions:
            waiting[node] += 1
            if node is not None and node not in met:
                met.add(node)
                stack.append(node)
    grads: dict[Any, dict[int, Tensor]] = {root: {output.output_nr: grad}}
    ready = [root]
    while ready:
        node = ready.pop()
        own = grads.pop(node, {})
        if hasattr(node, "variable"):
            node.variable.grad = own.get(0)
            continue
        edges = node.next_functions
        given = [own.get(i) for i in range(len(node._input_metadata))]
        made: Any = (None,) * len(edges)
        if own and isinstance(node, torch.autograd.function.BackwardCFunction):
            made = [g for g, needed in zip(node.apply(*given), node.needs_input_grad, strict=True)
                    if needed]
            edges = [edge for edge in edges if edge[0] is not None]
        elif own:
            made = node(*given)
            made = made if isinstance(made, tuple) else (made,)
        for (after, place), part in zip(edges, made, strict=True):
            if after is None:
                continue
            if part is not None:
                wanted = after._input_metadata[place]
                found = part.sum_to_size(wanted.shape).to(wanted.dtype)
                sums = grads.setdefault(after, {})
                sums[place] = sums[place] + found if place in sums else found
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)


def count_training(name: str, layout: LabelLayout, way: str, *,
                   dtype: torch.dtype = torch.bfloat16) -> tuple[Count, int]:
    """The generator's forward and backward of a step, and bytes that the layout keeps for it."""
    generator: Any = create_model(name, part="generator", device="meta").train()
    with without_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True), use_backend(way), \
            _guarded():
        _move(generator, torch.float32, trained=True)
        planes = way == "reference"
        semantic: Any = _planes(layout, torch.float32) if planes else _on_a_gpu(layout)
        z = generator.sample_latent(layout.shape[0])
        with Count() as count, count.marking():
            with torch.autocast("cuda", dtype):
                picture = generator(semantic, z)
            count.part = "backward"
            with torch.no_grad():
                _differentiate(picture, torch.empty_like(picture))
        unused = {n.partition(".")[0] for n, p in generator.named_parameters() if p.grad is None}
        assert unused <= {"up_4"}  # which a generator for pictures of 256 pixels has, but not calls
    kept = () if planes else semantic._orders.values()
    return count, sum(t.nbytes for found in kept for t in found.order.tensors)


def _by_part(count: Count) -> dict[str, Any]:
    return {
        kind: {**{part: counter[part] for part in PARTS if counter[part]},
               "total": counter.total()}
        for kind, counter in (("operations", count.operations), ("launches", count.launches))
    }


def measure(maps: Maps, generators: tuple[str, ...] = GENERATORS) -> dict[str, Any]:
    """Counts of every generator and way, by part."""
    found: dict[str, Any] = {}
    for name in generators:
        layout, compiled = count_layout(name, maps)
        found[name] = {"layout": compiled}
        for way in WAYS:
            found[name][way] = _by_part(count_forward(name, layout, way))
        for way in TRAINING_WAYS if name in TRAINED else ():
            count, kept = count_training(name, layout, way)
            found[name].setdefault("training", {})[way] = {
                **_by_part(count), "sorts": count.sorts, "waits": count.waits, "kept_bytes": kept}
    return found


def last_record(results: Path = RESULTS) -> dict[str, Any]:
    """The counts on the project's own scenes that were committed last."""
    paths = sorted(results.glob("launches-*-scenes.json"))
    if not paths:
        raise FileNotFoundError(f"{results}: no launches-*-scenes.json; "
                                "make one: python -m benchmarks.launches --out FILE")
    counts: dict[str, Any] = json.loads(paths[-1].read_text())["generators"]
    return counts


_COMPARED = ("total", "sorts", "waits", "kept_bytes")


def risen(now: dict[str, Any], before: dict[str, Any], prefix: str = "") -> list[str]:
    """Counts that are larger than before, or new; those that are gone count as neither."""
    lines = []
    for key, value in now.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            lines += risen(value, before.get(key, {}), f"{name}/")
        elif key in _COMPARED or prefix.endswith("layout/"):
            was = before.get(key)
            if was is None or value > was:
                lines.append(f"{name}: {value}, before {'nothing' if was is None else was}")
    return lines


def _of_which(parts: dict[str, int]) -> str:
    return ", ".join(f"{part} {parts[part]}" for part in PARTS if part in parts)


def _table(found: dict[str, Any]) -> str:
    rows = []
    for name, counts in found.items():
        layout = counts["layout"]
        rows.append((name, "layout", str(layout["operations"]), str(layout["launches"]),
                     f"{layout['waits']} waits for the device, "
                     f"{layout['waits_to_use']} to use it"))
        for way in WAYS:
            parts = counts[way]["launches"]
            rows.append((name, way, str(counts[way]["operations"]["total"]), str(parts["total"]),
                         _of_which(parts)))
        for way, step in counts.get("training", {}).items():
            parts = step["launches"]
            rows.append((name, f"training, {way}", str(step["operations"]["total"]),
                         str(parts["total"]), f"{_of_which(parts)}; {step['sorts']} sorts, "
                         f"{step['waits']} waits, {step['kept_bytes']} bytes kept"))
    return markdown_table(("generator", "way", "operations", "launches", "of which"), rows)


def main(arguments: list[str] | None = None) -> int:
    """Print the counts, and write them; 1 where one has risen since the last record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--maps", help="folder of label maps in place of the project's scenes")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--names", metavar="GENERATOR/WAY", help="list one forward's launches")
    options = parser.parse_args(arguments)
    maps = Maps(options.maps)
    if options.names:
        name, _, way = options.names.partition("/")
        training = way.removeprefix("training-")
        ways = (*WAYS, *(f"training-{way}" for way in TRAINING_WAYS))
        if name not in GENERATORS or way not in ways:
            parser.error(f"--names: expected one of {', '.join(GENERATORS)} and / and one of "
                         f"{', '.join(ways)}; got {options.names!r}")
        layout, _ = count_layout(name, maps)
        count = (count_forward(name, layout, way) if training == way
                 else count_training(name, layout, training)[0])
        names = count.names
        print(markdown_table(("part", "launch", "times"),
                             [(part, what, str(n)) for (part, what), n in names.most_common()]))
        return 0
    found = measure(maps)
    print(_table(found))
    if options.out is not None:
        place = "the project's scenes" if options.maps is None else Path(options.maps).name
        known = {k: v for k, v in versions().items() if k in ("smis_kernels", "torch", "python")}
        content = {"commit": commit(), "versions": known, "maps": place, "dtype": "bfloat16",
                   "batch": 1, "generators": found}
        write_atomically(options.out, (json.dumps(content, indent=1) + "\n").encode())
    if options.maps is None and list(RESULTS.glob("launches-*-scenes.json")):
        lines = risen(found, last_record())
        print("\n".join(lines) or "no count has risen since the last record")
        return int(bool(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
