"""The VGG19 perceptual loss, from local or cached torchvision weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..io.checkpoint import CheckpointError, read_checkpoint
from ..io.files import file_hash, published_hash
from .losses import wide
from .trunks import build_trunk, tapped, trunk_state, vgg_layers

FILE = "vgg19-dcbb9e9d.pth"
_LAYERS = vgg_layers(2, 2, 4, 4, 1)
_TAPS = (1, 6, 11, 20, 29)  # relu1_1, relu2_1, relu3_1, relu4_1, relu5_1
_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
_SMALLEST = 16  # four poolings


class PerceptualLoss(nn.Module):
    r"""L1 between VGG19 features of two pictures, the second detached.

    .. math:: \sum_{i=1}^{5} w_i \, \mathrm{mean} |\phi_i(x) - \phi_i(y)|, \quad
              w = \tfrac{1}{32}, \tfrac{1}{16}, \tfrac{1}{8}, \tfrac{1}{4}, 1

    with the features after relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1. As published, pictures
    in [-1, 1] go in as they are, not normalised by ImageNet's mean and deviation. pix2pixHD, SPADE
    and GroupDNet weigh the loss with 10. The network is frozen; it has no entry in a state dict.

    Args:
        state: tensors of torchvision's ``vgg19``, with or without its prefix ``features.``; what
            lies behind relu5_1 is not read.

    Shapes: fake and real (N, 3, H, W), H and W at least 16 -> a scalar, fp32 for 16-bit pictures.

    Raises:
        ValueError: tensors of another network; pictures of other or unequal shapes.

    Papers: Johnson et al., "Perceptual Losses for Real-Time Style Transfer", ECCV 2016; Simonyan
    and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014.

    Example:
        >>> perceptual = load_perceptual_loss("vgg19-dcbb9e9d.pth")  # doctest: +SKIP
        >>> loss = 10 * perceptual(fake, real)  # doctest: +SKIP
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.facts: dict[str, Any] = {}
        with torch.device("meta"):
            layers = build_trunk(_LAYERS)
        try:
            found = trunk_state(state, layers)
        except ValueError as error:
            raise ValueError(f"state: expected tensors of torchvision's vgg19: {error}") from error
        layers.load_state_dict(found, assign=True)
        # Outside of the module's own children: a model's checkpoint holds no VGG.
        self._network = [layers.eval().requires_grad_(False)]

    def _apply(self, *args: object, **kwargs: object) -> PerceptualLoss:
        self._network[0]._apply(*args, **kwargs)  # type: ignore[arg-type,unused-ignore]
        return super()._apply(*args, **kwargs)  # type: ignore[arg-type,unused-ignore]

    def features(self, picture: Tensor) -> list[Tensor]:
        """The five feature maps, (N, 64..512, H..H/16, W..W/16)."""
        return list(tapped(self._network[0], picture, _TAPS))

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        if fake.dim() != 4 or fake.shape[1] != 3 or min(fake.shape[2:]) < _SMALLEST:
            raise ValueError(f"fake: expected (N, 3, H, W), H and W at least {_SMALLEST}; got "
                             f"{tuple(fake.shape)}")
        if real.shape != fake.shape:
            raise ValueError(f"real: expected fake's shape {tuple(fake.shape)}, got "
                             f"{tuple(real.shape)}")
        with torch.no_grad():
            wanted = self.features(real)
        terms = [weight * F.l1_loss(wide(f), wide(r.to(f)))
                 for weight, f, r in zip(_WEIGHTS, self.features(fake), wanted, strict=True)]
        return torch.stack(terms).sum()


def load_perceptual_loss(weights: str | Path | None = None) -> PerceptualLoss:
    """The VGG19 loss with torchvision's weights from a local file; nothing is downloaded.

    Args:
        weights: a file with torchvision's VGG19 weights (``.pth`` or ``.safetensors``); None for
            the copy in torch's cache (``$TORCH_HOME/hub/checkpoints``). A file with another hash
            than torchvision's is taken, with a warning, and ``facts`` say so.

    Raises:
        CheckpointError: there is no such file, or it is of another network.

    Example:
        >>> perceptual = load_perceptual_loss("vgg19-dcbb9e9d.pth")  # doctest: +SKIP
        >>> loss = 10 * perceptual(fake, real)  # doctest: +SKIP
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE if weights is None else Path(weights)
    if not path.is_file():
        raise CheckpointError(
            f"losses.perceptual: expected torchvision's VGG19 weights ({FILE}), and {path} does "
            "not exist; give the file (--losses.vgg), or --losses.perceptual 0 to do without"
        )
    try:
        loss = PerceptualLoss(read_checkpoint(path))
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        message = str(error).replace("state:", f"weights: {path}:", 1)
        raise CheckpointError(message) from error
    digest = file_hash(path)
    loss.facts = {"vgg": path.name, "vgg_sha256": digest,
                  "torchvision_weights": digest.startswith(published_hash(FILE))}
    if not loss.facts["torchvision_weights"]:
        warnings.warn(f"perceptual loss: {path} is not torchvision's file, whose hash begins with "
                      f"{published_hash(FILE)} ({digest[:8]}); the records say so", stacklevel=2)
    return loss
