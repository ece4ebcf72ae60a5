"""Detectors: by name, folder and file, with boxes in the picture's own pixels."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.transforms import v2

from i2am_train.detection.detectors import boxes_of_segments, load_detector, load_detectors
from i2am_train.doors import VARIABLE
from i2am_train.errors import CheckpointError, ConfigError
from i2am_train.metrics.boxes import Box
from i2am_train.types import GridSize
from tests.support.detectors import tiny_maskformer, tiny_rt_detr, tiny_yolos

CPU = torch.device("cpu")
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


@pytest.mark.parametrize("version", [1, 2])
def test_rt_detr_finds_what_its_outputs_say(version: int, tmp_path: Path) -> None:
    """Sigmoid per query and label, as many of the best as there are queries; boxes from shares to pixels."""
    detector = load_detector(str(tiny_rt_detr(tmp_path / "rt_detr", version)))
    pixels = torch.from_numpy(PICTURE).permute(2, 0, 1)[None]
    inputs = v2.functional.resize(pixels, [64, 64], antialias=True) / 255
    with torch.inference_mode():
        outputs = detector.model(inputs)  # type: ignore[attr-defined]
    scores = outputs.logits[0].sigmoid()
    x, y, width, height = (outputs.pred_boxes[0] * torch.tensor([90, 60, 90, 60])).unbind(-1)
    boxes = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1)
    best = scores.flatten().argsort(descending=True, stable=True)[: len(scores)].tolist()
    expected = [(scores.flatten()[one].item(), ("cup", "dog")[one % 2], boxes[one // 2]) for one in best]
    assert {category for _, category, _ in expected} == {"cup", "dog"}
    middle = (expected[0][0] + expected[-1][0]) / 2
    for threshold in (0.5, middle):
        above = [one for one in expected if one[0] > threshold]
        found = detector.detect(PICTURE, threshold)
        assert len(found) == len(above) > 0
        for detection, (score, category, box) in zip(found, above, strict=True):
            assert detection.category == category
            assert detection.score == pytest.approx(score, abs=1e-5)
            assert np.allclose(detection.box, box, atol=1e-3)


def test_a_segmenting_model_gives_boxes(tmp_path: Path) -> None:
    """MaskFormer's best labels per query, scored by class and mask, as boxes in the picture's pixels."""
    detector = load_detector(str(tiny_maskformer(tmp_path / "maskformer")))
    picture = np.zeros((60, 90, 3), np.uint8)
    picture[10:30, 50:80] = 255
    inputs = detector.processor(images=picture, return_tensors="pt")  # type: ignore[attr-defined]
    assert inputs["pixel_mask"].all()  # scaled and not padded: a mask spans the picture
    with torch.inference_mode():
        outputs = detector.model(**inputs)  # type: ignore[attr-defined]
    classes = outputs.class_queries_logits[0].softmax(-1)[:, :2]
    expected = {}
    for one in classes.flatten().argsort(descending=True)[: len(classes)].tolist():
        logits = outputs.masks_queries_logits[0, one // 2]
        rows, columns = np.nonzero((logits > 0).numpy())
        y, x = 60 / logits.shape[0], 90 / logits.shape[1]  # pixels per pixel of the mask
        box = (columns.min() * x, rows.min() * y, (columns.max() + 1) * x, (rows.max() + 1) * y)
        score = classes.flatten()[one] * logits.sigmoid()[logits > 0].mean()
        expected[score.item()] = (("cup", "dog")[one % 2], box)
    found = detector.detect(picture, 0.0)
    assert len(found) == len(expected) == 4
    assert any(one.box.area < 60 * 90 / 2 for one in found)
    for detection in found:
        score = min(expected, key=lambda known: abs(known - detection.score))
        assert detection.score == pytest.approx(score, abs=1e-5)
        assert detection.category == expected[score][0]
        assert np.allclose(detection.box, expected[score][1], atol=1)  # whole pixels


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
        ("torchvision:ssdlite320_mobilenet_v3_large@away.pth", r"away\.pth gives no weights .*leave out @FILE"),
        ("torchvision:ssdlite320_mobilenet_v3_large", r"could not be had .*@FILE\]"),
        ("nobody/nothing", r"There is no detector 'nobody/nothing' .*hustvl/yolos-tiny"),
    ],
)
def test_what_is_no_detector_is_said(name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Misspelled names, missing files, and weights that nobody can fetch here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        load_detector(name)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    """A parser is a segmentation model, too, but finds no objects; weights of another network do not fit."""
    from transformers import EomtConfig, EomtImageProcessor, SegformerConfig

    SegformerConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"No model for detectors could be loaded"):
        load_detector(str(tmp_path))
    for part in (EomtConfig(), EomtImageProcessor()):  # finds segments, none that overlap
        part.save_pretrained(tmp_path / "eomt")
    save_file({"a": torch.zeros(2)}, tmp_path / "eomt" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"EomtConfig.* Model type should be one of"):
        load_detector(str(tmp_path / "eomt"))
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"gives no weights of torchvision's ssd"):
        load_detector(f"torchvision:ssdlite320_mobilenet_v3_large@{tmp_path / 'other.pth'}")


OWN = """
import numpy as np
from i2am_train.detection.detectors import Detection
from i2am_train.metrics.boxes import Box

class Middle:
    def __init__(self, share=0.5):
        self.share = np.float32(share)
    def detect(self, image, threshold):
        return [Detection(box=Box(0, 0, image.shape[1] * self.share, 9), score=0.9, category="cup")]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A detector of the user's own, in a module that is allowed."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "of_a_seer", raising=False)
    monkeypatch.setenv(VARIABLE, "of_a_seer")
    file = tmp_path / "of_a_seer.py"
    file.write_text(OWN)
    return file


def test_ones_own_takes_keywords(own: Path) -> None:
    """They stand in its name, so that two of one class are told apart; what it gives becomes plain numbers."""
    entries = ["of_a_seer:Middle", {"fn": "of_a_seer:Middle", "share": 0.25}]
    detectors = load_detectors(entries, GridSize(64, 48), CPU)
    assert list(detectors) == ["of_a_seer:Middle", "of_a_seer:Middle(share=0.25)"]
    widths = [one.detect(PICTURE, 0.5)[0].box.right for one in detectors.values()]
    assert widths == [45.0, 22.5]
    assert {type(width) for width in widths} == {float}


MOVED = """
    device = "cpu"
    def to(self, device):
        self.device = str(device)
        return self
    def detect(self, image, threshold):
        if self.device != "meta":
            raise RuntimeError(f"works on a card alone, and is on {self.device}")
        return []
"""


@pytest.mark.parametrize("returned", ["self", "None"])
def test_ones_own_is_tried_where_it_will_be_used(own: Path, returned: str) -> None:
    """One that works on one device alone passes there, makes room until it is used, and moves in place if it likes."""
    own.write_text(OWN + MOVED.replace("return self", f"return {returned}"))
    with pytest.raises(ConfigError, match=r"RuntimeError: works on a card alone, and is on cpu"):
        load_detectors(["of_a_seer:Middle"], GridSize(64, 48), CPU)
    (found,) = load_detectors(["of_a_seer:Middle"], GridSize(64, 48), torch.device("meta")).values()
    with pytest.raises(ConfigError, match="and is on cpu"):
        found.detect(PICTURE, 0.5)
    assert found.to(torch.device("meta")).detect(PICTURE, 0.5) == []


def test_ones_own_that_cannot_be_moved_is_said(own: Path) -> None:
    """With its name, and before a pipeline is loaded."""
    own.write_text(OWN + MOVED.replace("str(device)", "no_such_name"))
    with pytest.raises(ConfigError, match=r"^detectors\[0\]=of_a_seer:Middle: to\(cpu\) fails: NameError"):
        load_detectors(["of_a_seer:Middle"], GridSize(64, 48), CPU)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("return [", "return None and [", r"detect returned None\. Expected a class .* list of Detection"),
        ("return [", "return [{'box': 1}] or [", r"detect returned \[\{'box': 1\}\]\. Expected"),
        (
            "image.shape[1]",
            "image.shape[3]",
            "detect fails on a picture of 64x48: IndexError: tuple index out of range",
        ),
        ("score=0.9", "score='high'", "detect fails on a picture of 64x48: ValueError: could not convert string"),
        ("def detect", "def find", r"a Middle has no method detect\. Expected"),
        ("image, threshold", "image", r"detect of a Middle cannot be called with \(image, threshold\)"),
    ],
)
def test_ones_own_is_tried_first(own: Path, old: str, new: str, message: str) -> None:
    """On a picture of the images' size, before a pipeline is loaded."""
    own.write_text(OWN.replace(old, new))
    with pytest.raises(ConfigError, match=rf"^detectors\[0\]=of_a_seer:Middle: {message}"):
        load_detectors(["of_a_seer:Middle"], GridSize(64, 48), CPU)
