"""Clusters of instance features: the published rules, safe files, sampling per image."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from smis_models import create_model
from smis_models.synthesis.features import (
    FeatureClusters,
    FeatureError,
    class_of,
    encode_features,
)
from smis_models.synthesis.scene import read_clusters


class _Identity:
    """An encoder whose features are the image."""

    def features(self, image: Tensor) -> Tensor:
        return image


@pytest.fixture
def clusters() -> FeatureClusters:
    generator = np.random.default_rng(0)
    return FeatureClusters({
        label: generator.normal(size=(count, 3)).astype(np.float32)
        for label, count in ((7, 4), (26, 10), (33, 1))
    })


def test_class_of() -> None:
    assert class_of(torch.tensor([0, 7, 999, 1000, 26001, 33999])).tolist() == [
        0, 7, 999, 1, 26, 33
    ]


def test_encode_leaves_small_instances_out() -> None:
    ids = torch.full((1, 64, 64), 7)
    ids[0, :8, :8] = 26001  # 64 pixels: exactly 1/64 of the image, so too small
    ids[0, 20:25, 20:33] = 26002  # 65 pixels
    image = torch.rand((1, 3, 64, 64)) * 2 - 1
    steps: list[str] = []
    found = encode_features(_Identity(), [(image, ids), (-image, ids)], steps.append)
    assert list(found) == [7, 26]
    assert found[26].shape == found[7].shape == (2, 3)
    expected = image[0, :, 20:25, 20:33].mean((1, 2)).numpy()
    np.testing.assert_allclose(found[26], np.stack([expected, -expected]), rtol=1e-5, atol=1e-6)
    assert steps == ["2 instances", "2 instances"]


def test_features_of_the_encoder_are_constant_on_instances() -> None:
    encoder = create_model("pix2pixhd_cityscapes_features", part="encoder", nef=2).eval()
    image, ids = torch.rand((1, 3, 64, 64)) * 2 - 1, torch.arange(4).repeat(1, 64, 16).sort(2)[0]
    ids = ids.expand(1, 64, 64)
    with torch.no_grad():
        planes = encoder(image, ids)
    found = encode_features(encoder, [(image, ids)])
    for i in range(4):
        torch.testing.assert_close(planes[0, :, 5, 16 * i + 3], torch.from_numpy(found[i][0]))


def test_fit_round_trips(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    generator = np.random.default_rng(1)
    centers = generator.normal(size=(10, 3)) * 10
    many = (centers[generator.integers(10, size=300)] + 0.01 * generator.normal(size=(300, 3)))
    features = {24: many.astype(np.float32), 26: np.ones((1, 3), np.float32)}
    fitted = FeatureClusters.fit(features)
    assert fitted.centers[24].shape == (10, 3)
    assert fitted.centers[26].tolist() == [[1, 1, 1]]
    nearest = np.abs(fitted.centers[24][:, None] - centers).max(2).min(1)
    assert nearest.max() < 0.1
    from sklearn.cluster import KMeans

    blurred = (5 * centers[generator.integers(10, size=90)] + 20 * generator.normal(size=(90, 3)))
    rows = blurred.astype(np.float32)  # without clear clusters, where starts decide
    published = KMeans(10, n_init=10, random_state=0).fit(rows).cluster_centers_
    np.testing.assert_array_equal(FeatureClusters.fit({5: rows}).centers[5],
                                  published.astype(np.float32))
    again = FeatureClusters.fit(features)
    loaded = FeatureClusters.load(fitted.save(tmp_path / "features.npz"))
    for label in (24, 26):
        np.testing.assert_array_equal(loaded.centers[label], fitted.centers[label])
        np.testing.assert_array_equal(again.centers[label], fitted.centers[label])
    assert loaded.channels == 3


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_official_files_are_converted(protocol: int, clusters: FeatureClusters,
                                      tmp_path: Path) -> None:
    path = tmp_path / "features_clustered_010.npy"
    held = np.empty((), object)
    held[()] = dict(clusters.centers)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"shape": (), "fortran_order": False, "descr": "|O"})
        pickle.dump(held, file, protocol=protocol)
    loaded = FeatureClusters.load(path)
    assert loaded.centers.keys() == clusters.centers.keys()
    for label, array in clusters.centers.items():
        np.testing.assert_array_equal(loaded.centers[label], array)
    # As published, a class of no instance has no rows.
    np.save(path, {**clusters.centers, 3: np.zeros((0, 3))}, allow_pickle=True)
    loaded = FeatureClusters.load(path)
    assert loaded.centers.keys() == clusters.centers.keys()
    np.testing.assert_array_equal(loaded.centers[26], clusters.centers[26])


class _Python2(pickle._Pickler):
    """Writes bytes as Python 2 did, whose strings they were."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def _save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch[bytes] = _save_bytes


def test_files_of_python_2_are_read(clusters: FeatureClusters, tmp_path: Path) -> None:
    """As pix2pixHD's authors wrote theirs: the numbers are strings of bytes above 127 too."""
    path = tmp_path / "features_clustered_010.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"shape": (), "fortran_order": False, "descr": "|O"})
        _Python2(file, protocol=2).dump(dict(clusters.centers))
    assert pickle.BINSTRING in path.read_bytes()
    loaded = FeatureClusters.load(path)
    assert loaded.centers.keys() == clusters.centers.keys()
    for label, array in clusters.centers.items():
        np.testing.assert_array_equal(loaded.centers[label], array)


class _Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code was run",)


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "clusters.npy"
    np.save(path, {7: _Malicious()}, allow_pickle=True)  # type: ignore[arg-type]
    with pytest.raises(FeatureError, match="more than numpy arrays, which is never run"):
        FeatureClusters.load(path)
    archive = tmp_path / "clusters.npz"
    np.savez(archive, class_7=np.array([_Malicious()], object))
    with pytest.raises(FeatureError, match="is no file of clusters"):
        FeatureClusters.load(archive)
    assert "code was run" not in capsys.readouterr().out


def test_bad_files(tmp_path: Path, clusters: FeatureClusters) -> None:
    with pytest.raises(FeatureError, match="is no file"):
        FeatureClusters.load(tmp_path / "absent.npz")
    whole = clusters.save(tmp_path / "whole.npz").read_bytes()
    spoilt = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]  # whose checksum is another
    for name, content in (("a.npz", b""), ("b.npz", b"\x89PNG"), ("c.npy", b"\x93NUMPY"),
                          ("d.npy", b""), ("cut.npz", whole[:-30]), ("spoilt.npz", spoilt)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FeatureError) as caught:
            FeatureClusters.load(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
    np.savez(tmp_path / "e.npz", other=np.zeros(3))
    with pytest.raises(FeatureError, match="expected arrays class_<label>"):
        FeatureClusters.load(tmp_path / "e.npz")
    np.save(tmp_path / "f.npy", np.zeros(3))
    with pytest.raises(FeatureError, match="expected one pickled dict"):
        FeatureClusters.load(tmp_path / "f.npy")
    with pytest.raises(FeatureError, match="ending in"):
        clusters.save(tmp_path / "g.npy")
    for centers in ({}, {7: np.zeros(3, np.float32)}, {7: np.full((1, 3), np.nan, np.float32)},
                    {7: np.zeros((1, 3), np.float32), 8: np.zeros((1, 4), np.float32)}):
        with pytest.raises(FeatureError, match="centers: expected"):
            FeatureClusters(centers)
    with pytest.raises(FeatureError, match="no instance is larger"):
        FeatureClusters.fit({})


def test_a_model_takes_clusters_of_its_channels_alone(tmp_path: Path) -> None:
    preset = create_model("pix2pixhd_cityscapes_features", device="meta").preset
    for channels in (2, 3, 4):
        path = FeatureClusters({1: np.ones((2, channels), np.float32)}).save(tmp_path / "c.npz")
        if channels == 3:
            found = read_clusters(preset, path)
            assert found is not None and found.channels == 3
        else:
            with pytest.raises(ValueError, match=f"expected 3 channels, got {channels}"):
                read_clusters(preset, path)


def test_sample(clusters: FeatureClusters) -> None:
    ids = torch.tensor([[[7, 7, 26001, 26002, 33, 11]]]).expand(2, 3, 6)
    planes = clusters.sample(ids, seed=5)
    assert planes.shape == (2, 3, 3, 6)
    for same in (ids.unsqueeze(1), ids.to(torch.uint16), ids.int()):
        assert torch.equal(planes, clusters.sample(same, seed=5))
    assert torch.equal(planes[:, :, 0], planes[:, :, 2])
    assert not planes[..., 5].any()  # class 11 has no clusters
    for b, x, label in ((0, 0, 7), (1, 2, 26), (1, 3, 26), (0, 4, 33)):
        assert planes[b, :, 1, x].numpy() in clusters.centers[label]
    many = torch.arange(26000, 26040).view(1, 1, 40).expand(2, 1, 40)
    drawn = clusters.sample(many)
    assert not torch.equal(drawn[0], drawn[1])  # each image draws its own
    assert len(drawn[0].flatten(1).unique(dim=1).T) > 5


def test_sample_by_index_and_choice(clusters: FeatureClusters) -> None:
    ids = torch.tensor([[[7, 26001, 26002, 33]]])
    planes = clusters.sample(ids, index=5, chosen={26002: 9})
    for x, (label, pick) in enumerate(((7, 1), (26, 5), (26, 9), (33, 0))):
        np.testing.assert_array_equal(planes[0, :, 0, x].numpy(), clusters.centers[label][pick])
    assert [clusters.count(i) for i in (7, 26000, 26999, 33001, 999, 11)] == [4, 10, 10, 1, 0, 0]
    # A choice changes its own instance only.
    drawn, changed = clusters.sample(ids, seed=2), clusters.sample(ids, seed=2, chosen={26001: 0})
    assert torch.equal(drawn[..., [0, 2, 3]], changed[..., [0, 2, 3]])
    for chosen, message in (({26001: 10}, "expected a cluster 0..9 for instance 26001, got 10"),
                            ({24001: 0}, "expected instances of the map, got 24001")):
        with pytest.raises(ValueError, match=message):
            clusters.sample(ids, chosen=chosen)


@pytest.mark.parametrize(("ids", "error", "message"), [
    (torch.zeros((1, 4, 5)), TypeError, "instances: expected integers, got float32"),
    (torch.full((1, 4, 5), -1), ValueError, "instances: expected ids from 0 on, got -1"),
    (torch.zeros((4, 5), dtype=torch.int64), ValueError, r"expected \(N, H, W\) or"),
    (torch.zeros((1, 2, 4, 5), dtype=torch.int64), ValueError, r"expected \(N, H, W\) or"),
    (torch.zeros((1, 0, 5), dtype=torch.int64), ValueError, "not empty"),
])
def test_sample_refuses_bad_ids(clusters: FeatureClusters, ids: Tensor,
                                error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        clusters.sample(ids)
    assert len(str(caught.value).splitlines()) == 1


def test_an_instance_keeps_its_features_when_another_is_edited(clusters: FeatureClusters) -> None:
    """Ids that come, go or change class before it in the map change nothing of the others."""
    ids = torch.tensor([[[26001, 26002, 26003, 7], [33000, 26004, 26005, 7]]])
    before = clusters.sample(ids, seed=4)
    drawn = {tuple(before[0, :, y, x].tolist()) for y in range(2) for x in range(1, 3)}
    assert len(drawn) > 1  # not one cluster for all
    for old, new in ((26001, 7), (26001, 26999), (7, 0), (33000, 26000), (26004, 1)):
        edited = torch.where(ids == old, new, ids)
        after, held = clusters.sample(edited, seed=4), ids != old
        assert torch.equal(after[:, :, held[0]], before[:, :, held[0]]), (old, new)
    batch = torch.cat([ids.flip(2), ids])
    assert torch.equal(clusters.sample(batch, seed=4)[1],
                       clusters.sample(torch.cat([ids * 0, ids]), seed=4)[1])
    assert not torch.equal(clusters.sample(ids, seed=5), before)
