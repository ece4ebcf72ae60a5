"""`ScoreTap`: the scores of chosen layers of the last training step, with their gradient, for the attention losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from i2am_train.attention.frames import Frame
from i2am_train.attention.hooks import Listener, choose_sites, resolve_root, resolve_sites
from i2am_train.attention.inputs import AttentionInputs
from i2am_train.attention.known import chosen_recipe
from i2am_train.attention.recipe import LayerId, Recipe, SiteModule, SitePlaces
from i2am_train.errors import CaptureError
from i2am_train.ops.attention import head_mean_scores
from i2am_train.types import GridSize


class _LastForward:
    """What one layer attended with in the last forward, and its scores once somebody asked for them."""

    def __init__(self, site: SiteModule, frame: Frame, inputs: AttentionInputs) -> None:
        self.places: SitePlaces = site.places(inputs.generated.shape[2], inputs.reference.shape[2], frame.latent)
        self._inputs = inputs
        self._scores: Tensor | None = None

    def scores(self) -> Tensor:
        if self._scores is None:
            self._scores = head_mean_scores(
                self.places.generated.take(self._inputs.generated),
                self.places.reference.take(self._inputs.reference),
                self._inputs.scale,
            )
        return self._scores


class ScoreTap:
    """Listens to a model in training and gives the head-mean scores of chosen layers, differentiable.

    ::

        with ScoreTap(model, layers=[2]) as tap:
            prediction = model(...)                 # any number of training steps
            scores = tap.scores(2)                  # Float[Tensor, "batch generated reference"]

    All rows of the batch are given: in training every row has its own condition. Evaluations
    without gradient (sampling for validation) are ignored. A forward under gradient checkpointing
    works with the non-reentrant kind, which diffusers uses: the recomputation in backward is not
    listened to, and the gradient arrives (tested). So it does from a model under `torch.compile`
    that guards hooks (`torch._dynamo.config.skip_nnmodule_hook_guards = False`): the layer's
    projections are outputs of the compiled graph. Scores are float32 whatever autocast says, and
    are computed only when asked for.
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
                f"Layer {name} has no scores yet: no forward with gradient ran since the tap was "
                "attached. Call the model first, not under torch.no_grad(); with gradient "
                "checkpointing, use the non-reentrant kind (use_reentrant=False); with torch.compile, "
                "set torch._dynamo.config.skip_nnmodule_hook_guards=False before, or hooks are "
                "ignored."
            )
        return self._last[name]

    def _forget(self, _: Frame) -> None:
        if torch.is_grad_enabled():
            self._last.clear()

    def _keep(self, site: SiteModule, frame: Frame, inputs: AttentionInputs) -> None:
        if not torch.is_grad_enabled():
            return
        self._last[site.layer] = _LastForward(site, frame, inputs)
