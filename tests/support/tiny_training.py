"""scripts/train_tiny_model.py on the small model, and the data that its denoiser sees."""

import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str = "train_tiny_model") -> ModuleType:
    """A file of the folder as it is imported when the program runs: with its folder in the path."""
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))
    return import_module(name)


def options(folder: Path, *words: str) -> Namespace:
    """Few steps of few samples, in a folder of their own."""
    given = ["--work", str(folder / "work"), "--output", str(folder / "model"), "--size", "64x48", "--batch", "4"]
    parsed: Namespace = script().parsed([*given, "--device", "cpu", *words])
    parsed.work.mkdir(parents=True, exist_ok=True)
    return parsed


def encoded_data(count: int = 6) -> dict[str, Tensor]:
    """Latents, garments and true correspondence (unknown in half of the cells) of that many samples of 64x48."""
    draw = torch.Generator().manual_seed(5)
    latents = {
        name: torch.randn(count, 4, 16, 12, generator=draw).half() for name in ("person", "agnostic", "densepose")
    }
    targets = {}
    for layer, cells in ((2, 4 * 3), (5, 8 * 6)):
        place = torch.rand(count, cells, 2, generator=draw) * 5
        place[:, ::2] = torch.nan
        targets[f"target_{layer}"] = place
    garment = torch.randint(0, 256, (count, 64, 48, 3), generator=draw, dtype=torch.uint8)
    return latents | {"garment": garment} | targets
