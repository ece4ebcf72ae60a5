"""Whether a person sees what the losses do: ``python scripts/visible_change.py STUDY DATA [ARM]``.

``STUDY`` is the folder of a finished ``i2am ablate`` with several seeds, ``DATA`` the dataset that it judged, ``ARM``
one of its arms (``refined``). All held-out samples are compared, none is picked by hand:

- How far do the pixels of a picture move, as a share of their range (mean absolute difference), by the losses (the arm
  against the reference arm at the same seed), and by chance (the reference arm at two seeds)? Where the first is not
  above the second, the losses show no more than another seed does.
- In how many samples is the distance to the real picture (ST-LPIPS) smaller in every seed, and in how many larger? By
  chance it is one in ``2 ** seeds`` each.

It writes ``data/results/visible_change.json``, and as ``data/figures/visible_change.png`` the samples in which the
distance falls most among those where it falls in every seed.
"""

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from i2am_train.data.layouts import VitonHDLayout
from i2am_train.data.picture_files import read_rgb
from i2am_train.reporting.figures.canvas import add_bare_axes, new_figure, save_figure
from i2am_train.results.study import ArmRun, Study, arm_labels, read_study, reference_arm
from i2am_train.types import Role, Split

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "data" / "results" / "visible_change.json"
FIGURE = ROOT / "data" / "figures" / "visible_change.png"
SHOWN = 4
"""Samples in the figure."""
GAIN = 4
"""How much brighter the difference is drawn."""


Pictures = dict[str, NDArray[np.float64]]
"""Generated pictures by name, in 0..1."""


def pictures(run: ArmRun) -> Pictures:
    """Those of a run."""
    files = sorted((run.folder / "evaluation" / "images").glob("*.png"))
    return {file.stem: read_rgb(file) / 255 for file in files}


def changes(study: Study, made: dict[str, list[Pictures]], arm: str, reference: str) -> dict[str, Any]:
    """By sample: movement of pixels by the losses and by chance, and the difference of ST-LPIPS in each seed.

    ``made`` are the pictures of both arms, seed by seed.
    """
    scores = {
        name: [{row["name"]: row["stlpips"] for row in run.samples} for run in study.of_arm(name)] for name in made
    }
    seeds = range(len(made[reference]))
    rows = {}
    for sample in made[reference][0]:
        of_arm, of_reference = ([one[sample] for one in made[name]] for name in (arm, reference))
        rows[sample] = {
            "by_losses": float(np.mean([np.abs(of_arm[seed] - of_reference[seed]).mean() for seed in seeds])),
            "by_seed": float(np.mean([np.abs(a - b).mean() for a, b in combinations(of_reference, 2)])),
            "stlpips": [scores[arm][seed][sample] - scores[reference][seed][sample] for seed in seeds],
        }
    return rows


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """Means over samples, and counts of samples in which all seeds agree.

    >>> rows = {"a": {"by_losses": 0.2, "by_seed": 0.1, "stlpips": [-1, -2]}}
    >>> summary(rows)["better_in_all_seeds"], summary(rows)["expected_by_chance"]
    (1, 0.25)
    """
    differences = np.array([row["stlpips"] for row in rows.values()])
    return {
        "samples": len(rows),
        "seeds": differences.shape[1],
        "change_by_losses": float(np.mean([row["by_losses"] for row in rows.values()])),
        "change_by_seed": float(np.mean([row["by_seed"] for row in rows.values()])),
        "better_in_all_seeds": int((differences < 0).all(axis=1).sum()),
        "worse_in_all_seeds": int((differences > 0).all(axis=1).sum()),
        "expected_by_chance": len(rows) / 2 ** differences.shape[1],
    }


def draw(
    study: Study, made: dict[str, list[Pictures]], rows: dict[str, Any], arm: str, reference: str, data: Path
) -> None:
    """The samples whose distance falls most, of those where it falls in every seed, else of all."""
    order = sorted(rows, key=lambda name: (max(rows[name]["stlpips"]) >= 0, np.mean(rows[name]["stlpips"])))
    layout, labels = VitonHDLayout(data, Split.TEST), arm_labels(study.results)
    figure = new_figure(8.0, 2.1 * SHOWN + 0.3)
    top, height = 1 - 0.3 / figure.get_figheight(), 2.1 / figure.get_figheight()
    for row, name in enumerate(order[:SHOWN]):
        before, after = made[reference][0][name], made[arm][0][name]
        columns = {
            "garment": read_rgb(layout.path(Role.GARMENT, name)) / 255,
            "real": read_rgb(layout.path(Role.PERSON, name)) / 255,
            labels[reference].lower(): before,
            labels[arm].lower(): after,
            f"difference x {GAIN}": np.clip(np.abs(after - before) * GAIN, 0, 1),
        }
        for column, (title, picture) in enumerate(columns.items()):
            axes = add_bare_axes(figure, (0.005 + 0.2 * column, top - height * (row + 0.97), 0.19, height * 0.95))
            axes.imshow(picture)
            if row == 0:
                axes.set_title(title, fontsize=9)
    save_figure(figure, FIGURE, dpi=150)


def main() -> None:
    folder, data, *rest = map(Path, sys.argv[1:])
    study, arm = read_study(folder), str(rest[0]) if rest else "refined"
    reference = reference_arm(study.results)
    assert reference is not None, "the study names no reference arm"
    made = {name: [pictures(run) for run in study.of_arm(name)] for name in (arm, reference)}
    rows = changes(study, made, arm, reference)
    found = {"study": study.results["command"], "arm": arm, **summary(rows), "by_sample": rows}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    draw(study, made, rows, arm, reference, data)
    print(json.dumps({name: value for name, value in found.items() if name != "by_sample"}, indent=1))


if __name__ == "__main__":
    main()
