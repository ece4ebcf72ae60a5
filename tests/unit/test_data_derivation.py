"""Deriving a dataset: on drawn people whose true masks are known, and with every kind of bad input."""

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
from i2am_train.data.agnostic import Pose, person_masks
from i2am_train.data.dataset import TryOnDataset
from i2am_train.data.dataset_report import check_dataset
from i2am_train.data.derivation import DeriveReport, derive_dataset
from i2am_train.data.flat_garments import garment_mask
from i2am_train.data.parsing import DRESS_CODE, VITON_HD, read_labels, write_labels
from i2am_train.data.picture_files import read_mask
from i2am_train.data.poses import Joints, densepose_picture, drawn_parts, openpose_json, read_keypoints
from i2am_train.data.synthetic import make_dataset
from i2am_train.data.synthetic.rendering import render_annotations, render_sample
from i2am_train.errors import DataError
from i2am_train.types import GridSize, Pairing, Split

SIZE = GridSize(128, 96)
DERIVED = ("agnostic-mask", "agnostic-v3.2", "gt_cloth_warped_mask", "cloth-mask")
STRIPPED = (*DERIVED, "image-densepose", "correspondence")


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union."""
    return float((first & second).sum() / (first | second).sum())


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six drawn samples with everything."""
    root = tmp_path_factory.mktemp("truth") / "set"
    make_dataset(root, 4, 2, SIZE, 3, annotations=True, workers=1, progress=False)
    return root


@pytest.fixture
def photographs(truth: Path, tmp_path: Path) -> Path:
    """The same samples as photographs, parsing maps and keypoints."""
    root = Path(shutil.copytree(truth, tmp_path / "photographs"))
    for split in ("train", "test"):
        for folder in STRIPPED:
            shutil.rmtree(root / split / folder)
    return root


def derived(root: Path, **options: object) -> DeriveReport:
    return derive_dataset(DataDeriveConfig(root=root, workers=1, **options), progress=False)  # type: ignore[arg-type]


def poses(index: int) -> dict[str, tuple[Pose, float]]:
    """Each source of a body, with the least mean overlap that its regions must reach."""
    _, joints = render_annotations(0, index, SIZE)
    return {"keypoints": (joints, 0.88), "densepose": (drawn_parts(joints, SIZE), 0.86), "none": (None, 0.80)}


@pytest.mark.parametrize("source", ["keypoints", "densepose", "none"])
def test_regions_are_near_the_generators_own(source: str) -> None:
    # Proves the quality of derived masks. The regions differ by design: the generator leaves the neck bare.
    found = []
    for index in range(12):
        drawn, (labels, _) = render_sample(0, index, SIZE), render_annotations(0, index, SIZE)
        masks = person_masks(labels, VITON_HD, "upper_body", poses(index)[source][0])
        np.testing.assert_array_equal(masks.worn, drawn.warped_garment_mask)
        assert masks.region[drawn.warped_garment_mask].all()
        found.append(overlap(masks.region, drawn.inpaint_mask))
        face = VITON_HD.inside(labels, {"face"})
        assert not masks.region[face].any()
    print(f"{source}: mean IoU {np.mean(found):.3f}, worst {np.min(found):.3f}")
    assert np.mean(found) > poses(0)[source][1]
    assert np.min(found) > poses(0)[source][1] - 0.12


def test_hands_are_kept_where_the_pose_tells_them() -> None:
    # Proves the rule that a parsing map alone cannot follow: bare arms are painted, hands are not.
    labels, joints = render_annotations(0, 2, GridSize(256, 192))
    arms = VITON_HD.inside(labels, {"left_arm", "right_arm"})
    kept = {
        name: (arms & ~person_masks(labels, VITON_HD, "upper_body", pose).region).sum()
        for name, pose in (("keypoints", joints), ("none", None))
    }
    assert 0.1 < kept["keypoints"] / arms.sum() < 0.5
    assert kept["none"] == 0


def test_the_region_does_not_tell_the_sleeves() -> None:
    # Proves that from keypoints the region is the body's: the share that follows the garment is small.
    differences = []
    for index in range(6):
        labels, joints = render_annotations(0, index, SIZE)
        bare = np.where(labels == VITON_HD.names.index("upper_clothes"), 0, labels).astype(np.uint8)
        bare[60:70, 40:56] = VITON_HD.names.index("upper_clothes")  # a patch of garment is left
        whole, patch = (person_masks(one, VITON_HD, "upper_body", joints).region for one in (labels, bare))
        differences.append(overlap(whole, patch))
    assert np.mean(differences) > 0.85


def test_textured_backgrounds_and_empty_pictures_are_refused() -> None:
    # Proves that no mask is guessed.
    drawn = render_sample(0, 1, SIZE)
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    textured = np.where(drawn.garment_mask[..., None], drawn.garment, noise)
    with pytest.raises(DataError, match="background is not plain"):
        garment_mask(textured)
    with pytest.raises(DataError, match="garment is empty: the mask covers 0%"):
        garment_mask(np.full((*SIZE, 3), 250, np.uint8))


def test_photographs_become_a_dataset(truth: Path, photographs: Path) -> None:
    # Proves the whole: derived files make a dataset that passes the check, is read, and is near the truth.
    report = derived(photographs)
    assert report.refused == []
    assert report.pose == {"train": "keypoints", "test": "keypoints"}
    assert report.made == dict.fromkeys((*DERIVED, "pose-drawn"), 6)
    checked = check_dataset(photographs, SIZE, progress=False)
    assert [f for f in checked.findings if f.level == "error"] == []
    sample = TryOnDataset(photographs, Split.TRAIN, Pairing.PAIRED, SIZE)[1]
    true = TryOnDataset(truth, Split.TRAIN, Pairing.PAIRED, SIZE)[1]
    assert sample["warped_garment_mask"].equal(true["warped_garment_mask"])
    assert overlap(sample["garment_mask"].numpy(), true["garment_mask"].numpy()) > 0.97
    grey = sample["agnostic"][:, sample["inpaint_mask"]]
    assert grey.mean().item() == pytest.approx(128 / 127.5 - 1, abs=0.01)
    assert sample["densepose"].max() > 0.5


def test_a_second_run_keeps_what_is_there(photographs: Path) -> None:
    # Proves resuming: own masks stay, missing files are made, overwrite=true makes all anew.
    derived(photographs)
    own = photographs / "train/agnostic-mask/00001_00_mask.png"
    cv2.imwrite(str(own), np.zeros(SIZE, np.uint8))
    (photographs / "train/agnostic-v3.2/00002_00.jpg").unlink()
    report = derived(photographs)
    assert report.made == {"agnostic-v3.2": 1}
    assert report.kept["agnostic-mask"] == 6
    assert not read_mask(own).any()
    report = derived(photographs, overwrite=True)
    assert report.made["agnostic-mask"] == 6
    assert read_mask(own).any()
    assert not list(photographs.rglob("*.tmp"))


def test_densepose_is_used_where_there_are_no_keypoints(photographs: Path) -> None:
    # Proves pose=auto, that real pose pictures are never replaced, and what is said where there is no pose.
    for split in ("train", "test"):
        folder = photographs / split / "image-densepose"
        folder.mkdir()
        for file in (photographs / split / "openpose_json").iterdir():
            parts = drawn_parts(read_keypoints(file, SIZE), SIZE)
            name = file.name.replace("_keypoints.json", ".jpg")
            picture = densepose_picture(parts)[..., ::-1]
            cv2.imwrite(str(folder / name), picture, [cv2.IMWRITE_JPEG_QUALITY, 97])
        shutil.rmtree(photographs / split / "openpose_json")
    report = derived(photographs)
    assert report.pose == {"train": "densepose", "test": "densepose"}
    assert report.refused == []
    assert not (photographs / "train/pose-drawn").exists()
    shutil.rmtree(photographs / "test/image-densepose")
    with pytest.raises(DataError, match=r"where bodies are is not known\. Nothing was written.*pose=none"):
        derived(photographs)


def test_previews_show_every_step(photographs: Path) -> None:
    # Proves the contact sheets: one per person, eight pictures wide.
    derived(photographs, preview=True)
    sheets = sorted(path.relative_to(photographs).as_posix() for path in photographs.glob("previews/*/*"))
    assert len(sheets) == 6
    assert sheets[-1] == "previews/train/00003_00.jpg"
    sheet = cv2.imread(str(photographs / sheets[0]))
    assert sheet.shape == (320, 8 * 240, 3)
    tiles = np.split(sheet.astype(int), 8, axis=1)
    assert all(np.ptp(tile) > 100 for tile in tiles)


def unknown_label(root: Path) -> None:
    file = root / "train/image-parse-v3/00001_00.png"
    values = np.array(Image.open(file))
    values[:4] = 20
    Image.fromarray(values, mode="L").save(file)


def other_size(root: Path) -> None:
    file = root / "train/image-parse-v3/00001_00.png"
    write_labels(file, np.asarray(Image.open(file))[::2, ::2].copy(), VITON_HD)


def no_garment(root: Path) -> None:
    file = root / "train/image-parse-v3/00001_00.png"
    values = np.array(Image.open(file))
    values[values == VITON_HD.names.index("upper_clothes")] = VITON_HD.names.index("pants")
    write_labels(file, values, VITON_HD)


def no_map(root: Path) -> None:
    (root / "train/image-parse-v3/00001_00.png").unlink()


def blended_colours(root: Path) -> None:
    file = root / "train/image-parse-v3/00001_00.png"
    Image.open(file).convert("RGB").resize((96, 128), Image.Resampling.BILINEAR, (1, 1, 95, 127)).save(file)


def no_keypoints(root: Path) -> None:
    (root / "train/openpose_json/00001_00_keypoints.json").unlink()


def nobody(root: Path) -> None:
    (root / "train/openpose_json/00001_00_keypoints.json").write_text('{"people": []}')


def no_shoulder(root: Path) -> None:
    file = root / "train/openpose_json/00001_00_keypoints.json"
    joints = read_keypoints(file, SIZE)
    del joints["left_shoulder"]
    file.write_text(openpose_json(joints))


def other_format(root: Path) -> None:
    (root / "train/openpose_json/00001_00_keypoints.json").write_text('{"annotations": []}')


def no_photograph(root: Path) -> None:
    file = root / "train/image/00001_00.jpg"
    file.write_bytes(file.read_bytes()[:400])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (unknown_label, r"image-parse-v3/00001_00\.png holds unknown labels 20; expected 0\.\.\.19.*labels=dresscode"),
        (other_size, r"00001_00\.png is 64x48 .*the photograph is 128x96"),
        (no_garment, r"garment is empty: no pixel is coat or dress or upper_clothes \(found: background.*pants"),
        (no_map, r"00001_00\.png is missing: a parsing map is needed"),
        (blended_colours, r"00001_00\.png holds the colour .* none of VITON-HD's"),
        (no_keypoints, r"00001_00_keypoints\.json is missing"),
        (nobody, "shows nobody"),
        (no_shoulder, r"keypoints are missing: left_shoulder \(seen: nose"),
        (other_format, "is in another format"),
        (no_photograph, "is cut off"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name_and_stops_nothing(
    photographs: Path, damage: Callable[[Path], None], reason: str
) -> None:
    # Proves that one bad sample is reported with its reason, and that the others are made.
    damage(photographs)
    report = derived(photographs)
    assert [(one.part, one.name) for one in report.refused] == [("train", "00001_00")]
    assert re.search(reason, report.refused[0].reason), report.refused[0]
    assert report.made["agnostic-mask"] == 5
    assert not (photographs / "train/agnostic-mask/00001_00_mask.png").exists()
    assert json.loads(json.dumps(report.to_dict()))["refused"][0]["name"] == "00001_00"


def test_missing_folders_are_said_before_anything_is_written(photographs: Path) -> None:
    # Proves the check at the start.
    shutil.rmtree(photographs / "test/image-parse-v3")
    with pytest.raises(DataError, match=r"no folder 'image-parse-v3'.*Nothing was written.*parser="):
        derived(photographs)
    assert not (photographs / "train/cloth-mask").exists()


def test_a_parser_makes_missing_maps(photographs: Path) -> None:
    # Proves that maps are made where they are missing, at the photographs' sizes, and kept where they exist.
    maps = {
        split: {file.stem: read_labels(file, VITON_HD) for file in (photographs / split / "image-parse-v3").iterdir()}
        for split in ("train", "test")
    }  # fmt: skip
    kept = photographs / "train/image-parse-v3/00003_00.png"
    for file in [*photographs.glob("*/image-parse-v3/*.png")]:
        if file != kept:
            file.unlink()
    before = kept.read_bytes()
    asked: list[tuple[int, ...]] = []
    answers = [*(maps["train"][f"0000{n}_00"] for n in range(3)), *maps["test"].values()]

    def parser(pictures: list[np.ndarray], labels: object) -> list[np.ndarray]:
        asked.extend(picture.shape for picture in pictures)
        assert labels is VITON_HD
        return [answers.pop(0) for _ in pictures]

    config = DataDeriveConfig(root=photographs, workers=1)
    report = derive_dataset(config, parser, progress=False)  # type: ignore[arg-type]
    assert asked == [(128, 96, 3)] * 5
    assert report.made["image-parse-v3"] == 5
    assert report.kept["image-parse-v3"] == 1
    assert report.refused == []
    assert kept.read_bytes() == before
    restored = read_labels(photographs / "train/image-parse-v3/00001_00.png", VITON_HD)
    np.testing.assert_array_equal(restored, maps["train"]["00001_00"])


def test_an_estimator_makes_missing_keypoints(photographs: Path) -> None:
    # Proves boxes from the parsing maps, files that read back, and that the estimator goes before DensePose.
    files = sorted(photographs.glob("*/openpose_json/*.json"))
    joints = {file.name: read_keypoints(file, SIZE) for file in files}
    order = [*joints][2:] + [*joints][:2]  # training comes first
    for split in ("train", "test"):
        shutil.rmtree(photographs / split / "openpose_json")
    boxes: list[tuple[float, ...]] = []

    def estimator(pictures: list[np.ndarray], around: list[tuple[float, ...]]) -> list[Joints]:
        boxes.extend(around)
        return [joints[order.pop(0)] for _ in pictures]

    config = DataDeriveConfig(root=photographs, workers=1)
    report = derive_dataset(config, None, estimator, progress=False)  # type: ignore[arg-type]
    assert report.pose == {"train": "keypoints", "test": "keypoints"}
    assert (report.made["openpose_json"], report.refused) == (6, [])
    for file in files:
        again = read_keypoints(file, SIZE)
        assert again.keys() == joints[file.name].keys()
        assert all(np.allclose(again[name], place, atol=0.01) for name, place in joints[file.name].items())
    labels = read_labels(photographs / "train/image-parse-v3/00000_00.png", VITON_HD)
    rows, columns = np.nonzero(labels)
    assert boxes[0] == (
        columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1,
    )  # fmt: skip


def test_both_label_sets_agree(tmp_path: Path) -> None:
    # Proves the files of both sets, and that the same person gives the same worn garment in either.
    labels, joints = render_annotations(0, 4, SIZE)
    table = [DRESS_CODE.names.index(name if name in DRESS_CODE.names else "face") for name in VITON_HD.names]
    other = np.asarray(table, np.uint8)[labels]
    for values, names in ((labels, VITON_HD), (other, DRESS_CODE)):
        write_labels(tmp_path / "map.png", values, names)
        np.testing.assert_array_equal(read_labels(tmp_path / "map.png", names), values)
        Image.open(tmp_path / "map.png").convert("RGB").save(tmp_path / "colours.png")
        np.testing.assert_array_equal(read_labels(tmp_path / "colours.png", names), values)
    first, second = (
        person_masks(values, names, "upper_body", joints) for values, names in ((labels, VITON_HD), (other, DRESS_CODE))
    )
    np.testing.assert_array_equal(first.worn, second.worn)
    assert overlap(first.region, second.region) > 0.95


def test_lower_bodies_keep_shoes_arms_and_tops() -> None:
    # Proves the rules of the other categories on a figure drawn from its joints.
    joints = {
        name: np.array(place, np.float64)
        for name, place in {
            "nose": (50, 15), "neck": (50, 30), "right_shoulder": (38, 32), "left_shoulder": (62, 32),
            "right_elbow": (33, 50), "left_elbow": (67, 50), "right_wrist": (30, 68), "left_wrist": (70, 68),
            "right_hip": (43, 70), "left_hip": (57, 70), "right_knee": (42, 95), "left_knee": (58, 95),
            "right_ankle": (42, 118), "left_ankle": (58, 118),
        }.items()
    }  # fmt: skip
    labels = np.zeros((128, 100), np.uint8)
    value = VITON_HD.names.index
    labels[8:24, 44:56] = value("face")
    labels[28:68, 38:62] = value("upper_clothes")
    labels[68:112, 38:48] = labels[68:112, 52:62] = value("pants")
    labels[116:122, 36:48], labels[116:122, 52:64] = value("right_shoe"), value("left_shoe")
    labels[34:80, 28:36], labels[34:80, 64:72] = value("right_arm"), value("left_arm")
    lower = person_masks(labels, VITON_HD, "lower_body", joints).region
    shoes, arms = VITON_HD.inside(labels, {"left_shoe", "right_shoe"}), labels == value("right_arm")
    assert lower[70:110, 40:60].all()  # a skirt could be between the legs
    assert not lower[shoes | arms].any()
    assert not lower[:56].any()
    dress = np.where(labels == value("upper_clothes"), value("dress"), labels).astype(np.uint8)
    region = person_masks(dress, VITON_HD, "dresses", joints).region
    assert region[32:110, 40:60].all()
    assert region[arms][: arms.sum() // 2].all()
    assert not region[shoes].any()
    with pytest.raises(DataError, match="keypoints are missing: left_hip"):
        person_masks(labels, VITON_HD, "lower_body", {k: v for k, v in joints.items() if k != "left_hip"})


def distributed(root: Path, level: int = 128) -> dict[Path, np.ndarray]:
    """Agnostic pictures by another, wider rule, and no masks: as VITON-HD is distributed. Returns each one's region."""
    regions = {}
    for file in sorted(root.glob("*/image/*.jpg")):
        photograph = np.asarray(Image.open(file).convert("RGB"))
        mask = np.zeros(SIZE, bool)
        mask[28:96, 14:84] = True
        mask[28:44, 40:56] = False
        agnostic = file.parent.parent / "agnostic-v3.2" / file.name
        agnostic.parent.mkdir(exist_ok=True)
        greyed = np.where(mask[..., None], np.uint8(level), photograph)
        Image.fromarray(greyed).save(agnostic, quality=90)
        regions[file.parent.parent / f"agnostic-mask/{file.stem}_mask.png"] = mask
    return regions


def test_masks_are_read_off_agnostic_pictures(photographs: Path) -> None:
    # Proves that a distributed picture gets the mask of its own grey, and is kept.
    regions = distributed(photographs)
    before = (photographs / "train/agnostic-v3.2/00001_00.jpg").read_bytes()
    report = derived(photographs)
    assert report.refused == []
    assert report.kept["agnostic-v3.2"] == report.made["agnostic-mask"] == 6
    assert min(overlap(read_mask(file), mask) for file, mask in regions.items()) > 0.95
    assert (photographs / "train/agnostic-v3.2/00001_00.jpg").read_bytes() == before
    assert check_dataset(photographs, progress=False).findings == []


def test_an_agnostic_picture_is_made_with_the_mask_that_is_there(photographs: Path) -> None:
    # Proves the other direction: another author's mask without its picture.
    regions = distributed(photographs)
    shutil.rmtree(photographs / "train/agnostic-v3.2")
    shutil.rmtree(photographs / "test/agnostic-v3.2")
    for file, mask in regions.items():
        file.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(file), mask.astype(np.uint8) * 255)
    assert derived(photographs).refused == []
    for file, mask in regions.items():
        name = file.name.replace("_mask.png", ".jpg")
        picture = np.asarray(Image.open(file.parent.parent / "agnostic-v3.2" / name)).astype(int)
        grey = (np.abs(picture - 128) <= 10).all(-1)
        assert grey[mask].mean() > 0.95


def coloured_region(picture: np.ndarray, photograph: np.ndarray) -> np.ndarray:
    painted = (np.abs(picture.astype(int) - photograph) > 24).any(-1, keepdims=True)
    return np.where(painted, np.uint8([200, 0, 0]), picture)


def another_person(picture: np.ndarray, photograph: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(picture[:, ::-1])


def unchanged(picture: np.ndarray, photograph: np.ndarray) -> np.ndarray:
    return photograph


def smaller(picture: np.ndarray, photograph: np.ndarray) -> np.ndarray:
    return picture[::2, ::2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (coloured_region, r"\d+% of what differs from the photograph is \((19|20)\d, \d+, \d+\)"),
        (another_person, r"\d+% of what differs from the photograph is"),
        (unchanged, r"it differs from the photograph in 0\.\d% of its pixels"),
        (smaller, r"it is 64x48 \(height x width\), and the photograph is 128x96"),
    ],
)
def test_a_region_that_cannot_be_told_is_refused(
    photographs: Path, change: Callable[[np.ndarray, np.ndarray], np.ndarray], reason: str
) -> None:
    # Proves that no mask by another rule is put beside an agnostic picture.
    distributed(photographs)
    file = photographs / "train/agnostic-v3.2/00001_00.jpg"
    photograph = np.asarray(Image.open(photographs / "train/image/00001_00.jpg"))
    changed = change(np.asarray(Image.open(file)), photograph)
    Image.fromarray(changed).save(file, quality=97)
    report = derived(photographs)
    assert [(one.part, one.name) for one in report.refused] == [("train", "00001_00")]
    assert re.search(f"agnostic-v3.2/00001_00.jpg: {reason}", report.refused[0].reason)
    assert not (photographs / "train/agnostic-mask/00001_00_mask.png").exists()


def test_a_grey_garment_in_a_grey_region_is_refused(photographs: Path) -> None:
    # Proves that the grey is not guessed where the photograph has it, too.
    file = photographs / "train/image/00001_00.jpg"
    picture = np.asarray(Image.open(file)).copy()
    picture[60:128, 8:88] = 128
    Image.fromarray(picture).save(file, quality=97)
    distributed(photographs)
    (refused,) = derived(photographs).refused
    assert "the photograph is as grey as it" in refused.reason
