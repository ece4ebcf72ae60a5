"""The files of a finished evaluation, and the scores of its single samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from i2am_train.errors import RunFolderError

RESULTS, SAMPLES = "results.json", "samples.jsonl"
"""Files of a finished evaluation; a study has a ``results.json``, too."""

SampleScores: TypeAlias = Sequence[Mapping[str, Any]]
"""Lines of ``samples.jsonl``: ``name`` and one number per per-sample metric."""


def read_samples(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The scores of single samples that an evaluation kept, or nothing if it kept none."""
    if not path.is_file():
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = tuple(json.loads(line) for line in lines if line.strip())
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is not readable JSON lines: {error}. Evaluate again.") from None
    if not all(isinstance(row, dict) for row in rows):
        raise RunFolderError(f"{path} has lines that are no JSON objects. Evaluate again.")
    return rows
