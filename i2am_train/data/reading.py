"""Reading try-on samples from any layout: files as they lie on disk, samples as the rest of the program wants them.

What differs between files (names, polarity, sizes) is settled here; above this module a mask is True inside
the region that its name says, and an image lies in [-1, 1].

Deviations from the authors' reader: masks are thresholded at their own size, then reduced by area (theirs are soft in
training and resized before thresholding at test); the rule "an agnostic mask below 122,880 pixels of 1024 x 768
becomes all ones" is the same share, 15.625 %, of any size, and is applied in training only, as theirs is (and never to
DressCode, see :mod:`i2am_train.data.layouts.dresscode`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from i2am_train.data.arrays import Image, Mask, SampleArrays
from i2am_train.data.checks.needed_files import check_files
from i2am_train.data.derive.densepose import read_pose_picture
from i2am_train.data.layouts.layout import Layout, Pair
from i2am_train.data.picture_files import read_colour, read_correspondence, read_native_mask
from i2am_train.data.pictures import Window, fit_mask, fit_nearest, fit_picture, window
from i2am_train.data.sample import TryOnSample
from i2am_train.data.transforms import Augmentation
from i2am_train.errors import DataError
from i2am_train.seeds import seed_for
from i2am_train.types import Fit, GridSize, Pairing, Role, Split

SMALLEST_INPAINT_SHARE = 122_880 / (1024 * 768)
"""Training masks that cover less become all ones: the authors' rule of 122,880 pixels at 1024x768, as a share."""

UNIT_VALUES = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1.0)
"""Colours 0..255 as [-1, 1]: a table, because torch would start its threads for each small picture."""

WHITE, BLACK = 255, 0
"""What a padded picture shows beside it: photographs white, pose pictures black."""


class EpochPosition(NamedTuple):
    """A sample of a certain epoch: what the training sampler asks for, so that workers need no state."""

    epoch: int
    position: int


class SampleIndexError(DataError, IndexError):
    """A sample number that the dataset does not have (also ends plain iteration)."""


class TryOnDataset(Dataset[TryOnSample]):
    """Try-on samples of one or more layouts, one after the other.

    Args:
        layouts: where the files lie; all of one dataset and split.
        pairing: whether people get their own garment.
        size: picture size, height first; files of another size are resized.
        augment: apply the authors' training augmentations (:mod:`i2am_train.data.transforms`).
        seed: of the augmentations.
        indices: positions in the joined pair lists to read; default all.
        small_mask_rule: replace small inpainting masks by all ones; default what the layout says, in training only.
        fit: how pictures of another aspect come to ``size`` (:mod:`i2am_train.data.pictures`).

    Raises:
        DataError: a folder, list or file is missing or broken.
    """

    def __init__(
        self, layouts: Sequence[Layout], pairing: Pairing, size: GridSize, *, augment: bool = False, seed: int = 0,
        indices: Sequence[int] | None = None, small_mask_rule: bool | None = None, fit: Fit = "stretch",
    ) -> None:  # fmt: skip
        self.pairing, self.size, self.fit = pairing, GridSize(*size), fit
        self.root, self.split = layouts[0].root, layouts[0].split
        self.seed = seed
        lists = [layout.pairs(self.pairing) for layout in layouts]
        self.pairs = [pair for pairs in lists for pair in pairs]
        self.layouts = [layout for layout, pairs in zip(layouts, lists, strict=True) for _ in pairs]
        self.indices = list(range(len(self.pairs)) if indices is None else indices)
        self._layouts = list(layouts)
        for layout, pairs in self.parts():
            layout.check_folders()
            check_files(layout, pairs, self.pairing)
        usual_rule = layouts[0].small_mask_rule and self.split is Split.TRAIN
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
        arrays = self._read(layout, pair)
        if self._augmentation is not None:
            arrays = self._augmentation(arrays, seed_for(self.seed, "augmentation", epoch, index))
        return _as_sample(arrays, pair, index, paired=layout.worn(pair))

    def person_image(self, position: int) -> Tensor:
        """The photograph of the person at a position, alone: uint8 [3, height, width] at this dataset's size."""
        index = self.global_index(position)
        picture = self._photograph(self.layouts[index].path(Role.PERSON, self.pairs[index].person))
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
        flat = read_colour(layout.path(Role.GARMENT, garment))
        placed = window(GridSize(*flat.shape[:2]), self.size, self.fit)
        worn = layout.worn(pair)
        pose = read_pose_picture(layout.path(Role.POSE_PICTURE, person))
        return SampleArrays(
            person=self._photograph(layout.path(Role.PERSON, person)),
            garment=fit_picture(flat, self.size, self.fit, WHITE),
            agnostic=self._photograph(layout.path(Role.AGNOSTIC, person)),
            densepose=fit_picture(pose, self.size, self.fit, BLACK),
            garment_mask=self._mask(layout.path(Role.GARMENT_MASK, garment)),
            inpaint_mask=self._inpaint_mask(layout.path(Role.INPAINT_MASK, person)),
            warped_garment_mask=self._warped_mask(layout, person, worn),
            correspondence=self._correspondence(layout, person, worn, placed),
        )

    def _photograph(self, path: Path) -> Image:
        return fit_picture(read_colour(path), self.size, self.fit, WHITE)

    def _mask(self, path: Path) -> Mask:
        return fit_mask(read_native_mask(path), self.size, self.fit)

    def _inpaint_mask(self, path: Path) -> Mask:
        mask = read_native_mask(path)
        if self.small_mask_rule and mask.mean() < SMALLEST_INPAINT_SHARE:
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


def _as_sample(arrays: SampleArrays, pair: Pair, index: int, *, paired: bool) -> TryOnSample:
    """Arrays as tensors."""
    return TryOnSample(
        name=pair.person, garment_name=pair.garment, index=index, paired=paired,
        person=_image(arrays.person), garment=_image(arrays.garment), agnostic=_image(arrays.agnostic),
        densepose=_image(arrays.densepose), garment_mask=_plain(arrays.garment_mask),
        inpaint_mask=_plain(arrays.inpaint_mask), warped_garment_mask=_plain(arrays.warped_garment_mask),
        correspondence=_plain(arrays.correspondence),
    )  # fmt: skip


def _image(picture: Image) -> Tensor:
    """Colours 0..255 ``[H, W, 3]`` as [-1, 1] ``[3, H, W]``; grey 128 becomes +0.0039, as the authors have it."""
    return torch.from_numpy(np.take(UNIT_VALUES, picture.transpose(2, 0, 1)))


def _plain(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
