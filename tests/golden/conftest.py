"""Reads the golden files: values that were derived by hand or from the authors' own functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture
def golden() -> Callable[[str], dict[str, Any]]:
    """A function that returns the content of the golden file whose name starts so."""

    def read(prefix: str) -> dict[str, Any]:
        (path,) = DATA.glob(f"{prefix}_*.json")
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    return read
