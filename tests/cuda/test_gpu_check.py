"""What ``scripts/gpu_check.sh`` measures on a card, on the one that is not there: every part gives its figures."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_training import script

SCRIPT = script("gpu_check")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]  # Lightning's own deprecations

FIGURES = {
    "loop": {"refined: loop / bare", "baseline: loop / bare"},
    "steps": {"refined / baseline, cached", "speed of our uncached step / diffusers' loop"},
    "sampling": {
        "traced / plain sampling, batch 1",
        "extra peak memory of a capture, batch 8, MiB",
        "memory that CUDA graphs keep, batch 8, MiB",
    },
    "waits": {"host waits a step, traced sampling", "host waits in five steps of the training loop"},
    "precision": {"bf16 encoders, encoded_garment, relative difference"},
    "growth": {"capture of a layer, 512x384, 2305 tokens, ms", "losses of a layer, 1024x768, 1037 tokens, ms"},
    "batches": {"refined, cached, batch 1: images a second", "refined, cached, checkpointed, batch 1: peak GiB"},
}


@pytest.mark.parametrize("part", FIGURES)
def test_a_part_gives_its_figures(part: str, machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "figures.jsonl"
    words = ["--shape", "small", "--batch", "1", "--batches", "1", "--steps", "1", "--rounds", "1", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words, "--only", part, "--output", str(output)])
    with machine() as seen:
        SCRIPT.main()
    assert seen.operations > 100
    rows = {row["figure"]: row["value"] for row in map(json.loads, output.read_text().splitlines())}
    assert rows.keys() >= FIGURES[part]
    assert all(isinstance(value, float | int) and math.isfinite(value) for value in rows.values()), rows
