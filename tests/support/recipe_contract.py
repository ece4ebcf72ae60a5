"""A slow transcription of the maps, and what a recipe must do for any model (`RecipeContract`).

A `Case` is one model of a recipe's structure with random weights. Nothing here uses the package's
hooks, token places or sums: projections are computed again, in float64, from what the model's own
attention modules were given, for one call, sample and head at a time; which tokens are the picture's
is a list written out in the case.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from i2am_train.attention import AttributionMaps, Recipe, Trace, named_recipe, trace
from i2am_train.attention.recorder import SiteTable
from i2am_train.types import Direction, GridSize

STEPS = 2
BATCHES = (2, 3)
R2G, G2R = Direction.REFERENCE_TO_GENERATED, Direction.GENERATED_TO_REFERENCE


@dataclass(frozen=True)
class ExpectedSite:
    """One attention module as the model's authors have it.

    ``path`` is below the denoiser; ``generated`` and ``reference`` are the places of the pictures'
    tokens in the sequences of queries and keys, row by row.
    """

    path: str
    layer: str
    heads: int
    grid: GridSize
    generated: Sequence[int]
    reference: Sequence[int]
    reference_grid: GridSize | None


def given_to_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What queries and keys are projected from, for attention modules like those of diffusers."""
    context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    return args[0], args[0] if context is None else context


def has_guidance(guided: bool) -> dict[str, Any]:
    """Options of nearly every recipe."""
    return {"guided": guided}


def second_half(call: int, rows: int, guided: bool) -> slice | None:
    """Conditional rows where the unconditional ones come first."""
    return slice(rows // 2, rows) if guided else slice(0, rows)


def first_half(call: int, rows: int, guided: bool) -> slice | None:
    """Conditional rows where they come first."""
    return slice(0, rows // 2) if guided else slice(0, rows)


@dataclass(frozen=True, eq=False)
class Case:
    """One row of the support table.

    ``build`` makes what a user would trace (float64, random weights); ``run(target, batch, step,
    guided)`` is one sampling step of so many samples, of which the conditional rows are
    ``rows(call, rows, guided)`` (None: the whole call is unconditional). ``root`` is where the
    denoiser is in the target. ``given`` reads what a site's module was called with, ``keys`` and
    ``queries`` are its projections.
    """

    recipe: str
    build: Callable[[], Any]
    run: Callable[[Any, int, int, bool], Any]
    sites: tuple[ExpectedSite, ...]
    root: str = "unet"
    rows: Callable[[int, int, bool], slice | None] = second_half
    options: Callable[[bool], dict[str, Any]] = has_guidance
    given: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any] = given_to_attention
    queries: str = "to_q"
    keys: str = "to_k"
    joint: bool = False
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.recipe

    def denoiser(self, target: Any) -> nn.Module:
        """The module whose forward is one evaluation."""
        return functools.reduce(getattr, filter(None, self.root.split(".")), target)

    def modules(self, target: Any) -> dict[str, nn.Module]:
        """Attention modules by layer."""
        root = self.denoiser(target)
        return {site.layer: root.get_submodule(site.path) for site in self.sites}

    def sample(self, target: Any, batch: int, guided: bool) -> None:
        """A whole sampling run."""
        for step in range(STEPS):
            self.run(target, batch, step, guided)


def project(linear: nn.Module, tokens: Tensor) -> Tensor:
    """A projection in float64, with an adapter's ``B A`` (peft) written out."""
    base = getattr(linear, "base_layer", linear)
    weight = base.weight.double()
    if base is not linear:
        name = "default"
        down, up = linear.lora_A[name].weight.double(), linear.lora_B[name].weight.double()
        weight = weight + linear.scaling[name] * up @ down
    projected = tokens.double() @ weight.T
    return projected if base.bias is None else projected + base.bias.double()


@dataclass
class Witness:
    """Notes what every site is given in each evaluation, inside the denoiser's forward."""

    case: Case
    target: Any
    calls: int = -1
    inside: bool = False
    batch: int = 0
    seen: dict[str, list[tuple[int, int, Tensor, Tensor]]] = field(default_factory=dict)

    def __enter__(self) -> "Witness":
        root = self.case.denoiser(self.target)
        self.handles = [
            root.register_forward_pre_hook(self._enter, with_kwargs=True),
            root.register_forward_hook(self._leave),
        ]
        for layer, module in self.case.modules(self.target).items():
            note = functools.partial(self._note, layer)
            self.handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls, self.inside = self.calls + 1, True
        self.batch = next(value for value in (*args, *kwargs.values()) if value.ndim == 4).shape[0]

    def _leave(self, *_: Any) -> None:
        self.inside = False

    def _note(self, layer: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.inside:
            hidden, context = self.case.given(module, args, kwargs)
            call = self.calls, self.batch, hidden.detach(), context.detach()
            self.seen.setdefault(layer, []).append(call)


@dataclass(frozen=True)
class SlowLayer:
    """What the package must have found: ``[batch, step, head, token]``, float64."""

    site: ExpectedSite
    to_generated: Tensor
    to_reference: Tensor
    mass: Tensor


def slow_attention(queries: Tensor, keys: Tensor, every: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One head of one sample: the two column means (paper eq. 6), and the reference's share."""
    scale = queries.shape[-1] ** -0.5
    weights, all_weights = (scale * queries @ keys.T).exp(), (scale * queries @ every.T).exp()
    over_generated = weights / weights.sum(dim=0, keepdim=True)
    over_reference = weights / weights.sum(dim=1, keepdim=True)
    share = weights.sum(dim=1) / all_weights.sum(dim=1)
    return over_generated.mean(dim=1), over_reference.mean(dim=0), share


def slow_layer(case: Case, witness: Witness, guided: bool, site: ExpectedSite) -> SlowLayer:
    """One layer over a sampling run: its conditional calls, samples and heads one by one."""
    module = case.modules(witness.target)[site.layer]
    steps = []
    for call, batch, hidden, context in witness.seen[site.layer]:
        rows = case.rows(call, batch, guided)
        if rows is None:
            continue
        queries = project(module.get_submodule(case.queries), hidden[rows])
        keys = project(module.get_submodule(case.keys), context[rows])
        steps.append([_slow_heads(site, q, k) for q, k in zip(queries, keys, strict=True)])
    return SlowLayer(site, *(_stacked(steps, part) for part in range(3)))


def _slow_heads(site: ExpectedSite, queries: Tensor, keys: Tensor) -> list[tuple[Tensor, ...]]:
    """Each head of one sample's ``[token, head * channel]``."""
    width = queries.shape[1] // site.heads
    heads = [slice(head * width, (head + 1) * width) for head in range(site.heads)]
    return [slow_attention(queries[site.generated, h], keys[site.reference, h], keys[:, h]) for h in heads]


def _stacked(steps: list[list[list[tuple[Tensor, ...]]]], part: int) -> Tensor:
    """From lists by step, sample and head to ``[batch, step, head, token]``."""
    by_step = [[torch.stack([head[part] for head in sample]) for sample in step] for step in steps]
    return torch.stack([torch.stack(samples) for samples in by_step], dim=1)


def slow_unified(layers: Sequence[SlowLayer], direction: Direction) -> Tensor:
    """Eqs. 8 and 9: every map resized on its own, then the mean over steps, heads and layers."""
    grids = [layer.site.grid if direction is R2G else layer.site.reference_grid for layer in layers]
    finest = max(grids, key=lambda grid: grid.height * grid.width)
    total, count = 0, 0
    for layer, grid in zip(layers, grids, strict=True):
        values = layer.to_generated if direction is R2G else layer.to_reference
        for step in range(values.shape[1]):
            for head in range(values.shape[2]):
                on_grid = values[:, step, head].unflatten(1, tuple(grid)).unsqueeze(1)
                total = total + F.interpolate(on_grid, size=tuple(finest), mode="bilinear")[:, 0]
                count += 1
    return total / count


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Relative: a probability of a map is far below 1, and 1e-6 of 1 would say little."""
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-9)


def check(maps: AttributionMaps, slow: Sequence[SlowLayer], joint: bool) -> None:
    """Vectors of each layer, head and step, and the unified maps."""
    assert set(maps.layers) == {layer.site.layer for layer in slow}
    for layer in slow:
        record = maps.store.layer(layer.site.layer)
        assert (record.generated_grid, record.reference_grid) == (layer.site.grid, layer.site.reference_grid)
        assert_equal(record.to_generated, layer.to_generated)
        assert_equal(record.to_reference, layer.to_reference)
        assert (record.mass is not None) == joint
        if joint:
            assert_equal(record.mass, layer.mass)
    assert_equal(maps.unified(R2G).values, slow_unified(slow, R2G))
    if slow[0].site.reference_grid is not None:
        assert_equal(maps.unified(G2R).values, slow_unified(slow, G2R))


def check_sites(table: SiteTable, case: Case) -> None:
    """What the trace says it captured."""
    found = {(site.path, site.layer, site.heads, site.generated_grid, site.reference_tokens) for site in table}
    assert found == {(site.path, site.layer, site.heads, site.grid, len(site.reference)) for site in case.sites}


def in_backward() -> bool:
    """Whether autograd is running, as it is when a checkpointed block runs again."""
    return torch._C._current_graph_task_id() != -1


def add_lora(case: Case, target: Any) -> None:
    """peft's adapters on the projections, with weights that change them."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name in (case.queries, case.keys) if "." not in name]
    root = case.denoiser(target)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=names), root)
    generator = torch.Generator().manual_seed(5)
    for name, weight in root.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator).to(weight.dtype) / 2


def checkpoint_blocks(case: Case, target: Any) -> None:
    """Every block that holds a site is run again in backward."""
    root = case.denoiser(target)
    for path in dict.fromkeys(site.path.rpartition(".")[0] for site in case.sites):
        block = root.get_submodule(path)
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def wrap_in_compile(case: Case, target: Any) -> None:
    """The denoiser's place is taken by what ``torch.compile`` returns."""
    owner, _, name = case.root.rpartition(".")
    holder = functools.reduce(getattr, filter(None, owner.split(".")), target)
    setattr(holder, name, torch.compile(getattr(holder, name), backend="eager"))


COMPILED_ALWAYS = {"ip_adapter", "paint_by_example_ldm"}
"""A compilation takes ten seconds and more: these cases stand for the others in `make test-long`."""


def to_compile(cases: Sequence[Case]) -> list[Any]:
    """Parameters for `check_compiled_whole`, most of them marked slow."""
    marks = {True: pytest.mark.long, False: pytest.mark.slow}
    return [pytest.param(case, marks=marks[str(case) in COMPILED_ALWAYS]) for case in cases]


def check_compiled_whole(case: Case, backend: str) -> None:
    """A denoiser compiled in one graph and run before the trace: hooks that come later would be
    ignored. The trace leaves the graph in use, and no other is made."""
    target = fresh(case)
    slow = slow_run(case, target, 2, True)
    graphs = CompileCounterWithBackend(backend)
    case.denoiser(target).compile(backend=graphs, fullgraph=True)
    with torch.no_grad():
        expected = case.run(target, 2, 0, True)
    check(traced_run(case, target, 2, True).maps(), slow, case.joint)
    with torch.no_grad():
        assert torch.equal(case.run(target, 2, 0, True), expected)
    assert graphs.frame_count == 1
    torch.compiler.reset()


@functools.cache
def _built(build: Callable[[], Any]) -> Any:
    return build()


def fresh(case: Case) -> Any:
    """A new copy of the case's model."""
    return copy.deepcopy(_built(case.build))


def slow_run(case: Case, target: Any, batch: int, guided: bool) -> list[SlowLayer]:
    """All layers of a sampling run."""
    with Witness(case, target) as witness, torch.no_grad():
        case.sample(target, batch, guided)
    return [slow_layer(case, witness, guided, site) for site in case.sites]


@functools.cache
def expected_run(case: Case, batch: int, guided: bool) -> list[SlowLayer]:
    """The layers of the case's model as it is built."""
    return slow_run(case, fresh(case), batch, guided)


def recipe_of(case: Case, target: Any, guided: bool) -> Recipe:
    """What a user asks for by name."""
    return named_recipe(target, case.recipe, **case.options(guided))


def traced_run(case: Case, target: Any, batch: int, guided: bool) -> Trace:
    """A sampling run under a trace."""
    with trace(target, recipe_of(case, target, guided)) as attention, torch.no_grad():
        case.sample(target, batch, guided)
    return attention


class RecipeContract:
    """Demands on every recipe; a subclass is parametrised with ``case``."""

    @pytest.mark.parametrize(("batch", "guided"), list(zip(BATCHES, (False, True), strict=True)))
    def test_maps_equal_the_slow_transcription(self, case, batch, guided):
        # two batch sizes, with and without guidance: every layer, head, step, and the unified maps
        target = fresh(case)
        slow = expected_run(case, batch, guided)
        assert slow[0].to_generated.shape[:2] == (batch, STEPS)
        attention = traced_run(case, target, batch, guided)
        check(attention.maps(), slow, case.joint)
        check_sites(attention.sites, case)

    def test_adapters_are_seen(self, case):
        # LoRA injected before the trace: maps are those of the adapted projections
        target = fresh(case)
        plain = traced_run(case, target, 2, True).maps().unified(R2G).values
        add_lora(case, target)
        maps = traced_run(case, target, 2, True).maps()
        check(maps, slow_run(case, target, 2, True), case.joint)
        assert not torch.allclose(maps.unified(R2G).values, plain, rtol=1e-4, atol=0)

    def test_blocks_that_run_again_in_backward_are_counted_once(self, case):
        # gradient checkpointing of every block that holds a site
        if case.recipe == "stableviton" and torch.__version__ < (2, 14):
            pytest.skip("below torch 2.14, GroupNorm of channels-last input without gradient dies")
        target, batch = fresh(case), BATCHES[1]
        slow = expected_run(case, batch, True)
        checkpoint_blocks(case, target)
        passes = []
        with trace(target, recipe_of(case, target, True)) as attention:
            module = case.modules(target)[case.sites[0].layer]
            module.register_forward_hook(lambda *_: passes.append(in_backward()))
            outputs = [case.run(target, batch, step, True) for step in range(STEPS)]
            sum(output.square().mean() for output in outputs).backward()
        assert passes.count(True) == passes.count(False) > 0
        check(attention.maps(), slow, case.joint)

    @pytest.mark.long
    def test_compiled_blocks_hide_no_attention(self, case):
        # compiled and run before the trace: hooks that come later would be ignored
        target, slow = fresh(case), expected_run(case, 2, True)
        case.denoiser(target).get_submodule(case.sites[0].path).compile(backend="eager")
        with torch.no_grad():
            case.sample(target, 2, True)
        check(traced_run(case, target, 2, True).maps(), slow, case.joint)
        torch.compiler.reset()

    @pytest.mark.long
    def test_a_compiled_network_in_the_place_of_the_plain_one(self, case):
        # pipeline.unet = torch.compile(pipeline.unet), which puts a wrapper around all paths
        target, slow = fresh(case), expected_run(case, 2, True)
        wrap_in_compile(case, target)
        attention = traced_run(case, target, 2, True)
        check(attention.maps(), slow, case.joint)
        check_sites(attention.sites, case)
