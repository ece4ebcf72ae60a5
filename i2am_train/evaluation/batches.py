"""Batches as the unit that is kept: the same samples on any number of processes and after any restart."""


def batches(count: int, size: int) -> list[range]:
    """Positions of ``count`` samples, batch by batch.

    >>> batches(5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
