"""Try-on samples of any dataset folder: which layout it has, and its files as the rest of the program wants them.

What differs between files (names, polarity, sizes) is settled here; above this module a mask is True inside
the region that its name says, and an image lies in [-1, 1].

Deviations from the authors' reader: masks are thresholded at their own size, then reduced by area (theirs are soft in
training and resized before thresholding at test); the rule "an agnostic mask below 122,880 pixels of 1024 x 768
becomes all ones" is the same share, 15.625 %, of any size, and is applied in training only, as theirs is (and never to
DressCode, see :class:`~i2am_train.data.layouts.DressCodeLayout`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from i2am_train.config.data import DataConfig
from i2am_train.config.locations import dataset_folder
from i2am_train.data.cache import LatentCache
from i2am_train.data.layouts import DressCodeLayout, Layout, Pair, Place, VitonHDLayout, entries
from i2am_train.data.needed_files import advises, check_files
from i2am_train.data.picture_files import read_correspondence, read_mask, read_rgb
from i2am_train.data.pictures import Image, Mask, SampleArrays, Window, fit_mask, fit_nearest, fit_picture, window
from i2am_train.data.poses import read_pose_picture
from i2am_train.data.synthetic import make_dataset
from i2am_train.data.transforms import Augmentation
from i2am_train.doors import calls, derives, make, resolve
from i2am_train.environment import first_process, wait_for
from i2am_train.errors import ConfigError, DataError
from i2am_train.runs import require_apart
from i2am_train.seeds import seed_for
from i2am_train.types import CATEGORIES, Category, Fit, GridSize, Pairing, Role, Split

_SMALLEST_INPAINT_SHARE = 122_880 / (1024 * 768)
"""Training masks that cover less become all ones: the authors' rule of 122,880 pixels at 1024x768, as a share."""

_UNIT_VALUES = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1.0)
"""Colours 0..255 as [-1, 1]: a table, because torch would start its threads for each small picture."""

_WHITE, _BLACK = 255, 0
"""What a padded picture shows beside it: photographs white, pose pictures black."""


class TryOnSample(TypedDict):
    """One sample. Images lie in [-1, 1]; masks are True inside the region that their name says.

    ``correspondence`` gives, for each person pixel on the garment, its place (yx) on the flat garment in units of
    the garment picture's height and width: the centre of row r is at (r + .5) / H. It is NaN where there is none.
    """

    name: str
    """The person's file stem, such as ``00017_00``."""
    garment_name: str
    """The garment's file stem; equal to ``name`` in paired mode."""
    index: int
    """Position in the pair list, whatever subset is read: what per-sample seeds are made of."""
    paired: bool
    """Whether the person wears this garment in the ``person`` image."""
    person: Float[Tensor, "3 height width"]
    garment: Float[Tensor, "3 height width"]
    agnostic: Float[Tensor, "3 height width"]
    densepose: Float[Tensor, "3 height width"]
    garment_mask: Bool[Tensor, "height width"]
    inpaint_mask: Bool[Tensor, "height width"]
    """True where the model has to paint."""
    warped_garment_mask: Bool[Tensor, "height width"]
    """The garment on the person; all False where it is not known."""
    correspondence: Float[Tensor, "height width 2"]


class TryOnBatch(TypedDict):
    """A batch: torch's default collation of :class:`TryOnSample`."""

    name: list[str]
    garment_name: list[str]
    index: Int[Tensor, " batch"]
    paired: Bool[Tensor, " batch"]
    person: Float[Tensor, "batch 3 height width"]
    garment: Float[Tensor, "batch 3 height width"]
    agnostic: Float[Tensor, "batch 3 height width"]
    densepose: Float[Tensor, "batch 3 height width"]
    garment_mask: Bool[Tensor, "batch height width"]
    inpaint_mask: Bool[Tensor, "batch height width"]
    warped_garment_mask: Bool[Tensor, "batch height width"]
    correspondence: Float[Tensor, "batch height width 2"]


def batch_on(batch: TryOnBatch, device: torch.device | str) -> TryOnBatch:
    """The same batch with all its tensors on a device.

    >>> batch_on({"name": ["a"], "index": torch.tensor([3])}, "meta")["index"].device.type
    'meta'
    """
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return cast(TryOnBatch, moved)


# -- which layout a folder has, and what its lists hold ----------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How a dataset folder is read."""

    layout: str = "auto"
    """A `types.LayoutName` (auto: dresscode where a category's folder exists, viton_hd otherwise), or the import path
    of a layout."""
    categories: tuple[Category, ...] = ()
    """Of DressCode, in this order; empty: all that exist."""
    fit: Fit = "stretch"
    """How pictures of another aspect come to the size that is asked for."""
    options: str = field(default="data.", compare=False, repr=False)
    """What the names of these options begin with, for messages: nothing in ``i2am data``."""


AS_IT_LIES = Reading()
"""The layout found by looking, all categories, the proportions of the size that is asked for."""


def reading_of(data: DataConfig) -> Reading:
    """How the dataset folder is read.

    >>> reading_of(DataConfig(fit="crop"))
    Reading(layout='auto', categories=(), fit='crop')
    """
    return Reading(data.layout, tuple(data.categories), data.fit)


def detect_layout(root: Path, options: str = "data.") -> Literal["viton_hd", "dresscode"]:
    """The layout of a folder, from its sub-folders; ``options`` is that of `Reading`.

    Raises:
        DataError: the folder is one category of DressCode.
    """
    if any((root / category).is_dir() for category in CATEGORIES):
        return "dresscode"
    if root.name in CATEGORIES and (root / "images").is_dir():
        raise DataError(
            f"{root} is one category of DressCode; expected the folder above it. "
            f"Set {options}root={root.parent} {options}categories=[{root.name}]."
        )
    return "viton_hd"


def split_layouts(root: Path, split: Split, reading: Reading) -> list[Layout]:
    """The layouts of a split: one, or one per category.

    Raises:
        DataError: categories were asked for that are not there.
        ConfigError: the layout cannot be imported, or is none.

    >>> (layout,) = split_layouts(Path("set"), Split.TRAIN, Reading(layout="viton_hd"))
    >>> layout.folder.as_posix()
    'set/train'
    """
    name = detect_layout(root, reading.options) if reading.layout == "auto" else reading.layout
    if name == "dresscode":
        return _dresscode_layouts(root, split, reading)
    if reading.categories:
        raise DataError(
            f"{reading.options}categories={list(reading.categories)} belongs to DressCode, and {root} is in another "
            f"layout. Leave it out, or check {reading.options}root."
        )
    return [VitonHDLayout(root, split) if name == "viton_hd" else _own_layout(root, split, reading)]


def _dresscode_layouts(root: Path, split: Split, reading: Reading) -> list[Layout]:
    """One layout per category: the wanted ones, or all that exist."""
    options = reading.options
    there = [name for name in CATEGORIES if (root / name).is_dir()]
    categories = reading.categories or there or CATEGORIES
    if missing := [name for name in categories if not (root / name).is_dir()]:
        advice = f"Set {options}categories=[{','.join(there)}]" if there else f"Check {options}root"
        raise DataError(
            f"{root} has no folder {', '.join(missing)} (found: {entries(root)}); expected DressCode's folders "
            f"{', '.join(categories)}. {advice}, or {options}layout=viton_hd for the other layout."
        )
    return [DressCodeLayout(root, split, category) for category in categories]


def _own_layout(root: Path, split: Split, reading: Reading) -> Layout:
    """The user's layout by its import path, made, and asked what it will be asked for."""
    option = f"{reading.options}layout"
    given = f"{option}={reading.layout}"
    found = resolve(
        reading.layout,
        option,
        "a class derived from i2am_train.data.layouts.Layout (or from one of those beside it), made by (root, split)",
        *(derives(Layout), _wrong_places, calls("root", "split")),
    )
    layout: Layout = make(partial(found, root, split), given)
    answers: list[tuple[str, type, Callable[[], Any]]] = [
        ("folder", Path, lambda: layout.folder),
        ("label", str, lambda: layout.label),
        ("list_file(Pairing.PAIRED)", Path, lambda: layout.list_file(Pairing.PAIRED)),
        ("list_file(Pairing.UNPAIRED)", Path, lambda: layout.list_file(Pairing.UNPAIRED)),
        ("advice(Role.PERSON)", str, lambda: layout.advice(Role.PERSON)),
    ]
    for name, kind, ask in answers:
        named = f"{given}: {name}"
        answer = make(ask, named)
        if not isinstance(answer, kind):
            advice = "Write @property above it" if callable(answer) else f"Write {kind.__name__}(...) around it"
            found_kind, expected = (f"{one.__module__}.{one.__name__}" for one in (type(answer), kind))
            raise ConfigError(f"{named} is a {found_kind}; expected a {expected}. {advice}.".replace("builtins.", ""))
    if wrong := calls("person")(layout.own_garment):
        raise ConfigError(f"{given}: own_garment {wrong}. Expected a method own_garment(self, person).")
    return layout


def _wrong_places(layout: Any) -> str | None:
    """What is wrong with where a layout's class says that files lie."""
    if missing := [name for name in ("places", "small_mask_rule") if not hasattr(layout, name)]:
        return f"lacks {', '.join(missing)}"
    if not isinstance(layout.places, Mapping):
        return f"has a {type(layout.places).__name__} places, which must be a mapping of the class, by Role"
    if missing := [f"places[Role.{role.name}]" for role in Role if role not in layout.places]:
        return f"lacks {', '.join(missing)}"
    if unknown := [key for key in layout.places if key not in list(Role)]:
        roles = ", ".join(f"Role.{role.name}" for role in Role)
        return f"has places[{unknown[0]!r}], which must be one of {roles}"
    for role in Role:
        places = layout.places[role]
        several = isinstance(places, tuple | list) and places and all(isinstance(place, Place) for place in places)
        if not several or any(place.pattern.count("{}") != 1 for place in places):
            return (
                f"has places[Role.{role.name}] = {places!r}, which must be a tuple of Place, each with one {{}} for "
                f'the name, such as (Place("people", "{{}}.jpg"),)'
            )
    return None


def halves(root: Path, reading: Reading) -> tuple[list[Layout], list[Layout]]:
    """The layouts of both splits that a dataset has, and those that it has not.

    A half is absent that has neither a pair list nor a folder of its own; never are all of them. Errors are those of
    :func:`split_layouts`.
    """
    layouts = [layout for split in Split for layout in split_layouts(root, split, reading)]
    without = [one for one in layouts if not one.list_file(Pairing.PAIRED).is_file()]
    taken = {one.folder for one in layouts if one not in without}
    absent = [one for one in without if one.folder in taken or not one.folder.is_dir()]
    if len(absent) == len(layouts):
        return layouts, []
    return [one for one in layouts if one not in absent], absent


def list_length(root: Path, split: Split, pairing: Pairing, reading: Reading) -> int:
    """How many pairs the lists of a split hold."""
    return sum(len(layout.listed(pairing)) for layout in split_layouts(root, split, reading))


def list_lengths(root: Path, reading: Reading) -> dict[str, int]:
    """How many people each list that exists holds, by split (and category)."""
    return {
        layout.label: len(layout.listed(Pairing.PAIRED))
        for split in Split
        for layout in split_layouts(root, split, reading)
        if layout.list_file(Pairing.PAIRED).is_file()
    }


def data_root(data: DataConfig, *outputs: Path | None) -> Path:
    """The dataset's folder, which may not be there yet.

    Raises:
        RunFolderError: one of the folders that the command writes lies in it, or it in one of them.
    """
    synthetic = data.synthetic
    root = data.root or dataset_folder(data.size, synthetic.train, synthetic.test, synthetic.seed)
    require_apart(root, *outputs, data.cache_copies)
    return root


def prepare_data(data: DataConfig, *outputs: Path | None) -> Path:
    """The folder of :func:`data_root`; the embedded dataset is made if it is not there yet."""
    synthetic, root = data.synthetic, data_root(data, *outputs)
    if data.root is not None:
        return root
    if not first_process():
        wait_for(root)
    elif not root.is_dir():
        tqdm.write(f"The embedded dataset is drawn in {root} (data.root=FOLDER reads another).", file=sys.stderr)
        make_dataset(root, synthetic.train, synthetic.test, data.size, synthetic.seed, progress=True)
    return root


def require_correspondence(root: Path, reading: Reading = AS_IT_LIES) -> None:
    """Raise DataError unless training samples have a correspondence, true or matched."""
    folders = [layout.folder_of(Role.CORRESPONDENCE) for layout in split_layouts(root, Split.TRAIN, reading)]
    if missing := next((folder for folder in folders if not folder.is_dir()), None):
        raise DataError(
            f"A term (supervised, matches, or one with needs: [target]) is given the true correspondence, and {root} "
            f"has none (no folder {missing}). Have it matched (i2am data match root={root}), use the embedded dataset, "
            "or switch the term off (objective.terms.supervised=0)."
        )


# -- reading -----------------------------------------------------------------------------------------------------------


class EpochPosition(NamedTuple):
    """A sample of a certain epoch: what the training sampler asks for, so that workers need no state."""

    epoch: int
    position: int


class SampleIndexError(DataError, IndexError):
    """A sample number that the dataset does not have (also ends plain iteration)."""


class TryOnDataset(Dataset[TryOnSample]):
    """Try-on samples of a split, of one layout after the other where there are several.

    Args:
        root: dataset folder.
        split: which half.
        pairing: whether people get their own garment.
        size: picture size, height first; files of another size are resized.
        reading: layout, categories, and how pictures of another aspect come to ``size``.
        augment: apply the authors' training augmentations (:mod:`i2am_train.data.transforms`).
        seed: of the augmentations.
        indices: positions in the joined pair lists to read; default all.
        small_mask_rule: replace small inpainting masks by all ones; default what the layout says, in training only.

    Raises:
        DataError: a folder, list or file is missing or broken.
    """

    def __init__(
        self, root: Path, split: Split, pairing: Pairing, size: GridSize, reading: Reading = AS_IT_LIES, *,
        augment: bool = False, seed: int = 0, indices: Sequence[int] | None = None, small_mask_rule: bool | None = None,
    ) -> None:  # fmt: skip
        self.root, self.split, self.pairing, self.seed = root, split, pairing, seed
        self.size, self.fit = GridSize(*size), reading.fit
        self._layouts = split_layouts(root, split, reading)
        lists = [layout.pairs(pairing) for layout in self._layouts]
        self.pairs = [pair for pairs in lists for pair in pairs]
        self.layouts = [layout for layout, pairs in zip(self._layouts, lists, strict=True) for _ in pairs]
        self.indices = list(range(len(self.pairs)) if indices is None else indices)
        for layout, pairs in self.parts():
            check_files(layout, pairs, pairing)
        usual_rule = self._layouts[0].small_mask_rule and split is Split.TRAIN
        self.small_mask_rule = usual_rule if small_mask_rule is None else small_mask_rule
        self._augmentation = Augmentation() if augment else None

    def __len__(self) -> int:
        return len(self.indices)

    def global_index(self, position: int) -> int:
        """Place in the pair list of the sample at a position of this dataset."""
        if not 0 <= position < len(self):
            raise SampleIndexError(
                f"Sample {position} is out of range: the {self.split} split of {self.root} has {len(self)} "
                f"samples, numbered from 0 to {len(self) - 1}. Choose one of these."
            )
        return self.indices[position]

    def __getitem__(self, item: int | EpochPosition) -> TryOnSample:
        """Read a sample; an :class:`EpochPosition` says for which epoch it is augmented."""
        epoch, position = item if isinstance(item, tuple) else (0, int(item))
        index = self.global_index(position)
        pair, layout = self.pairs[index], self.layouts[index]
        with advises(layout):
            arrays = self._read(layout, pair)
        if self._augmentation is not None:
            arrays = self._augmentation(arrays, seed_for(self.seed, "augmentation", epoch, index))
        about = {"name": pair.person, "garment_name": pair.garment, "index": index, "paired": layout.worn(pair)}
        tensors = {name: _tensor(array) for name, array in vars(arrays).items()}
        return cast(TryOnSample, about | tensors)

    def person_image(self, position: int) -> Tensor:
        """The photograph of the person at a position, alone: uint8 [3, height, width] at this dataset's size."""
        index = self.global_index(position)
        layout = self.layouts[index]
        with advises(layout):
            picture = self._photograph(layout.path(Role.PERSON, self.pairs[index].person))
        return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)

    def parts(self) -> list[tuple[Layout, list[Pair]]]:
        """Each layout with its pairs that are read."""
        return [
            (layout, [self.pairs[index] for index in self.indices if self.layouts[index] is layout])
            for layout in self._layouts
        ]

    def _read(self, layout: Layout, pair: Pair) -> SampleArrays:
        """All pictures of a sample at this dataset's size."""
        person, garment = pair
        flat = read_rgb(layout.path(Role.GARMENT, garment))
        placed = window(GridSize(*flat.shape[:2]), self.size, self.fit)
        worn = layout.worn(pair)
        pose = read_pose_picture(layout.path(Role.POSE_PICTURE, person))
        return SampleArrays(
            person=self._photograph(layout.path(Role.PERSON, person)),
            garment=fit_picture(flat, self.size, self.fit, _WHITE),
            agnostic=self._photograph(layout.path(Role.AGNOSTIC, person)),
            densepose=fit_picture(pose, self.size, self.fit, _BLACK),
            garment_mask=self._mask(layout.path(Role.GARMENT_MASK, garment)),
            inpaint_mask=self._inpaint_mask(layout.path(Role.INPAINT_MASK, person)),
            warped_garment_mask=self._warped_mask(layout, person, worn),
            correspondence=self._correspondence(layout, person, worn, placed),
        )

    def _photograph(self, path: Path) -> Image:
        return fit_picture(read_rgb(path), self.size, self.fit, _WHITE)

    def _mask(self, path: Path) -> Mask:
        return fit_mask(read_mask(path), self.size, self.fit)

    def _inpaint_mask(self, path: Path) -> Mask:
        mask = read_mask(path)
        if self.small_mask_rule and mask.mean() < _SMALLEST_INPAINT_SHARE:
            return np.ones(self.size, np.bool_)
        return fit_mask(mask, self.size, self.fit)

    def _warped_mask(self, layout: Layout, person: str, worn: bool) -> Mask:
        if not worn or not layout.has(Role.WARPED_MASK):
            return np.zeros(self.size, np.bool_)
        return self._mask(layout.path(Role.WARPED_MASK, person))

    def _correspondence(self, layout: Layout, person: str, worn: bool, garment_window: Window) -> NDArray[np.float32]:
        if not worn or not layout.has(Role.CORRESPONDENCE):
            return np.full((*self.size, 2), np.nan, np.float32)
        native = read_correspondence(layout.path(Role.CORRESPONDENCE, person))
        return fit_nearest(garment_window.carried(native), self.size, self.fit, np.nan)


def _tensor(array: NDArray[Any]) -> Tensor:
    """Masks and coordinates as they are, colours 0..255 ``[H, W, 3]`` as [-1, 1] ``[3, H, W]``.

    Grey 128 becomes +0.0039, as the authors have it.
    """
    if array.dtype == np.uint8:
        return torch.from_numpy(np.take(_UNIT_VALUES, array.transpose(2, 0, 1)))
    return torch.from_numpy(np.ascontiguousarray(array))


class CachedDataset(Dataset[dict[str, Any]]):
    """Training samples from a cache: items of a :class:`~i2am_train.data.cache.CachedBatch`.

    A cache with variants shows them in turn: in epoch e a run of seed s sees variant ``(e + s - cache seed) % N``
    of each sample. With the cache's own seed, the first N epochs are those of a run that augments without a cache.

    Args:
        cache: where the samples lie.
        root: the dataset that the cache was made of; only its pair list is read.
        split: which half.
        reading: of the dataset.
        indices: positions in the pair list; default all.
        seed: the run's.
    """

    def __init__(
        self, cache: LatentCache, root: Path, split: Split, reading: Reading = AS_IT_LIES,
        indices: Sequence[int] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.cache, self.split = cache, Split(split)
        if self.split not in cache.index.samples:
            raise DataError(
                f"The cache in {cache.shown} has no {split} samples; it has {', '.join(cache.index.samples)}. "
                f"Make it anew with splits=[train,test]."
            )
        cache.require_space(self.split)
        layouts = split_layouts(root, self.split, reading)
        self.pairs = [pair for layout in layouts for pair in layout.pairs(Pairing.PAIRED)]
        self.indices = list(range(len(self.pairs)) if indices is None else indices)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int | EpochPosition) -> dict[str, Any]:
        """Read a sample; an :class:`EpochPosition` says for which epoch."""
        epoch, position = item if isinstance(item, tuple) else (0, int(item))
        if not 0 <= position < len(self):
            raise SampleIndexError(f"Sample {position} is out of range: there are {len(self)}.")
        index = self.indices[position]
        layout = self.cache.index.layout
        variant = (epoch + self.seed - layout.seed) % layout.rows_per_sample(self.split)
        person, garment = self.pairs[index]
        about = {"name": person, "garment_name": garment, "index": index, "paired": True}
        return about | self.cache.row(self.split, index, variant)
