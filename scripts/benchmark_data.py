"""What the embedded data costs: making it, and reading it.

- ``make``: `make_dataset` end to end, with worker processes, their start, and all files.
- ``read``: `TryOnDataset`, augmented as in training, sample by sample in this process.
- ``draw``: the named rival of ``make``: one process that draws and writes nothing. What ``make`` costs more
  in processor time are the files (``write``) and the start of its workers.

Processor milliseconds per sample hardly notice how many processes a machine runs beside this; wall seconds do.

    python scripts/benchmark_data.py --samples 512 --workers 2
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2

from i2am_train.data.synthetic import FOLDERS, make_dataset, write_sample
from i2am_train.data.synthetic.rendering import SyntheticSample, render_sample
from i2am_train.reporting.table import markdown_lines
from i2am_train.types import GridSize, Pairing, Split

AIM = 60.0
"""Samples per second that `make_dataset` is to reach on two cores."""
TEST_SAMPLES = 2
"""The fewest that `make_dataset` makes."""


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def measure(samples: int, work: Callable[[], object]) -> dict[str, float]:
    """Samples per second and processor milliseconds per sample of some work."""
    start, cpu_start = time.perf_counter(), processor_seconds()
    work()
    seconds, cpu_seconds = time.perf_counter() - start, processor_seconds() - cpu_start
    return {
        "samples_per_second": round(samples / seconds, 1),
        "cpu_ms_per_sample": round(1000 * cpu_seconds / samples, 2),
    }


def write_all(folder: Path, samples: list[SyntheticSample]) -> None:
    """The files of some samples."""
    for sample in samples:
        write_sample(folder, sample)


def measure_all(folder: Path, samples: int, size: GridSize, workers: int) -> dict[str, dict[str, float]]:
    """All rows of the table."""
    total = samples + TEST_SAMPLES
    root = folder / "set"
    results = {
        "make": measure(
            total, lambda: make_dataset(root, samples, TEST_SAMPLES, size, 0, workers=workers, progress=False)
        )
    }
    # Imported here, as worker processes import this file: they would load torch before they draw.
    from i2am_train.data.dataset import TryOnDataset

    few = min(samples, 128)
    dataset = TryOnDataset(root, Split.TRAIN, Pairing.PAIRED, size, augment=True)
    results["read"] = measure(few, lambda: [dataset[index] for index in range(few)])
    drawn = [render_sample(0, index, size) for index in range(few)]  # also warms up
    results["draw"] = measure(few, lambda: [render_sample(0, index, size) for index in range(few)])
    split = folder / "again"
    for name in FOLDERS:
        (split / name).mkdir(parents=True)
    results["write"] = measure(few, lambda: write_all(split, drawn))
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    """One line per kind of work."""
    rows = [
        (name, f"{row['samples_per_second']:.1f}", f"{row['cpu_ms_per_sample']:.2f}") for name, row in results.items()
    ]
    return markdown_lines(("work", "samples/s", "CPU ms/sample"), rows, right=(1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=512, help="training samples to make")
    parser.add_argument("--workers", type=int, default=2, help="processes of make_dataset")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 96), help="height and width")
    options = parser.parse_args()
    size = GridSize(*options.size)
    with tempfile.TemporaryDirectory() as folder:
        results = measure_all(Path(folder), options.samples, size, options.workers)
    print(
        f"{options.samples} samples of {size}, {options.workers} workers, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}, OpenCV {cv2.__version__}; aim: make {AIM:.0f} samples/s"
    )
    print(table(results))
    summary: dict[str, Any] = {
        "size": list(size), "samples": options.samples, "workers": options.workers, "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2), "aim_samples_per_second": AIM,
        "reached": results["make"]["samples_per_second"] >= AIM, **results,
    }  # fmt: skip
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
