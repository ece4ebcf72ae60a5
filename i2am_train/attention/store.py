"""What a capture leaves behind: per layer, step and head two maps on their own grids. Every map is a view of this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from i2am_train.attention.recipe import LayerId, find_layer, paper_number, similar_layer
from i2am_train.errors import CaptureError
from i2am_train.types import Canvas, Direction, GridSize


@dataclass(frozen=True)
class LayerRecord:
    """One layer's attention over a sampling run.

    ``to_generated`` and ``to_reference`` are probabilities: each sums to one over its last axis.
    The optional score matrices are means over heads and steps; ``scores_over_reference`` has rows
    that sum to one (who a generated token looks at), ``scores_over_generated`` has columns that do
    (where a reference token goes). ``functional`` is False where a single reference token makes
    queries and keys irrelevant to the picture (a softmax over one key is one whatever they are).
    ``mass`` is the share of its attention that a generated token gives to the reference, where the
    model's own softmax runs over both pictures; elsewhere it is one, and None
    here.
    """

    layer: str
    generated_grid: GridSize
    reference_grid: GridSize | None
    to_generated: Float[Tensor, "batch step head generated"]
    to_reference: Float[Tensor, "batch step head reference"]
    functional: bool = True
    scores_over_reference: Float[Tensor, "batch generated reference"] | None = None
    scores_over_generated: Float[Tensor, "batch generated reference"] | None = None
    mass: Float[Tensor, "batch step head generated"] | None = None

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.to_generated.shape[2]

    def grid(self, direction: Direction) -> GridSize:
        """The grid that a direction's map lies on."""
        if direction is Direction.REFERENCE_TO_GENERATED:
            return self.generated_grid
        if self.reference_grid is None:
            raise CaptureError(
                f"The reference tokens of layer {self.layer} have no place in the reference "
                "picture (pooled vectors or words), so there is no map on it. Use "
                "Direction.REFERENCE_TO_GENERATED, or give the recipe a reference grid."
            )
        return self.reference_grid

    def sample(self, row: int) -> LayerRecord:
        """Only one sample of the batch."""
        cut: dict[str, Any] = {
            name: value[row : row + 1] for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **cut)

    def vectors(self, direction: Direction) -> Float[Tensor, "batch step head token"]:
        """The column means of a direction."""
        to_generated = direction is Direction.REFERENCE_TO_GENERATED
        return self.to_generated if to_generated else self.to_reference


@dataclass(frozen=True)
class AttributionStore:
    """All captured layers of one sampling run, in the order in which the model runs them.

    ``timesteps`` holds the scheduler's number of each step, noisiest first, or None where the model
    was not told. ``recipe``, ``partial`` and ``canvas`` are those of the recipe
    (`i2am_train.attention.recipe.Recipe`). ``model`` names all layers of the recipe, captured or
    not, by which layer numbers are understood; empty: those that were captured.
    """

    layers: tuple[LayerRecord, ...]
    timesteps: tuple[float | int | None, ...]
    recipe: str = ""
    partial: str | None = None
    canvas: Canvas = Canvas.STRETCH
    model: tuple[str, ...] = ()

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.layers[0].to_generated.shape[0]

    @property
    def steps(self) -> int:
        """Number of sampling steps."""
        return len(self.timesteps)

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Those that have a map: both, or only that on the generated image if reference tokens of
        some layer have no place in the reference picture."""
        spatial = all(record.reference_grid is not None for record in self.layers)
        return tuple(Direction) if spatial else (Direction.REFERENCE_TO_GENERATED,)

    @property
    def functional(self) -> bool:
        """Whether queries and keys of any layer can influence the image."""
        return any(record.functional for record in self.layers)

    @property
    def joint(self) -> bool:
        """Whether the model's own softmax runs over both pictures, so that every layer has a ``mass``."""
        return all(record.mass is not None for record in self.layers)

    @property
    def marks(self) -> tuple[str, ...]:
        """What a reader must know before trusting the maps, each a short sentence; empty if nothing."""
        unmoved = "not functional: with a single reference token, queries and keys cannot influence "
        found = [] if self.functional else [unmoved + "the image"]
        return (*found, *(() if self.partial is None else (f"partial: {self.partial}",)))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(record.layer for record in self.layers)

    def layer(self, layer: LayerId) -> LayerRecord:
        """One layer by name or by number (`similar_layer`)."""
        return self.layers[self.index(layer)]

    def index(self, layer: LayerId) -> int:
        """Position of a layer among those captured; an error that lists them if it is none."""
        name = similar_layer(layer, self.model or self.names)
        return self.names.index(find_layer(name, self.names))

    def select(self, layers: Sequence[LayerId]) -> AttributionStore:
        """Only the given layers."""
        return replace(self, layers=tuple(self.layer(layer) for layer in layers))

    def sample(self, row: int) -> AttributionStore:
        """Only one sample of the batch."""
        return replace(self, layers=tuple(record.sample(row) for record in self.layers))


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
        paper_number(site.layer),
        site.generated_grid,
        site.heads,
        site.reference_tokens,
        site.reference_grid,
        site.calls,
        "yes" if site.functional else "no (one key)",
    )
    return tuple("-" if value is None else str(value) for value in values)


def not_finite(store: AttributionStore) -> str | None:
    """Where the first map that is not finite comes from, in words; None if all are finite."""
    found = [(step, record.layer) for record in store.layers if (step := _first_step(record)) is not None]
    if not found:
        return None
    step, layer = min(found, key=lambda where: where[0])
    if step == store.steps:
        return f"the score matrix of layer {layer}"
    timestep = store.timesteps[step]
    at = "" if timestep is None else f" (timestep {timestep:g})"
    return f"the attention of layer {layer} in step {step + 1} of {store.steps}{at}"


def _first_step(record: LayerRecord) -> int | None:
    """The first step with a vector that is not finite, counted from 0; the number of steps if only a
    score matrix is not; None if all is."""
    vectors = [v for v in (record.to_generated, record.to_reference, record.mass) if v is not None]
    # Which steps of ``[batch, step, head, token]`` hold a value that is not finite.
    at_fault = [~v.isfinite().transpose(0, 1).flatten(1).all(dim=1) for v in vectors]
    steps = [int(bad.nonzero()[0]) for bad in at_fault if bad.any()]
    if steps:
        return min(steps)
    matrices = record.scores_over_reference, record.scores_over_generated
    finite = all(bool(matrix.isfinite().all()) for matrix in matrices if matrix is not None)
    return None if finite else record.to_generated.shape[1]
