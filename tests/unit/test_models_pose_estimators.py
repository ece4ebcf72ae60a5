"""The pose estimator: transformers' ViTPose, here a small random one and hand-made heat maps."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import VitPoseImageProcessor

from i2am_train.errors import CheckpointError
from i2am_train.models.pose_estimators import COCO_17, ViTPoseEstimator
from tests.support.person_models import tiny_pose_estimator


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
