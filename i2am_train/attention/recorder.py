"""While the model runs: each site's queries and keys become column means, which stay on the device until the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from i2am_train.attention.frames import Frame
from i2am_train.attention.hooks import AttentionInputs
from i2am_train.attention.lookup import SiteModule, SitePlaces
from i2am_train.attention.recipe import layer_numbers
from i2am_train.attention.store import LayerRecord
from i2am_train.errors import CaptureError
from i2am_train.ops.attention import (
    HeadMatrices,
    HeadMeanMatrices,
    column_means,
    head_matrices,
    head_mean_matrices,
    keys_per_head,
    reference_mass,
)
from i2am_train.ops.grids import mask_on_grid
from i2am_train.ops.numerics import to_device
from i2am_train.types import GridSize


@dataclass(eq=False)
class SiteRecorder:
    """Collects one site over the evaluations of a sampling run.

    ``to_generated`` and ``to_reference`` hold one ``[batch, head, token]`` tensor per recorded evaluation; matrices are
    summed over evaluations, so that they cost the same for any number of steps.
    """

    site: SiteModule
    byte_budget: int
    keeps_matrices: bool = False
    keeps_heads: bool = False
    """Of the matrices, each head's."""
    generated_mask: Bool[Tensor, "batch height width"] | None = None
    to_generated: list[Tensor] = field(default_factory=list)
    to_reference: list[Tensor] = field(default_factory=list)
    mass: list[Tensor] = field(default_factory=list)
    matrices: HeadMeanMatrices | HeadMatrices | None = None
    places: SitePlaces | None = None
    key_tokens: int = 0
    heads: int | None = None
    _sizes: tuple[int, int, GridSize] | None = None
    _weights: Tensor | None = None
    _last_call: int = -1

    @property
    def calls(self) -> int:
        """Evaluations recorded so far."""
        return len(self.to_generated)

    def record(self, frame: Frame, inputs: AttentionInputs) -> None:
        """Reduce what the conditional rows of one evaluation attend with, and keep the result."""
        self._check_once_per_frame(frame)
        self._check_device(inputs.generated)
        self.heads = inputs.generated.shape[1]
        places = self._same_places(frame, inputs)
        queries = places.generated.take(inputs.generated)
        keys = places.reference.take(inputs.reference)
        means = column_means(
            queries,
            keys,
            inputs.scale,
            generated_weights=self._row_weights(places.generated.grid, queries),
            byte_budget=self.byte_budget,
        )
        self.to_generated.append(means.to_generated)
        self.to_reference.append(means.to_reference)
        if self.site.site.joint:
            at = places.reference.index
            self.mass.append(reference_mass(queries, inputs.reference, at, inputs.scale, self.byte_budget))
        if self.keeps_matrices:
            made = head_matrices if self.keeps_heads else head_mean_matrices
            self._add(made(queries, keys_per_head(keys, self.heads), inputs.scale))

    def layer_record(self, steps: Sequence[Sequence[int]]) -> LayerRecord:
        """What is kept of the site; ``steps`` are the positions of the evaluations of each sampling step.

        Raises `CaptureError` where the recipe gives the generated tokens no grid.
        """
        places = self.places
        assert places is not None, "a complete recorder has seen its tokens"
        if places.generated.grid is None:
            raise CaptureError(
                f"The recipe gives the generated tokens of layer {self.site.layer} no grid. "
                "Set the site's generated tokens to a GridSize or 'latent'."
            )
        matrices = [None, None] if self.matrices is None else list(self.matrices)
        kept = [None if total is None else (total / self.calls).float().cpu() for total in matrices]
        by_head = kept if self.keeps_heads else [None, None]
        over_reference, over_generated = (one if one is None or one.ndim == 3 else one.mean(dim=1) for one in kept)
        return LayerRecord(
            layer=self.site.layer,
            generated_grid=places.generated.grid,
            reference_grid=places.reference.grid,
            to_generated=_stack_steps(self.to_generated, steps),
            to_reference=_stack_steps(self.to_reference, steps),
            mass=_stack_steps(self.mass, steps) if self.mass else None,
            functional=self.key_tokens > 1,
            scores_over_reference=over_reference,
            scores_over_generated=over_generated,
            head_scores_over_reference=by_head[0],
            head_scores_over_generated=by_head[1],
        )

    def summary(self, model: Sequence[str]) -> SiteSummary:
        """One line about what was seen so far; ``model`` has the names of all layers."""
        places = self.places
        return SiteSummary(
            layer=self.site.layer,
            path=self.site.path,
            heads=self.heads,
            generated_grid=None if places is None else places.generated.grid,
            reference_tokens=None if places is None else places.reference.count,
            reference_grid=None if places is None else places.reference.grid,
            calls=self.calls,
            functional=self.key_tokens != 1,
            numbers=layer_numbers(self.site.layer, model),
        )

    def _same_places(self, frame: Frame, inputs: AttentionInputs) -> SitePlaces:
        """Those of the first evaluation, whose index went to the device once; looked for again where sizes differ."""
        sizes = (inputs.generated.shape[2], inputs.reference.shape[2], frame.latent)
        if self.places is not None and sizes == self._sizes:
            return self.places
        places = self.site.places(*sizes)
        if self.places is None:
            device = inputs.generated.device
            self.places = SitePlaces(places.generated.on(device), places.reference.on(device))
        for now, before in zip(places, self.places, strict=True):
            if (now.count, now.grid) != (before.count, before.grid):
                raise CaptureError(
                    f"The tokens of layer {self.site.layer} changed from {before.count} to "
                    f"{now.count} during the trace. Use one trace per picture size."
                )
        self._sizes, self.key_tokens = sizes, sizes[1]
        return self.places

    def _check_once_per_frame(self, frame: Frame) -> None:
        if frame.call == self._last_call:
            raise CaptureError(
                f"Layer {self.site.layer} ran twice in one evaluation of the denoiser (tiles, or a shared module). "
                "Switch tiling off, or write a recipe whose root is the module that runs once per tile."
            )
        self._last_call = frame.call

    def _check_device(self, generated: Tensor) -> None:
        before = self.to_generated[0].device if self.to_generated else generated.device
        if before != generated.device:
            raise CaptureError(
                f"The model moved from {before} to {generated.device} during the trace. Move it "
                "before entering the trace's block."
            )

    def _row_weights(self, grid: GridSize | None, queries: Tensor) -> Tensor | None:
        if self.generated_mask is None or grid is None:
            return None
        if self._weights is None:
            weights: Float[Tensor, "batch generated"] = mask_on_grid(self.generated_mask, grid).float()
            if weights.shape[0] != queries.shape[0]:
                raise CaptureError(
                    f"generated_mask has {weights.shape[0]} samples, but the model was called with "
                    f"{queries.shape[0]} conditional rows. Give one mask per sample."
                )
            self._weights = to_device(weights, queries.device)
        return self._weights

    def _add(self, matrices: HeadMeanMatrices | HeadMatrices) -> None:
        if self.matrices is None:
            self.matrices = matrices
        else:
            for total, more in zip(self.matrices, matrices, strict=True):
                total += more


def _stack_steps(recorded: Sequence[Tensor], steps: Sequence[Sequence[int]]) -> Tensor:
    """``[batch, step, head, token]`` where they are; evaluations of the same step are averaged."""
    means = [
        recorded[step[0]] if len(step) == 1 else torch.stack([recorded[at] for at in step]).mean(dim=0)
        for step in steps
    ]
    return torch.stack(means, dim=1).float()


def on_cpu(records: Sequence[LayerRecord]) -> tuple[LayerRecord, ...]:
    """The same layers on the CPU. Their vectors leave an accelerator in one copy, for which the host waits once."""
    names = ("to_generated", "to_reference", "mass")
    if all(record.to_generated.device.type == "cpu" for record in records):
        return tuple(records)
    there: list[dict[str, Any]] = [
        {name: vector for name in names if (vector := getattr(record, name)) is not None} for record in records
    ]
    vectors = [vector for each in there for vector in each.values()]
    sizes = [vector.numel() for vector in vectors]
    here = iter(torch.cat([vector.flatten() for vector in vectors]).cpu().split_with_sizes(sizes))
    moved: list[dict[str, Any]] = [
        {name: next(here).clone().view(vector.shape) for name, vector in each.items()} for each in there
    ]
    return tuple(replace(record, **each) for record, each in zip(records, moved, strict=True))


@dataclass(frozen=True)
class SiteSummary:
    """One line about a captured attention module."""

    layer: str
    path: str
    heads: int | None
    generated_grid: GridSize | None
    reference_tokens: int | None
    reference_grid: GridSize | None
    calls: int
    functional: bool
    numbers: str
    """Those that mean the layer in this model: ``2``, ``1-3``, or empty."""


class SiteTable(tuple[SiteSummary, ...]):
    """The captured attention modules; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        header = ("layer", "no.", "generated", "heads", "reference tokens", "grid", "calls", "functional")
        lines = [header, *(_cells(site) for site in self)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def _cells(site: SiteSummary) -> tuple[str, ...]:
    values = (
        site.layer,
        site.numbers or None,
        site.generated_grid,
        site.heads,
        site.reference_tokens,
        site.reference_grid,
        site.calls,
        "yes" if site.functional else "no (one key)",
    )
    return tuple("-" if value is None else str(value) for value in values)
