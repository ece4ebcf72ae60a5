"""Scores of the detection experiment: which box counts how, and which sample is left out."""

from pathlib import Path
from typing import Any

import pytest
import torch

from i2am_train.config.explanation import DetectConfig
from i2am_train.detection.bench import Bench, BenchSample
from i2am_train.detection.experiment import KeptPaintings, iou_of, mean_iou, sample_row, summarise
from i2am_train.metrics.boxes import Box
from i2am_train.types import GridSize

CONFIG = DetectConfig(height=32, width=64, delta=0.4, deltas=[0.2, 0.4, 0.6])


def sample(number: int = 1) -> BenchSample:
    """An object of a tenth of an image of 80x200 (height x width)."""
    return BenchSample(
        index=number, image_id=number, path=Path("none.jpg"), size=GridSize(80, 200), box=Box(10, 20, 50, 60),
        category="cup", crowd=False,
    )  # fmt: skip


def maps(decoder: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"decoder": decoder, "all": decoder, "daam": torch.ones_like(decoder)}


def step() -> torch.Tensor:
    """A map 8x16 on the grid of the frame's quarter: 1 in a block, 0.5 in another, else 0."""
    values = torch.zeros(8, 16)
    values[2:6, 1:4] = 0.5
    values[0:2, 12:14] = 1.0
    return values


def row(detections: dict[str, Any], number: int = 1) -> dict[str, Any]:
    return sample_row(sample(number), maps(step()), detections, CONFIG)


def test_each_method_has_its_box() -> None:
    """DAAM's uniform map and the whole image are one; the map's largest region, at its threshold; its inverse."""
    boxes = row({})["boxes"]
    assert boxes["daam"] == boxes["overall"] == Box(0, 0, 64, 32)
    assert boxes["random"] == boxes["random_authors"]
    ours = boxes["i2am"]
    assert ours is not None
    assert abs(ours.left - 4) <= 2 >= abs(ours.right - 16)
    assert abs(ours.top - 8) <= 2 >= abs(ours.bottom - 24)
    assert boxes["i2am_inverted"] == Box(0, 0, 64, 32)  # the ground lies around both
    assert row({})["boxes"] == boxes  # random boxes, too
    assert row({}, 2)["boxes"]["random"] != boxes["random"]


def test_a_sample_without_a_box_counts_zero_but_by_the_authors_rules() -> None:
    """They leave it out, and of random boxes those that miss the object."""
    target, away = Box(0, 0, 4, 4), Box(10, 10, 12, 12)
    assert iou_of("i2am", None, target) == 0.0
    assert iou_of("i2am_authors", None, target) is None
    assert iou_of("random", away, target) == 0.0
    assert iou_of("random_authors", away, target) is None
    assert iou_of("i2am_authors", away, target) == 0.0
    assert iou_of("random_authors", Box(0, 0, 2, 4), target) == 0.5


def seen(real: list[float] | None, generated: list[float] | None) -> dict[str, Any]:
    return {
        kind: box and {"box": box, "score": 0.9, "category": "cup"}
        for kind, box in (("real", real), ("generated", generated))
    }


def test_a_row_is_in_the_frame_of_the_generated_image() -> None:
    """The object's box is carried there; sweep and scores are of the same map."""
    found = row({"yolo": seen([3.2, 8, 16, 24], None)})
    assert found["target"] == pytest.approx((3.2, 8, 16, 24))
    assert found["share"] == pytest.approx(0.1)
    assert found["iou"]["real"]["yolo"] == pytest.approx(1)
    assert found["iou"]["generated"]["yolo"] is None
    assert found["iou"]["generated"]["overall"] == pytest.approx(0.1)
    assert found["iou"]["sweep"]["i2am@d0.4"] == found["iou"]["generated"]["i2am"] > 0.6
    assert found["iou"]["sweep"]["i2am@d0.6"] == 0.0  # only the peak is left


def test_means_say_how_many_samples_count(tmp_path: Path) -> None:
    """Images without a detection are left out of a detector's mean; each mean has its interval."""
    detections = [seen([3.2, 8, 16, 24], None), seen(None, None), seen([3.2, 8, 9.6, 24], [0, 0, 1, 1])]
    rows = [row({"yolo": one}, number) for number, one in enumerate(detections, 1)]
    real, generated = (mean_iou(rows, kind, "yolo") for kind in ("real", "generated"))
    assert (real["mean"], real["n"], real["left_out"]) == (pytest.approx(0.75), 2, 1)
    assert real["low"] <= 0.75 <= real["high"]
    assert (generated["mean"], generated["n"], generated["low"]) == (0.0, 1, None)
    assert mean_iou(rows[1:2], "real", "yolo")["mean"] is None


class Made(KeptPaintings):
    """Says that the maps are functional, without files."""

    functional = True  # type: ignore[assignment]


def test_the_summary_says_what_the_bench_is() -> None:
    """Counts, share, maps without a region, and differences to the baselines with their signs."""
    samples = tuple(sample(number) for number in range(1, 5))
    rows = [row({}, number) for number in range(1, 5)]
    kept = Made(folder=Path("none"), samples=samples, batch_size=2)
    found = summarise(rows, kept, Bench(samples=samples, images=9))
    assert found["bench"] == {
        "images": 9, "samples": 4, "crowds": 0, "mean_share": pytest.approx(0.1),
    }  # fmt: skip
    assert found["functional"] is True
    assert found["missed"]["i2am"] == 0
    first = found["differences"][0]
    assert (first["method"], first["against"], first["n"]) == ("i2am", "overall", 4)
    assert first["difference"] == pytest.approx(
        found["miou"]["generated"]["i2am"]["mean"] - found["miou"]["generated"]["overall"]["mean"]
    )
