"""Parsing maps and keypoints of people in photographs, by models of transformers.

Parsers are segmentation models with the labels of ATR (segformer_b2_clothes, segformer_b3_clothes), LIP or CIHP, under
the spellings in :data:`_SPELLINGS`. A label that the wanted set lacks becomes the nearest one it has
(:data:`_SUBSTITUTES`). Keypoints are found by ViTPose (COCO's 17 joints).
"""

import re
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForSemanticSegmentation, VitPoseForPoseEstimation

from i2am_train.data.derivation import Box
from i2am_train.data.parsing import DRESS_CODE, VITON_HD, LabelMap, LabelSet
from i2am_train.data.pictures import Image
from i2am_train.data.poses import Joints
from i2am_train.errors import CheckpointError, NotFiniteError
from i2am_train.models.pretrained import load_with_processor
from i2am_train.models.watch import advice

# fmt: off
_SPELLINGS = {
    "unlabelled": "background", "upperclothes": "upper_clothes", "head": "face", "glasses": "sunglasses",
    "gloves": "glove", "trousers": "pants", "sock": "socks", "torso_skin": "neck", "torsoskin": "neck",
    "jumpsuits": "dress", "jumpsuit": "dress", "handbag": "bag",
}
"""Other spellings of our label names; signs and capitals do not count."""
_SUBSTITUTES = {
    "belt": "pants", "bag": "background", "glove": "background", "coat": "upper_clothes", "socks": "background",
    "neck": "face",
}
"""What a label becomes where the wanted set lacks it."""
COCO_17 = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)
# fmt: on
_SMALLEST_SCORE = 0.3
"""Joints of a lower score were not seen."""


class HumanParser:
    """Makes parsing maps by a model that predicts logits ``[batch, labels, h, w]``; ``name`` is for messages.

    Raises:
        CheckpointError: a label of the model is not known.
    """

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model, self.processor, self.name = model.eval(), processor, name
        theirs = [label for _, label in sorted(model.config.id2label.items())]
        self.labels = [ours for label in theirs if (ours := _our_name(label)) is not None]
        if unknown := [label for label in theirs if _our_name(label) is None]:
            known = ", ".join(sorted({*VITON_HD.names, *DRESS_CODE.names}))
            raise CheckpointError(
                f"The parser {name} has labels that are not known: {', '.join(unknown[:8])}"
                f"{' ...' if len(unknown) > 8 else ''}; expected {known}. Use a model of human parsing (ATR, LIP or "
                "CIHP), or make the parsing maps with it yourself."
            )

    @classmethod
    def from_pretrained(cls, name: str, device: str = "auto") -> Self:
        """A parser from a folder or from the hub; errors as of :func:`load_with_processor`."""
        return cls(*load_with_processor("parser", name, AutoModelForSemanticSegmentation, device), name)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image], labels: LabelSet) -> list[LabelMap]:
        """Parsing maps of photographs ``[H, W, 3]``, each at its photograph's size, in the labels of a set."""
        if not pictures:
            return []
        inputs = self.processor(images=list(pictures), return_tensors="pt")
        logits = self.model(pixel_values=inputs["pixel_values"].to(self.model.device)).logits
        if not bool(logits.isfinite().all()):
            raise NotFiniteError(
                f"The parser {self.name} gives values that are NaN or infinite, which no picture can. "
                f"{advice(logits.dtype)}"
            )
        names = [name if name in labels.names else _SUBSTITUTES[name] for name in self.labels]
        table = np.array([labels.names.index(name) for name in names], np.uint8)
        maps = []
        for picture, scores in zip(pictures, logits, strict=True):
            sized = F.interpolate(scores[None].float(), size=picture.shape[:2], mode="bilinear", align_corners=False)
            maps.append(table[sized[0].argmax(dim=0).cpu().numpy()])
        return maps


def _our_name(label: str) -> str | None:
    """Our name of a model's label.

    >>> _our_name("Left-shoe"), _our_name("Upper-clothes"), _our_name("lapel")
    ('left_shoe', 'upper_clothes', None)
    """
    plain = re.sub(r"[^a-z]+", "_", label.lower()).strip("_")
    ours = _SPELLINGS.get(plain, plain)
    return ours if ours in VITON_HD.names or ours in DRESS_CODE.names else None


class ViTPoseEstimator:
    """Finds the joints of one person per photograph by a model that predicts a heat map for each.

    ``processor`` cuts the model's input out of photographs, and finds joints in heat maps; ``name`` is for messages.

    Raises:
        CheckpointError: the model has other joints than COCO's.
    """

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model, self.processor = model.eval(), processor
        if model.config.num_labels != len(COCO_17):
            raise CheckpointError(
                f"The estimator {name} finds {model.config.num_labels} joints; expected COCO's {len(COCO_17)}. Use a "
                "ViTPose model such as usyd-community/vitpose-base-simple, or make OpenPose's JSON yourself."
            )

    @classmethod
    def from_pretrained(cls, name: str, device: str = "auto") -> Self:
        """An estimator from a folder or from the hub; errors as of :func:`load_with_processor`."""
        return cls(*load_with_processor("estimator", name, VitPoseForPoseEstimation, device), name)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image], boxes: Sequence[Box]) -> list[Joints]:
        """Joints in pixels of each photograph ``[H, W, 3]``, and the neck between the shoulders.

        ``boxes`` are left, top, width and height of the person in each, in pixels.
        """
        if not pictures:
            return []
        around = [[list(box)] for box in boxes]
        inputs = self.processor(list(pictures), boxes=around, return_tensors="pt")
        outputs = self.model(pixel_values=inputs["pixel_values"].to(self.model.device))
        found = self.processor.post_process_pose_estimation(outputs, boxes=around)
        return [_joints(people[0]) for people in found]


def _joints(person: dict[str, Any]) -> Joints:
    """Named joints that were seen."""
    places = person["keypoints"].cpu().numpy().astype(np.float64)
    found = zip(person["labels"].tolist(), places, person["scores"].cpu().numpy(), strict=True)
    joints = {COCO_17[label]: place for label, place, score in found if score >= _SMALLEST_SCORE}
    if {"left_shoulder", "right_shoulder"} <= set(joints):
        joints["neck"] = (joints["left_shoulder"] + joints["right_shoulder"]) / 2
    return joints
