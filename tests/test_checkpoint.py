"""Checkpoints: what loads, and what is refused in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel

from smis_models import CheckpointError, create_model, read_checkpoint, save_checkpoint

NAME = "groupdnet_deepfashion"
TINY: dict[str, Any] = {"ngf": 8, "nef": 16, "ndf": 8, "image_size": (64, 64)}


def tiny(checkpoint: Path | None = None, **kwargs: Any) -> Any:
    return create_model(NAME, checkpoint, **TINY, **kwargs)


def assert_same(module: nn.Module, other: nn.Module) -> None:
    state, expected = module.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for key, tensor in state.items():
        assert torch.equal(tensor, expected[key]), key


def refused(*words: str, path: Path, **kwargs: Any) -> None:
    with pytest.raises(CheckpointError) as error:
        tiny(path, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_safetensors_round_trip(tmp_path: Path) -> None:
    model = tiny(seed=3)
    save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = tiny(tmp_path / "model.safetensors")
    assert_same(loaded, model)
    assert all(p.requires_grad for p in loaded.parameters())
    assert_same(tiny(tmp_path / "model.safetensors", part="encoder"), model.encoder)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_moving_average_is_loaded(tmp_path: Path) -> None:
    """torch's AveragedModel counts beside the network."""
    own = create_model("groupdnet_scenes", part="generator", ngf=8, nef=8, seed=1)
    torch.save(AveragedModel(own).state_dict(), tmp_path / "ema.pth")
    made = create_model("groupdnet_scenes", tmp_path / "ema.pth", part="generator", ngf=8, nef=8)
    for key, tensor in own.state_dict().items():
        assert torch.equal(made.state_dict()[key], tensor), key


@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_files(tmp_path: Path, prefix: str) -> None:
    model = tiny(seed=3)
    state = {prefix + key: value for key, value in model.generator.state_dict().items()}
    torch.save(state, tmp_path / "latest_net_G.pth")
    assert_same(tiny(tmp_path / "latest_net_G.pth", part="generator"), model.generator)

    whole = tiny(tmp_path / "latest_net_G.pth")
    assert_same(whole.generator, model.generator)
    with pytest.raises(AttributeError, match="encoder: this groupdnet_deepfashion was made from"):
        whole.encoder.encode(None, None)

    torch.save(model.encoder.state_dict(), tmp_path / "latest_net_E.pth")
    folder = tiny(tmp_path)
    assert_same(folder.generator, model.generator)
    assert_same(folder.encoder, model.encoder)


def test_loaded_model_runs(tmp_path: Path) -> None:
    save_checkpoint(tiny(seed=3, init_gain=1.0), tmp_path / "model.safetensors")
    model = tiny(tmp_path / "model.safetensors", dtype=torch.float64).eval()
    planes = model.semantics(torch.zeros(1, 64, 64, dtype=torch.long))
    expected = tiny(seed=3, init_gain=1.0, dtype=torch.float64).eval()
    z = torch.ones(1, 64, 1, 1).double()
    with torch.no_grad():
        torch.testing.assert_close(model(planes, z), expected(planes, z))


def test_another_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latest_net_E.pth"
    shapes = create_model(NAME, part="encoder", device="meta").state_dict()
    torch.save({key: torch.empty(t.shape, dtype=t.dtype) for key, t in shapes.items()}, path)
    refused("keys missing (fc.weight", "unexpected (layer1.0.weight_orig",
            f"it fits {NAME}, part encoder", path=path, part="generator")


def test_another_width_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latest_net_G.pth"
    torch.save(create_model(NAME, part="generator", **{**TINY, "ngf": 16}).state_dict(), path)
    refused("of another shape (fc.weight: expected (128, 8, 3, 3), got (256, 8, 3, 3))",
            "no listed model", path=path)


class Code:
    """What a hostile pickle looks like: a call made while it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_never_run(tmp_path: Path, zipped: bool) -> None:
    path, target = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({"fc.weight": Code(target)}, path, _use_new_zipfile_serialization=zipped)
    refused("pickled code", "state dict", path=path)
    assert not target.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    refused("pickled code", "module.state_dict()", path=tmp_path / "module.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.9])
def test_truncated_files(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"cut{suffix}"
    state = {"fc.weight": torch.rand(64, 64)}
    if suffix == ".pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    refused(path.name, "it is truncated or damaged" if keep else "it is empty", path=path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_image_is_called_an_image(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    Image.new("RGB", (8, 8)).save(path, format="PNG")
    refused("it looks like a PNG image", path=path)


def test_other_content(tmp_path: Path) -> None:
    path = tmp_path / "notes.pth"
    path.write_text("hello world")
    refused("some other kind of file", path=path)
    torch.save({"epoch": 3, "state_dict": {}}, path)
    refused("plain state dict", "int under the key 'epoch'", path=path)
    torch.save([torch.zeros(1)], path)
    refused("plain state dict", "got list", path=path)
    safetensors.torch.save_file({}, tmp_path / "bare.safetensors")
    refused("holds no tensors", path=tmp_path / "bare.safetensors")
    refused("does not exist", path=tmp_path / "none.pth")
    (tmp_path / "empty").mkdir()
    refused("latest_net_G.pth", "found none", path=tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is a directory"):
        read_checkpoint(tmp_path)


def test_a_part_that_the_file_lacks(tmp_path: Path) -> None:
    path = tmp_path / "partial.safetensors"
    safetensors.torch.save_file({"encoder.fc_mu.bias": torch.zeros(64)}, path)
    refused("expected the generator", "got the encoder", path=path, part="generator")


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    model = tiny(part="discriminator")
    save_checkpoint(model, path)
    before = path.read_bytes()

    def fails(state: Any, name: str, metadata: Any) -> None:
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(CheckpointError, match="cannot be written") as error:
        save_checkpoint(model, path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_to_nowhere(tmp_path: Path) -> None:
    model = tiny(part="discriminator")
    with pytest.raises(CheckpointError, match=r"\.safetensors, got 'model\.pth'"):
        save_checkpoint(model, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(model, tmp_path / "missing" / "model.safetensors")


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module.", "generator.module.",
                                    "module.generator._orig_mod.", "netG.", "module.module."])
def test_prefixes_of_any_order_are_taken_off(tmp_path: Path, prefix: str) -> None:
    own = tiny(seed=3).generator
    torch.save({prefix + k: v for k, v in own.state_dict().items()}, tmp_path / "a.pth")
    assert_same(tiny(tmp_path / "a.pth").generator, own)


@pytest.mark.parametrize("wrap", [
    lambda own: {"state_dict": own, "epoch": 3},
    lambda own: {"model": own, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3},
    lambda own: {"net_G": {f"module.{k}": v for k, v in own.items()}, "net_D": {}, "opt_G": {}},
    lambda own: {"state_dict": {"netG": own}, "iteration": 1},
    lambda own: {"generator_state_dict": own, "optimizer_state_dict": {"state": {}}, "epoch": 3},
    lambda own: {"state_dict_G": own, "epoch": 3},
], ids=["state_dict", "model", "imaginaire", "nested", "generator_state_dict", "state_dict_G"])
def test_a_dict_around_the_state_dict_is_opened(tmp_path: Path, wrap: Any) -> None:
    own = tiny(seed=3).generator
    torch.save(wrap(own.state_dict()), tmp_path / "a.pth")
    assert_same(tiny(tmp_path / "a.pth").generator, own)


@pytest.mark.parametrize("name", ["a.pth", "a.bin", "a.safetensors"])
def test_the_content_tells_a_files_format(tmp_path: Path, name: str) -> None:
    """Hubs call safetensors .bin, and people rename what torch saved."""
    made = tiny(seed=3)
    save_checkpoint(made, tmp_path / "own.safetensors")
    (tmp_path / "own.safetensors").rename(tmp_path / name)
    loaded = create_model(checkpoint=tmp_path / name)  # its configuration is read, too
    assert loaded.preset == made.preset
    assert_same(loaded.generator, made.generator)
    torch.save(made.state_dict(), tmp_path / name)
    assert_same(tiny(tmp_path / name).generator, made.generator)


def test_networks_of_one_dict_become_parts(tmp_path: Path) -> None:
    made = tiny(seed=3)
    torch.save({"netG": made.generator.state_dict(), "netE": made.encoder.state_dict()},
               tmp_path / "a.pth")
    loaded = tiny(tmp_path / "a.pth")
    assert_same(loaded.generator, made.generator)
    assert_same(loaded.encoder, made.encoder)


@pytest.mark.parametrize(("names", "wrapper"), [
    (("netG", "netE", "netD"), ""), (("net_G", "net_E", "net_D"), "module."),
    (("G", "E", "D"), "_orig_mod."), (("generator", "encoder", "discriminator"), "module."),
])
def test_a_whole_gans_state_has_its_networks(tmp_path: Path, names: tuple[str, ...],
                                             wrapper: str) -> None:
    """As a module that holds all of them, and its losses, saves itself."""
    made = tiny(seed=3)
    parts = dict(zip(names, (made.generator, made.encoder, made.discriminator), strict=True))
    state = {f"{wrapper}{name}.{wrapper}{key}": tensor for name, part in parts.items()
             for key, tensor in part.state_dict().items()}
    torch.save({**state, f"{wrapper}criterionVGG.vgg.slice1.0.weight": torch.zeros(1)},
               tmp_path / "a.pth")
    loaded = tiny(tmp_path / "a.pth")
    for part in ("generator", "encoder", "discriminator"):
        assert_same(getattr(loaded, part), getattr(made, part))
    # A name of its own beside them, or one network twice: what is meant is not known.
    torch.save({**state, f"{wrapper}other.weight": torch.zeros(1)}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError):
        tiny(tmp_path / "b.pth")
    torch.save({**state, f"{wrapper}{'generator' if names[0] != 'generator' else 'netG'}.x":
                torch.zeros(1)}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError):
        tiny(tmp_path / "c.pth")


@pytest.mark.parametrize(("extra", "words"), [
    ({"epoch": 5}, ("int under the key 'epoch'",)),
    ({"lr": [1.0]}, ("list under the key 'lr'",)),
])
def test_the_key_that_is_no_tensor_is_named(tmp_path: Path, extra: Any,
                                            words: tuple[str, ...]) -> None:
    torch.save({**tiny(seed=3).generator.state_dict(), **extra}, tmp_path / "a.pth")
    refused(*words, path=tmp_path / "a.pth")


def test_of_several_networks_none_is_guessed(tmp_path: Path) -> None:
    own = tiny(seed=3).generator.state_dict()
    for other in ({"model_ema": own}, {"state_dict": own}):
        torch.save({"model": own, **other}, tmp_path / "a.pth")
        refused("expected one network", "'model'", repr(next(iter(other))), path=tmp_path / "a.pth")
