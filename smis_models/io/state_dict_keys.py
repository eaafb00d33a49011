"""State dicts as older and newer PyTorch wrote them, under the keys that the networks have."""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]
# Of DataParallel, torch.compile, and the attributes that training codes keep a generator in.
_WRAPPERS = ("module.", "_orig_mod.", "netG.", "net_G.")
# Names that training codes give the networks of a GAN.
PART_NAMES = {"net_G": "generator", "netG": "generator", "generator": "generator", "G": "generator",
              "net_E": "encoder", "netE": "encoder", "encoder": "encoder", "E": "encoder",
              "net_D": "discriminator", "netD": "discriminator", "discriminator": "discriminator",
              "D": "discriminator"}
_LOSS = "criterion"  # what their losses' attributes begin with
_PARAMETRIZED = {".parametrizations.weight.original": ".weight_orig",
                 ".parametrizations.weight.0._u": ".weight_u",
                 ".parametrizations.weight.0._v": ".weight_v"}


def networks_keys(state: State) -> State:
    """``state`` without wrappers' prefixes, with spectral norm's ``_orig``, ``_u`` and ``_v``.

    Prefixes may be in any order and number; the counter of an ``AveragedModel`` goes with them.

    A whole GAN's networks get the zoo's names, and its losses' weights are left out.

    Up to PyTorch 1.0 spectral norm kept ``weight`` (the normalised one) and no ``weight_v``: v is
    found again such that uᵀWv is the norm that they were divided by. The keys of
    ``torch.nn.utils.parametrizations.spectral_norm`` are renamed.
    """
    if "n_averaged" in state and all(key == "n_averaged" or key.startswith("module.")
                                     for key in state):
        state = {key: tensor for key, tensor in state.items() if key != "n_averaged"}
    while state and (wrapper := next((w for w in _WRAPPERS
                                      if all(key.startswith(w) for key in state)), None)):
        state = {key.removeprefix(wrapper): tensor for key, tensor in state.items()}
    state = {_renamed(key): tensor for key, tensor in _of_gan(state).items()}
    for key in [key for key in state if key.endswith(".weight_orig")]:
        stem = key.removesuffix("_orig")
        normalized = state.pop(stem, None)
        if stem + "_v" not in state and stem + "_u" in state:
            state[stem + "_v"] = _right_vector(state[key], state[stem + "_u"], normalized)
    return state


def _of_gan(state: State) -> State:
    """A state whose keys begin with names of a GAN's networks, with the zoo's names."""
    heads = {key.partition(".")[0] for key in state if not key.startswith(_LOSS)}
    parts = {PART_NAMES.get(head) for head in heads}
    if None in parts or len(parts) < len(heads):
        return state
    return {PART_NAMES[head] + "." + rest: tensor for key, tensor in state.items()
            for head, _, rest in [key.partition(".")] if head in heads}


def _renamed(key: str) -> str:
    for ending, name in _PARAMETRIZED.items():
        if key.endswith(ending):
            return key.removesuffix(ending) + name
    return key


def _right_vector(weight: Tensor, u: Tensor, normalized: Tensor | None) -> Tensor:
    """v = Wᵀu, scaled such that uᵀWv is the norm, or to length 1 where that is not known."""
    matrix = weight.detach().flatten(1).double()
    v = torch.mv(matrix.T, u.detach().double())
    length = v.norm()
    if normalized is None:
        return (v / length).to(weight.dtype)
    sigma = matrix.norm() / normalized.detach().double().norm()
    return (v * (sigma / length.square())).to(weight.dtype)
