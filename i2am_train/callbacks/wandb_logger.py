"""Lightning's W&B logger over a run that ``tracking.session`` opens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from i2am_train.tracking.session import finish_run


class TrackedLogger(WandbLogger):
    """Opens the run when it is first used, in the first process only."""

    def __init__(self, folder: Path, project: str, start: Callable[[], Any]) -> None:
        super().__init__(project=project, save_dir=folder)
        self._start = start

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The ``wandb.Run``."""
        if self._experiment is None and not hasattr(self, "_attach_id"):
            self._experiment = self._start()
        return super().experiment

    @rank_zero_only
    def end(self, *, failed: bool) -> None:
        """Ends the run, if one was opened."""
        if self._experiment is not None:
            finish_run(self._experiment, failed=failed)
            self._experiment = None
