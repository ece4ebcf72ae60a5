"""What a layer's choice does: `uniform_attention` takes it away, so that images with and without can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from i2am_train.attention.frames import Frame, hear_branches
from i2am_train.attention.hooks import Listener, eager_while_listening
from i2am_train.attention.lookup import SiteModule, choose_sites, chosen_recipe, resolve_root, resolve_sites
from i2am_train.attention.recipe import LayerId, Recipe
from i2am_train.types import Branch


@contextmanager
def uniform_attention(
    target: Any, recipe: Recipe | str | None = None, *, layers: Sequence[LayerId] | None = None
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

    Raises:
        CaptureError: the model does not fit the recipe, a layer does not exist, or a call does not say which of its
            rows are conditional.

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
        rows = _ConditionalRows(chosen, branch)
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

    def __init__(self, recipe: Recipe, branch: Callable[[], Branch | None]) -> None:
        self._recipe, self._branch = recipe, branch
        self._rows: slice | None = None

    def see(self, frame: Frame) -> None:
        """Ask once in each evaluation, where the caller's frame is."""
        self._rows = self._recipe.conditional_rows(frame.with_caller(self._branch))

    def made_equal(self, site: SiteModule, frame: Frame, keys: Tensor) -> Tensor:
        """Keys ``[row, token, ...]`` with the reference's of conditional rows replaced by their mean."""
        if self._rows is None:
            return keys
        at = site.site.reference.places(keys.shape[1], frame.latent).index
        changed = keys.clone()
        rows = changed[self._rows]
        rows[:, at] = rows[:, at].mean(dim=1, keepdim=True)
        return changed
