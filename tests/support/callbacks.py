"""Callbacks of a user that Lightning cannot call."""

import lightning as L


class Late(L.Callback):
    """Wants less than Lightning gives."""

    def on_train_batch_end(self, trainer, module):  # type: ignore[no-untyped-def, override]
        """Would fail once data and model are ready."""


def late() -> L.Callback:
    """The same out of a function."""
    return Late()
