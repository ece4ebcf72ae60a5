"""Mean over a dataset of a number that some samples do not have."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from i2am_train.metrics.indexed import IndexedMetric


class SampleMean(IndexedMetric):
    """Mean of per-sample values; NaN means that the sample has no value, and it is left out.

    Averaged in float64 over every sample once, so that the order, the batch size and the number of
    processes do not show. A subclass computes its values and calls :meth:`_add`.

    Attributes:
        skipped: how many samples were left out, over all processes; known after ``compute``.
    """

    values: list[Tensor]
    skipped: int

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.skipped = 0

    def compute(self) -> Tensor:
        """Mean over the samples with a value, float32; NaN if no sample has one."""
        (values,) = self._gathered("values")
        missing = values.isnan().reshape(len(values), -1).any(dim=1)
        self.skipped = int(missing.sum())
        return values[~missing].double().mean(dim=0).float()

    def _add(self, values: Float[Tensor, "batch *shape"], index: Int[Tensor, " batch"]) -> None:
        self._remember(index, values=values.detach().float())
