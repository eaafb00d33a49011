"""A network's calls in inference as CUDA graphs: one launch in place of one for each kernel."""

from __future__ import annotations

import random
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..layout.label_layout import LabelLayout
from ..layout.scope import given_layouts, layout_of, scoped_layouts
from ..layout.static_layout import StaticLayout
from ..ops.content_digest.stamp import Stamp
from ..runtime.graphs import apart, capture, circumstances, difference
from .formats import Network
from .swap import REPLAYS
from .watch import Settings, hooked, original_type

MOST_GRAPHS = 2  # of a network at a time: each holds the memory of a call
MOST_CAPTURES = 32  # calls that are ever of a new kind are not worth it
MOST_KINDS = 8  # that are remembered as seen once
MOST_CHANGES = 8  # of a network's parts or attributes, after which it is left alone
# How near replays come to the network as it runs elsewhere: tables of other lengths may be
# multiplied by other kernels, with other sums.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)

Record = Callable[[Callable[[], list[Tensor]], torch.device], Callable[[], list[Tensor]]]


class GraphedNetwork(Network):
    """A network whose calls on a GPU are replayed, where a replay is what the call would be."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _on_gpu((*args, *kwargs.values())):
            return super().forward(*args, **kwargs)
        replays: CallReplays | None = vars(self).get(REPLAYS)
        if replays is None:
            replays = vars(self).setdefault(REPLAYS, CallReplays())
        return replays.run(self, super().forward, args, kwargs)


def _on_gpu(given: Sequence[Any]) -> bool:
    return any(isinstance(value, Tensor) and value.is_cuda for value in given)


class CallReplays:
    """The graphs of one network; a copy of the network makes its own.

    A call of a kind (shapes, memory formats, other arguments, the weights' places, circumstances)
    runs eagerly the first time. The second is captured beside it, and replays are compared with
    calls, on changed inputs too; further calls of this kind are replays. Weights may change in
    place, for replays read them; whatever else differs from the capture makes another kind of call,
    or one that runs eagerly. Where the capture or the comparison fails, a warning says so once, and
    the network runs eagerly from then on.

    Args:
        record: makes a replay of a call: :func:`capture`.
    """

    def __init__(self, record: Record = capture) -> None:
        self._record = record
        self._lock = threading.Lock()  # buffers serve one call at a time
        self._graphs: OrderedDict[Hashable, _Replay] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()  # kinds that ran eagerly last
        self._captures = 0
        self._settings: Settings | None = None
        self._changes = 0
        self.failed: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return CallReplays, (self._record,)

    def run(self, model: nn.Module, call: Callable[..., Any], args: tuple[Any, ...],
            kwargs: Mapping[str, Any]) -> Any:
        """``call(*args, **kwargs)``, the network's own forward, or a replay of it."""
        if self.failed is not None or not self._lock.acquire(blocking=False):
            return call(*args, **kwargs)
        try:
            kind = self._kind(model, args, kwargs)
            if kind is None:
                return call(*args, **kwargs)
            graph, given = self._graphs.get(kind), (*args, *kwargs.values())
            if graph is not None and graph.load(given):
                self._graphs.move_to_end(kind)
                self._seen.pop(kind, None)
                return graph.replayed()
            if kind in self._seen:
                del self._seen[kind]
                return self._captured(model, call, kind, args, kwargs)
            self._seen[kind] = None
            if len(self._seen) > MOST_KINDS:
                self._seen.popitem(last=False)
            return call(*args, **kwargs)
        finally:
            self._lock.release()

    def _captured(self, model: nn.Module, call: Callable[..., Any], kind: Hashable,
                  args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The call, and a graph of it for those to come."""
        given = (*args, *kwargs.values())
        self._graphs.pop(kind, None)
        while len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)
        try:
            if self._captures >= MOST_CAPTURES:
                raise RuntimeError(f"{MOST_CAPTURES} were captured, for ever new kinds of calls")
            made = _Replay(call, tuple(kwargs), given)
            before = _State(model, given)
        except Exception as error:
            self._fail(model, error)
            return call(*args, **kwargs)
        output = call(*args, **kwargs)
        try:
            problem = before.change(model)
            if problem is not None:
                raise RuntimeError(problem)
            self._captures += 1
            made.learn(_Output(output), [*before.inputs, *_weights(model)])
            made.capture(self._record)
            made.check(given)
            self._graphs[kind] = made
        except Exception as error:  # a driver's, torch's, or the comparison's
            self._fail(model, error)
        return output

    def _fail(self, model: nn.Module, reason: object) -> None:
        self.failed = str(reason).partition("\n")[0]
        self._graphs.clear()
        warnings.warn(f"accelerate: {original_type(model).__name__} has no CUDA graph from now on: "
                      f"{self.failed}", stacklevel=2)

    def _kind(self, model: nn.Module, args: tuple[Any, ...],
              kwargs: Mapping[str, Any]) -> Hashable | None:
        """What a call has to have in common with another to be its replay; None: with none."""
        given = (*args, *kwargs.values())
        device = next(value.device for value in given if isinstance(value, Tensor))
        around, shapes = circumstances(device), _shapes(given, device)
        if around is None or shapes is None or not self._is_as_it_was(model):
            return None
        weights = _weights(model)
        if any(t.device != device for t in weights):  # a number of the host would be a constant
            return None
        places = tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in weights)
        return len(args), tuple(kwargs), shapes, around, places

    def _is_as_it_was(self, model: nn.Module) -> bool:
        """Whether it is in eval mode, without hooks inside, and of the parts that graphs are of."""
        if self._settings is None:
            self._settings = Settings(model)
        settings = self._settings
        if settings.modules[0] is not model or any(part.training for part in settings.modules):
            return False
        if settings.is_as_noted():
            return True
        if hooked(*settings.modules[1:], weights=False):
            return False
        change = settings.change()
        if change is None:
            settings.note()
            return True
        self._graphs.clear()
        self._seen.clear()
        self._settings = None
        self._changes += 1
        if self._changes > MOST_CHANGES:
            self._fail(model, f"{change} again and again")
        return False


def _weights(model: nn.Module) -> list[Tensor]:
    return [t for m in model.modules() for held in (m._parameters, m._buffers)
            for t in held.values() if t is not None]


def _shapes(given: Sequence[Any], device: torch.device) -> tuple[Hashable, ...] | None:
    """The arguments but for their content; None where they cannot be copied into buffers."""
    found: list[Hashable] = []
    places: dict[int, int] = {}
    for i, value in enumerate(given):
        if type(value) is Tensor:
            if value.device != device or value.layout != torch.strided or value.requires_grad:
                return None
            if torch.empty_like(value, device="meta").stride() != value.stride():  # gaps
                return None
            # A tensor that is given twice is one.
            first = places.setdefault(id(value), i)
            found.append((first, value.shape, value.stride(), value.dtype))
        elif isinstance(value, _PLAIN):
            found.append((type(value), repr(value)))  # 0.0 is not -0.0
        else:
            return None
    return tuple(found)


class _State:
    """What a forward is not to change: weights, inputs, the state of random numbers."""

    def __init__(self, model: nn.Module, given: Sequence[Any]) -> None:
        self._weights = Stamp(_weights(model))
        self.inputs = [value for value in given if isinstance(value, Tensor)]
        self._copies = [t.clone() for t in self.inputs]
        self._random = self._random_state()

    def _random_state(self) -> tuple[Any, ...]:
        devices = {t.device for t in self.inputs if t.is_cuda}
        states = [torch.random.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        numpy: Any = np.random.get_state()
        return (random.getstate(), numpy[1].tobytes(), numpy[2],
                *(state.numpy().tobytes() for state in states))

    def change(self, model: nn.Module) -> str | None:
        if not self._weights.holds(_weights(model)):
            return "it writes to its weights or buffers"
        if any(map(apart, self.inputs, self._copies)):
            return "it writes to its inputs"
        return "it draws random numbers" if self._random_state() != self._random else None


class _Output:
    """What a network returned: its tensors, and how they are put together."""

    def __init__(self, value: Any) -> None:
        leaves, self._spec = tree_flatten(value)
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tensors: list[Tensor] = [leaves[i] for i in self._places]

    def of(self, tensors: Sequence[Tensor]) -> Any:
        """The same with other tensors."""
        leaves = [*self._others]
        for i, tensor in zip(self._places, tensors, strict=True):
            leaves[i] = tensor
        return tree_unflatten(leaves, self._spec)

    def problem(self, taken: Sequence[Tensor]) -> str | None:
        """Why it cannot be replayed, if so; ``taken``: tensors that are not its own."""
        if not self.tensors or not all(isinstance(leaf, _PLAIN) for leaf in self._others):
            return "it returns other things than tensors and plain values"
        device = taken[0].device
        if any(t.device != device or t.layout != torch.strided or t.is_complex()
               for t in self.tensors):
            return "it returns tensors of another device or kind"
        memory = {t.untyped_storage().data_ptr() for t in taken if t.numel()}
        if any(t.untyped_storage().data_ptr() in memory for t in self.tensors):
            return "it returns memory of its inputs or weights"
        return None


class _Replay:
    """One kind of call on buffers of its own, into which inputs and their layouts are copied."""

    def __init__(self, call: Callable[..., Any], names: tuple[str, ...],
                 given: Sequence[Any]) -> None:
        self._function, self._names = call, names
        copies: dict[int, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():  # writes to buffers are to leave traces
            for value in given:
                if isinstance(value, Tensor) and id(value) not in copies:
                    copies[id(value)] = value.clone()
        self._buffers = [copies.get(id(value), value) for value in given]
        self._device = next(iter(copies.values())).device
        self._layouts: dict[int, StaticLayout | None] = {}  # of buffers that are maps
        self._loaded: dict[int, LabelLayout] = {}
        self._output: _Output
        self._replay: Callable[[], list[Tensor]]

    def _called(self) -> _Output:
        split = len(self._buffers) - len(self._names)
        keywords = dict(zip(self._names, self._buffers[split:], strict=True))
        return _Output(self._function(*self._buffers[:split], **keywords))

    def learn(self, output: _Output, taken: Sequence[Tensor]) -> None:
        """See which buffers are label maps, and bring their layouts into buffers too.

        Raises:
            RuntimeError: why the call cannot be replayed.
        """
        problem = output.problem(taken)
        if problem is not None:
            raise RuntimeError(problem)
        self._output = output
        with given_layouts(()):
            self._called()
            met = scoped_layouts()
        for tensor, layout in met:
            i = next((i for i, b in enumerate(self._buffers) if b is tensor), None)
            if i is None:
                raise RuntimeError("it makes label maps of its own")
            self._layouts[i] = None if layout is None else StaticLayout(layout)

    def _on_buffers(self) -> list[Tensor]:
        """What the graph is of: the call on the buffers, layouts too."""
        layouts = [(self._buffers[i], None if static is None else static.layout)
                   for i, static in self._layouts.items()]
        with given_layouts(layouts):
            return self._called().tensors

    def capture(self, record: Record) -> None:
        self._replay = record(self._on_buffers, self._device)

    def load(self, given: Sequence[Any]) -> bool:
        """Copy inputs into the buffers, and the layouts of maps; whether there is room for them."""
        found: list[tuple[int, StaticLayout, LabelLayout]] = []
        for i, static in self._layouts.items():
            if static is None:
                continue
            layout = layout_of(given[i])
            if layout is None:
                return False
            for size in static.sizes:
                layout.level(size)
            if not static.fits(layout):
                return False
            found.append((i, static, layout))
        for buffer, value in zip(self._buffers, given, strict=True):
            if isinstance(buffer, Tensor):
                buffer.copy_(value)
        for i, static, layout in found:
            if self._loaded.get(i) is not layout:
                static.load(layout)
                self._loaded[i] = layout
        return True

    def replayed(self) -> Any:
        """What the network returns for what the buffers hold, in memory of its own."""
        return self._output.of([t.clone() for t in self._replay()])

    def check(self, given: Sequence[Any]) -> None:
        """Compare replays with calls: on these inputs mirrored, and on these.

        Raises:
            RuntimeError: they differ; the message says by how much.
        """
        mirrored = [t.flip(-1) if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1
                    else t for t in given]
        if self.load(mirrored):
            self._compared()
        if not self.load(given):
            raise RuntimeError("its label maps do not fit their own buffers; give compiled layouts")
        for a, b in zip(self._compared(), self._output.tensors, strict=True):
            finite = b.double().abs().nan_to_num(posinf=0)
            error = apart(a, b) / max(float(finite.max()) if b.numel() else 0.0, 1e-30)
            if not error <= TOLERANCE.get(a.dtype, 0.0):
                raise RuntimeError(f"a replay is {error:.2g} of its size from the network's output")
        self._output.tensors = []  # the caller's

    def _compared(self) -> list[Tensor]:
        """A replay, which is what the call on the buffers gives."""
        replayed = [t.clone() for t in self._replay()]
        problem = difference(replayed, self._on_buffers(), self._on_buffers)
        if problem is not None:
            raise RuntimeError(problem)
        return replayed
