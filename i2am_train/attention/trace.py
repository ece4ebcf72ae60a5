"""`trace`: capture both directions of a model's attention during the one sampling run that makes the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from i2am_train.attention.callers import find_caller, hear_branches
from i2am_train.attention.frames import Frame
from i2am_train.attention.hooks import Listener, choose_sites, eager_while_listening, resolve_root, resolve_sites
from i2am_train.attention.inputs import AttentionInputs
from i2am_train.attention.known import chosen_recipe
from i2am_train.attention.maps import AttributionMaps
from i2am_train.attention.recipe import LayerId, Recipe, Rows, SiteModule, replace_backend, with_rows
from i2am_train.attention.reduction import SiteRecorder, undisturbed
from i2am_train.attention.store import AttributionStore, LayerRecord, SiteSummary, SiteTable, not_finite
from i2am_train.errors import CaptureError
from i2am_train.ops.attention import DEFAULT_BYTE_BUDGET
from i2am_train.types import Backend, Branch


def trace(
    target: Any,
    recipe: Recipe | str | None = None,
    *,
    layers: Sequence[LayerId] | None = None,
    matrix_layers: Sequence[LayerId] | None = (),
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

    ``recipe`` None asks the model itself (``attention_recipe()``) or recognises a known one, whose
    name may also be given (``i2am explain --recipes`` lists them). ``layers`` restricts the capture
    (default: all of the recipe's); numbers are the paper's, or the same depth of a decoder that has
    others (`similar_layer`). ``matrix_layers`` (None: all captured ones) also keep their
    head- and step-mean score matrices, which maps of single patches and attention centres need.
    ``generated_mask`` (one per sample, any size, True = counts) restricts the mean that makes
    reference-side maps to generated positions inside it, as the authors' hook does with the
    inpainting mask; the paper averages over all. ``byte_budget`` bounds the scratch memory. ``via``
    observes all sites by another backend than the recipe says (`Backend`): ``"sdpa"`` reads the
    arguments of ``scaled_dot_product_attention``. ``rows`` says which rows of each call are
    conditional (`Rows`), where neither sampler nor pipeline says it: a denoiser in a loop of your
    own.

    The images are bit-identical with and without; all hooks are gone after the block, also when it
    fails. Raises `CaptureError` for a model that does not fit the recipe, and as soon as a call is
    made whose maps would not be those of the images.
    """
    chosen = chosen_recipe(target, recipe)
    if via is not None:
        chosen = replace_backend(chosen, via)
    return Trace(
        target,
        chosen if rows is None else with_rows(chosen, rows),
        None if layers is None else tuple(layers),
        None if matrix_layers is None else tuple(matrix_layers),
        generated_mask,
        byte_budget,
    )


@dataclass(frozen=True)
class _Evaluation:
    """When a recorded evaluation took place."""

    step_index: int | None
    timestep: float | None
    run: FrameType | None
    embedding: Tensor | None
    """Of the time, where the model is told no number."""

    def begins_run_after(self, before: Sequence[_Evaluation]) -> bool:
        """Whether this cannot belong to the sampling run that others made.

        A run goes from noise to picture. Samplers of higher order evaluate a timestep twice, but
        never the first; a pipeline that is seen to go on may do as it likes.
        """
        last = before[-1]
        if self.step_index is not None and last.step_index is not None:
            return self.step_index < last.step_index
        if self.run is not None and self.run is last.run:
            return False
        if self.timestep is None or last.timestep is None:
            first = before[0].embedding
            return self.embedding is not None and first is not None and self.embedding.equal(first)
        again = self.timestep == last.timestep and (self.run is not None or len(before) == 1)
        return self.timestep > last.timestep or again

    def is_step_of(self, other: _Evaluation) -> bool:
        """Whether both belong to one sampling step (samplers of higher order evaluate a step twice)."""
        if self.step_index is not None or other.step_index is not None:
            return self.step_index == other.step_index
        return self.timestep is not None and self.timestep == other.timestep


class Trace:
    """A capture, made by `trace`; a context manager for one use."""

    def __init__(
        self,
        target: Any,
        recipe: Recipe,
        layers: tuple[LayerId, ...] | None,
        matrix_layers: tuple[LayerId, ...] | None,
        generated_mask: Bool[Tensor, "batch height width"] | None,
        byte_budget: int,
    ) -> None:
        self.recipe = recipe
        self._target = target
        self._layers = layers
        self._matrix_layers = matrix_layers
        self._generated_mask = generated_mask
        self._byte_budget = byte_budget
        self._recorders: dict[SiteModule, SiteRecorder] = {}
        self._run_order: list[SiteRecorder] = []
        self._evaluations: list[_Evaluation] = []
        self._rows: slice | None = None
        self._batch: int | None = None
        self._model: tuple[str, ...] = ()
        self._partial: str | None = None
        self._branch: Callable[[], Branch | None] = lambda: None
        self._exit = ExitStack()

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
        listener = Listener(root, self.recipe, sites, self._record, "trace", opened)
        with ExitStack() as stack:
            stack.enter_context(eager_while_listening())
            self._branch = stack.enter_context(hear_branches(root))
            stack.callback(listener.detach)
            listener.attach()
            self._exit = stack.pop_all()
        self._recorders = {
            site: SiteRecorder(site, self._byte_budget, site in with_matrices, self._generated_mask) for site in sites
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()
        self._evaluations = [replace(each, run=None) for each in self._evaluations]

    @property
    def sites(self) -> SiteTable:
        """What is captured: layers, grids, heads, reference tokens and calls seen; prints as a table."""
        return SiteTable(_summary(recorder) for recorder in self._recorders.values())

    def maps(self) -> AttributionMaps:
        """All attribution maps of the run (on the CPU). Raises `CaptureError` if a site saw no or
        too few calls, or attended with queries or keys that are not finite."""
        self._check_complete()
        steps = _group_steps(self._evaluations)
        store = AttributionStore(
            layers=tuple(_layer_record(recorder, steps) for recorder in self._run_order),
            timesteps=tuple(self._evaluations[step[0]].timestep for step in steps),
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

    def _open(self, root: nn.Module, frame: Frame) -> None:
        self._partial = self.recipe.partial_in(root)
        if frame.announced is None:
            frame = replace(frame, caller=find_caller(), branch=self._branch())
        _refuse_crops(frame)
        self._rows = self.recipe.conditional_rows(frame)
        evaluation = _Evaluation(frame.step_index, frame.read_timestep(), frame.caller.run, frame.time_embedding())
        if self._rows is None:
            self._check_skipped(frame, evaluation)
            return
        self._check_batch(len(range(*self._rows.indices(frame.batch))))
        self._check_not_tiled(evaluation)
        if self._evaluations and evaluation.begins_run_after(self._evaluations):
            raise CaptureError(
                f"A second sampling run began inside one trace ({_moment(evaluation)} after "
                f"{_moment(self._evaluations[-1])}), or unconditional calls are taken for "
                "conditional ones. Use one trace per run; a sampler of your own that goes back in "
                "time announces its steps (i2am_train.attention.announce)."
            )
        self._evaluations.append(evaluation)

    def _check_skipped(self, frame: Frame, evaluation: _Evaluation) -> None:
        """A call that is skipped because each step makes two must be the second of its step."""
        if self.recipe.rows != "first_call" or frame.announced or frame.branch:
            return
        if self._evaluations and not evaluation.is_step_of(self._evaluations[-1]):
            raise CaptureError(
                f"The recipe '{self.recipe.name}' expects two calls in each step under guidance, and "
                f"the model was called once at {_moment(self._evaluations[-1])}. Without guidance "
                "set guided=False."
            )

    def _check_not_tiled(self, evaluation: _Evaluation) -> None:
        before = self._evaluations[-1] if self._evaluations else None
        if self.recipe.once_per_step and before is not None and evaluation.is_step_of(before):
            raise CaptureError(
                f"The model was called twice at timestep {evaluation.timestep}: {self.recipe.name} "
                "cuts large pictures into tiles, and maps of tiles are not maps of the picture. "
                "Switch tiling off (raise the size of its tiles), or explain a smaller picture."
            )

    def _check_batch(self, batch: int) -> None:
        if batch == 0 or (self._batch is not None and batch != self._batch):
            before = "" if self._batch is None else f" after {self._batch}"
            raise CaptureError(
                f"The model was called with {batch} conditional rows{before}. "
                "Use one trace per batch, and a recipe whose rows are those of the conditional "
                "branch."
            )
        self._batch = batch

    def _record(self, site: SiteModule, frame: Frame, inputs: AttentionInputs) -> None:
        if self._rows is None:
            return
        recorder = self._recorders[site]
        if not recorder.calls:
            self._run_order.append(recorder)
        with undisturbed():
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
                f"These layers did not attend in each of the {expected} evaluations: {counts}. "
                "Switch off caches that skip blocks, give the adapter a scale above zero, or leave these "
                "layers out of the recipe."
            )


def _moment(evaluation: _Evaluation) -> str:
    """When an evaluation was, for messages."""
    if evaluation.step_index is not None:
        return f"step {evaluation.step_index}"
    return "a step" if evaluation.timestep is None else f"timestep {evaluation.timestep:g}"


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
            f"These layers were observed by the backend '{Backend.SDPA}' and never called "
            f"scaled_dot_product_attention (call number {', '.join(map(str, calls))}): {names}. "
            "They did not run, or attend by another kernel (attention slices, xformers, einsum). "
            "Choose the model's default attention processor, correct the site's sdpa_call, or "
            f"observe the projections (via='{Backend.PROJECTIONS}')."
        )


def _group_steps(evaluations: Sequence[_Evaluation]) -> list[list[int]]:
    """Positions of the evaluations of each sampling step."""
    steps: list[list[int]] = []
    for position, evaluation in enumerate(evaluations):
        if steps and evaluation.is_step_of(evaluations[steps[-1][-1]]):
            steps[-1].append(position)
        else:
            steps.append([position])
    return steps


def _stack_steps(recorded: Sequence[Tensor], steps: Sequence[Sequence[int]]) -> Tensor:
    """``[batch, step, head, token]`` on the CPU; evaluations of the same step are averaged."""
    means = [
        recorded[step[0]] if len(step) == 1 else torch.stack([recorded[at] for at in step]).mean(dim=0)
        for step in steps
    ]
    return torch.stack(means, dim=1).float().cpu()


def _layer_record(recorder: SiteRecorder, steps: Sequence[Sequence[int]]) -> LayerRecord:
    places = recorder.places
    assert places is not None, "a complete recorder has seen its tokens"
    if places.generated.grid is None:
        raise CaptureError(
            f"The recipe gives the generated tokens of layer {recorder.site.layer} no grid. "
            "Set the site's generated tokens to a GridSize or 'latent'."
        )
    matrices = [None, None] if recorder.matrices is None else list(recorder.matrices)
    over_reference, over_generated = (
        None if total is None else (total / recorder.calls).float().cpu() for total in matrices
    )
    return LayerRecord(
        layer=recorder.site.layer,
        generated_grid=places.generated.grid,
        reference_grid=places.reference.grid,
        to_generated=_stack_steps(recorder.to_generated, steps),
        to_reference=_stack_steps(recorder.to_reference, steps),
        mass=_stack_steps(recorder.mass, steps) if recorder.mass else None,
        functional=recorder.key_tokens > 1,
        scores_over_reference=over_reference,
        scores_over_generated=over_generated,
    )


def _summary(recorder: SiteRecorder) -> SiteSummary:
    places = recorder.places
    return SiteSummary(
        layer=recorder.site.layer,
        path=recorder.site.path,
        heads=recorder.heads,
        generated_grid=None if places is None else places.generated.grid,
        reference_tokens=None if places is None else places.reference.count,
        reference_grid=None if places is None else places.reference.grid,
        calls=recorder.calls,
        functional=recorder.key_tokens != 1,
    )
