"""Probes: what one attention module attends with, observed by either backend.

Both deliver the same thing, `AttentionInputs`, so that nothing behind them knows which one it was.
`ProjectionProbe` hooks the two projections: the kernel does not matter, but what happens to the
tokens after the projection stays unseen. `SdpaProbe` reads the arguments of
``scaled_dot_product_attention`` while the module runs: normalised and rotated tokens are seen as
they are, other kernels not at all. Neither changes a result.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from i2am_train.attention.recipe import SiteModule
from i2am_train.errors import CaptureError
from i2am_train.types import Backend

_SDPA = F.scaled_dot_product_attention
"""Torch's own function, also when somebody wraps it later."""


class AttentionInputs(NamedTuple):
    """What one site attends with in one evaluation: all rows of the batch, all tokens of both
    sequences, logits ``scale * generated . reference``."""

    generated: Tensor  # row head token channel: the queries
    reference: Tensor  # row head token channel: the keys
    scale: float | None  # None: channel ** -0.5

    def rows(self, rows: slice) -> AttentionInputs:
        """Some rows of the batch."""
        return AttentionInputs(self.generated[rows], self.reference[rows], self.scale)


Deliver = Callable[[AttentionInputs], None]
"""Called when a site has attended."""


@runtime_checkable
class Probe(Protocol):
    """Observes one module from `attach` until the handles are removed."""

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        ...

    def follow(self) -> list[RemovableHandle]:
        """Hook what has been put in the place of a hooked module since (an adapter's wrapper)."""
        ...

    def clear(self) -> None:
        """Drop what is left of an evaluation, also one that ended in an error."""
        ...


def probe(site: SiteModule, deliver: Deliver, is_open: Callable[[], bool]) -> Probe:
    """The probe that the site asks for. ``is_open`` tells whether an evaluation is under way; what
    happens outside one is not observed. Raises `CaptureError` if the module does not fit."""
    kinds: dict[str, type[ProjectionProbe] | type[SdpaProbe]] = {
        Backend.PROJECTIONS: ProjectionProbe,
        Backend.SDPA: SdpaProbe,
    }
    return kinds[site.site.via](site, deliver, is_open)


class _Projection:
    """One projection by its place in the model, whatever stands there: peft puts a layer with an
    adapter in the place of the plain one, which goes on inside it."""

    def __init__(self, parent: nn.Module, name: str, keep: Callable[..., None]) -> None:
        self._parent, self._name, self._keep = parent, name, keep
        self._hooked: nn.Module | None = None
        self._handle: RemovableHandle | None = None

    def follow(self) -> list[RemovableHandle]:
        """Hook the module that is there now, and no other; its handle, if that is new."""
        now: nn.Module = getattr(self._parent, self._name)
        if now is self._hooked:
            return []
        if self._handle is not None:
            self._handle.remove()
        self._hooked, self._handle = now, now.register_forward_hook(self._keep)
        return [self._handle]


class ProjectionProbe:
    """Keeps the outputs of both projections until their module has run."""

    def __init__(self, site: SiteModule, deliver: Deliver, is_open: Callable[[], bool]) -> None:
        _refuse_unseen_tokens(site)
        self._layer = site.layer
        self._module = site.module
        self._projections = tuple(
            _Projection(_parent(site, path), path.rpartition(".")[2], keep)
            for path, keep in (
                (site.site.generated_projection, self._keep_generated),
                (site.site.reference_projection, self._keep_reference),
            )
        )
        self._heads = _heads(site)
        self._scale = site.site.scale
        self._deliver = deliver
        self._is_open = is_open
        self._generated: Tensor | None = None
        self._reference: Tensor | None = None

    def attach(self) -> list[RemovableHandle]:
        """Hook the projections, and the module that they belong to."""
        return [
            *(handle for projection in self._projections for handle in projection.follow()),
            self._module.register_forward_hook(self._emit),
        ]

    def follow(self) -> list[RemovableHandle]:
        """Hook projections that replaced those hooked before."""
        return [handle for projection in self._projections for handle in projection.follow()]

    def clear(self) -> None:
        """Forget projections whose module did not come to its end."""
        self._generated = self._reference = None

    def _keep_generated(self, _: nn.Module, __: Any, output: Tensor) -> None:
        if self._is_open():
            self._generated = output

    def _keep_reference(self, _: nn.Module, __: Any, output: Tensor) -> None:
        if self._is_open():
            self._refuse_second_reference()
            # IP-Adapter projects [row, image, token, channel]
            self._reference = output.flatten(1, -2)

    def _refuse_second_reference(self) -> None:
        """Keys that come in several portions have a softmax each, which one map cannot show."""
        if self._reference is not None:
            raise CaptureError(
                f"Layer {self._layer} projected reference tokens twice in one evaluation, as "
                "IP-Adapter does with a mask for each of several reference pictures. Trace it with "
                "one reference picture, or without masks."
            )

    def _emit(self, _: nn.Module, __: Any, ___: Any) -> None:
        generated, reference = self._generated, self._reference
        self.clear()
        if self._is_open() and generated is not None and reference is not None:
            self._check_rows(len(generated), len(reference))
            self._deliver(AttentionInputs(self._split_heads(generated), self._split_heads(reference), self._scale))

    def _check_rows(self, generated: int, reference: int) -> None:
        """Keys of other rows are cut anew by the model, so that samples see each other's reference."""
        if generated != reference:
            raise CaptureError(
                f"Layer {self._layer} attends with queries of {generated} rows and keys of "
                f"{reference}. Give the model one reference for each row (IP-Adapter in diffusers "
                "takes one picture for all prompts, and repeats it itself)."
            )

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """``[row, token, head * channel]`` as ``[row, head, token, channel]``, without a copy."""
        rows, count, width = tokens.shape
        return tokens.view(rows, count, self._heads, width // self._heads).transpose(1, 2)


class SdpaProbe(TorchFunctionMode):
    """Watches torch's functions while its module runs, for the one call that is meant.

    The mode is on only inside the module's forward, so that the rest of the model and the sampler
    pay nothing.
    """

    def __init__(self, site: SiteModule, deliver: Deliver, is_open: Callable[[], bool]) -> None:
        super().__init__()
        self._site = site
        self._deliver = deliver
        self._is_open = is_open
        self._watching = ExitStack()
        self._calls = self._meant = 0

    def attach(self) -> list[RemovableHandle]:
        """Hook the module's beginning and its end (also by an error)."""
        return [
            self._site.module.register_forward_pre_hook(self._watch),
            self._site.module.register_forward_hook(self._stop, always_call=True),
        ]

    def follow(self) -> list[RemovableHandle]:
        """Nothing to do: the attention itself is watched, whatever its parts are."""
        return []

    def clear(self) -> None:
        """Stop watching; harmless when it did not."""
        self._watching.close()

    def _watch(self, *_: Any) -> None:
        if self._is_open():
            self._calls, self._meant = 0, self._site.site.call_in(self._site.module)
            self._watching.enter_context(self)

    def _stop(self, *_: Any) -> None:
        self.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Every torch function runs as it would; the meant call's arguments are delivered."""
        result = func(*args, **(kwargs or {}))
        if func is _SDPA:
            if self._calls == self._meant:
                self._deliver(self._read(*args, **(kwargs or {})))
            self._calls += 1
        return result

    def _read(  # the signature is torch's
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> AttentionInputs:
        """The call's queries and keys. Dropout is left out: a map is of the whole scores."""
        self._refuse_other_scores(query, attn_mask, is_causal)
        if enable_gqa:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return AttentionInputs(query, key.expand(*query.shape[:2], -1, -1), scale)

    def _refuse_other_scores(self, query: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
        layer = self._site.layer
        if query.ndim != 4:
            raise CaptureError(
                f"Layer {layer} attends with queries of shape {list(query.shape)}; expected "
                "[row, head, token, channel]. Observe this site by its projections."
            )
        if is_causal or (attn_mask is not None and _changes_scores(attn_mask)):
            kind = "causally" if is_causal else "under a mask"
            raise CaptureError(
                f"Layer {layer} attends {kind}, and maps of the scores without it would not be "
                "what the model saw. Call the model without an attention mask, or leave this layer "
                "out of the recipe."
            )


def _changes_scores(mask: Tensor) -> bool:
    """Whether a mask (boolean: True is let through, else added to the logits) does anything."""
    return not bool(mask.all()) if mask.dtype == torch.bool else bool(mask.any())


def _heads(site: SiteModule) -> int:
    declared = site.site.heads
    heads = declared if isinstance(declared, int) else getattr(site.module, declared, None)
    if not isinstance(heads, int):
        raise CaptureError(
            f"Layer {site.layer}: {type(site.module).__name__} has no number of heads in "
            f"'{declared}'. Set the site's heads to a number or to the attribute's name."
        )
    return heads


def _refuse_unseen_tokens(site: SiteModule) -> None:
    """Refuse modules whose projections are not called, or not what they attend with."""
    module = site.module
    processor = getattr(module, "processor", None)
    # diffusers leaves the flag when it unfuses, and goes back to the old processor
    is_fused = processor is None or "Fused" in type(processor).__name__
    if getattr(module, "fused_projections", False) and is_fused:
        raise CaptureError(
            f"Layer {site.layer} has fused projections, so its separate ones are never called. "
            "Call unfuse_qkv_projections() on the model before tracing, or observe the attention "
            f"call instead (via='{Backend.SDPA}')."
        )
    if getattr(module, "norm_q", None) is not None or getattr(module, "norm_k", None) is not None:
        raise CaptureError(
            f"Layer {site.layer} normalises its tokens after the projection, so projections are "
            "not what it attends with. Observe the attention call instead: "
            f"trace(..., via='{Backend.SDPA}'), or Site(via='{Backend.SDPA}') in the recipe."
        )


class MaskGuard:
    """Refuses calls of a module in which a mask keeps tokens from the reference: the maps would give
    them a share that they do not have."""

    def __init__(self, site: SiteModule, is_open: Callable[[], bool]) -> None:
        self._layer, self._module, self._is_open = site.layer, site.module, is_open
        names = list(inspect.signature(site.module.forward).parameters)
        self._places = {name: names.index(name) if name in names else sys.maxsize for name in site.site.masks}

    def attach(self) -> RemovableHandle:
        """Look at the arguments of each call."""
        return self._module.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_open():
            return
        for name, place in self._places.items():
            mask = args[place] if place < len(args) else kwargs.get(name)
            if mask is not None and _masks_anything(mask):
                raise CaptureError(
                    f"Layer {self._layer} attends under a mask ({name}), and maps of the scores "
                    "without it would not be what the model saw. Call the model without it (drop "
                    "the tokens that it hides), or leave this layer out of the recipe."
                )


def _masks_anything(mask: Any) -> bool:
    """Whether a mask does anything; one for each region of the picture (a list) always does."""
    if isinstance(mask, Tensor):
        return _changes_scores(mask)
    return any(one is not None for one in mask)


def _parent(site: SiteModule, path: str) -> nn.Module:
    """The module that holds a projection, which must be there."""
    try:
        site.module.get_submodule(path)
        return site.module.get_submodule(path.rpartition(".")[0])
    except AttributeError:
        children = ", ".join(name for name, _ in site.module.named_children()) or "none"
        raise CaptureError(
            f"Layer {site.layer}: {type(site.module).__name__} has no submodule '{path}' (it has: "
            f"{children}). "
            "Set the site's projections to submodules whose outputs are the projected tokens."
        ) from None
