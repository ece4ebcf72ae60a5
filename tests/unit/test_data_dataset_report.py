"""The dataset check: each kind of damage is found, named and counted, and a good dataset has no finding."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from i2am_train.data.dataset_report import DatasetReport, check_dataset
from i2am_train.types import GridSize


@pytest.fixture
def copy(small_dataset: Path, tmp_path: Path) -> Path:
    """A dataset to break."""
    return Path(shutil.copytree(small_dataset, tmp_path / "copy"))


def check(root: Path, size: GridSize | None = None) -> DatasetReport:
    return check_dataset(root, size, progress=False)


def test_a_good_dataset_has_no_findings(small_dataset: Path) -> None:
    # Proves that nothing is reported without reason, and what the summary counts.
    report = check(small_dataset, GridSize(64, 48))
    assert report.findings == []
    assert report.ok
    assert report.samples == {"train": 20, "test": 6}
    assert report.files == 26 * 8
    assert "can be used" in report.table()
    assert json.loads(report.to_json())["ok"] is True


def invert(path: Path) -> None:
    cv2.imwrite(str(path), 255 - cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))


def blacken(path: Path) -> None:
    cv2.imwrite(str(path), np.zeros((64, 48), np.uint8))


def whiten(path: Path) -> None:
    cv2.imwrite(str(path), np.full((64, 48), 255, np.uint8))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def shrink(path: Path) -> None:
    cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (24, 32)))


def eight_bits(path: Path) -> None:
    cv2.imwrite(str(path), np.zeros((64, 48, 3), np.uint8))


def text_instead(path: Path) -> None:
    path.write_text("not a picture")


DAMAGE = [
    (invert, "cloth-mask/00004_00.jpg", "inverted_mask", "error"),
    (invert, "agnostic-mask/00004_00_mask.png", "inverted_mask", "error"),
    (invert, "gt_cloth_warped_mask/00004_00.jpg", "inverted_mask", "error"),
    (blacken, "cloth-mask/00004_00.jpg", "empty_mask", "error"),
    (blacken, "agnostic-mask/00004_00_mask.png", "empty_mask", "error"),
    (blacken, "gt_cloth_warped_mask/00004_00.jpg", "empty_mask", "warning"),
    (whiten, "agnostic-mask/00004_00_mask.png", "full_mask", "warning"),
    (cut, "image/00004_00.jpg", "unreadable", "error"),
    (cut, "correspondence/00004_00.png", "unreadable", "error"),
    (text_instead, "image-densepose/00004_00.jpg", "unreadable", "error"),
    (shrink, "image/00004_00.jpg", "wrong_size", "error"),
    (eight_bits, "correspondence/00004_00.png", "wrong_format", "error"),
    (Path.unlink, "agnostic-v3.2/00004_00.jpg", "missing_file", "error"),
]


@pytest.mark.parametrize(("damage", "file", "code", "level"), DAMAGE)
def test_each_kind_of_damage_is_found(
    copy: Path, damage: Callable[[Path], None], file: str, code: str, level: str
) -> None:
    # Proves that the damaged file is named under the right code, and that only it is.
    damage(copy / "train" / file)
    report = check(copy)
    folder, name = file.split("/")
    assert [(f.level, f.code, f.split, f.folder, f.file) for f in report.findings] == [
        (level, code, "train", folder, name)
    ]
    assert report.ok is (level == "warning")
    assert name in report.table()
    assert code in report.table()


def test_missing_folders_and_lists_are_found(copy: Path, tmp_path: Path) -> None:
    # Proves the findings on the layout; the optional folders of the test half are not missed.
    shutil.rmtree(copy / "train/cloth-mask")
    shutil.rmtree(copy / "test/gt_cloth_warped_mask")
    shutil.rmtree(copy / "test/correspondence")
    (copy / "test_pairs.txt").unlink()
    codes = {(f.code, f.split, f.folder) for f in check(copy).findings if f.level == "error"}
    assert codes == {("missing_folder", "train", "cloth-mask"), ("pair_list", "test", "")}
    report = check(tmp_path / "nowhere")
    assert not report.ok
    assert "There is no folder" in report.table()


def test_lists_and_files_must_match(copy: Path) -> None:
    # Proves that a short list, names without files, overlap of the halves and non-unpaired tests are seen.
    lines = (copy / "train_pairs.txt").read_text().splitlines()
    test = (copy / "test_pairs.txt").read_text().splitlines()
    (copy / "train_pairs.txt").write_text("\n".join([*lines[:-1], "99999_00.jpg 99999_00.jpg", lines[0]]))
    own = test[0].split()[0]
    (copy / "test_pairs.txt").write_text("\n".join([*test[1:], f"{own} {own}", lines[0]]))
    codes = {finding.code for finding in check(copy).findings}
    assert {"unpaired_file", "missing_file", "repeated_name", "split_overlap", "not_unpaired"} <= codes


def test_the_size_that_is_asked_for_is_demanded(small_dataset: Path) -> None:
    # Proves the size argument, that the table cuts long lists, and that the JSON report does not.
    report = check(small_dataset, GridSize(128, 96))
    assert len(report.findings) == 26 * 8
    assert not report.ok
    assert "and 12 more" in report.table()
    assert len(json.loads(report.to_json())["findings"]) == 26 * 8


def test_photographs_of_phones_are_compared_upright(copy: Path) -> None:
    # Proves that EXIF's orientation counts in the sizes that are compared: a picture that lies on its side is no fault.
    exif = Image.Exif()
    exif[274] = 6
    for path in (copy / "train/image").iterdir():
        with Image.open(path) as opened:
            stored = opened.transpose(Image.Transpose.ROTATE_90)
        stored.save(path, quality=97, exif=exif)
    report = check(copy)
    assert report.ok
    assert not report.findings


def test_people_of_different_sizes_are_a_warning(copy: Path) -> None:
    # Proves that own photographs may differ from each other, as long as one person's pictures agree.
    for file in copy.glob("train/*/00004_00*"):
        picture = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(file), cv2.resize(picture, (60, 64), interpolation=cv2.INTER_NEAREST))
    report = check(copy)
    assert [(f.level, f.code) for f in report.findings] == [("warning", "mixed_sizes")]
    assert "is 64x60" in report.findings[0].message
    assert "2 people or garments that are not 64x48" in report.findings[0].message
    assert report.ok
