"""Keypoints of people in photographs, by a ViTPose model of transformers (COCO's 17 joints)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import VitPoseForPoseEstimation

from i2am_train.data.derivation import Box
from i2am_train.data.pictures import Image
from i2am_train.data.poses import Joints
from i2am_train.errors import CheckpointError
from i2am_train.models.human_parsers import load_with_processor

# fmt: off
COCO_17 = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)
# fmt: on
SMALLEST_SCORE = 0.3
"""Joints of a lower score were not seen."""


class ViTPoseEstimator:
    """Finds the joints of one person per photograph.

    Args:
        model: predicts a heat map per joint.
        processor: cuts the model's input out of photographs, and finds joints in heat maps.
        name: of the model, for messages.

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
    def from_pretrained(cls, name: str, device: str = "auto") -> ViTPoseEstimator:
        """An estimator from a folder or from the hub.

        Raises:
            CheckpointError: there is no such model, or it is of another kind.
        """
        return cls(*load_with_processor("estimator", name, VitPoseForPoseEstimation, device), name)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image], boxes: Sequence[Box]) -> list[Joints]:
        """Joints in pixels of each photograph ``[H, W, 3]``, and the neck between the shoulders.

        Args:
            pictures: the photographs.
            boxes: left, top, width and height of the person in each.
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
    scores = person["scores"].cpu().numpy()
    labels = person["labels"].tolist()
    joints = {
        COCO_17[label]: place
        for label, place, score in zip(labels, places, scores, strict=True)
        if score >= SMALLEST_SCORE
    }
    if {"left_shoulder", "right_shoulder"} <= set(joints):
        joints["neck"] = (joints["left_shoulder"] + joints["right_shoulder"]) / 2
    return joints
