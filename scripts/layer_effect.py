"""How much each layer's attention matters to the picture: ``python scripts/layer_effect.py``.

Samples are drawn twice from the same noise, with the steps and guidance of the study: as the model is, and with the
attention of one layer made uniform, so that each generated patch takes the mean of all reference tokens, in every step
and in both halves of guidance. The number is the mean absolute change of the pixels inside the region to paint, as a
share of the range of pixel values. A layer whose number is near 0 has no part in the picture, whatever its maps show.

It writes ``data/results/layers.json``, which ``scripts/update_readme.py`` puts into the documents.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from i2am_train.attention.recipe import PAPER_LAYERS, LayerId, layer_name
from i2am_train.config.locations import checkpoint_folder
from i2am_train.data.synthetic import FIRST_TEST_INDEX
from i2am_train.data.synthetic.rendering import render_sample
from i2am_train.environment import machine
from i2am_train.models.sampling import sample
from i2am_train.models.tryon import TryOnModel
from i2am_train.types import GridSize

RESULT = Path(__file__).resolve().parents[1] / "data" / "results" / "layers.json"
CONDITIONS = ("garment", "agnostic", "densepose")


@contextmanager
def uniform_attention(model: TryOnModel, layer: LayerId) -> Iterator[None]:
    """Within the block, queries of the layer are 0: equal logits, hence equal scores for all reference tokens."""
    name = f"{layer_name(layer)}.transformer_blocks.0.attn2.to_q"
    handle = model.unet.get_submodule(name).register_forward_hook(_zero)
    try:
        yield
    finally:
        handle.remove()


def _zero(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def layer_effects(
    model: TryOnModel, batch: dict[str, Tensor], *, steps: int, guidance: float
) -> dict[int, list[float]]:
    """Change inside the region to paint by paper layer, one value per sample, as a share of the pixels' range.

    Args:
        model: with the decoder of Stable Diffusion 1.5, whose layers the paper numbers.
        batch: ``garment``, ``agnostic``, ``densepose`` in [-1, 1], ``[sample, 3, height, width]``, and
            ``inpaint_mask``, ``[sample, height, width]``.
        steps: of DDIM.
        guidance: scale of classifier-free guidance.
    """

    def drawn() -> Tensor:
        given = {name: batch[name] for name in CONDITIONS}
        seeds = range(len(batch["garment"]))
        return sample(model, **given, seeds=seeds, steps=steps, guidance=guidance).clamp(-1, 1)

    plain, effects = drawn(), dict[int, list[float]]()
    for number in range(1, len(PAPER_LAYERS) + 1):
        with uniform_attention(model, number):
            effects[number] = changes(drawn(), plain, batch["inpaint_mask"])
    return effects


def changes(first: Tensor, second: Tensor, mask: Tensor) -> list[float]:
    """Mean absolute difference of images in [-1, 1] inside a mask, as a share of their range, for each sample."""
    inside = mask[:, None].expand_as(first)
    difference = torch.where(inside, (first - second).abs() / 2, 0.0)
    return [float(one) for one in difference.sum(dim=(1, 2, 3)) / inside.sum(dim=(1, 2, 3))]


def embedded_batch(samples: int, size: GridSize) -> dict[str, Tensor]:
    """The first held-out samples of the embedded dataset (seed 0), as the study has them."""
    drawn = [render_sample(0, FIRST_TEST_INDEX + number, size) for number in range(samples)]
    batch = {
        name: torch.stack([torch.tensor(getattr(one, name)).permute(2, 0, 1) for one in drawn]) for name in CONDITIONS
    }
    batch = {name: images / 127.5 - 1 for name, images in batch.items()}
    masks = torch.stack([torch.tensor(one.inpaint_mask) for one in drawn])
    return {**batch, "inpaint_mask": masks.bool()}


def measured(samples: int, steps: int, guidance: float) -> dict[str, Any]:
    """The result as it is kept: effects with what made them."""
    model = TryOnModel.from_pretrained(checkpoint_folder("tiny"))
    batch = embedded_batch(samples, GridSize(128, 96))
    effects = layer_effects(model, batch, steps=steps, guidance=guidance)
    return {
        "command": shlex.join(["python", "scripts/layer_effect.py", *sys.argv[1:]]),
        "machine": machine(),
        "samples": samples,
        "steps": steps,
        "guidance": guidance,
        "mean": {number: sum(values) / samples for number, values in effects.items()},
        "largest": {number: max(values) for number, values in effects.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=2.0)
    options = parser.parse_args()
    result = measured(options.samples, options.steps, options.guidance)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    for number, mean in result["mean"].items():
        print(f"layer {number}: {mean:.4f} (largest {result['largest'][number]:.4f})")


if __name__ == "__main__":
    main()
