"""Augmentations: the authors' order, with masks and correspondence that stay true."""

import cv2
import numpy as np
import pytest

from i2am_train.data.pictures import SampleArrays
from i2am_train.data.synthetic.rendering import render_sample
from i2am_train.data.transforms import Augmentation
from i2am_train.types import GridSize

SIZE = GridSize(96, 72)


def arrays(index: int) -> SampleArrays:
    return render_sample(0, index, SIZE, shading=False)


def garment_read_at_correspondence(sample: SampleArrays) -> np.ndarray:
    where = sample.correspondence * np.float32(SIZE) - np.float32(0.5)
    return cv2.remap(sample.garment, np.nan_to_num(where[..., 1]), np.nan_to_num(where[..., 0]), cv2.INTER_LINEAR)


@pytest.mark.parametrize("seed", range(12))
def test_the_correspondence_still_names_the_same_fabric(seed: int) -> None:
    # Proves that flip, both warps and the joint colour change carry the correspondence along: the augmented garment
    # read at it shows the augmented person's colours. Over the seeds every step is applied at least once.
    sample = Augmentation()(arrays(seed), seed)
    known = ~np.isnan(sample.correspondence[..., 0])
    inside = cv2.erode((known & sample.warped_garment_mask).astype(np.uint8), np.ones((3, 3))) > 0
    difference = np.abs(garment_read_at_correspondence(sample).astype(int) - sample.person)[inside]
    assert inside.sum() > 100
    assert np.median(difference) <= 8


def test_every_step_happens_for_about_half_of_the_samples() -> None:
    # Proves the probabilities: flips change the pose picture's order, shifts move masks, colours change pictures.
    augment, plain = Augmentation(), arrays(3)
    flips = moved_garments = moved_people = 0
    for number in range(60):
        flipped = augment._flipped(plain, number)
        flips += not np.array_equal(flipped.person, plain.person)
        moved_garments += not np.array_equal(augment._garment_moved(plain, number).garment_mask, plain.garment_mask)
        moved_people += not np.array_equal(augment._person_moved(plain, number).inpaint_mask, plain.inpaint_mask)
    assert all(15 <= count <= 45 for count in (flips, moved_garments, moved_people))


def test_a_flip_mirrors_pictures_and_coordinates_together() -> None:
    # Proves that left stays left: the mirrored person points to the mirrored garment.
    augment, plain = Augmentation(), arrays(1)
    flipped = next(f for f in (augment._flipped(plain, n) for n in range(20)) if f is not plain and
                   not np.array_equal(f.person, plain.person))  # fmt: skip
    np.testing.assert_array_equal(flipped.person, plain.person[:, ::-1])
    np.testing.assert_array_equal(flipped.garment, plain.garment[:, ::-1])
    np.testing.assert_allclose(flipped.correspondence[..., 1], 1 - plain.correspondence[:, ::-1, 1], atol=1e-6)
    np.testing.assert_array_equal(flipped.correspondence[..., 0], plain.correspondence[:, ::-1, 0])


def test_the_region_to_paint_is_grey_again_and_nothing_comes_from_global_randomness() -> None:
    # Proves the last step, and that numpy's and Python's global streams are neither read nor moved.
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (Augmentation()(arrays(2), 2) for _ in range(2))
    assert (first.agnostic[first.inpaint_mask] == 128).all()
    np.testing.assert_array_equal(first.person, second.person)
    np.testing.assert_array_equal(first.correspondence, second.correspondence)
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_scaling_keeps_proportions_and_limits() -> None:
    # Proves the authors' ranges: one scale in 0.8..1.2 for both axes, shifts of at most a fifth (plus centring).
    augment, plain = Augmentation(), arrays(0)
    found = [augment._person(plain, number)[1] for number in range(40)]
    matrices = [applied["matrix"] for applied in found if applied is not None]
    for matrix in matrices:
        assert matrix[0, 0] == pytest.approx(matrix[1, 1])
        assert 0.8 <= matrix[0, 0] <= 1.2
        center = np.array([(SIZE.width - 1) / 2, (SIZE.height - 1) / 2, 1.0])
        shift = np.abs((matrix @ center - center)[:2]) / (SIZE.width, SIZE.height)
        assert (shift <= 0.2 + 0.02).all()
    assert len({round(float(matrix[0, 0]), 6) for matrix in matrices}) == len(matrices) > 5
