"""The readings of the paper's three attention losses, one row of a table each.

The paper's equations 15-22 and its public code disagree in almost every constant, so each reading
is a :class:`VariantRules` and the loss functions look up the field they need. What the readings do
to the attention:

- The paper's hinge acts on misordered pairs only and is 0 for a constant centre, so that attention
  may collapse to one point, which also minimises the other two terms.
- The authors' code rewards the gaps of pairs that are already in order. It never vanishes, which is
  the force that keeps attention spread; misordered pairs feel nothing.
- ``mixed`` is both at once. The sum of the two rectified terms is minus the gap itself: a constant
  force on every pair, in order or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from i2am_train.types import LossVariant


class PairForce(StrEnum):
    """What DCML does with the gap (later centre minus earlier one) of a pair of cells."""

    REPAIR = "repair"
    """``max(0, -gap)``: misordered pairs only."""
    REWARD = "reward"
    """``-max(0, gap)``: ordered pairs only."""
    REPAIR_TO_MARGIN = "repair_to_margin"
    """``max(0, margin * steps - gap)``: misordered pairs and those that lie too close."""
    REPAIR_AND_REWARD = "repair_and_reward"
    """``max(0, -gap) - max(0, gap)``, that is ``-gap``: every pair."""


class Normaliser(StrEnum):
    """What the sum over pairs, neighbours or cells of one sample is divided by."""

    ONE = "one"
    """The plain sum."""
    ALL_SLOTS = "all_slots"
    """The size of the tensor that the authors average over, masked zeros included."""
    VALID = "valid"
    """The number of pairs, neighbours or cells inside the mask (at least 1)."""


@dataclass(frozen=True, kw_only=True)
class VariantRules:
    """How one reading computes centres and the three terms."""

    coordinate_origin: int = 0
    """Index of the first row and column. Matters only if the scores of a row do not sum to 1."""
    centre_factor: bool = False
    """Whether centres are divided by the number of reference patches, as equation 15 writes."""
    dcml_force: PairForce = PairForce.REPAIR
    dcml_norm: Normaliser = Normaliser.VALID
    tv_power: int = 2
    """1 sums absolute differences of neighbouring centres, 2 their squares."""
    tv_norm: Normaliser = Normaliser.VALID
    cwg_squared_distance: bool = True
    """``exp(-d^2 / 2 sigma^2)`` (Gaussian) if true, ``exp(-d / 2 sigma^2)`` if false."""
    cwg_norm: Normaliser = Normaliser.VALID
    cwg_of_batch: bool = False
    """Whether the number of valid cells is its mean over the batch's samples, so that the mean of
    their values is the quotient of the batch's sums. The only rule that looks at other samples."""


RULES: dict[LossVariant, VariantRules] = {
    LossVariant.PAPER: VariantRules(
        coordinate_origin=1,
        centre_factor=True,
        dcml_norm=Normaliser.ONE,
        tv_norm=Normaliser.ONE,
        cwg_norm=Normaliser.ALL_SLOTS,
    ),
    LossVariant.PAPER_WITHOUT_FACTOR: VariantRules(
        coordinate_origin=1,
        dcml_norm=Normaliser.ONE,
        tv_norm=Normaliser.ONE,
        cwg_norm=Normaliser.ALL_SLOTS,
    ),
    LossVariant.AUTHORS_V1: VariantRules(
        dcml_force=PairForce.REWARD,
        dcml_norm=Normaliser.ALL_SLOTS,
        tv_power=1,
        tv_norm=Normaliser.ALL_SLOTS,
        cwg_squared_distance=False,
        cwg_of_batch=True,
    ),
    LossVariant.AUTHORS_V2: VariantRules(
        dcml_force=PairForce.REWARD,
        dcml_norm=Normaliser.ALL_SLOTS,
        tv_norm=Normaliser.ALL_SLOTS,
        cwg_squared_distance=False,
        cwg_norm=Normaliser.ALL_SLOTS,
    ),
    LossVariant.HINGE: VariantRules(),
    LossVariant.REWARD: VariantRules(dcml_force=PairForce.REWARD),
    LossVariant.MARGIN: VariantRules(dcml_force=PairForce.REPAIR_TO_MARGIN),
    LossVariant.MIXED: VariantRules(dcml_force=PairForce.REPAIR_AND_REWARD),
}
"""The readings of paper eqs. 15-22; each row of the first five is pinned by the golden files."""
