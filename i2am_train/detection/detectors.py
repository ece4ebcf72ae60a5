"""Supervised detectors, the paper's upper rows of Table 1: torchvision's, and those of transformers.

Named by ``torchvision:NAME`` (its own COCO weights), ``torchvision:NAME@FILE`` (weights of the same
network from a file), or by a folder of transformers or its name on the hub. Models that find boxes
(DETR, RT-DETR, YOLOS, ...) and models that find segments (MaskFormer, Mask2Former) are taken;
the box of a segment is its extents. A detector of the user's own is named by its import path, and tried
on a small scale before any image is painted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection, AutoModelForUniversalSegmentation

from i2am_train.config.locations import expanded
from i2am_train.data.pictures import Image
from i2am_train.doors import calls, is_import_path, make, path_and_keywords, resolve
from i2am_train.errors import CheckpointError, ConfigError, I2AMError, NotFiniteError, WeightsMissingError
from i2am_train.metrics.boxes import Box
from i2am_train.models.pretrained import load_config, load_with_processor
from i2am_train.models.watch import advice
from i2am_train.types import GridSize
from i2am_train.weight_files import PublishedFile, check_floating, check_network, read_weights

TORCHVISION = "torchvision:"
SEGMENTING = ("maskformer", "mask2former")
"""Kinds of models of transformers whose segments are taken, overlapping ones whole (EoMT's processor has no such
form); others are asked for boxes."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One object that a detector sees."""

    box: Box
    """In pixels of the image."""
    score: float
    """In [0, 1]."""
    category: str


class Detector(Protocol):
    """Finds objects in a picture."""

    def detect(self, image: Image, threshold: float) -> list[Detection]:
        """Objects whose score exceeds the threshold, in an RGB image ``[height, width, 3]`` of any size."""

    def to(self, device: torch.device) -> Detector:
        """The same detector elsewhere."""


def best_detection(detections: Iterable[Detection], category: str | None = None) -> Detection | None:
    """The detection of the highest score, of one category only if it is named; None if there is none.

    >>> cup = Detection(box=Box(0, 0, 2, 2), score=0.6, category="cup")
    >>> dog = Detection(box=Box(1, 1, 5, 4), score=0.9, category="dog")
    >>> best_detection([cup, dog]).category, best_detection([cup, dog], "Cup").category
    ('dog', 'cup')
    """
    candidates = [one for one in detections if category is None or one.category.lower() == category.lower()]
    return max(candidates, key=lambda one: one.score, default=None)


def load_detectors(
    entries: Sequence[str | Mapping[str, Any]], size: GridSize, device: torch.device
) -> dict[str, Detector]:  # fmt: skip
    """The detectors of an option by the names that results give them, on the CPU.

    Args:
        entries: names, import paths, or mappings of an import path (``fn``) and keywords.
        size: of the picture that those of the user's own are tried on.
        device: that they are tried on, and will be used on.

    Raises:
        CheckpointError: as `load_detector`.
        ConfigError: an import path leads to nothing or to something else, or what it leads to fails.
    """
    detectors: dict[str, Detector] = {}
    for index, entry in enumerate(entries):
        if isinstance(entry, str) and (entry.startswith(TORCHVISION) or not is_import_path(entry)):
            detectors[entry] = load_detector(entry)
        else:
            own = _Imported.from_entry(entry, f"detectors[{index}]")
            tried = own.to(device)
            tried.detect(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8), 0.5)
            detectors[own.name] = tried.to(torch.device("cpu"))  # room for the pipeline
    return detectors


def load_detector(name: str) -> Detector:
    """A detector of torchvision or transformers by its name, on the CPU.

    Raises:
        CheckpointError: there is no such detector, it finds neither boxes nor segments, or its weights cannot be had.

    >>> load_detector("torchvision:yolo")
    Traceback (most recent call last):
        ...
    i2am_train.errors.CheckpointError: torchvision has no detector 'yolo'; it has fasterrcnn_...
    """
    if name.startswith(TORCHVISION):
        return _Torchvision.from_name(name.removeprefix(TORCHVISION))
    return _Transformers.from_pretrained(name)


@dataclass(frozen=True)
class _Imported:
    """A detector of the user's own; what it gives is checked."""

    name: str
    """The import path, with keywords behind: ``my_package:Mine(share=0.3)``."""
    option: str
    detector: Any

    EXPECTED: ClassVar[str] = (
        "a class or function that gives an object with detect(image, threshold), which returns a list of Detection "
        f"of {__name__}"
    )

    @classmethod
    def from_entry(cls, entry: str | Mapping[str, Any], option: str) -> _Imported:
        """From ``package.module:name``, or a mapping of it (``fn``) and keywords."""
        path, keywords = path_and_keywords(entry, option)
        found = resolve(path, option, cls.EXPECTED, calls(**keywords))
        made = make(found, f"{option}={path}", **keywords)
        detect = getattr(made, "detect", None)
        wrong = "has no method detect" if detect is None else calls("image", "threshold")(detect)
        if wrong:
            subject = f"a {type(made).__name__}" if detect is None else f"detect of a {type(made).__name__}"
            raise ConfigError(f"{option}={path}: {subject} {wrong}. Expected {cls.EXPECTED}.")
        given = ", ".join(f"{name}={value}" for name, value in keywords.items())
        return cls(f"{path}({given})" if given else path, option, made)

    def to(self, device: torch.device) -> _Imported:
        """The same detector elsewhere, if it can be moved; a method that moves it in place may return nothing."""
        move = getattr(self.detector, "to", None)
        if move is None:
            return self
        try:
            moved = move(device)
        except Exception as error:
            named = f"{self.option}={self.name}: to({device})"
            raise ConfigError(
                f"{named} fails: {type(error).__name__}: {error}. Choose another device, or correct it there; --debug "
                "shows where it fails."
            ) from error
        return self if moved is None else replace(self, detector=moved)

    def detect(self, image: Image, threshold: float) -> list[Detection]:
        """As of ``Detector``."""
        named = f"{self.option}={self.name}"
        try:
            found = self.detector.detect(image, threshold)
            if not isinstance(found, list) or not all(isinstance(one, Detection) for one in found):
                raise ConfigError(f"{named}: detect returned {found!r:.200}. Expected {self.EXPECTED}.")
            plain = [Detection(box=Box(*map(float, d.box)), score=float(d.score), category=d.category) for d in found]
        except I2AMError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{named}: detect fails on a picture of {image.shape[0]}x{image.shape[1]}: {type(error).__name__}: "
                f"{error}. Expected {self.EXPECTED}; --debug shows where it fails."
            ) from error
        if not all(math.isfinite(value) for one in plain for value in (*one.box, one.score)):
            raise NotFiniteError(f"{named} gives boxes or scores that are NaN or infinite.")
        return [one for one in plain if one.score > threshold]


@dataclass(frozen=True)
class _Torchvision:
    """A detector of torchvision; it scales pictures itself."""

    model: nn.Module
    categories: Sequence[str]

    @classmethod
    def from_name(cls, name: str) -> _Torchvision:
        """From ``NAME``, with torchvision's weights for COCO, or ``NAME@FILE``."""
        network, _, file = name.partition("@")
        known = torchvision.models.list_models(module=torchvision.models.detection)
        if network not in known:
            raise CheckpointError(
                f"torchvision has no detector '{network}'; it has {', '.join(known)}. Write "
                f"detectors=[{TORCHVISION}{known[0]}], or give a folder or hub name for one of transformers."
            )
        weights = torchvision.models.get_model_weights(network).DEFAULT
        source = expanded(file) if file else weights.url
        try:
            model = _built(network, weights, read_weights(source) if file else _published(weights))
        except WeightsMissingError as error:
            raise CheckpointError(
                f"The weights of torchvision's {network} could not be had ({error}) Or download {source} elsewhere "
                f"and give detectors=[{TORCHVISION}{network}@FILE]."
            ) from error
        except (CheckpointError, RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"{source} gives no weights of torchvision's {network} for COCO's categories ({_short(error)[:300]}). "
                "Give the file that torchvision names for this network, or leave out @FILE to download it."
            ) from error
        check_network(model, name)
        if file:
            check_floating([source], model, file)
        return cls(model.eval(), weights.meta["categories"])

    def to(self, device: torch.device) -> _Torchvision:
        """The same detector elsewhere."""
        return _Torchvision(self.model.to(device), self.categories)

    @torch.inference_mode()
    def detect(self, image: Image, threshold: float) -> list[Detection]:
        """As of ``Detector``."""
        device = next(self.model.parameters()).device
        picture = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
        (found,) = self.model([picture.to(device)])
        return _detections(found, threshold, lambda label: self.categories[label])


def _published(weights: Any) -> dict[str, Tensor]:
    """The tensors that torchvision distributes for a network, fetched where they are not here."""
    name = weights.url.rpartition("/")[2]
    digest = re.search(r"-([0-9a-f]{8,})\.", name)
    assert digest is not None, "torchvision's files are named after their digests"
    return PublishedFile(name=name, url=weights.url, sha256=digest[1]).read()


def _built(network: str, weights: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """The network as torchvision builds it around ``weights``, with these tensors for them.

    torchvision would read its file as a pickle that may run programs, and builds a network without weights another way
    (its norms are not frozen, and round differently). So it is given the tensors when it asks for them.
    """
    weights.get_state_dict = lambda *_, **__: tensors  # of this one member, before its class's
    try:
        return cast(nn.Module, torchvision.models.get_model(network, weights=weights))
    finally:
        del weights.get_state_dict


def _short(error: Exception) -> str:
    """An error's text in one line."""
    return " ".join(str(error).split())


@dataclass(frozen=True)
class _Transformers:
    """A detector of transformers with its image processor."""

    model: Any
    processor: Any
    segments: bool
    """The model finds segments and no boxes."""

    @classmethod
    def from_pretrained(cls, name: str) -> _Transformers:
        """From a folder or from the hub."""
        try:
            config = load_config(name)
        except CheckpointError as error:
            raise CheckpointError(
                f"There is no detector '{name}' ({_short(error)[:400]}). Give a folder of transformers or a hub name "
                f"that this machine can reach, such as hustvl/yolos-tiny, or {TORCHVISION}NAME."
            ) from error
        segments = config.model_type in SEGMENTING
        kind = AutoModelForUniversalSegmentation if segments else AutoModelForObjectDetection
        model, processor = load_with_processor("detectors", name, kind, "cpu")
        return cls(model.eval(), processor, segments)

    def to(self, device: torch.device) -> _Transformers:
        """The same detector elsewhere."""
        return _Transformers(self.model.to(device), self.processor, self.segments)

    @torch.inference_mode()
    def detect(self, image: Image, threshold: float) -> list[Detection]:
        """As of ``Detector``."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        options = {"threshold": threshold, "target_sizes": [image.shape[:2]]}
        if self.segments:
            (found,) = self.processor.post_process_instance_segmentation(outputs, return_binary_maps=True, **options)
            found = boxes_of_segments(found)
        else:
            (found,) = self.processor.post_process_object_detection(outputs, **options)
        return _detections(found, threshold, lambda label: self.model.config.id2label[label])


def boxes_of_segments(found: dict[str, Any]) -> dict[str, Tensor]:
    """Boxes, scores and labels of segments whose masks ``[segment, height, width]`` are not empty.

    >>> masks = torch.tensor([[[0, 1, 1], [0, 1, 0]]])
    >>> boxes_of_segments({"segmentation": masks, "segments_info": [{"score": 0.9, "label_id": 4}]})["boxes"]
    tensor([[1., 0., 3., 2.]])
    """
    info = found["segments_info"]
    masks = found["segmentation"].bool() if info else torch.zeros(0, 1, 1, dtype=torch.bool)
    seen = [index for index in range(len(info)) if masks[index].any()]
    boxes = torchvision.ops.masks_to_boxes(masks[seen])
    boxes[:, 2:] += 1  # from the last pixel to its edge
    return {
        "boxes": boxes,
        "scores": torch.tensor([info[index]["score"] for index in seen]),
        "labels": torch.tensor([info[index]["label_id"] for index in seen], dtype=torch.long),
    }


def _detections(found: dict[str, Tensor], threshold: float, category: Callable[[int], str]) -> list[Detection]:
    for name in ("boxes", "scores"):
        if not bool(found[name].isfinite().all()):
            raise NotFiniteError(
                f"A detector gives {name} that are NaN or infinite, which no picture can. {advice(found[name].dtype)}"
            )
    rows = zip(*(found[name].tolist() for name in ("boxes", "scores", "labels")), strict=True)
    return [
        Detection(box=Box(*box), score=score, category=str(category(label)))
        for box, score, label in rows
        if score > threshold
    ]
