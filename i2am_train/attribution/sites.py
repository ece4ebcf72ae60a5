"""Recipes: where a model keeps its attention between generated and reference tokens.
 A `Recipe` declares the module whose forward is one denoiser evaluation, the attention modules
(`Site`) whose queries are generated tokens and whose keys are reference tokens, where the tokens of
the picture sit in a sequence (`Tokens`), and which rows of the batch are conditional. Nothing is
guessed from a token count: a mismatch is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from i2am_train.attribution.frames import Frame
from i2am_train.errors import CaptureError
from i2am_train.ops.grids import solve_grid
from i2am_train.types import Canvas, GridSize

LayerId: TypeAlias = int | str
"""A layer by its name (``"up_blocks.1.attentions.1"``) or by the paper's number (``2``)."""

PAPER_LAYERS: tuple[str, ...] = tuple(
    f"up_blocks.{block}.attentions.{position}" for block in (1, 2, 3) for position in (0, 1, 2)
)
"""The paper's decoder layers 1..9 in diffusers' words, coarse to fine (spec 1.2)."""

_NUMBERED: tuple[tuple[str, int], ...] = (
    (r"(?:.*\.)?(?:output_blocks|decoders)\.(\d+)\.1", 2),
    (r"(?:.*\.)?warp_flow_blks\.(\d+)", -1),
)
"""The same nine layers in other code: a pattern of the layer's name, and what to take from the
number in it (adapters note 1)."""


def layer_name(layer: LayerId) -> str:
    """Name of a layer; numbers are the paper's, 1..9, in diffusers' words.

    >>> layer_name(2)
    'up_blocks.1.attentions.1'
    """
    if isinstance(layer, str):
        return layer
    if not 1 <= layer <= len(PAPER_LAYERS):
        raise CaptureError(
            f"There is no layer number {layer}: the paper numbers the decoder's cross-attention "
            "layers "
            f"1..{len(PAPER_LAYERS)}. Give one of those, or a name such as {PAPER_LAYERS[1]!r}."
        )
    return PAPER_LAYERS[layer - 1]


def paper_number(name: str) -> int | None:
    """The paper's number of a layer, or None for a layer that the paper does not count.

    >>> paper_number("up_blocks.3.attentions.2"), paper_number("mid_block.attentions.0")
    (9, None)
    >>> paper_number("output_blocks.4.1"), paper_number("warp_flow_blks.4")
    (2, 5)
    """
    if name in PAPER_LAYERS:
        return PAPER_LAYERS.index(name) + 1
    for pattern, before in _NUMBERED:
        if match := re.fullmatch(pattern, name):
            number = int(match[1]) - before
            return number if 1 <= number <= len(PAPER_LAYERS) else None
    return None


def find_layer(layer: LayerId, available: Sequence[str]) -> str:
    """The one of ``available`` that ``layer`` means; an error that lists them if it is none."""
    name = layer_name(layer)
    if isinstance(layer, int):
        name = next((known for known in available if paper_number(known) == layer), name)
    if name not in available:
        raise CaptureError(
            f"No attention layer is called {name!r}. This model has: {describe_layers(available)}. "
            "Choose one of them, by name or by number."
        )
    return name


def similar_layer(layer: LayerId, available: Sequence[str]) -> str:
    """The one of ``available`` that ``layer`` means, also where the paper's numbers are not known.

    In a model without numbered layers a number means the layer at the same depth of the decoder:
    of its layers in ``up_blocks``, or of all where there are none.

    >>> similar_layer(2, ["mid_block.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1"])
    'up_blocks.0.attentions.0'
    """
    if isinstance(layer, str) or any(paper_number(name) for name in available):
        return find_layer(layer, available)
    decoder = [name for name in available if name.startswith("up_blocks.")] or list(available)
    return decoder[(layer - 1) * len(decoder) // len(PAPER_LAYERS)]


def describe_layers(names: Sequence[str]) -> str:
    """Names with the paper's numbers, for messages.

    >>> describe_layers(["up_blocks.1.attentions.1", "mid_block.attentions.0"])
    'up_blocks.1.attentions.1 (2), mid_block.attentions.0'
    """
    numbered = ((name, paper_number(name)) for name in names)
    return ", ".join(name if number is None else f"{name} ({number})" for name, number in numbered)


@dataclass(frozen=True)
class TokenPlaces:
    """Which tokens of a sequence belong to the picture, and the grid that they fill row by row."""

    index: slice | Tensor
    count: int
    grid: GridSize | None

    def take(self, tokens: Tensor) -> Tensor:
        """The chosen tokens of ``[batch, token, channel]``."""
        return tokens[:, self.index]


@dataclass(frozen=True)
class Tokens:
    """Where one picture's tokens sit in the output of a projection.

    ``grid`` is a fixed grid, ``"latent"`` (solved from the latent's size at each call), or None for
    tokens without a place in a picture. ``block=(i, n)`` takes the i-th of n equal parts of the
    sequence (models that concatenate tokens); of that, ``skip`` and ``stop`` are the bounds of a
    slice, negative ones from the end: ``skip`` leading tokens (class token, pooled token) belong to
    no cell. ``crop=(top, bottom, left, right)`` takes a part of the grid in fractions (models that
    concatenate in space).
    """

    grid: GridSize | str | None = "latent"
    skip: int = 0
    stop: int | None = None
    block: tuple[int, int] = (0, 1)
    crop: tuple[float | int, float | int, float | int, float | int] = (0, 1, 0, 1)

    def __post_init__(self) -> None:
        if isinstance(self.grid, str) and self.grid != "latent":
            raise CaptureError(
                f"Tokens.grid is {self.grid!r}; expected a GridSize, 'latent' or None (not "
                "spatial)."
            )

    def places(self, length: int, latent: GridSize) -> TokenPlaces:
        """Places of the picture's tokens in a sequence of ``length`` tokens.

        >>> Tokens(GridSize(3, 2), skip=1).places(7, GridSize(8, 8))
        TokenPlaces(index=slice(1, 7, None), count=6, grid=GridSize(height=3, width=2))
        """
        part, parts = self.block
        if length % parts:
            raise CaptureError(
                f"{length} tokens cannot be cut into {parts} equal parts, as the recipe says. "
                "Is the reference part of the sequence in this call?"
            )
        first = part * length // parts
        start, stop, _ = slice(self.skip, self.stop).indices(length // parts)
        count = stop - start
        if count < 1:
            raise CaptureError(
                f"Of {length // parts} tokens none is left between {self.skip} and {self.stop}. "
                "Set the recipe's numbers of special tokens."
            )
        grid = self._grid(count, latent)
        if grid is None or self.crop == (0, 1, 0, 1):
            return TokenPlaces(slice(first + start, first + stop), count, grid)
        return self._cropped(first + start, grid)

    def _grid(self, count: int, latent: GridSize) -> GridSize | None:
        if self.grid is None:
            return None
        if isinstance(self.grid, str):
            return solve_grid(count, latent)
        if self.grid[0] * self.grid[1] != count:
            raise CaptureError(
                f"{count} tokens (without the special ones) do not fill a grid of "
                f"{GridSize(*self.grid)}. Set the recipe's grid and number of special tokens."
            )
        return GridSize(*self.grid)

    def _cropped(self, start: int, grid: GridSize) -> TokenPlaces:
        top, bottom, left, right = self.crop
        rows = slice(round(top * grid.height), round(bottom * grid.height))
        columns = slice(round(left * grid.width), round(right * grid.width))
        cells = torch.arange(grid.tokens).view(grid)[rows, columns]
        return TokenPlaces(start + cells.flatten(), cells.numel(), GridSize(*cells.shape))


@dataclass(frozen=True)
class Site:
    """Attention modules of one kind: all whose path below the root matches ``pattern`` entirely.

    A group called ``layer`` in the pattern names the layer; otherwise its whole path does. The two
    projections are submodules (by path) whose outputs are the projected tokens; ``heads`` is a
    number or an attribute of the module; ``scale`` defaults to ``head_width ** -0.5``. ``joint``
    says that the model's own softmax runs over the generated tokens too (self-attention over both
    pictures): maps then see the reference's keys alone, and the share of attention that they get is
    kept as well (`AttributionMaps.mass`).
    """

    pattern: str
    generated_projection: str = "to_q"
    reference_projection: str = "to_k"
    heads: int | str = "heads"
    generated: Tokens = Tokens()
    reference: Tokens = Tokens()
    scale: float | None = None
    joint: bool = False

    def layer_of(self, path: str) -> str | None:
        """Layer name of a module path, or None if the site is not there."""
        match = re.fullmatch(self.pattern, path)
        if match is None:
            return None
        return str(match.groupdict().get("layer") or path)


Rows: TypeAlias = str | Callable[[Frame], slice | None]
"""``"all"``, ``"first_half"``, ``"second_half"``, or a function of the frame (None: skip this
call)."""

_NAMED_ROWS = ("all", "first_half", "second_half")


def _named_rows(name: str, batch: int) -> slice:
    if name == "all":
        return slice(0, batch)
    if batch % 2:
        raise CaptureError(
            f"The recipe takes the {name.replace('_', ' ')} of the batch as conditional, as under "
            "classifier-free "
            f"guidance, but the model was called with {batch} rows. Without guidance use a recipe "
            "with rows='all'."
        )
    return slice(0, batch // 2) if name == "first_half" else slice(batch // 2, batch)


@dataclass(frozen=True)
class Recipe:
    """How to capture one kind of model.

    ``root`` is the path of the denoiser in the traced object (``""``: the object itself);
    ``latent`` and ``timestep`` are names of arguments of its forward. ``rows`` says which rows of
    the batch are conditional whenever the sampler does not announce them itself (see
    `i2am_train.attribution.frames.announce`). ``absent`` are patterns of module paths that a model
    of this kind does not have, by which a similar one is refused. ``once_per_step`` refuses a
    second evaluation of a step: such a sampler cuts large pictures into tiles, whose maps are not
    those of the picture. ``canvas`` says which part of the reference picture the reference grid covers.
    ``partial`` says by which other ways the reference reaches the image, so that the maps do not
    tell all of it; every result repeats it.
    """

    root: str
    sites: tuple[Site, ...]
    rows: Rows = "second_half"
    latent: str = "sample"
    timestep: str | None = "timestep"
    name: str = ""
    absent: tuple[str, ...] = ()
    once_per_step: bool = False
    canvas: Canvas = Canvas.STRETCH
    partial: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rows, str) and self.rows not in _NAMED_ROWS:
            raise CaptureError(
                f"Recipe.rows is {self.rows!r}; expected one of {', '.join(_NAMED_ROWS)}, or a "
                "function of the frame."
            )

    def conditional_rows(self, frame: Frame) -> slice | None:
        """Conditional rows of a call; what the sampler announced comes first."""
        if frame.announced is not None:
            return frame.announced.conditional_rows
        if callable(self.rows):
            return self.rows(frame)
        return _named_rows(self.rows, frame.batch)
