"""The authors' augmentations of training samples, in their order, with the correspondence carried along.

Order: joint flip; shift and scale of the garment; an independent shift and scale of everything on the person's side;
joint colour change; agnostic image greyed again. What albumentations does at random here depends on the seed that
is passed in and on nothing else.

Deviations from the authors' code, on purpose:
masks are binarised again after each warp (theirs keep soft edges); the garment's part of a correspondence that
leaves the picture becomes NaN; scaling keeps the proportions, as ``ShiftScaleRotate`` did in the albumentations of
their time (in version 2 it scales the axes independently, so :class:`albumentations.Affine` is used instead).
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing it would ask a server for the newest version
import albumentations as A

from i2am_train.data.pictures import GREY, Image, SampleArrays

SHIFT, SCALE = 0.2, 0.2
"""Largest shift (share of the picture) and change of scale: the authors'."""


GARMENT_SIDE = {"garment": "image", "garment_mask": "mask"}
PERSON_SIDE = {
    "person": "image", "agnostic": "image", "densepose": "image", "inpaint_mask": "mask", "warped_garment_mask": "mask",
}  # fmt: skip
COLOURED = {"person": "image", "agnostic": "image", "garment": "image"}


class Augmentation:
    """Augments samples; the same seeds give the same sample, in any process and in any order."""

    def __init__(self) -> None:
        self._flip = _Step([A.HorizontalFlip(p=0.5)], GARMENT_SIDE | PERSON_SIDE)
        self._garment = _Step([_shift_scale()], GARMENT_SIDE)
        self._person = _Step([_shift_scale()], PERSON_SIDE)
        self._colour = _Step(
            [
                A.RandomBrightnessContrast(brightness_limit=(-0.1, 0.02), contrast_limit=(-0.3, 0.3), p=0.5),
                A.HueSaturationValue(hue_shift_limit=5, sat_shift_limit=5, val_shift_limit=5, p=0.5),
            ],
            COLOURED,
        )

    def __call__(self, sample: SampleArrays, seed: int) -> SampleArrays:
        """Augment one sample; the same seed gives the same result."""
        flip, garment, person, colour = np.random.SeedSequence(seed).generate_state(4).tolist()
        sample = self._person_moved(self._garment_moved(self._flipped(sample, flip), garment), person)
        sample, _ = self._colour(sample, colour)
        agnostic = np.where(sample.inpaint_mask[..., None], np.uint8(GREY), sample.agnostic)
        return replace(sample, agnostic=agnostic)

    def _flipped(self, sample: SampleArrays, seed: int) -> SampleArrays:
        """Mirror all pictures together: left stays left for both, so coordinates mirror as well."""
        sample, applied = self._flip(sample, seed)
        if applied is None:
            return sample
        mirrored = sample.correspondence[:, ::-1].copy()
        mirrored[..., 1] = 1.0 - mirrored[..., 1]
        return replace(sample, correspondence=mirrored)

    def _garment_moved(self, sample: SampleArrays, seed: int) -> SampleArrays:
        """Move the flat garment: the values of the correspondence move with it."""
        sample, applied = self._garment(sample, seed)
        if applied is None:
            return sample
        moved = move_coordinates(sample.correspondence, applied["matrix"], sample.garment.shape[:2])
        return replace(sample, correspondence=moved)

    def _person_moved(self, sample: SampleArrays, seed: int) -> SampleArrays:
        """Move the person: the map of the correspondence moves with them."""
        sample, applied = self._person(sample, seed)
        if applied is None:
            return sample
        return replace(sample, correspondence=move_map(sample.correspondence, applied["matrix"]))


def move_coordinates(
    correspondence: NDArray[np.float32], matrix: NDArray[np.float64], size: tuple[int, ...]
) -> NDArray[np.float32]:
    """Coordinates (yx, 0..1) after the garment picture was warped by an affine pixel matrix; NaN outside.

    >>> shift = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])  # two of four columns to the right
    >>> move_coordinates(np.array([[[0.5, 0.25], [0.5, 0.75]]], np.float32), shift, (4, 4)).tolist()
    [[[0.5, 0.75], [nan, nan]]]
    """
    scale = np.array([size[1], size[0]], np.float64)
    pixels = correspondence[..., ::-1] * scale - 0.5
    moved = (pixels @ matrix[:2, :2].T + matrix[:2, 2] + 0.5) / scale
    inside = ((moved >= 0.0) & (moved <= 1.0)).all(axis=-1, keepdims=True)
    return np.where(inside, moved, np.nan)[..., ::-1].astype(np.float32)


def move_map(correspondence: NDArray[np.float32], matrix: NDArray[np.float64]) -> NDArray[np.float32]:
    """A correspondence map after the person's picture was warped by an affine pixel matrix (nearest neighbour).

    >>> shift = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    >>> move_map(np.array([[[0.1, 0.2], [0.3, 0.4]]], np.float32), shift)[0].round(1).tolist()
    [[nan, nan], [0.10..., 0.2...]]
    """
    height, width = correspondence.shape[:2]
    nothing = (float("nan"),) * 4
    moved = cv2.warpAffine(
        correspondence, matrix[:2], (width, height),
        flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=nothing,
    )  # fmt: skip
    return np.asarray(moved, np.float32)


def _shift_scale() -> A.BasicTransform:
    """Shift and scale with probability a half; what comes in from outside is black."""
    return A.Affine(
        scale=(1 - SCALE, 1 + SCALE), translate_percent=(-SHIFT, SHIFT), keep_ratio=True, rotate=0.0,
        interpolation=cv2.INTER_LINEAR, mask_interpolation=cv2.INTER_LINEAR, border_mode=cv2.BORDER_CONSTANT, p=0.5,
    )  # fmt: skip


class _Step:
    """Transforms of some fields of a sample (the first image is what albumentations calls ``image``)."""

    def __init__(self, transforms: list[Any], targets: dict[str, str]) -> None:
        self._targets = targets
        self._names = {name: name for name in targets}
        self._names[next(name for name, kind in targets.items() if kind == "image")] = "image"
        others = {name: kind for name, kind in targets.items() if self._names[name] == name}
        self._pipeline = A.Compose(transforms, additional_targets=others, save_applied_params=True)

    def __call__(self, sample: SampleArrays, seed: int) -> tuple[SampleArrays, dict[str, Any] | None]:
        """The changed sample, and the parameters of the last transform that was applied, or None."""
        self._pipeline.set_random_seed(seed)
        result = self._pipeline(**{theirs: _as_uint8(getattr(sample, ours)) for ours, theirs in self._names.items()})
        changed = {
            name: result[self._names[name]] if kind == "image" else result[name] >= 128
            for name, kind in self._targets.items()
        }
        applied = result["applied_transforms"]
        return replace(sample, **changed), applied[-1][1] if applied else None


def _as_uint8(array: NDArray[Any]) -> Image:
    """Masks as 0 and 255."""
    return array.astype(np.uint8) * np.uint8(255) if array.dtype == np.bool_ else array
