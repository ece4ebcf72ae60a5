"""Parts of training and judging on a card: the step of every arm, every loss, metric, sampler and kind of capture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from i2am_train.attention.trace import ScoreTap, trace
from i2am_train.config.locations import experiment_names
from i2am_train.config.objective import TERMS, ObjectiveConfig
from i2am_train.config.options import option_names
from i2am_train.config.store import compose
from i2am_train.config.training import TrainConfig
from i2am_train.data.cache import LatentCache
from i2am_train.data.dataset import CachedDataset, batch_on
from i2am_train.losses.objective import Objective, make_objective
from i2am_train.metrics.attention import (
    alignment,
    attention_entropy,
    center_spread,
    correspondence_error,
    imacs,
    pck,
    spread_ratio,
    target_on_grid,
)
from i2am_train.metrics.boxes import authors_box, component_box
from i2am_train.metrics.registry import available_image_metrics, image_metric, image_pair_score, metric_info
from i2am_train.models.by_name import with_layers
from i2am_train.models.sampling import sample
from i2am_train.ops import rows
from i2am_train.training.optimization import set_trainable
from i2am_train.training.step import Draws, draw, step_losses
from i2am_train.types import Backend, Direction, GridSize, LossVariant, SamplerName, Split
from i2am_train.workflows.data import cache
from tests.support.attentions import whole_attention
from tests.support.card import on_card
from tests.support.terms import weights

pytestmark = pytest.mark.long

SAMPLES = [1, 4, 6]
SIZE, GENERATED, REFERENCE = GridSize(64, 48), GridSize(4, 3), GridSize(8, 6)
ARMS = experiment_names(option_names(TrainConfig))


@pytest.fixture(scope="module")
def model(make_small_model: Callable[..., Any]) -> Any:
    model = make_small_model()
    set_trainable(model, "all")
    return model


@pytest.fixture(scope="module")
def model_there(machine: Any, make_small_model: Callable[..., Any]) -> Any:
    """The same one on the card."""
    model = make_small_model()
    set_trainable(model, "all")
    with machine():
        return model.to("cuda")


@pytest.fixture(scope="module")
def read(read_batch: Callable[..., Any]) -> Any:
    return read_batch(SAMPLES, split="train")


@pytest.fixture(scope="module")
def encoded(machine: Any, small_dataset: Path, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same samples from a cache that was made on the card."""
    folder = tmp_path_factory.mktemp("encoded") / "cache"
    options = [f"root={small_dataset}", f"init={small_checkpoint}", f"output={folder}"]
    with machine():
        cache(
            compose("data_cache", [*options, "workers=0", "batch_size=8", "progress_bar=false", "device=cuda"])
        )  # fmt: skip
    dataset = CachedDataset(LatentCache(folder), small_dataset, Split.TRAIN)
    return default_collate([dataset[index] for index in SAMPLES])


def draws() -> Draws:
    drawn = draw(0, 0, SAMPLES, latent=GridSize(16, 12), timesteps=1000, condition_dropout=0.0)
    return drawn._replace(dropped=torch.tensor([False, True, False]))


def step(
    model: Any, objective: Objective, batch: Any, drawn: Draws, snr_gamma: float | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    model.zero_grad(set_to_none=True)
    with ScoreTap(model, layers=list(objective.layers)) as tap:
        losses = step_losses(model, batch, drawn, objective, tap, snr_gamma=snr_gamma)
        losses["total"].backward()
    return losses, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["read", "encoded"])
@pytest.mark.parametrize("arm", [*ARMS, "every term", "every term in blocks"])
def test_a_training_step(
    machine: Any,
    model: Any,
    model_there: Any,
    kind: str,
    arm: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of every arm, from pictures and from the cache: losses and gradients are on the card, with the CPU's values.

    Also where the matrices of scores are not kept.
    """
    if arm == "leffa" and kind == "encoded":
        pytest.skip("it compares pictures, which a cache does not hold")
    batch = request.getfixturevalue(kind)
    if arm == "every term in blocks":
        monkeypatch.setattr(rows, "MATRIX_BYTES", 0)
        monkeypatch.setattr(rows, "BLOCK_BYTES", 2**13)
    if arm.startswith("every term"):
        fitting = TERMS.keys() - {"mass", *(["leffa"] if kind == "encoded" else [])}
        terms = weights(**dict.fromkeys(fitting, 1.0))
        terms["dcml"]["force"] = "extent"
        options = ObjectiveConfig(layers=[2, 5], terms=terms)
        objective, snr_gamma = make_objective(options), 5.0
    else:
        config = with_layers(compose("train", [f"experiment={arm}"]))
        objective, snr_gamma = make_objective(config.objective), config.optimization.snr_gamma
    with machine():
        moved = Draws(*(values.to("cuda") for values in draws()))
        losses, gradients = step(model_there, objective, batch_on(batch, "cuda"), moved, snr_gamma)
        assert all(map(on_card, [*losses.values(), *gradients]))
    assert len(gradients) > 100
    if arm.startswith("every term"):
        monkeypatch.undo()
        expected, _ = step(model, objective, batch, draws(), snr_gamma)
        for name, value in expected.items():
            torch.testing.assert_close(losses[name].cpu(), value, rtol=1e-2, atol=1e-3)  # TF32


@pytest.mark.parametrize("variant", LossVariant)
def test_every_loss(machine: Any, variant: LossVariant) -> None:
    objective = make_objective(ObjectiveConfig(layers=2, variant=variant, terms=weights(**dict.fromkeys(TERMS, 1.0))))
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, GENERATED.tokens, REFERENCE.tokens, generator=generator)
    mask = torch.ones(3, GENERATED.tokens, dtype=torch.bool)
    with machine():
        there = logits.to("cuda").requires_grad_()
        attention = whole_attention(
            there.softmax(dim=-1),
            mask.to("cuda"),
            GENERATED,
            REFERENCE,
            conditioned=torch.tensor([True, False, True], device="cuda"),
            centers=objective.centers,
        )
        total, terms = objective({2: attention})
        total.backward()
        assert all(map(on_card, [total, there.grad, *terms.values()]))
        assert total.item() != 0


def test_every_metric_of_attention(machine: Any) -> None:
    """Functions of tensors: they compute where these are."""
    scores = torch.rand(3, GENERATED.tokens, REFERENCE.tokens)
    centers, target = torch.rand(3, GENERATED.tokens, 2), torch.rand(3, *SIZE, 2)
    heat, mask = torch.rand(3, *SIZE), torch.rand(3, *SIZE) > 0.5
    with machine():
        scores, centers, target, heat, mask = (values.to("cuda") for values in (scores, centers, target, heat, mask))
        truth = target_on_grid(target, mask, GENERATED, REFERENCE)
        patches = mask.flatten(1)[:, : GENERATED.tokens]
        values = [
            imacs(heat, mask, [1.0, 3.0]),
            correspondence_error(centers, truth),
            pck(centers, truth, 1.0),
            center_spread(centers, patches),
            spread_ratio(centers, truth),
            attention_entropy(scores, patches),
            *alignment(scores, GENERATED, REFERENCE),
        ]
        assert all(map(on_card, values))
        assert component_box(heat[0], 0.5) is not None
        assert authors_box(heat[0], 0.5, SIZE) is not None


@pytest.mark.parametrize("name", available_image_metrics(offline_only=True))
def test_every_metric_of_images(machine: Any, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images, others = torch.randint(0, 256, (2, 4, 3, 64, 48), generator=generator).to(torch.uint8)
    with machine():
        images, others = images.to("cuda"), others.to("cuda")
        if metric_info(name).per_sample:
            assert on_card(image_pair_score(name)(images, others))
        metric = image_metric(name).to("cuda")
        metric.update(images, others, torch.arange(4, device="cuda"))
        assert torch.isfinite(metric.compute())


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_every_sampler(machine: Any, model_there: Any, read: Any, sampler: SamplerName) -> None:
    with machine():
        batch = batch_on(read, "cuda")
        images = sample(
            model_there,
            batch["garment"],
            batch["agnostic"],
            batch["densepose"],
            seeds=SAMPLES,
            steps=2,
            guidance=2.0,
            sampler=sampler,
        )
        assert on_card(images)


@pytest.mark.parametrize("via", Backend)
@pytest.mark.parametrize("masked", [False, True])
def test_a_capture(machine: Any, model_there: Any, read: Any, via: Backend, masked: bool) -> None:
    """By either backend, with and without the mask of the queries: every map is on the CPU, no image changes."""
    with machine():
        batch = batch_on(read, "cuda")
        mask = batch["inpaint_mask"] if masked else None

        def images() -> Tensor:
            return sample(
                model_there, batch["garment"], batch["agnostic"], batch["densepose"],
                seeds=SAMPLES, steps=2, guidance=2.0,
            )  # fmt: skip

        with trace(model_there, matrix_layers=None, generated_mask=mask, via=via) as attention:
            traced = images()
        maps = attention.maps()
        made = [
            *(maps.unified(direction).on_picture(SIZE).values for direction in Direction),
            *(maps.scores(layer, over) for layer in maps.layers for over in ("reference", "generated")),
            maps.specific_reference([0, 3], 2).values,
            maps.time_level(Direction.REFERENCE_TO_GENERATED, groups=2).values,
        ]
        assert not any(map(on_card, made))
        if not masked:
            assert torch.equal(traced, images())
