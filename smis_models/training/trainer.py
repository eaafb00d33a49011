"""One step of training, for every model, and the state that a run goes on from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smis_kernels.interface import release_weights

from ..families import SynthesisModel, checkpoint_file, create_model
from ..families.pix2pixhd import LocalEnhancer
from ..io.checkpoint import State, load_state, read_checkpoint
from ..io.seeds import derived_seed
from ..networks.perceptual import load_perceptual_loss
from .batches import MicroBatch, dataset, first_batches
from .config import TrainConfig
from .distributed import Processes, unsynchronized
from .objective import Losses, Step, frozen_parameters, generator_parts, objective
from .optimizers import EMA, PRECISIONS, adam
from .whiten import check_whitened, whiten_codes

_WHITENED = 512  # pictures that mean and covariance are taken of


class NonFiniteLoss(ValueError):
    """A loss became NaN or infinite; the message names it."""


class Trainer:
    """Model, optimizers and moving average; :meth:`step` trains on one batch.

    Generator and encoder are updated first, then the discriminator, each with Adam. Random numbers
    of a step depend on the seed and the step alone.

    Args:
        config: all options.
        device: of the networks.
        processes: that train together; gradients are averaged over them, and the statistics of
            synchronised norms are theirs in common.
        fresh: whether weights start from ``config.init``; not where :meth:`load_state` follows.

    Attributes:
        whole: "yes" where :meth:`state` is that after a step; after an error "half" where the
            generator had been updated and the discriminator had not, "no" in the middle of an
            update.
        computed: the losses of the last step, with their weights.

    Raises:
        ValueError: contradictory options.
        CheckpointError: ``config.init`` does not fit, a loss lacks its weights file.

    Example:
        >>> from smis_models.training import load_config
        >>> from smis_models.training.batches import Batches, dataset
        >>> small = ["--network.ngf=8", "--network.nef=8", "--data.batch=2", "--data.count=8"]
        >>> config = load_config("groupdnet_scenes_codes", [*small, "--data.workers=0"])
        >>> trainer = Trainer(config)
        >>> batches = Batches(dataset(config, "train"), config, trainer.processes, trainer.device)
        >>> losses = trainer.step(batches.step(), epoch=0)
    """

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu",
                 processes: Processes | None = None, *, fresh: bool = True) -> None:
        self.config, self.device = config, torch.device(device)
        self.processes = processes or Processes()
        perceptual = None
        if config.losses.perceptual > 0:  # first: it takes no time to tell that it is missing
            perceptual = load_perceptual_loss(config.losses.vgg)
        start = config if fresh else replace(config, init=None, whiten=False)
        parts = self.processes.count * config.optimizer.accumulate
        self.model = _start(start, self.device, parts).train()
        self.objective = objective(self.model, config, parts,
                                   None if perceptual is None else perceptual.to(self.device))
        self.step_count, self._epoch = 0, 0
        self.whole: Literal["yes", "half", "no"] = "yes"
        self.computed: dict[str, float] = {}
        self.ema = (
            EMA(self.model, config.optimizer.ema) if config.optimizer.ema > 0 else None
        )
        rates = config.optimizer
        self._discriminator = self.processes.wrap(
            Step(self.objective, "discriminator", [self.model.discriminator]))
        self._optimizer_d = adam(self.model.discriminator.parameters(), rates.discriminator, rates)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self._frozen: bool | None = None
        self._prepare(0)

    @property
    def painter(self) -> SynthesisModel:
        """The model that samples are shown of and that is exported: the average where there is."""
        return self.model if self.ema is None else self.ema.model

    def _prepare(self, epoch: int) -> None:
        """What an epoch trains: a new optimizer where pix2pixHD's global generator thaws."""
        frozen = epoch < self.config.schedule.freeze_global_epochs
        if frozen == self._frozen:
            return
        self._frozen = frozen
        if hasattr(self.model.generator, "freeze_global"):
            self.model.generator.freeze_global(frozen)
        rates = self.config.optimizer
        step = Step(self.objective, "generator", generator_parts(self.model))
        self._generator = self.processes.wrap(step)
        self._optimizer_g = adam(step.parameters(), rates.generator, rates)

    def rates(self, epoch: int) -> tuple[float, float]:
        """Learning rates of generator and discriminator in an epoch."""
        factor, rates = self.config.schedule.factor(epoch), self.config.optimizer
        return rates.generator * factor, rates.discriminator * factor

    def step(self, batches: Sequence[MicroBatch], epoch: int) -> dict[str, float]:
        """Train on the micro-batches of one step; the losses by name, over all of them and all
        processes.

        Raises:
            NonFiniteLoss: a loss or a gradient, before the weights that it would spoil are changed.
        """
        # A forward moves running statistics and spectral norms; an error puts them back.
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            losses = self._step(batches, epoch)
        except BaseException:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            raise
        self.computed = {name: self._weight(name) for name in losses}
        return losses

    def _weight(self, name: str) -> float:
        """The weight of a loss."""
        weights = self.config.losses
        of_name = {"gan": "adversarial", "fake": "discriminator", "real": "discriminator"}
        return float(getattr(weights, of_name.get(name, name)))

    def _step(self, batches: Sequence[MicroBatch], epoch: int) -> dict[str, float]:
        torch.manual_seed(derived_seed(self.config.seed, self.step_count, self.processes.rank))
        self._epoch = epoch
        self._prepare(epoch)
        self._share(batches)
        for optimizer, rate in zip((self._optimizer_g, self._optimizer_d), self.rates(epoch),
                                   strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
        fakes: list[list[Tensor]] = []

        def generator(batch: MicroBatch) -> Losses:
            losses, painted = self._generator(batch)
            fakes.append([fake.detach() for fake in painted])
            return losses

        with frozen_parameters(self.model.discriminator):
            losses = self._update(batches, self._generator, generator, self._optimizer_g)
        if self.ema is not None:
            self.ema.update()
        self.whole = "half"
        if self.config.losses.adversarial > 0:
            pictures = iter(fakes)

            def discriminator(batch: MicroBatch) -> Losses:
                painted = self.objective.repaint(batch, next(pictures))
                release_weights(self.model)  # the generator's, before the discriminator's forward
                return self._discriminator(batch, painted)

            losses |= self._update(batches, self._discriminator, discriminator, self._optimizer_d)
        self._scaler.update()
        self.step_count += 1
        self.whole = "yes"
        return losses

    def _share(self, batches: Sequence[MicroBatch]) -> None:
        """Weigh means over shown classes so that the step's is that of all its pictures."""
        if self.config.losses.latent > 0 and self.objective.coded_by_class:
            classes = self.model.preset.classes
            counts = torch.stack([batch.shown(classes).sum() for batch in batches]).double()
            shares = counts / self.processes.mean(counts.mean())
            for batch, share in zip(batches, shares.tolist(), strict=True):
                batch.share = share

    def _update(self, batches: Sequence[MicroBatch], wrapped: nn.Module, run: Any,
                optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Forward, backward and update of one side."""
        optimizer.zero_grad()
        dtype = PRECISIONS[self.config.precision]
        total: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            with unsynchronized(wrapped, last=i == len(batches) - 1):
                with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                    losses = run(batch)
                release_weights(self.model)
                share = torch.stack([x.float() for x in losses.values()]) / len(batches)
                self._scaler.scale(share.sum()).backward()
            for name, value in zip(losses, share.detach(), strict=True):
                total[name] = total[name] + value if name in total else value
        # All processes see the same values, and so stop together.
        mean = self.processes.mean(torch.stack(list(total.values())).double())
        values = dict(zip(total, mean.tolist(), strict=True))
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"losses.{name}: became {value} in step {self.step_count + 1}; lower the "
                    "learning rates or the term's weight, or train with precision fp32"
                )
        self._check_gradients(optimizer)
        self.whole = "no"
        self._scaler.step(optimizer)
        return values

    def _check_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Finite losses can have other gradients, which would spoil every weight."""
        if self._scaler.is_enabled():  # which skips such a step, and scales less from then on
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]
                     if p.grad is not None]
        if not bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
            raise NonFiniteLoss(
                f"losses: a gradient became infinite or NaN in step {self.step_count + 1}; lower "
                "the learning rates or the terms' weights, or train with precision fp32"
            )

    def state(self) -> dict[str, Any]:
        """All that the next step depends on: weights, buffers, moments, average, scale, step."""
        return {
            "step": self.step_count,
            "epoch": self._epoch,
            "computed": self.computed,
            "model": self.model.state_dict(),
            "average": None if self.ema is None else self.ema.averaged.state_dict(),
            "optimizer_g": self._optimizer_g.state_dict(),
            "optimizer_d": self._optimizer_d.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.step_count, self._epoch = state["step"], state["epoch"]
        self.computed = dict(state["computed"])
        self._prepare(state["epoch"])
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.averaged.load_state_dict(state["average"])
        for optimizer, name in ((self._optimizer_g, "optimizer_g"),
                                (self._optimizer_d, "optimizer_d")):
            optimizer.load_state_dict(state[name])
            for group in optimizer.param_groups:
                group["betas"] = self.config.optimizer.betas  # the state brings those of then
        if state["scaler"]:  # empty of a run that had another precision
            self._scaler.load_state_dict(state["scaler"])


def _start(config: TrainConfig, device: torch.device, parts: int) -> Any:
    """The model with random weights, or where ``config.init`` has them with those."""
    if config.whiten:
        check_whitened(config.network, config.init)
    options = vars(config.network)
    model = create_model(config.model, device=device, seed=config.seed,
                         init_gain=config.init_gain, **options)
    if config.init is None:
        return model
    generator = model.generator
    if isinstance(generator, LocalEnhancer):
        state = read_checkpoint(checkpoint_file(config.init))
        inner, encoder = (_part(name, state) for name in ("generator", "encoder"))
        inner = inner or state  # of a file of the generator alone
        last = f"model{generator.preset.enhancers}_"  # which a generator that lies inside lacks
        if not any(key.startswith(last) for key in inner):
            generator.load_global(inner)
            if encoder and generator.preset.has_encoder:
                load_state(model.encoder, encoder, source=config.init,
                           model=f"{config.model}, part encoder")
            elif generator.preset.has_encoder:
                _warn_of_random(config, ["encoder"])
            return model
    initial = create_model(config.model, config.init, device=device, **options)
    given = dict(initial.named_children())
    for name, part in model.named_children():
        if name in given:
            part.load_state_dict(given[name].state_dict())
    _warn_of_random(config, [name for name, _ in model.named_children() if name not in given])
    if config.whiten:
        whiten_codes(model.eval(), _first_pictures(config, device, parts))
    return model


def _part(name: str, state: State) -> State:
    """The tensors of one network of a whole model's state."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in state.items()
            if key.startswith(prefix)}


def _warn_of_random(config: TrainConfig, parts: list[str]) -> None:
    for name in parts:
        if name != "discriminator":  # which no run exports
            warnings.warn(f"init: {config.init} holds no {name}, which starts from random weights",
                          stacklevel=4)


def _first_pictures(config: TrainConfig, device: torch.device,
                    parts: int = 1) -> Iterator[MicroBatch]:
    """The first training pictures, as the first epoch crops and mirrors them, in batches."""
    return first_batches(dataset(config, "train", _WHITENED), config, device, _WHITENED, parts)
