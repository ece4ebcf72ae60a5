"""The human parser: any transformers segmentation model whose labels are known, here a small random SegFormer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from i2am_train.data.parsing import DRESS_CODE, VITON_HD
from i2am_train.errors import CheckpointError
from i2am_train.models.human_parsers import HumanParser
from tests.support.person_models import ATR, LIP, tiny_parser


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
