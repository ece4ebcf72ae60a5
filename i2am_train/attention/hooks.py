"""Hooks: what one attention module attends with.

Modules are observed, not replaced: the model keeps its kernel and the output stays bit-identical. A *probe* watches one
module by either backend, and delivers `AttentionInputs`, so that nothing behind it knows which one it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from i2am_train.attention.frames import Frame
from i2am_train.attention.lookup import SiteModule
from i2am_train.errors import CaptureError
from i2am_train.ops.attention import keys_per_head
from i2am_train.types import Backend

_SDPA = F.scaled_dot_product_attention
"""Torch's own function, also when somebody wraps it later."""


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """What one site attends with in one evaluation: all rows of the batch, all tokens of both sequences. Its logits are
    ``scale * generated . reference`` (eq. 3). It unpacks like a tuple, and is none: torch 2.11 compiles no hook that
    keeps a named one."""

    generated: Float[Tensor, "row head generated channel"]
    """The queries."""
    reference: Float[Tensor, "row key_head reference channel"]
    """The keys; of fewer heads where a run of heads shares them."""
    scale: float | None
    """None: ``channel ** -0.5``."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.generated, self.reference, self.scale))

    def rows(self, rows: slice) -> AttentionInputs:
        """Some rows of the batch.

        >>> AttentionInputs(torch.zeros(4, 2, 6, 8), torch.ones(4, 2, 5, 8), None).rows(slice(2, 4)).generated.shape
        torch.Size([2, 2, 6, 8])
        """
        return AttentionInputs(self.generated[rows], self.reference[rows], self.scale)

    def per_head(self) -> AttentionInputs:
        """With keys of their own for all heads of queries: a copy where heads share them."""
        return replace(self, reference=keys_per_head(self.reference, self.generated.shape[1]))


Deliver = Callable[[AttentionInputs], None]
"""Called when a site has attended."""
Refuse = Callable[["Tensor | bool", CaptureError], None]
"""Called with what makes maps wrong if it is true, and the error that says so."""
_Change = Callable[[Tensor], Tensor] | None
"""What becomes of the keys before a site attends, ``[row, token, head, channel]``; None: they stay."""
ChangeKeys = Callable[[SiteModule, Frame, Tensor], Tensor]
"""Called before a site attends, with its keys ``[row, token, head, channel]``; what it returns takes their place."""


class _Projection:
    """One projection by its place in the model, whatever stands there: peft puts a layer with an adapter in the place
    of the plain one, which goes on inside it."""

    def __init__(self, parent: nn.Module, name: str, keep: Callable[..., Tensor | None]) -> None:
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


class _ProjectionProbe:
    """Keeps the outputs of both projections until their module has run."""

    def __init__(self, site: SiteModule, deliver: Deliver, is_open: Callable[[], bool], change: _Change) -> None:
        _refuse_unseen_tokens(site)
        self._change = change
        self._layer = site.layer
        self._module = site.module
        self._projections = tuple(
            _Projection(_parent(site, path), path.rpartition(".")[2], keep)
            for path, keep in (
                (site.site.generated_projection, self._keep_generated),
                (site.site.reference_projection, self._keep_reference),
            )
        )
        self._heads = heads_of(site)
        self._scale = site.site.scale
        self._deliver = deliver
        self._is_open = is_open
        self._generated: Tensor | None = None
        self._reference: Tensor | None = None

    def attach(self) -> list[RemovableHandle]:
        """Hook the projections, and the module that they belong to."""
        return [*self.follow(), self._module.register_forward_hook(self._emit)]

    def follow(self) -> list[RemovableHandle]:
        """Hook projections that replaced those hooked before."""
        return [handle for projection in self._projections for handle in projection.follow()]

    def clear(self) -> None:
        """Forget projections whose module did not come to its end."""
        self._generated = self._reference = None

    def _keep_generated(self, _: nn.Module, __: Any, output: Tensor) -> None:
        if self._is_open():
            self._generated = output

    def _keep_reference(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        if not self._is_open():
            return None
        self._refuse_second_reference()
        keys = output.flatten(1, -2)  # IP-Adapter projects [row, image, token, channel]
        if self._change is not None:
            keys = self._change(self._split_heads(keys).transpose(1, 2)).flatten(2)
        self._reference = keys
        return None if self._change is None else keys.view_as(output)

    def _refuse_second_reference(self) -> None:
        """Keys that come in several portions have a softmax each, which one map cannot show."""
        if self._reference is not None:
            raise CaptureError(
                f"Layer {self._layer} projected reference tokens twice in one evaluation, as IP-Adapter does with a "
                "mask for each of several reference pictures. Trace it with one reference picture, or without masks."
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
                f"Layer {self._layer} attends with queries of {generated} rows and keys of {reference}. Give the model "
                "one reference for each row (IP-Adapter in diffusers takes one picture for all prompts, and repeats it "
                "itself)."
            )

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """``[row, token, head * channel]`` as ``[row, head, token, channel]``, without a copy."""
        rows, count, width = tokens.shape
        if width % self._heads:
            raise CaptureError(
                f"Layer {self._layer}: its tokens are {width} wide, which {self._heads} heads do not divide. Set the "
                "site's heads to the module's number of heads, or to the attribute that holds it."
            )
        return tokens.view(rows, count, self._heads, width // self._heads).transpose(1, 2)


class _SdpaProbe(TorchFunctionMode):
    """Watches torch's functions while its module runs, for the one call that is meant.

    The mode is on only inside the module's forward, so that the rest of the model and the sampler pay nothing.
    """

    def __init__(
        self, site: SiteModule, deliver: Deliver, is_open: Callable[[], bool], change: _Change, refuse: Refuse
    ) -> None:
        super().__init__()
        self._change, self._refuse = change, refuse
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
        """Every torch function runs as it would, but for keys that are changed; the meant call's arguments are
        delivered."""
        kwargs = kwargs or {}
        is_meant = func is _SDPA and self._calls == self._meant
        if is_meant and self._change is not None:
            bound = inspect.signature(self._read).bind(*args, **kwargs).arguments
            keys = self._read(*args, **kwargs).per_head().reference
            bound["key"] = self._change(keys.transpose(1, 2)).transpose(1, 2)
            if bound.pop("enable_gqa", False):  # keys of their own for all heads, so values, too
                bound["value"] = keys_per_head(bound["value"], bound["query"].shape[1])
            args, kwargs = (), bound
        result = func(*args, **kwargs)
        if is_meant:
            self._deliver(self._read(*args, **kwargs))
        self._calls += func is _SDPA
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
        heads = key.shape[1] if enable_gqa else query.shape[1]
        return AttentionInputs(query, key.expand(len(query), heads, -1, -1), scale)

    def _refuse_other_scores(self, query: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
        layer = self._site.layer
        if query.ndim != 4:
            raise CaptureError(
                f"Layer {layer} attends with queries of shape {list(query.shape)}; expected "
                "[row, head, token, channel]. Observe this site by its projections."
            )
        if is_causal or attn_mask is not None:
            kind = "causally" if is_causal else "under a mask"
            error = CaptureError(
                f"Layer {layer} attends {kind}, and maps of the scores without it would not be what the model saw. "
                "Call the model without an attention mask, or leave this layer out of the recipe."
            )
            self._refuse(is_causal or (attn_mask is not None and changes_scores(attn_mask)), error)


Probe = _ProjectionProbe | _SdpaProbe
"""Observes one module: ``attach`` registers its hooks, ``follow`` hooks what has been put in the place of a hooked
module since (an adapter's wrapper), and ``clear`` drops what is left of an evaluation, also one that failed."""


def make_probe(
    site: SiteModule, deliver: Deliver, is_open: Callable[[], bool], change: _Change, refuse: Refuse
) -> Probe:
    """The probe that the site asks for. ``is_open`` tells whether an evaluation is under way; what happens outside one
    is not observed. Raises `CaptureError` if the module does not fit."""
    if site.site.via is Backend.SDPA:
        return _SdpaProbe(site, deliver, is_open, change, refuse)
    return _ProjectionProbe(site, deliver, is_open, change)


def changes_scores(mask: Tensor) -> Tensor:
    """Whether a mask (boolean: True is let through, else added to the logits) does anything; not read."""
    return ~mask.all() if mask.dtype == torch.bool else mask.any()


def heads_of(site: SiteModule) -> int:
    """The number of heads that the site or its module declares. Raises `CaptureError` where neither does."""
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


def _parent(site: SiteModule, path: str) -> nn.Module:
    """The module that holds a projection, which must be there."""
    try:
        site.module.get_submodule(path)
        return site.module.get_submodule(path.rpartition(".")[0])
    except AttributeError:
        children = ", ".join(name for name, _ in site.module.named_children()) or "none"
        raise CaptureError(
            f"Layer {site.layer}: {type(site.module).__name__} has no submodule '{path}' (it has: {children}). Set the "
            "site's projections to submodules whose outputs are the projected tokens."
        ) from None
