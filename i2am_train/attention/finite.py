"""Maps that are no numbers: found once, in the small reduced vectors, and traced back to where they began.

An infinite query or key, or one that is not a number, makes the column means of its layer and step
not a number (a softmax over it has no value), so that nothing is looked at while the model runs.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from i2am_train.attention.store import AttributionStore, LayerRecord


def not_finite(store: AttributionStore) -> str | None:
    """Where the first map that is not finite comes from, in words; None if all are finite."""
    found = [
        (step, record.layer) for record in store.layers if (step := _first_step(record)) is not None
    ]
    if not found:
        return None
    step, layer = min(found, key=lambda where: where[0])
    if step == store.steps:
        return f"the score matrix of layer {layer}"
    timestep = store.timesteps[step]
    at = "" if timestep is None else f" (timestep {timestep:g})"
    return f"the attention of layer {layer} in step {step + 1} of {store.steps}{at}"


def _first_step(record: LayerRecord) -> int | None:
    """The first step with a vector that is not finite, counted from 0; the number of steps if only a
    score matrix is not; None if all is."""
    steps = [int(bad.nonzero()[0]) for bad in map(_bad_steps, _vectors(record)) if bad.any()]
    if steps:
        return min(steps)
    matrices = record.scores_over_reference, record.scores_over_generated
    finite = all(bool(matrix.isfinite().all()) for matrix in matrices if matrix is not None)
    return None if finite else record.to_generated.shape[1]


def _vectors(record: LayerRecord) -> Iterator[Tensor]:
    yield from (record.to_generated, record.to_reference)
    if record.mass is not None:
        yield record.mass


def _bad_steps(vectors: Tensor) -> Tensor:
    """Which steps of ``[batch, step, head, token]`` hold a value that is not finite."""
    return ~vectors.isfinite().transpose(0, 1).flatten(1).all(dim=1)
