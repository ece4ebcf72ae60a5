"""Human parser and pose estimator: a small random SegFormer and ViTPose, and hand-made heat maps."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import VitPoseImageProcessor

from i2am_train.data.parsing import DRESS_CODE, VITON_HD
from i2am_train.errors import CheckpointError
from i2am_train.models.annotators import COCO_17, HumanParser, ViTPoseEstimator
from tests.support.person_models import ATR, LIP, tiny_parser, tiny_pose_estimator


def photographs() -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((96, 72), (50, 64))]


def test_maps_are_the_models_own_in_our_labels(tmp_path: Path) -> None:
    # Proves sizes, and every pixel against transformers' own post-processing.
    parser = HumanParser.from_pretrained(str(tiny_parser(tmp_path / "atr", ATR)), "cpu")
    maps = parser(photographs(), DRESS_CODE)
    assert [labels.shape for labels in maps] == [(96, 72), (50, 64)]
    inputs = parser.processor(images=photographs(), return_tensors="pt")
    with torch.no_grad():
        outputs = parser.model(**inputs)
    expected = parser.processor.post_process_semantic_segmentation(outputs, target_sizes=[(96, 72), (50, 64)])
    for ours, theirs in zip(maps, expected, strict=True):
        assert len(np.unique(ours)) > 1
        np.testing.assert_array_equal(ours, theirs.numpy())  # ATR's order is DressCode's
    assert parser([], DRESS_CODE) == []


@pytest.mark.parametrize(
    ("labels", "label", "wanted"),
    [
        (ATR, "Left-arm", {VITON_HD: "left_arm", DRESS_CODE: "left_arm"}),
        (ATR, "Belt", {VITON_HD: "pants", DRESS_CODE: "belt"}),
        (ATR, "Bag", {VITON_HD: "background", DRESS_CODE: "bag"}),
        (LIP, "Jumpsuits", {VITON_HD: "dress", DRESS_CODE: "dress"}),
        (LIP, "Coat", {VITON_HD: "coat", DRESS_CODE: "upper_clothes"}),
        (LIP, "UpperClothes", {VITON_HD: "upper_clothes", DRESS_CODE: "upper_clothes"}),
    ],
)
def test_labels_are_mapped_by_name(tmp_path: Path, labels: list[str], label: str, wanted: dict[Any, str]) -> None:
    # Proves the table, label sets of both kinds into both of ours.
    parser = HumanParser.from_pretrained(str(tiny_parser(tmp_path / "model", labels, labels.index(label))))
    for names, ours in wanted.items():
        for values in parser(photographs(), names):
            assert names.found(values) == ours


def test_models_of_other_things_are_refused(tmp_path: Path) -> None:
    # Proves that a model of streets or rooms is not taken for a human parser, and the message on a missing one.
    folder = tiny_parser(tmp_path / "streets", ["road", "car", "Hat"])
    with pytest.raises(CheckpointError, match=r"labels that are not known: road, car; expected .*upper_clothes"):
        HumanParser.from_pretrained(str(folder))
    with pytest.raises(CheckpointError, match=r"could be loaded from parser=.*nowhere.*preprocessor_config\.json"):
        HumanParser.from_pretrained(str(tmp_path / "nowhere"))


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (256, 192, 3), np.uint8)


def test_a_model_from_a_folder_finds_joints(tmp_path: Path) -> None:
    # Proves loading and the real forward pass: one set of joints per photograph, a wrong number of joints refused.
    estimator = ViTPoseEstimator.from_pretrained(str(tiny_pose_estimator(tmp_path / "pose")), "cpu")
    found = estimator([picture(), picture()[:128]], [(0, 0, 192, 256), (20, 10, 60, 90)])
    assert len(found) == 2
    assert estimator([], []) == []
    with pytest.raises(CheckpointError, match=r"finds 5 joints; expected COCO's 17"):
        ViTPoseEstimator.from_pretrained(str(tiny_pose_estimator(tmp_path / "hand", 5)))
    with pytest.raises(CheckpointError, match=r"could be loaded from estimator=.*nowhere"):
        ViTPoseEstimator.from_pretrained(str(tmp_path / "nowhere"))


def test_peaks_of_heat_maps_are_places_in_the_photograph(tmp_path: Path) -> None:
    # Proves coordinates and names: boxes are enlarged by 1.25, unsure joints are left out, the neck is added.
    maps = torch.zeros(1, 17, 64, 48)
    peaks = {"nose": (32, 24), "left_shoulder": (40, 34), "right_shoulder": (40, 14)}
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(48), indexing="ij")
    for name, (y, x) in peaks.items():
        distance = (rows - y) ** 2 + (columns - x) ** 2
        maps[0, COCO_17.index(name)] = torch.exp(-distance / 8)
    maps[0, COCO_17.index("left_wrist"), 50, 40] = 0.1

    class Model:
        config = SimpleNamespace(num_labels=17)
        device = torch.device("cpu")

        def eval(self) -> "Model":
            return self

        def __call__(self, pixel_values: torch.Tensor) -> Any:
            assert pixel_values.shape == (1, 3, 256, 192)
            return SimpleNamespace(heatmaps=maps)

    estimator = ViTPoseEstimator(Model(), VitPoseImageProcessor(), "by hand")
    (joints,) = estimator([picture()], [(0, 0, 192, 256)])
    assert set(joints) == {*peaks, "neck"}
    per_cell = 1.25 * 256 / 64
    np.testing.assert_allclose(joints["nose"], [96, 128], atol=per_cell)
    np.testing.assert_allclose(joints["left_shoulder"] - joints["nose"], [10 * per_cell, 8 * per_cell], atol=1.5)
    np.testing.assert_allclose(joints["neck"], (joints["left_shoulder"] + joints["right_shoulder"]) / 2)
