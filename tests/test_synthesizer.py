"""Synthesizer: the same pictures as the model, with the layout's work done once."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from functools import partial, partialmethod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from smis_kernels import LabelLayout, WinogradConv2d, use_backend
from smis_kernels.modules.spade import CGNorm
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import max_error
from smis_models import create_model
from smis_models.data.scenes import sample_scene
from smis_models.families.ccfpse import CCFPSEGenerator, ConditionalBlock, KeptPredictions
from smis_models.io.seeds import derived_seed
from smis_models.synthesis.synthesizer import Synthesizer, frozen_copy

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
MODELS = {
    "groupdnet_deepfashion": {"ngf": 8, "nef": 32, "image_size": (64, 64)},
    "groupdnet_cityscapes": {"ngf": 70, "nef": 70, "image_size": (64, 128)},
}


def with_biases(model: nn.Module) -> nn.Module:
    """They start at zero, where one that is left out does not show."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("bias"):
                p.normal_(0, 0.1, generator=generator)
    return model


def small(name: str) -> tuple[nn.Module, Tensor, Tensor | None]:
    model = with_biases(create_model(name, init_gain=1.0, **MODELS[name]).double().eval())
    scene = sample_scene("street", *model.preset.image_size, model.preset.classes, 0)
    labels = torch.from_numpy(scene.labels.astype("int64"))[None]
    instances = torch.from_numpy(scene.instances.astype("int64"))[None]
    return model, labels, instances if model.preset.instance_edge else None


def plain(model: nn.Module, labels: Tensor, instances: Tensor | None, z: Tensor) -> Tensor:
    with use_backend("reference"), torch.no_grad():
        return model(model.semantics(labels, instances), z)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every table that is built."""
    rows: list[int] = []
    build = CGNorm._build_table

    def counting(self: CGNorm, layout: LabelLayout, windows3: Tensor, windows: Tensor,
                 path: str) -> Tensor:
        rows.append(len(windows))
        return build(self, layout, windows3, windows, path)

    monkeypatch.setattr(CGNorm, "_build_table", counting)
    return rows


@pytest.mark.parametrize("name", MODELS)
def test_samples_are_those_of_the_model(name: str, built: list[int]) -> None:
    model, labels, instances = small(name)
    s = Synthesizer(model, labels, instances)
    z = s.code(3)
    assert max_error(s.sample(z), plain(model, labels, instances, z)) < 1e-9
    tables = len(built)
    assert tables > 0
    assert max_error(s.sample(seed=5), plain(model, labels, instances, s.code(5))) < 1e-9
    assert len(built) == tables  # further samples build nothing


@pytest.mark.parametrize("name", MODELS)
def test_an_edit_computes_new_windows_only(name: str, built: list[int]) -> None:
    model, labels, instances = small(name)
    s = Synthesizer(model, labels, instances)
    z = s.code(0)
    s.sample(z)
    whole = max(built)
    built.clear()
    edited = labels.clone()
    edited[:, 20:28, 20:28] = labels.max()
    s.update(edited, instances)
    assert max_error(s.sample(z), plain(model, edited, instances, z)) < 1e-9
    assert max(built) < whole / 2
    built.clear()
    s.update(labels, instances)  # back: only the edit's own windows are not there any more
    assert max_error(s.sample(z), plain(model, labels, instances, z)) < 1e-9
    assert max(built, default=0) < whole / 2


def test_tables_of_earlier_edits_are_freed() -> None:
    model, labels, instances = small("groupdnet_deepfashion")
    s = Synthesizer(model, labels, instances)
    caches = []
    for i in range(4):
        s.sample(seed=0)
        caches.append(weakref.ref(s.layout.tables))
        s.update(torch.where(labels == i, labels.max(), labels), instances)
    s.sample(seed=0)
    gc.collect()
    assert sum(cache() is not None for cache in caches) <= 1


def ccfpse() -> tuple[nn.Module, Tensor]:
    model = with_biases(create_model("ccfpse_ade20k", init_gain=1.0, ngf=8, hidden=8, vae=True,
                                     image_size=(64, 64)).double().eval())
    labels = torch.from_numpy(sample_scene("street", 64, 64, 34, 0).labels.astype("int64"))
    return model, labels[None]


@pytest.mark.parametrize("kept", [True, False])
def test_what_the_map_decides_is_predicted_once(kept: bool,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """From a layout's second picture on CC-FPSE's kernels, gates, gamma and beta are kept."""
    model, labels = ccfpse()
    made: list[str] = []
    for cls, name in ((ConditionalBlock, "_predictions"), (CCFPSEGenerator, "_pyramid")):
        def counting(whole: Any, self: nn.Module, *arguments: Any) -> Any:
            made.append(type(self).__name__)
            return whole(self, *arguments)

        monkeypatch.setattr(cls, name, partialmethod(partial(counting, getattr(cls, name))))
    s = Synthesizer(model, labels, **({} if kept else {"prediction_bytes": 0}))
    edited = labels.clone()
    edited[:, 20:40, 20:40] = labels.max()
    for seen in (labels, edited):
        pictures, counts = [], []
        for seed in range(4):
            made.clear()
            pictures.append(s.sample(seed=seed))
            counts.append(len(made))
        once = sum(isinstance(m, ConditionalBlock) for m in model.generator.modules()) + 1
        assert counts == ([once, once, 0, 0] if kept else [once] * 4)
        for seed, picture in enumerate(pictures):
            assert max_error(picture, plain(model, seen, None, s.code(seed))) < 1e-9
        s.update(edited)


def test_predictions_fit_their_budget_and_are_freed() -> None:
    model, labels = ccfpse()
    whole, part = (Synthesizer(model, labels, prediction_bytes=size) for size in (2**30, 2**21))
    for s in (whole, part):
        for seed in range(2):
            s.sample(seed=seed)

    def kept(s: Synthesizer) -> list[KeptPredictions]:
        assert s.layout.tables is not None
        return [p for p in s.layout.tables._predictions.values() if isinstance(p, KeptPredictions)]

    sizes = [sum(t.nbytes for p in kept(s) for t in (*p._kernels.values(), *p._gates.values()))
             for s in (whole, part)]
    assert 0 < sizes[1] <= 2**21 < sizes[0]
    freed = [weakref.ref(p) for p in kept(whole)]
    whole.update(labels)
    gc.collect()
    assert freed and not any(p() for p in freed)


def test_resampling_and_morphing() -> None:
    model, labels, instances = small("groupdnet_deepfashion")
    s = Synthesizer(model, labels, instances)
    s.sample(seed=0)
    start = s.code(0)
    s.resample(2, seed=1)
    assert s.z is not None
    changed = (s.z != start).flatten(2).any(2)[0].nonzero().flatten()
    assert changed.tolist() == list(range(*model.generator.class_channels(2).indices(64)))
    frames = s.morph(s.code(0), s.code(1), steps=3)
    assert frames.shape == (3, 1, 3, 64, 64)
    assert max_error(frames[0], s.sample(s.code(0))) == 0
    assert max_error(frames[2], s.sample(s.code(1))) == 0
    with pytest.raises(ValueError, match="steps: expected a whole number of at least 2"):
        s.morph(start, start, 1)
    with pytest.raises(ValueError, match="index: expected a class"):
        s.resample(8)


def test_an_images_code_depends_on_its_place_alone() -> None:
    model, labels, _ = small("groupdnet_deepfashion")
    codes = [Synthesizer(model, labels.expand(n, -1, -1)).code(3) for n in (1, 2, 3)]
    for few, more in itertools.pairwise(codes):
        assert few is not None and more is not None
        assert torch.equal(more[: len(few)], few)
        assert not torch.equal(more[-1], few[-1])


def test_a_morph_keeps_the_codes_deviation() -> None:
    """In the middle of a straight line 0.71 of it is left."""
    model, labels, _ = small("groupdnet_deepfashion")
    s, seen = Synthesizer(model, labels), []
    sample = s.sample
    s.sample = lambda z: (seen.append(z), sample(z))[1]  # type: ignore[method-assign]
    start, end = s.code(0), s.code(1)
    assert start is not None and end is not None
    end[:, 8:16] = start[:, 8:16]
    s.morph(start, end, steps=5)
    assert torch.equal(seen[0], start)
    assert torch.equal(seen[-1], end)
    for z in seen:
        torch.testing.assert_close(z[:, 8:16], start[:, 8:16], rtol=0, atol=0)
        assert 0.9 < float(z.std()) / float(torch.cat([start, end]).std()) < 1.1


@torch.no_grad()
def test_changed_weights_are_refused() -> None:
    """Parameters and buffers alike, changed in place, exchanged or loaded."""
    model, labels, instances = small("groupdnet_deepfashion")
    generator = model.generator
    buffers = [next(b for n, b in generator.named_buffers() if n.endswith(kind))
               for kind in ("running_mean", "running_var", "weight_u", "weight_v")]
    changes: list[Callable[[], object]] = [
        lambda: generator.conv_img.bias.add_(1),
        lambda: setattr(generator.conv_img, "bias", nn.Parameter(generator.conv_img.bias + 1)),
        lambda: model.load_state_dict(model.state_dict()),
        *(partial(buffer.mul_, 1.5) for buffer in buffers),
    ]
    for change in changes:
        s = Synthesizer(model, labels, instances)
        change()
        with pytest.raises(RuntimeError, match="weights have changed"):
            s.sample()


def test_the_encoder_may_change() -> None:
    model, labels, instances = small("groupdnet_deepfashion")
    s = Synthesizer(model, labels, instances)
    before = s.sample(seed=2)
    with torch.no_grad():
        model.encoder.fc_mu.bias.add_(1)
    assert torch.equal(s.sample(seed=2), before)


def test_codes_are_those_of_their_seed() -> None:
    """N(0, 1) of torch's own generator; a further code is another."""
    model, labels, instances = small("groupdnet_deepfashion")
    s = Synthesizer(model, labels.expand(2, -1, -1), instances)
    code = s.code(7)
    expected = torch.cat([
        model.generator.sample_latent(1, torch.Generator().manual_seed(seed))
        for seed in (7, derived_seed(7, 1))])
    assert code is not None and torch.equal(code, expected)
    assert not torch.equal(code[0], code[1])
    assert not torch.equal(code, s.code(8))
    first, again = s.sample(seed=7), s.sample(code)
    assert torch.equal(first, again) and torch.equal(s.z, code)
    changed = s.resample(1, seed=9)
    channels = model.generator.class_channels(1)
    expected = code.clone()
    expected[:, channels] = s.code(9)[:, channels]
    assert torch.equal(s.z, expected)
    assert torch.equal(s.resample(1, seed=9, z=code), changed)


def test_a_class_is_drawn_anew_in_the_code_that_is_given() -> None:
    """Whatever was painted before; of nothing painted, in seed 0's. No code is written to."""
    model, labels, instances = small("groupdnet_deepfashion")
    s = Synthesizer(model, labels, instances)
    channels = model.generator.class_channels(1)
    for given, start in ((None, s.code(0)), (s.code(4), s.code(4))):
        s.resample(1, seed=9, z=given)
        expected = start.clone()
        expected[:, channels] = s.code(9)[:, channels]
        assert torch.equal(s.z, expected)
        assert given is None or torch.equal(given, start)
    held = s.z
    before = held.clone()
    s.resample(2, seed=5)
    assert torch.equal(held, before)


def test_a_model_in_training_is_painted_with_in_eval_mode() -> None:
    model, labels, instances = small("groupdnet_deepfashion")
    expected = Synthesizer(model, labels, instances).sample(seed=1)
    statistics = [b.clone() for b in model.train().buffers()]
    assert torch.equal(Synthesizer(model, labels, instances).sample(seed=1), expected)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), statistics, strict=True))


def test_a_layout_that_is_given_stays_its_owners() -> None:
    model, labels, _ = small("groupdnet_deepfashion")
    layout = LabelLayout.from_labels(labels, model.preset.classes)
    expected = Synthesizer(model, labels).sample(seed=1)
    s = Synthesizer(model, layout)
    assert layout.tables is None
    layout.vectors.mul_(2)
    assert torch.equal(s.sample(seed=1), expected)


def test_freezing_leaves_the_model_alone() -> None:
    model, labels, instances = small("groupdnet_deepfashion")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    frozen = frozen_copy(model.generator)
    assert not any("weight_orig" in key for key in frozen.state_dict())
    assert frozen.fc.weight.data_ptr() == model.generator.fc.weight.data_ptr()
    assert all(not p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    z = model.generator.sample_latent(1)
    semantics = model.semantics(labels, instances)
    with torch.no_grad():
        assert max_error(frozen(semantics, z), model.generator(semantics, z)) < 1e-12


@pytest.mark.skipif(missing("cpu") is not None, reason="the format is that of the CPU's kernels")
def test_folded_weights_lie_as_their_convs_read_them() -> None:
    """Ours read a kernel's taps where they lie together; torch's convs would copy such a weight."""
    wide = WinogradConv2d(64, 64, 3, padding=1)
    narrow, strided = WinogradConv2d(4, 8, 3, padding=1), nn.Conv2d(64, 64, 3, stride=2)
    network = nn.Sequential(*map(nn.utils.spectral_norm, (wide, narrow, strided)))
    last = torch.channels_last
    for dtype, ours in ((None, True), (torch.float64, True), (torch.bfloat16, False)):
        weights = [module.weight for module in frozen_copy(network, dtype)]
        assert [w.is_contiguous() for w in weights] == [ours, False, False]
        assert all(w.is_contiguous() or w.is_contiguous(memory_format=last) for w in weights)
        assert {w.dtype for w in weights} == {dtype or torch.float32}
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_bad_labels_name_themselves() -> None:
    model, labels, _ = small("groupdnet_deepfashion")
    with pytest.raises(ValueError, match=r"labels: expected 0\.\.7, got 9"):
        Synthesizer(model, torch.full_like(labels, 9))
    model, labels, _ = small("groupdnet_cityscapes")
    with pytest.raises(ValueError, match="instances: expected a map of ids"):
        Synthesizer(model, labels)


def distinct_windows(labels: Tensor, size: int, reach: int) -> set[bytes]:
    """The map's distinct windows at a size, by brute force; outside is -1."""
    source = (torch.arange(size) * labels.shape[1]) // size
    resized = labels[0][source[:, None], source[None]]
    padded = nn.functional.pad(resized, [reach] * 4, value=-1).to(torch.int8).numpy()
    width = 2 * reach + 1
    return {padded[y:y + width, x:x + width].tobytes() for y in range(size) for x in range(size)}


@torch.no_grad()
def test_a_chain_of_edits_is_exact_and_counts_its_windows() -> None:
    """Classes come and go, so that symbols are numbered anew; some edits change nothing."""
    model, labels, _ = small("groupdnet_deepfashion")
    rng = torch.Generator().manual_seed(0)
    sizes = [2**k for k in range(7)]
    s = Synthesizer(model, labels)
    z = s.code(0)
    s.sample(z)
    found = {size: distinct_windows(labels, size, 2) for size in sizes}
    assert s.windows == (sum(map(len, found.values())), 0)
    for k in range(10):
        labels = labels.clone()
        if k == 3:
            labels[labels == labels.min()] = labels.max()  # the least class goes: ranks shift
        elif k == 5:
            labels[0, 0, 0] = 0  # and comes back, in a corner
        elif k != 7:  # at 7 nothing changes
            y, x = torch.randint(0, 50, (2,), generator=rng).tolist()
            labels[0, y:y + 9, x:x + 6] = int(torch.randint(8, (), generator=rng))
        s.update(labels)
        picture = s.sample(z)
        fresh = Synthesizer(model, labels)
        assert max_error(picture, fresh.sample(z)) < 1e-12
        now = {size: distinct_windows(labels, size, 2) for size in sizes}
        new = sum(len(now[size] - found[size]) for size in sizes)
        assert s.windows == (new, sum(map(len, now.values())) - new)
        found = now


@torch.no_grad()
def test_an_edit_of_another_number_of_maps() -> None:
    model, labels, _ = small("groupdnet_deepfashion")
    s = Synthesizer(model, labels)
    s.sample(seed=0)
    pair = torch.cat([labels.flip(2), labels])
    s.update(pair)
    z = s.code(0)
    assert max_error(s.sample(z), plain(model, pair, None, z)) < 1e-9
    assert s.windows[1] > 0
    s.update(pair.flip(0))  # the same windows in another order
    assert max_error(s.sample(z), plain(model, pair.flip(0), None, z)) < 1e-9
    assert s.windows[0] == 0 and s.windows[1] > 0


def test_a_model_that_has_just_learned_is_copied() -> None:
    """Spectral norm leaves weights with a graph, which copies nothing."""
    model, labels, _ = small("groupdnet_deepfashion")
    z = torch.zeros(1, 64, 4, 4, dtype=torch.float64)
    expected = model(model.semantics(labels), z)
    expected.mean().backward()
    assert model.generator.up_3.conv_0.weight.grad_fn is not None
    assert max_error(Synthesizer(model, labels).sample(z), expected.detach()) < 1e-9
    for twin in (copy.deepcopy(model), AveragedModel(model.generator).module):
        generator = getattr(twin, "generator", twin)
        assert max_error(plain(model, labels, None, z),
                         generator(model.semantics(labels), z).detach()) < 1e-9
        assert not any(a is b for a, b in zip(generator.parameters(), model.generator.parameters(),
                                              strict=True))


def test_a_code_that_cannot_be_read_is_named_and_the_current_one_stays() -> None:
    model, labels, instances = small("groupdnet_deepfashion")
    s = Synthesizer(model, labels, instances)
    first = s.sample(seed=3)
    assert s.z is not None
    current = s.z.clone()
    for z, error, message in (
            (current.float(), TypeError, r"^z: expected torch.float64 on cpu, as the weights are, "
             r"got torch.float32 on cpu; use z.to\(s.code\(0\)\)$"),
            (current.numpy(), TypeError, "^z: expected a tensor, got ndarray; "),
            (current[:, :8], ValueError, "^z: expected "),
            (current.repeat(2, 1, 1, 1), ValueError, "^z: expected ")):
        with pytest.raises(error, match=message):
            s.sample(z)
        assert s.z is not None
        assert torch.equal(s.z, current)
    assert torch.equal(s.sample(s.z), first)
    for index in ("sky", 2.0, -1, model.preset.classes):
        last = model.preset.classes - 1
        with pytest.raises(ValueError, match=f"^index: expected a class 0..{last}, got {index!r}$"):
            s.resample(index)
    for steps in (1, 2.5):
        with pytest.raises(ValueError, match=r"^steps: expected a whole number of at least 2"):
            s.morph(current, current, steps)
