"""Training options: plain dataclasses, checked when made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..data.preprocess import Mode
from ..families import LatentPreset, Pix2pixHDPreset, Preset, UNetPreset

PIXEL_MEANS = ("pixels", "classes")
GAN_MODES = ("hinge", "ls", "original", "w")


def _at_least(owner: str, options: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not value >= least:
            raise ValueError(f"{owner}.{name}: expected at least {least:g}, got {value}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the objective's terms; a term with weight 0 is neither computed nor logged.

    Args:
        gan: hinge, ls (least squares), original or w (Wasserstein).
        adversarial: of the adversarial loss; 0: no discriminator is trained, which makes a VAE.
        scales: how the discriminators' adversarial losses are combined, mean or sum.
        discriminator: weight of the discriminator's loss; 0.5 in pix2pixHD.
        feature_matching: L1 between the discriminator's features of fake and real.
        perceptual: L1 between VGG19 features of fake and real.
        vgg: file with torchvision's VGG19 weights, or None for the copy in torch's cache; where
            there is none, training does not start.
        kl: divergence of the codes from N(0, 1), summed over the images of a whole step.
        code_noise: factor of the posterior's noise in the codes that are painted from; 1 as
            published, 0 paints from the mean, which starts codes that noise would keep unused.
        pixel: mean L1 between fake and real; 0 as published.
        pixel_mean: of that L1, over all pixels, or over the pixels of each class and then over
            the classes that a picture shows, so that small ones count as much as the sky.
        prior: weight of the adversarial loss of pictures from codes drawn from N(0, 1).
        latent: L1 between such a code and the one that the encoder finds in its picture.
        diversity: weight of how far pictures of two drawn codes differ, up to a bound.
        diversity_bound: the bound, τ.
    """

    gan: Literal["hinge", "ls", "original", "w"] = "hinge"
    adversarial: float = 1.0
    scales: Literal["mean", "sum"] = "mean"
    discriminator: float = 1.0
    feature_matching: float = 10.0
    perceptual: float = 10.0
    vgg: str | None = None
    kl: float = 0.05
    code_noise: float = 1.0
    pixel: float = 0.0
    pixel_mean: Literal["pixels", "classes"] = "pixels"
    prior: float = 0.0
    latent: float = 0.0
    diversity: float = 0.0
    diversity_bound: float = 10.0

    def __post_init__(self) -> None:
        if self.gan not in GAN_MODES:
            raise ValueError(f"losses.gan: expected {', '.join(GAN_MODES)}; got {self.gan!r}")
        if self.pixel_mean not in PIXEL_MEANS:
            raise ValueError(f"losses.pixel_mean: expected {' or '.join(PIXEL_MEANS)}; "
                             f"got {self.pixel_mean!r}")
        _at_least("losses", self, 0, "adversarial", "discriminator", "feature_matching",
                  "perceptual", "kl", "code_noise", "pixel", "prior", "latent", "diversity",
                  "diversity_bound")
        judged = [name for name in ("feature_matching", "prior") if getattr(self, name) > 0]
        if self.adversarial == 0 and judged:
            raise ValueError(f"losses.{judged[0]}: expected 0 where losses.adversarial is 0, for "
                             f"no discriminator is trained; got {getattr(self, judged[0])}")
        if self.adversarial == 0 and max(self.pixel, self.perceptual) == 0:
            raise ValueError("losses.adversarial: expected more than 0 where neither pixel nor "
                             "perceptual is weighed, for nothing would be learnt; got 0")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam with one learning rate for generator and encoder and one for the discriminator (TTUR).

    Args:
        generator: learning rate of generator and encoder.
        discriminator: learning rate of the discriminator.
        betas: decay of Adam's two moments.
        ema: decay of the moving average of generator and encoder; 0 for none, as published.
        accumulate: micro-batches that a step's batch is split into.
        reuse_fake: the discriminator sees the generator step's picture (pix2pixHD), instead of
            one painted anew by the updated generator (SPADE, GroupDNet, CC-FPSE).
    """

    generator: float = 1e-4
    discriminator: float = 4e-4
    betas: tuple[float, float] = (0.0, 0.9)
    ema: float = 0.0
    accumulate: int = 1
    reuse_fake: bool = False

    def __post_init__(self) -> None:
        _at_least("optimizer", self, 0, "generator", "discriminator", "ema")
        _at_least("optimizer", self, 1, "accumulate")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas: expected two numbers in [0, 1), got {self.betas}")
        if self.ema >= 1:
            raise ValueError(f"optimizer.ema: expected a decay below 1, got {self.ema}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long, and how the learning rates fall: constant, then linear to 0, by epoch.

    Args:
        epochs: with constant learning rates (the papers' niter).
        decay_epochs: with falling ones (niter_decay).
        freeze_global_epochs: train pix2pixHD's local enhancers alone at first (niter_fix_global).
        falls: "after": the k-th of the falling epochs has 1 - (k - 1) / decay_epochs of the rates,
            so that the first is as before (pix2pixHD, SPADE, GroupDNet, CC-FPSE); "before":
            1 - k / (decay_epochs + 1) (BicycleGAN).
    """

    epochs: int = 50
    decay_epochs: int = 0
    freeze_global_epochs: int = 0
    falls: Literal["after", "before"] = "after"

    def __post_init__(self) -> None:
        if self.falls not in ("after", "before"):
            raise ValueError(f"schedule.falls: expected after or before; got {self.falls!r}")
        _at_least("schedule", self, 0, "epochs", "decay_epochs", "freeze_global_epochs")
        if self.epochs + self.decay_epochs == 0:
            raise ValueError("schedule.epochs: expected at least one epoch, got 0 + 0")

    @property
    def total(self) -> int:
        """All epochs."""
        return self.epochs + self.decay_epochs

    def factor(self, epoch: int) -> float:
        """What the learning rates are multiplied by in epoch 0, 1, ..."""
        late = epoch + 1 - self.epochs
        if late <= 0:
            return 1.0
        if self.falls == "before":
            return 1 - late / (self.decay_epochs + 1)
        return 1 - (late - 1) / self.decay_epochs


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures, as :func:`smis_models.data.build_dataset` takes them.

    Args:
        name: scenes (drawn by the program), cityscapes, ade20k, coco_stuff, deepfashion or folder.
        root: folder of the data set; scenes lie in none.
        batch: images of a step, over all processes and micro-batches.
        workers: processes that read pictures and compile layouts; 0: the training process.
        count: how many scenes an epoch has (scenes only).
        mode: how pictures get the network's size; by default as published for the data set.
        load: (height, width) to resize to before cropping; by default as published.
        flip: mirror pictures at random.
        unknown: class of pixels labelled 255, if not the network's don't-care class.
    """

    name: str = "scenes"
    root: str | None = None
    batch: int = 8
    workers: int = 2
    count: int = 2048
    mode: Mode | None = None
    load: tuple[int, int] | None = None
    flip: bool = True
    unknown: int | None = None

    def __post_init__(self) -> None:
        _at_least("data", self, 1, "batch", "count")
        _at_least("data", self, 0, "workers")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training, and how often (in steps).

    Args:
        every: losses to losses.csv, TensorBoard, Weights & Biases and the progress bar.
        checkpoint_every: state to checkpoint.pt and weights to model.safetensors.
        keep: the last states that stay; more than one lie in kept/.
        keep_epochs: every so many epochs the state stays for good, in kept/; 0: none does.
        best: keep the weights that do best on held-out scenes at a checkpoint, best.safetensors:
            by the L1 of "pixel"s or the "perceptual" loss between photographs and pictures of
            their own codes.
        best_scenes: how many held-out scenes that is measured on.
        grid_every: a grid of samples to grids/; 0 for none.
        grid_split: split whose first scenes are on the grids.
        rows: scenes on a grid.
        samples: pictures of each scene on a grid.
        tensorboard: write TensorBoard files too.
        wandb: log to Weights & Biases too.
    """

    every: int = 50
    checkpoint_every: int = 500
    keep: int = 1
    keep_epochs: int = 0
    best: Literal["pixel", "perceptual"] | None = None
    best_scenes: int = 32
    grid_every: int = 500
    grid_split: Literal["train", "val", "test"] = "val"
    rows: int = 4
    samples: int = 3
    tensorboard: bool = True
    wandb: bool = False

    def __post_init__(self) -> None:
        _at_least("log", self, 1, "every", "checkpoint_every", "rows", "samples", "keep",
                  "best_scenes")
        _at_least("log", self, 0, "grid_every", "keep_epochs")
        if self.best not in (None, "pixel", "perceptual"):
            raise ValueError(f"log.best: expected pixel, perceptual or null; got {self.best!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides how a model is trained.

    Args:
        model: a name that `smis list` shows.
        network: the model's options; its published ones by default.
        data: the pictures.
        losses: the objective.
        optimizer: learning rates, moving average, accumulation.
        schedule: epochs.
        log: what is written.
        precision: of the convolutions; statistics and losses are in fp32 always.
        seed: of weights, order, augmentation and codes.
        init_gain: of the xavier rule that weights start from.
        init: weights to start from (safetensors or pth); for a pix2pixHD with local enhancers
            those of the generator inside it serve too.
        whiten: give the codes of ``init`` the mean and covariance of N(0, 1) at first; for a
            GroupDNet that was trained without noise in its codes.
    """

    model: str
    network: Preset
    data: DataConfig = field(default_factory=DataConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    log: LogConfig = field(default_factory=LogConfig)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    init_gain: float = 0.02
    init: str | None = None
    whiten: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 to 2^63 - 1, got {self.seed}")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"precision: expected fp32, bf16 or fp16; got {self.precision!r}")
        enhancers = self.network.enhancers if isinstance(self.network, Pix2pixHDPreset) else 0
        if self.schedule.freeze_global_epochs and not enhancers:
            raise ValueError("schedule.freeze_global_epochs: only a pix2pixHD with network."
                             f"enhancers has a global generator to freeze; {self.model} has none")
        if self.schedule.freeze_global_epochs >= self.schedule.total:
            raise ValueError(
                "schedule.freeze_global_epochs: expected fewer than all epochs "
                f"({self.schedule.total}), got {self.schedule.freeze_global_epochs}"
            )
        self._check_objective()
        if self.log.best == "perceptual" and not self.losses.perceptual:
            raise ValueError("log.best: expected pixel, for losses.perceptual is 0 and its network "
                             "is not loaded; got 'perceptual'")
        net = self.network
        if (isinstance(net, LatentPreset) and net.latent_size == (1, 1) and net.norm != "instance"
                and self.data.batch == self.optimizer.accumulate):
            raise ValueError("data.batch: expected at least 2 pictures for each of optimizer."
                             f"accumulate ({self.optimizer.accumulate}), for the generator starts "
                             f"at 1x1, where one has no statistics; got {self.data.batch}")
        if self.data.batch % self.optimizer.accumulate:
            raise ValueError(
                f"data.batch: expected a multiple of optimizer.accumulate "
                f"({self.optimizer.accumulate}), got {self.data.batch}"
            )

    def _check_objective(self) -> None:
        """Refuse the name of one objective with the losses of the other, which are what counts."""
        if not isinstance(self.network, UNetPreset):
            return
        own, other = {"bicyclegan": ("latent", "diversity"),
                      "dscgan": ("diversity", "latent")}[self.network.objective]
        if getattr(self.losses, own) == 0 < getattr(self.losses, other):
            raise ValueError(
                f"network.objective: {self.network.objective!r} expected losses.{own} above 0, got "
                f"0 with losses.{other} {getattr(self.losses, other):g}; change the objective with "
                "its losses, as the recipes bicyclegan_deepfashion and dscgan_deepfashion have them"
            )
