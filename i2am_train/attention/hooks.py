"""A listener hands over what each site attends with, one denoiser evaluation at a time.

Modules are observed (`i2am_train.attention.inputs`), not replaced: the model keeps its kernel and
the output stays bit-identical. The root's own hooks open and close a *frame*; what happens outside a frame (another
network that shares the module, the recomputation of a gradient checkpoint) is dropped.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from i2am_train.attention.frames import Frame, announced_evaluation
from i2am_train.attention.inputs import AttentionInputs, MaskGuard, Probe, probe
from i2am_train.attention.known import module_like, nearest_recipe
from i2am_train.attention.recipe import (
    LatentSize,
    LayerId,
    Recipe,
    SiteModule,
    find_layer,
    named_modules,
    similar_layer,
    uncompiled,
)
from i2am_train.errors import CaptureError
from i2am_train.types import GridSize


def resolve_root(target: Any, recipe: Recipe) -> nn.Module:
    """The recipe's root module in a model or pipeline; what ``torch.compile`` wrapped, unwrapped: the
    wrapper passes its arguments on without their names."""
    found = target
    for name in filter(None, recipe.root.split(".")):
        if not hasattr(found, name):
            children = [key for key, _ in found.named_children()] if isinstance(found, nn.Module) else []
            has = f" It has: {', '.join(children)}." if children else ""
            raise CaptureError(
                f"{type(target).__name__} has no part '{recipe.root}', the recipe's root.{has} "
                "Set the recipe's root to the denoiser's path ('' if you pass the denoiser itself)."
            )
        found = getattr(found, name)
    if not isinstance(found, nn.Module):
        raise CaptureError(
            f"The recipe's root '{recipe.root}' of {type(target).__name__} is a "
            f"{type(found).__name__}, "
            "not a torch module. Set it to the denoiser's path."
        )
    return uncompiled(found)


def resolve_sites(root: nn.Module, recipe: Recipe) -> tuple[SiteModule, ...]:
    """The recipe's attention modules as they are now (call it when attaching: adapters may be injected until then)."""
    found = [
        SiteModule(layer, path, site, module)
        for path, module in named_modules(root)
        for site in recipe.sites
        if (layer := site.layer_of(path)) is not None
    ]
    if not found:
        patterns = ", ".join(repr(site.pattern) for site in recipe.sites)
        near = nearest_recipe(root)
        advice = "" if near is None else f"; the nearest known recipe is '{near.name}'"
        raise CaptureError(
            f"No attention layer matches {patterns}. This model has: {_attention_like(root)}. "
            f"Set the recipe's pattern to one of them{advice}."
        )
    _refuse_other_models(root, recipe)
    return tuple(found)


def _refuse_other_models(root: nn.Module, recipe: Recipe) -> None:
    for pattern in recipe.absent:
        if (path := module_like(root, pattern)) is not None:
            raise CaptureError(
                f"{type(root).__name__} has a module '{path}', which no model of the recipe "
                f"'{recipe.name}' has: it is of another kind (SDXL, for one, has several transformer "
                "blocks in an attention). Choose a recipe for it (i2am explain --recipes)."
            )


def _attention_like(root: nn.Module) -> str:
    """Paths of modules that look like attention, for messages."""
    names = [
        path for path, module in named_modules(root) if hasattr(module, "heads") or "attn" in path.rpartition(".")[2]
    ]
    shown = names[:12] + (["..."] if len(names) > 12 else [])
    return ", ".join(shown) or "no module with heads"


def _forward_signature(root: nn.Module) -> inspect.Signature:
    """Of the root's forward; of its class's where a tool has put a function of ``*args`` before it."""
    signature = inspect.signature(root.forward)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if "forward" in vars(root) and inspect.Parameter.VAR_POSITIONAL in kinds:
        return inspect.signature(partial(type(root).forward, root))
    return signature


OnAttention = Callable[[SiteModule, Frame, AttentionInputs], None]
"""Called once per site and frame with what it attends with, all rows of the batch."""


def _nothing(frame: Frame) -> None:
    """Default of a listener that does not care about frames."""


_ATTACHED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""Which kinds of listeners a root has, so that a second one of the same kind is refused."""


@dataclass(eq=False)
class Listener:
    """The hooks of one trace or tap. ``attach`` and ``detach`` are inverses; a frame never outlives
    its forward. Raises `CaptureError` for a site that its backend cannot observe."""

    root: nn.Module
    recipe: Recipe
    sites: Sequence[SiteModule]
    on_attention: OnAttention
    kind: str
    on_open: Callable[[Frame], None] = _nothing
    _handles: list[RemovableHandle] = field(default_factory=list)
    _frame: Frame | None = None
    _calls: int = 0
    _probes: list[Probe] = field(init=False)

    def __post_init__(self) -> None:
        self._probes = [probe(site, partial(self._deliver, site), self._is_open) for site in self.sites]

    def attach(self) -> None:
        """Register all hooks; refuses a root that already has a listener of this kind."""
        kinds = _ATTACHED.setdefault(self.root, set())
        if self.kind in kinds:
            raise CaptureError(
                f"This {type(self.root).__name__} already has a {self.kind} attached. "
                "Leave the first one's block (or close it) before starting another."
            )
        kinds.add(self.kind)
        signature = _forward_signature(self.root)

        def open_frame(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._open(signature.bind_partial(*args, **kwargs).arguments)

        self._handles = [
            self.root.register_forward_pre_hook(open_frame, with_kwargs=True),
            self.root.register_forward_hook(self._close, always_call=True),
        ]
        for site, each in zip(self.sites, self._probes, strict=True):
            self._handles.append(MaskGuard(site, self._is_open).attach())
            self._handles += each.attach()

    def detach(self) -> None:
        """Remove every hook; harmless when there is none."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _ATTACHED.get(self.root, set()).discard(self.kind)
        self._handles = []
        self._close()

    def _open(self, arguments: dict[str, Any]) -> None:
        if torch._C._current_graph_task_id() != -1:  # a checkpoint around the root runs it again in backward
            return
        size = self._latent_size(arguments)
        timestep = arguments.get(self.recipe.timestep) if self.recipe.timestep else None
        self._frame = Frame(
            call=self._calls, timestep=timestep, latent=size.grid, batch=size.rows, announced=announced_evaluation()
        )
        self._calls += 1
        for each in self._probes:
            self._handles += each.follow()
        self.on_open(self._frame)

    def _latent_size(self, arguments: dict[str, Any]) -> LatentSize:
        if callable(self.recipe.latent):
            return self.recipe.latent(arguments)
        latent = arguments.get(self.recipe.latent)
        if not isinstance(latent, Tensor) or latent.ndim != 4:
            given = ", ".join(arguments) or "none"
            replaced = "; its forward was replaced" if "forward" in vars(self.root) else ""
            raise CaptureError(
                f"{type(self.root).__name__} was called without a picture '{self.recipe.latent}' "
                f"of shape [batch, channel, height, width] (arguments: {given}{replaced}). Set the "
                "recipe's latent to its name, or to a function of the arguments if tokens are packed."
            )
        return LatentSize(latent.shape[0], GridSize(*latent.shape[-2:]))

    def _close(self, *_: Any) -> None:
        self._frame = None
        for each in self._probes:
            each.clear()

    def _is_open(self) -> bool:
        return self._frame is not None

    def _deliver(self, site: SiteModule, inputs: AttentionInputs) -> None:
        if self._frame is not None:
            self.on_attention(site, self._frame, inputs)


def choose_sites(
    sites: Sequence[SiteModule], layers: Sequence[LayerId], model: Sequence[str] | None = None
) -> tuple[SiteModule, ...]:
    """The sites of the given layers, in the order given; an error that lists what there is.

    Numbers are those of `similar_layer` among the ``model``'s layers (None: those of the sites).
    """
    by_name = {site.layer: site for site in sites}
    known = list(by_name) if model is None else model
    names = [find_layer(similar_layer(layer, known), list(by_name)) for layer in layers]
    return tuple(by_name[name] for name in names)


def eager_while_listening() -> AbstractContextManager[object]:
    """Keeps compiled functions from running: hooks added after a compilation are silently ignored.

    Free when nothing was compiled: the compiler is not even imported then.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
