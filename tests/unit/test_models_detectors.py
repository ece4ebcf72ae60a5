"""Detectors: by name, folder and file, with boxes in the picture's own pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from i2am_train.errors import CheckpointError
from i2am_train.metrics.boxes import Box
from i2am_train.models.detectors import boxes_of_segments, load_detector
from tests.detectors import tiny_maskformer, tiny_yolos

PICTURE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def test_a_detector_of_transformers_finds_its_box_in_pixels(tmp_path: Path) -> None:
    """One that always sees a cup in the same place, in shares of the picture: 0.5 + 0.1 and so on, scaled."""
    folder = tiny_yolos(tmp_path / "yolos", box=(0.5, 0.4, 0.2, 0.3), score=0.8)
    detector = load_detector(str(folder))
    found = detector.detect(PICTURE, 0.5)
    assert found
    for detection in found:
        assert detection.category == "cup"
        assert detection.score == pytest.approx(0.8, abs=1e-4)
        assert np.allclose(detection.box, Box(36, 15, 54, 33), atol=1e-3)
    assert detector.detect(PICTURE, 0.81) == []


def test_a_segmenting_model_gives_boxes(tmp_path: Path) -> None:
    """MaskFormer's segments become boxes inside the picture."""
    detector = load_detector(str(tiny_maskformer(tmp_path / "maskformer")))
    found = detector.detect(PICTURE, 0.0)
    assert found
    for detection in found:
        left, top, right, bottom = detection.box
        assert 0 <= left < right <= 90
        assert 0 <= top < bottom <= 60
        assert detection.category in ("cup", "dog")


def test_the_box_of_a_segment_is_its_extents() -> None:
    """From the first pixel's edge to the last one's; empty segments have no box, and there may be none."""
    masks = torch.zeros(3, 6, 8)
    masks[0, 1:4, 2:7] = 1
    masks[2, 5, 0] = 1
    info = [{"score": 0.9 - i / 10, "label_id": i} for i in range(3)]
    found = boxes_of_segments({"segmentation": masks, "segments_info": info})
    assert found["boxes"].tolist() == [[2, 1, 7, 4], [0, 5, 1, 6]]
    assert found["labels"].tolist() == [0, 2]
    nothing = boxes_of_segments({"segmentation": torch.full((6, 8), -1.0), "segments_info": []})
    assert nothing["boxes"].shape == (0, 4)


def test_a_detector_of_torchvision_from_a_file(tmp_path: Path) -> None:
    """Random weights see something at threshold 0, inside the picture and with COCO's names."""
    import torchvision

    name = "ssdlite320_mobilenet_v3_large"
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    detector = load_detector(f"torchvision:{name}@{tmp_path / 'weights.pth'}")
    found = detector.detect(PICTURE, 0.0)
    assert found
    assert all(0 <= d.box.left <= d.box.right <= 90 and d.box.bottom <= 60 for d in found)
    direct = model.eval()([torch.from_numpy(PICTURE).permute(2, 0, 1) / 255])[0]
    assert np.allclose([d.box for d in found], direct["boxes"].detach(), atol=1e-3)
    assert {d.category for d in found} <= set(detector.categories)  # type: ignore[attr-defined]
    assert detector.categories[1] == "person"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:yolo", r"no detector 'yolo'; it has fasterrcnn_.*maskrcnn_resnet50_fpn"),
        (
            "torchvision:ssdlite320_mobilenet_v3_large@away.pth",
            r"away\.pth gives no weights .*leave out @FILE",
        ),
        ("torchvision:ssdlite320_mobilenet_v3_large", r"could not be had .*@FILE\]"),
        ("nobody/nothing", r"There is no detector 'nobody/nothing' .*hustvl/yolos-tiny"),
    ],
)
def test_what_is_no_detector_is_said(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Misspelled names, missing files, and weights that nobody can fetch here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        load_detector(name)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    """A parser is a segmentation model, too, but finds no objects; weights of another network do not fit."""
    from transformers import SegformerConfig

    SegformerConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"No model for detectors could be loaded"):
        load_detector(str(tmp_path))
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"gives no weights of torchvision's ssd"):
        load_detector(f"torchvision:ssdlite320_mobilenet_v3_large@{tmp_path / 'other.pth'}")
