"""Human-parsing maps of photographs, by any segmentation model of transformers whose label names are known.

Known are the labels of ATR (segformer_b2_clothes, segformer_b3_clothes), LIP and CIHP, under the spellings in
:data:`SPELLINGS`. A label that the wanted set lacks becomes the nearest one it has (:data:`SUBSTITUTES`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from i2am_train.data.parsing import DRESS_CODE, VITON_HD, LabelMap, LabelSet
from i2am_train.data.pictures import Image
from i2am_train.errors import CheckpointError, NotFiniteError
from i2am_train.models.pretrained import load_model, load_processor
from i2am_train.models.watch import advice

SPELLINGS = {
    "unlabelled": "background", "upperclothes": "upper_clothes", "head": "face", "glasses": "sunglasses",
    "gloves": "glove", "trousers": "pants", "sock": "socks", "torso_skin": "neck", "torsoskin": "neck",
    "jumpsuits": "dress", "jumpsuit": "dress", "handbag": "bag",
}  # fmt: skip
"""Other spellings of our label names; signs and capitals do not count."""

SUBSTITUTES = {
    "belt": "pants", "bag": "background", "glove": "background", "coat": "upper_clothes", "socks": "background",
    "neck": "face",
}  # fmt: skip
"""What a label becomes where the wanted set lacks it."""


class HumanParser:
    """Makes parsing maps.

    Args:
        model: predicts logits ``[batch, labels, h, w]``.
        processor: makes the model's input from photographs.
        name: of the model, for messages.

    Raises:
        CheckpointError: a label of the model is not known.
    """

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model, self.processor, self.name = model.eval(), processor, name
        self.labels = [_our_name(label) for _, label in sorted(model.config.id2label.items())]
        unknown = [
            label for label, ours in zip(model.config.id2label.values(), self.labels, strict=True) if ours is None
        ]
        if unknown:
            known = ", ".join(sorted({*VITON_HD.names, *DRESS_CODE.names}))
            raise CheckpointError(
                f"The parser {name} has labels that are not known: {', '.join(unknown[:8])}"
                f"{' ...' if len(unknown) > 8 else ''}; expected {known}. Use a model of human parsing (ATR, LIP or "
                "CIHP), or make the parsing maps with it yourself."
            )

    @classmethod
    def from_pretrained(cls, name: str, device: str = "auto") -> HumanParser:
        """A parser from a folder or from the hub.

        Raises:
            CheckpointError: there is no such model, or it is of another kind.
        """
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
        table = np.array([_value(name, labels) for name in self.labels], np.uint8)
        maps = []
        for picture, scores in zip(pictures, logits, strict=True):
            sized = F.interpolate(scores[None].float(), size=picture.shape[:2], mode="bilinear", align_corners=False)
            maps.append(table[sized[0].argmax(dim=0).cpu().numpy()])
        return maps


def load_with_processor(option: str, name: str, kind: Any, device: str) -> tuple[Any, Any]:
    """A model of transformers and its image processor, from a folder or from the hub.

    Args:
        option: that named the model, for messages.
        name: folder or hub name.
        kind: transformers' class to load.
        device: cpu, cuda or auto.

    Raises:
        CheckpointError: there is no such model, or it is of another kind.
    """
    try:
        processor = load_processor(AutoImageProcessor, name)
        model = load_model(kind, name)
    except CheckpointError as error:
        what = " ".join(str(error).split())[:400]
        raise CheckpointError(
            f"No model for {option} could be loaded from {option}={name} ({what}). Give a folder with config.json, "
            "preprocessor_config.json and the weights, or a name on the hub that this machine can reach."
        ) from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), processor


def _our_name(label: str) -> str | None:
    """Our name of a model's label.

    >>> _our_name("Left-shoe"), _our_name("Upper-clothes"), _our_name("lapel")
    ('left_shoe', 'upper_clothes', None)
    """
    plain = re.sub(r"[^a-z]+", "_", label.lower()).strip("_")
    ours = SPELLINGS.get(plain, plain)
    return ours if ours in VITON_HD.names or ours in DRESS_CODE.names else None


def _value(name: str | None, labels: LabelSet) -> int:
    """The value of a label in a set."""
    assert name is not None
    if name not in labels.names:
        name = SUBSTITUTES[name]
    return labels.names.index(name)
