"""Runs that make images again (``i2am faithful``, ``i2am diagnose``), stopped on the way."""

from typing import Any

import pytest

from i2am_train.workflows import faithful


def stopped_in_second_batch(monkeypatch: pytest.MonkeyPatch, measure: str) -> list[list[str]]:
    """The names of the samples that the workflow's function ``measure`` is asked about, batch by batch from now on; the
    second batch is stopped by Ctrl-C."""
    real = getattr(faithful, measure)
    asked: list[list[str]] = []

    def measured(remake: Any, *others: Any) -> Any:
        asked.append(list(remake.names))
        if len(asked) == 2:
            raise KeyboardInterrupt("stop")
        return real(remake, *others)

    monkeypatch.setattr(faithful, measure, measured)
    return asked
