"""Tables of a comparison, and the order that it found beside the published one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smis_models.benchmark.records import markdown_table
from smis_models.metrics import protocol_title

_HIGHER = {"mCSD": True, "mOCD": False, "diversity": True, "FPS": True, "FID": False}
_KEYS = {"mCSD": "mcsd", "mOCD": "mocd", "diversity": "lpips", "FPS": "fps", "FID": "fid"}


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what was measured."""
    systems: Mapping[str, Any] = result["systems"]
    names = [facts["name"] for facts in result["distances"]]
    head = ["system"]
    for name in names:
        head += [f"mCSD, {name}", f"mOCD, {name}", f"diversity, {name}"]
    fid = any("fid" in row for row in systems.values())
    head += [*(["FID"] if fid else []), "mIoU", "accuracy", "FPS", "FPS, reference",
             "parameters, M", "peak MB, training step", "peak MB, inference", "steps", "images"]
    rows = []
    for system, row in systems.items():
        line = [system]
        for name in names:
            found = row["diversity"][name]
            line += [_number(found[key], 4) for key in ("mcsd", "mocd", "diversity")]
        line += [_number(row["fid"]["fid"], 2)] if fid else []
        line += [
            f"{row['segmentation']['miou']:.1%}", f"{row['segmentation']['accuracy']:.1%}",
            _number(row["fps"], 1), _number(row["fps_reference"], 1),
            _number(row["parameters"] / 1e6, 2), _number(row["training_memory"], 0),
            _number(row["memory"], 1), str(row["steps"]), str(row["images"]),
        ]
        rows.append(line)
    return head, rows


def _values(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Metric -> system -> value; of the first distance."""
    systems: Mapping[str, Any] = result["systems"]
    found: dict[str, dict[str, float]] = {
        "FPS": {name: row["fps"] for name, row in systems.items()}}
    if result["distances"]:
        first = result["distances"][0]["name"]
        for metric in ("mCSD", "mOCD", "diversity"):
            found[metric] = {name: row["diversity"][first][metric.lower()]
                             for name, row in systems.items()}
    if all("fid" in row for row in systems.values()):
        found["FID"] = {name: row["fid"]["fid"] for name, row in systems.items()}
    return found


def _ordered(values: Mapping[str, float], metric: str) -> list[str]:
    return sorted(values, key=lambda name: values[name], reverse=_HIGHER[metric])


def found_order(result: Mapping[str, Any]) -> dict[str, tuple[list[str], list[str]]]:
    """Metric -> (systems from best to worst as found, as published).

    mCSD, mOCD and diversity are those of the first distance; the published diversity is LPIPS.
    """
    orders = {}
    for metric, values in _values(result).items():
        published = {name: result["systems"][name]["published"][_KEYS[metric]]
                     for name in values}
        orders[metric] = _ordered(values, metric), _ordered(published, metric)
    return orders


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know of the numbers."""
    settings, names = result["settings"], [facts["name"] for facts in result["distances"]]
    said = [
        f"Each system trained for {settings['minutes']:g} minutes on {result['device']}, batch "
        f"{settings['batch']}, {settings['size']}x{settings['size']}, on generated scenes; "
        f"perceptual loss {'on' if settings['vgg'] else 'off (no VGG19 weights)'}; the same seed, "
        "learning rates and weights of the losses as published, without decay.",
        f"Protocol {protocol_title(result['protocol'])}.",
        f"mCSD, mOCD and diversity: {settings['layouts']} held-out layouts, {settings['samples']} "
        f"pictures each, {settings['pairs']} pairs, mask mode "
        f"{result['protocol']['diversity']['mask_mode']}; distances: {'; '.join(names) or 'none'}.",
        "mIoU and accuracy: what the generated scenes' own pixel classifier reads.",
        "FPS: one picture of a new label map, batch 1; by this library, and op by op as the "
        "papers' code. Peak memory: largest sum of live allocations, weights excluded.",
        "SHE is a study with people and left out."
        + ("" if result["fid"] else " FID is left out: no Inception weights were given."),
    ]
    said += [f"{name} ended before its time, after {row['steps']} steps: {row['failure']}"
             for name, row in result["systems"].items() if row["failure"]]
    if not any(name.startswith("LPIPS (") for name in names):
        said.append("No distance above is LPIPS: no ImageNet weights of its trunk were given.")
    return said


def markdown(result: Mapping[str, Any]) -> str:
    """The report: table, notes, orders."""
    head, rows = table(result)
    about = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    orders = [
        [metric, " > ".join(found), " > ".join(published)]
        for metric, (found, published) in found_order(result).items()
    ]
    published = [
        [name, *(f"{row['published'][key]:g}" for key in (
            "fid", "mcsd", "mocd", "lpips", "she", "fps", "parameters"))]
        for name, row in result["systems"].items()
    ]
    return "\n\n".join([
        "# The systems of GroupDNet's comparison, rerun", f"Commit {result['commit']}; {about}.",
        markdown_table(head, rows), "\n".join(f"- {line}" for line in notes(result)),
        "## Order, from best to worst",
        "As found here, whatever it is, beside the order of the published figures (DeepFashion, "
        "256x256), whose diversity is LPIPS.",
        markdown_table(["metric", "found", "published"], orders),
        "## Published figures (DeepFashion)",
        markdown_table(["system", "FID", "mCSD", "mOCD", "LPIPS", "SHE", "FPS", "parameters, M"],
                        published),
    ]) + "\n"
