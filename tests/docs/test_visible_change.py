"""scripts/visible_change.py: how far pictures move by the losses and by another seed."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from i2am_train.data.picture_files import write_png
from i2am_train.results.study import ArmRun, Study

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "visible_change.py"))


def study(folder: Path, gains: list[list[float]]) -> Study:
    """Grey pictures: seeds are 20 levels apart, the arm 5 levels above the reference; gains by seed and sample."""
    runs = []
    for arm, step in (("baseline", 0), ("refined", 5)):
        for seed, of_samples in enumerate(gains):
            images = folder / f"{arm}-{seed}" / "evaluation" / "images"
            images.mkdir(parents=True)
            rows = []
            for sample, gain in enumerate(of_samples):
                write_png(images / f"{sample}.png", np.full((4, 3, 3), 100 + 20 * seed + step, np.uint8))
                rows.append({"name": str(sample), "stlpips": 0.5 - gain * (step > 0)})
            runs.append(ArmRun(arm, seed, folder / f"{arm}-{seed}", len(rows), tuple(rows), (), None))
    return Study(folder, {}, tuple(runs), ())


def test_change_by_losses_and_by_chance(tmp_path: Path) -> None:
    """Of two samples one gains in both seeds, the other in one."""
    made = study(tmp_path, [[0.1, 0.1], [0.2, -0.1]])
    read = {arm: [SCRIPT["pictures"](run) for run in made.of_arm(arm)] for arm in ("refined", "baseline")}
    rows = SCRIPT["changes"](made, read, "refined", "baseline")
    found = SCRIPT["summary"](rows)
    assert found["change_by_losses"] == pytest.approx(5 / 255)
    assert found["change_by_seed"] == pytest.approx(20 / 255)
    assert (found["better_in_all_seeds"], found["worse_in_all_seeds"], found["expected_by_chance"]) == (1, 0, 0.5)
    assert rows["0"]["stlpips"] == pytest.approx([-0.1, -0.2])


def test_the_committed_result_is_as_the_document_says() -> None:
    """Counts and changes in `losses.md`."""
    found = json.loads((ROOT / "data" / "results" / "visible_change.json").read_text())
    said = " ".join((ROOT / "data" / "results" / "losses.md").read_text().split())
    assert SCRIPT["summary"](found["by_sample"]) == {
        name: found[name] for name in SCRIPT["summary"](found["by_sample"])
    }
    assert f"by {found['change_by_losses']:.4f} of their range" in said
    assert f"by {found['change_by_seed']:.4f}" in said
    better, worse, samples = (found[name] for name in ("better_in_all_seeds", "worse_in_all_seeds", "samples"))
    assert f"better in all five seeds in {better} of {samples} samples, worse in {worse}" in said
