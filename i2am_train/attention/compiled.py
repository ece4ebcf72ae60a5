"""Hooks in a network whose blocks are compiled: seen by the compiler, or else the network runs uncompiled.

`torch.compile` traces a module's hooks into its graph, where those of `trace` may do nothing but keep what they see:
that becomes an output of the graph, and is delivered once the compiled module has run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from i2am_train.attention.lookup import SiteModule
from i2am_train.attention.recipe import Recipe
from i2am_train.errors import CaptureError
from i2am_train.types import Backend


def guard_hooks() -> None:
    """Makes torch.compile notice hooks that come and go; call it before the first compiled step.

    By default it reuses what it compiled for a module where only the hooks differ. Hooks of a tap or a trace would be
    silently ignored where they are attached after the first step, or beside a block of the same code under gradient
    checkpointing.

    A hook that keeps what it sees in a checkpointed block breaks the graph into a piece for each layer, unless the
    compiler may keep it from running again when the block is recomputed. The tap's hooks would do nothing then; older
    versions of torch have no such option, and more graphs.
    """
    import torch._dynamo

    config = torch._dynamo.config
    # Each of a block's shapes, listened to or not, is a graph of the same code; beyond the limit, which is 8, the
    # compiler would leave the rest as it is and say nothing.
    config.recompile_limit = max(config.recompile_limit, 64)
    config.skip_nnmodule_hook_guards = False
    if hasattr(config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process; where nothing breaks them, one for each shape of a
    repeated block, and one more for each that is listened to."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def eager_while_listening() -> AbstractContextManager[object]:
    """Keeps compiled functions from running: hooks added after a compilation are silently ignored.

    Free when nothing was compiled: the compiler is not even imported then.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def compiled_blocks(
    target: Any, recipe: Recipe, root: nn.Module, sites: Sequence[SiteModule]
) -> dict[SiteModule, nn.Module]:
    """The compiled block (``block.compile()``) that each site lies in, where the network may stay compiled under hooks;
    sites of other blocks are left out.

    Empty where it has to run uncompiled: nothing that is listened to was compiled, or the root was, so that its own
    hooks would be in the graph, or the compiler does not notice hooks (`guard_hooks`), or the attention call is
    observed, whose watch is not a hook that only keeps, or a module was compiled by another way, whose end nothing
    outside of the graph can be attached to.
    """
    blocks = {site: block for site in sites if (block := _compiled_block(root, site.path)) is not None}
    above = list(_above(target, recipe))
    stays = (
        _hooks_are_guarded()
        and not any(site.site.via is Backend.SDPA for site in blocks)
        and not any(module._compiled_call_impl is not None for module in above)
        and not any(_has_compiled_forward(module) for module in (*above, *root.modules()))
    )
    return blocks if stays else {}


def _hooks_are_guarded() -> bool:
    if "torch._dynamo" not in sys.modules:
        return False
    return not getattr(torch._dynamo.config, "skip_nnmodule_hook_guards", True)


def _compiled_block(root: nn.Module, path: str) -> nn.Module | None:
    """The outermost compiled module on the way from a root to one of its modules."""
    module = root
    for name in path.split("."):
        module = module.get_submodule(name)
        if module._compiled_call_impl is not None:
            return module
    return None


def _above(target: Any, recipe: Recipe) -> Iterator[nn.Module]:
    """The modules from what is traced down to the recipe's root."""
    found = target
    for name in ("", *filter(None, recipe.root.split("."))):
        found = getattr(found, name) if name else found
        if isinstance(found, nn.Module):
            yield found


def _has_compiled_forward(module: nn.Module) -> bool:
    """Whether ``torch.compile`` made its forward: what it returns for a module, or ``module.forward = compiled``."""
    return hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


class CompiledBlocks:
    """Holds what hooks in compiled blocks see until the block has run, and then passes it on in the order it came.

    ``is_open`` tells whether an evaluation is under way. In the first one a block of which nothing is seen is refused.
    """

    def __init__(self, blocks: Mapping[SiteModule, nn.Module], is_open: Callable[[], bool]) -> None:
        self._blocks = blocks
        self._is_open = is_open
        self._held: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._heard: set[nn.Module] = set()
        self._surrounded: list[tuple[nn.Module, Any, Any]] = []

    def later(self, site: SiteModule, then: Callable[..., None]) -> Callable[..., None]:
        """What a site's hook calls in the place of ``then``: in a compiled block, something that only keeps the
        arguments."""
        return partial(self._hold, then) if site in self._blocks else then

    def attach(self) -> None:
        """Stand around each block's compiled call: outside of its graph, where its own hooks may be inside."""
        for block in dict.fromkeys(self._blocks.values()):
            compiled, around = block._compiled_call_impl, self._around(block)
            self._surrounded.append((block, compiled, around))
            block._compiled_call_impl = around

    def detach(self) -> None:
        """Leave the blocks as they were, but one that was compiled anew meanwhile."""
        for block, compiled, around in self._surrounded:
            if block._compiled_call_impl is around:
                block._compiled_call_impl = compiled
        self._surrounded.clear()
        self._held.clear()

    def _around(self, block: nn.Module) -> Callable[..., Any]:
        compiled: Any = block._compiled_call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            self._held.clear()  # of a call that failed
            output = compiled(*args, **kwargs)
            if self._held:
                self._heard.add(block)
            elif self._is_open() and block not in self._heard:
                self._refuse_silent(block)
            self.pass_on()
            return output

        return call

    def pass_on(self, *_: Any) -> None:
        """Also a hook of the root, for blocks that were compiled once more as a part of a function around it."""
        for then, seen in self._held:
            then(*seen)
        self._held.clear()

    def _hold(self, then: Callable[..., None], *seen: Any) -> None:
        self._held.append((then, seen))

    def _refuse_silent(self, block: nn.Module) -> None:
        layers = ", ".join(site.layer for site, its in self._blocks.items() if its is block)
        raise CaptureError(
            f"The compiled {type(block).__name__} of {layers} ran, and its attention was not seen. Either what "
            "torch.compile made of it before it guarded hooks is still in use: call torch.compiler.reset(), and from "
            "now on guard_hooks() (i2am_train.attention) before the model's first compiled call. Or it did not attend: "
            "give the adapter a scale above zero, switch off caches that skip it, or leave the layer out of the recipe."
        )
