"""Options of judging a model: attention maps and scores, image metrics, and ``i2am evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

from i2am_train.config.data import DataConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.config.options import (
    DISTINCT,
    BelowOne,
    Count,
    Layer,
    Layers,
    ModelFolder,
    Natural,
    NotNegative,
    OptionError,
    Options,
    PatchPosition,
    Pixels,
    Rule,
    Share,
    at_least,
    within,
)
from i2am_train.config.reporting import TrackingConfig
from i2am_train.errors import ConfigError
from i2am_train.types import (
    Device,
    Direction,
    FaithfulnessControl,
    Fill,
    LayerWeighting,
    Pairing,
    PerceptualNetwork,
    PublishedModel,
)

JUDGED = "attribution.layer"
"""In ``faithfulness.layers``: the layer that this option names."""


@dataclass(kw_only=True, slots=True)
class AttributionConfig(Options):
    """How attention becomes maps and scores."""

    delta: BelowOne = 0.4
    """Threshold of the normalised maps, in [0, 1): smaller values become 0."""
    penalty: NotNegative = 3.0
    """IMACS penalty lambda on attention outside the mask."""
    deltas: list[BelowOne] = field(default_factory=list)
    """More thresholds that IMACS is reported at, from the same maps."""
    penalties: list[NotNegative] = field(default_factory=lambda: [1.0, 3.0, 5.0])
    """More penalties, likewise; the scores of every delta and lambda are called imacs_g@d0.4_l3."""
    weighting: LayerWeighting = LayerWeighting.PAPER
    """How layers of different grids are summed: paper (plain sum) or density (balanced)."""
    layer: Layer | None = None
    """Layer of correspondence error, PCK, spread and entropy, and of a patch's maps: a paper number
    1...9 or a name; null: the one that is trained, else the model's own (layer in its
    model_index.json, 2 unless it was trained at another), of other people's models 2. In a model
    without the paper's layers a number means that at the same depth of its decoder; a name that it
    lacks is refused with a list of its layers and their numbers."""
    layers: Layers | None = None
    """Layers that enter the unified maps; null: all nine."""
    inpaint_queries: bool = True
    """Reference-side maps average over generated positions inside the inpainting mask only, as the
    authors' code does; false: over all, as the paper writes."""
    time_groups: Count = 5
    """Groups of sampling steps in time-level maps; group 0 is the noisiest."""

    @property
    def judged_layer(self) -> int | str:
        """``layer``, once a command has put one in the place of null.

        Raises:
            ConfigError: it is null.

        >>> AttributionConfig(layer=5).judged_layer
        5
        """
        if self.layer is None:
            raise ConfigError(
                "attribution.layer=null stands for the model's own layer, and no model was asked for it. Set it to a "
                "layer, such as 2, the paper's; commands ask models.by_name.with_layers."
            )
        return self.layer


@dataclass(kw_only=True, slots=True)
class FaithfulnessConfig(Options):
    """Whether maps tell what the model uses: the reference is changed, and the images are made again."""

    layers: Layers | None = None
    """Layers whose use is measured, at one image each; null: all. The word attribution.layer means that one."""
    shares: list[Annotated[float, Rule("more than 0 and at most 1", lambda share: 0 < share <= 1)]] = field(
        default_factory=lambda: [0.1, 0.25, 0.5]
    )
    """Shares of the garment's patches that are replaced, above 0 and up to 1, ascending."""
    fill: Fill = "mean"
    """What stands in their place; mean is the garment's mean colour."""
    controls: Annotated[list[FaithfulnessControl], DISTINCT] = field(
        default_factory=lambda: list(get_args(FaithfulnessControl))
    )
    """Rankings that the map's is compared with, beside its own from the lowest: random, middle (of the
    garment), truth (where it is known), gradient, gradient_attention."""
    random_draws: Count = 3
    """Random rankings, whose mean is taken."""
    perceptual: PerceptualNetwork | None = "stlpips"
    """Learned distance of the images, beside the mean absolute difference; null: none."""
    head: Natural | None = None
    """Head whose map is judged, from 0; null: all."""
    time_group: Natural | None = None
    """Of attribution.time_groups groups of steps, the one whose map is judged, 0 the noisiest; null: all."""
    direction: Direction = Direction.GENERATED_TO_REFERENCE
    """generated_to_reference: what the positions in the mask look at. reference_to_generated: which
    share of a reference patch goes into the mask (all heads and steps)."""
    generated_patches: Natural | list[PatchPosition] = 0
    """Generated patches that are asked alone (where patch i looks goes, and the change is measured at
    i): cells [y,x] of attribution.layer's grid, or how many, spread over the mask; 0: none."""

    def check(self) -> None:
        """Shares make a curve."""
        if not self.shares or sorted(set(self.shares)) != self.shares:
            raise OptionError("shares", self.shares, "different numbers in ascending order, such as [0.1,0.25,0.5]")
        if self.direction is Direction.REFERENCE_TO_GENERATED:
            for name in ("head", "time_group"):
                if (given := getattr(self, name)) is not None:
                    raise OptionError(name, given, f"null with direction={self.direction}, which is kept of all")


@dataclass(kw_only=True, slots=True)
class DiagnosisConfig(Options):
    """What is wrong with each layer's attention, told without knowing where it should look."""

    layers: Layers | None = None
    """Layers that are asked; null: all."""
    heads: bool = True
    """Ask each head, too: one more image for each head of these layers (42 in the shipped model)."""
    least_use: Share = 0.02
    """Change of the image inside the mask, as a share of its range, from which on a layer is worth
    repairing."""


UNSHARDED = Rule(
    "auto or ddp: judging a model shards nothing", lambda strategy: not strategy.startswith(("fsdp", "deepspeed"))
)


@dataclass(kw_only=True, slots=True)
class EvaluationConfig(Options):
    """What a checkpoint is judged by, on held-out samples."""

    samples: Annotated[int, at_least(2)] | None = None
    """Number of held-out samples, or of images from each folder, in order; null: all."""
    pairing: Pairing = Pairing.PAIRED
    """paired: each person gets the garment that they wear; unpaired: another one. Of two folders,
    paired: images of the same name belong together; unpaired: they are compared as sets only."""
    metrics: list[str | dict[str, Any]] = field(
        default_factory=lambda: ["ssim", "stlpips", "fd_efficientnet_lite0", "kd_efficientnet_lite0"]
    )
    """Image metrics beside the attention scores; also there: lpips, fid, kid, and your own by import
    path: my_package:psnr (i2am_train/EXTENDING.md)."""
    kernel_subset_size: Annotated[int, at_least(2)] | None = None
    """Images of either set in a subset of the kernel distance (kd, kid); null: all, once, if both
    sets are equally large and have 1000 images at most, otherwise 1000 or the smaller set."""
    kernel_subsets: Annotated[int, within(1, 100_000)] = 100
    """Random subsets that the kernel distance is averaged over."""
    batch_size: Count = 32
    """Samples per batch."""
    panel_samples: Natural = 8
    """Samples whose pictures, maps and centres are kept for the report."""
    faithful_samples: Natural = 0
    """First samples that are made again to tell whether attention is a cause (i2am faithful), of a
    checkpoint; evaluation=faithful sets a few."""
    faithfulness: FaithfulnessConfig = field(default_factory=FaithfulnessConfig)


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(Options):
    """Judge a checkpoint on held-out samples, or a folder of finished images of any model."""

    checkpoint: ModelFolder | None = None
    """Checkpoint folder, or run folder, to judge; tiny is the shipped one."""
    images: Path | None = None
    """Folder of finished images to judge instead of a checkpoint."""
    reference: Path | None = None
    """Folder of the real images that `images` is compared with; file names without their ending
    say which belong together."""
    snapshots: bool = False
    """Also judge the copies of the model that a run kept while it trained
    (trainer.snapshot_every_n_steps), each in a folder of its own."""
    resize: tuple[Pixels, Pixels] | None = None
    """[height,width] in pixels that the images of both folders are resized to, by clean-fid's
    bicubic filter; null: all must have one size."""
    output: Path | None = None
    """Folder for results; null: evaluation-<pairing> in the run folder, or beside others in runs/."""
    device: Device = "auto"
    """Where to compute."""
    devices: Count | str = 1
    """Devices that generate images (processes), or auto; scores do not depend on their number."""
    strategy: Annotated[str, UNSHARDED] = "auto"
    """Lightning's strategy where there are several devices: auto, ddp, ..."""
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

    def check(self) -> None:
        """One thing is judged, by options that belong to it.

        >>> EvaluateConfig(images="a")
        Traceback (most recent call last):
            ...
        i2am_train.errors.ConfigError: What to judge is not clear: found images. Give ...
        """
        judged = ("checkpoint", "images", "reference")
        given = [name for name in judged if getattr(self, name) is not None]
        if given not in (["checkpoint"], ["images", "reference"]):
            raise ConfigError(
                f"What to judge is not clear: found {' and '.join(given) or 'neither'}. Give "
                "checkpoint=FOLDER for a model, or images=FOLDER and reference=FOLDER for "
                "finished images."
            )
        if self.resize is not None and self.checkpoint is not None:
            raise OptionError("resize", list(self.resize), "null with a checkpoint (it is for folders)")
        if self.images is not None:
            self._check_finished_images()
        elif self.data.root is None and (self.evaluation.samples or 0) > self.data.synthetic.test:
            raise OptionError(
                "evaluation.samples", self.evaluation.samples, f"at most data.synthetic.test={self.data.synthetic.test}"
            )

    def _check_finished_images(self) -> None:
        """Refuses what belongs to a model that makes images."""
        if self.multi_process:
            raise OptionError("devices", self.devices, "1 for finished images")
        if self.snapshots:
            raise OptionError("snapshots", self.snapshots, "false for finished images")
        if self.evaluation.faithful_samples:
            raise OptionError(
                "evaluation.faithful_samples", self.evaluation.faithful_samples, "0 for finished images (no model)"
            )
        if not self.evaluation.metrics:
            raise OptionError("evaluation.metrics", [], "at least one image metric for finished images")

    @property
    def multi_process(self) -> bool:
        """True if the evaluation may start more than one process.

        >>> [EvaluateConfig(checkpoint="tiny", devices=devices).multi_process for devices in (1, 2, "auto")]
        [False, True, True]
        """
        return self.devices not in (1, "1")


@dataclass(kw_only=True, slots=True)
class DiagnoseConfig(DiagnosisConfig):
    """Find the layers of a checkpoint that should be repaired; needs masks and no truth."""

    checkpoint: ModelFolder = "tiny"
    """Checkpoint folder, or run folder; tiny is the shipped one."""
    samples: Count = 16
    """Number of held-out samples, in order; each image is made once for each layer and head, and 5
    times more (56 times with the shipped model)."""
    batch_size: Count = 16
    """Samples per batch; score matrices of all layers and heads are kept meanwhile, 17 MB a sample at
    128x96 and .9 GB at 512x384 in the shape of SD1.5 (.1 GB with heads=false)."""
    output: Path | None = None
    """Folder for results; null: diagnose in the run folder, or beside others in runs/."""
    device: Device = "auto"
    """Where to compute."""
    progress_bar: bool = True
    """Show progress with the time left."""
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def check(self) -> None:
        """The embedded data has so many samples."""
        if self.data.root is None and self.samples > self.data.synthetic.test:
            raise OptionError("samples", self.samples, f"at most data.synthetic.test={self.data.synthetic.test}")
