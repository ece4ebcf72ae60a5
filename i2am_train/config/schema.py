"""Every option of every command: its type, its default, its meaning, its legal values.

The dataclasses here are the single source. ``store`` hands them to Hydra as plain values, ``build``
turns what Hydra composed back into them, and ``documentation`` prints their docstrings for
``--help``. The files in ``conf/`` only say what differs from these defaults. Options that are files
or folders are absolute from here on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from i2am_train.errors import ConfigError
from i2am_train.types import (
    Category,
    Device,
    FigureFormat,
    FigureName,
    Fit,
    GridSize,
    LayerWeighting,
    LayoutName,
    LossVariant,
    Normalisation,
    OptimizerName,
    Pairing,
    PoseSource,
    Precision,
    PredictionType,
    PublishedModel,
    SamplerName,
    Split,
    Trainable,
    WeightType,
)

SHARDED = "fsdp"
"""The strategy that shards weights, ``training.sharding``."""
LARGEST_IMAGE = 16_384
"""Pixels of a side: what no image model has come near. It keeps a slip from taking all memory."""
MOST_SAMPLES = 10_000_000
"""Likewise, of what is drawn by a program."""
MOST_WORKERS = 512
"""Likewise, of processes that are started at once."""
TRYON, FACTORY = "tryon", "factory"
"""Values of ``ExplainConfig.model`` beside the names of other people's models."""
OTHER_MODELS_OPTIONS = (
    "image",
    "mask",
    "reference",
    "reference_mask",
    "prompt",
    "size",
    "adapter",
    "factory",
    "recipe",
)
"""Options of ``ExplainConfig`` that mean nothing to a try-on model of ours."""


@dataclass(kw_only=True, slots=True)
class SyntheticConfig:
    """The embedded procedural dataset, made on first use where data.root is null."""

    train: int = 2000
    """Number of training samples."""
    test: int = 200
    """Number of held-out samples."""
    seed: int = 0
    """Seed of the generator; the same seed draws the same pictures."""

    def __post_init__(self) -> None:
        _check_within("data.synthetic.train", self.train, 1, MOST_SAMPLES)
        _check_within("data.synthetic.test", self.test, 1, MOST_SAMPLES)
        _check_at_least("data.synthetic.seed", self.seed, 0)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the samples come from and how they are batched."""

    root: Path | None = None
    """Folder in VITON-HD or DressCode layout; null: the embedded dataset, made when missing."""
    layout: LayoutName = "auto"
    """How the folder is laid out; auto: dresscode where it has folders of categories."""
    categories: list[Category] = field(default_factory=list)
    """Categories of DressCode to read: upper_body, lower_body, dresses; empty: all that exist."""
    fit: Fit = "stretch"
    """Pictures of another aspect: stretch changes the proportions, pad adds margins (white, around
    body parts black), crop keeps the largest centred part."""
    height: int = 128
    """Image height in pixels; must be what the checkpoint was trained at."""
    width: int = 96
    """Image width in pixels."""
    batch_size: int = 16
    """Training samples per device and step (before accumulation)."""
    workers: int = 2
    """Processes that read samples; 0 reads in the main process."""
    augment: bool = False
    """Flip, shift, scale and colour augmentation of training samples (the authors' order)."""
    cache: str | None = None
    """Folder that `i2am data cache` made, or its copy's URL (s3://...): training samples come from
    it and the frozen encoders never run; null: they run in every step."""
    cache_copies: Path | None = None
    """Folder for copies of the shards where data.cache is a URL; null: in the user's cache."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """The embedded dataset."""

    def __post_init__(self) -> None:
        self.root, self.cache_copies = _absolute(self.root), _absolute(self.cache_copies)
        if self.cache is not None:
            if not self.cache.strip():
                _refuse("data.cache", repr(self.cache), "a folder or a URL, or null")
            if "://" not in self.cache:
                self.cache = str(absolute(Path(self.cache)))
        if self.categories:
            _check_unique("data.categories", self.categories)
        _check_size("data", self.height, self.width)
        _check_at_least("data.batch_size", self.batch_size, 1)
        _check_within("data.workers", self.workers, 0, MOST_WORKERS)

    @property
    def size(self) -> GridSize:
        """Image size, height first."""
        return GridSize(self.height, self.width)


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """Attention losses added to the denoising loss; a weight of 0 switches a term off."""

    variant: LossVariant = LossVariant.REWARD
    """Form of the attention losses; i2am_train/types.py says what each does."""
    layer: int | str = 2
    """Layer that is trained: a paper number 1...9 or a name like up_blocks.1.attentions.1."""
    dcml: float = 0.0
    """Weight of distance centering (order of the attention centres)."""
    tv: float = 0.0
    """Weight of total variation (smoothness of the field of centres)."""
    cwg: float = 0.0
    """Weight of center weighting (sharpness of the attention around its centre)."""
    supervised: float = 0.0
    """Weight of the cross-entropy to the true correspondence, which only some data have; arms that
    use it are marked and not ranked."""
    sigma: float | None = None
    """Standard deviation of the Gaussians of cwg and supervised, in reference patches; null: the
    variant's own (0.5 for authors_v1, 1.0 for all others)."""
    margin: float = 1.0
    """Gap that the margin variant asks for, in reference patches per generated patch."""
    detach_centers: bool = False
    """Stop the gradient of cwg at the centres."""

    def __post_init__(self) -> None:
        for name in ("dcml", "tv", "cwg", "supervised"):
            _check_at_least(f"objective.{name}", getattr(self, name), 0.0)
        _check_above("objective.sigma", self.width, 0.0)
        _check_at_least("objective.margin", self.margin, 0.0)
        _check_layer("objective.layer", self.layer)

    @property
    def width(self) -> float:
        """The sigma that is used: the one given, or the variant's own."""
        return self.variant.sigma if self.sigma is None else self.sigma

    @property
    def weights(self) -> dict[str, float]:
        """Weight by term, the terms that are off included."""
        return {name: getattr(self, name) for name in ("dcml", "tv", "cwg", "supervised")}

    @property
    def active(self) -> bool:
        """True if any attention loss is on, that is, if attention must be captured in training."""
        return any(weight != 0.0 for weight in self.weights.values())


@dataclass(kw_only=True, slots=True)
class OptimizationConfig:
    """AdamW with warm-up and cosine decay."""

    steps: int = 160
    """Optimizer steps in all."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    final_lr_fraction: float = 0.33
    """Learning rate at the last step, as a fraction of the peak."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    gradient_clip: float | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    accumulate: int = 1
    """Batches per optimizer step; together they are exactly one large batch, attention losses included."""
    global_batch: int | None = None
    """Samples per optimizer step over all devices, a multiple of data.batch_size times devices:
    accumulate is worked out from it. null: data.batch_size times devices times accumulate."""
    ema_decay: float | None = None
    """Decay of the exponential moving average of the weights; null: none."""
    snr_gamma: float | None = None
    """Min-SNR-gamma weighting of the denoising loss (5 is usual); null: uniform."""
    precision: Precision = "32-true"
    """Arithmetic of the denoiser: bf16-mixed suits a GPU, float32 is faster on many CPUs."""
    optimizer: OptimizerName = "adamw"
    """adamw, or adamw8bit (bitsandbytes; a quarter of the memory for its state, GPU only)."""
    gradient_checkpointing: bool = False
    """Compute activations of the U-Net again in the backward pass instead of keeping them."""
    channels_last: bool = False
    """Memory layout of the convolutions; faster on GPUs with bf16-mixed."""
    compile: bool = False
    """Compile the U-Net with torch.compile, attention losses included: minutes at the start (dry_run=true
    says how many) and a faster step; needs a C++ compiler on a CPU. Validation stays uncompiled."""
    trainable: Trainable = "all"
    """Which weights of the U-Net train: v1 (the authors' first code: decoder, output, first convolution
    and the encoder's cross-attention), v2 (their later one: all but the time embedding),
    cross_attention (and the first convolution), or all; projector and null tokens do, too. lora:
    low-rank adapters beside its attention projections, and nothing else."""
    lora_rank: int = 16
    """Rank of the adapters of trainable=lora."""
    lora_alpha: int | None = None
    """Scale of the adapters times their rank; null: the rank, that is a scale of 1."""
    from_scratch: bool = False
    """Draw the denoiser's and the projector's weights anew; VAE and encoder stay those of init (the
    shipped encoder was trained with the true correspondence as a hint)."""
    condition_dropout: float = 0.2
    """Share of training samples whose garment is replaced by the null tokens."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate"):
            _check_at_least(f"optimization.{name}", getattr(self, name), 1)
        _check_at_least("optimization.warmup_steps", self.warmup_steps, 0)
        _check_above("optimization.learning_rate", self.learning_rate, 0.0)
        _check_at_least("optimization.weight_decay", self.weight_decay, 0.0)
        _check_within("optimization.final_lr_fraction", self.final_lr_fraction, 0.0, 1.0)
        _check_within("optimization.condition_dropout", self.condition_dropout, 0.0, 1.0)
        for name in ("gradient_clip", "snr_gamma"):
            _check_optional_above(f"optimization.{name}", getattr(self, name), 0.0)
        if self.global_batch is not None:
            _check_at_least("optimization.global_batch", self.global_batch, 1)
            if self.accumulate != 1:
                _refuse("optimization.accumulate", self.accumulate, "1 beside global_batch")
        for beta in self.betas:
            _check_below_one("optimization.betas", beta)
        if self.ema_decay is not None:
            _check_below_one("optimization.ema_decay", self.ema_decay)
        _check_within("optimization.lora_rank", self.lora_rank, 1, 4096)
        _check_at_least("optimization.lora_alpha", self.adapter_alpha, 1)
        if self.trainable == "lora" and self.from_scratch:
            _refuse("optimization.from_scratch", True, "false with trainable=lora")

    @property
    def adapter_alpha(self) -> int:
        """``lora_alpha``, or the rank where it is null."""
        return self.lora_rank if self.lora_alpha is None else self.lora_alpha


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """How images are sampled from a model."""

    sampler: SamplerName = "ddim"
    """ddim: the paper's; dpmpp (DPM-Solver++ 2M) and unipc come as near in half as many steps."""
    steps: int = 10
    """Denoising steps per image."""
    guidance: float = 2.0
    """Scale of classifier-free guidance; 1 is none."""
    seed: int = 0
    """Seed of the initial noise; every sample has its own stream, whatever the batch."""

    def __post_init__(self) -> None:
        _check_within("sampling.steps", self.steps, 1, 1000)
        _check_at_least("sampling.guidance", self.guidance, 1.0)
        _check_at_least("sampling.seed", self.seed, 0)


@dataclass(kw_only=True, slots=True)
class AttributionConfig:
    """How attention becomes maps and scores."""

    delta: float = 0.4
    """Threshold of the normalised maps, in [0, 1): smaller values become 0."""
    penalty: float = 3.0
    """IMACS penalty lambda on attention outside the mask."""
    deltas: list[float] = field(default_factory=list)
    """More thresholds that IMACS is reported at, from the same maps."""
    penalties: list[float] = field(default_factory=lambda: [1.0, 3.0, 5.0])
    """More penalties, likewise; the scores of every delta and lambda are called imacs_g@d0.4_l3."""
    weighting: LayerWeighting = LayerWeighting.PAPER
    """How layers of different grids are summed: paper (plain sum) or density (balanced)."""
    layer: int | str = 2
    """Layer of correspondence error, PCK, spread and entropy: a paper number 1...9 or a name."""
    layers: list[int | str] | None = None
    """Layers that enter the unified maps; null: all nine."""
    inpaint_queries: bool = True
    """Reference-side maps average over generated positions inside the inpainting mask only, as the
    authors' code does; false: over all, as the paper writes."""
    time_groups: int = 5
    """Groups of sampling steps in time-level maps; group 0 is the noisiest."""
    byte_budget: int = 64 * 2**20
    """Memory that capture may use for intermediate results, in bytes."""

    def __post_init__(self) -> None:
        for delta in (self.delta, *self.deltas):
            _check_below_one("attribution.delta", delta)
        for penalty in (self.penalty, *self.penalties):
            _check_at_least("attribution.penalty", penalty, 0.0)
        if self.layers is not None and not self.layers:
            _refuse("attribution.layers", self.layers, "null for all, or a list that is not empty")
        for layer in (self.layer, *(self.layers or ())):
            _check_layer("attribution.layer", layer)
        _check_at_least("attribution.time_groups", self.time_groups, 1)
        _check_at_least("attribution.byte_budget", self.byte_budget, 2**16)


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """What a checkpoint is judged by, on held-out samples."""

    samples: int | None = None
    """Number of held-out samples, or of images from each folder, in order; null: all."""
    pairing: Pairing = Pairing.PAIRED
    """paired: each person gets the garment that they wear; unpaired: another one. Of two folders,
    paired: images of the same name belong together; unpaired: they are compared as sets only."""
    metrics: list[str] = field(
        default_factory=lambda: [
            "ssim",
            "stlpips",
            "fd_efficientnet_lite0",
            "kd_efficientnet_lite0",
        ]
    )
    """Image metrics beside the attention scores; also there: lpips, fid, kid."""
    kernel_subset_size: int | None = None
    """Images of either set in a subset of the kernel distance (kd, kid); null: all, once, if both
    sets are equally large and have 1000 images at most, otherwise 1000 or the smaller set."""
    kernel_subsets: int = 100
    """Random subsets that the kernel distance is averaged over."""
    batch_size: int = 32
    """Samples per batch."""
    panel_samples: int = 8
    """Samples whose pictures, maps and centres are kept for the report."""

    def __post_init__(self) -> None:
        if self.samples is not None:
            _check_at_least("evaluation.samples", self.samples, 2)
        if self.kernel_subset_size is not None:
            _check_at_least("evaluation.kernel_subset_size", self.kernel_subset_size, 2)
        _check_within("evaluation.kernel_subsets", self.kernel_subsets, 1, 100_000)
        _check_at_least("evaluation.batch_size", self.batch_size, 1)
        _check_at_least("evaluation.panel_samples", self.panel_samples, 0)


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """What is measured and drawn during training."""

    samples: int = 32
    """Size of the fixed subset of held-out samples; 0: no validation."""
    every_epochs: int = 1
    """Epochs between two validations."""
    panel_samples: int = 4
    """Samples that are drawn with their attribution maps."""

    def __post_init__(self) -> None:
        _check_at_least("validation.samples", self.samples, 0)
        _check_at_least("validation.every_epochs", self.every_epochs, 1)
        _check_at_least("validation.panel_samples", self.panel_samples, 0)


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where curves, tables, pictures and models are logged."""

    csv: bool = True
    """Write metrics.csv into the run folder (the report reads it)."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases mode; online goes on offline where the server cannot be reached."""
    project: str = "i2am-train"
    """Weights & Biases project."""
    entity: str | None = None
    """User or team that owns the project; null: the default of whoever is logged in."""
    name: str | None = None
    """Name of the run in Weights & Biases; null: the name of the run folder."""
    group: str | None = None
    """Group of runs in Weights & Biases; an ablation sets its name."""
    arm: str | None = None
    """Under which name charts put runs of several seeds together; null: the name of the training
    run, or of the folder that is judged."""
    tags: list[str] = field(default_factory=list)
    """More tags of the run in Weights & Biases."""
    folder: Path | None = None
    """Folder that gets `wandb/`; null: the run folder (an ablation collects its runs in its own)."""
    table_samples: int = 16
    """Samples in the table of each validation, with pictures and scores; 0: no table."""
    upload_model: bool = True
    """Send the weights as an artifact; false: only names, sizes and digests of their files."""
    finish_timeout: float = 60.0
    """Seconds to wait for uploads at the end; what is not sent by then can be synced later."""

    def __post_init__(self) -> None:
        self.folder = _absolute(self.folder)
        _check_project("tracking.project", self.project)
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                _refuse("tracking.tags", repr(tag), "1 to 64 signs in a tag")
        _check_at_least("tracking.table_samples", self.table_samples, 0)
        _check_above("tracking.finish_timeout", self.finish_timeout, 0.0)


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """Lightning's trainer."""

    accelerator: str = "auto"
    """auto, cpu, gpu (or cuda), mps or tpu."""
    devices: int | str = 1
    """Number of devices (processes), or auto."""
    strategy: str = "auto"
    """auto, ddp, fsdp (each device keeps a part of weights, gradients and optimizer), ..."""
    num_nodes: int = 1
    """Number of machines."""
    log_every_n_steps: int = 10
    """Steps between two logged values of the training losses."""
    checkpoint_every_n_steps: int | None = None
    """Optimizer steps between two checkpoints, from which a stopped run goes on; null: one at the
    end of each epoch. A run that is told to stop (Ctrl-C, SIGTERM) saves one in any case."""
    keep_checkpoints: int = 2
    """Latest checkpoints that are kept; a stopped run goes on from the one before if the newest is
    damaged."""
    keep_best: str | None = None
    """Validation score by which the best model so far is kept in best/, e.g. imacs_g; null: none."""
    snapshot_every_n_steps: int | None = None
    """Optimizer steps between two copies of the model that are kept on the way, in
    snapshots/step-000100, ...; null: only the finished model is kept."""
    limit_train_batches: int | float | None = None
    """Batches (whole number) or share of batches (fraction) per epoch; null: all."""
    limit_val_batches: int | float | None = None
    """The same for validation."""
    deterministic: bool = False
    """Use deterministic algorithms only (slower on a GPU)."""
    progress_bar: bool = True
    """Show progress with the time left."""

    def __post_init__(self) -> None:
        if isinstance(self.devices, int):
            _check_at_least("trainer.devices", self.devices, 1)
        _check_within("trainer.num_nodes", self.num_nodes, 1, 10_000)
        _check_at_least("trainer.log_every_n_steps", self.log_every_n_steps, 1)
        for name in ("checkpoint_every_n_steps", "snapshot_every_n_steps"):
            if getattr(self, name) is not None:
                _check_at_least(f"trainer.{name}", getattr(self, name), 1)
        _check_at_least("trainer.keep_checkpoints", self.keep_checkpoints, 1)
        if self.limit_train_batches == 0:
            _refuse("trainer.limit_train_batches", 0, "above 0, or null for all: 0 trains nothing")
        if self.strategy.startswith(("deepspeed", f"{SHARDED}_")):
            _refuse("trainer.strategy", self.strategy, f"{SHARDED}, which shards by itself")

    @property
    def sharded(self) -> bool:
        """True if each process keeps only a part of the trained weights."""
        return self.strategy == SHARDED

    @property
    def multi_process(self) -> bool:
        """True if training may start more than one process."""
        return self.devices not in (1, "1") or self.num_nodes > 1


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Train a model from a checkpoint."""

    name: str = "train"
    """Name of the run; the experiments set it."""
    label: str = ""
    """How tables and figures call the run; empty: its name."""
    init: str = "tiny"
    """Checkpoint folder to start from; tiny is the shipped one."""
    output: Path | None = None
    """Run folder; null: runs/<name>-seed<seed>."""
    seed: int = 0
    """Seed of initialisation, order, noise and dropout of training."""
    resume: bool = True
    """Continue a stopped run of the same configuration; false refuses a used folder."""
    expected: PublishedModel | None = None
    """Row of the paper's Table 2 that `i2am evaluate` prints beside the run's scores: dci_vton,
    stableviton, custom or refined_custom; the experiments that repeat the paper set it."""
    dry_run: bool = False
    """Check everything, take a few steps, print sizes, memory and time, and write nothing."""
    callbacks: list[str | dict[str, Any]] = field(default_factory=list)
    """Callbacks of your own by import path: my_package:MyCallback, or
    {fn: my_package:MyCallback, every: 5} with arguments (i2am_train/EXTENDING.md)."""
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        _check_name("name", self.name)
        _check_given("init", self.init)
        _check_at_least("seed", self.seed, 0)
        self.label = self.label or self.name
        _check_label("label", self.label)
        self.output = _absolute(self.output)
        # Not in the group itself: a study hands its group to arms, which may set another variant.
        self.objective = replace(self.objective, sigma=self.objective.width)
        if self.trainer.sharded:
            self._check_sharded()

    def _check_sharded(self) -> None:
        """Refuses options that do not work on parts of weights; the others are tested with sharding."""
        for name, only in {
            "compile": False,  # the compiler would capture the hooks that gather the weights
            "channels_last": False,  # only contiguous weights can be cut
            "optimizer": "adamw",  # bitsandbytes' kernels know no parts
            "precision": ("32-true", "bf16-mixed"),  # a loss scale would differ between processes
        }.items():
            value = getattr(self.optimization, name)
            allowed = only if isinstance(only, tuple) else (only,)
            if value not in allowed:
                expected = " or ".join(str("null" if a is None else a).lower() for a in allowed)
                _refuse(
                    f"optimization.{name}", value, f"{expected} with trainer.strategy={SHARDED}"
                )

    @property
    def folder(self) -> Path:
        """The run folder, absolute."""
        return self.output or Path.cwd() / "runs" / f"{self.name}-seed{self.seed}"


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Judge a checkpoint on held-out samples, or a folder of finished images of any model."""

    checkpoint: str | None = None
    """Checkpoint folder, or run folder, to judge; tiny is the shipped one."""
    images: Path | None = None
    """Folder of finished images to judge instead of a checkpoint."""
    reference: Path | None = None
    """Folder of the real images that `images` is compared with; file names without their ending
    say which belong together."""
    snapshots: bool = False
    """Also judge the copies of the model that a run kept while it trained
    (trainer.snapshot_every_n_steps), each in a folder of its own."""
    resize: tuple[int, int] | None = None
    """[height,width] in pixels that the images of both folders are resized to, by clean-fid's
    bicubic filter; null: all must have one size."""
    output: Path | None = None
    """Folder for results; null: evaluation-<pairing> in the run folder, or beside others in runs/."""
    device: Device = "auto"
    """Where to compute."""
    devices: int | str = 1
    """Devices that generate images (processes), or auto; scores do not depend on their number."""
    strategy: str = "auto"
    """Lightning's strategy where there are several devices: auto, ddp, ..."""
    precision: Precision = "32-true"
    """Arithmetic of the denoiser (bf16-mixed on a GPU; on a CPU float32 is faster)."""
    progress_bar: bool = True
    """Show progress with the time left."""
    expected: PublishedModel | None = None
    """Row of the paper's Table 2 to print beside the scores: dci_vton, stableviton, custom or
    refined_custom; null: the one that the run's experiment names, if any."""
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for name in ("output", "images", "reference"):
            setattr(self, name, _absolute(getattr(self, name)))
        if self.checkpoint is not None:
            _check_given("checkpoint", self.checkpoint)
        judged = ("checkpoint", "images", "reference")
        given = [name for name in judged if getattr(self, name) is not None]
        if given not in (["checkpoint"], ["images", "reference"]):
            raise ConfigError(
                f"What to judge is not clear: found {' and '.join(given) or 'neither'}. Give "
                "checkpoint=FOLDER for a model, or images=FOLDER and reference=FOLDER for "
                "finished images."
            )
        if isinstance(self.devices, int):
            _check_at_least("devices", self.devices, 1)
        if self.strategy.startswith((SHARDED, "deepspeed")):
            _refuse("strategy", self.strategy, "auto or ddp: judging a model shards nothing")
        if self.images is not None:
            self._check_finished_images()
        if self.resize is not None:
            if self.checkpoint is not None:
                _refuse("resize", list(self.resize), "null with a checkpoint (it is for folders)")
            _check_lengths("resize", self.resize, 1)

    def _check_finished_images(self) -> None:
        """Refuses what belongs to a model that makes images."""
        if self.multi_process:
            _refuse("devices", self.devices, "1 for finished images")
        if self.snapshots:
            _refuse("snapshots", self.snapshots, "false for finished images")
        if not self.evaluation.metrics:
            _refuse("evaluation.metrics", [], "at least one image metric for finished images")

    @property
    def multi_process(self) -> bool:
        """True if the evaluation may start more than one process."""
        return self.devices not in (1, "1")


@dataclass(kw_only=True, slots=True)
class AblateConfig:
    """Train and judge arms x seeds from one checkpoint, and compare them."""

    name: str = "ablation"
    """Name of the study."""
    init: str = "tiny"
    """Checkpoint folder that every arm starts from; tiny is the shipped one."""
    output: Path | None = None
    """Folder of the study; null: runs/<name>. Finished cells in it are kept and skipped."""
    arms: list[str] = field(default_factory=lambda: ["base", "baseline", "refined"])
    """Names of files in conf/experiment, or paths of such files; base is the checkpoint itself."""
    reference: str = "baseline"
    """The arm that the others are compared with, seed by seed."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """One training run per arm and seed."""
    confidence: float = 0.95
    """Confidence of the intervals: Student's t over seeds; with one seed a bootstrap over samples."""
    bootstrap_samples: int = 10_000
    """Resamples per bootstrap interval."""
    device: Device = "auto"
    """Where to evaluate (training follows trainer.accelerator)."""
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        self.output = _absolute(self.output)
        _check_name("name", self.name)
        _check_given("init", self.init)
        _check_unique("arms", self.arms)
        _check_unique("seeds", self.seeds)
        for seed in self.seeds:
            _check_at_least("seeds", seed, 0)
        _check_below_one("confidence", self.confidence)
        _check_within("bootstrap_samples", self.bootstrap_samples, 100, 1_000_000)
        if len(self.arms) > 1 and self.reference not in self.arms:
            raise ConfigError(
                f"reference={self.reference} is none of the arms {self.arms}. "
                "Add it to arms, or set reference to one of them."
            )

    @property
    def folder(self) -> Path:
        """The folder of the study, absolute."""
        return self.output or Path.cwd() / "runs" / self.name


@dataclass(kw_only=True, slots=True)
class RecipeConfig:
    """Options of other models' recipes; null: as the recipe has it."""

    guided: bool | None = None
    """Whether the batch holds both halves of guidance; null: by sampling.guidance for models that
    are loaded here, by what a factory's pipeline itself says."""
    side_by_side: bool | None = None
    """catvton: person and garment beside each other on the canvas, not one above the other."""
    first: int | None = None
    """ladi_vton: position of the first pseudo-word."""
    count: int | None = None
    """ladi_vton: number of pseudo-words."""
    adapter: int | None = None
    """ip_adapter...: which of several loaded adapters, from 0."""
    reference_grid: tuple[int, int] | None = None
    """tryon, custom, flux_kontext: rows and columns of reference tokens."""
    generated_grid: tuple[int, int] | None = None
    """flux_kontext: rows and columns of generated tokens, image size / 16."""
    text_tokens: int | None = None
    """flux_kontext: words before the pictures' tokens."""
    special_tokens: int | None = None
    """tryon, custom: tokens before them, such as the class token."""
    rows: Literal["all", "first_half", "second_half"] | None = None
    """tryon: which rows of the batch are conditional."""

    def __post_init__(self) -> None:
        for name in ("first", "adapter", "special_tokens", "text_tokens"):
            _check_optional_at_least(f"recipe_options.{name}", getattr(self, name), 0)
        _check_optional_at_least("recipe_options.count", self.count, 1)
        for name in ("reference_grid", "generated_grid"):
            if (grid := getattr(self, name)) is not None:
                _check_at_least(f"recipe_options.{name}", min(grid), 1)
                setattr(self, name, GridSize(*grid))

    @property
    def given(self) -> dict[str, Any]:
        """The options that were set."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(kw_only=True, slots=True)
class ExplainConfig:
    """Draw every attribution map of a sample, and make a page to explore them."""

    checkpoint: str | list[str] | None = None
    """Checkpoint folder, or run folder; tiny is the shipped one. Several stand side by side on the
    page: [tiny,runs/refined-seed0]. Other models: a folder of diffusers, or a name on the hub."""
    model: str = TRYON
    """tryon: ours, on a sample of a dataset. Others are asked by files (image, mask, reference):
    paint_by_example, ip_adapter, ip_adapter_plus, ip_adapter_full_face, catvton; factory: any
    pipeline that your own code makes. `i2am explain --recipes` lists what is known of each."""
    sample: int | list[int] = 0
    """Index of the sample in the pair list, from 0; or several: [3,17]."""
    split: Split = Split.TEST
    """Half of the dataset that the index counts in."""
    pairing: Pairing = Pairing.PAIRED
    """paired: the garment that the person wears; unpaired: another one."""
    image: Path | None = None
    """Other models: picture to fill in."""
    mask: Path | None = None
    """Other models: region to fill in, white, as large as the picture; IMACS_g is scored in it."""
    reference: Path | None = None
    """Other models: picture that the filling is made after."""
    reference_mask: Path | None = None
    """Other models: what counts of the reference, white, as large as it; IMACS_r is scored in it."""
    prompt: str = ""
    """ip_adapter..., factory: words for the text encoder."""
    size: tuple[int, int] | None = None
    """Other models: height and width of the result; null: the model's usual ones."""
    adapter: Path | None = None
    """Weights beside the checkpoint: ip_adapter...'s file, or catvton's of the attention layers."""
    factory: str | None = None
    """model=factory: package.module:function that returns your pipeline (README)."""
    recipe: str | None = None
    """model=factory: name of the recipe where the pipeline is not recognised by its modules."""
    output: Path | None = None
    """Folder for page, pictures and archives (several explanations: a folder in it for each); null:
    runs/explain-<checkpoint>-<split><sample>-<pairing>, or runs/explain-<model>-<image>-<reference>."""
    generated_patches: list[tuple[int, int]] = field(default_factory=list)
    """Cells [y,x] of the layer's generated grid that get a map each; empty: some of the garment."""
    reference_patches: list[tuple[int, int]] = field(default_factory=list)
    """Cells [y,x] of the reference grid that get a map each; empty: some of the garment."""
    matrix_layers: list[int | str] | None = None
    """Layers beside attribution.layer whose score matrices are kept, for maps of single patches;
    null: all (5 MB per sample at 128x96, 100 MB at 512x384)."""
    device: Device = "auto"
    """Where to compute."""
    recipe_options: RecipeConfig = field(default_factory=RecipeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)

    def __post_init__(self) -> None:
        if self.checkpoint is None and self.model != FACTORY:
            raise ConfigError("checkpoint is required and was not given. Add checkpoint=VALUE.")
        if self.checkpoint is not None:
            _check_several("checkpoint", self.checkpoints)
        for checkpoint in self.checkpoints:
            _check_given("checkpoint", checkpoint)
        self.output = _absolute(self.output)
        if self.attribution.time_groups > self.sampling.steps:
            _refuse(
                "attribution.time_groups",
                self.attribution.time_groups,
                f"at most sampling.steps={self.sampling.steps}",
            )
        _check_several("sample", self.samples)
        for sample in self.samples:
            _check_at_least("sample", sample, 0)
        for name in ("generated_patches", "reference_patches"):
            for cell in getattr(self, name):
                _check_at_least(name, min(cell), 0)
        for layer in self.matrix_layers or ():
            _check_layer("matrix_layers", layer)
        self._check_files()

    def _check_files(self) -> None:
        """Options of one way of asking are refused with the other; files become absolute."""
        given = [name for name in OTHER_MODELS_OPTIONS if getattr(self, name) not in (None, "")]
        given += [f"recipe_options.{name}" for name in self.recipe_options.given]
        if self.model == TRYON and given:
            raise ConfigError(
                f"{given[0]}=... is for other people's models, and model=tryon reads samples of a "
                "dataset. Set model=NAME (`i2am explain --recipes` lists them), or leave it out."
            )
        if self.model != TRYON and self.sample != 0:
            raise ConfigError(
                f"sample={self.sample} counts samples of a dataset, and model={self.model} is "
                "asked by files. Give image=, mask= and reference= instead."
            )
        for name in ("image", "mask", "reference", "reference_mask", "adapter"):
            setattr(self, name, _absolute(getattr(self, name)))
        if self.size is not None:
            _check_lengths("size", self.size, 8)

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints, one or several; none where a factory needs none."""
        if self.checkpoint is None:
            return []
        return self.checkpoint if isinstance(self.checkpoint, list) else [self.checkpoint]

    @property
    def samples(self) -> list[int]:
        """The samples' indices, one or several."""
        return self.sample if isinstance(self.sample, list) else [self.sample]


@dataclass(kw_only=True, slots=True)
class DetectConfig:
    """Find the objects that Paint-by-Example paints from its attention alone, beside detectors."""

    pipeline: str = "Fantasy-Studio/Paint-by-Example"
    """Paint-by-Example: a folder in diffusers' layout, or such a name on the hub."""
    root: Path | None = None
    """Folder in COCO's layout, annotations/instances_<split>.json and <split>/*.jpg; null: a small
    set of coloured shapes, made when missing."""
    split: str = "val2017"
    """Folder of the images, and end of the annotations' name."""
    annotations: Path | None = None
    """COCO file of objects, where it is called otherwise; null: by root and split."""
    shapes: int = 24
    """Pictures of the made set, which takes the place of root=null."""
    samples: int | None = None
    """Number of objects, in order of image ids; null: all (one of each image that has one which
    covers 10 to 30 %)."""
    crowds: bool = True
    """Let annotations of crowds count, as the authors do."""
    height: int = 512
    """Height in pixels of generated images, and of real ones for detectors; aspects are ignored."""
    width: int = 512
    """Width likewise."""
    steps: int = 50
    """DDIM steps per image."""
    guidance: float = 5.0
    """Scale of classifier-free guidance; 1 is none."""
    seed: int = 321
    """Seed of noise and random boxes; every image has its own stream, whatever the batch."""
    batch_size: int = 4
    """Images that are made at once, and kept."""
    dtype: WeightType = "float32"
    """Numbers that the pipeline computes with: float32, float16 or bfloat16."""
    weighting: LayerWeighting = LayerWeighting.PAPER
    """How layers of different grids are summed: paper (plain sum) or density (balanced)."""
    delta: float = 0.4
    """Threshold of the normalised map; what exceeds it may be the object."""
    deltas: list[float] = field(default_factory=lambda: [0.2, 0.3, 0.4, 0.5, 0.6])
    """Thresholds of the sweep (paper Table 3), from the same maps."""
    detectors: list[str] = field(default_factory=list)
    """Supervised detectors to compare with: torchvision:NAME, torchvision:NAME@FILE, or a folder or
    hub name of transformers, of a model that finds boxes (PekingU/rtdetr_r50vd, hustvl/yolos-tiny)
    or segments (facebook/maskformer-swin-tiny-coco)."""
    score: float = 0.5
    """An image counts for a detector where its best detection's score exceeds this."""
    match_category: bool = False
    """Look at a detector's detections of the object's own category only; false: at all of them."""
    pictures: int = 8
    """Samples that are drawn."""
    output: Path | None = None
    """Folder for images, maps and results; null: runs/detect-<pipeline>-<data>."""
    device: Device = "auto"
    """Where to compute."""
    progress_bar: bool = True
    """Show progress with the time left."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for name in ("root", "annotations", "output"):
            setattr(self, name, _absolute(getattr(self, name)))
        for name in (self.pipeline, *self.detectors):
            if not name.strip():
                _refuse("pipeline or detectors", repr(name), "a folder or a name on the hub")
        if self.annotations is not None and self.root is None:
            _refuse("annotations", self.annotations, "null without root, the folder of the images")
        _check_within("shapes", self.shapes, 1, MOST_SAMPLES)
        _check_at_least("batch_size", self.batch_size, 1)
        if self.samples is not None:
            _check_at_least("samples", self.samples, 1)
        for name in ("seed", "pictures"):
            _check_at_least(name, getattr(self, name), 0)
        _check_size("", self.height, self.width)
        _check_within("steps", self.steps, 1, 1000)
        _check_at_least("guidance", self.guidance, 1.0)
        for delta in (self.delta, *self.deltas):
            _check_below_one("delta", delta)
        _check_below_one("score", self.score)
        if self.detectors:
            _check_unique("detectors", self.detectors)

    @property
    def size(self) -> GridSize:
        """Image size, height first."""
        return GridSize(self.height, self.width)

    @property
    def thresholds(self) -> list[float]:
        """``delta`` and ``deltas``, each once, ascending."""
        return sorted({self.delta, *self.deltas})


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """Make tables and figures for a paper from the folders of finished commands, without a model."""

    runs: list[Path] = field(default_factory=list)
    """Folders with finished evaluations: of `i2am evaluate`, of a training run, or of a study."""
    names: list[str] = field(default_factory=list)
    """How tables call the model of each folder in runs; empty: by its label, or its folder."""
    mixed: bool = False
    """Report evaluations of different data, samples, sampling or protocol beside each other; they
    are refused otherwise."""
    explained: list[Path] = field(default_factory=list)
    """Folders that `i2am explain` wrote. Two of one sample are compared if they differ in their
    checkpoint (refinement) or in sampling.guidance (guidance)."""
    detected: list[Path] = field(default_factory=list)
    """Folders that `i2am detect` wrote; each has its own tables and figure."""
    figures: list[FigureName] = field(default_factory=list)
    """Which ones of explained samples: layers, time_heads, flow, specific_layers, reverse_layers,
    refinement, guidance, specific_reference, scores, daam, two_axis, unpaired; empty: all that the
    folders allow."""
    formats: list[FigureFormat] = field(default_factory=lambda: ["png", "pdf"])
    """File formats: png, svg, pdf."""
    layers: list[int | str] | None = field(default_factory=lambda: list[int | str]((2, 5, 8)))
    """Layers in figures by layer; the default is the paper's, one per resolution; null: all."""
    models: list[str] = field(default_factory=list)
    """How figures call the models of the samples, in the same order; empty: by their folders."""
    dpi: int = 300
    """Pixels per inch of PNG files and of pictures in the others."""
    output: Path | None = None
    """Folder of the report; null: runs/report."""

    def __post_init__(self) -> None:
        self.output = _absolute(self.output)
        for name in ("runs", "explained", "detected"):
            setattr(self, name, [absolute(folder) for folder in getattr(self, name)])
        for name in ("runs", "explained", "detected", "figures"):
            if getattr(self, name):
                _check_unique(name, getattr(self, name))
        _check_unique("formats", self.formats)
        for name in ("names", "models"):
            for label in getattr(self, name):
                _check_label(name, label)
        if self.layers is not None and not self.layers:
            _refuse("layers", self.layers, "null for all, or a list that is not empty")
        for layer in self.layers or ():
            _check_layer("layers", layer)
        _check_within("dpi", self.dpi, 50, 1200)

    @property
    def folder(self) -> Path:
        """The folder of the report, absolute."""
        return self.output or Path.cwd() / "runs" / "report"


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """Write a model as a pipeline folder of diffusers with a model card, and push it to the hub."""

    checkpoint: str
    """Checkpoint folder, run folder, tiny for the shipped one, or hub:USER/NAME."""
    output: Path
    """Folder to make; must be empty or not there."""
    dtype: WeightType = "float32"
    """Numbers that the weights are stored as: float32, float16 or bfloat16."""
    push: str | None = None
    """Model on the hub, USER/NAME, that the folder is uploaded as; null: nothing is uploaded."""
    private: bool = True
    """A model that pushing makes is seen by its owner alone."""
    license: str | None = None
    """Licence of the weights, as the hub names it (apache-2.0); null: the card leaves it open."""
    base_model: str | None = None
    """Model on the hub that the weights come from; null: none is named."""

    def __post_init__(self) -> None:
        _check_given("checkpoint", self.checkpoint)
        self.output = absolute(self.output)


@dataclass(kw_only=True, slots=True)
class InitConfig:
    """Make a model folder for `i2am train` from Stable Diffusion 1.5, a VAE and an image encoder,
    or a pipeline of diffusers from a checkpoint of Paint-by-Example or DCI-VTON."""

    output: Path
    """Folder of the new model; must not exist yet."""
    unet: str | None = None
    """Stable Diffusion 1.5's U-Net: diffusers folder of it or of a pipeline, such a name on the hub,
    or a file in the original layout (v1-5-pruned.ckpt or .safetensors)."""
    custom: Path | None = None
    """Instead of unet: a checkpoint of the authors' custom model (VITON-v1), with its projector."""
    paint_by_example: Path | None = None
    """A checkpoint of Paint-by-Example (model.ckpt), to be written as a pipeline of diffusers; of
    the other options only half has a meaning then."""
    dci_vton: Path | None = None
    """Likewise a checkpoint of DCI-VTON (viton512.ckpt)."""
    vae: str | None = None
    """VAE: folder, name or file as for unet, also fine-tuned alone (VITONHD_VAE_finetuning.ckpt);
    null: the one that comes with unet or custom."""
    encoder: str = "facebook/dinov2-giant"
    """Reference encoder: folder of transformers or name on the hub, DINOv2 or CLIP of any size."""
    ema: bool = False
    """Take the averaged weights of a file that has both; the authors started from the others."""
    height: int = 512
    """Image height in pixels."""
    width: int = 384
    """Image width in pixels."""
    reference_height: int | None = None
    """Height that the garment is resized to for the encoder, a multiple of its patch; null: the
    smallest that covers height (518 for 512 and patches of 14)."""
    reference_width: int | None = None
    """Width likewise (392 for 384)."""
    normalisation: Normalisation | None = None
    """Scale of the encoder's input: imagenet, clip, or authors (values from -1 to 1); null: the
    encoder's own, with custom the authors'."""
    class_token: bool | None = None
    """Keep the encoder's class token before the patches; null: no, with custom as it was trained."""
    projector_blocks: int = 3
    """Transformer blocks of the new projector (with custom: as in the file)."""
    projector_heads: int = 1
    """Attention heads of these blocks."""
    prediction_type: PredictionType = PredictionType.EPSILON
    """What the U-Net predicts; v_prediction also ends the noise schedule in pure noise."""
    half: bool = False
    """Store the weights as float16: half the size, and too coarse to continue a training from."""
    seed: int = 0
    """Seed of the new projector and null tokens."""

    def __post_init__(self) -> None:
        self.output = absolute(self.output)
        self.custom = _absolute(self.custom)
        self.paint_by_example = _absolute(self.paint_by_example)
        self.dci_vton = _absolute(self.dci_vton)
        given = [name for name in _INIT_SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"What to start from is not clear: found {' and '.join(given) or 'neither unet nor custom'}. "
                "Give unet=SOURCE for Stable Diffusion, or custom=FILE for the authors' model; or "
                "paint_by_example=FILE or dci_vton=FILE for a pipeline of diffusers."
            )
        if self.pipeline_file is not None:
            self._check_nothing_else(given[0])
        if self.custom is not None and self.ema:
            _refuse("ema", "true", "false with custom: the authors kept no average")
        _check_size("", self.height, self.width)
        for name in ("reference_height", "reference_width"):
            if getattr(self, name) is not None:
                _check_within(name, getattr(self, name), 1, LARGEST_IMAGE)
        _check_within("projector_blocks", self.projector_blocks, 0, 1000)
        _check_within("projector_heads", self.projector_heads, 1, 1000)
        _check_at_least("seed", self.seed, 0)

    @property
    def pipeline_file(self) -> Path | None:
        """The checkpoint that becomes a pipeline of diffusers, if that is asked for."""
        return self.dci_vton if self.paint_by_example is None else self.paint_by_example

    def _check_nothing_else(self, source: str) -> None:
        """Options of the try-on model change nothing in a pipeline, which is as its authors made it."""
        others = [
            option for option in fields(self) if option.name not in ("output", "half", source)
        ]
        changed = [option.name for option in others if getattr(self, option.name) != option.default]
        if changed:
            raise ConfigError(
                f"{', '.join(changed)} has no meaning with {source}: all of the pipeline comes from the "
                "checkpoint. Leave it out."
            )


_INIT_SOURCES = ("unet", "custom", "paint_by_example", "dci_vton")


@dataclass(kw_only=True, slots=True)
class DashboardConfig:
    """Make a workspace and a report for the project's runs in Weights & Biases."""

    entity: str | None = None
    """User or team that owns the project; null: the default of whoever is logged in."""
    project: str = "i2am-train"
    """Weights & Biases project."""
    group: str | None = None
    """Show the runs of this group only, for example of one ablation; null: all of the project."""
    output: Path | None = None
    """JSON file for the definition; nothing is sent then, and no login or network is needed."""

    def __post_init__(self) -> None:
        self.output = _absolute(self.output)
        _check_project("project", self.project)


@dataclass(kw_only=True, slots=True)
class DataMakeConfig:
    """Make a synthetic try-on dataset with exact correspondence."""

    root: Path | None = None
    """Folder to make; null: where `i2am train` looks for the embedded dataset."""
    train: int = 2000
    """Number of training samples."""
    test: int = 200
    """Number of held-out samples."""
    seed: int = 0
    """Seed of the generator."""
    height: int = 128
    """Image height in pixels."""
    width: int = 96
    """Image width in pixels."""
    annotations: bool = False
    """Also write human-parsing maps (image-parse-v3) and keypoints (openpose_json), which
    `i2am data derive` starts from."""
    workers: int | None = None
    """Processes that draw; null: one per core."""

    def __post_init__(self) -> None:
        self.root = _absolute(self.root)
        _check_within("train", self.train, 1, MOST_SAMPLES)
        _check_within("test", self.test, 1, MOST_SAMPLES)
        _check_at_least("seed", self.seed, 0)
        _check_size("", self.height, self.width)
        if self.workers is not None:
            _check_within("workers", self.workers, 1, MOST_WORKERS)

    @property
    def size(self) -> GridSize:
        """Image size, height first."""
        return GridSize(self.height, self.width)


@dataclass(kw_only=True, slots=True)
class DataDeriveConfig:
    """Make what a dataset lacks: masks and agnostic pictures, from parsing maps and poses."""

    root: Path
    """Dataset folder in VITON-HD or DressCode layout: pair lists, people and flat garments."""
    layout: LayoutName = "auto"
    """How the folder is laid out; auto: dresscode where it has folders of categories."""
    categories: list[Category] = field(default_factory=list)
    """Categories of DressCode to work on; empty: all that exist."""
    category: Category = "upper_body"
    """What the garments cover, in VITON-HD layout (DressCode's folders say it)."""
    labels: Literal["auto", "viton_hd", "dresscode"] = "auto"
    """Labels of the parsing maps: the 20 of image-parse-v3 or the 18 of label_maps; auto: those
    that are usual in the layout."""
    parser: str | None = None
    """Folder or hub name of a transformers segmentation model that makes missing parsing maps,
    such as mattmdjaga/segformer_b2_clothes; null: the maps must be there."""
    estimator: str | None = None
    """Folder or hub name of a ViTPose model of transformers that makes missing keypoints, such as
    usyd-community/vitpose-base-simple; null: keypoints (or DensePose) must be there."""
    pose: PoseSource = "auto"
    """Where bodies come from; auto: keypoints where there are any, else DensePose; none: from the
    parsing map alone, which tells the model the garment's outline."""
    overwrite: bool = False
    """Make files anew that exist."""
    preview: bool = False
    """Draw every step of every person into <root>/previews."""
    device: Device = "auto"
    """Where parser and estimator compute."""
    workers: int | None = None
    """Threads; null: one per core."""
    json: Path | None = None
    """File for the report; null: <root>/derived.json."""

    def __post_init__(self) -> None:
        self.root = absolute(self.root)
        self.json = _absolute(self.json)
        if self.categories:
            _check_unique("categories", self.categories)
        for name in ("parser", "estimator"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                _refuse(name, repr(getattr(self, name)), "a folder or a hub name, or null")
        if self.estimator is not None and self.pose in ("densepose", "none"):
            _refuse("pose", self.pose, "auto or keypoints with an estimator")
        if self.workers is not None:
            _check_within("workers", self.workers, 1, MOST_WORKERS)


@dataclass(kw_only=True, slots=True)
class DataCheckConfig:
    """Report everything that is wrong with a dataset folder."""

    root: Path
    """Dataset folder in VITON-HD or DressCode layout."""
    layout: LayoutName = "auto"
    """How the folder is laid out; auto: dresscode where it has folders of categories."""
    categories: list[Category] = field(default_factory=list)
    """Categories of DressCode to check; empty: all that exist."""
    height: int | None = None
    """Height that every image must have, in pixels; null: the pictures of a person must agree."""
    width: int | None = None
    """Width that every image must have, in pixels."""
    json: Path | None = None
    """File for the report as JSON; null: print the table only."""

    def __post_init__(self) -> None:
        self.root = absolute(self.root)
        self.json = _absolute(self.json)
        if self.categories:
            _check_unique("categories", self.categories)
        if (self.height is None) != (self.width is None):
            raise ConfigError(
                f"Only one of height={self.height} and width={self.width} is set. "
                "Set both, or neither."
            )
        for name in ("height", "width"):
            if (length := getattr(self, name)) is not None:
                _check_within(name, length, 1, LARGEST_IMAGE)

    @property
    def size(self) -> GridSize | None:
        """Image size to insist on, height first, or None."""
        if self.height is None or self.width is None:
            return None
        return GridSize(self.height, self.width)


@dataclass(kw_only=True, slots=True)
class DataCacheConfig:
    """Encode a dataset by a model's frozen networks, once for all training runs."""

    root: Path
    """Dataset folder in VITON-HD or DressCode layout."""
    layout: LayoutName = "auto"
    """How the folder is laid out; auto: dresscode where it has folders of categories."""
    categories: list[Category] = field(default_factory=list)
    """Categories of DressCode to encode; empty: all that exist."""
    fit: Fit = "stretch"
    """Pictures of another aspect, as in data.fit."""
    init: str = "tiny"
    """Checkpoint folder whose VAE and reference encoder are used; tiny is the shipped one. Pictures
    are read at its size."""
    output: Path
    """Folder of the cache. The same command again goes on, and makes damaged shards anew."""
    splits: list[Split] = field(default_factory=lambda: [Split.TRAIN])
    """Halves of the dataset: train, test."""
    variants: int = 0
    """Augmented variants of each training sample, shown in turn from epoch to epoch; 0: the sample
    as it is, for training with data.augment=false."""
    seed: int = 0
    """Seed of the augmentations; a run of the same seed sees what it would see without a cache, for
    as many epochs as there are variants."""
    dtype: Literal["float32", "float16"] = "float32"
    """How numbers are stored: float32 trains as without a cache, float16 takes half the space."""
    shard_samples: int = 128
    """Samples in a file."""
    batch_size: int = 16
    """Samples that are encoded at once."""
    workers: int = 2
    """Processes that read pictures; 0 reads in the main process."""
    device: Device = "auto"
    """Where to compute."""
    progress_bar: bool = True
    """Show progress with the time left."""

    def __post_init__(self) -> None:
        if re.match(r"\w+:/", str(self.output)):  # pathlib makes one slash of two
            _refuse("output", self.output, "a folder; copy it to object storage when it is made")
        self.root = absolute(self.root)
        self.output = absolute(self.output)
        if self.categories:
            _check_unique("categories", self.categories)
        _check_given("init", self.init)
        _check_unique("splits", self.splits)
        _check_within("variants", self.variants, 0, 10_000)
        _check_within("workers", self.workers, 0, MOST_WORKERS)
        _check_at_least("seed", self.seed, 0)
        for name in ("shard_samples", "batch_size"):
            _check_at_least(name, getattr(self, name), 1)


COMMANDS: dict[str, type[Any]] = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "ablate": AblateConfig,
    "explain": ExplainConfig,
    "detect": DetectConfig,
    "report": ReportConfig,
    "export": ExportConfig,
    "init": InitConfig,
    "dashboard": DashboardConfig,
    "data_make": DataMakeConfig,
    "data_check": DataCheckConfig,
    "data_cache": DataCacheConfig,
    "data_derive": DataDeriveConfig,
}
"""Schema of each file ``conf/<command>.yaml``."""

WITHOUT_EFFECT_ON_WEIGHTS: tuple[str, ...] = (
    "output",
    "resume",
    "label",
    "expected",
    "data.workers",
    "data.cache_copies",
    "tracking",
    "trainer.progress_bar",
    "trainer.log_every_n_steps",
    "trainer.checkpoint_every_n_steps",
    "trainer.keep_checkpoints",
    "trainer.keep_best",
    "trainer.snapshot_every_n_steps",
    "dry_run",
)
"""Options (or whole groups) that may differ when a stopped training run is resumed."""


def option_names(schema: type[Any], prefix: str = "") -> list[str]:
    """Dotted names of all options and groups of a schema, in order.

    >>> option_names(SyntheticConfig, "data.synthetic.")
    ['data.synthetic.train', 'data.synthetic.test', 'data.synthetic.seed']
    """
    names: list[str] = []
    for item in fields(schema):
        names.append(prefix + item.name)
        if group := group_of(item):
            names += option_names(group, f"{prefix}{item.name}.")
    return names


def group_of(item: Field[Any]) -> type[Any] | None:
    """The schema of a field that is a group of options, None for a single option."""
    factory: Any = item.default_factory
    return factory if isinstance(factory, type) and is_dataclass(factory) else None


def absolute(path: Path) -> Path:
    """The path from the root on, with the user's home folder for ``~``.

    Raises:
        ConfigError: ``~name``, and there is no such user.
    """
    return expanded(path).absolute()


def expanded(path: str | Path) -> Path:
    """The path with the user's home folder for ``~``.

    Raises:
        ConfigError: ``~name``, and there is no such user.
    """
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"The path {path} is not possible: there is no user {path.parts[0][1:]}. A folder of that name is ./{path}."
        ) from error


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else absolute(path)


def _refuse(name: str, value: object, expected: str) -> None:
    raise ConfigError(f"{name}={value} is not possible: expected {expected}.")


def _check_at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        _refuse(name, value, f"at least {low}")


def _check_above(name: str, value: float, low: float) -> None:
    if not value > low:
        _refuse(name, value, f"more than {low}")


def _check_optional_at_least(name: str, value: float | None, low: float) -> None:
    if value is not None:
        _check_at_least(name, value, low)


def _check_optional_above(name: str, value: float | None, low: float) -> None:
    if value is not None:
        _check_above(name, value, low)


def _check_within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        _refuse(name, value, f"a number between {low} and {high}")


def _check_below_one(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        _refuse(name, value, "a number in [0, 1)")


def _check_layer(name: str, layer: int | str) -> None:
    if (isinstance(layer, int) and not 1 <= layer <= 9) or layer == "":
        _refuse(
            name,
            layer or repr(layer),
            "one of the paper's layers 1...9, or a name like up_blocks.1.attentions.1",
        )


def _check_size(group: str, height: int, width: int) -> None:
    # Latents (a quarter or an eighth of it) and encoder patches (8 pixels) must be whole.
    for name, value in (("height", height), ("width", width)):
        if not 16 <= value <= LARGEST_IMAGE or value % 16:
            expected = f"a multiple of 16 between 16 and {LARGEST_IMAGE}"
            _refuse(f"{group}.{name}".lstrip("."), value, expected)


def _check_lengths(name: str, lengths: Sequence[int], low: int) -> None:
    for length in lengths:
        _check_within(name, length, low, LARGEST_IMAGE)


def _check_unique(name: str, values: list[Any]) -> None:
    if not values or len(set(values)) != len(values):
        _refuse(name, values, "a list that is not empty and names nothing twice")


def _check_given(option: str, name: str) -> None:
    if not name.strip():
        _refuse(option, repr(name), "a folder, or tiny for the shipped weights")


def _check_several(option: str, values: Sequence[object]) -> None:
    if not values or len(set(values)) < len(values):
        _refuse(option, list(values), "one value, or a list of values that are all different")


def _check_name(option: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        _refuse(
            option,
            repr(name),
            "a word without spaces and slashes (it names a folder), of at most 60 signs, the first one no point",
        )


def _check_project(option: str, project: str) -> None:
    """What Weights & Biases takes as one."""
    if not re.fullmatch(r"[^/\\#?%:]{1,128}", project):
        _refuse(option, repr(project), "1 to 128 signs without / \\ # ? % :")


def _check_label(option: str, label: str) -> None:
    """What tables and figures can show in one line; each of their formats escapes its own signs."""
    if not label.isprintable() or not label.strip() or len(label) > 100:
        _refuse(option, repr(label), "one line of at most 100 letters")


_NAME = re.compile(r"(?!\.)[^\s/\\\x00-\x1f\x7f]{1,60}")
