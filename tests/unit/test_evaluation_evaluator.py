"""evaluation/evaluator.py: scores of a tiny run against a computation by hand, whatever the batch."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch.utils.data import default_collate

from i2am_train.attention.trace import trace
from i2am_train.config.evaluation import AttributionConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.data.dataset import TryOnDataset
from i2am_train.errors import CaptureError, ConfigError
from i2am_train.evaluation.evaluator import EvaluationResult, EvaluationSettings, Evaluator, check_settings
from i2am_train.evaluation.explaining import attention_scores, explain_batch
from i2am_train.metrics.correspondence import target_on_grid
from i2am_train.metrics.imacs import imacs
from i2am_train.models.sampling import sample
from i2am_train.seeds import seed_for
from i2am_train.types import Direction, GridSize, Pairing, Split

SIZE = GridSize(64, 48)
SAMPLING = SamplingConfig(steps=2, seed=7)
SAMPLES = [0, 2, 3, 5]


def settings(*metrics: str, **attribution: Any) -> EvaluationSettings:
    return EvaluationSettings(sampling=SAMPLING, attribution=AttributionConfig(**attribution), metrics=metrics)


@pytest.fixture(scope="module")
def model(make_small_model: Callable[..., Any]) -> Any:
    return make_small_model()


@pytest.fixture(scope="module")
def read_batch(small_dataset: Path) -> Callable[..., Any]:
    def read(indices: list[int], pairing: Pairing = Pairing.PAIRED) -> Any:
        dataset = TryOnDataset(small_dataset, Split.TEST, pairing, SIZE)
        return default_collate([dataset[index] for index in indices])

    return read


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
    sweep = AttributionConfig(deltas=deltas, penalties=penalties)
    with trace(model, matrix_layers=[2]) as attention:
        sampled(model, batch, [1, 4, 5])
    maps = attention.maps()
    scores = attention_scores(maps, batch, sweep)
    for name in ("imacs_g", "imacs_r"):
        assert torch.equal(scores[name], scores[f"{name}@d0.4_l3"])
        for delta in deltas:
            for penalty in penalties:
                one = AttributionConfig(delta=delta, penalty=penalty, penalties=[])
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
    made = explain_batch(model, batch, SAMPLING, AttributionConfig())
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
