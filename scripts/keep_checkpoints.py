"""Keeps what the correlation over checkpoints is made of: ``python scripts/keep_checkpoints.py [FOLDER]``.

``FOLDER`` is that of a finished ``i2am ablate experiment=trajectory``; all its evaluated checkpoints, snapshots
included, go to ``data/results/trajectory_checkpoints.json``. Without it the ends of training are taken from
``data/results/trajectory.json``, which is all that the repository holds of its runs. ``scripts/update_readme.py`` then
makes ``correlation.md`` and the picture of that file.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from i2am_train.files import read_json
from i2am_train.reporting.model_tables import ATTENTION_METRICS, IMAGE_METRICS
from i2am_train.results.evaluations import read_evaluations
from i2am_train.results.study import arm_labels, read_results
from i2am_train.runs import MANIFEST_FILE
from i2am_train.types import Pairing

RESULTS = Path(__file__).resolve().parents[1] / "data" / "results"
CHECKPOINTS = RESULTS / "trajectory_checkpoints.json"
SCORES = (*ATTENTION_METRICS, *IMAGE_METRICS)


def of_folder(folder: Path) -> dict[str, Any]:
    """Every evaluated checkpoint of a study, and what made them."""
    rows = [
        _row(one.label, Path(one.run).name, one.step, one.snapshot, one.metrics)
        for one in read_evaluations([folder])
        if one.pairing is Pairing.PAIRED
    ]
    return _kept(read_json(folder / MANIFEST_FILE), rows)


def of_results(path: Path) -> dict[str, Any]:
    """The ends of training in the ``results.json`` of a study."""
    results = read_results(path)
    labels = arm_labels(results)
    steps = {arm["name"]: arm.get("steps") for arm in results["arms"]}
    rows = (
        _row(labels[c["arm"]], Path(c["folder"]).name, steps[c["arm"]], False, c["metrics"]) for c in results["cells"]
    )
    return _kept(results, rows)


def _row(label: str, run: str, step: int | None, snapshot: bool, metrics: Any) -> dict[str, Any]:
    scores = {name: metrics[name] for name in SCORES if name in metrics}
    return {"label": label, "run": run, "step": step, "snapshot": snapshot, "metrics": scores}


def _kept(made: Any, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    named = ("command", "git", "machine", "started")
    return {**{name: made.get(name) for name in named}, "checkpoints": list(rows)}


def main() -> None:
    given = sys.argv[1:]
    kept = of_folder(Path(given[0])) if given else of_results(RESULTS / "trajectory.json")
    CHECKPOINTS.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{len(kept['checkpoints'])} checkpoints in {CHECKPOINTS}. Next: python scripts/update_readme.py")


if __name__ == "__main__":
    main()
