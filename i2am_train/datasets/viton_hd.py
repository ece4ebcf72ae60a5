"""Reader of the VITON-HD folder layout (spec 2.1): the real dataset and the embedded one alike.

What differs between files on disk (names, polarity, sizes) is settled here; above this module a mask is True inside
the region that its name says, and an image lies in [-1, 1].

Deviations from the authors' reader: masks are thresholded at their own size, then reduced by area (theirs are soft in
training and resized before thresholding at test); the rule "an agnostic mask below 122,880 pixels of 1024 x 768
becomes all ones" is the same share, 15.625 %, of any size, and is applied in training only, as theirs is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from i2am_train.datasets.arrays import Image, Mask, SampleArrays
from i2am_train.datasets.correspondence_files import decode_correspondence
from i2am_train.datasets.pictures import (
    read_colour,
    read_native_mask,
    read_picture,
    resize_mask,
    resize_nearest,
)
from i2am_train.datasets.sample import TryOnSample
from i2am_train.datasets.transforms import Augmentation
from i2am_train.errors import DataError
from i2am_train.seeds import seed_for
from i2am_train.types import GridSize, Pairing, Split

SMALLEST_INPAINT_SHARE = 122_880 / (1024 * 768)
"""Training masks that cover less become all ones: the authors' rule, scaled (spec 2.1)."""

PERSON_FOLDERS = {
    "image": "{}.jpg", "agnostic-v3.2": "{}.jpg", "agnostic-mask": "{}_mask.png", "image-densepose": "{}.jpg",
}  # fmt: skip
"""Folders and file names of a person."""
GARMENT_FOLDERS = {"cloth": "{}.jpg", "cloth-mask": "{}.jpg"}
"""Folders and file names of a garment."""
WARPED_MASK, CORRESPONDENCE = "gt_cloth_warped_mask", "correspondence"
OPTIONAL_FOLDERS = {WARPED_MASK: "{}.jpg", CORRESPONDENCE: "{}.png"}
"""Read where they exist: the warped mask is needed in training only, the correspondence is synthetic only."""

UNIT_VALUES = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1.0)
"""Colours 0..255 as [-1, 1]: a table, because torch would start its threads for each small picture."""


class Pair(NamedTuple):
    """A line of a pair list, without suffixes."""

    person: str
    garment: str


class EpochPosition(NamedTuple):
    """A sample of a certain epoch: what the training sampler asks for, so that workers need no state."""

    epoch: int
    position: int


class SampleIndexError(DataError, IndexError):
    """A sample number that the dataset does not have (also ends plain iteration)."""


def read_pairs(root: Path, split: Split) -> list[Pair]:
    """The pair list of a split.

    Raises:
        DataError: the list is missing, empty, or a line has not two names.
    """
    file = root / f"{split}_pairs.txt"
    if not file.is_file():
        found = (
            ", ".join(sorted(entry.name for entry in root.iterdir()))
            if root.is_dir()
            else "no such folder"
        )
        raise DataError(
            f"{root} has no pair list {file.name} (found: {found or 'nothing'}). "
            f"Run 'i2am data check root={root}' for the expected layout, or 'i2am data make' for the embedded dataset."
        )
    lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
    wrong = next((number for number, words in enumerate(lines, start=1) if len(words) != 2), None)
    if wrong is not None or not lines:
        where = "is empty" if not lines else f"has {len(lines[wrong - 1])} names in entry {wrong}"  # type: ignore[operator]
        raise DataError(
            f"{file} {where}; expected lines 'person.jpg garment.jpg'. Restore the list of the dataset."
        )
    return [Pair(Path(person).stem, Path(garment).stem) for person, garment in lines]


def require_correspondence(root: Path) -> None:
    """Raise DataError unless training samples have their true correspondence, which only synthetic data has."""
    folder = root / Split.TRAIN / CORRESPONDENCE
    if not folder.is_dir():
        raise DataError(
            f"objective.supervised teaches the true correspondence, and {root} has none (no folder {folder}). "
            "Use the embedded dataset, or set objective.supervised=0."
        )


@dataclass(frozen=True)
class Layout:
    """Paths of one split's files."""

    root: Path
    split: Split

    @property
    def folder(self) -> Path:
        """The split's folder."""
        return self.root / self.split

    def path(self, folder: str, stem: str) -> Path:
        """The file of a person or garment in one of the folders."""
        pattern = (PERSON_FOLDERS | GARMENT_FOLDERS | OPTIONAL_FOLDERS)[folder]
        return self.folder / folder / pattern.format(stem)

    def check_folders(self) -> None:
        """Raise DataError unless all folders that every sample needs exist."""
        needed = [*PERSON_FOLDERS, *GARMENT_FOLDERS] + (
            [WARPED_MASK] if self.split is Split.TRAIN else []
        )
        missing = [name for name in needed if not (self.folder / name).is_dir()]
        if missing:
            found = (
                sorted(entry.name for entry in self.folder.iterdir())
                if self.folder.is_dir()
                else []
            )
            raise DataError(
                f"{self.folder} has no folder {', '.join(map(repr, missing))} "
                f"(found: {', '.join(found) or 'nothing'}). "
                f"Run 'i2am data check root={self.root}' for the expected layout."
            )


class VitonHDDataset(Dataset[TryOnSample]):
    """Try-on samples from a folder in VITON-HD layout.

    Args:
        root: folder with ``train/``, ``test/`` and the two pair lists.
        split: which half to read.
        pairing: paired uses the person's own garment whatever the list says; unpaired takes the list's second column.
        size: picture size, height first; files of another size are resized.
        augment: apply the authors' training augmentations (:mod:`i2am_train.datasets.transforms`).
        seed: of the augmentations.
        indices: positions in the pair list to read; default all.
        small_mask_rule: replace small inpainting masks by all ones; default in training only, as the authors do.

    Raises:
        DataError: a folder, list or file is missing or broken.
    """

    def __init__(
        self, root: Path | str, split: Split | str, pairing: Pairing | str, size: GridSize, augment: bool = False,
        seed: int = 0, indices: Sequence[int] | None = None, small_mask_rule: bool | None = None,
    ) -> None:  # fmt: skip
        self.root, self.split, self.pairing = Path(root), Split(split), Pairing(pairing)
        self.size = GridSize(*size)
        self.seed, self.epoch = seed, 0
        self.layout = Layout(self.root, self.split)
        self.pairs = read_pairs(self.root, self.split)
        self.layout.check_folders()
        self.indices = list(range(len(self.pairs)) if indices is None else indices)
        self.small_mask_rule = (
            self.split is Split.TRAIN if small_mask_rule is None else small_mask_rule
        )
        self._augmentation = Augmentation() if augment else None
        self._has = {name: (self.layout.folder / name).is_dir() for name in OPTIONAL_FOLDERS}

    def __len__(self) -> int:
        return len(self.indices)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentations plain positions get (samplers pass it with each position)."""
        self.epoch = epoch

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
        epoch, position = item if isinstance(item, tuple) else (self.epoch, int(item))
        index = self.global_index(position)
        person = self.pairs[index].person
        garment = person if self.pairing is Pairing.PAIRED else self.pairs[index].garment
        arrays = self._read(person, garment)
        if self._augmentation is not None:
            arrays = self._augmentation(arrays, seed_for(self.seed, "augmentation", epoch, index))
        return _as_sample(arrays, person, garment, index)

    def person_image(self, position: int) -> Tensor:
        """The photograph of the person at a position, alone: uint8 [3, height, width] at this dataset's size."""
        person = self.pairs[self.global_index(position)].person
        picture = read_colour(self.layout.path("image", person), self.size)
        return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)

    def _read(self, person: str, garment: str) -> SampleArrays:
        """All pictures of a sample at this dataset's size."""
        path, size = self.layout.path, self.size
        worn = person == garment
        return SampleArrays(
            person=read_colour(path("image", person), size),
            garment=read_colour(path("cloth", garment), size),
            agnostic=read_colour(path("agnostic-v3.2", person), size),
            densepose=read_colour(path("image-densepose", person), size),
            garment_mask=resize_mask(read_native_mask(path("cloth-mask", garment)), size),
            inpaint_mask=self._inpaint_mask(path("agnostic-mask", person)),
            warped_garment_mask=self._warped_mask(person) if worn else np.zeros(size, np.bool_),
            correspondence=self._correspondence(person) if worn else _no_correspondence(size),
        )

    def _inpaint_mask(self, path: Path) -> Mask:
        mask = read_native_mask(path)
        if self.small_mask_rule and mask.mean() < SMALLEST_INPAINT_SHARE:
            return np.ones(self.size, np.bool_)
        return resize_mask(mask, self.size)

    def _warped_mask(self, person: str) -> Mask:
        if not self._has[WARPED_MASK]:
            return np.zeros(self.size, np.bool_)
        return resize_mask(read_native_mask(self.layout.path(WARPED_MASK, person)), self.size)

    def _correspondence(self, person: str) -> NDArray[np.float32]:
        if not self._has[CORRESPONDENCE]:
            return _no_correspondence(self.size)
        return read_correspondence(self.layout.path(CORRESPONDENCE, person), self.size)


def read_correspondence(path: Path, size: GridSize) -> NDArray[np.float32]:
    """Exact correspondence ``[H, W, 2]`` (yx in 0..1, NaN outside) from a 16-bit PNG."""
    encoded = read_picture(path, cv2.IMREAD_UNCHANGED)
    if encoded.dtype != np.uint16 or encoded.ndim != 3:
        raise DataError(
            f"{path} is {encoded.dtype} with shape {encoded.shape}; expected 16 bits and three channels (y, x, valid). "
            "Make the dataset again with 'i2am data make', or remove its folder 'correspondence'."
        )
    return np.asarray(resize_nearest(decode_correspondence(encoded[..., ::-1]), size), np.float32)


def _no_correspondence(size: GridSize) -> NDArray[np.float32]:
    return np.full((*size, 2), np.nan, np.float32)


def _as_sample(arrays: SampleArrays, name: str, garment_name: str, index: int) -> TryOnSample:
    """Arrays as tensors."""
    return TryOnSample(
        name=name, garment_name=garment_name, index=index, paired=name == garment_name,
        person=_image(arrays.person), garment=_image(arrays.garment), agnostic=_image(arrays.agnostic),
        densepose=_image(arrays.densepose), garment_mask=_plain(arrays.garment_mask),
        inpaint_mask=_plain(arrays.inpaint_mask), warped_garment_mask=_plain(arrays.warped_garment_mask),
        correspondence=_plain(arrays.correspondence),
    )  # fmt: skip


def _image(picture: Image) -> Tensor:
    """Colours 0..255 ``[H, W, 3]`` as [-1, 1] ``[3, H, W]``; grey 128 becomes +0.0039 (spec 1.5)."""
    return torch.from_numpy(np.take(UNIT_VALUES, picture.transpose(2, 0, 1)))


def _plain(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
