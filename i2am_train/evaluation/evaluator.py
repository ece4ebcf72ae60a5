"""The evaluator: samples images batch by batch, and scores attention and images from the same pass.

It knows nothing of Lightning or files. The callbacks drive it in validation during training; ``i2am evaluate`` keeps
what the same functions give batch by batch (``generation``) and scores the images from their files (``scoring``).

The network and its batch lie on the model's device, and leave it together: an :class:`Explained` is on the CPU, all of
it, with the masks and the truth that its maps are judged by. Only image metrics with a network go back to a device.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torchmetrics import MetricCollection

from i2am_train.attention.maps import AttributionMaps, HeatMap, threshold
from i2am_train.attention.recipe import LayerId
from i2am_train.attention.trace import trace
from i2am_train.config.attention import AttributionConfig
from i2am_train.config.evaluation import EvaluateConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.config.training import TrainConfig
from i2am_train.data.sample import TryOnBatch, batch_on
from i2am_train.evaluation.scoring import check_scores
from i2am_train.losses.attention import attention_centers
from i2am_train.metrics.correspondence import (
    attention_entropy,
    center_spread,
    collapse_warning,
    correspondence_error,
    pck,
    spread_ratio,
    target_on_grid,
)
from i2am_train.metrics.imacs import imacs, imacs_column
from i2am_train.metrics.registry import METRICS, image_metrics, image_pair_score, metric_info
from i2am_train.models.sampling import SamplingStep, sample
from i2am_train.models.tryon import TryOnModel
from i2am_train.models.watch import Watch
from i2am_train.ops.grids import mask_on_grid
from i2am_train.ops.images import to_uint8
from i2am_train.seeds import seed_for
from i2am_train.types import Direction, GridSize

T = TypeVar("T")

SAMPLE_NAMES = ("index", "name", "garment_name")
"""Entries of a sample's row that are not scores."""

ATTENTION_METRICS = tuple(name for name, info in METRICS.items() if info.group == "attention")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is sampled and scored."""

    sampling: SamplingConfig
    attribution: AttributionConfig
    metrics: tuple[str, ...]
    """Image metrics by name; the attention scores are always computed."""

    @classmethod
    def of(cls, config: TrainConfig | EvaluateConfig) -> Self:
        """Those of a training's validation or of an evaluation."""
        return cls(
            sampling=config.sampling,
            attribution=config.attribution,
            metrics=tuple(config.evaluation.metrics),
        )


def check_settings(model: TryOnModel, settings: EvaluationSettings) -> None:
    """Fails as an evaluation would, in no time and before anything is written.

    Raises ``ConfigError`` for a metric, ``CaptureError`` for a layer that does not exist, and ``WeightsMissingError``
    for a metric whose network is not on this machine.
    """
    Evaluator(settings, model.device)
    attribution = settings.attribution
    with trace(model, layers=attribution.layers, matrix_layers=[attribution.layer]):
        pass


@dataclass(kw_only=True)
class Explained:
    """Images of one batch, the attention that made them, and what both are judged by; every tensor is on the CPU.

    Functions of it take no other batch, so that maps never meet the masks of another device or of other samples.
    """

    batch: TryOnBatch
    """What the images were made from, with the masks, the truth and the names."""
    generated: Float[Tensor, "batch 3 height width"]
    maps: AttributionMaps
    map_generated: Float[Tensor, "batch height width"]
    """Unified reference-to-generated map at image size, in [0, 1], not thresholded."""
    map_reference: Float[Tensor, "batch height width"]
    """Unified generated-to-reference map at image size, in [0, 1], not thresholded."""
    centers: Float[Tensor, "batch generated 2"]
    """Attention centres of the chosen layer, yx in reference patches."""
    scores: Float[Tensor, "batch generated reference"]
    layer: str
    generated_grid: GridSize
    reference_grid: GridSize


def generate_with_attention(
    model: TryOnModel,
    batch: TryOnBatch,
    sampling: SamplingConfig,
    attribution: AttributionConfig,
    *,
    matrix_layers: Sequence[LayerId] | None = (),
    on_step: Callable[[SamplingStep], None] | None = None,
) -> Explained:
    """Samples a batch, whose tensors lie on the model's device, and keeps the attention of that very pass.

    Every number of it is finite: NaN in a score then means "no value", and nothing else.

    What comes back is on the CPU: this is the one place where images, maps, masks and truth leave the device. Score
    matrices are kept of ``attribution.layer`` and of ``matrix_layers`` (None: of every layer); ``on_step`` is the
    sampler's.

    Raises:
        NotFiniteError: images or attention became NaN or infinite; the message says where, and of which samples.
    """
    seeds = [seed_for(sampling.seed, "sampling", int(index)) for index in batch["index"]]
    with trace(
        model,
        layers=attribution.layers,
        matrix_layers=None if matrix_layers is None else [attribution.layer, *matrix_layers],
        generated_mask=batch["inpaint_mask"] if attribution.inpaint_queries else None,
        byte_budget=attribution.byte_budget,
    ) as attention:
        generated = sample(
            model,
            batch["garment"],
            batch["agnostic"],
            batch["densepose"],
            seeds=seeds,
            steps=sampling.steps,
            guidance=sampling.guidance,
            sampler=sampling.sampler,
            names=batch["name"],
            on_step=on_step,
        )
    maps = attention.maps()
    record = maps.store.layer(attribution.layer)
    scores = maps.scores(attribution.layer)
    size = GridSize(*generated.shape[-2:])
    explained = Explained(
        batch=batch_on(batch, "cpu"),
        generated=generated.cpu(),
        maps=maps,
        map_generated=_unified(maps, Direction.REFERENCE_TO_GENERATED, attribution, size).values,
        map_reference=_unified(maps, Direction.GENERATED_TO_REFERENCE, attribution, size).values,
        centers=attention_centers(scores.reshape(*scores.shape[:2], *model.reference_grid)),
        scores=scores,
        layer=record.layer,
        generated_grid=record.generated_grid,
        reference_grid=model.reference_grid,
    )
    _check_numbers(explained)
    return explained


def _check_numbers(explained: Explained) -> None:
    watch = Watch(explained.batch["name"])
    watch.see(explained.scores, f"The attention of layer {explained.layer}")
    watch.see(explained.centers, f"The attention centres of layer {explained.layer}")
    watch.see(explained.map_generated, "The map on the generated image, over all layers and steps,")
    watch.see(explained.map_reference, "The map on the reference, over all layers and steps,")
    watch.check()


def _unified(
    maps: AttributionMaps, direction: Direction, options: AttributionConfig, size: GridSize
) -> HeatMap:
    return maps.unified(direction, options.weighting).on_picture(size)


def attention_scores(
    explained: Explained, options: AttributionConfig
) -> dict[str, Float[Tensor, " batch"]]:
    """Every attention metric of each sample; NaN where a sample has no value (empty mask, no truth)."""
    sides = {
        "imacs_g": (explained.map_generated, explained.batch["inpaint_mask"]),
        "imacs_r": (explained.map_reference, explained.batch["garment_mask"]),
    }
    scores: dict[str, Tensor] = {}
    for name, (heat_map, mask) in sides.items():
        scores |= imacs_table(name, heat_map, mask, options)
    return scores | _correspondence_scores(explained)


def imacs_table(
    name: str, heat_map: Tensor, mask: Tensor, options: AttributionConfig
) -> dict[str, Tensor]:
    """IMACS at every threshold and penalty, from one map; first of all at the options' own ones."""
    penalties = list(dict.fromkeys([options.penalty, *options.penalties]))
    table = {
        imacs_column(name, delta, penalty): values
        for delta in dict.fromkeys([options.delta, *options.deltas])
        for penalty, values in zip(
            penalties, imacs(threshold(heat_map, delta), mask, penalties), strict=True
        )
    }
    return {name: table[imacs_column(name, options.delta, options.penalty)], **table}


def _target(explained: Explained) -> Float[Tensor, "batch generated 2"]:
    return target_on_grid(
        explained.batch["correspondence"],
        explained.batch["warped_garment_mask"],
        explained.generated_grid,
        explained.reference_grid,
    )


def _correspondence_scores(explained: Explained) -> dict[str, Tensor]:
    target = _target(explained)
    mask = garment_patches(explained)
    return {
        "correspondence_error": correspondence_error(explained.centers, target),
        "pck_1": pck(explained.centers, target, 1.0),
        "pck_2": pck(explained.centers, target, 2.0),
        "center_spread": center_spread(explained.centers, mask),
        "spread_ratio": spread_ratio(explained.centers, target),
        "attention_entropy": attention_entropy(explained.scores, mask),
    }


def garment_patches(explained: Explained) -> Bool[Tensor, "batch generated"]:
    """Generated patches that lie on the garment: its warped mask where there is one, else the inpainted region."""
    batch = explained.batch
    known = batch["warped_garment_mask"].flatten(1).any(dim=1)
    mask = torch.where(known[:, None, None], batch["warped_garment_mask"], batch["inpaint_mask"])
    return mask_on_grid(mask, explained.generated_grid)


@dataclass(kw_only=True)
class Panel:
    """What the report draws of one sample; images are uint8 [height, width, 3]."""

    name: str
    garment_name: str
    images: dict[str, UInt8[Tensor, "height width 3"]]
    map_generated: Float[Tensor, "height width"]
    map_reference: Float[Tensor, "height width"]
    centers: Float[Tensor, "generated 2"]
    target_centers: Float[Tensor, "generated 2"]
    mask: Bool[Tensor, " generated"]
    inpaint_mask: Bool[Tensor, "height width"]
    garment_mask: Bool[Tensor, "height width"]
    layer: str
    generated_grid: GridSize
    reference_grid: GridSize


@dataclass(kw_only=True)
class EvaluationResult:
    """Means over the samples, the samples' own scores, and what must be said with them."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    """One for each sample, by ascending index: index, names and its scores (None: no value)."""
    skipped: dict[str, int]
    """Samples without a value, by metric, where there are any."""
    warnings: list[str]
    protocol: dict[str, Any] = field(default_factory=dict)
    """How the images were compared (``scoring.ImageScores.protocol``)."""

    @classmethod
    def from_rows(
        cls,
        rows: list[dict[str, Any]],
        set_scores: Mapping[str, float],
        protocol: dict[str, Any] | None = None,
    ) -> "EvaluationResult":
        """Means over at least one sample, joined with the scores that only a whole set has."""
        columns = score_columns(rows)
        means = {name: _mean(values) for name, values in columns.items()} | dict(set_scores)
        metrics = {name: value for name, value in means.items() if not math.isnan(value)}
        return cls(
            metrics=metrics,
            rows=rows,
            skipped={
                name: values.count(None) for name, values in columns.items() if None in values
            },
            warnings=_warnings(metrics),
            protocol=protocol or {},
        )


def score_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Scores of all samples by metric."""
    names = [name for name in rows[0] if name not in SAMPLE_NAMES]
    return {name: [row[name] for row in rows] for name in names}


@dataclass
class Evaluator:
    """Collects scores over batches; with torch.distributed every process gets the result of all samples.

    ``update`` draws its noise from each sample's own seed and touches no global random state, so evaluating during
    training does not change the training.
    """

    settings: EvaluationSettings
    device: torch.device
    rows: dict[int, dict[str, Any]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        infos = {name: metric_info(name) for name in self.settings.metrics}
        self._pair_scores = {
            name: image_pair_score(name) for name, info in infos.items() if info.per_sample
        }
        names = [name for name, info in infos.items() if not info.per_sample]
        self._set_metrics: MetricCollection = image_metrics(names).to(self.device)

    def reset(self) -> None:
        """Forgets all samples."""
        self.rows.clear()
        self._set_metrics.reset()

    @torch.no_grad()
    def update(self, model: TryOnModel, batch: TryOnBatch) -> Explained:
        """Samples and scores one batch, whose tensors must lie on the model's device."""
        explained = generate_with_attention(
            model, batch, self.settings.sampling, self.settings.attribution
        )
        scores = attention_scores(explained, self.settings.attribution)
        scores |= self._image_scores(explained)
        self.rows |= sample_rows(explained.batch, scores)
        return explained

    def _image_scores(self, explained: Explained) -> dict[str, Float[Tensor, " batch"]]:
        """Metrics of pairs, NaN where a sample has no partner; what sets need is kept in their metrics' states."""
        batch = explained.batch
        pictures = (explained.generated, batch["person"])
        generated, real = (to_uint8(images).to(self.device) for images in pictures)
        self._set_metrics.update(generated, real, batch["index"].to(self.device))
        scores = {name: score(generated, real).cpu() for name, score in self._pair_scores.items()}
        for name, values in scores.items():
            check_scores(name, values.tolist(), batch["name"])
        return {
            name: torch.where(batch["paired"], values, torch.nan) for name, values in scores.items()
        }

    def compute(self) -> EvaluationResult:
        """The result over all samples of all processes; collective under torch.distributed."""
        rows = list(from_all_processes(self.rows).values())
        set_scores = {name: float(value) for name, value in self._set_metrics.compute().items()}
        for name, value in set_scores.items():
            check_scores(name, [value])
        return EvaluationResult.from_rows(rows, set_scores)


def sample_rows(batch: TryOnBatch, scores: Mapping[str, Tensor]) -> dict[int, dict[str, Any]]:
    """Names and scores of each sample of a batch, by its index; None where a sample has no value."""
    columns = {name: values.tolist() for name, values in scores.items()}
    return {
        int(index): {
            "index": int(index),
            "name": batch["name"][position],
            "garment_name": batch["garment_name"][position],
        }
        | {name: value_or_none(values[position]) for name, values in columns.items()}
        for position, index in enumerate(batch["index"])
    }


def from_all_processes(own: Mapping[int, T]) -> dict[int, T]:
    """What all processes have of their samples, by ascending index; collective under torch.distributed."""
    parts = [own]
    if dist.is_available() and dist.is_initialized():
        parts = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, own)
    together = {index: item for part in parts for index, item in part.items()}
    return dict(sorted(together.items()))


def make_panels(explained: Explained, wanted: set[int]) -> dict[int, Panel]:
    """Panels of those samples whose index is wanted, by index."""
    batch = explained.batch
    target = _target(explained)
    mask = garment_patches(explained)
    images = {
        name: to_uint8(batch[name]).permute(0, 2, 3, 1)
        for name in ("garment", "agnostic", "densepose", "person")
    }
    images["generated"] = to_uint8(explained.generated).permute(0, 2, 3, 1)
    return {
        int(index): Panel(
            name=batch["name"][row],
            garment_name=batch["garment_name"][row],
            images={name: stack[row] for name, stack in images.items()},
            map_generated=explained.map_generated[row],
            map_reference=explained.map_reference[row],
            centers=explained.centers[row],
            target_centers=target[row],
            mask=mask[row],
            inpaint_mask=batch["inpaint_mask"][row],
            garment_mask=batch["garment_mask"][row],
            layer=explained.layer,
            generated_grid=explained.generated_grid,
            reference_grid=explained.reference_grid,
        )
        for row, index in enumerate(batch["index"])
        if int(index) in wanted
    }


def value_or_none(score: float) -> float | None:
    """The score, or None in place of NaN: the sample has no value (empty mask, no truth, no partner).

    Faults do not come here: maps and images are checked to be numbers before they are scored.
    """
    return None if math.isnan(score) else score


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else math.nan


def _warnings(metrics: Mapping[str, float]) -> list[str]:
    if "attention_entropy" not in metrics:  # finished images without their model
        return []
    collapse = collapse_warning(metrics.get("spread_ratio"), metrics["attention_entropy"])
    return [collapse] if collapse else []
