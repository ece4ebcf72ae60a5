"""DressCode's layout: lists, names, label maps and part labels as its authors distribute them."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from i2am_train.config.data import DataConfig, DataDeriveConfig
from i2am_train.config.store import compose
from i2am_train.data.dataset import Reading, TryOnDataset, detect_layout, split_layouts
from i2am_train.data.dataset_report import check_dataset
from i2am_train.data.derivation import derive_dataset
from i2am_train.data.layouts import VitonHDLayout
from i2am_train.data.module import TryOnDataModule
from i2am_train.data.parsing import DRESS_CODE, VITON_HD
from i2am_train.data.poses import densepose_picture, drawn_parts
from i2am_train.data.synthetic.rendering import render_annotations, render_sample
from i2am_train.doors import VARIABLE
from i2am_train.errors import ConfigError, DataError
from i2am_train.types import CATEGORIES, GridSize, Pairing, Role, Split
from i2am_train.workflows import data as data_workflow

SIZE = GridSize(128, 96)
GARMENT_LABEL = {"upper_body": "upper_clothes", "lower_body": "skirt", "dresses": "dress"}
TABLE = np.array([DRESS_CODE.names.index(n if n in DRESS_CODE.names else "face") for n in VITON_HD.names], np.uint8)


def write_person(folder: Path, number: int, garment_label: str) -> None:
    """One person and garment with the annotations that DressCode has."""
    drawn, (labels, joints) = (render_sample(0, number, SIZE), render_annotations(0, number, SIZE))
    name = f"{number:06d}"
    for suffix, picture in (("0", drawn.person), ("1", drawn.garment)):
        cv2.imwrite(str(folder / f"images/{name}_{suffix}.jpg"), picture[..., ::-1])
    values = TABLE[labels]
    values[labels == VITON_HD.names.index("upper_clothes")] = DRESS_CODE.names.index(garment_label)
    Image.fromarray(values).save(folder / f"label_maps/{name}_4.png")
    Image.fromarray(drawn_parts(joints, SIZE)).save(folder / f"dense/{name}_5.png")
    (folder / f"dense/{name}_5_uv.npz").write_bytes(b"not read")
    rows = []
    for joint in ("nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow",
                  "left_wrist", "right_hip", "right_knee", "right_ankle", "left_hip", *["-"] * 6):  # fmt: skip
        x, y = joints.get(joint, np.array([-1.0, -1.0])) * [384 / SIZE.width, 512 / SIZE.height]
        rows.append([float(x), float(y), 0.9, 1.0])
    (folder / f"keypoints/{name}_2.json").write_text(json.dumps({"keypoints": rows}))


def write_category(root: Path, category: str, first: int) -> None:
    folder = root / category
    for name in ("images", "label_maps", "dense", "keypoints", "skeletons"):
        (folder / name).mkdir(parents=True)
    numbers = list(range(first, first + 5))
    for number in numbers:
        write_person(folder, number, GARMENT_LABEL[category])
    train, test = numbers[:3], numbers[3:]
    lists = {
        "train_pairs": [(n, n) for n in train],
        "test_pairs_paired": [(n, n) for n in test],
        "test_pairs_unpaired": [(test[0], test[1]), (test[1], test[0])],
    }
    for name, pairs in lists.items():
        text = "".join(f"{a:06d}_0.jpg\t{b:06d}_1.jpg\n" for a, b in pairs)
        (folder / f"{name}.txt").write_text(text)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Upper bodies and dresses, as distributed: without masks."""
    root = tmp_path_factory.mktemp("dresscode") / "DressCode"
    write_category(root, "upper_body", 0)
    write_category(root, "dresses", 20)
    return root


@pytest.fixture(scope="module")
def complete(stock: Path) -> Path:
    """The same with derived files (the tests of missing files run on copies of lists alone)."""
    report = derive_dataset(DataDeriveConfig(root=stock, workers=1), progress=False)
    assert report.refused == []
    assert report.pose == dict.fromkeys(
        ("upper_body train", "dresses train", "upper_body test", "dresses test"), "keypoints"
    )
    return stock


def test_stock_data_say_how_to_go_on(tmp_path: Path) -> None:
    # Proves the message on a download as it is: what is missing, and the command that makes it.
    write_category(tmp_path / "set", "upper_body", 0)
    with pytest.raises(
        DataError,
        match=r"upper_body has no folder 'agnostic-v3\.2' .*DressCode does not distribute it; 'i2am data derive",
    ):
        TryOnDataset(tmp_path / "set", Split.TRAIN, Pairing.PAIRED, SIZE, Reading(categories=("upper_body",)))
    codes = {(f.code, f.folder) for f in check_dataset(tmp_path / "set", progress=False).findings}
    assert codes == {
        ("missing_folder", name) for name in ("agnostic-v3.2", "agnostic-mask", "cloth-mask", "gt_cloth_warped_mask")
    }


def test_derived_data_are_read(complete: Path) -> None:
    # Proves names, own masks, coloured part labels and the rule on small masks that does not apply here.
    data = TryOnDataset(complete, Split.TRAIN, Pairing.PAIRED, SIZE, Reading(categories=("upper_body", "dresses")))
    assert len(data) == 6
    assert [sample["name"] for sample in data] == [f"{n:06d}_0" for n in (0, 1, 2, 20, 21, 22)]
    sample = data[3]
    drawn = render_sample(0, 20, SIZE)
    assert sample["garment_name"] == "000020_1"
    assert sample["paired"]
    np.testing.assert_array_equal(sample["warped_garment_mask"], drawn.warped_garment_mask)
    _, joints = render_annotations(0, 20, SIZE)
    shown = ((sample["densepose"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(shown, densepose_picture(drawn_parts(joints, SIZE)))
    assert not sample["inpaint_mask"].all()
    assert not data.small_mask_rule
    assert sample["correspondence"].isnan().all()


def test_each_pairing_has_its_list(complete: Path) -> None:
    # Proves paired and unpaired tests: people follow column 1, garments the list of the pairing.
    paired, unpaired = (
        TryOnDataset(complete, Split.TEST, pairing, SIZE, Reading(categories=("upper_body",))) for pairing in Pairing
    )
    assert [s["garment_name"] for s in paired] == ["000003_1", "000004_1"]
    assert [s["garment_name"] for s in unpaired] == ["000004_1", "000003_1"]
    assert [s["paired"] for s in unpaired] == [False, False]
    assert torch.equal(paired[0]["person"], unpaired[0]["person"])
    assert torch.equal(paired[0]["garment"], unpaired[1]["garment"])
    assert not unpaired[0]["warped_garment_mask"].any()
    assert paired[0]["warped_garment_mask"].any()


def test_a_missing_file_is_said_when_the_dataset_is_opened(complete: Path, tmp_path: Path) -> None:
    # Proves the check in the other layout: people and garments share a folder, each list asks for its own.
    root = Path(shutil.copytree(complete, tmp_path / "set"))
    (root / "upper_body/images/000004_1.jpg").unlink()
    (root / "dresses/agnostic-mask/000024_0_mask.png").unlink()
    (root / "dresses/skeletons").rmdir()
    assert (
        len(TryOnDataset(root, Split.TRAIN, Pairing.PAIRED, SIZE, Reading(categories=("upper_body", "dresses")))) == 6
    )
    for category, match in (
        ("upper_body", r"test_pairs_unpaired\.txt asks for: 1 of 2 in images \(000004_1\.jpg\)\. Copy"),
        ("dresses", r"1 of 2 in agnostic-mask \(000024_0_mask\.png\)\..*'i2am data derive root="),
    ):
        with pytest.raises(DataError, match=rf"set/{category} lacks files .*{match}"):
            TryOnDataset(root, Split.TEST, Pairing.UNPAIRED, SIZE, Reading(categories=(category,)))


def test_categories_are_chosen_and_found(complete: Path) -> None:
    # Proves the filter, auto's rule, and that both are said by name when they cannot be met.
    assert detect_layout(complete) == "dresscode"
    data = DataConfig(height=SIZE.height, width=SIZE.width, batch_size=2, workers=0)
    module = TryOnDataModule(data, complete)
    assert sorted(name for batch in module.train_dataloader() for name in batch["name"]) == [
        f"{n:06d}_0" for n in (0, 1, 2, 20, 21, 22)
    ]
    some = TryOnDataModule(replace(data, categories=["dresses"]), complete)
    assert {name[:5] for name in next(iter(some.test_dataloader()))["name"]} == {"00002"}
    with pytest.raises(DataError, match=r"no folder lower_body .*data\.categories=\[upper_body,dresses\]"):
        TryOnDataset(complete, Split.TRAIN, Pairing.PAIRED, SIZE, Reading(categories=CATEGORIES))
    with pytest.raises(DataError, match=r"one category of DressCode.*data\.categories=\[dresses\]"):
        detect_layout(complete / "dresses")


def test_categories_need_dresscode(small_dataset: Path) -> None:
    # Proves that a filter is never ignored.
    with pytest.raises(DataError, match=r"categories=\['dresses'\] belongs to DressCode"):
        TryOnDataset(small_dataset, Split.TRAIN, Pairing.PAIRED, SIZE, Reading(categories=("dresses",)))


def test_the_check_knows_the_layout(complete: Path) -> None:
    # Proves that a derived DressCode has no findings: shared folders are no left-overs, UV maps no pictures.
    report = check_dataset(complete, SIZE, progress=False)
    assert report.findings == []
    assert report.samples == {
        "upper_body train": 3, "dresses train": 3, "upper_body test": 2, "dresses test": 2,
    }  # fmt: skip
    one = check_dataset(complete, reading=Reading(categories=("dresses",)), progress=False)
    assert list(one.samples) == ["dresses train", "dresses test"]
    assert not check_dataset(complete, reading=Reading(categories=("lower_body",)), progress=False).ok


def test_foreign_lists_are_refused(stock: Path, tmp_path: Path) -> None:
    # Proves that names of another dataset are not taken for DressCode's.
    folder = tmp_path / "set" / "dresses"
    folder.mkdir(parents=True)
    (folder / "train_pairs.txt").write_text("00017_00.jpg 00017_00.jpg\n")
    with pytest.raises(DataError, match=r"train_pairs\.txt names '00017_00'.*expected a person NNNNNN_0\.jpg"):
        TryOnDataset(tmp_path / "set", Split.TRAIN, Pairing.PAIRED, SIZE, Reading(categories=("dresses",)))


def test_labels_of_another_set_are_said(complete: Path) -> None:
    # Proves that a map with VITON-HD's labels in DressCode's place is refused with the way out.
    file = complete / "dresses/label_maps/000021_4.png"
    before = file.read_bytes()
    Image.fromarray(np.full(SIZE, 19, np.uint8)).save(file)
    report = derive_dataset(DataDeriveConfig(root=complete, categories=["dresses"], overwrite=True), progress=False)
    file.write_bytes(before)
    assert [one.name for one in report.refused] == ["000021_0"]
    assert "unknown labels 19; expected 0...17" in report.refused[0].reason
    assert "labels=viton_hd" in report.refused[0].reason


WEAR = """
from i2am_train.data.layouts import Place, VitonHDLayout
from i2am_train.types import Role

class Wear(VitonHDLayout):
    places = VitonHDLayout.places | {Role.PERSON: (Place("persons", "{}.jpg"),)}
    @property
    def folder(self): return self.root
    def list_file(self, pairing): return self.root / "list.txt"
"""
PERSON_PLACE = '(Place("persons", "{}.jpg"),)'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    @property\n", "", r"folder is a method; expected a pathlib\.Path\. Write @property above it\."),
        ("return self.root\n", "return str(self.root)\n", r"folder is a str; expected a pathlib\.Path\. Write Path\("),
        ("return self.root\n", "return self.rot\n", "folder cannot be made: AttributeError: .* no attribute 'rot'"),
        ('self.root / "list.txt"', '["list.txt"]', r"list_file\(Pairing\.PAIRED\) is a list; expected a pathlib\.Path"),
        ("(self, pairing)", "(self)", r"list_file\(Pairing\.PAIRED\) cannot be made: TypeError: .* takes 1 positional"),
        (
            PERSON_PLACE,
            '"persons/{}.jpg"',
            r"has places\[Role\.PERSON\] = 'persons/\{\}\.jpg', which must be a tuple of",
        ),
        (
            PERSON_PLACE,
            PERSON_PLACE[1:-2],
            r"= Place\(folder='persons', pattern='\{\}\.jpg'\), which must be a tuple of",
        ),
        (PERSON_PLACE, "()", r"= \(\), which must be a tuple of Place"),
        (
            "{}.jpg",
            "anna.jpg",
            r"pattern='anna\.jpg'\),\), which must be a tuple of Place, each with one \{\} for the name",
        ),
        ("Role.PERSON:", "'person':", r"has places\['person'\], which must be one of Role\.PERSON, Role\.GARMENT,"),
        ("VitonHDLayout.places | ", "", r"lacks places\[Role\.GARMENT\], "),
        (
            "= VitonHDLayout.places",
            "= property(lambda self: {}) and None #",
            r"has a NoneType places, which must be a map",
        ),
        (
            "    def list_file",
            "    own_garment = 'x'\n    def list_file",
            "own_garment cannot be called: it is of type str",
        ),
    ],
)
def test_a_layout_of_ones_own_is_tried(
    old: str, new: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it gives is looked at when it is named, and the message says what to write."""
    assert old in WEAR
    (tmp_path / "of_a_stylist.py").write_text(WEAR.replace(old, new))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "of_a_stylist", raising=False)
    monkeypatch.setenv(VARIABLE, "of_a_stylist")
    with pytest.raises(ConfigError, match=rf"^data\.layout=of_a_stylist:Wear.*{message}"):
        split_layouts(tmp_path, Split.TRAIN, Reading("of_a_stylist:Wear"))


def test_the_check_says_where_files_of_ones_own_layout_were_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path, and a remedy that names the layout; the list's message does not send back to the check."""
    (tmp_path / "of_a_stylist.py").write_text(WEAR)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "of_a_stylist", raising=False)
    monkeypatch.setenv(VARIABLE, "of_a_stylist")
    reading = Reading("of_a_stylist:Wear")
    listless = check_dataset(tmp_path, reading=reading, progress=False).table()
    assert f"{tmp_path} has no pair list list.txt" in listless
    assert "Put it there, or change list_file of layout=of_a_stylist:Wear" in listless
    (tmp_path / "list.txt").write_text("a.jpg a.jpg\n")
    table = check_dataset(tmp_path, reading=reading, progress=False).table()
    assert f"is missing: there is no folder {tmp_path / 'persons'}. Put it there, or let `places` and" in table
    with pytest.raises(DataError, match=rf"`i2am data check root={tmp_path} layout=of_a_stylist:Wear` for everything"):
        TryOnDataset(tmp_path, Split.TRAIN, Pairing.PAIRED, SIZE, reading=reading)


def test_a_broken_picture_of_ones_own_layout_is_said_with_the_command_for_all(
    tmp_path: Path, small_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root and layout as the user gave them, whatever folders the layout has; and `i2am data` has no data.layout."""
    root = tmp_path / "my set"
    shutil.copytree(small_dataset / "train", root)
    (root / "image").rename(root / "persons")
    (root / "list.txt").write_text("00003_00.jpg 00003_00.jpg\n")
    (tmp_path / "of_a_stylist.py").write_text(WEAR)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "of_a_stylist", raising=False)
    monkeypatch.setenv(VARIABLE, "of_a_stylist")
    data = TryOnDataset(root, Split.TRAIN, Pairing.PAIRED, SIZE, reading=Reading("of_a_stylist:Wear"))
    assert data[0]["name"] == "00003_00"
    (root / "persons" / "00003_00.jpg").write_text("none")
    for read in (data.__getitem__, data.person_image):
        with pytest.raises(DataError, match=rf"`i2am data check 'root={root}' layout=of_a_stylist:Wear` for") as told:
            read(0)
        assert "is no picture" in str(told.value)
    config = compose("data_check", [f"root={root}", "layout=of_a_stylist:Worn"])
    with pytest.raises(ConfigError, match=r"^layout=of_a_stylist:Worn: of_a_stylist has no 'Worn'"):
        data_workflow.check(config)


def test_a_folder_that_another_thread_makes_meanwhile_keeps_the_usual_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder appears, still empty, between two looks: `i2am data derive` then named some masks otherwise."""
    layout = VitonHDLayout(tmp_path, Split.TEST)
    folder = tmp_path / "test" / "agnostic-mask"
    looked, is_dir = [], Path.is_dir

    def made_after_two_looks(path: Path) -> bool:
        found = is_dir(path)
        if path == folder:
            looked.append(found)
            if len(looked) == 2:
                folder.mkdir(parents=True)
        return found

    monkeypatch.setattr(Path, "is_dir", made_after_two_looks)
    names = [layout.path(Role.INPAINT_MASK, "00017_00").name for _ in range(3)]
    assert (names, any(looked)) == (["00017_00_mask.png"] * 3, True)
