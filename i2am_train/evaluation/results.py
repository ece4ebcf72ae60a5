"""Files of an evaluation: scores as JSON, samples as JSON lines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from i2am_train.evaluation.evaluator import EvaluationResult, score_columns
from i2am_train.files import write_json, write_text
from i2am_train.metrics.registry import describe, own_metrics
from i2am_train.results.sample_scores import RESULTS, SAMPLES
from i2am_train.results.statistics import Over, mean_interval

CONFIDENCE = 0.95


def write_evaluation(folder: Path, result: EvaluationResult, settings: dict[str, Any]) -> None:
    """Writes ``samples.jsonl`` first and ``results.json`` last, whose presence says that the evaluation is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in result.rows)
    write_text(folder / SAMPLES, lines)
    write_json(
        folder / RESULTS,
        {
            "metrics": result.metrics,
            "intervals": sample_intervals(result.rows),
            "samples": len(result.rows),
            "skipped": result.skipped,
            "warnings": result.warnings,
            "protocol": result.protocol,
            "settings": settings,
            **({"own_metrics": own} if (own := own_metrics(result.metrics)) else {}),
        },
    )


def sample_intervals(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Bootstrap interval of each mean: ``low``, ``high``, ``confidence`` and ``n``, the samples with a value.

    Distances between sets have none: resampling images would change the number that they are biased by.
    """
    intervals = {}
    for name, values in score_columns(rows).items():
        known = [value for value in values if value is not None]
        low, high = mean_interval(known, Over.SAMPLES, CONFIDENCE)
        if low is not None and high is not None:
            intervals[name] = {"low": low, "high": high, "confidence": CONFIDENCE, "n": len(known)}
    return intervals


def read_results(folder: Path) -> dict[str, Any] | None:
    """The finished evaluation in a folder, or None if there is none."""
    path = folder / RESULTS
    if not path.is_file():
        return None
    results: dict[str, Any] = json.loads(path.read_text())
    describe(results.get("own_metrics", {}))
    return results
