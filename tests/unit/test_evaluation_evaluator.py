"""evaluation/evaluator.py: scores of a tiny run against a computation by hand, whatever the batch; what is kept of it,
what a stopped evaluation has, and what is still to be made.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from i2am_train.attention.trace import trace
from i2am_train.config.evaluation import AttributionConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.data.dataset import TryOnDataset
from i2am_train.errors import CaptureError, ConfigError, DataError
from i2am_train.evaluation import evaluator as evaluator_module
from i2am_train.evaluation.evaluator import (
    EvaluationResult,
    EvaluationSettings,
    Evaluator,
    GeneratedSamples,
    check_settings,
    person_names,
    read_results,
    real_images,
    write_evaluation,
)
from i2am_train.evaluation.explaining import attention_scores, explain_batch
from i2am_train.evaluation.scoring import ImageScores
from i2am_train.files import UNFINISHED
from i2am_train.metrics.attention import imacs, target_on_grid
from i2am_train.models.sampling import sample
from i2am_train.ops.numerics import to_uint8
from i2am_train.results import run_files
from i2am_train.results.run_files import SamplePanels, read_panels, read_samples, write_panels
from i2am_train.results.statistics import Over, mean_interval
from i2am_train.seeds import seed_for
from i2am_train.types import Direction, GridSize, Pairing, Split

SIZE = GridSize(64, 48)
SAMPLING = SamplingConfig(steps=2, seed=7)
SAMPLES = [0, 2, 3, 5]


def settings(*metrics: str, **attribution: Any) -> EvaluationSettings:
    return EvaluationSettings(
        sampling=SAMPLING, attribution=AttributionConfig(**{"layer": 2, **attribution}), metrics=metrics
    )


def evaluated(model: Any, *batches: Any, metrics: tuple[str, ...] = ("ssim",)) -> EvaluationResult:
    evaluator = Evaluator(settings(*metrics), torch.device("cpu"))
    for batch in batches:
        evaluator.update(model, batch)
    return evaluator.compute()


@pytest.fixture(scope="module")
def result(model: Any, read_batch: Callable[..., Any]) -> EvaluationResult:
    return evaluated(model, read_batch(SAMPLES))


@pytest.fixture(scope="module")
def captured(model: Any, read_batch: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """The same samples once more, without the evaluator: batch, maps, images."""
    batch = read_batch(SAMPLES)
    with trace(model, matrix_layers=[2], generated_mask=batch["inpaint_mask"]) as attention:
        images = sampled(model, batch, SAMPLES)
    return batch, attention.maps(), images


def sampled(model: Any, batch: Any, indices: list[int]) -> torch.Tensor:
    return sample(
        model,
        batch["garment"],
        batch["agnostic"],
        batch["densepose"],
        seeds=[seed_for(SAMPLING.seed, "sampling", index) for index in indices],
        steps=SAMPLING.steps,
        guidance=SAMPLING.guidance,
    )


@pytest.mark.parametrize(
    ("side", "direction", "mask"),
    [("g", Direction.REFERENCE_TO_GENERATED, "inpaint_mask"), ("r", Direction.GENERATED_TO_REFERENCE, "garment_mask")],
)
def test_imacs_by_hand(captured: Any, result: EvaluationResult, side: str, direction: Direction, mask: str) -> None:
    """Mean of the thresholded unified map inside the mask minus lambda times that outside, for every lambda."""
    batch, maps, _ = captured
    unified = maps.unified(direction).normalised().resized(SIZE).normalised().values
    for row, heat_map, inside in zip(result.rows, unified, batch[mask], strict=True):
        kept = torch.where(heat_map > 0.4, heat_map, 0.0)
        for name, penalty in (("", 3.0), ("@d0.4_l1", 1.0), ("@d0.4_l5", 5.0)):
            expected = kept[inside].mean() - penalty * kept[~inside].mean()
            assert row[f"imacs_{side}{name}"] == pytest.approx(float(expected), abs=1e-4)


def test_every_delta_and_lambda_from_one_pass(model: Any, read_batch: Callable[..., Any]) -> None:
    """A sweep gives what single settings give, every column is affine in lambda, and the main score stays its own."""
    batch = read_batch([1, 4, 5])
    deltas, penalties = [0.1, 0.4, 0.7], [0.0, 2.0, 7.0]
    sweep = AttributionConfig(layer=2, deltas=deltas, penalties=penalties)
    with trace(model, matrix_layers=[2]) as attention:
        sampled(model, batch, [1, 4, 5])
    maps = attention.maps()
    scores = attention_scores(maps, batch, sweep)
    for name in ("imacs_g", "imacs_r"):
        assert torch.equal(scores[name], scores[f"{name}@d0.4_l3"])
        for delta in deltas:
            for penalty in penalties:
                one = AttributionConfig(layer=2, delta=delta, penalty=penalty, penalties=[])
                single = attention_scores(maps, batch, one)[name]
                assert torch.equal(scores[f"{name}@d{delta:g}_l{penalty:g}"], single)
            zero, two, seven = (scores[f"{name}@d{delta:g}_l{penalty:g}"] for penalty in penalties)
            torch.testing.assert_close(zero + 3.5 * (two - zero), seven, atol=1e-5, rtol=0)
        assert not torch.equal(scores[f"{name}@d0.1_l2"], scores[f"{name}@d0.7_l2"])


def test_correspondence_by_hand(captured: Any, result: EvaluationResult) -> None:
    """Distance from each garment patch's attention centre to the truth, and the shares within one and two patches."""
    batch, maps, _ = captured
    scores, reference = maps.scores(2).double(), GridSize(8, 6)
    generated = maps.store.layer(2).generated_grid
    target = target_on_grid(batch["correspondence"], batch["warped_garment_mask"], generated, reference)
    for row, weights, truth in zip(result.rows, scores, target, strict=True):
        distances = []
        for patch in range(generated.tokens):
            if truth[patch].isfinite().all():
                y = sum(weights[patch, k] * (k // 6) for k in range(48))
                x = sum(weights[patch, k] * (k % 6) for k in range(48))
                distances.append(math.hypot(y - truth[patch, 0], x - truth[patch, 1]))
        assert distances
        assert row["correspondence_error"] == pytest.approx(np.mean(distances), abs=1e-4)
        for radius in (1, 2):
            share = np.mean([distance <= radius for distance in distances])
            assert row[f"pck_{radius}"] == pytest.approx(share, abs=1e-6)


def test_image_score_by_hand(captured: Any, result: EvaluationResult) -> None:
    """SSIM of the very images that the attention was captured from, against scikit-image."""
    batch, _, images = captured
    bytes_of = [
        ((part + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy() for part in (images, batch["person"])
    ]
    for row, generated, real in zip(result.rows, *bytes_of, strict=True):
        expected = structural_similarity(
            generated, real, channel_axis=-1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, data_range=255,
        )  # fmt: skip
        assert row["ssim"] == pytest.approx(expected, abs=2e-3)


def test_means_and_names(result: EvaluationResult) -> None:
    """Rows by ascending index; each metric is the mean of the samples' values; nothing was skipped."""
    assert [row["index"] for row in result.rows] == SAMPLES
    assert all(row["name"] == row["garment_name"] for row in result.rows)
    for name in ("imacs_g", "pck_1", "center_spread", "attention_entropy", "ssim"):
        values = [row[name] for row in result.rows]
        assert result.metrics[name] == pytest.approx(np.mean(values)), name
    assert result.skipped == {}


def test_batches_do_not_matter(model: Any, read_batch: Callable[..., Any], result: EvaluationResult) -> None:
    """The same rows from other batches in another order."""
    other = evaluated(model, read_batch([5]), read_batch([2, 0, 3]))
    for row, expected in zip(other.rows, result.rows, strict=True):
        assert row["name"] == expected["name"]
        numbers = {name: v for name, v in expected.items() if isinstance(v, float)}
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, abs=2e-3)


def test_unpaired_samples_have_no_paired_scores(model: Any, read_batch: Callable[..., Any]) -> None:
    """What needs the truth is None in the rows, counted as skipped, and absent from the metrics."""
    unpaired = evaluated(model, read_batch([1, 4, 5], Pairing.UNPAIRED))
    needs_truth = {"ssim", "correspondence_error", "pck_1", "pck_2", "spread_ratio"}
    assert unpaired.skipped == dict.fromkeys(needs_truth, 3)
    for row in unpaired.rows:
        assert {name for name, value in row.items() if value is None} == needs_truth
        assert row["name"] != row["garment_name"]
    assert not needs_truth & unpaired.metrics.keys()
    assert {"imacs_g", "imacs_r", "center_spread", "attention_entropy"} <= unpaired.metrics.keys()


def test_a_sample_without_a_mask_is_left_out(model: Any, read_batch: Callable[..., Any]) -> None:
    """It has no IMACS on that side; the mean is over the others, and the number left out is told."""
    batch = read_batch([0, 3])
    batch["garment_mask"][1] = False
    result = evaluated(model, batch)
    assert result.rows[1]["imacs_r"] is None
    assert result.skipped["imacs_r"] == 1
    assert result.metrics["imacs_r"] == pytest.approx(result.rows[0]["imacs_r"])
    assert "imacs_g" not in result.skipped


def test_global_random_state_is_not_touched(model: Any, read_batch: Callable[..., Any]) -> None:
    """Evaluating between two epochs leaves torch's and numpy's global streams where they were.

    (Python's own is moved by the tests' type checker, which looks at random elements of lists.)
    """
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    evaluated(model, read_batch([1, 2]), metrics=("ssim", "stlpips", "kd_efficientnet_lite0"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_reset_forgets(model: Any, read_batch: Callable[..., Any]) -> None:
    """Between epochs nothing is carried over."""
    evaluator = Evaluator(settings(), torch.device("cpu"))
    evaluator.update(model, read_batch([0, 1]))
    evaluator.reset()
    evaluator.update(model, read_batch([2, 3]))
    assert [row["index"] for row in evaluator.compute().rows] == [2, 3]


def test_every_sample_is_explained_by_itself(model: Any, read_batch: Callable[..., Any]) -> None:
    """Its own pictures, masks, truth, maps and scores; and the panels that are kept of it."""
    batch = read_batch([1, 4, 5])
    made = explain_batch(model, batch, SAMPLING, AttributionConfig(layer=2))
    scores = [[one.scores[name] for one in made] for name in ("imacs_g", "pck_1", "center_spread")]
    assert all(len(set(values)) == 3 for values in (scores[0], scores[2]))
    one = made[1]
    assert (one.index, one.name, one.paired) == (4, batch["name"][1], True)
    assert one.inputs == {"person": one.name, "garment": batch["garment_name"][1]}
    original = ((batch["garment"][1] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    assert np.array_equal(one.images["garment"], original)
    assert np.array_equal(one.masks["inpaint"], batch["inpaint_mask"][1])
    assert np.array_equal(one.correspondence, batch["correspondence"][1], equal_nan=True)
    for side, direction in zip("gr", Direction, strict=True):
        heat = torch.from_numpy(one.unified(direction, thresholded=True))[None]
        score = imacs(heat, torch.from_numpy(one.mask(direction))[None])
        assert one.scores[f"imacs_{side}"] == pytest.approx(float(score), abs=1e-5)
    panels = one.panels()
    assert panels.name == one.name
    assert panels.garment.shape == (64, 48, 3)
    assert (panels.map_generated.min(), panels.map_generated.max()) == (0, 1)
    assert panels.centers.shape == panels.target_centers.shape == (panels.generated_grid.tokens, 2)
    errors = np.linalg.norm(panels.centers - panels.target_centers, axis=-1)
    assert one.scores["correspondence_error"] == pytest.approx(np.nanmean(errors), abs=1e-4)


@pytest.mark.parametrize(
    ("chosen", "error", "text"),
    [
        (settings("sim"), ConfigError, "sim"),
        (settings(layer="mid_block.attentions.3"), CaptureError, "mid_block.attentions.3"),
        (settings(layers=["nowhere", 2]), CaptureError, "nowhere"),
    ],
)
def test_settings_are_checked_beforehand(
    model: Any, chosen: EvaluationSettings, error: type[Exception], text: str
) -> None:
    """A metric or layer that does not exist fails without a sampling step and leaves no hook behind."""
    check_settings(model, settings("ssim"))
    with pytest.raises(error, match=text):
        check_settings(model, chosen)
    modules = list(model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


# ---- batches that are kept ---------------------------------------------------------------------

NAMES = tuple("abcde")
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


def row(index: int) -> dict[str, Any]:
    return {"index": index, "name": NAMES[index], "imacs_g": index / 3}


@pytest.fixture
def samples(tmp_path: Path) -> GeneratedSamples:
    return GeneratedSamples(folder=tmp_path, names=NAMES, batch_size=2)


def make(samples: GeneratedSamples, *positions: int, panels: tuple[int, ...] = ()) -> None:
    images = [np.full((16, 12, 3), 7, np.uint8)] * len(positions)
    samples.write([row(at) for at in positions], images, [panels_of(at) for at in panels])


def test_batches_are_made_once(samples: GeneratedSamples) -> None:
    """Whole batches of fixed content; finished ones, in any order, are not pending; then all rows in order."""
    assert samples.pending() == samples.batches() == [range(2), range(2, 4), range(4, 5)]
    make(samples, 4)
    make(samples, 0, 1)
    assert samples.pending() == [range(2, 4)]
    make(samples, 2, 3)
    assert samples.pending() == []
    assert samples.rows() == [row(index) for index in range(5)]


def test_a_batch_without_its_rows_or_an_image_is_made_again(samples: GeneratedSamples) -> None:
    """Rows are written last, so their absence means that the batch was interrupted; a deleted image is noticed."""
    for positions in ((0, 1), (2, 3), (4,)):
        make(samples, *positions)
    (samples.folder / "partial" / "batch-00000" / "rows.json").unlink()
    samples.image_path(3).unlink()
    assert samples.pending() == [range(2), range(2, 4)]


def test_panels_of_batches_come_together(samples: GeneratedSamples) -> None:
    """In order of the samples, arrays beside their names, and none where none were wanted."""
    make(samples, 2, 3, panels=(2,))
    make(samples, 0, 1, panels=(0, 1))
    make(samples, 4)
    panels = samples.panels()
    assert [one.name for one in panels] == ["00000_00", "00001_00", "00002_00"]
    for position, one in enumerate(panels):
        assert np.array_equal(one.centers, panels_of(position).centers)
        assert np.array_equal(one.generated, panels_of(position).generated)
    bare = GeneratedSamples(folder=samples.folder / "other", names=NAMES[:2], batch_size=2)
    make(bare, 0, 1)
    assert bare.panels() == []


def test_a_finished_evaluation_keeps_its_images_only(samples: GeneratedSamples) -> None:
    """Neither partial files nor what a killed process left half-written."""
    for positions in ((0, 1), (2, 3), (4,)):
        make(samples, *positions)
    (samples.folder / "images" / f".c.77{UNFINISHED}").write_bytes(b"half")
    samples.clear()
    assert [path.name for path in samples.folder.iterdir()] == ["images"]
    assert sorted(path.name for path in (samples.folder / "images").iterdir()) == [f"{name}.png" for name in NAMES]


def test_rows_and_image_scores_join_by_position() -> None:
    """Means over both, a missing value counted, set scores beside them."""
    rows = [row(index) | {"attention_entropy": 1.0} for index in (0, 3)]
    scores = ImageScores(pairs={"ssim": [None, 0.5]}, sets={"fid": 9.0}, protocol={"image_size": "2x1"})
    result = EvaluationResult.of_images(rows, scores)
    assert result.rows[1] == row(3) | {"attention_entropy": 1.0, "ssim": 0.5}
    assert result.metrics == {"imacs_g": 0.5, "attention_entropy": 1.0, "ssim": 0.5, "fid": 9.0}
    assert result.skipped == {"ssim": 1}
    assert result.protocol == {"image_size": "2x1"}


def test_real_images_are_the_persons_of_the_samples(small_dataset: Path) -> None:
    """The very bytes that a sample's person has, under the person's name, whatever garment they get."""
    dataset = TryOnDataset(small_dataset, Split.TEST, Pairing.UNPAIRED, SIZE, indices=[1, 4])
    real = real_images(dataset)
    assert real.size == SIZE
    for position in (0, 1):
        sample = dataset[position]
        assert real.names[position] == sample["name"]
        assert torch.equal(real.read(position), to_uint8(sample["person"]))


def test_a_person_that_comes_twice_is_refused(small_dataset: Path) -> None:
    """Images are named after persons: the second would overwrite the first."""
    dataset = TryOnDataset(small_dataset, Split.TEST, Pairing.PAIRED, SIZE)
    dataset.pairs[3] = dataset.pairs[1]
    with pytest.raises(DataError, match=r"1 persons come more than once in the test list .*50001_00"):
        person_names(dataset)


# ---- files -------------------------------------------------------------------------------------


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


def test_intervals_are_of_means_over_samples(tmp_path: Path) -> None:
    """The bootstrap that a report uses, over the samples that have a value; one sample has no interval."""
    values = [0.1, 0.4, None, 0.35, 0.8, 0.2]
    rows = [
        {"index": index, "name": str(index), "ssim": value, "pck_1": 0.5 if index == 2 else None}
        for index, value in enumerate(values)
    ]
    write_evaluation(tmp_path, EvaluationResult.from_rows(rows, {}), {})
    known = [value for value in values if value is not None]
    low, high = mean_interval(known, Over.SAMPLES, 0.95)
    assert low is not None
    assert high is not None
    assert low < np.mean(known) < high
    assert (read_results(tmp_path) or {})["intervals"] == {
        "ssim": {"low": low, "high": high, "confidence": 0.95, "n": 5}
    }


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

    monkeypatch.setattr(run_files, "save_file", disk_full)
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
        patch.setattr(evaluator_module, "write_json", killed)
        with pytest.raises(OSError, match="killed"):
            write_evaluation(tmp_path, outcome(), {})
    assert (tmp_path / "samples.jsonl").is_file()
    assert read_results(tmp_path) is None
