"""Lightning's CSV logger for runs that are stopped and continued."""

import csv
import io
import warnings
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from i2am_train.environment import first_process
from i2am_train.files import write_text

FILE = "metrics.csv"


class ContinuedCSVLogger(CSVLogger):
    """Goes on with the ``metrics.csv`` of a run folder; Lightning's own would delete the rows of earlier attempts.

    ``done`` is the number of optimizer steps of the checkpoint that the run goes on from. Rows of later steps, which a
    killed attempt had come to and which are trained again, are dropped, so that every step stands there once.
    """

    def __init__(self, folder: Path, done: int) -> None:
        super().__init__(folder.parent, name=folder.name, version="")
        if not first_process():  # the others do not write, and must not touch the first one's file
            return
        file = folder / FILE
        kept = file.with_suffix(".csv.previous")
        if file.is_file():
            file.replace(kept)  # not deleted if the process dies before the file is written again
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*exists and is not empty.*")
            writer = self.experiment
        if kept.is_file():
            with kept.open(newline="") as lines:
                table = csv.DictReader(lines)
                writer.metrics_keys = list(table.fieldnames or [])
                rows = [row for row in table if _whole(row) and int(row["step"]) < done]
            text = io.StringIO()
            again = csv.DictWriter(text, writer.metrics_keys)
            again.writeheader()
            again.writerows(rows)
            write_text(file, text.getvalue())
            kept.unlink()


def _whole(row: dict[str, str | None]) -> bool:
    """False for a line that a killed process wrote half of."""
    return None not in row.values() and (row["step"] or "").isdigit()
