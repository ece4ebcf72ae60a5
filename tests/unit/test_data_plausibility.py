"""What the check finds in pictures: each kind of wrong file by code, level and name, and nothing in good ones."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from i2am_train.config.data import DataDeriveConfig
from i2am_train.data.dataset_report import DatasetReport, check_dataset
from i2am_train.data.derivation import derive_dataset
from i2am_train.data.parsing import DRESS_CODE, VITON_HD, read_labels, write_labels
from i2am_train.data.plausibility import share_of_other_values
from i2am_train.data.poses import densepose_picture, drawn_parts, openpose_json, pose_picture_fault, read_keypoints
from i2am_train.data.synthetic import make_dataset
from i2am_train.data.synthetic.rendering import render_sample
from i2am_train.types import GridSize

SIZE = GridSize(256, 192)
NAME = "00001_00"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn samples with parsing maps and keypoints."""
    root = tmp_path_factory.mktemp("good") / "set"
    return make_dataset(root, 3, 2, SIZE, 0, annotations=True, workers=1, progress=False)


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """Samples to spoil."""
    return Path(shutil.copytree(good, tmp_path / "copy"))


def check(root: Path) -> DatasetReport:
    return check_dataset(root, progress=False)


def test_good_annotations_and_pictures_have_no_findings(good: Path) -> None:
    # Proves that nothing is reported without reason.
    assert check(good).findings == []


# -- damage to one file of train/, by a function of the split's folder ----------------------------------------------


def save(picture: np.ndarray, path: Path) -> None:
    Image.fromarray(picture.astype(np.uint8)).save(path, quality=95)


def load(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def agnostic_as_mask(folder: Path) -> None:
    save(load(folder / f"agnostic-v3.2/{NAME}.jpg"), folder / f"agnostic-mask/{NAME}_mask.png")


def lighter_agnostic_as_mask(folder: Path) -> None:
    picture = load(folder / f"agnostic-v3.2/{NAME}.jpg").copy()
    picture[(np.abs(picture.astype(int) - 128) <= 10).all(-1)] = 192
    save(picture, folder / f"agnostic-mask/{NAME}_mask.png")


def photograph_as_mask(folder: Path) -> None:
    save(load(folder / f"image/{NAME}.jpg"), folder / f"gt_cloth_warped_mask/{NAME}.jpg")


def cut_out_on_white_as_mask(folder: Path) -> None:
    save(load(folder / f"cloth/{NAME}.jpg"), folder / f"cloth-mask/{NAME}.jpg")


def transparent_cut_out_as_mask(folder: Path) -> None:
    mask = np.asarray(Image.open(folder / f"cloth-mask/{NAME}.jpg").convert("L"))
    shown = np.dstack([load(folder / f"cloth/{NAME}.jpg"), mask])
    Image.fromarray(shown).save(folder / f"cloth-mask/{NAME}.png")
    (folder / f"cloth-mask/{NAME}.jpg").unlink()


def mask_of_another_rule(folder: Path) -> None:
    file = folder / f"agnostic-mask/{NAME}_mask.png"
    mask = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(str(file), cv2.dilate(mask, np.ones((25, 25), np.uint8)))


def grey_beyond_the_mask(folder: Path) -> None:
    file = folder / f"agnostic-v3.2/{NAME}.jpg"
    picture = load(file).copy()
    picture[:, :40] = 128
    save(picture, file)


def posed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        save(change(load(folder / f"image/{NAME}.jpg")), folder / f"image-densepose/{NAME}.jpg")

    return damage


def blended_pose(folder: Path) -> None:
    pose = load(folder / f"image-densepose/{NAME}.jpg").astype(float)
    save((pose + load(folder / f"image/{NAME}.jpg")) / 2, folder / f"image-densepose/{NAME}.jpg")


def body_surface_channels(folder: Path) -> None:
    parts = parts_of_keypoints(folder)
    y, x = np.mgrid[: SIZE.height, : SIZE.width]
    surface = np.dstack([parts, x % 64 * 4, y % 64 * 4]) * (parts > 0)[..., None]
    save(surface, folder / f"image-densepose/{NAME}.jpg")


def parts_of_keypoints(folder: Path) -> np.ndarray:
    joints = read_keypoints(folder / f"openpose_json/{NAME}_keypoints.json", SIZE)
    return drawn_parts(joints, SIZE)


MAP = f"image-parse-v3/{NAME}.png"
AS_DRESS_CODE = np.array([DRESS_CODE.names.index(n) if n in DRESS_CODE.names else 11 for n in VITON_HD.names], np.uint8)


def other_labels_in_grey(folder: Path) -> None:
    Image.fromarray(AS_DRESS_CODE[np.asarray(Image.open(folder / MAP))]).save(folder / MAP)


def other_labels_in_their_colours(folder: Path) -> None:
    write_labels(folder / MAP, AS_DRESS_CODE[np.asarray(Image.open(folder / MAP))], DRESS_CODE)


def sorted_palette(folder: Path) -> None:
    shown = Image.open(folder / MAP).convert("RGB")
    shown.quantize(20).save(folder / MAP)


def smaller_map(folder: Path) -> None:
    write_labels(folder / MAP, np.asarray(Image.open(folder / MAP))[::2, ::2].copy(), VITON_HD)


JSON = f"openpose_json/{NAME}_keypoints.json"


def scaled(factor: float | tuple[float, float]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        joints = read_keypoints(folder / JSON, SIZE)
        moved = {name: place * factor for name, place in joints.items()}
        (folder / JSON).write_text(openpose_json(moved))

    return damage


def normalised(folder: Path) -> None:
    content = json.loads((folder / JSON).read_text())
    values = np.array(content["people"][0]["pose_keypoints_2d"]).reshape(-1, 3)
    values /= [SIZE.width, SIZE.height, 1]
    content["people"][0]["pose_keypoints_2d"] = values.ravel().tolist()
    (folder / JSON).write_text(json.dumps(content))


def nobody(folder: Path) -> None:
    (folder / JSON).write_text('{"version": 1.3, "people": []}')


DAMAGE = [
    (agnostic_as_mask, "error", "not_a_mask", "agnostic-mask", "has neither of two values"),
    (lighter_agnostic_as_mask, "error", "not_a_mask", "agnostic-mask", "'i2am data derive'"),
    (photograph_as_mask, "error", "not_a_mask", "gt_cloth_warped_mask", "as a photograph"),
    (cut_out_on_white_as_mask, "error", "not_a_mask", "cloth-mask", "a cut-out"),
    (transparent_cut_out_as_mask, "error", "not_a_mask", "cloth-mask", "a cut-out"),
    (mask_of_another_rule, "warning", "mask_mismatch", "agnostic-mask", r"\d+% of the mask shows the photograph"),
    (grey_beyond_the_mask, "warning", "mask_mismatch", "agnostic-mask", r"\d+% of its grey lies outside"),
    (posed(np.zeros_like), "warning", "not_densepose", "image-densepose", "shows nobody: 100% of it is black"),
    (posed(np.copy), "warning", "not_densepose", "image-densepose", "is not in DensePose's colours"),
    (blended_pose, "warning", "not_densepose", "image-densepose", "expected detectron2's dp_segm"),
    (body_surface_channels, "warning", "not_densepose", "image-densepose", "is none of them|of them"),
    (other_labels_in_grey, "warning", "parsing_map", "image-parse-v3", "only as DressCode's .*labels=dresscode"),
    (other_labels_in_their_colours, "warning", "parsing_map", "image-parse-v3", "its palette is that of other labels"),
    (sorted_palette, "warning", "parsing_map", "image-parse-v3", "in the colour of"),
    (smaller_map, "warning", "parsing_map", "image-parse-v3", "is 128x96 .* photograph is 256x192"),
    (scaled(0.5), "warning", "keypoints", "openpose_json", r"of \d+ joints, the nose, beside the person"),
    (scaled(2.0), "warning", "keypoints", "openpose_json", r"joints outside of the photograph .*another size"),
    (normalised, "warning", "keypoints", "openpose_json", "places from 0 to 1; expected pixels"),
    (nobody, "warning", "keypoints", "openpose_json", "shows nobody: people is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "level", "code", "folder", "message"), DAMAGE)
def test_each_kind_of_wrong_picture_is_found(
    copy: Path, damage: Callable[[Path], None], level: str, code: str, folder: str, message: str
) -> None:
    # Proves that it is named once, with what it is, and that nothing else is.
    damage(copy / "train")
    (found,) = check(copy).findings
    assert (found.level, found.code, found.split, found.folder) == (level, code, "train", folder)
    assert found.file.startswith(NAME)
    assert re.search(message, found.message), found.message


def test_parts_in_densepose_colours_and_labels_are_fine(copy: Path) -> None:
    # Proves that real DensePose pictures, after JPEG and reduction, and label maps are not reported.
    parts = parts_of_keypoints(copy / "train")
    file = copy / f"train/image-densepose/{NAME}.jpg"
    save(densepose_picture(parts), file)
    assert check(copy).findings == []
    large = cv2.resize(densepose_picture(parts), None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
    assert pose_picture_fault(large[::8, ::8]) is None
    assert pose_picture_fault(np.repeat(parts[..., None], 3, axis=-1)) is None


def test_palettes_that_name_nothing_are_read(copy: Path) -> None:
    # Proves that maps in Pascal's colours (SCHP writes them), some of which are the set's at other labels, are fine.
    values = Image.open(copy / "train" / MAP)
    pascal = [
        sum(((label >> 3 * bit + channel) & 1) << 7 - bit for bit in range(8))
        for label in range(256)
        for channel in range(3)
    ]
    assert pascal[6:9] == [0, 128, 0]  # hair; a skirt in VITON-HD's palette
    values.putpalette(pascal)
    values.save(copy / "train" / MAP)
    assert check(copy).findings == []


@pytest.mark.parametrize("grey", [0, 128, 192, 255])
def test_agnostic_pictures_of_any_grey_are_no_masks(grey: int) -> None:
    # Proves that light greys, beside light backgrounds, do not pass as the white of a mask.
    for index in (*range(6), 50000, 50001, 50002, 50003):
        drawn = render_sample(0, index, SIZE)
        picture = np.where(drawn.inpaint_mask[..., None], np.uint8(grey), drawn.person)
        shown = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        assert share_of_other_values(shown[::2, ::2]) > 0.03


@pytest.mark.parametrize("quality", [75, 95])
def test_masks_after_jpeg_have_two_values(quality: int) -> None:
    # Proves the other side of "not a mask", for masks of all kinds, full and empty ones included.
    for index in range(4):
        drawn = render_sample(0, index, GridSize(128, 96))
        masks = (drawn.inpaint_mask, drawn.garment_mask, drawn.warped_garment_mask)
        for mask in (*masks, np.ones((128, 96), bool), np.zeros((128, 96), bool)):
            content = cv2.imencode(".jpg", mask.astype(np.uint8) * 255, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
            assert share_of_other_values(cv2.imdecode(content, 0)) < 0.02


@pytest.mark.parametrize(("half", "other"), [("train", "test"), ("test", "train")])
def test_half_a_dataset_is_checked_and_derived(copy: Path, half: str, other: str) -> None:
    # Proves that an absent half is one warning, and that derive makes what the other half lacks.
    shutil.rmtree(copy / half)
    (copy / f"{half}_pairs.txt").unlink()
    shutil.rmtree(copy / other / "agnostic-mask")
    shutil.rmtree(copy / other / "agnostic-v3.2")
    report = derive_dataset(DataDeriveConfig(root=copy, workers=1), progress=False)
    assert report.refused == []
    assert report.made["agnostic-mask"] > 0
    checked = check(copy)
    assert checked.ok
    (found,) = checked.findings
    assert (found.level, found.code, found.split) == ("warning", "missing_half", half)
    assert list(checked.samples) == [other]


def test_derive_takes_bodies_from_the_embedded_pose_pictures(tmp_path: Path) -> None:
    # Proves pose=densepose on the embedded data (bodies in colours of their own), and data/README's figures at 128x96.
    root = make_dataset(tmp_path / "set", 24, 2, GridSize(128, 96), 0, annotations=True, workers=1, progress=False)
    true = {file: read_mask(file) for file in root.glob("*/agnostic-mask/*")}
    for source, mean in (("keypoints", 0.93), ("densepose", 0.90), ("none", 0.85)):
        for folder in ("agnostic-mask", "agnostic-v3.2"):
            for split in ("train", "test"):
                shutil.rmtree(root / split / folder, ignore_errors=True)
        config = DataDeriveConfig(root=root, pose=source, workers=1)
        assert derive_dataset(config, progress=False).refused == []
        found = [overlap(read_mask(file), mask) for file, mask in true.items()]
        print(f"{source}: mean IoU {np.mean(found):.3f}, worst {np.min(found):.3f}")
        assert np.mean(found) == pytest.approx(mean, abs=0.015)


def read_mask(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("L")) >= 128


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union."""
    return float((first & second).sum() / (first | second).sum())


def test_labels_of_the_other_set_are_not_read(copy: Path) -> None:
    # Proves that derive refuses what the check warns of.
    other_labels_in_grey(copy / "train")
    for folder in ("agnostic-mask", "agnostic-v3.2"):
        shutil.rmtree(copy / "train" / folder)
    report = derive_dataset(DataDeriveConfig(root=copy, workers=1), progress=False)
    assert [one.name for one in report.refused] == [NAME]
    assert "labels=dresscode" in report.refused[0].reason
    assert read_labels(copy / "train" / MAP, DRESS_CODE).max() > 0
