"""The hub's conventions: folders, repositories behind a faked hub, and the model card."""

from __future__ import annotations

import json
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import NAMES, small_model, small_options
from torch import nn

from smis_models import CheckpointError, SynthesisModel, create_model, save_checkpoint
from smis_models.cli.common import chosen
from smis_models.io import hub
from smis_models.io.files import file_hash

NAME = "spade_ade20k"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches a network."""
    def refused(*_: Any) -> None:
        raise AssertionError("a test opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def saved(folder: Path, **options: Any) -> Any:
    model = small_model(NAME, **options)
    model.save_pretrained(folder)
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert torch.equal(tensor, right[key]), key


def refused(*words: str, folder: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        SynthesisModel.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_gives_the_same_model(tmp_path: Path, name: str) -> None:
    model = small_model(name, seed=3)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "config.json", "model.safetensors"]
    loaded = SynthesisModel.from_pretrained(tmp_path)
    assert (loaded.name, loaded.preset, loaded.training) == (model.name, model.preset, False)
    assert [n for n, _ in loaded.named_children()] == [n for n, _ in model.named_children()]
    assert_same(loaded, model)
    told = json.loads((tmp_path / "config.json").read_text())["preset"]
    asked = {k: list(v) if isinstance(v, tuple) else v for k, v in small_options(name).items()}
    assert {k: told[k] for k in asked} == asked
    assert set(told) == set(vars(model.preset))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model = saved(tmp_path, dtype=dtype)
    assert_same(SynthesisModel.from_pretrained(tmp_path), model)
    cast = SynthesisModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert next(cast.parameters()).dtype == torch.float32


def test_the_command_line_reads_the_folder(tmp_path: Path) -> None:
    model = saved(tmp_path)
    assert chosen(NAME, tmp_path).preset == model.preset
    assert_same(chosen(NAME, tmp_path).load(), model)
    with pytest.raises(CheckpointError, match="is spade_ade20k, not spade_coco"):
        chosen("spade_coco", tmp_path).load()


def test_weights_of_others_are_read_with_the_config(tmp_path: Path) -> None:
    """A file without our metadata: config.json alone says what it is."""
    import safetensors.torch

    model = saved(tmp_path)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert_same(SynthesisModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(("text", "words"), [
    ("{", ("config.json", "no JSON", "save the model again")),
    ("[]", ("config.json", "'preset'", "save_pretrained")),
    ('{"architectures": ["Bert"]}', ("config.json", "no model of this package")),
    ('{"model": "gaugan", "preset": {}}', ("'gaugan'", "spade_coco")),
    ('{"model": "spade_ade20k", "preset": {"wings": 2}}', ("'wings'", "image_size")),
    ('{"model": "spade_ade20k", "preset": {}}', ("do not fit", "classes")),
])
def test_bad_configs_are_one_line(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    saved(tmp_path)
    (tmp_path / "config.json").write_text(text)
    refused(*words, folder=tmp_path)


def test_config_and_weights_that_contradict(tmp_path: Path) -> None:
    saved(tmp_path)
    config = tmp_path / "config.json"
    content = json.loads(config.read_text())
    content["preset"]["norm"] = "instance"
    config.write_text(json.dumps(content))
    refused("another norm ('instance', not 'syncbatch')", "save_pretrained", folder=tmp_path)
    content["model"] = "spade_celebamask"
    config.write_text(json.dumps(content))
    refused("another model", folder=tmp_path)
    content = {**json.loads(config.read_text()), "model": NAME, "dtype": "int8"}
    content["preset"]["norm"] = "syncbatch"
    config.write_text(json.dumps(content))
    refused("'int8'", "bfloat16", folder=tmp_path)


def test_missing_folders_and_names(tmp_path: Path) -> None:
    refused("expected a folder or a repository OWNER/NAME", folder=tmp_path / "a" / "b")
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused("model.safetensors", "latest_net_G.pth", "found none", folder=tmp_path)
    with pytest.raises(ValueError, match=r"revision: .* is a folder"):
        SynthesisModel.from_pretrained(tmp_path, revision="main")


def run_folder(folder: Path) -> Any:
    """As ``smis train`` and ``smis evaluate`` leave one."""
    folder.mkdir()
    model = small_model(NAME, seed=1)
    facts = {"step": 700, "epoch": 3, "losses": ["gan", "pixel"], "ema": 0.99,
             "precision": "bf16", "changes": [{"step": 300}]}
    save_checkpoint(model, folder / "model.safetensors", {"smis_training": json.dumps(facts)})
    (folder / "config.json").write_text(json.dumps({
        "model": NAME, "network": {}, "data": {"batch": 16}, "optimizer": {"generator": 2e-3}}))
    result = {
        "results": {"diversity": {"pixel L1": {"mcsd": 0.125, "mocd": 0.25, "diversity": 0.5}},
                    "segmentation": {"miou": 0.625, "accuracy": 0.75, "label_rule": "same"}},
        "model": {"weights_sha256": {
            "model.safetensors": file_hash(folder / "model.safetensors")}},
        "data": {"dataset": "scenes"}, "protocol": {"name": "n100-m19"}, "seed": 5}
    (folder / "evaluation.json").write_text(json.dumps(result))
    result["model"]["weights_sha256"] = {"model.safetensors": "0" * 64}
    result["results"]["segmentation"]["miou"] = 0.999
    (folder / "earlier.json").write_text(json.dumps(result))
    return model


def test_the_card_tells_the_recipe_and_the_metrics_of_these_weights(tmp_path: Path) -> None:
    model = run_folder(tmp_path / "run")
    loaded = create_model(checkpoint=tmp_path / "run")
    loaded.save_pretrained(tmp_path / "hub", run=tmp_path / "run")
    card = (tmp_path / "hub" / "README.md").read_text()
    for words in ("# spade_ade20k", "SPADE for ADE20K", "| image_size | `(64, 64)` |",
                  "| step | `700`",
                  '`["gan", "pixel"]`', '`{"batch": 16}`', "evaluation.json", "n100-m19", "seed 5",
                  "| mCSD | 0.125 | pixel L1 |", "| mOCD | 0.25 | pixel L1 |",
                  "| diversity | 0.5 | pixel L1 |", "| mIoU | 62.5% | label rule same |",
                  "| accuracy | 75.0% | label rule same |", "| epoch | `3` |", "| ema | `0.99` |",
                  '| precision | `"bf16"` |', '| changed on the way | `[{"step": 300}]` |',
                  "model.semantics(labels))"):
        assert words in card, words
    assert "99.9%" not in card  # of other weights
    assert_same(SynthesisModel.from_pretrained(tmp_path / "hub"), model)
    with torch.no_grad():
        next(loaded.parameters()).add_(1)
    with pytest.raises(CheckpointError, match=r"run: .* has other weights than this model"):
        loaded.save_pretrained(tmp_path / "other", run=tmp_path / "run")
    assert not (tmp_path / "other").exists()


def test_the_card_claims_no_protocol_that_was_not_followed(tmp_path: Path) -> None:
    run_folder(tmp_path / "run")
    path = tmp_path / "run/evaluation.json"
    result = json.loads(path.read_text())
    result["protocol"]["changed"] = {"diversity.layouts": 2, "split": "train"}
    result["results"]["segmentation"] |= {"predictions": "others", "maps": 7, "maps_sha256": "ab"}
    result["data"]["features"] = "clusters.npz"
    path.write_text(json.dumps(result))
    create_model(checkpoint=tmp_path / "run").save_pretrained(
        tmp_path / "hub", run=tmp_path / "run")
    card = (tmp_path / "hub/README.md").read_text()
    for words in ("protocol n100-m19, changed: diversity.layouts 2, split train; ",
                  "| mIoU | 62.5% | label rule same; 7 label maps in others |",
                  "features clusters.npz"):
        assert words in card, words


def test_the_card_tells_what_a_run_began_with(tmp_path: Path) -> None:
    facts = {"step": 1, "init": {"file": "w.pth", "sha256": {"w.pth": "ab"}}, "whiten": True,
             "seed": 0}
    save_checkpoint(small_model(NAME), tmp_path / "model.safetensors",
                    {"smis_training": json.dumps(facts)})
    told = hub.recipe_of(tmp_path)
    assert {key: told[key] for key in facts} == facts


@pytest.mark.parametrize(("name", "given"), [
    (NAME, "labels"), ("pix2pixhd_cityscapes", "labels, instances")])
def test_the_card_calls_a_model_with_the_maps_that_it_reads(tmp_path: Path, name: str,
                                                            given: str) -> None:
    small_model(name).save_pretrained(tmp_path)
    assert f"picture = model(model.semantics({given}))" in (tmp_path / "README.md").read_text()


def test_without_a_run_the_card_claims_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Recipe" not in card
    assert "Metrics" not in card


def test_a_card_is_renewed_but_not_one_that_was_edited(tmp_path: Path) -> None:
    saved(tmp_path)
    card = tmp_path / "README.md"
    before = card.read_text()
    saved(tmp_path, ngf=8)
    assert "| ngf | `8` |" in card.read_text()
    assert "| ngf | `8` |" not in before
    edited = card.read_text().replace("RGB", "Pictures, RGB")
    card.write_text(edited)
    with pytest.warns(UserWarning, match="was written by hand and is kept"):
        saved(tmp_path)
    assert card.read_text() == edited


def test_texts_of_the_hub_are_utf8_whatever_the_locale(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: a card speaks of Fréchet distances, and the hub reads UTF-8."""
    monkeypatch.setattr(Path, "read_text", lambda path, encoding="latin-1", errors="strict": (
        path.read_bytes().decode(encoding, errors)))
    monkeypatch.setattr(Path, "write_text", lambda path, text, encoding="latin-1": (
        path.write_bytes(text.encode(encoding))))
    run_folder(tmp_path / "run")
    path = tmp_path / "run/evaluation.json"
    content = json.loads(path.read_text())
    content["results"]["fid"] = {"fid": 1.0, "published_weights": False, "network": "é"}
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode())
    made = create_model(checkpoint=tmp_path / "run")
    for _ in range(2):  # the card of the first is this package's to the second
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made.save_pretrained(tmp_path / "hub", run=tmp_path / "run")
    assert "| Fréchet distance | 1.00 | é |" in (tmp_path / "hub/README.md").read_bytes().decode()
    (tmp_path / "hub/README.md").write_bytes(b"caf\xe9")  # somebody's, in no UTF-8
    with pytest.warns(UserWarning, match="written by hand"):
        made.save_pretrained(tmp_path / "hub")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        small_model(NAME).save_pretrained(tmp_path / "file")


def test_without_huggingface_hub_folders_serve_and_repositories_say_why(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub._mixin.cache_clear()
    model = saved(tmp_path)
    assert_same(SynthesisModel.from_pretrained(tmp_path), model)
    for call in (lambda: SynthesisModel.from_pretrained("owner/name"),
                 lambda: model.push_to_hub("owner/name")):
        with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub") as error:
            call()
        assert "\n" not in str(error.value)


class FakeHub:
    """The hub at its boundary: HfApi's two calls that write, and the two that download."""

    def __init__(self, place: Path) -> None:
        self.place, self.asked = place, {}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.asked["create"] = {"repo_id": repo_id, **options}
        return type("Address", (), {"repo_id": repo_id})()

    def upload_folder(self, *, folder_path: Path, **options: Any) -> str:
        import shutil

        self.asked["upload"] = options
        shutil.copytree(folder_path, self.place)
        return "commit-1"

    def download(self, repo_id: str, filename: str, **options: Any) -> str:
        self.asked["download"] = {"repo_id": repo_id, **options}
        return str(self.place / filename)

    def snapshot(self, repo_id: str, **options: Any) -> str:
        self.asked["snapshot"] = {"repo_id": repo_id, **options}
        return str(self.place)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import hub_mixin

    made = FakeHub(tmp_path / "repository")
    monkeypatch.setattr(hub_mixin, "HfApi", lambda token=None: made)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", made.download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot)
    hub._mixin.cache_clear()
    yield made
    hub._mixin.cache_clear()


def test_push_and_pull(fake: FakeHub) -> None:
    model = small_model(NAME, seed=2)
    assert model.push_to_hub("owner/name", private=True, branch="small") == "commit-1"
    assert fake.asked["create"]["repo_id"] == "owner/name"
    assert fake.asked["create"]["private"] is True
    assert fake.asked["upload"]["revision"] == "small"
    assert sorted(p.name for p in fake.place.iterdir()) == [
        "README.md", "config.json", "model.safetensors"]
    loaded = SynthesisModel.from_pretrained("owner/name", revision="small")
    assert_same(loaded, model)
    assert fake.asked["snapshot"]["revision"] == "small"
    assert set(fake.asked["snapshot"]["allow_patterns"]) == {"config.json", "model.safetensors"}


def test_what_the_hub_refuses_is_one_line(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def absent(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("Cannot find it\nin the cache and there is no network")

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", absent)
    with pytest.raises(CheckpointError, match="owner/name is no folder here") as error:
        SynthesisModel.from_pretrained("owner/name")
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="hub: a/b/c was not written"):
        small_model(NAME).push_to_hub("a/b/c")
    fake.place.mkdir()
    (fake.place / "config.json").write_text("{")
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", fake.download)
    with pytest.raises(CheckpointError, match=r"config.json of owner/name is no JSON"):
        SynthesisModel.from_pretrained("owner/name")


def test_rows_of_what_was_measured() -> None:
    """FID is called so where its network is Inception's; what biases it stands beside it."""
    found = {"fid": 12.3456, "published_weights": True, "network": "Inception V3"}
    assert hub.metric_rows({"results": {"fid": found}}) == [("FID", "12.35", "Inception V3")]
    found |= {"published_weights": False, "network": "weights of x.pth", "note": "few pictures"}
    assert hub.metric_rows({"results": {"fid": found, "diversity": {
        "LPIPS": {"mcsd": 0.02609, "mocd": 0.00312, "diversity": 0.23071}}}}) == [
        ("mCSD", "0.02609", "LPIPS"), ("mOCD", "0.00312", "LPIPS"),
        ("diversity", "0.2307", "LPIPS"),
        ("Fréchet distance", "12.35", "weights of x.pth; few pictures")]
