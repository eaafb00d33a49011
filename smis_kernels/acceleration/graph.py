"""What a forward computes, recorded as it runs: which functions on which results, whoever calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode, resolve_name

from .watch import is_patched

FEATURES, MAP = 0, 1  # the first two steps of a graph: its inputs
MOST_STEPS = 200  # of what can still be one norm

# Functions that only ask about a tensor: what follows from sizes is probed at several of them.
_QUESTIONS = {"shape", "size", "dim", "ndim", "ndimension", "dtype", "device", "is_cuda", "layout",
              "is_floating_point", "requires_grad", "numel", "nelement", "stride", "is_contiguous",
              "__len__", "element_size", "itemsize", "is_sparse", "is_quantized", "names",
              "is_leaf", "_version", "grad_fn", "is_complex", "is_inference", "is_mps", "is_cpu"}
_SAME = {"__radd__": "add", "__iadd__": "add", "__rmul__": "mul", "__imul__": "mul",
         "multiply": "mul", "__isub__": "sub", "subtract": "sub", "divide": "div",
         "true_divide": "div", "__truediv__": "div", "__itruediv__": "div", "__rpow__": "rpow",
         "__pow__": "pow", "__ipow__": "pow", "negative": "neg", "__neg__": "neg",
         "__add__": "add", "__mul__": "mul", "__sub__": "sub", "concat": "cat",
         "concatenate": "cat", "__matmul__": "matmul"}
_REVERSED = {"__rsub__": "sub", "rsub": "sub", "__rtruediv__": "div", "__rdiv__": "div"}
# Whose result is their argument, as far as values go.
_IDENTITIES = {"contiguous", "clone"}
ARITHMETIC = ("add", "sub", "mul", "div")
# As they were when this library was loaded: torch's classes may be patched, too.
_CONV = (nn.Conv2d.forward, nn.Conv2d._conv_forward)
_CONV_TRANSPOSE = (nn.ConvTranspose2d.forward, nn.ConvTranspose2d._output_padding)
_INSTANCE_NORM = (_InstanceNorm.forward, _InstanceNorm._apply_instance_norm)


@dataclass(frozen=True)
class Ref:
    """The place of a tensor among a function's arguments: the number of its step."""

    step: int


@dataclass(frozen=True)
class Step:
    """One operation on results of earlier steps.

    ``op``: "features", "map", "number", "tensor" (a parameter or buffer), "module" (a part that is
    called as one), "norm" (one that takes features and a map), "item" (of a function's several
    results), or a torch function's name.
    ``settings``: the number; the name; or the arguments, with :class:`Ref` in tensors' places.
    """

    op: str
    inputs: tuple[int, ...] = ()
    settings: Any = None


@dataclass(frozen=True)
class Graph:
    """Steps, each after those that it reads, and which of them is the output."""

    steps: tuple[Step, ...]
    output: int


def outline(steps: Sequence[Step]) -> Any:
    """What steps that differ in widths alone have in common."""
    def masked(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(masked, value))
        return "width" if type(value) is int and value > 4 else value

    return tuple((s.op, s.inputs, masked(s.settings)) for s in steps)


# Puts the arguments of a call in order: features, map; None where it is one of another kind.
Order = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, ...] | None]


class Unclear(Exception):
    """What a forward does cannot be recorded; the message says what."""


def is_plain_conv(module: nn.Module | None) -> bool:
    """Whether it is a conv that computes what nn.Conv2d does, whatever its weight comes from."""
    if not isinstance(module, nn.Conv2d):
        return False
    return type(module).forward is _CONV[0] and convolves(module)


def is_plain_conv_transpose(module: nn.Module) -> bool:
    """The same for nn.ConvTranspose2d."""
    if not isinstance(module, nn.ConvTranspose2d):
        return False
    return type(module).forward is _CONV_TRANSPOSE[0] and convolves(module)


def is_plain_instance_norm(module: _InstanceNorm) -> bool:
    """Whether an instance norm computes what torch's do."""
    cls = type(module)
    return (cls.forward, cls._apply_instance_norm) == _INSTANCE_NORM and not is_patched(module)


def convolves(module: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Whether what its forward calls is torch's: neither the class nor the instance has another."""
    cls: Any = type(module)
    own = cls._conv_forward is _CONV[1] if isinstance(module, nn.Conv2d) else (
        cls._output_padding is _CONV_TRANSPOSE[1])
    return own and not is_patched(module)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a call of it is one step: torch's own layers, and norms whatever their code."""
    if is_plain_conv(module) or isinstance(module, _NormBase):
        return True
    return type(module).__module__.startswith("torch.nn.modules.") and not module._modules and (
        not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)))


def _name_of(func: Any) -> tuple[str, str]:
    """Where a function lives ("Tensor", "torch" or "functional"), and its name."""
    path = resolve_name(func) or f"torch.{getattr(func, '__name__', 'an unknown function')}"
    parts = path.removesuffix(".__get__").split(".")
    origin = parts[-2] if parts[-2] in ("Tensor", "functional") else "torch"
    return "torch" if path.startswith("torch.functional.") else origin, parts[-1]


class _Recorder(TorchFunctionMode):
    """Records the functions that a forward calls on tensors."""

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.paused = 0
        self._of: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no id is given to another tensor
        self._names = {id(t): name for name, t in (*module.named_parameters(),
                                                   *module.named_buffers())}
        self._plain = {id(value) for part in module.modules() for value in vars(part).values()
                       if isinstance(value, Tensor)}
        for op, tensor in zip(("features", "map"), inputs, strict=True):
            self._note(tensor, Step(op))

    def _note(self, tensor: Tensor, step: Step) -> int:
        if len(self.steps) >= MOST_STEPS:
            raise Unclear(f"it takes more than {MOST_STEPS} steps")
        self.steps.append(step)
        self._of[id(tensor)] = len(self.steps) - 1
        self._kept.append(tensor)
        return len(self.steps) - 1

    def step_of(self, tensor: Tensor) -> int:
        found = self._of.get(id(tensor))
        if found is not None:
            return found
        if id(tensor) in self._names:
            return self._note(tensor, Step("tensor", (), self._names[id(tensor)]))
        # Watched by its content; as a number it would get no gradient.
        if tensor.dim() == 0 and id(tensor) in self._plain and not tensor.requires_grad:
            return self._note(tensor, Step("number", (), float(tensor)))
        return self._note(tensor, Step("a tensor from elsewhere"))

    def _arguments(self, values: Any) -> tuple[Any, tuple[int, ...]]:
        inputs: list[int] = []

        def look(value: Any) -> Any:
            if isinstance(value, Tensor):
                inputs.append(self.step_of(value))
                return Ref(inputs[-1])
            if isinstance(value, (list, tuple)):
                return tuple(look(v) for v in value)
            if isinstance(value, dict):
                return tuple(sorted((k, look(v)) for k, v in value.items()))
            if isinstance(value, slice):
                return ("slice", look(value.start), look(value.stop), look(value.step))
            return value

        return look(values), tuple(inputs)

    def _called(self, origin: str, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Note the results of a function."""
        template, inputs = self._arguments((tuple(args), {k: v for k, v in kwargs.items()
                                                          if k != "inplace"}))
        whole = out if isinstance(out, (tuple, list)) else (out,)
        if not all(isinstance(part, Tensor) for part in whole):
            raise Unclear(f"it asks for values ({name})")
        step = Step(name, inputs, (origin, *template))
        if isinstance(out, Tensor):
            self._note(out, step)
            return
        several = self._note(torch.empty(0), step)
        for i, part in enumerate(whole):
            self._note(part, Step("item", (several,), i))

    def module_called(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Note the result of a part that is one step."""
        template, inputs = self._arguments((tuple(args), dict(kwargs)))
        if not isinstance(out, Tensor) or template != ((Ref(inputs[0]) if inputs else None,), ()):
            raise Unclear(f"{name} is called with more than one tensor, or returns none")
        if self._of.get(id(out)) in (FEATURES, MAP):
            raise Unclear(f"it writes to its input ({name})")
        self._note(out, Step("module", inputs, name))

    def norm_called(self, name: str, order: Order, args: Any, kwargs: Any, out: Any) -> None:
        """Note the result of a conditional norm."""
        given = order(tuple(args), dict(kwargs))
        if given is None or not all(isinstance(t, Tensor) for t in (out, *given)):
            raise Unclear(f"{name} is called with other arguments than features and a map")
        self._note(out, Step("norm", tuple(map(self.step_of, given)), name))

    def _arithmetic(self, name: str, left: Any, right: Any, out: Tensor) -> None:
        places = []
        for value in (left, right):
            if isinstance(value, Tensor):
                places.append(self.step_of(value))
            else:
                places.append(self._note(torch.empty(0), Step("number", (), float(value))))
        self._note(out, Step(name, tuple(places)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        origin, name = _name_of(func)
        if self.paused or name in _QUESTIONS or out is NotImplemented:
            return out
        in_place = name.endswith("_") and not name.endswith("__")
        reverse = name in _REVERSED
        plain = _REVERSED.get(name) or _SAME.get(name, name.rstrip("_") if in_place else name)
        if not isinstance(out, (Tensor, tuple, list)) and not any(
                isinstance(a, Tensor) for a in (*args, *kwargs.values())):
            return out  # a switch, or a question about one
        if out is None:
            raise Unclear(f"it writes into a tensor ({name})")
        if (in_place or name[:3] == "__i") and self._of.get(id(out)) in (FEATURES, MAP):
            raise Unclear(f"it writes to its input ({name})")
        numbers = all(isinstance(a, (Tensor, int, float)) for a in args)
        if not isinstance(out, Tensor):
            self._called(origin, plain, args, kwargs, out)
        elif plain in ARITHMETIC and len(args) == 2 and not kwargs and numbers:
            left, right = reversed(args) if reverse else args
            self._arithmetic(plain, left, right, out)
        elif plain == "neg":
            self._arithmetic("mul", args[0], -1.0, out)
        elif plain in _IDENTITIES:
            self._of[id(out)] = self.step_of(args[0])
            self._kept.append(out)
        elif plain == "relu":
            self._note(out, Step("relu", (self.step_of(args[0]),)))
        elif plain == "leaky_relu":
            given = inspect.signature(F.leaky_relu).bind(*args, **kwargs)
            given.apply_defaults()
            self._note(out, Step("leaky_relu", (self.step_of(args[0]),),
                                 float(given.arguments["negative_slope"])))
        else:
            self._called(origin, plain, args, kwargs, out)
        return out


@contextmanager
def _leaves_recorded(module: nn.Module, recorder: _Recorder,
                     norms: Mapping[str, Order]) -> Iterator[None]:
    """Calls of parts that are one step are noted as such."""
    leaves = {name: part for name, part in module.named_modules() if name in norms or (
        name and _is_leaf(part) and type(part) is not nn.Identity)}

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            recorder.paused += 1
            try:
                out = original(*args, **kwargs)
            finally:
                recorder.paused -= 1
            if not recorder.paused and name in norms:
                recorder.norm_called(name, norms[name], args, kwargs, out)
            elif not recorder.paused:
                recorder.module_called(name, args, kwargs, out)
            return out
        return forward

    try:
        for name, part in leaves.items():
            vars(part)["forward"] = wrapped(name, part.forward)
        yield
    finally:
        for part in leaves.values():
            vars(part).pop("forward", None)


def record(module: nn.Module, features: Tensor, segmap: Tensor,
           arguments: Sequence[Tensor] | None = None, *,
           norms: Mapping[str, Order] | None = None) -> Graph:
    """What ``module(features, segmap)`` computes, run once.

    Args:
        module: one to experiment on: it is run.
        arguments: both in the order that it takes them, where that is another.
        norms: names of its conditional norms, which are one step each, and the order of what they
            take.

    Raises:
        Unclear: it cannot be recorded. Whatever the module raises.
    """
    recorder = _Recorder(module, (features, segmap))
    with _leaves_recorded(module, recorder, norms or {}), torch.no_grad(), recorder:
        out = module(*(arguments or (features, segmap)))
    if not isinstance(out, Tensor):
        raise Unclear(f"it returns {type(out).__name__}, not a tensor")
    return pruned(recorder.steps, recorder.step_of(out))


def pruned(steps: Sequence[Step], output: int) -> Graph:
    """The steps that the output depends on; the inputs stay first."""
    wanted = {FEATURES, MAP, output}
    for i in range(len(steps) - 1, -1, -1):
        if i in wanted:
            wanted.update(steps[i].inputs)
    place = {old: new for new, old in enumerate(sorted(wanted))}

    def renamed(value: Any) -> Any:
        if isinstance(value, Ref):
            return Ref(place[value.step])
        return tuple(map(renamed, value)) if isinstance(value, tuple) else value

    kept = tuple(Step(steps[i].op, tuple(place[j] for j in steps[i].inputs),
                      renamed(steps[i].settings)) for i in sorted(wanted))
    return Graph(kept, place[output])


_ORIGINS = {"Tensor": Tensor, "functional": F, "torch": torch}


def call(step: Step, values: Callable[[int], Any]) -> Any:
    """Do a step that is a torch function, anew."""
    def look(value: Any) -> Any:
        if isinstance(value, Ref):
            return values(value.step)
        if isinstance(value, tuple):
            return slice(*map(look, value[1:])) if value[:1] == ("slice",) else tuple(
                map(look, value))
        return value

    origin, args, kwargs = step.settings
    function = getattr(_ORIGINS[origin], step.op)
    return function(*map(look, args), **{k: look(v) for k, v in kwargs})
