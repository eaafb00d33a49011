"""Part ``networks``: whole generators, published options, random weights, evaluation mode.

Spectral normalisation is folded for every provider. Each ratio is taken within one row. Compiling
takes most of the time, and yet the compiled row of a network follows it at once: a call that ends
early, or never comes, costs the last networks and not every figure against torch.compile.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smis_kernels import LabelLayout, use_backend
from smis_models.families import create_model
from smis_models.networks.semantics import compile_layout, semantics
from smis_models.synthesis.synthesizer import Synthesizer, frozen_copy

from .inputs import Scene
from .journal import Journal, Row, Skip
from .measure import Provider, compiled, measure, release, without_gradients
from .settings import Settings

LOW = torch.bfloat16
KIND = {"groupdnet_deepfashion": "person", "groupdnet_cityscapes": "street",
        "spade_cityscapes": "street", "ccfpse_cityscapes": "street"}
# Of a SPADE, in a dry run; at 32x32 a batch norm would see two values, and rounding decide.
TINY = {"ngf": 4, "image_size": (64, 64), "hidden": 8}
LEAST = 1 << 30


class Network:
    """A generator in fp32 and in low precision, with its inputs."""

    def __init__(self, scene: Scene, name: str, batch: int) -> None:
        self.scene, self.name, self.batch = scene, name, batch
        options: dict[str, Any] = scene.pick({}, TINY)
        self.model = create_model(name, part="generator", device=scene.device, init_gain=1.0,
                                  **options).eval()
        self.frozen: Any = frozen_copy(self.model)
        self.frozen.to(LOW).float()  # the same numbers in every dtype
        self.low: Any = copy.deepcopy(self.frozen).to(LOW)
        preset = self.model.preset
        kind, size = KIND.get(name, "indoor"), preset.image_size
        self.labels = scene.labels(kind, size, preset.classes, batch)
        self.ids = scene.instances(kind, size, batch) if preset.instance_edge else None
        self.planes = semantics(self.labels, preset, self.ids)
        drawn = self.model.sample_latent(batch, torch.Generator().manual_seed(0))
        self.z: Tensor | None = None if drawn is None else drawn.to(LOW).float()

    def code(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.z is None else self.z.to(dtype)

    def layout(self) -> LabelLayout:
        """The compiled layout; its resolutions are compiled by the first call."""
        return compile_layout(self.labels, self.model.preset, self.ids)

    def truth(self) -> Tensor:
        """The first image in fp64."""
        exact = copy.deepcopy(self.frozen).double()
        z = None if self.z is None else self.z[:1].double()
        with torch.no_grad():
            return reference(exact, self.planes[:1].double(), z)


def reference(network: nn.Module, *inputs: Any) -> Any:
    """The network op by op, as published."""
    with use_backend("reference"):
        return network(*inputs)


def _reference(net: Network, dtype: torch.dtype, last: bool, compile: bool = False) -> Any:
    network = net.frozen if dtype == torch.float32 else net.low
    planes = net.planes.to(dtype)
    if last:
        network = copy.deepcopy(network).to(memory_format=torch.channels_last)
        planes = planes.to(memory_format=torch.channels_last)
    function = compiled(reference) if compile else reference
    return without_gradients(function, network, planes, net.code(dtype))


def _ours(net: Network, dtype: torch.dtype, given: Any) -> Any:
    network = net.frozen if dtype == torch.float32 else net.low
    return without_gradients(network, given, net.code(dtype))


def _synthesizer(net: Network) -> Any:
    """Further samples of one layout: tables kept, the whole network one graph launch."""
    made = Synthesizer(net.low, net.labels, net.ids, cuda_graph=net.scene.device.type == "cuda")
    z = net.code(LOW)
    for _ in range(2):  # eagerly, then captured
        made.sample(z)
    return lambda: made.sample(z)


def _references(net: Network) -> list[Provider]:
    return [
        Provider("reference fp32", partial(_reference, net, torch.float32, False)),
        Provider("reference bf16 channels-last", partial(_reference, net, LOW, True), LOW),
    ]


def _graph(net: Network) -> Provider:
    return Provider("ours, graph", lambda: _ours(net, LOW, net.layout()), LOW,
                    "reference bf16 channels-last", graph=True)


def _row(net: Network, providers: list[Provider], least: int = 7) -> Row:
    row = measure(providers, net.truth, net.scene.device, seconds=2.0, least=least, judge="rms",
                  small=net.scene.dry, select=lambda image: image[:1], matrix=True)
    for entry in row["providers"].values():
        if "median" in entry:
            entry["images_per_second"] = net.batch / entry["median"]
    return {**row, "batch": net.batch, "model": net.name}


def generator(scene: Scene, name: str, batch: int) -> Row:
    """Eager references and ours in all its forms."""
    _check_memory(scene, batch)
    net = Network(scene, name, batch)
    like = "reference bf16 channels-last"
    return _row(net, [
        *_references(net),
        Provider("ours fp32", lambda: _ours(net, torch.float32, net.layout()),
                 like="reference fp32"),
        Provider("ours, layout in the call", lambda: _ours(net, LOW, net.planes.to(LOW)), LOW,
                 like),
        Provider("ours", lambda: _ours(net, LOW, net.layout()), LOW, like),
        _graph(net),
        Provider("ours, tables kept, graph", partial(_synthesizer, net), LOW, like),
    ])


def against_compiled(scene: Scene, name: str, batch: int) -> Row:
    """torch.compile of the reference in bf16, channels-last, replayed from a CUDA graph."""
    if scene.dry:
        raise Skip("dry run: compiling a network takes minutes on a CPU")
    net = Network(scene, name, batch)
    return _row(net, [
        _references(net)[1],
        Provider("compiled bf16", partial(_reference, net, LOW, True, True), LOW,
                 "reference bf16 channels-last", graph=True, optional=True),
        _graph(net),
    ])


def batch_size(scene: Scene, name: str, batch: int) -> Row:
    """Images a second at one batch size."""
    _check_memory(scene, batch)
    net = Network(scene, name, batch)
    return _row(net, [_references(net)[1], _graph(net)], least=5)


def _check_memory(scene: Scene, batch: int) -> None:
    if scene.device.type == "cuda":
        release()
        free = torch.cuda.mem_get_info()[0]
        if free < LEAST * (2 + batch):
            raise Skip(f"{free / 2**30:.0f} GiB are free, batch {batch} may need more")


def run(journal: Journal, settings: Settings) -> None:
    scene = Scene(settings)
    torch.backends.cudnn.benchmark = True
    main = (("groupdnet_deepfashion", 1), ("spade_coco", 1), ("groupdnet_ade20k", 1),
            ("ccfpse_coco", 4), ("spade_coco", 16))
    rest = (("groupdnet_cityscapes", 1), ("spade_cityscapes", 1))
    batches = (2, 4, 8, 32)
    if settings.dry_run:
        main, rest, batches = (("spade_coco", 1),), (), (2,)
    needs = 0.0 if settings.dry_run else 8.0
    rows: dict[str, tuple[Callable[[], Row], float]] = {}
    for name, batch in main:
        rows[f"{name} batch {batch}"] = partial(generator, scene, name, batch), needs
        rows[f"{name} batch {batch} compiled"] = (partial(against_compiled, scene, name, batch),
                                                  3 * needs)
    for batch in batches:
        rows[f"spade_coco batch {batch} rate"] = (partial(batch_size, scene, "spade_coco", batch),
                                                  needs)
    for name, batch in rest:
        rows[f"{name} batch {batch}"] = partial(generator, scene, name, batch), needs
    for name in journal.late_last(rows):
        journal.row(name, *rows[name])
        release()
