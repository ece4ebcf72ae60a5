"""Gradient accumulation: what the batches of one optimizer step share.

Attention terms are means over the samples whose condition was not dropped. For several batches to be one large batch,
all of them must divide by the same number: that of the whole step. Order and dropped conditions are functions of
(seed, epoch, sample), so it is known before the first of them is computed.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from i2am_train.training.draws import Draws


def batches_of_step(
    order: list[int], batch_size: int, batch_index: int, accumulate: int, batches: int
) -> list[list[int]]:
    """The samples of each batch that goes into the same optimizer step as batch ``batch_index`` of the epoch.

    ``order`` is the epoch's, on this process; the epoch has ``batches``, and its last step may have fewer than others.

    >>> batches_of_step([5, 3, 0, 1, 4, 2], batch_size=2, batch_index=1, accumulate=2, batches=3)
    [[5, 3], [0, 1]]
    >>> batches_of_step([5, 3, 0, 1, 4, 2], batch_size=2, batch_index=2, accumulate=2, batches=3)
    [[4, 2]]
    """
    first = batch_index - batch_index % accumulate
    starts = [number * batch_size for number in range(first, min(first + accumulate, batches))]
    return [order[start : start + batch_size] for start in starts]


class ConditionedCount:
    """Mean number of samples per batch of an optimizer step whose condition is not dropped, worked out once a step."""

    def __init__(self) -> None:
        self._batches: list[list[int]] = []
        self._epoch = -1
        self._count = torch.zeros(())

    def __call__(
        self, batches: list[list[int]], epoch: int, draws: Callable[[list[int]], Draws]
    ) -> Float[Tensor, ""]:
        """``batches`` are the step's (:func:`batches_of_step`), ``draws`` gives the random numbers of samples."""
        if (batches, epoch) != (self._batches, self._epoch):
            dropped = [draws(batch).dropped for batch in batches]
            self._count = (~torch.cat(dropped)).sum() / len(batches)
            self._batches, self._epoch = batches, epoch
        return self._count
