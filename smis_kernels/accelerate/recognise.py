"""Which modules of a model can be fused: by structure, then by a probe of each configuration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.spectral_norm import FusedSpectralNorm
from . import blocks, folding, layers, norms, sequences
from .formats import Network
from .probe import Verdict, aside
from .swap import Change, Plan, Step
from .watch import OWN, original_type, weight_hooks

NORM, BLOCK, CONV, PIXEL_CONV = "norm", "block", "conv", "pixel_conv"
NORM_ACT, INSTANCE_POOL, SPECTRAL_NORM = "norm_act", "instance_pool", "spectral_norm"
KINDS = (NORM, BLOCK, CONV, PIXEL_CONV, NORM_ACT, INSTANCE_POOL, SPECTRAL_NORM)
_MIXINS = {NORM: norms.FusedNorm, BLOCK: blocks.FusedBlock, PIXEL_CONV: layers.FusedPixelConv,
           NORM_ACT: sequences.FusedSequence, INSTANCE_POOL: layers.FusedInstancePool}
_NOT_SETTINGS = {*vars(nn.Module())}


@dataclass(frozen=True)
class Finding:
    """A module of a known structure: what it is to become, or why it stays as it is."""

    name: str
    module: nn.Module
    kind: str
    change: Step | None
    note: str = ""


def _settings(module: nn.Module) -> Iterator[Any]:
    """Whatever may decide what a module computes, but for the values of its tensors."""
    for name, part in module.named_modules():
        plain = {k: repr(v) for k, v in vars(part).items()
                 if k not in _NOT_SETTINGS and not k.startswith(OWN)
                 and not isinstance(v, Tensor)}
        hooks = tuple(type(hook) for hook in weight_hooks(part).values())
        yield name, original_type(part), hooks, tuple(sorted(plain.items()))
        for key, t in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            yield key, tuple(t.shape), t.dtype, t.device


class Recognition:
    """One pass over a model. Verdicts are kept by configuration, so that each is probed once."""

    def __init__(self, inference: bool) -> None:
        self._inference = inference
        self._verdicts: dict[Any, Verdict | None] = {}
        self._norms: dict[nn.Module, norms.NormPlan] = {}

    def findings(self, model: nn.Module) -> list[Finding]:
        """Every module that is of a known structure, or nearly; norms before their blocks."""
        named = dict(model.named_modules())
        inside = {part for module in named.values() if sequences.is_sequence(module)
                  for part in module.children() if sequences.is_sequence(part)}
        found: list[Finding | None] = []
        for name, module in named.items():
            if norms.looks_like_norm(module):
                found.append(self._norm(name, module))
        for name, module in named.items():
            block = self._block(name, module)
            found += [block, *_convs(block)]
            if layers.unfold_of(module) is not None:
                judge = partial(layers.judge_pixel_conv, module)
                found.append(self._judged(name, module, PIXEL_CONV, judge))
            elif layers.network_of(module) is not None:
                judge = partial(layers.judge_instance_pool, module)
                found.append(self._judged(name, module, INSTANCE_POOL, judge))
            elif sequences.is_sequence(module) and module not in inside:
                judge = partial(sequences.judge, module, self._inference)
                found.append(self._judged(name, module, NORM_ACT, judge))
            found.append(_spectral_norm(name, module, self._inference))
        return [finding for finding in found if finding is not None]

    def _judged(self, name: str, module: nn.Module, kind: str,
                judge: Callable[[], Verdict | None]) -> Finding | None:
        key = (kind, *_settings(module))
        if key not in self._verdicts:
            try:
                with aside(module):
                    self._verdicts[key] = judge()
            except Exception as error:  # of foreign code: whatever it raises, it is left alone
                self._verdicts[key] = None, str(error).partition("\n")[0]
        verdict = self._verdicts[key]
        if verdict is None:
            return None
        plan, note = verdict
        change = None if plan is None else Change(module, _MIXINS[kind], plan)
        return Finding(name, module, kind, change, note)

    def _norm(self, name: str, module: nn.Module) -> Finding | None:
        finding = self._judged(name, module, NORM, partial(norms.judge, module))
        if finding is not None and isinstance(finding.change, Change):
            assert isinstance(finding.change.plan, norms.NormPlan)
            self._norms[module] = finding.change.plan
        return finding

    def _block(self, name: str, module: nn.Module) -> Finding | None:
        inside = {key: self._norms[m] for key, m in module.named_children() if m in self._norms}
        if len(inside) not in (2, 3):
            return None
        return self._judged(name, module, BLOCK, partial(blocks.judge, module, inside))


def _convs(block: Finding | None) -> list[Finding]:
    """The convs of a block that can be fused."""
    if block is None or not isinstance(block.change, Change):
        return []
    assert isinstance(block.change.plan, blocks.BlockPlan)
    names = {child: name for name, child in block.module.named_children()}
    return [Finding(f"{block.name}.{names[c.module]}".lstrip("."), c.module, CONV, c)
            for c in blocks.conv_changes(block.module, block.change.plan)]


def _spectral_norm(name: str, module: nn.Module, inference: bool) -> Finding | None:
    hooks = folding.spectral_hooks(module, inference)
    if hooks:
        fused = folding.FoldedSpectralNorm if inference else FusedSpectralNorm
        return Finding(name, module, SPECTRAL_NORM, folding.SwapHooks(tuple(hooks), fused))
    if inference and folding.is_spectral_parametrization(module):
        return Finding(name, module, SPECTRAL_NORM, Change(
            module, folding.FoldedParametrization, Plan(())))
    return None


def networks(model: nn.Module, inside: Collection[nn.Module],
             taken: Collection[nn.Module]) -> list[Change]:
    """The modules around those ``inside``, but for ``taken`` ones: their calls are a network's."""
    named = dict(model.named_modules())
    around: dict[nn.Module, None] = {}
    for name, module in named.items():
        if module in inside:
            parents = accumulate(name.split(".")[:-1], "{}.{}".format)
            around.update(dict.fromkeys(named[parent] for parent in ("", *parents)))
    return [Change(m, Network) for m in around if m not in taken and _is_called(m)]


def _is_called(module: nn.Module) -> bool:
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.jit.ScriptModule)
    implemented = type(module).forward is not nn.Module.forward
    return implemented and not isinstance(module, wrappers)
