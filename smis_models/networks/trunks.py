"""The convolutional trunks of torchvision's classifiers, whose features are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

Layer = tuple[int, ...]
"""A conv (channels, kernel, stride, padding) and its ReLU, or a max pooling (kernel, stride)."""


def vgg_layers(*convs: int) -> tuple[Layer, ...]:
    """VGG's blocks of so many convs each, 64 to 512 wide, with poolings between them."""
    layers: list[Layer] = []
    for block, count in enumerate(convs):
        layers += [(2, 2)] * (block > 0) + [(min(64 << block, 512), 3, 1, 1)] * count
    return tuple(layers)


def build_trunk(layers: Sequence[Layer]) -> nn.Sequential:
    """The layers, numbered as in torchvision's ``features``.

    Example:
        >>> build_trunk(vgg_layers(2, 2))[0].weight.shape
        torch.Size([64, 3, 3, 3])
    """
    modules: list[nn.Module] = []
    channels = 3
    for layer in layers:
        if len(layer) == 2:
            modules.append(nn.MaxPool2d(layer[0], layer[1]))
            continue
        width, kernel, stride, padding = layer
        modules += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU()]
        channels = width
    return nn.Sequential(*modules)


def tapped(trunk: nn.Sequential, x: Tensor, taps: Sequence[int]) -> Iterator[Tensor]:
    """The outputs of the layers ``taps``, in the order of the layers."""
    for i, layer in enumerate(trunk):
        x = layer(x)
        if i in taps:
            yield x


def trunk_state(state: Mapping[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """The tensors of a trunk, from a whole torchvision file or a bare trunk's.

    Raises:
        ValueError: a tensor is missing or of another shape.
    """
    own = trunk.state_dict()
    prefix = "features." if any(key.startswith("features.") for key in state) else ""
    found = {key: state[prefix + key] for key in own if prefix + key in state}
    bad = next((k for k in own if k not in found or found[k].shape != own[k].shape), None)
    if bad is not None:
        got = tuple(found[bad].shape) if bad in found else "none"
        raise ValueError(f"expected {prefix}{bad} of shape {tuple(own[bad].shape)}, got {got}")
    return found
