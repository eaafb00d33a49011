"""``accelerate`` and ``restore``: fused forwards put into an existing network, and taken out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import folding
from .formats import Network
from .graphed import GraphedNetwork
from .recognise import BLOCK, KINDS, NORM, SPECTRAL_NORM, Finding, Recognition, networks
from .report import Difference, Report, Row
from .swap import CALLS, PLAN, SETTINGS, Accelerated, Change, Step
from .watch import original_type


def accelerate(
    model: nn.Module, *, inference: bool = False, cuda_graph: bool = False,
    modules: Iterable[str] | None = None, dry_run: bool = False, verify: Any = None,
) -> Report:
    r"""Put fused forwards into a model that was written elsewhere; nothing else about it changes.

    A conditional norm is known by what it computes, recorded as it runs once: :math:`N(x) (o +
    G(m)) + B(m)`, where N is any normalisation, or none, o any number, and G and B are made of the
    map m, resized by nearest or not, by any convs, activations, norms of the image, or tables of
    classes. Names, classes and wrappers do not matter. Window tables serve where G and B see no
    more than 5x5 pixels of the map, padded by zeros; else their convs run as they were written, and
    the features are modulated in one pass. What is near it is listed with the term that differs; 3D
    norms are, for the kernels take (N, C, H, W). Blocks of two or three such norms, or of this
    library's own, are recorded likewise: each norm takes in the activation after it, a conv the sum
    after it. Known by structure: per-pixel depthwise convs (an ``nn.Unfold`` and a weight
    argument), sequences with instance norms, encoders that pool by instance; and torch's own
    spectral norm, which takes fewer passes in training on a CPU. Of each configuration but of the
    latter the narrowest is run beside its fused form on small random inputs, on every path,
    outputs, gradients and buffers, in training and in eval mode, at three scales; where they do not
    agree it is left alone, and the report says so. On a CPU calls that are too small for it to pay
    run as they were written, and blocks whose norms have no tables stay.

    Parameters, buffers, state dict and hooks stay as they are, for only the classes of the modules
    change: the model can be trained, saved, pickled, copied and wrapped as before. Within
    blocks features are channels-last; what a block or the model returns has the format that came
    in. Gradients of gradients are right; they take the ops' definitions.

    What may change afterwards, and is seen in the next call: weights and buffers, by whatever means
    (where constants are made of them their content is compared, in one read); hooks and parts; the
    training mode of every part; attributes of the modules, numbers, containers, plain objects and
    tensors; methods and class attributes of their classes; ``forward`` put on an instance. Where a
    call or a module is unlike what was probed, the original forward runs,
    :func:`smis_kernels.explain` and ``report.calls_left`` show it, and a warning says so once; so
    it does, without a warning, under ``torch.jit.trace``, forward-mode differentiation and
    ``torch.func`` (vmap, grad, jvp), which the kernels do not serve. Not seen: globals and
    closures that a forward reads, and, inside ``torch.compile``, what changes after it was
    compiled: accelerate, and compile, anew.

    Calling it again starts over from the original; :func:`restore` returns to it.

    Args:
        model: any module, on any device; a DistributedDataParallel wrapper too.
        inference: in eval mode, where no weight asks for a gradient, treat weights as constants:
            spectral norm is computed once, batch norms become part of the conv before. Whatever
            is written to them is seen. On the CPU: elsewhere checking would mean waiting.
        cuda_graph: with ``inference``, on a GPU: a call without gradients or autocast, of a kind
            that has been seen twice, is one launch: a replay of a CUDA graph, which reads the
            weights where they lie, and inputs and compiled maps from copies. Each capture is
            compared with calls; where it fails, a warning says so, and calls run as without it.
            Calls of another kind, or with hooks inside, run so too. It holds the memory of a call.
            A replay runs no Python: what a forward counts, prints or draws from generators of its
            own happens at captures alone, and changes inside objects and modules that are not
            registered as parts are not seen. One thread at a time where weights have hooks. Not
            yet run on a GPU.
        modules: kinds ("norm", "block", "conv", "pixel_conv", "norm_act", "instance_pool",
            "spectral_norm"), or modules' names or patterns such as ``"up_*"``, to which it is
            confined; None: all.
        dry_run: only report.
        verify: a tensor, or a tuple or dict of arguments of the model, which is run on them
            both ways, twice each, in its present mode, without gradients; the report has the
            largest difference and how many times as fast it was.

    Returns:
        A :class:`Report`; ``print`` it for a table.

    Raises:
        TypeError, ValueError: ``model`` is no module, is compiled or has no weights yet; an entry
            of ``modules`` fits nothing. Whatever is raised, by ``verify`` too: the model is then
            what it was before the call.

    Paper: Park et al., "Semantic Image Synthesis with Spatially-Adaptive Normalization", 2019;
    Zhu et al., "Semantically Multi-modal Image Synthesis", 2020.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.InstanceNorm2d(8), torch.nn.ReLU())
        >>> report = accelerate(model, verify=torch.randn(1, 8, 16, 16))
        >>> len(report.replaced), report.difference.largest < 1e-5
        (1, True)
    """
    _check(model)
    earlier, steps = _applied(model), []
    try:
        for step in earlier:
            step.undo()
        before, slow = (None, 0.0) if verify is None else _timed(model, verify)
        findings = Recognition(inference).findings(model)
        chosen = _chosen(model, findings, modules)
        steps = _steps(model, chosen, GraphedNetwork if inference and cuda_graph else Network)
        for step in steps:
            step.apply()
        difference = gain = None
        if before is not None:
            after, fast = _timed(model, verify)
            difference, gain = _difference(before, after), slow / fast
    except BaseException:
        _undo(steps, earlier)
        raise
    if dry_run:
        _undo(steps, earlier)
    calls = {f.name: f.change.calls for f in chosen if isinstance(f.change, Change)}
    return Report(tuple(_row(f, chosen) for f in findings), difference, gain, dry_run, calls)


def _undo(steps: Sequence[Step], earlier: Sequence[Step]) -> None:
    for step in reversed(steps):
        step.undo()
    for step in earlier:
        step.apply()


def _row(finding: Finding, chosen: Collection[Finding]) -> Row:
    replaced = finding in chosen
    note = finding.note or ("" if replaced else "not asked for")
    return Row(finding.name, original_type(finding.module).__name__, finding.kind, replaced, note)


def restore(model: nn.Module) -> int:
    """Undo :func:`accelerate`: every module has its own class again. Returns how many had not.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.InstanceNorm2d(8), torch.nn.ReLU())
        >>> _ = accelerate(model)
        >>> restore(model), restore(model)
        (1, 0)
    """
    steps = _applied(model)
    for step in steps:
        step.undo()
    return len(steps)


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, (torch.jit.ScriptModule, torch.fx.GraphModule)) or hasattr(
            model, "_orig_mod"):
        raise TypeError(f"model: expected one that is not compiled or traced, got "
                        f"{type(model).__name__}; accelerate it first, then compile")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("model: expected weights in memory, got some on the meta device; load "
                         "its checkpoint first")


def _applied(model: nn.Module) -> list[Step]:
    """What has been done to a model, as steps that can be undone and done again."""
    steps: list[Step] = []
    for module in model.modules():
        if isinstance(module, Accelerated):
            own = vars(module)
            steps.append(Change(module, module._smis_mixin, own.get(PLAN), own.get(SETTINGS),
                                own.get(CALLS, Counter())))
        steps += folding.swapped_hooks(module)
    return steps


def _chosen(model: nn.Module, findings: Sequence[Finding],
            modules: Iterable[str] | None) -> list[Finding]:
    """The findings to act on: those asked for, and the norms of the blocks among them."""
    possible = [f for f in findings if f.change is not None]
    if modules is None:
        return possible
    wanted = [modules] if isinstance(modules, str) else list(modules)
    names = [name for name, _ in model.named_modules()]
    for entry in wanted:
        if entry not in KINDS and not any(_fits(name, entry) for name in names):
            raise ValueError(f"modules: expected a kind ({', '.join(KINDS)}) or the name or "
                             f"pattern of a module, got {entry!r}, which fits none")
    asked = [f for f in possible
             if any(f.kind == entry or _fits(f.name, entry) for entry in wanted)]
    parts = {part for f in asked if f.kind == BLOCK for part in f.module.modules()}
    return [f for f in possible if f in asked or (f.kind == NORM and f.module in parts)]


def _fits(name: str, entry: str) -> bool:
    """Whether a module or one that it lies in is named by an entry."""
    parents = accumulate(name.split("."), "{}.{}".format)
    return any(fnmatchcase(parent, entry) for parent in parents)


def _steps(model: nn.Module, chosen: Sequence[Finding], outermost: type[Network]) -> list[Step]:
    steps = [f.change for f in chosen if f.change is not None]
    inside = {f.module for f in chosen if f.kind in (NORM, BLOCK)}
    taken = {f.module for f in chosen if f.kind != SPECTRAL_NORM}
    return [*steps, *networks(model, inside, taken, outermost)]


def _outputs(model: nn.Module, arguments: Any) -> list[Tensor]:
    """The tensors that a model returns; its buffers and the random state stay as they are."""
    args: Sequence[Any] = arguments if isinstance(arguments, (tuple, list)) else (arguments,)
    kwargs: Mapping[str, Any] = {}
    if isinstance(arguments, Mapping):
        args, kwargs = (), arguments
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(list(devices)), torch.no_grad():
            return [t for t in tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def _timed(model: nn.Module, arguments: Any) -> tuple[list[Tensor], float]:
    """What a model returns, and the seconds of the faster of two calls."""
    seconds = []
    for _ in range(2):
        start = perf_counter()
        found = _outputs(model, arguments)
        if any(t.is_cuda for t in found):
            torch.cuda.synchronize()
        seconds.append(perf_counter() - start)
    return found, min(seconds)


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> Difference:
    largest, scale = 0.0, 0.0
    if [t.shape for t in before] != [t.shape for t in after]:
        return Difference(float("inf"), scale)
    for a, b in zip(before, after, strict=True):
        if a.numel():
            a, b = a.double(), b.double()
            same = (a == b) | (a.isnan() & b.isnan())
            error = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
            largest = max(largest, float(error.max()))
            scale = max(scale, float(a.abs().nan_to_num().max()))
    return Difference(largest, scale)
