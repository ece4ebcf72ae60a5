"""Options of attribution: how attention becomes maps and scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from i2am_train.config.build import Options
from i2am_train.config.constraints import BelowOne, Count, Layer, Layers, NotNegative, at_least
from i2am_train.types import LayerWeighting


@dataclass(kw_only=True, slots=True)
class AttributionConfig(Options):
    """How attention becomes maps and scores."""

    delta: BelowOne = 0.4
    """Threshold of the normalised maps, in [0, 1): smaller values become 0."""
    penalty: NotNegative = 3.0
    """IMACS penalty lambda on attention outside the mask."""
    deltas: list[BelowOne] = field(default_factory=list)
    """More thresholds that IMACS is reported at, from the same maps."""
    penalties: list[NotNegative] = field(default_factory=lambda: [1.0, 3.0, 5.0])
    """More penalties, likewise; the scores of every delta and lambda are called imacs_g@d0.4_l3."""
    weighting: LayerWeighting = LayerWeighting.PAPER
    """How layers of different grids are summed: paper (plain sum) or density (balanced)."""
    layer: Layer = 2
    """Layer of correspondence error, PCK, spread and entropy: a paper number 1...9 or a name."""
    layers: Layers | None = None
    """Layers that enter the unified maps; null: all nine."""
    inpaint_queries: bool = True
    """Reference-side maps average over generated positions inside the inpainting mask only, as the
    authors' code does; false: over all, as the paper writes."""
    time_groups: Count = 5
    """Groups of sampling steps in time-level maps; group 0 is the noisiest."""
    byte_budget: Annotated[int, at_least(2**16)] = 64 * 2**20
    """Memory that capture may use for intermediate results, in bytes."""
