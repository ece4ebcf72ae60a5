"""The detection bench: which object of an image counts, and what is wrong with a COCO file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from i2am_train.detection.bench import draw_shapes, first_of_size, make_shapes, read_bench
from i2am_train.errors import DataError
from i2am_train.metrics.boxes import Box
from i2am_train.types import GridSize

IMAGES = 15


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made dataset."""
    return make_shapes(tmp_path_factory.mktemp("coco") / "shapes", IMAGES)


def file_of(root: Path) -> Path:
    return root / "annotations" / "instances_val2017.json"


@pytest.fixture
def changed(shapes: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """A copy of the dataset whose JSON was changed."""

    def change(how: Callable[[dict[str, Any]], object]) -> Path:
        root = tmp_path / "changed"
        shutil.copytree(shapes, root)
        content = json.loads(file_of(root).read_text())
        how(content)
        file_of(root).write_text(json.dumps(content))
        return root

    return change


def bench(root: Path, **options: Any) -> Any:
    return read_bench(file_of(root), root / "val2017", **options)


def test_the_first_annotation_of_the_wanted_size_counts() -> None:
    """Sizes are those of whole pixels; both ends count; the order in the file decides."""
    image = {"height": 10, "width": 20}

    def chosen(*boxes: list[float], crowd: int = -1, **options: bool) -> int | None:
        entries = [{"bbox": box, "iscrowd": int(i == crowd)} for i, box in enumerate(boxes)]
        found = first_of_size(entries, image, **options)
        return None if found is None else entries.index(found)

    assert chosen([0, 0, 19, 10], [0, 0, 5, 4], [0, 0, 10, 6]) == 1
    assert chosen([0, 0, 10.9, 6.9]) == 0  # 10 x 6 of 200
    assert chosen([0, 0, 4.99, 4.99], [0, 0, 11, 6]) is None  # 16 and 66 of 200
    assert chosen([0, 0, 5, 4], [0, 0, 6, 4], crowd=0) == 0
    assert chosen([0, 0, 5, 4], [0, 0, 6, 4], crowd=0, crowds=False) == 1


def test_the_bench_of_the_made_dataset(shapes: Path) -> None:
    """One sample per image that has one, crowds as asked for, mask and reference from the box."""
    with_crowds, without = bench(shapes), bench(shapes, crowds=False)
    assert with_crowds.images == IMAGES
    assert [s.index for s in with_crowds.samples] == [*range(6), *range(7, 13), 14]
    assert with_crowds.crowds == 3
    assert without.crowds == 0
    assert len(without.samples) == 13
    assert [s.name for s in bench(shapes, limit=2).samples] == ["000000000001", "000000000002"]
    for sample in with_crowds.samples:
        image, mask = sample.image(), sample.mask()
        assert image.shape == (*sample.size, 3)
        assert mask.sum() == sample.box.area == np.prod(sample.reference(image).shape[:2])
        assert 0.1 <= mask.mean() <= 0.3


def test_shapes_fill_their_boxes() -> None:
    """An object differs from the ground in each row and column of its box, and nowhere outside all boxes."""
    picture, objects = draw_shapes(0, 1)
    ground = np.abs(picture.astype(int) - np.median(picture, axis=1, keepdims=True)).sum(-1) > 0
    left, top, width, height = objects[-1]["bbox"]
    inside = ground[top : top + height, left : left + width]
    assert inside.any(axis=0).all()
    assert inside.any(axis=1).all()
    for left, top, width, height in (entry["bbox"] for entry in objects):
        ground[top : top + height, left : left + width] = False
    assert not ground.any()
    assert (draw_shapes(0, 1)[0] == picture).all()
    assert picture.shape[:2] == GridSize(160, 120)


def test_boxes_may_protrude_a_little_and_are_cut(changed: Any) -> None:
    """COCO's own boxes do; the mask stays inside."""

    def widen(content: dict[str, Any]) -> None:
        content["images"] = content["images"][:1]
        box = [-0.9, 0, 161.6, 20.0]
        entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0}
        content["annotations"] = [entry]

    (sample,) = bench(changed(widen)).samples
    assert sample.box == Box(0, 0, 160, 20)


def remove(kind: str, key: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[kind][1].pop(key)


def set_in(kind: str, key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[kind][0].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("annotations"), r"found images, categories, expected .* instances_"),
        (remove("annotations", "bbox"), r"Entry 1 of annotations .* lacks bbox; .* not one of captions"),
        (remove("images", "width"), r"Entry 1 of images .* lacks width"),
        (set_in("images", "id", 2), r"1 ids of images .* come twice \(2\)"),
        (set_in("annotations", "image_id", 99), r"1 annotations .* image_id that is none of its images"),
        (set_in("annotations", "category_id", 9), r"category_id .* none of its categories \(annotations 1\)"),
        (
            set_in("annotations", "bbox", [10, 20, 160, 30]),
            r"1 annotations .* Annotation 1 has \[10, 20, 160, 30\] on an image of width 160 .*converted",
        ),
        (set_in("annotations", "bbox", [10, -9, 20, 30]), r"Annotation 1 has \[10, -9, 20, 30\]"),
        (set_in("annotations", "bbox", [1, 2, -3, 4]), r"Annotation 1 has \[1, 2, -3, 4\]"),
        (set_in("annotations", "bbox", [1, 2, 3]), r"not \[x, y, width, height\]"),
        (set_in("annotations", "bbox", [1, 2, None, 3]), r"not \[x, y, width, height\]"),
        (set_in("images", "file_name", "away.jpg"), r"1 of the bench's 13 .* \(away\.jpg\)\. Unpack"),
        (set_in("images", "width", 161), r"is 120x160 .* the annotations say 120x161"),
        (lambda c: c.update(annotations=[]), r"No annotation .* covers 10% to 30% .* 0 annotations"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(changed: Any, change: Any, message: str) -> None:
    """Each fault by name, with what was expected and what to do."""
    with pytest.raises(DataError, match=message):
        bench(changed(change))


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret.jpg", "a/../../secret.jpg", "..", "", "..\\secret.jpg", "a\\b.jpg", "a\0.jpg"]
)
def test_images_stay_below_their_folder(changed: Any, name: Any) -> None:
    """A downloaded file of annotations does not choose which files of the machine are read."""
    root = changed(lambda content: content["images"][0].update(file_name=name))
    with pytest.raises(DataError, match=r"1 images in .* leads out of the folder of images, or is none"):
        bench(root)


def test_images_may_lie_in_folders_and_behind_links(changed: Any, tmp_path: Path) -> None:
    """Folders below that of the images, and links that the user made."""
    root = changed(lambda content: content["images"][0].update(file_name="part/one.jpg"))
    first = sorted((root / "val2017").iterdir())[0]
    (tmp_path / "disk").mkdir()
    first.rename(tmp_path / "disk" / "one.jpg")
    (root / "val2017" / "part").symlink_to(tmp_path / "disk")
    assert bench(root).samples[0].path.name in ("one.jpg", sorted((root / "val2017").iterdir())[0].name)


def test_a_missing_or_broken_file_is_said(shapes: Path, tmp_path: Path) -> None:
    """Where annotations are looked for, what is no JSON, and a picture that is none."""
    with pytest.raises(DataError, match=r"nowhere.json: No such file.* root=ROOT"):
        read_bench(tmp_path / "nowhere.json", tmp_path)
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"half\.json is no readable JSON .* Download it again"):
        read_bench(tmp_path / "half.json", tmp_path)
    root = tmp_path / "copy"
    shutil.copytree(shapes, root)
    (root / "val2017" / "000000000003.jpg").write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(DataError, match=r"\(000000000003\.jpg\): .* is no picture; expected JPEG"):
        bench(root)
