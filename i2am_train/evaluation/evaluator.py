"""The evaluator: samples images batch by batch, and scores attention and images from the same pass.

It knows nothing of Lightning or files. The callbacks drive it in validation during training; ``i2am evaluate`` keeps
what the same functions give batch by batch (``generation``) and scores the images from their files (``scoring``).
Explanations lie on the CPU; only image metrics with a network go back to a device.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torchmetrics import MetricCollection

from i2am_train.attention.trace import trace
from i2am_train.config.evaluation import AttributionConfig, EvaluateConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.config.training import TrainConfig
from i2am_train.data.dataset import TryOnBatch
from i2am_train.evaluation.explaining import explain_batch, value_or_none
from i2am_train.evaluation.explanation import Explanation
from i2am_train.evaluation.scoring import check_scores
from i2am_train.metrics.correspondence import collapse_warning
from i2am_train.metrics.imported import check_imported, metric_names
from i2am_train.metrics.registry import METRICS, image_metrics, image_pair_score, metric_info
from i2am_train.models.tryon import TryOnModel

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
            sampling=config.sampling, attribution=config.attribution, metrics=metric_names(config.evaluation.metrics)
        )


def check_settings(model: TryOnModel, settings: EvaluationSettings) -> None:
    """Fails as an evaluation would, in no time and before anything is written.

    Raises ``ConfigError`` for a metric, ``CaptureError`` for a layer that does not exist, and ``WeightsMissingError``
    for a metric whose network is not on this machine.
    """
    check_imported(Evaluator(settings, model.device).pair_scores, model.image_size)
    attribution = settings.attribution
    with trace(model, layers=attribution.layers, matrix_layers=[attribution.layer]):
        pass


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
        cls, rows: list[dict[str, Any]], set_scores: Mapping[str, float], protocol: dict[str, Any] | None = None
    ) -> "EvaluationResult":
        """Means over at least one sample, joined with the scores that only a whole set has."""
        columns = score_columns(rows)
        means = {name: _mean(values) for name, values in columns.items()} | dict(set_scores)
        metrics = {name: value for name, value in means.items() if not math.isnan(value)}
        return cls(
            metrics=metrics,
            rows=rows,
            skipped={name: values.count(None) for name, values in columns.items() if None in values},
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
        self.pair_scores = {name: image_pair_score(name) for name, info in infos.items() if info.per_sample}
        names = [name for name, info in infos.items() if not info.per_sample]
        self._set_metrics: MetricCollection = image_metrics(names).to(self.device)

    def reset(self) -> None:
        """Forgets all samples."""
        self.rows.clear()
        self._set_metrics.reset()

    @torch.no_grad()
    def update(self, model: TryOnModel, batch: TryOnBatch) -> list[Explanation]:
        """Samples and scores one batch, whose tensors must lie on the model's device."""
        made = explain_batch(model, batch, self.settings.sampling, self.settings.attribution)
        images = self._image_scores(made)
        for row, one in enumerate(made):
            scores = {name: values[row] for name, values in images.items()}
            self.rows[one.index] = {**score_row(one), **scores}
        return made

    def _image_scores(self, made: Sequence[Explanation]) -> dict[str, list[float | None]]:
        """Metrics of pairs, None where a sample has no partner; what sets need is kept in their metrics' states."""
        generated, real = (
            torch.from_numpy(np.stack([one.images[name] for one in made]))
            .permute(0, 3, 1, 2)
            .contiguous()
            .to(self.device)
            for name in ("generated", "person")
        )
        indices = torch.tensor([one.index for one in made], device=self.device)
        self._set_metrics.update(generated, real, indices)
        scores = {name: score(generated, real).tolist() for name, score in self.pair_scores.items()}
        for name, values in scores.items():
            check_scores(name, values, [one.name for one in made])
        return {
            name: [value_or_none(value) if one.paired else None for one, value in zip(made, values, strict=True)]
            for name, values in scores.items()
        }

    def compute(self) -> EvaluationResult:
        """The result over all samples of all processes; collective under torch.distributed."""
        rows = list(from_all_processes(self.rows).values())
        set_scores = {name: float(value) for name, value in self._set_metrics.compute().items()}
        for name, value in set_scores.items():
            check_scores(name, [value])
        return EvaluationResult.from_rows(rows, set_scores)


def score_row(explanation: Explanation) -> dict[str, Any]:
    """Index, names and scores of a try-on sample, as ``samples.jsonl`` has them; None where it has no value."""
    names = {"name": explanation.name, "garment_name": explanation.inputs["garment"]}
    return {"index": explanation.index, **names, **explanation.scores}


def from_all_processes(own: Mapping[int, T]) -> dict[int, T]:
    """What all processes have of their samples, by ascending index; collective under torch.distributed."""
    parts = [own]
    if dist.is_available() and dist.is_initialized():
        parts = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, own)
    together = {index: item for part in parts for index, item in part.items()}
    return dict(sorted(together.items()))


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else math.nan


def _warnings(metrics: Mapping[str, float]) -> list[str]:
    if "attention_entropy" not in metrics:  # finished images without their model
        return []
    collapse = collapse_warning(metrics.get("spread_ratio"), metrics["attention_entropy"])
    return [collapse] if collapse else []
