"""Lightning checkpoints that are never half-written."""

import pickle
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from i2am_train.errors import CheckpointError
from i2am_train.files import written

PARTS = {"state_dict", "optimizer_states", "loops", "global_step"}
"""What a checkpoint of a training holds, among others."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name first, so that a killed process leaves the last good checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves, flushes and renames."""
        with written(Path(path)) as unfinished:
            super().save_checkpoint(checkpoint, unfinished, storage_options)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Loads a checkpoint of a training, as tensors and plain values: a pickle could run any program.

        Raises:
            CheckpointError: it is something else that torch wrote.
        """
        options["weights_only"] = True
        try:
            checkpoint = super().load_checkpoint(path, *arguments, **options)
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({str(error).splitlines()[0]}). Move it away, and the run goes on from the "
                "one before."
            ) from error
        if not set(checkpoint) >= PARTS:
            raise CheckpointError(
                f"{path} is no checkpoint of a training: expected {', '.join(sorted(PARTS))} in it. Move it "
                "away, and the run goes on from the one before."
            )
        return checkpoint
