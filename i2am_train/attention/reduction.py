"""From one site's queries and keys to what is kept of them: two vectors per head, and whole matrices
where asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from i2am_train.attention.frames import Frame
from i2am_train.attention.inputs import AttentionInputs
from i2am_train.attention.recipe import SiteModule, SitePlaces
from i2am_train.errors import CaptureError
from i2am_train.ops.attention import HeadMeanMatrices, column_means, head_mean_matrices, reference_mass
from i2am_train.ops.grids import mask_on_grid
from i2am_train.types import GridSize


@dataclass(eq=False)
class SiteRecorder:
    """Collects one site over the evaluations of a sampling run.

    ``to_generated`` and ``to_reference`` hold one ``[batch, head, token]`` tensor per recorded
    evaluation; matrices are summed over evaluations, so that they cost the same for any number of
    steps.
    """

    site: SiteModule
    byte_budget: int
    keeps_matrices: bool = False
    generated_mask: Bool[Tensor, "batch height width"] | None = None
    to_generated: list[Tensor] = field(default_factory=list)
    to_reference: list[Tensor] = field(default_factory=list)
    mass: list[Tensor] = field(default_factory=list)
    matrices: HeadMeanMatrices | None = None
    places: SitePlaces | None = None
    key_tokens: int = 0
    heads: int | None = None
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
        _, self.heads, queries_count, _ = inputs.generated.shape
        self.key_tokens = inputs.reference.shape[2]
        places = self._places_as_before(self.site.places(queries_count, self.key_tokens, frame.latent))
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
            self._add(head_mean_matrices(queries, keys, inputs.scale))

    def _places_as_before(self, places: SitePlaces) -> SitePlaces:
        first = self.places = self.places or places
        for now, before in zip(places, first, strict=True):
            if (now.count, now.grid) != (before.count, before.grid):
                raise CaptureError(
                    f"The tokens of layer {self.site.layer} changed from {before.count} to "
                    f"{now.count} during the trace. Use one trace per picture size."
                )
        return places

    def _check_once_per_frame(self, frame: Frame) -> None:
        if frame.call == self._last_call:
            raise CaptureError(
                f"Layer {self.site.layer} ran twice in one evaluation of the denoiser (tiles, or a "
                "shared module). Switch tiling off, or write a recipe whose root is the module that "
                "runs once per tile."
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
            self._weights = weights.to(queries.device)
        return self._weights

    def _add(self, matrices: HeadMeanMatrices) -> None:
        if self.matrices is None:
            self.matrices = matrices
        else:
            for total, more in zip(self.matrices, matrices, strict=True):
                total += more


@contextmanager
def undisturbed() -> Iterator[None]:
    """Where a listener computes: without gradient, and without inference tensors, which could not be used later."""
    with torch.inference_mode(False), torch.no_grad():
        yield
