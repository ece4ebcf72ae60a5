"""Options of datasets: where samples come from, and ``i2am data make | derive | match | check | cache``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

from i2am_train.config.locations import absolute
from i2am_train.config.options import (
    DISTINCT,
    NOT_BLANK,
    SOME_DISTINCT,
    Count,
    HubModel,
    ImageSide,
    Layout,
    ModelFolder,
    Natural,
    OptionError,
    Options,
    Pixels,
    Samples,
    Sized,
    Threads,
    Workers,
    within,
)
from i2am_train.errors import ConfigError
from i2am_train.types import Category, Device, Fit, GridSize, PoseSource, Split

Categories = Annotated[list[Category], DISTINCT]


@dataclass(kw_only=True, slots=True)
class SyntheticConfig(Options):
    """The embedded procedural dataset, made on first use where data.root is null."""

    train: Samples = 2000
    """Number of training samples."""
    test: Samples = 200
    """Number of held-out samples."""
    seed: Natural = 0
    """Seed of the generator; the same seed draws the same pictures."""


@dataclass(kw_only=True, slots=True)
class DataConfig(Sized):
    """Where the samples come from and how they are batched."""

    root: Path | None = None
    """Folder in VITON-HD or DressCode layout; null: the embedded dataset, made when missing."""
    layout: Layout = "auto"
    """How the folder is laid out: viton_hd, dresscode, auto (dresscode where it has folders of
    categories), or your own by import path, my_package:MyLayout (i2am_train/EXTENDING.md)."""
    categories: Categories = field(default_factory=list)
    """Categories of DressCode to read: upper_body, lower_body, dresses; empty: all that exist."""
    fit: Fit = "stretch"
    """Pictures of another aspect: stretch changes the proportions, pad adds margins (white, around
    body parts black), crop keeps the largest centred part."""
    height: ImageSide = 128
    """Image height in pixels; must be what the checkpoint was trained at."""
    width: ImageSide = 96
    """Image width in pixels."""
    batch_size: Count = 16
    """Training samples per device and step (before accumulation)."""
    workers: Workers = 2
    """Processes that read samples; 0 reads in the main process."""
    augment: bool = False
    """Flip, shift, scale and colour augmentation of training samples (the authors' order)."""
    cache: Annotated[str, NOT_BLANK] | None = None
    """Folder that `i2am data cache` made, or its copy's URL (s3://...): training samples come from
    it and the frozen encoders never run; null: they run in every step."""
    cache_copies: Path | None = None
    """Folder for copies of the shards where data.cache is a URL; null: in the user's cache."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """The embedded dataset."""

    def check(self) -> None:
        """A cache in a folder is meant from here, one at a URL is where it is.

        >>> DataConfig(cache="a").cache == str(Path.cwd() / "a"), DataConfig(cache="s3://a").cache
        (True, 's3://a')
        """
        if self.cache is not None and "://" not in self.cache:
            self.cache = str(absolute(Path(self.cache)))


def data_words(data: DataConfig) -> str:
    """The options that say which pictures are read, as a command line goes on; those that are the default are left out.

    >>> data_words(DataConfig(root=Path("/my set"), fit="pad", categories=["dresses"], workers=0))
    " 'data.root=/my set' 'data.categories=[dresses]' data.fit=pad"
    """
    names = ["root", "layout", "categories", "fit", "height", "width"]
    names += [f"synthetic.{item.name}" for item in fields(SyntheticConfig)]
    words = []
    for name in names:
        value, usual = (attrgetter(name)(each) for each in (data, DataConfig()))
        if value != usual:
            shown = f"[{','.join(value)}]" if isinstance(value, list) else value
            words.append(quote(f"data.{name}={shown}"))
    return "".join(f" {word}" for word in words)


@dataclass(kw_only=True, slots=True)
class DataMakeConfig(Sized):
    """Make a synthetic try-on dataset with exact correspondence."""

    root: Path | None = None
    """Folder to make; null: where `i2am train` looks for the embedded dataset."""
    train: Samples = 2000
    """Number of training samples."""
    test: Samples = 200
    """Number of held-out samples."""
    seed: Natural = 0
    """Seed of the generator."""
    height: ImageSide = 128
    """Image height in pixels."""
    width: ImageSide = 96
    """Image width in pixels."""
    annotations: bool = False
    """Also write human-parsing maps (image-parse-v3) and keypoints (openpose_json), which
    `i2am data derive` starts from."""
    workers: Threads | None = None
    """Processes that draw; null: one per core."""


@dataclass(kw_only=True, slots=True)
class DataDeriveConfig(Options):
    """Make what a dataset lacks: masks and agnostic pictures, from parsing maps and poses."""

    root: Path
    """Dataset folder in VITON-HD or DressCode layout: pair lists, people and flat garments."""
    layout: Layout = "auto"
    """How the folder is laid out, as in data.layout."""
    categories: Categories = field(default_factory=list)
    """Categories of DressCode to work on; empty: all that exist."""
    category: Category = "upper_body"
    """What the garments cover, in VITON-HD layout (DressCode's folders say it)."""
    labels: Literal["auto", "viton_hd", "dresscode"] = "auto"
    """Labels of the parsing maps: the 20 of image-parse-v3 or the 18 of label_maps; auto: those
    that are usual in the layout."""
    parser: HubModel | None = None
    """Folder or hub name of a transformers segmentation model that makes missing parsing maps,
    such as mattmdjaga/segformer_b2_clothes; null: the maps must be there."""
    estimator: HubModel | None = None
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
    workers: Threads | None = None
    """Threads; null: one per core."""
    json: Path | None = None
    """File for the report; null: <root>/derived.json."""

    def check(self) -> None:
        """Keypoints that a model makes are used."""
        if self.estimator is not None and self.pose in ("densepose", "none"):
            raise OptionError("pose", self.pose, "auto or keypoints with an estimator")


@dataclass(kw_only=True, slots=True)
class DataMatchConfig(Options):
    """Find the correspondence of worn and flat garments in the pictures, for data that have none."""

    root: Path
    """Dataset folder in VITON-HD or DressCode layout, with masks of the flat and the worn garments."""
    layout: Layout = "auto"
    """How the folder is laid out, as in data.layout."""
    categories: Categories = field(default_factory=list)
    """Categories of DressCode to work on; empty: all that exist."""
    preview: bool = False
    """Draw the matches of every person that is worked on into <root>/previews/matches."""
    workers: Threads | None = None
    """Threads; null: one per core."""


@dataclass(kw_only=True, slots=True)
class DataCheckConfig(Options):
    """Report everything that is wrong with a dataset folder."""

    root: Path
    """Dataset folder in VITON-HD or DressCode layout."""
    layout: Layout = "auto"
    """How the folder is laid out, as in data.layout."""
    categories: Categories = field(default_factory=list)
    """Categories of DressCode to check; empty: all that exist."""
    height: Pixels | None = None
    """Height that every image must have, in pixels; null: the pictures of a person must agree."""
    width: Pixels | None = None
    """Width that every image must have, in pixels."""
    json: Path | None = None
    """File for the report as JSON; null: print the table only."""

    def check(self) -> None:
        """A size has two lengths.

        >>> DataCheckConfig(root="a", height=512)
        Traceback (most recent call last):
            ...
        i2am_train.errors.ConfigError: Only one of height=512 and width=None is set. Set both, or neither.
        """
        if (self.height is None) != (self.width is None):
            raise ConfigError(f"Only one of height={self.height} and width={self.width} is set. Set both, or neither.")

    @property
    def size(self) -> GridSize | None:
        """Image size to insist on, height first, or None.

        >>> DataCheckConfig(root="a").size is None
        True
        """
        if self.height is None or self.width is None:
            return None
        return GridSize(self.height, self.width)


@dataclass(kw_only=True, slots=True)
class DataCacheConfig(Options):
    """Encode a dataset by a model's frozen networks, once for all training runs."""

    root: Path
    """Dataset folder in VITON-HD or DressCode layout."""
    layout: Layout = "auto"
    """How the folder is laid out, as in data.layout."""
    categories: Categories = field(default_factory=list)
    """Categories of DressCode to encode; empty: all that exist."""
    fit: Fit = "stretch"
    """Pictures of another aspect, as in data.fit."""
    init: ModelFolder = "tiny"
    """Checkpoint folder whose VAE and reference encoder are used; tiny is the shipped one. Pictures
    are read at its size."""
    output: Path
    """Folder of the cache. The same command again goes on, and makes damaged shards anew."""
    splits: Annotated[list[Split], SOME_DISTINCT] = field(default_factory=lambda: [Split.TRAIN])
    """Halves of the dataset: train, test."""
    variants: Annotated[int, within(0, 10_000)] = 0
    """Augmented variants of each training sample, shown in turn from epoch to epoch; 0: the sample
    as it is, for training with data.augment=false."""
    seed: Natural = 0
    """Seed of the augmentations; a run of the same seed sees what it would see without a cache, for
    as many epochs as there are variants."""
    dtype: Literal["float32", "float16"] = "float32"
    """How numbers are stored: float32 trains as without a cache, float16 takes half the space."""
    shard_samples: Count = 128
    """Samples in a file."""
    batch_size: Count = 16
    """Samples that are encoded at once."""
    workers: Workers = 2
    """Processes that read pictures; 0 reads in the main process."""
    device: Device = "auto"
    """Where to compute."""
    progress_bar: bool = True
    """Show progress with the time left."""

    def check(self) -> None:
        """Caches are made on this machine."""
        if address := re.search(r"(?<=/)\w+:/.*", str(self.output)):  # pathlib makes one slash of two
            raise OptionError("output", address[0], "a folder; copy it to object storage when it is made")
