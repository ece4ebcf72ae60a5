"""`trace`: both directions of a model's attention during the one sampling run that makes the images; `ScoreTap`: the
scores of chosen layers of the last training step, with their gradient, for the attention losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from i2am_train.attention.compiled import compiled_blocks, eager_while_listening
from i2am_train.attention.evaluations import Evaluation, check_order, group_steps, read_evaluations
from i2am_train.attention.frames import Frame, hear_branches
from i2am_train.attention.hooks import AttentionInputs
from i2am_train.attention.listener import Listener
from i2am_train.attention.lookup import SiteModule, SitePlaces, choose_sites, chosen_recipe, resolve_root, resolve_sites
from i2am_train.attention.maps import AttributionMaps
from i2am_train.attention.recipe import LayerId, Recipe, Rows, replace_backend, with_rows
from i2am_train.attention.recorder import SiteRecorder, SiteTable, on_cpu
from i2am_train.attention.store import AttributionStore, not_finite
from i2am_train.errors import CaptureError
from i2am_train.ops.attention import DEFAULT_BYTE_BUDGET
from i2am_train.ops.rows import head_mean_scores, log_reference_mass
from i2am_train.types import Backend, Branch, GridSize


def trace(
    target: Any,
    recipe: Recipe | str | None = None,
    *,
    layers: Sequence[LayerId] | None = None,
    matrix_layers: Sequence[LayerId] | None = (),
    matrix_heads: bool = False,
    generated_mask: Bool[Tensor, "batch height width"] | None = None,
    byte_budget: int = DEFAULT_BYTE_BUDGET,
    via: Backend | str | None = None,
    rows: Rows | None = None,
) -> Trace:
    """Capture the attention of a model or pipeline inside a ``with`` block.

    ::

        with trace(pipeline, recipe) as attention:
            images = pipeline(...)
        maps = attention.maps()

    ``recipe`` None asks the model itself (``attention_recipe()``) or recognises a known one, whose name may also be
    given (``i2am explain --recipes`` lists them). ``layers`` restricts the capture (default: all of the recipe's);
    numbers are the paper's, or the same depth of a decoder that has others (`layer_numbers`). ``matrix_layers`` (None:
    all captured ones) also keep their head- and step-mean score matrices, which maps of single patches and attention
    centres need; with ``matrix_heads`` also those of each head. ``generated_mask`` (one per sample, any size, True =
    counts) restricts the mean that makes reference-side maps to generated positions inside it, as the authors' hook
    does with the inpainting mask; the paper averages over all. ``byte_budget`` bounds the scratch memory. ``via``
    observes all sites by another backend than the recipe says (`Backend`): ``"sdpa"`` reads the arguments of
    ``scaled_dot_product_attention``. ``rows`` says which rows of each call are conditional (`Rows`), where neither
    sampler nor pipeline says it: a denoiser in a loop of your own.

    Blocks compiled one by one (``block.compile()``, ``compile_repeated_blocks()`` of diffusers) stay compiled,
    each in one graph, if `guard_hooks` was called before the model's first compiled call. Those that are listened to
    are compiled once more at the first trace, one graph for each shape, which later traces use. Every other compiled
    model runs uncompiled inside the block: compiled whole, or under the compiler's own setting
    (``torch._dynamo.config.skip_nnmodule_hook_guards = True``), which ignores hooks that come later, or with
    ``via="sdpa"``.

    The images are bit-identical with and without; all hooks are gone after the block, also when it fails. Raises
    `CaptureError` for a model that does not fit the recipe, and as soon as a call is made whose maps would not be those
    of the images.
    """
    chosen = chosen_recipe(target, recipe)
    if via is not None:
        chosen = replace_backend(chosen, via)
    return Trace(
        target,
        chosen if rows is None else with_rows(chosen, rows),
        None if layers is None else tuple(layers),
        None if matrix_layers is None else tuple(matrix_layers),
        matrix_heads,
        generated_mask,
        byte_budget,
    )


@dataclass(eq=False)
class Trace:
    """A capture, made by `trace`; a context manager for one use."""

    _target: Any
    recipe: Recipe
    _layers: tuple[LayerId, ...] | None
    _matrix_layers: tuple[LayerId, ...] | None
    _matrix_heads: bool
    _generated_mask: Bool[Tensor, "batch height width"] | None
    _byte_budget: int
    _recorders: dict[SiteModule, SiteRecorder] = field(default_factory=dict)
    _run_order: list[SiteRecorder] = field(default_factory=list)
    _calls: list[Evaluation] = field(default_factory=list)
    """All calls of the denoiser; those that were recorded are `_evaluations`."""
    _checked: int = 0
    _runs: int = 0
    _run: FrameType | None = None
    _rows: slice | None = None
    _batch: int | None = None
    _model: tuple[str, ...] = ()
    _partial: str | None = None
    _branch: Callable[[], Branch | None] = field(default=lambda: None)
    _exit: ExitStack = field(default_factory=ExitStack)
    _listener: Listener | None = None

    def __enter__(self) -> Trace:
        if self._recorders:
            raise CaptureError("This trace has been used already. Make a new one with trace(...) for each run.")
        root = resolve_root(self._target, self.recipe)
        sites = resolve_sites(root, self.recipe)
        self._model = tuple(site.layer for site in sites)
        if self._layers is not None:
            sites = choose_sites(sites, self._layers)
        matrix_layers = self._matrix_layers
        with_matrices = set(sites if matrix_layers is None else choose_sites(sites, matrix_layers, self._model))
        opened = partial(self._open, root)
        compiled = compiled_blocks(self._target, self.recipe, root, sites)
        listener = self._listener = Listener(
            root, self.recipe, sites, self._record, "trace", opened, late=True, compiled=compiled
        )
        with ExitStack() as stack:
            if not compiled:
                stack.enter_context(eager_while_listening())
            self._branch = stack.enter_context(hear_branches(root))
            stack.callback(listener.detach)
            listener.attach()
            self._exit = stack.pop_all()
        self._recorders = {
            site: SiteRecorder(site, self._byte_budget, site in with_matrices, self._matrix_heads, self._generated_mask)
            for site in sites
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()
        self._run = None

    @property
    def sites(self) -> SiteTable:
        """What is captured: layers, their numbers, grids, heads, reference tokens and calls seen; prints as a table."""
        return SiteTable(recorder.summary(self._model) for recorder in self._recorders.values())

    def maps(self) -> AttributionMaps:
        """All attribution maps of the run (on the CPU). Raises `CaptureError` if a site saw no or too few calls, or
        attended with queries or keys that are not finite.

        What an accelerator holds leaves it here: maps, timesteps, and what could not be checked before without waiting.
        """
        self._calls = read_evaluations(self._calls)
        self._check_order()
        if self._listener is not None:
            self._listener.settle()
        self._check_complete()
        evaluations = self._evaluations
        steps = group_steps(evaluations)
        store = AttributionStore(
            layers=on_cpu([recorder.layer_record(steps) for recorder in self._run_order]),
            timesteps=tuple(evaluations[step[0]].number for step in steps),
            recipe=self.recipe.name,
            partial=self._partial,
            canvas=self.recipe.canvas,
            model=self._model,
        )
        if (where := not_finite(store)) is not None:
            raise CaptureError(
                f"The model computed with values that are not finite numbers, first seen in {where}, "
                "so there are no maps, and the images are not to be trusted. Run it in a precision "
                "that holds its values (float32, bfloat16), and check its weights."
            )
        return AttributionMaps(store)

    @property
    def _evaluations(self) -> list[Evaluation]:
        return [each for each in self._calls if each.recorded]

    def _open(self, root: nn.Module, frame: Frame) -> None:
        self._partial = self.recipe.partial_in(root)
        frame = frame.with_caller(self._branch)
        _refuse_crops(frame)
        self._rows = self.recipe.conditional_rows(frame)
        recorded = self._rows is not None
        if self._rows is not None:
            self._check_batch(len(range(*self._rows.indices(frame.batch))))
        run = frame.caller.run
        if run is not None and run is not self._run:
            self._run, self._runs = run, self._runs + 1
        named = frame.announced is not None or frame.branch is not None
        self._calls.append(
            Evaluation(
                frame.step_index,
                frame.read_timestep(),
                0 if run is None else self._runs,
                frame.time_embedding(),
                recorded,
                named,
            )
        )
        if not any(each.waits for each in self._calls[self._checked :]):
            self._check_order()

    def _check_order(self) -> None:
        """Of the calls that were not looked at before."""
        check_order(self._calls, self.recipe, since=self._checked)
        self._checked = len(self._calls)

    def _check_batch(self, batch: int) -> None:
        if batch == 0 or (self._batch is not None and batch != self._batch):
            before = "" if self._batch is None else f" after {self._batch}"
            raise CaptureError(
                f"The model was called with {batch} conditional rows{before}. Use one trace per batch, and a recipe "
                "whose rows are those of the conditional branch."
            )
        self._batch = batch

    def _record(self, site: SiteModule, frame: Frame, inputs: AttentionInputs) -> None:
        if self._rows is None:
            return
        recorder = self._recorders[site]
        if not recorder.calls:
            self._run_order.append(recorder)
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be used later
            recorder.record(frame, inputs.rows(self._rows))

    def _check_complete(self) -> None:
        if not self._evaluations:
            raise CaptureError(
                "The model was not called inside the trace's block (or no call was conditional), "
                "so there are no maps. Run the pipeline inside 'with trace(...)'."
            )
        _refuse_blind(list(self._recorders.values()))
        expected = len(self._evaluations)
        short = [site for site in self.sites if site.calls != expected]
        if short:
            counts = ", ".join(f"{site.layer} ({site.calls})" for site in short)
            raise CaptureError(
                f"These layers did not attend in each of the {expected} evaluations: {counts}. Switch off caches that "
                "skip blocks, give the adapter a scale above zero, or leave these layers out of the recipe."
            )


def _refuse_crops(frame: Frame) -> None:
    if frame.caller.crops:
        raise CaptureError(
            "The pipeline was called with padding_mask_crop, so that it works on a part of the "
            "picture and pastes it in: the maps would be of that part and the picture whole. Call "
            "it without, on a part of the picture that you cut out yourself."
        )


def _refuse_blind(recorders: Sequence[SiteRecorder]) -> None:
    """Refuse sites whose module never made the attention call that the recipe means."""
    blind = [recorder.site for recorder in recorders if recorder.site.site.via is Backend.SDPA and not recorder.calls]
    if blind:
        names = ", ".join(site.layer for site in blind)
        calls = sorted({site.site.call_in(site.module) for site in blind})
        raise CaptureError(
            f"These layers were observed by the backend '{Backend.SDPA}' and never called scaled_dot_product_attention "
            f"(call number {', '.join(map(str, calls))}): {names}. They did not run, or attend by another kernel "
            "(attention slices, xformers, einsum). Choose the model's default attention processor, correct the site's "
            f"sdpa_call, or observe the projections (via='{Backend.PROJECTIONS}')."
        )


class _LastForward:
    """What one layer attended with in the last forward, and its scores once somebody asked for them."""

    def __init__(self, site: SiteModule, frame: Frame, inputs: AttentionInputs) -> None:
        self.places: SitePlaces = site.places(inputs.generated.shape[2], inputs.reference.shape[2], frame.latent)
        self._inputs = inputs
        self._scores: Tensor | None = None

    def tokens(self) -> AttentionInputs:
        return AttentionInputs(
            self.places.generated.take(self._inputs.generated),
            self.places.reference.take(self._inputs.reference),
            self._inputs.scale,
        )

    def scores(self) -> Tensor:
        if self._scores is None:
            self._scores = head_mean_scores(*self.tokens())
        return self._scores

    def log_mass(self) -> Tensor:
        return log_reference_mass(
            self.places.generated.take(self._inputs.generated),
            self._inputs.reference,
            self.places.reference.index,
            self._inputs.scale,
        )


class ScoreTap:
    """Listens to a model in training and gives the head-mean scores of chosen layers, differentiable.

    ::

        with ScoreTap(model, layers=[2]) as tap:
            prediction = model(...)                 # any number of training steps
            scores = tap.scores(2)                  # Float[Tensor, "batch generated reference"]

    All rows of the batch are given: in training every row has its own condition. Evaluations without gradient (sampling
    for validation) are ignored. A forward under gradient checkpointing works with the non-reentrant kind, which
    diffusers uses: the recomputation in backward is not listened to, and the gradient arrives (tested). So it does from
    a model under `torch.compile` that guards hooks (`torch._dynamo.config.skip_nnmodule_hook_guards = False`): the
    layer's projections are outputs of the compiled graph. Scores are float32 whatever autocast says, and are computed
    only when asked for. Losses of a large layer do without: :func:`~i2am_train.losses.attention.attention_of_tokens`.
    """

    def __init__(self, target: Any, recipe: Recipe | str | None = None, layers: Sequence[LayerId] = (2,)) -> None:
        self.recipe = chosen_recipe(target, recipe)
        root = resolve_root(target, self.recipe)
        sites = resolve_sites(root, self.recipe)
        self._model = tuple(site.layer for site in sites)
        self._sites = choose_sites(sites, layers)
        self._listener = Listener(root, self.recipe, self._sites, self._keep, "score tap", self._forget)
        self._last: dict[str, _LastForward] = {}

    def __enter__(self) -> ScoreTap:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def attach(self) -> None:
        """Start listening; refuses a model that has a tap already."""
        self._listener.attach()

    def close(self) -> None:
        """Stop listening and forget the last scores; harmless when done already."""
        self._listener.detach()
        self.clear()

    def clear(self) -> None:
        """Forget the last forward, and free its graph."""
        self._last.clear()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers listened to."""
        return tuple(site.layer for site in self._sites)

    def scores(self, layer: LayerId) -> Float[Tensor, "batch generated reference"]:
        """Softmax over the reference patches (special tokens left out before it), mean over heads, float32."""
        return self._last_forward(layer).scores()

    def tokens(self, layer: LayerId) -> AttentionInputs:
        """The queries and keys of the patches, of which scores are computed, in the model's precision."""
        return self._last_forward(layer).tokens()

    def log_mass(self, layer: LayerId) -> Float[Tensor, "batch generated"]:
        """Logarithm of the share of the attention that goes to the reference patches, mean over heads, float32.

        Raises:
            CaptureError: the layer's softmax runs over nothing else, so that the share is always 1.
        """
        self.require_mass(layer)
        return self._last_forward(layer).log_mass()

    def require_mass(self, layer: LayerId) -> None:
        """Raises `CaptureError` where `log_mass` would, before any forward."""
        (site,) = choose_sites(self._sites, [layer], self._model)
        if site.site.reference.whole and not site.site.joint:
            raise CaptureError(
                f"Layer {site.layer} attends to the reference's patches and to no other token, so that all of its "
                "attention goes there, and a term of its share (mass) has nothing to change. Train a model with a "
                "class token or joint attention, or leave the term out."
            )

    def generated_grid(self, layer: LayerId) -> GridSize:
        """Grid of the layer's generated tokens in the last forward."""
        return self._grid(layer, self._last_forward(layer).places.generated.grid)

    def reference_grid(self, layer: LayerId) -> GridSize:
        """Grid of the layer's reference tokens in the last forward."""
        return self._grid(layer, self._last_forward(layer).places.reference.grid)

    def _grid(self, layer: LayerId, grid: GridSize | None) -> GridSize:
        if grid is None:
            raise CaptureError(
                f"The recipe gives the tokens of layer {layer} no place in a picture. Set their grid in the recipe."
            )
        return grid

    def _last_forward(self, layer: LayerId) -> _LastForward:
        name = choose_sites(self._sites, [layer], self._model)[0].layer
        if name not in self._last:
            raise CaptureError(
                f"Layer {name} has no scores yet: no forward with gradient ran since the tap was attached. Call the "
                "model first, not under torch.no_grad(); with gradient checkpointing, use the non-reentrant kind "
                "(use_reentrant=False); with torch.compile, set torch._dynamo.config.skip_nnmodule_hook_guards=False "
                "before, or hooks are ignored."
            )
        return self._last[name]

    def _forget(self, _: Frame) -> None:
        if torch.is_grad_enabled():
            self._last.clear()

    def _keep(self, site: SiteModule, frame: Frame, inputs: AttentionInputs) -> None:
        if not torch.is_grad_enabled():
            return
        self._last[site.layer] = _LastForward(site, frame, inputs.per_head())
