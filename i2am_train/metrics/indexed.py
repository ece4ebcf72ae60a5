"""What every metric over a dataset shares: it knows which sample is which.

A sampler that spreads a dataset over processes repeats a few samples so that each process gets
equally many. Metrics here take the sample's index along with its images, drop such repetitions and
sort, so that two processes, other batch sizes and another order give the number of one process.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from i2am_train.errors import DataError


def first_of_each(index: Int[Tensor, " samples"]) -> Int[Tensor, " kept"]:
    """Positions of the first occurrence of every index, in ascending order of the index.

    >>> first_of_each(torch.tensor([7, 3, 7, 5])).tolist()
    [1, 3, 0]
    """
    order = index.argsort(stable=True)
    ascending = index[order]
    kept = torch.ones_like(ascending, dtype=torch.bool)
    kept[1:] = ascending[1:] != ascending[:-1]
    return order[kept]


class IndexedMetric(Metric):
    """Base of metrics that keep one row per sample in list states, with the sample's index."""

    full_state_update = False
    is_differentiable = False
    index: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("index", default=[], dist_reduce_fx="cat")

    def _remember(self, index: Int[Tensor, " samples"], **rows: Tensor) -> None:
        """Append a batch to the list states named by the keywords."""
        first = next(iter(rows.values()))
        batch, device = first.shape[0], first.device
        if index.shape != (batch,):
            raise DataError(
                f"{type(self).__name__} got {batch} images and an index of shape "
                f"{tuple(index.shape)}. Pass the batch's 'index', one number per sample."
            )
        self.index.append(index.to(device))
        for state, values in rows.items():
            getattr(self, state).append(values)

    def _gathered(self, *states: str) -> list[Tensor]:
        """Return the states' rows, each sample once, by ascending index."""
        if len(self.index) == 0:
            raise DataError(f"{type(self).__name__} has seen no images. Update it before compute.")
        kept = first_of_each(dim_zero_cat(self.index))
        return [dim_zero_cat(getattr(self, state))[kept] for state in states]
