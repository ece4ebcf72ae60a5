"""Judging a model: the evaluator of a validation, and what ``i2am evaluate`` keeps of a checkpoint.

Both sample images batch by batch and score attention and images from the same pass. In validation during training the
callbacks drive an ``Evaluator``, which knows nothing of Lightning or files. ``i2am evaluate`` has two stages.

The first makes images, attention scores and panels. A batch is the unit that is kept: its rows are written last and in
one step, so that whatever stops the process leaves whole batches and at most one unfinished; the same command goes on
with the others. A batch always holds the same samples, on any number of processes and after any restart, because the
last bits of an image depend on its batch. The second stage (``scoring``) reads the finished images from their files.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torchmetrics import MetricCollection

from i2am_train.attention.trace import trace
from i2am_train.config.evaluation import AttributionConfig, EvaluateConfig, FaithfulnessConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.config.training import TrainConfig
from i2am_train.data.dataset import TryOnBatch, TryOnDataset
from i2am_train.data.picture_files import write_png
from i2am_train.data.pictures import Image
from i2am_train.errors import DataError
from i2am_train.evaluation.explaining import explain_batch, value_or_none
from i2am_train.evaluation.explanation import Explanation
from i2am_train.evaluation.faithfulness import check_faithfulness, judged_faithfulness
from i2am_train.evaluation.scoring import (
    ImageScores,
    ImageSet,
    ScoringOptions,
    batches,
    check_scores,
    read_image,
    score_images,
)
from i2am_train.files import UNFINISHED, read_json, write_json, write_text
from i2am_train.metrics.attention import collapse_warning
from i2am_train.metrics.registry import (
    check_imported,
    describe,
    image_metrics,
    image_pair_score,
    metric_info,
    metric_names,
    own_metrics,
)
from i2am_train.models.tryon import TryOnModel
from i2am_train.results.run_files import RESULTS, SAMPLES, SamplePanels, read_panels, write_panels
from i2am_train.results.statistics import sample_mean

T = TypeVar("T")

SAMPLE_NAMES = ("index", "name", "garment_name")
"""Entries of a sample's row that are not scores."""

CONFIDENCE = 0.95
"""Of the intervals over samples."""

IMAGES, PARTIAL, ROWS = "images", "partial", "rows.json"
"""Of an evaluation's folder: finished images, batches that are kept until its end, and the rows of one."""


# ---- settings and results ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is sampled and scored."""

    sampling: SamplingConfig
    attribution: AttributionConfig
    metrics: tuple[str, ...]
    """Image metrics by name; the attention scores are always computed."""
    faithful_samples: int = 0
    """First samples whose faithfulness is measured."""
    faithfulness: FaithfulnessConfig = field(default_factory=FaithfulnessConfig)

    @classmethod
    def of(cls, config: TrainConfig | EvaluateConfig) -> Self:
        """Those of a training's validation or of an evaluation.

        >>> EvaluationSettings.of(EvaluateConfig(checkpoint="tiny")).metrics[:2]
        ('ssim', 'stlpips')
        """
        first = config.validation if isinstance(config, TrainConfig) else config.evaluation
        return cls(
            sampling=config.sampling,
            attribution=config.attribution,
            metrics=metric_names(config.evaluation.metrics),
            faithful_samples=first.faithful_samples,
            faithfulness=config.evaluation.faithfulness,
        )


def check_settings(model: TryOnModel, settings: EvaluationSettings) -> None:
    """Fails as an evaluation would, in no time and before anything is written.

    Raises ``ConfigError`` for a metric, ``CaptureError`` for a layer that does not exist, and ``WeightsMissingError``
    for a metric whose network is not on this machine.
    """
    check_imported(Evaluator(settings, model.device).pair_scores, model.image_size)
    attribution = settings.attribution
    with trace(model, layers=attribution.layers, matrix_layers=[attribution.judged_layer]):
        pass
    if settings.faithful_samples:
        check_faithfulness(model, None, settings.faithfulness, settings.attribution, settings.sampling.steps)


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
    ) -> Self:
        """Means over at least one sample, joined with the scores that only a whole set has.

        >>> rows = [{"index": 0, "name": "a", "ssim": 0.5}, {"index": 1, "name": "b", "ssim": None}]
        >>> result = EvaluationResult.from_rows(rows, {"fid": 9.0})
        >>> result.metrics, result.skipped
        ({'ssim': 0.5, 'fid': 9.0}, {'ssim': 1})
        """
        names = dict.fromkeys(name for row in rows for name in row)
        rows = [{name: row.get(name) for name in names} for row in rows]  # some are of the first samples alone
        columns = _score_columns(rows)
        means = {name: _mean(values) for name, values in columns.items()} | dict(set_scores)
        metrics = {name: value for name, value in means.items() if not math.isnan(value)}
        return cls(
            metrics=metrics,
            rows=rows,
            skipped={name: values.count(None) for name, values in columns.items() if None in values},
            warnings=_warnings(metrics),
            protocol=protocol or {},
        )

    @classmethod
    def of_images(cls, rows: Sequence[Mapping[str, Any]], scores: ImageScores) -> Self:
        """Of samples whose image scores come in the order of their rows.

        >>> scores = ImageScores(pairs={"ssim": [0.5, 0.75]}, sets={}, protocol={})
        >>> EvaluationResult.of_images([{"index": 0, "name": "a"}, {"index": 1, "name": "b"}], scores).metrics
        {'ssim': 0.625}
        """
        together = [
            {**row, **{metric: values[position] for metric, values in scores.pairs.items()}}
            for position, row in enumerate(rows)
        ]
        return cls.from_rows(together, scores.sets, scores.protocol)


def _score_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Scores of all samples by metric."""
    names = [name for name in rows[0] if name not in SAMPLE_NAMES]
    return {name: [row[name] for row in rows] for name in names}


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else math.nan


def _warnings(metrics: Mapping[str, float]) -> list[str]:
    if "attention_entropy" not in metrics:  # finished images without their model
        return []
    collapse = collapse_warning(metrics.get("spread_ratio"), metrics["attention_entropy"])
    return [collapse] if collapse else []


# ---- validation --------------------------------------------------------------------------------


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
    def update(self, model: TryOnModel, batch: TryOnBatch, faithful: Container[int] = ()) -> list[Explanation]:
        """Samples and scores one batch, whose tensors must lie on the model's device.

        ``faithful`` are the indices of the samples whose faithfulness is measured, as far as they are in the batch.
        """
        settings = self.settings
        made = explain_batch(model, batch, settings.sampling, settings.attribution)
        images = self._image_scores(made)
        causes = judged_faithfulness(
            model, batch, settings.sampling, settings.attribution, settings.faithfulness, faithful
        )
        for row, one in enumerate(made):
            scores = {name: values[row] for name, values in images.items()}
            self.rows[one.index] = {**score_row(one), **causes.get(one.index, {}), **scores}
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
    """What all processes have of their samples, by ascending index; collective under torch.distributed.

    >>> from_all_processes({4: "d", 1: "a"})
    {1: 'a', 4: 'd'}
    """
    parts = [own]
    if dist.is_available() and dist.is_initialized():
        parts = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, own)
    together = {index: item for part in parts for index, item in part.items()}
    return dict(sorted(together.items()))


# ---- the first stage of i2am evaluate ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GeneratedSamples:
    """Generated images, their rows and panels, in the folder of an evaluation."""

    folder: Path
    names: tuple[str, ...]
    """Names of all samples, by position; an image is called after its person."""
    batch_size: int

    def batches(self) -> list[range]:
        """Positions of all samples, batch by batch.

        >>> GeneratedSamples(folder=Path("evaluation"), names=("a", "b", "c"), batch_size=2).batches()
        [range(0, 2), range(2, 3)]
        """
        return batches(len(self.names), self.batch_size)

    def pending(self) -> list[range]:
        """Batches that are still to be made: those without rows, or without an image.

        >>> GeneratedSamples(folder=Path("nowhere"), names=("a", "b", "c"), batch_size=2).pending()
        [range(0, 2), range(2, 3)]
        """
        return [batch for batch in self.batches() if not self._is_finished(batch)]

    def write(
        self, rows: Sequence[Mapping[str, Any]], images: Sequence[Image], panels: Sequence[SamplePanels] = ()
    ) -> None:
        """Keeps one batch, whose rows and images are in the order of their samples."""
        for row, image in zip(rows, images, strict=True):
            write_png(self.image_path(row["index"]), image)
        folder = self._folder_of(rows[0]["index"])
        if panels:
            write_panels(folder, panels)
        write_json(folder / ROWS, list(rows))

    def rows(self) -> list[dict[str, Any]]:
        """Rows of all samples, in order."""
        return [row for batch in self.batches() for row in read_json(self._folder_of(batch[0]) / ROWS)]

    def panels(self) -> list[SamplePanels]:
        """The panels of all samples that have some, in order.

        >>> GeneratedSamples(folder=Path("nowhere"), names=("a", "b", "c"), batch_size=2).panels()
        []
        """
        return [panels for batch in self.batches() for panels in read_panels(self._folder_of(batch[0]))]

    def clear(self) -> None:
        """Removes what the finished evaluation holds elsewhere."""
        shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)
        for half_written in (self.folder / IMAGES).glob(f".*{UNFINISHED}"):
            half_written.unlink()

    def image_path(self, position: int) -> Path:
        """Where the image of a sample lies.

        >>> str(GeneratedSamples(folder=Path("evaluation"), names=("a", "b"), batch_size=2).image_path(1))
        'evaluation/images/b.png'
        """
        return self.folder / IMAGES / f"{self.names[position]}.png"

    def _folder_of(self, first: int) -> Path:
        return self.folder / PARTIAL / f"batch-{first // self.batch_size:05d}"

    def _is_finished(self, batch: range) -> bool:
        images = all(self.image_path(position).is_file() for position in batch)
        return images and (self._folder_of(batch[0]) / ROWS).is_file()


def person_names(dataset: TryOnDataset) -> tuple[str, ...]:
    """Names of the persons of a dataset, by position.

    Raises:
        DataError: a person comes twice, so that one image would overwrite another.
    """
    names = [dataset.pairs[index].person for index in dataset.indices]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DataError(
            f"{len(twice)} persons come more than once in the {dataset.split} list of {dataset.root} "
            f"({', '.join(twice[:10])}), and generated images are named after persons. Keep one line of each."
        )
    return tuple(names)


def real_images(dataset: TryOnDataset) -> ImageSet:
    """The photographs of a dataset's persons, at its size."""
    return ImageSet(names=person_names(dataset), size=dataset.size, read=dataset.person_image)


def score_generated(
    samples: GeneratedSamples, real: ImageSet, options: ScoringOptions, *, paired: bool
) -> EvaluationResult:
    """Joins the rows of finished samples with the scores of their images."""
    generated = ImageSet(
        names=samples.names, size=real.size, read=lambda position: read_image(samples.image_path(position), real.size)
    )
    scores = score_images(generated, real, options, paired=paired)
    return EvaluationResult.of_images(samples.rows(), scores)


# ---- its files ---------------------------------------------------------------------------------


def write_evaluation(folder: Path, result: EvaluationResult, settings: dict[str, Any]) -> None:
    """Writes ``samples.jsonl`` first and ``results.json`` last, whose presence says that the evaluation is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in result.rows)
    write_text(folder / SAMPLES, lines)
    write_json(
        folder / RESULTS,
        {
            "metrics": result.metrics,
            "intervals": _sample_intervals(result.rows),
            "samples": len(result.rows),
            "skipped": result.skipped,
            "warnings": result.warnings,
            "protocol": result.protocol,
            "settings": settings,
            **({"own_metrics": own} if (own := own_metrics(result.metrics)) else {}),
        },
    )


def _sample_intervals(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Bootstrap interval of each mean: ``low``, ``high``, ``confidence`` and ``n``, the samples with a value.

    Distances between sets have none: resampling images would change the number that they are biased by.
    """
    found = {name: sample_mean(values, CONFIDENCE) for name, values in _score_columns(rows).items()}
    return {
        name: {key: value for key, value in entry.items() if key != "mean"}
        for name, entry in found.items()
        if entry["low"] is not None
    }


def read_results(folder: Path) -> dict[str, Any] | None:
    """The finished evaluation in a folder, or None if there is none.

    >>> read_results(Path("nowhere")) is None
    True
    """
    path = folder / RESULTS
    if not path.is_file():
        return None
    results: dict[str, Any] = json.loads(path.read_text())
    describe(results.get("own_metrics", {}))
    return results
