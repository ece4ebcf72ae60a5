"""Masks of flat garments: right, or refused by name; never wrong in silence."""

import cv2
import numpy as np
import pytest

from i2am_train.data.flat_garments import garment_mask
from i2am_train.data.synthetic.rendering import render_sample
from i2am_train.errors import DataError
from i2am_train.types import GridSize
from tests.support.flat_drawings import EASY, HARD, SIZE, Flat

RIGHT = 0.9
"""Intersection over union of a mask that is right."""


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union."""
    return float((first & second).sum() / (first | second).sum())


def quality(flat: Flat, size: GridSize = SIZE) -> float | None:
    """Overlap of the mask with the truth; None where it was refused."""
    picture, truth = flat.draw(size)
    try:
        mask = garment_mask(picture)
    except DataError:
        return None
    return overlap(mask, truth)


@pytest.mark.parametrize("name", EASY)
def test_clear_garments_are_never_refused(name: str) -> None:
    # Proves shadows, slopes, noise, stripes, bad JPEG and rooms between sleeve and body.
    found = quality(EASY[name])
    assert found is not None
    assert found > 0.93


def judged(size: GridSize) -> tuple[int, int, dict[str, float]]:
    """How many hard drawings are right and refused, and which are wrong."""
    found = {name: quality(flat, size) for name, flat in HARD.items()}
    wrong = {name: value for name, value in found.items() if value is not None and value < RIGHT}
    refused = sum(value is None for value in found.values())
    return len(found) - refused - len(wrong), refused, wrong


def test_hard_garments_are_right_or_refused() -> None:
    # Proves the judgement on white and near-white garments with bright pieces in their outline.
    right, refused, wrong = judged(SIZE)
    print(f"{len(HARD)} drawings: {right} right, {refused} refused, wrong: {wrong}")
    assert wrong == {}
    assert right >= 34


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bright, gap 0.1", "is a thin line around the background's colour"),
        ("bright, gap 0.02", "has the background's colour and an opening to it"),
        ("bright, no outline", r"something pale, \d+% of the mask's size, lies beside the mask"),
        ("bright stripes", r"places between its parts, \d+% of its size"),
        ("white stripes", "is as pale as what JPEG leaves around an edge"),
        ("dark in a frame", r"\d+% of its outline is hardly darker or brighter"),
    ],
)
def test_refusals_say_what_is_wrong_and_what_to_do(name: str, reason: str) -> None:
    # Proves each rule of the judgement by a drawing that it alone refuses.
    with pytest.raises(DataError, match=f"{reason}.*bring a mask of your own"):
        garment_mask(HARD[name].draw()[0])


@pytest.mark.slow
@pytest.mark.parametrize("size", [GridSize(1024, 768), GridSize(384, 288), GridSize(1600, 1200)])
def test_hard_garments_at_other_sizes(size: GridSize) -> None:
    # Proves that the rules' lengths are those of the picture.
    right, refused, wrong = judged(size)
    print(f"{size}: {right} right, {refused} refused, wrong: {wrong}")
    assert wrong == {}
    assert right >= 28


@pytest.mark.parametrize("size", [GridSize(128, 96), GridSize(256, 192)])
def test_the_embedded_garments_are_all_made(size: GridSize) -> None:
    # Proves that none of the easy ones is refused, and how near their masks are after JPEG.
    found = []
    for index in range(30):
        drawn = render_sample(0, index, size)
        content = cv2.imencode(".jpg", drawn.garment, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        found.append(overlap(garment_mask(cv2.imdecode(content, 1)), drawn.garment_mask))
    print(f"{size}: mean IoU {np.mean(found):.3f}, worst {np.min(found):.3f}")
    assert np.mean(found) > 0.98
    assert np.min(found) > 0.92
