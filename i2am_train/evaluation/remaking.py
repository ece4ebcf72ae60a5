"""Images that are made again from the same noise, of a changed reference: what faithfulness asks of a model.

Any model that can be traced can be asked: a :class:`Remake` is all that is needed of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from i2am_train.attention.recipe import Recipe
from i2am_train.config.models import SamplingConfig
from i2am_train.data.dataset import TryOnBatch
from i2am_train.data.pictures import Image, Mask, fit_mask, fit_picture
from i2am_train.errors import ConfigError
from i2am_train.evaluation.explaining import sample_batch, value_or_none
from i2am_train.evaluation.explanation import FITS, WHITE
from i2am_train.models.sampling import SamplingStep, encoded_conditions
from i2am_train.models.traceable import Request, TraceableModel
from i2am_train.models.tryon import Conditions, TryOnModel
from i2am_train.ops.grids import mask_on_grid
from i2am_train.ops.numerics import to_unit
from i2am_train.seeds import seed_for
from i2am_train.types import Canvas, GridSize


@dataclass(frozen=True, kw_only=True)
class Remake:
    """A batch of images that can be made again from the same noise. Tensors are on the CPU, pictures in [0, 1]."""

    target: Any
    """The model, as `trace` takes it."""
    recipe: Recipe | None
    """None: the model's own."""
    names: Sequence[str]
    indices: Sequence[int]
    """Of the samples; random rankings are drawn by them."""
    reference: Float[Tensor, "batch 3 height width"]
    garment: Bool[Tensor, "batch height width"]
    """What counts of the reference."""
    mask: Bool[Tensor, "batch height width"]
    """Where the generated image is compared."""
    make: Callable[[Tensor], Tensor]
    """Images of other reference pictures; the same images for the same pictures."""
    sensitivity: Callable[[], Float[Tensor, "batch reference"]] | None = None
    """How much the denoiser's prediction inside the mask depends on each reference patch, where gradients reach it."""
    correspondence: Float[Tensor, "batch height width 2"] | None = None
    """The true reference position of each pixel of the generated image, where the data knows it."""
    worn: Bool[Tensor, "batch height width"] | None = None
    """Where the generated image shows the garment, where the data knows it."""


def batch_rows(batch: TryOnBatch, rows: Sequence[int]) -> TryOnBatch:
    """A batch of some of the samples, by their position in it.

    >>> batch_rows({"name": ["a", "b"], "index": torch.tensor([3, 8])}, [1])
    {'name': ['b'], 'index': tensor([8])}
    """
    chosen: Mapping[str, Any] = {
        name: value[list(rows)] if isinstance(value, Tensor) else [value[row] for row in rows]  # type: ignore[index]
        for name, value in batch.items()
    }
    return cast(TryOnBatch, chosen)


def remake_of(model: TryOnModel, batch: TryOnBatch, sampling: SamplingConfig) -> Remake:
    """A try-on batch, whose tensors lie on the model's device. What does not change is encoded once."""

    @cache
    def encoded() -> Conditions:
        return encoded_conditions(model, batch["garment"], batch["agnostic"], batch["densepose"])

    def make(reference: Tensor) -> Tensor:
        garment, conditions = reference.to(model.device) * 2 - 1, encoded()
        if not torch.equal(garment, batch["garment"]):
            with torch.no_grad():
                conditions = conditions._replace(tokens=model.encode_reference(garment))
        return to_unit(sample_batch(model, batch, sampling, conditions=conditions)).cpu()

    def sensitivity() -> Tensor:
        return token_sensitivity(model, batch, sampling)

    return Remake(
        target=model,
        recipe=None,
        names=batch["name"],
        indices=[int(index) for index in batch["index"]],
        reference=to_unit(batch["garment"]).cpu(),
        garment=batch["garment_mask"].cpu(),
        mask=batch["inpaint_mask"].cpu(),
        make=make,
        sensitivity=sensitivity,
        correspondence=batch["correspondence"].cpu(),
        worn=batch["warped_garment_mask"].cpu(),
    )


def remake_of_picture(
    model: TraceableModel, request: Request, *, reference_mask: Mask | None = None, name: str = "picture"
) -> Remake:
    """A picture of another person's model, as a batch of one.

    The reference is fitted to the model's canvas beforehand, so that patches are where the grid says.

    Args:
        model: loaded.
        request: what it is asked for, with the region that is painted.
        reference_mask: what counts of the reference, as large as it; None: all of it.

    Raises:
        ConfigError: the size does not fit the model, or nothing is painted.
    """
    model.check_size(request.size)
    if request.mask is None or not request.mask.any():
        raise ConfigError(
            "Images are compared inside the region that is painted, and this request has no mask, or an empty one. "
            "Give image and mask."
        )
    size, fit = _canvas(model, request), FITS[model.recipe.canvas]
    counts = np.ones(request.reference.shape[:2], np.bool_) if reference_mask is None else reference_mask

    def make(reference: Tensor) -> Tensor:
        picture = (reference[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        return _unit(model.make(replace(request, reference=picture)))

    return Remake(
        target=model.target,
        recipe=model.recipe,
        names=[name],
        indices=[0],
        reference=_unit(fit_picture(request.reference, size, fit, WHITE)),
        garment=torch.from_numpy(fit_mask(counts, size, fit))[None],
        mask=torch.from_numpy(fit_mask(request.mask, request.size, model.fit))[None],
        make=make,
    )


def _canvas(model: TraceableModel, request: Request) -> GridSize:
    """A size of the proportions that the reference's grid covers: the picture's own, the grid's, or the result's."""
    if model.recipe.canvas is Canvas.STRETCH:
        return GridSize(*request.reference.shape[:2])
    grid = model.recipe.sites[0].reference.grid
    if grid is None or isinstance(grid, str):
        return request.size
    factor = max(request.size) / max(grid)
    return GridSize(round(grid[0] * factor), round(grid[1] * factor))


def _unit(picture: Image) -> Float[Tensor, "1 3 height width"]:
    return torch.tensor(picture).permute(2, 0, 1)[None] / 255


def refuse_chance(remake: Remake) -> None:
    """Makes the images twice.

    Raises:
        ConfigError: they differ, so that a change could not be told from chance.
    """
    first, again = remake.make(remake.reference), remake.make(remake.reference)
    if not torch.equal(first, again):
        raise ConfigError(
            f"The same picture, made twice from the same seed, differs (by {(first - again).abs().mean():.2g} of the "
            "range on average), so that the effect of a change cannot be told from chance. Let the pipeline draw all "
            "its random numbers from the seed that it is given."
        )


def counted(remake: Remake, on_run: Callable[[], None]) -> Remake:
    """The same, with a function that is called after each time that the images were made, or asked for gradients."""

    def calls(made: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*reference: Tensor) -> Tensor:
            found = made(*reference)
            on_run()
            return found

        return call

    return replace(remake, make=calls(remake.make), sensitivity=remake.sensitivity and calls(remake.sensitivity))


def sample_rows(remake: Remake, columns: Mapping[str, Float[Tensor, " batch"]]) -> list[dict[str, Any]]:
    """Columns of scores as a row for each sample, ready for JSON; None in the place of NaN."""
    return [
        {"index": index, "name": name, **{key: value_or_none(float(values[row])) for key, values in columns.items()}}
        for row, (index, name) in enumerate(zip(remake.indices, remake.names, strict=True))
    ]


@torch.inference_mode(False)  # Lightning's evaluation loops turn it on, and nothing in it has a gradient
def token_sensitivity(
    model: TryOnModel, batch: TryOnBatch, sampling: SamplingConfig
) -> Float[Tensor, "batch reference"]:
    """How much the denoiser's predictions inside the inpainting mask depend on each token of the reference.

    Root mean square over the sampling steps of ``|| d<v, prediction> / d token ||``, where ``v`` is +1 or -1 by chance
    (of the sample's own stream) at each latent inside the mask: the mean square over ``v`` is the squared Frobenius
    norm of the Jacobian (Hutchinson 1990), so that derivatives of opposite sign do not cancel as in a plain sum. The
    tokens are those that the U-Net attends to; of guidance the conditional half, the other does not see them.

    One sampling run, and one backward pass per step, with the memory of a training step of this batch without its
    optimizer.
    """
    conditions = encoded_conditions(model, batch["garment"], batch["agnostic"], batch["densepose"])
    inside = mask_on_grid(batch["inpaint_mask"], model.latent_size).reshape(-1, 1, *model.latent_size)
    squares = torch.zeros(conditions.tokens.shape[:2], device=conditions.tokens.device)

    def look(step: SamplingStep) -> None:
        seeds = [seed_for(sampling.seed, "sensitivity", int(index), step.step_index) for index in batch["index"]]
        signs = [
            torch.randint(0, 2, step.noisy.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        probe = (torch.stack(signs) * 2 - 1).to(step.noisy) * inside
        at = torch.full((len(step.noisy),), step.timestep, device=step.noisy.device)
        with torch.enable_grad():
            asked = conditions.tokens.detach().requires_grad_()
            prediction = model.denoise(step.noisy, at, conditions._replace(tokens=asked))
            (gradient,) = torch.autograd.grad((prediction.float() * probe).sum(), asked)
        squares.add_(gradient.float().square().sum(dim=-1))

    sample_batch(model, batch, sampling, look, conditions)
    return (squares / sampling.steps).sqrt()[:, model.special_tokens :].cpu()
