"""The first stage of judging a checkpoint: images, attention scores and panels, kept batch by batch.

A batch is the unit that is kept. Its rows are written last and in one step, so that whatever stops the process leaves
whole batches and at most one unfinished; the same command goes on with the others. A batch always holds the same
samples, on any number of processes and after any restart, because the last bits of an image depend on its batch. The
second stage (``scoring``) reads the finished images from their files.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from i2am_train.data.dataset import TryOnDataset
from i2am_train.data.picture_files import write_png
from i2am_train.data.pictures import Image
from i2am_train.errors import DataError
from i2am_train.evaluation.evaluator import EvaluationResult
from i2am_train.evaluation.folders import ImageSet, read_image
from i2am_train.evaluation.scoring import ImageScores, ScoringOptions, score_images
from i2am_train.files import UNFINISHED, read_json, write_json
from i2am_train.results.panels import SamplePanels, read_panels, write_panels

IMAGES, PARTIAL, ROWS = "images", "partial", "rows.json"


def batches(count: int, size: int) -> list[range]:
    """Positions of ``count`` samples, batch by batch.

    >>> batches(5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


@dataclass(frozen=True, kw_only=True)
class GeneratedSamples:
    """Generated images, their rows and panels, in the folder of an evaluation."""

    folder: Path
    names: tuple[str, ...]
    """Names of all samples, by position; an image is called after its person."""
    batch_size: int

    def batches(self) -> list[range]:
        """Positions of all samples, batch by batch."""
        return batches(len(self.names), self.batch_size)

    def pending(self) -> list[range]:
        """Batches that are still to be made."""
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
        """The panels of all samples that have some, in order."""
        return [panels for batch in self.batches() for panels in read_panels(self._folder_of(batch[0]))]

    def clear(self) -> None:
        """Removes what the finished evaluation holds elsewhere."""
        shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)
        for half_written in (self.folder / IMAGES).glob(f".*{UNFINISHED}"):
            half_written.unlink()

    def image_path(self, position: int) -> Path:
        """Where the image of a sample lies."""
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
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
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
    return joined_result(samples.rows(), scores)


def joined_result(rows: Sequence[Mapping[str, Any]], scores: ImageScores) -> EvaluationResult:
    """The result of samples whose image scores come in the order of their rows."""
    together = [
        {**row, **{metric: values[position] for metric, values in scores.pairs.items()}}
        for position, row in enumerate(rows)
    ]
    return EvaluationResult.from_rows(together, scores.sets, scores.protocol)
