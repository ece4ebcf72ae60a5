"""Stand-ins for files that others publish."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from i2am_train.metrics import features


def publish(monkeypatch: pytest.MonkeyPatch, constant: str, file: Path) -> None:
    """Makes a stand-in the file whose digest ``features`` knows under that name."""
    known = getattr(features, constant)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    stand_in = replace(known, sha256=digest)
    monkeypatch.setattr(features, constant, stand_in)
    for table in (features.FEATURE_NETWORKS, features.PERCEPTUAL_NETWORKS):
        for name, network in table.items():
            if network.weights is known:
                monkeypatch.setitem(table, name, replace(network, weights=stand_in))  # type: ignore[arg-type]
