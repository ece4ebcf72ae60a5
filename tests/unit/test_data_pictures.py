"""Pictures of another aspect: stretched, padded or cropped, with masks and places carried along."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from i2am_train.data.dataset import Reading, TryOnDataset
from i2am_train.data.picture_files import read_mask, write_picture
from i2am_train.data.pictures import fit_mask, fit_picture, window
from i2am_train.data.synthetic import make_dataset
from i2am_train.types import Fit, GridSize, Pairing, Split

SQUARE = GridSize(96, 96)
TALL = GridSize(64, 48)


def disc() -> np.ndarray:
    rows, columns = np.mgrid[:96, :96]
    return (rows - 47.5) ** 2 + (columns - 47.5) ** 2 < 30**2


@pytest.mark.parametrize(("fit", "aspect"), [("stretch", 64 / 48), ("pad", 1.0), ("crop", 1.0)])
def test_a_disc_stays_round_unless_it_is_stretched(fit: Fit, aspect: float) -> None:
    # Proves that pad and crop keep proportions, and that a mask follows its picture.
    mask = fit_mask(disc(), TALL, fit)
    rows, columns = np.nonzero(mask)
    assert mask.shape == tuple(TALL)
    assert np.ptp(rows) / np.ptp(columns) == pytest.approx(aspect, rel=0.06)
    picture = fit_picture(disc()[..., None] * np.full(3, 255, np.uint8), TALL, fit, 0)
    assert ((picture[..., 0] >= 128) == mask).mean() > 0.98


def test_margins_have_the_fill_and_nothing_of_the_picture() -> None:
    # Proves where a padded picture lies: equal margins, above and below for a wide one.
    picture = fit_picture(np.full((96, 96, 3), 7, np.uint8), TALL, "pad", 255)
    assert (picture[:8] == 255).all()
    assert (picture[8:56] == 7).all()
    assert (picture[56:] == 255).all()
    assert not fit_mask(np.ones((96, 96), bool), TALL, "pad")[:8].any()


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
@pytest.mark.parametrize("native", [GridSize(96, 96), GridSize(40, 90), GridSize(90, 40)])
def test_places_move_with_the_picture(fit: Fit, native: GridSize) -> None:
    # Proves the window against the picture itself: a dot lies where its carried place says.
    picture = np.zeros((*native, 3), np.uint8)
    y, x = native.height // 2 + 5, native.width // 2 - 3
    picture[y - 2 : y + 3, x - 2 : x + 3] = 255
    shown = fit_picture(picture, TALL, fit, 0)[..., 0].astype(float)
    rows, columns = np.mgrid[: TALL.height, : TALL.width] + 0.5
    seen = np.array([(shown * rows).sum(), (shown * columns).sum()]) / shown.sum() / TALL
    place = np.array([[(y + 0.5) / native.height, (x + 0.5) / native.width]], np.float32)
    np.testing.assert_allclose(window(native, TALL, fit).carried(place)[0], seen, atol=0.012)


def test_places_outside_a_crop_are_unknown() -> None:
    # Proves that what was cut off has no place.
    carried = window(SQUARE, TALL, "crop").carried(np.array([[0.5, 0.05], [0.5, 0.5]], np.float32))
    assert np.isnan(carried[0]).all()
    np.testing.assert_allclose(carried[1], 0.5)


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_samples_of_another_aspect_keep_their_truth(tmp_path: Path, fit: Fit) -> None:
    # Proves reading as a whole: the garment read at the correspondence has the person's colours.
    make_dataset(tmp_path / "set", 2, 2, SQUARE, 5, workers=1, progress=False)
    sample = TryOnDataset(tmp_path / "set", Split.TRAIN, Pairing.PAIRED, GridSize(128, 96), Reading(fit=fit))[1]
    known = ~sample["correspondence"][..., 0].isnan() & sample["warped_garment_mask"]
    assert known.sum() > 500
    grid = sample["correspondence"].nan_to_num().flip(-1)[None] * 2 - 1
    read = torch.nn.functional.grid_sample(sample["garment"][None], grid, align_corners=False)[0]
    error = (read - sample["person"]).abs().mean(0)[known]
    assert error.median() < 0.2
    shuffled = (read.flip(-1) - sample["person"]).abs().mean(0)[known]
    assert error.median() < 0.6 * shuffled.median()


@pytest.mark.parametrize("name", ["x.png", "x.PNG", "x.webp", "x.bmp", "x.JPG", "x.jpeg"])
def test_pictures_are_written_in_the_kind_of_their_name(tmp_path: Path, name: str) -> None:
    # Proves that a file which ends otherwise than most can be made anew in its place.
    write_picture(tmp_path / name, disc())
    assert (read_mask(tmp_path / name) == disc()).all()
    with Image.open(tmp_path / name) as opened:
        assert opened.format == {"j": "JPEG", "p": "PNG", "w": "WEBP", "b": "BMP"}[name[2].lower()]


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    # Proves the round trip of masks, and the message where nothing can be written.
    write_picture(tmp_path / "a" / "mask.png", disc())
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "a/mask.png"), 0), disc() * 255)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mask.png"]
    with pytest.raises(NotADirectoryError, match=r"mask\.png"):
        write_picture(tmp_path / "a" / "mask.png" / "mask.png", disc())
