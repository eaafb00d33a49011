"""mIoU and pixel accuracy: what a segmentation model reads back off the pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..families import Preset
from ..io.files import file_hash
from ..io.images import check_pictures

Segmenter = Callable[[Tensor], Tensor]
"""Pictures (N, 3, H, W) in [-1, 1] -> labels (N, H, W), or scores (N, classes, h, w)."""

# The 19 evaluated classes of Cityscapes, in the order of their train ids.
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INPUTS = ("symmetric", "unit", "imagenet")


@dataclass(frozen=True)
class LabelRule:
    """Which labels count, and what a prediction means.

    Attributes:
        name: "same": predictions are the model's own classes, and its class of pixels without one
            (unlabelled, else don't-care) is left out; "cityscapes": predictions are the 19 train
            ids, all other labels are left out; "ade20k": predictions 0..149 mean labels 1..150,
            label 0 is left out.
        ignored: labels whose pixels are left out.
        meaning: the label that prediction k stands for; None: k itself.
    """

    name: str
    ignored: frozenset[int]
    meaning: tuple[int, ...] | None = None


def label_rule(name: str, preset: Preset, dont_care: str = "ignore") -> LabelRule:
    """A rule by name for the model's labels; ``dont_care="count"`` leaves nothing out.

    Raises:
        ValueError: an unknown name, or a rule of another data set.
    """
    classes = range(preset.classes)
    if name == "same":
        # Where there is a class of unlabelled pixels, don't-care is a real one (ADE20K's 150).
        unknown = preset.dont_care if preset.unlabelled is None else preset.unlabelled
        rule = LabelRule(name, frozenset() if unknown is None else frozenset({unknown}))
    elif name == "cityscapes":
        rule = LabelRule(name, frozenset(classes) - frozenset(_CITYSCAPES), _CITYSCAPES)
    elif name == "ade20k":
        rule = LabelRule(name, frozenset({0}), tuple(range(1, 151)))
    else:
        raise ValueError(f"label-rule: expected same, cityscapes or ade20k; got {name!r}")
    if rule.meaning is not None and max(rule.meaning) >= preset.classes:
        raise ValueError(f"label-rule: {name} has labels up to {max(rule.meaning)}, the model "
                         f"classes 0..{preset.classes - 1}; use same")
    return rule if dont_care == "ignore" else LabelRule(name, frozenset(), rule.meaning)


def _integers(name: str, values: Any, where: str) -> NDArray[np.int64]:
    """A map of integers, of any kind of array."""
    found = np.asarray(values)
    if found.dtype.kind not in "iub":
        raise ValueError(f"{name}: expected integers, got {found.dtype}{where}; round and cast "
                         "them first")
    return found.astype(np.int64)


class SegmentationScore:
    r"""Sums a confusion matrix over pictures; mIoU and pixel accuracy of it.

    .. math:: \mathrm{IoU}_c = \frac{TP_c}{TP_c + FP_c + FN_c}

    over pixels whose label counts. Classes that neither labels nor predictions show are left out
    of the mean, as in the published evaluators.

    Args:
        classes: number of labels.
        rule: which of them count.

    Raises:
        ValueError: predictions of another shape, or labels or predictions that are no integers or
            out of range.

    Example:
        >>> score = SegmentationScore(8, LabelRule("same", frozenset()))
        >>> score.add(np.array([[0, 0, 1, 1]]), np.array([[0, 0, 1, 0]]))
        >>> round(score.result()["miou"], 3)
        0.583
    """

    def __init__(self, classes: int, rule: LabelRule) -> None:
        self.classes, self.rule = classes, rule
        self.matrix: NDArray[np.int64] = np.zeros((classes, classes), np.int64)

    def add(self, labels: NDArray[np.integer[Any]], predictions: NDArray[np.integer[Any]],
            source: str = "") -> None:
        """Count maps of one shape."""
        where = f" in {source}" if source else ""
        labels, predictions = _integers("labels", labels, where), _integers(
            "predictions", predictions, where)
        if labels.shape != predictions.shape:
            raise ValueError(f"predictions: expected the labels' shape {labels.shape}, got "
                             f"{predictions.shape}{where}")
        if not labels.size:
            return
        known = self.classes if self.rule.meaning is None else len(self.rule.meaning)
        low, high = int(predictions.min()), int(predictions.max())
        if low < 0 or high >= known:
            raise ValueError(f"predictions: expected 0..{known - 1} under the rule "
                             f"{self.rule.name!r}, got {low if low < 0 else high}{where}; "
                             "choose another --label-rule")
        if self.rule.meaning is not None:
            predictions = np.asarray(self.rule.meaning)[predictions]
        counted = ~np.isin(labels, list(self.rule.ignored))
        strange = labels[counted & ((labels < 0) | (labels >= self.classes))]
        if strange.size:
            raise ValueError(f"labels: expected 0..{self.classes - 1}, got {strange[0]}{where}; "
                             "relabel such pixels, or leave them out (ignored of the LabelRule)")
        pairs = labels[counted].astype(np.int64) * self.classes + predictions[counted]
        self.matrix += np.bincount(pairs, minlength=self.classes**2).reshape(self.matrix.shape)

    def result(self) -> dict[str, Any]:
        """``miou``, ``accuracy`` and ``iou`` by class, all in 0..1.

        Raises:
            ValueError: no pixel counted.
        """
        total = int(self.matrix.sum())
        if total == 0:
            raise ValueError("labels: expected pixels of classes that count, got none; see the "
                             "--label-rule")
        hits = np.diag(self.matrix).astype(float)
        union = self.matrix.sum(0) + self.matrix.sum(1) - hits
        iou = {c: float(hits[c] / union[c]) for c in range(self.classes)
               if union[c] and c not in self.rule.ignored}
        return {"miou": float(np.mean(list(iou.values()))), "accuracy": float(hits.sum() / total),
                "iou": {str(c): value for c, value in iou.items()}, "pixels": total,
                "label_rule": self.rule.name, "ignored": sorted(self.rule.ignored)}


def predict(segmenter: Segmenter, pictures: Tensor) -> NDArray[np.int64]:
    """(N, H, W) predictions; scores are enlarged bilinearly and the highest is taken.

    Raises:
        ValueError: pictures out of [-1, 1]; the segmenter gives neither labels nor scores, or
            scores that are no numbers.
    """
    check_pictures(pictures)
    with torch.no_grad():
        out = segmenter(pictures)
    if isinstance(out, (tuple, list)) and out:
        out = out[0]
    if isinstance(out, dict) and "out" in out:  # torchvision's segmentation models
        out = out["out"]
    batch, _, *size = pictures.shape
    if isinstance(out, Tensor) and out.dim() == 4 and len(out) == batch and out.shape[1] > 1:
        scores = F.interpolate(out.float(), size, mode="bilinear", align_corners=False)
        if scores.isnan().any():  # which argmax takes for the highest
            raise ValueError("segmenter: expected scores, got NaN; check its weights, and its "
                             "precision")
        out = scores.argmax(1)
    if isinstance(out, Tensor) and out.dim() == 4 and out.shape[1] == 1:
        out = out[:, 0]
    labelled = isinstance(out, Tensor) and not out.is_floating_point()
    if not labelled or tuple(out.shape) != (batch, *size):
        got = (f"{str(out.dtype).removeprefix('torch.')} {tuple(out.shape)}"
               if isinstance(out, Tensor) else type(out).__name__)
        raise ValueError(f"segmenter: expected scores ({batch}, classes, h, w) or integer labels "
                         f"{(batch, *size)}, got {got}")
    return out.long().cpu().numpy()


class FileSegmenter:
    """A segmentation model from a file: TorchScript (``.pt``), or ``torch.export`` (``.pt2``).

    Args:
        path: of the file.
        input: how it wants its pictures: "symmetric" (-1..1), "unit" (0..1) or "imagenet" (0..1,
            less ImageNet's mean, by its deviation).
        device: where it runs.

    Raises:
        ValueError: no such file, another kind of file, an unknown input.

    Example:
        >>> segmenter = FileSegmenter("drn_d_105.pt", "imagenet")  # doctest: +SKIP
    """

    def __init__(self, path: str | Path,
                 input: Literal["symmetric", "unit", "imagenet"] | str = "imagenet",
                 device: torch.device | str = "cpu") -> None:
        if input not in INPUTS:
            raise ValueError(f"segmenter-input: expected {', '.join(INPUTS)}; got {input!r}")
        self._path, self._input, self._device = Path(path), input, torch.device(device)
        if not self._path.is_file():
            raise ValueError(f"segmenter: {path} is no file; give a TorchScript .pt or a "
                             "torch.export .pt2")
        self._digest = file_hash(self._path)  # of what is loaded, whatever lies there later
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is on its way out
                if self._path.suffix == ".pt2":
                    self._model = torch.export.load(self._path).module().to(self._device)
                else:
                    self._model = torch.jit.load(str(self._path), map_location=self._device).eval()
        except Exception as error:  # damaged files raise many kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
            raise ValueError(f"segmenter: {path} is neither TorchScript nor torch.export "
                             f"({reason})") from error

    def facts(self) -> dict[str, Any]:
        """What a reader needs to compute the same number."""
        return {"segmenter": self._path.name, "sha256": self._digest, "input": self._input}

    def __call__(self, pictures: Tensor) -> Any:
        x = pictures.to(self._device).float()
        if self._input != "symmetric":
            x = (x + 1) / 2
        if self._input == "imagenet":
            mean, deviation = (x.new_tensor(v).view(1, 3, 1, 1) for v in _IMAGENET)
            x = (x - mean) / deviation
        return self._model(x)
