"""Synthesizer: many pictures of one layout, with all that depends on the layout done once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from smis_kernels import LabelLayout, WinogradConv2d
from smis_kernels.interface import Prepared, Settings, Stamp, TableCache

from ..io.seeds import derived_seed
from ..networks import semantics as label_maps
from .codes import code_parts, interpolate, with_class
from .graphs import PictureReplays


def frozen_copy(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The network in eval mode with spectral normalisation folded into the weights.

    Folded weights are new tensors, stored as the convs read them: those of torch channels-last, of
    which they copy none, and ours as they say. Parameters that nothing folds are shared with the
    original, not copied, unless they are cast.

    Args:
        dtype: of the copy; the network's own by default.

    Example:
        >>> from smis_models import create_model
        >>> fast = frozen_copy(create_model("groupdnet_scenes", part="generator", ngf=8).eval())
    """
    shared = {id(t): t for t in (*network.parameters(), *network.buffers())}
    for module in network.modules():  # what a hook has made has a graph, no copy
        shared.update((id(t), t.detach()) for t in vars(module).values() if isinstance(t, Tensor))
    frozen = copy.deepcopy(network, shared).eval()
    folded: list[Any] = [m for m in frozen.modules() if hasattr(m, "weight_orig")]
    for module in folded:
        nn.utils.remove_spectral_norm(module)
    for module in frozen.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # Wrapped anew, so that the original goes on asking for gradients.
            setattr(module, name, nn.Parameter(parameter.detach(), requires_grad=False))
    frozen = frozen.to(dtype)
    for module in folded:
        if module.weight.dim() == 4:
            module.weight.data = module.weight.contiguous(memory_format=(
                module.stored_format if isinstance(module, WinogradConv2d)
                else torch.channels_last))
    return frozen


class Synthesizer:
    """Pictures of one layout: label windows and modulation tables are computed once.

    Each sample then costs the main convs and one pass over the features for each norm. The
    weights are those at construction: spectral normalisation is folded.

    Args:
        model: a :class:`SynthesisModel` of the zoo (a generator with ``preset`` serves too).
        labels: (N, H, W) integers, or a :class:`smis_kernels.LabelLayout`.
        instances: ids of the labels' shape where the model reads edges.
        cuda_graph: on a GPU pictures are replays of one CUDA graph from a layout's third on, the
            second having been compared with a replay; where that fails, a warning says so and all
            are painted. Edits stay in the graph's memory while their tables fit its capacity, and
            have it captured anew where they do not: it pays for many pictures of a layout. A
            sample with another stream, backend or flags, or of a second thread meanwhile, is
            painted without it. It holds the memory of a forward pass. Not yet run on a GPU.
        prediction_bytes: memory that what CC-FPSE predicts from the map alone (kernels, gates,
            gamma and beta) may take from the second picture of a layout on, which by rounding is
            another than the first of the same code; 0 keeps none, and a graph keeps none.

    Raises:
        ValueError: labels out of range or of another shape, or ``cuda_graph`` for a model that is
            not on a GPU; the message names it.
        RuntimeError: from any sample, once the model's weights (by whatever means: their content is
            looked at), hooks, parts or attributes have changed.

    Example:
        >>> from smis_models import create_model
        >>> model = create_model("groupdnet_scenes", ngf=8, nef=8).eval()
        >>> s = Synthesizer(model, torch.zeros(1, 128, 128).long())
        >>> first = s.sample(seed=0)
        >>> again = s.resample(3, seed=1)     # class 3 drawn anew, all else kept
        >>> frames = s.morph(s.code(0), s.code(1), steps=8)
    """

    def __init__(self, model: Any, labels: Tensor | LabelLayout,
                 instances: Tensor | None = None, *, cuda_graph: bool = False,
                 prediction_bytes: int = 2 * 2**30) -> None:
        self._source: nn.Module = getattr(model, "generator", model)
        self._preset = model.preset
        self._stamp = Stamp(self._tensors())
        self._settings = Settings(self._source, hooks=True)
        self._generator: Any = frozen_copy(self._source)
        self._prepared = Prepared(self._generator)
        self._layout = self._compile(labels, instances)
        self._budget = 0 if cuda_graph else prediction_bytes  # a graph's buffers hold tables alone
        self._layout.tables = TableCache(budget=self._budget)
        device = next(self._source.parameters()).device
        if cuda_graph and device.type != "cuda":
            raise ValueError(
                f"cuda_graph: expected a model on a GPU, got one on {device}; move it with "
                ".to('cuda') or leave cuda_graph out"
            )
        self._replays = PictureReplays() if cuda_graph else None
        self.z: Tensor | None = None

    def _tensors(self) -> list[Tensor]:
        return [*self._source.parameters(), *self._source.buffers()]

    def _check_source(self) -> None:
        change = self._settings.change()
        if change is None and not self._stamp.holds(self._tensors()):
            change = "its weights have changed"
        if change is not None:
            raise RuntimeError(f"model: {change} since this Synthesizer was made; make a new one")

    def _compile(self, labels: Tensor | LabelLayout, instances: Tensor | None) -> LabelLayout:
        if isinstance(labels, LabelLayout):
            return labels.map_vectors(torch.clone)
        layout = label_maps.compile_layout(labels, self._preset, instances)
        return layout.to(next(self._source.parameters()).device)

    @property
    def layout(self) -> LabelLayout:
        """The compiled layout; ``print(s.layout.summary())`` tells how much repeats."""
        return self._layout

    @property
    def windows(self) -> tuple[int, int]:
        """(new, kept): the layout's windows, over all resolutions, whose table rows were computed
        since the last :meth:`update`, and those whose rows were taken over from before it."""
        assert self._layout.tables is not None
        return self._layout.tables.windows

    def code(self, seed: int) -> Tensor | None:
        """A latent code for every image of the layout, from N(0, 1); None for a model without."""
        codes = [self._generator.sample_latent(1, torch.Generator().manual_seed(own))
                 for own in (seed, *(derived_seed(seed, n) for n in range(1, len(self))))]
        return None if codes[0] is None else torch.cat(codes)

    def __len__(self) -> int:
        return self._layout.shape[0]

    @torch.no_grad()
    def sample(self, z: Tensor | None = None, *, seed: int = 0) -> Tensor:
        """The picture (N, 3, H, W) of code ``z``, or of a fresh one; kept as the current code.

        Raises:
            ValueError, TypeError: a code that the model cannot read; the current one stays.
        """
        self._check_source()
        z = self.code(seed) if z is None else self._checked(z)
        picture = (self._picture(self._layout, z) if self._replays is None
                   else self._replays.picture(self._picture, self._layout, z))
        self.z = z
        return picture

    def _checked(self, z: Tensor) -> Tensor:
        if not isinstance(z, Tensor):
            raise TypeError(f"z: expected a tensor, got {type(z).__name__}; s.code(seed) draws one")
        weight = next(self._generator.parameters())
        if (z.dtype, z.device) != (weight.dtype, weight.device):
            raise TypeError(f"z: expected {weight.dtype} on {weight.device}, as the weights are, "
                            f"got {z.dtype} on {z.device}; use z.to(s.code(0))")
        return z

    def _picture(self, layout: LabelLayout, z: Tensor | None) -> Tensor:
        # Of what the copy computes with, the source's tensors have been looked at; the others are
        # its own.
        with self._prepared.vouched():
            image: Tensor = self._generator(layout, z)
        return image

    def resample(self, index: int, *, seed: int = 1, z: Tensor | None = None) -> Tensor:
        """Draw class ``index`` anew and hold all others, from ``z`` or the current code.

        Raises:
            TypeError: the model has no code of its own for each class.
        """
        if not hasattr(self._generator, "class_channels"):
            raise TypeError(
                "model: expected one with a code for each class (GroupDNet), got "
                f"{type(self._source).__name__}"
            )
        start = z if z is not None else self.z if self.z is not None else self.code(0)
        fresh = self.code(seed)
        assert start is not None and fresh is not None
        return self.sample(with_class(self._generator, start, index, fresh))

    def morph(self, z0: Tensor, z1: Tensor, steps: int) -> Tensor:
        """Pictures (steps, N, 3, H, W) on the way from ``z0`` to ``z1``, both ends included.

        The way is :func:`smis_models.synthesis.codes.interpolate`'s: each class's code keeps its
        length.
        """
        if not isinstance(steps, int) or steps < 2:
            raise ValueError(f"steps: expected a whole number of at least 2, got {steps}")
        weights = torch.linspace(0, 1, steps).tolist()
        parts = code_parts(self._generator)
        return torch.stack([self.sample(interpolate(z0, z1, t, parts)) for t in weights])

    def update(self, labels: Tensor | LabelLayout, instances: Tensor | None = None) -> None:
        """Go on with an edited map: table rows are computed only for windows not seen before."""
        layout = self._compile(labels, instances)
        layout.tables = TableCache(self._layout.tables, budget=self._budget)
        self._layout = layout
