"""Configurations inside checkpoints, keys of other PyTorch versions, and ``smis convert``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from smis_models import CheckpointError, cli, create_model, save_checkpoint
from smis_models.families import stored_configuration
from smis_models.families.models import KEY
from smis_models.io.state_dict_keys import networks_keys

TINY: dict[str, Any] = {"ngf": 8, "nef": 16, "ndf": 8, "image_size": (64, 64),
                        "upsampling": "normal"}
ADE: dict[str, Any] = {"classes": 13, "dont_care": 12, "ngf": 8, "nef": 26, "ndf": 8,
                       "image_size": (64, 64), "upsampling": "normal"}
Smis = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def smis(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Smis:
    """Run the command line; its exit code, stdout and stderr."""
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", ["smis", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)


def as_options(options: dict[str, Any]) -> list[str]:
    return [word for key, value in options.items() for word in ("--option", f"{key}={value}")]


def test_a_saved_model_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = create_model("groupdnet_deepfashion", **TINY)
    save_checkpoint(model, path)
    for loaded in (create_model(checkpoint=path), create_model("groupdnet_deepfashion", path)):
        assert loaded.name == "groupdnet_deepfashion"
        assert loaded.preset == model.preset
        assert same(loaded, model)
    encoder = create_model(checkpoint=path, part="encoder")
    assert same(encoder, model.encoder)
    with safetensors.safe_open(path, "pt") as file:
        content = json.loads(file.metadata()[KEY])
    assert content["model"] == "groupdnet_deepfashion"
    assert content["preset"]["image_size"] == [64, 64]


def test_options_go_before_the_stored_ones(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(create_model("groupdnet_deepfashion", **TINY), path)
    larger = create_model(checkpoint=path, image_size=(96, 64))
    assert larger.preset.image_size == (96, 64)
    assert larger.preset.ngf == 8
    with pytest.raises(CheckpointError, match="of another shape"):
        create_model(checkpoint=path, ngf=16)


@pytest.mark.parametrize(("change", "words"), [
    (lambda c: c.update(model="groupdnet_mars"), ("'groupdnet_mars'", "groupdnet_ade20k")),
    (lambda c: c["preset"].update(wings=2), ("'wings'", "image_size")),
    (lambda c: c["preset"].pop("classes"), ("do not fit", "classes")),
    (lambda c: c["preset"].update(ngf=0), ("do not fit", "ngf", "at least 1")),
    (lambda c: c.pop("preset"), ("damaged", "convert")),
])
def test_configurations_that_make_no_model(tmp_path: Path, change: Callable[[Any], Any],
                                           words: tuple[str, ...]) -> None:
    path = tmp_path / "model.safetensors"
    model = create_model("groupdnet_deepfashion", **TINY, part="discriminator")
    configuration = create_model("groupdnet_deepfashion", **TINY, device="meta").configuration
    metadata = configuration.to_metadata()
    content = json.loads(metadata[KEY])
    change(content)
    metadata[KEY] = json.dumps(content)
    safetensors.torch.save_file(model.state_dict(), path, metadata)
    with pytest.raises(CheckpointError) as error:
        create_model(checkpoint=path)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_a_name_that_the_file_contradicts(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(create_model("groupdnet_deepfashion", **TINY), path)
    with pytest.raises(CheckpointError, match="is groupdnet_deepfashion, not spade_coco"):
        create_model("spade_coco", path)
    torch.save({"x": torch.zeros(1)}, tmp_path / "latest_net_G.pth")
    for checkpoint in (tmp_path / "latest_net_G.pth", None):
        with pytest.raises(ValueError, match=r"name: expected one of .*smis convert"):
            create_model(checkpoint=checkpoint)


class Normalised(nn.Module):
    """A conv under ``torch.nn.utils.spectral_norm``, as the published networks have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.utils.spectral_norm(nn.Conv2d(4, 6, 3))


def test_files_from_before_spectral_norm_kept_v() -> None:
    """Evaluated, W / (u W v) is the weight that the file holds."""
    trained, fresh = Normalised(), Normalised().eval()
    x = torch.randn(2, 4, 8, 8)
    for _ in range(3):
        trained.conv(x)
    state = dict(trained.state_dict())
    normalized = trained.conv.weight.detach().clone()
    del state["conv.weight_v"]
    state["conv.weight"] = normalized
    fresh.load_state_dict(networks_keys(state), strict=True)
    fresh.conv(x)
    torch.testing.assert_close(fresh.conv.weight, normalized)


def test_without_the_normalised_weight_v_has_length_one() -> None:
    state = dict(Normalised().state_dict())
    v = state.pop("conv.weight_v")
    found = networks_keys(state)["conv.weight_v"]
    assert float(found.norm()) == pytest.approx(1)
    assert found.shape == v.shape


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_parametrized_spectral_norm_and_wrappers(prefix: str) -> None:
    torch.manual_seed(0)
    newer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)).eval()
    state: dict[str, Tensor] = {f"{prefix}conv.{k}": v for k, v in newer.state_dict().items()}
    older = Normalised().eval()
    older.load_state_dict(networks_keys(state), strict=True)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(older.conv(x), newer(x))


def test_counts_that_old_files_lack_start_at_zero(tmp_path: Path) -> None:
    model = create_model("groupdnet_deepfashion", **TINY, part="generator")
    state = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    torch.save(state, tmp_path / "latest_net_G.pth")
    loaded = create_model("groupdnet_deepfashion", tmp_path / "latest_net_G.pth", **TINY)
    counts = [v for k, v in loaded.state_dict().items() if k.endswith("num_batches_tracked")]
    assert counts
    assert not any(counts)


def test_counts_that_a_file_has_are_kept(tmp_path: Path) -> None:
    model = create_model("groupdnet_deepfashion", **TINY, part="generator")
    state = {k: torch.tensor(i + 3) if k.endswith("num_batches_tracked") else v
             for i, (k, v) in enumerate(model.state_dict().items())}
    torch.save(state, tmp_path / "latest_net_G.pth")
    loaded = create_model("groupdnet_deepfashion", tmp_path / "latest_net_G.pth", **TINY)
    found = loaded.generator.state_dict()
    counts = {k: v for k, v in state.items() if k.endswith("num_batches_tracked")}
    assert counts and all(int(found[k]) == int(v) for k, v in counts.items())


def test_convert_makes_one_file_of_an_official_folder(tmp_path: Path, smis: Smis) -> None:
    model = create_model("groupdnet_ade20k", **ADE)
    for letter, part in zip("GED", ("generator", "encoder", "discriminator"), strict=True):
        state = {f"module.{k}": v for k, v in getattr(model, part).state_dict().items()}
        torch.save(state, tmp_path / f"latest_net_{letter}.pth")
    out = tmp_path / "ade20k.safetensors"
    code, said, error = smis("convert", tmp_path, out, "--model", "groupdnet_ade20k",
                             *as_options(ADE))
    assert code == 0, error
    loaded = create_model(checkpoint=out)
    assert same(loaded, model)
    assert loaded.preset == model.preset
    assert loaded.preset.unlabelled == 0
    for words in ("generator", "encoder", "0 is unlabelled", "255 becomes 12", out.name):
        assert words in " ".join(said.split())


def test_convert_takes_one_part_and_its_own_files(tmp_path: Path, smis: Smis) -> None:
    model = create_model("groupdnet_deepfashion", **TINY)
    torch.save(model.generator.state_dict(), tmp_path / "latest_net_G.pth")
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    options = ("--model", "groupdnet_deepfashion", *as_options(TINY))
    assert smis("convert", tmp_path / "latest_net_G.pth", first, *options)[0] == 0
    assert smis("convert", first, second)[0] == 0
    loaded = create_model(checkpoint=second)
    assert [name for name, _ in loaded.named_children()] == ["generator"]
    assert same(loaded.generator, model.generator)
    found = stored_configuration(second)
    assert found is not None
    assert found.preset == model.preset


@pytest.mark.parametrize(("arguments", "words"), [
    ((), ("model", "smis list", "configuration")),
    (("--model", "gaugan"), ("error: model: expected one of", "groupdnet_ade20k", "'gaugan'")),
    (("--model", "groupdnet_deepfashion"), ("of another shape", "fc.weight")),
    (("--model", "groupdnet_deepfashion", "--option", "ngf"), ("option", "NAME=VALUE", "'ngf'")),
    (("--model", "groupdnet_deepfashion", "--option", "wings=2"), ("option", "image_size",
                                                                   "'wings'")),
    (("--model", "groupdnet_deepfashion", "--option", "ngf=wide"), ("ngf=160", "int", "'wide'")),
])
def test_convert_refuses_in_one_line(tmp_path: Path, smis: Smis, arguments: tuple[str, ...],
                                     words: tuple[str, ...]) -> None:
    model = create_model("groupdnet_deepfashion", **TINY, part="generator")
    torch.save(model.state_dict(), tmp_path / "latest_net_G.pth")
    code, _, error = smis("convert", tmp_path / "latest_net_G.pth", tmp_path / "o.safetensors",
                          *arguments)
    assert code == 2
    assert len(error.strip().splitlines()) == 1
    assert all(word in error for word in words), error
    assert [p.name for p in tmp_path.iterdir()] == ["latest_net_G.pth"]


@pytest.mark.parametrize(("option", "words"), [
    ("image_size=('a','b')", "image_size: expected (height, width)"),
    ("image_size=(64.0,64.0)", "image_size: expected (height, width)"),
    ("dont_care=all", "option: expected dont_care=150 or another int or None, got 'all'"),
])
def test_options_of_another_kind_are_one_line(tmp_path: Path, smis: Smis, option: str,
                                              words: str) -> None:
    made = create_model("spade_ade20k", ngf=4, image_size=(64, 64), part="generator")
    torch.save(made.state_dict(), tmp_path / "a.pth")
    code, _, error = smis("convert", tmp_path / "a.pth", tmp_path / "o.safetensors", "--model",
                          "spade_ade20k", "--option", "ngf=4", "--option", option)
    assert (code, words in error, len(error.strip().splitlines())) == (2, True, 1), error


def test_convert_takes_a_model_without_a_dont_care_class(tmp_path: Path, smis: Smis) -> None:
    made = create_model("spade_ade20k", ngf=4, image_size=(64, 64), classes=150, dont_care=None)
    torch.save(made.generator.state_dict(), tmp_path / "a.pth")
    code, _, error = smis("convert", tmp_path / "a.pth", tmp_path / "o.safetensors", "--model",
                          "spade_ade20k", "--option", "ngf=4", "--option", "image_size=64,64",
                          "--option", "classes=150", "--option", "dont_care=None")
    assert code == 0, error
    assert stored_configuration(tmp_path / "o.safetensors") == made.configuration


@pytest.mark.parametrize("options", [
    {"ngf": "8"}, {"ngf": True}, {"classes": 8.0}, {"dont_care": "x"}, {"image_size": 64},
    {"latent_channels": None}, {"discriminator_layers": 0},
])
def test_options_of_another_kind_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))}: expected "):
        create_model("spade_cityscapes", device="meta", **options)


@pytest.mark.parametrize(("name", "options"), [
    ("pix2pixhd_cityscapes", {"downsamplings": -8}), ("pix2pixhd_cityscapes", {"enhancers": "1"}),
    ("groupdnet_deepfashion", {"widths": ("a",) * 6}),
    ("groupdnet_deepfashion", {"groups": (8, 8, 4, 4, 2, 0)}),
])
def test_options_are_checked_before_they_are_computed_with(name: str, options: dict[str, Any],
                                                           ) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))}: expected "):
        create_model(name, device="meta", **options)


def test_convert_never_runs_pickled_code(tmp_path: Path, smis: Smis) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    code, _, error = smis("convert", tmp_path / "module.pth", tmp_path / "o.safetensors",
                          "--model", "spade_coco")
    assert code == 2
    assert "pickled code" in error
