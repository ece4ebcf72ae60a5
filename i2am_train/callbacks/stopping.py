"""Ends training after a number of optimizer steps."""

from typing import Any

import lightning as L


class StopAfterSteps(L.Callback):
    """Stops at ``steps``, counted over all attempts of a run.

    Not Lightning's ``max_steps``: with it, a run that is continued at an epoch's border first goes through an empty
    epoch, after which sampler and module disagree about the epoch (Lightning 2.6), and the continued run differs from
    an uninterrupted one.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A continued run may be there already."""
        self._check(trainer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Looks after every batch."""
        self._check(trainer)

    def _check(self, trainer: L.Trainer) -> None:
        if trainer.global_step >= self.steps:
            trainer.should_stop = True
