"""The hooks of a whole model: one denoiser evaluation at a time, what its attention modules attend with.

`Listener` opens and closes a *frame* by hooks of the root; what happens outside a frame (another network that shares
the module, the recomputation of a gradient checkpoint) is dropped. Within it, a probe for each module
(`i2am_train.attention.hooks`) delivers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from i2am_train.attention.compiled import CompiledBlocks
from i2am_train.attention.frames import Frame, announced_evaluation
from i2am_train.attention.hooks import AttentionInputs, ChangeKeys, Probe, changes_scores, make_probe
from i2am_train.attention.lookup import SiteModule
from i2am_train.attention.recipe import LatentSize, Recipe
from i2am_train.errors import CaptureError
from i2am_train.types import GridSize


def _find_masks(site: SiteModule, is_open: Callable[[], bool], found: Callable[[str, Any], None]) -> RemovableHandle:
    """Calls ``found`` with name and value of a mask that a call of the module is given."""
    names = list(inspect.signature(site.module.forward).parameters)
    places = {name: names.index(name) if name in names else sys.maxsize for name in site.site.masks}

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_open():
            return
        for name, place in places.items():
            mask = args[place] if place < len(args) else kwargs.get(name)
            if mask is not None:
                found(name, mask)

    return site.module.register_forward_pre_hook(look, with_kwargs=True)


def _masks_anything(mask: Any) -> Tensor | bool:
    """Whether a mask does anything; one for each region of the picture (a list) always does."""
    if isinstance(mask, Tensor):
        return changes_scores(mask)
    return any(one is not None for one in mask)


def _forward_signature(root: nn.Module) -> inspect.Signature:
    """Of the root's forward; of its class's where a tool has put a function of ``*args`` before it."""
    signature = inspect.signature(root.forward)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if "forward" in vars(root) and inspect.Parameter.VAR_POSITIONAL in kinds:
        return inspect.signature(partial(type(root).forward, root))
    return signature


_OnAttention = Callable[[SiteModule, Frame, AttentionInputs], None]
"""Called once per site and frame with what it attends with, all rows of the batch."""


_ATTACHED: WeakKeyDictionary[nn.Module, WeakSet[Listener]] = WeakKeyDictionary()
"""The listeners of a root, of which a second one of the same kind is refused."""


def listeners_of(root: nn.Module) -> list[Listener]:
    """Who listens to a root, by kind.

    >>> listeners_of(nn.Linear(2, 3))
    []
    """
    return sorted(_ATTACHED.get(root, ()), key=lambda listener: listener.kind)


@dataclass(eq=False)
class Listener:
    """The hooks of one trace or tap. ``attach`` and ``detach`` are inverses; a frame never outlives its forward. Raises
    `CaptureError` for a site that its backend cannot observe."""

    root: nn.Module
    recipe: Recipe
    sites: Sequence[SiteModule]
    on_attention: _OnAttention
    kind: str
    on_open: Callable[[Frame], None]
    change_keys: ChangeKeys | None = None
    """None: nothing is changed."""
    late: bool = False
    """Masks that an accelerator holds are looked at by `settle`, and not at the call, which would wait for it."""
    compiled: Mapping[SiteModule, nn.Module] = field(default_factory=dict)
    """Sites in compiled blocks, which are heard once the block has run (`compiled_blocks`)."""
    _handles: list[RemovableHandle] = field(default_factory=list)
    _frame: Frame | None = None
    _calls: int = 0
    _probes: list[Probe] = field(init=False)
    _blocks: CompiledBlocks = field(init=False)
    _doubts: list[tuple[Tensor, CaptureError]] = field(default_factory=list)
    _signature: inspect.Signature = field(init=False)

    def __post_init__(self) -> None:
        self._blocks = CompiledBlocks(self.compiled, self._is_open)
        self._probes = [
            make_probe(
                site,
                self._blocks.later(site, partial(self.deliver, site)),
                self._is_open,
                self.change_keys and partial(self._changed, site),
                self._refuse_if,
            )
            for site in self.sites
        ]

    def settle(self) -> None:
        """Raises the first `CaptureError` of masks that were not looked at when they came."""
        found = torch.stack([wrong for wrong, _ in self._doubts]).tolist() if self._doubts else []
        for wrong, (_, error) in zip(found, self._doubts, strict=True):
            if wrong:
                raise error

    def _refuse_if(self, wrong: Tensor | bool, error: CaptureError) -> None:
        if self.late and isinstance(wrong, Tensor) and wrong.device.type != "cpu":
            self._doubts.append((wrong, error))
        elif wrong:
            raise error

    def _refuse_mask(self, site: SiteModule, name: str, mask: Any) -> None:
        """Of a mask that keeps tokens from the reference: the maps would give them a share that they do not have."""
        error = CaptureError(
            f"Layer {site.layer} attends under a mask ({name}), and maps of the scores without it would not be what "
            "the model saw. Call the model without it (drop the tokens that it hides), or leave this layer out of the "
            "recipe."
        )
        self._refuse_if(_masks_anything(mask), error)

    def attach(self) -> None:
        """Register all hooks; refuses a root that already has a listener of this kind."""
        if any(self.kind == other.kind for other in listeners_of(self.root)):
            raise CaptureError(
                f"This {type(self.root).__name__} already has a {self.kind} attached. "
                "Leave the first one's block (or close it) before starting another."
            )
        self._signature = _forward_signature(self.root)
        self._check_timestep(self._signature)
        _ATTACHED.setdefault(self.root, WeakSet()).add(self)
        self._handles = [
            self.root.register_forward_pre_hook(self._called, with_kwargs=True),
            *([self.root.register_forward_hook(self._blocks.pass_on)] if self.compiled else []),
            self.root.register_forward_hook(self._close, always_call=True),
        ]
        for site, each in zip(self.sites, self._probes, strict=True):
            found = self._blocks.later(site, partial(self._refuse_mask, site))
            self._handles.append(_find_masks(site, self._is_open, found))
            self._handles += each.attach()
        self._blocks.attach()

    def _check_timestep(self, signature: inspect.Signature) -> None:
        """Refuse a name that the recipe gives and the forward has not; the default need not be there."""
        name, there = self.recipe.timestep, signature.parameters
        by_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in there.values())
        if name not in (None, Recipe.timestep, *there) and not by_name:
            raise CaptureError(
                f"{type(self.root).__name__} has no argument '{name}', the recipe's timestep (its forward has: "
                f"{', '.join(there)}). Set the recipe's timestep to one of them, or to None."
            )

    def detach(self) -> None:
        """Remove every hook; harmless when there is none."""
        for handle in self._handles:
            handle.remove()
        self._blocks.detach()
        _ATTACHED.get(self.root, WeakSet()).discard(self)
        self._handles = []
        self._close()

    @property
    def hook_ids(self) -> list[int]:
        """What the hooks are called by the modules that they are attached to."""
        return [handle.id for handle in self._handles]

    @contextmanager
    def diverted(self, on_attention: _OnAttention) -> Iterator[None]:
        """Inside the block calls of the root are none: what its sites attend with goes to another, nothing counts."""
        own = self.on_attention, self.on_open, self._calls, self._doubts
        self.on_attention, self.on_open, self._doubts = on_attention, lambda _: None, []
        try:
            yield
        finally:
            self.on_attention, self.on_open, self._calls, self._doubts = own

    @contextmanager
    def hearing(self, *inputs: Tensor) -> Iterator[None]:
        """A frame around a call of the root with these inputs, which is made where no hook sees it (`deliver`)."""
        try:
            self._called(self.root, inputs, {})
            yield
        finally:
            self._close()

    def deliver(self, site: SiteModule, inputs: AttentionInputs) -> None:
        """Says what a site attends with in the call under way; outside of one, nothing. Rows and tokens are lent: they
        may be overwritten when the next site attends."""
        if self._frame is not None:
            self.on_attention(site, self._frame, inputs)

    def _called(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._open(self._signature.bind_partial(*args, **kwargs).arguments)

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

    def _changed(self, site: SiteModule, keys: Tensor) -> Tensor:
        assert self._frame is not None, "probes ask inside a frame"
        assert self.change_keys is not None, "else no probe asks"
        return self.change_keys(site, self._frame, keys)
