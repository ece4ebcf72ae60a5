"""Readings of the paper's equations 15-21 as presets of the terms' keywords; ``types.LossVariant`` says what each is.

What they do to the attention: the paper's hinge acts on misordered pairs only and is 0 for a constant centre, so that
attention may collapse to one point, which also minimises the other two terms. The authors' code rewards the gaps of
pairs that are in order already: the reward never vanishes, which is the force that keeps attention spread, and
misordered pairs feel nothing. ``mixed`` is both: a constant force on every pair.

The first five are pinned by golden vectors (``tests/golden``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from i2am_train.losses.attention import attention_centers, cwg, dcml, tv
from i2am_train.types import LossVariant as V


class Variant(NamedTuple):
    """How one reading computes centres (eq. 15) and the paper's three terms."""

    dcml: Callable[..., Tensor]
    """Eqs. 16-18."""
    tv: Callable[..., Tensor] = tv
    """Eq. 19."""
    cwg: Callable[..., Tensor] = cwg
    """Eqs. 20-21."""
    centers: Callable[[Tensor], Tensor] = attention_centers


VARIANTS: dict[V, Variant] = {
    V.PAPER: Variant(
        dcml=partial(dcml, force="hinge", norm="sum"),
        tv=partial(tv, norm="sum"),
        cwg=partial(cwg, norm="slots", origin=1),
        centers=partial(attention_centers, origin=1, factor=True),
    ),
    V.PAPER_WITHOUT_FACTOR: Variant(
        dcml=partial(dcml, force="hinge", norm="sum"),
        tv=partial(tv, norm="sum"),
        cwg=partial(cwg, norm="slots", origin=1),
        centers=partial(attention_centers, origin=1),
    ),
    V.AUTHORS_V1: Variant(
        dcml=partial(dcml, force="reward", norm="slots"),
        tv=partial(tv, power=1, norm="slots"),
        cwg=partial(cwg, power=1, norm="batch", sigma=V.AUTHORS_V1.sigma),
    ),
    V.AUTHORS_V2: Variant(
        dcml=partial(dcml, force="reward", norm="slots"),
        tv=partial(tv, norm="slots"),
        cwg=partial(cwg, power=1, norm="slots"),
    ),
    V.HINGE: Variant(dcml=partial(dcml, force="hinge")),
    V.REWARD: Variant(dcml=partial(dcml, force="reward")),
    V.MARGIN: Variant(dcml=partial(dcml, force="margin")),
    V.MIXED: Variant(dcml=partial(dcml, force="mixed")),
}
