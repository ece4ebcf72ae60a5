"""Recipes: where a model keeps its attention between generated and reference tokens.

A `Recipe` declares the module whose forward is one denoiser evaluation, the attention modules (`Site`) whose queries
are generated tokens and whose keys are reference tokens, where the tokens of the picture sit in a sequence (`Tokens`),
and which rows of the batch are conditional. Nothing is guessed from a token count: a mismatch is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from i2am_train.attention.frames import Caller, Frame
from i2am_train.errors import CaptureError
from i2am_train.ops.grids import solve_grid
from i2am_train.ops.numerics import to_device
from i2am_train.types import Backend, Branch, Canvas, GridSize

LayerId: TypeAlias = int | str
"""A layer by its name (``"up_blocks.1.attentions.1"``) or by the paper's number (``2``)."""

PAPER_LAYERS: tuple[str, ...] = tuple(
    f"up_blocks.{block}.attentions.{position}" for block in (1, 2, 3) for position in (0, 1, 2)
)
"""The paper's decoder layers 1..9 in diffusers' words, coarse to fine."""

_NUMBERED: tuple[tuple[str, int], ...] = (
    (r"(?:.*\.)?(?:output_blocks|decoders)\.(\d+)\.1", 2),
    (r"(?:.*\.)?warp_flow_blks\.(\d+)", -1),
)
"""The same nine layers in other code: a pattern of the layer's name, and what to take from the number in it."""


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
            f"layers 1..{len(PAPER_LAYERS)}. Give one of those, or a name such as {PAPER_LAYERS[1]!r}."
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


def find_layer(layer: LayerId, available: Sequence[str], model: Sequence[str] = ()) -> str:
    """The one of ``available`` that ``layer`` means; an error that lists them with their numbers if it is none.

    ``model`` has the names of all layers, which numbers count (`layer_numbers`); () where ``available`` has them all.

    >>> find_layer(2, ["output_blocks.3.1", "output_blocks.4.1"])
    'output_blocks.4.1'
    """
    name = layer_name(layer)
    if isinstance(layer, int):
        name = _numbered(model or available).get(layer, name)
    if name not in available:
        raise CaptureError(
            f"No attention layer is called {name!r}. This model has: {describe_layers(available, model)}. "
            "Choose one of them, by name or by number."
        )
    return name


def _numbered(model: Sequence[str]) -> dict[int, str]:
    """The layers that numbers mean; where several have the paper's number, the first."""
    total, known = len(PAPER_LAYERS), {paper_number(name): name for name in reversed(model)}
    if known.keys() != {None}:
        return {number: name for number, name in known.items() if number is not None}
    decoder = [name for name in model if name.startswith("up_blocks.")] or model
    return {number: decoder[(number - 1) * len(decoder) // total] for number in range(1, total + 1)}


def layer_numbers(name: str, model: Sequence[str]) -> str:
    """The numbers that mean a layer of a model with these layers, as text; empty where only its name means it.

    They are the paper's. In a model without any of the paper's layers, a number means the layer at the same depth of
    the decoder: of its layers in ``up_blocks``, or of all where there are none.

    >>> layer_numbers("blocks.1", ["blocks.0", "blocks.1"]), layer_numbers("mid", ["mid", "up_blocks.0"])
    ('6-9', '')
    """
    numbers = [number for number, known in _numbered(model).items() if known == name]
    return "-".join(map(str, sorted({min(numbers), max(numbers)}))) if numbers else ""


def describe_layers(names: Sequence[str], model: Sequence[str] = ()) -> str:
    """Names with the numbers that mean them in the model (() for that of these layers), for messages.

    >>> describe_layers(["up_blocks.1.attentions.1", "mid_block.attentions.0"])
    'up_blocks.1.attentions.1 (2), mid_block.attentions.0'
    """
    numbered = ((name, layer_numbers(name, model or names)) for name in names)
    return ", ".join(f"{name} ({numbers})" if numbers else name for name, numbers in numbered)


@dataclass(frozen=True)
class TokenPlaces:
    """Which tokens of a sequence belong to the picture, and the grid that they fill row by row."""

    index: slice | Tensor
    count: int
    grid: GridSize | None

    def take(self, tokens: Tensor) -> Tensor:
        """The chosen tokens of ``[..., token, channel]``.

        >>> Tokens(None, skip=1).places(3, GridSize(8, 8)).take(torch.tensor([[5.0], [6.0], [7.0]])).tolist()
        [[6.0], [7.0]]
        """
        return tokens[..., self.index, :]

    def on(self, device: torch.device) -> TokenPlaces:
        """The same places, with their index where the tokens are: one that is elsewhere is copied at each `take`."""
        return self if isinstance(self.index, slice) else replace(self, index=to_device(self.index, device))


def _cells(first: float | int, last: float | int, side: int, grid: GridSize) -> tuple[int, int]:
    """Bounds of a part of a grid's side, which must not cut through a cell."""
    bounds = first * side, last * side
    if any(abs(bound - round(bound)) > 1e-6 for bound in bounds):
        raise CaptureError(
            f"The recipe crops a grid of {grid} at {first:g} and {last:g} of a side of {side} "
            "cells, which cuts through cells, so that the two pictures of the canvas share tokens. "
            "Choose a picture size that each level of the network halves evenly."
        )
    return round(bounds[0]), round(bounds[1])


def _bound(bound: int, length: int) -> int:
    """Where a slice's bound lies in a sequence; not ``slice.indices``, which torch 2.11 cannot compile.

    >>> [_bound(bound, 5) for bound in (2, -2, 9, -9)]
    [2, 3, 5, 0]
    """
    return min(max(bound + length if bound < 0 else bound, 0), length)


@dataclass(frozen=True)
class Tokens:
    """Where one picture's tokens sit in a sequence of queries or keys.

    ``grid`` is a fixed grid, ``"latent"`` (solved from the latent's size at each call), or None for tokens without a
    place in a picture. ``block=(i, n)`` takes the i-th of n equal parts of the sequence (models that concatenate
    tokens); of that, ``skip`` and ``stop`` are the bounds of a slice, negative ones from the end: ``skip`` leading
    tokens (class token, pooled token) belong to no cell, and exactly ``count`` must be left (None: any number).
    ``crop=(top, bottom, left, right)`` takes a part of the grid in fractions (models that concatenate in space).
    """

    grid: GridSize | str | None = "latent"
    skip: int = 0
    stop: int | None = None
    block: tuple[int, int] = (0, 1)
    crop: tuple[float | int, float | int, float | int, float | int] = (0, 1, 0, 1)
    count: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.grid, str) and self.grid != "latent":
            raise CaptureError(f"Tokens.grid is {self.grid!r}; expected a GridSize, 'latent' or None (not spatial).")

    @property
    def whole(self) -> bool:
        """Whether they are all tokens of the sequence.

        >>> Tokens(GridSize(3, 2)).whole, Tokens(GridSize(3, 2), skip=1).whole
        (True, False)
        """
        return replace(self, grid=None, count=None) == Tokens(None)

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
        length //= parts
        start = _bound(self.skip, length)
        stop = length if self.stop is None else _bound(self.stop, length)
        count = stop - start
        if count < 1:
            raise CaptureError(
                f"Of {length} tokens none is left between {self.skip} and {self.stop}. "
                "Set the recipe's numbers of special tokens."
            )
        if self.count is not None and count != self.count:
            raise CaptureError(
                f"{count} reference tokens are left of {length}, and a model of this recipe has {self.count}. This is "
                "another model (one that attends to words, for instance), or other numbers: set those of the recipe."
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
        grid = GridSize(*self.grid)
        if grid.tokens != count:
            raise CaptureError(
                f"{count} tokens (without the special ones) do not fill a grid of {grid}. "
                "Set the recipe's grid and number of special tokens."
            )
        return grid

    def _cropped(self, start: int, grid: GridSize) -> TokenPlaces:
        top, bottom, left, right = self.crop
        rows = slice(*_cells(top, bottom, grid.height, grid))
        columns = slice(*_cells(left, right, grid.width, grid))
        cells = start + torch.arange(grid.tokens).view(grid)[rows, columns]
        whole = slice(start + rows.start * grid.width, start + rows.stop * grid.width)  # rows lie one behind the other
        index = whole if (left, right) == (0, 1) else cells.flatten()
        return TokenPlaces(index, cells.numel(), GridSize(*cells.shape))


@dataclass(frozen=True)
class Site:
    """Attention modules of one kind: all whose path below the root matches ``pattern`` entirely.

    A group called ``layer`` in the pattern names the layer; otherwise its whole path does. ``joint`` says that the
    model's own softmax runs over the generated tokens too (self-attention over both pictures): maps then see the
    reference's keys alone, and the share of attention that they get is kept as well (`AttributionMaps.mass`).

    ``via`` says how queries and keys are observed (`Backend`). By ``projections``: the two projections are submodules
    (by path) whose outputs are the projected tokens; ``heads`` is a number or an attribute of the module; ``scale``
    defaults to ``head_width ** -0.5``. By ``sdpa``: ``sdpa_call`` counts the calls of ``scaled_dot_product_attention``
    in one forward of the module, from 0, or tells it of the module as it is (an IP-Adapter attends to the text first,
    to its first picture next, and leaves out adapters whose scale is zero; -1: no call); heads and scale are those of
    the call. ``masks`` are arguments of the module's forward that keep tokens from the reference: maps know nothing of
    them, so that a call that uses one is refused.

    >>> Site("attn2", reference=Tokens(GridSize(37, 28), skip=1)).reference.places(1037, GridSize(64, 48)).grid
    GridSize(height=37, width=28)
    """

    pattern: str
    generated_projection: str = "to_q"
    reference_projection: str = "to_k"
    heads: int | str = "heads"
    generated: Tokens = Tokens()
    reference: Tokens = Tokens()
    scale: float | None = None
    joint: bool = False
    via: Backend | str = Backend.PROJECTIONS
    sdpa_call: int | Callable[[nn.Module], int] = 0
    masks: tuple[str, ...] = ("attention_mask", "mask")

    def __post_init__(self) -> None:
        if self.via not in list(Backend):
            raise CaptureError(f"There is no backend '{self.via}'. Expected one of {', '.join(Backend)}.")
        object.__setattr__(self, "via", Backend(self.via))
        if not callable(self.sdpa_call) and self.sdpa_call < 0:
            raise CaptureError(
                f"Site.sdpa_call is {self.sdpa_call}; expected the number of an attention call in "
                "the module's forward, counted from 0."
            )

    def call_in(self, module: nn.Module) -> int:
        """Which attention call of a module is meant, as it is now."""
        return self.sdpa_call(module) if callable(self.sdpa_call) else self.sdpa_call

    def layer_of(self, path: str) -> str | None:
        """Layer name of a module path, or None if the site is not there.

        >>> site = Site(r"(?P<layer>blocks\\.\\d+)\\.attn2")
        >>> site.layer_of("blocks.3.attn2"), site.layer_of("blocks.3.attn1")
        ('blocks.3', None)
        """
        match = re.fullmatch(self.pattern, path)
        if match is None:
            return None
        return str(match.groupdict().get("layer") or path)


_COMPILED = "_orig_mod"
"""Where what ``torch.compile(module)`` returns keeps the module."""


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile(module)`` returned; any other module itself."""
    return module._modules.get(_COMPILED) or module


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules below a root (``""``: itself), as they are where nothing is compiled.

    >>> [path for path, _ in named_modules(nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU())))]
    ['', '0', '1', '1.0']
    """
    for path, module in root.named_modules():
        if uncompiled(module) is module:
            yield ".".join(name for name in path.split(".") if name != _COMPILED) if _COMPILED in path else path, module


def part(target: Any, path: str) -> nn.Module | None:
    """The module at a dotted path of attributes, or None.

    >>> part(nn.Sequential(nn.Linear(2, 3)), "0"), part(nn.Linear(2, 3), "unet")
    (Linear(in_features=2, out_features=3, bias=True), None)
    """
    found = target
    for name in filter(None, path.split(".")):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def module_like(root: nn.Module, pattern: str) -> str | None:
    """Path of the first module whose path, or ``path:ClassName``, fits a pattern; None without.

    >>> module_like(nn.Sequential(nn.ReLU(), nn.Linear(2, 3)), r"\\d+:Linear")
    '1'
    """
    for path, module in named_modules(root):
        if re.fullmatch(pattern, path) or re.fullmatch(pattern, f"{path}:{type(module).__name__}"):
            return path
    return None


Rows: TypeAlias = str | Callable[[Frame], slice | None]
"""Where the conditional rows are under guidance: ``"first_half"`` or ``"second_half"`` of the batch, ``"first_call"``
(each step makes two calls, the conditional one first), ``"all"`` (never an unconditional row), or a function of the
frame (None: skip this call)."""

_HALVES = ("first_half", "second_half")
_NAMED_ROWS = ("all", *_HALVES, "first_call")
_ANSWER = (
    "Say it: trace(..., rows='second_half') or rows='first_half' for a batch of both halves of "
    "guidance, rows='all' for one without (guided=True or False in a recipe's options)."
)


def _half(name: str, batch: int) -> slice:
    if batch % 2:
        raise CaptureError(
            f"The recipe takes the {name.replace('_', ' ')} of the batch as conditional, as under classifier-free "
            f"guidance, but the model was called with {batch} rows. Without guidance use a recipe with rows='all'."
        )
    return slice(0, batch // 2) if name == "first_half" else slice(batch // 2, batch)


class LatentSize(NamedTuple):
    """How many rows an evaluation has, and the generated latent's grid."""

    rows: int
    grid: GridSize


Latent: TypeAlias = str | Callable[[Mapping[str, Any]], LatentSize]
"""Name of the argument that is the latent ``[row, channel, height, width]``, or a function of all arguments of the
denoiser's forward by name (transformers that are given packed tokens)."""


@dataclass(frozen=True)
class Recipe:
    """How to capture one kind of model.

    ``root`` is the path of the denoiser in the traced object (``""``: the object itself); ``latent`` (see `Latent`) and
    ``timestep`` are names of arguments of its forward. ``rows`` says which rows of a guided batch are conditional (see
    `Rows`), and ``guided`` whether there is guidance; None: the pipeline that calls the denoiser says so
    (`i2am_train.attention.frames`), and it is an error if nobody does. What a sampler announces comes first (see
    `i2am_train.attention.frames.announce`). ``absent`` are patterns of module paths that a model of this kind does not
    have, by which a similar one is refused. ``once_per_step`` refuses a second evaluation of a step: such a sampler
    cuts large pictures into tiles, whose maps are not those of the picture. ``canvas`` says which part of the reference
    picture the reference grid covers. ``partial`` says by which other ways the reference reaches the image, so that the
    maps do not tell all of it (or finds them in the root's modules); every result repeats it.
    """

    root: str
    sites: tuple[Site, ...]
    rows: Rows = "second_half"
    latent: Latent = "sample"
    timestep: str | None = "timestep"
    name: str = ""
    absent: tuple[str, ...] = ()
    once_per_step: bool = False
    canvas: Canvas = Canvas.STRETCH
    partial: str | Callable[[nn.Module], str | None] | None = None
    guided: bool | None = None

    def __post_init__(self) -> None:
        sites: Any = self.sites
        if not isinstance(sites, Sequence) or not all(isinstance(site, Site) for site in sites):
            raise CaptureError(
                f"Recipe.sites is {sites!r:.200}; expected a tuple of Site, with a comma also behind a single "
                "one: (Site(...),)."
            )
        if isinstance(self.rows, str) and self.rows not in _NAMED_ROWS:
            raise CaptureError(
                f"Recipe.rows is {self.rows!r}; expected one of {', '.join(_NAMED_ROWS)}, or a function of the frame."
            )

    def partial_in(self, root: nn.Module) -> str | None:
        """By which other ways the reference reaches the image in this very model."""
        return self.partial(root) if callable(self.partial) else self.partial

    def conditional_rows(self, frame: Frame) -> slice | None:
        """Conditional rows of a call (None: it has none).

        >>> guided = Frame(0, None, GridSize(8, 6), batch=4, caller=Caller(guided=True))
        >>> Recipe("", (), rows="second_half").conditional_rows(guided)
        slice(2, 4, None)
        """
        if frame.announced is not None:
            return frame.announced.conditional_rows
        if callable(self.rows):
            return self.rows(frame)
        every = slice(0, frame.batch)
        if frame.branch is not None:
            return every if frame.branch is Branch.CONDITIONAL else None
        guided = self._guided(frame.caller)
        self._check_samples(frame, guided)
        if not guided:
            return every
        if self.rows in _HALVES:
            return _half(self.rows, frame.batch)
        return every if frame.call % 2 == 0 else None

    def _guided(self, caller: Caller) -> bool:
        """Whether there is guidance; an error if nobody knows, or recipe and caller disagree."""
        given = False if self.rows == "all" else self.guided
        if given is None and caller.guided is None:
            raise CaptureError(
                f"Whoever called the model does not say whether it uses guidance, so it is not known "
                f"which rows of its batch are conditional (recipe '{self.name}'). {_ANSWER}"
            )
        if given is not None and caller.guided is not None and given != caller.guided:
            one, other = ("with", "without") if given else ("without", "with")
            raise CaptureError(
                f"The recipe '{self.name}' is {one} guidance (rows={self.rows!r}, "
                f"guided={self.guided}), and the pipeline samples {other} it. Leave the pipeline to "
                "say it (guided=None, rows=None), or call it as the recipe says."
            )
        return bool(caller.guided) if given is None else given

    def _check_samples(self, frame: Frame, guided: bool) -> None:
        """Refuse a batch that guidance alone does not explain."""
        samples = frame.caller.samples
        if samples is None:
            return
        expected = 2 * samples if guided and self.rows in _HALVES else samples
        if frame.batch != expected:
            raise CaptureError(
                f"The model was called with {frame.batch} rows for {samples} sample{'s' * (samples != 1)}; expected "
                f"{expected} {'with' if guided else 'without'} guidance. The pipeline guides in another way as well "
                "(perturbed attention, pictures and words apart), or works on parts of the picture. Switch that off, "
                "or say which rows are conditional: trace(..., rows=function of the frame)."
            )


def with_rows(recipe: Recipe, rows: Rows) -> Recipe:
    """The same recipe for a batch that is known to be so: nobody is asked about guidance.

    >>> with_rows(Recipe("", ()), "all").guided, with_rows(Recipe("", ()), "first_half").guided
    (False, True)
    """
    return replace(recipe, rows=rows, guided=None if callable(rows) else rows != "all")


def replace_backend(recipe: Recipe, via: Backend | str) -> Recipe:
    """The same recipe with all its sites observed by another backend.

    >>> replace_backend(Recipe("", (Site(r"blocks\\.\\d+\\.attn"),)), "sdpa").sites[0].via
    <Backend.SDPA: 'sdpa'>
    """
    return replace(recipe, sites=tuple(replace(site, via=via) for site in recipe.sites))
