"""Which modules of a model can be fused: by structure, then by a probe of each configuration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.spectral_norm import FusedSpectralNorm
from . import blocks, folding, layers, norms, sequences
from .formats import Network
from .probe import Verdict, default_modes
from .swap import Change, FusionPlan, Step
from .watch import OWN, original_type, weight_hooks

NORM, BLOCK, CONV, PIXEL_CONV = "norm", "block", "conv", "pixel_conv"
NORM_ACT, INSTANCE_POOL, SPECTRAL_NORM = "norm_act", "instance_pool", "spectral_norm"
KINDS = (NORM, BLOCK, CONV, PIXEL_CONV, NORM_ACT, INSTANCE_POOL, SPECTRAL_NORM)
_MIXINS = {NORM: norms.FusedNorm, BLOCK: blocks.FusedBlock, PIXEL_CONV: layers.FusedPixelConv,
           NORM_ACT: sequences.FusedSequence, INSTANCE_POOL: layers.FusedInstancePool}
_NOT_SETTINGS = {*vars(nn.Module())}
_WIDTHS = {"in_channels", "out_channels", "num_features", "num_channels", "groups"}


@dataclass(frozen=True)
class Finding:
    """A module of a known structure: what it is to become, or why it stays as it is."""

    name: str
    module: nn.Module
    kind: str
    change: Step | None
    note: str = ""


def _widths(module: nn.Module) -> set[int]:
    """Numbers that are widths of the module rather than anything else."""
    return {d for t in (*module.parameters(), *module.buffers()) for d in t.shape[:2] if d > 4}


def _masked(value: Any, widths: Collection[int]) -> Any:
    """A value without its widths, to compare."""
    if hasattr(value, "tobytes"):  # numpy's, whose repr leaves digits and entries out, and arrays
        described = (str(getattr(value, name, None)) for name in ("dtype", "shape", "typecode"))
        return type(value), *described, value.tobytes()
    if isinstance(value, (tuple, list)):
        return tuple(_masked(v, widths) for v in value)
    return "width" if type(value) is int and value in widths else value


def _masked_attribute(name: str, value: Any, widths: Collection[int] | None) -> str:
    if widths is None or name not in _WIDTHS:
        return repr(_masked(value, widths or ()))
    return "width" if name != "groups" or value != 1 else "1"


def _masked_shape(shape: tuple[int, ...], widths: Collection[int] | None) -> Any:
    if widths is None:
        return shape
    return (("width",) * 2 + shape[2:]) if len(shape) == 4 else _masked(shape, widths)


def _settings(module: nn.Module, widths: Collection[int] | None = None) -> Iterator[Any]:
    """Whatever may decide what a module computes, but for values of tensors, and ``widths``.

    Of convs in groups it is one setting that there are several.
    """
    for name, part in module.named_modules():
        plain = {k: _masked_attribute(k, v, widths) for k, v in vars(part).items()
                 if k not in _NOT_SETTINGS and not k.startswith(OWN)
                 and not isinstance(v, Tensor)}
        plain |= {k: repr((v.dtype, v.item())) for k, v in vars(part).items()  # numbers of a graph
                  if isinstance(v, Tensor) and v.dim() == 0 and not v.is_meta}
        hooks = tuple(type(hook) for hook in weight_hooks(part).values())
        yield name, original_type(part), hooks, tuple(sorted(plain.items()))
        for key, t in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            yield key, _masked_shape(tuple(t.shape), widths), t.dtype, t.device


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class Recognition:
    """One pass over a model. Verdicts are kept by configuration, so that each is probed once."""

    def __init__(self, inference: bool) -> None:
        self._inference = inference
        self._verdicts: dict[Any, Any] = {}
        self._norms: dict[nn.Module, norms.NormPlan] = {}

    def findings(self, model: nn.Module) -> list[Finding]:
        """Every module that is of a known structure, or nearly; norms before their blocks."""
        named = dict(model.named_modules())
        inside = {part for module in named.values() if sequences.is_sequence(module)
                  for part in module.children() if sequences.is_sequence(part)}
        found: list[Finding | None] = []
        found += self._all_norms(named)
        of_blocks = {finding.name: finding for finding in self._all_blocks(named)}
        for name, module in named.items():
            block = of_blocks.get(name)
            found += [block, *_convs(block)]
            if layers.unfold_of(module) is not None:
                judge = partial(layers.judge_pixel_conv, module)
                found.append(self._judged(name, module, PIXEL_CONV, judge))
            elif layers.network_of(module) is not None:
                judge = partial(layers.judge_instance_pool, module)
                found.append(self._judged(name, module, INSTANCE_POOL, judge))
            elif sequences.is_sequence(module) and module not in inside:
                judge = partial(sequences.judge, module, self._inference)
                sequence = self._judged(name, module, NORM_ACT, judge)
                found += [sequence, *_convs(sequence)]
            found.append(_spectral_norm(name, module, self._inference))
        convs: set[nn.Module] = set()  # one may be in a block and in a sequence of it
        kept = []
        for finding in found:
            if finding is None or (finding.kind == CONV and finding.module in convs):
                continue
            kept.append(finding)
            convs.update([finding.module] if finding.kind == CONV else [])
        return kept

    def _judged(self, name: str, module: nn.Module, kind: str,
                judge: Callable[[], Verdict | None]) -> Finding | None:
        verdict = self._read(kind, module, judge)
        if verdict is None:
            return None
        plan, note = (None, verdict) if isinstance(verdict, str) else verdict
        change = None if plan is None else Change(module, _MIXINS[kind], plan)
        return Finding(name, module, kind, change, note)

    def _all_norms(self, named: Mapping[str, nn.Module]) -> list[Finding]:
        """The innermost modules that take features and a map and normalise, in order."""
        readings: dict[str, norms.Reading] = {}
        for name, module in reversed(list(named.items())):  # parts come before what holds them
            prefix = f"{name}." if name else ""
            if any(other.startswith(prefix) for other in readings):
                continue
            special = layers.unfold_of(module) or layers.network_of(module)
            if special is None and norms.may_be_norm(module):
                reading = self._read(NORM, module, partial(norms.read, module))
            elif norms.takes_more(module):
                reading = (f"its forward takes {norms.takes_more(module)} arguments, not features "
                           "and a map")
            else:
                continue
            if reading is not None:
                readings[name] = reading
        ordered = {name: readings[name] for name in named if name in readings}
        found = self._findings(NORM, named, ordered, norms.judge, lambda plan: plan.form.outline)
        self._norms = {f.module: f.change.plan for f in found if isinstance(f.change, Change)
                       and isinstance(f.change.plan, norms.NormPlan)}
        return found

    def _all_blocks(self, named: Mapping[str, nn.Module]) -> list[Finding]:
        """The outermost modules that are blocks of norms, and can be fused."""
        readings: dict[str, blocks.Reading] = {}
        for name, module in named.items():
            outer = accumulate(name.split(".")[:-1], "{}.{}".format)
            if any(isinstance(readings.get(parent), list) for parent in ("", *outer) if name):
                continue
            inside = self._norms_inside(module)
            if 2 <= len(inside) <= blocks.MOST_NORMS:
                reading = self._read(BLOCK, module, partial(blocks.read, module, inside))
                if reading is not None:
                    readings[name] = reading
        return self._findings(
            BLOCK, named, readings,
            lambda module, plans: blocks.judge(module, plans, self._norms_inside(module)),
            lambda plan: plan.outline)

    def _norms_inside(self, module: nn.Module) -> dict[str, norms.NormPlan | None]:
        """Norms that are fused, or this library's own."""
        return {name: self._norms.get(part) for name, part in module.named_modules()
                if name and (part in self._norms or blocks.is_own_norm(part))}

    def _read(self, kind: str, module: nn.Module, read: Callable[[], Any]) -> Any:
        """What ``read`` returns, once for modules of the same settings; where it raises, why."""
        key = (kind, *_settings(module))
        if key not in self._verdicts:
            try:
                with default_modes(module):
                    self._verdicts[key] = read()
            except Exception as error:  # of foreign code: whatever it raises, it is left alone
                self._verdicts[key] = str(error).partition("\n")[0]
        return self._verdicts[key]

    def _findings(self, kind: str, named: Mapping[str, nn.Module], readings: Mapping[str, Any],
                  judge: Callable[[nn.Module, Any], tuple[int | None, str]],
                  outline: Callable[[Any], Any]) -> list[Finding]:
        """What modules are to become: of those that differ in widths alone one is probed.

        That is the narrowest. That the others compute the same has been seen as they were read.
        """
        alike: dict[Any, list[str]] = {}
        for name, reading in readings.items():
            if isinstance(reading, list):
                module = named[name]
                key = (*map(outline, reading), *_settings(module, _widths(module)))
                alike.setdefault(key, []).append(name)
        verdicts: dict[str, tuple[int | None, str]] = {}
        for names in alike.values():
            narrowest = min(names, key=lambda name: _size(named[name]))
            module = named[narrowest]
            try:
                with default_modes(module):
                    verdict = judge(module, readings[narrowest])
            except Exception as error:  # of foreign code
                verdict = None, str(error).partition("\n")[0]
            verdicts.update(dict.fromkeys(names, verdict))
        found = []
        for name, reading in readings.items():
            chosen, why = verdicts.get(name, (None, reading))
            plan = None if chosen is None else reading[chosen]
            change = None if plan is None else Change(named[name], _MIXINS[kind], plan)
            if isinstance(plan, norms.NormPlan) and plan.form.no_tables:
                why = f"without tables: {plan.form.no_tables}"
            found.append(Finding(name, named[name], kind, change, why))
        return found


def _convs(whole: Finding | None) -> list[Finding]:
    """The convs of a block or sequence that can be fused."""
    if whole is None or not isinstance(whole.change, Change):
        return []
    plan = whole.change.plan
    if isinstance(plan, blocks.BlockPlan):
        changes = blocks.conv_changes(whole.module, plan)
    else:
        assert isinstance(plan, sequences.SequencePlan)
        changes = sequences.conv_changes(whole.module, plan)
    names = {child: name for name, child in whole.module.named_modules()}
    return [Finding(f"{whole.name}.{names[c.module]}".lstrip("."), c.module, CONV, c)
            for c in changes]


def _spectral_norm(name: str, module: nn.Module, inference: bool) -> Finding | None:
    hooks = folding.spectral_hooks(module, inference)
    if hooks:
        fused = folding.FoldedSpectralNorm if inference else FusedSpectralNorm
        return Finding(name, module, SPECTRAL_NORM, folding.SwapHooks(tuple(hooks), fused))
    if inference and folding.is_spectral_parametrization(module):
        return Finding(name, module, SPECTRAL_NORM, Change(
            module, folding.FoldedParametrization, FusionPlan(())))
    return None


def networks(model: nn.Module, inside: Collection[nn.Module], taken: Collection[nn.Module],
             outermost: type[Network] = Network) -> list[Change]:
    """The modules around those ``inside``, but for ``taken`` ones: their calls are a network's.

    The model's own become ``outermost``.
    """
    named = dict(model.named_modules())
    around: dict[nn.Module, None] = {}
    for name, module in named.items():
        if module in inside:
            parents = accumulate(name.split(".")[:-1], "{}.{}".format)
            around.update(dict.fromkeys(named[parent] for parent in ("", *parents)))
    return [Change(m, outermost if m is model else Network) for m in around
            if m not in taken and _is_called(m)]


def _is_called(module: nn.Module) -> bool:
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.jit.ScriptModule)
    implemented = type(module).forward is not nn.Module.forward
    return implemented and not isinstance(module, wrappers)
