"""evaluation/results.py: the files of an evaluation, read back, and what a failure leaves."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from i2am_train.evaluation import results as results_module
from i2am_train.evaluation.evaluator import EvaluationResult
from i2am_train.evaluation.results import read_results, sample_intervals, write_evaluation
from i2am_train.results import panels as panels_module
from i2am_train.results.panels import SamplePanels, read_panels, write_panels
from i2am_train.results.sample_scores import read_samples
from i2am_train.results.statistics import Over, mean_interval
from i2am_train.types import GridSize

GENERATED, REFERENCE = GridSize(4, 3), GridSize(8, 6)
PICTURES = ("garment", "agnostic", "densepose", "person", "generated")


def panels_of(index: int) -> SamplePanels:
    draw = np.random.default_rng(index)
    return SamplePanels(
        name=f"{index:05d}_00",
        garment_name=f"{index + 1:05d}_00",
        **{name: draw.integers(0, 256, (16, 12, 3), dtype=np.uint8) for name in PICTURES},
        map_generated=draw.random((16, 12)),
        map_reference=draw.random((16, 12)),
        centers=draw.random((GENERATED.tokens, 2)),
        target_centers=np.full((GENERATED.tokens, 2), np.nan),
        mask=draw.random(GENERATED.tokens) > 0.5,
        inpaint_mask=draw.random((16, 12)) > 0.5,
        garment_mask=draw.random((16, 12)) > 0.5,
        layer="up_blocks.1.attentions.1",
        generated_grid=GENERATED,
        reference_grid=REFERENCE,
    )


def outcome() -> EvaluationResult:
    rows = [
        {"index": 0, "name": "a", "garment_name": "b", "imacs_g": 0.25, "ssim": None},
        {"index": 3, "name": "c", "garment_name": "d", "imacs_g": 0.75, "ssim": None},
    ]
    return EvaluationResult(
        metrics={"imacs_g": 0.5},
        rows=rows,
        skipped={"ssim": 2},
        warnings=["collapsed"],
        protocol={"image_size": "64x48"},
    )


def test_intervals_are_of_means_over_samples() -> None:
    """The bootstrap that a report uses, over the samples that have a value; one sample has no interval."""
    values = [0.1, 0.4, None, 0.35, 0.8, 0.2]
    rows = [
        {"index": index, "name": str(index), "ssim": value, "pck_1": 0.5 if index == 2 else None}
        for index, value in enumerate(values)
    ]
    intervals = sample_intervals(rows)
    known = [value for value in values if value is not None]
    low, high = mean_interval(known, Over.SAMPLES, 0.95)
    assert low is not None
    assert high is not None
    assert low < np.mean(known) < high
    assert intervals == {"ssim": {"low": low, "high": high, "confidence": 0.95, "n": 5}}


def test_panels_come_back(tmp_path: Path) -> None:
    """The report reads what was written: in its order, names beside their pictures, NaN as NaN."""
    write_panels(tmp_path / "new", [panels_of(2), panels_of(7)])
    for read, written in zip(read_panels(tmp_path / "new"), map(panels_of, (2, 7)), strict=True):
        for field in fields(SamplePanels):
            after, before = getattr(read, field.name), getattr(written, field.name)
            np.testing.assert_array_equal(after, before, err_msg=field.name)
    assert np.isnan(read.target_centers).all()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["panels.safetensors"]


def test_panels_are_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves the earlier archive readable."""
    write_panels(tmp_path, [panels_of(2), panels_of(5)])

    def disk_full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(panels_module, "save_file", disk_full)
    with pytest.raises(OSError, match="no space left"):
        write_panels(tmp_path, [panels_of(3)])
    assert [one.name for one in read_panels(tmp_path)] == ["00002_00", "00005_00"]


def test_scores_come_back(tmp_path: Path) -> None:
    """Means with intervals, counts and settings in one file, the samples' scores in the other, None as null."""
    write_evaluation(tmp_path / "new", outcome(), {"sampling": {"steps": 2}})
    results = read_results(tmp_path / "new")
    assert results == {
        "metrics": {"imacs_g": 0.5},
        "intervals": {"imacs_g": {"low": 0.25, "high": 0.75, "confidence": 0.95, "n": 2}},
        "samples": 2,
        "skipped": {"ssim": 2},
        "warnings": ["collapsed"],
        "protocol": {"image_size": "64x48"},
        "settings": {"sampling": {"steps": 2}},
    }
    assert list(read_samples(tmp_path / "new" / "samples.jsonl")) == outcome().rows


def test_results_are_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies in between leaves an evaluation that does not count as done."""

    def killed(*_: Any) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(results_module, "write_json", killed)
        with pytest.raises(OSError, match="killed"):
            write_evaluation(tmp_path, outcome(), {})
    assert (tmp_path / "samples.jsonl").is_file()
    assert read_results(tmp_path) is None
