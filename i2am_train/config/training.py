"""Options of training a model with attention losses, and of studies that train many."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from i2am_train.config.data import DataConfig
from i2am_train.config.evaluation import AttributionConfig, EvaluationConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.config.objective import ObjectiveConfig
from i2am_train.config.options import (
    LABEL,
    SOME_DISTINCT,
    BelowOne,
    Count,
    ModelFolder,
    Name,
    Natural,
    NotNegative,
    OptionError,
    Options,
    Positive,
    Rule,
    Share,
    within,
)
from i2am_train.config.reporting import TrackingConfig
from i2am_train.errors import ConfigError
from i2am_train.types import Device, OptimizerName, Precision, PublishedModel, Trainable

SHARDED = "fsdp"
"""The strategy that shards weights, ``training.sharding``."""
OWN_SHARDING = Rule(
    f"{SHARDED}, which shards by itself", lambda strategy: not strategy.startswith(("deepspeed", f"{SHARDED}_"))
)
NOT_ZERO = Rule("above 0, or null for all: 0 trains nothing", lambda batches: batches > 0)
EMPTY_OR_LABEL = LABEL._replace(holds=lambda text: text == "" or LABEL.holds(text))


@dataclass(kw_only=True, slots=True)
class OptimizationConfig(Options):
    """AdamW with warm-up and cosine decay."""

    steps: Count = 160
    """Optimizer steps in all."""
    learning_rate: Positive = 3e-4
    """Peak learning rate."""
    final_lr_fraction: Share = 0.33
    """Learning rate at the last step, as a fraction of the peak."""
    warmup_steps: Natural = 10
    """Steps of linear warm-up."""
    weight_decay: NotNegative = 0.01
    """AdamW weight decay."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW betas."""
    gradient_clip: Positive | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    accumulate: Count = 1
    """Batches per optimizer step; together they are exactly one large batch, attention losses included."""
    global_batch: Count | None = None
    """Samples per optimizer step over all devices, a multiple of data.batch_size times devices:
    accumulate is worked out from it. null: data.batch_size times devices times accumulate."""
    ema_decay: BelowOne | None = None
    """Decay of the exponential moving average of the weights; null: none."""
    snr_gamma: Positive | None = None
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
    """Compile the U-Net's transformer blocks with torch.compile: a minute or so at the start (dry_run=true
    says how much) and a faster step; needs a C++ compiler on a CPU. Validation stays uncompiled."""
    trainable: Trainable = "all"
    """Which weights of the U-Net train: v1 (the authors' first code: decoder, output, first convolution
    and the encoder's cross-attention), v2 (their later one: all but the time embedding),
    cross_attention (and the first convolution), or all; projector and null tokens do, too. lora:
    low-rank adapters beside its attention projections, and nothing else."""
    lora_rank: Annotated[int, within(1, 4096)] = 16
    """Rank of the adapters of trainable=lora."""
    lora_alpha: Count | None = None
    """Scale of the adapters times their rank; null: the rank, that is a scale of 1."""
    from_scratch: bool = False
    """Draw the denoiser's and the projector's weights anew; VAE and encoder stay those of init (the
    shipped encoder was trained with the true correspondence as a hint)."""
    condition_dropout: Share = 0.2
    """Share of training samples whose garment is replaced by the null tokens."""

    def check(self) -> None:
        """Options that exclude each other.

        >>> OptimizationConfig(trainable="lora", from_scratch=True)
        Traceback (most recent call last):
            ...
        i2am_train.config.options.OptionError: from_scratch=True is not possible: expected false with trainable=lora.
        """
        if self.global_batch is not None and self.accumulate != 1:
            raise OptionError("accumulate", self.accumulate, "1 beside global_batch")
        if self.trainable == "lora" and self.from_scratch:
            raise OptionError("from_scratch", True, "false with trainable=lora")

    @property
    def adapter_alpha(self) -> int:
        """``lora_alpha``, or the rank where it is null.

        >>> OptimizationConfig(lora_rank=8).adapter_alpha, OptimizationConfig(lora_alpha=4).adapter_alpha
        (8, 4)
        """
        return self.lora_rank if self.lora_alpha is None else self.lora_alpha


@dataclass(kw_only=True, slots=True)
class ValidationConfig(Options):
    """What is measured and drawn during training."""

    samples: Natural = 32
    """Size of the fixed subset of held-out samples; 0: no validation."""
    every_epochs: Count = 1
    """Epochs between two validations."""
    panel_samples: Natural = 4
    """Samples that are drawn with their attribution maps."""
    faithful_samples: Natural = 0
    """First samples that are made again, each about 50 times, to tell whether attention is a cause
    (evaluation.faithfulness says how; evaluation=faithful makes it 11)."""


@dataclass(kw_only=True, slots=True)
class TrainerConfig(Options):
    """Lightning's trainer."""

    accelerator: str = "auto"
    """auto, cpu, gpu (or cuda), mps or tpu."""
    devices: Count | str = 1
    """Number of devices (processes), or auto."""
    strategy: Annotated[str, OWN_SHARDING] = "auto"
    """auto, ddp, fsdp (each device keeps a part of weights, gradients and optimizer), ..."""
    num_nodes: Annotated[int, within(1, 10_000)] = 1
    """Number of machines."""
    log_every_n_steps: Count = 10
    """Steps between two logged values of the training losses."""
    checkpoint_every_n_steps: Count | None = None
    """Optimizer steps between two checkpoints, from which a stopped run goes on; null: one at the
    end of each epoch. A run that is told to stop (Ctrl-C, SIGTERM) saves one in any case."""
    keep_checkpoints: Count = 2
    """Latest checkpoints that are kept; a stopped run goes on from the one before if the newest is
    damaged."""
    keep_best: str | None = None
    """Validation score by which the best model so far is kept in best/, e.g. imacs_g; null: none."""
    snapshot_every_n_steps: Count | None = None
    """Optimizer steps between two copies of the model that are kept on the way, in
    snapshots/step-000100, ...; null: only the finished model is kept."""
    limit_train_batches: Annotated[int | float, NOT_ZERO] | None = None
    """Batches (whole number) or share of batches (fraction) per epoch; null: all."""
    deterministic: bool = False
    """Use deterministic algorithms only (slower on a GPU)."""
    progress_bar: bool = True
    """Show progress with the time left."""

    @property
    def sharded(self) -> bool:
        """True if each process keeps only a part of the trained weights.

        >>> TrainerConfig(strategy="fsdp").sharded, TrainerConfig(strategy="ddp").sharded
        (True, False)
        """
        return self.strategy == SHARDED

    @property
    def multi_process(self) -> bool:
        """True if training may start more than one process.

        >>> [TrainerConfig(devices=devices).multi_process for devices in (1, 2, "auto")]
        [False, True, True]
        """
        return self.devices not in (1, "1") or self.num_nodes > 1


@dataclass(kw_only=True, slots=True)
class TrainingGroups(Options):
    """Groups of options of a training run, which a study hands to its arms."""

    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass(kw_only=True, slots=True)
class TrainConfig(TrainingGroups):
    """Train a model from a checkpoint."""

    name: Name = "train"
    """Name of the run; the experiments set it."""
    label: Annotated[str, EMPTY_OR_LABEL] = ""
    """How tables and figures call the run; empty: its name."""
    init: ModelFolder = "tiny"
    """Checkpoint folder to start from; tiny is the shipped one."""
    output: Path | None = None
    """Run folder; null: runs/<name>-seed<seed>."""
    seed: Natural = 0
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

    def check(self) -> None:
        """A run has a label and enough samples; parts of weights do not go together with everything."""
        self.label = self.label or self.name
        needed = self.validation.samples + self.data.batch_size
        if self.data.root is None and needed > self.data.synthetic.train:
            raise OptionError(
                "data.synthetic.train",
                self.data.synthetic.train,
                f"at least {needed}, validation.samples and one batch of data.batch_size={self.data.batch_size}",
            )
        if self.data.cache is not None and "pictures" in self.objective.needs:
            raise OptionError(
                "data.cache",
                self.data.cache,
                "null with a term that compares pictures (leffa): a cache holds what the encoders made of them",
            )
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
                raise OptionError(f"optimization.{name}", value, f"{expected} with trainer.strategy={SHARDED}")

    @property
    def folder(self) -> Path:
        """The run folder, absolute.

        >>> TrainConfig(name="refined", seed=3).folder == Path.cwd() / "runs" / "refined-seed3"
        True
        """
        return self.output or Path.cwd() / "runs" / f"{self.name}-seed{self.seed}"


@dataclass(kw_only=True, slots=True)
class AblateConfig(TrainingGroups):
    """Train and judge arms x seeds from one checkpoint, and compare them."""

    name: Name = "ablation"
    """Name of the study."""
    init: ModelFolder = "tiny"
    """Checkpoint folder that every arm starts from; tiny is the shipped one."""
    output: Path | None = None
    """Folder of the study; null: runs/<name>. Finished cells in it are kept and skipped."""
    arms: Annotated[list[str], SOME_DISTINCT] = field(default_factory=lambda: ["base", "baseline", "refined"])
    """Names of files in conf/experiment, or paths of such files; base is the checkpoint itself. refined*3
    is refined with three times the weights of its terms."""
    reference: str = "baseline"
    """The arm that the others are compared with, seed by seed."""
    seeds: Annotated[list[Natural], SOME_DISTINCT] = field(default_factory=lambda: [0, 1, 2])
    """One training run per arm and seed."""
    jobs: Count = 1
    """Runs at the same time, each in a process of its own with its share of the CPU's threads, GPUs in
    turn; their output goes to cells/*.log. For a GPU, or cores, that one small model does not fill."""
    confidence: BelowOne = 0.95
    """Confidence of the intervals: Student's t over seeds; with one seed a bootstrap over samples."""
    bootstrap_samples: Annotated[int, within(100, 1_000_000)] = 10_000
    """Resamples per bootstrap interval."""
    device: Device = "auto"
    """Where to evaluate (training follows trainer.accelerator)."""

    def check(self) -> None:
        """The comparison has a partner, and the baseline no term of the user's.

        >>> AblateConfig(arms=["base", "refined"])
        Traceback (most recent call last):
            ...
        i2am_train.errors.ConfigError: reference=baseline is none of the arms ['base', 'refined']. ...
        """
        if self.objective.terms:
            raise OptionError(
                "objective.terms",
                self.objective.terms,
                "none, since all arms would have them, the baseline too: set them in the file of an arm",
            )
        if len(self.arms) > 1 and self.reference not in self.arms:
            raise ConfigError(
                f"reference={self.reference} is none of the arms {self.arms}. "
                "Add it to arms, or set reference to one of them."
            )

    @property
    def folder(self) -> Path:
        """The folder of the study, absolute.

        >>> AblateConfig(name="study").folder == Path.cwd() / "runs" / "study"
        True
        """
        return self.output or Path.cwd() / "runs" / self.name


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
