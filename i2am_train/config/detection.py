"""Options of the object detection experiment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from i2am_train.config.build import OptionError, Options
from i2am_train.config.constraints import (
    BelowOne,
    Count,
    Guidance,
    HubModel,
    ImageSide,
    Natural,
    Samples,
    SamplingSteps,
    distinct,
)
from i2am_train.config.tracking import TrackingConfig
from i2am_train.types import Device, GridSize, LayerWeighting, WeightType


@dataclass(kw_only=True, slots=True)
class DetectConfig(Options):
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
    detectors: Annotated[list[HubModel], distinct] = field(default_factory=list)
    """Supervised detectors to compare with: torchvision:NAME, torchvision:NAME@FILE, or a folder or
    hub name of transformers, of a model that finds boxes (PekingU/rtdetr_r50vd, hustvl/yolos-tiny)
    or segments (facebook/maskformer-swin-tiny-coco); or your own by import path,
    my_package:MyDetector (i2am_train/EXTENDING.md)."""
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
        """Annotations are of images."""
        if self.annotations is not None and self.root is None:
            raise OptionError("annotations", self.annotations, "null without root, the folder of the images")

    @property
    def size(self) -> GridSize:
        """Image size, height first."""
        return GridSize(self.height, self.width)

    @property
    def thresholds(self) -> list[float]:
        """``delta`` and ``deltas``, each once, ascending."""
        return sorted({self.delta, *self.deltas})
