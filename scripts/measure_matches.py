"""How right the matches of ``i2am data match`` are, on drawn samples whose truth is known, as a table by pattern.

    python scripts/measure_matches.py --samples 64 --seed 21

draws a dataset, has a copy without correspondence matched, and compares the two.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from i2am_train.config.data import DataMatchConfig
from i2am_train.data.match_dataset import match_dataset
from i2am_train.data.picture_files import read_correspondence
from i2am_train.data.synthetic import make_dataset
from i2am_train.data.synthetic.garments import draw_garment
from i2am_train.fingerprints import MATCHED_REPORT
from i2am_train.types import GridSize

FAR = 3 / 128
"""Share of the height beyond which a place is called wrong: 3 pixels of 128."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=21, help="of the drawing")
    parser.add_argument("--height", type=int, default=128, help="of the pictures; the width is three quarters of it")
    given = parser.parse_args()
    size = GridSize(given.height, given.height * 3 // 4)
    with TemporaryDirectory() as folder:
        truth, copy = Path(folder) / "truth", Path(folder) / "copy"
        make_dataset(truth, given.samples, 2, size, given.seed)
        shutil.copytree(truth, copy)
        for there in copy.glob("*/correspondence"):
            shutil.rmtree(there)
        print(match_dataset(DataMatchConfig(root=copy)).summary(), end="\n\n")
        print(table(truth, copy, size, given.seed))


def table(truth: Path, copy: Path, size: GridSize, seed: int) -> str:
    """Markdown: matches a sample, error of the known pixels, coverage; with all samples in the last row."""
    rows: dict[str, list[tuple[int, np.ndarray, int, int]]] = defaultdict(list)
    for name, said in json.loads((copy / MATCHED_REPORT).read_text())["samples"]["train"].items():
        ours, true = (read_correspondence(root / f"train/correspondence/{name}.png") for root in (copy, truth))
        off = np.linalg.norm((ours - true) * size, axis=-1)
        beside = np.count_nonzero(~np.isnan(ours[..., 0]) & np.isnan(true[..., 0]))
        worn = np.count_nonzero(~np.isnan(true[..., 0]))
        garment = draw_garment(np.random.default_rng([seed, int(name[:5]), 1]))
        kind = garment.pattern.replace("_", " ") + (", printed" if garment.logos else "")
        for key in (kind, "all"):
            rows[key].append((said["matches"], off[~np.isnan(off)], beside, worn))
    lines = [
        "| Cloth | Samples | Matched | Matches a sample | Covered | Median error (px) | 90 % (px) | Beyond 3/128 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key in [*sorted(rows.keys() - {"all"}), "all"]:
        matches, errors, beside, worn = zip(*rows[key], strict=True)
        off, outside = np.concatenate(errors), sum(beside)  # what lies beside the garment is wrong, too
        covered = (len(off) + outside) / sum(worn)
        cells = [key, str(len(matches)), str(np.count_nonzero(matches)), f"{np.mean(matches):.1f}", f"{covered:.1%}"]
        if len(off):
            wrong = (np.count_nonzero(off > FAR * size.height) + outside) / (len(off) + outside)
            cells += [f"{np.median(off):.2f}", f"{np.quantile(off, 0.9):.2f}", f"{wrong:.1%}"]
        lines.append(f"| {' | '.join(cells + ['–'] * (8 - len(cells)))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
