"""What a layer's choice does: `uniform_attention` takes it away, so that images with and without can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from i2am_train.attention.compiled import eager_while_listening
from i2am_train.attention.frames import Frame, hear_branches
from i2am_train.attention.listener import Listener
from i2am_train.attention.lookup import SiteModule, choose_sites, chosen_recipe, resolve_root, resolve_sites
from i2am_train.attention.recipe import LayerId, Recipe
from i2am_train.errors import CaptureError
from i2am_train.types import Branch


@contextmanager
def uniform_attention(
    target: Any,
    recipe: Recipe | str | None = None,
    *,
    layers: Sequence[LayerId] | None = None,
    heads: Sequence[int] | None = None,
) -> Iterator[None]:
    """Inside the block, some layers attend to all reference tokens alike: they cannot choose where to look.

    Each key of the reference becomes the mean key, so that their scores are equal whatever the query is, and what the
    layer reads is the mean of the values. The unconditional rows, and the keys of other tokens in the same softmax
    (models that attend to both pictures), stay as they are. How much the image changes is what the layer's choice is
    worth to it: a layer without effect cannot be repaired to any effect.

    Args:
        target: model or pipeline.
        recipe: as for `trace`; None asks the model, or recognises it.
        layers: by name or by the paper's number; None: all of the recipe's.
        heads: which heads of these layers, from 0; None: all.

    Raises:
        CaptureError: the model does not fit the recipe, a layer or a head does not exist, or a call does not say which
            of its rows are conditional.

    >>> import torch
    >>> from torch import nn
    >>> from i2am_train.attention import Site, Tokens
    >>> class Attention(nn.Module):
    ...     heads = 1
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.to_q, self.to_k = nn.Identity(), nn.Identity()
    ...     def forward(self, x, reference):
    ...         return (self.to_q(x) @ self.to_k(reference).mT).softmax(-1) @ reference
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.look = Attention()
    ...     def forward(self, sample, reference):
    ...         return self.look(sample.flatten(2).mT, reference)
    >>> recipe = Recipe("", (Site("look", reference=Tokens(grid=None)),), timestep=None, rows="all")
    >>> net, sample, reference = Net(), torch.full((1, 1, 1, 1), 9.0), torch.tensor([[[0.0], [1.0]]])
    >>> with uniform_attention(net, recipe):
    ...     net(sample, reference).item()
    0.5
    >>> round(net(sample, reference).item(), 3)
    1.0
    """
    chosen = chosen_recipe(target, recipe)
    root = resolve_root(target, chosen)
    sites = resolve_sites(root, chosen)
    with eager_while_listening(), hear_branches(root) as branch:
        rows = _ConditionalRows(chosen, branch, heads)
        listener = Listener(
            root,
            chosen,
            sites if layers is None else choose_sites(sites, layers),
            on_attention=lambda site, frame, inputs: None,
            kind="uniform_attention",
            on_open=rows.see,
            change_keys=rows.made_equal,
        )
        try:
            listener.attach()
            yield
        finally:
            listener.detach()


class _ConditionalRows:
    """Which rows of the evaluation under way are conditional, and what becomes of their keys."""

    def __init__(self, recipe: Recipe, branch: Callable[[], Branch | None], heads: Sequence[int] | None) -> None:
        self._recipe, self._branch, self._heads = recipe, branch, heads
        self._rows: slice | None = None

    def see(self, frame: Frame) -> None:
        """Ask once in each evaluation, where the caller's frame is."""
        self._rows = self._recipe.conditional_rows(frame.with_caller(self._branch))

    def made_equal(self, site: SiteModule, frame: Frame, keys: Tensor) -> Tensor:
        """Keys ``[row, token, head, channel]`` with the reference's of conditional rows replaced by their mean."""
        if self._rows is None:
            return keys
        heads = self._heads_of(site, keys.shape[2])
        at = site.site.reference.places(keys.shape[1], frame.latent).index
        changed = keys.clone()
        rows = changed[self._rows]
        reference = rows[:, at]
        equal = reference.mean(dim=1, keepdim=True).expand_as(reference)
        if heads is not None:
            chosen = torch.zeros(keys.shape[2], dtype=torch.bool, device=keys.device)
            chosen[heads] = True
            equal = torch.where(chosen[:, None], equal, reference)
        rows[:, at] = equal
        return changed

    def _heads_of(self, site: SiteModule, count: int) -> list[int] | None:
        if self._heads is None:
            return None
        missing = [head for head in self._heads if not 0 <= head < count]
        if missing or not self._heads:
            raise CaptureError(
                f"heads={list(self._heads)} is not possible: layer {site.layer} has {count} heads, numbered from 0. "
                f"Give some of 0...{count - 1}, or None for all."
            )
        return list(self._heads)
