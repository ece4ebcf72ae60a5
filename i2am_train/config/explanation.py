"""Options of ``i2am explain``."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from i2am_train.config.attention import AttributionConfig
from i2am_train.config.build import OptionError, Options
from i2am_train.config.constraints import (
    LARGEST_IMAGE,
    Count,
    Layer,
    ModelFolder,
    Natural,
    PatchPosition,
    several,
    within,
)
from i2am_train.config.data import DataConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.errors import ConfigError
from i2am_train.types import Device, GridSize, Pairing, Split

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
        """Grids are what recipes take."""
        for name in ("reference_grid", "generated_grid"):
            if (grid := getattr(self, name)) is not None:
                setattr(self, name, GridSize(*grid))

    @property
    def given(self) -> dict[str, Any]:
        """The options that were set."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(kw_only=True, slots=True)
class ExplainConfig(Options):
    """Draw every attribution map of a sample, and make a page to explore them."""

    checkpoint: ModelFolder | Annotated[list[ModelFolder], several] | None = None
    """Checkpoint folder, or run folder; tiny is the shipped one. Several stand side by side on the
    page: [tiny,runs/refined-seed0]. Other models: a folder of diffusers, or a name on the hub."""
    model: str = TRYON
    """tryon: ours, on a sample of a dataset. Others are asked by files (image, mask, reference):
    paint_by_example, ip_adapter, ip_adapter_plus, ip_adapter_full_face, catvton; factory: any
    pipeline that your own code makes. `i2am explain --recipes` lists what is known of each."""
    sample: Natural | Annotated[list[Natural], several] = 0
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
    size: tuple[OtherSide, OtherSide] | None = None
    """Other models: height and width of the result; null: the model's usual ones."""
    adapter: Path | None = None
    """Weights beside the checkpoint: ip_adapter...'s file, or catvton's of the attention layers."""
    factory: str | None = None
    """model=factory: package.module:function that returns your pipeline (i2am_train/attention/README.md)."""
    recipe: str | None = None
    """model=factory: name of the recipe where the pipeline is not recognised by its modules, or the
    import path of your own (i2am_train/EXTENDING.md)."""
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
    recipe_options: RecipeConfig = field(default_factory=RecipeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)

    def check(self) -> None:
        """Options of one way of asking are refused with the other."""
        if self.checkpoint is None and self.model != FACTORY:
            raise ConfigError("checkpoint is required and was not given. Add checkpoint=VALUE.")
        if self.attribution.time_groups > self.sampling.steps:
            raise OptionError(
                "attribution.time_groups", self.attribution.time_groups, f"at most sampling.steps={self.sampling.steps}"
            )
        drawn = getattr(self.data.synthetic, self.split)
        if self.model == TRYON and self.data.root is None and max(self.samples) >= drawn:
            raise OptionError("sample", self.sample, f"less than data.synthetic.{self.split}={drawn}, counted from 0")
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
