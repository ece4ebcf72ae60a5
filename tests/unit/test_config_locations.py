"""Shipped files are found in a checkout and in a wheel's layout; missing checkpoints are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from i2am_train.config import locations
from i2am_train.errors import CheckpointError
from i2am_train.types import GridSize


def test_checkout_layout() -> None:
    """In a checkout conf/ and data/weights/ lie beside the package."""
    root = Path(locations.__file__).parents[2]
    assert locations.conf_folder() == root / "conf"
    assert locations.weights_folder() == root / "data" / "weights"
    folder = locations.dataset_folder(GridSize(64, 48), 20, 10, 3)
    assert folder == root / "data" / "synthetic-64x48-train20-test10-seed3"


def test_wheel_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a wheel both lie inside the package, and the dataset goes to the user's cache."""
    package = tmp_path / "site-packages" / "i2am_train"
    (package / "conf").mkdir(parents=True)
    monkeypatch.setattr(locations, "PACKAGE", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert locations.conf_folder() == package / "conf"
    assert locations.checkpoint_folder("tiny") == package / "weights" / "tiny"
    folder = locations.dataset_folder(GridSize(128, 96), 2000, 200, 0)
    assert folder.parent == tmp_path / "cache" / "i2am_train"


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    """The message holds the absolute path and the way out."""
    assert locations.checkpoint_folder(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match=r"no checkpoint folder /.*/nowhere\. .*'tiny'"):
        locations.checkpoint_folder(str(tmp_path / "nowhere"))
