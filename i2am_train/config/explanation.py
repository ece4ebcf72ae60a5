"""Options of the commands that show what attention tells: ``i2am explain``, ``faithful`` and ``detect``."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from i2am_train.config.data import DataConfig
from i2am_train.config.evaluation import AttributionConfig, FaithfulnessConfig
from i2am_train.config.locations import SHIPPED_CHECKPOINT
from i2am_train.config.models import SamplingConfig
from i2am_train.config.options import (
    DISTINCT,
    LARGEST_IMAGE,
    SEVERAL,
    BelowOne,
    Count,
    Guidance,
    HubModel,
    ImageSide,
    Layer,
    ModelFolder,
    Natural,
    OptionError,
    Options,
    PatchPosition,
    Samples,
    SamplingSteps,
    Sized,
    within,
)
from i2am_train.config.reporting import TrackingConfig
from i2am_train.errors import ConfigError
from i2am_train.types import Device, GridSize, LayerWeighting, Pairing, Split, WeightType

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
OtherSide = Annotated[int, within(8, LARGEST_IMAGE)]
"""Pixels."""


@dataclass(kw_only=True, slots=True)
class RecipeConfig(Options):
    """Options of other models' recipes; null: as the recipe has it."""

    guided: bool | None = None
    """Whether the batch holds both halves of guidance; null: by sampling.guidance for models that
    are loaded here, by what a factory's pipeline itself says."""
    side_by_side: bool | None = None
    """catvton: person and garment beside each other on the canvas, not one above the other."""
    first: Natural | None = None
    """ladi_vton: position of the first pseudo-word."""
    count: Count | None = None
    """ladi_vton: number of pseudo-words."""
    adapter: Natural | None = None
    """ip_adapter...: which of several loaded adapters, from 0."""
    reference_grid: tuple[Count, Count] | None = None
    """tryon, custom, flux_kontext: rows and columns of reference tokens."""
    generated_grid: tuple[Count, Count] | None = None
    """flux_kontext: rows and columns of generated tokens, image size / 16."""
    text_tokens: Natural | None = None
    """flux_kontext: words before the pictures' tokens."""
    special_tokens: Natural | None = None
    """tryon, custom: tokens before them, such as the class token."""
    rows: Literal["all", "first_half", "second_half"] | None = None
    """tryon: which rows of the batch are conditional."""

    def check(self) -> None:
        """Grids are what recipes take.

        >>> RecipeConfig(reference_grid=[16, 12]).reference_grid.tokens
        192
        """
        for name in ("reference_grid", "generated_grid"):
            if (grid := getattr(self, name)) is not None:
                setattr(self, name, GridSize(*grid))

    @property
    def given(self) -> dict[str, Any]:
        """The options that were set.

        >>> RecipeConfig(adapter=0, guided=None).given
        {'adapter': 0}
        """
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(kw_only=True)
class PictureOptions(Options):
    """Whose model is asked; other people's by files."""

    model: str = TRYON
    """tryon: ours, on a sample of a dataset. Others are asked by files (image, mask, reference):
    paint_by_example, ip_adapter, ip_adapter_plus, ip_adapter_full_face, catvton; factory: any
    pipeline that your own code makes. `i2am explain --recipes` lists what is known of each."""
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
    size: tuple[OtherSide, OtherSide] | None = None
    """Other models: height and width of the result; null: the model's usual ones."""
    adapter: Path | None = None
    """Weights beside the checkpoint: ip_adapter...'s file, or catvton's of the attention layers."""
    factory: str | None = None
    """model=factory: package.module:function that returns your pipeline (i2am_train/attention/README.md)."""
    recipe: str | None = None
    """model=factory: name of the recipe where the pipeline is not recognised by its modules, or the
    import path of your own (i2am_train/EXTENDING.md)."""
    recipe_options: RecipeConfig = field(default_factory=RecipeConfig)

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints, one or several; none where a factory needs none.

        >>> ExplainConfig(checkpoint="tiny").checkpoints, ExplainConfig(model="factory", factory="a:b").checkpoints
        (['tiny'], [])
        """
        checkpoint = getattr(self, "checkpoint", None)
        if checkpoint is None:
            return []
        return checkpoint if isinstance(checkpoint, list) else [checkpoint]

    @property
    def picture(self) -> str:
        """What is asked of another model: the names of image and reference, without their endings.

        >>> ExplainConfig(checkpoint="x", model="catvton", image="a/me.png", reference="shirt.jpg").picture
        'me-shirt'
        """
        return "-".join(path.stem for path in (self.image, self.reference) if path is not None)

    @property
    def of_picture(self) -> str:
        """The model and the picture, in the name of a folder.

        >>> ExplainConfig(model="factory", factory="mine:build", reference="shirt.jpg").of_picture
        'mine-shirt'
        """
        model = self.model if self.model != FACTORY else str(self.factory).partition(":")[0]
        return f"{model}-{self.picture}"

    def check_model(self) -> None:
        """Refuses options of one way of asking with the other."""
        if self.factory is not None and self.model == TRYON:
            raise ConfigError(f"factory={self.factory} is given, and model={self.model}. Add model=factory.")
        if not self.checkpoints and self.model != FACTORY:
            raise ConfigError("checkpoint is required and was not given. Add checkpoint=VALUE.")
        given = [name for name in OTHER_MODELS_OPTIONS if getattr(self, name) not in (None, "")]
        given += [f"recipe_options.{name}" for name in self.recipe_options.given]
        if self.model == TRYON and given:
            raise ConfigError(
                f"{given[0]}=... is for other people's models, and model=tryon reads samples of a "
                "dataset. Set model=NAME (`i2am explain --recipes` lists them), or leave it out."
            )


@dataclass(kw_only=True, slots=True)
class ExplainConfig(PictureOptions):
    """Draw every attribution map of a sample, and make a page to explore them."""

    checkpoint: ModelFolder | Annotated[list[ModelFolder], SEVERAL] | None = None
    """Checkpoint folder, or run folder; tiny is the shipped one. Several stand side by side on the
    page: [tiny,runs/refined-seed0]. Other models: a folder of diffusers, or a name on the hub."""
    sample: Natural | Annotated[list[Natural], SEVERAL] = 0
    """Index of the sample in the pair list, from 0; or several: [3,17]."""
    split: Split = Split.TEST
    """Half of the dataset that the index counts in."""
    pairing: Pairing = Pairing.PAIRED
    """paired: the garment that the person wears; unpaired: another one."""
    output: Path | None = None
    """Folder for page, pictures and archives (several explanations: a folder in it for each); null:
    runs/explain-<checkpoint>-<split><sample>-<pairing>, or runs/explain-<model>-<image>-<reference>."""
    generated_patches: list[PatchPosition] = field(default_factory=list)
    """Cells [y,x] of the layer's generated grid that get a map each; empty: some of the garment."""
    reference_patches: list[PatchPosition] = field(default_factory=list)
    """Cells [y,x] of the reference grid that get a map each; empty: some of the garment."""
    matrix_layers: list[Layer] | None = None
    """Layers beside attribution.layer whose score matrices are kept, for maps of single patches;
    null: all (5 MB per sample at 128x96, 100 MB at 512x384)."""
    device: Device = "auto"
    """Where to compute."""
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)

    def check(self) -> None:
        """Options of one way of asking are refused with the other."""
        self.check_model()
        if self.attribution.time_groups > self.sampling.steps:
            raise OptionError(
                "attribution.time_groups", self.attribution.time_groups, f"at most sampling.steps={self.sampling.steps}"
            )
        drawn = getattr(self.data.synthetic, self.split)
        if self.model == TRYON and self.data.root is None and max(self.samples) >= drawn:
            raise OptionError("sample", self.sample, f"less than data.synthetic.{self.split}={drawn}, counted from 0")
        if self.model != TRYON and self.sample != 0:
            raise ConfigError(
                f"sample={self.sample} counts samples of a dataset, and model={self.model} is "
                "asked by files. Give image=, mask= and reference= instead."
            )

    @property
    def samples(self) -> list[int]:
        """The samples' indices, one or several.

        >>> ExplainConfig(checkpoint="tiny", sample=3).samples, ExplainConfig(checkpoint="tiny", sample=[3, 17]).samples
        ([3], [3, 17])
        """
        return self.sample if isinstance(self.sample, list) else [self.sample]

    @property
    def folder(self) -> Path:
        """``output``, or a folder in ``runs/`` named after what is explained.

        >>> ExplainConfig(checkpoint="tiny", sample=[3, 17]).folder.name
        'explain-tiny-test3+17-paired'
        """
        if self.output is not None:
            return self.output
        if self.model == TRYON:
            checkpoints = "+".join(Path(checkpoint).name for checkpoint in self.checkpoints)
            samples = "+".join(map(str, self.samples))
            name = f"{checkpoints}-{self.split}{samples}-{self.pairing}"
        else:
            name = self.of_picture
        return Path.cwd() / "runs" / f"explain-{name}"


@dataclass(kw_only=True, slots=True)
class FaithfulConfig(FaithfulnessConfig, PictureOptions):
    """Measure whether a checkpoint's attention is a cause of its images; needs masks and no truth."""

    checkpoint: ModelFolder | None = None
    """Checkpoint folder, or run folder; null: tiny, the shipped one. Other models: a folder of diffusers,
    or a name on the hub."""
    samples: Count = 16
    """Number of held-out samples, in order; each image is made about 50 times (the run says it)."""
    batch_size: Count = 16
    """Samples per batch."""
    output: Path | None = None
    """Folder for results; null: faithful in the run folder, or beside others in runs/ (other models:
    runs/faithful-<model>-<image>-<reference>)."""
    device: Device = "auto"
    """Where to compute."""
    progress_bar: bool = True
    """Show progress with the time left."""
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)

    def check(self) -> None:
        """Shares make a curve, and the embedded data has so many samples."""
        FaithfulnessConfig.check(self)
        if self.model == TRYON and self.checkpoint is None:
            self.checkpoint = SHIPPED_CHECKPOINT
        self.check_model()
        if self.model == TRYON and self.data.root is None and self.samples > self.data.synthetic.test:
            raise OptionError("samples", self.samples, f"at most data.synthetic.test={self.data.synthetic.test}")


@dataclass(kw_only=True, slots=True)
class DetectConfig(Sized):
    """Find the objects that Paint-by-Example paints from its attention alone, beside detectors."""

    pipeline: HubModel = "Fantasy-Studio/Paint-by-Example"
    """Paint-by-Example: a folder in diffusers' layout, or such a name on the hub."""
    root: Path | None = None
    """Folder in COCO's layout, annotations/instances_<split>.json and <split>/*.jpg; null: a small
    set of coloured shapes, made when missing."""
    split: str = "val2017"
    """Folder of the images, and end of the annotations' name."""
    annotations: Path | None = None
    """COCO file of objects, where it is called otherwise; null: by root and split."""
    shapes: Samples = 24
    """Pictures of the made set, which takes the place of root=null."""
    samples: Count | None = None
    """Number of objects, in order of image ids; null: all (one of each image that has one which
    covers 10 to 30 %)."""
    crowds: bool = True
    """Let annotations of crowds count, as the authors do."""
    height: ImageSide = 512
    """Height in pixels of generated images, and of real ones for detectors; aspects are ignored."""
    width: ImageSide = 512
    """Width likewise."""
    steps: SamplingSteps = 50
    """DDIM steps per image."""
    guidance: Guidance = 5.0
    """Scale of classifier-free guidance; 1 is none."""
    seed: Natural = 321
    """Seed of noise and random boxes; every image has its own stream, whatever the batch."""
    batch_size: Count = 4
    """Images that are made at once, and kept."""
    dtype: WeightType = "float32"
    """Numbers that the pipeline computes with: float32, float16 or bfloat16."""
    weighting: LayerWeighting = LayerWeighting.PAPER
    """How layers of different grids are summed: paper (plain sum) or density (balanced)."""
    delta: BelowOne = 0.4
    """Threshold of the normalised map; what exceeds it may be the object."""
    deltas: list[BelowOne] = field(default_factory=lambda: [0.2, 0.3, 0.4, 0.5, 0.6])
    """Thresholds of the sweep (paper Table 3), from the same maps."""
    detectors: Annotated[list[HubModel | dict[str, Any]], DISTINCT] = field(default_factory=list)
    """Supervised detectors to compare with: torchvision:NAME, torchvision:NAME@FILE, or a folder or
    hub name of transformers, of a model that finds boxes (PekingU/rtdetr_r50vd, hustvl/yolos-tiny)
    or segments (facebook/maskformer-swin-tiny-coco); or your own by import path,
    my_package:MyDetector, or {fn: my_package:MyDetector, share: 0.3} with arguments
    (i2am_train/EXTENDING.md)."""
    score: BelowOne = 0.5
    """An image counts for a detector where its best detection's score exceeds this."""
    match_category: bool = False
    """Look at a detector's detections of the object's own category only; false: at all of them."""
    pictures: Natural = 8
    """Samples that are drawn."""
    output: Path | None = None
    """Folder for images, maps and results; null: runs/detect-<pipeline>-<data>."""
    device: Device = "auto"
    """Where to compute."""
    progress_bar: bool = True
    """Show progress with the time left."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> None:
        """Annotations are of images.

        >>> DetectConfig(annotations="a.json")
        Traceback (most recent call last):
            ...
        i2am_train.config.options.OptionError: annotations=...a.json is not possible: expected null without root, ...
        """
        if self.annotations is not None and self.root is None:
            raise OptionError("annotations", self.annotations, "null without root, the folder of the images")

    @property
    def folder(self) -> Path:
        """``output``, or a folder in ``runs/`` named after pipeline and data.

        >>> DetectConfig(root="data/coco").folder.name
        'detect-Paint-by-Example-coco'
        """
        data = "shapes" if self.root is None else self.root.name
        return self.output or Path.cwd() / "runs" / f"detect-{Path(self.pipeline).name}-{data}"

    @property
    def thresholds(self) -> list[float]:
        """``delta`` and ``deltas``, each once, ascending.

        >>> DetectConfig(delta=0.4, deltas=[0.6, 0.4]).thresholds
        [0.4, 0.6]
        """
        return sorted({self.delta, *self.deltas})
