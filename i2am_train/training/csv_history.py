"""Lightning's CSV logger for runs that are stopped and continued."""

import csv
import os
import warnings
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger


class ContinuedCSVLogger(CSVLogger):
    """Appends to the ``metrics.csv`` of a run folder; Lightning's own would delete the rows of earlier attempts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.parent, name=folder.name, version="")
        file = folder / "metrics.csv"
        kept = file.with_suffix(".csv.previous")
        if file.is_file():
            os.replace(file, kept)  # not deleted if the process dies before the next line but one
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*exists and is not empty.*")
            writer = self.experiment
        if kept.is_file():
            os.replace(kept, file)
            with file.open(newline="") as rows:
                writer.metrics_keys = list(csv.DictReader(rows).fieldnames or [])
